"""Answers to the exercises of lesson 13."""

import math
import statistics

import numpy as np
import torch

from peft_lessons import student_t
from peft_lessons.costs.estimate import GB, GIB, NF4_BITS

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ pareto_front


def measured(costs, scores):
    pairs = enumerate(zip(costs, scores, strict=True))
    return [i for i, (c, s) in pairs if not (math.isnan(c) or math.isnan(s))]


def by_cost(costs, front):
    return sorted(front, key=lambda i: costs[i])


def undominated(costs, scores, dominates, among=None):
    found = among or measured(costs, scores)
    return by_cost(costs, [i for i in found if not any(dominates(j, i) for j in found)])


@wrong("pareto_front", "a lower score is taken for the better one")
def of_losses(costs, scores):
    def dominates(j, i):
        at_least = costs[j] <= costs[i] and scores[j] <= scores[i]
        return at_least and (costs[j] < costs[i] or scores[j] < scores[i])

    return undominated(costs, scores, dominates)


@wrong("pareto_front", "a higher cost is taken for the better one")
def of_gains(costs, scores):
    return by_cost(costs, pareto_by_tuples([-c for c in costs], scores))


@wrong("pareto_front", "the other front")
def the_worst(costs, scores):
    return by_cost(costs, pareto_by_tuples([-c for c in costs], [-s for s in scores]))


@wrong("pareto_front", "a point must be better in both to put another out")
def strict_in_both(costs, scores):
    return undominated(costs, scores, lambda j, i: costs[j] < costs[i] and scores[j] > scores[i])


@wrong("pareto_front", "of two points of equal cost the worse one stays")
def strict_in_cost(costs, scores):
    return undominated(costs, scores, lambda j, i: costs[j] < costs[i] and scores[j] >= scores[i])


@wrong("pareto_front", "of two points of equal score the dearer one stays")
def strict_in_score(costs, scores):
    return undominated(costs, scores, lambda j, i: costs[j] <= costs[i] and scores[j] > scores[i])


@wrong("pareto_front", "equal points put each other out")
def twins_put_each_other_out(costs, scores):
    def dominates(j, i):
        return j != i and costs[j] <= costs[i] and scores[j] >= scores[i]

    return undominated(costs, scores, dominates)


@wrong("pareto_front", "of equal points only one is kept")
def by_a_set(costs, scores):
    first = {}
    for i in measured(costs, scores):
        first.setdefault((costs[i], scores[i]), i)
    kept = list(first.values())
    return [i for i in pareto_by_tuples(costs, scores) if i in kept]


@wrong("pareto_front", "the order is that of the lists")
def not_sorted(costs, scores):
    return sorted(pareto_by_tuples(costs, scores))


@wrong("pareto_front", "equal points are turned round")
def twins_turned_round(costs, scores):
    front = pareto_by_tuples(costs, scores)
    return sorted(front, key=lambda i: (costs[i], -i))


@wrong("pareto_front", "these are costs")
def the_costs(costs, scores):
    return [costs[i] for i in pareto_by_tuples(costs, scores)]


@wrong("pareto_front", "`index` finds the first")
def by_index(costs, scores):
    points = [(costs[i], scores[i]) for i in pareto_by_tuples(costs, scores)]
    return [costs.index(cost) for cost, _ in points]


@wrong("pareto_front", "these are indices into what was measured")
def of_the_filtered(costs, scores):
    found = measured(costs, scores)
    return pareto_by_tuples([costs[i] for i in found], [scores[i] for i in found])


@wrong("pareto_front", "the best score begins at 0")
def sweep_from_zero(costs, scores):
    front, best = [], (None, 0)
    for i in sorted(measured(costs, scores), key=lambda i: (costs[i], -scores[i])):
        if scores[i] > best[1] or (costs[i], scores[i]) == best:
            front.append(i)
            best = costs[i], scores[i]
    return front


@wrong("pareto_front", "the dearest comes first")
def best_first(costs, scores):
    front = pareto_by_tuples(costs, scores)
    return sorted(front, key=lambda i: -costs[i])


@wrong("pareto_front", "points below the line between two others")
def convex_hull(costs, scores):
    hull = []
    for i in pareto_by_tuples(costs, scores):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (costs[b] - costs[a]) * (scores[i] - scores[a]) - (scores[b] - scores[a]) * (
                costs[i] - costs[a]
            )
            if turn < 0 or (costs[b], scores[b]) == (costs[i], scores[i]):
                break
            hull.pop()
        hull.append(i)
    return hull


