"""Write the students' copy of the course: python -m classroom.release [FOLDER] [--colab OWNER/NAME]

The copy has the lessons, the package and the data, and it runs by itself. It has no solutions, no
tests, which hold the solutions too, and no outputs of exercises and checks. FOLDER, build/peft-
lessons unless given, must be new or an earlier copy; a ZIP file of it is written beside it.

The copy has a record of its files and cells. With it `python course.py update` brings an earlier
copy, in which a student has worked, to the state of this one.

For Colab, publish the copy as the GitHub repository OWNER/NAME, branch main. With --colab every
lesson begins with a badge that opens it there, and a cell that installs the course there.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import nbformat

from classroom import update
from peft_lessons.data.bundled import ASSISTANT
from tools import notebooks
from tools.environment import ROOT
from tools.publish import COLAB_HOME, clear, in_colab, owner_and_name

COPIED = (".gitattributes", "LICENSE", "NOTICE", "Makefile", "course.py", "pyproject.toml")
COPIED += (".binder", "peft_lessons", "data", "benchmarks", "configs")
STUDENT = ROOT / "docs" / "student"  # what is only in the copy, a README
# The assistant is 260 MiB, and the copy's own set-up fetches it.
LITTER = shutil.ignore_patterns("__pycache__", ".*", "*.part", Path(ASSISTANT).name, "tests")
# Where the command `update` of an earlier copy looks for the script.
UPDATE = "peft_lessons/data/update.py"


def copy_course(names: Iterable[str], folder: Path) -> None:
    """Copy files and folders of the course, without tests and litter, to another folder."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LITTER)
        else:
            shutil.copy(ROOT / name, folder / name)


def without_answers(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove, in place, what exercises and checks printed; all else, the kernel too, stays."""
    for cell in notebooks.code_cells(nb):
        if {"exercise", "check"} & set(notebooks.tags(cell)):
            cell.outputs, cell.execution_count = [], None
    return nb


COLAB_CELL = """import os
if "COLAB_RELEASE_TAG" in os.environ:  # in Colab only, once a session
    !git clone --quiet --depth 1 https://github.com/{repository} /content/course
    !python /content/course/course.py here
    %cd /content/course/notebooks
    import sys; sys.path.insert(0, "/content/course")"""


def folded_in_colab(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Mark, in place, what Colab folds: the source of plumbing cells, under the name that the cell
    gives itself, and the deeper sections."""
    sections = [cell for cell in nb.cells if notebooks.deeper(cell)]
    for cell in sections:
        cell.metadata["id"] = cell.id
    if sections:
        nb.metadata["colab"] = {"collapsed_sections": [cell.id for cell in sections]}
    for cell in notebooks.code_cells(nb):
        if "plumbing" in notebooks.tags(cell):
            cell.metadata["cellView"] = "form"
            cell.source = f"#@title {notebooks.names_itself(cell)}\n{cell.source}"
    return nb


def for_colab(nb: nbformat.NotebookNode, repository: str, name: str) -> nbformat.NotebookNode:
    """Begin, in place, with a badge that opens the lesson in Colab, and a cell that installs the
    course there, and fold as Colab does. `repository` is OWNER/NAME, `name` that of the file."""
    badge = f"[![Open in Colab]({COLAB_HOME}/assets/colab-badge.svg)]({in_colab(repository, name)})"
    install = nbformat.v4.new_code_cell(COLAB_CELL.format(repository=repository), id="colab")
    folded_in_colab(nb)
    nb.cells[:0] = [nbformat.v4.new_markdown_cell(badge, id="colab-badge"), install]
    return nb


def release(folder: Path, colab: str | None = None) -> Path:
    """Write the copy and its ZIP file, and return the path of the ZIP file.

    `colab` is the GitHub repository, OWNER/NAME or its address, where the copy will be published.
    Raises ValueError for a folder that holds something else, or for another form of repository."""
    colab = colab and owner_and_name(colab)
    clear(folder, update.RECORD)
    (folder / "notebooks").mkdir(parents=True)
    (folder / update.RECORD).touch()
    copy_course(COPIED, folder)
    shutil.copy(update.__file__, folder / UPDATE)
    for file in STUDENT.iterdir():
        shutil.copy(file, folder / file.name)
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    (folder / "environment.yml").write_text(conda.replace(".[dev,", ".["), encoding="utf-8")
    for path in notebooks.lessons():
        nb = without_answers(notebooks.read(path))
        if colab is not None:
            nb = for_colab(nb, colab, path.name)
        nbformat.write(nb, folder / "notebooks" / path.name)
    stamp = json.dumps(update.record(folder), indent=0)
    (folder / update.RECORD).write_text(stamp, encoding="utf-8")
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m classroom.release", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "peft-lessons")
    parser.add_argument("--colab", metavar="OWNER/NAME", help="where the copy will be published")
    args = parser.parse_args(argv)
    try:
        archive = release(args.folder.resolve(), args.colab)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.folder}\n{archive}, {archive.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
