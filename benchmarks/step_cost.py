"""What a training step costs: full fine-tuning, head only, LoRA of the course and of PEFT.

    python benchmarks/step_cost.py             # two minutes on one core, else idle

One row for each way of training minilm, measured in one process by turns, to
data/results/step_cost.csv: median seconds of a step and the most bytes it held beyond what lay
there before it. Batches of 16 movie sentences.
"""

import csv
import datetime
import itertools
import platform
import statistics
import time
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from peft_lessons import LoRA, freeze, inject, load_model, load_task, measure

RESULTS = Path(__file__).parent.parent / "data" / "results" / "step_cost.csv"
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
    steps, seconds, peaks = {}, {name: [] for name in models}, {}
    for name, model in models.items():
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
        )

        def step(batch, model=model, optimizer=optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
        step(batches[0])
        peaks[name] = measure.peak_bytes(lambda step=step: step(batches[0]))
    # By turns, so that a busy moment of the machine meets all of them alike.
    for batch in batches:
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - started)
    with RESULTS.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(
            ("method", "trainable", "seconds", "peak_bytes", "torch", "machine", "date")
        )
        for name, model in models.items():
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row = (name, trainable, f"{statistics.median(seconds[name]):.4f}", peaks[name])
            machine = f"{platform.machine()} CPU, 1 thread"
            today = datetime.date.today().isoformat()
            writer.writerow((*row, torch.__version__.split("+")[0], machine, today))
            print(*row)


if __name__ == "__main__":
    main()
