"""What the benchmarks share: tables that grow run by run, the studies of methods at their best
learning rates, and the training step that is timed.

A study trains minilm on movie sentiment (200 steps), tinylm on Jane Austen's novels (100 steps), or
both. It tries every setting at each of its learning rates with one seed, and runs the best one by
the validation split with two seeds more. Rows that are there are not run again, so a study can be
stopped and started at will; `--backwards` lets a second process help from the end."""

import csv
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from peft_lessons import evaluate, fit, load_model, load_task, measure
from peft_lessons.engine import injection_of
from peft_lessons.studies import stamp
from peft_lessons.studies.catalogue import BASES
from peft_lessons.train.loop import History

FOLDER = Path(__file__).parent.parent / "data" / "results"
SEEDS = (0, 1, 2)


class Results:
    """A table data/results/<name>.csv that grows row by row, shared by two processes if need be."""

    def __init__(self, name: str, columns: Iterable[str], anew: bool = False):
        self.path, self.columns = FOLDER / f"{name}.csv", (*columns, *stamp())
        if anew or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(self.columns) + "\n", encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def add(self, **values) -> None:
        """Append a row, stamped; a GPU benchmark names its own machine. ValueError for a value
        without its column."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writerow(stamp() | values)


def missing(results: Results, key: Sequence[str], points: Iterable[tuple]) -> list[tuple]:
    """The points, values of the columns `key`, without a row yet."""
    done = {tuple(row[column] for column in key) for row in results.rows()}
    return [point for point in points if tuple(map(str, point)) not in done]


def fill(
    results: Results,
    key: Sequence[str],
    to_do: Callable[[], list[tuple]],
    run: Callable[..., dict],
    backwards: bool = False,
) -> None:
    """Run the points that `to_do()` lists and add their rows, until it lists none.

    `run(*point)` returns at least the other columns than `key`."""
    while points := to_do():
        point = points[-1 if backwards else 0]
        found = run(*point)
        row = {c: found[c] for c in results.columns if c in found and c not in key}
        if point in to_do():  # the other process may have been there too
            results.add(**dict(zip(key, point, strict=True)), **row)
            print(*point, row, flush=True)


def to_do(
    results: Results, names: Sequence[str], rates: dict[tuple, Sequence[float]], best: Callable
) -> list[tuple]:
    """(*setting, rate, seed) of the runs without a row yet, those that others wait for first.

    rates: for each setting, its values of the columns `names`, the learning rates to try.
    best: min or max, of the column `validation`."""

    key = (*names, "lr", "seed")
    done = {tuple(row[column] for column in key): row for row in results.rows()}
    points = [(*setting, lr, SEEDS[0]) for setting, tried in rates.items() for lr in tried]
    for setting, tried in rates.items():
        rows = {lr: done.get(tuple(map(str, (*setting, lr, SEEDS[0])))) for lr in tried}
        if any(tried) and all(rows.values()):
            chosen = best(tried, key=lambda lr, rows=rows: float(rows[lr]["validation"]))
            points += [(*setting, chosen, seed) for seed in SEEDS[1:]]
    return missing(results, key, points)


STEPS = {"sentiment": 200, "austen": 100}
CHOICES = {"sentiment": max, "austen": min}  # of accuracies, of perplexities
NAMES = ("task", "method", "variant", "size")  # of a setting of a study on both tasks
MEASURED = ("validation", "test", "test_loss", "seconds_per_step")
BEFORE_TOO = ("steps", "trainable", "untrained", *MEASURED)


def load(task: str, validation: int = 250):
    """Load a task; of Austen so many blocks are enough to choose a learning rate by."""
    return load_task(task).limit(validation=validation) if task == "austen" else load_task(task)


def study(
    name: str,
    names: Sequence[str],
    columns: Sequence[str],
    settings: dict[tuple, Sequence[float]],
    run: Callable[..., dict],
    tasks: dict,
) -> None:
    """Run every setting, {values of `names`: rates}, into data/results/<name>.csv.

    tasks: {name: task}; where there are several the first of `names` is the task.
    `run(task, *setting, lr, seed)` trains one point and returns at least the `columns`."""
    torch.set_num_threads(1)
    backwards = "--backwards" in sys.argv
    results = Results(name, (*names, "lr", "seed", *columns))
    for task in list(tasks)[:: -1 if backwards else 1]:
        rates = {s: tried for s, tried in settings.items() if len(tasks) == 1 or s[0] == task}
        left = partial(to_do, results, names, rates, CHOICES[task])
        fill(results, (*names, "lr", "seed"), left, partial(run, tasks[task]), backwards)


def base_of(task: str, seed: int) -> torch.nn.Module:
    """The base of a task, its head and what is injected next drawn with this seed."""
    model = load_model(BASES[task], labels=2 if task == "sentiment" else None, seed=seed)
    torch.manual_seed(seed)
    return model


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


def paired_counts(first: list[bool], second: list[bool]) -> dict[str, int]:
    """Count the sentences that both models get right, only one of them, or neither."""
    pairs = Counter(zip(first, second, strict=True))
    return {
        "both": pairs[True, True],
        "only_first": pairs[True, False],
        "only_second": pairs[False, True],
        "neither": pairs[False, False],
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
