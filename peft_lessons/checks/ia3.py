"""Checks of lesson 07."""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from .kit import Case, check_for, gradients_of

# ------------------------------------------------------------------ ia3_sizes


def _llama(hidden, heads, kv, ff, **more):
    from transformers import LlamaConfig

    sizes = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv)
    return LlamaConfig(**sizes, intermediate_size=ff, num_hidden_layers=3, **more)


def _gemma():
    from transformers import GemmaConfig

    sizes = dict(hidden_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    return GemmaConfig(**sizes, intermediate_size=160, num_hidden_layers=2)


def _qwen2():
    from transformers import Qwen2Config

    sizes = dict(hidden_size=112, num_attention_heads=14, num_key_value_heads=2)
    return Qwen2Config(**sizes, intermediate_size=304, num_hidden_layers=2)


def _bert():
    from transformers import BertConfig

    sizes = dict(hidden_size=96, num_attention_heads=6, intermediate_size=384)
    return BertConfig(**sizes, num_hidden_layers=3)


@cache
def _measured(text):
    """The widths of the layers themselves, in a model without values."""
    import json

    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**json.loads(text)))
    layers = [m for m in model.named_modules() if isinstance(m[1], nn.Linear)]

    def one(*endings):
        return next(layer for path, layer in layers if path.endswith(endings))

    k, v = one("k_proj", "self.key"), one("v_proj", "self.value")
    ff = one("down_proj", "0.output.dense")
    return {"k": k.out_features, "v": v.out_features, "ff": ff.in_features}


def _n_kv(c):
    return getattr(c, "num_key_value_heads", None) or c.num_attention_heads


def _d_h(c):
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def _width(c):
    return _n_kv(c) * _d_h(c)


def _intermediate(c):
    return c.intermediate_size


def _sizes(k=_width, v=None, ff=_intermediate):
    """A wrong ia3_sizes by one of its numbers."""
    return lambda config: {"k": k(config), "v": (v or k)(config), "ff": ff(config)}


