"""Checks of lesson 01."""

from types import SimpleNamespace

import torch
from torch import nn

from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ largest_batch


@check_for(
    cases=[
        Case(lambda: [400, 100, 80, 7], note="the activations decide"),
        Case(lambda: [9_000, 1_000, 2_500, 2.5], note="a fraction of a byte a sentence"),
        Case(lambda: [400, 100, 310, 7], note="the gradients alone do not fit"),
        Case(lambda: [400, 100, 300, 7], note="the gradients fit exactly"),
        Case(lambda: [400, 100, 80, 6], note="50 sentences fit exactly"),
        Case(lambda: [400, 390, 5, 12], note="not even one sentence fits"),
        Case(lambda: [400, 500, 0, 12], note="not even the weights fit"),
        Case(lambda: [24 * 2**30, 14 * 2**30, 3 * 2**30, 10 * 2**20]),
    ],
    causes=mistakes(
        """
        def largest_batch(gpu_bytes, held, gradients, per_sentence):
            left = gpu_bytes - held
            fits = max(0, int(left // per_sentence))
            return fits if gradients <= left else 0
        """,
        """
        gradients and activations are added: a step never holds all of both, so its peak is about
        the larger of the two
            left // per_sentence → (left - gradients) // per_sentence
            fits if gradients <= left else 0 → fits
        the gradients are left out: where they do not fit, no batch does
            fits if gradients <= left else 0 → fits
        the gradients limit the batch: they do not grow with it, they fit or they do not
            left // per_sentence → min(left, gradients) // per_sentence
        each sentence is given gradients of its own: their size does not depend on the batch
            left // per_sentence → left // (per_sentence + gradients)
            fits if gradients <= left else 0 → fits
        weights and optimiser are left out: `held` lies there during the whole step
            gpu_bytes - held → gpu_bytes
        the batch is one sentence too large: round down
            // per_sentence) → // per_sentence + 1)
        a batch that takes exactly the memory still fits: compare with <=
            int(left // per_sentence) → int((left - 1) // per_sentence)
        gradients that take exactly what is left still fit: compare with <=
            gradients <= left → gradients < left
        return 0 where not even one sentence fits
            max(0, int(left // per_sentence)) → max(1, int(left // per_sentence))
        a batch has no negative number of sentences: return 0 where the weights do not fit
            max(0, int(left // per_sentence)) → int(left // per_sentence)
            fits if gradients <= left else 0 → fits if gradients <= max(left, 0) else 0
        a batch is a whole number of sentences: round down
            int(left // per_sentence) → left / per_sentence
        """,
    ),
)
def largest_batch(gpu_bytes, held, gradients, per_sentence):
    """Both high points of a step are within the memory, that of the activations and that of the
    gradients, also where one byte decides and where no batch fits."""
    most = 0
    while held + max(gradients, (most + 1) * per_sentence) <= gpu_bytes:
        most += 1
    return most


# ------------------------------------------------------------------ training_bytes


@check_for(
    cases=[
        (6_738_415_616, 4_194_304),
        (1_000, 1_000),
        (7_001, 130, 2, 4, 0, 6),
        (9_000, 70, 0.5, 2, 4, 8),
        (12_345, 0),
    ],
    causes=mistakes(
        """
        def training_bytes(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
            every_weight = n_params * weight
            trained = n_trainable * (grad + master + moments)
            return int(every_weight + trained)
        """,
        """
        gradients, master copy and moments are counted for the frozen weights too
            n_trainable * → n_params *
        the gradients are counted for the frozen weights too
            n_params * weight → n_params * (weight + grad)
            (grad + master → (master
        the frozen weights are missing: they take memory although they do not train
            n_params * weight → n_trainable * weight
        the trainable weights are counted twice: n_params includes n_trainable
            (grad + master → (weight + grad + master
        the trainable weights are missing: n_params includes n_trainable
            n_params * weight → (n_params - n_trainable) * weight
        the master copy is left out
            grad + master + moments → grad + moments
        the gradients are left out
            grad + master + moments → master + moments
        the master copy is counted for the frozen weights too
            n_params * weight → n_params * (weight + master)
            grad + master + moments → grad + moments
        the default values are used: use the arguments weight, grad, master and moments
            n_params * weight → n_params * 2
            grad + master + moments → 14
        `moments` already holds the bytes of both of Adam's moments: do not double it
            + moments → + 2 * moments
        half a byte for each weight is rounded before it is multiplied
            n_params * weight → n_params * int(weight)
        """,
    ),
)
def training_bytes(n_params, n_trainable, weight=2, grad=2, master=4, moments=8):
    """The bytes of weights, gradients, master copy and moments, also with half-byte weights."""
    frozen = (n_params - n_trainable) * weight
    return round(frozen + n_trainable * (weight + grad + master + moments))


