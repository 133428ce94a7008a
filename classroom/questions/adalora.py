"""Lesson 05: the toy of section 3, pruned early or late, with and without a way back."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots

ENDS = (20, 50, 100, 220)


def run() -> Run:
    """Prune by S from the first step to four different ends; once a triplet that goes is gone."""
    needed = ("your_score", "choose", "learn_and_prune", "outcome", "update", "observe")
    lesson = from_lesson("05", "PLambdaQ", "plant", *needed)
    goals, branch = lesson["plant"](ranks=(4, 2, 0)), lesson["PLambdaQ"]

    class GoneForGood(branch):
        def forward(self, x):
            zero = self.lam.detach()[..., 0] == 0
            if not zero.all():  # all are zero at the start
                self.gone = getattr(self, "gone", zero) | zero
            return super().forward(x)

    def worth(branch):
        score = lesson["S"](branch)
        return score.masked_fill(branch.gone, -1) if hasattr(branch, "gone") else score

    right, ranks = {}, {}
    for name, kind in (("may come back", branch), ("gone for good", GoneForGood)):
        lesson["PLambdaQ"] = kind
        for end in ENDS:
            lesson["memory"].clear()
            branches, _ = lesson["learn_and_prune"](worth, goals, start=0, end=end)
            found, _ = lesson["outcome"](branches, goals)
            exact = (found == torch.tensor([4, 2, 0])).all(dim=1).sum().item()
            right.setdefault(name, {})[end] = exact
            ranks.setdefault(name, {})[end] = found.float().mean(dim=0)
    fig, (left, middle) = plots.figure(1, 2, size=(7.4, 2.8))
    for (name, counts), style in zip(right.items(), ("o-", "s--"), strict=True):
        left.plot(range(4), counts.values(), style, label=name)
    left.set(ylabel="starts of 20 with the right ranks", ylim=(0, 21))
    left.legend(loc="lower right")
    for layer, needs in enumerate((4, 2, 0)):
        means = [one[layer] for one in ranks["may come back"].values()]
        middle.plot(range(4), means, "o-", label=f"layer {layer + 1} needs {needs}")
    middle.set(ylabel="rank found, mean", ylim=(-0.2, 5.6))
    middle.legend(ncols=2, fontsize=8, loc="upper left")
    for ax in (left, middle):
        ax.set(xlabel="last step that prunes", xticks=range(4), xticklabels=ENDS)
    return Run(fig, {"right": right, "ranks": ranks, "starts": 20})
