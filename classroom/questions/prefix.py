"""Lesson 09: prefixes of which only a part trains."""

import torch

from classroom.questions import Run, from_lesson
from peft_lessons import evaluate
from peft_lessons.studies import plots

AT = (0, 10, 20, 40)  # steps
PARTS = {  # what trains; what the keys are multiplied by
    "A": (("keys",), 1.0),
    "B": (("keys", "values"), 1.0),
    "C": (("values",), 0.0),
    "D": (("values",), 1.0),
}


def run() -> Run:
    """Train the lesson's prefix of 16 whole, its keys or its values alone, and its values alone
    under keys of zero."""
    lesson = from_lesson("09", "task", "NaivePrefix", "prefix_gate", "split_attention", "split")
    base, task = lesson["base"], lesson["task"]
    quick = task.limit(test=24)
    torch.manual_seed(0)
    start = torch.randn(2, lesson["L"], lesson["n_kv"], 16, lesson["d_h"])
    lines, gates = {}, {}
    for name, (parts, keys) in PARTS.items():
        model = lesson["NaivePrefix"](keys * start[0], start[1])
        for part, parameter in (("keys", model.keys), ("values", model.values)):
            parameter.requires_grad_(part in parts)
        training = [t for t in (model.keys, model.values) if t.requires_grad]
        optimizer = torch.optim.AdamW(training, lr=0.3, weight_decay=0)
        lines[name], gates[name] = [], []
        for step, batch in zip(range(AT[-1] + 1), task.stream(2, seed=0), strict=False):
            if step in AT:
                seen = []  # the mean gate of each layer
                with lesson["split"](
                    lambda i, *both, seen=seen: seen.append(both[0].mean()) or both
                ):
                    lines[name].append(evaluate(model, quick).perplexity)
                gates[name].append(sum(seen).item() / len(seen))
            if step == AT[-1]:
                break
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    untrained = evaluate(base, quick).perplexity
    fig, (left, right) = plots.figure(1, 2, size=(7.4, 2.9))
    for name, mark in zip(PARTS, "os^D", strict=True):
        left.plot(AT, lines[name], mark + "-", markersize=4, label=name)
        right.plot(AT, gates[name], mark + "-", markersize=4)
    left.axhline(untrained, color="black", linestyle="--", linewidth=1)
    left.set(xlabel="training step", ylabel="perplexity")
    left.legend(ncols=2)
    right.set(xlabel="training step", ylabel="λ, mean over heads and texts", ylim=(0, None))
    return Run(fig, {"steps": AT, "perplexity": lines, "gate": gates, "untrained": untrained})
