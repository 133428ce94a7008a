"""Tiny random models of four families, a padded batch, and greedy generation with and without a
cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
FEED_FORWARD = dict(intermediate_size=96)


@torch.no_grad()
def perturb(model: nn.Module, size: float = 0.2, seed: int | None = 5) -> nn.Module:
    """Add random numbers to all trainable parameters, as training would, and return the model in
    eval mode. At its start a method changes nothing, so most mistakes would not show. The numbers
    come from a generator of their own, or without a seed from torch's."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return model.eval()


def _made(kind: type[nn.Module], config, seed: int) -> nn.Module:
    """Return a model whose biases are not 0: zeros would hide that a method leaves them out."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return perturb(kind(config), 0.05, seed)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    settings = SIZES | FEED_FORWARD | dict(num_key_value_heads=2, max_position_embeddings=128)
    return _made(LlamaForCausalLM, LlamaConfig(**(settings | changes)), seed)


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """Return a decoder with grouped key-value heads, and biases on q, k and v."""
    heads = dict(num_key_value_heads=2, max_position_embeddings=128)
    config = Qwen2Config(**SIZES, **FEED_FORWARD, **heads, bos_token_id=1, eos_token_id=2)
    return _made(Qwen2ForCausalLM, config, seed)


def tiny_opt(seed: int = 0, ffn_dim: int = 96) -> OPTForCausalLM:
    """Return a decoder with learned positions, biases and a head tied to the embedding."""
    settings = dict(max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0)
    return _made(OPTForCausalLM, OPTConfig(**SIZES, **settings, ffn_dim=ffn_dim), seed)


def tiny_bert(seed: int = 0, **changes) -> BertForSequenceClassification:
    """Return a classifier with biases and a new head."""
    settings = SIZES | FEED_FORWARD | dict(max_position_embeddings=64, num_labels=2)
    model = _made(BertForSequenceClassification, BertConfig(**(settings | changes)), seed)
    model.fresh_modules = ("classifier",)
    return model


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "opt": tiny_opt, "bert": tiny_bert}


def padded_rows(
    vocabulary: int, causal: bool, lengths: Sequence[int] = (12, 9, 5), pad: int = 0
) -> dict[str, torch.Tensor]:
    """Return random tokens, a row for each length, with mask and labels: padded on the left for a
    decoder that generates, on the right for all others."""
    generator = torch.Generator().manual_seed(11)
    size = (len(lengths), max(lengths))
    ids = torch.randint(3, vocabulary, size, generator=generator)
    mask = torch.tensor([[1] * n + [0] * (size[1] - n) for n in lengths])
    if causal:
        mask = mask.flip(1)
    ids = ids.where(mask.bool(), pad)
    labels = ids.where(mask.bool(), -100) if causal else torch.arange(size[0]) % 2
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded_batch(model: nn.Module, lengths: Sequence[int] = (12, 9, 5)) -> dict[str, torch.Tensor]:
    """Return `padded_rows` for this model."""
    config = model.config
    return padded_rows(config.vocab_size, model.can_generate(), lengths, config.pad_token_id or 0)


# ------------------------------------------------------------------ generation

GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)


def greedy(model: nn.Module, batch: dict[str, torch.Tensor], **more) -> torch.Tensor:
    """Return each row and the eight likeliest tokens after it."""
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    return model.generate(**prompt, **GREEDY, **more)


def positions_in(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions that `generate` gives: padding on the left takes none."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def by_hand(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what `greedy` must give, by the plain forward and without a cache."""
    ids, end = batch["input_ids"], model.generation_config.eos_token_id
    mask = batch.get("attention_mask", torch.ones_like(ids))
    for _ in range(GREEDY["max_new_tokens"]):
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions_in(mask))
        logits = model(**inputs, use_cache=False).logits[:, -1].clone()
        if end is not None:
            logits[:, end] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids
