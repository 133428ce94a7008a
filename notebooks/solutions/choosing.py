"""Solutions of lesson 13."""

import math
import statistics

from peft_lessons.studies import student_t


def pareto_front(costs: list[float], scores: list[float]) -> list[int]:
    """Return the indices of the points that no other dominates, the cheapest first."""
    points = list(zip(costs, scores, strict=True))

    def dominates(j: int, i: int) -> bool:
        (cost, score), (other_cost, other_score) = points[j], points[i]
        return cost <= other_cost and score >= other_score and points[j] != points[i]

    every = range(len(points))
    front = [i for i in every if not any(dominates(j, i) for j in every)]
    return sorted(front, key=lambda i: costs[i])  # equal points stay in their order


def fits(n_params: int, n_trainable: int, gpu_gb: float, bits: int) -> bool:
    """Return whether weights and what trains take at most seven eighths of a GPU."""
    stored = 16 if bits == 16 else 4 + 8 / 64 + 32 / (64 * 256)   # bits of a frozen weight
    frozen = (n_params - n_trainable) * stored / 8                # bytes
    return frozen + 16 * n_trainable <= 7 / 8 * gpu_gb * 2**30


def paired_difference(
    scores_a: list[float], scores_b: list[float]
) -> tuple[float, float, float]:
    """Return the mean of a − b and the ends of its 95 % interval."""
    if len(scores_a) != len(scores_b) or len(scores_a) < 2:
        raise ValueError("the scores must be pairs, at least two")
    gaps = [a - b for a, b in zip(scores_a, scores_b, strict=True)]
    n, mean = len(gaps), statistics.fmean(gaps)
    half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
    return mean, mean - half, mean + half


def defend_choice(
    needs: dict[str, float], gpu_gb: float, scores: dict[str, list[float]]
) -> dict:
    """Return the cheapest method that fits and is as good as the best, with the numbers."""

    def paired(a: list[float], b: list[float]) -> tuple[float, float, float]:
        gaps = [x - y for x, y in zip(a, b, strict=True)]
        mean, n = statistics.fmean(gaps), len(gaps)
        half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
        return mean, mean - half, mean + half

    usable = 7 / 8 * gpu_gb
    fitting = [name for name in needs if needs[name] <= usable]
    if not fitting:
        return {"method": "does not fit", "left": usable - min(needs.values()), "behind": {}}
    best = max(fitting, key=lambda name: statistics.fmean(scores[name]))
    behind = {name: paired(scores[best], scores[name]) for name in fitting if name != best}
    as_good = [best, *(name for name, (_, _, high) in behind.items() if high <= 1)]
    chosen = min(as_good, key=needs.get)
    return {"method": chosen, "left": usable - needs[chosen], "behind": behind}
