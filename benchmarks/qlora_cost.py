"""Measure what quantising, dequantising and a QLoRA step cost: the course's code and bitsandbytes'.

    python benchmarks/qlora_cost.py             # two minutes on one core, else idle

The rows go to data/results/qlora_cost.csv: median seconds, measured in one process by turns.

data/results/qlora_step.csv says where the seconds of a step go: a step of LoRA, of QLoRA, and of
QLoRA with every W′ kept, so that nothing is restored; then restoring all weights once, at a stretch
and each after other work, when the caches hold other numbers.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from bitsandbytes import functional as bnb
from common import fill_table, stepper
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lessons import LoRA, QLoRA, inject, load_model, load_task, measure
from peft_lessons.engine import Method
from peft_lessons.methods.qlora import NF4Linear, dequantize_nf4, quantize_nf4

COLUMNS = ("seconds", "their_seconds")
SHAPES = ((512, 192), (1536, 384), (4096, 4096))
STEP = "a step of 8 × 128 tokens"
ROUNDS = 31


class Kept(NF4Linear):
    """Restore the weight once and keep it."""

    @property
    def weight(self) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().weight
        return self.kept


def ours(method: Method, layers: type = NF4Linear) -> nn.Module:
    """Return tinylm with a method, its 4-bit layers of another class."""
    model = load_model("tinylm")
    inject(model, method)
    for layer in in_4_bits(model):
        layer.__class__ = layers
    return model


def in_4_bits(model: nn.Module) -> list[NF4Linear]:
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def steps(*models: nn.Module) -> tuple[Callable[[], float], ...]:
    """Return a step of each model on the same batches."""
    batches = list(itertools.islice(load_task("austen").stream(8, seed=0), 8))
    return tuple(stepper(model, batches) for model in models)


def after_other_work(layers: list[NF4Linear]) -> float:
    """Return the median seconds of restoring all weights, each after a pass through memory."""
    memory, rounds = torch.zeros(2**24), []  # 64 MiB
    for _ in range(ROUNDS):
        rounds.append(0.0)
        for layer in layers:
            memory += 1
            started = time.process_time()
            layer.weight  # noqa: B018
            rounds[-1] += time.process_time() - started
    return statistics.median(rounds)


def functions(what: str, shape: tuple[int, int] | None):
    """Return the course's function and that of bitsandbytes."""
    if shape is None:  # LoRA of rank 8 on every layer, base in NF4
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        theirs = get_peft_model(load_model("tinylm", four_bit=True), config)
        return steps(ours(QLoRA(rank=8, alpha=16)), theirs)
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
    """Time both by turns."""
    both = dict(zip(COLUMNS, functions(what, POINTS[what]), strict=True))
    return {name: f"{s:.3g}" for name, s in measure.by_turns(both, ROUNDS).items()}


def parts_of_a_step(base: str) -> list[dict]:
    """Time steps with and without what four bits add to them."""
    qlora = QLoRA(rank=8, alpha=16)
    models = {
        "LoRA": ours(LoRA(rank=8, alpha=16)),
        "QLoRA": ours(qlora),
        "QLoRA, W′ kept": ours(qlora, Kept),
    }
    timed = dict(zip(models, steps(*models.values()), strict=True))
    layers = in_4_bits(models["QLoRA"])
    once = "all weights restored once"
    timed[once] = lambda: [layer.weight for layer in layers]
    seconds = measure.by_turns(timed, ROUNDS, clock=time.process_time)
    seconds[f"{once}, after other work"] = after_other_work(layers)
    return [{"what": what, "seconds": f"{s:.4g}"} for what, s in seconds.items()]


POINTS = {f"{verb} {m} × {n}": (m, n) for m, n in SHAPES for verb in ("quantise", "dequantise")}
POINTS |= {STEP: None}

if __name__ == "__main__":
    fill_table("qlora_cost", ("what",), COLUMNS, [(what,) for what in POINTS], run, anew=True)
    points = [("tinylm",)]
    fill_table("qlora_step", ("base",), ("what", "seconds"), points, parts_of_a_step, anew=True)
