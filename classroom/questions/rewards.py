"""Lesson 16: four stored runs under four checkers, of which the lesson shows one."""

from classroom.questions import Run
from peft_lessons.studies import load_results, plots

STEPS = 12
ARMS = {"A": "occurs", "B": "lora", "C": "random", "D": "swapped"}  # of rewards_study.csv
CURVES = {"reward": "mean reward", "flat": "share of flat groups", "length": "length, tokens"}


def run() -> Run:
    """Read the curves of rank 8 at 0.0003, seed 0, and what the runs score on held-out sums."""
    table = load_results("rewards_study", lr=3e-4, size=8, seed=0).set_index("arm")
    fig, axes = plots.figure(1, 3, size=(7.8, 2.5))
    curves, right = {}, {}
    for (name, arm), mark in zip(ARMS.items(), "os^x", strict=True):
        stored = table.loc[arm]
        curves[name] = {kind: [float(v) for v in stored[kind].split()][:STEPS] for kind in CURVES}
        right[name] = [100 * float(stored[kind]) for kind in ("greedy", "chance")]
        for ax, line in zip(axes, curves[name].values(), strict=True):
            ax.plot(range(1, STEPS + 1), line, mark + "-", markersize=4, linewidth=1.2, label=name)
    for ax, label in zip(axes, CURVES.values(), strict=True):
        ax.set(
            xlabel="step",
            title=label,
            xticks=(1, 4, 8, 12),
            ylim=(0, 8 if "tokens" in label else 1),
        )
    axes[2].legend(ncols=4, loc="upper left", handlelength=1, columnspacing=0.8)
    return Run(fig, {"curves": curves, "right, likeliest and sampled": right, "steps": STEPS})
