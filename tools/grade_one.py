"""Run one student's notebook and judge its answers: the process that tools.grade starts.

    python -m tools.grade_one NOTEBOOK LESSON SECONDS MEMORY CHANNEL

Writes a line of JSON for each exercise of the lesson to the file descriptor CHANNEL. The lines
carry the word that stands on standard input, so that nothing printed by accident is taken for one.

The notebook sees nothing of the checks, so that it can neither ask nor change them.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from tools import notebooks
from tools.environment import ROOT

LARGEST_FILE = 2**28
CHECKS = "peft_lessons.checks"
PACKAGE = ROOT / "peft_lessons"
DEVICES = ("null", "zero", "random", "urandom")


class TimedOut(BaseException):
    """Not an Exception, so that `except Exception` in an answer does not catch it."""


def _alarm(signum, frame):
    raise TimedOut


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def confine(folder: Path, memory: float) -> None:
    """From here on this process and its children write to `folder` alone, read the course (not its
    solutions and checks), Python and the system's files, and hold at most `memory` GiB. Where the
    kernel has no Landlock only the memory is held: tools.grade says so.

    Raises RuntimeError if there is another thread, which would stay free."""
    kernel_holds = has_landlock()
    if kernel_holds and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("confine: there is more than one thread, and only this one is held")
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not kernel_holds:
        return
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


def has_landlock() -> bool:
    if sys.platform != "linux":
        return False
    from landlock import landlock_abi_version

    with suppress(OSError):
        return landlock_abi_version() > 0
    return False


def hidden(module: str) -> ModuleType:
    """Return a lesson's module of checks. By its name, and by those of all checks, a notebook finds
    only what does nothing."""
    package = import_module("peft_lessons")
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


def main(argv: list[str]) -> None:
    notebook, lesson, seconds, memory, channel = argv
    path, seconds = Path(notebook), float(seconds)
    word, out = sys.stdin.readline().strip(), os.fdopen(int(channel), "w")

    def say(exercise: str, outcome: str, told: str, started: float) -> None:
        line = {"word": word, "exercise": exercise, "outcome": outcome, "told": told[:2000]}
        print(json.dumps(line | {"seconds": time.monotonic() - started}), file=out, flush=True)

    names, nb = notebooks.exercises(lesson), notebooks.read(path)
    course, shell = hidden(notebooks.MODULES[lesson]), new_shell()
    signal.signal(signal.SIGALRM, _alarm)
    confine(path.parent, float(memory))
    failed = run(nb, shell, seconds)
    for name in names:
        started, function = time.monotonic(), shell.user_ns.get(name)
        say(name, *judged(getattr(course, name), function, seconds, failed.get(name)), started)
    out.close()
    os._exit(0)  # no thread or exit handler of the notebook's holds the process up


if __name__ == "__main__":
    main(sys.argv[1:])
