"""Checks of lesson 13."""

import math
import statistics
from collections.abc import Callable

from ..studies import student_t
from .kit import Case, check_for, refused
from .mistakes import mistakes

# ------------------------------------------------------------------ pareto_front


@check_for(
    cases=[
        Case(lambda: [[3.0, 1.0, 2.0, 4.0, 2.5], [80.0, 70.0, 79.0, 78.0, 75.0]]),
        Case(lambda: [[5, 2, 9, 4], [0.90, 0.70, 0.91, 0.89]], note="none dominates another"),
        Case(lambda: [[2.0, 2.0, 3.0, 1.0], [0.6, 0.8, 0.8, 0.5]], note="equal costs and scores"),
        Case(lambda: [[2.0, 2.0, 1.0], [0.8, 0.6, 0.5]], note="the same, the better one first"),
        Case(lambda: [[7, 3, 7, 5], [9, 4, 9, 1]], note="two equal points"),
        Case(lambda: [[1.0, 2.0, 3.0, 4.0], [-50.0, -40.0, -39.9, -45.0]], note="negated losses"),
        Case(lambda: [[6.0], [0.1]], note="a single point"),
    ],
    causes=mistakes(
        """
        def pareto_front(costs, scores):
            points = list(zip(costs, scores))
            front = []
            for i, (c, s) in enumerate(points):
                others = points[:i] + points[i + 1 :]
                if not any(d <= c and t >= s and (d, t) != (c, s) for d, t in others):
                    front.append(i)
            return sorted(front, key=lambda i: costs[i])
        """,
        """
        a lower score is taken for the better one
            t >= s → t <= s
        a higher cost is taken for the better one
            d <= c → d >= c
        a point must be better in both to put another out: better in one, equal in the other is
        enough
            d <= c and t >= s → d < c and t > s
        of two points of equal cost the worse one stays
            d <= c → d < c
        of two points of equal score the dearer one stays
            t >= s → t > s
        equal points put each other out: neither is better than the other
            and (d, t) != (c, s) → ∅
        of equal points only one is kept
            if not any( → if (c, s) not in points[:i] and not any(
        the order is that of the lists: the cheapest comes first
            sorted(front, key=lambda i: costs[i]) → front
        these are costs: their indices are wanted
            sorted(front, key=lambda i: costs[i]) → sorted(costs[i] for i in front)
        `index` finds the first of what is equal, whatever it was asked for
            sorted(front → sorted([costs.index(costs[i]) for i in front]
        the best score begins at 0: no negative one is above it
            if not any( → if s > 0 and not any(
        among equal costs the first in the list decides: the sweep by cost must meet the better
        score first, and keep its equals
            enumerate(points) → sorted(enumerate(points), key=lambda point: point[1][0])
            not any(d <= c and t >= s and (d, t) != (c, s) for d, t in others) →
                all(s > scores[j] for j in front)
        """,
    ),
)
def pareto_front(costs, scores):
    """Those that no other point dominates, the cheapest first and equal ones all."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i], i))
    front = []
    for i in order:
        last = front[-1] if front else None
        if (
            last is None
            or scores[i] > scores[last]
            or (costs[i] == costs[last] and scores[i] == scores[last])
        ):
            front.append(i)
    return front


# ------------------------------------------------------------------ fits

_BITS = {16: 16, 4: 4 + 8 / 64 + 32 / (64 * 256)}
_GB = 2**30


_N, _T = 7_000_000_000, 40_000_000


@check_for(
    cases=[
        (_N, _T, 24, 16),
        (_N, _T, 12, 16),
        (_N, _T, 6, 4),
        (_N, _N, 80, 16),
        (_N, _T, 40, 4),
        (_N, _T, 40, 16),
        (10**9, 10**9, 18.1, 4),
        (10**9, 10**9, 6, 16),
        Case(lambda: [_N, _T, 14.3, 16]),
        Case(lambda: [_N, _T, 15.4, 16]),
        Case(lambda: [_N, 300_000_000, 19.2, 16]),
        Case(lambda: [_N, 300_000_000, 8.9, 4]),
        Case(lambda: [_N, 300_000_000, 8.6, 4]),
        Case(lambda: [70_000_000_000, _T, 38.8, 4]),
        Case(lambda: [70_000_000_000, _T, 39.3, 4]),
        Case(lambda: [70_000_000_000, _T, 39.085, 4], note="the statistics decide"),
        Case(lambda: [1_000_000_000, 0, 2.15, 16], note="nothing trains"),
        Case(lambda: [7 * 2**30 // 2, 0, 8, 16], note="it takes exactly seven eighths"),
        Case(lambda: [7 * 2**26, 7 * 2**26, 8, 16], note="the same, and all of it trains"),
        Case(lambda: [7 * 2**26 + 1, 7 * 2**26 + 1, 8, 16], note="16 bytes more than these"),
    ],
    causes=mistakes(
        """
        def fits(n_params, n_trainable, gpu_gb, bits):
            if bits == 4:
                bits += 8 / 64 + 32 / 64 / 256
            frozen = n_params - n_trainable
            need = frozen * bits / 8 + (2 + 2 + 4 + 8) * n_trainable
            return need <= gpu_gb * 2**30 * 7 / 8
        """,
        """
        the GPU's GB are taken for 10⁹ bytes: a GPU of 24 GB has 24 · 2³⁰
            2**30 → 10**9
        a weight in 4 bits has its share of the statistics: 4.127 bits, not 4
            bits += 8 / 64 + 32 / 64 / 256 → pass
        the statistics are quantised too: 4.127 bits a weight, not 4.5
            8 / 64 + 32 / 64 / 256 → 32 / 64
        the second level is left out: each 256 blocks have one statistic of 32 bits
            + 32 / 64 / 256 → ∅
        4 // 8 is 0: divide by 8 with /
            bits += 8 / 64 + 32 / 64 / 256 → pass
            bits / 8 → (bits // 8)
        what trains is counted twice: n_params includes n_trainable
            n_params - n_trainable → n_params
        what trains is stored in 4 bits here: it never is
            n_params - n_trainable → n_params
            2 + 2 + 4 + 8 → 2 + 4 + 8
        12 bytes are counted for what trains: its master copy, or one of Adam's moments, is left
        out
            2 + 2 + 4 + 8 → 2 + 2 + 8
        14 bytes are counted for what trains: its weight or its gradient is left out
            2 + 2 + 4 + 8 → 2 + 4 + 8
        weights alone are counted: what trains has gradients and moments
            n_params - n_trainable → n_params
            + (2 + 2 + 4 + 8) * n_trainable → ∅
        the whole GPU is used: an eighth stays free
            * 7 / 8 → ∅
        an eighth of the need is added: an eighth of the GPU stays free
            return need → return need * 9 / 8
            * 7 / 8 → ∅
        what takes exactly seven eighths fits
            need <= → need <
        """,
    ),
)
def fits(n_params, n_trainable, gpu_gb, bits):
    """Bytes of base and of what trains against seven eighths of the card, in 16 bits and in 4."""
    free = 7 * gpu_gb * _GB - 8 * 16 * n_trainable  # eight times what is left for the base
    return bool((n_params - n_trainable) * _BITS[bits] <= free)


# ------------------------------------------------------------------ paired_difference

_SEEDS = "a and b rise and fall together from seed to seed"


@check_for(
    cases=[
        Case(lambda: [[84.7, 85.6, 83.9], [84.1, 84.8, 83.4]], note=_SEEDS),
        Case(lambda: [[0.81, 0.79, 0.84, 0.80, 0.86], [0.83, 0.78, 0.83, 0.84, 0.85]]),
        Case(lambda: [[3.0, 7.5], [1.0, 2.0]], note="two seeds"),
        Case(lambda: [[-39.1, -40.2, -38.0, -41.0], [-42.0, -42.5, -42.2, -41.9]]),
        Case(lambda: [[0.5, 0.7, 0.6], [0.4, 0.6, 0.5]], note="the same gap for every seed"),
        Case(
            lambda: [
                [61.0, 60.0, 66.0, 64.5, 63.0, 61.5, 62.0, 65.0],
                [60.5, 61.0, 65.0, 65.0, 62.0, 60.0, 62.5, 63.0],
            ]
        ),
        refused(lambda: [[0.8], [0.7]], "", "one seed"),
        refused(lambda: [[0.8, 0.7, 0.6], [0.7, 0.8]], "", "one has a seed more"),
    ],
    returns=("the mean", "the lower end", "the upper end"),
    tolerance=1e-3,
    causes=mistakes(
        """
        def paired_difference(scores_a, scores_b):
            n = len(scores_a)
            if n < 2 or n != len(scores_b):
                raise ValueError("both methods need the same seeds, at least two")
            gaps = [a - b for a, b in zip(scores_a, scores_b)]
            mean = sum(gaps) / n
            half = student_t(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
            return mean, mean - half, mean + half
        """,
        """
        1.96 holds for many seeds: with few, Student's t is larger
            student_t(n - 1) → 1.96
        two, the rule of thumb, holds for many seeds: with few, Student's t is larger
            student_t(n - 1) → 2
        the deviation is divided by n, not by n − 1
            stdev → pstdev
        the two lists are taken for independent samples: seeds come in pairs
            student_t(n - 1) → student_t(2 * n - 2)
            statistics.stdev(gaps) →
                math.hypot(statistics.stdev(scores_a), statistics.stdev(scores_b))
        the spreads of the lists are added: take the spread of the pairs' differences
            statistics.stdev(gaps) →
                math.hypot(statistics.stdev(scores_a), statistics.stdev(scores_b))
        the deviation is not divided by √n: that is where one seed falls, not the mean
            / math.sqrt(n) → ∅
        the deviation is divided by √(n − 1): divide it by √n
            math.sqrt(n) → math.sqrt(n - 1)
        the sign is turned: it is a − b
            a - b → b - a
        n differences have n − 1 degrees of freedom, not n
            student_t(n - 1) → student_t(n)
        this is the standard error: t is missing
            student_t(n - 1) * → ∅
        the variance is taken for the deviation: its square root is missing
            stdev → variance
        the mean comes first, and then the ends
            mean, mean - half, mean + half → mean - half, mean, mean + half
        """,
        statistics=statistics,
        student_t=student_t,
    ),
)
def paired_difference(scores_a, scores_b):
    """The mean of the differences and its 95 % interval by Student's t, pair by pair."""
    n = len(scores_a)
    if n != len(scores_b) or n < 2:
        raise ValueError("pairs of two seeds at least are wanted")
    mean = math.fsum([*scores_a, *(-b for b in scores_b)]) / n
    squares = math.fsum((a - b - mean) ** 2 for a, b in zip(scores_a, scores_b, strict=True))
    half = student_t(n - 1) * math.sqrt(squares / (n * (n - 1)))
    return mean, mean - half, mean + half


# ------------------------------------------------------------------ defend_choice


def _situation(gpu_gb, seeds=3, noise=0.4, **given):
    """{method: (GiB, mean score)} as the arguments of a call, with scores that rise and fall
    together, and a little apart."""

    def wave(value: Callable) -> list[float]:
        values = [value(s) for s in range(1, seeds + 1)]
        return [v - statistics.fmean(values) for v in values]

    shared = wave(lambda s: 2.0 * math.cos(3.1 * (s - 1)))
    needs, scores = {}, {}
    for i, (name, (size, score)) in enumerate(given.items()):
        needs[name] = size
        own = wave(lambda s, i=i: math.sin(7.3 * i * s + s))
        scores[name] = [score + a + noise * b for a, b in zip(shared, own, strict=True)]
    return [needs, gpu_gb, scores]


_EIGHT_BILLION = {"full": (122.0, 85.6), "lora": (17.9, 85.4), "ia3": (17.3, 80.0)}
_EIGHT_BILLION |= {"qlora": (8.0, 83.0)}
_THREE_BILLION = {"full": (48.4, 90.0), "dora": (9.2, 89.9), "lora": (8.8, 89.6)}
_THREE_BILLION |= {"qlora": (4.8, 88.9), "prompt": (8.5, 89.0)}
_NO_BETTER = {"full": (48.4, 88.8), "lora": (8.8, 89.0), "qlora": (4.8, 86.0)}
_PERPLEXITIES = {"lora": (35.4, -40.0), "qlora": (13.0, -40.3), "prefix": (34.5, -52.0)}
_SEVENTY_BILLION = {"lora": (133.2, 77.0), "qlora": (40.0, 76.0), "prompt": (131.3, 60.0)}


def _called(given, gpu_gb, seeds=3, noise=0.4, note=""):
    """The case of a situation; the note names what the dicts hold."""
    sizes = ", ".join(f"{name} {size:g} and {score:g}" for name, (size, score) in given.items())
    told = f"GiB and mean score: {sizes}{note}"
    return Case(lambda: _situation(gpu_gb, seeds, noise, **given), note=told)


@check_for(
    cases=[
        *(_called(_EIGHT_BILLION, gpu, noise=0.2) for gpu in (24, 160, 16, 8, 20.7, 19.5)),
        _called(_THREE_BILLION, 80, noise=0.2),
        _called(_THREE_BILLION, 80, note="; noisier seeds"),
        _called(_EIGHT_BILLION, 160, note="; noisier seeds"),
        _called(_NO_BETTER, 80),
        _called(_PERPLEXITIES, 48, 5, 1.2, "; scores are perplexities, negated; five seeds"),
        _called(_SEVENTY_BILLION, 24),
        _called({"qlora": (40.0, 76.0)}, 80),
        _called({"lora": (17.9, 85.4), "prompt": (15.5, 50.0)}, 24),
    ],
    returns="the answer",
    view=dict,
    staged=True,
    tolerance=1e-3,
    causes=mistakes(
        """
        def defend_choice(needs, gpu_gb, scores):
            def gap(a, b):
                d = [x - y for x, y in zip(a, b)]
                mean = sum(d) / len(d)
                half = student_t(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
                return mean, mean - half, mean + half

            room = gpu_gb * 7 / 8
            fitting = [name for name in needs if needs[name] <= room]
            method, took, behind = "does not fit", min(needs.values()), {}
            if fitting:
                best = max(fitting, key=lambda name: statistics.mean(scores[name]))
                behind = {n: gap(scores[best], scores[n]) for n in fitting if n != best}
                good = [name for name in fitting if name == best or behind[name][2] <= 1]
                method = min(good, key=needs.get)
                took = needs[method]
            left = room - took
            return {"method": method, "left": left, "behind": behind}
        """,
        """
        it does not fit: the best score is taken, whatever it takes
            if needs[name] <= room → ∅
        the whole GPU is used: an eighth stays free
            * 7 / 8 → ∅
        the lower end decides nothing: too few seeds would then excuse any method
            behind[name][2] <= 1 → behind[name][1] <= 0
        the mean is within a point, and the upper end is not: the upper end decides
            behind[name][2] <= 1 → behind[name][0] <= 1
        it is dominated: the cheapest that fits is taken, though another is clearly better
            good, key → fitting, key
        the best mean is taken, though a cheaper one is surely within a point
            min(good, key=needs.get) → best
        the best of all is the measure, though it does not fit
            max(fitting → max(needs
        `behind` has the sign turned: it is the best less the other
            x - y → y - x
            behind[name][2] <= 1 → -behind[name][1] <= 1
        `left` is counted for the best: it is what the chosen method leaves
            needs[method] → needs[best]
        `behind` is counted from the method chosen: it is the best less the other
            left = →
                behind = {n: gap(scores[method], scores[n]) for n in fitting if n != method}; left =
        `behind` has what does not fit, too
            n in fitting if → n in needs if
        `left` is counted from the whole GPU: an eighth of it stays free
            room - took → gpu_gb - took
        the sizes come in GiB already: nothing is to be divided
            room = gpu_gb * 7 / 8 → room = gpu_gb * 7 / 8 * 2**30
        nothing fits, and the smallest is named all the same
            "does not fit" → min(needs, key=needs.get)
        """,
        statistics=statistics,
        student_t=student_t,
    ),
)
def defend_choice(needs, gpu_gb, scores):
    """What fits, is as good as the best that fits and takes least, with what decides."""
    usable = 7 * gpu_gb / 8
    cheap = sorted((name for name in needs if needs[name] <= usable), key=needs.get)
    if not cheap:
        left = usable - min(needs.values())
        return {"method": "does not fit", "left": left, "behind": {}}
    best = max(cheap, key=lambda name: math.fsum(scores[name]))
    behind = {n: paired_difference.reference(scores[best], scores[n]) for n in cheap if n != best}
    method = next(name for name in cheap if name == best or behind[name][2] <= 1)
    return {"method": method, "left": usable - needs[method], "behind": behind}
