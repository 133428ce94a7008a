"""Checks of lesson 14."""

import math

import torch
from torch import nn

from ..methods.qlora import dequantize_nf4, quantize_nf4
from .kit import Case, check_for

# ------------------------------------------------------------------ rslora_scaling


@check_for(
    cases=[(16, 64), (16, 9), (6, 2), (32.0, 32), (8, 1), (0.5, 100), (12, 12)],
    causes={
        "this is LoRA's alpha / rank": lambda alpha, rank: alpha / rank,
        "alpha is under the root too": lambda alpha, rank: math.sqrt(alpha / rank),
        "the root is of alpha: it is of the rank": lambda alpha, rank: math.sqrt(alpha) / rank,
        "it is multiplied by the root: divide": lambda alpha, rank: alpha * math.sqrt(rank),
        "it is turned: this is √rank / alpha": lambda alpha, rank: math.sqrt(rank) / alpha,
        "alpha is left out": lambda alpha, rank: 1 / math.sqrt(rank),
        "rank**1/2 is (rank**1) / 2: the exponent needs brackets": lambda alpha, rank: (
            alpha / rank**1 / 2
        ),
        "it is divided by the rank and by its root: one of the two": lambda alpha, rank: (
            alpha / rank / math.sqrt(rank)
        ),
        "the rank is squared: take its root": lambda alpha, rank: alpha / rank**2,
        "the root is cut to a whole number: // or int() drops the fraction": (
            lambda alpha, rank: alpha / int(math.sqrt(rank))
        ),
        "the quotient is cut to a whole number": lambda alpha, rank: float(
            alpha // math.sqrt(rank)
        ),
    },
)
def rslora_scaling(alpha, rank):
    """A branch of any rank is scaled so that its output neither grows nor shrinks with the rank."""
    return float(alpha * rank**-0.5)


# ------------------------------------------------------------------ loraplus_groups


def _named(*rows, shape=(5, 5)):
    """[(name, parameter)] of "name" or "name, frozen"; each is known by its tag."""
    found = []
    for row in rows:
        name, _, frozen = row.partition(", ")
        size = shape[:1] if name.endswith("bias") else shape
        p = nn.Parameter(torch.randn(size), requires_grad=not frozen)
        p.tag = name
        found.append((name, p))
    return found


def _peft():
    at = "base_model.model.layers.0.q_proj"
    return _named(
        f"{at}.base_layer.weight, frozen",
        f"{at}.lora_A.default.weight",
        f"{at}.lora_B.default.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
    )


def _ours():
    return _named(
        "embedding.weight, frozen",
        "q_proj.base.weight, frozen",
        "q_proj.lora.lora_A",
        "q_proj.lora.lora_B",
        "v_proj.base.weight, frozen",
        "v_proj.lora.lora_A",
        "v_proj.lora.lora_B",
        "classifier.weight",
        "classifier.bias",
    )


def _resting():
    return _named(
        "k.lora_A.main.weight",
        "k.lora_B.main.weight",
        "k.lora_A.resting.weight, frozen",
        "k.lora_B.resting.weight, frozen",
    )


def _bank():
    return _named(
        "lora_Bank.0.lora_A", "lora_Bank.0.lora_B", "lora_Bank.gate.weight", "head_B", shape=(3, 3)
    )


def _by_group(groups):
    """What the groups say: their rates, and the names of the very parameters that they hold."""
    seen = {"the learning rates": [float(group["lr"]) for group in groups]}
    for which, group in zip(("first", "second"), groups, strict=False):
        tags = [getattr(p, "tag", "a copy of one") for p in group["params"]]
        seen[f"the list of what is in the {which} group"] = tags
    return seen


def _is_b(name):
    return "lora_B" in name.split(".")


def _grouped(
    is_b=_is_b,
    kept=lambda name, p: p.requires_grad,
    rates=lambda lr, ratio: (lr, lr * ratio),
    held=lambda p: p,
    first=None,
    order=lambda groups: groups,
):
    """A wrong loraplus_groups by one of its steps."""

    def groups(named_parameters, lr, ratio):
        rows = [(n, p) for n, p in named_parameters if kept(n, p)]
        in_first = first or (lambda name: not is_b(name))
        others = [held(p) for n, p in rows if in_first(n)]
        ups = [held(p) for n, p in rows if is_b(n)]
        low, high = rates(lr, ratio)
        return order([{"params": others, "lr": low}, {"params": ups, "lr": high}])

    return groups


