"""Exchange the files of every method with Hugging Face PEFT, on every base."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.base_models import keep_differentiable, nf4
from ..engine import (
    CONFIG,
    WEIGHTS,
    Injection,
    Method,
    injected_copy,
    injection_of,
    load_adapter,
    save_adapter,
    task_type,
    unload,
)
from ..methods.qlora import QLoRA, dequantize
from ..methods.selective import PartialFineTuning
from ..train.loop import train_step
from .tiny import padded_batch, perturb

# What PEFT says of a pruned AdaLoRA's files, which are right: that its ranks are ignored, or were
# not gathered.
_FALSE_ALARMS = (".*rank_pattern", ".*have invalid shape")


def interoperability(
    bases: Mapping[str, nn.Module],
    methods: Mapping[str, tuple[Method, object]],
    steps: Mapping[str, int] | None = None,
) -> list[dict]:
    """Exchange the files of every method on every base with PEFT, in both directions.

    The parameters of both adapters are perturbed. The first adapter is created by us and opened by
    PEFT, the second the other way round.

    Args:
        bases: {name: classifier or causal model without a method}; they stay as they are.
        methods: {name: (the method, PEFT's config of it)}. For `PartialFineTuning` that is an
            `LNTuningConfig`, and the files are renamed on the way; for `QLoRA` PEFT gets the base
            in bitsandbytes' 4 bits, and what it saves is opened on the same weights dequantised.
        steps: {name of a method: steps of training after the random move}, 0 where it is absent.
            AdaLoRA follows its schedule in them.

    Returns a row for each pair: the largest difference of the logits on a padded batch each way,
    the smaller one of the two effects on the logits that the adapters have, and, instead of the
    numbers, why the course refuses the method on this base."""
    rows = []
    for method, (ours, config) in methods.items():
        for name, base in bases.items():
            row = {"method": method, "model": name}
            row |= dict.fromkeys(("ours → PEFT", "PEFT → ours", "effect", "refused"))
            rows.append(row)
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                torch.random.default_generator.manual_seed(0)
                try:
                    model = injected_copy(base, ours)
                except ValueError as error:
                    row["refused"] = str(error)
                    continue
                for message in _FALSE_ALARMS:
                    warnings.filterwarnings("ignore", message=message)
                row |= _exchanged(base, model, config, (steps or {}).get(method, 0))
    return rows


def _exchanged(base: nn.Module, ours: nn.Module, config, steps: int) -> dict[str, float]:
    from peft import PeftModel, get_peft_model

    injection = injection_of(ours)
    method = injection.method
    batch, config = padded_batch(base), copy.deepcopy(config)
    config.task_type = task_type(base)
    # With labels PEFT fails on an AdaLoRA that was loaded to be used: it looks for one that trains.
    text = {name: value for name, value in batch.items() if name != "labels"}

    @torch.no_grad()
    def logits(model: nn.Module) -> torch.Tensor:
        values = model.eval()(**text).logits
        # A prompt's own positions come first; a classifier has none.
        return values[:, -text["input_ids"].shape[1] :] if values.dim() == 3 else values

    perturb(ours, 0.1, None)
    _train(ours, batch, steps)
    theirs, plain = copy.deepcopy(base), base
    if isinstance(method, QLoRA):
        theirs = _in_four_bits(base, set(injection.wrappers))
        plain = dequantize(unload(copy.deepcopy(ours)))
    made = get_peft_model(copy.deepcopy(theirs), config)
    perturb(made, 0.1, None)
    _train(made, batch, steps)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, f"{folder}/ours")
        made.save_pretrained(f"{folder}/theirs")
        if isinstance(method, PartialFineTuning):
            _rename_norms(Path(folder), method, config, injection)
        opened = PeftModel.from_pretrained(theirs, f"{folder}/ours")
        returned = copy.deepcopy(plain)
        load_adapter(returned, f"{folder}/theirs")

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a - b).abs().max().item()

    before, sent, born_there = logits(plain), logits(ours), logits(made)
    return {
        "ours → PEFT": apart(sent, logits(opened)),
        "PEFT → ours": apart(born_there, logits(returned)),
        "effect": min(apart(before, sent), apart(before, born_there)),
    }


def _train(model: nn.Module, batch: dict, steps: int) -> None:
    """Train on one batch in eval mode, without dropout, so that the values change. PEFT leaves the
    allocator of its AdaLoRA to the caller."""
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, steps + 1):
        train_step(model.eval(), batch, optimizer, step, after=allocate)


def _in_four_bits(base: nn.Module, quantised: set[str]) -> nn.Module:
    """Return a copy of `base` whose layers bitsandbytes holds in NF4 with double quantisation."""
    others = [n for n, m in base.named_modules() if type(m) is nn.Linear and n not in quantised]
    settings = nf4(base.dtype, others)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model = type(base).from_pretrained(
            folder, quantization_config=settings, dtype=base.dtype, device_map={"": "cpu"}
        )
    keep_differentiable(model)
    # PEFT notes in the file which base it was.
    model.name_or_path = model.config._name_or_path = base.name_or_path
    return model.eval()


def _rename_norms(folder: Path, method: PartialFineTuning, config, injection: Injection) -> None:
    """Turn our file into PEFT's and PEFT's into ours. The numbers are the same, whole norms; PEFT
    puts the trained norm next to the first one, which shows in the names."""
    heads = tuple(f"base_model.model.{path}." for path in injection.in_full)
    tensors = load_file(folder / "ours" / WEIGHTS)
    for key in [key for key in tensors if not key.startswith(heads)]:
        path, _, leaf = key.rpartition(".")
        tensors[f"{path}.ln_tuning_layers.{leaf}"] = tensors.pop(key)
    save_file(tensors, folder / "ours" / WEIGHTS)
    config.save_pretrained(folder / "ours")

    tensors = load_file(folder / "theirs" / WEIGHTS)
    tensors = {key.replace(".ln_tuning_layers", ""): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "theirs" / WEIGHTS)
    entries = method.files.entries(method) | {"peft_type": method.files.kind}
    entries["modules_to_save"] = list(injection.in_full)
    (folder / "theirs" / CONFIG).write_text(json.dumps(entries), encoding="utf-8")
