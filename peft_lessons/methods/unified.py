"""One view of all: every method as a change to a hidden state, and one more made by mixing."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from transformers import DynamicCache

from ..engine import Method, PeftFiles, inject, injection_of, register, registered_methods
from ..engine.design import Design, Site, calls_of, designs_of, gap, linears  # noqa: F401  lesson 11 imports them from here
from ..engine.facts import Facts, Point
from .adapters import BottleneckAdapter, ends  # noqa: F401
from .prefix import Prefix, PrefixTuning, attention, fill  # noqa: F401
from .selective import of_head, own_change, own_layers  # noqa: F401


@register
@dataclass(frozen=True)
class MixAndMatch(Method):
    """Combine a prefix with scaled parallel adapters (MAM adapter, He et al. 2022, section 4.6)."""

    tokens: int
    width: int
    scale: float = 4.0
    learning_rate = 1e-3
    rate_factors = {"embedding": 10.0}  # the prefix learns ten times as fast
    design = tuple(
        replace(design, example={"tokens": 8, "width": 16})
        for design in (Prefix.design, BottleneckAdapter.design[2])
    )
    files = PeftFiles(
        "MIX_AND_MATCH",
        fields={"tokens": ("tokens", None), "width": ("width", None), "scale": ("scale", 4.0)},
        tensors={"embedding": "prompt_embeddings", **BottleneckAdapter.files.tensors},
    )
    facts = Facts("11", points=(Point("mixed", "mix-and-match", (6, 0)),), only_here="mixed")

    @property
    def adapter(self) -> BottleneckAdapter:
        """Return the half that wraps the feed-forward."""
        return BottleneckAdapter(self.width, kind="parallel", activation="relu", scale=self.scale)

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.adapter.find(model)

    def check(self, path: str, layer: nn.Module) -> None:
        self.adapter.check(path, layer)

    def wrap(self, path: str, layer: nn.Module) -> nn.Module:
        return self.adapter.wrap(path, layer)

    def attach(self, model: nn.Module) -> tuple[nn.Module, list]:
        return Prefix(self.tokens).attach(model)


@torch.no_grad()
def perturbed(model: nn.Module, method: Method) -> nn.Module:
    """Return a float64 copy of the model with the method, its trainable parameters perturbed: with
    the initial values Δh is 0, and a wrong formula could pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = copy.deepcopy(model).eval().double()
        inject(changed, method)
        changed.double()
        for p in changed.parameters():
            if p.requires_grad:
                p.mul_(torch.rand_like(p) / 2).add_(0.05 * torch.randn_like(p))
    return changed


def prober(base: nn.Module, changed: nn.Module, block: int) -> Callable:
    """Return probe(where, x) -> (h, new) for one block of a BERT: what its "value" layer, its
    "attention" or the whole "block" gives for the input x (batch, T, d) of the block, in the base
    and in a changed model of the same dtype. Nothing is padded, and every token sees all others."""
    prefix = injection_of(changed).attached

    def given(model: nn.Module, where: str, x: torch.Tensor) -> torch.Tensor:
        layer, cache = model.base_model.encoder.layer[block], None
        if model is changed and isinstance(prefix, PrefixTuning):
            cache = DynamicCache()
            fill(cache, *prefix(len(x)), x.dtype)
        match where:
            case "value":
                return layer.attention.self.value(x)
            case "attention":
                return layer.attention.self(x, past_key_values=cache)[0]
            case "block":
                return layer(x, past_key_values=cache)
        raise ValueError(f'{where!r} is not "value", "attention" or "block"')

    @torch.no_grad()
    def probe(where: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.to(base.dtype).reshape(-1, *x.shape[-2:])  # (batch, T, d)
        return tuple(given(model, where, rows).reshape(x.shape) for model in (base, changed))

    return probe


CHOICES = ("form", "insertion", "modified", "composition")


def row_of(design: Design, method: Method, model: nn.Module, batch: Mapping) -> dict:
    """Return a row of the table: the design's four choices and, after a forward pass, the number of
    sites, the trainable parameters outside a head, and the `gap`."""
    changed = perturbed(model, method)
    injection, sites = injection_of(changed), design.sites(changed, batch)
    trainable = [
        p
        for name, p in changed.named_parameters()
        if p.requires_grad and not of_head(name, injection)
    ]
    return {choice: getattr(design, choice) for choice in CHOICES} | {
        "places": len(sites),
        "trainable": sum(p.numel() for p in trainable),
        "gap": gap(sites, design.delta) if sites else None,
    }


@torch.no_grad()
def check_design(method: Method | type[Method], model: nn.Module, batch: Mapping) -> list[dict]:
    """Check each `Design` of a method against a copy of the model and return one row for each. A
    class is checked by the design's example. Without a design, the one row says so."""
    kind, rows = method if isinstance(method, type) else type(method), []
    for design in designs_of(kind):
        if design is None:
            row = dict.fromkeys(CHOICES, "") | {"form": "says no design"}
            row |= dict.fromkeys(("places", "trainable", "gap"))
        else:
            instance = (design.example or kind()) if kind is method else method
            row = row_of(design, instance, model, batch)
        rows.append({"method": kind.__name__} | row)
    # An instance has the sites of some designs only: an adapter is of one kind.
    return [row for row in rows if row["places"] != 0] or rows[:1]


def unified_table(model: nn.Module, batch: Mapping) -> list[dict]:
    """Return the rows of `check_design` for every method in the registry."""
    return [row for kind in registered_methods() for row in check_design(kind, model, batch)]
