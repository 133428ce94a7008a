"""Validate settings: one rule for each name, the same in every method.

A cell of a lesson calls `validate("LoRALayer", rank=rank)`; here is written what a rank must be.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

Rule = Callable[[Any], str | None]  # the complaint about a value, or None


def validate(owner: str, **values: Any) -> None:
    """Raise ValueError for the first of `values` that breaks the rule of its name (rank...), and
    KeyError for a name without a rule: a misspelt name must not pass unchecked."""
    for name, value in values.items():
        if name not in SETTINGS:
            raise KeyError(f"{owner}: no rule is called {name!r}{near_name(name, SETTINGS)}")
        if complaint := SETTINGS[name](value):
            raise ValueError(f"{owner}: {name}={value!r} {complaint}")


def near_name(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message, "; did you mean X?", or "": X is a part of a path in
    `known`, of as many segments as `name`, that resembles `name`."""
    n, segments = name.count(".") + 1, [path.split(".") for path in known]
    parts = {".".join(s[i : i + n]) for s in segments for i in range(len(s) - n + 1)}
    near = difflib.get_close_matches(name, sorted(parts), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ------------------------------------------------------------------ settings


def needs(fits: Callable[[Any], Any], otherwise: str) -> Rule:
    """Return the rule that `fits(value)` is true, with `otherwise` as its complaint."""
    return lambda value: None if fits(value) else otherwise


def whole(least: int) -> Rule:
    """Return the rule for an int of at least `least`."""

    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number (an int)"
        return None if value >= least else f"must be at least {least}"

    return rule


def number(fits: Callable[[float], bool], otherwise: str) -> Rule:
    """Return the rule for an int or a float with `fits(value)`, else the complaint `otherwise`."""

    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number (an int or a float)"
        return None if fits(value) else otherwise

    return rule


def or_none(rule: Rule) -> Rule:
    """Return a rule that also accepts None."""
    return lambda value: None if value is None else rule(value)


def one_of(*values: Any) -> Rule:
    """Return the rule for one of some values."""

    # By type too: True is no 1, and 64.0 no block of 64.
    def fits(value: Any) -> bool:
        return any(type(value) is type(v) and value == v for v in values)

    return needs(fits, f"must be one of {', '.join(map(repr, values))}")


POSITIVE = number(lambda v: 0 < v < math.inf, "must be a finite number above 0")
NOT_NEGATIVE = number(lambda v: 0 <= v < math.inf, "must be a finite number, 0 or more")
INNER = number(lambda v: 0 < v < 1, "must lie between 0 and 1, both left out")
FLAG = needs(lambda v: isinstance(v, bool), "must be True or False")

SETTINGS: dict[str, Rule] = {
    **dict.fromkeys(("rank", "initial_rank", "target_rank", "delta", "total_steps"), whole(1)),
    **dict.fromkeys(("tinit", "tfinal", "iterations"), whole(0)),
    **dict.fromkeys(("width", "bottleneck_size", "hidden_size", "dim", "kv_dim"), whole(1)),
    **dict.fromkeys(("ff_dim", "embed_dim", "head_dim", "num_layers", "num_heads"), whole(1)),
    **dict.fromkeys(("tokens", "num_tokens", "prefix_length"), whole(1)),
    **dict.fromkeys(("steps", "batch_size", "checkpoint_every", "repeats", "keep"), whole(1)),
    "block_size": whole(2),
    **dict.fromkeys(("max_length", "batch", "context"), whole(1)),
    **dict.fromkeys(("degrees", "num_examples"), whole(1)),
    **dict.fromkeys(("n_params", "gpu_memory_gb"), POSITIVE),
    "model_size_b": number(
        lambda v: 0 < v < 10_000,
        "must be in billions, above 0 and below 10,000: 7 for a model of 7e9 parameters",
    ),
    **dict.fromkeys(("projection", "last"), or_none(whole(1))),
    **dict.fromkeys(("alpha", "scale", "adapter_scalar", "lr", "epochs"), POSITIVE),
    **dict.fromkeys(("lr_ratio", "d_initial"), POSITIVE),
    "seed": needs(
        lambda v: type(v) is int and 0 <= v < 2**32, "must be a whole number (an int) below 2**32"
    ),
    **dict.fromkeys(("beta1", "beta2"), INNER),
    **dict.fromkeys(("orthogonal", "sparsity", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("rslora", "double_quant", "structured", "gates"), FLAG),
    **dict.fromkeys(("principal", "neumann"), FLAG),
    "dropout": number(
        lambda v: 0 <= v < 1, "must lie in [0, 1): 0 switches it off, 1 drops everything"
    ),
    "stretch": number(
        lambda v: 1 < v < math.inf,
        "must be a finite number above 1: a gate is stretched from (0, 1) to (-stretch, stretch), "
        "and one that is not stretched beyond 1 can never be fully open",
    ),
    "warmup": number(lambda v: 0 <= v <= 1, "is the share of the steps, between 0 and 1"),
    "clip": or_none(number(lambda v: v > 0, "must be above 0, or None for no clipping")),
    # What bitsandbytes takes; a power of two also keeps pairs of codes within a block.
    "block": one_of(*(2**k for k in range(5, 13))),
    "kind": one_of("houlsby", "pfeiffer", "parallel"),
    "positions": one_of("random", "largest"),
    "activation": one_of("gelu", "relu", "silu", "tanh"),
    "init": needs(
        lambda v: isinstance(v, str) and v.strip(),
        "must be 'normal', 'vocab' or a text to start from",
    ),
    "kept": or_none(needs(lambda v: isinstance(v, tuple), "must be a tuple of (path, flags)")),
    "tokenizer": or_none(needs(callable, "must be a tokenizer: load_tokenizer(name)")),
}


# ------------------------------------------------------------------ values of a tensor


def refuse_entries(owner: str, good: torch.Tensor, value: torch.Tensor, message: str) -> None:
    """Raise ValueError if an entry of `value` is not `good`, a mask of the same shape.

    `message` is a format with {at} and {value}, the place and value of the first such entry, and
    {more}, how many others there are. A tensor on the meta device has no values, and passes."""
    if value.is_meta or good.all():
        return
    wrong = (~good).nonzero().tolist()
    at = wrong[0][0] if value.dim() == 1 else wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    sentence = message.format(at=at, value=value[tuple(wrong[0])].item(), more=more)
    raise ValueError(f"{owner}: {sentence}")
