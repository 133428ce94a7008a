"""Answers to the exercises of lesson 10."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ worth_in_entries


@right("worth_in_entries")
def by_numpy(curve, fall):
    falls = np.array(list(curve.values()))
    found = np.interp(fall, falls, np.log2(list(curve)), left=np.nan, right=np.nan)
    return None if np.isnan(found) else 2**found


@right("worth_in_entries")
def by_bisection(curve, fall):
    """As a tensor, between the neighbours that a search finds."""
    counts, falls = torch.tensor(list(curve)).log(), torch.tensor(list(curve.values())).double()
    at = int(torch.searchsorted(falls, fall))
    if at == len(falls) or (at == 0 and fall < falls[0]):
        return None
    at = max(at, 1)
    return torch.lerp(
        counts[at - 1].double(),
        counts[at].double(),
        (fall - falls[at - 1]) / (falls[at] - falls[at - 1]),
    ).exp()


@right("worth_in_entries")
def by_halving(curve, fall):
    def read(log_k):
        return np.interp(log_k, [math.log(k) for k in curve], list(curve.values()))

    low, high = math.log(min(curve)), math.log(max(curve))
    if not read(low) <= fall <= read(high):
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if read(middle) < fall else (low, middle)
    return math.exp(high)


@right("worth_in_entries")
def in_whole_entries(curve, fall):
    found = by_numpy(curve, fall)
    return None if found is None else round(found)


@wrong("worth_in_entries", "outside the measured curve the end of the curve is returned")
def by_interp_alone(curve, fall):
    return np.exp(np.interp(fall, list(curve.values()), np.log(list(curve))))


@wrong("worth_in_entries", "expected 1000")
def by_the_wrong_axis(curve, fall):
    """A straight line against the square root."""
    return by_numpy({math.exp(k**0.5): y for k, y in curve.items()}, fall)


@wrong("worth_in_entries", "this is the previous measured point")
def the_last_that_falls_less(curve, fall):
    if not min(curve.values()) <= fall <= max(curve.values()):
        return None
    return max(k for k, y in curve.items() if y <= fall)


@wrong("worth_in_entries", "the share of the way is counted from the wrong neighbour")
def with_weights_swapped(curve, fall):
    for (k0, y0), (k1, y1) in pairwise(curve.items()):
        if y0 <= fall <= y1:
            share = (y1 - fall) / (y1 - y0)
            return k0 ** (1 - share) * k1**share
    return None


@wrong("worth_in_entries", "a point of the curve is left out")
def strictly_between(curve, fall):
    for (k0, y0), (k1, y1) in pairwise(curve.items()):
        if y0 < fall < y1:
            return k0 * (k1 / k0) ** ((fall - y0) / (y1 - y0))
    return None


@wrong("worth_in_entries", "KeyError: 0.5")
def looked_up(curve, fall):
    return {y: k for k, y in curve.items()}[fall]


@wrong("worth_in_entries", "the number of entries is")
def by_one_line(curve, fall):
    """A line through all points."""
    slope, start = np.polyfit(np.log(list(curve)), list(curve.values()), 1)
    return math.exp((fall - start) / slope)


@wrong("worth_in_entries", "expected None")
def nan_outside(curve, fall):
    found = by_numpy(curve, fall)
    return math.nan if found is None else found


# ------------------------------------------------------------------ sparse_linear


@right("sparse_linear")
def by_a_sparse_tensor(x, weight, positions, values):
    at = torch.stack([positions // weight.shape[1], positions % weight.shape[1]])
    S = torch.sparse_coo_tensor(at, values, weight.shape, check_invariants=True)
    return x @ (weight.T + S.to_dense().T)


@right("sparse_linear")
def entry_by_entry(x, weight, positions, values):
    y = list(nn.functional.linear(x.double(), weight.double()).unbind(-1))
    for p, v in zip(positions.tolist(), values, strict=True):
        row, column = divmod(p, weight.shape[1])
        y[row] = y[row] + x[..., column].double() * v
    return torch.stack(y, -1)


@right("sparse_linear")
def as_two_layers(x, weight, positions, values):
    """W x and S x are added, and S is made in place, out of zeros."""
    S = torch.zeros_like(weight)
    S.view(-1)[positions] = values
    return torch.einsum("...i,oi->...o", x, weight) + torch.einsum("...i,oi->...o", x, S)


@right("sparse_linear")
def on_a_copy(x, weight, positions, values):
    changed = weight.clone()
    changed[positions // weight.shape[1], positions % weight.shape[1]] += values
    return nn.functional.linear(x, changed)


@wrong("sparse_linear", "the argument weight was changed")
def into_the_weight(x, weight, positions, values):
    with torch.no_grad():
        weight.view(-1)[positions] += values
    return x @ weight.T


@wrong("sparse_linear", "the values are cut off from the graph and learn nothing")
def through_numpy(x, weight, positions, values):
    S = np.zeros(weight.numel(), dtype=np.float32)
    S[positions.numpy()] = values.detach().numpy()
    return x @ (weight + torch.from_numpy(S).view(weight.shape)).T


# ------------------------------------------------------------------ make_optimizer


def unfreeze(model, names):
    chosen = [model.get_parameter(name) for name in names]
    for p in model.parameters():
        p.requires_grad_(any(p is one for one in chosen))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@answers.hunt("make_optimizer")
def optimizer_with(bugs):
    shrinks, endings, tied = (
        any(words in bug for bug in bugs) for words in ("weight decay", "ends in", "first name")
    )

    def make_optimizer(model, names):
        every = model.named_parameters(remove_duplicate=tied)
        found = {id(p) for n, p in every if (n.endswith(tuple(names)) if endings else n in names)}
        for p in model.parameters():
            p.requires_grad_(id(p) in found)
        model.zero_grad(set_to_none=not shrinks)
        return adamw(model.parameters())

    return make_optimizer


@right("make_optimizer")
def a_group_each(model, names):
    model.zero_grad()
    unfreeze(model, names)
    return adamw([{"params": [p]} for p in trained(model)])


@right("make_optimizer")
def by_what_is_named(model, names):
    """The mode of the layers is left open, and may be set."""
    chosen = list({model.get_parameter(name): name for name in names})
    model.eval().requires_grad_(False).zero_grad()
    for p in chosen:
        p.requires_grad = True
    return torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1, foreach=True)


@right("make_optimizer")
def holding_all(model, names):
    """Without a gradient AdamW passes a parameter over."""
    for p in model.parameters():
        p.requires_grad, p.grad = False, None
    for name in names:
        model.get_parameter(name).requires_grad = True
    return adamw(model.parameters())


@wrong("make_optimizer", "optimizer got an empty parameter list")
def by_the_first_name(model, names):
    model.zero_grad()
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)


@wrong("make_optimizer", "a part of a name is enough to match")
def by_substrings(model, names):
    model.zero_grad()
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(p.requires_grad and any(n in name for n in names))
    return adamw(trained(model))


@wrong("make_optimizer", "a second name undoes what the first one did")
def in_one_loop(model, names):
    model.zero_grad()
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name in names)
    return adamw(model.parameters())


@wrong("make_optimizer", "the list of the optimiser's settings differs")
def without_decay(model, names):
    model.zero_grad()
    unfreeze(model, names)
    return torch.optim.AdamW(trained(model), lr=1e-2)


@wrong("make_optimizer", "0 of 3 faults are mended")
def names_alone(model, names):
    return [p for name, p in model.named_parameters() if name in names]


# ------------------------------------------------------------------ sparse_diff


@wrong("sparse_diff", "the keys of the result differ")
def every_tensor(before, after):
    return {name: (torch.arange(t.numel()), t.flatten()) for name, t in after.items()}


@right("sparse_diff")
def by_signs(before, after):
    """By numbers, where the sign of a zero and a NaN that stays are looked at as well."""
    diff = {}
    for name, new in after.items():
        a, b = before[name].reshape(-1), new.reshape(-1)
        same = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
        (at,) = torch.where(~same)
        if at.numel():
            diff[name] = (at, b[at].clone())
    return diff


@right("sparse_diff")
def by_bytes(before, after):
    diff = {}
    for name, new in after.items():
        rows = [t.flatten()[:, None].view(torch.uint8).numpy() for t in (before[name], new)]
        at = np.flatnonzero((rows[0] != rows[1]).any(1))
        if len(at):
            diff[name] = torch.from_numpy(at), new.flatten()[torch.from_numpy(at)]
    return diff


@right("sparse_diff")
def one_by_one(before, after):
    diff = {}
    for name, new in after.items():
        pairs = zip(before[name].flatten().double(), new.flatten().double(), strict=True)
        at = [
            i
            for i, (a, b) in enumerate(pairs)
            if a.numpy().tobytes() != b.numpy().tobytes() and not (a.isnan() and b.isnan())
        ]
        if at:
            diff[name] = [torch.tensor(at), torch.stack([new.flatten()[i] for i in at])]
    return diff


# ------------------------------------------------------------------ expected_l0


@wrong("expected_l0", "(exact: no mean of draws)")
def by_draws(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    u = torch.rand(10_000, *log_alpha.shape, dtype=log_alpha.dtype)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / temperature)
    return (s * (high - low) + low > 0).to(log_alpha.dtype).mean(0).sum()


@right("expected_l0")
def by_the_rest(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    closed = torch.sigmoid(temperature * math.log(-low / high) - log_alpha)
    return log_alpha.numel() - closed.sum()
