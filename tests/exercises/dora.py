"""Answers to the exercises of lesson 04."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ decompose


@right("decompose")
def with_a_floor(weight):
    norm = weight.norm(dim=1)
    return norm + 1e-8, F.normalize(weight, dim=1, eps=1e-6)


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


# ------------------------------------------------------------------ magnitude_direction_change


@right("magnitude_direction_change")
def by_unit_vectors(w0, w1):
    u0, u1 = F.normalize(w0, dim=1), F.normalize(w1, dim=1)
    d = ((u1 - u0) ** 2).sum(dim=1).mean() / 2
    return F.l1_loss(w1.norm(dim=1), w0.norm(dim=1)).item(), d.item()


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


@wrong("DoRALinear", "the returned value cannot be used: RuntimeError")
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
