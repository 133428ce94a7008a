"""Compare the results of an answer with those of a reference, case by case."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from .calls import function_of, is_stub, seeded
from .check import Check, Refused, WrongAnswer, sentence
from .compare import difference, shown
from .looks import Fault, first_fault
from .runs import Runs, likely


@dataclass(frozen=True)
class Case:
    """Describe one call. `make()` builds new arguments each time, with a seed per case.

    `note` explains what the arguments do not show. `earlier(function, *arguments)` calls the
    function once beforehand and returns the arguments of the call that is compared. With `raises`,
    the right answer raises one of these exceptions, its message names `mentions`, and it changes
    nothing. In a bug hunt, `bug` says which bug of the code that the learner gets this case shows,
    and no other one."""

    make: Callable[[], Sequence[Any]]
    note: str = ""
    earlier: Callable[..., Sequence[Any]] | None = None
    raises: tuple[type[Exception], ...] = ()
    mentions: str = ""
    bug: str = ""


def refused(
    make: Callable[[], Sequence[Any]], mentions: str, note: str = "", bug: str = ""
) -> Case:
    """Return a case that must raise a ValueError whose message names `mentions`."""
    return Case(make, note, raises=(ValueError,), mentions=mentions, bug=bug)


@dataclass(frozen=True)
class Forbid:
    """Forbid new tensors of some shapes, in any order, computed from a case's arguments."""

    shapes: Callable[..., list[tuple[int, ...]]]
    sentence: str


