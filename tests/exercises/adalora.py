"""Answers to the exercises of lesson 05."""

import torch
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ orthogonality_penalty


def eye(n, like):
    return torch.eye(n, dtype=like.dtype)


@wrong("orthogonality_penalty", "the norms are not squared")
def as_in_the_library(P, Q):
    I = eye(Q.shape[0], Q)  # noqa: E741
    return torch.norm(P.T @ P - I, p="fro") + torch.norm(Q @ Q.T - I, p="fro")


@wrong("orthogonality_penalty", "this is PEFT's form, the mean of two norms")
def mean_of_norms(P, Q):
    grams = [P.T @ P, Q @ Q.T]
    return sum((g - eye(len(g), g)).norm() for g in grams) / len(grams)


@wrong("orthogonality_penalty", "add the two terms, without a mean or a weight")
def averaged(P, Q):
    return torch.stack([((g - eye(len(g), g)) ** 2).sum() for g in (P.T @ P, Q @ Q.T)]).mean()


@wrong("orthogonality_penalty", "the squares are averaged over the entries")
def mean_square(P, Q):
    return sum(F.mse_loss(g, eye(len(g), g)) for g in (P.T @ P, Q @ Q.T))


@wrong("orthogonality_penalty", "absolute values are added")
def absolute(P, Q):
    return sum((g - eye(len(g), g)).abs().sum() for g in (P.T @ P, Q @ Q.T))


@wrong("orthogonality_penalty", "one root is taken of the whole")
def root(P, Q):
    gaps = torch.stack([g - eye(len(g), g) for g in (P.T @ P, Q @ Q.T)])
    return gaps.norm()


@wrong("orthogonality_penalty", "this is the spectral norm")
def spectral(P, Q):
    return sum(torch.linalg.norm(g - eye(len(g), g), ord=2) ** 2 for g in (P.T @ P, Q @ Q.T))


@wrong("orthogonality_penalty", "Q has its vectors in its rows")
def q_by_columns(P, Q):
    return sum((g - eye(len(g), g)).pow(2).sum() for g in (P.T @ P, Q.T @ Q))


@wrong("orthogonality_penalty", "P has its vectors in its columns")
def p_by_rows(P, Q):
    return sum((g - eye(len(g), g)).pow(2).sum() for g in (P @ P.T, Q @ Q.T))


@wrong("orthogonality_penalty", "both products are turned")
def turned(P, Q):
    return mean_free(P.T, Q.T)


def mean_free(P, Q):
    return sum((g - eye(len(g), g)).pow(2).sum() for g in (P.T @ P, Q @ Q.T))


@wrong("orthogonality_penalty", "I is not subtracted")
def without_identity(P, Q):
    return (P.T @ P).pow(2).sum() + (Q @ Q.T).pow(2).sum()


@wrong("orthogonality_penalty", "1 is subtracted from every entry")
def minus_one(P, Q):
    return (P.T @ P - 1).pow(2).sum() + (Q @ Q.T - 1).pow(2).sum()


@wrong("orthogonality_penalty", "only the off-diagonal entries count")
def off_diagonal(P, Q):
    return sum((g.triu(1) ** 2).sum() + (g.tril(-1) ** 2).sum() for g in (P.T @ P, Q @ Q.T))


@wrong("orthogonality_penalty", "only the diagonal counts")
def lengths_alone(P, Q):
    return ((P.norm(dim=0) ** 2 - 1) ** 2).sum() + ((Q.norm(dim=1) ** 2 - 1) ** 2).sum()


@wrong("orthogonality_penalty", "only P is penalised")
def p_alone(P, Q):
    return (P.T @ P - eye(P.shape[1], P)).square().sum()


@wrong("orthogonality_penalty", "the result has shape (2,), expected ()")
def two_terms(P, Q):
    return torch.stack([(g - eye(len(g), g)).pow(2).sum() for g in (P.T @ P, Q @ Q.T)])


@wrong("orthogonality_penalty", "expected a tensor")
def a_float(P, Q):
    return mean_free(P, Q).item()


@wrong("orthogonality_penalty", "no gradient reaches P")
def detached(P, Q):
    return mean_free(P.detach(), Q.detach())


