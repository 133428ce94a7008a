"""What the additive methods cost: a training step, and the latency of the trained model.

    python benchmarks/additive_cost.py         # five minutes on one core, else idle

One row for each base and method, all of one base measured in one process by turns, to
data/results/additive_cost.csv: median seconds of a step and the most bytes it held beyond what lay
there before it, the bytes of the saved adapter, and median seconds of an answer without gradients,
for a batch of 1 and of 32.

minilm: steps on 16 movie sentences of up to 64 tokens, an answer is one forward of 32 tokens.
tinylm: steps on 4 texts of 128 tokens, an answer is 32 new tokens after 32.
"""

import itertools
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from additive_study import IA3S, PROJECTION, P
from common import Results, by_turns, stepper
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from peft_lessons import (
    BottleneckAdapter,
    LoRA,
    Prefix,
    Prompt,
    inject,
    injection_of,
    load_model,
    load_task,
    measure,
    merge,
    save_adapter,
    unload,
)

ROUNDS, TOKENS = 9, 32
TASKS = {"minilm": ("sentiment", 16), "tinylm": ("austen", 4)}
QV = {"minilm": ("query", "value"), "tinylm": ("q_proj", "v_proj")}
COLUMNS = (
    *("base", "method", "whose", "trainable", "file_bytes"),
    *("seconds", "peak_bytes", "latency_1", "latency_32"),
)


def untrained(name: str) -> torch.nn.Module:
    return load_model(name, labels=2 if name == "minilm" else None)


def ours(name: str) -> dict[str, torch.nn.Module]:
    """The base, and copies of it with each method in it."""
    methods = {
        "lora": LoRA(rank=8, alpha=16, targets=QV[name]),
        "lora, all linear": LoRA(rank=8, alpha=16),
        "houlsby": BottleneckAdapter(16, kind="houlsby"),
        "pfeiffer": BottleneckAdapter(32),
        "parallel": BottleneckAdapter(32, kind="parallel"),
        "ia3": IA3S[TASKS[name][0]],
        "prompt": Prompt(P),
        "prefix": Prefix(P),
        "prefix, mlp": Prefix(P, projection=PROJECTION),
    }
    models = {"full": untrained(name)} | {method: untrained(name) for method in methods}
    for method, model in models.items():
        if method in methods:
            inject(model, methods[method])
    return models


def theirs(name: str) -> dict[str, torch.nn.Module]:
    """PEFT's, where it has the method."""
    kind = "SEQ_CLS" if name == "minilm" else "CAUSAL_LM"
    ia3, virtual = IA3S[TASKS[name][0]], {"task_type": kind, "num_virtual_tokens": P}
    configs = {
        "ia3": IA3Config(
            task_type=kind,
            target_modules=ia3.targets,
            feedforward_modules=ia3.feedforward,
        ),
        "prompt": PromptTuningConfig(**virtual),
        "prefix": PrefixTuningConfig(**virtual),
    }
    return {method: get_peft_model(untrained(name), config) for method, config in configs.items()}


def answer(name: str, model: torch.nn.Module, rows: int):
    """A function that runs the model without gradients, in eval mode."""
    ids = torch.arange(rows * TOKENS).view(rows, TOKENS) % 1000 + 1000
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}

    @torch.inference_mode()
    def run():
        model.eval()
        model(**inputs) if name == "minilm" else model.generate(**inputs, **more, pad_token_id=0)

    return run


def file_bytes(model: torch.nn.Module) -> int:
    if injection_of(model) is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def main() -> None:
    torch.set_num_threads(1)
    results = Results("additive_cost", COLUMNS, anew=True)
    for name, (task, size) in TASKS.items():
        batches = list(itertools.islice(load_task(task).stream(size, seed=0), ROUNDS))
        models = {(method, "ours"): model for method, model in ours(name).items()}
        models |= {(method, "PEFT"): model for method, model in theirs(name).items()}
        steps = {way: stepper(model, batches) for way, model in models.items()}
        seconds = by_turns(steps, ROUNDS)
        peaks = {way: measure.peak_bytes(step) for way, step in steps.items()}
        trained = {way: measure.parameters(model).trainable for way, model in models.items()}
        files = {way: file_bytes(model) for way, model in models.items()}
        del steps
        for method in ("lora", "lora, all linear", "ia3"):
            models[f"{method}, merged", "ours"] = merged = deepcopy(models[method, "ours"])
            merge(merged)
            unload(merged)  # the plain base with other weights, no wrapper left
        latency = {
            rows: by_turns({way: answer(name, m, rows) for way, m in models.items()}, rounds)
            for rows, rounds in ((1, 4 * ROUNDS), (32, ROUNDS))
        }
        for way in models:
            row = {"base": name, "method": way[0], "whose": way[1]}
            row |= {"trainable": trained.get(way, 0), "file_bytes": files.get(way, 0)}
            row |= {"seconds": f"{seconds.get(way, 0):.4f}", "peak_bytes": peaks.get(way, 0)}
            row |= {f"latency_{n}": f"{latency[n][way]:.5f}" for n in latency}
            results.add(**row)
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
