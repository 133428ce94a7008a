"""Checks of lesson 10."""

import math
from collections import Counter

import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)
from torch.nn import functional as F

from .kit import Case, check_for, refused

# ------------------------------------------------------------------ select_bitfit


class _Called(nn.Module):
    """Biases, and what is only called so, in an order that is not the alphabet's."""

    def __init__(self, masked=False):
        super().__init__()
        self.offset, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.relative_attention_bias = nn.Embedding(6, 2)  # a table, as T5 has one
        self.up, self.norm = nn.Linear(4, 6), nn.LayerNorm(4)
        self.scores = nn.ModuleDict({"bias": nn.Linear(4, 3, bias=False)})
        self.bias_net = nn.Linear(4, 3)
        if masked:  # as GPT-2 called its causal mask
            self.attn = nn.Module()
            self.attn.register_buffer("bias", torch.ones(3, 3).tril())


def _tied_biases():
    """A head that has its decoder's bias itself, as BERT's has, and a layer used twice."""
    head, layer = nn.Module(), nn.Linear(4, 4)
    head.decoder = nn.Linear(4, 9)
    head.bias = head.decoder.bias
    return nn.ModuleDict({"first": layer, "second": layer, "head": head})


def _frozen_but_its_norm():
    model = _Called().requires_grad_(False)
    model.norm.requires_grad_(True)
    return model


def _biasless(table):
    layers = {"q": nn.Linear(4, 4, bias=False), "norm": nn.RMSNorm(4)}
    return nn.ModuleDict(
        layers | ({"relative_attention_bias": nn.Embedding(6, 2)} if table else {})
    )


def _last_is_bias(name):
    return name.split(".")[-1].split("_")[-1] == "bias"


def _named(keep=_last_is_bias, listed=lambda model: model.named_parameters()):
    """A wrong select_bitfit by what it looks at and what it keeps; it refuses nothing."""
    return lambda model: [name for name, _ in listed(model) if keep(name)]


def _of_linears(model):
    pairs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [f"{name}.bias".lstrip(".") for name, m in pairs if m.bias is not None]


@check_for(
    cases=[
        Case(lambda: [_Called()], note="a table, layers and a dict that have bias in their names"),
        Case(
            lambda: [nn.TransformerEncoderLayer(8, 2, 12)],
            note="nn.MultiheadAttention calls one of its biases in_proj_bias",
        ),
        Case(lambda: [nn.Linear(4, 3)], note="a layer alone"),
        Case(
            lambda: [nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2))],
            note="a convolution and a norm",
        ),
        Case(lambda: [_Called(masked=True)], note="a buffer, a causal mask, is called bias"),
        Case(lambda: [_tied_biases()], note="a bias with two names, and a layer used twice"),
        Case(lambda: [_frozen_but_its_norm()], note="a model that is frozen but for its norm"),
        refused(lambda: [_biasless(table=False)], "bias", "a model without biases, as a Llama is"),
        refused(lambda: [_biasless(table=True)], "bias", "without biases, but with T5's table"),
    ],
    returns="the list",
    causes={
        "that bias stands somewhere in a name says nothing: its last part counts": _named(
            lambda name: "bias" in name
        ),
        "a module that is called bias is none: the last part of the name counts": _named(
            lambda name: "bias" in name.split(".")
        ),
        "in_proj_bias is a bias too: the last part may also end in _bias": _named(
            lambda name: name.split(".")[-1] == "bias"
        ),
        "a bias of the model itself, or of a layer alone, has no dot before its name": _named(
            lambda name: name.endswith((".bias", "_bias"))
        ),
        "norms have biases too": _named(lambda name: _last_is_bias(name) and "norm" not in name),
        "only the biases of nn.Linear are looked for": _of_linears,
        "a vector is no bias by its shape: the weight of a norm is one too": _named(
            lambda name: True, lambda m: [(n, p) for n, p in m.named_parameters() if p.ndim == 1]
        ),
        "a buffer is no parameter: state_dict() lists both": _named(
            listed=lambda model: model.state_dict().items()
        ),
        "a tied bias is listed under each of its names": _named(
            listed=lambda model: model.named_parameters(remove_duplicate=False)
        ),
        "requires_grad says nothing: the model may be frozen when BitFit chooses": _named(
            listed=lambda m: [(n, p) for n, p in m.named_parameters() if p.requires_grad]
        ),
        "the names are sorted: keep the model's order": lambda model: sorted(_named()(model)),
        "these are the weights of the layers: biases were asked for": _named(
            lambda name: name.endswith("weight")
        ),
    },
)
def select_bitfit(model):
    """The biases of any model, each once and in its order; a model without any is refused."""
    names, seen = [], set()
    for path, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) not in seen and (own == "bias" or own.endswith("_bias")):
                names.append(f"{path}.{own}" if path else own)
            seen.add(id(p))
    return names


