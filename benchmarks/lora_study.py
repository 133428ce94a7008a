"""The LoRA study: rank, alpha, learning rate, target modules, head-only and full fine-tuning.

    python benchmarks/lora_study.py        # an hour and a half on one core

Trains minilm on movie sentiment once for each point and seed and adds a row to
data/results/lora_study.csv. Learning rates are to be chosen by the column `validation`.
"""

import sys
from functools import partial

import torch
from common import MEASURED, SEEDS, Results, base_of, fill, load, measured, missing

from peft_lessons import freeze, inject
from peft_lessons.studies.catalogue import setting

KEY = ("method", "targets", "rank", "alpha", "lr", "steps", "seed")
NAMED = {"qv": "lora", "all-linear": "lora, all linear"}


def points() -> list[tuple]:
    """(method, targets, rank, alpha, lr, steps) of every point, what matters most first."""
    short = [  # as long as the lesson's own runs
        ("head", "", 0, 0, 1e-2, 50),
        ("lora", "qv", 8, 16, 3e-3, 50),
        ("full", "", 0, 0, 2e-4, 50),
    ]
    baselines = [("full", "", 0, 0, lr, 200) for lr in (1e-4, 2e-4, 4e-4)]
    baselines += [("head", "", 0, 0, lr, 200) for lr in (1e-2, 3e-2)]
    # All but the embeddings: what LoRA on the layers could reach at full rank.
    baselines += [("encoder", "", 0, 0, lr, 200) for lr in (1e-4, 2e-4)]
    rates = [("lora", "qv", rank, 16, lr, 200) for rank in (8, 1, 64) for lr in (1e-3, 3e-3, 1e-2)]
    # LoRA at the rate that full fine-tuning likes best.
    rates += [("lora", "qv", 8, 16, 2e-4, 200)]
    modules = [
        ("lora", "all-linear", rank, 16, lr, 200)
        for rank in (8, 4)
        for lr in (1e-3, 3e-3, 3e-4, 1e-2)
    ]
    ranks = [("lora", "qv", rank, 16, 3e-3, 200) for rank in (4, 16)]
    alphas = [("lora", "qv", 8, alpha, 3e-3, 200) for alpha in (4, 64)]
    # Whether another learning rate makes up for another alpha.
    alphas += [
        ("lora", "qv", 8, *both, 200) for both in ((64, 1e-3), (64, 3e-4), (4, 1e-2), (4, 1e-3))
    ]
    long = [  # one epoch and a half, at the best learning rates of 200 steps
        ("head", "", 0, 0, 1e-2, 600),
        ("full", "", 0, 0, 1e-4, 600),
        ("lora", "qv", 8, 16, 3e-3, 600),
        ("lora", "all-linear", 4, 16, 1e-3, 600),
        ("lora", "all-linear", 8, 16, 1e-3, 600),
    ]
    return [*short, *rates[:3], *baselines, *modules, *long, *rates[3:], *ranks, *alphas]


def run(task, method: str, targets: str, rank: int, alpha: int, lr: float, steps: int, seed: int):
    """Train one point and return its measured columns."""
    model = base_of(task.name, seed)
    if method == "lora":
        inject(model, setting(NAMED[targets], task.name, rank=rank, alpha=alpha))
    elif method in ("head", "encoder"):
        freeze(model, modules_to_save=("encoder",) if method == "encoder" else ())
    return measured(model, task, lr, seed, steps=steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = Results("lora_study", (*KEY, "trainable", *MEASURED))
    left = partial(missing, results, KEY, [(*p, seed) for p in points() for seed in SEEDS])
    fill(results, KEY, left, partial(run, load("sentiment")), "--backwards" in sys.argv)
