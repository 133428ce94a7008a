"""Checks of lesson 06."""

import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from .kit import Case, check_for, gradients_of, refused

# ------------------------------------------------------------------ adapter_parameters


def _count(
    places=lambda kind: 2 if kind == "houlsby" else 1,
    one=lambda d, m: 2 * d * m + m + d,
    times=lambda layers: layers,
):
    def adapter_parameters(d, m, layers, kind):
        return places(kind) * one(d, m) * times(layers)

    return adapter_parameters


@check_for(
    cases=[
        (768, 48, 12, "houlsby"),
        (768, 48, 12, "pfeiffer"),
        (384, 192, 6, "parallel"),
        (192, 5, 7, "houlsby"),
        (100, 3, 1, "parallel"),
        (64, 1, 4, "pfeiffer"),
        refused(lambda: [64, 4, 2, "between"], "between", "no such kind"),
    ],
    causes={
        "the biases are missing: m and d numbers a place": _count(one=lambda d, m: 2 * d * m),
        "the bias of the way up is missing, d numbers": _count(one=lambda d, m: 2 * d * m + m),
        "the bias of the way down is missing, m numbers": _count(one=lambda d, m: 2 * d * m + d),
        "both biases are counted with d numbers: the way down ends in m": _count(
            one=lambda d, m: 2 * d * m + 2 * d
        ),
        "both biases are counted with m numbers: the way up ends in d": _count(
            one=lambda d, m: 2 * d * m + 2 * m
        ),
        "one of the two matrices is missing": _count(one=lambda d, m: d * m + m + d),
        "the norms are counted too: the adapter itself has none": _count(
            one=lambda d, m: 2 * d * m + m + d + 2 * d
        ),
        "houlsby stands at two places of a layer": _count(places=lambda kind: 1),
        "pfeiffer and parallel stand at one place of a layer": _count(places=lambda kind: 2),
        "pfeiffer stands at one place of a layer, after the feed-forward": _count(
            places=lambda kind: 1 if kind == "parallel" else 2
        ),
        "parallel stands at one place of a layer, beside the feed-forward": _count(
            places=lambda kind: 1 if kind == "pfeiffer" else 2
        ),
        "the kinds are mixed up: houlsby has two places a layer, the others one": _count(
            places=lambda kind: 1 if kind == "houlsby" else 2
        ),
        "the layers are left out: this is one layer's count": _count(times=lambda layers: 1),
        "each place is counted as a whole matrix (d, d)": _count(one=lambda d, m: d * d + d),
    },
)
def adapter_parameters(d, m, layers, kind):
    """Two matrices and two biases a place, at one or two places of every layer."""
    if kind not in ("houlsby", "pfeiffer", "parallel"):
        raise ValueError(f"kind={kind!r} is none of houlsby, pfeiffer, parallel")
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(d, m), nn.Linear(m, d))
    sites = [one] * (2 * layers if kind == "houlsby" else layers)
    return sum(p.numel() for site in sites for p in site.parameters())


# ------------------------------------------------------------------ parallel_adapter


def _beside(shape, m, scale, dtype=torch.float32):
    d = shape[-1]
    x, h = torch.randn(shape), 2 * torch.randn(shape)
    w_down, w_up = torch.randn(m, d) / math.sqrt(d), torch.randn(d, m) / math.sqrt(m)
    args = [x, h, w_down, 0.5 * torch.randn(m), w_up, torch.randn(d)]
    return [*(t.to(dtype) for t in args), scale]


def _parallel(
    reads=lambda x, y: x,
    f=torch.relu,
    inner=lambda down: down,
    end=lambda x, y, a, s, bias: y + s * (a + bias),
    b_down=lambda b: b,
):
    def parallel_adapter(x, sublayer_output, w_down, b_down_, w_up, b_up, scale):
        low = f(inner(F.linear(reads(x, sublayer_output), w_down, b_down(b_down_))))
        return end(x, sublayer_output, F.linear(low, w_up), scale, b_up)

    return parallel_adapter


