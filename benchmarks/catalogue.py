"""Named method settings: what the tables in data/results call a method, as its description.

setting("lora, all linear", "sentiment")
setting("pfeiffer", "austen", width=32)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft_lessons.data.base_models import load_tokenizer
from peft_lessons.engine import Method
from peft_lessons.methods.adalora import AdaLoRA
from peft_lessons.methods.adapters import BottleneckAdapter
from peft_lessons.methods.dora import DoRA
from peft_lessons.methods.ia3 import IA3
from peft_lessons.methods.lora import LoRA
from peft_lessons.methods.prefix import Prefix
from peft_lessons.methods.prompt import Prompt
from peft_lessons.methods.qlora import QLoRA
from peft_lessons.methods.selective import BitFit, DiffPruning, PartialFineTuning, SparseTuning
from peft_lessons.methods.unified import MixAndMatch
from peft_lessons.methods.variants import OFT, LoftQ, LoRAPlus, PiSSA, VeRA

BASES = {"sentiment": "minilm", "austen": "tinylm"}
TOKENS = 16  # of a prompt or a prefix
_INNER = r".*layer\.\d+\.output\.dense"  # of BERT: a name would take attention.output.dense too


def _on(sentiment: Any, austen: Any) -> dict[str, Any]:
    return {"sentiment": sentiment, "austen": austen}


_FACTORS = {"rank": 8, "alpha": 16}
_ON_QV = _FACTORS | {"targets": _on(("query", "value"), ("q_proj", "v_proj"))}
_PROMPT = {"tokens": TOKENS}
_TEXT = {
    "init": _on(
        "Is this sentence from the review of a film positive or negative?",
        "It is a truth universally acknowledged, that a single man in possession of a fortune",
    ),
    "tokenizer": {task: partial(load_tokenizer, base) for task, base in BASES.items()},
}

# {name: (description, its fields)}. A field may be {task: value}; a function is called.
SETTINGS: dict[str, tuple[Callable[..., Method], dict[str, Any]]] = {
    "bitfit": (BitFit, {}),
    "norms": (PartialFineTuning, {"patterns": _on(r".*LayerNorm\..*", r".*norm\..*")}),
    "last two": (PartialFineTuning, {"last": 2}),
    "diff": (DiffPruning, {}),
    "diff, fixed": (DiffPruning, {"gates": False}),
    "sparse, random": (SparseTuning, {}),
    "sparse, largest": (SparseTuning, {"positions": "largest"}),
    "lora": (LoRA, _ON_QV),
    "lora, all linear": (LoRA, _FACTORS),
    "qlora": (QLoRA, _FACTORS),
    "dora": (DoRA, _ON_QV),
    "dora, all linear": (DoRA, _FACTORS),
    "adalora": (
        AdaLoRA,
        {"initial_rank": 12, "target_rank": 8, "alpha": 16, "targets": "all-linear"},
    ),
    "rslora": (LoRA, _FACTORS | {"rslora": True}),
    "lora+": (LoRAPlus, _FACTORS),
    "pissa": (PiSSA, _FACTORS),
    "vera": (VeRA, {"rank": 64}),
    "oft": (OFT, {"block_size": 32}),
    "loftq": (LoftQ, _FACTORS),
    "qpissa": (LoftQ, _FACTORS | {"iterations": 0, "principal": True}),
    "houlsby": (BottleneckAdapter, {"width": 8, "kind": "houlsby"}),
    "pfeiffer": (BottleneckAdapter, {"width": _on(16, 64)}),
    "parallel": (BottleneckAdapter, {"width": _on(16, 64), "kind": "parallel"}),
    "parallel, scaled": (
        BottleneckAdapter,
        {"width": _on(16, 64), "kind": "parallel", "activation": "relu", "scale": 4},
    ),
    "mixed": (MixAndMatch, {"tokens": _on(8, 16), "width": _on(8, 56), "scale": 4}),
    "ia3": (
        IA3,
        {
            "targets": _on(rf".*self\.(key|value)|{_INNER}", ("k_proj", "v_proj", "down_proj")),
            "feedforward": _on(_INNER, ("down_proj",)),
        },
    ),
    "prompt": (Prompt, _PROMPT),
    "prompt, normal": (Prompt, _PROMPT | {"init": "normal"}),
    "prompt, text": (Prompt, _PROMPT | _TEXT),
    "prefix": (Prefix, _PROMPT),
    "prefix, mlp": (Prefix, _PROMPT | {"projection": 96}),
}


def setting(name: str, task: str, **changes: Any) -> Method:
    """Return the description of a method on the base of a task, with these fields changed.

    AdaLoRA takes its schedule from `changes`. Raises ValueError for an unknown name or task."""
    for known, asked in ((SETTINGS, name), (BASES, task)):
        if asked not in known:
            raise ValueError(f"{asked!r} must be one of {', '.join(map(repr, known))}")
    description, fields = SETTINGS[name]
    fields = {k: v[task] if isinstance(v, dict) else v for k, v in (fields | changes).items()}
    return description(**{k: v() if callable(v) else v for k, v in fields.items()})


def named(method: str, variant: str) -> str:
    """Return the name of the setting that the rows of a study call by a method and a variant."""
    if method in ("adapter", "last"):
        return {"adapter": variant, "last": "last two"}[method]
    both = f"{method}, {variant.replace('-', ' ')}"
    return both if both in SETTINGS else method


def schedule(steps: int) -> dict[str, int]:
    """Return the fields of AdaLoRA's schedule over so many steps."""
    plan = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "delta": steps // 40}
    return plan | {"total_steps": steps}
