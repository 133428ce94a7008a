"""One conformance suite for any method, in the spirit of scikit-learn's check_estimator.

    check_method(MyMethod(rank=4))                    # on a tiny BERT
    check_method(MyMethod(rank=4), tiny_llama(), merges=True, peft=peft.MyConfig(r=4))

Each check takes a method and a `Bench`, says what is right of the method, or raises `MethodError`
with a sentence that names the mistake.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from inspect import get_annotations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..engine import (
    AdapterLayer,
    Injection,
    Method,
    PeftFiles,
    disabled,
    inject,
    injection_of,
    load_adapter,
    merge,
    read_adapter,
    registered,
    registered_methods,
    report,
    save_adapter,
    unload,
    unmerge,
)
from ..engine.design import Design, Site, designs_of, gap
from ..methods.unified import CHOICES, check_design, perturbed
from ..train.loop import TrainingDiverged, fit
from .exchange import interoperability
from .tiny import by_hand, greedy, padded_batch, perturb, tiny_bert
from .wording import kind, number, summary


class MethodError(AssertionError):
    """Report a fault of a method: a headline, and facts."""

    def __str__(self) -> str:
        headline, *facts = self.args
        return " ".join([headline if headline.endswith("?") else f"{headline}.", *facts])


@cache
def _classifier() -> nn.Module:
    """Return a BERT without dropout; all its widths are multiples of 64, as four bits need."""
    return tiny_bert(
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    """Describe the base on which a method is checked, and the expected results.

    base:     a classifier or a causal model without a method; it stays as it is.
    start:    how far the logits may be from the base's at step 0, as a share of the largest.
    merges:   whether `merge` must work (True), must raise TypeError (False) or may do either.
    loaded:   the method that a file gives back: None means that this is not compared.
    rounding: how far logits may be off once they are loaded, as a share of the largest.
    own_type: whether the kind of its files is its alone; PEFT has one kind for several methods.
    keeps_base: whether the base keeps its values; not where the method quantises it.
    fields:   whether to try other values of the fields too.
    peft:     PEFT's config of the method, to exchange files with PEFT.
    steps:    the steps of a training."""

    base: nn.Module = dataclasses.field(default_factory=_classifier)
    start: float = 0.0
    merges: bool | None = None
    loaded: Method | None = None
    rounding: float = 1e-5
    own_type: bool = True
    keeps_base: bool = True
    fields: bool = True
    peft: Any = None
    steps: int = 30

    @cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        """Return sixteen sequences of up to eight tokens, with labels to memorise."""
        return padded_batch(self.base, [8, 5, 7, 4] * 4)

    @cached_property
    def plain(self) -> torch.Tensor:
        """Return the base's logits."""
        return self.logits(self.model())

    @property
    def task(self) -> SimpleNamespace:
        """Return a task that gives `batch` in every step."""
        return SimpleNamespace(name="sixteen rows", stream=lambda *_: itertools.repeat(self.batch))

    def model(self) -> nn.Module:
        """Return a copy of the base in eval mode."""
        return copy.deepcopy(self.base).eval()

    def holding(
        self, method: Method, model: nn.Module | None = None, head: bool = False
    ) -> nn.Module:
        """Return a model with the method in it, at its start, drawn from the same random numbers
        each time. The head of a classifier stays frozen, unless it is asked for: what is learned,
        the method learns."""
        model = self.model() if model is None else model
        torch.random.default_generator.manual_seed(1)
        inject(model, method)
        if not head:
            for path in injection_of(model).whole_modules:
                model.get_submodule(path).requires_grad_(False)
        return model

    def perturbed(
        self, method: Method, model: nn.Module | None = None, head: bool = False
    ) -> nn.Module:
        """Return the same with all trainable parameters perturbed."""
        return perturb(self.holding(method, model, head), 0.1)

    def logits(self, model: nn.Module) -> torch.Tensor:
        """Return the logits in eval mode, without those of virtual tokens."""
        with torch.no_grad():
            values = model.eval()(**self.batch).logits
        # Virtual tokens come first; a classifier has one row for a text.
        return values[:, -self.batch["input_ids"].shape[1] :] if values.dim() == 3 else values

    def require(
        self,
        model: nn.Module,
        expected: torch.Tensor,
        headline: str,
        *facts: str,
        tolerance: float = 0.0,
    ) -> None:
        """Raise MethodError, `headline` and `facts`, unless the model gives the expected logits."""
        if not (off := _off(self.logits(model), expected)) <= tolerance:
            raise MethodError(f"{headline} (logits are off by {off:.2g})", *facts)

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Return the loss in train mode, drawn from the same random numbers each time."""
        torch.random.default_generator.manual_seed(3)
        return model.train()(**self.batch).loss


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _quoted(names: list[str]) -> str:
    *first, last = [repr(name) for name in names]
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------ what it is


def _as_declared(method: Method, bench: Bench) -> str:
    """Check that it is a frozen dataclass of its own, with fields that its file can name."""
    cls = type(method)
    settings = getattr(cls, "__dataclass_params__", None)
    inherited = "__dataclass_params__" not in vars(cls)
    if settings is None or (inherited and get_annotations(cls)):
        raise MethodError(
            "the class is not a dataclass, so it has no fields",
            "Write @dataclass(frozen=True) above it.",
        )
    if not settings.frozen:
        raise MethodError("it can be changed after it was made: write @dataclass(frozen=True)")
    known = {f.name for f in dataclasses.fields(cls)}
    named = getattr(getattr(cls, "files", None), "fields", {})
    if unknown := [name for name in named if name not in known]:
        raise MethodError(
            f"its files name {_quoted(unknown)}, not a field of the dataclass",
            f"A field needs a type: {unknown[0]}: int = 8. Without a type it is a constant.",
        )
    if "targets" in known and "targets" in cls.names_modules:
        names = ["query"] if isinstance(method.targets, str) else list(method.targets)
        if isinstance(dataclasses.replace(method, targets=names).targets, list):
            raise MethodError(
                "its fields are not looked at: targets=['query'] stays a list",
                "Call super().__post_init__() first in your __post_init__.",
            )
    return "a frozen dataclass"


def _as_named(method: Method, bench: Bench) -> str:
    """Check that the kind of its files is not another method's."""
    cls = type(method)
    files = vars(cls).get("files")
    if not isinstance(files, PeftFiles):
        inherited = getattr(getattr(cls, "files", None), "kind", None)
        raise MethodError(
            "it has no files of its own, which say what the file of an adapter calls it",
            f"It inherits those of {inherited!r}, which is another method."
            if inherited
            else 'Give it some in the class: files = PeftFiles("MY_METHOD", ...).',
        )
    if not isinstance(files.kind, str) or not files.kind:
        raise MethodError(f"the kind of its files must be a name, not {kind(files.kind)}")
    # QLoRA and DoRA are of LoRA's kind, and a constant in their files says which it is.
    others = [m for m in registered_methods() if m is not cls and m.files.kind == files.kind]
    if others := [m for m in others if m.files.constants == files.constants]:
        raise MethodError(
            f"the kind {files.kind!r} is that of {others[0].__name__} already",
            "load_adapter would take one's file for the other's: choose another name.",
        )
    return f"the kind {files.kind!r} is its own"


