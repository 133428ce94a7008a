"""Each rule complains about a notebook that breaks it, and about nothing in one that doesn't."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import notebooks, rules, warm
from tools.environment import ROOT, offline_environment
from tools.names import needed

ALT = "A line that rises from one to two"
SOLUTION = "def row_norms(weight, eps=0.0):\n    return weight\n"
STUB = "def row_norms(weight, eps=0.0):\n    raise NotImplementedError"


def picture(alt, page=f'<img src="data:,x" alt="{ALT}">'):
    """Return an image with its alt text in the metadata, and with HTML as a second form."""
    data = {"image/png": "aGk=", "text/html": page}
    return new_output("display_data", data, metadata={"image/png": {"alt": alt}})


def text(value, name="stdout"):
    return new_output("stream", text=value, name=name)


def code(source, *outputs, tags=()):
    return new_code_cell(
        source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {}
    )


def good():
    """Return a notebook that keeps all rules."""
    cells = [
        new_markdown_cell("# Title\n\nSee the next one."),
        code("#| default_exp methods.start"),
        code("#| export\nimport math"),
        code("import base64\n%matplotlib inline"),
        new_markdown_cell("| a | |\n|:---|---|\n| b | c |\n| | |"),
        new_markdown_cell("## Part\n\n```\n# no heading\n```\n\n### Subpart"),
        new_markdown_cell(
            "## Deeper · Beyond (3 min)", metadata={"jp-MarkdownHeadingCollapsed": True}
        ),
        code("print('https://example.org/tmp/x')", text("https://example.org/tmp/x\n")),
        code("show()", picture(ALT)),
        code(
            "1 / 0", new_output("error", ename="E", evalue="", traceback=["E"]),
            tags=["raises-exception"],
        ),
        code(STUB, tags=["exercise"]),
        code("check.start.row_norms(row_norms)", tags=["check"]),
    ]  # fmt: skip
    nb = new_notebook(cells=cells, metadata=nbformat.from_dict(notebooks.CLEAN_METADATA))
    return number(nb)


def number(nb):
    for count, cell in enumerate(notebooks.code_cells(nb), 1):
        cell.execution_count = count
    return nb


@pytest.fixture
def place(tmp_path):
    """Return the notebook's path, with a solution next to it."""
    path = tmp_path / "00_start_here.ipynb"
    path.write_text("{}", encoding="utf-8")
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "start.py").write_text(SOLUTION, encoding="utf-8")
    return path


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule, place):
    assert rule(good(), place) == []


def add(*cells):
    def breaks(nb, path):
        nb.cells.extend(cells)
        number(nb)

    return breaks


def change(function):
    return lambda nb, path: function(nb)


def solution(source):
    return lambda nb, path: (path.parent / "solutions" / "start.py").write_text(
        source, encoding="utf-8"
    )


def without(tag):
    def breaks(nb, path):
        nb.cells = [cell for cell in nb.cells if tag not in notebooks.tags(cell)]

    return breaks


