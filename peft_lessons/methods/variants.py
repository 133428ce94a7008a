"""LoRA's successors on one engine: PiSSA, LoRA+, LoftQ, VeRA and OFT."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import AdapterLayer, Method, PeftFiles, refuse_entries, register, trained_dtype
from ..engine.design import ON_LINEAR, Design, Site
from .lora import LinearWithLoRA, LoRA
from .qlora import NF4Linear, QLoRA


def leading(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) whose product BA is the best approximation of a weight
    (out, in) of that rank: singular vectors times the square root of their singular values."""
    precise = trained_dtype(weight.dtype)
    U, S, V = torch.linalg.svd(weight.detach().to(precise), full_matrices=False)
    root = S[:rank].sqrt()  # (rank,)
    return root[:, None] * V[:rank], U[:, :rank] * root  # (rank, in), (out, rank)


class LinearWithPiSSA(LinearWithLoRA):
    """Compute y = x W_resᵀ + b + s · (x Aᵀ) Bᵀ with W_res = W − s · B₀A₀, where A₀, B₀ are the
    initial A, B. W is unchanged: s · x (B₀A₀)ᵀ is subtracted from the output."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        super().__init__(linear, rank, alpha, dropout, rslora)
        A, B = leading(linear.weight, rank)
        for name, factor in {"lora_A": A, "lora_B": B}.items():
            trains = getattr(self.lora, name)
            trains.data.copy_(factor / math.sqrt(self.lora.scaling))
            start = trains.detach().clone()  # A₀ (rank, in), B₀ (out, rank)
            self.register_buffer(f"start_{name[-1]}", start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        if self.merged:
            return y
        start = F.linear(F.linear(x.to(self.start_A.dtype), self.start_A), self.start_B)
        return (y + (self.lora(x) - start * self.lora.scaling)).to(y.dtype)

    def delta_weight(self) -> torch.Tensor:
        return self.lora.delta_weight() - self.start_B @ self.start_A * self.lora.scaling


def as_plain_lora(method: LoRA, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Convert to the entries and tensors of the LoRA [B, −B₀] [A; A₀]; a head stays as it is."""
    doubled = {}
    for key, tensor in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removesuffix("lora_A.weight")
            B, A0, B0 = (tensors[path + name] for name in ("lora_B.weight", "start_A", "start_B"))
            doubled[key] = torch.cat([tensor, A0])  # (2r, in)
            doubled[path + "lora_B.weight"] = torch.cat([B, -B0], dim=1)  # (out, 2r)
        elif not key.endswith(("lora_B.weight", "start_A", "start_B")):
            doubled[key] = tensor
    return LoRA.files.entries(method.plain()), doubled


# Not in the registry: what is read from its file is a LoRA.
@dataclass(frozen=True)
class PiSSA(LoRA):
    """Apply PiSSA (Meng et al. 2024): LoRA initialised with the r largest singular values of W, on
    the residual of W. Its file is a plain LoRA of twice the rank on W. ValueError for a higher rank
    than min(in, out) / 2, or a weight with NaN or infinity."""

    learning_rate = 1e-3
    files = replace(
        LoRA.files,
        write=as_plain_lora,
        tensors=LoRA.files.tensors | {"start_A": "start_A", "start_B": "start_B"},
    )

    def plain(self) -> LoRA:
        """Return the LoRA with the same s and twice the rank."""
        alpha = self.alpha * (math.sqrt(2) if self.rslora else 2)
        return LoRA(2 * self.rank, alpha, self.targets, self.dropout, self.rslora)

    def check(self, path: str, layer: nn.Linear) -> None:
        owner, W, limit = f"PiSSA on {path!r}", layer.weight, min(layer.weight.shape)
        if 2 * self.rank > limit:
            raise ValueError(
                f"{owner}: its file is a LoRA of twice the rank, {2 * self.rank}, which would not "
                f"fit {limit}: choose a rank up to {limit // 2}, or leave it out of targets"
            )
        problem = "the weight is {value:g} at {at}{more}, and has no singular values"
        refuse_entries(owner, W.isfinite(), W, problem)

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithPiSSA:
        return LinearWithPiSSA(layer, self.rank, self.alpha, self.dropout, self.rslora)


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """Apply LoRA+ (Hayou et al. 2024): LoRA with `lr_ratio` times the learning rate for B. The
    trained adapter is a LoRA and is saved as one."""

    lr_ratio: float = 16.0
    learning_rate = 3e-4  # of A: a tenth of LoRA's

    @property
    def rate_factors(self) -> dict[str, float]:
        """Return the factor of the learning rate for B."""
        return {"lora.lora_B": self.lr_ratio}


