"""Low-rank adaptation (LoRA) adds two thin trainable matrices beside each frozen weight matrix."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import (
    AdapterLayer,
    Method,
    PeftFiles,
    fresh_beyond_head,
    inject,
    is_fresh,
    is_transposed,
    register,
    trained_dtype,
    validate,
)
from ..engine.design import SCALED, Design, Site
from ..engine.facts import COMPARISON, SFT, Facts, InPeft, Kept, OnMap, Point, Recommended


class LoRALayer(nn.Module):
    """Compute the low-rank update x -> s · B A x, with s = alpha / rank (rsLoRA: alpha / √rank).

    Shapes: x (..., in), lora_A (rank, in), lora_B (out, rank), result (..., out).
    Raises ValueError for an invalid setting. Source: Hu et al. 2021, eq. 3 and section 4.1."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        validate("LoRALayer", rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform in ±1/√in
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        low = F.linear(x, self.lora_A)  # (..., rank)
        return F.linear(low, self.lora_B) * self.scaling  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        """Return s · BA, (out, in)."""
        return self.lora_B @ self.lora_A * self.scaling  # (out, in)


class LinearWithLoRA(AdapterLayer):
    """Add LoRA to a frozen Linear: y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, with B = 0 at the start."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        out_features, in_features = linear.weight.shape
        with linear.weight.device:  # new tensors are made there
            lora = LoRALayer(in_features, out_features, rank, alpha, dropout, rslora)
        super().__init__(linear)  # a layer that was refused above is not frozen
        self.lora = lora.to(trained_dtype(linear.weight.dtype))

    @property
    def linear(self) -> nn.Linear:
        """Return the wrapped Linear."""
        return self.base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        return y if self.merged else (y + self.lora(x)).to(y.dtype)  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        return self.lora.delta_weight()  # s · BA (out, in)


def low_rank(site: Site) -> torch.Tensor:
    """Return s · x Aᵀ Bᵀ (LoRA)."""
    lora = site.module.lora
    return lora.scaling * (site.x @ lora.lora_A.T @ lora.lora_B.T)  # (..., out)


# The rank of TRL's command line, and the largest that vLLM loads by default.
FACTORS = {"rank": 16, "alpha": 32}


def in_peft(model: nn.Module, rank: int) -> dict[str, Any]:
    """Return the settings of PEFT's LoraConfig for a model: all linear layers but a new head."""
    targets = "all-linear"  # but the head, which PEFT knows by its name
    heads = map(model.get_submodule, model.fresh_modules)
    if fresh_beyond_head(model) or not all(isinstance(head, nn.Linear) for head in heads):
        layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [path for path in layers if not is_fresh(model, path)]
    return {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "fan_in_fan_out": is_transposed(model),
    }


@register
@dataclass(frozen=True)
class LoRA(Method):
    """Apply LoRA (Hu et al. 2021) to every Linear in `targets`; settings as in `LoRALayer`."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    ranks = ("rank",)
    learning_rate = 3e-3  # the default of fit
    design = Design("x Aᵀ Bᵀ", **SCALED, delta=low_rank, example={"rank": 8, "alpha": 16})
    # How Hugging Face PEFT's files call all this: (their name, their default).
    files = PeftFiles(
        "LORA",
        fields={
            "rank": ("r", 8),
            "alpha": ("lora_alpha", 8),
            "dropout": ("lora_dropout", 0.0),
            "targets": ("target_modules", None),
            "rslora": ("use_rslora", False),
        },
        tensors={"lora.lora_A": "lora_A.weight", "lora.lora_B": "lora_B.weight"},
        others=("ensure_weight_tying", "megatron_core", "qalora_group_size"),  # of other options
        off={"init_lora_weights": (True, False, "gaussian")},  # others change the base
    )
    facts = Facts(
        "02",
        points=(
            Point("lora", "LoRA (q, v)", (-6, 5)),
            Point("lora, all linear", "LoRA (all linear)", (6, 2)),
        ),
        place=OnMap("LoRA", "LoRA", 0, "the LoRA factors A and B beside each linear map"),
        peft=(
            InPeft("lora", "LoraConfig", (1e-3, 2e-4), SFT, in_peft, ranks=1),
            InPeft(
                "rslora",
                "LoraConfig",
                (1e-3, 1e-4),
                f"{COMPARISON}, lora/llama-3.2-3B-rank64-rslora: 1e-4",
                in_peft,
                {"use_rslora": True},
                ranks=1,
            ),
        ),
        advice=Recommended("LoRA", FACTORS, "one base in 16 bits", served=True),
    )

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithLoRA:
        return LinearWithLoRA(layer, self.rank, self.alpha, self.dropout, self.rslora)

    def added(self, shape: Any) -> float:
        sizes = shape.adapted(self.targets).values()
        return shape.layers * sum(self.rank * (i + o) for i, o in sizes)  # A and B

    def keeps(self, shape: Any) -> Kept:
        return Kept(branches=shape.adapted(self.targets), rank=self.rank)


def apply_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
) -> nn.Module:
    """Freeze `model`, apply LoRA to the named layers, and return the model. Errors as `inject`."""
    inject(model, LoRA(rank=rank, alpha=alpha, targets=target_modules))
    return model
