"""Checks of lesson 03."""

import math

import torch

from ..methods.qlora import NF4, dequantize_nf4, quantize_nf4
from ..testing.wording import kind
from .calls import outcome
from .compare import tensors
from .diagnosis import diagnosis
from .kit import Case, Refused, check_for
from .mistakes import mistakes, scaling_mistakes

# ------------------------------------------------------------------ unpack_nibbles


@check_for(
    cases=[
        Case(lambda: [torch.tensor([0x27, 0xE1]).byte()], note="the bytes 0x27, 0xE1"),
        Case(lambda: [torch.tensor([0xF8]).byte()], note="one byte, 0xF8"),
        Case(lambda: [torch.arange(256, dtype=torch.uint8)], note="every byte there is"),
    ],
    returns="codes",
    causes=mistakes(
        """
        def unpack_nibbles(packed):
            high = packed >> 4
            low = packed & 15
            codes = torch.stack([high, low], dim=-1)
            return codes.reshape(-1)
        """,
        """
        the nibbles are swapped: the high one comes first
            [high, low] → [low, high]
        all high nibbles come first, then all low ones: they must alternate
            dim=-1 → dim=0
        the high nibble is masked, but not shifted down by 4 bits
            packed >> 4 → packed & 0xF0
        the low nibble is not masked: the high one is still in it
            packed & 15 → packed
        the two nibbles of a byte are two columns: flatten them
            .reshape(-1) → ∅
        high and low nibbles form two rows: they must alternate in one sequence
            dim=-1 → dim=0
            .reshape(-1) → ∅
        """,
    ),
)
def unpack_nibbles(packed):
    """Two codes from every byte, the high nibble first."""
    digits = "".join(f"{byte:02x}" for byte in packed.tolist())
    return torch.tensor([int(digit, 16) for digit in digits], dtype=torch.uint8)


# ------------------------------------------------------------------ normal_float_levels


@check_for(
    cases=[(4,), (3,), (2,), (5,), (8,)],
    returns="the levels",
    # A quantile near 1 magnifies the rounding of its probability in single precision.
    tolerance=1e-4,
    causes=mistakes(
        """
        def normal_float_levels(bits):
            n = 2**bits
            half = n // 2
            top = 1 - (1 / n + 1 / (n - 1)) / 4
            below = torch.linspace(1 - top, 0.5, half, dtype=torch.float64)[:-1]
            above = torch.linspace(0.5, top, half + 1, dtype=torch.float64)[1:]
            p = torch.cat([below, torch.tensor([0.5]), above])
            levels = torch.special.ndtri(p)
            return (levels / levels.max()).float()
        """,
        """
        the exact zero is missing: one of the 2^k levels is 0, so one half has one level less
            0.5, half, → 0.5, half + 1,
            torch.tensor([0.5]), → ∅
        both halves have 2^(k−1) levels, which with the zero is one too many
            0.5, half, → 0.5, half + 1,
        the zero appears twice, because both halves end at the probability 0.5: keep it once
            [:-1] → ∅
            half + 1, → half,
            [1:] → ∅
            torch.tensor([0.5]), → ∅
        the two halves are swapped: the positive half has one level more
            half + 1, → half,
            0.5, half, → 0.5, half + 1,
        the outermost probability is the one for 4 bits: it depends on k
            1 - (1 / n + 1 / (n - 1)) / 4 → 0.9677083
        the outermost probability is the mean of two: 1 − 1/(2·(2^k − 1)) is only one of them
            1 - (1 / n + 1 / (n - 1)) / 4 → 1 - 1 / (2 * (n - 1))
        one sweep between the two outermost probabilities has no exact zero: build two halves
            torch.cat([below, torch.tensor([0.5]), above]) → torch.linspace(1 - top, top, n)
        the centres of 2^k equally likely bins have no exact zero: build two halves
            torch.cat([below, torch.tensor([0.5]), above]) → (torch.arange(n) + 0.5) / n
        the quantiles of 0 and 1 are infinite: begin at the outermost probability
            torch.cat([below, torch.tensor([0.5]), above]) → torch.linspace(0, 1, n)
        the levels are not divided by the largest: they must end at −1 and 1
            (levels / levels.max()) → levels
        """,
    ),
)
def normal_float_levels(bits):
    """The levels are right for NF4, and for 2, 3, 5 and 8 bits."""
    half, top = 2 ** (bits - 1), 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4
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


