"""What a method of the learner's own goes through: every verb of the course, on a small BERT."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from ..engine import (
    AdapterLayer,
    Injection,
    Method,
    inject,
    injection_of,
    load_adapter,
    merge,
    registered_methods,
    report,
    save_adapter,
    unload,
    unmerge,
)
from ..methods.unified import Design, Site, check_design, designs_of, gap, moved
from ..train.loop import TrainingDiverged, fit
from .compare import kind, number
from .kit import Refused, Tried, WrongAnswer, is_stub, outcome, summary


@cache
def _built() -> nn.Module:
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.fresh_modules = ("classifier",)
    return model


def _bert() -> nn.Module:
    return copy.deepcopy(_built())


def _inject(model: nn.Module, method: Method) -> Injection:
    """inject, always with the same random numbers; the head stays frozen: what is learned, the
    method learns."""
    torch.random.default_generator.manual_seed(1)
    inject(model, method)
    model.classifier.requires_grad_(False)
    return injection_of(model)


def _rows() -> dict[str, torch.Tensor]:
    """Sixteen rows of up to eight tokens, with labels to learn by heart."""
    drawn = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (16, 8), generator=drawn)
    mask = torch.arange(8) < torch.randint(4, 9, (16, 1), generator=drawn)
    labels = torch.randint(2, (16,), generator=drawn)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


class _ByHeart:
    """A task with the same sixteen rows in every step."""

    name = "sixteen rows"

    def stream(self, size, seed):
        while True:
            yield _rows()


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**_rows()).logits


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _holding(method: Method) -> nn.Module:
    """A small BERT with the method in it, at its start."""
    model = _bert()
    _inject(model, method)
    return model


@torch.no_grad()
def _trained(method: Method) -> nn.Module:
    """The same with all that trains moved at random."""
    model = _holding(method)
    for p in model.parameters():
        if p.requires_grad:
            p.add_((0.05 + p.abs() / 2) * torch.randn_like(p))
    return model


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _quoted(names: list[str]) -> str:
    *first, last = [repr(name) for name in names]
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------ what it is


def _as_declared(method: Method) -> str:
    """A frozen dataclass of its own, with fields that its file can name."""
    cls = type(method)
    settings = vars(cls).get("__dataclass_params__")
    if settings is None:
        raise Refused(
            "the class is no dataclass, so what looks like its fields is none",
            "Write @dataclass(frozen=True) above it.",
        )
    if not settings.frozen:
        raise Refused("it can be changed after it was made: write @dataclass(frozen=True)")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := [name for name in cls.peft_fields if name not in known]:
        raise Refused(
            f"peft_fields names {_quoted(unknown)}, which is no field of the dataclass",
            f"A field has a type beside its name ({unknown[0]}: int = 8); else it is a constant.",
        )
    if "targets" in known and "targets" in cls.names_modules:
        names = ["query"] if isinstance(method.targets, str) else list(method.targets)
        if isinstance(dataclasses.replace(method, targets=names).targets, list):
            raise Refused(
                "its fields are not looked at: targets=['query'] stays a list",
                "Call super().__post_init__() first in your __post_init__.",
            )
    return "a frozen dataclass"


def _as_named(method: Method) -> str:
    """A peft_type that is no other method's."""
    cls = type(method)
    if "peft_type" not in vars(cls):
        inherited = getattr(cls, "peft_type", None)
        raise Refused(
            "it has no peft_type of its own, the name by which a file says whose it is",
            f"It inherits {inherited!r}, which is another method's."
            if inherited
            else 'Give it one in the class: peft_type = "MY_METHOD".',
        )
    if not isinstance(cls.peft_type, str) or not cls.peft_type:
        raise Refused(f"peft_type must be a name, not {kind(cls.peft_type)}")
    if cls not in registered_methods():
        raise Refused(
            "it is not in the registry: another class of this name was defined after it",
            "Run its cell again, and then this one.",
        )
    others = [m for m in registered_methods() if m.peft_type == cls.peft_type and m is not cls]
    if others:
        raise Refused(
            f"the peft_type {cls.peft_type!r} is that of {others[0].__name__} already",
            "load_adapter would take one's file for the other's: choose another name.",
        )
    return f"the peft_type {cls.peft_type!r} is its own"