@wrong("pareto_front", "what was not measured is kept")
def nan_is_never_worse(costs, scores):
    def dominates(j, i):
        better = costs[j] < costs[i] or scores[j] > scores[i]
        return costs[j] <= costs[i] and scores[j] >= scores[i] and better

    everything = list(range(len(costs)))
    return by_cost(costs, [i for i in everything if not any(dominates(j, i) for j in everything)])


@wrong("pareto_front", "only a missing cost is looked for")
def missing_costs(costs, scores):
    def dominates(j, i):
        better = costs[j] < costs[i] or scores[j] > scores[i]
        return costs[j] <= costs[i] and scores[j] >= scores[i] and better

    found = [i for i, c in enumerate(costs) if not math.isnan(c)]
    return by_cost(costs, [i for i in found if not any(dominates(j, i) for j in found)])


@wrong("pareto_front", "only a missing score is looked for")
def missing_scores(costs, scores):
    def dominates(j, i):
        better = costs[j] < costs[i] or scores[j] > scores[i]
        return costs[j] <= costs[i] and scores[j] >= scores[i] and better

    found = [i for i, s in enumerate(scores) if not math.isnan(s)]
    return by_cost(costs, [i for i in found if not any(dominates(j, i) for j in found)])


@wrong("pareto_front", "among equal costs the first in the list decides")
def sweep(costs, scores):
    front, best = [], -math.inf
    for i in by_cost(costs, measured(costs, scores)):
        if scores[i] > best:
            front.append(i)
            best = scores[i]
    return front


@wrong("pareto_front", "only the best score is given")
def the_best(costs, scores):
    front = pareto_by_tuples(costs, scores)
    return [i for i in front if scores[i] == max(scores[j] for j in front)]


@wrong("pareto_front", "only the cheapest is given")
def the_cheapest(costs, scores):
    front = pareto_by_tuples(costs, scores)
    return [i for i in front if costs[i] == min(costs[j] for j in front)]


@wrong("pareto_front", "is a tuple of 2, expected")
def the_points(costs, scores):
    return [(costs[i], scores[i]) for i in pareto_by_tuples(costs, scores)]


@wrong("pareto_front", "has 5 items, expected 3")
def a_mask(costs, scores):
    front = pareto_by_tuples(costs, scores)
    return [i in front for i in range(len(costs))]


@wrong("pareto_front", "raised ValueError")
def of_no_points(costs, scores):
    top = max(zip(costs, scores, strict=True), key=lambda p: p[1])
    return pareto_by_tuples(costs, scores) if top else []


@wrong("pareto_front", "the argument costs was changed")
def in_place(costs, scores):
    front = pareto_by_tuples(costs, scores)
    costs.sort()
    return front


@right("pareto_front")
def pareto_by_tuples(costs, scores):
    def dominates(j, i):
        better = costs[j] < costs[i] or scores[j] > scores[i]
        return costs[j] <= costs[i] and scores[j] >= scores[i] and better

    return undominated(costs, scores, dominates)


@right("pareto_front")
def with_numpy(costs, scores):
    c, s = np.array(costs, dtype=float), np.array(scores, dtype=float)
    no_worse = (c[:, None] <= c) & (s[:, None] >= s)  # row dominates column
    better = (c[:, None] < c) | (s[:, None] > s)
    out = (no_worse & better).any(axis=0) | np.isnan(c) | np.isnan(s)
    found = np.flatnonzero(~out)
    return list(found[np.argsort(c[found], kind="stable")])


@right("pareto_front")
def by_a_sweep(costs, scores):
    order = sorted(measured(costs, scores), key=lambda i: (costs[i], -scores[i]))
    best, front = (math.inf, -math.inf), []
    for i in order:
        if scores[i] > best[1] or (costs[i], scores[i]) == best:
            best = costs[i], scores[i]
            front.append(i)
    return front


@right("pareto_front")
def as_a_tuple(costs, scores):
    return tuple(pareto_by_tuples(costs, scores))


# ------------------------------------------------------------------ fits


def checked(bits):
    if bits not in (4, 16):
        raise ValueError("bits must be 4 or 16")
    return 2 if bits == 16 else NF4_BITS / 8


