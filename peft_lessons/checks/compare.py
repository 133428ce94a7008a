"""Describe how a result differs from the expected one, in words a learner can act on."""

import re
from collections.abc import Iterator
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from ..testing.wording import PLAIN, kind, number, own_rules

# What a verb becomes after a plural.
_PLURAL = {"is": "are", "has": "have", "differs": "differ", "holds": "hold"}


def difference(
    got: Any,
    expected: Any,
    what: str | tuple[str, ...] = "the result",
    tolerance: float = 1e-5,
    values: bool = True,
    form: str = "same",
) -> str | None:
    """Return the first difference in type, shape, dtype, finiteness and, if asked, values; or None.

    Equal numbers are equal: 5480.0 or a tensor of one entry for 5480, a list for a tuple. Only a
    bool must be a bool. `form` says which dtypes serve: the "same"; a "wider" float or any dtype of
    whole numbers too; or "any", where a list may also hold a tensor's numbers.
    `tolerance` is relative to the largest expected entry, and is widened for half precision. `what`
    names the result, or each part of a tuple; where it is empty, a dict's keys are the names."""
    if got is None and expected is not None:
        return "the result is None: is a return statement missing?"
    return _difference(got, expected, what, tolerance, values, form)


def _difference(got, expected, what, tolerance, values, form) -> str | None:
    names = what if isinstance(what, tuple) else ()
    what = "the result" if names else what
    got = _equivalent(got, expected, form)
    if not _same_type(got, expected):
        several = isinstance(got, torch.Tensor) and isinstance(expected, Real)
        shape = f" of shape {tuple(got.shape)}" if several and not own_rules(got) else ""
        return f"{_clause(what, 'is')} {kind(got)}{shape}, expected {kind(expected)}"
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(bare(got), bare(expected), what, tolerance, values, form)
    if isinstance(expected, nn.Module):
        return None
    if isinstance(expected, dict):
        if set(got) != set(expected):
            return f"the keys of {what or 'the result'} differ: {_sets(got, expected)}"
        parts = [(f"{what}[{key!r}]" if what else str(key), key) for key in expected]
    elif isinstance(expected, list | tuple):
        if all(type(v) is str for v in [*got, *expected]):
            if list(got) == list(expected):
                return None
            order = "the same ones in another order" if sorted(got) == sorted(expected) else ""
            return f"{_clause(what, 'differs')}: {order or _sets(got, expected)}"
        if (count := len(got)) != len(expected):
            items = f"{count} item{'' if count == 1 else 's'}"
            return f"{_clause(what, 'has')} {items}, expected {len(expected)}"
        parts = [(names[i] if names else f"{what}[{i}]", i) for i in range(len(expected))]
    elif not values:
        return None
    else:
        return _scalar_difference(got, expected, what, tolerance)
    problems = (_difference(got[k], expected[k], n, tolerance, values, form) for n, k in parts)
    return next((text for text in problems if text is not None), None)


def _equivalent(got: Any, expected: Any, form: str) -> Any:
    """Return a value in the expected type if that changes no number, else unchanged."""
    if isinstance(expected, Real) and isinstance(got, torch.Tensor) and not own_rules(got):
        return bare(got).item() if bare(got).numel() == 1 and not bare(got).is_meta else got
    if form == "any":
        if isinstance(expected, torch.Tensor) and not isinstance(got, torch.Tensor):
            with suppress(Exception):  # not of numbers, or ragged
                return torch.tensor(_listed(got))
        if isinstance(expected, list | tuple) and isinstance(got, torch.Tensor | np.ndarray):
            return list(got) if got.ndim else got
    return got


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def _clause(what: str, verb: str) -> str:
    """Return a name with a verb that agrees with it: "the result has", "the labels have"."""
    what = what or "the result"
    noun = re.split(r" (?:of|in|for|with|at|to|right|once|after|before) ", what)[0]
    other = noun.startswith(("what ", "whether ")) or noun == "takes"
    plural = re.search(r"(?<![sui])(?<!bia)s$", noun) and not other
    return f"{what} {_PLURAL[verb] if plural else verb}"


def _same_type(got: Any, expected: Any) -> bool:
    if isinstance(expected, bool):
        return type(got) in (bool, np.bool_)
    if isinstance(expected, Real | str) and type(got) not in PLAIN:
        return type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        return isinstance(got, torch.Tensor) and not own_rules(got)
    for family in (nn.Module, dict, list | tuple, Real, str):
        if isinstance(expected, family):
            # A bool is a Real, but no number that a learner has computed.
            return isinstance(got, family) and isinstance(got, bool) == isinstance(expected, bool)
    return type(got) is type(expected)


