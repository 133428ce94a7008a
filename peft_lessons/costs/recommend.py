"""Recommend a method: LoRA, or QLoRA where LoRA's 16-bit base does not fit.

    recommend_peft_method(8, 24, "generation", 5_000)

returns a name of `NAMES` that prints at most eight lines: what it takes and leaves by `estimate`,
which part is the largest and what shrinks it, a learning rate to start with, which servers load the
result, and what was measured nearest in size. It also has lines to paste and two tables. The order
is fixed: it depends neither on the GPU nor on a ranking of small models. So more memory never makes
the advice worse, and a method that does not fit is never recommended.

Candidates are the methods that Hugging Face PEFT has a configuration for, and full fine-tuning.
Full fine-tuning and the relatives of LoRA are alternatives, each with the reason to take it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.base_models import nf4
from ..engine import Method, method_facts, validate
from ..engine.facts import InPeft, Recommended
from ..methods.lora import FACTORS
from ..studies import Explorer, Table, explore, table
from .estimate import GB, GIB, Memory, Shape, components, training_memory
from .evidence import evidence

FULL, NOTHING = "full fine-tuning", "does not fit"
STEP = 16  # texts in a step of the optimizer


@dataclass(frozen=True)
class Candidate:
    """Describe a method that may be recommended: its name in the study, the method for a Llama, how
    PEFT does it, and what there is to say of it. Full fine-tuning is not PEFT's."""

    study: str
    method: Method | None
    row: InPeft | None
    advice: Recommended

    @property
    def checkpointing(self) -> bool:
        """Return whether it trains with gradient checkpointing."""
        return self.row is None or self.row.checkpointing

    @property
    def four_bit(self) -> bool:
        """Return whether the base is loaded in 4 bits."""
        return self.row is not None and self.row.four_bit

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of PEFT's configuration: those of the method that are not PEFT's
        defaults. The layers of a method that is not for all are left to PEFT, which knows them for
        other models than a Llama too."""
        method = self.method
        specific = [n for n in method.names_modules if getattr(method, n, None) != "all-linear"]
        values = {
            entry: value
            for name, (entry, default) in method.files.fields.items()
            if name not in specific and (value := getattr(method, name)) != default
        }
        return values | dict(self.row.flags)


_FULL = Candidate("full", None, None, Recommended(FULL, {}, "if it beats LoRA on your task"))
# In the order in which they are recommended: the first that fits.
CANDIDATES: dict[str, Candidate] = {
    row.title: Candidate(facts.points[-1].method, kind(**row.fields), facts.peft[0], row)
    for kind, facts in method_facts().items()
    if (row := facts.advice)
} | {FULL: _FULL}
NAMES = (*CANDIDATES, NOTHING)  # all that can be recommended

_SERVED = "vLLM, SGLang and llama.cpp"
_REFUSED = f"{_SERVED} refuse this adapter (November 2026)"

# A classifier's new head is saved with its adapter, in `modules_to_save`.
_HEAD = (
    "vLLM loads adapter and new head, SGLang leaves the head out, llama.cpp refuses it "
    "(November 2026)"
)
# As the course loads a base in 4 bits, see `Advice.quantization`.
_NF4 = (
    'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype=torch.bfloat16"
)

TASKS = {  # what is asked for: (PEFT's name, other names)
    "classification": ("SEQ_CLS", ("sequence classification", "text classification")),
    "generation": ("CAUSAL_LM", ("text generation", "language modeling", "language modelling")),
}
SPARE, CONTEXT = 0.05, 0.75 * GIB  # of a GPU: its part lost to fragments, bytes of CUDA itself
LARGEST = 10_000  # billions of parameters; a size above is not in billions
LEAN = "bfloat16, 8-bit Adam"  # the leanest recipe of full fine-tuning
FEW, MANY = 500, 100_000  # examples
TIGHT = 0.1  # of a GPU's memory that is left
FULL_RATES = (2e-4, 2e-5)  # minilm's best, and the default of TRL's SFTConfig
# {task: from so many billions of parameters the learning rates are those of language models}
SPEAKS = {"classification": 0.5, "generation": 0.05}


# ------------------------------------------------------------------ what fits


def usable_bytes(gpu_memory_gb: float) -> float:
    """Return the usable bytes of a GPU: its GiB, less 0.75 GiB for CUDA itself and 5 % for
    fragmentation.

    The nominal size is only roughly the GiB: with error correction a GPU shows less, an L40S of
    "48 GB" about 45. Give what `nvidia-smi` shows in MiB, divided by 1,024.
    Raises ValueError unless the size is a finite number above 0."""
    validate("usable_bytes", gpu_memory_gb=gpu_memory_gb)
    return max(0.0, (1 - SPARE) * gpu_memory_gb * GIB - CONTEXT)


def is_tight(need: float, gpu_memory_gb: float) -> bool:
    """Return whether a training of so many bytes leaves less than a tenth of the GPU."""
    return usable_bytes(gpu_memory_gb) - need < TIGHT * gpu_memory_gb * GIB


def needs_of(
    model_size_b: float,
    labels: bool,
    context: int = 1024,
    batch: int = 1,
    *,
    checkpointing: bool = True,
    chunked: bool = True,
) -> dict[str, Memory]:
    """Return {name: peak memory} of every candidate, for a Llama-3 of so many billions of
    parameters in mixed precision, with or without gradient checkpointing and a chunked loss: always
    without checkpointing for a prefix, which needs the cache that checkpointing switches off."""
    shape = Shape.of_size(model_size_b * 1e9, tied=labels)
    more = {"batch": batch, "context": context, "labels": labels, "chunked": chunked}
    return {
        name: training_memory(
            shape, c.method, checkpointing=checkpointing and c.checkpointing, **more
        )
        for name, c in CANDIDATES.items()
    }


# ------------------------------------------------------------------ the advice


def _task(task_type: Any) -> str:
    """Return the key of TASKS for a name of a task. ValueError for an unknown name."""
    text = str(getattr(task_type, "value", task_type))
    plain = text.strip().lower().replace("_", " ").replace("-", " ")
    for name, (peft_name, others) in TASKS.items():
        if plain in (name, peft_name.lower().replace("_", " "), *others):
            return name
    known = ", ".join(repr(n) for name, (theirs, _) in TASKS.items() for n in (name, theirs))
    raise ValueError(f"recommend_peft_method: task_type={task_type!r} must be one of {known}")


@dataclass(frozen=True, repr=False)
class Advice:
    """Hold a name of `NAMES` and the reasons for it; made by `recommend_peft_method`.

    One made by its name alone has `config`, `arguments` and `quantization`, and no reasons."""

    name: str  # which str() gives too
    learning_rate: float | None = None  # to start with, None for "does not fit"
    reasons: Mapping[str, str] = field(default_factory=dict)  # at most seven, {about what: a line}
    fits: Table | None = None  # bytes by component: LoRA, QLoRA, full fine-tuning, alternatives
    evidence: Table | None = None  # what was measured nearest in size
    alternatives: tuple[str, ...] = ()  # two other names
    task: str = "CAUSAL_LM"  # PEFT's name of it
    context: int = 1024  # tokens per text
    batch: int = 1  # texts per step

    @property
    def candidate(self) -> Candidate:
        """Return what is recommended, nothing of PEFT's for "does not fit"."""
        return CANDIDATES.get(self.name, _FULL)

    @property
    def config(self) -> Any:
        """Return a new configuration of PEFT (PEFT writes the layers that it finds into it), None
        for full fine-tuning and "does not fit"."""
        if self.candidate.row is None:
            return None
        import peft  # takes seconds

        kind = getattr(peft, self.candidate.row.config)
        return kind(task_type=self.task, **self.candidate.settings)

    @property
    def code(self) -> str:
        """Return lines to paste into a script with PEFT and TRL, or transformers' Trainer for a
        classifier; "" without a learning rate, as for "does not fit"."""
        return "" if self.learning_rate is None else _script(self)

    @property
    def arguments(self) -> dict[str, Any] | None:
        """Return the arguments of `setup_peft_training` with which the method takes the memory that
        is counted with `chunked=False`, None for full fine-tuning and "does not fit".

        PEFT keeps an adapter in float32, at 16 bytes a parameter with its gradient and Adam; the
        bfloat16 adapter counted here takes as much together with its master copy."""
        row = self.candidate.row
        if row is None:
            return None
        rank = {"rank": FACTORS["rank"]} if row.ranks else {}
        return {"method": row.name, "checkpointing": row.checkpointing} | rank

    @property
    def quantization(self) -> Any:
        """Return the `quantization_config` to load the base with for QLoRA, else None."""
        return nf4(torch.bfloat16) if self.candidate.four_bit else None

    @property
    def lines(self) -> dict[str, str]:
        """Return what is printed, {about what: a line}: the method and the reasons for it."""
        return {"method": self.name, **self.reasons}

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        width = max(map(len, self.lines))
        return "\n".join(f"{about:<{width}}  {line}" for about, line in self.lines.items())

    def _repr_html_(self) -> str:
        rows = (
            f'<tr><th scope="row" style="text-align:left">{html.escape(about)}</th>'
            f'<td style="text-align:left">{html.escape(line)}</td></tr>'
            for about, line in self.lines.items()
        )
        return f"<table>{''.join(rows)}</table>"