@check_for(
    cases=[
        Case(lambda: _beside((2, 5, 24), 7, 4.0)),
        Case(lambda: _beside((9, 16), 3, 0.3)),
        Case(lambda: _beside((32,), 8, 2), note="one vector"),
        Case(lambda: _beside((2, 3, 4, 12), 5, 1.5, torch.float64)),
        Case(lambda: _beside((3, 6, 8), 8, 1.0), note="m = d, scale 1"),
    ],
    returns="h",
    gradients=("x", "sublayer_output", "w_down", "b_down", "w_up", "b_up"),
    causes={
        "x is added too: that is the block's own residual, which comes later": _parallel(
            end=lambda x, y, a, s, b: y + x + s * (a + b)
        ),
        "x is added in the place of the sublayer's output": _parallel(
            end=lambda x, y, a, s, b: x + s * (a + b)
        ),
        (
            "the adapter reads the sublayer's output: that is a sequential one; a parallel one "
            "reads x"
        ): _parallel(reads=lambda x, y: y),
        "the adapter reads the sum x + sublayer_output": _parallel(reads=lambda x, y: x + y),
        "the scale is left out": _parallel(end=lambda x, y, a, s, b: y + a + b),
        "the scale multiplies the sublayer's output as well": _parallel(
            end=lambda x, y, a, s, b: s * (y + a + b)
        ),
        "the scale does not reach b_up": _parallel(end=lambda x, y, a, s, b: y + s * a + b),
        "the scale divides": _parallel(end=lambda x, y, a, s, b: y + (a + b) / s),
        "the sublayer's output is missing: the adapter stands beside it, not for it": _parallel(
            end=lambda x, y, a, s, b: s * (a + b)
        ),
        "the adapter's output is taken away: add it": _parallel(
            end=lambda x, y, a, s, b: y - s * (a + b)
        ),
        "b_up is missing": _parallel(end=lambda x, y, a, s, b: y + s * a),
        "b_down is missing": _parallel(b_down=lambda b: None),
        "both biases are missing": _parallel(
            b_down=lambda b: None, end=lambda x, y, a, s, b: y + s * a
        ),
        "the ReLU between the matrices is missing": _parallel(f=lambda t: t),
        "a GELU stands in the place of the ReLU": _parallel(f=F.gelu),
        "a SiLU stands in the place of the ReLU": _parallel(f=F.silu),
        "the ReLU comes after the second matrix: it stands between the two": _parallel(
            f=lambda t: t, end=lambda x, y, a, s, b: y + s * torch.relu(a + b)
        ),
        "a second ReLU comes after the second matrix": _parallel(
            end=lambda x, y, a, s, b: y + s * torch.relu(a + b)
        ),
        "the ReLU comes before the first matrix": _parallel(
            f=lambda t: t, reads=lambda x, y: x.relu()
        ),
    },
)
def parallel_adapter(x, sublayer_output, w_down, b_down, w_up, b_up, scale):
    """The sublayer's output and, scaled, what the adapter makes of x."""
    h = sublayer_output + scale * b_up
    for row, b, column in zip(w_down, b_down, w_up.T, strict=True):  # one hidden unit after another
        unit = (x * row).sum(-1, keepdim=True) + b
        h = h + scale * torch.where(unit > 0, unit, 0.0) * column
    return h


# ------------------------------------------------------------------ identity_gap


class _Near(nn.Module):
    """h + a(h), with dropout between the matrices."""

    def __init__(self, d, m, std, dropout, dtype):
        super().__init__()
        self.down, self.up = nn.Linear(d, m, dtype=dtype), nn.Linear(m, d, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, h):
        return h + self.up(self.dropout(F.gelu(self.down(h))))


def _near(shape, m, std, dropout=0.0, training=False, dtype=torch.float32, identity=False):
    adapter = _Near(shape[-1], m, std, dropout, dtype).train(training)
    if identity:
        nn.init.zeros_(adapter.up.weight)
    rows = torch.logspace(-1, 1, math.prod(shape[:-1]))[torch.randperm(math.prod(shape[:-1]))]
    return [adapter, (torch.randn(shape) * rows.view(*shape[:-1], 1)).to(dtype)]


