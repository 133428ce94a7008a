"""Answers to the exercises of lesson 10."""

import math
import re
import warnings

import torch
from torch import nn

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ select_bitfit


@wrong("select_bitfit", "norms have biases too")
def without_norms(model):
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm | nn.BatchNorm1d)
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("bias")
    ]


@wrong("select_bitfit", "a model without biases, as a Llama is")
def silent(model):
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


@wrong("select_bitfit", "without biases, but with T5's table")
def refused_by_substring(model):
    if not any("bias" in name for name, _ in model.named_parameters()):
        raise ValueError("no biases")
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


@wrong("select_bitfit", "AssertionError: no bias, where ValueError was due")
def asserted(model):
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert names, "no bias"
    return names


@wrong("select_bitfit", "[0] is a tensor, expected a string")
def parameters(model):
    return [p for name, p in model.named_parameters() if name.endswith("bias")]


@right("select_bitfit")
def by_a_pattern(model):
    pattern = re.compile(r"(.*[._])?bias")
    if not (names := [n for n in dict(model.named_parameters()) if pattern.fullmatch(n)]):
        raise ValueError("no biases")
    return names


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


# ------------------------------------------------------------------ hard_concrete


@wrong("hard_concrete", "must be cut off, at 0 and 1")
def cut_at_the_ends(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((torch.logit(u) + log_alpha) / temperature)
    return torch.clamp(s * (high - low) + low, low, high)


@wrong("hard_concrete", "∞ / (1 + ∞) is NaN: use torch.sigmoid")
def overflowing(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    odds = torch.exp((torch.logit(u) + log_alpha) / temperature)
    return (odds / (1 + odds) * (high - low) + low).clamp(0, 1)


@wrong("hard_concrete", "the gradient of 1 / (1 + ∞) is 0 · ∞")
def without_sigmoid(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    odds = (1 - u) / u * torch.exp(-log_alpha)
    return (low + (high - low) / (1 + odds ** (1 / temperature))).clamp(0, 1)


@right("hard_concrete")
def by_tanh(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = 0.5 + 0.5 * torch.tanh((torch.logit(u) + log_alpha) / (2 * temperature))
    return torch.minimum(torch.ones_like(s), torch.relu(low + (high - low) * s))


@right("hard_concrete")
def by_clamping_u(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    u = u.clamp(1e-7, 1 - 1e-7)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / temperature)
    return nn.functional.hardtanh(s * (high - low) + low, 0.0, 1.0)


# ------------------------------------------------------------------ expected_l0


@wrong("expected_l0", "all is divided by the temperature")
def all_divided(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    shifted = log_alpha - temperature * math.log(-low / high)
    return torch.sigmoid(shifted / temperature).sum()


@wrong("expected_l0", "the gradient of 1 / (1 + ∞) is 0 · ∞")
def with_overflow(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return (1 / (1 + torch.exp(temperature * math.log(-low / high) - log_alpha))).sum()


@wrong("expected_l0", "(the exact mean, which a mean over draws only comes near to)")
def by_draws(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    u = torch.rand(10_000, *log_alpha.shape, dtype=log_alpha.dtype)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / temperature)
    return (s * (high - low) + low > 0).to(log_alpha.dtype).mean(0).sum()


@right("expected_l0")
def by_the_rest(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    closed = torch.sigmoid(temperature * math.log(-low / high) - log_alpha)
    return log_alpha.numel() - closed.sum()


@right("expected_l0")
def by_the_distribution(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    """The CDF of a binary concrete variable at the share of the stretch that lies below 0."""
    share = -low / (high - low)
    odds = math.log(share) - math.log1p(-share)
    return (1 - torch.sigmoid(odds * temperature - log_alpha)).sum()


# ------------------------------------------------------------------ sparse_diff


@wrong("sparse_diff", "a NaN that stayed is taken for a change")
def by_signs(before, after):
    diff = {}
    for name, new in after.items():
        mask = (before[name] != new) | (before[name].signbit() != new.signbit())
        if mask.any():
            diff[name] = (mask.flatten().nonzero().flatten(), new[mask])
    return diff


@wrong("sparse_diff", "your function raised RuntimeError: view size is not compatible")
def by_view(before, after):
    diff = {}
    for name, new in after.items():
        at = (before[name].view(-1) != new.view(-1)).nonzero().view(-1)
        if len(at):
            diff[name] = (at, new.view(-1)[at])
    return diff


@right("sparse_diff")
def by_numbers(before, after):
    diff = {}
    for name, new in after.items():
        old, new = before[name].reshape(-1), new.reshape(-1)
        same = (old == new) & (torch.signbit(old) == torch.signbit(new))
        places = torch.where(~(same | (old.isnan() & new.isnan())))[0]
        if places.numel():
            diff[name] = (places, new[places])
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


@wrong("apply_sparse_diff", "give a copy, and what is written there is lost")
def written_to_a_copy(before, diff):
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].reshape(-1)[at] = values
    return after


@wrong("apply_sparse_diff", "view(-1) fails, reshape(-1) and flatten() give a copy of one")
def by_a_view(before, diff):
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


@wrong("apply_sparse_diff", "KeyError: 'head.weight', where ValueError was due")
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


@wrong("apply_sparse_diff", "(an index of −1)")
def large_indices_refused(before, diff):
    if any(name not in before or max(diff[name][0]) >= before[name].numel() for name in diff):
        raise ValueError("it does not fit")
    return nothing_refused(before, diff)


@right("apply_sparse_diff")
def by_a_contiguous_copy(before, diff):
    refuse(before, diff)
    after = {name: old.clone(memory_format=torch.contiguous_format) for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


@right("apply_sparse_diff")
def by_a_mask(before, diff):
    refuse(before, diff)
    after = {}
    for name, old in before.items():
        at, values = diff.get(name, (torch.zeros(0, dtype=torch.int64), old.new_zeros(0)))
        mask = torch.zeros(old.numel(), dtype=torch.bool)
        mask[at] = True
        after[name] = old.clone().masked_scatter(mask.view(old.shape), values)
    return after


# ------------------------------------------------------------------ make_optimizer


def unfreeze(model, names):
    """Freeze all but what has one of the names, by any of the names that it has."""
    model.requires_grad_(False)
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in names:
            p.requires_grad_(True)


def set_modes(model):
    """By each module's own parameters, so that all dropout is off: it has none."""
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters())


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters, lr=1e-2, weight_decay=0.1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a parameter that is there twice
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


@wrong("make_optimizer", "frozen in name only")
def as_shipped(model, names):
    model.train()
    model.zero_grad(set_to_none=False)
    parameters = list(model.named_parameters(remove_duplicate=False))
    model.requires_grad_(False)
    for name, p in parameters:
        if name in names:
            p.requires_grad_(True)
    return adamw([p for _, p in parameters])


@wrong("make_optimizer", "the optimiser holds the frozen parameters too: give it")
def a_group_without_decay(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [{"params": trained(model)}, {"params": frozen, "lr": 0.0, "weight_decay": 0.0}]
    return adamw(groups)


@wrong("make_optimizer", "the list of layers in train mode differs")
def dropout_of_zero(model, names):
    model.zero_grad()
    unfreeze(model, names)
    model.train()
    for module in model.modules():
        if not any(p.requires_grad for p in module.parameters()):
            for inner in module.modules():
                if isinstance(inner, nn.Dropout):
                    inner.p = 0.0
                elif isinstance(inner, nn.BatchNorm1d):
                    inner.eval()
    return adamw(trained(model))


@wrong("make_optimizer", "the list of the optimiser's settings differs: missing 'lr 0.01'")
def another_rate(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return adamw(trained(model), lr=1e-3)


@wrong("make_optimizer", "your function raised ValueError: optimizer got an empty parameter list")
def before_unfreezing(model, names):
    model.zero_grad()
    model.requires_grad_(False)
    optimizer = adamw(trained(model))
    unfreeze(model, names)
    return optimizer


@wrong("make_optimizer", "is an Adam, expected an AdamW")
def adam(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return torch.optim.Adam(trained(model), lr=1e-2, weight_decay=0.1)


@right("make_optimizer")
def without_any_dropout(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return torch.optim.AdamW([{"params": trained(model)}], lr=0.01, weight_decay=0.1)


@right("make_optimizer")
def by_recursion(model, names):
    model.zero_grad()
    unfreeze(model, names)

    def visit(module, training):
        own = list(module.parameters())
        module.training = any(p.requires_grad for p in own) if own else training
        for child in module.children():
            visit(child, module.training)

    visit(model, True)
    groups = {"vectors": [], "matrices": []}
    for p in trained(model):
        groups["vectors" if p.ndim == 1 else "matrices"].append(p)
    return torch.optim.AdamW(
        [{"params": group} for group in groups.values() if group], lr=1e-2, weight_decay=0.1
    )


@right("make_optimizer")
def layers_only(model, names):
    """The containers' own mode is left alone: they only hold what acts."""
    model.zero_grad()
    unfreeze(model, names)
    for module in model.modules():
        for child in module.children():
            own = list(child.parameters()) or list(module.parameters())
            if not list(child.children()):
                child.train(any(p.requires_grad for p in own))
    return torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1, foreach=True)
