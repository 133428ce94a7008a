"""Checks of lesson 13."""

import math
import statistics
from collections.abc import Callable

from ..studies import student_t
from .kit import Case, check_for, refused

_NAN = math.nan

# ------------------------------------------------------------------ pareto_front


def _front(
    better: Callable = lambda c, s, d, t: c <= d and s >= t and (c, s) != (d, t),
    order: Callable = lambda i, costs: costs[i],
    measured: Callable = lambda c, s: c == c and s == s,
    rivals: Callable = lambda c, s: c == c and s == s,
    kept: Callable = lambda front, costs, scores: front,
) -> Callable:
    """A pareto_front with its steps open to be done wrongly. `better`: whether a point of cost c
    and score s puts out one of cost d and score t; `rivals`: which points may put others out."""

    def pareto_front(costs, scores):
        points = list(zip(costs, scores, strict=True))
        against = [p for p in points if rivals(*p)]
        front = [
            i
            for i, p in enumerate(points)
            if measured(*p) and not any(better(*q, *p) for q in against)
        ]
        front = kept(front, costs, scores)
        return sorted(front, key=lambda i: order(i, costs))

    return pareto_front


def _without_twins(front, costs, scores):
    seen, kept = set(), []
    for i in front:
        if (costs[i], scores[i]) not in seen:
            kept.append(i)
        seen.add((costs[i], scores[i]))
    return kept


def _without_any_twins(front, costs, scores):
    points = [(costs[i], scores[i]) for i in front]
    return [i for i in front if points.count((costs[i], scores[i])) == 1]


def _of_the_hull(front, costs, scores):
    """Those of a front that lie on no line between two others or below it."""

    def below(i):
        return any(
            costs[a] < costs[i] < costs[b]
            and (scores[i] - scores[a]) * (costs[b] - costs[a])
            <= (scores[b] - scores[a]) * (costs[i] - costs[a])
            for a in front
            for b in front
        )

    return [i for i in front if not below(i)]


def _one_sweep(costs, scores):
    """By cost alone, keeping what is better than all before: equal costs in any order."""
    best, front = -math.inf, []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if costs[i] == costs[i] and scores[i] > best:
            best, front = scores[i], [*front, i]
    return front


def _of_the_measured(costs, scores):
    points = [(c, s) for c, s in zip(costs, scores, strict=True) if c == c and s == s]
    return _front()([c for c, _ in points], [s for _, s in points])


def _from_zero(costs, scores):
    return [i for i in _front()(costs, scores) if scores[i] > 0]


