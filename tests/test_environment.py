"""The environment's descriptions agree, and the tests' own environment is cut off."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import network_guard
import pytest
import yaml

from tools.environment import NEVER, ROOT, offline_environment


def test_conda_environment_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    python, installer, pip = conda["dependencies"]
    assert sorted(pip["pip"]) == sorted(wanted)
    assert installer == "pip"
    assert python == "python=3.11"
    assert project["requires-python"] == ">=3.11,<3.12"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "::1", None, b""])
def test_this_machine_is_local(host):
    assert network_guard.is_local(host)


@pytest.mark.parametrize("host", ["example.org", "192.0.2.1", "2001:db8::1", b"example.org"])
def test_other_machines_are_not(host):
    assert not network_guard.is_local(host)


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('example.org', 443)",
        "socket.gethostbyname('example.org')",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "urllib.request.urlopen('http://192.0.2.1', timeout=1)",
    ],
)
def test_any_process_of_the_tests_is_cut_off(attempt, tmp_path):
    log = tmp_path / "network.log"
    done = subprocess.run(
        [sys.executable, "-c", f"import socket, urllib.request\n{attempt}"],
        env=offline_environment(log=log), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "no network in the tests" in done.stderr
    assert log.read_text()


def test_loopback_stays_open(tmp_path):
    log = tmp_path / "network.log"
    source = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()"
    )
    subprocess.run([sys.executable, "-c", source], env=offline_environment(log=log), check=True)
    assert not log.exists()


def test_the_tests_run_offline_and_with_few_threads():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert int(os.environ["OMP_NUM_THREADS"]) <= 2
    assert not set(NEVER) & os.environ.keys()
    assert Path(os.environ["IPYTHONDIR"]) != Path.home() / ".ipython"
