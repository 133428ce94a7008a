"""Checks of lesson 00."""

import torch

from .kit import Case, check_for
from .mistakes import mistakes


@check_for(
    cases=[
        Case(lambda: [torch.randn(5, 3)]),
        Case(lambda: [torch.randn(4, 4)], note="a square weight"),
        Case(lambda: [torch.randn(1, 7)]),
        Case(lambda: [torch.randn(6, 40)]),
        Case(lambda: [torch.randn(7, 1)]),
    ],
    gradients=("weight",),
    causes=mistakes(
        """
        def row_norms(weight):
            squares = weight * weight
            return squares.sum(dim=1).sqrt()
        """,
        """
        the norms are those of the columns: sum over dim=1
            dim=1 → dim=0
        the square root is missing
            .sqrt() → ∅
        absolute values are summed: sum the squares
            weight * weight → weight.abs()
            .sqrt() → ∅
        the squares are averaged, not summed
            .sum( → .mean(
        this is the largest entry of each row
            .sum( → .amax(
        one norm is taken over the whole matrix: pass dim=1
            dim=1 → ∅
        keepdim=True keeps a dimension of size 1
            dim=1 → dim=1, keepdim=True
        these are the sums of the rows, not their lengths
            weight * weight → weight
            .sqrt() → ∅
        """,
    ),
)
def row_norms(weight):
    """One Euclidean length for each row of the weight."""
    # The diagonal of W Wᵀ: each row's product with itself.
    return (weight @ weight.T).diagonal().sqrt()
