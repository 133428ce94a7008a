"""Draw diagrams: boxes, arrows, and the course's one map of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

from .figures import COLORS, GREY, figure, show

INK = "#333333"  # of text and arrows
SHARP = 200  # dpi of a drawing, which has fine lines and small text


def canvas(width: float, height: float, inches: float = 7.2) -> tuple[Figure, Axes]:
    """Return (figure, axes) to draw on: x from 0 to `width`, y from 0 to `height`, equal units.

    The drawing is `inches` wide (100 pixels each) whatever its units. Show it with dpi=200."""
    fig, ax = figure(size=(inches, inches * height / width))
    fig.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return fig, ax


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
    tint = [1 - 0.22 * (1 - part) if lit else 1 - 0.1 * (1 - part) for part in to_rgb(color)]
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle=f"round,pad=0,rounding_size={min(w, h) / 8}",
            facecolor="none" if dashed and not lit else tint,
            edgecolor=color,
            linewidth=2 if lit else 1,
            linestyle="--" if dashed else "-",
        )
    )
    ax.text(
        x + w / 2,
        y + h / 2,
        text,
        ha="center",
        va="center",
        size=size,
        color=INK,
        weight="bold" if lit else "normal",
        rotation=rotation,
        linespacing=1.1,
    )


def arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = INK,
    text: str = "",
) -> None:
    """Draw an arrow between two points, with text above its middle."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=8, color=color, shrinkA=0, shrinkB=0
        )
    )
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        ax.annotate(text, middle, (0, 4), textcoords="offset points", ha="center", color=color)


# {place: (colour, label, what trains there)}. What is part of the base stands there for any method;
# what a method adds is a dashed outline until it is lit.
PLACES: dict[str, tuple[str, str, str]] = {
    "prompt": (COLORS[3], "prompt", "the virtual tokens of a prompt before the embeddings"),
    "prefix": (COLORS[3], "prefix", "the keys and values of a prefix in the attention of a block"),
    "LoRA": (COLORS[0], "LoRA", "the LoRA factors A and B beside the linear maps"),
    "adapter": (COLORS[1], "adapter", "an adapter after attention and one after the feed-forward"),
    "IA3": (COLORS[2], "(IA)³", "the (IA)³ scales of keys, values and inner activations"),
    "BitFit": (COLORS[5], "BitFit", "the biases of linear maps and norms"),
    "norms": (COLORS[4], "norms", "the norms after both sublayers"),
    "head": (COLORS[6], "head", "the head on top"),
}
_GHOST = "#c4c4c4"
_BASE = {"BitFit", "norms", "head"}


class _Map:
    """Draw the parts of a transformer block, those of the `lit` places in their colours."""

    def __init__(self, ax: Axes, lit: tuple[str, ...]):
        self.ax, self.lit = ax, lit

    def part(self, place: str, draw: Callable, *args, text: str = "", **kw) -> None:
        """Draw one part of a place: coloured, or grey in the base, or a dashed outline."""
        if place in self.lit:
            draw(self.ax, *args, text=text, color=PLACES[place][0], lit=True, **kw)
        elif place in _BASE:
            draw(self.ax, *args, text=text, **kw)
        else:
            draw(self.ax, *args, color=_GHOST, dashed=True, **kw)

    def label(self, place: str, x: float, y: float, **kw) -> None:
        """Write the label of a place if it is lit."""
        if place in self.lit:
            color, label, _ = PLACES[place]
            dark = [0.6 * part for part in to_rgb(color)]
            text = {"ha": "center", "va": "center", "size": 9, "weight": "bold", "color": dark}
            self.ax.text(x, y, label, **text | kw)

    def linear(self, x: float, y: float, text: str) -> None:
        """Draw a linear map whose middle is at height y, with its bias and its LoRA factors."""
        box(self.ax, x, y - 17, 58, 34, text)
        self.part("BitFit", box, x + 58, y - 17, 12, 34, text="b")
        self.part("LoRA", box, x, y - 34, 28, 14, text="A", size=7.5)
        self.part("LoRA", box, x + 30, y - 34, 28, 14, text="B", size=7.5)

    def scale(self, x: float, y: float) -> None:
        """Draw a learned scale on a line."""
        self.part("IA3", box, x - 9, y - 9, 18, 18, text="ℓ", size=9)

    def norm(self, x: float) -> None:
        """Draw a residual connection's sum and norm, with its bias."""
        self.part("norms", box, x, 104, 38, 112, text="add & norm", rotation=90)
        self.part("BitFit", box, x, 90, 38, 12, text="b", size=7.5)
        self.label("norms", x + 19, 226)

    def adapter(self, x: float) -> None:
        """Draw a bottleneck, wide at both ends."""
        lit = "adapter" in self.lit
        color = PLACES["adapter"][0] if lit else _GHOST
        tint = [1 - 0.22 * (1 - part) for part in to_rgb(color)] if lit else "white"
        shape = [(0, 30), (9, 12), (18, 12), (27, 30), (27, -30), (18, -12), (9, -12), (0, -30)]
        corners = [(x + dx, 160 + dy) for dx, dy in shape]
        look = {"edgecolor": color, "linewidth": 2 if lit else 1, "zorder": 3}
        self.ax.add_patch(Polygon(corners, facecolor=tint, linestyle="-" if lit else "--", **look))
        self.label("adapter", x + 13, 202)


