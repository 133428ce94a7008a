"""Lesson 03: three kinds of numbers in NF4, and what a low rank holds of a rounding error."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots

BLOCK = 64


def rounding(x, levels, signed):
    """Return the codes of numbers in blocks, (blocks, 64), and the relative error in per cent. The
    absmax keeps its sign if `signed`."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))  # (blocks, 1)
    ratios = x / (largest if signed else largest.abs())
    codes = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)
    back = levels[codes] * (largest if signed else largest.abs())
    return codes, 100 * ((back - x).norm() / x.norm()).item()


def kept(matrix):
    """Return the share of the squared norm that the first r singular values hold, in per cent."""
    squares = torch.linalg.svdvals(matrix).square()
    return 100 * squares.cumsum(0) / squares.sum()


def run() -> Run:
    """Round three kinds of numbers, and decompose the error of a weight of tinylm at three bits."""
    lesson = from_lesson("03", "base", "example", "levels_of")
    nf4, weight, three = lesson["NF4"], lesson["example"], lesson["levels_of"](3)
    even = torch.arange(-7, 9) / 8  # all sixteen codes, with the sign of the absmax
    torch.manual_seed(0)
    drawn = {
        "X": torch.distributions.StudentT(3.0).sample((1024, BLOCK)),
        "Y": 2 * torch.rand(1024, BLOCK) - 1,
        "Z": torch.randn(1024, BLOCK),
    }
    fig, axes = plots.figure(1, 4, size=(8, 2.4), width_ratios=(1, 1, 1, 1.7))
    error = {}
    for ax, (name, x) in zip(axes, drawn.items(), strict=False):
        codes, of_nf4 = rounding(x, nf4, signed=False)
        use = 100 * codes.flatten().bincount(minlength=16) / codes.numel()
        ax.bar(range(16), use, color=plots.COLORS[0])
        ax.set(title=name, xlabel="code", xticks=(0, 7, 15), ylim=(0, 22))
        error[name] = {"NF4": of_nf4, "evenly spaced": rounding(x, even, signed=True)[1]}
    axes[0].set(ylabel="use of the code, %")
    codes = lesson["quantise"](weight, three, BLOCK)
    back = lesson["restore"](*codes, three, BLOCK, weight.shape)
    shares = {"rounding error": kept(weight - back), "random": kept(torch.randn(weight.shape))}
    for (name, share), style in zip(shares.items(), ("-", "--"), strict=True):
        axes[3].plot(range(1, 193), share, style, label=name)
    plots.log_axis(axes[3], "x", (1, 8, 32, 192))
    axes[3].set(xlabel="rank", ylabel="kept, %")
    axes[3].legend()
    eight = {name: share[7] for name, share in shares.items()}
    return Run(fig, {"error": error, "kept by rank 8": eight, "drawn": 1024 * BLOCK})
