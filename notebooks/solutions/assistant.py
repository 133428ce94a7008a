"""Solutions of lesson 15."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from peft_lessons import disabled


def answer_labels(ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return labels (T,) that leave only the answer to learn, for a chat (T,) and its prompt."""
    n = len(prompt)
    if not torch.equal(ids[:n], prompt):
        raise ValueError("the prompt's tokens are no prefix of the chat's")
    labels = ids.clone()
    labels[:n] = -100
    return labels


def sequence_logprob(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (batch,) of each sequence's labels, given those before them."""
    logits, labels = logits[:, :-1], labels[:, 1:]     # position t predicts token t + 1
    learned = labels != -100
    ids = labels.where(learned, 0).unsqueeze(-1)       # -100 is no index
    picked = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
    return picked.where(learned, 0.0).sum(1)


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the DPO loss and the rewards (batch,) of the chosen and the rejected answers."""
    reward_chosen = beta * (policy_chosen - reference_chosen)
    reward_rejected = beta * (policy_rejected - reference_rejected)
    loss = -F.logsigmoid(reward_chosen - reward_rejected).mean()
    return loss, reward_chosen, reward_rejected


def preference_step(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pair: dict[str, str], beta: float
) -> torch.Tensor:
    """Return the DPO loss of one pair; the reference is the model with its adapter off."""
    chat = [{"role": "user", "content": pair["prompt"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, return_tensors="pt").input_ids[0]

    def logprob(answer):
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt").input_ids
        labels = answer_labels(ids[0], asked).unsqueeze(0)
        return sequence_logprob(model(ids).logits, labels)

    chosen, rejected = logprob(pair["chosen"]), logprob(pair["rejected"])
    with torch.no_grad(), disabled(model):
        reference = logprob(pair["chosen"]), logprob(pair["rejected"])
    loss, _, _ = dpo_loss(chosen, rejected, *reference, beta)
    return loss
