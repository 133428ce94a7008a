"""Who handed in what is found in the layouts of learning platforms."""

import csv
import io
import os
import subprocess
import zipfile
from datetime import UTC, datetime

import pytest

from classroom import grade, gradebook, submissions
from classroom.gradebook import Mark, Rules
from classroom.submissions import Handed, Person
from tools import notebooks

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
MOE = "Jo Moe_4_assignsubmission_file_x_1_2"


def test_the_layouts_of_platforms_are_found(tmp_path):
    hidden, older = "a/.ipynb_checkpoints/02_lora.ipynb", "a/02_lora.ipynb"
    handed = {
        "a/x/02_lora.ipynb": "a",
        "b/02_lora (1).ipynb": "b",  # of a browser's downloads, and the only one
        "doe_77_5_02_lora-1.ipynb": "doe_77_5",
        "roe_LATE_78_6_02_lora.ipynb": "roe_LATE_78_6",
        "poe_79_6_my_own_02_lora_final (1)-1.ipynb": "poe_79_6_my_own",
        "team_1_1/02_lora.ipynb": "team_1_1",  # two folders, and no attempts of Canvas
        "team_1_2/max_02_lora.ipynb": "team_1_2",
        f"{MOE}_02_lora.ipynb": MOE,
        "hw-kim/peft-lessons/notebooks/03_qlora.ipynb": "hw-kim",
        "lee_03_qlora.ipynb": "lee",
        "Max Poe_9_assignsubmission_file_03_qlora.ipynb": "Max Poe_9_assignsubmission_file",
        "Ina Loe_8_assignsubmission_file/roe_1_2_02_lora.ipynb": "Ina Loe_8_assignsubmission_file",
    }
    passed = {older, "02_lora.ipynb", "a/02_lora (2).ipynb", "a/old_02_lora.ipynb"}
    passed |= {"doe_77_4_02_lora.ipynb", "a/99_other.ipynb"}
    passed |= {"poe_79_5_02_lorax.ipynb", "team_1_1/max_02_lora.ipynb"}
    before = "a/before-update-1/02_lora.ipynb"
    mac = "__MACOSX/._lee_1_2_02_lora.ipynb", "._lee_1_2_02_lora.ipynb"
    for name in (*handed, *passed, hidden, before, *mac):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / older, (0, 0))
    result = submissions.handed_in(tmp_path)
    assert {one.name: one.who for one in result.handed} == handed
    assert result.handed == sorted(result.handed, key=lambda one: (one.who, one.lesson))
    assert all(one.path == tmp_path / one.name for one in result.handed)
    assert {one.name for one in result.passed} == passed
    assert [one.who for one in result.handed if one.late] == ["roe_LATE_78_6"]
    # A student cannot pass for one of Canvas's, of which no time is looked at.
    in_time = [one.who for one in result.handed if one.late is False]
    assert in_time == ["doe_77_5", "poe_79_6_my_own"]
    attempts = {one.who: one.attempt for one in result.handed if one.attempt}
    assert attempts == {"doe_77_5": 2, "roe_LATE_78_6": 1}
    doe = next(one for one in result.handed if one.who == "doe_77_5")
    assert [one.name for one in result.all_attempts(doe)] == [doe.name, "doe_77_4_02_lora.ipynb"]
    assert submissions.label(MOE) == "Jo Moe"


def test_two_of_one_name_are_told_apart_by_the_number_of_the_platform(tmp_path):
    names = [f"Jo Doe_{n}_assignsubmission_file_02_lora.ipynb" for n in (1, 12)]
    names += [f"doejo_{n}_5_02_lora.ipynb" for n in (3, 4)]
    for name in names:
        (tmp_path / name).touch()
    result = submissions.handed_in(tmp_path)
    assert sorted(one.name for one in result.handed) == sorted(names) and not result.passed
    students = [student for student, _ in grade.owners(result.handed, [])[0]]
    assert len({*students}) == 4
    rows = [{"Identifier": f"Participant {n}", "Full name": "Jo Doe"} for n in (12, 1)]
    people = [Person(row["Identifier"], "Jo Doe", row) for row in rows]
    pairs, _ = grade.owners(result.handed, people)
    by_number = {one.who.split("_")[1]: student for student, one in pairs}
    assert (by_number["1"], by_number["12"]) == ("Participant 1", "Participant 12")
    folders = {one.who: student for student, one in pairs}
    archive = gradebook.moodle_archive({s: f"page of {s}" for s in folders.values()}, folders)
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        pages = {name.split("_")[1]: file.read(name).decode() for name in file.namelist()}
    assert pages == {n: f"page of Participant {n}" for n in ("1", "12")}