def block_map(*lit: str, caption: str = "") -> None:
    """Show a transformer block with the named places lit: what trains is coloured and labelled, the
    rest is grey. Without a name all places are lit, as a map of the course.

    Places: "prompt", "prefix", "LoRA", "adapter", "IA3", "BitFit", "norms" and "head". Raises
    ValueError for another name."""
    if unknown := [name for name in lit if name not in PLACES]:
        raise ValueError(f"block_map: {unknown[0]!r} must be one of {', '.join(PLACES)}")
    chosen = tuple(place for place in PLACES if place in (lit or PLACES))
    fig, ax = canvas(760, 330, 7.6)
    draw = _Map(ax, chosen)
    parts = [PLACES[place][2] for place in chosen]
    told = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    _draw_block(draw)
    alt = (
        "A transformer block from left to right: token embeddings, multi-head attention, add and "
        f"norm, feed-forward, add and norm, and a head on top. Lit as trainable: {told}."
    )
    show(fig, alt, caption, SHARP)


def _draw_block(m: _Map) -> None:
    ax = m.ax
    frame = {"size": 8}
    box(ax, 88, 38, 580, 262, color="#aaaaaa", dashed=True)
    ax.text(662, 304, "× L blocks", ha="right", va="bottom", size=9, color=INK)
    # Tokens: the text, and before it what a prompt adds.
    for n in range(2):
        m.part("prompt", box, 8, 228 - 22 * n, 58, 18, text="virtual", size=7.5)
    for n, word in enumerate(("a", "fine", "film")):
        box(ax, 8, 178 - 22 * n, 58, 18, word, size=7.5)
    ax.text(37, 118, "token\nembeddings", ha="center", va="top", **frame)
    m.label("prompt", 37, 258)
    # Attention.
    box(ax, 98, 46, 298, 222, color="#bbbbbb")
    ax.text(104, 50, "attention", va="bottom", **frame)
    for y, text in ((228, "query"), (160, "key"), (96, "value")):
        arrow(ax, (70 if y == 160 else 96, 160), (106, y))
        m.linear(106, y, text)
        arrow(ax, (176, y), (262, y))
        m.label("LoRA", 135, y - 42)
    for y in (160, 96):
        m.scale(196, y)
        m.part("prefix", box, 216, y + 16, 34, 16, text="P", size=7.5)
        arrow(ax, (250, y + 24), (262, y + 24), color=_GHOST)
    m.label("IA3", 196, 76)
    m.label("prefix", 233, 203)
    m.label("BitFit", 186, 252)
    box(ax, 262, 66, 46, 180, "soft-\nmax\n(QKᵀ)V", size=8)
    arrow(ax, (308, 160), (318, 160))
    m.linear(318, 160, "output")
    m.label("LoRA", 347, 118)
    arrow(ax, (388, 160), (438, 160))
    m.adapter(404)
    m.norm(438)
    # Feed-forward, from bottom to top.
    box(ax, 488, 46, 92, 222, color="#bbbbbb")
    ax.text(494, 50, "feed-forward", va="bottom", **frame)
    m.linear(498, 110, "up")
    box(ax, 498, 143, 58, 24, "activation", size=7.5)
    m.scale(527, 180)
    m.linear(498, 228, "down")
    arrow(ax, (568, 228), (584, 160))
    m.adapter(588)
    m.norm(620)
    # Residual connections.
    for start, end in ((92, 457), (482, 639)):
        ax.plot([start, start, end], [160, 284, 284], color=GREY, linewidth=1)
        arrow(ax, (end, 284), (end, 234), color=GREY)
    arrow(ax, (658, 160), (690, 160))
    m.part("head", box, 690, 124, 60, 72, text="head")
    m.label("head", 720, 208)
