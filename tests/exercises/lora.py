"""Answers to the exercises of lesson 02."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from peft_lessons import LinearWithLoRA
from peft_lessons.methods.lora import apply_lora_to_model

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ unmerge_lora


@wrong("unmerge_lora", "divided by √r")
def rslora(merged_weight, A, B, alpha):
    return merged_weight - alpha / math.sqrt(A.shape[0]) * B @ A


@wrong("unmerge_lora", "Your result equals the argument merged_weight.")
def nothing_done(merged_weight, A, B, alpha):
    return merged_weight


@wrong("unmerge_lora", "your function raised RuntimeError: mat1 and mat2")
def factors_turned(merged_weight, A, B, alpha):
    return merged_weight - alpha / A.shape[0] * A @ B


@right("unmerge_lora")
def einsum(merged_weight, A, B, alpha):
    return merged_weight - torch.einsum("or,ri->oi", B, A) * (alpha / B.shape[1])


@right("unmerge_lora")
def scaled_first(merged_weight, A, B, alpha):
    return torch.addmm(merged_weight, B * (alpha / len(A)), A, alpha=-1)


@right("unmerge_lora")
@torch.no_grad()
def in_double_without_gradients(merged_weight, A, B, alpha):
    return merged_weight.double() - alpha * (B.double() @ A.double()) / len(A)


@right("unmerge_lora")
def rank_by_rank(W, A, B, alpha):
    for row, column in zip(A, B.T, strict=True):
        W = W - alpha / len(A) * column[:, None] * row
    return W


# ------------------------------------------------------------------ compress_lora


@wrong("compress_lora", "(256, 192) is formed on the way")
def svd_of_the_product(A, B, rank):
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


@wrong("compress_lora", "(1, 192, 256) is formed on the way")
def turned_product(A, B, rank):
    U, S, Vh = torch.linalg.svd(torch.bmm(A.T[None], B.T[None])[0], full_matrices=False)
    return (U[:, :rank] * S[:rank]).T, Vh[:rank].T


@wrong("compress_lora", "svd gives thin factors with full_matrices=False")
def full_svd(A, B, rank):
    U, S, Vh = torch.linalg.svd(A)
    middle, values, last = torch.linalg.svd(B @ U * S, full_matrices=False)
    return last[:rank] @ Vh[: len(S)], middle[:, :rank] * values[:rank]


@wrong("compress_lora", "(256, 256) is formed on the way")
def complete_qr(A, B, rank):
    Q, R = torch.linalg.qr(B, mode="complete")
    r = len(A)
    U, S, Vh = torch.linalg.svd(R[:r] @ A, full_matrices=False)
    return S[:rank, None] * Vh[:rank], Q[:, :r] @ U[:, :rank]


@wrong("compress_lora", "the factors are truncated each by itself")
def each_factor(A, B, rank):
    def truncate(M):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]

    return compressed(truncate(A), truncate(B), rank)


def compressed(A, B, rank, share=lambda S: (S.sqrt(), S.sqrt())):
    """Right, but for how the singular values are shared."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    to_a, to_b = share(S[:rank])
    return to_a[:, None] * (Vh[:rank] @ Qa.T), Qb @ U[:, :rank] * to_b


right("compress_lora")(compressed)


@right("compress_lora")
def one_qr(A, B, rank):
    Q, R = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R @ A, full_matrices=False)
    return S[:rank, None] * Vh[:rank], Q @ U[:, :rank]


@right("compress_lora")
def two_svds(A, B, rank):
    Ub, Sb, Vb = torch.linalg.svd(B, full_matrices=False)
    Ua, Sa, Va = torch.linalg.svd(A, full_matrices=False)
    U, S, Vh = torch.linalg.svd(Sb[:, None] * (Vb @ Ua) * Sa)
    return [Vh[:rank] @ Va, (Ub @ U)[:, :rank] * S[:rank]]


@right("compress_lora")
def in_double_precision(A, B, rank):
    return compressed(A.double(), B.double(), rank, lambda S: (S, torch.ones_like(S)))


# ------------------------------------------------------------------ embedding_lora


@wrong("embedding_lora", "A is reshaped where it must be transposed")
def reshaped(ids, weight, A, B, alpha):
    return weight[ids] + alpha / A.shape[0] * A.reshape(A.shape[1], -1)[ids] @ B.T


@wrong("embedding_lora", "as large as the whole table (V, d)")
def merged_table(ids, weight, A, B, alpha):
    return F.embedding(ids, weight + alpha / A.shape[0] * (B @ A).T)


@wrong("embedding_lora", "as large as a one-hot matrix of the ids")
def one_hot(ids, weight, A, B, alpha):
    hot = F.one_hot(ids, weight.shape[0]).to(A.dtype)
    return weight[ids] + alpha / A.shape[0] * hot @ A.T @ B.T


@wrong("embedding_lora", "(5, 23) is formed on the way")
def one_hot_by_row(ids, weight, A, B, alpha):
    if ids.ndim > 1:
        return torch.stack([one_hot_by_row(row, weight, A, B, alpha) for row in ids])
    return one_hot(ids, weight, A, B, alpha)


@wrong("embedding_lora", "your function raised IndexError")
def rows_of_a(ids, weight, A, B, alpha):
    return weight[ids] + alpha / A.shape[0] * A[ids] @ B.T


@right("embedding_lora")
def einsum_lookup(ids, weight, A, B, alpha):
    return weight[ids] + torch.einsum("r...,dr->...d", A[:, ids], B) * (alpha / len(A))


