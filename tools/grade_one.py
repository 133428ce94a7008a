"""Run one student's notebook and judge its answers: the process that tools.grade starts.

    python -m tools.grade_one NOTEBOOK LESSON SECONDS MEMORY VARIANT

Writes lines of JSON to standard output: the limits that this system could set, the texts of the
student's own, and the outcome of each exercise. They carry the word that stands on standard input,
so that nothing printed by accident is taken for one.

The notebook sees nothing of the checks, so that it can neither ask nor change them.
"""

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

try:
    import resource
except ImportError:  # on Windows
    resource = None

from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode
from traitlets.config import Config

from tools import notebooks
from tools.environment import ROOT

LARGEST_FILE = 2**28
MOST_TEXT = 2000  # characters of a text, or of what is said of an answer
CHECKS = "peft_lessons.checks"
PACKAGE = ROOT / "peft_lessons"
DEVICES = ("null", "zero", "random", "urandom")


class TimedOut(BaseException):
    """Not an Exception, so that `except Exception` in an answer does not catch it."""


def _alarm(signum, frame):
    raise TimedOut


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the block after some seconds: by the system's alarm, and on Windows, which
    has none, by a thread, between two steps of Python."""
    if not hasattr(signal, "setitimer"):
        here, late = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TimedOut)
        stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
        timer = threading.Timer(seconds, stop, (here, late))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def confine(folder: Path, memory: float) -> list[str]:
    """From here on this process and its children write to `folder` alone, read the course (not its
    solutions and checks), Python and the system's files, and hold at most `memory` GiB. Return
    which of "memory", "file size" and "files" this system could limit.

    Raises RuntimeError if there is another thread, which would stay free."""
    kernel_holds = has_landlock()
    if kernel_holds and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("confine: there is more than one thread, and only this one is held")
    limits = {"DATA": int(memory * 2**30), "FSIZE": LARGEST_FILE, "CORE": 0} if resource else {}
    held = []
    for name, most in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # macOS refuses that of memory
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            held += {"DATA": ["memory"], "FSIZE": ["file size"]}.get(name, [])
    if not kernel_holds:
        return held
    from landlock import FSAccess, Ruleset

    file = FSAccess.EXECUTE | FSAccess.READ_FILE
    parts = [path for path in PACKAGE.iterdir() if path.name != "checks"]
    course = [ROOT / "data", ROOT / "tools", *(path for path in parts if path.is_dir())]
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/opt"]
    places = [*course, *system, sys.prefix, sys.base_prefix]
    rules = Ruleset()
    rules.allow(*(p for p in map(Path, places) if p.exists()), rules=file | FSAccess.READ_DIR)
    rules.allow(*(path for path in parts if path.is_file()), rules=file)
    rules.allow(PACKAGE, rules=FSAccess.READ_DIR)  # without it nothing in it can be imported
    files = FSAccess.READ_FILE | FSAccess.WRITE_FILE
    rules.allow(*(Path("/dev") / name for name in DEVICES), rules=files)
    rules.allow(folder)
    rules.apply()
    return [*held, "files"]


def has_landlock() -> bool:
    if sys.platform != "linux":
        return False
    from landlock import landlock_abi_version

    with suppress(OSError):
        return landlock_abi_version() > 0
    return False


def hidden(module: str, variant: int = 0) -> ModuleType:
    """Return a lesson's module of checks, which draw the inputs of a variant. By its name, and by
    those of all checks, a notebook finds only what does nothing."""
    package = import_module("peft_lessons")
    import_module("peft_lessons.checks.kit").draw_variant(variant)
    course = getattr(package.check, module)
    nothing = MagicMock()
    sys.modules.update({name: nothing for name in sys.modules if name.startswith(CHECKS)})
    package.check = package.checks = nothing
    return course


def new_shell() -> InteractiveShell:
    config = Config()
    config.HistoryManager.enabled = False
    return InteractiveShell.instance(config=config)


def run(nb, shell: InteractiveShell, seconds: float) -> dict[str, str]:
    """Run a student's cells; {function: what went wrong in the cell that is to define it}."""
    failed: dict[str, str] = {}
    for cell in notebooks.code_cells(nb):
        if {"long", "check"} & set(notebooks.tags(cell)) or not cell.source.strip():
            continue
        with at_most(seconds):
            result = shell.run_cell(cell.source, store_history=False)
        names = re.findall(r"(?m)^(?:def|class)\s+(\w+)", cell.source)
        for name in names:
            failed.pop(name, None)
        if error := result.error_before_exec or result.error_in_exec:
            failed |= dict.fromkeys(names, told_of(error, seconds))
    return failed


