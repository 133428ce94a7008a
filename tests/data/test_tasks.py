"""Tasks: batches, streams that resume, balanced subsets, and every refusal."""

import bz2
import hashlib
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from peft_lessons.data.base_models import load_model, load_tokenizer
from peft_lessons.data.bundled import data_folder
from peft_lessons.data.tasks import LOADERS, LanguageTask, Split, Task, load_task
from peft_lessons.train.loop import evaluate

SENTIMENT = [name for name in LOADERS if name.startswith("sentiment")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm")


@pytest.fixture(scope="module")
def task(tokenizer):
    return load_task("sentiment", tokenizer)


@pytest.fixture(scope="module")
def austen():
    return load_task("austen")


@pytest.fixture(scope="module")
def wordnet(tokenizer):
    return load_task("wordnet", tokenizer)


@pytest.fixture
def own_tweets(tmp_path, monkeypatch, tokenizer):
    """Load "sentiment-tweets" from a data folder whose file of tweets has this content."""

    def load(content: bytes, sha256: str | None = None):
        path = "tasks/sentiment/tweets.csv.bz2"
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        sha256 = sha256 or hashlib.sha256(content).hexdigest()
        entry = {"bytes": len(content), "sha256": sha256, "rebuild": "python build.py"}
        (tmp_path / "checksums.json").write_text(json.dumps({path: entry}), encoding="utf-8")
        monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
        return load_task("sentiment-tweets", tokenizer)

    return load


def ids_of(batches) -> list[tuple]:
    """Return the unpadded token ids of every example, with its label."""
    return [
        (tuple(ids[mask == 1].tolist()), int(label))
        for batch in batches
        for ids, mask, label in zip(*batch.values(), strict=True)
    ]


@pytest.mark.parametrize("name", SENTIMENT)
def test_every_sentiment_task_loads(name, tokenizer):
    task = load_task(name, tokenizer)
    assert task.name == name and task.label_names == ("negative", "positive")
    assert task.splits == ("train", "validation", "test")
    assert task.size("train") > task.size("test") > task.size("validation") > 100
    for split in task.splits:
        assert len(task.texts(split)) == len(task.labels(split)) == task.size(split)
    rows = list(zip(task.texts("train"), task.labels("train").tolist(), strict=True))
    good, bad = ([y for x, y in rows if word in x.lower()] for word in ("wonderful", "boring"))
    assert np.mean(good) > 0.7 and np.mean(bad) < 0.3


def test_batches_hold_the_texts_in_stored_order_padded_on_the_right(task, tokenizer):
    batches = list(task.batches("validation", size=100))
    assert [len(batch["labels"]) for batch in batches] == [100] * 9 + [4]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), task.labels("validation"))
    expected = tokenizer(task.texts("validation"), truncation=True, max_length=128)["input_ids"]
    assert [list(ids) for ids, _ in ids_of(batches)] == expected
    ids, mask, labels = batches[0].values()
    assert list(batches[0]) == ["input_ids", "attention_mask", "labels"]
    assert {tensor.dtype for tensor in (ids, mask, labels)} == {torch.long}
    lengths = mask.sum(1)
    assert lengths.max() == ids.shape[1] > lengths.min()
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
    assert (ids[mask == 0] == 0).all()


def test_a_shuffle_is_a_permutation_decided_by_its_seed_alone(task):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    stored = ids_of(task.batches("validation", 64))
    shuffled = ids_of(task.batches("validation", 64, seed=3))
    assert shuffled != stored and sorted(shuffled) == sorted(stored)
    next(task.stream(4, seed=1))
    assert states() == before
    torch.manual_seed(99)
    assert shuffled == ids_of(task.batches("validation", 64, seed=3))
    assert shuffled != ids_of(task.batches("validation", 64, seed=4))


def test_stream_epochs_are_different_and_hold_no_example_twice(task):
    small = task.limit(train=50)  # 3 batches of 16 an epoch, 2 examples left out
    threes = zip(*[itertools.islice(small.stream(16, seed=7), 24)] * 3, strict=True)
    epochs = [ids_of(three) for three in threes]
    stored = set(ids_of(small.batches("train")))
    assert all(len(epoch) == len(set(epoch)) == 48 and set(epoch) <= stored for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert set().union(*map(set, epochs)) == stored
    assert ids_of(itertools.islice(small.stream(16, seed=8), 3)) != epochs[0]
    few = task.limit(train=6)  # fewer than a batch
    assert len(next(few.stream(16, seed=0))["labels"]) == 6
    assert [len(batch["labels"]) for batch in few.batches("train", 16)] == [6]


def test_stream_pads_little(task):
    def padding(batches):
        masks = [batch["attention_mask"].float() for batch in batches]
        return 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)

    plain = padding(task.batches("train", 16, seed=0))
    assert padding(itertools.islice(task.stream(16, seed=0), 398)) < 0.1 < plain
    assert padding(task.batches("test", 64, by_length=True)) < 0.1
    by_length = ids_of(task.batches("test", 64, by_length=True))
    assert sorted(by_length) == sorted(ids_of(task.batches("test", 64)))
    with pytest.raises(ValueError, match="seed=3 and by_length"):
        task.batches("test", 64, seed=3, by_length=True)


