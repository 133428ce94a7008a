"""Checks of lesson 07."""

import torch
from torch import nn

from .calls import gradients_or_zeros
from .diagnosis import diagnosis
from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ recombine


def _knobs(n, at_one=(), near=0.6):
    """Return knobs around 1, some of them below 0, and those at some places exactly 1."""
    vector = 1 + near * torch.randn(n)
    vector[list(at_one)] = 1.0
    return vector


def _same(n):
    vector = _knobs(n)
    return [vector, vector.clone()]


@check_for(
    cases=[
        Case(lambda: [_knobs(12), _knobs(12)]),
        Case(lambda: [torch.full((9,), 1.3), _knobs(9, near=0.9)], note="every amount is 1.3"),
        Case(lambda: [_knobs(10), _knobs(10, at_one=(2, 7))], note="directions 2 and 7 are 1"),
        Case(lambda: [_knobs(8, at_one=(0,)), _knobs(8)], note="amount 0 is 1"),
        Case(lambda: _same(11), note="amounts and directions are the same knobs"),
        Case(lambda: [torch.full((6,), 0.8), _knobs(6)], note="every amount is 0.8"),
    ],
    causes=mistakes(
        """
        def recombine(amounts, directions):
            far = (amounts - 1).abs()
            side = (directions - 1).sign()
            return 1 + far * side
        """,
        """
        the idea is right, but a direction of exactly 1 has no side: there the knob is 1
            (directions - 1).sign() → torch.where(directions > 1, 1.0, -1.0)
        the idea is right, but a direction of exactly 1 has no side, not even the upper one: there
        the knob is 1
            (directions - 1).sign() → torch.where(directions >= 1, 1.0, -1.0)
        the idea is right, but a direction of exactly 1 has no side, not even that of the amount:
        there the knob is 1
            (directions - 1).sign() →
                torch.where(directions == 1, (amounts - 1).sign(), (directions - 1).sign())
        the sides are those of 0: the side of 1 on which a knob is tells its direction
            (directions - 1).sign() → directions.sign()
        the amounts keep a sign of their own: how far a knob is from 1 is never negative
            .abs() → ∅
        the amounts are taken from 0, not from 1
            (amounts - 1).abs() → amounts.abs()
        the 1 is missing: this is the change, not the knob
            1 + far → far
        amounts and directions are swapped
            amounts - 1 → directions - 1
            side = (directions - 1) → side = (amounts - 1)
        the directions bring their own amounts along: take the sign alone
            .sign() → ∅
        the directions are turned round
            1 + far → 1 - far
        only those above 1 are moved: a knob below 1 goes as far down
            .sign() → .sign().clamp(min=0)
        """,
    ),
)
def recombine(amounts, directions):
    """Every knob is as far from 1 as its amount, on the side of its direction."""
    knobs = []
    for amount, direction in zip(amounts.tolist(), directions.tolist(), strict=True):
        far = max(amount - 1, 1 - amount)
        knobs.append(1 + far if direction > 1 else 1 - far if direction < 1 else 1.0)
    return torch.tensor(knobs, dtype=amounts.dtype)


# ------------------------------------------------------------------ worth


