"""Read the measured tables in data/results/ that a lesson shows beside its own live numbers."""

from __future__ import annotations

import csv
import datetime
import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .data.bundled import data_folder
from .engine import validate
from .tables import Table, cost_table, table


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def stamp() -> dict[str, str]:
    """What every row of a measured table says of its run: torch, machine and date."""
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
        if self.n == 1:
            return f"{self.mean:.1f} (1 seed)"
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


def _between(t: float, degrees: int) -> float:
    """How much of Student's distribution lies between -t and t (Abramowitz & Stegun 26.7.3, 4)."""
    angle = math.atan(t / math.sqrt(degrees))
    if degrees == 1:
        return 2 * angle / math.pi
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def student_t(degrees: int) -> float:
    """The t for which 95 % of Student's distribution lies between -t and t, to nine digits.

    degrees: of freedom, 1, 2, ...; ValueError for another number."""
    validate("student_t", degrees=degrees)
    low, high = 1.9, 13.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, degrees) < 0.95 else (low, middle)
    return middle


@dataclass(frozen=True)
class Difference:
    """A mean difference over n seeds, and between what it lies at 95 %; one seed says nothing of
    that, and the interval is infinite."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        if self.n == 1:
            return f"{self.mean:+.1f} (1 seed)"
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f}, {self.n} seeds)"


def difference(
    rows: list[dict], others: list[dict], column: str = "test", scale: float = 1.0
) -> Difference:
    """How much more `rows` have in a column than `others`, `scale` times: the mean over the seeds
    that both have, and its interval of 95 % by Student's t. With a run that diverged nothing is
    known of the difference, and it is not clear.

    Raises ValueError if they have no seed in common, or one has a seed twice."""
    for given in (rows, others):
        spread(given, column)  # which looks for seeds that are there twice
    theirs = {row["seed"]: row[column] for row in others}
    gaps = [scale * (r[column] - theirs[r["seed"]]) for r in rows if r["seed"] in theirs]
    if not gaps:
        raise ValueError("no seed in common: there is nothing to pair")
    mean, n = statistics.fmean(gaps), len(gaps)
    known = n > 1 and math.isfinite(mean)
    half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n) if known else math.inf
    return Difference(mean, mean - half, mean + half, n)


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of points {name: (cost, score)}, lower cost and higher score being better, the names of those
    than which none is better in one and as good in the other: the Pareto front, cheapest first.
    A point with a NaN was not measured, and is none of them."""

    def beaten(point: tuple[float, float]) -> bool:
        cost, score = point
        return any(c <= cost and s >= score and (c, s) != point for c, s in points.values())

    measured = {n: point for n, point in points.items() if not any(map(math.isnan, point))}
    front = [name for name, point in measured.items() if not beaten(point)]
    return sorted(front, key=lambda name: points[name][0])


def tuned(rows: list[dict], choose: Callable = max) -> tuple[float, list[dict]]:
    """(learning rate, its rows): the best by column `validation` among the runs with seed 0 that
    did not diverge.

    choose: max, or min where less is better, as of perplexities.
    Raises ValueError if there is no such run."""
    first = sorted((r for r in rows if r["seed"] == 0), key=lambda r: r["lr"])
    if not first:
        raise ValueError("no run with seed 0 to choose a rate by: the filter matches nothing")
    first = [r for r in first if math.isfinite(r["validation"])]
    if not first:
        raise ValueError("no run with seed 0 to choose a rate by: all diverged")
    rate = choose(first, key=lambda r: r["validation"])["lr"]
    return rate, [r for r in rows if r["lr"] == rate]