def _one_dimensional(named_parameters, lr, ratio):
    rows = [(n, p) for n, p in named_parameters if p.requires_grad]
    ups = [p for n, p in rows if _is_b(n) or p.dim() == 1]
    others = [p for n, p in rows if not _is_b(n) and p.dim() != 1]
    return [{"params": others, "lr": lr}, {"params": ups, "lr": lr * ratio}]


def _twice_through(named_parameters, lr, ratio):
    others = [p for n, p in named_parameters if p.requires_grad and not _is_b(n)]
    ups = [p for n, p in named_parameters if p.requires_grad and _is_b(n)]
    return [{"params": others, "lr": lr}, {"params": ups, "lr": lr * ratio}]


@check_for(
    cases=[
        Case(lambda: [_peft(), 1e-3, 16], note="PEFT's names"),
        Case(lambda: [_ours(), 2e-4, 4.0], note="the course's names, and a head with a bias"),
        Case(lambda: [iter(_ours()), 1e-2, 8], note="an iterator, as model.named_parameters() is"),
        Case(lambda: [_resting(), 1e-3, 16], note="a second adapter is frozen"),
        Case(lambda: [_bank(), 1e-3, 16], note="modules called lora_Bank, and one head_B"),
        Case(lambda: [_named("a.bias", "b.bias"), 1e-3, 16], note="no LoRA in it"),
        Case(lambda: [_peft(), 1e-3, 0.25], note="a ratio below 1"),
    ],
    view=_by_group,
    staged=True,
    causes={
        "A gets the higher rate: B is what learns faster": _grouped(
            rates=lambda lr, ratio: (lr * ratio, lr)
        ),
        "B keeps lr and A gets lr / ratio: it is B's rate that changes": _grouped(
            rates=lambda lr, ratio: (lr / ratio, lr)
        ),
        "both groups get lr: then nothing is different from LoRA": _grouped(
            rates=lambda lr, ratio: (lr, lr)
        ),
        "both groups get lr · ratio": _grouped(rates=lambda lr, ratio: (lr * ratio, lr * ratio)),
        "B's rate is the ratio itself: multiply it by lr": _grouped(
            rates=lambda lr, ratio: (lr, float(ratio))
        ),
        "the ratio is added to lr: multiply": _grouped(rates=lambda lr, ratio: (lr, lr + ratio)),
        "B's rate is divided by the ratio": _grouped(rates=lambda lr, ratio: (lr, lr / ratio)),
        "the rate is multiplied by the root of the ratio: that is for rank, not here": _grouped(
            rates=lambda lr, ratio: (lr, lr * ratio**0.5)
        ),
        "the groups are in the other order: B's comes second": _grouped(order=lambda g: g[::-1]),
        "what is frozen is in a group: weight decay would move it": _grouped(
            kept=lambda n, p: True
        ),
        "a frozen B is in the second group: it belongs to an adapter that does not train": _grouped(
            kept=lambda n, p: p.requires_grad or _is_b(n)
        ),
        "the head is left out, so it would not learn: all that trains needs a group": _grouped(
            first=lambda n: "lora_A" in n.split(".")
        ),
        "the head is in B's group: all that is not B keeps lr": _grouped(
            is_b=lambda n: "lora_A" not in n.split(".")
        ),
        "a bias is in B's group: only B is": _one_dimensional,
        "B is in both groups: an optimiser refuses that": _grouped(first=lambda n: True),
        "'lora_B' in name is true of lora_Bank too: compare whole parts of the name": _grouped(
            is_b=lambda n: "lora_B" in n
        ),
        "the name must not end in lora_B: PEFT's go on with the adapter and .weight": _grouped(
            is_b=lambda n: n.endswith("lora_B")
        ),
        "every name that ends in B counts: head_B is no B of LoRA": _grouped(
            is_b=lambda n: _is_b(n) or n.endswith("B")
        ),
        "lora_B is looked for at a fixed place: names are of several lengths": _grouped(
            is_b=lambda n: n.split(".")[-3:-2] == ["lora_B"]
        ),
        "a capital B anywhere in the name counts: a B is called lora_B": _grouped(
            is_b=lambda n: "B" in n
        ),
        "only the adapter called default counts: any name may stand after lora_B": _grouped(
            is_b=lambda n: n.endswith(("lora_B", "lora_B.default.weight"))
        ),
        "what is frozen is taken, and what trains is left out: the condition is turned": _grouped(
            kept=lambda n, p: not p.requires_grad
        ),
        "copies or .data are in the groups: an optimiser must hold the parameters": _grouped(
            held=lambda p: p.detach()
        ),
        "an iterator is empty after one pass: go through it once, or make a list": _twice_through,
    },
)
def loraplus_groups(named_parameters, lr, ratio):
    """Every B learns at its own rate, all else that trains at lr, and nothing frozen is touched."""
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for name, p in named_parameters:
        if p.requires_grad:
            groups[".lora_B." in f".{name}."]["params"].append(p)
    return groups


