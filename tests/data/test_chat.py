"""Conversations: what is learned of them, the chat tasks, and every refusal."""

import bz2
import csv
import json

import pytest
import torch
from tiny import TEMPLATE, assistant_tokenizer, chat_tokenizer

from peft_lessons import load_task, load_tokenizer
from peft_lessons.data.bundled import data_folder
from peft_lessons.data.chat import assistant, chat_text, chat_tokens, pair_tokens, user
from peft_lessons.data.tasks import ChatTask, PreferenceTask, chat_split, question, sentence

TALK = [user("Two and two?"), assistant("Four."), user("And three?"), assistant("Seven.")]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def reviews(tokenizer):
    return load_task("reviews", tokenizer)


def learned(tokenizer, ids, labels):
    """Return the texts of the runs of tokens that are learned; the others must be -100."""
    assert len(ids) == len(labels)
    runs = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, -100)
        runs[-1].append(token) if label == token else runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


# ------------------------------------------------------------------ what is learned


def test_the_answers_and_their_end_tokens_are_learned(tokenizer):
    end = tokenizer.eos_token
    text, ids, labels = chat_tokens(tokenizer, TALK)
    assert text == chat_text(tokenizer, TALK) == tokenizer.decode(ids)
    assert learned(tokenizer, ids, labels) == [f"Four.{end}", f"Seven.{end}"]
    assert learned(tokenizer, *chat_tokens(tokenizer, TALK, start=2)[1:]) == [f"Seven.{end}"]
    assert learned(tokenizer, *pair_tokens(tokenizer, TALK[:3], TALK[3:])[1:]) == [f"Seven.{end}"]
    with_system = [{"role": "system", "content": "Be kind."}, *TALK[:2], user("Thanks.")]
    assert learned(tokenizer, *chat_tokens(tokenizer, with_system)[1:]) == [f"Four.{end}"]


def test_the_question_is_tokenised_as_in_generation(tokenizer):
    """An answer that begins with a line end must not merge with the end of the question."""
    for answer in ("\nFour.", " Four.", "four"):
        asked = chat_text(tokenizer, TALK[:1], ask=True)
        before = tokenizer(asked, add_special_tokens=False)["input_ids"]
        ids = chat_tokens(tokenizer, [TALK[0], assistant(answer)])[1]
        assert ids[: len(before)] == before


def test_the_assistants_own_template():
    tokenizer = assistant_tokenizer()
    text, ids, labels = chat_tokens(tokenizer, TALK)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert learned(tokenizer, ids, labels) == ["Four.<|im_end|>", "Seven.<|im_end|>"]
    task = load_task("reviews")
    batch = next(task.batches("test", 2))
    answer = batch["labels"][batch["labels"] != -100]
    assert answer[1::2].tolist() == [tokenizer.eos_token_id] * 2 == [tokenizer.pad_token_id] * 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"must be a list of messages, \[\{\"role\": \"user\""),
        ("hello", "must be a list of messages, .*got 'hello'"),
        (["hello"], r"must be a list of messages"),
        ([user("Hi.")], "no message of the assistant, so there is nothing to learn"),
        ([user("Hi."), assistant(" ")], "message 1 is an empty answer"),
        ([user("Hi."), assistant(None)], "message 1 has no text as its content: None"),
        ([{"role": "robot", "content": "Hi."}], "message 0 has the role 'robot', .*'system', 'use"),
        ([{"content": "Hi."}], "message 0 has the role None"),
    ],
)
def test_wrong_messages_are_refused(tokenizer, messages, message):
    with pytest.raises(ValueError, match=f"train.3.: {message}|train.3. {message}"):
        chat_tokens(tokenizer, messages, where="train[3]")


def test_a_completion_begins_with_an_answer(tokenizer):
    with pytest.raises(ValueError, match="\"completion\" begins with the role 'user'"):
        pair_tokens(tokenizer, TALK[:2], TALK[2:])
    with pytest.raises(ValueError, match='"completion" must be a list of messages'):
        pair_tokens(tokenizer, TALK[:1], [])


