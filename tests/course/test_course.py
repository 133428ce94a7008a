"""course.py: one command on any system, and one sentence for each thing that can be missing."""

import ast
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.environment import ROOT

SCRIPT = ROOT / "course.py"


def loaded(script=SCRIPT):
    """Return course.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("course", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Return the module in an empty folder, with every outside program replaced by a record."""
    for name in ("CI", "PYTHON", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tools").mkdir()
    (tmp_path / "notebooks").mkdir()
    for lesson in ("00_start_here.ipynb", "02_lora.ipynb"):
        (tmp_path / "notebooks" / lesson).touch()
    for name in ("course.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    module = loaded(tmp_path / "course.py")
    module.ran, module.failing, module.programs = [], (), {}

    def attempt(command, must=True):
        module.ran.append([str(part) for part in command])
        if any(word in command for word in module.failing):
            if must:
                raise module.Trouble("it failed")
            return False
        if "venv" in command:
            Path(module.PYTHON).parent.mkdir(parents=True)
            Path(module.PYTHON).touch()
            module.interpreters[module.PYTHON] = good
        if command[-1] == "uv":
            module.programs["uv"] = str(Path(command[0]).parent / "uv")
        return True

    good = [[3, 13, 5], "linux-x86_64", True, True, "/usr/bin/python3.13"]
    module.interpreters = {"python3.13": good}
    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(module, "wait", lambda *call: module.ran.append(call) or 0)
    monkeypatch.setattr(module, "probe", lambda parts: module.interpreters.get(" ".join(parts)))
    monkeypatch.setattr(module, "nvidia", lambda: False)
    monkeypatch.setattr(module, "unsupported", lambda: None)
    monkeypatch.setattr(module, "LINUX", True)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: module.programs.get(name))
    monkeypatch.setattr(module.subprocess, "check_output", lambda command: b"1\n")
    return module


def installed(course):
    """Return the installers' command lines, without what comes before `install`."""
    return [line[line.index("install") + 1 :] for line in course.ran if "install" in line]


# ------------------------------------------------------------------ any Python 3 can read it


def test_its_syntax_is_that_of_the_first_python_3():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    newer = ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.AsyncFunctionDef | ast.Match
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, newer)]
    shown = [n for n in ast.walk(tree) if isinstance(n, ast.List | ast.Tuple | ast.Set)]
    assert not [n.lineno for n in shown for e in n.elts if isinstance(e, ast.Starred)]
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arg)]
    assert arguments and not [a.lineno for a in arguments if a.annotation]
    modules = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name.split(".")[0] for n in modules if isinstance(n, ast.Import) for a in n.names}
    assert names <= sys.stdlib_module_names


def test_an_outdated_python_is_told_which_it_is():
    source = SCRIPT.read_text(encoding="utf-8")
    before = "import sys; sys.version_info = (3, 4, 0)\n"
    start = source.index('if __name__ == "__main__"')
    done = subprocess.run(
        [sys.executable, "-c", f"{before}def main(given): 1 / 0\n{source[start:]}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("This is Python 3.4, and the course needs 3.11 or newer")


# ------------------------------------------------------------------ commands


def test_help_explains_every_command(course, capsys):
    assert course.main([]) == 0
    shown = capsys.readouterr().out
    for command in (*course.OWN, *course.COMMANDS):
        assert re.search(rf"(?m)^  {command}\b.* \S", shown), command
    assert not course.ran


def test_every_command_runs_what_is_there(course):
    for command in course.COMMANDS:
        for line in loaded().lines(command, []):
            if line[0] == "-m":
                assert importlib.util.find_spec(line[1]), line
            else:
                assert (ROOT / line[0]).is_file(), line


def test_scripts_are_found_in_a_folder_of_any_name(tmp_path):
    (tmp_path / "peft [1]" / "benchmarks").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "peft [1]")
    (tmp_path / "peft [1]" / "benchmarks" / "a_study.py").touch()
    found = loaded(tmp_path / "peft [1]" / "course.py").lines("results", [])
    assert [os.path.join("benchmarks", "a_study.py")] in found


def test_arguments_go_where_the_command_wants_them(course):
    assert course.lines("test", ["-x"]) == [
        ["-m", "pytest", "-q", "-n", "2", "--nbval-lax", "-x", "tests", "notebooks"]
    ]
    assert course.lines("solved", ["02", "03"]) == [["-m", "tools.notebooks", "solved", "02", "03"]]


def test_a_command_runs_offline_in_the_environment_and_its_failure_is_ours(course, monkeypatch):
    monkeypatch.setattr(course, "wait", lambda *call: course.ran.append(call) or 3)
    assert course.main(["costs"]) == 3
    command, folder, variables = course.ran[-1]
    assert command == [course.PYTHON, "benchmarks/costs.py"]
    assert folder == course.ROOT and variables["HF_HUB_OFFLINE"] == "1"
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lbb"], "There is no command lbb. Did you mean lab?"),
        (["zzz"], "There is no command zzz. `python course.py help` lists them."),
        (["grade"], "Which folder? python course.py grade FOLDER"),
        (["grade", "nowhere", "--jobs"], "There is no folder nowhere."),
        (["lab", "77"], "There is no lesson 77: they go from 00 to 02."),
    ],
)
def test_a_wrong_command_is_one_sentence_and_installs_nothing(course, given, told):
    with pytest.raises(course.Trouble, match=re.escape(told)):
        course.main(given)
    assert not course.ran


