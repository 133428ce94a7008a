"""A check to look at, before the first exercise. It belongs to no exercise of its own."""

import torch

from .kit import Case, check_for
from .mistakes import mistakes


@check_for(
    cases=[
        Case(lambda: [torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])]),
        Case(lambda: [torch.randn(7), torch.randn(7)]),
        Case(lambda: [5 * torch.randn(384), torch.randn(384)]),
    ],
    causes=mistakes(
        """
        def cosine(x, y):
            return x @ y / (x.norm() * y.norm())
        """,
        """
        this is the product of the vectors: divide it by both lengths
            / (x.norm() * y.norm()) → ∅
        this divides by one length: divide by both
            (x.norm() * y.norm()) → x.norm()
        the lengths are squared
            (x.norm() * y.norm()) → (x @ x * (y @ y))
        the lengths are added: multiply them
            x.norm() * y.norm() → x.norm() + y.norm()
        """,
    ),
)
def cosine(x, y):
    """The cosine of the angle between two vectors."""
    return torch.nn.functional.cosine_similarity(x, y, dim=0)
