"""Count and weigh: parameters, bytes, peak memory, time; also for models too big to load."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..engine import validate

# The profiler's native part writes two lines to stderr at each start unless told otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def numbers(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for; a packed 4-bit weight for more than it has bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters, tied ones once, other buffers than codes left out."""

    total: int
    trainable: int

    def __repr__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %)"


def parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters, those that a module packed into codes (`packed_numel`) too."""
    every = list(model.parameters())
    packed = sum(getattr(module, "packed_numel", 0) for module in model.modules())
    return Parameters(
        packed + sum(numbers(p) for p in every), sum(numbers(p) for p in every if p.requires_grad)
    )


def nbytes(tensors) -> int:
    """Bytes of the tensors' storages, a shared one once."""
    storages = {_storage(t): t.untyped_storage() for t in tensors}
    return sum(s.nbytes() for s in storages.values())


def _storage(tensor: torch.Tensor) -> int:
    # The storage's own identity, since on the meta device every data_ptr is 0.
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class TrainingBytes:
    """The bytes of one training step by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __repr__(self) -> str:
        rows = [*vars(self).items(), ("total", self.total)]
        return "\n".join(f"{name:<12}{value / 2**20:>10.1f} MiB" for name, value in rows)


def _scales(model: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes stores beside packed weights, in neither parameters nor buffers."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    states += [getattr(state, "state2", None) for state in states]
    stored = (getattr(s, name, None) for s in states for name in ("absmax", "offset"))
    return [t for t in stored if torch.is_tensor(t)]


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> TrainingBytes:
    """Bytes that lie in the tensors of a model in training, now: weights (and buffers), gradients,
    and the optimizer's state. Activations only exist during a step: see `activation_bytes`."""
    state = [] if optimizer is None else optimizer.state.values()
    return TrainingBytes(
        nbytes([*model.parameters(), *model.buffers(), *_scales(model)]),
        nbytes([p.grad for p in model.parameters() if p.grad is not None]),
        nbytes([t for s in state for t in s.values() if torch.is_tensor(t)]),
    )


def activation_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, the model's own tensors left out.

    `forward` runs the model and returns the loss, say; what it returns is dropped."""
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    size = nbytes([t for t in kept if _storage(t) not in own])
    del result
    return size


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` held at a time beyond what was held before it.

    On the CPU read from the profiler's record of every allocation and release, inside the operators
    too; on a GPU, if anything lies there yet, from torch's own counter. A call costs several times
    the function's own time. On the CPU the release of something older goes unseen, so `function`
    should begin without it (gradients: zero_grad first)."""
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


def step_time(function: Callable[[], object], repeats: int = 7, warmup: int = 2) -> float:
    """Median seconds of a call, after `warmup` calls that are not counted."""
    times = []
    for i in range(warmup + repeats):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@dataclass(frozen=True)
class StepCost:
    """What a training step costs: the bytes that lie there, the most held beyond them, the time."""

    trainable: int
    held: TrainingBytes
    peak: int
    seconds: float


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], repeats: int = 3) -> StepCost:
    """Measure one AdamW step of what trains in `model` on `batch`, which must give a loss.

    The learning rate is 0, so the weights stay as they are; so do the mode and the random state.
    Gradients that were there are dropped. Raises ValueError where nothing trains, the batch gives
    no loss or a gradient is NaN or infinite, or for repeats below 1."""
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
        seconds = step_time(step, repeats, warmup=1)
        held = held_bytes(model, optimizer)
        optimizer.zero_grad()
        peak = peak_bytes(step)
    finally:
        optimizer.zero_grad()
        model.train(mode)
        torch.set_rng_state(random)
    return StepCost(sum(map(numbers, training)), held, peak, seconds)


def costs(
    models: Mapping[str, nn.Module],
    batch: dict[str, torch.Tensor],
    **more: Callable[[nn.Module], object],
) -> list[dict[str, object]]:
    """What a training step of each model costs here and now, {name: model}: a row for `cost_table`.

    more: further columns, functions of the model; an underscore in a name becomes a blank.
    Bytes are given in MiB, times in ms; timed one after the other, so they are rough."""
    rows = []
    for name, model in models.items():
        cost = training_step(model, batch)
        rows.append(
            {
                "": name,
                "trainable": cost.trainable,
                "optimiser": cost.held.optimizer / 2**20,
                "peak of a step": cost.peak / 2**20,
                "time of a step": 1000 * cost.seconds,
                **{column.replace("_", " "): value(model) for column, value in more.items()},
            }
        )
    return rows


def by_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, all called once a round: a busy moment meets all alike.

    Every second round goes backwards, so that none always runs in the caches of the same other."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            functions[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def estimate_bytes(
    model: nn.Module,
    weight: float = 2,
    gradient: float = 2,
    master: float = 4,
    moments: float = 8,
) -> TrainingBytes:
    """What training `model` takes without activations, from counts alone (any device, also meta).

    Bytes a parameter: `weight` for all; `gradient`, `master` copy and optimizer `moments` for what
    trains. The defaults are mixed-precision training with Adam; all in float32 is 4, 4, 0, 8. The
    master copy is counted with the optimizer."""
    count = parameters(model)
    return TrainingBytes(
        round(count.total * weight),
        round(count.trainable * gradient),
        round(count.trainable * (master + moments)),
    )
