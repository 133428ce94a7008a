"""Is it better to add a matrix of rank 1 to a weight or to multiply by one?

    python benchmarks/knobs_study.py       # half an hour on one core

Trains tinylm on Jane Austen's novels as `adapters_study.py` does, with (IA)³ and with pairs of
methods that adapt the same layers with as many parameters: LoRA of rank 1, which is W + a bᵀ, and
vectors on both sides of a layer, "ia3, both", which is W ⊙ (a bᵀ). The variants are the layers of
(IA)³, or only the feed-forward's last one, where LoRA has as many parameters as (IA)³. One pair
also trains for 100 steps of 16 blocks, as in `additive_study.py`, with two seeds. Learning rates
are chosen with seed 0, by `validation`. data/results/knobs_study.csv gets a row for each run.
"""

from dataclasses import replace

import torch
from adapters_study import MEASURED, bracketed, trained
from additive_study import described
from catalogue import setting
from common import NAMES, RUN, SEEDS, Results, base_of, fill_table, load, measured
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
SHORT, LONG = 50, 100  # steps
ALSO_LONG = {"lora": (1e-2, 3e-2, 1e-1, 3e-1), "ia3, both": (3e-2, 1e-1, 3e-1)}
KEY = (*NAMES, *RUN, "steps")


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


def run(task: str, method: str, layers: str, size: int, lr: float, seed: int, steps: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(task, seed)
    build(model, task, method, layers, size)
    if steps == LONG:
        return {"losses": ""} | measured(model, load(task), lr, seed)
    return trained(model, task, lr, seed)


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    rows = [row for row in results.rows() if int(row["steps"]) == SHORT]
    due = [(*point, SHORT) for point in bracketed(rows, SETTINGS)]
    for method, rates in ALSO_LONG.items():
        names = "austen", method, ALL, 1
        due += [(*names, lr, SEEDS[0], LONG) for lr in rates]
        due.append((*names, 0.1, SEEDS[1], LONG))
    return due


if __name__ == "__main__":
    fill_table("knobs_study", KEY, MEASURED, points, run)
