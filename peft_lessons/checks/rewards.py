"""Checks of lesson 16."""

import torch

from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ group_advantages


def _groups(groups, size):
    """Return rewards of 0 or 1, among them a group without a right answer."""
    rewards = torch.randint(2, (groups, size)).float()
    rewards[:, :2], rewards[0] = torch.tensor([0.0, 1.0]), 0.0
    return [rewards]


@check_for(
    cases=[
        Case(lambda: _groups(3, 8)),
        Case(lambda: [torch.rand(4, 6)], note="rewards between 0 and 1"),
        Case(lambda: [torch.tensor([[0.0, 0.0, 3e-4, 0.0]])], note="nearly equal rewards"),
    ],
    causes=mistakes(
        """
        def group_advantages(rewards):
            centred = rewards - rewards.mean(1, keepdim=True)
            return centred / (rewards.std(1, keepdim=True) + 1e-4)
        """,
        """
        the mean runs over all answers: take the mean of each group
            rewards.mean(1, keepdim=True) → rewards.mean()
        the mean runs over the groups: take the mean over the answers of a group
            rewards.mean(1, keepdim=True) → rewards.mean(0, keepdim=True)
        the baseline is missing: subtract the mean of the group
            rewards - rewards.mean(1, keepdim=True) → rewards
        the standard deviation is missing: divide by it
            / (rewards.std(1, keepdim=True) + 1e-4) → ∅
        the standard deviation divides by n: the unbiased one divides by n - 1
            rewards.std(1, keepdim=True) → rewards.std(1, keepdim=True, unbiased=False)
        nothing is added to the standard deviation, and a group of equal rewards divides by zero
            + 1e-4 → ∅
        """,
    ),
)
def group_advantages(rewards):
    """Each answer is measured against its own group, and equal rewards give no advantage."""
    rows = []
    for row in rewards.unbind(0):
        centred = row - row.sum() / len(row)
        spread = (centred.square().sum() / (len(row) - 1)).sqrt()
        rows.append(centred / (spread + 1e-4))
    return torch.stack(rows)
