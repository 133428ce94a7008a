"""Bring a student's copy of the course up to date: `python course.py update NEW` runs this file.

A copy has a record of itself in the file `.students-copy`: when it was released, a checksum of each
file, and fingerprints of the source and the outputs of each cell. The record of the old copy says
what the student changed, the record of the new copy says what the course changed. This file comes
from the new copy and runs as a script: python update.py NEW COPY. It imports nothing but the
standard library.

All changes are prepared in the folder `.update` of the copy. Then one file after the other is
replaced. If this is cut short, python update.py --undo COPY puts back what was there.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

COURSE = "peft-lessons"
RECORD = ".students-copy"
LESSONS = "notebooks"
WORK = ".update"
UNDO = "undo.py"  # this script, in WORK while the copy is half old and half new
# These belong to the student's machine, whatever a record says.
NEVER = (".venv", ".git", WORK, "/".join(("data", "models", "smollm2")))
LARGEST = 1_000_000_000  # bytes of one file
NAME = re.compile(r"\.?\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)
DEFINES = re.compile(r"^(?:def|class)\s+(\w+)", re.M)

YOURS = "Yours, from before the update: the course has changed or removed this cell."
NEW_TEXT = "The exercise as the course states it now. Your answer above is as it was."

Cell = dict
Notebook = dict


class CannotUpdate(Exception):
    """The update cannot be done. The message is for the student, and nothing was changed."""


# ------------------------------------------------------------------ the record of a copy


def digest(data: bytes) -> str:
    """Return the checksum of a file; the line ends of a text make no difference."""
    if b"\0" not in data:
        data = data.replace(b"\r\n", b"\n")
    return hashlib.sha256(data).hexdigest()


def _short(value: object) -> str:
    """Return 12 hexadecimal digits that stand for a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _joined(value: object) -> object:
    """Return a part of a notebook in which each text stored as a list of lines is one text."""
    if isinstance(value, dict):
        return {name: _joined(inner) for name, inner in value.items()}
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "".join(value)
    return value


def source(cell: Cell) -> str:
    """Return the source of a cell, with LF as line ends and no white space at its end."""
    return str(_joined(cell.get("source", ""))).replace("\r\n", "\n").rstrip()


def source_digest(cell: Cell) -> str:
    """Return 12 digits that stand for the kind and the source of a cell."""
    return _short([cell["cell_type"], source(cell)])


def output_digest(cell: Cell) -> str:
    """Return 12 digits that stand for what a cell printed and drew."""
    outputs = [_joined(output) for output in cell.get("outputs", [])]
    return _short([(output.get("text"), output.get("data")) for output in outputs])