def _gap(of, training=None):
    def identity_gap(adapter, h):
        mode = adapter.training
        adapter.train(mode if training else False)
        with torch.no_grad():
            value = of(adapter(h).double(), h.double())
        adapter.train(mode)
        return float(value)

    return identity_gap


def _spectral(x):
    return torch.linalg.matrix_norm(x.flatten(0, -2), 2)


@check_for(
    cases=[
        Case(lambda: _near((2, 5, 24), 6, 0.3)),
        Case(lambda: _near((9, 16), 4, 0.02)),
        Case(lambda: _near((3, 4, 20), 10, 1.5), note="a start that wrecks the base"),
        Case(lambda: _near((6, 16), 4, 0.3, identity=True), note="an adapter that is the identity"),
        Case(lambda: _near((2, 7, 24), 8, 0.4, 0.5, training=True), note="dropout, in train mode"),
        Case(lambda: _near((5, 12), 3, 0.2, 0.1), note="dropout, in eval mode"),
        Case(lambda: _near((4, 3, 18), 6, 0.5, dtype=torch.float64)),
    ],
    returns="the gap",
    tolerance=1e-4,
    causes={
        "the change is not divided by the size of h": _gap(lambda a, h: (a - h).norm()),
        "the change is divided by the size of the adapter's output: divide by that of h": _gap(
            lambda a, h: (a - h).norm() / a.norm()
        ),
        "h is not taken away: this is the size of the output, not of the change": _gap(
            lambda a, h: a.norm() / h.norm()
        ),
        "the sizes are compared, not the vectors: take the size of the difference": _gap(
            lambda a, h: (a.norm() - h.norm()).abs() / h.norm()
        ),
        "the sizes are compared, not the vectors, and with a sign": _gap(
            lambda a, h: (a.norm() - h.norm()) / h.norm()
        ),
        "both sizes are squared: the root is missing": _gap(
            lambda a, h: (a - h).pow(2).sum() / h.pow(2).sum()
        ),
        "the ratio is taken of each vector and then averaged: take one ratio of all of h": _gap(
            lambda a, h: ((a - h).norm(dim=-1) / h.norm(dim=-1)).mean()
        ),
        "the ratio is taken of each entry and then averaged: a small entry outweighs all": _gap(
            lambda a, h: ((a - h) / h).abs().mean()
        ),
        "the sizes of the vectors are averaged: take one size of all entries together": _gap(
            lambda a, h: (a - h).norm(dim=-1).mean() / h.norm(dim=-1).mean()
        ),
        "linalg.norm(…, 2) of a matrix is its largest singular value: take all entries": _gap(
            lambda a, h: _spectral(a - h) / _spectral(h)
        ),
        "the largest entries are compared: take the Euclidean sizes": _gap(
            lambda a, h: (a - h).abs().max() / h.abs().max()
        ),
        "absolute values are summed: take the Euclidean sizes": _gap(
            lambda a, h: (a - h).abs().sum() / h.abs().sum()
        ),
        "this is the mean squared change": _gap(lambda a, h: (a - h).pow(2).mean()),
        "this is the largest change of an entry": _gap(lambda a, h: (a - h).abs().max()),
        "this is a percentage: 1 % is 0.01": _gap(lambda a, h: 100 * (a - h).norm() / h.norm()),
        "the angle is measured, not the change": _gap(
            lambda a, h: 1 - F.cosine_similarity(a.flatten(), h.flatten(), dim=0)
        ),
        "dropout is on: measure in eval mode, and put the mode back afterwards": _gap(
            lambda a, h: (a - h).norm() / h.norm(), training=True
        ),
        "h is taken away from a(h) once more: `adapter` has the residual in it": _gap(
            lambda a, h: (a - 2 * h).norm() / h.norm()
        ),
    },
)
def identity_gap(adapter, h):
    """How large the change is beside what is changed."""
    low = h @ adapter.down.weight.T + adapter.down.bias
    change = F.gelu(low) @ adapter.up.weight.T + adapter.up.bias
    squares = (change.detach().double() ** 2).sum(), (h.double() ** 2).sum()
    return math.sqrt(squares[0].item()) / math.sqrt(squares[1].item())


