"""What this machine allows, from made-up trees of control groups, and whether it is ready."""

import os
import subprocess
import sys

import pytest
import torch

from peft_lessons import check_environment, machine
from peft_lessons.data import bundled

GIB = 2**30
# The host of all trees: 64 cores and 256 GiB.
TREES = {
    "no groups": ({}, 64, 256),
    "version 2, a group above has less": (
        {
            "proc/self/cgroup": "0::/pod/course\n",
            "sys/fs/cgroup/pod/course/memory.max": "max\n",
            "sys/fs/cgroup/pod/course/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
        },
        3,
        8,
    ),
    "version 2, the host's path is not mounted": (
        {
            "proc/self/cgroup": "0::/kubepods/pod1/course\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        1,
        4,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "11:memory:/docker/1\n7:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2,
        3,
    ),
}


@pytest.fixture
def host(monkeypatch):
    """Make this machine one of 64 cores and 256 GiB."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", pages.get, raising=False)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("tree", TREES)
def test_the_narrowest_limit_counts(tmp_path, tree):
    files, cores, memory = TREES[tree]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert machine.cores(tmp_path) == cores
    assert machine.memory(tmp_path) == memory * GIB


@pytest.mark.usefixtures("host")
def test_affinity_is_a_limit_too_and_systems_without_these_files_say_what_they_can(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert machine.cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores(tmp_path) == 1
    assert machine.memory(tmp_path) is None


def test_as_a_script_it_prints_the_cores_without_loading_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", machine.__file__],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == machine.cores()
    assert "torch" not in done.stderr


@pytest.fixture
def rows_of(monkeypatch):
    def rows(threads, memory):
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(machine, "cores", lambda: 2)
        monkeypatch.setattr(machine, "memory", lambda: memory)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return {row.what: row for row in check_environment().rows}

    return rows


def test_the_check_of_the_machine_shows_what_is_allowed_and_marks_what_is_wrong(rows_of):
    rows = rows_of(threads=2, memory=8 * GIB)
    assert rows["processor"].value.endswith(", 2 of 64 cores") and rows["processor"].ok is None
    assert rows["memory"].value == "8 GiB" and rows["memory"].ok
    rows = rows_of(threads=64, memory=2 * GIB)
    assert "2 of 64 cores, but 64 threads: set OMP_NUM_THREADS" in rows["processor"].value
    assert rows["processor"].ok is False
    assert rows["memory"].value.startswith("2 GiB, needs 4 GB") and not rows["memory"].ok


def test_this_machine_is_ready_and_says_so():
    readiness = check_environment()
    assert readiness.ready, str(readiness)
    assert repr(readiness) == "This machine is ready."
    # The wheel's own version: torch adds +cpu or +cu130 to it only where the index has it, too.
    assert machine.metadata.version("torch") in str(readiness)
    for name in (
        "transformers",
        "peft",
        "jupyterlab",
        "Python",
        "memory",
        "checksums right",
        "lesson 17",
    ):
        assert name in str(readiness)


def test_a_machine_without_the_server_of_lesson_17_is_ready(monkeypatch):
    def version(name, real=machine.metadata.version):
        if name == "xllamacpp":
            raise machine.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    readiness = check_environment()
    assert readiness.ready and "missing: lesson 17 shows stored results" in str(readiness)


def test_a_wrong_version_and_a_damaged_file_are_named(monkeypatch):
    version = machine.metadata.version
    monkeypatch.setattr(
        machine.metadata, "version", lambda name: "1.0" if name == "torch" else version(name)
    )
    broken = bundled.bundled_files()[0]
    object.__setattr__(broken, "intact", False)
    monkeypatch.setattr(bundled, "bundled_files", lambda: [broken])
    readiness = check_environment()
    assert not readiness.ready and readiness.verdict.startswith("Not ready")
    assert "✗ torch" in repr(readiness) and "1.0, needs" in repr(readiness)
    assert f"missing or damaged: {broken.path}" in repr(readiness)
