"""A file of one's own: pairs and conversations, splits without leaks, and what each fault says."""

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
from tiny import chat_tokenizer

from peft_lessons import load_task
from peft_lessons.data.chat import assistant, user
from peft_lessons.data.own import read_rows
from peft_lessons.data.tasks import ChatTask


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def pair(k: int, **more) -> dict:
    return {"prompt": f"Question {k}?", "completion": f"Answer {k}."} | more


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load the task of a file with this content: rows, a text, or bytes."""

    def load_content(content, name="my.jsonl", **options):
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        return load_task(tmp_path / name, tokenizer, **options)

    return load_content


def asked(task, split: str) -> list[str]:
    return [example["prompt"][-1]["content"] for example in task.examples(split)]


def answers(task, *splits: str) -> list[str]:
    return [example["completion"][-1]["content"] for s in splits for example in task.examples(s)]


# ------------------------------------------------------------------ files that are right


def test_a_file_of_forty_lines_is_a_task(load):
    task = load([pair(k) for k in range(40)])
    assert isinstance(task, ChatTask) and task.name == "my.jsonl"
    assert (task.splits, task.size("train"), task.size("test")) == (("train", "test"), 32, 8)
    assert task.examples("train")[0] == {
        "prompt": [user("Question 0?")],
        "completion": [assistant("Answer 0.")],
    }
    batch = next(task.batches("train", 4))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"] != -100).any(dim=1).all()


def test_a_path_may_be_a_text_in_the_working_folder(load, tmp_path, tokenizer, monkeypatch):
    load([pair(k) for k in range(4)])
    monkeypatch.chdir(tmp_path)
    assert load_task("my.jsonl", tokenizer).size("train") == 3
    assert read_rows("my.jsonl") == [pair(k) for k in range(4)]


def test_every_answer_of_a_conversation_is_learned(load, tokenizer):
    system = {"role": "system", "content": "Be brief."}
    talk = [system, user("Two and two?"), assistant("Four."), user("And three?"), assistant("7.")]
    task = load([{"messages": talk}, pair(1)])
    (example,) = [e for s in task.splits for e in task.examples(s) if e["prompt"][0] == system]
    assert example == {"prompt": talk[:2], "completion": talk[2:]}
    (split,) = [s for s in task.splits if example in task.examples(s)]
    (labels,) = next(task.batches(split))["labels"]
    end = tokenizer.eos_token
    assert tokenizer.decode([i for i in labels if i != -100]) == f"Four.{end}7.{end}"


def test_what_a_task_shows_can_be_saved_and_loaded_again(load):
    task = load([pair(k) for k in range(5)])
    rows = [example | {"split": s} for s in task.splits for example in task.examples(s)]
    again = load(rows)
    assert [again.examples(s) for s in again.splits] == [task.examples(s) for s in task.splits]


def test_a_file_may_name_its_splits(load):
    splits = ["train", "test", "validation", "train"]
    task = load([pair(k, split=split, source="x") for k, split in enumerate(splits)])
    assert task.splits == ("train", "validation", "test")
    assert answers(task, "train") == ["Answer 0.", "Answer 3."]


def test_a_table_of_excel_is_read(load):
    text = 'Prompt;Completion\r\n"Two; or\r\nthree?";007\r\n\r\n"He said ""no"".";nein\r\n'
    task = load(b"\xef\xbb\xbf" + text.encode(), "my.csv")
    rows = {e["prompt"][0]["content"]: e["completion"][0]["content"] for s in task.splits
            for e in task.examples(s)}  # fmt: skip
    assert rows == {"Two; or\r\nthree?": "007", 'He said "no".': "nein"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_line_ends_and_marks_of_windows_change_nothing(load, end):
    rows = [pair(1), pair(2) | {"prompt": "Is \u2028 a line?"}]
    text = (end or "\n").join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    assert load(b"\xef\xbb\xbf" + text.encode()).size("train") == 1


# ------------------------------------------------------------------ splits without leaks


def test_equal_prompts_stay_on_one_side_and_the_draw_depends_on_the_seed(load):
    copies = ["QUESTION {}?", "question  {}?", " Question\t{}?\n"]
    rows = [pair(k) for k in range(20)]
    rows += [pair(k, prompt=copies[k % 3].format(k)) for k in range(12)]
    drawn = []
    for seed in range(4):
        task = load(rows, share=0.3, seed=seed)
        sides = [{" ".join(p.lower().split()) for p in asked(task, s)} for s in ("train", "test")]
        assert not sides[0] & sides[1] and len(sides[1]) == 6
        assert task.size("train") + task.size("test") == 32
        assert answers(task, "test") == answers(load(rows, share=0.3, seed=seed), "test")
        drawn.append(tuple(answers(task, "test")))
    assert len(set(drawn)) > 1
    assert load(rows, share=0.001).size("test") >= 1 <= load(rows, share=0.999).size("train")


def test_a_prompt_in_two_splits_is_refused(load):
    rows = [pair(1, split="train"), pair(2, split="test"), pair(1, split="test")]
    rows[2]["prompt"] = "question  1?"
    with pytest.raises(ValueError, match=r"^my.jsonl, line 3: the prompt of line 1 again, "):
        load(rows)


def test_a_prompt_with_two_answers_is_a_warning(load):
    with pytest.warns(UserWarning, match=r"different answers in lines 1 and 3\. ") as caught:
        task = load([pair(1), pair(2), pair(1, completion="Another."), pair(2)])
    assert Path(caught[0].filename).name == Path(__file__).name
    assert sorted(map(task.size, task.splits)) == [2, 2]


def test_share_and_seed_are_for_files_without_splits(load, tokenizer):
    named = [pair(1, split="train"), pair(2, split="test")]
    with pytest.raises(ValueError, match=r"names its splits itself: leave out share and seed"):
        load(named, seed=1)
    for share in (0, 1, 40, True, "half"):
        with pytest.raises(ValueError, match=r"share must be between 0 and 1, got"):
            load([pair(1), pair(2)], share=share)
    with pytest.raises(ValueError, match=r"the splits of 'reviews' are fixed"):
        load_task("reviews", tokenizer, share=0.5)


# ------------------------------------------------------------------ what each fault says

GOOD, TURN = json.dumps(pair(0)), [user("Hi."), assistant("Hello.")]
LINES = {  # a line, and what the error says of it
    '{"prompt": "a", "completion": "b",}': "not valid JSON .*remove the comma before or",
    '{"prompt": "a", "completion": "b"},': "not valid JSON .*remove the comma .*after the",
    "{'prompt': 'a', 'completion': 'b'}": "not valid JSON .*double quotes",
    '{"prompt": "a", "completion"': "not valid JSON .* at column 29",
    "{": "each object must stand on one line",
    '"prompt"': "is no object such as",
    '{"question": "a", "answer": "b"}': "the keys are 'question', 'answer': a row is {\"prompt",
    '{"prompt": "a"}': "the keys are 'prompt'",
    '{"prompt": "a", "completion": "b", "messages": []}': "the keys are",
    '{"prompt": "a", "completion": 5}': '"completion" is 5, not a text: .* in double quotes, "5"',
    '{"prompt": "a", "completion": NaN}': '"completion" is nan, not a text',
    '{"prompt": "a", "completion": null}': r'"completion" is empty \(null\)',
    '{"prompt": "a", "completion": " "}': "\"completion\" has no text: ' '",
    r'{"prompt": "a \ud83d", "completion": "b"}': r"\"prompt\" holds half a character, '.ud83d'",
    '{"prompt": "", "completion": "b"}': "\"prompt\" has no text: ''",
    '{"prompt": [], "completion": "b"}': '"prompt" has no messages',
    '{"messages": "hello"}': "'hello', not a list of messages",
    json.dumps({"messages": [*TURN, {"role": "bot", "content": "x"}]}): "message 3 .* role 'bot': "
    "the roles are system, user, assistant",
    json.dumps({"messages": [{"from": "human", "value": "x"}]}): "must be .*role.*content",
    json.dumps({"messages": TURN[:1]}): "the roles are user: .* the last word",
    json.dumps({"messages": TURN[::-1]}): "the roles are assistant, user: ",
    json.dumps({"messages": [*TURN, TURN[1]]}): "user, assistant, assistant: .*take turns",
    json.dumps(
        {"messages": [TURN[0], {"role": "assistant", "content": ""}]}
    ): "message 2 .* has no text",
    json.dumps({"prompt": TURN, "completion": TURN}): '"completion" must begin with',
    json.dumps(pair(1, prompt="user<eos>")): "contains '<eos>', which the chat",
    json.dumps(pair(1, completion="far " * 600)): "its answer ends at token .* max_length=512",
    "[1, " + "\x00]": "not valid JSON",
}


@pytest.mark.parametrize("line", LINES)
def test_an_error_names_file_and_line(load, line):
    with pytest.raises(ValueError, match=rf"^my.jsonl, line 2: .*{LINES[line]}"):
        load(f"{GOOD}\n{line}\n{json.dumps(pair(9))}\n")


CSV = {
    "prompt,completion\na,b,c\n": "line 2: 3 cells, and the header has 2",
    'prompt,completion\n"a\nb",c\nd\n': "line 4: 1 cells",
    'prompt,completion\na,b\n"c,d\n': "line 3: not valid CSV",
    "prompt,completion\na,\n": 'line 2: "completion" has no text',
    "": "the file is empty",
    "prompt,completion\n": "the file is empty",
    "a,b\nc,d\n": "line 1: the header has no column prompt and no column completion, but a, b",
    "prompt,split\na,train\n": "line 1: the header has no column completion",
    "prompt,completion,split\na,b,train\nc,d,\n": "line 3: no split",
    "prompt,completion,split\na,b,train\nc,d,dev\n": "line 3: the split 'dev': it must be train, ",
}


@pytest.mark.parametrize("text", CSV)
def test_an_error_in_a_table_names_file_and_line(load, text):
    with pytest.raises(ValueError, match=rf"(?m)^my.csv[,:] {CSV[text]}"):
        load(text, "my.csv")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "^my.jsonl: the file is empty"),
        (b"\n \n", "^my.jsonl: the file is empty"),
        (b"\xef\xbb\xbf", "^my.jsonl: the file is empty"),
        (f"[{GOOD},\n{GOOD}]".encode(), "^my.jsonl: the file is one JSON list, .* json.dumps"),
        (GOOD.encode(), "^my.jsonl: only one prompt"),
        (GOOD.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "is in UTF-16"),
        (f"{GOOD}\n{GOOD}é".encode("latin-1"), "my.jsonl, line 2: the byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(load, content, said):
    with pytest.raises(ValueError, match=said):
        load(content)


def test_all_faults_of_a_file_are_listed_at_once_and_equal_ones_together(load):
    broken = ['{"prompt": "a"}', "{", '{"prompt": "b"}', '{"prompt": "", "completion": "x"}']
    broken += [GOOD, '{"prompt": "c"}', '{"prompt": "d"}', '{"prompt": 1, "completion": "x"}']
    broken += [f'{{"key{k}": 1}}' for k in range(4)]
    with pytest.raises(ValueError) as error:
        load("\n".join(broken))
    lines = str(error.value).split("\n")
    assert lines[0].startswith("my.jsonl, lines 1, 3, 6 and 7: the keys are 'prompt'")
    assert [line.split(":")[0] for line in lines[1:]] == [
        *(f"my.jsonl, line {k}" for k in (2, 4, 8, 9)), "and 3 more"
    ]  # fmt: skip


def test_splits_without_train_or_test_are_refused(load):
    with pytest.raises(ValueError, match=r"^my.jsonl: no line has the split \"test\": add one"):
        load([pair(1, split="train"), pair(2, split="validation")])
    rows = [pair(k, **({"split": "train"} if k == 3 else {})) for k in range(9)]
    said = r"my.jsonl, lines 1, 2, 3, 5, 6 and 3 more: no split, and other lines have one"
    with pytest.raises(ValueError, match=said):
        load(rows)


def test_a_missing_file_is_named_with_what_is_there(load, tmp_path, tokenizer):
    load([pair(1), pair(2)])
    with pytest.raises(FileNotFoundError, match=r"no file .*mine.jsonl; the folder has my.jsonl"):
        load_task(tmp_path / "mine.jsonl", tokenizer)
    (tmp_path / "mine.jsonl.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"the folder has mine.jsonl.txt, my.jsonl"):
        load_task(tmp_path / "mine.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no file .*x.jsonl$"):
        load_task(str(tmp_path / "nowhere" / "x.jsonl"), tokenizer)
    with pytest.raises(ValueError, match=r"my.xlsx is no .jsonl or .csv file: save"):
        load_task("my.xlsx", tokenizer)
    with pytest.raises(ValueError, match=r"there is no task 'mine'; .*files that end in .jsonl"):
        load_task("mine", tokenizer)


def test_a_template_that_does_not_write_the_end_is_refused_once(load, tokenizer, tmp_path):
    other = deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    load([pair(1, completion="Yes."), pair(2, completion="Yes.")])
    with pytest.raises(
        ValueError, match=r"^my.jsonl, lines 1 and 2: the chat template ends an answer"
    ):
        load_task(tmp_path / "my.jsonl", other)


def test_the_first_held_out_messages_of_the_desk_have_each_answer_equally_often(tokenizer):
    task = load_task("desk", tokenizer)
    assert (task.name, task.size("train"), task.size("test")) == ("desk", 48, 72)
    assert "MIT" in task.source
    assert list(Counter(answers(task, "test")[:24]).values()) == [12, 12]
    assert list(Counter(answers(task, "train")[:8]).values()) == [4, 4]
