"""Weight-decomposed low-rank adaptation (DoRA): learn the length of every row of a weight as a
parameter of its own, and turn the row with LoRA's factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import AdapterLayer, Injection, refuse_entries, register, trained_dtype, validate
from ..engine.design import ON_LINEAR, Site
from ..engine.facts import COMPARISON, Facts, InPeft, Kept, Mark, Point, Recommended
from .lora import FACTORS, LoRA, LoRALayer, in_peft


def refuse_rows(owner: str, norms: torch.Tensor) -> None:
    """Raise ValueError if one of the row norms (out,) is 0 or not finite: no direction."""
    refuse_entries(
        owner,
        norms.isfinite() & (norms > 0),
        norms,
        "length of row {at}{more} is {value:g}: such a row has no direction, and DoRA divides by "
        "its length; leave this layer out of targets",
    )


@torch.no_grad()
def start(layer: "DoRALayer", weight: torch.Tensor) -> None:
    """Set the layer's m to ‖V‖, which is ‖W‖ while B = 0. ValueError for a row of norm 0."""
    norms = layer.row_norms(weight)  # (out,)
    refuse_rows("DoRALayer", norms)
    layer.magnitude.copy_(norms)
    layer.started.fill_(True)


class DoRALayer(LoRALayer):
    """Compute x (c ⊙ V)ᵀ without the bias; V = W + s · BA, c = m / ‖V‖ (Liu et al. 2024, eq. 5).
    m starts as ‖W‖, by `start` or in the first forward. Errors as `LoRALayer` and `start`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        rslora: bool = False,
    ):
        super().__init__(in_features, out_features, rank, alpha, rslora=rslora)
        self.magnitude = nn.Parameter(torch.zeros(out_features))
        self.register_buffer("started", torch.tensor(False))  # saved too: a loaded m is kept

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """Return V (out, in)."""
        V = weight.detach().to(self.lora_B.dtype, copy=True)  # (out, in)
        return V.addmm_(self.lora_B, self.lora_A, alpha=self.scaling)  # V + s · BA

    @torch.no_grad()  # a constant in the backward pass: section 4.3 of the paper
    def row_norms(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ‖V‖ (out,)."""
        return torch.linalg.norm(self.adapted(weight), dim=1)  # ‖V‖ (out,)

    def forward(self, x: torch.Tensor, original_weight: torch.Tensor) -> torch.Tensor:
        if not self.started:
            start(self, original_weight)
        c = self.magnitude / self.row_norms(original_weight)  # (out,)
        V = c[:, None] * self.adapted(original_weight)  # (out, in)
        return F.linear(x.to(V.dtype), V).to(x.dtype)  # (..., out)


class LinearWithDoRA(AdapterLayer):
    """Wrap a frozen Linear and learn magnitude and direction of its rows: y = x (c ⊙ V)ᵀ + b."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        validate("DoRA", dropout=dropout)
        with linear.weight.device:  # new tensors are made there
            dora = DoRALayer(linear.in_features, linear.out_features, rank, alpha, rslora=rslora)
        start(dora.to(trained_dtype(linear.weight.dtype)), linear.weight)
        super().__init__(linear)  # a layer that was refused above is not frozen
        self.dora, self.dropout = dora, nn.Dropout(dropout)
        self.norms: torch.Tensor | None = None  # ‖V‖ (out,) inside `with cached_norms(model)`
        self.register_buffer("merged_c", None, persistent=False)

    def __getstate__(self) -> dict:
        return vars(self) | {"norms": None}  # a copy outlives the block of its original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        return y if self.merged else self.rescaled(x, y)

    def rescaled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x (c ⊙ V)ᵀ + b (..., out) from x (..., in) and y = x Wᵀ + b (..., out), without
        building the matrix c ⊙ V."""
        dora, weight, bias = self.dora, self.base.weight, self.base.bias
        x = self.dropout(x.to(dora.lora_A.dtype))  # (..., in)
        if self.training and self.dropout.p > 0:  # the base's part sees the dropped x as well
            plain = F.linear(x, weight.to(x.dtype))  # (..., out)
        else:
            plain = y if bias is None else y - bias  # (..., out)
        branch = F.linear(F.linear(x, dora.lora_A), dora.lora_B) * dora.scaling  # (..., out)
        norms = None if self.training else self.norms  # V changes with each step
        c = dora.magnitude / (dora.row_norms(weight) if norms is None else norms)  # (out,)
        # Where c = 1 and B = 0, what is added to y is 0 to the last bit.
        return (y + (c * (plain + branch) - plain)).to(y.dtype)  # (..., out)

    def merged_tensors(self) -> tuple[torch.Tensor, None]:
        c = self.dora.magnitude / self.dora.row_norms(self.base.weight)  # (out,), not cached
        refuse_entries(
            "DoRA",
            ~(c.abs() < 1e-6),
            c,
            "m / ‖V‖ of row {at}{more} is {value:g}: merged, the row would be lost; look at its "
            "magnitude",  # merge itself refuses NaN
        )
        self.merged_c = c
        return c[:, None] * self.dora.adapted(self.base.weight), None

    def unmerged_tensors(self) -> tuple[torch.Tensor, None]:
        return self.base.weight / self.merged_c[:, None] - self.dora.delta_weight(), None


