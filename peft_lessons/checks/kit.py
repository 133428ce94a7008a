"""Build checks from cases, a reference and named causes; a check has three outcomes.

A check is a reference function under `@check_for`. The reference has the name and parameters of the
exercise, and its docstring is the sentence shown for a right answer. Expected values come from the
reference. A cause is a sentence with a wrong function, and is named only if that function returns
the same as the learner's.
"""

import dis
import html
import inspect
import linecache
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Real
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..testing.wording import kind, summary
from .compare import bare, difference, shown, state, tensors

# The seed of calls, apart from the cases' own: a function that draws must not draw its arguments.
_CALLS = 2**31 - 1

# Added to the seeds of cases. Marking gives each student another, so that nobody's answer can be
# fitted to the numbers that the check in the notebook shows.
_variant = 0


def draw_variant(number: int) -> None:
    """Let the cases of all checks draw other random numbers: those of a variant, 0 as in a
    notebook. What a case states in full stays as it is."""
    global _variant
    _variant = number


class WrongAnswer(AssertionError):
    """Report a wrong answer: a headline and a few lines of facts, shown without a traceback."""

    def __init__(self, headline: str, *facts: str) -> None:
        super().__init__("\n  ".join([f"✗ {headline}", *facts]))

    def _render_traceback_(self) -> list[str]:
        headline, *facts = str(self).split("\n")
        # Bold, not red: the box is red already, and red on dark red is not to be read.
        return [f"\x1b[1m{headline}\x1b[0m", *facts]


@dataclass(frozen=True, repr=False)
class Verdict:
    """Show the result of a check, "right" or "not attempted", as text and HTML."""

    status: str
    headline: str
    details: str

    def __repr__(self) -> str:
        return f"{'✓' if self.status == 'right' else '○'} {self.headline}\n  {self.details}"

    def _repr_html_(self) -> str:
        variable = {"right": "success-color1", "not attempted": "border-color1"}[self.status]
        headline, details = html.escape(repr(self)).split("\n", 1)
        return (
            f'<div style="border-left: 4px solid var(--jp-{variable}, #6b8e6b); '
            'padding: 0.3em 0.8em; color: var(--jp-content-font-color1, inherit)">'
            f"<strong>{headline}</strong><br>{details}</div>"
        )


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


