"""What the benchmarks share: the runner, tables that grow run by run, and the studies of methods at
their best learning rates.

A study states its table, its points and how to run one. The runner takes the arguments, runs what
the table lacks and adds rows with their provenance. A row that is there is not run again, so a
study can be stopped and started at will; `--backwards` lets a second process help from the end.

Most studies train minilm on movie sentiment (200 steps), tinylm on Jane Austen's novels (100
steps), or both. They try every setting at each of its learning rates with one seed, and run the
best one by the validation split with two seeds more."""

import argparse
import csv
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from catalogue import BASES

from peft_lessons import evaluate, fit, load_model, load_task, measure
from peft_lessons.studies import stamp
from peft_lessons.train.loop import History, train_step

FOLDER = Path(__file__).parent.parent / "data" / "results"
SEEDS = (0, 1, 2)


class Results:
    """A table data/results/<name>.csv that grows row by row, shared by two processes if need be.

    key: the columns that name a point; a point may have several rows. Where torch, machine and date
    are those of the row above, their cells are empty: repeated, they would fill a fifth of all
    tables."""

    def __init__(self, name: str, key: Sequence[str], columns: Iterable[str], anew: bool = False):
        self.path, self.key = FOLDER / f"{name}.csv", tuple(key)
        self.columns = (*key, *columns, *stamp())
        if anew or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(self.columns) + "\n", encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, each with its stamp."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for above, row in itertools.pairwise(rows):
            row |= {column: row[column] or above[column] for column in stamp()}
        return rows

    def missing(self, points: Iterable[tuple]) -> list[tuple]:
        """Return the points without a row yet."""
        done = {tuple(row[column] for column in self.key) for row in self.rows()}
        return [point for point in points if tuple(map(str, point)) not in done]

    def add(self, point: tuple, rows: Iterable[Mapping]) -> None:
        """Append the rows of a point, stamped, all at once: a run that is stopped leaves none.
        Names without a column are left out."""
        named = stamp() | dict(zip(self.key, point, strict=True))
        above = self.rows()[-1:] or [dict.fromkeys(stamp())]
        shown = [
            row | {column: "" for column in stamp() if row[column] == before[column]}
            for before, row in itertools.pairwise([*above, *(named | row for row in rows)])
        ]
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writerows(shown)


def fill_table(
    table: str,
    key: Sequence[str],
    columns: Sequence[str],
    points: Iterable[tuple] | Callable[[Results], list[tuple]],
    run: Callable[..., Mapping | list[Mapping]],
    anew: bool = False,
) -> None:
    """Run what a table lacks, on one core.

    key, columns: those that name a point, and those that are measured.
    points: all points, or a function of the table that returns those that are due by now.
    run: returns the row of a point, or several; a row may overwrite a value of the point's name.
    anew: whether the table begins anew, as times must that are compared."""
    doc, style = sys.modules["__main__"].__doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--backwards", action="store_true", help="begin with the last point")
    place = -1 if parser.parse_args().backwards else 0
    torch.set_num_threads(1)
    results = Results(table, key, columns, anew)

    def due() -> list[tuple]:
        return results.missing(points(results) if callable(points) else points)

    while missing := due():
        point = missing[place]
        outcome = run(*point)
        rows = [outcome] if isinstance(outcome, Mapping) else outcome
        if point in due():  # another process may have been there too
            results.add(point, rows)
            print(table, *point, rows[-1], flush=True)


STEPS = {"sentiment": 200, "austen": 100}
CHOICES = {"sentiment": max, "austen": min}  # of accuracies, of perplexities
RUN = ("lr", "seed")  # the end of the key of a study at the best learning rates
NAMES = ("task", "method", "variant", "size")  # of a setting of a study on both tasks
MEASURED = ("validation", "test", "test_loss", "seconds_per_step")
BEFORE_TOO = ("steps", "trainable", "untrained", *MEASURED)
PAIRED = ("both", "only_first", "only_second", "neither")  # which of two methods is right


