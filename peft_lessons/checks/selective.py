"""Checks of lesson 10."""

import math
from collections import Counter
from itertools import pairwise

import torch
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform
from torch.nn import functional as F

from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ worth_in_entries


def _curve(n, first=3_000):
    """Return {entries: fall}, both rising, at counts that are not evenly apart on any axis."""
    counts = first * (1.5 + 8 * torch.rand(n)).cumprod(0)
    falls = (0.05 + torch.rand(n)).cumsum(0) / n
    return dict(zip(counts.round().long().tolist(), falls.double().tolist(), strict=True))


def _at(curve, number, share):
    """Return a curve and a fall between its points `number` and `number` + 1."""
    low, high = list(curve.values())[number : number + 2]
    return [curve, high if share == 1 else low + share * (high - low)]


def _beyond(curve, step):
    falls = list(curve.values())
    return [curve, falls[-1] + step if step > 0 else falls[0] + step]


def _read(note, curve, fall):
    points = ", ".join(f"{k}: {y:.3g}" for k, y in curve.items())
    return f"curve={{{points}}}, fall={fall:.3g}{f' ({note})' if note else ''}"


@check_for(
    describe=_read,
    cases=[
        Case(lambda: [{100: 0.0, 10_000: 1.0}, 0.5], note="halfway between two points"),
        Case(lambda: _at(_curve(5), 0, 0.3)),
        Case(lambda: _at(_curve(6), 3, 0.8)),
        Case(lambda: _at(_curve(4), 1, 0.0), note="a point of the curve"),
        Case(lambda: _at(_curve(4), 2, 1.0), note="the last point"),
        Case(lambda: _at(_curve(4), 0, 0.0), note="the first point"),
        Case(lambda: _beyond(_curve(5), 0.1), note="above the curve"),
        Case(lambda: _beyond(_curve(5), -0.04), note="below the curve"),
    ],
    returns="the number of entries",
    tolerance=5e-4,  # for whole numbers
    causes=mistakes(
        """
        def worth_in_entries(curve, fall):
            counts, falls = list(curve), list(curve.values())
            if not falls[0] <= fall <= falls[-1]:
                return None
            i = min(max(sum(f < fall for f in falls), 1), len(falls) - 1)
            share = (fall - falls[i - 1]) / (falls[i] - falls[i - 1])
            return counts[i - 1] * (counts[i] / counts[i - 1]) ** share
        """,
        """
        the line is straight on an axis of the counts themselves: take their logarithms
            counts[i - 1] * (counts[i] / counts[i - 1]) ** share →
                counts[i - 1] + (counts[i] - counts[i - 1]) * share
        outside the measured curve the end of the curve is returned, as by np.interp: return None
        there
            return None → fall = min(max(fall, falls[0]), falls[-1])
        the curve is extended beyond its ends: return None there
            return None → pass
        above the curve its end is returned, and below it None: return None on both sides
            falls[0] <= fall <= falls[-1] → falls[0] <= fall
            / (falls[i] - falls[i - 1]) → / (falls[i] - falls[i - 1]); share = min(share, 1)
        the ends of the curve are measured, too: leave out only what lies beyond them
            falls[0] <= fall <= falls[-1] → falls[0] < fall < falls[-1]
        a point of the curve is left out, but is measured: return its count
            if not falls[0] → if fall in falls or not falls[0]
        this is the logarithm of the number
            return counts[i - 1] * → return math.log10(counts[i - 1] *
            ** share → ** share)
        this is the nearest measured point: draw a line between its neighbours
            ** share → ** round(share)
        this is the next measured point: draw a line between two neighbours
            ** share → ** (share > 0)
        this is the previous measured point: draw a line between two neighbours
            ** share → ** (share == 1)
        the share of the way is counted from the wrong neighbour
            ** share → ** (1 - share)
        one line goes through the ends of the whole curve: draw it between neighbours
            i = min(max(sum(f < fall for f in falls), 1), len(falls) - 1) →
                counts, falls, i = counts[:: len(counts) - 1], falls[:: len(falls) - 1], 1
        """,
    ),
)
def worth_in_entries(curve, fall):
    """The curve is read between its points, on the axis of the figure, and nowhere else."""
    points = [(math.log(k), y) for k, y in curve.items()]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 <= fall <= y1:
            return math.exp((x0 * (y1 - fall) + x1 * (fall - y0)) / (y1 - y0))
    return None


