"""Checks of lesson 04."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .kit import Case, Forbid, check_for, gradients_of
from .scaling import wrong_scalings


def _weight(out, in_, dtype=torch.float32):
    """Rows of very different lengths, so that no two norms can stand for one another."""
    return (torch.randn(out, in_) * torch.logspace(-1, 1, out)[torch.randperm(out), None]).to(dtype)


# ------------------------------------------------------------------ decompose


def _rows(weight):
    return torch.linalg.norm(weight, dim=1)


def _split(of, by=None):
    """A wrong decompose by its magnitude, and by what the direction is divided by."""

    def decompose(weight):
        magnitude = of(weight)
        return magnitude, weight / (by(weight) if by else magnitude)[:, None]

    return decompose


def _parts(magnitude=_rows, direction=lambda w: w / _rows(w)[:, None]):
    return lambda weight: (magnitude(weight), direction(weight))


@check_for(
    cases=[
        Case(lambda: [_weight(12, 20)]),
        Case(lambda: [_weight(20, 12)]),
        Case(lambda: [_weight(16, 16)], note="a square weight"),
        Case(lambda: [1e-6 * _weight(9, 14)], note="rows of length 4e-7 and more"),
        Case(lambda: [_weight(10, 33, torch.float64)]),
        Case(lambda: [_weight(6, 1)], note="a single column"),
    ],
    returns=("magnitude", "direction"),
    causes={
        "the norms are those of the columns: dim=0 sums over the rows": lambda w: (
            w.norm(dim=0),
            w / w.norm(dim=0),
        ),
        "the norms are those of the columns, with a dimension kept": lambda w: (
            w.norm(dim=0, keepdim=True),
            w / w.norm(dim=0),
        ),
        "there is one norm for the whole weight: each row has its own": lambda w: (
            w.norm(),
            w / w.norm(),
        ),
        "every row gets the norm of the whole weight": _split(lambda w: w.norm().expand(len(w))),
        "the magnitude has shape (out,): drop the dimension that keepdim=True kept": _parts(
            magnitude=lambda w: w.norm(dim=1, keepdim=True)
        ),
        "the square root is missing: these are squared lengths": _split(lambda w: w.pow(2).sum(1)),
        "the magnitude is squared, although the direction is right": _parts(
            magnitude=lambda w: w.pow(2).sum(1)
        ),
        "these are sums of absolute values: a length is a root": _split(lambda w: w.abs().sum(1)),
        "this is the largest absolute value of a row, not its length": _split(
            lambda w: w.abs().amax(1)
        ),
        "the squares are averaged, not summed": _split(lambda w: w.pow(2).mean(1).sqrt()),
        "this is the standard deviation of a row, not its length": _split(lambda w: w.std(1)),
        "the direction is the weight itself: divide it by the magnitude": _parts(
            direction=lambda w: w
        ),
        "the weight is multiplied by its magnitude: divide": _parts(
            direction=lambda w: w * _rows(w)[:, None]
        ),
        "the direction is divided by the magnitude twice": _parts(
            direction=lambda w: w / _rows(w)[:, None] ** 2
        ),
        "the columns of the direction have length 1, and its rows must": _parts(
            direction=lambda w: F.normalize(w, dim=0)
        ),
        "the direction is divided by the norm of the whole weight": _parts(
            direction=lambda w: w / w.norm()
        ),
        (
            "short rows are divided by a floor (clamp, or the eps of F.normalize): none is zero"
        ): _parts(direction=lambda w: w / _rows(w).clamp(min=1e-6)[:, None]),
        "1e-8 is added to the norm, which shortens a small row: no row is zero here": _parts(
            direction=lambda w: w / (_rows(w) + 1e-8)[:, None]
        ),
        "the direction is transposed": _parts(direction=lambda w: F.normalize(w).T),
        "the order is turned: return the magnitude first": lambda w: (F.normalize(w), _rows(w)),
    },
)
def decompose(weight):
    """Every row is its length times a row of length 1."""
    lengths = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in weight]
    magnitude = torch.tensor(lengths, dtype=torch.float64)
    return magnitude.to(weight.dtype), (weight.double() / magnitude[:, None]).to(weight.dtype)


# ------------------------------------------------------------------ dora_output


def _adapted(shape, out, in_, rank, alpha, bias=True, trained=True, dtype=torch.float32):
    """Arguments in which no two terms of ‖V‖² are alike, and c is far from 1."""
    x, weight = torch.randn(*shape, in_), _weight(out, in_) / math.sqrt(in_)
    A, B = torch.randn(rank, in_) / math.sqrt(in_), torch.randn(out, rank) if trained else None
    B = torch.zeros(out, rank) if B is None else B * _rows(weight)[:, None] * 0.7
    magnitude = _rows(weight) * (0.5 + torch.rand(out) if trained else 1)
    offset = torch.randn(out) if bias else None
    tensors = (x, weight, offset, A, B, magnitude)
    x, weight, offset, A, B, magnitude = (t if t is None else t.to(dtype) for t in tensors)
    return [x, weight, offset, A, B, alpha, magnitude]


def _three_terms(W, A, B, s, cross=2, last=2, root=True):
    """‖W + s·BA‖ of every row from three products, none of which is as large as W."""
    square = _rows(W) ** 2 + cross * s * ((W @ A.T) * B).sum(1)
    square = square + s**last * ((B @ (A @ A.T)) * B).sum(1)
    return square.clamp(min=0).sqrt() if root else square


def _ratio(magnitude, norm):
    return magnitude / norm


def _added(plain, branch, c, bias):
    return c * (plain + branch) + bias


def _output(
    norm=_three_terms, ratio=_ratio, join=_added, s=lambda alpha, r: alpha / r, detach=True
):
    """A wrong dora_output by one of its steps."""

    def output(x, weight, bias, A, B, alpha, magnitude):
        scale = s(alpha, len(A))
        length = norm(weight, A, B, scale)
        c = ratio(magnitude, length.detach() if detach else length)
        bias = 0 if bias is None else bias
        return join(F.linear(x, weight), scale * (x @ A.T @ B.T), c, bias)

    return output


def _over_columns(x, weight, bias, A, B, alpha, magnitude):
    V = weight + alpha / len(A) * (B @ A)
    return F.linear(x, magnitude[:, None] * V / V.norm(dim=0).detach(), bias)


def _partly_scaled(in_norm, in_branch):
    def output(x, weight, bias, A, B, alpha, magnitude):
        s = alpha / len(A)
        c = magnitude / _three_terms(weight, A, B, s if in_norm else 1).detach()
        return _added(
            F.linear(x, weight),
            (s if in_branch else 1) * (x @ A.T @ B.T),
            c,
            0 if bias is None else bias,
        )

    return output


def _sum_of_norms(W, A, B, s):
    return _rows(W) + s * _rows(B @ A)


@check_for(
    cases=[
        Case(lambda: _adapted((2, 7), 24, 40, 4, 10)),
        Case(lambda: _adapted((5,), 40, 24, 8, 4.0)),
        Case(lambda: _adapted((3, 5), 30, 30, 3, 7), note="a square weight"),
        Case(lambda: _adapted((2, 7), 18, 26, 4, 6, bias=False), note="a layer without a bias"),
        Case(
            lambda: _adapted((4,), 22, 34, 4, 10, trained=False),
            note="B = 0 and m = ‖W‖: this is step 0",
        ),
        Case(lambda: _adapted((2, 3, 5), 20, 28, 2, 5, dtype=torch.float64)),
    ],
    returns="y",
    gradients=("x", "bias", "A", "B", "magnitude"),
    forbid=[
        Forbid(
            lambda x, weight, bias, A, B, alpha, magnitude: [tuple(weight.shape)],
            "That is as large as the weight itself. x Vᵀ is a sum of two products, and ‖V‖² a sum "
            "of three terms, each from thin matrices; weight.norm(dim=1) forms nothing large.",
        ),
        Forbid(
            lambda x, weight, bias, A, B, alpha, magnitude: [(len(weight), len(weight))],
            "A row's norm needs one number for each output: multiply entry by entry and sum, where "
            "a product of matrices gives all pairs of outputs.",
        ),
    ],
    causes={
        "the bias is rescaled too: it is added as it is": _output(
            join=lambda plain, branch, c, b: c * (plain + branch + b)
        ),
        "the bias is left out": _output(join=lambda plain, branch, c, b: c * (plain + branch)),
        "the bias is added twice": _output(
            join=lambda plain, branch, c, b: c * (plain + branch) + 2 * b
        ),
        "only the branch is rescaled: the base's part is multiplied by c as well": _output(
            join=lambda plain, branch, c, b: plain + c * branch + b
        ),
        "only the base's part is rescaled: the branch is multiplied by c as well": _output(
            join=lambda plain, branch, c, b: c * plain + branch + b
        ),
        (
            "the base is there twice: what is added to base(x) is (c − 1)·(x Wᵀ), not c·(x Wᵀ)"
        ): _output(join=lambda plain, branch, c, b: plain + c * (plain + branch) + b),
        "the branch is left out": _output(join=lambda plain, branch, c, b: c * plain + b),
        "the base's part is left out": _output(join=lambda plain, branch, c, b: c * branch + b),
        **wrong_scalings(lambda scale: _output(s=scale)),
        "the scaling alpha / r is missing in the norm": _partly_scaled(False, True),
        "the scaling alpha / r is missing in the branch": _partly_scaled(True, False),
        "the norm is that of W, and V = W + s·BA has another one": _output(
            norm=lambda W, A, B, s: _rows(W)
        ),
        "there is one norm for the whole of V: each output row has its own": _output(
            norm=lambda W, A, B, s: (W + s * (B @ A)).norm()
        ),
        "the norms are those of V's columns: each output row has its own": _over_columns,
        (
            "the norm of a sum is not the sum of the norms: the rows of W and BA meet at an angle"
        ): _output(norm=_sum_of_norms),
        "the term 2s·w·(BA) of the squared norm is left out": _output(
            norm=lambda *args: _three_terms(*args, cross=0)
        ),
        "a 2 is missing: (a + b)² = a² + 2ab + b²": _output(
            norm=lambda *args: _three_terms(*args, cross=1)
        ),
        "in the last term of the squared norm s is squared too": _output(
            norm=lambda *args: _three_terms(*args, last=1)
        ),
        "the root is missing: this is the squared norm": _output(
            norm=lambda *args: _three_terms(*args, root=False)
        ),
        "the magnitude is not divided by the norm of V": _output(ratio=lambda m, norm: m),
        "the magnitude is left out: c = m / ‖V‖": _output(ratio=lambda m, norm: 1 / norm),
        "c is upside down: it is m / ‖V‖": _output(ratio=lambda m, norm: norm / m),
        "magnitude and norm are not used: this is LoRA": _output(
            ratio=lambda m, norm: torch.ones_like(m)
        ),
        "a gradient flows through the norm, which is a constant: detach it": _output(detach=False),
    },
)
def dora_output(x, weight, bias, A, B, alpha, magnitude):
    """DoRA's output and gradients, without any tensor as large as the weight."""
    V = weight.double()
    for row, column in zip(A.double(), B.double().T, strict=True):
        V = V + alpha / len(A) * torch.outer(column, row)
    norm = torch.stack([row.norm() for row in V.detach()])
    y = x.double() @ (V * (magnitude / norm)[:, None]).T
    return (y if bias is None else y + bias).to(x.dtype)