# ------------------------------------------------------------------ pissa_init


def _weight(out, in_, dtype=torch.float32, decay=0.8):
    """A weight whose singular values are well apart, so that its factors are unique up to sign."""
    n = min(out, in_)
    U, V = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64)).Q for size in (out, in_))
    return (4 * U * decay ** torch.arange(n) @ V.T).to(dtype)


def _factors(result):
    """What of A and B is unique: each vector may have its sign turned in both, and stand at another
    place; here the longest come first."""
    A, B, _ = result
    order = (A.norm(dim=1) * B.norm(dim=0)).argsort(descending=True, stable=True)
    A, B = A[order], B[:, order]
    return {"B @ A": B @ A, "A @ A.T": A @ A.T, "B.T @ B": B.T @ B}


def _with_residual(result):
    A, B, residual = result
    return _factors(result) | {"B @ A + the residual": B @ A + residual}


def _with_quantised(result):
    return _factors(result) | {"the quantised weight": result[2]}


def _svd(weight):
    return torch.linalg.svd(weight, full_matrices=False)


def _start(
    values=lambda S: (S.sqrt(), S.sqrt()),
    which=lambda r, n: slice(0, r),
    vectors=lambda U, V: (U, V),
    residual=lambda W, BA: W - BA,
):
    """A wrong pissa_init by one of its steps."""

    def init(weight, rank):
        U, S, V = _svd(weight)
        at = which(rank, len(S))
        U, V = vectors(U, V)
        left, right = values(S[at])
        A, B = right[:, None] * V[at], U[:, at] * left
        return A, B, residual(weight, B @ A)

    return init


