"""Answers to the exercises of lesson 06."""

import math
from copy import deepcopy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons import Adapter
from peft_lessons.methods.adapters import Bottleneck

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ adapter_parameters

PLACES = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}


@wrong("adapter_parameters", "both biases are counted with d parameters")
def biases_of_d(d, m, layers, kind):
    return 2 * layers * PLACES[kind] * d * (m + 1)


@right("adapter_parameters")
def built(d, m, layers, kind):
    """Build one and count."""
    places = 2 * layers if kind == "houlsby" else layers
    return places * sum(p.numel() for p in Bottleneck(d, m).parameters())


@right("adapter_parameters")
def factored(d, m, layers, kind):
    return ((2 * m + 1) * d + m) * layers * (1 + (kind == "houlsby"))


# ------------------------------------------------------------------ parallel_adapter


@wrong("parallel_adapter", "the scale does not reach b_up")
def scaled_inside(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    low = scale * F.relu(F.linear(x, w_down, b_down))
    return sublayer_output + F.linear(low, w_up, b_up)


@wrong("parallel_adapter", "no gradient reaches sublayer_output")
def frozen_base(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return einsum(x, sublayer_output.data, w_down, b_down, w_up, b_up, scale)


@wrong("parallel_adapter", "your function raised RuntimeError")
def not_transposed(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * (F.relu(x @ w_down + b_down) @ w_up + b_up)


@right("parallel_adapter")
def einsum(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    low = (torch.einsum("...d,md->...m", x, w_down) + b_down).clamp(min=0)
    return torch.einsum("...m,dm->...d", low, w_up * scale) + scale * b_up + sublayer_output


@right("parallel_adapter")
def scaled_through(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    """ReLU(s·t) = s · ReLU(t) for s > 0; the bias gets the scale by itself."""
    low = torch.relu(scale * (x @ w_down.mT + b_down))
    return torch.add(sublayer_output, low @ w_up.mT) + b_up * scale


# ------------------------------------------------------------------ identity_gap


@wrong("identity_gap", "both sizes are squared")
def ratio_of_variances(adapter, h):
    return by_means(adapter, h) ** 2


@wrong("identity_gap", "dropout is on: measure in eval mode")
def in_the_mode_it_came_in(adapter, h):
    with torch.inference_mode():
        return torch.dist(adapter(h), h).item() / h.square().sum().sqrt().item()


@right("identity_gap")
def left_in_eval_mode(adapter, h):
    adapter.eval()
    with torch.no_grad():
        return ((adapter(h) - h).norm() / h.norm()).item()


@right("identity_gap")
def by_dist(adapter, h):
    mode = adapter.training
    try:
        return float(torch.dist(adapter.eval()(h), h) / torch.linalg.vector_norm(h))
    finally:
        adapter.train(mode)


@right("identity_gap")
def by_means(adapter, h):
    """Root mean squares: the number of entries cancels."""
    change = (deepcopy(adapter).eval()(h) - h).detach().double()
    return math.sqrt(change.pow(2).mean().item() / h.double().pow(2).mean().item())


# ------------------------------------------------------------------ fold_linear_adapter


@wrong("fold_linear_adapter", "the adapter reads the layer's input x, not its output")
def as_lora(w_down, b_down, w_up, b_up, weight, bias):
    """W + BA, as for LoRA: that branch reads the layer's input."""
    return torch.addmm(weight, w_up, w_down), w_up @ (w_down @ bias + b_down) + b_up + bias


@wrong("fold_linear_adapter", "your function raised RuntimeError")
def down_after_up(w_down, b_down, w_up, b_up, weight, bias):
    return weight + w_down @ w_up @ weight, bias + w_down @ (w_up @ bias + b_up) + b_down


@right("fold_linear_adapter")
def factor_first(w_down, b_down, w_up, b_up, weight, bias):
    """(I + W_up W_down) is what the adapter does to a vector."""
    whole = torch.eye(len(weight), dtype=weight.dtype) + w_up @ w_down
    return whole @ weight, whole @ bias + (w_up @ b_down + b_up)


@right("fold_linear_adapter")
def homogeneous(w_down, b_down, w_up, b_up, weight, bias):
    """Weight and bias as one matrix (d, in + 1)."""
    both = torch.cat([weight, bias[:, None]], dim=1)
    low = torch.einsum("md,dn->mn", w_down, both)
    low[:, -1] += b_down
    new = both + w_up @ low
    return new[:, :-1].contiguous(), new[:, -1] + b_up


# ------------------------------------------------------------------ insert_adapters


def outputs(layer):
    return layer.attention.output, layer.output


def sequential(layer, width, at="dense", make=Adapter):
    layer.requires_grad_(False)
    for output in outputs(layer):
        old = getattr(output, at)
        setattr(output, at, nn.Sequential(old, make(output.dense.out_features, width)))
    return layer


@wrong("insert_adapters", "the adapters are frozen with the base")
def as_shipped(layer, width):
    for output in (layer.attention.output, layer.output):
        output.adapter = Adapter(output.dense.out_features, width)
        output.register_forward_hook(lambda module, args, h: h + module.adapter(h))
    layer.requires_grad_(False)
    return layer


@wrong("insert_adapters", "the block does not hold the adapters")
def held_by_its_hook_alone(layer, width):
    layer.requires_grad_(False)
    for output in outputs(layer):
        adapter = Adapter(output.dense.out_features, width)
        output.dense.register_forward_hook(partial(called, adapter))
    return layer


@wrong("insert_adapters", "there is one adapter")
def one_for_both(layer, width):
    adapter = Adapter(layer.output.dense.out_features, width)
    return sequential(layer, width, make=lambda d, m: adapter)


class Detached(Adapter):
    def forward(self, h):
        return h + (super().forward(h) - h).detach()


@wrong("insert_adapters", "the gradients of the adapters, by their shape")
def cut_off(layer, width):
    return sequential(layer, width, make=Detached)


@wrong("insert_adapters", "the adapter comes after the layer norm")
def behind_the_norm(layer, width):
    return sequential(layer, width, at="LayerNorm")


@wrong("insert_adapters", "the block's output right after the insertion (that of the base)")
def large_start(layer, width):
    def make(d, m):
        adapter = Adapter(d, m)
        nn.init.normal_(adapter.adapter.up.weight)
        return adapter

    return sequential(layer, width, make=make)


@wrong("insert_adapters", "what is returned is not the argument layer itself")
def a_copy(layer, width):
    return sequential(deepcopy(layer), width)


@right("insert_adapters")
def after_the_dropout(layer, width):
    return sequential(layer, width, at="dropout")


@right("insert_adapters")
def frozen_by_name(layer, width):
    """The base's own parameters, listed before anything joins them."""
    base = list(layer.parameters())
    for output in outputs(layer):
        output.adapter = Bottleneck(output.dense.out_features, width)
        output.dense.register_forward_hook(
            lambda module, args, h, one=output.adapter: torch.add(h, one(h))
        )
    for p in base:
        p.requires_grad = False
    return layer


@right("insert_adapters")
def all_in_one_list(layer, width):
    for p in layer.parameters():
        p.requires_grad_(False)
    layer.adapters = nn.ModuleList(Adapter(o.dense.out_features, width) for o in outputs(layer))
    for output, adapter in zip(outputs(layer), layer.adapters, strict=True):
        output.dense.register_forward_hook(partial(called, adapter))
    return layer


def called(adapter, module, args, h):
    return adapter(h)
