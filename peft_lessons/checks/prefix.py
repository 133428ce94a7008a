"""Checks of lesson 09."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from .kit import Case, check_for

# ------------------------------------------------------------------ split_prefix


def _flat(p, layers, n_kv, d_h, dtype=torch.float32):
    return [torch.randn(p, 2 * layers * n_kv * d_h, dtype=dtype), layers, n_kv, d_h]


def _split(order, permute, pick=lambda layer: (layer[0], layer[1])):
    """A split by a view in some order and a permutation that puts (L, 2, ...) first."""

    def split_prefix(flat, layers, n_kv, d_h):
        sizes = {"L": layers, "2": 2, "h": n_kv, "d": d_h}
        P = flat.reshape(len(flat), *(sizes[name] for name in order))
        return [pick(layer) for layer in P.permute(permute)]

    return split_prefix


def _blocks(flat, layers, n_kv, d_h):
    P = flat.reshape(layers, 2, n_kv, len(flat), d_h)
    return [(k, v) for k, v in P]


def _mixed(flat, layers, n_kv, d_h):
    P = flat.reshape(len(flat), layers, 2, n_kv, d_h).permute(1, 2, 0, 3, 4)
    return [tuple(t.reshape(n_kv, len(flat), d_h) for t in layer) for layer in P]


def _overlapping(flat, layers, n_kv, d_h):
    P = flat.reshape(len(flat), 2 * layers, n_kv, d_h).permute(1, 2, 0, 3)
    return [(P[i], P[i + 1]) for i in range(layers)]


_RIGHT = ("L2hd", (1, 2, 3, 0, 4))


@check_for(
    cases=[
        Case(lambda: _flat(5, 3, 2, 4)),
        Case(lambda: _flat(4, 2, 4, 4), note="p = n_kv = d_h"),
        Case(lambda: _flat(1, 2, 3, 5), note="a single virtual token"),
        Case(lambda: _flat(6, 1, 1, 8), note="one layer, one head"),
        Case(lambda: _flat(3, 2, 2, 2, torch.float64)),
    ],
    returns="the list",
    gradients=("flat",),
    causes={
        "keys and values are swapped: the key of a layer comes first": _split(
            *_RIGHT, lambda layer: (layer[1], layer[0])
        ),
        (
            "all keys are taken to come before all values: each layer has its key and its value"
        ): _split("2Lhd", (2, 1, 3, 0, 4)),
        "heads and their width are swapped in the view: d_h is the last": _split(
            "L2dh", (1, 2, 4, 0, 3)
        ),
        (
            "the heads are taken to come first in a row: they come after layer, and key or value"
        ): _split("hL2d", (2, 3, 1, 0, 4)),
        "the two of a layer are taken to be interleaved within a head": _split(
            "Lhd2", (1, 4, 2, 0, 3)
        ),
        (
            "a row of flat is one virtual token: a view cannot put p behind the heads, permute can"
        ): _blocks,
        "a reshape to (n_kv, p, d_h) mixes tokens and heads: move the dimensions instead": _mixed,
        "each of them is (p, n_kv, d_h): the heads come first": _split("L2hd", (1, 2, 0, 3, 4)),
        "the pairs overlap: layer l has numbers 2l and 2l + 1": _overlapping,
        "the value is the key once more": _split(*_RIGHT, lambda layer: (layer[0], layer[0])),
        "the key is the value too": _split(*_RIGHT, lambda layer: (layer[1], layer[1])),
        "the layers come in the wrong order: the first is layer 0": lambda *args: _split(*_RIGHT)(
            *args
        )[::-1],
        "there is no batch yet: each of them is (n_kv, p, d_h)": _split(
            *_RIGHT, lambda layer: (layer[0][None], layer[1][None])
        ),
    },
)
def split_prefix(flat, layers, n_kv, d_h):
    """Keys and values of every layer and head, from where PEFT stores them."""
    width = n_kv * d_h

    def part(at):
        block = flat[:, at * width : (at + 1) * width]
        return torch.stack([block[:, h * d_h : (h + 1) * d_h] for h in range(n_kv)])

    return [(part(2 * layer), part(2 * layer + 1)) for layer in range(layers)]


# ------------------------------------------------------------------ prefix_gate


def _heads(heads, n_kv, T, p, d_h, scale=1.0, dtype=torch.float32):
    q, k, prefix = torch.randn(heads, T, d_h), torch.randn(n_kv, T, d_h), torch.randn(n_kv, p, d_h)
    return [t.to(dtype) for t in (scale * q, k, prefix)]


def _causal(T, total, diagonal):
    return torch.ones(T, total, dtype=torch.bool).tril(diagonal)


def _gate(
    root=lambda d_h: d_h**0.5,
    text_root=None,
    seen=lambda T, p: _causal(T, p + T, p),
    spread=lambda t, group: t.repeat_interleave(group, dim=0),
    share=lambda weights, p: weights[..., :p].sum(-1),
    weights=lambda scores: scores.softmax(-1),
):
    """prefix_gate by the weights over prefix and text together, with its steps open."""

    def prefix_gate(q, k, prefix_k):
        (heads, T, d_h), p = q.shape, prefix_k.shape[1]
        k, prefix_k = (spread(t, heads // len(t)) for t in (k, prefix_k))
        scores = torch.cat(
            [q @ prefix_k.mT / root(d_h), q @ k.mT / (text_root or root)(d_h)], dim=-1
        )
        return share(weights(scores.masked_fill(~seen(T, p), -torch.inf)), p)

    return prefix_gate


def _ratio(weights, p):
    return weights[..., :p].sum(-1) / weights[..., p:].sum(-1)


def _by_means(scores, p):
    """The gate from the mean score of each side instead of logsumexp."""
    text = torch.stack([s[:, p : p + t + 1].mean(-1) for t, s in enumerate(scores.unbind(1))], 1)
    return (scores[..., :p].mean(-1) - text).sigmoid()


@check_for(
    cases=[
        Case(lambda: _heads(4, 2, 7, 3, 8)),
        Case(lambda: _heads(3, 3, 5, 5, 16), note="a key head for each query head"),
        Case(lambda: _heads(6, 1, 4, 9, 4), note="a prefix longer than the text"),
        Case(lambda: _heads(4, 2, 1, 2, 8), note="a single token"),
        Case(lambda: _heads(6, 2, 6, 4, 8, dtype=torch.float64)),
        Case(lambda: _heads(4, 2, 6, 3, 8, scale=120.0), note="large scores"),
    ],
    returns="the gate",
    gradients=("q", "k", "prefix_k"),
    causes={
        "every token sees the whole text: it sees only what stands before it, and itself": _gate(
            seen=lambda T, p: _causal(T, p + T, p + T)
        ),
        "a token does not see itself: the mask begins one place too early": _gate(
            seen=lambda T, p: _causal(T, p + T, p - 1)
        ),
        "the mask is turned: a token sees itself and what comes after it": _gate(
            seen=lambda T, p: torch.cat(
                [torch.ones(T, p, dtype=torch.bool), _causal(T, T, 0).T], dim=1
            )
        ),
        "the causal mask covers the prefix too: every token sees all of the prefix": _gate(
            seen=lambda T, p: _causal(T, p + T, 0)
        ),
        "the scores are not divided by √d_h": _gate(root=lambda d_h: 1.0),
        "the scores are divided by d_h: by its root": _gate(root=float),
        "the scores are multiplied by √d_h: divide": _gate(root=lambda d_h: d_h**-0.5),
        "the scores of the prefix alone are divided by √d_h: those of the text are too": _gate(
            text_root=lambda d_h: 1.0
        ),
        "the scores of the text alone are divided by √d_h: those of the prefix are too": _gate(
            root=lambda d_h: 1.0, text_root=lambda d_h: d_h**0.5
        ),
        "this is the share of the text: the prefix has the rest": _gate(
            share=lambda weights, p: weights[..., p:].sum(-1)
        ),
        "this is the ratio of prefix to text: a share is of both together": _gate(share=_ratio),
        "this is the logarithm of the ratio of prefix to text: its sigmoid is the share": _gate(
            share=lambda weights, p: _ratio(weights, p).log()
        ),
        "this is the mean weight of a virtual token: the prefix has the sum": _gate(
            share=lambda weights, p: weights[..., :p].mean(-1)
        ),
        "this is the largest weight of a virtual token: the prefix has the sum": _gate(
            share=lambda weights, p: weights[..., :p].amax(-1)
        ),
        (
            "the heads are repeated as a whole: query heads 0 and 1 share key head 0, so each key "
            "head is repeated in its place (repeat_interleave)"
        ): _gate(spread=lambda t, group: t.repeat(group, 1, 1)),
        "the scores are averaged: a softmax adds their exponentials (logsumexp)": _gate(
            weights=lambda scores: scores, share=_by_means
        ),
        "the softmax is taken over the tokens: it is taken over what a token sees": _gate(
            weights=lambda scores: scores.softmax(-2)
        ),
        "the heads are averaged: each has a gate of its own": _gate(
            share=lambda weights, p: weights[..., :p].sum(-1).mean(0)
        ),
        (
            "the gate has one number a head and token: drop the dimension that keepdim=True kept"
        ): _gate(share=lambda weights, p: weights[..., :p].sum(-1, keepdim=True)),
        "these are the weights of the virtual tokens: add them up": _gate(
            share=lambda weights, p: weights[..., :p]
        ),
    },
)
def prefix_gate(q, k, prefix_k):
    """The share of each token's attention that goes to the prefix."""
    heads, group = [], len(q) // len(k)
    for h, rows in enumerate(q):
        keys, virtual = k[h // group], prefix_k[h // group]
        gates = []
        for t, row in enumerate(rows):
            scores = torch.cat([virtual, keys[: t + 1]]) @ row / q.shape[-1] ** 0.5
            gates.append(scores.softmax(0)[: len(virtual)].sum())
        heads.append(torch.stack(gates))
    return torch.stack(heads)


# ------------------------------------------------------------------ context_to_prefix


def _llama(train=False, heads=2, **changes):
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=heads, max_position_embeddings=64)
    # Larger weights than at the start of a training, so that each layer does something.
    model = LlamaForCausalLM(LlamaConfig(**(sizes | dict(initializer_range=0.2) | changes)))
    return model.train(train)