def _as_injected(method: Method, bench: Bench) -> str:
    """Check that it adds trainable parameters, and that the base stays frozen and unchanged."""
    model = bench.model()
    base, before = dict(model.named_parameters()), _values(model)
    injection = injection_of(bench.holding(method, model))
    for wrapper in injection.wrappers.values():
        if not isinstance(wrapper, AdapterLayer):
            raise MethodError(
                f"wrap returns {kind(wrapper)}, and what takes the place of a layer is an "
                "AdapterLayer",
                "Derive your layer from AdapterLayer, and return self.Layer(layer, ...).",
            )
    _refuse_plain_tensors(injection)
    _refuse_shared(injection, base, model)
    _refuse_frozen(method, bench)
    numbers = report(model).trainable
    if not numbers:
        raise MethodError("nothing of it trains: what it adds holds no nn.Parameter")
    _refuse_changed(injection, base, before, "right after inject")
    first = bench.logits(model)
    if not first.isfinite().all():
        raise MethodError(
            f"right after inject the logits hold {number(first[~first.isfinite()][0])}",
            "torch.empty does not initialise its values: fill it with zeros or random numbers.",
        )
    _refuse_idle(method, bench)
    start = "step 0 is the base"
    if moved_by := _off(first, bench.plain):
        start = f"step 0 is not the base (logits move by {moved_by:.2g})"
    if moved_by > bench.start * bench.plain.abs().max():
        raise MethodError(start, "Start one factor of the change at zero.")
    return f"{numbers:,} trainable parameters, the base is frozen, {start}"


def _refuse_plain_tensors(injection: Injection) -> None:
    for outer in injection.modules().values():
        for name, module in outer.named_modules():
            if name.partition(".")[0] == "base":
                continue
            for attribute, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.dim():
                    raise MethodError(
                        f"{attribute!r} is a plain tensor, which neither trains nor is saved",
                        "Make it an nn.Parameter; or, if it is fixed, register_buffer it.",
                    )


def _refuse_frozen(method: Method, bench: Bench) -> None:
    """Refuse a parameter that wrap freezes, since inject trains it all the same."""
    for layer in method.wrap_all(method.find(bench.model())).values():
        for name, p in layer.named_parameters():
            if not (name.startswith("base.") or p.requires_grad):
                raise MethodError(
                    f"{name!r} is a frozen nn.Parameter, and inject trains every parameter of a "
                    "layer outside its base",
                    "What is fixed is no parameter: register_buffer it.",
                )


