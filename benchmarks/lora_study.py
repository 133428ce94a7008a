"""The LoRA study: rank, alpha, learning rate, target modules, head-only and full fine-tuning.

    python benchmarks/lora_study.py        # an hour and a half on one core

Trains minilm on movie sentiment once for each point and seed and adds a row to
data/results/lora_study.csv. Learning rates are to be chosen by the column `validation`.
"""

from catalogue import setting
from common import MEASURED, SEEDS, base_of, fill_table, load, measured

from peft_lessons import freeze, inject

KEY = ("method", "targets", "rank", "alpha", "lr", "steps", "seed")
NAMED = {"qv": "lora", "all-linear": "lora, all linear"}


def points() -> list[tuple]:
    """(method, targets, rank, alpha, lr, steps) of every point, what matters most first."""
    short = [  # as long as the lesson's own runs
        ("head", "", 0, 0, 1e-2, 50),
        ("lora", "qv", 8, 16, 3e-3, 50),
        ("full", "", 0, 0, 2e-4, 50),
    ]
    baselines = [("full", "", 0, 0, lr, 200) for lr in (1e-4, 2e-4, 4e-4)]
    baselines += [("head", "", 0, 0, lr, 200) for lr in (1e-2, 3e-2)]
    # All but the embeddings: what LoRA on the layers could reach at full rank.
    baselines += [("encoder", "", 0, 0, lr, 200) for lr in (1e-4, 2e-4)]
    rates = [("lora", "qv", rank, 16, lr, 200) for rank in (8, 1, 64) for lr in (1e-3, 3e-3, 1e-2)]
    # LoRA at the rate that full fine-tuning likes best.
    rates += [("lora", "qv", 8, 16, 2e-4, 200)]
    modules = [
        ("lora", "all-linear", rank, 16, lr, 200)
        for rank in (8, 4)
        for lr in (1e-3, 3e-3, 3e-4, 1e-2)
    ]
    ranks = [("lora", "qv", rank, 16, 3e-3, 200) for rank in (4, 16)]
    alphas = [("lora", "qv", 8, alpha, 3e-3, 200) for alpha in (4, 64)]
    # Whether another learning rate makes up for another alpha.
    alphas += [
        ("lora", "qv", 8, *both, 200) for both in ((64, 1e-3), (64, 3e-4), (4, 1e-2), (4, 1e-3))
    ]
    long = [  # one epoch and a half, at the best learning rates of 200 steps
        ("head", "", 0, 0, 1e-2, 600),
        ("full", "", 0, 0, 1e-4, 600),
        ("lora", "qv", 8, 16, 3e-3, 600),
        ("lora", "all-linear", 4, 16, 1e-3, 600),
        ("lora", "all-linear", 8, 16, 1e-3, 600),
    ]
    return [*short, *rates[:3], *baselines, *modules, *long, *rates[3:], *ranks, *alphas]


def run(method: str, targets: str, rank: int, alpha: int, lr: float, steps: int, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of("sentiment", seed)
    if method == "lora":
        inject(model, setting(NAMED[targets], "sentiment", rank=rank, alpha=alpha))
    elif method in ("head", "encoder"):
        freeze(model, modules_to_save=("encoder",) if method == "encoder" else ())
    return measured(model, load("sentiment"), lr, seed, steps=steps)


if __name__ == "__main__":
    every = [(*point, seed) for point in points() for seed in SEEDS]
    fill_table("lora_study", KEY, ("trainable", *MEASURED), every, run)