# ------------------------------------------------------------------ step_flops


@check_for(
    cases=[(7_000, 130, 11), (1_000, 1_000, 3), (6_738_415_616, 4_194_304, 2_048), (5_000, 1, 7)],
    causes=mistakes(
        """
        def step_flops(n_params, n_trainable, tokens):
            forward = through = 2 * n_params
            gradients = 2 * n_trainable
            return (forward + through + gradients) * tokens
        """,
        """
        frozen weights need no weight gradients: only n_trainable counts there
            2 * n_trainable → 2 * n_params
        the backward pass still goes through the frozen weights: 2·N·T more
            + through + gradients → + 2 * gradients
        4 of the 6 operations for each trainable weight are in 4·N already: add only 2 more
            2 * n_trainable → 6 * n_trainable
        only the trainable weights are counted
            2 * n_params → 2 * n_trainable
        the forward pass is left out
            forward + through → through
        the weight gradients are left out
            + gradients → ∅
        a multiply-add is two operations, and is counted as one
            2 * n_params → n_params
            2 * n_trainable → n_trainable
        these are the operations for one token: multiply by the number of tokens
            * tokens → ∅
        """,
    ),
)
def step_flops(n_params, n_trainable, tokens):
    """The forward pass, the backward pass and the gradients of the trainable weights are
    counted."""
    every_weight, trained_weight = 2 + 2, 2 + 2 + 2
    return tokens * (every_weight * (n_params - n_trainable) + trained_weight * n_trainable)


