"""Solutions of lesson 05."""

import torch


def update_importance(
    weight: torch.Tensor,
    grad: torch.Tensor,
    sensitivity: torch.Tensor,
    uncertainty: torch.Tensor,
    beta1: float,
    beta2: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the averages after this step, and the score of each entry."""
    importance = (weight * grad).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * importance
    deviation = (importance - sensitivity).abs()                   # from the new average
    uncertainty = beta2 * uncertainty + (1 - beta2) * deviation
    return sensitivity, uncertainty, sensitivity * uncertainty


def cubic_budget(
    step: int, initial: int, final: int, tinit: int, tfinal: int, total: int
) -> int:
    """Return how many triplets of the whole model may stay after a step, counted from 1."""
    if step <= tinit:
        return initial
    if step >= total - tfinal:
        return final
    left = 1 - (step - tinit) / (total - tfinal - tinit)           # from 1 to 0
    return int(final + (initial - final) * left**3)


def mask_to_budget(scores: list[torch.Tensor], budget: int) -> list[torch.Tensor]:
    """Return for each layer which triplets stay: the best `budget` of all layers together."""
    pooled = torch.cat(scores)                                     # (all triplets,)
    best = pooled.argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros(len(pooled), dtype=torch.bool)
    mask[best] = True
    return list(mask.split([len(score) for score in scores]))


def triplet_scores(
    Q: torch.Tensor,
    lam: torch.Tensor,
    P: torch.Tensor,
    dQ: torch.Tensor,
    dlam: torch.Tensor,
    dP: torch.Tensor,
) -> torch.Tensor:
    """Return a score (r,) for each triplet of a layer; those with the lowest ones are pruned."""
    return (lam * dlam).abs().flatten()      # to first order, how the loss would change


def adalora_step(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    allocator,
    step: int,
) -> torch.Tensor:
    """Take one training step of AdaLoRA and return the loss that was minimised."""
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step)           # after the step, while the gradients are there
    optimizer.zero_grad()
    return loss.detach()


def spend_by_hand(ranks: dict[str, int], scaling: float) -> dict:
    """Return target_modules, rank_pattern and alpha_pattern for a LoraConfig."""
    kept = {path: rank for path, rank in ranks.items() if rank > 0}
    return {
        "target_modules": list(kept),
        "rank_pattern": kept,
        "alpha_pattern": {path: scaling * rank for path, rank in kept.items()},
    }