def _refuse_shared(injection: Injection, base: dict[str, nn.Parameter], model: nn.Module) -> None:
    names, added = {id(p): name for name, p in base.items()}, dict(injection.added())
    for name, p in added.items():
        if id(p) in names:
            raise MethodError(
                f"the base trains: {name.rpartition('.')[2]!r} of your layer is the base's own "
                f"{names[id(p)]!r}",
                "inject trains every parameter of a layer outside its base: read self.base.weight.",
            )
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in added and id(p) not in names:
            raise MethodError(
                f"it puts {name!r} into the model by itself",
                "attach only returns its module: inject puts it there, and unload takes it out.",
            )


def _refuse_changed(injection: Injection, base: dict, before: dict, when: str) -> None:
    for name, p in base.items():
        if name not in injection.whole and not torch.equal(p, before[name]):
            raise MethodError(
                f"the base's own {name!r} is changed in place: {when} it is another",
                "Compute something new from it: unload cannot bring it back.",
            )


def _refuse_idle(method: Method, bench: Bench) -> None:
    """Refuse a method that changes nothing, or that changes its input."""
    model, read = bench.perturbed(method), []
    injection = injection_of(model)
    added = {name for name, _ in injection.added()}
    base = {name: p for name, p in model.named_parameters() if name not in added}
    before = _values(model)
    for path, wrapper in injection.wrappers.items():
        wrapper.register_forward_pre_hook(lambda _, args: read.append((args[0], args[0].clone())))
        wrapper.register_forward_hook(lambda *_, path=path: read.append((path, *read.pop())))
    changed = bench.logits(model)
    _refuse_changed(injection, base, before, "once forward has run")
    for path, x, copied in read:
        if not torch.equal(x, copied):
            raise MethodError(
                f"forward changes its input in place: x of {path!r} is different afterwards",
                "The other layers read the same x: compute something new from it.",
            )
    if torch.equal(changed, bench.plain):
        raise MethodError(
            "it changes nothing: whatever its tensors hold, the logits are those of the base",
            "Does wrap return the new layer, and does its forward use what it adds?",
        )


# ------------------------------------------------------------------ its formula

_EXACT = 1e-6  # of a gap in float64


def _as_designed(method: Method, bench: Bench) -> str:
    """Check that its formula gives the change that the model computes, for all its fields."""
    cls = type(method)
    if vars(cls).get("design") is None:
        hint = "Write design = Design(form, insertion, modified, composition, delta=...)."
        if cls.design is not None:
            hint = f"The design of its parent class does not count. {hint}"
        raise MethodError("it has no design", hint)
    for design in designs_of(cls):
        # Not by isinstance: the lesson's own Design is another class than the package's.
        if not all(hasattr(design, f.name) for f in dataclasses.fields(Design)):
            raise MethodError(f"its design is {kind(design)}, expected a Design or a tuple of them")
        for choice in CHOICES:
            value = getattr(design, choice)
            if not isinstance(value, str) or not value.strip():
                raise MethodError(f"the design does not say its {choice} in a few words")
        if design.example is not None and type(design.example) is not cls:
            raise MethodError(f"the example of its design is {kind(design.example)}, not one of it")
    off, cause, places = _compared(method, bench)
    if not places:
        raise MethodError(
            "its design finds no layer in the model, so its formula cannot be compared",
            "sites=linears, the default, looks at wrapped layers; others need their own observer.",
        )
    if cause:
        raise MethodError(f"the design's formula is off by {off:.2g} of what running gives", cause)
    settings = []
    for name, value, changed in _variants(method, bench):
        other, cause, _ = _compared(changed, bench)
        if cause:
            raise MethodError(
                f"the design's formula is right with {name}={getattr(method, name)!r}, but with "
                f"{name}={value!r} it is off by {other:.2g} of the change",
                f"Is {name!r} missing in delta?",
            )
        settings.append(f"{name}={value!r}")
        off = max(off, other)
    also = f", and with {', '.join(settings)}" if settings else ""
    return f"Δh by the formula is what the model computes (gap {off:.0e}) at {places} places{also}"


def _compared(method: Method, bench: Bench) -> tuple[float, str | None, int]:
    """Return the largest gap of formula and model, its cause if it is too large, and the places."""
    model, worst, places = perturbed(bench.model(), method), 0.0, 0
    for design in designs_of(type(method)):
        with torch.no_grad():
            if not (sites := design.sites(model, bench.batch)):
                continue
            for site in sites:
                _refuse_no_state(design.delta(site), site)
            off, places = gap(sites, design.delta), places + len(sites)
            if not off <= _EXACT:
                start = design.sites(bench.holding(method).double(), bench.batch)
                return off, _formula_cause(sites, design.delta, start), places
            _refuse_words(design, sites[0])
            worst = max(worst, off)
    return worst, None, places


