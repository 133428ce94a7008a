"""Lesson 08: the trained prompt in another order and in parts, and where in a text it helps."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots

EDGES = (0, 8, 16, 32, 64, 127)


def draw(by_place, changed):
    """Return a figure of gains {places of a text: gain} and perplexities {change of the prompt: one
    or several}."""
    fig, (left, right) = plots.figure(1, 2, size=(7.8, 2.8))
    left.bar([at.replace(" to ", "–") for at in by_place], by_place.values(), color=plots.COLORS[0])
    left.set(xlabel="predictions at these places of a text", ylabel="gain, nats a token")
    left.tick_params(axis="x", labelsize=8)
    for y, values in enumerate(changed.values()):
        values = values if isinstance(values, list) else [values]
        right.plot(values, [-y] * len(values), "o", color=plots.COLORS[1])
    right.set(yticks=[-y for y in range(len(changed))], yticklabels=[*changed])
    right.set(xlabel="perplexity")
    return fig


def run() -> Run:
    """Train the lesson's prompt; measure its gain by position, and its rows moved or left out."""
    lesson = from_lesson("08", "base", "logits_after", "perplexity", "start", "P")
    P, blocks, perplexity = lesson["P"], lesson["blocks"], lesson["perplexity"]
    ids, labels = blocks["input_ids"], blocks["labels"][:, 1:]

    @torch.no_grad()
    def losses(prompt):
        logits = [lesson["logits_after"](prompt, part)[:, :-1].mT for part in ids.split(8)]
        return F.cross_entropy(torch.cat(logits), labels, reduction="none")  # (24, 127)

    gain = losses(P[:0]) - losses(P)
    real = labels != -100
    by_place = {
        f"{low + 1} to {high}": gain[:, low:high][real[:, low:high]].mean().item()
        for low, high in pairwise(EDGES)
    }
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(16, generator=draw) for _ in range(3)]
    changed = {
        "no prompt": perplexity(P[:0]),
        "as trained": perplexity(P),
        "rows in another order": [perplexity(P[order]) for order in orders],
        "rows 1 to 8 only": perplexity(P[:8]),
        "rows 9 to 16 only": perplexity(P[8:]),
        "their mean, 16 times": perplexity(P.mean(dim=0, keepdim=True).expand(16, -1)),
    }
    return Run(draw(by_place, changed), {"gain": by_place, "perplexity": changed})
