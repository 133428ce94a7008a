"""Answers to the exercises of lesson 13."""

import math
import statistics

import numpy as np
import torch

from peft_lessons.costs.estimate import GIB, NF4_BITS
from peft_lessons.studies import student_t

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ pareto_front


@right("pareto_front")
def pareto_by_a_sweep(costs, scores):
    best, front = (math.inf, -math.inf), []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[i] > best[1] or (costs[i], scores[i]) == best:
            best = costs[i], scores[i]
            front.append(i)
    return front


@right("pareto_front")
def as_an_array(costs, scores):
    return np.array(with_numpy(costs, scores))


@right("pareto_front")
def as_a_tensor(costs, scores):
    return torch.tensor(pareto_by_a_sweep(costs, scores))


@right("pareto_front")
def with_numpy(costs, scores):
    c, s = np.array(costs, dtype=float), np.array(scores, dtype=float)
    no_worse = (c[:, None] <= c) & (s[:, None] >= s)  # row dominates column
    better = (c[:, None] < c) | (s[:, None] > s)
    found = np.flatnonzero(~(no_worse & better).any(axis=0))
    return list(found[np.argsort(c[found], kind="stable")])


# ------------------------------------------------------------------ fits


@wrong("fits", "is the float")
def what_is_left(n_params, n_trainable, gpu_gb, bits):
    frozen = 2 if bits == 16 else NF4_BITS / 8
    return 0.875 * gpu_gb * GIB - frozen * (n_params - n_trainable) - 16 * n_trainable


def guessed(trained=16, frozen=2, share=0.875):
    """A fits that is wrong in a way that no cause is about."""

    def fits(n_params, n_trainable, gpu_gb, bits):
        size = frozen if bits == 16 else NF4_BITS / 8
        need = (n_params - n_trainable) * size + trained * n_trainable
        return need <= share * gpu_gb * GIB

    return fits


# A cause must not be named because True and False agree by chance.
for wrongly in (guessed(trained=9), guessed(trained=20), guessed(frozen=4), guessed(share=0.9)):
    wrong("fits", "the result is")(wrongly)


@right("fits")
def in_parts_and_in_numpy(n_params, n_trainable, gpu_gb, bits):
    base = np.float64(n_params - n_trainable) * (NF4_BITS if bits == 4 else 16) / 8
    parts = [base, *(size * n_trainable for size in (2, 2, 4, 4, 4))]
    return sum(parts) / GIB <= gpu_gb - gpu_gb / 8


@right("fits")
def with_a_branch(n_params, n_trainable, gpu_gb, bits):
    if bits == 4:
        blocks = (n_params - n_trainable) / 64
        base = 32 * blocks + blocks + 4 * blocks / 256
    else:
        base = 2 * (n_params - n_trainable)
    return bool(base + 16 * n_trainable <= 7 * gpu_gb * 2**27)


# ------------------------------------------------------------------ paired_difference


@wrong("paired_difference", "nothing was raised, where ValueError was expected")
def any_length(scores_a, scores_b):
    d = [a - b for a, b in zip(scores_a, scores_b, strict=False)]
    if len(d) == 1:
        return d[0], -math.inf, math.inf
    half = student_t(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.fmean(d), statistics.fmean(d) - half, statistics.fmean(d) + half


@right("paired_difference")
def with_torch_and_a_table(scores_a, scores_b):
    if not 2 <= len(scores_a) == len(scores_b):
        raise ValueError("needs two seeds or more, the same in both")
    d = torch.tensor(scores_a).double() - torch.tensor(scores_b).double()
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)[len(d) - 2]
    half = (t * d.std() / d.numel() ** 0.5).item()
    return d.mean().item(), d.mean().item() - half, d.mean().item() + half


@right("paired_difference")
def as_one_tensor(scores_a, scores_b):
    return torch.tensor(with_torch_and_a_table(scores_a, scores_b), dtype=torch.float64)


@right("paired_difference")
def in_a_loop(scores_a, scores_b):
    n = len(scores_a)
    if n != len(scores_b) or n == 1:
        raise ValueError
    total = squares = 0.0
    for i in range(n):
        gap = scores_a[i] - scores_b[i]
        total, squares = total + gap, squares + gap * gap
    variance = max(0.0, squares - total * total / n) / (n - 1)
    half = student_t(n - 1) * (variance / n) ** 0.5
    return [total / n, total / n - half, total / n + half]


# ------------------------------------------------------------------ defend_choice


def paired_difference():
    """A stub of another exercise."""
    raise NotImplementedError


@wrong("defend_choice", "your paired_difference is not written yet")
def before_its_helper(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    return answer | {"behind": {name: paired_difference() for name in answer["behind"]}}


@wrong("defend_choice", "Does your paired_difference pass its check in exercise 13.2?")
def rounded_intervals(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    behind = {n: [round(v, 1) for v in interval] for n, interval in answer["behind"].items()}
    return answer | {"behind": behind}


@wrong("defend_choice", "(nothing fits)")
def without_a_case_for_nothing(needs, gpu_gb, scores):
    max(name for name in needs if needs[name] <= 0.875 * gpu_gb)
    return with_a_sweep(needs, gpu_gb, scores)


@right("defend_choice")
def intervals_as_arrays(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    return answer | {"behind": {n: np.array(v) for n, v in answer["behind"].items()}}


@wrong("defend_choice", "the keys of the answer differ: missing 'behind'")
def undefended(needs, gpu_gb, scores):
    answer = with_a_sweep(needs, gpu_gb, scores)
    del answer["behind"]
    return answer


@right("defend_choice")
def with_a_sweep(needs, gpu_gb, scores):
    room = 0.875 * gpu_gb
    names = [n for n in sorted(needs, key=needs.get) if needs[n] <= room]
    if not names:
        return {"method": "does not fit", "left": room - min(needs.values()), "behind": {}}
    best = names[0]
    for name in names[1:]:
        if statistics.mean(scores[name]) > statistics.mean(scores[best]):
            best = name
    behind = {}
    for name in names:
        if name != best:
            behind[name] = in_a_loop(scores[best], scores[name])
    for name in names:
        if name == best or not behind[name][2] > 1:
            break
    return {"behind": behind, "left": room - needs[name], "method": name}


@right("defend_choice")
def with_torch(needs, gpu_gb, scores):
    need = torch.tensor(list(needs.values()), dtype=torch.float64)
    usable = gpu_gb * 7 / 8
    fit = need <= usable
    if not fit.any():
        return dict(method="does not fit", left=usable - need.min().item(), behind={})
    names = list(needs)
    mean = torch.tensor([np.mean(scores[n]) for n in names]).where(fit, -torch.inf)
    best = names[int(mean.argmax())]
    behind = {
        n: with_torch_and_a_table(scores[best], scores[n])
        for n, one in zip(names, fit, strict=True)
        if one and n != best
    }
    good = [n == best or (n in behind and behind[n][2] <= 1) for n in names]
    i = int(need.where(torch.tensor(good), torch.inf).argmin())
    return {"method": names[i], "left": usable - need[i].item(), "behind": behind}