class Check:
    """Call a learner's function on every case and compare it with the reference.

    returns: the name of the result, or of each part of a tuple.
    view: a function of the result to compare, if the result itself is not unique (a product of
        factors) or not comparable (the trainable parameters of a model). Type and shape are still
        those of the result.
    staged: whether the view is an ordered dict of parts, so that the first of several faults is
        named: a cause then agrees with the learner's function up to the first wrong part.
    gradients: the arguments whose gradients must agree too.
    forbid: shapes that must not be computed; the last sentence counts if a shape occurs twice.
    changes: the arguments that may be changed in place; if the reference returns one of them, the
        learner's function must return it too, and no copy.
    exact_dtype: whether the dtype is the point, so that no other is accepted."""

    lead = "Likely cause"  # of the sentence that names a cause

    def __init__(
        self,
        reference: Callable,
        cases: Sequence[Case | tuple],
        causes: Mapping[str, Callable] | None = None,
        returns: str | tuple[str, ...] = "the result",
        view: Callable[[Any], Any] | None = None,
        staged: bool = False,
        gradients: tuple[str, ...] = (),
        forbid: Sequence[Forbid] = (),
        changes: tuple[str, ...] = (),
        tolerance: float = 1e-5,
        exact_dtype: bool = False,
    ) -> None:
        self.reference, self.returns, self.view = reference, returns, view
        self.gradients, self.forbid, self.changes = gradients, forbid, changes
        self.tolerance, self.staged = tolerance, staged
        self.form = "same" if exact_dtype else "wider"
        self.cases = [c if isinstance(c, Case) else Case(lambda c=c: c) for c in cases]
        self.signature = inspect.signature(reference)
        self.names = list(self.signature.parameters)
        self.causes = dict(causes or {})
        # The right answer that the causes are edits of, where they are.
        self.right = getattr(causes, "right", None)
        # {variant: the runs of the reference and of the causes}, for the next wrong answer, too.
        self._known: dict[int, tuple[_Runs, dict[str, _Runs]]] = {}
        self.__name__, self.__doc__ = reference.__name__, inspect.getdoc(reference)

    def __call__(self, function: Callable) -> Verdict:
        __tracebackhide__ = True
        self._check_signature(function)
        for number in range(len(self.cases)):
            if not self._check_case(function, number):
                headline = f"{self.__name__}: not attempted yet."
                todo = "Write the function, run its cell, then run this cell again."
                if _strict():
                    raise WrongAnswer(headline, todo)
                return Verdict("not attempted", headline, todo)
        return Verdict("right", f"{self.__name__}: right.", f"{self.__doc__} {self._verified()}")

    def credit(self, function: Callable) -> float:
        """Return the share of the exercise, below 1, that a wrong answer has earned.

        Three quarters if the idea is right and something small is missing. Otherwise half of the
        share of cases in which it is right; where the result has several parts, a case counts by
        its parts that are right. Of a model with named parts they count in full."""
        with suppress(Exception):
            if self._numbers_agree(function):
                return 0.75
        shares = [self._share(function, number) for number in range(len(self.cases))]
        return sum(shares) / len(shares) * (1.0 if self.staged else 0.5)

    def _share(self, function: Callable, number: int) -> float:
        """Return the share of a case that an answer gets right."""
        with suppress(Exception):
            return float(self._check_case(function, number))
        with suppress(Exception):
            if not self.cases[number].raises:
                got, expected = (_Runs(self, f) for f in (function, self.reference))
                side = "view" if self.view else "result"
                got, expected = (_parts(getattr(r, side)(number)[0]) for r in (got, expected))
                agree = [
                    not difference(got[name], part, "", self.tolerance, form="any")
                    for name, part in expected.items()
                    if name in got
                ]
                return sum(agree) / len(expected) if len(expected) > 1 else 0.0
        return 0.0

    def _verified(self) -> str:
        refusals = sum(bool(case.raises) for case in self.cases)
        args = zip(self.names, self._arguments(0), strict=False)
        kept = [n for n, arg in args if n not in self.changes and not isinstance(arg, Real)]
        told = [
            f"cases in which the result agrees: {len(self.cases) - refusals}",
            f"bad calls that are refused and change nothing: {refusals}" if refusals else "",
            f"gradients that agree: {', '.join(self.gradients)}" if self.gradients else "",
            f"arguments left unchanged: {', '.join(kept)}" if kept else "",
        ]
        return f"Verified: {'; '.join(filter(None, told))}."

    def _check_signature(self, function: Callable) -> None:
        __tracebackhide__ = True
        if not callable(function):
            given = kind(function)
            raise WrongAnswer(f"{self.__name__}: pass the function itself, not {given}.")
        try:
            given = inspect.signature(function)
        except ValueError:  # some functions written in C have none
            return
        theirs = list(given.parameters)
        try:
            for count in self._counts:
                given.bind(*self.names[:count])
            given.bind(*self.names)
            fits = theirs == self.names or sorted(theirs) != sorted(self.names)
        except TypeError:
            fits = False
        if not fits:
            wanted, yours = (_parameters(s) for s in (self.signature, given))
            facts = f"Expected {self.__name__}{wanted}", f"Yours is {self.__name__}{yours}"
            raise WrongAnswer(f"{self.__name__}: the parameters differ.", *facts)

    @cached_property
    def _counts(self) -> set[int]:
        """Return the numbers of arguments of the cases, computed once: some build models."""
        return {len(self._arguments(number)) for number in range(len(self.cases))}

    def _check_case(self, function: Callable, number: int) -> bool:
        """Raise WrongAnswer for the first fault; return False if the answer is still the stub."""
        __tracebackhide__ = True
        case, args = self.cases[number], self._arguments(number, function)
        module = getattr(function, "__module__", None) or ""  # what C made may have none
        watch = _Watch(self.forbid, args, module) if self.forbid else None
        got, error = outcome(function, args, watch)
        if number == 0 and is_stub(error, module):
            return False

        def refuse(problem: str, *facts: str, missing: str = "") -> None:
            """Raise WrongAnswer. With `missing`, first say if all numbers agree."""
            __tracebackhide__ = True
            told = f"Called with: {self._described(number)}"
            problem += "" if problem.endswith(("?", "!")) else "."
            if missing and self._numbers_agree(function):
                facts = (told, *facts)
                problem, told = f"The idea is right. Still missing: {missing}.", f"Here, {problem}"
            raise WrongAnswer(f"{self.__name__}: {problem}", told, *facts) from error

        wanted = " or ".join(e.__name__ for e in case.raises)
        due = f", where {wanted} was expected" if wanted else ""
        if error is not None and not isinstance(error, case.raises):
            lines = own_lines(traceback.walk_tb(error.__traceback__), module)
            missing = "the refusal of a bad call" if case.raises else ""
            problem = f"your function raised {summary(error)}{due}"
            refuse(problem, *lines[-4:], missing=missing)
        if case.raises:
            if error is None:
                refuse(f"nothing was raised{due}", missing="the refusal of a bad call")
            if case.mentions not in str(error):
                problem = f"the message does not name {case.mentions!r}: {summary(error)}"
                refuse(problem, missing="a name in the error's message")
            self._check_arguments(args, function, number, (), refuse)
            return True
        own = self._arguments(number)
        with _seeded(_CALLS):
            expected = self.reference(*own)
        problem = self._difference(got, expected)
        if self.view and problem is None:
            seen, unusable = outcome(self.view, [got])
            if unusable:
                lines = own_lines(traceback.walk_tb(unusable.__traceback__), module)[-2:]
                facts = *lines, *self._likely(function, number)
                refuse(f"the returned value cannot be used: {summary(unusable)}", *facts)
            with _seeded(_CALLS):
                problem = self._view_difference(seen, self.view(expected))
        if problem:
            missing = "the dtype" if " dtype " in problem else "the type"
            refuse(problem, *self._likely(function, number), missing=missing)
        if watch and watch.formed:
            problem = f"a tensor of shape {watch.formed} is formed on the way"
            missing = "a way without so large a tensor"
            refuse(problem, watch.sentence, *watch.lines, missing=missing)
        for name, arg, ours in zip(self.names, args, own, strict=False):
            if name in self.changes and expected is ours and got is not arg:
                problem = f"the result is not the argument {name} itself: change {name} in place"
                refuse(problem, missing="the change in place")
        # Before the gradients: autograd meets a change in place with a less telling error.
        self._check_arguments(args, function, number, self.changes, refuse)
        try:
            runs = _Runs(self, function), _Runs(self, self.reference)
            problem = self._gradient_difference(*runs, number)
        except Exception as failed:
            lines = own_lines(traceback.walk_tb(failed.__traceback__), module)
            refuse(f"it fails when gradients are computed: {summary(failed)}", *lines[-4:])
        if problem:
            refuse(problem, *self._likely(function, number, gradients=True))
        return True

    def _difference(self, got: Any, expected: Any, form: str = "") -> str | None:
        values, form = not self.view, form or self.form
        return difference(got, expected, self.returns, self.tolerance, values, form)

    def _view_difference(self, seen: Any, expected: Any, form: str = "") -> str | None:
        return difference(seen, expected, "", self.tolerance, form=form or self.form)

    def _numbers_agree(self, function: Callable) -> bool:
        """Return whether the numbers are right in all cases with a result, whatever their form."""
        right, yours = _Runs(self, self.reference), _Runs(self, function)

        def agree(number: int) -> bool:
            (got, error), (expected, _) = yours.result(number), right.result(number)
            if error or self._difference(got, expected, "any"):
                return False
            if self.view:
                (seen, error), (expected, _) = yours.view(number), right.view(number)
                if error or self._view_difference(seen, expected, "any"):
                    return False
            try:
                return not self._gradient_difference(yours, right, number)
            except Exception:  # its gradients cannot be computed
                return False

        return all(agree(i) for i, case in enumerate(self.cases) if not case.raises)

    def _check_arguments(self, args, function, number, changes, refuse) -> None:
        __tracebackhide__ = True
        before = self._arguments(number, function)
        although = " although the call was refused" if self.cases[number].raises else ""
        for name, arg, fresh in zip(self.names, args, before, strict=False):
            if name in changes:
                continue
            now, then = {name: state(arg, name)}, {name: state(fresh, name)}
            if problem := difference(now, then, "", 0.0):
                told = f"the argument {name} was changed{although}: leave it as it was"
                refuse(told, problem, missing="unchanged arguments")

    def _arguments(self, number: int, function: Callable | None = None) -> list[Any]:
        case = self.cases[number]
        with _seeded(number + _variant):
            args = _unshared(case.make())
            return list(case.earlier(function or self.reference, *args) if case.earlier else args)

    def _described(self, number: int) -> str:
        note = self.cases[number].note
        args = map(shown, self.names, self._arguments(number))
        return ", ".join(args) + (f" ({note})" if note else "")

    def _likely(self, function: Callable, number: int, gradients: bool = False) -> list[str]:
        """Name the causes whose wrong function does what the learner's does, here and before.

        In the cases before it was right: what would have failed there is not the cause. Of True
        and False one is right by chance half of the time: there all cases must agree."""
        results = [i for i, case in enumerate(self.cases) if not case.raises]
        yours = _Runs(self, function)
        if _variant not in self._known:
            causes = {sentence: _Runs(self, wrong) for sentence, wrong in self.causes.items()}
            self._known[_variant] = _Runs(self, self.reference), causes
        right, causes = self._known[_variant]

        def same(sentence: str, i: int) -> bool:
            theirs = causes[sentence]
            if not gradients:
                return self._same_result(yours, theirs, right, i)
            with suppress(Exception):  # a wrong function need not work in every case
                agree = self._same_result(yours, theirs, right, i)
                return agree and not self._gradient_difference(yours, theirs, i)
            return False

        told, _ = right.result(number)
        before = [i for i in results if i <= number or isinstance(told, bool)]
        named = [sentence for sentence in causes if all(same(sentence, i) for i in before)]
        if len(named) > 1:  # these cases do not tell them apart, but perhaps a later one does
            counts = {s: sum(same(s, i) for i in results) for s in named}
            named = [s for s, count in counts.items() if count == max(counts.values())]
        if not named and not gradients:
            got, _ = yours.result(number)
            for name, arg in zip(self.names, self._arguments(number), strict=False):
                if isinstance(arg, torch.Tensor) and not difference(got, arg):
                    return [f"Your result equals the argument {name}."]
        return [f"{self.lead}: {', or '.join(named)}."] if named else []

    def _same_result(self, yours: "_Runs", theirs: "_Runs", right: "_Runs", number: int) -> bool:
        (got, error), (wrong, wrong_error) = yours.result(number), theirs.result(number)
        if error or wrong_error:
            return False
        if self.view and not difference(got, wrong, values=False, form=self.form):
            # A result so wrong that it has no view is known by its parts' types and shapes.
            (got, error), (wrong, wrong_error) = yours.view(number), theirs.view(number)
            if error and wrong_error:
                return (type(error), str(error)) == (type(wrong_error), str(wrong_error))
            if self.staged and not (error or wrong_error):
                return self._same_stages(got, wrong, right.view(number)[0])
        return not difference(got, wrong, tolerance=self.tolerance, form=self.form)

    def _same_stages(self, got: dict, wrong: dict, right: dict) -> bool:
        for part, value in right.items():
            if difference(got[part], wrong[part], tolerance=self.tolerance, form=self.form):
                return False
            if difference(got[part], value, tolerance=self.tolerance, form=self.form):
                return True
        return True

    def _gradient_difference(self, yours: "_Runs", against: "_Runs", number: int) -> str | None:
        if not self.gradients:
            return None
        expected, got = against.gradients(number), yours.gradients(number)
        for name in self.gradients:
            for ours, theirs in zip(expected[name], got[name], strict=True):
                if theirs is None and ours is not None:
                    cut = "detach(), .data, .item(), no_grad() and torch.tensor() cut it off"
                    return f"no gradient reaches {name} ({cut})"
                what = f"the gradient of {name}"
                if problem := difference(theirs, ours, what, 10 * self.tolerance):
                    return problem
        return None

    def _gradients(self, function, number) -> dict[str, list[torch.Tensor | None]]:
        """Return the gradients of a fixed weighted sum of the result's entries."""
        named = dict(zip(self.names, self._arguments(number), strict=False))
        leaves = [(n, t) for n in self.gradients for t in tensors(named[n])]
        wanted = [t.requires_grad_() for _, t in leaves]
        with torch.enable_grad(), _seeded(_CALLS):
            result = function(*named.values())
            result = self.view(result) if self.view else result
            grads = gradients_of(result, wanted)
        pairs = list(zip(leaves, grads, strict=True))
        return {name: [g for (n, _), g in pairs if n == name] for name in self.gradients}


