"""An update brings the course's corrections into a student's copy and keeps the student's work."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from classroom import update
from tools.environment import ROOT

STUB = 'def double(x):\n    """Twice x."""\n    raise NotImplementedError'
ANSWER = STUB.replace("raise NotImplementedError", "return x + x")
LESSON = "notebooks/02_lora.ipynb"


def printing(text):
    return {"outputs": [new_output("stream", text=text)]}


def exercise(source=STUB, **more):
    return new_code_cell(source, metadata={"tags": ["exercise"]}, **more)


# {id: cell} of the lesson as it was handed out first.
FIRST = {
    "title": new_markdown_cell("# LoRA"),
    "lr": new_code_cell("lr = 1e-3", **printing("0.001")),
    "train": new_code_cell("train(lr)", **printing("loss 3")),
    "stub": exercise(),
    "check": new_code_cell("check(double)", metadata={"tags": ["check"]}),
    "end": new_markdown_cell("## Summary"),
}


def lesson(cells):
    """Return a notebook of {id: cell}."""
    nb = new_notebook(cells=[nbformat.from_dict(cell | {"id": i}) for i, cell in cells.items()])
    return json.loads(nbformat.writes(nb))


def record_of(cells):
    return {cell["id"]: [update.source_digest(cell), update.output_digest(cell)] for cell in cells}


def merged(mine, new, first=FIRST, recorded=True):
    """Return the merged cells, [(id, kind, source)], the notebook, and the row of the table."""
    old = lesson(first)["cells"]
    mine = mine if "cells" in mine else lesson(mine)
    nb, row = update.merge_lesson(mine, lesson(new), record_of(old) if recorded else {})
    nbformat.validate(nbformat.from_dict(nb))
    triples = [(c["id"], c["cell_type"], update.source(c)) for c in nb["cells"]]
    again, _ = update.merge_lesson(nb, lesson(new), record_of(lesson(new)["cells"]))
    assert again == nb, "a second time changes nothing"
    return triples, {c["id"]: c for c in nb["cells"]}, (row.answers, row.yours, row.changed)


def sources(triples):
    return [text for _, _, text in triples]


def without(name, cells=FIRST):
    return {i: cell for i, cell in cells.items() if i != name}


# ------------------------------------------------------------------ one lesson


def test_an_answer_and_its_outputs_stay_and_a_corrected_text_comes():
    mine = FIRST | {
        "stub": exercise(ANSWER, execution_count=7),
        "check": FIRST["check"] | printing("right"),
    }
    new = FIRST | {"title": new_markdown_cell("# LoRA, corrected")}
    triples, cells, row = merged(mine, new)
    assert [i for i, _, _ in triples] == [*FIRST] and row == (1, 0, 1)
    assert sources(triples)[0] == "# LoRA, corrected" and sources(triples)[3] == ANSWER
    assert cells["stub"]["execution_count"] == 7 and cells["stub"]["metadata"]["tags"]
    assert update.output_digest(cells["check"]) == update.output_digest(lesson(mine)["cells"][4])


def test_a_cell_that_only_the_student_changed_stays():
    mine = FIRST | {"lr": new_code_cell("lr = 5e-3", **printing("0.005"))}
    triples, cells, row = merged(mine, FIRST | {"end": new_markdown_cell("## The end")})
    assert sources(triples)[1] == "lr = 5e-3" and sources(triples)[-1] == "## The end"
    assert cells["lr"]["outputs"][0]["text"] == ["0.005"] and row == (0, 1, 1)


def test_where_both_changed_a_cell_the_students_follows_and_does_not_run():
    mine = FIRST | {
        "lr": new_code_cell("lr = 5e-3"),
        "title": new_markdown_cell("# LoRA\nmy notes"),
    }
    new = FIRST | {"lr": new_code_cell("lr = 2e-3"), "title": new_markdown_cell("# LoRA 2")}
    triples, _, row = merged(mine, new)
    assert [kind for _, kind, _ in triples[:4]] == ["markdown", "markdown", "code", "raw"]
    assert sources(triples)[0] == "# LoRA 2" and sources(triples)[2] == "lr = 2e-3"
    assert sources(triples)[1] == f"*{update.YOURS}*\n\n# LoRA\nmy notes"
    assert sources(triples)[3] == f"# {update.YOURS}\nlr = 5e-3"
    assert row == (0, 2, 2)


def test_where_both_changed_an_exercise_the_answer_stays_and_the_new_stub_follows():
    stub = STUB.replace("Twice", "Two times")
    triples, _, row = merged(FIRST | {"stub": exercise(ANSWER)}, FIRST | {"stub": exercise(stub)})
    assert triples[3] == ("stub", "code", ANSWER)
    assert triples[4][1:] == ("raw", f"# {update.NEW_TEXT}\n{stub}") and row == (1, 0, 1)
    triples, _, row = merged(FIRST, FIRST | {"stub": exercise(stub)})
    assert sources(triples)[3:5] == [stub, "check(double)"], "nobody had answered"


def test_of_two_answers_without_an_id_the_last_one_counts():
    second = ANSWER.replace("x + x", "2 * x")
    mine = without("stub") | {"a": new_code_cell(ANSWER), "b": new_code_cell(second)}
    _, cells, _ = merged(mine, FIRST)
    assert update.source(cells["stub"]) == second


def test_added_cells_stay_behind_the_cell_that_they_followed():
    added = {"mine": new_code_cell("1 + 1"), "note": new_markdown_cell("mine")}
    top = {"top": new_raw_cell("top")}
    mine = (
        top | {"title": FIRST["title"], "lr": FIRST["lr"]} | added | without("title", without("lr"))
    )
    new = {"title": FIRST["title"], "new": new_code_cell("new()")} | without("title")
    triples, _, row = merged(mine, new)
    assert [i for i, _, _ in triples][:6] == ["top", "title", "new", "lr", "mine", "note"]
    triples, _, row = merged(mine, without("lr"))
    assert [i for i, _, _ in triples][:4] == ["top", "title", "mine", "note"] and row == (0, 3, 1)


def test_a_cell_that_the_course_removed_goes_unless_the_student_changed_it():
    new = without("lr", without("stub"))
    mine = FIRST | {"lr": new_code_cell("lr = 5e-3"), "stub": exercise(ANSWER)}
    triples, cells, row = merged(mine, new)
    assert triples[1][1:] == ("raw", f"# {update.YOURS}\nlr = 5e-3")
    assert triples[3] == ("stub", "code", ANSWER) and not cells["stub"]["metadata"]
    triples, _, row = merged(FIRST, new)
    assert [i for i, _, _ in triples] == [*new] and row == (0, 0, 2)


def test_what_the_student_deleted_stays_away_but_an_exercise_or_a_corrected_cell_comes_back():
    mine = {"title": FIRST["title"]}
    triples, _, _ = merged(mine, FIRST | {"end": new_markdown_cell("## The end")})
    assert [i for i, _, _ in triples] == ["title", "stub", "check", "end"]


def test_an_output_that_the_student_has_not_made_is_the_courses():
    mine = FIRST | {"train": FIRST["train"] | printing("loss 4")}
    new = FIRST | {
        "lr": FIRST["lr"] | printing("1e-3"),
        "train": FIRST["train"] | printing("loss 2"),
    }
    _, cells, _ = merged(mine, new)
    assert cells["lr"]["outputs"][0]["text"] == ["1e-3"]
    assert cells["train"]["outputs"][0]["text"] == ["loss 4"]


def test_cells_that_were_cut_and_pasted_and_notebooks_without_ids_are_recognised():
    pasted = without("lr") | {"abc": FIRST["lr"], "def": exercise(ANSWER)}
    new = FIRST | {"lr": new_code_cell("lr = 2e-3")}
    triples, _, row = merged(without("stub", pasted), new)
    assert [i for i, _, _ in triples] == [*FIRST] and row == (1, 0, 1)
    assert sources(triples)[1] == "lr = 2e-3" and sources(triples)[3] == ANSWER
    colab = lesson(FIRST | {"stub": exercise(ANSWER), "zmine": new_code_cell("1 + 1")})
    colab["nbformat_minor"] = 0
    for number, cell in enumerate(colab["cells"]):
        cell["metadata"]["id"] = f"colab{number}"
        del cell["id"]
    triples, _, row = merged(colab, new)
    assert [i for i, _, _ in triples] == [*FIRST, "colab6"] and row == (1, 1, 1)


def test_an_exercise_with_a_new_id_is_found_by_its_function():
    new = {("renamed" if i == "stub" else i): cell for i, cell in FIRST.items()}
    new["renamed"] = exercise(STUB.replace("Twice", "Two times"))
    triples, _, row = merged(FIRST | {"stub": exercise(ANSWER)}, new)
    assert triples[3] == ("renamed", "code", ANSWER) and row[0] == 1
    triples, _, _ = merged(FIRST, new)
    assert sources(triples) == [update.source(cell) for cell in new.values()]


def test_two_cells_with_one_id_are_told_apart():
    twice = lesson(FIRST)
    twice["cells"].append(dict(twice["cells"][1], source="lr = 9"))
    triples, _, _ = merged(twice, FIRST)
    assert triples[-1][2] == "lr = 9" and triples[-1][0] not in FIRST


def test_a_picture_in_a_students_text_stays_with_it():
    picture = {"a.png": {"image/png": "iVBORw0KGgo="}}
    mine = FIRST | {"title": new_markdown_cell("![](attachment:a.png)", attachments=picture)}
    triples, cells, _ = merged(mine, FIRST | {"title": new_markdown_cell("# LoRA 2")})
    assert cells[triples[1][0]]["attachments"] == picture


def test_without_a_record_answers_and_unknown_cells_stay_and_the_rest_is_the_courses():
    mine = FIRST | {"stub": exercise(ANSWER), "lr": new_code_cell("lr = 5e-3")}
    mine |= {"mine": new_code_cell("1 + 1")}
    new = FIRST | {"stub": exercise(STUB.replace("Twice", "Two times"))}
    triples, _, row = merged(mine, new, recorded=False)
    assert sources(triples)[3] == ANSWER and sources(triples)[1] == "lr = 1e-3"
    assert [i for i, _, _ in triples] == [*FIRST, "mine"] and row == (1, 1, 1)
    triples, _, row = merged(FIRST, new, recorded=False)
    assert "Two times" in sources(triples)[3] and row == (0, 0, 1), "an old stub is no answer"
    begun = exercise(STUB.replace("raise", "y = 2\n    raise"))
    triples, _, row = merged(FIRST | {"stub": begun}, new, recorded=False)
    assert "y = 2" in sources(triples)[3] and row[0] == 1


# ------------------------------------------------------------------ a copy on the disk


def hand_out(folder, cells=FIRST, files=None, released="2026-01-01", recorded=True):
    """Write a small copy of the course and its ZIP file, whose path is returned."""
    folder.mkdir(parents=True)
    own = ("course.py", "peft_lessons/commands.py")
    inner = {name: (ROOT / name).read_text(encoding="utf-8") for name in own}
    inner["README.md"] = "read\n"
    inner["pyproject.toml"] = "[project]\n"
    inner["peft_lessons/data/update.py"] = Path(update.__file__).read_text(encoding="utf-8")
    inner[LESSON] = json.dumps(lesson(cells), indent=1) + "\n"
    for name, text in (inner | (files or {})).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    stamp = update.record(folder) | {"released": released}
    (folder / update.RECORD).write_text(json.dumps(stamp) if recorded else "", encoding="utf-8")
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))


def write_lesson(copy, cells, name=LESSON):
    (copy / name).write_text(json.dumps(lesson(cells), indent=1), encoding="utf-8")


def read_sources(copy, name=LESSON):
    return [update.source(c) for c in json.loads((copy / name).read_bytes())["cells"]]


def tree(copy):
    return {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()}


NEW = FIRST | {"title": new_markdown_cell("# LoRA, corrected")}
GONE = {"peft_lessons/old.py": "old\n", "peft_lessons/older.py": "older\n"}


@pytest.fixture
def copy(tmp_path):
    """Return a copy in which a student has worked, with the ZIP file of a correction beside it."""
    copy = tmp_path / "my course" / "peft-lessons"
    hand_out(copy, files=GONE)
    write_lesson(copy, FIRST | {"stub": exercise(ANSWER)})
    for name in ("notebooks/02_lora (1).ipynb", "notebooks/adapter/adapter_model.safetensors",
                 ".venv/pyvenv.cfg", "data/models/smollm2/model.safetensors"):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("mine", encoding="utf-8")
    hand_out(tmp_path / "new" / "peft-lessons", NEW, {"peft_lessons/new.py": "1\n"}, "2026-02-01")
    return copy


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new" / "peft-lessons.zip"


def test_a_copy_gets_the_new_files_and_keeps_the_students(copy, new):
    (copy / "README.md").write_text("read, and my notes\n", encoding="utf-8")
    (copy / "peft_lessons/older.py").write_text("mine\n", encoding="utf-8")
    before = tree(copy)
    todo = update.update(new, copy)
    after = tree(copy)
    assert read_sources(copy)[0] == "# LoRA, corrected" and read_sources(copy)[3] == ANSWER
    assert after["README.md"] == b"read\n" and after["peft_lessons/new.py"] == b"1\n"
    saved = {f"notebooks/before-update-1/{n}": before[m] for n, m in
             (("02_lora.ipynb", LESSON), ("README.md", "README.md"))}  # fmt: skip
    assert saved.items() <= after.items()
    assert "peft_lessons/old.py" not in after, "the course removed what nobody had changed"
    ours = {LESSON, "README.md", update.RECORD, "peft_lessons/old.py"}
    assert {n: t for n, t in before.items() if n not in ours}.items() <= after.items()
    assert set(after) - set(before) == {*saved, "peft_lessons/new.py"}
    message = update.tell(todo)
    assert message.splitlines()[1].split() == ["02_lora", "1", "0", "1"]
    assert "notebooks/before-update-1." in message and message.isascii()


def test_twice_in_a_row_is_no_harm_and_a_later_correction_counts_its_own_folder(
    copy, new, tmp_path
):
    update.update(new, copy)
    first = tree(copy)
    assert update.tell(update.update(new, copy)) == "Your copy is up to date: nothing was changed."
    assert tree(copy) == first
    third = hand_out(tmp_path / "third", FIRST, {"peft_lessons/new.py": "1\n"}, "2026-03-01")
    assert update.update(third, copy).saved == "notebooks/before-update-2"
    assert read_sources(copy)[0] == "# LoRA" and read_sources(copy)[3] == ANSWER


def test_a_folder_serves_as_a_zip_file_does_and_a_lesson_that_is_missing_comes(copy, new):
    (copy / LESSON).unlink()
    assert not update.update(new.parent, copy).saved
    assert (copy / LESSON).read_bytes() == (new.with_suffix("") / LESSON).read_bytes()


def test_a_copy_without_a_record_keeps_the_answers(copy, new):
    (copy / update.RECORD).write_text("", encoding="utf-8")
    assert "you changed, other than exercises, are there" in update.tell(update.update(new, copy))
    assert read_sources(copy)[3] == ANSWER and (copy / "peft_lessons/old.py").exists()
    assert read_sources(copy, "notebooks/before-update-1/02_lora.ipynb")[3] == ANSWER
    assert json.loads((copy / update.RECORD).read_bytes())["released"] == "2026-02-01"


def test_line_ends_of_windows_are_no_change_of_the_students(copy, new):
    write_lesson(copy, FIRST)
    for name in (LESSON, "README.md", "peft_lessons/old.py", "course.py"):
        text = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(text, encoding="utf-8", newline="\r\n")
    update.update(new, copy)
    fresh = {n: (new.with_suffix("") / n).read_bytes() for n in (LESSON, "README.md", "course.py")}
    # The student's editor had laid out the JSON of the lesson anew.
    assert json.loads((copy / LESSON).read_bytes()) == json.loads(fresh.pop(LESSON))
    assert fresh.items() <= tree(copy).items() and not (copy / "peft_lessons/old.py").exists()
    saved = [p.name for p in (copy / "notebooks/before-update-1").rglob("*")]
    assert saved == ["02_lora.ipynb"]


def test_a_lesson_that_the_copy_lacks_is_named(copy, new):
    (copy / LESSON).unlink()
    assert f"New in your copy: {LESSON}." in update.tell(update.update(new, copy))
    assert read_sources(copy)[0] == "# LoRA, corrected"


def test_a_lesson_that_cannot_be_read_is_saved_and_replaced(copy, new):
    (copy / LESSON).write_bytes(b'{"cells": [')
    done = update.update(new, copy)
    assert done.saved and f"since yours could not be read: {LESSON}." in update.tell(done)
    assert (copy / "notebooks/before-update-1/02_lora.ipynb").read_bytes() == b'{"cells": ['
    assert read_sources(copy)[0] == "# LoRA, corrected"


def test_an_old_copy_without_the_command_is_updated_from_the_new_folder(copy, new):
    (copy / "course.py").write_text("old\n", encoding="utf-8")
    fresh = new.with_suffix("")
    done = run(fresh, ".", copy)
    assert done.returncode == 0, done.stderr
    assert read_sources(copy)[3] == ANSWER and "02_lora" in done.stdout


def test_the_record_comes_last_and_the_rights_of_a_file_stay(copy, new, monkeypatch):
    places, real = [], update._replace
    monkeypatch.setattr(
        update, "_replace", lambda file, place: places.append(place) or real(file, place)
    )
    (copy / LESSON).chmod(0o600)
    update.update(new, copy)
    assert places[-1] == copy / update.RECORD
    assert stat.S_IMODE((copy / LESSON).stat().st_mode) == 0o600


def run(folder, *given):
    line = [sys.executable, "course.py", "update", *map(str, given)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True)


def test_the_command_runs_the_script_of_the_new_copy(copy, new):
    (copy / "peft_lessons/data/update.py").write_text("1 / 0\n", encoding="utf-8")
    done = run(copy, new)
    assert done.returncode == 0, done.stderr
    assert read_sources(copy)[0] == "# LoRA, corrected"
    assert run(copy, new).stdout.startswith("Your copy is up to date")


# ------------------------------------------------------------------ what is refused


def rewritten(archive, change):
    """Write a ZIP file anew: `change` gets {name: content} and may return one more member."""
    with zipfile.ZipFile(archive) as old:
        members = {n: old.read(n) for n in old.namelist() if not n.endswith("/")}
    more = change(members)
    with zipfile.ZipFile(archive, "w") as fresh:
        for name, content in members.items():
            fresh.writestr(name, content)
        if more:
            fresh.writestr(*more)


def renamed(old, name):
    """Return a change that gives a file another name, in the record too."""

    def change(members):
        stamp = json.loads(members["peft-lessons/" + update.RECORD])
        stamp["files"][name] = stamp["files"].pop(old)
        members[f"peft-lessons/{name}"] = members.pop(f"peft-lessons/{old}")
        members["peft-lessons/" + update.RECORD] = json.dumps(stamp).encode()

    return change


def linked(members):
    link = zipfile.ZipInfo("peft-lessons/README.md")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link, members.pop("peft-lessons/README.md")


ARCHIVES = {
    "half of it": (lambda z: z.write_bytes(z.read_bytes()[:-900]), "is not whole"),
    "no ZIP file": (lambda z: z.write_bytes(b"<html>Sign in</html>"), "is no ZIP file"),
    "a byte": (lambda z: z.write_bytes(z.read_bytes().replace(b"read\n", b"rEad\n")), "whole"),
    "foreign": (lambda z: rewritten(z, lambda m: m.clear() or ("a.txt", "a")), "is no copy of"),
    "a file less": (lambda z: rewritten(z, lambda m: m.pop("peft-lessons/README.md") and None),
                    "is not whole: README.md is missing"),
    "changed": (lambda z: rewritten(z, lambda m: m.update({"peft-lessons/README.md": b"x"})),
                "not as it was released: README.md differs"),
    "no record": (lambda z: rewritten(z, lambda m: m.update({"peft-lessons/.students-copy": b""})),
                  "older than the command"),
    "outside": (lambda z: rewritten(z, renamed("README.md", "../README.md")), "would write ../RE"),
    "absolute": (lambda z: rewritten(z, renamed("README.md", "/README.md")), "would write /READ"),
    "drive": (lambda z: rewritten(z, renamed("README.md", "C:/README.md")), "would write C:/READ"),
    "packages": (lambda z: rewritten(z, renamed("README.md", ".VENV/x.py")), "would write .VENV/x"),
    "link": (lambda z: rewritten(z, linked), "README.md is a link"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_wrong_archive_is_refused_before_anything_changes(copy, new, kind):
    spoil, told = ARCHIVES[kind]
    with zipfile.ZipFile(new, "a") as archive:  # uncompressed, so that a byte can be found
        files = {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}
    with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    spoil(new)
    before = tree(copy.parent)
    with pytest.raises(update.CannotUpdate, match=told):
        update.update(new, copy)
    done = run(copy, new)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith("Nothing was changed.\n") and len(done.stderr.splitlines()) == 1
    assert tree(copy.parent) == before


def test_an_older_release_is_refused(copy, tmp_path):
    older = hand_out(tmp_path / "older", NEW, released="2025-12-01")
    with pytest.raises(
        update.CannotUpdate, match="of 2025-12-01 and older than your copy, which is of"
    ):
        update.update(older, copy)


def test_what_is_no_students_copy_is_refused(copy, new, tmp_path):
    with pytest.raises(update.CannotUpdate, match="is no student's copy"):
        update.update(new, tmp_path)
    (copy / "tools").mkdir()
    with pytest.raises(update.CannotUpdate, match="is no student's copy"):
        update.update(new, copy)
    for given, told in (((), "Which copy is new?"), (("nowhere.zip",), "There is no file or fol")):
        done = run(copy, *given)
        assert done.returncode == 1 and done.stderr.startswith(told)


def test_a_folder_that_leads_out_of_the_copy_is_refused(copy, new, tmp_path):
    shutil.move(copy / "notebooks", tmp_path / "cloud")
    (copy / "notebooks").symlink_to(tmp_path / "cloud", target_is_directory=True)
    with pytest.raises(update.CannotUpdate, match="behind a link that leaves your copy"):
        update.update(new, copy)
    assert read_sources(tmp_path, "cloud/02_lora.ipynb")[0] == "# LoRA"


# ------------------------------------------------------------------ what is cut short


def steps(monkeypatch, fail):
    """Let `fail` decide at each replaced file, by its number, whether to raise."""
    replace, done = os.replace, []

    def counted(old, new):
        done.append(new)
        fail(len(done))
        replace(old, new)

    monkeypatch.setattr(update.os, "replace", counted)
    return done


def test_an_error_or_an_interruption_at_any_file_leaves_the_copy_as_it_was(
    copy, new, monkeypatch, tmp_path
):
    before = tree(copy)
    with monkeypatch.context() as patch:
        count = steps(patch, lambda number: None)
        shutil.copytree(copy, tmp_path / "whole")
        update.update(new, tmp_path / "whole")
    assert len(count) > 4
    for stop in range(1, len(count) + 1):
        for error in (PermissionError(13, "in use", "x"), KeyboardInterrupt()):

            def fail(number, stop=stop, error=error):
                if number == stop:
                    raise error

            with monkeypatch.context() as patch:
                steps(patch, fail)
                with pytest.raises(type(error)):
                    update.update(new, copy)
            assert tree(copy) == before
    update.update(new, copy)
    assert tree(copy) == tree(tmp_path / "whole")


KILLED = """import os, sys, update
from pathlib import Path
replace = os.replace
def dies(old, new):
    if new == Path(sys.argv[2]) / "peft_lessons/new.py":
        os._exit(9)
    replace(old, new)
