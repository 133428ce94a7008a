"""Lesson 14: the settings of section 3 under plain gradient descent in place of Adam."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons import LoRA, evaluate
from peft_lessons.engine import injected_copy
from peft_lessons.studies import plots

AT, RATE = (0, 5, 10, 20), 0.1
SETTINGS = {"A": (16, 16), "B": (16, 1), "C": (64, 1), "D": (16, 4)}  # α; B's rate over A's


def run() -> Run:
    """Train LoRA of rank 16 by gradient descent with four settings, and note the test loss."""
    lesson = from_lesson("14", "task", "trained")
    base, task, quick = lesson["base"], lesson["task"], lesson["quick"]
    lines = {}
    for name, (alpha, ratio) in SETTINGS.items():
        torch.manual_seed(0)
        model = injected_copy(base, LoRA(16, alpha))
        rates = {"lora_A": RATE, "lora_B": RATE * ratio}
        groups = [
            {"params": [p for n, p in model.named_parameters() if n.endswith(part)], "lr": lr}
            for part, lr in rates.items()
        ]
        optimizer, lines[name] = torch.optim.SGD(groups), []
        for step, batch in zip(range(AT[-1] + 1), task.stream(2, seed=0), strict=False):
            if step in AT:
                lines[name].append(evaluate(model, quick).loss)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    fig, ax = plots.figure(size=(6.4, 3.0))
    for (name, line), mark, width in zip(lines.items(), "osxD", (5, 1.8, 1.8, 1.8), strict=True):
        ax.plot(AT, line, mark + "-", markersize=5, linewidth=width, label=name)
    ax.set(xticks=AT, xlabel="training step", ylabel="test loss, nats")
    ax.legend()
    return Run(fig, {"steps": AT, "loss": lines, "learning rate": RATE})