def _opt(train=False):
    sizes = dict(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64)
    return OPTForCausalLM(OPTConfig(**sizes, init_std=0.2, dropout=0.5)).train(train)


def _read(model, ids, grad=False):
    was = model.training
    model.eval()
    with torch.set_grad_enabled(grad):
        layers = model(ids[None], use_cache=True).past_key_values.layers
    model.train(was)
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def _changed(change):
    return lambda model, ids: [change(k, v) for k, v in _read(model, ids)]


def _projections(model):
    return [m for n, m in model.named_modules() if n.endswith(("k_proj", "v_proj"))]


def _projected(model, ids):
    """The outputs of k_proj and v_proj: keys that are not rotated."""
    seen, d_h = [], model.config.hidden_size // model.config.num_attention_heads
    hooks = [
        m.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        for m in _projections(model)
    ]
    _read(model, ids)
    for hook in hooks:
        hook.remove()
    parts = [t.unflatten(-1, (-1, d_h)).transpose(0, 1) for t in seen]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _one_by_one(model, ids):
    """Every token read as if it stood alone."""
    parts = [_read(model, ids[i : i + 1]) for i in range(len(ids))]
    return [
        tuple(torch.cat([part[layer][i] for part in parts], dim=1) for i in range(2))
        for layer in range(len(parts[0]))
    ]


