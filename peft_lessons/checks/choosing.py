"""Checks of lesson 13."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from ..costs.estimate import GB, Memory, Shape, components, training_memory
from ..costs.recommend import CANDIDATES, usable_bytes
from ..studies import student_t
from .compare import difference, few
from .kit import Case, Refused, check_for, dict_of, first_of
from .mistakes import mistakes

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


# ------------------------------------------------------------------ seeds_needed

_STUDY = [[87.13, 87.24, 87.59], [86.38, 86.90, 86.44]]  # full fine-tuning and LoRA on sentiment
_NOISY = [[61.0, 60.0, 66.0, 64.5], [60.8, 60.9, 65.2, 65.1]]


@check_for(
    cases=[
        # The first case tells the causes apart, and none of them returns None in it.
        Case(lambda: [*_STUDY, 0.9, 200], note="a is full fine-tuning, b LoRA"),
        Case(lambda: [*_STUDY, 1.5, 50]),
        Case(lambda: [*_STUDY, 1.0, 50]),
        Case(lambda: [*_STUDY, 0.5, 50], note="the mean is above the margin"),
        Case(lambda: [*_STUDY[::-1], 0.9, 50], note="a is LoRA, b full fine-tuning"),
        Case(lambda: [*_NOISY, 1.0, 30], note="a and b rise and fall together"),
        Case(lambda: [*_NOISY, 0.3, 15], note="15 seeds are too few"),
        Case(lambda: [*_NOISY, 0.6, 7], note="the limit itself is allowed"),
        Case(lambda: [[3.0, 7.5], [2.9, 6.0], 2.0, 60], note="a pilot of two seeds"),
        Case(lambda: [[-39.1, -40.2, -38.0], [-39.3, -39.8, -38.9], 1.5, 40]),
    ],
    causes=mistakes(
        """
        def seeds_needed(pilot_a, pilot_b, margin, most):
            gaps = [a - b for a, b in zip(pilot_a, pilot_b)]
            mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
            for n in range(2, most + 1):
                half = student_t(n - 1) * spread / math.sqrt(n)
                if mean + half < margin:
                    return n
            return None
        """,
        """
        1.96 holds for many seeds: with few, Student's t is larger
            student_t(n - 1) → 1.96
        two, the rule of thumb, holds for many seeds: with few, Student's t is larger
            student_t(n - 1) → 2
        t is that of the pilot: with more seeds it falls
            student_t(n - 1) → student_t(len(gaps) - 1)
        n differences have n − 1 degrees of freedom, not n
            student_t(n - 1) → student_t(n)
        the squares are divided by the pilot's number of seeds, not by one less (statistics.stdev)
            stdev → pstdev
        the spread is the variance: take its root (statistics.stdev)
            stdev → variance
        the spreads of the two lists are combined: take the spread of the pairs' differences
            statistics.stdev(gaps) →
                math.hypot(statistics.stdev(pilot_a), statistics.stdev(pilot_b))
        the lists are sorted, and the pairs are lost
            zip(pilot_a, pilot_b) → zip(sorted(pilot_a), sorted(pilot_b))
        the spread is divided by n: divide it by √n
            math.sqrt(n) → n
        the spread is divided by √(n − 1): divide it by √n
            math.sqrt(n) → math.sqrt(n - 1)
        the mean is left out: the upper end is the mean and half the interval's width
            mean + half → half
        the mean has lost its sign: where a is behind b, fewer seeds are enough
            mean + half → abs(mean) + half
        the sign is reversed: subtract b from a
            a - b → b - a
        the lower end is compared with the margin: the upper end decides
            mean + half → mean - half
        the lower end is compared with 0, as if a had to be ahead: compare the upper end with the
        margin
            mean + half < margin → mean - half > 0
        the mean alone is compared with the margin: the upper end decides
            mean + half → mean
        this is the number of seeds to add to the pilot: return the number in all
            return n → return n - len(gaps)
        the last number of seeds is left out: `most` seeds are allowed
            most + 1 → most
        `most` is returned where even that many are too few: return None
            return None → return most
        this is the first number that is too few: return the next one
            return n → return n - 1
        this is one more than needed
            return n → return n + 1
        """,
        statistics=statistics,
        student_t=student_t,
    ),
)
def seeds_needed(pilot_a, pilot_b, margin, most):
    """It is the smallest study whose interval would end below the margin."""
    n = len(pilot_a)
    mean = math.fsum([*pilot_a, *(-b for b in pilot_b)]) / n
    squares = math.fsum((a - b - mean) ** 2 for a, b in zip(pilot_a, pilot_b, strict=True))
    room = margin - mean
    enough = [
        k
        for k in range(2, most + 1)
        if room > 0 and student_t(k - 1) ** 2 * squares / (n - 1) < k * room**2
    ]
    return min(enough, default=None)


# ------------------------------------------------------------------ my_page

_ENTRIES = {
    "model": "Llama-3-8B",
    "gpu": 24,
    "tokens": 4096,
    "method": "LoRA",
    "levers": ["checkpointing", "chunked loss"],
    "largest": "base",
    "learning rate": 2e-4,
    "rival": "DoRA",
    "margin": 1.0,
    "spread": 0.5,
    "seeds": 5,
}
_LEVERS = ("checkpointing", "chunked loss")
_PARTS = ("base", "trainable", "blocks", "logits")
_START = {"full fine-tuning": 2e-5} | dict.fromkeys(("LoRA", "QLoRA", "DoRA", "AdaLoRA"), 2e-4)


def _read(function: Callable) -> dict[str, Any]:
    """Return the page, its entries of the right kind; Refused if they are not."""
    page = {str(key): value for key, value in dict_of(function).items()}
    if missing := [key for key in _ENTRIES if key not in page]:
        raise Refused(f"the page lacks {few(missing)}")
    for key in ("gpu", "tokens", "learning rate", "margin", "spread", "seeds"):
        value = page[key]
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise Refused(f"{key!r} is {value!r}, expected a number above 0")
    for key in ("method", "rival"):
        if page[key] not in list(CANDIDATES):
            raise Refused(f"{key!r} is {page[key]!r}", f"The methods are: {', '.join(CANDIDATES)}.")
    levers = page["levers"]
    if isinstance(levers, Mapping):
        raise Refused("'levers' is a dict, expected a list: name those that are on")
    listed = isinstance(levers, Iterable) and not isinstance(levers, str)
    page["levers"] = list(levers) if listed else [levers] if levers else []
    if unknown := [lever for lever in page["levers"] if lever not in _LEVERS]:
        raise Refused(f"there is no lever {few(unknown)}", f"The levers are: {', '.join(_LEVERS)}.")
    if page["largest"] not in _PARTS:
        known = f"The components are: {', '.join(_PARTS)}."
        raise Refused(f"'largest' is {page['largest']!r}", known)
    for key in ("tokens", "seeds"):
        if page[key] != int(page[key]):
            raise Refused(f"{key!r} is {page[key]!r}, expected a whole number")
        page[key] = int(page[key])
    if page["seeds"] < 2:
        raise Refused("'seeds' is 1: one difference has no spread, and so no interval")
    for key in ("model", "rival model"):
        page.setdefault(key, page["model"])
        try:
            Shape.of(page[key])
        except ValueError as error:
            raise Refused(str(error), "A configuration serves, too.") from None
    return page


def _settings(page: Mapping, method: str) -> dict[str, Any]:
    """Return a candidate's training on a page, as arguments of an estimate."""
    one, levers = CANDIDATES[method], page["levers"]
    return {
        "model": page["model"],
        "method": one.method,
        "context": page["tokens"],
        "checkpointing": one.checkpointing and "checkpointing" in levers,
        "chunked": "chunked loss" in levers,
    }


