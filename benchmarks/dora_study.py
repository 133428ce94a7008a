"""The DoRA study: DoRA against LoRA with slightly fewer and slightly more parameters.

    python benchmarks/dora_study.py        # half an hour on one core

Trains minilm on movie sentiment and adds a row for each run to data/results/dora_study.csv. A
magnitude vector weighs as much as half a rank here, so DoRA of rank r stands between LoRA of rank r
(in lora_study.csv) and of rank r + 1. DoRA runs at the highest rate with all seeds as well, also
with lengths that do not train.
"""

from common import MEASURED, base_of, load, measured, study

from peft_lessons import inject
from peft_lessons.engine import injection_of
from peft_lessons.studies.catalogue import setting

RATES = (1e-3, 3e-3, 1e-2)
SETTINGS = dict.fromkeys((("dora", 8), ("lora", 9), ("dora", 1), ("lora", 2)), RATES)
# Too large a rate breaks LoRA; with all seeds, to see what it does to DoRA.
SURVIVE = (("dora", 8), ("dora", 1), ("dora, m frozen", 8), ("dora, m frozen", 1))


def run(task, method: str, rank: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(task.name, seed)
    inject(model, setting(method.partition(",")[0], task.name, rank=rank))
    if method == "dora, m frozen":
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.magnitude.requires_grad_(False)
    return measured(model, task, lr, seed)


if __name__ == "__main__":
    columns, tasks = ("steps", "trainable", *MEASURED), {"sentiment": load("sentiment")}
    for settings in (SETTINGS, dict.fromkeys(SURVIVE, RATES[-1:])):
        study("dora_study", ("method", "rank"), columns, settings, run, tasks)
