"""Write the students' copy of the course: python -m tools.release [FOLDER]

It has the lessons, the package and the data, and runs by itself. It has no solutions, no tests,
which hold them too, and no outputs of exercises and checks. FOLDER, build/peft-lessons unless
given, must be new or an earlier copy; a ZIP file of it is written beside it.
"""

import argparse
import shutil
from pathlib import Path

import nbformat

from tools import notebooks
from tools.environment import ROOT

COPIED = (".gitattributes", "LICENSE", "NOTICE", "pyproject.toml", "environment.yml")
COPIED += ("peft_lessons", "data", "benchmarks")
STUDENT = ROOT / "docs" / "student"  # a README and a Makefile of their own
LITTER = shutil.ignore_patterns("__pycache__", ".*", "*.part")
STAMP = ".students-copy"


def clear(folder: Path, stamp: str) -> None:
    """Remove a folder that an earlier run wrote, which the file `stamp` in it shows. Raises
    ValueError for one that holds something else."""
    if folder.exists() and not (folder / stamp).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else: name a new folder")
    shutil.rmtree(folder, ignore_errors=True)


def without_answers(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """In place: what exercises and checks printed is gone; all else, the kernel too, stays."""
    for cell in notebooks.code_cells(nb):
        if {"exercise", "check"} & set(notebooks.tags(cell)):
            cell.outputs, cell.execution_count = [], None
    return nb


def release(folder: Path) -> Path:
    """Write the copy and its ZIP file, and return the path of that. Raises ValueError for a folder
    that holds something else."""
    clear(folder, STAMP)
    (folder / "notebooks").mkdir(parents=True)
    (folder / STAMP).touch()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LITTER)
        else:
            shutil.copy(source, folder / name)
    for file in STUDENT.iterdir():
        shutil.copy(file, folder / file.name)
    for path in notebooks.lessons():
        nbformat.write(without_answers(notebooks.read(path)), folder / "notebooks" / path.name)
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "peft-lessons")
    given = parser.parse_args(argv)
    try:
        archive = release(given.folder.resolve())
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.folder}\n{archive}, {archive.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
