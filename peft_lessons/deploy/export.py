"""Write models and adapters of Llama's layout in GGUF, the file format of llama.cpp.

The names, the order of rows in the query and key projections and the fields of the header are those
of llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`; rounding is that of the Python
package `gguf`, which llama.cpp's authors publish.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, quants
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig

from ..data.assistant import IN_LAYER, OUTSIDE
from ..data.base_models import BUNDLED, load_config, load_model, load_tokenizer
from ..engine import CONFIG, fingerprint, injection_of, read_adapter, written_whole

KINDS = ("F32", "F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0")
BASE = "peft_lessons.base"  # our key for the fingerprint of the base

_BLOCK = 32  # weights that share a scale, in all quantised kinds of the list
_HEAD = "lm_head"
# {name in transformers' Llama: name in the GGUF file}
_IN_LAYER = {theirs: name for name, theirs in IN_LAYER.items()}
_OUTSIDE = {theirs: name for name, theirs in OUTSIDE.items()} | {_HEAD: "output"}


# ------------------------------------------------------------------ a model


def to_gguf(
    model: nn.Module | str | os.PathLike,
    file: str | os.PathLike,
    kind: str = "F16",
    tokenizer: Any = None,
) -> Path:
    """Write a model of Llama's layout and its tokenizer to a GGUF file, and return its path.

    Args:
        model: a `LlamaForCausalLM` in 16 or 32 bits, plain or with a merged method in it; or the
            name or folder of one, as for `load_model`.
        file: an older file is replaced once the new one is complete.
        kind: the type of the matrices, one of `KINDS`. Norms stay in F32. If the kind has 4 or 5
            bits, the embedding and an output layer of its own are written in Q8_0.
        tokenizer: None loads it by the model's name.

    Raises TypeError, ValueError or FileNotFoundError before anything is written: another
    architecture, an unmerged method, weights in 4 bits, NaN, a tokenizer that llama.cpp would not
    follow, a row length that the kind does not divide, an unknown kind, a missing folder."""
    _refuse_kind(kind)
    file = _target(file, "to_gguf")
    if not isinstance(model, nn.Module):
        _refuse_architecture(load_config(model))
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        model = load_model(model)
    _refuse_model(model)
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    config = model.config
    fields = _tokenizer_fields(tokenizer, config)
    tensors = _tensors(model, kind)

    def fill(writer: gguf.GGUFWriter) -> None:
        _write_config(writer, config, kind)
        writer.add_string(BASE, fingerprint(model))
        for write in fields:
            write(writer)
        for name, (weight, path, as_kind) in tensors.items():
            _add(writer, name, _values(weight, path, config), as_kind)

    _write(file, fill)
    return file


def _refuse_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")


def _target(file: str | os.PathLike, verb: str) -> Path:
    """Return the path to write to. FileNotFoundError for a missing folder, ValueError for a
    folder's name."""
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{verb}: file={str(path)!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{verb}: file={str(path)!r} lies in a folder that does not exist; make {path.parent} "
            "first"
        )
    return path


def _refuse_architecture(config: PretrainedConfig) -> None:
    """Raise ValueError for what the GGUF architecture `llama` does not compute as transformers
    does, or what was not tried here."""
    rope = getattr(config, "rope_parameters", None) or {}
    wrong = ""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "to_gguf: the model's weights are quantised. Load the same model with "
            "dtype=torch.bfloat16, load_adapter and merge, and export that"
        )
    if config.model_type != "llama":
        wrong = f"model_type={config.model_type!r}"
    elif rope.get("rope_type", "default") != "default":
        wrong = f"rope_type={rope['rope_type']!r}"
    elif config.attention_bias or config.mlp_bias:
        wrong = "biases in its layers"
    elif config.hidden_act != "silu":
        wrong = f"hidden_act={config.hidden_act!r}"
    if wrong:
        raise ValueError(
            f"the export knows Llama's layout only, and this model has {wrong}. llama.cpp's own "
            "script convert_hf_to_gguf.py writes many other architectures"
        )