@check_for(
    cases=[
        Case(lambda: [[3.0, 1.0, 2.0, 4.0, 2.5], [80.0, 70.0, 79.0, 78.0, 75.0]]),
        Case(lambda: [[5, 2, 9, 4], [0.90, 0.70, 0.91, 0.89]], note="none dominates another"),
        Case(lambda: [[2.0, 2.0, 3.0, 1.0], [0.6, 0.8, 0.8, 0.5]], note="equal costs and scores"),
        Case(lambda: [[2.0, 2.0, 1.0], [0.8, 0.6, 0.5]], note="the same, the better one first"),
        Case(lambda: [[7, 3, 7, 5], [9, 4, 9, 1]], note="two equal points"),
        Case(lambda: [[4.0, 1.0, 2.0], [0.9, 0.5, 0.55]], note="one lies below a line"),
        Case(lambda: [[1.0, 2.0, 3.0, 4.0], [-50.0, -40.0, -39.9, -45.0]], note="negated losses"),
        Case(lambda: [[1.0, _NAN, 3.0], [0.5, 0.9, 0.7]], note="a cost that was not measured"),
        Case(lambda: [[1.0, 2.0, 3.0], [0.5, _NAN, 0.7]], note="a score that was not measured"),
        Case(lambda: [[_NAN, 2.0, _NAN], [_NAN, 0.4, 0.3]], note="most was not measured"),
        Case(lambda: [[6.0], [0.1]], note="a single point"),
        Case(lambda: [[], []], note="no point at all"),
    ],
    causes={
        "a lower score is taken for the better one": _front(
            lambda c, s, d, t: c <= d and s <= t and (c, s) != (d, t)
        ),
        "a higher cost is taken for the better one": _front(
            lambda c, s, d, t: c >= d and s >= t and (c, s) != (d, t)
        ),
        "this is the other front, of what is dearest and worst": _front(
            lambda c, s, d, t: c >= d and s <= t and (c, s) != (d, t)
        ),
        "a point must be better in both to put another out: better in one, equal in the other is "
        "enough": _front(lambda c, s, d, t: c < d and s > t),
        "of two points of equal cost the worse one stays": _front(
            lambda c, s, d, t: c < d and s >= t
        ),
        "of two points of equal score the dearer one stays": _front(
            lambda c, s, d, t: c <= d and s > t
        ),
        "equal points put each other out: neither is better than the other": _front(
            kept=_without_any_twins
        ),
        "of equal points only one is kept": _front(kept=_without_twins),
        "the order is that of the lists: the cheapest comes first": _front(order=lambda i, _: i),
        "equal points are turned round: they stand in the order in which they are given": _front(
            order=lambda i, costs: (costs[i], -i)
        ),
        "these are costs: their indices are wanted": lambda costs, scores: [
            costs[i] for i in _front()(costs, scores)
        ],
        "`index` finds the first of what is equal, whatever it was asked for": (
            lambda costs, scores: [costs.index(costs[i]) for i in _front()(costs, scores)]
        ),
        "these are indices into what was measured: they are to be those of the lists given": (
            _of_the_measured
        ),
        "the best score begins at 0: no negative one is above it": _from_zero,
        "the dearest comes first": _front(order=lambda i, costs: -costs[i]),
        "points below the line between two others are left out: no other point dominates them": (
            _front(kept=_of_the_hull)
        ),
        "what was not measured is kept: a comparison with NaN is never true": _front(
            measured=lambda c, s: True
        ),
        "only a missing cost is looked for: a score may be missing too": _front(
            measured=lambda c, s: c == c
        ),
        "only a missing score is looked for: a cost may be missing too": _front(
            measured=lambda c, s: s == s
        ),
        "among equal costs the first in the list decides: the sweep by cost must meet the better "
        "score first, and keep its equals": _one_sweep,
        "only the best score is given": _front(
            kept=lambda f, c, s: [i for i in f if s[i] == max(s[j] for j in f)]
        ),
        "only the cheapest is given": _front(
            kept=lambda f, c, s: [i for i in f if c[i] == min(c[j] for j in f)]
        ),
    },
)
def pareto_front(costs, scores):
    """Those that no other point dominates, cheapest first, equal ones all, unmeasured ones none."""
    order = sorted(
        (i for i in range(len(costs)) if costs[i] == costs[i] and scores[i] == scores[i]),
        key=lambda i: (costs[i], -scores[i], i),
    )
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
_CARD = 2**30