def _script(advice: Advice) -> str:
    """Return the lines of `Advice.code`."""
    candidate, lines = advice.candidate, []
    if candidate.row is not None:
        settings = {"task_type": advice.task, **candidate.settings}
        inside = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        lines.append(f"peft_config = {candidate.row.config}({inside})")
    if candidate.four_bit:
        lines.append(f"quantization_config = BitsAndBytesConfig({_NF4})")
    # TRL and bf16=True load a base in float32 unless told otherwise. All that trains in full
    # fine-tuning stays in float32: 16 bytes a parameter with its gradient and Adam.
    load = f'"dtype": "{"float32" if candidate.row is None else "bfloat16"}"'
    arguments = f"learning_rate={advice.learning_rate:g}"
    arguments += f", per_device_train_batch_size={advice.batch}"
    arguments += f", gradient_accumulation_steps={max(1, round(STEP / advice.batch))}"
    arguments += f", gradient_checkpointing={candidate.checkpointing}, bf16=True"
    if advice.task == "CAUSAL_LM":
        arguments += f", max_length={advice.context}, model_init_kwargs={{{load}}}"
        names = ["args", *(line.partition(" = ")[0] for line in lines)]
        passed = ", ".join(f"{name}={name}" for name in names)
        lines.append(f"args = SFTConfig({arguments})")
        lines.append(f'trainer = SFTTrainer("MODEL", {passed}, train_dataset=dataset)')
    else:
        if candidate.four_bit:
            load += ', "quantization_config": quantization_config'
        lines.append(f"args = TrainingArguments({arguments})")
        lines.append(f"load = {{{load}}}  # AutoModelForSequenceClassification, from_pretrained")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Asked:
    """Hold what was asked for."""

    size: float
    gpu: float
    kind: str
    sizes: dict[str, Any]  # context, batch and chunked, as `needs_of` takes them

    @property
    def labels(self) -> bool:
        return self.kind == "classification"

    @property
    def usable(self) -> float:
        return usable_bytes(self.gpu)

    def needs(self, size: float | None = None, **more: bool) -> dict[str, Memory]:
        return needs_of(size or self.size, self.labels, **self.sizes, **more)

    def left(self, need: Memory) -> float:
        """Return the GB that a training leaves, below 0 if it does not fit."""
        return (self.usable - need.total) / GB

    def largest(self) -> float:
        """Return the largest number of billions of parameters at which some candidate fits."""
        low, high = 0.0, float(LARGEST)
        for _ in range(40):
            middle = (low + high) / 2
            fits = any(self.left(need) >= 0 for need in self.needs(middle).values())
            low, high = (middle, high) if fits else (low, middle)
        return low


