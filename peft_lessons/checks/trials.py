"""Check a learner's class of methods by the conformance suite."""

import dataclasses
from collections.abc import Callable

from ..engine import Method
from ..testing.conformance import CHECKS, OF_A_LESSON, Bench, MethodError
from ..testing.wording import kind, summary
from .kit import Refused, Tried, WrongAnswer, is_stub, outcome

_HINTS = {"before Module.__init__() call": "Call super().__init__(linear) first in your layer."}


def _trial(check: Callable[[Method, Bench], str]) -> Callable[[Method], str]:
    def trial(method: Method) -> str:
        try:
            return check(method, Bench(start=float("inf")))
        except MethodError as error:
            raise Refused(*error.args) from None

    return trial


class Trials(Tried):
    """Check a class of methods by all trials on an instance of it. The function below has the name
    of the exercise, and describes a method that passes."""

    def __init__(self, reference: Callable) -> None:
        trials = {_trial(check): CHECKS[check] for check in OF_A_LESSON}
        super().__init__(reference, [()], trials, _HINTS)

    def _verified(self) -> str:
        return f"{super()._verified()} Only you know whether Δh is an idea of your own."

    def _check_signature(self, function: Callable) -> None:
        __tracebackhide__ = True
        if isinstance(function, Method):
            raise WrongAnswer(f"{self.__name__}: pass the class itself, not an instance of it.")
        if not (isinstance(function, type) and issubclass(function, Method)):
            given = "this class" if isinstance(function, type) else kind(function)
            wanted = f"class {self.__name__}(Method)"
            raise WrongAnswer(f"{self.__name__}: {given} is not a method: write {wanted}.")

    def _check_case(self, function: Callable, number: int) -> bool:
        __tracebackhide__ = True
        method, error = outcome(function, [])
        if is_stub(error, function.__module__):
            return False
        if error is not None:
            bare = [p.name for p in _required(function)]
            told = [f"{' and '.join(map(repr, bare))} has no default."] if bare else []
            problem = f"{self.__name__}() raised {summary(error)}"
            self._blame(problem, told, error, function.__module__)
        return self._passes(method, function.__module__)


def _required(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass without a default."""
    found = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    missing = dataclasses.MISSING
    return [f for f in found if f.default is missing and f.default_factory is missing]
