"""The study of the selective methods: biases, norms, last blocks, sparse differences.

    python benchmarks/selective_study.py   # an hour and a half on one core

Adds a row for each run on either task to data/results/selective_study.csv.

`sparse` trains as many entries of each linear layer as a LoRA of rank `size` has numbers, chosen
before training: at random, or the largest weights.

`diff` is diff pruning in two halves: the first finds where to keep one number in `size`, by the
gates or by the magnitude of a difference that trains without them, the second trains these alone.
`trainable` counts what trains in the first half. The path of the gates of tinylm's first seed goes
to diff_path.csv.
"""

from functools import partial
from typing import ClassVar

import common
from catalogue import named, setting
from common import BEFORE_TOO, NAMES, RUN, Results, at_best, fill_table, load, measured, plain

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
}
KEY = (*NAMES, *RUN)
PATH = ("step", "expected", "nonzero", "task_loss")


class Watched(DiffPruning):
    """Diff pruning that writes down at every step what is added to the loss, and the open gates."""

    seen: ClassVar[list[tuple[float, int]]] = []

    def penalty(self, injection):
        added = super().penalty(injection)
        layers = injection.wrappers.values() if self.gates else ()
        left = sum(int((layer.delta_weight() != 0).sum()) for layer in layers)
        self.seen.append((float(added.detach()), left))
        return added


def train_in_halves(model, task, steps: int, lr: float, seed: int, path: list[dict], one_in: int):
    """Find where to keep one number in so many, then train these; the history of the second half.

    path: gets a row for each step of the first half, if there are gates."""
    Watched.seen.clear()
    history = fit(model, task, steps // 2, lr=lr, seed=seed, show=False)
    injection = injection_of(model)
    everything = sum(layer.w.numel() for layer in injection.wrappers.values())
    if injection.method.gates:
        full_price = injection.method.sparsity * everything
        for step, (loss, (added, left)) in enumerate(zip(history.loss, Watched.seen, strict=True)):
            row = {"step": step + 1, "task_loss": f"{loss - added:.4f}"}
            row |= {"expected": f"{added / full_price:.5f}", "nonzero": f"{left / everything:.5f}"}
            path.append(row)
    prune_diff(model, everything // one_in)
    return fit(model, task, steps // 2, lr=lr, seed=seed + 100, show=False)


def run(name: str, method: str, variant: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, path, train = common.base_of(name, seed), [], plain
    if method == "diff":
        inject(model, Watched(gates=variant != "magnitude"))
        train = partial(train_in_halves, path=path, one_in=size)
    else:
        changes = {"last": size} if method == "last" else {}
        inject(model, setting(named(method, variant), name, **changes))
    row = measured(model, load(name), lr, seed, train, before=True)
    if path and name == "austen" and seed == 0:  # the figure of lesson 10
        Results("diff_path", KEY, PATH).add((name, method, variant, size, lr, seed), path)
    return row


if __name__ == "__main__":
    fill_table("selective_study", KEY, BEFORE_TOO, at_best(SETTINGS), run)
