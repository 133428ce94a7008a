"""Show what was measured on models near a given size: evidence for the advice of `recommend`.

Three of the course's own studies and one published benchmark. A ranking of small models says little
about a large one, so `evidence` takes the model that is nearest in size, and says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..studies import Table, best_lr, load_results, mean_and_range, paired_losses, provenance, table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..studies import Difference

QUESTIONS = 1319  # of GSM8K's test split
# {model: billions of parameters}; from one to the next at the geometric mean.
MINILM, TINYLM, SMOLLM2, LLAMA = 0.0226, 0.0032, 0.135, 3.2
# {method of assistant_study.csv: its name in a table}, in the order of the table.
ASSISTANT = {
    "base": "base, untouched",
    "lora": "LoRA",
    "full": "full fine-tuning",
    "dora": "DoRA",
    "rslora": "rsLoRA, rank 64",
    "last two": "last two blocks",
    "ia3": "(IA)³",
    "prompt": "prompt",
}


# ------------------------------------------------------------------ two small models


def _at_best(tried: DataFrame) -> DataFrame | None:
    """Return the runs at the best learning rate, None without a run of seed 0 that ended well."""
    first = tried.loc[tried["seed"] == 0, "validation"]
    return best_lr(tried)[1] if any(map(math.isfinite, first)) else None


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
        methods, at_best = sizes.setdefault(size, {}), _at_best(tried)
        if at_best is not None and all(map(math.isfinite, at_best["test"])):
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
    sentence = f"every method at its best learning rate, {size:,} {texts} ({model.split(',')[0]})"
    return sentence, table(lines, {"learning rate": "{:g}"}, note=provenance(*measured.values()))


# ------------------------------------------------------------------ the assistant


def assistant_runs(runs: DataFrame | None = None) -> dict[str, DataFrame]:
    """Return {method: its runs at its best learning rate} of SmolLM2-135M-Instruct that learns
    definitions: the base, and every method with at least three seeds at that rate. Until LoRA and
    another method have them, every method with its run of seed 0.

    runs: those of data/results/assistant_study.csv unless given."""
    runs = load_results("assistant_study") if runs is None else runs
    tried = {name: _at_best(runs[runs["method"] == name]) for name in ASSISTANT}
    at_best = {name: at for name, at in tried.items() if at is not None}
    complete = {name: at for name, at in at_best.items() if name == "base" or len(at) >= 3}
    if "lora" in complete and len(complete) > 1 + ("base" in complete):
        return complete
    return {name: at[at["seed"] == 0] for name, at in at_best.items()}


def _nats(gap: Difference) -> str:
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*(x / 100 for x in (gap.mean, gap.low, gap.high)))


def assistant_table(runs: DataFrame | None = None) -> Table:
    """Return a table of `assistant_runs`: the loss on the test answers, how far it is above LoRA's
    on the same answers, and the perplexity of a text that no training has seen.

    Raises ValueError without a run of LoRA."""
    methods = assistant_runs(runs)
    if "lora" not in methods:
        raise ValueError("assistant_study: there is no run of LoRA to compare with")
    lora = methods["lora"]
    lines = [
        {
            "SmolLM2-135M": ASSISTANT[name],
            "trainable": runs["trainable"].iloc[0] or None,
            "learning rate": runs["lr"].iloc[0] or None,
            "seeds": len(runs),
            "test loss, nats": runs["test"].mean(),
            "above LoRA, nats (95 %)": "" if name == "lora" else _nats(paired_losses(runs, lora)),
            "Austen, perplexity": runs["memory"].mean(),
        }
        for name, runs in methods.items()
    ]
    formats = {"learning rate": "{:g}", "test loss, nats": "{:.3f}", "Austen, perplexity": "{:.1f}"}
    return table(lines, formats, note=provenance(*methods.values()))


# ------------------------------------------------------------------ the benchmark


def benchmark() -> DataFrame:
    """Return the 63 runs of PEFT's method_comparison, one each, the named ones first.

    Columns: `run` (its name, or ""), `layers` (the adapted ones), `accuracy` on GSM8K in %,
    `seconds`, `gigabytes` at the peak, `forgetting` (the rise of the loss on Wikipedia), `trained`
    numbers, and the gigabytes `held` between two steps. A LoRA has alpha = 2 r but rsLoRA, which
    has alpha = r = 64: its scale is 8, that of the others 2."""
    return load_results("peft_benchmark")


def noise(runs: DataFrame) -> float:
    """Return from how many points on two accuracies near that of the first run differ clearly."""
    p = runs["accuracy"].iloc[0] / 100
    return 200 * math.sqrt(2 * p * (1 - p) / QUESTIONS)


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
    return table(
        lines,
        {"GSM8K": "{:.1f} %", "peak": "{:.1f} GB", "forgetting": "{:.3f}"},
        note=f"PEFT's method_comparison, July 2026, commit 51c2ff666; one run each, no "
        f"checkpointing;\ntwo accuracies that differ by less than {noise(runs):.1f} points are "
        "within the noise; forgetting: rise\nof the loss on Wikipedia",
    )


NAMED = 6  # runs of the benchmark beside an advice: LoRA, rsLoRA, DoRA and full fine-tuning


def evidence(
    kind: str, model_size_b: float, examples: int, names: Mapping[str, str]
) -> tuple[str, Table]:
    """Return a line and a table of what was measured nearest in size; the line says at which size.

    kind: "classification" or "generation". names: {name of a method: its name in the study of the
    two small models}."""
    size, (line, shown) = _nearest(kind, model_size_b, examples, names)
    times = model_size_b / size
    times = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    at = f"{size:g} billion" if size >= 1 else f"{1000 * size:g} million"
    return f"at {at} parameters, yours has {times} times as many: {line}", shown


def _nearest(
    kind: str, model_size_b: float, examples: int, names: Mapping[str, str]
) -> tuple[float, tuple[str, Table]]:
    if kind == "classification":
        if model_size_b < math.sqrt(MINILM * LLAMA):
            return MINILM, _small("sentiment", examples, names)
    elif model_size_b < math.sqrt(TINYLM * SMOLLM2):
        return TINYLM, _small("austen", examples, names)
    elif model_size_b < math.sqrt(SMOLLM2 * LLAMA) and "lora" in assistant_runs():
        line = "LoRA, DoRA and full fine-tuning level, 320 definitions, 40 steps (SmolLM2)"
        return SMOLLM2, (line, assistant_table())
    line = "LoRA, DoRA and full fine-tuning within the noise (PEFT's benchmark, July 2026)"
    return LLAMA, (line, benchmark_table(NAMED))