class Compared(Check):
    """Call a learner's function on every case and compare it with the reference.

    returns: the name of the result, or of each part of a tuple.
    view: a function of the result to compare, if the result itself is not unique (a product of
        factors) or not comparable (the trainable parameters of a model). Type and shape are still
        those of the result.
    staged: whether the view is an ordered dict of parts, so that the first of several faults is
        named: a cause then agrees with the learner's function up to the first wrong part.
    gradients: the arguments whose gradients must agree too; of a module, its trainable parameters.
    forbid: shapes that must not be computed; the last sentence counts if a shape occurs twice.
    changes: the arguments that may be changed in place; if the reference returns one of them, the
        learner's function must return it too, and no copy.
    afterwards: a function of the arguments after the call that returns what is wrong with them.
    form: which dtypes and types serve: the "same", a "wider" one or "any"; see `difference`.
    describe: a function of a case's note and arguments that says how the answer was called.
    hint: a function of the result and the expected one, whose sentence explains a wrong result
        that no cause explains.
    calls: {another exercise that an answer may call: what to do while it is not written}.
    bugs: the bugs of a hunt that no case shows alone: each set of them is a cause, which only
        results and gradients together tell apart.

    In a hunt whose cases name their bugs, a bug is mended once all its cases are right. A verdict
    of a hunt counts the mended ones and shows one call; what explains it, it says on request."""

    def __init__(
        self,
        reference: Callable,
        cases: Sequence[Case | tuple],
        returns: str | tuple[str, ...] = "the result",
        view: Callable[[Any], Any] | None = None,
        staged: bool = False,
        gradients: tuple[str, ...] = (),
        forbid: Sequence[Forbid] = (),
        changes: tuple[str, ...] = (),
        afterwards: Callable[..., str | None] | None = None,
        tolerance: float = 1e-5,
        form: str = "wider",
        describe: Callable[..., str] | None = None,
        hint: Callable[[Any, Any], str | None] | None = None,
        calls: Mapping[str, str] | None = None,
        bugs: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(reference, **settings)
        self.cases = [c if isinstance(c, Case) else Case(lambda c=c: c) for c in cases]
        self.returns, self.view, self.staged = returns, view, staged
        self.gradients, self.forbid, self.changes = gradients, forbid, changes
        self.afterwards, self.tolerance, self.form = afterwards, tolerance, form
        self.describe, self.hint = describe or self._described, hint
        self.calls, self.bugs, self.variant = calls or {}, bugs, 0
        self.hunted = list(dict.fromkeys(case.bug for case in self.cases if case.bug))

    def of_variant(self, number: int) -> "Compared":
        other = copy.copy(self)
        other.variant = number
        for cached in ("right_runs", "cause_runs"):
            vars(other).pop(cached, None)
        return other

    def arguments(self, number: int, function: Callable | None = None) -> list[Any]:
        """Build the arguments of a case, after its earlier call of this function if it has one."""
        case = self.cases[number]
        with seeded(number + self.variant):
            args = _unshared(case.make())
            return list(case.earlier(function or self.reference, *args) if case.earlier else args)

    def _counts(self) -> set[int]:
        if all(p.default is p.empty for p in self.signature.parameters.values()):
            return {len(self.names)}
        return {len(self.right_runs.call(number).args) for number in range(len(self.cases))}

    # Each is run in a case at most once, for all answers.
    @cached_property
    def right_runs(self) -> Runs:
        return Runs(self, self.reference)

    @cached_property
    def cause_runs(self) -> dict[str, Runs]:
        return {sentence: Runs(self, self.adapt(f)) for sentence, f in self.causes.items()}

    @property
    def explanations(self) -> list[str]:
        return list(dict.fromkeys([*self.causes, *self.hunted]))

    @property
    def with_a_result(self) -> list[int]:
        """Return the cases in which the right answer returns something."""
        return [number for number, case in enumerate(self.cases) if not case.raises]

    def _facts(self, function: Callable) -> Iterator[str]:
        __tracebackhide__ = True
        yours = Runs(self, function)
        if self._is_stub(yours):
            return
        for number in range(len(self.cases)):
            if fault := first_fault(yours, number):
                raise self._refusal(fault, yours, number) from yours.call(number).error
        refusals = sum(bool(case.raises) for case in self.cases)
        args = zip(self.names, self.right_runs.call(0).args, strict=False)
        unchanged = [n for n, arg in args if n not in self.changes and not isinstance(arg, Real)]
        yield f"cases in which the result agrees: {len(self.cases) - refusals}"
        if refusals:
            yield f"bad calls that are refused and change nothing: {refusals}"
        if self.gradients:
            yield f"gradients that agree: {', '.join(self.gradients)}"
        if unchanged:
            yield f"arguments left unchanged: {', '.join(unchanged)}"

    def _is_stub(self, yours: Runs) -> bool:
        __tracebackhide__ = True
        error = yours.call(0).error
        if not is_stub(error, yours.module):
            return False
        name = function_of(error)
        if self.calls and name != self.__name__:
            if todo := self.calls.get(name):
                raise self._wrong(f"your {name} is not written yet", todo) from error
            headline = f"{name}, which your answer calls, is not written yet"
            raise self._wrong(headline) from error
        return True

    def _refusal(self, fault: Fault, yours: Runs, number: int) -> WrongAnswer:
        case = self.cases[number]
        called = f"Called with: {self.describe(case.note, *self.arguments(number))}"
        here = f"Here, {sentence(fault.problem)}", called, *fault.facts
        if self.bugs and (left := self._left(yours, number)):
            mended = len(self.bugs) - left
            headline = (
                f"{mended} of {len(self.bugs)} faults {'is' if mended == 1 else 'are'} mended"
            )
            return self._wrong(headline, *here, on_request=fault.explains)
        if self.hunted:
            mended, bugs = self._mended(yours), len(self.hunted)
            headline = f"{mended} of {bugs} faults {'is' if mended == 1 else 'are'} mended"
            if mended == bugs:
                headline = f"All {bugs} faults are mended, but something else is wrong"
            shows = [f"In the given code, this call shows that {case.bug}."] if case.bug else []
            return self._wrong(headline, *here, on_request=fault.explains or shows)
        if fault.missing and yours.numbers_agree(self.right_runs):
            headline = f"The idea is right. Still missing: {fault.missing}"
            return self._wrong(headline, *here, *fault.explains)
        return self._wrong(fault.problem, called, *fault.facts, *fault.explains)

    def _described(self, note: str, *args: Any) -> str:
        return ", ".join(map(shown, self.names, args)) + (f" ({note})" if note else "")

    def credit(self, answer: Any) -> float:
        """Return the share of the exercise, below 1, that a wrong answer has earned.

        Three quarters if the idea is right and something small is missing. Otherwise half of the
        share of cases in which it is right; where the result has several parts, a case counts by
        its parts that are right. Of a model with named parts they count in full, and in a bug hunt
        the bugs that are mended, up to three quarters if something else is wrong."""
        try:
            yours = Runs(self, self.adapt(answer))
        except Refused:
            return 0.0
        if self.bugs:
            left = self._left(yours, 0)
            return 1 - left / len(self.bugs) if left else 0.0
        if self.hunted:
            mended = self._mended(yours) / len(self.hunted)
            return mended if mended < 1 else 0.75
        with suppress(Exception):
            if yours.numbers_agree(self.right_runs):
                return 0.75
        shares = [self._share(yours, number) for number in range(len(self.cases))]
        return sum(shares) / len(shares) * (1.0 if self.staged else 0.5)

    def _left(self, yours: Runs, number: int) -> int:
        """Return how many bugs that no case shows alone explain what an answer does in a case."""
        named = " ".join(likely(yours, number))
        return sum(bug in named for bug in self.bugs)

    def _mended(self, yours: Runs) -> int:
        """Return how many bugs of a hunt an answer has mended."""
        shown = enumerate(self.cases)
        left = {case.bug for number, case in shown if case.bug and not _is_right(yours, number)}
        return len(self.hunted) - len(left)

    def _share(self, yours: Runs, number: int) -> float:
        """Return the share of a case that an answer gets right."""
        if _is_right(yours, number):
            return 1.0
        with suppress(Exception):
            if not self.cases[number].raises:
                got, expected = (_parts(r.compared(number)) for r in (yours, self.right_runs))
                agree = [
                    not difference(got[name], part, "", self.tolerance, form="any")
                    for name, part in expected.items()
                    if name in got
                ]
                return sum(agree) / len(expected) if len(expected) > 1 else 0.0
        return 0.0


def _is_right(yours: Runs, number: int) -> bool:
    """Return whether an answer is right in a case."""
    with suppress(Exception):
        return first_fault(yours, number) is None
    return False


def _unshared(value: Any) -> Any:
    """Copy the lists and dicts in a value: an answer that changes a literal one of a case must not
    change it for the next call."""
    if type(value) in (list, tuple):
        return type(value)(map(_unshared, value))
    if type(value) is dict:
        return {key: _unshared(part) for key, part in value.items()}
    return value


def _parts(result: Any) -> dict[Any, Any]:
    """Return the parts of a result that has several, by name or place."""
    if isinstance(result, Mapping):
        return dict(result)
    return dict(enumerate(result)) if isinstance(result, list | tuple) else {}
