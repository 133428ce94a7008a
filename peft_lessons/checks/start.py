"""Checks of lesson 00."""

import torch

from .kit import Case, check_for


@check_for(
    cases=[
        Case(lambda: [torch.randn(5, 3)]),
        Case(lambda: [torch.randn(4, 4)], note="a square weight"),
        Case(lambda: [torch.randn(1, 7)]),
        Case(lambda: [torch.randn(6, 40).double()]),
        Case(lambda: [torch.randn(6, 10).bfloat16()]),
    ],
    gradients=("weight",),
    causes={
        "the norms are those of the columns: sum over dim=1": lambda w: w.norm(dim=0),
        "the square root is missing": lambda w: (w**2).sum(dim=1),
        "absolute values are summed where squares are due": lambda w: w.abs().sum(dim=1),
        "the squares are averaged, not summed": lambda w: (w**2).mean(dim=1).sqrt(),
        "this is the largest entry of each row": lambda w: w.abs().amax(dim=1),
        "one norm is taken over the whole matrix: give dim=1": lambda w: w.norm(),
        "keepdim=True keeps a dimension of size 1": lambda w: w.norm(dim=1, keepdim=True),
        "the rows' sums are not their lengths": lambda w: w.sum(dim=1),
    },
)
def row_norms(weight):
    """One Euclidean length for each row of the weight."""
    # The diagonal of W Wᵀ: each row's product with itself.
    return (weight @ weight.T).diagonal().sqrt()
