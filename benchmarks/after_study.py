"""The study of what can be done to trained adapters: take intruder dimensions out, and combine two.

    python benchmarks/after_study.py    # an hour on one core

tinylm learns Jane Austen's novels and sentences of movie reviews, a LoRA of rank 8 on all linear
layers for each, and a third one on both, in twice as many steps. Adds a row for each way to
data/results/after_study.csv; what changes the adapters is PEFT's own.

The rows `austen`, `reviews` and `both` are the trained adapters, with the learning rate as
`factor`; `validation`, the mean loss per token of the texts they learn, chooses it with seed 0.
`reduced` scales the intruder dimensions of the Austen adapter by `factor`
(`reduce_intruder_dimension`), which PEFT cuts back to rank 8; `reduced, any rank` leaves that out.
`scaled` scales all of the adapter, the control. The other ways are
combination types of `add_weighted_adapter`, with `factor` as the weight of both adapters; those
that drop entries keep half of them. `cat` adds the changes of the weights themselves.

`austen`, `reviews` and `definitions` are perplexities of held-out text; on definitions tinylm was
pretrained. `intruders` counts as variants_study.py does.
"""

import itertools
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import peft
import torch
from catalogue import setting
from choosing_study import definitions
from common import SEEDS, Benchmark, Results, base_of, load, main
from peft.tuners.lora.intruders import reduce_intruder_dimension
from variants_study import EPSILON, K, cosines

from peft_lessons import (
    evaluate,
    fit,
    inject,
    load_task,
    load_tokenizer,
    merge,
    save_adapter,
    unload,
)
from peft_lessons.data.tasks import LanguageTask, Split

