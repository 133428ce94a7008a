"""How many entries of a model must train, and does it matter which?

    python benchmarks/entries_study.py    # half an hour on one core

Trains tinylm on Jane Austen's novels for 40 steps of 2 blocks. A mask leaves `size` entries of its
2,433,024 weights in linear layers; the same steps train LoRA of rank `size` on all linear layers
with alpha 16, the norms and everything. The masks:

    random     entries drawn with the seed `draw`
    largest    the entries of largest magnitude; `smallest` those of smallest
    gradient   those of largest gradient of the loss on the first LOOKED training batches
    shared     the same, but each weight matrix gets its share of the entries by its size
    rows       the same, and each row of a matrix at most its share, rounded up

The learning rate is chosen with seed 0 by `validation`. A random mask is then drawn again for the
same batches; the others, and random masks of two sizes, train on other batches too, LoRA also from
another A. Adds a row for each run to data/results/entries_study.csv: mean losses per token in nats,
and `moved`, the length of the change of all weights in linear layers relative to theirs."""

from functools import cache

import torch
from common import SEEDS, Results, around, base_of, fill_table
from torch import nn

from peft_lessons import LoRA, PartialFineTuning, evaluate, fit, inject, load_task, measure, merge

STEPS, BATCH, LOOKED = 40, 2, 16
BLOCKS = {"validation": 50, "test": 100}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
DRAWS = range(5)  # of positions
MIDDLE = {  # {(arm, size): a learning rate to begin with}
    **{("random", 10**n): lr for n, lr in ((2, 1.0), (3, 0.3), (4, 0.1), (5, 0.03), (6, 3e-3))},
    **{("lora", rank): 1e-2 for rank in (1, 4, 16, 64)},
    ("norms", 0): 3e-2,
    ("full", 0): 1e-3,
    **{("gradient", 10**n): lr for n, lr in ((3, 0.03), (4, 0.01))},
    **{("shared", 10**n): lr for n, lr in ((3, 0.1), (4, 0.03))},
    **{("rows", 10**n): lr for n, lr in ((3, 0.1), (4, 0.03))},
    **{(choice, 10_000): 0.1 for choice in ("largest", "smallest")},
}
ONCE = {  # the same, with seed 0 only
    **{("gradient", 10**n): lr for n, lr in ((2, 0.3), (5, 0.01))},
    **{("shared", 10**n): lr for n, lr in ((2, 0.3), (5, 0.03))},
    ("rows", 100_000): 0.03,
}
PAIRED = (1_000, 10_000)  # random entries that are trained on the other batches too
KEY = ("arm", "size", "draw", "lr", "seed")
COLUMNS = ("trainable", "validation", "test", "moved")


@cache
def task():
    """Return the novels, with few blocks to validate and test on."""
    return load_task("austen").limit(**BLOCKS)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers of all blocks."""
    return [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def gradients(model: nn.Module, weights: list[nn.Parameter], seed: int) -> list[torch.Tensor]:
    """Return the size of each entry's gradient over the first training batches."""
    for _, batch in zip(range(LOOKED), task().stream(BATCH, seed=seed), strict=False):
        model(**batch).loss.backward()
    sizes = [weight.grad.abs() for weight in weights]
    model.zero_grad()
    return sizes


def shares(merits: list[torch.Tensor], size: int, by_rows: bool) -> torch.Tensor:
    """Return where the best entries of each weight lie among all, its share of them."""
    kept, before = [], 0
    for merit in merits:  # (out, in)
        count = round(size * merit.numel() / sum(m.numel() for m in merits))
        if by_rows:
            worst_kept = merit.topk(-(-count // len(merit)), dim=1).values[:, -1:]
            merit = torch.where(merit >= worst_kept, merit, 0)
        kept.append(before + merit.flatten().topk(count).indices)
        before += merit.numel()
    return torch.cat(kept)


def only(model: nn.Module, arm: str, size: int, draw: int, seed: int) -> int:
    """Freeze all but the entries that a mask leaves, and return how many these are."""
    weights = weights_of(model)
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    by_gradient = arm in ("gradient", "shared", "rows")
    merits = gradients(model, weights, seed) if by_gradient else [w.data.abs() for w in weights]
    entries = torch.cat([merit.flatten() for merit in merits])  # (entries,)
    if arm == "random":
        kept = torch.randperm(len(entries), generator=torch.Generator().manual_seed(draw))[:size]
    elif arm in ("shared", "rows"):
        kept = shares(merits, size, by_rows=arm == "rows")
    else:
        kept = entries.topk(size, largest=arm != "smallest").indices
    mask = torch.zeros_like(entries)
    mask[kept] = 1
    parts = mask.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.register_hook(lambda grad, part=part: grad * part.view_as(grad))
    return len(kept)


def build(arm: str, size: int, draw: int, seed: int) -> tuple[nn.Module, int]:
    """Return tinylm ready to train, and how many numbers will."""
    model = base_of("austen", seed)
    if arm == "lora":
        inject(model, LoRA(rank=size, alpha=16))
    elif arm == "norms":
        inject(model, PartialFineTuning(patterns=r".*norm\..*"))
    elif arm not in ("full", "base"):
        return model, only(model, arm, size, draw, seed)
    return model, measure.parameters(model).trainable if arm != "base" else 0


def run(arm: str, size: int, draw: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, trainable = build(arm, size, draw, seed)
    before = weights_of(base_of("austen", 0))
    if lr:
        fit(model, task(), STEPS, lr=lr, batch_size=BATCH, seed=seed, show=False)
    losses = {split: f"{evaluate(model, task(), split).loss:.5f}" for split in BLOCKS}
    if arm == "lora":
        merge(model)
    change = torch.cat([(W - b).flatten() for W, b in zip(weights_of(model), before, strict=True)])
    moved = change.norm() / torch.cat([b.flatten() for b in before]).norm()
    return {"trainable": trainable, "moved": f"{moved.item():.4f}"} | losses


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    tried, due = {}, [("base", 0, 0, 0.0, SEEDS[0])]
    for row in results.rows():
        if (row["draw"], row["seed"]) == ("0", "0"):
            setting = row["arm"], int(row["size"])
            tried.setdefault(setting, {})[float(row["lr"])] = float(row["validation"])
    for (arm, size), middle in (MIDDLE | ONCE).items():
        values = tried.get((arm, size), {})
        rates = around(values, RATES, RATES.index(middle))
        due += [(arm, size, 0, rate, SEEDS[0]) for rate in rates]
        if set(rates) <= set(values) and (arm, size) in MIDDLE:
            best = min(rates, key=values.get)
            if arm == "random":
                due += [(arm, size, draw, best, SEEDS[0]) for draw in DRAWS[1:]]
            if arm != "random" or size in PAIRED:
                due += [(arm, size, 0, best, seed) for seed in SEEDS[1:]]
    return due


if __name__ == "__main__":
    fill_table("entries_study", KEY, COLUMNS, points, run)