def test_templates_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"no chat template.*load_tokenizer\('smollm2'\)"):
        chat_tokens(load_tokenizer("minilm"), TALK)
    silent = chat_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out message 0, of the role 'system'"):
        chat_tokens(silent, [{"role": "system", "content": "Be kind."}, *TALK])
    strict = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"refuses the messages: roles must alternate"):
        chat_tokens(strict, TALK)
    changing = chat_tokenizer("{{ messages | length }}" + TEMPLATE)
    with pytest.raises(ValueError, match="writes message 1 in another way once more messages"):
        chat_tokens(changing, TALK)


# ------------------------------------------------------------------ chat tasks


def test_reviews_are_the_sentiment_sentences_as_questions(reviews, tokenizer):
    sentiment = load_task("sentiment")
    assert isinstance(reviews, ChatTask) and reviews.label_names == sentiment.label_names
    for split in sentiment.splits:
        assert torch.equal(reviews.labels(split), sentiment.labels(split))
    text, label = sentiment.texts("test")[7], sentiment.label_names[sentiment.labels("test")[7]]
    example = reviews.examples("test")[7]
    asked = "Is this movie review positive or negative? Answer with one word.\n\n"
    assert example == {"prompt": [user(asked + text)], "completion": [assistant(label)]}
    chat = reviews.render(example)
    assert chat == reviews.texts("test")[7] and chat.endswith(f"{label}{tokenizer.eos_token}\n")
    assert reviews.render({"prompt": example["prompt"]}).endswith("assistant: ")
    assert "negative / positive" in repr(reviews)


