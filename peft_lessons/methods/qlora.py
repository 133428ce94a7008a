"""Quantisation of weights to four bits (NF4, double quantisation), and QLoRA: low-rank adaptation
of a base that is stored in four bits."""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..engine import AdapterLayer, find_targets, matches, register, validate
from ..engine.facts import SFT, Facts, InPeft, Kept, Mark, Point, Recommended
from .lora import FACTORS, LoRA, LoRALayer, in_peft

OUTERMOST = 0.9677083  # the mean of 1-1/32 and 1-1/30


def normal_quantiles(count: int) -> list[float]:
    """Return `count` quantiles of N(0, 1) at evenly spaced probabilities from OUTERMOST down to 1/2
    (exclusive). Source: Dettmers et al. 2023, section 3 and appendix E."""
    probabilities = torch.linspace(OUTERMOST, 0.5, count + 1)[:-1]  # (count,)
    return [NormalDist().inv_cdf(p) for p in probabilities.tolist()]


NF4 = torch.tensor(sorted([-z for z in normal_quantiles(7)] + [0.0] + normal_quantiles(8)))
NF4 = NF4 / NF4.max()  # (16,), from -1 to 1


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Flatten `x` and cut it into rows (blocks, block); zeros pad the last row."""
    flat, short = x.flatten(), -x.numel() % block
    return (F.pad(flat, (0, short)) if short else flat).view(-1, block)  # (blocks, block)


def scale_by_absmax(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (`x` divided by the absmax of its block, flat (n,); the absmax values (blocks,))."""
    blocks = in_blocks(x, block)  # (blocks, block)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    reciprocal = (1 / absmax).nan_to_num(posinf=0.0)  # zeros stay zeros
    return (blocks * reciprocal[:, None]).flatten()[: x.numel()], absmax


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes 0 to 15, uint8 (n,) with n even, two to a byte (n/2,), the first in the high half.
    Raises ValueError for other codes."""
    if codes.dtype != torch.uint8 or codes.numel() % 2 or not (codes.is_meta or (codes < 16).all()):
        raise ValueError("pack_nibbles: codes must be an even number of uint8 between 0 and 15")
    return (codes[0::2] << 4) | codes[1::2]  # (n/2,)


MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2  # (15,)
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)  # (256, 2)


def refuse_weight(owner: str, weight: torch.Tensor) -> None:
    """Raise ValueError for a weight that has no 4-bit form."""
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"{owner}: weight must be a tensor of floating-point numbers: is it quantised already?"
        )
    if not weight.numel() or weight.numel() % 2:
        raise ValueError(
            f"{owner}: weight of shape {tuple(weight.shape)} must hold an even number "
            "of entries: two go to a byte"
        )
    if not weight.is_meta and not weight.detach().abs().max() <= 1e30:
        raise ValueError(
            f"{owner}: weight holds NaN, infinity or a number above 1e30, which no level stands for"
        )


def quantize_nf4(weight: torch.Tensor, block: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, uint8 (n/2,); absmax, float32 (blocks,)) of n weights (Dettmers et al. 2023,
    section 3). ValueError as `refuse_weight`, or for a block size other than 32, 64, ..., 4096."""
    validate("quantize_nf4", block=block)
    refuse_weight("quantize_nf4", weight)
    scaled, absmax = scale_by_absmax(weight.detach().float(), block)  # (n,), (blocks,)
    codes = torch.bucketize(scaled, MIDPOINTS.to(scaled.device), out_int32=True)
    return pack_nibbles(codes.to(torch.uint8)), absmax


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], block: int = 64
) -> torch.Tensor:
    """Return the float32 weight of the given shape that packed codes (n/2,) and absmax (blocks,)
    represent. Raises ValueError if their sizes do not match."""
    validate("dequantize_nf4", block=block)
    packed, absmax, n = packed.flatten(), absmax.flatten(), math.prod(shape)
    if packed.dtype != torch.uint8 or 2 * len(packed) != n or len(absmax) != -(-n // block):
        raise ValueError(
            f"dequantize_nf4: {tuple(packed.shape)} {packed.dtype} codes and {len(absmax)} absmax "
            f"do not make a weight of shape {tuple(shape)} in blocks of {block}"
        )
    table = PAIRS.view(torch.int64).flatten().to(packed.device)  # (256,) pairs
    values = table.index_select(0, packed.int()).view(torch.float32)  # (n,)
    return in_blocks(values, block).mul_(absmax[:, None]).flatten()[:n].view(shape)


def dynamic_levels() -> torch.Tensor:
    """Return the levels (256,) of the signed dynamic 8-bit map, sorted (Dettmers et al. 2021)."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)  # (2^i + 1,)
        positive += (10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
    return torch.tensor(sorted([-v for v in positive] + [0.0, 1.0] + positive))


DYNAMIC = dynamic_levels()  # (256,)
# On a CPU the library looks the level up in a table of 65,536 cells. Near a midpoint that may be
# the neighbour of the nearest level, and we want the very same codes.
CELLS = torch.bucketize(torch.arange(65536) / 65535 * 2 - 1, (DYNAMIC[1:] + DYNAMIC[:-1]) / 2).to(
    torch.uint8
)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the absmax values (blocks,) in 8 bits (double quantisation, Dettmers et al. 2023,
    section 3): codes, uint8 (blocks,); second-level absmax (blocks/256,); offset ()."""
    offset = absmax.mean()
    scaled, second = scale_by_absmax(absmax - offset, 256)  # (blocks,), (blocks/256,)
    cell = ((scaled + 1) / 2 * 65535 + 0.5).long()  # 0 to 65,535
    return CELLS.to(absmax.device)[cell], second, offset


def dequantize_absmax(
    codes: torch.Tensor, second: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Return the absmax values (blocks,), approximately, from the result of `quantize_absmax`."""
    values = DYNAMIC.to(codes.device)[codes.long()]  # (blocks,)
    return in_blocks(values, 256).mul(second[:, None]).flatten()[: len(codes)] + offset


BUFFERS = ("packed", "absmax", "second", "offset")  # the last two with double quantisation only


class DequantizedProduct(torch.autograd.Function):
    """Compute x W'ᵀ + b for an `NF4Linear`; dequantise W' in forward and again in backward, so that
    it is not kept between the two."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), bias)  # (..., out)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:  # grad: (..., out)
        to_x = grad @ ctx.layer.weight.to(grad.dtype)  # (..., in)
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


class NF4Linear(nn.Module):
    """Store a Linear's weight in 4 bits, outside the state dict: y = x W'ᵀ + b, x (..., in).
    Raises TypeError for anything but a plain nn.Linear, ValueError as `quantize_nf4`."""

    def __init__(self, linear: nn.Linear, block: int = 64, double_quant: bool = True):
        if type(linear) is not nn.Linear:
            raise TypeError(f"NF4Linear takes a plain nn.Linear, not {type(linear).__name__}")
        super().__init__()
        self.shape, self.block = linear.weight.shape, block
        self.packed_numel, self.bias = linear.weight.numel(), linear.bias
        packed, absmax = quantize_nf4(linear.weight.detach(), block)
        parts = quantize_absmax(absmax) if double_quant else (absmax,)
        for name, part in zip(BUFFERS, (packed, *parts), strict=False):
            # Floats are kept as their bits: model.half() would round them otherwise.
            bits = part.view(torch.int32) if part.is_floating_point() else part
            self.register_buffer(name, bits, persistent=False)
        self.register_buffer("like", linear.weight.detach().new_empty(0), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """Return W' (out, in)."""
        return restored_weight(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return DequantizedProduct.apply(x, self.bias, self)


def restored_weight(layer: NF4Linear) -> torch.Tensor:
    """Dequantise the weight W' (out, in) of an `NF4Linear`, in the model's dtype."""
    buffers = [getattr(layer, name) for name in BUFFERS if hasattr(layer, name)]
    packed, *parts = (b.view(torch.float32) if b.dtype == torch.int32 else b for b in buffers)
    absmax = dequantize_absmax(*parts) if len(parts) == 3 else parts[0]  # (blocks,)
    return dequantize_nf4(packed, absmax, layer.shape, layer.block).to(layer.like.dtype)


class QLoRALinear(AdapterLayer):
    """Quantise a Linear to 4 bits and add LoRA: y = x W'ᵀ + b + s · (x Aᵀ) Bᵀ.
    With lora=None the layer is quantised only."""

    def __init__(
        self,
        linear: nn.Linear,
        lora: LoRALayer | None = None,
        block: int = 64,
        double_quant: bool = True,
    ):
        super().__init__(NF4Linear(linear, block, double_quant))
        self.lora = lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (..., out)
        branch = not self.merged and self.lora is not None
        return (y + self.lora(x)).to(y.dtype) if branch else y  # (..., out)

    def delta_weight(self) -> torch.Tensor | int:
        if isinstance(self.base, NF4Linear):
            raise TypeError(
                "the base is in 4 bits, and merged into it what was learned would be "
                "rounded away in part: dequantize(model) first, or keep the adapter"
            )
        return 0 if self.lora is None else self.lora.delta_weight()  # (out, in)


@register
@dataclass(frozen=True)
class QLoRA(LoRA):
    """Apply QLoRA (Dettmers et al. 2023): all Linears but the head in 4 bits, LoRA on `targets`."""

    block: int = 64
    double_quant: bool = True
    design = replace(LoRA.design, form="x Aᵀ Bᵀ, where h has W in 4 bits")
    files = replace(
        LoRA.files,
        constants={"quantised_base": "nf4"},
        fields=LoRA.files.fields
        | {"block": ("quantised_block", 64), "double_quant": ("quantised_double", True)},
        own=("quantised_base", "quantised_block", "quantised_double"),
    )
    facts = Facts(
        "03",
        points=(Point("qlora", "QLoRA", (-6, 0)),),
        mark=Mark("QLoRA", "4 bit", "the linear maps in 4 bits, as in QLoRA"),
        peft=(InPeft("qlora", "LoraConfig", (1e-3, 2e-4), SFT, in_peft, ranks=1, four_bit=True),),
        advice=Recommended("QLoRA", FACTORS, "the smallest base, and a slower step", served=True),
    )

    def adapts(self, path: str) -> bool:
        """Return whether the layer at `path` gets LoRA."""
        return self.targets == "all-linear" or matches(path, self.targets)

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        wanted = super().find(model) | find_targets(model, "all-linear", self.takes)
        return {path: layer for path, layer in model.named_modules() if path in wanted}

    def check(self, path: str, layer: nn.Module) -> None:
        refuse_weight(f"QLoRA on {path!r}", layer.weight)
        if layer.in_features % 64:
            raise ValueError(
                f"QLoRA on {path!r}: in_features={layer.in_features} must be a "
                "multiple of 64, which the library's 4-bit kernels need"
            )
        if self.adapts(path):
            super().check(path, layer)

    def wrap(self, path: str, layer: nn.Linear) -> QLoRALinear:
        lora = super().wrap(path, layer).lora if self.adapts(path) else None
        return QLoRALinear(layer, lora, self.block, self.double_quant)

    def keeps(self, shape: Any) -> Kept:
        return replace(super().keeps(shape), packed=True)


@torch.inference_mode(False)  # under a caller's inference mode the weights could never train
def dequantize(model: nn.Module) -> nn.Module:
    """Replace every 4-bit layer by a plain frozen Linear with the weight W', in place, and return
    the model; its adapters stay, and can then be merged. ValueError if no layer is in 4 bits."""
    places = [
        (module, name, layer)
        for module in model.modules()
        for name, layer in module.named_children()
        if isinstance(layer, NF4Linear)
    ]
    if not places:
        raise ValueError("dequantize: the model has no layer in 4 bits")
    for module, name, layer in places:
        out_features, in_features = layer.shape
        with torch.device("meta"):  # no memory for values that are replaced at once
            plain = nn.Linear(in_features, out_features, bias=False)
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(module, name, plain.train(layer.training))
    return model
