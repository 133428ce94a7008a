"""Lesson 13: the memory of a training step over the length of the text, measured on tinylm."""

import torch

from classroom.questions import Run
from peft_lessons import LoRA, PartialFineTuning, load_model, measure
from peft_lessons.engine import injected_copy
from peft_lessons.studies import plots

LENGTHS = (64, 128, 256, 512, 1024)


def run() -> Run:
    """Measure what a step takes beyond the frozen base: its peak, and Adam's moments."""
    base = load_model("tinylm")
    lora = injected_copy(base, LoRA(rank=8, alpha=16))
    lean = injected_copy(base, LoRA(rank=8, alpha=16))
    lean.gradient_checkpointing_enable()
    models = {"A": lean, "B": base, "C": injected_copy(base, PartialFineTuning(last=2)), "D": lora}
    memory = {}
    for name, model in models.items():
        memory[name] = []
        for length in LENGTHS:
            ids = torch.arange(length)[None] % 4096
            cost = measure.training_step(model, {"input_ids": ids, "labels": ids}, repeats=1)
            memory[name].append((cost.peak + cost.held.optimizer) / 2**20)
    fig, ax = plots.figure(size=(6.4, 3.0))
    for (name, line), mark in zip(memory.items(), "os^D", strict=True):
        ax.plot(LENGTHS, line, mark + "-", markersize=4, label=name)
    ax.set(xlabel="tokens of the text", ylabel="MiB", xlim=(0, None), ylim=(0, None))
    ax.legend()
    apart = [full - lora for full, lora in zip(memory["B"], memory["D"], strict=True)]
    return Run(fig, {"tokens": LENGTHS, "MiB": memory, "B minus D": apart})
