"""Checks of lesson 14."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from ..methods.qlora import dequantize_nf4, quantize_nf4
from .kit import Case, check_for, first_of
from .mistakes import mistakes

# ------------------------------------------------------------------ gradient_sum


class _Net(nn.Module):
    """Predict tokens with a frozen layer and a LoRA beside it, a head tied to the embedding, and a
    parameter that no loss needs. `found` holds the gradients with which it was handed out."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.fc = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(6, 3))
        self.norm, self.unused = nn.LayerNorm(6), nn.Parameter(torch.randn(4))
        if used:  # a frozen one, too, which may have trained before
            for p in self.parameters():
                p.grad = torch.randn(p.shape)
        self.found = self.gradients()

    def gradients(self):
        return {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}

    def forward(self, input_ids, labels):
        x = self.table(input_ids)
        x = self.norm(x + torch.tanh(self.fc(x) + x @ self.lora_A.T @ self.lora_B.T))
        logits = self.head(x)
        return CausalLMOutput(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


def _measured(batches, used=False, **factors):
    """Return a net, batches and factors by the names of parameters."""
    ids = [torch.randint(0, 11, (2, 2, 5)) for _ in range(batches)]
    named = [{"input_ids": x, "labels": y} for x, y in ids]
    return [_Net(used), named, factors]


def _gradients_left(model, batches, factors):
    """Return what is wrong with the gradients that a parameter has afterwards."""
    for name, grad in model.gradients().items():
        before = model.found[name]
        if (grad is None) != (before is None):
            left = "has a gradient now" if before is None else "has lost its gradient"
            return f"the parameter {name} {left}: leave each .grad as it was"
        if grad is not None and not torch.allclose(grad, before):
            return f"the .grad of {name} was changed: leave it as it was"
    return None


def _batch_by_batch(model, batches, factors):
    """Take absolute values before the mean over the batches."""
    return sum(_old_ones_too(model, [batch], factors, 0.0) for batch in batches) / len(batches)


def _frozen_too(model, batches, factors):
    """Thaw a copy, and count all of its parameters."""
    return _old_ones_too(copy.deepcopy(model).requires_grad_(True), batches, factors, 0.0)


def _old_ones_too(model, batches, factors, old=1.0):
    """Add the gradients to those of before, as backward() does."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    total = 0.0
    for (name, p), g in zip(named.items(), found, strict=True):
        g = torch.zeros_like(p) if g is None else g
        g = g if p.grad is None else g + old * p.grad
        total += factors.get(name, 1) * g.abs().sum().item()
    return total


def _numbers(note, model, batches, factors):
    told = ", ".join(f"{name}: {factor:g}" for name, factor in factors.items())
    call = f"a small language model, {len(batches)} batch{'es' * (len(batches) > 1)}"
    return f"{call}, factors={{{told}}}" + (f" ({note})" if note else "")


@check_for(
    cases=[
        Case(lambda: _measured(1, lora_B=16.0), note="LoRA+"),
        Case(lambda: _measured(1), note="every parameter has the same learning rate"),
        Case(lambda: _measured(3)),
        Case(lambda: _measured(2, lora_A=0.5, lora_B=8.0)),
        Case(lambda: _measured(1, used=True), note="gradients of an earlier step are still there"),
    ],
    afterwards=_gradients_left,
    describe=_numbers,
    tolerance=1e-4,
    causes=mistakes(
        """
        def gradient_sum(model, batches, factors):
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            loss = sum(model(**batch).loss for batch in batches) / len(batches)
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            total = 0.0
            for (name, _), g in zip(named, found):
                if g is not None:
                    total += factors.get(name, 1) * g.abs().sum().item()
            return total
        """,
        """
        absolute values are taken batch by batch, so that noise counts, too: first the gradient of
        the mean loss, then the absolute values
            = batch_by_batch
        gradients from before the call are added: backward() adds to each .grad
            = old_ones_too
        the losses of the batches are added: take their mean
            / len(batches) → ∅
        only the first batch is used
            for batch in batches → for batch in batches[:1]
            / len(batches) → ∅
        only the last batch is used
            for batch in batches → for batch in batches[-1:]
            / len(batches) → ∅
        the gradients are added with their signs, and cancel
            .abs() → ∅
        the absolute value of each parameter's sum is taken: take that of every entry
            g.abs().sum() → g.sum().abs()
        the squares are added: they belong to gradient descent, and Adam's first step is η for
        every entry
            g.abs() → g.square()
        the norm of each gradient is added: Adam's first step is η for every entry, so add up
        absolute values
            g.abs().sum() → g.norm()
        each parameter counts with its mean: add up all of its entries
            g.abs().sum() → g.abs().mean()
        the entries are counted: add up the absolute values of their gradients
            g.abs() → g.sign().abs()
        the factors are left out
            factors.get(name, 1) * → ∅
        a parameter without a factor is left out: its factor is 1
            factors.get(name, 1) → factors.get(name, 0)
        the sum is divided by the factor: a larger learning rate goes further
            factors.get(name, 1) * → 1 / factors.get(name, 1) *
        the head is tied to the embedding, and is counted twice
            model.named_parameters() → model.named_parameters(remove_duplicate=False)
        only LoRA's parameters are counted: every trainable one counts
            if p.requires_grad → if name.startswith("lora_")
        frozen parameters are counted: only trainable ones take a step
            = frozen_too
        the norms are left out: every trainable parameter counts
            if p.requires_grad → if p.requires_grad and p.dim() > 1
        """,
        batch_by_batch=_batch_by_batch,
        old_ones_too=_old_ones_too,
        frozen_too=_frozen_too,
    ),
)
def gradient_sum(model, batches, factors):
    """To first order, Adam's first step lowers the loss by this number times the learning rate."""
    own, total = copy.deepcopy(model), 0.0
    own.zero_grad()
    for batch in batches:
        (own(**batch).loss / len(batches)).backward()
    for name, p in own.named_parameters():
        if p.grad is not None:
            total += factors.get(name, 1.0) * torch.linalg.vector_norm(p.grad.double(), 1).item()
    return total


# ------------------------------------------------------------------ fair_comparison

_COLUMNS = ("method", "lr", "seed", "validation", "test")


def _runs(text):
    """Return the runs of a text: method, learning rate, seed, validation and test of each."""
    rows = []
    for line in text.split(";"):
        method, lr, seed, *scores = line.split()
        values = method, float(lr), int(seed), *map(float, scores)
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def _audited(text, a="lora", b="pissa", note=""):
    return Case(lambda: [_runs(text), a, b], note=note)


def _with_runs(note, runs, a, b):
    rows = "; ".join(
        " ".join(f"{value:g}" if value != row["method"] else value for value in row.values())
        for row in runs
    )
    return f"a={a!r}, b={b!r}" + (f" ({note})" if note else "") + f", {', '.join(_COLUMNS)}: {rows}"


@check_for(
    form="any",
    cases=[
        _audited(
            "lora 0.01 0 40 39; lora 0.03 0 38 37; lora 0.1 0 60 58; lora 0.03 1 39 38;"
            "pissa 0.003 0 39 38; pissa 0.01 0 36 36; pissa 0.01 1 37 35"
        ),
        _audited(
            "lora 0.01 0 41 36; lora 0.03 0 40 39; lora 0.1 0 44 45; lora 0.03 1 42 43;"
            "pissa 0.001 0 43 41; pissa 0.003 0 39 40; pissa 0.01 0 42 35; pissa 0.003 1 41 41",
            note="test and validation disagree",
        ),
        _audited(
            "lora 0.01 0 40 39; lora 0.03 0 38 37; lora 0.1 0 45 43; lora 0.03 2 36 34;"
            "lora 0.03 1 39 38; pissa 0.003 0 39 38; pissa 0.01 0 36 35.5; pissa 0.03 0 50 48;"
            "pissa 0.01 1 33 31; pissa 0.01 3 30 29; pissa 0.01 2 38 37",
            note="not the same seeds, nor the same order",
        ),
        _audited(
            "lora 0.1 0 nan nan; lora 0.01 0 40 39; lora 0.03 0 38 37; lora 0.03 1 39 38;"
            "pissa 0.03 0 nan nan; pissa 0.003 0 36 35.5; pissa 0.01 0 39 38; pissa 0.003 1 37 35",
            note="two runs have diverged",
        ),
        _audited(
            "vera 0.1 0 50 49; lora 0.01 0 40 39; lora 0.03 0 42 44; lora 0.1 0 41 40;"
            "lora 0.01 1 43 45; lora 0.03 1 30 31; full 0.001 0 36 37; full 0.003 0 33 31;"
            "full 0.001 1 34 32; full 0.003 1 35 30; full 0.001 2 20 20",
            "full",
            "lora",
            note="seed 1 ran at more than one learning rate",
        ),
        _audited(
            "oft 0.003 0 39 37; oft 0.001 0 41 40; oft 0.003 1 42 39; lora 0.03 1 36 39;"
            "lora 0.03 0 37 38",
            "oft",
            "lora",
            note="LoRA was tried at one learning rate",
        ),
        _audited(
            "lora 0.01 0 40 39; lora 0.03 0 38 37; lora 0.03 1 39 38; lora 0.1 1 37 36;"
            "pissa 0.003 0 39 38; pissa 0.01 0 36 36; pissa 0.03 0 41 40; pissa 0.01 1 37 35",
            note="seed 1 ran at a learning rate of its own",
        ),
    ],
    describe=_with_runs,
    view=first_of("lr", "pairs", "at_edge"),  # the learning rates decide the rest
    staged=True,
    causes=mistakes(
        """
        def fair_comparison(runs, a, b):
            lr, at_edge, test = {}, {}, {}
            for method in (a, b):
                own = [run for run in runs if run["method"] == method]
                first = {run["lr"]: run["validation"] for run in own if run["seed"] == 0}
                ended = {rate: score for rate, score in first.items() if not math.isnan(score)}
                lr[method] = min(ended, key=ended.get)
                at_edge[method] = lr[method] in (min(first), max(first))
                chosen = [run for run in own if run["lr"] == lr[method]]
                test[method] = {run["seed"]: run["test"] for run in chosen}
            both = [seed for seed in test[a] if seed in test[b]]
            pairs = {seed: test[a][seed] - test[b][seed] for seed in both}
            return {"lr": lr, "pairs": pairs, "at_edge": at_edge}
        """,
        """
        the learning rate is chosen by the test score: choose by validation, and report test
            run["validation"] → run["test"]
        runs of other seeds take part in the choice of a learning rate: seed 0 alone chooses
            if run["seed"] == 0} → }
        the highest perplexity is treated as the best: lower is better
            min(ended → max(ended
        a run that diverged is chosen: its validation is NaN
            if not math.isnan(score) → ∅
        learning rates that diverged are left out of the grid: they were tried, too, so the one
        below them is no edge
            min(first), max(first) → min(ended), max(ended)
        only the largest learning rate is treated as an edge
            min(first), max(first) → max(first),
        only the smallest learning rate is treated as an edge
            min(first), max(first) → min(first),
        `at_edge` is reversed: it is True at an edge
            lr[method] in → lr[method] not in
        the edge is that of all methods' learning rates: take those of the method itself
            min(first), max(first) →
                min(run["lr"] for run in runs), max(run["lr"] for run in runs)
        the edge is that of all seeds' learning rates: take those that seed 0 ran at
            min(first), max(first) →
                min(run["lr"] for run in own), max(run["lr"] for run in own)
        both methods get the learning rate of b: each has its own
            chosen = → lr = {a: lr[method], b: lr[method]}; chosen =
        `pairs` holds the validation scores: choose by validation, and report test
            run["seed"]: run["test"] → run["seed"]: run["validation"]
        `pairs` also holds runs at other learning rates: take those at the chosen one
            if run["lr"] == lr[method]] → ]
        the sign of `pairs` is reversed: subtract b from a
            test[a][seed] - test[b][seed] → test[b][seed] - test[a][seed]
        the pairs are made by the order of the runs: a pair has the same seed
            test[a][seed] - test[b][seed] for seed in both →
                x - y for seed, x, y in zip(test[a], test[a].values(), test[b].values())
        """,
    ),
)
def fair_comparison(runs, a, b):
    """Each method has its own learning rate, the pairs are fair, and an edge is named."""
    found = {"lr": {}, "pairs": {}, "at_edge": {}}
    for method in (a, b):
        grid = sorted(
            (run["lr"], run["validation"])
            for run in runs
            if run["method"] == method and run["seed"] == 0
        )
        _, place = min((s, i) for i, (_, s) in enumerate(grid) if s == s)
        found["lr"][method] = grid[place][0]
        found["at_edge"][method] = place in (0, len(grid) - 1)
    for x in runs:
        for y in runs:
            if (
                x["seed"] == y["seed"]
                and (x["method"], x["lr"]) == (a, found["lr"][a])
                and (y["method"], y["lr"]) == (b, found["lr"][b])
            ):
                found["pairs"][x["seed"]] = x["test"] - y["test"]
    return found


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
    calls={"pissa_init": "Write exercise 14.1 first, or take the factors from torch.linalg.svd."},
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
