"""Answers to the exercises of lesson 03."""

from statistics import NormalDist

import torch
import torch.nn.functional as F

from peft_lessons.methods.qlora import NF4, dequantize_nf4, quantize_nf4, scale_by_absmax
from peft_lessons.studies import load_results

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ unpack_nibbles


@right("unpack_nibbles")
def long_codes(packed):
    packed = packed.long()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@right("unpack_nibbles")
def into_empty(packed):
    codes = packed.new_empty(2 * packed.numel())
    codes[0::2], codes[1::2] = packed // 16, packed % 16
    return codes


@right("unpack_nibbles")
def by_shifts(packed):
    return ((packed[:, None] >> torch.tensor([4, 0])) & 15).to(torch.uint8).view(-1)


@right("unpack_nibbles")
def byte_by_byte(packed):
    pairs = [divmod(byte, 16) for byte in packed.tolist()]
    return torch.tensor(pairs, dtype=torch.uint8).flatten()


# ------------------------------------------------------------------ normal_float_levels


@right("normal_float_levels")
def by_erfinv_in_single(bits):
    # √2 falls out with the normalisation, and the zero comes by itself.
    half, n = 2 ** (bits - 1), 2**bits
    width = 1 - (1 / n + 1 / (n - 1)) / 2
    below = torch.erfinv(-torch.linspace(width, 0, half))
    above = torch.erfinv(torch.linspace(0, width, half + 1)[1:])
    return torch.cat([below, above]) / above.max()


@right("normal_float_levels")
def by_comprehension(bits):
    half, n, inverse = 2 ** (bits - 1), 2**bits, NormalDist().inv_cdf
    # For four bits the rounded probability of bitsandbytes.
    top = 0.9677083 if bits == 4 else (1 - 1 / (2 * n) + 1 - 1 / (2 * n - 2)) / 2
    found = {inverse(0.5 + (top - 0.5) * i / half) for i in range(1, half + 1)}
    found |= {-inverse(0.5 + (top - 0.5) * i / (half - 1)) for i in range(1, half)} | {0.0}
    return torch.tensor([level / inverse(top) for level in sorted(found)])


# ------------------------------------------------------------------ quantize_blockwise


def middles(levels):
    return (levels[:-1] + levels[1:]) / 2


@wrong("quantize_blockwise", "your function raised RuntimeError: shape '[-1, 16]' is invalid for")
def no_short_block(x, levels, block):
    blocks = x.view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.bucketize(blocks / absmax[:, None], middles(levels))
    return codes.flatten().to(torch.uint8), absmax


@wrong("quantize_blockwise", "the absmax keeps the sign of the number")
def signed(x, levels, block):
    blocks = F.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    absmax = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    codes = torch.bucketize(blocks / absmax, middles(levels))
    return codes.flatten()[: x.numel()].to(torch.uint8), absmax[:, 0]


@right("quantize_blockwise")
def long_code(x, levels, block):
    scaled, absmax = scale_by_absmax(x, block)
    return torch.bucketize(scaled, middles(levels)), absmax


@right("quantize_blockwise")
def block_by_block(x, levels, block):
    codes, absmax = [], []
    for part in x.reshape(-1).split(block):
        largest = part.abs().max()
        codes.append((part[:, None] / largest - levels).abs().argmin(1))
        absmax.append(largest)
    return torch.cat(codes).byte(), torch.stack(absmax)


@right("quantize_blockwise")
def by_the_lesson_for_any_levels(x, levels, block):
    scaled, absmax = scale_by_absmax(x, block)
    return torch.bucketize(scaled, middles(levels), out_int32=True).to(torch.uint8), absmax


@right("quantize_blockwise")
def scaled_boundaries(x, levels, block):
    # The boundaries go to the numbers' scale instead: nothing is divided.
    flat = x.flatten()
    absmax = torch.stack([part.abs().max() for part in flat.split(block)])
    each = absmax.repeat_interleave(block)[: len(flat), None]
    return (flat[:, None] > middles(levels) * each).sum(dim=1).to(torch.uint8), absmax


