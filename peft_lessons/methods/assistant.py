"""Reward a rule that an answer keeps, and compare answers within a group."""

import re

import torch


def keeps_rule(text: str, ended: bool, most: int = 25) -> bool:
    """Return whether an answer that the model ended itself is one sentence of 5 to `most` words."""
    sentences = re.findall(r"[^.!?]+[.!?](?=\s|$)", text)
    return ended and sentences == [text] and 5 <= len(text.split()) <= most


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward (groups, size) minus the mean reward of its group.

    Source: Shao et al. 2024, section 4.1, without division by the standard deviation."""
    return rewards - rewards.mean(dim=1, keepdim=True)
