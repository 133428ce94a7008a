"""Checks of lesson 02."""

import torch
from torch import nn
from torch.nn import functional as F

from ..methods.lora import LinearWithLoRA
from .diagnosis import diagnosis
from .kit import Case, Forbid, check_for, refused
from .mistakes import mistakes, scaling_mistakes


def _factors(out, in_, rank):
    """Return A and B of a trained adapter: neither is zero."""
    return torch.randn(rank, in_), torch.randn(out, rank)


# ------------------------------------------------------------------ swap_words


def _product(factors):
    A, B = factors
    return {"the product BA": B @ A}


@check_for(
    cases=[
        Case(lambda: [torch.randn(9, 6), 2, 7]),
        Case(lambda: [torch.randn(5, 5), 4, 1], note="a square weight"),
        Case(lambda: [torch.randn(30, 8), 0, 29], note="the first word and the last"),
    ],
    returns=("A", "B"),
    view=_product,
    causes=mistakes(
        """
        def swap_words(weight, i, j):
            A = (weight[j] - weight[i])[None]
            B = torch.zeros(len(weight), 1)
            B[i], B[j] = 1.0, -1.0
            return A, B
        """,
        """
        row i becomes row j, but row j stays as it is: B has a second entry
            B[i], B[j] = 1.0, -1.0 → B[i] = 1.0
        row j becomes row i, but row i stays as it is: B has a second entry
            B[i], B[j] = 1.0, -1.0 → B[j] = -1.0
        both rows move in the same direction: what one of them gains, the other loses
            1.0, -1.0 → 1.0, 1.0
        the sign is reversed: each row moves away from the other one
            weight[j] - weight[i] → weight[i] - weight[j]
        A is row j itself: BA is added to what row i already holds, so A is a difference
            weight[j] - weight[i] → weight[j]
        A is row i itself: BA is added to what row j already holds, so A is a difference
            weight[j] - weight[i] → weight[i]
        row i moves to row j and nothing moves back: A is the difference of the two rows
            weight[j] - weight[i] → weight[i]
            1.0, -1.0 → -1.0, 1.0
        A is the sum of the two rows: each row needs their difference
            weight[j] - weight[i] → weight[j] + weight[i]
        BA is right, but the factors have rank 2: one row of A serves both words
            (weight[j] - weight[i])[None] → weight[[i, j]]
            torch.zeros(len(weight), 1) → torch.zeros(len(weight), 2)
            1.0, -1.0 → torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])
        the order is reversed: return A first
            return A, B → return B, A
        """,
    ),
)
def swap_words(weight, i, j):
    """weight + BA has rows i and j exchanged and all others as they were, at rank 1."""
    order = list(range(len(weight)))
    order[i], order[j] = j, i
    U, S, Vh = torch.linalg.svd(weight[order] - weight, full_matrices=False)
    return S[:1, None] * Vh[:1], U[:, :1]


# ------------------------------------------------------------------ diagnose

# Of each run of data/results/broken_runs.csv: what is wrong, and what in its report says so.
_BROKEN = {
    "A": (
        "merged before training",
        "no gradient reaches its factors, which is not a gradient of 0",
    ),
    "B": ("a target that matches too much", "it trains twice as many parameters as was meant"),
    "C": (
        "the learning rate of full fine-tuning",
        "both factors get gradients, and yet BA hardly changes",
    ),
    "D": ("the head is frozen", "it trains 770 parameters too few, and one layer has that many"),
    "E": ("both factors start at zero", "its gradients are 0, at the first step and at the last"),
}


@check_for(**diagnosis(_BROKEN))
def diagnose():
    """Every run has its cause. What gives each of them away:"""


# ------------------------------------------------------------------ compress_lora


def _pair(out, in_, rank, to, dtype=torch.float32):
    """Return factors with a strongly graded spectrum, so that the order of what is kept matters."""
    A, B = _factors(out, in_, rank)
    grades = torch.logspace(0, -1.5, rank)[torch.randperm(rank), None]
    return [(grades * A).to(dtype), B.to(dtype), to]