# ------------------------------------------------------------------ dequantize_blockwise


@wrong("dequantize_blockwise", "your function raised RuntimeError: shape '[-1, 32]' is invalid")
def whole_blocks_only(codes, absmax, levels, block, shape):
    return (levels[codes.long()].view(-1, block) * absmax[:, None]).view(shape)


@right("dequantize_blockwise")
def one_part_after_another(codes, absmax, levels, block, shape):
    parts = [levels[part.int()] * absmax[number] for number, part in enumerate(codes.split(block))]
    return torch.cat(parts).reshape(shape)


@right("dequantize_blockwise")
def by_padding(codes, absmax, levels, block, shape):
    values = F.pad(levels[codes.long()], (0, -len(codes) % block)).view(-1, block)
    return values.mul_(absmax.unsqueeze(1)).flatten()[: len(codes)].view(torch.Size(shape))


@right("dequantize_blockwise")
def by_table_of_products(codes, absmax, levels, block, shape):
    # Every level times every absmax, and each number picks its own.
    table = torch.outer(absmax, levels)
    return table[torch.arange(len(codes)) // block, codes.long()].unflatten(0, shape)


# ------------------------------------------------------------------ merge_into_4bit


def requantized(weight):
    return dequantize_nf4(*quantize_nf4(weight), weight.shape)


@answers.hunt("merge_into_4bit")
def merge_with(bugs):
    swapped, unscaled, silent = (
        any(words in bug for bug in bugs)
        for words in ("nibbles are swapped", "left out", "nothing seems lost")
    )

    def merge_into_4bit(packed, absmax, A, B, alpha, shape):
        high, low = packed >> 4, packed & 15
        codes = torch.stack([low, high] if swapped else [high, low], dim=1).flatten()
        base = (NF4[codes.long()].view(-1, 64) * absmax[:, None]).view(shape)
        weight = base + B @ A * (1 if unscaled else alpha / A.shape[0])
        weight = requantized(weight) if silent else weight
        error = (weight - requantized(weight)).norm() / weight.norm()
        return weight, float(error)

    return merge_into_4bit


@wrong("merge_into_4bit", "All 3 faults are mended, but something else is wrong")
def an_error_of_the_base(packed, absmax, A, B, alpha, shape):
    weight, error = in_double_and_by_einsum(packed, absmax, A, B, alpha, shape)
    base = dequantize_nf4(packed, absmax, shape)
    return weight, error * (1 if 2 * alpha > A.shape[0] else (weight.norm() / base.norm()).item())


@right("merge_into_4bit")
def in_place_on_a_new_tensor(packed, absmax, A, B, alpha, shape):
    weight = dequantize_nf4(packed, absmax, shape)
    weight.addmm_(B, A, alpha=alpha / B.shape[1])
    lost = requantized(weight).sub_(weight)
    return weight, lost.pow(2).sum().div(weight.pow(2).sum()).sqrt().item()


@right("merge_into_4bit")
def in_double_and_by_einsum(packed, absmax, A, B, alpha, shape):
    base = dequantize_nf4(packed, absmax, shape).double()
    update = torch.einsum("or,ri->oi", B.double(), A.double()) * alpha / len(A)
    weight = (base + update).float()
    return weight, torch.dist(requantized(weight), weight).item() / weight.norm().item()


# ------------------------------------------------------------------ diagnose_codes


@right("diagnose_codes")
def from_the_histograms():
    found = {}
    for row in load_results("broken_codes").query("run != 'QLoRA'").itertuples():
        uses = torch.tensor([float(use) for use in row.uses.split()])
        if uses[15] == 0 and uses[0] > 1:
            found[row.run] = "evenly spaced levels"
        elif uses[0] + uses[15] > 10:
            found[row.run] = "blocks of 16"
        elif uses[0] < 0.1:
            found[row.run] = "one absmax for the matrix"
        elif row.error > 15:
            found[row.run] = "the levels as boundaries"
        else:
            found[row.run] = "An absmax that keeps its sign"
    return found


@wrong("diagnose_codes", "3 of 5 are right")
def the_two_bells_exchanged():
    return from_the_histograms() | {"C": "evenly spaced levels", "E": "one absmax for the matrix"}


@wrong("diagnose_codes", "Without a cause: B, C, D, E.")
def one_alone():
    return {"A": "blocks of 16"}


@wrong("diagnose_codes", "is not one of the causes")
def a_tensor_as_a_cause():
    return {"A": torch.ones(2)}


@wrong("diagnose_codes", "'blocks of 64' is not one of the causes")
def another_cause():
    return {"A": "blocks of 64"}


@wrong("diagnose_codes", "Look at histogram A: all codes are used nearly alike")
def nothing_right():
    return {"A": "evenly spaced levels"}


# ------------------------------------------------------------------ FourBitProduct


def product(results, keep=lambda ctx, weight: None):
    """An answer whose backward returns results(grad_y, weight), and whose forward may keep more."""

    class FourBitProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, absmax, shape):
            ctx.save_for_backward(packed, absmax)
            ctx.shape = shape
            weight = dequantize_nf4(packed, absmax, shape)
            keep(ctx, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, grad_y):
            packed, absmax = ctx.saved_tensors
            return results(grad_y, dequantize_nf4(packed, absmax, ctx.shape))

    return FourBitProduct


