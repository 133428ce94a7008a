"""Checks of lesson 17."""

import builtins
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..methods.qlora import NF4
from ..testing.wording import kind
from .diagnosis import diagnosis
from .kit import Case, Refused, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ split_without_leaks

_ASKED = """where is my parcel|my parcel is late|the cup is broken|i want my money back
can i pay by card|my card was charged twice|cancel my order|the lamp hums
what is the size in inches|i cannot log in|change my address|the box was empty
do you ship to malta|send me the invoice|the colour is wrong|when do you open
is the sofa in stock|the zip is stuck|my code is refused|who made this bag"""
_PROMPTS = _ASKED.replace("\n", "|").split("|")
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    str,
    str.upper,
    lambda text: f"  {text}",
    lambda text: text.replace(" ", "  ", 1),
    lambda text: f"{text.title()}\n",
    lambda text: text.replace(" ", "\t"),
)


def _rows(different: int, repeated: int) -> list[dict[str, str]]:
    """Return rows with so many different prompts, of which the first ones occur in every spelling.
    The spellings of a prompt lie apart, and two rows are equal."""
    prompts = _PROMPTS[:different]
    texts = [spell(text) for spell in _SPELLINGS for text in prompts[:repeated]]
    texts[repeated:repeated] = prompts[repeated:]
    rows = [{"prompt": text, "completion": f"queue {i % 9}"} for i, text in enumerate(texts)]
    return [*rows, dict(rows[-1])]


def _key(row: dict[str, str]) -> str:
    return " ".join(row["prompt"].lower().split())


def _sides(function: Callable, rows: list, share: float, seed: int) -> tuple[list, list]:
    """Return train and test; raise Refused if the result is none of a split."""
    result = function(copy.deepcopy(rows), share, seed)
    if result is None:
        raise Refused("the result is None: is a return statement missing?")
    if not isinstance(result, list | tuple) or len(result) != 2:
        raise Refused(f"the result is {kind(result)}, expected the pair (train, test)")
    for name, side in zip(("train", "test"), result, strict=True):
        if not isinstance(side, list | tuple):
            raise Refused(f"{name} is {kind(side)}, expected a list of rows")
        for row in side:
            if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
                raise Refused(f"{name} holds {kind(row)}, expected the rows themselves")
    return result[0], result[1]


def _texts(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in rows]


def _keeps_every_row(function: Callable) -> str:
    rows = _rows(16, 4)
    wanted = Counter(_texts(rows))
    for seed in range(3):
        train, test = map(_texts, _sides(function, rows, 0.25, seed))
        got = Counter(train + test)
        if strange := got.keys() - wanted.keys():
            raise Refused(
                f"no row has the prompt {min(strange)[0]!r} and this completion",
                "Return the rows as they are, each in its own spelling.",
            )
        if lost := wanted - got:
            raise Refused(
                f"{lost.total()} of {len(rows)} rows are missing from both train and test",
                f"One of them has the prompt {min(lost)[0]!r}.",
                "Rows whose prompts are equal stay, all of them on the same side.",
            )
        if more := got - wanted:
            raise Refused(
                f"train and test together have {got.total()} rows, expected {len(rows)}",
                f"There once too often: the row with the prompt {min(more)[0]!r}.",
            )
        for name, side in ("train", train), ("test", test):
            following = iter(_texts(rows))
            if not all(row in following for row in side):
                raise Refused(f"the rows of {name} are in another order than in `rows`")
    return "every row is in train or in test, in order"


def _difference(a: str, b: str) -> str:
    if a == b:
        return ""
    if a.lower() == b.lower():
        return "case"
    return "white space" if a.split() == b.split() else "case and white space"


def _keeps_prompts_apart(function: Callable) -> str:
    rows, leaks = _rows(16, 4), []
    for seed in range(5):
        train, test = _sides(function, rows, 0.25, seed)
        leaks += [
            (_difference(a["prompt"], b["prompt"]), a["prompt"], b["prompt"])
            for a in train
            for b in test
            if _key(a) == _key(b)
        ]
    if leaks:
        differ, a, b = min(leaks, key=lambda leak: (len(leak[0]), leak))
        headline = "the same prompt is in train and in test"
        if differ:
            headline = f"a prompt in train and one in test differ in {differ} alone"
        raise Refused(headline, f"In train: {a!r}. In test: {b!r}.")
    return "no prompt is on both sides"


