"""Checks of lesson 14."""

import torch
from torch import nn

from ..methods.qlora import dequantize_nf4, quantize_nf4
from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ rslora_scaling


@check_for(
    cases=[(24, 36), (16, 9), (6, 2), (32.0, 32), (8, 1), (0.5, 100), (12, 12)],
    causes=mistakes(
        """
        def rslora_scaling(alpha, rank):
            return alpha / rank**0.5
        """,
        """
        this is LoRA's alpha / rank, which suits Adam's first step: gradient descent has s²
            rank**0.5 → rank
        rank is squared: r · s² must be constant, so s falls like 1 / √r
            rank**0.5 → rank**2
        this does not change with the rank: s must fall as the rank grows, so that r · s² stays the
        same
            / rank**0.5 → ∅
        alpha is left out: the scaling is α/rᵖ
            alpha / → 1 /
        this is the exponent p: return the scaling α/rᵖ
            alpha / rank**0.5 → 0.5
        this is s²: return its root, which is s
            alpha / rank**0.5 → alpha**2 / rank
        alpha is under the root too
            alpha / rank**0.5 → (alpha / rank) ** 0.5
        alpha is multiplied by the root: divide by it
            / → *
        the fraction is upside down: this is √rank / alpha
            alpha / rank**0.5 → rank**0.5 / alpha
        rank**1/2 is (rank**1) / 2: the exponent needs brackets
            0.5 → 1 / 2
        the root is rounded down to a whole number
            rank**0.5 → int(rank**0.5)
        the result is rounded down to a whole number
            / → //
        """,
    ),
)
def rslora_scaling(alpha, rank):
    """With this scaling, the first step of gradient descent is the same at every rank."""
    return float(alpha * rank**-0.5)


# ------------------------------------------------------------------ loraplus_groups


def _named(*rows):
    """Make [(name, parameter)] of "name" or "name, frozen"; each is known by its tag."""
    found = []
    for row in rows:
        name, _, frozen = row.partition(", ")
        size = (5,) if name.endswith("bias") else (5, 5)
        p = nn.Parameter(torch.randn(size), requires_grad=not frozen)
        p.tag = name
        found.append((name, p))
    return found


def _peft():
    at = "base_model.model.Block_B.q_proj"  # a B that is not LoRA's
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
        "v_proj.lora.lora_A, frozen",
        "v_proj.lora.lora_B, frozen",
        "classifier.weight",
        "classifier.bias",
    )


def _by_group(groups):
    """Tell the learning rates of the groups, and the names of the very parameters they hold."""
    seen = {"the learning rates": [float(group["lr"]) for group in groups]}
    for which, group in zip(("first", "second"), groups, strict=False):
        tags = [getattr(p, "tag", "a copy of one") for p in group["params"]]
        seen[f"the list of parameters in the {which} group"] = tags
    return seen


