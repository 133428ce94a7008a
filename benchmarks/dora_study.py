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

from common import (
    MEASURED,
    SEEDS,
    Results,
    base_of,
    load,
    measured,
    missing,
    paired_counts,
    right_answers,
    study,
)

from peft_lessons import fit, inject
from peft_lessons.engine import injection_of
from peft_lessons.studies.catalogue import setting

RATES = (1e-3, 3e-3, 1e-2)
SETTINGS = dict.fromkeys((("dora", 8), ("lora", 9), ("dora", 1), ("lora", 2)), RATES)
# Too large a rate breaks LoRA; with all seeds, to see what it does to DoRA.
SURVIVE = (("dora", 8), ("dora", 1), ("dora, m frozen", 8), ("dora, m frozen", 1))
SAME_RATE = ({("dora, all linear", 8): (1e-3,)}, {("lora, all linear", 8): (3e-3,)})
PAIRED, OTHERS = "DoRA, rank 8", ("LoRA, rank 8", "LoRA, rank 9")
BEST = 3e-3  # the best learning rate of all three by validation
COUNTS = ("both", "only_first", "only_second", "neither")


def run(task, method: str, rank: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(task.name, seed)
    inject(model, setting(method.removesuffix(", m frozen"), task.name, rank=rank))
    if method == "dora, m frozen":
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.magnitude.requires_grad_(False)
    return measured(model, task, lr, seed)


def answers(task, name: str, seed: int) -> list[bool]:
    """Train e.g. "DoRA, rank 8" and return which test sentences it gets right."""
    model, (method, rank) = base_of(task.name, seed), name.split(", rank ")
    inject(model, setting(method.lower(), task.name, rank=int(rank)))
    fit(model, task, 200, lr=BEST, seed=seed, show=False)
    return right_answers(model, task)


def pair(task) -> None:
    results = Results("dora_pairs", ("method", "other", "lr", "seed", *COUNTS))
    points = [(other, seed) for seed in SEEDS for other in OTHERS]
    left = missing(results, ("other", "seed"), points)
    for seed in sorted({seed for _, seed in left}):
        first = answers(task, PAIRED, seed)
        for other in (other for other, own in left if own == seed):
            counts = paired_counts(first, answers(task, other, seed))
            results.add(method=PAIRED, other=other, lr=BEST, seed=seed, **counts)
            print(PAIRED, other, seed, counts, flush=True)


if __name__ == "__main__":
    columns, tasks = ("steps", "trainable", *MEASURED), {"sentiment": load("sentiment")}
    for settings in (SETTINGS, dict.fromkeys(SURVIVE, RATES[-1:]), *SAME_RATE):
        study("dora_study", ("method", "rank"), columns, settings, run, tasks)
    pair(tasks["sentiment"])
