"""Outcomes become points, tables and pages, by the rules of whoever teaches."""

import argparse
import csv
import io
import json
import os
import re
import unicodedata
import zipfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from classroom import grade, gradebook, gradescope, submissions
from classroom.gradebook import Mark, Rules
from classroom.submissions import Handed
from tools import notebooks

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
FILES = ("grades.csv", "grades_wide.csv", "texts.csv", "causes.csv", "grades.html")

# ------------------------------------------------------------------ points


def test_points_are_the_stars_of_a_heading():
    assert gradebook.stars("02_lora")["apply_lora"] == 3
    assert gradebook.stars("03_qlora")["dequantize_blockwise"] == 1, "two share two stars"
    for lesson in notebooks.MODULES:
        assert set(gradebook.stars(lesson)) == set(notebooks.exercises(lesson))


def test_days_late_are_counted_from_the_due_time_and_an_extension():
    due = datetime(2026, 11, 1, 12)
    rules = Rules(due={LESSON: due}, late=40, extensions={"x": 2})
    for hours, late, student, days in (
        (0, None, "a", 0), (1, None, "a", 1), (25, None, "a", 2), (25, None, "x", 0),
        (50, False, "a", 0), (50, True, "a", 1), (-5, True, "a", 1), (-5, True, "x", 0),
    ):  # fmt: skip
        seconds = due.timestamp() + 3600 * hours
        assert rules.days_late(Handed("w", LESSON, None, late, seconds), student) == days
    assert [rules.share(days) for days in (0, 1, 3)] == [1, 0.6, 0]
    elsewhere = Rules(due={LESSON: due.replace(tzinfo=timezone(timedelta(hours=5)))})
    times = [due.replace(tzinfo=UTC).timestamp() - 3600 * hours for hours in (6, 4)] + [-1e18, 1e18]
    days = [elsewhere.days_late(Handed("w", LESSON, None, None, seconds), "a") for seconds in times]
    assert days[:3] == [0, 1, 0] and days[3] > 9999, "a file may have any time"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("points = 3", r"a table, \[points\]"),
        ("late = -1", "late must be a number from 0 on, not -1"),
        ("[pionts]", "no setting 'pionts': did you mean points"),
        ("[points.02_lora]\nmerge = 1", "no exercise of 02_lora 'merge'"),
        ("[points.02_lora]\nswap_words = true", "swap_words must be a number"),
        ("[due]\n02_lora = 3", "due.02_lora must be a time"),
        ("[due]\n2_lora = 2027-01-01T00:00:00", "no lesson '2_lora': did you mean 02_lora"),
        ("late", "is no TOML"),
        ('late = "last"', "late must be a number from 0 on, not 'last'"),
        ("late = [1, 2]", 'late must be a number, "best", or both'),
        ("partial = 1", "partial must be true or false, not 1"),
        ("[override]\n1002 = 1", r'a table, \[override."1002"\]'),
        ("[override.1002]\nswap_word = 1", "no exercise 'swap_word': did you mean swap_words"),
        ("[override.1002]\nswap_words = -1", "override.1002.swap_words must be a number"),
        ("[canvas]\n02_lora = 2", "canvas.02_lora must be the name of a column"),
    ],
)
def test_a_fault_in_the_rules_is_named(text, told, tmp_path):
    (tmp_path / "rules.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        gradebook.read_rules(tmp_path / "rules.toml")


def test_of_late_a_number_and_the_best_attempt_are_read(tmp_path):
    for text, late, best in (("20", 20, False), ('"best"', 0, True), ('[20, "best"]', 20, True)):
        (tmp_path / "rules.toml").write_text(f"late = {text}", encoding="utf-8")
        rules = gradebook.read_rules(tmp_path / "rules.toml")
        assert (rules.late, rules.best) == (late, best)


def outcomes(**said):
    """What became of a notebook, by the exercise; 0.5 is the share of a wrong answer."""
    return grade.Result({name: grade.Judgment(one, "", 0.0, 0.5) for name, one in said.items()})


def test_points_that_are_set_by_hand_count_whatever_came_out(tmp_path):
    lesson, exercise = "02_lora", "swap_words"
    rules = Rules(late=50, due={lesson: datetime(2026, 1, 1)}, override={"7": {exercise: 0.5}})
    one = Handed("a", lesson, tmp_path, None, datetime(2026, 1, 1, 1).timestamp())
    names = notebooks.exercises(lesson)
    marks = grade.marks_of(one, "7", outcomes(**dict.fromkeys(names, "right")), rules)
    assert {m.exercise: (m.points, m.by_hand) for m in marks}[exercise] == (0.5, True)
    assert {m.points / m.maximum for m in marks if not m.by_hand} == {0.5}
    assert "The points were set by hand." in gradebook.feedback("Al", marks, rules)
    absent = gradebook.absent("7", lesson, rules)
    assert sum(m.points for m in absent) == 0.5
    (tmp_path / "ann_02_lora.ipynb").touch()
    options = argparse.Namespace(folder=tmp_path, people=[], rules=rules)
    options.submissions = submissions.handed_in(tmp_path)
    assert "set points of nobody here: 7." in grade.remarks_on(options, [("ann", one)])[-1]
    options.rules = Rules(override={"7": {exercise: 50}})
    note = "The rules set 50 points of 2: 7, swap_words."
    assert note in grade.remarks_on(options, [("ann", one)])


def test_a_part_of_the_points_is_given_only_if_the_rules_say_so(tmp_path):
    one = Handed("a", LESSON, tmp_path, None, 0)
    for partial, points in ((False, 0), (True, 2)):
        rules = Rules({LESSON: {EXERCISE: 4}}, partial=partial)
        (mark,) = grade.marks_of(one, "a", outcomes(**{EXERCISE: "wrong"}), rules)
        assert mark.points == points
        (mark,) = grade.marks_of(one, "a", outcomes(**{EXERCISE: "crashed"}), rules)
        assert mark.points == 0
        page = gradebook.feedback("Al", [replace(mark, outcome="wrong", points=points)], rules)
        assert ("Part of the points" in page) == partial


def test_of_several_attempts_the_last_counts_or_the_best(tmp_path, monkeypatch):
    files = "doe_77_4_02_lora.ipynb", "doe_LATE_77_5_02_lora-1.ipynb", "roe_78_6_02_lora.ipynb"
    for name in files:
        (tmp_path / name).write_text(name, encoding="utf-8")
    names = notebooks.exercises("02_lora")
    result = outcomes(**dict.fromkeys(names, "right"))
    monkeypatch.setattr(grade, "judge", lambda *a: result)
    for late, points, file in (
        ("20", 0.8, "doe_LATE_77_5_02_lora-1.ipynb"),
        ('[20, "best"]', 1, "doe_77_4_02_lora.ipynb"),
        ('"best"', 1, "doe_LATE_77_5_02_lora-1.ipynb"),  # as good as the other
    ):
        (tmp_path / "rules.toml").write_text(f"late = {late}", encoding="utf-8")
        assert grade.main([str(tmp_path), "--rules", f"{tmp_path}/rules.toml"]) == 0
        with (tmp_path / "grades.csv").open(newline="", encoding="utf-8") as table:
            rows = [row for row in csv.DictReader(table) if row["student"] == "doe_77"]
        assert {row["notebook"] for row in rows} == {file} and len(rows) == len(names)
        assert {round(float(row["points"]) / float(row["maximum"]), 9) for row in rows} == {points}
        doe, roe = (f"feedback/{student}.html" for student in ("doe_77", "roe_78"))
        page = (tmp_path / doe).read_text(encoding="utf-8")
        assert ("doe_77_4_02_lora.ipynb: " in page) == ("best" not in late)
        assert "doe_77" not in (tmp_path / roe).read_text(encoding="utf-8")


def test_options_reach_the_judge(tmp_path, monkeypatch):
    for lesson in (LESSON, "02_lora"):
        (tmp_path / f"ann_{lesson}.ipynb").write_text("{}", encoding="utf-8")
    judged = []
    result = grade.Result({}, grade.Judgment("wrong", ""))
    monkeypatch.setattr(grade, "judge", lambda *a: judged.append(a) or result)
    options = ["--seconds", "1", "--total", "2", "--memory", "3", "--lesson", "00"]
    assert grade.main([str(tmp_path), *options]) == 0
    variant = grade.variant_of("ann", "")
    assert judged == [(tmp_path / f"ann_{LESSON}.ipynb", LESSON, grade.Limits(1, 2, 3), variant)]


def test_after_a_table_that_could_not_be_written_the_exit_status_is_1(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / f"ann_{LESSON}.ipynb").write_text("{}", encoding="utf-8")
    result = grade.Result({}, grade.Judgment("wrong", ""))
    monkeypatch.setattr(grade, "judge", lambda *a: result)
    (tmp_path / "causes.csv").mkdir()  # as one that is open in Excel, it cannot be replaced
    assert grade.main([str(tmp_path)]) == 1
    assert "Not written: causes.csv (Is a directory). Close" in capsys.readouterr().out


def test_a_cell_is_no_formula_and_no_file_is_half_written(tmp_path, monkeypatch):
    formula = '=HYPERLINK("x")'
    marks = [Mark(name, "n", LESSON, EXERCISE, "wrong", formula, 1.0) for name in ("-a", "b")]
    handed = [(m.student, Handed(m.student, LESSON, tmp_path, False, 0)) for m in marks]
    group = grade.Class(tmp_path, [], Rules(), handed[:1], [])
    group.marks["-a", LESSON] = marks[:1]
    (tmp_path / "feedback").mkdir()
    for earlier in ("feedback/before.html", "canvas_02_lora.csv", "feedback_moodle.zip"):
        (tmp_path / earlier).touch()
    group.write()
    assert [path.name for path in (tmp_path / "feedback").iterdir()] == ["-a.html"]
    monkeypatch.setattr(gradebook, "csv_of", lambda rows: 1 / 0)
    (tmp_path / "grades.html").unlink()
    lost = ["grades.csv", "grades_wide.csv", "texts.csv", "causes.csv"]
    assert group.write() == [f"{name} (division by zero)" for name in lost]
    assert (tmp_path / "grades.html").exists(), "what can be written is written"
    with (tmp_path / "grades.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["student"], row["told"], row["seconds"]) == ("'-a", f"'{formula}", "1.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["feedback", *FILES])


def test_an_interruption_leaves_the_grades_of_before(tmp_path, monkeypatch):
    one = Handed("a", LESSON, tmp_path, None, 0)
    group = grade.Class(tmp_path, [], Rules(), [("a", one)], [])
    group.add("a", one, 0, outcomes(**{EXERCISE: "right"}))
    for name in FILES:
        (tmp_path / name).write_text("before", encoding="utf-8")

    def interrupted(*files):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        group.write()
    contents = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir() if p.is_file()}
    assert contents == dict.fromkeys(FILES, "before")