@check_for(
    cases=[
        Case(lambda: _pair(256, 192, 8, to=3)),
        Case(lambda: _pair(40, 72, 6, to=1)),
        Case(lambda: _pair(72, 40, 5, to=5), note="nothing to leave out"),
        Case(lambda: _pair(64, 64, 9, to=4, dtype=torch.float64)),
    ],
    returns=("A", "B"),
    view=_product,
    tolerance=1e-4,
    forbid=[
        Forbid(
            lambda A, B, rank: [(B.shape[0], A.shape[1])],
            "That is the (out, in) product, which a large layer has no room for: "
            "take the SVD of a small matrix between two QR factors.",
        ),
        # In the square case this is true of the product as well.
        Forbid(
            lambda A, B, rank: [(A.shape[1], A.shape[1]), (B.shape[0], B.shape[0])],
            "That is a square as wide as the whole weight: svd gives thin factors with "
            'full_matrices=False, and qr with mode="reduced".',
        ),
    ],
    causes=mistakes(
        """
        def compress_lora(A, B, rank):
            Qb, Rb = torch.linalg.qr(B)
            Qa, Ra = torch.linalg.qr(A.T)
            U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
            U, S, Vh = Qb @ U[:, :rank], S[:rank], Vh[:rank] @ Qa.T
            return Vh, U * S
        """,
        """
        the first rows and columns are kept: their order says nothing about their size
            return Vh, U * S → return A[:rank], B[:, :rank]
        QR alone does not sort directions by size: a small SVD must follow
            return Vh, U * S → return Rb[:rank] @ A, Qb[:, :rank]
        only A is decomposed, but B too decides which directions are large
            torch.linalg.svd(Rb @ Ra.T) → torch.linalg.svd(A, full_matrices=False)
            Qb @ U[:, :rank], S[:rank], Vh[:rank] @ Qa.T → B @ U[:, :rank], S[:rank], Vh[:rank]
        Aᵀ = Q R gives A = Rᵀ Qᵀ: the R of A's QR is not transposed
            Ra.T → Ra
        torch.linalg.svd returns Vᵀ: its rows are the directions
            Vh[:rank] @ Qa.T → Vh[:, :rank].T @ Qa.T
        the smallest singular values are kept, not the largest
            Qb @ U[:, :rank], S[:rank], Vh[:rank] @ Qa.T →
                Qb @ U[:, -rank:], S[-rank:], Vh[-rank:] @ Qa.T
        the singular values are left out
            U * S → U
        both factors contain the full singular values: the product needs them once
            Vh, U * S → S[:, None] * Vh, U * S
        the order is reversed: return A first
            Vh, U * S → U * S, Vh
        """,
    ),
)
def compress_lora(A, B, rank):
    """The factors are as close to BA as the rank allows, without a tensor as large as a weight."""
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


# ------------------------------------------------------------------ serve_lora


def _mixed(which, n, tokens=3, out=40, in_=24, rank=4):
    """Return a batch with a text for each entry of `which`."""
    A, B = torch.randn(n, rank, in_), torch.randn(n, out, rank)
    return [torch.randn(len(which), tokens, in_), A, B, 0.5 + torch.rand(n), torch.tensor(which)]


