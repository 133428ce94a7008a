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
from common import SEEDS, Results, at_best, base_of, fill_table, load
from peft.tuners.lora.intruders import reduce_intruder_dimension
from variants_study import EPSILON, K, cosines, shifted, weights_of

from peft_lessons import evaluate, fit, inject, load_task, load_tokenizer, save_adapter
from peft_lessons.data.tasks import LanguageTask, Split
from peft_lessons.engine import merge, unload

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


def best_rate(name: str) -> float:
    """Return the learning rate that was chosen: the only one with another seed than the first."""
    rows = Results("after_study", KEY, COLUMNS).rows()
    chosen = (row for row in rows if (row["way"], row["seed"]) == (name, str(SEEDS[1])))
    return float(next(chosen)["factor"])


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
    return row | {"intruders": shifted(weights_of(base_of("austen", 0)), model)[0]}


def opened(seed: int) -> peft.PeftModel:
    """Return tinylm in PEFT with the adapters of both texts."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("austen", "reviews"):
            save_adapter(trained(name, best_rate(name), seed), Path(folder, name))
        base, first = base_of("austen", 0), Path(folder, "austen")
        model = peft.PeftModel.from_pretrained(base, first, "austen")
        model.load_adapter(Path(folder, "reviews"), "reviews")
    return model


@torch.no_grad()
def reduce(base: torch.nn.Module, model: torch.nn.Module, factor: float) -> None:
    """Scale the intruder dimensions of a plain model's linear layers, in place."""
    for path, before in weights_of(base).items():
        weight = model.get_submodule(path).weight
        U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
        S[:K] *= torch.where(cosines(before, weight) < EPSILON, factor, 1.0)
        weight.copy_(U * S @ Vt)


def changed(way: str, factor: float, seed: int) -> torch.nn.Module:
    """Return the plain model that a way makes of the adapters."""
    model = opened(seed)
    if way == "reduced":
        settings = {"threshold_epsilon": EPSILON, "mitigation_lambda": factor}
        reduce_intruder_dimension(model, "austen", way, **settings, logging_sink=None)
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


if __name__ == "__main__":
    rates = {(name,): tried for name, tried in RATES.items()}
    fill_table("after_study", KEY, COLUMNS, at_best(rates, min), run)
    ways = [(*way, seed) for seed in SEEDS for way in WAYS]
    fill_table("after_study", KEY, COLUMNS, ways, run)
