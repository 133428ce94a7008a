"""Answers to the exercises of lesson 04."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons.methods.dora import DoRALayer, start

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ decompose


@wrong("decompose", "the norms are those of the columns: dim=0 sums over the rows")
def of_columns(weight):
    magnitude = weight.norm(dim=0)
    return magnitude, weight / magnitude


@wrong("decompose", "the norms are those of the columns, with a dimension kept")
def as_in_the_paper(weight):
    magnitude = weight.norm(p=2, dim=0, keepdim=True)
    return magnitude, weight / magnitude


@wrong("decompose", "there is one norm for the whole weight")
def frobenius(weight):
    magnitude = torch.linalg.norm(weight)
    return magnitude, weight / magnitude


@wrong("decompose", "drop the dimension that keepdim=True kept")
def kept(weight):
    magnitude = weight.norm(dim=1, keepdim=True)
    return magnitude, weight / magnitude


@wrong("decompose", "the square root is missing")
def squared(weight):
    magnitude = (weight * weight).sum(dim=-1)
    return magnitude, weight / magnitude.unsqueeze(-1)


@wrong("decompose", "the magnitude is squared, although the direction is right")
def squared_magnitude(weight):
    magnitude = (weight**2).sum(1)
    return magnitude, weight / magnitude.sqrt()[:, None]


@wrong("decompose", "these are sums of absolute values")
def l1(weight):
    magnitude = torch.linalg.vector_norm(weight, ord=1, dim=1)
    return magnitude, weight / magnitude[:, None]


@wrong("decompose", "this is the largest absolute value of a row")
def largest(weight):
    magnitude = weight.abs().max(dim=1).values
    return magnitude, weight / magnitude[:, None]


@wrong("decompose", "the squares are averaged, not summed")
def rms(weight):
    magnitude = weight.square().mean(dim=1).sqrt()
    return magnitude, weight / magnitude[:, None]


@wrong("decompose", "the direction is the weight itself")
def undivided(weight):
    return weight.norm(dim=1), weight.clone()


@wrong("decompose", "the weight is multiplied by its magnitude")
def multiplied(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, magnitude[:, None] * weight


@wrong("decompose", "the columns of the direction have length 1")
def normalised_columns(weight):
    return weight.norm(dim=1), F.normalize(weight, dim=0)


@wrong("decompose", "1e-8 is added to the norm, which shortens a small row")
def with_eps(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight / (magnitude.unsqueeze(1) + 1e-8)


@wrong("decompose", "direction has wrong values")
def with_larger_eps(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight / (magnitude.unsqueeze(1) + 1e-6)


@wrong("decompose", "your function raised RuntimeError: The size of tensor a (20)")
def not_broadcast(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight / magnitude


@wrong("decompose", "the order is turned: return the magnitude first")
def turned(weight):
    magnitude = weight.norm(dim=1)
    return weight / magnitude[:, None], magnitude


@wrong("decompose", "the argument weight was changed")
def in_place(weight):
    magnitude = weight.norm(dim=1)
    return magnitude, weight.div_(magnitude[:, None])


@right("decompose")
def by_normalize(weight):
    return weight.norm(dim=-1), F.normalize(weight, dim=-1)


@right("decompose")
def by_einsum(weight):
    magnitude = torch.einsum("oi,oi->o", weight, weight).sqrt()
    return magnitude, torch.einsum("oi,o->oi", weight, 1 / magnitude)


@right("decompose")
def by_diagonal(weight):
    magnitude = (weight @ weight.T).diagonal() ** 0.5
    return magnitude, torch.diag(1 / magnitude) @ weight


@right("decompose")
def row_by_row(weight):
    return torch.stack([row.norm() for row in weight]), torch.stack([r / r.norm() for r in weight])


@wrong("decompose", "short rows are divided by a floor")
def with_a_floor(weight):
    return weight.norm(dim=1), F.normalize(weight, dim=1, eps=1e-6)


# ------------------------------------------------------------------ dora_output


def terms(weight, A, B, s):
    square = weight.norm(dim=1) ** 2 + 2 * s * ((weight @ A.T) * B).sum(1)
    return (square + s * s * ((B @ (A @ A.T)) * B).sum(1)).detach()


def steps(x, weight, A, B, alpha, magnitude):
    """(x Wᵀ, s·(xAᵀ)Bᵀ, c), all right."""
    s = alpha / A.shape[0]
    return x @ weight.T, s * (x @ A.T @ B.T), magnitude / terms(weight, A, B, s).sqrt()


def plus(y, bias):
    return y if bias is None else y + bias


@wrong("dora_output", "the bias is rescaled too")
def bias_rescaled(x, weight, bias, A, B, alpha, magnitude):
    _, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return c * (F.linear(x, weight, bias) + branch)


@wrong("dora_output", "the bias is left out")
def bias_lost(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return c * (plain + branch)


@wrong("dora_output", "your function raised TypeError: unsupported operand")
def bias_required(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return c * (plain + branch) + bias


@wrong("dora_output", "only the branch is rescaled")
def base_as_it_is(x, weight, bias, A, B, alpha, magnitude):
    _, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return F.linear(x, weight, bias) + c * branch


@wrong("dora_output", "only the base's part is rescaled")
def branch_as_it_is(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return plus(c * plain + branch, bias)


@wrong("dora_output", "the base is there twice: what is added to base(x) is (c − 1)")
def base_twice(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return F.linear(x, weight, bias) + c * plain + c * branch


@wrong("dora_output", "the norm is that of W, and V = W + s·BA has another one")
def norm_of_w(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    return plus(magnitude / weight.norm(dim=1) * (plain + branch), bias)


@wrong("dora_output", "the norm of a sum is not the sum of the norms")
def norms_added(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    norm = weight.norm(dim=1) + alpha / len(A) * (B @ A).norm(dim=1)
    return plus(magnitude / norm.detach() * (plain + branch), bias)


@wrong("dora_output", "the term 2s·w·(BA) of the squared norm is left out")
def pythagoras(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    s = alpha / len(A)
    square = weight.norm(dim=1) ** 2 + s**2 * ((B @ (A @ A.T)) * B).sum(1)
    return plus(magnitude / square.sqrt().detach() * (plain + branch), bias)


@wrong("dora_output", "a 2 is missing")
def without_two(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    s = alpha / len(A)
    square = terms(weight, A, B, s) - s * ((weight @ A.T) * B).sum(1)
    return plus(magnitude / square.clamp(min=0).sqrt().detach() * (plain + branch), bias)


@wrong("dora_output", "in the last term of the squared norm s is squared too")
def s_once(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    s = alpha / len(A)
    square = terms(weight, A, B, s) + (s - s * s) * ((B @ (A @ A.T)) * B).sum(1)
    return plus(magnitude / square.sqrt().detach() * (plain + branch), bias)


@wrong("dora_output", "the root is missing")
def no_root(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    return plus(magnitude / terms(weight, A, B, alpha / len(A)) * (plain + branch), bias)


@wrong("dora_output", "the magnitude is not divided by the norm of V")
def undivided_magnitude(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    return plus(magnitude * (plain + branch), bias)


@wrong("dora_output", "c is upside down")
def upside_down(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return plus((plain + branch) / c, bias)


@wrong("dora_output", "the scaling alpha / r is missing in the norm")
def norm_unscaled(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    return plus(magnitude / terms(weight, A, B, 1).sqrt() * (plain + branch), bias)


@wrong("dora_output", "the scaling alpha / r is left out")
def unscaled(x, weight, bias, A, B, alpha, magnitude):
    c = magnitude / terms(weight, A, B, 1).sqrt()
    return plus(c * (x @ weight.T + x @ A.T @ B.T), bias)


@wrong("dora_output", "magnitude and norm are not used: this is LoRA")
def lora(x, weight, bias, A, B, alpha, magnitude):
    return F.linear(x, weight, bias) + alpha / len(A) * (x @ A.T) @ B.T


@wrong("dora_output", "That is as large as the weight itself")
def directly(x, weight, bias, A, B, alpha, magnitude):
    V = weight + alpha / len(A) * (B @ A)
    return F.linear(x, magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach(), bias)


@wrong("dora_output", "That is as large as the weight itself")
def norm_from_v(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    norm = (weight + alpha / len(A) * (B @ A)).detach().norm(dim=1)
    return plus(magnitude / norm * (plain + branch), bias)


@wrong("dora_output", "That is as large as the weight itself")
def squares_formed(x, weight, bias, A, B, alpha, magnitude):
    s = alpha / len(A)
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    square = (weight**2).sum(1) + 2 * s * ((weight @ A.T) * B).sum(1)
    square = square + s * s * ((B @ (A @ A.T)) * B).sum(1)
    return plus(magnitude / square.sqrt().detach() * (plain + branch), bias)


@wrong("dora_output", "gives all pairs of outputs")
def diagonal_of_all_pairs(x, weight, bias, A, B, alpha, magnitude):
    s = alpha / len(A)
    plain, branch, _ = steps(x, weight, A, B, alpha, magnitude)
    square = weight.norm(dim=1) ** 2 + 2 * s * ((weight @ A.T) * B).sum(1)
    square = square + s * s * (B @ (A @ A.T) @ B.T).diagonal()
    return plus(magnitude / square.sqrt().detach() * (plain + branch), bias)


@wrong("dora_output", "the norms are those of V's columns")
def over_columns(x, weight, bias, A, B, alpha, magnitude):
    V = weight + alpha / len(A) * (B @ A)
    return F.linear(x, magnitude[:, None] * V / V.norm(dim=0, keepdim=True).detach(), bias)


@wrong("dora_output", "a gradient flows through the norm, which is a constant")
def undetached(x, weight, bias, A, B, alpha, magnitude):
    s = alpha / len(A)
    square = weight.norm(dim=1) ** 2 + 2 * s * ((weight @ A.T) * B).sum(1)
    square = square + s * s * ((B @ (A @ A.T)) * B).sum(1)
    y = magnitude / square.sqrt() * (x @ weight.T + s * (x @ A.T @ B.T))
    return plus(y, bias)


@wrong("dora_output", "no gradient reaches magnitude")
def c_detached(x, weight, bias, A, B, alpha, magnitude):
    plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
    return plus(c.detach() * (plain + branch), bias)


@wrong("dora_output", "no gradient reaches x")
def all_without_gradient(x, weight, bias, A, B, alpha, magnitude):
    with torch.no_grad():
        plain, branch, c = steps(x, weight, A, B, alpha, magnitude)
        return plus(c * (plain + branch), bias)


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
def factor_on_the_branch(x, weight, bias, A, B, alpha, magnitude):
    _, _, c = steps(x, weight, A, B, alpha, magnitude)
    return plus(
        F.linear(x, weight) * c + F.linear(F.linear(x, A), c[:, None] * B) * (alpha / len(A)), bias
    )


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


def changed_lengths(w0, w1):
    return w1.norm(dim=1) - w0.norm(dim=1)


def right_d(w0, w1):
    return (1 - F.cosine_similarity(w0, w1)).mean().item()


def right_m(w0, w1):
    return changed_lengths(w0, w1).abs().mean().item()


@wrong("magnitude_direction_change", "columns are compared, not rows")
def columns(w0, w1):
    m = (w1.norm(dim=0) - w0.norm(dim=0)).abs().mean()
    return m.item(), (1 - F.cosine_similarity(w0, w1, dim=0)).mean().item()


@wrong("magnitude_direction_change", "longer and shorter rows cancel")
def signed(w0, w1):
    return changed_lengths(w0, w1).mean().item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "the absolute value is taken of the mean")
def mean_first(w0, w1):
    return abs(w1.norm(dim=1).mean() - w0.norm(dim=1).mean()).item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "delta_m is squared")
def mean_square(w0, w1):
    return changed_lengths(w0, w1).pow(2).mean().item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "delta_m is the length of the change")
def length_of_the_change(w0, w1):
    return (w1 - w0).norm(dim=1).mean().item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "delta_m is not relative")
def relative(w0, w1):
    return (changed_lengths(w0, w1).abs() / w0.norm(dim=1)).mean().item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "delta_m is the change of the whole weight's norm")
def frobenius_change(w0, w1):
    return (w1.norm() - w0.norm()).abs().item(), right_d(w0, w1)


@wrong("magnitude_direction_change", "both are sums")
def sums(w0, w1):
    d = (1 - F.cosine_similarity(w0, w1)).sum().item()
    return changed_lengths(w0, w1).abs().sum().item(), d


@wrong("magnitude_direction_change", "delta_d is the cosine itself")
def cosine(w0, w1):
    return right_m(w0, w1), F.cosine_similarity(w0, w1).mean().item()


@wrong("magnitude_direction_change", "delta_d is the angle")
def angle(w0, w1):
    return right_m(w0, w1), F.cosine_similarity(w0, w1).clamp(-1, 1).arccos().mean().item()


@wrong("magnitude_direction_change", "delta_d is the distance between the directions")
def distance(w0, w1):
    d = (F.normalize(w0) - F.normalize(w1)).norm(dim=1).mean()
    return right_m(w0, w1), d.item()


@wrong("magnitude_direction_change", "the weights are compared as one long vector each")
def flat(w0, w1):
    return right_m(w0, w1), 1 - F.cosine_similarity(w0.flatten(), w1.flatten(), dim=0).item()


@wrong("magnitude_direction_change", "the cosine is taken between w0 and the change")
def with_the_change(w0, w1):
    return right_m(w0, w1), (1 - F.cosine_similarity(w0, w1 - w0)).mean().item()


@wrong("magnitude_direction_change", "the rows are not divided by both their lengths")
def dot_product(w0, w1):
    return right_m(w0, w1), (1 - (w0 * w1).sum(1)).mean().item()


@wrong("magnitude_direction_change", "the cosine loses its sign")
def absolute_cosine(w0, w1):
    return right_m(w0, w1), (1 - F.cosine_similarity(w0, w1).abs()).mean().item()


@wrong("magnitude_direction_change", "every row is compared with every other")
def all_pairs(w0, w1):
    return right_m(w0, w1), (1 - F.normalize(w0) @ F.normalize(w1).T).mean().item()


@wrong("magnitude_direction_change", "delta_m is a tensor, expected the float")
def as_tensors(w0, w1):
    return changed_lengths(w0, w1).abs().mean(), (1 - F.cosine_similarity(w0, w1)).mean()


@wrong("magnitude_direction_change", "the order is turned: return delta_m first")
def direction_first(w0, w1):
    return right_d(w0, w1), right_m(w0, w1)


@right("magnitude_direction_change")
def in_double(w0, w1):
    a, b = w0.double(), w1.double()
    m = torch.linalg.norm(b, dim=1).sub(torch.linalg.norm(a, dim=1)).abs()
    d = 1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    return float(m.mean()), float(d.mean())


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


@wrong("magnitude_direction_change", "the cosines are summed inside")
def one_minus_the_sum(w0, w1):
    lengths = (w1.norm(dim=1) - w0.norm(dim=1)).abs().mean()
    return lengths.item(), (1 - F.cosine_similarity(w0, w1, dim=1).sum()).item()


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


def ones(self, linear):
    return torch.ones(linear.out_features)


def column_norms(self, V):
    return V.norm(dim=0, keepdim=True)


def without_bias(self, x):
    V = self.adapted()
    return F.linear(x, self.magnitude[:, None] * V / self.norm(V))


def hunted(**faults):
    """A class of its own, as a learner's cell makes one."""
    return type("DoRALinear", (Repaired,), {**faults, "__module__": __name__})