# ------------------------------------------------------------------ magnitude_direction_change


def _changed(out, in_, turn, lengths=0.3, dtype=torch.float32):
    """Two weights: the rows of the second are longer or shorter, and turned a little."""
    w0 = _weight(out, in_)
    noise = torch.randn(out, in_) * _rows(w0)[:, None] / math.sqrt(in_)
    w1 = (w0 + turn * noise) * (1 + lengths * torch.randn(out, 1)).abs()
    return [w0.to(dtype), w1.to(dtype)]


def _doubled(out, in_):
    w0 = _weight(out, in_)
    return [w0, w0 * 2.0 ** torch.randint(-2, 3, (out, 1))]


def _signs(out, in_):
    w0 = _weight(out, in_)
    return [w0, w0 * torch.where(torch.rand(out, in_) < 0.1, -1.0, 1.0)]


def _lengths(w0, w1):
    return w1.norm(dim=1) - w0.norm(dim=1)


def _cosine(w0, w1, dim=1):
    return F.cosine_similarity(w0.double(), w1.double(), dim=dim)


def _change(
    m=lambda w0, w1: _lengths(w0, w1).abs().mean(),
    d=lambda w0, w1: (1 - _cosine(w0, w1)).mean(),
):
    def change(w0, w1):
        a, b = w0.double(), w1.double()
        # Nothing is nothing: what rounding leaves of it no two ways have in common.
        return round(m(a, b).item(), 7), round(d(a, b).item(), 7)

    return change