def test_limit_takes_the_first_of_each_class(task):
    small = task.limit(train=101, test=20)
    texts, labels = task.texts("train"), task.labels("train").tolist()
    rows = list(zip(small.texts("train"), small.labels("train").tolist(), strict=True))
    for label, n in ((0, 51), (1, 50)):
        first = [t for t, y in zip(texts, labels, strict=True) if y == label][:n]
        assert [t for t, y in rows if y == label] == first
    assert [t for t, _ in rows] == [t for t in texts if t in set(small.texts("train"))]
    assert (small.size("train"), small.size("test")) == (101, 20) and task.size("train") > 6_000
    with pytest.raises(ValueError, match=r"train=99999 is too many.*at most 6370"):
        task.limit(train=99999)
    assert task.limit(train=6370).labels("train").sum() == 3185


def test_texts_are_encoded_and_long_ones_cut(task, tokenizer):
    batch = task.encode(["Good.", "A longer text than that."])
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    assert batch["input_ids"][0].tolist() == [101, 2204, 1012, 102, 0, 0, 0, 0]
    short = load_task("sentiment-tweets", tokenizer, max_length=8)
    assert max(b["input_ids"].shape[1] for b in short.batches("train", 64)) == 8
    assert short.encode(["word " * 50])["input_ids"].shape == (1, 8)
    for texts in ("one text", [1, 2]):
        with pytest.raises(TypeError, match="texts must be a list of strings"):
            task.encode(texts)
    with pytest.raises(ValueError, match="texts is empty"):
        task.encode([])


def test_limit_of_many_classes(wordnet):
    small = wordnet.limit(train=260, validation=78)
    assert len(wordnet.label_names) == 26 and "26 classes" in repr(wordnet)
    assert np.bincount(small.labels("train")).tolist() == [10] * 26
    assert np.bincount(small.labels("validation")).tolist() == [3] * 26
    with pytest.raises(ValueError, match=r"train=800 is too many.*at most 780, as 'motive' has 30"):
        wordnet.limit(train=800)
    with pytest.raises(ValueError, match="train must be an integer of at least 26, got 25"):
        wordnet.limit(train=25)


def chapters_of(split: str) -> list[str]:
    """Return the text of each chapter of a split, without its heading, from the file itself."""
    packed = (data_folder() / f"tasks/austen/{split}.txt.bz2").read_bytes()
    text = bz2.decompress(packed).decode()
    chapters = ("\n" + text.removesuffix("\n")).split("\n# ")[1:]
    return [chapter.partition("\n")[2] for chapter in chapters]


def test_austen_blocks_are_the_chapters_in_pieces(austen):
    assert isinstance(austen, LanguageTask) and austen.name == "austen"
    tokenizer = load_tokenizer("tinylm")
    end = tokenizer.eos_token_id
    for split in ("validation", "test"):
        texts = iter(austen.texts(split))
        ids = iter(b["input_ids"][0].tolist() for b in austen.batches(split, 1))
        for chapter in chapters_of(split):
            paragraphs = tokenizer(chapter.split("\n"), verbose=False)["input_ids"]
            stream = [token for paragraph in paragraphs for token in (*paragraph, end)]
            # A lone token at a chapter's end is left out.
            blocks = [stream[k : k + 128] for k in range(0, len(stream) - 1, 128)]
            assert [next(ids) for _ in blocks] == blocks
            joined = "".join(next(texts) for _ in blocks) + "\n" * (len(stream) % 128 == 1)
            assert joined == chapter + "\n"
        assert next(texts, None) is None and next(ids, None) is None


def test_austen_batches(austen):
    small = austen.limit(test=17)  # the first chapter, whose last block is short
    batch = next(small.batches("test", 17))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape == (17, 128)
    assert mask.sum(1).min() < 128 == mask.sum(1).max()
    assert torch.equal(labels, torch.where(mask == 1, ids, -100))
    # The padding is the very token that closes paragraphs, which stays a label in the text.
    assert (labels == load_tokenizer("tinylm").pad_token_id).any()
    assert next(austen.stream(4, seed=0))["labels"].shape[0] == 4
    sizes = [b["input_ids"].shape[1] for b in austen.batches("test", 64, by_length=True)]
    assert sizes == sorted(sizes)


