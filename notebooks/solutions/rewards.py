"""Solutions of lesson 16."""

from collections.abc import Callable

import torch
import torch.nn as nn


def sum_reward(text: str, a: int, b: int) -> float:
    """Return 1.0 if the text is the sum of a and b and a line break, else 0.0."""
    return float(text == f"{a + b}\n")


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages (groups, answers) of rewards (groups, answers)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def policy_gradient_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    kind: str = "dapo",
    clip: float = 0.2,
) -> torch.Tensor:
    """Return the loss of answers whose tokens have these log-probabilities (answers, T)."""
    ratio = (logprobs - old_logprobs).exp()
    A = advantages[:, None]                                    # one for all tokens of an answer
    gain = torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) * mask
    if kind == "grpo":
        return -(gain.sum(1) / mask.sum(1)).mean()
    return -gain.sum() / mask.sum()


def diagnose_curves() -> dict[str, str]:
    """Return {run: fault} for the broken runs A to D."""
    return {
        "A": "any number is paid",
        "B": "asked in a chat",
        "C": "ten times the learning rate",
        "D": "a hundredth of the learning rate",
    }


def reward_step(
    model: nn.Module,
    prompts: torch.Tensor,
    reward: Callable[[list[int]], float],
    size: int,
    end: int,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `size` answers to each prompt, their advantages, their mask, and the loss."""
    rows = prompts.repeat_interleave(size, dim=0)              # (N, T0)
    ids = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0,
        max_new_tokens=tokens, eos_token_id=end, pad_token_id=end,
    )
    answers = ids[:, rows.shape[1] :]                          # (N, T), filled up with `end`
    ended = (answers == end).cumsum(1)
    mask = ((ended == 0) | ((ended == 1) & (answers == end))).float()

    rewards = torch.tensor([reward(answer) for answer in answers.tolist()])
    advantages = group_advantages(rewards.view(-1, size)).flatten()

    logits = model(ids).logits[:, rows.shape[1] - 1 : -1]      # those that predict the answers
    logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    old_logprobs = logprobs.detach()                           # a constant: no gradient
    ratio = (logprobs - old_logprobs).exp()
    loss = -(ratio * advantages[:, None] * mask).sum() / mask.sum()
    return answers, advantages, mask, loss
