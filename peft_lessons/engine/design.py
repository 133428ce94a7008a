"""Describe a method as a change of a hidden state, h -> h + Δh, and compare it with a model that
runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .injection import injection_of
from .method import Method


@dataclass(frozen=True)
class Site:
    """Record one module of a model after a forward pass: its input x, the hidden state h that the
    same x gives without the method, and the one with the method, `new`, of the shape of h.
    `more` holds further tensors of a formula by name."""

    path: str
    module: nn.Module
    x: torch.Tensor
    h: torch.Tensor
    new: torch.Tensor
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def calls_of(model: nn.Module, batch: Mapping, modules: Mapping[str, nn.Module]) -> list[tuple]:
    """Return (path, module, arguments, output) for each call of `modules`, {path: module}, in a
    forward pass of the batch, in the order in which the calls return."""
    calls, hooks = [], []
    for path, module in modules.items():
        hooks.append(
            module.register_forward_hook(
                lambda module, args, output, path=path: calls.append((path, module, args, output))
            )
        )
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def linears(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each wrapped layer with added parameters; h (..., out) is the output of the
    layer inside."""
    added = {
        path: layer
        for path, layer in injection_of(model).wrappers.items()
        if any(not name.startswith("base.") for name, _ in layer.named_parameters())
    }
    return [
        Site(path, layer, args[0], layer.base(*args), new)
        for path, layer, args, new in calls_of(model, batch, added)
    ]


def only(sites: Callable, rule: Callable[[nn.Module], bool]) -> Callable:
    """Return the function `sites`, restricted to the sites whose module passes `rule`."""
    return lambda model, batch: [s for s in sites(model, batch) if rule(s.module)]


LINEAR, SUM = "output of any linear layer", "h + u"
ON_LINEAR = dict(insertion="parallel", modified=LINEAR, composition=SUM)
SCALED = dict(insertion="parallel", modified=LINEAR, composition="h + s · u")


@dataclass(frozen=True)
class Design:
    """Describe a method as h -> h + Δh by the four choices of He et al. 2022, section 4: functional
    form, insertion form (sequential: reads h, parallel: reads x), modified representation and
    composition function.

    `delta` computes Δh from a Site, scale and gate included. `sites` runs a model and returns its
    sites. `example` fits a BERT: a method or, where the class states its design, the settings of
    one; None means all defaults. `check_design` (methods/unified.py) compares `delta` with the
    running model; nothing checks the words."""

    form: str
    insertion: str
    modified: str
    composition: str
    delta: Callable[[Site], torch.Tensor]
    sites: Callable[[nn.Module, Mapping], list[Site]] = linears
    example: Method | Mapping[str, Any] | None = None


def designs_of(kind: type[Method]) -> tuple:
    """Return a method's own designs, each with a method as its example; (None,) without a design
    in the class itself."""
    designs = vars(kind).get("design")
    return tuple(
        replace(design, example=kind(**design.example))
        if isinstance(getattr(design, "example", None), Mapping)
        else design
        for design in (designs if isinstance(designs, tuple) else (designs,))
    )


def gap(sites: list[Site], delta: Callable[[Site], torch.Tensor]) -> float:
    """Return the largest max|new − h − Δh| / max|new − h| of a site, infinite where new = h."""
    worst = 0.0
    for site in sites:
        change = site.new - site.h  # (..., d)
        off = (change - delta(site)).abs().max().item()
        size = change.abs().max().item()
        worst = max(worst, off / size if size else float("inf"))
    return worst


def standardised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x̂ (..., d): x with mean 0 and variance 1 over the last dimension."""
    x = x - x.mean(-1, keepdim=True)  # (..., d)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps) ** 0.5  # (..., d)
