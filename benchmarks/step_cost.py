"""What a training step costs: full fine-tuning, head only, LoRA of the course and of PEFT.

    python benchmarks/step_cost.py             # two minutes on one core, else idle

One row for each way of training minilm, measured in one process by turns, to
data/results/step_cost.csv: median seconds of a step and the most bytes it held beyond what lay
there before it. Batches of 16 movie sentences.
"""

import itertools
from copy import deepcopy

import torch
from common import Results, by_turns, stepper
from peft import LoraConfig, get_peft_model

from peft_lessons import LoRA, freeze, inject, load_model, load_task, measure

ROUNDS = 25


def ways(base) -> dict[str, torch.nn.Module]:
    models = {name: deepcopy(base) for name in ("full", "head", "lora")}
    freeze(models["head"])
    inject(models["lora"], LoRA(rank=8, alpha=16, targets=("query", "value")))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return models | {"lora, PEFT": get_peft_model(deepcopy(base), config)}


def main() -> None:
    torch.set_num_threads(1)
    batches = list(itertools.islice(load_task("sentiment").stream(16, seed=0), ROUNDS))
    models = ways(load_model("minilm", labels=2))
    steps = {name: stepper(model, batches) for name, model in models.items()}
    seconds = by_turns(steps, ROUNDS)
    peaks = {name: measure.peak_bytes(step) for name, step in steps.items()}
    results = Results("step_cost", ("method", "trainable", "seconds", "peak_bytes"), anew=True)
    for name, model in models.items():
        row = {"method": name, "trainable": measure.parameters(model).trainable}
        row |= {"seconds": f"{seconds[name]:.4f}", "peak_bytes": peaks[name]}
        results.add(**row)
        print(*row.values())


if __name__ == "__main__":
    main()
