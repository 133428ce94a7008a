"""What does an adapter buy that a low-rank change beside the weight does not?

    python benchmarks/adapters_study.py    # half an hour on one core

Trains adapters, the same adapters without their nonlinearity f, and LoRA with about as many
parameters: tinylm on Jane Austen's novels, 50 steps of 8 blocks, and minilm on movie
sentiment as in `additive_study.py`, at its rate for Houlsby's adapters. Other learning rates are
chosen with seed 0, by `validation`. data/results/adapters_study.csv gets a row for each run:
`right` has one bit for each test sentence, as a hexadecimal number, and `losses` are the nats per
token in each of 20 stretches of the test blocks, so that two rows can be paired. `straight` is
`test` once more, with a line in place of f in every unit, the line that is nearest to f over
training texts, and `constant` with the mean of f; nothing trains in between. The variants:

    no f       an adapter without its nonlinearity
    doubled    an adapter with s = 2
    attention  one adapter a block, after attention; `network` after the feed-forward
    down       LoRA on the feed-forward's last layer only
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from additive_study import described
from catalogue import setting
from common import (
    NAMES,
    RUN,
    SEEDS,
    Results,
    around,
    base_of,
    fill_table,
    hexadecimal,
    load,
    right_answers,
)
from qlora_bases import losses
from torch import nn

from peft_lessons import fit, inject, load_task, measure
from peft_lessons.methods.adapters import Bottleneck

STEPS = {"sentiment": (200, 16), "austen": (50, 8)}  # of so many examples
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
BLOCKS, STRETCHES = {"validation": 100, "test": 400}, 20
TEXTS = 400  # of the training split, to draw the lines by
POSITIONS = {"attention": "self_attn", "network": "mlp"}  # what the place's name holds in tinylm
WITH_F = ("parallel", "houlsby", "pfeiffer")
ON_AUSTEN = [  # (task, method, variant, width or rank), those that matter most first
    ("austen", "adapter", "parallel", 64),
    ("austen", "adapter", "parallel, no f", 64),
    ("austen", "lora", "down", 35),
    ("austen", "adapter", "houlsby", 32),
    ("austen", "adapter", "houlsby, no f", 32),
    ("austen", "adapter", "houlsby, doubled", 32),
    ("austen", "adapter", "pfeiffer", 64),
    ("austen", "adapter", "pfeiffer, no f", 64),
    ("austen", "adapter", "houlsby, attention", 64),
    ("austen", "adapter", "houlsby, network", 64),
]
ON_SENTIMENT = [("sentiment", "lora", "down", 7), ("sentiment", "adapter", "houlsby, no f", 8)]
CHOSEN = [("sentiment", "adapter", "houlsby", 8, 3e-3, seed) for seed in SEEDS]
MEASURED = ("trainable", "validation", "test", "test_loss", "losses")
COLUMNS = (*MEASURED, "straight", "constant", "sentences", "right")


def build(model: nn.Module, task: str, method: str, variant: str, size: int) -> None:
    """Put what a row names into a model."""
    kind, _, part = variant.partition(", ")
    if method == "base":
        return
    if variant == "down":
        layers = setting("ia3", task).feedforward
        inject(model, replace(described(task, "lora", "qv", size), targets=layers))
    else:
        description = described(task, method, kind, size)
        inject(model, replace(description, scale=2.0) if part == "doubled" else description)
        if part == "no f":
            for adapter in (m for m in model.modules() if isinstance(m, Bottleneck)):
                adapter.activation = nn.Identity()
        for name, adapter in model.named_modules():  # one that does not train adds zero
            if isinstance(adapter, Bottleneck) and part in POSITIONS:
                adapter.requires_grad_(POSITIONS[part] in name)


@cache
def task_of(name: str):
    """Return a task; of Austen few blocks to validate and test on."""
    return load_task(name).limit(**BLOCKS) if name == "austen" else load(name)


def scores(model: nn.Module, task, split: str = "test") -> dict[str, str | int]:
    """Return what a row says of a trained model."""
    if task.name == "sentiment":
        right = right_answers(model, task, split)
        accuracy = f"{sum(right) / len(right):.5f}"
        return {split: accuracy, "sentences": len(right), "right": hexadecimal(right)}
    sums, tokens = losses(model, task, split)
    mean = (sums.sum() / tokens.sum()).item()
    parts = zip(sums.tensor_split(STRETCHES), tokens.tensor_split(STRETCHES), strict=True)
    each = " ".join(f"{part.sum() / n.sum():.4f}" for part, n in parts)
    return {split: f"{math.exp(mean):.4f}", f"{split}_loss": f"{mean:.5f}", "losses": each}


def trained(model: nn.Module, name: str, lr: float, seed: int) -> dict[str, str | int]:
    """Train a model and return its row; at a rate of 0 nothing trains."""
    task, (steps, batch) = task_of(name), STEPS[name]
    if lr:
        fit(model, task, steps, lr=lr, batch_size=batch, seed=seed, show=False)
    trainable = measure.parameters(model).trainable if lr else 0
    return {"trainable": trainable} | scores(model, task, "validation") | scores(model, task)


@torch.no_grad()
def straighten(model: nn.Module, task, constant: bool = False) -> None:
    """Put a line (or a constant) in place of f in every unit of the adapters, the one that is
    nearest to f over training texts."""
    adapters = [m for m in model.modules() if isinstance(m, Bottleneck)]
    seen = [[] for _ in adapters]
    hooks = [
        adapter.down.register_forward_hook(lambda _, args, z, kept=kept: kept.append(z))
        for adapter, kept in zip(adapters, seen, strict=True)
    ]
    masks = []
    for _, batch in zip(range(TEXTS // 8), task.batches("train", 8), strict=False):
        model.eval()(**batch)
        masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1)
    for hook in hooks:
        hook.remove()
    for adapter, kept in zip(adapters, seen, strict=True):
        z = torch.cat([each[mask] for each, mask in zip(kept, masks, strict=True)])  # (tokens, m)
        f = adapter.activation(z)
        mean, off = f.mean(0), z - z.mean(0)
        slope = torch.zeros_like(mean) if constant else (off * f).sum(0) / off.square().sum(0)
        shift = mean - slope * z.mean(0)  # (m,)
        adapter.activation = lambda z, slope=slope, shift=shift: slope * z + shift


def run(name: str, method: str, variant: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, task = base_of(name, seed), task_of(name)
    build(model, name, method, variant, size)
    row = dict.fromkeys(("test_loss", "straight", "constant"), math.nan) | {"sentences": 0}
    row |= trained(model, name, lr, seed)
    if variant in WITH_F:
        f = [(m, m.activation) for m in model.modules() if isinstance(m, Bottleneck)]
        for column in ("straight", "constant"):
            for adapter, activation in f:
                adapter.activation = activation
            straighten(model, task, constant=column == "constant")
            row[column] = scores(model, task)["test"]
    return row


def bracketed(rows: list[dict[str, str]], settings: Mapping[tuple, float]) -> list[tuple]:
    """Return the points that are due by now of {setting: a rate to begin with}: its neighbours are
    tried, and further ones until the best lies inside."""
    tried, due = {}, []
    for row in rows:
        if row["seed"] == str(SEEDS[0]):
            names, sign = tuple(row[c] for c in NAMES), -1 if row["task"] == "sentiment" else 1
            tried.setdefault(names, {})[float(row["lr"])] = sign * float(row["validation"])
    for names, middle in settings.items():
        values = tried.get(tuple(map(str, names)), {})
        rates = around(values, RATES, RATES.index(middle))
        due += [(*names, rate, SEEDS[0]) for rate in rates]
        if set(rates) <= set(values):
            due += [(*names, min(values, key=values.get), seed) for seed in SEEDS[1:]]
    return due


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    rows, base = results.rows(), ("austen", "base", "", 0, 0.0, SEEDS[0])
    on_austen = bracketed(rows, dict.fromkeys(ON_AUSTEN, 1e-2))
    on_sentiment = bracketed(rows, dict.fromkeys(ON_SENTIMENT, 3e-3))
    return [base, *on_austen, *on_sentiment, *CHOSEN]


if __name__ == "__main__":
    fill_table("adapters_study", (*NAMES, *RUN), COLUMNS, points, run)
