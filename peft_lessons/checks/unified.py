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
    returns="u",
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
        the softmax is missing: this adapter's f is the identity
            scores.softmax(-1) → scores
        exp overflows for large scores: a softmax subtracts the maximum first
            scores.softmax(-1) → (scores.exp() / scores.exp().sum(-1, keepdim=True))
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
        x is added: u is what the virtual tokens give alone
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


def _states(*shape, scale, heads=None, gate=None):
    """h and a change, and one λ for each token and head: all of them `gate`, if given."""
    h, delta = torch.randn(shape), torch.randn(shape)
    if heads is None:
        return [h, delta, scale]
    shares = torch.rand(*shape[:-1], heads)
    return [h, delta, scale, shares if gate is None else torch.full_like(shares, gate)]


@check_for(
    cases=[
        Case(lambda: _states(2, 5, 8, scale=0.25), note="no gate"),
        Case(lambda: _states(2, 5, 8, scale=1.0), note="no gate"),
        Case(lambda: _states(2, 5, 8, scale=1.0, heads=4, gate=0.0), note="every λ is 0"),
        Case(lambda: _states(2, 5, 8, scale=3.0, heads=4, gate=1.0), note="every λ is 1"),
        Case(lambda: _states(2, 6, 9, scale=1.0, heads=1), note="one head"),
        Case(lambda: _states(2, 6, 9, scale=2.0, heads=1), note="one head"),
        Case(lambda: _states(2, 5, 12, scale=1.0, heads=3), note="three heads, four channels each"),
        Case(lambda: _states(2, 5, 12, scale=2.0, heads=3), note="three heads, four channels each"),
        Case(lambda: _states(6, 6, scale=-0.7, heads=6), note="a head for each channel, T = d"),
        Case(lambda: _states(2, 3, 4, 16, scale=1.5, heads=4), note="two dimensions before (T, d)"),
    ],
    returns="the new h",
    causes=mistakes(
        """
        def compose(h, delta, scale, gate=None):
            change = scale * delta
            if gate is None:
                return h + change
            gate = gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1)
            return (1 - gate) * h + gate * change
        """,
        """
        the scale is left out
            scale * → ∅
        with a gate the change is not scaled: where λ is 1 the result is s · delta
            gate * change → gate * delta
        h is scaled too: only the change is
            change = scale * delta → change = delta
            return h + change → return scale * (h + change)
            return (1 - gate) * h + gate * change → return scale * ((1 - gate) * h + gate * change)
        the gate is not used
            (1 - gate) * h + gate * change → h + change
        with a gate h goes on whole: h gives way, and where λ is 1 nothing of it is left
            (1 - gate) * h → h
        the gate fades the sum of both: where λ is 1 the result is s · delta
            * h + gate * change → * (h + change)
        the gate is turned round: where λ is 0 the result is h
            (1 - gate) * h + gate * change → gate * h + (1 - gate) * change
        the gate fades h alone: where λ is 0 nothing of the change comes in
            gate * change → change
        the gate is scaled with the change, so h fades by λ s: by λ alone
            1 - gate → 1 - gate * scale
        the gates are repeated as a whole, so that neighbouring channels belong to different heads:
        each head owns channels side by side (repeat_interleave)
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) →
                gate.repeat(*[1] * (gate.dim() - 1), h.shape[-1] // gate.shape[-1])
        one λ is used for all heads of a token: each head has its own
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) → gate.mean(-1, keepdim=True)
        the gate of the first head is used for all heads: each head has its own
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) → gate[..., :1]
        the gate of all zeros is taken for no gate: ask whether it is None
            gate is None → gate is None or not gate.any()
        """,
    ),
)
def compose(h, delta, scale, gate=None):
    """One function for simple, scaled and gated composition."""
    if gate is None:
        return torch.add(h, delta, alpha=scale)
    n = gate.shape[-1]
    heads = zip(h.chunk(n, -1), delta.chunk(n, -1), gate.split(1, -1), strict=True)
    return torch.cat([torch.lerp(a, scale * b, share.expand_as(a)) for a, b, share in heads], -1)


# ------------------------------------------------------------------ MyMethod


@Trials
def MyMethod():
    """It goes through all that the methods of the course go through."""
