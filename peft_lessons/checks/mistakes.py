'''Mistakes, written once: a right answer, and for each mistake the edit that makes it.

    causes=mistakes(
        """
        def scaled(x, A, B, alpha):
            return alpha / len(A) * (x @ A.T @ B.T)
        """,
        """
        the scaling alpha / r is left out
            alpha / len(A) * → ∅
        A and B are swapped: x meets A first, which has
        as many columns as x
            x @ A.T → x @ B
            @ B.T → @ A
        """,
    )

Each mistake is a sentence without a full stop, on one line or several, followed by its edits,
`old → new`. The edits of a mistake are applied one after another, and each old text must occur
exactly once by then. ∅ stands for empty text. The new text may follow on the next line.
If no edit can express a mistake, pass a function by keyword and write `= name` instead of edits.

A check reports these sentences as likely causes, the tests run every wrong function through the
check, and the instructors' list of wrong answers prints the sentences. The right answer is not the
reference: a check has an independent reference, and the tests compare the right answer with it.
'''

import ast
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import chain
from textwrap import dedent
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KNOWN = {"math": math, "torch": torch, "nn": nn, "F": F}

# The ways in which LoRA's scaling goes wrong, the same in every lesson that has it.
_SCALINGS = """
the scaling alpha / r is left out
    {s} → 1
alpha is not divided by r
    {s} → {alpha}
the scaling is upside down: it is alpha / r
    {s} → ({r} / {alpha})
the scaling alpha / r is applied twice
    {s} → ({s}) ** 2
// drops the fraction of alpha / r
    {s} → ({alpha} // {r})
alpha is divided by √r, as in rsLoRA
    {s} → {s} ** 0.5
"""


class Mistakes(Mapping):
    """Hold {sentence: wrong function} and the `right` function that they are edits of.

    sources: {sentence: source, or a function that no edit can express}. They are compiled when they
    are first asked for: most people who import the course never run into a mistake."""

    def __init__(self, right: str, sources: Mapping[str, str | Callable], names: Mapping) -> None:
        self._right, self._sources, self._names = right, sources, names
        self._compiled = cache(self._compile)

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __getitem__(self, sentence: str) -> Callable:
        source = self._sources[sentence]
        return self._compiled(source, sentence) if isinstance(source, str) else source

    def source(self, sentence: str) -> str:
        """Return the source of a mistake."""
        source = self._sources[sentence]
        return source if isinstance(source, str) else inspect.getsource(source)

    @property
    def right(self) -> Callable:
        return self._compiled(self._right, "the right answer")

    def _compile(self, source: str, title: str) -> Callable:
        """Return the last function or class that a source defines."""
        name = ast.parse(source).body[-1].name
        space = KNOWN | dict(self._names)
        exec(compile(source, f"<{name}: {title}>", "exec"), space)
        return space[name]


def mistakes(right: str, *wrong: str, **names: Any) -> Mistakes:
    """Make {sentence: wrong function} from the source of the right one and texts of the edits.

    The source may use `names`, math, torch, nn and F. Raise ValueError if the old text of an edit
    does not occur exactly once, so that every edit changes exactly one place, and for a sentence
    with a full stop, which the check adds."""
    source = dedent(right).strip() + "\n"
    sources: dict[str, str | Callable] = {}
    for sentence, edits in chain.from_iterable(map(read, wrong)):
        if sentence in sources:
            raise ValueError(f"{sentence!r} occurs twice")
        if sentence.endswith("."):
            raise ValueError(f"{sentence!r}: leave out the full stop, which the check adds")
        if not edits:
            raise ValueError(f"{sentence!r} has no edit: write old → new below it, indented")
        if edits[0].startswith("= "):
            name = edits[0].removeprefix("= ")
            if len(edits) > 1 or not callable(names.get(name)):
                raise ValueError(f"{sentence!r}: {edits} must be one name of a function you pass")
            sources[sentence] = names[name]
        else:
            try:
                sources[sentence] = edited(source, edits)
            except ValueError as error:
                raise ValueError(f"{sentence!r}: {error}") from None
    return Mistakes(source, sources, names)


def scaling_mistakes(text: str) -> str:
    """Return the edits that make `text`, an expression like "alpha / r", a wrong scaling."""
    alpha, r = text.split(" / ")
    return _SCALINGS.format(s=text, alpha=alpha, r=r)


def read(text: str) -> list[tuple[str, list[str]]]:
    """Return (sentence, its edits) for each mistake in a text. Edits are indented deeper than their
    sentence."""
    entries: list[tuple[list[str], list[str]]] = []
    depth = 0
    for indented in text.replace("→\n", "→ ").splitlines():
        line = " ".join(indented.split())
        if not line:
            continue
        indent = len(indented) - len(indented.lstrip())
        is_edit = "→" in line or line.startswith("= ")
        if entries and indent > depth:
            if not is_edit:
                raise ValueError(
                    f"{line!r} has no →: an edit stands on one line, so edit each line by itself"
                )
            entries[-1][1].append(line)
        elif is_edit:
            raise ValueError(
                f"{line!r} has no sentence above it, or is not indented below it: a sentence has "
                "no → and does not begin with ="
            )
        elif not entries or entries[-1][1]:
            entries.append(([line], []))
            depth = indent
        else:
            entries[-1][0].append(line)
    return [(" ".join(lines), edits) for lines, edits in entries]


def edited(source: str, edits: list[str]) -> str:
    """Return the source after the edits. ValueError if an old text does not occur exactly once."""
    for edit in edits:
        parts = [part.strip() for part in edit.split("→")]
        if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
            raise ValueError(f"{edit!r} must be old → new, with ∅ for nothing")
        old, new = parts
        if (times := source.count(old)) != 1:
            raise ValueError(f"{old!r} is there {times} times, not once, in\n{source}")
        source = source.replace(old, "" if new == "∅" else new)
    return source
