"""Freeze a base model, put a method's modules in the place of its layers, and take them out again.

Every method of the course goes through the verbs of this file. What a method must say of itself is
in `Method`; what a module must offer that takes the place of a layer is in `Adapted`. Whatever does
not fit is refused before anything is changed: settings by rules.py, all that needs the model here.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from .rules import SETTINGS, near_name, validate

# ------------------------------------------------------------------ what a method says of itself


# {(module, name): the class that was defined last by this name}
_DEFINED: WeakValueDictionary[tuple[str, str], type[Method]] = WeakValueDictionary()


class Method:
    """Base class of the frozen dataclasses that describe a method (`LoRA(rank=8, ...)`).

    A method changes the base in up to three ways, and overrides what it needs of
    `wrap` (a module in the place of each target; `wrap_all` where these share something), `attach`
    (one module for the whole model) and `select` (parameters of the base that train themselves).

    `find`, `check`, `wrap` and `attach` must work on a meta model, which has shapes and no values:
    `load_adapter` tries them there first. An attached module must not hold a module of the base
    (a hook gets the model as its argument). Only parameters are lifted to float32 in a 16-bit base;
    a buffer that needs it is made so by `wrap`.

    Class attributes:
        peft_type:      the name of the method in `adapter_config.json`
        peft_fields:    {field: (name in that file, value PEFT takes if the name is absent)}
        peft_constants: entries of that file that are always so for this method
        own_entries:    names of those entries that PEFT does not know and would warn of: they are
                        kept in the header of the weights instead, which it reads past
        peft_others:    names of further entries that `from_peft` reads, or that say nothing of an
                        adapter that is trained already (how it started), or nothing while an
                        option is off that the method has not
        peft_off:       {entry that PEFT has and the method has not: the values at which it changes
                        nothing}, where they are others than None, False, "none" and empty
        tensors:        {parameter of the wrapping or attached module: its name in the file}
        index_tensors:  how the keys of whole numbers end in the file; all others are floats
        takes:          the module types that `wrap` accepts; exactly these, no subclasses, since a
                        subclass may store its weight differently (4-bit) or never call `forward`
        names_modules:  the fields that hold names of modules, or a pattern
        ranks:          the fields that are a rank: at most min(in, out) of a layer
        learning_rate:  what `fit` uses if it is not told otherwise
        rate_factors:   {parameter of the wrapping or attached module: what that rate is multiplied
                        by for it}, where one rate does not suit all of them
        design:         the method as a change of a hidden state: one or several `Design`"""

    peft_type: ClassVar[str]
    peft_fields: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    peft_constants: ClassVar[Mapping[str, Any]] = {}
    own_entries: ClassVar[tuple[str, ...]] = ()
    peft_others: ClassVar[tuple[str, ...]] = ()
    peft_off: ClassVar[Mapping[str, tuple]] = {}
    tensors: ClassVar[Mapping[str, str]] = {}
    index_tensors: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    names_modules: ClassVar[tuple[str, ...]] = ("targets",)
    ranks: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3
    rate_factors: ClassVar[Mapping[str, float]] = {}
    design: ClassVar[Any] = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        _DEFINED[cls.__module__, cls.__qualname__] = cls

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # A field that is called like a thing of a lesson, `layers`, may mean what it likes.
        validate(type(self).__name__, **{n: v for n, v in values.items() if n in SETTINGS})
        for name in self.names_modules:
            if name in values:
                object.__setattr__(self, name, _names(values[name], name))

    # --- what it changes

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to wrap, {path: module}. By default those that `targets` names."""
        if not hasattr(self, "targets"):
            return {}
        return find_targets(model, self.targets, self.takes)

    def check(self, path: str, layer: nn.Module) -> None:
        """Raises ValueError if this layer cannot be wrapped. Called for every target first."""
        for name in self.ranks:
            if (rank := getattr(self, name)) > min(layer.weight.shape):
                raise ValueError(
                    f"{name}={rank} is above min(in, out)={min(layer.weight.shape)} of {path!r}: "
                    "that adds parameters but no freedom; choose a rank up to that size"
                )

    def wrap(self, path: str, layer: nn.Module) -> Adapted:
        """The module that takes the place of `layer`."""
        raise NotImplementedError

    def wrap_all(self, layers: Mapping[str, nn.Module]) -> dict[str, Adapted]:
        """The modules that take the places of all targets, {path: module}; by default each is made
        by itself. One whose layers share something makes it here."""
        return {path: self.wrap(path, layer) for path, layer in layers.items()}

    def attach(self, model: nn.Module) -> tuple[nn.Module, list] | None:
        """One module for the whole model and the hook handles that make it work, or None."""
        return None

    def select(self, model: nn.Module) -> Iterable[str]:
        """Names of the base's own parameters that train (BitFit, partial fine-tuning). ValueError
        if there are none."""
        return ()

    # --- what it does during training

    def before_fit(self, injection: Injection, steps: int) -> None:
        """Called once before a run of `steps` steps; may refuse it. A run that goes on from a
        checkpoint is announced by its whole number of steps too, and before its state is read."""

    def penalty(self, injection: Injection) -> torch.Tensor | float:
        """What is added to the task's loss."""
        return 0.0

    def after_step(self, injection: Injection, step: int) -> None:
        """Called after the optimiser's step (counted from 1), while gradients are still there."""

    # --- its files

    def to_peft(self, tensors: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
        """(entries of adapter_config.json, tensors of the file) for the tensors in memory."""
        entries = {name: getattr(self, f) for f, (name, _) in self.peft_fields.items()}
        return {**entries, **self.peft_constants}, tensors

    @classmethod
    def settings_of(cls, config: dict) -> dict[str, Any]:
        """The fields' values in a config, {field: value}, with PEFT's defaults."""
        return {f: config.get(name, default) for f, (name, default) in cls.peft_fields.items()}

    @classmethod
    def from_peft(cls, config: dict, tensors: dict) -> tuple[Method, dict[str, torch.Tensor]]:
        """(the method, the tensors in memory) for what a file holds."""
        return cls(**cls.settings_of(config)), tensors


class Adapted(nn.Module):
    """A layer of the base and what a method adds to it; takes the layer's place in the model.

    A subclass computes `forward` from `self.base` and, while `self.merged`, from the base alone.
    If the method merges by adding to the weight, it gives that change, `delta_weight`. One that
    rescales gives the merge rule itself as two functions, `merged_tensors` and `unmerged_tensors`:
    the base layer's new (weight, bias) from what the base layer holds now; None for a bias means
    that it stays. `merged_tensors` is called twice for each merge, and may remember in a buffer
    what `unmerged_tensors` needs."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.merged = False

    # Some models look at their layers' tensors themselves, T5 at a weight's dtype for one.
    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def delta_weight(self) -> torch.Tensor:
        """What is added to the weight, (out, in). TypeError if nothing that is added would do."""
        raise TypeError(f"{type(self).__name__} cannot be merged into its base layer")

    def merged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        change = self.delta_weight()  # first: it may refuse, and not every base has a weight
        return self.base.weight + change, None

    def unmerged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        change = self.delta_weight()
        return self.base.weight - change, None

    def merge_weights(self) -> None:
        """Fold what was learned into the base layer, and switch the branch off.

        Raises RuntimeError if it is merged already (the change would count twice), ValueError if
        the result holds NaN or infinity (nothing is changed then)."""
        self._move(merged=True)

    def unmerge_weights(self) -> None:
        """Take it out again (to rounding), and switch the branch on. Errors as above."""
        self._move(merged=False)

    def _new_tensors(self, merged: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        _refuse_twice(self.merged, merged)
        with torch.no_grad():
            new = self.merged_tensors() if merged else self.unmerged_tensors()
        for what, tensor in zip(("weight", "bias"), new, strict=True):
            if tensor is None or tensor.is_meta:
                continue
            dtype = getattr(self.base, what).dtype
            # A float32 sum may be finite and yet too large for a float16 layer.
            stored = tensor.to(dtype) if dtype.is_floating_point else tensor
            if not stored.isfinite().all():
                raise ValueError(
                    f"the new {what} would hold NaN or infinity; nothing was changed: look at the "
                    "adapter's values, training may have diverged"
                )
        return new

    def _move(self, merged: bool) -> None:
        weight, bias = self._new_tensors(merged)
        with torch.no_grad():
            self.base.weight.copy_(weight)
            if bias is not None:
                self.base.bias.copy_(bias)
        self.merged = merged


def _refuse_twice(merged: bool, wanted: bool) -> None:
    if merged == wanted:
        raise RuntimeError(
            "already merged: merging again would add the change twice; unmerge first"
            if merged
            else "not merged: there is nothing to take out"
        )


def registered_methods() -> list[type[Method]]:
    """Every method that has been defined so far: the registry.

    Of a class that was defined again, as when a notebook's cell is run twice, the last one, even
    if it has another base class by then, or no peft_type any more."""
    return [m for m in list(_DEFINED.values()) if "peft_type" in vars(m)]


# ------------------------------------------------------------------ finding modules by name


def _names(value: Any, argument: str) -> tuple[str, ...] | str:
    """`targets` or `also_train` as a tuple of names; a string stays one: a pattern."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{argument}='' is empty: name at least one module")
        return value
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument}={value!r} must be a tuple of module names")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{argument}={names!r} must hold non-empty strings only")
    return names


