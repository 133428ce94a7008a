"""Solutions of lesson 14."""

import math
from collections.abc import Callable

import torch


def gradient_sum(
    model: torch.nn.Module, batches: list[dict], factors: dict[str, float]
) -> float:
    """Return the sum of |gradient| over all trainable parameters, each times its factor."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    # autograd.grad returns the gradients and leaves every .grad alone.
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return sum(
        factors.get(name, 1) * gradient.abs().sum().item()
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None
    )


def fair_comparison(runs: list[dict], a: str, b: str) -> dict:
    """Return each learning rate, the pairs of test scores, and whether a rate is at an edge."""
    lr, at_edge, test = {}, {}, {}
    for method in (a, b):
        own = [run for run in runs if run["method"] == method]
        tried = {run["lr"]: run["validation"] for run in own if run["seed"] == 0}
        ended = [rate for rate, score in tried.items() if not math.isnan(score)]
        lr[method] = min(ended, key=tried.get)                # by validation, never by test
        at_edge[method] = lr[method] in (min(tried), max(tried))
        test[method] = {run["seed"]: run["test"] for run in own if run["lr"] == lr[method]}
    pairs = {seed: test[a][seed] - test[b][seed] for seed in test[a] if seed in test[b]}
    return {"lr": lr, "pairs": pairs, "at_edge": at_edge}


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
