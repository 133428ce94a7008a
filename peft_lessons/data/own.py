"""Read a file of one's own conversations, and check all of it before anything is trained.

A row is an input–output pair {"prompt": "...", "completion": "..."} or a conversation
{"messages": [{"role": "user", "content": "..."}, ...]}, with "split" if the file says itself what
is tested. A .jsonl file has a JSON object a line, a .csv file the columns prompt and completion.
Texts and lists of messages are accepted for both parts of a pair, as in TRL.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import chat

SPLITS = ("train", "validation", "test")
SHOWN = 5  # problems that a message lists
FORMATS = (".jsonl", ".csv")
PAIR = '{"prompt": "...", "completion": "..."}'
HALF = re.compile("[\ud800-\udfff]")  # JSON can spell half an emoji, and no tokenizer reads it
CONVERSATION = '{"messages": [{"role": "user", "content": "..."}, ...]}'


class Problems:
    """Collect what is wrong with a file, line by line, for one message."""

    def __init__(self, file: Path):
        self.name, self.found = file.name, {}

    def add(self, line: int | None, text: str) -> None:
        """Note a problem of a line, or of the whole file."""
        self.found.setdefault(text, []).append(line)

    def listed(self) -> str:
        """Return the problems in the order of their lines, one each, equal ones together."""
        found = [(lines, text) for text, lines in self.found.items()]
        found.sort(key=lambda problem: problem[0][0] or 0)
        told = [f"{self.place(lines)}: {text}" for lines, text in found[:SHOWN]]
        if len(found) > SHOWN:
            told.append(f"and {len(found) - SHOWN} more")
        return "\n".join(told)

    def place(self, lines: Sequence[int | None]) -> str:
        """Return "file, line 7", or "file, lines 3, 7 and 9"."""
        if lines[0] is None:
            return self.name
        if len(lines) == 1:
            return f"{self.name}, line {lines[0]}"
        most = lines[: SHOWN if len(lines) > SHOWN else -1]
        last = f"{len(lines) - SHOWN} more" if len(lines) > SHOWN else lines[-1]
        return f"{self.name}, lines {', '.join(map(str, most))} and {last}"

    def refuse(self) -> None:
        """Raise ValueError if there are problems."""
        if self.found:
            raise ValueError(self.listed())


def is_file(name) -> bool:
    """Return whether the name of a task is meant as a file: a path, or a text with an ending."""
    text = isinstance(name, str) and (Path(name).suffix or {"/", "\\"} & set(name))
    return isinstance(name, os.PathLike) or bool(text)


def _text_of(file: Path) -> str:
    """Return the text of a file. Raises FileNotFoundError or ValueError with the remedy."""
    if file.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{file.name} is no .jsonl or .csv file: save your rows as .jsonl, an object a line "
            f"({PAIR}), or as .csv with the columns prompt and completion"
        )
    if not file.is_file():
        beside = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
        near = [p.name for p in beside if p.suffix in FORMATS or p.name.startswith(file.stem)]
        there = f"; the folder has {', '.join(near[:SHOWN])}" if near else ""
        raise FileNotFoundError(f"there is no file {file.resolve()}{there}")
    raw = file.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:2]:
        raise ValueError(
            f"{file.name} is in UTF-16: save it as UTF-8 (in Excel “CSV UTF-8”, in Notepad "
            "“Encoding: UTF-8”)"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{file.name}, line {line}: the byte {raw[error.start]:#x} is not UTF-8: save the file "
            "as UTF-8 (in Excel “CSV UTF-8”)"
        ) from None


def _json_hint(text: str) -> str:
    if re.search(r",\s*[}\]]|[}\]]\s*,\s*$", text):
        return "; remove the comma before or after the closing bracket"
    if re.match(r"\s*\{\s*'", text):
        return '; JSON has double quotes ("): write the rows with json.dumps'
    if text.strip() in ("{", "}"):
        return "; each object must stand on one line: write the rows with json.dumps"
    return ""


def _json_rows(text: str, problems: Problems) -> list[tuple[int, dict]]:
    rows = []
    if text.lstrip().startswith("["):
        problems.add(
            None,
            "the file is one JSON list, and a .jsonl file has an object on each line: write the "
            "rows with json.dumps, without brackets around them and commas between them",
        )
        return rows
    for line, one in enumerate(text.split("\n"), 1):
        if not one.strip():
            continue
        try:
            row = json.loads(one)
        except json.JSONDecodeError as error:
            at = f"{error.msg.lower()} at column {error.colno}"
            problems.add(line, f"not valid JSON ({at}){_json_hint(one)}")
            continue
        if isinstance(row, dict):
            rows.append((line, row))
        else:
            problems.add(line, f"{one.strip()!r:.40} is no object such as {PAIR}")
    return rows


def _csv_rows(text: str, problems: Problems) -> list[tuple[int, dict]]:
    header_line = text.split("\n", 1)[0]
    mark = next((mark for mark in ",;\t" if mark in header_line), ",")  # Excel's list separator
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True
    )
    rows, header, line = [], [], 1
    try:
        for cells in reader:
            if not header:
                header = [name.strip().lower() for name in cells]
            elif cells and len(cells) != len(header):
                problems.add(
                    line,
                    f"{len(cells)} cells, and the header has {len(header)}: put texts that contain "
                    f"{mark!r} in double quotes",
                )
            elif cells:
                rows.append((line, dict(zip(header, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(
            line, f"not valid CSV ({error}): double quotes around a cell, and twice inside of it"
        )
    missing = [name for name in ("prompt", "completion") if name not in header]
    if header and missing:
        problems.add(
            1,
            f"the header has no column {' and no column '.join(missing)}, but {', '.join(header)}: "
            "the first line must name the columns prompt and completion",
        )
        return []
    return rows


def _numbered(file: Path, problems: Problems) -> list[tuple[int, dict]]:
    """Return the rows of a file with the number of the line on which each begins."""
    text = _text_of(file)
    rows = (_csv_rows if file.suffix.lower() == ".csv" else _json_rows)(text, problems)
    if not rows and not problems.found:
        problems.add(None, "the file is empty")
    return rows


def read_rows(file: str | os.PathLike) -> list[dict]:
    """Return the rows of a .jsonl or .csv file as dictionaries, in their order, as they stand.

    Raises FileNotFoundError for no such file, ValueError with file and line for a file that is not
    UTF-8, not JSON, or not CSV."""
    file = Path(file).expanduser()
    problems = Problems(file)
    rows = _numbered(file, problems)
    problems.refuse()
    return [row for _, row in rows]


def _messages(value, role: str, what: str) -> list[dict]:
    """Return a part of a pair, a text or messages, as messages. Raises ValueError with the
    remedy."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        kind = "empty (null)" if value is None else f"{value!r:.40}, not a text"
        quotes = f': write it in double quotes, "{value}"' if isinstance(value, int | float) else ""
        raise ValueError(f'"{what}" is {kind}{quotes}')
    if not value:
        raise ValueError(f'"{what}" has no messages')
    for number, message in enumerate(value, 1):
        where = f'message {number} of "{what}"' if len(value) > 1 else f'"{what}"'
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f'{where} must be {{"role": "...", "content": "..."}}: {message!r:.60}'
            )
        if message["role"] not in chat.ROLES:
            raise ValueError(
                f"{where} has the role {message['role']!r}: the roles are {', '.join(chat.ROLES)}"
            )
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"{where} has no text: {message['content']!r:.40}")
        if half := HALF.search(message["content"]):
            raise ValueError(f"{where} holds half a character, {half[0]!r}: write it whole, or not")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _pair(row: Mapping) -> tuple[list[dict], list[dict]]:
    """Return prompt and completion of a row as messages. Raises ValueError for what is wrong.

    The completion of a conversation begins with the first answer, so that every answer is
    learned."""
    pair, has_messages = {"prompt", "completion"} & set(row), "messages" in row
    if has_messages == bool(pair) or (pair and len(pair) < 2):
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"the keys are {keys}: a row is {PAIR} or {CONVERSATION}")
    if has_messages:
        if not isinstance(row["messages"], list):
            raise ValueError(f'"messages" is {row["messages"]!r:.40}, not a list of messages')
        messages = _messages(row["messages"], "user", "messages")
        start = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        prompt, completion = messages[:start], messages[start:]
    else:
        prompt = _messages(row["prompt"], "user", "prompt")
        completion = _messages(row["completion"], "assistant", "completion")
    roles = [message["role"] for message in (*prompt, *completion)]
    talk = roles[roles[0] == "system" :]  # user and assistant in turn, the last word an answer
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        raise ValueError(
            f"the roles are {', '.join(roles)}: after one system message at most, user and "
            "assistant take turns, and the assistant has the last word"
        )
    if completion[0]["role"] != "assistant":
        raise ValueError('"completion" must begin with the assistant\'s answer')
    return prompt, completion


