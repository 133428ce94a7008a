"""Lesson 10: ten thousand entries that the dice draw where the gradient's choice lies."""

import torch
from torch import nn

from classroom.questions import Run, from_lesson
from peft_lessons import evaluate, fit, load_task
from peft_lessons.studies import load_results, plots

SIZE, RATES, SEEDS = 10_000, (0.03, 0.1, 0.3), (0, 1, 2)
STORED = {"A": "gradient", "C": "shared", "D": "random"}  # of entries_study.csv


def run() -> Run:
    """Train entries drawn at random, as many in each matrix as the largest gradients of all have
    there, beside the stored runs of the three other choices."""
    lesson = from_lesson("10", "task", "weights_of", "gradient")
    base, gradient = lesson["base"], lesson["gradient"]
    task = load_task("austen").limit(validation=20, test=100)  # tested as the stored runs
    sizes = [w.numel() for w in lesson["weights_of"](base)]
    chosen = torch.zeros_like(gradient)
    chosen[gradient.topk(SIZE).indices] = 1
    counts = [int(part.sum()) for part in chosen.split(sizes)]

    def trained(lr: float, seed: int) -> nn.Module:
        dice, found, before = torch.Generator().manual_seed(seed), [], 0
        for count, size in zip(counts, sizes, strict=True):
            found.append(before + torch.randperm(size, generator=dice)[:count])
            before += size
        model = lesson["copy"].deepcopy(base)
        lesson["train_only"](model, torch.cat(found))
        fit(model, task, steps=40, lr=lr, batch_size=2, seed=seed, show=False)
        return model

    first = {lr: trained(lr, SEEDS[0]) for lr in RATES}
    best = min(RATES, key=lambda lr: evaluate(first[lr], task, "validation").loss)
    models = [first[best], *(trained(best, seed) for seed in SEEDS[1:])]
    table = load_results("entries_study")

    def rows_of(arm: str, size: int = SIZE):
        runs = table[(table["arm"] == arm) & (table["size"] == size) & (table["draw"] == 0)]
        tried = runs[runs["seed"] == 0].set_index("lr")["validation"]
        return runs[runs["lr"] == tried.idxmin()].set_index("seed")["test"]

    untrained = table.loc[table["arm"] == "base", "test"].item()
    full = untrained - rows_of("full", 0)
    losses = {name: rows_of(arm) for name, arm in STORED.items()}
    gains = {
        name: [100 * (untrained - loss[s]) / full[s] for s in SEEDS]
        for name, loss in losses.items()
    }
    ends = [evaluate(model, task).loss for model in models]
    gains["B"] = [100 * (untrained - end) / full[s] for s, end in zip(SEEDS, ends, strict=True)]
    fig, ax = plots.figure(size=(6.0, 2.4))
    for n, name in enumerate("ABCD"):
        ax.plot(gains[name], [-n] * len(SEEDS), "o", color=plots.COLORS[n])
    ax.set(
        yticks=[0, -1, -2, -3],
        yticklabels="ABCD",
        ylim=(-3.5, 0.5),
        xlim=(0, 100),
        xlabel="gain, % of full fine-tuning's",
    )
    blocks = [sum(counts[k : k + 7]) for k in range(0, len(counts), 7)]
    return Run(
        fig,
        {
            "gain": dict(sorted(gains.items())),
            "learning rate of B": best,
            "entries in each block": blocks,
        },
    )