def alternate(
    weight: torch.Tensor,
    rank: int,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    iterations: int,
    principal: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return A (rank, in), B (out, rank) and a quantised Q (out, in) with Q + BA near the weight
    (out, in). A and B start from 0, or from PiSSA's if `principal`. Source: Li et al. 2023."""
    A, B = (factor * principal for factor in leading(weight, rank))  # (rank, in), (out, rank)
    Q = quantize(weight - B @ A)  # (out, in)
    for step in range(iterations):
        Q = quantize(weight - B @ A) if step else Q
        A, B = leading(weight - Q, rank)
    return A, B, Q


def start_from_loss(wrapper: nn.Module, linear: nn.Linear, method: "LoftQ") -> None:
    """Set Q, A and B of a `QLoRALinear` to the result of `alternate` for a Linear, each factor
    divided by √s, so that s · BA is their product."""

    def quantize(weight):
        with torch.device("meta"):  # no memory for values that are replaced at once
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        wrapper.base = NF4Linear(plain, method.block, method.double_quant)
        return wrapper.base.weight  # (out, in)

    root = math.sqrt(wrapper.lora.scaling)
    A, B, _ = alternate(
        linear.weight.detach(), method.rank, quantize, method.iterations, method.principal
    )
    wrapper.base.like = linear.weight.detach().new_empty(0)  # in 16 bits W − BA is no longer W's
    wrapper.lora.lora_A.data.copy_(A / root)
    wrapper.lora.lora_B.data.copy_(B / root)


@register
@dataclass(frozen=True)
class LoftQ(QLoRA):
    """Apply LoftQ (Li et al. 2023): QLoRA with A and B initialised from the quantisation error.
    iterations=0 and principal=True is QPiSSA (the residual of PiSSA in 4 bits). ValueError if both
    are 0 or False."""

    iterations: int = 5
    principal: bool = False
    learning_rate = 1e-3
    moves_base = "stores W − BA in 4 bits, not W"
    design = replace(
        QLoRA.design,
        form="x Aᵀ Bᵀ, where h has Q in 4 bits",
        example={"rank": 8, "alpha": 16, "targets": ("query", "value"), "iterations": 1},
    )
    files = replace(
        QLoRA.files,
        constants={"quantised_base": "loftq"},
        fields=QLoRA.files.fields
        | {"iterations": ("quantised_iterations", 5), "principal": ("quantised_principal", False)},
        own=(*QLoRA.files.own, "quantised_iterations", "quantised_principal"),
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.iterations or self.principal):
            raise ValueError(
                "LoftQ: with neither iterations nor principal A and B both start at 0 "
                "and never learn; QLoRA is what starts without a correction"
            )

    def wrap(self, path: str, layer: nn.Linear) -> nn.Module:
        wrapper = super().wrap(path, layer)
        if wrapper.lora is not None:
            start_from_loss(wrapper, layer, self)
        return wrapper


class Projections(nn.Module):
    """Hold VeRA's frozen random A (rank, in) and B (out, rank), one pair for all layers, drawn from
    the seed as in PEFT. A smaller layer uses the first columns of A and rows of B."""

    def __init__(self, rank: int, in_features: int, out_features: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"vera_A": (rank, in_features), "vera_B": (out_features, rank)}.items():
            bound = math.sqrt(6 / shape[1])
            values = torch.empty(shape, device="cpu", dtype=torch.float32)
            self.register_buffer(name, values.uniform_(-bound, bound, generator=generator))


class LinearWithVeRA(AdapterLayer):
    """Add VeRA to a frozen Linear: y = x Wᵀ + b + λ_b ⊙ (λ_d ⊙ (x Aᵀ)) Bᵀ, with trained λ."""

    def __init__(
        self, linear: nn.Linear, shared: Projections, dropout: float = 0.0, d_initial: float = 0.1
    ):
        super().__init__(linear)
        self.shared, self.dropout = shared, nn.Dropout(dropout)
        like = {"dtype": shared.vera_A.dtype, "device": linear.weight.device}
        self.lambda_d = nn.Parameter(torch.full((len(shared.vera_A),), float(d_initial), **like))
        self.lambda_b = nn.Parameter(torch.zeros(linear.out_features, **like))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this layer's A (rank, in) and B (out, rank)."""
        A, B = self.shared.vera_A, self.shared.vera_B
        return A[:, : self.base.in_features], B[: self.base.out_features]  # (r, in), (out, r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (A, B) = self.base(x), self.factors  # (..., out)
        x = self.dropout(x.to(self.lambda_d.dtype))  # (..., in)
        branch = self.lambda_b * F.linear(self.lambda_d * F.linear(x, A), B)
        return y if self.merged else (y + branch).to(y.dtype)  # (..., out)

    def delta_weight(self) -> torch.Tensor:
        A, B = self.factors
        return (self.lambda_b[:, None] * B) @ (self.lambda_d[:, None] * A)  # (out, in)


SHARED = ("vera_A", "vera_B")


def shared_once(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Store A and B once in the file instead of once per layer."""
    once = {
        f"base_model.{key.rpartition('.')[2]}" if key.endswith(SHARED) else key: tensor
        for key, tensor in tensors.items()
    }
    return entries, once


def shared_by_all(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return the method, and the tensors with A and B in each layer that has a λ_b."""
    pair = {name: tensors[f"base_model.{name}"] for name in SHARED}
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith(SHARED)}
    paths = [key.removesuffix("vera_lambda_b") for key in rest if key.endswith("vera_lambda_b")]
    copies = {path + name: pair[name] for path in paths for name in SHARED}
    return cls(**cls.files.settings(config)), rest | copies


def through_projections(site: Site) -> torch.Tensor:
    """Return λ_b ⊙ (λ_d ⊙ (x Aᵀ)) Bᵀ (VeRA)."""
    layer, (A, B) = site.module, site.module.factors
    return ((site.x @ A.T) * layer.lambda_d) @ B.T * layer.lambda_b  # (..., out)


@register
@dataclass(frozen=True)
class VeRA(Method):
    """Apply VeRA (Kopiczko et al. 2024) to every Linear in `targets`."""

    rank: int = 256
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0
    learning_rate = 3e-2
    design = Design(
        form="((x Aᵀ) ⊙ λ_d) Bᵀ ⊙ λ_b", **ON_LINEAR, delta=through_projections, example={"rank": 8}
    )
    files = PeftFiles(
        "VERA",
        write=shared_once,
        read=shared_by_all,
        constants={"save_projection": True},
        fields={
            "rank": ("r", 256),
            "targets": ("target_modules", None),
            "dropout": ("vera_dropout", 0.0),
            "d_initial": ("d_initial", 0.1),
            "seed": ("projection_prng_key", 0),
        },
        tensors={
            "lambda_b": "vera_lambda_b",
            "lambda_d": "vera_lambda_d",
            "shared.vera_A": "vera_A",
            "shared.vera_B": "vera_B",
        },
        others=("init_weights",),
    )

    def wrap_all(self, layers: Mapping[str, nn.Linear]) -> dict[str, AdapterLayer]:
        outs, ins = zip(*(layer.weight.shape for layer in layers.values()), strict=True)
        shared = Projections(self.rank, max(ins), max(outs), self.seed)
        like = next(iter(layers.values())).weight
        shared.to(like.device, trained_dtype(like.dtype))
        return {
            path: LinearWithVeRA(layer, shared, self.dropout, self.d_initial)
            for path, layer in layers.items()
        }


def skew(entries: torch.Tensor, size: int) -> torch.Tensor:
    """Return S (blocks, size, size) with Sᵀ = −S, from its entries above the diagonal row by row,
    (blocks, size (size − 1) / 2)."""
    rows, cols = torch.triu_indices(size, size, 1)
    S = entries.new_zeros(len(entries), size, size)
    S[:, rows, cols] = entries
    return S - S.mT


def cayley(S: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal R = (I − S)(I + S)⁻¹, of the shape of S (Qiu et al. 2023)."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve(eye + S, eye - S, left=False)


def cayley_neumann(S: torch.Tensor) -> torch.Tensor:
    """Return R = I + 2S + 2S² + 2S³ + S⁴ ≈ (I + S)(I − S)⁻¹, PEFT's default, without a solver."""
    S2 = S @ S
    S3 = S2 @ S
    return torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) + 2 * S + 2 * S2 + 2 * S3 + S3 @ S


def rotated(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Multiply each block of x (..., in) by its matrix of R (blocks, size, size), in R's dtype."""
    blocks = x.to(R.dtype).unflatten(-1, R.shape[:2])  # (..., blocks, size)
    return torch.einsum("...ki,kij->...kj", blocks, R).flatten(-2)  # (..., in)


def refuse_far(R: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a block of R is too ill-conditioned to unmerge a weight of `dtype`."""
    if not R.is_meta and R.isfinite().all():  # merge itself refuses NaN
        condition = torch.linalg.cond(R)  # (blocks,)
        refuse_entries(
            "OFT",
            condition * torch.finfo(dtype).eps < 1,
            condition,
            "block {at}{more} has a condition number of {value:.0f}: the series is far from a "
            "rotation there, and unmerge would magnify what merge rounds away; model.float() "
            "before merge, or keep the adapter beside the base",
        )


class LinearWithOFT(AdapterLayer):
    """Rotate the input of a frozen Linear, block by block: y = (x R) Wᵀ + b."""

    def __init__(self, linear: nn.Linear, block_size: int = 32, neumann: bool = True):
        super().__init__(linear)
        blocks, above = linear.in_features // block_size, block_size * (block_size - 1) // 2
        self.block_size, self.neumann = block_size, neumann
        dtype = trained_dtype(linear.weight.dtype)
        self.entries = nn.Parameter(linear.weight.new_zeros(blocks, above, dtype=dtype))

    def rotation(self) -> torch.Tensor:
        """Return R (blocks, size, size)."""
        precise = trained_dtype(self.entries.dtype)  # 16 bits make no rotation
        S = skew(self.entries.to(precise), self.block_size)  # (blocks, size, size)
        return cayley_neumann(S) if self.neumann else cayley(S)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x if self.merged else rotated(x, self.rotation()).to(x.dtype))

    def merged_tensors(self) -> tuple[torch.Tensor, None]:  # x R Wᵀ = x (W Rᵀ)ᵀ
        R, W = self.rotation(), self.base.weight
        refuse_far(R, W.dtype)
        return rotated(W, R.mT), None

    def unmerged_tensors(self) -> tuple[torch.Tensor, None]:  # the series is no rotation
        return rotated(self.base.weight, torch.linalg.inv(self.rotation().mT)), None


def with_version(method: Method, entries: dict, tensors: dict) -> tuple[dict, dict]:
    """Add the version of PEFT that has the same series for R."""
    return entries | {"peft_version": "0.18.0"}, tensors


def of_this_version(cls: type[Method], config: dict, tensors: dict) -> tuple[Method, dict]:
    """Return the method and the tensors. ValueError for the other series of older versions."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    old = version is None or tuple(map(int, version.groups())) < (0, 18)
    if config.get("use_cayley_neumann", True) and old:
        raise ValueError("PEFT before 0.18 had another series for R: train it anew")
    return cls(**cls.files.settings(config)), tensors


def turned(site: Site) -> torch.Tensor:
    """Return (x R − x) Wᵀ (OFT)."""
    R = torch.block_diag(*site.module.rotation())  # (in, in)
    return (site.x @ R - site.x) @ site.module.base.weight.T  # (..., out)


@register
@dataclass(frozen=True)
class OFT(Method):
    """Apply OFT (Qiu et al. 2023) to every Linear in `targets`. With neumann=False R is exactly
    orthogonal and nearly the transpose of the other setting's R, so the file stores the setting.
    ValueError if `block_size` does not divide the inputs."""

    block_size: int = 32
    targets: tuple[str, ...] | str = "all-linear"
    neumann: bool = True
    learning_rate = 1e-3
    design = Design("x (R − I) Wᵀ", **ON_LINEAR, delta=turned)
    files = PeftFiles(
        "OFT",
        write=with_version,
        read=of_this_version,
        tensors={"entries": "oft_R.weight"},
        fields={
            "block_size": ("oft_block_size", 32),
            "targets": ("target_modules", None),
            "neumann": ("use_cayley_neumann", True),
        },
        others=("eps", "init_weights"),
        off={"num_cayley_neumann_terms": (5,), "r": (0,)},
    )

    def check(self, path: str, layer: nn.Linear) -> None:
        if layer.in_features % self.block_size:
            raise ValueError(
                f"OFT on {path!r}: block_size={self.block_size} must divide "
                f"the {layer.in_features} inputs of the layer"
            )

    def wrap(self, path: str, layer: nn.Linear) -> LinearWithOFT:
        return LinearWithOFT(layer, self.block_size, self.neumann)
