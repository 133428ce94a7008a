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


# ------------------------------------------------------------------ adapter_forward


@right("adapter_forward")
def by_einsum(h, w_down, b_down, w_up, b_up):
    low = F.gelu(torch.einsum("...d,md->...m", h, w_down) + b_down)
    return torch.einsum("...m,dm->...d", low, w_up) + (h + b_up)


@right("adapter_forward")
def approximated(h, w_down, b_down, w_up, b_up):
    low = F.gelu(F.linear(h, w_down, b_down), approximate="tanh")
    return (F.linear(low, w_up, b_up) + h).double()


@right("adapter_forward")
def by_layers(h, w_down, b_down, w_up, b_up):
    """Modules that hold the given tensors, and no gradient."""
    with torch.no_grad():
        down, up = nn.Linear(*w_down.T.shape), nn.Linear(*w_up.T.shape)
        down.weight, down.bias, up.weight, up.bias = map(nn.Parameter, (w_down, b_down, w_up, b_up))
        return nn.Sequential(down, nn.GELU(), up)(h).add(h)


# ------------------------------------------------------------------ adapted_output


@right("adapted_output")
def branches(x, h, adapter, norm, kind):
    total = x + h
    if kind == "pfeiffer":
        return norm(total + adapter(norm(total)))
    if kind == "parallel":
        return norm(total + adapter(x))
    return norm(total + adapter(h))


@right("adapted_output")
@torch.no_grad()
def chosen(x, h, adapter, norm, kind):
    read = dict(houlsby=lambda: h, parallel=lambda: x, pfeiffer=lambda: norm(h + x))
    return norm(torch.stack([x, h, adapter(read[kind]())]).sum(0))


# ------------------------------------------------------------------ fold_linear_adapter


@right("fold_linear_adapter")
def factor_first(w_down, b_down, w_up, b_up, weight, bias):
    """(I + W_up W_down) is what the adapter does to a vector."""
    whole = torch.eye(len(weight), dtype=weight.dtype) + w_up @ w_down
    return whole @ weight, whole @ bias + (w_up @ b_down + b_up)


@right("fold_linear_adapter")
def probed(w_down, b_down, w_up, b_up, weight, bias):
    """By the unit vectors, in float32."""

    def both(u):
        h = F.linear(u, weight, bias)
        return h + F.linear(F.linear(h, w_down, b_down), w_up, b_up)

    b = both(torch.zeros(weight.shape[1]))
    return (both(torch.eye(weight.shape[1])) - b).T, b


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


@wrong("insert_adapters", "the block's output right after the insertion (that of the base)")
def large_start(layer, width):
    def make(d, m):
        adapter = Adapter(d, m)
        nn.init.normal_(adapter.adapter.up.weight)
        return adapter

    return sequential(layer, width, make=make)


@wrong("insert_adapters", "the result is not the argument layer itself")
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


# ------------------------------------------------------------------ adapter_parameters


@right("adapter_parameters")
def built(d, m, layers, kind):
    """Build one and count."""
    places = 2 * layers if kind == "houlsby" else layers
    return places * sum(p.numel() for p in Bottleneck(d, m).parameters())


@right("adapter_parameters")
def factored(d, m, layers, kind):
    return ((2 * m + 1) * d + m) * layers * (1 + (kind == "houlsby"))


# ------------------------------------------------------------------ identity_gap


@right("identity_gap")
def left_in_eval_mode(adapter, h):
    adapter.eval()
    with torch.no_grad():
        return ((adapter(h) - h).norm() / h.norm()).item()


@wrong("identity_gap", "is a tensor of shape (2, 5), expected the float")
def one_of_each_vector(adapter, h):
    return (adapter(h) - h).norm(dim=-1) / h.norm()


@right("identity_gap")
def of_shape_one(adapter, h):
    return (adapter(h) - h).flatten()[None].norm(dim=1) / h.norm()


@right("identity_gap")
def by_dist(adapter, h):
    with torch.inference_mode():
        return torch.dist(adapter(h), h) / torch.linalg.vector_norm(h)


@right("identity_gap")
def by_means(adapter, h):
    """Root mean squares: the number of entries cancels."""
    change = (deepcopy(adapter).eval()(h) - h).detach().double()
    return math.sqrt(change.pow(2).mean().item() / h.double().pow(2).mean().item())
