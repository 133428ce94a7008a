"""Checks of lesson 01."""

from types import SimpleNamespace

import torch
from torch import nn

from .kit import Case, check_for

# ------------------------------------------------------------------ training_bytes


@check_for(
    cases=[
        (6_738_415_616, 4_194_304),
        (1_000, 1_000),
        (7_001, 130, 2, 4, 0, 6),
        (9_000, 70, 0.5, 2, 4, 8),
        (12_345, 0),
    ],
    causes={
        (
            "gradients, master copy and moments are counted for the frozen weights too"
        ): lambda n, t, w=2, g=2, c=4, m=8: int(n * (w + g + c + m)),
        "the gradients are counted for the frozen weights too": lambda n, t, w=2, g=2, c=4, m=8: (
            int(n * (w + g) + t * (c + m))
        ),
        (
            "the frozen weights are missing: they take memory although they do not train"
        ): lambda n, t, w=2, g=2, c=4, m=8: int(t * (w + g + c + m)),
        (
            "what trains has its weights counted twice: n_params includes n_trainable"
        ): lambda n, t, w=2, g=2, c=4, m=8: int(n * w + t * (w + g + c + m)),
        (
            "the weights of what trains are missing: n_params includes n_trainable"
        ): lambda n, t, w=2, g=2, c=4, m=8: int((n - t) * w + t * (g + c + m)),
        "the master copy is left out": lambda n, t, w=2, g=2, c=4, m=8: int(n * w + t * (g + m)),
        "the gradients are left out": lambda n, t, w=2, g=2, c=4, m=8: int(n * w + t * (c + m)),
        "the master copy is counted for the frozen weights too": lambda n, t, w=2, g=2, c=4, m=8: (
            int(n * (w + c) + t * (g + m))
        ),
        (
            "the defaults are counted: use the arguments weight, grad, master and moments"
        ): lambda n, t, w=2, g=2, c=4, m=8: 2 * n + 14 * t,
        (
            "`moments` is already both of Adam's moments: do not double it"
        ): lambda n, t, w=2, g=2, c=4, m=8: int(n * w + t * (g + c + 2 * m)),
        "the result is a float: bytes are whole": lambda n, t, w=2, g=2, c=4, m=8: float(
            n * w + t * (g + c + m)
        ),
        (
            "half a byte for each weight is rounded before it is multiplied"
        ): lambda n, t, w=2, g=2, c=4, m=8: n * int(w) + t * (g + c + m),
    },
)
def training_bytes(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    """The bytes of weights, gradients, master copy and moments, also with half-byte weights."""
    frozen = (n_params - n_trainable) * weight
    return round(frozen + n_trainable * (weight + grad + master + moments))


# ------------------------------------------------------------------ step_flops


@check_for(
    cases=[(7_000, 130, 11), (1_000, 1_000, 3), (6_738_415_616, 4_194_304, 2_048), (5_000, 1, 7)],
    causes={
        (
            "frozen weights need no weight gradients: only n_trainable counts there"
        ): lambda n, t, tokens: 6 * n * tokens,
        (
            "the backward pass still goes through the frozen weights: 2·N·T more"
        ): lambda n, t, tokens: 2 * n * tokens + 4 * t * tokens,
        (
            "of the 6 for each weight that trains, 4 are in 4·N already: 2 more are due"
        ): lambda n, t, tokens: (4 * n + 6 * t) * tokens,
        "only what trains is counted": lambda n, t, tokens: 6 * t * tokens,
        "the forward pass is left out": lambda n, t, tokens: 2 * (n + t) * tokens,
        "the weight gradients are left out": lambda n, t, tokens: 4 * n * tokens,
        "a multiply-add is two operations, and is counted as one": lambda n, t, tokens: (
            (2 * n + t) * tokens
        ),
        "this is for one token": lambda n, t, tokens: 4 * n + 2 * t,
        "the result is a float": lambda n, t, tokens: float((4 * n + 2 * t) * tokens),
    },
)
def step_flops(n_params, n_trainable, tokens):
    """The forward pass, the backward pass through all weights, the gradients of what trains."""
    every_weight, trained_weight = 2 + 2, 2 + 2 + 2
    return tokens * (every_weight * (n_params - n_trainable) + trained_weight * n_trainable)


# ------------------------------------------------------------------ largest_rank


def _ranks(cost, limit=min):
    """A wrong largest_rank from what one rank costs a layer."""

    def rank(shapes, budget, size):
        fits = int(budget // (size * sum(cost(o, i) for o, i in shapes)))
        return limit(fits, min(min(shape) for shape in shapes))

    return rank


_SHAPES = [(48, 96), (96, 48), (320, 96)]


@check_for(
    cases=[
        Case(lambda: [_SHAPES, 31_000, 2]),
        Case(lambda: [_SHAPES, 704 * 4 * 5, 4], note="rank 5 fits exactly"),
        Case(lambda: [_SHAPES, 704 * 4 * 5 - 1, 4], note="one byte too few for rank 5"),
        Case(lambda: [[(4096, 4096)] * 32 + [(1024, 4096)] * 32, 10**9, 16]),
        Case(lambda: [[(64, 64)], 127, 1], note="not even rank 1 fits"),
        Case(lambda: [_SHAPES, 10**9, 2], note="memory for more rank than the layers have"),
        Case(lambda: [[(50, 30)], 1_000, 2.5]),
        Case(
            lambda: [[(96, 320), (48, 96), (80, 200)], 10**9, 2],
            note="the tightest layer is not the first",
        ),
    ],
    causes={
        "a rank costs out + in parameters a layer, not out · in": _ranks(lambda o, i: o * i),
        "only A is counted: B has `out` parameters a rank": _ranks(lambda o, i: i),
        "only B is counted: A has `in` parameters a rank": _ranks(lambda o, i: o),
        "only the first layer is counted": lambda shapes, budget, size: _ranks(lambda o, i: o + i)(
            shapes[:1], budget, size
        ),
        "the bytes of a parameter are left out": lambda shapes, budget, size: _ranks(
            lambda o, i: o + i
        )(shapes, budget, 1),
        "this rank is one too large for the budget: round down": lambda *a: (
            _ranks(lambda o, i: o + i)(*a) + 1
        ),
        (
            "a rank that takes exactly the budget still fits: compare with <="
        ): lambda shapes, budget, size: _ranks(lambda o, i: o + i)(shapes, budget - 1, size),
        "where not even rank 1 fits the answer is 0": lambda *a: max(
            1, _ranks(lambda o, i: o + i)(*a)
        ),
        "no rank above the smallest min(out, in) is of use: stop there": _ranks(
            lambda o, i: o + i, limit=lambda fits, most: fits
        ),
        "the limit is the smallest side of all layers, not the largest": (
            lambda shapes, budget, size: min(
                int(budget // (size * sum(map(sum, shapes)))), max(map(min, shapes))
            )
        ),
        "only the first layer limits the rank, and the smallest must": (
            lambda shapes, budget, size: min(
                int(budget // (size * sum(map(sum, shapes)))), min(shapes[0])
            )
        ),
        "the budget is split evenly: layers of one rank differ in what they cost": (
            lambda shapes, budget, size: min(
                _ranks(lambda o, i: o + i)([shape], budget / len(shapes), size) for shape in shapes
            )
        ),
        "the result is a float": lambda *a: float(_ranks(lambda o, i: o + i)(*a)),
    },
)
def largest_rank(shapes, budget_bytes, bytes_per_parameter):
    """The largest rank whose A and B fit, also where one byte decides and where none fits."""
    rank, most = 0, min(min(shape) for shape in shapes)
    while rank < most:
        parameters = sum((rank + 1) * out + (rank + 1) * in_ for out, in_ in shapes)
        if parameters * bytes_per_parameter > budget_bytes:
            break
        rank += 1
    return rank


# ------------------------------------------------------------------ count_parameters


class _Net(nn.Module):
    """A small network of the parts that are given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def _frozen_first():
    net = _Net(first=nn.Linear(7, 5), second=nn.Linear(5, 3))
    net.first.requires_grad_(False)
    return net


def _tied():
    net = _Net(embed=nn.Embedding(11, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 11, bias=False))
    net.head.weight = net.embed.weight
    return net


def _tied_and_frozen():
    net = _tied()
    net.embed.requires_grad_(False)
    return net


def _buffers():
    return _Net(mix=nn.Linear(6, 5), norm=nn.BatchNorm1d(5))


def _packed(out=10, in_=6, **parts):
    """A frozen 4-bit weight as bitsandbytes keeps it: two codes a byte, beside a quant_state.

    Of an odd number of codes the last has a byte to itself.
    """
    net = _Net(base=nn.Linear(in_, out), branch=nn.Linear(in_, 4, bias=False), **parts)
    codes = torch.randint(0, 256, ((out * in_ + 1) // 2, 1), dtype=torch.uint8)
    net.base.weight = nn.Parameter(codes, requires_grad=False)
    net.base.weight.quant_state = SimpleNamespace(shape=torch.Size([out, in_]))
    return net


def _equal_norms():
    return _Net(mix=nn.Linear(6, 4), norm1=nn.LayerNorm(4), norm2=nn.LayerNorm(4))


def _bytes():
    net = _Net(mix=nn.Linear(6, 5))
    codes = torch.randint(0, 256, (7, 3), dtype=torch.uint8)
    net.table = nn.Parameter(codes, requires_grad=False)
    return net


def _everything():
    net = _packed(8, 4, norm=nn.BatchNorm1d(5), embed=nn.Embedding(9, 4), head=nn.Linear(4, 9))
    net.head.weight = net.embed.weight
    return net


def _size(p):
    return p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel()


def _packed_twice(p):
    return p.numel() * (2 if hasattr(p, "quant_state") else 1)


def _bytes_twice(p):
    return p.numel() * (2 if p.dtype == torch.uint8 else 1)


def _counted(tensors, size=_size):
    tensors = list(tensors)
    return sum(map(size, tensors)), sum(size(t) for t in tensors if t.requires_grad)


@check_for(
    cases=[
        Case(lambda: [_frozen_first()], note="one of two layers frozen"),
        Case(lambda: [_tied()], note="the head's weight is the embedding's"),
        Case(lambda: [_tied_and_frozen()], note="a tied weight, frozen"),
        Case(lambda: [_equal_norms()], note="two layer norms of equal values, not tied"),
        Case(lambda: [_buffers()], note="a batch norm, whose running statistics are buffers"),
        Case(lambda: [_packed()], note="a packed 4-bit weight"),
        Case(lambda: [_bytes()], note="a uint8 parameter without quant_state: not packed"),
        Case(lambda: [_packed(3, 3)], note="a packed weight (3, 3), in 5 bytes"),
        Case(lambda: [_everything()], note="tied, packed and with buffers"),
    ],
    returns=("total", "trainable"),
    causes={
        "the tied weight is counted twice": lambda m: _counted(
            p for _, p in m.named_parameters(remove_duplicate=False)
        ),
        "buffers are counted, and they are no parameters": lambda m: _counted(
            [*m.parameters(), *m.buffers()]
        ),
        "the packed weight is counted by its bytes, and each holds two weights": lambda m: _counted(
            m.parameters(), size=torch.numel
        ),
        "uint8 alone does not make a packed weight: look for its quant_state": lambda m: _counted(
            m.parameters(), size=_bytes_twice
        ),
        (
            "an odd number of weights leaves half of the last byte empty: ask quant_state.shape"
        ): lambda m: _counted(m.parameters(), size=_packed_twice),
        (
            "parameters of equal values are counted once: tied ones are one and the same object"
        ): lambda m: _counted({str(p.tolist()): p for p in m.parameters()}.values()),
        "only what trains is in the total": lambda m: (
            _counted(m.parameters())[1],
            _counted(m.parameters())[1],
        ),
        "what is frozen is counted as trainable": lambda m: (_counted(m.parameters())[0],) * 2,
        "trainable and total have changed places": lambda m: _counted(m.parameters())[::-1],
        (
            "what trains is judged by .grad, which is None before a backward pass; ask "
            "requires_grad"
        ): lambda m: (_counted(m.parameters())[0], 0),
        "the frozen parameters are returned, not the trainable ones": (
            lambda m: (
                _counted(m.parameters())[0],
                _counted(m.parameters())[0] - _counted(m.parameters())[1],
            )
        ),
    },
)
def count_parameters(model):
    """Tied weights once, no buffers, and packed 4-bit weights at their true number."""
    sizes = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                shape = p.quant_state.shape if hasattr(p, "quant_state") else p.shape
                # By identity: a tied weight is one object under two names.
                sizes[id(p)] = (torch.Size(shape).numel(), p.requires_grad)
    return sum(n for n, _ in sizes.values()), sum(n for n, trains in sizes.values() if trains)
