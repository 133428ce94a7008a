"""The study that lesson 13 chooses by: every method of the course, on little and on much data.

    python benchmarks/choosing_study.py    # ten hours on one core

Trains on all of the training split and on its first 1,000 and 100 examples, and adds a row for each
run to data/results/choosing_study.csv. On all of the data the learning rate is the one that the
studies of lessons 02 to 11 chose; what they had not tried is tried here. On 100 examples there are
three rates around that one, on 1,000 those from the best on all to the best on 100; in both cases
more, as long as the best lies at the edge of what was tried.

`memory` is what is left of what the base could do. minilm: the share of nouns whose category the
nearest of other nouns' definitions has, by the mean of the last hidden states. tinylm: the
perplexity of such definitions, on which it was pretrained.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial

import common
import torch
from catalogue import BASES, SETTINGS, schedule, setting
from common import CHOICES, MEASURED, RUN, STEPS, Results, at_best, base_of, load, measured
from selective_study import train_in_halves

from peft_lessons import DiffPruning, evaluate, freeze, inject, load_task, load_tokenizer
from peft_lessons.data.tasks import LanguageTask, Split

ALL = 0  # examples; a row says how many they are
FEW_STEPS = {"sentiment": 100, "austen": 50}  # on 100 examples
NAMED = {"parallel": "parallel, scaled", "prompt": "prompt, text"}  # else by the same name
ONE_IN = 200  # numbers that diff pruning keeps
RATES_OF = {  # {method: rates on all of sentiment, and of Austen}
    "head": ((3e-2,), None),
    "base": (None, (0.0,)),
    "norms": ((3e-3,), (3e-2,)),
    "bitfit": ((3e-3,), None),
    "last two": ((3e-4,), (1e-2,)),
    "full": ((2e-4,), (3e-3,)),
    "lora": ((3e-3,), (1e-2, 3e-2, 1e-1)),
    "lora, all linear": ((1e-3, 3e-3), (3e-2,)),
    "qlora": ((1e-3, 3e-3), (3e-2,)),
    "dora, all linear": ((1e-3, 3e-3), (1e-2, 3e-2, 1e-1)),
    "adalora": ((3e-3, 1e-2), (1e-2, 3e-2, 1e-1)),
    "pfeiffer": ((1e-3, 3e-3), (1e-2,)),
    "parallel": ((1e-3,), (3e-3,)),
    "mixed": ((1e-3,), (3e-3,)),
    "ia3": ((3e-2,), (3e-1,)),
    "prompt": ((3e-2,), (1e-1,)),
    "prefix": ((3e-2,), (1.0,)),
    "diff": ((1e-2,), (1e-2,)),
}
# On 100 examples the middle one and its neighbours, and more if need be.
RATES = {
    task: {method: rates[i] for method, rates in RATES_OF.items() if rates[i]}
    for i, task in enumerate(BASES)
}
FAMILIES = (  # on less data these come first, then their relatives
    *("head", "base", "bitfit", "last two", "full", "lora, all linear", "qlora"),
    *("pfeiffer", "ia3", "prompt", "prefix"),
)
STAGES = (  # (examples, methods, tasks)
    (ALL, RATES_OF, BASES),
    (100, FAMILIES, BASES),
    (1000, FAMILIES, ("sentiment",)),
    (1000, FAMILIES, ("austen",)),
    (100, RATES_OF, BASES),
    (1000, RATES_OF, BASES),
)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
KEY = ("task", "method", "examples", *RUN)
COLUMNS = ("steps", "trainable", *MEASURED[:-1], "memory", MEASURED[-1])


def rates_of(results: Results, task: str, method: str, examples: int) -> tuple[float, ...]:
    """Return the rates to try; none where those of other sizes, which decide, aren't all in."""
    rates = RATES[task][method]
    if examples == ALL or not any(rates):
        return rates
    if examples == 1000:
        chosen = [best_rate(results, task, method, size) for size in (ALL, 100)]
        if None in chosen:
            return ()
        start = {*chosen, *(rate for rate in LADDER if min(chosen) < rate < max(chosen))}
    elif method == "full" and task == "sentiment":
        start = {1e-4, 2e-4, 4e-4}
    else:
        middle = LADDER.index(rates[len(rates) // 2])
        start = LADDER[middle - 1 : middle + 2]
    return widened(tuple(sorted(start)), tried_at(results, task, method, examples), CHOICES[task])


def widened(rates: tuple[float, ...], tried: dict[float, float], best: Callable) -> tuple:
    """Return rates, and one more on that side on which the best of them lies at the edge, as often
    as needed: what is chosen at last has a worse one on both sides, or the ladder ends."""
    while set(rates) <= set(tried):
        chosen = best(rates, key=tried.get)
        below, above = [r for r in LADDER if r < rates[0]], [r for r in LADDER if r > rates[-1]]
        if chosen == rates[0] and below:
            rates = (below[-1], *rates)
        elif chosen == rates[-1] and above:
            rates = (*rates, above[0])
        else:
            break
    return rates


def tried_at(results: Results, task: str, method: str, examples: int) -> dict[float, float]:
    """Return {rate: validation} of the runs of seed 0."""
    return {
        float(row["lr"]): float(row["validation"])
        for row in results.rows()
        if (row["task"], row["method"], row["seed"]) == (task, method, "0")
        and (int(row["examples"]) == examples or (examples == ALL and int(row["examples"]) > 1000))
    }


def best_rate(results: Results, task: str, method: str, examples: int) -> float | None:
    """Return the rate that the validation split chose, once all of them were tried."""
    tried = tried_at(results, task, method, examples)
    rates = rates_of(results, task, method, examples)
    return CHOICES[task](rates, key=tried.get) if set(rates) <= set(tried) else None


def build(task: str, method: str, steps: int, seed: int) -> torch.nn.Module:
    """Return the base with a method in it, ready to train."""
    model, plan = base_of(task, seed), schedule(steps) if method == "adalora" else {}
    if method == "diff":
        inject(model, DiffPruning())
    elif (name := NAMED.get(method, method)) in SETTINGS:
        inject(model, setting(name, task, **plan))
    elif method != "full":  # the head, or nothing
        freeze(model)
    return model


@cache
def definitions() -> LanguageTask:
    """Return definitions of nouns, as tinylm read them in its pretraining."""
    nouns, tokenizer = load_task("wordnet"), load_tokenizer("tinylm")
    texts = tuple(nouns.texts("test"))
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    blocks = Split(texts, tuple((*ids, tokenizer.eos_token_id) for ids in tokens))
    return LanguageTask("definitions", {"test": blocks}, tokenizer, 128)


@torch.no_grad()
def vectors(model, task, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit vectors (texts, width), the means of the last hidden states, and their labels."""
    model.eval()
    means, labels = [], []
    for batch in task.batches(split, 64, by_length=True):
        labels.append(batch.pop("labels"))
        mask = batch["attention_mask"][..., None]  # (texts, tokens, 1)
        states = model(**batch, output_hidden_states=True).hidden_states[-1]
        states = states[:, -mask.shape[1] :]  # behind a prompt, if there is one
        means.append((states * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(means)), torch.cat(labels)


def memory(model, known) -> float:
    """Measure what the model still can of what the base could: see the top of the file."""
    if isinstance(known, LanguageTask):
        return evaluate(model, known).perplexity
    (near, names), (asked, labels) = (vectors(model, known, split) for split in ("train", "test"))
    return (names[(asked @ near.T).argmax(dim=1)] == labels).float().mean().item()


def run(name: str, method: str, examples: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    task = load(name)
    known = definitions() if name == "austen" else load_task("wordnet").limit(train=780)
    if examples < task.size("train"):
        task = task.limit(train=examples)
    steps = FEW_STEPS[name] if examples == 100 else STEPS[name]
    model, train = build(name, method, steps, seed), common.plain
    if method == "diff":
        train = partial(train_in_halves, one_in=ONE_IN)
    row = measured(model, task, lr, seed, train, steps)
    return row | {"memory": f"{memory(model, known):.5f}"}


def stage(size: int, methods: Iterable[str], tasks: Iterable[str]) -> Callable:
    """Return what a stage still lacks, as a function of the table: its rates depend on its rows."""

    def points(results: Results) -> list[tuple]:
        rates = {
            (task, method, size or load(task).size("train")): rates_of(results, task, method, size)
            for task in tasks
            for method in RATES[task]
            if method in methods
        }
        return at_best(rates)(results)

    return points


if __name__ == "__main__":
    for each in STAGES:
        common.fill_table("choosing_study", KEY, COLUMNS, stage(*each), run)
