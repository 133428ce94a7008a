"""What the benchmarks share: their tables in data/results/, and what every row says of its run."""

import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from peft_lessons import evaluate, fit, injection_of, measure
from peft_lessons.results import stamp

FOLDER = Path(__file__).parent.parent / "data" / "results"


class Results:
    """A table data/results/<name>.csv that grows row by row, shared by two processes if need be."""

    def __init__(self, name: str, columns: Iterable[str], anew: bool = False):
        self.path, self.columns = FOLDER / f"{name}.csv", (*columns, *stamp())
        if anew or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(self.columns) + "\n")

    def rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(self, **values) -> None:
        """Append a row, stamped; a GPU benchmark names its own machine. ValueError for a value
        without its column."""
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writerow(stamp() | values)


SEEDS = (0, 1, 2)


def to_do(
    results: Results, names: Sequence[str], rates: dict[tuple, Sequence[float]], best: Callable
) -> list[tuple]:
    """(*setting, rate, seed) of the runs without a row yet, those that others wait for first.

    rates: for each setting, its values of the columns `names`, the learning rates to try.
    best: min or max, of the column `validation`."""

    def key(point: Iterable) -> tuple[str, ...]:
        return tuple(map(str, point))

    done = {key(row[n] for n in (*names, "lr", "seed")): row for row in results.rows()}
    points = [(*setting, lr, SEEDS[0]) for setting, tried in rates.items() for lr in tried]
    for setting, tried in rates.items():
        rows = {lr: done.get(key((*setting, lr, SEEDS[0]))) for lr in tried}
        if any(tried) and all(rows.values()):
            chosen = best(tried, key=lambda lr, rows=rows: float(rows[lr]["validation"]))
            points += [(*setting, chosen, seed) for seed in SEEDS[1:]]
    return [point for point in points if key(point) not in done]


def tune(
    results: Results,
    names: Sequence[str],
    rates: dict[tuple, Sequence[float]],
    run: Callable[..., dict],
    best: Callable = max,
    backwards: bool = False,
) -> None:
    """Run every setting at each of its rates with one seed, and at the best one with two more.

    `run(*setting, lr, seed)` returns the other columns. Rows that are there are not run again, so a
    study can be stopped and started at will, and a second process can help from the other end."""
    while points := to_do(results, names, rates, best):
        point = points[-1 if backwards else 0]
        row = run(*point)
        if point in to_do(results, names, rates, best):  # the other process may have been there too
            results.add(**dict(zip((*names, "lr", "seed"), point, strict=True)), **row)
            print(*point, row, flush=True)


def train_on(task, model: torch.nn.Module, steps: int, lr: float, seed: int) -> dict:
    """Train a classifier, and return what its row says of the run."""
    trainable = measure.parameters(model).trainable
    history = fit(model, task, steps, lr=lr, seed=seed, show=False)
    test = evaluate(model, task, "test")
    return {
        "trainable": trainable,
        "validation": round(evaluate(model, task, "validation").accuracy, 5),
        "test": round(test.accuracy, 5),
        "test_loss": round(test.loss, 5),
        "seconds_per_step": round(history.seconds / steps, 4),
    }


def stepper(model: torch.nn.Module, batches: list[dict]) -> Callable[[], None]:
    """A function that takes one training step on the next of the batches, going round.

    With a method of the course its hooks are part of the step; with PEFT's AdaLoRA its allocator,
    which PEFT leaves to the caller."""
    training = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, stream = torch.optim.AdamW(training, lr=1e-5, fused=True), itertools.cycle(batches)
    injection, count = injection_of(model), itertools.count(1)
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)

    def step():
        loss, number = model(**next(stream)).loss, next(count)
        if injection:
            loss = loss + injection.method.penalty(injection)
        loss.backward()
        optimizer.step()
        if injection:
            injection.method.after_step(injection, number)
        elif allocate:
            allocate(number)
        optimizer.zero_grad()

    return step


def by_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, all called once a round: a busy moment meets all alike.

    Every second round goes backwards, so that none always runs in the caches of the same other."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            functions[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
