"""The QLoRA study: what a 4-bit base costs in quality once an adapter is trained on it.

    python benchmarks/qlora_study.py                # half an hour on one core
    python benchmarks/qlora_study.py --backwards    # beside the first, on a second core

Trains tinylm on Jane Austen's novels and adds a row for each run to data/results/qlora_study.csv:
perplexities of the validation and the test chapters. Every method is tried at each of its learning
rates with one seed; the rate with the best validation perplexity is run with two seeds more. Rows
that are there are not run again, so it can be stopped and started at will.
"""

import sys
from functools import partial

import torch
from common import Results, measured, tune
from peft import LoraConfig, get_peft_model

from peft_lessons import LoRA, QLoRA, fit, inject, load_model, load_task
from peft_lessons.train.loop import History

RANK, ALPHA = 8, 16
RATES = {
    "none": (0.0,),
    "none-4bit": (0.0,),
    "lora": (3e-3, 1e-2, 3e-2, 1e-1),
    "qlora": (1e-2, 3e-2, 1e-1),
    "qlora-peft": (3e-2,),  # the same computation as ours, which the lesson proves
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
}
COLUMNS = ("method", "lr", "seed", "steps", "trainable", "validation", "test", "seconds_per_step")


def build(method: str):
    """The model of a method, ready to train."""
    if method == "qlora-peft":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
        )
        return get_peft_model(load_model("tinylm", four_bit=True), config)
    model = load_model("tinylm")
    if method in ("qlora", "none-4bit"):
        inject(model, QLoRA(rank=RANK, alpha=ALPHA))
    elif method == "lora":
        inject(model, LoRA(rank=RANK, alpha=ALPHA))
    return model


def train(model, task, steps: int, lr: float, seed: int) -> History:
    """At a rate of 0 nothing trains: what the base itself gives."""
    return fit(model, task, steps, lr=lr, seed=seed, show=False) if lr else History()


def run(task, method: str, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    torch.manual_seed(seed)
    model = build(method)
    if not lr:
        model.requires_grad_(False)
    row = measured(task, ("austen", method), model, partial(train, lr=lr, seed=seed))
    return {column: row[column] for column in COLUMNS if column in row}


def main(backwards: bool) -> None:
    torch.set_num_threads(1)
    # Half of the validation chapters' blocks are enough to choose a rate by.
    task, results = load_task("austen").limit(validation=500), Results("qlora_study", COLUMNS)
    rates = {(method,): rates for method, rates in RATES.items()}
    tune(results, ("method",), rates, partial(run, task), best=min, backwards=backwards)


if __name__ == "__main__":
    main(backwards="--backwards" in sys.argv)
