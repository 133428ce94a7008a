"""In how few bits? Perplexity of a rounded base, with LoRA trained before or after the rounding.

    python benchmarks/bits_study.py       # an hour on one core

Rounds all linear layers of tinylm to the nearest level, in blocks of 64 with the absmax in float32,
and trains on Jane Austen's novels as `qlora_study.py` does: LoRA on the float base, which is then
rounded (`trained` is "before"), or on the rounded base ("after"). The same seed gives the same
start and the same batches. An adapter is used on the base of its row's levels, or, trained there,
on the float base (`used` is "float") or on another rounding to the same levels, whose blocks begin
32 weights later ("shifted"). One row for each to data/results/bits_study.csv: `error` is the
relative error of the weights in per cent, and `losses` are the nats per token in each of 40
consecutive stretches of the test blocks, so that two rows can be paired. Learning rates are chosen
with seed 0, by `validation`.
"""

import torch
from catalogue import setting
from common import SEEDS, STEPS, base_of, fill_table, load, plain
from qlora_bases import losses
from qlora_levels import relative, rounded
from torch import nn

from peft_lessons import inject
from peft_lessons.checks.qlora import normal_float_levels

NORMAL, EVEN, SIGNED, FLOAT = "normal float", "evenly spaced", "evenly spaced, signed", "float"
ROUNDED = [  # (levels, bits), those that matter most first
    *((levels, bits) for bits in (3, 4) for levels in (NORMAL, EVEN, SIGNED)),
    *((levels, bits) for bits in (5, 8) for levels in (NORMAL, EVEN)),
    *((levels, 2) for levels in (NORMAL, EVEN, SIGNED)),
]
RATE, OTHER_RATES = 3e-2, (1e-2, 1e-1)  # the best of the study, and its neighbours there
STRETCHES, SHIFT = 40, 32
KEY = ("task", "levels", "bits", "trained", "lr", "seed")
COLUMNS = ("used", "error", "validation", "test", "test_loss", "losses")


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
    def to(self, levels: str, bits: int, offset: int = 0) -> str:
        """Round in blocks that begin `offset` weights later, and return the error in per cent."""
        table = None if levels == FLOAT else levels_of(levels, bits)
        for linear, weight in zip(self.linears, self.weights, strict=True):
            new = weight
            if table is not None:
                moved = weight.flatten().roll(-offset).view_as(weight)
                new = rounded(moved, table, signed=levels == SIGNED)[0]
                new = new.flatten().roll(offset).view_as(weight)
            linear.weight.copy_(new)
        pairs = zip(self.linears, self.weights, strict=True)
        return relative([linear.weight - weight for linear, weight in pairs], self.weights)


def scores(model: nn.Module, split: str) -> dict[str, str]:
    """Return what a row says of a split."""
    sums, tokens = losses(model, load("austen"), split)
    mean = sums.sum() / tokens.sum()
    if split == "validation":
        return {"validation": f"{mean.exp():.4f}"}
    parts = zip(sums.tensor_split(STRETCHES), tokens.tensor_split(STRETCHES), strict=True)
    each = " ".join(f"{part.sum() / n.sum():.4f}" for part, n in parts)
    return {"test": f"{mean.exp():.4f}", "test_loss": f"{mean:.6f}", "losses": each}


def run(task: str, levels: str, bits: int, trained: str, lr: float, seed: int) -> list[dict]:
    """Return the row of a point, and those of its adapter on other bases."""
    model = base_of(task, seed)
    rounding = Rounding(model)
    error = rounding.to(levels, bits)
    inject(model, setting("lora, all linear", task))
    plain(model, load(task), STEPS[task], lr, seed)
    chosen_by = {"validation": "nan"} if seed or not lr else scores(model, "validation")
    rows = [{"used": "", "error": error} | chosen_by | scores(model, "test")]

    def use(levels: str, bits: int, offset: int = 0, /, **named) -> None:
        named |= {"validation": "nan", "error": rounding.to(levels, bits, offset)}
        rows.append(named | scores(model, "test"))

    if trained == "after":
        if (levels, bits) == (NORMAL, 3):
            use(FLOAT, 32, used="float")
            use(levels, bits, SHIFT, used="shifted")
        return rows
    for levels, bits in ROUNDED:
        if not seed or (levels != EVEN and bits in (3, 4)):
            use(levels, bits, levels=levels, bits=bits, used="")
    if lr:
        use(NORMAL, 3, SHIFT, levels=NORMAL, bits=3, used="shifted")
    return rows


def points() -> list[tuple]:
    """Return all points, those that matter most first."""

    def after(seed: int, *sets: tuple[str, int], lr: float = RATE) -> list[tuple]:
        return [(*s, "after", lr, seed) for s in sets]

    def paired(seed: int) -> list[tuple]:
        sets = ((NORMAL, 3), (NORMAL, 4), (SIGNED, 4), (SIGNED, 3))
        return [(FLOAT, 32, "before", RATE, seed), *after(seed, *sets)]

    runs = [(FLOAT, 32, "not", 0.0, 0)]
    runs += [point for seed in SEEDS for point in paired(seed)]
    runs += after(0, (EVEN, 3), (EVEN, 4), (NORMAL, 5), (NORMAL, 8), (NORMAL, 2))
    runs += [point for lr in OTHER_RATES for point in after(0, (NORMAL, 3), lr=lr)]
    return [("austen", *point) for point in runs]


if __name__ == "__main__":
    fill_table("bits_study", KEY, COLUMNS, points(), run)
