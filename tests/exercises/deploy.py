"""Answers to the exercises of lesson 17."""

import hashlib
import random
import re

import torch

from peft_lessons.methods.qlora import NF4

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ split_without_leaks


def normal(row):
    return re.sub(r"\s+", " ", row["prompt"].strip()).lower()


def divided(rows, held, key=normal):
    return [r for r in rows if key(r) not in held], [r for r in rows if key(r) in held]


def drawn(keys, share, seed):
    return random.Random(seed).sample(sorted(keys), max(1, round(share * len(keys))))


@right("split_without_leaks")
def by_torch(rows, share, seed):
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault("".join(row["prompt"].lower().split()), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator).tolist()
    members = list(groups.values())
    count = max(1, int(share * len(members) + 0.5))
    test = {i for k in order[:count] for i in members[k]}
    train = tuple(dict(row) for i, row in enumerate(rows) if i not in test)
    return [train, [rows[i] for i in sorted(test)]]


@right("split_without_leaks")
def by_digest(rows, share, seed):
    def digest(key):
        return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()

    keys = sorted({normal(row) for row in rows}, key=digest)
    return divided(rows, keys[: max(1, int(share * len(keys)))])


@right("split_without_leaks")
def by_the_global_generator(rows, share, seed):
    random.seed(seed)
    keys = list(dict.fromkeys(map(normal, rows)))
    random.shuffle(keys)
    return divided(rows, keys[: -int(-share * len(keys) // 1)])


@wrong("split_without_leaks", "the same prompt is in train and in test")
def by_rows(rows, share, seed):
    test = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    sides = [], []
    for i, row in enumerate(rows):
        sides[i in test].append(row)
    return sides


@wrong("split_without_leaks", "differ in case alone")
def exact_duplicates(rows, share, seed):
    def key(row):
        return row["prompt"]

    return divided(rows, drawn({*map(key, rows)}, share, seed), key)


@wrong("split_without_leaks", "differ in white space alone")
def without_inner_blanks(rows, share, seed):
    def key(row):
        return row["prompt"].strip().lower()

    return divided(rows, drawn({*map(key, rows)}, share, seed), key)


@wrong("split_without_leaks", "differ in case alone")
def without_case(rows, share, seed):
    def key(row):
        return " ".join(row["prompt"].split())

    return divided(rows, drawn({*map(key, rows)}, share, seed), key)


@wrong("split_without_leaks", "the same prompt is in train and in test")
def with_the_completion(rows, share, seed):
    def key(row):
        return normal(row), row["completion"]

    return divided(rows, drawn({*map(key, rows)}, share, seed), key)


@wrong("split_without_leaks", "rows are missing from both train and test")
def without_duplicates(rows, share, seed):
    first = {normal(row): row for row in reversed(rows)}
    return divided([row for row in rows if first[normal(row)] is row], drawn(first, share, seed))


@wrong("split_without_leaks", "There once too often")
def test_is_learned_too(rows, share, seed):
    return rows, divided(rows, drawn({*map(normal, rows)}, share, seed))[1]


@wrong("split_without_leaks", "the rows of train are in another order")
def in_groups(rows, share, seed):
    groups = {}
    for row in rows:
        groups.setdefault(normal(row), []).append(row)
    held = drawn(groups, share, seed)
    test = [row for key in sorted(held) for row in groups[key]]
    return [row for key in groups if key not in held for row in groups[key]], test


@wrong("split_without_leaks", "test has 5 of 16 different prompts, expected 4")
def one_too_many(rows, share, seed):
    keys = sorted({normal(row) for row in rows})
    return divided(rows, random.Random(seed).sample(keys, int(share * len(keys)) + 1))


@wrong("split_without_leaks", "With the seeds 0 to 5, test has")
def by_share_of_rows(rows, share, seed):
    keys = sorted({normal(row) for row in rows})
    random.Random(seed).shuffle(keys)
    held = []
    while sum(normal(row) in held for row in rows) < share * len(rows):
        held.append(keys.pop())
    return divided(rows, held)


@wrong("split_without_leaks", "With the seeds 0 to 5, test has")
def a_coin_for_each_prompt(rows, share, seed):
    generator = random.Random(seed)
    keys = sorted({normal(row) for row in rows})
    return divided(rows, [key for key in keys if generator.random() < share])


@wrong("split_without_leaks", "test is empty: it has at least one prompt")
def empty_test(rows, share, seed):
    keys = sorted({normal(row) for row in rows})
    return divided(rows, random.Random(seed).sample(keys, round(share * len(keys))))


@wrong("split_without_leaks", "train and test are exchanged")
def test_first(rows, share, seed):
    return divided(rows, drawn({*map(normal, rows)}, share, seed))[::-1]


@wrong("split_without_leaks", "give another split the second time")
def without_a_seed(rows, share, seed):
    keys = sorted({normal(row) for row in rows})
    return divided(rows, random.sample(keys, max(1, round(share * len(keys)))))


@wrong("split_without_leaks", "the split changes with every start of Python")
def by_hash(rows, share, seed):
    keys = sorted({normal(row) for row in rows}, key=lambda key: hash((seed, key)))
    return divided(rows, keys[: max(1, round(share * len(keys)))])


@wrong("split_without_leaks", "the seeds 0 to 5 give the same split")
def always_42(rows, share, seed):
    return divided(rows, drawn({*map(normal, rows)}, share, 42))


@wrong("split_without_leaks", "Still missing: unchanged arguments")
def in_place(rows, share, seed):
    train, test = divided(rows, drawn({*map(normal, rows)}, share, seed))
    result = list(train), list(test)
    rows.clear()
    return result


@wrong("split_without_leaks", "train holds the int 1, expected the rows themselves")
def places(rows, share, seed):
    held = drawn({*map(normal, rows)}, share, seed)
    sides = [], []
    for i, row in enumerate(rows):
        sides[normal(row) in held].append(i)
    return sides


@wrong("split_without_leaks", "expected the pair (train, test)")
def test_alone(rows, share, seed):
    return divided(rows, drawn({*map(normal, rows)}, share, seed))[1]


@wrong("split_without_leaks", "train is a filter, expected a list of rows")
def lazily(rows, share, seed):
    held = drawn({*map(normal, rows)}, share, seed)
    return [filter(lambda row: (normal(row) in held) == side, rows) for side in (False, True)]


@wrong("split_without_leaks", "Return the rows as they are")
def spelled_alike(rows, share, seed):
    rows = [row | {"prompt": normal(row)} for row in rows]
    return divided(rows, drawn({*map(normal, rows)}, share, seed))


@wrong("split_without_leaks", "Still missing: unchanged arguments")
def with_a_key(rows, share, seed):
    for row in rows:
        row["key"] = normal(row)
    return divided(rows, drawn({row["key"] for row in rows}, share, seed))


# ------------------------------------------------------------------ surviving_share


@right("surviving_share")
def block_after_block(weight, delta, levels, block):
    old, new = weight.flatten(), (weight + delta).flatten()
    moved = []
    for start in range(0, len(old), block):
        ends = []
        for part in old[start : start + block], new[start : start + block]:
            top = part.abs().max()
            ends.append(levels[(part[:, None] - top * levels).abs().argmin(1)] * top)
        moved.append(ends[1] - ends[0])
    return torch.cat(moved) @ delta.flatten() / delta.norm() ** 2


@right("surviving_share")
def in_double_precision(weight, delta, levels, block):
    def q(x):
        x = x.double().reshape(-1, block)
        top = x.abs().max(1).values[:, None]
        return (
            levels.double()[torch.cdist((x / top).reshape(-1, 1), steps).argmin(1)]
            .view(x.shape)
            .mul(top)
        )

    steps = levels.double()[:, None]
    change = delta.double().reshape(-1, block)
    share = torch.einsum("bi,bi->", q(weight + delta) - q(weight), change)
    return float(share / torch.einsum("bi,bi->", change, change))


@wrong("surviving_share", "the share is 1, expected 10")
def at_most_one(weight, delta, levels, block):
    return min(1.0, block_after_block(weight, delta, levels, block).item())


@wrong("surviving_share", "shape '[24, -1, 32]' is invalid")
def blocks_in_each_row(weight, delta, levels, block):
    return block_after_block(weight.view(len(weight), -1, block), delta, levels, block)


@wrong("surviving_share", "shape (24,)")
def for_each_row(weight, delta, levels, block):
    kept = block_after_block(weight, delta, levels, block)
    return kept * torch.ones(len(weight))


@wrong("surviving_share", "the argument weight was changed")
def merged_in_place(weight, delta, levels, block):
    before = weight.clone()
    weight += delta
    return block_after_block(before, delta, levels, block)


@wrong("surviving_share", "index")
def with_nf4_always(weight, delta, levels, block):
    """The levels of lesson 03, whatever is passed: wrong from the fourth call on."""
    return block_after_block(weight, delta, NF4, block) if len(levels) == 16 else levels[len(NF4)]


# ------------------------------------------------------------------ lora_to_gguf

BUGS = (
    "lora_a is moved too: its rows are the directions of the rank, which belong to no head",
    "k is cut into as many heads as q: it has kv_heads of them",
    "v is moved too: only q and k are turned by rotary positions",
)


@answers.hunt("lora_to_gguf")
def exporter(left):
    """The given function, with these bugs left."""
    both, all_heads, values = (bug in left for bug in BUGS)

    def lora_to_gguf(tensors, heads, kv_heads):
        moved = {}
        for name, tensor in tensors.items():
            n = heads if all_heads or "attn_q" in name else kv_heads
            turned = "attn_q" in name or "attn_k" in name or (values and "attn_v" in name)
            if turned and (both or name.endswith("lora_b")):
                halves = tensor.view(n, 2, tensor.shape[0] // n // 2, -1)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            moved[name] = tensor
        return moved

    return lora_to_gguf


@right("lora_to_gguf")
def head_after_head(tensors, heads, kv_heads):
    result = {}
    for name in sorted(tensors):
        rows = tensors[name]
        if re.search(r"attn_[qk]\.weight\.lora_b$", name):
            parts = []
            for head in rows.chunk(heads if "attn_q" in name else kv_heads):
                first, second = head.chunk(2)
                parts += [row for pair in zip(first, second, strict=True) for row in pair]
            rows = torch.stack(parts)
        result[name] = rows
    return result


@wrong("lora_to_gguf", "2 of 3 faults are mended")
def the_other_way_round(tensors, heads, kv_heads):
    """Right for heads of four rows, as those of k in the second call."""
    moved = dict(tensors)
    for name, rows in tensors.items():
        if re.search(r"attn_[qk]\.weight\.lora_b$", name):
            n = heads if "attn_q" in name else kv_heads
            moved[name] = rows.view(n, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    return moved


@wrong("lora_to_gguf", "the keys of tensors differ: missing")
def what_moves_alone(tensors, heads, kv_heads):
    moved = head_after_head(tensors, heads, kv_heads)
    return {name: rows for name, rows in moved.items() if rows is not tensors[name]}


@wrong("lora_to_gguf", "1 of 3 faults is mended")
def untouched(tensors, heads, kv_heads):
    return dict(tensors)


@wrong("lora_to_gguf", "lora_a'] has wrong values")
def lora_a_instead(tensors, heads, kv_heads):
    other = {"a": "b", "b": "a"}
    renamed = {name[:-1] + other[name[-1]]: rows for name, rows in tensors.items()}
    moved = head_after_head(renamed, heads, kv_heads)
    return {name[:-1] + other[name[-1]]: rows for name, rows in moved.items()}


# ------------------------------------------------------------------ defend_release

NUMBERS = ("size", "right answers", "log-probabilities", "ships", "token ids")


@right("defend_release")
def in_another_order_and_case():
    pairs = zip("EDCBA", NUMBERS[::-1], strict=True)
    return {file.lower(): f" {number.title()}" for file, number in pairs}


@wrong("defend_release", "3 of 5 are right")
def by_perplexity():
    return dict(zip("ABCDE", NUMBERS, strict=True)) | {"B": "ships", "D": "perplexity"}


@wrong("defend_release", "Given to several files: right answers")
def nothing_but_answers():
    return dict(zip("ABCDE", NUMBERS, strict=True)) | {"C": "right answers"}


@wrong("defend_release", "Without a cause: E")
def four_of_five():
    return dict(zip("ABCD", NUMBERS, strict=False))


@wrong("defend_release", "'it is too large' is not one of the causes")
def in_a_sentence():
    return {"A": "it is too large"}


@wrong("defend_release", "there is no file 'TRAINER': the files to judge are A to E")
def the_trainer_too():
    return dict(zip("ABCDE", NUMBERS, strict=True)) | {"trainer": "ships"}
