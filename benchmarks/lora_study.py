"""The LoRA study: rank, alpha, learning rate, target modules, head-only and full fine-tuning.

    python benchmarks/lora_study.py        # an hour and a half on one core

Trains minilm on movie sentiment once for each point and seed and adds a row to
data/results/lora_study.csv. Learning rates are to be chosen by the column `validation`.
"""

from catalogue import named, setting
from common import MEASURED, SEEDS, base_of, fill_table, load, measured

from peft_lessons import freeze, inject

KEY = ("method", "targets", "rank", "alpha", "lr", "steps", "seed")
HEAD, FULL = ("head", "", 0, 0), ("full", "", 0, 0)
# All but the embeddings: what LoRA on the layers could reach at full rank.
ENCODER = ("encoder", "", 0, 0)


def lora(rank: int = 8, targets: str = "qv", alpha: int = 16) -> tuple:
    """Return how the rows name a LoRA."""
    return ("lora", targets, rank, alpha)


SETTINGS = {  # steps: {(method, targets, rank, alpha): rates}
    50: {HEAD: (1e-2,), lora(): (3e-3,), FULL: (2e-4,)},  # as long as the lesson's own runs
    200: {
        lora(): (1e-3, 3e-3, 1e-2, 2e-4),  # the last is the one that full fine-tuning likes best
        FULL: (1e-4, 2e-4, 4e-4),
        HEAD: (1e-2, 3e-2),
        ENCODER: (1e-4, 2e-4),
        **{lora(rank, "all-linear"): (1e-3, 3e-3, 3e-4, 1e-2) for rank in (8, 4)},
        **{lora(rank): (1e-3, 3e-3, 1e-2) for rank in (1, 64)},
        **{lora(rank): (3e-3,) for rank in (4, 16)},
        # Whether another learning rate makes up for another alpha.
        lora(alpha=4): (3e-3, 1e-2, 1e-3),
        lora(alpha=64): (3e-3, 1e-3, 3e-4),
    },
    600: {  # one epoch and a half, at the best learning rates of 200 steps
        **{HEAD: (1e-2,), FULL: (1e-4,), lora(): (3e-3,)},
        **{lora(rank, "all-linear"): (1e-3,) for rank in (4, 8)},
    },
}
POINTS = [
    (*way, lr, steps)
    for steps, settings in SETTINGS.items()
    for way, rates in settings.items()
    for lr in rates
]


def run(method: str, targets: str, rank: int, alpha: int, lr: float, steps: int, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of("sentiment", seed)
    if method == "lora":
        inject(model, setting(named("lora", targets), "sentiment", rank=rank, alpha=alpha))
    elif method in ("head", "encoder"):
        freeze(model, modules_to_save=("encoder",) if method == "encoder" else ())
    return measured(model, load("sentiment"), lr, seed, steps=steps)


if __name__ == "__main__":
    every = [(*point, seed) for point in POINTS for seed in SEEDS]
    fill_table("lora_study", KEY, ("trainable", *MEASURED), every, run)