# ------------------------------------------------------------------ hard_concrete


def _drawn(shape, *settings, size=2.0, dtype=torch.float32):
    return [size * torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype), *settings]


def _with_zeros():
    log_alpha, u = _drawn((4, 6))
    u[0, :3] = 0.0
    return [log_alpha, u]


def _far(*settings):
    return [torch.tensor([-100.0, -40.0, 0.3, 40.0, 100.0]), torch.rand(5), *settings]


def _log_odds(u):
    return u.log() - (1 - u).log()


def _gate(
    noise=_log_odds,
    inside=lambda a, n, t: (a + n) / t,
    squash=torch.sigmoid,
    stretched=lambda s, low, high: s * (high - low) + low,
    cut=lambda z, low, high: z.clamp(0, 1),
):
    """hard_concrete with its steps open to be done wrongly."""

    def hard_concrete(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
        s = squash(inside(log_alpha, noise(u), temperature))
        return cut(stretched(s, low, high), low, high)

    return hard_concrete


_OTHER_DEFAULTS = "the defaults are another paper's, −0.1, 1.1 and 2/3: here −1.5, 1.5 and 1"


@check_for(
    cases=[
        Case(lambda: _drawn((6, 9), -0.4, 1.2, 0.6)),
        Case(lambda: _drawn((200,), -0.1, 1.1, 2 / 3), note="as in Louizos et al. 2018"),
        Case(lambda: _drawn((7, 5)), note="low, high and temperature left out"),
        Case(lambda: _drawn((3, 4, 5), -1.5, 1.5, 2.5, dtype=torch.float64)),
        Case(lambda: _drawn((), -0.3, 2.0, 1.5, size=0.1), note="a single gate"),
        Case(_with_zeros, note="torch.rand may draw exactly 0"),
        Case(lambda: _far(-0.4, 1.2, 0.5), note="log alpha up to ±100"),
    ],
    returns="the gate",
    gradients=("log_alpha",),
    causes={
        "the temperature is left out": _gate(inside=lambda a, n, t: a + n),
        "only the noise is divided by the temperature: log alpha is too": _gate(
            inside=lambda a, n, t: a + n / t
        ),
        "only log alpha is divided by the temperature: the noise is too": _gate(
            inside=lambda a, n, t: a / t + n
        ),
        "the temperature multiplies: divide by it": _gate(inside=lambda a, n, t: (a + n) * t),
        "the temperature divides the stretched gate: it acts inside the sigmoid": _gate(
            inside=lambda a, n, t: (a + n, t),
            squash=lambda pair: pair[0].sigmoid() / pair[1],
        ),
        "u is added as it is: add its log-odds, log u − log(1 − u)": _gate(noise=lambda u: u),
        "log u is added alone: − log(1 − u) is missing": _gate(noise=torch.log),
        "the noise is turned: log u − log(1 − u)": _gate(noise=lambda u: -_log_odds(u)),
        "this is Gumbel noise, −log(−log u): a gate takes log u − log(1 − u)": _gate(
            noise=lambda u: -(-u.log()).log()
        ),
        "the noise is a normal one: a gate takes log u − log(1 − u)": _gate(
            noise=torch.special.ndtri
        ),
        "u is not used: this is the gate as it is without noise": _gate(noise=torch.zeros_like),
        "log alpha is a logarithm already: neither exp nor log of it is taken": _gate(
            inside=lambda a, n, t: (a.exp() + n) / t
        ),
        "the sigmoid is missing": _gate(squash=lambda s: s),
        "the sigmoid is taken twice": _gate(squash=lambda s: s.sigmoid().sigmoid()),
        "tanh is no sigmoid: it runs from −1 to 1": _gate(squash=torch.tanh),
        "the gate is not stretched, so it is never exactly 0 or 1": _gate(
            stretched=lambda s, low, high: s
        ),
        "the stretch ends at high − low: + low is missing": _gate(
            stretched=lambda s, low, high: s * (high - low)
        ),
        "the stretch is too short: s is multiplied by high − low, not by high": _gate(
            stretched=lambda s, low, high: s * high + low
        ),
        "low and high have changed places": _gate(
            stretched=lambda s, low, high: s * (low - high) + high
        ),
        "low is taken for −high: the lesson's stretch is symmetric, this one need not be": _gate(
            stretched=lambda s, low, high: (2 * s - 1) * high
        ),
        "the stretched gate must be cut off, at 0 and 1: between low and high it is anyway": _gate(
            cut=lambda z, low, high: z
        ),
        "it is cut off at 0 alone: no gate is above 1": _gate(cut=lambda z, low, high: z.relu()),
        "it is cut off at 1 alone: no gate is below 0": _gate(
            cut=lambda z, low, high: z.clamp(max=1)
        ),
        "the gate is rounded: between 0 and 1 it keeps its value, through which it learns": _gate(
            cut=lambda z, low, high: (z > 0.5).to(z.dtype)
        ),
        _OTHER_DEFAULTS: lambda a, u, low=-0.1, high=1.1, t=2 / 3: _gate()(a, u, low, high, t),
    },
)
def hard_concrete(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    """Drawn, stretched and cut off, for every stretch and temperature, and its gradient."""
    a = log_alpha.double() / temperature
    steps = [SigmoidTransform().inv, AffineTransform(a, 1 / temperature), SigmoidTransform()]
    stretched = ComposeTransform([*steps, AffineTransform(low, high - low)])(u.double())
    return torch.minimum(stretched.relu(), torch.ones_like(a)).to(log_alpha.dtype)


# ------------------------------------------------------------------ expected_l0


def _alphas(shape, *settings, dtype=torch.float32):
    return [2 * torch.randn(shape, dtype=dtype), *settings]


def _count(chance):
    """A wrong expected_l0 by the chance that it takes each gate to be open."""

    def expected_l0(log_alpha, low=-1.5, high=1.5, temperature=1.0):
        return chance(log_alpha, low, high, temperature).sum()

    return expected_l0


def _chance(a, low, high, t):
    return torch.sigmoid(a - t * math.log(-low / high))


def _without_noise(a, low, high, t):
    return (torch.sigmoid(a / t) * (high - low) + low).clamp(0, 1)


def _each(a, low=-1.5, high=1.5, temperature=1.0):
    return _chance(a, low, high, temperature)


@check_for(
    cases=[
        Case(lambda: _alphas((6, 9), -0.4, 1.2, 0.6)),
        Case(lambda: _alphas((40,), -0.1, 1.1, 2 / 3), note="as in Louizos et al. 2018"),
        Case(lambda: _alphas((5, 3)), note="low, high and temperature left out"),
        Case(lambda: _alphas((2, 3, 4), -1.5, 1.5, 2.5, dtype=torch.float64)),
        Case(lambda: _alphas((), -0.3, 2.0, 1.5), note="a single gate"),
        Case(lambda: [_far()[0], -0.4, 1.2, 0.5], note="log alpha up to ±100"),
    ],
    returns="the number of open gates",
    gradients=("log_alpha",),
    causes={
        "the shift is left out: σ(log α) is the chance only where low = −high": _count(
            lambda a, low, high, t: torch.sigmoid(a)
        ),
        "the shift has the wrong sign: −low < high opens more gates, not fewer": _count(
            lambda a, low, high, t: torch.sigmoid(a + t * math.log(-low / high))
        ),
        "the temperature is missing: it multiplies the shift": _count(
            lambda a, low, high, t: torch.sigmoid(a - math.log(-low / high))
        ),
        "the shift is divided by the temperature: multiply": _count(
            lambda a, low, high, t: torch.sigmoid(a - math.log(-low / high) / t)
        ),
        "all is divided by the temperature: solve (log α + noise) / β > log(−low / high)": _count(
            lambda a, low, high, t: torch.sigmoid(a / t - math.log(-low / high))
        ),
        "log α alone is divided by the temperature: it stays, and the shift is multiplied": _count(
            lambda a, low, high, t: torch.sigmoid(a / t - t * math.log(-low / high))
        ),
        "−low / (high − low) is a share of the stretch: its log-odds are log(−low / high)": _count(
            lambda a, low, high, t: torch.sigmoid(a - t * math.log(-low / (high - low)))
        ),
        "these are the closed gates: 1 − σ is the chance of z = 0": _count(
            lambda *args: 1 - _chance(*args)
        ),
        "this is the chance that a gate is fully open, z = 1: all with z > 0 count": _count(
            lambda a, low, high, t: torch.sigmoid(a - t * math.log((1 - low) / (high - 1)))
        ),
        "this is the sum of the gates without noise: a gate half open counts as one": _count(
            _without_noise
        ),
        "this counts the gates that are open without noise, and has no gradient": _count(
            lambda a, *settings: (_without_noise(a, *settings) > 0).to(a.dtype)
        ),
        "the chances are averaged: add them up": lambda *args: _each(*args).mean(),
        "this is a chance for each gate: add them up": _each,
        _OTHER_DEFAULTS: lambda a, low=-0.1, high=1.1, t=2 / 3: _count(_chance)(a, low, high, t),
    },
)
def expected_l0(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    """How many gates a draw leaves open on average, and how each log alpha changes that."""
    a = log_alpha.double() / temperature
    steps = [SigmoidTransform().inv, AffineTransform(a, 1 / temperature), SigmoidTransform()]
    uniform = Uniform(torch.zeros_like(a), torch.ones_like(a), validate_args=False)
    gates = TransformedDistribution(
        uniform, [*steps, AffineTransform(low, high - low)], validate_args=False
    )
    return (1 - gates.cdf(torch.zeros_like(a))).sum().to(log_alpha.dtype)


# ------------------------------------------------------------------ sparse_diff


def _trained(kind):
    """(before, after): two state dicts that differ in a few entries."""
    if kind == "numbers of other kinds":
        before = {"steps": torch.tensor(7), "seen": torch.arange(6), "on": torch.ones(2, 2).bool()}
        after = {"steps": torch.tensor(8), "seen": torch.arange(6), "on": torch.eye(2).bool()}
        empty = {"empty": torch.zeros(0, 3)}
        return before | empty, after | empty
    if kind == "zeros and NaN":
        nan, inf = math.nan, math.inf
        before = {"w": torch.tensor([[0.0, -0.0, 1.0], [nan, nan, inf]]), "kept": torch.zeros(2)}
        after = {"w": torch.tensor([[-0.0, -0.0, nan], [nan, 2.0, -inf]]), "kept": torch.zeros(2)}
        return before, after
    dtype = torch.float64 if kind == "the last bit" else torch.float32
    before = {
        "embed.weight": torch.randn(4, 5, dtype=dtype),
        "fc.weight": torch.randn(6, 7, dtype=dtype),
        "fc.bias": torch.randn(6, dtype=dtype),
        "norm.weight": torch.randn(3, 2, 4).bfloat16(),
    }
    if kind == "transposed":  # shape (6, 7) and (4, 2, 3), entries not in the order of the memory
        before["fc.weight"] = torch.randn(7, 6).T
        before["norm.weight"] = before["norm.weight"].transpose(0, 2)
    after = {name: t.clone() for name, t in before.items()}
    if kind == "nothing":
        return before, after
    for name, places in {"fc.weight": 9, "fc.bias": 1, "norm.weight": 5}.items():
        chosen = torch.zeros(after[name].numel(), dtype=torch.bool)
        chosen[torch.randperm(len(chosen))[:places]] = True
        chosen, new = chosen.view(after[name].shape), torch.randn(after[name].shape)
        if kind == "the last bit":
            up = torch.full_like(after[name], math.inf)
            new = torch.nextafter(after[name], up)
        after[name][chosen] = new.to(after[name].dtype)[chosen]
    return before, after


def _changed(old, new):
    """Whether each entry has other bits, of any dtype."""
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (old, new))
    return (a != b).view(old.numel(), old.element_size()).any(-1).view(old.shape)


def _unequal(old, new):
    return old != new


def _both_nan(old, new):
    return old.isnan() & new.isnan()


def _diff(
    changed=_changed,
    indices=lambda mask: mask.flatten().nonzero().flatten(),
    values=lambda old, new, at: new.flatten()[at],
    kept=lambda at: at.numel() > 0,
    pair=lambda at, values: (at, values),
    named=lambda t: True,
):
    """sparse_diff with its steps open to be done wrongly."""

    def sparse_diff(before, after):
        found = {}
        for name, new in after.items():
            mask = changed(before[name], new)
            at = mask.flatten().nonzero().flatten()
            if kept(at) and named(new):
                found[name] = pair(indices(mask), values(before[name], new, at))
        return found

    return sparse_diff


def _turned(t):
    return t.permute(*reversed(range(t.dim())))


@check_for(
    cases=[
        Case(lambda: _trained("some")),
        Case(lambda: _trained("nothing"), note="nothing has changed"),
        Case(lambda: _trained("the last bit"), note="changes of the last bit"),
        Case(lambda: _trained("transposed"), note="tensors that are views of transposed ones"),
        Case(lambda: _trained("zeros and NaN"), note="0.0 becomes −0.0, and a NaN stays one"),
        Case(
            lambda: _trained("numbers of other kinds"),
            note="a counter without dimensions, a mask, a tensor without entries",
        ),
    ],
    returns="the result",
    tolerance=0.0,
    causes={
        (
            "the values are differences, and before + (after − before) is not always after: give "
            "the new values"
        ): _diff(values=lambda old, new, at: new.flatten()[at] - old.flatten()[at]),
        "the values are the old ones: give those of after": _diff(
            values=lambda old, new, at: old.flatten()[at]
        ),
        "the values are those of the whole tensor: give the changed ones": _diff(
            values=lambda old, new, at: new.flatten()
        ),
        "names whose tensors did not change are in it too": _diff(kept=lambda at: True),
        "every entry is in it, changed or not": _diff(
            changed=lambda old, new: torch.ones_like(new, dtype=torch.bool)
        ),
        "an index has a number for each dimension: flatten the tensor first": _diff(
            indices=lambda mask: mask.nonzero()
        ),
        "an index has only the place within its row: flatten the tensor first": _diff(
            indices=lambda mask: mask.nonzero()[:, -1]
        ),
        "nonzero() gives (k, 1): the indices are (k,)": _diff(
            indices=lambda mask: mask.flatten().nonzero()
        ),
        "the indices count down the columns: flat means row after row": _diff(
            indices=lambda mask: _turned(mask).flatten().nonzero().flatten(),
            values=lambda old, new, at: _turned(new).flatten()[
                _turned(_changed(old, new)).flatten().nonzero().flatten()
            ],
        ),
        "this is a mask of all entries: give the indices of the changed ones": _diff(
            indices=lambda mask: mask.flatten()
        ),
        "indices and values have changed places": _diff(pair=lambda at, values: (values, at)),
        "isclose takes a small change for none": _diff(
            changed=lambda old, new: ~torch.isclose(old, new)
        ),
        "!= takes −0.0 for 0.0, and a NaN that stayed for a change: compare the bits": _diff(
            changed=_unequal
        ),
        "!= takes −0.0 for 0.0, and its sign is lost: compare the bits": _diff(
            changed=lambda old, new: _unequal(old, new) & ~_both_nan(old, new)
        ),
        "a NaN that stayed is taken for a change: compare the bits": _diff(
            changed=lambda old, new: _changed(old, new) | _both_nan(old, new)
        ),
        (
            "where a NaN or an infinity is, the difference is NaN, which is not above 0: compare "
            "the bits"
        ): _diff(changed=lambda old, new: (new - old).abs() > 0),
        "only floating-point numbers are compared: counters and masks change too": _diff(
            named=lambda t: t.is_floating_point()
        ),
    },
)
def sparse_diff(before, after):
    """Where any bit has changed, and the new values there; nothing of what stayed."""
    found = {}
    for name, old in before.items():
        pairs = list(zip(old.reshape(-1), after[name].reshape(-1), strict=True))
        bits = [[t.reshape(1).view(torch.uint8).tolist() for t in pair] for pair in pairs]
        places = [i for i, (a, b) in enumerate(bits) if a != b]
        if places:
            found[name] = (torch.tensor(places), torch.stack([pairs[i][1] for i in places]))
    return found


# ------------------------------------------------------------------ apply_sparse_diff


def _to_apply(kind):
    before, after = _trained(kind)
    return [before, sparse_diff.reference(before, after)]


def _broken(change, name="fc.weight"):
    """A diff of which one entry was changed: change(indices, values) gives the new pair."""

    def make():
        before, diff = _to_apply("some")
        return [before, diff | {name: change(*diff[name])}]

    return make


def _unknown():
    before, diff = _to_apply("some")
    return [before, diff | {"head.weight": diff["fc.weight"]}]


def _at(indices, place, value):
    changed = indices.clone()
    changed[place] = value
    return changed


def _overwrites_the_first(apply, before, diff):
    """What is done to one result must not reach the next."""
    for tensor in apply(before, diff).values():
        tensor.zero_()
    return [before, diff]


def _signed(result):
    # 0.0 and −0.0 are equal as numbers.
    return {"the result": result, "signs": {name: t.signbit() for name, t in result.items()}}


def _applied(
    start=lambda old: old.clone(),
    write=lambda flat, at, values: flat.index_put((at,), values),
    shaped=lambda flat, old: flat.view(old.shape),
    rest=lambda old: old.clone(),
    names=lambda before, diff: before,
):
    """apply_sparse_diff with its steps open to be done wrongly; it refuses nothing."""

    def apply_sparse_diff(before, diff):
        after = {name: rest(before[name]) for name in names(before, diff)}
        for name, (at, values) in diff.items():
            flat = start(before[name]).flatten()
            after[name] = shaped(write(flat, at, values), before[name])
        return after

    return apply_sparse_diff


def _written_to_a_copy(before, diff):
    after = {name: old.clone() for name, old in before.items()}
    for name, (at, values) in diff.items():
        after[name].flatten()[at] = values
    return after


@check_for(
    cases=[
        Case(lambda: _to_apply("some")),
        Case(lambda: _to_apply("transposed"), note="tensors that are views of transposed ones"),
        Case(lambda: _to_apply("zeros and NaN"), note="0.0 becomes −0.0, and a NaN stays one"),
        Case(
            lambda: _to_apply("numbers of other kinds"),
            note="a counter without dimensions, a mask, a tensor without entries",
        ),
        Case(
            lambda: _to_apply("some"),
            note="a second time, after all of the first result was set to 0",
            earlier=_overwrites_the_first,
        ),
        Case(lambda: _to_apply("nothing"), note="an empty diff"),
        refused(_unknown, "head.weight", "a name that before does not have"),
        refused(
            _broken(lambda at, values: (_at(at, -1, 42), values)),
            "fc.weight",
            "an index of 42 among 42 entries",
        ),
        refused(
            _broken(lambda at, values: (_at(at, 0, -1), values)), "fc.weight", "an index of −1"
        ),
        refused(
            _broken(lambda at, values: (_at(at, 0, int(at[1])), values)),
            "fc.weight",
            "an index that is there twice",
        ),
        refused(
            _broken(lambda at, values: (at, values.double())),
            "fc.weight",
            "values in float64 for a float32 tensor",
        ),
        refused(_broken(lambda at, values: (at.int(), values)), "fc.weight", "indices in int32"),
        refused(
            _broken(lambda at, values: (torch.arange(42) < 9, values)),
            "fc.weight",
            "a mask for indices",
        ),
        refused(_broken(lambda at, values: (at, values[:1])), "fc.weight", "9 indices and 1 value"),
    ],
    returns="the result",
    view=_signed,
    tolerance=0.0,
    causes={
        "the values are added: they are the new ones, and take the place of the old": _applied(
            write=lambda flat, at, values: flat.index_put((at,), values, accumulate=True)
        ),
        "what did not change is 0: begin with the tensor of before": _applied(
            start=torch.zeros_like
        ),
        "only what changed is in the result: all other names belong to it too": _applied(
            names=lambda before, diff: diff
        ),
        "the result is flat: give each tensor its shape back": _applied(
            shaped=lambda flat, old: flat
        ),
        "nothing is changed: this is before": lambda before, diff: {
            name: old.clone() for name, old in before.items()
        },
        "the indices count row after row: here they count down the columns": _applied(
            start=lambda old: _turned(old), shaped=lambda f, o: _turned(f.view(_turned(o).shape))
        ),
        (
            "flatten() and reshape() of such a tensor give a copy, and what is written there is "
            "lost: write first, then give the shape back"
        ): _written_to_a_copy,
        "what did not change is shared with before: the result needs copies": _applied(
            rest=lambda old: old
        ),
    },
)
def apply_sparse_diff(before, diff):
    """Bit for bit what it was after training; a diff that does not fit is refused."""
    after = {}
    for name, old in before.items():
        entries = list(old.clone().reshape(-1))
        for at, value in zip(*diff.get(name, ((), ())), strict=True):
            entries[int(at)] = value
        flat = torch.stack(entries) if entries else torch.zeros(0, dtype=old.dtype)
        after[name] = flat.reshape(old.shape)
    return after


# ------------------------------------------------------------------ make_optimizer

_SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
_BIASES = [f"blocks.{i}.{layer}.bias" for i in (0, 2) for layer in ("fc", "norm")]
_LAST = [f"blocks.2.{name}.{kind}" for name in ("fc", "norm") for kind in ("weight", "bias")]


class _Part(nn.ModuleDict):
    """Layers, one after another."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


class _Net(nn.Module):
    """Three blocks with dropout and running averages, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embeddings = _Part({"table": nn.Embedding(11, 8), "dropout": nn.Dropout(0.3)})
        layers = {"fc": lambda: nn.Linear(8, 8), "norm": lambda: nn.BatchNorm1d(8)}
        layers |= {"dropout": lambda: nn.Dropout(0.4)}
        blocks = [_Part({name: build() for name, build in layers.items()}) for _ in range(3)]
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embeddings.table.weight
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.2 * torch.randn(p.shape))
                p.net = self  # what a check is given is the optimiser alone

    def loss(self):
        ids = torch.arange(11)
        x = self.embeddings(ids)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x), ids.roll(1))