def _as_injected(method: Method) -> str:
    """It goes into a BERT, adds something that trains, and leaves the base frozen and unchanged."""
    model = _bert()
    base, before, plain = dict(model.named_parameters()), _values(model), _logits(model)
    try:
        injection = _inject(model, method)
    except NotImplementedError:
        if type(method).wrap is not Method.wrap:
            raise
        raise Refused(
            "it has no wrap, which gives the module that takes the place of a layer",
            "Write wrap(self, path, layer); or attach, or select, and no field named targets.",
        ) from None
    for wrapper in injection.wrappers.values():
        if not isinstance(wrapper, AdapterLayer):
            raise Refused(
                f"wrap returns {kind(wrapper)}, and what takes the place of a layer is an "
                "AdapterLayer",
                "Derive your layer from AdapterLayer, and return self.Layer(layer, ...).",
            )
    _refuse_plain_tensors(injection)
    _refuse_shared(injection, base, model)
    numbers = report(model).trainable
    if not numbers:
        raise Refused("nothing of it trains: what it adds holds no nn.Parameter")
    _refuse_changed(injection, base, before, "right after inject")
    first = _logits(model)
    if not first.isfinite().all():
        raise Refused(
            f"right after inject the logits hold {number(first[~first.isfinite()][0])}",
            "torch.empty holds what happened to lie there: fill it, with zeros or random numbers.",
        )
    _refuse_idle(method, plain)
    start = "step 0 is the base"
    if not torch.equal(first, plain):
        start = f"step 0 is not the base (logits move by {_off(first, plain):.2g})"
    return f"{numbers:,} numbers train, the base is frozen, {start}"


def _refuse_plain_tensors(injection: Injection) -> None:
    for outer in injection.modules().values():
        for name, module in outer.named_modules():
            if name.partition(".")[0] == "base":
                continue
            for attribute, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.dim():
                    raise Refused(
                        f"{attribute!r} is a plain tensor, which neither trains nor is saved",
                        "Make it an nn.Parameter; or, if it is fixed, register_buffer it.",
                    )


def _refuse_shared(injection: Injection, base: dict[str, nn.Parameter], model: nn.Module) -> None:
    names, added = {id(p): name for name, p in base.items()}, dict(injection.added())
    for name, p in added.items():
        if id(p) in names:
            raise Refused(
                f"the base trains: {name.rpartition('.')[2]!r} of your layer is the base's own "
                f"{names[id(p)]!r}",
                "What inject finds in a layer beside its base, it trains: read self.base.weight.",
            )
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in added and id(p) not in names:
            raise Refused(
                f"it puts {name!r} into the model by itself",
                "attach only returns its module: inject puts it there, and unload takes it out.",
            )


def _refuse_changed(injection: Injection, base: dict, before: dict, when: str) -> None:
    for name, p in base.items():
        if name not in injection.whole and not torch.equal(p, before[name]):
            raise Refused(
                f"the base's own {name!r} is changed in place: {when} it is another",
                "Compute something new from it: unload cannot bring it back.",
            )


def _refuse_idle(method: Method, plain: torch.Tensor) -> None:
    """Refuses what changes nothing, or changes what it is given."""
    model, read = _trained(method), []
    injection = injection_of(model)
    added = {name for name, _ in injection.added()}
    base = {name: p for name, p in model.named_parameters() if name not in added}
    before = _values(model)
    for path, wrapper in injection.wrappers.items():
        wrapper.register_forward_pre_hook(lambda _, args: read.append((args[0], args[0].clone())))
        wrapper.register_forward_hook(lambda *_, path=path: read.append((path, *read.pop())))
    changed = _logits(model)
    _refuse_changed(injection, base, before, "once forward has run")
    for path, x, copied in read:
        if not torch.equal(x, copied):
            raise Refused(
                f"forward changes its input in place: x of {path!r} is another afterwards",
                "The other layers read the same x: compute something new from it.",
            )
    if torch.equal(changed, plain):
        raise Refused(
            "it changes nothing: whatever its tensors hold, the logits are those of the base",
            "Does wrap return the new layer, and does its forward use what it adds?",
        )