def matches(path: str, names: tuple[str, ...] | str) -> bool:
    """PEFT's rule: a name matches whole segments at the end of a path; a string is a pattern that
    must match the whole path."""
    if isinstance(names, str):
        try:
            return re.fullmatch(names, path) is not None
        except re.error as error:
            raise ValueError(f"{names!r} is no regular expression: {error}") from None
    return any(path == name or path.endswith("." + name) for name in names)


def within(path: str, names: tuple[str, ...] | str) -> bool:
    """Whether names match a path, or that of a module which it is part of."""
    parts = path.split(".")
    return any(matches(".".join(parts[:n]), names) for n in range(1, len(parts) + 1))


def one_by_one(names: tuple[str, ...] | str) -> list[tuple[str, tuple[str, ...] | str]]:
    """(name, the rule that it is alone) of each; a pattern is one rule."""
    return [(names, names)] if isinstance(names, str) else [(name, (name,)) for name in names]


def require_among(paths: Collection[str], names: tuple[str, ...] | str, argument: str) -> None:
    """ValueError for a name of `names` that matches none of `paths`."""
    for name, rule in one_by_one(names):
        if not any(matches(path, rule) for path in paths):
            raise ValueError(
                f"{argument}: {name!r} is not among the targets, which are {_leaves(paths)}; "
                "add it there too"
            )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: every name under which it is reachable}."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    return owners


