"""Checks of lesson 07."""

from functools import cache

import torch
from torch import nn

from .calls import gradients_or_zeros
from .kit import Case, check_for
from .mistakes import mistakes

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
    """Measure the widths of the layers themselves, in a model without values."""
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


@check_for(
    cases=[
        Case(lambda: [_llama(128, 8, 2, 352)], note="a Llama: 8 query heads, 2 key-value heads"),
        Case(lambda: [_llama(96, 4, 4, 256)], note="a Llama without groups"),
        Case(lambda: [_qwen2()], note="a Qwen2: 14 query heads, 2 key-value heads"),
        Case(lambda: [_gemma()], note="a Gemma: head_dim=32 is not hidden_size / heads = 24"),
        Case(lambda: [_bert()], note="a BERT: its config has no num_key_value_heads"),
    ],
    causes=mistakes(
        """
        def ia3_sizes(config):
            n_h = config.num_attention_heads
            n_kv = getattr(config, "num_key_value_heads", n_h)
            d_h = getattr(config, "head_dim", None) or config.hidden_size // n_h
            k = v = n_kv * d_h
            return dict(k=k, v=v, ff=config.intermediate_size)
        """,
        """
        keys and values are counted as wide as the model: there are fewer key-value heads than query
        heads
            n_kv * d_h → config.hidden_size
        the query heads are counted: keys and values have num_key_value_heads
            n_kv * d_h → n_h * d_h
        only the keys are counted as narrow: the values have as many heads as the keys
            v=v → v=config.hidden_size
        this is the number of key-value heads: multiply it by the width of a head
            n_kv * d_h → n_kv
        this is the width of one head: multiply it by the number of key-value heads
            n_kv * d_h → d_h
        head_dim is ignored: use it where the config has one
            getattr(config, "head_dim", None) or → ∅
        these are the sizes for all layers: return those of one block
            n_kv * d_h → config.num_hidden_layers * n_kv * d_h
            config.intermediate_size → config.num_hidden_layers * config.intermediate_size
        ff is the output of the feed-forward: its inner activations are scaled
            config.intermediate_size → config.hidden_size
        ff is not always four times the model's width: use the config's intermediate_size
            config.intermediate_size → 4 * config.hidden_size
        ff is counted twice: gate and up are multiplied with each other, before the vector
            config.intermediate_size → 2 * config.intermediate_size
        """,
    ),
)
def ia3_sizes(config):
    """The widths of the layers that the three vectors of a block belong to."""
    return dict(_measured(config.to_json_string(use_diff=False)))


# ------------------------------------------------------------------ ia3_linear


def _scaled_linear(out, in_, feedforward, bias=True, leading=(2, 5)):
    vector = 1 + 0.6 * torch.randn(in_ if feedforward else out)
    offset = torch.randn(out) if bias else None
    x, weight = torch.randn(*leading, in_), torch.randn(out, in_)
    return [x, weight, offset, vector, feedforward]


