"""Answers to the exercises of lesson 00."""

import torch

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


@wrong("row_norms", "the norms are those of the columns")
def columns(weight):
    return torch.linalg.norm(weight, dim=0)


@wrong("row_norms", "the square root is missing")
def squared(weight):
    return weight.square().sum(1)


@wrong("row_norms", "absolute values are summed")
def absolute(weight):
    return torch.linalg.norm(weight, ord=1, dim=1)


@wrong("row_norms", "the squares are averaged")
def averaged(weight):
    return weight.square().mean(-1).sqrt()


@wrong("row_norms", "one norm is taken over the whole matrix")
def whole(weight):
    return torch.linalg.norm(weight)


@wrong("row_norms", "keepdim=True keeps")
def kept_dimension(weight):
    return torch.linalg.norm(weight, dim=1, keepdim=True)


@wrong("row_norms", "the rows' sums are not their lengths")
def sums(weight):
    return weight.sum(1)


@wrong("row_norms", "no gradient reaches weight")
def detached(weight):
    return torch.linalg.norm(weight.detach(), dim=1)


@wrong("row_norms", "the argument weight was changed")
def in_place(weight):
    return weight.square_().sum(1).sqrt()


@wrong("row_norms", "has dtype float32, expected float64")
def always_float(weight):
    return torch.linalg.norm(weight.float(), dim=1)


@wrong("row_norms", "is a list of 5, expected a tensor")
def listed(weight):
    return [row.norm() for row in weight]


@right("row_norms")
def loop(weight):
    return torch.stack([torch.linalg.norm(row) for row in weight])


@right("row_norms")
def einsum(weight):
    return torch.einsum("oi,oi->o", weight, weight) ** 0.5


@right("row_norms")
def in_double(weight):
    return weight.double().norm(dim=-1).to(weight.dtype)