def _memory(page: Mapping, method: str) -> Memory:
    return training_memory(**_settings(page, method))


def _fits(page: Mapping, method: str) -> bool:
    return _memory(page, method).total <= usable_bytes(page["gpu"])


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def _it_fits(page: Mapping) -> str:
    need, usable = _memory(page, page["method"]).total, usable_bytes(page["gpu"])
    told = f"{page['method']} needs {_gb(need)}, and {_gb(usable)} are usable"
    if need > usable:
        raise Refused(f"it does not fit: {told}", "Print training_memory(...): what is large?")
    return told


def _lora_comes_first(page: Mapping) -> str:
    lean = page | {"levers": _LEVERS}
    if not _fits(lean, "LoRA"):
        return "LoRA does not fit, not even with both levers"
    if page["method"] == "QLoRA":
        need = _gb(_memory(lean, "LoRA").total)
        raise Refused(
            f"with both levers LoRA would fit as well, in {need}",
            "The levers leave the result as it is, and QLoRA rounds the base.",
        )
    if "LoRA" not in (page["method"], page["rival"]):
        raise Refused("LoRA would fit, and is neither your method nor its rival")
    return f"LoRA would fit, and is your {'method' if page['method'] == 'LoRA' else 'rival'}"


def _it_is_the_largest(page: Mapping) -> str:
    parts, told = components(**_settings(page, page["method"])), page["largest"]
    if parts[told] < 0.95 * max(parts.values()):
        sizes = f"It takes {_gb(parts[told])}, another one {_gb(max(parts.values()))}."
        raise Refused(f"{told!r} is not the largest component with these levers", sizes)
    return f"the largest component is {told!r}, {_gb(parts[told])}"


