"""Answers to the exercises of lesson 05."""

import torch

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ update_importance


@wrong("update_importance", "the result has 2 items, expected 3")
def no_score(weight, grad, sensitivity, uncertainty, beta1, beta2):
    return through_the_old_one(weight, grad, sensitivity, uncertainty, beta1, beta2)[:2]


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


# ------------------------------------------------------------------ cubic_budget


@right("cubic_budget")
def clamped(step, initial, final, tinit, tfinal, total):
    done = (step - tinit) / (total - tfinal - tinit)
    left = 1 - min(max(done, 0.0), 1.0)
    return int(final + (initial - final) * left**3)


@right("cubic_budget")
def in_whole_numbers(step, initial, final, tinit, tfinal, total):
    if step <= tinit:
        return initial
    left, way = total - tfinal - step, total - tfinal - tinit
    return final + (initial - final) * left**3 // way**3 if left > 0 else final


# ------------------------------------------------------------------ mask_to_budget


@wrong("mask_to_budget", "RuntimeError: kthvalue(): selected number k out of range")
def kth_value(scores, budget):
    pooled = torch.cat(scores)
    cut = pooled.kthvalue(len(pooled) - budget).values
    return [s > cut for s in scores]


@wrong("mask_to_budget", "RuntimeError: stack expects each tensor to be equal size")
def stacked(scores, budget):
    pooled = torch.stack(scores)
    order = pooled.flatten().argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros(pooled.numel(), dtype=torch.bool).index_fill(0, order, True)
    return list(mask.view_as(pooled))


@right("mask_to_budget")
def by_rank(scores, budget):
    order = torch.sort(torch.cat(scores), descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return tuple((place < budget).split([s.numel() for s in scores]))


@right("mask_to_budget")
def one_by_one(scores, budget):
    left = [s.tolist() for s in scores]
    masks = [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    for _ in range(budget):
        layer = max(range(len(left)), key=lambda i: max(left[i]))
        i = left[layer].index(max(left[layer]))
        left[layer][i] = -float("inf")
        masks[layer][i] = True
    return masks


@right("mask_to_budget")
def counting_better_ones(scores, budget):
    pooled = torch.cat(scores)
    place = torch.arange(len(pooled))
    first = (pooled == pooled[:, None]) & (place < place[:, None])
    stays = ((pooled > pooled[:, None]) | first).sum(dim=1) < budget
    return list(stays.split(list(map(len, scores))))


@right("mask_to_budget")
def ties_apart(scores, budget):
    """For a budget above 0: the last score that stays tells which ones go."""
    pooled = torch.cat(scores)
    cut = pooled.topk(budget).values[-1]
    better, equal = pooled > cut, pooled == cut
    stays = better | (equal & (equal.cumsum(0) <= budget - better.sum()))
    return list(stays.split([len(s) for s in scores]))


# ------------------------------------------------------------------ triplet_scores


@wrong("triplet_scores", "the scores have shape (6, 1), expected (6,)")
def a_column(Q, lam, P, dQ, dlam, dP):
    return (lam * dlam).abs()


@wrong("triplet_scores", "an argument was changed: leave all six as they were")
def changes_lambda(Q, lam, P, dQ, dlam, dP):
    return lam.mul_(dlam).abs_().flatten()


@wrong("triplet_scores", "6 scores are NaN or infinite")
def a_logarithm(Q, lam, P, dQ, dlam, dP):
    return (lam * dlam).log().flatten()


@wrong("triplet_scores", "random starts.\n  The most frequent ranks are")
def relative_to_lambda(Q, lam, P, dQ, dlam, dP):
    return ((lam * dlam).abs() / (lam**2)).flatten()


@wrong("triplet_scores", "The same triplet gets another score in a second call")
def random_ones(Q, lam, P, dQ, dlam, dP):
    return torch.rand(len(lam))


@wrong("triplet_scores", "the scores are divided by a number of their own layer")
def relative_to_the_largest(Q, lam, P, dQ, dlam, dP):
    return (lam * dlam).abs().flatten() / (lam * dlam).abs().max()


@wrong("triplet_scores", "the result is")
def one_number(Q, lam, P, dQ, dlam, dP):
    return (lam * dlam).abs().sum().item()


@wrong("triplet_scores", "random starts.\n  The most frequent ranks are")
def the_length_of_p(Q, lam, P, dQ, dlam, dP):
    return -P.norm(dim=0)


@wrong("triplet_scores", "IndexError: Dimension out of range")
def too_many_dimensions(Q, lam, P, dQ, dlam, dP):
    return Q.norm(dim=2)


@right("triplet_scores")
def size_of_what_is_added(Q, lam, P, dQ, dlam, dP):
    return lam.abs().flatten() * Q.norm(dim=1) * P.norm(dim=0)


@right("triplet_scores")
def size_of_lambda(Q, lam, P, dQ, dlam, dP):
    return lam[:, 0].abs()


@right("triplet_scores")
def of_all_entries(Q, lam, P, dQ, dlam, dP):
    return (lam * dlam).abs()[:, 0] + (Q * dQ).abs().mean(1) + (P * dP).abs().mean(0)


# ------------------------------------------------------------------ adalora_step


@answers.hunt("adalora_step")
def step_with(bugs):
    no_penalty, cleared = (
        any(words in bug for bug in bugs) for words in ("left out", "are cleared before")
    )

    def adalora_step(model, batch, optimizer, allocator, step):
        loss = model(**batch).loss
        loss = loss if no_penalty else loss + allocator.penalty()
        loss.backward()
        optimizer.step()
        if cleared:
            optimizer.zero_grad(set_to_none=False)
        allocator.update(step)
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return adalora_step


@wrong("adalora_step", "RuntimeError: the allocator finds no gradients")
def cleared_to_none(model, batch, optimizer, allocator, step):
    loss = model(**batch).loss + allocator.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    allocator.update(step)
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


# ------------------------------------------------------------------ spend_by_hand


@wrong("spend_by_hand", "the keys of the result differ: missing 'target_modules'")
def without_targets(ranks, scaling):
    entries = one_layer_at_a_time(ranks, scaling)
    del entries["target_modules"]
    return entries


@right("spend_by_hand")
def one_layer_at_a_time(ranks, scaling):
    targets, rank_pattern, alpha_pattern = [], {}, {}
    for path in ranks:
        if ranks[path] != 0:
            targets.append(path)
            rank_pattern[path] = ranks[path]
            alpha_pattern[path] = float(ranks[path] * scaling)
    return dict(target_modules=targets, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


@right("spend_by_hand")
def filtered(ranks, scaling):
    kept = dict(filter(lambda item: item[1], ranks.items()))
    alphas = torch.tensor(list(kept.values())) * scaling
    return {
        "alpha_pattern": dict(zip(kept, alphas.tolist(), strict=True)),
        "rank_pattern": kept,
        "target_modules": tuple(kept),
    }