ONES, BIAS = "the magnitude starts as ones", "the bias of the layer is lost"
AXIS, THROUGH = "the norm is that of V's columns", "a gradient flows through the norm"
everything = dict(first=ones, norm=column_norms, forward=without_bias)
wrong("DoRALinear", ONES)(hunted(**everything))  # the stub as it is given
wrong("DoRALinear", BIAS)(hunted(**everything | dict(first=Repaired.first)))
wrong("DoRALinear", AXIS)(hunted(norm=column_norms))
wrong("DoRALinear", ONES)(hunted(first=ones))
wrong("DoRALinear", ONES)(hunted(first=ones, norm=column_norms))
wrong("DoRALinear", ONES)(hunted(first=ones, forward=without_bias))
wrong("DoRALinear", BIAS)(hunted(forward=without_bias))


@wrong("DoRALinear", THROUGH)
class UndetachedNorm(Repaired):
    def norm(self, V):
        return V.norm(dim=1, keepdim=True)


@wrong("DoRALinear", BIAS)
class UndetachedAndWithoutBias(UndetachedNorm):
    forward = without_bias


@wrong("DoRALinear", "the norm is that of W: it must follow V = W + s·BA")
class NormOfW(Repaired):
    def norm(self, V):
        return self.linear.weight.norm(dim=1, keepdim=True)


