"""Lesson 11: singular values of the Δh of four models at the value projection."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons import BitFit, DoRA, LoRA, SparseTuning
from peft_lessons.methods.unified import perturbed, prober
from peft_lessons.studies import plots

HOLD = {"A": SparseTuning(8), "B": LoRA(8, 16), "C": BitFit(), "D": DoRA(8, 16)}


def run() -> Run:
    """Take Δh over 288 tokens at the value projection of block 3, and what one input changes."""
    lesson = from_lesson("11", "models", "states")
    plain, base, x = lesson["plain"], lesson["base"], lesson["states"][3].double()
    values, touched = {}, {}
    for name, method in HOLD.items():
        probe = prober(plain, perturbed(base, method), 3)
        h, new = probe("value", x)
        spectrum = torch.linalg.svdvals((new - h).flatten(0, 1))  # of (tokens, d)
        values[name] = (spectrum / spectrum[0]).clamp(min=1e-9)
        unit = torch.zeros(1, 2, x.shape[-1], dtype=x.dtype)
        unit[0, 1, 0] = 1  # the second token has a 1 in its first number, the first has none
        h, new = probe("value", unit)
        change = new - h
        touched[name] = int(((change[0, 1] - change[0, 0]).abs() > 1e-12).sum())
    fig, ax = plots.figure(size=(6.4, 3.0))
    for name, line in values.items():
        ax.plot(range(1, len(line) + 1), line, label=name)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(0.9, 200),
        ylim=(1e-4, 2),
        xlabel="singular value of Δh, by rank",
        ylabel="share of the largest",
    )
    ax.legend()
    shown = {name: line[[0, 7, 8, 99]] for name, line in values.items()}
    return Run(
        fig,
        {
            "values 1, 8, 9 and 100": shown,
            "numbers that one input changes": touched,
            "tokens": x.shape[0] * x.shape[1],
            "width": x.shape[2],
        },
    )
