"""Read the runs of a study as a pandas table, and compute the statistics of the course."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..data.bundled import data_folder
from ..engine.settings import validate
from .tables import Table, table

if TYPE_CHECKING:  # pandas is imported where a table is read: it takes a third of a second
    from pandas import DataFrame

# {task: (first heading, heading of the score, its scale, which score is best)}
TASKS: dict[str, tuple[str, str, float, Callable]] = {
    "sentiment": ("minilm, movie sentiment, 200 steps", "test accuracy, %", 100, max),
    "austen": ("tinylm, Austen, 100 steps", "test perplexity", 1, min),
    "definitions": ("SmolLM2-135M, definitions, 40 steps", "test loss, nats × 100", 100, min),
    "swaps": ("minilm, swapped words, 200 steps", "test accuracy, %", 100, max),
}
# What every method is compared with: {task: (study, filter, {way: its values})}. The first of them
# is the least that can train.
REFERENCES: dict[str, tuple[str, dict, dict[str, dict]]] = {
    "sentiment": (
        "lora_study",
        {"steps": 200, "alpha": (0, 16)},
        {
            "head alone": {"method": "head"},
            "LoRA, rank 8, query and value": {"method": "lora", "targets": "qv", "rank": 8},
            "LoRA, rank 8, all linear layers": {"targets": "all-linear", "rank": 8},
            "full fine-tuning": {"method": "full"},
        },
    ),
    "austen": (
        "qlora_study",
        {},
        {
            "base, untouched": {"method": "none"},
            "LoRA, rank 8, all linear layers": {"method": "lora"},
            "full fine-tuning": {"method": "full"},
        },
    ),
}
# The t for which 95 % of Student's distribution lies between -t and t, for 1, 2, ... degrees.
STUDENT_T = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157),
    *(2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922),
    *(2.093024, 2.085963, 2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831),
    *(2.048407, 2.045230, 2.042272),
)


def stamp() -> dict[str, str]:
    """Return the provenance of a row measured now: torch, machine and date."""
    return {
        "torch": torch.__version__.split("+")[0],
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
        "date": datetime.date.today().isoformat(),
    }


def _where(rows: DataFrame, values: Mapping) -> DataFrame:
    if unknown := values.keys() - set(rows.columns):
        raise ValueError(f"there is no column {min(unknown)!r}; there are {list(rows.columns)}")
    for column, value in values.items():
        rows = rows[rows[column].isin(value if isinstance(value, tuple | list) else (value,))]
    return rows


def load_results(name: str, **where) -> DataFrame:
    """Return the rows of data/results/<name>.csv whose columns equal `where`; a tuple gives several
    values for a column. The rows of every study have a column `task`.

    Raises FileNotFoundError (lists the tables there are), ValueError for an unknown column."""
    import pandas as pd

    folder = data_folder() / "results"
    if not (path := folder / f"{name}.csv").is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"no table {name!r} in data/results; there are: {known}")
    rows = pd.read_csv(path, keep_default_na=False, na_values="nan")
    origin = rows.columns.intersection([*stamp()])  # left out where it is that of the row above
    rows[origin] = rows[origin].replace("", None).ffill()
    if "validation" in rows and "task" not in rows:
        rows.insert(0, "task", "austen" if name == "qlora_study" else "sentiment")
    return _where(rows, where).reset_index(drop=True)


@dataclass(frozen=True)
class Spread:
    """Hold mean, minimum and maximum over n seeds, or over n of something else."""

    mean: float
    low: float
    high: float
    n: int
    of: str = "seed"
    sign: ClassVar[str] = ""

    def __repr__(self) -> str:
        mean, low, high = (f"{x:{self.sign}.1f}" for x in (self.mean, self.low, self.high))
        n = f"{self.n:,} {self.of}"
        return f"{mean} ({n})" if self.n == 1 else f"{mean} ({low} to {high}, {n}s)"


class Difference(Spread):
    """Hold a mean paired difference and its 95 % confidence interval (infinite for one pair)."""

    sign = "+"

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def _by_seed(runs: DataFrame, column: str, scale: float) -> dict[int, float]:
    seeds = runs["seed"].tolist()
    if not seeds:
        raise ValueError(f"no runs to take {column!r} of: the filter matches nothing")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed {max(seeds, key=seeds.count)} occurs twice: filter further")
    return {seed: scale * value for seed, value in zip(seeds, runs[column].tolist(), strict=True)}


def mean_and_range(runs: DataFrame, column: str, scale: float = 1.0) -> Spread:
    """Return mean, minimum and maximum of `scale` times a column over runs that differ in their
    seed. Raises ValueError for no runs, or a seed that occurs twice."""
    values = _by_seed(runs, column, scale).values()
    return Spread(statistics.fmean(values), min(values), max(values), len(values))


def student_t(degrees: int) -> float:
    """Return the t for which 95 % of Student's distribution with so many degrees of freedom lies
    between -t and t, to four digits. Raises ValueError unless degrees is 1, 2, ..."""
    validate("student_t", degrees=degrees)
    if degrees <= len(STUDENT_T):
        return STUDENT_T[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)  # Abramowitz & Stegun 26.7.5
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _difference(gaps: list[float], of: str) -> Difference:
    """Return the mean of paired differences with its 95 % confidence interval."""
    mean, n = statistics.fmean(gaps), len(gaps)
    known = n > 1 and math.isfinite(mean)
    half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n) if known else math.inf
    return Difference(mean, mean - half, mean + half, n, of)


def paired_difference(
    runs: DataFrame, others: DataFrame, column: str = "test", scale: float = 1.0
) -> Difference:
    """Return the mean of `scale` times the difference of a column, `runs` minus `others`, over
    their common seeds, with a 95 % confidence interval by Student's t (infinite for a diverged
    run).

    Raises ValueError if they have no seed in common, or one has a seed twice."""
    ours, theirs = (_by_seed(each, column, scale) for each in (runs, others))
    gaps = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not gaps:
        raise ValueError("no seed in common: there is nothing to pair")
    return _difference(gaps, "seed")


def _paired(
    runs: DataFrame, others: DataFrame, values: Callable[[Any], list[float]], of: str
) -> Difference:
    """Return the mean difference over the examples, each with the mean over runs of its value in
    `values(row)`."""
    means = []
    for rows in (runs, others):
        if rows.empty:
            raise ValueError("no runs to pair: the filter matches nothing")
        columns = [values(row) for row in rows.itertuples()]
        if len(sizes := {len(column) for column in columns}) > 1:
            raise ValueError(f"runs on {sorted(sizes)} {of}s cannot be paired")
        means.append([statistics.fmean(example) for example in zip(*columns, strict=True)])
    ours, theirs = means
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} {of}s cannot be paired")
    return _difference([mine - other for mine, other in zip(ours, theirs, strict=True)], of)


def paired_answers(runs: DataFrame, others: DataFrame) -> Difference:
    """Return by how many points of accuracy `runs` are ahead of `others` on the same test
    sentences, with a 95 % interval over the sentences.

    Each sentence counts with the share of the runs that get it right; `n` is the number of
    sentences. The rows have the columns `sentences` and `right` of sentiment_answers.csv. Raises
    ValueError for no rows, or for other numbers of sentences."""

    def right(row) -> list[float]:
        bits = int(row.right, 16)
        return [100.0 * (bits >> i & 1) for i in range(row.sentences)]

    return _paired(runs, others, right, "sentence")


def paired_losses(runs: DataFrame, others: DataFrame) -> Difference:
    """Return by how many hundredths of a nat per token the loss of `runs` is above that of `others`
    on the same test answers, with a 95 % interval over the answers. A hundredth of a nat is about
    one percent of the perplexity.

    Each answer counts with its mean over the runs; `n` is the number of answers. The rows have the
    column `losses` of assistant_study.csv, or of bits_study.csv, where it holds stretches of text.
    Raises ValueError for no rows, or for other numbers of answers."""

    def losses(row) -> list[float]:
        return [100 * float(loss) for loss in row.losses.split()]

    return _paired(runs, others, losses, "answer")


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names on the Pareto front of {name: (cost, score)}, cheapest first: the points
    that no other beats on both. A point with a NaN is not on it."""
    measured = {n: point for n, point in points.items() if not any(map(math.isnan, point))}
    front = [
        (cost, name)
        for name, (cost, score) in measured.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    ]
    return [name for _, name in sorted(front, key=lambda point: point[0])]


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the area under the ROC curve of scores (n,) for labels 0 and 1, (n,): the share of the
    pairs of a positive and a negative that the scores rank rightly. A tie counts a half.

    Raises ValueError if one of the two classes is missing."""
    if not 0 < labels.sum() < len(labels):
        raise ValueError("auc: there must be a positive and a negative label")
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    return ((gaps > 0).double() + (gaps == 0).double() / 2).mean().item()


def _task(runs: DataFrame) -> str:
    if runs.empty:
        raise ValueError("there are no runs: the filter matches nothing")
    tasks = set(runs["task"])
    if len(tasks) != 1 or not tasks <= TASKS.keys():
        raise ValueError(f"task={sorted(tasks)} must be one of {', '.join(map(repr, TASKS))}")
    return tasks.pop()


def best_lr(runs: DataFrame) -> tuple[float, DataFrame]:
    """Return the learning rate that is best by `validation` among the runs with seed 0 that did not
    diverge, and all runs at it. Among equal ones the lower learning rate is best.

    Raises ValueError if there is no such run."""
    tried = zip(runs["lr"].tolist(), runs["seed"], runs["validation"].tolist(), strict=True)
    first = {lr: x for lr, seed, x in sorted(tried) if seed == 0 and math.isfinite(x)}
    if not first:
        raise ValueError(
            "every run with seed 0 diverged or is missing, so no learning rate can be chosen"
        )
    rate = TASKS[_task(runs)][-1](first, key=first.get)
    return rate, runs[runs["lr"] == rate]


def provenance(*runs: DataFrame) -> str:
    """Return machine, torch and date of measured rows, the note below a table; of several days the
    first and the last. Raises ValueError for no rows."""
    origins = {
        c: sorted({str(x) for r in runs for x in r[c]}) for c in ("machine", "torch", "date")
    }
    if not origins["date"]:
        raise ValueError("there are no rows, so nothing was measured")
    machine, version = (", ".join(origins[c]) for c in ("machine", "torch"))
    days = " to ".join(dict.fromkeys((origins["date"][0], origins["date"][-1])))
    return f"{machine} · torch {version} · {days}"


class Study:
    """Hold runs in a DataFrame, `runs`. Runs with the same `way` differ in learning rate and seed
    only; comparisons are between ways.

        Study.read("dora_study").named({"DoRA": {"method": "dora", "rank": 8}}).compare()

    A comparison shows every way at its best learning rate on the validation split."""

    def __init__(self, runs: DataFrame):
        self.runs = runs

    @classmethod
    def read(cls, name: str, **where) -> Study:
        """Read the runs of data/results/<name>.csv; errors and `where` as in `load_results`."""
        return cls(load_results(name, **where))

    @classmethod
    def references(cls, task: str) -> Study:
        """Read what every method is compared with on "sentiment" or "austen"."""
        if task not in REFERENCES:
            raise ValueError(f"task={task!r} must be one of {', '.join(map(repr, REFERENCES))}")
        name, where, ways = REFERENCES[task]
        return cls.read(name, **where).named(ways)

    def where(self, **values) -> Study:
        """Return the runs whose columns have these values, or one of a tuple of values."""
        return Study(_where(self.runs, values))

    def named(self, ways: Mapping[str, Mapping]) -> Study:
        """Return the runs of {way: its values of columns}, in this order, with their names.

        Raises ValueError for an unknown column, or a way without runs."""
        import pandas as pd

        if not ways:
            raise ValueError("name at least one way: {name: {column: value}}")
        chosen = {way: _where(self.runs, values) for way, values in ways.items()}
        if empty := [way for way, runs in chosen.items() if runs.empty]:
            raise ValueError(f"no run is {empty[0]!r}, {dict(ways[empty[0]])}")
        return Study(pd.concat([runs.assign(way=way) for way, runs in chosen.items()]))

    def __add__(self, other: Study) -> Study:
        import pandas as pd

        return Study(pd.concat([self.runs, other.runs]))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the ways. Raises ValueError before they are named."""
        if "way" not in self.runs:
            raise ValueError("the ways have no names yet: call named({name: {column: value}})")
        return iter(self.runs["way"].unique())

    def __repr__(self) -> str:
        ways = f", ways {', '.join(map(repr, self))}" if "way" in self.runs else ""
        return f"Study of {len(self.runs)} runs{ways}"

    def __getitem__(self, way: str) -> DataFrame:
        """Return the runs of a way. Raises KeyError for another name."""
        return self.runs.groupby("way").get_group(way)

    def with_references(self) -> Study:
        """Return these ways between the references of their task: after the smallest trainable one,
        before LoRA and full fine-tuning."""
        references = Study.references(_task(self.runs))
        least, *others = references
        return references.where(way=least) + self + references.where(way=tuple(others))

    def best(self) -> dict[str, DataFrame]:
        """Return {way: its runs at its best learning rate}."""
        return {way: best_lr(self[way])[1] for way in self}

    def scores(self, column: str = "test") -> dict[str, Spread]:
        """Return {way: its score at its best learning rate}: accuracy in percent, or perplexity."""
        scale = TASKS[_task(self.runs)][2]
        return {way: mean_and_range(runs, column, scale) for way, runs in self.best().items()}

    def compare(self, more: Mapping[str, Callable] | None = None) -> Table:
        """Return a table of the ways, each at its best learning rate, over its seeds.

        more: further columns, {heading: function of a way's runs at that learning rate}."""
        heading, column, *_ = TASKS[_task(self.runs)]
        best, scores, lines = self.best(), self.scores(), []
        for way, runs in best.items():
            first, score = runs.iloc[0], scores[way]
            line = {heading: way, "trainable": first["trainable"]}
            line["learning rate"] = first["lr"] or None
            line |= {what: function(runs) for what, function in (more or {}).items()}
            lines.append(line | {column: score if score.n > 1 else f"{score.mean:.1f}"})
        return table(lines, {"learning rate": "{:g}"}, note=provenance(*best.values()))

    def by_lr(self) -> Table:
        """Return a table of seed 0 of each way at every learning rate: its score on the validation
        split, which chooses, and on the test split, which does not."""
        heading, column, scale, _ = TASKS[_task(self.runs)]
        rates, lines = sorted(self.where(seed=0).runs["lr"].unique()), []
        for way in self:
            runs = self.where(way=way, seed=0).runs.itertuples()
            tried = {r.lr: f"{scale * r.validation:.1f} / {scale * r.test:.1f}" for r in runs}
            cells = {f"lr {lr:g}": tried.get(lr) for lr in rates}
            lines.append({f"{heading}, seed 0": way} | cells)
        return table(lines, note=f"{column.removeprefix('test ')}: validation split / test split")
