"""Does AdaLoRA's score find where rank is needed, and does it pay?

    python benchmarks/score_study.py       # an hour on one core

Trains tinylm on Jane Austen's novels on all linear layers, 60 steps of 8 blocks, with a budget of
one triplet a matrix, and adds a row for each run to data/results/score_study.csv. The scaling s is
16/6 in every run. `validation` and `test` are perplexities on the first blocks of a split, `losses`
the test losses, nats a token, of groups of ten neighbouring blocks. `ranks` is the map: a group of
seven digits for each block of the model, the ranks of query, key, value and output projection and
of gate, up and down projection, with a, b, ... for 10, 11, ... `kept` counts the parameters that
are left when pruning is over.

Method adalora: PΛQ of rank 6, pruned to 42 triplets by the score of `split`: `S` is AdaLoRA's own,
`magnitude` is |λ|·‖p‖·‖q‖, `random` a random order, `S in its layer` keeps one triplet in every
matrix. `even 1` starts with rank 1, and nothing is pruned.

Method lora: a rank for each matrix. `map of S`, `map of magnitude` and `map of random` are the
ranks that AdaLoRA's run of this seed ended with, `another seed` those that S left another seed;
`shuffled` permutes the ranks of S over all matrices, `blocks shuffled` over the blocks, each kind
of matrix by itself; `4 × map of S` multiplies them, and `even 4` has as many triplets. The others
give the same ranks to every block.

A row of learning rates goes on until the best one by the validation split lies inside; those of
`SHARED` have the best one of another split."""

import math
import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar
from unittest import mock

import torch
from catalogue import setting
from common import RUN, SEEDS, Results, around, base_of, fill_table

from peft_lessons import evaluate, fit, inject, load_task
from peft_lessons.engine import injection_of
from peft_lessons.engine.targets import find_targets
from peft_lessons.methods import adalora
from peft_lessons.methods.lora import LinearWithLoRA, LoRA
from peft_lessons.train.loop import History

