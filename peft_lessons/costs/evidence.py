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

QUESTIONS = 1319  # of GSM8K's test split
# {model: billions of parameters}; from one to the next at the geometric mean.
MINILM, TINYLM, SMOLLM2, LLAMA = 0.0226, 0.0032, 0.135, 3.2
# {method of assistant_study.csv: its name in a table}, in the order of the table.
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
    measured = {name: sizes[size][way] for name, way in names.items() if way in sizes[size]}
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
        for name, runs in measured.items()
    ]
    sentence = (
        f"The measured model nearest in size is {model} parameters, on {size:,} {texts}. Each "
        "method there has its own best learning rate."
    )
    note = provenance(*measured.values())
    return sentence, table(lines, {"learning rate": "{:g}"}, note=note)


# ------------------------------------------------------------------ the assistant


def assistant_runs(runs: DataFrame | None = None) -> dict[str, DataFrame]:
    """Return {method: its runs at its best learning rate} of SmolLM2-135M-Instruct that learns
    definitions: the base, and every method with at least three seeds at that rate. Until LoRA and
    another method have them, every method with its run of seed 0.

    runs: those of data/results/assistant_study.csv unless given."""
    runs = load_results("assistant_study") if runs is None else runs
    at_best = {}
    for name in ASSISTANT:
        tried = runs[runs["method"] == name]
        if any(map(math.isfinite, tried.loc[tried["seed"] == 0, "validation"])):
            at_best[name] = best_lr(tried)[1]
    complete = {name: at for name, at in at_best.items() if name == "base" or len(at) >= 3}
    if "lora" in complete and len(complete) > 1 + ("base" in complete):
        return complete
    return {name: at[at["seed"] == 0] for name, at in at_best.items()}


def assistant_table(runs: DataFrame | None = None) -> Table:
    """Return a table of `assistant_runs`: the loss on the test answers, how far it is above LoRA's
    on the same answers, and the perplexity of a text that no training has seen.

    Raises ValueError without a run of LoRA."""
    methods = assistant_runs(runs)
    if "lora" not in methods:
        raise ValueError("assistant_study: there is no run of LoRA to compare with")
    lines = []
    for name, at_best in methods.items():
        lines.append(
            {
                "SmolLM2-135M": ASSISTANT[name],
                "trainable": at_best["trainable"].iloc[0] or None,
                "learning rate": at_best["lr"].iloc[0] or None,
                "seeds": len(at_best),
                "test loss, nats": at_best["test"].mean(),
                "above LoRA, nats × 100": None
                if name == "lora"
                else paired_losses(at_best, methods["lora"]),
                "Austen, perplexity": at_best["memory"].mean(),
            }
        )
    formats = {"learning rate": "{:g}", "test loss, nats": "{:.3f}", "Austen, perplexity": "{:.1f}"}
    return table(lines, formats, note=provenance(*methods.values()))


# ------------------------------------------------------------------ the benchmark


def benchmark() -> DataFrame:
    """Return the 63 runs of PEFT's method_comparison, one each, the named ones first.

    Columns: `run` (its name, or ""), `layers` (the adapted ones), `accuracy` on GSM8K in %,
    `seconds`, `gigabytes` at the peak, `forgetting` (the rise of the loss on Wikipedia). A LoRA has
    alpha = 2 r but rsLoRA, which has alpha = r = 64: its scale is 8, that of the others 2."""
    return load_results("peft_benchmark")


def benchmark_table(first: int | None = None) -> Table:
    """Return a table of the named runs of `benchmark`, or the first of them."""
    runs = benchmark()
    runs = runs[runs["run"] != ""][:first]
    lines = [
        {
            "Llama-3.2-3B, MetaMathQA": row.run,
            "adapted": row.layers,
            "GSM8K": row.accuracy,
            "seconds": int(row.seconds),
            "peak": row.gigabytes,
            "forgetting": row.forgetting,
        }
        for row in runs.itertuples()
    ]
    p = runs["accuracy"].iloc[0] / 100
    noise = 200 * math.sqrt(2 * p * (1 - p) / QUESTIONS)
    return table(
        lines,
        {"GSM8K": "{:.1f} %", "peak": "{:.1f} GB", "forgetting": "{:.3f}"},
        note=f"PEFT's method_comparison, July 2026, commit 51c2ff666; one run each, no "
        f"checkpointing;\ntwo accuracies that differ by less than {noise:.1f} points are within "
        "the noise; forgetting: rise\nof the loss on Wikipedia",
    )


NAMED = 6  # runs of the benchmark beside an advice: LoRA, rsLoRA, DoRA and full fine-tuning


def _published(kind: str) -> tuple[str, Table]:
    task = "" if kind == "generation" else " It generates text, and yours is a classifier."
    sentence = (
        "The measured model nearest in size is Llama-3.2-3B in PEFT's benchmark of July 2026. It "
        "has no LoRA on all linear layers. LoRA, DoRA and full fine-tuning lie within its noise. "
        "Schulman et al. (2025) found LoRA on all layers level with full fine-tuning on small and "
        "medium instruction sets." + task
    )
    return sentence, benchmark_table(NAMED)


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
