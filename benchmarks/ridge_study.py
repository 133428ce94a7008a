"""Does a scaling keep the best learning rate when the rank changes?

    python benchmarks/ridge_study.py       # half an hour on one core

Trains tinylm on Jane Austen's novels, 50 steps of 4 blocks, with LoRA on all linear layers at four
ranks, each with the three factors s that the scalings α/r (α = 16), α/√r (α = 4) and a constant 1
give: they meet at rank 16. Adds a row for each run to data/results/ridge_study.csv; `validation`
and `test` are perplexities on the first BLOCKS blocks. Each row of learning rates goes on until its
best one lies inside; the best one and its neighbours run with a second seed; then the rest of the
table is filled. Rank 0 is full fine-tuning, and at a rate of 0 the untouched model. Where training
diverged, the perplexity is in the hundreds."""

from functools import cache

from catalogue import setting
from common import RUN, SEEDS, Results, around, base_of, fill_table

from peft_lessons import evaluate, fit, inject, load_task
from peft_lessons.train.loop import History

RANKS = (16, 1, 64, 4)
SCALINGS = {"α/r": lambda r: 16 / r, "α/√r": lambda r: 4 / r**0.5, "constant": lambda r: 1.0}
RATES = tuple(0.00125 * 2**k for k in range(8))  # 0.00125 to 0.16
FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)  # of full fine-tuning, the row of rank 0
ROWS = list(dict.fromkeys((r, float(s(r))) for r in RANKS for s in SCALINGS.values()))
STEPS, BATCH, BLOCKS = 50, 4, 60
COLUMNS = ("validation", "test", "train_loss", "seconds_per_step")


@cache
def task():
    """Return Austen with few blocks to validate and test on."""
    return load_task("austen").limit(validation=BLOCKS, test=BLOCKS)


def run(name: str, rank: int, scaling: float, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(name, seed)
    if rank:
        inject(model, setting("lora, all linear", name, rank=rank, alpha=scaling * rank))
    history = History()
    if lr:
        history = fit(model, task(), STEPS, lr=lr, batch_size=BATCH, seed=seed, show=False)
    validation, test = (evaluate(model, task(), split).perplexity for split in COLUMNS[:2])
    last = sum(history.loss[-10:]) / 10
    return {
        "validation": f"{validation:.4f}",
        "test": f"{test:.4f}",
        "train_loss": f"{last:.5f}",
        "seconds_per_step": f"{history.seconds / STEPS:.4f}",
    }


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    tried = {row: {} for row in ROWS}
    for row in results.rows():
        if row["seed"] == str(SEEDS[0]) and row["rank"] != "0":
            names = int(row["rank"]), float(row["scaling"])
            tried[names][float(row["lr"])] = float(row["validation"])
    first, more = [], []
    for row, values in tried.items():
        rates = around(values, RATES, center=4)
        first += [("austen", *row, rate, SEEDS[0]) for rate in rates]
        if set(rates) <= set(values):
            best = RATES.index(min(values, key=values.get))
            more += [("austen", *row, rate, SEEDS[1]) for rate in RATES[best - 1 : best + 2]]
    rest = [("austen", *row, rate, SEEDS[0]) for row in ROWS for rate in RATES]
    rivals = [("austen", 0, 0.0, lr, seed) for seed in SEEDS[:2] for lr in (0.0, *FULL_RATES)]
    return first + more + rest + rivals


if __name__ == "__main__":
    fill_table("ridge_study", ("task", "rank", "scaling", *RUN), COLUMNS, points, run)
