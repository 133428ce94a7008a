"""Solutions of lesson 01."""

import torch.nn as nn


def largest_batch(gpu_bytes: float, held: float, gradients: float, per_sentence: float) -> int:
    """Return the sentences of the largest batch whose step fits; 0 if none does."""
    left = gpu_bytes - held
    # The gradients do not grow with the batch: they fit, or no batch does.
    if left < max(gradients, per_sentence):
        return 0
    return int(left // per_sentence)


def training_bytes(
    n_params: int,
    n_trainable: int,
    weight: float = 2,
    grad: float = 2,
    master: float = 4,
    moments: float = 8,
) -> int:
    """Return the bytes of weights, gradients, master copy and moments, without activations."""
    return int(n_params * weight + n_trainable * (grad + master + moments))


def step_flops(n_params: int, n_trainable: int, tokens: int) -> int:
    """Return the floating-point operations of one training step on `tokens` tokens."""
    forward = 2 * n_params * tokens
    through_activations = 2 * n_params * tokens
    weight_gradients = 2 * n_trainable * tokens
    return forward + through_activations + weight_gradients


def largest_rank(
    shapes: list[tuple[int, int]], budget_bytes: int, bytes_per_parameter: float
) -> int:
    """Return the largest LoRA rank whose factors fit the budget; 0 if none does."""
    per_rank = sum(out_features + in_features for out_features, in_features in shapes)
    fits = int(budget_bytes // (per_rank * bytes_per_parameter))
    return min(fits, min(min(shape) for shape in shapes))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count all parameters and those that train: (total, trainable)."""
    total = trainable = 0
    # parameters() gives a tied weight once, and no buffers.
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        if parameter.requires_grad:
            trainable += count
    return total, trainable