@wrong("fits", "the card's GB are taken for 10⁹ bytes")
def decimal(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + 16 * n_trainable
    return need <= 0.875 * gpu_gb * 10**9


@wrong("fits", "has its share of the statistics")
def half_a_byte(n_params, n_trainable, gpu_gb, bits):
    checked(bits)
    return (n_params - n_trainable) * bits / 8 + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "4.127 bits a number, not 4.5")
def without_double_quantisation(n_params, n_trainable, gpu_gb, bits):
    size = {16: 2, 4: (4 + 32 / 64) / 8}[bits] if checked(bits) else 0
    return (n_params - n_trainable) * size + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "the second level is left out")
def one_level(n_params, n_trainable, gpu_gb, bits):
    size = {16: 2, 4: (4 + 8 / 64) / 8}[bits] if checked(bits) else 0
    return (n_params - n_trainable) * size + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "4 // 8 is 0")
def whole_bytes(n_params, n_trainable, gpu_gb, bits):
    checked(bits)
    return (n_params - n_trainable) * (bits // 8) + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "what trains is counted twice")
def twice(n_params, n_trainable, gpu_gb, bits):
    return n_params * checked(bits) + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "are counted for all parameters")
def all_train(n_params, n_trainable, gpu_gb, bits):
    return checked(bits) and 16 * n_params <= 0.875 * gpu_gb * GIB


@wrong("fits", "the frozen base is left out")
def adapter_only(n_params, n_trainable, gpu_gb, bits):
    return checked(bits) and 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "what trains is stored in 4 bits here")
def all_quantised(n_params, n_trainable, gpu_gb, bits):
    return n_params * checked(bits) + 14 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "12 bytes are counted for what trains")
