"""Answers to the exercises of lesson 04."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons.methods.dora import DoRALayer, start
from peft_lessons.studies import load_results

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ decompose


@right("decompose")
def by_einsum(weight):
    magnitude = torch.einsum("oi,oi->o", weight, weight).sqrt()
    return magnitude, torch.einsum("oi,o->oi", weight, 1 / magnitude).nan_to_num()


@right("decompose")
def with_a_floor(weight):
    norm = weight.norm(dim=1)
    return norm + 1e-8, F.normalize(weight, dim=1, eps=1e-6)


@right("decompose")
def normalised(weight):
    return weight.norm(dim=1), F.normalize(weight, dim=1)


@right("decompose")
def by_diagonal(weight):
    magnitude = (weight @ weight.T).diagonal() ** 0.5
    return magnitude, torch.diag(1 / magnitude.clamp(min=1e-9)) @ weight


@right("decompose")
def row_by_row(weight):
    directions = [row / row.norm() if row.any() else row for row in weight]
    return torch.stack([row.norm() for row in weight]), torch.stack(directions)


@wrong("decompose", "the idea is right, but a row of zeros becomes NaN: 0 / 0")
def without_a_look_at_zeros(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, torch.einsum("oi,o->oi", weight, magnitude.reciprocal())


# ------------------------------------------------------------------ dora_output


def steps(x, weight, A, B, alpha, magnitude):
    """(x Wᵀ, s·(xAᵀ)Bᵀ, c), all right."""
    s = alpha / A.shape[0]
    with torch.no_grad():
        square = weight.norm(dim=1) ** 2 + 2 * s * ((weight @ A.T) * B).sum(1)
        square += s * s * ((B @ (A @ A.T)) * B).sum(1)
    return x @ weight.T, s * (x @ A.T @ B.T), magnitude / square.sqrt()


def plus(y, bias):
    return y if bias is None else y + bias


@wrong("dora_output", "your function raised TypeError: unsupported operand")
def bias_required(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return c * (plain + branch) + bias


@wrong("dora_output", "That is as large as the weight: V, weight ** 2, or a copy")
def directly(x, weight, bias, A, B, alpha, magnitude):
    V = weight + alpha / len(A) * (B @ A)
    return F.linear(x, magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach(), bias)


@wrong("dora_output", "a copy of the weight, as .contiguous(), .clone() and .double() make")
def transposed_copy(x, weight, bias, A, B, alpha, magnitude):
    _, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return plus(c * (x @ weight.transpose(0, 1).contiguous() + branch), bias)


@wrong("dora_output", "a copy of the weight, as .contiguous(), .clone() and .double() make")
def in_double_precision(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    s, W, a, b = alpha / len(A), weight.double(), A.detach().double(), B.detach().double()
    square = W.norm(dim=1) ** 2 + 2 * s * ((W @ a.T) * b).sum(1) + s**2 * (b @ (a @ a.T) * b).sum(1)
    return plus(magnitude / square.sqrt().to(x.dtype) * (plain + branch), bias)


@wrong("dora_output", "gives all pairs of outputs")
def diagonal_of_all_pairs(x, weight, bias, A, B, alpha, magnitude):
    s = alpha / len(A)
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    square = weight.norm(dim=1) ** 2 + 2 * s * ((weight @ A.T) * B).sum(1)
    square = square + s * s * (B @ (A @ A.T) @ B.T).diagonal()
    return plus(magnitude / square.sqrt().detach() * (plain + branch), bias)


@right("dora_output")
def as_in_peft(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return F.linear(x, weight, bias) + (c - 1) * plain + c * branch


@right("dora_output")
def rows_in_a_loop(x, weight, bias, A, B, alpha, magnitude):
    s = alpha / len(A)
    with torch.no_grad():
        norm = torch.stack([(w + s * b @ A).norm() for w, b in zip(weight, B, strict=True)])
    return plus((magnitude / norm) * (x @ weight.T + s * (x @ A.T) @ B.T), bias)


@right("dora_output")
def einsums(x, weight, bias, A, B, alpha, magnitude):
    s, b = alpha / B.shape[1], B.detach()
    square = torch.einsum("oi,oi->o", weight, weight)
    square = square + 2 * s * torch.einsum("or,or->o", weight @ A.detach().T, b)
    square = square + s**2 * torch.einsum("or,rq,oq->o", b, (A @ A.T).detach(), b)
    y = torch.einsum("...i,oi->...o", x, weight)
    y = y + torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, A), s * B)
    return plus(y * magnitude * square.rsqrt(), bias)


@right("dora_output")
def stacked(x, weight, bias, A, B, alpha, magnitude):
    """‖[W, sB] [I; A]‖ by the Gram matrix of A, whose root serves for B."""
    s, gram = alpha / len(A), A.detach() @ A.detach().T
    root = torch.linalg.cholesky(gram)
    square = weight.norm(dim=1).square() + (s * B.detach() @ root).norm(dim=1).square()
    square = square + 2 * s * (F.linear(weight, A.detach()) * B.detach()).sum(-1)
    return plus(
        magnitude / square.sqrt() * (F.linear(x, weight) + s * F.linear(F.linear(x, A), B)), bias
    )


# ------------------------------------------------------------------ magnitude_direction_change


@right("magnitude_direction_change")
def by_unit_vectors(w0, w1):
    u0, u1 = F.normalize(w0, dim=1), F.normalize(w1, dim=1)
    d = ((u1 - u0) ** 2).sum(dim=1).mean() / 2
    return F.l1_loss(w1.norm(dim=1), w0.norm(dim=1)).item(), d.item()


@right("magnitude_direction_change")
def by_loops(w0, w1):
    pairs = list(zip(w0, w1, strict=True))
    m = sum(abs(b.norm() - a.norm()).item() for a, b in pairs) / len(pairs)
    d = sum(1 - (a @ b / (a.norm() * b.norm())).item() for a, b in pairs) / len(pairs)
    return m, d


# ------------------------------------------------------------------ diagnose_rows


@right("diagnose_rows")
def from_the_rows():
    found = {}
    for run in load_results("broken_rows").query("run != 'healthy'").itertuples():
        turns, lengths = (
            torch.tensor([float(v) for v in text.split()]) for text in (run.turns, run.lengths)
        )
        if (lengths == 1).all():
            found[run.run] = "m is frozen"
        elif turns.max() < 0.1:
            found[run.run] = "V is detached with its norm"
        elif turns.min() > 3:
            found[run.run] = "the norm is that of the columns"
        elif lengths.std() > 0.1:
            found[run.run] = "m starts as ones"
        else:
            found[run.run] = "used without m"
    return found


@wrong("diagnose_rows", "3 of 5 are right")
def m_exchanged():
    return from_the_rows() | {"A": "m is frozen", "D": "used without m"}


@wrong("diagnose_rows", "Given to several runs: m is frozen. Each cause belongs to one run.")
def frozen_twice():
    return from_the_rows() | {"A": "m is frozen"}


@wrong("diagnose_rows", "there is no run 'F': the runs to judge are A to E")
def a_sixth_run():
    return from_the_rows() | {"F": "m is frozen"}


@wrong("diagnose_rows", "Look at run C: no row has turned, because no gradient reaches A and B")
def nothing_given():
    return {}


# ------------------------------------------------------------------ DoRALinear


class Repaired(nn.Module):
    """The stub with all its faults mended; the answers below bring some of them back."""

    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(self.first(linear))

    def first(self, linear):
        return linear.weight.norm(dim=1)

    def adapted(self):
        return self.linear.weight + self.scaling * self.lora_B @ self.lora_A

    def norm(self, V):
        return V.norm(dim=1, keepdim=True).detach()

    def forward(self, x):
        V = self.adapted()
        direction = V / self.norm(V)
        return F.linear(x, self.magnitude[:, None] * direction, self.linear.bias)


right("DoRALinear")(Repaired)


@answers.hunt("DoRALinear")
def layer_with(bugs):
    ones, no_bias, columns, through = (
        any(words in bug for bug in bugs)
        for words in ("starts as ones", "is lost", "V's columns", "through the norm")
    )

    class DoRALinear(Repaired):
        def first(self, linear):
            return torch.ones(linear.out_features) if ones else super().first(linear)

        def norm(self, V):
            norm = V.norm(dim=0 if columns else 1, keepdim=True)
            return norm if through else norm.detach()

        def forward(self, x):
            y = super().forward(x)
            return y if self.linear.bias is None or not no_bias else y - self.linear.bias

    return DoRALinear


@wrong("DoRALinear", "the list of trainable parameters differs: missing 'magnitude'")
class MagnitudeIsNoParameter(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        del self.magnitude
        self.magnitude = linear.weight.norm(dim=1)


@wrong("DoRALinear", "the list of trainable parameters differs: too many 'weight'")
class BaseTrains(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        linear.weight.requires_grad_(True)


@wrong("DoRALinear", "Here, your function raised RuntimeError: The size of tensor a")
class RescaledTooEarly(Repaired):
    """c * s * (x Aᵀ) Bᵀ is read from the left: c meets the r numbers in the middle."""

    def forward(self, x):
        c = self.magnitude / self.norm(self.adapted())[:, 0]
        branch = c * self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return self.linear(x) + (c - 1) * F.linear(x, self.linear.weight) + branch


@right("DoRALinear")
class Rescaled(nn.Module):
    """As PEFT does it: base(x) and what is added."""

    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__()
        self.base, self.alpha = linear, alpha
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.magnitude = nn.Parameter(linear.weight.square().sum(1).sqrt())

    def forward(self, x):
        s = self.alpha / len(self.lora_A)
        with torch.no_grad():
            norm = torch.linalg.norm(self.base.weight + s * self.lora_B @ self.lora_A, dim=1)
        c = self.magnitude / norm
        plain = F.linear(x, self.base.weight)
        return self.base(x) + (c - 1) * plain + c * (s * (x @ self.lora_A.T) @ self.lora_B.T)


@right("DoRALinear")
class AroundTheLesson(nn.Module):
    """With the lesson's own layer inside."""

    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__()
        self.linear = linear
        self.dora = DoRALayer(linear.in_features, linear.out_features, rank, alpha)
        start(self.dora, linear.weight)

    def forward(self, x):
        return plus(self.dora(x, self.linear.weight), self.linear.bias)


@right("DoRALinear")
class ByData(Repaired):
    """.data in the place of detach(), and one einsum."""

    def forward(self, x):
        V = self.adapted()
        c = self.magnitude * V.data.norm(dim=1).reciprocal()
        return plus(torch.einsum("...i,oi,o->...o", x, V, c), self.linear.bias)