# ------------------------------------------------------------------ its formula

_EXACT = 1e-6  # of a gap in float64


def _as_designed(method: Method) -> str:
    """The change by its formula is what running gives, whatever its fields are."""
    cls = type(method)
    if vars(cls).get("design") is None:
        told = "Write design = Design(form, insertion, modified, composition, delta=...)."
        if cls.design:
            told = f"That of its parent is not its own. {told}"
        raise Refused("it has no design", told)
    for design in designs_of(cls):
        # Not by isinstance: the lesson's own Design is another class than the package's.
        if not all(hasattr(design, f.name) for f in dataclasses.fields(Design)):
            raise Refused(f"its design is {kind(design)}, expected a Design or a tuple of them")
        for choice in ("form", "insertion", "modified", "composition"):
            value = getattr(design, choice)
            if not isinstance(value, str) or not value.strip():
                raise Refused(f"the design does not say its {choice} in a few words")
        if design.example is not None and type(design.example) is not cls:
            raise Refused(f"the example of its design is {kind(design.example)}, not one of it")
    worst, places = _checked(method)
    told = []
    for name, value, changed in _variants(method):
        told.append(f"{name}={value!r}")
        worst = max(worst, _checked(changed, (name, value, getattr(method, name)))[0])
    also = f", and with {', '.join(told)}" if told else ""
    return f"Δh by the formula is what runs (gap {worst:.0e}) at {places} places{also}"


def _checked(method: Method, because: tuple[str, Any, Any] | None = None) -> tuple[float, int]:
    """(the largest gap, the places). `because`: a field, its value here, and the default, with
    which the formula was right."""
    model, worst, places = moved(_bert(), method), 0.0, 0
    for design in designs_of(type(method)):
        with torch.no_grad():
            if not (sites := design.sites(model, _rows())):
                continue
            for site in sites:
                _refuse_no_state(design.delta(site), site)
            off = gap(sites, design.delta)
            cause = None if off <= _EXACT else _formula_cause(sites, design.delta)
        if cause and because:
            name, value, default = because
            raise Refused(
                f"the design's formula is right with {name}={default!r}, but with {name}={value!r} "
                f"it is off by {off:.2g} of the change",
                f"Is {name!r} missing in delta?",
            )
        if cause:
            raise Refused(f"the design's formula is off by {off:.2g} of what running gives", cause)
        worst, places = max(worst, off), places + len(sites)
    if not places:
        raise Refused(
            "its design sees no place in the model, so its formula is compared with nothing",
            "sites=linears, the default, looks at wrapped layers; others need their own observer.",
        )
    return worst, places


def _refuse_no_state(change: Any, site: Site) -> None:
    if not isinstance(change, torch.Tensor):
        raise Refused(f"delta gives {kind(change)}, expected a tensor")
    try:
        fits = torch.broadcast_shapes(change.shape, site.h.shape) == site.h.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise Refused(
            f"delta gives a tensor of shape {tuple(change.shape)} where the hidden state is "
            f"{tuple(site.h.shape)}"
        )