def recommend_peft_method(
    model_size_b: float,
    gpu_memory_gb: float,
    task_type: str,
    num_examples: int,
    *,
    context: int = 1024,
    batch: int = 1,
    chunked: bool = True,
) -> Advice:
    """Recommend a method for fine-tuning a model: a name of `NAMES` that explains itself.

    Args:
        model_size_b: parameters in billions, 7 for a 7-billion model, treated as a Llama-3 of that
            size.
        gpu_memory_gb: GiB of one GPU, roughly its nominal size; see `usable_bytes`.
        task_type: "classification" or "generation", or PEFT's SEQ_CLS or CAUSAL_LM.
        num_examples: in the training set.
        context, batch: tokens per text, texts per step. Gradients can be accumulated over steps.
        chunked: whether the loss is computed in chunks of tokens, without whole logits, as TRL and
            Unsloth do and `train_with_peft` does not.

    The result is the first of `CANDIDATES` whose `needs_of` is at most `usable_bytes`: LoRA, then
    QLoRA. It always fits, and more memory never leads to a later one.
    Raises ValueError for an unknown task (lists the known ones), and for a size that is not a
    finite number above 0, or not an int where one is needed."""
    owner, sizes = "recommend_peft_method", {"context": context, "batch": batch}
    validate(owner, model_size_b=model_size_b, gpu_memory_gb=gpu_memory_gb)
    validate(owner, num_examples=num_examples, **sizes)
    kind = _task(task_type)
    asked = _Asked(model_size_b, gpu_memory_gb, kind, sizes | {"chunked": chunked})
    needs = asked.needs()
    fitting = [name for name, need in needs.items() if asked.left(need) >= 0]
    chosen = fitting[0] if fitting else NOTHING
    alternatives = _alternatives(chosen, fitting)
    studied = {name: candidate.study for name, candidate in CANDIDATES.items()}
    measured, evidence_table = evidence(kind, model_size_b, num_examples, studied)
    rate = _rate(chosen, asked)
    reasons = {
        "memory": _decision(chosen, needs, asked),
        "largest part": _largest_part(chosen, asked) if fitting else "",
        "learning rate": _first_rates(rate),
        "instead": _others(alternatives, needs, asked),
        "server": _server(chosen, kind),
        "data": _data(num_examples),
        "measured": measured,
    }
    return Advice(
        chosen,
        learning_rate=rate,
        reasons={about: line for about, line in reasons.items() if line},
        fits=_fits({name: needs[name] for name in (*_SHOWN, *alternatives)}, asked),
        evidence=evidence_table,
        alternatives=alternatives,
        task=TASKS[kind][0],
        **sizes,
    )