def zipped(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")


def test_a_name_in_capitals_a_word_before_it_and_a_zip_file_are_found(tmp_path):
    for name in ("a/02_lora.IPYNB", "b/Homework-02_LoRA-final.ipynb", "c/lora_final.ipynb"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    inside = "../hw\\02_lora.ipynb", "__MACOSX/._02_lora.ipynb", "hw/notes.txt", "hw/mine.ipynb"
    zipped(tmp_path / "d" / "hw.zip", *inside)
    zipped(tmp_path / "doe_77_5_hw.ZIP", "02_lora.ipynb")
    zipped(tmp_path / "all of them.zip", "02_lora.ipynb")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "broken.zip").write_text("PK", encoding="utf-8")
    result = submissions.handed_in(tmp_path, tmp_path / ".marked")
    assert {one.who: one.name for one in result.handed} == {
        "a": "a/02_lora.IPYNB",
        "b": "b/Homework-02_LoRA-final.ipynb",
        "d": "d/hw.zip/hw/02_lora.ipynb",
        "doe_77_5_hw": "doe_77_5_hw.ZIP/02_lora.ipynb",
    }
    assert {one.lesson for one in result.handed} == {"02_lora"}
    assert all(one.path.read_text(encoding="utf-8") in ("", "{}") for one in result.handed)
    assert all(one.path.is_relative_to(tmp_path) for one in result.handed)
    reasons = {one.name: (one.why, one.who) for one in result.passed}
    no_lesson = "its name contains the name of no lesson"
    broken = "the ZIP file cannot be opened: BadZipFile"
    assert reasons == {
        "all of them.zip": (
            "a ZIP file is opened in a student's folder, or with a platform's name", ""
        ),
        "c/lora_final.ipynb": (no_lesson, "c"),
        "d/hw.zip/hw/mine.ipynb": (no_lesson, "d"),
        "e/broken.zip": (f"{broken}: File is not a zip file", "e"),
    }  # fmt: skip
    assert submissions.without_lesson(tmp_path, result) == ["c", "e"]


def test_zip_files_of_one_name_keep_apart_and_a_link_to_another_is_not_opened(tmp_path):
    for student, content in (("ann", "her own"), ("bob", "his own")):
        (tmp_path / student).mkdir()
        with zipfile.ZipFile(tmp_path / student / "hw.zip", "w") as archive:
            for lesson in ("02_lora", "03_qlora"):
                archive.writestr(f"{lesson}.ipynb", f"{content}, {lesson}")
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "hw.zip").symlink_to(tmp_path / "bob" / "hw.zip")
    result = submissions.handed_in(tmp_path, tmp_path / ".marked")
    texts = {(one.who, one.path.read_text(encoding="utf-8")) for one in result.handed}
    owned = {("ann", "her own"), ("bob", "his own")}
    assert texts == {(s, f"{c}, {n}") for s, c in owned for n in ("02_lora", "03_qlora")}
    (tmp_path / "ann" / "hw.zip").unlink()
    submissions.handed_in(tmp_path, tmp_path / ".marked")
    assert len([*(tmp_path / ".marked").rglob("*.ipynb")]) == 2, "what is gone takes no room"