def record(folder: Path) -> dict:
    """Return the record of a copy that is about to be released."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    data = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {
        "course": COURSE,
        "released": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "files": {name: digest(content) for name, content in data.items()},
        "cells": {
            name: {
                c["id"]: [source_digest(c), output_digest(c)] for c in json.loads(content)["cells"]
            }
            for name, content in data.items()
            if name.endswith(".ipynb")
        },
    }


def read_record(text: bytes) -> dict:
    """Return the record in a stamp file; an empty one where the stamp holds none."""
    with suppress(ValueError):
        stamp = json.loads(text)
        if isinstance(stamp, dict) and stamp.get("course") == COURSE:
            return stamp
    return {"released": "", "files": {}, "cells": {}}


# ------------------------------------------------------------------ the new copy


@contextmanager
def _members(path: Path) -> Iterator[tuple[str | None, Callable[[str], bytes]]]:
    """Yield (the top folder of a copy, a function that reads a file of the copy by its name).

    `path` is a folder or a ZIP file. The top folder is None where there is no copy."""
    if path.is_dir():
        tops = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
        top = next((top for top in tops if (top / RECORD).is_file()), None)
        yield top and str(top), lambda name: (Path(top or path) / name).read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        stamps = [name for name in archive.namelist() if name.split("/")[-1] == RECORD]
        top = min(stamps, key=len).removesuffix(RECORD) if stamps else None

        def read(name: str) -> bytes:
            member = archive.getinfo(f"{top}{name}")
            if stat.S_ISLNK(member.external_attr >> 16) or member.file_size > LARGEST:
                raise CannotUpdate(
                    f"{path} is no copy of the course: {name} is a link or too large."
                )
            return archive.read(member)

        yield top, read


def read_new(path: Path) -> tuple[dict, dict[str, bytes]]:
    """Return the record and the files of a new copy, a folder or a ZIP file.

    Raises CannotUpdate unless the copy is whole and as it was released."""
    again = "Download the ZIP file again." if path.is_file() else "Unpack the ZIP file again."
    name = RECORD
    try:
        with _members(path) as (top, read):
            stamp = read_record(read(RECORD)) if top is not None else {}
            if not stamp.get("files"):
                raise CannotUpdate(
                    f"{path} is no copy of this course, or it is older than the command `update`."
                )
            if unsafe := [n for n in stamp["files"] if not NAME.fullmatch(n) or _is_theirs(n)]:
                raise CannotUpdate(f"{path} is no copy of this course: it would write {unsafe[0]}.")
            data = {RECORD: read(RECORD)}
            for name in stamp["files"]:
                data[name] = read(name)
    except (KeyError, FileNotFoundError, NotADirectoryError):
        raise CannotUpdate(f"{path} is not whole: {name} is missing. {again}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # a damaged file can name a place before its own beginning: EINVAL
        raise CannotUpdate(f"{path} is no ZIP file, or it is not whole. {again}") from None
    changed = [n for n, checksum in stamp["files"].items() if digest(data[n]) != checksum]
    if changed:
        raise CannotUpdate(f"{path} is not as it was released: {changed[0]} differs. {again}")
    return stamp, data


def _is_theirs(name: str) -> bool:
    return any(f"{name}/".lower().startswith(f"{folder}/") for folder in NEVER)


# ------------------------------------------------------------------ one lesson


@dataclass
class Tally:
    """Count what became of a lesson: answers and own cells that stay, cells the course changed."""

    answers: int = 0
    yours: int = 0
    changed: int = 0


def merge_lesson(
    mine: Notebook, new: Notebook, before: dict[str, list[str]]
) -> tuple[Notebook, Tally]:
    """Return the student's lesson with the changes of the course, and what became of the cells.

    `before` is the record of the lesson's cells in the student's copy, {id: [source, outputs]}. It
    is empty for a copy without a record."""
    row = Tally()
    fresh = {cell["id"]: cell for cell in new["cells"]}
    by_id: dict[str, Cell] = {}
    behind: dict[str | None, list[Cell]] = {None: []}  # the student's own cells, by what precedes
    place = None
    for cell, match in zip(mine["cells"], _matches(mine["cells"], fresh, before), strict=True):
        removed = _id(cell) in before and _id(cell) not in fresh
        if match is not None:
            by_id[match] = cell
            place = match
        elif removed and before[_id(cell)][0] == source_digest(cell):
            row.changed += 1  # the student left the cell as it was
        else:
            kept_cell = _own(cell, removed)
            name = "" if _id(kept_cell) in fresh else _id(kept_cell)
            behind.setdefault(place, []).append(kept_cell | {"id": name})
            row.yours += bool(source(kept_cell))
    cells = behind[None]
    for name, cell in fresh.items():
        cells += _one(by_id.get(name), cell, before, row) + behind.get(name, [])
    merged = mine | {
        "cells": _with_ids(cells),
        "metadata": new["metadata"] | mine.get("metadata", {}),
        "nbformat_minor": max(mine.get("nbformat_minor", 0), new["nbformat_minor"]),
    }
    return merged, row


def _id(cell: Cell) -> str:
    """Return a cell's id, which Colab writes into the metadata, or ""."""
    return str(cell.get("id") or cell.get("metadata", {}).get("id", ""))