@check_for(
    cases=[
        Case(lambda: _mixed([2, 0, 1, 2], n=4), note="which = [2, 0, 1, 2]"),
        Case(lambda: _mixed([1, -1, 0, 1, 2], n=3), note="which = [1, -1, 0, 1, 2]"),
        Case(lambda: _mixed([-1, 0], n=2, tokens=7, rank=1), note="which = [-1, 0], rank 1"),
        Case(lambda: _mixed([4, 4, -1, 3], n=6, out=32, in_=32), note="which = [4, 4, -1, 3]"),
    ],
    gradients=("x", "A", "B"),
    forbid=[
        Forbid(
            lambda x, A, B, scaling, which: [
                (*copies, B.shape[1], A.shape[2])
                for copies in [(), *[(k,) for k in range(2, len(which) + len(A))]]
            ],
            "That holds a product BA of shape (out, in): send x through A first, then through B.",
        )
    ],
    causes=mistakes(
        """
        def serve_lora(x, A, B, scaling, which):
            low = x @ A[which].mT
            added = scaling[which, None, None] * (low @ B[which].mT)
            return torch.where(which[:, None, None] < 0, 0.0, added)
        """,
        """
        the idea is right, but a text with -1 gets the last adapter, as index -1 does in Python
            torch.where(which[:, None, None] < 0, 0.0, added) → added
        the idea is right, but a text with -1 gets the first adapter: clamp makes -1 a 0
            A[which] → A[which.clamp(min=0)]
            scaling[which, None, None] → scaling[which.clamp(min=0), None, None]
            B[which] → B[which.clamp(min=0)]
            torch.where(which[:, None, None] < 0, 0.0, added) → added
        the idea is right, but a text with -1 is dropped: it keeps its place, with zeros
            torch.where(which[:, None, None] < 0, 0.0, added) → added[which >= 0]
        the scaling is left out
            scaling[which, None, None] * → ∅
        every text gets the scaling of the first adapter
            scaling[which, None, None] → scaling[0]
        the scaling goes by the place in the batch: it belongs to the adapter, scaling[which]
            scaling[which, None, None] →
                scaling[torch.arange(len(x)) % len(scaling), None, None]
        text k gets adapter k: `which` says whose text it is
            low = x @ A[which].mT → k = torch.arange(len(x)) % len(A); low = x @ A[k].mT
            scaling[which, None, None] → scaling[k, None, None]
            B[which] → B[k]
        every text gets the sum of all adapters
            x @ A[which].mT → torch.einsum("bti,nri->nbtr", x, A)
            scaling[which, None, None] * (low @ B[which].mT) →
                torch.einsum("n,nbtr,nor->bto", scaling, low, B)
        every text gets the mean of all adapters
            x @ A[which].mT → torch.einsum("bti,nri->nbtr", x, A) / len(A)
            scaling[which, None, None] * (low @ B[which].mT) →
                torch.einsum("n,nbtr,nor->bto", scaling, low, B)
        """,
    ),
)
def serve_lora(x, A, B, scaling, which):
    """Every text gets its own adapter or none, and no product BA is formed."""
    # A further adapter of zeros for those that have none.
    A, B, scaling = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (A, B, scaling))
    chosen = F.one_hot(which % len(A), len(A)).to(x.dtype)
    return torch.einsum("bn,n,bti,nri,nor->bto", chosen, scaling, x, A, B)


# ------------------------------------------------------------------ embedding_lora


def _table(ids, alpha, vocabulary=23, d=12, rank=4):
    return [torch.tensor(ids), torch.randn(vocabulary, d), *_factors(d, vocabulary, rank), alpha]


@check_for(
    cases=[
        Case(lambda: _table([[3, 0, 22, 3, 7], [1, 1, 20, 9, 4]], 10)),
        Case(lambda: _table([5, 2, 5], 4.0, vocabulary=17, d=20, rank=6)),
        Case(lambda: _table([[[0, 1], [2, 3]], [[4, 5], [6, 12]]], 3, vocabulary=13, d=9)),
    ],
    forbid=[
        Forbid(
            lambda ids, weight, A, B, alpha: [tuple(weight.shape)],
            "That is as large as the whole table (V, d): look up the columns of A for the ids, "
            "and only then go from rank r to width d.",
        ),
        Forbid(
            # For all ids, flat or not, and for those of one row in a loop.
            lambda ids, weight, A, B, alpha: [
                (ids.numel(), len(weight)),
                *[(*ids.shape[i:], len(weight)) for i in range(ids.ndim)],
            ],
            "That is as large as a one-hot matrix of the ids, (…, V): look up rows with table[ids] "
            "or F.embedding.",
        ),
    ],
    causes=mistakes(
        """
        def embedding_lora(ids, weight, A, B, alpha):
            r = A.shape[0]
            update = A.T[ids] @ B.T
            return weight[ids] + alpha / r * update
        """,
        scaling_mistakes("alpha / r"),
        """
        alpha is divided by the vocabulary's size: the rank is A.shape[0]
            A.shape[0] → A.shape[1]
        the token table's own rows are missing: this is the update alone
            weight[ids] + → ∅
        the update is missing: these are the base's rows
            + alpha / r * update → ∅
        the scaling is applied to the base's rows too
            weight[ids] + alpha / r * update → alpha / r * (weight[ids] + update)
        A is reshaped: transpose it, because its columns are the tokens
            A.T[ids] → A.reshape(-1, r)[ids]
        """,
    ),
)
def embedding_lora(ids, weight, A, B, alpha):
    """Every token's row of weight + (alpha / r)·(BA)ᵀ, by lookup, for ids of any shape."""
    # What the lookup must equal: one-hot rows times the merged table.
    one_hot = F.one_hot(ids, len(weight)).to(weight.dtype)
    return one_hot @ (weight + alpha / A.shape[0] * (B @ A).T)


