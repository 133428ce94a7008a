"""Pytest's part in running the lessons: offline, one kernel a notebook, and a summary of times."""

import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest

from tools import warm_kernel
from tools.environment import NEVER, OFFLINE, ROOT, offline_environment

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    # Set before torch is imported and before xdist's workers and any kernel inherit it.
    SCRATCH = Path(tempfile.mkdtemp(prefix="peft-lessons-"))
    NETWORK_LOG = SCRATCH / "network.log"
    os.environ.update(offline_environment(log=NETWORK_LOG), IPYTHONDIR=str(SCRATCH / "ipython"))
    for _name in (*NEVER, warm_kernel.KERNEL):
        os.environ.pop(_name, None)
sys.path.append(str(OFFLINE))
import network_guard  # noqa: E402, F401  # cuts this process off too, once

DURATIONS = "peft-lessons/durations"
SOLVED = "test_solved["
# Their tests look at one thing that takes long to make: a marked class, a copy, a site.
TOGETHER = {f"test_{name}.py" for name in ("grade", "release", "site")}
_TIMES: dict[tuple[str, str], float] = defaultdict(float)


def _lesson(nodeid: str) -> tuple[str, str] | None:
    """Return ('02_lora', 'as shipped' or 'solved') if a test runs a lesson, else None."""
    file, _, test = nodeid.partition("::")
    if file.endswith(".ipynb"):
        return Path(file).stem, "as shipped"
    if test.startswith(SOLVED):
        return test.removeprefix(SOLVED).split("]")[0], "solved"
    return None


_kernels = ExitStack()


def pytest_configure(config):
    """Where lessons run, have a process ready that has imported the course for their kernels."""
    lessons = config.getoption("nbval_lax", False) or config.getoption("nbval", False)
    if lessons and not IS_WORKER and not config.option.nbval_kernel_name:
        _kernels.enter_context(warm_kernel.started(SCRATCH / "jupyter", dict(os.environ)))
    if lessons and warm_kernel.KERNEL in os.environ:
        # In each worker too, which reads the options of pyproject.toml again.
        config.option.nbval_current_env = False
        config.option.nbval_kernel_name = warm_kernel.name()


@pytest.hookimpl(optionalhook=True)  # pytest -p no:xdist knows no such hook
def pytest_xdist_make_scheduler(config, log):
    """Send all cells of a notebook to the same worker, and each other test wherever there's room.

    This replaces --dist loadgroup, whose marks have no effect under pytest 9.2 and xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneKernelPerNotebook(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).name in TOGETHER else " ".join(_lesson(nodeid) or (nodeid,))

    scheduler = OneKernelPerNotebook(config, log)
    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return scheduler


def _skip_without_assistant(items):
    """Skip what is marked `assistant`, and the lessons that load it, where it was not fetched."""
    if (ROOT / "data" / "models" / "smollm2").is_dir():
        return
    skip = pytest.mark.skip(reason="the assistant is missing: python course.py assistant")
    quoted = r"\"smollm2\""  # as a notebook's JSON has it
    lessons = (ROOT / "notebooks").glob("[0-9]*.ipynb")
    load = {path.stem for path in lessons if quoted in path.read_text(encoding="utf-8")}
    for item in items:
        lesson, _ = _lesson(item.nodeid) or (None, None)
        if item.get_closest_marker("assistant") or lesson in load:
            item.add_marker(skip)


def _cache(config):
    """Return pytest's cache, None under -p no:cacheprovider."""
    return getattr(config, "cache", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Begin with the notebooks, and among them with those that took longest last time."""
    _skip_without_assistant(items)
    cache = _cache(config)
    durations = cache.get(DURATIONS, {}) if cache else {}

    def order(item):
        lesson = _lesson(item.nodeid)
        if lesson is None:
            # What takes as long as a lesson comes first; the rest fills the gaps at the end.
            return 0 if item.get_closest_marker("browser") or item.path.name in TOGETHER else 1
        return -durations.get(" ".join(lesson), 1e6)

    items.sort(key=order)


def pytest_runtest_logreport(report):
    lesson = _lesson(report.nodeid)
    if lesson and not IS_WORKER:
        _TIMES[lesson] += report.duration


def _network_attempts() -> list[str]:
    return NETWORK_LOG.read_text(encoding="utf-8").splitlines() if NETWORK_LOG.exists() else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if IS_WORKER:
        return
    if _network_attempts() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if cache := _cache(session.config):
        durations = {" ".join(k): round(v, 1) for k, v in _TIMES.items()}
        cache.set(DURATIONS, cache.get(DURATIONS, {}) | durations)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    attempts = _network_attempts()
    if attempts:
        terminalreporter.section("connections refused: the lessons must run offline", red=True)
        for line, times in Counter(attempts).items():
            terminalreporter.write_line(f"{times}x {line}")
    terminalreporter.section("lessons")
    if _TIMES:
        terminalreporter.write_line(f"{'seconds':24s} {'as shipped':>10s} {'solved':>10s}")
    for stem in sorted({stem for stem, _ in _TIMES}):
        cells = [_TIMES.get((stem, kind)) for kind in ("as shipped", "solved")]
        shown = ["-" if seconds is None else f"{seconds:.1f}" for seconds in cells]
        terminalreporter.write_line(f"{stem:24s} {shown[0]:>10s} {shown[1]:>10s}")
    kinds = ("passed", "failed", "error", "skipped")
    count = {kind: len(terminalreporter.stats.get(kind, [])) for kind in kinds}
    lessons = len({stem for stem, _ in _TIMES})
    terminalreporter.write_line(
        f"{sum(count.values()) - count['skipped']} tests ran: {count['passed']} passed, "
        f"{count['failed']} failed, {count['error']} errors; "
        f"{count['skipped']} skipped; {lessons} lessons."
    )


def pytest_unconfigure(config):
    _kernels.close()
    if not IS_WORKER:
        shutil.rmtree(SCRATCH, ignore_errors=True)