def measured_on(*rows: dict) -> str:
    """Machine, torch and date of measured rows: the note below a table of them. Where they are of
    several days it says the first and the last. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("no rows to say of where they were measured")
    machine, version = (", ".join(sorted({str(r[k]) for r in rows})) for k in ("machine", "torch"))
    days = sorted({r["date"] for r in rows})
    return f"{machine} · torch {version} · {' to '.join(dict.fromkeys((days[0], days[-1])))}"


# ------------------------------------------------------------------ the studies, side by side

# {task: (first heading, heading of the score, its scale, which score is best)}
_TASKS: dict[str, tuple[str, str, float, Callable]] = {
    "sentiment": ("minilm, movie sentiment, 200 steps", "test accuracy, %", 100, max),
    "austen": ("tinylm, Austen, 100 steps", "test perplexity", 1, min),
}


def _kind(task: str) -> tuple[str, str, float, Callable]:
    if task not in _TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(map(repr, _TASKS))}")
    return _TASKS[task]


def references(task: str) -> dict[str, list[dict]]:
    """What every method is laid beside on "sentiment" or "austen", {name: its rows at all rates}:
    the least that can train, LoRA, and full fine-tuning.

    Raises ValueError for another task."""
    _kind(task)
    if task == "austen":
        rows, columns = load_results("qlora_study"), ("method",)
        ways = {
            "base, untouched": ("none",),
            "LoRA, rank 8, all linear layers": ("lora",),
            "full fine-tuning": ("full",),
        }
    else:
        rows = [r for r in load_results("lora_study", steps=200) if r["alpha"] in (0, 16)]
        columns = ("method", "targets", "rank")
        ways = {
            "head alone": ("head", "", 0),
            "LoRA, rank 8, query and value": ("lora", "qv", 8),
            "LoRA, rank 8, all linear layers": ("lora", "all-linear", 8),
            "full fine-tuning": ("full", "", 0),
        }
    return {
        name: [r for r in rows if tuple(r[c] for c in columns) == way] for name, way in ways.items()
    }


def beside(task: str, own: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """`own` ways, {name: its rows at all rates}, as they stand in a table among the `references`:
    behind the least that can train, before LoRA and full fine-tuning.

    Raises ValueError for another task."""
    (first, least), *others = references(task).items()
    return {first: least, **own, **dict(others)}


def scores(task: str, ways: Mapping[str, list[dict]]) -> dict[str, Spread]:
    """The test score of each way, {name: its rows at all rates}, at its tuned rate: accuracies in
    percent, or perplexities. Raises ValueError for another task, or a way without rows."""
    _, _, scale, choose = _kind(task)
    return {name: spread(tuned(rows, choose)[1], "test", scale) for name, rows in ways.items()}


def compare(
    task: str, ways: Mapping[str, list[dict]], more: Mapping[str, Callable] | None = None
) -> Table:
    """A table of ways, {name: its rows at all rates}: each at its tuned rate, over its seeds.

    more: further columns, {heading: function of a way's rows at that rate}.
    Raises ValueError for another task, or a way without rows."""
    heading, column, _, choose = _kind(task)
    lines, shown = [], []
    for name, score in scores(task, ways).items():
        rate, found = tuned(ways[name], choose)
        shown += found
        line = {heading: name, "trainable": found[0]["trainable"], "rate": rate or None}
        line |= {what: function(found) for what, function in (more or {}).items()}
        lines.append(line | {column: score if score.n > 1 else f"{score.mean:.1f}"})
    return table(lines, {"rate": "{:g}"}, note=measured_on(*shown))


def by_rate(task: str, ways: Mapping[str, list[dict]]) -> Table:
    """A table of ways, {name: its rows at all rates}: seed 0 at every rate that was tried, its
    score on the validation split, which chooses, and on the test split, which does not.

    Raises ValueError for another task."""
    heading, column, scale, _ = _kind(task)
    tried = {name: {r["lr"]: r for r in rows if r["seed"] == 0} for name, rows in ways.items()}
    rates = sorted({rate for found in tried.values() for rate in found})

    def both(row: dict | None) -> str | None:
        return row and f"{scale * row['validation']:.1f} / {scale * row['test']:.1f}"

    return table(
        [
            {f"{heading}, seed 0": name} | {f"rate {r:g}": both(found.get(r)) for r in rates}
            for name, found in tried.items()
        ],
        note=f"{column.removeprefix('test ')}: validation split / test split",
    )


# ------------------------------------------------------------------ stored costs


def _stored(base: str, names: Mapping[str, str], whose: str) -> list[tuple[str, dict]]:
    """(how it is called, its row of costs.csv) of each method in `names`."""
    rows = {r["method"]: r for r in load_results("costs", base=base, whose=whose)}
    if unknown := [method for method in names if method not in rows]:
        known = ", ".join(rows) or "none"
        raise ValueError(f"costs.csv has no row {unknown[0]!r} for {base}, {whose}; it has {known}")
    return [(name, rows[method]) for method, name in names.items()]


def stored_costs(base: str, names: Mapping[str, str], *, answers: bool = True) -> Table:
    """The stored cost of methods on minilm or tinylm, {method in costs.csv: how it is called}.

    A step is one of 16 movie sentences, or of 4 blocks of Austen. An answer is one forward pass of
    32 tokens by minilm, 32 tokens generated after 32 by tinylm. A merged method takes no step: what
    was not measured is left empty. Raises ValueError for a method without a row."""
    lines, rows = [], _stored(base, names, "ours")
    for name, row in rows:
        line = {
            f"on {base}": name,
            "trainable": row["trainable"] or None,
            "optimiser": 8 * row["trainable"] / 2**20 or None,  # AdamW's two moments, in float32
            "peak of a step": row["peak_bytes"] / 2**20 or None,
            "time of a step": 1000 * row["seconds"] or None,
            "file": row["file_bytes"] / 2**20 or None,
        }
        if answers:
            line |= {"answer, 1 text": 1000 * row["answer_1"], "32 texts": 1000 * row["answer_32"]}
        lines.append(line)
    return cost_table(lines, note=measured_on(*(row for _, row in rows)))


def against_peft(base: str, names: Mapping[str, str]) -> Table:
    """The stored step of methods, {method in costs.csv: how it is called}, beside that of PEFT's:
    the time of each, and ours by theirs of time and peak.

    Raises ValueError for a method without a row."""
    lines, shown, theirs = [], [], _stored(base, names, "PEFT")
    for (name, our), (_, their) in zip(_stored(base, names, "ours"), theirs, strict=True):
        shown += our, their
        line = {f"a step on {base}": name}
        line |= {"ours": 1000 * our["seconds"], "PEFT's": 1000 * their["seconds"]}
        line["time, ratio"] = our["seconds"] / their["seconds"]
        lines.append(line | {"peak, ratio": our["peak_bytes"] / their["peak_bytes"]})
    formats = dict.fromkeys(("ours", "PEFT's"), "{:.0f} ms")
    formats |= dict.fromkeys(("time, ratio", "peak, ratio"), "{:.2f}")
    note = f"a ratio below 1: ours is faster or smaller · {measured_on(*shown)}"
    return table(lines, formats, note)
