"""Run a command of the course, and set up the environment in the folder .venv for it.

The file course.py runs this one by its path: it needs nothing but Python itself. Packages go to
.venv and nowhere else, except that `here` installs them into the running Python and pip and uv keep
their usual caches.
"""

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
READY = VENV / "ready"  # what the last complete set-up wrote down
WINDOWS = os.name == "nt"
LINUX = sys.platform.startswith("linux")
PYTHON = str(VENV / ("Scripts/python.exe" if WINDOWS else "bin/python"))

OLDEST, NEWEST = (3, 11), (3, 14)
# In the order of trust: the suite runs on the first and the third of them.
NAMES = ["python3.13", "python3.12", "python3.11", "python3.14", "python3", "python", "py -3"]

# The students' copy holds lessons, package and data; what needs more is not offered there.
FOR_STUDENTS = not (ROOT / "tools").is_dir()
EXTRA = "" if FOR_STUDENTS else "[dev]"

# Two kernels on two cores: more than one thread each is several times slower.
OFFLINE = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# As measured, in GB, packages and assistant: (to download, on disk).
SIZES = {
    ("cpu", "[dev]"): (0.6, 2.6),
    ("cpu", ""): (0.6, 2.2),
    ("cuda", "[dev]"): (3.2, 6.6),
    ("cuda", ""): (3.2, 6.2),
}


class Trouble(Exception):
    """Something that the reader can mend, told in one sentence."""


# ------------------------------------------------------------------ commands


class Command(NamedTuple):
    """What `help` says of a command, and the programs that it runs in turn: modules or scripts. {}
    is where the arguments go, at the end where it is left out. Without programs it is a function
    of this module."""

    arguments: str
    purpose: str
    programs: list[str]


def read(table: str) -> dict[str, Command]:
    """Return the commands of a table: a line of help each, and its programs below."""
    commands, name = {}, ""
    for line in table.strip().splitlines():
        if line.startswith("    "):
            commands[name].programs.append(line.strip())
        else:
            usage, _, purpose = line.partition(": ")
            name, _, arguments = usage.partition(" ")
            commands[name] = Command(arguments, purpose, [])
    return commands


COMMANDS = read("""
lab [LESSON]: open lesson 00, or the one named, in JupyterLab
setup: set up .venv, where it is missing or out of date
here: install into this Python instead: for hubs, Colab, containers
chat FOLDER [BASE]: talk to the adapter in FOLDER, beside its base or the one named
assistant: fetch the assistant, 93 MB to download and 260 MiB on disk
update NEW [COPY]: bring this copy, or COPY, up to date from NEW, a ZIP or a folder
clean: remove caches and what was built; .venv stays
help: show this list
test [OPTIONS]: run all tests, and every lesson as shipped and solved: about twenty minutes
    -m pytest -q -n 2 --nbval-lax {} tests classroom notebooks
outputs [LESSON ...]: execute lessons, all or 02 03, and store clean outputs
    -m tools.notebooks outputs
solved [LESSON ...]: run the exercises of lessons with their solutions, and count the right checks
    -m tools.notebooks solved
minutes [LESSON ...]: compare the minutes of lessons with their cards; --write fills in the tables
    -m tools.minutes
release [FOLDER]: write the students' copy, without solutions, to build/peft-lessons
    -m classroom.release
grade FOLDER [OPTIONS]: mark what students handed in
    -m classroom.grade
gradescope LESSON [OPTIONS]: write an autograder for Gradescope to build/
    -m classroom.gradescope
guide: write docs/wrong_answers.md, what the checks recognise
    -m tools.guide
site [FOLDER] [OPTIONS]: build the course as web pages, to build/site
    -m tools.site
results [OPTIONS]: run what the measured tables lack; many hours if they are empty
    benchmarks/*_study.py
    benchmarks/bits_roundings.py
    benchmarks/dora_analysis.py
    benchmarks/dora_swaps.py
    benchmarks/broken_*.py
    benchmarks/fair_cut.py
    benchmarks/knob_signs.py
    benchmarks/qlora_[abl]*.py
    benchmarks/release_files.py
costs: measure times and bytes anew, on an idle machine: half an hour
    benchmarks/costs.py
    benchmarks/choosing_costs.py
    benchmarks/qlora_cost.py
    benchmarks/serving_costs.py
browser [OPTIONS]: try all lessons, and the site, in a real browser (needs Chromium)
    -m pytest -q -rs -m browser {} tests/notebooks
mutants [WORD ...]: apply one-line faults to a copy, and see which test notices each: many minutes
    -m tools.mutants
lint: check the style of all Python code
    -m ruff check .
constraints: write the newest versions that fit to constraints.txt
    -m uv pip compile --quiet --universal --upgrade --no-header --no-annotate \
--python-version 3.11 --extra dev --extra serve --output-file constraints.txt pyproject.toml
""")
if FOR_STUDENTS:
    COMMANDS = {name: command for name, command in COMMANDS.items() if not command.programs}


