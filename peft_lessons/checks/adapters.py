"""Checks of lesson 06."""

import copy
import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from ..methods.adapters import Adapter, Bottleneck
from .calls import gradients_or_zeros, seeded
from .compare import difference, state
from .kit import Case, Refused, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ ResidualAdapter

_FOUR = ["down.bias", "down.weight", "up.bias", "up.weight"]
_OF_LINEAR = "bias", "weight"
_STATES = (
    "the list of trainable parameters",
    "the list of their shapes",
    "the result right after construction (h itself)",
    "the list of what three steps of training have changed",
    "the result once all four tensors have values",
)


def _lived(module):
    """Return what a ResidualAdapter holds and computes, from its start through a few steps of
    training; a part that earlier parts make impossible is None."""
    seen, (names, shapes, first, moved, output) = dict.fromkeys(_STATES), _STATES
    # Both layers may also be part of an nn.Sequential, under other names.
    layers = {name: getattr(module, name, None) for name in ("down", "up")}
    four = {f"{n}.{p}": getattr(layer, p, None) for n, layer in layers.items() for p in _OF_LINEAR}
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    others = [n for n, p in trained.items() if all(p is not q for q in four.values())]
    seen[names] = sorted(n for n, p in four.items() if getattr(p, "requires_grad", False)) + others
    if seen[names] != _FOUR:
        return seen
    seen[shapes] = [f"{name} {tuple(four[name].shape)}" for name in _FOUR]
    torch.random.default_generator.manual_seed(0)
    h, target = (torch.randn(4, 6, len(four["up.bias"])) for _ in range(2))
    with torch.no_grad():
        seen[first] = module(h.clone())
    if not isinstance(seen[first], torch.Tensor) or seen[first].shape != h.shape:
        return seen
    start = {name: p.detach().clone() for name, p in four.items()}
    for _ in range(3):
        with torch.enable_grad():
            gradients = gradients_or_zeros(module(h.clone()) - target, list(four.values()))
        with torch.no_grad():
            for p, gradient in zip(four.values(), gradients, strict=True):
                p -= 0.1 * gradient
    seen[moved] = [name for name in _FOUR if not torch.equal(four[name], start[name])]
    with torch.no_grad():
        for name in _FOUR:
            four[name].copy_(torch.randn(four[name].shape) / 2)
        seen[output] = module(h.clone())
    return seen


def _constructed(note, d, m, f):
    return f"d = {d}, m = {m}, f = {getattr(f, '__name__', f)}{f' ({note})' if note else ''}"