# ------------------------------------------------------------------ fold_linear_adapter


def _foldable(d, in_, m, bias=True, dtype=torch.float32):
    args = [
        torch.randn(m, d) / math.sqrt(d),
        torch.randn(m),
        torch.randn(d, m) / math.sqrt(m),
        torch.randn(d),
        torch.randn(d, in_) / math.sqrt(in_),
        torch.randn(d) if bias else None,
    ]
    return [None if t is None else t.to(dtype) for t in args]


def _zeros(weight, bias):
    return weight.new_zeros(len(weight)) if bias is None else bias


def _folded(
    weight=lambda W, U, D: W + U @ (D @ W),
    bias=lambda b, U, D, b_down, b_up: b + U @ (D @ b + b_down) + b_up,
):
    def fold_linear_adapter(w_down, b_down, w_up, b_up, weight_, bias_):
        b = _zeros(weight_, bias_)
        return weight(weight_, w_up, w_down), bias(b, w_up, w_down, b_down, b_up)

    return fold_linear_adapter


def _none(w_down, b_down, w_up, b_up, weight, bias):
    W, b = _folded()(w_down, b_down, w_up, b_up, weight, bias)
    return W, None if bias is None else b


@check_for(
    cases=[
        # A square one first: there a wrong order of the matrices is not stopped by their shapes.
        Case(lambda: _foldable(16, 16, 4), note="a square weight"),
        Case(lambda: _foldable(12, 20, 5)),
        Case(lambda: _foldable(20, 12, 3)),
        Case(lambda: _foldable(14, 18, 6, bias=False), note="a layer without a bias"),
        Case(lambda: _foldable(10, 33, 4, dtype=torch.float64)),
        Case(lambda: _foldable(8, 11, 8), note="m = d"),
    ],
    returns=("weight", "bias"),
    causes={
        "the residual is missing: the layer's own output goes on beside the adapter's": _folded(
            lambda W, U, D: U @ D @ W,
            lambda b, U, D, b_down, b_up: U @ (D @ b + b_down) + b_up,
        ),
        "the residual is missing in the weight": _folded(lambda W, U, D: U @ D @ W),
        "the residual is missing in the bias: b goes on beside the adapter too": _folded(
            bias=lambda b, U, D, b_down, b_up: U @ (D @ b + b_down) + b_up
        ),
        "the weight is not changed": _folded(lambda W, U, D: W.clone()),
        "the weight counts twice": _folded(lambda W, U, D: 2 * W + U @ D @ W),
        "the adapter reads the layer's input x, not its output: multiply by the weight": _folded(
            lambda W, U, D: W + U @ D
        ),
        (
            "the products are in the wrong order: the layer comes first, so its weight stands on "
            "the right"
        ): _folded(lambda W, U, D: W + W @ U @ D),
        "the adapter's matrices are transposed: W_up is (d, m) and W_down (m, d) already": _folded(
            lambda W, U, D: W + (U @ D).T @ W
        ),
        "the bias is not changed": _folded(bias=lambda b, U, D, b_down, b_up: b.clone()),
        "b is missing in what the adapter reads: it reads xWᵀ + b": _folded(
            bias=lambda b, U, D, b_down, b_up: b + U @ b_down + b_up
        ),
        "b_down is missing: W_up carries it into the new bias": _folded(
            bias=lambda b, U, D, b_down, b_up: b + U @ (D @ b) + b_up
        ),
        "b_up is missing": _folded(bias=lambda b, U, D, b_down, b_up: b + U @ (D @ b + b_down)),
        "only b_up is added to the bias: W_up (W_down b + b_down) belongs there too": _folded(
            bias=lambda b, U, D, b_down, b_up: b + b_up
        ),
        "both biases of the adapter are missing": _folded(
            bias=lambda b, U, D, b_down, b_up: b + U @ (D @ b)
        ),
        "a layer without a bias gets one: the adapter has biases of its own": _none,
        "the order is turned: return the weight first": lambda *args: _folded()(*args)[::-1],
    },
)
def fold_linear_adapter(w_down, b_down, w_up, b_up, weight, bias):
    """One layer that does what the layer and the adapter after it do."""

    def both(x):
        y = F.linear(x, weight.double(), None if bias is None else bias.double())
        low = F.linear(y, w_down.double(), b_down.double())
        return y + F.linear(low, w_up.double(), b_up.double())

    # A linear function is known by what it makes of zero and of the unit vectors.
    b = both(torch.zeros(weight.shape[1], dtype=torch.float64))
    W = both(torch.eye(weight.shape[1], dtype=torch.float64)) - b
    return W.T.to(weight.dtype), b.to(weight.dtype)


