"""Checks of lesson 06."""

import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from ..methods.adapters import Adapter, Bottleneck
from .calls import gradients_or_zeros
from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ adapter_forward


def _forward_case(shape, m, note=""):
    def make():
        d = shape[-1]
        w_down, w_up = torch.randn(m, d) / math.sqrt(d), torch.randn(d, m) / math.sqrt(m)
        return [torch.randn(shape), w_down, 0.5 * torch.randn(m), w_up, torch.randn(d)]

    return Case(make, note)


@check_for(
    cases=[
        _forward_case((2, 5, 24), 7),
        _forward_case((9, 16), 3),
        _forward_case((32,), 8, note="a single vector"),
        _forward_case((2, 3, 4, 12), 5),
        _forward_case((3, 6, 8), 8, note="m = d"),
    ],
    tolerance=2e-3,  # GELU's tanh approximation will do
    causes=mistakes(
        """
        def adapter_forward(h, w_down, b_down, w_up, b_up):
            low = F.gelu(h @ w_down.T + b_down)
            up = low @ w_up.T + b_up
            return h + up
        """,
        """
        h is missing: the adapter adds its output to h
            h + up → up
        b_up is missing
            + b_up → ∅
        b_down is missing
            + b_down → ∅
        both biases are missing
            + b_down → ∅
            + b_up → ∅
        the GELU between the two matrices is missing
            F.gelu( → (
        the GELU comes after the second matrix: apply it between the two
            F.gelu( → (
            h + up → h + F.gelu(up)
        the GELU is applied to the sum: add h last
            h + up → F.gelu(h + up)
        there is a second GELU after W_up: one between the two matrices is enough
            h + up → h + F.gelu(up)
        this is a ReLU: the exercise has a GELU
            F.gelu( → F.relu(
        this is SiLU: the exercise has a GELU
            F.gelu( → F.silu(
        this is tanh: the exercise has a GELU
            F.gelu( → torch.tanh(
        b_down is added after the GELU: add it before
            F.gelu(h @ w_down.T + b_down) → F.gelu(h @ w_down.T) + b_down
        h is added twice
            h + up → 2 * h + up
        """,
    ),
)
def adapter_forward(h, w_down, b_down, w_up, b_up):
    """The result is h plus the output of the adapter."""
    result = h + b_up
    for row, b, column in zip(w_down, b_down, w_up.T, strict=True):  # one inner unit after another
        z = (h * row).sum(-1, keepdim=True) + b
        result = result + z * (1 + torch.erf(z / math.sqrt(2))) / 2 * column
    return result


# ------------------------------------------------------------------ adapted_output


def _reading_case(shape, m, kind, note=""):
    def make():
        d = shape[-1]
        adapter = Bottleneck(d, m, "tanh")
        norm = nn.LayerNorm(d)
        with torch.no_grad():
            for p in (*adapter.parameters(), *norm.parameters()):
                p.add_(0.5 * torch.randn(p.shape))
        return [torch.randn(shape), 2 * torch.randn(shape), adapter, norm, kind]

    return Case(make, note)


