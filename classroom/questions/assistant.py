"""Lesson 15: what five ways of training did to the probability of both answers of a pair."""

from classroom.questions import Run
from peft_lessons.studies import load_results, plots

WAYS = {  # of preference_study.csv, at a learning rate of 0.0003: method, β
    "A": ("dpo", 0.1),
    "B": ("less bad, sft", 0.0),
    "C": ("dpo", 1.0),
    "D": ("sft", 0.0),
    "E": ("dpo, no sigmoid", 1.0),
}


def run() -> Run:
    """Read the mean log-ratios of held-out chosen and rejected answers from the stored runs."""
    table = load_results("preference_study", lr=3e-4)
    fig, ax = plots.figure(size=(6.2, 3.4))
    found = {}
    for (name, (method, beta)), mark in zip(WAYS.items(), "os^Dv", strict=True):
        runs = table[(table["method"] == method) & (table["beta"] == beta)]
        found[name] = {kind: runs[f"{kind}_ratio"].tolist() for kind in ("rejected", "chosen")}
        ax.plot(*found[name].values(), mark, label=name)
    ax.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set(
        xlabel="rejected answers, change of log π",
        ylabel="chosen answers, change of log π",
        xlim=(-40, 10),
        ylim=(-16, 8),
    )
    ax.legend(ncols=5, loc="lower right", handlelength=1, columnspacing=0.8)
    return Run(fig, {"change": found})