class _Runs:
    """Cache the results of a function in the cases of a check: a case is run once, when it is
    needed. A wrong answer is compared with some twenty causes."""

    def __init__(self, check: Check, function: Callable) -> None:
        self.result = cache(lambda n: outcome(function, check._arguments(n, function)))
        self.view = cache(lambda n: outcome(check.view, [self.result(n)[0]]))
        self.gradients = cache(lambda n: check._gradients(function, n))


class Refused(Exception):
    """Report a fault found by a trial: a headline, and facts."""


class Tried(Check):
    """Check an answer by trials: each trial gets it, and returns a sentence about what is right or
    raises `Refused`. The function below has the exercise's name and parameters.

    trials: {trial: who raised it if it ends in another error}.
    hints: {part of that error's message: its meaning here}."""

    def __init__(
        self,
        reference: Callable,
        cases: Sequence[Case | tuple],
        trials: Mapping[Callable[[Any], str], str],
        hints: Mapping[str, str],
    ) -> None:
        super().__init__(reference, cases)
        self.trials, self.hints = trials, hints
        self.facts: list[str] = []

    def credit(self, function: Any) -> float:
        """Return half of the share of trials that an answer passes before it fails."""
        self.facts = []
        with suppress(WrongAnswer):
            self._check_case(function, 0)
        return len(self.facts) / len(self.trials) / 2

    def _verified(self) -> str:
        return f"Verified: {'; '.join(self.facts)}."

    def _check_case(self, function: Callable, number: int) -> bool:
        __tracebackhide__ = True
        return self._passes(function, getattr(function, "__module__", None) or "")

    def _passes(self, answer: Any, module: str) -> bool:
        """Run the trials as `_check_case` does, for an answer from the learner's `module`."""
        __tracebackhide__ = True
        self.facts = []
        for trial, who in self.trials.items():
            fact, error = outcome(trial, [answer])
            if not self.facts and is_stub(error, module):
                return False
            if isinstance(error, Refused):
                headline, *facts = error.args
                mark = "" if headline.endswith("?") else "."
                raise WrongAnswer(f"{self.__name__}: {headline}{mark}", *facts)
            if error is not None:
                told = [hint for text, hint in self.hints.items() if text in str(error)][:1]
                self._blame(f"{who} raised {summary(error)}", told, error, module)
            self.facts.append(fact)
        return True

    def _blame(self, problem: str, told: Sequence[str], error: Exception, module: str) -> None:
        __tracebackhide__ = True
        lines = own_lines(traceback.walk_tb(error.__traceback__), module)[-2:]
        notes = getattr(error, "__notes__", [])
        raise WrongAnswer(f"{self.__name__}: {problem}.", *notes, *told, *lines) from error


