"""Solutions of lesson 09."""

import torch
import torch.nn as nn


def merge_prefix(
    weight: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor, content: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the one layer that gate, content and output projection make."""
    share = (1 - gate).repeat_interleave(content.shape[1])    # (n_h·d_h,), one for each column
    added = weight @ (gate[:, None] * content).flatten()      # (d,)
    return weight * share, added if bias is None else bias + added


def prefix_gate(q: torch.Tensor, k: torch.Tensor, prefix_k: torch.Tensor) -> torch.Tensor:
    """Return the share of each token's attention that goes to the prefix, (heads, T)."""
    heads, T, d_h = q.shape
    group = heads // len(k)
    k, prefix_k = (t.repeat_interleave(group, dim=0) for t in (k, prefix_k))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)       # (T, T)
    text = (q @ k.mT / d_h**0.5).masked_fill(future, -torch.inf)  # (heads, T, T)
    prefix = q @ prefix_k.mT / d_h**0.5                       # (heads, T, p)
    return torch.sigmoid(prefix.logsumexp(-1) - text.logsumexp(-1))


def context_to_prefix(
    model: nn.Module, ids: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each layer's keys and values, each (n_kv, p, d_h), that reading `ids` leaves."""
    training = model.training
    model.eval()
    with torch.no_grad():
        cache = model(ids[None], use_cache=True).past_key_values
    model.train(training)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
) -> torch.Tensor:
    """Return attention of a text to all of a prefix, and to itself causally: (heads, T, d_h)."""
    K = torch.cat([prefix_k, k], dim=1)                       # (heads, p + T, d_h)
    V = torch.cat([prefix_v, v], dim=1)                       # (heads, p + T, d_h)
    scores = q @ K.mT / q.shape[-1] ** 0.5                    # (heads, T, p + T)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(prefix_k.shape[1])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ V
