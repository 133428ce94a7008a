"""Compare the results of an answer with those of a reference, case by case.

An answer is called once per case. What may be wrong is then looked at in the order of `_LOOKS`. A
cause is named only if its wrong function returns the same as the learner's.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real
from typing import Any

import torch

from ..testing.wording import summary
from .calls import (
    Watch,
    function_of,
    gradients_of,
    is_stub,
    leaves,
    lines_of,
    module_of,
    outcome,
    seeded,
)
from .check import Check, Refused, WrongAnswer, sentence
from .compare import difference, shown, state


@dataclass(frozen=True)
class Case:
    """Describe one call. `make()` builds new arguments each time, with a seed per case.

    `note` explains what the arguments do not show. `earlier(function, *arguments)` calls the
    function once beforehand and returns the arguments of the call that is compared. With `raises`,
    the right answer raises one of these exceptions, its message names `mentions`, and it changes
    nothing."""

    make: Callable[[], Sequence[Any]]
    note: str = ""
    earlier: Callable[..., Sequence[Any]] | None = None
    raises: tuple[type[Exception], ...] = ()
    mentions: str = ""


def refused(make: Callable[[], Sequence[Any]], mentions: str, note: str) -> Case:
    """Return a case that must raise a ValueError whose message names `mentions`."""
    return Case(make, note, raises=(ValueError,), mentions=mentions)


@dataclass(frozen=True)
class Forbid:
    """Forbid new tensors of some shapes, in any order, computed from a case's arguments."""

    shapes: Callable[..., list[tuple[int, ...]]]
    sentence: str


