"""Magnitude against direction: how full fine-tuning, LoRA and DoRA change the same weights.

    python benchmarks/dora_analysis.py             # twenty minutes on one core

Trains minilm on movie sentiment and adds a row for each query and value weight at each of four
checkpoints to data/results/dora_analysis.csv: delta_m and delta_d as in section 3.2 of the DoRA
paper (Liu et al. 2024), the mean change of its rows' lengths and the mean of 1 - cosine of its rows
before and after. Full fine-tuning moves everything; LoRA and DoRA these weights only. What random
changes of the same weights give, from small to large, goes to dora_random.csv.
"""

from dataclasses import dataclass

import torch
from catalogue import setting
from common import RUN, SEEDS, base_of, fill_table, load

from peft_lessons import fit, inject
from peft_lessons.engine import injection_of

STEPS, EVERY, TARGETS = 200, 50, ("query", "value")
RUNS = {"full": (1e-4,), "lora": (1e-3, 3e-3), "dora": (1e-3, 3e-3)}
# Of random changes, as shares of the weight.
SIZES = {f"{size:.4g}": size for size in torch.logspace(-2.4, -0.4, 12).tolist()}
KEY = ("method", *RUN)
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
    runs = [(method, lr, seed) for seed in SEEDS for method, rates in RUNS.items() for lr in rates]
    fill_table("dora_analysis", KEY, COLUMNS, runs, analysis)