def _unit(w):
    return F.normalize(w, dim=1)


@check_for(
    cases=[
        Case(lambda: _changed(24, 40, turn=0.5)),
        Case(lambda: _changed(40, 24, turn=1.5)),
        Case(lambda: _changed(32, 32, turn=0.8), note="a square weight"),
        Case(lambda: _doubled(20, 30), note="no row changes its direction"),
        Case(lambda: _signs(20, 30), note="no row changes its length"),
        Case(lambda: _changed(12, 48, turn=8.0), note="rows turned by a right angle and more"),
        Case(lambda: _changed(25, 35, turn=0.3, dtype=torch.float64)),
    ],
    returns=("delta_m", "delta_d"),
    tolerance=1e-4,
    causes={
        "columns are compared, not rows: norms and cosines are taken along dim=1": _change(
            lambda w0, w1: (w1.norm(dim=0) - w0.norm(dim=0)).abs().mean(),
            lambda w0, w1: (1 - _cosine(w0, w1, dim=0)).mean(),
        ),
        "the lengths are those of the columns": _change(
            m=lambda w0, w1: (w1.norm(dim=0) - w0.norm(dim=0)).abs().mean()
        ),
        "the cosines are those of the columns": _change(
            d=lambda w0, w1: (1 - _cosine(w0, w1, dim=0)).mean()
        ),
        "longer and shorter rows cancel: take the absolute value of each change": _change(
            m=lambda w0, w1: _lengths(w0, w1).mean()
        ),
        (
            "the absolute value is taken of the mean: longer and shorter rows cancel before that"
        ): _change(m=lambda w0, w1: _lengths(w0, w1).mean().abs()),
        "delta_m is squared": _change(m=lambda w0, w1: _lengths(w0, w1).square().mean()),
        "delta_m is the length of the change: take the change of the length": _change(
            m=lambda w0, w1: (w1 - w0).norm(dim=1).mean()
        ),
        "the change of each length is divided by the length: delta_m is not relative": _change(
            m=lambda w0, w1: (_lengths(w0, w1) / w0.norm(dim=1)).abs().mean()
        ),
        "delta_m is the change of the whole weight's norm: each row has a length": _change(
            m=lambda w0, w1: (w1.norm() - w0.norm()).abs()
        ),
        "the cosines are summed inside: the mean is of 1 − cos, row by row": _change(
            d=lambda w0, w1: 1 - _cosine(w0, w1).sum()
        ),
        "delta_m is a sum: take the mean": _change(m=lambda w0, w1: _lengths(w0, w1).abs().sum()),
        "both are sums: take means": _change(
            lambda w0, w1: _lengths(w0, w1).abs().sum(),
            lambda w0, w1: (1 - _cosine(w0, w1)).sum(),
        ),
        "delta_d is a sum: take the mean": _change(d=lambda w0, w1: (1 - _cosine(w0, w1)).sum()),
        "delta_d is the cosine itself: equal directions must give 0": _change(
            d=lambda w0, w1: _cosine(w0, w1).mean()
        ),
        "delta_d is the angle: take 1 − its cosine": _change(
            d=lambda w0, w1: _cosine(w0, w1).clamp(-1, 1).acos().mean()
        ),
        "delta_d is the distance between the directions: take 1 − their cosine": _change(
            d=lambda w0, w1: (_unit(w1) - _unit(w0)).norm(dim=1).mean()
        ),
        "delta_d is the squared distance between the directions, twice what is asked": _change(
            d=lambda w0, w1: (_unit(w1) - _unit(w0)).square().sum(1).mean()
        ),
        "the rows are not divided by both their lengths: this is no cosine": _change(
            d=lambda w0, w1: (1 - (w0 * w1).sum(1)).mean()
        ),
        "the weights are compared as one long vector each: every row has a cosine": _change(
            d=lambda w0, w1: 1 - _cosine(w0.flatten(), w1.flatten(), dim=0)
        ),
        "the cosine is taken between w0 and the change: compare w0 and w1": _change(
            d=lambda w0, w1: (1 - _cosine(w0, w1 - w0)).mean()
        ),
        "the cosine loses its sign: a row may turn by more than a right angle": _change(
            d=lambda w0, w1: (1 - _cosine(w0, w1).abs()).mean()
        ),
        "every row is compared with every other: only corresponding ones are": _change(
            d=lambda w0, w1: (1 - _unit(w0) @ _unit(w1).T).mean()
        ),
        "the order is turned: return delta_m first": lambda w0, w1: _change()(w0, w1)[::-1],
    },
)
def magnitude_direction_change(w0, w1):
    """How much longer or shorter the rows are, and how far they are turned."""
    a, b = w0.double(), w1.double()
    m0, m1 = ((w * w).sum(dim=1).sqrt() for w in (a, b))
    gap = a / m0[:, None] - b / m1[:, None]
    # |u − v|² = 2 − 2 cos, which loses nothing where the directions are nearly equal.
    return (m1 - m0).abs().mean().item(), ((gap * gap).sum(dim=1) / 2).mean().item()


