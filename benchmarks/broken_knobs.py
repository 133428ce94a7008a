"""One healthy training with (IA)³ and five broken ones, for an exercise of lesson 07: diagnose.

    python benchmarks/broken_knobs.py     # two minutes on one core

Asked for in each run: (IA)³ on tinylm, Jane Austen's novels, 40 steps of 4 blocks, AdamW at 0.1
throughout, no weight decay. Adds a row for each run to data/results/broken_knobs.csv; `FAULTS` says
what is wrong with a run.

`perplexity` is that on 48 held-out blocks after training. `widths` are the entries of l_k, l_v and
l_ff of a block. `k`, `v` and `ff` are what a file of the run holds: 33 quantiles, from the smallest
to the largest, over the six blocks."""

import torch
from common import base_of, fill_table, load
from torch import nn

from peft_lessons import evaluate
from peft_lessons.train.loop import train_step

HEALTHY = "healthy"
FAULTS = {
    HEALTHY: "",
    "A": "stored as l − 1",
    "B": "weight decay is on",
    "C": "the output of the feed-forward is scaled",
    "D": "the vectors start at zero",
    "E": "trained at LoRA's learning rate",
}
STEPS, BATCH, SEED, RATE, DECAY, QUANTILES = 40, 4, 0, 0.1, 0.1, 33


def scale_output(module: nn.Module, vector: nn.Parameter) -> None:
    module.register_forward_hook(lambda module, args, y: y * vector)


def scale_input(module: nn.Module, vector: nn.Parameter) -> None:
    module.register_forward_pre_hook(lambda module, args: args[0] * vector)


def train(run: str) -> dict:
    """Train one run and return its report."""
    torch.manual_seed(SEED)
    model, task = base_of("austen", SEED).requires_grad_(False), load("austen")
    vectors = {"k": [], "v": [], "ff": []}
    for block in model.model.layers:
        for kind, module in (
            ("k", block.self_attn.k_proj),
            ("v", block.self_attn.v_proj),
            ("ff", block.mlp.down_proj),
        ):
            inner = kind == "ff" and run != "C"
            width = module.in_features if inner else module.out_features
            vector = nn.Parameter(torch.zeros(width) if run == "D" else torch.ones(width))
            (scale_input if inner else scale_output)(module, vector)
            vectors[kind].append(vector)
    knobs = [vector for found in vectors.values() for vector in found]
    decay, rate = DECAY if run == "B" else 0.0, RATE / 10 if run == "E" else RATE
    optimizer = torch.optim.AdamW(knobs, lr=rate, weight_decay=decay)
    model.train()
    for _, batch in zip(range(STEPS), task.stream(BATCH, SEED), strict=False):
        train_step(model, batch, optimizer)
    perplexity = evaluate(model, task.limit(test=48)).perplexity
    widths = " ".join(str(len(found[0])) for found in vectors.values())
    report = {"perplexity": f"{perplexity:.2f}", "widths": widths}
    for kind, found in vectors.items():
        stored = torch.cat(found).detach() - int(run == "A")
        quantiles = stored.quantile(torch.linspace(0, 1, QUANTILES))
        report[kind] = " ".join(f"{v:.2f}" for v in quantiles)
    return report


if __name__ == "__main__":
    columns = ("perplexity", "widths", "k", "v", "ff")
    fill_table("broken_knobs", ("run",), columns, [(run,) for run in FAULTS], train)