def test_marking_off_linux_is_refused_in_one_sentence(course, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "LINUX", False)
    with pytest.raises(course.Trouble, match="Marking needs Linux"):
        course.main(["grade", str(tmp_path)])
    assert not course.ran


def test_a_trouble_is_shown_without_a_traceback():
    done = subprocess.run(
        [sys.executable, SCRIPT, "lbb"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("There is no command lbb.")


@pytest.mark.parametrize(
    ("given", "opened", "passed"),
    [
        ([], "00", []),
        (["02"], "02", []),
        (["2"], "02", []),
        (["--no-browser"], "00", ["--no-browser"]),
    ],
)
def test_lab_opens_a_lesson(course, given, opened, passed):
    assert course.main(["lab", *given]) == 0
    command, folder, _ = course.ran[-1]
    assert command[:3] == [course.PYTHON, "-m", "jupyterlab"]
    assert command[-1].startswith(opened) and command[-1].endswith(".ipynb")
    assert [part for part in command[3:-1] if part != "--allow-root"] == passed
    assert folder == os.path.join(course.ROOT, "notebooks")


def test_lab_gives_torch_the_cores_that_it_may_use(course, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    course.main(["lab"])
    assert course.ran[-1][2] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # whoever sets it knows better
    course.main(["lab"])
    assert course.ran[-1][2] == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    course.main(["lab"])
    assert course.ran[-1][2] == {}


def test_the_students_copy_offers_what_it_has(course, tmp_path, capsys):
    (tmp_path / "tools").rmdir()
    theirs = loaded(tmp_path / "course.py")
    assert theirs.EXTRA == "" and theirs.main(["help"]) == 0
    shown = capsys.readouterr().out
    assert " lab " in shown and not re.search("test|grade|solutions|release", shown)
    with pytest.raises(theirs.Trouble, match="There is no command test"):
        theirs.main(["test"])


def test_clean_removes_what_was_built_and_keeps_the_environment(course, tmp_path):
    for folder in ("build/site", "peft_lessons/__pycache__", ".venv/lib/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
    course.main(["clean"])
    assert (
        not (tmp_path / "build").exists() and not (tmp_path / "peft_lessons/__pycache__").exists()
    )
    assert (tmp_path / ".venv/lib/__pycache__").exists() and (tmp_path / "notebooks").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("typed", "ran"),
    [
        (["lab"], "lab"),
        ([], "help"),
        (["outputs", "LESSON=02"], "outputs 02"),
        (["grade", "FOLDER=my class", "ARGS=--jobs 2"], 'grade "my class" --jobs 2'),
    ],
)
def test_make_is_a_thin_caller(typed, ran):
    # The suite may itself run under make, which hands its level, its flags and PYTHON down.
    handed = ("PYTHON", "MAKELEVEL", "MAKEFLAGS", "MFLAGS", "LESSON", "FOLDER", "ARGS")
    alone = {name: value for name, value in os.environ.items() if name not in handed}
    done = subprocess.run(
        ["make", "-n", *typed], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == f"python3 course.py {ran}".split()


# ------------------------------------------------------------------ the environment


def test_it_says_how_much_before_it_downloads(course, monkeypatch, capsys):
    course.failing = ("venv",)
    with pytest.raises(course.Trouble):
        course.main(["setup"])
    shown = capsys.readouterr().out
    assert "Setting up .venv with Python 3.13.5: once" in shown
    assert "About 0.5 GB to download, 2.0 GB on disk. (Up to 3.0 and 6.0 GB" in shown
    monkeypatch.setattr(course, "nvidia", lambda: True)
    with pytest.raises(course.Trouble):
        course.main(["setup"])
    assert "About 3.0 GB to download, 6.0 GB on disk.\n" in capsys.readouterr().out


def test_the_build_without_cuda_is_taken_through_uv_where_no_driver_answers(course, monkeypatch):
    course.main(["setup"])
    first, second = installed(course)
    assert first == ["--quiet", "uv"], "there is no uv on the path: pip brings it"
    assert second[2:] == ["--torch-backend", "cpu", "-e", ".[dev]"]
    monkeypatch.setattr(course, "nvidia", lambda: True)
    course.programs["uv"] = "/bin/uv"
    course.set_up(anew=True)
    assert "--seed" in course.ran[-2], "pip must be there to fall back upon"
    assert course.ran[-1][0] == "/bin/uv" and "auto" in course.ran[-1]


@pytest.mark.parametrize("failing", ["--torch-backend", "uv"])
def test_pip_takes_over_where_that_index_or_uv_cannot_be_reached(course, failing, capsys):
    course.failing = (failing,)
    course.main(["setup"])
    assert course.ran[-1][1:3] == ["-m", "pip"]
    assert installed(course)[-1] == ["-e", ".[dev]"]
    assert (
        "cannot install from PyTorch's own index: pip takes the ordinary build"
        in capsys.readouterr().out
    )


def test_other_systems_take_the_ordinary_build(course, monkeypatch):
    monkeypatch.setattr(course, "LINUX", False)
    course.main(["setup"])
    assert installed(course) == [["-e", ".[dev]"]]
    course.programs["uv"] = "/bin/uv"
    course.set_up(anew=True)
    assert course.ran[-1][0] == "/bin/uv" and "--torch-backend" not in course.ran[-1]


def test_windows_has_scripts(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    course = loaded()
    monkeypatch.undo()
    assert os.path.join(course.ROOT, ".venv", "Scripts", "python.exe") == course.PYTHON


def test_a_second_run_changes_nothing_and_a_newer_list_of_packages_updates(course, tmp_path):
    course.main(["setup"])
    first = list(course.ran)
    course.main(["setup"])
    assert course.ran == first
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8", newline="\r\n") as file:
        file.write("# another\n")
    course.main(["setup"])
    assert any("venv" in line for line in first)
    assert course.ran[len(first) :] and not any("venv" in line for line in course.ran[len(first) :])


def test_other_line_ends_are_no_newer_list(course, tmp_path):
    course.main(["setup"])
    first, file = list(course.ran), tmp_path / "pyproject.toml"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    course.main(["setup"])
    assert course.ran == first


@pytest.mark.parametrize("how", ["cut short", "moved", "python gone", "stamp of make", "half"])
def test_a_set_up_that_is_not_whole_begins_anew(course, how):
    stamp = Path(course.STAMP)
    if how == "cut short":
        course.failing = ("-e",)
        with pytest.raises(course.Trouble):
            course.main(["setup"])
        assert not stamp.exists()
        course.failing = ()
    else:
        course.main(["setup"])
        if how == "moved":
            there = json.loads(stamp.read_text(encoding="utf-8"))
            stamp.write_text(json.dumps(there | {"root": "/elsewhere"}), encoding="utf-8")
        elif how == "python gone":
            del course.interpreters[course.PYTHON]
        else:
            stamp.write_text("" if how == "stamp of make" else '{"root": ', encoding="utf-8")
    litter = Path(course.VENV) / "litter"
    litter.touch()
    course.ran.clear()
    course.main(["setup"])
    assert any("venv" in line for line in course.ran) and not litter.exists()


def test_automatic_runs_take_the_exact_versions(course, tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    course.main(["setup"])
    assert "-c" not in installed(course)[-1]
    monkeypatch.setenv("CI", "true")
    course.main(["setup"])
    assert installed(course)[-1][-2:] == ["-c", str(tmp_path / "constraints.txt")]


def test_pip_installs_all_where_it_puts_uv_out_of_reach(course, monkeypatch):
    monkeypatch.setattr(course.shutil, "which", lambda name, path=None: None)
    course.main(["here"])
    assert installed(course)[-1] == ["-e", "."] and course.ran[-1][1:3] == ["-m", "pip"]


def test_here_installs_into_the_python_that_runs(course):
    course.main(["here"])
    assert installed(course)[-1][:2] == ["--python", sys.executable]
    assert installed(course)[-1][-2:] == ["-e", "."]
    assert not os.path.exists(course.VENV)


# ------------------------------------------------------------------ what can be missing


def test_a_full_disk_is_one_sentence(course, monkeypatch):
    monkeypatch.setattr(course.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(course.Trouble, match=r"needs 2\.0 GB here, and 0\.0 GB are free"):
        course.main(["setup"])
    assert not course.ran


@pytest.mark.parametrize(
    ("script", "raised", "told"),
    [
        ("raise OSError(28, 'No space left on device')", OSError, None),
        ("print('ERROR: Failed to establish a new connection')", None, "is there a network?"),
        ("print('error: dns error')", None, "is there a network?"),
        ("print('No version of setuptools (from versions: none)')", None, "is there a network?"),
        ("print('Resolved 9 packages; access denied')", None, "The installer's last words:"),
        (
            "print('No matching distribution for x')",
            None,
            "The installer's last words:\n\nNo matching",
        ),
    ],
)
def test_a_failed_step_is_named_by_its_cause(script, raised, told):
    course = loaded()
    command = [sys.executable, "-c", f"{script}\nraise SystemExit(1)"]
    if raised:
        with pytest.raises(OSError) as caught:
            course.attempt(command, must=False)
        assert caught.value.errno == errno.ENOSPC
        return
    assert course.attempt(command, must=False) is False
    with pytest.raises(course.Trouble, match=re.escape(told)):
        course.attempt(command)


@pytest.mark.parametrize(
    ("interpreters", "chosen"),
    [
        ({"python3.12": (3, 12), "python3.14": (3, 14)}, "3.12.0"),
        ({"python3.14": (3, 14), "python3": (3, 10)}, "3.14.0"),
        ({"python3.13": (3, 13, False), "python3": (3, 11)}, "3.11.0"),
        ({"py -3": (3, 13)}, "3.13.0"),
        ({"python3": (3, 15), "python": (3, 12)}, "3.12.0"),
    ],
)
def test_the_first_interpreter_that_fits_is_taken(course, interpreters, chosen):
    course.interpreters = {
        name: [[*version[:2], 0], "linux-x86_64", True, version[2:] != (False,), f"/bin/{name}"]
        for name, version in interpreters.items()
    }
    executable, shown = course.find_python(None)
    assert shown == f"Python {chosen}" and executable.startswith("/bin/py")


def test_without_a_fitting_interpreter_it_says_what_is_there(course, monkeypatch):
    course.interpreters = {
        "python3": [[3, 10, 1], "linux-x86_64", True, True, "/bin/python3"],
        "python3.13": [[3, 13, 5], "linux-x86_64", True, False, "/bin/python3.13"],
        "python": [[3, 12, 1], "win32", False, True, "/bin/python"],
    }
    told = "3.14, and this machine has 3.10.1, 3.12.1 for win32, 3.13.5 without venv (on Debian"
    with pytest.raises(course.Trouble, match=re.escape(told)):
        course.main(["setup"])
    monkeypatch.setenv("PYTHON", "python3")
    with pytest.raises(course.Trouble, match=r"3\.14, and PYTHON names 3\.10\.1\. Install"):
        course.main(["setup"])
    monkeypatch.delenv("PYTHON")
    course.interpreters = {}
    with pytest.raises(course.Trouble, match="and found none"):
        course.main(["setup"])
    assert not course.ran
    assert course.find_python("/bin/uv") == (
        "3.13",
        "Python 3.13, which uv downloads where it is missing",
    )


def test_a_named_interpreter_is_taken_even_a_newer_one(course, monkeypatch):
    monkeypatch.setenv("PYTHON", "/opt/my python")
    with pytest.raises(course.Trouble, match="PYTHON=/opt/my python, and no Python runs by"):
        course.main(["setup"])
    course.interpreters["/opt/my python"] = [[3, 15, 0], "linux", True, True, "/opt/my python"]
    assert course.find_python(None) == ("/opt/my python", "Python 3.15.0")


def test_this_interpreter_says_of_itself_what_it_is():
    version, _, wide, whole, executable = loaded().probe([sys.executable])
    assert tuple(version) == sys.version_info[:3] and wide and whole
    assert Path(executable).resolve() == Path(sys.executable).resolve()
    assert loaded().probe(["no-such-python"]) is None


@pytest.mark.parametrize(
    ("system", "change", "told"),
    [
        ("darwin", {"version": "13.6"}, "needs macOS 14 or newer, and this is macOS 13.6"),
        ("darwin", {"chip": b"RELEASE_X86_64"}, "not run on Macs with an Intel processor"),
        ("win32", {"processor": "ARMv8 (64-bit)"}, "not run on Windows on ARM"),
        ("darwin", {}, None),
        ("win32", {}, None),
        ("linux", {}, None),
    ],
)
def test_systems_without_pytorch_are_told_before_anything_is_downloaded(
    monkeypatch, system, change, told
):
    course = loaded()
    given = {"version": "15.1", "chip": b"RELEASE_ARM64_T6000", "processor": "Intel64"} | change
    monkeypatch.setattr(course.sys, "platform", system)
    monkeypatch.setattr(course, "WINDOWS", system == "win32")
    monkeypatch.setattr(course.platform, "mac_ver", lambda: (given["version"], ("", "", ""), ""))
    monkeypatch.setattr(course.subprocess, "check_output", lambda command: given["chip"])
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", given["processor"])
    if told is None:
        course.unsupported()
        return
    with pytest.raises(course.Trouble, match=re.escape(told)):
        course.unsupported()
