"""Name the mistakes that explain a wrong answer."""

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import torch

from .compare import difference
from .runs import Runs

if TYPE_CHECKING:
    from .compared import Compared


def likely(yours: Runs, number: int, gradients: bool = False) -> list[str]:
    """Name the causes that explain a wrong answer, or say what else is known of its result."""
    check = yours.check
    gradients = gradients or bool(check.bugs)
    named = _agreeing(yours, number, gradients)
    if len(named) > 2:  # that many say nothing
        return []
    if named:
        lead = "Still wrong" if check.bugs else "Likely cause"
        return [f"{lead}: {', or '.join(named)}."]
    if gradients:
        return []
    got, expected = yours.call(number).result, check.right_runs.call(number).result
    if check.hint and (explained := check.hint(got, expected)):
        return [explained]
    for name, arg in zip(check.names, check.arguments(number), strict=False):
        if isinstance(arg, torch.Tensor) and not difference(got, arg):
            return [f"Your result equals the argument {name}."]
    return []


def _agreeing(yours: Runs, number: int, gradients: bool) -> list[str]:
    """Return the causes whose wrong function does what the learner's does, here and before.

    In the cases before it was right: what would have failed there is not the cause. Of True
    and False one is right by chance half of the time: there all cases must agree."""
    check = yours.check

    @cache
    def same(sentence: str, i: int) -> bool:
        wrong = check.cause_runs[sentence]
        if not gradients:
            return _same_result(yours, wrong, i)
        with suppress(Exception):  # a wrong function need not work in every case
            agree = _same_result(yours, wrong, i)
            return agree and not yours.gradient_difference(wrong, i)
        return False

    numbers = check.with_a_result
    undecided = isinstance(check.right_runs.call(number).result, bool)
    before = [i for i in numbers if i <= number or undecided]
    named = [sentence for sentence in check.cause_runs if all(same(sentence, i) for i in before)]
    if len(named) > 1:  # these cases do not tell them apart, but perhaps a later one does
        counts = {sentence: sum(same(sentence, i) for i in numbers) for sentence in named}
        named = [s for s, count in counts.items() if count == max(counts.values())]
    return named


def _same_result(yours: Runs, wrong: Runs, number: int) -> bool:
    check = yours.check
    answer, mistake = yours.call(number), wrong.call(number)
    if answer.error or mistake.error:
        return False
    got, other = answer.result, mistake.result
    if check.view and not difference(got, other, values=False, form=check.form):
        # A result so wrong that it has no view is known by its parts' types and shapes.
        (got, error), (other, other_error) = yours.view(number), wrong.view(number)
        if error and other_error:
            return (type(error), str(error)) == (type(other_error), str(other_error))
        if check.staged and not (error or other_error):
            return _same_stages(check, got, other, check.right_runs.view(number)[0])
    return not difference(got, other, tolerance=check.tolerance, form=check.form)


def _same_stages(check: "Compared", got: dict, wrong: dict, right: dict) -> bool:
    for part, value in right.items():
        if difference(got[part], wrong[part], tolerance=check.tolerance, form=check.form):
            return False
        if difference(got[part], value, tolerance=check.tolerance, form=check.form):
            return True
    return True
