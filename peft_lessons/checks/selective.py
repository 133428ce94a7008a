"""Checks of lesson 10."""

import math
from collections import Counter

import torch
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform
from torch.nn import functional as F

from .kit import Case, check_for, refused
from .mistakes import mistakes

# ------------------------------------------------------------------ select_bitfit


class _Called(nn.Module):
    """Hold biases and other parameters with bias in their names, not in alphabetical order."""

    def __init__(self):
        super().__init__()
        self.offset, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.relative_attention_bias = nn.Embedding(6, 2)  # a table, as T5 has one
        self.bias_scale, self.q_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.up, self.norm = nn.Linear(4, 6), nn.LayerNorm(4)
        self.scores = nn.ModuleDict({"bias": nn.Linear(4, 3, bias=False)})
        self.bias_net = nn.Linear(4, 3)
        self.attn = nn.Module()  # with a buffer, as GPT-2 called its causal mask
        self.attn.register_buffer("bias", torch.ones(3, 3).tril())


def _tied_biases():
    """Return a head that also holds its decoder's bias, as BERT's does, and a layer used twice."""
    head, layer = nn.Module(), nn.Linear(4, 4)
    head.decoder = nn.Linear(4, 9)
    head.bias = head.decoder.bias
    return nn.ModuleDict({"first": layer, "second": layer, "head": head})


def _biasless():
    table = nn.Embedding(6, 2)
    return nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "relative_attention_bias": table})


@check_for(
    cases=[
        Case(lambda: [_Called()], note="a table, a buffer and a scale have bias in their names"),
        Case(lambda: [nn.TransformerEncoderLayer(8, 2, 12)], note="one of them is in_proj_bias"),
        Case(lambda: [nn.Linear(4, 3)], note="a layer alone"),
        Case(lambda: [_tied_biases()], note="a bias with two names, and a layer used twice"),
        refused(lambda: [_biasless()], "", "a model without biases, but with T5's table"),
    ],
    returns="the list",
    causes=mistakes(
        """
        def select_bitfit(model):
            names = []
            for name, p in model.named_parameters():
                last = name.split(".")[-1]
                if last == "bias" or last.endswith("_bias"):
                    names.append(name)
            if not names:
                raise ValueError("this model has no bias that BitFit could train")
            return names
        """,
        """
        the word bias somewhere in a name does not make a bias: the last part of the name counts
            last == "bias" or last.endswith("_bias") → "bias" in name
        a module called bias does not make its parameters biases: the last part of the name counts
            last == "bias" or last.endswith("_bias") → "bias" in name.split(".")
        the last part of the name must end in bias: bias_scale is not a bias
            last == "bias" or last.endswith("_bias") → "bias" in last
        q_bias and in_proj_bias are biases too: the last part may also end in _bias
            or last.endswith("_bias") → ∅
        q_bias is a bias too: every last part that ends in _bias counts, not only in_proj_bias
            last.endswith("_bias") → last == "in_proj_bias"
        not every vector is a bias: the weights of norms are vectors too
            last == "bias" or last.endswith("_bias") → p.dim() == 1
        not every parameter without weight in its name is a bias: the last part of the name counts
            last == "bias" or last.endswith("_bias") → not last.endswith("weight")
        only the last part of the name is returned: return full names
            names.append(name) → names.append(last)
        not every bias's name ends in .bias: bias alone has no dot, and q_bias has an underscore
            last == "bias" or last.endswith("_bias") → name.endswith(".bias")
        a bias of the model itself, or of a layer alone, has no dot before its name
            last == "bias" or last.endswith("_bias") → name.endswith((".bias", "_bias"))
        norms have biases too
            last == "bias" or last.endswith("_bias") → last.endswith("bias") and "norm" not in name
        only the biases of nn.Linear are looked for
            last == "bias" or last.endswith("_bias") →
                last == "bias" and isinstance(model.get_submodule(name[:-5]), nn.Linear)
        a buffer is not a parameter: state_dict() lists both
            model.named_parameters() → model.state_dict().items()
        a tied bias is listed under each of its names
            named_parameters() → named_parameters(remove_duplicate=False)
        the names are sorted: keep the model's order
            return names → return sorted(names)
        """,
    ),
)
def select_bitfit(model):
    """The biases of a model, each once and in its order; a model without any is refused."""
    names, seen = [], set()
    for path, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) not in seen and (own == "bias" or own.endswith("_bias")):
                names.append(f"{path}.{own}" if path else own)
            seen.add(id(p))
    return names


