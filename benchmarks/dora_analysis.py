"""Magnitude against direction: how full fine-tuning, LoRA and DoRA change the same weights.

    python benchmarks/dora_analysis.py             # a quarter of an hour on one core

Trains minilm on movie sentiment and adds a row for each query and value weight at each of four
checkpoints to data/results/dora_analysis.csv: delta_m and delta_d as in section 3.2 of the DoRA
paper (Liu et al. 2024), the mean change of its rows' lengths and the mean of 1 - cosine of its rows
before and after. Full fine-tuning moves everything; LoRA and DoRA these weights only. What random
changes of the same weights give, from small to large, goes to dora_random.csv.
"""

from dataclasses import dataclass

import torch
from common import SEEDS, Results, base_of, missing

from peft_lessons import fit, inject, load_task
from peft_lessons.engine import injection_of
from peft_lessons.studies.catalogue import setting

STEPS, EVERY, TARGETS = 200, 50, ("query", "value")
RUNS = {"full": (1e-4,), "lora": (1e-3, 3e-3), "dora": (1e-3, 3e-3)}
SIZES = torch.logspace(-2.4, -0.4, 12).tolist()  # of a random change, as a share of the weight
COLUMNS = ("method", "lr", "seed", "step", "layer", "module", "delta_m", "delta_d")
RANDOM_COLUMNS = ("size", "layer", "module", "length", "delta_m", "delta_d")


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
    """The weights of all targets in double precision: 1 - cosine may be as small as 1e-5."""
    if injection := injection_of(model):
        found = {p: w.merged_tensors()[0] for p, w in injection.wrappers.items()}
    else:
        named = model.named_modules()
        found = {p: m.weight for p, m in named if p.rpartition(".")[2] in TARGETS}
    return {path: weight.detach().double().clone() for path, weight in found.items()}


def changes(before: torch.Tensor, after: torch.Tensor) -> dict[str, str]:
    lengths = after.norm(dim=1) - before.norm(dim=1)  # (out,)
    cosines = torch.cosine_similarity(before, after, dim=1)  # (out,)
    delta_m, delta_d = lengths.abs().mean(), (1 - cosines).mean()
    return {"delta_m": f"{delta_m:.6e}", "delta_d": f"{delta_d:.6e}"}


def place_of(path: str) -> dict:
    layer = int(path.partition(".layer.")[2].split(".")[0])
    return {"layer": layer, "module": path.rpartition(".")[2]}


def random_changes() -> None:
    base = weights(base_of("sentiment", 0))
    if len(Results("dora_random", RANDOM_COLUMNS).rows()) == len(SIZES) * len(base):
        return
    results = Results("dora_random", RANDOM_COLUMNS, anew=True)  # seconds: no need to go on
    for size in SIZES:
        for path, weight in base.items():
            noise = size * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
            length = {"size": f"{size:.4g}", "length": f"{weight.norm(dim=1).mean():.6f}"}
            results.add(**length, **place_of(path), **changes(weight, weight + noise))


def main() -> None:
    torch.set_num_threads(1)
    random_changes()
    task, results = load_task("sentiment"), Results("dora_analysis", COLUMNS)
    runs = [(method, lr, seed) for seed in SEEDS for method, rates in RUNS.items() for lr in rates]
    for method, lr, seed in missing(results, ("method", "lr", "seed"), runs):
        model, rows = base_of("sentiment", seed), []
        base = weights(model)
        if method != "full":
            inject(model, setting(method, "sentiment"))

        def look(step, model=model, base=base, rows=rows):
            if step == 0 or step % EVERY:
                return
            for path, weight in weights(model).items():
                rows.append({"step": step} | place_of(path) | changes(base[path], weight))

        fit(model, Watched(task, look), STEPS, lr=lr, seed=seed, show=False)
        look(STEPS)
        for row in rows:  # all at the end: a run that was broken off leaves no part behind
            results.add(method=method, lr=lr, seed=seed, **row)
        print(method, lr, seed, rows[-1], flush=True)


if __name__ == "__main__":
    main()
