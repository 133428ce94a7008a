"""Measure what every method costs: a training step, the saved files, the use of the trained model.

    python benchmarks/costs.py                 # a quarter of an hour on one core, else idle

The rows go to data/results/costs.csv, one for each base and method and for the course's and PEFT's
implementation. All rows of a base are measured in one process by turns: median seconds of a step,
the additional peak memory of a step in bytes, the bytes of the saved adapter, and median seconds of
a forward pass or a generation without gradients, for one text and for 32.

minilm: steps on 16 movie sentences of up to 64 tokens, forward passes over 32 tokens.
tinylm: steps on 4 blocks of 128 tokens, generations of 32 tokens after a text of 32.

AdaLoRA's allocator is part of its step. `dora, with gradient` is DoRA of the course without the
detached norm.
"""

import itertools
from copy import deepcopy
from unittest import mock

import torch
from catalogue import BASES, setting
from common import base_of, fill_table, stepper
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

from peft_lessons import DoRALayer, freeze, inject, load_task, measure, merge, unload
from peft_lessons.engine import Method, find_targets, injection_of
from peft_lessons.testing import adapter_bytes

TASKS = {base: task for task, base in BASES.items()}
ROUNDS, TOKENS = 15, 32  # of an answer
ANSWERS = {"minilm": {1: 20, 32: 5}, "tinylm": {1: 20, 32: 15}}  # texts: rounds
BATCH = {"minilm": 16, "tinylm": 4}
# Long, so that all of the steps measured here fall into the pruning, and none is the last.
SCHEDULE = {"tinit": 1, "tfinal": 10, "delta": 5, "total_steps": 1000}
ADALORA = {"initial_rank": 8, "target_rank": 4} | SCHEDULE
AS_THEY_ARE = ("ia3", "prompt", "prefix", "prefix, mlp", "norms", "last two", "diff", "diff, fixed")
CHANGED = {
    "houlsby": {"width": 16},
    "pfeiffer": {"width": 32},
    "parallel": {"width": 32},
    "mixed": {"tokens": 16, "width": 32},
}
MERGED = ("lora", "lora, all linear", "ia3")
KEY = ("base",)
COLUMNS = (
    *("method", "whose", "trainable", "file_bytes"),
    *("seconds", "peak_bytes", "answer_1", "answer_32"),
)


def methods(task: str) -> dict[str, Method]:
    """Return the methods of the course on the base of a task, by the name of their row."""
    described = {}
    for suffix in ("", ", all linear"):
        described[f"lora{suffix}"] = lora = setting(f"lora{suffix}", task)
        described[f"dora{suffix}"] = setting(f"dora{suffix}", task)
        described[f"dora, with gradient{suffix}"] = setting(f"dora{suffix}", task)
        described[f"adalora{suffix}"] = setting("adalora", task, targets=lora.targets, **ADALORA)
    described |= {name: setting(name, task, **changes) for name, changes in CHANGED.items()}
    described |= {name: setting(name, task) for name in AS_THEY_ARE}
    return described | ({"bitfit": setting("bitfit", task)} if task == "sentiment" else {})


def ours(task: str) -> dict[str, torch.nn.Module]:
    """Return the base, all or only its head to train, and copies with each method in it."""
    models = {"full": base_of(task, 0)}
    if task == "sentiment":
        models["head"] = base_of(task, 0)
        freeze(models["head"])
    for name, method in methods(task).items():
        models[name] = base_of(task, 0)
        inject(models[name], method)
    return models


