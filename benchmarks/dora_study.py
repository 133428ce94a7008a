"""The DoRA study: DoRA against LoRA with slightly fewer and slightly more parameters.

    python benchmarks/dora_study.py        # three quarters of an hour on one core

Trains minilm on movie sentiment and adds a row for each run to data/results/dora_study.csv. A
magnitude vector weighs as much as half a rank here, so DoRA of rank r stands between LoRA of rank r
(in lora_study.csv) and of rank r + 1. DoRA runs at the highest rate with all seeds as well, also
with lengths that do not train. On all linear layers, DoRA and LoRA run with all seeds at the rate
that choosing_study.csv has with all seeds for the other method.

Then DoRA of rank 8 is paired with LoRA, seed by seed: data/results/dora_pairs.csv counts
the test sentences that both, only the first, only the second or neither gets right.
"""

from functools import cache

import common
import torch
from catalogue import setting
from common import MEASURED, PAIRED, RUN, SEEDS, at_best, fill_table, load

from peft_lessons import fit, inject
from peft_lessons.engine import injection_of

RATES = (1e-3, 3e-3, 1e-2)
SETTINGS = dict.fromkeys((("dora", 8), ("lora", 9), ("dora", 1), ("lora", 2)), RATES)
# Too large a rate breaks LoRA; with all seeds, to see what it does to DoRA.
SURVIVE = (("dora", 8), ("dora", 1), ("dora, m frozen", 8), ("dora, m frozen", 1))
SAME_RATE = ({("dora, all linear", 8): (1e-3,)}, {("lora, all linear", 8): (3e-3,)})
FIRST, OTHERS = "DoRA, rank 8", ("LoRA, rank 8", "LoRA, rank 9")
BEST = 3e-3  # the best learning rate of all three by validation


def build(method: str, rank: int, seed: int) -> torch.nn.Module:
    """Return minilm with a method in it, whose magnitudes may be frozen."""
    model = common.base_of("sentiment", seed)
    inject(model, setting(method.removesuffix(", m frozen"), "sentiment", rank=rank))
    if method == "dora, m frozen":
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.magnitude.requires_grad_(False)
    return model


def run(method: str, rank: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    return common.measured(build(method, rank, seed), load("sentiment"), lr, seed)


@cache
def answers(name: str, seed: int) -> list[bool]:
    """Train e.g. "DoRA, rank 8" and return which test sentences it gets right."""
    task, (method, rank) = load("sentiment"), name.split(", rank ")
    model = build(method.lower(), int(rank), seed)
    fit(model, task, 200, lr=BEST, seed=seed, show=False)
    return common.right_answers(model, task)


def pair(method: str, other: str, lr: float, seed: int) -> dict[str, int]:
    """Count the sentences that both of two methods get right, only one, or neither."""
    return common.paired_counts(answers(method, seed), answers(other, seed))


if __name__ == "__main__":
    key, columns = ("method", "rank", *RUN), ("steps", "trainable", *MEASURED)
    for settings in (SETTINGS, dict.fromkeys(SURVIVE, RATES[-1:]), *SAME_RATE):
        fill_table("dora_study", key, columns, at_best(settings, max), run)
    pairs = [(FIRST, other, BEST, seed) for seed in SEEDS for other in OTHERS]
    fill_table("dora_pairs", ("method", "other", *RUN), PAIRED, pairs, pair)
