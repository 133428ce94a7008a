"""Measure what quantising, dequantising and a QLoRA step cost: the course's code and bitsandbytes'.

    python benchmarks/qlora_cost.py             # a minute on one core, else idle

The rows go to data/results/qlora_cost.csv: median seconds, measured in one process by turns, and
the additional peak memory in bytes.
"""

import itertools

import torch
from bitsandbytes import functional as bnb
from common import fill_table, stepper
from peft import LoraConfig, get_peft_model

from peft_lessons import QLoRA, inject, load_model, load_task, measure
from peft_lessons.methods.qlora import dequantize_nf4, quantize_nf4

COLUMNS = ("seconds", "their_seconds", "peak_bytes", "their_peak_bytes")
SHAPES = ((512, 192), (1536, 384), (4096, 4096))
STEP = "a step of 8 × 128 tokens"
ROUNDS = 31


def steps():
    """Return a step of each on the same batches: LoRA of rank 8 on every layer, base in NF4."""
    ours = load_model("tinylm")
    inject(ours, QLoRA(rank=8, alpha=16))
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    theirs = get_peft_model(load_model("tinylm", four_bit=True), config)
    batches = list(itertools.islice(load_task("austen").stream(8, seed=0), 8))
    return tuple(stepper(model, batches) for model in (ours, theirs))


def functions(what: str, shape: tuple[int, int] | None):
    """Return the course's function and that of bitsandbytes."""
    if shape is None:
        return steps()
    weight = torch.randn(shape, generator=torch.manual_seed(0))
    if what.startswith("quantise"):
        return (
            lambda: quantize_nf4(weight),
            lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        )
    packed, absmax = quantize_nf4(weight)
    stored, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda: dequantize_nf4(packed, absmax, shape), lambda: bnb.dequantize_4bit(stored, state)


def run(what: str) -> dict:
    """Time both by turns, and measure the additional peak memory of each."""
    ours, theirs = functions(what, POINTS[what])
    seconds = measure.by_turns({"ours": ours, "theirs": theirs}, ROUNDS)
    peaks = [measure.peak_bytes(function) for function in (ours, theirs)]
    return {
        "seconds": f"{seconds['ours']:.3g}",
        "their_seconds": f"{seconds['theirs']:.3g}",
        "peak_bytes": peaks[0],
        "their_peak_bytes": peaks[1],
    }


POINTS = {f"{verb} {m} × {n}": (m, n) for m, n in SHAPES for verb in ("quantise", "dequantise")}
POINTS |= {STEP: None}

if __name__ == "__main__":
    fill_table("qlora_cost", ("what",), COLUMNS, [(what,) for what in POINTS], run, anew=True)
