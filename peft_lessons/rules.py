"""What a user may give: one rule for each name, the same in every method that has such a field.

A cell of a lesson calls `validate("LoRALayer", rank=rank)`; here is written what a rank must be.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Rule = Callable[[Any], str | None]  # the complaint about a value, or None


def _whole_from(least: int) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number (an int)"
        return None if value >= least else f"must be at least {least}"

    return rule


def _number(fits: Callable[[float], bool], otherwise: str) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        return None if fits(value) else otherwise

    return rule


def _whole_or_none(value: Any) -> str | None:
    return None if value is None else _whole_from(1)(value)


_fraction = _number(
    lambda v: 0 <= v < 1, "must lie in [0, 1): 0 switches it off, 1 drops everything"
)
_positive = _number(lambda v: 0 < v < math.inf, "must be a finite number above 0")
_inner = _number(lambda v: 0 < v < 1, "must lie between 0 and 1, both left out")
_not_negative = _number(lambda v: 0 <= v < math.inf, "must be a finite number, 0 or more")


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _block(value: Any) -> str | None:
    # What bitsandbytes takes; a power of two also keeps pairs of codes within a block.
    sizes = [2**k for k in range(5, 13)]
    good = isinstance(value, int) and not isinstance(value, bool) and value in sizes
    return None if good else f"must be one of {', '.join(map(str, sizes))}"


def _weight(value: Any) -> str | None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        return f"must be a tensor of floating-point numbers, not {what}: is it quantised already?"
    if not value.numel() or value.numel() % 2:
        return f"of shape {tuple(value.shape)} must hold entries, and an even number: two to a byte"
    if value.is_meta:
        return None
    largest = value.detach().abs().max().item()
    if not math.isfinite(largest):
        return "holds NaN or infinity, which no level stands for"
    # Scales are float32, and double quantisation takes their mean: their sum must be finite too.
    return None if largest <= 1e30 else f"holds {largest:.0e}, too large for the sum of its scales"


def _nibbles(value: Any) -> str | None:
    if value.dtype != torch.uint8 or value.numel() % 2:
        return f"must be an even number of uint8, not {value.numel()} of {value.dtype}"
    fits = value.is_meta or not value.numel() or value.max() < 16
    return None if fits else "must lie between 0 and 15, which is what half a byte can hold"


def _quantisable(value: Any) -> str | None:
    # bitsandbytes' CPU kernel gives wrong weights for other widths, without a word.
    return (
        None
        if value % 64 == 0
        else "must be a multiple of 64, which the library's 4-bit kernels need"
    )


def _length(value: Any) -> str | None:
    wrong = () if value.is_meta else (~(value.isfinite() & (value > 0))).nonzero()
    if not len(wrong):
        return None
    row = int(wrong[0])
    more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return (
        f"of row {row}{more} is {value[row].item():g}: such a row has no direction, and DoRA "
        "divides by its length; leave this layer out of targets"
    )


def _ratio(value: Any) -> str | None:
    wrong = () if value.is_meta else (value.abs() < 1e-6).nonzero()
    if not len(wrong):
        return None
    row = int(wrong[0])
    return (
        f"m / ‖V‖ of row {row} is {value[row].item():g}: merged, the row would be lost, and "
        "unmerge could not bring it back; look at its magnitude"
    )


def _one_of(*names: str) -> Rule:
    good = ", ".join(map(repr, names))
    return lambda value: None if value in names else f"must be one of {good}"


def _narrower(value: Any) -> str | None:
    m, d = value
    return None if m < d else f"must be (m, d) with m < d: {m} numbers are no bottleneck for {d}"


def _share_of(value: Any) -> str | None:
    part, whole = value
    if isinstance(part, bool) or not isinstance(part, int) or not 1 <= part <= whole:
        return "must be (k, n) with a whole number k from 1 to n, which is all there are"
    return None


def _indices(value: Any) -> str | None:
    indices, values, size = value
    if len(indices) != values:
        return f"are {len(indices)}, but there are {values} values"
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        return f"lie outside 0 to {size - 1}"
    return None if len(indices.unique()) == len(indices) else "are there twice"


def _plain_linear(value: Any) -> str | None:
    # Its width and dtype must be known, and what is in 4 bits or wrapped by another tells neither.
    return (
        None
        if type(value) is nn.Linear
        else "must be a plain nn.Linear: load the model unquantised, or dequantize(model) first, "
        "and take out what another library put there"
    )


def _vector(value: Any) -> str | None:
    # float16 has no small numbers: what a product loses below this no division brings back.
    least = max(1e-6, 16 * torch.finfo(value.dtype).tiny)
    wrong = () if value.is_meta else (~(value.abs() >= least)).nonzero()
    if not len(wrong):
        return None
    entry = tuple(wrong[0].tolist())
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return (
        f"holds {value[entry].item():.3g} at {list(entry)}{more}: what was multiplied by it is "
        "lost, and no division brings it back; load the base again, and load_adapter what was "
        "saved before merge"
    )


def _start(value: Any) -> str | None:
    good = isinstance(value, str) and value.strip()
    return None if good else "must be 'normal', 'vocab' or a text to start from"


def _tokenizer(value: Any) -> str | None:
    good = value is None or callable(value)
    return None if good else "must be a tokenizer: load_tokenizer(name)"


def _mask(value: Any) -> str | None:
    tensor = isinstance(value, torch.Tensor)
    if value is None or (tensor and value.dim() == 2):
        return None
    # With a static cache, generate makes a mask of four dimensions and room for the text alone.
    return (
        f"{f'of shape {tuple(value.shape)}' if tensor else 'is no tensor and'} can't be lengthened "
        "by what stands before the text: give one of shape (batch, tokens), and generate without "
        "cache_implementation='static'"
    )


def _last_of_mask(value: Any) -> str | None:
    return (
        None
        if value.is_meta or value.all()
        else "is 0 in some row: this classifier reads the last place, and can't see that it is "
        "padding, since embeddings have no ids: pad on the left (padding_side='left')"
    )


_NOT_THIS_VERSION = (
    "does not call its cache past_key_values, as transformers from 5.24 on does not, and generate "
    "would go past what stands before the text: install transformers>=5.20,<5.24"
)


def _promptable(value: Any) -> str | None:
    """Whether embeddings can be put before a model's text, and `generate` shows what is cached."""
    if not hasattr(value, "get_input_embeddings") or not hasattr(value, "config"):
        return "has no token embeddings: take a language model"
    if getattr(value.config, "is_encoder_decoder", False):
        return "has an encoder and a decoder: a prompt goes before one text; PEFT has both"
    takes = inspect.signature(value.forward).parameters
    if "inputs_embeds" not in takes:
        return "has a forward that takes no inputs_embeds"
    if value.can_generate() and "past_key_values" not in takes:
        return _NOT_THIS_VERSION
    return None


