"""Lesson 02: the planted change of rank 4, learned by students whose A never trains."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots

RANKS = (1, 2, 4, 8, 16, 64)


def run() -> Run:
    """Train students of the lesson, once as they are and once with A frozen at its start."""
    lesson = from_lesson("02", "NaiveLoRA", "base", "states", "plant", "learn")
    planted = lesson["plant"]([1.0] * 4)

    class ReadsAtRandom(lesson["NaiveLoRA"]):
        def __init__(self, *settings):
            super().__init__(*settings)
            self.A.requires_grad_(False)

    both = {rank: lesson["learn"](rank, planted) for rank in (1, 2, 4, 8)}
    lesson["NaiveLoRA"] = ReadsAtRandom
    frozen = {rank: lesson["learn"](rank, planted) for rank in RANKS}
    error = {
        "trained": {rank: 100 * share for rank, (share, _) in both.items()},
        "frozen": {rank: 100 * share for rank, (share, _) in frozen.items()},
    }
    changes = {"X": frozen[8][1], "Y": both[8][1], "Z": both[4][1]}
    values = {name: torch.linalg.svdvals(change)[:10] for name, change in changes.items()}
    fig, (left, right) = plots.figure(1, 2, size=(7.4, 2.9))
    for name, label in (("trained", "A and B train"), ("frozen", "A frozen at its random start")):
        left.plot(error[name].keys(), error[name].values(), "o-", label=label)
    plots.log_axis(left, "x", RANKS)
    left.set(xlabel="rank of LoRA", ylabel="error left, % of rank 0", ylim=(0, 120))
    left.legend(loc="upper left")
    for (name, line), style in zip(values.items(), "osx", strict=True):
        right.plot(range(1, 11), line, style, label=name)
    right.set(xlabel="singular value of BA", xticks=range(1, 11), ylim=(0, None))
    right.legend()
    return Run(fig, {"error": error, "singular values": values})
