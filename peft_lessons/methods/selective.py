"""Selective methods: train a chosen part of the base, from its biases to single entries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import (
    AdapterLayer,
    Injection,
    Method,
    PeftFiles,
    chosen_by,
    injection_of,
    last_blocks,
    own_parameters,
    register,
    require_injection,
    trained_dtype,
    validate,
)
from ..engine.design import ON_LINEAR, SUM, Design, Site, calls_of, standardised
from ..engine.facts import Facts, InPeft, OnMap, Point


def of_head(name: str, injection: Injection) -> bool:
    """Return whether a parameter belongs to a module that is trained in full beside the method."""
    return name.startswith(tuple(f"{path}." for path in injection.whole_modules))


def values_before(injection: Injection) -> dict[str, dict[str, torch.Tensor]]:
    """Return {path: {"weight" or "bias": initial values}} of the base's trainable parameters."""
    before = {}
    for name, old in injection.whole.items():
        if not of_head(name, injection):
            path, _, leaf = name.rpartition(".")
            before.setdefault(path, {})[leaf] = old
    return before


@torch.no_grad()
def own_layers(model: nn.Module, batch: Mapping) -> list[Site]:
    """Return a Site for each Linear or LayerNorm of the base that is trained; h (..., d) is its
    output with the initial values, `more` their change. For a norm, x is x̂."""
    before, sites = values_before(injection_of(model)), []
    layers = {path: model.get_submodule(path) for path in before}
    for path, layer, (x, *_), new in calls_of(model, batch, layers):
        now = dict(layer.named_parameters())
        change = {f"Δ{leaf}": now[leaf] - old for leaf, old in before[path].items()}
        old = now | before[path]
        if isinstance(layer, nn.LayerNorm):
            x = standardised(x, layer.eps)  # (..., d)
            h = x * old["weight"]  # (..., d)
        else:
            h = x @ old["weight"].T  # (..., out)
        sites.append(Site(path, layer, x, h + old.get("bias", 0), new, change))
    return sites


def own_change(site: Site) -> torch.Tensor:
    """Return x ΔWᵀ + Δb, for a norm x̂ ⊙ Δg + Δb."""
    W, b = (site.more.get(name, 0) for name in ("Δweight", "Δbias"))
    if isinstance(W, int):
        return b  # (out,)
    return (site.x * W if W.dim() == 1 else site.x @ W.T) + b  # (..., out)


@register
@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the base and nothing else (Ben Zaken et al. 2022). ValueError if the
    base has no biases."""

    names_modules = ()
    files = PeftFiles("BITFIT")
    learning_rate = 3e-3  # measured in lesson 10
    design = Design(
        form="Δb",
        insertion="reads nothing",
        modified="output of every layer that has a bias",
        delta=lambda site: site.more["Δbias"],
        composition=SUM,
        sites=own_layers,
    )
    facts = Facts(
        "10",
        points=(Point("bitfit", "BitFit", (6, 0)),),
        place=OnMap("BitFit", "BitFit", 5, "the biases b of linear maps and norms"),
        only_here="bitfit",
    )

    def select(self, model: nn.Module) -> list[str]:
        biases = [n for n in own_parameters(model) if f".{n}".endswith((".bias", "_bias"))]
        if not biases:
            raise ValueError(
                f"BitFit: {type(model).__name__} has no biases, so there is nothing to train; take "
                "PartialFineTuning(patterns=...) for its norms, or LoRA"
            )
        return biases


def norms_in_peft(model: nn.Module, rank: int) -> dict[str, Any]:
    """Return the settings of PEFT's LNTuningConfig for a model. ValueError if it has no norms."""
    paths = [path for path, module in model.named_modules() if "Norm" in type(module).__name__]
    if not paths:
        raise ValueError(f"method='norms': {type(model).__name__} has no norm to train")
    return {"target_modules": sorted({path.rpartition(".")[2] for path in paths})}