def _refuse_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model that cannot be exported as it is."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "to_gguf: the model holds an adapter of Hugging Face PEFT: export "
            "model.merge_and_unload(), or save the adapter and export it with adapter_to_gguf"
        )
    if type(model) is not LlamaForCausalLM:
        raise TypeError(
            f"to_gguf: model is a {type(model).__name__}, and only LlamaForCausalLM can be "
            "exported; llama.cpp's own script convert_hf_to_gguf.py writes many other models"
        )
    _refuse_architecture(model.config)
    injection = injection_of(model)
    if injection is not None and not injection.merged:
        raise ValueError(
            f"to_gguf: the model holds an unmerged {type(injection.method).__name__}: merge(model) "
            "first, or write it with save_adapter and export that folder with adapter_to_gguf"
        )


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {path of a layer: weight (out, in)} of a model, those of wrapped layers too."""
    wrapped = getattr(injection_of(model), "wrappers", {})
    tied = model.config.tie_word_embeddings
    layers = ((path, module) for path, module in model.named_modules() if hasattr(module, "weight"))
    inside = tuple(f"{path}." for path in wrapped)
    return {
        path: module.weight
        for path, module in layers
        if not (path.startswith(inside) or (tied and path == _HEAD))
    }


def _tensors(model: nn.Module, kind: str) -> dict[str, tuple[torch.Tensor, str, str]]:
    """Return {name in the file: (weight, path in the model, kind)}. Raises ValueError for a weight
    that the file cannot hold."""
    tensors = {}
    for path, weight in _weights(model).items():
        as_kind = kind
        if weight.ndim == 1:
            as_kind = "F32"
        elif path in _OUTSIDE and kind.startswith(("Q4", "Q5")):
            as_kind = "Q8_0"
        _refuse_weight(weight, as_kind, f"to_gguf: {path}.weight")
        tensors[f"{_name_of(path)}.weight"] = weight, path, as_kind
    return tensors


def _refuse_weight(weight: torch.Tensor, kind: str, what: str) -> None:
    if weight.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values")
    if not weight.is_floating_point():
        raise ValueError(
            f"{what} holds {weight.dtype} codes, it is quantised: load the model with "
            "dtype=torch.bfloat16, load_adapter and merge, and export that"
        )
    if weight.shape[-1] % _BLOCK and kind.startswith("Q"):
        raise ValueError(
            f"{what}: its rows have {weight.shape[-1]} numbers, and {kind} stores blocks of "
            f"{_BLOCK}: choose kind='F16'"
        )
    largest = weight.detach().abs().max().item() if weight.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{what} holds NaN or infinity: training may have diverged")
    if largest > torch.finfo(torch.float16).max and kind != "F32":
        raise ValueError(f"{what} holds {largest:.3g}, too large for {kind}: choose kind='F32'")


def _name_of(path: str) -> str:
    """Return a layer's name in the file: model.layers.3.self_attn.q_proj is blk.3.attn_q."""
    if path.startswith("model.layers."):
        _, _, layer, rest = path.split(".", 3)
        return f"blk.{layer}.{_IN_LAYER[rest]}"
    return _OUTSIDE[path]


def _values(weight: torch.Tensor, path: str, config: PretrainedConfig) -> np.ndarray:
    """Return a weight (out, in) in float32 as the file stores it.

    transformers keeps the two numbers that a rotary position turns in the two halves of a head,
    GGUF side by side: so the rows of query and key projections change places."""
    values = weight.detach().to("cpu", torch.float32).numpy()
    if path.endswith("q_proj"):
        return _side_by_side(values, config.num_attention_heads)
    if path.endswith("k_proj"):
        return _side_by_side(values, config.num_key_value_heads)
    return values


def _side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(rows.shape)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    as_type = GGMLQuantizationType[kind]
    writer.add_tensor(name, quants.quantize(values, as_type), raw_dtype=as_type)


