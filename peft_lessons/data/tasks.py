"""Load the bundled data as ready batches. A task has texts and labels, and knows no method."""

import bz2
import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import chat
from .base_models import load_tokenizer
from .bundled import bundled_path
from .own import SPLITS, is_file, read_splits

LABEL_NAMES = ("negative", "positive")


@dataclass(frozen=True)
class Split:
    """Hold the examples of one split: texts, token ids, and class indices (None for free text)."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] | None = None

    def pick(self, indices) -> "Split":
        """Return a split of only these examples, in this order."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{name: tuple(c[i] for i in indices) for name, c in columns.items() if c is not None},
        )


@dataclass(frozen=True, kw_only=True)
class ChatSplit(Split):
    """Hold the examples of one split of a `ChatTask`: `texts` in the chat template, `targets` the
    labels of `tokens`, and the messages of each prompt and its completion."""

    targets: tuple[tuple[int, ...], ...]
    prompts: tuple[list[dict], ...]
    completions: tuple[list[dict], ...]


@dataclass(frozen=True, kw_only=True)
class PreferenceSplit(ChatSplit):
    """Hold the examples of one split of a `PreferenceTask`: as a `ChatSplit` for the chosen
    completion, and the same for the rejected one."""

    rejected: tuple[list[dict], ...]
    rejected_tokens: tuple[tuple[int, ...], ...]
    rejected_targets: tuple[tuple[int, ...], ...]