@check_for(
    cases=[
        (24, 5, F.gelu),
        (16, 4, F.relu),
        Case(lambda: [12, 3, torch.sigmoid], note="f(0) is 1/2"),
        (10, 6, torch.tanh),
        (8, 8, F.silu),
    ],
    returns="the module",
    view=_lived,
    staged=True,
    describe=_constructed,
    verified=lambda facts: f"Verified: {facts[0]}.",
    causes=mistakes(
        """
        class ResidualAdapter(nn.Module):
            def __init__(self, d, m, f):
                super().__init__()
                self.down = nn.Linear(d, m)
                self.up = nn.Linear(m, d)
                self.f = f
                nn.init.zeros_(self.up.weight)
                nn.init.zeros_(self.up.bias)

            def forward(self, h):
                low = self.f(self.down(h))
                return h + self.up(low)
        """,
        """
        nothing starts at zero, so the model changes before it has learned anything
            nn.init.zeros_(self.up.weight) → pass
            nn.init.zeros_(self.up.bias) → pass
        the bias of the way up does not start at zero, and a(h) is this bias
            nn.init.zeros_(self.up.bias) → pass
        a narrow start is near the identity, but not the identity
            nn.init.zeros_(self.up.weight) → nn.init.normal_(self.up.weight, std=0.01)
        all starts at zero: the gradient of each matrix is a product with the other one, so neither
        ever learns
            nn.init.zeros_(self.up.weight) → [nn.init.zeros_(p) for p in self.down.parameters()]
            nn.init.zeros_(self.up.bias) → [nn.init.zeros_(p) for p in self.up.parameters()]
        W_down starts at zero and W_up at random: a ReLU has no slope at 0, so W_down never learns,
        and where f(0) is not 0 the adapter is no identity
            nn.init.zeros_(self.up.weight) → nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.up.bias) →
                nn.init.zeros_(self.up.bias); nn.init.zeros_(self.down.bias)
        h is missing: the adapter adds its output to h
            h + self.up(low) → self.up(low)
        h is added twice
            h + self.up(low) → 2 * h + self.up(low)
        f is missing between the two matrices
            self.f(self.down(h)) → self.down(h)
        f comes after the second matrix: apply it between the two
            self.f(self.down(h)) → self.down(h)
            self.up(low) → self.f(self.up(low))
        f is applied to the sum: add h last
            self.f(self.down(h)) → self.down(h)
            h + self.up(low) → self.f(h + self.up(low))
        this is always a GELU: apply the f that is passed
            self.f = f → self.f = F.gelu
        the biases are missing: each of the two layers has one
            nn.Linear(d, m) → nn.Linear(d, m, bias=False)
            nn.Linear(m, d) → nn.Linear(m, d, bias=False)
            nn.init.zeros_(self.up.bias) → pass
        the two layers are exchanged: down goes from d to m
            nn.Linear(d, m) → nn.Linear(m, d)
            self.up = nn.Linear(m, d) → self.up = nn.Linear(d, m)
            low = self.f(self.down(h)) → return h
        W_up is frozen and stays zero
            self.f = f → self.f = f; self.up.weight.requires_grad_(False)
        """,
    ),
)
class ResidualAdapter(nn.Module):
    """The adapter is the identity at the start for every f, and all four tensors learn."""

    def __init__(self, d, m, f):
        super().__init__()
        self.down, self.up, self.f = nn.Linear(d, m), nn.Linear(m, d), f
        for p in self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, h):
        result = h + self.up.bias
        for row, b, column in zip(  # one inner unit after another
            self.down.weight, self.down.bias, self.up.weight.T, strict=True
        ):
            result = result + self.f((h * row).sum(-1, keepdim=True) + b) * column
        return result


# ------------------------------------------------------------------ identify

_KINDS = ("houlsby", "pfeiffer", "parallel")
_ZERO = (
    "W_up was zero when the sublayer was called: then an adapter returns the same whatever it "
    "reads, and so do the three kinds"
)
_CONSTANT = (
    "all rows of W_up were the same when the sublayer was called: the adapter then adds one number "
    "to all entries of a vector, and the layer norm takes that away"
)
_EQUAL = "x and h were the same, so it made no difference which of the two the adapter reads"


class _Box:
    """Hold the end of a sublayer with an adapter of a kind, or of none of the three, and note how
    it is called."""

    def __init__(self, kind: str, d: int, m: int, activation: str, new: bool) -> None:
        self.kind, self.notes = kind, []
        self.called = f"{'a new' if new else 'a trained'} adapter, d = {d}, m = {m}"
        self.name = kind if kind in _KINDS else None
        self.norm, self.adapter = nn.LayerNorm(d), Bottleneck(d, m, activation)
        with torch.no_grad():
            for p in (*self.norm.parameters(), *(() if new else self.adapter.parameters())):
                p.add_(0.3 * torch.randn(p.shape))

    def sublayer(self, x, h):
        rows = self.adapter.up.weight.detach()
        flat = len(rows) > 1 and rows.std(dim=0).max() < 1e-6
        note = _CONSTANT if flat else _EQUAL if torch.equal(x, h) else ""
        self.notes.append(note if rows.any() else _ZERO)
        norm, adapter, both = self.norm, self.adapter, x + h
        match self.kind:
            case "houlsby":
                return norm(both + adapter(h))
            case "pfeiffer":
                return norm(both + adapter(norm(both)))
            case "parallel":
                return norm(both + adapter(x))
            case "after the last norm":
                return norm(both) + adapter(norm(both))
            case "reads x + h":
                return norm(both + adapter(both))
        return norm(both + h + adapter(h))  # the residual twice


