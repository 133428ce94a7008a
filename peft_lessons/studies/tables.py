"""Show tables of results: aligned text in a terminal, HTML in JupyterLab."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any


class Table:
    """Show rows of named values with a note below; made by `table`."""

    def __init__(self, columns: list[str], cells: list[list[str]], right: list[bool], note: str):
        self.columns, self.cells, self.right, self.note = columns, cells, right, note

    def __repr__(self) -> str:
        rows = [self.columns, *self.cells]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = (
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self.right, strict=True)
            ).rstrip()
            for row in rows
        )
        return "\n".join((*lines, *([self.note] if self.note else [])))

    def _repr_html_(self) -> str:
        def line(tag: str, row: list[str]) -> str:
            sides = ("right" if right else "left" for right in self.right)
            cells = zip(row, sides, strict=True)
            return "".join(
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for cell, side in cells
            )

        body = "".join(f"<tr>{line('td', row)}</tr>" for row in self.cells)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        # JupyterLab shows the first line of a folded output, which must not be the answer.
        return f"<table>\n<tr>{line('th', self.columns)}</tr>{body}</table>{note}"


def _cell(value: Any, template: str | None) -> str:
    if value is None:
        return ""
    if template is not None:
        return template.format(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.3g}"


def table(
    rows: Iterable[Mapping[str, Any]], formats: Mapping[str, str] | None = None, note: str = ""
) -> Table:
    """Return a table of `rows`, dicts with the same keys; the keys are the headings.

    `formats` gives a column a template such as "{:.1f} MiB"; without one whole numbers get
    thousands' commas and others three digits. Numbers are aligned right, None is left empty.
    Raises ValueError for no rows, rows with other keys, or a format without its column."""
    rows, formats = list(rows), dict(formats or {})
    if not rows:
        raise ValueError("table: there are no rows")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"table: a row has the keys {list(row)}, the first has {columns}")
    if unknown := formats.keys() - set(columns):
        raise ValueError(f"table: formats names {min(unknown)!r}, the columns are {columns}")
    cells = [[_cell(row[c], formats.get(c)) for c in columns] for row in rows]
    right = [all(isinstance(row[c], Real | None) for row in rows) for c in columns]
    return Table(columns, cells, right, note)
