"""Lesson 12: entries of A and of B under a thousand equal steps, in 16 bits and in 32."""

import torch

from classroom.questions import Run
from peft_lessons.studies import plots

STEPS, RATE, WIDTH = 1000, 2e-5, 4096
HELD = {"X": ("B", torch.bfloat16), "Y": ("A", torch.float32), "Z": ("A", torch.bfloat16)}


def run() -> Run:
    """Take AdamW's steps under a gradient that never changes, and note how far the entries come."""
    torch.manual_seed(0)
    lines = {}
    for name, (factor, dtype) in HELD.items():
        linear = torch.nn.Linear(WIDTH, 8, bias=False, dtype=dtype)  # starts as PEFT's A does
        weight = linear.weight.detach() if factor == "A" else torch.zeros(8, WIDTH, dtype=dtype)
        start, weight = weight.clone(), torch.nn.Parameter(weight)
        weight.grad = -torch.ones_like(weight)
        optimizer, lines[name] = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0), [0.0]
        for _ in range(STEPS):
            optimizer.step()
            lines[name].append((weight - start).float().mean().item())
    fig, ax = plots.figure(size=(6.4, 2.8))
    for name, line in lines.items():
        ax.plot([1000 * far for far in line], label=name)
    ax.set(xlabel="step", ylabel="mean movement, thousandths")
    ax.legend()
    at = {
        name: {n: 1000 * line[n] for n in (1, 100, 200, 300, 500, STEPS)}
        for name, line in lines.items()
    }
    return Run(fig, {"thousandths": at, "learning rate, thousandths": 1000 * RATE, "width": WIDTH})
