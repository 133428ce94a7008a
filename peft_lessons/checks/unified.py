"""Checks of lesson 11."""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch

from ..engine import Method
from ..testing.conformance import CHECKS, OF_A_LESSON, Bench, MethodError
from ..testing.wording import kind, summary
from .calls import is_stub, lines_of
from .kit import Case, Refused, check_for
from .mistakes import mistakes


def _in_torch(function: Callable) -> Callable:
    """Return the function with a tensor in place of an array that it returns."""
    if not callable(function):
        return function

    @wraps(function)
    def answer(*args: Any) -> Any:
        __tracebackhide__ = True
        result = function(*args)
        return torch.from_numpy(result) if isinstance(result, np.ndarray) else result

    return answer


# ------------------------------------------------------------------ prefix_as_adapter


def _one_head(*batch, T=6, d=10, d_h=4, p=3, common=0.0, dtype=torch.float32):
    """Return the tensors of one head; `common` is added to all keys and makes all scores large."""
    shapes = [(*batch, T, d), (d_h, d), (p, d_h), (p, d_h)]
    x, w_q, prefix_k, prefix_v = (torch.randn(shape) for shape in shapes)
    return [t.to(dtype) for t in (x, w_q, prefix_k + common, prefix_v)]


@check_for(
    adapt=_in_torch,
    cases=[
        # All matrices are square first: one that is wrongly transposed then has its cause.
        Case(lambda: _one_head(T=6, d=6, d_h=6, p=6), note="T = d = d_h = p"),
        Case(lambda: _one_head()),
        Case(lambda: _one_head(T=4, d=8, d_h=8, p=5), note="d = d_h, so w_q is square"),
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
        the scores are divided by d_h: divide them by √d_h
            ** 0.5 → ∅
        the scores are multiplied by √d_h: divide them by it
            / root → * root
        the scores are divided by √d, the width of the model: divide them by √d_h, that of the head
            w_q.shape[0] → w_q.shape[1]
        the scores are divided by √p: divide them by √d_h
            w_q.shape[0] → prefix_k.shape[0]
        the weights are divided by √d_h after the softmax: divide the scores before it
            / root → ∅
            scores.softmax(-1) → scores.softmax(-1) / root
        the softmax is taken over the tokens: take it over the p virtual tokens
            softmax(-1) → softmax(-2)
        the softmax is missing: the f of this adapter is not the identity
            scores.softmax(-1) → scores
        the softmax and the division by √d_h are missing
            / root → ∅
            scores.softmax(-1) → scores
        the softmax is taken of the result: take it of the scores
            weights @ prefix_v → (scores @ prefix_v).softmax(-1)
        the softmax is taken of W_downᵀ alone: multiply x by W_downᵀ first
            x @ w_q.T @ prefix_k.T / root → x @ (w_q.T @ prefix_k.T / root).softmax(-1)
            scores.softmax(-1) → scores
        the softmax is taken of the queries: take it of the scores
            x @ w_q.T @ prefix_k.T / root → (x @ w_q.T / root).softmax(-1) @ prefix_k.T
            scores.softmax(-1) → scores
        exp is not divided by its sum over the virtual tokens
            scores.softmax(-1) → scores.exp()
        exp overflows for large scores: a softmax subtracts the maximum first
            scores.softmax(-1) → (scores.exp() / scores.exp().sum(-1, keepdim=True))
        exp underflows where a row is far below the maximum of all scores: subtract the maximum of
        each row
            weights = scores.softmax(-1) →
                e = (scores - scores.max()).exp(); weights = e / e.sum(-1, keepdim=True)
        f is ReLU, as in an adapter: a prefix has softmax
            scores.softmax(-1) → scores.relu()
        f is GELU, as in an adapter: a prefix has softmax
            scores.softmax(-1) → F.gelu(scores)
        the keys and values of the prefix are swapped
            prefix_k.T → prefix_v.T
            weights @ prefix_v → weights @ prefix_k
        the keys of the prefix are used as its values too
            weights @ prefix_v → weights @ prefix_k
        the values of the prefix are used as its keys too
            prefix_k.T → prefix_v.T
        w_q is (d_h, d) and must be transposed: x W_qᵀ
            w_q.T → (w_q if len(w_q) == w_q.shape[1] else w_q.T)
        prefix_k is (p, d_h) and must be transposed: q P_kᵀ
            prefix_k.T → (prefix_k if len(prefix_k) == prefix_k.shape[1] else prefix_k.T)
        prefix_v is (p, d_h) and must not be transposed: W_upᵀ is prefix_v itself
            weights @ prefix_v →
                weights @ (prefix_v.T if len(prefix_v) == prefix_v.shape[1] else prefix_v)
        w_q is left out: the keys meet the queries x W_qᵀ, not x
            x @ w_q.T @ → x @ torch.eye(*w_q.shape).to(x).T @
        every token sees the whole prefix: leave out the causal mask
            scores.softmax → (scores + torch.full_like(scores, -torch.inf).triu(1)).softmax
        the result holds the weights of the virtual tokens: multiply them with prefix_v
            weights @ prefix_v → weights
        x is added: u is the contribution of the virtual tokens alone
            @ prefix_v → @ prefix_v + (x if x.shape[-1] == len(w_q) else 0)
        the queries are added: u is the contribution of the virtual tokens alone
            @ prefix_v → @ prefix_v + x @ w_q.T
        """,
    ),
)
def prefix_as_adapter(x, w_q, prefix_k, prefix_v):
    """In one head a prefix is an adapter of width p whose f is softmax."""
    down = torch.stack([w_q.T @ key for key in prefix_k]) / w_q.shape[0] ** 0.5  # (p, d)
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        weights = torch.stack([token @ row for row in down]).softmax(0)
        rows.append(sum(w * value for w, value in zip(weights, prefix_v, strict=True)))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


# ------------------------------------------------------------------ compose


def _states(*shape, scale, heads=None, gate=None):
    """Return h, a change, and one λ for each token and head, all equal to `gate` if given."""
    h, delta = torch.randn(shape), torch.randn(shape)
    if heads is None:
        return [h, delta, scale]
    shares = torch.rand(*shape[:-1], heads)
    return [h, delta, scale, shares if gate is None else torch.full_like(shares, gate)]


@check_for(
    adapt=_in_torch,
    cases=[
        Case(lambda: _states(2, 5, 8, scale=0.25), note="no gate"),
        Case(lambda: _states(2, 5, 8, scale=1.0), note="no gate"),
        Case(
            lambda: _states(2, 5, 8, scale=1.0, heads=4, gate=0.0),
            note="four heads, two channels each; every λ is 0",
        ),
        Case(
            lambda: _states(2, 5, 8, scale=3.0, heads=4, gate=1.0),
            note="four heads, two channels each; every λ is 1",
        ),
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
        without a gate the change is not scaled
            return h + change → return h + delta
        with a gate the change is not scaled: where λ is 1 the result is s · delta
            gate * change → gate * delta
        h is scaled too: scale the change alone
            change = scale * delta → change = delta
            return h + change → return scale * (h + change)
            return (1 - gate) * h + gate * change → return scale * ((1 - gate) * h + gate * change)
        with a gate h is scaled too: scale the change alone
            return (1 - gate) * h + gate * change → return scale * ((1 - gate) * h + gate * delta)
        the change is returned alone: without a gate add h
            return h + change → return change
        the gate is not used
            (1 - gate) * h + gate * change → h + change
        with a gate h is not scaled: multiply h by 1 − λ, so that nothing of h is left where λ is 1
            (1 - gate) * h → h
        with a gate h is not scaled, and the change fades as λ grows: multiply h by 1 − λ and the
        change by λ
            (1 - gate) * h + gate * change → h + (1 - gate) * change
        the gate fades the sum of both: where λ is 1 the result is s · delta
            * h + gate * change → * (h + change)
        the gate multiplies the sum of both: where λ is 0 the result is h
            (1 - gate) * h + gate * change → gate * (h + change)
        the gate is reversed: where λ is 0 the result is h
            (1 - gate) * h + gate * change → gate * h + (1 - gate) * change
        the gate scales h alone: where λ is 0, nothing of the change may be added
            gate * change → change
        the scale multiplies the gate, so h fades by λ s: let it fade by λ alone
            1 - gate → 1 - gate * scale
        the gates are repeated as a whole, so that neighbouring channels belong to different heads:
        each head owns adjacent channels (repeat_interleave)
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) →
                gate.repeat(*[1] * (gate.dim() - 1), h.shape[-1] // gate.shape[-1])
        the mean of a token's λ is used for all its heads: each head has its own
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) → gate.mean(-1, keepdim=True)
        the λ of the first head is used for all heads: each head has its own
            gate.repeat_interleave(h.shape[-1] // gate.shape[-1], -1) → gate[..., :1]
        a gate of zeros is treated as no gate: check whether the gate is None
            gate is None → gate is None or not gate.any()
        """,
    ),
)
def compose(h, delta, scale, gate=None):
    """One function does the simple, the scaled and the gated composition."""
    if gate is None:
        return torch.add(h, delta, alpha=scale)
    n = gate.shape[-1]
    heads = zip(h.chunk(n, -1), delta.chunk(n, -1), gate.split(1, -1), strict=True)
    return torch.cat([torch.lerp(a, scale * b, share.expand_as(a)) for a, b, share in heads], -1)


