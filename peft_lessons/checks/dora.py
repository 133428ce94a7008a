"""Checks of lesson 04."""

import math

import torch
from torch import nn

from ..testing.wording import kind
from .calls import gradients_or_zeros, module_of
from .diagnosis import diagnosis
from .kit import Case, Forbid, check_for
from .mistakes import mistakes, scaling_mistakes


def _weight(out, in_, dtype=torch.float32):
    """Return a weight whose rows differ so much in length that no norm equals another."""
    return (torch.randn(out, in_) * torch.logspace(-1, 1, out)[torch.randperm(out), None]).to(dtype)


# ------------------------------------------------------------------ decompose


def _rows(weight):
    return torch.linalg.norm(weight, dim=1)


def _with_zeros(out, in_, *rows):
    weight = _weight(out, in_)
    weight[list(rows)] = 0.0
    return [weight]


@check_for(
    cases=[
        Case(lambda: [_weight(12, 20)]),
        Case(lambda: [_weight(20, 12)]),
        Case(lambda: [_weight(16, 16)], note="a square weight"),
        Case(lambda: [_weight(10, 33, torch.float64)]),
        Case(lambda: [_weight(6, 1)], note="a single column"),
        Case(lambda: _with_zeros(9, 14, 4), note="row 4 is zero"),
        Case(lambda: _with_zeros(7, 7, 0, 6), note="the first row and the last are zero"),
    ],
    returns=("magnitude", "direction"),
    causes=mistakes(
        """
        def decompose(weight):
            magnitude = (weight**2).sum(dim=1).sqrt()
            direction = weight / magnitude[:, None].clamp(min=1e-12)
            return magnitude, direction
        """,
        """
        the idea is right, but a row of zeros becomes NaN: 0 / 0
            .clamp(min=1e-12) → ∅
        the norms are those of the columns: dim=0 sums over the rows
            dim=1 → dim=0
            [:, None] → ∅
        the norms are those of the columns, with a dimension kept
            dim=1 → dim=0, keepdim=True
            [:, None] → ∅
        there is one norm for the whole weight: each row has its own
            dim=1 → ∅
            [:, None] → ∅
        the magnitude has shape (out,): drop the dimension that keepdim=True kept
            return magnitude → return magnitude[:, None]
        the square root is missing: these are squared lengths
            .sqrt() → ∅
        these are sums of absolute values: a length is a root
            (weight**2).sum(dim=1).sqrt() → weight.abs().sum(dim=1)
        the squares are averaged, not summed
            .sum( → .mean(
        the direction is the weight itself: divide it by the magnitude
            / magnitude[:, None].clamp(min=1e-12) → ∅
        the columns of the direction have length 1: its rows must have length 1
            weight / magnitude[:, None].clamp(min=1e-12) → F.normalize(weight, dim=0)
        the order is reversed: return the magnitude first
            magnitude, direction → direction, magnitude
        """,
    ),
)
def decompose(weight):
    """Every row is its length times a row of length 1, and a row of zeros stays one."""
    lengths = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in weight]
    magnitude = torch.tensor(lengths, dtype=torch.float64)
    divisors = torch.tensor([length or 1.0 for length in lengths], dtype=torch.float64)
    return magnitude.to(weight.dtype), (weight.double() / divisors[:, None]).to(weight.dtype)


# ------------------------------------------------------------------ dora_output


