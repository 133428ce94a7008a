"""Answers to the exercises of lesson 14."""

import copy
import math
import statistics

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from peft_lessons.methods.variants import alternate, leading

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ gradient_sum


def mean_loss(model, batches):
    return torch.stack([model(**batch).loss for batch in batches]).mean()


@wrong("gradient_sum", "has a gradient now: leave each .grad as it was")
def with_traces(model, batches, factors):
    model.zero_grad()
    mean_loss(model, batches).backward()
    named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    return sum(factors.get(n, 1) * p.grad.abs().sum() for n, p in named)


@wrong("gradient_sum", "has lost its gradient: leave each .grad as it was")
def tidied_up(model, batches, factors):
    found = by_backward(model, batches, factors)
    model.zero_grad()
    return found


@wrong("gradient_sum", "was changed: leave it as it was")
def cleared_with_zeros(model, batches, factors):
    kept = [p.grad for p in model.parameters()]
    found = by_backward(model, batches, factors)
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = None if grad is None else grad.zero_()
    return found


@wrong("gradient_sum", "the argument model was changed: leave it as it was")
def thawed(model, batches, factors):
    found = by_backward(model, batches, factors)
    model.requires_grad_(True)
    return found


@wrong("gradient_sum", "the argument model was changed: leave it as it was")
def in_eval_mode(model, batches, factors):
    return by_backward(model.eval(), batches, factors)


@wrong("gradient_sum", "appears to not have been used")
def all_must_be_used(model, batches, factors):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(mean_loss(model, batches), list(named.values()))
    return sum(factors.get(n, 1) * g.abs().sum() for n, g in zip(named, found, strict=True))


@wrong("gradient_sum", "frozen parameters are counted")
def all_thawed(model, batches, factors):
    """Frozen parameters, too, and what was frozen is so again."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad = True
    found = by_backward(model, batches, factors)
    for p in frozen:
        p.requires_grad = False
    return found


@wrong("gradient_sum", "the result is a dict")
def by_name(model, batches, factors):
    return {n: by_backward(model, batches, {n: 1}) for n in factors}


@right("gradient_sum")
def by_backward(model, batches, factors):
    kept = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for (name, p), grad in zip(model.named_parameters(), kept, strict=True):
        if p.grad is not None:
            total += factors.get(name, 1.0) * p.grad.double().abs().sum()
        p.grad = grad
    return total


@right("gradient_sum")
def on_a_copy(model, batches, factors):
    twin, total = copy.deepcopy(model), 0.0
    with torch.enable_grad():
        for p in twin.parameters():
            p.grad = None
        mean_loss(twin, batches).backward()
    for name, p in twin.named_parameters():
        if p.requires_grad and p.grad is not None:
            total += np.abs(p.grad.numpy()).sum() * factors.get(name, 1)
    return total


@right("gradient_sum")
def functionally(model, batches, factors):
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        losses = [torch.func.functional_call(model, parameters, (), b).loss for b in batches]
        return sum(losses) / len(losses)

    gradients = torch.func.grad(loss)(named)
    return float(sum(factors.get(n, 1) * g.norm(p=1) for n, g in gradients.items()))


@right("gradient_sum")
def batch_after_batch(model, batches, factors):
    """With one graph in memory at a time."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for _, p in named]
    for batch in batches:
        found = torch.autograd.grad(
            model(**batch).loss, [p for _, p in named], materialize_grads=True, allow_unused=True
        )
        sums = [s + g for s, g in zip(sums, found, strict=True)]
    parts = [s.abs().sum() * factors.get(n, 1) for s, (n, _) in zip(sums, named, strict=True)]
    return torch.stack(parts).sum() / len(batches)


# ------------------------------------------------------------------ fair_comparison


@wrong("fair_comparison", "runs of other seeds take part in the choice")
def by_mean_validation(runs, a, b):
    """With the mean of all seeds in the place of seed 0."""
    means = pd.DataFrame(runs).groupby(["method", "lr"])["validation"].mean().to_dict()
    first = [
        run | {"validation": means[run["method"], run["lr"]]} for run in runs if run["seed"] == 0
    ]
    return with_tables([*first, *(run for run in runs if run["seed"] != 0)], a, b)


