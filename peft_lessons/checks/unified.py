"""Checks of lesson 11."""

import torch

from .kit import Case, check_for
from .trials import Trials

# ------------------------------------------------------------------ prefix_as_adapter


def _one_head(*batch, T=6, d=10, d_h=4, p=3, common=0.0, dtype=torch.float32):
    """`common` is what all keys have in common, with which all scores of a token are large."""
    shapes = [(*batch, T, d), (d_h, d), (p, d_h), (p, d_h)]
    x, w_q, prefix_k, prefix_v = (torch.randn(shape) for shape in shapes)
    return [t.to(dtype) for t in (x, w_q, prefix_k + common, prefix_v)]


def _adapter(
    q=lambda x, w_q: x @ w_q.T,
    root=lambda x, pk: pk.shape[-1] ** 0.5,
    f=lambda s: s.softmax(-1),
    up=lambda weights, pk, pv: weights @ pv,
    after=lambda y, x, w_q, s: y,
):
    """prefix_as_adapter with its steps open to be done wrongly."""

    def prefix_as_adapter(x, w_q, prefix_k, prefix_v):
        s = q(x, w_q) @ prefix_k.T / root(x, prefix_k)
        return after(up(f(s), prefix_k, prefix_v), x, w_q, s)

    return prefix_as_adapter


def _swapped(x, w_q, prefix_k, prefix_v):
    return _adapter()(x, w_q, prefix_v, prefix_k)


