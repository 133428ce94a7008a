"""Checks of lesson 00."""

import torch

from .kit import Case, check_for
from .mistakes import mistakes

_ATTENTION = [(384, 384)] * 4  # query, key, value and output of a block of minilm
_FEED_FORWARD = [(1536, 384), (384, 1536)]
_HEAD = [(2, 384)]


def _some(count: int) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in torch.randint(20, 200, (count, 2)).tolist()]


# ------------------------------------------------------------------ lora_parameters


@check_for(
    cases=[
        Case(lambda: [_ATTENTION, 8], note="the attention of a block of minilm"),
        Case(lambda: [[*_ATTENTION, *_FEED_FORWARD], 8], note="all layers of a block of minilm"),
        Case(lambda: [_ATTENTION[:2] * 6 + _HEAD, 8], note="the layers of this lesson"),
        Case(lambda: [_some(1), 7]),
        Case(lambda: [_some(5), 19]),
        Case(lambda: [[(1024, 4096), (4096, 4096), (10, 4096)], 300]),
        Case(lambda: [_ATTENTION, 192], note="A and B are as large as the weight"),
        Case(lambda: [[(4096, 4096)], 3000]),
        Case(lambda: [[(5, 7), (900, 40)], 5]),
        Case(lambda: [[(1, 384), (384, 1)], 1]),
    ],
    causes=mistakes(
        """
        def lora_parameters(shapes, rank):
            whole = [out * in_ for out, in_ in shapes]
            lora = [rank * (out + in_) for out, in_ in shapes]
            return sum(map(min, whole, lora))
        """,
        """
        the idea is right, but a layer whose weight is smaller than A and B together
        is trained whole: count its out · in
            sum(map(min, whole, lora)) → sum(lora)
        only A is counted: B has out · r parameters
            rank * (out + in_) → rank * in_
        only B is counted: A has r · in parameters
            rank * (out + in_) → rank * out
        every layer is taken for a square one: A has `in` columns, and B has `out` rows
            rank * (out + in_) → 2 * rank * in_
        every layer is taken for a square one of width out: A has `in` columns
            rank * (out + in_) → 2 * rank * out
        these are the parameters of the weights: A and B have r · in and out · r
            sum(map(min, whole, lora)) → sum(whole)
        each layer is compared by itself: small layers are trained whole, whatever the others do
            sum(map(min, whole, lora)) → min(sum(whole), sum(lora))
        a small layer is trained whole, and this counts nothing for it
            sum(map(min, whole, lora)) → sum(n for w, n in zip(whole, lora) if n < w)
        A and B can be larger than W although r is below both sides: compare the numbers of
        parameters, not the rank with the sides
            sum(map(min, whole, lora)) →
                sum(n if rank < min(s) else w for s, w, n in zip(shapes, whole, lora))
        a small layer is trained whole: without A and B beside it
            sum(map(min, whole, lora)) →
                sum(n if n < w else n + w for w, n in zip(whole, lora))
        the larger of the two is counted: train whatever has fewer parameters
            map(min → map(max
        only the first layer is counted
            whole, lora)) → whole[:1], lora))
        """,
    ),
)
def lora_parameters(shapes, rank):
    """A and B are counted where they are smaller than the weight, and the weight elsewhere."""
    total = 0
    for out, in_ in shapes:
        weight, factors = out * in_, rank * in_ + out * rank
        total += factors if factors < weight else weight
    return total
