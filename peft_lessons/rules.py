"""What a user may give: one rule for each name.

`SETTINGS` are the rules of the fields of a method and of other settings; a field of such a name
means the same in every method. `THINGS` are those of what a method meets later: a tensor, a model,
a call. A cell of a lesson calls `validate("LoRALayer", rank=rank)`; here is written what a rank
must be.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Rule = Callable[[Any], str | None]  # the complaint about a value, or None


def validate(owner: str, **values: Any) -> None:
    """Raise ValueError for the first of `values` that breaks the rule of its name (rank...), and
    KeyError for a name without a rule: a misspelt name must not pass unchecked."""
    rules = SETTINGS | THINGS
    for name, value in values.items():
        if name not in rules:
            raise KeyError(f"{owner}: no rule is called {name!r}{near_name(name, rules)}")
        if complaint := rules[name](value):
            # A module is shown by its type, a tensor not at all: printed, it would fill the screen.
            text = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
            parts = value if isinstance(value, tuple) else (value,)
            held = any(isinstance(part, torch.Tensor) for part in parts)
            shown = name if held else f"{name}={text}"
            raise ValueError(f"{owner}: {shown} {complaint}")


def near_name(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message, "; did you mean X?", or "": X is a part of a path in
    `known`, of as many segments as `name`, that resembles `name`."""
    n, segments = name.count(".") + 1, [path.split(".") for path in known]
    parts = {".".join(s[i : i + n]) for s in segments for i in range(len(s) - n + 1)}
    near = difflib.get_close_matches(name, sorted(parts), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ------------------------------------------------------------------ settings


def needs(fits: Callable[[Any], Any], otherwise: str) -> Rule:
    """The rule that a value must fit."""
    return lambda value: None if fits(value) else otherwise


def whole(least: int) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number (an int)"
        if value >= 2**63:
            return "must be below 2**63"
        return None if value >= least else f"must be at least {least}"

    return rule


def number(fits: Callable[[float], bool], otherwise: str) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number (an int or a float)"
        return None if fits(value) else otherwise

    return rule


def or_none(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def one_of(*values: Any) -> Rule:
    # By type too: True is no 1, and 64.0 no block of 64.
    def fits(value: Any) -> bool:
        return any(type(value) is type(v) and value == v for v in values)

    return needs(fits, f"must be one of {', '.join(map(repr, values))}")


# An int may be larger than any float.
POSITIVE = number(lambda v: 0 < v < 2**1023, "must be a finite number above 0")
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
    **dict.fromkeys(("projection", "last", "eval_every"), or_none(whole(1))),
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
    "activation": one_of("gelu", "relu", "silu", "tanh"),
    "init": needs(
        lambda v: isinstance(v, str) and v.strip(),
        "must be 'normal', 'vocab' or a text to start from",
    ),
    "tokenizer": or_none(needs(callable, "must be a tokenizer: load_tokenizer(name)")),
}

# ------------------------------------------------------------------ things

THINGS: dict[str, Rule] = {}


def about(name: str) -> Callable[[Rule], Rule]:
    """Puts the rule below into THINGS, under this name."""
    return lambda rule: THINGS.setdefault(name, rule)


def first_wrong(value: torch.Tensor, good: torch.Tensor) -> tuple[tuple[int, ...], int] | None:
    """Where the first entry is that is not `good`, and how many more there are; None if none is, or
    if there are no values (meta device)."""
    wrong = () if value.is_meta else (~good).nonzero()
    return (tuple(wrong[0].tolist()), len(wrong) - 1) if len(wrong) else None


# ---------------- 03: a weight in four bits


@about("weight")
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


@about("codes")
def _nibbles(value: torch.Tensor) -> str | None:
    if value.dtype != torch.uint8 or value.numel() % 2:
        return f"must be an even number of uint8, not {value.numel()} of {value.dtype}"
    fits = value.is_meta or not value.numel() or value.max() < 16
    return None if fits else "must lie between 0 and 15, which is what half a byte can hold"


# bitsandbytes' CPU kernel gives wrong weights for other widths, without a word.
THINGS["in_features"] = needs(
    lambda v: v % 64 == 0, "must be a multiple of 64, which the library's 4-bit kernels need"
)

# ---------------- 04: the lengths of a weight's rows


@about("length")
def _length(value: torch.Tensor) -> str | None:
    if not (wrong := first_wrong(value, value.isfinite() & (value > 0))):
        return None
    (row,), others = wrong
    more = f" (and of {others} more)" if others else ""
    return (
        f"of row {row}{more} is {value[row].item():g}: such a row has no direction, and DoRA "
        "divides by its length; leave this layer out of targets"
    )


@about("ratio")
def _ratio(value: torch.Tensor) -> str | None:
    # NaN is no small ratio: merge itself finds it.
    if not (wrong := first_wrong(value, ~(value.abs() < 1e-6))):
        return None
    (row,), _ = wrong
    return (
        f"m / ‖V‖ of row {row} is {value[row].item():g}: merged, the row would be lost, and "
        "unmerge could not bring it back; look at its magnitude"
    )


# ---------------- 06: where an adapter stands

# Its width and dtype must be known, and what is in 4 bits or wrapped by another tells neither.
THINGS["sublayer_end"] = needs(
    lambda v: type(v) is nn.Linear,
    "must be a plain nn.Linear: load the model unquantised, or dequantize(model) first, and take "
    "out what another library put there",
)


@about("bottleneck")
def _narrower(value: tuple[int, int]) -> str | None:
    m, d = value
    return None if m < d else f"must be (m, d) with m < d: {m} numbers are no bottleneck for {d}"


# ---------------- 07: the vectors of (IA)³


@about("vector")
def _vector(value: torch.Tensor) -> str | None:
    # float16 has no small numbers: what a product loses below this no division brings back.
    least = max(1e-6, 16 * torch.finfo(value.dtype).tiny)
    if not (wrong := first_wrong(value, value.abs() >= least)):
        return None
    entry, others = wrong
    more = f" (and {others} more)" if others else ""
    return (
        f"holds {value[entry].item():.3g} at {list(entry)}{more}: what was multiplied by it is "
        "lost, and no division brings it back; load the base again, and load_adapter what was "
        "saved before merge"
    )


# ---------------- 08 and 09: a model, and a call of it, with something before the text


@about("attention_mask")
def _mask(value: Any) -> str | None:
    tensor = isinstance(value, torch.Tensor)
    if value is None or (tensor and value.dim() == 2):
        return None
    # With a static cache, generate makes a mask of four dimensions and room for the text alone.
    return (
        f"{f'of shape {tuple(value.shape)}' if tensor else 'is no tensor and'} cannot be "
        "lengthened by what stands before the text: give one of shape (batch, tokens), and "
        "generate without cache_implementation='static'"
    )


THINGS["last_of_mask"] = needs(
    lambda v: v.is_meta or v.all(),
    "is 0 in some row: this classifier reads the last place, and cannot see that it is padding, "
    "since embeddings have no ids: pad on the left (padding_side='left')",
)

_NOT_THIS_VERSION = (
    "does not call its cache past_key_values, as transformers from 5.24 on does not, and generate "
    "would go past what stands before the text: install transformers>=5.20,<5.24"
)


@about("model")
def _promptable(value: nn.Module) -> str | None:
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


@about("reader")
def _reads_cache(value: nn.Module) -> str | None:
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


THINGS["past_key_values"] = needs(
    lambda v: v == "DynamicCache",
    "must be a DynamicCache, which grows: leave cache_implementation out of generate()",
)
THINGS["layers"] = needs(
    lambda v: set(v) <= {"DynamicLayer"},
    "must be DynamicLayer only: a layer with a window or a state would forget the prefix",
)
THINGS["checkpointing"] = needs(
    lambda v: not v,
    "switches the cache off, and the prefix with it: model.gradient_checkpointing_disable()",
)
THINGS["mlp"] = needs(
    lambda v: v is None, "cannot be made to give these values: drop_mlp(model) first"
)
THINGS["pairs"] = needs(
    lambda v: v[0] == v[1], "are of another size than the prefix, the second one"
)

# ---------------- 10: a part of what is there


@about("indices")
def _indices(value: tuple[torch.Tensor, int, int]) -> str | None:
    indices, values, size = value
    if len(indices) != values:
        return f"are {len(indices)}, but there are {values} values"
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        return f"lie outside 0 to {size - 1}"
    return None if len(indices.unique()) == len(indices) else "are there twice"


# ---------------- 14: a start for four bits, and blocks that are rotated

THINGS["start"] = needs(
    lambda v: v[0] or v[1],
    "is (iterations, principal): with neither A and B are both 0, and never learn; QLoRA is what "
    "starts without a correction",
)


@about("blocks")
def _blocks(value: tuple[int, int]) -> str | None:
    size, width = value
    if width % size == 0:
        return None
    return f"is (block_size, in): {width} inputs cannot be cut into blocks of {size}"


@about("doubled")
def _doubled(value: tuple[int, int]) -> str | None:
    rank, limit = value
    if 2 * rank <= limit:
        return None
    return (
        "is (rank, min(in, out)): the file of a PiSSA is a LoRA of twice the rank, which would not "
        f"fit; choose a rank up to {limit // 2}, or leave this layer out of targets"
    )


@about("matrix")
def _matrix(value: torch.Tensor) -> str | None:
    if not (wrong := first_wrong(value, value.isfinite())):
        return None
    entry, others = wrong
    more = f" (and {others} more)" if others else ""
    return f"is {value[entry].item():g} at {list(entry)}{more}, and has no singular values"


@about("R")
def _turns_back(value: tuple[torch.Tensor, torch.dtype]) -> str | None:
    R, dtype = value
    if R.is_meta or not R.isfinite().all():  # merge itself finds NaN
        return None
    condition = torch.linalg.cond(R)
    if not (wrong := first_wrong(condition, condition * torch.finfo(dtype).eps < 1)):
        return None
    (block,), others = wrong
    more = f" (and of {others} more)" if others else ""
    return (
        f"of block {block}{more} has a condition number of {condition[block].item():.0f}: the "
        f"series is far from a rotation there, and what merge rounds away in {dtype} unmerge would "
        "magnify as much; model.float() before merge, or keep the adapter beside the base"
    )
