"""The runs of the growing chart: every method by one rule, in the setting of its own lesson.

    python benchmarks/growing_study.py     # half an hour on one core

minilm on movie sentiment, 200 steps. The rule: learning rates on both sides of the best one are
tried with one seed. The best one on the validation split runs with three, and so does the second
best if it is less than CLOSE behind; then the mean over the seeds decides. A run that another study
has is taken from its table, the others are trained; data/results/growing_study.csv gets a row for
each."""

from collections.abc import Mapping
from functools import cache

from catalogue import schedule, setting
from common import RUN, SEEDS, STEPS, Results, base_of, fill_table, load, measured

from peft_lessons import freeze, inject
from peft_lessons.studies import stamp

TASK = "sentiment"
CLOSE = 0.005  # less than 5 of 904 sentences
COLUMNS = ("trainable", "validation", "test", "test_loss")
NAMED = {"prompt": "prompt, text", "sparse": "sparse, random"}  # else by the same name
MIDDLE = (1e-3, 3e-3, 1e-2)


def lora(**values: str) -> tuple[str, dict[str, str]]:
    """Return where the runs of lesson 02's study are."""
    return "lora_study", {"steps": "200"} | values


def of(study: str, method: str, variant: str = "", size: int = 0) -> tuple[str, dict[str, str]]:
    """Return where the runs of a study on both tasks are."""
    return study, {"task": TASK, "method": method, "variant": variant, "size": str(size)}


def chosen(method: str) -> tuple[str, dict[str, str]]:
    """Return where the runs of lesson 13's study are."""
    return "choosing_study", {"task": TASK, "method": method, "examples": "6377"}


DOTS = {  # {method: (learning rates, the tables that have runs of it)}
    "head": ((3e-3, 1e-2, 3e-2, 1e-1), lora(method="head")),
    "full": ((1e-4, 2e-4, 4e-4), lora(method="full")),
    "lora": (MIDDLE, lora(targets="qv", rank="8", alpha="16")),
    "lora, all linear": ((3e-4, *MIDDLE), lora(targets="all-linear", rank="8")),
    "pfeiffer": ((3e-4, *MIDDLE), of("additive_study", "adapter", "pfeiffer", 16)),
    "parallel": (MIDDLE, of("additive_study", "adapter", "parallel", 16)),
    "prompt": ((1e-2, 3e-2, 1e-1), of("additive_study", "prompt", "text", 16)),
    "qlora": ((3e-4, *MIDDLE), chosen("qlora")),
    "dora, all linear": (MIDDLE, chosen("dora, all linear")),
    "adalora": ((3e-3, 1e-2, 3e-2), chosen("adalora")),
    "ia3": ((1e-2, 3e-2, 1e-1), of("additive_study", "ia3")),
    "prefix": ((1e-2, 3e-2, 1e-1), of("additive_study", "prefix", "random", 16)),
    "bitfit": (MIDDLE, of("selective_study", "bitfit")),
    "norms": (MIDDLE, of("selective_study", "norms")),
    "last two": ((1e-4, 3e-4, 1e-3, 3e-3), of("selective_study", "last", size=2)),
    "sparse": ((*MIDDLE, 3e-2), of("selective_study", "sparse", "random", 8)),
    "mixed": ((3e-4, 1e-3, 3e-3), of("mixing_study", "mixed", "4", 8)),
}


@cache
def table(name: str) -> list[dict[str, str]]:
    """Return the rows of another study."""
    return Results(name, (), ()).rows()


def elsewhere(method: str, lr: float, seed: int) -> Mapping[str, str] | None:
    """Return the row that another study has of a run."""
    for name, values in DOTS[method][1:]:
        for row in table(name):
            same = all(row[column] == value for column, value in values.items())
            if same and (float(row["lr"]), int(row["seed"])) == (lr, seed):
                return row
    return None


def run(task: str, method: str, lr: float, seed: int) -> Mapping:
    """Return the row of a run, from another study or by training."""
    if row := elsewhere(method, lr, seed):
        return {column: row[column] for column in (*COLUMNS, *stamp())}
    model = base_of(task, seed)
    if method == "head":
        freeze(model)
    elif method != "full":
        plan = schedule(STEPS[task]) if method == "adalora" else {}
        inject(model, setting(NAMED.get(method, method), task, **plan))
    return measured(model, load(task), lr, seed)


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    done = {tuple(row[c] for c in results.key): float(row["validation"]) for row in results.rows()}
    first = [(TASK, method, lr, SEEDS[0]) for method, (rates, *_) in DOTS.items() for lr in rates]
    more = []
    for method, (rates, *_) in DOTS.items():
        tried = {lr: done.get((TASK, method, str(lr), str(SEEDS[0]))) for lr in rates}
        if None not in tried.values():
            best, *others = sorted(rates, key=tried.get, reverse=True)
            near = [lr for lr in others[:1] if tried[best] - tried[lr] < CLOSE]
            more += [(TASK, method, lr, seed) for lr in (best, *near) for seed in SEEDS[1:]]
    return first + more


if __name__ == "__main__":
    fill_table("growing_study", ("task", "method", *RUN), COLUMNS, points, run)
