"""Call a learner's function: with the same random numbers each time, its errors and gradients."""

import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .compare import bare, tensors

# The seed of calls, apart from the cases' own: a function that draws must not draw its arguments.
_CALLS = 2**31 - 1


@contextmanager
def seeded(seed: int = _CALLS) -> Iterator[None]:
    """Use a seed inside the block; the notebook's random state, and the device on which it makes
    tensors, are as before afterwards."""
    modes = torch._C._len_torch_function_stack()
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed every GPU's generator too, for good, and where
            # there is none it writes down the whole call stack, which takes longer than most
            # answers.
            torch.random.default_generator.manual_seed(seed)
            yield
    finally:
        while torch._C._len_torch_function_stack() > modes:
            torch._C._pop_torch_function_stack()


def outcome(
    function: Callable, args: Sequence[Any], watch: "Watch | None" = None
) -> tuple[Any, Exception | None]:
    """Return (result, None) or (None, exception) of a call, always with the same random numbers."""
    __tracebackhide__ = True
    with seeded(), watch or nullcontext():
        try:
            return function(*args), None
        except Exception as error:
            return None, error


def module_of(answer: Any) -> str:
    """Return the name of the module in which an answer is written; what C made may have none."""
    return getattr(answer, "__module__", None) or ""


def is_stub(error: Exception | None, module: str) -> bool:
    """Return whether an error is a NotImplementedError that the learner's own code raises.

    Torch and other libraries raise it too: in a frame of their own, or in C, which has no frame, on
    a line of the learner's that does not raise."""
    if not isinstance(error, NotImplementedError):
        return False
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    code = frame.f_code
    line = linecache.getline(code.co_filename, number) or "raise"  # there may be no source
    is_learners = frame.f_globals.get("__name__") == module
    return is_learners and "NotImplementedError" in code.co_names and "raise" in line


def function_of(error: Exception) -> str:
    """Return the name of the function that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_name


def own_lines(frames: Iterable[tuple[FrameType, int]], module: str) -> list[str]:
    """Return the learner's lines among some frames: those from the module of their function."""
    lines = []
    for frame, number in frames:
        if frame.f_globals.get("__name__") == module:
            text = linecache.getline(frame.f_code.co_filename, number).strip()
            lines.append(f"Line {number} in {frame.f_code.co_name}: {text}")
    return lines


def lines_of(error: Exception, module: str) -> list[str]:
    """Return the learner's lines through which an error came."""
    return own_lines(traceback.walk_tb(error.__traceback__), module)


def leaves(value: Any) -> list[torch.Tensor]:
    """Return what may get a gradient in an argument: its tensors, or a module's trainable
    parameters."""
    if isinstance(value, nn.Module):
        return [p for p in value.parameters() if p.requires_grad]
    return list(tensors(value))


def gradients_of(result: Any, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a fixed weighted sum of the result's entries, None where there is
    none."""
    flat = torch.cat([bare(t).reshape(-1).double() for t in tensors(result)])
    loss = flat @ torch.linspace(-1, 1.5, flat.numel(), dtype=torch.float64)
    if not loss.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def gradients_or_zeros(result: Any, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the same gradients, zeros where there is none."""
    gradients = zip(gradients_of(result, wanted), wanted, strict=True)
    return [torch.zeros_like(p) if gradient is None else gradient for gradient, p in gradients]


class Watch(TorchDispatchMode):
    """Record the first new tensor of a forbidden shape, and the learner's line that computed it.

    sentences: {a shape, whatever its order: what is said of such a tensor}."""

    def __init__(self, sentences: dict[tuple, str], args: Sequence[Any], module: str) -> None:
        super().__init__()
        self.sentences = {_unordered(shape): sentence for shape, sentence in sentences.items()}
        self.memory = {t.untyped_storage().data_ptr() for t in tensors(args)}
        self.module, self.formed, self.sentence, self.lines = module, None, "", []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tensors(result):
            if t.layout != torch.strided:
                continue
            # A view of an argument, such as a transposed weight, is not formed: it costs nothing.
            new = t.untyped_storage().data_ptr() not in self.memory
            if new and not self.formed and _unordered(t.shape) in self.sentences:
                self.formed, self.sentence = tuple(t.shape), self.sentences[_unordered(t.shape)]
                self.lines = own_lines(traceback.walk_stack(None), self.module)[:1]
        return result


def _unordered(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))
