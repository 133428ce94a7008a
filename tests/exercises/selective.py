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


def refused(names):
    if not names:
        raise ValueError("no biases")
    return names


@wrong("select_bitfit", "that bias stands somewhere in a name says nothing")
def anywhere(model):
    return refused([name for name, _ in model.named_parameters() if "bias" in name])


@wrong("select_bitfit", "a module that is called bias is none")
def any_part(model):
    return refused([name for name, _ in model.named_parameters() if "bias" in name.split(".")])


@wrong("select_bitfit", "in_proj_bias is a bias too")
def exactly_bias(model):
    return refused([n for n, _ in model.named_parameters() if n.split(".")[-1] == "bias"])


@wrong("select_bitfit", "has no dot before its name")
def with_a_dot(model):
    return refused([n for n, _ in model.named_parameters() if re.search(r"[._]bias$", n)])


@wrong("select_bitfit", "norms have biases too")
def without_norms(model):
    return refused(
        [
            f"{path}.{name}".lstrip(".")
            for path, module in model.named_modules()
            if not isinstance(module, nn.LayerNorm | nn.BatchNorm1d)
            for name, _ in module.named_parameters(recurse=False)
            if name.endswith("bias")
        ]
    )


@wrong("select_bitfit", "only the biases of nn.Linear are looked for")
def of_linear_layers(model):
    return refused(
        [
            (f"{path}." if path else "") + "bias"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.bias is not None
        ]
    )


@wrong("select_bitfit", "a vector is no bias by its shape")
def vectors(model):
    return refused([name for name, p in model.named_parameters() if len(p.shape) == 1])


@wrong("select_bitfit", "a buffer is no parameter")
def from_the_state(model):
    return refused([name for name in model.state_dict() if name.endswith("bias")])


@wrong("select_bitfit", "a tied bias is listed under each of its names")
def under_all_names(model):
    every = model.named_parameters(remove_duplicate=False)
    return refused([name for name, _ in every if name.endswith("bias")])


@wrong("select_bitfit", "requires_grad says nothing")
def what_trains(model):
    named = model.named_parameters()
    return refused([name for name, p in named if p.requires_grad and name.endswith("bias")])


@wrong("select_bitfit", "keep the model's order")
def alphabetical(model):
    return refused(sorted(name for name, _ in model.named_parameters() if name.endswith("bias")))


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


@wrong("select_bitfit", "the message does not name 'bias'")
def nameless(model):
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    if not names:
        raise ValueError("nothing to train")
    return names


@wrong("select_bitfit", "the argument model was changed: leave it as it was")
def training_them(model):
    model.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if name.endswith("bias")]
    for _, p in named:
        p.requires_grad_(True)
    return refused([name for name, _ in named])


@wrong("select_bitfit", "is a set, expected a list")
def a_set(model):
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


@wrong("select_bitfit", "[0] is a tensor, expected a string")
def parameters(model):
    return [p for name, p in model.named_parameters() if name.endswith("bias")]


@right("select_bitfit")
def by_a_pattern(model):
    pattern = re.compile(r"(.*[._])?bias")
    return refused([name for name in dict(model.named_parameters()) if pattern.fullmatch(name)])


@right("select_bitfit")
def by_the_end(model):
    return refused([name for name, _ in model.named_parameters() if name.endswith("bias")])


@right("select_bitfit")
def by_a_walk(model):
    found = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and name.split("_")[-1] == "bias":
                found.setdefault(p, ".".join(filter(None, (path, name))))
    return refused(list(found.values()))


@right("select_bitfit")
def as_a_tuple(model):
    every, names, seen = model.named_parameters(remove_duplicate=False), [], set()
    for name, p in every:
        if name.rsplit(".")[-1].endswith("bias") and id(p) not in seen:
            names.append(name)
        seen.add(id(p))
    return tuple(refused(names))


# ------------------------------------------------------------------ hard_concrete


def logistic(u):
    return torch.log(u) - torch.log1p(-u)


