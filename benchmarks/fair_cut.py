"""Cut the change of full fine-tuning down to a rank, with the head that was trained and a new one.

    python benchmarks/fair_cut.py          # ten minutes on one core

Fine-tunes minilm on movie sentiment as lesson 02 does (50 steps of 8 sentences), keeps a part of
the change of each of its 36 weight matrices, and adds a row for each part and seed to
data/results/fair_cut.csv. Embeddings, norms and biases keep what they learned.

`own` is the accuracy with the head that was trained for the whole change, `positive` the share of
the test sentences that it calls positive, `auc` the share of the pairs of a positive and a negative
test sentence that its margin ranks rightly, `moved` its accuracy with the threshold that is best on
the training sentences, and `refitted` the accuracy of a new head, a logistic regression. Threshold
and new head are fitted to TRAINING balanced training sentences."""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from common import SEEDS, base_of, fill_table, load
from torch import nn

from peft_lessons import fit
from peft_lessons.studies import auc

KEPT = ("0", "1", "2", "4", "8", "16", "whole", "second alone", "untouched")
COLUMNS = ("sentences", "own", "positive", "auc", "moved", "refitted")
TRAINING, PENALTY = 800, 0.1  # sentences; times the squared norm of the new head's weights


@cache
def trained(seed: int) -> tuple[nn.Module, dict[str, tuple]]:
    """Return minilm fine-tuned, and {path of a layer: (its weight before, SVD of its change)}."""
    base, model = base_of("sentiment", seed), base_of("sentiment", seed)
    fit(model, load("sentiment"), steps=50, lr=2e-4, batch_size=8, seed=seed, show=False)
    parts = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "classifier":
            before = base.get_submodule(path).weight.detach()
            svd = torch.linalg.svd((layer.weight - before).detach(), full_matrices=False)
            parts[path] = before, svd
    return model, parts


def cut(kept: str, seed: int) -> nn.Module:
    """Return the fine-tuned model with a part of its change, or minilm as it was."""
    if kept == "untouched":
        return base_of("sentiment", seed)
    model, parts = trained(seed)
    few = {"whole": slice(None), "second alone": slice(1, 2)}
    chosen = few[kept] if kept in few else slice(int(kept))
    with torch.no_grad():
        for path, (before, (u, s, vh)) in parts.items():
            change = (u[:, chosen] * s[chosen]) @ vh[chosen]  # (out, in)
            model.get_submodule(path).weight.copy_(before + change)
    return model


@torch.no_grad()
def encoded(model: nn.Module, batches: Iterator[dict]) -> tuple[torch.Tensor, ...]:
    """Return what the head reads of each sentence, (n, width), its margins and the labels, (n,)."""
    vectors, margins, labels = [], [], []
    handle = model.classifier.register_forward_pre_hook(lambda _, x: vectors.append(x[0]))
    for batch in batches:
        labels.append(batch["labels"])
        logits = model.eval()(**batch).logits
        margins.append(logits[:, 1] - logits[:, 0])
    handle.remove()
    return torch.cat(vectors), torch.cat(margins), torch.cat(labels)


def threshold(margins: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the margin between two sentences above which to say positive, the most accurate."""
    ordered, order = margins.sort()
    below = F.pad(1.0 - 2.0 * labels[order], (1, 0)).cumsum(0)  # right answers gained by a shift
    best = int(below.argmax())
    around = F.pad(ordered[None], (1, 1), "replicate")[0]
    return around[best : best + 2].mean().item()


def new_head(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Fit a logistic regression to standardised vectors, (n, width); return what it needs to score
    others: mean, standard deviation, weights and bias."""
    mean, std = vectors.mean(dim=0), vectors.std(dim=0).clamp(min=1e-6)  # some never vary
    inputs = ((vectors - mean) / std).double()
    w, b = (torch.zeros(n, dtype=torch.double, requires_grad=True) for n in (inputs.shape[1], 1))
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ w + b, labels.double())
        loss = loss + PENALTY * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return mean, std, w.detach().float(), b.detach().float()


def run(kept: str, seed: int) -> dict:
    """Measure one part of the change."""
    model, task = cut(kept, seed), load("sentiment").limit(train=TRAINING)
    seen, margins_seen, labels_seen = encoded(model, task.batches("train", 64, by_length=True))
    vectors, margins, labels = encoded(model, task.batches("test", 64, by_length=True))

    def accuracy(positive: torch.Tensor) -> str:
        return f"{(positive == (labels == 1)).float().mean().item():.5f}"

    mean, std, w, b = new_head(seen, labels_seen)
    return {
        "sentences": len(labels),
        "own": accuracy(margins > 0),
        "positive": f"{(margins > 0).float().mean().item():.5f}",
        "auc": f"{auc(margins, labels):.5f}",
        "moved": accuracy(margins > threshold(margins_seen, labels_seen)),
        "refitted": accuracy((vectors - mean) / std @ w + b > 0),
    }


if __name__ == "__main__":
    points = [(kept, seed) for seed in SEEDS for kept in KEPT]
    fill_table("fair_cut", ("kept", "seed"), COLUMNS, points, run)
