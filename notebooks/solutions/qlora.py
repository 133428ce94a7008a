"""Solutions of lesson 03."""

from statistics import NormalDist

import torch
import torch.nn.functional as F

from peft_lessons.methods.qlora import dequantize_nf4, quantize_nf4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes (2n,) of packed bytes (n,), the high nibble of each byte first."""
    pairs = torch.stack([packed >> 4, packed & 15], dim=1)    # (n, 2)
    return pairs.flatten()                                    # (2n,)


def normal_float_levels(bits: int) -> torch.Tensor:
    """Return the levels of NF-k for k = `bits`, ascending: (2**bits,)."""
    half = 2 ** (bits - 1)
    outermost = 0.5 * (1 - 1 / (2 * 2**bits) + 1 - 1 / (2 * (2**bits - 1)))

    def quantiles(count):
        # linspace counts both its ends; the last one, 0.5, is the zero that both halves share.
        probabilities = torch.linspace(outermost, 0.5, count + 1)[:-1]
        return [NormalDist().inv_cdf(p) for p in probabilities.tolist()]

    levels = sorted([-z for z in quantiles(half - 1)] + [0.0] + quantiles(half))
    return torch.tensor(levels) / max(levels)                 # (2**bits,)


def quantize_blockwise(
    x: torch.Tensor, levels: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the code (n,) of every number of x, and the absmax of every block."""
    flat = x.flatten()                                        # (n,)
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)                         # (blocks,)
    scaled = blocks / absmax[:, None]                         # (blocks, block), in [-1, 1]
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, midpoints).to(torch.uint8)
    return codes.flatten()[: len(flat)], absmax


def dequantize_blockwise(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    block: int,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Return the numbers that codes (n,) and absmax stand for, in `shape`."""
    scales = absmax.repeat_interleave(block)[: len(codes)]    # (n,)
    return (levels[codes.long()] * scales).view(shape)


def merge_into_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: float,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, float]:
    """Return the merged weight (out, in) in fp32, and the relative error of re-quantising it."""
    base = dequantize_nf4(packed, absmax, shape)              # (out, in)
    weight = base + (alpha / A.shape[0]) * (B @ A)            # (out, in)
    again = dequantize_nf4(*quantize_nf4(weight), shape)      # (out, in)
    error = (again - weight).norm() / weight.norm()
    return weight, error.item()


class FourBitProduct(torch.autograd.Function):
    """Compute y = x W′ᵀ for a 4-bit weight W′, restored in each direction and never kept."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        weight = dequantize_nf4(packed, absmax, shape)        # (out, in)
        return x @ weight.T                                   # (..., out)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple:
        weight = dequantize_nf4(*ctx.saved_tensors, ctx.shape)    # (out, in)
        return grad_y @ weight, None, None, None              # (..., in)


def kmeans_levels(ratios: torch.Tensor, count: int, rounds: int = 50) -> torch.Tensor:
    """Return `count` levels, ascending, that make the squared error on `ratios` (n,) small."""
    levels = ratios.quantile((torch.arange(count) + 0.5) / count)     # (count,)
    for _ in range(rounds):
        midpoints = (levels[1:] + levels[:-1]) / 2
        cell = torch.bucketize(ratios, midpoints)                     # (n,), the nearest level
        sums = torch.zeros(count).index_add_(0, cell, ratios)
        weights = cell.bincount(minlength=count)
        levels = torch.where(weights > 0, sums / weights, levels)     # an empty cell stays
    return levels.sort().values


def diagnose_codes() -> dict[str, str]:
    """Return {person: what differs} for A to E."""
    return {
        "A": "blocks of 16",
        "B": "the levels as boundaries",
        "C": "one absmax for the matrix",
        "D": "an absmax that keeps its sign",
        "E": "evenly spaced levels",
    }
