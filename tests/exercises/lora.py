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


@wrong("unmerge_lora", "the scaling alpha / r is left out")
def no_scaling(merged_weight, A, B, alpha):
    return merged_weight - B @ A


@wrong("unmerge_lora", "alpha is not divided by r")
def alpha_alone(merged_weight, A, B, alpha):
    return merged_weight - alpha * B @ A


@wrong("unmerge_lora", "the scaling is upside down")
def upside_down(merged_weight, A, B, alpha):
    return merged_weight - A.shape[0] / alpha * B @ A


@wrong("unmerge_lora", "the scaling alpha / r is applied twice")
def scaled_twice(merged_weight, A, B, alpha):
    s = alpha / A.shape[0]
    return merged_weight - s * (s * B @ A)


@wrong("unmerge_lora", "the update is added again")
def added(merged_weight, A, B, alpha):
    return merged_weight + alpha / A.shape[0] * B @ A


@wrong("unmerge_lora", "divided by √r")
def rslora(merged_weight, A, B, alpha):
    return merged_weight - alpha / math.sqrt(A.shape[0]) * B @ A


@wrong("unmerge_lora", "// drops the fraction")
def floor(merged_weight, A, B, alpha):
    return merged_weight - alpha // A.shape[0] * B @ A


@wrong("unmerge_lora", "alpha is divided by a width: the rank is A.shape[0]")
def by_in_features(merged_weight, A, B, alpha):
    return merged_weight - alpha / A.shape[1] * B @ A


@wrong("unmerge_lora", "alpha is divided by a width: the rank is B.shape[1]")
def by_out_features(merged_weight, A, B, alpha):
    return merged_weight - alpha / len(B) * B @ A


@wrong("unmerge_lora", "this is the update alone")
def update(merged_weight, A, B, alpha):
    return alpha / A.shape[0] * B @ A


@wrong("unmerge_lora", "Your result equals the argument merged_weight.")
def nothing_done(merged_weight, A, B, alpha):
    return merged_weight


@wrong("unmerge_lora", "the argument merged_weight was changed")
def in_place(merged_weight, A, B, alpha):
    merged_weight -= alpha / A.shape[0] * B @ A
    return merged_weight


@wrong("unmerge_lora", "the argument B was changed")
def factor_in_place(merged_weight, A, B, alpha):
    B *= alpha / A.shape[0]
    return merged_weight - B @ A


@wrong("unmerge_lora", "the result has dtype float32, expected bfloat16")
def no_cast(merged_weight, A, B, alpha):
    exact = merged_weight.dtype == torch.float64
    wide = [t if exact else t.float() for t in (merged_weight, A, B)]
    return wide[0] - alpha / A.shape[0] * wide[2] @ wide[1]


@wrong("unmerge_lora", "no gradient reaches merged_weight")
def without_gradient(merged_weight, A, B, alpha):
    with torch.no_grad():
        return merged_weight - alpha / A.shape[0] * B @ A


@wrong("unmerge_lora", "no gradient reaches A")
def detached_factors(merged_weight, A, B, alpha):
    return merged_weight - alpha / A.shape[0] * (B @ A).detach()


@wrong("unmerge_lora", "your function raised RuntimeError: mat1 and mat2")
def factors_turned(merged_weight, A, B, alpha):
    return merged_weight - alpha / A.shape[0] * A @ B


@wrong("unmerge_lora", "the parameters differ")
def parameters_turned(merged_weight, B, A, alpha):
    return merged_weight - alpha / A.shape[0] * B @ A


@right("unmerge_lora")
def einsum(merged_weight, A, B, alpha):
    return merged_weight - torch.einsum("or,ri->oi", B, A) * (alpha / B.shape[1])


@right("unmerge_lora")
def scaled_first(merged_weight, A, B, alpha):
    return torch.addmm(merged_weight, B * (alpha / len(A)), A, alpha=-1)


@right("unmerge_lora")
def in_double(merged_weight, A, B, alpha):
    exact = merged_weight.double() - alpha * (B.double() @ A.double()) / len(A)
    return exact.to(merged_weight.dtype)


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


@wrong("compress_lora", "only A is decomposed")
def svd_of_a(A, B, rank):
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return S[:rank, None] * Vh[:rank], B @ U[:, :rank]


@wrong("compress_lora", "only B is decomposed")
def svd_of_b(A, B, rank):
    U, S, Vh = torch.linalg.svd(B, full_matrices=False)
    return Vh[:rank] @ A, U[:, :rank] * S[:rank]


