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

# PEFT's method_comparison: Llama-3.2-3B, 5,000 steps of 4 on MetaMathQA without gradient
# checkpointing, one run each of July 2026. {method: (adapted layers, accuracy on GSM8K, seconds, GB
# at the peak, forgetting: the rise of the loss on Wikipedia)}, read in huggingface/peft at commit
# 51c2ff666 of 20 July 2026. A LoRA has alpha = 2 r but rsLoRA, which has alpha = r = 64: its scale
# is 8, that of the others 2.
BENCHMARK: dict[str, tuple[str, float, int, float, float]] = {
    "LoRA, rank 32": ("q, v", 0.478, 942, 22.3, 0.050),
    "LoRA, rank 64": ("q, v", 0.474, 967, 22.6, 0.059),
    "LoRA, rank 10, MLP": ("MLP", 0.494, 1050, 24.7, 0.032),
    "rsLoRA, rank 64": ("q, v", 0.513, 966, 22.6, 0.111),
    "DoRA, rank 32": ("q, v", 0.469, 1191, 24.5, 0.051),
    "full fine-tuning, 1e-5": ("all", 0.472, 2147, 38.9, 0.030),
    "SHiRA": ("q, v", 0.510, 1003, 21.7, 0.052),
    "OFT": ("q, v", 0.491, 1192, 22.3, 0.041),
    "Lily, MLP": ("MLP", 0.526, 1324, 25.6, 0.216),
    "MiSS": ("q, v", 0.487, 897, 20.3, 0.197),
    "AdaLoRA": ("q, v", 0.373, 1169, 22.8, 0.022),
    "prefix, 50 tokens": ("–", 0.416, 878, 20.6, 0.198),
    "prompt": ("–", 0.343, 1429, 24.4, 0.145),
    "(IA)³, default 1e-4": ("k, v, down", 0.311, 987, 23.2, 0.019),
    "(IA)³, 1e-3": ("k, v, down", 0.398, 944, 23.2, 0.050),
    "(IA)³, attention, 5e-3": ("attention, MLP", 0.455, 1060, 26.1, 0.314),
}
# (GB at the peak, accuracy in %) of all 63 results, at commit 5d602fdbf of 21 August 2026.
# fmt: off
EVERY_RUN: tuple[tuple[float, float], ...] = (
    (20.1, 0.5), (20.1, 1.2), (20.2, 32.1), (20.2, 38.0), (20.3, 34.5), (20.3, 48.7),
    (20.6, 41.6), (20.8, 45.0), (20.9, 24.6), (20.9, 35.0), (21.2, 0.0), (21.5, 37.1),
    (21.5, 41.8), (21.5, 43.4), (21.6, 35.4), (21.6, 35.6), (21.7, 51.0), (22.0, 18.6),
    (22.0, 35.8), (22.0, 44.9), (22.1, 48.7), (22.2, 33.4), (22.2, 35.3), (22.2, 40.4),
    (22.2, 43.1), (22.3, 0.2), (22.3, 47.8), (22.3, 49.1), (22.3, 49.5), (22.4, 46.8),
    (22.5, 21.2), (22.5, 38.4), (22.6, 47.4), (22.6, 51.3), (22.8, 37.3), (22.8, 38.5),
    (22.8, 47.8), (23.2, 31.1), (23.2, 39.8), (23.5, 50.5), (23.5, 50.9), (23.6, 46.6),
    (23.6, 48.2), (23.6, 51.3), (23.7, 0.0), (23.7, 9.6), (23.9, 27.1), (23.9, 39.3), (24.4, 5.7),
    (24.4, 23.4), (24.4, 34.3), (24.5, 46.9), (24.7, 34.3), (24.7, 48.7), (24.7, 49.4),
    (24.9, 40.3), (25.1, 39.7), (25.2, 44.9), (25.2, 50.4), (25.6, 52.6), (26.1, 45.5),
    (38.5, 42.7), (38.9, 47.2),
)
# fmt: on
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
    left out, and so is one with a diverged run at its learning rate. Raises ValueError for another
    task."""
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
    definitions: the base, and every method with at least three seeds at that rate. Until LoRA and
    another method have them, every method with its run of seed 0.

    runs: those of data/results/assistant_study.csv unless given."""
    runs = load_results("assistant_study") if runs is None else runs
    found = {}
    for name in ASSISTANT:
        tried = runs[runs["method"] == name]
        if any(map(math.isfinite, tried.loc[tried["seed"] == 0, "validation"])):
            found[name] = best_lr(tried)[1]
    whole = {name: at for name, at in found.items() if name == "base" or len(at) >= 3}
    if "lora" in whole and len(whole) > 1 + ("base" in whole):
        return whole
    return {name: at[at["seed"] == 0] for name, at in found.items()}


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
        layers, accuracy, seconds, gigabytes, forgetting = BENCHMARK[name]
        lines.append(
            {
                "Llama-3.2-3B, MetaMathQA": name,
                "adapted": layers,
                "GSM8K": 100 * accuracy,
                "seconds": seconds,
                "peak": gigabytes,
                "forgetting": forgetting,
            }
        )
    p = BENCHMARK["LoRA, rank 32"][1]
    noise = 200 * math.sqrt(2 * p * (1 - p) / QUESTIONS)
    return table(
        lines,
        {"GSM8K": "{:.1f} %", "peak": "{:.1f} GB", "forgetting": "{:.3f}"},
        note=f"PEFT's method_comparison, July 2026, commit 51c2ff666; one run each, no "
        f"checkpointing;\ntwo accuracies that differ by less than {noise:.1f} points are within "
        "the noise; forgetting: rise\nof the loss on Wikipedia",
    )


_NAMED = tuple(BENCHMARK)[:6]


def _published(kind: str) -> tuple[str, Table]:
    task = "" if kind == "generation" else " It generates text, and yours is a classifier."
    sentence = (
        "The measured model nearest in size is Llama-3.2-3B in PEFT's benchmark of July 2026. It "
        "has no LoRA on all linear layers. LoRA, DoRA and full fine-tuning lie within its noise. "
        "Schulman et al. (2025) found LoRA on all layers level with full fine-tuning on small and "
        "medium instruction sets." + task
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
