"""A task for which the vectors of frozen minilm are not enough: were neighbouring tokens swapped?

    python benchmarks/swap_study.py        # twenty minutes on one core

Sentences of the movie reviews are cut to 10 tokens between [CLS] and [SEP]. In every second one two
neighbours at a random place are swapped, three times (an odd number of swaps never restores the
order). Is a sentence one of these? Trains the head alone, LoRA on all linear layers (alpha 16) and
the whole model for 200 steps of 16 sentences, each at learning rates around the best one, and adds
a row for each run to data/results/swap_study.csv. Train, validation and test sentences are those of
the task's splits."""

from functools import cache

import torch
from catalogue import setting
from choosing_study import widened
from common import RUN, Results, at_best, base_of, fill_table

from peft_lessons import evaluate, fit, freeze, inject, load_task, load_tokenizer, measure

TASK = "swaps"
BODY, SWAPS = 10, 3
STEPS, BATCH = 200, 16
HELD_OUT = {"validation": 500, "test": 1000}  # sentences
SETTINGS = {  # (task, method, rank): rates to begin with
    (TASK, "head", 0): (1e-2, 3e-2, 1e-1),
    **{(TASK, "lora", rank): (3e-4, 1e-3, 3e-3) for rank in (8, 1)},
    (TASK, "full", 0): (1e-4, 2e-4, 4e-4),
    **{(TASK, "lora", rank): (3e-4, 1e-3, 3e-3) for rank in (4, 2)},
}
COLUMNS = ("steps", "trainable", "validation", "test", "test_loss", "train_loss")


@cache
def sentences(split: str) -> torch.Tensor:
    """Return the token ids (n, BODY + 2) of the sentences of a split that are long enough."""
    tokenizer = load_tokenizer("minilm")
    rows = tokenizer(load_task("sentiment").texts(split))["input_ids"]
    return torch.tensor([[*row[: BODY + 1], row[-1]] for row in rows if len(row) >= BODY + 2])


def swapped(ids: torch.Tensor, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    """Return batches of the sentences (n, tokens), every second one with swapped neighbours and
    label 1."""
    ids = ids.clone()
    for row in ids[1::2]:
        for place in 1 + torch.randint(BODY - 1, (SWAPS,), generator=generator):
            row[place : place + 2] = row[place : place + 2].flip(0)
    labels = torch.arange(len(ids)) % 2
    pairs = zip(ids.split(BATCH), labels.split(BATCH), strict=True)
    return [{"input_ids": i, "labels": label} for i, label in pairs]


def to_train(seed: int) -> list[dict[str, torch.Tensor]]:
    """Return the batches of a training, in which no sentence occurs twice."""
    generator, every = torch.Generator().manual_seed(seed), sentences("train")
    order = torch.randperm(len(every), generator=generator)[: STEPS * BATCH]
    return swapped(every[order], generator)


@cache
def held_out(split: str) -> list[dict[str, torch.Tensor]]:
    """Return the batches of a held-out split, the same for all runs."""
    return swapped(sentences(split)[: HELD_OUT[split]], torch.Generator().manual_seed(0))


def run(task: str, method: str, rank: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = base_of("sentiment", seed)
    if method == "lora":
        inject(model, setting("lora, all linear", "sentiment", rank=rank))
    elif method == "head":
        freeze(model)
    trainable = measure.parameters(model).trainable
    history = fit(model, to_train(seed), STEPS, lr=lr, seed=seed, show=False)
    validation, test = (evaluate(model, held_out(split)) for split in HELD_OUT)
    return {
        "steps": STEPS,
        "trainable": trainable,
        "validation": f"{validation.accuracy:.5f}",
        "test": f"{test.accuracy:.5f}",
        "test_loss": f"{test.loss:.5f}",
        "train_loss": f"{sum(history.loss[-30:]) / 30:.5f}",
    }


def points(results: Results) -> list[tuple]:
    """Return the points that are due: each setting's rates, widened until the best one by the
    validation split lies inside, then that one with two seeds more."""
    rates = {}
    for names, first in SETTINGS.items():
        tried = {
            float(row["lr"]): float(row["validation"])
            for row in results.rows()
            if (row["method"], int(row["rank"]), row["seed"]) == (*names[1:], "0")
        }
        rates[names] = widened(first, tried, max)
    return at_best(rates, max)(results)


if __name__ == "__main__":
    fill_table("swap_study", ("task", "method", "rank", *RUN), COLUMNS, points, run)
