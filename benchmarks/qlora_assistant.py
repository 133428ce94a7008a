"""What four bits save on the bundled assistant, part by part, and what a training step adds.

    python benchmarks/qlora_assistant.py       # two minutes on one core

The assistant in bfloat16 and in NF4 with double quantisation, each with PEFT's LoRA of rank 8 on
all linear layers, whose factors are in float32. `prepared` is the 4-bit model after
`prepare_model_for_kbit_training`, which turns embeddings and norms to float32. A step takes 4 texts
of 64 tokens, with and without gradient checkpointing. One row for each to
data/results/qlora_assistant.csv: bytes of the base by component, of the adapter, its gradients and
AdamW's states, and the additional peak memory of a step.
"""

import gc

import torch
from common import fill_table
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from peft_lessons import load_model, measure

TEXTS, TOKENS, RANK = 4, 64, 8
BASES = ("bfloat16", "NF4", "NF4, prepared")
PARTS = ("embedding", "linear", "norms", "adapter")
COLUMNS = (*PARTS, "gradients", "optimizer", "peak", "trainable")
KEY = ("base", "checkpointing")


def loaded(base: str) -> nn.Module:
    """Return the assistant in bfloat16, or in 4 bits with products in bfloat16."""
    model = load_model("smollm2", dtype=torch.bfloat16, four_bit=base != "bfloat16")
    if base == "NF4, prepared":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def bytes_of_parts(model: nn.Module) -> dict[str, int]:
    """Count the bytes of the tensors by what holds them; the head shares the embedding."""
    parts = dict.fromkeys(PARTS, 0)
    leaves = [(p, m) for p, m in model.named_modules() if next(m.children(), None) is None]
    for path, module in leaves:
        if "lora_" in path:
            part = "adapter"
        elif isinstance(module, nn.Embedding):
            part = "embedding"
        else:
            part = "linear" if isinstance(module, nn.Linear) else "norms"
        if not path.endswith("lm_head"):
            parts[part] += measure.held_bytes(module).weights
    return parts


def run(base: str, checkpointing: bool) -> dict:
    """Return the measured columns of a row."""
    gc.collect()  # what the row before left
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(loaded(base), config)
    model.config.use_cache = False  # of no use in training
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (TEXTS, TOKENS), generator=torch.manual_seed(0))
    cost = measure.training_step(model, {"input_ids": ids, "labels": ids})
    parts = bytes_of_parts(model)
    if sum(parts.values()) != cost.held.weights:
        raise AssertionError(f"{parts} do not add up to {cost.held.weights}")
    held = {"gradients": cost.held.gradients, "optimizer": cost.held.optimizer}
    return parts | held | {"peak": cost.peak, "trainable": cost.trainable}


if __name__ == "__main__":
    points = [(base, checkpointing) for base in BASES for checkpointing in (False, True)]
    fill_table("qlora_assistant", KEY, COLUMNS, points, run)