def theirs(task: str) -> dict[str, torch.nn.Module]:
    """Return the base with each method that PEFT has, too."""
    kind = "SEQ_CLS" if task == "sentiment" else "CAUSAL_LM"
    described, configs = methods(task), {}
    linear = find_targets(base_of(task, 0), "all-linear", (torch.nn.Linear,))
    for suffix, layers in (("", described["lora"].targets), (", all linear", linear)):
        factors = {"task_type": kind, "lora_alpha": 16, "target_modules": list(layers)}
        plan = {"tinit": 1, "tfinal": 10, "deltaT": 5, "total_step": 1000}
        configs |= {
            f"lora{suffix}": LoraConfig(r=8, **factors),
            f"dora{suffix}": LoraConfig(r=8, use_dora=True, **factors),
            f"adalora{suffix}": AdaLoraConfig(init_r=8, target_r=4, **plan, **factors),
        }
    ia3 = described["ia3"]
    scaled = {"target_modules": ia3.targets, "feedforward_modules": ia3.feedforward}
    configs["ia3"] = IA3Config(task_type=kind, **scaled)
    tokens = {"task_type": kind, "num_virtual_tokens": described["prompt"].tokens}
    configs |= {"prompt": PromptTuningConfig(**tokens), "prefix": PrefixTuningConfig(**tokens)}
    return {name: get_peft_model(base_of(task, 0), config) for name, config in configs.items()}


def with_gradient(layer: DoRALayer, weight: torch.Tensor) -> torch.Tensor:
    """Return the row norms of a DoRA layer, through which the gradient flows."""
    return torch.linalg.norm(layer.adapted(weight), dim=1)


def answer(base: str, model: torch.nn.Module, rows: int):
    """Return a function that runs the model without gradients, in eval mode."""
    ids = torch.arange(rows * TOKENS).view(rows, TOKENS) % 1000 + 1000
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}

    @torch.inference_mode()
    def run():
        model.eval()
        model(**inputs) if base == "minilm" else model.generate(**inputs, **more, pad_token_id=0)

    return run


def costs_of(
    base: str, models: dict[tuple[str, str], torch.nn.Module], merged: tuple[str, ...]
) -> list[dict]:
    """Measure models of one base by turns, {(method, whose): model}. Return a row for each, and for
    the course's own ones named in `merged` when they are merged."""
    batches = list(itertools.islice(load_task(TASKS[base]).stream(BATCH[base], seed=0), ROUNDS))
    steps = {way: stepper(model, batches) for way, model in models.items()}
    patched = mock.patch.object(DoRALayer, "row_norms", with_gradient)  # while a step runs
    steps |= {way: patched(step) for way, step in steps.items() if "with gradient" in way[0]}
    seconds = measure.by_turns(steps, ROUNDS)
    peaks = {way: measure.peak_bytes(step) for way, step in steps.items()}
    trained = {way: measure.parameters(model).trainable for way, model in models.items()}
    files = {way: adapter_bytes(m) for way, m in models.items() if injection_of(m)}
    del steps
    models = dict(models)
    for method in merged:
        models[f"{method}, merged", "ours"] = plain = deepcopy(models[method, "ours"])
        merge(plain)
        unload(plain)  # the plain base with other weights, no wrapper left
    latency = {
        rows: measure.by_turns({way: answer(base, m, rows) for way, m in models.items()}, n)
        for rows, n in ANSWERS[base].items()
    }
    rows = []
    for way in models:
        row = {"method": way[0], "whose": way[1]}
        row |= {"trainable": trained.get(way, 0), "file_bytes": files.get(way, 0)}
        row |= {"seconds": f"{seconds.get(way, 0):.4f}", "peak_bytes": peaks.get(way, 0)}
        row |= {f"answer_{n}": f"{latency[n][way]:.5f}" for n in latency}
        rows.append(row)
    return rows


def run(base: str) -> list[dict]:
    """Measure all methods on a base, the course's and PEFT's."""
    models = {(method, "ours"): model for method, model in ours(TASKS[base]).items()}
    models |= {(method, "PEFT"): model for method, model in theirs(TASKS[base]).items()}
    return costs_of(base, models, MERGED)


if __name__ == "__main__":
    fill_table("costs", KEY, COLUMNS, [(base,) for base in TASKS], run, anew=True)
