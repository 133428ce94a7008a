"""Solutions of lesson 04."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the length (out,) of every row of a weight, and the rows at length 1 (out, in)."""
    return weight.norm(dim=1), F.normalize(weight, dim=1)     # a row of zeros stays zeros


def dora_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    alpha: float,
    magnitude: torch.Tensor,
) -> torch.Tensor:
    """Return x (m / ‖V‖ ⊙ V)ᵀ + b (..., out), V = W + s·BA; make nothing as large as W."""
    s = alpha / A.shape[0]
    with torch.no_grad():
        # ‖w + s·bA‖² = ‖w‖² + 2s·(wAᵀ)·b + s²·b(AAᵀ)·b for a row w of W and a row b of B
        square = weight.norm(dim=1) ** 2                      # (out,)
        square += 2 * s * ((weight @ A.T) * B).sum(dim=1)
        square += s**2 * ((B @ (A @ A.T)) * B).sum(dim=1)
        norm = square.sqrt()                                  # (out,)
    branch = s * F.linear(F.linear(x, A), B)                  # (..., out)
    y = magnitude / norm * (F.linear(x, weight) + branch)     # (..., out)
    return y if bias is None else y + bias


def magnitude_direction_change(w0: torch.Tensor, w1: torch.Tensor) -> tuple[float, float]:
    """Return the mean change of the rows' lengths, and the mean of 1 - cosine of the rows."""
    delta_m = (w1.norm(dim=1) - w0.norm(dim=1)).abs().mean()  # ()
    delta_d = (1 - F.cosine_similarity(w0, w1, dim=1)).mean() # ()
    return delta_m.item(), delta_d.item()


class DoRALinear(nn.Module):
    """Compute y = x (m · V / ‖V‖)ᵀ + b, V = W + (alpha / rank) · BA, around a frozen Linear."""

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 16.0):
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(linear.weight.norm(dim=1))                # (out,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        V = self.linear.weight + self.scaling * self.lora_B @ self.lora_A       # (out, in)
        direction = V / V.norm(dim=1, keepdim=True).detach()                    # (out, in)
        return F.linear(x, self.magnitude[:, None] * direction, self.linear.bias)


def diagnose_rows() -> dict[str, str]:
    """Return {run: fault} for the runs A to E."""
    return {
        "A": "used without m",
        "B": "m starts as ones",
        "C": "V is detached with its norm",
        "D": "m is frozen",
        "E": "the norm is that of the columns",
    }