def _adapted(shape, out, in_, rank, alpha, bias=True, trained=True, dtype=torch.float32):
    """Return arguments for which all terms of ‖V‖² differ, and c is far from 1."""
    x, weight = torch.randn(*shape, in_), _weight(out, in_) / math.sqrt(in_)
    A, B = torch.randn(rank, in_) / math.sqrt(in_), torch.randn(out, rank) if trained else None
    B = torch.zeros(out, rank) if B is None else B * _rows(weight)[:, None] * 0.7
    magnitude = _rows(weight) * (0.5 + torch.rand(out) if trained else 1)
    offset = torch.randn(out) if bias else None
    tensors = (x, weight, offset, A, B, magnitude)
    x, weight, offset, A, B, magnitude = (t if t is None else t.to(dtype) for t in tensors)
    return [x, weight, offset, A, B, alpha, magnitude]


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
            "That is as large as the weight: V, weight ** 2, or a copy of the weight, as "
            ".contiguous(), .clone() and .double() make. weight.T and weight.norm(dim=1) make no "
            "copy; x Vᵀ is a sum of two products, ‖V‖² one of three terms.",
        ),
        Forbid(
            lambda x, weight, bias, A, B, alpha, magnitude: [(len(weight), len(weight))],
            "A row's norm needs one number for each output: multiply entry by entry and sum, where "
            "a product of matrices gives all pairs of outputs.",
        ),
    ],
    causes=mistakes(
        """
        def dora_output(x, weight, bias, A, B, alpha, magnitude):
            r = A.shape[0]
            s = alpha / r
            base = x @ weight.T
            branch = s * (x @ A.T @ B.T)
            b = 0 if bias is None else bias
            first = weight.norm(dim=1) ** 2
            cross = 2 * s * (weight @ A.T * B).sum(dim=1)
            last = s**2 * (B @ (A @ A.T) * B).sum(dim=1)
            norm = (first + cross + last).sqrt().detach()
            c = magnitude / norm
            return c * (base + branch) + b
        """,
        """
        the bias is rescaled too: it is added as it is
            (base + branch) + b → (base + branch + b)
        the bias is left out
            (base + branch) + b → (base + branch)
        only the branch is rescaled: the base's part is multiplied by c as well
            c * (base + branch) → base + c * branch
        only the base's part is rescaled: the branch is multiplied by c as well
            c * (base + branch) → c * base + branch
        the base is counted twice: add (c − 1)·(x Wᵀ) to base(x), not c·(x Wᵀ)
            c * (base + branch) → base + c * (base + branch)
        """,
        scaling_mistakes("alpha / r"),
        """
        the scaling alpha / r is missing in the norm
            2 * s * → 2 *
            s**2 * → ∅
        the norm is that of W: use the norm of V = W + s·BA
            first + cross + last → first
        the norms are those of V's columns: each output row has its own
            norm = (first + cross + last).sqrt().detach() → V = weight + s * B @ A
            c = magnitude / norm → c = magnitude[:, None] / V.norm(dim=0).detach()
            c * (base + branch) → x @ (c * V).T
        the norm of a sum is not the sum of the norms: the rows of W and BA meet at an angle
            (first + cross + last).sqrt() → (first.sqrt() + last.sqrt())
        the term 2s·w·(BA) of the squared norm is left out
            + cross + → +
        a 2 is missing: (a + b)² = a² + 2ab + b²
            2 * s * → s *
        the last term of the squared norm needs s², not s
            s**2 * → s *
        the root is missing: this is the squared norm
            .sqrt() → ∅
        the magnitude is not divided by the norm of V
            magnitude / norm → magnitude
        a gradient flows through the norm, which is a constant: detach it
            .detach() → ∅
        """,
    ),
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
    """Return two weights: the rows of the second have other lengths and are turned a little."""
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
    # Rounded: where nothing changes, no two ways leave the same.
    causes=mistakes(
        """
        def magnitude_direction_change(w0, w1):
            a, b = w0.double(), w1.double()
            m0, m1 = a.norm(dim=1), b.norm(dim=1)
            change = (m1 - m0).abs()
            cosine = (a * b).sum(dim=1) / (m0 * m1)
            delta_m = change.mean()
            delta_d = (1 - cosine).mean()
            return round(delta_m.item(), 7), round(delta_d.item(), 7)
        """,
        """
        columns are compared, not rows: norms and cosines are taken along dim=1
            a.norm(dim=1), b.norm(dim=1) → a.norm(dim=0), b.norm(dim=0)
            .sum(dim=1) → .sum(dim=0)
        longer and shorter rows cancel: take the absolute value of each change
            .abs() → ∅
        the absolute value is taken of the mean: longer and shorter rows cancel before that
            .abs() → ∅
            change.mean() → change.mean().abs()
        delta_m is the length of the change: take the change of the length
            (m1 - m0).abs() → (b - a).norm(dim=1)
        the change of each length is divided by the length: delta_m is not relative
            .abs() → .abs() / m0
        both are sums: take means
            change.mean() → change.sum()
            (1 - cosine).mean() → (1 - cosine).sum()
        delta_d is the cosine itself: equal directions must give 0
            1 - cosine → cosine
        delta_d is the angle: take 1 − its cosine
            1 - cosine → cosine.clamp(-1, 1).acos()
        delta_d is the distance between the directions: take 1 − their cosine
            (1 - cosine) → (a / m0[:, None] - b / m1[:, None]).norm(dim=1)
        the product of two rows is not divided by both lengths, so it is not a cosine
            / (m0 * m1) → ∅
        each weight is compared as one long vector: every row has its own cosine
            (a * b).sum(dim=1) / (m0 * m1) → (a * b).sum() / (a.norm() * b.norm())
        every row is compared with every other: compare corresponding rows only
            (a * b).sum(dim=1) / (m0 * m1) → F.normalize(a) @ F.normalize(b).T
        the order is reversed: return delta_m first
            round(delta_m.item(), 7), round(delta_d.item(), 7) →
                round(delta_d.item(), 7), round(delta_m.item(), 7)
        """,
    ),
)
def magnitude_direction_change(w0, w1):
    """Both means are right: the change of the rows' lengths, and of their directions."""
    a, b = w0.double(), w1.double()
    m0, m1 = ((w * w).sum(dim=1).sqrt() for w in (a, b))
    gap = a / m0[:, None] - b / m1[:, None]
    # |u − v|² = 2 − 2 cos, which loses nothing where the directions are nearly equal.
    return (m1 - m0).abs().mean().item(), ((gap * gap).sum(dim=1) / 2).mean().item()


