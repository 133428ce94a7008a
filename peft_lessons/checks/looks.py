"""What may be wrong with an answer in a case, in the order in which it is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..testing.wording import summary
from .calls import Watch, lines_of, outcome
from .compare import difference, state
from .runs import Runs, likely

if TYPE_CHECKING:
    from .compared import Case


@dataclass(frozen=True)
class Fault:
    """Describe what is wrong with a call. If nothing but `missing` is wrong, that is said first;
    what `explains` it is said last, and in a hunt on request."""

    problem: str
    facts: Sequence[str] = ()
    missing: str = ""
    explains: Sequence[str] = ()


def first_fault(yours: Runs, number: int) -> Fault | None:
    """Return the first fault of an answer in a case."""
    looks = _LOOKS_AT_A_REFUSAL if yours.check.cases[number].raises else _LOOKS
    return next(filter(None, (look(yours, number) for look in looks)), None)


def _another_error(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    error, case = yours.call(number).error, check.cases[number]
    if error is None or isinstance(error, case.raises):
        return None
    problem = f"your function raised {summary(error)}{_due(case)}"
    missing = "the refusal of a bad call" if case.raises else ""
    return Fault(problem, lines_of(error, yours.module)[-4:], missing)


def _no_refusal(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    error, case = yours.call(number).error, check.cases[number]
    if error is None:
        return Fault(f"nothing was raised{_due(case)}", missing="the refusal of a bad call")
    if case.mentions not in str(error):
        problem = f"the message does not name {case.mentions!r}: {summary(error)}"
        return Fault(problem, missing="a name in the error's message")
    return None


def _wrong_result(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    problem = yours.difference(check.right_runs, number)
    if check.view and problem is None:
        _, unusable = yours.view(number)
        if unusable:
            problem = f"the returned value cannot be used: {summary(unusable)}"
            lines = lines_of(unusable, yours.module)[-2:]
            return Fault(problem, lines, explains=likely(yours, number))
        problem = yours.view_difference(check.right_runs, number)
    if problem is None:
        return None
    missing = "the dtype" if " dtype " in problem else "the type"
    return Fault(problem, missing=missing, explains=likely(yours, number))


def _too_large_a_tensor(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    if not check.forbid:
        return None
    args = check.arguments(number, yours.function)
    shapes = {shape: f.sentence for f in check.forbid for shape in f.shapes(*args)}
    watch = Watch(shapes, args, yours.module)
    outcome(yours.function, args, watch)
    if not watch.formed:
        return None
    problem = f"a tensor of shape {watch.formed} is formed on the way"
    facts = watch.sentence, *watch.lines
    return Fault(problem, facts, "a way without so large a tensor")


def _copy_for_a_change(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    call, expected = yours.call(number), check.right_runs.call(number)
    for name, arg, changed in zip(check.names, call.args, expected.args, strict=False):
        if name in check.changes and expected.result is changed and call.result is not arg:
            problem = f"the result is not the argument {name} itself: change {name} in place"
            return Fault(problem, missing="the change in place")
    return None


def _changed_arguments(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    args, case = yours.call(number).args, check.cases[number]
    if check.afterwards and (problem := check.afterwards(*args)):
        return Fault(problem)
    although = " although the call was refused" if case.raises else ""
    before = check.arguments(number, yours.function)
    for name, arg, fresh in zip(check.names, args, before, strict=False):
        if name in check.changes and not case.raises:
            continue
        now, then = {name: state(arg, name)}, {name: state(fresh, name)}
        if change := difference(now, then, "", 0.0):
            problem = f"the argument {name} was changed{although}: leave it as it was"
            return Fault(problem, [change], "unchanged arguments")
    return None


def _wrong_gradient(yours: Runs, number: int) -> Fault | None:
    check = yours.check
    try:
        problem = yours.gradient_difference(check.right_runs, number)
    except Exception as error:
        lines = lines_of(error, yours.module)[-4:]
        return Fault(f"it fails when gradients are computed: {summary(error)}", lines)
    if problem is None:
        return None
    return Fault(problem, explains=likely(yours, number, gradients=True))


# A change in place before the gradients: autograd meets it with a less telling error.
_LOOKS = (
    _another_error,
    _wrong_result,
    _too_large_a_tensor,
    _copy_for_a_change,
    _changed_arguments,
    _wrong_gradient,
)
_LOOKS_AT_A_REFUSAL = (_another_error, _no_refusal, _changed_arguments)


def _due(case: "Case") -> str:
    wanted = " or ".join(error.__name__ for error in case.raises)
    return f", where {wanted} was expected" if wanted else ""