def _fits(
    stored: Callable = lambda bits: _BITS[bits],
    need: Callable = lambda n, t, b: (n - t) * b + 16 * t,
    card: Callable = lambda gb: 7 / 8 * gb * _CARD,
    within: Callable = lambda need, card: need <= card,
) -> Callable:
    """A fits with its steps open to be done wrongly; `need` takes the bytes of a frozen number."""

    def fits(n_params, n_trainable, gpu_gb, bits):
        return within(need(n_params, n_trainable, stored(bits) / 8), card(gpu_gb))

    return fits


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
        refused(lambda: [_N, _T, 24, 3], "bits", "no such number of bits"),
        refused(lambda: [_N, _T, 24, 8], "bits", "a byte"),
        refused(lambda: [_N, _T, 24, 32], "bits", "another one"),
    ],
    causes={
        "the card's GB are taken for 10⁹ bytes: a card of 24 GB has 24 · 2³⁰": _fits(
            card=lambda gb: 7 / 8 * gb * 1e9
        ),
        "a number in 4 bits has its share of the statistics: 4.127 bits, not 4": _fits(lambda b: b),
        "the statistics are quantised too: 4.127 bits a number, not 4.5": _fits(
            lambda b: {16: 16, 4: 4.5}[b]
        ),
        "the second level is left out: each 256 blocks have one statistic of 32 bits": _fits(
            lambda b: {16: 16, 4: 4 + 8 / 64}[b]
        ),
        "4 // 8 is 0: divide by 8 with /": _fits(lambda b: b // 8 * 8),
        "what trains is counted twice: n_params includes n_trainable": _fits(
            need=lambda n, t, b: n * b + 16 * t
        ),
        "gradients, master copy and moments are counted for all parameters": _fits(
            need=lambda n, t, b: 16 * n
        ),
        "the frozen base is left out: it takes memory too": _fits(need=lambda n, t, b: 16 * t),
        "what trains is stored in 4 bits here: it never is": _fits(
            need=lambda n, t, b: n * b + 14 * t
        ),
        "12 bytes are counted for what trains: its master copy, or one of Adam's moments, is left "
        "out": _fits(need=lambda n, t, b: (n - t) * b + 12 * t),
        "14 bytes are counted for what trains: its weight or its gradient is left out": _fits(
            need=lambda n, t, b: (n - t) * b + 14 * t
        ),
        "weights alone are counted: what trains has gradients and moments": _fits(
            need=lambda n, t, b: n * b
        ),
        "the whole card is used: an eighth stays free": _fits(card=lambda gb: gb * _CARD),
        "an eighth of the need is added: an eighth of the card stays free": _fits(
            need=lambda n, t, b: 9 / 8 * ((n - t) * b + 16 * t), card=lambda gb: gb * _CARD
        ),
        "bits are taken for bytes: 8 bits are a byte": _fits(lambda b: 8 * _BITS[b]),
        "the base is counted in 16 bits, whatever bits says": _fits(lambda b: 16),
        "the base is counted in 4 bits, whatever bits says": _fits(lambda b: _BITS[4]),
        "what takes exactly seven eighths fits": _fits(within=lambda need, card: need < card),
        "the answer is turned round": _fits(within=lambda need, card: need > card),
    },
)
def fits(n_params, n_trainable, gpu_gb, bits):
    """Bytes of base and of what trains against seven eighths of the card, in 16 bits and in 4."""
    if bits not in _BITS:
        raise ValueError(f"bits={bits} must be 4 or 16")
    free = 7 * gpu_gb * _CARD - 8 * 16 * n_trainable  # eight times what is left for the base
    return bool((n_params - n_trainable) * _BITS[bits] <= free)


# ------------------------------------------------------------------ paired_difference

# One-sided, 95 %, by degrees of freedom.
_ONE_SIDED = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318, 5: 2.0150, 7: 1.8946}


def _paired(
    gap: Callable = lambda a, b: a - b,
    centre: Callable = statistics.fmean,
    deviation: Callable = statistics.stdev,
    t: Callable = lambda n: student_t(n - 1),
    root: Callable = math.sqrt,
    ends: Callable = lambda mean, half: (mean, mean - half, mean + half),
) -> Callable:
    """A paired_difference with its steps open to be done wrongly."""

    def paired_difference(scores_a, scores_b):
        gaps = [gap(a, b) for a, b in zip(scores_a, scores_b, strict=True)]
        n = len(gaps)
        return ends(centre(gaps), t(n) * deviation(gaps) / root(n))

    return paired_difference


def _two_samples(t: Callable) -> Callable:
    def paired_difference(scores_a, scores_b):
        n, mean = len(scores_a), statistics.fmean(scores_a) - statistics.fmean(scores_b)
        variances = sum(map(statistics.variance, (scores_a, scores_b)))
        half = t(n) * math.sqrt(variances / n)
        return mean, mean - half, mean + half

    return paired_difference


def _range(scores_a, scores_b):
    gaps = [a - b for a, b in zip(scores_a, scores_b, strict=True)]
    return statistics.fmean(gaps), min(gaps), max(gaps)