@check_for(
    cases=[
        # Square ones first: there a vector on the wrong side gives numbers, and can be named.
        Case(lambda: _scaled_linear(16, 16, False), note="a square weight"),
        Case(lambda: _scaled_linear(16, 16, True), note="a square weight"),
        Case(lambda: _scaled_linear(12, 20, False)),
        Case(lambda: _scaled_linear(12, 20, True)),
        Case(lambda: _scaled_linear(20, 12, False, leading=(7,))),
        Case(lambda: _scaled_linear(20, 12, True, leading=(7,))),
        Case(lambda: _scaled_linear(9, 14, False, bias=False), note="a layer without a bias"),
        Case(lambda: _scaled_linear(9, 14, True, bias=False), note="a layer without a bias"),
    ],
    causes=mistakes(
        """
        def ia3_linear(x, weight, bias, vector, feedforward):
            if feedforward:
                return F.linear(x * vector, weight, bias)
            return F.linear(x, weight, bias) * vector
        """,
        """
        the flag is read the wrong way round: with feedforward the input is scaled
            if feedforward → if not feedforward
        the output is scaled in both cases: with feedforward it is the input
            if feedforward → if False
        the input is scaled in both cases: for keys and values it is the output
            if feedforward → if True
        the bias of k and v is added after the scaling: the output that is scaled includes it
            F.linear(x, weight, bias) * vector →
                F.linear(x, weight) * vector + (0 if bias is None else bias)
        with feedforward the bias is scaled too: only the input is
            F.linear(x * vector, weight, bias) →
                F.linear(x * vector, weight, None if bias is None else bias * vector)
        the bias is left out
            F.linear(x * vector, weight, bias) → F.linear(x * vector, weight)
            F.linear(x, weight, bias) → F.linear(x, weight)
        the vector is left out with feedforward
            x * vector → x
        the vector is left out for keys and values
            bias) * vector → bias)
        the vector is added: multiply by it, entry by entry
            x * vector → x + vector
            bias) * vector → bias) + vector
        1 is added to the vector: it starts at ones, not at zeros
            x * vector → x * (1 + vector)
            bias) * vector → bias) * (1 + vector)
        the weight is not transposed: y = x Wᵀ + b
            F.linear(x * vector, weight, bias) → F.linear(x * vector, weight.T, bias)
            F.linear(x, weight, bias) → F.linear(x, weight.T, bias)
        """,
    ),
)
def ia3_linear(x, weight, bias, vector, feedforward):
    """The output is scaled for keys and values, the input for the feed-forward."""
    scale = vector.double()
    inputs = x.double() * scale if feedforward else x.double()
    columns = [inputs @ row for row in weight.double()]
    if bias is not None:
        columns = [y + b for y, b in zip(columns, bias.double(), strict=True)]
    if not feedforward:
        columns = [y * s for y, s in zip(columns, scale, strict=True)]
    return torch.stack(columns, dim=-1).to(x.dtype)


# ------------------------------------------------------------------ merge_ia3


def _layer(out, in_, feedforward, bias=True):
    return _scaled_linear(out, in_, feedforward, bias)[1:]


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
    ],
    returns=("the weight", "the bias"),
    causes=mistakes(
        """
        def merge_ia3(weight, bias, vector, feedforward):
            scale = vector if feedforward else vector[:, None]
            if bias is not None and not feedforward:
                bias = vector * bias
            return scale * weight, bias
        """,
        """
        the bias of k and v is left as it is: what is scaled is x Wᵀ + b, bias included
            bias = vector * bias → pass
        the bias of the feed-forward is scaled: it is added after the vector has acted
            and not feedforward → ∅
        columns are scaled for keys and values: an output is a row of W
            vector[:, None] → vector
        rows are scaled for the feed-forward: an input is a column of W
            vector if feedforward else → ∅
        the flag is read the wrong way round: with feedforward the columns are scaled
            vector if feedforward else vector[:, None] → vector[:, None] if feedforward else vector
            not feedforward → feedforward
        the weight of the feed-forward is left as it is
            vector if feedforward → 1 if feedforward
        1 is added to the vector: it starts at ones, not at zeros
            scale = → vector = 1 + vector; scale =
        1 is subtracted from the vector: this is the change, not the merged layer
            scale = → vector = vector - 1; scale =
        the weight is transposed: a layer stores it as (out, in)
            return scale * weight, bias → return (scale * weight).T, bias
        the order is reversed: return the weight first
            return scale * weight, bias → return bias, scale * weight
        the weight is divided by the vector: that is unmerging
            scale = → vector = 1 / vector; scale =
        """,
    ),
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


def _scaling(out, in_, still=0):
    vector = 1 + 0.5 * torch.randn(out)
    vector[:still] = 1
    return [torch.randn(out, in_), vector]


