"""The students' copy has all that a lesson needs, and no answers."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from classroom import release, update
from classroom.grade_one import print_of
from peft_lessons import commands
from tools import notebooks
from tools.environment import offline_environment


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "peft-lessons"
    return folder, release.release(folder)


def test_no_solution_is_in_it(copied):
    folder, _ = copied
    files = [path for path in folder.rglob("*") if path.suffix in {".py", ".ipynb", ".md"}]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert not [p for p in folder.rglob("*") if "solutions" in p.name or "tests" in p.name]
    for path in notebooks.lessons():
        for name, source in notebooks.read_solutions(path).items():
            assert (source.partition('"""\n')[2] or source.splitlines()[-1]) not in text, name
    # Nor one that differs in names and spaces alone.
    sources = [path.read_text(encoding="utf-8") for path in files if path.suffix == ".py"]
    for path in (folder / "notebooks").glob("*.ipynb"):
        sources += map(notebooks.python, notebooks.code_cells(notebooks.read(path)))
    theirs = {print_of(one, name) for one in sources for name in notebooks.definitions(one)}
    solved = map(notebooks.read_solutions, notebooks.lessons())
    ours = {print_of(one, name) for found in solved for name, one in found.items()}
    assert ours & theirs <= {""}


def test_exercises_and_checks_have_no_outputs_and_the_rest_is_as_it_was(copied):
    folder, _ = copied
    for path in notebooks.lessons():
        ours, theirs = notebooks.read(path), notebooks.read(folder / "notebooks" / path.name)
        assert ours.metadata == theirs.metadata
        for mine, his in zip(ours.cells, theirs.cells, strict=True):
            if {"exercise", "check"} & set(notebooks.tags(mine)):
                assert mine.source == his.source and not his.outputs
            else:
                assert mine == his


def test_a_copy_of_an_earlier_release_finds_the_script_that_updates_it(copied):
    folder, archive = copied
    (name,) = [n for n in zipfile.ZipFile(archive).namelist() if n.endswith("update.py")]
    assert name == f"{folder.name}/peft_lessons/data/update.py"
    assert (folder.parent / name).read_bytes() == Path(update.__file__).read_bytes()


def elsewhere(folder):
    """Return an environment in which the copy's package is the one that is imported."""
    return offline_environment({"PATH": "/usr/bin:/bin"}) | {"PYTHONPATH": str(folder)}


@pytest.mark.every_lesson
@pytest.mark.parametrize("lesson", notebooks.lessons(), ids=lambda path: path.stem)
def test_a_lesson_runs_in_the_copy_as_shipped(copied, lesson):
    folder, _ = copied
    path = folder / "notebooks" / lesson.name
    nb = notebooks.read(path)
    nb.cells.append(nb.cells[-1].copy())
    nb.cells[-1].update(source="import peft_lessons; peft_lessons.__file__", id="where")
    done = notebooks.execute(nb, path.parent, elsewhere(folder))
    assert str(folder) in done.cells[-1].outputs[0].data["text/plain"]


def imports(nb):
    """Return the import statements of a notebook's code cells, as one source."""
    trees = [ast.parse(cell.source) for cell in notebooks.code_cells(nb)]
    nodes = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, nodes))


def test_all_that_a_lesson_imports_or_loads_is_in_the_copy(copied):
    folder, _ = copied
    lessons = [notebooks.read(folder / "notebooks" / path.name) for path in notebooks.lessons()]
    source = "\n".join(map(imports, lessons))
    assert source.count("from peft_lessons import") >= len(lessons)
    cells = "\n".join(cell.source for nb in lessons for cell in notebooks.code_cells(nb))
    tables = re.findall(r'Study\.read\("\w+"\)|load_results\("\w+"\)', cells)
    assert len(tables) > 10
    loads = """
import peft_lessons.hf.cli as cli
import peft_lessons.methods.lora as lora
from peft_lessons import methods
assert methods.lora is lora  # and no function has the name of the package
from peft_lessons.data.bundled import bundled_files
print(cli.__file__, all(file.intact for file in bundled_files()))
"""
    command = [sys.executable, "-c", "\n".join([source, loads, *tables])]
    where = {"cwd": folder / "notebooks", "env": elsewhere(folder)}
    done = subprocess.run(command, **where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cli = str(folder / "peft_lessons" / "hf" / "cli.py")
    assert done.stdout.split() == [cli, "True"]
    assert (folder / "configs" / "two_cpus.yaml").is_file()


FOLDERS = "benchmarks|build|classroom|configs|data|docs|notebooks|peft_lessons|results|tasks|tests"
FOLDERS += "|tools"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w*]")
COMMAND = re.compile(r"(?:`|^|python3? |py )(?:make|course\.py) ([a-z]+)|\bmake ([a-z]+)`", re.M)


def sentences(folder):
    """Yield (file, text) of all that a learner reads in the copy."""
    for file in sorted(folder.rglob("*.md")) + sorted(folder.glob("environment.yml")):
        yield file, file.read_text(encoding="utf-8")
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        for cell in notebooks.read(path).cells:
            outputs = [o.get("text") or str(o.get("data", {})) for o in cell.get("outputs", [])]
            outputs = [re.sub(r"[A-Za-z0-9+/=]{200,}", "", text) for text in outputs]  # pictures
            yield path, "\n".join([cell.source, *outputs])
    # Of the commands, those of a copy are tested below.
    files = set((folder / "peft_lessons").rglob("*.py")) - {folder / "peft_lessons/commands.py"}
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file, node.value