@wrong("compress_lora", "the R of A's QR is not transposed")
def r_untransposed(A, B, rank):
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra)
    return S[:rank, None] * Vh[:rank] @ Qa.T, Qb @ U[:, :rank]


@wrong("compress_lora", "the first rows and columns are kept")
def sliced(A, B, rank):
    return A[:rank], B[:, :rank]


@wrong("compress_lora", "whole rows and columns are chosen")
def largest_rows(A, B, rank):
    order = torch.argsort(A.norm(dim=1) * B.norm(dim=0), descending=True)[:rank]
    return A[order].clone(), B[:, order].clone()


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


@wrong("compress_lora", "the singular values are left out")
def no_singular_values(A, B, rank):
    return compressed(A, B, rank, lambda S: (torch.ones_like(S), torch.ones_like(S)))


@wrong("compress_lora", "the singular values are in both factors")
def values_twice(A, B, rank):
    return compressed(A, B, rank, lambda S: (S, S))


@wrong("compress_lora", "the smallest singular values are kept")
def smallest(A, B, rank):
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    return Vh[-rank:] @ Qa.T, Qb @ U[:, -rank:] * S[-rank:]


@wrong("compress_lora", "QR alone does not sort")
def qr_alone(A, B, rank):
    Q, R = torch.linalg.qr(B)
    return (R @ A)[:rank], Q[:, :rank]


@wrong("compress_lora", "the order is turned: return A first")
def order_turned(A, B, rank):
    return compressed(A, B, rank)[::-1]


@wrong("compress_lora", "both factors are transposed")
def transposed(A, B, rank):
    new_A, new_B = compressed(A, B, rank)
    return new_A.T, new_B.T


@wrong("compress_lora", "the factors are returned as they were")
def as_they_were(A, B, rank):
    return A, B


@wrong("compress_lora", "is a tensor, expected a tuple of 2")
def one_of_two(A, B, rank):
    return compressed(A, B, rank)[0]


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
    a, b = compressed(A.double(), B.double(), rank, lambda S: (S, torch.ones_like(S)))
    return a.to(A.dtype), b.to(B.dtype)


# ------------------------------------------------------------------ embedding_lora


@wrong("embedding_lora", "the scaling alpha / r is left out")
def unscaled_lookup(ids, weight, A, B, alpha):
    return weight[ids] + A.T[ids] @ B.T


@wrong("embedding_lora", "alpha is not divided by r")
def alpha_lookup(ids, weight, A, B, alpha):
    return weight[ids] + alpha * A.T[ids] @ B.T


@wrong("embedding_lora", "the rank is A.shape[0]")
def vocabulary_as_rank(ids, weight, A, B, alpha):
    return weight[ids] + alpha / A.shape[1] * A.T[ids] @ B.T


@wrong("embedding_lora", "the token table's own rows are missing")
def update_only(ids, weight, A, B, alpha):
    return alpha / A.shape[0] * A.T[ids] @ B.T


@wrong("embedding_lora", "these are the base's rows")
def base_only(ids, weight, A, B, alpha):
    return F.embedding(ids, weight)


@wrong("embedding_lora", "the scaling is applied to the base's rows too")
def base_scaled(ids, weight, A, B, alpha):
    return alpha / A.shape[0] * (weight[ids] + A.T[ids] @ B.T)


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


@wrong("embedding_lora", "no gradient reaches A")
def frozen_a(ids, weight, A, B, alpha):
    return weight[ids] + alpha / A.shape[0] * A.data.T[ids] @ B.T


@right("embedding_lora")
def einsum_lookup(ids, weight, A, B, alpha):
    return weight[ids] + torch.einsum("r...,dr->...d", A[:, ids], B) * (alpha / len(A))


@right("embedding_lora")
def low_rank_copies(ids, weight, A, B, alpha):
    table = (alpha / len(A) * A).T.contiguous()  # (V, r), no larger than A
    return F.embedding(ids, weight) + F.linear(F.embedding(ids, table), B)


@right("embedding_lora")
def flattened(ids, weight, A, B, alpha):
    flat = ids.reshape(-1)
    scaled = A.index_select(1, flat) * (alpha / B.shape[1])
    rows = weight.index_select(0, flat) + (B @ scaled).T
    return rows.reshape(*ids.shape, -1)


# ------------------------------------------------------------------ sum_adapters


@wrong("sum_adapters", "the factors are summed, not the products")
def as_peft_linear(adapters):
    scales = [math.sqrt(w * alpha / A.shape[0]) for A, _, alpha, w in adapters]
    As = [s * A for s, (A, _, _, _) in zip(scales, adapters, strict=True)]
    Bs = [s * B for s, (_, B, _, _) in zip(scales, adapters, strict=True)]
    return torch.stack(As).sum(0), torch.stack(Bs).sum(0)