def test_a_page_shows_text_as_text_and_says_how_far_it_is_marked():
    marks = [
        Mark("a", "n", LESSON, EXERCISE, outcome, f"<b>{outcome}", 0)
        for outcome in ("right", "wrong", gradebook.UNMARKED)
    ]
    page = gradebook.feedback("Al", marks, Rules(), [submissions.Passed("<i>.ipynb", "<u>why")])
    assert not {"<b>", "<i>", "<u>"} & {*re.findall("<.>", page)} and "&lt;b&gt;wrong" in page
    assert "0 of 0 points, as far as marked" in page
    assert "&lt;b&gt;right" not in page, "the outcome says it"
    assert not gradebook.unmarked([replace(marks[-1], by_hand=True)])


def test_two_students_have_two_pages_on_every_file_system():
    names = ["ann", "a/b", "a:b", "con", "", "..", "x" * 300, "x" * 301, "𐀀" * 63]
    names += ["né", "ne\u0301", "Jo", "jo", "가", "\u1100\u1161"]
    files = list(gradebook.file_names(names).values())
    assert len({unicodedata.normalize("NFC", file).casefold() for file in files}) == len(names)
    assert files[0] == "ann" and not any("/" in file or ":" in file for file in files)
    assert all(len(f".{file}.html.4194304.tmp".encode()) < 255 for file in files)


