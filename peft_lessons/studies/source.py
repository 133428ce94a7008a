"""Show the source of a class or a function of the package."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable

from IPython.display import display


def show_source(thing: type | Callable) -> None:
    """Show the source of a class, a function or a method: highlighted in JupyterLab and on the
    site, as plain text elsewhere.

    Raises TypeError for anything else, and for what has no source in Python, such as `len`."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        raise TypeError(f"show_source takes a class or a function, got {thing!r}")
    try:
        source = textwrap.dedent(inspect.getsource(thing)).rstrip()
    except (OSError, TypeError):
        raise TypeError(f"show_source: {thing.__name__} has no source in Python") from None
    longest = max((len(ticks) for ticks in re.findall("`+", source)), default=0)
    fence = "`" * max(3, longest + 1)
    forms = {"text/markdown": f"{fence}python\n{source}\n{fence}", "text/plain": source}
    display(forms, raw=True)
