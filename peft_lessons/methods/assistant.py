"""Labels of a chat, the log-probability of an answer, and the loss of direct preference
optimization (DPO)."""

import re

import torch
import torch.nn.functional as F

__all__ = ["answer_labels", "dpo_loss", "keeps_rule", "sequence_logprob"]


def keeps_rule(text: str, ended: bool, most: int = 25) -> bool:
    """Return whether an answer that the model ended itself is one sentence of 5 to `most` words."""
    sentences = re.findall(r"[^.!?]+[.!?](?=\s|$)", text)
    return ended and sentences == [text] and 5 <= len(text.split()) <= most


def answer_labels(ids: torch.Tensor, answer_start: int) -> torch.Tensor:
    """Return labels (T,) for the tokens of a chat (T,): -100 before `answer_start`, and from there
    on the tokens themselves, with the end token. The model shifts them by itself."""
    labels = ids.clone()
    labels[:answer_start] = -100
    return labels


def sequence_logprob(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability (batch,) of the labels (batch, T) that are not -100.

    logits: (batch, T, V). The logits at position t predict the label at position t + 1, so the
    first label has no prediction and does not count."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    learned = labels != -100
    ids = labels.where(learned, 0).unsqueeze(-1)
    picked = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
    return picked.where(learned, 0.0).sum(1)


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return DPO's loss, averaged over the pairs, and the rewards (batch,) of the chosen and of
    the rejected answers (Rafailov et al. 2023, equation 7).

    The first four arguments are log-probabilities (batch,), as `sequence_logprob` returns them."""
    reward_chosen = beta * (policy_chosen - reference_chosen)
    reward_rejected = beta * (policy_rejected - reference_rejected)
    loss = -F.logsigmoid(reward_chosen - reward_rejected).mean()
    return loss, reward_chosen, reward_rejected


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward (groups, size) minus the mean reward of its group."""
    return rewards - rewards.mean(dim=1, keepdim=True)
