"""The AdaLoRA study: a budget of ranks spent by AdaLoRA, or evenly by LoRA.

    python benchmarks/adalora_study.py             # an hour on one core

Trains minilm on movie sentiment on all linear layers, and adds a row for each run to
data/results/adalora_study.csv, and one for each layer of an AdaLoRA run to adalora_ranks.csv. Every
setting is tried at each learning rate with one seed; the rate with the best validation accuracy is
run with two more. `adalora, sums` adds up the scores of a triplet's entries instead of averaging.
"""

from functools import partial
from unittest import mock

import torch
from common import Results, train_on, tune

from peft_lessons import AdaLoRA, LoRA, inject, load_model, load_task
from peft_lessons.engine import injection_of
from peft_lessons.methods import adalora

ALPHA = 16
LORA_RATES, ADALORA_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
SETTINGS = {  # (method, rank a layer at the start, and at the end on average, steps): rates
    ("adalora", 6, 4, 200): ADALORA_RATES,
    ("lora", 4, 4, 200): LORA_RATES,
    ("adalora", 2, 1, 200): ADALORA_RATES,
    ("lora", 1, 1, 200): LORA_RATES,
    ("adalora, sums", 6, 4, 200): (1e-2,),
    ("adalora", 6, 4, 600): (3e-3, 1e-2),  # against LoRA of 600 steps in lora_study.csv
}
NAMES = ("method", "initial", "rank", "steps")
COLUMNS = (
    *(*NAMES, "lr", "seed", "trainable", "kept"),
    *("validation", "test", "test_loss", "seconds_per_step"),
)
RANKS = (*NAMES, "lr", "seed", "layer", "module", "kept", "norm")


def by_sums(branch):
    """Scores of triplets from the sums of their entries' scores, where the method takes means."""
    a, e, b = (s * u for _, s, u in adalora.remembered(branch))
    return e.flatten() + (a.sum(dim=1) + b.sum(dim=0))


def schedule(steps: int) -> dict[str, int]:
    return {"tinit": steps // 10, "tfinal": 3 * steps // 10, "delta": steps // 40}


def run(task, ranks: Results, method: str, initial: int, rank: int, steps: int, lr, seed) -> dict:
    model = load_model("minilm", labels=2, seed=seed)
    torch.manual_seed(seed)
    if method == "lora":
        inject(model, LoRA(rank=rank, alpha=ALPHA, targets="all-linear"))
    else:
        plan = schedule(steps) | {"total_steps": steps}
        inject(model, AdaLoRA(initial, rank, ALPHA, "all-linear", **plan))
    scores = by_sums if method == "adalora, sums" else adalora.triplet_scores
    with mock.patch.object(adalora, "triplet_scores", scores):
        row = train_on(task, model, steps, lr, seed)
    kept = row["trainable"]
    if method != "lora":
        setting = dict(zip(NAMES, (method, initial, rank, steps), strict=True))
        for path, wrapper in injection_of(model).wrappers.items():
            ada, (out, width) = wrapper.ada, wrapper.base.weight.shape
            left = int(ada.lora_E.count_nonzero())
            kept -= (initial - left) * (out + width + 1)
            layer, module = path.partition(".layer.")[2].split(".", 1)
            place = {"lr": lr, "seed": seed, "layer": layer, "module": module}
            norm = torch.linalg.norm(adalora.delta_weight(ada)).item()
            ranks.add(**setting, **place, kept=left, norm=f"{norm:.4f}")
    return {"kept": kept} | row


def main() -> None:
    torch.set_num_threads(1)
    results, ranks = Results("adalora_study", COLUMNS), Results("adalora_ranks", RANKS)
    tune(results, NAMES, SETTINGS, partial(run, load_task("sentiment"), ranks))


if __name__ == "__main__":
    main()
