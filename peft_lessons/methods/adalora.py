"""AdaLoRA starts every layer with some rank to spare and prunes the parts that the loss depends on
least, until a budget for the whole model is met."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from ..engine import (
    AdapterLayer,
    Injection,
    Method,
    PeftFiles,
    register,
    require_injection,
    trained_dtype,
    validate,
)
from ..engine.design import SCALED, Design, Site
from ..engine.facts import Facts, InPeft, Kept, Point, Recommended
from .lora import in_peft as lora_in_peft


class AdaLoRALayer(nn.Module):
    """Compute the update alone: x -> α / r · P Λ Q x, with PEFT's names: Q is lora_A, the diagonal
    of Λ is lora_E, P is lora_B. Source: Zhang et al. 2023, eq. 3.

    Shapes: x (..., in), lora_A (kept, in), lora_E (kept, 1), lora_B (out, kept), result (..., out).
    `kept` of `rank` triplets remain, by default all; r stays `rank`. ValueError: bad settings."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        kept: int | None = None,
    ):
        validate("AdaLoRALayer", rank=rank, alpha=alpha, dropout=dropout)
        super().__init__()
        kept = rank if kept is None else kept
        self.lora_A = nn.Parameter(0.02 * torch.randn(kept, in_features))
        self.lora_E = nn.Parameter(torch.zeros(kept, 1))
        self.lora_B = nn.Parameter(0.02 * torch.randn(out_features, kept))
        self.alpha, self.divisor = alpha, rank + 1e-5  # PEFT adds the 1e-5
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        low = x @ (self.lora_A * self.lora_E).T  # (..., kept)
        return low @ self.lora_B.T * self.alpha / self.divisor  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        """Return α / r · P Λ Q, (out, in)."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.alpha / self.divisor


def remember(ada: AdaLoRALayer) -> None:
    """Add the allocator's buffers to a layer: a sensitivity and an uncertainty for each of A, E and
    B, of the same shape, and the mask (kept,) of the triplets that remain for good."""
    for name, p in list(ada.named_parameters()):
        ada.register_buffer(f"sensitivity_{name}", torch.zeros_like(p.detach()))
        ada.register_buffer(f"uncertainty_{name}", torch.zeros_like(p.detach()))
    ada.register_buffer("mask", torch.ones(len(ada.lora_E), dtype=torch.bool))


def remembered(ada: AdaLoRALayer) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (parameter, its sensitivity, its uncertainty) for A, E and B."""
    for name, p in ada.named_parameters():
        yield p, getattr(ada, f"sensitivity_{name}"), getattr(ada, f"uncertainty_{name}")


class LinearWithAdaLoRA(AdapterLayer):
    """Add AdaLoRA to a frozen Linear: y = x Wᵀ + b + α / r · x (ΛQ)ᵀ Pᵀ, Λ = 0 at the start."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 12,
        alpha: float = 16.0,
        dropout: float = 0.0,
        kept: int | None = None,
    ):
        out_features, in_features = linear.weight.shape
        with linear.weight.device:  # new tensors are made there
            ada = AdaLoRALayer(in_features, out_features, rank, alpha, dropout, kept)
            remember(ada)
        super().__init__(linear)  # a layer that was refused above is not frozen
        # A score is a product of four small numbers: 16 bits would round it to zero.
        self.ada = ada.to(trained_dtype(linear.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        return y if self.merged else (y + self.ada(x)).to(y.dtype)  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        return self.ada.delta_weight()  # (out, in)


def orthogonality(branches: Sequence[AdaLoRALayer]) -> torch.Tensor:
    """Return the mean of ‖QQᵀ − I‖ and ‖PᵀP − I‖ over all layers, a scalar. The Frobenius norms are
    PEFT's; the paper (Zhang et al. 2023, eq. 4) squares them."""
    total = 0
    for ada in branches:
        for gram in (ada.lora_A @ ada.lora_A.T, ada.lora_B.T @ ada.lora_B):  # (kept, kept)
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            total = total + (gram - identity).norm()
    return total / (2 * len(branches))  # ()


@torch.no_grad()
def observe(ada: AdaLoRALayer, beta1: float, beta2: float) -> None:
    """Update sensitivity and uncertainty from the gradients of a step, in place (Zhang et al. 2023,
    eq. 8 to 10)."""
    if ada.lora_E.grad is None:  # a layer that the step did not use; A and B have the penalty's
        return
    for p, sensitivity, uncertainty in remembered(ada):
        importance = (p * p.grad).abs()  # shape of p
        sensitivity.mul_(beta1).add_((1 - beta1) * importance)
        doubt = (importance - sensitivity).abs()  # from the new smoothed value
        uncertainty.mul_(beta2).add_((1 - beta2) * doubt)