def test_no_sentence_names_a_file_or_a_command_that_the_copy_does_not_have(copied):
    folder, _ = copied
    missing = []
    for file, text in sentences(folder):
        for path in PATH.findall(text):
            if not [*folder.glob(path), *folder.glob(f"data/{path}")]:
                missing.append((file.name, path))
        missing += [(file.name, c) for pair in COMMAND.findall(text) for c in pair if c not in HAS]
    assert not missing


HAS = {"", *(name for name, one in commands.COMMANDS.items() if not one.programs)}


def test_its_commands_are_those_of_a_learner(copied):
    folder, _ = copied

    def run(command):
        line = [sys.executable, "course.py", command]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True)

    assert set(re.findall(r"(?m)^  ([a-z]+)", run("help").stdout)) == HAS - {""}
    assert run("test").stderr.startswith("There is no command test.")
    conda = yaml.safe_load((folder / "environment.yml").read_text(encoding="utf-8"))
    installed = conda["dependencies"][-1]["pip"][-1]
    assert installed == "-e .[serve]", "without the instructors' tools"


def test_for_colab_each_lesson_begins_with_a_badge_and_a_set_up(tmp_path):
    path = notebooks.lessons()[0]
    nb = release.for_colab(notebooks.read(path), "jo/peft-course", path.name)
    badge, install = nb.cells[:2]
    assert "/github/jo/peft-course/blob/main/notebooks/00_start_here.ipynb)" in badge.source
    assert "github.com/jo/peft-course " in install.source and "course.py here" in install.source
    assert nb.cells[2:] == release.folded_in_colab(notebooks.read(path)).cells
    nb.cells = nb.cells[:2]
    done = notebooks.execute(nb, tmp_path, offline_environment())
    assert not done.cells[1].outputs, "nothing happens outside of Colab"
    with pytest.raises(ValueError, match="OWNER/NAME"):
        release.release(tmp_path / "new", colab="https://example.org/jo/peft-course")


def test_deeper_sections_and_plumbing_stay_folded_for_jupyterlab_and_for_colab():
    cells = [
        new_markdown_cell("# Title"),
        new_code_cell("# Helper: draw\ndraw = print", metadata={"tags": ["plumbing"]}),
        new_markdown_cell("> **Predict before you run.**"),
        new_code_cell("answer()", outputs=[new_output("stream", text="2")]),
        new_markdown_cell("## Deeper · Beyond (3 min)"),
        new_code_cell("more()"),
    ]
    nb = notebooks.clean(new_notebook(cells=cells), "02_lora")
    folds = [cell.metadata.copy() for cell in nb.cells]
    assert folds[1]["jupyter"] == {"source_hidden": True} and folds[1]["tags"] == ["plumbing"]
    assert folds[3]["jupyter"] == {"outputs_hidden": True}
    assert folds[4]["jp-MarkdownHeadingCollapsed"]
    assert [cell.metadata for cell in release.without_answers(nb).cells] == folds
    colab = release.for_colab(nb, "jo/peft-course", "02_lora.ipynb")
    nbformat.validate(colab)
    _, _, _, draw, _, answer, deeper, more = colab.cells
    assert colab.metadata.colab == {"collapsed_sections": [deeper.id]}
    assert deeper.metadata.id == deeper.id
    assert draw.metadata.cellView == "form"
    assert draw.source == "#@title Helper: draw\n# Helper: draw\ndraw = print"
    assert [answer.source, more.source] == ["answer()", "more()"]
    kept = [
        {k: cell.metadata[k] for k in own} for cell, own in zip(colab.cells[2:], folds, strict=True)
    ]
    assert kept == folds


def test_the_archive_has_the_notices_the_rule_for_line_ends_and_what_binder_needs(copied):
    # An instructor may put the copy into a repository, which somebody clones on Windows.
    names = set(zipfile.ZipFile(copied[1]).namelist())
    files = (".gitattributes", "LICENSE", "NOTICE", "course.py", "notebooks/14_beyond_lora.ipynb")
    files += (".binder/environment.yml", ".binder/postBuild", ".binder/start")
    assert {f"peft-lessons/{name}" for name in files} <= names


def test_the_archive_says_what_is_in_it_so_that_a_copy_can_be_updated(copied):
    folder, archive = copied
    record, data = update.read_new(archive)
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert {path.relative_to(folder).as_posix() for path in files} == set(data)
    assert set(data) == {update.RECORD, *record["files"]}
    assert set(record["cells"]) == {f"notebooks/{path.name}" for path in notebooks.lessons()}
    lesson = json.loads(data["notebooks/02_lora.ipynb"])
    for cell in lesson["cells"]:
        if "exercise" in cell["metadata"].get("tags", []):
            cell["source"] = "answer = 1"
    merged, row = update.merge_lesson(lesson, lesson, record["cells"]["notebooks/02_lora.ipynb"])
    assert merged == lesson and row == update.Tally()
    assert not update.plan(folder, record, data).write


def test_a_second_copy_replaces_the_first(copied):
    folder, _ = copied
    (folder / "notebooks" / "mine.ipynb").touch()
    release.release(folder)
    assert not (folder / "notebooks" / "mine.ipynb").exists()
