"""Exercises that ask for a diagnosis: of each broken run its fault, from what the run shows."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .compare import few
from .kit import Refused, dict_of


def diagnosis(
    broken: Mapping[str, tuple[str, str]], what: str = "run", others: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the settings of a check whose answer returns {letter: cause}.

    broken: {letter: (its cause, what it shows of it)}; each cause belongs to one of them. what: the
    word for one of them. others: causes that are offered and belong to none. A verdict counts those
    that are right, and says where to look on request."""
    causes = sorted([*others, *(cause for cause, _ in broken.values())])

    def named(function: Callable) -> dict[str, str]:
        # Leaves out what the answer leaves open.
        result = dict_of(function)
        texts = {run: "" if cause is None else str(cause) for run, cause in result.items()}
        given = {str(run).strip().upper(): cause for run, cause in texts.items() if cause.strip()}
        if unknown := sorted(given.keys() - broken.keys()):
            letters = sorted(broken)
            known = f"the {what}s to judge are {letters[0]} to {letters[-1]}"
            raise Refused(f"there is no {what} {few(unknown)}: {known}")
        given = {run: " ".join(cause.lower().split()) for run, cause in given.items()}
        canonical = {cause.lower(): cause for cause in causes}
        for cause in given.values():
            if cause not in canonical:
                all_ = f"They are: {', '.join(causes)}."
                raise Refused(f"{cause!r} is not one of the causes", all_)
        return {run: canonical[cause] for run, cause in given.items()}

    def right_of(given: Mapping[str, str]) -> list[str]:
        return [run for run, (cause, _) in broken.items() if given.get(run) == cause]

    def share(function: Callable) -> float:
        with suppress(Exception):
            return len(right_of(named(function))) / len(broken)
        return 0.0

    def trial(function: Callable) -> str:
        given = named(function)
        right, facts = right_of(given), []
        if open_ := [run for run in broken if run not in given]:
            facts.append(f"Without a cause: {', '.join(open_)}.")
        if twice := [cause for cause, count in Counter(given.values()).items() if count > 1]:
            facts.append(
                f"Given to several {what}s: {', '.join(twice)}. Each cause belongs to one {what}."
            )
        if len(right) < len(broken):
            hints = [
                f"Look at {what} {run}: {why}."
                for run, (_, why) in broken.items()
                if run not in right
            ]
            verb = "is" if len(right) == 1 else "are"
            headline = f"{len(right)} of {len(broken)} {verb} right"
            raise Refused(headline, *facts, on_request=hints)
        return "; ".join(f"{what} {run}: {why}" for run, (_, why) in broken.items())

    return {
        "trials": {trial: "your function"},
        "share": share,
        "verified": lambda facts: f"{facts[0]}.",
    }
