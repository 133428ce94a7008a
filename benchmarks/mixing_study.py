"""The study of what mixing gives: scaled parallel adapters, and the same beside a prefix.

    python benchmarks/mixing_study.py      # forty minutes on one core

Adds a row for each run on either task to data/results/mixing_study.csv. The sizes give about as
many parameters as the adapters of additive_study.csv have.
"""

from catalogue import setting
from common import BEFORE_TOO, NAMES, RUN, at_best, base_of, fill_table, load, measured

from peft_lessons import inject

LOW, MIDDLE = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
SETTINGS = {  # (task, method, scale, width of the adapter): rates
    ("sentiment", "parallel", 4, 16): LOW,
    ("sentiment", "mixed", 4, 8): LOW,
    ("austen", "parallel", 4, 64): MIDDLE,
    ("austen", "parallel", 1, 64): MIDDLE,
    ("austen", "mixed", 4, 56): MIDDLE,
}


def run(name: str, method: str, scale: int, width: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, named = base_of(name, seed), {"parallel": "parallel, scaled"}.get(method, method)
    inject(model, setting(named, name, width=width, scale=scale))
    return measured(model, load(name), lr, seed, before=True)


if __name__ == "__main__":
    fill_table("mixing_study", (*NAMES, *RUN), BEFORE_TOO, at_best(SETTINGS), run)
