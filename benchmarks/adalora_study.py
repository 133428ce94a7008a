"""The AdaLoRA study: a budget of ranks spent by AdaLoRA, evenly by LoRA, or by hand.

    python benchmarks/adalora_study.py     # two hours on one core

Trains minilm on movie sentiment on all linear layers, and adds a row for each run to
data/results/adalora_study.csv, one for each layer of an AdaLoRA run to adalora_ranks.csv, and for
runs that the lesson compares the sentences they get right to adalora_runs.csv, from which
adalora_pairs.csv is counted. `adalora, sums` adds up the scores of a triplet's entries instead of
averaging; `adalora, γ 0.1` has another weight of the regulariser than PEFT's default 0.5; `lora,
map` gives each matrix the rank that AdaLoRA's run with seed 0 left it.
"""

from typing import ClassVar
from unittest import mock

import common
import torch
from catalogue import schedule, setting
from common import MEASURED, PAIRED, RUN, SEEDS, STEPS, Results, at_best, fill_table

from peft_lessons import inject
from peft_lessons.engine import injection_of
from peft_lessons.methods import adalora
from peft_lessons.methods.lora import LinearWithLoRA, LoRA

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
KEY = ("method", "initial", "rank", "steps", *RUN)
BEST = {"adalora": 1e-2, "lora": 3e-3, "adalora, sums": 1e-2, "lora, map": 3e-3}
PAIRS = (("adalora", "lora"), ("adalora", "adalora, sums"), ("lora, map", "lora"))
COUNTED = ("pruned", "back", "alive")  # triplets ever pruned; kept again later; kept at the end
TABLES = {  # {table: its columns beside the key} of what a run leaves beside its row
    "adalora_ranks": ("layer", "module", "kept", "norm"),
    "adalora_runs": (*COUNTED, "test", "sentences", "right"),
}


def table(name: str) -> Results:
    """Return a table that runs fill beside their rows."""
    return Results(name, KEY, TABLES[name])


def by_sums(branch):
    """Score triplets by the sums of their entries' scores, where the method takes means."""
    a, e, b = (s * u for _, s, u in adalora.remembered(branch))
    return e.flatten() + (a.sum(dim=1) + b.sum(dim=0))


class ByMap(LoRA):
    """LoRA with a rank of its own in each matrix, and the same scaling α/r in all of them."""

    kept: ClassVar[dict[tuple[str, str], int]] = {}  # {(layer, module): rank}

    def wrap(self, path, layer):
        rank = self.kept[place_of(path)]
        return LinearWithLoRA(layer, rank, self.alpha / self.rank * rank)


def place_of(path: str) -> tuple[str, str]:
    """Return (layer, module) of a path."""
    layer, module = path.partition(".layer.")[2].split(".", 1)
    return layer, module


def map_of(method: str, lr: float, seed: int) -> dict[tuple[str, str], int]:
    """Return {(layer, module): rank at the end} of a run of 200 steps from rank 6 to 4."""
    point = tuple(map(str, (method, 6, 4, 200, lr, seed)))
    rows = [r for r in table("adalora_ranks").rows() if tuple(r[c] for c in KEY) == point]
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
        if not self.taken:
            return {}
        alive = torch.stack(self.taken)  # (allocations, triplets)
        ever = ~alive.all(dim=0)
        pruned_before = (~alive).cumsum(dim=0) > 0
        back = (alive & pruned_before).any(dim=0)
        values = (ever.sum(), back.sum(), (ever & alive[-1]).sum())
        return dict(zip(COUNTED, map(int, values), strict=True))


def ranks_of(model: torch.nn.Module) -> list[dict]:
    """Return a row for each layer of a trained AdaLoRA."""
    rows = []
    for path, wrapper in injection_of(model).wrappers.items():
        layer, module = place_of(path)
        norm = torch.linalg.norm(wrapper.ada.delta_weight()).item()
        kept = int(wrapper.ada.lora_E.count_nonzero())
        rows.append({"layer": layer, "module": module, "kept": kept, "norm": f"{norm:.4f}"})
    return rows


def run(method: str, initial: int, rank: int, steps: int, lr: float, seed: int) -> dict:
    """Train one point and return its row; its ranks and its answers get rows of their own."""
    model, masks, task = common.base_of("sentiment", seed), Masks(), common.load("sentiment")
    if method == "lora, map":
        ByMap.kept = map_of("adalora", 1e-2, 0)
        inject(model, ByMap(rank=rank, alpha=16, targets="all-linear"))
    elif method == "lora":
        inject(model, setting("lora, all linear", "sentiment", rank=rank))
    else:
        size = {"initial_rank": initial, "target_rank": rank}
        size["orthogonal"] = WEIGHTS.get(method, 0.5)
        inject(model, setting("adalora", "sentiment", **size, **schedule(steps)))
    scores = by_sums if method == "adalora, sums" else adalora.triplet_scores
    with (
        mock.patch.object(adalora, "triplet_scores", scores),
        mock.patch.object(adalora, "masks_of_best", masks),
    ):
        row = common.measured(model, task, lr, seed, steps=steps)
    beside, kept = {}, row["trainable"]
    if masks.taken:
        beside["adalora_ranks"] = ranks_of(model)
        for wrapper in injection_of(model).wrappers.values():
            pruned = initial - int(wrapper.ada.lora_E.count_nonzero())
            kept -= pruned * (sum(wrapper.base.weight.shape) + 1)
    if (rank, steps, lr) == (4, STEPS["sentiment"], BEST.get(method, lr)):
        right = common.right_answers(model, task)
        answers = {"test": row["test"], "sentences": len(right), "right": common.hexadecimal(right)}
        beside["adalora_runs"] = [answers | masks.counts()]
    point = (method, initial, rank, steps, lr, seed)
    for name, rows in beside.items():
        if table(name).missing([point]):
            table(name).add(point, rows)
    return row | {"kept": kept}


def answers() -> dict[tuple[str, int], list[bool]]:
    """Return {(method, seed): the sentences that its run at its best learning rate gets right}."""
    right = {}
    for row in table("adalora_runs").rows():
        if BEST.get(row["method"]) == float(row["lr"]):
            bits, sentences = int(row["right"], 16), range(int(row["sentences"]))
            right[row["method"], int(row["seed"])] = [bool(bits >> i & 1) for i in sentences]
    return right


def pairs(_: Results) -> list[tuple]:
    """Return (method, other, seed) for the seeds that both were run with."""
    known = answers()
    every = [(*pair, seed) for pair in PAIRS for seed in SEEDS]
    return [(one, two, seed) for one, two, seed in every if {(one, seed), (two, seed)} <= {*known}]


def count(first: str, second: str, seed: int) -> dict[str, int]:
    """Count the sentences that both methods get right, only one, or neither."""
    known = answers()
    return common.paired_counts(known[first, seed], known[second, seed])


if __name__ == "__main__":
    for settings in (SETTINGS, WEIGHTED, BY_HAND):
        columns, points = ("trainable", "kept", *MEASURED), at_best(settings, max)
        fill_table("adalora_study", KEY, columns, points, run)
    fill_table("adalora_pairs", ("first", "second", "seed"), PAIRED, pairs, count)