@wrong("DoRALinear", "the norm is that of W: it must follow V = W + s·BA")
class NormOnce(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        self.once = self.magnitude.detach().clone()[:, None]

    def norm(self, V):
        return self.once


@wrong("DoRALinear", "V is divided by the norm of the whole of it")
class NormOfAll(Repaired):
    def norm(self, V):
        return V.norm().detach()


@wrong("DoRALinear", "V is not divided by its norm")
class NotNormalised(Repaired):
    def norm(self, V):
        return 1


@wrong("DoRALinear", "the magnitude holds the norms of W's columns")
class MagnitudeOfColumns(Repaired):
    def first(self, linear):
        return linear.weight.norm(dim=0)


@wrong("DoRALinear", "drop the dimension that keepdim=True kept")
class MagnitudeKept(Repaired):
    def first(self, linear):
        return linear.weight.norm(dim=1, keepdim=True)

    def forward(self, x):
        V = self.adapted()
        return F.linear(x, self.magnitude * V / self.norm(V), self.linear.bias)


@wrong("DoRALinear", "the list of what trains differs: missing 'magnitude'")
class MagnitudeIsNoParameter(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        del self.magnitude
        self.magnitude = linear.weight.norm(dim=1)


@wrong("DoRALinear", "the bias is rescaled with the rows")
class BiasRescaled(Repaired):
    def forward(self, x):
        V = self.adapted()
        y = F.linear(x, V, self.linear.bias)
        return y * (self.magnitude / self.norm(V)[:, 0])


@wrong("DoRALinear", "the bias is added twice")
class BiasTwice(Repaired):
    def forward(self, x):
        y = super().forward(x)
        return y if self.linear.bias is None else y + self.linear.bias


@wrong("DoRALinear", "V is cut off, so that A and B learn nothing")
class CutOff(Repaired):
    def forward(self, x):
        V = self.adapted().detach()
        return F.linear(x, self.magnitude[:, None] * V / self.norm(V), self.linear.bias)


@wrong("DoRALinear", "the magnitude is cut off and learns nothing")
class MagnitudeCutOff(Repaired):
    def forward(self, x):
        V = self.adapted()
        return F.linear(x, (self.magnitude[:, None] / self.norm(V)).detach() * V, self.linear.bias)


@wrong("DoRALinear", "V is cut off, so that A and B learn nothing")
class NoGradient(Repaired):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@wrong("DoRALinear", "alpha is not divided by r")
class AlphaAlone(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        self.scaling = alpha


@wrong("DoRALinear", "the argument linear was changed")
class BaseChanged(Repaired):
    """The same function, but what it wraps is no longer what it was."""

    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        with torch.no_grad():
            linear.bias.mul_(1.0).add_(1e-4) if linear.bias is not None else None

    def forward(self, x):
        y = super().forward(x)
        return y if self.linear.bias is None else y - 1e-4


@wrong("DoRALinear", "the list of what trains differs: too many 'weight'")
class BaseTrains(Repaired):
    def __init__(self, linear, rank=8, alpha=16.0):
        super().__init__(linear, rank, alpha)
        linear.weight.requires_grad_(True)


@wrong("DoRALinear", "what it returned cannot be used: RuntimeError")
class RescaledTooEarly(Repaired):
    """c * s * (x Aᵀ) Bᵀ is read from the left: c meets the r numbers in the middle."""

    def forward(self, x):
        c = self.magnitude / self.norm(self.adapted())[:, 0]
        plain = F.linear(x, self.linear.weight)
        return (
            self.linear(x)
            + (c - 1) * plain
            + c * self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        )


@wrong("DoRALinear", "what it returned cannot be used: RuntimeError")
class NotBroadcast(Repaired):
    def norm(self, V):
        return V.norm(dim=1).detach()


@wrong("DoRALinear", "the parameters differ")
class OtherParameters(Repaired):
    def __init__(self, linear, alpha=16.0, rank=8):
        super().__init__(linear, rank, alpha)


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
        y = self.dora(x, self.linear.weight)
        return y if self.linear.bias is None else y + self.linear.bias


right("DoRALinear")(hunted())  # the stub, mended


@right("DoRALinear")
class ByData(Repaired):
    """.data in the place of detach(), and one einsum."""

    def forward(self, x):
        V = self.adapted()
        c = self.magnitude * V.data.norm(dim=1).reciprocal()
        y = torch.einsum("...i,oi,o->...o", x, V, c)
        return y if self.linear.bias is None else y + self.linear.bias
