"""course.py: one command on any system, and one sentence for each thing that can be missing."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.environment import ROOT

SCRIPT = ROOT / "course.py"
COMMANDS = ROOT / "peft_lessons" / "commands.py"


def loaded(script=COMMANDS):
    """Return the commands as a module of its own."""
    spec = importlib.util.spec_from_file_location("commands", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Return the module in an empty folder, with every outside program replaced by a record."""
    for name in ("CI", "PYTHON", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("tools", "notebooks", "peft_lessons"):
        (tmp_path / name).mkdir()
    for lesson in ("00_start_here.ipynb", "02_lora.ipynb"):
        (tmp_path / "notebooks" / lesson).touch()
    for name in ("peft_lessons/commands.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    module = loaded(tmp_path / "peft_lessons" / "commands.py")
    module.ran, module.failing, module.programs = [], (), {}

    def attempt(command, must=True):
        module.ran.append([str(part) for part in command])
        if any(word in command for word in module.failing):
            if must:
                raise module.Trouble("it failed")
            return "no route to the index"
        if "venv" in command:
            Path(module.PYTHON).parent.mkdir(parents=True)
            Path(module.PYTHON).touch()
            module.interpreters[module.PYTHON] = good
        if command[-1] == "uv":
            module.programs["uv"] = str(Path(command[0]).parent / "uv")
        return ""

    good = answer(13, path="/usr/bin/python3.13")
    module.interpreters = {"python3.13": good}
    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(module, "wait", lambda *call: module.ran.append(call) or 0)
    monkeypatch.setattr(module, "probe", lambda parts: module.interpreters.get(" ".join(parts)))
    monkeypatch.setattr(module, "nvidia", lambda: False)
    monkeypatch.setattr(module, "unsupported", lambda: None)
    monkeypatch.setattr(module, "LINUX", True)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: module.programs.get(name))
    monkeypatch.setattr(module.subprocess, "check_output", cores)
    return module


def cores(command):
    """Stand in for the script that prints how many cores there are, which must be in the course."""
    script = Path(command[1])
    assert (ROOT / script.relative_to(script.parents[1])).is_file()
    return b"1\n"


def installed(course, *words):
    """Run a command if one is given; return the installers' command lines, without what comes
    before `install` and without the server's."""
    if words:
        course.main([*words])
    lines = [line for line in course.ran if "install" in line and "--only-binary" not in line]
    return [line[line.index("install") + 1 :] for line in lines]


def refuses(course, words, message):
    """Run a command, which must end with this message."""
    with pytest.raises(course.Trouble, match=message):
        course.main(words.split())


def answer(minor, system="linux-x86_64", wide=True, venv=True, path="/usr/bin/python3"):
    """Return what an interpreter says of itself."""
    return [[3, minor, 0], system, wide, venv, path]


# ------------------------------------------------------------------ any Python can read it


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {ast.unparse(node).split()[1].split(".")[0] for node in statements}


def test_any_python_can_read_it_and_the_commands_need_python_alone():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    newer = ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.AsyncFunctionDef | ast.Match
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, newer)]
    assert imports(SCRIPT) == {"os", "runpy", "subprocess", "sys"}
    assert imports(COMMANDS) <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("command", "newer", "output"),
    [
        ("lab", {"python3.13": 1, "python3.12": 0}, "python3.12 lab 02"),
        ("lab", {"uv": 0}, "uv run --no-project --python 3.13 python lab 02"),
        ("lab", {}, None),
        ("here", {"python3.12": 0}, None),
    ],
)
def test_an_outdated_python_hands_over_or_is_named(command, newer, output, tmp_path):
    for name, status in newer.items():
        program = f'#!/bin/sh\n[ {status} = 1 ] && exit 1\necho {name} "$@"\n'
        (tmp_path / name).write_text(program, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    source = f"import sys\nsys.version_info, sys.argv = (3, 4, 0), ['', {command!r}, '02']\n"
    source += SCRIPT.read_text(encoding="utf-8").replace("__file__", repr(str(SCRIPT)))
    done = subprocess.run(
        [sys.executable, "-c", source], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    if output:
        assert done.stdout == f"{output}\n".replace(" lab", f" {SCRIPT} lab")
    else:
        message = "This is Python 3.4, and the course needs 3.11 or newer: try python3\n"
        assert (done.returncode, done.stderr) == (1, message)


# ------------------------------------------------------------------ commands


def test_help_explains_every_command(course, capsys):
    assert course.main([]) == 0
    output = capsys.readouterr().out
    for command in course.COMMANDS:
        assert re.search(rf"(?m)^  {command}\b.*  \S", output), command
    assert not course.ran


def test_every_command_runs_what_is_there(course):
    for command in course.COMMANDS:
        for line in loaded().lines_of(command, []):
            if line[0] == "-m":
                assert importlib.util.find_spec(line[1]), line
            else:
                assert (ROOT / line[0]).is_file(), line


def test_arguments_go_where_the_command_wants_them(course):
    assert course.lines_of("test", ["-x"]) == [
        ["-m", "pytest", "-q", "-n", "2", "--nbval-lax", "-x", "tests", "classroom", "notebooks"]
    ]
    assert course.lines_of("solved", ["02", "03"]) == [
        ["-m", "tools.notebooks", "solved", "02", "03"]
    ]


def test_a_command_runs_offline_in_the_environment_and_its_failure_is_ours(course, monkeypatch):
    monkeypatch.setattr(course, "wait", lambda *call: course.ran.append(call) or 3)
    assert course.main(["costs"]) == 3
    command, folder, variables = course.ran[-1]
    assert command == [course.PYTHON, "benchmarks/costs.py"]
    assert folder == course.ROOT and variables["HF_HUB_OFFLINE"] == "1"
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "1"


def test_a_wrong_command_is_one_sentence_and_installs_nothing(course):
    for words, message in (
        ("lbb", "There is no command lbb. Did you mean lab?"),
        ("zzz", "There is no command zzz. `python course.py help` lists them."),
        ("grade", "Which folder? python course.py grade FOLDER"),
        ("grade --jobs 2 nowhere", "There is no folder nowhere."),
        ("lab 77", "There is no lesson 77: they go from 00 to 02."),
    ):
        refuses(course, words, re.escape(message))
    assert not course.ran


def test_lab_opens_a_lesson(course):
    for words, opened in ((), "00"), (["02"], "02"), (["2"], "02"), (["--no-browser"], "00"):
        assert course.main(["lab", *words]) == 0
        command, folder, _ = course.ran[-1]
        assert command[:3] == [course.PYTHON, "-m", "jupyterlab"]
        assert command[-1].startswith(opened) and command[-1].endswith(".ipynb")
        assert f"--LabApp.default_url=/lab/tree/{command[-1]}" in command, "for the address printed"
        assert folder == course.ROOT / "notebooks"
    assert "--no-browser" in command


def test_chat_takes_paths_of_the_caller_and_names_of_models(course, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    course.main(["chat", "mine", "smollm2"])
    command = [course.PYTHON, "-m", "peft_lessons.deploy.chat"]
    adapter = str(tmp_path / "elsewhere" / "mine")
    assert course.ran[-1] == ([*command, adapter, "smollm2"], course.ROOT, {"HF_HUB_OFFLINE": "1"})
    refuses(course, "chat", r"Which adapter\? python course.py chat FOLDER")


def test_lab_gives_torch_the_cores_that_it_may_use(course, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    course.main(["lab"])
    assert course.ran[-1][2] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # whoever sets it knows better
    course.main(["lab"])
    assert course.ran[-1][2] == {}


def test_clean_removes_what_was_built_and_keeps_the_environment(course, tmp_path):
    for folder in ("build/site", "peft_lessons/__pycache__", ".venv/lib/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
    course.main(["clean"])
    left = [folder for folder in ("build", "peft_lessons/__pycache__", ".venv/lib/__pycache__")
            if (tmp_path / folder).exists()]  # fmt: skip
    assert left == [".venv/lib/__pycache__"] and (tmp_path / "notebooks").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_is_a_thin_caller():
    # The suite may itself run under make, which hands its level, its flags and PYTHON down.
    handed = ("PYTHON", "MAKELEVEL", "MAKEFLAGS", "MFLAGS", "LESSON", "FOLDER", "ARGS")
    alone = {name: value for name, value in os.environ.items() if name not in handed}
    for typed, ran in (
        ([], "help"),
        (["outputs", "LESSON=02"], "outputs 02"),
        (["grade", "FOLDER=my class", "ARGS=--jobs 2"], 'grade "my class" --jobs 2'),
    ):
        command = ["make", "-n", *typed]
        output = subprocess.check_output(command, cwd=ROOT, env=alone, text=True)
        assert output.split() == f"python3 course.py {ran}".split()


# ------------------------------------------------------------------ the environment


def test_it_says_how_much_before_it_downloads(course, monkeypatch, capsys):
    course.failing = ("venv",)
    refuses(course, "setup", "it failed")
    output = capsys.readouterr().out
    assert "Setting up .venv with Python 3.13.0: once" in output
    assert "About 0.6 GB to download, 2.6 GB on disk. (Up to 3.2 and 6.6 GB" in output
    monkeypatch.setattr(course, "nvidia", lambda: True)
    refuses(course, "setup", "it failed")
    assert "About 3.2 GB to download, 6.6 GB on disk.\n" in capsys.readouterr().out


def test_the_build_without_cuda_is_taken_through_uv_where_no_driver_answers(course, monkeypatch):
    first, second = installed(course, "setup")
    assert first == ["--quiet", "uv"], "there is no uv on the path: pip brings it"
    assert second[2:] == ["--torch-backend", "cpu", "-e", ".[dev]"]
    monkeypatch.setattr(course, "nvidia", lambda: True)
    course.programs["uv"] = "/bin/uv"
    course.set_up(anew=True)
    assert "--seed" in course.ran[-3], "pip must be there to fall back upon"
    assert course.ran[-2][0] == "/bin/uv" and "auto" in course.ran[-2]


@pytest.mark.parametrize("failing", ["--torch-backend", "uv"])
def test_pip_takes_over_where_that_index_or_uv_cannot_be_reached(course, failing, capsys):
    course.failing = (failing,)
    assert installed(course, "setup")[-1] == ["-e", ".[dev]"]
    assert [line for line in course.ran if "-e" in line][-1][1:3] == ["-m", "pip"]
    reason = {
        "--torch-backend": "uv cannot install from PyTorch's own index (no route to the index)",
        "uv": "pip cannot install uv",
    }[failing]
    assert f"{reason}: pip takes the ordinary build." in capsys.readouterr().out


def test_other_systems_take_the_ordinary_build(course, monkeypatch):
    monkeypatch.setattr(course, "LINUX", False)
    assert installed(course, "setup") == [["-e", ".[dev]"]]
    course.programs["uv"] = "/bin/uv"
    course.set_up(anew=True)
    assert course.ran[-2][0] == "/bin/uv" and "--torch-backend" not in course.ran[-2]


def test_a_second_run_changes_nothing_and_a_newer_list_of_packages_updates(course, tmp_path):
    course.main(["setup"])
    first = list(course.ran)
    course.main(["setup"])
    assert course.ran == first
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8", newline="\r\n") as file:
        file.write("# another\n")
    course.main(["setup"])
    later = course.ran[len(first) :]
    assert any("venv" in line for line in first)
    assert later and not any("venv" in line for line in later)


def test_a_set_up_that_is_cut_short_starts_again(course):
    course.failing = ("-e",)
    refuses(course, "setup", "it failed")
    assert not course.READY.exists()
    course.failing = ()
    litter = course.VENV / "litter"
    litter.touch()
    course.ran.clear()
    course.main(["setup"])
    assert any("venv" in line for line in course.ran) and not litter.exists()


@pytest.mark.parametrize("stamp", ['{"root": "/elsewhere"}', '{"root": ', "python is gone"])
def test_a_set_up_that_was_moved_or_is_incomplete_starts_again(course, stamp):
    course.main(["setup"])
    if stamp == "python is gone":
        del course.interpreters[course.PYTHON]
    else:
        course.READY.write_text(stamp, encoding="utf-8")
    course.ran.clear()
    course.main(["setup"])
    assert any("venv" in line for line in course.ran)


def test_automatic_runs_take_the_exact_versions(course, tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    assert "-c" not in installed(course, "setup")[-1]
    monkeypatch.setenv("CI", "true")
    assert installed(course, "setup")[-1][-2:] == ["-c", str(tmp_path / "constraints.txt")]


def test_here_installs_into_the_python_that_runs(course):
    line = installed(course, "here")[-1]
    assert line[:2] == ["--python", sys.executable] and line[-2:] == ["-e", "."]
    assert not course.VENV.exists()


@pytest.mark.parametrize("uv", [None, "/bin/uv"])
@pytest.mark.parametrize("command", ["setup", "here"])
def test_the_server_comes_ready_made_and_the_set_up_goes_on_without_it(course, capsys, uv, command):
    course.programs["uv"], course.failing = uv, ("--only-binary",)
    course.main([command])
    (line,) = [line for line in course.ran if "--only-binary" in line]
    where = line[line.index("--only-binary") :]
    assert where[1] == ":all:" and [name[:9] for name in where[2:]] == ["xllamacpp", "openai>=3"]
    output = capsys.readouterr().out
    assert "The server of lesson 17 is not installed (no route to the index)." in output
    again = re.search("(?m)^.* install --only-binary .*", output)[0]
    assert "-m pip" in again and again.endswith(":all: xllamacpp openai")
    assert command == "here" or course.READY.exists(), "the lessons before need no server"


def test_two_starts_at_once_set_up_once(course, monkeypatch, capsys):
    with course.one_at_a_time(), (course.ROOT / ".venv.lock").open("rb") as other:
        assert not course.locked(other)
    real, answers = course.locked, [False, False, True]

    def locked(file):
        if answers == [True]:  # the other start is done
            course.set_up(anew=True)
            course.READY.write_text(json.dumps(course.this_set_up()), encoding="utf-8")
            course.ran.clear()
        return answers.pop(0) and real(file)

    monkeypatch.setattr(course, "locked", locked)
    assert course.main(["setup"]) == 0 and not course.ran
    message = "Another start is setting up the course: waiting for it.\n"
    assert capsys.readouterr().out.count(message) == 1


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_removed(course, monkeypatch):
    course.main(["setup"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert course.main(["setup"]) == 0, "what is set up runs"
    course.READY.write_text('{"root": "/elsewhere"}', encoding="utf-8")
    course.ran.clear()
    refuses(course, "setup", f"This folder cannot be written: {course.ROOT}")
    assert not course.ran and os.path.exists(course.PYTHON)


def test_ctrl_c_says_how_to_go_on():
    script = "import pathlib, runpy, sys\nsys.argv = ['course.py', 'setup']"
    stop = "def stop(*a, **k):\n    raise KeyboardInterrupt\npathlib.Path.exists = stop"
    start = f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", f"{script}\n{stop}\n{start}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "\nStopped: run the same command again.\n"


# ------------------------------------------------------------------ the assistant


def fetches(course):
    """Return the interpreters with which the assistant was fetched, in their order."""
    command = ["-m", "peft_lessons.data.assistant"]
    return [call[0][0] for call in course.ran if isinstance(call, tuple) and call[0][1:] == command]


def test_it_comes_last_and_the_set_up_is_complete_without_it(course, monkeypatch):
    def fails(*call):
        assert course.READY.exists(), "interrupted here, the packages are not installed anew"
        course.ran.append(call)
        return 1

    monkeypatch.setattr(course, "wait", fails)
    assert course.main(["setup"]) == 0
    assert fetches(course) == [course.PYTHON] and isinstance(course.ran[-1], tuple)
    assert course.main(["here"]) == 0
    assert fetches(course) == [course.PYTHON, sys.executable]


def test_only_a_set_up_and_its_own_command_fetch_it(course, monkeypatch):
    course.main(["setup"])
    for command in ("setup", "lab", "lint"):
        course.main([command])
    assert fetches(course) == [course.PYTHON]
    course.main(["assistant"])
    assert fetches(course) == [course.PYTHON] * 2
    monkeypatch.setattr(course, "wait", lambda *call: 1)
    assert course.main(["assistant"]) == 1, "and fails where it fails"


@pytest.mark.parametrize("installed", [True, False])
def test_without_venv_the_python_that_has_the_course_fetches_it(course, monkeypatch, installed):
    """That of conda or of a hub, which `assistant` must not set up once more."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    course.main(["assistant"])
    assert set(fetches(course)) == {sys.executable if installed else course.PYTHON}
    assert course.VENV.exists() is not installed


# ------------------------------------------------------------------ what can be missing


def test_a_full_disk_is_one_sentence(course, monkeypatch):
    monkeypatch.setattr(course.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    refuses(course, "setup", r"needs 2\.6 GB here, and 0\.0 GB are free")
    assert not course.ran


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: Failed to establish a new connection", "is there a network?"),
        ("No version of setuptools (from versions: none)", "is there a network?"),
        ("No matching distribution for x", "The installer's last words:\n\nNo matching"),
    ],
)
def test_a_failed_step_is_named_by_its_cause(said, told):
    course = loaded()
    command = [sys.executable, "-c", f"print({said!r})\nraise SystemExit(1)"]
    assert course.attempt(command, must=False) == said
    with pytest.raises(course.Trouble, match=re.escape(told)):
        course.attempt(command)
    full = "raise OSError(28, 'No space left on device')"
    with pytest.raises(OSError, match="Errno 28"):
        course.attempt([sys.executable, "-c", full], must=False)


def test_the_first_interpreter_that_fits_is_taken(course):
    for minors, chosen in (
        ({"python3.12": 12, "python3.14": 14}, "python3.12"),
        ({"python3.14": 14, "python3": 10}, "python3.14"),
        ({"py -3": 13}, "py -3"),
        ({"python3": 15, "python": 12}, "python"),
    ):
        course.interpreters = {n: answer(minor, path=n) for n, minor in minors.items()}
        assert course.find_python(None) == (chosen, f"Python 3.{minors[chosen]}.0")


def test_without_a_fitting_interpreter_it_says_what_is_there(course, monkeypatch):
    course.interpreters = {
        "python3": answer(10),
        "python3.13": answer(13, venv=False),
        "python": answer(12, "win32", wide=False),
    }
    message = (
        r"3\.14, and this machine has 3\.10\.0, 3\.12\.0 for win32, 3\.13\.0 without venv \(on D"
    )
    refuses(course, "setup", message)
    monkeypatch.setenv("PYTHON", "python3")
    refuses(course, "setup", r"3\.14, and PYTHON names 3\.10\.0\. Install")
    monkeypatch.delenv("PYTHON")
    course.interpreters = {}
    refuses(course, "setup", "and found none")
    assert not course.ran
    name = "Python 3.13, which uv downloads where it is missing"
    assert course.find_python("/bin/uv") == ("3.13", name)


def test_a_named_interpreter_is_taken_even_a_newer_one(course, monkeypatch):
    monkeypatch.setenv("PYTHON", "/opt/my python")
    refuses(course, "setup", "PYTHON=/opt/my python, and no Python runs by")
    course.interpreters["/opt/my python"] = answer(15, path="/bin/own")
    assert course.find_python(None) == ("/bin/own", "Python 3.15.0")


def test_this_interpreter_says_of_itself_what_it_is():
    version, _, wide, has_venv, executable = loaded().probe([sys.executable])
    assert tuple(version) == sys.version_info[:3] and wide and has_venv
    assert Path(executable).resolve() == Path(sys.executable).resolve()
    assert loaded().probe(["no-such-python"]) is None


@pytest.mark.parametrize(
    ("system", "version", "chip", "told"),
    [
        ("darwin", "13.6", b"RELEASE_ARM64", "needs macOS 14 or newer, and this is macOS 13.6"),
        ("darwin", "15.1", b"RELEASE_X86_64", "not run on Macs with an Intel processor"),
        ("win32", "", "ARMv8 (64-bit)", "not run on Windows on ARM"),
        ("darwin", "15.1", b"RELEASE_ARM64", None),
        ("win32", "", "Intel64", None),
    ],
)
def test_systems_without_pytorch_get_a_message(monkeypatch, system, version, chip, told):
    course = loaded()
    monkeypatch.setattr(course.sys, "platform", system)
    monkeypatch.setattr(course, "WINDOWS", system == "win32")
    monkeypatch.setattr(course.platform, "mac_ver", lambda: (version, ("", "", ""), ""))
    monkeypatch.setattr(course.subprocess, "check_output", lambda command: chip)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", str(chip))
    with pytest.raises(course.Trouble, match=told) if told else nullcontext():
        course.unsupported()