def _boxes():
    sizes = (
        ("after the last norm", 24, 4, "gelu", True),
        ("reads x + h", 16, 6, "tanh", True),
        ("adds h twice", 32, 3, "relu", False),
    )
    return [_Box(kind, *size) for other, *size in sizes for kind in (*_KINDS, other)]


def _named(function):
    """Return what a function says of each box."""
    with seeded():
        return [function(box.sublayer, box.norm, box.adapter) for box in _boxes()]


def _identifies_all(function) -> str:
    wrong, boxes = [], _boxes()
    for box in boxes:
        before = copy.deepcopy([state(part, "") for part in (box.norm, box.adapter)])
        result = function(box.sublayer, box.norm, box.adapter)
        if result is not None and not isinstance(result, str):
            raise Refused(difference(result, "houlsby") or "the result is no string")
        if result not in (*_KINDS, None):
            raise Refused(f"{result!r} is neither None nor one of {', '.join(map(repr, _KINDS))}")
        if difference([state(part, "") for part in (box.norm, box.adapter)], before, "", 0.0):
            left = "Put back what was in W_up, which need not be zero, and change nothing else."
            raise Refused("the adapter or the norm is not as it was", f"Here: {box.called}.", left)
        wrong += [(box, result)] if result != box.name else []
    if not wrong:
        if any(box.notes and set(box.notes) == {_CONSTANT} for box in boxes):
            luck = "your function tells the kinds by the rounding of equal sums alone"
            raise Refused(luck, f"Likely cause: {_CONSTANT}.")
        return f"{len(boxes)} adapters, new and trained, all left as they were"
    box, result = wrong[0]
    facts = [f"Here, {box.called}: {result!r}, expected {box.name!r}."]
    others = {why: f for why, f in identify.causes.items() if why not in (_ZERO, _CONSTANT, _EQUAL)}
    if not box.notes:
        facts.append("Your function did not call the sublayer, and nothing else tells the kinds.")
    elif set(box.notes) == {_ZERO} and not any(box.name for box, _ in wrong):
        facts.append("What an adapter reads is right. Look also at where its output goes.")
    elif all(box.notes):  # one call of several may well be of this sort
        facts.append(f"Likely cause: {max(box.notes, key=box.notes.count)}.")
    elif named := [why for why, f in others.items() if _named(f) == _named(function)]:
        facts.append(f"Likely cause: {', or '.join(named)}.")
    elif result is None:
        same = "agree up to rounding, say within 1e-4"
        facts.append(f"The kinds return LN(x + h + a(t)); outputs that are the same {same}.")
    raise Refused(f"{len(boxes) - len(wrong)} of {len(boxes)} adapters are named right", *facts)


@check_for(
    trials={_identifies_all: "your function"},
    causes=mistakes(
        """
        def identify(sublayer, norm, adapter):
            x, h = torch.randn(2, 6, len(norm.weight))
            with torch.no_grad():
                kept = adapter.up.weight.clone()
                adapter.up.weight.normal_()
                y, reads = sublayer(x, h), {"houlsby": h, "pfeiffer": norm(x + h), "parallel": x}
                outputs = {kind: norm(x + h + adapter(t)) for kind, t in reads.items()}
                adapter.up.weight.copy_(kept)
            gaps = {kind: (out - y).abs().max().item() for kind, out in outputs.items()}
            best = min(gaps, key=gaps.get)
            return best if gaps[best] < 1e-4 else None
        """,
        f"""
        {_ZERO}
            adapter.up.weight.normal_() → pass
        {_CONSTANT}
            adapter.up.weight.normal_() → adapter.up.weight.fill_(0.5)
        {_EQUAL}
            x, h = torch.randn(2, 6, len(norm.weight)) → x = h = torch.randn(6, len(norm.weight))
        the nearest kind is returned even where none agrees: return None there
            if gaps[best] < 1e-4 else None → ∅
        houlsby and parallel are swapped: Houlsby's adapter reads h, the parallel one reads x
            "houlsby": h → "houlsby": x
            "parallel": x → "parallel": h
        Pfeiffer's adapter reads the sum after the norm, not before
            norm(x + h), "parallel" → x + h, "parallel"
        """,
    ),
    verified=lambda facts: f"Verified on {facts[0]}.",
)
def identify(sublayer, norm, adapter):
    """The function tells the three kinds apart, and says of no other adapter that it is one."""