@register
@dataclass(frozen=True)
class PartialFineTuning(Method):
    """Train either the `last` k blocks, or the parameters and modules in `patterns`, which are ends
    of paths, or one regular expression for whole paths. ValueError for both or neither."""

    last: int | None = None
    patterns: tuple[str, ...] | str = ()
    names_modules = ("patterns",)
    files = PeftFiles(
        "PARTIAL_FINE_TUNING", fields={"last": ("last_blocks", None), "patterns": ("patterns", ())}
    )
    learning_rate = 3e-4  # for the last blocks; norms take ten times as much
    design = Design(
        form="x ΔWᵀ + Δb; in a norm x̂ ⊙ Δg + Δb",
        insertion="parallel",
        modified="output of every layer chosen",
        delta=own_change,
        example={"last": 1},
        composition=SUM,
        sites=own_layers,
    )
    facts = Facts(
        "10",
        points=(Point("norms", "norms", (-6, 0)), Point("last two", "last two blocks", (0, -17))),
        place=OnMap("norms", "norms", 5, "the two norms of every block"),
        peft=(
            InPeft(
                "norms",
                "LNTuningConfig",
                (1e-2, 1e-3),
                "no published default: start with a sweep",
                norms_in_peft,
            ),
        ),
        only_here="partial",
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.last is None) == (not self.patterns):
            raise ValueError("PartialFineTuning: give last=k or patterns=(...), one of the two")

    def select(self, model: nn.Module) -> list[str]:
        if self.last is None:
            return chosen_by(model, self.patterns)
        return last_blocks(model, self.last)