def _refuse_no_state(change: Any, site: Site) -> None:
    if not isinstance(change, torch.Tensor):
        raise MethodError(f"delta gives {kind(change)}, expected a tensor")
    try:
        change.expand_as(site.h)
    except RuntimeError:
        raise MethodError(
            f"delta gives a tensor of shape {tuple(change.shape)} where the hidden state is "
            f"{tuple(site.h.shape)}"
        ) from None


def _refuse_words(design: Design, site: Site) -> None:
    """Refuse an insertion that says parallel where a formula reads h alone, or the reverse."""

    def reads(name: str) -> bool:
        values = getattr(site, name)
        other = dataclasses.replace(site, **{name: values + torch.randn_like(values)})
        return not torch.equal(design.delta(other), design.delta(site))

    x, h = reads("x"), reads("h")
    if x == h or reads("new"):
        return
    word, state, what = ("parallel", "x", "input") if x else ("sequential", "h", "output")
    if word not in design.insertion:
        raise MethodError(
            f"its insertion is {design.insertion!r}, but delta reads {state} alone",
            f"A change that reads {state}, the {what} of the layer, is {word}.",
        )


def _formula_cause(
    sites: list[Site], delta: Callable[[Site], torch.Tensor], start: list[Site]
) -> str:
    """Return how a formula is wrong: a regularity of its values, or their size. `start` holds the
    sites of the same model before its parameters are perturbed."""

    def flat(changes) -> torch.Tensor:
        shaped = [c.expand_as(site.h) for c, site in zip(changes, sites, strict=True)]
        return torch.cat([c.flatten() for c in shaped])

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a - b).abs().max() <= _EXACT * b.abs().max())

    ran, formula = flat([s.new - s.h for s in sites]), flat([delta(s) for s in sites])
    if not ran.any():
        return "Running changes no state at these places: does it modify others?"
    if close(formula, flat([s.new for s in sites])):
        state = "delta gives the new state h + Δh: it must give the change alone."
        alone = "forward returns the change alone: add h, which is self.base(x)."
        if all(close(site.new, site.h) for site in start):
            return state[0].upper() + state[1:]
        if not any(site.new.any() for site in start):
            return alone[0].upper() + alone[1:]
        return f"Either {state.rstrip('.')}; or {alone}"
    factor = (formula @ ran) / (ran @ ran)
    if factor and close(formula, factor * ran):
        if abs(factor + 1) < _EXACT:
            return "Its sign is reversed."
        times = f"It is {number(factor)} times what running gives, everywhere"
        return f"{times}: is the scale missing, or applied twice?"
    if all(site.x.shape == site.h.shape for site in sites):
        turned = [dataclasses.replace(site, x=site.h, h=site.x) for site in sites]
        if close(flat([delta(site) for site in turned]), ran):
            return "It is right with x and h exchanged: which of them does your forward read?"
    rest = [delta(s) - (s.new - s.h) for s in sites]
    if all(close(r, r.flatten(0, -2)[0].expand_as(r)) for r in rest):
        return "It is off by the same vector for every token: is a bias missing, or added twice?"
    largest = [number(t.abs().max()) for t in (formula, ran)]
    return f"The largest entry is {largest[0]} by the formula and {largest[1]} in the model."


def _variants(method: Method, bench: Bench) -> Iterator[tuple[str, Any, Method]]:
    """Yield (field, another value, the method with it) for each field with one that fits the
    base: a value is refused by a ValueError or a TypeError that names the field.

    Raises MethodError for any other error."""
    for field in dataclasses.fields(method) if bench.fields else ():
        for value in _other_values(getattr(method, field.name)):
            try:
                changed = dataclasses.replace(method, **{field.name: value})
                bench.holding(changed)
            except Exception as error:
                named = re.search(rf"\b{field.name}\b", str(error))
                if isinstance(error, ValueError | TypeError) and named:
                    continue  # this value does not fit; perhaps the next one does
                raise MethodError(
                    f"with {field.name}={value!r} it raised {summary(error)}",
                    f"If the value does not fit, raise a ValueError that names {field.name}.",
                ) from error
            yield field.name, value, changed
            break


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value]
    if isinstance(value, float):
        return [1.5 * value, value / 2] if value else [0.1, 1.0]
    targets = isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)
    if targets or value == "all-linear":
        return [names for names in (("key",), ("value",)) if names != value]
    return []


# ------------------------------------------------------------------ its training


