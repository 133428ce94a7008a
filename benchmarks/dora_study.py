"""The DoRA study: DoRA of rank 8 on query and value, which lora_study.csv has LoRA for.

    python benchmarks/dora_study.py        # a quarter of an hour on one core

Trains minilm on movie sentiment and adds a row for each run to data/results/dora_study.csv: DoRA at
its best learning rate and at one that is too large, there also with lengths that do not train.
dora_swaps.csv has the rates between them and beyond.

Then DoRA is paired with LoRA at the best rate of both, seed by seed: data/results/dora_pairs.csv
counts the test sentences that both, only the first, only the second or neither gets right.
"""

from functools import cache

import common
import torch
from catalogue import setting
from common import MEASURED, PAIRED, RUN, SEEDS, at_best, fill_table, load

from peft_lessons import fit, inject
from peft_lessons.engine import injection_of

RATES = (1e-3, 3e-3, 1e-2)
SETTINGS = {("dora", 8): RATES}
# Too large a rate breaks LoRA; with all seeds, to see what it does to DoRA.
SURVIVE = dict.fromkeys((("dora", 8), ("dora, m frozen", 8)), RATES[-1:])
FIRST, OTHER = "DoRA, rank 8", "LoRA, rank 8"
BEST = 3e-3  # the best learning rate of both by validation


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
    for settings in (SETTINGS, SURVIVE):
        fill_table("dora_study", key, columns, at_best(settings, max), run)
    pairs = [(FIRST, OTHER, BEST, seed) for seed in SEEDS]
    fill_table("dora_pairs", ("method", "other", *RUN), PAIRED, pairs, pair)
