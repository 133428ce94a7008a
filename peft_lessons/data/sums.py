"""Sums of two numbers as a text to continue: a task whose answers a line of code can check."""

import random
from itertools import combinations_with_replacement

EXAMPLES = ((38, 15), (21, 46), (17, 12), (44, 29), (13, 34), (40, 18), (25, 31), (11, 47))
LOW, HIGH = 10, 49
SIZES = {"test": 200, "validation": 100}  # pairs; the training split has the others


def sums(split: str) -> list[tuple[int, int]]:
    """Return the sums (a, b) of a split, in a fixed order.

    "train" has 512 pairs of numbers from 10 to 49 in both orders, "validation" 100 and "test" 200
    other pairs in one order each: no pair stands on two sides, in either order. "larger" has 200
    sums of numbers from 10 to 99, of which one at least is above 49. The examples of `sum_prompt`
    are in none of them. Raises ValueError for another name."""
    draw = random.Random(0)
    shown = {tuple(sorted(pair)) for pair in EXAMPLES}
    pairs = [p for p in combinations_with_replacement(range(LOW, HIGH + 1), 2) if p not in shown]
    draw.shuffle(pairs)
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = [draw.choice((p, p[::-1])) for p in pairs[start : start + size]]
        start += size
    both = [order for pair in pairs[start:] for order in (pair, pair[::-1])]
    parts["train"] = list(dict.fromkeys(both))  # 17 + 17 has one order
    larger = [(a, b) for a in range(LOW, 100) for b in range(LOW, 100) if max(a, b) > HIGH]
    parts["larger"] = draw.sample(larger, 200)
    if split not in parts:
        raise ValueError(f"sums: no split {split!r}, there are {', '.join(sorted(parts))}")
    return parts[split]


def sum_prompt(a: int, b: int, examples: int = 1) -> str:
    """Return the text whose continuation is the sum: up to eight solved examples, each on a line of
    its own, then the sum to be solved."""
    solved = "".join(f"{x} + {y} = {x + y}\n" for x, y in EXAMPLES[:examples])
    return f"{solved}{a} + {b} = "