def _formula_cause(sites: list[Site], delta: Callable[[Site], torch.Tensor]) -> str:
    """In what way a formula is wrong: a regularity of its values, or how large they are."""

    def flat(changes) -> torch.Tensor:
        shaped = [c.expand_as(site.h) for c, site in zip(changes, sites, strict=True)]
        return torch.cat([c.flatten() for c in shaped])

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a - b).abs().max() <= _EXACT * b.abs().max())

    ran, told = flat([s.new - s.h for s in sites]), flat([delta(s) for s in sites])
    if not ran.any():
        return "Running changes no state at these places: does it modify others?"
    if close(told, flat([s.new for s in sites])):
        return "It gives the new state h + Δh: delta is the change alone."
    factor = (told @ ran) / (ran @ ran)
    if factor and close(told, factor * ran):
        if abs(factor + 1) < _EXACT:
            return "Its sign is turned."
        times = f"It is {number(factor)} times what running gives, everywhere"
        return f"{times}: is the scale missing, or in it twice?"
    if all(site.x.shape == site.h.shape for site in sites):
        turned = [dataclasses.replace(site, x=site.h, h=site.x) for site in sites]
        if close(flat([delta(site) for site in turned]), ran):
            return "It is right with x and h exchanged: which of them does your forward read?"
    rest = [delta(s) - (s.new - s.h) for s in sites]
    if all(close(r, r.flatten(0, -2)[0].expand_as(r)) for r in rest):
        return "It is off by the same vector for every token: is a bias missing, or there twice?"
    largest = [number(t.abs().max()) for t in (told, ran)]
    return f"The largest entry is {largest[0]} by the formula and {largest[1]} in the model."


def _variants(method: Method) -> Iterator[tuple[str, Any, Method]]:
    """(field, another value, the method with it) for each field that has one that fits a BERT."""
    for field in dataclasses.fields(method):
        for value in _other_values(getattr(method, field.name)):
            try:
                changed = dataclasses.replace(method, **{field.name: value})
                _holding(changed)
            except Exception:  # this value does not fit; perhaps the next one does
                continue
            yield field.name, value, changed
            break


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value]
    if isinstance(value, float):
        return [1.5 * value, value / 2] if value else [0.1, 1.0]
    if value == "all-linear" or (isinstance(value, tuple) and value):
        return [names for names in (("key",), ("value",)) if names != value]
    return []


# ------------------------------------------------------------------ its training

_STEPS = 30


def _as_trained(method: Method) -> str:
    """Gradients reach all that it adds, and fit lowers the loss."""
    model = _bert()
    base, before = dict(model.named_parameters()), _values(model)
    injection = _inject(model, method)
    training = {n: p for n, p in model.named_parameters() if p.requires_grad}
    starts, seen = {n: bool(p.any()) for n, p in training.items()}, dict.fromkeys(training)
    for name, p in training.items():
        p.register_hook(lambda g, name=name: seen.update({name: bool(seen[name] or g.any())}))
    try:
        history = fit(model, _ByHeart(), _STEPS, show=False)
    except TrainingDiverged as error:
        raise Refused(
            f"fit diverges at its learning_rate={method.learning_rate:g}: choose a smaller one",
            str(error).partition(". ")[0],
        ) from None
    _refuse_changed(injection, base, before, "after a training")
    _refuse_unreached(injection, seen, starts)
    first, last = history.loss[0], sum(history.loss[-5:]) / 5
    if not last < first:
        why = "large: the loss rises" if last > first + 1e-6 else "small: nothing moves"
        raise Refused(
            f"fit does not lower the loss on sixteen rows: {first:.3f} at first, {last:.3f} after "
            f"{_STEPS} steps",
            f"Its learning_rate={method.learning_rate:g} may be too {why}.",
        )
    return (
        f"gradients reach all that trains, and fit lowers the loss from {first:.3f} to {last:.3f}"
    )