# ------------------------------------------------------------------ fold_linear_adapter


def _foldable(d, in_, m):
    shapes = (m, d), (m,), (d, m), (d,), (d, in_), (d,)
    return [torch.randn(shape) / math.sqrt(shape[-1]) for shape in shapes]


@check_for(
    cases=[
        # A square one first: there a wrong order of the matrices is not stopped by their shapes.
        Case(lambda: _foldable(16, 16, 4), note="a square weight"),
        Case(lambda: _foldable(12, 20, 5)),
        Case(lambda: _foldable(10, 33, 4)),
    ],
    returns=("weight", "bias"),
    causes=mistakes(
        """
        def fold_linear_adapter(w_down, b_down, w_up, b_up, weight, bias):
            W = weight + w_up @ w_down @ weight
            b = bias + w_up @ (w_down @ bias + b_down) + b_up
            return W, b
        """,
        """
        the residual is missing: the layer's own output is added to the adapter's
            weight + → ∅
            bias + w_up → w_up
        the residual is missing in the bias: b is also added to the adapter's part
            bias + w_up → w_up
        the adapter reads the layer's input x, not its output: multiply by the weight
            w_up @ w_down @ weight → w_up @ w_down
        the products are in the wrong order: the layer comes first, so its weight is the right
        factor
            w_up @ w_down @ weight → weight @ w_up @ w_down
        the bias is not changed
            + w_up @ (w_down @ bias + b_down) + b_up → ∅
        b is missing in what the adapter reads: it reads xWᵀ + b
            (w_down @ bias + b_down) → b_down
        b_down is missing: W_up carries it into the new bias
            + b_down → ∅
        b_up is missing
            + b_up → ∅
        the adapter reads the layer's input u, in the weight and in the bias: it reads the output h
            w_up @ w_down @ weight → w_up @ w_down
            (w_down @ bias + b_down) → b_down
        W_down and W_up are transposed and in the wrong order: an output is W_up (W_down h)
            w_up @ w_down @ weight → w_down.T @ w_up.T @ weight
        the weight is transposed: a layer stores it as (out, in), here (d, in)
            return W, b → return W.T, b
        the order is reversed: return the weight first
            return W, b → return b, W
        """,
    ),
)
def fold_linear_adapter(w_down, b_down, w_up, b_up, weight, bias):
    """One layer that does what the layer and the adapter after it do."""

    def both(x):
        y = F.linear(x, weight.double(), bias.double())
        low = F.linear(y, w_down.double(), b_down.double())
        return y + F.linear(low, w_up.double(), b_up.double())

    # A linear function is known by what it makes of zero and of the unit vectors.
    b = both(torch.zeros(weight.shape[1], dtype=torch.float64))
    W = both(torch.eye(weight.shape[1], dtype=torch.float64)) - b
    return W.T.to(weight.dtype), b.to(weight.dtype)


# ------------------------------------------------------------------ merge_parallel


def _feed_forward(d, d_ff, m, scale):
    first, second, adapter = nn.Linear(d, d_ff), nn.Linear(d_ff, d), Bottleneck(d, m)
    with torch.no_grad():
        for p in (*first.parameters(), *second.parameters(), *adapter.parameters()):
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return [first, second, adapter, scale]