def weight_decomposed(site: Site) -> torch.Tensor:
    """Return x (c ⊙ V)ᵀ − x Wᵀ, with V = W + s · BA and c = m / ‖V‖ (DoRA)."""
    W, dora = site.module.base.weight, site.module.dora
    V = W + dora.scaling * dora.lora_B @ dora.lora_A  # (out, in)
    c = dora.magnitude / V.pow(2).sum(1).sqrt()  # (out,)
    return site.x @ (c[:, None] * V - W).T  # (..., out)


@register
@dataclass(frozen=True)
class DoRA(LoRA):
    """Apply DoRA (Liu et al. 2024) to every Linear in `targets`; settings as in `LoRA`."""

    design = replace(
        LoRA.design, form="x (c ⊙ (W + s · BA) − W)ᵀ", **ON_LINEAR, delta=weight_decomposed
    )
    # In PEFT's files DoRA is a LoRA with a flag and a third tensor, whose key has no ".weight".
    files = replace(
        LoRA.files,
        constants={"use_dora": True},
        tensors={
            "dora.lora_A": "lora_A.weight",
            "dora.lora_B": "lora_B.weight",
            "dora.magnitude": "lora_magnitude_vector",
        },
    )
    facts = Facts(
        "04",
        points=(Point("dora, all linear", "DoRA", (6, 0)),),
        mark=Mark("DoRA", "m", "the magnitudes m of DoRA beside A and B"),
        peft=(
            InPeft(
                "dora",
                "LoraConfig",
                (1e-3, 1e-4),
                f"{COMPARISON}, lora/llama-3.2-3B-rank32-dora: 1e-4",
                in_peft,
                {"use_dora": True},
                ranks=1,
            ),
        ),
        advice=Recommended("DoRA", FACTORS, "ahead of LoRA on one of our three tasks, and slower"),
    )

    def check(self, path: str, layer: nn.Linear) -> None:
        super().check(path, layer)
        weight = layer.weight.detach().float()  # the square of a long row exceeds 16 bits
        refuse_rows(f"DoRA on {path!r}", torch.linalg.norm(weight, dim=1))

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithDoRA:
        return LinearWithDoRA(layer, self.rank, self.alpha, self.dropout, self.rslora)

    def added(self, shape: Any) -> float:
        magnitudes = sum(o for _, o in shape.adapted(self.targets).values())
        return super().added(shape) + shape.layers * magnitudes

    def before_fit(self, injection: Injection, steps: int) -> None:
        if any(wrapper.norms is not None for wrapper in injection.wrappers.values()):
            raise RuntimeError("fit: within cached_norms V must not change; leave the block first")

    def keeps(self, shape: Any) -> Kept:
        # As PEFT's: two more outputs of a layer, and the change of its weight.
        return replace(super().keeps(shape), outputs=2, weights=1)


@contextmanager
def cached_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Compute every ‖V‖ once for the inference inside `with cached_norms(model):`.

    V must not change inside; layers in train mode still compute ‖V‖ in each forward. Raises
    ValueError if the model has no DoRA, RuntimeError if it is merged and computes no norms."""
    layers = [module for module in model.modules() if isinstance(module, LinearWithDoRA)]
    if not layers:
        raise ValueError("cached_norms: the model holds no DoRA; inject(model, DoRA(...)) first")
    if any(layer.merged for layer in layers):
        raise RuntimeError("cached_norms: merged, DoRA computes no norms; unmerge(model) first")
    before = [layer.norms for layer in layers]
    try:
        with torch.inference_mode(False):
            for layer in layers:
                layer.norms = layer.dora.row_norms(layer.base.weight)
        yield model
    finally:
        for layer, norms in zip(layers, before, strict=True):
            layer.norms = norms