@wrong("fair_comparison", "the edge is that of all seeds' learning rates")
def edges_of_all_seeds(runs, a, b):
    found = with_tables(runs, a, b)
    for method, lr in found["lr"].items():
        tried = sorted({run["lr"] for run in runs if run["method"] == method})
        found["at_edge"][method] = lr in (tried[0], tried[-1])
    return found


@wrong("fair_comparison", "the argument runs was changed")
def sorted_in_place(runs, a, b):
    runs.sort(key=lambda run: run["lr"])
    return with_tables(runs, a, b)


@wrong("fair_comparison", "the keys of the result differ: missing 'at_edge'")
def not_audited(runs, a, b):
    found = with_tables(runs, a, b)
    del found["at_edge"]
    return found


@wrong("fair_comparison", "expected a dict")
def the_mean_pair(runs, a, b):
    found = with_tables(runs, a, b)
    return found | {"pairs": statistics.fmean(found["pairs"].values())}


@wrong("fair_comparison", "expected a dict")
def edges_by_name(runs, a, b):
    found = with_tables(runs, a, b)
    return found | {"at_edge": [name for name, edge in found["at_edge"].items() if edge]}


@wrong("fair_comparison", "is a tuple")
def as_a_tuple(runs, a, b):
    return tuple(with_tables(runs, a, b).values())


@right("fair_comparison")
def with_tables(runs, a, b):
    table, lr, edge = pd.DataFrame(runs), {}, {}
    for method in (a, b):
        first = table[(table["method"] == method) & (table["seed"] == 0)].set_index("lr")
        lr[method] = first["validation"].idxmin()
        edge[method] = lr[method] in (first.index.min(), first.index.max())
    test = [
        table[(table["method"] == m) & (table["lr"] == lr[m])].set_index("seed")["test"]
        for m in (a, b)
    ]
    gaps = (test[0] - test[1]).dropna()
    return {"pairs": gaps.to_dict(), "at_edge": edge, "lr": lr}


@right("fair_comparison")
def in_loops(runs, a, b):
    best, tried, at = {}, {a: [], b: []}, {}
    for run in runs:
        method, score = run["method"], run["validation"]
        if method in tried and run["seed"] == 0:
            tried[method].append(run["lr"])
            if math.isfinite(score) and (method not in best or score < best[method][0]):
                best[method] = score, run["lr"]
    for run in runs:
        at[run["method"], run["lr"], run["seed"]] = run["test"]
    ours, theirs = best[a][1], best[b][1]
    pairs = {}
    for seed in {run["seed"] for run in runs}:
        if (a, ours, seed) in at and (b, theirs, seed) in at:
            pairs[seed] = np.float64(at[a, ours, seed]) - at[b, theirs, seed]
    edges = {m: bool(np.isin(best[m][1], [min(tried[m]), max(tried[m])])) for m in (a, b)}
    return {"lr": {a: ours, b: theirs}, "pairs": pairs, "at_edge": edges}


# ------------------------------------------------------------------ pissa_init


def svd(W):
    return torch.linalg.svd(W, full_matrices=False)


@wrong("pissa_init", "A is a NumPy array, expected a tensor")
def arrays(weight, rank):
    U, S, V = np.linalg.svd(weight.numpy(), full_matrices=False)
    A, B = np.sqrt(S[:rank, None]) * V[:rank], U[:, :rank] * np.sqrt(S[:rank])
    return A, B, weight.numpy() - B @ A


@right("pissa_init")
def by_numpy_svd(weight, rank):
    U, S, V = np.linalg.svd(weight.double().numpy())
    root = np.sqrt(S[:rank])
    A, B = -root[:, None] * V[:rank], -U[:, :rank] * root
    residual = weight.double().numpy() - B @ A
    return tuple(torch.from_numpy(t).to(weight.dtype) for t in (A, B, residual))


