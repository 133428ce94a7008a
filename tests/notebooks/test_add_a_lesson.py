"""The steps of CONTRIBUTING.md, done once: docs/example adds a lesson with a method of its own to a
copy of the course, and all that the course's tests ask of a lesson and a method holds for it.

`make test` tries what needs no second pytest: rules, and the check with its answers.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from peft_lessons.checks import WrongAnswer
from tools import notebooks
from tools.environment import ROOT, offline_environment
from tools.rules import RULES, executed_in_order

EXAMPLE = ROOT / "docs" / "example"
LINES = {  # {file: (a line that is there, the line that comes below it)}
    "tools/notebooks.py": ('    "16_rewards": "rewards",', '    "18_lora_xs": "lora_xs",'),
    "peft_lessons/checks/__init__.py": ("from . import (", "    lora_xs,"),
    "peft_lessons/__init__.py": (
        "from .methods.lora import LinearWithLoRA, LoRA, LoRALayer, apply_lora_to_model",
        "from .methods.lora_xs import LoRAXS",
    ),
    "tests/methods/test_every_method.py": (
        "METHODS = {  # {row: the method for a model of this name}",
        '    "lora-xs": lambda name: LoRAXS(4, 6.0, TARGETS[name]),',
    ),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Return a copy of the course with the example's files and lines in it."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("peft_lessons", "tools", "classroom", "tests", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "conftest.py", "course.py", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    for name, (there, new) in LINES.items():
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(f"{there}\n") == 1, f"{name} has no line {there!r}"
        (folder / name).write_text(text.replace(there, f"{there}\n{new}"), encoding="utf-8")
    rows = folder / "tests" / "methods" / "test_every_method.py"
    rows.write_text(
        rows.read_text(encoding="utf-8").replace(
            "    LoRAPlus,\n", "    LoRAPlus,\n    LoRAXS,\n", 1
        ),
        encoding="utf-8",
    )
    return folder


def run(folder, *command):
    base = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = offline_environment(base) | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def lesson(course, monkeypatch):
    """Yield the path of the example's lesson in the copy, while it is in the map of lessons."""
    monkeypatch.setitem(notebooks.MODULES, "18_lora_xs", "lora_xs")
    return course / "notebooks" / "18_lora_xs.ipynb"


def test_the_example_keeps_the_rules(lesson):
    nb = notebooks.read(lesson)
    as_written = [rule for rule in RULES if rule is not executed_in_order]  # it has no outputs
    assert not [text for rule in as_written for text in rule(nb, lesson)]


def part(name, file):
    """Import a file of the example as a module of one of the course's packages."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_s_check_knows_its_mistakes(lesson):
    check = part("peft_lessons.checks.lora_xs", "peft_lessons/checks/lora_xs.py").affordable_rank
    space = {}
    exec(notebooks.read_solutions(lesson)["affordable_rank"], space)
    assert check(space["affordable_rank"]).status == check(check.right).status == "right"
    for cause, answer in check.causes.items():
        with pytest.raises(WrongAnswer, match=re.escape(f"Likely cause: {cause}")):
            check(answer)


@pytest.mark.every_lesson
def test_a_new_lesson_is_executed_and_tested(course):
    run(course, "tools.notebooks", "outputs", "18")
    tests = ["tests/notebooks", "tests/checks", "tests/methods"]
    chosen = "18_lora_xs or lora_xs or affordable_rank or lora-xs or LoRAXS or has_a_row"
    report = run(course, "pytest", "-v", "-k", chosen, *tests)
    ran = (
        "does_all_that_a_method_does[lora-xs",
        "is_its_formula[LoRAXS",
        "rules[18",
        "solved[18",
        "named_alone[affordable_rank-0",
    )
    for test in ran:
        assert re.search(rf"{re.escape(test)}.*PASSED", report), test
    fresh = notebooks.read(course / "notebooks" / "18_lora_xs.ipynb")
    stored = notebooks.read(EXAMPLE / "notebooks" / "18_lora_xs.ipynb")
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in stored.cells]
    (proof,) = [c for c in fresh.cells if "nbval-check-output" in notebooks.tags(c)]
    assert proof.outputs[0].text == "True True True\n"
