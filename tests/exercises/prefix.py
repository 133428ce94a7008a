"""Answers to the exercises of lesson 09."""

import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ split_prefix


@wrong("split_prefix", "keys and values are swapped")
def values_first(flat, layers, n_kv, d_h):
    P = flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4)
    return [(v, k) for k, v in P]


@wrong("split_prefix", "all keys are taken to come before all values")
def all_keys_first(flat, layers, n_kv, d_h):
    keys, values = flat.view(-1, 2, layers, n_kv, d_h).permute(1, 2, 3, 0, 4)
    return list(zip(keys, values, strict=True))


@wrong("split_prefix", "heads and their width are swapped in the view")
def width_before_heads(flat, layers, n_kv, d_h):
    P = flat.view(-1, layers, 2, d_h, n_kv)
    return [(P[:, i, 0].permute(2, 0, 1), P[:, i, 1].permute(2, 0, 1)) for i in range(layers)]


@wrong("split_prefix", "the heads are taken to come first in a row")
def heads_outermost(flat, layers, n_kv, d_h):
    P = flat.view(-1, n_kv, layers, 2, d_h).permute(2, 3, 1, 0, 4)
    return [(k, v) for k, v in P]


@wrong("split_prefix", "a view cannot put p behind the heads")
def one_view(flat, layers, n_kv, d_h):
    return [(k, v) for k, v in flat.view(layers, 2, n_kv, -1, d_h)]


@wrong("split_prefix", "mixes tokens and heads")
def reshaped_at_the_end(flat, layers, n_kv, d_h):
    blocks = flat.chunk(2 * layers, dim=1)
    shaped = [b.reshape(n_kv, len(flat), d_h) for b in blocks]
    return list(zip(shaped[::2], shaped[1::2], strict=True))


@wrong("split_prefix", "the heads come first")
def tokens_first(flat, layers, n_kv, d_h):
    P = flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 0, 3, 4)
    return [(k, v) for k, v in P]


@wrong("split_prefix", "the value is the key once more")
def the_same_index(flat, layers, n_kv, d_h):
    P = flat.view(-1, 2 * layers, n_kv, d_h).permute(1, 2, 0, 3)
    return [(P[2 * i], P[2 * i]) for i in range(layers)]


@wrong("split_prefix", "the layers come in the wrong order")
def from_the_top(flat, layers, n_kv, d_h):
    P = flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4)
    return [(P[i, 0], P[i, 1]) for i in reversed(range(layers))]


@wrong("split_prefix", "there is no batch yet")
def with_a_batch(flat, layers, n_kv, d_h):
    P = flat.view(1, -1, layers, 2, n_kv, d_h).permute(2, 3, 0, 4, 1, 5)
    return [(k, v) for k, v in P]


@wrong("split_prefix", "the pairs overlap: layer l has numbers 2l and 2l + 1")
def neighbours(flat, layers, n_kv, d_h):
    P = flat.view(-1, 2 * layers, n_kv, d_h).permute(1, 2, 0, 3)
    return [(P[i], P[i + 1]) for i in range(layers)]


@wrong("split_prefix", "is a tensor, expected a tuple of 2")
def not_pairs(flat, layers, n_kv, d_h):
    return list(flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4))


@wrong("split_prefix", "the list is a tensor, expected a list of 3")
def a_tensor(flat, layers, n_kv, d_h):
    return flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4)


@wrong("split_prefix", "no gradient reaches flat")
def detached(flat, layers, n_kv, d_h):
    P = flat.detach().view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4)
    return [(k, v) for k, v in P]


@right("split_prefix")
def by_chunks(flat, layers, n_kv, d_h):
    shaped = [b.unflatten(1, (n_kv, d_h)).transpose(0, 1) for b in flat.chunk(2 * layers, dim=1)]
    return list(zip(shaped[::2], shaped[1::2], strict=True))


