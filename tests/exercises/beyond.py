"""Answers to the exercises of lesson 14."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from peft_lessons.methods.variants import alternate, leading

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ rslora_scaling


@right("rslora_scaling")
def as_a_tensor(alpha, rank):
    return alpha / torch.tensor(float(rank)).sqrt()


@right("rslora_scaling")
def by_power(alpha, rank):
    return alpha * rank**-0.5


@right("rslora_scaling")
def from_lora_s(alpha, rank):
    return alpha / rank * math.sqrt(rank)


# ------------------------------------------------------------------ loraplus_groups


def b(name):
    return "lora_B" in name.split(".")


def split(is_b):
    """Two groups by the name alone, all else as it should be."""

    def answer(named_parameters, lr, ratio):
        groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
        for name, p in named_parameters:
            if p.requires_grad:
                groups[is_b(name)]["params"].append(p)
        return groups

    return answer


first = wrong("loraplus_groups", "no B is found")(split(lambda n: n.startswith("lora_B")))
found = right("loraplus_groups")(split(lambda n: n.find("lora_B") >= 0))


@wrong("loraplus_groups", "is a string, expected a tensor")
def names(named_parameters, lr, ratio):
    rows = [n for n, p in named_parameters if p.requires_grad]
    return [
        {"params": [n for n in rows if not b(n)], "lr": lr},
        {"params": [n for n in rows if b(n)], "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "is a generator, expected a list")
def lazily(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    return [
        {"params": (p for n, p in rows if not b(n)), "lr": lr},
        {"params": (p for n, p in rows if b(n)), "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "the result is an AdamW")
def an_optimiser(named_parameters, lr, ratio):
    return torch.optim.AdamW(one_loop(named_parameters, lr, ratio))


@right("loraplus_groups")
def one_loop(named_parameters, lr, ratio):
    groups = {False: [], True: []}
    for name, p in named_parameters:
        if p.requires_grad:
            groups[".lora_B." in f".{name}."].append(p)
    return [dict(params=groups[False], lr=lr), dict(params=groups[True], lr=ratio * lr)]


@right("loraplus_groups")
def as_tuples(named_parameters, lr, ratio):
    rows = tuple(named_parameters)
    ups = tuple(p for n, p in rows if b(n) and p.requires_grad)
    rest = tuple(p for n, p in rows if not b(n) and p.requires_grad)
    return ({"lr": lr, "params": rest}, {"lr": float(lr * ratio), "params": ups})


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
