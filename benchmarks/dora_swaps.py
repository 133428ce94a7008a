"""Too large a learning rate: what it does to LoRA, DoRA and AdaLoRA, and what in the weight fails.

    python benchmarks/dora_swaps.py        # an hour on one core

Trains minilm on movie sentiment for 200 steps at learning rates up to and beyond those that break a
method: LoRA and DoRA of rank 8 on query and value, and AdaLoRA on all linear layers as in its own
study. At some rates every adapted weight of the trained model is then replaced, with no further
training, and the test split is read again. Adds to data/results/dora_swaps.csv a row for each run
and each such `weight`:

    trained      as trained
    base         W, so that only the trained head is left
    directions   the rows of V = W + s·BA at the lengths of W's rows
    lengths      the rows of W at the lengths of V's rows
    undivided    V itself, which DoRA divides by the lengths of its rows
    magnitudes   the rows of W at DoRA's trained lengths m
    without two  V without the two largest singular directions of its change

`turned`, `length` and `change` describe the weight: the mean angle of its rows to those of W in
degrees, their mean length relative to W's, and the size of its change relative to W, of all adapted
layers together. `spread` is the variance between sentences of what the head reads, as a share of
its mean square. `gained` and `lost` count the sentences that are right now and were wrong as
trained, and the reverse; `right` has one bit for each sentence."""

import torch
import torch.nn.functional as F
from catalogue import schedule, setting
from common import RUN, SEEDS, STEPS, base_of, fill_table, hexadecimal, load
from dora_study import build

from peft_lessons import fit, inject, merge
from peft_lessons.engine import injection_of

RANK = 8
# Learning rates at which weights are replaced: the best one, and those that break LoRA and AdaLoRA.
SWAPPED = (3e-3, 1e-2, 6e-2)
KEY = ("method", *RUN)
MEASURED = ("test", "test_loss", "spread", "turned", "length", "change", "gained", "lost")
COLUMNS = ("weight", "sentences", *MEASURED, "right")
ON_QV, FROZEN = ("lora", "dora"), "dora, m frozen"
POINTS = [  # the other rates are in the tables of other studies
    *((method, 1e-2, seed) for seed in range(5) for method in ON_QV),
    *((method, 1.4e-2, seed) for seed in SEEDS for method in ON_QV),
    *((method, 6e-3, seed) for seed in SEEDS for method in ON_QV),
    *(("adalora", lr, 0) for lr in SWAPPED[1:]),
    ("dora", 3e-3, 0),
    *((FROZEN, lr, seed) for lr in (3e-3, 1.4e-2) for seed in SEEDS),
    *(("adalora", SWAPPED[-1], seed) for seed in SEEDS[1:]),
]


def with_method(method: str, seed: int) -> torch.nn.Module:
    """Return minilm with a method in it."""
    if method != "adalora":
        return build(method, RANK, seed)
    model = base_of("sentiment", seed)
    size = {"initial_rank": 6, "target_rank": 4} | schedule(STEPS["sentiment"])
    inject(model, setting(method, "sentiment", **size))
    return model


def without_largest(change: torch.Tensor, count: int) -> torch.Tensor:
    """Return a matrix without its `count` largest singular directions."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return U[:, count:] * S[count:] @ Vh[count:]


def rows_at(lengths: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the directions of a weight's rows at other lengths (out,)."""
    return F.normalize(weight, dim=1) * lengths[:, None]


@torch.no_grad()
def replacements(W: torch.Tensor, V: torch.Tensor, m: torch.Tensor | None) -> dict:
    """Return {name: weight}, m being DoRA's lengths. The first one is the weight as trained."""
    known = {
        "trained": V if m is None else rows_at(m, V),
        "base": W,
        "directions": rows_at(W.norm(dim=1), V),
        "lengths": rows_at(V.norm(dim=1), W),
    }
    if m is None:
        return known | {"without two": W + without_largest(V - W, 2)}
    return known | {"undivided": V, "magnitudes": rows_at(m, W)}


def parts(wrapper) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return copies of W and of V = W + its low-rank change, and DoRA's m if there is one."""
    dora = getattr(wrapper, "dora", None)
    delta = (dora or wrapper).delta_weight().detach()
    W = wrapper.base.weight.detach().clone()
    return W, W + delta, dora and dora.magnitude.detach().clone()


def described(weights: list[torch.Tensor], bases: list[torch.Tensor]) -> dict[str, str]:
    """Return how far the rows of all weights turned, how long they are, and how large the change
    is, against those of W."""
    pairs = [(w.double(), W.double()) for w, W in zip(weights, bases, strict=True)]
    cosines = torch.cat([F.cosine_similarity(w, W, dim=1) for w, W in pairs]).clamp(-1, 1)
    lengths = torch.cat([w.norm(dim=1) / W.norm(dim=1) for w, W in pairs])
    change, size = (sum(t.square().sum() for t in ts) for ts in ([w - W for w, W in pairs], bases))
    return {
        "turned": f"{torch.rad2deg(cosines.arccos()).mean():.4f}",
        "length": f"{lengths.mean():.5f}",
        "change": f"{(change / size).sqrt():.5f}",
    }


@torch.no_grad()
def read(model: torch.nn.Module, task) -> tuple[list[bool], dict[str, str]]:
    """Return which test sentences are right, and the measured columns of the model's outputs."""
    seen, losses, right = [], [], []
    hook = model.eval().classifier.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for batch in task.batches("test", 64, by_length=True):
        logits, labels = model(**batch).logits, batch["labels"]
        right += (logits.argmax(-1) == labels).tolist()
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
    hook.remove()
    features = torch.cat(seen)  # (sentences, hidden)
    spread = features.var(dim=0, correction=0).sum() / features.square().sum(dim=1).mean()
    return right, {
        "sentences": len(right),
        "test": f"{sum(right) / len(right):.5f}",
        "test_loss": f"{sum(losses) / len(losses):.5f}",
        "spread": f"{spread:.5f}",
    }


def run(method: str, lr: float, seed: int) -> list[dict]:
    """Train one point and return a row for each weight that the trained model is read with."""
    model, task = with_method(method, seed), load("sentiment")
    fit(model, task, STEPS["sentiment"], lr=lr, seed=seed, show=False)
    right, row = read(model, task)
    rows = [{"weight": "trained", "right": hexadecimal(right), "gained": 0, "lost": 0} | row]
    wrappers = list(injection_of(model).wrappers.values())
    layers = [replacements(*parts(wrapper)) for wrapper in wrappers]
    bases = [layer["base"] for layer in layers]
    rows[0] |= described([layer["trained"] for layer in layers], bases)
    if lr not in SWAPPED:
        return rows
    merge(model)
    names = list(layers[0])[1:] if method in ON_QV else ["base"]
    for name in names:
        weights = [layer[name] for layer in layers]
        for wrapper, weight in zip(wrappers, weights, strict=True):
            wrapper.base.weight.data.copy_(weight)
        now, row = read(model, task)
        pairs = list(zip(now, right, strict=True))
        counts = {"gained": pairs.count((True, False)), "lost": pairs.count((False, True))}
        rows.append({"weight": name} | row | counts | described(weights, bases))
    return rows


if __name__ == "__main__":
    fill_table("dora_swaps", KEY, COLUMNS, POINTS, run)
