"""Lesson 00: LoRA below a head that stays at its random start, once with exchanged labels."""

import copy

import torch

from classroom.questions import Run, from_lesson
from peft_lessons import LoRA, evaluate, fit, inject
from peft_lessons.studies import plots


class Exchanged:
    """Give a task's batches with the labels exchanged, praise for blame."""

    def __init__(self, task):
        self.task = task

    def stream(self, *settings):
        for batch in self.task.stream(*settings):
            yield batch | {"labels": 1 - batch["labels"]}


def below_the_head(base):
    """Return a copy of a model with the lesson's LoRA, in which the head stays as it is."""
    model = copy.deepcopy(base)
    inject(model, LoRA(rank=8, alpha=16, targets=("query", "value")))
    model.classifier.requires_grad_(False)
    return model


def draw(odds_of):
    """Return a figure of {run: {sentence: log-odds}}, a strip for each, without the two cats."""
    colors = {"loved": plots.COLORS[2], "adored": plots.COLORS[2], "hated": plots.COLORS[1]}
    fig, ax = plots.figure(size=(7.4, 2.9))
    ax.axvline(0, color="black", linewidth=1)
    for y, odds in zip((0, -1, -2), odds_of.values(), strict=True):
        level, last, other = 0, -9.0, ""
        for name, value in sorted(odds.items(), key=lambda item: item[1]):
            if name in ("cat", "kitten"):
                continue
            near = value - last < 0.085 * len(other + name)  # then one label above the other
            level, last, other = level + 1 if near else 0, value, name
            top, color = y + 0.12 + 0.22 * level, colors.get(name, "#555555")
            ax.plot([value, value], [y, top], "o-", color=color, markevery=[0], linewidth=0.8)
            ax.text(value, top + 0.02, name, color=color, size=9, ha="center")
    ax.set_yticks([0, -1, -2], odds_of)
    ax.set(xlabel="← negative        log-odds of positive        positive →", ylim=(-2.2, 0.6))
    ax.grid(False, axis="x")
    return fig


def run() -> Run:
    """Train the head alone, and the lesson's LoRA below a frozen random head with both labels."""
    lesson = from_lesson("00", "similarity", "head_alone")
    task, names, base = lesson["task"], lesson["sentences"], lesson["head_alone"]
    ways = {
        "X": (copy.deepcopy(base), task, 3e-2),
        "Y": (below_the_head(base), task, 3e-3),
        "Z": (below_the_head(base), Exchanged(task), 3e-3),
    }
    numbers = {}
    for name, (model, labels, lr) in ways.items():
        fit(model, labels, steps=50, batch_size=8, lr=lr, show=False)
        with torch.no_grad():
            odds = model.eval()(**task.encode([*names.values()])).logits.diff(dim=-1)[:, 0]
        numbers[name] = {
            "accuracy": 100 * evaluate(model, task.limit(test=200)).accuracy,
            "cosine of loved and hated": lesson["similarity"](model.bert)[0, 2],
            "odds": dict(zip(names, odds.tolist(), strict=True)),
        }
    return Run(draw({name: made["odds"] for name, made in numbers.items()}), numbers)
