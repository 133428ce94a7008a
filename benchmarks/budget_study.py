"""The dull control for lesson 13's ranking: other methods at LoRA's seconds, and at its gigabytes.

    python benchmarks/budget_study.py     # a quarter of an hour on one core

In choosing_study.py all methods train tinylm on Jane Austen's novels for 100 steps of 16 blocks.
Here each gets what LoRA on all linear layers used there, at its own learning rate of that study:

    seconds   so many steps of 16 blocks as take LoRA's time, by the seconds of choosing_costs.csv
    bytes     100 steps of so many blocks as need LoRA's memory at the peak of a step

data/results/budget_study.csv gets a row for each run."""

from functools import cache

import torch
from choosing_study import build
from common import RUN, SEEDS, STEPS, fill_table, load

from peft_lessons import evaluate, fit, measure
from peft_lessons.studies import best_lr, load_results

TASK, STANDARD, BATCH = "austen", "lora, all linear", 16
METHODS = ("last two", "full", "qlora", "pfeiffer")
BUDGETS = ("seconds", "bytes")
KEY = ("method", "budget", *RUN)
COLUMNS = ("steps", "batch", "validation", "test")


@cache
def peak(method: str, batch: int) -> int:
    """Return the bytes that a training step holds at its peak."""
    model = build(TASK, method, STEPS[TASK], seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    texts = next(iter(load(TASK).stream(batch, seed=0)))

    def step():
        model(**texts).loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    return measure.held_bytes(model, optimizer).total + measure.peak_bytes(step)


def steps_within(method: str) -> int:
    """Return how many steps of a method take the time of LoRA's."""
    rows = load_results("choosing_costs", base="tinylm", whose="ours").set_index("method")
    seconds = rows["seconds"]
    return round(STEPS[TASK] * seconds[STANDARD] / seconds[method])


def blocks_within(method: str) -> int:
    """Return how many blocks a step of a method may have with LoRA's memory."""
    few, many = peak(method, BATCH // 2), peak(method, BATCH)
    for_one = (many - few) / (BATCH - BATCH // 2)
    return BATCH + int((peak(STANDARD, BATCH) - many) // for_one)


def within(method: str, budget: str) -> tuple[int, int]:
    """Return a method's steps and blocks a step."""
    if budget == "seconds":
        return steps_within(method), BATCH
    return STEPS[TASK], blocks_within(method)


def run(method: str, budget: str, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    steps, batch = within(method, budget)
    model, task = build(TASK, method, steps, seed), load(TASK)
    fit(model, task, steps, lr=lr, batch_size=batch, seed=seed, show=False)
    scores = {split: evaluate(model, task, split).perplexity for split in COLUMNS[2:]}
    return {"steps": steps, "batch": batch} | {k: f"{v:.5f}" for k, v in scores.items()}


def points() -> list[tuple]:
    """Return the points, at the learning rates of choosing_study.csv, that are not in it anyway."""
    runs = load_results("choosing_study", task=TASK, examples=load(TASK).size("train"))
    rates = {method: best_lr(runs[runs["method"] == method])[0] for method in METHODS}
    pairs = [(m, b) for b in BUDGETS for m in METHODS if within(m, b) != (STEPS[TASK], BATCH)]
    seeds = {"seconds": SEEDS, "bytes": SEEDS[:1]}
    return [(m, budget, rates[m], seed) for m, budget in pairs for seed in seeds[budget]]


if __name__ == "__main__":
    fill_table("budget_study", KEY, COLUMNS, points(), run)