def test_a_damaged_or_a_huge_zip_file_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_UNPACKED", 3)
    zipped(tmp_path / "a" / "hw.zip", *(f"{n}/02_lora.ipynb" for n in range(9)))
    with zipfile.ZipFile(tmp_path / "a" / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("03_qlora.ipynb", "".join(map(str, range(999))))
    content = (tmp_path / "a" / "lzma.zip").read_bytes()
    (tmp_path / "a" / "lzma.zip").write_bytes(content[:60] + b"\xff" * 9 + content[69:])
    result = submissions.handed_in(tmp_path, tmp_path / ".marked")
    assert [one.name for one in result.handed] == ["a/hw.zip/0/02_lora.ipynb"]
    reasons = {one.name: one.why for one in result.passed}
    assert reasons["a/hw.zip"].endswith("ValueError: more than 0 MB of notebooks")
    assert "cannot be opened: LZMAError" in reasons["a/lzma.zip"]


def test_a_folder_with_a_whole_class_in_it_is_nobodys(tmp_path):
    (tmp_path / "hw00").mkdir()
    for name in ("doe_77_5_02_lora.ipynb", "doe_77_5_02_lora-1.ipynb"):
        (tmp_path / "hw00" / name).touch()
    assert len(submissions.handed_in(tmp_path).handed) == 1, "one student, twice"
    (tmp_path / "hw00" / "roe_LATE_78_6_02_lora.ipynb").touch()
    (tmp_path / "git").mkdir()
    for name in ("day_2026_03_02_lora.ipynb", "lab_2026_03.ipynb", "lab_2027_04.ipynb"):
        (tmp_path / "git" / name).touch()
    result = submissions.handed_in(tmp_path)
    assert [one.who for one in result.handed] == ["git"], "whose files are called as Canvas does"
    why = {one.why for one in result.passed if one.name.startswith("hw00")}
    assert len(why) == 1 and "holds what several students handed in" in why.pop()
    assert len(submissions.handed_in(tmp_path / "hw00").handed) == 2


def test_a_clone_was_handed_in_when_its_last_commit_was_made(tmp_path):
    repository = tmp_path / "hw-ann"
    repository.mkdir()
    (repository / "02_lora.ipynb").write_text("{}", encoding="utf-8")
    (repository / "03_qlora.ipynb").write_text("{}", encoding="utf-8")
    when = {"GIT_COMMITTER_DATE": "2026-11-01T12:00:00+0000", "HOME": str(tmp_path)}
    for who in ("AUTHOR", "COMMITTER"):
        when |= {f"GIT_{who}_NAME": "Ann", f"GIT_{who}_EMAIL": "ann@example.org"}
    for command in (["init", "-q"], ["add", "02_lora.ipynb"], ["commit", "-q", "-m", "Answers"]):
        subprocess.run(["git", *command], cwd=repository, env=os.environ | when, check=True)
    # What a student's settings would run is not run.
    with (repository / ".git" / "config").open("a", encoding="utf-8") as settings:
        settings.write(f"[log]\nshowSignature = true\n[gpg]\nprogram = touch {tmp_path}/ran\n")
    os.utime(repository / "03_qlora.ipynb", (5, 5))
    result = submissions.handed_in(tmp_path)
    times = {one.lesson: one.seconds for one in result.handed}
    noon = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()
    assert times == {"02_lora": noon, "03_qlora": 5}, "and of what is not committed, the file's"
    assert result.untimed == ["hw-ann/03_qlora.ipynb"]
    when["GIT_COMMITTER_DATE"] = "@99999999999999 +0000"
    for command in (["add", "."], ["-c", "log.showSignature=false", "commit", "-qm", "Late"]):
        subprocess.run(["git", *command], cwd=repository, env=os.environ | when, check=True)
    result = submissions.handed_in(tmp_path)
    assert {one.lesson: one.seconds for one in result.handed}["03_qlora"] == 5, "no such time"
    assert not (tmp_path / "ran").exists()


CANVAS = """Student,ID,SIS User ID,SIS Login ID,Section,Quiz (1)
,,,,,Manual Posting
"    Points Possible",,,,,10
"Doe, Jane",77,A1,jdoe,One,3
"Doe, Janet",78,77,jadoe,One,4
"""


def test_a_row_of_the_roster_is_found(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_bytes(b"\xef\xbb\xbf" + CANVAS.encode())
    people = submissions.read_roster(file)
    assert [person.id for person in people] == ["77", "78"]
    for who, id in {
        "doejane_77_5": "77",
        "doejane_1_5": None,  # the number is nobody's: another Jane Doe, of another section
        "doejanet_LATE_78_6": "78",
        "Jane Doe_1234_assignsubmission_file": "77",
        "jadoe": "78",
        "hw-3": None,  # points, or a section, are nobody's name
        "homework-jdoe": "77",
        "homeworkjdoe": None,
        "nobody": None,
        "One": None,  # it fits two
    }.items():
        assert getattr(submissions.owner(who, people), "id", None) == id, who
    wide = gradebook.wide([Mark("77", "", LESSON, EXERCISE, "right", "", 1, 1, 1)], people)
    assert wide.splitlines()[0].startswith("Student,ID,SIS User ID,SIS Login ID,Section,00_")
    assert wide.splitlines()[1] == "    Points Possible,,,,,1,1,1,1"
    lost = Mark("78", "", LESSON, EXERCISE, gradebook.UNMARKED, "", 1, 0, 1)
    marks = [Mark("77", "", LESSON, EXERCISE, "right", "", 1, 1, 1), lost]
    marks.append(Mark("x", "", LESSON, EXERCISE, "right", "", 1, 1, 1))
    column = "Homework 2 (777002)"
    rules = Rules(canvas={LESSON: column})
    with pytest.raises(ValueError, match="no column 'Homework 2 \\(777002\\)'"):
        gradebook.refuse_columns(rules, people)
    with pytest.raises(ValueError, match="gradebook of Canvas"):
        gradebook.refuse_columns(rules, [Person("1", "Al", {"id": "1"})])
    gradebook.refuse_columns(Rules(canvas={LESSON: "Quiz (1)"}), people)
    table = list(csv.reader(gradebook.canvas_file(LESSON, column, marks, people).splitlines()))
    assert [[row[0], row[-1]] for row in table] == [
        ["Student", column],
        ["    Points Possible", "1"],
        ["Doe, Jane", "1"],
        ["Doe, Janet", ""],  # nothing, and no zero
    ]
    cells = [row.split(",")[-4:] for row in gradebook.wide(marks, people).splitlines()[2:]]
    assert cells == [["1", "1", "1", "1"], ["", "", "", "1"], ["1", "1", "1", "1"]]


def test_a_number_of_canvas_is_no_other_id_and_an_accent_is_one_letter(tmp_path):
    file = tmp_path / "roster.csv"
    rows = "id;first name;last name\n7;Jürgen;Müller\n;Bo;Roe\n"
    file.write_bytes(rows.encode("utf-16"))  # as Excel saves it
    people = submissions.read_roster(file)
    assert [person.id for person in people] == ["7", "Bo Roe"]
    assert people[0].called == "Jürgen Müller (7)"
    for who, id in {
        "roebo_7_5": "Bo Roe",
        "stranger_7_5": None,
        "Ju\u0308rgen Mu\u0308ller_7_assignsubmission_file": "7",  # as a Mac writes folders
    }.items():
        assert getattr(submissions.owner(who, people), "id", None) == id, who


def test_a_roster_of_moodle_is_read_and_a_bad_one_is_told(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_text("Identifier;Full name\r\nParticipant 12;Eve Fox\r\n", encoding="utf-8")
    (eve,) = submissions.read_roster(file)
    assert submissions.owner("X_12_assignsubmission_file_", [eve]) == eve
    assert eve.called == "Eve Fox (Participant 12)"
    for text, told in (
        ("a,b\n1,2", "id, email or name"),
        ("id\n1\n1", "'1'"),
        ("id\n", "no student"),
        ("id\nJürgen", 'save it as "CSV UTF-8"'),
    ):
        file.write_text(text, encoding="cp1252")
        with pytest.raises(ValueError, match=told):
            submissions.read_roster(file)


def test_students_of_one_name_are_marked_apart_and_named(tmp_path):
    twins = [Handed(f"Jo_{n}_assignsubmission_file", LESSON, tmp_path, False, 0) for n in (1, 2)]
    later = Handed("Jo_3_assignsubmission_file", "02_lora", tmp_path, False, 0)
    pairs, notes = grade.owners([*twins, later], [])
    assert [student for student, _ in pairs] == [one.who for one in (*twins, later)]
    assert notes == ["Several students are called Jo and marked apart."]
    pairs, _ = grade.owners([twins[0], later], [])
    assert [student for student, _ in pairs] == ["Jo", "Jo"], "one student, two lessons"
    pairs, notes = grade.owners(twins, [Person("1", "Jo", {"id": "1", "name": "Jo"})])
    assert [student for student, _ in pairs] == ["1", twins[1].who]
    assert len(notes) == 1 and "marked apart" in notes[0]
    _, notes = grade.owners(twins[:1], [Person("1", "Al", {"id": "1"})])
    assert notes == [f"Not on the roster: {twins[0].who}."]