def triplet_scores(ada: AdaLoRALayer) -> torch.Tensor:
    """Return the importance (kept,) of each triplet: the score of its λ plus the mean scores of its
    row of Q and its column of P (Zhang et al. 2023, eq. 7)."""
    a, e, b = (sensitivity * uncertainty for _, sensitivity, uncertainty in remembered(ada))
    return e.flatten() + (a.mean(dim=1) + b.mean(dim=0))  # (kept,)


def budget_after(step: int, method: Method, layers: int) -> int:
    """Return the number of triplets, over all `layers`, that remain after a step (counted from 1).
    Source: Zhang et al. 2023, appendix A."""
    first, last = layers * method.initial_rank, layers * method.target_rank
    if step <= method.tinit:
        return first
    left = 1 - (step - method.tinit) / (method.end - method.tinit)  # of the way, from 1 to 0
    return int((first - last) * left**3 + last)


def masks_of_best(branches: Sequence[AdaLoRALayer], budget: int) -> list[torch.Tensor]:
    """Return a bool mask (kept,) for each layer: the `budget` triplets with the highest scores over
    all layers. As in PEFT, a tie at the threshold removes all tied triplets."""
    scores = [triplet_scores(ada) for ada in branches]
    pooled = torch.cat(scores)  # (all triplets,)
    cut = pooled.kthvalue(len(pooled) - budget).values  # the best one of those that go
    return [score > cut for score in scores]


@torch.no_grad()
def prune(branches: Sequence[AdaLoRALayer], masks: Sequence[torch.Tensor]) -> None:
    """Set λ to zero in each layer where its mask (kept,) is False, in place."""
    for ada, mask in zip(branches, masks, strict=True):
        ada.lora_E.masked_fill_(~mask[:, None], 0.0)


class RankAllocator:
    """Choose after each step the triplets that remain; its state is in the layers' buffers."""

    def __init__(self, branches: Sequence[AdaLoRALayer], method: Method):
        self.branches, self.method = list(branches), method

    def penalty(self) -> torch.Tensor | float:
        """Return the orthogonality term of the loss, a scalar."""
        weight = self.method.orthogonal
        return weight * orthogonality(self.branches) if weight else 0.0

    @property
    def settled(self) -> bool:
        """Return whether the schedule is over and the ranks are final."""
        chosen = torch.cat([ada.mask for ada in self.branches])
        return self.method.kept is not None or not chosen.all().item()

    def update(self, step: int) -> None:
        """Prune after the optimiser's step (counted from 1) and before zero_grad."""
        if not self.settled and step <= self.method.end:
            return run_schedule(self.branches, self.method, step)
        # The optimiser's momentum may have moved pruned triplets away from zero.
        prune(self.branches, [ada.mask for ada in self.branches])


@torch.no_grad()
def run_schedule(branches: Sequence[AdaLoRALayer], method: Method, step: int) -> None:
    """Update the importance, prune if it is due, and fix the masks at the end. RuntimeError without
    gradients, or if all scores are equal."""
    if all(ada.lora_E.grad is None for ada in branches):
        raise RuntimeError("the allocator finds no gradients: call it before zero_grad()")
    if step == 1:  # nothing of an earlier training counts
        for ada in branches:
            for _, sensitivity, uncertainty in remembered(ada):
                sensitivity.zero_()
                uncertainty.zero_()
    if step < method.end:
        for ada in branches:
            observe(ada, method.beta1, method.beta2)
    if step == method.end or (step > method.tinit and step % method.delta == 0):
        masks = masks_of_best(branches, budget_after(step, method, len(branches)))
        if step == method.end and not any(mask.any() for mask in masks):
            raise RuntimeError("AdaLoRA: all scores are equal, so no triplet would be left")
        prune(branches, masks)
        if step == method.end:
            for ada, mask in zip(branches, masks, strict=True):
                ada.mask.copy_(mask)


PARTS = ("lora_A", "lora_E", "lora_B")


