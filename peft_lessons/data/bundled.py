"""Find the files in data/ and compare them with their recorded checksums.

One model is not bundled: the assistant, whose folder is made by the set-up (`assistant.py`) and has
a list of checksums of its own. `PEFT_LESSONS_DATA` names another data folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BundledFile:
    """Record the state of one file in data/; `intact` is True if its sha256 is the recorded one."""

    path: str
    present: bool
    size: int
    intact: bool


def data_folder() -> Path:
    """Return the folder of bundled files: data/ of this checkout, or $PEFT_LESSONS_DATA."""
    chosen = os.environ.get("PEFT_LESSONS_DATA")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "data"


_RESTORED = (
    "Take it from a fresh copy of the course; in a clone: git checkout -- data/checksums.json"
)


def records() -> dict[str, dict]:
    """Read {path in data/: bytes, sha256 and rebuild command} of every bundled file.

    Raises FileNotFoundError if the list is missing."""
    file = data_folder() / "checksums.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing. {_RESTORED}. Lessons need the whole course; PEFT_LESSONS_DATA can "
            "name a data folder elsewhere."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# `git checkout` alone skips the files, as nothing has changed for git, or converts them again.
_CONVERTED = """its line ends were converted from LF to CRLF, as git for Windows does unless told \
otherwise. Restore the models and tasks with these commands, from the top of the checkout:
    git config core.autocrlf false
    git rm -r -q --cached data/models data/tasks
    git checkout HEAD -- data/models data/tasks
Without git, copy the data folder again with a program that leaves line ends as they are."""


def bundled_files() -> list[BundledFile]:
    """Return path (relative to data/), presence, size and integrity of every bundled file.

    Raises FileNotFoundError if the list of checksums itself is missing."""
    states = []
    for path, entry in records().items():
        file = data_folder() / path
        present = file.is_file()
        intact = present and sha256_of(file) == entry["sha256"]
        states.append(BundledFile(path, present, file.stat().st_size if present else 0, intact))
    return states


def bundled_path(path: str, verify: bool = False) -> Path:
    """Return the path of a bundled file, given relative to data/.

    Raises FileNotFoundError if it is missing, ValueError if its size or, with `verify`, its sha256
    differs from the recorded one; both name the command that rebuilds it. If line ends were
    converted to CRLF, ValueError says so and names the commands that restore the bundled files."""
    file, entry = data_folder() / path, records().get(path)
    if entry is None:
        raise FileNotFoundError(f"{data_folder() / 'checksums.json'} knows no {path}. {_RESTORED}")
    remedy = (
        "Take it from a fresh copy of the course, or rebuild it from the top of the course's "
        f"folder: {entry['rebuild']}"
    )
    if not file.is_file():
        raise FileNotFoundError(f"the bundled file {file} is missing. {remedy}")
    size = file.stat().st_size
    if size != entry["bytes"]:
        with_lf = file.read_bytes().replace(b"\r\n", b"\n")
        if hashlib.sha256(with_lf).hexdigest() == entry["sha256"]:
            raise ValueError(f"the bundled file {file} is damaged: {_CONVERTED}")
        raise ValueError(
            f"the bundled file {file} is damaged: {size} bytes, not {entry['bytes']}. {remedy}"
        )
    if verify and sha256_of(file) != entry["sha256"]:
        raise ValueError(f"the bundled file {file} is damaged: its sha256 is wrong. {remedy}")
    return file


ASSISTANT, ASSISTANT_RECORD = "models/smollm2", "checksums.json"
ASSISTANT_COMMAND = "python course.py assistant"


def assistant_folder(verify: bool = False) -> Path:
    """Return the folder of the assistant, a checkpoint that the set-up fetches once.

    Its own checksums.json lists {file: bytes and sha256}. Raises FileNotFoundError if the folder is
    missing, ValueError if the list or a file is missing or a size or, with `verify`, a sha256
    differs; both name the command that fetches the assistant."""
    folder = data_folder() / ASSISTANT
    fetch = f"Fetch it with a network, from the top of the course's folder: {ASSISTANT_COMMAND}"
    if not folder.is_dir():
        raise FileNotFoundError(f"the assistant is missing: there is no folder {folder}. {fetch}")
    try:
        listed = json.loads((folder / ASSISTANT_RECORD).read_text(encoding="utf-8"))
        damaged = [name for name, entry in listed.items() if _differs(folder / name, entry, verify)]
    except (OSError, ValueError, AttributeError):
        damaged = [ASSISTANT_RECORD]
    if damaged:
        raise ValueError(f"the assistant in {folder} is damaged: {', '.join(damaged)}. {fetch}")
    return folder


def _differs(file: Path, entry: dict, verify: bool) -> bool:
    if not file.is_file() or file.stat().st_size != entry["bytes"]:
        return True
    return verify and sha256_of(file) != entry["sha256"]
