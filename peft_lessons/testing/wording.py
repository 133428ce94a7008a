"""Name values and errors in the messages of checks and of the conformance suite."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

# A class that inherits from one of these may say of itself that it equals everything.
PLAIN = {bool, int, float, str, *np.sctypeDict.values()}


def own_rules(t: torch.Tensor) -> bool:
    """Return whether a tensor's class overrides all operations, even the cast to a plain tensor."""
    return torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)


def kind(value: Any) -> str:
    """Describe a value in a few words: "a tensor", "the float 0.5", "a tuple"."""
    if value is None or isinstance(value, bool | np.bool_):
        return str(value)
    if isinstance(value, Real) and type(value) in PLAIN:
        return f"the {'int' if isinstance(value, Integral) else 'float'} {number(value)}"
    if isinstance(value, torch.Tensor):
        return "a tensor with rules of its own" if own_rules(value) else "a tensor"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, nn.Module):
        return f"a module ({type(value).__name__})"
    if type(value) in (str, np.str_):
        return "a string"
    if isinstance(value, np.ndarray):
        return "a NumPy array"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def number(value: Any) -> str:
    """Format a number for a learner: counts with commas, others with six digits."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(value, Integral):
        return f"{value:,}"
    # A byte count that came out as a float is still read as a count.
    return f"{value:,}" if value.is_integer() and 1e5 <= abs(value) < 1e15 else f"{value:.6g}"


def summary(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].removesuffix(".").removesuffix(": ")