def test_the_commonest_fault_of_an_exercise_is_its_cause():
    messages = ["x\n  Likely cause: not summed", "y\n  Likely cause: not summed", "y", ""]
    outcomes = ["wrong", "wrong", "crashed", "right"]
    marks = [
        Mark("a", "", LESSON, EXERCISE, o, t, 0) for o, t in zip(outcomes, messages, strict=True)
    ]
    marks.append(Mark("a", "", LESSON, EXERCISE, "not attempted", "", 0))
    assert gradebook.commonest(marks) == [(f"{LESSON} {EXERCISE}", 1, 1, 5, "not summed", 2)]


def test_causes_are_counted_also_those_that_nobody_needed():
    known = grade.known_causes([LESSON])
    first, second, *_ = known[LESSON, EXERCISE]
    messages = [f"x\n  Likely cause: {first}.", f"x\n  Likely cause: {first}, or {second}.", ""]
    marks = [Mark(str(n), "", LESSON, EXERCISE, "wrong", t, 0) for n, t in enumerate(messages)]
    head, *rows = gradebook.causes(marks, known)
    assert head[-2:] == ("cause", "answers")
    counts = {cause: count for *_, cause, count in rows}
    assert {row[:3] for row in rows} == {(LESSON, "0.1", EXERCISE)}
    assert (counts[first], counts[second], sum(counts.values())) == (2, 1, 3)
    assert list(counts) == known[LESSON, EXERCISE]
    longer = {(LESSON, EXERCISE): [first, f"{first}, and more"]}
    marks = [Mark("a", "", LESSON, EXERCISE, "wrong", f"Likely cause: {first}, and more.", 0)]
    assert [row[-1] for row in gradebook.causes(marks, longer)[1:]] == [0, 1]