# ------------------------------------------------------------------ MyMethod

_HINTS = {"before Module.__init__() call": "Call super().__init__(linear) first in your layer."}


def _method_class(answer: Any) -> type[Method]:
    """Return a learner's class of methods; raise `Refused` if it is none."""
    if isinstance(answer, Method):
        raise Refused("pass the class itself, not an instance of it")
    if not (isinstance(answer, type) and issubclass(answer, Method)):
        what = "this class" if isinstance(answer, type) else kind(answer)
        raise Refused(f"{what} is not a method: write class MyMethod(Method)")
    return answer


def _trial(check: Callable[[Method, Bench], str]) -> Callable[[type[Method]], str]:
    def trial(cls: type[Method]) -> str:
        method = _made(cls)
        try:
            return check(method, Bench(start=float("inf")))
        except MethodError as error:
            raise Refused(*error.args) from None

    return trial


def _made(cls: type[Method]) -> Method:
    try:
        return cls()
    except Exception as error:
        if is_stub(error, cls.__module__):
            raise
        names = [repr(p.name) for p in _required(cls)]
        missing = [f"{' and '.join(names)} has no default."] if names else []
        facts = *getattr(error, "__notes__", []), *missing, *lines_of(error, cls.__module__)[-2:]
        raise Refused(f"MyMethod() raised {summary(error)}", *facts) from error


def _required(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass without a default."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    missing = dataclasses.MISSING
    return [f for f in fields if f.default is missing and f.default_factory is missing]


_TRIALS = {_trial(check): CHECKS[check] for check in OF_A_LESSON}


def _with_what_is_allowed(facts: list[str]) -> str:
    """Say what the trials allow and a reader may not expect."""
    moved = any("step 0 is not the base" in fact for fact in facts)
    start = "Note that training does not start from the base, which is allowed. "
    return (
        f"{start if moved else ''}Verified: {'; '.join(facts)}. "
        "Only you know whether Δh is an idea of your own."
    )


@check_for(trials=_TRIALS, hints=_HINTS, adapt=_method_class, verified=_with_what_is_allowed)
def MyMethod():
    """It passes every check that the course's methods pass."""
