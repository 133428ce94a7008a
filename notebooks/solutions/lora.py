"""Solutions of lesson 02."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons import LinearWithLoRA


def swap_words(weight: torch.Tensor, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (1, d) and B (V, 1): weight + BA is `weight` with rows i and j exchanged."""
    A = weight[[j]] - weight[[i]]                  # reads what word j has and word i has not
    B = torch.zeros_like(weight[:, :1])
    B[i], B[j] = 1, -1                             # word i gains it, word j loses it
    return A, B


def diagnose() -> dict[str, str]:
    """Return {run: cause} for the broken runs A to E."""
    return {
        "A": "merged before training",                    # no gradient reaches the factors
        "B": "a target that matches too much",            # 148,226 trainable parameters, not 74,498
        "C": "the learning rate of full fine-tuning",     # gradients, but BA hardly changes
        "D": "the head is frozen",                        # 770 trainable parameters are missing
        "E": "both factors start at zero",                # their gradients stay at 0
    }


def compress_lora(
    A: torch.Tensor, B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors A (rank, in) and B (out, rank): the best approximation of BA."""
    Q_b, R_b = torch.linalg.qr(B)                  # (out, r), (r, r)
    Q_a, R_a = torch.linalg.qr(A.T)                # (in, r), (r, r)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T)       # all (r, r): BA = Q_b U S Vh Q_aᵀ
    return Vh[:rank] @ Q_a.T, Q_b @ (U[:, :rank] * S[:rank])


def serve_lora(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: torch.Tensor, which: torch.Tensor
) -> torch.Tensor:
    """Return what each text's own adapter adds, (batch, tokens, out)."""
    low = x @ A[which].mT                          # (batch, tokens, r)
    scale = torch.where(which >= 0, scaling[which], 0.0)    # (batch,)
    return scale[:, None, None] * (low @ B[which].mT)


def embedding_lora(
    ids: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return the adapted rows (..., d) of the token table for `ids`."""
    low = F.embedding(ids, A.T)                    # (..., r)
    return F.embedding(ids, weight) + (alpha / A.shape[0]) * (low @ B.T)


def sum_adapters(
    adapters: list[tuple[torch.Tensor, torch.Tensor, float, float]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one pair (A, B) with scaling 1 whose BA is the weighted sum of all updates."""
    A = torch.cat([A for A, _, _, _ in adapters])  # (r₁ + r₂ + …, in)
    scaled = [weight * alpha / B.shape[1] * B for _, B, alpha, weight in adapters]
    return A, torch.cat(scaled, dim=1)             # (out, r₁ + r₂ + …)


def apply_lora(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> nn.Module:
    """Freeze the model, put LoRA on every linear layer that `targets` name, and return it."""
    modules = dict(model.named_modules())
    if any(hasattr(module, "lora") for module in modules.values()):
        raise ValueError("the model already has LoRA branches: unload them first")
    found = {}
    for target in targets:
        matches = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and f".{name}".endswith(f".{target}")
        ]
        if not matches:
            raise ValueError(f"no linear layer matches the target {target!r}")
        found.update((name, modules[name]) for name in matches)
    model.requires_grad_(False)
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(linear, rank, alpha))
    return model
