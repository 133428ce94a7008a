"""Run one student's notebook and judge its answers: the process that tools.grade starts.

    python -m tools.grade_one NOTEBOOK LESSON SECONDS MEMORY CHANNEL

Writes a line of JSON for each exercise of the lesson to the file descriptor CHANNEL. The lines
carry the word that stands on standard input, so that nothing printed by accident is taken for one.

The checks are made when the notebook has run, so that it can neither ask nor change them.
"""

import functools
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
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
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


class Nothing(ModuleType):
    """Any attribute of it, and any call, is nothing."""

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Checks(InspectLoader, MetaPathFinder):
    """The modules of checks, from sources that are read before the notebook has its turn. Until
    they are made, and by their names afterwards too, there is `Nothing`."""

    def __init__(self) -> None:
        files = sorted((PACKAGE / "checks").glob("*.py"))
        self.sources = {f"{CHECKS}.{file.stem}": file.read_text("utf-8") for file in files}
        self.sources[CHECKS] = ""  # it would import those of all other lessons
        self.hide()

    def hide(self) -> None:
        sys.modules.update(dict.fromkeys(self.sources, Nothing(CHECKS)))

    def made(self, module: str) -> ModuleType:
        for name in self.sources:
            sys.modules.pop(name, None)
        sys.meta_path.insert(0, self)
        try:
            return import_module(f"{CHECKS}.{module}")
        finally:
            sys.meta_path.remove(self)
            self.hide()
            sys.modules["peft_lessons"].checks = Nothing(CHECKS)

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name in self.sources else None

    def get_source(self, name: str) -> str:
        return self.sources[name]

    def is_package(self, name: str) -> bool:
        return name == CHECKS


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


def judged(one: Callable, function: object, seconds: float) -> tuple[str, str]:
    """(outcome, what is said of it) of an answer, by the course's own check."""
    try:
        with at_most(seconds):
            verdict = one(function)
            if verdict.status == "right" and passes_a_wrong_answer(one):
                return "crashed", "the notebook changes how answers are judged"
    except AssertionError as wrong:  # a check's WrongAnswer is one
        return "wrong", str(wrong).removeprefix("✗ ")
    except TimedOut as error:
        return "timed out", told_of(error, seconds)
    except BaseException as error:
        return "crashed", told_of(error, seconds)
    return verdict.status, verdict.headline


def missing(why: str | None) -> tuple[str, str]:
    """(outcome, what is said of it) where there is no answer, and perhaps an error in its cell."""
    if why is None:
        return "not attempted", "the notebook does not define it"
    return "timed out" if why.startswith("longer than") else "crashed", f"its cell fails: {why}"


def passes_a_wrong_answer(one: Callable) -> bool:
    """Whether the check, after the notebook has run, lets a wrong answer pass: one that it knows,
    and one that is always a little off."""

    @functools.wraps(one.reference)
    def off(*args: Any, **kwargs: Any) -> Any:
        return spoilt(one.reference(*args, **kwargs))

    for wrong in (*list(one.causes.values())[:1], off):
        with suppress(Exception):
            if one(wrong).status == "right":
                return True
    return False


def spoilt(value: Any) -> Any:
    """A result of the same kind with other values."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | torch.Tensor):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, list | tuple):
        return type(value)(map(spoilt, value))
    if isinstance(value, dict):
        return {key: spoilt(part) for key, part in value.items()}
    return object()


def main(argv: list[str]) -> None:
    notebook, lesson, seconds, memory, channel = argv
    path, seconds = Path(notebook), float(seconds)
    word, out = sys.stdin.readline().strip(), os.fdopen(int(channel), "w")

    def say(exercise: str, outcome: str, told: str, started: float) -> None:
        line = {"word": word, "exercise": exercise, "outcome": outcome, "told": told[:2000]}
        print(json.dumps(line | {"seconds": time.monotonic() - started}), file=out, flush=True)

    checks, names, nb = Checks(), notebooks.exercises(lesson), notebooks.read(path)
    import_module("peft_lessons")  # here, since it takes longer than the first cell may
    signal.signal(signal.SIGALRM, _alarm)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    confine(path.parent, float(memory))
    failed = run(nb, shell, seconds)
    course = checks.made(notebooks.MODULES[lesson])
    for name in names:
        started, function = time.monotonic(), shell.user_ns.get(name)
        try:
            # An import of the course's own is no answer: the exercise's cell is gone.
            if str(getattr(function, "__module__", "")).startswith("peft_lessons"):
                function = None
            if function is None:
                outcome, told = missing(failed.get(name))
            else:
                outcome, told = judged(getattr(course, name), function, seconds)
        except BaseException as error:  # the other exercises keep their marks
            outcome, told = "crashed", told_of(error, seconds)
        say(name, outcome, told, started)
    out.close()
    os._exit(0)  # no thread or exit handler of the notebook's holds the process up


if __name__ == "__main__":
    main(sys.argv[1:])