# ------------------------------------------------------------------ DoRALinear


def _linear(out, in_, bias=True):
    """A frozen layer, as `inject` hands it over."""
    linear = nn.Linear(in_, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(_weight(out, in_) / math.sqrt(in_))
        if bias:
            linear.bias.normal_()
    return linear.requires_grad_(False)


_TRAINED = ["lora_A", "lora_B", "magnitude"]
_PARTS = (
    "the list of what trains",
    "the magnitude right after construction",
    "the output for x = 0 (only the bias is left)",
    "the output right after construction (that of the base)",
    "the output once A, B and m are trained",
    *(f"the gradient of {name}" for name in (*_TRAINED, "x")),
)


def _used(module):
    """What a DoRALinear is and computes, from its start to its gradients; a part that the parts
    before make impossible is None."""
    trained = {n.rpartition(".")[2]: p for n, p in module.named_parameters() if p.requires_grad}
    seen = dict.fromkeys(_PARTS)
    trains, start, zero, first, output, *gradients = _PARTS
    seen[trains] = sorted(trained)
    if seen[trains] != _TRAINED:
        return seen
    A, B, m = (trained[name] for name in _TRAINED)
    seen[start] = m.detach().clone()
    if m.shape != B.shape[:1]:
        return seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 6, A.shape[1], requires_grad=True)
    with torch.no_grad():
        seen[zero], seen[first] = module(torch.zeros(3, A.shape[1])), module(x)
        A.copy_(torch.randn(A.shape) / math.sqrt(A.shape[1]))
        B.copy_(torch.randn(B.shape) * m.abs().clamp(0.05, 5)[:, None])
        m.mul_(0.5 + torch.rand(m.shape))
    with torch.enable_grad():
        y = module(x)
        seen[output] = y.detach()
        wanted = (A, B, m, x)
        found = gradients_of(y, wanted)
    for name, p, gradient in zip(gradients, wanted, found, strict=True):
        seen[name] = torch.zeros_like(p) if gradient is None else gradient
    return seen


