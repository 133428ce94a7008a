"""The AdaLoRA study: a budget of ranks spent by AdaLoRA, evenly by LoRA, or by hand.

    python benchmarks/adalora_study.py     # two hours on one core

Trains minilm on movie sentiment on all linear layers, and adds a row for each run to
data/results/adalora_study.csv, one for each layer of an AdaLoRA run to adalora_ranks.csv, and for
the runs that the lesson compares the sentences they get right to adalora_runs.csv, from which
adalora_pairs.csv is counted. `adalora, sums` adds up the scores of a triplet's entries instead of
averaging; `adalora, γ 0.1` has another weight of the regulariser than PEFT's default 0.5; `lora,
map` gives each matrix the rank that AdaLoRA's run with seed 0 left it.
"""

import itertools
from functools import partial
from typing import ClassVar
from unittest import mock

import torch
from common import (
    MEASURED,
    SEEDS,
    STEPS,
    Results,
    base_of,
    load,
    measured,
    missing,
    paired_counts,
    plain,
    right_answers,
    study,
)

from peft_lessons import inject
from peft_lessons.engine import injection_of
from peft_lessons.methods import adalora
from peft_lessons.methods.lora import LinearWithLoRA, LoRA
from peft_lessons.studies.catalogue import schedule, setting

LORA_RATES, ADALORA_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
WEIGHTS = {"adalora, γ 0": 0.0, "adalora, γ 0.1": 0.1}  # of the regulariser
SETTINGS = {  # (method, rank a layer at the start, and at the end on average, steps): rates
    ("adalora", 6, 4, 200): ADALORA_RATES,
    ("lora", 4, 4, 200): LORA_RATES,
    ("adalora", 2, 1, 200): ADALORA_RATES,
    ("lora", 1, 1, 200): LORA_RATES,
    ("adalora, sums", 6, 4, 200): (1e-2,),
    ("adalora", 6, 4, 600): (3e-3, 1e-2),  # against LoRA of 600 steps in lora_study.csv
}
WEIGHTED = {(name, 6, 4, 200): (1e-2, 3e-3) for name in WEIGHTS}
BY_HAND = {("lora, map", 4, 4, 200): (3e-3,)}
NAMES = ("method", "initial", "rank", "steps")
BEST = {"adalora": 1e-2, "lora": 3e-3, "adalora, sums": 1e-2, "lora, map": 3e-3}
PAIRS = (("adalora", "lora"), ("adalora", "adalora, sums"), ("lora, map", "lora"))
COUNTED = ("pruned", "back", "alive")  # triplets ever pruned; kept again later; kept at the end


def by_sums(branch):
    """Scores of triplets from the sums of their entries' scores, where the method takes means."""
    a, e, b = (s * u for _, s, u in adalora.remembered(branch))
    return e.flatten() + (a.sum(dim=1) + b.sum(dim=0))


class ByMap(LoRA):
    """LoRA with a rank of its own in each matrix, and the same scaling α/r in all of them."""

    kept: ClassVar[dict[tuple[str, str], int]] = {}  # {(layer, module): rank}

    def wrap(self, path, layer):
        rank = self.kept[tuple(path.partition(".layer.")[2].split(".", 1))]
        return LinearWithLoRA(layer, rank, self.alpha / self.rank * rank)


def map_of(ranks: Results, method: str, lr: float, seed: int) -> dict[tuple[str, str], int]:
    """Return {(layer, module): rank at the end} of a run of 200 steps from rank 6 to 4."""
    run = {"method": method, "initial": "6", "steps": "200", "lr": str(lr), "seed": str(seed)}
    rows = [row for row in ranks.rows() if all(row[k] == v for k, v in run.items())]
    return {(row["layer"], row["module"]): int(row["kept"]) for row in rows}


class Masks:
    """Record the masks of every allocation, to count the triplets that come back."""

    def __init__(self):
        self.taken, self.choose = [], adalora.masks_of_best

    def __call__(self, branches, budget):
        masks = self.choose(branches, budget)
        self.taken.append(torch.cat(masks))
        return masks

    def counts(self) -> dict[str, int]:
        """Return the triplets ever pruned, those of them that a later allocation kept, and those
        that the last one kept."""
        kept = torch.stack(self.taken)  # (allocations, triplets)
        ever = ~kept.all(dim=0)
        pruned_before = (~kept).cumsum(dim=0) > 0
        back = (kept & pruned_before).any(dim=0)
        values = (ever.sum(), back.sum(), (ever & kept[-1]).sum())
        return dict(zip(COUNTED, map(int, values), strict=True))


