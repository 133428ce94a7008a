"""PEFT Lessons: parameter-efficient fine-tuning, built from scratch, checked and measured.

The verbs of the course, the same for every method:

    task = load_task("sentiment")
    model = load_model("minilm", labels=2)
    inject(model, LoRA(rank=8, alpha=16, targets=("query", "value")))
    fit(model, task, steps=200)
    evaluate(model, task)
    save_adapter(model, "my-adapter"); merge(model)
"""

from . import checks as check
from .costs import measure
from .costs.recommend import recommend_peft_method
from .data.base_models import load_model, load_tokenizer
from .data.tasks import load_task
from .engine import (
    disabled,
    freeze,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from .hf.setup import load_and_merge_adapter, setup_peft_training, setup_qlora
from .machine import check_environment
from .methods.adalora import AdaLoRA
from .methods.adapters import Adapter, BottleneckAdapter
from .methods.dora import DoRA, DoRALayer
from .methods.ia3 import IA3, IA3Layer
from .methods.lora import LinearWithLoRA, LoRA, LoRALayer, apply_lora_to_model
from .methods.prefix import Prefix, PrefixTuning
from .methods.prompt import Prompt, PromptTuning
from .methods.qlora import QLoRA
from .methods.selective import BitFit, DiffPruning, PartialFineTuning, SparseTuning
from .methods.unified import MixAndMatch
from .methods.variants import OFT, LoftQ, LoRAPlus, PiSSA, VeRA
from .studies import Study, plots, table
from .train.generate import generate_text
from .train.loop import evaluate, fit

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
    "IA3Layer",
    "LinearWithLoRA",
    "LoRA",
    "LoRALayer",
    "LoRAPlus",
    "LoftQ",
    "MixAndMatch",
    "PartialFineTuning",
    "PiSSA",
    "Prefix",
    "PrefixTuning",
    "Prompt",
    "PromptTuning",
    "QLoRA",
    "SparseTuning",
    "Study",
    "VeRA",
    "apply_lora_to_model",
    "check",
    "check_environment",
    "disabled",
    "evaluate",
    "fit",
    "freeze",
    "generate_text",
    "inject",
    "load_adapter",
    "load_and_merge_adapter",
    "load_model",
    "load_task",
    "load_tokenizer",
    "measure",
    "merge",
    "plots",
    "recommend_peft_method",
    "report",
    "save_adapter",
    "setup_peft_training",
    "setup_qlora",
    "table",
    "train_with_peft",
    "unload",
    "unmerge",
]


def __getattr__(name: str):
    if name == "train_with_peft":  # transformers' Trainer takes a second to import
        from .hf.trainer import train_with_peft

        return train_with_peft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