def test_batches_learn_the_answer_alone_though_padding_is_its_end_token(reviews, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batches = [next(reviews.batches("test", 8)), next(reviews.stream(8, seed=0))]
    for batch in batches:
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert len({value.shape for value in batch.values()}) == 1
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        for ids, mask, labels in rows:
            assert labels[mask == 0].eq(-100).all()
            (answer,) = learned(tokenizer, ids.tolist(), labels.tolist())
            assert answer in (f"positive{tokenizer.eos_token}", f"negative{tokenizer.eos_token}")
    assert (batches[0]["attention_mask"] == 0).any()


def test_subsets_of_chats(reviews, tokenizer):
    few = reviews.limit(train=10)
    assert few.labels("train").float().mean() == 0.5 and few.size("test") == reviews.size("test")
    assert few.examples("train")[0] in reviews.examples("train")[:40]
    task = ChatTask("mine", {"train": chat_split(tokenizer, PAIRS, 64, "train")}, tokenizer, 64)
    assert task.limit(train=1).examples("train") == task.examples("train")[:1]
    with pytest.raises(ValueError, match="train=3 is too many; there are 2 examples"):
        task.limit(train=3)
    with pytest.raises(ValueError, match="'mine' has no classes: its labels are tokens"):
        task.labels("train")
    encoded = task.encode(["Two and two?"])
    assert tokenizer.decode(encoded["input_ids"][0]) == task.render({"prompt": TALK[:1]})
    with pytest.raises(TypeError, match="texts must be a list of strings"):
        task.encode("Two and two?")


PAIRS = [(TALK[:1], TALK[1:2]), (TALK[:3], TALK[3:])]


def test_an_answer_is_never_cut(tokenizer):
    ids = pair_tokens(tokenizer, *PAIRS[1])[1]
    # The line end after the end token is the last token, and may go.
    split = chat_split(tokenizer, PAIRS, len(ids) - 1, "train")
    assert split.tokens[1] == tuple(ids[:-1])
    with pytest.raises(
        ValueError, match=r"train\[1\]: its answer ends at token \d+ of .*would cut"
    ):
        chat_split(tokenizer, PAIRS, len(ids) - 2, "train")
    with pytest.raises(ValueError, match=r"reviews train\[\d+\]: its answer .*max_length=40"):
        load_task("reviews", tokenizer, max_length=40)


def test_definitions_answer_what_a_noun_means(tokenizer):
    task = load_task("definitions", tokenizer)
    wordnet = load_task("wordnet")
    assert [task.size(split) for split in task.splits] == [wordnet.size(s) for s in task.splits]
    first = task.examples("test")[0]
    assert first["prompt"] == [user('What does "reminder" mean?')]
    assert first["completion"] == [assistant("A message that helps you remember something.")]
    assert "prompts and answers" in repr(task)


def test_questions_and_sentences():
    assert question("crepe_Suzette") == 'What does "crepe Suzette" mean?'
    assert question("Jane_Austen") == "Who or what is Jane Austen?"
    assert sentence("(law) a pledge") == "(Law) a pledge."
    assert sentence("really?") == "Really?" and sentence("`the' in English") == "`The' in English."


def test_a_tokenizer_without_a_template_is_refused():
    for name in ("reviews", "definitions"):
        with pytest.raises(ValueError, match="no chat template"):
            load_task(name, load_tokenizer("tinylm"))


# ------------------------------------------------------------------ preferences

ROWS = [
    {
        "split": "train",
        "prompt": "Two and two?",
        "chosen": "Four.",
        "rejected": "Well, let us see.",
    },
    {"split": "train", "prompt": "And three?", "chosen": "It is seven.", "rejected": "Six"},
    {"split": "validation", "prompt": "Hi.", "chosen": "Hello.", "rejected": "What?"},
    {"split": "test", "prompt": "Größe?", "chosen": "1,80 m.", "rejected": '"Groß"'},
]


@pytest.fixture
def preferences(tmp_path, monkeypatch, tokenizer):
    """Load the preferences from a data folder with these rows."""

    def load(rows, columns=("split", "prompt", "chosen", "rejected"), **options):
        file = tmp_path / "tasks/preferences/pairs.csv.bz2"
        file.parent.mkdir(parents=True, exist_ok=True)
        with bz2.open(file, "wt", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        entry = {"bytes": file.stat().st_size, "sha256": "", "rebuild": "python build.py"}
        listed = {"tasks/preferences/pairs.csv.bz2": entry}
        (tmp_path / "checksums.json").write_text(json.dumps(listed), encoding="utf-8")
        monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
        return load_task("preferences", tokenizer, **options)

    assert tokenizer and data_folder() != tmp_path  # the tokenizer is read from the real folder
    return load


def test_preferences_hold_the_chosen_answers_first(preferences, tokenizer):
    task = preferences(ROWS)
    assert isinstance(task, PreferenceTask)
    assert [task.size(split) for split in ("train", "validation", "test")] == [2, 1, 1]
    assert task.examples("train")[0] == {
        "prompt": [user("Two and two?")],
        "chosen": [assistant("Four.")],
        "rejected": [assistant("Well, let us see.")],
    }
    batch = next(task.batches("train", 2))
    assert {len(value) for value in batch.values()} == {4} and len(batch) == 3
    answers = [
        learned(tokenizer, ids.tolist(), labels.tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    expected = ["Four.", "It is seven.", "Well, let us see.", "Six"]
    assert answers == [[f"{answer}{tokenizer.eos_token}"] for answer in expected]
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
    shuffled = next(task.batches("train", 2, seed=1))["input_ids"]
    assert sorted(shuffled.tolist()) == sorted(batch["input_ids"].tolist())
    assert len(next(task.stream(1, seed=0))["labels"]) == 2
    assert task.limit(train=1).examples("train") == task.examples("train")[:1]
    assert "train 2" in repr(task) and "SmolLM2-135M-Instruct (Apache-2.0)" in task.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "Four."}, "row 0: chosen and rejected are equal, .*'Four.'"),
        ({"split": "dev"}, r"row 0: split 'dev' must be one of \('train'"),
        ({"chosen": ""}, r"preferences train, chosen\[0\]: .*message 0 is an empty answer"),
        ({"rejected": "no " * 600}, r"train, rejected\[0\]: its answer ends .*max_length=512"),
    ],
)
def test_wrong_preferences_are_refused(preferences, change, message):
    with pytest.raises(ValueError, match=message):
        preferences([ROWS[0] | change, *ROWS[1:]])


def test_preferences_without_a_column_or_a_file(preferences, tmp_path, monkeypatch, tokenizer):
    with pytest.raises(ValueError, match=r"lacks the columns rejected: it has \['split'"):
        preferences(ROWS, columns=("split", "prompt", "chosen"))
    (tmp_path / "tasks/preferences/pairs.csv.bz2").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs.csv.bz2 is missing.*python build.py"):
        load_task("preferences", tokenizer)