@check_for(
    cases=[
        Case(lambda: [_knobs(12), torch.randn(12)]),
        Case(lambda: [_knobs(9, at_one=(1, 4)), torch.randn(9)], note="knobs 1 and 4 are at 1"),
        Case(lambda: [1.5 + torch.rand(7), torch.rand(7)], note="all knobs up, all gradients > 0"),
        Case(lambda: [_knobs(10), torch.randn(10) * 0.01]),
    ],
    causes=mistakes(
        """
        def worth(vector, gradient):
            back = 1 - vector
            return back * gradient
        """,
        """
        the sign is reversed: the loss changes by the gradient times (new knob − old knob)
            1 - vector → vector - 1
        the knob is set to 0 here: set it back to 1
            1 - vector → -vector
        the absolute value is taken: to set a knob back may lower the loss, too
            back * gradient → (back * gradient).abs()
        the gradient's sign is lost
            back * gradient → back * gradient.abs()
        this is how far the knobs were turned, without the gradient
            back * gradient → back.abs()
        this is the gradient times the knob: multiply it by how far the knob moves
            1 - vector → vector
        the gradient alone is the change for a step of 1, wherever the knob is
            back * gradient → gradient
        the gradient is squared: to first order the loss changes by the gradient times the step
            back * gradient → back * gradient**2
        this is one number for all knobs together: each has its own
            back * gradient → (back * gradient).sum()
        the gradient is that of a knob at 1 already: a product of both is not halved
            back * gradient → back * gradient / 2
        """,
    ),
)
def worth(vector, gradient):
    """Each knob's worth is what the loss gains, to first order, if this knob goes back to 1."""
    flat, g = vector.double(), gradient.double()
    losses = []
    for i in range(len(flat)):  # of the linear loss with this gradient
        one_back = flat.clone()
        one_back[i] = 1.0
        losses.append(g @ (one_back - flat))
    return torch.stack(losses).to(vector.dtype)


# ------------------------------------------------------------------ merge_ia3


def _layer(out, in_, feedforward, bias=True):
    vector = 1 + 0.6 * torch.randn(in_ if feedforward else out)
    return [torch.randn(out, in_), torch.randn(out) if bias else None, vector, feedforward]


@check_for(
    cases=[
        # Square ones first: there a mistake of rows and columns gives numbers, and can be named.
        Case(lambda: _layer(16, 16, False), note="a square weight"),
        Case(lambda: _layer(16, 16, True), note="a square weight"),
        Case(lambda: _layer(12, 20, False)),
        Case(lambda: _layer(12, 20, True)),
        Case(lambda: _layer(20, 12, False)),
        Case(lambda: _layer(20, 12, True)),
        Case(lambda: _layer(9, 14, False, bias=False), note="a layer without a bias"),
        Case(lambda: _layer(9, 14, True, bias=False), note="a layer without a bias"),
    ],
    returns=("the weight", "the bias"),
    causes=mistakes(
        """
        def merge_ia3(weight, bias, vector, feedforward):
            scale = vector if feedforward else vector[:, None]
            if bias is not None and not feedforward:
                bias = vector * bias
            return scale * weight, bias
        """,
        """
        the bias of k and v is left as it is: what is scaled is x Wᵀ + b, bias included
            bias = vector * bias → pass
        the bias of the feed-forward is scaled: it is added after the vector has acted
            and not feedforward → ∅
        columns are scaled for keys and values: an output is a row of W
            vector[:, None] → vector
        rows are scaled for the feed-forward: an input is a column of W
            vector if feedforward else → ∅
        the flag is read the wrong way round: with feedforward the columns are scaled
            vector if feedforward else vector[:, None] → vector[:, None] if feedforward else vector
            not feedforward → feedforward
        the weight of the feed-forward is left as it is
            vector if feedforward → 1 if feedforward
        1 is added to the vector: it starts at ones, not at zeros
            scale = → vector = 1 + vector; scale =
        1 is subtracted from the vector: this is the change, not the merged layer
            scale = → vector = vector - 1; scale =
        the weight is transposed: a layer stores it as (out, in)
            return scale * weight, bias → return (scale * weight).T, bias
        the order is reversed: return the weight first
            return scale * weight, bias → return bias, scale * weight
        the weight is divided by the vector: that is unmerging
            scale = → vector = 1 / vector; scale =
        """,
    ),
)
def merge_ia3(weight, bias, vector, feedforward):
    """The layer alone computes what layer and vector did, for k, v and the feed-forward."""
    v = vector.double()
    if feedforward:
        merged = torch.stack([c * s for c, s in zip(weight.double().T, v, strict=True)], dim=1)
        return merged.to(weight.dtype), bias
    merged = torch.stack([r * s for r, s in zip(weight.double(), v, strict=True)])
    offset = None if bias is None else (bias.double() * v).to(bias.dtype)
    return merged.to(weight.dtype), offset


# ------------------------------------------------------------------ ia3_as_lora