def _refuse_unreached(injection: Injection, seen: dict, starts: dict) -> None:
    for path in injection.modules():
        inside = [n for n, _ in injection.added() if n.startswith(f"{path}.") and not seen[n]]
        if not inside:
            continue
        short = _quoted([n.removeprefix(f"{path}.") for n in inside])
        zeros = [n.removeprefix(f"{path}.") for n in inside if not starts[n]]
        if len(zeros) > 1 and all(seen[n] is not None for n in inside):
            raise Refused(
                f"{short} never learn: their gradients are 0 in all of {_STEPS} steps",
                f"{_quoted(zeros)} start at zero and are multiplied with each other, so the "
                "gradient of each is 0 for ever: start one of them at random.",
            )
        raise Refused(
            f"no gradient reaches {short} in {_STEPS} steps",
            "forward does not use it; or .data, .detach() or no_grad() cut it off; or it is "
            "multiplied by something that stays 0.",
        )


# ------------------------------------------------------------------ its file


def _as_saved(method: Method) -> str:
    """What is saved and loaded computes the same, whatever its fields are."""
    _refuse_file(method)
    names = []
    for name, value, changed in _variants(method):
        _refuse_file(changed, (name, value))
        names.append(name)
    also = f", with another {' or '.join(names)} too" if names else ""
    return f"saved and loaded it gives equal logits{also}"


def _refuse_file(method: Method, because: tuple[str, Any] | None = None) -> None:
    model = _trained(method)
    expected, loaded, told = _logits(model), _bert(), ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_adapter(model, folder)
        except TypeError as error:
            raise Refused(
                f"save_adapter raised {summary(error)}",
                "Of a field a file holds numbers, strings, lists and None.",
            ) from None
        torch.random.default_generator.manual_seed(2)  # what is not in the file is drawn anew
        try:
            load_adapter(loaded, folder)
        except Exception as error:
            told = f"load_adapter raised {summary(error)}."
        else:
            off = _off(_logits(loaded), expected)
            if off > 1e-5 * expected.abs().max():
                told = f"The logits are off by {off:.2g} once it is loaded."
    if told:
        raise Refused(f"{_file_cause(method, injection_of(model), because)}", told)


