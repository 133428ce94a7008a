"""Compare models and files with PEFT's, and show refusals: the demonstrations of the lessons."""

from __future__ import annotations

import copy
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..engine import load_adapter, save_adapter


def show_refusal(action: Callable[[], object]) -> None:
    """Print the error that `action` must raise. AssertionError if it raises none."""
    try:
        action()
    except (ValueError, TypeError, RuntimeError) as error:
        print(textwrap.fill(f"{type(error).__name__}: {error}", 96), end="\n\n")
    else:
        raise AssertionError("show_refusal: this should have been refused, but it ran")


@torch.no_grad()
def copy_parameters(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Copy the values of the first parameter of each pair (ours, theirs) to the second."""
    for ours, theirs in pairs:
        theirs.copy_(ours)


def compare_outputs(
    ours: nn.Module,
    theirs: nn.Module,
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
    batch: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Return the largest differences of two models on a batch: of the logits, the loss, and the
    gradients of the parameters in `pairs` (ours, theirs); also the number of pairs, and the largest
    gradient as a scale for the differences. The models keep the gradients."""
    ours.zero_grad()
    theirs.zero_grad()
    a, b = ours(**batch), theirs(**batch)
    a.loss.backward()
    b.loss.backward()
    return {
        "logits": (a.logits - b.logits).abs().max().item(),
        "loss": (a.loss - b.loss).abs().item(),
        "gradients": max((m.grad - o.grad).abs().max().item() for m, o in pairs),
        "of": len(pairs),
        "largest gradient": max(m.grad.abs().max().item() for m, _ in pairs),
    }


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the two files that `save_adapter` writes. Errors as `save_adapter`."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(f.stat().st_size for f in save_adapter(model, folder).iterdir())


@torch.no_grad()
def roundtrip_error(
    model: nn.Module, base: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Return the largest differences of the logits after PEFT has opened our file of `model`, and
    after we have opened the file that PEFT then saves; `base` is the base without the method."""
    from peft import PeftModel  # takes seconds, which lessons without a file need not wait

    expected = model(**batch).logits
    with tempfile.TemporaryDirectory() as folder:
        opened = PeftModel.from_pretrained(copy.deepcopy(base), save_adapter(model, folder))
        there = (opened.eval()(**batch).logits - expected).abs().max().item()
        opened.save_pretrained(f"{folder}/back")
        returned = copy.deepcopy(base)
        load_adapter(returned, Path(folder) / "back")
    return there, (returned.eval()(**batch).logits - expected).abs().max().item()
