"""Tables of what methods cost, in the units of the course, and those stored in data/results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .study import load_results, provenance
from .tables import Table, table

if TYPE_CHECKING:
    from pandas import DataFrame

_UNITS = {
    **dict.fromkeys(("weights", "gradients", "optimiser", "statistics", "file"), "{:.2f} MiB"),
    **dict.fromkeys(("activations", "peak of a step"), "{:.1f} MiB"),
    **dict.fromkeys(("time of a step", "32 texts"), "{:.0f} ms"),
    **dict.fromkeys(("forward pass, 1 text", "generation, 1 text"), "{:.1f} ms"),
}


def cost_table(
    rows: Iterable[Mapping[str, Any]], formats: Mapping[str, str] | None = None, note: str = ""
) -> Table:
    """Return a `table` with the unit of the course where a column has one: MiB or ms."""
    rows = list(rows)
    known = {name: unit for name, unit in _UNITS.items() if rows and name in rows[0]}
    return table(rows, known | dict(formats or {}), note)


def _stored(base: str, names: Mapping[str, str], whose: str) -> DataFrame:
    """Return the rows of costs.csv of the methods in `names`, in that order."""
    rows = load_results("costs", base=base, whose=whose).set_index("method")
    if unknown := [method for method in names if method not in rows.index]:
        known = ", ".join(rows.index) or "none"
        raise ValueError(f"costs.csv has no row {unknown[0]!r} for {base}, {whose}; it has {known}")
    return rows.loc[list(names)]


def stored_costs(base: str, names: Mapping[str, str], *, answers: bool = True) -> Table:
    """Return the stored cost of methods on minilm or tinylm, {method in costs.csv: its name here}.

    A training step of minilm takes 16 movie sentences, one of tinylm takes 4 blocks of Austen. With
    `answers`, two columns time the use of the model: a forward pass of minilm over 32 tokens, or
    the generation of 32 tokens by tinylm after a text of 32. A merged method takes no training
    step, so those cells stay empty. Raises ValueError for a method without a row."""
    lines, rows = [], _stored(base, names, "ours")
    for name, row in zip(names.values(), rows.itertuples(), strict=True):
        line = {
            f"on {base}": name,
            "trainable": row.trainable or None,
            "optimiser": 8 * row.trainable / 2**20 or None,  # AdamW's two moments, in float32
            "peak of a step": row.peak_bytes / 2**20 or None,
            "time of a step": 1000 * row.seconds or None,
            "file": row.file_bytes / 2**20 or None,
        }
        if answers:
            use = "generation" if base == "tinylm" else "forward pass"
            line |= {f"{use}, 1 text": 1000 * row.answer_1, "32 texts": 1000 * row.answer_32}
        lines.append(line)
    return cost_table(lines, note=provenance(rows))


def against_peft(base: str, names: Mapping[str, str]) -> Table:
    """Return the stored training steps of methods, {method in costs.csv: its name here}, next to
    PEFT's: both times, and the ratios ours / PEFT's of time and of peak memory.

    Raises ValueError for a method without a row."""
    theirs, ours = _stored(base, names, "PEFT"), _stored(base, names, "ours")
    lines = [
        {f"a step on {base}": name, "ours": 1000 * our.seconds, "PEFT's": 1000 * their.seconds}
        | {"time, ratio": our.seconds / their.seconds}
        | {"peak, ratio": our.peak_bytes / their.peak_bytes}
        for name, our, their in zip(
            names.values(), ours.itertuples(), theirs.itertuples(), strict=True
        )
    ]
    formats = dict.fromkeys(("ours", "PEFT's"), "{:.0f} ms")
    formats |= dict.fromkeys(("time, ratio", "peak, ratio"), "{:.2f}")
    note = f"a ratio below 1: ours is faster or smaller · {provenance(ours, theirs)}"
    return table(lines, formats, note)
