"""Estimate the memory of fine-tuning by component, from a model's shape alone.

There are two independent ways to the activations: `activations` evaluates a formula, and
`traced_activations` runs the model without values, for any configuration and any method, and sums
what it keeps.

### The formula

A training step keeps, for each token and each block, what its backward pass will read. With widths
d (model), d_ff (feed-forward), q = n_h · d_h (all query heads), k = n_kv · d_h (keys, or values),
e bytes a number of the base and a of an adapter:

| what | bytes | kept if |
|---|---|---|
| what a norm reads (an RMSNorm as a float32 copy) | 4 d, twice | a gradient flows through it |
| what a norm has divided, before its weight | e d, twice | the norms train |
| what query, key and value read | e d | one of them trains or is adapted |
| queries, keys, values, and the attention's result | e (2 q + 2 k) | a gradient flows |
| gate, SiLU(gate), up | 3 e d_ff | a gradient flows |
| what gate and up read | e d | one of them trains or is adapted |
| what the last matrix reads | e d_ff | it trains or is adapted |
| (IA)³: what its vectors scale, before | e out, or e in of an input | likewise |
| LoRA: x Aᵀ, and x once more for each layer | a r, and a in if a is not e | the layer is adapted |
| DoRA, as PEFT has it: two outputs more, and BA once | 2 e out, and e in · out in all | likewise |

Attention is taken as fused: of its scores one number a row is kept. After the last block come a
norm and the logarithm of the probabilities, 4 V. With gradient checkpointing a block keeps e d only
and is computed again in the backward pass, one block at a time.

The logits cost 12 V bytes per token: the 4 V that are kept, and 8 V for two float32 gradients at
the start of the backward pass. With a chunked loss the head keeps its input only, e d, and computes
logits, loss and gradients for `CHUNK` tokens at a time: 12 V bytes per token of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from ..engine import Method, inject, matches, one_by_one, validate
from ..engine.facts import Kept
from . import measure

GB, GIB = 10**9, 2**30  # the unit of byte counts, and that of a GPU's memory
CHUNK = 256  # tokens of which a chunked loss has the logits at a time
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight: its code, and its share of the statistics

_LLAMA3 = {"vocab_size": 128256}
_QWEN3 = {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False}


def _config(kind: type, width: int, feedforward: int, layers: int, heads: int, **more: Any):
    sizes = {"hidden_size": width, "intermediate_size": feedforward, "num_hidden_layers": layers}
    return kind(**sizes, num_attention_heads=heads, num_key_value_heads=8, **more)


# Published shapes, by the numbers in their own config.json.
MODELS: dict[str, PreTrainedConfig] = {
    "SmolLM3-3B": SmolLM3Config(pad_token_id=None),
    "LLaMA-7B": LlamaConfig(),
    "Llama-3-8B": _config(
        LlamaConfig, 4096, 14336, 32, 32, **_LLAMA3, max_position_embeddings=8192
    ),
    "Qwen3-8B": _config(Qwen3Config, 4096, 12288, 36, 32, **_QWEN3),
    "Qwen3-32B": _config(Qwen3Config, 5120, 25600, 64, 64, **_QWEN3),
    "Llama-3.3-70B": _config(
        LlamaConfig, 8192, 28672, 80, 64, **_LLAMA3, max_position_embeddings=131072
    ),
}

# ------------------------------------------------------------------ shapes

# The formulas hold for configurations with these values only.
_COUNTED_AS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_COUNTED_AS |= {"attention_dropout": 0.0, "sliding_window": None}


def _refuse_uncounted(config: Any) -> None:
    """Raise ValueError for a configuration for which the formulas do not hold."""
    known = isinstance(config, PreTrainedConfig)
    kind = config.model_type if known else type(config).__name__
    if kind not in ("llama", "mistral", "qwen3", "smollm3"):
        raise ValueError(
            f"no formula for a {kind}: only for the configuration of a llama, mistral, qwen3 "
            "or smollm3; traced_activations takes any"
        )
    for name, counted in _COUNTED_AS.items():
        if (value := getattr(config, name, counted)) != counted:
            raise ValueError(
                f"no formula for a {kind} with {name}={value!r}: only for {counted!r}; "
                "traced_activations takes any"
            )


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a transformer that its memory depends on. A size may be a fraction: see
    `Shape.of_size`."""

    layers: float
    width: float
    feedforward: float
    heads: float
    kv_heads: float
    head_width: float
    vocabulary: int
    tied: bool = False  # whether the head is the table of tokens
    qk_norm: bool = False  # RMSNorms on every head's query and key

    @classmethod
    def of(cls, model: str | Shape | PreTrainedConfig) -> Shape:
        """Return the shape of a name in `MODELS`, or of the configuration of a Llama, a Qwen3, a
        SmolLM3 or a Mistral.

        Raises ValueError for another name, a configuration of another kind, or one with other
        values than `_COUNTED_AS`."""
        if isinstance(model, Shape):
            return model
        if isinstance(model, str):
            if model not in MODELS:
                raise ValueError(f"model={model!r} must be one of {', '.join(map(repr, MODELS))}")
            model = MODELS[model]
        _refuse_uncounted(model)
        heads = model.num_attention_heads
        return cls(
            layers=model.num_hidden_layers,
            width=model.hidden_size,
            feedforward=model.intermediate_size,
            heads=heads,
            kv_heads=getattr(model, "num_key_value_heads", None) or heads,
            head_width=getattr(model, "head_dim", None) or model.hidden_size // heads,
            vocabulary=model.vocab_size,
            tied=model.tie_word_embeddings,
            qk_norm=model.model_type == "qwen3",
        )

    @classmethod
    def of_size(cls, n_params: float, *, tied: bool = False) -> Shape:
        """Return the shape of a Llama-3 of another size: d / 128 blocks of width d, a feed-forward
        of 3.5 d, heads of width 128 of which four share a key, 128,256 tokens; 8.03 billion
        parameters are Llama-3-8B. tied: no separate output matrix, as in a classifier.

        The sizes may be fractions, so that memory grows smoothly with `n_params`.
        Raises ValueError unless the size is a number above 0."""
        validate("Shape.of_size", n_params=n_params)
        return _llama_of(n_params, tied)

    @property
    def linears(self) -> dict[str, tuple[float, float]]:
        """Return {path in a block: (in, out)} of the linear layers of one block."""
        d, f = self.width, self.feedforward
        q, k = (n * self.head_width for n in (self.heads, self.kv_heads))
        attention = {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d)}
        gated = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        named = {f"self_attn.{n}": size for n, size in attention.items()}
        return named | {f"mlp.{n}": size for n, size in gated.items()}

    @property
    def in_linears(self) -> float:
        """Return the number of weights in the linear layers of all blocks, which QLoRA packs."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def parameters(self) -> float:
        """Return the number of parameters without a classification head; a fraction if the sizes
        are."""
        d, tables = self.width, self.vocabulary * (1 if self.tied else 2)
        norms = (2 * self.layers + 1) * d
        if self.qk_norm:
            norms += self.layers * 2 * self.head_width
        return self.in_linears + tables * d + norms

    def adapted(self, targets: tuple[str, ...] | str) -> dict[str, tuple[float, float]]:
        """Return the part of `linears` that a method's `targets` name.

        Raises ValueError for a name that matches none."""
        if targets == "all-linear":
            return self.linears
        for name, alone in one_by_one(targets):
            if not any(matches(f"layer.0.{path}", alone) for path in self.linears):
                raise ValueError(f"targets: {name!r} names none of {', '.join(self.linears)}")
        return {p: size for p, size in self.linears.items() if matches(f"layer.0.{p}", targets)}

    def added(self, method: Method | None) -> float:
        """Return the number of trainable parameters of a method, without a new classification
        head; None is full fine-tuning. Raises ValueError for a method without a formula."""
        return self.parameters if method is None else method.added(self)


@cache
def _llama_of(n_params: float, tied: bool) -> Shape:
    low, high = 0.0, 1e7  # widths
    for _ in range(100):
        d = (low + high) / 2
        shape = Shape(d / 128, d, 3.5 * d, d / 128, d / 512, 128, 128256, tied)
        low, high = (d, high) if shape.parameters < n_params else (low, d)
    return shape


# ------------------------------------------------------------------ activations by the formula

# Positions in a block, in order of execution. In the first block, activations before the first
# trainable layer are not kept.
_BEFORE, _QKV, _ATTENTION, _OUTPUT, _NORM, _INNER, _LAST = range(7)
_IN_A_BLOCK = ("norms", "attention", "feed-forward", "method")
_PLACES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), _QKV),
    **dict.fromkeys(("gate_proj", "up_proj"), _INNER),
    "o_proj": _OUTPUT,
    "down_proj": _LAST,
}


def _place(path: str) -> int:
    return _PLACES[path.rpartition(".")[2]]


class _Blocks:
    """Add up by part what the blocks of a model keep for the backward pass, in bytes."""

    def __init__(
        self,
        shape: Shape,
        method: Method | None,
        batch: int,
        context: int,
        weight: int,
        adapter: int,
    ):
        self.shape, self.full = shape, method is None
        self.method = Kept() if method is None else method.keeps(shape)
        self.e, self.a = weight, weight if adapter is None else adapter
        self.context = context + self.method.prompt
        self.tokens = batch * self.context
        self.bytes = dict.fromkeys(_IN_A_BLOCK, 0.0)
        paths = [*self.method.branches, *self.method.scaled, *self.method.inner]
        self.start = min(map(_place, paths), default=_QKV if self.method.prefix else _BEFORE)
        self.flowing = self.full or self.method.prompt > 0  # into the first block too
        self.changed = {path.rpartition(".")[2][0] for path in paths}  # "q", "k", "v", ...
        self.changed |= {"k", "v"} if self.method.prefix else set()

    def keep(self, part: str, numbers: float, at: float | None = None) -> None:
        """Keep `numbers` bytes a token in every block, in the first one if a gradient reaches
        it."""
        everywhere = at is None or self.flowing or at > self.start
        self.bytes[part] += (self.shape.layers - (not everywhere)) * numbers * self.tokens

    def reads(self, place: int) -> bool:
        """Return whether the module at this position needs its input for a gradient of its own."""
        adapted = any(_place(path) == place for path in self.method.branches)
        return self.full or (self.a == self.e and adapted)

    def norm(self, width: float, groups: float = 1) -> float:
        """Return the bytes a token of an RMSNorm over so many groups of `width` in all."""
        return 4 * (width + groups) + (self.e * width if self.full else 0)

    def norms(self) -> None:
        """Keep what norms read, and if they train, what they have divided."""
        shape = self.shape
        self.keep("norms", self.norm(shape.width), _BEFORE)
        self.keep("norms", self.norm(shape.width), _OUTPUT + 0.5)
        if shape.qk_norm:
            for name, heads in (("q", shape.heads), ("k", shape.kv_heads)):
                size = self.norm(heads * shape.head_width, heads)
                self.keep("norms", size, _ATTENTION if name in self.changed else _BEFORE)

    def attention(self, fused: bool) -> None:
        """Keep queries, keys, values, and the attention's result."""
        shape, e, before = self.shape, self.e, self.method.prefix
        q, k = (n * shape.head_width for n in (shape.heads, shape.kv_heads))
        keys = self.context + before
        if self.reads(_QKV):
            self.keep("attention", e * shape.width)
        # A prefix brings a mask, for which keys and values are repeated for every query head.
        keys_and_values = e * (q if before or not fused else k) * keys / self.context
        if fused:
            rows = 4 * shape.heads  # of the scores one number a row
            self.keep("attention", 2 * e * q + 2 * keys_and_values + rows, _ATTENTION)
            if before:
                self.keep("attention", e * keys, _ATTENTION)
            return
        # Of a product each side is kept for the other's gradient.
        for size, others in ((e * q, {"k"}), (keys_and_values, {"q"}), (keys_and_values, {*"qk"})):
            self.keep("attention", size, _ATTENTION if self.changed & others else _BEFORE)
        softmax = 4 if e == 4 else 4 + e  # computed in float32, and kept in both
        self.keep("attention", softmax * shape.heads * keys, _ATTENTION)
        if self.reads(_OUTPUT):
            self.keep("attention", e * q)

    def feedforward(self) -> None:
        """Keep the inputs of the gated feed-forward's products."""
        if self.reads(_INNER):
            self.keep("feed-forward", self.e * self.shape.width)
        self.keep("feed-forward", self.e * self.shape.feedforward * 3, _INNER + 0.5)
        if self.reads(_LAST):
            self.keep("feed-forward", self.e * self.shape.feedforward)

    def additions(self) -> None:
        """Keep what the method adds."""
        method, e, a = self.method, self.e, self.a
        for i, o in method.branches.values():
            self.keep("method", a * method.rank + (a * i if a != e else 0))
            self.keep("method", method.outputs * e * o + method.weights * e * i * o / self.tokens)
        self.keep("method", sum(e * o for _, o in method.scaled.values()))
        # Two layers that read the same share what is kept.
        shared = {_place(path): e * i for path, (i, _) in method.inner.items()}
        self.keep("method", sum(shared.values()))


