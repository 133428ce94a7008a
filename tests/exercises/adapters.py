"""Answers to the exercises of lesson 06."""

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


# ------------------------------------------------------------------ ResidualAdapter


@right("ResidualAdapter")
class OfParameters(nn.Module):
    """Layers that start otherwise: W_down narrow, b_down at one."""

    def __init__(self, d, m, f):
        super().__init__()
        self.down, self.up, self.f = nn.Linear(d, m), nn.Linear(m, d), f
        for p, value in zip(self.parameters(), (None, 1.0, 0.0, 0.0), strict=True):
            nn.init.normal_(p, std=0.02) if value is None else nn.init.constant_(p, value)

    def forward(self, h):
        low = self.f(F.linear(h, self.down.weight, self.down.bias))
        return torch.einsum("...m,dm->...d", low, self.up.weight) + (h + self.up.bias)


@right("ResidualAdapter")
class ZeroAtTheEntrance(nn.Module):
    """W_up random, and what it adds at first is taken away by its bias."""

    def __init__(self, d, m, f):
        super().__init__()
        self.down, self.up, self.act = nn.Linear(d, m), nn.Linear(m, d), f
        with torch.no_grad():
            self.down.weight.zero_()
            self.down.bias.fill_(1.0)
            self.up.bias.copy_(-self.up.weight @ f(self.down.bias))

    def forward(self, h):
        return self.up(self.act(self.down(h))) + h


@right("ResidualAdapter")
class InARow(nn.Module):
    """The two layers as parts of an nn.Sequential, too."""

    def __init__(self, d, m, f):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        self.net = nn.Sequential(self.down, Function(f), self.up)
        self.up.weight.data.mul_(0)
        self.up.bias.data.mul_(0)

    def forward(self, h):
        return self.net(h).add_(h)


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.forward = f


@wrong("ResidualAdapter", "has been modified by an inplace operation")
class InPlace(OfParameters):
    def forward(self, h):
        h += self.up(self.f(self.down(h)))
        return h


@wrong("ResidualAdapter", "the list of trainable parameters differs: missing 'down.bias'")
class OtherNames(nn.Module):
    def __init__(self, d, m, f):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, m), nn.Linear(m, d))

    def forward(self, h):
        return h


@wrong("ResidualAdapter", "the list of their shapes differs")
class SquareLayers(nn.Module):
    def __init__(self, d, m, f):
        super().__init__()
        self.down, self.up = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, h):
        return h


# ------------------------------------------------------------------ identify


@right("identify")
def by_a_hook(sublayer, norm, adapter):
    """The adapter's output is replaced, and its input caught."""
    seen, added = [], torch.randn(norm.normalized_shape[0])
    x, h = torch.randn_like(added), 2 * torch.randn_like(added)
    handle = adapter.register_forward_hook(lambda module, args, out: seen.append(args[0]) or added)
    y = sublayer(x, h)
    handle.remove()
    if not torch.allclose(y, norm(x + h + added), atol=1e-4):
        return None
    reads = {"houlsby": h, "parallel": x, "pfeiffer": norm(x + h)}
    return next((kind for kind, t in reads.items() if torch.allclose(seen[0], t, atol=1e-4)), None)


@right("identify")
def by_differences(sublayer, norm, adapter):
    """Called before and after W_up is filled; the whole adapter is put back."""
    kept = deepcopy(adapter.state_dict())
    x, h = torch.randn(3, 4, len(norm.bias)), torch.randn(3, 4, len(norm.bias))
    first = sublayer(x, h)
    nn.init.normal_(adapter.up.weight, std=0.5)
    second, found = sublayer(x, h), []
    for kind, t in (("houlsby", h), ("pfeiffer", norm(x + h)), ("parallel", x)):
        if ((second - norm(x + h + adapter(t))).norm() / first.norm()).item() < 1e-4:
            found.append(kind)
    adapter.load_state_dict(kept)
    return found[0] if found else None


@right("identify")
def by_a_copy_of_its_own(sublayer, norm, adapter):
    """The adapter itself is made to read nothing but its bias, and then one input."""
    d, saved = len(norm.weight), {n: p.clone() for n, p in adapter.named_parameters()}
    x, h = torch.randn(d), torch.randn(d)
    with torch.no_grad():
        adapter.up.weight.copy_(torch.randn(d, adapter.up.weight.shape[1]))
        y, twin = sublayer(x, h), deepcopy(adapter)
        for name, p in adapter.named_parameters():
            p.copy_(saved[name])
        t = norm(h + x)
        said = [torch.dist(y, norm(h + x + twin(u))).item() < 1e-4 for u in (h, t, x)]
    return dict(zip(said, ("houlsby", "pfeiffer", "parallel"), strict=True)).get(True)


@right("identify")
def by_silence(sublayer, norm, adapter):
    """Inputs of zeros, on which an adapter without biases is silent."""
    d, kept = len(norm.weight), deepcopy(adapter.state_dict())
    v, nothing = torch.randn(3, d), torch.zeros(3, d)
    with torch.no_grad():
        adapter.up.weight.normal_()
        adapter.up.bias.zero_()
        adapter.down.bias.zero_()
        of_x, of_h, a = sublayer(v, nothing), sublayer(nothing, v), adapter(norm(v))
        silent = norm(v), norm(v + adapter(v)), norm(v + a)
    adapter.load_state_dict(kept)
    for kind, (x_alone, h_alone) in {
        "houlsby": (0, 1),
        "parallel": (1, 0),
        "pfeiffer": (2, 2),
    }.items():
        agree = torch.dist(of_x, silent[x_alone]), torch.dist(of_h, silent[h_alone])
        if max(agree) < 1e-4:
            return kind
    return None


