"""What a learner sees: a lesson in JupyterLab, in a real browser, and an exercise done in it."""

import importlib.util
import re

import pytest

from tools.notebooks import NOTEBOOKS, read_solutions

pytestmark = pytest.mark.browser
if importlib.util.find_spec("playwright") is None:
    pytest.skip("playwright is not installed", allow_module_level=True)

from tools.lab import chromium, open_lab  # noqa: E402  # needs playwright

LESSON = NOTEBOOKS / "02_lora.ipynb"
EXERCISE = "unmerge_lora"
BAR = re.compile(r"([\d.]+\w?)/([\d.]+\w?) \|")


def wrong(solution):
    """The solution with its result negated: of the right shape and type, and wrong."""
    return solution.replace(f"def {EXERCISE}(", "def right(") + (
        f"\n\n\ndef {EXERCISE}(merged_weight, A, B, alpha):\n"
        "    return -right(merged_weight, A, B, alpha)\n"
    )


@pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
def test_a_lesson_runs_and_an_exercise_is_judged():
    with open_lab(LESSON) as lab:
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

        stub, check = lab.find(f"def {EXERCISE}(", "exercise"), lab.find(EXERCISE, "check")
        assert "not attempted" in cells[check]["text"].lower()
        solution = read_solutions(LESSON)[EXERCISE]

        assert not lab.run_cell(stub, wrong(solution))["errors"]
        refused = lab.run_cell(check)
        assert refused["errors"] == 1
        assert f"✗ {EXERCISE}" in refused["text"]
        assert "Traceback" not in refused["text"]

        assert not lab.run_cell(stub, solution)["errors"]
        accepted = lab.run_cell(check)
        assert not accepted["errors"]
        assert accepted["text"].strip()
        assert "not attempted" not in accepted["text"].lower()

        assert not lab.console_errors, "\n".join(lab.console_errors)
