"""Ways to merge QLoRA's adapter: into the base it was trained on, the float base, or 4 bits again.

    python benchmarks/qlora_bases.py       # twenty minutes on one core

Trains QLoRA on tinylm and Jane Austen's novels, as `qlora_study.py` does. Then it adds each trained
update to other weights, without training again: to the weight in NF4 with double quantisation, to
the weight in float32, and to the first with the sum rounded to NF4. Adds a row for each to
data/results/qlora_bases.csv. `difference` is the test loss minus that of the model as it was
trained, in nats per token, and `standard_error` that of the mean paired difference over the test
blocks. `changed` is the share of 4-bit codes that differ from those of the base.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from catalogue import setting
from common import SEEDS, STEPS, base_of, fill_table, load, plain

from peft_lessons import inject, load_model
from peft_lessons.engine import injection_of
from peft_lessons.methods.qlora import NF4Linear

RATES = (3e-2, 3e-3)  # the best one of the study, and one ten times lower: updates are smaller
KEY = ("task", "method", "lr", "seed")
COLUMNS = ("validation", "test", "difference", "standard_error", "changed")


def nf4(weight: torch.Tensor) -> NF4Linear:
    """Return a weight in NF4 with double quantisation."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data.copy_(weight)
    return NF4Linear(linear)


def codes(layer: NF4Linear) -> torch.Tensor:
    return torch.stack([layer.packed >> 4, layer.packed & 15], dim=-1)


# The weight that a model computes with, from a weight W of the base and the trained update ΔW. The
# first is the model as it was trained: its branch beside the 4-bit weight is the same function.
BASES: dict[str, Callable] = {
    "": lambda W, update: nf4(W).weight + update,
    ", on the float base": lambda W, update: W + update,
    ", merged and rounded": lambda W, update: nf4(nf4(W).weight + update).weight,
}


def losses(model: torch.nn.Module, task, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss in nats and the number of predicted tokens of each block."""
    sums, tokens = [], []
    with torch.no_grad():
        for batch in task.batches(split, 16):
            logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            sums.append(each.view_as(labels).sum(dim=1))  # 0 where a label is ignored
            tokens.append((labels != -100).sum(dim=1))
    return torch.cat(sums).double(), torch.cat(tokens)


def compared(test: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> dict[str, str]:
    """Return the difference of two losses per token, and its standard error over the blocks."""
    gaps, n = test - reference, tokens.sum()
    mean = gaps.sum() / n
    error = (gaps - mean * tokens).square().sum().sqrt() / n
    return {"difference": f"{mean:.6f}", "standard_error": f"{error:.6f}"}


def changed(weights: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> float:
    """Return the share of codes, in per cent, that weights have other than the base."""
    pairs = [(codes(nf4(weight)), codes(nf4(original[p]))) for p, weight in weights.items()]
    differ = sum(int((new != old).sum()) for new, old in pairs)
    return 100 * differ / sum(old.numel() for _, old in pairs)


def run(name: str, method: str, lr: float, seed: int) -> list[dict]:
    """Train one adapter and return a row of it on every base."""
    trained, task = base_of(name, seed), load(name)
    inject(trained, setting(method, name))
    plain(trained, task, STEPS[name], lr, seed)
    updates = {p: w.lora.delta_weight().detach() for p, w in injection_of(trained).wrappers.items()}
    base = load_model("tinylm")
    original = {p: base.get_submodule(p).weight.detach().clone() for p in updates}
    rows, reference = [], None
    for suffix, make in BASES.items():
        model = copy.deepcopy(base)
        with torch.no_grad():
            weights = {p: make(original[p], update) for p, update in updates.items()}
            for path, weight in weights.items():
                model.get_submodule(path).weight.copy_(weight)
        valid, predicted = losses(model, task, "validation")
        test, tokens = losses(model, task, "test")
        reference = test if reference is None else reference
        row = compared(test, reference, tokens) | {
            "method": method + suffix,
            "validation": f"{(valid.sum() / predicted.sum()).exp():.4f}",
            "test": f"{(test.sum() / tokens.sum()).exp():.4f}",
            "changed": f"{changed(weights, original):.2f}" if "rounded" in suffix else "nan",
        }
        rows.append(row)
    return rows


if __name__ == "__main__":
    points = [("austen", "qlora", lr, seed) for seed in SEEDS for lr in RATES]
    fill_table("qlora_bases", KEY, COLUMNS, points, run)