def _as_it_is(model, ids):
    with torch.no_grad():
        layers = model(ids[None], use_cache=True).past_key_values.layers
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def _ids(n):
    return torch.randint(2, 40, (n,))


def _prefix_parts(pairs):
    """Values, and whether a graph hangs on them."""
    graph = [t.requires_grad for pair in pairs for t in pair]
    return {"the list": pairs, "whether gradients are tracked": any(graph)}


@check_for(
    cases=[
        Case(lambda: [_llama(), _ids(6)]),
        Case(lambda: [_llama(heads=4), _ids(4)], note="as many tokens as heads"),
        Case(lambda: [_opt(), _ids(5)], note="learned positions instead of rotated keys"),
        Case(lambda: [_llama(), _ids(1)], note="a single token"),
        Case(
            lambda: [_llama(train=True, attention_dropout=0.5), _ids(7)],
            note="in train mode, with dropout",
        ),
        Case(lambda: [_opt(train=True), _ids(3)], note="in train mode, with dropout"),
    ],
    returns="the list",
    view=_prefix_parts,
    causes={
        (
            "the model is in train mode and drops out: read in eval mode, then set the mode back"
        ): _as_it_is,
        (
            "the cache hangs on the graph of the forward: read under torch.no_grad()"
        ): lambda model, ids: _read(model, ids, grad=True),
        "keys and values are swapped": _changed(lambda k, v: (v, k)),
        "there is one context: drop the dimension of the batch": _changed(
            lambda k, v: (k[None], v[None])
        ),
        "each of them is (n_kv, p, d_h): the heads come first": _changed(
            lambda k, v: (k.transpose(0, 1), v.transpose(0, 1))
        ),
        "the keys are not rotated: the prefix must hold what attention sees": _projected,
        "each token was read as if it stood alone: they see one another": _one_by_one,
        "the last token is missing": lambda model, ids: _read(
            model, ids[:-1] if len(ids) > 1 else ids
        ),
        "the tokens are in the wrong order": _changed(lambda k, v: (k.flip(1), v.flip(1))),
        "the ids were read backwards": lambda model, ids: _read(model, ids.flip(0)),
        "the layers come in the wrong order: the first is layer 0": lambda model, ids: _read(
            model, ids
        )[::-1],
        "this is the last layer alone": lambda model, ids: _read(model, ids)[-1:],
        "the value is the key once more": _changed(lambda k, v: (k, k)),
        "every query head has a key of its own here: keep the n_kv heads of the cache": (
            lambda model, ids: [
                tuple(t.repeat_interleave(2, dim=0) for t in pair) for pair in _read(model, ids)
            ]
        ),
    },
)
def context_to_prefix(model, ids):
    """A prefix that equals having read the ids."""
    was, cache = model.training, None
    model.eval()
    with torch.no_grad():
        for token in ids:  # one at a time, so that no mask decides what is seen
            cache = model(token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
    model.train(was)
    return [(layer.keys.squeeze(0), layer.values.squeeze(0)) for layer in cache.layers]


# ------------------------------------------------------------------ attend


def _text(heads, T, p, d_h, dtype=torch.float32):
    shapes = [(heads, T, d_h)] * 3 + [(heads, p, d_h)] * 2
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def _zero_keys(heads, T, p, d_h):
    q, k, v, prefix_k, prefix_v = _text(heads, T, p, d_h)
    return [q, k, v, torch.zeros_like(prefix_k), prefix_v]


def _zero(heads, T, p, d_h):
    q, k, v, prefix_k, prefix_v = _text(heads, T, p, d_h)
    return [q, k, v, torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)]


