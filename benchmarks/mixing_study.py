"""The study of what mixing gives: scaled parallel adapters, and the same beside a prefix.

    python benchmarks/mixing_study.py               # forty minutes on one core
    python benchmarks/mixing_study.py --backwards   # beside the first, on a second core

Trains minilm on movie sentiment (200 steps) and tinylm on Jane Austen's novels (100 steps) and adds
a row for each run to data/results/mixing_study.csv. Every setting is tried at each of its learning
rates with one seed; the best one by the validation split is run with two more. Their sizes give
about as many numbers as the adapters of additive_study.csv have.
"""

import sys
from functools import partial

from common import base_of, measured, study

from peft_lessons import BottleneckAdapter, MixAndMatch, fit, inject

RATES = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
SETTINGS = {  # (task, method, scale, width of the adapter): rates
    ("sentiment", "parallel", 4, 16): RATES[0],
    ("sentiment", "mixed", 4, 8): RATES[0],
    ("austen", "parallel", 4, 64): RATES[1],
    ("austen", "parallel", 1, 64): RATES[1],
    ("austen", "mixed", 4, 56): RATES[1],
}
TOKENS = {"sentiment": 8, "austen": 16}  # of the mixed ones


def run(task, setting: tuple, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    name, method, scale, width = setting
    model = base_of(name, seed)
    if method == "mixed":
        inject(model, MixAndMatch(TOKENS[name], width, scale=scale))
    else:
        inject(model, BottleneckAdapter(width, "parallel", activation="relu", scale=scale))
    return measured(task, setting, model, partial(fit, lr=lr, seed=seed, show=False))


if __name__ == "__main__":
    study("mixing_study", SETTINGS, run, backwards="--backwards" in sys.argv)