def run(ranks, runs, task, method, initial, rank, steps, lr, seed, again=False) -> dict:
    """Train one point and return its row; `again` is for a run whose row there is already."""
    model, masks = base_of(task.name, seed), Masks()
    if method == "lora, map":
        inject(model, ByMap(rank=rank, alpha=16, targets="all-linear"))
    elif method == "lora":
        inject(model, setting("lora, all linear", task.name, rank=rank))
    else:
        size = {"initial_rank": initial, "target_rank": rank}
        size["orthogonal"] = WEIGHTS.get(method, 0.5)
        inject(model, setting("adalora", task.name, **size, **schedule(steps)))
    scores = by_sums if method == "adalora, sums" else adalora.triplet_scores
    with (
        mock.patch.object(adalora, "triplet_scores", scores),
        mock.patch.object(adalora, "masks_of_best", masks),
    ):
        if again:
            plain(model, task, steps, lr, seed)
        row = {} if again else measured(model, task, lr, seed, steps=steps)
    kept = row.get("trainable", 0)
    values = dict(zip(NAMES, (method, initial, rank, steps), strict=True))
    if masks.taken:
        wrappers = injection_of(model).wrappers
        new = missing(ranks, (*NAMES, "lr", "seed"), [(*values.values(), lr, seed)])
        for path, wrapper in wrappers.items():
            ada, (out, width) = wrapper.ada, wrapper.base.weight.shape
            left = int(ada.lora_E.count_nonzero())
            kept -= (initial - left) * (out + width + 1)
            layer, module = path.partition(".layer.")[2].split(".", 1)
            place = {"lr": lr, "seed": seed, "layer": layer, "module": module}
            norm = torch.linalg.norm(adalora.delta_weight(ada)).item()
            if new:
                ranks.add(**values, **place, kept=left, norm=f"{norm:.4f}")
    if steps == STEPS[task.name]:
        right = right_answers(model, task)
        flags = sum(flag << i for i, flag in enumerate(right))
        counts = masks.counts() if masks.taken else {}
        here = {"test": f"{sum(right) / len(right):.5f}", "sentences": len(right)}
        here["right"] = f"{flags:x}"
        runs.add(**values, lr=lr, seed=seed, **counts, **here)
    return row | {"kept": kept}


def answers(runs: Results) -> dict[tuple[str, int], list[bool]]:
    """Return {(method, seed): the sentences that its run at its best learning rate gets right}."""
    found = {}
    for row in runs.rows():
        method, flags = row["method"], int(row["right"], 16)
        if BEST.get(method) == float(row["lr"]):
            right = [bool(flags >> i & 1) for i in range(int(row["sentences"]))]
            found[method, int(row["seed"])] = right
    return found


def count_pairs(runs: Results) -> None:
    """Write adalora_pairs.csv, for the seeds that both of two methods were run with."""
    pairs = Results("adalora_pairs", ("first", "second", "seed", *paired_counts([], [])), anew=True)
    found = answers(runs)
    for (first, second), seed in itertools.product(PAIRS, SEEDS):
        if (first, seed) in found and (second, seed) in found:
            counts = paired_counts(found[first, seed], found[second, seed])
            pairs.add(first=first, second=second, seed=seed, **counts)


if __name__ == "__main__":
    ranks = Results("adalora_ranks", (*NAMES, "lr", "seed", "layer", "module", "kept", "norm"))
    about = ("test", "sentences", "right")
    runs = Results("adalora_runs", (*NAMES, "lr", "seed", *COUNTED, *about))
    columns, tasks = ("trainable", "kept", *MEASURED), {"sentiment": load("sentiment")}
    one = partial(run, ranks, runs)

    def go(settings):
        study("adalora_study", NAMES, columns, settings, one, tasks)

    go(SETTINGS)
    go(WEIGHTED)
    ByMap.kept = map_of(ranks, "adalora", 1e-2, 0)
    go(BY_HAND)
    compared = (("adalora", 6, 4, 200), ("lora", 4, 4, 200), ("adalora, sums", 6, 4, 200))
    points = [(*setting, BEST[setting[0]], seed) for seed in SEEDS for setting in compared]
    for point in missing(runs, (*NAMES, "lr", "seed"), points):
        one(tasks["sentiment"], *point, again=True)
    count_pairs(runs)
