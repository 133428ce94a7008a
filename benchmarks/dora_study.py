"""The DoRA study: DoRA against LoRA with slightly fewer and slightly more parameters.

    python benchmarks/dora_study.py                # half an hour on one core
    python benchmarks/dora_study.py --backwards    # beside the first, on a second core

Trains minilm on movie sentiment, 200 steps, and adds a row for each run to
data/results/dora_study.csv. A magnitude vector weighs as much as half a rank here, so DoRA of rank
r stands between LoRA of rank r (in lora_study.csv) and of rank r + 1. Every setting is tried at
each learning rate with one seed; the rate with the best validation accuracy is run with two more,
and for DoRA the highest rate as well, also with lengths that do not train.
"""

import sys
from functools import partial

import torch
from common import Results, train_on, tune

from peft_lessons import DoRA, LoRA, inject, load_model, load_task
from peft_lessons.engine import injection_of

STEPS, ALPHA, TARGETS, RATES = 200, 16, ("query", "value"), (1e-3, 3e-3, 1e-2)
METHODS = {"dora": DoRA, "dora, m frozen": DoRA, "lora": LoRA}
SETTINGS = (("dora", 8), ("lora", 9), ("dora", 1), ("lora", 2))
COLUMNS = (
    *("method", "rank", "lr", "seed", "steps", "trainable"),
    *("validation", "test", "test_loss", "seconds_per_step"),
)


def run(task, method: str, rank: int, lr: float, seed: int) -> dict:
    model = load_model("minilm", labels=2, seed=seed)
    torch.manual_seed(seed)
    inject(model, METHODS[method](rank=rank, alpha=ALPHA, targets=TARGETS))
    if method == "dora, m frozen":
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.magnitude.requires_grad_(False)
    return {"steps": STEPS} | train_on(task, model, STEPS, lr, seed)


def main(backwards: bool) -> None:
    torch.set_num_threads(1)
    results, rates = Results("dora_study", COLUMNS), dict.fromkeys(SETTINGS, RATES)
    run_one = partial(run, load_task("sentiment"))
    tune(results, ("method", "rank"), rates, run_one, backwards=backwards)
    # Too large a rate breaks LoRA; with all seeds, to see what it does to DoRA.
    survive = (("dora", 8), ("dora", 1), ("dora, m frozen", 8), ("dora, m frozen", 1))
    too_large = dict.fromkeys(survive, (max(RATES),))
    tune(results, ("method", "rank"), too_large, run_one, backwards=backwards)


if __name__ == "__main__":
    main(backwards="--backwards" in sys.argv)
