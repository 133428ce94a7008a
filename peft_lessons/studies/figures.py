"""Make figures in one style, and show each with its alternative text."""

from __future__ import annotations

import base64
import html
import io

import matplotlib as mpl
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours can be distinguished with any colour vision. Figures are white in both
# themes of JupyterLab: transparent ones would lose their black text in the dark one.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#767676"  # with enough contrast for small text
SHARP = 150  # dpi of a drawing, which has fine lines and small text
STYLE = {
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
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots(rows, columns, **kw)


class Shown:
    """Show a figure with its caption and alternative text, `width` pixels wide, or as many as the
    page has room for."""

    def __init__(self, png: bytes, alt: str, caption: str, width: int):
        self.png, self.alt, self.caption, self.width = png, alt, caption, width

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict[str, str], dict]:
        png = base64.b64encode(self.png).decode()
        # JupyterLab and the site show the HTML: their <img> of an image/png has no alt text. A PDF
        # takes the image/png, for which nbconvert reads the alt text from the metadata. Outputs
        # stored by `make outputs` have the HTML only.
        data = {
            "text/html": f'<figure style="margin:0">\n<img src="data:image/png;base64,{png}" '
            f'width="{self.width}" style="max-width:100%;height:auto" '
            f'alt="{html.escape(self.alt, quote=True)}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>",
            "image/png": png,
            "text/plain": f"{self.caption}\n[{self.alt}]",
        }
        return data, {"image/png": {"alt": self.alt}}


def _palette(picture: Image.Image) -> Image.Image:
    """Return a picture with a palette, which takes a third of the room in a notebook: of 16
    colours, or of up to 64 where fewer would show."""
    for colors in (16, 24, 32, 64):
        # Without k-means, a colour that fills little, such as the end of a scale, may be grey.
        few = picture.quantize(colors, kmeans=4, dither=Image.Dither.NONE)
        gaps = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(picture, int)).max(-1)
        if (gaps > 24).mean() < 1e-3:
            break
    return few


# The style must hold while things are drawn: titles, lines and legends read it only then.
@mpl.rc_context(STYLE)
def still(fig: Figure, alt: str, caption: str = "", dpi: int = 100) -> Shown:
    """Return a figure that displays itself, with alternative text (a sentence that describes it).

    All titles are bold and left-aligned, all legends have no frame. Above 100 dpi the picture gets
    sharper, not larger. Raises ValueError for an alternative text below 20 characters."""
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
    palette = _palette(Image.open(drawn).convert("RGB"))
    palette.save(small, "PNG", optimize=True)
    return Shown(small.getvalue(), alt, caption, round(palette.width * 100 / max(dpi, 100)))


def show(fig: Figure, alt: str, caption: str = "", dpi: int = 100) -> None:
    """Show a figure below the cell; arguments and errors as for `still`."""
    display(still(fig, alt, caption, dpi))
