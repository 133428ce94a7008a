"""Checks of lesson 18."""

import math

from .kit import Case, check_for
from .mistakes import mistakes


@check_for(
    cases=[
        Case(lambda: [24, 24 * 64]),
        Case(lambda: [24, 24 * 64 - 1], note="one number too few for rank 8"),
        Case(lambda: [36, 5_000]),
        Case(lambda: [1, 3]),
        Case(lambda: [10, 9], note="less than one number a matrix"),
        Case(lambda: [224, 10**17], note="a large budget"),
    ],
    causes=mistakes(
        """
        def affordable_rank(matrices, budget):
            numbers = budget // matrices
            return math.isqrt(numbers)
        """,
        """
        R is square: a matrix trains r² numbers, not r
            math.isqrt(numbers) → numbers
        the budget is for all matrices together
            budget // matrices → budget
        the rank is rounded up, above the budget
            math.isqrt(numbers) → math.ceil(math.sqrt(budget / matrices))
        the rank is rounded to the nearest, at times above the budget
            math.isqrt(numbers) → round(math.sqrt(budget / matrices))
        A and B are counted, and they are frozen
            math.isqrt(numbers) → numbers // 2
        the root is of the budget alone, and n must be under it
            math.isqrt(numbers) → math.isqrt(budget) // matrices
        """,
    ),
)
def affordable_rank(matrices, budget):
    """The largest r with matrices · r² ≤ budget, in whole numbers."""
    rank = math.floor((budget / matrices) ** 0.5) + 2
    while matrices * rank**2 > budget:
        rank -= 1
    return rank