def _file_cause(method: Method, injection: Injection, because: tuple[str, Any] | None) -> str:
    cls = type(method)
    if because and because[0] not in cls.peft_fields:
        name, value = because
        return f"{name!r} is missing in peft_fields: saved with {name}={value!r}, it is lost"
    names = [name for name, _ in cls.peft_fields.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"two fields have one name in peft_fields, {twice[0]!r}"
    state = {n: None for m in injection.modules().values() for n in m.state_dict()}
    state = [n for n in state if n.partition(".")[0] != "base"]
    if missing := [name for name in state if name not in cls.tensors]:
        unknown = [name for name in cls.tensors if name not in state]
        also = f" (which names {_quoted(unknown)}; there is none)" if unknown else ""
        return f"{_quoted(missing)} is missing in `tensors`{also}, so the file does not hold it"
    files = [cls.tensors[name] for name in state]
    if twice := [name for name in files if files.count(name) > 1]:
        return f"two of `tensors` have one name in the file, {twice[0]!r}"
    here = f" with {because[0]}={because[1]!r}" if because else ""
    return f"saved and loaded{here} it does not compute the same"


# ------------------------------------------------------------------ in and out


def _as_merged(method: Method) -> str:
    """If it has a merge rule, the weights alone compute the same, and it can be taken out again."""
    model = _trained(method)
    injection = injection_of(model)
    wrappers = injection.wrappers.values()
    if not (wrappers or injection.attached):
        return "what it trains of the base lies there already"
    # Which functions make up a merge rule, the base class says; one of one's own is a rule.
    rule = [n for n in ("merged_tensors", "delta_weight") if hasattr(AdapterLayer, n)]
    if all(getattr(type(w), n) is getattr(AdapterLayer, n) for w in wrappers for n in rule):
        return "it has no rule to merge"
    expected, weights = _logits(model), [w.base.weight.clone() for w in wrappers]
    tolerance = 1e-4 * expected.abs().max().item()
    try:
        merge(model)
    except TypeError as error:  # how a layer says that no weight computes it
        return f"merge refuses it ({summary(error)})"
    if (off := _off(_logits(model), expected)) > tolerance:
        for wrapper in wrappers:
            x = torch.randn(3, wrapper.base.weight.shape[1])
            if _off(wrapper(x), wrapper.base(x)):
                raise Refused(
                    "merged, forward still adds its change, which then counts twice",
                    "While self.merged is True, return self.base(x) alone.",
                )
        raise Refused(
            f"merged, the weights do not compute what forward did: logits are off by {off:.2g}",
            "Compare merged_tensors with forward: scale, transposes, and what becomes of the bias.",
        )
    try:
        unmerge(model)
    except TypeError as error:
        raise Refused("it merges and cannot be taken out again", f"{summary(error)}.") from None
    off = max(_off(w.base.weight, weight) for w, weight in zip(wrappers, weights, strict=True))
    if off > 1e-4 or _off(_logits(model), expected) > tolerance:
        raise Refused(
            f"merged and unmerged, the base is not what it was: its weights are off by {off:.2g}",
            "unmerged_tensors must be the inverse of merged_tensors, for weight and bias.",
        )
    return "it merges, and can be taken out again"


def _as_unloaded(method: Method) -> str:
    """unload gives the base back to the last bit."""
    model = _bert()
    before, plain = _values(model), _logits(model)
    _inject(model, method)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    _logits(unload(model))
    after = _values(model)
    for name, value in before.items():
        if not torch.equal(after[name], value):
            raise Refused(f"unload does not give the base back: {name!r} is another")
    if not torch.equal(_logits(model), plain):
        raise Refused(
            "after unload the base computes something else: a hook is left in it",
            "attach returns its module and a list of the handles of all its hooks.",
        )
    return "unload gives the base back bit by bit"


def _as_listed(method: Method) -> str:
    """It has rows in the table of all methods, which has those of `check_design`."""
    for row in check_design(type(method), _bert(), _rows()):
        if not row["places"] or row["gap"] > _EXACT:
            raise Refused("by the example of its design, the formula is not what running gives")
    return "unified_table has it"


# Each trial, and when it was that the learner's code raised something in it.
_TRIALS = {
    _as_declared: "when it was looked at it",
    _as_named: "when it was looked at it",
    _as_injected: "when it was put into a small BERT it",
    _as_designed: "when its design was compared with running it",
    _as_trained: "when it was trained it",
    _as_saved: "when it was saved and loaded it",
    _as_merged: "when it was merged it",
    _as_unloaded: "when it was taken out it",
    _as_listed: "when it was looked up in the table it",
}
_HINTS = {"before Module.__init__() call": "Call super().__init__(linear) first in your layer."}


class Trials(Tried):
    """The check of a class of methods: an instance of it is tried in every way. The function below
    has the name of the exercise, and says what is right of a method that passes."""

    def __init__(self, reference: Callable) -> None:
        super().__init__(reference, [()], _TRIALS, _HINTS)

    def _check_signature(self, function: Callable) -> None:
        __tracebackhide__ = True
        if isinstance(function, Method):
            raise WrongAnswer(
                f"{self.__name__}: hand over the class itself, not an instance of it."
            )
        if not (isinstance(function, type) and issubclass(function, Method)):
            given = "this class" if isinstance(function, type) else kind(function)
            wanted = f"class {self.__name__}(Method)"
            raise WrongAnswer(f"{self.__name__}: {given} is no method: write {wanted}.")

    def _check_case(self, function: Callable, number: int) -> bool:
        __tracebackhide__ = True
        method, error = outcome(function, [])
        if is_stub(error, function.__module__):
            return False
        if error is not None:
            bare = [p.name for p in _required(function)]
            told = [f"{_quoted(bare)} has no default."] if bare else []
            problem = f"{self.__name__}() raised {summary(error)}"
            self._blame(problem, told, error, function.__module__)
        return self._passes(method, function.__module__)


def _required(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that have no default."""
    found = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    missing = dataclasses.MISSING
    return [f for f in found if f.default is missing and f.default_factory is missing]