class LinearWithSparse(AdapterLayer):
    """Add a difference S with fixed non-zero entries to a frozen Linear: y = x (W + S)ᵀ + b. The
    values train, (k,); `indices` (2, k) are their rows and columns."""

    def __init__(self, linear: nn.Linear, positions: torch.Tensor):
        super().__init__(linear)
        dtype = trained_dtype(linear.weight.dtype)
        device, columns = linear.weight.device, linear.weight.shape[1]
        zeros = torch.zeros(len(positions), dtype=dtype, device=device)
        self.values = nn.Parameter(zeros)  # (k,)
        indices = torch.stack([positions // columns, positions % columns])
        self.register_buffer("indices", indices.int().to(device))  # (2, k)

    def delta_weight(self) -> torch.Tensor:
        S = torch.zeros_like(self.base.weight, dtype=self.values.dtype)  # (out, in)
        return S.index_put((self.indices[0].long(), self.indices[1].long()), self.values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)  # (..., out)
        weight = (self.base.weight + self.delta_weight()).to(x.dtype)  # (out, in)
        return F.linear(x, weight, self.base.bias)  # (..., out)


def positions_in(weight: torch.Tensor, entries: int, method: "SparseTuning") -> torch.Tensor:
    """Return the flat positions (entries) in a weight that `method` chooses, in ascending order."""
    if method.positions == "largest":
        chosen = weight.detach().abs().flatten().topk(entries).indices
    else:
        generator = torch.Generator().manual_seed(method.seed)
        chosen = torch.randperm(weight.numel(), generator=generator)[:entries]
    return chosen.sort().values  # (entries)


def read_seed(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return method and tensors of a file, which holds the positions themselves: a file of PEFT's
    need not name the seed that drew them."""
    config = config | {"random_seed": config.get("random_seed") or 0}
    return cls(**cls.files.settings(config)), tensors


def scattered(site: Site) -> torch.Tensor:
    """Return x Sᵀ, with S zero but for the entries that train (sparse tuning)."""
    rows, columns = site.module.indices.long()  # (k,) each
    S = torch.zeros_like(site.module.base.weight)  # (out, in)
    S[rows, columns] = site.module.values
    return site.x @ S.T  # (..., out)


@register
@dataclass(frozen=True)
class SparseTuning(Method):
    """Train as many entries of every target as a LoRA of this rank would, r · (in + out), and
    nothing else. Which ones is fixed before training: `positions` is "random" (SHiRA, Bhardwaj et
    al. 2024) or "largest", the weights of largest magnitude (Super-Tuning). ValueError for a layer
    with fewer weights."""

    rank: int = 8
    positions: str = "random"
    seed: int = 0
    targets: tuple[str, ...] | str = "all-linear"
    ranks = ("rank",)
    learning_rate = 1e-2  # between 0.003 for minilm and 0.03 for tinylm (lesson 10)
    design = Design("x Sᵀ", **ON_LINEAR, delta=scattered, example={"rank": 8})
    files = PeftFiles(
        "SHIRA",
        {
            "rank": ("r", 32),
            "targets": ("target_modules", None),
            "positions": ("positions", "random"),
            "seed": ("random_seed", 0),
        },
        {"values": "shira_weight", "indices": "shira_indices"},
        read=read_seed,
        own=("positions",),
        others=("mask_type", "init_weights"),
        indices=("shira_indices",),
    )
    facts = Facts("10", points=(Point("sparse", "random entries", (-6, 4)),))

    def check(self, path: str, layer: nn.Module) -> None:
        super().check(path, layer)
        entries = self.rank * sum(layer.weight.shape)
        if entries > layer.weight.numel():
            raise ValueError(
                f"rank={self.rank} takes {entries:,} entries of {path!r}, which has "
                f"{layer.weight.numel():,}: choose a lower rank"
            )

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithSparse:
        entries = self.rank * sum(layer.weight.shape)
        return LinearWithSparse(layer, positions_in(layer.weight, entries, self))


START = 5.0  # the initial log α of every gate: open with probability 0.99


def gate(log_alpha: torch.Tensor, stretch: float, u: torch.Tensor | None = None) -> torch.Tensor:
    """Return hard concrete gates z in [0, 1], of the shape of log α: sampled with u uniform in
    (0, 1), or deterministic without u. Source: Louizos et al. 2018, equations 10 and 11."""
    noise = 0.0 if u is None else torch.logit(u, eps=1e-6)  # log u - log(1 - u)
    s = torch.sigmoid(log_alpha + noise)  # in (0, 1)
    return ((2 * s - 1) * stretch).clamp(0, 1)  # (-stretch, stretch), cut off


class LinearWithDiff(AdapterLayer):
    """Add a sparse difference to a frozen Linear: y = x (W + z ⊙ w)ᵀ + b. The gates z are sampled
    in every training step; with gates=False a fixed `mask` replaces them."""

    def __init__(self, linear: nn.Linear, stretch: float, structured: bool, gates: bool):
        super().__init__(linear)
        dtype = trained_dtype(linear.weight.dtype)
        zeros = torch.zeros_like(linear.weight, dtype=dtype)
        self.w, self.stretch = nn.Parameter(zeros), stretch  # (out, in)
        self.log_alpha = nn.Parameter(zeros + START) if gates else None  # (out, in)
        shared = gates and structured  # one more gate, for all of the matrix
        self.log_alpha_all = nn.Parameter(zeros[:1, :1] + START) if shared else None  # (1, 1)
        self.register_buffer("mask", None if gates else torch.ones_like(zeros, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return self.base(x)  # (..., out)
        weight = (self.base.weight + self.diff(sampled=self.training)).to(x.dtype)  # (out, in)
        return F.linear(x, weight, self.base.bias)  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        return self.diff(sampled=False)  # (out, in)

    def diff(self, sampled: bool) -> torch.Tensor:
        """Return z ⊙ w (out, in), with sampled gates, or with deterministic ones."""
        if self.mask is not None:
            return self.mask * self.w
        z = 1.0
        for log_alpha in (self.log_alpha, self.log_alpha_all):
            if log_alpha is not None:
                u = torch.rand_like(log_alpha) if sampled else None
                z = z * gate(log_alpha, self.stretch, u)  # (out, in)
        return z * self.w

    def expected_open(self) -> torch.Tensor:
        """Return the expected number of open gates, a scalar: a differentiable stand-in for ‖w‖₀.
        Source: Louizos et al. 2018, eq. 12, for a symmetric interval."""
        if self.log_alpha is None:
            return torch.zeros(())
        shared = 1.0 if self.log_alpha_all is None else torch.sigmoid(self.log_alpha_all).squeeze()
        return shared * torch.sigmoid(self.log_alpha).sum()


TENSORS = ("w", "log_alpha", "log_alpha_all", "mask")


def to_sparse(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Convert each layer's difference to flat indices and values (kept)."""
    shapes, sparse, rest = {}, {}, {}
    for key, tensor in tensors.items():
        stem, _, name = key.rpartition(".")
        if name not in TENSORS:
            rest[key] = tensor  # a trained head
        elif name == "w":
            z = 1.0
            for log_alpha in (f"{stem}.log_alpha", f"{stem}.log_alpha_all"):
                if log_alpha in tensors:
                    z = z * gate(tensors[log_alpha], method.stretch)
            tensor = z * tensor  # (out, in)
            kept = tensors.get(f"{stem}.mask", tensor != 0).flatten()  # (out · in)
            shapes[stem] = list(tensor.shape)
            sparse[f"{stem}.indices"] = kept.nonzero().flatten().int()  # (kept)
            sparse[f"{stem}.values"] = tensor.flatten()[kept]  # (kept)
    return entries | {"shapes": shapes}, sparse | rest


def from_sparse(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return the method without gates, and a dense w and mask (out, in) for each layer. ValueError
    for indices that are repeated or out of range."""
    dense = dict(tensors)
    for stem, shape in config["shapes"].items():
        indices, values = dense.pop(f"{stem}.indices"), dense.pop(f"{stem}.values")  # (kept)
        size = torch.Size(shape).numel()
        if len(indices) != len(values) or len(indices.unique()) != len(indices):
            raise ValueError(f"{stem}: each value needs an index of its own")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(f"{stem}: indices lie outside 0 to {size - 1}")
        w, mask = torch.zeros(size, dtype=values.dtype), torch.zeros(size, dtype=torch.bool)
        w[indices.long()], mask[indices.long()] = values, True
        dense |= {f"{stem}.w": w.view(shape), f"{stem}.mask": mask.view(shape)}
    return cls(**cls.files.settings(config), gates=False), dense


def gated_difference(site: Site) -> torch.Tensor:
    """Return x (z ⊙ w)ᵀ, with z the mask or the gates, the matrix's own included (diff pruning)."""
    layer = site.module
    z = torch.ones_like(layer.w) if layer.mask is None else layer.mask  # (out, in)
    for log_alpha in (layer.log_alpha, layer.log_alpha_all):
        if log_alpha is not None:
            z = z * (layer.stretch * torch.tanh(log_alpha / 2)).clamp(0, 1)
    return site.x @ (z * layer.w).T  # (..., out)


@register
@dataclass(frozen=True)
class DiffPruning(Method):
    """Learn a sparse difference to every Linear in `targets` (Guo et al. 2021). `sparsity` weights
    the penalty on open gates, `stretch` is the half-width of the interval to which gates are
    stretched before they are clamped to [0, 1], and `structured` adds one gate for each matrix.
    With gates=False a fixed mask replaces the gates, as after `prune_diff` and in a file."""

    sparsity: float = 1e-5
    stretch: float = 1.5
    structured: bool = False
    targets: tuple[str, ...] | str = "all-linear"
    gates: bool = True
    learning_rate = 1e-2
    rate_factors = {"log_alpha": 100.0, "log_alpha_all": 100.0}
    design = Design(
        form="x (z ⊙ w)ᵀ",
        **ON_LINEAR,
        delta=gated_difference,
        example={"structured": True, "targets": ("query", "value")},
    )
    files = PeftFiles(
        "DIFF_PRUNING",
        write=to_sparse,
        read=from_sparse,
        tensors={name: name for name in TENSORS},
        fields={
            "sparsity": ("sparsity", 1e-5),
            "stretch": ("stretch", 1.5),
            "structured": ("structured", False),
            "targets": ("target_modules", None),
        },
        others=("shapes",),
        indices=("indices",),
    )
    facts = Facts("10", only_here="diff")

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithDiff:
        return LinearWithDiff(layer, self.stretch, self.structured, self.gates)

    def penalty(self, injection: Injection) -> torch.Tensor:
        return self.sparsity * sum(layer.expected_open() for layer in injection.wrappers.values())


def largest(tensors: list[torch.Tensor], keep: int) -> list[torch.Tensor]:
    """Return bool masks, of the tensors' shapes, of the `keep` entries with the largest magnitude
    over all tensors."""
    size = torch.cat([t.abs().flatten() for t in tensors])  # (all entries)
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[size.topk(keep).indices] = True
    parts = kept.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


@torch.no_grad()
def prune_diff(model: nn.Module, keep: int) -> dict[str, int]:
    """Keep the `keep` entries of the difference with the largest magnitude over all layers, set the
    others to zero for good, and remove the gates, in place. Return {path: entries kept}.

    ValueError without DiffPruning in the model, or unless 1 ≤ keep ≤ number of entries;
    RuntimeError while it is merged. Source: Guo et al. 2021, section 3."""
    injection = require_injection(model, "prune_diff", DiffPruning)
    layers = injection.wrappers.values()
    entries = sum(layer.w.numel() for layer in layers)
    validate("prune_diff", keep=keep)
    if keep > entries:
        raise ValueError(f"prune_diff: keep={keep}, but there are {entries} entries")
    if injection.merged:
        raise RuntimeError("prune_diff: the difference is merged; unmerge(model) first")
    masks = largest([layer.delta_weight() for layer in layers], keep)  # (out, in) each
    for layer, mask in zip(layers, masks, strict=True):
        layer.w.copy_(layer.delta_weight() * mask)
        layer.mask, layer.log_alpha, layer.log_alpha_all = mask, None, None
    injection.method = replace(injection.method, gates=False)
    return {path: int(layer.mask.sum()) for path, layer in injection.wrappers.items()}