BAD = {
    "executed_in_order": {
        "gap": change(lambda nb: nb.cells[-1].update(execution_count=99)),
    },
    "raises_only_where_tagged": {
        "error": add(code("x", new_output("error", ename="E", evalue="", traceback=[]))),
        "no error": add(code("x", tags=["raises-exception"])),
    },
    "no_stderr": {"warning": add(code("x", text("UserWarning: old", "stderr")))},
    "no_machine_paths": {
        "home": add(code("x", text("saved in /home/ada/x"))),
        "tmp": add(code("open('/tmp/x')")),
        "windows": add(code("x", text(r"C:\Users\ada"))),
        "package": add(code("x", text("lib/site-packages/torch"))),
        "traceback": add(
            code("x", new_output("error", ename="E", evalue="", traceback=["/work/x.py"]))
        ),
        "checkout": add(new_markdown_cell(f"in {ROOT}")),
    },
    "small_file": {"large": lambda nb, path: path.write_text("x" * 1_000_000, encoding="utf-8")},
    "pictures_have_alt_text": {
        "none": add(code("x", new_output("display_data", {"image/png": "aGk="}))),
        "short": add(code("x", picture("a plot"))),
        "in HTML": add(code("x", picture(ALT, f'<img alt="{ALT}"><img>'))),
        "svg": add(code("x", picture(ALT, "<svg></svg>"))),
    },
    "short_cells": {"26 lines": add(code("x\n" * 25 + "x"))},
    "imports_in_setup": {
        "late": add(code("import torch")),
    },
    "nothing_unsafe": {
        "input": add(code("name = input()")),
        "cell": add(code("%%bash\nls")),
        "assigned": add(code("files = !ls")),
        "pip": add(code("%pip install torch")),
        "remote code": add(code("load(name, trust_remote_code=True)")),
        "pickle": add(code("np.load(f, allow_pickle = True)")),
        "hub": add(code("model.push_to_hub(name)")),
    },
    "exercises_have_checks": {
        "none": without("check"),
        "of another": change(lambda nb: nb.cells[-1].update(source="check.start.f(row_norms)")),
        "without stub": without("exercise"),
        "two functions": change(lambda nb: nb.cells[-2].update(source=STUB + "\ndef g(): ...")),
        "next stub first": add(code("def g(): ...", tags=["exercise"])),
        "not in the map": None,
    },
    "solutions_match_stubs": {
        "no solution": solution(""),
        "no stub": solution(SOLUTION + "def g(): ..."),
        "another default": solution("def row_norms(weight, eps=1.0): ..."),
        "another name": solution("def row_norms(w, eps=0.0): ..."),
    },
    "formulas_are_escaped_once": {
        "doubled": add(new_markdown_cell(r"where $W_\\text{up}$ starts at zero"))
    },
    "tables_have_headers": {
        "empty row": add(new_markdown_cell("text\n\n| | |\n|---|---|\n| a | b |")),
        "aligned": add(new_markdown_cell("|  |  |\n|:--|--:|\n| a | b |")),
    },
    "headings_in_order": {
        "no title": change(lambda nb: nb.cells[0].update(source="Title")),
        "two titles": add(new_markdown_cell("# Another")),
        "jump": change(lambda nb: nb.cells.insert(1, new_markdown_cell("### Too deep"))),
        "deeper below text": add(new_markdown_cell("Text.\n\n## Deeper · Beyond (3 min)")),
        "deeper of level 3": add(new_markdown_cell("### Deeper · Beyond (3 min)")),
        "deeper without its dot": add(new_markdown_cell("## Deeper: beyond (3 min)")),
    },
    "clean_metadata": {
        "kernel": change(lambda nb: nb.metadata.kernelspec.update(name="venv")),
        "timing": change(lambda nb: nb.cells[1].metadata.update(execution={"x": "2020-01-01"})),
        "tag": add(code("x", tags=["exercize"])),
    },
}


def test_every_rule_is_broken_here():
    assert BAD.keys() == {rule.__name__ for rule in rules.RULES}


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, case) for rule, cases in BAD.items() for case in cases]
)
def test_a_bad_notebook_is_refused(rule, case, place):
    nb, breaks = good(), BAD[rule][case]
    if breaks is None:
        place = place.rename(place.with_name("99_unknown.ipynb"))
    else:
        breaks(nb, place)
    assert getattr(rules, rule)(nb, place)


