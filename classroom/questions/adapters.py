"""Lesson 06: four planted functions that fall on one side and rise on the other, |z|."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots

SIZES, SEEDS = (4, 8, 16, 32), (0, 1, 2)


def run() -> Run:
    """Let the lesson's three students learn four times |z| instead of four GELUs."""
    lesson = from_lesson("06", "ResidualAdapter", "base", "readings", "students", "error_left")
    torch.manual_seed(1)
    write = torch.linalg.qr(torch.randn(384, 4)).Q.T
    planted = lesson["readings"](lesson["x"]).abs() @ write
    error = {}
    for name, (build, reads) in lesson["students"].items():
        sizes, seeds = (SIZES, SEEDS) if name == "adapter" else (SIZES[::3], SEEDS[:1])
        for size in sizes:
            for seed in seeds:
                torch.manual_seed(seed)
                left = lesson["error_left"](build(size), reads, planted)
                error.setdefault(name, {}).setdefault(size, []).append(left)
    fig, ax = plots.figure(size=(6, 2.9))
    for (name, errors), color in zip(error.items(), plots.COLORS, strict=False):
        ax.plot(errors.keys(), [min(each) for each in errors.values()], color=color, label=name)
        for size, each in errors.items():
            ax.plot([size] * len(each), each, "o", color=color)
    plots.log_axis(ax, "x", SIZES)
    ax.set(xlabel="m of the adapter, rank of LoRA", ylabel="error left, %", ylim=(0, 110))
    ax.legend(fontsize=9, loc="lower left")
    return Run(fig, {"error": error, "planted functions": 4})