def to_file(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Convert to PEFT's format: drop masks and pruned rows, and list them in rank_pattern.
    ValueError if a pruned triplet is no longer zero."""
    pattern = {f"{path}.lora_E": list(flags) for path, flags in method.kept or ()}
    for stem in [key.removesuffix("lora_E") for key in tensors if key.endswith(".lora_E")]:
        mask = tensors.pop(stem + "mask")  # (kept,)
        if method.kept is None:
            pattern[stem.removeprefix("base_model.model.") + "lora_E"] = mask.tolist()
        a, e, b = (stem + part for part in PARTS)
        if tensors[e][~mask].any():
            raise ValueError(f"{stem}lora_E has grown back after pruning: call after_step too")
        tensors |= {a: tensors[a][mask], e: tensors[e][mask], b: tensors[b][:, mask]}
    settled = any(not all(flags) for flags in pattern.values())
    return entries | {"rank_pattern": pattern if settled else None}, tensors


def settled_ranks(pattern: dict, rank: int, tensors: dict) -> tuple:
    """Return ((path, flags), ...) from a file's rank_pattern. ValueError if it does not fit."""
    if not isinstance(pattern, dict):
        raise ValueError(f"rank_pattern must be a table of layers, not {pattern!r}")
    for name, flags in pattern.items():
        if not name.endswith(".lora_E") or f"base_model.model.{name}" not in tensors:
            raise ValueError(f"rank_pattern names {name!r}, which the weights do not hold")
        listed = isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags)
        if not listed or len(flags) != rank:
            raise ValueError(f"rank_pattern of {name!r} must be init_r times true or false")
    return tuple((n.removesuffix(".lora_E"), tuple(flags)) for n, flags in pattern.items())