def _sorted_first(scores_a, scores_b):
    return _paired()(sorted(scores_a), sorted(scores_b))


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
        refused(lambda: [[0.8], [0.7]], "seeds", "one seed"),
        refused(lambda: [[0.8, 0.7, 0.6], [0.7, 0.8]], "seeds", "one has a seed more"),
    ],
    returns=("the mean", "the lower end", "the upper end"),
    tolerance=1e-3,
    causes={
        "1.96 holds for many seeds: with few, Student's t is larger": _paired(t=lambda n: 1.96),
        "two, the rule of thumb, holds for many seeds: with few, Student's t is larger": _paired(
            t=lambda n: 2.0
        ),
        "the deviation is divided by n, not by n − 1": _paired(deviation=statistics.pstdev),
        "the two lists are taken for independent samples: seeds come in pairs": _two_samples(
            lambda n: student_t(2 * n - 2)
        ),
        "the spreads of the lists are added: take the spread of the pairs' differences": (
            _two_samples(lambda n: student_t(n - 1))
        ),
        "the deviation is not divided by √n: that is where one seed falls, not the mean": _paired(
            root=lambda n: 1
        ),
        "the deviation is divided by √(n − 1): divide it by √n": _paired(
            root=lambda n: math.sqrt(n - 1)
        ),
        "this is where one seed falls, give or take a deviation: t and √n are missing": _paired(
            t=lambda n: 1, root=lambda n: 1
        ),
        "the deviation is divided by n: divide it by √n": _paired(root=lambda n: n),
        "the sign is turned: it is a − b": _paired(gap=lambda a, b: b - a),
        "n differences have n − 1 degrees of freedom, not n": _paired(t=student_t),
        "n differences have n − 1 degrees of freedom, not 2n − 2": _paired(
            t=lambda n: student_t(2 * n - 2)
        ),
        "t is the one-sided one, and 5 % lie beyond either end": _paired(
            t=lambda n: _ONE_SIDED[n - 1]
        ),
        "this is the standard error: t is missing": _paired(t=lambda n: 1),
        "these are the smallest and largest difference, not an interval of the mean": _range,
        "the variance is taken for the deviation: its square root is missing": _paired(
            deviation=statistics.variance
        ),
        "half the width is given twice: give the two ends": _paired(
            ends=lambda mean, half: (mean, half, half)
        ),
        "the ends are given as distances from the mean": _paired(
            ends=lambda mean, half: (mean, -half, half)
        ),
        "the ends are exchanged: the lower comes first": _paired(
            ends=lambda mean, half: (mean, mean + half, mean - half)
        ),
        "the mean comes first, and then the ends": _paired(
            ends=lambda mean, half: (mean - half, mean, mean + half)
        ),
        "t times the standard error is the whole width here: it is half of it": _paired(
            ends=lambda mean, half: (mean, mean - half / 2, mean + half / 2)
        ),
        "the differences lose their sign": _paired(gap=lambda a, b: abs(a - b)),
        "the differences are relative to b": _paired(gap=lambda a, b: (a - b) / b),
        "the median is taken for the mean": _paired(centre=statistics.median),
        "the lists are sorted first: a seed's scores must stay together": _sorted_first,
    },
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

_GB = 1e9
_PAIRED = _paired()


def _defend(
    usable: Callable = lambda gb: 7 / 8 * gb * _CARD,
    room: Callable = lambda gb: 7 / 8 * gb * _CARD,
    best_of: Callable = lambda fitting, needs: fitting,
    quality: Callable = statistics.fmean,
    paired: Callable = _PAIRED,
    compared: Callable = lambda best, fitting, needs: [n for n in fitting if n != best],
    as_good: Callable = lambda behind, best, other: behind[1] <= 0,
    choose: Callable = lambda as_good, needs, best: min(as_good, key=needs.get),
    taken: Callable = lambda method, best: method,
    against: Callable = lambda method, best: best,
    unit: float = _GB,
    nothing: Callable = lambda needs: ("does not fit", min(needs.values())),
) -> Callable:
    """A defend_choice with its steps open to be done wrongly."""

    def defend_choice(needs, gpu_gb, scores):
        fitting = [name for name in needs if needs[name] <= usable(gpu_gb)]
        if fitting:
            best = max(best_of(fitting, needs), key=lambda name: quality(scores[name]))
            behind = {n: paired(scores[best], scores[n]) for n in compared(best, fitting, needs)}
            others = {n: (behind[n], scores[best], scores[n]) for n in behind if n != best}
            equals = [best, *(n for n, given in others.items() if as_good(*given))]
            method = choose(equals, needs, best)
            took, first = needs[taken(method, best)], against(method, best)
            if first != best:
                behind = {n: paired(scores[first], scores[n]) for n in fitting if n != first}
        else:
            (method, took), behind = nothing(needs), {}
        left = (room(gpu_gb) - took) / unit
        return {"method": method, "takes": took / unit, "left": left, "behind": behind}

    return defend_choice


