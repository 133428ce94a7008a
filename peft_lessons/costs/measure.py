"""Measure parameters, bytes, peak memory and time, also of models too large to load."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..engine import validate

# The profiler's native part writes two lines to stderr at each start unless told otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def numbers(parameter: torch.Tensor) -> int:
    """Return the number of entries of a parameter, for a packed 4-bit weight of the original."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


@dataclass(frozen=True)
class Parameters:
    """Hold parameter counts of a model. Tied ones count once, of the buffers only packed codes."""

    total: int
    trainable: int

    def __repr__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %)"


def parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters, including weights packed into codes (`packed_numel`)."""
    every = list(model.parameters())
    packed = sum(getattr(module, "packed_numel", 0) for module in model.modules())
    return Parameters(
        packed + sum(numbers(p) for p in every), sum(numbers(p) for p in every if p.requires_grad)
    )


def nbytes(tensors) -> int:
    """Return the bytes of the tensors' storages; a shared storage counts once."""
    storages = {_storage(t): t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for s in storages.values())


def _storage(tensor: torch.Tensor) -> int:
    # The storage's own identity, since on the meta device every data_ptr is 0.
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class TrainingBytes:
    """Hold the bytes of one training step by component."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all components."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __repr__(self) -> str:
        rows = [*vars(self).items(), ("total", self.total)]
        return "\n".join(f"{name:<12}{value / 2**20:>10.1f} MiB" for name, value in rows)


def _scales(model: nn.Module) -> list[torch.Tensor]:
    """Return what bitsandbytes stores outside parameters and buffers for packed weights."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    states += [getattr(state, "state2", None) for state in states]
    stored = (getattr(s, name, None) for s in states for name in ("absmax", "offset"))
    return [t for t in stored if torch.is_tensor(t)]


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> TrainingBytes:
    """Return the bytes of a model's weights (and buffers), gradients and optimizer state right now.
    Activations only exist during a step: see `activation_bytes`."""
    state = [] if optimizer is None else optimizer.state.values()
    return TrainingBytes(
        nbytes([*model.parameters(), *model.buffers(), *_scales(model)]),
        nbytes([p.grad for p in model.parameters() if p.grad is not None]),
        nbytes([t for s in state for t in s.values() if torch.is_tensor(t)]),
    )


