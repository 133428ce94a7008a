"""Show a text whose words stand on colours, each for a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextPath

from .figures import STYLE, Shown, figure, still

SIZE, LINE, GAP = 10, 21, 5  # the size of a word, of a line and of a space, in points


def words(
    tokens: Sequence[Sequence[str]],
    values: Sequence[Sequence[float]] | Mapping[str, Sequence[Sequence[float]]],
    label: str,
    caption: str = "",
    limit: float | None = None,
) -> Shown:
    """Return a text, a line for each sentence, with every word on the color of its number: red
    below zero, blue above; without negative numbers the scale begins at zero. A token that begins
    with ## is joined to the one before it.

    Args:
        tokens: the words of each sentence.
        values: their numbers, in the same order; or {title: numbers} for panels side by side.
        label: what the numbers are, with their unit; it stands at the scale.
        limit: the number at which the colors end, the largest one if None.

    The alternative text reads every word with its number. Raises ValueError where numbers and
    words do not match, and for a number that is not finite."""
    panels = values if isinstance(values, Mapping) else {"": values}
    panels = {t: [[float(v) for v in row] for row in rows] for t, rows in panels.items()}
    for title, rows in panels.items():
        if [*map(len, rows)] != [*map(len, tokens)]:
            raise ValueError(f"words: {title or 'values'} needs a number for each word")
    numbers = [v for rows in panels.values() for row in rows for v in row]
    if not numbers or any(v - v != 0 for v in numbers):
        raise ValueError("words: the numbers must be finite, and at least one")
    limit = limit or max(map(abs, numbers)) or 1.0
    room = TextPath((0, 0), label, size=10).get_extents().width / len(panels) - 20
    width = max(room, *(_places(row)[-1][1] + GAP for row in tokens))
    size = ((width + 30) * len(panels) / 72 + 0.6, (LINE * len(tokens) + 62) / 72)
    fig, axes = figure(1, len(panels), size=size, squeeze=False)
    with mpl.rc_context(STYLE):
        for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
            _draw(ax, tokens, rows, limit, width)
            ax.set_title(title)
        low = -limit if min(numbers) < 0 else 0.0
        shades = mpl.colormaps["RdBu"].resampled(512)(range(0 if low else 256, 512))
        look = mpl.colors.Normalize(low, limit), mpl.colors.ListedColormap(shades)
        scale = mpl.cm.ScalarMappable(*look)
        look = {"orientation": "horizontal", "fraction": 0.06, "aspect": 45, "pad": 0.02}
        fig.colorbar(scale, ax=list(axes[0]), label=label, **look)
    parts = []
    for title, rows in panels.items():
        read = "; ".join(
            " ".join(f"{word} {value:+.1f}" for word, value in zip(line, row, strict=True))
            for line, row in zip(tokens, rows, strict=True)
        )
        parts.append(f"{title + ': ' if title else ''}{read}")
    return still(fig, f"Words coloured by {label}. {'. '.join(parts)}.", caption)


def _places(line: Sequence[str]) -> list[tuple[float, float, str]]:
    """Return (left, right, text) of each word of a line, in points."""
    places, x = [], 0.0
    for word in line:
        text = word.removeprefix("##")
        x += GAP if places and text == word else 0
        right = x + TextPath((0, 0), text, size=SIZE).get_extents().width + 6
        places.append((x, right, text))
        x = right
    return places


def _draw(ax, tokens, rows, limit: float, width: float) -> None:
    colors = mpl.colormaps["RdBu"]
    for n, (line, row) in enumerate(zip(tokens, rows, strict=True)):
        y = -LINE * n
        for (left, right, text), value in zip(_places(line), row, strict=True):
            color = colors(0.5 + 0.5 * max(-1.0, min(1.0, value / limit)))
            dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 0.5
            box = FancyBboxPatch((left, y - 7), right - left, 15, "round,pad=0,rounding_size=3")
            box.set(facecolor=color, linewidth=0)
            ax.add_patch(box)
            look = {"ha": "center", "va": "center", "size": SIZE - 0.5}
            ax.text((left + right) / 2, y, text, color="white" if dark else "black", **look)
    ax.set(xlim=(-4, width), ylim=(-LINE * (len(tokens) - 1) - 12, 14))
    ax.set_axis_off()