def _one_feed_forward(result):
    """Return what two layers with a GELU between them compute, of a tuple of their tensors."""
    w1, b1, w2, b2 = result
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 5, w1.shape[1]).to(w1.dtype)
    return {"what the wider feed-forward computes": F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)}


@check_for(
    cases=[
        Case(lambda: _feed_forward(12, 20, 4, 1.0)),
        Case(lambda: _feed_forward(12, 20, 4, 0.5), note="the scale is not 1"),
        Case(lambda: _feed_forward(10, 16, 3, 4.0)),
        Case(lambda: _feed_forward(9, 9, 5, 2.0), note="d_ff = d"),
        Case(lambda: _feed_forward(6, 14, 1, 0.25), note="a single unit"),
    ],
    returns=("w1", "b1", "w2", "b2"),
    view=_one_feed_forward,
    causes=mistakes(
        """
        def merge_parallel(first, second, adapter, scale):
            down, up = adapter.down, adapter.up
            w1 = torch.cat([first.weight, down.weight])
            b1 = torch.cat([first.bias, down.bias])
            w2 = torch.cat([second.weight, scale * up.weight], dim=1)
            b2 = second.bias + scale * up.bias
            return w1, b1, w2, b2
        """,
        """
        the idea is right, but the scale is missing: the new units add s · a(x)
            scale * up.weight → up.weight
            scale * up.bias → up.bias
        the idea is right, but the scale misses b_up: it multiplies all of a(x)
            scale * up.bias → up.bias
        the idea is right, but the scale misses W_up: it multiplies all of a(x)
            scale * up.weight → up.weight
        the scale is inside of f, which is not linear: it belongs behind f
            w1 = torch.cat([first.weight, down.weight]) →
                w1 = torch.cat([first.weight, scale * down.weight])
            scale * up.weight → up.weight
        the scale is inside of f, with the bias: f is not linear, so it belongs behind f
            w1 = torch.cat([first.weight, down.weight]) →
                w1 = torch.cat([first.weight, scale * down.weight])
            b1 = torch.cat([first.bias, down.bias]) →
                b1 = torch.cat([first.bias, scale * down.bias])
            scale * up.weight → up.weight
        the scale is inside of f and behind it: it belongs behind f alone
            w1 = torch.cat([first.weight, down.weight]) →
                w1 = torch.cat([first.weight, scale * down.weight])
            b1 = torch.cat([first.bias, down.bias]) →
                b1 = torch.cat([first.bias, scale * down.bias])
        the scale multiplies the old units as well: it belongs to a(x) alone
            torch.cat([second.weight, scale * up.weight], dim=1) →
                scale * torch.cat([second.weight, up.weight], dim=1)
        the idea is right, but b_up is missing: it goes into the second bias
            + scale * up.bias → ∅
        the idea is right, but b_down is missing: the new units have biases of their own
            down.bias]) → 0 * down.bias])
        the new units are in another order in w2 than in w1
            w1 = torch.cat([first.weight, down.weight]) →
                w1 = torch.cat([down.weight, first.weight])
            b1 = torch.cat([first.bias, down.bias]) → b1 = torch.cat([down.bias, first.bias])
        the rows of b1 and w1 are in different orders
            b1 = torch.cat([first.bias, down.bias]) → b1 = torch.cat([down.bias, first.bias])
        the new units are written over old ones: the feed-forward keeps all of its own
            w1 = torch.cat([first.weight, down.weight]) →
                w1 = torch.cat([down.weight, first.weight[len(down.weight):]])
            b1 = torch.cat([first.bias, down.bias]) →
                b1 = torch.cat([down.bias, first.bias[len(down.bias):]])
            w2 = torch.cat([second.weight, scale * up.weight], dim=1) →
                w2 = torch.cat([scale * up.weight, second.weight[:, len(down.bias):]], dim=1)
        b_up is appended: it belongs to no unit, so add it to the second bias
            b2 = second.bias + scale * up.bias → b2 = torch.cat([second.bias, scale * up.bias])
        this is the adapter alone: the feed-forward keeps all of its own units
            w1 = torch.cat([first.weight, down.weight]) → w1 = 1 * down.weight
            b1 = torch.cat([first.bias, down.bias]) → b1 = 1 * down.bias
            w2 = torch.cat([second.weight, scale * up.weight], dim=1) → w2 = scale * up.weight
            b2 = second.bias + → b2 =
        """,
    ),
)
def merge_parallel(first, second, adapter, scale):
    """One feed-forward with m more units computes the old one and the parallel adapter."""
    down, up = adapter.down, adapter.up
    units = [(r, b, c) for r, b, c in zip(down.weight, down.bias, scale * up.weight.T, strict=True)]
    units += zip(first.weight, first.bias, second.weight.T, strict=True)
    rows, offsets, columns = map(torch.stack, zip(*units, strict=True))
    return rows, offsets, columns.T, second.bias + scale * up.bias