def _overlap(_, best, other):
    """Whether the intervals of two means overlap."""
    ends = [_PAIRED(scores, [0.0] * len(scores)) for scores in (best, other)]
    return ends[1][2] >= ends[0][1]


def _situation(gpu_gb, seeds=3, noise=0.4, **given):
    """{method: (GB, mean score)} as the arguments of a call, with scores that rise and fall
    together, and a little apart."""

    def wave(value: Callable) -> list[float]:
        values = [value(s) for s in range(1, seeds + 1)]
        return [v - statistics.fmean(values) for v in values]

    shared = wave(lambda s: 2.0 * math.cos(3.1 * (s - 1)))
    needs, scores = {}, {}
    for i, (name, (size, score)) in enumerate(given.items()):
        needs[name] = size * _GB
        own = wave(lambda s, i=i: math.sin(7.3 * i * s + s))
        scores[name] = [score + a + noise * b for a, b in zip(shared, own, strict=True)]
    return [needs, gpu_gb, scores]


_EIGHT_BILLION = {"full": (131.0, 85.6), "lora": (19.2, 85.4), "ia3": (18.6, 80.0)}
_EIGHT_BILLION |= {"qlora": (8.6, 83.0)}
_THREE_BILLION = {"full": (52.0, 90.0), "dora": (9.9, 89.9), "lora": (9.5, 89.6)}
_THREE_BILLION |= {"qlora": (5.2, 88.9), "prompt": (9.1, 89.0)}
_NO_BETTER = {"full": (52.0, 88.8), "lora": (9.5, 89.0), "qlora": (5.2, 86.0)}
_PERPLEXITIES = {"lora": (38.0, -40.0), "qlora": (14.0, -40.3), "prefix": (37.0, -52.0)}
_SEVENTY_BILLION = {"lora": (143.0, 77.0), "qlora": (43.0, 76.0), "prompt": (141.0, 60.0)}


def _called(given, gpu_gb, seeds=3, noise=0.4, note=""):
    """The case of a situation; the note names what the dicts hold."""
    sizes = ", ".join(f"{name} {size:g} and {score:g}" for name, (size, score) in given.items())
    told = f"GB and mean score: {sizes}{note}"
    return Case(lambda: _situation(gpu_gb, seeds, noise, **given), note=told)


