"""Solutions of lesson 06."""

from collections.abc import Callable

import torch
import torch.nn as nn

from peft_lessons import Adapter


class ResidualAdapter(nn.Module):
    """h + W_up f(W_down h + b_down) + b_up: the identity at first, and all of it learns."""

    def __init__(self, d: int, m: int, f: Callable):
        super().__init__()
        self.down, self.up, self.f = nn.Linear(d, m), nn.Linear(m, d), f
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.up(self.f(self.down(h)))              # (..., d)


def identify(sublayer: Callable, norm: nn.LayerNorm, adapter: nn.Module) -> str | None:
    """Return "houlsby", "pfeiffer" or "parallel", or None for any other adapter."""
    x, h = torch.randn(2, 8, len(norm.weight))                # (8, d) each
    before = adapter.up.weight.detach().clone()
    found = None
    with torch.no_grad():
        adapter.up.weight.normal_()
        for kind, t in {"houlsby": h, "pfeiffer": norm(x + h), "parallel": x}.items():
            if torch.allclose(sublayer(x, h), norm(x + h + adapter(t)), atol=1e-4):
                found = kind
        adapter.up.weight.copy_(before)
    return found


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


def merge_parallel(
    first: nn.Linear, second: nn.Linear, adapter: nn.Module, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return w1, b1, w2, b2 of one feed-forward that computes the old one plus scale · a(x)."""
    w1 = torch.cat([first.weight, adapter.down.weight])       # (d_ff + m, d)
    b1 = torch.cat([first.bias, adapter.down.bias])           # (d_ff + m,)
    w2 = torch.cat([second.weight, scale * adapter.up.weight], dim=1)       # (d, d_ff + m)
    return w1, b1, w2, second.bias + scale * adapter.up.bias


def insert_adapters(layer: nn.Module, width: int) -> nn.Module:
    """Put Houlsby's adapters of width m into a block of BERT: LN(x + h + a(h)), twice."""
    layer.requires_grad_(False)
    for output in (layer.attention.output, layer.output):
        adapter = Adapter(output.dense.out_features, width)   # h -> h + a(h)
        output.dense = nn.Sequential(output.dense, adapter)
    return layer
