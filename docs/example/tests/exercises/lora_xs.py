"""Answers to the exercises of lesson 15."""

import math

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


@wrong("affordable_rank", "R is square: a matrix trains r² numbers")
def linear(matrices, budget):
    return int(budget / matrices)


@wrong("affordable_rank", "the budget is for all matrices together")
def of_one(matrices, budget):
    return math.isqrt(budget)


@wrong("affordable_rank", "rounded up, above the budget")
def up(matrices, budget):
    return math.ceil((budget / matrices) ** 0.5)


@wrong("affordable_rank", "n must be under it")
def outside(matrices, budget):
    return int(budget**0.5 / matrices)


@wrong("affordable_rank", "A and B are counted")
def both_factors(matrices, budget):
    return budget // matrices // 2


@right("affordable_rank")
def by_counting(matrices, budget):
    low, high = 0, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if matrices * middle**2 <= budget else (low, middle)
    return low


@right("affordable_rank")
def root_first(matrices, budget):
    rank = int((budget / matrices) ** 0.5) + 2
    while matrices * rank * rank > budget:
        rank -= 1
    return rank