def _as_lora(weight, rank):
    A = torch.empty(rank, weight.shape[1], dtype=weight.dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(len(weight), rank, dtype=weight.dtype), weight.clone()


def _cut_residual(weight, rank):
    A, B, _ = _start()(weight, rank)
    U, S, V = _svd(weight)
    return A, B, (U[:, rank:-1] * S[rank:-1]) @ V[rank:-1]


def _randomised(weight, rank):
    U, S, V = torch.svd_lowrank(weight, rank)
    return S.sqrt()[:, None] * V.T, U * S.sqrt(), weight - U * S @ V.T


def _bare_rest(weight, rank):
    A, B, _ = _start()(weight, rank)
    U, _, V = _svd(weight)
    return A, B, U[:, rank:] @ V[rank:]


def _by_qr(weight, rank):
    Q, R = torch.linalg.qr(weight)
    return R[:rank], Q[:, :rank], weight - Q[:, :rank] @ R[:rank]


@check_for(
    cases=[
        Case(lambda: [_weight(12, 12), 3], note="a square weight"),
        Case(lambda: [_weight(12, 20), 4]),
        Case(lambda: [_weight(20, 12), 4]),
        Case(lambda: [_weight(9, 16, torch.float64), 2]),
        Case(lambda: [_weight(16, 9), 1], note="rank 1"),
        Case(lambda: [_weight(8, 10), 8], note="the full rank: nothing is left"),
    ],
    returns=("A", "B", "the residual"),
    view=_with_residual,
    staged=True,
    causes={
        "the smallest singular values are taken: PiSSA trains the largest": _start(
            which=lambda r, n: slice(n - r, n)
        ),
        "torch.linalg.svd gives Vᵀ already, whose rows are the vectors: it is transposed": _start(
            vectors=lambda U, V: (U, V.T)
        ),
        "the rows of U are taken: singular vectors are its columns": _start(
            vectors=lambda U, V: (U.T, V)
        ),
        "the singular values are in both factors in full: each gets their root": _start(
            values=lambda S: (S, S)
        ),
        "the singular values are left out": _start(
            values=lambda S: (torch.ones_like(S), torch.ones_like(S))
        ),
        "the root is in one factor only: the product needs it in both": _start(
            values=lambda S: (S.sqrt(), torch.ones_like(S))
        ),
        "all of the singular values are in B: each factor gets their root": _start(
            values=lambda S: (S, torch.ones_like(S))
        ),
        "all of the singular values are in A: each factor gets their root": _start(
            values=lambda S: (torch.ones_like(S), S)
        ),
        "the values are divided by the rank: the scaling is 1 here": _start(
            values=lambda S: ((S / len(S)).sqrt(), (S / len(S)).sqrt())
        ),
        "the first value is skipped: the leading ones start at 0": _start(
            which=lambda r, n: slice(1, r + 1)
        ),
        "the residual is W itself: B @ A must be taken out of it": _start(
            residual=lambda W, BA: W.clone()
        ),
        "the residual is W + B @ A: B @ A must be taken out": _start(residual=lambda W, BA: W + BA),
        "the residual has its sign turned": _start(residual=lambda W, BA: BA - W),
        "the residual is B @ A: it is what that leaves": _start(residual=lambda W, BA: BA),
        "the residual is zero: W is what stands in B @ A and the residual together": _start(
            residual=lambda W, BA: torch.zeros_like(W)
        ),
        "half of B @ A is taken out": _start(residual=lambda W, BA: W - BA / 2),
        "the smallest value is missing in the residual": _cut_residual,
        "the residual is made without its singular values": _bare_rest,
        "this is LoRA's start, A random and B zero": _as_lora,
        "the decomposition is a randomised one, which is not exact": _randomised,
        "this is OLoRA's start, by QR: PiSSA takes the singular vectors": _by_qr,
    },
)
def pissa_init(weight, rank):
    """BA is the best approximation of that rank, its values shared, and the residual the rest."""
    W = weight.double()
    # From the eigenvectors of W Wᵀ: another road to the same vectors.
    U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :rank]
    lengths = (U.T @ W).norm(dim=1)
    B = U * lengths.sqrt()
    A = U.T @ W / lengths.sqrt()[:, None]
    return tuple(t.to(weight.dtype) for t in (A, B, W - B @ A))


# ------------------------------------------------------------------ loftq_init


def _grid(width):
    """Rounds to multiples of a width."""
    return lambda weight: (weight / width).round() * width


def _nf4(weight):
    return dequantize_nf4(*quantize_nf4(weight), weight.shape).to(weight.dtype)


def _loftq(
    target=lambda W, BA: W - BA,
    missing=lambda W, Q: W - Q,
    times=lambda steps: steps,
    values=lambda S: (S.sqrt(), S.sqrt()),
    fit_first=False,
    again=False,
    result=lambda W, Q, first, BA: Q,
):
    """A wrong loftq_init by one of its steps."""

    def fitted(residual, rank):
        U, S, V = _svd(residual)
        left, right = values(S[:rank])
        return right[:, None] * V[:rank], U[:, :rank] * left

    def init(weight, rank, quantize, steps):
        A, B = fitted(weight, rank) if fit_first else (None, None)
        product, first = (B @ A if fit_first else torch.zeros_like(weight)), None
        Q = torch.zeros_like(weight)
        for _ in range(times(steps)):
            Q = quantize(target(weight, product))
            first = Q if first is None else first
            A, B = fitted(missing(weight, Q), rank)
            product = B @ A
        if again:
            Q = quantize(target(weight, product))
        return A, B, result(weight, Q, first, product)

    return init


def _other_order(weight, rank, quantize, steps):
    Q = torch.zeros_like(weight)
    for _ in range(steps):
        U, S, V = _svd(weight - Q)
        A, B = S[:rank].sqrt()[:, None] * V[:rank], U[:, :rank] * S[:rank].sqrt()
        Q = quantize(weight - B @ A)
    return A, B, Q


