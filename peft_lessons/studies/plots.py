"""Draw the figures that several lessons use; with all that a lesson draws with (see `figures` and
`drawings`)."""

# ruff: noqa: F401

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from .drawings import arrow, block_map, box, canvas, lora_picture
from .figures import COLORS, GREY, STYLE, Shown, figure, show, still
from .study import Spread


@mpl.rc_context(STYLE)
def curves(
    ax,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw lines {label: (x, y)} on labelled axes, with a legend."""
    for label, (x, y) in lines.items():
        ax.plot(x, y, label=label)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(lines) > 1:
        ax.legend()


def log_axis(ax, which: str, ticks: Iterable[float]) -> None:
    """Make the axis "x" or "y" logarithmic, with plain numbers at those `ticks` in its range."""
    axis, ticks = getattr(ax, f"{which}axis"), list(ticks)
    ax.set(**{f"{which}scale": "log"})
    axis.set_major_locator(FixedLocator(ticks))  # set_ticks would widen the range to hold all
    axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())


@mpl.rc_context(STYLE)
def spreads(ax, points: Mapping[float, Spread], label: str | None = None) -> None:
    """Draw a line through the means of {x: spread}, with whiskers from the worst to the best seed.

    The x axis is logarithmic, as for a sweep, with ticks at the points."""
    mean = [s.mean for s in points.values()]
    below = [s.mean - s.low for s in points.values()]
    above = [s.high - s.mean for s in points.values()]
    ax.errorbar(list(points), mean, (below, above), marker="o", capsize=3, label=label)
    log_axis(ax, "x", points)
    if label:
        ax.legend()


@mpl.rc_context(STYLE)
def stacked_bars(ax, rows: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> None:
    """Draw one horizontal bar for each row, {row: {part: length}}, with one colour per part."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    left = dict.fromkeys(rows, 0.0)
    for part in parts:
        lengths = [row.get(part, 0.0) for row in rows.values()]
        ax.barh(list(rows), lengths, left=list(left.values()), label=part, height=0.62)
        left = {k: v + n for (k, v), n in zip(left.items(), lengths, strict=True)}
    for y, total in enumerate(left.values()):
        ax.text(total, y, f" {total:.3g}", va="center")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set(title=title, xlabel=xlabel)
    ax.legend(ncols=len(parts), loc="lower right")


def name_points(ax, points: Mapping[str, tuple[float, float]], size: float = 7) -> None:
    """Write the names of points {name: (x, y)} next to them.

    A name moves up or down if it would cover another name, a point or a line, and a thin line then
    connects it to a distant point. Call this last: it uses the scales of the axes and adds a margin
    to them."""
    ax.margins(x=0.1, y=0.1)
    ax.figure.draw_without_rendering()
    pixel = ax.figure.dpi / 72  # of a point of type
    places = {name: ax.transData.transform(point) for name, point in points.items()}
    # What no name may cover, (left, right, height in the middle, distance from it): the points, and
    # the lines as a dot every two pixels.
    near, clear = 1.15 * size * pixel, 0.65 * size * pixel
    taken = [(x - 3 * pixel, x + 3 * pixel, y, near) for x, y in places.values()]
    for line in ax.lines:
        corners = line.get_transform().transform(line.get_path().vertices)
        for start, end in pairwise(corners):
            dots = np.linspace(start, end, 2 + int(np.abs(end - start).max() / 2))
            taken += [(x, x, y, clear) for x, y in dots]
    for name, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        left, right = x + 4 * pixel, x + (4 + 0.58 * size * len(name)) * pixel
        for step in sorted(range(-40, 41), key=abs):
            at = y + step * size * pixel / 4
            if all(right < a or left > b or abs(at - c) >= far for a, b, c, far in taken):
                break
        taken.append((left, right, at, near))
        tie = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(
            name,
            points[name],
            (4, (at - y) / pixel),
            textcoords="offset points",
            size=size,
            va="center",
            annotation_clip=False,
            arrowprops=tie if abs(at - y) > size * pixel else None,
        )