_SHOWN = ("LoRA", "QLoRA", FULL)


def _alternatives(chosen: str, fitting: Sequence[str]) -> tuple[str, str]:
    """Return two other names: those that fit first, full fine-tuning first where it fits and last
    where it does not."""

    def order(name: str) -> tuple[bool, bool, bool]:
        fits = name in fitting
        return not fits, (name == FULL) != fits, CANDIDATES[name].advice.last

    return tuple(sorted((name for name in CANDIDATES if name != chosen), key=order)[:2])


def _rate(chosen: str, asked: _Asked) -> float | None:
    if chosen == NOTHING:
        return None
    row = CANDIDATES[chosen].row
    return (FULL_RATES if row is None else row.rates)[asked.size >= SPEAKS[asked.kind]]


def _first_rates(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:g} to start with, then a third and three times that"


def _decision(chosen: str, needs: Mapping[str, Memory], asked: _Asked) -> str:
    room = f"{asked.usable / GB:.1f} GB usable of {asked.gpu:g} GiB"
    if chosen == NOTHING:
        least, need = min(needs.items(), key=lambda pair: pair[1].total)
        shorter = need.total - need.activations - need.at_work < asked.usable
        texts = ", or shorter texts" if shorter else ""
        return (
            f"{room}, and even {least} lacks {-asked.left(need):.1f} GB; "
            f"{_at_most(asked.largest())}; or take a larger GPU or several{texts}"
        )
    need = needs[chosen]
    tight = "; tight, so try the longest text first" if is_tight(need.total, asked.gpu) else ""
    return f"{need.total / GB:.1f} of {room}, {asked.left(need):.1f} GB left{tight}"


def _largest_part(chosen: str, asked: _Asked) -> str:
    """Name the largest part of a training's memory, and what shrinks it."""
    candidate, shape = CANDIDATES[chosen], Shape.of_size(asked.size * 1e9, tied=asked.labels)
    parts = components(
        shape,
        candidate.method,
        checkpointing=candidate.checkpointing,
        labels=asked.labels,
        **asked.sizes,
    )
    name = max(parts, key=parts.get)
    lever = {
        "base": "a smaller model" if candidate.four_bit else "4 bits (QLoRA)",
        "trainable": "LoRA" if chosen == FULL else "a lower rank",
        "blocks": "a shorter text",
        "logits": "a chunked loss",
    }
    return f"{name}, {parts[name] / GB:.1f} GB; to shrink: {lever[name]}"


