"""Find the parameters of a model that a selective method trains: by name, by pattern, by block."""

import torch.nn as nn

from .settings import near_name
from .targets import fresh_modules, matches, one_by_one, refuse_packed, within


def own_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[str]]]:
    """Return {name: (parameter, all its names)}, without a new classification head, which trains
    anyway. A tied parameter has several names; the first one is the key."""
    names, fresh = {}, fresh_modules(model)
    for name, p in model.named_parameters(remove_duplicate=False):
        if not within(name, fresh):
            names.setdefault(p, []).append(name)
    return {all_of_them[0]: (p, all_of_them) for p, all_of_them in names.items()}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return {path: block} of the model's blocks in order: the one ModuleList of its decoder, or of
    the model where none is in a decoder, that is not inside another one. ValueError if there is
    none, if there are several, or for an encoder and a decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = set() if decoder is None else set(decoder.modules())
    lists = {
        path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    stacks = {
        path: m
        for path, m in lists.items()  # experts are a list too, inside a block
        if not any(path.startswith(f"{other}.") for other in lists if other)
    }
    stacks = {path: m for path, m in stacks.items() if m in inside} or stacks
    if not stacks or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"last: {type(model).__name__} has no single stack of blocks; name its parts "
            "in patterns instead"
        )
    if len(stacks) > 1:
        raise ValueError(
            f"last: {type(model).__name__} has several stacks of blocks, "
            f"{', '.join(map(repr, stacks))}; name the parts in patterns instead"
        )
    ((path, blocks),) = stacks.items()
    return {f"{path}.{i}" if path else f"{i}": block for i, block in enumerate(blocks)}


def last_blocks(model: nn.Module, k: int) -> list[str]:
    """Return the names of the parameters in the last k blocks. ValueError for fewer blocks."""
    blocks = blocks_of(model)
    if k > len(blocks):
        raise ValueError(f"last={k}, but {type(model).__name__} has {len(blocks)} blocks")
    trained = dict(list(blocks.items())[-k:])
    refuse_packed(trained, "last")
    return [n for n in own_parameters(model) if any(n.startswith(f"{path}.") for path in trained)]


def chosen_by(model: nn.Module, patterns: tuple[str, ...] | str) -> list[str]:
    """Return the names of the parameters that `patterns` match. ValueError for a pattern without a
    match, for 4-bit weights, and for one of two tied weights."""
    parameters = own_parameters(model)
    everything = [name for _, names in parameters.values() for name in names]
    modules = {path: m for path, m in model.named_modules() if path and matches(path, patterns)}
    refuse_packed(modules, "patterns")
    for pattern, rule in one_by_one(patterns):
        if not any(within(name, rule) for name in everything):
            fresh = any(within(head, rule) for head in fresh_modules(model))
            raise ValueError(
                f"patterns: {pattern!r} "
                + (
                    "is the new head, which always trains"
                    if fresh
                    else "matches no parameter of the model, nor a module that has some"
                    + near_name(pattern, everything)
                )
            )
    chosen = [
        n for n, (_, names) in parameters.items() if any(within(name, patterns) for name in names)
    ]
    for name in chosen:
        match = next(n for n in parameters[name][1] if within(n, patterns))
        if left := [n for n in parameters[name][1] if not within(n, patterns)]:
            raise ValueError(
                f"patterns: {match!r} is also {left[0]!r} (tied weights), so training "
                "one trains both: name both, or neither"
            )
    return chosen