# ------------------------------------------------------------------ insert_adapters


def _block(d, d_ff, frozen=False):
    """A block of BERT without dropout, its norms and biases not those of a fresh one."""
    config = BertConfig(
        vocab_size=4,
        hidden_size=d,
        intermediate_size=d_ff,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    block = BertModel(config, add_pooling_layer=False).encoder.layer[0].eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.15 * torch.randn(p.shape))
    return block.requires_grad_(not frozen)


_TRAINS, _FIRST, _OUTPUT, _BASE, _GRADIENTS = (
    "the list of shapes that train",
    "the block's output right after the insertion (that of the base)",
    "the block's output once the adapters are trained",
    "the base's own weights, sorted",
    "the gradients of the adapters, by their shape",
)


def _inserted(layer):
    """What trains in a block, and what it computes before and after its adapters have values."""
    seen = dict.fromkeys((_TRAINS, _FIRST, _OUTPUT, _BASE, _GRADIENTS))
    trained = [p for p in layer.parameters() if p.requires_grad]
    shapes = Counter(tuple(p.shape) for p in trained)
    seen[_TRAINS] = sorted(f"{n} × {shape}" for shape, n in shapes.items())
    d = layer.attention.self.query.in_features
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 6, d)
    if len(trained) != 8 or set(shapes.values()) != {2}:
        return seen
    with torch.no_grad():
        seen[_FIRST] = layer(x)
        # Of one shape the first is at the attention, in whatever order an adapter lists its own.
        groups = {
            shape: [p for p in trained if tuple(p.shape) == shape] for shape in sorted(shapes)
        }
        for pair in groups.values():
            for p in pair:
                p.copy_(torch.randn(p.shape) * 0.4)
    frozen = [p.detach().flatten() for p in layer.parameters() if not p.requires_grad]
    seen[_BASE] = torch.cat(frozen).sort().values
    with torch.enable_grad():
        y = layer(x)
        seen[_OUTPUT] = y.detach()
        ordered = [p for pair in groups.values() for p in pair]
        found = gradients_of(y, ordered)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(ordered, found, strict=True)]
    seen[_GRADIENTS] = zeros
    return seen


class _Bare(nn.Module):
    """down, GELU, up: a(t), up at zero."""

    def __init__(self, d, m):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, t):
        return self.up(F.gelu(self.down(t)))


def _outputs(layer):
    return [layer.attention.output, layer.output]


def _insert(
    add,
    freeze="before",
    where=_outputs,
    width=lambda m, d: m,
    also=lambda layer: None,
):
    """A wrong insert_adapters; `add(output, adapter)` hooks one adapter in."""

    def insert_adapters(layer, width_):
        if freeze == "before":
            layer.requires_grad_(False)
        kept = []
        for output in where(layer):
            d = output.dense.out_features
            output.adapter = _Bare(d, width(width_, d))
            kept.append(output.adapter)
        for output in where(layer):
            add(output, kept)
        if freeze == "after":
            layer.requires_grad_(False)
        also(layer)
        return layer

    return insert_adapters