def _causal(s):
    T, p = s.shape[-2:]
    return s.masked_fill(~torch.ones(T, p, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def _half_open(y, x, w_q, s):
    """The gate that the prefix would have beside one key of score 0."""
    return s.logsumexp(-1, keepdim=True).sigmoid() * y


@check_for(
    cases=[
        Case(lambda: _one_head()),
        Case(lambda: _one_head(T=4, d=8, d_h=8, p=5), note="d = d_h, so w_q is square"),
        Case(lambda: _one_head(T=6, d=6, d_h=6, p=6), note="T = d = d_h = p"),
        Case(lambda: _one_head(T=5, p=1), note="a single virtual token"),
        Case(lambda: _one_head(T=1, p=4), note="a single token"),
        Case(lambda: _one_head(3, T=5, d=12, d_h=6, p=4), note="a batch"),
        Case(lambda: _one_head(2, 3, T=4), note="two dimensions before (T, d)"),
        Case(lambda: _one_head(2, dtype=torch.float64)),
        Case(lambda: _one_head(common=1000.0, dtype=torch.float64), note="large scores"),
    ],
    returns="Δh",
    gradients=("x", "w_q", "prefix_k", "prefix_v"),
    causes={
        "the scores are not divided by √d_h": _adapter(root=lambda x, pk: 1.0),
        "the scores are divided by d_h: by its root": _adapter(root=lambda x, pk: pk.shape[-1]),
        "the scores are divided by √d, the model's width: by that of the head, √d_h": _adapter(
            root=lambda x, pk: x.shape[-1] ** 0.5
        ),
        "the scores are divided by √p: by that of the head's width, √d_h": _adapter(
            root=lambda x, pk: len(pk) ** 0.5
        ),
        "the scores are multiplied by √d_h: divide": _adapter(
            root=lambda x, pk: pk.shape[-1] ** -0.5
        ),
        "the softmax is taken over the tokens: over the p virtual ones": _adapter(
            f=lambda s: s.softmax(-2)
        ),
        "the softmax is missing: this adapter's f is identity": _adapter(f=lambda s: s),
        "f is ReLU here, as in an adapter: a prefix has softmax": _adapter(f=torch.relu),
        "f is the sigmoid: the weights of softmax add up to 1": _adapter(f=torch.sigmoid),
        (
            "the exponentials are not divided by their sum: the weights of softmax add up to 1"
        ): _adapter(f=torch.exp),
        "the prefix's keys and values are swapped": _swapped,
        "the prefix's keys are used as its values too": _adapter(
            up=lambda weights, pk, pv: weights @ pk
        ),
        "w_q is (d_h, d) and must be transposed: x W_qᵀ": _adapter(
            q=lambda x, w_q: x @ w_q if w_q.shape[0] == w_q.shape[1] else x @ w_q.T
        ),
        "w_q is left out: the queries are x W_qᵀ": _adapter(
            q=lambda x, w_q: x if w_q.shape[0] == w_q.shape[1] else x @ w_q.T
        ),
        "a causal mask lies over the prefix: every token sees all of it": _adapter(f=_causal),
        "these are the weights of the virtual tokens: times their values": _adapter(
            up=lambda weights, pk, pv: weights
        ),
        "the values are averaged: weighted by how well query and key agree": _adapter(
            f=lambda s: torch.full_like(s, 1 / s.shape[-1])
        ),
        (
            "a gate is in it already: Δh alone is asked for, and λ belongs to how it is composed"
        ): _adapter(after=_half_open),
        "x is added: Δh is the change alone": _adapter(
            after=lambda y, x, w_q, s: y + x if y.shape == x.shape else y
        ),
        "the queries are added: Δh is the change alone": _adapter(
            after=lambda y, x, w_q, s: y + x @ w_q.T
        ),
        "it is divided by p: the weights of softmax add up to 1 already": _adapter(
            after=lambda y, x, w_q, s: y / s.shape[-1]
        ),
    },
)
def prefix_as_adapter(x, w_q, prefix_k, prefix_v):
    """A head's prefix is an adapter of width p with softmax for its f."""
    down = torch.stack([w_q.T @ key for key in prefix_k]) / w_q.shape[0] ** 0.5  # (p, d)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        weights = torch.stack([token @ row for row in down]).softmax(0)
        rows.append(sum(w * value for w, value in zip(weights, prefix_v, strict=True)))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


# ------------------------------------------------------------------ compose


def _states(*shape, scale, gate=None, dtype=torch.float32, delta_dtype=None):
    """h and Δ, and a gate: None, a number, or (a shape to draw one from)."""
    h, delta = torch.randn(shape).to(dtype), torch.randn(shape).to(delta_dtype or dtype)
    if isinstance(gate, tuple):
        gate = torch.rand(gate).to(delta_dtype or dtype)
    return [h, delta, scale, gate]


def _composed(plain=lambda h, D, s: h + s * D, mixed=lambda h, D, s, g: (1 - g) * h + g * s * D):
    """A wrong compose by what it does without a gate and with one."""

    def compose(h, delta, scale, gate=None):
        new = plain(h, delta, scale) if gate is None else mixed(h, delta, scale, gate)
        return new.to(h.dtype)

    return compose


def _zero_is_none(h, delta, scale, gate=None):
    zero = not isinstance(gate, torch.Tensor) and not gate
    return _composed()(h, delta, scale, None if zero else gate)


def _squeezed(h, delta, scale, gate=None):
    """A gate a token, laid along the channels where these are as many as the tokens."""
    if isinstance(gate, torch.Tensor) and gate.dim() and h.shape[-1] == h.shape[-2]:
        gate = gate.mT
    return _composed()(h, delta, scale, gate)


@check_for(
    cases=[
        Case(lambda: _states(2, 5, 8, scale=0.25), note="no gate"),
        Case(lambda: _states(2, 5, 8, scale=1.0), note="no gate"),
        Case(lambda: _states(2, 5, 8, scale=4.0, gate=0.3)),
        Case(lambda: _states(5, 8, scale=0.5, gate=0.0), note="a gate that is shut"),
        Case(lambda: _states(5, 8, scale=3.0, gate=1.0), note="a gate that is wide open"),
        Case(lambda: _states(2, 6, 9, scale=2.0, gate=(2, 6, 1)), note="a gate for each token"),
        Case(lambda: _states(2, 7, 7, scale=0.7, gate=(2, 7, 1)), note="T = d"),
        Case(lambda: _states(2, 3, 4, 6, scale=1.5, gate=(2, 3, 4, 1)), note="heads"),
        Case(lambda: _states(4, 6, scale=-1.0, gate=()), note="the gate is a tensor of one number"),
        Case(lambda: _states(3, 4, 6, scale=2.0, gate=(3, 4, 1), dtype=torch.float64)),
        Case(
            lambda: _states(3, 6, 8, scale=2.0, dtype=torch.bfloat16, delta_dtype=torch.float32),
            note="h in 16 bits, the change in float32",
        ),
        Case(
            lambda: _states(
                3,
                6,
                8,
                scale=2.0,
                gate=(3, 6, 1),
                dtype=torch.bfloat16,
                delta_dtype=torch.float32,
            ),
            note="h in 16 bits, change and gate in float32",
        ),
    ],
    returns="the new h",
    gradients=("h", "delta", "gate"),
    causes={
        "the scale is left out": _composed(
            lambda h, D, s: h + D, lambda h, D, s, g: (1 - g) * h + g * D
        ),
        "the scale is left out where there is no gate": _composed(plain=lambda h, D, s: h + D),
        "the scale is left out where there is a gate": _composed(
            mixed=lambda h, D, s, g: (1 - g) * h + g * D
        ),
        "h is scaled too: only the change is": _composed(
            lambda h, D, s: s * (h + D), lambda h, D, s, g: s * ((1 - g) * h + g * D)
        ),
        "with a gate h is scaled too: only the change is": _composed(
            mixed=lambda h, D, s, g: s * ((1 - g) * h + g * D)
        ),
        "the scale is divided by: multiply": _composed(
            lambda h, D, s: h + D / s, lambda h, D, s, g: (1 - g) * h + g * D / s
        ),
        "h is lost where there is no gate": _composed(plain=lambda h, D, s: s * D),
        "the change is subtracted": _composed(
            lambda h, D, s: h - s * D, lambda h, D, s, g: (1 - g) * h - g * s * D
        ),
        "the gate is not used": _composed(mixed=lambda h, D, s, g: h + s * D),
        "with a gate h goes on whole: it fades as the change comes in, (1 − λ) h": _composed(
            mixed=lambda h, D, s, g: h + g * s * D
        ),
        "the gate fades the sum of both: h alone fades, and the change comes in by λ": _composed(
            mixed=lambda h, D, s, g: (1 - g) * (h + s * D)
        ),
        "the gate is turned round: λ is the share of the change": _composed(
            mixed=lambda h, D, s, g: g * h + (1 - g) * s * D
        ),
        "the gate fades h alone: the change is multiplied by λ": _composed(
            mixed=lambda h, D, s, g: (1 - g) * h + s * D
        ),
        "the gate is scaled with the change, so h fades by 1 − λ s: by 1 − λ": _composed(
            mixed=lambda h, D, s, g: (1 - g * s) * h + g * s * D
        ),
        "a sigmoid is taken of the gate: it is the share λ itself": _composed(
            mixed=lambda h, D, s, g: _composed()(h, D, s, torch.as_tensor(g).sigmoid())
        ),
        "a gate of 0 is taken for none: ask `gate is None`": _zero_is_none,
        (
            "the gate is laid along the channels: its last dimension is 1, one number a token"
        ): _squeezed,
        "the gates are averaged: each token has its own": _composed(
            mixed=lambda h, D, s, g: _composed()(
                h, D, s, g.mean() if isinstance(g, torch.Tensor) else g
            )
        ),
    },
)
def compose(h, delta, scale, gate=None):
    """What a change does to a hidden state, added or mixed in."""
    share = torch.as_tensor(1.0 if gate is None else gate).double().expand(*h.shape[:-1], 1)
    kept = 1.0 if gate is None else 1 - share
    return (kept * h.double() + (share * scale) * delta.double()).to(h.dtype)


# ------------------------------------------------------------------ MyMethod


@Trials
def MyMethod():
    """It goes through all that the methods of the course go through."""