def activation_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that `forward` keeps for the backward pass, without the model's own tensors.

    `forward` runs the model and returns, say, the loss; its result is dropped."""
    return sum(kept_by_module(model, forward).values())


def kept_by_module(model: nn.Module, forward: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Return the bytes of `activation_bytes` by module: {path: bytes that its own operations keep}.

    An operation belongs to the innermost module of the model that is being called; its path is ""
    outside all of them. What several operations keep counts once, for the first."""
    weights = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    running, saved = [""], {}

    def keep(tensor):
        # The tensor stays in `saved`, so that no later storage gets the same identity.
        saved.setdefault(_storage(tensor), (running[-1], tensor))
        return tensor

    def leave(*_):
        running.pop()  # a hook that returns something would replace the result

    hooks = []
    for path, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(lambda *_, path=path: running.append(path)),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    del result
    kept: dict[str, int] = {}
    for storage, (path, tensor) in saved.items():
        if storage not in weights:
            kept[path] = kept.get(path, 0) + tensor.untyped_storage().nbytes()
    return kept


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the additional peak memory of a call of `function`, in bytes.

    On the CPU it comes from the profiler's record of every allocation and release, also inside
    operators; on a GPU, if torch has allocated memory there, from torch's own counter. A call costs
    several times the function's own time. On the CPU the release of older tensors is not seen, so
    release them before (gradients: zero_grad first)."""
    if torch.cuda.is_available() and (before := torch.cuda.memory_allocated()):
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@dataclass(frozen=True)
class StepOverTime:
    """Hold the memory of one training step over time: an entry for each allocation or release.

    Bytes are those held right after it, without what was there before the step. Activations are
    what the forward pass allocated and left behind, gradients what the backward pass allocated and
    left behind; `at_work` is all else, which an operation needs only while it is at work."""

    seconds: list[float]  # since the forward pass began
    activations: list[int]
    gradients: list[int]
    at_work: list[int]
    ends: dict[str, float]  # when "forward", "backward" and "update" ended

    @property
    def totals(self) -> list[int]:
        """Return the bytes of all kinds together."""
        kinds = self.activations, self.gradients, self.at_work
        return [sum(parts) for parts in zip(*kinds, strict=True)]

    @property
    def peak(self) -> tuple[float, int]:
        """Return when most bytes are held, and how many."""
        return max(zip(self.seconds, self.totals, strict=True), key=lambda point: point[1])


def step_over_time(
    forward: Callable[[], torch.Tensor], update: Callable[[], object]
) -> StepOverTime:
    """Run a training step on the CPU and return its memory over time.

    `forward` returns the loss, on which `backward` is called; `update` takes the optimizer's step
    and releases the gradients. Call it when the gradients are None and the optimizer has its state:
    after a step, and zero_grad."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with record_function("forward"):
            loss = forward()
        with record_function("backward"):
            loss.backward()
        del loss
        with record_function("update"):
            update()
    events, spans = [], {}
    left = list(record.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.name in ("forward", "backward", "update"):
            spans.setdefault(event.name, event)
        elif event.name == "[memory]":
            events.append(event)
    began = spans["forward"].start_time_ns
    ends = {name: (spans[name].end_time_ns - began) / 1e9 for name in spans}
    events.sort(key=lambda event: event.start_time_ns)
    points = [((e.start_time_ns - began) / 1e9, e.extra_fields) for e in events]
    living, kinds = {}, [""] * len(points)
    for n, (moment, change) in enumerate(points):
        if change.alloc_size > 0:
            living[change.ptr] = n
            continue
        born = living.pop(change.ptr, None)
        if born is None:
            continue  # it was there before the step
        kinds[born] = kinds[n] = _kind(points[born][0], moment, ends)
    for born in living.values():
        kinds[born] = _kind(points[born][0], math.inf, ends)
    held = {"activations": 0, "gradients": 0, "at work": 0}
    rows = []
    for (moment, change), kind in zip(points, kinds, strict=True):
        if kind:
            held[kind] += change.alloc_size
            rows.append((moment, *held.values()))
    return StepOverTime(*map(list, zip(*rows, strict=True)), ends)


def _kind(born: float, freed: float, ends: Mapping[str, float]) -> str:
    """Return the kind of what was allocated at `born` and released at `freed`, in seconds."""
    if born < ends["forward"] < freed:
        return "activations"
    if ends["forward"] <= born < ends["backward"] < freed:
        return "gradients"
    return "at work"


@dataclass(frozen=True)
class StepCost:
    """Hold the cost of a training step: bytes held, additional peak memory, and time."""

    trainable: int
    held: TrainingBytes
    peak: int
    seconds: float


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], repeats: int = 3) -> StepCost:
    """Measure one AdamW step of the trainable parameters on `batch`, which must include labels.

    The learning rate is 0, so the weights do not change; mode and random state do not either.
    Gradients are dropped. Raises ValueError if nothing is trainable, the model returns no loss, a
    gradient is NaN or infinite, or repeats is below 1."""
    training, mode = [p for p in model.parameters() if p.requires_grad], model.training
    if not training:
        raise ValueError("training_step: nothing in the model trains, all is frozen")
    validate("training_step", repeats=repeats)
    optimizer = torch.optim.AdamW(training, lr=0.0, fused=True)

    def backward():
        optimizer.zero_grad()
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError("training_step: the model gives no loss for this batch: add labels")
        loss.backward()

    def step():
        backward()
        optimizer.step()

    model.train()
    random = torch.get_rng_state()
    try:
        backward()
        # At a NaN or infinite gradient a step changes the weights even at a learning rate of 0.
        if not all(p.grad is None or p.grad.isfinite().all() for p in training):
            raise ValueError("training_step: a gradient is NaN or infinite on this batch")
        seconds = by_turns({"step": step}, repeats)["step"]
        held = held_bytes(model, optimizer)
        optimizer.zero_grad()
        peak = peak_bytes(step)
    finally:
        optimizer.zero_grad()
        model.train(mode)
        torch.set_rng_state(random)
    return StepCost(sum(map(numbers, training)), held, peak, seconds)


def costs(models: Mapping[str, nn.Module], batch: dict[str, torch.Tensor]) -> list[dict]:
    """Measure a training step of each model, {name: model}, on this machine; a table row for each.

    Bytes are in MiB, times in ms; the models are timed one after the other, so times are rough."""
    return [
        {
            "": name,
            "trainable": cost.trainable,
            "optimiser": cost.held.optimizer / 2**20,
            "peak of a step": cost.peak / 2**20,
            "time of a step": 1000 * cost.seconds,
        }
        for name, model in models.items()
        for cost in (training_step(model, batch),)
    ]


def by_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each function; every round calls all, so that they share noise.

    Every second round is in reverse order, so that no function always follows the same other.
    clock: `time.process_time` counts what this process computes, also on a busy machine."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            started = clock()
            functions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def estimate_bytes(
    model: nn.Module, weight: float = 2, gradient: float = 2, master: float = 4, moments: float = 8
) -> TrainingBytes:
    """Estimate the bytes of training `model` without activations, from parameter counts alone.

    Bytes per parameter: `weight` for all; `gradient`, `master` copy and optimizer `moments` for the
    trainable ones. The defaults are mixed-precision training with Adam; float32 is 4, 4, 0, 8. The
    master copy counts as optimizer state. The model may be on any device, also meta."""
    count = parameters(model)
    return TrainingBytes(
        round(count.total * weight),
        round(count.trainable * gradient),
        round(count.trainable * (master + moments)),
    )