def _tags(cell: Cell) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def _matches(cells: list[Cell], fresh: dict[str, Cell], before: dict) -> list[str | None]:
    """Return for each of the student's cells the id of the course's cell that it is, or None.

    Cells are matched by id, then by source (a cell that was cut and pasted has another id), then
    exercises by the function that they define."""
    free = dict(fresh)
    ids: list[str | None] = [None] * len(cells)

    def match(test: Callable[[Cell, str, Cell], bool], numbers: range) -> None:
        for number in numbers:
            if ids[number] is None:
                hits = (name for name, cell in free.items() if test(cells[number], name, cell))
                ids[number] = next(hits, None)
                free.pop(ids[number] or "", None)

    def same_source(cell: Cell, name: str, new: Cell) -> bool:
        return source(cell) != "" and source_digest(cell) in (
            source_digest(new),
            before.get(name, [""])[0],
        )

    def same_function(cell: Cell, name: str, new: Cell) -> bool:
        names = DEFINES.findall(source(cell)) if cell["cell_type"] == "code" else []
        return "exercise" in _tags(new) and DEFINES.findall(source(new))[0] in names

    forward = range(len(cells))
    match(lambda cell, name, new: _id(cell) == name, forward)
    match(same_source, forward)
    match(same_function, forward[::-1])  # of several definitions the last one counts in Python
    return ids


def _one(cell: Cell | None, new: Cell, before: dict, row: Tally) -> list[Cell]:
    """Return what takes the place of a cell of the course: `cell` is the student's, `new` ours."""
    exercise = "exercise" in _tags(new)
    then, printed = before.get(_id(cell or new)) or before.get(new["id"]) or ["", ""]
    now = source_digest(new)
    if cell is None:
        if then == now and not {"exercise", "check"} & {*_tags(new)}:
            return []  # the student deleted it
        row.changed += 1
        return [new]
    mine = source_digest(cell)
    if mine == now:
        if printed == output_digest(cell) != output_digest(new):
            cell = cell | {"outputs": new["outputs"]}  # the student has not run it
        return [_kept(cell, new)]
    if mine == then or (not then and exercise and _is_stub(source(cell))):
        row.changed += 1
        return [new]
    if exercise:
        row.answers += 1
        if then in ("", now):
            return [_kept(cell, new)]
        row.changed += 1
        return [_kept(cell, new), _aside(new, NEW_TEXT)]
    if then == now:
        row.yours += 1
        return [_kept(cell, new)]
    row.changed += 1
    if not before:
        return [new]  # nothing says who changed it, and the old notebook is saved
    row.yours += 1
    return [new, _aside(cell, YOURS)]


def _kept(cell: Cell, new: Cell) -> Cell:
    """Return the student's cell with the id and the tags of the course's."""
    metadata = {name: value for name, value in cell.get("metadata", {}).items() if name != "tags"}
    if _tags(new):
        metadata["tags"] = _tags(new)
    return cell | {"id": new["id"], "metadata": metadata}


def _own(cell: Cell, was_ours: bool) -> Cell:
    """Return a cell that the student added, or wrote into one that the course has removed."""
    if not was_ours:
        return cell
    return cell | {"metadata": {}} if "exercise" in _tags(cell) else _aside(cell, YOURS)


def _aside(cell: Cell, note: str) -> Cell:
    """Return a copy of a cell that shows its source below a note and does not run.

    Code becomes a raw cell; in JupyterLab the key Y makes it code again."""
    if cell["cell_type"] == "markdown":
        text = f"*{note}*\n\n{source(cell)}"
        return cell | {"id": "", "metadata": {}, "source": text.splitlines(keepends=True)}
    lines = f"# {note}\n{source(cell)}".splitlines(keepends=True)
    return {"cell_type": "raw", "id": "", "metadata": {}, "source": lines}


def _is_stub(text: str) -> bool:
    """Return whether some source is one function that has a docstring at most and raises."""
    try:
        (function,) = ast.parse(text).body
        *start, last = function.body
    except (SyntaxError, ValueError, AttributeError):
        return False
    return (
        isinstance(last, ast.Raise)
        and "NotImplementedError" in ast.unparse(last)
        and all(isinstance(line, ast.Expr) for line in start)
    )


def _with_ids(cells: list[Cell]) -> list[Cell]:
    """Return the cells; those with no id, or with that of a cell before them, get a new one."""
    seen: set[str] = set()
    done = []
    for cell in cells:
        name, number = cell["id"], 0
        while not name or name in seen:
            name, number = f"yours-{_short([source(cell), number])}", number + 1
        seen.add(name)
        done.append(cell | {"id": name})
    return done


# ------------------------------------------------------------------ the whole copy


