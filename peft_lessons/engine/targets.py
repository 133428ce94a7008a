"""Find the modules of a model that a method changes or trains, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layer import AdapterLayer
from .settings import near_name


def names_of(value: Any, argument: str) -> tuple[str, ...] | str:
    """Return `targets` or `modules_to_save` as a tuple of names; a string, a pattern, stays one.
    TypeError for other values, ValueError for an empty string."""
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
    """Return whether names match a path, by PEFT's rule: a name must equal whole segments at the
    end of the path; a string is a regular expression for the whole path. ValueError if it is not
    one."""
    if isinstance(names, str):
        try:
            return re.fullmatch(names, path) is not None
        except re.error as error:
            raise ValueError(f"{names!r} is not a regular expression: {error}") from None
    return any(path == name or path.endswith("." + name) for name in names)


def within(path: str, names: tuple[str, ...] | str) -> bool:
    """Return whether names match a path or the path of a module that contains it."""
    parts = path.split(".")
    return any(matches(".".join(parts[:n]), names) for n in range(1, len(parts) + 1))


def one_by_one(names: tuple[str, ...] | str) -> list[tuple[str, tuple[str, ...] | str]]:
    """Split names into single rules for `matches`, [(name, rule)]; a pattern stays one."""
    return [(names, names)] if isinstance(names, str) else [(name, (name,)) for name in names]


def require_among(paths: Collection[str], names: tuple[str, ...] | str, argument: str) -> None:
    """Raise ValueError for a name in `names` that matches none of `paths`."""
    for name, rule in one_by_one(names):
        if not any(matches(path, rule) for path in paths):
            raise ValueError(
                f"{argument}: {name!r} is not among the targets, which are {_leaves(paths)}; "
                "add it there too"
            )


def _tied(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return {path: (name of a tied parameter, its other name in the model)}."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    return {
        path: (name, other)
        for path, module in modules.items()
        for name, p in module.named_parameters()
        for other in owners[id(p)]
        if other != f"{path}.{name}"
    }


def _refuse_tied(model: nn.Module, modules: Mapping[str, nn.Module], argument: str) -> None:
    for path, (name, other) in _tied(model, modules).items():
        raise ValueError(
            f"{argument}: {path!r} shares its {name} with {other!r} (tied weights): changing one "
            "changes both; leave it out"
        )


def _packed(module: nn.Module, recurse: bool = False) -> bool:
    """Return whether a module holds weights packed into bytes: 4-bit codes have no gradient."""
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return any(t.dtype == torch.uint8 for t in tensors)


IN_4_BITS = (
    ", in 4 bits already: load the model unquantised for the methods of the course, or "
    "dequantize(model) first; PEFT takes what bitsandbytes quantised"
)


def refuse_packed(modules: Mapping[str, nn.Module], argument: str) -> None:
    """Raise ValueError if one of the modules, {path: module}, holds packed 4-bit codes."""
    for path, module in modules.items():
        if _packed(module, recurse=True):
            raise ValueError(
                f"{argument}: {path!r} holds packed 4-bit codes, which have no gradient: put an "
                "adapter on the layer"
            )


def find_targets(
    model: nn.Module, targets: tuple[str, ...] | str, takes: tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """Return {path: module} of the modules in `targets`; "all-linear" means all linear layers but
    the head and those with tied weights.

    Raises ValueError if a name matches nothing, or a module that cannot be wrapped."""
    # A module reachable under two paths would be wrapped in one of them only, hence the duplicates.
    # The model itself has no parent in which something could take its place.
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if p}
    usable = [path for path, m in modules.items() if type(m) in takes]
    kinds = " or ".join(t.__name__ for t in takes)
    if targets == "all-linear":
        if packed := [path for path, module in modules.items() if _packed(module)]:
            kind = type(modules[packed[0]]).__name__
            raise ValueError(f"targets='all-linear': {packed[0]!r} is a {kind}{IN_4_BITS}")
        heads = fresh_modules(model) or ("lm_head",)
        tied = _tied(model, {path: modules[path] for path in usable})
        inside = tuple(f"{path}." for path in head_of(model))
        paths = [
            path
            for path in usable
            if not (matches(path, heads) or f"{path}.".startswith(inside) or path in tied)
        ]
        if not paths:
            raise ValueError(f"targets='all-linear': the model has no {kinds} besides its head")
    else:
        for name, rule in one_by_one(targets):
            if not any(matches(path, rule) for path in modules):
                raise ValueError(_nothing_found(name, isinstance(targets, str), usable, kinds))
        paths = [path for path in modules if matches(path, targets)]
        if not paths:
            raise ValueError(f"targets is empty: name at least one {kinds}: {_leaves(usable)}")
    for path in paths:
        _refuse_unfit(model, path, takes, usable)
    targeted = {path: modules[path] for path in paths}
    _refuse_tied(model, targeted, "targets")
    return targeted


def _refuse_unfit(
    model: nn.Module, path: str, takes: tuple[type[nn.Module], ...], usable: list[str]
) -> None:
    """Raise ValueError for a module that cannot be wrapped."""
    module = model.get_submodule(path)
    kinds = " or ".join(t.__name__ for t in takes)
    if isinstance(module, AdapterLayer):
        raise ValueError(f"targets: {path!r} is wrapped already; unload(model) first")
    if type(module) not in takes and _packed(module):
        raise ValueError(f"targets: {path!r} is a {type(module).__name__}{IN_4_BITS}")
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
    """Return the newly initialised modules (a new head): always trained and saved in full."""
    return tuple(getattr(model, "fresh_modules", ()))


def is_fresh(model: nn.Module, path: str) -> bool:
    """Return whether a module is newly initialised, or part of such a module (RoBERTa's head)."""
    return any(f"{path}.".startswith(f"{top}.") for top in fresh_modules(model))


def fresh_beyond_head(model: nn.Module) -> list[str]:
    """Return the new modules that PEFT does not treat as a head: a pooler, a head's first layer."""
    return [path for path in fresh_modules(model) if path not in ("classifier", "score")]


def is_transposed(model: nn.Module) -> bool:
    """Return whether layers store their weights as GPT-2's do; PEFT would find out and warn."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Return the modules of a sequence classifier's head, () for other models: all modules outside
    its base model that have parameters and no 4-bit codes."""
    body = getattr(model, "base_model", model)
    if not is_classifier(model) or body is model:
        return ()
    children = [(name, m) for name, m in model.named_children() if m is not body]
    return tuple(name for name, m in children if list(m.parameters()) and not _packed(m, True))


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model is a sequence classifier, by the name of its class."""
    return type(model).__name__.endswith("ForSequenceClassification")


def frozen_head_of(model: nn.Module, touched: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of the head without any of the `touched` paths, which are the targets and
    the trainable modules and parameters of the base."""
    touched = list(touched)
    return tuple(h for h in head_of(model) if not any(within(path, (h,)) for path in touched))


def find_whole(
    model: nn.Module, modules_to_save: Any, wrapped: Iterable[str]
) -> dict[str, nn.Module]:
    """Return {path: module} of the modules to train in full: the new ones and those in
    `modules_to_save`. ValueError for an unknown name, a module that is also wrapped or part of a
    wrapped one, 4-bit codes, tied weights or a module without parameters."""
    names = names_of(
        (modules_to_save,) if isinstance(modules_to_save, str) else modules_to_save,
        "modules_to_save",
    )
    names = tuple(dict.fromkeys((*fresh_modules(model), *names)))
    modules: dict[str, nn.Module] = {}
    for name in names:
        here = {p: m for p, m in model.named_modules() if p and matches(p, (name,))}
        if not here:
            known = [p for p, m in model.named_modules() if p and list(m.parameters(recurse=False))]
            raise ValueError(
                f"modules_to_save: {name!r} matches no module of the model{near_name(name, known)}"
            )
        modules.update(here)
    refuse_packed(modules, "modules_to_save")
    for path, module in modules.items():
        if not list(module.parameters()):
            raise ValueError(f"modules_to_save: {path!r} has no parameters to train")
        for target in wrapped:
            if (path + ".").startswith(target + ".") or target.startswith(path + "."):
                raise ValueError(f"{path!r} trains in full, so {target!r} cannot be a target too")
    _refuse_tied(model, modules, "modules_to_save")
    return modules
