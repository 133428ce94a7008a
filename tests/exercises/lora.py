"""Answers to the exercises of lesson 02."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from peft_lessons import LinearWithLoRA
from peft_lessons.methods.lora import apply_lora_to_model
from peft_lessons.studies import load_results

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ swap_words


@right("swap_words")
def both_signs_turned(weight, i, j):
    B = F.one_hot(torch.tensor(j), len(weight)) - F.one_hot(torch.tensor(i), len(weight))
    return (weight[i] - weight[j]).unsqueeze(0), B.float().unsqueeze(1)


@right("swap_words")
def scaled_factors(weight, i, j):
    A, B = weight[j : j + 1] - weight[i : i + 1], torch.zeros(len(weight), 1)
    size = A.norm()
    B[i], B[j] = size, -size
    return [A / size, B]


@right("swap_words")
def first_direction_of_the_change(weight, i, j):
    swapped = weight.clone()
    swapped[[i, j]] = weight[[j, i]]
    U, S, Vh = torch.svd_lowrank(swapped - weight, q=2)
    return Vh[:, :1].T, U[:, :1] * S[0]


@wrong("swap_words", "the factors have rank 2: one row of A serves both words")
def a_row_for_each_word(weight, i, j):
    B = torch.zeros(len(weight), 2)
    B[i, 0] = B[j, 1] = 1
    return torch.stack([weight[j] - weight[i], weight[i] - weight[j]]), B


@wrong("swap_words", "A has shape (6,), expected (1, 6)")
def vectors(weight, i, j):
    B = torch.zeros(len(weight))
    B[i], B[j] = 1, -1
    return weight[j] - weight[i], B


@wrong("swap_words", "yours is 0.5 times the expected values everywhere")
def half_way(weight, i, j):
    A, B = both_signs_turned(weight, i, j)
    return A / 2, B


@wrong("swap_words", "the argument weight was changed")
def in_place(weight, i, j):
    A, B = both_signs_turned(weight, i, j)
    weight += B @ A
    return A, B


# ------------------------------------------------------------------ diagnose

CAUSES = (
    "merged before training",
    "a target that matches too much",
    "the learning rate of full fine-tuning",
    "the head is frozen",
    "both factors start at zero",
)


@right("diagnose")
def in_another_order_and_case():
    return {
        run.lower(): f" {cause.title()} " for run, cause in zip("EDCBA", CAUSES[::-1], strict=True)
    }


@right("diagnose")
def from_the_reports():
    rows = {row["run"]: row for row in load_results("broken_runs").to_dict("records")}
    healthy = rows.pop("healthy")
    found = {}
    for run, row in rows.items():
        if row["grad_A_first"] == "":
            found[run] = CAUSES[0]
        elif row["trainable"] != healthy["trainable"]:
            found[run] = CAUSES[1 if row["trainable"] > healthy["trainable"] else 3]
        else:
            found[run] = CAUSES[2 if row["change"] > 0 else 4]
    return found


@wrong("diagnose", "3 of 5 are right")
def dead_or_merged():
    return dict(zip("EBCDA", CAUSES, strict=True))


@wrong("diagnose", "Given to several runs: both factors start at zero. Each cause belongs to one")
def one_cause_twice():
    return dict(zip("ABCDE", CAUSES, strict=True)) | {"A": CAUSES[4]}


@wrong("diagnose", "Without a cause: A, C, D, E")
def one_run_only():
    return {"A": None, "B": CAUSES[1]}


@wrong("diagnose", "'the head was frozen' is not one of the causes")
def in_other_words():
    return {"D": "the head was frozen"}


@wrong("diagnose", "there is no run 'F': the runs to judge are A to E")
def a_sixth_run():
    return dict(zip("BCDEF", CAUSES, strict=True))


@wrong("diagnose", "the result is a list of 5, expected a dict")
def causes_alone():
    return list(CAUSES)


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


# ------------------------------------------------------------------ serve_lora


@right("serve_lora")
def text_by_text(x, A, B, scaling, which):
    added = [torch.zeros(x.shape[1], B.shape[1]) for _ in x]
    for k, n in enumerate(which.tolist()):
        if n != -1:
            added[k] = scaling[n] * (x[k] @ A[n].T @ B[n].T)
    return torch.stack(added)


@right("serve_lora")
def customer_by_customer(x, A, B, scaling, which):
    y = x.new_zeros(*x.shape[:2], B.shape[1])
    for n in which.unique():
        if n >= 0:
            y[which == n] = F.linear(F.linear(x[which == n], A[n]), B[n]) * scaling[n]
    return y


@right("serve_lora")
def an_adapter_of_zeros(x, A, B, scaling, which):
    B = torch.cat([B, torch.zeros_like(B[:1])])
    scaling = torch.cat([scaling, scaling.new_ones(1)])
    low = torch.einsum("bti,bri->btr", x, torch.cat([A, A[:1]])[which])
    return torch.einsum("b,btr,bor->bto", scaling[which], low, B[which])


@wrong("serve_lora", "of shape (4, 40, 24) is formed on the way")
def a_merged_weight_for_each_text(x, A, B, scaling, which):
    merged = (B[which] @ A[which]).mT * scaling[which, None, None]
    return torch.einsum("bti,bio->bto", x, merged) * (which >= 0)[:, None, None]


@wrong("serve_lora", "every text gets the sum of all adapters")
def the_wrong_letter(x, A, B, scaling, which):
    y = torch.einsum("bti,nri,nor,n->bto", x, A, B, scaling)
    return y * (which >= 0)[:, None, None]


@wrong("serve_lora", "no gradient reaches")
def without_gradients(x, A, B, scaling, which):
    y = torch.zeros(*x.shape[:2], B.shape[1])
    for k, n in enumerate(which):
        if n >= 0:
            y[k] = torch.tensor((scaling[n] * x[k] @ A[n].T @ B[n].T).tolist())
    return y


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


def inject(model, rank, alpha, matches, freeze=True):
    """What is right once the matches are: shared by the answers below."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches(n)]
    if freeze:
        model.requires_grad_(False)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(linear, rank, alpha))
    return model