def _at_most(size: float) -> str:
    if size < 1e-3:
        return "no language model of this kind fits"
    unit = 10 ** (math.floor(math.log10(size)) - 1)  # rounded down to two digits, so that it fits
    return f"at most {math.floor(size / unit) * unit:.3g} billion parameters fit"


def _others(alternatives: Sequence[str], needs: Mapping[str, Memory], asked: _Asked) -> str:
    """Say what the alternatives leave or lack, and what full fine-tuning would take at least."""
    left = {name: asked.left(needs[name]) for name in alternatives}
    line = " or ".join(f"{name} ({_room(room)})" for name, room in left.items())
    if FULL in left or asked.left(needs[FULL]) >= 0:
        return line
    shape = Shape.of_size(asked.size * 1e9, tied=asked.labels)
    more = asked.sizes | {"labels": asked.labels}
    lean = training_memory(shape, None, LEAN, checkpointing=True, **more)
    return (
        f"{line}; {FULL} {_room(asked.left(needs[FULL]))}, and takes {lean.total / GB:,.0f} GB "
        "with 8-bit Adam"
    )


def _room(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB left" if gigabytes >= 0 else f"lacks {-gigabytes:,.1f} GB"


def _server(chosen: str, kind: str) -> str:
    """Say whether a server loads what is trained."""
    if chosen == NOTHING:
        return ""
    candidate = CANDIDATES[chosen]
    if candidate.row is None:
        return "a plain model, which every server loads"
    if not candidate.advice.served:
        return f"{_REFUSED}; {candidate.advice.no_merge or 'merge it first'}"
    if kind == "classification":
        return _HEAD
    tested = "; test it on the base that you serve" if candidate.four_bit else ""
    return f"{_SERVED} load the adapter (November 2026){tested}"


def _data(examples: int) -> str:
    if examples < FEW:
        return f"{examples:,} examples are few: also try the base with a few of them in its prompt"
    if examples >= MANY:
        return f"{examples:,} examples are many: also try a higher rank (Schulman et al. 2025)"
    return ""


def _fits(needs: Mapping[str, Memory], asked: _Asked) -> Table:
    plain = asked.needs(checkpointing=False)

    rows = [
        {
            "method": name,
            "base": need.weights / GB,
            "trained": (need.adapter + need.gradients + need.optimizer) / GB,
            "in a step": (need.activations + need.at_work) / GB,
            "in all": need.total / GB,
            "": _room(asked.left(need)),
            "without checkpointing": _room(asked.left(plain[name])),
            "reason to take it": CANDIDATES[name].advice.reason,
        }
        for name, need in needs.items()
    ]
    formats = dict.fromkeys(("base", "in all", "in a step"), "{:.1f} GB")
    loss = "chunked loss" if asked.sizes["chunked"] else "whole logits"
    note = (
        f"{asked.kind}, {asked.sizes['batch']} × {asked.sizes['context']:,} tokens (longer texts "
        "are cut), bfloat16, Adam in float32,\ngradient checkpointing"
    )
    note += "" if asked.labels else f", {loss}"
    return table(rows, formats | {"trained": "{:.2f} GB"}, note=note)


# ------------------------------------------------------------------ sliders


# Sizes of models (billions of parameters), of GPUs (GiB) and of data sets that one meets.
SIZES = (0.1, 0.25, 0.5, 1, 1.5, 3, 4, 7, 8, 14, 24, 32, 70, 120, 235, 405)
GPUS = (4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)
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
    lists = {
        "billion parameters": (model_size_b, SIZES),
        "GiB of the GPU": (gpu_memory_gb, GPUS),
        "task": (_task(task_type), TASKS),
        "examples": (num_examples, EXAMPLES),
    }
    start = {name: value for name, (value, _) in lists.items()}
    choices = {name: tuple(sorted({*usual, value})) for name, (value, usual) in lists.items()}
    return explore(lambda **given: recommend_peft_method(*given.values()), start, **choices)
