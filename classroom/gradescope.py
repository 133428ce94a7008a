"""Write an autograder for Gradescope: python -m classroom.gradescope LESSON [--rules FILE]

The ZIP file build/gradescope-LESSON.zip holds the course without its solutions and tests, setup.sh,
which sets it up in Gradescope's container, and run_autograder, which judges one submission as
classroom.grade does and writes results.json: for each exercise its points and what the check says.
What cannot be marked by no fault of its own gets no results.json, and can be run again.

    python -m classroom.gradescope 02 --mark /autograder

is what run_autograder calls: /autograder is the folder in which Gradescope lays the submission.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from classroom import grade, gradebook
from classroom.gradebook import Rules, read_rules, tidy, unmarked
from classroom.release import COPIED, copy_course
from classroom.submissions import Handed, is_hidden
from peft_lessons.engine import write_atomically
from tools import notebooks
from tools.environment import ROOT

AUTOGRADER = ROOT / "docs" / "gradescope"
RULES = "rules.toml"
# Gradescope ends an autograder after ten minutes, if nothing else is chosen.
LIMITS = grade.Limits(total=540 / grade.ROUNDS)


def archive(lesson: str, rules: Path | None, place: Path) -> Path:
    """Write the autograder of a lesson to place/gradescope-LESSON.zip and return that path."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "autograder"
        course = top / "course"
        course.mkdir(parents=True)
        for name in ("setup.sh", "run_autograder"):
            script = (AUTOGRADER / name).read_text(encoding="utf-8").replace("LESSON", lesson)
            (top / name).write_text(script, encoding="utf-8", newline="\n")
            (top / name).chmod(0o755)
        copy_course((*COPIED, "tools", "classroom"), course)
        (course / "notebooks").mkdir()
        shutil.copy(notebooks.NOTEBOOKS / f"{lesson}.ipynb", course / "notebooks")
        if rules:
            (course / RULES).write_text(rules_of(read_rules(rules), lesson), encoding="utf-8")
        place.mkdir(parents=True, exist_ok=True)
        return Path(shutil.make_archive(str(place / f"gradescope-{lesson}"), "zip", top))


def rules_of(rules: Rules, lesson: str) -> str:
    """Return what of the rules an autograder needs, in TOML: nothing of other lessons, due times or
    extensions."""
    tables = {f"points.{lesson}": rules.points.get(lesson, {})}
    for student, points in rules.override.items():
        of_lesson = {name: n for name, n in points.items() if name in notebooks.exercises(lesson)}
        tables[f"override.{quoted(student)}"] = of_lesson
    lines = [f"seed = {quoted(rules.seed)}", f"partial = {json.dumps(rules.partial)}"]
    for head, points in tables.items():
        lines += [f"[{head}]", *(f"{name} = {n}" for name, n in points.items())] if points else []
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return a text as TOML writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def submitted(folder: Path, lesson: str) -> Path | None:
    """Return the notebook of a submission: the one of the lesson's name, or else the only one, and
    no hidden file, as a Mac's notes, Jupyter's checkpoints, or what was there before an update."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".ipynb"
        and not any(map(is_hidden, path.relative_to(folder).parts))
    ]
    named = [path for path in paths if lesson in path.stem.lower()]
    only = paths[0] if len(paths) == 1 else None
    return max(named, key=lambda p: (p.stem.lower() == lesson, p.lstat().st_mtime), default=only)


def results(folder: Path, lesson: str, rules: Rules) -> dict:
    """Return what results.json is to say of the submission in a folder laid out as Gradescope's:
    submission/, and submission_metadata.json with the student's address."""
    users = []
    if (metadata := folder / "submission_metadata.json").exists():
        users = json.loads(metadata.read_text(encoding="utf-8")).get("users") or []
    # The case of an address changes neither the inputs nor what is set by hand.
    addresses = sorted(str(user.get("email", "")).casefold() for user in users)
    student = " ".join(addresses)
    # What is set by hand for one of a group is for all of it.
    by_hand = {one.casefold(): points for one, points in rules.override.items()}
    set_ = {e: n for one in addresses for e, n in by_hand.get(one, {}).items()}
    rules = replace(rules, due={}, late=0, override={student: set_})
    path, result = submitted(folder / "submission", lesson), grade.Result()
    if path is None:
        marks = gradebook.absent(student, lesson, rules)
    else:
        result = grade.judge(path, lesson, LIMITS, grade.variant_of(student, rules.seed))
        one = Handed(student, lesson, path, None, 0, path.name)
        marks = grade.marks_of(one, student, result, rules)
    if unmarked(marks):  # Gradescope says then that the autograder failed
        raise SystemExit(f"Not marked: {result.rest.message}")
    tests = []
    for mark in marks:
        outcome = mark.outcome
        tests.append(
            {
                "name": f"{mark.number} {mark.exercise}".strip(),
                "score": tidy(mark.points),
                "max_score": tidy(mark.maximum),
                "status": "passed" if outcome == "right" else "failed",
                "output": ": ".join(filter(None, [outcome, mark.told * (outcome != "right")])),
                "visibility": "visible",
            }
        )
    # What held the notebook is for whoever teaches: students see no output of the autograder's.
    print(grade.guards(result.held) if path else "There is no notebook of the lesson.")
    for number, words in result.odd:
        print(f"Look at it by eye: cell {number}: {words}")
    missing = {"output": f"There is no notebook {lesson}.ipynb in what you handed in."}
    return {"tests": tests, "stdout_visibility": "hidden"} | ({} if path else missing)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m classroom.gradescope", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("lesson", help="the first characters of a lesson, such as 02")
    parser.add_argument("--rules", type=Path, help="a TOML file with points, as for marking")
    parser.add_argument("--mark", type=Path, metavar="FOLDER", help="judge the submission in it")
    args = parser.parse_args(argv)
    lesson = notebooks.lessons([args.lesson])[0].stem
    try:
        rules = read_rules(args.rules) if args.rules else Rules()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.mark is None:
        path = archive(lesson, args.rules, ROOT / "build")
        print(f"{path}, {path.stat().st_size / 2**20:.0f} MiB")
        return 0
    (args.mark / "results").mkdir(exist_ok=True)
    text = json.dumps(results(args.mark, lesson, rules), indent=1)
    write_atomically({args.mark / "results" / "results.json": text.encode()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