def test_a_damaged_notebook_is_the_commonest_fault_of_no_exercise():
    marks = [Mark(s, "", LESSON, e, "crashed", "damaged", 0) for s in "abc" for e in "xy"]
    marks += [Mark("d", "", LESSON, e, "wrong", f"{e}: all off", 0) for e in "xy"]
    rows = gradebook.commonest(marks)
    assert rows == [(f"{LESSON} {e}", 0, 0, 4, f"{e}: all off", 1) for e in "xy"]


def test_two_with_the_same_answers_or_text_are_named_unless_many_have_them():
    def result(text="", **prints):
        return grade.Result(texts=[["above", text]], prints=prints)

    text = "The rank bounds what a step can learn, so a small one is slower to learn and to forget."
    class_ = [
        ("ann", "02_lora", result(a="1", b="1", c="1", d="1")),
        ("bob", "02_lora", result(a="1", b="1", c="1", d="2", text=text)),
        ("cem", "02_lora", result(a="1", b="3", c="3", d="3", text="short")),
        ("dan", "02_lora", result(a="1", b="4", c="4", d="4", text="short")),
        ("eve", "02_lora", result(a="1", b="5", c="5", d="5", text=text.upper())),
        ("ann", "03_qlora", result(a="1", b="1")),
    ]
    assert grade.alike(class_) == [
        "02_lora, ann and bob: 3 of 4 answers have the same syntax tree.",
        "02_lora, bob and eve: 1 of 4 answers have the same syntax tree, and 1 of their own texts "
        "are the same.",
    ]
    many = [(str(n), "02_lora", result(a="1", b="1", text=text)) for n in range(12)]
    assert grade.alike(many) == []


def test_points_add_up_in_all_tables(tmp_path):
    lesson = "03_qlora"
    rules = Rules({lesson: dict.fromkeys(notebooks.exercises(lesson), 1 / 3)}, late=10)
    judgments = {
        exercise: grade.Judgment("right", "", 1, 1) for exercise in notebooks.exercises(lesson)
    }
    one = Handed("a_LATE_1_2", lesson, tmp_path, True, 0)
    marks = grade.marks_of(one, "a", grade.Result(judgments), rules)
    cells = next(csv.DictReader(gradebook.wide(marks, []).splitlines()))
    summed = sum(float(cells[f"{lesson} {exercise}"]) for exercise in judgments)
    assert gradebook.tidy(summed) == float(cells["total"]) == gradebook.total(marks)[0]
    assert {mark.points for mark in marks} == {0.3}


def test_a_folder_of_moodle_in_no_encoding_has_feedback():
    folder = os.fsdecode(b"M\xfcller_12_assignsubmission_file_my")
    archive = gradebook.moodle_archive({"M": "page"}, {folder: "M", "else": "M"})
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        (name,) = file.namelist()
    assert name.endswith("ller_12_assignsubmission_file_/feedback.html")


# ------------------------------------------------------------------ Gradescope


