"""The QLoRA study: what a 4-bit base costs in quality once an adapter is trained on it.

    python benchmarks/qlora_study.py       # half an hour on one core

Trains tinylm on Jane Austen's novels and adds a row for each run to data/results/qlora_study.csv.
"""

from catalogue import setting
from common import RUN, at_best, base_of, fill_table, load, measured

from peft_lessons import inject

RATES = {
    "none": (0.0,),
    "lora": (3e-3, 1e-2, 3e-2, 1e-1),
    "qlora": (1e-2, 3e-2, 1e-1),
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
}
OURS = {"lora": "lora, all linear", "qlora": "qlora"}


def run(method: str, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of("austen", seed)
    if method in OURS:
        inject(model, setting(OURS[method], "austen"))
    # Half of the validation chapters' blocks are enough to choose a rate by.
    return measured(model, load("austen", 500), lr, seed)


if __name__ == "__main__":
    columns = ("steps", "trainable", "validation", "test", "seconds_per_step")
    points = at_best({(method,): rates for method, rates in RATES.items()}, min)
    fill_table("qlora_study", ("method", *RUN), columns, points, run)
