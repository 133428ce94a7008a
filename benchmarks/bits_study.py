"""In how few bits? Perplexity of a rounded base, with LoRA trained before or after the rounding.

    python benchmarks/bits_study.py       # an hour on one core

Rounds all linear layers of a decoder to the nearest level, in blocks of 64 with the absmax in
float32, and measures it on Jane Austen's novels. tinylm is trained as in `qlora_study.py`: LoRA on
the float base, which is then rounded (`trained` is "before"), or on the rounded base ("after"). The
same seed gives the same start and the same batches. SmolLM2 is rounded only ("not"), and measured
on fewer blocks. One row for each to data/results/bits_study.csv: `error` is the relative error of
the weights in per cent, and `losses` are the nats per token in each of 40 consecutive stretches of
the test blocks, so that two rows can be paired. A run that was not chosen for a learning rate has
no `validation`.
"""

from functools import cache

import torch
from catalogue import setting
from common import STEPS, base_of, fill_table, load, plain
from qlora_bases import losses
from qlora_levels import relative, rounded
from torch import nn

from peft_lessons import inject, load_model, load_task, load_tokenizer
from peft_lessons.checks.qlora import normal_float_levels

NORMAL, EVEN, SIGNED, FLOAT = "normal float", "evenly spaced", "evenly spaced, signed", "float"
ROUNDED = [  # (levels, bits), those that matter most first
    *((levels, bits) for bits in (3, 4) for levels in (NORMAL, EVEN, SIGNED)),
    *((levels, bits) for bits in (5, 8) for levels in (NORMAL, EVEN)),
    *((levels, 2) for levels in (NORMAL, EVEN, SIGNED)),
]
RATE, OTHER_RATES = 3e-2, (1e-2, 1e-1)  # the best of the study, and its neighbours there
STRETCHES = 40
KEY = ("task", "model", "levels", "bits", "trained", "lr", "seed")
COLUMNS = ("error", "validation", "test", "test_loss", "losses")


def levels_of(levels: str, bits: int) -> torch.Tensor:
    """Return the levels, ascending. Those of NormalFloat are its exercise's answer."""
    half = 2 ** (bits - 1)
    if levels == NORMAL:
        return normal_float_levels.reference(bits)
    if levels == EVEN:  # both sides alike: one code is not used
        return torch.arange(1 - half, half) / (half - 1)
    return torch.arange(1 - half, half + 1) / half  # all codes: the largest weight is always +1


class Rounding:
    """Round the linear layers of a decoder but its head, each time from the float weights."""

    def __init__(self, model: nn.Module):
        self.linears = [m for m in model.model.modules() if type(m) is nn.Linear]
        self.weights = [linear.weight.detach().clone() for linear in self.linears]

    @torch.no_grad()
    def to(self, levels: str, bits: int) -> str:
        """Round, and return the relative error in per cent."""
        table, gaps = levels_of(levels, bits), []
        for linear, weight in zip(self.linears, self.weights, strict=True):
            linear.weight.copy_(rounded(weight, table, signed=levels == SIGNED)[0])
            gaps.append(linear.weight - weight)
        return relative(gaps, self.weights)


@cache
def task_of(model: str):
    """Return Austen in the tokens of a model."""
    if model == "tinylm":
        return load("austen", 100)  # blocks enough to choose a learning rate by
    return load_task("austen", load_tokenizer(model)).limit(test=STRETCHES)


def tested(model: nn.Module, name: str) -> dict[str, str]:
    """Return what a row says of the test split."""
    sums, tokens = losses(model, task_of(name), "test")
    mean = sums.sum() / tokens.sum()
    parts = zip(sums.tensor_split(STRETCHES), tokens.tensor_split(STRETCHES), strict=True)
    each = " ".join(f"{part.sum() / n.sum():.4f}" for part, n in parts)
    return {"test": f"{mean.exp():.4f}", "test_loss": f"{mean:.6f}", "losses": each}


def after_all_roundings(model: nn.Module, name: str, sets: list[tuple[str, int]]) -> list[dict]:
    """Return a row for each set of levels, put into the base of a model."""
    rounding, rows = Rounding(model), []
    for levels, bits in sets:
        error = rounding.to(levels, bits)
        named = {"levels": levels, "bits": bits, "error": error, "validation": "nan"}
        rows.append(named | tested(model, name))
    return rows


def run(
    task: str, name: str, levels: str, bits: int, trained: str, lr: float, seed: int
) -> list[dict]:
    """Return the row of a point, and those of all roundings of its base if that is in float32."""
    nothing = {"error": "0", "validation": "nan"}
    if name != "tinylm":
        model, sets = load_model(name), [s for s in ROUNDED if s[1] > 2]
        return [nothing | tested(model, name), *after_all_roundings(model, name, sets)]
    model, error = base_of(task, seed), "0"
    if trained == "after":
        error = Rounding(model).to(levels, bits)
    inject(model, setting("lora, all linear", task))
    plain(model, task_of(name), STEPS[task], lr, seed)
    first = nothing | {"error": error} | tested(model, name)
    if lr:
        sums, tokens = losses(model, task_of(name), "validation")
        first["validation"] = f"{(sums.sum() / tokens.sum()).exp():.4f}"
    if trained == "after":
        return [first]
    sets = [s for s in ROUNDED if s[1] in (3, 4) or not seed]
    return [first, *after_all_roundings(model, name, sets)]


def points() -> list[tuple]:
    """Return all points, those that matter most first."""

    def after(bits: tuple[int, ...], seed: int, rates: tuple[float, ...] = (RATE,)) -> list[tuple]:
        return [(*s, "after", lr, seed) for s in ROUNDED if s[1] in bits for lr in rates]

    def paired(seed: int) -> list[tuple]:
        return [(FLOAT, 32, "before", RATE, seed), *after((3, 4), seed)]

    untrained = (FLOAT, 32, "not", 0.0, 0)
    tried = after((3,), 0, OTHER_RATES)[: len(OTHER_RATES)]  # of the first levels
    first = [untrained, *paired(0), *tried, *paired(1), *paired(2)]
    rest = [*after((5, 8), 0), *after((2,), 0), *paired(3), *paired(4)]
    runs = [*(("tinylm", *point) for point in first), ("smollm2", *untrained)]
    return [("austen", *point) for point in [*runs, *(("tinylm", *point) for point in rest)]]


if __name__ == "__main__":
    fill_table("bits_study", KEY, COLUMNS, points(), run)
