"""Tasks: batches, streams that resume, balanced subsets, and every refusal."""

import itertools
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from peft_lessons.models import load_tokenizer
from peft_lessons.tasks import LOADERS, Split, Task, load_task, sentiment_label


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm")


@pytest.fixture(scope="module")
def task(tokenizer):
    return load_task("sentiment", tokenizer)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def ids_of(batches) -> list[tuple]:
    """Return the unpadded token ids of every example, with its label."""
    return [
        (tuple(ids[mask == 1].tolist()), int(label))
        for batch in batches
        for ids, mask, label in zip(*batch.values(), strict=True)
    ]


@pytest.mark.parametrize("name", LOADERS)
def test_every_task_loads(name, tokenizer):
    task = load_task(name, tokenizer)
    assert task.name == name and task.label_names == ("negative", "positive")
    assert task.splits == ("train", "validation", "test")
    assert task.size("train") > task.size("test") > task.size("validation") > 100
    for split in task.splits:
        assert len(task.texts(split)) == len(task.labels(split)) == task.size(split)
        assert set(task.labels(split).tolist()) == {0, 1}


def test_loads_quickly(tokenizer):
    start = time.process_time()
    load_task("sentiment", tokenizer)
    assert time.process_time() - start < 5  # 2 s on an idle core; a busy one takes longer


@pytest.mark.parametrize(
    ("rating", "label"), [(1.1, 1), (-1.1, 0), (4, 1), (-4, 0), (1, None), (-1, None), (0, None)]
)
def test_sentiment_label(rating, label):
    assert sentiment_label(rating) == label


def test_labels_agree_with_the_words(task):
    texts, labels = task.texts("train"), task.labels("train").tolist()

    def share(word):
        return np.mean([y for x, y in zip(texts, labels, strict=True) if word in x.lower().split()])

    assert share("boring") < 0.2 and share("dull") < 0.2
    assert share("wonderful") > 0.8 and share("beautifully") > 0.8


def test_batches_in_stored_order(task, tokenizer):
    batches = list(task.batches("validation", size=100))
    assert [len(batch["labels"]) for batch in batches] == [100] * 9 + [4]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), task.labels("validation"))
    texts = task.texts("validation")
    expected = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    assert [list(ids) for ids, _ in ids_of(batches)] == expected


def test_padding(task):
    batch = next(task.batches("train", size=32, seed=0))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    assert ids.shape == mask.shape and batch["labels"].shape == (32,)
    lengths = mask.sum(1)
    assert lengths.max() == ids.shape[1] and lengths.min() < ids.shape[1]
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
    assert (ids[mask == 0] == 0).all() and (ids[mask == 1] != 0).all()
    assert (ids[:, 0] == 101).all() and (ids[range(32), lengths - 1] == 102).all()


def test_a_shuffle_is_a_permutation_decided_by_its_seed(task):
    stored = ids_of(task.batches("validation", 64))
    shuffled = ids_of(task.batches("validation", 64, seed=3))
    assert shuffled != stored and sorted(shuffled) == sorted(stored)
    assert shuffled == ids_of(task.batches("validation", 64, seed=3))
    assert shuffled != ids_of(task.batches("validation", 64, seed=4))


def test_global_random_state_is_untouched(task):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    next(task.batches("train", 4, seed=1))
    list(itertools.islice(task.stream(4, seed=1), 3))
    assert states() == before
    torch.manual_seed(99)
    one = next(task.batches("train", 4, seed=1))
    torch.manual_seed(100)
    assert same(one, next(task.batches("train", 4, seed=1)))


def test_stream_resumes_on_the_same_data(task):
    small = task.limit(train=50)
    whole = list(itertools.islice(small.stream(16, seed=7), 12))
    for start in (0, 1, 3, 4, 11):
        rest = itertools.islice(small.stream(16, seed=7, start=start), 12 - start)
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_stream_epochs_are_different_and_hold_no_example_twice(task):
    small = task.limit(train=50)  # 3 batches of 16 an epoch, 2 examples left out
    batches = [ids_of([batch]) for batch in itertools.islice(small.stream(16, seed=7), 24)]
    assert all(len(batch) == 16 for batch in batches)
    threes = zip(*[itertools.islice(small.stream(16, seed=7), 24)] * 3, strict=True)
    epochs = [ids_of(three) for three in threes]
    stored = set(ids_of(small.batches("train")))
    assert all(len(set(epoch)) == 48 and set(epoch) <= stored for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert set().union(*map(set, epochs)) == stored
    other = ids_of(itertools.islice(small.stream(16, seed=8), 3))
    assert other != epochs[0]


def test_stream_pads_little(task):
    def padding(batches):
        masks = [batch["attention_mask"].float() for batch in batches]
        return 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)

    plain = padding(task.batches("train", 16, seed=0))
    assert padding(itertools.islice(task.stream(16, seed=0), 398)) < 0.1 < plain
    assert padding(task.batches("test", 64, by_length=True)) < 0.1


def test_batches_by_length_hold_every_example_once(task):
    lengths = [batch["input_ids"].shape[1] for batch in task.batches("test", 64, by_length=True)]
    assert lengths == sorted(lengths)
    every = ids_of(task.batches("test", 64, by_length=True))
    assert sorted(every) == sorted(ids_of(task.batches("test", 64)))
    with pytest.raises(ValueError, match="seed=3 and by_length"):
        task.batches("test", 64, seed=3, by_length=True)