def _scaling(out, in_, still=0):
    vector = 1 + 0.5 * torch.randn(out)
    vector[:still] = 1
    return [torch.randn(out, in_), vector]


def _product(factors):
    A, B = (factor.double() for factor in factors)  # one of them may be wider than the other
    return {"B @ A": B @ A}


@check_for(
    cases=[
        Case(lambda: _scaling(12, 20)),
        Case(lambda: _scaling(20, 12)),
        Case(lambda: _scaling(16, 16), note="a square weight"),
        Case(lambda: _scaling(24, 10, still=20), note="20 of 24 entries are 1"),
        Case(lambda: _scaling(1, 8), note="a single row"),
    ],
    returns=("A", "B"),
    view=_product,
    causes=mistakes(
        """
        def ia3_as_lora(weight, vector):
            eye = torch.eye(min(weight.shape), dtype=weight.dtype)
            update = (vector - 1)[:, None] * weight
            return (eye, update) if len(weight) > weight.shape[1] else (update, eye)
        """,
        """
        BA is the scaled weight itself: LoRA adds BA to W, so it must be the change
            (vector - 1) → vector
        the sign is reversed: BA is the change that is added to W
            (vector - 1) → (1 - vector)
        the scaling acts twice, in A and in B
            (vector - 1) → (vector - 1).square()
        1 is added to the vector: the rows are scaled by l, so they change by l − 1
            (vector - 1) → (vector + 1)
        the change loses its sign: some rows become smaller
            (vector - 1) → (vector - 1).abs()
        W is left out: BA is the same for every weight
            * weight → * torch.eye(*weight.shape, dtype=weight.dtype)
        the order is reversed: return A first
            if len(weight) > → if len(weight) <=
        r is the smaller of out and in: where there are more rows than columns, r is in
            return (eye, update) if len(weight) > weight.shape[1] else (update, eye) →
                return weight, torch.diag(vector - 1)
        r is the smaller of out and in: where there are more columns than rows, r is out
            min(weight.shape) → max(weight.shape)
            if len(weight) > → if len(weight) <=
        """,
    ),
)
def ia3_as_lora(weight, vector):
    """W + BA is the weight with scaled rows, and A and B have the full rank's shapes."""
    delta = (vector.double()[:, None] - 1) * weight.double()
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return V.to(weight.dtype), (U * S).to(weight.dtype)


# ------------------------------------------------------------------ diagnose_knobs

# Of each run of data/results/broken_knobs.csv: what is wrong, and what its knobs show of it.
_FAULTY_RUNS = {
    "A": (
        "stored as l − 1",
        "the knobs lie around 0, and yet the model is as good as the healthy one: it was trained "
        "well, and the file holds the changes",
    ),
    "B": ("weight decay is on", "the middle of all three kinds has sunk below 1, towards 0"),
    "C": (
        "the output of the feed-forward is scaled",
        "the third vector has 192 entries, as many as the model is wide, and not 512",
    ),
    "D": (
        "the vectors start at zero",
        "the knobs lie around 0, and the model is far worse than the healthy one",
    ),
    "E": (
        "trained at LoRA's learning rate",
        "no knob has come far from 1, and the model has learned less than the healthy one",
    ),
}


@check_for(**diagnosis(_FAULTY_RUNS))
def diagnose_knobs():
    """Every run has its fault. What shows it:"""


# ------------------------------------------------------------------ IA3Attention

_WIDTH = 20  # of what goes in, in every case: a view sees the module alone


def _projections(n_heads, n_kv, d_h=6, bias=True, look=()):
    layers = []
    for n in (n_heads, n_kv, n_kv):
        layer = nn.Linear(_WIDTH, n * d_h, bias=bias).requires_grad_(False)
        layer.weight.mul_(3)  # so that attention prefers some tokens
        layer.look = look
        layers.append(layer)
    return [*layers, n_heads]