# ------------------------------------------------------------------ sum_adapters


def _adapters(*settings, out=40, in_=72):
    return [[(*_factors(out, in_, rank), alpha, weight) for rank, alpha, weight in settings]]


@check_for(
    cases=[
        Case(lambda: _adapters((4, 10, 0.7), (4, 6, 0.5)), note="two of rank 4"),
        Case(lambda: _adapters((2, 8, 0.7), (5, 4.0, 0.6), (3, 9, 1.4)), note="ranks 2, 5, 3"),
        Case(lambda: _adapters((4, 10, 1.5), (3, 5, -0.5)), note="one weight is negative"),
        Case(lambda: _adapters((3, 7, 0.4)), note="a single adapter"),
    ],
    returns=("A", "B"),
    view=_product,
    causes=mistakes(
        """
        def sum_adapters(adapters):
            ranks = sum(len(A) for A, *_ in adapters)
            new_A = [A for A, B, alpha, weight in adapters]
            new_B = [weight * (alpha / len(A)) * B for A, B, alpha, weight in adapters]
            return torch.cat(new_A), torch.cat(new_B, dim=1)
        """,
        """
        the factors are summed, not the products: B₁A₁ + B₂A₂ isn't (B₁ + B₂)(A₁ + A₂), and with
        square roots as in PEFT's 'linear'
            [A for → [math.sqrt(weight * alpha / len(A)) * A for
            weight * (alpha / len(A)) * B → math.sqrt(weight * alpha / len(A)) * B
            torch.cat(new_A), torch.cat(new_B, dim=1) → sum(new_A), sum(new_B)
        the factors are summed, not the products: B₁A₁ + B₂A₂ isn't (B₁ + B₂)(A₁ + A₂)
            torch.cat(new_A), torch.cat(new_B, dim=1) → sum(new_A), sum(new_B)
        the weights are left out
            weight * (alpha → (alpha
        the scalings alpha / r are left out
            (alpha / len(A)) * → ∅
        alpha is not divided by r
            (alpha / len(A)) → alpha
        weight and scaling are in both factors: they count twice in BA
            [A for → [weight * alpha / len(A) * A for
        alpha is divided by the sum of the ranks: each adapter has its own rank
            len(A)) → ranks)
        a negative weight has no square root: put weight and scaling into one factor
            [A for → [torch.tensor(weight * alpha / len(A)).sqrt() * A for
            weight * (alpha / len(A)) → torch.tensor(weight * alpha / len(A)).sqrt()
        the sign of a negative weight is lost
            [weight * → [abs(weight) *
        the order is reversed: return A first
            torch.cat(new_A), torch.cat(new_B, dim=1) →
                torch.cat(new_B, dim=1), torch.cat(new_A)
        """,
    ),
)
def sum_adapters(adapters):
    """BA is the weighted sum of all updates, also for different ranks and signs."""
    update = sum(
        weight * alpha / len(A) * torch.einsum("or,ri->oi", B, A)
        for A, B, alpha, weight in adapters
    )
    # Any factors will do: only their product and their shapes are compared.
    rank = sum(len(A) for A, _, _, _ in adapters)
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


# ------------------------------------------------------------------ apply_lora


class _Decoder(nn.Module):
    """Hold two blocks. seq_proj ends with q_proj, and upper contains up: neither is a segment."""

    def __init__(self, d=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, d), nn.Linear(d, 5)
        self.layers = nn.ModuleList()
        for _ in range(2):
            mlp = nn.ModuleDict({"up": nn.Linear(d, 20), "upper": nn.Linear(20, d)})
            block = {"q_proj": nn.Linear(d, 10), "seq_proj": nn.Linear(10, d), "mlp": mlp}
            self.layers.append(nn.ModuleDict(block))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer.seq_proj(layer.q_proj(x).tanh())
            x = x + layer.mlp.upper(layer.mlp.up(x).relu())
        return self.head(x)


