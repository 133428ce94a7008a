"""Say what this machine allows, and check whether it is ready for the course.

A container or a hub allows a process less memory and fewer processor cores than its host has. The
limits are in control groups, of version 1 or 2 (Linux kernel documentation, "Control Group v2" and
"CFS Bandwidth Control"), and in the process's CPU affinity. Run as a script, this file prints the
number of cores. It imports all but the standard library late, so that it can be asked before
PyTorch is loaded.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SYSTEM = Path("/")

_MARKS = {True: "✓", False: "✗", None: "·"}
# A machine sold with 4 GB. The largest kernel of a lesson took 3.5 GiB, JupyterLab takes 0.2.
_NEEDED_GIB = 3.7


def _settings(system: Path, controller: str, file: str) -> Iterator[str]:
    """Yield what `file` holds in the process's control group and in each group above it.

    `controller` is empty for version 2. In a container the path of the group is often the host's
    path, which is not mounted. Then only the settings of the top group can be read."""
    try:
        groups = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controller not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / controller
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(top):
                break
            with suppress(OSError):
                yield (folder / file).read_text(encoding="utf-8").strip()


def memory(system: Path = SYSTEM) -> int | None:
    """Return the bytes of memory that the process may use; None where the system does not say.

    `system` is the root of the file system."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    settings = [
        *_settings(system, "", "memory.max"),
        *_settings(system, "memory", "memory.limit_in_bytes"),
    ]
    limits += [int(limit) for limit in settings if limit.isdecimal()]  # no limit is "max"
    return min(limits, default=None)


def cores(system: Path = SYSTEM) -> int:
    """Return how many processor cores the process may keep busy, at least 1.

    `system` is the root of the file system."""
    counts = [float(os.cpu_count() or 1)]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    pairs = [limit.split() for limit in _settings(system, "", "cpu.max")]
    quotas = _settings(system, "cpu", "cpu.cfs_quota_us")
    periods = _settings(system, "cpu", "cpu.cfs_period_us")
    pairs += zip(quotas, periods, strict=False)
    # No quota is "max" in version 2 and -1 in version 1.
    counts += [int(quota) / int(period) for quota, period in pairs if quota.isdecimal()]
    return max(1, int(min(counts)))


# ------------------------------------------------------------------ is it ready?


@dataclass(frozen=True)
class Row:
    """Record one finding; `ok` is None if the course needs nothing of it."""

    what: str
    value: str
    ok: bool | None


class Readiness:
    """Show one line if nothing is wrong, else all findings; `print` shows these in any case.

    `.ready` is False if anything is wrong."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.ready = all(row.ok is not False for row in rows)
        self.verdict = (
            "This machine is ready."
            if self.ready
            else "Not ready: fix what is marked ✗ first. `python course.py lab` opens the course "
            "with the right package versions and no more threads than cores."
        )

    def __repr__(self) -> str:
        return self.verdict if self.ready else str(self)

    def __str__(self) -> str:
        width = max(len(row.what) for row in self.rows)
        lines = [f"{_MARKS[r.ok]} {r.what:<{width}}  {r.value}" for r in self.rows]
        return "\n".join((*lines, self.verdict))


def _needs(value: str, fits: bool, what: str) -> str:
    """Return what the machine has and, if it does not fit, what is needed."""
    return value if fits else f"{value}, needs {what}"


def _packages() -> list[Row]:
    """Compare the installed version of each required package with the range the course needs."""
    from packaging.requirements import Requirement

    rows = []
    for line in metadata.requires("peft-lessons") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
            fits = needed.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, fits = "missing", False
        rows.append(Row(needed.name, _needs(version, fits, str(needed.specifier)), fits))
    return rows


def _files() -> Row:
    """Report the number, the size and the checksums of the bundled models and tasks."""
    from .data.bundled import bundled_files

    files = bundled_files()
    broken = [f.path for f in files if not f.intact]
    size = sum(f.size for f in files) / 2**20
    value = f"{len(files)} files, {size:.0f} MiB, checksums right"
    if broken:
        value = f"missing or damaged: {', '.join(broken)}; data/README.md says how to restore them"
    return Row("bundled models and data", value, not broken)


def _assistant() -> Row:
    """Report the size of the assistant; it may be missing, not damaged."""
    from .data.bundled import ASSISTANT_COMMAND, assistant_folder

    what = "assistant of lessons 03, 12, 15, 16 and 17"
    try:
        files = [*assistant_folder(verify=True).iterdir()]
    except FileNotFoundError:
        return Row(what, f"missing: {ASSISTANT_COMMAND}", None)
    except ValueError as error:
        return Row(what, str(error), False)
    size = sum(file.stat().st_size for file in files) / 2**20
    return Row(what, f"SmolLM2-135M-Instruct, {size:.0f} MiB, checksums right", True)


def _server() -> Row:
    """Report the version of llama.cpp's server; it may be missing, as there is no build for it on
    every machine."""
    what = "server of lesson 17"
    try:
        return Row(what, f"xllamacpp {metadata.version('xllamacpp')}", True)
    except metadata.PackageNotFoundError:
        return Row(what, "missing: lesson 17 shows stored results", None)


def _processor() -> Row:
    """Report the cores this process may use; fail if PyTorch starts more threads than cores."""
    import torch

    machine, allowed, threads = platform.machine(), cores(), torch.get_num_threads()
    host = os.cpu_count() or allowed
    value = f"{machine}, {f'{allowed} of ' if allowed < host else ''}{host} cores"
    if threads > allowed:
        # Threads that wait for each other on a core of another are several times slower than one.
        return Row("processor", f"{value}, but {threads} threads: set OMP_NUM_THREADS", False)
    return Row("processor", value, None)


def _memory() -> list[Row]:
    """Report the memory this process may use; return no row if the system does not say."""
    allowed = memory()
    if allowed is None:
        return []
    gib = allowed / 2**30
    enough = gib >= _NEEDED_GIB
    return [Row("memory", _needs(f"{gib:.0f} GiB", enough, "4 GB"), enough)]


def check_environment() -> Readiness:
    """Look at everything the lessons need, and say whether it is there."""
    import torch

    fits = sys.version_info >= (3, 11)
    rows = [Row("Python", _needs(platform.python_version(), fits, "3.11 or newer"), fits)]
    rows += [*_packages(), _processor(), *_memory()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (none is needed)"
    rows += [Row("GPU", gpu, None), _files(), _assistant(), _server()]
    return Readiness(rows)


if __name__ == "__main__":
    print(cores())