@check_for(
    cases=[
        Case(lambda: [_llama(128, 8, 2, 352)], note="a Llama: 8 query heads, 2 key-value heads"),
        Case(lambda: [_llama(96, 4, 4, 256)], note="a Llama without groups"),
        Case(lambda: [_qwen2()], note="a Qwen2: 14 query heads, 2 key-value heads"),
        Case(lambda: [_gemma()], note="a Gemma: head_dim=32 is not hidden_size / heads = 24"),
        Case(lambda: [_bert()], note="a BERT: its config has no num_key_value_heads"),
    ],
    returns="the result",
    causes={
        (
            "keys and values are taken for as wide as the model: there are fewer key-value heads "
            "than query heads"
        ): _sizes(k=lambda c: c.hidden_size),
        "the query heads are counted: keys and values have num_key_value_heads": _sizes(
            k=lambda c: c.num_attention_heads * _d_h(c)
        ),
        "only the keys are narrow here: the values have as many heads": _sizes(
            v=lambda c: c.hidden_size
        ),
        "only the values are narrow here: the keys have as many heads": _sizes(
            k=lambda c: c.hidden_size, v=_width
        ),
        "this is the number of key-value heads: times the head's width": _sizes(k=_n_kv),
        "this is the width of one head: times the key-value heads": _sizes(k=_d_h),
        "head_dim is not looked at: where the config has one, it counts": _sizes(
            k=lambda c: _n_kv(c) * (c.hidden_size // c.num_attention_heads)
        ),
        "the keys and values are counted together: each has a vector of its own": _sizes(
            k=lambda c: 2 * _width(c)
        ),
        "these are the vectors of all layers: one block is asked for": lambda c: {
            n: c.num_hidden_layers * s for n, s in _sizes()(c).items()
        },
        "ff is the output of the feed-forward: its inner activations are scaled": _sizes(
            ff=lambda c: c.hidden_size
        ),
        "ff is not always four times the model's width: the config says intermediate_size": _sizes(
            ff=lambda c: 4 * c.hidden_size
        ),
        (
            "ff is counted twice: gate and up are multiplied with each other, before the vector"
        ): _sizes(ff=lambda c: 2 * c.intermediate_size),
    },
)
def ia3_sizes(config):
    """The widths of the layers that the three vectors of a block belong to."""
    return dict(_measured(config.to_json_string(use_diff=False)))


# ------------------------------------------------------------------ merge_ia3


def _layer(out, in_, feedforward, bias=True, dtype=torch.float32, zeros=0):
    vector = 1 + 0.6 * torch.randn(in_ if feedforward else out)
    vector[:zeros] = 0
    weight, offset = torch.randn(out, in_).to(dtype), torch.randn(out).to(dtype)
    vector = vector.to(torch.promote_types(dtype, torch.float32))
    return [weight, offset if bias else None, vector, feedforward]


def _rows(W, v):
    return (W * v[:, None]).to(W.dtype)


def _columns(W, v):
    return (W * v[None, :]).to(W.dtype)


def _scaled(b, v):
    return None if b is None else (b * v).to(b.dtype)


def _same(b, v):
    return b


def _merge(rows=_rows, b_rows=_scaled, columns=_columns, b_columns=_same):
    """A wrong merge_ia3 by what it does to a weight or a bias."""

    def merge(weight, bias, vector, feedforward):
        if feedforward:
            return columns(weight, vector), b_columns(bias, vector)
        return rows(weight, vector), b_rows(bias, vector)

    return merge


def _of(change):
    """A wrong merge_ia3 that takes another vector than the one given."""
    return lambda w, b, v, ff: _merge()(w, b, change(v), ff)


@check_for(
    cases=[
        # Square ones first: there a mistake of rows and columns gives numbers, and can be named.
        Case(lambda: _layer(16, 16, False), note="a square weight"),
        Case(lambda: _layer(16, 16, True), note="a square weight"),
        Case(lambda: _layer(12, 20, False)),
        Case(lambda: _layer(12, 20, True)),
        Case(lambda: _layer(20, 12, False)),
        Case(lambda: _layer(20, 12, True)),
        Case(lambda: _layer(9, 14, False, bias=False), note="a layer without a bias"),
        Case(lambda: _layer(9, 14, True, bias=False), note="a layer without a bias"),
        Case(lambda: _layer(10, 15, False, zeros=3), note="three entries are 0"),
        Case(lambda: _layer(10, 15, True, dtype=torch.float64)),
        Case(
            lambda: _layer(10, 15, False, dtype=torch.bfloat16),
            note="a 16-bit layer, its vector in float32",
        ),
        Case(
            lambda: _layer(10, 15, True, dtype=torch.bfloat16),
            note="a 16-bit layer, its vector in float32",
        ),
    ],
    returns=("the weight", "the bias"),
    causes={
        "the bias of k and v is left as it is: what is scaled is x Wᵀ + b, bias included": _merge(
            b_rows=_same
        ),
        "the bias is dropped where the outputs are scaled": _merge(
            b_rows=lambda b, v: torch.zeros_like(b)
        ),
        "the vector is added to the bias: multiply": _merge(
            b_rows=lambda b, v: None if b is None else (b + v).to(b.dtype)
        ),
        "the bias is divided by the vector: multiply": _merge(
            b_rows=lambda b, v: None if b is None else (b / v).to(b.dtype)
        ),
        "the bias of the feed-forward is scaled: it is added after the vector has acted": _merge(
            b_columns=_scaled
        ),
        "columns are scaled where the outputs are: an output is a row of W": _merge(rows=_columns),
        "rows are scaled for the feed-forward: an input is a column of W": _merge(columns=_rows),
        (
            "the flag is read the wrong way round: with feedforward the columns are scaled"
        ): lambda w, b, v, ff: _merge()(w, b, v, not ff),
        "the weight of k and v is left as it is: only the bias is scaled": _merge(
            rows=lambda W, v: W.clone()
        ),
        "the weight of the feed-forward is left as it is": _merge(columns=lambda W, v: W.clone()),
        "the vector is subtracted from 1: it starts at ones, and scales": _of(lambda v: 1 - v),
        "1 is added to the vector: it starts at ones, not at zeros": _of(lambda v: 1 + v),
        "1 is taken from the vector: this is the change, not the merged layer": _of(
            lambda v: v - 1
        ),
        "the weight is divided by the vector: that is unmerging": _of(lambda v: 1 / v),
        "the vector is squared: it acts once": _of(lambda v: v * v),
        "the vector loses its sign": _of(lambda v: v.abs()),
        "an entry of zero is taken for a missing one: it erases a row, rightly": _of(
            lambda v: torch.where(v == 0, 1.0, v)
        ),
    },
)
def merge_ia3(weight, bias, vector, feedforward):
    """The layer alone computes what layer and vector did, for k, v and the feed-forward."""
    v = vector.double()
    if feedforward:
        merged = torch.stack([c * s for c, s in zip(weight.double().T, v, strict=True)], dim=1)
        return merged.to(weight.dtype), bias
    merged = torch.stack([r * s for r, s in zip(weight.double(), v, strict=True)])
    offset = None if bias is None else (bias.double() * v).to(bias.dtype)
    return merged.to(weight.dtype), offset


# ------------------------------------------------------------------ ia3_as_lora


def _scaling(out, in_, dtype=torch.float32, still=0):
    vector = 1 + 0.5 * torch.randn(out)
    vector[:still] = 1
    return [torch.randn(out, in_).to(dtype), vector.to(dtype)]


def _product(factors):
    A, B = factors
    return {"B @ A": B @ A}


def _lora(change=lambda v: v - 1, by=lambda W, c: c[:, None] * W):
    """A wrong ia3_as_lora by the change (out, in) that its factors give."""

    def factors(weight, vector):
        delta = by(weight, change(vector))
        eye = torch.eye(min(weight.shape), dtype=weight.dtype)
        return (delta, eye) if len(weight) <= weight.shape[1] else (eye, delta)

    return factors


def _by_columns(W, c):
    n = W.shape[1]
    return W * c.repeat(n // len(c) + 1)[:n]


@check_for(
    cases=[
        Case(lambda: _scaling(12, 20)),
        Case(lambda: _scaling(20, 12)),
        Case(lambda: _scaling(16, 16), note="a square weight"),
        Case(lambda: _scaling(10, 24, torch.float64)),
        Case(lambda: _scaling(24, 10, still=20), note="20 of 24 entries are 1"),
        Case(lambda: _scaling(1, 8), note="a single row"),
    ],
    returns=("A", "B"),
    view=_product,
    causes={
        "BA is the scaled weight itself: LoRA adds BA to W, so it must be the change": _lora(
            change=lambda v: v
        ),
        "the sign is turned: BA is what must be added to W": _lora(change=lambda v: 1 - v),
        "the scaling acts twice, in A and in B": _lora(change=lambda v: (v - 1) ** 2),
        "1 is added to the vector: the rows are scaled by l, so they change by l − 1": _lora(
            change=lambda v: v + 1
        ),
        "the change loses its sign: some rows become smaller": _lora(
            change=lambda v: (v - 1).abs()
        ),
        "W is left out: BA is the same for every weight": _lora(by=lambda W, c: _diagonal(W, c)),
        "the columns are scaled: each entry of l belongs to a row": _lora(by=_by_columns),
        "BA has rank one: the rows of W are lost in their mean": _lora(
            by=lambda W, c: c[:, None] * W.mean(0).expand_as(W)
        ),
        "the change is divided by the rank: here the scaling alpha / r is 1": _lora(
            by=lambda W, c: c[:, None] * W / min(W.shape)
        ),
        "the smallest singular value is cut off: only the full rank is exact": _lora(
            by=lambda W, c: _truncated(c[:, None] * W)
        ),
    },
)
def ia3_as_lora(weight, vector):
    """W + BA is the weight with scaled rows, and A and B have the full rank's shapes."""
    delta = (vector.double()[:, None] - 1) * weight.double()
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return V.to(weight.dtype), (U * S).to(weight.dtype)


def _diagonal(W, c):
    delta = torch.zeros_like(W)
    n = min(W.shape)
    delta[range(n), range(n)] = c[:n]
    return delta


def _truncated(delta):
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    S[len(S) * 2 // 3 :] = 0
    return U * S @ V


# ------------------------------------------------------------------ IA3Attention

_WIDTH = 20  # of what goes in, in every case: a view sees the module alone


def _projections(n_heads, n_kv, d_h=6, bias=True):
    layers = []
    for n in (n_heads, n_kv, n_kv):
        layer = nn.Linear(_WIDTH, n * d_h, bias=bias).requires_grad_(False)
        layer.weight.mul_(3)  # so that attention prefers some tokens
        layers.append(layer)
    return [*layers, n_heads]


_TRAINED = ["l_k", "l_v"]
_PARTS = (
    "the list of what trains",
    "l_k right after construction",
    "l_v right after construction",
    "the output right after construction (that of the base)",
    "the output once l_k and l_v are trained",
    *(f"the gradient of {name}" for name in (*_TRAINED, "x")),
)


def _used(module):
    """What an IA3Attention is and computes, from its start to its gradients; a part that the parts
    before make impossible is None."""
    trained = {n.rpartition(".")[2]: p for n, p in module.named_parameters() if p.requires_grad}
    seen = dict.fromkeys(_PARTS)
    trains, start_k, start_v, first, output, *gradients = _PARTS
    seen[trains] = sorted(trained)
    if seen[trains] != _TRAINED:
        return seen
    l_k, l_v = (trained[name] for name in _TRAINED)
    seen[start_k], seen[start_v] = l_k.detach().clone(), l_v.detach().clone()
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    if any(vector.shape != (min(widths, default=0),) for vector in (l_k, l_v)):
        return seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 7, _WIDTH, requires_grad=True)
    with torch.no_grad():
        seen[first] = module(x)
        for vector in (l_k, l_v):
            vector.copy_(1 + 0.6 * torch.randn(vector.shape))
    with torch.enable_grad():
        y = module(x)
        seen[output] = y.detach()
        found = gradients_of(y, (l_k, l_v, x))
    for name, p, gradient in zip(gradients, (l_k, l_v, x), found, strict=True):
        seen[name] = torch.zeros_like(p) if gradient is None else gradient
    return seen


class _Wrong(nn.Module):
    """IA3Attention with its steps open to be done wrongly."""

    def __init__(self, layers, n_heads, start, width, third, scale, group, causal):
        super().__init__()
        self.q, self.k, self.v = layers
        self.d_h, self.third = layers[0].out_features // n_heads, third
        self.scale, self.group, self.causal = scale, group, causal
        for name, layer in zip(("l_k", "l_v"), layers[1:], strict=True):
            n = width(self.q.out_features, layer.out_features, self.d_h)
            self.register_parameter(name, nn.Parameter(start(n)))
        if third:
            self.l_q = nn.Parameter(start(self.q.out_features))

    def forward(self, x):
        q, k, v = self.scale(self, self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (-1, self.d_h)).transpose(1, 2) for t in (q, k, v))
        k, v = (self.group(t, q.shape[1] // t.shape[1]) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


def _fit(t, vector):
    """A vector of any width, repeated or cut to what it meets: a wrong start alone is told."""
    n = t.shape[-1]
    return t * vector.repeat(n // len(vector) + 1)[:n]


def _keys_and_values(self, q, k, v):
    return q, _fit(k, self.l_k), _fit(v, self.l_v)


def _without_bias(t, layer, vector):
    b = 0 if layer.bias is None else layer.bias
    return (t - b) * vector + b


def _wrong(
    start=torch.ones,
    width=lambda q, kv, d_h: kv,
    third=False,
    scale=_keys_and_values,
    group=lambda t, n: t.repeat_interleave(n, dim=1),
    causal=True,
):
    def IA3Attention(q_proj, k_proj, v_proj, n_heads):
        layers = q_proj, k_proj, v_proj
        return _Wrong(layers, n_heads, start, width, third, scale, group, causal)

    return IA3Attention


@check_for(
    cases=[
        Case(lambda: _projections(4, 2), note="4 query heads, 2 key-value heads"),
        Case(lambda: _projections(6, 1), note="6 query heads, 1 key-value head"),
        Case(lambda: _projections(4, 4), note="4 heads each"),
        Case(lambda: _projections(4, 2, d_h=5, bias=False), note="layers without a bias"),
    ],
    returns="the module",
    view=_used,
    staged=True,
    causes={
        "the query has a vector too: (IA)³ scales keys and values only": _wrong(third=True),
        "the vectors start as zeros, which silences keys and values: start from ones": _wrong(
            start=torch.zeros
        ),
        "the vectors start from random numbers: start from ones": _wrong(start=torch.randn),
        (
            "the vectors are as wide as the query: under grouped queries keys and values are "
            "narrower"
        ): _wrong(width=lambda q, kv, d_h: q),
        (
            "the vectors start as zeros and are as wide as the query: ones, as wide as the keys"
        ): _wrong(start=torch.zeros, width=lambda q, kv, d_h: q),
        (
            "the vectors have one entry a head's dimension: each key-value head has its own d_h"
        ): _wrong(width=lambda q, kv, d_h: d_h),
        "the vectors have one entry a head: each of its d_h dimensions has one": _wrong(
            width=lambda q, kv, d_h: kv // d_h
        ),
        (
            "the base's output is changed at the start: with ones, k ⊙ l_k is k, and 1 + l is 2"
        ): _wrong(scale=lambda self, q, k, v: (q, k * (1 + self.l_k), v * (1 + self.l_v))),
        "the vectors are added: they scale": _wrong(
            scale=lambda self, q, k, v: (q, k + self.l_k, v + self.l_v)
        ),
        "the vectors are exchanged: l_k acts on the values and l_v on the keys": _wrong(
            scale=lambda self, q, k, v: (q, k * self.l_v, v * self.l_k)
        ),
        "l_k acts on keys and values: the values have l_v": _wrong(
            scale=lambda self, q, k, v: (q, k * self.l_k, v * self.l_k)
        ),
        "l_k is not used": _wrong(scale=lambda self, q, k, v: (q, k, v * self.l_v)),
        "l_v is not used": _wrong(scale=lambda self, q, k, v: (q, k * self.l_k, v)),
        "l_k acts twice, on the key and on the query": _wrong(
            scale=lambda self, q, k, v: (_fit(q, self.l_k), k * self.l_k, v * self.l_v)
        ),
        "l_k is divided by: it scales": _wrong(
            scale=lambda self, q, k, v: (q, k / self.l_k, v * self.l_v)
        ),
        "the biases are not scaled: the vector acts on x Wᵀ + b": _wrong(
            scale=lambda self, q, k, v: (
                q,
                _without_bias(k, self.k, self.l_k),
                _without_bias(v, self.v, self.l_v),
            )
        ),
        "the key-value heads are in another order: neighbouring query heads share one": _wrong(
            group=lambda t, n: t.repeat(1, n, 1, 1)
        ),
        "the causal mask is lost: no token may look ahead": _wrong(causal=False),
        "the vectors are cut off and learn nothing": _wrong(
            scale=lambda self, q, k, v: (q, k * self.l_k.detach(), v * self.l_v.detach())
        ),
    },
)
class IA3Attention(nn.Module):
    """The base at the start, (IA)³ once trained, grouped queries included, and its gradients."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.layers, self.n_heads = nn.ModuleList([q_proj, k_proj, v_proj]), n_heads
        self.l_k = nn.Parameter(torch.ones(k_proj.out_features))
        self.l_v = nn.Parameter(torch.ones(v_proj.out_features))

    def forward(self, x):
        q, k, v = (layer(x) for layer in self.layers)
        k, v = k * self.l_k, v * self.l_v
        d_h, tokens, outputs = q.shape[-1] // self.n_heads, x.shape[1], []
        ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        group = q.shape[-1] // k.shape[-1]
        for head in range(self.n_heads):  # one after another, the weights written out
            own, shared = (slice(n * d_h, (n + 1) * d_h) for n in (head, head // group))
            scores = q[..., own] @ k[..., shared].mT / d_h**0.5
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            outputs.append(weights @ v[..., shared])
        return torch.cat(outputs, -1)