_NF4 = normal_float_levels.reference(4)
_UNEVEN = torch.tensor([-0.9, -0.35, 0.1, 0.22, 0.8])
_INT8 = torch.arange(-127, 128) / 127
_TERNARY = torch.tensor([-1.0, 0.0, 1.0])
# As many as a byte can name, closer together around zero.
_CUBIC = (torch.arange(-127, 129) / 128) ** 3


def _weights(shape, levels, block):
    """Return numbers far from the midpoints of levels: their codes survive any rounding."""
    n = math.prod(shape)
    edges = torch.cat([-torch.ones(1), (levels[1:] + levels[:-1]) / 2, torch.ones(1)])
    cell = torch.randint(len(levels), (n,))
    x = edges[cell] + (0.15 + 0.7 * torch.rand(n)) * (edges[cell + 1] - edges[cell])
    for number, part in enumerate(x.split(block)):
        # The largest number of every second block is negative, and sizes differ by block.
        part[torch.randint(len(part), ())] = 1 if number % 2 else -1
        part *= 10 ** (3 * torch.rand(()) - 2)
    return x.reshape(shape)


def _case(shape, levels, block, note=""):
    return Case(lambda: [_weights(shape, levels, block), levels.clone(), block], note=note)


@check_for(
    cases=[
        _case((6, 40), _NF4, 48),
        _case((7, 11), _UNEVEN, 16, note="uneven levels, and a last block of 13"),
        _case((300,), _INT8, 128, note="evenly spaced levels, and a last block of 44"),
        _case((3, 5), _TERNARY, 64, note="less than one block"),
        _case((2, 3, 17), _CUBIC, 10, note="256 levels, and a last block of 2"),
    ],
    returns=("codes", "absmax"),
    causes=mistakes(
        """
        def quantize_blockwise(x, levels, block):
            n = x.numel()
            padded = torch.cat([x.flatten(), torch.zeros(-n % block)])
            blocks = padded.reshape(-1, block)
            absmax = blocks.abs().amax(dim=1)
            scaled = blocks / absmax[:, None]
            edges = (levels[1:] + levels[:-1]) / 2
            codes = torch.bucketize(scaled, edges)
            return codes.flatten()[:n].byte(), absmax
        """,
        """
        there is one absmax for the whole tensor: each block has its own
            .amax(dim=1) → .max()
            [:, None] → ∅
        the absmax keeps the sign of the number: it is an absolute value
            blocks.abs().amax(dim=1) →
                blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))[:, 0]
        the absmax is the largest number, not the largest absolute value
            blocks.abs() → blocks
        each row is a block: blocks are `block` numbers of the flattened tensor
            torch.cat([x.flatten(), torch.zeros(-n % block)]) → x
            reshape(-1, block) → reshape(-1, x.shape[-1])
        each row starts a new block: blocks continue across the rows of the flattened tensor
            torch.cat([x.flatten(), torch.zeros(-n % block)]) → F.pad(x, (0, -x.shape[-1] % block))
            codes.flatten()[:n] → codes.reshape(padded.shape)[..., : x.shape[-1]].flatten()
        the numbers are not divided by the absmax of their block
            / absmax[:, None] → ∅
        the levels themselves are used as boundaries, which rounds up: use the midpoints
            (scaled, edges) → (scaled, levels)
        the numbers are rounded down to a level: round to the nearest
            torch.bucketize(scaled, edges) →
                (torch.bucketize(scaled, levels, right=True) - 1).clamp(min=0)
        this rounding is right only for evenly spaced levels: find the nearest level
            torch.bucketize(scaled, edges) →
                ((scaled + 1) / 2 * (len(levels) - 1)).round().clamp(0, 255)
        the last block is dropped because it is short: keep it
            torch.cat([x.flatten(), torch.zeros(-n % block)]) → x.flatten()[: n // block * block]
        the codes of the padding are returned too
            [:n] → ∅
        the order is reversed: return the codes first
            codes.flatten()[:n].byte(), absmax → absmax, codes.flatten()[:n].byte()
        """,
    ),
)
def quantize_blockwise(x, levels, block):
    """Every number gets its nearest level, for any levels and shape, in a short last block too."""
    # One block after another, each number compared with every level.
    codes, absmax = [], []
    for part in x.flatten().double().split(block):
        absmax.append(part.abs().max())
        codes.append((part[:, None] / absmax[-1] - levels.double()).abs().argmin(dim=1))
    return torch.cat(codes).to(torch.uint8), torch.stack(absmax).float()