@dataclass
class Plan:
    """List what an update does: {name: the new content, or the file to copy}, and what to remove.

    `saved` is the folder for the student's files as they were, "" if the update changes none.
    `recorded` says whether the copy had a record of itself. `broken` names the lessons that could
    not be read, `added` those that the copy did not have."""

    write: dict[str, bytes | Path]
    remove: list[str]
    rows: dict[str, Tally]
    saved: str
    recorded: bool
    broken: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


def notebook(data: bytes) -> Notebook | None:
    """Return the notebook in a file; None where the file holds none."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        nb = json.loads(data.decode("utf-8-sig"))
        if nb["nbformat"] == 4 and all(cell["cell_type"] for cell in nb["cells"]):
            return nb
    return None


def _bytes(nb: Notebook) -> bytes:
    """Return a notebook as Jupyter writes it."""
    try:
        return (json.dumps(nb, indent=1, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, which an output may have
        return (json.dumps(nb, indent=1) + "\n").encode()


def plan(copy: Path, new: dict, data: dict[str, bytes]) -> Plan:
    """Compare a student's copy with a new one, its record and its files; change nothing."""
    stamp = copy / RECORD
    old = read_record(stamp.read_bytes() if stamp.is_file() else b"")
    if new["released"] < old["released"] and new["files"] != old["files"]:
        raise CannotUpdate(
            f"This release is of {new['released'][:10]} and older than your copy, which is of "
            f"{old['released'][:10]}. Ask for the newest one."
        )
    done = Plan({}, [], {}, _free(copy), bool(old["files"]))
    overwritten = []  # what the student changed and the update replaces
    for name, fresh in data.items():
        file = copy / name
        there = file.read_bytes() if file.is_file() else None
        if there == fresh:
            continue
        content: bytes | None = fresh
        untouched = there is None or digest(there) in (old["files"].get(name), digest(fresh))
        mine = notebook(there) if there is not None and name in new["cells"] else None
        lesson = notebook(fresh) if mine else None
        if name in new["cells"] and mine is None:
            (done.added if there is None else done.broken).append(name)
        if mine and lesson:
            merged, row = merge_lesson(mine, lesson, old["cells"].get(name, {}))
            done.rows[name] = row
            if not untouched:
                content = None if merged == mine else _bytes(merged)
        if content is not None:
            done.write[name] = content
            if not untouched and name != RECORD:
                overwritten.append(name)
    for name, checksum in old["files"].items():
        file = copy / name
        gone = name not in new["files"] and NAME.fullmatch(name) and not _is_theirs(name)
        if gone and file.is_file() and digest(file.read_bytes()) == checksum:
            done.remove.append(name)
    inside = copy.resolve()
    for name in [*done.write, *done.remove]:
        if not (copy / name).parent.resolve().is_relative_to(inside):
            raise CannotUpdate(
                f"{copy / name} lies behind a link that leaves your copy: remove it."
            )
    if overwritten:
        saved = {f"{done.saved}/{n.removeprefix(f'{LESSONS}/')}": copy / n for n in overwritten}
        done.write = saved | done.write
    else:
        done.saved = ""
    return done


def _free(copy: Path) -> str:
    """Return the name of a folder for saved files that is not there yet."""
    names = (f"{LESSONS}/before-update-{number}" for number in itertools.count(1))
    return next(name for name in names if not (copy / name).exists())


