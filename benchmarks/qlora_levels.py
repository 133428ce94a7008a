"""Which sixteen levels: the error of tinylm's weights, and its perplexity on Jane Austen's novels.

    python benchmarks/qlora_levels.py       # a quarter of an hour on one core

Rounds all linear layers of the untrained decoder to the nearest level, in blocks of 64 with the
absmax in float32. One row for each set of levels to data/results/qlora_levels.csv: the relative
error of the weights and of the weights divided by their absmax, in per cent, the test perplexity,
and the test loss minus NF4's, in nats per token, with the standard error of the mean paired
difference over the test blocks. k-means starts from quantiles; after 40 rounds its error hardly
changes, but the weights that it rounds up or down do. `weighted` counts each weight by its squared
absmax, which makes its error that of the weights themselves.
"""

import copy
from functools import cache

import torch
from common import fill_table, load
from qlora_bases import compared, losses
from torch import nn

from peft_lessons import load_model
from peft_lessons.methods.qlora import NF4

COLUMNS = ("error", "scaled_error", "test", "difference", "standard_error")
BLOCK, COUNT = 64, 16
ROUNDS = (40, 50, 70, 200)  # levels of nearly the same error, which round other weights otherwise


def kmeans(ratios: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Find levels by Lloyd's algorithm in one dimension: cells are runs of the sorted ratios."""
    x, order = ratios.double().sort()
    mass = torch.cat([x.new_zeros(1), importance.double()[order].cumsum(0)])
    sums = torch.cat([x.new_zeros(1), (importance.double()[order] * x).cumsum(0)])
    levels = x[((torch.arange(COUNT) + 0.5) / COUNT * len(x)).long()]
    for _ in range(rounds):
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([torch.tensor([0]), inner, torch.tensor([len(x)])])
        filled = mass[edges].diff() > 0
        levels = torch.where(filled, sums[edges].diff() / mass[edges].diff(), levels)
    return levels


def rounded(
    weight: torch.Tensor, levels: torch.Tensor, signed: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return the weight after rounding, and its ratios before and after (blocks, 64).

    signed: whether the absmax keeps the sign of the weight, so that its ratio is always +1."""
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))  # (blocks, 1)
    ratios = blocks / (absmax if signed else absmax.abs_())
    near = levels[torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)]
    return (near * absmax).view_as(weight), ratios, near


def relative(errors: list[torch.Tensor], values: list[torch.Tensor]) -> str:
    squares = (sum(t.double().square().sum() for t in parts) for parts in (errors, values))
    return f"{100 * (next(squares) / next(squares)).sqrt():.3f}"


@cache
def base() -> nn.Module:
    """Return the untrained decoder."""
    return load_model("tinylm")


def weights() -> dict[str, torch.Tensor]:
    """Return the weights of its linear layers, {path: (out, in)}."""
    modules = base().model.named_modules()
    return {path: m.weight.detach() for path, m in modules if type(m) is nn.Linear}


@cache
def every() -> dict[str, torch.Tensor]:
    """Return all sets of levels, those to compare with first."""
    blocks = torch.cat([weight.reshape(-1, BLOCK) for weight in weights().values()])
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    ratios, squared = (blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten()
    even = torch.ones_like(ratios)
    return {
        "NF4": NF4,
        "NF4, mirrored": -NF4.flip(0),
        **{f"k-means, {n} rounds": kmeans(ratios, even, n) for n in ROUNDS},
        **{f"k-means, weighted, {n} rounds": kmeans(ratios, squared, n) for n in ROUNDS},
        "int4": torch.arange(-7, 8) / 7,
        "quantiles": kmeans(ratios, even, rounds=0),
    }


@cache
def test_losses(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and numbers of tokens of the test blocks after rounding to some levels."""
    model = copy.deepcopy(base())
    with torch.no_grad():
        for path, weight in weights().items():
            new, *_ = rounded(weight, every()[name].float())
            model.model.get_submodule(path).weight.copy_(new)
    return losses(model, load("austen"), "test")


def run(name: str) -> dict:
    """Round to one set of levels, and compare with NF4."""
    test, tokens = test_losses(name)
    parts = [(weight, *rounded(weight, every()[name].float())) for weight in weights().values()]
    return compared(test, test_losses("NF4")[0], tokens) | {
        "error": relative([new - old for old, new, *_ in parts], [old for old, *_ in parts]),
        "scaled_error": relative(
            [near - ratio for *_, ratio, near in parts], [ratio for *_, ratio, _ in parts]
        ),
        "test": f"{(test.sum() / tokens.sum()).exp():.4f}",
    }


if __name__ == "__main__":
    fill_table("qlora_levels", ("levels",), COLUMNS, [(name,) for name in every()], run)
