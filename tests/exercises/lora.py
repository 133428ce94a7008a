"""Answers to the exercises of lesson 02."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from peft_lessons import LinearWithLoRA
from peft_lessons.methods.lora import apply_lora_to_model

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ lora_forward


@right("lora_forward")
def by_linear(x, A, B, alpha):
    return F.linear(F.linear(x, A), alpha * B) / B.shape[1]


@right("lora_forward")
def through_the_product(x, A, B, alpha):
    return x @ (B @ A).mT * alpha / len(A)


@wrong("lora_forward", "(rank 1, and one text)")
def squeezed(x, A, B, alpha):
    low = (x @ A.T).squeeze()
    return low @ B.T * alpha / len(A)


@wrong("lora_forward", "(a single vector x)")
def batches_only(x, A, B, alpha):
    return torch.einsum("bi...,oi->bo...", x.movedim(-1, 1), B @ A).movedim(1, -1) * alpha / len(A)


@wrong("lora_forward", "shape")
def only_down(x, A, B, alpha):
    return x @ A.T * alpha / len(A)


# ------------------------------------------------------------------ merge_lora


@right("merge_lora")
def by_addmm(weight, A, B, alpha):
    return torch.addmm(weight, B, A, alpha=alpha / len(A))


@right("merge_lora")
@torch.no_grad()
def in_double(weight, A, B, alpha):
    return weight.double() + alpha * torch.einsum("or,ri->oi", B.double(), A.double()) / len(A)


@wrong("merge_lora", "(rank 1)")
def squeezed_factors(weight, A, B, alpha):
    return weight + alpha / len(A) * (B.squeeze() @ A.squeeze())


# ------------------------------------------------------------------ unmerge_lora


@right("unmerge_lora")
def einsum(merged_weight, A, B, alpha):
    return merged_weight - torch.einsum("or,ri->oi", B, A) * (alpha / B.shape[1])


@right("unmerge_lora")
@torch.no_grad()
def in_double_without_gradients(merged_weight, A, B, alpha):
    return merged_weight.double() - alpha * (B.double() @ A.double()) / len(A)


@wrong("unmerge_lora", "(rank 1)")
def squeezed_update(merged_weight, A, B, alpha):
    return merged_weight - alpha / len(A) * (B.squeeze() @ A.squeeze())


# ------------------------------------------------------------------ compress_lora


@wrong("compress_lora", "(256, 192) is formed on the way")
def svd_of_the_product(A, B, rank):
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


@wrong("compress_lora", "svd gives thin factors with full_matrices=False")
def full_svd(A, B, rank):
    U, S, Vh = torch.linalg.svd(A)
    middle, values, last = torch.linalg.svd(B @ U * S, full_matrices=False)
    return last[:rank] @ Vh[: len(S)], middle[:, :rank] * values[:rank]


@right("compress_lora")
def two_svds(A, B, rank):
    Ub, Sb, Vb = torch.linalg.svd(B, full_matrices=False)
    Ua, Sa, Va = torch.linalg.svd(A, full_matrices=False)
    U, S, Vh = torch.linalg.svd(Sb[:, None] * (Vb @ Ua) * Sa)
    return [Vh[:rank] @ Va, (Ub @ U)[:, :rank] * S[:rank]]


# ------------------------------------------------------------------ embedding_lora


@wrong("embedding_lora", "as large as the whole table (V, d)")
def merged_table(ids, weight, A, B, alpha):
    return F.embedding(ids, weight + alpha / A.shape[0] * (B @ A).T)


@wrong("embedding_lora", "as large as a one-hot matrix of the ids")
def one_hot(ids, weight, A, B, alpha):
    hot = F.one_hot(ids, weight.shape[0]).to(A.dtype)
    return weight[ids] + alpha / A.shape[0] * hot @ A.T @ B.T


@right("embedding_lora")
def einsum_lookup(ids, weight, A, B, alpha):
    return weight[ids] + torch.einsum("r...,dr->...d", A[:, ids], B) * (alpha / len(A))


@right("embedding_lora")
def low_rank_copies(ids, weight, A, B, alpha):
    table = (alpha / len(A) * A).T.contiguous()  # (V, r), no larger than A
    return F.embedding(ids, weight) + F.linear(F.embedding(ids, table), B)


# ------------------------------------------------------------------ sum_adapters


@right("sum_adapters")
def signed_roots(adapters):
    A, B = [], []
    for a, b, alpha, w in adapters:
        s = w * alpha / len(a)
        A.append(math.sqrt(abs(s)) * a)
        B.append(math.copysign(math.sqrt(abs(s)), s) * b)
    return torch.cat(A), torch.cat(B, dim=-1)


# ------------------------------------------------------------------ apply_lora


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


@wrong("apply_lora", "(embed is not a Linear)")
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


@wrong("apply_lora", "the argument model was changed although the call was refused")
def frozen_too_early(model, rank, alpha, targets):
    if any(isinstance(m, LinearWithLoRA) for m in model.modules()):
        raise ValueError("already adapted")
    model.requires_grad_(False)
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@right("apply_lora")
def by_the_course(model, rank, alpha, targets):
    return apply_lora_to_model(model, rank, alpha, tuple(targets))


@right("apply_lora")
def runtime_error(model, rank, alpha, targets):
    if any(isinstance(m, LinearWithLoRA) for m in model.modules()):
        raise RuntimeError("already adapted")
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets)).eval()
