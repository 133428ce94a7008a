"""Answers to the exercises of lesson 10."""

import math

import torch
from torch import nn

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ select_bitfit


@wrong("select_bitfit", "without biases, but with T5's table")
def refused_by_substring(model):
    if not any("bias" in name for name, _ in model.named_parameters()):
        raise ValueError("no biases")
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


def chosen(is_bias):
    """The names whose last part is one of a bias, or an error."""

    def answer(model):
        names = [n for n, p in model.named_parameters() if is_bias(n.rpartition(".")[2], p)]
        if not names:
            raise ValueError("no biases")
        return names

    return answer


@right("select_bitfit")
def by_a_walk(model):
    found = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and name.split("_")[-1] == "bias":
                found.setdefault(p, ".".join(filter(None, (path, name))))
    if found:
        return tuple(found.values())
    raise ValueError("nothing would train")


# ------------------------------------------------------------------ sparse_linear


@right("sparse_linear")
def by_a_sparse_tensor(x, weight, bias, indices, values):
    at = torch.stack([indices // weight.shape[1], indices % weight.shape[1]])
    S = torch.sparse_coo_tensor(at, values, weight.shape, check_invariants=True)
    return (x @ (weight.T + S.to_dense().T)) + bias


@right("sparse_linear")
def entry_by_entry(x, weight, bias, indices, values):
    y = list(nn.functional.linear(x.double(), weight.double(), bias.double()).unbind(-1))
    for p, v in zip(indices.tolist(), values, strict=True):
        row, column = divmod(p, weight.shape[1])
        y[row] = y[row] + x[..., column].double() * v
    return torch.stack(y, -1)


# ------------------------------------------------------------------ hard_concrete


@right("hard_concrete")
def by_clamping_u(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    u = u.clamp(1e-7, 1 - 1e-7)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / temperature)
    return nn.functional.hardtanh(s * (high - low) + low, 0.0, 1.0)


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


# ------------------------------------------------------------------ sparse_diff


@wrong("sparse_diff", "your function raised RuntimeError: view size is not compatible")
def by_view(before, after):
    diff = {}
    for name, new in after.items():
        at = (before[name].view(-1) != new.view(-1)).nonzero().view(-1)
        if len(at):
            diff[name] = (at, new.view(-1)[at])
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


# ------------------------------------------------------------------ apply_sparse_diff


def refuse(before, diff):
    """Refuse what does not fit: shared by the answers below."""
    if unknown := set(diff) - set(before):
        raise ValueError(f"unknown: {unknown}")
    if any(not 0 <= i < before[name].numel() for name in diff for i in diff[name][0].tolist()):
        raise ValueError("out of range")


@wrong("apply_sparse_diff", "written into reshape(-1) goes into a copy")
def by_a_view(before, diff):
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


@wrong("apply_sparse_diff", "KeyError: 'head.weight', where ValueError was expected")
def nothing_refused(before, diff):
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        flat = after[name].flatten()
        flat[at] = values
        after[name] = flat.view(before[name].shape)
    return after


@wrong("apply_sparse_diff", "IndexError: index 42 is out of bounds")
def names_refused(before, diff):
    if not set(diff) <= set(before):
        raise ValueError("unknown names")
    return nothing_refused(before, diff)


@wrong("apply_sparse_diff", "IndexError: index 42 is out of bounds")
def first_refused(before, diff):
    for name, (at, _) in diff.items():
        if name not in before or not 0 <= at[0] < before[name].numel():
            raise ValueError("out of range")
    return nothing_refused(before, diff)


@wrong("apply_sparse_diff", "an index of −1")
def last_refused(before, diff):
    for name, (at, _) in diff.items():
        if name not in before or not 0 <= at[-1] < before[name].numel():
            raise ValueError("out of range")
    return nothing_refused(before, diff)


@right("apply_sparse_diff")
def by_a_contiguous_copy(before, diff):
    refuse(before, diff)
    after = {name: old.clone(memory_format=torch.contiguous_format) for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


# ------------------------------------------------------------------ make_optimizer


def unfreeze(model, names):
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@right("make_optimizer")
def a_group_each(model, names):
    model.zero_grad()
    unfreeze(model, names)
    return adamw([{"params": [p]} for p in trained(model)])


@right("make_optimizer")
def by_what_is_named(model, names):
    """The mode of the layers is left open, and may be set."""
    chosen = [model.get_parameter(name) for name in names]
    model.eval().requires_grad_(False).zero_grad()
    for p in chosen:
        p.requires_grad = True
    return torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1, foreach=True)
