"""How far a learning rate reaches: the first step of Adam, from one backward pass."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..engine import injection_of
from .loop import _device, _loss, _refuse_batches, _refuse_unready, rate_factors


def gradient_sum(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return Σ|∂ℓ/∂θ| over all that trains: by how many nats the first step of Adam promises to
    lower the loss, for each unit of the learning rate; with the factors of the rate that the method
    in the model has, as LoRA+ for B.

    ℓ is the mean of the losses of the batches, dicts of tensors with `labels` as for `fit`, with
    dropout off, and the method's penalty. Weights, `.grad` and mode stay as they are.

    Raises ValueError for batches as `fit`, and where nothing trains or the gradient is not finite;
    RuntimeError while a method is merged or switched off."""
    injection, device, was_training = injection_of(model), _device(model), model.training
    _refuse_batches("gradient_sum", batches)
    _refuse_unready(model, injection, "gradient_sum")
    factors = rate_factors(model, injection)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    model.eval()
    try:
        for batch in batches:
            loss = _loss(model, {k: v.to(device) for k, v in batch.items()}).loss
            if injection:
                loss = loss + injection.method.penalty(injection)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient / len(batches)
    finally:
        model.train(was_training)
    found = sum(factors[name] * total.abs().sum().item() for name, total in sums.items())
    if not math.isfinite(found):
        raise ValueError(f"gradient_sum: the gradient is {found}: look at the batches")
    return found
