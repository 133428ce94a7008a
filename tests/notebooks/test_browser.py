"""What a learner sees: each lesson in JupyterLab, in a real browser, and an exercise done in it.

`make test` opens the shortest lesson without its long cells, `make browser` all lessons.
"""

import builtins
import importlib.util
import inspect
import os
import re
import symtable
import urllib.error
import urllib.request
from unittest.mock import MagicMock

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from peft_lessons import check
from peft_lessons.checks.mistakes import KNOWN
from tools import notebooks

pytestmark = pytest.mark.browser
if importlib.util.find_spec("playwright") is None:
    pytest.skip("playwright is not installed", allow_module_level=True)

from tools.lab import NOTEBOOK, chromium, launch, open_lab, serve  # noqa: E402  # needs playwright

IMPORTS = "import math, torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"
BAR = re.compile(r"([\d.]+\w?)/([\d.]+\w?) \|")
SHORTEST = "13"  # in seconds
LESSONS = [
    pytest.param(path, whole, id=path.stem if whole else f"{path.stem}, short", marks=marks)
    for path in notebooks.lessons()
    for whole, marks in ((True, pytest.mark.every_lesson), (False, ()))
    if whole or path.stem.startswith(SHORTEST)
]


def looked_up(scope):
    """Return the global names that a scope of symtable's and those within it look up."""
    names = {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    return names.union(*map(looked_up, scope.get_children()))


def wrong_answer(lesson):
    """Return (exercise, source, cause): the first mistake of a check that needs nothing else."""
    for exercise in notebooks.exercises(lesson):
        causes = getattr(getattr(check, notebooks.MODULES[lesson]), exercise).causes
        for cause, function in causes.items():
            if not inspect.isfunction(function):  # a class is longer than a cell to show
                continue
            source = causes.source(cause)
            (scope,) = symtable.symtable(source, "", "exec").get_children()
            if looked_up(scope) <= {*KNOWN, *dir(builtins)}:
                name = rf"(?<=^def ){function.__name__}\b"
                return exercise, IMPORTS + re.sub(name, exercise, source), cause
    raise AssertionError(f"no wrong answer of {lesson} stands by itself")


@pytest.mark.parametrize("lesson", [path.stem for path in notebooks.lessons()])
def test_each_lesson_has_a_wrong_answer_to_show(lesson):
    exercise, source, cause = wrong_answer(lesson)
    assert f"def {exercise}(" in source and cause


def status_of(address, token=None):
    """Return (the status of a request, the page that it ends at)."""
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as error:
        return error.code, error.url


def test_no_other_account_can_use_the_server(tmp_path):
    (root := tmp_path / "notebooks").mkdir()
    with serve(root, tmp_path, dark=False) as (url, token):
        for path in ("contents", "kernels", "terminals"):
            assert status_of(f"{url}/api/{path}")[0] == 403
            assert status_of(f"{url}/api/{path}", token[::-1])[0] == 403
            assert status_of(f"{url}/api/{path}", token)[0] == 200
        assert "/login" in status_of(f"{url}/lab")[1]
        assert status_of(f"{url}/lab?token={token}") == (200, f"{url}/lab?token={token}")
        # What a list of processes shows to everybody.
        commands = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
        assert any("-m jupyterlab" in line for line in commands)
        assert not any(token in line for line in commands)
    assert len(token) > 30


@pytest.mark.parametrize(("account", "sandbox"), [(0, False), (1000, True)])
def test_only_root_s_browser_has_no_sandbox(account, sandbox, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: account, raising=False)
    playwright = MagicMock()
    launch(playwright)
    options = playwright.chromium.launch.call_args.kwargs
    assert options["chromium_sandbox"] is sandbox and "--no-sandbox" not in options["args"]


SHOWN = f"""() => {NOTEBOOK}.widgets.map(cell => [
    cell.node.checkVisibility(), !cell.inputHidden, !cell.outputHidden])"""


@pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
def test_folded_cells_run_and_unfold(tmp_path):
    cells = [
        new_markdown_cell("# Title\n\n**Predict before you run.**"),
        new_code_cell("2", outputs=[new_output("stream", text="2")]),
        new_code_cell("3", metadata={"tags": ["plumbing"]}),
        new_markdown_cell("## Deeper · Beyond (3 min)"),
        new_code_cell("4"),
        new_markdown_cell("## End"),
        new_code_cell("5"),
    ]
    nb = notebooks.clean(nbformat.v4.new_notebook(cells=cells), "folded")
    nbformat.write(nb, tmp_path / "folded.ipynb")
    with open_lab(tmp_path / "folded.ipynb") as lab:
        visible = lab.page.evaluate(SHOWN)
        assert [cell[0] for cell in visible] == [True, True, True, True, False, True, True]
        assert [n for n, cell in enumerate(visible) if not cell[1]] == [2]
        assert [n for n, cell in enumerate(visible) if cell[2] is False] == [1]
        lab.run_all()
        assert [cell["count"] for cell in lab.cells() if cell["type"] == "code"] == [1, 2, 3, 4]
        visible = lab.page.evaluate(SHOWN)
        assert not visible[4][0] and visible[1][2], "a section stays folded, an answer is seen"
        lab.unfold()
        assert all(all(cell[:2]) for cell in lab.page.evaluate(SHOWN))


@pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("path", "whole"), LESSONS)
def test_a_lesson_runs_and_an_exercise_is_judged(path, whole, tmp_path):
    exercise, wrong, cause = wrong_answer(path.stem)
    nb = notebooks.read(path)
    nb.cells = [cell for cell in nb.cells if whole or "long" not in notebooks.tags(cell)]
    nbformat.write(nb, tmp_path / path.name)
    with open_lab(tmp_path / path.name) as lab:
        lab.run_all()
        cells = lab.cells()
        code = [cell for cell in cells if cell["type"] == "code" and cell["source"].strip()]
        failed = [
            cell["source"] + "\n" + cell["text"]
            for cell in code
            if cell["errors"] and "raises-exception" not in cell["tags"]
        ]
        assert not failed, "\n".join(failed)
        assert [cell["count"] for cell in code] == list(range(1, len(code) + 1))
        bars = [bar for cell in code for bar in BAR.findall(cell["text"])]
        assert all(done == total for done, total in bars), bars

        stub, check = lab.find(f"def {exercise}(", "exercise"), lab.find(f".{exercise}(", "check")
        assert not lab.run_cell(stub, wrong)["errors"]
        refused = lab.run_cell(check)
        assert refused["errors"] == 1
        assert f"✗ {exercise}" in refused["text"]
        assert cause in " ".join(refused["text"].split())
        assert "Traceback" not in refused["text"]

        assert not lab.run_cell(stub, notebooks.read_solutions(path)[exercise])["errors"]
        accepted = lab.run_cell(check)
        assert not accepted["errors"]
        assert f"✓ {exercise}" in accepted["text"]

        assert not lab.console_errors, "\n".join(lab.console_errors)
