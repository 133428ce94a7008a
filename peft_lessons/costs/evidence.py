"""Show what was measured on models near a given size: evidence for the advice of `recommend`.

Three of the course's own studies and one published benchmark. A ranking of small models says little
about a large one, so `evidence` takes the model that is nearest in size, and says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..studies import (
    Table,
    best_lr,
    load_results,
    mean_and_range,
    paired_losses,
    provenance,
    table,
)

if TYPE_CHECKING:
    from pandas import DataFrame

# PEFT's method_comparison: Llama-3.2-3B, 5,000 steps of 4 on MetaMathQA, one run each of 14 or 15
# July 2026. {method: (accuracy on GSM8K, seconds, GB at the peak, forgetting: the rise of the loss
# on Wikipedia)}, read in huggingface/peft at commit 51c2ff666 of 20 July 2026.
BENCHMARK: dict[str, tuple[float, int, float, float]] = {
    "LoRA, rank 32": (0.478, 942, 22.3, 0.050),
    "rsLoRA, rank 64": (0.513, 966, 22.6, 0.111),
    "SHiRA": (0.510, 1003, 21.7, 0.052),
    "OFT": (0.491, 1192, 22.3, 0.041),
    "full fine-tuning, 1e-5": (0.472, 2147, 38.9, 0.030),
    "DoRA, rank 32": (0.469, 1191, 24.5, 0.051),
    "(IA)³, attention, 5e-3": (0.455, 1060, 26.1, 0.314),
    "prefix, 50 tokens": (0.416, 878, 20.6, 0.198),
    "(IA)³, 1e-3": (0.398, 944, 23.2, 0.050),
    "AdaLoRA": (0.373, 1169, 22.8, 0.022),
    "prompt": (0.343, 1429, 24.4, 0.145),
    "(IA)³, default 1e-4": (0.311, 987, 23.2, 0.019),
}
QUESTIONS = 1319  # of GSM8K's test split
# {model: billions of parameters}; from one to the next at the geometric mean.
MINILM, TINYLM, SMOLLM2, LLAMA = 0.0226, 0.0032, 0.135, 3.2
# {method of assistant_study.csv: its name in a table}
ASSISTANT = {
    "base": "base, untouched",
    "lora": "LoRA",
    "full": "full fine-tuning",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "rslora": "rsLoRA, rank 64",
    "lora, rank 64": "LoRA, rank 64",
    "lora, query and value": "LoRA, query and value",
    "last two": "last two blocks",
    "ia3": "(IA)³",
    "prompt": "prompt",
}


# ------------------------------------------------------------------ two small models


def study(task: str, runs: DataFrame | None = None) -> dict[int, dict[str, DataFrame]]:
    """Return {examples: {method: its runs at its best learning rate}} of "sentiment" or "austen".

    runs: those of data/results/choosing_study.csv unless given. A method without a run of seed 0 is
    left out, and one of which a run at its rate diverged. Raises ValueError for another task."""
    if task not in ("sentiment", "austen"):
        raise ValueError(f"task={task!r} must be one of 'sentiment', 'austen'")
    runs = load_results("choosing_study") if runs is None else runs
    sizes: dict[int, dict[str, DataFrame]] = {}
    for (size, name), tried in runs[runs["task"] == task].groupby(["examples", "method"]):
        methods = sizes.setdefault(size, {})
        first = tried.loc[tried["seed"] == 0, "validation"]
        if any(map(math.isfinite, first)):
            at_best = best_lr(tried)[1]
            if all(map(math.isfinite, at_best["test"])):
                methods[name] = at_best
    return sizes


_stored = cache(study)  # one recommendation after another reads the same table


def nearest_size(sizes: Sequence[int], examples: int) -> int:
    """Return the size of the study with the nearest ratio to `examples`; of two, the smaller."""
    return min(sorted(sizes), key=lambda size: max(size, examples) / min(size, examples))


def _small(task: str, examples: int, names: Mapping[str, str]) -> tuple[str, Table]:
    sizes = _stored(task)
    size = nearest_size(list(sizes), examples)
    found = {name: sizes[size][way] for name, way in names.items() if way in sizes[size]}
    scale, heading, model, texts = {
        "sentiment": (100, "test accuracy, %", "minilm, 22.6 million", "movie sentences"),
        "austen": (1, "test perplexity", "tinylm, 3.2 million", "blocks of Jane Austen's novels"),
    }[task]
    lines = [
        {
            f"{model}, {size:,} examples": name,
            "trainable": runs["trainable"].iloc[0],
            "learning rate": runs["lr"].iloc[0],
            heading: mean_and_range(runs, "test", scale),
        }
        for name, runs in found.items()
    ]
    sentence = (
        f"The measured model nearest in size is {model} parameters, on {size:,} {texts}. Each "
        "method there has its own best learning rate."
    )
    shown = table(lines, {"learning rate": "{:g}"}, note=provenance(*found.values()))
    return sentence, shown


# ------------------------------------------------------------------ the assistant


def assistant_runs(runs: DataFrame | None = None) -> dict[str, DataFrame]:
    """Return {method: its runs at its best learning rate} of SmolLM2-135M-Instruct that learns
    definitions: the base, and every method with at least three seeds at that rate, or with as many
    as LoRA has.

    runs: those of data/results/assistant_study.csv unless given."""
    runs = load_results("assistant_study") if runs is None else runs
    found = {}
    for name in ASSISTANT:
        tried = runs[runs["method"] == name]
        if any(map(math.isfinite, tried.loc[tried["seed"] == 0, "validation"])):
            found[name] = best_lr(tried)[1]
    least = min(3, len(found.get("lora", ())))
    return {name: at for name, at in found.items() if name == "base" or len(at) >= least}


def assistant_table(runs: DataFrame | None = None) -> Table:
    """Return a table of `assistant_runs`: the loss on the test answers, how far it is above LoRA's
    on the same answers, and the perplexity of a text that no training has seen.

    Raises ValueError without a run of LoRA."""
    found = assistant_runs(runs)
    if "lora" not in found:
        raise ValueError("assistant_study: there is no run of LoRA to compare with")
    lines = []
    for name, at_best in found.items():
        lines.append(
            {
                "SmolLM2-135M": ASSISTANT[name],
                "trainable": at_best["trainable"].iloc[0] or None,
                "learning rate": at_best["lr"].iloc[0] or None,
                "seeds": len(at_best),
                "test loss, nats": at_best["test"].mean(),
                "above LoRA, nats × 100": None
                if name == "lora"
                else paired_losses(at_best, found["lora"]),
                "Austen, perplexity": at_best["memory"].mean(),
            }
        )
    formats = {"learning rate": "{:g}", "test loss, nats": "{:.3f}", "Austen, perplexity": "{:.1f}"}
    return table(lines, formats, note=provenance(*found.values()))


# ------------------------------------------------------------------ the benchmark


def benchmark_table(names: Sequence[str] = tuple(BENCHMARK)) -> Table:
    """Return a table of some rows of `BENCHMARK`."""
    lines = []
    for name in names:
        accuracy, seconds, gigabytes, forgetting = BENCHMARK[name]
        lines.append(
            {
                "Llama-3.2-3B, MetaMathQA": name,
                "GSM8K": 100 * accuracy,
                "seconds": seconds,
                "peak": gigabytes,
                "forgetting": forgetting,
            }
        )
    p = BENCHMARK["LoRA, rank 32"][0]
    error = 100 * math.sqrt(p * (1 - p) / QUESTIONS)
    return table(
        lines,
        {"GSM8K": "{:.1f} %", "peak": "{:.1f} GB", "forgetting": "{:.3f}"},
        note=f"PEFT's method_comparison, July 2026, commit 51c2ff666; one run each\n"
        f"standard error of an accuracy {error:.1f} points; forgetting: rise of the loss on "
        "Wikipedia",
    )


_NAMED = (
    "LoRA, rank 32",
    "rsLoRA, rank 64",
    "full fine-tuning, 1e-5",
    "DoRA, rank 32",
    "(IA)³, 1e-3",
    "AdaLoRA",
)


def _published(kind: str) -> tuple[str, Table]:
    task = "" if kind == "generation" else " It generates text, and yours is a classifier."
    sentence = (
        "The measured model nearest in size is Llama-3.2-3B in PEFT's benchmark of July 2026. "
        "There LoRA, DoRA and full fine-tuning lie within the noise, and AdaLoRA at LoRA's "
        "learning rate lies far behind. Schulman et al. (2025) found LoRA level with full "
        "fine-tuning on small and medium instruction sets." + task
    )
    return sentence, benchmark_table(_NAMED)


def evidence(
    kind: str, model_size_b: float, examples: int, names: Mapping[str, str]
) -> tuple[str, Table]:
    """Return a sentence and a table of what was measured nearest in size.

    kind: "classification" or "generation". names: {name of a method: its name in the study of the
    two small models}."""
    small = MINILM if kind == "classification" else TINYLM
    if kind == "generation" and model_size_b < math.sqrt(small * SMOLLM2):
        return _small("austen", examples, names)
    if kind == "classification" and model_size_b < math.sqrt(small * LLAMA):
        return _small("sentiment", examples, names)
    near_smollm2 = kind == "generation" and model_size_b < math.sqrt(SMOLLM2 * LLAMA)
    if near_smollm2 and "lora" in assistant_runs():
        return (
            "The measured model nearest in size is SmolLM2-135M, which learned definitions from "
            "320 examples in 40 steps. So short a run wants larger learning rates than a long one.",
            assistant_table(),
        )
    return _published(kind)
