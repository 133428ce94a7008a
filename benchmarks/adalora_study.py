"""The AdaLoRA study: a budget of ranks spent by AdaLoRA, or evenly by LoRA.

    python benchmarks/adalora_study.py     # an hour on one core

Trains minilm on movie sentiment on all linear layers, and adds a row for each run to
data/results/adalora_study.csv, and one for each layer of an AdaLoRA run to adalora_ranks.csv.
`adalora, sums` adds up the scores of a triplet's entries instead of averaging.
"""

from functools import partial
from unittest import mock

import torch
from common import MEASURED, Results, base_of, load, measured, study

from peft_lessons import inject
from peft_lessons.engine import injection_of
from peft_lessons.methods import adalora
from peft_lessons.studies.catalogue import schedule, setting

LORA_RATES, ADALORA_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
SETTINGS = {  # (method, rank a layer at the start, and at the end on average, steps): rates
    ("adalora", 6, 4, 200): ADALORA_RATES,
    ("lora", 4, 4, 200): LORA_RATES,
    ("adalora", 2, 1, 200): ADALORA_RATES,
    ("lora", 1, 1, 200): LORA_RATES,
    ("adalora, sums", 6, 4, 200): (1e-2,),
    ("adalora", 6, 4, 600): (3e-3, 1e-2),  # against LoRA of 600 steps in lora_study.csv
}
NAMES = ("method", "initial", "rank", "steps")


def by_sums(branch):
    """Scores of triplets from the sums of their entries' scores, where the method takes means."""
    a, e, b = (s * u for _, s, u in adalora.remembered(branch))
    return e.flatten() + (a.sum(dim=1) + b.sum(dim=0))


def run(ranks: Results, task, method: str, initial: int, rank: int, steps: int, lr, seed) -> dict:
    model = base_of(task.name, seed)
    if method == "lora":
        inject(model, setting("lora, all linear", task.name, rank=rank))
    else:
        size = {"initial_rank": initial, "target_rank": rank}
        inject(model, setting("adalora", task.name, **size, **schedule(steps)))
    scores = by_sums if method == "adalora, sums" else adalora.triplet_scores
    with mock.patch.object(adalora, "triplet_scores", scores):
        row = measured(model, task, lr, seed, steps=steps)
    kept = row["trainable"]
    if method != "lora":
        values = dict(zip(NAMES, (method, initial, rank, steps), strict=True))
        for path, wrapper in injection_of(model).wrappers.items():
            ada, (out, width) = wrapper.ada, wrapper.base.weight.shape
            left = int(ada.lora_E.count_nonzero())
            kept -= (initial - left) * (out + width + 1)
            layer, module = path.partition(".layer.")[2].split(".", 1)
            place = {"lr": lr, "seed": seed, "layer": layer, "module": module}
            norm = torch.linalg.norm(adalora.delta_weight(ada)).item()
            ranks.add(**values, **place, kept=left, norm=f"{norm:.4f}")
    return row | {"kept": kept}


if __name__ == "__main__":
    ranks = Results("adalora_ranks", (*NAMES, "lr", "seed", "layer", "module", "kept", "norm"))
    columns, tasks = ("trainable", "kept", *MEASURED), {"sentiment": load("sentiment")}
    study("adalora_study", NAMES, columns, SETTINGS, partial(run, ranks), tasks)