def same_prompt(messages: Sequence[Mapping]) -> str:
    """Return what equal prompts share: their text without regard to case and white space."""
    return "\n".join(" ".join(m["content"].split()).casefold() for m in messages)


def _refuse_splits(rows: list[tuple[int, dict]], problems: Problems) -> None:
    """Note what is wrong with the splits that a file declares itself."""
    found = {line: row.get("split") for line, row in rows}
    for line, split in found.items():
        if split not in SPLITS:
            told = f"the split {split!r}" if split else "no split, and other lines have one"
            problems.add(line, f"{told}: it must be {', '.join(SPLITS)}, in all lines or in none")
    for split in ("train", "test"):
        if split not in found.values():
            problems.add(
                None, f'no line has the split "{split}": add one, or leave "split" out of all lines'
            )


def _compare(rows: list[tuple], problems: Problems) -> None:
    """Note prompts that stand in two splits; warn of prompts that have two answers."""
    first, two = {}, []
    for line, prompt, completion, split in rows:
        key, answer = same_prompt(prompt), [m["content"].strip() for m in completion]
        line_before, answer_before, split_before = first.setdefault(key, (line, answer, split))
        if split != split_before:
            problems.add(
                line,
                f"the prompt of line {line_before} again, up to case and white space, here in "
                f"{split} and there in {split_before}: keep both in one split, or you test on text "
                "that was trained",
            )
        if answer != answer_before:
            two.append(f"{line_before} and {line}")
    if two:
        warnings.warn(
            f"{problems.name}: the same prompt has different answers in lines "
            f"{', '.join(two[:SHOWN])}{f' and {len(two) - SHOWN} more' if two[SHOWN:] else ''}. "
            "Keep both if you mean both; to score against one right answer, keep one",
            stacklevel=5,
        )


