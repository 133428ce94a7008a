"""Test a method: tiny models, one conformance suite, and the exchange of files with Hugging Face.

`check_method(LoRA(rank=4))` runs a method through everything the course expects of one and raises
`MethodError` with a sentence that names the mistake. The course's own methods, exercise 11.3 and
whoever adds a method share this suite. `interoperability` exchanges adapters with PEFT.

Nothing here downloads anything, changes a model it is given, or moves the global random state; and
nothing here says whether a method is any good.
"""

# ruff: noqa: F401

from .compare import adapter_bytes, compare_outputs, copy_parameters, roundtrip_error, show_refusal
from .conformance import MethodError, check_method
from .exchange import interoperability
from .tiny import padded_batch, perturb
