"""Show the one chart that grows through the course: test accuracy against trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..engine import method_facts
from ..engine.facts import Point
from .figures import COLORS, GREY, SHARP, figure, show
from .plots import log_axis
from .study import Study

HEAD = Point("head", "head alone", (6, 0))  # there from lesson 01 on
FULL = Point("full", "full fine-tuning", (-6, 0))  # for reference, in every lesson
LESSONS = tuple(f"{n:02d}" for n in range(16))
_RANGE = 400, 4e7
_TICKS = {1e3: "1,000", 1e4: "10,000", 1e5: "100,000", 1e6: "1 million", 1e7: "10 million"}


def growing_chart(lesson: str, title: str = "", mine: tuple[int, float] | None = None) -> None:
    """Show test accuracy against trainable parameters on movie sentiment for the methods up to a
    lesson, such as "02". Its own methods are coloured, those of earlier lessons grey.

    mine: the reader's own run as (trainable parameters, test accuracy in %), a hollow star.

    From data/results/growing_study.csv. One rule holds for every dot: all training sentences, 200
    steps, all test sentences, and the learning rate that is best on the validation split in the
    mean of three seeds. Raises ValueError for an unknown lesson, or for `mine` outside the
    chart."""
    if mine is not None and not (_RANGE[0] < mine[0] < _RANGE[1] and 0 <= mine[1] <= 100):
        raise ValueError(f"growing_chart: mine={mine!r} must be (parameters, accuracy in %)")
    if lesson not in LESSONS:
        raise ValueError(f"growing_chart: {lesson!r} must be one of {', '.join(LESSONS)}")
    rows = [("01", HEAD)]
    rows += [(facts.lesson, p) for facts in method_facts().values() for p in facts.points]
    points = [point for introduced, point in rows if introduced <= max(lesson, "01")]
    lit = [point.label for introduced, point in rows if introduced == max(lesson, "01")]
    study = _at_best(Study.read("growing_study"))
    study = study.named({point.label: {"method": point.method} for point in (*points, FULL)})
    _draw(study, {point.label: point.offset for point in (*points, FULL)}, lit, title, mine)


def _at_best(study: Study) -> Study:
    """Return the runs of each method at one learning rate: of those that ran with three seeds, the
    one with the best mean on the validation split."""
    ran = study.runs.groupby(["method", "lr"])["validation"]
    means = ran.transform("mean").where(ran.transform("size") == 3)
    return Study(study.runs[means == means.groupby(study.runs["method"]).transform("max")])


def _draw(
    study: Study,
    offsets: Mapping[str, tuple[float, float]],
    lit: Sequence[str],
    title: str,
    mine: tuple[int, float] | None,
) -> None:
    """Draw the methods of a study, the `lit` ones coloured, each label at its offset."""
    scores, full = study.scores(), FULL.label
    points = {name: (int(study[name]["trainable"].iloc[0]), scores[name].mean) for name in scores}
    colors = dict.fromkeys(points, GREY) | dict.fromkeys(lit, COLORS[0]) | {full: "black"}
    fig, ax = figure(size=(7.2, 4.2))
    ax.axhspan(scores[full].low, scores[full].high, color="black", alpha=0.08, linewidth=0)
    for name, score in scores.items():
        whiskers = [[score.mean - score.low], [score.high - score.mean]]
        look = {"color": colors[name], "capsize": 3, "zorder": 2 + (name in lit)}
        ax.errorbar(*points[name], yerr=whiskers, fmt="o", **look)
    # The same frame in every lesson, so that the chart is seen to grow.
    low, high = 78.5, 88.5
    ax.set(xlabel="trainable parameters", ylabel="test accuracy, %", ylim=(low, high))
    if mine:
        look = {"markersize": 14, "markerfacecolor": "white", "clip_on": False, "zorder": 4}
        spot = (mine[0], min(max(mine[1], low + 0.25), high - 0.25))
        ax.plot(*spot, "*", color=COLORS[1], markeredgewidth=1.5, **look)
        place = {"ha": "right", "va": "center", "textcoords": "offset points", "size": 8}
        ax.annotate(f"your run {mine[1]:.1f}", spot, (-9, 0), color=COLORS[1], **place)
    ax.set_title(title or "Movie sentiment, what accuracy for how many parameters")
    log_axis(ax, "x", _TICKS)
    ax.set_xlim(*_RANGE)
    ax.set_xticks(list(_TICKS), _TICKS.values())
    for name, point in points.items():
        right, up = offsets[name]
        side = "center" if not right else "left" if right > 0 else "right"
        look = {"color": colors[name], "weight": "bold" if name in lit else "normal", "size": 8}
        ax.annotate(
            name, point, (right, up), textcoords="offset points", ha=side, va="center", **look
        )

    def listed(names: Iterable[str]) -> str:
        each = (f"{name} {scores[name].mean:.1f} % ({points[name][0]:,})" for name in names)
        return ", ".join(each).replace("\n", " ")

    earlier = [name for name in points if name not in (*lit, full)]
    groups = {"of this lesson": lit, "of earlier lessons": earlier, "for reference": [full]}
    parts = "; ".join(f"{what}: {listed(names)}" for what, names in groups.items() if names)
    alt = f"Test accuracy on movie sentiment and number of trainable parameters, {parts}."
    key = "Blue: this lesson." if lit else "This lesson adds no point."
    key += " Grey: earlier lessons." if earlier else ""
    rule = (
        "One rule for every dot: 200 steps at the learning rate whose three seeds are best on the "
        "validation split; their mean on all test sentences, whiskers from worst to best."
    )
    caption = f"{rule} {key} Band: the seeds of full fine-tuning."
    if mine:
        alt += f" Your own run: {mine[1]:.1f} % ({mine[0]:,})."
        caption += " Star: your own run in this notebook, one seed, by no such rule."
    show(fig, alt, caption, SHARP)