def activations(
    model: str | Shape | PreTrainedConfig,
    method: Method | None = None,
    *,
    batch: int = 1,
    context: int = 2048,
    weight: int = 2,
    adapter: int | None = None,
    labels: bool = False,
    fused: bool = True,
    checkpointing: bool = False,
    chunked: bool = False,
) -> dict[str, float]:
    """Return the bytes kept for the backward pass by what keeps them, {"norms": ..., "attention":
    ...}, by the formula at the top of this file.

    model: a name in MODELS, a configuration, or a Shape. method: None is full fine-tuning.
    batch texts of `context` tokens. weight: bytes of a number of the base, and of what flows (2 or
    4); adapter: of a number of LoRA's factors, as many unless said. labels: a classifier, whose
    head keeps next to nothing. fused=False: attention that writes its scores out. checkpointing:
    each block keeps its input only. chunked: the head keeps its input and no logits; a classifier
    has none. Dropout, and the mask of a padded batch, are not counted.

    Raises ValueError for a shape or a method without a formula, or a size below 1."""
    validate("activations", batch=batch, context=context)
    shape, full = Shape.of(model), method is None
    blocks = _Blocks(shape, method, batch, context, weight, adapter)
    blocks.norms()
    blocks.attention(fused)
    blocks.feedforward()
    blocks.additions()
    kept = blocks.bytes
    if checkpointing:
        inputs = weight * shape.width * shape.layers * blocks.tokens
        kept = {"inputs of blocks": inputs, "norms": 0.0}
    kept["norms"] += blocks.norm(shape.width) * blocks.tokens  # the last one
    # A classifier's head trains in any case.
    read = weight * shape.width if full or labels or chunked else 0
    logits = 0 if labels or chunked else 4 * shape.vocabulary
    return kept | {"head": (read + logits) * blocks.tokens}