def lines_of(command: str, arguments: list[str]) -> list[list[str]]:
    """Return the command lines, without the interpreter, that a command runs in turn."""
    lines = []
    for line in COMMANDS[command].programs:
        head, _, tail = line.partition(" {}")
        programs = [head.split()]
        if "*" in head:
            programs = [[str(path.relative_to(ROOT))] for path in sorted(ROOT.glob(head))]
        lines += [program + arguments + tail.split() for program in programs]
    return lines


def run(command: str, arguments: list[str]) -> int:
    """Run a command of the table in the environment; return its exit status."""
    if command == "grade" and not any((ROOT / name).is_dir() for name in arguments):
        names = [name for name in arguments if not name.startswith("-") and not name.isdigit()]
        missing = f"There is no folder {names[0]}." if names else ""
        raise Trouble(missing or "Which folder? python course.py grade FOLDER")
    python = ready()
    for line in lines_of(command, arguments):
        if len(COMMANDS[command].programs) > 1:
            print(line[0], flush=True)
        if status := wait([python, *line], ROOT, OFFLINE):
            return status
    return 0


def lab(arguments: list[str]) -> int:
    """Open a lesson in JupyterLab, 00 unless another is named; return JupyterLab's status."""
    folder = ROOT / "notebooks"
    lessons = sorted(path.name for path in folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = "00"
    if arguments and re.match(r"\d", arguments[0]):
        wanted, arguments = arguments[0].zfill(2), arguments[1:]
    lesson = next((name for name in lessons if name.startswith(wanted)), None)
    if lesson is None:
        raise Trouble(f"There is no lesson {wanted}: they go from 00 to {lessons[-1][:2]}.")
    python = ready()
    machine = str(ROOT / "peft_lessons" / "machine.py")
    cores = subprocess.check_output([python, machine]).decode().strip()
    # torch counts the machine's cores, of which a container or a hub may allow few.
    limited = cores != str(os.cpu_count()) and "OMP_NUM_THREADS" not in os.environ
    threads = {"OMP_NUM_THREADS": cores} if limited else {}
    # In a container everybody is root, whom JupyterLab refuses unless told.
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    # The address that JupyterLab prints leads to the lesson, too, where no browser starts.
    address = f"--LabApp.default_url=/lab/tree/{lesson}"
    return wait([python, "-m", "jupyterlab", *root, address, *arguments, lesson], folder, threads)


def chat(arguments: list[str]) -> int:
    """Open a prompt with an adapter, whose path is the caller's; return the exit status."""
    if len(arguments) not in (1, 2):
        raise Trouble("Which adapter? python course.py chat FOLDER [BASE]")
    paths = [os.path.expanduser(name) for name in arguments]
    paths = [os.path.abspath(path) if os.path.exists(path) else path for path in paths]
    python = ready()
    return wait([python, "-m", "peft_lessons.deploy.chat", *paths], ROOT, {"HF_HUB_OFFLINE": "1"})


def assistant() -> int:
    """Fetch the assistant where it is missing or damaged; return the status of the attempt.

    A Python into which `here` or conda installed the course does it itself."""
    packages = ("gguf", "tokenizers", "transformers")
    itself = not READY.exists() and all(map(importlib.util.find_spec, packages))
    return fetch(sys.executable if itself else ready())


def update(arguments: list[str]) -> int:
    """Update this copy, or the one that is named second, from a new one; return the status.

    The new copy's own script does it, so that a correction of the script counts at once."""
    if len(arguments) not in (1, 2):
        raise Trouble("Which copy is new? python course.py update ZIP_OR_FOLDER")
    new, copy = (os.path.abspath(os.path.expanduser(p)) for p in [*arguments, ROOT][:2])
    if not os.path.exists(new):
        raise Trouble(f"There is no file or folder {new}.")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "update.py")
        script.write_bytes(script_of(Path(new)))
        return wait([sys.executable, str(script), new, copy], ROOT, {})