@right("pissa_init")
@torch.no_grad()
def in_float64(weight, rank):
    A, B = leading(weight.double(), rank)
    return A, B, weight - B @ A


@right("pissa_init")
def one_by_one(weight, rank):
    U, S, V = svd(weight)
    rest, rows, columns = weight.clone(), [], []
    for i in range(rank):
        rows.append(V[i] * S[i] ** 0.5)
        columns.append(U[:, i] * S[i] ** 0.5)
        rest = rest - torch.outer(columns[-1], rows[-1])
    return torch.stack(rows), torch.stack(columns, dim=1), rest


@right("pissa_init")
def from_eigenvectors(weight, rank):
    """eigh gives the smallest first, so the vectors come in the other order."""
    values, V = torch.linalg.eigh((weight.T @ weight).double())
    V, root = V[:, -rank:], values[-rank:] ** 0.25
    A, B = root[:, None] * V.T, weight.double() @ V / root
    return tuple(t.to(weight.dtype) for t in (A, B, weight - B @ A))


# ------------------------------------------------------------------ loftq_init


@wrong("loftq_init", "A has shape (12, 12), expected (3, 12)")
def full_rank(weight, rank, quantize, steps):
    return alternate(weight, min(weight.shape), quantize, steps)


def pissa_init(weight, rank):
    """A stub of another exercise."""
    raise NotImplementedError


@wrong("loftq_init", "your pissa_init is not written yet")
def before_its_helper(weight, rank, quantize, steps):
    return pissa_init(weight - quantize(weight), rank)


@right("loftq_init")
def by_projection(weight, rank, quantize, steps):
    BA = 0 * weight
    for _ in range(steps):
        Q = quantize(weight - BA)
        U, _, _ = torch.linalg.svd((weight - Q).double())
        BA = (U[:, :rank] @ U[:, :rank].T @ (weight - Q).double()).to(weight.dtype)
    U, S, V = svd((weight - Q).double())
    A, B = S[:rank].sqrt().diag() @ V[:rank], U[:, :rank] @ S[:rank].sqrt().diag()
    return A.to(weight.dtype), B.to(weight.dtype), Q


@right("loftq_init")
def recursive(weight, rank, quantize, steps):
    if steps == 1:
        Q = quantize(weight)
    else:
        A, B, _ = recursive(weight, rank, quantize, steps - 1)
        Q = quantize(weight - B @ A)
    return *leading(weight - Q, rank), Q


# ------------------------------------------------------------------ intruder_dimensions


@wrong("intruder_dimensions", "the result is 0.1")
def share(w0, w1, k, eps):
    return ((svd(w0)[0].T @ svd(w1)[0][:, :k]).abs().amax(0) < eps).float().mean().item()


@wrong("intruder_dimensions", "the result is a list of 3")
def which(w0, w1, k, eps):
    nearest = (svd(w0)[0].T @ svd(w1)[0][:, :k]).abs().amax(0)
    return [j for j in range(k) if nearest[j] < eps]


@right("intruder_dimensions")
def by_loops(w0, w1, k, eps):
    U0, U1, count = svd(w0)[0], svd(w1)[0], 0
    for j in range(k):
        if max(abs(F.cosine_similarity(u, U1[:, j], dim=0).item()) for u in U0.T) < eps:
            count += 1
    return count


@right("intruder_dimensions")
def with_the_full_matrices(w0, w1, k, eps):
    """No output lies beyond the singular vectors, so the full matrices are the same."""
    U0, U1 = torch.linalg.svd(w0)[0], torch.linalg.svd(w1)[0]
    return ((U0.mT @ U1[:, :k]).abs().max(0).values < eps).sum()


@right("intruder_dimensions")
def by_arrays(w0, w1, k, eps):
    U0, U1 = (np.linalg.svd(w.double().numpy(), full_matrices=False)[0] for w in (w0, w1))
    return int((np.abs(U0.T @ U1[:, :k]).max(axis=0) < eps).sum())
