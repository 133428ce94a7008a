"""Solutions of lesson 12."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
)


def config_for(method: str, model: nn.Module) -> PeftConfig:
    """Return PEFT's config of a method by its name, for a causal model or a classifier."""
    second = r".*\.(down_proj|layer\.\d+\.output\.dense)"    # not attention.output.dense
    scaled = rf".*\.(k_proj|v_proj|key|value)|{second}"
    linear = {"target_modules": "all-linear", "lora_alpha": 16}
    known = {
        "lora": (LoraConfig, {"r": 8, **linear}),
        "dora": (LoraConfig, {"r": 8, "use_dora": True, **linear}),
        "adalora": (AdaLoraConfig, {"init_r": 12, "target_r": 8, "total_step": 200, **linear}),
        "ia3": (IA3Config, {"target_modules": scaled, "feedforward_modules": second}),
        "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 8}),
        "prompt": (PromptTuningConfig, {"num_virtual_tokens": 8}),
    }
    config, settings = known[method]
    return config(task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS", **settings)


def mixed_batch(
    model: PeftModel, inputs: dict[str, torch.Tensor], adapters: list[str | None]
) -> torch.Tensor:
    """Return the logits of a batch in which each row has its own adapter, or none."""
    active = model.active_adapter
    model.eval()
    logits = {}
    for name in set(adapters):
        rows = [i for i, adapter in enumerate(adapters) if adapter == name]
        part = {key: value[rows] for key, value in inputs.items()}
        with torch.no_grad():
            if name is None:
                with model.disable_adapter():
                    answers = model(**part).logits
            else:
                model.set_adapter(name)
                answers = model(**part).logits
        logits |= dict(zip(rows, answers, strict=True))
    model.set_adapter(active)
    return torch.stack([logits[i] for i in range(len(adapters))])


def resume(
    base: nn.Module, path: str, data: Iterable[dict[str, torch.Tensor]], lr: float = 1e-2
) -> PeftModel:
    """Continue the training of the adapter in `path`, and save it there again."""
    model = PeftModel.from_pretrained(base, path, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return model
