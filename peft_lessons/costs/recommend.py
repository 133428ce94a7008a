"""Recommend a method: the first that fits by `estimate`, in the order of the study.

    recommend_peft_method(8, 24, "generation", 5_000)

returns a name of `NAMES` and shows why: the first of a ranking that fits. The ranking depends only
on the task and the number of examples, so more memory never makes the advice worse, and a method
that does not fit is never recommended.

Candidates are the methods that Hugging Face PEFT has a configuration for, and full fine-tuning. The
study has more: PEFT has no configuration for bottleneck adapters, BitFit, diff pruning and the last
blocks, and a Llama no bias for BitFit; norms and the head alone are for the lesson to show. Once
the base is frozen none of them saves memory. For the frozen base is what costs, and so QLoRA, with
its base in 4 bits, takes less than all others; what the study ranks below QLoRA is therefore named
as an alternative, and never recommended.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..data.base_models import nf4
from ..engine import Method, validate
from ..methods.adalora import AdaLoRA
from ..methods.dora import DoRA
from ..methods.ia3 import IA3
from ..methods.lora import LoRA
from ..methods.prefix import Prefix
from ..methods.prompt import Prompt
from ..methods.qlora import QLoRA
from ..studies import (
    Explorer,
    Table,
    best_lr,
    explore,
    load_results,
    mean_and_range,
    paired_difference,
    provenance,
    table,
)
from .estimate import GB, GIB, Memory, Shape, training_memory

if TYPE_CHECKING:
    from pandas import DataFrame

FULL, NOTHING = "full fine-tuning", "does not fit"
TOKENS = 16  # of a prompt or a prefix, as in the study
FACTORS = {"rank": 8, "alpha": 16}


@dataclass(frozen=True)
class Candidate:
    """Describe a method that may be recommended: its name in the study, the method for a Llama, the
    name and settings of its configuration in PEFT, its name in `setup_peft_training`, and whether
    it trains with gradient checkpointing (a prefix needs the cache, which checkpointing switches
    off)."""

    study: str
    method: Method | None
    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trainer: str = ""
    checkpointing: bool = True


_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_DORA = _LORA | {"use_dora": True}
_ADALORA = {"init_r": 12, "target_r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_VIRTUAL = {"num_virtual_tokens": TOKENS}

# In the order in which they come where the study has no rows.
CANDIDATES: dict[str, Candidate] = {
    "LoRA": Candidate("lora, all linear", LoRA(**FACTORS), "LoraConfig", _LORA, "lora"),
    "QLoRA": Candidate("qlora", QLoRA(**FACTORS), "LoraConfig", _LORA, "qlora"),
    "DoRA": Candidate("dora, all linear", DoRA(**FACTORS), "LoraConfig", _DORA, "dora"),
    "AdaLoRA": Candidate(
        "adalora",
        AdaLoRA(12, 8, 16, "all-linear", tinit=100, tfinal=300, delta=10, total_steps=1000),
        "AdaLoraConfig",
        _ADALORA | {"tinit": 100, "tfinal": 300, "deltaT": 10, "total_step": 1000},
        "adalora",
    ),
    FULL: Candidate("full", None),
    "(IA)³": Candidate(
        "ia3", IA3(("k_proj", "v_proj", "down_proj"), ("down_proj",)), "IA3Config", {}, "ia3"
    ),
    "prefix tuning": Candidate(
        "prefix", Prefix(TOKENS), "PrefixTuningConfig", _VIRTUAL, "prefix", False
    ),
    "prompt tuning": Candidate(
        "prompt",
        Prompt(TOKENS, init="normal"),
        "PromptTuningConfig",
        _VIRTUAL | {"prompt_tuning_init": "SAMPLE_VOCAB"},
        "prompt",
    ),
}
NAMES = (*CANDIDATES, NOTHING)  # all that can be recommended

TASKS = {  # what is asked for: (its task in the study, PEFT's name, other names)
    "classification": ("sentiment", "SEQ_CLS", ("sequence classification", "text classification")),
    "generation": (
        "austen",
        "CAUSAL_LM",
        ("text generation", "language modeling", "language modelling"),
    ),
}
# A method is as good as another if their scores lie so near each other, and the seeds do not say
# otherwise: about a standard error of an accuracy on the test sentences; a hundredth of a
# perplexity. Without it, three seeds that scatter would make a much worse method as good.
NEAR = {"sentiment": 0.01, "austen": 0.01}
SPARE, CONTEXT = 0.05, 0.75 * GIB  # of a card: its part lost to fragments, bytes of CUDA itself
LARGEST = 10_000  # billions of parameters; a size above is not in billions


# ------------------------------------------------------------------ the study


def study(task: str, runs: DataFrame | None = None) -> dict[int, dict[str, DataFrame]]:
    """Return {examples: {method: its runs at its best learning rate}} of "sentiment" or "austen".

    runs: those of data/results/choosing_study.csv unless given. A method without a run of seed 0 is
    left out, and one of which a run at its rate diverged. Raises ValueError for another task."""
    if task not in NEAR:
        raise ValueError(f"task={task!r} must be one of {', '.join(map(repr, NEAR))}")
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


def _scored(task: str, runs: DataFrame) -> DataFrame:
    """Return the seeds and a `score` of which more is better: accuracy, or minus the logarithm of
    perplexity, so that a difference of 0.01 is one of a hundredth."""
    test = runs["test"].tolist()
    score = test if task == "sentiment" else [-math.log(x) for x in test]
    return runs[["seed"]].assign(score=score)


def as_good(task: str, runs: DataFrame, best: DataFrame) -> bool:
    """Return whether some `_scored` runs are as good as the best: nearer than `NEAR` in the mean,
    and no 95 % interval over the common seeds that leaves zero out."""
    gap = paired_difference(runs, best, "score")
    return abs(gap.mean) <= NEAR[task] and not gap.is_clear


def ranking(task: str, examples: int, runs: DataFrame | None = None) -> list[str]:
    """Return the names of the candidates, the first choice first, for "sentiment" or "austen".

    From the study at the nearest size: the best score first, but of those that are as good as the
    best of the rest, the cheapest comes first: that which trains fewest numbers, and of two such
    the one whose base is not in 4 bits, which must be unpacked in every step and cannot be merged
    as it is. A method that has no runs at this size comes behind, in the order of CANDIDATES."""
    sizes = _stored(task) if runs is None else study(task, runs)
    found = sizes[nearest_size(list(sizes), examples)]
    known = {name: found[c.study] for name, c in CANDIDATES.items() if c.study in found}
    scored = {name: _scored(task, runs) for name, runs in known.items()}

    def cost(name: str) -> tuple[int, bool]:
        trainable = known[name]["trainable"].iloc[0]
        return trainable, isinstance(CANDIDATES[name].method, QLoRA)

    rest = sorted(known, key=lambda name: scored[name]["score"].mean(), reverse=True)
    order = []
    while rest:
        equals = [name for name in rest if as_good(task, scored[name], scored[rest[0]])]
        order.append(min(equals, key=cost))
        rest.remove(order[-1])
    return order + [name for name in CANDIDATES if name not in known]


# ------------------------------------------------------------------ what fits


def usable_bytes(gpu_memory_gb: float) -> float:
    """Return the usable bytes of a GPU: its GiB (a "24 GB" GPU has 24 · 2³⁰ bytes), less 0.75 GiB
    for CUDA itself and 5 % for fragmentation.

    Raises ValueError unless the size is a finite number above 0."""
    validate("usable_bytes", gpu_memory_gb=gpu_memory_gb)
    return max(0.0, (1 - SPARE) * gpu_memory_gb * GIB - CONTEXT)


def needs_of(
    model_size_b: float,
    labels: bool,
    context: int = 1024,
    batch: int = 1,
    *,
    checkpointing: bool = True,
) -> dict[str, Memory]:
    """Return {name: peak memory} of every candidate, for a Llama-3 of so many billions of
    parameters in mixed precision, with or without gradient checkpointing: always without for a
    prefix, which needs the cache that checkpointing switches off."""
    shape = Shape.of_size(model_size_b * 1e9, tied=labels)
    more = {"batch": batch, "context": context, "labels": labels}
    return {
        name: training_memory(
            shape, c.method, checkpointing=checkpointing and c.checkpointing, **more
        )
        for name, c in CANDIDATES.items()
    }


def _largest(gpu_memory_gb: float, labels: bool, context: int, batch: int) -> float:
    """Return the largest number of billions of parameters at which some candidate fits."""
    low, high, usable = 0.0, float(LARGEST), usable_bytes(gpu_memory_gb)
    for _ in range(40):
        middle = (low + high) / 2
        least = min(m.total for m in needs_of(middle, labels, context, batch).values())
        low, high = (middle, high) if least <= usable else (low, middle)
    return low


# ------------------------------------------------------------------ the advice


def _task(task_type: Any) -> str:
    """Return the key of TASKS for a name of a task. ValueError for an unknown name."""
    text = str(getattr(task_type, "value", task_type))
    plain = text.strip().lower().replace("_", " ").replace("-", " ")
    for name, (_, peft_name, others) in TASKS.items():
        if plain in (name, peft_name.lower().replace("_", " "), *others):
            return name
    known = ", ".join(repr(n) for name, (_, theirs, _) in TASKS.items() for n in (name, theirs))
    raise ValueError(f"recommend_peft_method: task_type={task_type!r} must be one of {known}")


class Advice(str):
    """Hold a name of `NAMES` and the reasons for it; made by `recommend_peft_method`.

    fits: a table of all candidates in their order, with bytes by component and the bytes left.
    evidence: a table of the study's results for this kind of task and this amount of data.
    alternatives: two other names."""

    fits: Table
    evidence: Table
    alternatives: tuple[str, str]
    sentences: tuple[str, ...]
    _peft_task: str

    @property
    def config(self) -> Any:
        """Return a new configuration of PEFT (PEFT writes the layers that it finds into it), None
        for full fine-tuning and "does not fit"."""
        candidate = CANDIDATES.get(self)
        if candidate is None or not candidate.config:
            return None
        import peft  # takes seconds

        kind = getattr(peft, candidate.config)
        return kind(task_type=self._peft_task, **candidate.settings)

    @property
    def arguments(self) -> dict[str, Any] | None:
        """Return the arguments of `setup_peft_training` with which the method takes the memory that
        is counted here, None for full fine-tuning and "does not fit".

        PEFT keeps an adapter in float32, at 16 bytes a parameter with its gradient and Adam; the
        bfloat16 adapter counted here takes as much together with its master copy."""
        candidate = CANDIDATES.get(self)
        if candidate is None or not candidate.trainer:
            return None
        rank = {} if candidate.trainer in ("ia3", "prefix", "prompt") else {"rank": FACTORS["rank"]}
        return {"method": candidate.trainer, "checkpointing": candidate.checkpointing} | rank

    @property
    def quantization(self) -> Any:
        """Return the `quantization_config` to load the base with for QLoRA, else None."""
        return nf4(torch.bfloat16) if self == "QLoRA" else None

    @property
    def why(self) -> str:
        """Return the sentences and both tables as text."""
        told = (textwrap.fill(sentence, 100) for sentence in self.sentences)
        return "\n".join((*told, repr(self.fits), repr(self.evidence)))

    def __repr__(self) -> str:
        return f"{self!s}\n{self.why}"

    def _repr_html_(self) -> str:
        told = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        shown = self.fits._repr_html_() + self.evidence._repr_html_()
        return f"<p><strong>{html.escape(str(self))}</strong></p>{told}{shown}"


def recommend_peft_method(
    model_size_b: float,
    gpu_memory_gb: float,
    task_type: str,
    num_examples: int,
    *,
    context: int = 1024,
    batch: int = 1,
) -> Advice:
    """Recommend a method for fine-tuning a model: a name of `NAMES` that explains itself.

    Args:
        model_size_b: parameters in billions, 7 for a 7-billion model, treated as a Llama-3 of that
            size.
        gpu_memory_gb: nominal memory of one GPU: a "24 GB" GPU has 24 · 2³⁰ bytes.
        task_type: "classification" or "generation", or PEFT's SEQ_CLS or CAUSAL_LM.
        num_examples: in the training set.
        context, batch: tokens per text, texts per step. Gradients can be accumulated over steps.

    The result is the first name of `ranking` whose `needs_of` is at most `usable_bytes`, so it
    always fits, and more memory never leads to a lower rank.
    Raises ValueError for an unknown task (lists the known ones), and for a size that is not a
    finite number above 0, or not an int where one is needed."""
    own = "recommend_peft_method"
    validate(own, model_size_b=model_size_b, gpu_memory_gb=gpu_memory_gb)
    validate(own, num_examples=num_examples, context=context, batch=batch)
    kind = _task(task_type)
    task, peft_task, _ = TASKS[kind]
    needs = needs_of(model_size_b, kind == "classification", context, batch)
    usable, order = usable_bytes(gpu_memory_gb), ranking(task, num_examples)
    fitting = [name for name in order if needs[name].total <= usable]
    chosen = fitting[0] if fitting else NOTHING
    others = [name for name in order if name != chosen]
    others.sort(key=lambda name: (name not in fitting, name not in fitting and needs[name].total))
    advice = Advice(chosen)
    advice._peft_task, advice.alternatives = peft_task, tuple(others[:2])
    plain = needs_of(model_size_b, kind == "classification", context, batch, checkpointing=False)
    told = f"{kind}, {batch} × {context:,} tokens"
    advice.fits = _fits(order, needs, plain, usable, told)
    advice.evidence = _evidence(task, num_examples, order)
    advice.sentences = (
        _decision(chosen, needs, usable, model_size_b, gpu_memory_gb, kind, context, batch),
        _others(advice.alternatives, needs, usable),
        _data(task, num_examples),
    )
    return advice


def _decision(chosen, needs, usable, size, card, kind, context, batch) -> str:
    room = f"of {card:g} GiB ({card * GIB / GB:.1f} GB) {usable / GB:.1f} GB can be used"
    if chosen == NOTHING:
        least = min(needs, key=lambda name: needs[name].total)
        most = _largest(card, kind == "classification", context, batch)
        need = needs[least]
        short = (need.total - usable) / GB
        shorter = need.total - need.activations - need.at_work < usable
        texts = ", or shorter texts" if shorter else ""
        return (
            f"Nothing fits a model of {size:g} billion: {room}, and even {least} lacks "
            f"{short:.1f} GB. {_at_most(most)}. Or take a larger card or several{texts}."
        )
    took = needs[chosen].total
    return (
        f"{chosen} takes {took / GB:.1f} GB for a model of {size:g} billion, and {room}: "
        f"{(usable - took) / GB:.1f} GB are left. It is the first that fits in the order below."
    )


def _at_most(size: float) -> str:
    if size < 1e-3:
        return "On this card no language model of this kind fits"
    unit = 10 ** (math.floor(math.log10(size)) - 1)  # rounded down to two digits, so that it fits
    return f"On this card a model of at most {math.floor(size / unit) * unit:.3g} billion fits"


def _others(alternatives, needs, usable) -> str:
    left = {name: (usable - needs[name].total) / GB for name in alternatives}
    fitting = [f"{name} (leaves {room:.1f} GB)" for name, room in left.items() if room >= 0]
    lacking = [f"{name} (lacks {-room:.1f} GB)" for name, room in left.items() if room < 0]
    told = {"Alternatives": fitting, "Too large": lacking}
    return " ".join(f"{what}: {', '.join(names)}." for what, names in told.items() if names)


def _data(task: str, examples: int) -> str:
    size = nearest_size(list(_stored(task)), examples)
    base, more = {
        "sentiment": ("an encoder of 22.6 million parameters", "sentences of movie reviews"),
        "austen": ("a language model of 3.2 million parameters", "pieces of Jane Austen's novels"),
    }[task]
    return (
        f"The order is that of the study at {size:,} examples, the nearest to {examples:,}. It was "
        f"measured on {base} with {more}: far from yours, so a reason to try this first, and no "
        "more. Every method there has its own learning rate; take care of yours."
    )


def _fits(order, needs, plain, usable, told) -> Table:
    def left(m: Memory) -> str:
        gigabytes = (usable - m.total) / GB
        return f"{gigabytes:.1f} GB" if gigabytes >= 0 else f"lacks {-gigabytes:.1f} GB"

    rows = []
    for name in order:
        m = needs[name]
        rows.append(
            {
                "in order": name,
                "base": m.weights / GB,
                "what trains": (m.adapter + m.gradients + m.optimizer) / GB,
                "in a step": (m.activations + m.at_work) / GB,
                "in all": m.total / GB,
                "left": left(m),
                "left without checkpointing": left(plain[name]),
            }
        )
    formats = dict.fromkeys(("base", "in all", "in a step"), "{:.1f} GB")
    return table(
        rows,
        formats | {"what trains": "{:.2f} GB"},
        note=f"{told}, bfloat16, master copy and Adam in float32, gradient checkpointing\n"
        "(not with a prefix); where it fits without, it is faster without\n"
        "in a step: activations, and what the backward pass holds for a moment",
    )


def _evidence(task: str, examples: int, order: Sequence[str]) -> Table:
    sizes = _stored(task)
    size = nearest_size(list(sizes), examples)
    found, lines, shown = sizes[size], [], []
    scale, heading = (100, "accuracy, %") if task == "sentiment" else (1, "perplexity")
    for name in order:
        if (best := found.get(CANDIDATES[name].study)) is None:
            continue
        shown.append(best)
        lines.append(
            {
                f"the study, {size:,} examples": name,
                "trains there": best["trainable"].iloc[0],
                f"test {heading}": mean_and_range(best, "test", scale),
            }
        )
    return table(lines, note=provenance(*shown))


# ------------------------------------------------------------------ sliders


# Sizes of models (billions of parameters), of GPUs (GiB) and of data sets that one meets.
SIZES = (0.1, 0.25, 0.5, 1, 1.5, 3, 4, 7, 8, 14, 24, 32, 70, 120, 235, 405)
CARDS = (4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)
EXAMPLES = (*(n * 10**power for power in range(1, 6) for n in (1, 2, 5)), 10**6)


def adviser(
    model_size_b: float = 8.0,
    gpu_memory_gb: float = 24.0,
    task_type: str = "generation",
    num_examples: int = 1000,
) -> Explorer:
    """Return sliders for `recommend_peft_method` with these initial values. Without ipywidgets or a
    kernel they show the advice for the initial values. Errors as `recommend_peft_method`."""
    recommend_peft_method(model_size_b, gpu_memory_gb, task_type, num_examples)
    start = {
        "billion parameters": model_size_b,
        "GiB of the GPU": gpu_memory_gb,
        "task": _task(task_type),
        "examples": num_examples,
    }
    lists = (SIZES, CARDS, TASKS, EXAMPLES)
    choices = {name: tuple(values) for name, values in zip(start, lists, strict=True)}
    for name, value in start.items():
        if value not in choices[name]:
            choices[name] = tuple(sorted((*choices[name], value)))
    return explore(lambda **given: recommend_peft_method(*given.values()), start, **choices)
