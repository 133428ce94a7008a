"""The ways in which LoRA's scaling alpha / r goes wrong, the same in every lesson that has it."""

from collections.abc import Callable

from .mistakes import mistakes, scaling_mistakes

_WRONG = mistakes("def scale(alpha, r):\n    return alpha / r", scaling_mistakes("alpha / r"))


def wrong_scalings(answer: Callable[[Callable], Callable]) -> dict[str, Callable]:
    """The causes of a wrong scaling; `answer(scale)` is the exercise done with scale(alpha, r)."""
    return {sentence: answer(scale) for sentence, scale in _WRONG.items()}
