"""The study of the selective methods: biases, norms, last blocks, sparse differences.

    python benchmarks/selective_study.py               # an hour and a half on one core
    python benchmarks/selective_study.py --backwards   # beside the first, on a second core

Trains minilm on movie sentiment (200 steps) and tinylm on Jane Austen's novels (100 steps) and adds
a row for each run to data/results/selective_study.csv: accuracy, or perplexity, before and after.
Every setting is tried at each of its learning rates with one seed; the best one by the validation
split is run with two more.

`diff` is diff pruning in two halves: the first finds where to keep one number in `size`, by the
gates or by the magnitude of a difference that trains without them, the second trains these alone.
`trainable` counts what trains in the first half. The path of the gates goes to diff_path.csv.
"""

import sys
from functools import partial
from typing import ClassVar

from common import NAMES, Results, base_of, measured, study

from peft_lessons import BitFit, DiffPruning, PartialFineTuning, fit, inject
from peft_lessons.engine import injection_of
from peft_lessons.methods.selective import prune_diff

NORMS = {"sentiment": r".*LayerNorm\..*", "austen": r".*norm\..*"}
LOW, MIDDLE, HIGH = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
DIFFS = ("gates", "magnitude")
SETTINGS = {  # (task, method, variant, blocks or one in how many numbers): rates
    ("sentiment", "bitfit", "", 0): MIDDLE,
    ("sentiment", "norms", "", 0): MIDDLE,
    **{("sentiment", "last", "", k): LOW for k in (1, 2)},
    **{("sentiment", "diff", kind, 200): (*MIDDLE, 3e-2) for kind in DIFFS},
    ("austen", "norms", "", 0): HIGH,
    ("austen", "last", "", 2): MIDDLE,
    **{("austen", "diff", kind, 200): (*HIGH, 1e-1) for kind in DIFFS},
}
PATH = (*NAMES, "lr", "seed", "step", "expected", "nonzero", "task_loss")


def method_of(task: str, method: str, variant: str, size: int):
    """The description of a setting."""
    if method == "bitfit":
        return BitFit()
    if method == "norms":
        return PartialFineTuning(patterns=NORMS[task])
    if method == "last":
        return PartialFineTuning(last=size)
    return Watched(gates=variant != "magnitude")


class Watched(DiffPruning):
    """Diff pruning that writes down at every step what is added to the loss, and the open gates."""

    seen: ClassVar[list[tuple[float, int]]] = []

    def penalty(self, injection):
        added = super().penalty(injection)
        layers = injection.wrappers.values() if self.gates else ()
        left = sum(int((layer.delta_weight() != 0).sum()) for layer in layers)
        self.seen.append((float(added.detach()), left))
        return added


def train_in_halves(model, task, steps: int, one_in: int, lr: float, seed: int, path: list[dict]):
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


def run(paths: Results, task, setting: tuple, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, path = base_of(setting[0], seed), []
    inject(model, method_of(*setting))
    if setting[1] == "diff":
        train = partial(train_in_halves, one_in=setting[3], lr=lr, seed=seed, path=path)
    else:
        train = partial(fit, lr=lr, seed=seed, show=False)
    row = measured(task, setting, model, train)
    # Now, not step by step: a run that is stopped begins anew, and must leave no rows behind.
    for step in path:
        paths.add(**dict(zip(NAMES, setting, strict=True)), lr=lr, seed=seed, **step)
    return row


if __name__ == "__main__":
    run = partial(run, Results("diff_path", PATH))
    study("selective_study", SETTINGS, run, backwards="--backwards" in sys.argv)