def no_master_copy(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + (2 + 2 + 8) * n_trainable
    return need <= 0.875 * gpu_gb * GIB


@wrong("fits", "14 bytes are counted for what trains")
def its_weight_left_out(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + (2 + 4 + 8) * n_trainable
    return need <= 0.875 * gpu_gb * GIB


@wrong("fits", "weights alone are counted")
def weights_alone(n_params, n_trainable, gpu_gb, bits):
    return n_params * checked(bits) <= 0.875 * gpu_gb * GIB


@wrong("fits", "the whole card is used")
def whole_card(n_params, n_trainable, gpu_gb, bits):
    return (n_params - n_trainable) * checked(bits) + 16 * n_trainable <= gpu_gb * GIB


@wrong("fits", "an eighth of the need is added")
def an_eighth_more(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + 16 * n_trainable
    return need * 1.125 <= gpu_gb * GIB


@wrong("fits", "bits are taken for bytes")
def bits_for_bytes(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * 8 * checked(bits) + 16 * n_trainable
    return need <= 0.875 * gpu_gb * GIB


@wrong("fits", "in 16 bits, whatever bits says")
def always_16(n_params, n_trainable, gpu_gb, bits):
    return bool(checked(bits)) and (
        2 * (n_params - n_trainable) + 16 * n_trainable <= 0.875 * gpu_gb * GIB
    )


@wrong("fits", "what takes exactly seven eighths fits")
def strictly_less(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + 16 * n_trainable
    return need < 0.875 * gpu_gb * GIB


@wrong("fits", "the answer is turned round")
def too_large(n_params, n_trainable, gpu_gb, bits):
    need = (n_params - n_trainable) * checked(bits) + 16 * n_trainable
    return need > 0.875 * gpu_gb * GIB


@wrong("fits", "is the float")
def what_is_left(n_params, n_trainable, gpu_gb, bits):
    return 0.875 * gpu_gb * GIB - (n_params - n_trainable) * checked(bits) - 16 * n_trainable


@wrong("fits", "bits=8 (a byte)")
def bytes_too(n_params, n_trainable, gpu_gb, bits):
    if bits == 8:
        return n_params + 15 * n_trainable <= 0.875 * gpu_gb * GIB
    return by_parts(n_params, n_trainable, gpu_gb, bits)


def guessed(trained=16, frozen=2, share=0.875):
    """A fits that is wrong in a way that no cause is about."""

    def fits(n_params, n_trainable, gpu_gb, bits):
        size = checked(bits) if bits == 4 else frozen
        need = (n_params - n_trainable) * size + trained * n_trainable
        return need <= share * gpu_gb * GIB

    return fits


# A cause must not be named because True and False agree by chance.
for wrongly in (guessed(trained=8), guessed(trained=20), guessed(frozen=4), guessed(share=0.9)):
    wrong("fits", "the result is")(wrongly)


@wrong("fits", "nothing was raised, where ValueError was due")
def any_bits(n_params, n_trainable, gpu_gb, bits):
    size = NF4_BITS / 8 if bits == 4 else bits / 8
    return (n_params - n_trainable) * size + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "raised KeyError: 3, where ValueError was due")
def a_table(n_params, n_trainable, gpu_gb, bits):
    size = {4: NF4_BITS / 8, 16: 2}[bits]
    return (n_params - n_trainable) * size + 16 * n_trainable <= 0.875 * gpu_gb * GIB


@wrong("fits", "the message does not name 'bits'")
def says_nothing(n_params, n_trainable, gpu_gb, bits):
    if bits not in (4, 16):
        raise ValueError("wrong precision")
    return a_table(n_params, n_trainable, gpu_gb, bits)


@right("fits")
def by_parts(n_params, n_trainable, gpu_gb, bits):
    frozen, card = n_params - n_trainable, gpu_gb * 1024**3
    parts = {"base": frozen * checked(bits), "weights": 2 * n_trainable}
    parts |= {"gradients": 2 * n_trainable, "master": 4 * n_trainable, "moments": 8 * n_trainable}
    return sum(parts.values()) <= card - card / 8


@right("fits")
def a_truth_of_numpy(n_params, n_trainable, gpu_gb, bits):
    need = np.float64(n_params - n_trainable) * checked(bits) + 16 * n_trainable
    return need <= 0.875 * gpu_gb * GIB


@right("fits")
def in_gib(n_params, n_trainable, gpu_gb, bits):
    if bits == 16:
        size = 16.0
    elif bits == 4:
        size = 4.0 + (8.0 + 32.0 / 256.0) / 64.0
    else:
        raise ValueError(f"bits is {bits}")
    need = ((n_params - n_trainable) * size + 128.0 * n_trainable) / 8.0 / 2**30
    return not need > 0.875 * gpu_gb


@right("fits")
def with_a_branch(n_params, n_trainable, gpu_gb, bits):
    if bits == 4:
        blocks = (n_params - n_trainable) / 64
        base = 32 * blocks + blocks + 4 * blocks / 256
    elif bits == 16:
        base = 2 * (n_params - n_trainable)
    else:
        raise ValueError("bits: 4 or 16")
    return bool(base + 16 * n_trainable <= 7 * gpu_gb * 2**27)


# ------------------------------------------------------------------ paired_difference


def pairs(scores_a, scores_b):
    if len(scores_a) != len(scores_b) or len(scores_a) < 2:
        raise ValueError("the same seeds, two or more, are needed")
    return np.array(scores_a) - np.array(scores_b)


def around(mean, half):
    return float(mean), float(mean - half), float(mean + half)


@wrong("paired_difference", "1.96 holds for many seeds")
def normal(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), 1.96 * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "two, the rule of thumb")
def two_errors(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), 2 * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "divided by n, not by n − 1")
def numpys_default(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std() / len(d) ** 0.5)


@wrong("paired_difference", "taken for independent samples")
def two_samples(scores_a, scores_b):
    a, b, n = np.array(scores_a), np.array(scores_b), len(scores_a)
    error = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)
    return around(a.mean() - b.mean(), student_t(2 * n - 2) * error)


@wrong("paired_difference", "the spreads of the lists are added")
def spreads_added(scores_a, scores_b):
    a, b, n = np.array(scores_a), np.array(scores_b), len(scores_a)
    error = np.hypot(a.std(ddof=1), b.std(ddof=1)) / np.sqrt(n)
    return around(a.mean() - b.mean(), student_t(n - 1) * error)


@wrong("paired_difference", "not divided by √n")
def of_one_seed(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1))


@wrong("paired_difference", "divided by √(n − 1)")
def by_the_root_of_the_degrees(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1) / (len(d) - 1) ** 0.5)


@wrong("paired_difference", "give or take a deviation")
def one_deviation(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), d.std(ddof=1))


@wrong("paired_difference", "the mean comes first")
def in_order_of_size(scores_a, scores_b):
    return tuple(sorted(right_with_numpy(scores_a, scores_b)))


@wrong("paired_difference", "divided by n: divide it by √n")
def by_n(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1) / len(d))


