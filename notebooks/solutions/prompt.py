"""Solutions of lesson 08."""

import torch
import torch.nn.functional as F


def nearest_tokens(prompt: torch.Tensor, embeddings: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ids (p, k) of the tokens of a table (V, d) nearest to the rows of a prompt."""
    # F.normalize leaves a row of zeros as it is, so its cosine is 0.
    cosine = F.normalize(prompt, dim=1) @ F.normalize(embeddings, dim=1).T     # (p, V)
    return cosine.topk(k, dim=1).indices                                       # (p, k)


def init_from_text(ids: torch.Tensor, embeddings: torch.Tensor, p: int) -> torch.Tensor:
    """Return the embeddings (p, d) of a text's tokens (n,), repeated or cut off to p of them."""
    return embeddings[ids[torch.arange(p) % len(ids)]]                         # (p, d)


def prompt_ensemble(prompts: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Return the weighted mean (p, d) of prompts (p, d); the weights need not sum to 1."""
    if len(weights) != len(prompts):
        raise ValueError(f"{len(weights)} weights for {len(prompts)} prompts: give one for each")
    return sum(w * prompt for w, prompt in zip(weights, prompts, strict=True)) / sum(weights)


def prepend_prompt(
    embeddings: torch.Tensor,
    mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    prompt: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return embeddings, mask and labels with the same prompt (p, d) before every text."""
    batch, p = len(embeddings), len(prompt)
    virtual = prompt.to(embeddings.dtype).expand(batch, -1, -1)                # (batch, p, d)
    if mask is not None:
        mask = torch.cat([mask.new_ones(batch, p), mask], dim=1)               # (batch, p + T)
    if labels is not None:
        ignored = labels.new_full((batch, p), -100)                            # (batch, p)
        labels = torch.cat([ignored, labels], dim=1)       # the model shifts them: (batch, p + T)
    return torch.cat([virtual, embeddings], dim=1), mask, labels               # (batch, p + T, d)