def test_an_autograder_holds_the_course_without_its_answers(tmp_path):
    rules = tmp_path / "rules.toml"
    mine = f'[points.{LESSON}]\n{EXERCISE} = 4\n[override."a b"]\n{EXERCISE} = 0.5\n'
    others = "swap_words = 2\n[points.02_lora]\nswap_words = 2\n[extensions]\njdoe = 2\n"
    text = f'late = 25\nseed = "\\"x🔑"\npartial = true\n{mine}{others}'
    rules.write_text(text, encoding="utf-8")
    path = gradescope.archive(LESSON, rules, tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        run = archive.read("run_autograder").decode()
        (tmp_path / "its.toml").write_bytes(archive.read("course/rules.toml"))
        assert archive.getinfo("setup.sh").external_attr >> 16 & 0o111, "it must be executable"
    assert "--mark" in run and LESSON in run and "LESSON" not in run
    points, overrides = {LESSON: {EXERCISE: 4}}, {"a b": {EXERCISE: 0.5}}
    wanted = Rules(points=points, override=overrides, partial=True, seed='"x🔑')
    assert gradebook.read_rules(tmp_path / "its.toml") == wanted, "nothing of other lessons"
    shipped = [name for name in names if name.endswith(".ipynb")]
    assert shipped == [f"course/notebooks/{LESSON}.ipynb"]
    assert not [name for name in names if "solutions" in name or "/tests/" in name]


def test_the_notebook_of_a_submission_is_the_one_of_the_lesson(tmp_path):
    for name, chosen in (
        ("__MACOSX/._02_lora.ipynb", None),
        ("mine.ipynb", "mine.ipynb"),
        (".ipynb_checkpoints/02_lora-checkpoint.ipynb", "mine.ipynb"),
        ("02_lora.ipynb", "02_lora.ipynb"),
        ("jane_02_lora (1).ipynb", "02_lora.ipynb"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert gradescope.submitted(tmp_path, "02_lora") == (chosen and tmp_path / chosen)
    for name, seconds, chosen in (("x/02_lora.ipynb", 5, "."), ("y/02_lora.ipynb", 4e9, "y")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
        assert gradescope.submitted(tmp_path, "02_lora").parent == tmp_path / chosen


def test_results_are_points_and_what_the_check_says(tmp_path, monkeypatch, capsys):
    def hand_in(*addresses):
        student = {"users": [{"email": address} for address in addresses]}
        (tmp_path / "submission_metadata.json").write_text(json.dumps(student), encoding="utf-8")

    hand_in("ann@example.org")
    (tmp_path / "submission").mkdir()
    missing = gradescope.results(tmp_path, LESSON, Rules())
    assert "no notebook" in missing["output"] and missing["tests"][0]["score"] == 0
    rules = Rules(override={"Ann@Example.org": {EXERCISE: 0.5}})
    assert gradescope.results(tmp_path, LESSON, rules)["tests"][0]["score"] == 0.5
    (tmp_path / "submission" / "any name.ipynb").touch()
    judgments = {EXERCISE: grade.Judgment("wrong", "Likely cause: x", 1.0, 0.0)}
    seen = []
    monkeypatch.setattr(
        grade, "judge", lambda *a: seen.append(a) or grade.Result(judgments, held=["memory"])
    )
    (test,) = gradescope.results(tmp_path, LESSON, Rules())["tests"]
    assert (test["score"], test["max_score"], test["status"]) == (0, 1, "failed")
    assert test["output"] == "wrong: Likely cause: x" and test["name"] == f"0.1 {EXERCISE}"
    assert seen[0][2].total * grade.ROUNDS < 600, "Gradescope ends it after ten minutes"
    for group in (("bob@example.org", "Ann@Example.org"), ("ANN@example.org", "bob@example.org")):
        hand_in(*group)
        assert gradescope.results(tmp_path, LESSON, rules)["tests"][0]["score"] == 0.5
    hand_in("bob@example.org", "ann@example.org")
    gradescope.results(tmp_path, LESSON, rules)
    alone, *together = [one[3] for one in seen]
    assert alone == grade.variant_of("ann@example.org", "")
    assert {*together} == {grade.variant_of("ann@example.org bob@example.org", "")}
    judgments[EXERCISE] = grade.Judgment("right", "", 1.0, 1.0)
    assert gradescope.main([LESSON, "--mark", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert results["tests"][0]["score"] == 1 and results["stdout_visibility"] == "hidden"
    assert "IN REACH" not in json.dumps(results), "what is open is nothing for students"
    assert "WITH ALL YOUR FILES IN REACH" in capsys.readouterr().out
    monkeypatch.setattr(grade, "judge", lambda *a: grade.failed("the disk is full"))
    with pytest.raises(SystemExit, match="the disk is full"):
        gradescope.results(tmp_path, LESSON, Rules())