def _summed(weight, rank, quantize, steps):
    total = torch.zeros_like(weight)
    for _ in range(steps):
        Q = quantize(weight - total)
        U, S, V = _svd(weight - Q - total)
        A, B = S[:rank].sqrt()[:, None] * V[:rank], U[:, :rank] * S[:rank].sqrt()
        total = total + B @ A
    return A, B, Q


def _summed_products(weight, rank, quantize, steps):
    total = torch.zeros_like(weight)
    for _ in range(steps):
        Q = quantize(weight - total)
        A, B, _ = _start()(weight - Q, rank)
        total = total + B @ A
    return A, B, Q


def _best_kept(weight, rank, quantize, steps):
    tried = [
        _loftq(times=lambda steps, n=n: n)(weight, rank, quantize, 0) for n in range(1, steps + 1)
    ]
    return min(tried, key=lambda parts: float((weight - parts[2] - parts[1] @ parts[0]).norm()))


def _quantised_factors(weight, rank, quantize, steps):
    A, B, Q = _loftq()(weight, rank, quantize, steps)
    return quantize(A), quantize(B), Q


def _no_correction(weight, rank, quantize, steps):
    A, B, _ = _as_lora(weight, rank)
    return A, B, quantize(weight)


@check_for(
    cases=[
        Case(lambda: [_weight(12, 12), 3, _grid(0.5), 2], note="rounds to multiples of 0.5"),
        Case(lambda: [_weight(12, 20), 4, _grid(0.4), 3], note="rounds to multiples of 0.4"),
        Case(lambda: [_weight(20, 12), 4, _grid(0.4), 1], note="one step"),
        Case(lambda: [_weight(9, 14, torch.float64), 2, _grid(0.3), 4], note="multiples of 0.3"),
        Case(lambda: [_weight(16, 64), 5, _nf4, 5], note="NF4"),
        Case(lambda: [_weight(10, 8), 1, torch.sign, 3], note="one bit: the sign alone"),
    ],
    returns=("A", "B", "the quantised weight"),
    view=_with_quantised,
    staged=True,
    tolerance=1e-4,
    causes={
        "the factors are fitted to W: they are to make up for what is missing, W − Q": _loftq(
            missing=lambda W, Q: W
        ),
        "the factors are fitted to Q: they are to make up for what is missing, W − Q": _loftq(
            missing=lambda W, Q: Q
        ),
        "the factors are fitted to Q − W: their sign is turned": _loftq(
            missing=lambda W, Q: Q - W, target=lambda W, BA: W + BA
        ),
        "the factors are fitted to Q − W, and BA is taken off as if to W − Q": _loftq(
            missing=lambda W, Q: Q - W
        ),
        "W + BA is quantised: Q + BA is to be W, so quantise W − BA": _loftq(
            target=lambda W, BA: W + BA
        ),
        "the first step takes PiSSA's factors off: A and B start from zero": _loftq(fit_first=True),
        "the factors are fitted before the weight is quantised: first Q, then A and B": (
            _other_order
        ),
        (
            "this is what one step gives: either no more are done, or W itself is quantised in "
            "each, where BA must be taken off first"
        ): _loftq(times=lambda steps: 1),
        "this is one step too few": _loftq(times=lambda steps: max(steps - 1, 1)),
        "these are more steps than `steps` says": _loftq(times=lambda steps: steps + 1),
        "the weight is quantised once more at the end: A and B then belong to an older Q": _loftq(
            again=True
        ),
        "the products of all steps are added up: each step fits anew": _summed,
        "the products of all steps are taken off W together: only the last one": _summed_products,
        "the nearest of all steps is returned: the last one is asked for": _best_kept,
        "the Q of the first step is returned: it belongs to older factors": _loftq(
            result=lambda W, Q, first, BA: first
        ),
        "W − BA is returned: the last of the three is Q, what `quantize` gave": _loftq(
            result=lambda W, Q, first, BA: W - BA
        ),
        "the error is returned: the last of the three is Q, what `quantize` gave": _loftq(
            result=lambda W, Q, first, BA: W - Q
        ),
        "Q + BA is returned: the last of the three is Q alone": _loftq(
            result=lambda W, Q, first, BA: Q + BA
        ),
        "W is returned where Q was due": _loftq(result=lambda W, Q, first, BA: W.clone()),
        "the singular values are in both factors in full: each gets their root": _loftq(
            values=lambda S: (S, S)
        ),
        "all of the singular values are in B: each factor gets their root": _loftq(
            values=lambda S: (S, torch.ones_like(S))
        ),
        "all of the singular values are in A: each factor gets their root": _loftq(
            values=lambda S: (torch.ones_like(S), S)
        ),
        "the factors are quantised too: they stay in full precision": _quantised_factors,
        "this is QLoRA's start, A random and B zero": _no_correction,
    },
)
def loftq_init(weight, rank, quantize, steps):
    """Q and BA, fitted in turn to what the other leaves, are near the weight together."""
    product = torch.zeros_like(weight)
    for _ in range(steps):
        Q = quantize(weight - product)
        A, B, _ = pissa_init.reference(weight - Q, rank)
        product = B @ A
    return A, B, Q