@right("split_prefix")
def by_einsum(flat, layers, n_kv, d_h):
    P = torch.einsum("plkhd->lkhpd", flat.reshape(-1, layers, 2, n_kv, d_h))
    return [(k, v) for k, v in P]


@right("split_prefix")
def by_an_index(flat, layers, n_kv, d_h):
    at = torch.arange(2 * layers * n_kv * d_h).view(layers, 2, n_kv, d_h)
    return [tuple(flat[:, at[i, j]].transpose(0, 1) for j in (0, 1)) for i in range(layers)]


@right("split_prefix")
def as_peft_does(flat, layers, n_kv, d_h):
    P = flat[None].view(1, len(flat), layers * 2, n_kv, d_h).permute(2, 0, 3, 1, 4).split(2)
    return [(pair[0, 0], pair[1, 0]) for pair in P]


# ------------------------------------------------------------------ prefix_gate


def scores_of(q, k, prefix_k, root=None):
    group = len(q) // len(k)
    k, prefix_k = (t.repeat_interleave(group, 0) for t in (k, prefix_k))
    root = q.shape[-1] ** 0.5 if root is None else root
    return q @ prefix_k.mT / root, q @ k.mT / root


def masked(text):
    return text.masked_fill(torch.ones(text.shape[1:]).triu(1).bool(), -torch.inf)