def _injected(model):
    """Return what injection decided, then what the model computes with trained factors."""
    # By what it has, not by its class: the lesson's own class serves as well.
    branched = {name: m for name, m in model.named_modules() if hasattr(m, "lora")}
    wrapped = {name: m for name, m in branched.items() if hasattr(m.lora, "lora_A")}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    ids = torch.arange(11).reshape(1, 11)
    with torch.no_grad():
        before = model(ids)
        for seed, module in enumerate(wrapped.values()):
            for factor in (module.lora.lora_A, module.lora.lora_B):
                torch.random.default_generator.manual_seed(seed + factor.numel())
                factor.copy_(torch.randn(factor.shape))
        after = model(ids)
    return {
        "the list of modules with a LoRA branch": list(wrapped),
        "the list of trainable parameters": trains,
        "the shapes of the factors": [tuple(m.lora.lora_A.shape) for m in wrapped.values()],
        "the output right after injection": before,
        "the output once A and B are trained": after,
    }


def _injection(matches, freeze=True):
    """Make an apply_lora by what it matches and freezes; it refuses nothing."""

    def apply(model, rank, alpha, targets):
        if freeze:
            model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and any(matches(name, t) for t in targets):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, LinearWithLoRA(module, rank, alpha))
        return model

    return apply


def _segments(name, target):
    return f".{name}".endswith(f".{target}")


def _substring(name, target):
    return target in name


def _described(note, model, rank, alpha, targets):
    layers = "two blocks of linear layers q_proj, seq_proj, mlp.up and mlp.upper"
    model = f"a model{note} with an Embedding embed, {layers}, and a linear layer head"
    return f"{model}; rank={rank}, alpha={alpha}, targets={targets}"


_REST_TRAINS = "the rest of the model still trains: freeze it before the branches are added"
_ENDS = "targets are compared with the last characters of a name: compare whole segments"
_MATCHES = "targets match anywhere in a name: they must be whole segments at its end"
_PASSED_OVER = "a target that matches no linear layer is passed over in silence"
_AGAIN = "a model that has LoRA branches already gets them a second time"


def _frozen_before(*settings):
    """Return a case in which it does not matter whether an answer freezes the model."""
    note = " that is frozen already,"
    return Case(lambda: [_Decoder().requires_grad_(False), *settings], note, bug=_MATCHES)


def _second_call(targets):
    def earlier(apply, model, rank, alpha, targets):
        return [apply(model, 4, 10, ["q_proj"]), rank, alpha, targets]

    # The course's own `inject` raises RuntimeError here.
    raises, note = (
        (ValueError, RuntimeError),
        " that a first call with targets=['q_proj'] returned,",
    )
    return Case(lambda: [_Decoder(), 4, 10, targets], note, earlier, raises, bug=_AGAIN)


@check_for(
    cases=[
        # Of this name no other one is a part.
        Case(lambda: [_Decoder(), 4, 10, ["seq_proj"]], bug=_REST_TRAINS),
        _frozen_before(4, 10, ["q_proj"]),
        _frozen_before(2, 3.0, ("up", "head")),
        _frozen_before(3, 6, ["mlp.up", "layers.1.q_proj"]),
        refused(lambda: [_Decoder(), 4, 10, ["q_porj"]], "q_porj", bug=_PASSED_OVER),
        refused(lambda: [_Decoder(), 4, 10, ["q_proj", "embed"]], "embed", bug=_PASSED_OVER),
        _second_call(["q_proj"]),
        _second_call(["up"]),
        Case(lambda: [_Decoder().eval(), 4, 10, ["q_proj"]], note=" in eval mode"),
    ],
    describe=_described,
    returns="the model",
    view=_injected,
    changes=("model",),
    causes={
        _REST_TRAINS: _injection(_segments, freeze=False),
        _MATCHES: _injection(_substring),
        _ENDS: _injection(lambda name, target: name.endswith(target)),
        "only the last segment of a name is compared: a target may have several": _injection(
            lambda name, target: name.rpartition(".")[2] == target
        ),
        "a module at the top of the model has no dot before its name": _injection(
            lambda name, target: name.endswith(f".{target}")
        ),
    },
)
def apply_lora(model, rank, alpha, targets):
    """LoRA on the named layers alone, all else frozen."""
    return _injection(_segments)(model, rank, alpha, targets)