@check_for(
    cases=[
        *(_called(_EIGHT_BILLION, gpu_gb) for gpu_gb in (24, 160, 16, 8, 20.7, 19.5)),
        _called(_THREE_BILLION, 80),
        _called(_NO_BETTER, 80),
        _called(_PERPLEXITIES, 48, 5, 1.2, "; scores are perplexities, negated; five seeds"),
        _called(_SEVENTY_BILLION, 24),
        _called({"qlora": (43.0, 76.0)}, 80),
        _called({"lora": (19.2, 85.4), "prompt": (16.6, 50.0)}, 24),
        _called({"lora": (7 * 2**30 / _GB, 89.0), "qlora": (5.2, 86.0)}, 8, note="; 7 GiB"),
    ],
    returns="the answer",
    view=dict,
    staged=True,
    tolerance=1e-3,
    causes={
        "it does not fit: the best score is taken, whatever it takes": _defend(
            usable=lambda gb: math.inf
        ),
        "the card's GB are taken for 10⁹ bytes": _defend(
            usable=lambda gb: 7 / 8 * gb * 1e9, room=lambda gb: 7 / 8 * gb * 1e9
        ),
        "the whole card is used: an eighth stays free": _defend(
            usable=lambda gb: gb * _CARD, room=lambda gb: gb * _CARD
        ),
        "it is dominated: the cheapest that fits is taken, though another is clearly better": (
            _defend(as_good=lambda *_: True)
        ),
        "two intervals that overlap are taken for no difference: that of the differences decides": (
            _defend(as_good=_overlap)
        ),
        "the difference is within noise: the best mean is taken, though a cheaper one is as good": (
            _defend(as_good=lambda *_: False)
        ),
        "of those as good as the best the dearest is taken": _defend(
            choose=lambda equals, needs, best: max(equals, key=needs.get)
        ),
        "the scores are taken for independent samples: seeds come in pairs": _defend(
            paired=_two_samples(lambda n: student_t(2 * n - 2))
        ),
        "1.96 is taken for Student's t": _defend(paired=_paired(t=lambda n: 1.96)),
        "the standard error is taken for the interval: t is missing": _defend(
            paired=_paired(t=lambda n: 1)
        ),
        "a lower score is taken for the better one": _defend(
            quality=lambda s: -statistics.fmean(s), paired=_paired(gap=lambda a, b: b - a)
        ),
        "the best single seed decides: take the mean": _defend(quality=max),
        "the best of all is the measure, though it does not fit": _defend(
            best_of=lambda fitting, needs: needs,
            choose=lambda equals, needs, best: min(
                [n for n in equals if n != best] or equals, key=needs.get
            ),
        ),
        "`behind` has the sign turned: it is the best less the other": _defend(
            paired=_paired(gap=lambda a, b: b - a), as_good=lambda behind, *_: behind[2] >= 0
        ),
        "what takes exactly seven eighths fits": _defend(usable=lambda gb: 7 / 8 * gb * _CARD - 1),
        "the deviation of the differences is divided by n, not by n − 1": _defend(
            paired=_paired(deviation=statistics.pstdev)
        ),
        "the deviation of the differences is not divided by √n": _defend(
            paired=_paired(root=lambda n: 1)
        ),
        "`takes` is that of the best: it is that of the method chosen": _defend(
            taken=lambda method, best: best
        ),
        "`behind` is counted from the method chosen: it is the best less the other": _defend(
            against=lambda method, best: method
        ),
        "`behind` has what does not fit, too": _defend(
            compared=lambda best, fitting, needs: [n for n in needs if n != best],
            choose=lambda equals, needs, best: min(
                (n for n in equals if needs[n] <= needs[best] or n == best), key=needs.get
            ),
        ),
        "`behind` has the best itself": _defend(
            compared=lambda best, fitting, needs: fitting,
        ),
        "the unit is GiB: GB, 10⁹ bytes, are wanted": _defend(unit=2**30),
        "the unit is the byte: GB, 10⁹ bytes, are wanted": _defend(unit=1),
        "`left` is counted from the whole card: an eighth of it stays free": _defend(
            room=lambda gb: gb * _CARD
        ),
        "nothing fits, and the smallest is named all the same": _defend(
            nothing=lambda needs: min(needs.items(), key=lambda item: item[1])
        ),
        "nothing fits, and `takes` is not that of what takes least": _defend(
            nothing=lambda needs: ("does not fit", max(needs.values()))
        ),
    },
)
def defend_choice(needs, gpu_gb, scores):
    """What fits, is as good as the best that fits and takes least, with the numbers that decide."""
    usable = 7 * gpu_gb * _CARD / 8
    cheap = sorted((name for name in needs if needs[name] <= usable), key=needs.get)
    if not cheap:
        least = min(needs.values())
        left = (usable - least) / _GB
        return {"method": "does not fit", "takes": least / _GB, "left": left, "behind": {}}
    best = max(cheap, key=lambda name: math.fsum(scores[name]))
    behind = {n: _PAIRED(scores[best], scores[n]) for n in cheap if n != best}
    method = next(name for name in cheap if name == best or behind[name][1] <= 0)
    took = needs[method]
    return {
        "method": method,
        "takes": took / _GB,
        "left": (usable - took) / _GB,
        "behind": behind,
    }