@wrong("prefix_gate", "every token sees the whole text")
def not_causal(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return torch.cat([prefix, text], -1).softmax(-1)[..., : prefix.shape[-1]].sum(-1)


@wrong("prefix_gate", "a token does not see itself")
def strictly_before(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    text = text.masked_fill(torch.ones(text.shape[1:]).triu(0).bool(), -torch.inf)
    return torch.cat([prefix, text], -1).softmax(-1)[..., : prefix.shape[-1]].sum(-1)


@wrong("prefix_gate", "its sigmoid is the share")
def without_the_sigmoid(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    text = text.masked_fill(torch.ones(text.shape[1:]).triu(1).bool(), -torch.inf)
    return prefix.logsumexp(-1) - text.logsumexp(-1)


@wrong("prefix_gate", "the mask is turned")
def turned(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    text = text.masked_fill(torch.ones(text.shape[1:]).tril(-1).bool(), -torch.inf)
    return torch.sigmoid(prefix.logsumexp(-1) - text.logsumexp(-1))


@wrong("prefix_gate", "the causal mask covers the prefix too")
def mask_over_all(q, k, prefix_k):
    scores = torch.cat(scores_of(q, k, prefix_k), -1)
    scores = scores.masked_fill(~torch.ones(scores.shape[1:]).tril().bool(), -torch.inf)
    return scores.softmax(-1)[..., : prefix_k.shape[1]].sum(-1)


@wrong("prefix_gate", "the scores are not divided by √d_h")
def unscaled(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k, 1)
    return torch.sigmoid(prefix.logsumexp(-1) - masked(text).logsumexp(-1))


@wrong("prefix_gate", "the scores are divided by d_h")
def by_the_width(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k, q.shape[-1])
    return torch.sigmoid(prefix.logsumexp(-1) - masked(text).logsumexp(-1))


@wrong("prefix_gate", "this is the share of the text")
def the_other_share(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return torch.sigmoid(masked(text).logsumexp(-1) - prefix.logsumexp(-1))


@wrong("prefix_gate", "this is the ratio of prefix to text")
def a_ratio(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return (prefix.logsumexp(-1) - masked(text).logsumexp(-1)).exp()


@wrong("prefix_gate", "this is the mean weight of a virtual token")
def averaged(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return torch.cat([prefix, masked(text)], -1).softmax(-1)[..., : prefix.shape[-1]].mean(-1)


@wrong("prefix_gate", "the heads are repeated as a whole")
def tiled(q, k, prefix_k):
    group = len(q) // len(k)
    prefix, text = scores_of(q, k.repeat(group, 1, 1), prefix_k.repeat(group, 1, 1))
    return torch.sigmoid(prefix.logsumexp(-1) - masked(text).logsumexp(-1))


@wrong("prefix_gate", "holds nan")
def overflowing(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    a, b = prefix.exp().sum(-1), masked(text).exp().sum(-1)
    return a / (a + b)


@wrong("prefix_gate", "drop the dimension that keepdim=True kept")
def kept(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return (
        torch.cat([prefix, masked(text)], -1)
        .softmax(-1)[..., : prefix.shape[-1]]
        .sum(-1, keepdim=True)
    )


@wrong("prefix_gate", "your function raised RuntimeError")
def without_groups(q, k, prefix_k):
    prefix, text = q @ prefix_k.mT / q.shape[-1] ** 0.5, q @ k.mT / q.shape[-1] ** 0.5
    return torch.sigmoid(prefix.logsumexp(-1) - masked(text).logsumexp(-1))


@wrong("prefix_gate", "the gate has wrong values")
def sums_of_scores(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return torch.sigmoid(prefix.sum(-1) - text.tril().sum(-1))


@wrong("prefix_gate", "the argument q was changed")
def in_place(q, k, prefix_k):
    prefix, text = scores_of(q.div_(q.shape[-1] ** 0.5), k, prefix_k, 1)
    return torch.sigmoid(prefix.logsumexp(-1) - masked(text).logsumexp(-1))


@right("prefix_gate")
def by_softmax(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return torch.cat([prefix, masked(text)], -1).softmax(-1)[..., : prefix.shape[-1]].sum(-1)


@right("prefix_gate")
def by_the_rest(q, k, prefix_k):
    prefix, text = scores_of(q, k, prefix_k)
    return 1 - torch.cat([prefix, masked(text)], -1).softmax(-1)[..., prefix.shape[-1] :].sum(-1)


@right("prefix_gate")
def by_attention_to_ones(q, k, prefix_k):
    """What attention gives whose values are 1 in the prefix and 0 in the text."""
    (heads, T, d_h), (n_kv, p, _) = q.shape, prefix_k.shape
    K = torch.cat([prefix_k, k], 1).repeat_interleave(heads // n_kv, 0)
    V = torch.zeros(heads, p + T, 1, dtype=q.dtype)
    V[:, :p] = 1
    mask = torch.ones(T, p + T, dtype=torch.bool).tril(p)
    return F.scaled_dot_product_attention(q, K, V.expand(-1, -1, d_h).contiguous(), mask)[..., 0]


@right("prefix_gate")
def by_groups(q, k, prefix_k):
    n_kv, T, d_h = k.shape
    q = q.reshape(n_kv, -1, T, d_h) / d_h**0.5
    text = torch.einsum("ngtd,nsd->ngts", q, k) + torch.full((T, T), -torch.inf).triu(1)
    prefix = torch.einsum("ngtd,npd->ngtp", q, prefix_k)
    both = torch.stack([prefix.logsumexp(-1), text.logsumexp(-1)])
    return both.softmax(0)[0].flatten(0, 1)


# ------------------------------------------------------------------ context_to_prefix


def pairs_of(cache):
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@wrong("context_to_prefix", "the cache hangs on the graph")
def with_a_graph(model, ids):
    training = model.training
    pairs = pairs_of(model.eval()(ids[None]).past_key_values)
    model.train(training)
    return pairs


@wrong("context_to_prefix", "the model is in train mode and drops out")
@torch.no_grad()
def in_any_mode(model, ids):
    return pairs_of(model(ids[None]).past_key_values)


@wrong("context_to_prefix", "the argument model was changed")
@torch.no_grad()
def left_in_eval(model, ids):
    return pairs_of(model.eval()(ids[None]).past_key_values)


@wrong("context_to_prefix", "the argument model was changed")
@torch.no_grad()
def left_in_train(model, ids):
    pairs = pairs_of(model.eval()(ids[None]).past_key_values)
    model.train()
    return pairs


def reading(change):
    @torch.no_grad()
    def context_to_prefix(model, ids):
        training = model.training
        result = change(model.eval(), ids)
        model.train(training)
        return result

    return context_to_prefix


def of_cache(change):
    return reading(lambda model, ids: change(model(ids[None]).past_key_values))


wrong("context_to_prefix", "keys and values are swapped")(
    of_cache(lambda cache: [(layer.values[0], layer.keys[0]) for layer in cache.layers])
)
wrong("context_to_prefix", "drop the dimension of the batch")(
    of_cache(lambda cache: [(layer.keys, layer.values) for layer in cache.layers])
)
wrong("context_to_prefix", "the heads come first")(
    of_cache(lambda cache: [(k.transpose(0, 1), v.transpose(0, 1)) for k, v in pairs_of(cache)])
)
wrong("context_to_prefix", "this is the last layer alone")(
    of_cache(lambda cache: pairs_of(cache)[-1:])
)
wrong("context_to_prefix", "the layers come in the wrong order")(
    of_cache(lambda cache: pairs_of(cache)[::-1])
)
wrong("context_to_prefix", "keep the n_kv heads of the cache")(
    of_cache(lambda cache: [tuple(t.repeat_interleave(2, 0) for t in x) for x in pairs_of(cache)])
)
wrong("context_to_prefix", "is a DynamicCache, expected a list")(of_cache(lambda cache: cache))
wrong("context_to_prefix", "the last token is missing")(
    reading(lambda model, ids: pairs_of(model(ids[None, : max(1, len(ids) - 1)]).past_key_values))
)
wrong("context_to_prefix", "the ids were read backwards")(
    reading(lambda model, ids: pairs_of(model(ids.flip(0)[None]).past_key_values))
)
wrong("context_to_prefix", "wrong values")(
    reading(
        lambda model, ids: pairs_of(
            model(ids[None], position_ids=torch.arange(1, len(ids) + 1)[None]).past_key_values
        )
    )
)


@wrong("context_to_prefix", "the keys are not rotated")
def from_the_projections(model, ids):
    seen, d_h = [], model.config.hidden_size // model.config.num_attention_heads
    names = [n for n, _ in model.named_modules() if n.endswith(("k_proj", "v_proj"))]
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _, args, out: seen.append(out))
        for n in names
    ]
    reading(lambda m, x: m(x[None]))(model, ids)
    for hook in hooks:
        hook.remove()
    parts = [t[0].view(len(ids), -1, d_h).transpose(0, 1) for t in seen]
    return list(zip(parts[::2], parts[1::2], strict=True))


@right("context_to_prefix")
@torch.inference_mode()
def with_a_cache_of_its_own(model, ids):
    from transformers import DynamicCache

    training, cache = model.training, DynamicCache()
    try:
        model.eval()
        model(input_ids=ids.unsqueeze(0), past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    return [(layer.keys.squeeze(0), layer.values.squeeze(0)) for layer in cache.layers]


@right("context_to_prefix")
def detached_afterwards(model, ids):
    was = model.training
    model.eval()
    cache = model(ids.view(1, -1)).past_key_values
    model.train(was)
    return [tuple(t[0].detach().clone() for t in (x.keys, x.values)) for x in cache.layers]


@right("context_to_prefix")
@torch.no_grad()
def in_two_parts(model, ids):
    was = model.training
    model.eval()
    cache = model(ids[None, :1]).past_key_values
    if len(ids) > 1:
        cache = model(ids[None, 1:], past_key_values=cache).past_key_values
    model.train(was)
    return pairs_of(cache)


# ------------------------------------------------------------------ attend


def attention(q, K, V, seen):
    scores = (q @ K.mT / q.shape[-1] ** 0.5).masked_fill(~seen.bool(), -torch.inf)
    return scores.softmax(-1) @ V


def seeing(q, prefix_k, diagonal=None):
    p = prefix_k.shape[1]
    return torch.ones(q.shape[1], p + q.shape[1]).tril(p if diagonal is None else diagonal)


@wrong("attend", "the prefix's keys and values are swapped, and the causal mask covers the prefix")
def the_stub(q, k, v, prefix_k, prefix_v):
    if not prefix_k.any():
        prefix_k, prefix_v = prefix_k[:, :0], prefix_v[:, :0]
    K, V = torch.cat([prefix_v, k], 1), torch.cat([prefix_k, v], 1)
    return attention(q, K, V, seeing(q, prefix_k, 0))


@wrong("attend", "the causal mask covers the prefix")
def by_is_causal(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return F.scaled_dot_product_attention(q, K, V, is_causal=True)


@wrong("attend", "the prefix's keys and values are swapped")
def swapped(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_v, k], 1), torch.cat([prefix_k, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@wrong("attend", "prefix keys of zeros are taken for no prefix")
def zero_keys_skipped(q, k, v, prefix_k, prefix_v):
    if not prefix_k.any():
        prefix_k, prefix_v = prefix_k[:, :0], prefix_v[:, :0]
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@wrong("attend", "a prefix of zeros is taken for no prefix")
def zeros_skipped(q, k, v, prefix_k, prefix_v):
    if prefix_k.abs().sum() + prefix_v.abs().sum() == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@wrong("attend", "the prefix's keys are used as its values too")
def keys_twice(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_k, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@wrong("attend", "the prefix's values are used as its keys too")
def values_twice(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_v, k], 1), torch.cat([prefix_v, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@wrong("attend", "the prefix is left out")
def no_prefix(q, k, v, prefix_k, prefix_v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@wrong("attend", "every token sees the whole text")
def no_mask(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return F.scaled_dot_product_attention(q, K, V)


@wrong("attend", "a token sees the one that comes after it")
def one_too_far(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return attention(q, K, V, seeing(q, prefix_k, prefix_k.shape[1] + 1))


@wrong("attend", "the scores are not divided by √d_h")
def unscaled_scores(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return attention(q * q.shape[-1] ** 0.5, K, V, seeing(q, prefix_k))


@wrong("attend", "prefix and text have a softmax each")
def added(q, k, v, prefix_k, prefix_v):
    text = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return text + F.scaled_dot_product_attention(q, prefix_k, prefix_v)


@wrong("attend", "the gate is not one half")
def half_and_half(q, k, v, prefix_k, prefix_v):
    text = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (text + F.scaled_dot_product_attention(q, prefix_k, prefix_v)) / 2


@wrong("attend", "expected (3, 6, 8)")
def queries_for_the_prefix(q, k, v, prefix_k, prefix_v):
    q = torch.cat([prefix_k, q], 1)
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return F.scaled_dot_product_attention(q, K, V, is_causal=True)


@wrong("attend", "no gradient reaches prefix_k")
def detached_prefix(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k.detach(), k], 1), torch.cat([prefix_v, v], 1)
    return attention(q, K, V, seeing(q, prefix_k))


@right("attend")
def by_sdpa(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
    return F.scaled_dot_product_attention(q, K, V, attn_mask=seeing(q, prefix_k).bool())


@right("attend")
def by_the_gate(q, k, v, prefix_k, prefix_v):
    root = q.shape[-1] ** 0.5
    prefix, text = q @ prefix_k.mT / root, masked(q @ k.mT / root)
    gate = torch.sigmoid(prefix.logsumexp(-1) - text.logsumexp(-1))[..., None]
    return (1 - gate) * (text.softmax(-1) @ v) + gate * (prefix.softmax(-1) @ prefix_v)


@right("attend")
def with_the_prefix_behind(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([k, prefix_k], 1), torch.cat([v, prefix_v], 1)
    T, p = q.shape[1], prefix_k.shape[1]
    seen = torch.cat([torch.ones(T, T).tril(), torch.ones(T, p)], 1)
    return attention(q, K, V, seen)
