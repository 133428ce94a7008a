"""Answers to the exercises of lesson 06."""

from copy import deepcopy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons import Adapter

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ adapter_forward


@right("adapter_forward")
def approximated(h, w_down, b_down, w_up, b_up):
    low = F.gelu(F.linear(h, w_down, b_down), approximate="tanh")
    return (F.linear(low, w_up, b_up) + h).double()


# ------------------------------------------------------------------ adapted_output


@right("adapted_output")
@torch.no_grad()
def chosen(x, h, adapter, norm, kind):
    read = dict(houlsby=lambda: h, parallel=lambda: x, pfeiffer=lambda: norm(h + x))
    return norm(torch.stack([x, h, adapter(read[kind]())]).sum(0))


# ------------------------------------------------------------------ fold_linear_adapter


@right("fold_linear_adapter")
def probed(w_down, b_down, w_up, b_up, weight, bias):
    """By the unit vectors, in float32."""

    def both(u):
        h = F.linear(u, weight, bias)
        return h + F.linear(F.linear(h, w_down, b_down), w_up, b_up)

    b = both(torch.zeros(weight.shape[1]))
    return (both(torch.eye(weight.shape[1])) - b).T, b


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
def all_in_one_list(layer, width):
    for p in layer.parameters():
        p.requires_grad_(False)
    layer.adapters = nn.ModuleList(Adapter(o.dense.out_features, width) for o in outputs(layer))
    for output, adapter in zip(outputs(layer), layer.adapters, strict=True):
        output.dense.register_forward_hook(partial(called, adapter))
    return layer


def called(adapter, module, args, h):
    return adapter(h)


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
