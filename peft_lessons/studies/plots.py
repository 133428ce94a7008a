"""Draw the figures that several lessons use, and show every figure in one way."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from PIL import Image

from .study import Spread

# Okabe and Ito's colours are told apart by people with any colour vision. Figures stand on white
# in both themes of JupyterLab: transparent ones would lose their black text in the dark one.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "font.size": 10,
}


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.2, 3.6), **kw):
    """Return (figure, axes) in the style of the course; keywords as for `Figure.subplots`.

    The figure is outside pyplot's global state, so there is nothing to close."""
    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots(rows, columns, **kw)


class Shown:
    """Show a figure with its caption and alternative text."""

    def __init__(self, png: bytes, alt: str, caption: str):
        self.png, self.alt, self.caption = png, alt, caption

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict[str, str], dict]:
        png = base64.b64encode(self.png).decode()
        # JupyterLab and the site show the HTML: their <img> of an image/png has no alt text. A PDF
        # takes the image/png, for which nbconvert reads the alt text from the metadata.
        data = {
            "text/html": f'<figure style="margin:0"><img src="data:image/png;base64,{png}" '
            f'style="max-width:100%" alt="{html.escape(self.alt, quote=True)}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>",
            "image/png": png,
            "text/plain": f"{self.caption}\n[{self.alt}]",
        }
        return data, {"image/png": {"alt": self.alt}}


# The style must hold while things are drawn: titles, lines and legends read it only then.
@mpl.rc_context(_STYLE)
def show(fig: Figure, alt: str, caption: str = "", dpi: int = 100) -> None:
    """Show a figure below the cell, with alternative text (a sentence that describes it).

    All titles are bold and left-aligned, all legends have no frame.
    Raises ValueError for an alternative text below 20 characters."""
    if len(alt) < 20:
        raise ValueError(f"alt={alt!r} is too short: say in a sentence what the figure shows")
    for ax in fig.axes:
        # A title set by the lesson itself is a claim like all others: to the left, in bold.
        if title := ax.get_title(loc="center"):
            ax.set_title("", loc="center")
            ax.set_title(title, loc="left")
        if legend := ax.get_legend():
            legend.set_frame_on(False)
    if title := fig.get_suptitle():
        fig.suptitle(title, x=0.01, ha="left", weight="bold")
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=dpi)
    # A palette takes a third of the room, which counts in a notebook; a figure has few colours.
    palette = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(small, "PNG", optimize=True)
    display(Shown(small.getvalue(), alt, caption))


@mpl.rc_context(_STYLE)
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


@mpl.rc_context(_STYLE)
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


@mpl.rc_context(_STYLE)
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
    """Write the names of points {name: (x, y)} beside them.

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
