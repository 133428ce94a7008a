"""What a model is called with, for the methods that put something before the text.

A prompt or a prefix sees every call of the model in a hook: in training, in evaluation, and in each
step of `generate`. Here such a call is read, and refused where it would go wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from .rules import validate


def by_name(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call as one dict, whether they came by place or by name."""
    return signature(model.forward).bind_partial(*args).arguments | kwargs


def text_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """What a call gives as its text: ids (batch, T), or embeddings (batch, T, d)."""
    given = inputs.get("inputs_embeds")
    text = inputs.get("input_ids") if given is None else given
    if text is None or text.dim() != (2 if given is None else 3):
        shape = None if text is None else tuple(text.shape)
        raise ValueError(
            f"the text, of shape {shape}, must be input_ids of shape (batch, tokens) or "
            "inputs_embeds of shape (batch, tokens, d)"
        )
    return text


def positions_of(model: nn.Module) -> int | None:
    """For how many tokens a model has positions; None if it sets no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet says -1
        return None
    embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return positions if padding is None else positions - padding - 1  # RoBERTa's begin behind it


def refuse_long(owner: str, model: nn.Module, p: int, text: int) -> None:
    """ValueError if p virtual tokens and `text` tokens are more than the model has positions."""
    positions = positions_of(model)
    if positions is not None and p + text > positions:
        raise ValueError(
            f"{owner}: {p} virtual tokens and {text} of text are more than the model's {positions} "
            "positions: shorten the text (max_length, max_new_tokens) or take fewer virtual tokens"
        )


def seen_in(inputs: Mapping[str, Any]) -> int:
    """How many places the cache of a call holds already, virtual tokens included."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def refuse_cache(owner: str, inputs: Mapping[str, Any], p: int) -> None:
    """ValueError for a cache that does not grow, or that `owner` did not begin (it marks its own:
    `cache.begun_by`), or for a call that does not go on where the text in the cache ends.

    `generate` takes all places of a cache for text: of a whole text that is given once more, it
    leaves out p tokens too many. It drops a mask of ones; then the first position tells."""
    cache = inputs.get("past_key_values")
    if cache is not None:
        validate(owner, past_key_values=type(cache).__name__)
    seen, text = seen_in(inputs), text_of(inputs).shape[1]
    if not seen:
        return
    if getattr(cache, "begun_by", None) != owner:
        raise ValueError(
            f"{owner}: past_key_values was filled without the virtual tokens, which cannot come "
            "first any more: begin with an empty cache, or with None"
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        gap = p + mask.shape[1] != seen + text
    else:
        known = positions is not None and not positions.is_meta
        first = int(positions[..., 0].min()) if known else seen - p
        gap = first == seen or first < seen - p
    if gap:
        raise ValueError(
            f"{owner}: past_key_values holds {max(seen - p, 0)} tokens of text behind {p} virtual "
            "ones, and this call does not go on there: give the new tokens only, with an "
            "attention_mask of the whole text"
        )


# No part of a call, and yet no cell of lesson 08, which asks a learner to write it.
def rows_of(ids: Sequence[int], table: torch.Tensor, p: int) -> torch.Tensor:
    """The rows (p, d) of a text's tokens in a table (V, d): repeated, or cut off."""
    repeated = [ids[i % len(ids)] for i in range(p)]
    return table.detach()[torch.tensor(repeated, device=table.device)]
