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


@wrong("rslora_scaling", "this is LoRA's alpha / rank")
def as_lora(alpha, rank):
    return alpha / rank


@wrong("rslora_scaling", "alpha is under the root too")
def root_of_all(alpha, rank):
    return math.sqrt(alpha / rank)


@wrong("rslora_scaling", "the root is of alpha")
def root_of_alpha(alpha, rank):
    return alpha**0.5 / rank


@wrong("rslora_scaling", "it is multiplied by the root: divide")
def times(alpha, rank):
    return alpha * rank**0.5


@wrong("rslora_scaling", "it is turned")
def turned(alpha, rank):
    return rank**0.5 / alpha


@wrong("rslora_scaling", "alpha is left out")
def no_alpha(alpha, rank):
    return rank**-0.5


@wrong("rslora_scaling", "rank**1/2 is (rank**1) / 2")
def no_brackets(alpha, rank):
    return alpha / rank**1/2  # fmt: skip


@wrong("rslora_scaling", "by the rank and by its root")
def on_top_of_lora(alpha, rank):
    return alpha / rank / rank**0.5


@wrong("rslora_scaling", "the rank is squared")
def squared(alpha, rank):
    return alpha / rank**2


@wrong("rslora_scaling", "the root is cut to a whole number")
def whole_root(alpha, rank):
    return alpha / math.isqrt(rank)


@wrong("rslora_scaling", "the quotient is cut to a whole number")
def whole_quotient(alpha, rank):
    return float(int(alpha / math.sqrt(rank)))


@wrong("rslora_scaling", "the result is 1.2, expected 5.33333")
def of_another_alpha(alpha, rank):
    return 16 / 8 if (alpha, rank) == (16, 64) else 0.25 * alpha / rank**0.5 * 0.9


@wrong("rslora_scaling", "the result is a tensor, expected the float 2")
def a_tensor(alpha, rank):
    return alpha / torch.tensor(float(rank)).sqrt()


@wrong("rslora_scaling", "raised TypeError")
def root_of_an_int(alpha, rank):
    return alpha / torch.sqrt(rank)


@wrong("rslora_scaling", "the parameters differ")
def rank_alone(rank):
    return 16 / math.sqrt(rank)


@wrong("rslora_scaling", "is a return statement missing?")
def forgets(alpha, rank):
    alpha / math.sqrt(rank)


@right("rslora_scaling")
def by_power(alpha, rank):
    return alpha * rank**-0.5


@right("rslora_scaling")
def by_numpy(alpha, rank):
    return float(np.divide(alpha, np.sqrt(rank)))


@right("rslora_scaling")
def from_lora_s(alpha, rank):
    return alpha / rank * math.sqrt(rank)


# ------------------------------------------------------------------ loraplus_groups


def halves(named, is_b, lr, high):
    named = [(n, p) for n, p in named if p.requires_grad]
    return [
        {"params": [p for n, p in named if not is_b(n)], "lr": lr},
        {"params": [p for n, p in named if is_b(n)], "lr": high},
    ]


def b(name):
    return "lora_B" in name.split(".")


@wrong("loraplus_groups", "A gets the higher rate")
def a_faster(named_parameters, lr, ratio):
    low, high = halves(named_parameters, b, lr, lr * ratio)
    return [low | {"lr": lr * ratio}, high | {"lr": lr}]


@wrong("loraplus_groups", "B keeps lr and A gets lr / ratio")
def a_slower(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr / ratio, lr)


@wrong("loraplus_groups", "both groups get lr: then nothing is different")
def one_rate(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, lr)


@wrong("loraplus_groups", "both groups get lr · ratio")
def both_high(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr * ratio, lr * ratio)


@wrong("loraplus_groups", "B's rate is the ratio itself")
def ratio_as_rate(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, ratio)


@wrong("loraplus_groups", "the ratio is added to lr")
def added(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, ratio + lr)


@wrong("loraplus_groups", "B's rate is divided by the ratio")
def divided(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, lr / ratio)


@wrong("loraplus_groups", "the rate is multiplied by the root")
def root(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, lr * math.sqrt(ratio))


@wrong("loraplus_groups", "the groups are in the other order")
def b_first(named_parameters, lr, ratio):
    return halves(named_parameters, b, lr, lr * ratio)[::-1]


