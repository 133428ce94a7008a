"""Solutions of lesson 10."""

import torch
import torch.nn as nn


def select_bitfit(model: nn.Module) -> list[str]:
    """Return the names of all biases of a model, in its order. ValueError if it has none."""
    last = {name: name.rpartition(".")[2] for name, _ in model.named_parameters()}
    biases = [name for name, own in last.items() if own == "bias" or own.endswith("_bias")]
    if not biases:
        raise ValueError(f"{type(model).__name__} has no biases, so BitFit would train nothing")
    return biases


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Return the output (..., out) of a linear layer with a trained difference at k positions."""
    changed = weight.flatten().scatter_add(0, indices, values)      # (out · in)
    return x @ changed.view(weight.shape).T + bias                  # (..., out)


def hard_concrete(
    log_alpha: torch.Tensor,
    u: torch.Tensor,
    low: float = -1.5,
    high: float = 1.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the gates in [0, 1] that the uniform numbers u draw, one for each log α."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / temperature)   # in (0, 1)
    return (s * (high - low) + low).clamp(0, 1)                     # stretched to (low, high)


def expected_l0(
    log_alpha: torch.Tensor, low: float = -1.5, high: float = 1.5, temperature: float = 1.0
) -> torch.Tensor:
    """Return how many of the gates a draw leaves open on average."""
    # z > 0 where (logit(u) + log α) / β > log(−low / high), and logit(u) has the CDF σ.
    return torch.sigmoid(log_alpha - temperature * log_alpha.new_tensor(-low / high).log()).sum()


def sparse_diff(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return {name: (flat indices, new values)} of all entries whose bits have changed."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    diff = {}
    for name, new in after.items():
        bits = whole_numbers[new.element_size()]
        changed = before[name].view(bits) != new.view(bits)         # the tensor's shape
        indices = changed.flatten().nonzero().flatten()             # (k,)
        if len(indices):
            diff[name] = indices, new.flatten()[indices]            # (k,), (k,)
    return diff


def apply_sparse_diff(
    before: dict[str, torch.Tensor], diff: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return a new state dict: `before`, with the values of `diff` at their indices."""
    for name, (indices, _) in diff.items():
        if name not in before:
            raise ValueError(f"{name!r} is not in the state dict")
        if ((indices < 0) | (indices >= before[name].numel())).any():
            raise ValueError(f"{name!r}: an index is not in 0 to {before[name].numel() - 1}")
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name, (indices, values) in diff.items():
        flat = before[name].flatten()                               # row after row
        after[name] = flat.scatter(0, indices, values).view(before[name].shape)
    return after


def make_optimizer(model: nn.Module, names: list[str]) -> torch.optim.AdamW:
    """Return AdamW over the parameters in `names`; freeze the others."""
    model.zero_grad()                                               # to None, not to zeros
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    chosen = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1)
