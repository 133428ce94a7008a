"""Show the one chart that grows through the course: test accuracy against trainable parameters."""

from __future__ import annotations

from .figures import COLORS, GREY, figure, show
from .plots import log_axis, name_points
from .study import Study

# {method in choosing_study: (the lesson that introduces it, its name in the chart)}
INTRODUCED: dict[str, tuple[str, str]] = {
    "head": ("01", "head alone"),
    "lora": ("02", "LoRA, query and value"),
    "lora, all linear": ("02", "LoRA, all linear layers"),
    "qlora": ("03", "QLoRA"),
    "dora, all linear": ("04", "DoRA"),
    "adalora": ("05", "AdaLoRA"),
    "pfeiffer": ("06", "adapters (Pfeiffer)"),
    "parallel": ("06", "adapters (parallel)"),
    "ia3": ("07", "(IA)³"),
    "prompt": ("08", "prompt tuning"),
    "prefix": ("09", "prefix tuning"),
    "norms": ("10", "norms"),
    "bitfit": ("10", "BitFit"),
    "last two": ("10", "last two blocks"),
    "diff": ("10", "diff pruning"),
    "mixed": ("11", "adapters and prefix"),
}
LESSONS = tuple(f"{n:02d}" for n in range(15))
FULL = "full fine-tuning"


def growing_chart(lesson: str, title: str = "") -> None:
    """Show test accuracy against trainable parameters on movie sentiment, for the methods up to a
    lesson: its own are coloured, those of earlier lessons are grey.

    From data/results/choosing_study.csv: all training sentences, three seeds at the learning rate
    that is best on the validation split. Raises ValueError for an unknown lesson."""
    if lesson not in LESSONS:
        raise ValueError(f"growing_chart: {lesson!r} must be one of {', '.join(LESSONS)}")
    upto = max(lesson, "01")  # the head alone is there from the start
    names = {name: (key, own) for key, (own, name) in INTRODUCED.items() if own <= upto}
    study = Study.read("choosing_study", task="sentiment")
    study = study.where(examples=int(study.runs["examples"].max()))
    study = study.named(
        {n: {"method": key} for n, (key, _) in names.items()} | {FULL: {"method": "full"}}
    )
    scores = study.scores()
    trainable = {name: int(study[name]["trainable"].iloc[0]) for name in study}
    fig, ax = figure(size=(7.2, 3.8))
    full = scores[FULL]
    ax.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
    lit = [name for name, (_, own) in names.items() if own == upto]
    points = {name: (trainable[name], scores[name].mean) for name in scores}
    for name, score in scores.items():
        color = "black" if name == FULL else COLORS[0] if name in lit else GREY
        whiskers = [[score.mean - score.low], [score.high - score.mean]]
        ax.errorbar(*points[name], yerr=whiskers, fmt="o", color=color, capsize=3)
    ax.set(title=title, xlabel="trainable parameters", ylabel="test accuracy, %")
    log_axis(ax, "x", (1e3, 1e4, 1e5, 1e6, 1e7))
    name_points(ax, points)
    told = [f"{n} {scores[n].mean:.1f} % with {trainable[n]:,} parameters" for n in (*lit, FULL)]
    alt = f"Test accuracy on movie sentiment against trainable parameters: {'; '.join(told)}."
    caption = "Each point is the mean of three seeds, its whiskers the worst and the best seed."
    show(fig, alt, caption)
