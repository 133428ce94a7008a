"""PEFT Lessons: parameter-efficient fine-tuning, built from scratch, proved and measured.

The verbs of the course, the same for every method:

    task = load_task("sentiment")
    model = load_model("minilm", labels=2)
    inject(model, LoRA(rank=8, alpha=16, targets=("query", "value")))
    fit(model, task, steps=200)
    evaluate(model, task)
    save_adapter(model, "my-adapter"); merge(model)
"""

from . import checks as check
from . import measure, memory, plots
from .adapters_io import load_adapter, read_adapter, save_adapter
from .advice import adviser, recommend_peft_method
from .hf import load_and_merge_adapter, setup_peft_training, setup_qlora
from .inject import freeze, inject, injection_of, merge, registered_methods, report, unload, unmerge
from .machine import machine_check
from .methods.adalora import AdaLoRA
from .methods.adapters import Adapter, BottleneckAdapter
from .methods.dora import DoRA, DoRALayer, LinearWithDoRA, cached_norms
from .methods.ia3 import IA3, IA3Layer, LinearWithIA3
from .methods.lora import LinearWithLoRA, LoRA, LoRALayer, apply_lora_to_model
from .methods.prefix import Prefix, PrefixTuning, drop_mlp, start_prefix
from .methods.prompt import Prompt, PromptTuning, prompt_of, prompts_for_rows
from .methods.qlora import NF4Linear, QLoRA, dequantize
from .methods.selective import BitFit, DiffPruning, PartialFineTuning, prune_diff
from .methods.unified import MixAndMatch
from .methods.variants import OFT, LoftQ, LoRAPlus, PiSSA, VeRA
from .models import load_model, load_tokenizer, write
from .proof import (
    adapter_bytes,
    agreement,
    attempt,
    copy_values,
    there_and_back,
    with_method,
)
from .results import (
    against_peft,
    beside,
    by_rate,
    compare,
    difference,
    load_results,
    measured_on,
    references,
    scores,
    spread,
    stored_costs,
    student_t,
    tuned,
    undominated,
)
from .tables import cost_table, table
from .tasks import load_task
from .testing.interoperability import interoperability
from .training import History, Scores, TrainingDiverged, evaluate, fit, standard_error

__all__ = [
    "IA3",
    "OFT",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "BottleneckAdapter",
    "DiffPruning",
    "DoRA",
    "DoRALayer",
    "History",
    "IA3Layer",
    "LinearWithDoRA",
    "LinearWithIA3",
    "LinearWithLoRA",
    "LoRA",
    "LoRALayer",
    "LoRAPlus",
    "LoftQ",
    "MixAndMatch",
    "NF4Linear",
    "PartialFineTuning",
    "PiSSA",
    "Prefix",
    "PrefixTuning",
    "Prompt",
    "PromptTuning",
    "QLoRA",
    "Scores",
    "TrainingDiverged",
    "VeRA",
    "adapter_bytes",
    "adviser",
    "against_peft",
    "agreement",
    "apply_lora_to_model",
    "attempt",
    "beside",
    "by_rate",
    "cached_norms",
    "check",
    "compare",
    "copy_values",
    "cost_table",
    "dequantize",
    "difference",
    "drop_mlp",
    "evaluate",
    "fit",
    "freeze",
    "inject",
    "injection_of",
    "interoperability",
    "load_adapter",
    "load_and_merge_adapter",
    "load_model",
    "load_results",
    "load_task",
    "load_tokenizer",
    "machine_check",
    "measure",
    "measured_on",
    "memory",
    "merge",
    "plots",
    "prompt_of",
    "prompts_for_rows",
    "prune_diff",
    "read_adapter",
    "recommend_peft_method",
    "references",
    "registered_methods",
    "report",
    "save_adapter",
    "scores",
    "setup_peft_training",
    "setup_qlora",
    "spread",
    "standard_error",
    "start_prefix",
    "stored_costs",
    "student_t",
    "table",
    "there_and_back",
    "train_with_peft",
    "tuned",
    "undominated",
    "unload",
    "unmerge",
    "with_method",
    "write",
]


def __getattr__(name: str):
    if name == "train_with_peft":  # transformers' Trainer takes a second to import
        from .hf_training import train_with_peft

        return train_with_peft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
