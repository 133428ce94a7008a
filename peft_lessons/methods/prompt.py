"""Prompt tuning: learned embeddings before the text's embeddings, and a hook that extends mask and
labels."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn

from ..engine import Method, PeftFiles, attached_to, register, trained_dtype, validate
from ..engine.facts import TRL, Facts, InPeft, Kept, OnMap, Point, Recommended
from ..engine.virtual_tokens import (
    by_name,
    lengthen,
    refuse_cache,
    refuse_long,
    refuse_mask,
    refuse_model,
    rows_of,
    seen_in,
    text_of,
)
from .prefix import OF_THE_BASE, Prefix


def prepend(prompt: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Return [P; E(x)] (batch, p + T, d) from embeddings (batch, T, d) and a prompt (p, d), or one
    per sequence (batch, p, d), in the embeddings' dtype. Source: Lester et al. 2021, section 2."""
    batch = len(embeddings)
    if prompt.dim() == 2:
        prompt = prompt.expand(batch, -1, -1)  # (batch, p, d), no copy
    return torch.cat([prompt.to(embeddings.dtype), embeddings], 1)  # (batch, p + T, d)


def sampled_rows(table: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    """Sample rows of a table (V, d) without replacement and return a copy (tokens, d). ValueError
    unless d is `width` and V at least `tokens`."""
    shape = tuple(getattr(table, "shape", ()))
    if len(shape) != 2 or shape[1] != width or shape[0] < tokens:
        raise ValueError(
            f"PromptTuning: vocab_embeddings must be a tensor of at least num_tokens={tokens} rows "
            f"of embed_dim={width} numbers, such as model.get_input_embeddings().weight, "
            f"not {f'of shape {shape}' if shape else repr(table)}"
        )
    rows = torch.randperm(shape[0], device=table.device)[:tokens]  # (tokens,)
    return table.detach()[rows].clone()  # (tokens, d)


class PromptTuning(nn.Module):
    """Prepend p learned virtual tokens to a text: (batch, T, d) -> (batch, p + T, d). They start
    from N(0, 1) as in PEFT, or as `num_tokens` different rows of `vocab_embeddings` (V, d). Raises
    ValueError for an invalid setting. Source: Lester et al. 2021, sections 2 and 3.2."""

    def __init__(
        self,
        num_tokens: int,
        embed_dim: int,
        init_from_vocab: bool = False,
        vocab_embeddings: torch.Tensor | None = None,
    ):
        validate("PromptTuning", num_tokens=num_tokens, embed_dim=embed_dim)
        super().__init__()
        start = torch.randn(num_tokens, embed_dim)  # (p, d)
        if init_from_vocab:
            start = sampled_rows(vocab_embeddings, num_tokens, embed_dim)
        self.prompt_embeddings = nn.Parameter(start)

    def forward(self, input_embeddings: torch.Tensor) -> torch.Tensor:
        return prepend(self.prompt_embeddings, input_embeddings)  # (batch, p + T, d)

    def extend_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Extend a mask (batch, T) to (batch, p + T): every token attends to the prompt."""
        return lengthen(mask, len(self.prompt_embeddings), 1)

    def extend_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Extend labels (batch, T) to (batch, p + T) by -100: the loss ignores the prompt."""
        return lengthen(labels, len(self.prompt_embeddings), -100)


def refuse_last_place(model: nn.Module, inputs: dict, text: torch.Tensor) -> None:
    """Raise ValueError for right padding in a classifier that finds a text's last token by its id:
    embeddings have no ids, so it would read the last position, which is padding."""
    if not (type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "score")):
        return
    mask, padding = inputs.get("attention_mask"), getattr(model.config, "pad_token_id", None)
    if mask is None and text.dim() == 2 and padding is not None:
        mask = text != padding  # (batch, T)
    if mask is not None and not (mask.is_meta or mask[:, -1].all()):
        raise ValueError(
            "Prompt: the mask ends with 0 for some text: this classifier reads the last position, "
            "and cannot see that it is padding: pad on the left (padding_side='left')"
        )


def put_first(prompt: PromptTuning, model: nn.Module, inputs: dict) -> None:
    """Prepend the prompt to all inputs with one entry per token, in place (in `inputs`)."""
    text, p = text_of(inputs), len(prompt.prompt_embeddings)  # (batch, T, d), or ids
    refuse_last_place(model, inputs, text)
    embeddings = text if text.dim() == 3 else model.get_input_embeddings()(text)
    inputs |= {"input_ids": None, "inputs_embeds": prompt(embeddings)}  # (batch, p + T, d)
    if (positions := inputs.get("position_ids")) is not None:  # (batch, T), or (1, T)
        start = positions.amin(-1, keepdim=True) - p  # the hook has moved the text by p
        own = start + torch.arange(p, device=positions.device)  # (batch, p)
        inputs["position_ids"] = torch.cat([own, positions], -1)  # (batch, p + T)
    kinds, labels = inputs.get("token_type_ids"), inputs.get("labels")
    if kinds is not None:
        inputs["token_type_ids"] = lengthen(kinds, p, 0)
    by_token = labels is not None and not labels.is_floating_point()  # floats: several per text
    if by_token and labels.shape == text.shape[:2]:  # one per token, not per text
        inputs["labels"] = prompt.extend_labels(labels)  # (batch, p + T)
    for name in ("start_positions", "end_positions", "logits_to_keep"):  # positions in the text
        if isinstance(places := inputs.get(name), torch.Tensor):
            inputs[name] = places.where(places < 0, places + p)