@check_for(
    cases=[
        Case(lambda: [_peft(), 1e-3, 16], note="PEFT's names"),
        Case(lambda: [_ours(), 2e-4, 4.0], note="the course's names, and a head with a bias"),
        Case(lambda: [iter(_ours()), 1e-2, 8], note="a generator, as model.named_parameters() is"),
    ],
    view=_by_group,
    staged=True,
    causes=mistakes(
        """
        def loraplus_groups(named_parameters, lr, ratio):
            def is_b(name):
                return "lora_B" in name

            rows = [(name, p) for name, p in named_parameters if p.requires_grad]
            rest = [p for name, p in rows if not is_b(name)]
            ups = [p for name, p in rows if is_b(name)]
            return [{"params": rest, "lr": lr}, {"params": ups, "lr": lr * ratio}]
        """,
        """
        A gets the higher learning rate: B is what learns faster
            rest, "lr": lr → rest, "lr": lr * ratio
            ups, "lr": lr * ratio → ups, "lr": lr
        both groups get lr, which is plain LoRA
            lr * ratio → lr
        lr is divided by the ratio for A: A keeps lr, and B gets ratio · lr
            rest, "lr": lr → rest, "lr": lr / ratio
            ups, "lr": lr * ratio → ups, "lr": lr
        lr is divided by the ratio for B: multiply
            lr * ratio → lr / ratio
        the ratio is added to lr: multiply
            lr * ratio → lr + ratio
        the ratio alone is B's learning rate: multiply it by lr
            lr * ratio → ratio
        the lists are swapped: the first group, at lr, has all but B
            "lora_B" in → "lora_B" not in
        the groups are in the other order: B's comes second
            lr * ratio}] → lr * ratio}][::-1]
        frozen parameters are in a group: leave them out
            if p.requires_grad → ∅
        a frozen B is in the second group: leave it out too
            if p.requires_grad → ∅
            if not is_b(name) → if p.requires_grad and not is_b(name)
        the head is left out, so it would not learn: put it in the first group
            if not is_b(name) → if "lora_A" in name.split(".")
        the head is in B's group: only B gets the higher learning rate
            "lora_B" in → "lora_A" not in
        a bias is in B's group: only B belongs there
            if not is_b(name) → if not is_b(name) and p.dim() > 1
            if is_b(name) → if is_b(name) or p.dim() == 1
        B is in both groups: an optimiser refuses that
            if not is_b(name) → ∅
        A is in B's group too: only names with lora_B belong there
            "lora_B" in → "lora_" in
        other names have a capital B too: look for lora_B
            "lora_B" in → "B" in
        no B is found: look for lora_B, with a capital B, inside the longer name
            "lora_B" in name → name.startswith("lora_B")
        lora_B is looked for at the end of a name, but PEFT's names continue after lora_B
            "lora_B" in name → name.endswith("lora_B")
        only PEFT's names are found, which continue after lora_B: the course's names end with lora_B
            "lora_B" in name → ".lora_B." in name
        named_parameters() is a generator, empty after one pass: use one loop, or make a list
            [(name, p) for name, p in named_parameters if p.requires_grad] → named_parameters
            if not is_b(name) → if p.requires_grad and not is_b(name)
            if is_b(name) → if p.requires_grad and is_b(name)
        named_parameters() is a generator, empty after the pass for B: use one loop, or make a list
            [(name, p) for name, p in named_parameters if p.requires_grad] → named_parameters
            rest = [p for name, p in rows if not is_b(name)] →
                ups = [p for name, p in rows if p.requires_grad and is_b(name)]
            ups = [p for name, p in rows if is_b(name)] →
                rest = [p for name, p in rows if p.requires_grad and not is_b(name)]
        """,
    ),
)
def loraplus_groups(named_parameters, lr, ratio):
    """Every B has its own learning rate, every other trainable parameter has lr, and no frozen one
    is in a group."""
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for name, p in named_parameters:
        if p.requires_grad:
            groups["lora_B" in name]["params"].append(p)
    return groups


# ------------------------------------------------------------------ pissa_init


def _weight(out, in_, dtype=torch.float32, decay=0.8):
    """Return a weight with well separated singular values: its factors are unique up to sign."""
    n = min(out, in_)
    U, V = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64)).Q for size in (out, in_))
    return (4 * U * decay ** torch.arange(n) @ V.T).to(dtype)


def _factors(result):
    """Return what is unique in A and B: the sign of a vector may differ in both, and so may its
    position. Here the vectors with the largest norms come first."""
    A, B, _ = result
    order = (A.norm(dim=1) * B.norm(dim=0)).argsort(descending=True, stable=True)
    A, B = A[order], B[:, order]
    return {"B @ A": B @ A, "A @ A.T": A @ A.T, "B.T @ B": B.T @ B}


# What goes wrong with the two factors, in PiSSA as in LoftQ.
_FACTORS = """
    the smallest singular values are taken: BA is made of the largest
        root[:rank] → root[-rank:]
        root[:, :rank] → root[:, -rank:]
    torch.linalg.svd returns Vᵀ already, whose rows are the vectors: do not transpose it
        @ Vh → @ Vh.T
    the rows of U are taken: singular vectors are its columns
        U @ → U.T @
    both factors contain the full singular values: each gets their square root
        root = S.sqrt().diag() → root = S.diag()
    the singular values are left out
        root = S.sqrt().diag() → root = torch.ones_like(S).diag()
    the root is in one factor only: the product needs it in both
        root[:rank] @ Vh → Vh[:rank]
    all of the singular values are in B: each factor gets their root
        root[:rank] @ Vh → Vh[:rank]
        root[:, :rank] → S.diag()[:, :rank]
    all of the singular values are in A: each factor gets their root
        root[:rank] @ Vh → S.diag()[:rank] @ Vh
        U @ root[:, :rank] → U[:, :rank]
"""


