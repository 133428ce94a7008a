"""Answers to the exercises of lesson 09."""

import numpy as np
import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ merge_prefix


@right("merge_prefix")
def by_a_view(weight, bias, gate, content):
    heads = weight.view(len(weight), *content.shape)
    added = torch.einsum("ohd,h,hd->o", heads, gate, content)
    return (heads * (1 - gate)[:, None]).flatten(1), added + (0 if bias is None else bias)


@right("merge_prefix")
def by_blocks(weight, bias, gate, content):
    new, added = weight.clone(), torch.zeros(len(weight)) if bias is None else bias.clone()
    for h, (share, value) in enumerate(zip(gate, content, strict=True)):
        columns = slice(h * len(value), (h + 1) * len(value))
        new[:, columns] *= 1 - share
        added += share * weight[:, columns] @ value
    return new, added


@right("merge_prefix")
def by_a_diagonal(weight, bias, gate, content):
    lam = gate.repeat_interleave(content.shape[1])
    bias = torch.zeros(len(weight)) if bias is None else bias
    return weight @ torch.diag(1 - lam), torch.addmv(bias, weight @ lam.diag(), content.flatten())


@wrong("merge_prefix", "a layer without a bias still has none")
def no_bias_before_none_after(weight, bias, gate, content):
    share = (1 - gate).repeat_interleave(content.shape[1])
    added = weight @ (gate[:, None] * content).flatten()
    return weight * share, None if bias is None else bias + added


@wrong("merge_prefix", "the argument weight was changed")
def in_place(weight, bias, gate, content):
    added = weight @ (gate[:, None] * content).flatten()
    weight *= (1 - gate).repeat_interleave(content.shape[1])
    return weight, added if bias is None else bias + added


# ------------------------------------------------------------------ prefix_gate


def scores_of(q, k, prefix_k):
    """The scores of prefix and text, what a token does not see at −∞."""
    k, prefix_k = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, prefix_k))
    text = q @ k.mT / q.shape[-1] ** 0.5
    return q @ prefix_k.mT / q.shape[-1] ** 0.5, text + torch.full_like(text, -torch.inf).triu(1)


@wrong("prefix_gate", "your function raised RuntimeError")
def without_groups(q, k, prefix_k):
    scores = q @ torch.cat([prefix_k, k], 1).mT / q.shape[-1] ** 0.5
    return scores.softmax(-1)[..., : prefix_k.shape[1]].sum(-1)


@right("prefix_gate")
def by_groups(q, k, prefix_k):
    n_kv, T, d_h = k.shape
    q = q.reshape(n_kv, -1, T, d_h) / d_h**0.5
    text = torch.einsum("ngtd,nsd->ngts", q, k) + torch.full((T, T), -torch.inf).triu(1)
    prefix = torch.einsum("ngtd,npd->ngtp", q, prefix_k)
    both = torch.stack([prefix.logsumexp(-1), text.logsumexp(-1)])
    return both.softmax(0)[0].flatten(0, 1)


