"""Solutions of lesson 10."""

import math

import numpy as np
import torch
import torch.nn as nn


def worth_in_entries(curve: dict[int, float], fall: float) -> float | None:
    """Return how many random entries gain `fall` nats, None outside the measured curve."""
    counts, falls = list(curve), list(curve.values())
    if not falls[0] <= fall <= falls[-1]:
        return None                                                 # there np.interp gives the ends
    return math.exp(np.interp(fall, falls, np.log(counts)))


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return x (W + S)ᵀ, (..., out): S has the values (k,) at flat positions (k,), else zeros."""
    changed = weight.flatten().scatter_add(0, positions, values)    # (out · in)
    return x @ changed.view(weight.shape).T                         # (..., out)


def make_optimizer(model: nn.Module, names: list[str]) -> torch.optim.AdamW:
    """Return AdamW over the parameters in `names`; freeze the others."""
    model.requires_grad_(False).zero_grad()                         # to None, not to zeros
    chosen = {model.get_parameter(name) for name in names}          # a shared tensor once
    for p in chosen:
        p.requires_grad = True
    return torch.optim.AdamW(list(chosen), lr=1e-2, weight_decay=0.1)


def sparse_diff(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return {name: (flat positions, new values)} of all entries whose bits have changed."""
    diff = {}
    for name, new in after.items():
        bits = torch.int32 if new.dtype == torch.float32 else torch.int16
        changed = before[name].view(bits) != new.view(bits)         # the tensor's shape
        positions = changed.flatten().nonzero().flatten()           # (k,)
        if len(positions):
            diff[name] = positions, new.flatten()[positions]        # (k,), (k,)
    return diff


def expected_l0(
    log_alpha: torch.Tensor, low: float = -1.5, high: float = 1.5, temperature: float = 1.0
) -> torch.Tensor:
    """Return how many of the gates a draw leaves open on average."""
    # z > 0 where (logit(u) + log α) / β > log(−low / high), and logit(u) has the CDF σ.
    return torch.sigmoid(log_alpha - temperature * log_alpha.new_tensor(-low / high).log()).sum()
