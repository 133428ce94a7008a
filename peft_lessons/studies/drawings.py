"""Draw diagrams: boxes, arrows, and the course's one map of a transformer block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

from ..engine import method_facts
from ..engine.facts import Mark, OnMap
from .figures import COLORS, GREY, SHARP, figure, show

INK = "#333333"  # of text and arrows
_MIDDLE = {"ha": "center", "va": "center", "color": INK}
Spot = tuple[float, float]


def canvas(width: float, height: float, inches: float = 7.2) -> tuple[Figure, Axes]:
    """Return (figure, axes) to draw on: x from 0 to `width`, y from 0 to `height`, equal units.

    The drawing is `inches` wide (100 pixels each) whatever its units. Show it with dpi=200."""
    fig, ax = figure(size=(inches, inches * height / width))
    fig.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return fig, ax


def tint(color: str, lit: bool) -> list[float]:
    """Return a light tint of a colour, lighter if it is not lit."""
    return [1 - (0.22 if lit else 0.1) * (1 - part) for part in to_rgb(color)]


def box(
    ax: Axes,
    x: float,
    y: float,
    w: float,
    h: float,
    text: str = "",
    color: str = GREY,
    lit: bool = False,
    dashed: bool = False,
    size: float = 8.5,
    rotation: float = 0,
) -> None:
    """Draw a box with its lower left corner at (x, y) and text in its middle.

    A lit box has a thick edge and bold text on a light tint of its colour; others are plain."""
    style = f"round,pad=0,rounding_size={0.07 * min(w, h, 60)}"
    face = "none" if dashed and not lit else tint(color, lit)
    edge = {"edgecolor": color, "linewidth": 2 if lit else 1, "linestyle": "--" if dashed else "-"}
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=face, **edge))
    look = {"size": size, "weight": "bold" if lit else "normal", "rotation": rotation}
    ax.text(x + w / 2, y + h / 2, text, linespacing=1.1, **_MIDDLE, **look)


def arrow(ax: Axes, start: Spot, end: Spot, color: str = INK, text: str = "") -> None:
    """Draw an arrow between two points, with text above its middle."""
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, **look))
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        ax.annotate(text, middle, (0, 4), textcoords="offset points", ha="center", color=color)


# The places of the map in the order of reading; the methods say what trains there (`OnMap`).
# Virtual tokens are pink, parts of the base light blue.
PLACES = ("prompt", "prefix", "LoRA", "adapter", "IA3", "BitFit", "norms", "head")
HEAD = OnMap("head", "head", 4, "the head on top")
_BASE = ("BitFit", "norms", "head")  # parts of the base; what other methods add is dashed until lit
_GHOST, _FRAME = "#c4c4c4", "#b0b0b0"
LINEAR_MAPS = ("query", "key", "value", "output", "up", "down")


def places() -> dict[str, OnMap]:
    """Return {name of a place: what trains there} in the order of reading."""
    stated = [facts.place for facts in method_facts().values() if facts.place] + [HEAD]
    return dict(sorted(((p.name, p) for p in stated), key=lambda p: PLACES.index(p[0])))


def marks() -> dict[str, Mark]:
    """Return {name: mark} of what children of LoRA do to each linear map; shown only where they
    are named."""
    return {facts.mark.name: facts.mark for facts in method_facts().values() if facts.mark}


class _Map:
    """Draw the parts of a transformer block, those of the `lit` places in their colours; LoRA
    beside the linear maps named in `targets`. `colors` replaces the colours of some places."""

    def __init__(
        self, ax: Axes, lit: Sequence[str], targets: Sequence[str], colors: Mapping[str, str]
    ):
        self.ax, self.lit, self.targets, self.places = ax, lit, targets, places()
        self.colors = {name: COLORS[place.color] for name, place in self.places.items()}
        self.colors |= colors

    def part(self, place: str, *args: Any, text: str = "", **kw: Any) -> None:
        """Draw a box of a place: coloured if lit, else grey in the base and a dashed outline for
        what a method would add."""
        if place in self.lit:
            box(self.ax, *args, text=text, color=self.colors[place], lit=True, **kw)
        elif place in _BASE:
            box(self.ax, *args, text=text, **kw)
        else:
            box(self.ax, *args, color=_GHOST, dashed=True)

    def label(self, place: str, x: float, y: float, **kw: Any) -> None:
        """Write the label of a place if it is lit."""
        if place in self.lit:
            dark = [0.6 * part for part in to_rgb(self.colors[place])]
            look = _MIDDLE | {"size": 9, "weight": "bold", "color": dark}
            self.ax.text(x, y, self.places[place].label, **look | kw)

    def path(self, *points: Spot, color: str = INK) -> None:
        """Draw a line with an arrow at its end."""
        xs, ys = zip(*points[:-1], strict=True)
        self.ax.plot(xs, ys, color=color, linewidth=1, solid_joinstyle="miter")
        arrow(self.ax, points[-2], points[-1], color)

    def linear(self, x: float, y: float, text: str, side: int = -1) -> None:
        """Draw a linear map around height y, its bias, and its LoRA factors below (side -1) or
        above it (side 1), with the marks that are lit."""
        packed = "QLoRA" in self.lit
        name = f"{text}\n4 bit" if packed else text
        box(self.ax, x, y - 17, 58, 34, name, color=INK if packed else GREY, lit=packed)
        self.part("BitFit", x + 58, y - 17, 12, 34, text="b")
        place = "LoRA" if text in self.targets else "LoRA elsewhere"
        parts = [(0, 28, "A"), (30, 28, "B")]
        if "DoRA" in self.lit and place in self.lit:
            parts = [(0, 21, "A"), (23, 21, "B"), (46, 14, "m")]
        for dx, width, factor in parts:
            self.part(place, x + dx, y + 27 * side - 7, width, 14, text=factor, size=7.5)
        self.label(place, x + 29, y + 42 * side)

    def adapter(self, x: float) -> None:
        """Draw a bottleneck, wide at both ends."""
        lit = "adapter" in self.lit
        color = self.colors["adapter"] if lit else _GHOST
        half = [(0, 30), (9, 12), (18, 12), (27, 30)]
        corners = [(x + dx, 160 + dy) for dx, dy in half]
        corners += [(px, 320 - py) for px, py in reversed(corners)]
        look = {"facecolor": "none", "linewidth": 1, "linestyle": "--"}
        if lit:  # above the line that runs through it
            look = {"facecolor": tint(color, lit), "linewidth": 2, "zorder": 3}
        self.ax.add_patch(Polygon(corners, edgecolor=color, **look))
        self.label("adapter", x + 23, 214, size=8)

    def norm(self, x: float, residual: float) -> None:
        """Draw sum and norm with its bias, and the residual connection that it adds."""
        self.part("norms", x, 116, 36, 88, text="add & norm", rotation=90)
        place = "norms" if "norms" in self.lit else "BitFit"
        self.part(place, x, 102, 36, 13, text="b", size=7.5)
        self.label(place, x + 18, 91)
        self.path((residual, 160), (residual, 286), (x + 18, 286), (x + 18, 205), color=GREY)

    def embeddings(self) -> None:
        """Draw the text, before it the virtual tokens of a prompt, and the line that joins them."""
        rows = [182 - 22 * n for n in range(3)]
        rows += [235, 213] if "prompt" in self.lit else []
        for y in rows:
            self.ax.plot((66, 76), (y, y), color=INK, linewidth=1)
        self.ax.plot((76, 76), (min(rows), max(rows)), color=INK, linewidth=1)
        self.label("prompt", 37, 258)
        for n in range(2):
            self.part("prompt", 8, 226 - 22 * n, 58, 18, text="virtual", size=7.5)
        for n, word in enumerate(("a", "fine", "film")):
            box(self.ax, 8, 173 - 22 * n, 58, 18, word, size=7.5)
        self.ax.text(37, 122, "token\nembeddings", ha="center", va="top", size=8, color=INK)

    def attention(self) -> None:
        """Draw the four linear maps, and between them what a prefix and (IA)³ change."""
        box(self.ax, 104, 44, 298, 228, color=_FRAME)
        self.ax.text(394, 258, "multi-head attention", size=8, **_MIDDLE | {"ha": "right"})
        for y, text in ((228, "query"), (160, "key"), (92, "value")):
            self.path((76, 160), (111, 160), (111, y), (121, y))
            self.linear(121, y, text)
            arrow(self.ax, (191, y), (266, y))
        self.label("BitFit", 197, 253, ha="right")
        color = self.colors["prefix"] if "prefix" in self.lit else _GHOST
        for y, text in ((160, "$P_k$"), (92, "$P_v$")):
            self.part("IA3", 197, y - 9, 18, 18, text="ℓ", size=9)
            self.label("IA3", 206, y - 19)
            self.part("prefix", 221, y + 14, 30, 18, text=text, size=8)
            self.label("prefix", 243, y + 42)
            arrow(self.ax, (252, y + 23), (266, y + 23), color=color)
        box(self.ax, 266, 70, 44, 176, "softmax$(QK^T)\\,V$", rotation=90)
        arrow(self.ax, (310, 160), (322, 160))
        self.linear(322, 160, "output")

    def feedforward(self) -> None:
        """Draw up, activation and down, from bottom to top."""
        box(self.ax, 496, 44, 92, 228, color=_FRAME)
        self.ax.text(542, 51, "feed-forward", size=8, **_MIDDLE)
        self.path((478, 160), (491, 160), (491, 108), (504, 108))
        self.linear(504, 108, "up")
        arrow(self.ax, (533, 125), (533, 139))
        box(self.ax, 504, 139, 58, 20, "activation", size=7.5)
        arrow(self.ax, (533, 159), (533, 205))
        self.part("IA3", 524, 169, 18, 18, text="ℓ", size=9)
        self.label("IA3", 545, 178, ha="left")
        self.linear(504, 222, "down", side=1)


def block_map(
    *lit: str,
    caption: str = "",
    targets: Iterable[str] = LINEAR_MAPS,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Show a transformer block with the named places lit: trainable parts are coloured and
    labelled, the rest is grey. Without a name all places are lit, as a map of the course.

    Places: "prompt", "prefix", "LoRA", "adapter", "IA3", "BitFit", "norms" and "head". Beside
    "LoRA", the names "DoRA" and "QLoRA" mark its magnitudes m and the weights in 4 bits. `targets`
    names the linear maps that LoRA is beside, all unless given. `colors` is {place: colour}, for
    places that take another colour than their own. Raises ValueError for another name, or for
    targets that are a string or empty."""
    if isinstance(targets, str) or not (targets := tuple(targets)):
        raise ValueError(f"targets={targets!r} must be a sequence, such as ('query', 'value')")
    if other := [name for name in targets if name not in LINEAR_MAPS]:
        raise ValueError(f"targets: {other[0]!r} must be one of {', '.join(LINEAR_MAPS)}")
    known = (*PLACES, *marks())
    if unknown := [name for name in (*lit, *(colors or {})) if name not in known]:
        raise ValueError(f"block_map: {unknown[0]!r} must be one of {', '.join(known)}")
    chosen = [place for place in PLACES if place in (lit or PLACES)]
    signs = [marks()[name] for name in lit if name not in PLACES]
    fig, ax = canvas(776, 326, 7.76)
    draw = _Map(ax, [*chosen, *(mark.name for mark in signs)], targets, colors or {})
    box(ax, 88, 36, 590, 266, color=_FRAME, dashed=True)
    ax.text(676, 306, "× L blocks", ha="right", va="bottom", size=9, color=INK)
    draw.embeddings()
    draw.attention()
    draw.path((392, 160), (442, 160))
    draw.adapter(406)
    draw.norm(442, 96)
    draw.feedforward()
    draw.path((574, 222), (583, 222), (583, 160), (628, 160))
    draw.adapter(592)
    draw.norm(628, 485)
    arrow(ax, (664, 160), (698, 160))
    draw.part("head", 698, 126, 62, 68, text="head")
    key = "Colour: trains. Grey: the frozen base."
    if set(PLACES) - set(_BASE) - set(chosen):
        key += " Dashed: where other methods add something."
    elif set(targets) != set(LINEAR_MAPS):
        key += " Dashed: where LoRA could also be added."
    for mark in signs:
        key += f" {mark.sign}: {mark.name} only."
    ax.text(88, 16, key, va="center", size=8, color=INK)
    trained = "; ".join(draw.places[place].trains for place in chosen)
    marked = f" Marked: {'; '.join(mark.meaning for mark in signs)}." if signs else ""
    if set(targets) != set(LINEAR_MAPS):
        trained = trained.replace("each linear map", " and ".join(targets))
    alt = (
        "A transformer block from left to right: token embeddings, multi-head attention, add and "
        f"norm, feed-forward, add and norm, and then a head. Lit as trainable: {trained}.{marked}"
    )
    show(fig, alt, caption, SHARP)


