"""The ways in which LoRA's scaling alpha / r goes wrong, the same in every lesson that has it."""

import math
from collections.abc import Callable

_WRONG = {
    "the scaling alpha / r is left out": lambda alpha, r: 1,
    "alpha is not divided by r": lambda alpha, r: alpha,
    "the scaling is upside down: it is alpha / r": lambda alpha, r: r / alpha,
    "the scaling alpha / r is applied twice": lambda alpha, r: (alpha / r) ** 2,
    "// drops the fraction of alpha / r": lambda alpha, r: alpha // r,
    "alpha is divided by √r, as in rsLoRA": lambda alpha, r: alpha / math.sqrt(r),
}


def wrong_scalings(answer: Callable[[Callable], Callable]) -> dict[str, Callable]:
    """The causes of a wrong scaling; `answer(scale)` is the exercise done with scale(alpha, r)."""
    return {sentence: answer(scale) for sentence, scale in _WRONG.items()}
