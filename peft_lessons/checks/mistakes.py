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
import linecache
import math
from collections.abc import Callable, Mapping
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


class Mistakes(dict):
    """Hold {sentence: wrong function} and the `right` function that they are edits of."""

    def __init__(self, right: Callable, wrong: Mapping[str, Callable]) -> None:
        super().__init__(wrong)
        self.right = right


def mistakes(right: str, wrong: str, **names: Any) -> Mistakes:
    """Make {sentence: wrong function} from the source of the right one and the text of the edits.

    The source may use `names`, math, torch, nn and F. Raise ValueError if the old text of an edit
    does not occur exactly once, so that every edit changes exactly one place, and for a sentence
    with a full stop, which the check adds."""
    source = dedent(right).strip() + "\n"
    found: dict[str, Callable] = {}
    for sentence, edits in read(wrong):
        if sentence in found:
            raise ValueError(f"{sentence!r} occurs twice")
        if sentence.endswith("."):
            raise ValueError(f"{sentence!r}: leave out the full stop, which the check adds")
        if edits and edits[0].startswith("= "):
            name = edits[0].removeprefix("= ")
            if len(edits) > 1 or not callable(names.get(name)):
                raise ValueError(f"{sentence!r}: {edits} must be one name of a function you pass")
            found[sentence] = names[name]
        else:
            if not edits:
                raise ValueError(f"{sentence!r} has no edit: write old → new below it")
            try:
                wrong_source = edited(source, edits)
            except ValueError as error:
                raise ValueError(f"{sentence!r}: {error}") from None
            found[sentence] = compiled(wrong_source, sentence, names)
    return Mistakes(compiled(source, "the right answer", names), found)


def scaling_mistakes(text: str) -> str:
    """Return the edits that make `text`, an expression like "alpha / r", a wrong scaling."""
    alpha, r = text.split(" / ")
    return _SCALINGS.format(s=text, alpha=alpha, r=r)


def read(text: str) -> list[tuple[str, list[str]]]:
    """Return (sentence, its edits) for each mistake in a text."""
    found: list[tuple[list[str], list[str]]] = []
    for line in text.replace("→\n", "→ ").splitlines():
        if not (line := " ".join(line.split())):
            continue
        if "→" in line or line.startswith("= "):
            if not found:
                raise ValueError(f"{line!r} has no sentence above it")
            found[-1][1].append(line)
        elif not found or found[-1][1]:
            found.append(([line], []))
        else:
            found[-1][0].append(line)
    return [(" ".join(said), edits) for said, edits in found]


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


def compiled(source: str, title: str, names: Mapping[str, Any]) -> Callable:
    """Return the last function that a source defines; tracebacks show its lines."""
    name = ast.parse(source).body[-1].name
    file = f"<{name}: {title}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space = KNOWN | dict(names)
    exec(compile(source, file, "exec"), space)
    return space[name]
