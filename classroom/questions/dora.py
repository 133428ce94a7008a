"""Lesson 04: rows turned by the same angles as in the broken LoRA, in directions of chance."""

import torch
import torch.nn.functional as F

from classroom.questions import Run, from_lesson
from peft_lessons.studies import plots


def turned(weight, angles, generator):
    """Return a weight with its rows turned by angles (out,), each in a random direction."""
    rows = F.normalize(weight, dim=1)
    away = torch.randn(weight.shape, generator=generator)
    away = F.normalize(away - (away * rows).sum(dim=1, keepdim=True) * rows, dim=1)
    sine, cosine = angles.sin()[:, None], angles.cos()[:, None]
    return weight.norm(dim=1, keepdim=True) * (cosine * rows + sine * away)


def run() -> Run:
    """Turn the rows of query and value as LoRA turned them, and at random; then stretch them."""
    lesson = from_lesson("04", "short", "layers", "NaiveDoRA", "TARGETS", "split")
    old, new, score = lesson["W"], lesson["V"], lesson["with_weights"]
    draw = torch.Generator().manual_seed(0)
    as_lora, at_random = {}, {}
    for share in (0, 0.25, 0.5, 0.75, 1):
        part = {path: old[path] + share * (new[path] - old[path]) for path in old}
        angles = {path: F.cosine_similarity(old[path], part[path], dim=1) for path in old}
        angles = {path: one.clamp(-1, 1).arccos() for path, one in angles.items()}
        mean = torch.rad2deg(torch.cat([*angles.values()])).mean().item()
        as_lora[mean] = score(lesson["combined"](old, part))  # W's lengths
        at_random[mean] = score({path: turned(old[path], angles[path], draw) for path in old})
    half_turn = {path: torch.full_like(one, torch.pi / 3) for path, one in angles.items()}
    at_random[60.0] = score({path: turned(old[path], half_turn[path], draw) for path in old})
    longer = {
        c: score({path: c * weight for path, weight in old.items()}) for c in (0.5, 1, 1.3, 2)
    }
    fig, (left, right) = plots.figure(1, 2, size=(7.4, 2.8), sharey=True)
    for label, points, style in (("X", as_lora, "o-"), ("Y", at_random, "s--")):
        left.plot(points.keys(), points.values(), style, label=label)
    left.set(xlabel="turn of a row, degrees, mean", ylabel="accuracy, %", ylim=(40, 90))
    left.legend(loc="lower left")
    right.plot(longer.keys(), longer.values(), "o-", color=plots.COLORS[2])
    right.set(xlabel="length of all rows, times the old one", xticks=(0.5, 1, 1.3, 2))
    turns = {"as LoRA": [[*as_lora], [*as_lora.values()]], "at random": [*at_random.items()]}
    return Run(fig, turns | {"longer": longer})