# ------------------------------------------------------------------ activations by running


def traced_activations(
    config: PreTrainedConfig | str,
    method: Any = None,
    *,
    batch: int = 1,
    context: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype | None = None,
    labels: bool = False,
    fused: bool = True,
    checkpointing: bool = False,
    chunked: bool = False,
) -> int:
    """Run a model without values, in training mode, and return the bytes that it keeps for the
    backward pass.

    Its tensors have shapes and no values, so it may be of any size. It is run as on a CPU, where
    fused attention is torch's own. Arguments as in `activations`, but any configuration will do,
    `dtype` and `adapter` are dtypes, and `method` may be any of the course or a configuration of
    PEFT's. Raises ValueError as `inject` does."""
    validate("traced_activations", batch=batch, context=context)
    config = MODELS[config] if isinstance(config, str) else config
    model = _prepared(_on_meta(config, dtype, labels, fused), method, adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        if checkpointing:
            model.config.use_cache = False  # which it would be, with a notice
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(batch, context, dtype=torch.long)
        if chunked and not labels:
            return measure.activation_bytes(model, _chunked_loss(model, ids))
        wanted = ids[:, 0] if labels else ids
        return measure.activation_bytes(model, lambda: model(input_ids=ids, labels=wanted).loss)


def _chunked_loss(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that computes the loss from `CHUNK` tokens' logits at a time."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.whole_head = base.get_output_embeddings()  # stays one of the model's own modules
    base.set_output_embeddings(nn.Identity())  # so that the model returns its hidden states

    def of_chunk(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = base.whole_head(hidden).float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    def loss() -> torch.Tensor:
        hidden = model(input_ids=ids).logits.flatten(0, 1)
        wanted = ids.new_zeros(len(hidden))  # shapes count here, not values
        parts = zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
        return sum(checkpoint(of_chunk, *part, use_reentrant=False) for part in parts)

    return loss


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, labels: bool, fused: bool) -> nn.Module:
    """Return the model of a configuration on the meta device."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "sdpa" if fused else "eager"
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype)
    if labels:
        model.fresh_modules = ("score",) if hasattr(model, "score") else ("classifier",)
    return model


def _prepared(model: nn.Module, method: Any, adapter: torch.dtype | None) -> nn.Module:
    """Put a method into the model, its tensors of dtype `adapter`, or of the base's."""
    if method is None:
        return model
    frozen = set(map(id, model.parameters()))
    dtype = next(model.parameters()).dtype if adapter is None else adapter
    if isinstance(method, Method):
        inject(model, method)
    else:
        from peft import get_peft_model  # takes seconds

        model = get_peft_model(model, method)
    for p in model.parameters():
        if id(p) not in frozen:
            p.data = p.data.to(dtype)
    return model


# ------------------------------------------------------------------ all parts


@dataclass(frozen=True)
class Recipe:
    """Hold bytes per parameter: of a frozen weight, and of the weight, gradient, master copy and
    optimizer moments of a trainable one."""

    frozen: float
    weight: float
    gradient: float
    master: float
    moments: float


RECIPES: dict[str, Recipe] = {
    "mixed precision": Recipe(2, 2, 2, 4, 8),  # bfloat16, float32 master copy, Adam in float32
    "all float32": Recipe(4, 4, 4, 0, 8),
    "pure bfloat16": Recipe(2, 2, 2, 0, 4),  # small steps are rounded away: see lesson 01
    "bfloat16, 8-bit Adam": Recipe(2, 2, 2, 0, 2),
    "float32 adapter": Recipe(2, 4, 4, 0, 8),  # on a bfloat16 base: what PEFT does by default
}


@dataclass(frozen=True)
class Memory:
    """Hold the peak memory of fine-tuning by component, in bytes."""

    weights: float  # of the base
    adapter: float  # weights that a method adds
    gradients: float
    optimizer: float  # with the master copy
    activations: float
    at_work: float  # what is computed and dropped again where the backward pass begins

    @property
    def total(self) -> float:
        """Return the sum of all components."""
        return sum(vars(self).values())

    def __repr__(self) -> str:
        rows = [*vars(self).items(), ("total", self.total)]
        return "\n".join(f"{n.replace('_', ' '):<12}{value / GB:>10.2f} GB" for n, value in rows)


def training_memory(
    model: str | Shape | PreTrainedConfig,
    method: Method | None = None,
    recipe: str = "mixed precision",
    *,
    batch: int = 1,
    context: int = 2048,
    labels: bool = False,
    checkpointing: bool = False,
    chunked: bool = False,
) -> Memory:
    """Return the memory of fine-tuning a model by component; arguments as in `activations`.

    With `QLoRA` the linear layers of the blocks are in NF4 with double quantisation, 4.127 bits per
    weight, and all else has the recipe's bytes; one matrix at a time is unpacked. `at_work` is the
    larger of two float32 gradients of the logits' size (with a chunked loss the logits and both
    gradients of one chunk), and input, output and both gradients of the widest layer (with
    checkpointing plus one recomputed block).

    The components add up if gradients are accumulated over batches. Otherwise the gradients of full
    fine-tuning replace the activations, and the peak is lower by the smaller of the two.

    Raises ValueError for an unknown recipe, and what `activations` raises."""
    shape = Shape.of(model)
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} must be one of {', '.join(map(repr, RECIPES))}")
    per = RECIPES[recipe]
    trains, full, e = shape.added(method), method is None, int(per.frozen)
    needs = Kept() if full else method.keeps(shape)
    packed = shape.in_linears if needs.packed else 0
    # A classifier has a small head of its own instead of the one for tokens.
    head = shape.vocabulary * shape.width if labels and not shape.tied else 0
    trains -= head if full else 0
    weights = packed * NF4_BITS / 8 + (shape.parameters - head - packed) * per.frozen
    sizes = {"batch": batch, "context": context, "weight": e, "labels": labels}
    sizes |= {"adapter": e if full else int(per.weight)}
    kept = activations(shape, method, checkpointing=checkpointing, chunked=chunked, **sizes)
    tokens = batch * (context + needs.prompt)
    at_work = 2 * e * tokens * (shape.width + shape.feedforward)
    if checkpointing:
        all_blocks = activations(shape, method, **sizes)
        at_work += sum(all_blocks[part] for part in _IN_A_BLOCK) / shape.layers
    if packed:
        at_work += e * max(i * o for i, o in shape.linears.values())
    if not labels:
        logits = 12 * min(tokens, CHUNK) if chunked else 8 * tokens
        at_work = max(at_work, shape.vocabulary * logits)
    return Memory(
        weights=trains * per.weight if full else weights,
        adapter=0 if full else trains * per.weight,
        gradients=trains * per.gradient,
        optimizer=trains * (per.master + per.moments),
        activations=sum(kept.values()),
        at_work=at_work,
    )


def components(
    model: str | Shape | PreTrainedConfig,
    method: Method | None = None,
    recipe: str = "mixed precision",
    **sizes: Any,
) -> dict[str, float]:
    """Return `training_memory` in bytes as the four terms of lesson 13: {"base", "trainable",
    "blocks", "logits"}. What is at work where the backward pass begins belongs to the blocks or to
    the logits, whichever it is. Arguments and errors as there."""
    memory = training_memory(model, method, recipe, **sizes)
    lean = training_memory(model, method, recipe, **sizes | {"chunked": True})
    logits = activations(model, method, weight=int(RECIPES[recipe].frozen), **sizes)["head"]
    if memory.at_work > lean.at_work:  # than the block that is at work otherwise
        logits += memory.at_work
    frozen = memory.weights if method is not None else 0.0
    trainable = memory.weights - frozen + memory.adapter + memory.gradients + memory.optimizer
    blocks = memory.total - frozen - trainable - logits
    return {"base": frozen, "trainable": trainable, "blocks": blocks, "logits": logits}