def _reads_cache(value: Any) -> str | None:
    """Whether the keys and values of a prefix have a place in a model."""
    takes = inspect.signature(value.forward).parameters
    if "cache" in takes:
        return _NOT_THIS_VERSION
    if "past_key_values" not in takes or not hasattr(value, "config"):
        return (
            "takes no past_key_values, so it has no place for the keys and values of a prefix: "
            "take Prompt, or a method that changes layers, such as LoRA"
        )
    if getattr(value.config, "is_encoder_decoder", False):
        return "has an encoder and a decoder, and a prefix of the course is for one of the two"
    if getattr(value.config, "kv_lora_rank", None):
        return (
            "has keys and values of different widths (multi-head latent attention), and a prefix "
            "of the course has one width: take Prompt"
        )
    return None


def _growing_layers(value: Any) -> str | None:
    if set(value) <= {"DynamicLayer"}:
        return None
    return "must be DynamicLayer only: a layer with a window or a state would forget the prefix"


def _prefix_cache(value: Any) -> str | None:
    if value == "DynamicCache":
        return None
    return "must be a DynamicCache, which grows: leave cache_implementation out of generate()"


def _no_checkpointing(value: Any) -> str | None:
    if not value:
        return None
    return "switches the cache off, and the prefix with it: model.gradient_checkpointing_disable()"


def _no_mlp(value: Any) -> str | None:
    return None if value is None else "cannot be made to give these values: drop_mlp(model) first"


def _same_shape(value: Any) -> str | None:
    return None if value[0] == value[1] else "are of another size than the prefix, the second one"


# A field of this name means the same in every method, so it is checked once, here.
_FIELD_RULES: dict[str, Rule] = {
    "rank": _whole_from(1),
    "initial_rank": _whole_from(1),
    "target_rank": _whole_from(1),
    "delta": _whole_from(1),
    "total_steps": _whole_from(1),
    "tinit": _whole_from(0),
    "tfinal": _whole_from(0),
    "beta1": _inner,
    "beta2": _inner,
    "orthogonal": _not_negative,
    "width": _whole_from(1),
    "tokens": _whole_from(1),
    "alpha": _positive,
    "dropout": _fraction,
    "rslora": _flag,
    "double_quant": _flag,
    "block": _block,
    "weight": _weight,
    "codes": _nibbles,
    "in_features": _quantisable,
    "length": _length,
    "ratio": _ratio,
    "hidden_size": _whole_from(1),
    "bottleneck_size": _whole_from(1),
    "bottleneck": _narrower,
    "sublayer_end": _plain_linear,
    "kind": _one_of("houlsby", "pfeiffer", "parallel"),
    "activation": _one_of("gelu", "relu", "silu", "tanh"),
    "scale": _positive,
    "adapter_scalar": _positive,
    "dim": _whole_from(1),
    "kv_dim": _whole_from(1),
    "ff_dim": _whole_from(1),
    "vector": _vector,
    "num_tokens": _whole_from(1),
    "embed_dim": _whole_from(1),
    "init": _start,
    "tokenizer": _tokenizer,
    "model": _promptable,
    "attention_mask": _mask,
    "last_of_mask": _last_of_mask,
    "projection": _whole_or_none,
    "num_layers": _whole_from(1),
    "num_heads": _whole_from(1),
    "head_dim": _whole_from(1),
    "prefix_length": _whole_from(1),
    "reader": _reads_cache,
    "layers": _growing_layers,
    "past_key_values": _prefix_cache,
    "checkpointing": _no_checkpointing,
    "mlp": _no_mlp,
    "last": _whole_or_none,
    "last_of": _share_of,
    "keep_of": _share_of,
    "indices": _indices,
    "sparsity": _not_negative,
    "stretch": _number(
        lambda v: 1 < v < math.inf,
        "must be a finite number above 1: a gate is stretched from (0, 1) to (-stretch, stretch), "
        "and one that is not stretched beyond 1 can never be fully open",
    ),
    "structured": _flag,
    "gates": _flag,
    "pairs": _same_shape,
}


def validate(owner: str, **values: Any) -> None:
    """Raise ValueError for the first of `values` that breaks the rule of its name (rank...)."""
    for name, value in values.items():
        complaint = _FIELD_RULES[name](value) if name in _FIELD_RULES else None
        if complaint:
            # A module is shown by its type: printed, it would fill the screen.
            text = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
            shown = name if isinstance(value, torch.Tensor) else f"{name}={text}"
            raise ValueError(f"{owner}: {shown} {complaint}")