def gradients_of(result: Any, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a fixed weighted sum of the result's entries, None where there is
    none."""
    flat = torch.cat([bare(t).reshape(-1).double() for t in tensors(result)])
    loss = flat @ torch.linspace(-1, 1.5, flat.numel(), dtype=torch.float64)
    if not loss.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def check_for(**settings: Any) -> Callable[[Callable], Check]:
    """Return a decorator that turns a reference function into a `Check` with these settings."""
    return lambda reference: Check(reference, **settings)


class _Watch(TorchDispatchMode):
    """Record the first new tensor of a forbidden shape, and the learner's line that computed it."""

    def __init__(self, forbid: Sequence[Forbid], args: Sequence[Any], module: str) -> None:
        super().__init__()
        self.sentences = {_bare(shape): f.sentence for f in forbid for shape in f.shapes(*args)}
        self.given = {t.untyped_storage().data_ptr() for t in tensors(args)}
        self.module, self.formed, self.sentence, self.lines = module, None, "", []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tensors(result):
            if t.layout != torch.strided:
                continue
            # A view of an argument, such as a transposed weight, is not formed: it costs nothing.
            new = t.untyped_storage().data_ptr() not in self.given
            if new and not self.formed and _bare(t.shape) in self.sentences:
                self.formed, self.sentence = tuple(t.shape), self.sentences[_bare(t.shape)]
                self.lines = own_lines(traceback.walk_stack(None), self.module)[:1]
        return result


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


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))


