"""Answers to the exercises of lesson 06."""

import math
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


@wrong("adapter_parameters", "the biases are missing")
def matrices(d, m, layers, kind):
    return layers * PLACES[kind] * 2 * d * m


@wrong("adapter_parameters", "the bias of the way up is missing")
def only_down_bias(d, m, layers, kind):
    return layers * PLACES[kind] * (d * m + m + m * d)


@wrong("adapter_parameters", "the bias of the way down is missing")
def only_up_bias(d, m, layers, kind):
    return layers * PLACES[kind] * (d * m + m * d + d)


@wrong("adapter_parameters", "both biases are counted with d numbers")
def biases_of_d(d, m, layers, kind):
    return layers * PLACES[kind] * 2 * (d * m + d)


@wrong("adapter_parameters", "both biases are counted with m numbers")
def biases_of_m(d, m, layers, kind):
    return layers * PLACES[kind] * 2 * (d * m + m)


@wrong("adapter_parameters", "one of the two matrices is missing")
def one_matrix(d, m, layers, kind):
    return layers * PLACES[kind] * (d * m + d + m)


@wrong("adapter_parameters", "the norms are counted too")
def with_norms(d, m, layers, kind):
    return layers * PLACES[kind] * (2 * d * m + m + d + 2 * d)


@wrong("adapter_parameters", "houlsby stands at two places of a layer")
def one_place(d, m, layers, kind):
    if kind not in PLACES:
        raise ValueError(kind)
    return layers * (2 * d * m + m + d)


@wrong("adapter_parameters", "pfeiffer and parallel stand at one place of a layer")
def two_places(d, m, layers, kind):
    return layers * 2 * (2 * d * m + m + d)


@wrong("adapter_parameters", "parallel stands at one place of a layer")
def parallel_twice(d, m, layers, kind):
    return layers * (1 if kind == "pfeiffer" else 2) * (2 * d * m + m + d)


@wrong("adapter_parameters", "the layers are left out")
def one_layer(d, m, layers, kind):
    return PLACES[kind] * (2 * d * m + m + d)


@wrong("adapter_parameters", "nothing was raised, where ValueError was due")
def anything_else_is_one(d, m, layers, kind):
    return layers * (2 if kind == "houlsby" else 1) * (2 * d * m + m + d)


@wrong("adapter_parameters", "raised KeyError: 'between', where ValueError was due")
def a_key_error(d, m, layers, kind):
    return layers * PLACES[kind] * (2 * d * m + m + d)


@wrong("adapter_parameters", "the message does not name 'between'")
def no_name(d, m, layers, kind):
    if kind not in PLACES:
        raise ValueError("unknown kind")
    return layers * PLACES[kind] * (2 * d * m + m + d)


@wrong("adapter_parameters", "the result is the float")
def a_float(d, m, layers, kind):
    return layers * PLACES[kind] * (2 * d * m + m + d) / 1


@right("adapter_parameters")
def built(d, m, layers, kind):
    """Build one and count."""
    if kind == "houlsby":
        places = 2 * layers
    elif kind in ("pfeiffer", "parallel"):
        places = layers
    else:
        raise ValueError(f"unknown kind {kind}")
    return places * sum(p.numel() for p in Bottleneck(d, m).parameters())


@right("adapter_parameters")
def factored(d, m, layers, kind):
    if kind not in PLACES:
        raise ValueError(f"{kind}?")
    return ((2 * m + 1) * d + m) * layers * (1 + (kind == "houlsby"))


@right("adapter_parameters")
def matched(d, m, layers, kind):
    match kind:
        case "houlsby":
            places = 2
        case "pfeiffer" | "parallel":
            places = 1
        case _:
            raise ValueError(f"no kind of adapter: {kind}")
    return sum((d + 1) * m + (m + 1) * d for _ in range(places * layers))


# ------------------------------------------------------------------ parallel_adapter


def branch(x, w_down, b_down, w_up, b_up, f=torch.relu):
    return f(x @ w_down.T + b_down) @ w_up.T + b_up