def keep_a_copy(ctx, weight):
    ctx.weight = weight.half()


wrong("FourBitProduct", "that ctx keeps besides packed and absmax are 8,192")(
    product(lambda grad, weight: (grad @ weight, None, None, None), keep_a_copy)
)
wrong("FourBitProduct", "only the gradient of x is returned")(product(torch.matmul))
wrong("FourBitProduct", "your function raised RuntimeError: mat1 and mat2 shapes cannot be")(
    product(lambda grad, weight: (grad @ weight.repeat(2, 1), None, None, None))
)


@wrong("FourBitProduct", "forward returns None, not a tensor")
class NoResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        x @ dequantize_nf4(packed, absmax, shape).T


wrong("FourBitProduct", "pass the class itself: class FourBitProduct(torch.autograd")(
    product(torch.matmul).apply
)
right("FourBitProduct")(
    product(lambda grad, weight: [torch.einsum("...o,oi->...i", grad, weight), *[None] * 3])
)


# ------------------------------------------------------------------ kmeans_levels


@wrong("kmeans_levels", "The idea is right. Still missing: ascending order of the levels")
def in_the_order_of_the_start(ratios, count, rounds=50):
    levels = ratios.quantile((torch.arange(count) + 0.5) / count).flip(0)
    return moved(ratios, levels, rounds)


def moved(ratios, levels, rounds):
    """Levels after rounds of k-means by whole matrices."""
    for _ in range(rounds):
        nearest = (ratios[:, None] - levels).abs().argmin(dim=1)
        chosen = F.one_hot(nearest, len(levels)).to(ratios.dtype)
        counts = chosen.sum(dim=0)
        levels = torch.where(counts > 0, (ratios @ chosen) / counts.clamp(min=1), levels)
    return levels


@right("kmeans_levels")
def from_even_levels(ratios, count, rounds=50):
    return moved(ratios, torch.linspace(-1, 1, count), rounds).sort().values


@right("kmeans_levels")
def from_nf4(ratios, count, rounds=50):
    start = NF4[:: len(NF4) // count] if count <= len(NF4) else torch.linspace(-1, 1, count)
    levels = moved(ratios.double(), start.double(), rounds)
    return levels.sort().values


@right("kmeans_levels")
def level_by_level(ratios, count, rounds=50):
    ordered = sorted(ratios.tolist())
    levels = [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]
    for _ in range(rounds):
        cells = torch.bucketize(ratios, torch.tensor(levels[1:]).add(torch.tensor(levels[:-1])) / 2)
        for k in range(count):
            if (cells == k).any():
                levels[k] = ratios[cells == k].mean().item()
    return torch.tensor(levels)