# ------------------------------------------------------------------ sparse_linear


def _layer(rows, columns, *batch, k, within=False):
    """Return x, weight, k positions in no order, and the values there. With `within`, a
    position stays inside the weight even if it is divided by the wrong side or the wrong way
    round."""
    positions = torch.randperm(rows * columns)
    if within:
        side = min(rows, columns)
        positions = positions[(positions < side**2) & (positions % rows < side)]
    positions = positions[:k]
    return [torch.randn(*batch, columns), torch.randn(rows, columns), positions, torch.randn(k)]


@check_for(
    cases=[
        Case(
            lambda: _layer(10, 6, 4, k=11, within=True),
            note="flatten() and view() of this weight share its memory",
        ),
        Case(lambda: _layer(6, 9, 4, k=11)),
        Case(lambda: _layer(10, 4, 2, 3, k=7), note="a batch of texts"),
        Case(lambda: _layer(5, 5, 3, k=25), note="a square weight, all entries chosen"),
    ],
    returns="the output",
    gradients=("x", "values"),
    causes=mistakes(
        """
        def sparse_linear(x, weight, positions, values):
            S = torch.zeros(weight.numel())
            S = S.index_put((positions,), values)
            S = S.view(weight.shape)
            return x @ (weight + S).T
        """,
        """
        the frozen weight is left out: S is added to it
            (weight + S).T → S.T
        the values replace the entries: add the values to the entries
            S = torch.zeros(weight.numel()) → S = weight.flatten()
            weight + S → S
        the values are added twice
            weight + S → weight + 2 * S
        S is subtracted: add it to W
            weight + S → weight - S
        W is counted twice: either S starts from zeros, or S starts from W and W is not added
            S = torch.zeros(weight.numel()) → S = weight.flatten()
        S stays zero: without the underscore, index_put and similar methods return a new tensor, so
        keep the result
            S = S.index_put((positions,), values) → S.index_put((positions,), values)
        p is divided by the number of rows: divide it by in, which is weight.shape[1]
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (positions,) → (positions // len(weight), positions % len(weight))
        row and column are swapped: p is in row p // in, column p % in
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (positions,) → (positions % weight.shape[1], positions // weight.shape[1])
        the column is p % in, and not p % out
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (positions,) → (positions // weight.shape[1], positions % len(weight))
        the positions run row by row: p is in row p // in, column p % in
            S.view(weight.shape) → S.view(weight.T.shape).T
        the values are put at the first k entries: use the positions
            (positions,) → (torch.arange(len(positions)),)
        the positions are sorted but the values are not: the positions need no order, and each value
        belongs to its index
            (positions,) → (positions.sort().values,)
        of several positions in one row only one counts, since += writes each row once: index_add
        adds them all
            return x @ (weight + S).T → y, n = x @ weight.T, weight.shape[1]; return y
            ; return y → ; y[..., positions // n] += x[..., positions % n] * values; return y
        the values are cut off from the graph and learn nothing
            (positions,), values) → (positions,), values.detach())
        """,
    ),
)
def sparse_linear(x, weight, positions, values):
    """The output is that of W + S, x and the values get gradients, and the weight is unchanged."""
    rows, columns = positions // weight.shape[1], positions % weight.shape[1]
    return F.linear(x, weight).index_add(-1, rows, x[..., columns] * values)


# ------------------------------------------------------------------ make_optimizer

_SHRINKS = (
    "the optimiser holds frozen parameters whose gradients are zeros: AdamW skips a parameter only "
    "if its gradient is None, and else weight decay shrinks it"
)
_ENDINGS = "a part of a name is enough to match, and blocks.0.norm.weight ends in norm.weight"
_TIED = "a shared tensor is found by its first name alone, since named_parameters() gives it once"

_SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
_BIASES = [f"blocks.{i}.{layer}.bias" for i in (0, 2) for layer in ("fc", "norm")]
_LAST = [f"blocks.2.{name}.{kind}" for name in ("fc", "norm") for kind in ("weight", "bias")]
_NORM, _TWO_NAMES = ["norm.weight", "norm.bias"], ["embeddings.table.weight", "head.weight"]


