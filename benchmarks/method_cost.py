"""What a training step costs: LoRA, DoRA and AdaLoRA of the course, and of PEFT.

    python benchmarks/method_cost.py           # five minutes on one core, else idle

One row for each method and choice of layers, measured in one process by turns, to
data/results/method_cost.csv: median seconds of a step and the most bytes it held beyond what lay
there before it. minilm, batches of 16 movie sentences, rank 8. AdaLoRA's allocator is part of its
step. `dora, with gradient` is DoRA of the course without the detached norm.
"""

import itertools
from copy import deepcopy
from unittest import mock

import torch
from common import Results, by_turns, stepper
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from peft_lessons import AdaLoRA, DoRA, DoRALayer, LoRA, inject, load_model, load_task, measure

ROUNDS, RANK, ALPHA = 25, 8, 16
TARGETS = {
    "qv": ("query", "value"),
    "all-linear": (
        *("query", "key", "value"),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ),
}
# Long, so that all of the steps measured here fall into the pruning, and none is the last.
SCHEDULE = {"tinit": 1, "tfinal": 10, "total_steps": 1000}
COLUMNS = ("targets", "method", "whose", "trainable", "seconds", "peak_bytes")


def ours(base, targets: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    methods = {
        "lora": LoRA(rank=RANK, alpha=ALPHA, targets=targets),
        "dora": DoRA(rank=RANK, alpha=ALPHA, targets=targets),
        "dora, with gradient": DoRA(rank=RANK, alpha=ALPHA, targets=targets),
        "adalora": AdaLoRA(RANK, RANK // 2, ALPHA, targets, delta=5, **SCHEDULE),
    }
    models = {name: deepcopy(base) for name in methods}
    for name, model in models.items():
        inject(model, methods[name])
    return models


def theirs(base, targets: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    common = {"task_type": "SEQ_CLS", "lora_alpha": ALPHA, "target_modules": list(targets)}
    schedule = {"tinit": 1, "tfinal": 10, "total_step": 1000, "deltaT": 5}
    configs = {
        "lora": LoraConfig(r=RANK, **common),
        "dora": LoraConfig(r=RANK, use_dora=True, **common),
        "adalora": AdaLoraConfig(init_r=RANK, target_r=RANK // 2, **schedule, **common),
    }
    return {name: get_peft_model(deepcopy(base), config) for name, config in configs.items()}


def with_gradient(layer: DoRALayer, weight: torch.Tensor) -> torch.Tensor:
    """The row norms of a DoRA layer, through which the gradient flows."""
    return torch.linalg.norm(layer.adapted(weight), dim=1)


def patched(step):
    def run():
        with mock.patch.object(DoRALayer, "row_norms", with_gradient):
            step()

    return run


def main() -> None:
    torch.set_num_threads(1)
    batches = list(itertools.islice(load_task("sentiment").stream(16, seed=0), ROUNDS))
    base, results = load_model("minilm", labels=2), Results("method_cost", COLUMNS, anew=True)
    for name, targets in TARGETS.items():
        models = {(method, "ours"): m for method, m in ours(base, targets).items()}
        models |= {(method, "PEFT"): m for method, m in theirs(base, targets).items()}
        steps = {way: stepper(model, batches) for way, model in models.items()}
        special = ("dora, with gradient", "ours")
        steps[special] = patched(steps[special])
        seconds = by_turns(steps, ROUNDS)
        for way, step in steps.items():
            row = {"targets": name, "method": way[0], "whose": way[1]}
            row |= {"trainable": measure.parameters(models[way]).trainable}
            row |= {"seconds": f"{seconds[way]:.4f}", "peak_bytes": measure.peak_bytes(step)}
            results.add(**row)
            print(*row.values())


if __name__ == "__main__":
    main()
