"""The study of the selective methods: biases, norms, last blocks, sparse differences.

    python benchmarks/selective_study.py   # an hour and a half on one core

Adds a row for each run on either task to data/results/selective_study.csv.

`sparse` trains as many entries of each linear layer as a LoRA of rank `size` has numbers, chosen
before training: at random, or the largest weights.

`diff` is diff pruning in two halves: the first finds where to keep one number in `size`, by the
gates or by the magnitude of a difference that trains without them, the second trains these alone.
`trainable` counts what trains in the first half.

`mask` trains one number in `size` from the first step: entries drawn at random, or those of largest
gradient in each matrix, shared out over its rows.
"""

from functools import partial

import common
from catalogue import named, setting
from common import BEFORE_TOO, NAMES, RUN, at_best, fill_table, load, measured, plain
from entries_study import only, weights_of

from peft_lessons import DiffPruning, fit, inject
from peft_lessons.engine import injection_of
from peft_lessons.methods.selective import prune_diff

LOW, MIDDLE, HIGH = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
DIFFS, SPARSE = ("gates", "magnitude"), ("random", "largest")
SETTINGS = {  # (task, method, variant, blocks, one in how many numbers, or rank): rates
    ("sentiment", "bitfit", "", 0): MIDDLE,
    ("sentiment", "norms", "", 0): MIDDLE,
    **{("sentiment", "last", "", k): LOW for k in (1, 2)},
    **{("sentiment", "diff", kind, 200): (*MIDDLE, 3e-2) for kind in DIFFS},
    **{("sentiment", "sparse", kind, 8): (*MIDDLE, 3e-2) for kind in SPARSE},
    ("austen", "norms", "", 0): HIGH,
    ("austen", "last", "", 2): MIDDLE,
    **{("austen", "diff", kind, 200): (*HIGH, 1e-1) for kind in DIFFS},
    **{("austen", "sparse", kind, 8): (1e-2, 3e-2, 1e-1) for kind in SPARSE},
    **{("austen", "mask", kind, 200): (3e-2, 1e-1, 3e-1) for kind in ("random", "rows")},
}
KEY = (*NAMES, *RUN)


def train_in_halves(model, task, steps: int, lr: float, seed: int, one_in: int):
    """Find where to keep one number in so many, then train these; return their history."""
    fit(model, task, steps // 2, lr=lr, seed=seed, show=False)
    everything = sum(layer.w.numel() for layer in injection_of(model).wrappers.values())
    prune_diff(model, everything // one_in)
    return fit(model, task, steps // 2, lr=lr, seed=seed + 100, show=False)


def run(name: str, method: str, variant: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, train, counted = common.base_of(name, seed), plain, {}
    if method == "mask":
        entries = sum(weight.numel() for weight in weights_of(model)) // size
        counted = {"trainable": only(model, variant, entries, 0, seed)}
    elif method == "diff":
        inject(model, DiffPruning(gates=variant != "magnitude"))
        train = partial(train_in_halves, one_in=size)
    else:
        changes = {"last": size} if method == "last" else {}
        inject(model, setting(named(method, variant), name, **changes))
    return measured(model, load(name), lr, seed, train, before=True) | counted


if __name__ == "__main__":
    fill_table("selective_study", KEY, BEFORE_TOO, at_best(SETTINGS), run)