class Task:
    """Hold labelled texts in splits, tokenised once, and return them as padded batches.

    Batches are dicts of long tensors: `input_ids` and `attention_mask` (size, tokens), padded on
    the right to the longest text of the batch, and `labels` (size,)."""

    unit = "examples"  # what a split is counted in

    def __init__(self, name, splits, label_names, tokenizer, max_length, source=""):
        for split, examples in splits.items():
            self._check(split, examples, len(label_names))
        self.name = name
        self.label_names = tuple(label_names)
        self.source = source
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._splits = dict(splits)

    @staticmethod
    def _check(split: str, examples: Split, classes: int) -> None:
        known = examples.labels is not None and len(examples.labels) == len(examples.texts)
        if not known or not set(examples.labels) <= set(range(classes)):
            raise ValueError(
                f"labels of split {split!r} must give each of the {len(examples.texts)} texts "
                f"one of 0..{classes - 1}; drop texts without a label before"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {self.size(split):,}" for split in self._splits)
        return f"{type(self).__name__}({self.name!r}: {sizes}; {self._kind()})"

    def _kind(self) -> str:
        few = len(self.label_names) <= 5
        return " / ".join(self.label_names) if few else f"{len(self.label_names)} classes"

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits."""
        return tuple(self._splits)

    def _split(self, split: str) -> Split:
        if split not in self._splits:
            raise ValueError(f"split {split!r} is unknown; {self.name!r} has {self.splits}")
        return self._splits[split]

    def size(self, split: str) -> int:
        """Return the number of examples of a split. Raises ValueError for an unknown split."""
        return len(self._split(split).texts)

    def texts(self, split: str) -> list[str]:
        """Return the texts of a split in stored order. Raises ValueError for an unknown split."""
        return list(self._split(split).texts)

    def labels(self, split: str) -> torch.Tensor:
        """Return the class indices (size,) of a split in stored order, as in `batches`.

        Raises ValueError for an unknown split, and for a task without classes."""
        examples = self._split(split)
        if not self.label_names:
            gives = f"batches({split!r}) gives them"
            raise ValueError(f"{self.name!r} has no classes: its labels are tokens, and {gives}")
        return torch.tensor(examples.labels)

    def examples(self, split: str) -> list[dict]:
        """Return [{"text": …, "label": …}, …] of a split in stored order.

        Raises ValueError for an unknown split."""
        labels = self.labels(split).tolist()
        return [
            {"text": text, "label": label}
            for text, label in zip(self.texts(split), labels, strict=True)
        ]

    def batches(
        self, split: str, size: int = 16, seed: int | None = None, by_length: bool = False
    ) -> Iterator[dict]:
        """Iterate over a split once, in stored order or shuffled by `seed`; the last may be short.

        `by_length` sorts by length, which saves padding if the order does not matter. The global
        random state is neither read nor changed. Raises ValueError for an unknown split, a size
        below 1, or a seed together with by_length."""
        examples, size = self._split(split), _at_least("size", size, 1)
        if by_length and seed is not None:
            raise ValueError(f"seed={seed} and by_length=True: choose one order")
        order = np.arange(len(examples.texts))
        if by_length:
            order = np.argsort(_lengths(examples), kind="stable")
        elif seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        return (
            self._collate(examples.pick(order[k : k + size])) for k in range(0, len(order), size)
        )

    def stream(self, size: int, seed: int) -> Iterator[dict]:
        """Give full training batches for ever, epoch e shuffled by (seed, e).

        Texts of about one length share a batch, so that little of it is padding. What does not fill
        a batch is left out of an epoch, another part in each; a size above the number of examples
        gives them all. Raises ValueError for a size below 1."""
        examples, size = self._split("train"), _at_least("size", size, 1)
        size = min(size, len(examples.texts))
        return (
            self._collate(examples.pick(rows))
            for epoch in itertools.count()
            for rows in _epoch(_lengths(examples), size, (seed, epoch))
        )

    def limit(self, **sizes: int) -> "Task":
        """Return the task with only the first `n` examples of a split, balanced by class.

        `task.limit(train=200)` is for studies on little data. The order is kept; other splits stay
        whole. Without classes it is the first `n`. Raises ValueError for an unknown split, or an n
        that leaves a class empty or exceeds what the rarest class or the split allows."""
        limited = copy(self)
        limited._splits = dict(self._splits)
        for split, n in sizes.items():
            examples, names = self._split(split), self.label_names
            size = len(examples.texts)
            _at_least(split, n, len(names) or 1)
            if not names and n > size:
                raise ValueError(f"{split}={n} is too many; there are {size} {self.unit}")
            rows = _balanced(np.array(examples.labels), names, split, n) if names else range(n)
            limited._splits[split] = examples.pick(rows)
        return limited

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Return a padded batch, without labels, of your own texts.

        Raises TypeError if `texts` is not a list of strings, ValueError if it is empty or a text in
        it has no token."""
        listed = isinstance(texts, list | tuple)
        if not listed or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a list of strings, got {texts!r}")
        if not texts:
            raise ValueError("texts is empty; give at least one text")
        tokens = _tokenise(texts, self._tokenizer, self.max_length).tokens
        if not all(tokens):
            raise ValueError(f"texts contains a text without a token: {texts[tokens.index(())]!r}")
        return self._pad(tokens)

    def _collate(self, examples: Split) -> dict[str, torch.Tensor]:
        return self._pad(examples.tokens) | {"labels": torch.tensor(examples.labels)}  # (size,)

    def _pad(self, rows: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(map(len, rows)))
        ids = torch.full(shape, self._tokenizer.pad_token_id)  # (size, tokens)
        mask = torch.zeros(shape, dtype=torch.long)  # (size, tokens)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class LanguageTask(Task):
    """Hold blocks of running text in splits, for next-token prediction.

    Batches have `input_ids`, `attention_mask` and `labels`, all (size, tokens); the labels are the
    ids, and −100 on the padding, which the loss ignores. A model shifts them itself, so the first
    token of a block is never predicted. A perplexity depends on the tokenizer and `max_length`:
    compare it only with others of the same two."""

    unit = "blocks"

    def __init__(self, name, splits, tokenizer, max_length, source=""):
        super().__init__(name, splits, (), tokenizer, max_length, source)

    @staticmethod
    def _check(split: str, examples: Split, classes: int) -> None:
        if any(len(tokens) < 2 for tokens in examples.tokens):
            raise ValueError(
                f"split {split!r} has a block of fewer than 2 tokens, in which nothing is predicted"
            )

    def _kind(self) -> str:
        return f"blocks of up to {self.max_length} tokens"

    def examples(self, split: str) -> list[dict]:
        """Return the blocks of a split, [{"text": …}, …], in stored order.

        Raises ValueError for an unknown split."""
        return [{"text": text} for text in self.texts(split)]

    def _collate(self, examples: Split) -> dict[str, torch.Tensor]:
        batch = self._pad(examples.tokens)
        # By the mask: the padding may be a token that also occurs in the text.
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch | {"labels": labels}  # (size, tokens)


class ChatTask(Task):
    """Hold prompts and completions in a chat template, to train an assistant on its answers.

    Batches have `input_ids`, `attention_mask` and `labels`, all (size, tokens); the labels are the
    ids in the answer and the token that ends it, and -100 on the template, the prompt and the
    padding. A template may add a system message of its own. With `label_names` each example also
    has a class."""

    def __init__(self, name, splits, tokenizer, max_length, source="", label_names=()):
        super().__init__(name, splits, label_names, tokenizer, max_length, source)

    @staticmethod
    def _check(split: str, examples: Split, classes: int) -> None:
        if classes:
            Task._check(split, examples, classes)

    def _kind(self) -> str:
        return super()._kind() if self.label_names else "prompts and answers"

    def examples(self, split: str) -> list[dict]:
        """Return [{"prompt": [message, ...], "completion": [message]}, ...] of a split in stored
        order, TRL's conversational format. Raises ValueError for an unknown split."""
        examples = self._split(split)
        return [
            {"prompt": prompt, "completion": completion}
            for prompt, completion in zip(examples.prompts, examples.completions, strict=True)
        ]

    def render(self, example: dict) -> str:
        """Return an example as text in the chat template. Without a completion the text ends where
        the assistant is to answer. ValueError for wrong messages."""
        prompt, completion = example["prompt"], example.get("completion", [])
        chat.refuse_messages([*prompt, *completion], "example")
        return chat.chat_text(self._tokenizer, [*prompt, *completion], ask=not completion)

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Return a padded batch, without labels, of your own texts, each as a user's message in the
        chat template up to where the assistant is to answer. Errors as `Task.encode`."""
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            texts = [chat.chat_text(self._tokenizer, [chat.user(text)], ask=True) for text in texts]
        return super().encode(texts)

    def _collate(self, examples: ChatSplit) -> dict[str, torch.Tensor]:
        return self._labelled(examples.tokens, examples.targets)

    def _labelled(self, tokens: tuple, targets: tuple) -> dict[str, torch.Tensor]:
        batch = self._pad(tokens)
        labels = torch.full_like(batch["input_ids"], -100)  # (size, tokens)
        # By the mask: the padding may be the token that ends an answer.
        labels[batch["attention_mask"] == 1] = torch.tensor([*itertools.chain(*targets)])
        return batch | {"labels": labels}


class PreferenceTask(ChatTask):
    """Hold prompts, each with a chosen and a rejected answer, for preference training.

    Batches have `input_ids`, `attention_mask` and `labels`, all (2 · size, tokens): first the
    chosen answers of all prompts, then the rejected ones, in TRL's order; labels as in a
    `ChatTask`."""

    def _kind(self) -> str:
        return "prompts with a chosen and a rejected answer"

    def examples(self, split: str) -> list[dict]:
        """Return [{"prompt": [message], "chosen": [message], "rejected": [message]}, ...] of a
        split in stored order, TRL's conversational preference format. Raises ValueError for an
        unknown split."""
        examples = self._split(split)
        columns = zip(examples.prompts, examples.completions, examples.rejected, strict=True)
        return [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for prompt, chosen, rejected in columns
        ]

    def _collate(self, examples: PreferenceSplit) -> dict[str, torch.Tensor]:
        return self._labelled(
            examples.tokens + examples.rejected_tokens, examples.targets + examples.rejected_targets
        )


def _balanced(labels: np.ndarray, names: Sequence[str], split: str, n: int) -> np.ndarray:
    """Return the indices of the first n examples with as many of each class, in their order."""
    members = [np.flatnonzero(labels == label) for label in range(len(names))]
    wanted = [n // len(names) + (label < n % len(names)) for label in range(len(names))]
    if any(len(m) < w for m, w in zip(members, wanted, strict=True)):
        rarest = min(range(len(names)), key=lambda label: len(members[label]))
        few = len(members[rarest])
        raise ValueError(
            f"{split}={n} is too many for balanced classes; at most {len(names) * few}, as "
            f"{names[rarest]!r} has {few}"
        )
    return np.sort(np.concatenate([m[:w] for m, w in zip(members, wanted, strict=True)]))


def _lengths(examples: Split) -> np.ndarray:
    return np.array([len(tokens) for tokens in examples.tokens])


def _epoch(lengths: np.ndarray, size: int, seed: tuple[int, int]) -> np.ndarray:
    """Return the indices (batches, size) of an epoch; texts of a batch have similar lengths."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    # Sorting within random groups of 32 batches keeps the batches of two epochs different.
    groups = np.split(order, range(32 * size, len(order), 32 * size))
    order = np.concatenate([g[np.argsort(lengths[g], kind="stable")] for g in groups])
    return rng.permutation(order.reshape(-1, size))


def _at_least(argument: str, value: int, least: int) -> int:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least:
        raise ValueError(f"{argument} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _tokenise(texts, tokenizer, max_length: int, labels=None) -> Split:
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return Split(tuple(texts), tuple(map(tuple, ids)), labels)


def sentiment_label(rating: float) -> int | None:
    """Return 1 for a mean rating above +1, 0 below -1, None between them."""
    return 1 if rating > 1 else 0 if rating < -1 else None


SENTIMENT_SOURCE = (
    "Hutto & Gilbert (2014), vaderSentiment 3.3.2 (ratings: MIT); labels |mean rating| > 1"
)
WORDNET_SOURCE = "WordNet 3.0, Princeton University (2006), WordNet licence; definitions of nouns"
PREFERENCE_SOURCE = (
    "answers sampled from SmolLM2-135M-Instruct (Apache-2.0) on nouns of WordNet 3.0; "
    "the chosen answer is one sentence of at most 25 words, the rejected answer is longer"
)


def _unpacked(path: str) -> str:
    """Return the text of a bundled file that bzip2 compressed.

    Raises ValueError if the content is not UTF-8 text compressed by bzip2."""
    file = bundled_path(path)
    try:
        return bz2.decompress(file.read_bytes()).decode()
    except (OSError, ValueError) as error:
        bundled_path(path, verify=True)  # refuses a damaged file, and names its remedy
        raise ValueError(
            f"{file} is not UTF-8 text compressed by bzip2: {error}. Save your text in UTF-8, "
            "compress it with bzip2 and record its checksum again, as data/README.md describes"
        ) from error


def _table(path: str) -> list[dict[str, str]]:
    """Read the rows of a bundled CSV file that bzip2 compressed."""
    return list(csv.DictReader(io.StringIO(_unpacked(path), newline="")))


def _rated(domain: str) -> dict[str, tuple[list[str], list[int]]]:
    """Read {split: (texts, labels)} of a domain of the sentiment data."""
    rows = {split: ([], []) for split in SPLITS}
    for row in _table(f"tasks/sentiment/{domain}.csv.bz2"):
        label = sentiment_label(float(row["rating"]))
        if label is not None:
            rows[row["split"]][0].append(row["text"])
            rows[row["split"]][1].append(label)
    return rows


def _nouns() -> dict[str, list[dict[str, str]]]:
    """Read {split: rows} of the nouns of WordNet, with category, word and definition."""
    rows = _table("tasks/wordnet/nouns.csv.bz2")
    return {split: [row for row in rows if row["split"] == split] for split in SPLITS}


def _load_sentiment(name, tokenizer, max_length, domain: str) -> Task:
    splits = {
        split: _tokenise(texts, tokenizer, max_length, tuple(labels))
        for split, (texts, labels) in _rated(domain).items()
    }
    return Task(name, splits, LABEL_NAMES, tokenizer, max_length, SENTIMENT_SOURCE)


def _load_wordnet(name, tokenizer, max_length) -> Task:
    nouns = _nouns()
    names = sorted({row["category"] for rows in nouns.values() for row in rows})
    splits = {}
    for split, mine in nouns.items():
        labels = tuple(names.index(row["category"]) for row in mine)
        texts = [row["definition"] for row in mine]
        splits[split] = _tokenise(texts, tokenizer, max_length, labels)
    return Task(name, splits, names, tokenizer, max_length, WORDNET_SOURCE)


def _load_austen(name, tokenizer, max_length) -> LanguageTask:
    _at_least("max_length", max_length, 2)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name!r} needs the tokenizer of a language model, with a token that ends a text; "
            "load_tokenizer('tinylm') gives one"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name!r} needs a fast tokenizer, which reports where in the text each token is; "
            f"{type(tokenizer).__name__} is a slow one"
        )
    splits = {}
    for split in SPLITS:
        text = _unpacked(f"tasks/austen/{split}.txt.bz2")
        chapters = []
        for line in text.removesuffix("\n").split("\n"):
            if line.startswith("# "):
                chapters.append([])
            else:
                chapters[-1].append(line)
        splits[split] = _blocks(chapters, tokenizer, max_length)
    source = "Jane Austen (1775-1817), six novels, public domain; whole chapters held out"
    return LanguageTask(name, splits, tokenizer, max_length, source)