@wrong("hard_concrete", "the temperature is left out")
def cold(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(log_alpha + logistic(u))
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "the sigmoid is taken twice")
def squashed_twice(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(torch.sigmoid((torch.logit(u) + log_alpha) / temperature))
    return (s * (high - low) + low).clamp(0, 1)


@wrong("hard_concrete", "only the noise is divided by the temperature")
def noise_cooled(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(log_alpha + logistic(u) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "only log alpha is divided by the temperature")
def without_brackets(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(logistic(u) + log_alpha / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "the temperature multiplies")
def heated(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((logistic(u) + log_alpha) * temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "u is added as it is")
def plain_u(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((u + log_alpha) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "log u is added alone")
def log_u(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((torch.log(u) + log_alpha) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "the noise is turned")
def turned_noise(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((torch.log((1 - u) / u) + log_alpha) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "this is Gumbel noise")
def gumbel(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((log_alpha - torch.log(-torch.log(u))) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "u is not used")
def noiseless(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.clamp(torch.sigmoid(log_alpha / temperature) * (high - low) + low, 0, 1)


@wrong("hard_concrete", "neither exp nor log of it is taken")
def exponentiated(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((logistic(u) + log_alpha.exp()) / temperature)
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "the sigmoid is missing")
def unsquashed(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = (logistic(u) + log_alpha) / temperature
    return torch.clamp(s * (high - low) + low, 0, 1)


@wrong("hard_concrete", "the gate is not stretched")
def unstretched(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid((logistic(u) + log_alpha) / temperature).clamp(0, 1)


@wrong("hard_concrete", "+ low is missing")
def not_lowered(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.clamp(torch.sigmoid((logistic(u) + log_alpha) / temperature) * (high - low), 0, 1)


@wrong("hard_concrete", "the stretch is too short")
def short(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.clamp(torch.sigmoid((logistic(u) + log_alpha) / temperature) * high + low, 0, 1)


@wrong("hard_concrete", "low and high have changed places")
def exchanged(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((logistic(u) + log_alpha) / temperature)
    return torch.lerp(torch.full_like(s, high), torch.full_like(s, low), s).clamp(0, 1)


@wrong("hard_concrete", "low is taken for −high")
def as_in_the_lesson(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((logistic(u) + log_alpha) / temperature)
    return ((2 * s - 1) * high).clamp(0, 1)


@wrong("hard_concrete", "must be cut off, at 0 and 1")
def uncut(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid((logistic(u) + log_alpha) / temperature) * (high - low) + low


@wrong("hard_concrete", "must be cut off, at 0 and 1")
def cut_at_the_ends(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid((logistic(u) + log_alpha) / temperature)
    return torch.clamp(s * (high - low) + low, low, high)


@wrong("hard_concrete", "it is cut off at 0 alone")
def relu(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return torch.relu(uncut(log_alpha, u, low, high, temperature))


@wrong("hard_concrete", "the gate is rounded")
def binary(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return (uncut(log_alpha, u, low, high, temperature) > 0.5).to(log_alpha.dtype)


@wrong("hard_concrete", "the defaults are another paper's")
def their_defaults(log_alpha, u, low=-0.1, high=1.1, temperature=2 / 3):
    return uncut(log_alpha, u, low, high, temperature).clamp(0, 1)


@wrong("hard_concrete", "the gate has wrong values")
def noise_of_its_own(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return uncut(log_alpha, torch.rand_like(log_alpha), low, high, temperature).clamp(0, 1)


@wrong("hard_concrete", "no gradient reaches log_alpha")
def detached(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return uncut(log_alpha.detach(), u, low, high, temperature).clamp(0, 1)


@wrong("hard_concrete", "the gate holds nan")
def overflowing(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    odds = torch.exp((logistic(u) + log_alpha) / temperature)
    return (odds / (1 + odds) * (high - low) + low).clamp(0, 1)


@wrong("hard_concrete", "the argument u was changed")
def in_place(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    return uncut(log_alpha, u.clamp_(1e-6, 1 - 1e-6), low, high, temperature).clamp(0, 1)


@wrong("hard_concrete", "the parameters differ")
def fewer_parameters(log_alpha, u, stretch=1.5):
    return as_in_the_lesson(log_alpha, u, -stretch, stretch)


@right("hard_concrete")
def by_a_quotient(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = ((log_alpha + torch.log(u / (1 - u))) / temperature).sigmoid()
    return torch.lerp(torch.full_like(s, low), torch.full_like(s, high), s).clamp(0.0, 1.0)


@right("hard_concrete")
def by_tanh(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    s = 0.5 + 0.5 * torch.tanh((torch.logit(u) + log_alpha) / (2 * temperature))
    return torch.minimum(torch.ones_like(s), torch.relu(low + (high - low) * s))


@right("hard_concrete")
def by_clamping_u(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    u = u.clamp(1e-7, 1 - 1e-7)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / temperature)
    return nn.functional.hardtanh(s * (high - low) + low, 0.0, 1.0)


@right("hard_concrete")
def by_the_lessons_gate(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    middle, half = (low + high) / 2, (high - low) / 2
    s = torch.sigmoid((log_alpha + torch.logit(u, eps=1e-6)) / temperature)
    return (middle + half * (2 * s - 1)).clamp(0, 1)


# ------------------------------------------------------------------ expected_l0


@wrong("expected_l0", "the shift is left out")
def as_in_the_lessons_layer(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha).sum()


@wrong("expected_l0", "the shift has the wrong sign")
def upside_down(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - temperature * math.log(high / -low)).sum()


@wrong("expected_l0", "the temperature is missing")
def without_temperature(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - math.log(-low / high)).sum()


@wrong("expected_l0", "the shift is divided by the temperature")
def divided(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - math.log(-low / high) / temperature).sum()


@wrong("expected_l0", "all is divided by the temperature")
def all_divided(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    shifted = log_alpha - temperature * math.log(-low / high)
    return torch.sigmoid(shifted / temperature).sum()


@wrong("expected_l0", "log α alone is divided by the temperature")
def alpha_divided(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha / temperature - temperature * math.log(-low / high)).sum()


@wrong("expected_l0", "is a share of the stretch")
def log_of_the_share(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    closed = -low / (high - low)
    return torch.sigmoid(log_alpha - temperature * math.log(closed)).sum()


@wrong("expected_l0", "these are the closed gates")
def closed_gates(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(temperature * math.log(-low / high) - log_alpha).sum()


@wrong("expected_l0", "fully open, z = 1")
def fully_open(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - temperature * math.log((1 - low) / (high - 1))).sum()


@wrong("expected_l0", "the sum of the gates without noise")
def sum_of_gates(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(log_alpha / temperature)
    return (s * (high - low) + low).clamp(0, 1).sum()


@wrong("expected_l0", "open without noise, and has no gradient")
def counted(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    s = torch.sigmoid(log_alpha / temperature)
    return (s * (high - low) + low > 0).to(log_alpha.dtype).sum()


@wrong("expected_l0", "has dtype int64, expected float32")
def counted_as_whole(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return (torch.sigmoid(log_alpha / temperature) * (high - low) + low > 0).sum()


@wrong("expected_l0", "the chances are averaged")
def averaged(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high)).mean()


@wrong("expected_l0", "add them up")
def each(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


@wrong("expected_l0", "expected ()")
def row_by_row(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return each(log_alpha, low, high, temperature).sum(-1)


@wrong("expected_l0", "is the float 32.1")
def a_number(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return each(log_alpha, low, high, temperature).sum().item()


@wrong("expected_l0", "no gradient reaches log_alpha")
def without_a_graph(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return each(log_alpha.data, low, high, temperature).sum()


@wrong("expected_l0", "the defaults are another paper's")
def defaults_of_the_paper(log_alpha, low=-0.1, high=1.1, temperature=2 / 3):
    return each(log_alpha, low, high, temperature).sum()


@wrong("expected_l0", "the gradient of log_alpha holds nan")
def with_overflow(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    return (1 / (1 + torch.exp(temperature * math.log(-low / high) - log_alpha))).sum()


@wrong("expected_l0", "the number of open gates has wrong values")
def by_draws(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    u = torch.rand(10_000, *log_alpha.shape, dtype=log_alpha.dtype)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / temperature)
    return (s * (high - low) + low > 0).to(log_alpha.dtype).mean(0).sum()


@right("expected_l0")
def by_two_logarithms(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    shift = temperature * (math.log(-low) - math.log(high))
    return (log_alpha - shift).sigmoid().flatten().sum(0)


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


@right("expected_l0")
def by_tensors(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    low, high = (log_alpha.new_tensor(v) for v in (low, high))
    return torch.sum(torch.sigmoid(log_alpha - temperature * torch.log(-low / high)))


# ------------------------------------------------------------------ sparse_diff


def differs(old, new):
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    return old.view(kind) != new.view(kind)


@wrong("sparse_diff", "the values are differences")
def differences(before, after):
    diff = {}
    for name, new in after.items():
        at = differs(before[name], new).flatten().nonzero().flatten()
        if len(at):
            diff[name] = (at, (new - before[name]).flatten()[at])
    return diff


@wrong("sparse_diff", "the values are the old ones")
def old_values(before, after):
    return {
        n: (at, t.flatten()[at])
        for n, t in before.items()
        if len(at := differs(t, after[n]).flatten().nonzero().flatten())
    }


@wrong("sparse_diff", "names whose tensors did not change")
def all_names(before, after):
    diff = {}
    for name, new in after.items():
        at = differs(before[name], new).flatten().nonzero().flatten()
        diff[name] = (at, new.flatten()[at])
    return diff


@wrong("sparse_diff", "every entry is in it")
def dense(before, after):
    return {
        name: (torch.arange(t.numel()), t.flatten().clone())
        for name, t in after.items()
        if not torch.equal(t, before[name])
    } | {
        name: (torch.arange(t.numel()), t.flatten().clone())
        for name, t in after.items()
        if torch.equal(t, before[name])
    }


@wrong("sparse_diff", "an index has a number for each dimension")
def by_nonzero(before, after):
    diff = {}
    for name, new in after.items():
        mask = differs(before[name], new)
        if mask.any():
            diff[name] = (mask.nonzero(), new[mask])
    return diff


@wrong("sparse_diff", "nonzero() gives (k, 1)")
def unflattened(before, after):
    diff = {}
    for name, new in after.items():
        mask = differs(before[name], new).flatten()
        if mask.any():
            diff[name] = (mask.nonzero(), new.flatten()[mask])
    return diff


@wrong("sparse_diff", "this is a mask of all entries")
def masks(before, after):
    diff = {}
    for name, new in after.items():
        mask = differs(before[name], new).flatten()
        if mask.any():
            diff[name] = (mask, new.flatten()[mask])
    return diff


def by_mask(found):
    """The rest is right once the mask of what changed is."""

    def sparse_diff(before, after):
        diff = {}
        for name, new in after.items():
            at = found(before[name], new).flatten().nonzero().flatten()
            if len(at):
                diff[name] = (at, new.flatten()[at])
        return diff

    return sparse_diff


wrong("sparse_diff", "isclose takes a small change for none")(
    by_mask(lambda old, new: ~torch.isclose(old, new))
)
wrong("sparse_diff", "and a NaN that stayed for a change: compare the bits")(
    by_mask(lambda old, new: old != new)
)
wrong("sparse_diff", "and its sign is lost")(
    by_mask(lambda old, new: (old != new) & ~(old.isnan() & new.isnan()))
)
wrong("sparse_diff", "a NaN that stayed is taken for a change")(
    by_mask(lambda old, new: (old != new) | (old.signbit() != new.signbit()))
)
wrong("sparse_diff", "the difference is NaN, which is not above 0")(
    by_mask(lambda old, new: (new - old).abs() > 0)
)


@wrong("sparse_diff", "indices and values have changed places")
def values_first(before, after):
    return {n: (values, at) for n, (at, values) in by_mask(differs)(before, after).items()}


@wrong("sparse_diff", "has dtype int32, expected int64")
def short_indices(before, after):
    return {n: (at.int(), values) for n, (at, values) in by_mask(differs)(before, after).items()}


@wrong("sparse_diff", "has dtype float32, expected bfloat16")
def wide_values(before, after):
    found = by_mask(differs)(before, after)
    return {n: (at, values.float()) for n, (at, values) in found.items()}


@wrong("sparse_diff", "only floating-point numbers are compared")
def floats_only(before, after):
    floats = {n: t for n, t in after.items() if t.is_floating_point()}
    return by_mask(differs)(before, floats)


@wrong("sparse_diff", "the indices count down the columns")
def by_columns(before, after):
    diff = {}
    for name, new in after.items():
        mask = differs(before[name], new)
        turned = mask.permute(*range(mask.dim())[::-1]).flatten()
        if mask.any():
            values = new.permute(*range(new.dim())[::-1]).flatten()[turned]
            diff[name] = (turned.nonzero().flatten(), values)
    return diff


@wrong("sparse_diff", "your function raised RuntimeError: view size is not compatible")
def by_view(before, after):
    diff = {}
    for name, new in after.items():
        at = (before[name].view(-1) != new.view(-1)).nonzero().view(-1)
        if len(at):
            diff[name] = (at, new.view(-1)[at])
    return diff


@wrong("sparse_diff", "the argument after was changed")
def popping(before, after):
    diff = by_mask(differs)(before, after)
    for name in set(after) - set(diff):
        after.pop(name)
    return diff


right("sparse_diff")(by_mask(differs))


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
def by_bytes(before, after):
    diff = {}
    for name, new in after.items():
        pair = [t.detach().contiguous().flatten() for t in (before[name], new)]
        a, b = (t.view(torch.uint8).view(len(t), t.element_size()) for t in pair)
        mask = (a != b).any(dim=1)
        if mask.sum() > 0:
            diff[name] = (torch.arange(len(mask))[mask], pair[1][mask])
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


def fits(before, diff):
    """Refuses what does not fit: shared by the answers below."""
    for name, (at, values) in diff.items():
        if name not in before:
            raise ValueError(f"no {name}")
        old = before[name]
        wrong_kind = at.dtype != torch.int64 or values.dtype != old.dtype
        outside = not all(0 <= i < old.numel() for i in at.tolist())
        if wrong_kind or outside or len(set(at.tolist())) < len(at) or len(at) != len(values):
            raise ValueError(f"{name} does not fit")


def written(change):
    """The rest is right once change(flat copy, indices, values) is."""

    def apply_sparse_diff(before, diff):
        fits(before, diff)
        after = {name: old.clone() for name, old in before.items()}
        for name, (at, values) in diff.items():
            flat = change(before[name].reshape(-1).clone(), at, values)
            after[name] = flat.reshape(before[name].shape)
        return after

    return apply_sparse_diff


right("apply_sparse_diff")(written(lambda flat, at, values: flat.index_copy(0, at, values)))
wrong("apply_sparse_diff", "the values are added")(
    written(lambda flat, at, values: flat.index_add(0, at, values))
)
wrong("apply_sparse_diff", "what did not change is 0")(
    written(lambda flat, at, values: torch.zeros_like(flat).scatter(0, at, values))
)
wrong("apply_sparse_diff", "nothing is changed")(written(lambda flat, at, values: flat))


@wrong("apply_sparse_diff", "only what changed is in the result")
def changed_only(before, diff):
    fits(before, diff)
    return {
        name: before[name].flatten().scatter(0, at, values).view(before[name].shape)
        for name, (at, values) in diff.items()
    }


@wrong("apply_sparse_diff", "the result is flat")
def flat_result(before, diff):
    fits(before, diff)
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name] = after[name].flatten()
        after[name][at] = values
    return after


@wrong("apply_sparse_diff", "give a copy, and what is written there is lost")
def written_to_a_copy(before, diff):
    fits(before, diff)
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].reshape(-1)[at] = values
    return after


@wrong("apply_sparse_diff", "your function raised RuntimeError: view size is not compatible")
def by_a_view(before, diff):
    fits(before, diff)
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


@wrong("apply_sparse_diff", "count down the columns")
def down_the_columns(before, diff):
    fits(before, diff)
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        turned = before[name].permute(*range(before[name].dim())[::-1])
        flat = turned.flatten().scatter(0, at, values).view(turned.shape)
        after[name] = flat.permute(*range(flat.dim())[::-1])
    return after


@wrong("apply_sparse_diff", "what did not change is shared with before")
def shared(before, diff):
    fits(before, diff)
    after = dict(before)
    for name, (at, values) in diff.items():
        after[name] = before[name].flatten().scatter(0, at, values).view(before[name].shape)
    return after


@wrong("apply_sparse_diff", "the argument before was changed: leave it as it was")
def in_place_of(before, diff):
    fits(before, diff)
    for name, (at, values) in diff.items():
        flat = before[name].flatten().scatter(0, at, values)
        before[name] = flat.view(before[name].shape)
    return {name: t.clone() for name, t in before.items()}


@wrong("apply_sparse_diff", "KeyError: 'head.weight', where ValueError was due")
def unknown_names(before, diff):
    fits(before, {name: pair for name, pair in diff.items() if name in before})
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name] = after[name].flatten().scatter(0, at, values).view(before[name].shape)
    return after


def refusing(*wanted):
    """Refuses some of what does not fit; the rest is right."""

    def apply_sparse_diff(before, diff):
        for name, (at, values) in diff.items():
            if name not in before:
                raise ValueError(name)
            for refuses in wanted:
                if refuses(before[name], at, values):
                    raise ValueError(name)
        after = {name: old.clone() for name, old in before.items()}
        for name, (at, values) in diff.items():
            flat = before[name].reshape(-1).clone()
            flat[at] = values.to(flat.dtype)
            after[name] = flat.reshape(before[name].shape)
        return after

    return apply_sparse_diff


def above(old, at, values):
    return bool((at >= old.numel()).any())


def below(old, at, values):
    return bool((at < 0).any())


def twice(old, at, values):
    return len(at.unique()) < len(at)


def kind(old, at, values):
    return values.dtype != old.dtype


def whole(old, at, values):
    return at.dtype != torch.int64


def narrow(old, at, values):
    return at.dtype == torch.int32 or (at.dtype != torch.bool and twice(old, at, values))


def lengths(old, at, values):
    return len(at) != len(values)


wrong("apply_sparse_diff", "IndexError: index 42 is out of bounds")(refusing(below, twice, kind))
wrong("apply_sparse_diff", "(an index of −1)")(refusing(above, twice, kind, whole, lengths))
wrong("apply_sparse_diff", "(an index that is there twice)")(refusing(above, below, kind, whole))
wrong("apply_sparse_diff", "(values in float64 for a float32 tensor)")(
    refusing(above, below, twice, whole, lengths)
)
wrong("apply_sparse_diff", "(indices in int32)")(refusing(above, below, twice, kind, lengths))
wrong("apply_sparse_diff", "(a mask for indices)")(refusing(above, below, kind, narrow))
wrong("apply_sparse_diff", "(9 indices and 1 value)")(refusing(above, below, twice, kind, whole))


@wrong("apply_sparse_diff", "the message does not name 'head.weight'")
def wordless(before, diff):
    try:
        fits(before, diff)
    except ValueError:
        raise ValueError("the diff does not fit") from None
    return written(lambda flat, at, values: flat.scatter(0, at, values))(before, diff)


@right("apply_sparse_diff")
def by_a_contiguous_copy(before, diff):
    fits(before, diff)
    after = {name: old.clone(memory_format=torch.contiguous_format) for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].view(-1)[at] = values
    return after


@right("apply_sparse_diff")
def by_a_mask(before, diff):
    fits(before, diff)
    after = {}
    for name, old in before.items():
        at, values = diff.get(name, (torch.zeros(0, dtype=torch.int64), old.new_zeros(0)))
        order = at.argsort()
        mask = torch.zeros(old.numel(), dtype=torch.bool)
        mask[at] = True
        after[name] = old.clone().masked_scatter(mask.view(old.shape), values[order])
    return after


@right("apply_sparse_diff")
def by_dimensions(before, diff):
    fits(before, diff)
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        if before[name].dim():
            after[name][torch.unravel_index(at, before[name].shape)] = values
        else:
            after[name].fill_(values[0])
    return after


# ------------------------------------------------------------------ make_optimizer


def unfreeze(model, names):
    """Freeze all but what has one of the names, by any of the names that it has."""
    model.requires_grad_(False)
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in names:
            p.requires_grad_(True)


def set_modes(model):
    model.eval()
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters())
    for module in list(model.modules()):
        for child in module.children():
            if not list(child.parameters()):
                child.train(module.training)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters, lr=1e-2, weight_decay=0.1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a parameter that is there twice
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def twins(model):
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


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


@wrong("make_optimizer", "frozen in name only")
def decayed(model, names):
    model.zero_grad(set_to_none=False)
    unfreeze(model, names)
    set_modes(model)
    return adamw(model.parameters())


@wrong("make_optimizer", "frozen in name only")
def moved_by_old_gradients(model, names):
    unfreeze(model, names)
    set_modes(model)
    return adamw(model.parameters())


@wrong("make_optimizer", "the optimiser holds the frozen parameters too: give it")
def all_parameters(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return adamw(model.parameters())


@wrong("make_optimizer", "the optimiser holds the frozen parameters too: give it")
def a_group_without_decay(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [{"params": trained(model)}, {"params": frozen, "lr": 0.0, "weight_decay": 0.0}]
    return adamw(groups)


@wrong("make_optimizer", "the optimiser holds the frozen parameters too, and a tied weight twice")
def all_by_all_names(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return adamw(twins(model))


@wrong("make_optimizer", "set_to_none=False leaves gradients of zeros")
def zeros_left(model, names):
    model.zero_grad(set_to_none=False)
    unfreeze(model, names)
    set_modes(model)
    return adamw(trained(model))


@wrong("make_optimizer", "gradients from before are left, and join the first step")
def old_gradients(model, names):
    unfreeze(model, names)
    set_modes(model)
    return adamw(trained(model))


@wrong("make_optimizer", "an optimiser clears what it holds")
def cleared_by_the_optimiser(model, names):
    unfreeze(model, names)
    set_modes(model)
    optimizer = adamw(trained(model))
    optimizer.zero_grad()
    return optimizer


@wrong("make_optimizer", "a tied weight is in the optimiser twice")
def tied_twice(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return adamw([p for p in twins(model) if p.requires_grad])


@wrong("make_optimizer", "a tied weight has two names, and named_parameters() tells the first")
def by_first_names(model, names):
    model.zero_grad()
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    set_modes(model)
    return adamw(trained(model))


@wrong("make_optimizer", "the second name of a tied weight, which is not in names, freezes it")
def the_last_name_decides(model, names):
    model.zero_grad()
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name in names)
    set_modes(model)
    return adamw(trained(model))


@wrong("make_optimizer", "what is in names may come frozen too")
def never_unfrozen(model, names):
    model.zero_grad()
    chosen = {model.get_parameter(name) for name in names}
    for p in model.parameters():
        if p not in chosen:
            p.requires_grad_(False)
    set_modes(model)
    return adamw(list(chosen))


@wrong("make_optimizer", "nothing is frozen")
def the_optimiser_alone(model, names):
    model.zero_grad()
    model.requires_grad_(True)
    for module in model.modules():
        module.train()
    return adamw([p for n, p in model.named_parameters() if n in names])


@wrong("make_optimizer", "frozen layers are in train mode")
def all_in_train_mode(model, names):
    model.zero_grad()
    unfreeze(model, names)
    model.train()
    return adamw(trained(model))


@wrong("make_optimizer", "frozen layers are in train mode")
def modes_left_alone(model, names):
    model.zero_grad()
    unfreeze(model, names)
    return adamw(trained(model))


@wrong("make_optimizer", "all is in eval mode")
def all_in_eval_mode(model, names):
    model.zero_grad()
    unfreeze(model, names)
    model.eval()
    return adamw(trained(model))


@wrong("make_optimizer", "it goes with the layer that it is in")
def by_own_parameters(model, names):
    model.zero_grad()
    unfreeze(model, names)
    for module in model.modules():
        module.train(any(p.requires_grad for p in module.parameters()))
    return adamw(trained(model))


@wrong("make_optimizer", "dropout is switched off everywhere")
def no_dropout(model, names):
    model.zero_grad()
    unfreeze(model, names)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return adamw(trained(model))


@wrong("make_optimizer", "the running averages of frozen norms still move")
def norms_forgotten(model, names):
    model.zero_grad()
    unfreeze(model, names)
    model.train()
    for module in model.modules():
        for child in module.children():
            own = [p.requires_grad for p in module.parameters()]
            if isinstance(child, nn.Dropout) and not any(own):
                child.eval()
    return adamw(trained(model))


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


@wrong("make_optimizer", "weight decay is switched off for what trains")
def no_decay(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    return adamw(trained(model), weight_decay=0.0)


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


@wrong("make_optimizer", "is None: is a return statement missing?")
def nothing_returned(model, names):
    unfreeze(model, names)
    adamw(trained(model))


@wrong("make_optimizer", "the argument names was changed")
def emptied(model, names):
    model.zero_grad()
    unfreeze(model, names)
    set_modes(model)
    names.clear()
    return adamw(trained(model))


@right("make_optimizer")
def in_the_same_style(model, names):
    model.zero_grad(set_to_none=True)
    unfreeze(model, names)
    set_modes(model)
    return adamw(filter(lambda p: p.requires_grad, model.parameters()))


@right("make_optimizer")
def by_a_walk_upwards(model, names):
    model.eval()
    for p in model.parameters():
        p.grad = None
        p.requires_grad = False
    chosen = list(dict.fromkeys(model.get_parameter(name) for name in names))
    for p in chosen:
        p.requires_grad = True
    for name, p in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1) if p.requires_grad else ():
            holder = model.get_submodule(".".join(parts[:depth]))
            holder.training = True
            for child in holder.children():
                child.training |= not any(True for _ in child.parameters())
    return torch.optim.AdamW([{"params": chosen}], lr=0.01, weight_decay=0.1)


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
