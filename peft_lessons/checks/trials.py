"""Check a learner's class of methods by the conformance suite."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..engine import Method
from ..testing.conformance import CHECKS, OF_A_LESSON, Bench, MethodError
from ..testing.wording import kind, summary
from .calls import is_stub, lines_of
from .kit import Refused

HINTS = {"before Module.__init__() call": "Call super().__init__(linear) first in your layer."}


def method_class(answer: Any) -> type[Method]:
    """Return a learner's class of methods; raise `Refused` if it is none."""
    if isinstance(answer, Method):
        raise Refused("pass the class itself, not an instance of it")
    if not (isinstance(answer, type) and issubclass(answer, Method)):
        what = "this class" if isinstance(answer, type) else kind(answer)
        raise Refused(f"{what} is not a method: write class MyMethod(Method)")
    return answer


def _trial(check: Callable[[Method, Bench], str]) -> Callable[[type[Method]], str]:
    def trial(cls: type[Method]) -> str:
        method = _made(cls)
        try:
            return check(method, Bench(start=float("inf")))
        except MethodError as error:
            raise Refused(*error.args) from None

    return trial


def _made(cls: type[Method]) -> Method:
    try:
        return cls()
    except Exception as error:
        if is_stub(error, cls.__module__):
            raise
        names = [repr(p.name) for p in _required(cls)]
        missing = [f"{' and '.join(names)} has no default."] if names else []
        facts = *getattr(error, "__notes__", []), *missing, *lines_of(error, cls.__module__)[-2:]
        raise Refused(f"MyMethod() raised {summary(error)}", *facts) from error


def _required(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass without a default."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    missing = dataclasses.MISSING
    return [f for f in fields if f.default is missing and f.default_factory is missing]


TRIALS = {_trial(check): CHECKS[check] for check in OF_A_LESSON}
