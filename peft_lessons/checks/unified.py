"""Checks of lesson 11."""

import dataclasses
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import torch

from ..engine import Method, injected_copy, injection_of
from ..methods.adapters import BottleneckAdapter
from ..methods.ia3 import IA3, ON_BERT
from ..methods.lora import LoRA
from ..methods.prefix import Prefix
from ..methods.selective import BitFit
from ..methods.unified import prober
from ..testing.conformance import CHECKS, OF_A_LESSON, Bench, MethodError
from ..testing.tiny import perturb, tiny_bert
from ..testing.wording import kind, summary
from .calls import is_stub, lines_of, seeded
from .compare import difference
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


# ------------------------------------------------------------------ name_the_kind

_KINDS = {"lora": "LoRA", "bitfit": "BitFit", "ia3": "(IA)³", "prefix": "prefix"}
_KINDS |= {"adapter": "adapter"}
_ON_VALUE = ("lora", "bitfit", "ia3")
_VARIES = "at the value layer, Δh differs from token to token, and a bias adds the same to all"
_EVIDENCE = {  # of (what it is, what an answer says)
    ("lora", "bitfit"): _VARIES,
    ("lora", "ia3"): "at the value layer, no fixed factor for each channel makes h the new h",
    ("ia3", "bitfit"): _VARIES,
    ("ia3", "lora"): "at the value layer, the new h is up to rounding h times a fixed factor for "
    "each channel",
    ("bitfit", "lora"): "at the value layer, Δh is up to rounding the same vector for every token, "
    "so no matrix made it of x",
    ("bitfit", "ia3"): "at the value layer, Δh is up to rounding the same vector for every token, "
    "whatever h is",
    ("prefix", "adapter"): "the attention has changed, and an adapter comes after the attention",
    ("adapter", "prefix"): "the attention has not changed, and the block has",
}
_FEW = "(IA)³ with all but four knobs at 1"
_UNBIASED = "(IA)³ on a base whose value biases are 0"


def _shown(held: str, result: str) -> str:
    """Return what a probe shows that speaks for what it holds and against what an answer says."""
    if held in _ON_VALUE:
        other = "a prefix leaves" if result == "prefix" else "an adapter leaves"
        said = f"the value layer has changed, which {other} as it is"
    else:
        said = f"the value layer has not changed, so it is no {_KINDS[result]}"
    return _EVIDENCE.get((held, result), said)


@cache
def _suspects() -> list[tuple[str, str, int, Callable]]:
    """Return (what it holds, in words, d, probe) for each model that is to be named."""
    qv, qkv, on_bert = ("query", "value"), ("query", "key", "value"), IA3(**ON_BERT)
    made = (
        ("lora", "LoRA of rank 4 on query and value", 32, LoRA(4, 8.0, qv)),
        ("ia3", "(IA)³", 32, on_bert),
        ("bitfit", "BitFit", 32, BitFit()),
        ("prefix", "a prefix of 5 virtual tokens", 32, Prefix(5)),
        ("adapter", "Pfeiffer's adapter", 32, BottleneckAdapter(6, "pfeiffer")),
        ("lora", "LoRA of rank 1 on query, key and value", 48, LoRA(1, 2.0, qkv)),
        ("prefix", "a prefix of one virtual token", 48, Prefix(1)),
        ("adapter", "Houlsby's adapter", 48, BottleneckAdapter(4, "houlsby")),
        ("ia3", _FEW, 32, on_bert),
        ("adapter", "a parallel adapter", 32, BottleneckAdapter(8, "parallel", scale=4.0)),
        ("bitfit", "BitFit", 64, BitFit()),
        ("lora", "LoRA of rank 8 on the value layer alone", 64, LoRA(8, 8.0, ("value",))),
        ("ia3", _UNBIASED, 48, on_bert),
    )
    suspects = []
    for number, (held, what, d, method) in enumerate(made):
        base, block = tiny_bert(number, hidden_size=d).double(), number % 2
        if what == _UNBIASED:
            base.bert.encoder.layer[block].attention.self.value.bias.data.zero_()
        changed = perturb(injected_copy(base, method), seed=number)
        if what == _FEW:
            for layer in injection_of(changed).wrappers.values():
                layer.l.data.view(-1)[4:] = 1.0
        suspects.append((held, what, d, prober(base, changed, block)))
    return suspects


def _names_of(function: Callable) -> list:
    """Return what a function says of each suspect; Refused if it says something else."""
    names, asked = [], []
    with seeded():
        suspects = _suspects()
    for number, (_, what, d, probe) in enumerate(suspects):

        def counted(where, x, probe=probe):
            asked.append(where)
            return probe(where, x)

        with seeded(number):
            name = function(counted, torch.randn(4, 16, d, dtype=torch.float64))
        if not isinstance(name, str):
            raise Refused(difference(name, "lora") or "the result is no string", f"Here: {what}.")
        names.append(name)
        if name not in _KINDS:
            raise Refused(f"{name!r} is not one of {', '.join(map(repr, _KINDS))}")
    if not asked:
        raise Refused("your function never calls probe, and nothing else tells the kinds")
    return names


def _names_all(function: Callable) -> str:
    names, suspects = _names_of(function), _suspects()
    wrong = [(n, *s[:2]) for n, s in zip(names, suspects, strict=True) if n != s[0]]
    if not wrong:
        return f"{len(suspects)} models, of ranks, widths, places and bases that you had not seen"
    name, held, what = wrong[0]
    facts = [f"Here, {what}: {name!r}, expected {held!r}.", f"Look: {_shown(held, name)}."]
    causes = name_the_kind.causes.items()
    named = [why for why, other in causes if _names_of(other) == names]
    facts += [f"Likely cause: {', or '.join(named)}."] if named else []
    raise Refused(f"{len(suspects) - len(wrong)} of {len(suspects)} models are named right", *facts)


@check_for(
    trials={_names_all: "your function"},
    causes=mistakes(
        """
        def name_the_kind(probe, x):
            h, new = probe("value", x)
            change = new - h
            if torch.allclose(new, h):
                h, new = probe("attention", x)
                return "adapter" if torch.allclose(new, h) else "prefix"
            if torch.allclose(change, change[:1, :1]):
                return "bitfit"
            factor = (h * change).sum((0, 1)) / (h * h).sum((0, 1))
            return "ia3" if torch.allclose(change, factor * h) else "lora"
        """,
        """
        a low rank is taken for LoRA's, but an (IA)³ that turns few channels has one too
            torch.allclose(change, factor * h) → torch.linalg.matrix_rank(change.flatten(0, 1)) > 8
        a Δh that is linear in x is taken for LoRA's: that of (IA)³ is linear too where the layer's
        bias is 0
            torch.allclose(change, factor * h) →
                not torch.allclose(*probe("value", torch.zeros_like(x)))
        prefix and adapter are swapped: a prefix acts in the attention, an adapter after it
            "adapter" if torch.allclose(new, h) else "prefix" →
                "prefix" if torch.allclose(new, h) else "adapter"
        prefix and adapter are not told apart: both change the block, and only a prefix changes the
        attention
            h, new = probe("attention", x) → h, new = probe("block", x)
        the output of the attention stands for the value layer: the attention mixes the tokens, so
        there Δh is neither constant nor a multiple of h
            return "adapter" if torch.allclose(new, h) else "prefix" → return "adapter"
            probe("value", x) → probe("attention", x)
        """,
    ),
    verified=lambda facts: f"Verified on {facts[0]}.",
)
def name_the_kind(probe, x):
    """The function names the method of each model from what its modules give."""


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
