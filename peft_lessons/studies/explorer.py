"""Turn a value and see what changes: sliders in JupyterLab, a still on a page without a kernel."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from traceback import format_exception_only
from typing import Any

BOX = {"layout": {"width": "32em"}, "style": {"description_width": "11em"}}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _label(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _forms(result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the forms of what `show` returned, with text/html and text/plain, and metadata."""
    if isinstance(result, str) and not hasattr(result, "_repr_html_"):
        return {"text/html": result, "text/plain": result}, {}
    if hasattr(result, "_repr_mimebundle_"):
        bundle = result._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        if "text/html" in data:
            return {"text/plain": repr(result)} | data, metadata
    elif hasattr(result, "_repr_html_") and (page := result._repr_html_()) is not None:
        return {"text/html": page, "text/plain": repr(result)}, {}
    raise TypeError(
        f"explore: show returned {type(result).__name__}, which has no HTML. Return "
        "plots.still(fig, ...), a table or a string of HTML"
    )


class Explorer:
    """Show sliders, and what belongs to their values; made by `explore`.

    values: where the sliders are. widget: an ipywidgets box, None without ipywidgets."""

    def __init__(
        self, show: Callable, choices: Mapping[str, tuple[Any, ...]], start: Mapping[str, Any]
    ):
        self.show, self.choices, self.values = show, choices, dict(start)
        self._seen: dict[tuple[Any, ...], str] = {}
        self._start = _forms(show(**start))
        self._seen[tuple(start.values())] = self._start[0]["text/html"]
        self.widget = self._sliders()

    def _sliders(self) -> Any:
        try:
            import ipywidgets as w
        except ImportError:
            return None
        inputs = {}
        for name, values in self.choices.items():
            options = {"options": [(_label(v), v) for v in values], "value": self.values[name]}
            if all(map(_is_number, values)):
                kind = w.SelectionSlider
                options |= {"continuous_update": False}
            else:
                kind = w.Dropdown
            inputs[name] = kind(description=name.replace("_", " "), **options, **BOX)
        self._shown = w.HTML(self._html())
        for name, widget in inputs.items():
            widget.observe(lambda change, name=name: self._move(name, change["new"]), "value")
        return w.VBox([*inputs.values(), self._shown])

    def _move(self, name: str, value: Any) -> None:
        self.values[name] = value
        self._shown.value = self._html()

    def _html(self) -> str:
        """Return what belongs to the values, from memory if it was shown before. An error in `show`
        is shown in its place, and not remembered."""
        key = tuple(self.values.values())
        if key not in self._seen:
            try:
                self._seen[key] = _forms(self.show(**self.values))[0]["text/html"]
            except Exception as error:
                problem = html.escape(f"{self.values}: {''.join(format_exception_only(error))}")
                return f'<pre style="color:var(--jp-error-color1,#c00)">{problem}</pre>'
        # JupyterLab styles tables as those of other outputs only below this class.
        return f'<div class="jp-RenderedHTMLCommon">{self._seen[key]}</div>'

    def __repr__(self) -> str:
        return self._repr_mimebundle_()[0]["text/plain"]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, metadata = self._start
        ranges = []
        for name, values in self.choices.items():
            few = values if len(values) < 9 else (values[0], "…", values[-1])
            ranges.append(f"{name.replace('_', ' ')} {', '.join(map(_label, few))}")
        how = "Run this cell in JupyterLab" if self.widget else "Install ipywidgets"
        instruction = f"{how} to move: {'; '.join(ranges)}."
        data = data | {
            "text/html": f"{data['text/html']}<p>{html.escape(instruction)}</p>",
            "text/plain": f"{data['text/plain']}\n{instruction}",
        }
        widget = self.widget._repr_mimebundle_() if self.widget else {}
        return widget | data, metadata


def explore(
    show: Callable[..., Any], start: Mapping[str, Any] | Any = None, **choices: Iterable[Any]
) -> Explorer:
    """Return sliders over the values of each keyword, for the last line of a cell.

        explore(lambda rank: plots.still(...), rank=(1, 2, 4, 8), start={"rank": 4})

    Args:
        show: takes one value for each keyword and returns what to display: a still (`plots.still`),
            a table or a string of HTML. It is called when a slider moves, once for each position.
        start: {keyword: value} where the sliders start, or the value alone if there is one keyword.
            A keyword that it leaves out starts at its first value.
        choices: the values of each keyword: a slider for numbers, a menu for anything else.

    Without ipywidgets or a kernel the start is shown. Raises ValueError for no keyword, a keyword
    without a sequence of values, NaN among them, or a start that is not among them; TypeError if
    `show` returns no HTML."""
    for name, given in choices.items():
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(f"explore: {name}={given!r} must be a sequence, as in {name}=(1, 2)")
    values = {name: tuple(given) for name, given in choices.items()}
    if not values:
        raise ValueError("explore: name at least one choice, such as rank=(1, 2, 4, 8)")
    if empty := [name for name, given in values.items() if not given]:
        raise ValueError(f"explore: {empty[0]} has no values to choose from")
    for name, given in values.items():
        if any(_is_number(value) and value != value for value in given):
            raise ValueError(f"explore: {name} has NaN among its values, which no slider can find")
    if start is None:
        start = {}
    elif not isinstance(start, Mapping):
        if len(values) > 1:
            raise ValueError(f"explore: start={start!r} names no choice of {', '.join(values)}")
        start = {next(iter(values)): start}
    for name, value in start.items():
        if name not in values:
            raise ValueError(f"explore: start names {name!r}, the choices are {', '.join(values)}")
        if value not in values[name]:
            known = ", ".join(map(repr, values[name]))
            raise ValueError(f"explore: start={value!r} of {name} must be one of {known}")
    first = {name: start.get(name, given[0]) for name, given in values.items()}
    return Explorer(show, values, first)