def _blocks(chapters: list[list[str]], tokenizer, length: int) -> Split:
    """Cut chapters, given by their paragraphs, into blocks of `length` tokens.

    A block never continues into the next chapter: the last one is shorter, and left out if it is a
    single token. The end-of-text token closes each paragraph, as in the bundled decoder's
    pretraining, where a paragraph is a text; in the texts it is a line end."""
    texts, tokens = [], []
    for paragraphs in chapters:
        encoded = tokenizer(
            paragraphs, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, pieces = [], []  # each token, and the characters that it stands for
        for paragraph, token_ids, spans in zip(
            paragraphs, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # From token to token, as some tokenizers leave spaces out of a token's span.
            starts = [0, *(start for start, _ in spans[1:]), len(paragraph)]
            ids += [*token_ids, tokenizer.eos_token_id]
            pieces += [*(paragraph[a:b] for a, b in itertools.pairwise(starts)), "\n"]
        for k in range(0, len(ids), length):
            if len(ids) - k > 1:
                tokens.append(tuple(ids[k : k + length]))
                texts.append("".join(pieces[k : k + length]))
    return Split(tuple(texts), tuple(tokens))


# ------------------------------------------------------------------ conversations


def chat_split(tokenizer, pairs, max_length: int, where: str, labels=None) -> ChatSplit:
    """Return the split of [(prompt, completion), ...], two lists of messages each.

    Raises ValueError for a tokenizer without a chat template, wrong messages, or an answer that
    does not fit into `max_length` tokens; `where` and the number name the example."""
    chat.refuse_no_template(tokenizer)
    rows = [
        _chat_row(tokenizer, max_length, *pair, f"{where}[{number}]")
        for number, pair in enumerate(pairs)
    ]
    return _chat_columns(rows, labels)


def _chat_row(tokenizer, max_length: int, prompt, completion, place: str) -> tuple:
    """Return text, ids, targets, prompt and completion of one example."""
    text, *made = chat.pair_tokens(tokenizer, prompt, completion, place)
    ids, targets = chat.fitted(*made, max_length, place)
    return text, tuple(ids), tuple(targets), prompt, completion


def _chat_columns(rows: list[tuple], labels=None) -> ChatSplit:
    texts, tokens, targets, prompts, completions = zip(*rows, strict=True) if rows else [()] * 5
    return ChatSplit(
        texts, tokens, labels, targets=targets, prompts=prompts, completions=completions
    )


REVIEW = "Is this movie review positive or negative? Answer with one word.\n\n{}"


def _load_reviews(name, tokenizer, max_length) -> ChatTask:
    rows, splits = _rated("movies"), {}
    for split, (texts, labels) in rows.items():
        pairs = [
            ([chat.user(REVIEW.format(text))], [chat.assistant(LABEL_NAMES[label])])
            for text, label in zip(texts, labels, strict=True)
        ]
        splits[split] = chat_split(tokenizer, pairs, max_length, f"{name} {split}", tuple(labels))
    return ChatTask(name, splits, tokenizer, max_length, SENTIMENT_SOURCE, LABEL_NAMES)


def question(word: str) -> str:
    """Return the question that the definition of a noun answers. An article would be wrong for
    many nouns ("What is an unrest?"), and the data does not say for which."""
    word = word.replace("_", " ")
    return f"Who or what is {word}?" if word[0].isupper() else f'What does "{word}" mean?'


def sentence(definition: str) -> str:
    """Return a definition with a capital letter and a full stop."""
    first = next(i for i, character in enumerate(definition) if character.isalnum())
    text = definition[:first] + definition[first].upper() + definition[first + 1 :]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _load_definitions(name, tokenizer, max_length) -> ChatTask:
    splits = {}
    for split, rows in _nouns().items():
        pairs = [
            ([chat.user(question(row["word"]))], [chat.assistant(sentence(row["definition"]))])
            for row in rows
        ]
        splits[split] = chat_split(tokenizer, pairs, max_length, f"{name} {split}")
    return ChatTask(name, splits, tokenizer, max_length, WORDNET_SOURCE)


PREFERENCES = "tasks/preferences/pairs.csv.bz2"


def _load_preferences(name, tokenizer, max_length) -> PreferenceTask:
    rows = _table(PREFERENCES)
    columns, header = ("split", "prompt", "chosen", "rejected"), [*rows[0]] if rows else []
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{PREFERENCES} lacks the columns {', '.join(missing)}: it has {header}")
    for number, row in enumerate(rows):
        if row["split"] not in SPLITS:
            raise ValueError(
                f"{PREFERENCES}, row {number}: split {row['split']!r} must be one of {SPLITS}"
            )
        if row["chosen"] == row["rejected"]:
            raise ValueError(
                f"{PREFERENCES}, row {number}: chosen and rejected are equal, so nothing is "
                f"preferred: {row['chosen']!r:.60}"
            )
    splits = {}
    for split in SPLITS:
        mine = [row for row in rows if row["split"] == split]
        chosen, rejected = (
            chat_split(
                tokenizer,
                [([chat.user(row["prompt"])], [chat.assistant(row[answer])]) for row in mine],
                max_length,
                f"{name} {split}, {answer}",
            )
            for answer in ("chosen", "rejected")
        )
        splits[split] = PreferenceSplit(
            **{f.name: getattr(chosen, f.name) for f in fields(chosen)},
            rejected=rejected.completions,
            rejected_tokens=rejected.tokens,
            rejected_targets=rejected.targets,
        )
    return PreferenceTask(name, splits, tokenizer, max_length, PREFERENCE_SOURCE)


def _load_own(file, tokenizer, max_length, share=None, seed=None) -> ChatTask:
    """Load a file of one's own; `own` describes it. Each answer must end with the end token."""
    chat.refuse_no_template(tokenizer)
    end, template = tokenizer.eos_token, str(tokenizer.chat_template)
    special = [t for t in tokenizer.all_special_tokens if t == end or t in template]

    def encode(prompt, completion, place):
        written = [t for m in (*prompt, *completion) for t in special if t in m["content"]]
        if written:
            raise ValueError(
                f"the text contains {written[0]!r}, which the chat template writes itself: give "
                "the messages without the template"
            )
        row = _chat_row(tokenizer, max_length, prompt, completion, place)
        last = [i for i in row[2] if i != -100][-1]
        if last != tokenizer.eos_token_id:
            raise ValueError(
                f"the chat template ends an answer with {tokenizer.decode([last])!r} and not with "
                f"the end token {end!r}, so an assistant would learn to talk on: take the chat "
                "template of the assistant that you train"
            )
        return row

    splits = read_splits(file, encode, share, seed)
    return ChatTask(
        Path(file).name,
        {split: _chat_columns(rows) for split, rows in splits.items()},
        tokenizer,
        max_length,
    )


DESK_SOURCE = "written for this course (MIT)"


def _load_desk(name, tokenizer, max_length) -> ChatTask:
    task = _load_own(bundled_path("tasks/desk/desk.jsonl", verify=True), tokenizer, max_length)
    task.name, task.source = name, DESK_SOURCE
    return task


@dataclass(frozen=True)
class Loader:
    """Describe how to load a task: a function of (name, tokenizer, max_length), and the defaults:
    the model whose tokenizer it takes, and its max_length."""

    load: Callable[..., Task]
    model: str = "minilm"
    max_length: int = 128


LOADERS = {
    "sentiment": Loader(partial(_load_sentiment, domain="movies")),
    "sentiment-tweets": Loader(partial(_load_sentiment, domain="tweets")),
    "wordnet": Loader(_load_wordnet),
    "austen": Loader(_load_austen, model="tinylm"),
    "reviews": Loader(_load_reviews, model="smollm2", max_length=256),
    "definitions": Loader(_load_definitions, model="smollm2", max_length=256),
    "preferences": Loader(_load_preferences, model="smollm2", max_length=512),
    "desk": Loader(_load_desk, model="smollm2", max_length=256),
}


def load_task(
    name: str | os.PathLike,
    tokenizer=None,
    max_length: int | None = None,
    share: float | None = None,
    seed: int | None = None,
) -> Task:
    """Load a bundled task, its texts truncated to `max_length` tokens, or a file of your own;
    `LOADERS` has the names of the bundled tasks.

    The sentiment tasks have two classes, "wordnet" 26 in alphabetical order: the category of a noun
    from its definition. "austen" is a `LanguageTask`: running text in blocks of `max_length`.

    "reviews" (the sentences of "sentiment") and "definitions" (of "wordnet") are `ChatTask`s, and
    "preferences" a `PreferenceTask`: questions and answers in the chat template of an assistant, in
    which no answer is ever truncated. So is "desk", messages to a shop.

    A file of your own, such as "my.jsonl" or "my.csv", is a `ChatTask` of its rows, {"prompt":
    "...", "completion": "..."} or {"messages": [...]}; a CSV file has the columns prompt and
    completion. It may name the split of each row, train, validation or test. Else `share` (0.2) of
    the different prompts are tested, drawn by `seed` (0); prompts that are equal up to case and
    white space stay on one side. All of the file is checked first.

    `tokenizer` is the model's, by default the bundled encoder's, for "austen" the bundled
    decoder's, for chats the assistant's. `max_length` None is 128, for chats 256, for preferences
    and files of your own 512. Raises ValueError for an unknown name, for what is wrong with your
    file, with its lines, for share or seed where the splits are fixed, a max_length that leaves no
    room for text, exceeds the model's positions or would cut an answer, or a tokenizer without the
    token or the chat template that a task needs; TypeError if `tokenizer` is not a tokenizer;
    FileNotFoundError for a missing file."""
    if is_file(name):
        loader = Loader(partial(_load_own, share=share, seed=seed), "smollm2", 512)
    elif name not in LOADERS:
        known = ", ".join(sorted(LOADERS))
        raise ValueError(
            f"there is no task {name!r}; known are {known}, and files that end in .jsonl or .csv"
        )
    elif (share, seed) != (None, None):
        raise ValueError(f"the splits of {name!r} are fixed: leave out share and seed")
    else:
        loader = LOADERS[name]
    tokenizer = load_tokenizer(loader.model) if tokenizer is None else tokenizer
    max_length = loader.max_length if max_length is None else max_length
    if not hasattr(tokenizer, "num_special_tokens_to_add"):
        raise TypeError(
            f"tokenizer must be a tokenizer, got {tokenizer!r}; load_tokenizer(name) gives one"
        )
    _at_least("max_length", max_length, tokenizer.num_special_tokens_to_add() + 1)
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length must be at most the model's {tokenizer.model_max_length}, got {max_length}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no padding token; load_tokenizer(name) gives one that has")
    return loader.load(name, tokenizer, max_length)
