"""Solutions of lesson 06."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons import Adapter


def adapter_forward(
    h: torch.Tensor,
    w_down: torch.Tensor,
    b_down: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor,
) -> torch.Tensor:
    """Return h plus what the adapter computes from h, of shape (..., d)."""
    low = F.gelu(h @ w_down.T + b_down)                       # (..., m)
    return h + low @ w_up.T + b_up                            # (..., d)


def adapted_output(
    x: torch.Tensor, h: torch.Tensor, adapter: nn.Module, norm: nn.Module, kind: str
) -> torch.Tensor:
    """Return the output (..., d) of a BERT sublayer with an adapter of this kind."""
    t = {"houlsby": h, "parallel": x, "pfeiffer": norm(x + h)}[kind]
    return norm(x + h + adapter(t))                           # (..., d)


def fold_linear_adapter(
    w_down: torch.Tensor,
    b_down: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (d, in) and bias (d,) of one layer: the layer and the adapter after it."""
    new_weight = weight + w_up @ (w_down @ weight)            # (d, in)
    new_bias = bias + w_up @ (w_down @ bias + b_down) + b_up  # (d,)
    return new_weight, new_bias


def insert_adapters(layer: nn.Module, width: int) -> nn.Module:
    """Put Houlsby's adapters of width m into a block of BERT: LN(x + h + a(h)), twice."""
    layer.requires_grad_(False)
    for output in (layer.attention.output, layer.output):
        adapter = Adapter(output.dense.out_features, width)   # h -> h + a(h)
        output.dense = nn.Sequential(output.dense, adapter)
    return layer


def adapter_parameters(d: int, m: int, layers: int, kind: str) -> int:
    """Return how many parameters the adapters of a model have, biases included."""
    places = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}     # of every layer
    return layers * places[kind] * (2 * d * m + m + d)


def identity_gap(adapter: nn.Module, h: torch.Tensor) -> float:
    """Return ‖adapter(h) − h‖ / ‖h‖, 0 for the identity."""
    change = adapter(h) - h                                   # (..., d)
    return (change.norm() / h.norm()).item()