def test_stream_starts_late_at_no_cost(task):
    start = time.process_time()
    next(task.stream(16, seed=0, start=10**9))
    assert time.process_time() - start < 0.5


def test_a_batch_larger_than_the_data(task):
    small = task.limit(train=6)
    assert len(next(small.stream(16, seed=0))["labels"]) == 6
    assert [len(batch["labels"]) for batch in small.batches("train", 16)] == [6]


def test_limit_takes_the_first_of_each_class(task):
    small = task.limit(train=101)
    texts, labels = task.texts("train"), task.labels("train").tolist()
    first = {
        label: [t for t, y in zip(texts, labels, strict=True) if y == label] for label in (0, 1)
    }
    assert small.size("train") == 101
    kept = list(zip(small.texts("train"), small.labels("train").tolist(), strict=True))
    assert [t for t, y in kept if y == 0] == first[0][:51]
    assert [t for t, y in kept if y == 1] == first[1][:50]
    assert [t for t, _ in kept] == [t for t in texts if t in set(small.texts("train"))]
    assert small.texts("test") == task.texts("test") and task.size("train") > 6_000
    both = task.limit(train=10, test=20)
    assert (both.size("train"), both.size("test")) == (10, 20)


def test_encode(task):
    batch = task.encode(["Good.", "A longer text than that."])
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    assert batch["input_ids"][0].tolist() == [101, 2204, 1012, 102, 0, 0, 0, 0]


def test_long_texts_are_cut(tokenizer):
    task = load_task("sentiment-nytimes", tokenizer, max_length=8)
    assert max(b["input_ids"].shape[1] for b in task.batches("train", 64)) == 8
    assert task.encode(["word " * 50])["input_ids"].shape == (1, 8)


def test_describe_tells_the_truth(task):
    lines = repr(task.describe()).splitlines()
    cells = lines[1].split()
    words = np.mean([len(text.split()) for text in task.texts("train")])
    tokens = np.mean([int(b["attention_mask"].sum()) for b in task.batches("train", 1)])
    share = task.labels("train").float().mean().item()
    count = f"{task.size('train'):,}"
    assert cells == ["train", count, f"{share:.1%}", f"{words:.1f}", f"{tokens:.1f}"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "MIT" in lines[-1] and "Hutto" in lines[-1]
    assert count in repr(task) and "negative / positive" in repr(task)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"'sentimant'.*sentiment, sentiment-amazon"):
        load_task("sentimant")


@pytest.mark.parametrize("length", [2, 0, -1, 16.0, None, 513])
def test_bad_max_length(length, tokenizer):
    with pytest.raises(ValueError, match=f"max_length must be .*got {length}"):
        load_task("sentiment", tokenizer, max_length=length)


def test_bad_tokenizer():
    with pytest.raises(TypeError, match=r"tokenizer must be a tokenizer, got 'minilm'"):
        load_task("sentiment", "minilm")
    bare = load_tokenizer("minilm")
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        load_task("sentiment", bare)


def test_unknown_split(task):
    calls = (task.size, task.texts, task.labels, task.batches, lambda s: task.limit(**{s: 4}))
    for call in calls:
        with pytest.raises(ValueError, match=r"split 'dev' is unknown.*'train', 'validation'"):
            call("dev")


@pytest.mark.parametrize("size", [0, -3, 2.5, True, None])
def test_bad_size_is_refused_at_once(task, size):
    # At the call, not at the first batch.
    for call in (lambda: task.batches("train", size), lambda: task.stream(size, seed=0)):
        with pytest.raises(ValueError, match=f"size must be an integer of at least 1, got {size}"):
            call()


def test_bad_start(task):
    with pytest.raises(ValueError, match="start must be an integer of at least 0, got -1"):
        task.stream(4, seed=0, start=-1)


def test_bad_limit(task):
    with pytest.raises(ValueError, match="train must be an integer of at least 2, got 1"):
        task.limit(train=1)
    with pytest.raises(ValueError, match=r"train=99999 is too many.*at most 6370"):
        task.limit(train=99999)
    assert task.limit(train=6370).labels("train").sum() == 3185


def test_bad_texts(task):
    for texts in ("one text", [1, 2]):
        with pytest.raises(TypeError, match="texts must be a list of strings"):
            task.encode(texts)
    with pytest.raises(ValueError, match="texts is empty"):
        task.encode([])


@pytest.mark.parametrize("labels", [None, (0,), (0, 2), (-1, 0)])
def test_missing_or_wrong_labels(tokenizer, labels):
    split = Split(("a", "b"), ((101, 102), (101, 102)), labels)
    with pytest.raises(ValueError, match=r"labels of split 'train' must give each of the 2 texts"):
        Task("mine", {"train": split}, ("no", "yes"), tokenizer, 16)


def test_missing_file(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
    (tmp_path / "checksums.json").write_text(
        '{"tasks/sentiment/movies.csv": {"bytes": 1, "sha256": "", "rebuild": "python x.py"}}'
    )
    with pytest.raises(FileNotFoundError, match=r"movies\.csv is missing.*python x\.py"):
        load_task("sentiment", tokenizer)


def test_works_from_another_folder_and_with_the_default_tokenizer(tmp_path, task):
    code = (
        "from peft_lessons.tasks import load_task\n"
        "batch = next(load_task('sentiment').batches('test', 2))\n"
        "print(batch['input_ids'].tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(next(task.batches("test", 2))["input_ids"].tolist())
    assert run.stderr == ""
