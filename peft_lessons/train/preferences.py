"""Learn which of two answers is better: log-probabilities of answers, and DPO's loss.

A batch holds the chosen answers of all prompts first, then the rejected ones, as a
`PreferenceTask` gives them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def answer_logprob(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the summed log-probability (size,) of each sequence's labels, in float32 at least.

    batch: `input_ids` and `labels` (size, T), and whatever else the model is to be given, such as
    `attention_mask` where there is padding. A label of -100 does not count, nor does the first one,
    which nothing predicts."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(use_cache=False, **inputs).logits[:, :-1], batch["labels"][:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return -losses.view(labels.shape).sum(dim=1)


def preference_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return DPO's loss, averaged over the pairs, and the rewards (2 · pairs,) of all answers
    (Rafailov et al. 2023, equation 7).

    policy and reference: log-probabilities (2 · pairs,), the chosen answers first."""
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), rewards