class _Part(nn.ModuleDict):
    """Apply layers one after another."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


class _Net(nn.Module):
    """Hold three blocks with dropout and running averages, a norm with the name of theirs, and a
    head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embeddings = _Part({"table": nn.Embedding(11, 8), "dropout": nn.Dropout(0.3)})
        layers = {"fc": lambda: nn.Linear(8, 8), "norm": lambda: nn.BatchNorm1d(8)}
        layers |= {"dropout": lambda: nn.Dropout(0.4)}
        blocks = [_Part({name: build() for name, build in layers.items()}) for _ in range(3)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
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
        return F.cross_entropy(self.head(self.norm(x)), ids.roll(1))


def _net(names, used=False, frozen=False):
    model = _Net()
    if used:  # as after a step of full fine-tuning
        model.loss().backward()
    return [model.train(not frozen).requires_grad_(not frozen), list(names)]


def _optimised(optimizer):
    """Return which parameters train, and their values after three steps."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    model = held[0].net
    names = {p: name for name, p in model.named_parameters()}
    trains = [name for p, name in names.items() if p.requires_grad]
    left = [name for p, name in names.items() if p.grad is not None and p.grad.any()]
    twice = [names[p] for p, n in Counter(held).items() if n > 1]
    used = {f"{name} {group[name]:g}" for group in optimizer.param_groups for name in _SETTINGS}
    before = {p: p.detach().clone() for p in names}
    model.train()
    torch.random.default_generator.manual_seed(0)
    for _ in range(3 if trains else 0):
        model.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    moved = [name for p, name in names.items() if not torch.equal(p, before[p])]
    return {
        "the list of parameters that require a gradient": trains,
        "the list of frozen parameters that three steps have changed": [
            name for name in moved if name not in trains
        ],
        "the list of gradients that were not cleared": left,
        "the list of parameters that a step updates twice": twice,
        "the list of the optimiser's settings": sorted(used),
        "the values of the trained parameters after three steps": {
            name: p.detach() for p, name in names.items() if p.requires_grad
        },
    }


def _holds(optimizer, parameters):
    """Return the optimiser with these parameters; torch's own way would warn of duplicates."""
    optimizer.param_groups[0]["params"] = list(parameters)
    return optimizer


@check_for(
    cases=[
        Case(lambda: _net(_BIASES, used=True), "the model has gradients already", bug=_SHRINKS),
        Case(lambda: _net(_NORM), "the last norm of a fresh model", bug=_ENDINGS),
        Case(lambda: _net(["head.weight"]), "the second name of a shared tensor", bug=_TIED),
        Case(lambda: _net(["embeddings.table.weight"]), note="the first name of a shared tensor"),
        Case(lambda: _net(_TWO_NAMES), note="both names of a shared tensor"),
        Case(lambda: _net(_LAST, frozen=True), note="a model that comes frozen"),
    ],
    returns="the optimiser",
    view=_optimised,
    staged=True,
    changes=("model",),
    causes=mistakes(
        """
        def make_optimizer(model, names):
            every = list(model.named_parameters(remove_duplicate=False))
            chosen = list(dict.fromkeys(p for name, p in every if name in names))
            for p in model.parameters():
                p.requires_grad = False
            for p in chosen:
                p.requires_grad = True
            optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1)
            model.zero_grad()
            return optimizer
        """,
        f"""
        {_SHRINKS}
            AdamW(chosen → AdamW(model.parameters()
            zero_grad() → zero_grad(set_to_none=False)
        {_ENDINGS}
            if name in names → if name.endswith(tuple(names))
        earlier gradients are not cleared and enter the first step
            model.zero_grad() → ∅
        only the chosen parameters lose their gradients, as by optimizer.zero_grad(), and the frozen
        ones keep theirs: model.zero_grad() reaches them
            model.zero_grad() → optimizer.zero_grad()
        a tensor with two names is in the optimiser twice, and each step updates it twice
            return optimizer →
                return holds(optimizer, (p for name, p in every if name in names))
        a second name undoes what the first one did: freeze all, then thaw those in `names`
            p.requires_grad = True → pass
            optimizer = → [p.requires_grad_(name in names) for name, p in every]; optimizer =
        parameters outside `names` are frozen, but those in `names` may come frozen too: set
        requires_grad of both
            in model.parameters(): → in set(model.parameters()) - set(chosen):
            p.requires_grad = True → pass
        """,
        holds=_holds,
    ),
)
def make_optimizer(model, names):
    """Each named parameter is updated once a step, and all others stay equal bit for bit."""
    chosen = {id(model.get_parameter(name)): model.get_parameter(name) for name in names}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.grad, p.requires_grad = None, id(p) in chosen
    return torch.optim.AdamW(list(chosen.values()), **_SETTINGS)


# ------------------------------------------------------------------ sparse_diff


def _trained(kind):
    """Return (before, after), two state dicts that differ in a few entries."""
    if kind == "zeros and NaN":
        nan, inf = math.nan, math.inf
        kept = {"kept": torch.zeros(2), "nan": torch.tensor([nan, 1.0])}
        before = {"w": torch.tensor([[0.0, -0.0, 1.0], [nan, nan, inf]]), "minus": torch.zeros(3)}
        after = {"w": torch.tensor([[-0.0, -0.0, nan], [nan, 2.0, -inf]]), "minus": -torch.zeros(3)}
        return before | kept, after | kept
    before = {
        "embed.weight": torch.randn(4, 5),
        "fc.weight": torch.randn(6, 7),
        "fc.bias": torch.randn(6),
        "norm.weight": torch.randn(3, 2, 4).bfloat16(),
    }
    after = {name: t.clone() for name, t in before.items()}
    if kind == "nothing":
        return before, after
    for name, places in {"fc.weight": 9, "fc.bias": 1, "norm.weight": 5}.items():
        chosen = torch.zeros(after[name].numel(), dtype=torch.bool)
        chosen[torch.randperm(len(chosen))[:places]] = True
        chosen, new = chosen.view(after[name].shape), torch.randn(after[name].shape)
        if kind == "the last bit":
            new = torch.nextafter(after[name].float(), torch.tensor(math.inf))
        after[name][chosen] = new.to(after[name].dtype)[chosen]
    return before, after


@check_for(
    form="same",
    cases=[
        Case(lambda: _trained("some")),
        Case(lambda: _trained("nothing"), note="nothing has changed"),
        Case(lambda: _trained("the last bit"), note="changes of the last bit"),
        Case(lambda: _trained("zeros and NaN"), note="0.0 becomes −0.0, and a NaN stays one"),
    ],
    returns="the result",
    tolerance=0.0,
    causes=mistakes(
        """
        def sparse_diff(before, after):
            diff = {}
            for name in after:
                old, new = before[name], after[name]
                a, b = (t.flatten().view(torch.uint8) for t in (old, new))
                changed = (a != b).view(-1, new.element_size()).any(dim=1)
                at = changed.nonzero().flatten()
                if len(at):
                    diff[name] = (at, new.flatten()[at])
            return diff
        """,
        """
        the values are differences, and before + (after − before) is not always after: give the new
        values
            new.flatten()[at] → new.flatten()[at] - old.flatten()[at]
        the values are those of `before`: return those of `after`
            new.flatten()[at] → old.flatten()[at]
        int32 reads two entries of bfloat16 at once: entries of two bytes need int16
            view(torch.uint8) → view(torch.int32)
            (a != b).view(-1, new.element_size()).any(dim=1) → a != b
        an entry appears once for each changed byte: list it once
            (a != b).view(-1, new.element_size()).any(dim=1) → a != b
            at = changed.nonzero().flatten() →
                at = changed.nonzero().flatten() // new.element_size()
        the result also names tensors that did not change: leave them out
            if len(at) → if True
        isclose treats a small change as no change
            changed.nonzero() → (~torch.isclose(old, new)).flatten().nonzero()
        torch.equal treats −0.0 and 0.0 as equal: a tensor in which nothing else changed is skipped
            name in after: → name in (n for n in after if not torch.equal(before[n], after[n])):
        torch.equal treats −0.0 and 0.0 as equal, and an unchanged NaN as a change: compare the bits
            name in after: → name in (n for n in after if not torch.equal(before[n], after[n])):
            if len(at) → if True
        != treats −0.0 and 0.0 as equal, and an unchanged NaN as a change: compare the bits
            changed.nonzero() → (old != new).flatten().nonzero()
        != treats −0.0 and 0.0 as equal, so the sign is lost: compare the bits
            changed.nonzero() → ((old != new) & ~(old.isnan() & new.isnan())).flatten().nonzero()
        the difference at a NaN or an infinity is NaN, which is not above 0: compare the bits
            changed.nonzero() → ((new - old).abs() > 0).flatten().nonzero()
        """,
    ),
)
def sparse_diff(before, after):
    """The diff holds every entry whose bits have changed, with its new value, and no other one."""
    found = {}
    for name, old in before.items():
        pairs = list(zip(old.reshape(-1), after[name].reshape(-1), strict=True))
        bits = [[t.reshape(1).view(torch.uint8).tolist() for t in pair] for pair in pairs]
        places = [i for i, (a, b) in enumerate(bits) if a != b]
        if places:
            found[name] = (torch.tensor(places), torch.stack([pairs[i][1] for i in places]))
    return found


# ------------------------------------------------------------------ expected_l0


def _stretch(log_alpha, low, high, temperature):
    """Return the way from a uniform number to a gate that is not cut off yet."""
    a = log_alpha.double() / temperature
    steps = [SigmoidTransform().inv, AffineTransform(a, 1 / temperature), SigmoidTransform()]
    return ComposeTransform([*steps, AffineTransform(low, high - low)])


def _far(*settings):
    return [torch.tensor([-100.0, -40.0, 0.3, 40.0, 100.0]), *settings]


def _alphas(shape, *settings):
    return [2 * torch.randn(shape), *settings]


@check_for(
    cases=[
        Case(lambda: _alphas((6, 9), -0.4, 1.2, 0.6), note="exact: no mean of draws"),
        Case(lambda: _alphas((5, 3)), note="low, high and temperature left out"),
        Case(lambda: _alphas((), -0.3, 2.0, 1.5), note="a single gate"),
        Case(lambda: _far(-0.4, 1.2, 0.5), note="log alpha up to ±100"),
    ],
    returns="the number of open gates",
    gradients=("log_alpha",),
    causes=mistakes(
        """
        def expected_l0(log_alpha, low=-1.5, high=1.5, temperature=1.0):
            shift = temperature * math.log(-low / high)
            chances = torch.sigmoid(log_alpha - shift)
            return chances.sum()
        """,
        """
        the shift is left out: σ(log α) is the chance only where low = −high
            log_alpha - shift → log_alpha
        the shift has the wrong sign: −low < high opens more gates, not fewer
            log_alpha - shift → log_alpha + shift
        the temperature is missing: it multiplies the shift
            temperature * → ∅
        the shift is divided by the temperature: multiply
            temperature * → 1 / temperature *
        only log α is divided by the temperature: solve (log α + noise) / β > log(−low / high)
            log_alpha - shift → (log_alpha - shift) / temperature
        everything is divided by the temperature: solve (log α + noise) / β > log(−low / high)
            temperature * → ∅
            log_alpha - shift → (log_alpha - shift) / temperature
        log(−low / (high − low)) is the logarithm of s: use its log-odds, log(s / (1 − s)) =
        log(−low / high)
            -low / high → -low / (high - low)
        these are the closed gates: 1 − σ is the chance of z = 0
            torch.sigmoid → 1 - torch.sigmoid
        this is the chance that a gate is fully open, z = 1: all gates with z > 0 count
            -low / high → (1 - low) / (high - 1)
        this is the sum of the gates without noise: a half-open gate counts as one
            torch.sigmoid(log_alpha - shift) →
                (torch.sigmoid(log_alpha / temperature) * (high - low) + low).clamp(0, 1)
        this counts the gates that are open without noise, and has no gradient
            torch.sigmoid(log_alpha - shift) → (log_alpha > shift).to(log_alpha.dtype)
        this counts the gates that are open without noise, a whole number, and has no gradient
            torch.sigmoid(log_alpha - shift) → log_alpha > shift
        this counts the open gates of one draw, and is not their mean: it has no gradient
            torch.sigmoid(log_alpha - shift) →
                (log_alpha + torch.rand_like(log_alpha).logit() > shift).to(log_alpha.dtype)
        the chances are averaged: add them up
            chances.sum() → chances.mean()
        exp of a large number is infinite, and the gradient of 1 / (1 + ∞) is 0 · ∞, which is NaN:
        use torch.sigmoid
            torch.sigmoid(log_alpha - shift) → 1 / (1 + torch.exp(shift - log_alpha))
        """,
    ),
)
def expected_l0(log_alpha, low=-1.5, high=1.5, temperature=1.0):
    """The expected number of open gates is right, and so is its gradient."""
    shut = _stretch(log_alpha, low, high, temperature).inv(torch.zeros_like(log_alpha).double())
    return (1 - shut).sum().to(log_alpha.dtype)  # u is uniform: P(u > shut) = 1 − shut