def _as_trained(method: Method, bench: Bench) -> str:
    """Check that gradients reach all its parameters, and that fit lowers the loss."""
    model = bench.model()
    base, before = dict(model.named_parameters()), _values(model)
    injection = injection_of(bench.holding(method, model))
    training = {n: p for n, p in model.named_parameters() if p.requires_grad}
    starts, seen = {n: bool(p.any()) for n, p in training.items()}, dict.fromkeys(training)
    for name, p in training.items():
        p.register_hook(lambda g, name=name: seen.update({name: bool(seen[name] or g.any())}))
    try:
        history = fit(model, bench.task, bench.steps, weight_decay=0.1, show=False)
    except TrainingDiverged as error:
        raise MethodError(
            f"fit diverges at its learning_rate={method.learning_rate:g}: choose a smaller one",
            str(error).partition(". ")[0],
        ) from None
    _refuse_changed(injection, base, before, "after a training")
    _refuse_unreached(seen, starts, bench.steps)
    first, last = history.loss[0], sum(history.loss[-5:]) / 5
    if not last < first:
        why = "large: the loss rises" if last > first + 1e-6 else "small: nothing moves"
        raise MethodError(
            f"fit does not lower the loss on sixteen rows: {first:.3f} at first, {last:.3f} after "
            f"{bench.steps} steps",
            f"Its learning_rate={method.learning_rate:g} may be too {why}.",
        )
    return (
        f"gradients reach all trainable parameters, and fit lowers the loss from {first:.3f} to "
        f"{last:.3f}"
    )


def _refuse_unreached(seen: dict[str, bool | None], starts: dict[str, bool], steps: int) -> None:
    unreached = [name for name, reached in seen.items() if not reached]
    if not unreached:
        return
    module = unreached[0].rpartition(".")[0] + "."
    inside = [name for name in unreached if name.startswith(module)]
    short = _quoted([name.removeprefix(module) for name in inside])
    zeros = [name.removeprefix(module) for name in inside if not starts[name]]
    if len(zeros) > 1 and all(seen[name] is not None for name in inside):
        raise MethodError(
            f"{short} never learn: their gradients are 0 in all of {steps} steps",
            f"{_quoted(zeros)} start at zero and are multiplied with each other, so the gradient "
            "of each is 0 for ever: start one of them at random.",
        )
    raise MethodError(
        f"no gradient reaches {short} in {steps} steps",
        "forward does not use it; or .data, .detach() or no_grad() cut it off; or it is "
        "multiplied by something that stays 0.",
    )


def _as_set(method: Method, bench: Bench) -> str:
    """Check that each field that the class itself declares has an effect."""
    declared, tried = get_annotations(type(method)), []
    for name, value, changed in _variants(method, bench):
        if name not in declared:
            continue
        tried.append(name)
        both = zip(_seen(method, bench), _seen(changed, bench), strict=True)
        if all(one == other for one, other in both):
            raise MethodError(
                f"{name!r} has no effect: with {name}={value!r} it computes and learns the same",
                "Use it, or leave the field out.",
            )
    left = [
        f.name for f in dataclasses.fields(method) if f.name in declared and f.name not in tried
    ]
    if not bench.fields or not (tried or left):
        return "no other value of a field is tried"
    facts = [f"another {' or '.join(tried)} has an effect"] if tried else []
    return "; ".join(facts + [f"no other {name} is tried" for name in left])


def _shapes(method: Method, bench: Bench, base: nn.Module | None = None) -> list:
    model = bench.holding(method, base)
    return [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]


def _seen(method: Method, bench: Bench) -> Iterator[list | str]:
    """Yield what a field may change, the cheapest first: shapes; results, penalty and loss; the
    losses of a training. A setting may also make it refuse these steps."""
    yield _shapes(method, bench)
    model = bench.perturbed(method)
    penalty = torch.as_tensor(method.penalty(injection_of(model))).item()
    yield [bench.logits(model).tolist(), penalty, bench.loss(model).item()]
    model = bench.holding(method)
    torch.random.default_generator.manual_seed(3)
    try:
        losses = fit(model, bench.task, bench.steps, show=False).loss
        yield [*losses, bench.loss(model).item()]
    except (ValueError, TrainingDiverged) as error:
        yield str(error)


# ------------------------------------------------------------------ its file


def _readable(method: Method, bench: Bench) -> AbstractContextManager:
    """Return a context in which `load_adapter` reads its files: a learner's class need not be in
    the registry."""
    return registered(type(method)) if bench.own_type else nullcontext()


def _as_saved(method: Method, bench: Bench) -> str:
    """Check that a saved and loaded adapter computes the same, for all its fields."""
    names: list[str] = []
    with _readable(method, bench):
        _refuse_file(method, bench)
        for name, value, changed in _variants(method, bench):
            _refuse_file(changed, bench, (name, value))
            names.append(name)
    also = f", with another {' or '.join(names)} too" if names else ""
    return f"saved and loaded it gives equal logits{also}"