@check_for(
    cases=[
        # Here V[:rank] has as many rows as columns: scaling the wrong ones raises no error.
        Case(lambda: [_weight(6, 6), 6], note="full rank"),
        Case(lambda: [_weight(12, 12), 3], note="a square weight"),
        Case(lambda: [_weight(12, 20), 4]),
        Case(lambda: [_weight(9, 16, torch.float64), 2]),
        Case(lambda: [_weight(16, 9), 1], note="rank 1"),
    ],
    returns=("A", "B", "the residual"),
    view=lambda r: _factors(r) | {"B @ A + the residual": r[1] @ r[0] + r[2]},
    staged=True,
    causes=mistakes(
        """
        def pissa_init(weight, rank):
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            root = S.sqrt().diag()
            A, B = root[:rank] @ Vh, U @ root[:, :rank]
            return A, B, weight - B @ A
        """,
        """
        the residual is W itself: subtract B @ A from W
            weight - B @ A → weight.clone()
        the residual has the wrong sign: it is W − BA
            weight - B @ A → B @ A - weight
        BA is added to W: the residual is W − BA
            weight - B @ A → weight + B @ A
        the columns of Vᵀ are scaled: each row gets its root, so write r[:, None] * V[:rank]
            root[:rank] @ Vh → Vh[:rank] * S[:rank].sqrt()
        A and B are swapped: return A, B and the residual
            return A, B → return B, A
        A and B are transposed: A is (rank, in), B is (out, rank)
            return A, B → return A.T, B.T
        """
        + _FACTORS,
    ),
)
def pissa_init(weight, rank):
    """BA is the best approximation of that rank, both factors share its singular values, and the
    residual is the rest."""
    W = weight.double()
    # From the eigenvectors of W Wᵀ: another road to the same vectors.
    U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :rank]
    lengths = (U.T @ W).norm(dim=1)
    B = U * lengths.sqrt()
    A = U.T @ W / lengths.sqrt()[:, None]
    return tuple(t.to(weight.dtype) for t in (A, B, W - B @ A))


# ------------------------------------------------------------------ loftq_init


def _grid(width):
    """Return a function that rounds to multiples of a width."""
    return lambda weight: (weight / width).round() * width


def _nf4(weight):
    return dequantize_nf4(*quantize_nf4(weight), weight.shape).to(weight.dtype)


@check_for(
    cases=[
        Case(lambda: [_weight(12, 12), 3, _grid(0.5), 2], note="rounds to multiples of 0.5"),
        Case(lambda: [_weight(12, 20), 4, _grid(0.4), 3], note="rounds to multiples of 0.4"),
        Case(lambda: [_weight(20, 12), 4, _grid(0.4), 1], note="one step"),
        Case(lambda: [_weight(16, 64), 5, _nf4, 5], note="NF4"),
        Case(lambda: [_weight(10, 8), 1, torch.sign, 3], note="one bit: the sign alone"),
    ],
    returns=("A", "B", "the quantised weight"),
    view=lambda r: _factors(r) | {"the quantised weight": r[2]},
    staged=True,
    tolerance=1e-4,
    causes=mistakes(
        """
        def loftq_init(weight, rank, quantize, steps):
            BA = torch.zeros_like(weight)
            for _ in range(steps):
                Q = quantize(weight - BA)
                U, S, Vh = torch.linalg.svd(weight - Q, full_matrices=False)
                root = S.sqrt().diag()
                A, B = root[:rank] @ Vh, U @ root[:, :rank]
                BA = B @ A
            return A, B, Q
        """,
        """
        the factors are fitted to W: fit them to what Q leaves of W, W − Q
            svd(weight - Q → svd(weight
        the factors are fitted to Q: fit them to what Q leaves of W, W − Q
            svd(weight - Q → svd(Q
        the factors are fitted to what Q and the old BA leave: fit them to W − Q
            svd(weight - Q → svd(weight - BA - Q
        the factors are fitted to Q − W: BA should add what Q lacks, W − Q
            svd(weight - Q → svd(Q - weight
        the first step starts from W's own factors: start from BA = 0
            BA = torch.zeros_like(weight) → BA = first(weight, rank)
        BA is subtracted after quantising: subtract it before, quantise W − BA
            quantize(weight - BA) → quantize(weight) - BA
        W + BA is quantised: Q + BA should be W, so quantise W − BA
            weight - BA → weight + BA
        the factors are fitted before the weight is quantised: first Q, then A and B
            BA = torch.zeros_like(weight) → Q = torch.zeros_like(weight)
            Q = quantize(weight - BA) → ∅
            BA = B @ A → Q = quantize(weight - B @ A)
        this is the result of one step: either only one step is run, or each step quantises W itself
        and not W − BA
            weight - BA → weight
        this is one step too few
            range(steps) → range(max(steps - 1, 1))
        this is one step too many
            range(steps) → range(steps + 1)
        the weight is quantised once more at the end: A and B then belong to an older Q
            return A, B, Q → return A, B, quantize(weight - B @ A)
        the products of all steps are subtracted from W: subtract only the last one
            BA = B @ A → BA = BA + B @ A
        W − BA is returned: the last of the three is Q, what `quantize` gave
            return A, B, Q → return A, B, weight - B @ A
        W − Q is returned: the last of the three is Q, what `quantize` gave
            return A, B, Q → return A, B, weight - Q
        Q + BA is returned: the last of the three is Q, what `quantize` gave
            return A, B, Q → return A, B, Q + BA
        """
        + _FACTORS,
        first=lambda weight, rank: weight - pissa_init.reference(weight, rank)[2],
    ),
)
def loftq_init(weight, rank, quantize, steps):
    """Q and BA, each fitted to what the other leaves, add up to nearly the weight."""
    product = torch.zeros_like(weight)
    for _ in range(steps):
        Q = quantize(weight - product)
        A, B, _ = pissa_init.reference(weight - Q, rank)
        product = B @ A
    return A, B, Q


