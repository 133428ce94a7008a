"""Run one student's notebook and judge its answers: the process that tools.grade starts.

    python -m tools.grade_one NOTEBOOK LESSON SECONDS MEMORY CHANNEL

Writes a line of JSON for each exercise of the lesson to the file descriptor CHANNEL. The lines
carry the word that stands on standard input, so that nothing printed by accident is taken for one.
"""

import functools
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import peft_lessons
from peft_lessons import check
from peft_lessons.checks.kit import Check, WrongAnswer
from tools import notebooks
from tools.environment import ROOT

LARGEST_FILE = 2**28
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
    solutions), Python and the system's files, and hold at most `memory` GiB. Where the kernel has
    no Landlock only the memory is held: tools.grade says so.

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

    read = FSAccess.EXECUTE | FSAccess.READ_FILE | FSAccess.READ_DIR
    course = [ROOT / name for name in ("peft_lessons", "data", "tools")]
    system = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/opt"]
    places = [*course, *system, sys.prefix, sys.base_prefix]
    rules = Ruleset()
    rules.allow(*(p for p in map(Path, places) if p.exists()), rules=read)
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


def hide_checks() -> None:
    """From here on whoever imports the checks gets `Nothing`. What a notebook does to it, or asks
    it, has no part in the checks that are held here and judge."""
    nothing = Nothing("checks")
    peft_lessons.check = peft_lessons.checks = nothing
    for name in [n for n in sys.modules if n.startswith("peft_lessons.checks")]:
        sys.modules[name] = nothing


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


def judged(one: Check, function: object, seconds: float) -> tuple[str, str]:
    """(outcome, what is said of it) of an answer, by the course's own check."""
    try:
        with at_most(seconds):
            verdict = one(function)
            if verdict.status == "right" and passes_a_wrong_answer(one):
                return "crashed", "the notebook changes how answers are judged"
    except WrongAnswer as wrong:
        return "wrong", str(wrong).removeprefix("✗ ")
    except TimedOut as error:
        return "timed out", told_of(error, seconds)
    except BaseException as error:
        return "crashed", told_of(error, seconds)
    return verdict.status, verdict.headline


def passes_a_wrong_answer(one: Check) -> bool:
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

    course = getattr(check, notebooks.MODULES[lesson])
    checks = {name: getattr(course, name) for name in notebooks.exercises(lesson)}
    nb = notebooks.read(path)
    signal.signal(signal.SIGALRM, _alarm)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    hide_checks()
    confine(path.parent, float(memory))
    failed = run(nb, shell, seconds)
    for name, one in checks.items():
        started, function = time.monotonic(), shell.user_ns.get(name)
        if str(getattr(function, "__module__", "")).startswith("peft_lessons"):
            function = None  # imported: the exercise's own cell is gone
        if function is not None:
            outcome, told = judged(one, function, seconds)
        elif name in failed:
            outcome = "timed out" if failed[name].startswith("longer than") else "crashed"
            told = f"its cell fails: {failed[name]}"
        else:
            outcome, told = "not attempted", "the notebook does not define it"
        say(name, outcome, told, started)
    out.close()
    os._exit(0)  # no thread or exit handler of the notebook's holds the process up


if __name__ == "__main__":
    main(sys.argv[1:])
