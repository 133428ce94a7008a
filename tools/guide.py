"""Write docs/wrong_answers.md, what the checks recognise: python -m tools.guide"""

import importlib
import re
import sys

from peft_lessons import check
from tools import notebooks
from tools.environment import ROOT

PAGE = ROOT / "docs" / "wrong_answers.md"
INTRODUCTION = """\
# Wrong answers by exercise

What to expect in class, written by `make guide` from the checks themselves: the causes that each
check names, in its own words. A check names one only where the answer does what that mistake does.
What any exercise can get wrong is left out here and refused all the same: another shape, a
narrower dtype, a list in the place of a tensor, an argument that is changed, a gradient that does
not arrive, an error."""


def causes(lesson: str) -> dict[str, list[str]]:
    """Return {exercise: its wrong answers}: the causes that its check names, without those that
    combine two others. Some exercises are checked by trials and have no causes: theirs are the
    wrong answers of the tests, with part of each message."""
    course = getattr(check, notebooks.MODULES[lesson])
    found = {}
    for exercise in notebooks.exercises(lesson):
        named = getattr(course, exercise).explanations
        single = [c for c in named if not any(other in c for other in named if other != c)]
        found[exercise] = single or tested(lesson, exercise)
    return found


def tested(lesson: str, exercise: str) -> list[str]:
    """Return the wrong answers of the tests, each with its message."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        answers = importlib.import_module(f"exercises.{notebooks.MODULES[lesson]}").answers
    finally:
        sys.path.pop(0)
    return [
        ("" if function.__name__ == exercise else f"{function.__name__.replace('_', ' ')}: ")
        + f"“… {told} …”"
        for name, function, told in answers.wrongs
        if name == exercise
    ]


def escaped(sentence: str) -> str:
    """Escape what Markdown would read as markup: formulas hold such characters."""
    return re.sub(r"([*<$\[\]]|_(?=_))", r"\\\1", sentence)


def page() -> str:
    parts = [INTRODUCTION]
    for path in notebooks.lessons():
        title = notebooks.read(path).cells[0].source.splitlines()[0].removeprefix("# ")
        parts.append(f"## {path.stem[:2]} {title}")
        for exercise, sentences in causes(path.stem).items():
            lines = "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
            parts.append(f"### `{exercise}`\n\n{lines}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
