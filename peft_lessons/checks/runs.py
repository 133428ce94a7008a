"""Run a function in the cases of a check, compare its results with those of another one, and name
the mistakes that explain a wrong answer."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .calls import gradients_of, leaves, module_of, outcome, seeded
from .compare import difference

if TYPE_CHECKING:
    from .compared import Compared


@dataclass(frozen=True)
class Call:
    """Hold the arguments of a call as they are after it, and how it ended."""

    args: Sequence[Any]
    result: Any
    error: Exception | None


class Runs:
    """Run a function in the cases of a check: in each once, when that is needed. A wrong answer is
    compared with some twenty causes."""

    def __init__(self, check: "Compared", function: Callable) -> None:
        self.check, self.function, self.module = check, function, module_of(function)
        self.call, self.view, self.gradients = map(cache, (self._call, self._view, self._gradients))

    def compared(self, number: int) -> Any:
        """Return what is compared of a result: its view, if there is one."""
        return self.view(number)[0] if self.check.view else self.call(number).result

    def _call(self, number: int) -> Call:
        args = self.check.arguments(number, self.function)
        return Call(args, *outcome(self.function, args))

    def _view(self, number: int) -> tuple[Any, Exception | None]:
        return outcome(self.check.view, [self.call(number).result])

    def _gradients(self, number: int) -> dict[str, list[torch.Tensor | None]]:
        """Return the gradients of a fixed weighted sum of the result's entries."""
        args = self.check.arguments(number, self.function)
        named = dict(zip(self.check.names, args, strict=False))
        wanted = [(n, t.requires_grad_()) for n in self.check.gradients for t in leaves(named[n])]
        with torch.enable_grad(), seeded():
            result = self.function(*args)
            result = self.check.view(result) if self.check.view else result
            gradients = gradients_of(result, [t for _, t in wanted])
        pairs = list(zip(wanted, gradients, strict=True))
        return {name: [g for (n, _), g in pairs if n == name] for name in self.check.gradients}

    def difference(self, against: "Runs", number: int, form: str = "") -> str | None:
        """Return the first difference between the results, without values if a view has them."""
        check = self.check
        got, expected = self.call(number).result, against.call(number).result
        values, form = not check.view, form or check.form
        return difference(got, expected, check.returns, check.tolerance, values, form)

    def view_difference(self, against: "Runs", number: int, form: str = "") -> str | None:
        (got, _), (expected, _) = self.view(number), against.view(number)
        return difference(got, expected, "", self.check.tolerance, form=form or self.check.form)

    def gradient_difference(self, against: "Runs", number: int) -> str | None:
        if not self.check.gradients:
            return None
        expected, got = against.gradients(number), self.gradients(number)
        for name in self.check.gradients:
            for wanted, gradient in zip(expected[name], got[name], strict=True):
                if gradient is None and wanted is not None:
                    cut = "detach(), .data, .item(), no_grad() and torch.tensor() cut it off"
                    return f"no gradient reaches {name} ({cut})"
                what = f"the gradient of {name}"
                if problem := difference(gradient, wanted, what, 10 * self.check.tolerance):
                    return problem
        return None

    def numbers_agree(self, right: "Runs") -> bool:
        """Return whether the numbers are right in all cases with a result, whatever their form."""

        def agree(number: int) -> bool:
            if self.call(number).error or self.difference(right, number, "any"):
                return False
            if self.check.view and (
                self.view(number)[1] or self.view_difference(right, number, "any")
            ):
                return False
            try:
                return not self.gradient_difference(right, number)
            except Exception:  # its gradients cannot be computed
                return False

        return all(map(agree, self.check.with_a_result))


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