def _the_rate_is_a_start(page: Mapping) -> str:
    start, rate = _START.get(page["method"]), page["learning rate"]
    if start and not 1 / 5.5 < rate / start < 5.5:
        raise Refused(
            f"a learning rate of {rate:g} is no start for {page['method']}",
            f"Section 3 has {start:g} for fine-tuning on given texts; a factor of 5 is a search.",
        )
    return f"a learning rate of {rate:g} is a start"


def _it_can_decide(page: Mapping) -> str:
    rival, n = page["rival"], page["seeds"]
    theirs = page | {"model": page["rival model"]}
    if rival == page["method"] and theirs["model"] == page["model"]:
        raise Refused("the rival is your method itself")
    if not _fits(theirs, rival):
        need = _gb(_memory(theirs, rival).total)
        raise Refused(
            f"nobody can run the comparison: {rival} needs {need} and does not fit",
            "If no other method fits, let a smaller model be the 'rival model'.",
        )
    half = student_t(n - 1) * page["spread"] / math.sqrt(n)
    if half >= page["margin"]:
        raise Refused(
            f"with {n} seeds the interval reaches {half:.2f} points to either side",
            f"If the two are equally good, it still holds your margin of {page['margin']:g}, and "
            "decides nothing. Take more seeds or another margin.",
        )
    return f"{n} seeds reach {half:.2f} points to either side, less than your margin"


_RULES = (_it_fits, _lora_comes_first, _it_is_the_largest, _the_rate_is_a_start, _it_can_decide)


def _kept(function: Callable) -> Iterator[str]:
    """Yield what is right of a page; raise Refused at the first rule that it breaks."""
    page = _read(function)
    for rule in _RULES:
        yield rule(page)


def _holds_together(function: Callable) -> str:
    return "; ".join(_kept(function))


def _share_kept(function: Callable) -> float:
    kept = 0
    with suppress(Exception):
        page = _read(function)
        for rule in _RULES:
            with suppress(Refused):
                kept += bool(rule(page))
    return kept / len(_RULES)


@check_for(
    trials={_holds_together: "your page"},
    share=_share_kept,
    causes=mistakes(f"""
        def my_page():
            return {_ENTRIES | dict(server="vLLM")!r}
        """),
    verified=lambda facts: f"{facts[0]}.",
)
def my_page():
    """The page does not contradict itself:"""


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
    """Speak of the intervals where the values of `behind` are wrong."""
    behind = got.get("behind") if isinstance(got, dict) else None

    def off(values: bool) -> str | None:
        return difference(behind, expected["behind"], "", _TOLERANCE, values, form="any")

    if off(values=False) or not off(values=True):
        return None
    return "Is each interval (mean, lower end, upper end) of best − method, by section 4's formula?"


def _interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Return the mean of a − b and the ends of its 95 % interval."""
    n = len(a)
    mean = math.fsum([*a, *(-score for score in b)]) / n
    squares = math.fsum((x - y - mean) ** 2 for x, y in zip(a, b, strict=True))
    half = student_t(n - 1) * math.sqrt(squares / (n * (n - 1)))
    return mean, mean - half, mean + half


@check_for(
    form="any",
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
    view=first_of("behind", "method", "left"),  # the intervals decide the rest
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
        the interval in `behind` uses 1.96: with few seeds Student's t is larger
            student_t(len(d) - 1) → 1.96
        the interval in `behind` uses 2: with few seeds Student's t is larger
            student_t(len(d) - 1) → 2
        the interval in `behind` is not paired: take the spread of the differences
            statistics.stdev(d) → math.hypot(statistics.stdev(a), statistics.stdev(b))
        the interval in `behind` takes two independent samples: the scores come in pairs
            student_t(len(d) - 1) → student_t(2 * len(d) - 2)
            statistics.stdev(d) → math.hypot(statistics.stdev(a), statistics.stdev(b))
        the interval in `behind` lacks the division by √n
            / math.sqrt(len(d)) → ∅
        the interval in `behind` lacks Student's t
            student_t(len(d) - 1) * → ∅
        the interval in `behind` divides the squares by n, not by n − 1
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
    behind = {n: _interval(scores[best], scores[n]) for n in cheap if n != best}
    method = next(name for name in cheap if name == best or behind[name][2] <= 1)
    return {"behind": behind, "method": method, "left": usable - needs[method]}