@right("embedding_lora")
def low_rank_copies(ids, weight, A, B, alpha):
    table = (alpha / len(A) * A).T.contiguous()  # (V, r), no larger than A
    return F.embedding(ids, weight) + F.linear(F.embedding(ids, table), B)


@right("embedding_lora")
@torch.no_grad()
def flattened(ids, weight, A, B, alpha):
    flat = ids.reshape(-1)
    scaled = A.index_select(1, flat) * (alpha / B.shape[1])
    rows = weight.index_select(0, flat) + (B @ scaled).T
    return rows.reshape(*ids.shape, -1)


# ------------------------------------------------------------------ sum_adapters


@wrong("sum_adapters", "a negative weight has no square root")
def square_roots(adapters):
    roots = [torch.tensor(w * alpha / len(A)).sqrt() for A, _, alpha, w in adapters]
    A = torch.cat([root * a[0] for root, a in zip(roots, adapters, strict=True)])
    return A, torch.cat([root * a[1] for root, a in zip(roots, adapters, strict=True)], 1)


@wrong("sum_adapters", "A has shape (40, 72), expected (8, 72)")
def dense(adapters):
    update = sum(w * alpha / len(A) * B @ A for A, B, alpha, w in adapters)
    return update, torch.eye(len(update))


@right("sum_adapters")
def scaling_in_a(adapters):
    scaled = [A * (w * alpha / A.shape[0]) for A, _, alpha, w in adapters]
    return torch.vstack(scaled), torch.hstack([B for _, B, _, _ in adapters])


@right("sum_adapters")
def signed_roots(adapters):
    A, B = [], []
    for a, b, alpha, w in adapters:
        s = w * alpha / len(a)
        A.append(math.sqrt(abs(s)) * a)
        B.append(math.copysign(math.sqrt(abs(s)), s) * b)
    return torch.cat(A), torch.cat(B, dim=-1)


# ------------------------------------------------------------------ apply_lora


@wrong("apply_lora", "freeze it before the branches are added; and targets are found")
def as_shipped(model, rank, alpha, targets):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(target in name for target in targets):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LinearWithLoRA(module, rank, alpha))
    return model


def inject(model, rank, alpha, matches):
    """What is right once the matches are: shared by the answers below."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches(n)]
    model.requires_grad_(False)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(linear, rank, alpha))
    return model


def at_end(name, targets):
    return any(name == t or name.endswith("." + t) for t in targets)


@wrong("apply_lora", "'q_porj'] (a target that matches nothing)")
def silent(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "the second target matches nothing")
def any_match_will_do(model, rank, alpha, targets):
    if not any(at_end(n, targets) for n, _ in model.named_modules()):
        raise ValueError(f"nothing matches {targets}")
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "embed is no nn.Linear, so it matches nothing")
def any_module_matches(model, rank, alpha, targets):
    for target in targets:
        if not any(at_end(n, [target]) for n, _ in model.named_modules()):
            raise ValueError(f"nothing matches {target}")
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


def refuse_unmatched(model, targets):
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for target in targets:
        if not any(at_end(n, [target]) for n in linears):
            raise ValueError(f"nothing matches {target}")


@wrong("apply_lora", "a second call for other layers of a model with LoRA branches")
def other_targets_again(model, rank, alpha, targets):
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "the message does not name 'q_porj'")
def nameless_refusal(model, rank, alpha, targets):
    try:
        refuse_unmatched(model, targets)
    except ValueError:
        raise ValueError("nothing matches") from None
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "KeyError: 'q_porj', where ValueError was due")
def another_error(model, rank, alpha, targets):
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = {t: n for n in linears for t in targets if at_end(n, [t])}
    for target in targets:
        found[target]
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "the argument model was changed although the call was refused")
def frozen_too_early(model, rank, alpha, targets):
    if any(isinstance(m, LinearWithLoRA) for m in model.modules()):
        raise ValueError("already adapted")
    model.requires_grad_(False)
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


def refuse_adapted(model, error=ValueError):
    if any(isinstance(m, LinearWithLoRA) for m in model.modules()):
        raise error("already adapted")


@wrong("apply_lora", "what is returned is not the argument model itself: change it in place")
def on_a_copy(model, rank, alpha, targets):
    refuse_adapted(model)
    refuse_unmatched(model, targets)
    return inject(copy.deepcopy(model), rank, alpha, lambda n: at_end(n, targets))


@right("apply_lora")
def by_the_course(model, rank, alpha, targets):
    return apply_lora_to_model(model, rank, alpha, tuple(targets))


@right("apply_lora")
def runtime_error(model, rank, alpha, targets):
    refuse_adapted(model, RuntimeError)
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets)).eval()


@right("apply_lora")
def by_segments(model, rank, alpha, targets):
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("adapters are there already")
    tails = [target.split(".") for target in targets]
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    hits = {
        ".".join(tail): [n for n in linears if n.split(".")[-len(tail) :] == tail] for tail in tails
    }
    missed = [target for target, names in hits.items() if not names]
    if missed:
        raise ValueError(f"no match for {missed}")
    for p in model.parameters():
        p.requires_grad = False
    for name in sorted({n for names in hits.values() for n in names}):
        *path, leaf = name.split(".")
        parent = model.get_submodule(".".join(path))
        parent._modules[leaf] = LinearWithLoRA(linears[name], rank=rank, alpha=alpha)
    return model