def carry_out(copy: Path, todo: Plan) -> None:
    """Do what a plan says, or nothing: an error or Ctrl+C puts back what was there."""
    work = copy / WORK
    try:
        for name, content in todo.write.items():
            staged = work / "new" / name
            staged.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy2(content, staged)
            else:
                staged.write_bytes(content)
                if (copy / name).is_file():
                    shutil.copymode(copy / name, staged)
        journal = {name: digest((work / "new" / name).read_bytes()) for name in todo.write}
        journal |= dict.fromkeys(todo.remove, "")
        for name in journal:
            if (copy / name).is_file():
                saved = work / "old" / name
                saved.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(copy / name, saved)
        (work / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
        shutil.copy(__file__, work / "undo.part")
        os.replace(work / "undo.part", work / UNDO)
        # The record comes last: until then a second attempt compares with the old one.
        for name in sorted(todo.write, key=lambda name: (name == RECORD, name == "course.py")):
            _replace(work / "new" / name, copy / name)
        for name in todo.remove:
            (copy / name).unlink()
        (work / UNDO).unlink()
    except BaseException:
        undo(copy)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _replace(file: Path, place: Path) -> None:
    """Move a file to its place. Windows replaces no file that is read-only."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_file():
        place.chmod(place.stat().st_mode | stat.S_IWRITE)
    os.replace(file, place)


def undo(copy: Path) -> bool:
    """Put back what was there before an update that was cut short; return whether there was one."""
    work = copy / WORK
    unfinished = (work / UNDO).is_file()
    if unfinished:
        journal = json.loads((work / "journal.json").read_text(encoding="utf-8"))
        for name, checksum in journal.items():
            place, saved = copy / name, work / "old" / name
            now = digest(place.read_bytes()) if place.is_file() else ""
            # Another one was not replaced yet, or the student has worked on it since.
            if now == checksum and saved.is_file():
                _replace(saved, place)
            elif now == checksum:
                place.unlink()
            for folder in place.relative_to(copy).parents:
                with suppress(OSError):  # not empty
                    (copy / folder).rmdir()
        (work / UNDO).unlink()
    shutil.rmtree(work, ignore_errors=True)
    return unfinished


# ------------------------------------------------------------------ the command


def update(path: Path, copy: Path) -> Plan:
    """Update a student's copy from a new copy of the course, a folder or a ZIP file.

    Raises CannotUpdate if one of the two is not what it should be; then nothing was changed."""
    parts = ("course.py", LESSONS, "peft_lessons")
    if not all((copy / name).exists() for name in parts) or (copy / "tools").exists():
        raise CannotUpdate(f"{copy} is no student's copy of the course.")
    if not os.access(copy, os.W_OK):
        raise CannotUpdate(f"{copy} cannot be written: copy the course to a folder of your own.")
    if undo(copy):
        print("An earlier update was cut short: your copy is again as it was before.")
    new, data = read_new(path)
    todo = plan(copy, new, data)
    if todo.write or todo.remove:
        carry_out(copy, todo)
    return todo


def table(rows: dict[str, Tally]) -> str:
    """Return what became of each lesson that the student or the course changed."""
    lines = [("lesson", "answers kept", "cells of yours kept", "changed by the course")]
    for name, row in rows.items():
        if row != Tally():
            stem = name.removeprefix(f"{LESSONS}/").removesuffix(".ipynb")
            lines.append((stem, str(row.answers), str(row.yours), str(row.changed)))
    return "\n".join(f"{a:24}{b:>14}{c:>21}{d:>23}" for a, b, c, d in lines)


def tell(todo: Plan) -> str:
    """Return what an update did, for the student."""
    if not todo.write and not todo.remove:
        return "Your copy is up to date: nothing was changed."
    lines = [table(todo.rows)] if any(row != Tally() for row in todo.rows.values()) else []
    if todo.added:
        lines.append(f"New in your copy: {', '.join(todo.added)}.")
    lines.append(
        f"Your files as they were before: {todo.saved}."
        if todo.saved
        else "The update changed no file of yours."
    )
    if todo.broken:
        names = ", ".join(todo.broken)
        lines.append(f"Replaced whole, since yours could not be read: {names}.")
    if todo.saved and not todo.recorded:
        lines.append("Cells of the course that you changed, other than exercises, are there only.")
    if "pyproject.toml" in todo.write:
        lines.append("The next start updates the packages and needs a network.")
    lines.append("If JupyterLab is open: File > Reload Notebook from Disk, before you go on.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command; return 0, or 1 after one sentence that says what is wrong."""
    sys.stdout.reconfigure(errors="replace")
    try:
        if argv[0] == "--undo":
            if undo(Path(argv[1])):
                print("An update was cut short: your copy is again as it was before.")
            return 0
        print(tell(update(Path(argv[0]), Path(argv[1]))))
    except CannotUpdate as refused:
        print(f"{refused} Nothing was changed.", file=sys.stderr)
    except OSError as error:
        message = (
            f"{error.filename or argv[-1]}: {error.strerror or error}. Close JupyterLab and other "
        )
        message += "programs that use the file, and try again."
        if error.errno == errno.ENOSPC:
            message = "The disk is full: free some space and try again."
        print(f"{message} Nothing was changed.", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted: nothing was changed.", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