# ------------------------------------------------------------------ insert_adapters


_TRAINED = "the list of shapes of the trainable parameters"
_FIRST = "the block's output right after the insertion (that of the base)"
_OUTPUT = "the block's output once the adapters are trained"
_ALL = (
    "the list of shapes of the block's parameters",
    _TRAINED,
    _FIRST,
    "the base's own weights, sorted",
    _OUTPUT,
    "the gradients of the adapters, by their shape",
)
_FROZEN = "the adapters are frozen with the base: freeze first, or freeze only what was there"
_TWICE = "the residual is added twice: an Adapter returns h + a(h), add no h to it"
_AFTER = "the adapter comes after the layer norm: place it right after the dense layer"


def _block(d, d_ff, frozen=False, look=_ALL):
    """Return a block of BERT without dropout, with norms and biases unlike those of a new block;
    if only its trained output is looked at, its dense layers return zeros."""
    sizes = dict(vocab_size=4, hidden_size=d, intermediate_size=d_ff, max_position_embeddings=4)
    sizes |= dict(num_hidden_layers=1, num_attention_heads=4, hidden_dropout_prob=0.0)
    config = BertConfig(**sizes, attention_probs_dropout_prob=0.0, attn_implementation="eager")
    block = BertModel(config, add_pooling_layer=False).encoder.layer[0].eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.15 * torch.randn(p.shape))
        for output in (block.attention.output, block.output) if look == (_OUTPUT,) else ():
            for p in output.dense.parameters():
                p.zero_()
    block.look, block.base = look, list(block.parameters())  # a list registers nothing
    return block.requires_grad_(not frozen)


def _counted(parameters):
    shapes = Counter(tuple(p.shape) for p in parameters)
    return sorted(f"{n} × {shape}" for shape, n in shapes.items())


def _inserted(layer):
    """Return what a block trains, and its outputs before and after its adapters have values; a part
    that earlier parts make impossible, and one that is not looked at, is None."""
    seen, look = dict.fromkeys(_ALL), getattr(layer, "look", _ALL)
    held, trains, first, base, output, gradients = _ALL
    new = [p for p in layer.parameters() if all(p is not q for q in layer.base)]
    trained = [p for p in layer.parameters() if p.requires_grad]
    if trains in look:
        seen[held], seen[trains] = _counted(layer.parameters()), _counted(trained)
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 6, layer.attention.self.query.in_features)
    shapes = sorted(tuple(p.shape) for p in new)
    if shapes != sorted(2 * [*set(shapes)]) or len(shapes) != 8:
        return seen
    with torch.no_grad():
        seen[first] = layer(x) if first in look else None
        # Of one shape the first is at the attention, in whatever order an adapter lists its own.
        for shape in shapes[::2]:
            for p in new:
                if tuple(p.shape) == shape:
                    p.copy_(torch.randn(shape) * 0.4)
    if base in look:
        frozen = [p.detach().flatten() for p in layer.parameters() if not p.requires_grad]
        seen[base] = torch.cat(frozen).sort().values
    ordered = sorted(new, key=lambda p: tuple(p.shape))
    with torch.enable_grad():
        y = layer(x)
        seen[output] = y.detach() if output in look else None
        seen[gradients] = gradients_or_zeros(y, ordered) if gradients in look else None
    return seen


