"""The checks of the exercises: `check.lora.unmerge_lora(unmerge_lora)`, one module per lesson."""

from . import (
    adalora,
    adapters,
    assistant,
    beyond,
    choosing,
    dora,
    hf_peft,
    ia3,
    lora,
    prefix,
    prompt,
    qlora,
    selective,
    start,
    unified,
    why,
)
from .kit import Verdict, WrongAnswer

__all__ = [
    "Verdict",
    "WrongAnswer",
    "adalora",
    "adapters",
    "assistant",
    "beyond",
    "choosing",
    "dora",
    "hf_peft",
    "ia3",
    "lora",
    "prefix",
    "prompt",
    "qlora",
    "selective",
    "start",
    "unified",
    "why",
]