@wrong("paired_difference", "the sign is turned")
def b_minus_a(scores_a, scores_b):
    return right_with_numpy(scores_b, scores_a)


@wrong("paired_difference", "n − 1 degrees of freedom, not n.")
def one_degree_more(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d)) * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "not 2n − 2")
def degrees_of_two_samples(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(2 * len(d) - 2) * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "t is the one-sided one")
def one_sided(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    t = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895}[len(d) - 1]
    return around(d.mean(), t * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "t is missing")
def standard_error(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "the smallest and largest difference")
def extremes(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return float(d.mean()), float(d.min()), float(d.max())


@wrong("paired_difference", "the variance is taken for the deviation")
def of_the_variance(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.var(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "half the width is given twice")
def half_widths(scores_a, scores_b):
    mean, low, high = right_with_numpy(scores_a, scores_b)
    return mean, (high - low) / 2, (high - low) / 2


@wrong("paired_difference", "as distances from the mean")
def distances(scores_a, scores_b):
    mean, low, high = right_with_numpy(scores_a, scores_b)
    return mean, low - mean, high - mean


@wrong("paired_difference", "the ends are exchanged")
def exchanged(scores_a, scores_b):
    mean, low, high = right_with_numpy(scores_a, scores_b)
    return mean, high, low


@wrong("paired_difference", "it is half of it")
def whole_width(scores_a, scores_b):
    mean, low, high = right_with_numpy(scores_a, scores_b)
    return around(mean, (high - low) / 4)


@wrong("paired_difference", "the differences lose their sign")
def absolute(scores_a, scores_b):
    d = np.abs(pairs(scores_a, scores_b))
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "relative to b")
def relative(scores_a, scores_b):
    d = pairs(scores_a, scores_b) / np.array(scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "the median is taken for the mean")
def around_the_median(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(np.median(d), student_t(len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)


@wrong("paired_difference", "the lists are sorted first")
def sorted_first(scores_a, scores_b):
    return right_with_numpy(sorted(scores_a), sorted(scores_b))


@wrong("paired_difference", "nothing was raised, where ValueError was due")
def any_length(scores_a, scores_b):
    d = [a - b for a, b in zip(scores_a, scores_b, strict=False)]
    if len(d) == 1:
        return d[0], -math.inf, math.inf
    half = student_t(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return around(statistics.fmean(d), half)


@wrong("paired_difference", "has 2 items, expected 3")
def the_ends_alone(scores_a, scores_b):
    return right_with_numpy(scores_a, scores_b)[1:]


@wrong("paired_difference", "the mean is a tensor, expected the float")
def as_tensors(scores_a, scores_b):
    return tuple(torch.tensor(v) for v in right_with_numpy(scores_a, scores_b))


@right("paired_difference")
def right_with_numpy(scores_a, scores_b):
    d = pairs(scores_a, scores_b)
    return around(d.mean(), student_t(len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))


@right("paired_difference")
def with_torch_and_a_table(scores_a, scores_b):
    if not 2 <= len(scores_a) == len(scores_b):
        raise ValueError("needs two seeds or more, the same in both")
    d = torch.tensor(scores_a).double() - torch.tensor(scores_b).double()
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)[len(d) - 2]
    half = (t * d.std() / d.numel() ** 0.5).item()
    return d.mean().item(), d.mean().item() - half, d.mean().item() + half


@right("paired_difference")
def in_a_loop(scores_a, scores_b):
    n = len(scores_a)
    if n != len(scores_b) or n == 1:
        raise ValueError("give both scores for at least two seeds")
    total = squares = 0.0
    for i in range(n):
        gap = scores_a[i] - scores_b[i]
        total, squares = total + gap, squares + gap * gap
    variance = max(0.0, squares - total * total / n) / (n - 1)
    half = student_t(n - 1) * (variance / n) ** 0.5
    return [total / n, total / n - half, total / n + half]


# ------------------------------------------------------------------ defend_choice


class Defence:
    """A defend_choice; the answers below change a step of it."""

    unit, reserve, gib = GB, 7 / 8, GIB

    def __call__(self, needs, gpu_gb, scores):
        usable = self.reserve * gpu_gb * self.gib
        fitting = self.fitting(needs, usable)
        if not fitting:
            return self.nothing(needs, usable)
        best = self.best(fitting, needs, scores)
        behind = {n: self.gap(scores[best], scores[n]) for n in self.others(fitting, best, needs)}
        method = self.choose(fitting, best, behind, needs)
        left = (self.room(gpu_gb, usable) - needs[method]) / self.unit
        return {"method": method, "takes": needs[method] / self.unit, "left": left} | {
            "behind": behind
        }

    def fitting(self, needs, usable):
        return [name for name, need in needs.items() if need <= usable]

    def nothing(self, needs, usable):
        least = min(needs.values())
        left = (usable - least) / self.unit
        return dict(method="does not fit", takes=least / self.unit, left=left, behind={})

    def best(self, fitting, needs, scores):
        return max(fitting, key=lambda name: np.mean(scores[name]))

    def others(self, fitting, best, needs):
        return [name for name in fitting if name != best]

    gap = staticmethod(right_with_numpy)

    def as_good(self, low):
        return low <= 0

    def choose(self, fitting, best, behind, needs):
        equals = [n for n in fitting if n == best or self.as_good(behind[n][1])]
        return min(equals, key=lambda name: needs[name])

    def room(self, gpu_gb, usable):
        return usable


def wrong_defence(told):
    """The class below, made an answer, with the name and parameters of the exercise."""

    def add(cls):
        def defend_choice(needs, gpu_gb, scores):
            return cls()(needs, gpu_gb, scores)

        defend_choice.__name__ = cls.__name__
        wrong("defend_choice", told)(defend_choice)
        return cls

    return add


@wrong_defence("it does not fit: the best score is taken")
class NeverLooks(Defence):
    def fitting(self, needs, usable):
        return list(needs)


@wrong_defence("the card's GB are taken for 10⁹ bytes")
class Decimal(Defence):
    gib = GB


@wrong_defence("the whole card is used")
class WholeCard(Defence):
    reserve = 1


@wrong_defence("it is dominated: the cheapest that fits is taken")
class Cheapest(Defence):
    def choose(self, fitting, best, behind, needs):
        return min(fitting, key=needs.get)


@wrong_defence("the difference is within noise")
class BestMean(Defence):
    def choose(self, fitting, best, behind, needs):
        return best


@wrong_defence("the dearest is taken")
class Dearest(Defence):
    def choose(self, fitting, best, behind, needs):
        return max((n for n in fitting if n == best or behind[n][1] <= 0), key=needs.get)


@wrong_defence("taken for independent samples")
class Unpaired(Defence):
    gap = staticmethod(two_samples)


@wrong_defence("1.96 is taken for Student's t")
class Normal(Defence):
    gap = staticmethod(normal)


@wrong_defence("the standard error is taken for the interval")
class StandardError(Defence):
    gap = staticmethod(standard_error)


@wrong_defence("a lower score is taken for the better one")
class LowerIsBetter(Defence):
    def best(self, fitting, needs, scores):
        return min(fitting, key=lambda name: sum(scores[name]))

    def gap(self, a, b):
        return right_with_numpy(b, a)


@wrong_defence("the best single seed decides")
class BestSeed(Defence):
    def best(self, fitting, needs, scores):
        return max(fitting, key=lambda name: max(scores[name]))


@wrong_defence("the sign turned")
class TurnedRound(Defence):
    def gap(self, a, b):
        return right_with_numpy(b, a)

    def choose(self, fitting, best, behind, needs):
        return min((n for n in fitting if n == best or behind[n][2] >= 0), key=needs.get)


@wrong_defence("what takes exactly seven eighths fits")
class StrictlyLess(Defence):
    def fitting(self, needs, usable):
        return [name for name, need in needs.items() if need < usable]


@wrong_defence("divided by n, not by n − 1")
class NumpysDefault(Defence):
    gap = staticmethod(numpys_default)


@wrong_defence("not divided by √n")
class OfOneSeed(Defence):
    gap = staticmethod(of_one_seed)


@wrong_defence("`takes` is that of the best")
class TakesOfTheBest(Defence):
    def __call__(self, needs, gpu_gb, scores):
        answer, usable = super().__call__(needs, gpu_gb, scores), 7 / 8 * gpu_gb * GIB
        if fitting := self.fitting(needs, usable):
            took = needs[self.best(fitting, needs, scores)]
            answer |= {"takes": took / GB, "left": (usable - took) / GB}
        return answer


@wrong_defence("counted from the method chosen")
class BehindTheChosen(Defence):
    def __call__(self, needs, gpu_gb, scores):
        answer = super().__call__(needs, gpu_gb, scores)
        fitting = self.fitting(needs, 7 / 8 * gpu_gb * GIB)
        if (chosen := answer["method"]) in needs:
            gaps = {n: self.gap(scores[chosen], scores[n]) for n in fitting if n != chosen}
            answer["behind"] = gaps
        return answer


@wrong_defence("`behind` has what does not fit, too")
class AllCompared(Defence):
    def others(self, fitting, best, needs):
        return [name for name in needs if name != best]


@wrong_defence("`behind` has the best itself")
class WithItself(Defence):
    def others(self, fitting, best, needs):
        return fitting


@wrong_defence("the unit is GiB")
class InGiB(Defence):
    unit = GIB


@wrong_defence("the unit is the byte")
class InBytes(Defence):
    unit = 1


@wrong_defence("`left` is counted from the whole card")
class LeftOfAll(Defence):
    def room(self, gpu_gb, usable):
        return gpu_gb * GIB

    def nothing(self, needs, usable):
        return super().nothing(needs, usable * 8 / 7)


@wrong_defence("nothing fits, and the smallest is named all the same")
class SmallestAnyway(Defence):
    def nothing(self, needs, usable):
        return super().nothing(needs, usable) | {"method": min(needs, key=needs.get)}


@wrong_defence("`takes` is not that of what takes least")
class OfTheLargest(Defence):
    def nothing(self, needs, usable):
        most = max(needs.values())
        told = {"takes": most / GB, "left": (usable - most) / GB}
        return super().nothing(needs, usable) | told


@wrong_defence("the keys of the answer differ: missing 'behind'")
class Undefended(Defence):
    def __call__(self, needs, gpu_gb, scores):
        answer = super().__call__(needs, gpu_gb, scores)
        del answer["behind"]
        return answer


@wrong_defence("raised ValueError")
class NothingFits(Defence):
    def nothing(self, needs, usable):
        return max([])


@wrong("defend_choice", "two intervals that overlap are taken for no difference")
def overlapping(needs, gpu_gb, scores):
    def interval(values):
        half = student_t(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        return statistics.fmean(values) - half, statistics.fmean(values) + half

    class Overlapping(Defence):
        def choose(self, fitting, best, behind, needs):
            lowest = interval(scores[best])[0]
            return min((n for n in fitting if interval(scores[n])[1] >= lowest), key=needs.get)

    return Overlapping()(needs, gpu_gb, scores)


right("defend_choice")(lambda needs, gpu_gb, scores: Defence()(needs, gpu_gb, scores))


@right("defend_choice")
def with_the_other_exercises(needs, gpu_gb, scores):
    room = 0.875 * gpu_gb * 1024**3
    names = [n for n in sorted(needs, key=needs.get) if needs[n] <= room]
    if not names:
        least = sorted(needs.values())[0]
        return {"method": "does not fit", "takes": least / 1e9, "left": (room - least) / 1e9} | {
            "behind": {}
        }
    best = names[0]
    for name in names[1:]:
        if statistics.mean(scores[name]) > statistics.mean(scores[best]):
            best = name
    behind = {}
    for name in names:
        if name != best:
            behind[name] = in_a_loop(scores[best], scores[name])
    for name in names:
        if name == best or not behind[name][1] > 0:
            break
    return {
        "behind": behind,
        "left": room / 1e9 - needs[name] / 1e9,
        "takes": needs[name] / 1e9,
        "method": name,
    }


@right("defend_choice")
def with_torch(needs, gpu_gb, scores):
    need = torch.tensor(list(needs.values()), dtype=torch.float64)
    usable = gpu_gb * 2**30 * 7 / 8
    fit = need <= usable
    if not fit.any():
        least = need.min().item()
        return dict(method="does not fit", takes=least / GB, left=(usable - least) / GB, behind={})
    names = list(needs)
    mean = torch.tensor([np.mean(scores[n]) for n in names]).where(fit, -torch.inf)
    best = names[int(mean.argmax())]
    behind = {
        n: with_torch_and_a_table(scores[best], scores[n])
        for n, one in zip(names, fit, strict=True)
        if one and n != best
    }
    good = [n == best or (n in behind and behind[n][1] <= 0) for n in names]
    out = ~torch.tensor(good)
    i = int(need.masked_fill(out, torch.inf).argmin())
    took = need[i].item()
    return {"method": names[i], "takes": took / GB, "left": (usable - took) / GB, "behind": behind}