def _refuse_file(method: Method, bench: Bench, because: tuple[str, Any] | None = None) -> None:
    model = bench.perturbed(method, head=True)
    expected, loaded, problem = bench.logits(model), bench.model(), ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_adapter(model, folder)
        except TypeError as error:
            raise MethodError(
                f"save_adapter raised {summary(error)}",
                "Of a field a file holds numbers, strings, lists and None.",
            ) from None
        torch.random.default_generator.manual_seed(2)  # what is not in the file is drawn again
        try:
            load_adapter(loaded, folder)
        except Exception as error:
            problem = f"load_adapter raised {summary(error)}."
        else:
            off = _off(bench.logits(loaded), expected)
            if off > bench.rounding * expected.abs().max():
                problem = f"The logits are off by {off:.2g} once it is loaded."
        if problem:
            raise MethodError(_file_cause(method, injection_of(model), because), problem)
        if bench.loaded is not None and because is None:
            _refuse_other_file(bench.loaded, loaded, Path(folder))


def _refuse_other_file(expected: Method, loaded: nn.Module, folder: Path) -> None:
    """Refuse a file that gives another method, or that differs once it is saved again."""
    method = injection_of(loaded).method
    for name in expected.names_modules:
        if getattr(expected, name, None) == "all-linear":  # its file holds the names
            named = getattr(method, name, None)
            expected = dataclasses.replace(expected, **{name: named})
    if method != expected:
        raise MethodError(f"loaded it is {method!r}, expected {expected!r}")
    again = save_adapter(loaded, folder / "again")
    (config, tensors, header), other = read_adapter(folder), read_adapter(again)
    same = (config, header, tensors.keys()) == (other[0], other[2], other[1].keys())
    if not same or any(not torch.equal(t, other[1][key]) for key, t in tensors.items()):
        raise MethodError("saved, loaded and saved again, its files differ")