def _after_dense(change):
    def add(output, kept):
        output.dense.register_forward_hook(lambda module, args, h: change(h, output.adapter(h)))

    return add


_right_place = _after_dense(lambda h, a: h + a)


def _after_norm(factor):
    def add(output, kept):
        output.register_forward_hook(lambda module, args, y: factor * y + output.adapter(y))

    return add


def _before_norm(output, kept):
    output.LayerNorm.register_forward_pre_hook(
        lambda module, args: (args[0] + output.adapter(args[0]),)
    )


def _reads(what):
    def add(output, kept):
        def replaced(z, x):
            h = output.dense(z)
            t = x if what == "x" else output.LayerNorm(h + x)
            return output.LayerNorm(h + output.adapter(t) + x)

        output.forward = replaced

    return add


def _last(output, kept):
    output.dense.register_forward_hook(lambda module, args, h: h + kept[-1](h))


def _second_only(output, kept):
    if output.adapter is kept[1]:
        _right_place(output, kept)


def _weights_only(layer):
    for output in _outputs(layer):
        output.adapter.down.bias.requires_grad_(False)
        output.adapter.up.bias.requires_grad_(False)


def _norms_too(layer):
    for output in _outputs(layer):
        output.LayerNorm.requires_grad_(True)


_TWICE = "the residual is added twice: an Adapter returns h + a(h), add no h to it"
_AFTER = "the adapter stands after the layer norm: it belongs right behind the dense layer"


@check_for(
    cases=[
        Case(lambda: [_block(24, 40), 5]),
        Case(lambda: [_block(16, 28, frozen=True), 3], note="a block that comes frozen"),
        Case(lambda: [_block(32, 20), 7]),
    ],
    returns="the block",
    view=_inserted,
    staged=True,
    changes=("layer",),
    causes={
        (
            "the adapters are frozen with the base: freeze first, or freeze only what was there"
        ): _insert(_right_place, freeze="after"),
        "the base is not frozen: only the adapters may train": _insert(_right_place, freeze=""),
        "there is one adapter: each of the two places of a block has its own": _insert(
            _right_place, where=lambda layer: [layer.attention.output]
        ),
        "width is taken for a reduction factor: it is m itself": _insert(
            _right_place, width=lambda m, d: d // m
        ),
        "the biases of the adapters do not train": _insert(_right_place, also=_weights_only),
        "the layer norms train too: here only the adapters may": _insert(
            _right_place, also=_norms_too
        ),
        _TWICE: _insert(_after_dense(lambda h, a: 2 * h + a)),
        f"{_TWICE}; and {_AFTER}": _insert(_after_norm(2)),
        "h is lost: the adapter's output comes in its place, and not on top of it": _insert(
            _after_dense(lambda h, a: a)
        ),
        _AFTER: _insert(_after_norm(1)),
        "the adapter reads the sum x + h: Houlsby's reads h alone": _insert(_before_norm),
        "the adapter reads x, as a parallel one: Houlsby's reads h": _insert(_reads("x")),
        "the adapter reads LN(x + h), as Pfeiffer's: Houlsby's reads h": _insert(_reads("norm")),
        (
            "both places use the adapter that was made last: a function made in a loop looks up "
            "its names when it is called"
        ): _insert(_last),
        "the adapters are made but nothing calls them": _insert(lambda output, kept: None),
        "the attention's adapter is made but nothing calls it": _insert(_second_only),
    },
)
def insert_adapters(layer, width):
    """Houlsby's adapters at both places, the base at step 0, and only they train."""
    layer.requires_grad_(False)
    for output in _outputs(layer):
        adapter = _Bare(output.dense.out_features, width)
        output.adapter = adapter

        def forward(z, x, output=output, adapter=adapter):
            h = output.dense(z)
            return output.LayerNorm(x + h + adapter(h))

        output.forward = forward
    return layer