@check_for(
    cases=[
        Case(lambda: [_block(24, 40, look=(_TRAINED,)), 5], bug=_FROZEN),
        Case(lambda: [_block(24, 40, look=(_FIRST,)), 5], bug=_TWICE),
        Case(
            lambda: [_block(24, 40, look=(_OUTPUT,)), 5],
            note="whose dense layers return zeros",
            bug=_AFTER,
        ),
        Case(lambda: [_block(24, 40), 5]),
        Case(lambda: [_block(16, 28, frozen=True), 3], note="a block that comes frozen"),
    ],
    returns="the block",
    view=_inserted,
    staged=True,
    changes=("layer",),
    causes=mistakes(
        """
        def insert_adapters(layer, width):
            layer.requires_grad_(False)
            for output in (layer.attention.output, layer.output):
                output.adapter = a = Adapter(output.dense.out_features, width)
                output.dense.register_forward_hook(lambda module, args, h, a=a: a(h))
            return layer
        """,
        """
        the adapters are frozen with the base: freeze first, or freeze only what was there
            return layer → return layer.requires_grad_(False)
        the block does not hold the adapters: make each an attribute of one of its modules
            output.adapter = a = → a =
        the base is not frozen: only the adapters may train
            layer.requires_grad_(False) → ∅
        there is one adapter: each of the two sublayers has one of its own
            (layer.attention.output, layer.output) → [layer.attention.output]
        width is taken for a reduction factor: it is m itself
            out_features, width → out_features, output.dense.out_features // width
        h is lost: the adapter's output replaces h, and should be added to h
            a=a: a(h) → a=a: a.adapter(h)
        the adapter comes after the layer norm: place it right after the dense layer
            output.dense.register → output.register
        the adapter reads x + h before the layer norm: it reads h alone
            output.dense.register_forward_hook → output.LayerNorm.register_forward_pre_hook
            module, args, h, a=a: a(h) → norm, s, a=a: a(s[0])
        in a hook of dense, `module` is dense itself, and the adapter is not an attribute of it
            a=a: a(h) → a=a: module.adapter(h)
        the dense layers train with their adapters: only the adapters may train
            output.adapter = a = → output.dense.requires_grad_(); output.adapter = a =
        the adapter reads LN(x + h), as Pfeiffer's does: Houlsby's reads h
            output.dense.register_forward_hook → output.LayerNorm.register_forward_pre_hook
            module, args, h, a=a: a(h) → norm, s, a=a: s[0] + a.adapter(norm.forward(s[0]))
        both places use the adapter that was made last: a function made in a loop looks up
        its names when it is called
            args, h, a=a: → args, h:
        no gradient reaches the adapters: detach(), .data and no_grad() cut it off
            a=a: a(h) → a=a: a(h).detach()
        the adapter's input is detached, so no gradient reaches what comes before it
            a=a: a(h) → a=a: a(h.detach())
        the adapters are made but nothing calls them
            a=a: a(h) → a=a: h
        """,
        Adapter=Adapter,
    ),
)
def insert_adapters(layer, width):
    """Houlsby's adapters follow both sublayers, step 0 is the base, and only the adapters train."""
    layer.requires_grad_(False)
    for output in (layer.attention.output, layer.output):
        d = output.dense.out_features
        output.down, output.up = nn.Linear(d, width), nn.Linear(width, d)
        for p in output.up.parameters():
            nn.init.zeros_(p)

        def forward(z, x, output=output):
            h = output.dense(z)
            return output.LayerNorm(x + h + output.up(F.gelu(output.down(h))))

        output.forward = forward
    return layer
