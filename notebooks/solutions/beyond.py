"""Solutions of lesson 14."""

import math
from collections.abc import Callable, Iterable

import torch


def rslora_scaling(alpha: float, rank: int) -> float:
    """Return the scaling that makes gradient descent's first step the same at every rank."""
    return alpha / math.sqrt(rank)


def loraplus_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], lr: float, ratio: float
) -> list[dict]:
    """Return an optimiser's two groups: all parameters but B at lr, then every B at ratio · lr."""
    others, ups = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (ups if "lora_B" in name else others).append(parameter)
    return [{"params": others, "lr": lr}, {"params": ups, "lr": lr * ratio}]


def pissa_init(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A (rank, in), B (out, rank) of the largest singular values, and the residual."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()                                    # (rank,)
    A, B = root[:, None] * V[:rank], U[:, :rank] * root       # (rank, in), (out, rank)
    return A, B, weight - B @ A


def loftq_init(
    weight: torch.Tensor, rank: int, quantize: Callable[[torch.Tensor], torch.Tensor], steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A (rank, in), B (out, rank) and the last quantised Q (out, in), from BA = 0."""
    product = torch.zeros_like(weight)
    for _ in range(steps):
        quantized = quantize(weight - product)                # (out, in)
        U, S, V = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = S[:rank].sqrt()                                # (rank,)
        A, B = root[:, None] * V[:rank], U[:, :rank] * root   # (rank, in), (out, rank)
        product = B @ A
    return A, B, quantized


def intruder_dimensions(w0: torch.Tensor, w1: torch.Tensor, k: int, eps: float) -> int:
    """Count the k strongest left singular vectors of w1 that have |cosine| < eps with all of
    w0's."""
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w1))
    cosines = (old.T @ new[:, :k]).abs()                      # (vectors of w0, k)
    return int((cosines.amax(dim=0) < eps).sum())