@wrong("parallel_adapter", "x is added too")
def with_residual(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return x + sublayer_output + scale * branch(x, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "x is added in the place of the sublayer's output")
def on_x(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return x + scale * branch(x, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "the adapter reads the sublayer's output")
def sequential(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * branch(sublayer_output, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "the adapter reads the sum")
def reads_sum(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * branch(x + sublayer_output, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "the scale is left out")
def unscaled(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + branch(x, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "the scale multiplies the sublayer's output as well")
def all_scaled(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return scale * (sublayer_output + branch(x, w_down, b_down, w_up, b_up))


@wrong("parallel_adapter", "the scale does not reach b_up")
def scaled_inside(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    low = scale * F.relu(F.linear(x, w_down, b_down))
    return sublayer_output + F.linear(low, w_up, b_up)


@wrong("parallel_adapter", "the sublayer's output is missing")
def alone(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return scale * branch(x, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "b_up is missing")
def no_up_bias(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * (F.relu(F.linear(x, w_down, b_down)) @ w_up.T)


@wrong("parallel_adapter", "b_down is missing")
def no_down_bias(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * F.linear(F.relu(x @ w_down.T), w_up, b_up)


@wrong("parallel_adapter", "both biases are missing")
def no_biases(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * (F.relu(x @ w_down.T) @ w_up.T)


@wrong("parallel_adapter", "the ReLU between the matrices is missing")
def linear(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * branch(x, w_down, b_down, w_up, b_up, nn.Identity())


@wrong("parallel_adapter", "a GELU stands in the place of the ReLU")
def gelu(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * branch(x, w_down, b_down, w_up, b_up, F.gelu)


@wrong("parallel_adapter", "the ReLU comes after the second matrix")
def late(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    a = F.relu(F.linear(F.linear(x, w_down, b_down), w_up, b_up))
    return sublayer_output + scale * a


@wrong("parallel_adapter", "no gradient reaches x")
def detached(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output + scale * branch(x.detach(), w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "no gradient reaches sublayer_output")
def frozen_base(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    return sublayer_output.data + scale * branch(x, w_down, b_down, w_up, b_up)


@wrong("parallel_adapter", "the argument sublayer_output was changed")
def in_place(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    sublayer_output += scale * branch(x, w_down, b_down, w_up, b_up)
    return sublayer_output


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


@right("parallel_adapter")
def with_layers(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    a = F.linear(F.threshold(F.linear(x, w_down, b_down), 0, 0), w_up, b_up)
    return torch.add(sublayer_output, a, alpha=scale)


# ------------------------------------------------------------------ identity_gap


def gap_of(ratio):
    def identity_gap(adapter, h):
        training = adapter.training
        adapter.eval()
        with torch.no_grad():
            result = ratio(adapter(h), h)
        adapter.train(training)
        return result.item()

    return identity_gap


def spectral_norm(x):
    return torch.linalg.norm(x.flatten(0, -2), 2)


for told, ratio in [
    ("the change is not divided by the size of h", lambda a, h: (a - h).norm()),
    (
        "the change is divided by the size of the adapter's output",
        lambda a, h: (a - h).norm() / a.norm(),
    ),
    ("h is not taken away", lambda a, h: a.norm() / h.norm()),
    (
        "the sizes are compared, not the vectors: take",
        lambda a, h: (a.norm() - h.norm()).abs() / h.norm(),
    ),
    (
        "both sizes are squared",
        lambda a, h: (a - h).square().mean() / h.square().mean(),
    ),
    (
        "the ratio is taken of each vector and then averaged",
        lambda a, h: ((a - h).norm(dim=-1) / h.norm(dim=-1)).mean(),
    ),
    (
        "the ratio is taken of each entry and then averaged",
        lambda a, h: ((a - h).abs() / h.abs()).mean(),
    ),
    (
        "the sizes of the vectors are averaged",
        lambda a, h: (a - h).norm(dim=-1).mean() / h.norm(dim=-1).mean(),
    ),
    (
        "is its largest singular value",
        lambda a, h: spectral_norm(a - h) / spectral_norm(h),
    ),
    (
        "the largest entries are compared",
        lambda a, h: (a - h).abs().max() / h.abs().max(),
    ),
    (
        "absolute values are summed",
        lambda a, h: (a - h).abs().mean() / h.abs().mean(),
    ),
    ("this is the mean squared change", lambda a, h: F.mse_loss(a, h)),
    ("this is a percentage", lambda a, h: 100 * (a - h).norm() / h.norm()),
    ("`adapter` has the residual in it", lambda a, h: (a - h - h).norm() / h.norm()),
]:
    wrong("identity_gap", told)(gap_of(ratio))


@wrong("identity_gap", "the argument adapter was changed")
def only_the_outermost_put_back(adapter, h):
    mode = adapter.training
    gap = ((adapter.eval()(h) - h).norm() / h.norm()).item()
    adapter.training = mode
    return gap


@wrong("identity_gap", "dropout is on")
def in_train_mode(adapter, h):
    with torch.no_grad():
        return ((adapter(h) - h).norm() / h.norm()).item()


@wrong("identity_gap", "the argument adapter was changed")
def left_in_eval_mode(adapter, h):
    adapter.eval()
    with torch.no_grad():
        return ((adapter(h) - h).norm() / h.norm()).item()


@wrong("identity_gap", "the argument adapter was changed")
def left_in_train_mode(adapter, h):
    adapter.eval()
    gap = ((adapter(h) - h).norm() / h.norm()).item()
    adapter.train()
    return gap


@wrong("identity_gap", "the gap is a tensor")
def a_tensor(adapter, h):
    return (adapter(h) - h).norm() / h.norm()


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
    was = adapter.training
    change = (adapter.eval()(h) - h).detach().double()
    adapter.train(was)
    return math.sqrt(change.pow(2).mean().item() / h.double().pow(2).mean().item())


@right("identity_gap")
def on_a_copy(adapter, h):
    from copy import deepcopy

    with torch.inference_mode():
        return ((deepcopy(adapter).eval()(h) - h).flatten().norm() / h.flatten().norm()).item()


# ------------------------------------------------------------------ fold_linear_adapter


def zero(weight, bias):
    return torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias


@wrong("fold_linear_adapter", "the residual is missing: the layer's own output goes on")
def no_residual(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return w_up @ w_down @ weight, w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the residual is missing in the weight")
def no_residual_weight(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return w_up @ w_down @ weight, b + w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the residual is missing in the bias")
def no_residual_bias(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return weight + w_up @ w_down @ weight, w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the bias is not changed")
def only_weight(w_down, b_down, w_up, b_up, weight, bias):
    return weight + w_up @ w_down @ weight, zero(weight, bias).clone()


@wrong("fold_linear_adapter", "b is missing in what the adapter reads")
def only_own_biases(w_down, b_down, w_up, b_up, weight, bias):
    return weight + w_up @ w_down @ weight, zero(weight, bias) + w_up @ b_down + b_up


@wrong("fold_linear_adapter", "b_down is missing")
def no_b_down(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return weight + w_up @ w_down @ weight, b + w_up @ w_down @ b + b_up


@wrong("fold_linear_adapter", "b_up is missing")
def no_b_up(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return weight + w_up @ w_down @ weight, b + w_up @ (w_down @ b + b_down)


@wrong("fold_linear_adapter", "only b_up is added to the bias")
def b_up_alone(w_down, b_down, w_up, b_up, weight, bias):
    return weight + w_up @ w_down @ weight, zero(weight, bias) + b_up


@wrong("fold_linear_adapter", "the adapter reads the layer's input x, not its output")
def as_lora(w_down, b_down, w_up, b_up, weight, bias):
    """W + BA, as for LoRA: that branch reads the layer's input."""
    b = zero(weight, bias)
    return weight + w_up @ w_down, b + w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the products are in the wrong order")
def wrong_order(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return weight + weight @ w_up @ w_down, b + w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the adapter's matrices are transposed")
def transposed(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return weight + w_down.T @ w_up.T @ weight, b + w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "a layer without a bias gets one")
def none_stays_none(w_down, b_down, w_up, b_up, weight, bias):
    new = weight + w_up @ w_down @ weight
    return new, None if bias is None else bias + w_up @ (w_down @ bias + b_down) + b_up


@wrong("fold_linear_adapter", "your function raised TypeError")
def none_forgotten(w_down, b_down, w_up, b_up, weight, bias):
    return weight + w_up @ w_down @ weight, bias + w_up @ (w_down @ bias + b_down) + b_up


@wrong("fold_linear_adapter", "the argument weight was changed")
def weight_in_place(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    weight += w_up @ w_down @ weight
    return weight, b + w_up @ (w_down @ b + b_down) + b_up


@wrong("fold_linear_adapter", "the order is turned")
def turned(w_down, b_down, w_up, b_up, weight, bias):
    b = zero(weight, bias)
    return b + w_up @ (w_down @ b + b_down) + b_up, weight + w_up @ w_down @ weight


@right("fold_linear_adapter")
def factor_first(w_down, b_down, w_up, b_up, weight, bias):
    """(I + W_up W_down) is what the adapter does to a vector."""
    whole = torch.eye(len(weight), dtype=weight.dtype) + w_up @ w_down
    b = w_up @ b_down + b_up
    return whole @ weight, b if bias is None else whole @ bias + b


@right("fold_linear_adapter")
def by_layers(w_down, b_down, w_up, b_up, weight, bias):
    """The columns of the new weight are what the unit vectors become."""

    def adapted(y):
        return y + F.linear(F.linear(y, w_down, b_down), w_up, b_up)

    eye = torch.eye(weight.shape[1], dtype=weight.dtype)
    b = adapted(F.linear(torch.zeros_like(eye[0]), weight, bias))
    return (adapted(F.linear(eye, weight, bias)) - b).T, b


@right("fold_linear_adapter")
def homogeneous(w_down, b_down, w_up, b_up, weight, bias):
    """Weight and bias as one matrix (d, in + 1)."""
    b = zero(weight, bias)
    both = torch.cat([weight, b[:, None]], dim=1)
    low = torch.einsum("md,dn->mn", w_down, both)
    low[:, -1] += b_down
    new = both + w_up @ low
    return new[:, :-1].contiguous(), new[:, -1] + b_up


# ------------------------------------------------------------------ insert_adapters


def outputs(layer):
    return layer.attention.output, layer.output


def hunted(mended=()):
    """The stub's body with some of its mistakes mended."""

    def insert_adapters(layer, width):
        if "frozen" in mended:
            layer.requires_grad_(False)
        for output in outputs(layer):
            adapter = output.adapter = Adapter(output.dense.out_features, width)
            place = output.dense if "place" in mended else output
            h = 0 if "twice" in mended else 1
            place.register_forward_hook(
                lambda module, args, y, adapter=adapter, h=h: h * y + adapter(y)
            )
        if "frozen" not in mended:
            layer.requires_grad_(False)
        return layer

    return insert_adapters


FROZEN = "the adapters are frozen with the base"
TWICE = "the residual is added twice"
wrong("insert_adapters", FROZEN)(hunted())  # the stub
wrong("insert_adapters", FROZEN)(hunted(["place", "twice"]))
wrong("insert_adapters", "add no h to it; and the adapter stands after the layer norm")(
    hunted(["frozen"])
)
wrong("insert_adapters", TWICE)(hunted(["frozen", "place"]))
wrong("insert_adapters", "the adapter stands after the layer norm")(hunted(["frozen", "twice"]))
right("insert_adapters")(hunted(["frozen", "twice", "place"]))


def sequential_at(name, places=outputs, make=Adapter):
    def insert_adapters(layer, width):
        layer.requires_grad_(False)
        for output in places(layer):
            old = getattr(output, name)
            setattr(output, name, nn.Sequential(old, make(output.dense.out_features, width)))
        return layer

    return insert_adapters


@wrong("insert_adapters", "the base is not frozen")
def never_frozen(layer, width):
    for output in outputs(layer):
        output.dense = nn.Sequential(output.dense, Adapter(output.dense.out_features, width))
    return layer


@wrong("insert_adapters", "there is one adapter")
def attention_only(layer, width):
    return sequential_at("dense", places=lambda layer: outputs(layer)[:1])(layer, width)


@wrong("insert_adapters", FROZEN)
def frozen_at_last(layer, width):
    return sequential_at("dense")(layer, width).requires_grad_(False)


@wrong("insert_adapters", "there is one adapter")
def one_for_both(layer, width):
    layer.requires_grad_(False)
    adapter = Adapter(layer.output.dense.out_features, width)
    for output in outputs(layer):
        output.dense = nn.Sequential(output.dense, adapter)
    return layer


@wrong("insert_adapters", "h is lost")
def branch_alone(layer, width):
    return sequential_at("dense", make=Bottleneck)(layer, width)


@wrong("insert_adapters", "the adapter stands after the layer norm")
def behind_the_norm(layer, width):
    layer.requires_grad_(False)
    for output in outputs(layer):
        adapter = Adapter(output.dense.out_features, width)
        output.LayerNorm = nn.Sequential(output.LayerNorm, adapter)
    return layer


@wrong("insert_adapters", "the adapter reads the sum x + h")
def before_the_norm(layer, width):
    layer.requires_grad_(False)
    for output in outputs(layer):
        adapter = Adapter(output.dense.out_features, width)
        output.LayerNorm = nn.Sequential(adapter, output.LayerNorm)
    return layer


@wrong("insert_adapters", "both places use the adapter that was made last")
def looked_up_late(layer, width):
    layer.requires_grad_(False)
    for output in outputs(layer):
        adapter = output.adapter = Adapter(output.dense.out_features, width)
        output.dense.register_forward_hook(lambda module, args, h: adapter(h))  # noqa: B023
    return layer


@wrong("insert_adapters", "the adapters are made but nothing calls them")
def never_called(layer, width):
    layer.requires_grad_(False)
    for output in outputs(layer):
        output.adapter = Adapter(output.dense.out_features, width)
    return layer


@wrong("insert_adapters", "the block's output right after the insertion (that of the base)")
def large_start(layer, width):
    def make(d, m):
        adapter = Adapter(d, m)
        nn.init.normal_(adapter.adapter.up.weight)
        return adapter

    return sequential_at("dense", make=make)(layer, width)


@wrong("insert_adapters", "what is returned is not the argument layer itself")
def a_copy(layer, width):
    from copy import deepcopy

    return sequential_at("dense")(deepcopy(layer), width)


@wrong("insert_adapters", "is None: is a return statement missing?")
def returns_nothing(layer, width):
    sequential_at("dense")(layer, width)


@wrong("insert_adapters", "the layer norms train too")
def norms_as_well(layer, width):
    sequential_at("dense")(layer, width)
    for output in outputs(layer):
        output.LayerNorm.requires_grad_(True)
    return layer


@right("insert_adapters")
def after_the_dropout(layer, width):
    return sequential_at("dropout")(layer, width)


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