def told_of(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimedOut):
        return f"longer than {seconds:g} s"
    told = type(error).__name__
    with suppress(Exception):  # the message is the notebook's code, too
        told += f": {error}"
    return told[:500]


def judged(
    one: Callable, function: object, seconds: float, why: str | None = None
) -> tuple[str, str]:
    """Return (outcome, what is said of it) of an answer, by the course's own check; `why` is what
    went wrong in its cell."""
    try:
        # An import of the course's own is no answer: the exercise's cell is gone.
        if function is None or str(getattr(function, "__module__", "")).startswith("peft_lessons"):
            return missing(why)
        with at_most(seconds):
            verdict = one(function)
    except AssertionError as wrong:  # a check's WrongAnswer is one
        return "wrong", str(wrong).removeprefix("✗ ")
    except TimedOut as error:
        return "timed out", told_of(error, seconds)
    except BaseException as error:  # the other exercises keep their marks
        return "crashed", told_of(error, seconds)
    return verdict.status, verdict.headline


def missing(why: str | None) -> tuple[str, str]:
    """Return (outcome, what is said of it) where there is no answer."""
    if why is None:
        return "not attempted", "the notebook does not define it"
    return "timed out" if why.startswith("longer than") else "crashed", f"its cell fails: {why}"


def own_texts(nb: NotebookNode, ours: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (the heading above, the text) of each markdown cell of a student's: predictions and
    answers to questions. `ours` is {id: source} of the lesson's cells: of one that the student has
    changed, the text is the lines that the lesson does not have."""
    found, above, sources = [], "", {*ours.values()}
    for cell in nb.cells:
        if cell.cell_type != "markdown":
            continue
        changed = ours.get(cell.get("id"))
        title = next((title for _, title in reversed(notebooks.headings(cell))), above)
        known = set() if changed is None else set(changed.splitlines())
        text = "\n".join(line for line in cell.source.splitlines() if line not in known).strip()
        if text and cell.source not in sources:
            found.append((above if changed is None else title, text[:MOST_TEXT]))
        above = title
    return found


def main(argv: list[str]) -> None:
    notebook, lesson, seconds, memory, variant = argv
    path, seconds = Path(notebook), float(seconds)
    word, out = sys.stdin.readline().strip(), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the notebook prints goes nowhere

    def say(**told: object) -> None:
        print(json.dumps({"word": word} | told), file=out, flush=True)

    def mark(exercise: str, outcome: str, told: str, started: float) -> None:
        took = time.monotonic() - started
        say(exercise=exercise, outcome=outcome, told=told[:MOST_TEXT], seconds=took)

    # All that is out of reach later: the lesson and the checks.
    names, shell = notebooks.exercises(lesson), new_shell()
    course = hidden(notebooks.MODULES[lesson], int(variant))
    cells = notebooks.read(notebooks.NOTEBOOKS / f"{lesson}.ipynb").cells
    ours = {cell.id: cell.source for cell in cells}
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _alarm)
    say(held=confine(path.parent, float(memory)))
    try:
        nb = notebooks.read(path)
        say(texts=own_texts(nb, ours))
    except Exception as error:
        for name in names:
            told = "the file is damaged: hand in a notebook that JupyterLab opens"
            told += f" ({type(error).__name__})"
            mark(name, "crashed", told, time.monotonic())
        os._exit(0)
    failed = run(nb, shell, seconds)
    for name in names:
        started, function = time.monotonic(), shell.user_ns.get(name)
        mark(name, *judged(getattr(course, name), function, seconds, failed.get(name)), started)
    out.close()
    os._exit(0)  # no thread or exit handler of the notebook's holds the process up


if __name__ == "__main__":
    main(sys.argv[1:])
