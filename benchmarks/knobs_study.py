"""Is it better to add a matrix of rank 1 to a weight or to multiply by one?

    python benchmarks/knobs_study.py       # half an hour on one core

Trains tinylm on Jane Austen's novels as `adapters_study.py` does, with (IA)³ and with pairs of
methods that adapt the same layers with as many parameters: LoRA of rank 1, which is W + a bᵀ, and
vectors on both sides of a layer, "ia3, both", which is W ⊙ (a bᵀ). Learning rates are chosen with
seed 0, by `validation`. data/results/knobs_study.csv gets a row for each run. The variants are the
layers of (IA)³, or only the feed-forward's last one, where LoRA has as many parameters as (IA)³.
"""

from dataclasses import replace
from functools import partial

import torch
from adapters_study import MEASURED, bracketed, trained
from additive_study import described
from catalogue import setting
from common import NAMES, RUN, base_of, fill_table
from torch import nn

from peft_lessons import freeze, inject
from peft_lessons.engine import matches

ALL, DOWN = "key, value, down", "down"
SETTINGS = {  # (task, method, variant, rank): a rate to begin with; those that matter most first
    ("austen", "ia3", ALL, 0): 1e-1,
    ("austen", "lora", ALL, 1): 3e-2,
    ("austen", "ia3, both", ALL, 1): 1e-1,
    ("austen", "lora", DOWN, 1): 3e-2,
    ("austen", "ia3, both", DOWN, 1): 1e-1,
}


class InAndOut(nn.Module):
    """Compute ((x ⊙ b) Wᵀ + c) ⊙ a (..., out): the vectors b (in,) and a (out,) start at one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.ones(linear.out_features))
        self.b = nn.Parameter(torch.ones(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.b) * self.a  # (..., out)


def build(model: nn.Module, task: str, method: str, layers: str, size: int) -> None:
    """Put what a row names into a model."""
    ia3 = setting("ia3", task)
    targets = ia3.targets if layers == ALL else ia3.feedforward
    if method == "lora":
        inject(model, replace(described(task, "lora", "qv", size), targets=targets))
    elif method == "ia3":
        inject(model, ia3)
    else:
        freeze(model)
        for path, layer in ia3.find(model).items():
            if matches(path, targets):
                model.set_submodule(path, InAndOut(layer))


def run(task: str, method: str, layers: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(task, seed)
    build(model, task, method, layers, size)
    return trained(model, task, lr, seed)


if __name__ == "__main__":
    points = partial(bracketed, settings=SETTINGS)
    fill_table("knobs_study", (*NAMES, *RUN), MEASURED, points, run)