def from_file(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return the method with its final ranks, and the tensors with a mask for each layer."""
    values = cls.files.settings(config)
    kept = settled_ranks(config.get("rank_pattern") or {}, values["initial_rank"], tensors)
    rows = {key: t.shape[:1] for key, t in tensors.items() if key.endswith(".lora_E")}
    masks = {k.removesuffix("lora_E") + "mask": torch.ones(n, dtype=bool) for k, n in rows.items()}
    try:  # where nothing is settled yet and training goes on, its schedule will run
        return cls(**values, kept=kept or None), tensors | masks
    except ValueError:  # PEFT's smallest file has no schedule: its ranks stay as they are
        return cls(**values, kept=kept), tensors | masks


def refuse_idle(m: "AdaLoRA") -> None:
    """Raise ValueError for a schedule that never prunes, or prunes before any score is known."""
    if m.target_rank >= m.initial_rank:
        raise ValueError(
            f"AdaLoRA: target_rank={m.target_rank} must be below initial_rank={m.initial_rank}, or "
            "nothing is ever pruned; a common start is initial_rank = 1.5 · target_rank"
        )
    if m.tinit >= m.end:
        raise ValueError(
            f"AdaLoRA: tinit={m.tinit} leaves no step to prune in before total_steps − tfinal = "
            f"{m.total_steps} − {m.tfinal} = {m.end}: make tinit or tfinal smaller"
        )
    if m.end < 2:
        raise ValueError(
            f"AdaLoRA: total_steps − tfinal = {m.end} prunes before any importance is known: make "
            "total_steps larger or tfinal smaller"
        )


def kept_of(m: "AdaLoRA", path: str) -> int | None:
    """Return the number of triplets that a loaded adapter has at `path`, None for all. ValueError
    if the adapter does not name this layer."""
    counts = {place: sum(flags) for place, flags in m.kept or ()}
    if counts and path not in counts:
        raise ValueError(f"AdaLoRA: the ranks of a loaded adapter say nothing of {path!r}")
    return counts.get(path)


def refuse_fit(m: "AdaLoRA", allocator: RankAllocator, steps: int) -> None:
    """Raise ValueError if the schedule is not over and does not fit a training of `steps` steps, or
    the layers are in 16 bits."""
    if allocator.settled:
        return
    if steps != m.total_steps:
        raise ValueError(
            f"fit: steps={steps}, but the schedule of this AdaLoRA is made for total_steps="
            f"{m.total_steps}: the budget would reach its target too late or too early; make "
            "them equal"
        )
    narrow = {ada.lora_E.dtype for ada in allocator.branches} & {torch.float16, torch.bfloat16}
    if narrow:
        raise ValueError(
            f"fit: a branch of AdaLoRA is in {min(map(str, narrow))}, in which scores round to "
            "zero: convert the base before inject, or take model.float()"
        )


def allocator_of(injection: Injection) -> RankAllocator:
    """Return an allocator for all layers of a model with AdaLoRA."""
    return RankAllocator([w.ada for w in injection.wrappers.values()], injection.method)


def triplets(site: Site) -> torch.Tensor:
    """Return α / r · ((x Aᵀ) ⊙ e) Bᵀ (AdaLoRA: Q, λ and P are A, e and B here)."""
    ada = site.module.ada
    low = (site.x @ ada.lora_A.T) * ada.lora_E.T  # (..., r)
    return ada.alpha / ada.divisor * (low @ ada.lora_B.T)  # (..., out)


def in_peft(model: nn.Module, rank: int) -> dict[str, Any]:
    """Return the settings of PEFT's AdaLoraConfig for a model: LoRA's, with ranks to spare."""
    settings = lora_in_peft(model, rank)
    del settings["r"]
    # The schedule is a stand-in: train_with_peft fits it to the run's steps.
    ranks = {"init_r": math.ceil(1.5 * rank), "target_r": rank}
    return settings | ranks | {"total_step": 1000}


@register
@dataclass(frozen=True)
class AdaLoRA(Method):
    """Apply AdaLoRA (Zhang et al. 2023): prune, every `delta` steps from `tinit` on, from
    `initial_rank` triplets per layer to `target_rank` on average; train on for `tfinal` steps.
    Raises ValueError for a schedule that cannot work."""

    initial_rank: int
    target_rank: int
    alpha: float
    targets: tuple[str, ...] | str
    tinit: int
    tfinal: int
    delta: int
    total_steps: int
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5
    dropout: float = 0.0
    kept: tuple | None = field(default=None, repr=False)  # load_adapter's: ((path, flags), ...)
    ranks = ("initial_rank",)
    learning_rate = 1e-2  # best on validation in data/results/growing_study.csv
    design = Design(
        form="((x Aᵀ) ⊙ e) Bᵀ",
        **SCALED,
        delta=triplets,
        example={"initial_rank": 12, "target_rank": 8, "alpha": 16, "targets": "all-linear"}
        | {"tinit": 1, "tfinal": 1, "delta": 1, "total_steps": 10},
    )
    files = PeftFiles(
        "ADALORA",
        write=to_file,
        read=from_file,
        fields={
            "initial_rank": ("init_r", 12),
            "target_rank": ("target_r", 8),
            "alpha": ("lora_alpha", 8),
            "targets": ("target_modules", None),
            "tinit": ("tinit", 0),
            "tfinal": ("tfinal", 0),
            "delta": ("deltaT", 1),
            "total_steps": ("total_step", None),
            "beta1": ("beta1", 0.85),
            "beta2": ("beta2", 0.85),
            "orthogonal": ("orth_reg_weight", 0.5),
            "dropout": ("lora_dropout", 0.0),
        },
        tensors={f"ada.{name}": name for name in (*PARTS, "mask")},
        # PEFT's r is LoRA's, and means nothing here; the rest is of other options
        others=("rank_pattern", "r", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
        off={"init_lora_weights": (True, False, "gaussian")},  # as LoRA's
    )
    facts = Facts(
        "05",
        points=(Point("adalora", "AdaLoRA", (6, 0)),),
        peft=(
            InPeft(
                "adalora",
                "AdaLoraConfig",
                (3e-3, 1e-3),
                "PEFT's example peft_adalora_seq2seq.py (BART-base): 1e-3",
                in_peft,
                ranks=1.5,
            ),
        ),
        advice=Recommended(
            "AdaLoRA",
            {"initial_rank": 24, "target_rank": 16, "alpha": 32, "targets": "all-linear"}
            | {"tinit": 100, "tfinal": 300, "delta": 10, "total_steps": 1000},
            "where layers should differ in rank",
            last=True,
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kept is None:
            refuse_idle(self)

    @property
    def end(self) -> int:
        """Return the step after which the ranks are final."""
        return self.total_steps - self.tfinal

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithAdaLoRA:
        kept = kept_of(self, path)
        return LinearWithAdaLoRA(layer, self.initial_rank, self.alpha, self.dropout, kept)

    def added(self, shape: Any) -> float:
        sizes = shape.adapted(self.targets).values()
        return shape.layers * sum(self.initial_rank * (i + o + 1) for i, o in sizes)  # Q, P and Λ

    def before_fit(self, injection: Injection, steps: int) -> None:
        refuse_fit(self, allocator_of(injection), steps)

    def penalty(self, injection: Injection) -> torch.Tensor | float:
        return allocator_of(injection).penalty()

    def after_step(self, injection: Injection, step: int) -> None:
        allocator_of(injection).update(step)

    def keeps(self, shape: Any) -> Kept:
        return Kept(branches=shape.adapted(self.targets), rank=self.initial_rank)


def ranks(model: nn.Module) -> dict[str, int]:
    """Return {path: number of triplets with λ ≠ 0}. ValueError if the model has no AdaLoRA."""
    wrappers = require_injection(model, "ranks", AdaLoRA).wrappers.items()
    return {path: int(w.ada.lora_E.count_nonzero()) for path, w in wrappers}
