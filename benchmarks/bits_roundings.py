"""Do the levels matter, or the draw? Perplexity of a rounded base, for several roundings of each.

    python benchmarks/bits_roundings.py       # a quarter of an hour on one core

The same levels round a matrix otherwise if its blocks of 64 begin at other weights. All linear
layers of a decoder are rounded as in `bits_study.py`, but with blocks that are moved by `offset`
weights, and measured without training on pieces of Jane Austen's novels: 200 for tinylm, 20 for
SmolLM2. One row for each rounding to data/results/bits_roundings.csv: the relative error of the
weights in per cent, and the test perplexity. Bits of 32 stand for the float base.
"""

from functools import cache

from bits_study import EVEN, FLOAT, NORMAL, SIGNED, Rounding
from common import fill_table

from peft_lessons import evaluate, load_model, load_task, load_tokenizer

PIECES = {"tinylm": 200, "smollm2": 20}
OFFSETS = range(0, 64, 8)
KEY, COLUMNS = ("model", "levels", "bits", "offset"), ("error", "test")


@cache
def held(name: str) -> tuple:
    """Return a model, its task, and what rounds it."""
    model = load_model(name)
    task = load_task("austen", load_tokenizer(name)).limit(test=PIECES[name])
    return model, task, Rounding(model)


def run(name: str, levels: str, bits: int, offset: int) -> dict:
    """Round to some levels in moved blocks, and measure."""
    model, task, rounding = held(name)
    error = rounding.to(levels, bits, offset)
    return {"error": error, "test": f"{evaluate(model, task).perplexity:.4f}"}


def points() -> list[tuple]:
    """Return all points, those of tinylm first."""
    return [
        point
        for name in PIECES
        for point in [
            (name, FLOAT, 32, 0),
            *(
                (name, levels, bits, offset)
                for bits in (4, 3)
                for offset in OFFSETS
                for levels in (NORMAL, EVEN, SIGNED)
            ),
        ]
    ]


if __name__ == "__main__":
    fill_table("bits_roundings", KEY, COLUMNS, points(), run)
