"""Run a function in the cases of a check, and compare its results with those of another one."""

from collections.abc import Callable, Sequence
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
