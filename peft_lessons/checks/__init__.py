"""The checks of the exercises: `check.lora.unmerge_lora(unmerge_lora)`, one module per lesson."""

from . import adalora, dora, lora, qlora, start, why
from .kit import Verdict, WrongAnswer

__all__ = ["Verdict", "WrongAnswer", "adalora", "dora", "lora", "qlora", "start", "why"]
