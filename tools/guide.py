"""Write docs/wrong_answers.md, what the checks recognise: python -m tools.guide

The list is that of the tests, which hand every one of these answers to its check.
"""

import importlib
import sys

from tools import notebooks
from tools.environment import ROOT
from tools.grade_one import exercises

PAGE = ROOT / "docs" / "wrong_answers.md"


def wrong_answers(lesson: str) -> dict[str, list[str]]:
    """{exercise: what its wrong answers are told} of a lesson, each once."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        answers = importlib.import_module(f"exercises.{notebooks.MODULES[lesson]}").answers
    finally:
        sys.path.pop(0)
    found: dict[str, list[str]] = {name: [] for name in exercises(lesson)}
    for exercise, _, told in answers.wrongs:
        if told not in found[exercise]:
            found[exercise].append(told)
    return found


def page() -> str:
    parts = [
        "# Wrong answers by exercise",
        "What the checks say of the wrong answers that they know, exercise by exercise. Written by "
        "`make guide` from the tests, which hand each of these answers to its check.",
    ]
    for path in notebooks.lessons():
        title = notebooks.read(path).cells[0].source.splitlines()[0].lstrip("# ")
        parts.append(f"## {path.stem[:2]} {title}")
        for exercise, told in wrong_answers(path.stem).items():
            parts.append(f"### `{exercise}`")
            parts.append("\n".join(f"- {sentence}" for sentence in told))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