@check_for(
    cases=[
        _reading_case((2, 5, 16), 4, "houlsby"),
        _reading_case((2, 5, 16), 4, "parallel"),
        _reading_case((2, 5, 16), 4, "pfeiffer"),
        _reading_case((7, 12), 3, "pfeiffer"),
        _reading_case((3, 4, 20), 6, "houlsby"),
        _reading_case((10,), 5, "parallel", note="a single vector"),
    ],
    causes=mistakes(
        """
        def adapted_output(x, h, adapter, norm, kind):
            t = {"houlsby": h, "pfeiffer": norm(x + h), "parallel": x}[kind]
            return norm(x + h + adapter(t))
        """,
        """
        x is missing in the sum
            norm(x + h + adapter(t)) → norm(h + adapter(t))
        h is missing in the sum: the adapter adds to h and does not replace h
            norm(x + h + adapter(t)) → norm(x + adapter(t))
        the adapter's output is added after the norm: add all three vectors, then normalise
            norm(x + h + adapter(t)) → norm(x + h) + adapter(t)
        the norm at the end is missing
            norm(x + h + adapter(t)) → x + h + adapter(t)
        the adapter's input is added once more: adapter(t) returns a(t) alone, and the sum contains
        x and h once each
            + adapter(t) → + t + adapter(t)
        houlsby and parallel are swapped: Houlsby's adapter reads h, the parallel adapter reads x
            "houlsby": h → "houlsby": x
            "parallel": x → "parallel": h
        every kind reads x: the three kinds differ in what the adapter reads
            "houlsby": h, "pfeiffer": norm(x + h) → "houlsby": x, "pfeiffer": x
        every kind reads LN(x + h): only Pfeiffer's adapter does
            "houlsby": h → "houlsby": norm(x + h)
            "parallel": x → "parallel": norm(x + h)
        Houlsby's adapter reads h, not x
            "houlsby": h → "houlsby": x
        Houlsby's adapter reads h, not LN(x + h)
            "houlsby": h → "houlsby": norm(x + h)
        Houlsby's adapter reads h alone, not the sum
            "houlsby": h → "houlsby": x + h
        every kind reads h: the three kinds differ in what the adapter reads
            norm(x + h), "parallel": x → h, "parallel": h
        the parallel adapter reads x, not the sum
            "parallel": x → "parallel": x + h
        the parallel adapter reads x as it is: x needs no norm
            "parallel": x → "parallel": norm(x)
        Pfeiffer's adapter reads the sum after the norm, not before
            norm(x + h), → x + h,
        Pfeiffer's adapter reads the norm of x + h, not of h alone
            norm(x + h), → norm(h),
        Pfeiffer's adapter reads h here, as Houlsby's does: the adapter reads LN(x + h)
            norm(x + h), → h,
        Pfeiffer's adapter is added to x + h, not to LN(x + h): the norm is used once to read
        and once at the end
            return norm( → return norm(t + adapter(t)) if kind == "pfeiffer" else norm(
        Pfeiffer's adapter is added to LN(x + h): add it to x + h, and apply the norm at the end
            return norm( → return t + adapter(t) if kind == "pfeiffer" else norm(
        the parallel adapter is added to LN(x + h): add it to x + h, and apply the norm once
            return norm( → return norm(norm(x + h) + adapter(t)) if kind == "parallel" else norm(
        """,
    ),
)
def adapted_output(x, h, adapter, norm, kind):
    """The end of a BERT sublayer, with an adapter of one of the three kinds."""
    both = torch.add(x, h)
    read = h if kind == "houlsby" else x
    if kind == "pfeiffer":
        read = F.layer_norm(both, both.shape[-1:], norm.weight, norm.bias, norm.eps)
    low = torch.tanh(F.linear(read, adapter.down.weight, adapter.down.bias))
    total = both + F.linear(low, adapter.up.weight, adapter.up.bias)
    return F.layer_norm(total, both.shape[-1:], norm.weight, norm.bias, norm.eps)


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


# ------------------------------------------------------------------ insert_adapters


def _block(d, d_ff, frozen=False):
    """Return a block of BERT without dropout, with norms and biases unlike those of a new block."""
    sizes = dict(vocab_size=4, hidden_size=d, intermediate_size=d_ff, max_position_embeddings=4)
    sizes |= dict(num_hidden_layers=1, num_attention_heads=4, hidden_dropout_prob=0.0)
    config = BertConfig(**sizes, attention_probs_dropout_prob=0.0, attn_implementation="eager")
    block = BertModel(config, add_pooling_layer=False).encoder.layer[0].eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.15 * torch.randn(p.shape))
    return block.requires_grad_(not frozen)


def _counted(parameters):
    shapes = Counter(tuple(p.shape) for p in parameters)
    return sorted(f"{n} × {shape}" for shape, n in shapes.items())