# ------------------------------------------------------------------ dequantize_blockwise


def _dequantizing_case(shape, levels, block, note=""):
    def make():
        n = math.prod(shape)
        codes = torch.randint(len(levels), (n,), dtype=torch.uint8)
        absmax = 10 ** (3 * torch.rand(-(-n // block)) - 2)
        return [codes, absmax, levels.clone(), block, shape]

    return Case(make, note=note)


@check_for(
    cases=[
        _dequantizing_case((6, 40), _NF4, 48),
        _dequantizing_case((7, 10), _UNEVEN, 32, note="uneven levels, and a last block of 6"),
        _dequantizing_case((300,), _INT8, 128, note="255 levels, and a last block of 44"),
        _dequantizing_case((2, 3, 17), _CUBIC, 10, note="256 levels, and a last block of 2"),
    ],
    returns="x",
    causes=mistakes(
        """
        def dequantize_blockwise(codes, absmax, levels, block, shape):
            which = torch.arange(len(codes)) // block
            return (levels[codes.int()] * absmax[which]).reshape(shape)
        """,
        """
        the absmax is left out: the levels are relative to it
            * absmax[which] → ∅
        repeat gives neighbouring numbers different absmax values: repeat_interleave gives one
        absmax to each block
            absmax[which] → absmax.repeat(block)[: len(codes)]
        every number gets the largest absmax: each block has its own
            absmax[which] → absmax.max()
        the levels are not looked up: this is right only for evenly spaced levels
            levels[codes.int()] → (codes / (len(levels) - 1) * 2 - 1)
        the codes themselves are multiplied: look up levels[code]
            levels[codes.int()] → codes
        the result is flat: reshape it to `shape`
            .reshape(shape) → ∅
        """,
    ),
)
def dequantize_blockwise(codes, absmax, levels, block, shape):
    """Each number is its level times the absmax of its block, in the given shape."""
    parts = zip(codes.long().split(block), absmax, strict=True)
    return torch.cat([largest * levels[part] for part, largest in parts]).reshape(shape)


# ------------------------------------------------------------------ merge_into_4bit


def _packed(codes):
    return codes[0::2] * 16 + codes[1::2]


def _twins(out, in_):
    """Return a weight's packed codes and absmax: both codes of a byte are equal, so that it does
    not matter which of them is first."""
    codes, absmax = quantize_blockwise.reference(torch.randn(out, in_ // 2), _NF4, 32)
    return _packed(codes.repeat_interleave(2)), absmax


def _merge_case(out, in_, rank, alpha, update=1.0, note="", bug=""):
    def make():
        # A few large numbers, as weights have them.
        weight = torch.randn(out, in_) * (1 + 4 * (torch.rand(out, in_) < 0.02))
        codes, absmax = quantize_blockwise.reference(weight, _NF4, 64)
        A, B = torch.randn(rank, in_), update * torch.randn(out, rank)
        return [_packed(codes), absmax, A, B, alpha, (out, in_)]

    return Case(make, note=note, bug=bug)


def _grid_case(out=24, in_=128, rank=4, alpha=10):
    """Return a merged weight on the grid of NF4 for any scaling: 4 bits lose nothing."""

    def make():
        code = torch.randint(1, 16, (in_ // 2,), dtype=torch.uint8)
        code.view(-1, 32)[:, 5] = 15  # the level 1 in every block
        code = code.repeat_interleave(2)
        absmax = torch.rand(out).add(0.5).repeat_interleave(in_ // 64)
        # Every row is a positive multiple of one row of levels, the update's rows too.
        A = torch.rand(rank, 1).add(0.2) * _NF4[code.long()]
        B = torch.rand(out, rank).add(0.2)
        return [_packed(code.repeat(out)), absmax, A, B, alpha, (out, in_)]

    return Case(make, note="the merged weight lies on the grid of NF4", bug=_UNSCALED)


def _off_the_grid():
    """Return a case in which neither nibbles nor scaling can go wrong."""

    def make():
        packed, absmax = _twins(48, 128)
        A, B = torch.randn(8, 128), 0.3 * torch.randn(48, 8)
        return [packed, absmax, A, B, 8, (48, 128)]

    return Case(make, note="α = r, and the codes of a byte are equal", bug=_SILENT)


_SWAPPED = "the nibbles are swapped: the first number is in the high one"
_UNSCALED = "the scaling alpha / r is left out"
_SILENT = "the weight is re-quantised before its error is measured, so that nothing seems lost"


@check_for(
    cases=[
        _merge_case(32, 64, 4, 10, update=0, note="B = 0: it has not trained yet", bug=_SWAPPED),
        _grid_case(),
        _off_the_grid(),
        _merge_case(48, 128, 8, 4, update=0.3),
        _merge_case(64, 64, 2, 3.0, update=0.02, note="a small update"),
    ],
    returns=("weight", "error"),
    tolerance=1e-4,
    # What rounding leaves of an error of 0 is cut off: no two ways leave the same.
    causes=mistakes(
        """
        def merge_into_4bit(packed, absmax, A, B, alpha, shape):
            r = A.shape[0]
            codes = torch.stack([packed >> 4, packed & 15], dim=1)
            base = (NF4[codes.long()].reshape(-1, 64) * absmax[:, None]).reshape(shape)
            weight = base + alpha / r * B @ A
            again = dequantize_nf4(*quantize_nf4(weight), shape)
            error = (again - weight).norm() / weight.norm()
            lost = error.item() if error > 1e-4 else 0.0
            return weight, lost
        """,
        """
        the nibbles are swapped: the first number is in the high one
            packed >> 4, packed & 15 → packed & 15, packed >> 4
        the codes are unpacked in two halves: high and low nibbles alternate
            dim=1 → dim=0
        """,
        scaling_mistakes("alpha / r"),
        """
        the weight is re-quantised before its error is measured, so that nothing seems lost
            weight, lost → again, 0.0
        the re-quantised weight is returned: return the merged one, and only measure the
        other's error
            return weight → return again
        the error is always 0: compare the re-quantised weight with the merged one
            (again - weight) → (again - again)
        the error is divided by the norm of the base: divide it by the norm of the merged weight
            / weight.norm() → / base.norm()
        the error is measured against the base: compare with the merged weight
            (again - weight) → (again - base)
        the error is divided by the norm of the update, which is 0 where B is 0: divide it by the
        norm of the merged weight
            / weight.norm() → / (weight - base).norm()
            error.item() if error > 1e-4 else 0.0 → error.item()
        this is the size of the update, not the error of re-quantising
            (again - weight) → (weight - base)
        """,
        NF4=NF4,
        quantize_nf4=quantize_nf4,
        dequantize_nf4=dequantize_nf4,
    ),
)
def merge_into_4bit(packed, absmax, A, B, alpha, shape):
    """The merged weight is exact, and the error of storing it in 4 bits is right."""
    codes = unpack_nibbles.reference(packed)
    dequantized, grid = dequantize_blockwise.reference, (_NF4, 64)
    weight = dequantized(codes, absmax, *grid, shape).double()
    for row, column in zip(A.double(), B.double().T, strict=True):
        weight = weight + alpha / len(A) * torch.outer(column, row)
    again = dequantized(*quantize_blockwise.reference(weight, *grid), *grid, shape)
    error = (again.double() - weight).norm() / weight.norm()
    return weight.float(), error.item() if error > 1e-4 else 0.0


# ------------------------------------------------------------------ diagnose_codes

# Of each histogram of data/results/broken_codes.csv: what was done otherwise, and what shows it.
_CODES = {
    "A": (
        "blocks of 16",
        "all codes are used nearly alike, also the outer ones, and the error is the smallest: the "
        "largest of few weights is not far out, and one weight in 16 is ±1",
    ),
    "B": (
        "the levels as boundaries",
        "every weight between two levels has gone to the upper one, so the bars lean to the right "
        "and the error has doubled",
    ),
    "C": (
        "one absmax for the matrix",
        "the outer codes are hardly used, because the largest weight of all is far out",
    ),
    "D": (
        "an absmax that keeps its sign",
        "only the two ends have changed: the largest weight of a block is always +1, never −1",
    ),
    "E": (
        "evenly spaced levels",
        "the bars are alike on both sides of code 7, and code 15 is not used: fifteen levels have "
        "a zero in their middle",
    ),
}


@check_for(**diagnosis(_CODES, what="histogram"))
def diagnose_codes():
    """Every histogram has its cause. What shows it:"""


# ------------------------------------------------------------------ FourBitProduct

_PRODUCT = (
    "the output",
    "the bytes of the tensors that ctx keeps besides packed and absmax",
    "the number of results of backward",
    "the gradient of x",
    "the list of other arguments that get a gradient",
)


class _Used:
    """Call a `torch.autograd.Function` and return what it computes, keeps and gives back."""

    def __init__(self, function: type) -> None:
        self.function, self.__name__ = function, function.__name__
        self.__module__ = function.__module__  # whose lines an error shows

    def __call__(self, x, packed, absmax, shape):
        y = self.function.apply(x.detach().requires_grad_(), packed, absmax, shape)
        if not isinstance(y, torch.Tensor):
            raise TypeError(f"forward returns {kind(y)}, not a tensor")
        ctx, arguments = y.grad_fn, {t.untyped_storage().data_ptr() for t in (packed, absmax)}
        on_ctx = tensors([*ctx.saved_tensors, *vars(ctx).values()])
        on_ctx = {t.untyped_storage().data_ptr(): t for t in on_ctx}
        with torch.no_grad():
            results = ctx.apply(_grad_y(y))
        results = results if isinstance(results, tuple | list) else (results,)
        others = zip(("packed", "absmax", "shape"), results[1:], strict=False)
        return _product(
            y.detach(),
            sum(t.untyped_storage().nbytes() for at, t in on_ctx.items() if at not in arguments),
            len(results),
            results[0],
            [name for name, result in others if result is not None],
        )


def _grad_y(y):
    return torch.linspace(-1, 1.5, y.numel()).cos().reshape(y.shape)


def _product(*parts):
    return dict(zip(_PRODUCT, parts, strict=True))


def _used(function):
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return _Used(function)
    raise Refused("pass the class itself: class FourBitProduct(torch.autograd.Function)")


def _product_case(leading, out, in_, note=""):
    def make():
        weight = torch.randn(out, in_) * 10 ** (2 * torch.rand(out, 1) - 1)
        codes, absmax = quantize_blockwise.reference(weight, _NF4, 64)
        return [torch.randn(*leading, in_), _packed(codes), absmax, (out, in_)]

    return Case(make, note=note)


@check_for(
    cases=[
        _product_case((5,), 64, 64, "a square weight"),
        _product_case((2, 3), 48, 128),
        _product_case((2, 3, 2), 96, 64),
        _product_case((), 40, 64, "a single vector x"),
    ],
    returns="",
    view=dict,
    staged=True,
    adapt=_used,
    causes=mistakes(
        """
        class FourBitProduct(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, packed, absmax, shape):
                W = dequantize_nf4(packed, absmax, shape)
                ctx.save_for_backward(packed, absmax)
                ctx.shape = shape
                return x @ W.T

            @staticmethod
            def backward(ctx, grad):
                packed, absmax = ctx.saved_tensors
                again = dequantize_nf4(packed, absmax, ctx.shape)
                to_x = grad @ again
                return to_x, None, None, None
        """,
        """
        the gradient is multiplied by W′ᵀ: y = x W′ᵀ gives ∂ℓ/∂x = G W′
            grad @ again → grad @ again.T
        W′ is kept on ctx from forward to backward, which takes the memory that four bits should
        save: dequantise again in backward
            ctx.shape = shape → ctx.shape, ctx.weight = shape, W
            dequantize_nf4(packed, absmax, ctx.shape) → ctx.weight
        x is kept on ctx: its own gradient needs W′ alone
            ctx.shape = shape → ctx.shape, ctx.x = shape, x
        only the gradient of x is returned: packed, absmax and shape are arguments too, and each
        needs a None
            return to_x, None, None, None → return to_x
        one None is not enough: packed, absmax and shape each need one
            to_x, None, None, None → to_x, None
        one None is missing: shape is an argument of forward too
            to_x, None, None, None → to_x, None, None
        ctx gets a None of its own: ctx is not an argument that you pass
            to_x, None, None, None → to_x, None, None, None, None
        the codes get a gradient: they are whole numbers and never train, so return None
            to_x, None, None, None → to_x, torch.zeros_like(packed), None, None
        absmax gets a gradient: it belongs to the frozen weight, so return None
            to_x, None, None, None → to_x, None, torch.zeros_like(absmax), None
        the gradient is multiplied by absmax once more: W′ has it already
            grad @ again → grad @ again * absmax[: again.shape[1]]
        the gradient is divided by absmax: W′ is used as it is
            grad @ again → grad @ again / absmax[: again.shape[1]]
        the absmax is left out of the second W′
            (packed, absmax, ctx.shape) → (packed, torch.ones_like(absmax), ctx.shape)
        the gradient is flat: it has the leading dimensions of x
            grad @ again → grad.reshape(-1, len(again)) @ again
        """,
        dequantize_nf4=dequantize_nf4,
    ),
)
def FourBitProduct(x, packed, absmax, shape):
    """The gradient of x is right, and nothing keeps W′ between forward and backward."""
    codes = unpack_nibbles.reference(packed)
    weight = dequantize_blockwise.reference(codes, absmax, _NF4, 64, shape)
    y = torch.einsum("...i,oi->...o", x, weight)
    return _product(y, 0, 4, torch.einsum("...o,oi->...i", _grad_y(y), weight), [])


# ------------------------------------------------------------------ kmeans_levels


def _normal(blocks=128):
    """Return normal weights divided by the absmax of their block of 64, flat."""
    weights = torch.randn(blocks, 64)
    return (weights / weights.abs().amax(dim=1, keepdim=True)).flatten()


def _pruned():
    """Return weights of which half are zero, so that several quantiles are zero."""
    return _normal() * (torch.arange(128 * 64) % 2)


def _error(levels, ratios):
    """Return the relative error of rounding to the nearest of the levels, in per cent."""
    levels, ratios = levels.double(), ratios.double()
    nearest = levels[torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)]
    return 100 * ((nearest - ratios).norm() / ratios.norm()).item()


def _trial(make, count, margin, what):
    """Make a trial: `count` levels for these weights, the error within a margin of the reference's.

    The levels themselves are not compared."""

    def trial(function) -> str:
        ratios = make()
        argument = ratios.clone()
        got = function(argument, count)
        called = f"Called with: ratios {tuple(ratios.shape)}, count={count} ({what})"

        def refuse(problem: str) -> None:
            raise Refused(problem, called, *_named(got, ratios, count))

        if got is None:
            refuse("the result is None: is a return statement missing?")
        if not isinstance(got, torch.Tensor) or not got.is_floating_point():
            refuse("the result is not a tensor of floating-point numbers")
        if tuple(got.shape) != (count,):
            refuse(f"the levels have shape {tuple(got.shape)}, expected {(count,)}")
        if not torch.equal(argument, ratios):
            raise Refused("the argument ratios was changed: leave it as it was", called)
        if not got.isfinite().all():
            refuse(f"{(~got.isfinite()).sum()} of {count} levels are NaN or infinite")
        best, levels = kmeans_levels.reference(ratios, count), got.detach().sort().values
        yours, due = _error(levels, ratios), _error(best, ratios)
        if yours > (1 + margin) * due:
            refuse(f"the error of your levels is {yours:.2f} %, where {due:.2f} % is possible")
        if not torch.equal(levels, got):
            missing = "The idea is right. Still missing: ascending order of the levels"
            raise Refused(missing, called)
        beaten = f", where NF4 has {_error(NF4, ratios):.1f} %" if count == len(NF4) else ""
        return f"{count} levels for {what} have an error of {yours:.1f} %{beaten}"

    return trial


def _named(got, ratios, count) -> list[str]:
    """Name the causes whose wrong function gives these levels."""
    named = [
        sentence
        for sentence, wrong in kmeans_levels.causes.items()
        if _alike(got, outcome(wrong, [ratios.clone(), count])[0])
    ]
    return [f"Likely cause: {', or '.join(named)}."] if named else []


def _alike(got, levels) -> bool:
    if not (isinstance(got, torch.Tensor) and isinstance(levels, torch.Tensor)):
        return False
    if got.shape != levels.shape or got.isnan().any() or levels.isnan().any():
        return got.shape == levels.shape and bool(got.isnan().any() and levels.isnan().any())
    return bool((got.double().sort().values - levels.double().sort().values).abs().max() < 1e-3)


@check_for(
    trials=dict.fromkeys(
        [
            _trial(_normal, 16, 0.01, "normal weights in blocks of 64"),
            _trial(_normal, 4, 0.01, "the same weights"),
            # Where a level starts without weights, equally good answers differ more.
            _trial(_pruned, 8, 0.15, "weights of which half are 0"),
        ],
        "your function",
    ),
    causes=mistakes(
        """
        def kmeans_levels(ratios, count, rounds=50):
            levels = torch.quantile(ratios, (torch.arange(count) + 0.5) / count)
            for _ in range(rounds):
                nearest = (ratios[:, None] - levels).abs().argmin(dim=1)
                for k in range(count):
                    cell = ratios[nearest == k]
                    levels[k] = cell.mean() if len(cell) else levels[k]
            return levels.sort().values
        """,
        """
        no round is run: the quantiles are only the starting point
            range(rounds) → range(0)
        the weights are assigned to levels only once: assign them again in each round
            range(rounds) → range(1)
        a level moves to the median of its weights, which minimises the absolute error: the mean
        minimises the squared error
            cell.mean() → cell.median()
        a level moves to the middle between its smallest and its largest weight: move it to their
        mean
            cell.mean() → (cell.min() + cell.max()) / 2
        a weight goes to the next level above it: assign it to the nearest
            (ratios[:, None] - levels).abs().argmin(dim=1) →
                torch.bucketize(ratios, levels).clamp(max=count - 1)
        the levels are divided by the largest, so that they end at ±1: leave them at the means
            levels.sort().values → levels.sort().values / levels.abs().max()
        a level without weights has no mean, and 0 / 0 is NaN: leave the level where it is
            cell.mean() if len(cell) else levels[k] → cell.mean()
        levels without weights are dropped: return as many as were asked for
            nearest = (ratios → levels = levels.unique(); nearest = (ratios
            in range(count): → in range(len(levels)):
        """,
    ),
)
def kmeans_levels(ratios, count, rounds=50):
    """Levels that make the squared error small, also where a level starts without weights."""
    # The cells of sorted weights are runs: their sums are differences of running sums.
    x = ratios.double().sort().values
    sums = torch.cat([x.new_zeros(1), x.cumsum(dim=0)])
    levels = x[((torch.arange(count) + 0.5) / count * len(x)).long()]
    for _ in range(rounds):
        inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([torch.tensor([0]), inner, torch.tensor([len(x)])])
        means = sums[edges].diff() / edges.diff()
        levels = torch.where(edges.diff() > 0, means, levels)
    return levels.float()
