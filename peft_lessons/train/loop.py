"""Train and evaluate: the training loop and the evaluation loop of the course."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.std import tqdm

from ..engine import Injection, injection_of, refuse_off, validate

FULL_LEARNING_RATE = 1e-4  # without a method, all unfrozen parameters train with it


class TrainingDiverged(RuntimeError):
    """Report a NaN or infinite loss or gradient; the weights are those before that step."""


@dataclass
class History:
    """Record a training by `fit`: loss and learning rate of every step, and its seconds."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def smooth_loss(self, window: int = 10) -> list[float]:
        """Return for each step the mean loss of up to `window` steps that end there."""
        means = (self.loss[max(0, i - window + 1) : i + 1] for i in range(len(self.loss)))
        return [sum(m) / len(m) for m in means]

    def __repr__(self) -> str:
        if not self.loss:
            return "no step taken"
        first, last = self.smooth_loss()[min(9, len(self.loss) - 1)], self.smooth_loss()[-1]
        return f"{len(self.loss)} steps: loss {first:.3f} → {last:.3f} (mean of up to 10 steps)"


@dataclass(frozen=True)
class Scores:
    """Hold the results of `evaluate` on n examples. For language modelling `accuracy` is None and n
    counts tokens."""

    loss: float
    accuracy: float | None
    n: int

    @property
    def standard_error(self) -> float | None:
        """Return the standard error of the accuracy, sqrt(a (1 - a) / n); None without one."""
        return None if self.accuracy is None else standard_error(self.accuracy, self.n)

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss)

    def __repr__(self) -> str:
        if self.accuracy is None:
            return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f} ({self.n:,} tokens)"
        share = f"{100 * self.accuracy:.1f} % ± {100 * self.standard_error:.1f}"
        return f"accuracy {share}, loss {self.loss:.4f} ({self.n:,} examples)"