_TRAINED = ["l_k", "l_v"]
_ON_THE_QUERY = "the query has a vector too: (IA)³ scales keys and values only"
_TOO_WIDE = (
    "the vectors are as wide as the query: under grouped queries keys and values are narrower"
)
_ORDER = (
    "the key-value heads are in another order: neighbouring query heads share one key-value head"
)
_PARTS = (
    "the list of trainable parameters",
    "l_k",
    "l_v",
    "the output right after construction (that of the base)",
    "l_k right after construction",
    "l_v right after construction",
    "the output once l_k and l_v are trained",
    *(f"the gradient of {name}" for name in (*_TRAINED, "x")),
)


def _used(module):
    """Return what an IA3Attention holds and computes, from its start to its gradients; a part that
    earlier parts make impossible, and one that is not looked at, is None."""
    named = {n.rpartition(".")[2]: p for n, p in module.named_parameters()}
    trained = sorted(n for n, p in named.items() if p.requires_grad)
    looks = [m.look for m in module.modules() if getattr(m, "look", ())]
    look, seen = looks[0] if looks else _PARTS, dict.fromkeys(_PARTS)
    trains, k, v, first, start_k, start_v, output, *gradients = _PARTS
    seen[trains] = trained if trains in look else _TRAINED
    if seen[trains] != _TRAINED or not named.keys() >= {*_TRAINED}:
        return seen
    l_k, l_v = (named[name] for name in _TRAINED)
    if k in look:
        # For their widths alone; (1, n) and (heads, d_h) are the same entries in the same order.
        seen[k], seen[v] = torch.zeros(l_k.numel()), torch.zeros(l_v.numel())
    if start_k in look:
        seen[start_k], seen[start_v] = (n.detach().flatten().clone() for n in (l_k, l_v))
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    if k in look and any(vector.numel() != min(widths, default=0) for vector in (l_k, l_v)):
        return seen
    torch.random.default_generator.manual_seed(0)
    x = torch.randn(2, 7, _WIDTH, requires_grad=True)
    with torch.no_grad():
        seen[first] = module(x) if first in look else None
        if output not in look or not isinstance(seen[first], torch.Tensor):
            return seen
        for vector in (l_k, l_v):
            vector.copy_(1 + 0.6 * torch.randn(vector.shape))
    with torch.enable_grad():
        y = module(x)
        seen[output] = y.detach()
        to_k, to_v, to_x = gradients_or_zeros(y, (l_k, l_v, x))
    return seen | dict(zip(gradients, (to_k.flatten(), to_v.flatten(), to_x), strict=True))


