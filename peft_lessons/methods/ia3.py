"""(IA)³: learned vectors that rescale keys, values and the feed-forward's inner activations."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from ..engine import (
    AdapterLayer,
    Method,
    PeftFiles,
    is_transposed,
    matches,
    refuse_entries,
    register,
    require_among,
    trained_dtype,
    validate,
)
from ..engine.design import SUM, Design, Site, linears, only
from ..engine.facts import COMPARISON, Facts, InPeft, Kept, OnMap, Point, Recommended


def rescaled(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return x ⊙ l in the dtype of x: x and result (..., n), vector l (n,). ValueError unless the
    widths agree: l of width 1 would otherwise be broadcast."""
    if x.shape[-1] != len(vector):
        raise ValueError(
            f"the vector has {len(vector)} entries, and what it scales is {x.shape[-1]} wide: "
            "keys and values take kv_dim = n_kv · d_h, the feed-forward ff_dim = d_ff"
        )
    return (x * vector).to(x.dtype)  # (..., n)


class IA3Layer(nn.Module):
    """Hold the three vectors of one transformer block, all ones at the start.
    Keys and values are (..., kv_dim), n_kv · d_h wide under grouped-query attention; the inner
    activations (..., ff_dim) are the *input* of the feed-forward's last matrix. Both widths are
    `dim` by default. ValueError for a wrong width. Source: Liu et al. 2022, section 3.3."""

    def __init__(self, dim: int, kv_dim: int | None = None, ff_dim: int | None = None):
        kv_dim, ff_dim = (dim if n is None else n for n in (kv_dim, ff_dim))
        validate("IA3Layer", dim=dim, kv_dim=kv_dim, ff_dim=ff_dim)
        super().__init__()
        self.l_k = nn.Parameter(torch.ones(kv_dim))  # (n_kv · d_h,)
        self.l_v = nn.Parameter(torch.ones(kv_dim))  # (n_kv · d_h,)
        self.l_ff = nn.Parameter(torch.ones(ff_dim))  # (d_ff,)

    def scale_key(self, k: torch.Tensor) -> torch.Tensor:
        """Return k ⊙ l_k."""
        return rescaled(k, self.l_k)  # (..., kv_dim)

    def scale_value(self, v: torch.Tensor) -> torch.Tensor:
        """Return v ⊙ l_v."""
        return rescaled(v, self.l_v)  # (..., kv_dim)

    def scale_ffn(self, h: torch.Tensor) -> torch.Tensor:
        """Return h ⊙ l_ff."""
        return rescaled(h, self.l_ff)  # (..., ff_dim)


class LinearWithIA3(AdapterLayer):
    """Rescale a frozen Linear: y = (x Wᵀ + b) ⊙ l, or with `feedforward` y = (x ⊙ l) Wᵀ + b.
    l has the shape that W ⊙ l needs: (out, 1) scales rows, (1, in) scales columns."""

    def __init__(self, linear: nn.Linear, feedforward: bool):
        super().__init__(linear)
        out_features, in_features = linear.weight.shape
        shape = (1, in_features) if feedforward else (out_features, 1)
        dtype = trained_dtype(linear.weight.dtype)
        ones = torch.ones(shape, dtype=dtype, device=linear.weight.device)
        self.l, self.feedforward = nn.Parameter(ones), feedforward  # (out, 1) or (1, in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)  # (..., out)
        if self.feedforward:
            return self.base(rescaled(x, self.l.flatten()))  # (..., out)
        return rescaled(self.base(x), self.l.flatten())  # (..., out)

    def merged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W ⊙ l (out, in), and b ⊙ l (out,) if l scales the output, else None."""
        weight, bias = self.base.weight, self.base.bias
        keeps = self.feedforward or bias is None
        return weight * self.l, None if keeps else bias * self.l.flatten()  # (out, in), (out,)

    def unmerged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return W and b again, by division. ValueError if an entry of l is zero or nearly zero."""
        weight, bias = self.base.weight, self.base.bias
        stored = self.l.to(weight.dtype)
        least = max(1e-6, 16 * torch.finfo(weight.dtype).tiny)  # float16 has no small ones
        refuse_entries(
            "IA3",
            stored.abs() >= least,
            stored,
            "l holds {value:.3g} at {at}{more}: what was multiplied by it is lost, and no "
            "division brings it back; load the base again",
        )
        keeps = self.feedforward or bias is None
        return weight / self.l, None if keeps else bias / self.l.flatten()  # (out, in), (out,)


