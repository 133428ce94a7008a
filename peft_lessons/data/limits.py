"""Read how much memory and how many processor cores this process may use.

A container or a hub allows a process less than its host has. The limits are in control groups,
of version 1 or 2 (Linux kernel documentation, "Control Group v2" and "CFS Bandwidth Control"), and
in the process's CPU affinity. Run as a script, this file prints the number of cores; it imports
nothing but the standard library, so that it can be asked before PyTorch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SYSTEM = Path("/")


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
    found = []
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    set_ = [
        *_settings(system, "", "memory.max"),
        *_settings(system, "memory", "memory.limit_in_bytes"),
    ]
    found += [int(limit) for limit in set_ if limit.isdecimal()]  # no limit is "max"
    return min(found, default=None)


def cores(system: Path = SYSTEM) -> int:
    """Return how many processor cores the process may keep busy, at least 1.

    `system` is the root of the file system."""
    found = [float(os.cpu_count() or 1)]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    pairs = [limit.split() for limit in _settings(system, "", "cpu.max")]
    quotas = _settings(system, "cpu", "cpu.cfs_quota_us")
    periods = _settings(system, "cpu", "cpu.cfs_period_us")
    pairs += zip(quotas, periods, strict=False)
    # No quota is "max" in version 2 and -1 in version 1.
    found += [int(quota) / int(period) for quota, period in pairs if quota.isdecimal()]
    return max(1, int(min(found)))


if __name__ == "__main__":
    print(cores())