# ------------------------------------------------------------------ largest_rank


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
    causes=mistakes(
        """
        def largest_rank(shapes, budget_bytes, bytes_per_parameter):
            a_rank = bytes_per_parameter * sum(out + in_ for out, in_ in shapes)
            fits = int(budget_bytes // a_rank)
            useful = min(min(shape) for shape in shapes)
            return min(fits, useful)
        """,
        """
        a rank costs out + in parameters a layer, not out · in
            out + in_ for → out * in_ for
        only A is counted: B has `out` parameters a rank
            out + in_ for → in_ for
        only B is counted: A has `in` parameters a rank
            out + in_ for → out for
        only the first layer is counted
            out, in_ in shapes → out, in_ in shapes[:1]
            shape in shapes) → shape in shapes[:1])
        the bytes of a parameter are left out
            bytes_per_parameter * sum → sum
        this rank is one too large for the budget: round down
            min(fits, useful) → min(fits, useful) + 1
        a rank that takes exactly the budget still fits: compare with <=
            budget_bytes // → (budget_bytes - 1) //
        return 0 where not even rank 1 fits
            min(fits, useful) → max(1, min(fits, useful))
        the cap is missing: the rank must not exceed the smallest min(out, in)
            min(fits, useful) → fits
        the limit is the smallest side of all layers, not the largest
            min(min(shape) → max(min(shape)
        only the first layer limits the rank: the smallest layer must
            shape in shapes) → shape in shapes[:1])
        the budget is split evenly among the layers: at the same rank, layers differ in cost
            sum(out + in_ for → max(out + in_ for
            int(budget_bytes → int(budget_bytes / len(shapes)
        a rank is a whole number: round down
            int(budget_bytes // a_rank) → budget_bytes / a_rank
        """,
    ),
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
    """Hold the given parts as a small network."""

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
    """Return a frozen 4-bit weight as bitsandbytes keeps it: two codes a byte, and a
    quant_state."""
    net = _Net(base=nn.Linear(in_, out), branch=nn.Linear(in_, 4, bias=False), **parts)
    codes = torch.randint(0, 256, (out * in_ // 2, 1), dtype=torch.uint8)
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


_TWICE = "the tied weight is counted twice"
_BUFFERS = "buffers are counted: they are not parameters"
_BY_BYTES = "the packed weight is counted by its bytes: each byte holds two weights"


def _tied_case(net, more=""):
    shared = "Embedding(11, 6), Linear(6, 6) and a head that shares the weight of the embedding"
    return Case(lambda: [net()], note=f"{shared}{more}", bug=_TWICE)


@check_for(
    cases=[
        Case(lambda: [_frozen_first()], note="Linear(7, 5), which is frozen, and Linear(5, 3)"),
        _tied_case(_tied),
        _tied_case(_tied_and_frozen, ", which is frozen"),
        Case(lambda: [_equal_norms()], note="Linear(6, 4) and two LayerNorm(4)", bug=_TWICE),
        _tied_case(lambda: _tied().to("meta"), ", on the meta device"),
        Case(lambda: [_buffers()], note="Linear(6, 5) and BatchNorm1d(5)", bug=_BUFFERS),
        Case(
            lambda: [_packed()],
            note="Linear(6, 10), whose weight is packed in 4 bits, and Linear(6, 4) without bias",
            bug=_BY_BYTES,
        ),
        Case(
            lambda: [_bytes()],
            note="Linear(6, 5) and a uint8 parameter of shape (7, 3) without quant_state",
            bug=_BY_BYTES,
        ),
        Case(
            lambda: [_everything()],
            note="a packed Linear(4, 8), Linear(4, 4) without bias, BatchNorm1d(5), "
            "Embedding(9, 4) and a head that shares its weight",
        ),
    ],
    describe=lambda note, model: f"a model of {note}",
    returns=("total", "trainable"),
    causes=mistakes(
        """
        def count_parameters(model):
            counted = list(model.parameters())
            quantised = [p for p in counted if hasattr(p, "quant_state")]
            size = {id(p): p.numel() for p in counted}
            size |= {id(p): math.prod(p.quant_state.shape) for p in quantised}
            total = sum(size[id(p)] for p in counted)
            trainable = sum(size[id(p)] for p in counted if p.requires_grad)
            return total, trainable
        """,
        f"""
        {_TWICE}
            list(model.parameters()) →
                [p for _, p in model.named_parameters(remove_duplicate=False)]
        {_BUFFERS}
            list(model.parameters()) → [*model.parameters(), *model.buffers()]
        {_BY_BYTES}
            math.prod(p.quant_state.shape) → p.numel()
        uint8 alone does not make a packed weight: look for its quant_state
            hasattr(p, "quant_state") → p.dtype == torch.uint8
            math.prod(p.quant_state.shape) → 2 * p.numel()
        parameters of equal values are counted once: tied ones are one and the same object
            list(model.parameters()) → {{str(p.tolist()): p for p in model.parameters()}}.values()
        data_ptr() is 0 for every parameter on the meta device: tied ones are one and the same
        object
            list(model.parameters()) → {{p.data_ptr(): p for p in model.parameters()}}.values()
        the total holds only the trainable parameters
            return total, → return trainable,
        frozen parameters are counted as trainable
            return total, trainable → return total, total
        trainable and total are swapped
            return total, trainable → return trainable, total
        trainable parameters are recognised by .grad, which is None before a backward pass: use
        requires_grad
            if p.requires_grad → if p.grad is not None
        the frozen parameters are returned, not the trainable ones
            return total, trainable → return total, total - trainable
        """,
    ),
)
def count_parameters(model):
    """Tied weights are counted once, buffers not at all, and packed weights by their true
    number."""
    sizes = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                shape = p.quant_state.shape if hasattr(p, "quant_state") else p.shape
                # By identity: a tied weight is one object under two names.
                sizes[id(p)] = (torch.Size(shape).numel(), p.requires_grad)
    return sum(n for n, _ in sizes.values()), sum(n for n, trains in sizes.values() if trains)