@wrong("orthogonality_penalty", "RuntimeError: The size of tensor a (4)")
def identity_of_out(P, Q):
    return (P.T @ P - torch.eye(P.shape[0])).pow(2).sum()


@right("orthogonality_penalty")
def by_norms(P, Q):
    I = torch.eye(P.shape[1], dtype=P.dtype)  # noqa: E741
    return torch.linalg.matrix_norm(P.mT @ P - I) ** 2 + torch.linalg.matrix_norm(Q @ Q.mT - I) ** 2


@right("orthogonality_penalty")
def expanded(P, Q):
    # ‖G − I‖² = ‖G‖² − 2 tr G + r
    r = Q.shape[0]
    grams = torch.einsum("or,os->rs", P, P), torch.einsum("ri,si->rs", Q, Q)
    return sum((g * g).sum() - 2 * g.trace() + r for g in grams)


@right("orthogonality_penalty")
def by_distance(P, Q):
    return sum(torch.dist(g, eye(len(g), g)) ** 2 for g in (P.T @ P, Q @ Q.T))


# ------------------------------------------------------------------ update_importance


def moved(weight, grad, s, u, b1, b2, deviation=lambda i, new, old: (i - new).abs()):
    i = (weight * grad).abs()
    new = b1 * s + (1 - b1) * i
    return new, b2 * u + (1 - b2) * deviation(i, new, s)