def script_of(new: Path) -> bytes:
    """Return the script that updates, from a new copy of the course."""
    inner = "peft_lessons/data/update.py"  # its place in each copy, which classroom.release makes
    trouble = f"{new} is no copy of this course, or it is older than the command `update`."
    try:
        if new.is_dir():
            for top in (new, *sorted(new.iterdir())):
                if (top / inner).is_file():
                    return (top / inner).read_bytes()
        else:
            with zipfile.ZipFile(new) as archive:
                names = [name for name in archive.namelist() if name.endswith(inner)]
                if names:
                    return archive.read(min(names, key=len))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        # A damaged file can name a place before its own beginning: EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        trouble = f"{new} is no ZIP file, or it is not whole. Download the ZIP file again."
    raise Trouble(f"{trouble} Nothing was changed.")


def undo_unfinished_update() -> None:
    """Put back what was there before an update that was cut short."""
    script = ROOT / ".update" / "undo.py"
    if script.exists():
        wait([sys.executable, str(script), "--undo", str(ROOT)], ROOT, {})


def clean() -> None:
    """Remove caches and what was built; the environment stays."""
    for name in ("build", ".pytest_cache", ".ruff_cache", "notebooks/.ipynb_checkpoints"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for folder, inner, _ in os.walk(ROOT):
        if "__pycache__" in inner:
            shutil.rmtree(Path(folder, "__pycache__"), ignore_errors=True)
        inner[:] = [name for name in inner if name not in (".venv", ".git", "__pycache__")]


def wait(command: list[str], folder: Path, variables: dict[str, str]) -> int:
    """Run a program in a folder until it ends; return its status. Ctrl+C is for the program."""
    process = subprocess.Popen(command, cwd=folder, env=os.environ | variables)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def show_help() -> None:
    """Print every command with what it does."""
    print("python course.py COMMAND    (on Windows: py course.py COMMAND)\n")
    usages = {f"{name} {one.arguments}".strip(): one.purpose for name, one in COMMANDS.items()}
    width = max(map(len, usages)) + 2
    for usage, purpose in usages.items():
        print(f"  {usage.ljust(width)}{purpose}")
    print(
        "\nPYTHON=/path/to/python in the environment names the interpreter for .venv; otherwise it "
        f"is\nthe first of {', '.join(NAMES)} that fits."
    )


# ------------------------------------------------------------------ the environment


def ready() -> str:
    """Return the interpreter of .venv, which is set up first where it is missing or out of date."""
    if is_ready():
        return PYTHON
    if not os.access(ROOT, os.W_OK):
        raise Trouble(
            f"This folder cannot be written: {ROOT}. Copy the course to a folder of your own, and "
            "run the command there."
        )
    with one_at_a_time():
        if is_ready():  # by another start, for which this one has waited
            return PYTHON
        set_up(anew=last_set_up().get("root") != str(ROOT) or not probe([PYTHON]))
        # After the packages, so that a set-up cut short begins anew.
        READY.write_text(json.dumps(this_set_up()), encoding="utf-8")
    fetch(PYTHON)
    return PYTHON


def is_ready() -> bool:
    """Return whether .venv is whole, up to date and made here. It may be there and not run: the
    Python that it was made from can be gone."""
    return last_set_up() == this_set_up() and probe([PYTHON]) is not None


def last_set_up() -> dict:
    """Return what the last complete set-up wrote down, or {}."""
    try:
        stored = json.loads(READY.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def this_set_up() -> dict[str, str]:
    """Return where the environment must have been made, and of which packages, as a short text."""
    digest = hashlib.sha256()
    for file in ("pyproject.toml", *constraints()[1:]):
        digest.update((ROOT / file).read_bytes().replace(b"\r\n", b"\n"))
    return {"root": str(ROOT), "packages": EXTRA + digest.hexdigest()[:16]}


def constraints() -> list[str]:
    """Return pip's options for the exact versions, which automatic runs take."""
    file = ROOT / "constraints.txt"
    return ["-c", str(file)] if os.environ.get("CI") and file.exists() else []


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of the set-up in the block, and wait for it where another start holds it. The
    system gives it back with the process, however that ends."""
    with open(ROOT / ".venv.lock", "ab") as file:
        if not locked(file):
            print("Another start is setting up the course: waiting for it.", flush=True)
            while not locked(file):
                time.sleep(0.5)
        yield


def locked(file: BinaryIO) -> bool:
    """Try to lock a file; return False where another process holds it. True, too, on a file system
    without locks, as some of a network are."""
    try:
        if WINDOWS:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def set_up(anew: bool) -> None:
    """Make .venv, or bring it up to date, and install the course into it.

    Raises Trouble with one sentence that says what is missing."""
    uv = shutil.which("uv")
    if anew:
        interpreter, name = find_python(uv)
        print(f"Setting up .venv with {name}: once, 1 to 10 minutes.", flush=True)
        announce(EXTRA)
        shutil.rmtree(VENV, ignore_errors=True)
        if VENV.exists():
            raise Trouble(
                f"The folder {VENV} cannot be removed: is JupyterLab still running in it?"
            )
        if uv:
            attempt([uv, "venv", "--quiet", "--seed", "--python", interpreter, str(VENV)])
        else:
            attempt([interpreter, "-m", "venv", str(VENV)])
    else:
        print("Bringing .venv up to date.", flush=True)
    install(PYTHON, uv, EXTRA)


def here() -> None:
    """Install what a learner needs into the Python that runs this file: on a hub, in Colab, in a
    container."""
    print(f"Installing into {sys.executable}.")
    announce("")
    install(sys.executable, shutil.which("uv"), "")
    fetch(sys.executable)


def fetch(python: str) -> int:
    """Fetch the assistant with an interpreter that has the packages; return 0, or what failed.

    The program says itself what it did, or what is missing and how to try again."""
    print("The assistant of lessons 03, 12, 15, 16 and 17: 93 MB, unless it is here.", flush=True)
    return wait([python, "-m", "peft_lessons.data.assistant"], ROOT, OFFLINE)


def announce(extra: str) -> None:
    """Say how much will be downloaded. Raises Trouble where the disk has no room for it."""
    unsupported()
    backend = "cuda" if LINUX and nvidia() else "cpu"
    download, disk = SIZES[backend, extra]
    text = f"About {download:.1f} GB to download, {disk:.1f} GB on disk."
    if LINUX and backend == "cpu":
        most, full = SIZES["cuda", extra]
        text += f" (Up to {most:.1f} and {full:.1f} GB if PyTorch's index cannot be reached.)"
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < disk and not VENV.exists():
        raise Trouble(
            f"The disk is too full: the course needs {disk:.1f} GB here, and {free:.1f} GB are "
            "free."
        )
    print(f"PyTorch, JupyterLab and the rest. {text}", flush=True)


def install(python: str, uv: str | None, extra: str) -> None:
    """Install the course and what it needs for an interpreter, and what can be missing."""
    uv = install_course(python, uv, extra)
    install_server(python, uv)


def install_server(python: str, uv: str | None) -> None:
    """Install the server of lesson 17, or say that it is missing: only a ready-made package will
    do, and not every system has one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = tomllib.loads(text)["project"]["optional-dependencies"]["serve"]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    command = [uv, "pip", "install", "--python", python] if uv else pip
    what = ["--only-binary", ":all:"]
    if failure := attempt([*command, *constraints(), *what, *packages], must=False):
        names = [re.split("[<>=;]", package)[0] for package in packages]
        print(
            f"The server of lesson 17 is not installed ({failure}). The lesson shows stored "
            "results instead, and all else works without. To try again:\n"
            + subprocess.list2cmdline([*pip, *what, *names]),
            flush=True,
        )


def install_course(python: str, uv: str | None, extra: str) -> str | None:
    """Install the course and what it needs for an interpreter; return uv where it is there.

    PyTorch's builds without CUDA lie in an index of their own, which uv knows by name. Where that
    index, or uv, cannot be reached, pip takes the build of the ordinary index."""
    target = ["-e", f".{extra}", *constraints()]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    if LINUX:
        if not uv and not attempt([*pip, "--quiet", "uv"], must=False):
            uv = shutil.which("uv", path=os.path.dirname(python))  # elsewhere for a user install
        choice = ["--torch-backend", "auto" if nvidia() else "cpu"]
        why = "pip cannot install uv"
        if uv:
            failure = attempt([uv, "pip", "install", "--python", python, *choice, *target], False)
            if not failure:
                return uv
            why = f"uv cannot install from PyTorch's own index ({failure})"
        print(f"{why}: pip takes the ordinary build.", flush=True)
    elif uv:
        attempt([uv, "pip", "install", "--python", python, *target])
        return uv
    attempt(pip + target)
    return uv


def attempt(command: list[str], must: bool = True) -> str:
    """Run one step of the set-up; return "", or its last words where it failed.

    Raise OSError for a full disk. For any other failure raise Trouble with its likely cause if
    `must` is true."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    environment.pop("VIRTUAL_ENV", None)
    if not must:
        environment["UV_HTTP_RETRIES"] = "1"  # there is another way, and nobody likes to wait
    started, on_terminal = time.time(), sys.stdout.isatty()
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if on_terminal:
                    print(f"\r{time.time() - started:4.0f} s ", end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        file.seek(0)
        output = file.read().decode("utf-8", "replace")
    if on_terminal:
        print("\r       \r", end="", flush=True)
    if process.returncode == 0:
        return ""
    if re.search(r"No space left|not enough space|disk quota|os error 112", output, re.I):
        raise OSError(errno.ENOSPC, "")
    if must:
        raise Trouble(cause(output))
    return (output.strip().splitlines() or ["it gave no reason"])[-1].strip()


def cause(output: str) -> str:
    """Return what a failed installation most likely means, as a sentence, and its last words."""
    last = "\n".join(output.strip().splitlines()[-5:])
    network = (
        r"connect|failed to resolve|name resolution|dns|timed out|unreachable|proxy|ssl|certificate"
        r"|from versions: none"
    )
    if re.search(network, output, re.I):
        return f"The packages cannot be downloaded: is there a network?\n\n{last}"
    return f"The packages cannot be installed. The installer's last words:\n\n{last}"


def nvidia() -> bool:
    """Return whether the driver of an NVIDIA GPU answers."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except OSError:
        return False


# ------------------------------------------------------------------ the interpreter

PROBE = """
import json, platform, sys, sysconfig
try:
    import ensurepip, venv
    whole = True
except ImportError:
    whole = False
# Not that of a virtual environment: .venv itself may be active, and about to be removed.
executable = getattr(sys, "_base_executable", None) or sys.executable
print(json.dumps([list(sys.version_info[:3]), sysconfig.get_platform(), sys.maxsize > 2**32, whole,
                  executable]))
"""


def find_python(uv: str | None) -> tuple[str, str]:
    """Return (the interpreter for .venv, what to call it).

    Raise Trouble if no interpreter fits, naming each one found and the reason."""
    named = os.environ.get("PYTHON")
    refused = set()
    for command in [named] if named else [*NAMES, sys.executable]:
        answer = probe([command] if command in (named, sys.executable) else command.split())
        if answer is None and named:
            raise Trouble(f"PYTHON={named}, and no Python runs by that name.")
        if answer is None:
            continue
        version, system, wide, has_venv, executable = answer
        text = ".".join(map(str, version))
        if tuple(version[:2]) < OLDEST or (not named and tuple(version[:2]) > NEWEST):
            refused.add(text)
        elif not wide or (WINDOWS and "arm" in system):
            refused.add(f"{text} for {system}")
        elif sys.platform == "darwin" and system.endswith("x86_64"):
            refused.add(f"{text} built for Intel")
        elif not has_venv and not uv:
            refused.add(f"{text} without venv (on Debian and Ubuntu: python3-venv)")
        else:
            return executable, f"Python {text}"
    if uv and not named:
        return "3.13", "Python 3.13, which uv downloads where it is missing"
    owner = "PYTHON names" if named else "this machine has"
    raise Trouble(
        "The course needs Python 3.11, 3.12, 3.13 or 3.14, and "
        f"{f'{owner} ' + ', '.join(sorted(refused)) if refused else 'found none'}. Install one "
        "from your system's packages or from python.org, or name it: PYTHON=/path/to/python."
    )


def probe(interpreter: list[str]) -> list | None:
    """Return what an interpreter says of itself, or None where it does not run."""
    try:
        output = subprocess.check_output([*interpreter, "-c", PROBE], stderr=subprocess.DEVNULL)
        return json.loads(output.decode().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None


def unsupported() -> None:
    """Raise Trouble on a system for which PyTorch is not made."""
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        # An old build of Python calls every newer system 10.16.
        if version not in ("", "10.16") and int(version.split(".")[0]) < 14:
            raise Trouble(f"The course needs macOS 14 or newer, and this is macOS {version}.")
        chip = subprocess.check_output(["uname", "-v"]).decode()
        if "ARM64" not in chip:
            raise Trouble(
                "The course does not run on Macs with an Intel processor: PyPI lacks PyTorch."
            )
    if WINDOWS and "ARM" in os.environ.get("PROCESSOR_IDENTIFIER", ""):
        raise Trouble("The course does not run on Windows on ARM: PyPI lacks PyTorch.")


# ------------------------------------------------------------------ the beginning


def main(arguments: list[str]) -> int:
    """Run the command that is given; return its exit status."""
    command, *rest = arguments or ["help"]
    if command in ("help", "-h", "--help"):
        show_help()
        return 0
    undo_unfinished_update()
    if command in ("lab", "chat", "update"):
        return {"lab": lab, "chat": chat, "update": update}[command](rest)
    if command == "assistant":
        return assistant()
    if command in ("setup", "here", "clean"):
        {"setup": ready, "here": here, "clean": clean}[command]()
        return 0
    if command in COMMANDS:
        return run(command, rest)
    near = difflib.get_close_matches(command, COMMANDS, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise Trouble(f"There is no command {command}.{hint} `python course.py help` lists them.")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Trouble as trouble:
        sys.exit(str(trouble))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit("The disk is full: free some space and run the command again.")
        sys.exit(f"{error.filename or ROOT}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped: run the same command again.\n")
        sys.exit(130)