def at_best(
    settings: Mapping[tuple, Sequence[float]], best: Callable | None = None
) -> Callable[[Results], list[tuple]]:
    """Return the points of settings, {values that name it: learning rates to try}: every rate with
    the first seed, then the best one with the others.

    best: min or max, of the column `validation`; by default as the setting's first name, the task,
    says in `CHOICES`."""

    def points(results: Results) -> list[tuple]:
        done = {tuple(row[column] for column in results.key): row for row in results.rows()}
        first = [(*setting, lr, SEEDS[0]) for setting, rates in settings.items() for lr in rates]
        others = []
        for setting, rates in settings.items():
            rows = {lr: done.get(tuple(map(str, (*setting, lr, SEEDS[0])))) for lr in rates}
            if any(rates) and all(rows.values()):
                choose = best or CHOICES[setting[0]]
                chosen = choose(rates, key=lambda lr, rows=rows: float(rows[lr]["validation"]))
                others += [(*setting, chosen, seed) for seed in SEEDS[1:]]
        return first + others

    return points


def around(tried: Mapping[float, float], rates: Sequence[float], center: int) -> Sequence[float]:
    """Return which of the rates to try: the central one with its neighbours, and more at the side
    on which the best one lies.

    tried: the perplexities of the rates that ran."""
    low, high = center - 1, center + 1
    while all(rate in tried for rate in rates[low : high + 1]):
        best = min(range(low, high + 1), key=lambda k: tried[rates[k]])
        if best == low > 0:
            low -= 1
        elif best == high < len(rates) - 1:
            high += 1
        else:
            break
    return rates[low : high + 1]


@cache
def load(task: str, validation: int = 250):
    """Load a task; of Austen so many blocks are enough to choose a learning rate by."""
    return load_task(task).limit(validation=validation) if task == "austen" else load_task(task)


def base_of(task: str, seed: int) -> torch.nn.Module:
    """Return the base of a task, its head and what is injected next drawn with this seed."""
    model = load_model(BASES[task], labels=2 if task == "sentiment" else None, seed=seed)
    torch.manual_seed(seed)
    return model


def in_float32(model: torch.nn.Module) -> None:
    """Turn what trains to float32; what is frozen keeps its type."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def plain(model, task, steps: int, lr: float, seed: int) -> History:
    """Train; at a rate of 0 nothing trains, which gives what the base itself can."""
    return fit(model, task, steps, lr=lr, seed=seed, show=False) if lr else History()


def measured(
    model, task, lr: float, seed: int, train=plain, steps: int = 0, before: bool = False
) -> dict:
    """Train a model with `train(model, task, steps, lr, seed)`, which returns the history, for the
    steps of the studies unless others are given, and return what its row says of the run:
    accuracies on sentiment, perplexities on Austen, and the one before training if asked for."""
    steps = steps or STEPS[task.name]

    def score(split: str) -> tuple[str, str]:
        scores = evaluate(model, task, split)
        quality = scores.perplexity if scores.accuracy is None else scores.accuracy
        return f"{quality:.5f}", f"{scores.loss:.5f}"

    first = {"untrained": score("validation")[0]} if before else {}
    trainable = measure.parameters(model).trainable
    history = train(model, task, steps, lr, seed)
    test, test_loss = score("test")
    return first | {
        "steps": steps if lr else 0,
        "trainable": trainable if lr else 0,
        "validation": score("validation")[0],
        "test": test,
        "test_loss": test_loss,
        "seconds_per_step": f"{history.seconds / max(1, len(history.loss)):.4f}",
    }


@torch.no_grad()
def right_answers(model: torch.nn.Module, task, split: str = "test") -> list[bool]:
    """Return for each sentence of a split whether the classifier is right. The order of the
    sentences is the same for every model, so that two lists can be paired."""
    model.eval()
    right = []
    for batch in task.batches(split, 64, by_length=True):
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).tolist()
    return right


def hexadecimal(right: Sequence[bool]) -> str:
    """Return one bit for each sentence, the first one the lowest."""
    return f"{sum(1 << i for i, is_right in enumerate(right) if is_right):x}"


def paired_counts(first: Sequence[bool], second: Sequence[bool]) -> dict[str, int]:
    """Count the sentences that both models get right, only one of them, or neither."""
    counts = Counter(zip(first, second, strict=True))
    cases = itertools.product((True, False), repeat=2)
    return {name: counts[case] for name, case in zip(PAIRED, cases, strict=True)}


def stepper(model: torch.nn.Module, batches: list[dict]) -> Callable[[], float]:
    """Return a function that takes one training step on the next of the batches, going round.

    With a method of the course its hooks are part of the step; with PEFT's AdaLoRA its allocator,
    which PEFT leaves to the caller."""
    training = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=1e-5, fused=True)
    stream, count = itertools.cycle(batches), itertools.count(1)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    return lambda: train_step(model, next(stream), optimizer, next(count), after=allocate)
