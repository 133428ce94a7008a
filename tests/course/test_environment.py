"""The environment's descriptions agree, and the tests' own environment is cut off."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import network_guard
import pytest
import yaml
from packaging.requirements import Requirement

from tools.environment import NEVER, ROOT, offline_environment

TOPS = ("benchmarks", "classroom", "data", "docs", "notebooks", "peft_lessons", "tests", "tools")


def test_conda_takes_its_packages_from_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, installer, pip = conda["dependencies"]
    assert installer == "pip" and pip == {"pip": ["--only-binary=xllamacpp", "-e .[dev,serve]"]}
    assert Requirement(python.replace("=", "==")).specifier.contains("3.13")


def test_the_version_is_one_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"(?m)^## (\d\S+) \((\S+)\)$", changes)[0]
    assert newest == (project["version"], str(cited["date-released"]))
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert cited["authors"] == project["authors"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert f"(c) {newest[1][:4]} {cited['authors'][0]['name']}" in licence


def test_this_machine_is_local_and_no_other():
    assert all(map(network_guard.is_local, ["localhost", "127.8.0.1", "::1", None, b""]))
    assert not any(map(network_guard.is_local, [b"example.org", "192.0.2.1", "2001:db8::1"]))


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('example.org', 443)",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    ],
)
def test_any_process_of_the_tests_is_cut_off(attempt, tmp_path):
    log = tmp_path / "network.log"
    command = [sys.executable, "-c", f"import socket\n{attempt}"]
    done = subprocess.run(command, env=offline_environment(log=log), capture_output=True, text=True)
    assert "no network in the tests" in done.stderr
    assert log.read_text(encoding="utf-8")


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


ELSEWHERE = """
import sys

assert "pandas" not in sys.modules  # it takes a third of a second
from matplotlib.axes import Axes
from peft_lessons import load_model, load_task, plots
from peft_lessons.data.base_models import load_tokenizer

fig, ax = plots.figure()
plots.curves(ax, {"a": ([1], [1])}, "t", "x", "y")
fig.canvas.draw()
pyplot = sys.modules.get("matplotlib.pyplot")
assert pyplot is None or not pyplot.get_fignums()

batch = next(load_task("sentiment").batches("test", 2))
assert len(batch["input_ids"]) == 2

model = load_model("minilm", labels=2, verify=True)
import peft

model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
model(**load_tokenizer("minilm")(["a", "b c"], padding=True, return_tensors="pt"))
model.save_pretrained("adapter")
model = load_model("tinylm", four_bit=True)
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
model.generate(**load_tokenizer("tinylm")("a", return_tensors="pt").to(model.device))
model.save_pretrained("adapter")
"""


def test_in_another_folder_all_is_there_and_quiet(tmp_path):
    """Models, tasks and figures, and the last without pyplot, which would show them twice."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_pytest_runs_without_its_cache_and_without_xdist():
    """As an instructor may call it in a read-only folder, or where xdist is not installed."""
    one = "tests/course/test_environment.py::test_this_machine_is_local_and_no_other"
    # A worker of xdist does less than a pytest of its own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        one,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_every_text_names_its_encoding():
    """Without one, Windows takes another."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--preview"]
    command = [*ruff, "--select=PLW1514", "--exclude=*.ipynb", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # Where ruff cannot tell that something is a path.
    arguments = {"read_text": 1, "write_text": 2}
    for file in (f for top in TOPS for f in (ROOT / top).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                given = len(call.args) + len(call.keywords)
                assert given >= arguments.get(call.func.attr, 0), (file, ast.unparse(call))


def test_the_exact_versions_fit_and_name_no_address():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[\w.!+-]+", str(one.specifier)) for one in exact)
    assert not [one.name for one in exact if one.url]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["dev"] + extras["serve"]:
        wanted = Requirement(text)
        found = [one for one in exact if one.name.lower() == wanted.name.lower()]
        assert found, f"{wanted.name}: run `make constraints`"
        for one in found:
            version = str(one.specifier).removeprefix("==")
            assert wanted.specifier.contains(version, prereleases=True), f"{one}, {wanted}"
