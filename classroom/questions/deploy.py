"""Lesson 17: ten updates, merged one after the other into a file in Q4_1."""

import torch

from classroom.questions import Run
from peft_lessons import load_model
from peft_lessons.deploy import rounded
from peft_lessons.methods.qlora import dequantize_nf4, quantize_nf4
from peft_lessons.studies import plots

UPDATES, SIZE = 10, 0.00036  # the mean change of a weight, as in the lesson


def run() -> Run:
    """Merge random changes of rank 8 into one matrix, and note what share of their sum is left."""
    W = load_model("smollm2").model.layers[15].mlp.down_proj.weight.detach()
    dice = torch.Generator().manual_seed(0)
    blocks = W.view(-1, 32)
    step = (blocks.amax(1) - blocks.amin(1))[:, None] / 15
    never = (blocks + step * (torch.rand(blocks.shape, generator=dice) - 0.5)).view(W.shape)
    changes = []
    for _ in range(UPDATES):
        change = torch.randn(len(W), 8, generator=dice) @ torch.randn(8, W.shape[1], generator=dice)
        changes.append(SIZE * change / change.abs().mean())

    def left(kept: torch.Tensor, change: torch.Tensor) -> float:
        return 100 * ((kept * change).sum() / change.square().sum()).item()

    def q(weight: torch.Tensor, kind: str = "Q4_1") -> torch.Tensor:
        return rounded(weight, kind)

    total, file = torch.zeros_like(W), {"B": W, "C": never}
    share = {name: [] for name in "ABC"}
    for change in changes:
        total = total + change
        file = {name: q(weight + change) for name, weight in file.items()}
        share["A"].append(left(q(never + total) - q(never), total))
        share["B"].append(left(file["B"] - q(W), total))
        share["C"].append(left(file["C"] - q(never), total))
    on_nf4 = dequantize_nf4(*quantize_nf4(W), W.shape)
    fine = left(q(on_nf4 + changes[0], "Q8_0") - q(on_nf4, "Q8_0"), changes[0])
    fig, ax = plots.figure(size=(6.4, 2.8))
    for (name, line), mark in zip(share.items(), "os^", strict=True):
        ax.plot(range(1, UPDATES + 1), line, mark + "-", markersize=4, label=name)
    ax.set(xlabel="updates", ylabel="left of their sum, %", ylim=(0, 110))
    ax.legend()
    return Run(fig, {"share": share, "mean change": SIZE, "from NF4 into Q8_0": fine})
