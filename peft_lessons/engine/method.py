"""Describe a method: a frozen dataclass derived from `Method`, its files, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn

from .facts import Facts, Kept
from .layer import AdapterLayer
from .settings import SETTINGS, validate
from .targets import find_targets, names_of


@dataclass(frozen=True)
class PeftFiles:
    """Map a method, its settings and its tensors to their names in the two files of an adapter.

    Fields:
        kind:      the method's name there, `peft_type`
        fields:    {field of the method: (its entry in adapter_config.json, PEFT's default)}
        tensors:   {parameter of the wrapping or attached module: its name in the file}
        constants: entries that are always so for this method
        own:       names of entries that PEFT does not know and would warn of: the header of the
                   weights keeps them, which PEFT does not read
        others:    names of further entries that `read` uses, or that say nothing of a trained
                   adapter (how it started), or nothing while an option is off
        off:       {entry that PEFT has and the method has not: values at which it changes nothing},
                   where these are not None, False, "none" or empty
        indices:   how the keys of whole numbers end; all other tensors are floats
        write:     (method, entries, tensors) -> (entries, tensors), applied before saving
        read:      (class, config, tensors) -> (method, tensors), where `fields` are not enough"""

    kind: str
    fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    off: Mapping[str, tuple] = field(default_factory=dict)
    indices: tuple[str, ...] = ()
    write: Callable | None = None
    read: Callable | None = None

    def entries(self, method: Method) -> dict[str, Any]:
        """Return the entries of adapter_config.json for a method's settings."""
        values = {name: getattr(method, f) for f, (name, _) in self.fields.items()}
        return {**values, **self.constants}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return {field: value} of a config, with PEFT's defaults."""
        return {f: config.get(name, default) for f, (name, default) in self.fields.items()}


class Method:
    """Describe a method by a frozen dataclass, such as `LoRA(rank=8, ...)`; the base class.

    A method changes the base in up to three ways, and overrides what it needs of
    `wrap` (a module that replaces each target; `wrap_all` if these share something), `attach`
    (one module for the whole model) and `select` (trainable parameters of the base itself).

    `find`, `check`, `wrap` and `attach` must work on a meta model, which has shapes and no values:
    `load_adapter` tries them there first. An attached module must not hold a module of the base
    (a hook gets the model as its argument). Only parameters are cast to float32 in a 16-bit base;
    `wrap` creates a buffer in the dtype that it needs.

    Class attributes:
        files:          the names of all this in the two files of an adapter, a `PeftFiles`
        takes:          the module types that `wrap` accepts; exactly these, no subclasses, since a
                        subclass may store its weight differently (4-bit) or never call `forward`
        names_modules:  the fields that hold names of modules, or a pattern
        ranks:          the fields that are a rank: at most min(in, out) of a layer
        learning_rate:  the default of `fit`
        rate_factors:   {parameter of the wrapping or attached module: factor of its learning rate}
        moves_base:     how the method changes the base's own weights, in words for an error; None
                        if the base without what is added computes as before `inject`
        design:         the method as a change of a hidden state: one or several `Design`
        facts:          what the course says of it beside its mathematics, a `Facts`

    `load_adapter` reads the files of the methods in the registry: see `register`."""

    files: ClassVar[PeftFiles]
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    names_modules: ClassVar[tuple[str, ...]] = ("targets",)
    ranks: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3
    rate_factors: ClassVar[Mapping[str, float]] = {}
    moves_base: ClassVar[str | None] = None
    design: ClassVar[Any] = None
    facts: ClassVar[Facts | None] = None

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # A field without a rule may hold anything: only the course's own methods must have rules.
        validate(type(self).__name__, **{n: v for n, v in values.items() if n in SETTINGS})
        for name in self.names_modules:
            if name in values:
                object.__setattr__(self, name, names_of(values[name], name))

    # --- what it changes

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return {path: module} of the modules to wrap, by default those in `targets`."""
        if not hasattr(self, "targets"):
            return {}
        return find_targets(model, self.targets, self.takes)

    def check(self, path: str, layer: nn.Module) -> None:
        """Raise ValueError if this layer cannot be wrapped. Called for every target first."""
        for name in self.ranks:
            if (rank := getattr(self, name)) > min(layer.weight.shape):
                raise ValueError(
                    f"{name}={rank} is above min(in, out)={min(layer.weight.shape)} of {path!r}: "
                    "that adds parameters but no freedom; choose a rank up to that size"
                )

    def wrap(self, path: str, layer: nn.Module) -> AdapterLayer:
        """Return the module that replaces `layer`."""
        raise NotImplementedError(
            "it has no wrap, which returns the module that replaces a layer: write "
            "wrap(self, path, layer); or attach, or select, and no field named targets"
        )

    def wrap_all(self, layers: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return {path: module} of the modules that replace all targets, by default from `wrap`.
        Override it if the layers share something."""
        return {path: self.wrap(path, layer) for path, layer in layers.items()}

    def attach(self, model: nn.Module) -> tuple[nn.Module, list] | None:
        """Return a module for the whole model and the handles of its hooks, or None."""
        return None

    def select(self, model: nn.Module) -> Iterable[str]:
        """Return the names of the base's own parameters to train (BitFit, partial fine-tuning).
        ValueError if there are none."""
        return ()

    def added(self, shape: Any) -> float:
        """Return the number of trainable parameters on a `Shape` (costs/estimate.py), without a new
        classification head. ValueError for a method without a formula."""
        self._refuse_formula("added")

    def keeps(self, shape: Any) -> Kept:
        """Return what a training step on a `Shape` keeps because of the method. ValueError for a
        method without a formula."""
        self._refuse_formula("keeps")

    def _refuse_formula(self, formula: str) -> NoReturn:
        counted = sorted(m.__name__ for m in registered_methods() if formula in vars(m))
        raise ValueError(f"no formula for {self!r}: only for {', '.join(counted)}")

    # --- what it does during training

    def before_fit(self, injection: Injection, steps: int) -> None:
        """Prepare for a run of `steps` steps, or refuse it with a ValueError. Called once."""

    def penalty(self, injection: Injection) -> torch.Tensor | float:
        """Return the term to add to the loss."""
        return 0.0

    def after_step(self, injection: Injection, step: int) -> None:
        """Update the method after the optimiser's step (counted from 1), before zero_grad."""


_REGISTERED: dict[tuple[str, str], type[Method]] = {}  # by module and name


def register(method: type[Method]) -> type[Method]:
    """Put a class of methods into the registry, so that `load_adapter` reads its files.

    A decorator, written above @dataclass. A class replaces an earlier one of its name and module,
    as when a notebook's cell is run twice. TypeError for a class without files of its own."""
    if not isinstance(vars(method).get("files"), PeftFiles):
        raise TypeError(
            f"register: {method.__name__} has no files of its own: write "
            'files = PeftFiles("MY_METHOD", ...) in the class'
        )
    _REGISTERED[method.__module__, method.__qualname__] = method
    return method


def registered_methods() -> list[type[Method]]:
    """Return the methods whose files `load_adapter` reads."""
    return list(_REGISTERED.values())


@contextmanager
def registered(method: type[Method]) -> Iterator[None]:
    """Register a class of methods for the time of a `with` block. Errors as `register`."""
    before = dict(_REGISTERED)
    register(method)
    try:
        yield
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)


def method_facts() -> dict[type[Method], Facts]:
    """Return {method: its facts} of the registered methods that state their own, in the order of
    the lessons that introduce them."""
    own = ((method, vars(method).get("facts")) for method in registered_methods())
    stated = [(method, facts) for method, facts in own if facts is not None]
    return dict(sorted(stated, key=lambda row: row[1].lesson))


# ------------------------------------------------------------------ what was done to a model

ATTACHED = "peft_attached"  # the name under which a model holds an attached module


@dataclass
class Injection:
    """Record what `inject` changed in a model; the model holds it, and the other verbs use it."""

    method: Method
    wrappers: dict[str, AdapterLayer]
    attached: nn.Module | None
    handles: list
    whole: dict[str, torch.Tensor]  # parameters of the base that train, with their old values
    whole_modules: tuple[str, ...]
    frozen_head: tuple[str, ...]  # modules of a classification head in which nothing trains
    frozen: dict[str, torch.Tensor]  # their parameters, with their old values
    were_trainable: dict[str, bool]
    fingerprint: str
    body: str  # the fingerprint without a classification head that the file holds
    size: int  # parameters of the base; a method that quantises it leaves fewer to count
    shapes: dict[str, tuple[int, ...]]  # of the wrapped layers' weights, for the same reason
    kept: bool = False  # whether merge made what trained of the base part of it
    off: bool = False  # whether `disabled` has switched the method off

    @property
    def merged(self) -> bool:
        """Return whether the method is merged into the base's weights."""
        return self.kept or any(w.merged for w in self.wrappers.values())

    @property
    def in_full(self) -> tuple[str, ...]:
        """Return the modules of the base that a file contains in full: the trainable ones, and a
        frozen head, since the logits depend on its values."""
        return (*self.whole_modules, *self.frozen_head)

    def modules(self) -> dict[str, nn.Module]:
        """Return {path in the model: module} for all modules that the method added."""
        attached = {} if self.attached is None else {ATTACHED: self.attached}
        return {**self.wrappers, **attached}

    def added(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the model, parameter) for all parameters that the method added."""
        for path, module in self.modules().items():
            for name, p in module.named_parameters():
                if not (path in self.wrappers and name.startswith("base.")):
                    yield f"{path}.{name}", p