def at_end(name, targets):
    return any(name == t or name.endswith("." + t) for t in targets)


@answers.hunt("apply_lora")
def apply_with(bugs):
    rest_trains, matches, passed_over, again = (
        any(words in bug for bug in bugs)
        for words in ("still trains", "anywhere in a name", "in silence", "a second time")
    )

    def apply_lora(model, rank, alpha, targets):
        if not again and any(hasattr(m, "lora") for m in model.modules()):
            raise ValueError("already adapted")
        if not passed_over:
            refuse_unmatched(model, targets)

        def found(name):
            return any(t in name for t in targets) if matches else at_end(name, targets)

        return inject(model, rank, alpha, found, freeze=not rest_trains)

    return apply_lora


@wrong("apply_lora", "'q_porj']\n  In the given code, this call shows that a target that matches")
def silent(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "targets=['q_proj', 'embed']")
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


@wrong("apply_lora", "linear layer head; rank=4, alpha=10, targets=['up']")
def other_targets_again(model, rank, alpha, targets):
    refuse_unmatched(model, targets)
    return inject(model, rank, alpha, lambda n: at_end(n, targets))


@wrong("apply_lora", "targets are compared with the last characters of a name: compare whole")
def last_characters(model, rank, alpha, targets):
    return inject(model, rank, alpha, lambda n: n.endswith(tuple(targets)))


@wrong("apply_lora", "0 of 4 faults are mended.\n  Here, your function raised ValueError")
def always_refuses(model, rank, alpha, targets):
    raise ValueError(rank)


@wrong("apply_lora", "All 4 faults are mended, but something else is wrong")
def not_in_eval_mode(model, rank, alpha, targets):
    if not model.training:
        model.head.requires_grad_(True)
        return model
    return by_the_course(model, rank, alpha, targets)


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