def _attend(
    K=lambda pk, k, pv: torch.cat([pk, k], dim=1),
    V=lambda pv, v, pk: torch.cat([pv, v], dim=1),
    seen=lambda T, p: _causal(T, p + T, p),
    root=lambda d_h: d_h**0.5,
    skip=lambda pk, pv: False,
    weights=lambda scores, p: scores.softmax(-1),
):
    """attend with its steps open to be done wrongly."""

    def attend(q, k, v, prefix_k, prefix_v):
        if skip(prefix_k, prefix_v):
            prefix_k, prefix_v = prefix_k[:, :0], prefix_v[:, :0]
        p, T = prefix_k.shape[1], q.shape[1]
        scores = q @ K(prefix_k, k, prefix_v).mT / root(q.shape[-1])
        scores = scores.masked_fill(~seen(T, p), -torch.inf)
        return weights(scores, p) @ V(prefix_v, v, prefix_k)

    return attend


def _swapped(**settings):
    return _attend(
        K=lambda pk, k, pv: torch.cat([pv, k], dim=1),
        V=lambda pv, v, pk: torch.cat([pk, v], dim=1),
        **settings,
    )


def _covered(T, p):
    return _causal(T, p + T, 0)


def _two_softmaxes(scores, p):
    return torch.cat([scores[..., :p].softmax(-1), scores[..., p:].softmax(-1)], dim=-1)