# ------------------------------------------------------------------ intruder_dimensions


def _turned(out, in_, intruders=0, shift=0.05, k=6, eps=0.5, strong=3.0, dtype=torch.float32):
    """A weight and the same after training: moved a little in all directions, and with so many new
    directions of size `strong`, that lie across all old ones."""

    def make():
        W = _weight(out, in_, torch.float64, decay=0.9)
        largest = torch.linalg.matrix_norm(W, 2)
        new = W + shift * torch.randn(out, in_, dtype=torch.float64)
        for i in range(intruders):
            u, v = torch.randn(out, dtype=torch.float64), torch.randn(in_, dtype=torch.float64)
            size = strong * largest * 0.9**i
            new = new + size * torch.outer(u / u.norm(), v / v.norm())
        return [W.to(dtype), new.to(dtype), k, eps]

    return make


def _shared():
    """Two new directions on either side of one old one, and near it both."""
    W = _weight(20, 4, torch.float64)
    full = torch.linalg.svd(W, full_matrices=True).U
    u, n = full[:, 0], full[:, -1]
    pair = torch.stack([u + n, u - n], dim=1) / 2**0.5
    V = torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64)).Q
    return [W, W + 50 * pair * torch.tensor([1.0, 0.8]) @ V.T, 2, 0.5]


def _across():
    """out = in + 1: the one direction that no column of W has comes in, and W's largest leaves."""
    W = _weight(9, 8, torch.float64)
    full = torch.linalg.svd(W, full_matrices=True).U
    new = W + 20 * torch.outer(full[:, -1], torch.linalg.svd(W).Vh[0])
    return [W.float(), new.float(), 3, 0.5]


def _mirrored():
    """The same weight with its sign turned: the same directions."""
    W = _weight(14, 18)
    return [W, -W, 5, 0.6]


def _reordered():
    """The same vectors, the strongest ones now the weakest, and the other way round."""
    U, S, V = _svd(_weight(16, 16, torch.float64))
    return [(U * S @ V).float(), (U * S.flip(0) @ V).float(), 6, 0.7]


def _right_only():
    """Only the right singular vectors are new."""
    U, S, V = _svd(_weight(12, 12, torch.float64))
    other = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    return [(U * S @ V).float(), (U * S @ other).float(), 4, 0.6]


def _left_only():
    U, S, V = _svd(_weight(24, 24, torch.float64))
    other = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    return [(U * S @ V).float(), (other * S @ V).float(), 5, 0.9]


def _cosines(w0, w1, k, side=0, full=False):
    """(vectors of w0, k of w1), absolute."""
    old, new = (torch.linalg.svd(w.double(), full_matrices=full) for w in (w0, w1))
    a, b = (old.U, new.U) if side == 0 else (old.Vh.T, new.Vh.T)
    return (a.T @ b[:, :k]).abs()


def _counting(cosines=_cosines, best=lambda c: c.amax(0), alien=lambda best, eps: best < eps):
    """A wrong intruder_dimensions by one of its steps."""
    return lambda w0, w1, k, eps: int(alien(best(cosines(w0, w1, k)), eps).sum())


def _signed(w0, w1, k):
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w1))
    return old.T @ new[:, :k]


def _rows_of_u(w0, w1, k):
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w1))
    return (old @ new[:k].T).abs()


