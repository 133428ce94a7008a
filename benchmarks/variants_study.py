"""The study of lesson 14: variants of LoRA, ranks, and what is left of the base afterwards.

    python benchmarks/variants_study.py    # two hours on one core

Trains tinylm on Jane Austen's novels, all its linear layers (its embedding too in full
fine-tuning), and adds a row for each run to data/results/variants_study.csv. alpha is 16
throughout; `rank` is the block size of OFT.

`validation`, `test` and `memory` are perplexities; `memory` that of definitions, on which tinylm
was pretrained: what is left of what the base could do.

`intruders` counts over all linear layers those of the K strongest left singular vectors of the
trained weight whose cosine with every left singular vector of the base's weight is below EPSILON
(Shuttleworth et al. 2024, algorithm 1). `nearest` is the mean, over all layers and the K vectors,
of the largest cosine: 1 if all are where they were.
"""

import torch
from catalogue import setting
from choosing_study import definitions, memory
from common import MEASURED, RUN, at_best, base_of, fill_table, load, measured

from peft_lessons import LoftQ, inject, merge
from peft_lessons.engine import find_targets, injection_of
from peft_lessons.methods.qlora import dequantize

TASK = "austen"
K, EPSILON = 10, 0.5
KEY = ("task", "method", "rank", *RUN)
MIDDLE = (1e-2, 3e-2, 1e-1)  # around the best rate of LoRA of rank 8
LOWER = (1e-3, 3e-3, 1e-2)
WIDER = (*LOWER, 3e-2)  # where the best of the three lay at their edge
SETTINGS = {  # (method, rank): rates, what matters most first; at a rate of 0 nothing trains
    ("none", 0): (0.0,),
    ("lora", 8): MIDDLE,
    ("full", 0): (1e-3, 3e-3),  # of the four that lesson 03's study tried
    ("lora", 1): MIDDLE,
    ("lora", 64): MIDDLE,
    ("rslora", 64): WIDER,
    ("lora+", 8): LOWER,
    ("pissa", 8): WIDER,
    ("lora", 16): MIDDLE,
    ("oft", 32): LOWER,
    ("vera", 64): (1e-1, 3e-1, 1.0),
    ("loftq", 8): (3e-3, 1e-2, 3e-2),
    ("qpissa", 8): WIDER,
}
COLUMNS = (
    *("steps", "trainable", *MEASURED[:-1], "memory"),
    *("intruders", "nearest", "seconds_per_step"),
)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the weights of all linear layers, {path: (out, in)}."""
    layers = find_targets(model, "all-linear", (torch.nn.Linear,))
    return {path: layer.weight.detach().clone() for path, layer in layers.items()}


@torch.no_grad()
def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return (K,): the largest cosine, without its sign, of each of the strongest left singular
    vectors of `after`, (out, in), with one of `before`."""
    old, new = (torch.linalg.svd(w.double(), full_matrices=False).U for w in (before, after))
    return (old.T @ new[:, :K]).abs().amax(dim=0)


def shifted(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> tuple[int, float]:
    """Return (intruders, nearest) of a trained model beside the weights of its base, {path of a
    layer: (out, in)}. A method in the model is merged."""
    if injection := injection_of(model):
        if isinstance(injection.method, LoftQ):
            dequantize(model)
        merge(model)
    nearest = torch.stack([cosines(w, model.get_submodule(p).weight) for p, w in weights.items()])
    return int((nearest < EPSILON).sum()), nearest.mean().item()


def run(name: str, method: str, rank: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of(name, seed)
    weights = weights_of(model)
    if method == "oft":
        inject(model, setting(method, name, block_size=rank))
    elif rank:
        named = {"lora": "lora, all linear"}.get(method, method)
        inject(model, setting(named, name, rank=rank))
    row = measured(model, load(name), lr, seed)
    row["memory"] = f"{memory(model, definitions()):.5f}"
    intruders, nearest = shifted(weights, model)
    return row | {"intruders": intruders, "nearest": f"{nearest:.5f}"}


if __name__ == "__main__":
    points = at_best({(TASK, *setting): rates for setting, rates in SETTINGS.items()})
    fill_table("variants_study", KEY, COLUMNS, points, run)