@wrong("update_importance", "the uncertainty measures from the old sensitivity")
def old_sensitivity(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = (weight * grad).abs()
    uncertainty = beta2 * uncertainty + (1 - beta2) * (i - sensitivity).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * i
    return sensitivity, uncertainty, sensitivity * uncertainty


@wrong("update_importance", "the uncertainty is not an absolute value")
def signed_deviation(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2, lambda i, new, old: i - new)
    return s, u, s * u


@wrong("update_importance", "the deviation is squared")
def variance(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(
        weight, grad, sensitivity, uncertainty, beta1, beta2, lambda i, new, old: (i - new) ** 2
    )
    return s, u, s * u


@wrong("update_importance", "the importance has a sign")
def signed(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = weight * grad
    s = beta1 * sensitivity + (1 - beta1) * i
    u = beta2 * uncertainty + (1 - beta2) * (i - s).abs()
    return s, u, s * u


@wrong("update_importance", "the weight is left out of the importance")
def gradient_alone(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(torch.ones_like(weight), grad, sensitivity, uncertainty, beta1, beta2)
    return s, u, s * u


@wrong("update_importance", "the gradient is left out of the importance")
def magnitude(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, torch.ones_like(grad), sensitivity, uncertainty, beta1, beta2)
    return s, u, s * u


@wrong("update_importance", "the importance is squared")
def taylor_squared(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight**2, grad**2, sensitivity, uncertainty, beta1, beta2)
    return s, u, s * u


@wrong("update_importance", "β and 1 − β have changed places")
def shares_swapped(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, 1 - beta1, 1 - beta2)
    return s, u, s * u


@wrong("update_importance", "the new value is not multiplied by 1 − β")
def momentum(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = (weight * grad).abs()
    s = beta1 * sensitivity + i
    u = beta2 * uncertainty + (i - s).abs()
    return s, u, s * u


@wrong("update_importance", "the averages are divided by 1 − β as in Adam")
def bias_corrected(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = (weight * grad).abs()
    s = (beta1 * sensitivity + (1 - beta1) * i) / (1 - beta1)
    u = (beta2 * uncertainty + (1 - beta2) * (i - s).abs()) / (1 - beta2)
    return s, u, s * u


@wrong("update_importance", "beta1 and beta2 have changed places")
def betas_swapped(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta2, beta1)
    return s, u, s * u


@wrong("update_importance", "beta1 smooths both")
def one_beta(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta1)
    return s, u, s * u


@wrong("update_importance", "the score is the product of the old averages")
def old_score(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2)
    return s, u, sensitivity * uncertainty


@wrong("update_importance", "the score is a sum")
def summed(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2)
    return s, u, s + u


@wrong("update_importance", "the score is the sensitivity alone")
def sensitivity_alone(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2)
    return s, u, s


@wrong("update_importance", "the score comes last")
def score_first(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2)
    return s * u, s, u


@wrong("update_importance", "the argument sensitivity was changed")
def in_place(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = (weight * grad).abs()
    sensitivity.mul_(beta1).add_(i, alpha=1 - beta1)
    uncertainty.mul_(beta2).add_((i - sensitivity).abs(), alpha=1 - beta2)
    return sensitivity, uncertainty, sensitivity * uncertainty


@wrong("update_importance", "sensitivity has shape (), expected (4, 10)")
def one_number(weight, grad, sensitivity, uncertainty, beta1, beta2):
    s, u = moved(weight, grad, sensitivity, uncertainty, beta1, beta2)
    return s.mean(), u.mean(), (s * u).mean()


@wrong("update_importance", "the result has 2 items, expected 3")
def two_results(weight, grad, sensitivity, uncertainty, beta1, beta2):
    return moved(weight, grad, sensitivity, uncertainty, beta1, beta2)


@right("update_importance")
def by_lerp(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i = torch.abs(weight) * torch.abs(grad)
    s = torch.lerp(i, sensitivity, beta1)
    u = torch.lerp((s - i).abs(), uncertainty, beta2)
    return s, u, s.mul(u)


@right("update_importance")
def through_the_old_one(weight, grad, sensitivity, uncertainty, beta1, beta2):
    # |I − new| = β₁ |I − old|
    i = (weight * grad).abs()
    u = uncertainty * beta2 + (1 - beta2) * beta1 * (i - sensitivity).abs()
    s = i + beta1 * (sensitivity - i)
    return [s, u, s * u]


@right("update_importance")
def on_copies(weight, grad, sensitivity, uncertainty, beta1, beta2):
    i, s, u = (weight * grad).abs(), sensitivity.clone(), uncertainty.clone()
    s.mul_(beta1).add_(i, alpha=1 - beta1)
    u.mul_(beta2).add_((i - s).abs(), alpha=1 - beta2)
    return s, u, s * u


# ------------------------------------------------------------------ cubic_budget


def ends(step, initial, final, tinit, tfinal, total):
    if step <= tinit:
        return initial
    return final if step >= total - tfinal else None


def on_the_way(share, rounded=int):
    def budget(step, initial, final, tinit, tfinal, total):
        held = ends(step, initial, final, tinit, tfinal, total)
        if held is not None:
            return held
        return rounded(final + (initial - final) * share(step, tinit, tfinal, total))

    return budget


@wrong("cubic_budget", "the way is linear")
def linear(step, initial, final, tinit, tfinal, total):
    share = 1 - (step - tinit) / (total - tfinal - tinit)
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "quadratic, not cubic")
def quadratic(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) / (total - tfinal - tinit)) ** 2
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "1 − x³ prunes slowly first")
def one_minus_cube(step, initial, final, tinit, tfinal, total):
    share = 1 - ((step - tinit) / (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "the budget rises")
def cube_of_what_is_done(step, initial, final, tinit, tfinal, total):
    share = ((step - tinit) / (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "the result is rounded to the nearest")
def nearest(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) / (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share, round)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "the result is a float")
def not_rounded(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) / (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share, float)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "the way ends at total")
def until_total(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) / (total - tinit)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "it begins after tinit steps")
def too_long_a_way(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) / (total - tfinal)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "the way is counted from step 0")
def from_zero(step, initial, final, tinit, tfinal, total):
    share = (1 - step / (total - tfinal)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "tfinal is subtracted from the step too")
def as_printed(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit - tfinal) / (total - tinit - tfinal)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "before tinit there is no way yet")
def start_not_held(step, initial, final, tinit, tfinal, total):
    if step > total - tfinal:
        return final
    return int(final + (initial - final) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


@wrong("cubic_budget", "after total − tfinal what is left is negative")
def end_not_held(step, initial, final, tinit, tfinal, total):
    if step <= tinit:
        return initial
    return int(final + (initial - final) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


@wrong("cubic_budget", "neither end is held")
def no_end_held(step, initial, final, tinit, tfinal, total):
    return int(final + (initial - final) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


@wrong("cubic_budget", "`final` is not added")
def final_left_out(step, initial, final, tinit, tfinal, total):
    held = ends(step, initial - final, 0, tinit, tfinal, total)
    share = 1 - (step - tinit) / (total - tfinal - tinit)
    return int((initial - final) * share**3) if held is None else held


@wrong("cubic_budget", "initial and final have changed places")
def swapped(step, initial, final, tinit, tfinal, total):
    initial, final = final, initial
    share = (1 - (step - tinit) / (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@wrong("cubic_budget", "// drops the fraction")
def floor_division(step, initial, final, tinit, tfinal, total):
    share = (1 - (step - tinit) // (total - tfinal - tinit)) ** 3
    return on_the_way(lambda *_: share)(step, initial, final, tinit, tfinal, total)


@right("cubic_budget")
def clamped(step, initial, final, tinit, tfinal, total):
    done = (step - tinit) / (total - tfinal - tinit)
    left = 1 - min(max(done, 0.0), 1.0)
    return int(final + (initial - final) * left**3)


@right("cubic_budget")
def counting_down(step, initial, final, tinit, tfinal, total):
    held = ends(step, initial, final, tinit, tfinal, total)
    if held is not None:
        return held
    left, way = total - tfinal - step, total - tfinal - tinit
    return final + (initial - final) * left**3 // way**3


@right("cubic_budget")
def by_what_goes(step, initial, final, tinit, tfinal, total):
    import math

    x = torch.tensor((step - tinit) / (total - tfinal - tinit), dtype=torch.float64).clamp(0, 1)
    gone = (initial - final) * (1 - (1 - x.item()) ** 3)
    return initial - math.ceil(gone - 1e-9)


# ------------------------------------------------------------------ mask_to_budget


def split(flat, scores):
    return list(torch.split(flat, [len(s) for s in scores]))


def chosen(pooled, indices):
    return torch.zeros(len(pooled), dtype=torch.bool).index_fill(0, indices, True)


@wrong("mask_to_budget", "every layer keeps the same number")
def per_layer(scores, budget):
    each = budget // len(scores)
    return [chosen(s, s.argsort(descending=True, stable=True)[:each]) for s in scores]


@wrong("mask_to_budget", "every layer keeps a share of its own size")
def in_proportion(scores, budget):
    share = budget / sum(len(s) for s in scores)
    return [
        chosen(s, s.argsort(descending=True, stable=True)[: round(share * len(s))]) for s in scores
    ]


@wrong("mask_to_budget", "the scores are normalised within each layer")
def normalised(scores, budget):
    pooled = torch.cat([s / s.sum() for s in scores])
    return split(chosen(pooled, pooled.argsort(descending=True, stable=True)[:budget]), scores)


@wrong("mask_to_budget", "the first layers take the budget")
def layer_after_layer(scores, budget):
    masks = []
    for score in scores:
        best = score.argsort(descending=True, stable=True)[:budget]
        masks.append(chosen(score, best))
        budget -= len(best)
    return masks


@wrong("mask_to_budget", "scores are compared without their signs")
def by_size(scores, budget):
    pooled = torch.cat(scores)
    return split(
        chosen(pooled, pooled.abs().argsort(descending=True, stable=True)[:budget]), scores
    )


@wrong("mask_to_budget", "what has no score above 0 goes")
def above_zero(scores, budget):
    pooled = torch.cat(scores)
    best = chosen(pooled, pooled.argsort(descending=True, stable=True)[:budget])
    return split(best & (pooled > 0), scores)


@wrong("mask_to_budget", "the worst are kept, not the best")
def ascending(scores, budget):
    pooled = torch.cat(scores)
    return split(chosen(pooled, pooled.argsort(stable=True)[:budget]), scores)


@wrong("mask_to_budget", "True is for what stays")
def what_goes(scores, budget):
    pooled = torch.cat(scores)
    return split(~chosen(pooled, pooled.argsort(descending=True, stable=True)[:budget]), scores)


@wrong("mask_to_budget", "the budget is taken for the number that goes")
def budget_goes(scores, budget):
    pooled = torch.cat(scores)
    order = pooled.argsort(descending=True, stable=True)
    return split(chosen(pooled, order[: len(pooled) - budget]), scores)


@wrong("mask_to_budget", "a comparison with >= keeps one more")
def at_least_the_cut(scores, budget):
    pooled = torch.cat(scores)
    if budget == len(pooled):
        return [torch.ones(len(s), dtype=torch.bool) for s in scores]
    cut = pooled.kthvalue(len(pooled) - budget).values
    return [s >= cut for s in scores]


@wrong("mask_to_budget", "RuntimeError: kthvalue(): selected number k out of range")
def kth_value(scores, budget):
    pooled = torch.cat(scores)
    cut = pooled.kthvalue(len(pooled) - budget).values
    return [s > cut for s in scores]


@wrong("mask_to_budget", "scores that are equal at the edge all go, as in PEFT")
def as_in_the_library(scores, budget):  # noqa: F811
    pooled = torch.cat(scores)
    cut = pooled.kthvalue(len(pooled) - budget).values if budget < len(pooled) else -1e9
    return [s > cut for s in scores]


@wrong("mask_to_budget", "scores that are equal at the edge all stay")
def at_least_the_last(scores, budget):
    if budget == 0:
        return [torch.zeros(len(s), dtype=torch.bool) for s in scores]
    cut = torch.cat(scores).topk(budget).values.min()
    return [s >= cut for s in scores]


@wrong("mask_to_budget", "IndexError: index -1 is out of bounds")
def last_of_none(scores, budget):
    cut = torch.cat(scores).topk(budget).values[-1]
    return [s >= cut for s in scores]


@wrong("mask_to_budget", "argsort lists which triplet comes where")
def order_for_places(scores, budget):
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return split(order < budget, scores)


@wrong("mask_to_budget", "[-0:] takes everything")
def the_last_none(scores, budget):
    pooled = torch.cat(scores)
    order = pooled.flip(0).argsort(stable=True)[-budget:]
    return split(chosen(pooled, len(pooled) - 1 - order), scores)


@wrong("mask_to_budget", "chunk cuts into equal parts")
def in_equal_parts(scores, budget):
    pooled = torch.cat(scores)
    order = pooled.argsort(descending=True, stable=True)[:budget]
    return list(chosen(pooled, order).chunk(len(scores)))


@wrong("mask_to_budget", "of equal scores the last ones stay")
def from_the_end(scores, budget):
    pooled = torch.cat(scores)
    order = pooled.argsort(stable=True)
    return split(chosen(pooled, order[len(pooled) - budget :]), scores)


@wrong("mask_to_budget", "argsort with stable=True")
def by_topk(scores, budget):
    pooled = torch.cat(scores)
    return split(chosen(pooled, pooled.topk(budget).indices), scores)


@wrong("mask_to_budget", "in the order of the scores, not in that of the triplets")
def in_the_order_of_scores(scores, budget):
    pooled = torch.cat(scores)
    return split(torch.arange(len(pooled)) < budget, scores)


@wrong("mask_to_budget", "the masks are one flat tensor")
def flat(scores, budget):
    pooled = torch.cat(scores)
    return chosen(pooled, pooled.argsort(descending=True, stable=True)[:budget])


@wrong("mask_to_budget", "a mask is of dtype bool")
def ones_and_zeros(scores, budget):
    return [m.float() for m in stable(scores, budget)]


@wrong("mask_to_budget", "TypeError: argsort")
def unequal_layers_stacked(scores, budget):
    return [torch.argsort(scores, budget) for _ in scores]


@wrong("mask_to_budget", "RuntimeError: stack expects each tensor to be equal size")
def stacked(scores, budget):
    pooled = torch.stack(scores)
    flat = pooled.flatten()
    order = flat.argsort(descending=True, stable=True)[:budget]
    return list(chosen(flat, order).view_as(pooled))


@wrong("mask_to_budget", "the argument scores was changed")
def in_place(scores, budget):  # noqa: F811
    masks = stable([s.clone() for s in scores], budget)
    for s, m in zip(scores, masks, strict=True):
        s.masked_fill_(~m, 0)
    return masks


@right("mask_to_budget")
def stable(scores, budget):
    pooled = torch.cat(scores)
    return split(chosen(pooled, pooled.argsort(descending=True, stable=True)[:budget]), scores)


@right("mask_to_budget")
def by_rank(scores, budget):
    order = torch.sort(torch.cat(scores), descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return tuple((place < budget).split([s.numel() for s in scores]))


@right("mask_to_budget")
def one_by_one(scores, budget):
    left, masks = (
        [s.tolist() for s in scores],
        [torch.zeros_like(s, dtype=torch.bool) for s in scores],
    )
    for _ in range(budget):
        layer = max(range(len(left)), key=lambda i: max(left[i]))
        i = left[layer].index(max(left[layer]))
        left[layer][i] = -float("inf")
        masks[layer][i] = True
    return masks


@right("mask_to_budget")
def counting_better_ones(scores, budget):
    pooled = torch.cat(scores)
    before = torch.arange(len(pooled))
    better = pooled[None] > pooled[:, None]
    first = (pooled[None] == pooled[:, None]) & (before[None] < before[:, None])
    return split((better | first).sum(dim=1) < budget, scores)


# ------------------------------------------------------------------ adalora_step


@wrong("adalora_step", "the regulariser is left out; and the gradients are cleared before")
def as_shipped(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    allocator.update(step)
    return loss.detach()


@wrong("adalora_step", "the regulariser is left out: the loss is")
def unregularised(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "the gradients are cleared before the allocator looks")
def cleared_first(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    allocator.update(step)
    return loss.detach()


@wrong("adalora_step", "RuntimeError: the allocator finds no gradients")
def cleared_to_none(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    allocator.update(step)
    return loss.detach()


@wrong("adalora_step", "but not in the gradients: add it before backward()")
def added_afterwards(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss
    loss.backward()
    loss = loss + allocator.penalty()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "but not in the gradients: add it before backward()")
def added_as_a_number(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty().item()
    loss.backward()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "but not in the loss that is returned")
def task_loss_returned(model, batch, optimizer, allocator, step):
    task = model(**batch).loss
    (task + allocator.penalty()).backward()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return task.detach()


@wrong("adalora_step", "has its weight in it already")
def weighted_twice(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.method.orthogonal * allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "the allocator is called before optimizer.step()")
def pruned_before_the_step(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    allocator.update(step)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "the allocator is never called")
def never_pruned(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "one step behind")
def counted_from_zero(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step - 1)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "one step ahead")
def counted_twice(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step + 1)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "the gradients are never cleared")
def never_cleared(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step)
    return loss.detach()


@wrong("adalora_step", "nothing is learned")
def cleared_before_the_step(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    allocator.update(step)
    return loss.detach()


@wrong("adalora_step", "nothing is learned")
def no_optimizer(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@wrong("adalora_step", "is a return statement missing?")
def nothing_returned(model, batch, optimizer, allocator, step):
    right_order(model, batch, optimizer, allocator, step)


@wrong("adalora_step", "expected a tensor")
def a_number(model, batch, optimizer, allocator, step):
    return right_order(model, batch, optimizer, allocator, step).item()


@wrong("adalora_step", "RuntimeError: element 0 of tensors does not require grad")
def without_graph(model, batch, optimizer, allocator, step):
    with torch.no_grad():
        loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    return loss


def right_order(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()


@right("adalora_step")
def cleared_at_the_start(model, batch, optimizer, allocator, step):
    optimizer.zero_grad(set_to_none=False)
    penalty = allocator.penalty()
    loss = model(batch["x"], batch["labels"]).loss + penalty
    loss.backward()
    optimizer.step()
    allocator.update(step)
    return loss


@right("adalora_step")
def two_backward_passes(model, batch, optimizer, allocator, step):
    task = model(**batch).loss
    task.backward()
    penalty = allocator.penalty()
    penalty.backward()
    optimizer.step()
    allocator.update(step=step)
    model.zero_grad()
    return (task + penalty).detach()


@right("adalora_step")
def with_a_closure(model, batch, optimizer, allocator, step):
    def closure():
        optimizer.zero_grad()
        loss = allocator.penalty() + model(**batch).loss
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    allocator.update(step)
    optimizer.zero_grad()
    return loss.detach()
