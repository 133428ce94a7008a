"""Answers to the exercises of lesson 00."""

import torch

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


@right("row_norms")
def loop(weight):
    return torch.stack([torch.linalg.norm(row) for row in weight])


@right("row_norms")
def distances(weight):
    return torch.cdist(weight, weight.new_zeros(1, weight.shape[1]))[:, 0]


@right("row_norms")
def einsum(weight):
    return torch.einsum("oi,oi->o", weight, weight) ** 0.5


@right("row_norms")
def in_double(weight):
    return weight.double().norm(dim=-1).to(weight.dtype)


@right("row_norms")
def in_float(weight):
    return weight.float().norm(dim=1)


@right("row_norms")
def left_in_double(weight):
    return weight.double().square().sum(dim=1).sqrt()


@right("row_norms")
def distances_in_float(weight):
    return torch.cdist(weight, torch.zeros(1, weight.shape[1])).squeeze(1)