@right("prefix_gate")
def by_numpy(q, k, prefix_k):
    q, k, prefix_k = (t.double().numpy() for t in (q, k, prefix_k))
    K = np.concatenate([prefix_k, k], 1).repeat(len(q) // len(k), 0)
    scores = q @ K.transpose(0, 2, 1) / q.shape[-1] ** 0.5
    scores[:, ~np.tri(*scores.shape[1:], prefix_k.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return torch.from_numpy(weights[..., : prefix_k.shape[1]].sum(-1) / weights.sum(-1))


@right("prefix_gate")
def by_attention_to_ones(q, k, prefix_k):
    """What attention gives whose values are 1 in the prefix and 0 in the text."""
    (heads, T, d_h), (n_kv, p, _) = q.shape, prefix_k.shape
    K = torch.cat([prefix_k, k], 1).repeat_interleave(heads // n_kv, 0)
    V = torch.zeros(heads, p + T, 1, dtype=q.dtype)
    V[:, :p] = 1
    mask = torch.ones(T, p + T, dtype=torch.bool).tril(p)
    return F.scaled_dot_product_attention(q, K, V.expand(-1, -1, d_h).contiguous(), mask)[..., 0]


# ------------------------------------------------------------------ context_to_prefix


@torch.no_grad()
def in_any_mode(model, ids):
    cache = model(ids[None]).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@wrong("context_to_prefix", "the argument model was changed")
def left_in_eval(model, ids):
    return in_any_mode(model.eval(), ids)


@wrong("context_to_prefix", "is a DynamicCache, expected a list")
def the_cache(model, ids):
    return model(ids[None]).past_key_values


@wrong("context_to_prefix", "wrong values")
@torch.no_grad()
def from_position_one(model, ids):
    positions = torch.arange(1, len(ids) + 1)[None]
    cache = model(ids[None], position_ids=positions).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


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
def with_a_graph(model, ids):
    was = model.training
    cache = model.eval()(ids[None]).past_key_values
    model.train(was)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@right("context_to_prefix")
@torch.no_grad()
def in_two_parts(model, ids):
    was = model.training
    model.eval()
    cache = model(ids[None, :1]).past_key_values
    if len(ids) > 1:
        cache = model(ids[None, 1:], past_key_values=cache).past_key_values
    model.train(was)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


# ------------------------------------------------------------------ attend


def hunted(zeros=False, swapped=False, covered=False):
    """The given code, with some of its faults left."""

    def attend(q, k, v, prefix_k, prefix_v):
        if zeros and not prefix_k.any():
            prefix_k, prefix_v = prefix_k[:, :0], prefix_v[:, :0]
        first, second = (prefix_v, prefix_k) if swapped else (prefix_k, prefix_v)
        K, V = torch.cat([first, k], dim=1), torch.cat([second, v], dim=1)
        scores = q @ K.mT / q.shape[-1] ** 0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool)
        seen = seen.tril(0 if covered else prefix_k.shape[1])
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ V

    return attend


@answers.hunt("attend")
def with_bugs(bugs):
    text = " ".join(bugs)
    return hunted("zeros" in text, "swapped" in text, "causal" in text)


wrong("attend", "the prefix's keys and values are swapped")(hunted(True, True, True))
wrong("attend", "the causal mask covers the prefix")(hunted(True, False, True))
wrong("attend", "prefix keys of zeros are treated as no prefix")(hunted(True))


@wrong("attend", "expected (2, 3, 9)")
def queries_for_the_prefix(q, k, v, prefix_k, prefix_v):
    q, K, V = (torch.cat(pair, 1) for pair in ((prefix_k, q), (prefix_k, k), (prefix_v, v)))
    return F.scaled_dot_product_attention(q, K, V, is_causal=True)


@right("attend")
@torch.no_grad()
def in_loops(q, k, v, prefix_k, prefix_v):
    out = torch.zeros(q.shape)
    for h, t in np.ndindex(*q.shape[:2]):
        K = torch.cat([prefix_k[h], k[h, : t + 1]])
        V = torch.cat([prefix_v[h], v[h, : t + 1]])
        out[h, t] = (K @ q[h, t] / q.shape[-1] ** 0.5).softmax(0) @ V
    return out


@right("attend")
def by_the_gate(q, k, v, prefix_k, prefix_v):
    prefix, text = scores_of(q, k, prefix_k)
    gate = torch.sigmoid(prefix.logsumexp(-1) - text.logsumexp(-1))[..., None]
    return (1 - gate) * (text.softmax(-1) @ v) + gate * (prefix.softmax(-1) @ prefix_v)


@right("attend")
def with_the_prefix_behind(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([k, prefix_k], 1), torch.cat([v, prefix_v], 1)
    T, p = q.shape[1], prefix_k.shape[1]
    seen = torch.cat([torch.ones(T, T).tril(), torch.ones(T, p)], 1).bool()
    return F.scaled_dot_product_attention(q, K, V, seen)