class PromptHook(PromptTuning):
    """Insert the prompt into every call of a model, by two hooks."""

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the changed arguments of a call (a forward pre-hook), or raise ValueError."""
        inputs, p = by_name(model, args, kwargs), len(self.prompt_embeddings)
        mask, seen = inputs.get("attention_mask"), seen_in(inputs)
        refuse_mask("Prompt", mask)
        refuse_long("Prompt", model, p, max(seen - p, 0) + text_of(inputs).shape[1])
        refuse_cache("Prompt", inputs, p)
        inputs.pop("cache_position", None)  # the model counts on from its cache
        if (positions := inputs.get("position_ids")) is not None:  # without the prompt
            inputs["position_ids"] = positions + p
        if mask is not None:  # `generate` drops a mask of ones, and the model needs none then
            inputs["attention_mask"] = self.extend_mask(mask)  # p more on the left
        if not seen:  # later the cache holds the prompt's keys and values
            put_first(self, model, inputs)
        return (), inputs

    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Mark the cache in the output (a forward hook): any other cache lacks the prompt."""
        for value in output if isinstance(output, tuple) else output.values():
            if hasattr(value, "get_seq_length"):
                value.begun_by = "Prompt"


def initial_prompt(method: "Prompt", table: torch.Tensor) -> torch.Tensor:
    """Return the initial prompt (p, d) for the base's embeddings `table` (V, d). ValueError if the
    tokenizer of a text gives no ids, or ids that the table does not have."""
    vocabulary, width = table.shape
    with table.device:  # new tensors are made there
        if method.init == "normal":
            return torch.randn(method.tokens, width)  # std 1: as PEFT's RANDOM
        if method.init == "vocab":
            return sampled_rows(table, method.tokens, width)
        ids = method.tokenizer(method.init)["input_ids"]
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(
                f"Prompt: init={method.init!r} gives the tokens {ids}, but the model knows 0 to "
                f"{vocabulary - 1}: give a text, and the model's own tokenizer"
            )
        return rows_of(ids, table, method.tokens)  # (p, d)


STARTS = {"normal": "RANDOM", "vocab": "SAMPLE_VOCAB"}


def to_file(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Add PEFT's name of the initialisation; a text counts as rows of the vocabulary."""
    return entries | {"prompt_tuning_init": STARTS.get(method.init, "SAMPLE_VOCAB")}, tensors


def from_file(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return the method and the tensors. The file has no text: "vocab" stands for one."""
    random = config.get("prompt_tuning_init", "RANDOM") == "RANDOM"
    return cls(config.get("num_virtual_tokens"), "normal" if random else "vocab"), tensors


@register
@dataclass(frozen=True)
class Prompt(Method):
    """Apply prompt tuning (Lester et al. 2021): prepend `tokens` learned embeddings to every text,
    initialised from the vocabulary ("vocab"), N(0, 1) ("normal") or a text and its tokenizer."""

    tokens: int
    init: str = "vocab"
    tokenizer: Any = field(default=None, repr=False, compare=False)
    learning_rate = 3e-2  # for minilm; tinylm needs 0.1 or more (lesson 08)
    design = replace(Prefix.design, form="softmax(q k(H)ᵀ / √d_h) v(H)")
    files = PeftFiles(
        "PROMPT_TUNING",
        write=to_file,
        read=from_file,
        fields={"tokens": ("num_virtual_tokens", None)},
        tensors={"prompt_embeddings": "prompt_embeddings"},
        others=(
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
            *OF_THE_BASE,
        ),
    )
    facts = Facts(
        "08",
        points=(Point("prompt", "prompt", (6, 0)),),
        place=OnMap("prompt", "prompt", 3, "the virtual tokens of a prompt, before the text"),
        peft=(
            # PEFT's default draws numbers fifty times as large as those of the vocabulary.
            InPeft(
                "prompt",
                "PromptTuningConfig",
                (1e-1, 2e-2),
                f"{TRL}: 1e-2 to 3e-2, 2e-2 in its example",
                flags={"num_virtual_tokens": 16, "prompt_tuning_init": "SAMPLE_VOCAB"},
            ),
        ),
        advice=Recommended(
            "prompt tuning",
            {"tokens": 16},
            "for many tasks on an untouched base",
            no_merge="a prompt cannot be merged. vLLM takes its vectors as input with "
            "--enable-prompt-embeds",
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.init not in ("normal", "vocab") and self.tokenizer is None:
            raise ValueError(
                f"Prompt: init={self.init!r} is neither 'normal' nor 'vocab', so it is a text, and "
                "needs a tokenizer: Prompt(tokens, init, tokenizer=load_tokenizer(name))"
            )

    def added(self, shape: Any) -> float:
        return self.tokens * shape.width

    def attach(self, model: nn.Module) -> tuple[nn.Module, list]:
        refuse_model("Prompt", model)
        refuse_long("Prompt", model, self.tokens, text=1)
        table = model.get_input_embeddings().weight  # (V, d)
        prompt = PromptHook(self.tokens, table.shape[1])
        prompt.prompt_embeddings = nn.Parameter(
            initial_prompt(self, table).to(trained_dtype(table.dtype))
        )
        before = model.register_forward_pre_hook(prompt.before_forward, with_kwargs=True)
        return prompt, [before, model.register_forward_hook(prompt.after_forward)]

    def keeps(self, shape: Any) -> Kept:
        return Kept(prompt=self.tokens)


def prompt_of(model: nn.Module) -> PromptTuning:
    """Return the module that `inject(model, Prompt(...))` attached. ValueError if there is none."""
    return attached_to(model, PromptTuning, "prompt_of")
