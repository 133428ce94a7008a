"""Magnitude against direction: how full fine-tuning, LoRA and DoRA change the same weights.

    python benchmarks/dora_analysis.py             # half an hour on one core

Trains minilm on movie sentiment and adds a row for each query and value weight at each of four
checkpoints to data/results/dora_analysis.csv: delta_m and delta_d as in section 3.2 of the DoRA
paper (Liu et al. 2024), the mean change of its rows' lengths and the mean of 1 - cosine of its rows
before and after. Full fine-tuning moves everything; LoRA and DoRA these weights only. What random
changes of the same weights give, from small to large, goes to dora_random.csv.

Why DoRA survives a learning rate at which LoRA breaks down is measured in dora_norms.csv: a row
every ten steps, each number a mean over the rows of all adapted weights. `norm` is ‖V‖ / ‖W‖ with
V = W + s·BA; `length` is the length of the rows that the layer multiplies by, as a share of ‖W‖
(m / ‖W‖ in DoRA, the same as `norm` in LoRA); `turned` is the angle in degrees between V and W;
`turn` is the angle that V turned in these ten steps, `loss` the mean training loss of these steps.
"""

from dataclasses import dataclass

import torch
from catalogue import setting
from common import RUN, SEEDS, base_of, fill_table, load
from dora_study import build

from peft_lessons import fit, inject
from peft_lessons.engine import injection_of

STEPS, EVERY, TARGETS = 200, 50, ("query", "value")
RUNS = {"full": (1e-4,), "lora": (1e-3, 3e-3), "dora": (1e-3, 3e-3)}
# Of random changes, as shares of the weight.
SIZES = {f"{size:.4g}": size for size in torch.logspace(-2.4, -0.4, 12).tolist()}
NORM_RATE = 1e-2  # which breaks LoRA
NORM_EVERY = 10
KEY = ("method", *RUN)
NORM_COLUMNS = ("step", "norm", "length", "turned", "turn", "loss")
COLUMNS = ("step", "layer", "module", "delta_m", "delta_d")
RANDOM_COLUMNS = ("layer", "module", "length", "delta_m", "delta_d")


@dataclass
class Watched:
    """A task that calls `look` with the number of steps done before it hands out a batch."""

    task: object
    look: object

    def __getattr__(self, name):
        return getattr(self.task, name)

    def stream(self, *args, **settings):
        for done, batch in enumerate(self.task.stream(*args, **settings)):
            self.look(done)
            yield batch


def weights(model) -> dict[str, torch.Tensor]:
    """Return the weights of all targets in double precision: 1 - cosine may be as small as 1e-5."""
    if injection := injection_of(model):
        tensors = {p: w.merged_tensors()[0] for p, w in injection.wrappers.items()}
    else:
        named = model.named_modules()
        tensors = {p: m.weight for p, m in named if p.rpartition(".")[2] in TARGETS}
    return {path: weight.detach().double().clone() for path, weight in tensors.items()}


def changes(before: torch.Tensor, after: torch.Tensor) -> dict[str, str]:
    lengths = after.norm(dim=1) - before.norm(dim=1)  # (out,)
    cosines = torch.cosine_similarity(before, after, dim=1)  # (out,)
    delta_m, delta_d = lengths.abs().mean(), (1 - cosines).mean()
    return {"delta_m": f"{delta_m:.6e}", "delta_d": f"{delta_d:.6e}"}


def place_of(path: str) -> dict:
    layer = int(path.partition(".layer.")[2].split(".")[0])
    return {"layer": layer, "module": path.rpartition(".")[2]}


def random_changes(size: str) -> list[dict]:
    """Change every weight at random, by a share of its norm, and return a row for each."""
    rows = []
    torch.manual_seed(0)
    for path, weight in weights(base_of("sentiment", 0)).items():
        noise = SIZES[size] * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
        length = {"length": f"{weight.norm(dim=1).mean():.6f}"}
        rows.append(place_of(path) | length | changes(weight, weight + noise))
    return rows


def degrees(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    cosines = torch.cosine_similarity(one, other, dim=1).clamp(-1, 1)  # (out,)
    return torch.rad2deg(torch.arccos(cosines))


def directions(model) -> dict[str, torch.Tensor]:
    """Return V of all targets in double precision."""
    tensors = {}
    for path, wrapper in injection_of(model).wrappers.items():
        layer = getattr(wrapper, "dora", None) or wrapper.lora
        tensors[path] = (wrapper.base.weight + layer.delta_weight()).detach().double()
    return tensors


def norms(method: str, lr: float, seed: int) -> list[dict]:
    """Train one point and return a row for every ten steps."""
    base, rows, seen = weights(base_of("sentiment", seed)), [], {}
    model = build(method, 8, seed)

    def look(step):
        if step % NORM_EVERY:
            return
        V, adapted = directions(model), weights(model)

        def mean(measure):  # over the rows of all weights
            return f"{torch.cat([measure(path) for path in V]).mean().item():.5g}"

        length = {path: weight.norm(dim=1) for path, weight in base.items()}
        rows.append(
            {
                "step": step,
                "norm": mean(lambda p: V[p].norm(dim=1) / length[p]),
                "length": mean(lambda p: adapted[p].norm(dim=1) / length[p]),
                "turned": mean(lambda p: degrees(V[p], base[p])),
                "turn": mean(lambda p: degrees(V[p], seen.get(p, V[p]))),
            }
        )
        seen.update(V)

    task = Watched(load("sentiment"), look)
    losses = fit(model, task, STEPS, lr=lr, seed=seed, show=False).loss
    look(STEPS)
    for row in rows:
        lately = losses[max(0, row["step"] - NORM_EVERY) : max(1, row["step"])]
        row["loss"] = f"{sum(lately) / len(lately):.5g}"
    return rows


def analysis(method: str, lr: float, seed: int) -> list[dict]:
    """Train one point and return a row for every weight at every checkpoint."""
    model, rows = base_of("sentiment", seed), []
    base = weights(model)
    if method != "full":
        inject(model, setting(method, "sentiment"))

    def look(step):
        if step and step % EVERY == 0:
            for path, weight in weights(model).items():
                rows.append({"step": step} | place_of(path) | changes(base[path], weight))

    fit(model, Watched(load("sentiment"), look), STEPS, lr=lr, seed=seed, show=False)
    look(STEPS)
    return rows


if __name__ == "__main__":
    sizes = [(size,) for size in SIZES]
    fill_table("dora_random", ("size",), RANDOM_COLUMNS, sizes, random_changes)
    ways = ("lora", "dora", "dora, m frozen")
    watched = [(way, NORM_RATE, seed) for seed in SEEDS for way in ways]
    fill_table("dora_norms", KEY, NORM_COLUMNS, watched, norms)
    runs = [(method, lr, seed) for seed in SEEDS for method, rates in RUNS.items() for lr in rates]
    fill_table("dora_analysis", KEY, COLUMNS, runs, analysis)