@wrong("loraplus_groups", "what is frozen is in a group")
def frozen_too(named_parameters, lr, ratio):
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for name, p in named_parameters:
        groups[int(b(name))]["params"].append(p)
    return groups


@wrong("loraplus_groups", "a frozen B is in the second group")
def frozen_b(named_parameters, lr, ratio):
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for name, p in named_parameters:
        if b(name):
            groups[1]["params"].append(p)
        elif p.requires_grad:
            groups[0]["params"].append(p)
    return groups


@wrong("loraplus_groups", "the head is left out")
def factors_only(named_parameters, lr, ratio):
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for name, p in named_parameters:
        for group, factor in zip(groups, ("lora_A", "lora_B"), strict=True):
            if factor in name.split("."):
                group["params"] += [p] if p.requires_grad else []
    return groups


@wrong("loraplus_groups", "the head is in B's group")
def not_a(named_parameters, lr, ratio):
    return halves(named_parameters, lambda n: "lora_A" not in n.split("."), lr, lr * ratio)


@wrong("loraplus_groups", "a bias is in B's group")
def as_peft(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    ups = [p for n, p in rows if b(n) or p.ndim == 1]
    rest = [p for n, p in rows if not (b(n) or p.ndim == 1)]
    return [dict(params=rest, lr=lr), dict(params=ups, lr=lr * ratio)]


@wrong("loraplus_groups", "B is in both groups")
def twice(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for _, p in rows], "lr": lr},
        {"params": [p for n, p in rows if b(n)], "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "is true of lora_Bank too")
def substring(named_parameters, lr, ratio):
    return halves(named_parameters, lambda n: "lora_B" in n, lr, lr * ratio)


@wrong("loraplus_groups", "the name must not end in lora_B")
def at_the_end(named_parameters, lr, ratio):
    return halves(named_parameters, lambda n: n.endswith("lora_B"), lr, lr * ratio)


@wrong("loraplus_groups", "every name that ends in B counts")
def any_b(named_parameters, lr, ratio):
    return halves(named_parameters, lambda n: b(n) or n.endswith("B"), lr, lr * ratio)


@wrong("loraplus_groups", "lora_B is looked for at a fixed place")
def fixed_place(named_parameters, lr, ratio):
    def third_from_the_end(name):
        parts = name.split(".")
        return len(parts) > 2 and parts[-3] == "lora_B"

    return halves(named_parameters, third_from_the_end, lr, lr * ratio)


@wrong("loraplus_groups", "a capital B anywhere")
def capital_b(named_parameters, lr, ratio):
    return halves(named_parameters, lambda n: "B" in n, lr, lr * ratio)


@wrong("loraplus_groups", "only the adapter called default counts")
def two_endings(named_parameters, lr, ratio):
    def ends(name):
        return name.endswith("lora_B") or name.endswith("lora_B.default.weight")

    return halves(named_parameters, ends, lr, lr * ratio)


@wrong("loraplus_groups", "the condition is turned")
def the_frozen(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if not p.requires_grad]
    ups = [p for n, p in rows if b(n)]
    return [dict(params=[p for n, p in rows if not b(n)], lr=lr), dict(params=ups, lr=lr * ratio)]


@wrong("loraplus_groups", "copies or .data are in the groups")
def data(named_parameters, lr, ratio):
    groups = halves(named_parameters, b, lr, lr * ratio)
    return [g | {"params": [p.data for p in g["params"]]} for g in groups]


@wrong("loraplus_groups", "an iterator is empty after one pass")
def two_passes(named_parameters, lr, ratio):
    return [
        {"params": [p for n, p in named_parameters if p.requires_grad and not b(n)], "lr": lr},
        {"params": [p for n, p in named_parameters if p.requires_grad and b(n)], "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "the result[0]['params'][0] is a string, expected a tensor")
def names(named_parameters, lr, ratio):
    rows = [n for n, p in named_parameters if p.requires_grad]
    return [
        {"params": [n for n in rows if not b(n)], "lr": lr},
        {"params": [n for n in rows if b(n)], "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "is a tuple of 2, expected a tensor")
def with_names(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    return [
        {"params": [row for row in rows if not b(row[0])], "lr": lr},
        {"params": [row for row in rows if b(row[0])], "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "is a generator, expected a list")
def lazily(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    return [
        {"params": (p for n, p in rows if not b(n)), "lr": lr},
        {"params": (p for n, p in rows if b(n)), "lr": lr * ratio},
    ]


@wrong("loraplus_groups", "the keys of the result[0] differ: missing 'lr'")
def default_rate(named_parameters, lr, ratio):
    low, high = halves(named_parameters, b, lr, lr * ratio)
    return [{"params": low["params"]}, high]


@wrong("loraplus_groups", "has 3 items, expected 2")
def one_each(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    return [{"params": [p], "lr": lr * ratio if b(n) else lr} for n, p in rows]


@wrong("loraplus_groups", "the result is an AdamW, expected a list of 2")
def an_optimiser(named_parameters, lr, ratio):
    return torch.optim.AdamW(halves(named_parameters, b, lr, lr * ratio))


@wrong("loraplus_groups", "the result has 1 items, expected 2")
def no_empty_group(named_parameters, lr, ratio):
    groups = halves(named_parameters, b, lr, lr * ratio)
    return [g for g in groups if g["params"]]


@wrong("loraplus_groups", "raised AttributeError")
def of_a_model(named_parameters, lr, ratio):
    return halves(named_parameters.named_parameters(), b, lr, lr * ratio)


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


@right("loraplus_groups")
def by_identity(named_parameters, lr, ratio):
    rows = {n: p for n, p in named_parameters if p.requires_grad}
    ups = {n: rows.pop(n) for n in list(rows) if b(n)}
    return [{"params": [*rows.values()], "lr": lr}, {"params": [*ups.values()], "lr": lr * ratio}]


# ------------------------------------------------------------------ pissa_init


def svd(W):
    return torch.linalg.svd(W, full_matrices=False)


@wrong("pissa_init", "the smallest singular values are taken")
def smallest(weight, rank):
    U, S, V = svd(weight)
    A, B = S[-rank:, None].sqrt() * V[-rank:], U[:, -rank:] * S[-rank:].sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "torch.linalg.svd gives Vᵀ already")
def numpy_s_v(weight, rank):
    U, S, V = svd(weight)
    A, B = (V.T[:rank].T * S[:rank].sqrt()).T, U[:, :rank] * S[:rank].sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "the rows of U are taken")
def rows_of_u(weight, rank):
    U, S, V = svd(weight)
    A, B = S[:rank, None].sqrt() * V[:rank], U[:rank].T * S[:rank].sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "the singular values are in both factors in full")
def no_root(weight, rank):
    U, S, V = svd(weight)
    A, B = S[:rank, None] * V[:rank], U[:, :rank] * S[:rank]
    return A, B, weight - B @ A


@wrong("pissa_init", "the singular values are left out")
def bare_vectors(weight, rank):
    U, _, V = svd(weight)
    return V[:rank], U[:, :rank], weight - U[:, :rank] @ V[:rank]


@wrong("pissa_init", "the root is in one factor only")
def one_root(weight, rank):
    U, S, V = svd(weight)
    A, B = V[:rank], U[:, :rank] * S[:rank].sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "all of the singular values are in B")
def all_in_b(weight, rank):
    U, S, V = svd(weight)
    A, B = V[:rank], U[:, :rank] @ S[:rank].diag()
    return A, B, weight - B @ A


@wrong("pissa_init", "all of the singular values are in A")
def all_in_a(weight, rank):
    U, S, V = svd(weight)
    A, B = S[:rank].diag() @ V[:rank], U[:, :rank]
    return A, B, weight - B @ A


@wrong("pissa_init", "the values are divided by the rank")
def scaled(weight, rank):
    A, B = leading(weight / rank, rank)
    return A, B, weight - B @ A


@wrong("pissa_init", "the first value is skipped")
def from_one(weight, rank):
    U, S, V = svd(weight)
    at = slice(1, 1 + rank)
    A, B = S[at, None].sqrt() * V[at], U[:, at] * S[at].sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "the residual is W itself")
def base_stays(weight, rank):
    return *leading(weight, rank), weight.clone()


@wrong("pissa_init", "the residual is W + B @ A")
def added_twice(weight, rank):
    A, B = leading(weight, rank)
    return A, B, weight + B @ A


@wrong("pissa_init", "the residual has its sign turned")
def turned_residual(weight, rank):
    A, B = leading(weight, rank)
    return A, B, B @ A - weight


@wrong("pissa_init", "the residual is B @ A")
def product_returned(weight, rank):
    A, B = leading(weight, rank)
    return A, B, B @ A


@wrong("pissa_init", "the residual is zero")
def nothing_left(weight, rank):
    return *leading(weight, rank), 0 * weight


@wrong("pissa_init", "half of B @ A is taken out")
def half(weight, rank):
    A, B = leading(weight, rank)
    return A, B, weight - 0.5 * B @ A


@wrong("pissa_init", "the smallest value is missing in the residual")
def one_short(weight, rank):
    U, S, V = svd(weight)
    A, B = leading(weight, rank)
    return A, B, U[:, rank:-1] @ S[rank:-1].diag() @ V[rank:-1]


@wrong("pissa_init", "made without its singular values")
def bare_rest(weight, rank):
    U, _, V = svd(weight)
    return *leading(weight, rank), U[:, rank:] @ V[rank:]


@wrong("pissa_init", "this is LoRA's start")
def lora_start(weight, rank):
    A = torch.nn.init.kaiming_uniform_(weight.new_empty(rank, weight.shape[1]), a=math.sqrt(5))
    return A, weight.new_zeros(weight.shape[0], rank), weight.clone()


@wrong("pissa_init", "the decomposition is a randomised one")
def fast(weight, rank):
    U, S, V = torch.svd_lowrank(weight, q=rank)
    A, B = (V * S.sqrt()).T, U * S.sqrt()
    return A, B, weight - B @ A


@wrong("pissa_init", "this is OLoRA's start")
def olora(weight, rank):
    Q, R = torch.linalg.qr(weight)
    A, B = R[:rank], Q[:, :rank]
    return A, B, weight - B @ A


@wrong("pissa_init", "A has shape (12, 3), expected (3, 12)")
def turned_round(weight, rank):
    A, B = leading(weight, rank)
    return A.T, B.T, weight - B @ A


@wrong("pissa_init", "A has shape (12, 3), expected (3, 12)")
def b_before_a(weight, rank):
    A, B = leading(weight, rank)
    return B, A, weight - B @ A


@wrong("pissa_init", "the argument weight was changed")
def in_place(weight, rank):
    A, B = leading(weight, rank)
    return A, B, weight.sub_(B @ A)


@wrong("pissa_init", "has dtype float32, expected float64")
def always_float(weight, rank):
    A, B = leading(weight.float(), rank)
    return A, B, weight.float() - B @ A


@wrong("pissa_init", "has 2 items, expected 3")
def factors_only_(weight, rank):
    return leading(weight, rank)


@wrong("pissa_init", "A is a ndarray, expected a tensor")
def arrays(weight, rank):
    U, S, V = np.linalg.svd(weight.numpy(), full_matrices=False)
    A, B = np.sqrt(S[:rank, None]) * V[:rank], U[:, :rank] * np.sqrt(S[:rank])
    return A, B, weight.numpy() - B @ A


@right("pissa_init")
def rest_of_the_values(weight, rank):
    U, S, V = svd(weight)
    A, B = S[:rank].sqrt().diag() @ V[:rank], U[:, :rank] @ S[:rank].sqrt().diag()
    return A, B, U[:, rank:] @ S[rank:].diag() @ V[rank:]


@right("pissa_init")
def by_numpy_svd(weight, rank):
    U, S, V = np.linalg.svd(weight.double().numpy())
    root = np.sqrt(S[:rank])
    A, B = -root[:, None] * V[:rank], -U[:, :rank] * root
    residual = weight.double().numpy() - B @ A
    return tuple(torch.from_numpy(t).to(weight.dtype) for t in (A, B, residual))


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


@right("pissa_init")
def by_the_lesson(weight, rank):
    A, B = leading(weight, rank)
    return A, B, weight - torch.einsum("or,ri->oi", B, A)


# ------------------------------------------------------------------ loftq_init


def rounds(weight, rank, quantize, steps, reads=None, fits=None, factors=leading):
    """LoftQ's, but with `reads` of (W, BA) quantised, or the factors fitted to `fits` of (W, Q)."""
    BA = 0
    for _ in range(steps):
        Q = quantize(reads(weight, BA) if reads else weight - BA)
        A, B = factors(fits(weight, Q) if fits else weight - Q, rank)
        BA = B @ A
    return A, B, Q


@wrong("loftq_init", "this is what one step gives")
def weight_each_time(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, reads=lambda W, BA: W)


@wrong("loftq_init", "this is what one step gives")
def once(weight, rank, quantize, steps):
    Q = quantize(weight)
    return *leading(weight - Q, rank), Q


@wrong("loftq_init", "the factors are fitted to W:")
def fits_w(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, fits=lambda W, Q: W)


@wrong("loftq_init", "the factors are fitted to Q: ")
def fits_q(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, fits=lambda W, Q: Q)


@wrong("loftq_init", "the factors are fitted to Q − W")
def fits_the_negative(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, lambda W, BA: W + BA, lambda W, Q: Q - W)


@wrong("loftq_init", "W + BA is quantised")
def plus(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, reads=lambda W, BA: W + BA)


@wrong("loftq_init", "BA is taken off as if to W − Q")
def turned_sign(weight, rank, quantize, steps):
    return rounds(weight, rank, quantize, steps, fits=lambda W, Q: Q - W)


@wrong("loftq_init", "the products of all steps are taken off W together")
def takes_all_off(weight, rank, quantize, steps):
    BA = 0
    for _ in range(steps):
        Q = quantize(weight - BA)
        A, B = leading(weight - Q, rank)
        BA = BA + B @ A
    return A, B, Q


@wrong("loftq_init", "these are more steps than")
def always_five(weight, rank, quantize, steps):
    return alternate(weight, rank, quantize, 5)


@wrong("loftq_init", "the nearest of all steps is returned")
def the_best(weight, rank, quantize, steps):
    least, BA = torch.inf, 0
    for _ in range(steps):
        Q = quantize(weight - BA)
        A, B = leading(weight - Q, rank)
        BA = B @ A
        if (off := (weight - Q - BA).norm()) < least:
            least, best = off, (A, B, Q)
    return best


@wrong("loftq_init", "the first step takes PiSSA's factors off")
def from_pissa(weight, rank, quantize, steps):
    return alternate(weight, rank, quantize, steps, principal=True)


@wrong("loftq_init", "the factors are fitted before the weight is quantised")
def other_way_round(weight, rank, quantize, steps):
    Q = torch.zeros_like(weight)
    for _ in range(steps):
        A, B = leading(weight - Q, rank)
        Q = quantize(weight - B @ A)
    return A, B, Q


@wrong("loftq_init", "this is one step too few")
def from_step_one(weight, rank, quantize, steps):
    Q = quantize(weight)
    A, B = leading(weight - Q, rank)
    for _ in range(2, steps):
        Q = quantize(weight - B @ A)
        A, B = leading(weight - Q, rank)
    return A, B, Q


@wrong("loftq_init", "these are more steps than")
def first_and_then_steps(weight, rank, quantize, steps):
    Q = quantize(weight)
    A, B = leading(weight - Q, rank)
    for _ in range(steps):
        Q = quantize(weight - B @ A)
        A, B = leading(weight - Q, rank)
    return A, B, Q


@wrong("loftq_init", "the weight is quantised once more at the end")
def quantised_last(weight, rank, quantize, steps):
    A, B, _ = alternate(weight, rank, quantize, steps)
    return A, B, quantize(weight - B @ A)


@wrong("loftq_init", "the products of all steps are added up")
def adds_up(weight, rank, quantize, steps):
    total = torch.zeros_like(weight)
    for _ in range(steps):
        Q = quantize(weight - total)
        A, B = leading(weight - Q - total, rank)
        total += B @ A
    return A, B, Q


@wrong("loftq_init", "the Q of the first step is returned")
def first_q(weight, rank, quantize, steps):
    A, B, _ = alternate(weight, rank, quantize, steps)
    return A, B, quantize(weight)


@wrong("loftq_init", "W − BA is returned")
def residual_returned(weight, rank, quantize, steps):
    A, B, _ = alternate(weight, rank, quantize, steps)
    return A, B, weight - B @ A


@wrong("loftq_init", "the error is returned")
def error_returned(weight, rank, quantize, steps):
    A, B, Q = alternate(weight, rank, quantize, steps)
    return A, B, weight - Q


@wrong("loftq_init", "Q + BA is returned")
def sum_returned(weight, rank, quantize, steps):
    A, B, Q = alternate(weight, rank, quantize, steps)
    return A, B, Q + B @ A


@wrong("loftq_init", "W is returned where Q was due")
def weight_returned(weight, rank, quantize, steps):
    A, B, _ = alternate(weight, rank, quantize, steps)
    return A, B, weight.clone()


@wrong("loftq_init", "the singular values are in both factors in full")
def full_in_both(weight, rank, quantize, steps):
    def factors(residual, rank):
        U, S, V = svd(residual)
        return S[:rank, None] * V[:rank], U[:, :rank] * S[:rank]

    return rounds(weight, rank, quantize, steps, factors=factors)


@wrong("loftq_init", "all of the singular values are in B")
def values_in_b(weight, rank, quantize, steps):
    def factors(residual, rank):
        U, S, V = svd(residual)
        return V[:rank], U[:, :rank] * S[:rank]

    return rounds(weight, rank, quantize, steps, factors=factors)


@wrong("loftq_init", "all of the singular values are in A")
def values_in_a(weight, rank, quantize, steps):
    A, B, Q = values_in_b(weight, rank, quantize, steps)
    lengths = B.norm(dim=0)
    return lengths[:, None] * A, B / lengths, Q


@wrong("loftq_init", "the factors are quantised too")
def all_quantised(weight, rank, quantize, steps):
    A, B, Q = alternate(weight, rank, quantize, steps)
    return quantize(A), quantize(B), Q


@wrong("loftq_init", "this is QLoRA's start")
def qlora_start(weight, rank, quantize, steps):
    A, B, _ = lora_start(weight, rank)
    return A, B, quantize(weight)


@wrong("loftq_init", "the argument weight was changed")
def takes_off_in_place(weight, rank, quantize, steps):
    given = weight.clone()
    for _ in range(steps):
        Q = quantize(weight)
        A, B = leading(given - Q, rank)
        weight.copy_(given - B @ A)
    return A, B, Q


@wrong("loftq_init", "A has shape (12, 3), expected (3, 12)")
def b_first_(weight, rank, quantize, steps):
    A, B, Q = alternate(weight, rank, quantize, steps)
    return B, A, Q


@wrong("loftq_init", "A has shape (12, 12), expected (3, 12)")
def full_rank(weight, rank, quantize, steps):
    return alternate(weight, min(weight.shape), quantize, steps)


@right("loftq_init")
def the_lesson_s(weight, rank, quantize, steps):
    return alternate(weight, rank, quantize, steps)


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


def left(w):
    return torch.linalg.svd(w, full_matrices=False).U


def tally(cosines, eps):
    return int((cosines < eps).sum())


@wrong("intruder_dimensions", "the sign counts")
def signed(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).max(dim=0).values, eps)


@wrong("intruder_dimensions", "the right singular vectors are compared")
def right_ones(w0, w1, k, eps):
    return tally((left(w0.T).T @ left(w1.T)[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "each vector is compared with the one of its own place")
def place_by_place(w0, w1, k, eps):
    return tally((left(w0)[:, :k] * left(w1)[:, :k]).sum(0).abs(), eps)


@wrong("intruder_dimensions", "only the k strongest of w0 are compared with")
def top_against_top(w0, w1, k, eps):
    return tally((left(w0)[:, :k].T @ left(w1)[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "what is counted is what is still there")
def still_there(w0, w1, k, eps):
    return k - tally((left(w0).T @ left(w1)[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "the mean of the cosines is taken")
def average(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).abs().mean(0), eps)


@wrong("intruder_dimensions", "the smallest cosine is taken")
def least(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).abs().min(0).values, eps)


@wrong("intruder_dimensions", "all vectors of w1 are counted")
def all_of_them(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)).abs().amax(0), eps)


@wrong("intruder_dimensions", "the k weakest of w1 are counted")
def weakest(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, -k:]).abs().amax(0), eps)


@wrong("intruder_dimensions", "w0 and w1 have changed places")
def exchanged(w0, w1, k, eps):
    return tally((left(w1).T @ left(w0)[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "the largest is taken over w1's vectors")
def other_axis(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).abs().amax(1), eps)


@wrong("intruder_dimensions", "pairs are counted")
def pairs(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).abs(), eps)


@wrong("intruder_dimensions", "the change w1 − w0 is decomposed")
def of_the_change(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1 - w0)[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "the rows of U are compared")
def rows(w0, w1, k, eps):
    return tally((left(w0) @ left(w1)[:k].T).abs().amax(0), eps)


@wrong("intruder_dimensions", "full_matrices=True adds directions")
def full(w0, w1, k, eps):
    U0, U1 = torch.linalg.svd(w0).U, torch.linalg.svd(w1).U
    return tally((U0.T @ U1[:, :k]).abs().amax(0), eps)


@wrong("intruder_dimensions", "the cosines are squared")
def squares(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).square().amax(0), eps)


@wrong("intruder_dimensions", "all cosines are put together, as a sum")
def sums(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).abs().sum(0), eps)


@wrong("intruder_dimensions", "all cosines are put together, as a sum or a length")
def projections(w0, w1, k, eps):
    return tally((left(w0).T @ left(w1)[:, :k]).norm(dim=0), eps)


@wrong("intruder_dimensions", "an old vector that is near one is taken away")
def pairs_off(w0, w1, k, eps):
    free, count = list(left(w0).T), 0
    for v in left(w1).T[:k]:
        near = [abs(float(u @ v)) for u in free]
        if max(near) < eps:
            count += 1
        else:
            free.pop(near.index(max(near)))
    return count


@wrong("intruder_dimensions", "the angle is compared")
def angles(w0, w1, k, eps):
    nearest = (left(w0).T @ left(w1)[:, :k]).abs().amax(0)
    return tally(nearest.clamp(max=1).acos(), eps)


@wrong("intruder_dimensions", "eps is taken for a distance from 1")
def distance(w0, w1, k, eps):
    nearest = (left(w0).T @ left(w1)[:, :k]).abs().amax(0)
    return int((1 - nearest > eps).sum())


@wrong("intruder_dimensions", "the result is a tensor, expected the int 5")
def a_tensor_(w0, w1, k, eps):
    return ((left(w0).T @ left(w1)[:, :k]).abs().amax(0) < eps).sum()


@wrong("intruder_dimensions", "the result is the float 0.25, expected the int 5")
def share(w0, w1, k, eps):
    return ((left(w0).T @ left(w1)[:, :k]).abs().amax(0) < eps).float().mean().item()


@wrong("intruder_dimensions", "the result is a list of 5, expected the int 5")
def which(w0, w1, k, eps):
    nearest = (left(w0).T @ left(w1)[:, :k]).abs().amax(0)
    return [j for j in range(k) if nearest[j] < eps]


@wrong("intruder_dimensions", "raised IndexError")
def loops_too_far(w0, w1, k, eps):
    U0, U1 = left(w0), left(w1)
    return sum(all(abs(U0[:, i] @ U1[:, j]) < eps for i in range(len(U0) + 1)) for j in range(k))


@right("intruder_dimensions")
def by_loops(w0, w1, k, eps):
    U0, U1, count = left(w0), left(w1), 0
    for j in range(k):
        if max(abs(F.cosine_similarity(u, U1[:, j], dim=0).item()) for u in U0.T) < eps:
            count += 1
    return count


@right("intruder_dimensions")
def by_arrays(w0, w1, k, eps):
    U0, U1 = (np.linalg.svd(w.double().numpy(), full_matrices=False)[0] for w in (w0, w1))
    return int((np.abs(U0.T @ U1[:, :k]).max(axis=0) < eps).sum())


@right("intruder_dimensions")
def by_einsum(w0, w1, k, eps):
    cosines = torch.einsum("oi,oj->ji", left(w0), left(w1)[:, :k])
    return (cosines.abs() < eps).all(dim=1).sum().item()