# ------------------------------------------------------------------ sparse_linear


def _layer(rows, columns, *batch, k, within=False):
    """Return x, weight, bias, k positions in no order, and the values there. With `within`, a
    position stays inside the weight even if it is divided by the wrong side or the wrong way
    round."""
    positions = torch.randperm(rows * columns)
    if within:
        side = min(rows, columns)
        positions = positions[(positions < side**2) & (positions % rows < side)]
    positions = positions[:k]
    weight, bias = torch.randn(rows, columns), torch.randn(rows)
    return [torch.randn(*batch, columns), weight, bias, positions, torch.randn(k)]


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
        def sparse_linear(x, weight, bias, indices, values):
            S = torch.zeros(weight.numel())
            S = S.index_put((indices,), values)
            S = S.view(weight.shape)
            return x @ (weight + S).T + bias
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
            S = S.index_put((indices,), values) → S.index_put((indices,), values)
        p is divided by the number of rows: divide it by in, which is weight.shape[1]
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (indices,) → (indices // len(weight), indices % len(weight))
        row and column are swapped: p is in row p // in, column p % in
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (indices,) → (indices % weight.shape[1], indices // weight.shape[1])
        the column is p % in, and not p % out
            torch.zeros(weight.numel()) → torch.zeros(weight.shape)
            (indices,) → (indices // weight.shape[1], indices % len(weight))
        the positions run row by row: p is in row p // in, column p % in
            S.view(weight.shape) → S.view(weight.T.shape).T
        the values are put at the first k positions: use the indices
            (indices,) → (torch.arange(len(indices)),)
        the indices are sorted but the values are not: the indices need no order, and each value
        belongs to its index
            (indices,) → (indices.sort().values,)
        the bias is left out
            + bias → ∅
        the bias is added twice: F.linear(x, weight, bias) has it already
            + bias → + 2 * bias
        the values are cut off from the graph and learn nothing
            (indices,), values) → (indices,), values.detach())
        """,
    ),
)
def sparse_linear(x, weight, bias, indices, values):
    """The output is that of W + S, x and the values get gradients, and the weight is unchanged."""
    rows, columns = indices // weight.shape[1], indices % weight.shape[1]
    return F.linear(x, weight, bias).index_add(-1, rows, x[..., columns] * values)


# ------------------------------------------------------------------ hard_concrete


def _drawn(shape, *settings, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype), *settings]


def _with_zeros():
    log_alpha, u = _drawn((4, 6))
    u[0, :3] = 0.0
    return [log_alpha, u]


def _far(*settings):
    return [torch.tensor([-100.0, -40.0, 0.3, 40.0, 100.0]), torch.rand(5), *settings]


@check_for(
    cases=[
        Case(lambda: _drawn((6, 9), -0.4, 1.2, 0.6)),
        Case(lambda: _drawn((7, 5)), note="low, high and temperature left out"),
        Case(lambda: _drawn((), -0.3, 2.0, 1.5, dtype=torch.float64), note="a single gate"),
        Case(_with_zeros, note="torch.rand may draw exactly 0"),
        Case(lambda: _far(-0.4, 1.2, 0.5), note="log alpha up to ±100"),
    ],
    returns="the gate",
    gradients=("log_alpha",),
    causes=mistakes(
        """
        def hard_concrete(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
            noise = torch.logit(u)
            s = torch.sigmoid((log_alpha + noise) / temperature)
            z = low + (high - low) * s
            return z.clamp(0, 1)
        """,
        """
        the temperature is left out
            / temperature → ∅
        only the noise is divided by the temperature: log alpha is too
            (log_alpha + noise) / temperature → log_alpha + noise / temperature
        only log alpha is divided by the temperature: the noise is too
            (log_alpha + noise) / temperature → log_alpha / temperature + noise
        the temperature multiplies: divide by it
            / temperature → * temperature
        the noise is subtracted: add it, so that a large u opens the gate
            log_alpha + noise → log_alpha - noise
        log u alone is added: its log-odds are log u − log(1 − u)
            torch.logit(u) → torch.log(u)
        u is added as it is: add its log-odds, log u − log(1 − u)
            torch.logit(u) → u
        u is not used: this is the gate as it is without noise
            torch.logit(u) → 0
        the sigmoid is missing
            torch.sigmoid( → (
        the gate is not stretched, so it is never exactly 0 or 1
            low + (high - low) * s → s
        the stretch is too short: s is multiplied by high − low, not by high
            (high - low) * s → high * s
        the stretch has the wrong width: s is multiplied by high − low
            (high - low) * s → (high + low) * s
        the stretch begins at −low: it begins at low, so add low
            low + (high - low) → -low + (high - low)
        low and high are not used: −1.5 and 1.5 are only their default values
            low + (high - low) * s → 3 * s - 1.5
        every gate is 0 or 1 and has no gradient: keep z where it lies between 0 and 1
            z.clamp(0, 1) → (z > 0).to(z.dtype)
        the stretched gate is not clamped: clamp it to [0, 1]
            z.clamp(0, 1) → z
        exp of a large number is infinite, and the gradient of 1 / (1 + ∞) is 0 · ∞, which is NaN:
        use torch.sigmoid
            torch.sigmoid((log_alpha + noise) / temperature) →
                1 / (1 + torch.exp(-(log_alpha + noise) / temperature))
        """,
    ),
)
def hard_concrete(log_alpha, u, low=-1.5, high=1.5, temperature=1.0):
    """Gates and gradients are right for every stretch and temperature."""
    stretched = _stretch(log_alpha, low, high, temperature)(u.double())
    return torch.minimum(stretched.relu(), torch.ones_like(stretched)).to(log_alpha.dtype)


def _stretch(log_alpha, low, high, temperature):
    """Return the way from a uniform number to a gate that is not cut off yet."""
    a = log_alpha.double() / temperature
    steps = [SigmoidTransform().inv, AffineTransform(a, 1 / temperature), SigmoidTransform()]
    return ComposeTransform([*steps, AffineTransform(low, high - low)])


# ------------------------------------------------------------------ expected_l0


def _alphas(shape, *settings):
    return [2 * torch.randn(shape), *settings]


@check_for(
    cases=[
        Case(lambda: _alphas((6, 9), -0.4, 1.2, 0.6), note="exact: no mean of draws"),
        Case(lambda: _alphas((5, 3)), note="low, high and temperature left out"),
        Case(lambda: _alphas((), -0.3, 2.0, 1.5), note="a single gate"),
        Case(lambda: [_far()[0], -0.4, 1.2, 0.5], note="log alpha up to ±100"),
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


# ------------------------------------------------------------------ sparse_diff


def _trained(kind):
    """Return (before, after), two state dicts that differ in a few entries."""
    if kind == "numbers of other kinds":
        kept = {"seen": torch.arange(6), "empty": torch.zeros(0, 3)}
        before = {"steps": torch.tensor(7), "on": torch.ones(2, 2).bool()}
        return before | kept, {"steps": torch.tensor(8), "on": torch.eye(2).bool()} | kept
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
            new = torch.nextafter(after[name].float(), torch.tensor(math.inf))
        after[name][chosen] = new.to(after[name].dtype)[chosen]
    return before, after


@check_for(
    form="same",
    cases=[
        Case(lambda: _trained("some")),
        Case(lambda: _trained("nothing"), note="nothing has changed"),
        Case(lambda: _trained("the last bit"), note="changes of the last bit"),
        Case(lambda: _trained("transposed"), note="tensors that are views of transposed ones"),
        Case(lambda: _trained("zeros and NaN"), note="0.0 becomes −0.0, and a NaN stays one"),
        Case(lambda: _trained("numbers of other kinds"), note="counter, mask, empty tensor"),
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
    """The diff holds every entry whose bits have changed, with its new value, and no other
    entry."""
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


def _misplaced(place, at=0, name="fc.weight"):
    """Return a diff with a wrong index among right ones, or for a wrong name."""
    before, diff = _to_apply("some")
    diff["fc.weight"][0][at] = place
    return [before, {name: diff["fc.weight"]}]


def _overwrites_the_first(apply, before, diff):
    """Overwrite the first result, which must not change the next one."""
    for tensor in apply(before, diff).values():
        tensor.data.zero_()
    return [before, diff]


@check_for(
    cases=[
        Case(lambda: _to_apply("some")),
        Case(
            lambda: _to_apply("transposed"),
            note="transposed views: what is written into reshape(-1) goes into a copy",
        ),
        Case(lambda: _to_apply("numbers of other kinds"), note="counter, mask, empty tensor"),
        Case(
            lambda: _to_apply("some"),
            note="a second time, after all of the first result was set to 0",
            earlier=_overwrites_the_first,
        ),
        refused(lambda: _misplaced(0, name="head.weight"), "", "a name that before does not have"),
        refused(lambda: _misplaced(42, at=-1), "", "an index of 42 among 42 entries"),
        refused(lambda: _misplaced(-1), "", "an index of −1"),
    ],
    returns="the result",
    tolerance=0.0,
    causes=mistakes(
        """
        def apply_sparse_diff(before, diff):
            for name, (at, _) in diff.items():
                if name not in before:
                    raise ValueError(f"before has no {name}")
                if not all(0 <= i < before[name].numel() for i in at.tolist()):
                    raise ValueError(f"{name}: an index is out of range")
            after = {name: old.clone() for name, old in before.items()}
            for name, (at, values) in diff.items():
                flat = after[name].flatten()
                flat[at] = values
                after[name] = flat.view(before[name].shape)
            return after
        """,
        """
        the values are added: they are the new values and replace the old ones
            flat[at] = values → flat[at] += values
        unchanged entries are 0: start from the tensor in `before`
            after[name].flatten() → torch.zeros_like(after[name]).flatten()
        everything that did not change is 0: start from copies of the tensors in `before`
            old.clone() → torch.zeros_like(old)
        the result holds only the changed tensors: it must hold all other names too
            old.clone() for name, old in before.items() → before[name].clone() for name in diff
        flatten() and reshape() copy such a tensor, so what you write there is lost: write into the
        copy, then reshape the copy back
            after[name] = flat.view(before[name].shape) → ∅
        unchanged tensors share memory with `before`: the result needs copies
            old.clone() → old
            after[name].flatten() → after[name].clone().flatten()
        """,
    ),
)
def apply_sparse_diff(before, diff):
    """The trained model is restored bit for bit, and a diff that does not fit is refused."""
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
    """Apply layers one after another."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


class _Net(nn.Module):
    """Hold three blocks with dropout and running averages, and a head tied to the embedding."""

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
    counts = Counter(names[p] for p in held)
    old = {name: p.grad for p, name in names.items() if p.grad is not None}
    left = [name if grad.any() else f"{name} (zeros)" for name, grad in old.items()]
    before = {p: p.detach().clone() for p in names}
    model.train()
    torch.random.default_generator.manual_seed(0)
    for _ in range(3 if trains else 0):
        model.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    moved = [name for p, name in names.items() if not torch.equal(p, before[p])]
    used = {f"{name} {group[name]:g}" for group in optimizer.param_groups for name in _SETTINGS}
    return {
        "the list of parameters that require a gradient": trains,
        "the list of frozen parameters that three steps have changed": [
            name for name in moved if name not in trains
        ],
        "the list of parameters in the optimiser": sorted(
            name if n == 1 else f"{name} ({n} times)" for name, n in counts.items()
        ),
        "the list of gradients that were not cleared": left,
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
        Case(lambda: _net(_BIASES, used=True), note="the model has gradients from a step before"),
        Case(lambda: _net(_LAST), note="the last block of a fresh model"),
        Case(lambda: _net(["embeddings.table.weight"]), note="a tied weight, by its name"),
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
        """
        frozen in name only: the optimiser holds the frozen parameters too, and AdamW decays every
        parameter that has a gradient, even a gradient of zeros
            AdamW(chosen → AdamW(model.parameters()
            zero_grad() → zero_grad(set_to_none=False)
        the optimiser holds the frozen parameters too: give it the trainable parameters only,
        whatever gradients the others may get
            AdamW(chosen → AdamW(model.parameters()
        set_to_none=False leaves gradients of zeros: they take as much memory as any gradient, and
        an optimiser skips a parameter only if its gradient is None
            zero_grad() → zero_grad(set_to_none=False)
        earlier gradients are not cleared and enter the first step
            model.zero_grad() → ∅
        optimizer.zero_grad() clears only the parameters in the optimiser, so the frozen ones keep
        their gradients: model.zero_grad() reaches them
            model.zero_grad() → optimizer.zero_grad()
        a tied weight is in the optimiser twice, and each step updates it twice
            return optimizer → return holds(optimizer, (p for _, p in every if p.requires_grad))
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
