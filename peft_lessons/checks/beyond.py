"""Checks of lesson 14."""

import torch
from torch import nn

from ..methods.qlora import dequantize_nf4, quantize_nf4
from .kit import Case, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ rslora_scaling


@check_for(
    cases=[(16, 64), (16, 9), (6, 2), (32.0, 32), (8, 1), (0.5, 100), (12, 12)],
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
        this does not change with the rank, and r · s² must not
            / rank**0.5 → ∅
        alpha is under the root too
            alpha / rank**0.5 → (alpha / rank) ** 0.5
        it is multiplied by the root: divide
            / → *
        it is turned: this is √rank / alpha
            alpha / rank**0.5 → rank**0.5 / alpha
        rank**1/2 is (rank**1) / 2: the exponent needs brackets
            0.5 → 1 / 2
        the root is cut to a whole number
            rank**0.5 → int(rank**0.5)
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
        seen[f"the list of what is in the {which} group"] = tags
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
        the groups are in the other order: B's comes second
            lr * ratio}] → lr * ratio}][::-1]
        frozen parameters are in a group: leave them out
            if p.requires_grad → ∅
        the head is left out, so it would not learn: put it in the first group
            if not is_b(name) → if "lora_A" in name.split(".")
        the head is in B's group: only B gets the higher learning rate
            "lora_B" in → "lora_A" not in
        a bias is in B's group: only B belongs there
            if not is_b(name) → if not is_b(name) and p.dim() > 1
            if is_b(name) → if is_b(name) or p.dim() == 1
        B is in both groups: an optimiser refuses that
            if not is_b(name) → ∅
        a B is looked for at the end of its name, but PEFT's names go on after lora_B
            "lora_B" in name → name.endswith("lora_B")
        named_parameters() is a generator, empty after one pass: use one loop, or make a list
            [(name, p) for name, p in named_parameters if p.requires_grad] → named_parameters
            if not is_b(name) → if p.requires_grad and not is_b(name)
            if is_b(name) → if p.requires_grad and is_b(name)
        """,
    ),
)
def loraplus_groups(named_parameters, lr, ratio):
    """Every B has its own learning rate, every other trainable parameter has lr, and no frozen one
    is in a group."""
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


@check_for(
    cases=[
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
        the smallest singular values are taken: PiSSA trains the largest
            root[:rank] → root[-rank:]
            root[:, :rank] → root[:, -rank:]
        torch.linalg.svd gives Vᵀ already, whose rows are the vectors: it is transposed
            @ Vh → @ Vh.T
        the rows of U are taken: singular vectors are its columns
            U @ → U.T @
        the singular values are in both factors in full: each gets their root
            S.sqrt() → S
        the singular values are left out
            S.sqrt() → torch.ones_like(S)
        the root is in one factor only: the product needs it in both
            root[:rank] @ Vh → Vh[:rank]
        all of the singular values are in B: each factor gets their root
            root[:rank] @ Vh → Vh[:rank]
            root[:, :rank] → S.diag()[:, :rank]
        the residual is W itself: B @ A must be taken out of it
            weight - B @ A → weight.clone()
        """,
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
    """Rounds to multiples of a width."""
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
        the factors are fitted to W, and not to what Q leaves of it, W − Q
            svd(weight - Q → svd(weight
        the factors are fitted to Q, and not to what it leaves of W, W − Q
            svd(weight - Q → svd(Q
        W + BA is quantised: Q + BA should be W, so quantise W − BA
            weight - BA → weight + BA
        the factors are fitted before the weight is quantised: first Q, then A and B
            BA = torch.zeros_like(weight) → Q = torch.zeros_like(weight)
            Q = quantize(weight - BA) → ∅
            BA = B @ A → Q = quantize(weight - B @ A)
        this is what one step gives: either there is one step, or each step quantises W
        itself, and not W − BA
            weight - BA → weight
        this is one step too few
            range(steps) → range(max(steps - 1, 1))
        the weight is quantised once more at the end: A and B then belong to an older Q
            return A, B, Q → return A, B, quantize(weight - B @ A)
        the products of all steps are subtracted from W: subtract only the last one
            BA = B @ A → BA = BA + B @ A
        W − BA is returned: the last of the three is Q, what `quantize` gave
            return A, B, Q → return A, B, weight - B @ A
        """,
    ),
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


def _turned(out, in_, intruders=0, shift=0.05, k=6, eps=0.5, strong=3.0):
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
        return [W.float(), new.float(), k, eps]

    return make


@check_for(
    cases=[
        # So many directions between near and far that each mistake gives a number of its own.
        Case(_turned(34, 40, 3, shift=0.12, k=20, eps=0.45), note="three strong new directions"),
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
        each vector is compared with the one at its own place only, not with all of w0's
            .amax(0) → .diagonal()
        only the k strongest of w0 are compared: a vector may have moved up from below
            svd(w0, full_matrices=False).U → svd(w0, full_matrices=False).U[:, :k]
        the vectors that are near are counted: count those below eps
            near < eps → near >= eps
        all vectors of w1 are counted: only the k strongest
            [:, :k] → ∅
        pairs are counted: a vector counts once, if none of w0 is near
            .amax(0) → ∅
        the change w1 − w0 is decomposed: decompose w1
            svd(w1, → svd(w1 - w0,
        """,
    ),
)
def intruder_dimensions(w0, w1, k, eps):
    """How many of the k strongest output directions of w1 are near none of w0's."""
    # The eigenvectors of W Wᵀ, those of them that W reaches.
    squares = (w.double() @ w.double().T for w in (w0, w1))
    old, new = (torch.linalg.eigh(s).eigenvectors.flip(1)[:, : min(w0.shape)] for s in squares)
    return sum(all((old.T @ u).abs() < eps) for u in new.T[:k])