def _shares(function: Callable) -> str:
    for different, repeated, share, due in (16, 4, 0.25, 4), (20, 0, 0.3, 6), (12, 2, 0.02, 1):
        rows = _rows(different, repeated)
        sides = [_sides(function, rows, share, seed) for seed in range(6)]
        inside = [[len({*map(_key, side)}) for side in pair] for pair in sides]
        counts = [test for _, test in inside]
        # A share that is no whole number of prompts may be rounded up or down.
        wrong = [n for n in counts if not max(1, int(share * different)) <= n <= due]
        if not wrong:
            continue
        called = f"Called with {different} different prompts in {len(rows)} rows, share={share}."
        if not any(counts):
            raise Refused("test is empty: it has at least one prompt", called)
        if all(train == due for train, _ in inside):
            raise Refused("train and test are exchanged: return (train, test)", called)
        told = ", ".join(map(str, counts))
        raise Refused(
            f"test has {wrong[0]} of {different} different prompts, expected {due}",
            called,
            f"With the seeds 0 to 5, test has {told} different prompts.",
        )
    return "test has its share of the different prompts, at least one"


@contextmanager
def _another_start() -> Iterator[None]:
    """Let hash() return what it would return after another start of Python."""
    unsalted = builtins.hash
    builtins.hash = lambda value: unsalted(("salt", value))
    try:
        yield
    finally:
        builtins.hash = unsalted


def _can_be_repeated(function: Callable) -> str:
    rows = _rows(16, 4)
    splits = [_sides(function, rows, 0.25, seed) for seed in range(6)]
    if any(_sides(function, rows, 0.25, seed) != splits[seed] for seed in range(6)):
        raise Refused("the same rows, share and seed give another split the second time")
    with _another_start():
        if any(_sides(function, rows, 0.25, seed) != splits[seed] for seed in range(6)):
            raise Refused(
                "the split changes with every start of Python",
                "hash() of a text is salted anew at each start.",
            )
    if all(split == splits[0] for split in splits):
        raise Refused("the seeds 0 to 5 give the same split", "Another seed draws other prompts.")
    given = copy.deepcopy(rows)
    function(given, 0.25, 0)
    if given != rows:
        raise Refused(
            "The idea is right. Still missing: unchanged arguments",
            "Here, the argument rows was changed: leave it as it was.",
        )
    return "in this kernel a seed gives the same split again, and other seeds give others"


@check_for(
    trials=dict.fromkeys(
        (_keeps_every_row, _keeps_prompts_apart, _shares, _can_be_repeated), "your function"
    ),
    causes=mistakes(
        """
        def split_without_leaks(rows, share, seed):
            keys = [" ".join(row["prompt"].casefold().split()) for row in rows]
            different = list(dict.fromkeys(keys))
            random.Random(seed).shuffle(different)
            held = different[: max(1, round(share * len(different)))]
            sides = [], []
            for row, key in zip(rows, keys):
                sides[key in held].append(row)
            return sides
        """,
        random=random,
    ),
)
def split_without_leaks(rows, share, seed):
    """What is in test has not been learned in another spelling."""


# ------------------------------------------------------------------ surviving_share

_EVEN = torch.linspace(-1, 1, 15)
_UNEVEN = torch.tensor([-0.9, -0.4, -0.05, 0.2, 0.8])
_INT8 = torch.arange(-127, 128) / 127