SIZE = {"initial_rank": 6, "target_rank": 1, "alpha": 16}
SCHEDULE = {"tinit": 10, "tfinal": 20, "delta": 2, "total_steps": 60}
SCALING, STEPS, BATCH = 16 / 6, 60, 8
BLOCKS = {"validation": 100, "test": 200}
RATES = (0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES, DEPTH = len(NAMES), 6
BY_HAND = {  # ranks of query, key, value, output, gate, up and down in every block
    "even 1": (1,) * MODULES,
    "even 2": (2,) * MODULES,
    "even 4": (4,) * MODULES,
    "down 4, gate 2": (0, 0, 0, 0, 2, 0, 4),
    "down 3, gate 2": (0, 0, 0, 0, 2, 0, 3),
    "feed-forward 2": (0, 0, 0, 0, 2, 2, 2),
    "attention 3": (3, 3, 3, 3, 0, 0, 0),
}
TUNED = {  # (method, split): the learning rate to begin with
    ("adalora", "S"): 0.06,
    ("adalora", "even 1"): 0.06,
    ("adalora", "random"): 0.06,
    ("adalora", "magnitude"): 0.06,
    ("adalora", "S in its layer"): 0.06,
    ("lora", "even 1"): 0.03,
    ("lora", "even 2"): 0.03,
    ("lora", "map of S"): 0.03,
    ("lora", "shuffled 1"): 0.03,
    ("lora", "down 4, gate 2"): 0.03,
    ("lora", "feed-forward 2"): 0.03,
    ("lora", "attention 3"): 0.03,
    ("lora", "even 4"): 0.03,
    ("lora", "4 × map of S"): 0.03,
}
SHARED = {  # (method, split): the one whose best learning rate it has
    ("lora", "another seed"): ("lora", "map of S"),
    ("lora", "shuffled 2"): ("lora", "map of S"),
    ("lora", "shuffled 3"): ("lora", "map of S"),
    ("lora", "blocks shuffled"): ("lora", "map of S"),
    ("lora", "map of magnitude"): ("lora", "map of S"),
    ("lora", "map of random"): ("lora", "map of S"),
    ("lora", "down 3, gate 2"): ("lora", "map of S"),
}
KEY = ("task", "method", "split", *RUN)
COLUMNS = ("kept", "validation", "test", "losses", "ranks", "seconds_per_step")
adalora_score = adalora.triplet_scores


@cache
def task():
    """Return Austen with fewer blocks to validate and test on."""
    return load_task("austen").limit(**BLOCKS)


def table() -> Results:
    """Return the table of all runs."""
    return Results("score_study", KEY, COLUMNS)


def chosen(results: Results, method: str, split: str) -> tuple[Sequence[float], float | None]:
    """Return the learning rates to try with the first seed, and the best of them once all ran."""
    names = "austen", method, split, str(SEEDS[0])
    tried = {
        float(row["lr"]): float(row["validation"])
        for row in results.rows()
        if (row["task"], row["method"], row["split"], row["seed"]) == names
    }
    rates = around(tried, RATES, RATES.index(TUNED[method, split]))
    return rates, min(rates, key=tried.get) if set(rates) <= set(tried) else None


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    due, best = [("austen", "none", "", 0.0, SEEDS[0])], {}
    for names in TUNED:
        rates, best[names] = chosen(results, *names)
        due += [("austen", *names, rate, SEEDS[0]) for rate in rates]
        due += [("austen", *names, best[names], seed) for seed in SEEDS[1:] if best[names]]
    for names, other in SHARED.items():
        due += [("austen", *names, best[other], seed) for seed in SEEDS if best[other]]
    return due


def map_of(split: str, seed: int) -> torch.Tensor:
    """Return the ranks (blocks, modules) that a run of AdaLoRA at its best learning rate ended
    with."""
    results = table()
    point = "austen", "adalora", split, str(chosen(results, "adalora", split)[1]), str(seed)
    (row,) = (row for row in results.rows() if tuple(row[column] for column in KEY) == point)
    return torch.tensor([[int(digit) for digit in block] for block in row["ranks"].split()])


def ranks_of(split: str, seed: int) -> torch.Tensor:
    """Return the ranks (blocks, modules) of a LoRA."""
    if split in BY_HAND:
        return torch.tensor([BY_HAND[split]] * DEPTH)
    if split.startswith("map of "):
        return map_of(split.removeprefix("map of "), seed)
    if split == "4 × map of S":
        return 4 * map_of("S", seed)
    if split == "another seed":
        return map_of("S", (seed + 1) % len(SEEDS))
    ranks, number = map_of("S", seed), split.removeprefix("shuffled ")
    generator = torch.Generator().manual_seed(10 * seed + int(number) if number in "123" else seed)
    if split == "blocks shuffled":
        columns = [column[torch.randperm(DEPTH, generator=generator)] for column in ranks.T]
        return torch.stack(columns, dim=1)
    return ranks.flatten()[torch.randperm(ranks.numel(), generator=generator)].view(ranks.shape)


class ByMap(LoRA):
    """LoRA with a rank of its own in each matrix, and the same scaling in all of them."""

    rank_of: ClassVar[dict[str, int]] = {}  # {path: rank}

    def wrap(self, path, layer):
        rank = self.rank_of[path]
        return LinearWithLoRA(layer, rank, SCALING * rank)


def inject_point(model: torch.nn.Module, method: str, split: str, seed: int) -> None:
    """Add the method of a point to a model, in place."""
    paths = list(find_targets(model, "all-linear", (torch.nn.Linear,)))
    if method == "lora":
        ranks = ranks_of(split, seed).flatten().tolist()
        ByMap.rank_of = {path: rank for path, rank in zip(paths, ranks, strict=True) if rank}
        inject(model, ByMap(targets=tuple(ByMap.rank_of)))
    elif method == "adalora":
        one = (True, *[False] * (SIZE["initial_rank"] - 1))  # rank 1, and s as of rank 6
        kept = tuple((path, one) for path in paths) if split == "even 1" else None
        inject(model, setting("adalora", "austen", **SIZE, **SCHEDULE, kept=kept))


def scores_of(split: str, seed: int) -> Callable:
    """Return the function (branch) -> scores (r,) that AdaLoRA is to prune by."""
    orders, generator = {}, torch.Generator().manual_seed(seed)

    def random(branch):
        if branch not in orders:
            orders[branch] = torch.rand(len(branch.lora_E), generator=generator)
        return orders[branch]

    def magnitude(branch):
        lengths = branch.lora_A.norm(dim=1) * branch.lora_B.norm(dim=0)
        return branch.lora_E.flatten().abs() * lengths

    def in_its_layer(branch):  # the place in the layer, and S among those of equal place
        score = adalora_score(branch)
        return score.argsort().argsort() + score / (1 + score)

    rules = {"random": random, "magnitude": magnitude, "S in its layer": in_its_layer}
    return rules.get(split, adalora_score)


def spent(model: torch.nn.Module) -> tuple[str, int]:
    """Return the ranks of a trained model, seven digits a block, and the parameters in them."""
    ranks, kept = torch.zeros(DEPTH, MODULES, dtype=int), 0
    wrappers = injection_of(model).wrappers if injection_of(model) else {}
    for path, wrapper in wrappers.items():
        _, _, block, _, module = path.split(".")
        is_lora = isinstance(wrapper, LinearWithLoRA)
        rank = len(wrapper.lora.lora_A) if is_lora else int(wrapper.ada.lora_E.count_nonzero())
        ranks[int(block), NAMES.index(module)] = rank
        kept += rank * (sum(wrapper.base.weight.shape) + (not is_lora))  # PΛQ has a λ more
    digits = string.digits + string.ascii_lowercase
    return " ".join("".join(digits[rank] for rank in block) for block in ranks.tolist()), kept


def run(name: str, method: str, split: str, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, history = base_of(name, seed), History()
    inject_point(model, method, split, seed)
    if lr:
        with mock.patch.object(adalora, "triplet_scores", scores_of(split, seed)):
            history = fit(model, task(), STEPS, lr=lr, batch_size=BATCH, seed=seed, show=False)
    groups = [evaluate(model, [batch]) for batch in task().batches("test", 10)]
    loss = sum(group.loss * group.n for group in groups) / sum(group.n for group in groups)
    ranks, kept = spent(model)
    return {
        "kept": kept,
        "validation": f"{evaluate(model, task(), 'validation').perplexity:.4f}",
        "test": f"{math.exp(loss):.4f}",
        "losses": " ".join(f"{group.loss:.4f}" for group in groups),
        "ranks": ranks,
        "seconds_per_step": f"{history.seconds / STEPS:.4f}",
    }


if __name__ == "__main__":
    fill_table("score_study", KEY, COLUMNS, points, run)
