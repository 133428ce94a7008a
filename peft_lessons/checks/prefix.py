"""Checks of lesson 09."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ merge_prefix


def _output(heads, d_h, out, bias=True, gate=None):
    """Return the output projection of an attention, and a gate and a content of each head."""
    gate = torch.rand(heads) if gate is None else torch.tensor(gate)
    weight, content = torch.randn(out, heads * d_h), 2 * torch.randn(heads, d_h)
    return [weight, torch.randn(out) if bias else None, gate, content]


@check_for(
    cases=[
        Case(lambda: _output(2, 8, 16), note="a square weight"),
        Case(lambda: _output(3, 4, 10)),
        Case(lambda: _output(3, 6, 18, bias=False), note="a layer without a bias"),
        Case(lambda: _output(4, 4, 16), note="square; as many heads as they are wide"),
        Case(lambda: _output(3, 2, 5, gate=[0.0, 1.0, 0.25]), note="gates 0, 1 and 0.25"),
        Case(lambda: _output(1, 6, 7, bias=False), note="a single head"),
    ],
    returns=("weight", "bias"),
    causes=mistakes(
        """
        def merge_prefix(weight, bias, gate, content):
            d_h = content.shape[1]
            left = (1 - gate).repeat_interleave(d_h)
            added = weight @ (gate[:, None] * content).flatten()
            return weight * left, added if bias is None else bias + added
        """,
        """
        the rows of the weight are scaled: a row is an output of the layer, and a head is d_h of its
        columns
            weight * left → weight * torch.ones(len(weight))[:, None] * left[: len(weight), None]
        the gates are repeated as a whole: the d_h columns of a head lie next to one another
        (repeat_interleave)
            (1 - gate).repeat_interleave(d_h) → (1 - gate).repeat(d_h)
        all heads get the mean of the gates: each head has its own
            (1 - gate).repeat_interleave(d_h) → (1 - gate.mean())
        the content is read column after column: the projection reads head after head
            content).flatten() → content).T.flatten()
        the text gets λ, and the content λ too: the text has the share 1 − λ that the prefix leaves
            (1 - gate) → gate
        λ and 1 − λ are swapped: λ is the share of the prefix
            (1 - gate) → gate
            (gate[:, None] → ((1 - gate)[:, None]
        the weight is left as it is: the text's attention keeps only the share 1 − λ
            weight * left, → weight + 0,
        the content is not multiplied by λ
            (gate[:, None] * content) → content
        the content goes through the new weight, which has 1 − λ in it: it meets the old one
            added = weight → added = (weight * left)
        the content does not go through the weight: W_o comes after the attention
            weight @ (gate[:, None] * content).flatten() →
                F.pad((gate[:, None] * content).flatten(), (0, len(weight)))[: len(weight)]
        a layer without a bias still has none: the content needs one
            added if bias is None → None if bias is None
        the layer's own bias is lost
            added if bias is None else bias + added → added
        the layer's own bias is scaled as well: it comes after the attention, whatever the gate
            bias + added → (1 - gate.mean()) * bias + added
        the order is reversed: return the weight first
            weight * left, added if bias is None else bias + added →
                added if bias is None else bias + added, weight * left
        """,
    ),
)
def merge_prefix(weight, bias, gate, content):
    """One linear layer on the text's attention gives what gate, content and layer gave."""

    def layer(text):
        heads = text.view(content.shape).double()
        shares = zip(gate, heads, content, strict=True)
        mixed = torch.stack([(1 - g) * a + g * c for g, a, c in shares])
        return weight.double() @ mixed.flatten() + (0 if bias is None else bias.double())

    nothing = layer(torch.zeros(content.numel()))
    columns = [layer(unit) - nothing for unit in torch.eye(content.numel())]
    return torch.stack(columns, dim=1).to(weight.dtype), nothing.to(weight.dtype)


# ------------------------------------------------------------------ prefix_gate


def _heads(heads, n_kv, T, p, d_h):
    return [torch.randn(heads, T, d_h), torch.randn(n_kv, T, d_h), torch.randn(n_kv, p, d_h)]


def _levels(*levels, last=1.0):
    """Raise all scores of token t by levels[t], which changes no share, and by `last` times that
    where the last token is the key."""
    q, k, prefix_k = _heads(4, 2, 6, 3, 8)
    q[..., -1] = torch.tensor(levels).repeat(6 // len(levels)) * 8**0.5
    k[..., -1], prefix_k[..., -1], k[:, -1, -1] = 1.0, 1.0, last
    return [q, k, prefix_k]


# A softmax by hand: the weights are not divided by their sum yet.
_BY_HAND = "weights[..., :p].sum(-1) → weights[..., :p].sum(-1) / weights.sum(-1)"


@check_for(
    cases=[
        Case(lambda: _heads(4, 2, 7, 3, 8)),
        Case(lambda: _heads(3, 3, 5, 5, 16), note="a key head for each query head"),
        Case(lambda: _heads(6, 1, 4, 9, 4), note="a prefix longer than the text"),
        Case(lambda: _heads(4, 2, 1, 2, 8), note="a single token"),
        Case(lambda: _levels(100.0), note="large scores"),
        Case(lambda: _levels(64.0, -160.0), note="large scores of either sign"),
        Case(lambda: _levels(1.0, last=128.0), note="a large score of the last token"),
    ],
    returns="the gate",
    causes=mistakes(
        """
        def prefix_gate(q, k, prefix_k):
            group, p = len(q) // len(k), prefix_k.shape[1]
            keys = torch.cat([prefix_k, k], dim=1).repeat_interleave(group, dim=0)
            scores = q @ keys.mT / math.sqrt(q.shape[-1])
            seen = torch.ones(scores.shape[1:]).tril(p)
            weights = scores.masked_fill(seen == 0, -torch.inf).softmax(-1)
            return weights[..., :p].sum(-1)
        """,
        f"""
        every token sees the whole text: a token sees only itself and the tokens before it
            .tril(p) → ∅
        a token does not see itself: the mask begins one position too early
            .tril(p) → .tril(p - 1)
        each token sees the next one too: the mask begins one position too late
            .tril(p) → .tril(p + 1)
        the prefix is put after the text, but the mask and the sum expect it before the text
            [prefix_k, k] → [k, prefix_k]
        this is the mean weight of the prefix: λ is the sum of the p weights
            weights[..., :p].sum(-1) → weights[..., :p].mean(-1)
        this is the largest weight of the prefix: λ is the sum of the p weights
            weights[..., :p].sum(-1) → weights[..., :p].amax(-1)
        masked scores are filled with −100, and visible scores may be lower: fill with −∞
            -torch.inf → -100.0
        the causal mask covers the prefix too: every token sees all of the prefix
            .tril(p) → .tril()
        the scores are not divided by √d_h
            / math.sqrt(q.shape[-1]) → ∅
        the scores are divided by d_h: divide them by √d_h
            math.sqrt(q.shape[-1]) → q.shape[-1]
        this is the share of the text: λ is the share of the prefix
            weights[..., :p] → weights[..., p:]
        this is the ratio of prefix to text: λ is the share of the prefix in both together
            weights[..., :p].sum(-1) → weights[..., :p].sum(-1) / weights[..., p:].sum(-1)
        this is the logarithm of the ratio of prefix to text: its sigmoid is the share
            weights[..., :p].sum(-1) → (weights[..., :p].sum(-1) / weights[..., p:].sum(-1)).log()
        the heads are repeated as a whole: query heads 0 and 1 share key head 0, so each key head is
        repeated in its place (repeat_interleave)
            .repeat_interleave(group, dim=0) → .repeat(group, 1, 1)
        exp overflows for large scores: a softmax or logsumexp subtracts the maximum first
            .softmax(-1) → .exp()
            {_BY_HAND}
        one maximum is subtracted from all scores, so a token whose scores are all far lower has
        only exponentials of 0: subtract the maximum of each token's own scores
            .softmax(-1) → ; weights = (weights - weights.max()).exp()
            {_BY_HAND}
        the maximum includes masked scores, so a token whose visible scores are all far lower has
        only exponentials of 0: mask first
            scores.masked_fill → (scores - scores.amax(-1, keepdim=True)).masked_fill
            .softmax(-1) → .exp()
            {_BY_HAND}
        """,
    ),
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
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=heads, max_position_embeddings=64)
    # Larger weights than at the start of a training, so that each layer does something.
    model = LlamaForCausalLM(LlamaConfig(**(sizes | dict(initializer_range=0.2) | changes)))
    return model.train(train)


def _opt(train=False):
    sizes = dict(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64)
    return OPTForCausalLM(OPTConfig(**sizes, init_std=0.2, dropout=0.5)).train(train)


def _projected(model, ids):
    """Return the outputs of k_proj and v_proj: keys that are not rotated."""
    seen, d_h = [], model.config.hidden_size // model.config.num_attention_heads
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    with torch.no_grad():
        model.eval()(ids[None])
    parts = [t.unflatten(-1, (-1, d_h)).transpose(0, 1) for t in seen]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _ids(n):
    return torch.randint(2, 40, (n,))


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
    causes=mistakes(
        """
        def context_to_prefix(model, ids):
            mode = model.training
            with torch.no_grad():
                cache = model.eval()(ids[None]).past_key_values
            model.train(mode)
            return [(x.keys.squeeze(0), x.values.squeeze(0)) for x in cache.layers]
        """,
        """
        the model is in train mode, so dropout is active: read the cache in eval mode, then restore
        the mode
            model.eval() → model
        keys and values are swapped
            (x.keys.squeeze(0), x.values.squeeze(0)) → (x.values.squeeze(0), x.keys.squeeze(0))
        there is one context: drop the dimension of the batch
            (x.keys.squeeze(0), x.values.squeeze(0)) → (x.keys, x.values)
        the ids are taken for p texts of one token: they are one text, of shape (1, p)
            ids[None] → ids[:, None]
            (x.keys.squeeze(0), x.values.squeeze(0)) → (x.keys[0], x.values[0])
        each of them is (p, n_kv, d_h): the heads come first
            (x.keys.squeeze(0), x.values.squeeze(0)) →
                (x.keys[0].transpose(0, 1), x.values[0].transpose(0, 1))
        these are the keys of all layers and the values of all layers: give one pair for each layer
            [(x.keys.squeeze(0), x.values.squeeze(0)) for x in cache.layers] →
                [[x.keys[0] for x in cache.layers], [x.values[0] for x in cache.layers]]
        the keys are not rotated: the prefix must hold what attention sees
            = projected
        the last token is missing
            ids[None] → ids[None, : max(1, len(ids) - 1)]
        """,
        projected=_projected,
    ),
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


def _text(heads, T, p, d_h):
    shapes = [(heads, T, d_h)] * 3 + [(heads, p, d_h)] * 2
    return [torch.randn(shape) for shape in shapes]


def _low(heads, T, p, d_h):
    """All scores are 160 lower, which changes no weight. They are quarters: rounded sums of such a
    size would differ from one right answer to the next."""
    q, k, v, prefix_k, prefix_v = _text(heads, T, p, d_h)
    q, k, prefix_k = ((4 * t).round() / 4 for t in (q, k, prefix_k))
    q[..., -1], k[..., -1], prefix_k[..., -1] = -160 * d_h**0.5, 1.0, 1.0
    return [q, k, v, prefix_k, prefix_v]


def _zero_keys(heads, T, p, d_h):
    q, k, v, prefix_k, prefix_v = _text(heads, T, p, d_h)
    return [q, k, v, torch.zeros_like(prefix_k), prefix_v]


def _zero(heads, T, p, d_h):
    q, k, v, prefix_k, prefix_v = _text(heads, T, p, d_h)
    return [q, k, v, torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)]


def _alone(heads, T, zeros=False):
    """One virtual token, and no token gives itself a weight: its score is very low. So a mask that
    begins one position too early hides nothing that counts."""
    q, k, v, prefix_k, prefix_v = _text(heads, T, 1, T + 6)
    q[..., :T], k[..., :T] = torch.eye(T), -1e3 * torch.eye(T)
    if zeros:
        return [q, k, v, torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)]
    return [q, k, v, prefix_k, prefix_v]


def _same(heads, T, p, d_h):
    q, k, v, prefix_k, _ = _text(heads, T, p, d_h)
    return [q, k, v, prefix_k, prefix_k.clone()]


_OVER_THE_PREFIX = "the causal mask covers the prefix: every token sees all of the prefix"
_SWAPPED = "the prefix's keys and values are swapped"
_ZERO_IS_NONE = (
    "prefix keys of zeros are treated as no prefix: they score 0, not −∞, and take their share of "
    "the attention"
)

_FIRST_N = "prefix_k, prefix_v = prefix_k[:, :n], prefix_v[:, :n]"
_TWO_SOFTMAXES = "torch.cat([scores[..., :p].softmax(-1), scores[..., p:].softmax(-1)], -1)"


@check_for(
    cases=[
        Case(lambda: _alone(2, 3), "no token gives itself a weight", bug=_SWAPPED),
        Case(lambda: _same(3, 6, 4, 8), "prefix_k and prefix_v are equal", bug=_OVER_THE_PREFIX),
        Case(lambda: _alone(2, 3, zeros=True), "a prefix of zeros", bug=_ZERO_IS_NONE),
        Case(lambda: _text(3, 6, 4, 8)),
        Case(lambda: _text(2, 3, 7, 4), note="a prefix longer than the text"),
        Case(lambda: _text(4, 4, 4, 4), note="heads = T = p = d_h"),
        Case(lambda: _text(2, 1, 3, 8), note="a single token"),
        Case(lambda: _zero_keys(2, 5, 3, 8), note="prefix keys of zeros"),
        Case(lambda: _zero(2, 5, 3, 8), note="a prefix of zeros"),
        Case(lambda: _low(2, 5, 2, 16), note="large negative scores"),
    ],
    returns="the output",
    causes=mistakes(
        """
        def attend(q, k, v, prefix_k, prefix_v):
            K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
            T, p = q.shape[1], prefix_k.shape[1]
            hidden = torch.ones(T, p + T).triu(p + 1).bool()
            scores = (q @ K.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
            weights = scores.softmax(-1)
            return weights @ V
        """,
        f"""
        {_OVER_THE_PREFIX}
            triu(p + 1) → triu(1)
        the prefix's keys are among the values too
            [prefix_v, v] → [prefix_k, v]
        the prefix's values are among the keys too
            [prefix_k, k] → [prefix_v, k]
        {_SWAPPED}
            [prefix_k, k] → [prefix_v, k]
            [prefix_v, v] → [prefix_k, v]
        {_ZERO_IS_NONE}
            K, V = → n = len(prefix_k[0]) * bool(prefix_k.any()); {_FIRST_N}; K, V =
        a prefix of zeros is treated as no prefix: its keys score 0, not −∞, and take their share of
        the attention
            K, V = → n = len(prefix_k[0]) * bool((prefix_k + prefix_v).any()); {_FIRST_N}; K, V =
        every token sees the whole text: a token sees only itself and the tokens before it
            triu(p + 1) → triu(p + T)
        a token does not see itself
            triu(p + 1) → triu(p)
        the scores are not divided by √d_h
            / math.sqrt(q.shape[-1]) → ∅
        prefix and text each have their own softmax, and their outputs are added: take one softmax
        over both
            scores.softmax(-1) → {_TWO_SOFTMAXES}
        the outputs of prefix and text are averaged: the gate is not one half
            scores.softmax(-1) → {_TWO_SOFTMAXES} / 2
        masked scores are filled with 0, and a score of 0 still gets a weight: fill with −∞
            -torch.inf → 0
        masked scores are filled with −100, and visible scores may be lower: fill with −∞
            -torch.inf → -100.0
        each token sees the next one too
            triu(p + 1) → triu(p + 2)
        the scores are divided by d_h: divide them by √d_h
            math.sqrt(q.shape[-1]) → q.shape[-1]
        the prefix is put after the text, but the mask expects it before the text
            [prefix_k, k] → [k, prefix_k]
            [prefix_v, v] → [v, prefix_v]
        the mask comes after the softmax, so the weights do not sum to 1: mask the scores
            .masked_fill(hidden, -torch.inf) → ∅
            scores.softmax(-1) → scores.softmax(-1).masked_fill(hidden, 0)
        """,
    ),
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
