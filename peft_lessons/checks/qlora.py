"""Checks of lesson 03."""

import math

import torch

from .kit import Case, check_for
from .scaling import wrong_scalings

# ------------------------------------------------------------------ bits_per_parameter


def _stored(extra):
    """A wrong bits_per_parameter from what it adds to `bits`."""

    def count(bits, block, absmax_bits=32, double_block=None, double_bits=8):
        return float(bits + extra(block, absmax_bits, double_block, double_bits))

    return count


def _either(plain, double):
    """One sum without double quantisation, another one with it."""
    return _stored(
        lambda block, a, outer, d: plain(block, a) if outer is None else double(block, a, outer, d)
    )


def _per_block(block, absmax_bits):
    return absmax_bits / block


def _in_bytes(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    function = bits_per_parameter.reference
    return function(bits, block, absmax_bits, double_block, double_bits) / 8


def _of_a_block(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    function = bits_per_parameter.reference
    return function(bits, block, absmax_bits, double_block, double_bits) * block


def _whole(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    if double_block is None:
        return float(bits + absmax_bits // block)
    return float(bits + double_bits // block + absmax_bits // (block * double_block))


@check_for(
    cases=[
        (4, 64),
        (4, 64, 32, 256),
        (8, 12, 32),
        (2, 16, 16),
        (3, 32, 32, 128, 4),
        (4, 128, 16, 64, 6),
    ],
    returns="the number of bits",
    causes={
        "the absmax is left out: every block stores one": _stored(lambda b, a, o, d: 0),
        "a block shares its absmax: divide absmax_bits by block": _either(
            lambda b, a: a, lambda b, a, o, d: d + a / o
        ),
        "the division is upside down: it is absmax_bits / block": _either(
            lambda b, a: b / a, lambda b, a, o, d: b / d + b * o / a
        ),
        "the result is in bytes, and bits are asked for": _in_bytes,
        "these are the bits of a whole block: divide by its numbers": _of_a_block,
        "// drops the fraction of a bit": _whole,
        "double quantisation is left out: look at double_block": _stored(lambda b, a, o, d: a / b),
        (
            "a second absmax is shared by block · double_block parameters, not by double_block"
        ): _either(_per_block, lambda b, a, o, d: d / b + a / o),
        "the second absmax is left out: there is one for each double_block of the first": _either(
            _per_block, lambda b, a, o, d: d / b
        ),
        "the double_bits of each quantised absmax are left out": _either(
            _per_block, lambda b, a, o, d: a / (b * o)
        ),
        (
            "the first absmax is still counted in absmax_bits: its code of double_bits replaces it"
        ): _either(_per_block, lambda b, a, o, d: a / b + d / b + a / (b * o)),
        "both absmax are counted in absmax_bits: the first has double_bits": _either(
            _per_block, lambda b, a, o, d: a / b + a / (b * o)
        ),
        "both absmax are counted in double_bits: the second has absmax_bits": _either(
            _per_block, lambda b, a, o, d: d / b + d / (b * o)
        ),
        "absmax_bits and double_bits have changed places": _either(
            _per_block, lambda b, a, o, d: a / b + d / (b * o)
        ),
        "double_block takes the place of block: both count": _either(
            _per_block, lambda b, a, o, d: d / o + a / (b * o)
        ),
        "the defaults are counted: use the arguments absmax_bits and double_bits": _either(
            lambda b, a: 32 / b, lambda b, a, o, d: 8 / b + 32 / (b * o)
        ),
    },
)
def bits_per_parameter(bits, block, absmax_bits=32, double_block=None, double_bits=8):
    """The bits of codes and absmax, with and without double quantisation."""
    # The bits of a tensor that is whole in every block, by what it stores.
    n = block * (double_block or 1)
    absmax = n // block
    stored = n * bits
    if double_block is None:
        stored += absmax * absmax_bits
    else:
        stored += absmax * double_bits + (absmax // double_block) * absmax_bits
    return stored / n


# ------------------------------------------------------------------ unpack_nibbles


def _nibbles(packed):
    return packed >> 4, packed & 15


def _interleaved(first, second):
    return torch.stack([first, second], dim=1).flatten()


@check_for(
    cases=[
        Case(
            lambda: [torch.tensor([0x27, 0xE1, 0x90], dtype=torch.uint8)],
            note="the bytes 0x27, 0xE1, 0x90",
        ),
        Case(lambda: [torch.tensor([0xF8], dtype=torch.uint8)], note="one byte, 0xF8"),
        Case(lambda: [torch.arange(256, dtype=torch.uint8)], note="every byte there is"),
        Case(lambda: [torch.randint(256, (1000,), dtype=torch.uint8)]),
    ],
    returns="codes",
    causes={
        "the nibbles are swapped: the high one comes first": lambda packed: _interleaved(
            packed & 15, packed >> 4
        ),
        "all high nibbles come first, then all low ones: they must alternate": lambda packed: (
            torch.cat(_nibbles(packed))
        ),
        "all low nibbles come first, then all high ones: they must alternate": lambda packed: (
            torch.cat(_nibbles(packed)[::-1])
        ),
        "the high nibble is masked, but not shifted down by 4 bits": lambda packed: _interleaved(
            packed & 0xF0, packed & 15
        ),
        "the low nibble is not masked: the high one is still in it": lambda packed: _interleaved(
            packed >> 4, packed
        ),
        "a nibble has 16 values: divide by 16, not by 15": lambda packed: _interleaved(
            packed // 15, packed % 15
        ),
        "a signed byte keeps its sign when it is shifted: shift the uint8": lambda packed: (
            _interleaved((packed.view(torch.int8) >> 4).byte(), packed & 15)
        ),
        "these are the high nibbles alone": lambda packed: packed >> 4,
        "these are the low nibbles alone": lambda packed: packed & 15,
        "the two nibbles of a byte are two columns: flatten them": lambda packed: torch.stack(
            _nibbles(packed), dim=1
        ),
        "high and low nibbles are two rows: they must alternate in one": lambda packed: torch.stack(
            _nibbles(packed)
        ),
    },
)
def unpack_nibbles(packed):
    """Two codes from every byte, the high nibble first."""
    digits = "".join(f"{byte:02x}" for byte in packed.tolist())
    return torch.tensor([int(digit, 16) for digit in digits], dtype=torch.uint8)


# ------------------------------------------------------------------ normal_float_levels


def _offset(bits):
    return 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4


def _half(count, top):
    """Quantiles of probabilities in equal steps from `top` down to 0.5, without that of 0.5."""
    steps = torch.arange(count, 0, -1, dtype=torch.float64)
    return torch.special.ndtri(0.5 + (top - 0.5) * steps / count)


def _joined(positive, negative, zeros=1):
    levels = torch.cat([-negative, torch.zeros(zeros), positive]).sort().values
    return (levels / levels.max()).float()


def _by_halves(count=lambda half: (half, half - 1), offset=_offset, zeros=1):
    """normal_float_levels by how many levels are above and below zero."""

    def build(bits):
        above, below = count(2 ** (bits - 1))
        return _joined(_half(above, offset(bits)), _half(below, offset(bits)), zeros)

    return build


def _by_one_sweep(probabilities):
    def build(bits):
        levels = torch.special.ndtri(probabilities(bits, 2**bits).double())
        return (levels / levels.max()).float()

    return build


def _ordered(order):
    """The right levels in a wrong order, as (negative, zero, positive) were built."""

    def build(bits):
        top, half = _offset(bits), 2 ** (bits - 1)
        above, below = _half(half, top), -_half(half - 1, top)
        return (order(below, torch.zeros(1), above) / above.max()).float()

    return build


_levels = _by_halves()


@check_for(
    cases=[(4,), (3,), (2,), (5,), (8,)],
    returns="the levels",
    # A quantile near 1 magnifies the rounding of its probability in single precision.
    tolerance=1e-4,
    causes={
        (
            "the exact zero is missing: of 2^k levels one is 0, so one half has one level less"
        ): _by_halves(lambda half: (half, half), zeros=0),
        "both halves have 2^(k−1) levels, which with the zero is one too many": _by_halves(
            lambda half: (half, half)
        ),
        (
            "the zero is there twice: both halves end at the probability 0.5; leave that out"
        ): _by_halves(lambda half: (half - 1, half - 1), zeros=2),
        "linspace counts both its ends: ask for one more than you keep": _by_halves(
            lambda half: (half - 1, half - 2)
        ),
        "the two halves have changed places: the positive one has one level more": _by_halves(
            lambda half: (half - 1, half)
        ),
        "the offset is that of 4 bits: it depends on k": _by_halves(offset=lambda bits: 0.9677083),
        "the offset is the mean of two: 1 − 1/(2·2^k) is only one of them": _by_halves(
            offset=lambda bits: 1 - 1 / (2 * 2**bits)
        ),
        "the offset is the mean of two: 1 − 1/(2·(2^k − 1)) is only one of them": _by_halves(
            offset=lambda bits: 1 - 1 / (2 * (2**bits - 1))
        ),
        "a factor 2 is lost in the offset: 1/2^k instead of 1/(2·2^k)": _by_halves(
            offset=lambda bits: 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 2
        ),
        (
            "one sweep from 1 − offset to the offset has no exact zero: build two halves"
        ): _by_one_sweep(lambda k, n: torch.linspace(1 - _offset(k), _offset(k), n)),
        (
            "the centres of 2^k equally likely bins have no exact zero: build two halves"
        ): _by_one_sweep(lambda k, n: (torch.arange(n) + 0.5) / n),
        "the quantiles i/(2^k + 1) have no exact zero: build two halves": _by_one_sweep(
            lambda k, n: torch.arange(1, n + 1) / (n + 1)
        ),
        "the quantiles of 0 and 1 are infinite: that is what the offset is for": _by_one_sweep(
            lambda k, n: torch.linspace(0, 1, n)
        ),
        "the levels are not divided by the largest: they must end at −1 and 1": lambda bits: (
            _levels(bits) * torch.special.ndtri(torch.tensor(_offset(bits)))
        ),
        "the levels are not sorted: the positive half runs down": _ordered(
            lambda below, zero, above: torch.cat([below, zero, above])
        ),
        "the levels are not sorted: the positive half comes first": _ordered(
            lambda below, zero, above: torch.cat([above, zero, below])
        ),
        "the levels are sorted from 1 down to −1": lambda bits: _levels(bits).flip(0),
        "the levels are evenly spaced, and not quantiles of the normal distribution": lambda bits: (
            torch.linspace(-1, 1, 2**bits)
        ),
        "this is the table of 4 bits, whatever bits is": lambda bits: _levels(4),
    },
)
def normal_float_levels(bits):
    """NF4, and its like for 2, 3, 5 and 8 bits."""
    half, top = 2 ** (bits - 1), _offset(bits)
    # One number after another, by its place among the halves.
    probabilities = [
        0.5 - (top - 0.5) * (half - 1 - code) / (half - 1)
        if code < half
        else 0.5 + (top - 0.5) * (code - half + 1) / half
        for code in range(2 * half)
    ]
    probabilities[half - 1] = 0.5
    z = torch.special.ndtri(torch.tensor(probabilities, dtype=torch.float64))
    return (z / z[-1]).float()


# ------------------------------------------------------------------ quantize_blockwise


_NF4 = _levels(4)
_UNEVEN = torch.tensor([-0.9, -0.35, 0.1, 0.22, 0.8])
_INT8 = torch.arange(-127, 128) / 127
_TERNARY = torch.tensor([-1.0, 0.0, 1.0])
_SIGN = torch.tensor([-1.0, 1.0])
# As many as a byte can name, closer together around zero.
_CUBIC = (torch.arange(-127, 129) / 128) ** 3


def _weights(shape, levels, block, zeros=()):
    """Numbers far from where two levels are equally near: their codes survive any rounding."""
    n = math.prod(shape)
    edges = torch.cat([-torch.ones(1), (levels[1:] + levels[:-1]) / 2, torch.ones(1)])
    cell = torch.randint(len(levels), (n,))
    x = edges[cell] + (0.15 + 0.7 * torch.rand(n)) * (edges[cell + 1] - edges[cell])
    for number, part in enumerate(x.split(block)):
        # The largest number of every second block is negative, and sizes differ by block.
        part[torch.randint(len(part), ())] = 1 if number % 2 else -1
        part *= 0 if number in zeros else 10 ** (3 * torch.rand(()) - 2)
    return x.reshape(shape)


def _case(shape, levels, block, zeros=(), note=""):
    return Case(lambda: [_weights(shape, levels, block, zeros), levels.clone(), block], note=note)


def _quantized(x, levels, block):
    """One block after another, each number compared with every level."""
    codes, absmax = [], []
    for part in x.flatten().double().split(block):
        absmax.append(part.abs().max())
        scaled = part / absmax[-1] if absmax[-1] > 0 else part
        codes.append((scaled[:, None] - levels.double()).abs().argmin(dim=1))
    return torch.cat(codes).to(torch.uint8), torch.stack(absmax).float()


def _dequantized(codes, absmax, levels, block, shape):
    parts = zip(codes.long().split(block), absmax, strict=True)
    return torch.cat([largest * levels[part] for part, largest in parts]).reshape(shape)


def _padded(x, block):
    flat = x.flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % block)]).reshape(-1, block)


def _nearest(scaled, levels):
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)


def _largest(blocks):
    return blocks.abs().amax(dim=1)


def _divided(blocks, absmax):
    return blocks / absmax.where(absmax > 0, 1)[:, None]


def _quantizing(absmax=_largest, scaled=_divided, code=_nearest):
    """A wrong quantize_blockwise by one of its steps."""

    def quantize(x, levels, block):
        blocks = _padded(x, block)
        largest = absmax(blocks)
        codes = code(scaled(blocks, largest), levels).flatten()[: x.numel()]
        return codes.to(torch.uint8), largest

    return quantize


def _without_the_rest(x, levels, block):
    whole = x.flatten()[: x.numel() // block * block]
    return _quantized(whole, levels, block)


def _with_padding(x, levels, block):
    return _quantized(_padded(x, block), levels, block)


def _by_row(x, levels, block):
    return _quantized(x, levels, x.shape[-1])


def _blocks_of_a_row(x, levels, block):
    rows = [_quantized(row, levels, block) for row in x.reshape(-1, x.shape[-1])]
    return tuple(map(torch.cat, zip(*rows, strict=True)))


def _across_blocks(x, levels, block):
    blocks = _padded(x, block)
    absmax = blocks.abs().amax(dim=0)
    codes = _nearest(blocks / absmax, levels).flatten()[: x.numel()]
    return codes.to(torch.uint8), absmax


def _one_absmax(x, levels, block):
    codes, absmax = _quantized(x, levels, x.numel())
    return codes, absmax[0]


def _packed_codes(x, levels, block):
    codes, absmax = _quantized(x, levels, block)
    return codes[0::2] << 4 | codes[1::2], absmax


def _argmin(distance):
    return lambda scaled, levels: distance(scaled[..., None] - levels).argmin(dim=-1)


@check_for(
    cases=[
        _case((6, 40), _NF4, 48),
        _case((7, 11), _UNEVEN, 16, note="uneven levels, and a last block of 13"),
        _case((4, 24), _NF4, 16, zeros=(2,), note="the third block is all zeros"),
        _case((300,), _INT8, 128, note="evenly spaced levels, and a last block of 44"),
        _case((3, 5), _TERNARY, 64, note="less than one block"),
        _case((2, 3, 17), _CUBIC, 10, zeros=(4, 10), note="two blocks are all zeros"),
        _case((9, 3), _UNEVEN, 9, zeros=(1,), note="zeros where no level is 0"),
        _case((5, 8), _SIGN, 8, note="two levels"),
    ],
    returns=("codes", "absmax"),
    causes={
        "one absmax serves the whole tensor: each block has its own": _quantizing(
            absmax=lambda blocks: blocks.abs().max().expand(len(blocks))
        ),
        "there is one absmax for the whole tensor: each block has its own": _one_absmax,
        "the absmax is the largest number, not the largest absolute value": _quantizing(
            absmax=lambda blocks: blocks.amax(dim=1)
        ),
        "the blocks are scaled by their mean absolute value, not the largest": _quantizing(
            absmax=lambda blocks: blocks.abs().mean(dim=1)
        ),
        "each row is a block: blocks are `block` numbers of the flattened tensor": _by_row,
        (
            "the blocks start anew in each row: they run on over the flattened tensor"
        ): _blocks_of_a_row,
        "the maximum is taken across the blocks, not within each": _across_blocks,
        "the numbers are multiplied by their absmax: divide": _quantizing(
            scaled=lambda blocks, absmax: blocks * absmax[:, None]
        ),
        "the numbers are not divided by the absmax of their block": _quantizing(
            scaled=lambda blocks, absmax: blocks
        ),
        "the levels themselves are the boundaries, which rounds up: use the midpoints": _quantizing(
            code=lambda scaled, levels: torch.bucketize(scaled, levels)
        ),
        "the numbers are rounded down to a level, and not to the nearest": _quantizing(
            code=lambda scaled, levels: (
                torch.bucketize(scaled, levels, right=True).sub(1).clamp(min=0)
            )
        ),
        "the boundaries are the levels without the first: use the midpoints": _quantizing(
            code=lambda scaled, levels: torch.bucketize(scaled, levels[1:])
        ),
        "the boundaries are half the distances of neighbours: take half their sums": _quantizing(
            code=lambda scaled, levels: torch.bucketize(scaled, levels.diff().sort()[0] / 2)
        ),
        "this rounding is right only for evenly spaced levels: search the nearest": _quantizing(
            code=lambda scaled, levels: (
                (scaled + 1).mul((len(levels) - 1) / 2).round().clamp(0, 255)
            )
        ),
        "the distance to a level is taken without its absolute value": _quantizing(
            code=_argmin(lambda distance: distance)
        ),
        "the farthest level is taken, not the nearest": _quantizing(
            code=_argmin(lambda distance: -distance.abs())
        ),
        "the last block is dropped, for it is short": _without_the_rest,
        "the codes of the padding are returned too": _with_padding,
        "a block of zeros is divided by zero, and its NaN gets the last level": _quantizing(
            scaled=lambda blocks, absmax: blocks / absmax[:, None]
        ),
        "a block of zeros is divided by zero, and its NaN gets the first level": _quantizing(
            scaled=lambda blocks, absmax: blocks / absmax[:, None],
            code=_argmin(torch.abs),
        ),
        "the absmax of a block of zeros is 0: replace it for the division only": _quantizing(
            absmax=lambda blocks: _largest(blocks).where(blocks.any(dim=1), 1)
        ),
        "the codes are packed two a byte: here each has its own": _packed_codes,
        "the order is turned: return the codes first": lambda *args: _quantized(*args)[::-1],
    },
)
def quantize_blockwise(x, levels, block):
    """The nearest level for any levels and shape, with a short last block and blocks of zeros."""
    return _quantized(x, levels, block)


# ------------------------------------------------------------------ dequantize_blockwise


def _dequantizing_case(shape, levels, block, zeros=(), note=""):
    def make():
        n = math.prod(shape)
        codes = torch.randint(len(levels), (n,), dtype=torch.uint8)
        absmax = 10 ** (3 * torch.rand(-(-n // block)) - 2)
        absmax[list(zeros)] = 0
        return [codes, absmax, levels.clone(), block, shape]

    return Case(make, note=note)


def _dequantizing(spread=None, value=None, join=torch.mul, shaped=torch.reshape):
    """A wrong dequantize_blockwise by one of its steps."""
    spread = spread or (lambda absmax, block, n: absmax.repeat_interleave(block))
    value = value or (lambda levels, codes: levels[codes.long()])

    def dequantize(codes, absmax, levels, block, shape):
        n = len(codes)
        return shaped(join(value(levels, codes), spread(absmax, block, n)[:n]), shape)

    return dequantize


@check_for(
    cases=[
        _dequantizing_case((6, 40), _NF4, 48),
        _dequantizing_case((7, 10), _UNEVEN, 32, note="uneven levels, and a last block of 6"),
        _dequantizing_case((4, 24), _NF4, 16, zeros=(2,), note="the third block is all zeros"),
        _dequantizing_case((300,), _INT8, 128, note="255 levels, and a last block of 44"),
        _dequantizing_case((3, 5), _TERNARY, 64, note="less than one block"),
        _dequantizing_case((2, 3, 17), _CUBIC, 10, note="256 levels, and a last block of 2"),
    ],
    returns="x",
    causes={
        "the absmax is left out: the levels are relative to it": _dequantizing(
            join=lambda value, absmax: value
        ),
        "the levels are divided by the absmax: multiply": _dequantizing(join=torch.div),
        (
            "repeat gives neighbours different absmax: repeat_interleave gives a block the same"
        ): _dequantizing(spread=lambda absmax, block, n: absmax.repeat(block)),
        "every number gets the first absmax: each block has its own": _dequantizing(
            spread=lambda absmax, block, n: absmax[:1].expand(n)
        ),
        "every number gets the largest absmax: each block has its own": _dequantizing(
            spread=lambda absmax, block, n: absmax.max().expand(n)
        ),
        "the absmax are shared out evenly: only the last block is short": _dequantizing(
            spread=lambda absmax, block, n: absmax.repeat_interleave(-(-n // len(absmax)))
        ),
        (
            "the levels are not looked up: these are right only where they are evenly spaced"
        ): _dequantizing(value=lambda levels, codes: 2 * codes.float() / (len(levels) - 1) - 1),
        "the codes themselves are multiplied: look up levels[code]": _dequantizing(
            value=lambda levels, codes: codes.float()
        ),
        "the result is flat: give it the shape": _dequantizing(shaped=lambda x, shape: x),
        "the shape is filled column by column, and not row by row": _dequantizing(
            shaped=lambda x, shape: x.reshape(shape[::-1]).mT
        ),
    },
)
def dequantize_blockwise(codes, absmax, levels, block, shape):
    """Each code's level times the absmax of its block, in the shape asked for."""
    return _dequantized(codes, absmax, levels, block, shape)


# ------------------------------------------------------------------ merge_into_4bit


def _packed(codes):
    return codes[0::2] * 16 + codes[1::2]


def _merge_case(out, in_, rank, alpha, update=1.0, note="", zeros=()):
    def make():
        # A few large numbers, as weights have them.
        weight = torch.randn(out, in_) * (1 + 4 * (torch.rand(out, in_) < 0.02))
        weight.view(-1, 64)[list(zeros)] = 0
        codes, absmax = _quantized(weight, _NF4, 64)
        A, B = torch.randn(rank, in_), update * torch.randn(out, rank)
        return [_packed(codes), absmax, A, B, alpha, (out, in_)]

    return Case(make, note=note)


def _grid_case(out=24, in_=128, rank=4, alpha=10):
    """A merged weight that lies on the grid of NF4, whatever the scaling: 4 bits lose nothing."""

    def make():
        code = torch.randint(1, 16, (in_,), dtype=torch.uint8)
        code.view(-1, 64)[:, 5] = 15  # the level 1 in every block
        absmax = torch.rand(out).add(0.5).repeat_interleave(in_ // 64)
        # Every row is a positive multiple of one row of levels, the update's rows too.
        A = torch.rand(rank, 1).add(0.2) * _NF4[code.long()]
        B = torch.rand(out, rank).add(0.2)
        return [_packed(code.repeat(out)), absmax, A, B, alpha, (out, in_)]

    return Case(make, note="the merged weight lies on the grid of NF4")


def _low_first(packed):
    return _interleaved(packed & 15, packed >> 4)


def _high_first(packed):
    return _interleaved(packed >> 4, packed & 15)


def _lost(error):
    # What rounding leaves where nothing is lost is nothing: no two ways leave the same.
    return float(error) if error > 1e-4 else 0.0


def _relative(again, merged):
    return _lost((again.double() - merged.double()).norm() / merged.double().norm())


def _merging(
    unpack=_high_first,
    base=_dequantized,
    scale=lambda alpha, r: alpha / r,
    result=lambda base, merged, again: (merged, _relative(again, merged)),
):
    """A wrong merge_into_4bit by one of its steps."""

    def merge(packed, absmax, A, B, alpha, shape):
        before = base(unpack(packed), absmax, _NF4, 64, shape)
        merged = before + scale(alpha, len(A)) * (B @ A)
        again = _dequantized(*_quantized(merged, _NF4, 64), _NF4, 64, shape)
        return result(before, merged, again)

    return merge


def _erring(error):
    return _merging(result=lambda base, merged, again: (merged, _lost(error(base, merged, again))))


@check_for(
    # Each fault of the stub shows in a case of its own: these come in the order of its lines.
    cases=[
        _merge_case(32, 64, 4, 10, update=0, note="B = 0: an adapter that has not trained yet"),
        _grid_case(),
        _merge_case(48, 128, 8, 4, update=0.3),
        _merge_case(64, 64, 2, 3.0, update=0.02, note="a small update"),
        _merge_case(16, 192, 6, 9, zeros=(3, 10), note="two blocks of the base are all zeros"),
    ],
    returns=("weight", "error"),
    tolerance=1e-4,
    causes={
        "the nibbles are swapped: the first number is in the high one": _merging(unpack=_low_first),
        "the codes are unpacked in two halves, and they alternate": _merging(
            unpack=lambda packed: torch.cat(_nibbles(packed))
        ),
        "the absmax of the blocks are mixed up: a block's 64 neighbours share one": _merging(
            base=_dequantizing(spread=lambda absmax, block, n: absmax.repeat(block))
        ),
        **wrong_scalings(lambda scale: _merging(scale=scale)),
        "the update is subtracted, not added": _merging(scale=lambda alpha, r: -alpha / r),
        "the update is left out: this is the base": _merging(
            result=lambda base, merged, again: (base, _relative(again, merged))
        ),
        (
            "the weight is re-quantised before its error is measured, so that nothing seems lost"
        ): _merging(result=lambda base, merged, again: (again, 0.0)),
        (
            "the re-quantised weight is returned: return the merged one, and only measure the "
            "other's error"
        ): _merging(result=lambda base, merged, again: (again, _relative(again, merged))),
        "the re-quantised weight is returned, and compared with the base": _merging(
            result=lambda base, merged, again: (
                again,
                ((again - base).norm() / base.norm()).item(),
            )
        ),
        "the error is always 0: compare the re-quantised weight with the merged one": _erring(
            lambda base, merged, again: 0
        ),
        "the error is relative to the norm of the base: W is the merged weight": _erring(
            lambda base, merged, again: (again - merged).norm() / base.norm()
        ),
        (
            "the error is relative to the norm of the re-quantised weight: W is the merged one"
        ): _erring(lambda base, merged, again: (again - merged).norm() / again.norm()),
        "the error is measured from the base: it is that of the merged weight": _erring(
            lambda base, merged, again: (again - base).norm() / merged.norm()
        ),
        (
            "the error is measured from the base, and is relative to it: W is the merged weight"
        ): _erring(lambda base, merged, again: (again - base).norm() / base.norm()),
        "this is the size of the update, not the error of re-quantising": _erring(
            lambda base, merged, again: (merged - base).norm() / merged.norm()
        ),
        "the error is absolute: divide by the norm of the merged weight": _erring(
            lambda base, merged, again: (again - merged).norm()
        ),
        "the error is squared: a norm has a root": _erring(
            lambda base, merged, again: _relative(again, merged) ** 2
        ),
        "the error is the largest one, not the norm": _erring(
            lambda base, merged, again: (again - merged).abs().max()
        ),
        "the error is a mean, not the norm": _erring(
            lambda base, merged, again: (again - merged).abs().mean()
        ),
        "the error is in per cent": _erring(
            lambda base, merged, again: 100 * _relative(again, merged)
        ),
        "the order is turned: return the weight first": _merging(
            result=lambda base, merged, again: (_relative(again, merged), merged)
        ),
    },
)
def merge_into_4bit(packed, absmax, A, B, alpha, shape):
    """The merged weight unharmed, and what 4 bits would have cost it."""
    codes = unpack_nibbles.reference(packed)
    weight = _dequantized(codes, absmax, _NF4, 64, shape).double()
    for row, column in zip(A.double(), B.double().T, strict=True):
        weight = weight + alpha / len(A) * torch.outer(column, row)
    again = _dequantized(*_quantized(weight, _NF4, 64), _NF4, 64, shape)
    return weight.float(), _relative(again, weight)
