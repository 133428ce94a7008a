"""Measure what quantising, dequantising and a QLoRA step cost: the course's code and bitsandbytes'.

    python benchmarks/qlora_cost.py             # a minute on one core, else idle

The rows go to data/results/qlora_cost.csv: median seconds, measured in one process by turns, and
the additional peak memory in bytes.
"""

import itertools
from copy import deepcopy

import torch
from bitsandbytes import functional as bnb
from common import Results, stepper
from peft import LoraConfig, get_peft_model

from peft_lessons import QLoRA, inject, load_model, load_task, measure
from peft_lessons.methods.qlora import dequantize_nf4, quantize_nf4

COLUMNS = ("what", "seconds", "their_seconds", "peak_bytes", "their_peak_bytes")
ROUNDS = 31


def steps(base):
    """A training step of each on the same batches: LoRA of rank 8 on every layer, base in NF4."""
    ours = deepcopy(base)
    inject(ours, QLoRA(rank=8, alpha=16))
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    theirs = get_peft_model(load_model("tinylm", four_bit=True), config)
    batches = list(itertools.islice(load_task("austen").stream(8, seed=0), 8))
    return tuple(stepper(model, batches) for model in (ours, theirs))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = Results("qlora_cost", COLUMNS, anew=True)
    pairs = {}
    for shape in ((512, 192), (1536, 384), (4096, 4096)):
        weight = torch.randn(shape)
        packed, absmax = quantize_nf4(weight)
        stored, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        size = f"{shape[0]} × {shape[1]}"
        pairs[f"quantise {size}"] = (
            lambda w=weight: quantize_nf4(w),
            lambda w=weight: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"),
        )
        pairs[f"dequantise {size}"] = (
            lambda p=packed, a=absmax, s=shape: dequantize_nf4(p, a, s),
            lambda p=stored, s=state: bnb.dequantize_4bit(p, s),
        )
    pairs["a step of 8 × 128 tokens"] = steps(load_model("tinylm"))
    for what, (ours, theirs) in pairs.items():
        seconds = measure.by_turns({"ours": ours, "theirs": theirs}, ROUNDS)
        peaks = [measure.peak_bytes(function) for function in (ours, theirs)]
        results.add(
            what=what,
            seconds=f"{seconds['ours']:.3g}",
            their_seconds=f"{seconds['theirs']:.3g}",
            peak_bytes=peaks[0],
            their_peak_bytes=peaks[1],
        )
        ratio = seconds["ours"] / seconds["theirs"]
        print(f"{what}: time {ratio:.2f}, peak {peaks[0] / max(1, peaks[1]):.2f}", flush=True)


if __name__ == "__main__":
    main()