def _changed(shape, levels, block, size, grid=None) -> list[Any]:
    """Return the arguments of a call: a weight, on the grid of these levels or on none, and a
    change of a relative size. No number to round is close to the middle between two levels, and the
    share is not so close to 0 that only its rounding errors are left."""
    middles = (levels[1:] + levels[:-1]).double() / 2

    def is_clear(x: torch.Tensor) -> bool:
        blocks = x.double().view(-1, block)
        ratios = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
        return bool((ratios[:, None] - middles).abs().min() > 1e-6)

    while True:
        weight = torch.randn(shape)
        if grid is not None:
            blocks = weight.view(-1, block)
            absmax = blocks.abs().amax(1, keepdim=True)
            weight = grid[(blocks / absmax)[..., None].sub(grid).abs().argmin(-1)] * absmax
            weight = weight.view(shape)
        delta = size * torch.randn(shape)
        call = [weight, delta, levels.clone(), block]
        if not (is_clear(weight) and is_clear(weight + delta)):
            continue
        if grid is None or abs(surviving_share.reference(*call)) > 0.005:
            return call


def _shown_call(note, weight, delta, levels, block):
    shape = tuple(weight.shape)
    return f"weight and delta {shape}, {len(levels)} levels, block={block} ({note})"


@check_for(
    cases=[
        Case(lambda: _changed((24, 20), NF4, 32, 0.05), note="W is on no grid"),
        Case(lambda: _changed((24, 20), NF4, 32, 0.01, NF4), note="W is on the grid"),
        Case(lambda: _changed((24, 20), NF4, 32, 0.5, NF4), note="a large change of W on the grid"),
        Case(lambda: _changed((24, 20), _EVEN, 16, 0.02, NF4), note="W is on another grid"),
        Case(lambda: _changed((6, 50), _UNEVEN, 10, 0.3), note="uneven levels, the largest 0.8"),
        Case(lambda: _changed((6, 50), _INT8, 300, 0.01), note="one block"),
        Case(lambda: _changed((40,), NF4, 8, 0.03), note="a single row"),
        Case(
            lambda: [
                torch.tensor([1.0, 0.45, 0.3, -0.2]),
                torch.tensor([0.0, 0.1, 0.0, 0.0]),
                torch.tensor([-1.0, 0.0, 1.0]),
                4,
            ],
            note="the levels −1, 0, 1; the change takes 0.45 to 0.55",
        ),
    ],
    returns="the share",
    describe=_shown_call,
    # A sum of many small differences: but one weight on another level is a larger error.
    tolerance=1e-3,
    causes=mistakes(
        """
        def surviving_share(weight, delta, levels, block):
            def rounded(x):
                blocks = x.reshape(-1, block)
                absmax = blocks.abs().amax(1, keepdim=True)
                codes = (blocks / absmax)[..., None].sub(levels).abs().argmin(-1)
                return (levels[codes] * absmax).reshape(x.shape)

            after = rounded(weight + delta)
            kept = after - rounded(weight)
            return ((kept * delta).sum() / (delta * delta).sum()).item()
        """,
        """
        the change itself is rounded: round W and W + Δ, which lie on a grid of W's size
            kept = after - rounded(weight) → kept = rounded(delta)
        the change itself is rounded, with the absmax of W: round W and W + Δ
            kept = after - rounded(weight) → kept = rounded(delta)
            blocks.abs() → weight.reshape(-1, block).abs()
        the change is added to the rounded W: round W + Δ
            rounded(weight + delta) → rounded(rounded(weight) + delta)
        W is subtracted unrounded: with no change at all, its rounding error would count
            - rounded(weight) → - weight
        the rounded change is compared with W + Δ, not with Δ
            (kept * delta).sum() → (kept * (weight + delta)).sum()
        this is the ratio of two lengths: what rounding adds at random counts, too
            (kept * delta).sum() / (delta * delta).sum() → kept.norm() / delta.norm()
        this is the ratio of two squared lengths: what rounding adds at random counts, too
            (kept * delta).sum() → (kept * kept).sum()
        this is the cosine, a direction without a size: divide by ⟨Δ, Δ⟩
            (delta * delta).sum() → (kept.norm() * delta.norm())
        this divides by ⟨k, k⟩, the rounded change: divide by ⟨Δ, Δ⟩
            (delta * delta).sum() → (kept * kept).sum()
        this divides by ‖Δ‖: divide by its square
            (delta * delta).sum() → delta.norm()
        this divides by ⟨W, W⟩: divide by ⟨Δ, Δ⟩
            (delta * delta).sum() → (weight * weight).sum()
        the division by ⟨Δ, Δ⟩ is missing
            / (delta * delta).sum() → ∅
        the signs are lost: a weight that moves against its change takes away from the share
            (kept * delta).sum() → (kept * delta).abs().sum()
        each weight has its own ratio, and their mean is taken: small changes count as much as large
        ones
            (kept * delta).sum() / (delta * delta).sum() → (kept / delta).mean()
        this is the share of weights that change: ask how far they move, and in which direction
            (kept * delta).sum() / (delta * delta).sum() → (kept != 0).float().mean()
        each block has its own share, and their mean is taken
            (kept * delta).sum() → (kept * delta).view(-1, block).sum(1)
            (delta * delta).sum()) → (delta * delta).view(-1, block).sum(1)).mean()
        `@` multiplies each row of one with each row of the other: multiply entry by entry
            (kept * delta).sum() / (delta * delta).sum() →
                (kept @ delta.T).sum() / (delta @ delta.T).sum()
        this is one minus a relative error: what rounding adds at random counts, too
            (kept * delta).sum() / (delta * delta).sum() → 1 - (kept - delta).norm() / delta.norm()
        this is one minus a squared relative error: what rounding adds at random counts, too
            (kept * delta).sum() / (delta * delta).sum() →
                1 - (kept - delta).square().sum() / delta.square().sum()
        the absmax of W is kept for W + Δ: each of the two has its own
            blocks.abs() → weight.reshape(-1, block).abs()
        the blocks run down the columns: a block is `block` consecutive numbers of a row, and then
        of the next
            x.reshape(-1, block) → x.T.reshape(-1, block)
            .reshape(x.shape) → .reshape(x.T.shape).T
        the whole matrix has one absmax: each block has its own
            blocks.abs().amax(1, keepdim=True) → blocks.abs().max()
        each row has one absmax: each block has its own
            x.reshape(-1, block) → x
            amax(1, → amax(-1,
        the absmax is the largest number, not the largest absolute value
            blocks.abs().amax → blocks.amax
        the levels are not multiplied by the absmax again
            (levels[codes] * absmax) → levels[codes]
        each number gets the first level above it: take the nearest one
            (blocks / absmax)[..., None].sub(levels).abs().argmin(-1) →
                torch.bucketize(blocks / absmax, levels).clamp(max=len(levels) - 1)
        each number gets the last level below it: take the nearest one
            (blocks / absmax)[..., None].sub(levels).abs().argmin(-1) →
                (torch.bucketize(blocks / absmax, levels, right=True) - 1).clamp(min=0)
        the levels are taken as evenly spaced: look for the nearest one in `levels`
            (levels[codes] * absmax) → ((blocks / absmax * half).round() / half * absmax)
            codes = → half = (len(levels) - 1) // 2; codes =
        the absmax keeps the sign of its number: it is an absolute value
            absmax = blocks.abs().amax(1, keepdim=True) →
                absmax = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        the block's largest number gets the largest level: divide by the absmax alone
            amax(1, keepdim=True) → amax(1, keepdim=True) / levels.abs().max()
        this is the share that is lost: return the one that survives
            return ((kept → return 1 - ((kept
        """,
    ),
)
def surviving_share(weight, delta, levels, block):
    """A change survives rounding as far as W does not lie on the grid already."""
    blocks = [t.double().flatten().split(block) for t in (weight, weight + delta, delta)]
    steps, along, norm = levels.double().tolist(), 0.0, 0.0
    for *both, change in zip(*blocks, strict=True):
        rounded = []
        for x in both:
            largest = x.abs().max().item()
            ratios = (x / largest).tolist()
            rounded.append([largest * min(steps, key=lambda s: abs(s - r)) for r in ratios])
        for before, after, d in zip(*rounded, change.tolist(), strict=True):
            along += (after - before) * d
            norm += d * d
    return along / norm


