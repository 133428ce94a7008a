"""What did (IA)³'s knobs learn: how far to turn, or only which way?

    python benchmarks/knob_signs.py        # a quarter of an hour on one core

Trains (IA)³ on tinylm and Jane Austen's novels for a few steps, changes the trained vectors l
without further training, and measures the loss on the first BLOCKS blocks. A run adds a row to
data/results/knob_signs.csv for each such change, with the share of negative knobs in per cent:

    trained               l as trained
    clamped               no knob below 0
    signs                 1 ± c with the sign of l - 1
    random signs          |l - 1| as trained, its signs drawn
    largest               the share c of all knobs that is furthest from 1, the others at 1
    base                  all knobs at 1
    gradient, 4 or 160    no training: 1 - c · sign of the loss's gradient at 1, on the first 4
                          or on all 160 blocks that the training sees

At other rates than RATE only `trained` and `clamped` are measured."""

from collections.abc import Iterator
from math import nan

import torch
from catalogue import setting
from common import SEEDS, base_of, fill_table
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from peft_lessons import evaluate, fit, inject, load_task
from peft_lessons.engine import injection_of

STEPS, BATCH, RATE, OTHER_RATES = 40, 4, 0.1, (0.03, 0.3, 1.0)
SIZES, GRADIENT_SIZES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6), (0.02, 0.05, 0.1, 0.15, 0.2)
SHARE, DRAWS = 0.1, 5
BLOCKS = {"validation": 60, "test": 160}
COLUMNS = ("what", "c", "draw", "negative", "validation_loss", "test_loss")
KEY = ("task", "lr", "seed")
Change = tuple[str, float, int, torch.Tensor]  # what, c, draw, l - 1 of all vectors (n,)


def changed(off: torch.Tensor) -> Iterator[Change]:
    """Yield the changes of trained knobs, given as l - 1 (n,)."""
    yield "trained", nan, 0, off
    yield "clamped", nan, 0, off.clamp(min=-1)
    for c in SIZES:
        yield "signs", c, 0, c * off.sign()
    for draw in range(DRAWS):
        signs = torch.randint(0, 2, off.shape) * 2 - 1
        yield "random signs", nan, draw, off.abs() * signs
    yield "largest", SHARE, 0, off * (off.abs() >= off.abs().quantile(1 - SHARE))
    yield "base", nan, 0, 0 * off


def downhill(model, knobs: list[torch.Tensor], task, seed: int) -> Iterator[Change]:
    """Yield knobs that are turned against the gradient at 1, by one size."""
    model.train()
    batches = zip(range(1, STEPS + 1), task.stream(BATCH, seed=seed), strict=False)
    for step, batch in batches:
        model(**batch).loss.backward()
        if step in (1, STEPS):
            signs = parameters_to_vector([vector.grad for vector in knobs]).sign()
            for c in GRADIENT_SIZES:
                yield f"gradient, {BATCH * step}", c, 0, -c * signs


def run(name: str, lr: float, seed: int) -> list[dict]:
    """Train with a seed and return a row for each change."""
    task, model = load_task(name).limit(**BLOCKS), base_of(name, seed)
    inject(model, setting("ia3", name))
    vectors = [wrapper.l for wrapper in injection_of(model).wrappers.values()]
    untrained = list(downhill(model, vectors, task, seed)) if lr == RATE else []
    fit(model, task, STEPS, lr=lr, batch_size=BATCH, seed=seed, show=False)
    off, rows = parameters_to_vector(vectors).detach() - 1, []
    torch.manual_seed(seed)
    for what, c, draw, new in [*changed(off), *untrained]:
        if lr != RATE and what not in ("trained", "clamped"):
            continue
        vector_to_parameters(1 + new, vectors)
        row = {"what": what, "c": c, "draw": draw, "validation_loss": nan}
        row["negative"] = f"{100 * (new < -1).float().mean():.2f}"
        tuned = what in ("trained", "signs") or what.startswith("gradient")
        for split in BLOCKS if tuned else ["test"]:
            row[f"{split}_loss"] = f"{evaluate(model, task, split).loss:.5f}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    points = [(RATE, seed) for seed in SEEDS] + [(lr, SEEDS[0]) for lr in OTHER_RATES]
    fill_table("knob_signs", KEY, COLUMNS, [("austen", *point) for point in points], run)