def _one_to_one(w0, w1, k, eps):
    cosines, count = _cosines(w0, w1, k), 0
    for j in range(k):
        i = cosines[:, j].argmax()
        count += int(cosines[i, j] < eps)
        cosines[i] = 0 if cosines[i, j] >= eps else cosines[i]
    return count


def _weakest(w0, w1, k):
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w1))
    return (old.T @ new[:, -k:]).abs()


@check_for(
    cases=[
        # So many directions between near and far that each mistake gives a number of its own.
        Case(_turned(40, 34, 3, shift=0.12, k=20, eps=0.45), note="three strong new directions"),
        Case(_turned(28, 40, intruders=1, k=5)),
        Case(_turned(24, 16, intruders=3, k=7, eps=0.6)),
        Case(_turned(18, 30), note="no new direction"),
        Case(_turned(16, 16, shift=0.01, eps=0.05), note="no new direction, a small eps"),
        Case(_mirrored, note="w1 = −w0"),
        Case(_reordered, note="the old vectors in another order"),
        Case(_right_only, note="only right singular vectors are new"),
        Case(_left_only, note="only left singular vectors are new"),
        Case(_across, note="9 outputs, 8 inputs"),
        Case(_shared, note="two new directions near one old one"),
        Case(_turned(20, 20, intruders=4, k=2), note="more new directions than k"),
        Case(_turned(30, 30, intruders=2, dtype=torch.float64)),
    ],
    causes={
        "the sign counts: u and −u are one direction, so take the absolute value": _counting(
            _signed
        ),
        "the right singular vectors are compared: those of the outputs are the left ones": (
            _counting(lambda a, b, k: _cosines(a, b, k, side=1))
        ),
        "each vector is compared with the one of its own place: with all of w0's": _counting(
            best=lambda c: c.diagonal()
        ),
        "only the k strongest of w0 are compared with: a vector may have moved up from below": (
            _counting(lambda a, b, k: _cosines(a, b, k)[:k])
        ),
        "what is counted is what is still there: count those below eps": _counting(
            alien=lambda best, eps: best >= eps
        ),
        "the mean of the cosines is taken: one near vector is enough": _counting(
            best=lambda c: c.mean(0)
        ),
        "the smallest cosine is taken: one near vector is enough, so take the largest": _counting(
            best=lambda c: c.amin(0)
        ),
        "all vectors of w1 are counted: only the k strongest": _counting(
            lambda a, b, k: _cosines(a, b, min(a.shape))
        ),
        "the k weakest of w1 are counted: the strongest come first": _counting(_weakest),
        "w0 and w1 have changed places": _counting(lambda a, b, k: _cosines(b, a, k)),
        "the largest is taken over w1's vectors: for each of w1 over those of w0": _counting(
            best=lambda c: c.amax(1)
        ),
        "pairs are counted: a vector counts once, if none of w0 is near": _counting(
            best=lambda c: c.flatten()
        ),
        "the change w1 − w0 is decomposed: decompose w1": _counting(
            lambda a, b, k: _cosines(a, b - a, k)
        ),
        "the rows of U are compared: singular vectors are its columns": _counting(_rows_of_u),
        "full_matrices=True adds directions that w0 has not: leave them out": _counting(
            lambda a, b, k: _cosines(a, b, k, full=True)
        ),
        "the cosines are squared": _counting(best=lambda c: c.amax(0) ** 2),
        "all cosines are put together, as a sum or a length: what counts is the largest": (
            _counting(best=lambda c: c.sum(0))
        ),
        "an old vector that is near one is taken away: it may be near others too": _one_to_one,
        "the angle is compared: eps is a cosine": _counting(
            best=lambda c: torch.acos(c.amax(0).clamp(max=1))
        ),
        "eps is taken for a distance from 1": _counting(alien=lambda best, eps: best < 1 - eps),
    },
)
def intruder_dimensions(w0, w1, k, eps):
    """How many of the k strongest output directions of w1 are near none of w0's."""
    count = 0
    # The eigenvectors of W Wᵀ, those of them that W reaches.
    n = min(w0.shape)
    old, new = (
        torch.linalg.eigh(w.double() @ w.double().T).eigenvectors.flip(1)[:, :n] for w in (w0, w1)
    )
    for j in range(k):
        count += all(abs(float(u @ new[:, j])) < eps for u in old.T)
    return count
