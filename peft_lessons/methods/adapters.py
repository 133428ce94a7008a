"""A bottleneck adapter squeezes a vector through a few numbers, widens it again, and adds the
result to the output of a sublayer. Only the adapters and the classification head train."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import local

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import (
    AdapterLayer,
    Method,
    PeftFiles,
    injection_of,
    register,
    trained_dtype,
    validate,
)
from ..engine.design import Design, Site, calls_of, only, standardised
from ..engine.facts import Facts, OnMap, Point

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class Bottleneck(nn.Module):
    """Compute a(t) = f(t W_downᵀ + b_down) W_upᵀ + b_up: t and result (..., d), inner width m.
    W_down (m, d) starts Kaiming-uniform, W_up (d, m) and both biases at zero: a(t) = 0 at step 0.
    Source: Houlsby et al. 2019, section 2.1; initialisation as He et al. 2022. Raises ValueError
    for an invalid setting."""

    def __init__(self, d: int, m: int, activation: str = "gelu"):
        validate("Bottleneck", hidden_size=d, width=m, activation=activation)
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        self.activation = ACTIVATIONS[activation]
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        low = self.activation(self.down(t.to(self.down.weight.dtype)))  # (..., m)
        return self.up(low)  # (..., d)


class Adapter(nn.Module):
    """Compute h + s · a(h) (..., d) from h (..., d), the identity at step 0; s = `adapter_scalar`.
    The module adds its own input: let it replace h, and never add it to h. Raises ValueError for
    a size below 1, or a scalar that is not above 0. Source: Houlsby et al. 2019, fig. 2."""

    def __init__(self, hidden_size: int, bottleneck_size: int, adapter_scalar: float = 1.0):
        sizes = dict(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        validate("Adapter", **sizes, adapter_scalar=adapter_scalar)
        super().__init__()
        self.adapter = Bottleneck(hidden_size, bottleneck_size)
        self.adapter_scalar = adapter_scalar

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return (h + self.adapter_scalar * self.adapter(h)).to(h.dtype)  # (..., d)


NO_MERGE = "an adapter cannot be merged: it is not linear, so no weight computes it; leave it in"


class Place(AdapterLayer):
    """Wrap the end of a sublayer with an adapter that adds to the output h (..., d) of `linear`."""

    def __init__(self, base: nn.Module, linear: nn.Linear, method: "BottleneckAdapter"):
        super().__init__(base)
        with linear.weight.device:  # new tensors are made there
            self.adapter = Bottleneck(linear.out_features, method.width, method.activation)
        self.adapter.to(trained_dtype(linear.weight.dtype))
        self.kind, self.scale = method.kind, method.scale

    def added_to(self, h: torch.Tensor, x: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
        """Return h + s · a(t) (..., d); x (..., d) is the residual, `norm` is applied to h + x."""
        if self.kind == "houlsby":
            t = h  # (..., d)
        elif self.kind == "parallel":
            t = x  # (..., d)
        else:  # pfeiffer
            t = norm(h + x)  # (..., d)
        return (h + self.scale * self.adapter(t)).to(h.dtype)  # (..., d)

    def delta_weight(self) -> torch.Tensor:
        raise TypeError(NO_MERGE)


class PostNormPlace(Place):
    """Compute LN(x + h + s · a(t)) at the end of a BERT sublayer, from the dense layer's input
    u (..., in), its output h (..., d) and the residual x (..., d). Source: He et al. 2022, table 1;
    t of "pfeiffer" as in AdapterHub's `SeqBnConfig`."""

    def __init__(self, output: nn.Module, method: "BottleneckAdapter"):
        super().__init__(output, output.dense, method)

    def forward(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        output = self.base
        h = output.dropout(output.dense(u))  # (..., d)
        return output.LayerNorm(self.added_to(h, x, output.LayerNorm) + x)  # (..., d)


STREAM = local()  # .x: the residual of the sublayer that is being computed, in this thread


class Tap(AdapterLayer):
    """Wrap the norm before a sublayer and store its input, the residual x (..., d), in STREAM."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        STREAM.x = x
        return self.base(x)  # (..., d)

    def delta_weight(self) -> torch.Tensor:
        raise TypeError(NO_MERGE)


def taken() -> torch.Tensor:
    """Take the residual (..., d) that the `Tap` stored. RuntimeError if there is none."""
    if "x" not in vars(STREAM):
        raise RuntimeError(
            "an adapter of this kind also reads the residual, which the norm before "
            "the feed-forward hands on: call the whole block, not this part alone"
        )
    return vars(STREAM).pop("x")


class PreNormPlace(Place):
    """Compute h + s · a(t), to which a pre-norm block adds x; h (..., d) is the output of the last
    Linear of its sublayer, u (..., in) the input."""

    def __init__(self, linear: nn.Linear, method: "BottleneckAdapter"):
        super().__init__(linear, linear, method)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        x = None if self.kind == "houlsby" else taken()  # (..., d)
        return self.added_to(self.base(u), x, nn.Identity())  # (..., d)


# In a block of this class: what ends attention and feed-forward, and the norm before the latter.
BERT = "attention.output", "output", None
LLAMA = "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"
LAYOUTS = {
    **{f"{family}Layer": BERT for family in ("Bert", "Roberta", "Electra")},
    **{f"{family}DecoderLayer": LLAMA for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    "OPTDecoderLayer": ("self_attn.out_proj", "fc2", "final_layer_norm"),
}
NORMS = {norm for _, _, norm in LAYOUTS.values()}


def last_linear(path: str, layer: nn.Module) -> nn.Module | None:
    """Return the Linear that ends the sublayer at `path`, or None if `path` names the norm.
    A 4-bit layer may lack the attributes of a Linear, hence the test by name."""
    return None if path.rpartition(".")[2] in NORMS else getattr(layer, "dense", layer)


def places(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return {path: module} of all modules to wrap for adapters of a kind, block by block.
    ValueError for an OPT block with post-norm."""
    modules = {}
    for path, block in model.named_modules():
        if type(block).__name__ in LAYOUTS:
            attention, feed_forward, norm = LAYOUTS[type(block).__name__]
            if norm and not getattr(block, "do_layer_norm_before", True):
                raise ValueError(
                    f"{path!r} is an OPT block that normalises after the sum, which "
                    "only the 350m model does: take another OPT"
                )
            wanted = (attention, feed_forward) if kind == "houlsby" else (norm, feed_forward)
            inside = f"{path}." if path else ""  # the model may be one block
            modules |= {inside + n: block.get_submodule(n) for n in wanted if n}
    return modules


def refuse_width(owner: str, linear: nn.Module, width: int) -> None:
    """Raise ValueError for a layer that is not a plain nn.Linear, or not wider than `width`."""
    if type(linear) is not nn.Linear:  # its width or dtype may be unknown
        raise ValueError(
            f"{owner}: {type(linear).__name__} must be a plain nn.Linear: load the "
            "model unquantised, or dequantize(model) first"
        )
    if width >= linear.out_features:
        raise ValueError(f"{owner}: {width} numbers are no bottleneck for {linear.out_features}")


@torch.no_grad()
def ends(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each adapter at the end of a BERT's sublayer; h (..., d) is the output of
    the dense layer, `new` replaces h in the sum with the residual x (..., d)."""
    places = injection_of(model).wrappers
    norms = {f"{path}.LayerNorm": place.base.LayerNorm for path, place in places.items()}
    sites, inside = [], None
    for path, module, args, _ in calls_of(model, batch, places | norms):
        if path in norms:
            inside = args[0]  # of the norm's last call: x + new                   (..., d)
        else:
            u, x = args  # (..., d)
            sites.append(Site(path, module, x, module.base.dense(u), inside - x))
    return sites


def bottleneck(reads: Callable[[Site], torch.Tensor]) -> Callable[[Site], torch.Tensor]:
    """Return the adapter's formula s · (f(t W_downᵀ + b_down) W_upᵀ + b_up), t = reads(site)."""

    def delta(site):
        place, a = site.module, site.module.adapter
        low = a.activation(reads(site) @ a.down.weight.T + a.down.bias)  # (..., m)
        return place.scale * (low @ a.up.weight.T + a.up.bias)  # (..., d)

    return delta


def normed_sum(site: Site) -> torch.Tensor:
    """Return LN(h + x) (..., d), written out."""
    norm = site.module.base.LayerNorm
    return standardised(site.h + site.x, norm.eps) * norm.weight + norm.bias  # (..., d)


def adapter_design(
    kind: str,
    reads: Callable[[Site], torch.Tensor],
    t: str,
    insertion: str,
    modified: str = "feed-forward output",
) -> Design:
    """Return the `Design` of a kind of adapter that reads `t`."""
    return Design(
        form=f"f({t} W_downᵀ + b) W_upᵀ + b′",
        insertion=insertion,
        modified=modified,
        composition="h + s · u",
        delta=bottleneck(reads),
        sites=only(ends, lambda place: place.kind == kind),
        example={"width": 16, "kind": kind, "scale": 2.0},
    )


@register
@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """Insert adapters of inner `width` m into every block; `kind` gives their position and input:
    "houlsby" (2019), "pfeiffer" (2021) or "parallel" (He et al. 2022)."""

    width: int
    kind: str = "pfeiffer"
    activation: str = "gelu"
    scale: float = 1.0
    learning_rate = 3e-3  # lesson 06, Deeper, "Learning rate", compares it
    design = (
        adapter_design(
            "houlsby", lambda site: site.h, "h", "sequential", "attention and feed-forward output"
        ),
        adapter_design("pfeiffer", normed_sum, "LN(h + x)", "sequential"),
        adapter_design("parallel", lambda site: site.x, "x", "parallel"),
    )
    files = PeftFiles(
        "BOTTLENECK_ADAPTER",
        fields={
            "width": ("bottleneck_size", None),
            "kind": ("kind", "pfeiffer"),
            "activation": ("non_linearity", "gelu"),
            "scale": ("scaling", 1.0),
        },
        tensors={
            f"adapter.{name}": f"adapter.{name}"
            for name in ("down.weight", "down.bias", "up.weight", "up.bias")
        },
    )
    facts = Facts(
        "06",
        points=(
            Point("pfeiffer", "Pfeiffer\nadapter", (-6, 2)),
            Point("parallel", "parallel adapter", (-6, 11)),
        ),
        place=OnMap(
            "adapter", "adapter", 1, "one adapter after attention and one after the feed-forward"
        ),
        only_here="adapter",
    )

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        if not (modules := places(model, self.kind)):
            raise ValueError(f"the model has no block whose places are known: {', '.join(LAYOUTS)}")
        return modules

    def check(self, path: str, layer: nn.Module) -> None:
        if linear := last_linear(path, layer):
            refuse_width(f"BottleneckAdapter on {path!r}", linear, self.width)

    def wrap(self, path: str, layer: nn.Module) -> AdapterLayer:
        if not (linear := last_linear(path, layer)):
            return Tap(layer)
        return PreNormPlace(layer, self) if linear is layer else PostNormPlace(layer, self)
