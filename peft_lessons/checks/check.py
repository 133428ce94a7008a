"""What every check has: three outcomes of an answer, and what each of them says."""

import html
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..testing.wording import kind
from .calls import module_of


class WrongAnswer(AssertionError):
    """Report a wrong answer: a headline and a few lines of facts, shown without a traceback.

    on_request: further facts, which a hunt tells only who asks for help."""

    def __init__(self, headline: str, *facts: str, on_request: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([f"✗ {headline}", *facts]))
        self.on_request = on_request

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


class Refused(Exception):
    """Report a fault found by a trial, or by `adapt`, as WrongAnswer does."""

    def __init__(self, headline: str, *facts: str, on_request: Sequence[str] = ()) -> None:
        super().__init__(headline, *facts)
        self.on_request = on_request


class Check:
    """Check an answer: return a verdict if it is right or not attempted, else raise WrongAnswer.
    With `help`, a hunt names what it keeps to itself otherwise.

    causes: {sentence: wrong function}, as `mistakes` makes them.
    adapt: a function of the answer, whose result is checked in its place: it may make a function of
        a class, or raise `Refused`. It gets the causes too.
    quiet: whether warnings are hidden while the answer is checked.
    verified: a function of the facts of a right answer, whose text the learner reads."""

    def __init__(
        self,
        reference: Callable,
        causes: Mapping[str, Callable] | None = None,
        adapt: Callable[[Any], Any] = lambda answer: answer,
        quiet: bool = False,
        verified: Callable[[list[str]], str] | None = None,
    ) -> None:
        self.reference, self.causes = reference, {} if causes is None else causes
        self.passed: Any = None  # the last answer that was right
        self.adapt, self.quiet, self.verified = adapt, quiet, verified or _verified
        self.signature = inspect.signature(reference)
        self.names = list(self.signature.parameters)
        self.__name__, self.__doc__ = reference.__name__, inspect.getdoc(reference)

    @property
    def right(self) -> Callable | None:
        """Return the right answer that the causes are edits of, where they are."""
        return getattr(self.causes, "right", None)

    @property
    def explanations(self) -> list[str]:
        """Return the sentences by which a verdict can explain a wrong answer."""
        return list(self.causes)

    def __call__(self, answer: Any, help: bool = False) -> Verdict:
        __tracebackhide__ = True
        try:
            with warnings.catch_warnings(action="ignore") if self.quiet else nullcontext():
                facts = list(self._facts(self._adapted(answer)))
        except WrongAnswer as wrong:
            if wrong.on_request:
                name, lesson = self.__name__, module_of(self.reference).rpartition(".")[2]
                ask = f"For help: check.{lesson}.{name}({name}, help=True)"
                wrong.args = ("\n  ".join([str(wrong), *(wrong.on_request if help else [ask])]),)
            raise
        if facts:
            self.passed = answer
            details = f"{self.__doc__} {self.verified(facts)}"
            return Verdict("right", f"{self.__name__}: right.", details)
        headline = f"{self.__name__}: not attempted yet."
        todo = "Write the function, run its cell, then run this cell again."
        if _strict():
            raise WrongAnswer(headline, todo)
        return Verdict("not attempted", headline, todo)

    def of_variant(self, number: int) -> "Check":
        """Return this check with cases that draw other random numbers, where it draws any."""
        return self

    def _adapted(self, answer: Any) -> Any:
        __tracebackhide__ = True
        try:
            function = self.adapt(answer)
        except Refused as refused:
            raise self._wrong(*refused.args) from None
        self._check_signature(function)
        return function

    def _wrong(self, headline: str, *facts: str, on_request: Sequence[str] = ()) -> WrongAnswer:
        headline = f"{self.__name__}: {sentence(headline)}"
        return WrongAnswer(headline, *facts, on_request=on_request)

    def _check_signature(self, function: Callable) -> None:
        __tracebackhide__ = True
        if not self.names:
            return
        if not callable(function):
            raise self._wrong(f"pass the function itself, not {kind(function)}")
        try:
            signature = inspect.signature(function)
        except ValueError:  # some functions written in C have none
            return
        names = list(signature.parameters)
        try:
            for count in {*self._counts(), len(self.names)}:
                signature.bind(*self.names[:count])
            fits = names == self.names or sorted(names) != sorted(self.names)
        except TypeError:
            fits = False
        if not fits:
            wanted, yours = (_without_annotations(s) for s in (self.signature, signature))
            facts = f"Expected {self.__name__}{wanted}", f"Yours is {self.__name__}{yours}"
            raise self._wrong("the parameters differ", *facts)

    def _counts(self) -> set[int]:
        """Return the numbers of arguments with which an answer is called."""
        optional = [p.default is not p.empty for p in self.signature.parameters.values()]
        return {len(self.names) - sum(optional)}

    def _facts(self, function: Any) -> Iterator[str]:
        """Yield what is right of an answer, nothing for a stub; raise WrongAnswer at a fault."""
        raise NotImplementedError

    def credit(self, answer: Any) -> float:
        """Return the share of the exercise, below 1, that a wrong answer has earned."""
        raise NotImplementedError


def sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends with another mark."""
    return text if text.endswith(("?", "!")) else f"{text}."


def _verified(facts: Sequence[str]) -> str:
    return f"Verified: {'; '.join(facts)}."


def _strict() -> bool:
    # nbgrader would give an untouched stub full marks if it raised nothing.
    return os.environ.get("PEFT_LESSONS_STRICT") == "1" or "NBGRADER_EXECUTION" in os.environ


def _without_annotations(signature: inspect.Signature) -> inspect.Signature:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(bare)
