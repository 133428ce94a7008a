"""Solutions of lesson 08."""

from collections.abc import Callable

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


def best_swaps(
    gradient: torch.Tensor, embeddings: torch.Tensor, tokens: torch.Tensor, k: int
) -> torch.Tensor:
    """Return the k most promising swaps as (position, token), the best one first: (k, 2)."""
    change = gradient @ embeddings.T                                           # (p, V)
    change = change - change.gather(1, tokens[:, None])    # the old token's own term
    change.scatter_(1, tokens[:, None], torch.inf)         # to stay is no swap
    best = change.flatten().topk(k, largest=False).indices                     # (k,)
    return torch.stack([best // len(embeddings), best % len(embeddings)], dim=1)


def visible(
    predict: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, at: int, vocabulary: int
) -> torch.Tensor:
    """Return for each token of a text (T,) whether the prediction at position `at` sees it."""
    before, changes = predict(ids)[at], []                                     # (V,)
    for j in range(len(ids)):
        other = ids.clone()
        other[j] = (ids[j] + 1) % vocabulary               # any token but the one that is there
        changes.append((predict(other)[at] - before).abs().max())
    return torch.stack(changes) > 1e-4                     # (T,): more than rounding


def serve_prompts(
    embeddings: torch.Tensor, mask: torch.Tensor, prompts: list[torch.Tensor], which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and mask of a batch in which text i comes after prompts[which[i]]."""
    batch, longest = len(embeddings), max(len(prompt) for prompt in prompts)
    before = embeddings.new_zeros(batch, longest, embeddings.shape[2])         # (batch, P, d)
    shown = mask.new_zeros(batch, longest)                                     # (batch, P)
    for row, i in enumerate(which.tolist()):
        if i >= 0:
            start = longest - len(prompts[i])              # so that it ends where the text begins
            before[row, start:], shown[row, start:] = prompts[i], 1
    return torch.cat([before, embeddings], dim=1), torch.cat([shown, mask], dim=1)


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
