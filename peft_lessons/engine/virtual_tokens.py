"""Read the arguments of a model's call, for methods that prepend virtual tokens to the text.

The hooks of a prompt or a prefix see every call of the model: in training, in evaluation, and in
each step of `generate`. These functions read such a call, and refuse it if it would silently give a
wrong result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache


def by_name(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call as one dict, positional and keyword arguments alike."""
    return inspect.signature(model.forward).bind_partial(*args).arguments | kwargs


def text_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the text of a call: ids (batch, T) or embeddings (batch, T, d). ValueError for none,
    or another shape."""
    embeddings = inputs.get("inputs_embeds")
    text = inputs.get("input_ids") if embeddings is None else embeddings
    if text is None or text.dim() != (2 if embeddings is None else 3):
        shape = None if text is None else tuple(text.shape)
        raise ValueError(
            f"the text, of shape {shape}, must be input_ids of shape (batch, tokens) or "
            "inputs_embeds of shape (batch, tokens, d)"
        )
    return text


def positions_of(model: nn.Module) -> int | None:
    """Return the number of positions of a model, None if it sets no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet says -1
        return None
    embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return positions if padding is None else positions - padding - 1  # RoBERTa's begin after it


def refuse_long(owner: str, model: nn.Module, p: int, text: int) -> None:
    """Raise ValueError if p virtual tokens and `text` tokens exceed the model's positions."""
    positions = positions_of(model)
    if positions is not None and p + text > positions:
        raise ValueError(
            f"{owner}: {p} virtual tokens and {text} of text are more than the model's {positions} "
            "positions: shorten the text (max_length, max_new_tokens) or take fewer virtual tokens"
        )


def seen_in(inputs: Mapping[str, Any]) -> int:
    """Return the number of tokens in the cache of a call, virtual tokens included."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def refuse_cache(owner: str, inputs: Mapping[str, Any], p: int) -> None:
    """Raise ValueError for a cache that does not grow, or that `owner` did not fill (it marks its
    own: `cache.begun_by`), or for a call that does not continue the text in the cache.

    `generate` counts virtual tokens in the cache as text, so a repeated prompt would lose p tokens.
    Without a mask (`generate` drops one of ones) the first position shows the gap."""
    cache = inputs.get("past_key_values")
    if cache is not None and type(cache).__name__ != "DynamicCache":
        raise ValueError(
            f"{owner}: past_key_values={type(cache).__name__!r} must be a DynamicCache, which "
            "grows: leave cache_implementation out of generate()"
        )
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
            "ones, and this call does not continue there: give the new tokens only, with an "
            "attention_mask of the whole text"
        )


# Here rather than in lesson 08, where it is an exercise.
def rows_of(ids: Sequence[int], table: torch.Tensor, p: int) -> torch.Tensor:
    """Return the embeddings (p, d) of a text's tokens from a table (V, d), repeated or cut off."""
    repeated = [ids[i % len(ids)] for i in range(p)]
    return table.detach()[torch.tensor(repeated, device=table.device)]


# ------------------------------------------------------------------ models and masks that fit


_NOT_THIS_VERSION = (
    "does not call its cache past_key_values, as transformers from 5.24 on does not, and generate "
    "would leave out the virtual tokens: install transformers>=5.20,<5.24"
)


def refuse_model(owner: str, model: nn.Module) -> None:
    """Raise ValueError if embeddings cannot be put before a model's text."""
    takes, complaint = inspect.signature(model.forward).parameters, None
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        complaint = "has no token embeddings: take a language model"
    elif getattr(model.config, "is_encoder_decoder", False):
        complaint = "has an encoder and a decoder: a prompt goes before one text; PEFT has both"
    elif "inputs_embeds" not in takes:
        complaint = "has a forward that takes no inputs_embeds"
    elif model.can_generate() and "past_key_values" not in takes:
        complaint = _NOT_THIS_VERSION
    if complaint:
        raise ValueError(f"{owner}: model={type(model).__name__} {complaint}")


def refuse_reader(owner: str, reader: nn.Module) -> None:
    """Raise ValueError if a model cannot take the keys and values of a prefix."""
    takes, complaint = inspect.signature(reader.forward).parameters, None
    if "cache" in takes:
        complaint = _NOT_THIS_VERSION
    elif "past_key_values" not in takes or not hasattr(reader, "config"):
        complaint = (
            "takes no past_key_values, so it cannot take the keys and values of a prefix: "
            "take Prompt, or a method that changes layers, such as LoRA"
        )
    elif getattr(reader.config, "is_encoder_decoder", False):
        complaint = "has an encoder and a decoder, and a prefix of the course is for one of the two"
    elif getattr(reader.config, "kv_lora_rank", None):
        complaint = (
            "has keys and values of different widths (multi-head latent attention), and a prefix "
            "of the course has one width: take Prompt"
        )
    if complaint:
        raise ValueError(f"{owner}: model={type(reader).__name__} {complaint}")


def refuse_mask(owner: str, mask: torch.Tensor | None) -> None:
    """Raise ValueError for a mask that `lengthen` cannot extend; None passes."""
    tensor = isinstance(mask, torch.Tensor)
    if mask is None or (tensor and mask.dim() == 2):
        return
    # With a static cache, generate makes a mask of four dimensions and room for the text alone.
    what = f"of shape {tuple(mask.shape)}" if tensor else "is not a tensor and"
    raise ValueError(
        f"{owner}: attention_mask {what} cannot be extended by the virtual tokens: give one of "
        "shape (batch, tokens), and generate without cache_implementation='static'"
    )


# ------------------------------------------------------------------ where a prefix goes


def reader_of(model: nn.Module) -> nn.Module:
    """Return the module whose forward takes a cache: the model, or its backbone. OPT's language
    model bypasses its backbone; of BERT's classifier only the backbone takes a cache."""
    takes = {"past_key_values", "cache"} & set(inspect.signature(model.forward).parameters)
    return model if takes else getattr(model, "base_model", model)


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Return (L, n_kv, d_h) of the keys and values that a model with this config caches."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):  # Falcon, whose newer layout repeats its heads
        kv = heads if getattr(config, "new_decoder_architecture", False) else 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv, head_dim


def refuse_layers(owner: str, reader: nn.Module) -> None:
    """Raise ValueError if a layer of the reader's cache would forget what was put there first."""
    layers = DynamicCache(config=reader.config).layers
    kinds = tuple(sorted({type(layer).__name__ for layer in layers}))
    if not {*kinds} <= {"DynamicLayer"}:
        raise ValueError(
            f"{owner}: layers={kinds} must be DynamicLayer only: a layer with a window or a state "
            "would forget the prefix"
        )


def refuse_recomputing(owner: str, reader: nn.Module) -> None:
    """Raise ValueError while gradient checkpointing switches the cache off."""
    modules = reader.modules() if reader.training else ()
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise ValueError(
            f"{owner}: gradient checkpointing switches the cache off, and the prefix with it: "
            "model.gradient_checkpointing_disable()"
        )


def lengthen(entries: torch.Tensor, tokens: int, value: float) -> torch.Tensor:
    """Pad each sequence (batch, T) on the left with `value`: (batch, tokens + T)."""
    return torch.cat([entries.new_full((len(entries), tokens), value), entries], 1)
