"""Execute and solve lessons: python -m tools.notebooks {outputs,solved} [02 ...]"""

import argparse
import ast
import copy
import logging
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools import warm_kernel
from tools.environment import ROOT, offline_environment

NOTEBOOKS = ROOT / "notebooks"
CELL_SECONDS = 300

# The name of a lesson's module in checks/ and solutions/.
MODULES = {
    "00_start_here": "start",
    "01_why_peft": "why",
    "02_lora": "lora",
    "03_qlora": "qlora",
    "04_dora": "dora",
    "05_adalora": "adalora",
    "06_adapters": "adapters",
    "07_ia3": "ia3",
    "08_prompt_tuning": "prompt",
    "09_prefix_tuning": "prefix",
    "10_selective": "selective",
    "11_unified_view": "unified",
    "12_hf_peft": "hf_peft",
    "13_choosing": "choosing",
    "14_beyond_lora": "beyond",
    "15_assistant": "assistant",
    "16_rewards": "rewards",
    "17_your_own": "deploy",
}

# {a form of an output that is not stored: the form that is stored in its place}. Pages without a
# kernel show no sliders, whose id is drawn again each time. The HTML of a figure holds the picture;
# the image/png is for the PDF of a lesson that was run.
NOT_STORED = {"application/vnd.jupyter.widget-view+json": "text/plain", "image/png": "text/html"}

