"""Map all methods of the installed PEFT, from its registry and one small model.

By hand come only the settings that a type cannot start without (`NEEDED`). What a type changes is
measured, so a type that a later version adds is measured as well.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

_PROMPT = {"num_virtual_tokens": 8}
_TARGETS = {"target_modules": ["q_proj", "v_proj"]}
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": _TARGETS | {"total_step": 100},
    "ADAPTION_PROMPT": {"adapter_len": 8, "adapter_layers": 2},
    "CARTRIDGE": _PROMPT,
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "MULTITASK_PROMPT_TUNING": _PROMPT | {"num_tasks": 2},
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
}
# {what a type changes: the lessons that build such a method}
FAMILIES = {
    "adds a ΔW of low rank": "02, 04, 05",
    "adds a ΔW of high rank": "14",
    "makes its ΔW from W": "07, 14",
    "adds to few entries of W": "10",
    "adds a branch that is not linear in x": "06",
    "trains biases, norms or embeddings": "10",
    "adds virtual tokens": "08",
    "adds keys and values": "09",
    "needs more than a config": "",
    "not classified": "",
}
_LOW, _HIGH, _FROM_W, _FEW, _BENT, _PARTS, _TOKENS, _CACHE, _MORE, _UNKNOWN = FAMILIES
WIDTH = 256


def _model() -> LlamaForCausalLM:
    """Return a random Llama with two layers whose q_proj and v_proj are square."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def _config(kind: str, cls: type) -> peft.PeftConfig:
    """Return the config with its defaults, on q_proj and v_proj where it has targets."""
    has_targets = "target_modules" in cls.__dataclass_fields__
    return cls(task_type="CAUSAL_LM", **NEEDED.get(kind, _TARGETS if has_targets else {}))


def _of_layer(layer: nn.Module) -> tuple[str, int | None]:
    """Return the family of an adapted layer and the rank of its ΔW, from what it computes."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        return _PARTS, None
    x, y, zero = torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.zeros(4, WIDTH)
    size = layer(x).abs().max()
    if layer(zero).abs().max() > 1e-4 * size:
        return _PARTS, None
    if (layer(x + y) - layer(x) - layer(y)).abs().max() > 1e-4 * size:
        return _BENT, None
    delta = layer(torch.eye(WIDTH)) - base(torch.eye(WIDTH))  # ΔWᵀ
    rank = int(torch.linalg.matrix_rank(delta, rtol=1e-4))
    if not rank:
        return _UNKNOWN, None
    if (delta != 0).float().mean() < 0.3:
        return _FEW, rank
    kept = base.weight.clone()
    base.weight.zero_()
    alone = layer(x).abs().max()  # what the branch computes without W
    base.weight.copy_(kept)
    if alone < 1e-6 * size:
        return _FROM_W, rank
    return (_LOW if 4 * rank <= WIDTH else _HIGH), rank


def _family(model: peft.PeftModel) -> tuple[str, int | None]:
    """Return the family of a model's method and the rank of the ΔW in its first layer."""
    if model.active_peft_config.is_prompt_learning:
        return (_TOKENS if isinstance(model.get_prompt(1), torch.Tensor) else _CACHE), None
    if layers := [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
        return _of_layer(layers[0])
    owners = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad]
    attention = bool(owners) and all(owner.endswith("attn") for owner in owners)
    return (_CACHE if attention else _UNKNOWN), None


def _row(kind: str, ids: torch.Tensor) -> dict[str, Any]:
    """Return the row of one type; what it reports if it does not run is its note."""
    row = {"type": kind, "changes": _UNKNOWN, "trainable": None, "rank of ΔW": None}
    row |= {"merges": "no", "as LoRA": "no", "note": ""}
    try:
        cls = {k.value: c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
        if cls is None:
            return row | {"merges": "", "as LoRA": "", "note": "PEFT lists no config for it"}
        model = peft.get_peft_model(_model(), _config(kind, cls)).eval()
        trainable = [p for p in model.parameters() if p.requires_grad]
        row["trainable"] = sum(p.numel() for p in trainable)
        for p in trainable:
            p.add_(0.05 * torch.randn_like(p))
        logits = model(ids).logits
        row["changes"], row["rank of ΔW"] = _family(model)
        row["as LoRA"] = "yes" if model.supports_lora_conversion() else "no"
    except Exception as error:
        note = f"{type(error).__name__}: {error}".split("\n")[0]
        return row | {"changes": _MORE, "merges": "", "as LoRA": "", "note": note}
    with contextlib.suppress(Exception):
        gap = (model.merge_and_unload()(ids).logits - logits).abs().max()
        row["merges"] = "yes" if gap < 1e-4 else f"off by {gap:.1g}"
    return row


def peft_map() -> list[dict[str, Any]]:
    """Return a row for each member of `peft.PeftType`, ordered by family: what it changes, its
    trainable parameters, the rank of its ΔW, whether the merged model computes the same, and
    whether PEFT says that it can convert the adapter to a LoRA."""
    rows, order = [], list(FAMILIES)
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                for kind in peft.PeftType:
                    torch.manual_seed(0)
                    rows.append(_row(kind.value, torch.arange(24).view(2, 12)))
    finally:
        logging.disable(logging.NOTSET)
    return sorted(rows, key=lambda row: order.index(row["changes"]))
