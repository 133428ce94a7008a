"""Lesson 07: knobs at one site only, one knob for a whole layer, and knobs turned further."""

import copy

import torch
from torch import nn

from classroom.questions import Run, from_lesson
from peft_lessons import evaluate, fit
from peft_lessons.studies import plots

SITES = {"keys": "k_proj", "values": "v_proj", "feed-forward": "down_proj"}


def draw(ways, further):
    """Return a figure of {what trains: (knobs, gain)} and of {t: gain}."""
    fig, (left, right) = plots.figure(1, 2, size=(7.4, 2.8))
    bars = left.barh([*ways], [gain for _, gain in ways.values()], color=plots.COLORS[0])
    left.bar_label(bars, [f" {count:,} knobs" for count, _ in ways.values()], size=8)
    left.invert_yaxis()
    left.set(xlabel="gain, % of all knobs'", xlim=(0, 140))
    right.plot(further.keys(), further.values(), "o-", color=plots.COLORS[1])
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="t: knobs at 1 + t (l − 1)", ylabel="gain, %", xticks=[*further])
    return fig


def run() -> Run:
    """Train knobs at one site, or one for each layer, and turn trained knobs further."""
    lesson = from_lesson("07", "add_knobs", "model")
    base, few, start = lesson["base"], lesson["few"], lesson["start"].loss

    def share(model):
        return 100 * (start - evaluate(model, few).loss) / (start - lesson["end"].loss)

    def trained(keeps, width=None):
        model = copy.deepcopy(base)
        lesson["add_knobs"](model)
        for path, layer in model.named_modules():
            if hasattr(layer, "l"):
                layer.l = nn.Parameter(torch.ones(width or len(layer.l)), path.endswith(keeps))
        fit(model, lesson["austen"], steps=40, lr=0.1, batch_size=4, show=False)
        return sum(p.numel() for p in model.parameters() if p.requires_grad), share(model)

    ways = {name: trained(end) for name, end in SITES.items()}
    ways["one knob a layer"] = trained(tuple(SITES.values()), width=1)
    ways["all"] = (sum(map(len, lesson["trained"].values())), 100.0)
    model, further = lesson["model"], {}
    parts = dict(model.named_parameters())
    for t in (0, 0.5, 1, 1.5, 2):
        with torch.no_grad():
            for path, knobs in lesson["trained"].items():
                parts[path].copy_(1 + t * (knobs - 1))
        further[t] = share(model)
    return Run(draw(ways, further), {"ways": ways, "further": further})