def _rows_of(linear):
    return _rows(linear.weight)


class _Wrong(nn.Module):
    """DoRALinear with its steps open to be done wrongly."""

    def __init__(self, linear, rank, alpha, start, norm, join, scale, through):
        super().__init__()
        self.linear, self.scaling = linear, scale(alpha, rank)
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.magnitude = nn.Parameter(start(linear).detach().clone())
        self.norm, self.join, self.through = norm, join, through

    def forward(self, x):
        W = self.linear.weight
        V = W + self.scaling * self.lora_B @ self.lora_A
        m = self.magnitude
        norm, V, m = self.through(self.norm(V, W), V, m)
        return self.join(x, m[:, None], V, norm, self.linear.bias)


def _joined(x, m, V, norm, bias):
    return F.linear(x, m * V / norm, bias)


def _row_norms(V, W):
    return V.norm(dim=1, keepdim=True)


def _wrong(
    start=_rows_of,
    norm=_row_norms,
    join=_joined,
    scale=lambda alpha, r: alpha / r,
    through=lambda norm, V, m: (norm.detach(), V, m),
):
    def DoRALinear(linear, rank=8, alpha=16.0):
        return _Wrong(linear, rank, alpha, start, norm, join, scale, through)

    return DoRALinear


def _zero(bias):
    return 0 if bias is None else bias


