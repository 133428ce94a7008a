"""What the benchmarks share: their tables in data/results/, and what every row says of its run."""

import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

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


def stepper(model: torch.nn.Module, batches: list[dict]) -> Callable[[], None]:
    """A function that takes one training step on the next of the batches, going round."""
    training = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, stream = torch.optim.AdamW(training, lr=1e-5, fused=True), itertools.cycle(batches)

    def step():
        model(**next(stream)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, all called once a round: a busy moment meets all alike."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