def _file_cause(method: Method, injection: Injection, because: tuple[str, Any] | None) -> str:
    files = method.files
    if because and because[0] not in files.fields:
        name, value = because
        return f"{name!r} is missing in the fields of files: with {name}={value!r}, it is lost"
    names = [name for name, _ in files.fields.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"two fields have one name in the file, {twice[0]!r}"
    state = {n: None for m in injection.modules().values() for n in m.state_dict()}
    state = [n for n in state if n.partition(".")[0] != "base"]
    if missing := [name for name in state if name not in files.tensors]:
        unknown = [name for name in files.tensors if name not in state]
        also = f" (which names {_quoted(unknown)}; there is none)" if unknown else ""
        verb = "is" if len(missing) == 1 else "are"
        return f"{_quoted(missing)} {verb} missing in `tensors`{also}, so the file does not hold it"
    names = [files.tensors[name] for name in state]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"two of `tensors` have one name in the file, {twice[0]!r}"
    here = f" with {because[0]}={because[1]!r}" if because else ""
    return f"saved and loaded{here} it does not compute the same"


# ------------------------------------------------------------------ in and out


def _as_merged(method: Method, bench: Bench) -> str:
    """Check that the merged weights alone compute the same, and that it can be unmerged."""
    model = bench.perturbed(method)
    wrappers = injection_of(model).wrappers.values()
    expected = bench.logits(model)
    tolerance = 1e-4 * expected.abs().max().item()
    try:
        merge(model)
    except TypeError as error:  # how a layer says that no weight computes it
        if bench.merges:
            raise MethodError("merge must work and refuses it", f"{summary(error)}.") from None
        bench.require(model, expected, "merge refuses it and has changed the model")
        return f"merge refuses it ({summary(error)})"
    if bench.merges is False:
        raise MethodError("merge must refuse it: no change of the weights computes the same")
    if not wrappers:
        return "it trains the base's own parameters, so there is nothing to merge"
    if not (off := _off(bench.logits(model), expected)) <= tolerance:
        for wrapper in wrappers:
            x = torch.randn(3, wrapper.base.weight.shape[1])
            if _off(wrapper(x), wrapper.base(x)):
                raise MethodError(
                    "merged, forward still adds its change, which then counts twice",
                    "While self.merged is True, return self.base(x) alone.",
                )
        raise MethodError(
            f"merged, the weights do not compute what forward did: logits are off by {off:.2g}",
            "Compare merged_tensors with forward: scale, transposes, and what becomes of the bias.",
        )
    try:
        unmerge(model)
    except TypeError as error:
        raise MethodError("it can be merged but not unmerged", f"{summary(error)}.") from None
    headline = "merged and unmerged, the base is not what it was"
    hint = "unmerged_tensors must be the inverse of merged_tensors, for weight and bias."
    bench.require(model, expected, headline, hint, tolerance=tolerance)
    merge(model)
    headline = "merged and unloaded, the base computes something else"
    bench.require(unload(model), expected, headline, tolerance=tolerance)
    return "it merges, and can be taken out again"


def _as_unloaded(method: Method, bench: Bench) -> str:
    """Check that unload restores the base bit for bit, and that the method can be injected
    again."""
    model = bench.model()
    before = _values(model)
    for _ in range(2):
        unload(bench.perturbed(method, model, head=True))
        if not bench.keeps_base:
            return "unload takes it out"
        for name, value in _values(model).items():
            if not torch.equal(value, before[name]):
                raise MethodError(f"unload does not give the base back: {name!r} is another")
        bench.require(
            model,
            bench.plain,
            "after unload the base computes something else: a hook is left in it",
            "attach returns its module and a list of the handles of all its hooks.",
        )
    return "unload gives the base back bit by bit"


def _as_disabled(method: Method, bench: Bench) -> str:
    """Check that the model gives the base's logits while it is off, and its own afterwards."""
    if not bench.keeps_base:
        return "the base itself is changed, so nothing is compared with it"
    model = bench.perturbed(method, head=True)
    expected = bench.logits(model)
    with disabled(model):
        bench.require(model, bench.plain, "switched off, the model is not the base")
    bench.require(model, expected, "switched off and on again, it computes something else")
    return "switched off, it is the base bit by bit"


def _as_listed(method: Method, bench: Bench) -> str:
    """Check its rows in the table of all methods, which has those of `check_design`."""
    for row in check_design(type(method), bench.model(), bench.batch):
        if not row["places"] or row["gap"] > _EXACT:
            raise MethodError("by the example of its design, the formula is not what running gives")
    return "unified_table has it"


# ------------------------------------------------------------------ copies, dtypes, devices


def _as_copied(method: Method, bench: Bench) -> str:
    """Check that a deep copy computes the same and is independent."""
    model = bench.perturbed(method)
    expected, twin = bench.logits(model), copy.deepcopy(model)
    bench.require(twin, expected, "a deep copy of the model computes something else")
    changed = bench.logits(perturb(twin, 0.1, seed=6))
    if torch.equal(changed, expected) or not torch.equal(bench.logits(model), expected):
        raise MethodError(
            "a deep copy of the model and the model itself use the same tensors",
            "A hook gets the model as its argument: read your module from there.",
        )
    unload(twin)
    headline = "taken out of a deep copy, it is out of the model itself as well"
    bench.require(model, expected, headline)
    return "a deep copy is independent"


def _as_cast(method: Method, bench: Bench) -> str:
    """Check that it computes, learns and merges in 16 and 64 bits; in 16 its parameters have 32."""
    wide = expected = None
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        base = bench.model().to(dtype)
        plain, at_start = bench.logits(base), f"on a {dtype} base step 0 is not the base"
        model = bench.holding(method, base)
        bench.require(model, plain, at_start, tolerance=bench.start * plain.abs().max())
        perturb(model, 0.1)
        wide = model if wide is None else wide
        model.load_state_dict(wide.state_dict())  # a start may depend on how the base is rounded
        for name, p in injection_of(model).added():
            if p.dtype in (torch.float16, torch.bfloat16):
                raise MethodError(f"on a {dtype} base {name!r} is {p.dtype}: small steps are lost")
        output = model(**bench.batch)
        if output.logits.dtype != dtype:
            raise MethodError(f"on a {dtype} base the logits are {output.logits.dtype}")
        output.loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all()):
                raise MethodError(f"on a {dtype} base {name!r} gets no finite gradient")
        logits = bench.logits(model).double()
        expected = logits if expected is None else expected
        # Layer after layer rounds to a unit in the last place.
        tolerance = 64 * torch.finfo(dtype).eps * expected.abs().max()
        if bench.keeps_base:
            headline = f"on a {dtype} base it computes something else than in 64 bits"
            bench.require(model, expected, headline, tolerance=tolerance)
        headline = f"merged or unmerged in {dtype}, it computes something else"
        hint = "Make parameters in the base's dtype: inject lifts those of 16 bits to 32."
        try:
            merge(model)
        except TypeError:
            continue
        bench.require(model, logits, headline, hint, tolerance=tolerance)
        unmerge(model)
        bench.require(model, logits, headline, hint, tolerance=tolerance)
    return "it computes, learns and merges in 16 and 64 bits"


def _as_counted(method: Method, bench: Bench) -> str:
    """Check that it has the same parameters on the meta device, and can be run and merged there."""
    model = bench.model().to("meta")
    model.tie_weights()
    if _shapes(method, bench) != _shapes(method, bench, model):
        raise MethodError(
            "on the meta device it has other parameters",
            "load_adapter tries a method there first: read shapes, no values.",
        )
    if not model(bench.batch["input_ids"].to("meta")).logits.is_meta:
        raise MethodError("on the meta device its logits have values")
    try:
        merge(model)
        unmerge(model)
    except TypeError:
        if bench.merges:
            raise MethodError("on the meta device merge refuses it") from None
    unload(model)
    return "it works on the meta device"