# ------------------------------------------------------------------ diagnose_rows

# Of each run of data/results/broken_rows.csv: what is wrong, and what its rows show of it.
_FAULTY_RUNS = {
    "A": (
        "used without m",
        "hardly a row has become shorter, and those that turned furthest are the longest: this is "
        "V itself, as LoRA would use it",
    ),
    "B": (
        "m starts as ones",
        "the lengths lie far from 1, although the rows have turned as little as the healthy ones",
    ),
    "C": (
        "V is detached with its norm",
        "no row has turned, because no gradient reaches A and B; only m has learned",
    ),
    "D": ("m is frozen", "every row has exactly the length that it had"),
    "E": (
        "the norm is that of the columns",
        "no row is near 0 degrees, where many of the others still are: every column is divided by "
        "a number of its own, which turns each row, at step 0 already",
    ),
}


@check_for(**diagnosis(_FAULTY_RUNS))
def diagnose_rows():
    """Every run has its fault. What shows it:"""


# ------------------------------------------------------------------ DoRALinear


def _linear(out, in_, bias=True):
    """Return a frozen layer, as `inject` passes it."""
    linear = nn.Linear(in_, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(_weight(out, in_) / math.sqrt(in_))
        if bias:
            linear.bias.normal_()
    return linear.requires_grad_(False)


_TRAINED = ["lora_A", "lora_B", "magnitude"]
_PARTS = (
    "the list of trainable parameters",
    "whether lora_A and lora_B both start at zero",
    "the magnitude right after construction",
    "the output for x = 0 (only the bias is left)",
    "the output right after construction (that of the base)",
    "the output once A, B and m are trained",
    *(f"the gradient of {name}" for name in (*_TRAINED, "x")),
)
_TRAINS, _DEAD, _START, _ZERO, _FIRST, _OUTPUT, *_GRADIENTS = _PARTS
_ONES = "the magnitude starts as ones, so that step 0 is not the base: start from ‖W‖"
_NO_BIAS = "the bias of the layer is lost"
_COLUMNS = "the norm is that of V's columns: dim=0 sums over the output rows"
_THROUGH = "a gradient flows through the norm, which is a constant: detach it"


class _Watched:
    """Build a layer of an answer's class, and return what `look` names of it: all of it if it
    names nothing."""

    def __init__(self, layer: type) -> None:
        self.layer, self.__name__ = layer, getattr(layer, "__name__", "")
        self.__module__ = module_of(layer)  # whose lines an error shows

    def __call__(self, linear, rank, alpha, look):
        module = self.layer(linear, rank, alpha)
        if not isinstance(module, nn.Module):
            raise TypeError(f"DoRALinear(linear, rank, alpha) returns {kind(module)}, not a module")
        with torch.enable_grad():
            return _seen(module, *look)


def _seen(module, looked=None, factors=None):
    """Return what a DoRALinear holds and computes, from its start to its gradients; a part that
    earlier parts make impossible, and one that is not looked at, is None."""
    trained = {n.rpartition(".")[2]: p for n, p in module.named_parameters() if p.requires_grad}
    seen, looked = dict.fromkeys(_PARTS), looked or _PARTS
    seen[_TRAINS] = sorted(trained)
    if seen[_TRAINS] != _TRAINED:
        return seen
    A, B, m = (trained[name] for name in _TRAINED)
    seen[_DEAD] = not (A.any() or B.any())
    if _START in looked:
        seen[_START] = m.detach().clone()
    if m.shape != B.shape[:1]:
        return seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 6, A.shape[1], requires_grad=True)
    with torch.no_grad():
        seen[_ZERO] = module(torch.zeros(3, A.shape[1])) if _ZERO in looked else None
        seen[_FIRST] = module(x) if _FIRST in looked else None
        for p, values in zip((A, B, m), factors or _any_factors(A, B, m), strict=True):
            p.copy_(values)
    if {_OUTPUT, *_GRADIENTS} & {*looked}:
        y = module(x)
        seen[_OUTPUT] = y.detach()
        if _GRADIENTS[0] in looked:
            seen |= dict(zip(_GRADIENTS, gradients_or_zeros(y, (A, B, m, x)), strict=True))
    return seen