# ------------------------------------------------------------------ lora_to_gguf

_A_MOVED = "lora_a is moved too: its rows are the directions of the rank, which belong to no head"
_ALL_HEADS = "k is cut into as many heads as q: it has kv_heads of them"
_V_MOVED = "v is moved too: only q and k are turned by rotary positions"


def _adapter(heads, kv_heads, size, modules, layers=1, rank=8, same_a=False, **form) -> list[Any]:
    """Return the arguments of a call. The whole part of a number is that of its row. With `same_a`
    all rows of a lora_a are equal, so that nobody sees whether they are moved."""
    rows = {"attn_q": heads * size, "attn_k": kv_heads * size, "attn_v": kv_heads * size}
    tensors = {}
    for layer in range(layers):
        for module in modules:
            name, out = f"blk.{layer}.{module}.weight", rows.get(module, 3 * size)
            for which, count, width in (("a", rank, heads * size), ("b", out, rank)):
                start = torch.zeros(count) if same_a and which == "a" else torch.arange(count)
                fraction = torch.rand(width) / 2
                tensors[f"{name}.lora_{which}"] = (start[:, None] + fraction).to(**form)
    return [tensors, heads, kv_heads]


def _called(note, tensors, heads, kv_heads):
    modules = list(dict.fromkeys(name.split(".")[2] for name in tensors))
    where = modules[0] if len(modules) == 1 else f"{len(modules)} modules"
    rank = len(tensors[f"blk.0.{modules[0]}.weight.lora_a"])
    told = "the whole part of a number says in which row it was"
    return f"an adapter of rank {rank} on {where}, heads={heads}, kv_heads={kv_heads} ({told})"


_LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@check_for(
    cases=[
        Case(lambda: _adapter(2, 2, 12, ["attn_q"]), bug=_A_MOVED),
        Case(lambda: _adapter(4, 2, 4, ["attn_k"], same_a=True), bug=_ALL_HEADS),
        Case(lambda: _adapter(4, 4, 6, ["attn_v"], same_a=True), bug=_V_MOVED),
        Case(lambda: _adapter(4, 2, 6, _LLAMA, layers=2)),
        Case(lambda: _adapter(9, 3, 8, _LLAMA, rank=3, dtype=torch.float16)),
    ],
    describe=_called,
    returns="tensors",
    causes=mistakes(
        """
        def lora_to_gguf(tensors, heads, kv_heads):
            moved = dict(tensors)
            for name, rows in tensors.items():
                n = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[2])
                if n and name.endswith(".lora_b"):
                    halves = rows.reshape(n, 2, -1, rows.shape[1])
                    moved[name] = halves.transpose(1, 2).reshape(rows.shape)
            return moved
        """
    ),
)
def lora_to_gguf(tensors, heads, kv_heads):
    """Rows are side by side in the lora_b of q and k alone, in as many heads as each has."""
    moved = {}
    for name, tensor in tensors.items():
        module, which = name.split(".")[2], name[-1]
        order = list(range(len(tensor)))
        if which == "b" and module in ("attn_q", "attn_k"):
            size = len(tensor) // (heads if module == "attn_q" else kv_heads)
            order = [
                first + i + half * size // 2
                for first in range(0, len(tensor), size)
                for i in range(size // 2)
                for half in range(2)
            ]
        moved[name] = tensor[order]
    return moved


# ------------------------------------------------------------------ defend_release

# Of each file in data/results/release_files.csv: what rules it out, and what says so.
_FILES = {
    "A": ("size", "no perplexity is lower, and it is larger than the limit"),
    "B": (
        "right answers",
        "its perplexity is close to the trainer's, and hardly an answer is right: prose does not "
        "show what was trained",
    ),
    "C": (
        "log-probabilities",
        "no file has more right answers, and its log-probabilities are off by several times as "
        "much as those of D, which is as large",
    ),
    "D": (
        "ships",
        "it is small enough, zero lies within its interval, and its log-probabilities are off by "
        "about as much as those of A, which is larger",
    ),
    "E": (
        "token ids",
        "in all other numbers it is like D, and some of its prompts arrive in other tokens",
    ),
}


@check_for(**diagnosis(_FILES, what="file", others=("perplexity",)))
def defend_release():
    """One file ships, and one number rules out each other one:"""
