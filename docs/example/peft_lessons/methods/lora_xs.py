"""LoRA-XS: a small trainable square between two frozen factors that come from the weight."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import AdapterLayer, Method, PeftFiles, register, trained_dtype
from ..engine.design import SCALED, Design, Site


class LinearWithLoRAXS(AdapterLayer):
    """Compute y = x Wᵀ + b + s · ((x Aᵀ) Rᵀ) Bᵀ with A and B from the SVD of W, and R = 0 at the
    start. Source: Bałazy et al. 2024, section 3."""

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 8.0):
        super().__init__(linear)
        weight = linear.weight.detach()
        U, S, V = torch.linalg.svd(weight.to(trained_dtype(weight.dtype)), full_matrices=False)
        self.register_buffer("A", V[:rank].clone())  # (r, in)
        self.register_buffer("B", U[:, :rank] * S[:rank])  # (out, r)
        self.R = nn.Parameter(torch.zeros_like(self.A[:, :rank]))  # (r, r)
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        if self.merged:
            return y
        inner = F.linear(F.linear(x.to(self.A.dtype), self.A), self.R)  # (..., r)
        return (y + F.linear(inner, self.B) * self.scaling).to(y.dtype)

    def delta_weight(self) -> torch.Tensor:
        return self.B @ self.R @ self.A * self.scaling  # (out, in)


def through_square(site: Site) -> torch.Tensor:
    """Return s · x Aᵀ Rᵀ Bᵀ (LoRA-XS)."""
    layer = site.module
    return layer.scaling * (site.x @ layer.A.T @ layer.R.T @ layer.B.T)  # (..., out)


@register
@dataclass(frozen=True)
class LoRAXS(Method):
    """Apply LoRA-XS (Bałazy et al. 2024) to every Linear in `targets`."""

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | str = "all-linear"
    ranks = ("rank",)
    learning_rate = 1e-2
    design = Design("x Aᵀ Rᵀ Bᵀ", **SCALED, delta=through_square)
    # Another machine's SVD may turn the signs of singular vectors, so the file holds the factors.
    files = PeftFiles(
        "LORA_XS",
        fields={
            "rank": ("r", 8),
            "alpha": ("lora_alpha", 8),
            "targets": ("target_modules", None),
        },
        tensors={"R": "lora_xs_R", "A": "lora_xs_A", "B": "lora_xs_B"},
    )

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithLoRAXS:
        return LinearWithLoRAXS(layer, self.rank, self.alpha)

    def added(self, shape: Any) -> float:
        return shape.layers * len(shape.adapted(self.targets)) * self.rank**2
