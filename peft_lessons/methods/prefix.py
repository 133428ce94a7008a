"""Prefix tuning: learned keys and values, put into every layer's cache before the text's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache

from ..engine import Method, PeftFiles, attached_to, injection_of, register, trained_dtype, validate
from ..engine.design import Design, Site, calls_of
from ..engine.facts import COMPARISON, Facts, InPeft, Kept, OnMap, Point, Recommended
from ..engine.virtual_tokens import (
    by_name,
    cache_shape,
    lengthen,
    reader_of,
    refuse_cache,
    refuse_layers,
    refuse_long,
    refuse_mask,
    refuse_reader,
    refuse_recomputing,
    seen_in,
    text_of,
)


class PrefixTuning(nn.Module):
    """Return keys and values, each (L, batch, n_kv, p, d_h), of p virtual tokens before the text.
    `num_heads` is n_kv. An MLP of `hidden_size` computes them from p vectors of `width`; with None
    they are the parameters. ValueError for a size below 1. Source: Li & Liang 2021, section 4."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        prefix_length: int = 10,
        hidden_size: int | None = 512,
        *,
        width: int | None = None,
    ):
        sizes = dict(num_layers=num_layers, num_heads=num_heads, head_dim=head_dim)
        mlp = {} if hidden_size is None else {"hidden_size": hidden_size}
        validate("PrefixTuning", **sizes, prefix_length=prefix_length, **mlp)
        super().__init__()
        self.layout = (num_layers, 2, num_heads, head_dim)  # 2: the key, then the value
        size = 2 * num_layers * num_heads * head_dim
        width = size if hidden_size is None else (width or hidden_size)
        self.embedding = nn.Parameter(torch.randn(prefix_length, width))  # (p, width)
        self.mlp = None
        if hidden_size is not None:
            layers = nn.Linear(width, hidden_size), nn.Tanh(), nn.Linear(hidden_size, size)
            self.mlp = nn.Sequential(*layers)

    def forward(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = flat_prefix(self).unflatten(1, self.layout)  # (p, L, 2, n_kv, d_h)
        parts = parts.permute(2, 1, 3, 0, 4).unsqueeze(2)  # (2, L, 1, n_kv, p, d_h)
        return tuple(parts.expand(-1, -1, batch_size, -1, -1, -1))  # keys, values


def flat_prefix(prefix: PrefixTuning) -> torch.Tensor:
    """Return all keys and values of a `PrefixTuning` as PEFT stores them, (p, 2·L·n_kv·d_h)."""
    return prefix.embedding if prefix.mlp is None else prefix.mlp(prefix.embedding)


def fill(cache: DynamicCache, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Write keys and values (L, batch, n_kv, p, d_h) into an empty cache, as they are."""
    for layer, (k, v) in enumerate(zip(keys.to(dtype), values.to(dtype), strict=True)):
        cache.update(k, v, layer)  # (batch, n_kv, p, d_h)
    cache.begun_by = "Prefix"


def make_room(inputs: dict, p: int) -> dict:
    """Return the mask and position ids of a call, extended for p virtual tokens on the left."""
    changed = {}
    if (mask := inputs.get("attention_mask")) is not None:  # None: all is seen anyway
        changed["attention_mask"] = lengthen(mask, p, 1)  # (batch, p + past + T)
    if (positions := inputs.get("position_ids")) is not None:  # (batch, T)
        changed["position_ids"] = positions + p  # None: the cache tells
    return changed


def refuse_call(prefix: PrefixTuning, reader: nn.Module, inputs: dict) -> None:
    """Raise ValueError for a call that would use the prefix wrongly, or not at all."""
    p, seen = len(prefix.embedding), seen_in(inputs)
    refuse_cache("Prefix", inputs, p)
    refuse_mask("Prefix", inputs.get("attention_mask"))
    refuse_recomputing("Prefix", reader)
    refuse_long("Prefix", reader, p, max(seen - p, 0) + text_of(inputs).shape[1])


class PrefixInCache(PrefixTuning):
    """Insert the prefix by two hooks; as methods, so that a copied model uses its own prefix."""

    def before(self, reader: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Fill an empty cache and extend the mask of every call (a forward pre-hook)."""
        inputs = by_name(reader, args, kwargs)
        cache, text = inputs.get("past_key_values"), text_of(inputs)  # (batch, T), or (…, T, d)
        cache = DynamicCache() if cache is None else cache
        refuse_call(self, reader, inputs | {"past_key_values": cache})
        if not cache.get_seq_length():
            fill(cache, *self(len(text)), reader.dtype)
        room = make_room(inputs, len(self.embedding))
        return (), inputs | room | {"past_key_values": cache}

    def after(self, reader: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Remove the cache from the output if use_cache=False (a forward hook). `generate` then
        passes the whole text in every call, and a cache would hold that text already."""
        if kwargs.get("use_cache") is not False:
            return output
        if isinstance(output, tuple):  # return_dict=False
            return tuple(value for value in output if not isinstance(value, DynamicCache))
        return type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})


def attach_prefix(model: nn.Module, method: "Prefix") -> tuple[nn.Module, list]:
    """Return (prefix, handles of its hooks) for `inject`. ValueError if the model's cache cannot
    hold a prefix."""
    reader = reader_of(model)
    refuse_reader("Prefix", reader)
    refuse_layers("Prefix", reader)
    refuse_long("Prefix", reader, method.tokens, text=1)
    layers, heads, head_dim = cache_shape(reader.config)
    sizes = dict(prefix_length=method.tokens, hidden_size=method.projection, width=heads * head_dim)
    with reader.device:  # new tensors are made there
        prefix = PrefixInCache(layers, heads, head_dim, **sizes)
    prefix.to(trained_dtype(reader.dtype))
    before = reader.register_forward_pre_hook(prefix.before, with_kwargs=True)
    return prefix, [before, reader.register_forward_hook(prefix.after, with_kwargs=True)]


MLP = {name: name for name in ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")}


def without_mlp(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Replace the MLP by its result, (p, 2·L·n_kv·d_h)."""
    flat, *mlp = (tensors[n] for n in ("prompt_embeddings", *MLP) if n in tensors)  # (p, width)
    flat = F.linear(F.linear(flat, *mlp[:2]).tanh(), *mlp[2:]) if mlp else flat  # (p, 2·L·n_kv·d_h)
    return entries, {n: t for n, t in tensors.items() if n not in MLP} | {"prompt_embeddings": flat}


def heads(t: torch.Tensor, d_h: int) -> torch.Tensor:
    """Split (batch, T, n · d_h) into heads (batch, n, T, d_h)."""
    return t.unflatten(-1, (-1, d_h)).transpose(1, 2)


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return q kᵀ / √d_h (batch, n_h, T, S), −∞ for keys that the mask (batch, S) excludes."""
    s = q @ k.mT / q.shape[-1] ** 0.5  # (batch, n_h, T, S)
    return s if mask is None else s.masked_fill(~mask[:, None, None].bool(), -torch.inf)


def gated(site: Site) -> torch.Tensor:
    """Return λ (softmax(q P_kᵀ / √d_h) P_v − h), (batch, T, d) (He et al. 2022, section 3.1)."""
    layer, d_h = site.module, site.module.attention_head_size
    q, k = heads(layer.query(site.x), d_h), heads(layer.key(site.x), d_h)  # (batch, n_h, T, d_h)
    to_prefix = attention_scores(q, site.more["keys"])  # (batch, n_h, T, p)
    to_text = attention_scores(q, k, site.more["mask"])  # (batch, n_h, T, T)
    gate = torch.sigmoid(to_prefix.logsumexp(-1) - to_text.logsumexp(-1))  # (batch, n_h, T)
    u = to_prefix.softmax(-1) @ site.more["values"]  # (batch, n_h, T, d_h)
    return (gate[..., None] * (u - heads(site.h, d_h))).transpose(1, 2).flatten(2)


def virtual(prefix: nn.Module, layer: nn.Module, rows: torch.Tensor) -> list | torch.Tensor:
    """Return keys and values (batch, n_h, p, d_h) of the virtual tokens in one attention layer: the
    projections of a prompt's hidden states (batch, p, d), or with p = 0 those of the prefix."""
    if rows.shape[1]:
        return [heads(f(rows), layer.attention_head_size) for f in (layer.key, layer.value)]
    P = flat_prefix(prefix).unflatten(1, prefix.layout)[:, layer.layer_idx]  # (p, 2, n_h, d_h)
    return P.permute(1, 2, 0, 3)[:, None]  # (2, 1, n_h, p, d_h)


@torch.no_grad()
def attention(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each self-attention of a BERT; h (batch, T, d) is attention to the text
    alone. x and `new` leave out the positions of a prompt."""
    mask, prefix, sites = batch["attention_mask"], injection_of(model).attached, []
    layers = {
        path: m for path, m in model.named_modules() if type(m).__name__.endswith("SelfAttention")
    }
    for path, layer, (rows, *_), (new, *_) in calls_of(model, batch, layers):
        p = rows.shape[1] - mask.shape[1]
        x, d_h = rows[:, p:], layer.attention_head_size  # (batch, T, d)
        q, k, v = (heads(f(x), d_h) for f in (layer.query, layer.key, layer.value))
        h = attention_scores(q, k, mask).softmax(-1) @ v  # (batch, n_h, T, d_h)
        K, V = virtual(prefix, layer, rows[:, :p])  # (batch, n_h, p, d_h)
        more = {"keys": K, "values": V, "mask": mask}
        sites.append(Site(path, layer, x, h.transpose(1, 2).flatten(2), new[:, p:], more))
    return sites


# What PEFT notes of the base in the files of virtual tokens.
OF_THE_BASE = ("num_layers", "num_attention_heads", "num_transformer_submodules", "token_dim")


@register
@dataclass(frozen=True)
class Prefix(Method):
    """Apply prefix tuning (Li & Liang 2021): `tokens` learned keys and values in every layer. With
    `projection` an MLP of that width computes them in training; a file holds its result."""

    tokens: int
    projection: int | None = None
    learning_rate = 1e-2  # none suits all: lesson 09
    design = Design(
        form="softmax(q P_kᵀ / √d_h) P_v",
        insertion="parallel",
        modified="attention heads",
        composition="(1 − λ) h + λ u",
        delta=gated,
        sites=attention,
        example={"tokens": 8},
    )
    files = PeftFiles(
        "PREFIX_TUNING",
        write=without_mlp,
        fields={"tokens": ("num_virtual_tokens", None)},
        tensors={"embedding": "prompt_embeddings", **MLP},
        others=(*OF_THE_BASE, "encoder_hidden_size", "prefix_projection", "init_weights"),
    )
    facts = Facts(
        "09",
        points=(Point("prefix", "prefix", (-6, 0)),),
        place=OnMap("prefix", "prefix", 3, "the keys and values of a prefix in every block"),
        peft=(
            # Checkpointing switches off the cache, which holds the prefix.
            InPeft(
                "prefix",
                "PrefixTuningConfig",
                (3e-2, 1e-3),
                f"{COMPARISON}, prefixtuning/llama-3.2-3B-lr_0.001: 1e-3, 5,000 steps",
                flags={"num_virtual_tokens": 16},
                checkpointing=False,
            ),
        ),
        advice=Recommended(
            "prefix tuning",
            {"tokens": 16},
            "for many tasks on an untouched base",
            no_merge="a prefix cannot be merged",
        ),
    )

    def attach(self, model: nn.Module) -> tuple[nn.Module, list]:
        return attach_prefix(model, self)

    def added(self, shape: Any) -> float:
        if self.projection is not None:
            raise ValueError(f"no formula for {self!r}: only for a Prefix without an MLP")
        return self.tokens * shape.layers * 2 * shape.kv_heads * shape.head_width

    def keeps(self, shape: Any) -> Kept:
        self.added(shape)  # which refuses an MLP
        return Kept(prefix=self.tokens)


@torch.no_grad()
def init_prefix(model: nn.Module, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set the prefix of `model` to `pairs`: (key, value) for each layer, each (n_kv, p, d_h).

    ValueError if the model has no prefix, one with an MLP, or one of another shape."""
    prefix = attached_to(model, PrefixTuning, "init_prefix")
    if prefix.mlp is not None:
        raise ValueError(
            "init_prefix: an MLP makes the values of this prefix; "
            "bake_reparameterization(model) first"
        )
    stacked = torch.stack([torch.stack(tuple(pair)) for pair in pairs])  # (L, 2, n_kv, p, d_h)
    flat = stacked.permute(3, 0, 1, 2, 4).flatten(1)  # (p, 2·L·n_kv·d_h)
    if flat.shape != prefix.embedding.shape:
        raise ValueError(
            f"init_prefix: pairs of shape {tuple(flat.shape)} are of another size "
            f"than the prefix, {tuple(prefix.embedding.shape)}"
        )
    prefix.embedding.copy_(flat)


@torch.no_grad()
def bake_reparameterization(model: nn.Module) -> None:
    """Replace the prefix's MLP by its result, in place; the model computes the same as before.

    Does nothing without an MLP. ValueError if the model has no prefix."""
    prefix = attached_to(model, PrefixTuning, "bake_reparameterization")
    if prefix.mlp is None:
        return
    prefix.embedding = nn.Parameter(flat_prefix(prefix).clone(), prefix.embedding.requires_grad)
    prefix.mlp = None
