"""Checks of lesson 11."""

import torch

from .kit import Case, check_for
from .mistakes import mistakes
from .trials import Trials

# ------------------------------------------------------------------ prefix_as_adapter


def _one_head(*batch, T=6, d=10, d_h=4, p=3, common=0.0, dtype=torch.float32):
    """`common` is what all keys have in common, with which all scores of a token are large."""
    shapes = [(*batch, T, d), (d_h, d), (p, d_h), (p, d_h)]
    x, w_q, prefix_k, prefix_v = (torch.randn(shape) for shape in shapes)
    return [t.to(dtype) for t in (x, w_q, prefix_k + common, prefix_v)]


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
    causes=mistakes(
        """
        def prefix_as_adapter(x, w_q, prefix_k, prefix_v):
            root = w_q.shape[0] ** 0.5
            scores = x @ w_q.T @ prefix_k.T / root
            weights = scores.softmax(-1)
            return weights @ prefix_v
        """,
        """
        the scores are not divided by √d_h
            / root → ∅
        the scores are divided by d_h: by its root
            ** 0.5 → ∅
        the scores are divided by √d, the model's width: by that of the head, √d_h
            w_q.shape[0] → w_q.shape[1]
        the softmax is taken over the tokens: over the p virtual ones
            softmax(-1) → softmax(-2)
        the softmax is missing: this adapter's f is identity
            scores.softmax(-1) → scores
        f is ReLU here, as in an adapter: a prefix has softmax
            scores.softmax(-1) → scores.relu()
        the prefix's keys and values are swapped
            prefix_k.T → prefix_v.T
            weights @ prefix_v → weights @ prefix_k
        the prefix's keys are used as its values too
            weights @ prefix_v → weights @ prefix_k
        w_q is (d_h, d) and must be transposed: x W_qᵀ
            w_q.T → (w_q if len(w_q) == w_q.shape[1] else w_q.T)
        a causal mask lies over the prefix: every token sees all of it
            scores.softmax → (scores + torch.full_like(scores, -torch.inf).triu(1)).softmax
        these are the weights of the virtual tokens: times their values
            weights @ prefix_v → weights
        x is added: Δh is the change alone
            @ prefix_v → @ prefix_v + (x if x.shape[-1] == len(w_q) else 0)
        """,
    ),
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


def _states(*shape, scale, gate=None, dtype=torch.float32):
    """h and Δ, and a gate: None, a number, or (a shape to draw one from)."""
    h, delta = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if isinstance(gate, tuple):
        gate = torch.rand(gate).to(dtype)
    return [h, delta, scale, gate]


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
    ],
    returns="the new h",
    gradients=("h", "delta", "gate"),
    causes=mistakes(
        """
        def compose(h, delta, scale, gate=None):
            change = scale * delta
            if gate is None:
                new = h + change
            else:
                new = (1 - gate) * h + gate * change
            return new
        """,
        """
        the scale is left out
            scale * → ∅
        the scale is left out where there is a gate
            gate * change → gate * delta
        h is scaled too: only the change is
            scale * → ∅
            return new → return (scale * new)
        the gate is not used
            (1 - gate) * h + gate * change → h + change
        with a gate h goes on whole: it fades as the change comes in, (1 − λ) h
            (1 - gate) * h → h
        the gate fades the sum of both: h alone fades, and the change comes in by λ
            * h + gate * change → * (h + change)
        the gate is turned round: λ is the share of the change
            (1 - gate) * h + gate * change → gate * h + (1 - gate) * change
        the gate fades h alone: the change is multiplied by λ
            gate * change → change
        the gate is scaled with the change, so h fades by 1 − λ s: by 1 − λ
            1 - gate → 1 - gate * scale
        a gate of 0 is taken for none: ask `gate is None`
            gate is None → gate is None or (isinstance(gate, float) and not gate)
        the gate is laid along the channels: its last dimension is 1, one number a token
            new = (1 → gate = gate.mT if h.shape[-1] == h.shape[-2] else gate; new = (1
        """,
    ),
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