# A block of code in markdown, to its end or to that of the cell, and a heading outside of blocks.
FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,})[^`\n]*\n.*?(?:^[ \t]*\1|\Z)", re.S | re.M)
HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(\S.*?)\s*$", re.M)

# The tags of the cells that a solved run needs, beside those that import.
SOLVED = {"exercise", "check", "exercise-setup"}

CLEAN_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def lessons(selection: list[str] | None = None) -> list[Path]:
    """Return all lessons in order, or those whose names start with one of `selection`."""
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not selection:
        return paths
    for prefix in selection:
        if not any(path.name.startswith(prefix) for path in paths):
            raise SystemExit(
                f"no lesson starts with {prefix!r}; there are "
                + ", ".join(path.stem for path in paths)
            )
    return [path for path in paths if path.name.startswith(tuple(selection))]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def tags(cell: NotebookNode) -> list[str]:
    return [tag for tag in cell.metadata.get("tags") or [] if isinstance(tag, str)]


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def definitions(source: str) -> dict[str, ast.stmt]:
    """Return the functions and classes at the top level of some source, by name."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name: node for node in ast.parse(source).body if isinstance(node, kinds)}


def exercise_name(cell: NotebookNode) -> str:
    """Return the name of the one function or class that an exercise cell defines."""
    (name,) = definitions(cell.source)
    return name


def exercise_cells(nb: NotebookNode) -> list[NotebookNode]:
    """Return the cells of a notebook in which its exercises stand."""
    return [cell for cell in code_cells(nb) if "exercise" in tags(cell)]


def exercise_names(nb: NotebookNode) -> list[str]:
    """Return the names of a notebook's exercises, in the order of its cells."""
    return [exercise_name(cell) for cell in exercise_cells(nb)]


def exercises(lesson: str) -> list[str]:
    """Return the names of a lesson's exercises, as the course has them."""
    return exercise_names(read(NOTEBOOKS / f"{lesson}.ipynb"))


def read_solutions(path: Path) -> dict[str, str]:
    """Return the source of every solution to a lesson by name, {} where the lesson has none."""
    file = path.parent / "solutions" / f"{MODULES[path.stem]}.py"
    source = file.read_text(encoding="utf-8") if file.exists() else ""
    lines, sources = source.splitlines(), {}
    for name, node in definitions(source).items():
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        sources[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return sources


def is_check_of(cell: NotebookNode, module: str, name: str) -> bool:
    """Return whether a cell calls check.<module>.<name>(<name>)."""
    if cell.cell_type != "code" or "check" not in tags(cell):
        return False
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    return f"check.{module}.{name}({name})" in map(ast.unparse, calls)


def python(cell: NotebookNode) -> str:
    """Return a code cell's source, magics and shell escapes as calls of get_ipython()."""
    return TransformerManager().transform_cell(cell.source)


def imported(cell: NotebookNode) -> set[str]:
    """Return the top-level packages that a code cell imports."""
    packages = set()
    for node in ast.walk(ast.parse(python(cell))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").split(".")[0])
    return packages


def solved(nb: NotebookNode, solutions: dict[str, str]) -> NotebookNode:
    """Return a copy with the solutions in place of the stubs, and of its cells those that import,
    the exercises, the checks, and those tagged as what these need."""
    nb = copy.deepcopy(nb)
    nb.cells = [cell for cell in code_cells(nb) if SOLVED & {*tags(cell)} or imported(cell)]
    for cell in nb.cells:
        if "exercise" in tags(cell):
            cell.source = solutions[exercise_name(cell)]
    return nb


def execute(
    nb: NotebookNode, cwd: Path, env: dict[str, str], kernel: str = "python3"
) -> NotebookNode:
    """Run a copy from a fresh kernel; the first cell that fails raises CellExecutionError, one that
    takes longer than CELL_SECONDS raises CellTimeoutError, and Ctrl+C KeyboardInterrupt."""
    nb = copy.deepcopy(nb)
    client = NotebookClient(
        nb,
        kernel_name=kernel,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(cwd)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of TCP on the loopback
    )
    with tempfile.TemporaryDirectory() as ipython:
        # A profile of the user's own could change what the cells print and draw.
        try:
            client.execute(env=env | {"IPYTHONDIR": ipython})
        except BaseException:
            # nbclient answers SIGINT and SIGTERM by ending the kernel, of which it then misses
            # something, and keeps this attribute. asyncio would report what is left at the end.
            if hasattr(client, "_async_cleanup_kernel_future"):
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)
                raise KeyboardInterrupt from None
            raise
    return nb


def headings(cell: NotebookNode) -> list[tuple[int, str]]:
    """Return (level, title) of each heading in a markdown cell."""
    return [(len(marks), title) for marks, title in HEADING.findall(FENCED.sub("", cell.source))]


def deeper(cell: NotebookNode) -> bool:
    """Return whether a cell begins a section that goes beyond the core of its lesson."""
    return cell.cell_type == "markdown" and cell.source.startswith("## Deeper · ")


def names_itself(cell: NotebookNode) -> str:
    """Return what a folded cell says it is, the comment in its first line, or ""."""
    first = cell.source.partition("\n")[0]
    return first[2:].strip() if first.startswith("# ") else ""


def cell_metadata(nb: NotebookNode) -> list[dict]:
    """Return the metadata of each cell: its tags, and what JupyterLab folds. That is the section
    below a heading "## Deeper · …", the source of a cell tagged plumbing, and the first output
    after "Predict before you run"."""
    every, predict = [], False
    for cell in nb.cells:
        metadata = {"tags": tags(cell)} if tags(cell) else {}
        if deeper(cell):
            metadata["jp-MarkdownHeadingCollapsed"] = True
        hidden = {"source_hidden": True} if "plumbing" in tags(cell) else {}
        if cell.cell_type == "markdown":
            predict = predict or "**Predict before you run" in cell.source
        elif predict and cell.outputs:
            hidden["outputs_hidden"], predict = True, False
        every.append(metadata | ({"jupyter": hidden} if hidden else {}))
    return every


def clean(nb: NotebookNode, stem: str) -> NotebookNode:
    """Clean a notebook: no metadata of the machine, no sliders, each picture once, and an id for
    every cell."""
    nb = copy.deepcopy(nb)
    nb.metadata = nbformat.from_dict(CLEAN_METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    for number, (cell, metadata) in enumerate(zip(nb.cells, cell_metadata(nb), strict=True)):
        cell.setdefault("id", f"{stem}-{number:03d}".replace("_", "-"))
        cell.metadata = nbformat.from_dict(metadata)
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            for form, instead in NOT_STORED.items():
                if instead in output.get("data", ()):
                    output.data.pop(form, None)
                    output.metadata.pop(form, None)
    return nb


def store_outputs(path: Path) -> None:
    """Execute a lesson in place: its stored outputs are then those of a fresh kernel."""
    from peft_lessons.engine import write_atomically  # takes seconds, which other commands need not

    done = execute(read(path), path.parent, offline_environment())
    text = nbformat.writes(clean(done, path.stem)).rstrip() + "\n"
    write_atomically({path: text.encode()})


def run_solved(path: Path, cwd: Path, log: Path | None = None) -> int:
    """Run a lesson with its solutions and strict checks, in a folder that isn't the lesson's, and
    return how many checks said that the answer is right: as many as the lesson has exercises.

    Raises as `execute`, and ValueError for a lesson without exercises, for an exercise without a
    solution or the reverse, and where a check is missing or is not the last line of its cell."""
    solutions, lesson = read_solutions(path), read(path)
    names = exercise_names(lesson)
    if not names or {*names} != {*solutions}:
        raise ValueError(f"exercises {names} and solutions {[*solutions]} do not fit together")
    env = offline_environment(log=log, strict=True)
    done = execute(solved(lesson, solutions), cwd, env, warm_kernel.name())
    results = [
        output.data.get("text/plain", "")
        for cell in done.cells
        for output in cell.outputs
        if "check" in tags(cell) and "data" in output
    ]
    missing = [n for n in names if not any(text.startswith(f"✓ {n}: ") for text in results)]
    if missing:
        right = len(names) - len(missing)
        raise ValueError(
            f"{right} of {len(names)} checks said right; not those of {', '.join(missing)}"
        )
    return len(names)


def run(command: str, chosen: list[Path]) -> int:
    """Run a command on lessons, and print a line for each; return the exit status."""
    failed = []
    for path in chosen:
        start, result = time.perf_counter(), ""
        try:
            if command == "outputs":
                store_outputs(path)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    result = f"{run_solved(path, Path(folder))} checks right"
        except (CellExecutionError, RuntimeError, TimeoutError, ValueError) as error:
            failed.append(path.stem)
            print(f"{path.stem}: {error}", file=sys.stderr)
        else:
            seconds = time.perf_counter() - start
            print(f"{path.stem:24s} {command} {seconds:6.1f} s  {result}".rstrip(), flush=True)
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("command", choices=["outputs", "solved"])
    parser.add_argument("lesson", nargs="*", help="the first characters of lessons, such as 02")
    args = parser.parse_args(argv)
    chosen = lessons(args.lesson)
    try:
        if args.command != "solved":
            return run(args.command, chosen)
        with (
            tempfile.TemporaryDirectory() as folder,
            warm_kernel.started(Path(folder), offline_environment()),
        ):
            return run(args.command, chosen)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