def standard_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy on n examples, sqrt(a (1 - a) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def progress(iterable, description: str, done: int = 0, show: bool = True) -> tqdm:
    """Return a progress bar that is live in JupyterLab and leaves one line in a stored notebook."""
    return tqdm(
        iterable,
        description,
        initial=done,
        total=done + len(iterable),
        disable=not show,
        file=sys.stdout,
        ncols=72,
        mininterval=0.2,
        bar_format="{desc}: {n_fmt}/{total_fmt} |{bar:24}| {remaining} left{postfix}",
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    output = model(**batch)
    if getattr(output, "loss", None) is None:
        raise TypeError(
            f"{type(model).__name__} returns no loss for a batch with labels: load a model with a "
            "head, load_model(name, labels=2), or a language model"
        )
    return output


def _refuse_batches(owner: str, batches: list) -> None:
    """Raise ValueError for a list without batches, or for a batch without a label to learn."""
    if not batches:
        raise ValueError(f"{owner}: the list of batches is empty: give at least one batch")
    for number, batch in enumerate(batches):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor):
            has = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else repr(batch)
            raise ValueError(
                f"{owner}: batch {number} must be a dict with a tensor of labels, and {has:.80}: "
                "add labels, the token ids with -100 where nothing is to be learned"
            )
        # A language model has no prediction of the first token.
        learned = labels[:, 1:] if labels.dim() == 2 else labels
        if not (learned != -100).any():
            raise ValueError(
                f"{owner}: all labels of batch {number} are -100, so its loss would be NaN: leave "
                "the batch out, or keep the labels of the answer's tokens"
            )


def evaluate(model: nn.Module, task, split: str = "test", batch_size: int = 64) -> Scores:
    """Return mean loss and accuracy of a classifier on a split, or the mean loss per token of a
    language model. Mode and random state do not change.

    `task` is a task, or a list of batches as for `fit`; a list has no splits and keeps its batches.
    ValueError for an empty split, and for a list as `fit`."""
    listed = isinstance(task, list)
    if listed:
        _refuse_batches("evaluate", task)
    was_training, device = model.training, _device(model)
    model.eval()
    loss, right, n, by_row = 0.0, 0, 0, True
    try:
        with torch.no_grad():
            for batch in task if listed else task.batches(split, batch_size, by_length=True):
                batch = {k: v.to(device) for k, v in batch.items()}
                by_row = batch["labels"].dim() == 1
                if not by_row:
                    # A language model predicts the next token, so the first one has no prediction;
                    # where a prompt comes before it, it has one, which would not compare.
                    batch["labels"] = batch["labels"].clone()
                    batch["labels"][:, 0] = -100
                output, labels = _loss(model, batch), batch["labels"]
                here = len(labels) if by_row else int((labels != -100).sum())
                loss += output.loss.item() * here
                n += here
                if by_row:
                    right += int((output.logits.argmax(-1) == labels).sum())
    finally:
        model.train(was_training)
    if n == 0:
        raise ValueError(f"split={split!r} of {task.name!r} is empty")
    return Scores(loss / n, right / n if by_row else None, n)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then linear decay to 0."""
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def rate_factors(model: nn.Module, injection: Injection | None) -> dict[str, float]:
    """Return {name of a trainable parameter: factor of the learning rate by its method, or 1}."""
    factors = {}
    for path, module in (injection.modules() if injection else {}).items():
        for name, _ in module.named_parameters():
            factors[f"{path}.{name}"] = injection.method.rate_factors.get(name, 1.0)
    named = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name: factors.get(name, 1.0) for name in named}


def _groups(model: nn.Module, injection: Injection | None) -> list[dict]:
    """Return the optimizer's groups: what trains, by its factor of the learning rate."""
    groups, parameters = {}, dict(model.named_parameters())
    for name, factor in rate_factors(model, injection).items():
        groups.setdefault(factor, []).append(parameters[name])
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def _stream(task, batch_size: int, seed: int) -> Iterable[dict]:
    """Return the endless batches of a training on a task, or on a list of batches."""
    if not isinstance(task, list):
        return task.stream(batch_size, seed)
    _refuse_batches("fit", task)
    return itertools.cycle(task)


def _refuse_unready(model: nn.Module, injection: Injection | None, owner: str) -> None:
    """Raise if `owner` would train nothing, or leave out or spoil the method in the model."""
    for path, inner in model.named_modules():
        if path and injection_of(inner):
            raise ValueError(
                f"{owner}: the method is in model.{path}, not in the model itself, so its part in "
                f"the training would be left out; {owner}(model.{path}, ...)"
            )
    if injection:
        refuse_off(injection, owner)
        if injection.merged:
            raise RuntimeError(
                f"{owner}: the method is merged, so its parameters are not used; "
                "unmerge(model) first"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{owner}: nothing in the model trains, all is frozen (an adapter loads frozen: "
            "load_adapter(..., trainable=True) trains on)"
        )


def train_step(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int = 1,
    *,
    clip: float | None = None,
    after: Callable[[int], object] | None = None,
) -> float:
    """Take training step number `step`, counted from 1, and return the loss of the batch.

    A method in the model takes part: its penalty joins the loss, and its `after_step` follows the
    optimizer's step, as does `after`, while the gradients are still there.

    Raises TrainingDiverged at a NaN or infinite loss or gradient, before it reaches the weights."""
    injection, device = injection_of(model), _device(model)
    loss = _loss(model, {k: v.to(device) for k, v in batch.items()}).loss
    if injection:
        loss = loss + injection.method.penalty(injection)
    loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trainable, clip or math.inf).item()
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        optimizer.zero_grad()
        group = optimizer.param_groups[0]
        raise TrainingDiverged(
            f"step {step}: loss {value:.3g}, gradient norm {norm:.3g} at learning rate "
            f"{group['lr'] / group.get('factor', 1.0):.2g}. The weights are those before this "
            "step. Start again with a smaller lr, or look at the batch."
        )
    optimizer.step()
    if injection:
        injection.method.after_step(injection, step)
    if after:
        after(step)
    optimizer.zero_grad()
    return value


def fit(
    model: nn.Module,
    task,
    steps: int = 100,
    *,
    lr: float | None = None,
    batch_size: int = 16,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    seed: int = 0,
    show: bool = True,
) -> History:
    """Train the trainable parameters of `model` on the training split of `task`, in place.

    `task` is a task, or a list of batches: dicts of tensors with `labels`, which are -100 where
    nothing is to be learned. The batches of a list are taken in order, again and again.

    The optimizer is AdamW; the learning rate rises linearly over the first `warmup` share of the
    steps, then falls linearly. The same seed gives the same run on one machine; the global random
    state does not change.

    Args:
        lr: peak learning rate; None is the method's default, or 1e-4 without a method.
        batch_size: examples a step; the batches of a list stay as they are.
        seed: of the order of the examples, and of dropout.
        clip: maximal norm of the gradient over all parameters, None for no clipping.
        show: whether to draw a progress bar.

    Raises ValueError for a wrong argument, a model without anything to train, an empty list, or a
    batch in it without labels or with -100 alone; RuntimeError while a method is merged or switched
    off by `disabled`; `TrainingDiverged` at a NaN or infinite loss or gradient, before it reaches
    the weights."""
    injection = injection_of(model)
    if lr is None:
        lr = injection.method.learning_rate if injection else FULL_LEARNING_RATE
    validate("fit", steps=steps, lr=lr, batch_size=batch_size, warmup=warmup, clip=clip)
    validate("fit", weight_decay=weight_decay)
    _refuse_unready(model, injection, "fit")
    batches = _stream(task, batch_size, seed)
    if injection:
        injection.method.before_fit(injection, steps)
    history, device, was_training = History(), _device(model), model.training
    optimizer = torch.optim.AdamW(
        _groups(model, injection),
        lr=lr,
        weight_decay=weight_decay,
        fused=device.type in ("cpu", "cuda"),  # one pass over the weights instead of ten
    )
    optimizer.zero_grad()  # a gradient from before, of an experiment, would join the first step
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            bar = progress(range(steps), "training", show=show)
            for step, batch in zip(bar, batches, strict=False):
                started = time.perf_counter()
                rate = lr * _schedule(step, steps, round(warmup * steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                value = train_step(model, batch, optimizer, step + 1, clip=clip)
                history.loss.append(value)
                history.lr.append(rate)
                history.seconds += time.perf_counter() - started
                recent = history.loss[-10:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
    finally:
        model.train(was_training)
    return history
