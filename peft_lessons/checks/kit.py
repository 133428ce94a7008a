"""Build checks: `@check_for` makes one of a reference, its settings and named causes.

The reference is a function or a class, with the name and parameters of the exercise, and its
docstring is the sentence shown for a right answer. Expected values come from the reference. A cause
is a sentence with a wrong function, and is named only if that function returns the same as the
learner's. Where results cannot be compared with those of a reference, trials judge an answer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

from ..testing.wording import kind, summary
from .calls import is_stub, lines_of, module_of, outcome
from .check import Check, Refused, Verdict, WrongAnswer
from .compare import difference
from .compared import Case, Compared, Forbid, refused

__all__ = [
    "Case",
    "Check",
    "Compared",
    "Forbid",
    "Refused",
    "Tried",
    "Verdict",
    "WrongAnswer",
    "check_for",
    "dict_of",
    "draw_variant",
    "first_of",
    "refused",
]


class Tried(Check):
    """Check an answer by trials: each trial gets it, and returns a sentence about what is right or
    raises `Refused`. The reference has the exercise's name and parameters, and is not called.

    trials: {trial: who raised it if it ends in another error}.
    hints: {part of that error's message: its meaning here}.
    share: a function of a wrong answer that returns the share of the exercise that it has right."""

    def __init__(
        self,
        reference: Callable,
        trials: Mapping[Callable[[Any], str], str],
        hints: Mapping[str, str] | None = None,
        share: Callable[[Any], float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(reference, **settings)
        self.trials, self.hints, self.share = trials, hints or {}, share

    def credit(self, answer: Any) -> float:
        """Return the share that is right if that can be told, else half of the share of trials that
        an answer passes before it fails."""
        if self.share:
            return self.share(answer)
        passed = 0
        with suppress(WrongAnswer):
            for _ in self._facts(answer):
                passed += 1
        return passed / len(self.trials) / 2

    def _facts(self, function: Any) -> Iterator[str]:
        __tracebackhide__ = True
        module = module_of(function)
        for number, (trial, who) in enumerate(self.trials.items()):
            fact, error = outcome(trial, [function])
            if number == 0 and is_stub(error, module):
                return
            if isinstance(error, Refused):
                raise self._wrong(*error.args, on_request=error.on_request)
            if error is not None:
                hints = [hint for text, hint in self.hints.items() if text in str(error)][:1]
                facts = *getattr(error, "__notes__", []), *hints, *lines_of(error, module)[-2:]
                raise self._wrong(f"{who} raised {summary(error)}", *facts) from error
            yield fact


def check_for(**settings: Any) -> Callable[[Callable], Check]:
    """Return a decorator that turns a reference into a check with these settings: those of `Tried`
    if it has trials, else those of `Compared`; and those of `Check`."""
    form = Tried if "trials" in settings else Compared
    return lambda reference: form(reference, **settings)


def dict_of(function: Callable) -> Mapping:
    """Return the dict that an answer without arguments returns; Refused if it is none."""
    if not callable(function):
        raise Refused(f"pass the function itself, not {kind(function)}")
    result = function()
    if not isinstance(result, Mapping):
        raise Refused(difference(result, {}) or "the result is no dict")
    return result


def first_of(*names: str) -> Callable[[Mapping], dict]:
    """Return a view of a dict whose first parts are these: a fault is named in this order."""

    def view(answer: Mapping) -> dict:
        first = {name: answer[name] for name in names if name in answer}
        return first | dict(answer)

    return view


def draw_variant(checks: ModuleType, number: int) -> SimpleNamespace:
    """Return a lesson's checks with cases that draw other random numbers: those of a variant, 0 as
    in a notebook. What a case states in full stays as it is.

    Marking gives each student another variant, so that nobody's answer can be fitted to the numbers
    that the check in the notebook shows."""
    variants = {}
    for name, one in vars(checks).items():
        if isinstance(one, Check):
            variants[name] = one.of_variant(number)
    return SimpleNamespace(**variants)