def _net(names, used=False, training=True, frozen=False):
    model = _Net()
    if used:  # as after a step of full fine-tuning
        model.loss().backward()
    return [model.train(training).requires_grad_(not frozen), list(names)]


_TRAINS, _MOVED, _HELD, _LEFT, _MODES, _SET, _STEPS = (
    "the list of what requires a gradient",
    "the list of frozen parameters that three steps have changed",
    "the list of what the optimiser holds",
    "the list of gradients left from before",
    "the list of layers in train mode",
    "the list of the optimiser's settings",
    "what three steps have made of the trained parameters",
)


def _optimised(optimizer):
    """What was decided, and what three steps of training make of it."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    model = held[0].net
    names = {p: name for name, p in model.named_parameters()}
    counts = Counter(names[p] for p in held)
    old = {p: p.grad for p in names if p.grad is not None}
    modes = [name for name, m in model.named_modules() if m.training]
    before = {p: p.detach().clone() for p in names}
    seen = {
        _TRAINS: [name for p, name in names.items() if p.requires_grad],
        _HELD: sorted(name if n == 1 else f"{name} ({n} times)" for name, n in counts.items()),
        _LEFT: [names[p] if grad.any() else f"{names[p]} (zeros)" for p, grad in old.items()],
        _MODES: [name for name in modes if name.endswith(("dropout", "norm"))],
        _SET: sorted({f"{n} {g[n]:g}" for g in optimizer.param_groups for n in _SETTINGS}),
    }
    torch.random.default_generator.manual_seed(0)
    for _ in range(3 if seen[_TRAINS] else 0):
        model.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    still = {names[p]: torch.equal(p, before[p]) for p in names if not p.requires_grad}
    seen[_MOVED] = [name for name, same in still.items() if not same]
    seen[_STEPS] = {names[p]: p.detach() for p in names if p.requires_grad}
    return {part: seen[part] for part in (_TRAINS, _MOVED, _HELD, _LEFT, _MODES, _SET, _STEPS)}


def _by_all_names(model, names):
    every = model.named_parameters(remove_duplicate=False)
    return list(dict.fromkeys(p for name, p in every if name in names))


def _twice(model, names):
    return [p for n, p in model.named_parameters(remove_duplicate=False) if n in names]


def _freeze(model, chosen):
    model.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)


def _modes(model, alone=lambda module, outer: outer):
    """A module with parameters trains if one of them does; `alone` decides of one without."""

    def visit(module, outer):
        own = [p.requires_grad for p in module.parameters()]
        module.training = any(own) if own else alone(module, outer)
        for child in module.children():
            visit(child, module.training)

    visit(model, True)


def _dropout_alone(model):
    _modes(model)
    for module in model.modules():
        module.training |= not isinstance(module, nn.Dropout)


def _no_dropout(model):
    model.train()
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)


def _made(
    found=_by_all_names,
    frozen=_freeze,
    held=lambda model, chosen: chosen,
    cleared=lambda model, optimizer: model.zero_grad(),
    modes=_modes,
    **settings,
):
    """make_optimizer with its steps open to be done wrongly."""

    def make_optimizer(model, names):
        chosen = found(model, names)
        frozen(model, chosen)
        modes(model)
        optimizer = torch.optim.AdamW(chosen[:1], **(_SETTINGS | settings))
        optimizer.param_groups[0]["params"] = list(held(model, chosen))  # it warns of twins
        cleared(model, optimizer)
        return optimizer

    return make_optimizer


def _all(model, chosen):
    return model.parameters()


def _zeros(model, optimizer):
    model.zero_grad(set_to_none=False)


def _by_last_name(model, names):
    names_of = {p: n for n, p in model.named_parameters(remove_duplicate=False)}
    return [p for p, name in names_of.items() if name in names]


@check_for(
    cases=[
        Case(
            lambda: _net(_BIASES, used=True),
            note="biases of two blocks; the model has gradients from a step before",
        ),
        Case(lambda: _net(_LAST), note="the last block of a fresh model"),
        Case(
            lambda: _net(["embeddings.table.weight", "head.weight"], used=True),
            note="a tied weight, by both its names",
        ),
        Case(
            lambda: _net(["embeddings.table.weight", "blocks.1.fc.bias"]),
            note="a tied weight, by its first name",
        ),
        Case(
            lambda: _net(["head.weight", "blocks.1.fc.bias"]),
            note="a tied weight, by its second name",
        ),
        Case(
            lambda: _net(["blocks.0.norm.weight", *_LAST], training=False, frozen=True),
            note="a model that comes frozen and in eval mode",
        ),
    ],
    returns="the optimiser",
    view=_optimised,
    staged=True,
    changes=("model",),
    causes={
        (
            "frozen in name only: the optimiser holds the frozen parameters too, and AdamW decays "
            "what has a gradient, be it of zeros"
        ): _made(held=_all, cleared=_zeros),
        (
            "the optimiser holds the frozen parameters too: give it those that train, whatever "
            "gradient another may get"
        ): _made(held=_all),
        (
            "the optimiser holds the frozen parameters too, and a tied weight twice: give it what "
            "trains, once"
        ): _made(held=lambda m, _: [p for _, p in m.named_parameters(remove_duplicate=False)]),
        (
            "set_to_none=False leaves gradients of zeros: they take as much memory as others, and "
            "only None tells an optimiser to leave a parameter alone"
        ): _made(cleared=_zeros),
        "gradients from before are left, and join the first step": _made(
            cleared=lambda model, optimizer: None
        ),
        (
            "an optimiser clears what it holds: the frozen parameters keep their gradients, "
            "model.zero_grad() reaches them"
        ): _made(cleared=lambda model, optimizer: optimizer.zero_grad()),
        "a tied weight is in the optimiser twice, and each step moves it twice": _made(
            found=_twice
        ),
        (
            "a tied weight has two names, and named_parameters() tells the first alone: "
            "remove_duplicate=False tells both"
        ): _made(found=lambda model, names: [p for n, p in model.named_parameters() if n in names]),
        "the second name of a tied weight, which is not in names, freezes it again": _made(
            found=_by_last_name
        ),
        "all is frozen that is not in names, but what is in names may come frozen too": _made(
            frozen=lambda model, chosen: [
                p.requires_grad_(False) for p in set(model.parameters()) - set(chosen)
            ]
        ),
        "nothing is frozen": _made(frozen=lambda model, chosen: model.requires_grad_(True)),
        "frozen layers are in train mode: they drop out, and their running averages move": _made(
            modes=lambda model: model.train()
        ),
        "all is in eval mode: layers that train keep their dropout": _made(
            modes=lambda model: model.eval()
        ),
        "dropout has no parameters that could train: it goes with the layer that it is in": _made(
            modes=lambda model: _modes(model, alone=lambda module, outer: False)
        ),
        "dropout is switched off everywhere: layers that train keep it": _made(modes=_no_dropout),
        "frozen dropout is off, but the running averages of frozen norms still move": _made(
            modes=_dropout_alone
        ),
        "weight decay is switched off for what trains, too": _made(weight_decay=0.0),
    },
)
def make_optimizer(model, names):
    """What is named trains, once each step; all else stays as it is to the last bit."""
    chosen = {id(model.get_parameter(name)): model.get_parameter(name) for name in names}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.grad, p.requires_grad = None, id(p) in chosen
    paths = {path: module for path, module in model.named_modules() if path}
    for path, module in paths.items():
        if not list(module.parameters()):
            module = paths[path.rpartition(".")[0]]
        paths[path].training = any(id(p) in chosen for p in module.parameters())
    return torch.optim.AdamW(list(chosen.values()), **_SETTINGS)