@wrong("sum_adapters", "the weights are left out")
def no_weights(adapters):
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([alpha / len(A) * B for A, B, alpha, _ in adapters], 1)


@wrong("sum_adapters", "the scalings alpha / r are left out")
def no_scalings(adapters):
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([w * B for _, B, _, w in adapters], 1)


@wrong("sum_adapters", "alpha is not divided by r")
def alphas_alone(adapters):
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([w * alpha * B for _, B, alpha, w in adapters], 1)


@wrong("sum_adapters", "weight and scaling are in both factors")
def in_both(adapters):
    A = torch.cat([w * alpha / len(A) * A for A, _, alpha, w in adapters])
    return A, torch.cat([w * alpha / len(A) * B for A, B, alpha, w in adapters], 1)


@wrong("sum_adapters", "the ranks' sum")
def total_rank(adapters):
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([w * alpha / len(A) * B for _, B, alpha, w in adapters], 1)


@wrong("sum_adapters", "divided by their sum")
def averaged(adapters):
    total = sum(w for *_, w in adapters)
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([w / total * alpha / len(A) * B for A, B, alpha, w in adapters], 1)


@wrong("sum_adapters", "a negative weight has no square root")
def square_roots(adapters):
    roots = [torch.tensor(w * alpha / len(A)).sqrt() for A, _, alpha, w in adapters]
    A = torch.cat([root * a[0] for root, a in zip(roots, adapters, strict=True)])
    return A, torch.cat([root * a[1] for root, a in zip(roots, adapters, strict=True)], 1)


@wrong("sum_adapters", "the sign of a negative weight is lost")
def absolute(adapters):
    A = torch.cat([A for A, _, _, _ in adapters])
    return A, torch.cat([abs(w) * alpha / len(A) * B for A, B, alpha, w in adapters], 1)


@wrong("sum_adapters", "stacked in different orders")
def orders(adapters):
    A = torch.cat([A for A, _, _, _ in adapters[::-1]])
    return A, torch.cat([w * alpha / len(A) * B for A, B, alpha, w in adapters], 1)


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


def inject(model, rank, alpha, matches, freeze=True):
    """What is right once the matches are: shared by the answers below."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches(n)]
    if freeze:
        for p in model.parameters():
            p.requires_grad_(False)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(linear, rank, alpha))
    return model


def at_end(name, targets):
    return any(name == t or name.endswith("." + t) for t in targets)


@wrong("apply_lora", "the rest of the model still trains")
def nothing_frozen(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: at_end(n, targets), freeze=False)


@wrong("apply_lora", "targets are found anywhere in a name")
def substrings(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: any(t in n for t in targets))


@wrong("apply_lora", "with the end of the name, not with whole segments")
def suffixes(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: n.endswith(tuple(targets)))


@wrong("apply_lora", "only the last segment of a name is compared")
def last_segment(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: n.split(".")[-1] in targets)


@wrong("apply_lora", "a module at the top of the model has no dot")
def never_at_the_top(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: any(n.endswith(f".{t}") for t in targets))


@wrong("apply_lora", "alpha is not passed on")
def default_alpha(model, rank, alpha, targets):
    return inject(model, rank, 16.0, lambda n: at_end(n, targets))


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


@wrong("apply_lora", "is None: is a return statement missing?\n")
def nothing_returned(model, rank, alpha, targets):
    inject(model, rank, alpha, lambda n: at_end(n, targets))


def refuse_adapted(model, error=ValueError):
    if any(isinstance(m, LinearWithLoRA) for m in model.modules()):
        raise error("already adapted")


@wrong("apply_lora", "what is returned is not the argument model itself: change it in place")
def on_a_copy(model, rank, alpha, targets):
    refuse_adapted(model)
    refuse_unmatched(model, targets)
    return inject(copy.deepcopy(model), rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "modules in train mode differs: missing 'the model', 'embed'")
def in_eval_mode(model, rank, alpha, targets):
    return inject(model.eval(), rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "modules in train mode differs: too many 'the model', 'embed'")
def in_train_mode(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: at_end(n, targets)).train()


@right("apply_lora")
def by_the_course(model, rank, alpha, targets):
    return apply_lora_to_model(model, rank, alpha, tuple(targets))


@right("apply_lora")
def runtime_error(model, rank, alpha, targets):
    refuse_adapted(model, RuntimeError)
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


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