def test_the_loss_is_that_of_the_next_token_without_padding(austen):
    model, small = load_model("tinylm"), austen.limit(test=17)
    nats, tokens = 0.0, 0  # block by block, unpadded: −log p of each next token
    for batch in small.batches("test", 1):
        ids = batch["input_ids"][0]
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        nats -= sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        tokens += len(ids) - 1
    (batch,) = small.batches("test", 17)
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 77)}
    with torch.no_grad():
        assert model(**other).loss.item() == pytest.approx(nats / tokens, abs=1e-4)
    for size in (1, 5):
        scores = evaluate(model, small, "test", batch_size=size)
        assert scores.n == tokens and scores.accuracy is None
        assert scores.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_stream_does_not_go_from_short_texts_to_long_ones(task):
    batches = itertools.islice(task.stream(16, seed=0), 128)
    widths = np.array([batch["input_ids"].shape[1] for batch in batches])
    stretches = [np.corrcoef(np.arange(32), part)[0, 1] for part in widths.reshape(4, 32)]
    assert abs(np.mean(stretches)) < 0.4 and widths.std() > 2


def test_limit_of_blocks(austen):
    small = austen.limit(train=7, test=1)
    assert isinstance(small, LanguageTask)
    assert small.texts("train") == austen.texts("train")[:7]
    assert small.size("test") == 1 and small.size("validation") == austen.size("validation")
    with pytest.raises(ValueError, match=r"test=99999 is too many; there are \d+ blocks"):
        austen.limit(test=99999)
    with pytest.raises(ValueError, match="test must be an integer of at least 1, got 0"):
        austen.limit(test=0)


def test_refusals_of_language_tasks(austen, tokenizer):
    with pytest.raises(ValueError, match=r"'austen' has no classes.*batches\('test'\) gives them"):
        austen.labels("test")
    with pytest.raises(ValueError, match="texts contains a text without a token: ''"):
        austen.encode(["Emma", ""])
    with pytest.raises(ValueError, match=r"needs the tokenizer of a language model.*tinylm"):
        load_task("austen", tokenizer)
    lone = Split(("a", "b c"), ((5,), (5, 6)))
    with pytest.raises(ValueError, match="split 'train' has a block of fewer than 2 tokens"):
        LanguageTask("mine", {"train": lone}, tokenizer, 16)


def test_bad_max_length():
    for name, length, message in (
        ("austen", 1, "be an integer of at least 2, got 1"),
        ("austen", 513, "be at most the model's 512, got 513"),
        ("sentiment", 2, ".*got 2"),
        ("sentiment", 16.0, ".*got 16.0"),
    ):
        with pytest.raises(ValueError, match=f"max_length must {message}"):
            load_task(name, max_length=length)


TWEETS = """split,rating,text
train,2.5,"Größe, with a comma
and a second line"
validation,-3.0,Bad.
train,0.2,Neither.
test,1.5,Good.
"""


def test_a_compressed_table_of_your_own_is_read(own_tweets):
    task = own_tweets(bz2.compress(TWEETS.encode()))
    assert task.texts("train") == ["Größe, with a comma\nand a second line"]
    assert [task.labels(split).tolist() for split in task.splits] == [[1], [0], [1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TWEETS.encode(), "Invalid data stream"),
        (bz2.compress(TWEETS.encode())[:-1], "ended before"),
        (bz2.compress(TWEETS.encode("latin-1")), "can't decode byte"),
    ],
)
def test_a_table_that_cannot_be_unpacked_is_refused_with_the_remedy(own_tweets, content, message):
    with pytest.raises(ValueError, match=rf"tweets\.csv\.bz2 is not UTF-8 .*{message}.*README\.md"):
        own_tweets(content)
    with pytest.raises(ValueError, match=r"damaged: its sha256 is wrong.*python build\.py"):
        own_tweets(content, sha256="0" * 64)


def test_an_unknown_task_and_a_bad_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"'sentimant'.*sentiment, sentiment-tweets"):
        load_task("sentimant")
    with pytest.raises(TypeError, match=r"tokenizer must be a tokenizer, got 'minilm'"):
        load_task("sentiment", "minilm")
    bare = load_tokenizer("minilm")
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        load_task("sentiment", bare)


def test_an_unknown_split_and_a_bad_size_are_refused_at_once(task):
    for call in (task.size, task.texts, task.batches, lambda split: task.limit(**{split: 4})):
        with pytest.raises(ValueError, match=r"split 'dev' is unknown.*'train', 'validation'"):
            call("dev")
    for call in (lambda: task.batches("train", 0), lambda: task.stream(2.5, seed=0)):
        with pytest.raises(ValueError, match=r"size must be an integer of at least 1, got"):
            call()


def test_missing_or_wrong_labels(tokenizer):
    for labels in (None, (0,), (0, 2)):
        split = Split(("a", "b"), ((101, 102), (101, 102)), labels)
        with pytest.raises(ValueError, match=r"labels of split 'train' must give each of the 2"):
            Task("mine", {"train": split}, ("no", "yes"), tokenizer, 16)