def bare(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its gradient as a plain tensor, without the operations of a subclass."""
    if type(t) is torch.Tensor:
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.as_subclass(t, torch.Tensor)


def _tensor_difference(got, expected, what, tolerance, values, form) -> str | None:
    if got.layout != torch.strided or got.is_nested:
        kind = "nested" if got.is_nested else "sparse"
        return f"{_clause(what, 'is')} in a {kind} layout, expected an ordinary tensor"
    if got.shape != expected.shape:
        return f"{_clause(what, 'has')} shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not _serves(got.dtype, expected.dtype, form):
        return f"{_clause(what, 'has')} dtype {_dtype(got)}, expected {_dtype(expected)}"
    if not values or got.numel() == 0 or expected.is_meta:
        return None
    if got.is_meta:
        return f"{_clause(what, 'is')} on the meta device, where no tensor has values"
    got, expected = got.detach(), expected.detach()
    if expected.is_floating_point():
        tolerance = tolerance and max(tolerance, 4 * torch.finfo(expected.dtype).eps)
    else:
        tolerance = 0.0
    got, expected = got.double(), expected.double()
    stray = ~got.isfinite() & expected.isfinite()
    if stray.any():
        count = f"{stray.sum()} of {got.numel()} entries"
        return f"{_clause(what, 'holds')} {number(got[stray][0])} in {count}"
    gap = torch.where((got == expected) | (got.isnan() & expected.isnan()), 0.0, got - expected)
    gap = gap.abs().nan_to_num(nan=torch.inf)
    size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    if gap.max() <= tolerance * (size or 1.0):
        return None
    if got.numel() <= 4:
        detail = f"expected {numbers(expected)}, got {numbers(got)}"
    else:
        at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        detail = (
            f"expected {number(expected[at])} at {list(at)}, got {number(got[at])}; "
            f"{(gap > tolerance * (size or 1.0)).sum()} of {gap.numel()} entries are off"
        )
    return f"{_clause(what, 'has')} wrong values: {detail}{_pattern(got, expected, tolerance)}"


def _serves(got: torch.dtype, expected: torch.dtype, form: str) -> bool:
    if got == expected or (form == "any" and got.is_complex == expected.is_complex):
        return True
    if _is_whole(got) and _is_whole(expected):
        return form == "wider"
    floats = got.is_floating_point and expected.is_floating_point
    return form == "wider" and floats and torch.finfo(got).bits > torch.finfo(expected).bits


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _pattern(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """Return a regularity of wrong values that holds whatever its cause, or ""."""
    if got.numel() > 1 and (got == got.flatten()[0]).all() and expected.min() != expected.max():
        return f"; every entry of yours is {number(got.flatten()[0])}"
    size = expected.abs().max()
    if got.numel() > 1 and size > 0 and size.isfinite():
        factor = (got * expected).sum() / (expected * expected).sum()
        near = max(tolerance, 1e-6) * factor.abs() * size
        times = number(factor)
        if times not in ("0", "1") and (got - factor * expected).abs().max() <= near:
            return f"; yours is {times} times the expected values everywhere"
    return ""


def _scalar_difference(got: Any, expected: Any, what: str, tolerance: float) -> str | None:
    if got == expected:
        return None
    if isinstance(expected, bool) or not isinstance(expected, Real):
        got = bool(got) if isinstance(got, np.bool_) else got
        clause = f"{what}:" if what.startswith("whether ") else _clause(what, "is")
        return f"{clause} {got!r}, expected {expected!r}"
    if not isinstance(expected, Integral):
        if abs(got - expected) <= tolerance * (abs(expected) or 1.0):
            return None
        if got != got and expected != expected:
            return None
    # Beside a count all digits of a float are shown: 5,479.9999 is not 5,480.
    exactly = isinstance(expected, Integral) and not isinstance(got, Integral)
    value = f"{float(got):,}" if exactly else number(got)
    return f"{_clause(what, 'is')} {value}, expected {number(expected)}"


def _sets(got: Any, expected: Any) -> str:
    """Return the names that only one of two collections has, as a text."""
    missing = [v for v in expected if v not in got]
    extra = [v for v in got if v not in expected]
    parts = [f"missing {few(missing)}"] if missing else []
    return ", ".join(parts + ([f"too many {few(extra)}"] if extra else []))


def few(names: list) -> str:
    """Name the first three, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(v) for v in names[:3]) + more


def numbers(t: torch.Tensor) -> str:
    """Format the entries of a small tensor."""
    entries = [number(v) for v in t.reshape(-1)]
    return f"[{', '.join(entries)}]" if t.ndim else entries[0]


def _dtype(t: torch.Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def shown(name: str, value: Any) -> str:
    """Describe an argument for a message: "A (4, 96)", "alpha=6"."""
    if isinstance(value, torch.Tensor):
        dtype = "" if value.dtype == torch.float32 else f" {_dtype(value)}"
        return f"{name} {tuple(value.shape)}{dtype}"
    if isinstance(value, list | tuple | dict):
        text = repr(value)
        short = len(text) <= 60 and "\n" not in text
        return f"{name}={text}" if short else f"{name}: {kind(value)}"
    if value is None or isinstance(value, bool | str | Real):
        return f"{name}={value!r}"
    return f"{name}: {kind(value)}"


def state(value: Any, name: str = "module") -> Any:
    """Return a value in a form that `difference` can compare: a module becomes a dict of its parts,
    trainable parameters, modes and tensors. `name` names the module itself among its parts."""
    if isinstance(value, nn.Module):
        parts = {n or f"the {name} itself": m for n, m in value.named_modules()}
        return {
            "the modules": [f"{n}: {type(m).__name__}" for n, m in parts.items()],
            "the trainable parameters": [n for n, p in value.named_parameters() if p.requires_grad],
            "the modules in train mode": [n for n, m in parts.items() if m.training],
            **value.state_dict(),
        }
    if isinstance(value, list | tuple):
        return [state(v) for v in value]
    if isinstance(value, dict):
        return {key: state(v) for key, v in value.items()}
    if value is None or isinstance(value, torch.Tensor | bool | str | Real):
        return value
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):  # a config
        return state(value.to_dict())
    return type(value).__name__


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors(v)
