"""Each rule complains about a notebook that breaks it, and about nothing in one that doesn't."""

import os
import re
import signal
import subprocess
import sys

import nbformat
import psutil
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import notebooks, rules, warm_kernel
from tools.environment import ROOT, offline_environment

ALT = "A line that rises from one to two"
SOLUTION = "def row_norms(weight, eps=0.0):\n    return weight\n"
STUB = "def row_norms(weight, eps=0.0):\n    raise NotImplementedError"


def picture(alt):
    """Return an image with its alt text in the metadata."""
    return new_output("display_data", {"image/png": "aGk="}, metadata={"image/png": {"alt": alt}})


def page(text=f'<img src="data:,x" alt="{ALT}">', **other):
    """Return an output of HTML, by default with a picture and its alt text."""
    return new_output("display_data", {"text/html": text, **other})


def text(value, name="stdout"):
    return new_output("stream", text=value, name=name)


def code(source, *outputs, tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    if "plumbing" in tags:
        metadata["jupyter"] = {"source_hidden": True}
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def good():
    """Return a notebook that keeps all rules."""
    cells = [
        new_markdown_cell("# Title\n\nSee the next one."),
        code("# Set-up\nimport math"),
        code("import base64\n%matplotlib inline"),
        new_markdown_cell("| a | |\n|:---|---|\n| b | c |\n| | |"),
        new_markdown_cell("## Part\n\n```\n# no heading\n```\n\n### Subpart"),
        new_markdown_cell(
            "## Deeper · Beyond (3 min)", metadata={"jp-MarkdownHeadingCollapsed": True}
        ),
        code("print('https://example.org/tmp/x')", text("https://example.org/tmp/x\n")),
        code("# Source of this figure\nshow()", page(), tags=["plumbing"]),
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
    assert not list(rule(good(), place))


def test_neither_a_long_set_up_nor_a_folded_cells_name_makes_a_cell_too_long(place):
    nb = good()
    nb.cells[1].source += "\nimport math" * 40
    nb.cells.append(code("# Helper: x" + "\nx" * 25, tags=["plumbing"]))
    assert not list(rules.short_cells(nb, place))


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
    "executed_in_order": {"gap": change(lambda nb: nb.cells[-1].update(execution_count=99))},
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
        "in HTML": add(code("x", page(f'<img alt="{ALT}"><img>'))),
        "svg": add(code("x", page("<svg></svg>"))),
    },
    "pictures_are_stored_once": {"run by hand": add(code("x", page(**{"image/png": "aGk="})))},
    "short_cells": {
        "26 lines": add(code("x\n" * 25 + "x")),
        "26 folded": add(code("# Helper: x\n" + "x\n" * 26, tags=["plumbing"])),
    },
    "folded_cells_say_what_they_are": {
        "code first": add(code("x = 1  # drawn", tags=["plumbing"])),
        "empty comment": add(code("#\nx = 1", tags=["plumbing"])),
        "no set-up": change(lambda nb: nb.cells[1].update(source="import math")),
        "two set-ups": add(code("# Set-up\nx = 1")),
    },
    "imports_in_setup": {"late": add(code("import torch"))},
    "nothing_unsafe": {
        "input": add(code("name = input()")),
        "cell": add(code("%%bash\nls")),
        "assigned": add(code("files = !ls")),
        "pip": add(code("%pip install torch")),
        "remote code": add(code("load(name, trust_remote_code=True)")),
        "pickle": add(code("np.load(f, allow_pickle = True)")),
        "hub": add(code("model.push_to_hub(name)")),
    },
    "exercises_keep_their_names": {
        "defined": add(code("def row_norms(weight):\n    return weight", tags=["plumbing"])),
        "imported": add(code("from torch import norm as row_norms")),
        "assigned": add(code("if True:\n    row_norms = None")),
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
    assert list(getattr(rules, rule)(nb, place))


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
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    for number, rule in enumerate(refused):
        assert re.search(rf"(?m)^{number}\.ipynb:.*{rule}", printed), (rule, printed)
    assert not re.findall(r"(?m)^\d+\.py:.* (?:S\d+|TID251) .*", printed)


def test_solved_is_imports_solutions_checks_and_what_is_tagged_as_needed():
    nb = good()
    nb.cells += [
        code("train()", tags=["long"]),
        new_markdown_cell("## Deeper · Beyond (3 min)"),
        code("shape = (2, 3)", tags=["plumbing", "exercise-setup"]),
        code("draw()", tags=["plumbing"]),
    ]
    done = notebooks.solved(nb, {"row_norms": SOLUTION})
    imports, more, answer, check, needed = done.cells
    assert imports.source == "# Set-up\nimport math" and "base64" in more.source
    assert answer.source == SOLUTION and notebooks.tags(check) == ["check"]
    assert needed.source == "shape = (2, 3)"
    assert STUB in [cell.source for cell in nb.cells]


SAYS_RIGHT = """import types
class Right:
    def __repr__(self):
        return "✓ row_norms: right."
def judge(function):
    assert function(1) == 2, "✗ row_norms"
    return Right()
check = types.SimpleNamespace(start=types.SimpleNamespace(row_norms=judge))"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"tag": "plumbing"}, "name .more. is not defined"),
        ({"solution": "weight - more"}, "✗ row_norms"),
        ({"check": "verdict = check.start.row_norms(row_norms)"}, "0 of 1 checks said right; not"),
        ({"check": "print('✓ row_norms: right')"}, "those of row_norms"),
        ({"check": None}, "0 of 1 checks"),
        ({"stub": None, "check": None}, "do not fit together"),
        ({"solution": None}, "do not fit together"),
        ({"stub": None, "check": None, "solution": None}, "do not fit together"),
    ],
)
def test_a_solved_run_counts_the_checks_that_say_right(change, message, tmp_path):
    path = tmp_path / "00_start_here.ipynb"
    lesson = {"tag": "exercise-setup", "stub": STUB, "solution": "weight + more"}
    lesson |= {"check": "check.start.row_norms(row_norms)"} | change
    cells = [code(SAYS_RIGHT), code("more = 1", tags=[lesson["tag"]])]
    cells += [code(lesson["stub"], tags=["exercise"])] if lesson["stub"] else []
    cells += [code(lesson["check"], tags=["check"])] if lesson["check"] else []
    nbformat.write(new_notebook(cells=cells), path)
    (tmp_path / "solutions").mkdir()
    if lesson["solution"]:
        answer = SOLUTION.replace("return weight", f"return {lesson['solution']}")
        (tmp_path / "solutions" / "start.py").write_text(answer, encoding="utf-8")
    if message is None:
        assert notebooks.run_solved(path, tmp_path) == 1
    else:
        with pytest.raises((CellExecutionError, ValueError), match=message):
            notebooks.run_solved(path, tmp_path)


TRIES_THE_NETWORK = """import os, urllib.request
try:
    urllib.request.urlopen('http://192.0.2.1', timeout=1)
except OSError:
    pass
assert os.environ['PEFT_LESSONS_STRICT'] == '1'"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_when_it_is_interrupted(number, tmp_path):
    """nbclient would end this lesson alone, and the command would go on with the next."""
    source = f"import os, time\nos.kill({os.getpid()}, {number:d})\ntime.sleep(60)"
    nb = new_notebook(cells=[code(source)])
    with pytest.raises(KeyboardInterrupt):
        notebooks.execute(nb, tmp_path, offline_environment())


def test_an_endless_cell_fails_its_lesson_and_the_next_lesson_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "CELL_SECONDS", 1)
    lessons = [tmp_path / f"{name}.ipynb" for name in ("00_start_here", "01_why_peft")]
    for path, source in zip(lessons, ("import time; time.sleep(60)", "1"), strict=True):
        nbformat.write(new_notebook(cells=[code(source)]), path)
    assert notebooks.run("outputs", lessons) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith("failed: 00_start_here\n") and "01_why_peft" in printed.out


def test_execution_is_strict_and_guarded(tmp_path):
    """A failing cell fails the run, and a connection that the lesson hides is noticed."""
    log = tmp_path / "network.log"
    nb = new_notebook(cells=[code(TRIES_THE_NETWORK), code("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(nb, tmp_path, offline_environment(log=log, strict=True))
    assert "192.0.2.1" in log.read_text(encoding="utf-8")


forked = pytest.mark.skipif(
    warm_kernel.KERNEL not in os.environ, reason="no process forks kernels: on Linux, make test"
)


@forked
def test_a_forked_kernel_is_fresh_and_has_what_it_is_given(tmp_path):
    source = (
        "import os, peft_lessons\n"
        "assert not hasattr(peft_lessons, 'mark') and 'MARK' not in os.environ\n"
        "peft_lessons.mark = os.environ['MARK'] = '1'\n"
        "print(os.getcwd(), os.environ['GIVEN'])"
    )
    nb, environment = new_notebook(cells=[code(source)]), offline_environment() | {"GIVEN": "5"}
    for _ in range(2):
        done = notebooks.execute(nb, tmp_path, environment, warm_kernel.name())
        assert done.cells[0].outputs[0].text == f"{tmp_path} 5\n"
    nb.cells[0].source = "import os\nos._exit(3)"
    with pytest.raises(DeadKernelError):
        notebooks.execute(nb, tmp_path, environment, warm_kernel.name())


STAYS = """import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1], cwd=sys.argv[2])
client.execute("import os; open('pid', 'w').write(str(os.getpid()))", reply=True)
print(manager.provisioner.pid, flush=True)
sys.stdin.read()"""


@forked
@pytest.mark.parametrize("killed", ["who wants it", "who asked for it"])
def test_a_forked_kernel_ends_with(killed, tmp_path):
    command = [sys.executable, "-c", STAYS, warm_kernel.name(), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as wants:
        asks = int(wants.stdout.readline())
        kernel = psutil.Process(int((tmp_path / "pid").read_text(encoding="utf-8")))
        assert len({kernel.pid, asks, wants.pid}) == 3 and kernel.is_running()
        os.kill(wants.pid if killed == "who wants it" else asks, signal.SIGKILL)
        kernel.wait(20)
        wants.kill()


@pytest.mark.parametrize(("folder", "threads"), [("long" * 20, "1"), ("short", "2")])
def test_kernels_start_as_usual_where_a_fork_would_fail(folder, threads, tmp_path, monkeypatch):
    monkeypatch.delenv(warm_kernel.KERNEL, raising=False)
    environment = offline_environment() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": threads}
    with warm_kernel.started(tmp_path / folder, environment):
        assert warm_kernel.name() == "python3"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
def test_where_the_course_cannot_be_imported_each_lesson_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peft_lessons.py").write_text("1 / 0", encoding="utf-8")
    broken = offline_environment() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    asks = [sys.executable, warm_kernel.__file__, str(tmp_path / "socket"), "-f", "c"]
    with warm_kernel.started(tmp_path, broken):
        for _ in range(2):
            done = subprocess.run(asks, capture_output=True, text=True, timeout=20)
            assert "the process that imports the course has ended" in done.stderr


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