def _any_factors(A, B, m):
    yield torch.randn(A.shape) / math.sqrt(A.shape[1])
    yield torch.randn(B.shape) * m.abs().clamp(0.05, 5)[:, None]
    yield m * (0.5 + torch.rand(m.shape))


def _layer_case(out, in_, rank, alpha, note="", bias=True, looked=None, bug=""):
    def make():
        factors = torch.randn(rank, in_) / math.sqrt(in_), torch.randn(out, rank)
        look = (looked, (*factors, 0.5 + torch.rand(out))) if looked else ()
        return [_linear(out, in_, bias), rank, alpha, look]

    return Case(make, note=note, bug=bug)


def _even_case(d, rank, alpha, bug):
    """Return a square layer whose V has rows and columns of one length."""

    def make():
        A, B = torch.randn(rank, d) / math.sqrt(d), torch.randn(d, rank)
        linear, V = _linear(d, d, bias=False), torch.linalg.qr(torch.randn(d, d)).Q
        with torch.no_grad():
            linear.weight.copy_(2 * V - alpha / rank * B @ A)
        return [linear, rank, alpha, ((_OUTPUT, *_GRADIENTS), (A, B, 0.5 + torch.rand(d)))]

    return Case(make, note="no bias; all rows and columns of V are 2 long", bug=bug)


def _described(note, linear, rank, alpha, look):
    called = f"linear {linear}, rank={rank}, alpha={alpha}"
    given = " (A, B and m get values)" if look and _START not in look[0] else ""
    return f"{called}{f' ({note})' if note else ''}{given}"


class _Right(nn.Module):
    """DoRA by its definition, row by row."""

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


@check_for(
    cases=[
        _layer_case(12, 20, 4, 10, looked=(_START,), bug=_ONES),
        _layer_case(14, 10, 2, 5, looked=(_ZERO,), bug=_NO_BIAS),
        _layer_case(18, 11, 3, 4.0, bias=False, looked=(_OUTPUT,), bug=_COLUMNS),
        _even_case(16, 4, 6, bug=_THROUGH),
        _layer_case(12, 20, 4, 10),
        _layer_case(20, 12, 3, 4.0),
        _layer_case(16, 16, 2, 5, note="a square weight"),
        _layer_case(14, 18, 4, 6, bias=False, note="a layer without a bias"),
    ],
    returns="",
    view=dict,
    staged=True,
    adapt=_Watched,
    describe=_described,
    causes=mistakes(
        """
        class DoRALinear(nn.Module):
            def __init__(self, linear, rank=8, alpha=16.0):
                super().__init__()
                self.base, self.s = linear, alpha / rank
                self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
                self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
                self.magnitude = nn.Parameter(linear.weight.norm(dim=1))

            def forward(self, x):
                W, m, bias = self.base.weight, self.magnitude, self.base.bias
                V = W + self.s * self.lora_B @ self.lora_A
                norm = V.norm(dim=1, keepdim=True).detach()
                direction = V / norm
                y = x @ (m[:, None] * direction).T
                return y if bias is None else y + bias
        """,
        """
        the magnitude starts as ones, so that step 0 is not the base: start from ‖W‖
            linear.weight.norm(dim=1) → torch.ones(linear.out_features)
        lora_A starts at zero as lora_B does, so that no gradient reaches either and BA stays
        zero: start A at random
            torch.randn(rank → torch.zeros(rank
        the magnitude holds the norms of W's columns: each output row has one
            weight.norm(dim=1) → weight.norm(dim=0)
        the magnitude has shape (out,): drop the dimension that keepdim=True kept
            weight.norm(dim=1) → weight.norm(dim=1, keepdim=True)
        the bias of the layer is lost
            y if bias is None else y + bias → y
        the bias is rescaled with the rows: it is added as it is
            y + bias → y + m / norm[:, 0] * bias
        the norm is that of V's columns: dim=0 sums over the output rows
            V.norm(dim=1, → V.norm(dim=0,
        V is divided by one norm for the whole matrix: each output row has its own
            V.norm(dim=1, keepdim=True) → V.norm()
        V is not divided by its norm, so that W's length counts twice
            V / norm → V
        the norm is that of W: compute the norm of V = W + s·BA in every forward pass
            V.norm( → W.norm(
        a gradient flows through the norm, which is a constant: detach it
            .detach() → ∅
        V is detached, so A and B learn nothing: detach its norm alone
            V / norm → V.detach() / norm
        the magnitude is detached and learns nothing: detach the norm alone
            m[:, None] → m.detach()[:, None]
        """,
    ),
)
def DoRALinear(linear, rank, alpha, look):
    """The layer is the base at step 0, computes DoRA once trained, and has DoRA's gradients."""
    return _seen(_Right(linear, rank, alpha), *look)
