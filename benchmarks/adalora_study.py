"""The AdaLoRA study: a budget of ranks spent by AdaLoRA, by another score, or evenly by LoRA.

    python benchmarks/adalora_study.py     # an hour on one core

Trains minilm on movie sentiment on all linear layers, from rank 6 to 4 or with rank 4, and adds a
row for each run to data/results/adalora_study.csv; for the runs at each method's best learning rate
it adds the sentences that they get right to adalora_runs.csv, and, of AdaLoRA, a row for each layer
to adalora_ranks.csv. `adalora, sums` scores a triplet by the sums of its entries, not their means.
"""

from unittest import mock

import common
import torch
from catalogue import schedule, setting
from common import MEASURED, RUN, Results, at_best, fill_table

from peft_lessons import inject
from peft_lessons.engine import injection_of
from peft_lessons.methods import adalora

SETTINGS = {  # (method, rank a layer at the start, and at the end on average, steps): rates
    ("adalora", 6, 4, 200): (1e-3, 3e-3, 1e-2, 3e-2),
    ("lora", 4, 4, 200): (1e-3, 3e-3, 1e-2),
    ("adalora, sums", 6, 4, 200): (1e-2,),
}
KEY = ("method", "initial", "rank", "steps", *RUN)
BEST = {"adalora": 1e-2, "lora": 3e-3, "adalora, sums": 1e-2}
TABLES = {  # {table: its columns beside the key} of what a run leaves beside its row
    "adalora_ranks": ("layer", "module", "kept"),
    "adalora_runs": ("sentences", "right"),
}


def table(name: str) -> Results:
    """Return a table that runs fill beside their rows."""
    return Results(name, KEY, TABLES[name])


def by_sums(branch):
    """Score triplets by the sums of their entries' scores, where the method takes means."""
    a, e, b = (s * u for _, s, u in adalora.remembered(branch))
    return e.flatten() + (a.sum(dim=1) + b.sum(dim=0))


def ranks_of(model: torch.nn.Module) -> list[dict]:
    """Return a row for each layer of a trained AdaLoRA."""
    rows = []
    for path, kept in adalora.ranks(model).items():
        layer, module = path.partition(".layer.")[2].split(".", 1)
        rows.append({"layer": layer, "module": module, "kept": kept})
    return rows


def run(method: str, initial: int, rank: int, steps: int, lr: float, seed: int) -> dict:
    """Train one point and return its row; its ranks and its answers get rows of their own."""
    model, task = common.base_of("sentiment", seed), common.load("sentiment")
    if method == "lora":
        inject(model, setting("lora, all linear", "sentiment", rank=rank))
    else:
        size = {"initial_rank": initial, "target_rank": rank}
        inject(model, setting("adalora", "sentiment", **size, **schedule(steps)))
    scores = by_sums if method == "adalora, sums" else adalora.triplet_scores
    with mock.patch.object(adalora, "triplet_scores", scores):
        row = common.measured(model, task, lr, seed, steps=steps)
    kept, point = row["trainable"], (method, initial, rank, steps, lr, seed)
    if method != "lora":
        for wrapper in injection_of(model).wrappers.values():
            pruned = initial - int(wrapper.ada.lora_E.count_nonzero())
            kept -= pruned * (sum(wrapper.base.weight.shape) + 1)
    if lr == BEST[method]:
        right = common.right_answers(model, task)
        answers = {"sentences": len(right), "right": common.hexadecimal(right)}
        beside = {"adalora_runs": [answers]}
        if method != "lora":
            beside["adalora_ranks"] = ranks_of(model)
        for name, rows in beside.items():
            if table(name).missing([point]):
                table(name).add(point, rows)
    return row | {"kept": kept}


if __name__ == "__main__":
    points = at_best(SETTINGS, max)
    fill_table("adalora_study", KEY, ("trainable", "kept", *MEASURED), points, run)