@wrong("identify", "W_up was zero when the sublayer was called")
def with_a_bias(sublayer, norm, adapter):
    """Another bias is the same for whatever the adapter reads."""
    kept, (x, h) = adapter.up.bias.detach().clone(), torch.randn(2, len(norm.weight))
    with torch.no_grad():
        adapter.up.bias.normal_()
        y, found = sublayer(x, h), None
        for kind, t in (("houlsby", h), ("pfeiffer", norm(x + h)), ("parallel", x)):
            found = kind if torch.allclose(y, norm(x + h + adapter(t)), atol=1e-4) else found
        adapter.up.bias.copy_(kept)
    return found


@wrong("identify", "the adapter or the norm is not as it was")
def left_behind(sublayer, norm, adapter):
    nn.init.normal_(adapter.up.weight)
    return "houlsby"


@wrong("identify", "which need not be zero")
def reset_to_zero(sublayer, norm, adapter):
    kind = by_differences(sublayer, norm, adapter)
    nn.init.zeros_(adapter.up.weight)
    return kind


@wrong("identify", "did not call the sublayer")
def guessed(sublayer, norm, adapter):
    return "pfeiffer"


@wrong("identify", "'Houlsby' is neither None nor one of 'houlsby', 'pfeiffer', 'parallel'")
def with_a_capital(sublayer, norm, adapter):
    return (by_differences(sublayer, norm, adapter) or "none").capitalize()


@wrong("identify", "Look also at where its output goes")
def by_what_it_reads_alone(sublayer, norm, adapter):
    """A hook sees the input, which Pfeiffer's kind and an adapter after the last norm share."""
    seen, (x, h) = [], torch.randn(2, len(norm.weight))
    handle = adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sublayer(x, h)
    handle.remove()
    reads = {"houlsby": h, "parallel": x, "pfeiffer": norm(x + h)}
    return next((kind for kind, t in reads.items() if torch.allclose(seen[0], t, atol=1e-4)), None)


@wrong("identify", "say within 1e-4")
def without_a_tolerance(sublayer, norm, adapter):
    kept, (x, h) = adapter.up.weight.detach().clone(), torch.randn(2, len(norm.weight))
    with torch.no_grad():
        adapter.up.weight.normal_()
        y, found = sublayer(x, h), None
        for kind, t in (("houlsby", h), ("pfeiffer", norm(x + h)), ("parallel", x)):
            found = kind if torch.equal(y, norm(adapter(t) + h + x)) else found
        adapter.up.weight.copy_(kept)
    return found


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


# ------------------------------------------------------------------ merge_parallel


@right("merge_parallel")
def units_in_front(first, second, adapter, scale):
    """The new units first, detached, in float64."""
    pairs = (adapter.down, first), (adapter.up, second)
    (w1, b1), (w2, _) = [
        (torch.cat([a.weight, b.weight], dim=dim), torch.cat([a.bias, b.bias]))
        for dim, (a, b) in enumerate(pairs)
    ]
    w2 = w2.detach().double()
    w2[:, : len(adapter.down.bias)] *= scale
    return w1.detach(), b1.data, w2.float(), torch.add(second.bias, adapter.up.bias, alpha=scale)


@right("merge_parallel")
def built_as_layers(first, second, adapter, scale):
    m, (d_ff, d) = adapter.down.out_features, first.weight.shape
    wide, back = nn.Linear(d, d_ff + m), nn.Linear(d_ff + m, d)
    with torch.no_grad():
        wide.weight[:d_ff], wide.weight[d_ff:] = first.weight, adapter.down.weight
        wide.bias[:d_ff], wide.bias[d_ff:] = first.bias, adapter.down.bias
        back.weight[:, :d_ff], back.weight[:, d_ff:] = second.weight, adapter.up.weight * scale
        back.bias.copy_(second.bias + adapter.up.bias * scale)
    return [wide.weight, wide.bias, back.weight, back.bias]


@wrong("merge_parallel", "your function raised RuntimeError: Sizes of tensors must match")
def below_each_other(first, second, adapter, scale):
    w2 = torch.cat([second.weight, scale * adapter.up.weight])
    w1 = torch.cat([first.weight, adapter.down.weight])
    return w1, torch.cat([first.bias, adapter.down.bias]), w2, second.bias


@wrong("merge_parallel", "the result is a module (Sequential), expected a tuple of 4")
def one_module(first, second, adapter, scale):
    return nn.Sequential(first, nn.GELU(), second)


# ------------------------------------------------------------------ insert_adapters


def outputs(layer):
    return layer.attention.output, layer.output


@answers.hunt("insert_adapters")
def inserted_with(bugs):
    frozen, twice, after = (
        any(words in bug for bug in bugs)
        for words in ("frozen with the base", "added twice", "after the layer norm")
    )

    def insert_adapters(layer, width):
        layer.requires_grad_(False)
        for output in outputs(layer):
            output.adapter = Adapter(output.dense.out_features, width)

            def adapted(module, args, h, adapter=output.adapter):
                return h + adapter(h) if twice else adapter(h)

            (output if after else output.dense).register_forward_hook(adapted)
        return layer.requires_grad_(False) if frozen else layer

    return insert_adapters


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
