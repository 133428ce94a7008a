"""Show the one chart that grows through the course: test accuracy against trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .figures import COLORS, GREY, SHARP, figure, show
from .plots import log_axis
from .study import Spread, Study

_RIGHT, _LEFT = (6, 0), (-6, 0)
# {method in choosing_study, or in selective_study: (the lesson that introduces it, its name in the
# chart, where the name stands: points to the right of its point, if negative to the left, and above
# it)}
INTRODUCED: dict[str, tuple[str, str, tuple[float, float]]] = {
    "head": ("01", "head alone", _RIGHT),
    "lora": ("02", "LoRA (q, v)", (-6, 5)),
    "lora, all linear": ("02", "LoRA (all linear)", (6, 2)),
    "qlora": ("03", "QLoRA", _LEFT),
    "dora, all linear": ("04", "DoRA", _RIGHT),
    "adalora": ("05", "AdaLoRA", _RIGHT),
    "pfeiffer": ("06", "Pfeiffer\nadapter", (6, 1)),
    "parallel": ("06", "parallel\nadapter", (6, 5)),
    "ia3": ("07", "(IA)³", (0, 12)),
    "prompt": ("08", "prompt", _RIGHT),
    "prefix": ("09", "prefix", _LEFT),
    "norms": ("10", "norms", _LEFT),
    "bitfit": ("10", "BitFit", _RIGHT),
    "last two": ("10", "last two blocks", (0, -17)),
    "sparse": ("10", "random entries", (-6, 4)),
    "mixed": ("11", "mix-and-match", _RIGHT),
}
LESSONS = tuple(f"{n:02d}" for n in range(16))
FULL = "full fine-tuning"
_TICKS = {1e3: "1,000", 1e4: "10,000", 1e5: "100,000", 1e6: "1 million", 1e7: "10 million"}


def growing_chart(lesson: str, title: str = "") -> None:
    """Show test accuracy against trainable parameters on movie sentiment for the methods up to a
    lesson, such as "02". Its own methods are coloured, those of earlier lessons grey.

    From data/results/choosing_study.csv, and sparse masks from selective_study.csv: all training
    sentences, three seeds at the learning rate that is best on the validation split. Raises
    ValueError for an unknown lesson."""
    if lesson not in LESSONS:
        raise ValueError(f"growing_chart: {lesson!r} must be one of {', '.join(LESSONS)}")
    upto = max(lesson, "01")  # the head alone is there from the start
    ways = {name: {"method": key} for key, (own, name, _) in INTRODUCED.items() if own <= upto}
    lit = [name for own, name, _ in INTRODUCED.values() if own == upto]
    study = Study.read("choosing_study", task="sentiment")
    study = study.where(examples=int(study.runs["examples"].max()))
    masks = {"task": "sentiment", "method": "sparse", "variant": "random"}
    study += Study.read("selective_study", **masks)
    study = study.named(ways | {FULL: {"method": "full"}})
    scores = study.scores()
    points = {name: (int(study[name]["trainable"].iloc[0]), scores[name].mean) for name in scores}
    _draw(points, scores, lit, title)


def _draw(
    points: Mapping[str, tuple[int, float]],
    scores: Mapping[str, Spread],
    lit: Sequence[str],
    title: str,
) -> None:
    colors = dict.fromkeys(points, GREY) | dict.fromkeys(lit, COLORS[0]) | {FULL: "black"}
    fig, ax = figure(size=(7.2, 4.2))
    ax.axhspan(scores[FULL].low, scores[FULL].high, color="black", alpha=0.08, linewidth=0)
    for name, score in scores.items():
        whiskers = [[score.mean - score.low], [score.high - score.mean]]
        look = {"color": colors[name], "capsize": 3, "zorder": 2 + (name in lit)}
        ax.errorbar(*points[name], yerr=whiskers, fmt="o", **look)
    # The same frame in every lesson, so that the chart is seen to grow.
    ax.set(xlabel="trainable parameters", ylabel="test accuracy, %", ylim=(78.5, 88.5))
    ax.set_title(title or "Movie sentiment, what accuracy for how many parameters")
    log_axis(ax, "x", _TICKS)
    ax.set_xlim(400, 4e7)
    ax.set_xticks(list(_TICKS), _TICKS.values())
    places = {name: place for _, name, place in INTRODUCED.values()} | {FULL: _LEFT}
    for name, point in points.items():
        right, up = places[name]
        side = "center" if not right else "left" if right > 0 else "right"
        look = {"color": colors[name], "weight": "bold" if name in lit else "normal", "size": 8}
        ax.annotate(
            name, point, (right, up), textcoords="offset points", ha=side, va="center", **look
        )

    def told(names: Iterable[str]) -> str:
        each = (f"{name} {scores[name].mean:.1f} % ({points[name][0]:,})" for name in names)
        return ", ".join(each).replace("\n", " ")

    earlier = [name for name in points if name not in (*lit, FULL)]
    parts = {"of this lesson": lit, "of earlier lessons": earlier, "for reference": [FULL]}
    shown = "; ".join(f"{what}: {told(names)}" for what, names in parts.items() if names)
    alt = f"Test accuracy on movie sentiment and number of trainable parameters, {shown}."
    key = "Blue: this lesson." if lit else "This lesson adds no point."
    key += " Grey: earlier lessons." if earlier else ""
    seeds = "Mean of three seeds, with whiskers from the worst to the best."
    caption = f"{seeds} {key} Band: the seeds of full fine-tuning."
    show(fig, alt, caption, SHARP)