def _as_generated(method: Method, bench: Bench) -> str:
    """Check that a decoder generates the same with a cache, without one, and by plain forward."""
    if not bench.base.can_generate():
        return "the model does not generate"
    model = bench.perturbed(method)
    full = {name: value[:1] for name, value in bench.batch.items()}  # generate drops its mask
    for batch in (bench.batch, full):
        expected = by_hand(model, batch)
        for cached in (True, False):
            if not torch.equal(greedy(model, batch, use_cache=cached), expected):
                raise MethodError(
                    f"generate {'with' if cached else 'without'} a cache gives another text than "
                    "the forward pass",
                    "In a step with a cache the model sees the last token alone.",
                )
    return "it generates the same with and without a cache"


# Warnings that PEFT's models bring along: torch's, of the sparse tensors of SHiRA, is the second.
_NOT_OF_FILES = ("is_gradient_checkpointing", "Sparse invariant checks")


def _as_exchanged(method: Method, bench: Bench) -> str:
    """Check that PEFT reads its files, and that it reads PEFT's."""
    if bench.peft is None:
        return "files are not compared with PEFT"
    with _readable(method, bench), warnings.catch_warnings(record=True) as caught:
        (row,) = interoperability({"": bench.base}, {"": (method, bench.peft)})
    messages = [str(w.message) for w in caught]
    if messages := [text for text in messages if not any(known in text for known in _NOT_OF_FILES)]:
        raise MethodError(f"PEFT warns of its files: {messages[0].splitlines()[0]}")
    if row["refused"] or row["effect"] < 0.01:
        raise MethodError(f"nothing is exchanged with PEFT: {row['refused'] or 'no effect'}")
    for way in ("ours → PEFT", "PEFT → ours"):
        if row[way] > 1e-5:
            raise MethodError(
                f"from {way.replace('→', 'to')}, the logits are off by {row[way]:.2g}"
            )
    return "files are exchanged with PEFT"


# ------------------------------------------------------------------ all together


# Each check, and when it was that the method's own code raised something in it.
CHECKS: dict[Callable[[Method, Bench], str], str] = {
    _as_declared: "when it was looked at, it",
    _as_named: "when it was looked at, it",
    _as_injected: "when it was put into the base, it",
    _as_designed: "when its design was compared with running, it",
    _as_trained: "when it was trained, it",
    _as_saved: "when it was saved and loaded, it",
    _as_set: "when another value of a field was tried, it",
    _as_merged: "when it was merged, it",
    _as_unloaded: "when it was taken out, it",
    _as_listed: "when it was looked up in the table, it",
    _as_disabled: "when it was switched off, it",
    _as_copied: "when the model was copied, it",
    _as_cast: "when it was put into a base in 16 or 64 bits, it",
    _as_counted: "when it was put into a base on the meta device, it",
    _as_generated: "when it generated a text, it",
    _as_exchanged: "when its files were exchanged with PEFT, it",
}
# What to do where such an error does not say.
HINTS = {
    _as_cast: (
        "In a 16-bit base inject casts the parameters to float32: does forward return the dtype of "
        "the base layer's output?",
    )
}
# A learner's method of exercise 11.3 need not do more than these.
OF_A_LESSON = list(CHECKS)[: list(CHECKS).index(_as_listed) + 1]


def check_method(method: Method, base: nn.Module | None = None, **expected: Any) -> list[str]:
    """Run all checks on a method and return what is right of it, a sentence each.

    Args:
        method: what is checked; it must fit the base.
        base: a classifier or causal model without a method, a BERT if it is None.
        expected: what is expected there, by the names of `Bench`. If `loaded` is left out, a file
            must give the method itself back.

    Raises MethodError with a sentence that names the mistake. A method with a `design` is compared
    with it on a BERT, where designs observe their places."""
    if not isinstance(method, Method):
        raise MethodError(f"pass a method, such as LoRA(rank=4), not {kind(method)}")
    bench = Bench(**({} if base is None else {"base": base}), **{"loaded": method, **expected})
    skipped = set()
    if not bench.own_type:
        skipped.add(_as_named)
    if vars(type(method)).get("design") is None or bench.base.config.model_type != "bert":
        skipped |= {_as_designed, _as_listed}
    facts = []
    for check, when in CHECKS.items():
        if check in skipped:
            continue
        with torch.random.fork_rng(devices=[]):
            try:
                facts.append(check(method, bench))
            except MethodError:
                raise
            except Exception as error:
                hints = HINTS.get(check, ())
                raise MethodError(f"{when} raised {summary(error)}", *hints) from error
    return facts