update.os.replace = dies
update.update(Path(sys.argv[1]), Path(sys.argv[2]))"""


def test_after_a_power_cut_the_next_command_puts_the_old_copy_back(copy, new, capsys):
    before = tree(copy)
    environment = dict(os.environ, PYTHONPATH=str(Path(update.__file__).parent))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, new, copy], env=environment)
        assert done.returncode == 9 and read_sources(copy)[0] == "# LoRA, corrected"
        done = subprocess.run([sys.executable, "course.py", "clean"], cwd=copy,
                              capture_output=True, text=True)  # fmt: skip
        assert "cut short: your copy is again as it was before" in done.stdout
        assert tree(copy) == before
    subprocess.run([sys.executable, "-c", KILLED, new, copy], env=environment)
    text = (copy / LESSON).read_text(encoding="utf-8").replace("x + x", "2 * x")
    (copy / LESSON).write_text(text, encoding="utf-8")
    update.update(new, copy)
    assert capsys.readouterr().out.startswith("An earlier update was cut short")
    assert read_sources(copy)[3] == ANSWER.replace("x + x", "2 * x"), "written after the power cut"
    assert read_sources(copy)[0] == "# LoRA, corrected"


def test_a_full_disk_or_a_file_in_use_is_one_sentence(copy, new, monkeypatch, capsys):
    before = tree(copy)
    for error, told in (
        (OSError(28, "No space left on device"), "The disk is full: free some space"),
        (PermissionError(13, "in use", "x.ipynb"), "x.ipynb: in use. Close JupyterLab"),
    ):

        def fail(number, error=error):
            raise error

        with monkeypatch.context() as patch:
            steps(patch, fail)
            assert update.main([str(new), str(copy)]) == 1
        assert told in capsys.readouterr().err and tree(copy) == before


def test_a_copy_that_cannot_be_written_is_refused(copy, new, monkeypatch, capsys):
    before = tree(copy)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert update.main([str(new), str(copy)]) == 1 and tree(copy) == before
    assert "cannot be written: copy the course" in capsys.readouterr().err


def test_a_file_that_is_read_only_is_replaced(copy, new, monkeypatch):
    real = os.replace

    def as_on_windows(file, place):
        if os.path.isfile(place) and not os.stat(place).st_mode & stat.S_IWRITE:
            raise PermissionError(13, "Access is denied", str(place))
        real(file, place)

    (copy / "README.md").write_text("old\n", encoding="utf-8")
    (copy / "README.md").chmod(stat.S_IREAD)
    monkeypatch.setattr(os, "replace", as_on_windows)
    update.update(new, copy)
    assert (copy / "README.md").read_text(encoding="utf-8") == "read\n"


def test_the_script_needs_nothing_but_python(copy, new):
    line = [sys.executable, "-S", "-X", "importtime", update.__file__, str(new), str(copy)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0 and "torch" not in done.stderr and "nbformat" not in done.stderr
