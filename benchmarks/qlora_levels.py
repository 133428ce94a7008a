"""Sixteen levels against one another: their error on tinylm's weights, and tinylm's perplexity.

    python benchmarks/qlora_levels.py      # three minutes on one core

Puts all linear weights of tinylm's blocks on the levels, in blocks of 64 whose absmax stays in
float32, and reads Jane Austen's test chapters without training. The levels are those of int4, those
of NF4, and those that Lloyd's algorithm (k-means in one dimension) finds for the least squared
error of the weights divided by the absmax of their blocks: all sixteen, all but NF4's ends, or all
but NF4's ends and zero. One row for each to data/results/qlora_levels.csv: relative error of the
weights and entropy of the codes in bits, test perplexity, and the test loss minus that of NF4 in
nats per token with the standard error of the paired difference.
"""

import copy

import torch
from common import Results, missing
from qlora_bases import compared, losses

from peft_lessons import load_model, load_task
from peft_lessons.methods.qlora import NF4

COLUMNS = ("levels", "error", "entropy", "test", "difference", "standard_error")
ROUNDS = 200


def nearest(ratios: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)


def lloyd(ratios: torch.Tensor, fixed: tuple[int, ...] = ()) -> torch.Tensor:
    """Sixteen levels of small squared error of numbers (n,); those with the indices `fixed` stay
    NF4's."""
    ratios, levels = ratios.double(), NF4.double()
    for _ in range(ROUNDS):
        codes = nearest(ratios, levels)
        chosen = torch.bincount(codes, minlength=16)
        sums = torch.bincount(codes, weights=ratios, minlength=16)
        moved = chosen > 0
        moved[list(fixed)] = False
        levels = torch.where(moved, sums / chosen, levels)
    return levels.float()


def on_levels(base: torch.nn.Module, levels: torch.Tensor) -> torch.nn.Module:
    """A copy whose linear weights inside the blocks are on the levels."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for m in model.model.modules():
            if isinstance(m, torch.nn.Linear):
                own = m.weight.reshape(-1, 64)
                scale = own.abs().amax(dim=1, keepdim=True)
                m.weight.copy_((levels[nearest(own / scale, levels)] * scale).view_as(m.weight))
    return model


def main() -> None:
    torch.set_num_threads(1)
    results = Results("qlora_levels", COLUMNS)
    base, task = load_model("tinylm"), load_task("austen")
    linears = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear)]
    blocks = torch.cat([m.weight.detach().reshape(-1, 64) for m in linears])
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    ratios = (blocks / absmax).flatten()
    makers = {
        "NF4": lambda: NF4,
        "int4": lambda: torch.arange(-7, 8) / 7,
        "k-means": lambda: lloyd(ratios),
        "k-means, ends kept": lambda: lloyd(ratios, (0, 15)),
        "k-means, ends and zero kept": lambda: lloyd(ratios, (0, 7, 15)),
    }
    reference = None
    for (name,) in missing(results, ("levels",), [(name,) for name in makers]):
        levels = makers[name]()
        codes = nearest(ratios, levels)
        error = (levels[codes].view_as(blocks) * absmax - blocks).norm() / blocks.norm()
        shares = torch.bincount(codes, minlength=len(levels)) / len(codes)
        if reference is None:
            reference = losses(on_levels(base, NF4), task, "test")[0]
        test, tokens = losses(on_levels(base, levels), task, "test")
        row = compared(test, reference, tokens) | {
            "error": f"{error:.5f}",
            "entropy": f"{-(shares * shares.clamp(1e-9).log2()).sum():.4f}",
            "test": f"{(test.sum() / tokens.sum()).exp():.4f}",
        }
        results.add(levels=name, **row)
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