def _strict() -> bool:
    # nbgrader would give an untouched stub full marks if it raised nothing.
    return os.environ.get("PEFT_LESSONS_STRICT") == "1" or "NBGRADER_EXECUTION" in os.environ


@contextmanager
def _seeded(seed: int):
    """Use a seed inside the block; the notebook's random state, and the device on which it makes
    tensors, are as before afterwards."""
    modes = torch._C._len_torch_function_stack()
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed every GPU's generator too, for good, and where
            # there is none it writes down the whole call stack, which takes longer than most
            # answers.
            torch.random.default_generator.manual_seed(seed)
            yield
    finally:
        while torch._C._len_torch_function_stack() > modes:
            torch._C._pop_torch_function_stack()


def outcome(function, args, watch=None) -> tuple[Any, Exception | None]:
    """Return (result, None) or (None, exception) of a call, always with the same random numbers."""
    __tracebackhide__ = True
    with _seeded(_CALLS), watch or nullcontext():
        try:
            return function(*args), None
        except Exception as error:
            return None, error


def is_stub(error: Exception | None, module: str) -> bool:
    """Return whether an error is the learner's own NotImplementedError: torch raises it too."""
    if not isinstance(error, NotImplementedError):
        return False
    last: TracebackType = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    frame = last.tb_frame
    raised = frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and frame.f_globals.get("__name__") == module


def own_lines(frames: Iterable[tuple[FrameType, int]], module: str) -> list[str]:
    """Return the learner's lines among some frames: those from the module of their function."""
    own = [(f, n) for f, n in frames if f.f_globals.get("__name__") == module]
    codes = [(f.f_code, n, linecache.getline(f.f_code.co_filename, n).strip()) for f, n in own]
    return [f"Line {n} in {code.co_name}: {text}" for code, n, text in codes]


def _parameters(signature: inspect.Signature) -> inspect.Signature:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(bare)