def to_file(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Convert to PEFT's entries: each name of feedforward_modules is in target_modules too."""
    keys = [key for key in tensors if key.endswith(".ia3_l")]
    paths = [key[len("base_model.model.") : -len(".ia3_l")] for key in keys]
    # PEFT takes each name of feedforward_modules for the end of any path: "o" would be "wo" too.
    inner = method.feedforward
    ends = () if isinstance(inner, str) else tuple(inner)
    too_many = any(p.endswith(ends) and not matches(p, inner) for p in paths)
    # And its "all-linear" is not ours. In both cases every layer goes by its path.
    if method.targets == "all-linear" or too_many:
        entries["target_modules"] = paths
    names = entries["target_modules"]
    if not isinstance(names, str) and not isinstance(inner, str):
        entries["feedforward_modules"] = [n for n in names if matches(n, inner)]
    return entries, tensors


def rescaled_output(site: Site) -> torch.Tensor:
    """Return h ⊙ (l − 1), for keys and values of (IA)³."""
    return site.h * (site.module.l.flatten() - 1)  # (..., out)


def rescaled_input(site: Site) -> torch.Tensor:
    """Return (x ⊙ (l − 1)) Wᵀ, for the feed-forward of (IA)³."""
    return (site.x * (site.module.l.flatten() - 1)) @ site.module.base.weight.T  # (..., out)


INNER = r".*\d\.output\.dense"  # in a BERT the last linear map of the feed-forward
ON_BERT = {"targets": rf".*self\.(key|value)|{INNER}", "feedforward": INNER}


def in_peft(model: nn.Module, rank: int) -> dict[str, Any]:
    """Return the settings of PEFT's IA3Config for a model: keys, values and the second feed-forward
    matrix. ValueError for a model whose layers PEFT does not know."""
    from peft.utils.constants import (  # takes seconds
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    if kind in ("bert", "roberta", "deberta-v2"):
        # PEFT's own "output.dense" also takes the attention's output, which (IA)³ leaves alone.
        second = r".*layer\.\d+\.output\.dense"
        return {
            "target_modules": rf".*self\.(key|value)(_proj)?|{second}",
            "feedforward_modules": second,
        }
    if kind not in TARGETS:
        raise ValueError(
            f"method='ia3': where its three vectors go in a model of type {kind!r} is not known; "
            "give a config: IA3Config(target_modules=[keys, values, the second feed-forward "
            "matrix], feedforward_modules=[the latter])"
        )
    second, targets = FEED_FORWARD[kind], TARGETS[kind]
    ends = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if {"k_proj", "v_proj"} <= ends:  # for several families PEFT names the query, too
        targets = ["k_proj", "v_proj", *second]
    return {
        "target_modules": targets,
        "feedforward_modules": second,
        "fan_in_fan_out": is_transposed(model),
    }


@register
@dataclass(frozen=True)
class IA3(Method):
    """Apply (IA)³ (Liu et al. 2022) to every Linear in `targets`: rescale the inputs of those that
    `feedforward` also names, the outputs of the others. ValueError for a name in `feedforward` that
    is not a target. Neither has a default: a layer missing in `feedforward` is another method."""

    targets: tuple[str, ...] | str
    feedforward: tuple[str, ...] | str
    names_modules = ("targets", "feedforward")
    design = (
        Design(
            form="h ⊙ (l − 1)",
            insertion="sequential",
            modified="keys and values",
            composition=SUM,
            delta=rescaled_output,
            sites=only(linears, lambda layer: not layer.feedforward),
            example=ON_BERT,
        ),
        Design(
            form="(x ⊙ (l − 1)) Wᵀ",
            insertion="parallel",
            modified="feed-forward output",
            composition=SUM,
            delta=rescaled_input,
            sites=only(linears, lambda layer: layer.feedforward),
            example=ON_BERT,
        ),
    )
    files = PeftFiles(
        "IA3",
        write=to_file,
        tensors={"l": "ia3_l"},
        fields={"targets": ("target_modules", None), "feedforward": ("feedforward_modules", None)},
        others=("init_ia3_weights",),  # how it started says nothing of where it is
    )
    facts = Facts(
        "07",
        points=(Point("ia3", "(IA)³", (0, 12)),),
        place=OnMap("IA3", "(IA)³", 2, "the (IA)³ scales of keys, values and inner activations"),
        peft=(
            InPeft(
                "ia3",
                "IA3Config",
                (3e-2, 5e-3),
                f"{COMPARISON}, ia3/llama-3.2-3B-all-attn-5k-lr0.005: 5e-3",
                in_peft,
            ),
        ),
        advice=Recommended(
            "(IA)³",
            {"targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)},
            "for the smallest files",
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.targets, str) and not isinstance(self.feedforward, str):
            require_among(self.targets, self.feedforward, "feedforward")

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        targets = super().find(model)
        require_among(targets, self.feedforward, "feedforward")
        return targets

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithIA3:
        return LinearWithIA3(layer, feedforward=matches(path, self.feedforward))

    def added(self, shape: Any) -> float:
        inner = shape.adapted(self.feedforward) if self.feedforward else {}
        sizes = shape.adapted(self.targets).items()
        return shape.layers * sum(i if path in inner else o for path, (i, o) in sizes)

    def keeps(self, shape: Any) -> Kept:
        scaled = shape.adapted(self.targets)
        inner = shape.adapted(self.feedforward) if self.feedforward else {}
        outer = {path: size for path, size in scaled.items() if path not in inner}
        return Kept(scaled=outer, inner=inner)