def _write(file: Path, fill: Callable[[gguf.GGUFWriter], None]) -> None:
    """Write a GGUF file, whole or not at all; `fill` adds fields and tensors."""
    with written_whole(file) as part:
        writer = gguf.GGUFWriter(part, "llama")
        try:
            fill(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _write_config(writer: gguf.GGUFWriter, config: PretrainedConfig, kind: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# ------------------------------------------------------------------ its tokenizer


def _tokenizer_of(model: nn.Module):
    """Load the tokenizer of a model by its name. ValueError for a model without a name."""
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            "to_gguf: the model has no name, by which its tokenizer could be found: pass "
            "tokenizer=..."
        )
    return load_tokenizer(bundled_name(name))


def bundled_name(name: str) -> str:
    """Return the bundled name of a model that files call by its published name."""
    names = {bundled.published_as: own for own, bundled in BUNDLED.items()}
    return names.get(name, name)


def _pre_tokenizer(spec: Mapping) -> str | None:
    """Return llama.cpp's name for a byte-level pre-tokenizer, or None for one not known here."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    plain = len(levels) == 1 and levels[0]["use_regex"] and not levels[0]["add_prefix_space"]
    if not plain or steps[-1] is not levels[0]:
        return None
    if len(steps) == 1:
        return "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    return "smollm" if steps[:-1] == [digits] else None


def _tokenizer_fields(
    tokenizer: Any, config: PretrainedConfig
) -> list[Callable[[gguf.GGUFWriter], None]]:
    """Return what writes each of the tokenizer's fields. Raises TypeError or ValueError for a
    tokenizer whose ids llama.cpp would not give."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"to_gguf: tokenizer is a {type(tokenizer).__name__}, and the export needs one of the "
            "library tokenizers, as load_tokenizer returns"
        )
    spec = json.loads(backend.to_str())
    model, pre = spec["model"], _pre_tokenizer(spec)
    odd = {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}
    known = model["type"] == "BPE" and not any(model.get(name) for name in odd)
    if not known or pre is None or spec["normalizer"] or model.get("ignore_merges"):
        raise ValueError(
            "to_gguf: the tokenizer is not a byte-level BPE as GPT-2's or SmolLM's, and in "
            "llama.cpp the same text could get other ids. llama.cpp's own script "
            "convert_hf_to_gguf.py knows more tokenizers"
        )
    words = {**model["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    if max(words.values()) >= config.vocab_size:
        raise ValueError(
            f"to_gguf: the tokenizer has ids up to {max(words.values())}, and the model has "
            f"vocab_size={config.vocab_size}: they do not belong together"
        )
    added = {
        token["id"]: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        for token in spec["added_tokens"]
    }
    by_id = {number: word for word, number in words.items()}
    numbers = range(config.vocab_size)
    listed = [by_id.get(number, f"[PAD{number}]") for number in numbers]
    unused, normal = gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    kinds = [added.get(n, normal if n in by_id else unused) for n in numbers]
    merges = [" ".join(merge) for merge in model["merges"]]
    begins = _begins(tokenizer)

    fields = [
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_tokenizer_pre(pre),
        lambda w: w.add_token_list(listed),
        lambda w: w.add_token_types(kinds),
        lambda w: w.add_token_merges(merges),
        lambda w: w.add_add_bos_token(begins),
    ]
    special = {
        "bos": gguf.GGUFWriter.add_bos_token_id,
        "eos": gguf.GGUFWriter.add_eos_token_id,
        "pad": gguf.GGUFWriter.add_pad_token_id,
    }
    for name, add in special.items():
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            fields.append(lambda w, add=add, number=number: add(w, number))
    if isinstance(tokenizer.chat_template, str):
        fields.append(lambda w: w.add_chat_template(tokenizer.chat_template))
    return fields


def _begins(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts its first token before a text. ValueError if it adds
    others."""
    ids = tokenizer("")["input_ids"]
    if ids not in ([], [tokenizer.bos_token_id]):
        raise ValueError(
            f"to_gguf: the tokenizer adds the ids {ids} to each text, and llama.cpp can add only "
            "the beginning-of-sequence token"
        )
    return bool(ids)


# ------------------------------------------------------------------ an adapter

# Entries of PEFT's LoraConfig that change nothing of what a trained adapter computes, or that the
# export reads.
_READ = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "task_type",
    "use_rslora",
}
_OFF = (None, False, {}, [], "none", "")
_OFF_FOR = {"init_lora_weights": (True, False, "gaussian")}  # others change the base


def adapter_to_gguf(folder: str | os.PathLike, file: str | os.PathLike, base: Any = None) -> Path:
    """Write a LoRA adapter, saved by the course or by Hugging Face PEFT, to a GGUF file in F32,
    and return its path. rsLoRA's scale is written as the alpha that gives it.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors`.
        file: an older file is replaced once the new one is complete.
        base: the base model, its config, name or folder, from which the export takes the numbers
            of heads; None takes the base that the adapter's config names.

    Raises FileNotFoundError, TypeError or ValueError before anything is written: a missing or
    broken file, a missing folder, another method than plain LoRA (DoRA, modules_to_save, biases,
    patterns of ranks), another architecture than Llama's, layers outside the blocks."""
    file = _target(file, "adapter_to_gguf")
    said, tensors, header = read_adapter(folder)
    _refuse_method(said)
    config = _base_config(said, base)
    _refuse_architecture(config)
    shapes, values, factors = _shapes(config), {}, set()
    for key, tensor in tensors.items():
        path, letter = _lora_path(key)
        name = f"{_name_of(path)}.weight.lora_{letter.lower()}"
        _refuse_shape(tensor, path, letter, said["r"], shapes)
        values[name] = _values(tensor, path if letter == "B" else "", config)
        factors.add((path, letter))
    for path, letter in factors:
        if (path, "B" if letter == "A" else "A") not in factors:
            raise ValueError(f"adapter_to_gguf: the file holds lora_{letter} of {path!r} alone")
    alpha = float(said["lora_alpha"]) * (math.sqrt(said["r"]) if said.get("use_rslora") else 1.0)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string(BASE, header.get("peft_lessons_base", ""))
        for name, value in values.items():
            _add(writer, name, value, "F32")

    _write(file, fill)
    return file


def _refuse_method(said: Mapping) -> None:
    """Raise ValueError unless the config describes a plain LoRA, with one rank and one alpha."""
    merged = "Load the adapter onto its base, merge(model), and export that with to_gguf"
    if said["peft_type"] != "LORA":
        raise ValueError(
            f"adapter_to_gguf: peft_type={said['peft_type']!r} in {CONFIG}, and GGUF has adapters "
            f"of LoRA only. {merged}, if the method can be merged"
        )
    if said.get("use_dora"):
        raise ValueError(
            f"adapter_to_gguf: use_dora=True in {CONFIG}: llama.cpp would leave DoRA's magnitudes "
            f"out. {merged}"
        )
    for name, value in said.items():
        if name not in _READ and value not in _OFF_FOR.get(name, _OFF):
            raise ValueError(
                f"adapter_to_gguf: {name}={value!r:.80} in {CONFIG} has no place in a GGUF "
                f"adapter. {merged}"
            )
    for name in ("r", "lora_alpha"):
        value = said.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"adapter_to_gguf: {name}={value!r} in {CONFIG} must be positive")


def _base_config(said: Mapping, base: Any) -> PretrainedConfig:
    """Return the config of the adapter's base. ValueError where nothing names it."""
    if isinstance(base, nn.Module):
        return base.config
    if isinstance(base, PretrainedConfig):
        return base
    name = said.get("base_model_name_or_path") if base is None else base
    if not name:
        raise ValueError(
            f"adapter_to_gguf: {CONFIG} names no base, whose numbers of heads the export needs: "
            "pass base=model, or base='smollm2'"
        )
    return load_config(bundled_name(os.fspath(name)))


def _lora_path(key: str) -> tuple[str, str]:
    """Return (path of the layer, 'A' or 'B') of a tensor in an adapter's file. ValueError for any
    other tensor."""
    path, _, letter = key.removeprefix("base_model.model.").rpartition(".lora_")
    letter = letter.removesuffix(".weight")
    inside = path.startswith("model.layers.") and path.split(".", 3)[-1] in _IN_LAYER
    if letter not in ("A", "B") or not inside:
        raise ValueError(
            f"adapter_to_gguf: {key!r} is no LoRA factor of a linear layer in Llama's blocks, and "
            "only these were tried. Load the adapter onto its base, merge(model), and export that "
            "with to_gguf"
        )
    return path, letter


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Return {path: shape (out, in)} of the weights of a model with this config."""
    with torch.device("meta"):  # shapes alone, no memory and no numbers
        return {path: weight.shape for path, weight in _weights(LlamaForCausalLM(config)).items()}


def _refuse_shape(
    factor: torch.Tensor, path: str, letter: str, rank: int, shapes: Mapping[str, torch.Size]
) -> None:
    if path not in shapes:
        problem = f"{path!r} is no layer of it"
    else:
        outputs, inputs = shapes[path]
        due = (rank, inputs) if letter == "A" else (outputs, rank)
        if tuple(factor.shape) == due:
            return
        problem = f"lora_{letter} of {path!r} has shape {tuple(factor.shape)}, not {due}"
    raise ValueError(
        f"adapter_to_gguf: the adapter does not fit the base: {problem}. Name the base that the "
        "adapter was trained on, base=..."
    )


# ------------------------------------------------------------------ one tensor


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight (..., in) as a GGUF file of this kind would give it back: rounded to the
    kind's grid, and stored again in the weight's dtype and on its device.

    Raises TypeError or ValueError for an unknown kind, a tensor that holds no floats, NaN or
    infinity, or rows that the kind's blocks of 32 do not divide."""
    _refuse_kind(kind)
    if not isinstance(weight, torch.Tensor) or not weight.ndim:
        raise TypeError(f"rounded: weight must be a tensor with rows, got {weight!r:.60}")
    _refuse_weight(weight, kind, "rounded: weight")
    as_type = GGMLQuantizationType[kind]
    values = weight.detach().to("cpu", torch.float32).numpy()
    back = quants.dequantize(quants.quantize(values, as_type), as_type)
    return torch.tensor(back).reshape(weight.shape).to(weight)