@check_for(
    cases=[
        Case(
            lambda: _projections(4, 2, look=_PARTS[:1]),
            note="4 query heads, 2 key-value heads",
            bug=_ON_THE_QUERY,
        ),
        Case(
            lambda: _projections(4, 2, look=_PARTS[1:3]),
            note="4 query heads, 2 key-value heads",
            bug=_TOO_WIDE,
        ),
        Case(
            lambda: _projections(4, 2, look=_PARTS[3:4]),
            note="4 query heads, 2 key-value heads",
            bug=_ORDER,
        ),
        Case(lambda: _projections(4, 2), note="4 query heads, 2 key-value heads"),
        Case(lambda: _projections(6, 1), note="6 query heads, 1 key-value head"),
        Case(lambda: _projections(4, 4), note="4 heads each"),
        Case(lambda: _projections(4, 2, d_h=5, bias=False), note="layers without a bias"),
    ],
    returns="the module",
    view=_used,
    staged=True,
    causes=mistakes(
        """
        class IA3Attention(nn.Module):
            def __init__(self, q_proj, k_proj, v_proj, n_heads):
                super().__init__()
                self.q, self.k, self.v, self.n_heads = q_proj, k_proj, v_proj, n_heads
                start = torch.ones(k_proj.out_features)
                self.l_k, self.l_v = nn.Parameter(start), nn.Parameter(start.clone())

            def forward(self, x):
                q, k, v = self.q(x), self.k(x) * self.l_k, self.v(x) * self.l_v
                d_h = q.shape[-1] // self.n_heads
                q, k, v = (t.unflatten(-1, (-1, d_h)).transpose(1, 2) for t in (q, k, v))
                group = self.n_heads // k.shape[1]
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                return y.transpose(1, 2).flatten(2)
        """,
        """
        the query has a vector too: (IA)³ scales keys and values only
            start = → self.l_q = nn.Parameter(torch.ones(q_proj.out_features)); start =
        the vectors are as wide as the query: under grouped queries keys and values are narrower
            k_proj.out_features → q_proj.out_features
        the vectors have d_h entries, which all key-value heads share: each head has its own
            k_proj.out_features → q_proj.out_features // n_heads
        the vectors start as zeros, which silences keys and values: start from ones
            torch.ones → torch.zeros
        keys and values are scaled by 1 + l: let l itself scale them, and start from ones
            torch.ones → torch.zeros
            * self.l_k → * (1 + self.l_k)
            * self.l_v → * (1 + self.l_v)
        the output differs from the base's at the start: ones scaled as 1 + l give 2, so scale by l
        itself
            * self.l_k → * (1 + self.l_k)
            * self.l_v → * (1 + self.l_v)
        the keys and values are scaled after the heads are repeated: scale before, where a vector
        has as many entries as the key
            self.k(x) * self.l_k, self.v(x) * self.l_v → self.k(x), self.v(x)
            k.repeat_interleave(group, 1), →
                k.repeat_interleave(group, 1) * self.l_k.view(1, -1, 1, d_h),
            v.repeat_interleave(group, 1) →
                v.repeat_interleave(group, 1) * self.l_v.view(1, -1, 1, d_h)
        l_k and l_v are swapped: l_k scales the keys
            self.k(x) * self.l_k → self.k(x) * self.l_v
            self.v(x) * self.l_v → self.v(x) * self.l_k
        the values are not scaled
            self.v(x) * self.l_v → self.v(x)
        the keys are not scaled
            self.k(x) * self.l_k → self.k(x)
        the scores are not divided by √d_h
            is_causal=True → is_causal=True, scale=1.0
        the base trains too: only l_k and l_v may train
            start.clone()) → start.clone()); self.requires_grad_()
        l_k and l_v are plain tensors: nn.Parameter makes them train
            nn.Parameter(start), nn.Parameter(start.clone()) → start, start.clone()
        l_k scales both keys and values: l_v scales the values
            self.v(x) * self.l_v → self.v(x) * self.l_k
        the biases are not scaled: the vector acts on x Wᵀ + b
            self.k(x) * self.l_k → F.linear(x, self.k.weight * self.l_k[:, None], self.k.bias)
            self.v(x) * self.l_v → F.linear(x, self.v.weight * self.l_v[:, None], self.v.bias)
        the key-value heads are in another order: neighbouring query heads share one key-value head
            k.repeat_interleave(group, 1), v.repeat_interleave(group, 1) →
                k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
        the causal mask is missing: no token may look ahead
            , is_causal=True → ∅
        no gradient reaches the vectors, so they learn nothing
            * self.l_k → * self.l_k.detach()
            * self.l_v → * self.l_v.detach()
        """,
    ),
)
class IA3Attention(nn.Module):
    """The layer is the base at the start, and computes (IA)³ and its gradients once trained."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.layers, self.n_heads = nn.ModuleList([q_proj, k_proj, v_proj]), n_heads
        self.l_k = nn.Parameter(torch.ones(k_proj.out_features))
        self.l_v = nn.Parameter(torch.ones(v_proj.out_features))

    def forward(self, x):
        q, k, v = (layer(x) for layer in self.layers)
        k, v = k * self.l_k, v * self.l_v
        d_h, tokens, outputs = q.shape[-1] // self.n_heads, x.shape[1], []
        ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        group = q.shape[-1] // k.shape[-1]
        for head in range(self.n_heads):  # one after another, the weights written out
            own, shared = (slice(n * d_h, (n + 1) * d_h) for n in (head, head // group))
            scores = q[..., own] @ k[..., shared].mT / d_h**0.5
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            outputs.append(weights @ v[..., shared])
        return torch.cat(outputs, -1)
