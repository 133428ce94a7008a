"""The study of what mixing gives: scaled parallel adapters, and the same beside a prefix.

    python benchmarks/mixing_study.py      # forty minutes on one core

Adds a row for each run on either task to data/results/mixing_study.csv. The sizes give about as
many parameters as the adapters of additive_study.csv have.
"""

from common import BASES, BEFORE_TOO, NAMES, base_of, load, measured, study

from peft_lessons import inject
from peft_lessons.studies.catalogue import setting

LOW, MIDDLE = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
SETTINGS = {  # (task, method, scale, width of the adapter): rates
    ("sentiment", "parallel", 4, 16): LOW,
    ("sentiment", "mixed", 4, 8): LOW,
    ("austen", "parallel", 4, 64): MIDDLE,
    ("austen", "parallel", 1, 64): MIDDLE,
    ("austen", "mixed", 4, 56): MIDDLE,
}


def run(task, name: str, method: str, scale: int, width: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, named = base_of(name, seed), {"parallel": "parallel, scaled"}.get(method, method)
    inject(model, setting(named, name, width=width, scale=scale))
    return measured(model, task, lr, seed, before=True)


if __name__ == "__main__":
    study("mixing_study", NAMES, BEFORE_TOO, SETTINGS, run, {task: load(task) for task in BASES})