def _inserted(layer):
    """Return what a block trains, and its outputs before and after its adapters have values."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    shapes = sorted(tuple(p.shape) for p in trained)
    seen = {
        "the list of shapes of the block's parameters": _counted(layer.parameters()),
        "the list of shapes of the trainable parameters": _counted(trained),
        "the block's output right after the insertion (that of the base)": None,
        "the block's output once the adapters are trained": None,
        "the base's own weights, sorted": None,
        "the gradients of the adapters, by their shape": None,
    }
    *_, first, output, base, gradients = seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 6, layer.attention.self.query.in_features)
    if shapes != sorted(2 * [*set(shapes)]) or len(shapes) != 8:
        return seen
    with torch.no_grad():
        seen[first] = layer(x)
        # Of one shape the first is at the attention, in whatever order an adapter lists its own.
        for shape in shapes[::2]:
            for p in trained:
                if tuple(p.shape) == shape:
                    p.copy_(torch.randn(shape) * 0.4)
    frozen = [p.detach().flatten() for p in layer.parameters() if not p.requires_grad]
    seen[base] = torch.cat(frozen).sort().values
    ordered = sorted(trained, key=lambda p: tuple(p.shape))
    with torch.enable_grad():
        y = layer(x)
        seen[gradients] = gradients_or_zeros(y, ordered)
    seen[output] = y.detach()
    return seen


@check_for(
    cases=[
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
        both sublayers share one adapter: give each its own
            (layer.attention.output, layer.output) → [layer.attention.output]
        width is taken for a reduction factor: it is m itself
            out_features, width → out_features, output.dense.out_features // width
        the residual is added twice: an Adapter returns h + a(h), add no h to it
            a=a: a(h) → a=a: h + a(h)
        h is lost: the adapter's output replaces h, and should be added to h
            a=a: a(h) → a=a: a.adapter(h)
        the adapter comes after the layer norm: place it right after the dense layer
            output.dense.register → output.register
        the adapter comes after the layer norm, and the residual is added twice: place it right
        after the dense layer, and add no h to what an Adapter returns
            output.dense.register → output.register
            a=a: a(h) → a=a: h + a(h)
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
        adapter = _Near(output.dense.out_features, width, 0.0)
        output.adapter = adapter

        def forward(z, x, output=output, adapter=adapter):
            h = output.dense(z)
            return output.LayerNorm(x + adapter(h))

        output.forward = forward
    return layer


# ------------------------------------------------------------------ adapter_parameters


@check_for(
    cases=[(768, 48, 12, "houlsby"), (768, 48, 12, "pfeiffer"), (384, 192, 6, "parallel")],
    causes=mistakes(
        """
        def adapter_parameters(d, m, layers, kind):
            places = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}
            down, up = d * m + m, m * d + d
            return places[kind] * (down + up) * layers
        """,
        """
        the biases are missing: m and d parameters an adapter
            d * m + m, m * d + d → d * m, m * d
        the bias of the way up is missing, d parameters
            m * d + d → m * d
        the bias of the way down is missing, m parameters
            d * m + m → d * m
        both biases are counted with d parameters: that of the way down has m
            d * m + m → d * m + d
        the bias of the way up has d parameters, not m
            m * d + d → m * d + m
        one matrix is counted: an adapter has two
            d * m + m, m * d + d → d * m + m, d
        the biases are counted once: each adapter has its own
            places[kind] * (down + up) * layers → places[kind] * 2 * d * m * layers + m + d
        houlsby has two adapters a layer
            "houlsby": 2 → "houlsby": 1
        pfeiffer and parallel have one adapter a layer
            "pfeiffer": 1, "parallel": 1 → "pfeiffer": 2, "parallel": 2
        parallel has one adapter a layer
            "parallel": 1 → "parallel": 2
        the layers are left out: this is one layer's count
            * layers → ∅
        """,
    ),
)
def adapter_parameters(d, m, layers, kind):
    """An adapter has two matrices and two biases, and a layer has one or two adapters."""
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(d, m), nn.Linear(m, d))
    sites = [one] * (2 * layers if kind == "houlsby" else layers)
    return sum(p.numel() for site in sites for p in site.parameters())


# ------------------------------------------------------------------ identity_gap


class _Near(nn.Module):
    """h + a(h)."""

    def __init__(self, d, m, std, dtype=torch.float32):
        super().__init__()
        self.down, self.up = nn.Linear(d, m, dtype=dtype), nn.Linear(m, d, dtype=dtype)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, h):
        return h + self.up(F.gelu(self.down(h)))


def _near(shape, m, std, dtype=torch.float32):
    adapter = _Near(shape[-1], m, std, dtype)
    rows = torch.logspace(-1, 1, math.prod(shape[:-1]))[torch.randperm(math.prod(shape[:-1]))]
    return [adapter, (torch.randn(shape) * rows.view(*shape[:-1], 1)).to(dtype)]


@check_for(
    cases=[
        Case(lambda: _near((2, 5, 24), 6, 0.3)),
        Case(lambda: _near((3, 4, 20), 10, 1.5), note="a start that wrecks the base"),
        Case(lambda: _near((2, 7, 24), 8, 0.4)),
        Case(lambda: _near((4, 3, 18), 6, 0.5, dtype=torch.float64)),
    ],
    returns="the gap",
    changes=("adapter",),  # eval mode is no mistake
    tolerance=1e-4,
    causes=mistakes(
        """
        def identity_gap(adapter, h):
            with torch.no_grad():
                out = adapter(h)
            return float((out - h).norm() / h.norm())
        """,
        """
        the change is not divided by the size of h
            / h.norm() → ∅
        the change is divided by the size of the adapter's output: divide by that of h
            / h.norm() → / out.norm()
        h is not subtracted: this is the size of the output, not of the change
            out - h → out
        the sizes are compared, not the vectors: take the size of the difference
            (out - h).norm() → (out.norm() - h.norm()).abs()
        both sizes are squared: the root is missing
            (out - h).norm() / h.norm() → (out - h).norm() ** 2 / h.norm() ** 2
        the ratio is computed for each vector and then averaged: compute one ratio over all of h
            (out - h).norm() / h.norm() → ((out - h).norm(dim=-1) / h.norm(dim=-1)).mean()
        this is one ratio for each vector: take one norm over all entries of h
            float((out - h).norm() / h.norm()) → (out - h).norm(dim=-1) / h.norm(dim=-1)
        the gap is in percent: return the ratio itself
            / h.norm() → / h.norm() * 100
        this is the mean squared change
            (out - h).norm() / h.norm() → F.mse_loss(out, h)
        h is subtracted twice: adapter(h) is h + a(h), so subtract h once
            out - h → out - 2 * h
        """,
    ),
)
def identity_gap(adapter, h):
    """The size of the change is divided by the size of h."""
    low = h @ adapter.down.weight.T + adapter.down.bias
    change = F.gelu(low) @ adapter.up.weight.T + adapter.up.bias
    squares = (change.detach().double() ** 2).sum(), (h.double() ** 2).sum()
    return math.sqrt(squares[0].item()) / math.sqrt(squares[1].item())