@check_for(
    cases=[
        Case(lambda: _text(3, 6, 4, 8)),
        Case(lambda: _text(2, 3, 7, 4), note="a prefix longer than the text"),
        Case(lambda: _text(4, 4, 4, 4), note="heads = T = p = d_h"),
        Case(lambda: _text(2, 1, 3, 8), note="a single token"),
        Case(lambda: _zero_keys(2, 5, 3, 8), note="prefix keys of zeros"),
        Case(lambda: _zero(2, 5, 3, 8), note="a prefix of zeros"),
        Case(lambda: _text(2, 5, 2, 16, torch.float64)),
    ],
    returns="the output",
    gradients=("q", "k", "v", "prefix_k", "prefix_v"),
    causes={
        "the causal mask covers the prefix: every token sees all of the prefix": _attend(
            seen=_covered
        ),
        "the prefix's keys and values are swapped": _swapped(),
        "the prefix's keys and values are swapped, and the causal mask covers the prefix": _swapped(
            seen=_covered
        ),
        (
            "prefix keys of zeros are taken for no prefix: they score 0, which is no −∞, and take "
            "their share of the attention"
        ): _attend(skip=lambda pk, pv: not pk.any()),
        (
            "a prefix of zeros is taken for no prefix: its keys score 0, which is no −∞, and take "
            "their share of the attention"
        ): _attend(skip=lambda pk, pv: not (pk.any() or pv.any())),
        "the prefix's keys are used as its values too": _attend(
            V=lambda pv, v, pk: torch.cat([pk, v], dim=1)
        ),
        "the prefix's values are used as its keys too": _attend(
            K=lambda pk, k, pv: torch.cat([pv, k], dim=1)
        ),
        "the prefix is left out": _attend(skip=lambda pk, pv: True),
        "every token sees the whole text: it sees only what stands before it, and itself": _attend(
            seen=lambda T, p: _causal(T, p + T, p + T)
        ),
        "a token sees the one that comes after it": _attend(
            seen=lambda T, p: _causal(T, p + T, p + 1)
        ),
        "a token does not see itself": _attend(seen=lambda T, p: _causal(T, p + T, p - 1)),
        "the scores are not divided by √d_h": _attend(root=lambda d_h: 1.0),
        "the scores are divided by d_h: by its root": _attend(root=float),
        (
            "prefix and text have a softmax each, and their outputs are added: one softmax is "
            "taken over both"
        ): _attend(weights=_two_softmaxes),
        "the outputs of prefix and text are averaged: the gate is not one half": _attend(
            weights=lambda scores, p: _two_softmaxes(scores, p) / 2
        ),
        "what is masked is filled with 0, and a score of 0 has a weight: fill with −∞": _attend(
            weights=lambda scores, p: scores.masked_fill(scores == -torch.inf, 0.0).softmax(-1)
        ),
    },
)
def attend(q, k, v, prefix_k, prefix_v):
    """Each token attends to the whole prefix, and to the text up to itself."""
    rows = []
    for t in range(q.shape[1]):
        K = torch.cat([prefix_k, k[:, : t + 1]], dim=1)
        V = torch.cat([prefix_v, v[:, : t + 1]], dim=1)
        scores = torch.einsum("hd,hnd->hn", q[:, t], K) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), V))
    return torch.stack(rows, dim=1)
