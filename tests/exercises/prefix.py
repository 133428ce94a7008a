"""Answers to the exercises of lesson 09."""

import numpy as np
import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ split_prefix


@wrong("split_prefix", "is a tensor, expected a tuple of 2")
def not_pairs(flat, layers, n_kv, d_h):
    return list(flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4))


@wrong("split_prefix", "the list is a tensor, expected a list of 3")
def a_tensor(flat, layers, n_kv, d_h):
    return flat.view(-1, layers, 2, n_kv, d_h).permute(1, 2, 3, 0, 4)


@right("split_prefix")
def by_an_index(flat, layers, n_kv, d_h):
    at = torch.arange(2 * layers * n_kv * d_h).view(layers, 2, n_kv, d_h)
    return [tuple(flat[:, at[i, j]].transpose(0, 1) for j in (0, 1)) for i in range(layers)]


# ------------------------------------------------------------------ prefix_gate


@wrong("prefix_gate", "your function raised RuntimeError")
def without_groups(q, k, prefix_k):
    scores = q @ torch.cat([prefix_k, k], 1).mT / q.shape[-1] ** 0.5
    return scores.softmax(-1)[..., : prefix_k.shape[1]].sum(-1)


@right("prefix_gate")
def by_numpy(q, k, prefix_k):
    q, k, prefix_k = (t.double().numpy() for t in (q, k, prefix_k))
    K = np.concatenate([prefix_k, k], 1).repeat(len(q) // len(k), 0)
    scores = q @ K.transpose(0, 2, 1) / q.shape[-1] ** 0.5
    scores[:, ~np.tri(*scores.shape[1:], prefix_k.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return torch.from_numpy(weights[..., : prefix_k.shape[1]].sum(-1) / weights.sum(-1))


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


# ------------------------------------------------------------------ attend


@wrong("attend", "expected (3, 6, 8)")
def queries_for_the_prefix(q, k, v, prefix_k, prefix_v):
    q, K, V = (torch.cat(pair, 1) for pair in ((prefix_k, q), (prefix_k, k), (prefix_v, v)))
    return F.scaled_dot_product_attention(q, K, V, is_causal=True)