# ------------------------------------------------------------------ intruder_dimensions


def _turned(out, in_, intruders=0, shift=0.05, k=6, eps=0.5, strong=3.0):
    """Return a weight before and after training: perturbed a little in all directions, and with
    `intruders` new random directions of size `strong`."""

    def make():
        W = _weight(out, in_, torch.float64, decay=0.9)
        largest = torch.linalg.matrix_norm(W, 2)
        new = W + shift * torch.randn(out, in_, dtype=torch.float64)
        for i in range(intruders):
            u, v = torch.randn(out, dtype=torch.float64), torch.randn(in_, dtype=torch.float64)
            size = strong * largest * 0.9**i
            new = new + size * torch.outer(u / u.norm(), v / v.norm())
        return [W.float(), new.float(), k, eps]

    return make


@check_for(
    cases=[
        # So many directions between near and far that each mistake gives a number of its own.
        Case(_turned(50, 60, 3, shift=0.08, k=30, eps=0.35), note="three strong new directions"),
        Case(_turned(16, 24, intruders=3, k=7, eps=0.6)),
        Case(_turned(16, 16, shift=0.01, eps=0.05), note="no new direction, a small eps"),
        Case(_turned(20, 20, intruders=4, k=2), note="more new directions than k"),
    ],
    causes=mistakes(
        """
        def intruder_dimensions(w0, w1, k, eps):
            U0 = torch.linalg.svd(w0, full_matrices=False).U
            U1 = torch.linalg.svd(w1, full_matrices=False).U[:, :k]
            near = (U0.T @ U1).abs().amax(0)
            return (near < eps).sum().item()
        """,
        """
        the sign counts: u and −u are one direction, so take the absolute value
            .abs() → ∅
        the right singular vectors are compared: those of the outputs are the left ones
            svd(w0, full_matrices=False).U → svd(w0, full_matrices=False).Vh.T
            svd(w1, full_matrices=False).U → svd(w1, full_matrices=False).Vh.T
        each vector of w1 is compared only with w0's vector of the same index: compare it with all
        of w0's
            .amax(0) → .diagonal()
        only the k strongest of w0 are compared: a vector may have moved up from below
            svd(w0, full_matrices=False).U → svd(w0, full_matrices=False).U[:, :k]
        the vectors that are near are counted: count those below eps
            near < eps → near >= eps
        all vectors of w1 are counted: only the k strongest
            [:, :k] → ∅
        the weakest of w1 are counted: svd gives the strongest first
            [:, :k] → [:, -k:]
        the maximum is taken over the wrong axis: for each vector of w1, take it over w0's
            .amax(0) → .amax(1)
        w0 and w1 are swapped: this counts the vectors of w0 that are far from all of w1's
            U0 = torch.linalg.svd(w0, → U0 = torch.linalg.svd(w1,
            U1 = torch.linalg.svd(w1, → U1 = torch.linalg.svd(w0,
        one cosine below eps is not enough: the largest of all must be below it
            .amax(0) → .amin(0)
        the square of the cosine is compared with eps
            .abs() → .square()
        U[:k] takes rows: singular vectors are the columns of U
            [:, :k] → [:k].T
        the rows of U are compared: singular vectors are its columns
            [:, :k] → [:k].T
            U0.T @ U1 → U0 @ U1
        w0's U is not transposed: multiply its columns with those of w1, U0.T @ U1
            U0.T @ U1 → U0 @ U1
        pairs are counted: a vector counts once, if no vector of w0 is near
            .amax(0) → ∅
        the change w1 − w0 is decomposed: decompose w1
            svd(w1, → svd(w1 - w0,
        """,
    ),
)
def intruder_dimensions(w0, w1, k, eps):
    """Of w1's k strongest output directions, those far from all of w0's are counted."""
    # The eigenvectors of W Wᵀ, those of them that W reaches.
    squares = (w.double() @ w.double().T for w in (w0, w1))
    old, new = (torch.linalg.eigh(s).eigenvectors.flip(1)[:, : min(w0.shape)] for s in squares)
    return sum(all((old.T @ u).abs() < eps) for u in new.T[:k])
