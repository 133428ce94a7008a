"""What is left of LoRA's variants once A and B have each their own learning rate?

    python benchmarks/plane_study.py       # ten minutes on one core

Trains tinylm on Jane Austen's novels as `rates_study.py` does, 20 steps of 2 blocks, with LoRA of
rank 16 and s = 1 on all linear layers, and adds a row for each run to data/results/plane_study.csv.
`lr` is the learning rate of A, `ratio` that of B over it: 1 is LoRA, 4 is rsLoRA at this rank
(√16), 16 is LoRA+ as its authors advise. The square of the two rates, in steps of 4, has one seed.
On each of the three lines the rates go on in steps of 2 until the best one by `validation` lies
inside, and that one runs with two seeds more. `validation` and `test` are mean losses per token of
32 blocks each."""

import itertools

from catalogue import setting
from common import RUN, SEEDS, Results, around, base_of, fill_table
from rates_study import STEPS, task_of

from peft_lessons import evaluate, fit, inject

RANK = 16
RATES = tuple(0.0003125 * 2**k for k in range(9))  # 0.0003125 to 0.08
CENTERS = {1.0: 0.01, 4.0: 0.005, 16.0: 0.0025}  # {ratio: A's learning rate to begin with}
KEY, COLUMNS = ("ratio", *RUN), ("validation", "test")


def run(ratio: float, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, task, (steps, batch) = base_of("austen", seed), task_of("austen"), STEPS["austen"]
    inject(model, setting("lora+", "austen", rank=RANK, alpha=RANK, lr_ratio=ratio))
    fit(model, task, steps, lr=lr, batch_size=batch, seed=seed, show=False)
    return {split: f"{evaluate(model, task, split).loss:.5f}" for split in COLUMNS}


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    tried = {}
    for row in results.rows():
        if row["seed"] == str(SEEDS[0]):
            values = tried.setdefault(float(row["ratio"]), {})
            values[float(row["lr"])] = float(row["validation"])
    due = []
    for ratio, center in CENTERS.items():
        values = tried.get(ratio, {})
        rates = around(values, RATES, RATES.index(center))
        due += [(ratio, rate, SEEDS[0]) for rate in rates]
        if set(rates) <= set(values):
            best = min(rates, key=values.get)
            due += [(ratio, best, seed) for seed in SEEDS[1:]]
    square = itertools.product(RATES[::2], repeat=2)
    return due + [(b / a, a, SEEDS[0]) for a, b in square]


if __name__ == "__main__":
    fill_table("plane_study", KEY, COLUMNS, points, run)
