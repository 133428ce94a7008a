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
from . import measure, plots
from .adapters_io import load_adapter, read_adapter, save_adapter
from .hf import setup_qlora
from .inject import freeze, inject, injection_of, merge, methods, report, unload, unmerge
from .machine import machine_check
from .methods.adalora import AdaLoRA
from .methods.adapters import Adapter, BottleneckAdapter
from .methods.dora import DoRA, DoRALayer, LinearWithDoRA, cached_norms
from .methods.ia3 import IA3, IA3Layer, LinearWithIA3
from .methods.lora import LinearWithLoRA, LoRA, LoRALayer, apply_lora_to_model
from .methods.prefix import Prefix, PrefixTuning, drop_mlp, start_prefix
from .methods.prompt import Prompt, PromptTuning, prompt_of, prompts_for_rows
from .methods.qlora import NF4Linear, QLoRA, dequantize
from .models import load_model, load_tokenizer
from .results import best, load_results, spread, tuned
from .tables import table
from .tasks import load_task
from .training import History, Scores, TrainingDiverged, evaluate, fit

__all__ = [
    "IA3",
    "AdaLoRA",
    "Adapter",
    "BottleneckAdapter",
    "DoRA",
    "DoRALayer",
    "History",
    "IA3Layer",
    "LinearWithDoRA",
    "LinearWithIA3",
    "LinearWithLoRA",
    "LoRA",
    "LoRALayer",
    "NF4Linear",
    "Prefix",
    "PrefixTuning",
    "Prompt",
    "PromptTuning",
    "QLoRA",
    "Scores",
    "TrainingDiverged",
    "apply_lora_to_model",
    "best",
    "cached_norms",
    "check",
    "dequantize",
    "drop_mlp",
    "evaluate",
    "fit",
    "freeze",
    "inject",
    "injection_of",
    "load_adapter",
    "load_model",
    "load_results",
    "load_task",
    "load_tokenizer",
    "machine_check",
    "measure",
    "merge",
    "methods",
    "plots",
    "prompt_of",
    "prompts_for_rows",
    "read_adapter",
    "report",
    "save_adapter",
    "setup_qlora",
    "spread",
    "start_prefix",
    "table",
    "tuned",
    "unload",
    "unmerge",
]
