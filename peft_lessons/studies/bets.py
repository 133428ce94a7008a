"""Keep a reader's bets: each beside its outcome, and all of them in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figures import COLORS, GREY, figure, show
from .tables import Table, table


class Bets:
    """Keep the bets of one lesson, in this kernel alone.

        bets = Bets()
        guess = None                        # the accuracy of rank 1, in %
        bets.show("accuracy of rank 1", guess, outcome, unit="%")
        bets                                # the table of all bets

    A bet without a guess (None) prints the outcome alone."""

    def __init__(self) -> None:
        self._bets: dict[str, dict[str, Any]] = {}

    def show(
        self,
        question: str,
        guess: Any,
        outcome: Any,
        unit: str = "",
        choices: Sequence[str] = (),
        digits: int = 1,
    ) -> None:
        """Draw a guess and the outcome on one line, and keep both for the table.

        Args:
            question: what the bet is about, in a few words; a bet shown again replaces the old one.
            guess: a number, or one of the choices; None if the reader has not bet.
            outcome: the number, or the choice, that came out.
            unit: of the numbers, such as "%".
            choices: what there was to choose from, if the bet is not about a number.
            digits: after the point, of the numbers shown.

        Raises ValueError for a guess or an outcome that is no finite number, or no choice."""
        if choices:
            guess = None if guess is None else _choice(question, guess, choices)
            outcome = _choice(question, outcome, choices)
            at = {choice: n for n, choice in enumerate(choices)}.get
            name = str
            off = "" if guess is None else "right" if guess == outcome else "wrong"
        else:
            guess = None if guess is None else _number(question, guess)
            outcome, at = _number(question, outcome), float
            tail = f" {unit}" if unit else ""

            def name(value: float) -> str:
                return f"{value:,.{digits}f}{tail}"

            off = "" if guess is None else f"{abs(guess - outcome):,.{digits}f}"
            off += " points" if off and unit == "%" else tail if off else ""
        row = {"bet": question, "your guess": "" if guess is None else name(guess)}
        self._bets[question] = row | {"outcome": name(outcome), "off by": off}
        if guess is None:
            print(f"The bet: {question}\n  came out as {name(outcome)}. You entered no guess.")
        else:
            _draw(question, guess, outcome, at, name, choices)

    def _table(self) -> Table | None:
        if not self._bets:
            return None
        guessed = sum(bool(row["your guess"]) for row in self._bets.values())
        note = "" if guessed else "No guess was entered. The cells before each experiment take one."
        return table(self._bets.values(), note=note)

    def __repr__(self) -> str:
        return str(self._table() or "no bet has been shown yet")

    def _repr_html_(self) -> str | None:
        shown = self._table()
        return shown and shown._repr_html_()


def _number(question: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"bet {question!r}: {value!r} must be a number, such as 75, or None")
    return number


def _choice(question: str, value: Any, choices: Sequence[str]) -> str:
    known = {choice.casefold(): choice for choice in choices}
    if (found := known.get(str(value).strip().casefold())) is None:
        raise ValueError(f"bet {question!r}: {value!r} must be one of {', '.join(choices)}")
    return found


def _draw(question, guess, outcome, at, name, choices) -> None:
    """Draw the line of one bet: the outcome a dot, the guess a hollow diamond."""
    fig, ax = figure(size=(7.2, 1.15))
    dot, diamond = at(outcome), at(guess)
    low, high = (0, len(choices) - 1) if choices else sorted((dot, diamond))
    room = 0.35 * (high - low) or max(0.5 * abs(high), 0.5)
    ax.set(ylim=(-1, 1), yticks=[], xlim=(low - room, high + room))
    ax.axhline(0, color=GREY, linewidth=1, zorder=1)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(labelsize=8)
    if choices:
        ax.set_xticks(range(len(choices)), choices, size=10)
    text = {"ha": "center", "textcoords": "offset points", "size": 9, "weight": "bold"}
    ax.plot(dot, 0, "o", color=COLORS[0], markersize=9, zorder=3)
    ax.annotate(f"outcome {name(outcome)}", (dot, 0), (0, 9), color=COLORS[0], **text)
    ax.plot([diamond, dot], [0, 0], color=COLORS[1], linewidth=2.5, zorder=2)
    look = {"markerfacecolor": "white", "markersize": 11, "markeredgewidth": 2}
    ax.plot(diamond, 0, "D", color=COLORS[1], zorder=2.5, **look)
    ax.annotate(f"your guess {name(guess)}", (diamond, 0), (0, -18), color=COLORS[1], **text)
    said = f"outcome {name(outcome)}, your guess {name(guess)}"
    ax.set_title(f"Bet: {question}")
    show(fig, f"A line with the bet on {question}: {said}.")