def _product(factors):
    A, B = (factor.double() for factor in factors)  # one of them may be wider than the other
    return {"B @ A": B @ A}


@check_for(
    cases=[
        Case(lambda: _scaling(12, 20)),
        Case(lambda: _scaling(20, 12)),
        Case(lambda: _scaling(16, 16), note="a square weight"),
        Case(lambda: _scaling(24, 10, still=20), note="20 of 24 entries are 1"),
        Case(lambda: _scaling(1, 8), note="a single row"),
    ],
    returns=("A", "B"),
    view=_product,
    causes=mistakes(
        """
        def ia3_as_lora(weight, vector):
            eye = torch.eye(min(weight.shape), dtype=weight.dtype)
            update = (vector - 1)[:, None] * weight
            return (eye, update) if len(weight) > weight.shape[1] else (update, eye)
        """,
        """
        BA is the scaled weight itself: LoRA adds BA to W, so it must be the change
            (vector - 1) → vector
        the sign is reversed: BA is the change that is added to W
            (vector - 1) → (1 - vector)
        the scaling acts twice, in A and in B
            (vector - 1) → (vector - 1).square()
        1 is added to the vector: the rows are scaled by l, so they change by l − 1
            (vector - 1) → (vector + 1)
        the change loses its sign: some rows become smaller
            (vector - 1) → (vector - 1).abs()
        W is left out: BA is the same for every weight
            * weight → * torch.eye(*weight.shape, dtype=weight.dtype)
        the order is reversed: return A first
            if len(weight) > → if len(weight) <=
        r is the smaller of out and in: where there are more rows than columns, r is in
            return (eye, update) if len(weight) > weight.shape[1] else (update, eye) →
                return weight, torch.diag(vector - 1)
        r is the smaller of out and in: where there are more columns than rows, r is out
            min(weight.shape) → max(weight.shape)
            if len(weight) > → if len(weight) <=
        """,
    ),
)
def ia3_as_lora(weight, vector):
    """W + BA is the weight with scaled rows, and A and B have the full rank's shapes."""
    delta = (vector.double()[:, None] - 1) * weight.double()
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return V.to(weight.dtype), (U * S).to(weight.dtype)


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
    "the list of trainable parameters",
    "l_k",
    "l_v",
    "the output right after construction (that of the base)",
    "l_k right after construction",
    "l_v right after construction",
    "the output once l_k and l_v are trained",
    *(f"the gradient of {name}" for name in (*_TRAINED, "x")),
)