def test_ruff_refuses_what_the_rules_leave_to_it(tmp_path):
    """In notebooks, and nothing of it elsewhere."""
    refused = {
        "T100": "breakpoint()",
        "S301": "import pandas\npandas.read_pickle('f')",
        "S605": "import os\nos.system('ls')",
        "`torch.load`": "import torch as t\nt.load('f')",
        "`urllib`": "def f():\n    from urllib.request import urlopen",
        "`subprocess`": "import subprocess",
    }
    for number, source in enumerate(refused.values()):
        nbformat.write(new_notebook(cells=[code(source)]), tmp_path / f"{number}.ipynb")
        (tmp_path / f"{number}.py").write_text(source, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config"]
    command = [*ruff, ROOT / "pyproject.toml", "--output-format=concise", "."]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    for number, told in enumerate(refused):
        assert re.search(rf"(?m)^{number}\.ipynb:.*{told}", said), (told, said)
    assert not re.findall(r"(?m)^\d+\.py:.* (?:S\d+|TID251) .*", said)


def test_solved_is_what_the_solutions_and_the_checks_need():
    nb = good()
    nb.cells.append(code("train()", tags=["long"]))
    done = notebooks.solved(nb, {"row_norms": SOLUTION})
    exported, imports, answer, check = done.cells
    assert exported.source.startswith("#| export") and "base64" in imports.source
    assert answer.source == SOLUTION and notebooks.tags(check) == ["check"]
    assert nb.cells[-3].source == STUB


def test_an_exercise_in_a_deeper_section_is_solved_with_the_plumbing_that_it_needs():
    nb = good()
    *core, stub, check = nb.cells
    section = [
        new_markdown_cell("## Deeper · Beyond (3 min)"),
        code("shape = (2, 3)", tags=["plumbing"]),
        code("draw()", tags=["plumbing"]),
    ]
    nb.cells = [*core, *section, stub, check]
    answer = SOLUTION.replace("weight\n", "weight.expand(shape)\n")
    done = notebooks.solved(notebooks.clean(nb, "00_start_here"), {"row_norms": answer})
    assert [cell.source for cell in done.cells[-3:]] == ["shape = (2, 3)", answer, check.source]
    assert "draw()" not in [cell.source for cell in done.cells]


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("a = 2", True),
        ("for a in (1, 2):\n    pass", True),
        ("def late():\n    return a", False),
        ("b['part'] = 2", True),
        ("b.append(2)", True),
        ("change(b, 2)", True),
        ("c = b.part", False),
        ("def b_of(a):\n    c = a", False),
        ("g = lambda: a", True),  # which f calls
        ("import math", True),
    ],
)
def test_a_cell_runs_if_a_needed_name_comes_of_it(source, runs):
    first, wanted = "a, b, c = 1, [], 0\ndef f():\n    return g()", "f() + b[a]"
    assert needed([first, source, wanted, "a = 3"], [2]) == ([0, 1, 2] if runs else [0, 2])


def test_a_name_that_a_cell_binds_itself_is_not_needed():
    assert needed(["a = 1", "a = 2\nprint(a)"], [1]) == [1]
    assert needed(["a = 1", "a = a + 1"], [1]) == [0, 1]
    assert needed(["a = 1", "if x:\n    a = 2\nprint(a)"], [1]) == [0, 1]
    assert needed(["a = 1"], []) == []


TRIES_THE_NETWORK = """import os, urllib.request
try:
    urllib.request.urlopen('http://192.0.2.1', timeout=1)
except OSError:
    pass
assert os.environ['PEFT_LESSONS_STRICT'] == '1'"""


@pytest.mark.parametrize("kernel", [True, False])
def test_execution_is_strict_and_guarded(kernel, tmp_path):
    """A failing cell fails the run, and a connection that the lesson hides is noticed."""
    log = tmp_path / "network.log"
    env = offline_environment(log=log, strict=True)
    sources = [TRIES_THE_NETWORK, "1 / 0"]
    with pytest.raises((CellExecutionError, RuntimeError), match="ZeroDivisionError"):
        if kernel:
            nb = new_notebook(cells=[code(source) for source in sources])
            notebooks.execute(nb, tmp_path, env)
        else:
            warm.run([(source, False) for source in sources], tmp_path, env, 60)
    assert "192.0.2.1" in log.read_text(encoding="utf-8")


def test_a_run_is_fresh_and_ends_in_time(tmp_path):
    env = offline_environment()
    fails = "import peft_lessons, sys\nprint('before')\nassert not hasattr(peft_lessons, 'mark')"
    marks = "import os\npeft_lessons.mark = os.environ['MARK'] = os.getcwd()"
    for _ in range(2):
        warm.run([("1 / 0", True), (fails, False), (marks, False)], tmp_path, env, 60)
    assert "MARK" not in os.environ
    with pytest.raises(RuntimeError, match="longer than 0.5 s"):
        warm.run([("import time\ntime.sleep(9)", False)], tmp_path, env, 0.5)


def test_stored_outputs_are_the_same_twice(tmp_path):
    path = tmp_path / "00_start_here.ipynb"
    cells = [code("import sys\nprint(1)\nprint(2, file=sys.stderr)"), code("{1: 2}")]
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.store_outputs(path)
    first = path.read_bytes()
    notebooks.store_outputs(path)
    assert path.read_bytes() == first
    nb = notebooks.read(path)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert nb.metadata == notebooks.CLEAN_METADATA
