"""Read the measured tables in data/results/ that a lesson shows beside its own live numbers."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .models import data_folder


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def stamp() -> dict[str, str]:
    """Return what every row of a measured table says of its run: torch, machine and date."""
    return {
        "torch": torch.__version__.split("+")[0],
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
        "date": datetime.date.today().isoformat(),
    }


def load_results(name: str, **where) -> list[dict]:
    """Rows of data/results/<name>.csv as dicts, numbers as numbers; only those equal to `where`.

    Raises FileNotFoundError (lists the tables there are), ValueError for a column unknown to it."""
    folder = data_folder() / "results"
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"no table {name!r} in data/results; there are: {known}")
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if unknown := set(where) - set(reader.fieldnames or ()):
            raise ValueError(f"{name!r} has no column {min(unknown)!r}; it has {reader.fieldnames}")
        rows = [{k: _value(v) for k, v in row.items()} for row in reader]
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest value over n seeds."""

    mean: float
    low: float
    high: float
    n: int

    def __repr__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f}, {self.n} seeds)"


def spread(rows: list[dict], column: str, scale: float = 1.0) -> Spread:
    """The spread of `scale` times a column over rows that differ in their seed only.

    Raises ValueError for no rows, or rows that differ in more than the seed and what was measured:
    two rows with one seed are two points."""
    if not rows:
        raise ValueError(f"no rows to take {column!r} of: the filter matches nothing")
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seed {max(seeds, key=seeds.count)} is there twice: filter by more columns"
        )
    values = [scale * row[column] for row in rows]
    return Spread(statistics.fmean(values), min(values), max(values), len(values))


def tuned(rows: list[dict], choose: Callable = max) -> tuple[float, list[dict]]:
    """(learning rate, its rows): the best by column `validation` among the runs with seed 0.

    choose: max, or min where less is better, as of perplexities.
    Raises ValueError if there is no run with seed 0."""
    first = sorted((r for r in rows if r["seed"] == 0), key=lambda r: r["lr"])
    if not first:
        raise ValueError("no run with seed 0 to choose a rate by: the filter matches nothing")
    rate = choose(first, key=lambda r: r["validation"])["lr"]
    return rate, [r for r in rows if r["lr"] == rate]


def best(rows: list[dict], over: str, by: str) -> tuple[object, list[dict]]:
    """(value of column `over`, its rows) with the highest mean of column `by`: a tuned setting.

    Raises ValueError for no rows, or a seed that is there twice at one value."""
    if not rows:
        raise ValueError(f"no rows to choose {over!r} from: the filter matches nothing")
    groups = {value: [r for r in rows if r[over] == value] for value in {r[over] for r in rows}}
    value = max(sorted(groups), key=lambda v: spread(groups[v], by).mean)
    return value, groups[value]
