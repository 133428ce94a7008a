"""Answers to the exercises of lesson 03."""

from statistics import NormalDist

import torch
import torch.nn.functional as F

from peft_lessons.methods.qlora import NF4, dequantize_nf4, in_blocks, quantize_nf4, scale_by_absmax

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ bits_per_parameter


@wrong("bits_per_parameter", "the absmax is left out: every block stores one")
def codes_alone(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    return float(bits)


@wrong("bits_per_parameter", "a block shares its absmax: divide absmax_bits by block")
def absmax_for_each(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block:
        return bits + double_bits + absmax_bits / double_block
    return bits + absmax_bits


@wrong("bits_per_parameter", "the division is upside down")
def upside_down(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return bits + block / absmax_bits
    return bits + block / double_bits + block * double_block / absmax_bits


@wrong("bits_per_parameter", "the result is in bytes")
def in_bytes(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return (bits + absmax_bits / block) / 8
    return (bits + double_bits / block + absmax_bits / block / double_block) / 8


@wrong("bits_per_parameter", "these are the bits of a whole block")
def whole_block(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return float(bits * block + absmax_bits)
    return bits * block + double_bits + absmax_bits / double_block


@wrong("bits_per_parameter", "// drops the fraction of a bit")
def whole_bits(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return bits + absmax_bits // block
    return bits + double_bits // block + absmax_bits // (block * double_block)


@wrong("bits_per_parameter", "double quantisation is left out: look at double_block")
def single_only(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    return bits + absmax_bits / block


@wrong("bits_per_parameter", "is shared by block · double_block parameters, not by double_block")
def second_by_double_block(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return bits + absmax_bits / block
    return bits + double_bits / block + absmax_bits / double_block


@wrong("bits_per_parameter", "the second absmax is left out")
def no_second_absmax(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    return bits + (absmax_bits if double_block is None else double_bits) / block


@wrong("bits_per_parameter", "the double_bits of each quantised absmax are left out")
def second_absmax_alone(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    return bits + absmax_bits / (block * (double_block or 1))


@wrong("bits_per_parameter", "its code of double_bits replaces it")
def first_absmax_kept(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    total = bits + absmax_bits / block
    if double_block:
        total += double_bits / block + absmax_bits / (block * double_block)
    return total


@wrong("bits_per_parameter", "both absmax are counted in absmax_bits")
def all_in_absmax_bits(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    second = absmax_bits / (block * double_block) if double_block else 0
    return bits + absmax_bits / block + second


@wrong("bits_per_parameter", "both absmax are counted in double_bits")
def all_in_double_bits(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return bits + absmax_bits / block
    return bits + double_bits / block * (1 + 1 / double_block)


@wrong("bits_per_parameter", "absmax_bits and double_bits have changed places")
def sizes_swapped(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    second = double_bits / (block * double_block) if double_block else 0
    return bits + absmax_bits / block + second


@wrong("bits_per_parameter", "the defaults are counted")
def constants(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return bits + 32 / block
    return bits + 8 / block + 32 / (block * double_block)


@wrong("bits_per_parameter", "Expected bits_per_parameter(bits, block, absmax_bits=32")
def without_defaults(bits, block, absmax_bits, double_block, double_bits):
    return bits + double_bits / block + absmax_bits / (block * double_block)


@wrong("bits_per_parameter", "TypeError: unsupported operand type(s) for *: 'int' and 'NoneType'")
def none_multiplied(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    return bits + double_bits / block + absmax_bits / (block * double_block)


@right("bits_per_parameter")
def nested(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    scale = absmax_bits if not double_block else double_bits + absmax_bits / double_block
    return bits + scale / block


@right("bits_per_parameter")
def recursive(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is not None:
        absmax_bits = recursive(double_bits, double_block, absmax_bits)
    return (bits * block + absmax_bits) / block


# ------------------------------------------------------------------ unpack_nibbles


@wrong("unpack_nibbles", "the nibbles are swapped: the high one comes first")
def low_first(packed):
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).view(-1)


@wrong("unpack_nibbles", "all high nibbles come first, then all low ones")
def concatenated(packed):
    return torch.cat([packed >> 4, packed & 15])


@wrong("unpack_nibbles", "all high nibbles come first, then all low ones")
def stacked_in_rows(packed):
    return torch.stack([packed >> 4, packed & 15]).flatten()


@wrong("unpack_nibbles", "all low nibbles come first, then all high ones")
def concatenated_low_first(packed):
    return torch.cat([packed % 16, packed // 16])


@wrong("unpack_nibbles", "the high nibble is masked, but not shifted")
def not_shifted(packed):
    codes = torch.empty(2 * len(packed), dtype=torch.uint8)
    codes[0::2] = packed & 0xF0
    codes[1::2] = packed & 0x0F
    return codes


@wrong("unpack_nibbles", "the low nibble is not masked")
def not_masked(packed):
    return torch.stack([packed >> 4, packed], dim=1).flatten()


@wrong("unpack_nibbles", "divide by 16, not by 15")
def by_fifteen(packed):
    return torch.stack([packed // 15, packed % 15], dim=1).flatten()


@wrong("unpack_nibbles", "a signed byte keeps its sign when it is shifted")
def signed_shift(packed):
    high = (packed.view(torch.int8) >> 4).to(torch.uint8)
    return torch.stack([high, packed & 15], dim=1).flatten()


@wrong("unpack_nibbles", "these are the high nibbles alone")
def high_alone(packed):
    return packed // 16


@wrong("unpack_nibbles", "the two nibbles of a byte are two columns: flatten them")
def two_columns(packed):
    return torch.stack([packed >> 4, packed & 15], dim=1)


@wrong("unpack_nibbles", "codes has dtype int64, expected uint8")
def long_codes(packed):
    packed = packed.long()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@wrong("unpack_nibbles", "codes has dtype float32, expected uint8")
def true_division(packed):
    return torch.stack([(packed / 16).floor(), (packed % 16).float()], dim=1).flatten()


@wrong("unpack_nibbles", "the argument packed was changed")
def in_place(packed):
    low = packed & 15
    high = packed.bitwise_right_shift_(4)
    return torch.stack([high, low], dim=1).flatten()


@right("unpack_nibbles")
def into_empty(packed):
    codes = packed.new_empty(2 * packed.numel())
    codes[0::2], codes[1::2] = packed >> 4, packed & 0x0F
    return codes


@right("unpack_nibbles")
def by_division(packed):
    return torch.stack((packed // 16, packed % 16), -1).reshape(-1)


@right("unpack_nibbles")
def by_shifts(packed):
    return ((packed[:, None] >> torch.tensor([4, 0])) & 15).to(torch.uint8).view(-1)


@right("unpack_nibbles")
def by_table(packed):
    table = torch.cartesian_prod(torch.arange(16), torch.arange(16)).byte()
    return table[packed.int()].flatten()


@right("unpack_nibbles")
def byte_by_byte(packed):
    pairs = [divmod(byte, 16) for byte in packed.tolist()]
    return torch.tensor(pairs, dtype=torch.uint8).flatten()


# ------------------------------------------------------------------ normal_float_levels


def mean_offset(bits):
    return (1 - 1 / 2 ** (bits + 1) + 1 - 1 / (2 * (2**bits - 1))) / 2


def z(probabilities):
    return torch.tensor([NormalDist().inv_cdf(p) for p in probabilities.tolist()])


def from_halves(positive, negative, zeros=1):
    levels = torch.cat([-negative, torch.zeros(zeros), positive]).sort().values
    return levels / levels.abs().max()


@wrong("normal_float_levels", "the exact zero is missing: of 2^k levels one is 0")
def symmetric_without_zero(bits):
    half = z(torch.linspace(mean_offset(bits), 0.5, 2 ** (bits - 1) + 1)[:-1])
    return from_halves(half, half, zeros=0)


@wrong("normal_float_levels", "both halves have 2^(k−1) levels, which with the zero is one too")
def one_too_many(bits):
    half = z(torch.linspace(mean_offset(bits), 0.5, 2 ** (bits - 1) + 1)[:-1])
    return from_halves(half, half)


@wrong("normal_float_levels", "the zero is there twice")
def zero_twice(bits):
    half = z(torch.linspace(mean_offset(bits), 0.5, 2 ** (bits - 1)))
    return torch.cat([-half, half.flip(0)]) / half.max()


@wrong("normal_float_levels", "linspace counts both its ends")
def one_too_few(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    return from_halves(
        z(torch.linspace(top, 0.5, half)[:-1]), z(torch.linspace(top, 0.5, half - 1)[:-1])
    )


@wrong("normal_float_levels", "the two halves have changed places")
def more_below(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    return from_halves(
        z(torch.linspace(top, 0.5, half)[:-1]), z(torch.linspace(top, 0.5, half + 1)[:-1])
    )


def halves_to(top, bits):
    half = 2 ** (bits - 1)
    return from_halves(
        z(torch.linspace(top, 0.5, half + 1)[:-1]), z(torch.linspace(top, 0.5, half)[:-1])
    )


@wrong("normal_float_levels", "the offset is that of 4 bits: it depends on k")
def offset_of_four(bits):
    return halves_to(0.9677083, bits)


@wrong("normal_float_levels", "1 − 1/(2·2^k) is only one of them")
def first_offset_alone(bits):
    return halves_to(1 - 1 / 2 ** (bits + 1), bits)


@wrong("normal_float_levels", "1 − 1/(2·(2^k − 1)) is only one of them")
def second_offset_alone(bits):
    return halves_to(1 - 0.5 / (2**bits - 1), bits)


@wrong("normal_float_levels", "a factor 2 is lost in the offset")
def offset_doubled(bits):
    return halves_to(((1 - 1 / 2**bits) + (1 - 1 / (2**bits - 1))) / 2, bits)


@wrong("normal_float_levels", "one sweep from 1 − offset to the offset has no exact zero")
def one_sweep(bits):
    top = mean_offset(bits)
    levels = z(torch.linspace(1 - top, top, 2**bits))
    return levels / levels.max()


@wrong("normal_float_levels", "the centres of 2^k equally likely bins")
def equal_bins(bits):
    levels = z((torch.arange(2**bits) + 0.5) / 2**bits)
    return levels / levels.max()


@wrong("normal_float_levels", "the quantiles i/(2^k + 1) have no exact zero")
def inner_quantiles(bits):
    levels = z(torch.linspace(0, 1, 2**bits + 2)[1:-1])
    return levels / levels.max()


@wrong("normal_float_levels", "the quantiles of 0 and 1 are infinite")
def infinite_ends(bits):
    levels = torch.special.ndtri(torch.linspace(0, 1, 2**bits))
    return levels / levels.max()


@wrong("normal_float_levels", "your function raised StatisticsError")
def infinite_ends_by_statistics(bits):
    levels = z(torch.linspace(0, 1, 2**bits))
    return levels / levels.max()


@wrong("normal_float_levels", "the levels are not divided by the largest")
def not_normalised(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    positive = z(torch.linspace(top, 0.5, half + 1)[:-1])
    negative = z(torch.linspace(top, 0.5, half)[:-1])
    return torch.cat([-negative, torch.zeros(1), positive]).sort().values


@wrong("normal_float_levels", "the positive half runs down")
def left_unsorted(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    positive = z(torch.linspace(top, 0.5, half + 1)[:-1])
    negative = z(torch.linspace(top, 0.5, half)[:-1])
    return torch.cat([-negative, torch.zeros(1), positive]) / positive.max()


@wrong("normal_float_levels", "the positive half comes first")
def positive_first(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    positive = z(torch.linspace(top, 0.5, half + 1)[:-1])
    negative = z(torch.linspace(top, 0.5, half)[:-1])
    return torch.cat([positive, torch.zeros(1), -negative]) / positive.max()


@wrong("normal_float_levels", "the levels are sorted from 1 down to −1")
def descending(bits):
    return halves_to(mean_offset(bits), bits).sort(descending=True).values


@wrong("normal_float_levels", "the levels are evenly spaced")
def evenly_spaced(bits):
    return torch.linspace(-1, 1, 2**bits)


@wrong("normal_float_levels", "this is the table of 4 bits, whatever bits is")
def the_table(bits):
    return NF4.clone()


@wrong("normal_float_levels", "the levels has dtype float64, expected float32")
def in_double(bits):
    return halves_to(mean_offset(bits), bits).double()


@wrong("normal_float_levels", "the levels is a list of 16, expected a tensor")
def as_a_list(bits):
    return halves_to(mean_offset(bits), bits).tolist()


@right("normal_float_levels")
def by_ndtri(bits):
    half, top = 2 ** (bits - 1), mean_offset(bits)
    above = torch.special.ndtri(torch.linspace(0.5, top, half + 1, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(top, 0.5, half, dtype=torch.float64))
    return (torch.cat([below, above[1:]]) / above[-1]).float()


@right("normal_float_levels")
def by_erfinv_in_single(bits):
    # √2 falls out with the normalisation, and the zero comes by itself.
    half, width = 2 ** (bits - 1), 2 * mean_offset(bits) - 1
    below = torch.erfinv(-torch.linspace(width, 0, half))
    above = torch.erfinv(torch.linspace(0, width, half + 1)[1:])
    return torch.cat([below, above]) / above.max()


@right("normal_float_levels")
def by_comprehension(bits):
    half, top, inverse = 2 ** (bits - 1), mean_offset(bits), NormalDist().inv_cdf
    found = {inverse(0.5 + (top - 0.5) * i / half) for i in range(1, half + 1)}
    found |= {-inverse(0.5 + (top - 0.5) * i / (half - 1)) for i in range(1, half)} | {0.0}
    return torch.tensor([level / inverse(top) for level in sorted(found)])


@right("normal_float_levels")
def rounded_offset_for_four(bits):
    return halves_to(0.9677083 if bits == 4 else mean_offset(bits), bits)


# ------------------------------------------------------------------ quantize_blockwise


def padded(x, block):
    return F.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)


def middles(levels):
    return (levels[:-1] + levels[1:]) / 2


def safe(absmax):
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax)[:, None]


def coded(scaled, boundaries, n):
    return torch.bucketize(scaled, boundaries).flatten()[:n].to(torch.uint8)


@wrong("quantize_blockwise", "one absmax serves the whole tensor")
def one_for_all(x, levels, block):
    absmax = x.abs().max()
    codes = coded(x / absmax, middles(levels), x.numel())
    return codes, absmax.repeat(-(-x.numel() // block))


@wrong("quantize_blockwise", "there is one absmax for the whole tensor")
def one_alone(x, levels, block):
    absmax = x.abs().max()
    return coded(x / absmax, middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "the largest number, not the largest absolute value")
def signed_maximum(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.amax(dim=1)
    return coded(blocks / absmax[:, None], middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "scaled by their mean absolute value")
def mean_absolute(x, levels, block):
    blocks = padded(x, block)
    absmean = blocks.abs().mean(dim=1)
    return coded(blocks / safe(absmean), middles(levels), x.numel()), absmean


@wrong("quantize_blockwise", "each row is a block")
def rows_are_blocks(x, levels, block):
    blocks = x.reshape(x.shape[0], -1)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "the blocks start anew in each row")
def rows_are_padded(x, levels, block):
    codes, absmax = [], []
    for row in x.reshape(-1, x.shape[-1]):
        for part in row.split(block):
            absmax.append(part.abs().max())
            codes.append(coded(part / absmax[-1], middles(levels), len(part)))
    return torch.cat(codes), torch.stack(absmax)


@wrong("quantize_blockwise", "the maximum is taken across the blocks, not within each")
def wrong_dimension(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().max(dim=0).values
    return coded(blocks / absmax, middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "the numbers are multiplied by their absmax")
def multiplied(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks * absmax[:, None], middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "not divided by the absmax of their block")
def not_scaled(x, levels, block):
    absmax = padded(x, block).abs().amax(dim=1)
    return coded(x, middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "which rounds up: use the midpoints")
def rounded_up(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), levels, x.numel()), absmax


@wrong("quantize_blockwise", "rounded down to a level")
def rounded_down(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.searchsorted(levels, blocks / safe(absmax), side="right") - 1
    return codes.clamp(min=0).flatten()[: x.numel()].to(torch.uint8), absmax


@wrong("quantize_blockwise", "the boundaries are the levels without the first")
def without_the_first(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), levels[1:], x.numel()), absmax


@wrong("quantize_blockwise", "right only for evenly spaced levels")
def uniform(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    steps = (len(levels) - 1) * (blocks / safe(absmax) + 1) / 2
    return steps.round().flatten()[: x.numel()].to(torch.uint8), absmax


@wrong("quantize_blockwise", "without its absolute value")
def signed_distance(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    codes = ((blocks / safe(absmax))[..., None] - levels).argmin(dim=-1)
    return codes.flatten()[: x.numel()].to(torch.uint8), absmax


@wrong("quantize_blockwise", "the last block is dropped, for it is short")
def rest_dropped(x, levels, block):
    whole = x.numel() // block
    blocks = x.flatten()[: whole * block].view(whole, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), whole * block), absmax


@wrong("quantize_blockwise", "the codes of the padding are returned too")
def padding_kept(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), blocks.numel()), absmax


@wrong("quantize_blockwise", "its NaN gets the last level")
def zero_divided(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / absmax[:, None], middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "its NaN gets the first level")
def zero_divided_argmin(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    codes = ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(dim=-1)
    return codes.flatten()[: x.numel()].to(torch.uint8), absmax


@wrong("quantize_blockwise", "the absmax of a block of zeros is 0: replace it for the division")
def absmax_replaced(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    absmax[absmax == 0] = 1
    return coded(blocks / absmax[:, None], middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "the codes are packed two a byte")
def packed_codes(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    codes = coded(blocks / safe(absmax), middles(levels), x.numel())
    return codes[0::2] << 4 | codes[1::2], absmax


@wrong("quantize_blockwise", "the order is turned: return the codes first")
def absmax_first(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return absmax, coded(blocks / safe(absmax), middles(levels), x.numel())


@wrong("quantize_blockwise", "codes has dtype int64, expected uint8")
def long_code(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), x.numel()).long(), absmax


@wrong("quantize_blockwise", "codes has shape (6, 40), expected (240,)")
def codes_in_shape(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), x.numel()).view_as(x), absmax


@wrong("quantize_blockwise", "absmax has shape (5, 1), expected (5,)")
def absmax_in_a_column(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), x.numel()), absmax[:, None]


@wrong("quantize_blockwise", "your function raised RuntimeError: shape '[-1, 16]' is invalid for")
def no_short_block(x, levels, block):
    blocks = x.view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    return coded(blocks / safe(absmax), middles(levels), x.numel()), absmax


@wrong("quantize_blockwise", "the argument x was changed")
def divided_in_place(x, levels, block):
    absmax = torch.stack([part.abs().max() for part in x.flatten().split(block)])
    for part, largest in zip(x.view(-1).split(block), absmax, strict=True):
        part /= largest if largest > 0 else 1
    return coded(x, middles(levels), x.numel()), absmax


@right("quantize_blockwise")
def block_by_block(x, levels, block):
    codes, absmax = [], []
    for part in x.reshape(-1).split(block):
        largest = part.abs().max()
        scaled = part / largest if largest else torch.zeros_like(part)
        codes.append((scaled[:, None] - levels).abs().argmin(1))
        absmax.append(largest)
    return torch.cat(codes).byte(), torch.stack(absmax)


@right("quantize_blockwise")
def by_the_reciprocal(x, levels, block):
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num_(0).flatten()[: x.numel()]
    return torch.bucketize(scaled, middles(levels), right=True).to(torch.uint8), absmax


@right("quantize_blockwise")
def by_the_lesson_for_any_levels(x, levels, block):
    scaled, absmax = scale_by_absmax(x, block)
    return torch.bucketize(scaled, middles(levels), out_int32=True).to(torch.uint8), absmax


@right("quantize_blockwise")
def clamped(x, levels, block):
    # A tiny absmax instead of 0 comes to the same.
    blocks = padded(x, block)
    absmax = blocks.abs().amax(dim=1).clamp(min=1e-12)
    codes = torch.searchsorted(middles(levels), blocks / absmax[:, None])
    return codes.view(-1)[: x.numel()].to(torch.uint8), absmax


@right("quantize_blockwise")
def scaled_boundaries(x, levels, block):
    # The boundaries go to the numbers' scale instead: nothing is divided.
    flat = x.flatten()
    absmax = torch.stack([part.abs().max() for part in flat.split(block)])
    own = middles(levels) * absmax.repeat_interleave(block)[: len(flat), None]
    codes = (flat[:, None] > own).sum(dim=1)
    zero = levels.abs().argmin()
    codes = torch.where(absmax.repeat_interleave(block)[: len(flat)] > 0, codes, zero)
    return codes.to(torch.uint8), absmax


# ------------------------------------------------------------------ dequantize_blockwise


def spread(absmax, block, n):
    return absmax.repeat_interleave(block)[:n]


@wrong("dequantize_blockwise", "the absmax is left out")
def levels_alone(codes, absmax, levels, block, shape):
    return levels[codes.int()].view(shape)


@wrong("dequantize_blockwise", "the levels are divided by the absmax")
def divided(codes, absmax, levels, block, shape):
    return (levels[codes.long()] / spread(absmax, block, len(codes))).view(shape)


@wrong("dequantize_blockwise", "repeat gives neighbours different absmax")
def repeated(codes, absmax, levels, block, shape):
    return (levels[codes.long()] * absmax.repeat(block)[: len(codes)]).view(shape)


@wrong("dequantize_blockwise", "repeat gives neighbours different absmax")
def blocks_across(codes, absmax, levels, block, shape):
    values = F.pad(levels[codes.long()], (0, -len(codes) % block))
    return (values.view(block, -1) * absmax).flatten()[: len(codes)].view(shape)


@wrong("dequantize_blockwise", "every number gets the first absmax")
def first_absmax(codes, absmax, levels, block, shape):
    return (levels[codes.long()] * absmax[0]).view(shape)


@wrong("dequantize_blockwise", "every number gets the largest absmax")
def largest_absmax(codes, absmax, levels, block, shape):
    return (levels[codes.long()] * absmax.max()).view(shape)


@wrong("dequantize_blockwise", "the absmax are shared out evenly")
def shared_out(codes, absmax, levels, block, shape):
    width = -(-len(codes) // len(absmax))
    return (levels[codes.long()] * spread(absmax, width, len(codes))).view(shape)


@wrong("dequantize_blockwise", "the levels are not looked up")
def evenly_spaced_levels(codes, absmax, levels, block, shape):
    values = codes / (len(levels) - 1) * 2 - 1
    return (values * spread(absmax, block, len(codes))).view(shape)


@wrong("dequantize_blockwise", "the codes themselves are multiplied")
def codes_multiplied(codes, absmax, levels, block, shape):
    return (codes * spread(absmax, block, len(codes))).view(shape)


@wrong("dequantize_blockwise", "the result is flat: give it the shape")
def left_flat(codes, absmax, levels, block, shape):
    return levels[codes.long()] * spread(absmax, block, len(codes))


@wrong("dequantize_blockwise", "the shape is filled column by column")
def by_columns(codes, absmax, levels, block, shape):
    return (levels[codes.long()] * spread(absmax, block, len(codes))).view(shape[::-1]).T


@wrong("dequantize_blockwise", "your function raised IndexError: The shape of the mask [240]")
def byte_index(codes, absmax, levels, block, shape):
    return (levels[codes] * spread(absmax, block, len(codes))).view(shape)


@wrong("dequantize_blockwise", "your function raised RuntimeError: shape '[-1, 32]' is invalid")
def whole_blocks_only(codes, absmax, levels, block, shape):
    return (levels[codes.long()].view(-1, block) * absmax[:, None]).view(shape)


@wrong("dequantize_blockwise", "x has dtype float64, expected float32")
def double_values(codes, absmax, levels, block, shape):
    return (levels[codes.long()].double() * spread(absmax, block, len(codes))).view(shape)


@wrong("dequantize_blockwise", "the argument levels was changed")
def levels_scaled_in_place(codes, absmax, levels, block, shape):
    values = levels[codes.long()] * spread(absmax, block, len(codes))
    levels.mul_(absmax[-1])
    return values.view(shape)


@right("dequantize_blockwise")
def one_part_after_another(codes, absmax, levels, block, shape):
    parts = [levels[part.int()] * absmax[number] for number, part in enumerate(codes.split(block))]
    return torch.cat(parts).reshape(shape)


@right("dequantize_blockwise")
def by_block_number(codes, absmax, levels, block, shape):
    number = torch.arange(codes.numel()) // block
    return (absmax[number] * levels.index_select(0, codes.int())).reshape(*shape)


@right("dequantize_blockwise")
def by_padding(codes, absmax, levels, block, shape):
    values = F.pad(levels[codes.long()], (0, -len(codes) % block)).view(-1, block)
    return values.mul_(absmax.unsqueeze(1)).flatten()[: len(codes)].view(torch.Size(shape))


@right("dequantize_blockwise")
def by_the_blocks_of_the_lesson(codes, absmax, levels, block, shape):
    values = in_blocks(F.embedding(codes.int(), levels[:, None]), block)
    return (values * absmax[:, None]).flatten()[: len(codes)].view(shape)


@right("dequantize_blockwise")
def by_table_of_products(codes, absmax, levels, block, shape):
    # Every level times every absmax, and each number picks its own.
    table = torch.outer(absmax, levels)
    return table[torch.arange(len(codes)) // block, codes.long()].unflatten(0, shape)


# ------------------------------------------------------------------ merge_into_4bit


def gap(again, weight):
    return ((again - weight).norm() / weight.norm()).item()


def requantized(weight):
    return dequantize_nf4(*quantize_nf4(weight), weight.shape)


def merged(packed, absmax, A, B, alpha, shape):
    return dequantize_nf4(packed, absmax, shape) + alpha / len(A) * (B @ A)


def by_hand(packed, absmax, shape, unpacked):
    return (NF4[unpacked.long()].view(-1, 64) * absmax[:, None]).view(shape)


def nibbles_swapped(packed):
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()


def nibbles(packed):
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@wrong("merge_into_4bit", "the nibbles are swapped: the first number is in the high one")
def untouched_stub(packed, absmax, A, B, alpha, shape):
    base = by_hand(packed, absmax, shape, nibbles_swapped(packed))
    weight = base + B @ A
    packed, absmax = quantize_nf4(weight)
    weight = dequantize_nf4(packed, absmax, shape)
    error = (weight - dequantize_nf4(packed, absmax, shape)).norm() / base.norm()
    return weight, error.item()


@wrong("merge_into_4bit", "the scaling alpha / r is left out")
def nibbles_mended(packed, absmax, A, B, alpha, shape):
    base = by_hand(packed, absmax, shape, nibbles(packed))
    weight = base + B @ A
    packed, absmax = quantize_nf4(weight)
    weight = dequantize_nf4(packed, absmax, shape)
    error = (weight - dequantize_nf4(packed, absmax, shape)).norm() / base.norm()
    return weight, error.item()


@wrong("merge_into_4bit", "the weight is re-quantised before its error is measured")
def scaling_mended_too(packed, absmax, A, B, alpha, shape):
    base = by_hand(packed, absmax, shape, nibbles(packed))
    weight = base + alpha / A.shape[0] * B @ A
    packed, absmax = quantize_nf4(weight)
    weight = dequantize_nf4(packed, absmax, shape)
    error = (weight - dequantize_nf4(packed, absmax, shape)).norm() / base.norm()
    return weight, error.item()


@wrong("merge_into_4bit", "the error is relative to the norm of the base")
def denominator_left(packed, absmax, A, B, alpha, shape):
    base = dequantize_nf4(packed, absmax, shape)
    weight = base + alpha / A.shape[0] * B @ A
    return weight, ((requantized(weight) - weight).norm() / base.norm()).item()


@wrong("merge_into_4bit", "the nibbles are swapped: the first number is in the high one")
def only_nibbles_left(packed, absmax, A, B, alpha, shape):
    weight = by_hand(packed, absmax, shape, nibbles_swapped(packed))
    weight = weight + alpha / A.shape[0] * B @ A
    return weight, gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the scaling alpha / r is left out")
def only_scaling_left(packed, absmax, A, B, alpha, shape):
    weight = dequantize_nf4(packed, absmax, shape) + B @ A
    return weight, gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the codes are unpacked in two halves")
def unpacked_in_halves(packed, absmax, A, B, alpha, shape):
    weight = by_hand(packed, absmax, shape, torch.cat([packed >> 4, packed & 15]))
    weight = weight + alpha / A.shape[0] * B @ A
    return weight, gap(requantized(weight), weight)


@wrong("merge_into_4bit", "alpha is not divided by r")
def alpha_alone(packed, absmax, A, B, alpha, shape):
    weight = dequantize_nf4(packed, absmax, shape) + alpha * (B @ A)
    return weight, gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the scaling is upside down")
def rank_over_alpha(packed, absmax, A, B, alpha, shape):
    weight = dequantize_nf4(packed, absmax, shape) + len(A) / alpha * (B @ A)
    return weight, gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the update is left out: this is the base")
def base_returned(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return dequantize_nf4(packed, absmax, shape), gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the re-quantised weight is returned: return the merged one")
def requantised_returned(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return requantized(weight), gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the error is always 0")
def compared_with_itself(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    again = requantized(weight)
    return weight, gap(requantized(again), again)


@wrong("merge_into_4bit", "the error is measured from the base: it is that of the merged weight")
def from_the_base(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    base = dequantize_nf4(packed, absmax, shape)
    return weight, ((requantized(weight) - base).norm() / weight.norm()).item()


@wrong("merge_into_4bit", "the error is measured from the base, and is relative to it")
def base_for_both(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, gap(requantized(weight), dequantize_nf4(packed, absmax, shape))


@wrong("merge_into_4bit", "this is the size of the update")
def size_of_update(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, gap(dequantize_nf4(packed, absmax, shape), weight)


@wrong("merge_into_4bit", "the error is absolute: divide by the norm of the merged weight")
def absolute_error(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, (requantized(weight) - weight).norm().item()


@wrong("merge_into_4bit", "the error is squared")
def squared_error(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, ((requantized(weight) - weight).pow(2).sum() / weight.pow(2).sum()).item()


@wrong("merge_into_4bit", "the error is the largest one, not the norm")
def largest_error(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, (requantized(weight) - weight).abs().max().item()


@wrong("merge_into_4bit", "error is a tensor, expected the float")
def error_as_a_tensor(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight, (requantized(weight) - weight).norm() / weight.norm()


@wrong("merge_into_4bit", "weight has dtype bfloat16, expected float32")
def in_half_precision(packed, absmax, A, B, alpha, shape):
    weight = merged(packed, absmax, A, B, alpha, shape)
    return weight.bfloat16(), gap(requantized(weight), weight)


@wrong("merge_into_4bit", "the argument B was changed")
def scaled_in_place(packed, absmax, A, B, alpha, shape):
    B *= alpha / len(A)
    weight = dequantize_nf4(packed, absmax, shape) + B @ A
    return weight, gap(requantized(weight), weight)


@right("merge_into_4bit")
def mended_by_hand(packed, absmax, A, B, alpha, shape):
    base = by_hand(packed, absmax, shape, nibbles(packed))
    weight = base + B @ A * (alpha / A.shape[0])
    again = requantized(weight)
    return weight, float((weight - again).norm() / weight.norm())


@right("merge_into_4bit")
def in_place_on_a_new_tensor(packed, absmax, A, B, alpha, shape):
    weight = dequantize_nf4(packed, absmax, shape)
    weight.addmm_(B, A, alpha=alpha / B.shape[1])
    codes, scales = quantize_nf4(weight)
    lost = dequantize_nf4(codes, scales, shape).sub_(weight)
    return weight, lost.pow(2).sum().div(weight.pow(2).sum()).sqrt().item()


@right("merge_into_4bit")
def in_double_and_by_einsum(packed, absmax, A, B, alpha, shape):
    base = dequantize_nf4(packed, absmax, shape).double()
    update = torch.einsum("or,ri->oi", B.double(), A.double()) * alpha / len(A)
    weight = (base + update).float()
    return weight, torch.dist(requantized(weight), weight).item() / weight.norm().item()