def _tied(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """{path: (its parameter, the name of another place that has the same one)}, the tied ones."""
    owners, tied = _owners(model), {}
    for path, module in modules.items():
        for name, p in module.named_parameters():
            for other in owners[id(p)]:
                if other != f"{path}.{name}":
                    tied.setdefault(path, (name, other))
    return tied


def _refuse_tied(model: nn.Module, modules: Mapping[str, nn.Module], argument: str) -> None:
    for path, (name, other) in _tied(model, modules).items():
        raise ValueError(
            f"{argument}: {path!r} shares its {name} with {other!r} (tied weights): changing one "
            "changes both; leave it out"
        )


def _packed(module: nn.Module, recurse: bool = False) -> bool:
    """Whether a module holds a weight packed into bytes: 4-bit codes have no gradient."""
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return any(t.dtype == torch.uint8 for t in tensors)


_IN_4_BITS = (
    ", in 4 bits already: load the model unquantised for the methods of the course, or "
    "dequantize(model) first; PEFT takes what bitsandbytes quantised"
)


def refuse_packed(modules: Mapping[str, nn.Module], argument: str) -> None:
    """ValueError if one of the modules, {path: module}, holds packed 4-bit codes."""
    for path, module in modules.items():
        if _packed(module, recurse=True):
            raise ValueError(
                f"{argument}: {path!r} holds packed 4-bit codes, which have no gradient: put an "
                "adapter beside them"
            )


def find_targets(
    model: nn.Module, targets: tuple[str, ...] | str, takes: tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """The modules that `targets` names, {path: module}; "all-linear" means all but the head and
    what shares its weight with another module.

    Raises ValueError if a name matches nothing, or a module that cannot be wrapped."""
    # A module reachable under two paths would be wrapped in one of them only, hence the duplicates.
    # The model itself has no parent in which something could take its place.
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if p}
    usable = [path for path, m in modules.items() if type(m) in takes]
    kinds = " or ".join(t.__name__ for t in takes)
    if targets == "all-linear":
        if packed := [path for path, module in modules.items() if _packed(module)]:
            kind = type(modules[packed[0]]).__name__
            raise ValueError(f"targets='all-linear': {packed[0]!r} is a {kind}{_IN_4_BITS}")
        heads = fresh_modules(model) or ("lm_head",)
        tied = _tied(model, {path: modules[path] for path in usable})
        inside = tuple(f"{path}." for path in head_of(model))
        found = [
            path
            for path in usable
            if not (matches(path, heads) or f"{path}.".startswith(inside) or path in tied)
        ]
        if not found:
            raise ValueError(f"targets='all-linear': the model has no {kinds} besides its head")
    else:
        for name, rule in one_by_one(targets):
            if not any(matches(path, rule) for path in modules):
                raise ValueError(_nothing_found(name, isinstance(targets, str), usable, kinds))
        found = [path for path in modules if matches(path, targets)]
        if not found:
            raise ValueError(f"targets is empty: name at least one {kinds}: {_leaves(usable)}")
    for path in found:
        module = modules[path]
        if isinstance(module, Adapted):
            raise ValueError(f"targets: {path!r} is wrapped already; unload(model) first")
        if type(module) not in takes and _packed(module):
            raise ValueError(f"targets: {path!r} is a {type(module).__name__}{_IN_4_BITS}")
        if type(module) not in takes:
            raise ValueError(
                f"targets: {path!r} is a {type(module).__name__}, but only {kinds} can be wrapped"
                + (
                    "; a Conv1D stores its weight as (in, out): convert it to a Linear first"
                    if type(module).__name__ == "Conv1D"
                    else f"; those are called {_leaves(usable)} (a longer part of the path, as "
                    "'mlp.dense', tells modules of one name apart)"
                )
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        fast = isinstance(parent, nn.TransformerEncoderLayer)
        if fast and torch.backends.mha.get_fastpath_enabled():
            raise ValueError(
                f"targets: {path!r} is part of a TransformerEncoderLayer, which in eval mode reads "
                "the weights past whatever wraps them; call "
                "torch.backends.mha.set_fastpath_enabled(False) first"
            )
    targeted = {path: modules[path] for path in found}
    _refuse_tied(model, targeted, "targets")
    return targeted


def _leaves(paths: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in dict.fromkeys(p.rsplit(".", 1)[-1] for p in paths)) or "none"


def _nothing_found(name: str, is_pattern: bool, usable: list[str], kinds: str) -> str:
    text = f"targets: {name!r} matches no module of the model"
    if is_pattern:
        text += f" (a string is a pattern for whole paths; a name goes in a tuple: ({name!r},))"
    else:
        text += near_name(name.rpartition(".")[2], usable)
    end = " " if text.endswith("?") else ". "
    return f"{text}{end}Its {kinds} layers are called {_leaves(usable)}"


def fresh_modules(model: nn.Module) -> tuple[str, ...]:
    """Modules with random values (a new head): these always train and are saved in full."""
    return tuple(getattr(model, "fresh_modules", ()))


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Return the modules of a sequence classifier's head, () for other models: all modules beside
    its base model that have parameters, and no 4-bit codes among them."""
    body = getattr(model, "base_model", model)
    if not is_classifier(model) or body is model:
        return ()
    children = [(name, m) for name, m in model.named_children() if m is not body]
    return tuple(name for name, m in children if list(m.parameters()) and not _packed(m, True))


def is_classifier(model: nn.Module) -> bool:
    """Tell by the name of its class whether a model is a sequence classifier."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _frozen_head(model: nn.Module, touched: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of the head that hold none of the `touched` paths, which are the targets
    and all that trains of the base."""
    touched = list(touched)
    return tuple(h for h in head_of(model) if not any(within(path, (h,)) for path in touched))


def _find_whole(model: nn.Module, also_train: Any, wrapped: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that train in full: the fresh ones and those that `also_train` names."""
    names = _names((also_train,) if isinstance(also_train, str) else also_train, "also_train")
    names = tuple(dict.fromkeys((*fresh_modules(model), *names)))
    found: dict[str, nn.Module] = {}
    for name in names:
        here = {p: m for p, m in model.named_modules() if p and matches(p, (name,))}
        if not here:
            known = [p for p, m in model.named_modules() if p and list(m.parameters(recurse=False))]
            raise ValueError(
                f"also_train: {name!r} matches no module of the model{near_name(name, known)}"
            )
        found.update(here)
    refuse_packed(found, "also_train")
    for path, module in found.items():
        if not any(True for _ in module.parameters()):
            raise ValueError(f"also_train: {path!r} has no parameters to train")
        for target in wrapped:
            if (path + ".").startswith(target + ".") or target.startswith(path + "."):
                raise ValueError(f"{path!r} trains in full, so {target!r} cannot be a target too")
    _refuse_tied(model, found, "also_train")
    return found


# ------------------------------------------------------------------ what was done, and to undo it


ATTACHED = "peft_attached"  # the name under which a model holds an attached module


@dataclass
class Injection:
    """What `inject` did to a model; kept on the model, used by the other verbs."""

    method: Method
    wrappers: dict[str, Adapted]
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

    @property
    def merged(self) -> bool:
        return self.kept or any(w.merged for w in self.wrappers.values())

    @property
    def in_full(self) -> tuple[str, ...]:
        """The modules of the base that a file holds in full: those that train, and a frozen head,
        since without its values another head would give other logits."""
        return (*self.whole_modules, *self.frozen_head)

    def modules(self) -> dict[str, nn.Module]:
        """{path in the model: module}: all that the method added."""
        attached = {} if self.attached is None else {ATTACHED: self.attached}
        return {**self.wrappers, **attached}

    def added(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of all that the method added."""
        for path, module in self.modules().items():
            for name, p in module.named_parameters():
                if not (path in self.wrappers and name.startswith("base.")):
                    yield f"{path}.{name}", p


def injection_of(model: nn.Module) -> Injection | None:
    """What `inject` did to this model, or None if it is an untouched base."""
    return model.__dict__.get("_peft_injection")


def require_injection(model: nn.Module, verb: str, method: type[Method] | None = None) -> Injection:
    """What `inject` did to the model. ValueError if it holds no method, or not this kind."""
    injection = injection_of(model)
    # By the name of its type: a lesson defines a method anew, and a file may be read by either.
    if injection is None or (method and injection.method.peft_type != method.peft_type):
        what = method.__name__ if method else "method"
        raise ValueError(f"{verb}: the model holds no {what}; inject(model, ...) one first")
    return injection


def attached_to(model: nn.Module, kind: type[nn.Module], verb: str) -> nn.Module:
    """The module of this kind that a method attached. ValueError if the model holds none."""
    attached = getattr(injection_of(model), "attached", None)
    if not isinstance(attached, kind):
        raise ValueError(f"{verb}: the model holds no {kind.__name__}; inject one first")
    return attached


@dataclass(frozen=True)
class Report:
    """What trains after `inject` or `freeze`. Printing it shows a table."""

    method: Method | None
    trainable: int
    total: int
    base: int
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    whole: tuple[str, ...] = ()
    whole_parameters: int = 0
    fresh: tuple[str, ...] = ()
    frozen_head: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows = [("base, frozen", self.base - self.whole_parameters, "")]
        if added := self.total - self.base:
            leaves = (m.rsplit(".", 1)[-1] for m in self.modules)
            sites = Counter(zip(leaves, self.shapes, strict=True))
            where = ", ".join(
                f"{n} × {leaf} {s[1]}→{s[0]}" if len(s) == 2 else f"{n} × {leaf}"
                for (leaf, s), n in sites.items()
            )
            rows.append(("added, trains", added, where))
        if self.whole_parameters:
            # Single parameters go by the end of their path: "6 × query.bias".
            ends = Counter(
                f"{n} (fresh head)" if n in self.fresh else ".".join(n.split(".")[-2:])
                for n in self.whole
            )
            names = [end if n == 1 else f"{n} × {end}" for end, n in ends.items()]
            shown = ", ".join(names[:3])
            if len(names) > 3:
                shown += f" and {sum([*ends.values()][3:])} more"
            rows.append(("of the base, trains", self.whole_parameters, shown))
        share = 100 * self.trainable / self.base
        rows.append(("trainable", self.trainable, f"{share:.3g} % of the base's {self.base:,}"))
        head = repr(self.method) if self.method else "all frozen but what is named below"
        body = [_on_lines(f"  {what:<20}{n:>13,}  {note}".rstrip(), 37) for what, n, note in rows]
        if self.frozen_head:
            body += [
                f"  Frozen in the classification head: {', '.join(self.frozen_head)}.",
                f"  To train the head too, pass also_train={self.frozen_head}.",
            ]
        return "\n".join((_on_lines(head, 4), *body))


def _on_lines(text: str, indent: int) -> str:
    """Wrap a text at 100 characters, after a comma alone; further lines are indented."""
    tied = re.sub(r"(?<!,) ", "\N{NO-BREAK SPACE}", text)
    shown = textwrap.fill(tied, 100, subsequent_indent=" " * indent, break_long_words=False)
    return shown.replace("\N{NO-BREAK SPACE}", " ")


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _trainable(model: nn.Module) -> int:
    return _size(p for p in model.parameters() if p.requires_grad)


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """A short digest of the base's names, shapes and a sample of its values (of its codes where it
    is in 4 bits), without what is fresh and the modules at the top that `without` names.

    The same base gives the same digest in float32 and bfloat16. A model on the meta device has no
    values: its digest says "meta" and is not compared."""
    digest, outside = hashlib.sha256(), (*fresh_modules(model), *without)
    codes = ((name, b) for name, b in model.named_buffers() if b.dtype == torch.uint8)
    for name, p in (*model.named_parameters(), *codes):
        if p.is_meta:
            return "meta"
        if within(name, outside):
            continue
        flat = p.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32).bfloat16()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------ the verbs


def refuse_injected(model: nn.Module) -> None:
    """RuntimeError if a method is in the model or in a part of it."""
    for path, module in model.named_modules():
        injection = injection_of(module)
        if injection is not None:
            where = f"model.{path}" if path else "model"
            raise RuntimeError(
                f"the {where} holds {injection.method!r} already: a second method would wrap the "
                f"first; unload({where}) first"
            )


def freeze(model: nn.Module, also_train: Iterable[str] | str = ()) -> Report:
    """Freeze the whole model but a fresh head and the modules named in `also_train`, in place.

    Raises ValueError if a name matches nothing, RuntimeError if a method is in the model."""
    refuse_injected(model)
    whole = _find_whole(model, also_train, ())
    model.requires_grad_(False)
    for module in whole.values():
        module.requires_grad_(True)
    n, trainable = _size(model.parameters()), _trainable(model)
    left, fresh = _frozen_head(model, whole), fresh_modules(model)
    return Report(None, trainable, n, n, (), (), tuple(whole), trainable, fresh, left)


def _in_mode_of(layer: nn.Module, wrapper: Adapted) -> Adapted:
    """The wrapper, what it adds in the mode (train or eval) of the layer that it takes the place
    of. What is in the layer keeps its own: a user may have switched off one dropout."""
    inside = set(layer.modules())
    for module in wrapper.modules():
        if module not in inside:
            module.training = layer.training
    return wrapper


def _restore(model: nn.Module, were_trainable: dict[str, bool]) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(were_trainable[name])


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# Parameters made under a caller's inference_mode() could never train.
@torch.inference_mode(False)
def inject(model: nn.Module, method: Method, also_train: Iterable[str] | str = ()) -> Report:
    """Freeze `model` and put `method` into it, in place.

    What the method adds trains, and with it a fresh head and the modules that `also_train` names
    (PEFT's modules_to_save). Any other classification head stays frozen, and the report says so.
    Added parameters lie on the device of their layer; in a half-precision base they are float32, as
    in PEFT, since small steps would be lost in 16 bits.

    Returns a `Report`. Raises TypeError or ValueError, with the model unchanged, if the method does
    not fit the model, and RuntimeError if a method is in it already."""
    if not isinstance(method, Method):
        known = ", ".join(sorted(m.__name__ for m in registered_methods()))
        raise TypeError(f"method={method!r} must describe a method, such as one of: {known}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_injected(model)
    targets = method.find(model)
    whole = _find_whole(model, also_train, targets)
    for path, layer in targets.items():
        method.check(path, layer)
    # A method that merely chooses parameters must choose some; the names are checked here, once.
    parameters = dict(model.named_parameters())
    chosen = list(method.select(model))
    for name in chosen:
        if name not in parameters:
            raise ValueError(f"{type(method).__name__}: {name!r} is no parameter of the model")
        if not parameters[name].is_floating_point():
            raise ValueError(f"{type(method).__name__}: {name!r} is{_IN_4_BITS[1:]}")
    frozen_head = _frozen_head(model, (*targets, *whole, *chosen))
    kept_apart = [path for path in head_of(model) if path in whole or path in frozen_head]
    digest = fingerprint(model)
    body = fingerprint(model, kept_apart) if kept_apart else digest
    size = _size(parameters.values())
    weights = {path: getattr(layer, "weight", None) for path, layer in targets.items()}
    shapes = {path: tuple(getattr(weight, "shape", ())) for path, weight in weights.items()}
    were_trainable = {n: p.requires_grad for n, p in parameters.items()}
    try:
        made = method.wrap_all(targets)
        wrappers = {path: _in_mode_of(layer, made[path]) for path, layer in targets.items()}
        attached, handles = method.attach(model) or (None, [])
        if not (wrappers or attached or chosen):
            raise ValueError(f"{type(method).__name__} finds nothing to train in this model")
    except Exception:
        _restore(model, were_trainable)
        raise

    # From here on nothing can fail: the model is changed.
    names = {f"{path}.{n}" for path, m in whole.items() for n, _ in m.named_parameters()}
    old = {n: p.detach().clone() for n, p in parameters.items() if n in names or n in chosen}
    frozen = {n: p.detach().clone() for n, p in parameters.items() if within(n, frozen_head)}
    model.requires_grad_(False)
    for name in old:
        parameters[name].requires_grad_(True)
    for path, wrapper in wrappers.items():
        _put(model, path, wrapper)
    if attached is not None:
        model.add_module(ATTACHED, attached.train(model.training))
    model._peft_injection = injection = Injection(
        method,
        wrappers,
        attached,
        handles,
        old,
        tuple(whole),
        frozen_head,
        frozen,
        were_trainable,
        digest,
        body,
        size,
        shapes,
    )
    for _, p in injection.added():
        p.data = p.data.float() if p.dtype in (torch.float16, torch.bfloat16) else p.data
        p.requires_grad_(True)
    return report(model)


def report(model: nn.Module) -> Report:
    """The report of an injected model once more."""
    injection = require_injection(model, "report")
    added = {name: p.numel() for name, p in injection.added()}
    # A wrapper may add nothing: QLoRA also quantises layers that get no adapter.
    adding = {
        path: injection.shapes[path]
        for path in injection.wrappers
        if any(name.startswith(path + ".") for name in added)
    }
    # Of the base train whole modules and, beside them, the parameters that the method selects.
    inside = tuple(module + "." for module in injection.whole_modules)
    selected = (name for name in injection.whole if not name.startswith(inside))
    return Report(
        injection.method,
        _trainable(model),
        injection.size + sum(added.values()),
        injection.size,
        tuple(adding),
        tuple(adding.values()),
        (*injection.whole_modules, *selected),
        sum(t.numel() for t in injection.whole.values()),
        fresh_modules(model),
        injection.frozen_head,
    )


def _merge_all(model: nn.Module, verb: str, merged: bool) -> None:
    injection = require_injection(model, verb)
    if injection.attached is not None:
        name = type(injection.method).__name__
        raise TypeError(
            f"{verb}: what {name} adds lies outside the layers, and their weights cannot hold it"
        )
    if not injection.wrappers:  # what trained is the base's own, and lies in its weights already
        _refuse_twice(injection.kept, merged)
        injection.kept = merged
    # First everything is computed and thrown away: an error in the last layer leaves the first one
    # as it was, and never more than one layer's new weight is held.
    for path, wrapper in injection.wrappers.items():
        try:
            wrapper._new_tensors(merged)
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{verb}: {path!r}: {error}") from None
    for wrapper in injection.wrappers.values():
        wrapper._move(merged)


def merge(model: nn.Module) -> None:
    """Fold the method into the base's weights; the model computes the same, without the branch.
    What a method trains of the base itself lies there already: then `unload` lets it stay.

    Raises RuntimeError if merged already, TypeError if the method cannot be merged, ValueError if a
    weight would hold NaN or infinity. In each case the model stays as it was."""
    _merge_all(model, "merge", True)


def unmerge(model: nn.Module) -> None:
    """Take the method out of the base's weights again. Exact to rounding: in float32 about 1e-8, in
    bfloat16 enough to matter after many rounds (keep the base instead). Errors as `merge`."""
    _merge_all(model, "unmerge", False)


def unload(model: nn.Module) -> nn.Module:
    """Give the plain base back, in place, and return it.

    Not merged: bit by bit what it was before `inject`, trained heads included; only a base that the
    method quantised stays so, until `dequantize`. Merged: the same layers with what was learned in
    their weights. What trained before may train again."""
    injection = require_injection(model, "unload")
    for handle in injection.handles:
        handle.remove()
    if injection.attached is not None:
        delattr(model, ATTACHED)
    for path, wrapper in injection.wrappers.items():
        _put(model, path, wrapper.base)
    old = injection.whole | injection.frozen
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in old and not injection.merged:
                p.copy_(old[name])
    _restore(model, injection.were_trainable)
    del model._peft_injection
    return model