@dataclass(frozen=True)
class _Fault:
    """Describe what is wrong with a call. If nothing but `missing` is wrong, that is said first."""

    problem: str
    facts: Sequence[str] = ()
    missing: str = ""


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
    bugs: in a bug hunt, the faults of the code that the learner gets: each set of them is a cause,
        which only results and gradients together tell apart."""

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

    def of_variant(self, number: int) -> "Compared":
        other = copy.copy(self)
        other.variant = number
        for cached in ("_right", "_causes"):
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
        return {len(self._right.call(number).args) for number in range(len(self.cases))}

    # Each is run in a case at most once, for all answers.
    @cached_property
    def _right(self) -> "_Runs":
        return _Runs(self, self.reference)

    @cached_property
    def _causes(self) -> dict[str, "_Runs"]:
        return {sentence: _Runs(self, self.adapt(f)) for sentence, f in self.causes.items()}

    def _facts(self, function: Callable) -> Iterator[str]:
        __tracebackhide__ = True
        yours = _Runs(self, function)
        if self._is_stub(yours):
            return
        for number in range(len(self.cases)):
            if fault := self._fault(yours, number):
                raise self._refusal(fault, yours, number) from yours.call(number).error
        refusals = sum(bool(case.raises) for case in self.cases)
        args = zip(self.names, self._right.call(0).args, strict=False)
        unchanged = [n for n, arg in args if n not in self.changes and not isinstance(arg, Real)]
        yield f"cases in which the result agrees: {len(self.cases) - refusals}"
        if refusals:
            yield f"bad calls that are refused and change nothing: {refusals}"
        if self.gradients:
            yield f"gradients that agree: {', '.join(self.gradients)}"
        if unchanged:
            yield f"arguments left unchanged: {', '.join(unchanged)}"

    def _is_stub(self, yours: "_Runs") -> bool:
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

    def _refusal(self, fault: _Fault, yours: "_Runs", number: int) -> WrongAnswer:
        case = self.cases[number]
        called = f"Called with: {self.describe(case.note, *self.arguments(number))}"
        if fault.missing and self._numbers_agree(yours):
            headline = f"The idea is right. Still missing: {fault.missing}"
            return self._wrong(headline, f"Here, {sentence(fault.problem)}", called, *fault.facts)
        return self._wrong(fault.problem, called, *fault.facts)

    def _described(self, note: str, *args: Any) -> str:
        return ", ".join(map(shown, self.names, args)) + (f" ({note})" if note else "")

    # ------------------------------------------------------------------ what may be wrong

    def _fault(self, yours: "_Runs", number: int) -> _Fault | None:
        """Return the first fault of an answer in a case."""
        looks = _LOOKS_AT_A_REFUSAL if self.cases[number].raises else _LOOKS
        return next(filter(None, (look(self, yours, number) for look in looks)), None)

    def _another_error(self, yours: "_Runs", number: int) -> _Fault | None:
        error, case = yours.call(number).error, self.cases[number]
        if error is None or isinstance(error, case.raises):
            return None
        problem = f"your function raised {summary(error)}{_due(case)}"
        missing = "the refusal of a bad call" if case.raises else ""
        return _Fault(problem, lines_of(error, yours.module)[-4:], missing)

    def _no_refusal(self, yours: "_Runs", number: int) -> _Fault | None:
        error, case = yours.call(number).error, self.cases[number]
        if error is None:
            return _Fault(f"nothing was raised{_due(case)}", missing="the refusal of a bad call")
        if case.mentions not in str(error):
            problem = f"the message does not name {case.mentions!r}: {summary(error)}"
            return _Fault(problem, missing="a name in the error's message")
        return None

    def _wrong_result(self, yours: "_Runs", number: int) -> _Fault | None:
        problem = self._difference(yours, number)
        if self.view and problem is None:
            _, unusable = yours.view(number)
            if unusable:
                lines = lines_of(unusable, yours.module)[-2:]
                facts = *lines, *self._likely(yours, number)
                return _Fault(f"the returned value cannot be used: {summary(unusable)}", facts)
            problem = self._view_difference(yours, number)
        if problem is None:
            return None
        missing = "the dtype" if " dtype " in problem else "the type"
        return _Fault(problem, self._likely(yours, number), missing)

    def _too_large_a_tensor(self, yours: "_Runs", number: int) -> _Fault | None:
        if not self.forbid:
            return None
        args = self.arguments(number, yours.function)
        shapes = {shape: f.sentence for f in self.forbid for shape in f.shapes(*args)}
        watch = Watch(shapes, args, yours.module)
        outcome(yours.function, args, watch)
        if not watch.formed:
            return None
        problem = f"a tensor of shape {watch.formed} is formed on the way"
        facts = watch.sentence, *watch.lines
        return _Fault(problem, facts, "a way without so large a tensor")

    def _copy_for_a_change(self, yours: "_Runs", number: int) -> _Fault | None:
        call, expected = yours.call(number), self._right.call(number)
        for name, arg, changed in zip(self.names, call.args, expected.args, strict=False):
            if name in self.changes and expected.result is changed and call.result is not arg:
                problem = f"the result is not the argument {name} itself: change {name} in place"
                return _Fault(problem, missing="the change in place")
        return None

    def _changed_arguments(self, yours: "_Runs", number: int) -> _Fault | None:
        args, case = yours.call(number).args, self.cases[number]
        if self.afterwards and (problem := self.afterwards(*args)):
            return _Fault(problem)
        although = " although the call was refused" if case.raises else ""
        before = self.arguments(number, yours.function)
        for name, arg, fresh in zip(self.names, args, before, strict=False):
            if name in self.changes and not case.raises:
                continue
            now, then = {name: state(arg, name)}, {name: state(fresh, name)}
            if change := difference(now, then, "", 0.0):
                problem = f"the argument {name} was changed{although}: leave it as it was"
                return _Fault(problem, [change], "unchanged arguments")
        return None

    def _wrong_gradient(self, yours: "_Runs", number: int) -> _Fault | None:
        try:
            problem = self._gradient_difference(yours, self._right, number)
        except Exception as error:
            lines = lines_of(error, yours.module)[-4:]
            return _Fault(f"it fails when gradients are computed: {summary(error)}", lines)
        if problem is None:
            return None
        return _Fault(problem, self._likely(yours, number, gradients=True))

    # ------------------------------------------------------------------ comparisons

    def _difference(self, yours: "_Runs", number: int, form: str = "") -> str | None:
        got, expected = yours.call(number).result, self._right.call(number).result
        values, form = not self.view, form or self.form
        return difference(got, expected, self.returns, self.tolerance, values, form)

    def _view_difference(self, yours: "_Runs", number: int, form: str = "") -> str | None:
        (got, _), (expected, _) = yours.view(number), self._right.view(number)
        return difference(got, expected, "", self.tolerance, form=form or self.form)

    def _gradient_difference(self, yours: "_Runs", against: "_Runs", number: int) -> str | None:
        if not self.gradients:
            return None
        expected, got = against.gradients(number), yours.gradients(number)
        for name in self.gradients:
            for wanted, gradient in zip(expected[name], got[name], strict=True):
                if gradient is None and wanted is not None:
                    cut = "detach(), .data, .item(), no_grad() and torch.tensor() cut it off"
                    return f"no gradient reaches {name} ({cut})"
                what = f"the gradient of {name}"
                if problem := difference(gradient, wanted, what, 10 * self.tolerance):
                    return problem
        return None

    def _numbers_agree(self, yours: "_Runs") -> bool:
        """Return whether the numbers are right in all cases with a result, whatever their form."""

        def agree(number: int) -> bool:
            if yours.call(number).error or self._difference(yours, number, "any"):
                return False
            if self.view and (yours.view(number)[1] or self._view_difference(yours, number, "any")):
                return False
            try:
                return not self._gradient_difference(yours, self._right, number)
            except Exception:  # its gradients cannot be computed
                return False

        return all(agree(number) for number in self._with_a_result())

    def _with_a_result(self) -> list[int]:
        return [number for number, case in enumerate(self.cases) if not case.raises]

    # ------------------------------------------------------------------ likely causes

    def _likely(self, yours: "_Runs", number: int, gradients: bool = False) -> list[str]:
        """Name the causes that explain a wrong answer, or say what else is known of its result."""
        gradients = gradients or bool(self.bugs)
        named = self._agreeing(yours, number, gradients)
        if len(named) > 2:  # that many say nothing
            return []
        if named:
            lead = "Still wrong" if self.bugs else "Likely cause"
            return [f"{lead}: {', or '.join(named)}."]
        if gradients:
            return []
        got, expected = yours.call(number).result, self._right.call(number).result
        if self.hint and (explained := self.hint(got, expected)):
            return [explained]
        for name, arg in zip(self.names, self.arguments(number), strict=False):
            if isinstance(arg, torch.Tensor) and not difference(got, arg):
                return [f"Your result equals the argument {name}."]
        return []

    def _agreeing(self, yours: "_Runs", number: int, gradients: bool) -> list[str]:
        """Return the causes whose wrong function does what the learner's does, here and before.

        In the cases before it was right: what would have failed there is not the cause. Of True
        and False one is right by chance half of the time: there all cases must agree."""

        @cache
        def same(sentence: str, i: int) -> bool:
            wrong = self._causes[sentence]
            if not gradients:
                return self._same_result(yours, wrong, i)
            with suppress(Exception):  # a wrong function need not work in every case
                agree = self._same_result(yours, wrong, i)
                return agree and not self._gradient_difference(yours, wrong, i)
            return False

        numbers = self._with_a_result()
        undecided = isinstance(self._right.call(number).result, bool)
        before = [i for i in numbers if i <= number or undecided]
        named = [sentence for sentence in self._causes if all(same(sentence, i) for i in before)]
        if len(named) > 1:  # these cases do not tell them apart, but perhaps a later one does
            counts = {sentence: sum(same(sentence, i) for i in numbers) for sentence in named}
            named = [s for s, count in counts.items() if count == max(counts.values())]
        return named

    def _same_result(self, yours: "_Runs", wrong: "_Runs", number: int) -> bool:
        answer, mistake = yours.call(number), wrong.call(number)
        if answer.error or mistake.error:
            return False
        got, other = answer.result, mistake.result
        if self.view and not difference(got, other, values=False, form=self.form):
            # A result so wrong that it has no view is known by its parts' types and shapes.
            (got, error), (other, other_error) = yours.view(number), wrong.view(number)
            if error and other_error:
                return (type(error), str(error)) == (type(other_error), str(other_error))
            if self.staged and not (error or other_error):
                return self._same_stages(got, other, self._right.view(number)[0])
        return not difference(got, other, tolerance=self.tolerance, form=self.form)

    def _same_stages(self, got: dict, wrong: dict, right: dict) -> bool:
        for part, value in right.items():
            if difference(got[part], wrong[part], tolerance=self.tolerance, form=self.form):
                return False
            if difference(got[part], value, tolerance=self.tolerance, form=self.form):
                return True
        return True

    # ------------------------------------------------------------------ credit

    def credit(self, answer: Any) -> float:
        """Return the share of the exercise, below 1, that a wrong answer has earned.

        Three quarters if the idea is right and something small is missing. Otherwise half of the
        share of cases in which it is right; where the result has several parts, a case counts by
        its parts that are right. Of a model with named parts they count in full, and in a bug hunt
        the bugs that are mended."""
        try:
            yours = _Runs(self, self.adapt(answer))
        except Refused:
            return 0.0
        if self.bugs:
            named = " ".join(self._likely(yours, 0))
            left = sum(bug in named for bug in self.bugs)
            return 1 - left / len(self.bugs) if left else 0.0
        with suppress(Exception):
            if self._numbers_agree(yours):
                return 0.75
        shares = [self._share(yours, number) for number in range(len(self.cases))]
        return sum(shares) / len(shares) * (1.0 if self.staged else 0.5)

    def _share(self, yours: "_Runs", number: int) -> float:
        """Return the share of a case that an answer gets right."""
        with suppress(Exception):
            if not self._fault(yours, number):
                return 1.0
        with suppress(Exception):
            if not self.cases[number].raises:
                got, expected = (_parts(r.compared(number)) for r in (yours, self._right))
                agree = [
                    not difference(got[name], part, "", self.tolerance, form="any")
                    for name, part in expected.items()
                    if name in got
                ]
                return sum(agree) / len(expected) if len(expected) > 1 else 0.0
        return 0.0


# A change in place before the gradients: autograd meets it with a less telling error.
_LOOKS = (
    Compared._another_error,
    Compared._wrong_result,
    Compared._too_large_a_tensor,
    Compared._copy_for_a_change,
    Compared._changed_arguments,
    Compared._wrong_gradient,
)
_LOOKS_AT_A_REFUSAL = (
    Compared._another_error,
    Compared._no_refusal,
    Compared._changed_arguments,
)


@dataclass(frozen=True)
class _Call:
    args: Sequence[Any]
    result: Any
    error: Exception | None


class _Runs:
    """Run a function in the cases of a check: in each once, when that is needed. A wrong answer is
    compared with some twenty causes."""

    def __init__(self, check: Compared, function: Callable) -> None:
        self.check, self.function, self.module = check, function, module_of(function)
        self.call, self.view, self.gradients = map(cache, (self._call, self._view, self._gradients))

    def compared(self, number: int) -> Any:
        """Return what is compared of a result: its view, if there is one."""
        return self.view(number)[0] if self.check.view else self.call(number).result

    def _call(self, number: int) -> _Call:
        args = self.check.arguments(number, self.function)
        return _Call(args, *outcome(self.function, args))

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


def _due(case: Case) -> str:
    wanted = " or ".join(error.__name__ for error in case.raises)
    return f", where {wanted} was expected" if wanted else ""


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