def _used(module):
    """Return what an IA3Attention holds and computes, from its start to its gradients; a part that
    earlier parts make impossible is None."""
    trained = {n.rpartition(".")[2]: p for n, p in module.named_parameters() if p.requires_grad}
    seen = dict.fromkeys(_PARTS)
    trains, k, v, first, start_k, start_v, output, *gradients = _PARTS
    seen[trains] = sorted(trained)
    if seen[trains] != _TRAINED:
        return seen
    l_k, l_v = (trained[name] for name in _TRAINED)
    # For their widths alone; (1, n) and (heads, d_h) are the same entries in the same order.
    seen[k], seen[v] = torch.zeros(l_k.numel()), torch.zeros(l_v.numel())
    seen[start_k], seen[start_v] = (n.detach().flatten().clone() for n in (l_k, l_v))
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    if any(vector.numel() != min(widths, default=0) for vector in (l_k, l_v)):
        return seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 7, _WIDTH, requires_grad=True)
    with torch.no_grad():
        seen[first] = module(x)
        if not isinstance(seen[first], torch.Tensor):
            return seen
        for vector in (l_k, l_v):
            vector.copy_(1 + 0.6 * torch.randn(vector.shape))
    with torch.enable_grad():
        y = module(x)
        seen[output] = y.detach()
        to_k, to_v, to_x = gradients_or_zeros(y, (l_k, l_v, x))
    return seen | dict(zip(gradients, (to_k.flatten(), to_v.flatten(), to_x), strict=True))


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
    causes=mistakes(
        """
        class IA3Attention(nn.Module):
            def __init__(self, q_proj, k_proj, v_proj, n_heads):
                super().__init__()
                self.q, self.k, self.v, self.n_heads = q_proj, k_proj, v_proj, n_heads
                start = torch.ones(k_proj.out_features)
                self.l_k, self.l_v = nn.Parameter(start), nn.Parameter(start.clone())

            def forward(self, x):
                q, k, v = self.q(x), self.k(x) * self.l_k, self.v(x) * self.l_v
                d_h = q.shape[-1] // self.n_heads
                q, k, v = (t.unflatten(-1, (-1, d_h)).transpose(1, 2) for t in (q, k, v))
                group = self.n_heads // k.shape[1]
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                return y.transpose(1, 2).flatten(2)
        """,
        """
        the query has a vector too: (IA)³ scales keys and values only
            start = → self.l_q = nn.Parameter(torch.ones(q_proj.out_features)); start =
        the vectors are as wide as the query: under grouped queries keys and values are narrower
            k_proj.out_features → q_proj.out_features
        the vectors have d_h entries, which all key-value heads share: each head has its own
            k_proj.out_features → q_proj.out_features // n_heads
        the vectors start as zeros, which silences keys and values: start from ones
            torch.ones → torch.zeros
        keys and values are scaled by 1 + l: let l itself scale them, and start from ones
            torch.ones → torch.zeros
            * self.l_k → * (1 + self.l_k)
            * self.l_v → * (1 + self.l_v)
        the output differs from the base's at the start: ones scaled as 1 + l give 2, so scale by l
        itself
            * self.l_k → * (1 + self.l_k)
            * self.l_v → * (1 + self.l_v)
        the keys and values are scaled after the heads are repeated: scale before, where a vector
        has as many entries as the key
            self.k(x) * self.l_k, self.v(x) * self.l_v → self.k(x), self.v(x)
            k.repeat_interleave(group, 1), →
                k.repeat_interleave(group, 1) * self.l_k.view(1, -1, 1, d_h),
            v.repeat_interleave(group, 1) →
                v.repeat_interleave(group, 1) * self.l_v.view(1, -1, 1, d_h)
        l_k and l_v are swapped: l_k scales the keys
            self.k(x) * self.l_k → self.k(x) * self.l_v
            self.v(x) * self.l_v → self.v(x) * self.l_k
        the values are not scaled
            self.v(x) * self.l_v → self.v(x)
        the keys are not scaled
            self.k(x) * self.l_k → self.k(x)
        the scores are not divided by √d_h
            is_causal=True → is_causal=True, scale=1.0
        the base trains too: only l_k and l_v may train
            start.clone()) → start.clone()); self.requires_grad_()
        l_k and l_v are plain tensors: nn.Parameter makes them train
            nn.Parameter(start), nn.Parameter(start.clone()) → start, start.clone()
        l_k scales both keys and values: l_v scales the values
            self.v(x) * self.l_v → self.v(x) * self.l_k
        the biases are not scaled: the vector acts on x Wᵀ + b
            self.k(x) * self.l_k → F.linear(x, self.k.weight * self.l_k[:, None], self.k.bias)
            self.v(x) * self.l_v → F.linear(x, self.v.weight * self.l_v[:, None], self.v.bias)
        the key-value heads are in another order: neighbouring query heads share one key-value head
            k.repeat_interleave(group, 1), v.repeat_interleave(group, 1) →
                k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
        the causal mask is missing: no token may look ahead
            , is_causal=True → ∅
        no gradient reaches the vectors, so they learn nothing
            * self.l_k → * self.l_k.detach()
            * self.l_v → * self.l_v.detach()
        """,
    ),
)
class IA3Attention(nn.Module):
    """The layer is the base at the start, and computes (IA)³ and its gradients once trained."""

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