def lora_picture() -> None:
    """Show a linear layer with LoRA: the frozen weight W, and A and B beside it."""
    blue, orange = COLORS[:2]
    fig, ax = canvas(12, 5.6)
    box(ax, 0.2, 1.6, 0.45, 2.4, "x")  # all to one scale: in = out = 2.4, and r a fifth of it
    box(ax, 4.3, 3.1, 2.4, 2.4, "W\n(out, in)\n\nfrozen")
    box(ax, 2.1, 1.1, 2.4, 0.48, "A  (r, in)", color=blue, lit=True)
    ax.plot([6.0] * 4, [1.13 + 0.14 * n for n in range(4)], "o", color=INK, markersize=3.5)
    ax.text(6.0, 0.75, "r numbers", size=8.5, **_MIDDLE)
    box(ax, 7.6, 0.15, 0.48, 2.4, "B  (out, r)", color=orange, lit=True, rotation=90)
    box(ax, 9.9, 2.5, 0.6, 0.6, "+")
    box(ax, 11.4, 1.6, 0.45, 2.4, "y")
    for start, end, text in (
        ((0.7, 3.7), (4.25, 4.3), ""),
        ((0.7, 2.0), (2.05, 1.34), ""),
        ((4.55, 1.34), (5.8, 1.34), "reads"),
        ((6.2, 1.34), (7.55, 1.34), "writes"),
        ((6.75, 4.3), (9.85, 3.0), ""),
        ((8.13, 1.34), (9.85, 2.6), ""),
        ((10.55, 2.8), (11.35, 2.8), ""),
    ):
        arrow(ax, start, end, text=text)
    on_the_arrow = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": INK}
    ax.text(9.0, 1.97, "× α/r", size=8.5, bbox=on_the_arrow, **_MIDDLE)
    alt = (
        "The input x goes two ways: through the frozen weight W, and through the thin trainable "
        "matrices A and B. A reads r numbers from x, drawn as dots, and B writes them, scaled by "
        "α/r, into the output. Both results are added and give y."
    )
    show(fig, alt, "LoRA: two thin trainable matrices beside one frozen weight.", SHARP)
