"""Checks of lesson 13."""

import math
import statistics
from collections.abc import Callable

from ..studies import student_t
from .compare import difference
from .kit import Case, check_for, refused
from .mistakes import mistakes

# ------------------------------------------------------------------ pareto_front


@check_for(
    form="any",
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
        the lower score is treated as the better one
            t >= s → t <= s
        the higher cost is treated as the better one
            d <= c → d >= c
        one point dominates another only if it is better in both: better in one and equal in the
        other is enough
            d <= c and t >= s → d < c and t > s
        of two points of equal cost both stay: the one with the lower score is dominated
            d <= c → d < c
        of two points of equal score both stay: the one with the higher cost is dominated
            t >= s → t > s
        one point dominates another if it is better in one of the two: in the other it must be no
        worse
            d <= c and t >= s and (d, t) != (c, s) → d < c or t > s
        two equal points dominate each other: neither is better than the other
            and (d, t) != (c, s) → ∅
        each point is compared with itself and dominates itself: it is no better than itself
            others = points[:i] + points[i + 1 :] → others = points
            and (d, t) != (c, s) → ∅
        of equal points only the first is kept: keep all of them
            if not any( → if (c, s) not in points[:i] and not any(
        of equal points only the last is kept: keep all of them
            if not any( → if (c, s) not in points[i + 1 :] and not any(
        the order is that of the lists: the cheapest point must come first
            sorted(front, key=lambda i: costs[i]) → front
        the most expensive point comes first: the cheapest must
            sorted(front, key=lambda i: costs[i]) →
                sorted(front, key=lambda i: costs[i], reverse=True)
        equal points are reordered: they must keep the order of the lists
            sorted(front, → sorted(front[::-1],
        the result holds costs: return the indices of these points
            sorted(front, key=lambda i: costs[i]) → sorted(costs[i] for i in front)
        the result holds points: return their indices
            sorted(front, key=lambda i: costs[i]) → sorted((costs[i], scores[i]) for i in front)
        the result holds pairs of cost and index: return the indices alone
            sorted(front, key=lambda i: costs[i]) → sorted((costs[i], i) for i in front)
        the result is a mask with an entry for each point: return the indices of those on the front
            sorted(front, key=lambda i: costs[i]) → [i in front for i in range(len(points))]
        the indices begin at 1: the first is 0
            sorted(front, key=lambda i: costs[i]) →
                [i + 1 for i in sorted(front, key=lambda i: costs[i])]
        the dominated points are returned: return the other ones
            if not any( → if any(
        `costs.index` always finds the first of several equal costs
            sorted(front → sorted([costs.index(costs[i]) for i in front]
        the best score begins at 0, which no negative score exceeds: begin at -math.inf
            if not any( → if s > 0 and not any(
        the sweep by cost meets points of equal cost in the order of the lists: it must meet the
        better score first, and keep points equal to it
            enumerate(points) → sorted(enumerate(points), key=lambda point: point[1][0])
            not any(d <= c and t >= s and (d, t) != (c, s) for d, t in others) →
                all(s > scores[j] for j in front)
        with >= the sweep by cost also keeps a more expensive point that only equals the best score,
        and among points of equal cost it must meet the better score first
            enumerate(points) → sorted(enumerate(points), key=lambda point: point[1][0])
            not any(d <= c and t >= s and (d, t) != (c, s) for d, t in others) →
                all(s >= scores[j] for j in front)
        """,
    ),
)
def pareto_front(costs, scores):
    """The front holds every point that no other point dominates, the cheapest first."""
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


def _bytes(n_params, n_trainable, bits):
    """Return the bytes of the frozen weights and of the trainable parameters."""
    return (n_params - n_trainable) * _BITS[bits] / 8, 16 * n_trainable


def _with_bytes(note, n_params, n_trainable, gpu_gb, bits):
    """Describe a call with its bytes: True or False alone says little."""
    sizes = [*_bytes(n_params, n_trainable, bits), 7 / 8 * gpu_gb * _GB]
    need, room = sum(sizes[:2]), sizes[2]
    if abs(need - room) < 2**-10 * _GB:
        frozen, trained, room = (f"{size:,.0f} bytes" for size in sizes)
    else:
        frozen, trained, room = (f"{size / _GB:.3f} GiB" for size in sizes)
    return (
        f"n_params={n_params:_}, n_trainable={n_trainable:_}, gpu_gb={gpu_gb:.6g}, bits={bits}"
        + (f" ({note})" if note else "")
        + f". The frozen weights take {frozen} and the trainable parameters {trained}; seven "
        f"eighths of the GPU are {room}"
    )


def _threshold(n_trainable, gpu_gb, bits, note="", n_params=70_000_000_000):
    return Case(lambda: [n_params, n_trainable, gpu_gb, bits], note=note)


@check_for(
    describe=_with_bytes,
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
        Case(lambda: [70_000_000_000, _T, 39.085, 4], note="the stored bits decide"),
        Case(lambda: [1_000_000_000, 0, 2.15, 16], note="nothing is trained"),
        # One weight after another stored in too many or too few bits crosses the room.
        *(_threshold(0, gpu, 4) for gpu in (37.8, 38.426, 39.0, 40.7, 42.5, 44.7, 74.5)),
        _threshold(0, 149.5, 16),
        # The same for the bytes of a trainable parameter.
        *(_threshold(10**9, 1.0644 * (k + 0.5), 16, n_params=10**9) for k in range(1, 21)),
        _threshold(10**9, 1.0, 4, n_params=10**9),
        _threshold(0, 80, 16, n_params=10**6),
        _threshold(0, 160, 4, n_params=_N),
        Case(lambda: [7 * 2**30 // 2, 0, 8, 16], note="it takes exactly seven eighths"),
        Case(lambda: [7 * 2**26, 7 * 2**26, 8, 16], note="all parameters are trainable"),
        Case(
            lambda: [7 * 2**26 + 1, 7 * 2**26 + 1, 8, 16],
            note="one parameter more than seven eighths hold",
        ),
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
        a GB of the GPU is counted as 10⁹ bytes: here it has 2³⁰
            2**30 → 10**9
        a GB of the GPU is counted as 2²⁰ bytes: it has 2³⁰
            2**30 → 2**20
        gpu_gb is compared with bytes: multiply it by 2³⁰
            2**30 → 1
        the statistics of the blocks are left out: a weight in 4 bits takes 4.127 bits, not 4
            bits += 8 / 64 + 32 / 64 / 256 → pass
        a weight in 4 bits takes 4.127 bits, not 4.5: only every 256 blocks store 32 bits
            8 / 64 + 32 / 64 / 256 → 32 / 64
        a weight in 4 bits takes 4.127 bits, not 4.625: a block stores 8 bits, and only every 256
        blocks store 32 bits
            8 / 64 + 32 / 64 / 256 → 40 / 64
        the 32 bits that every 256 blocks store are left out
            + 32 / 64 / 256 → ∅
        32 bits are divided by 256: they belong to 256 blocks of 64 weights, so divide by 64 · 256
            32 / 64 / 256 → 32 / 256
        8 + 32/256 bits belong to a whole block: divide them by its 64 weights
            8 / 64 + 32 / 64 / 256 → 8 + 32 / 256
        the 8 and 32 bits of the statistics are counted as bytes
            8 / 64 + 32 / 64 / 256 → 8 * 8 / 64 + 8 * 32 / 64 / 256
        a weight in 16 bits has no statistics: add them for 4 bits only
            if bits == 4: → if bits:
        bits are counted as bytes: divide them by 8
            bits / 8 → bits
        4 // 8 is 0: divide by 8 with /
            bits += 8 / 64 + 32 / 64 / 256 → pass
            bits / 8 → (bits // 8)
        the trainable parameters are counted twice: n_params includes them
            n_params - n_trainable → n_params
        the trainable parameters are also counted with `bits` bits each: their 16 bytes include the
        weight
            n_params - n_trainable → n_params
            2 + 2 + 4 + 8 → 2 + 4 + 8
        a trainable parameter is counted with 12 bytes, not 16: its master copy, or one of Adam's
        moments, is left out
            2 + 2 + 4 + 8 → 2 + 2 + 8
        a trainable parameter is counted with 14 bytes, not 16: its weight or its gradient is left
        out
            2 + 2 + 4 + 8 → 2 + 4 + 8
        a trainable parameter is counted with 10 bytes, not 16
            2 + 2 + 4 + 8 → 2 + 8
        a trainable parameter is counted with 8 bytes, not 16
            2 + 2 + 4 + 8 → 8
        a trainable parameter is counted with 2 bytes, not 16
            2 + 2 + 4 + 8 → 2
        a trainable parameter is counted with 18 bytes, not 16
            2 + 2 + 4 + 8 → 2 + 4 + 4 + 8
        the weights alone are counted: a trainable parameter takes 16 bytes
            n_params - n_trainable → n_params
            + (2 + 2 + 4 + 8) * n_trainable → ∅
        the whole GPU is used: an eighth of it must stay free
            * 7 / 8 → ∅
        only an eighth of the GPU is used: seven eighths may be used
            * 7 / 8 → / 8
        an eighth of the need is added: an eighth of the GPU must stay free instead
            return need → return need * 9 / 8
            * 7 / 8 → ∅
        the comparison is reversed: return True where the model fits
            need <= → need >=
        exactly seven eighths are refused: compare with <=
            need <= → need <
        """,
    ),
)
def fits(n_params, n_trainable, gpu_gb, bits):
    """Frozen weights and trainable parameters are compared with seven eighths of the GPU."""
    free = 7 * gpu_gb * _GB - 8 * 16 * n_trainable  # eight times what is left for the base
    return bool((n_params - n_trainable) * _BITS[bits] <= free)


# ------------------------------------------------------------------ paired_difference

_SEEDS = "a and b rise and fall together from seed to seed"


@check_for(
    form="any",
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
        refused(lambda: [[0.8, 0.7, 0.6], [0.7, 0.8]], "", "one method has one more seed"),
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
        the squares are divided by n, not by n − 1 (statistics.stdev)
            stdev → pstdev
        the two lists are treated as independent samples: the scores come in pairs
            student_t(n - 1) → student_t(2 * n - 2)
            statistics.stdev(gaps) →
                math.hypot(statistics.stdev(scores_a), statistics.stdev(scores_b))
        the spreads of the two lists are combined: take the spread of the pairs' differences
            statistics.stdev(gaps) →
                math.hypot(statistics.stdev(scores_a), statistics.stdev(scores_b))
        the spreads of the two lists are added: take the spread of the pairs' differences
            statistics.stdev(gaps) → (statistics.stdev(scores_a) + statistics.stdev(scores_b))
        the spread is not divided by √n: this is the spread of one seed, not of the mean
            / math.sqrt(n) → ∅
        the spread is divided by n: divide it by √n
            math.sqrt(n) → n
        the spread is divided by √(n − 1): divide it by √n
            math.sqrt(n) → math.sqrt(n - 1)
        the sign is reversed: subtract b from a
            a - b → b - a
        the differences have lost their signs: leave out abs
            a - b → abs(a - b)
        the lists are sorted, and the pairs are lost
            zip(scores_a, scores_b) → zip(sorted(scores_a), sorted(scores_b))
        n differences have n − 1 degrees of freedom, not n
            student_t(n - 1) → student_t(n)
        n differences have n − 1 degrees of freedom, not n − 2
            student_t(n - 1) → student_t(max(n - 2, 1))
        n differences have n − 1 degrees of freedom: 2 n − 2 is for two independent samples
            student_t(n - 1) → student_t(2 * n - 2)
        this is the standard error: t is missing
            student_t(n - 1) * → ∅
        the variance is used instead of the standard deviation: its square root is missing
            stdev → variance
        the ends are the smallest and the largest difference: compute them by the formula
            mean - half, mean + half → min(gaps), max(gaps)
        the ends are swapped: the lower end comes first
            mean, mean - half, mean + half → mean, mean + half, mean - half
        the order is wrong: the mean comes first, then the two ends
            mean, mean - half, mean + half → mean - half, mean, mean + half
        this is half the width of the interval: return its two ends
            mean, mean - half, mean + half → mean, half
        """,
        statistics=statistics,
        student_t=student_t,
    ),
)
def paired_difference(scores_a, scores_b):
    """The mean of the pairs' differences comes with its 95 % interval by Student's t."""
    n = len(scores_a)
    if n != len(scores_b) or n < 2:
        raise ValueError("give pairs of at least two seeds")
    mean = math.fsum([*scores_a, *(-b for b in scores_b)]) / n
    squares = math.fsum((a - b - mean) ** 2 for a, b in zip(scores_a, scores_b, strict=True))
    half = student_t(n - 1) * math.sqrt(squares / (n * (n - 1)))
    return mean, mean - half, mean + half


# ------------------------------------------------------------------ defend_choice


def _situation(gpu_gb, seeds=3, noise=0.4, **methods):
    """Return {method: (GiB, mean score)} as the arguments of a call. The scores rise and fall
    together from seed to seed, with small differences."""

    def wave(value: Callable) -> list[float]:
        values = [value(s) for s in range(1, seeds + 1)]
        return [v - statistics.fmean(values) for v in values]

    shared = wave(lambda s: 2.0 * math.cos(3.1 * (s - 1)))
    needs, scores = {}, {}
    for i, (name, (size, score)) in enumerate(methods.items()):
        needs[name] = size
        small = wave(lambda s, i=i: math.sin(7.3 * i * s + s))
        scores[name] = [score + a + noise * b for a, b in zip(shared, small, strict=True)]
    return [needs, gpu_gb, scores]


_EIGHT_BILLION = {"full": (122.0, 85.6), "lora": (17.9, 85.4), "ia3": (17.3, 80.0)}
_EIGHT_BILLION |= {"qlora": (8.0, 83.0)}
_THREE_BILLION = {"full": (48.4, 90.0), "dora": (9.2, 89.9), "lora": (8.8, 89.6)}
_THREE_BILLION |= {"qlora": (4.8, 88.9), "prompt": (8.5, 89.0)}
_NO_BETTER = {"full": (48.4, 88.8), "lora": (8.8, 89.0), "qlora": (4.8, 86.0)}
_PERPLEXITIES = {"lora": (35.4, -40.0), "qlora": (13.0, -40.3), "prefix": (34.5, -52.0)}
_SEVENTY_BILLION = {"lora": (133.2, 77.0), "qlora": (40.0, 76.0), "prompt": (131.3, 60.0)}


def _called(methods, gpu_gb, seeds=3, noise=0.4, note=""):
    """Return the case of a situation."""
    if min(size for size, _ in methods.values()) > gpu_gb * 7 / 8:
        note = "nothing fits"
    return Case(lambda: _situation(gpu_gb, seeds, noise, **methods), note=note)


def _with_means(note, needs, gpu_gb, scores):
    means = ", ".join(f"{name} {statistics.fmean(values):.4g}" for name, values in scores.items())
    described = f"needs={needs!r}, gpu_gb={gpu_gb}, scores with the means {means}"
    return described + (f" ({note})" if note else "")


_TOLERANCE = 1e-3


def _of_the_intervals(got, expected):
    """Ask for exercise 13.2 where the values of `behind` are wrong."""
    behind = got.get("behind") if isinstance(got, dict) else None

    def off(values: bool) -> str | None:
        return difference(behind, expected["behind"], "", _TOLERANCE, values, form="any")

    if off(values=False) or not off(values=True):
        return None
    return "Does your paired_difference pass its check in exercise 13.2?"


def _in_order(answer: dict) -> dict:
    """Return the parts in the order in which a fault is named: the intervals decide the rest."""
    first = {name: answer[name] for name in ("behind", "method", "left") if name in answer}
    return first | dict(answer)


@check_for(
    form="any",
    calls={"paired_difference": "Write exercise 13.2 first, or compute the interval here."},
    describe=_with_means,
    hint=_of_the_intervals,
    cases=[
        *(_called(_EIGHT_BILLION, gpu, noise=0.2) for gpu in (24, 160, 16, 8, 20.7, 19.5)),
        _called(_THREE_BILLION, 80, noise=0.2),
        _called(_THREE_BILLION, 80, note="noisier seeds"),
        _called(_EIGHT_BILLION, 160, note="noisier seeds"),
        _called(_NO_BETTER, 80),
        _called(_PERPLEXITIES, 48, 5, 1.2, "scores are perplexities, negated; five seeds"),
        _called(_SEVENTY_BILLION, 24),
        _called({"qlora": (40.0, 76.0)}, 80),
        _called({"full": (48.4, 90.0), "lora": (8.8, 85.0), "prompt": (8.5, 89.9)}, 80, noise=0.2),
        _called({"lora": (17.9, 85.4), "prompt": (15.5, 50.0)}, 24),
    ],
    returns="the answer",
    view=_in_order,
    staged=True,
    tolerance=_TOLERANCE,
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
        methods that do not fit take part: leave them out first
            if needs[name] <= room → ∅
        the whole GPU is used: an eighth of it must stay free
            * 7 / 8 → ∅
        the lower end decides: too few seeds would then excuse any method
            behind[name][2] <= 1 → behind[name][1] <= 0
        the lower end is compared with one point: the upper end decides
            behind[name][2] <= 1 → behind[name][1] <= 1
        the mean is compared with one point: the upper end of the interval decides
            behind[name][2] <= 1 → behind[name][0] <= 1
        the condition is reversed: methods behind by more than a point are taken
            behind[name][2] <= 1 → behind[name][2] > 1
        a difference below one standard deviation of the scores is allowed: the upper end decides
            behind[name][2] <= 1 → behind[name][0] <= statistics.stdev(scores[best])
        methods whose own intervals overlap are treated as equal: the interval of the differences
        decides
            behind[name][2] <= 1 →
                gap(scores[best], [0] * 99)[1] <= gap(scores[name], [0] * 99)[2]
        the cheapest method that fits is taken, though it may be behind by more than a point
            good, key → fitting, key
        the best mean is taken, though a cheaper method is behind by at most a point
            min(good, key=needs.get) → best
        the other methods are compared with the best of all, which does not fit: take the best that
        fits
            max(fitting → max(needs
        the lowest mean is treated as the best: higher scores are better
            max(fitting → min(fitting
        the best method is found by its best seed: compare the means
            statistics.mean(scores[name]) → max(scores[name])
        `behind` has the opposite sign: subtract the other method's scores from the best one's
            x - y → y - x
        the interval in `behind` uses 1.96: with few seeds Student's t is larger (exercise 13.2)
            student_t(len(d) - 1) → 1.96
        the interval in `behind` uses 2: with few seeds Student's t is larger (exercise 13.2)
            student_t(len(d) - 1) → 2
        the interval in `behind` is not paired: take the spread of the differences (exercise 13.2)
            statistics.stdev(d) → math.hypot(statistics.stdev(a), statistics.stdev(b))
        the interval in `behind` takes two independent samples: the scores come in pairs (exercise
        13.2)
            student_t(len(d) - 1) → student_t(2 * len(d) - 2)
            statistics.stdev(d) → math.hypot(statistics.stdev(a), statistics.stdev(b))
        the interval in `behind` lacks the division by √n (exercise 13.2)
            / math.sqrt(len(d)) → ∅
        the interval in `behind` lacks Student's t (exercise 13.2)
            student_t(len(d) - 1) * → ∅
        the interval in `behind` divides the squares by n, not by n − 1 (exercise 13.2)
            statistics.stdev(d) → statistics.pstdev(d)
        `behind` is counted from the method chosen: count it from the best
            left = →
                behind = {n: gap(scores[method], scores[n]) for n in fitting if n != method}; left =
        `behind` also holds methods that do not fit
            n in fitting if → n in needs if
        `behind` also holds the best itself
            for n in fitting if n != best → for n in fitting
        `left` is counted for the best: count what the chosen method leaves
            needs[method] → needs[best]
        `left` is counted from the whole GPU: an eighth of it must stay free
            room - took → gpu_gb - took
        `left` has the opposite sign: subtract the need from seven eighths of the GPU
            room - took → took - room
        `left` is 0 where nothing fits: it is negative there, seven eighths minus the smallest need
            room - took → room - took if fitting else 0
        `left` is all seven eighths where nothing fits: subtract the smallest need
            room - took → room - took if fitting else room
        `left` has the opposite sign where nothing fits: it is negative there
            room - took → room - took if fitting else took - room
        gpu_gb is converted to bytes: it is in GiB already, as `needs` is, so leave out 2³⁰
            room = gpu_gb * 7 / 8 → room = gpu_gb * 7 / 8 * 2**30
        gpu_gb is converted to units of 10⁹ bytes: it is in GiB, as `needs` is
            room = gpu_gb * 7 / 8 → room = gpu_gb * 7 / 8 * 2**30 / 10**9
        nothing fits, but the smallest method is named all the same
            "does not fit" → min(needs, key=needs.get)
        """,
        statistics=statistics,
        student_t=student_t,
    ),
)
def defend_choice(needs, gpu_gb, scores):
    """The choice is the cheapest method that fits and is surely within a point of the best."""
    usable = 7 * gpu_gb / 8
    cheap = sorted((name for name in needs if needs[name] <= usable), key=needs.get)
    if not cheap:
        left = usable - min(needs.values())
        return {"behind": {}, "method": "does not fit", "left": left}
    best = max(cheap, key=lambda name: math.fsum(scores[name]))
    behind = {n: paired_difference.reference(scores[best], scores[n]) for n in cheap if n != best}
    method = next(name for name in cheap if name == best or behind[name][2] <= 1)
    return {"behind": behind, "method": method, "left": usable - needs[method]}