@check_for(
    cases=[
        Case(lambda: [_linear(12, 20), 4, 10]),
        Case(lambda: [_linear(20, 12), 3, 4.0]),
        Case(lambda: [_linear(16, 16), 2, 5], note="a square weight"),
        Case(lambda: [_linear(14, 18, bias=False), 4, 6], note="a layer without a bias"),
    ],
    returns="the module",
    view=_used,
    staged=True,
    causes={
        "the magnitude starts as ones, so that step 0 is not the base: start from ‖W‖": _wrong(
            start=lambda linear: torch.ones(linear.out_features)
        ),
        "the magnitude starts as zeros, and the output with it: start from ‖W‖": _wrong(
            start=lambda linear: torch.zeros(linear.out_features)
        ),
        "the magnitude holds the norms of W's columns: each output row has one": _wrong(
            start=lambda linear: linear.weight.norm(dim=0)
        ),
        "the magnitude has shape (out,): drop the dimension that keepdim=True kept": _wrong(
            start=lambda linear: linear.weight.norm(dim=1, keepdim=True)
        ),
        "the magnitude starts as the norm of the whole weight, which no row has": _wrong(
            start=lambda linear: linear.weight.norm().expand(linear.out_features)
        ),
        "the magnitude starts as the norms of W's rows, squared": _wrong(
            start=lambda linear: _rows_of(linear) ** 2
        ),
        "the bias of the layer is lost": _wrong(
            join=lambda x, m, V, norm, bias: F.linear(x, m * V / norm)
        ),
        "the bias is added twice": _wrong(join=lambda *args: _joined(*args) + _zero(args[-1])),
        "the bias is rescaled with the rows: it is added as it is": _wrong(
            join=lambda x, m, V, norm, bias: (m / norm)[:, 0] * (F.linear(x, V) + _zero(bias))
        ),
        "the norm is that of V's columns: dim=0 sums over the output rows": _wrong(
            norm=lambda V, W: V.norm(dim=0, keepdim=True)
        ),
        "V is divided by the norm of the whole of it": _wrong(norm=lambda V, W: V.norm()),
        "V is not divided by its norm, so that W's length counts twice": _wrong(
            norm=lambda V, W: torch.ones(())
        ),
        "V is divided by its squared norm": _wrong(norm=lambda V, W: V.pow(2).sum(1, keepdim=True)),
        "the norm is that of W: it must follow V = W + s·BA, in every forward": _wrong(
            norm=lambda V, W: W.norm(dim=1, keepdim=True)
        ),
        **wrong_scalings(lambda scale: _wrong(scale=scale)),
        "a gradient flows through the norm, which is a constant: detach it": _wrong(
            through=lambda norm, V, m: (norm, V, m)
        ),
        "V is cut off, so that A and B learn nothing: detach its norm alone": _wrong(
            through=lambda norm, V, m: (norm.detach(), V.detach(), m)
        ),
        "the magnitude is cut off and learns nothing: detach the norm alone": _wrong(
            through=lambda norm, V, m: (norm.detach(), V, m.detach())
        ),
    },
)
class DoRALinear(nn.Module):
    """The base at step 0, DoRA once trained, and the gradients of DoRA."""

    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.magnitude = nn.Parameter(self.lengths().clone())

    @torch.no_grad()
    def lengths(self):
        BA = sum(torch.outer(b, a) for a, b in zip(self.lora_A, self.lora_B.T, strict=True))
        return torch.stack([row.norm() for row in self.linear.weight + self.scaling * BA])

    def forward(self, x):
        low = torch.einsum("...i,ri,or->...o", x, self.lora_A, self.lora_B)
        rescaled = (x @ self.linear.weight.T + self.scaling * low) * (
            self.magnitude / self.lengths()
        )
        return rescaled if self.linear.bias is None else rescaled + self.linear.bias
