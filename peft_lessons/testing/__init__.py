"""Tell whether a method does what it promises, here and in Hugging Face PEFT.

Nothing here is needed to train a model.
"""

from .compare import (
    adapter_bytes,
    compare_outputs,
    copy_parameters,
    interoperability,
    roundtrip_error,
    show_refusal,
)

__all__ = [
    "adapter_bytes",
    "compare_outputs",
    "copy_parameters",
    "interoperability",
    "roundtrip_error",
    "show_refusal",
]
