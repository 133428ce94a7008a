"""Checks of lesson 15."""

import math

from .kit import Case, check_for


@check_for(
    cases=[
        Case(lambda: [24, 24 * 64]),
        Case(lambda: [24, 24 * 64 - 1], note="one number too few for rank 8"),
        Case(lambda: [36, 5_000]),
        Case(lambda: [1, 3]),
        Case(lambda: [10, 9], note="less than one number a matrix"),
        Case(lambda: [224, 10**17], note="a large budget"),
    ],
    causes={
        "R is square: a matrix trains r² numbers, not r": lambda n, b: b // n,
        "the budget is for all matrices together": lambda n, b: math.isqrt(b),
        "the rank is rounded up, above the budget": lambda n, b: math.ceil(math.sqrt(b / n)),
        "the rank is rounded to the nearest, at times above the budget": lambda n, b: round(
            math.sqrt(b / n)
        ),
        "A and B are counted, and they are frozen": lambda n, b: b // (2 * n),
        "the root is of the budget alone, and n must be under it": lambda n, b: math.isqrt(b) // n,
    },
)
def affordable_rank(matrices, budget):
    """The largest r with matrices · r² ≤ budget, in whole numbers."""
    rank = math.isqrt(budget // matrices)
    assert matrices * rank**2 <= budget < matrices * (rank + 1) ** 2
    return rank