STEPS, DENSITY = {"austen": 100, "reviews": 100, "both": 200}, 0.5
RATES = {"austen": (3e-2,), "reviews": (3e-3, 1e-2, 3e-2), "both": (3e-3, 1e-2, 3e-2)}
TYPES = ("cat", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd")
WAYS = [
    ("base", 0.0),
    *((way, factor) for way in ("reduced", "reduced, any rank") for factor in (0.75, 0.5, 0.25)),
    *(("scaled", factor) for factor in (0.9, 0.8, 0.7, 0.6, 0.5)),
    *((way, factor) for way in TYPES for factor in (1.0, 0.5)),
]
KEY = ("way", "factor", "seed")
COLUMNS = ("validation", "austen", "reviews", "definitions", "intruders")


def reviews() -> LanguageTask:
    """Return sentences of movie reviews as running text, each a piece of its own."""
    task, tokenizer = load_task("sentiment"), load_tokenizer("tinylm")
    splits = {}
    for split in ("train", "validation", "test"):
        texts = tuple(task.texts(split))
        tokens = (tokenizer(text)["input_ids"] for text in texts)
        splits[split] = Split(texts, tuple((*ids, tokenizer.eos_token_id)[:128] for ids in tokens))
    return LanguageTask("reviews", splits, tokenizer, 128)


@cache
def tasks() -> dict[str, LanguageTask]:
    """Return the texts on which every row has a perplexity."""
    return {"austen": load("austen"), "reviews": reviews(), "definitions": definitions()}


@cache
def trained(name: str, lr: float, seed: int) -> torch.nn.Module:
    """Return tinylm with an adapter that learned one kind of text, or both."""
    streams = [tasks()[text].stream(16, seed) for text in ("austen", "reviews")]
    mixed = itertools.chain.from_iterable(zip(*streams, strict=True))
    data = tasks().get(name) or list(itertools.islice(mixed, STEPS[name]))
    model = base_of("austen", seed)
    inject(model, setting("lora, all linear", "austen"))
    fit(model, data, STEPS[name], lr=lr, seed=seed, show=False)
    return model


def best_rate(results: Results, name: str) -> float | None:
    """Return the learning rate that validation chose with the first seed, once all were tried."""
    first = {
        float(row["factor"]): float(row["validation"])
        for row in results.rows()
        if (row["way"], row["seed"]) == (name, str(SEEDS[0]))
    }
    return min(first, key=first.get) if {*first} == {*RATES[name]} else None


def points(results: Results) -> list[tuple]:
    """Return the points that are due: what is made of the adapters waits for their rates."""
    due = [(name, lr, SEEDS[0]) for name, rates in RATES.items() for lr in rates]
    best = {name: best_rate(results, name) for name in RATES}
    if None in best.values():
        return due
    for seed in SEEDS:
        due += [(name, lr, seed) for name, lr in best.items()] if seed != SEEDS[0] else []
        due += [(*way, seed) for way in WAYS]
    return due


def run(way: str, factor: float, seed: int) -> dict:
    """Train an adapter, or change trained ones, and return what the row says of it."""
    if way not in RATES:
        return measured(changed(way, factor, seed).eval())
    learned = [way] if way in tasks() else ["austen", "reviews"]
    plain = deepcopy(trained(way, factor, seed))
    losses = [evaluate(plain, tasks()[text], "validation").loss for text in learned]
    merge(plain)
    unload(plain)
    return {"validation": f"{sum(losses) / len(losses):.5f}"} | measured(plain)


def measured(model: torch.nn.Module) -> dict:
    """Return what a row says of a plain model."""
    row = {name: f"{evaluate(model, task).perplexity:.4f}" for name, task in tasks().items()}
    return row | {"intruders": intruders(base_of("austen", 0), model)}


def opened(seed: int) -> peft.PeftModel:
    """Return tinylm in PEFT with the adapters of both texts."""
    results = Results("after_study", KEY, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("austen", "reviews"):
            save_adapter(trained(name, best_rate(results, name), seed), Path(folder, name))
        base, first = base_of("austen", 0), Path(folder, "austen")
        model = peft.PeftModel.from_pretrained(base, first, "austen")
        model.load_adapter(Path(folder, "reviews"), "reviews")
    return model


@torch.no_grad()
def reduce(base: torch.nn.Module, model: torch.nn.Module, factor: float) -> None:
    """Scale the intruder dimensions of a plain model's linear layers, in place."""
    for path in layers_of(base):
        before, weight = base.get_submodule(path).weight, model.get_submodule(path).weight
        U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
        S[:K] *= torch.where(cosines(before, weight) < EPSILON, factor, 1.0)
        weight.copy_(U * S @ Vt)


def changed(way: str, factor: float, seed: int) -> torch.nn.Module:
    """Return the plain model that a way makes of the adapters."""
    model = opened(seed)
    if way == "reduced":
        reduce_intruder_dimension(
            model,
            "austen",
            way,
            threshold_epsilon=EPSILON,
            mitigation_lambda=factor,
            logging_sink=None,
        )
    elif way == "reduced, any rank":
        model.set_adapter("austen")
        plain = model.merge_and_unload()
        reduce(base_of("austen", 0), plain, factor)
        return plain
    elif way == "scaled":
        model.add_weighted_adapter(["austen"], [factor], way, "cat")
        model.set_adapter(way)
    elif way != "base":
        torch.manual_seed(seed)  # DARE drops at random
        density = {} if way in ("cat", "linear") else {"density": DENSITY}
        svd = {"svd_rank": 16} if way.endswith("svd") else {}
        model.add_weighted_adapter(["austen", "reviews"], [factor] * 2, way, way, **density, **svd)
        model.set_adapter(way)
    if way == "base":
        return model.unload()
    return model.merge_and_unload()


def layers_of(model: torch.nn.Module) -> list[str]:
    """Return the paths of the linear layers of all blocks."""
    named = model.named_modules()
    return [path for path, m in named if isinstance(m, torch.nn.Linear) and "layers" in path]


def intruders(before: torch.nn.Module, after: torch.nn.Module) -> int:
    """Count the intruder dimensions of the linear layers of all blocks."""
    weights = (
        [m.get_submodule(path).weight for m in (before, after)] for path in layers_of(before)
    )
    return sum(int((cosines(*pair) < EPSILON).sum()) for pair in weights)


if __name__ == "__main__":
    main(Benchmark("after_study", KEY, COLUMNS, points, run))
