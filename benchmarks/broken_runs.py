"""One healthy training with LoRA and five broken ones, for an exercise of lesson 02: diagnose.

    python benchmarks/broken_runs.py      # four minutes on one core

Asked for in each run: LoRA of rank 8 (alpha 16) on the query and value projections of minilm, a new
head that trains as well, movie sentiment, 60 steps of 16 sentences, AdamW at 0.003 throughout. Adds
a row for each run to data/results/broken_runs.csv; `FAULTS` says what is wrong with a run.

`before` and `after` are test accuracies. `grad_A_first` is the norm of the gradient of all A
together at the first step, and so on; it is empty where no gradient reached them. `change` is the
norm of the change of s BA in all layers together. `losses` are those of all steps."""

from functools import cache

import torch
from common import base_of, fill_table, load
from torch import nn

from peft_lessons import LoRA, evaluate, inject, measure, merge
from peft_lessons.engine import injection_of
from peft_lessons.train.loop import train_step

HEALTHY = "healthy"
FAULTS = {
    HEALTHY: "",
    "A": "merged before training",
    "B": "a target that matches too much",  # "attention": also key, and attention.output.dense
    "C": "the learning rate of full fine-tuning, and A starts at zero instead of B",
    "D": "the head is frozen",
    "E": "both factors start at zero",
}
STEPS, BATCH, SEED = 60, 16, 0
LORA_RATE, FULL_RATE = 3e-3, 2e-4
NORMS = ("grad_A_first", "grad_B_first", "grad_A_last", "grad_B_last", "change")
COLUMNS = ("trainable", "before", "after", *NORMS, "losses")


def norm(tensors: list[torch.Tensor | None]) -> str:
    """Return the norm of all entries together; nothing if there are no tensors."""
    return "" if None in tensors else f"{sum(t.square().sum() for t in tensors).sqrt().item():.3g}"


def build(run: str) -> nn.Module:
    """Return minilm with LoRA as asked for, but for the fault of a run."""
    model = base_of("sentiment", SEED)
    targets = r".*attention.*\.(query|key|value|dense)" if run == "B" else ("query", "value")
    inject(model, LoRA(rank=8, alpha=16, targets=targets))
    for layer in injection_of(model).wrappers.values():
        if run == "C":  # as A is drawn otherwise: uniform in ±1/√(the number of inputs)
            bound = layer.base.in_features**-0.5
            nn.init.uniform_(layer.lora.lora_B, -bound, bound)
        if run in ("C", "E"):
            nn.init.zeros_(layer.lora.lora_A)
    if run == "A":
        merge(model)
    if run == "D":
        model.classifier.requires_grad_(False)
    return model


@cache
def untrained() -> float:
    """Return the test accuracy before training, the same in all runs: each branch adds nothing."""
    return evaluate(base_of("sentiment", SEED), load("sentiment")).accuracy


def train(run: str) -> dict:
    """Train one run and return its report."""
    model, task = build(run), load("sentiment")
    layers = [layer.lora for layer in injection_of(model).wrappers.values()]
    start = [layer.delta_weight().detach() for layer in layers]
    training = [p for p in model.train().parameters() if p.requires_grad]
    rate = FULL_RATE if run == "C" else LORA_RATE
    optimizer = torch.optim.AdamW(training, lr=rate, weight_decay=0.0)
    report, losses = {"trainable": measure.parameters(model).trainable}, []

    def look(step: int) -> None:
        if step in (1, STEPS):
            when = "first" if step == 1 else "last"
            report[f"grad_A_{when}"] = norm([layer.lora_A.grad for layer in layers])
            report[f"grad_B_{when}"] = norm([layer.lora_B.grad for layer in layers])

    torch.manual_seed(SEED)  # of dropout
    for step, batch in zip(range(1, STEPS + 1), task.stream(BATCH, SEED), strict=False):
        losses.append(train_step(model, batch, optimizer, step, after=look))
    changes = [layer.delta_weight() - s for layer, s in zip(layers, start, strict=True)]
    return report | {
        "before": f"{untrained():.5f}",
        "after": f"{evaluate(model, task).accuracy:.5f}",
        "change": norm([change.detach() for change in changes]),
        "losses": " ".join(f"{loss:.4f}" for loss in losses),
    }


if __name__ == "__main__":
    fill_table("broken_runs", ("run",), COLUMNS, [(run,) for run in FAULTS], train)