def _divided(rows: list[tuple], share: float, seed: int, problems: Problems) -> list[str]:
    """Return the split of each row: equal prompts are on one side, a share of them is tested."""
    keys = list(dict.fromkeys(same_prompt(prompt) for _, prompt, _, _ in rows))
    if len(keys) < 2:
        problems.add(None, "only one prompt, and a file needs one to train and another to test")
        problems.refuse()
    count = min(max(1, round(share * len(keys))), len(keys) - 1)
    tested = set(random.Random(seed).sample(keys, count))
    return ["test" if same_prompt(prompt) in tested else "train" for _, prompt, _, _ in rows]


def read_splits(
    file: str | os.PathLike,
    encode: Callable[[list[dict], list[dict], str], tuple],
    share: float | None = None,
    seed: int | None = None,
) -> dict[str, list[tuple]]:
    """Return {split: [what `encode` makes of prompt, completion and "row", ...]} of a file.

    Prompts that are equal up to case and white space stand in one split. `share` (0.2) is the part
    of the different prompts that is tested, drawn by `seed` (0); a file that names its splits
    needs neither. `encode` may raise ValueError, with "row" for the place.

    Raises FileNotFoundError for no such file; ValueError with up to five problems of the file, each
    with its line. Warns of prompts with two answers."""
    file = Path(file).expanduser()
    problems = Problems(file)
    pairs, encoded = [], []
    numbered = _numbered(file, problems)
    declared = any("split" in row for _, row in numbered)
    if declared and (share, seed) != (None, None):
        raise ValueError(f"{file.name} names its splits itself: leave out share and seed")
    share = 0.2 if share is None else share
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    for line, row in numbered:
        try:
            prompt, completion = _pair(row)
            encoded.append(encode(prompt, completion, "row"))
            pairs.append((line, prompt, completion, row.get("split")))
        except ValueError as error:
            problems.add(line, str(error).removeprefix("row: "))
    if declared:
        _refuse_splits(numbered, problems)
    _compare(pairs, problems)
    problems.refuse()
    sides = [split for *_, split in pairs]
    if not declared:
        sides = _divided(pairs, share, seed or 0, problems)
    return {
        split: [row for row, side in zip(encoded, sides, strict=True) if side == split]
        for split in SPLITS
        if split in sides
    }
