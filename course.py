# -*- coding: utf-8 -*-
"""Run the course: python course.py COMMAND

The first command sets up an environment in the folder .venv. Packages go nowhere else, except that
`here` installs them into the running Python and pip and uv keep their usual caches. This file needs
nothing but Python itself. An outdated Python can read its syntax and say what is missing.
"""

from __future__ import print_function

import contextlib
import difflib
import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

ROOT = os.path.dirname(os.path.realpath(__file__))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "ready")
WINDOWS = os.name == "nt"
LINUX = sys.platform.startswith("linux")
BIN = os.path.join(VENV, "Scripts" if WINDOWS else "bin")
PYTHON = os.path.join(BIN, "python.exe" if WINDOWS else "python")

OLDEST, NEWEST = (3, 11), (3, 14)
# In the order of trust: the suite runs on the first and the third of them.
NAMES = ["python3.13", "python3.12", "python3.11", "python3.14", "python3", "python", "py -3"]

# The students' copy holds lessons, package and data; what needs more is not offered there.
WHOLE = os.path.isdir(os.path.join(ROOT, "tools"))
EXTRA = "[dev]" if WHOLE else ""

# Two kernels on two cores: more than one thread each is several times slower.
OFFLINE = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# As measured, in GB, packages and assistant: (to download, on disk).
SIZES = {
    ("cpu", "[dev]"): (0.6, 2.5),
    ("cpu", ""): (0.5, 2.1),
    ("cuda", "[dev]"): (3.2, 6.5),
    ("cuda", ""): (3.1, 6.1),
}


class Trouble(Exception):
    """Something that the reader can mend, told in one sentence."""


# ------------------------------------------------------------------ commands

# {command: (arguments, what it does)} of the commands that are functions below.
OWN = {
    "lab": ("[LESSON]", "open lesson 00, or the one named, in JupyterLab"),
    "setup": ("", "set up .venv, where it is missing or out of date"),
    "here": ("", "install into this Python instead: for hubs, Colab, containers"),
    "assistant": ("", "fetch the assistant, 93 MB to download and 260 MiB on disk"),
    "update": ("NEW [COPY]", "bring this copy, or COPY, up to date from NEW, a ZIP or a folder"),
    "clean": ("", "remove caches and what was built; .venv stays"),
    "help": ("", "show this list"),
}
# {command: (arguments, what it does, the modules or scripts that it runs)}; {} is where the given
# arguments go, at the end where it is left out.
COMMANDS = {
    "test": (
        "[OPTIONS]",
        "run all tests, and every lesson as shipped and solved: about ten minutes",
        ["-m pytest -q -n 2 --nbval-lax {} tests classroom notebooks"],
    ),
    "outputs": (
        "[LESSON ...]",
        "execute lessons, all or 02 03, and store clean outputs",
        ["-m tools.notebooks outputs"],
    ),
    "solved": (
        "[LESSON ...]",
        "run the exercises of lessons with their solutions, and count the right checks",
        ["-m tools.notebooks solved"],
    ),
    "minutes": (
        "[LESSON ...]",
        "compare the minutes of lessons with their cards; --write fills in the tables",
        ["-m tools.minutes"],
    ),
    "release": (
        "[FOLDER]",
        "write the students' copy, without solutions, to build/peft-lessons",
        ["-m classroom.release"],
    ),
    "grade": (
        "FOLDER [OPTIONS]",
        "mark what students handed in",
        ["-m classroom.grade"],
    ),
    "gradescope": (
        "LESSON [OPTIONS]",
        "write an autograder for Gradescope to build/",
        ["-m classroom.gradescope"],
    ),
    "guide": ("", "write docs/wrong_answers.md, what the checks recognise", ["-m tools.guide"]),
    "site": (
        "[FOLDER] [OPTIONS]",
        "build the course as web pages, to build/site",
        ["-m tools.site"],
    ),
    "results": (
        "[OPTIONS]",
        "run what the measured tables lack; many hours if they are empty",
        ["benchmarks/*_study.py", "benchmarks/dora_analysis.py", "benchmarks/qlora_[abl]*.py"],
    ),
    "costs": (
        "",
        "measure times and bytes anew, on an idle machine: half an hour",
        ["benchmarks/costs.py", "benchmarks/choosing_costs.py", "benchmarks/qlora_cost.py"],
    ),
    "browser": (
        "[OPTIONS]",
        "try all lessons, and the site, in a real browser (needs Chromium)",
        ["-m pytest -q -rs -m browser {} tests/notebooks"],
    ),
    "mutants": (
        "[WORD ...]",
        "apply one-line faults to a copy, and see which test notices each: 10 minutes",
        ["-m tools.mutants"],
    ),
    "lint": ("", "check the style of all Python code", ["-m ruff check ."]),
    "constraints": (
        "",
        "write the newest versions that fit to constraints.txt",
        [
            "-m uv pip compile --quiet --universal --upgrade --no-header --no-annotate"
            " --python-version 3.11 --extra dev --output-file constraints.txt pyproject.toml"
        ],
    ),
}


def lines(command, given):
    """Return the command lines, without the interpreter, that a command runs in turn."""
    found = []
    for line in COMMANDS[command][2]:
        head, _, tail = line.partition(" {}")
        parts = head.split()
        scripts = [parts]
        if "*" in head:
            scripts = [
                [os.path.relpath(path, ROOT)]
                for path in sorted(glob.glob(os.path.join(glob.escape(ROOT), head)))
            ]
        found += [script + given + tail.split() for script in scripts]
    return found


def run(command, given):
    """Run a command of the table in the environment; return its exit status."""
    if command == "grade" and not [g for g in given if os.path.isdir(os.path.join(ROOT, g))]:
        named = [g for g in given if not g.startswith("-") and not g.isdigit()]
        raise Trouble(
            "There is no folder {}.".format(named[0])
            if named
            else "Which folder? python course.py grade FOLDER"
        )
    python = ready()
    for line in lines(command, given):
        if len(COMMANDS[command][2]) > 1:
            print(line[0], flush=True)
        status = wait([python] + line, ROOT, OFFLINE)
        if status:
            return status
    return 0


def lab(given):
    """Open a lesson in JupyterLab, 00 unless another is named; return JupyterLab's status."""
    folder = os.path.join(ROOT, "notebooks")
    lessons = sorted(name for name in os.listdir(folder) if re.match(r"\d\d_.*\.ipynb$", name))
    wanted = "00"
    if given and re.match(r"\d", given[0]):
        wanted, given = given[0].zfill(2), given[1:]
    found = [name for name in lessons if name.startswith(wanted)]
    if not found:
        raise Trouble(
            "There is no lesson {}: they go from 00 to {}.".format(wanted, lessons[-1][:2])
        )
    python = ready()
    machine = os.path.join(ROOT, "peft_lessons", "machine.py")
    cores = subprocess.check_output([python, machine]).decode().strip()
    # torch counts the machine's cores, of which a container or a hub may allow few.
    limited = cores != str(os.cpu_count()) and "OMP_NUM_THREADS" not in os.environ
    threads = {"OMP_NUM_THREADS": cores} if limited else {}
    # In a container everybody is root, whom JupyterLab refuses unless told.
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return wait([python, "-m", "jupyterlab"] + root + given + [found[0]], folder, threads)


def assistant():
    """Fetch the assistant where it is missing or damaged; return the status of the attempt.

    A Python into which `here` or conda installed the course does it itself."""
    import importlib.util  # Python 2 has none, and must be able to say that it is too old

    packages = ("gguf", "tokenizers", "transformers")
    own = not os.path.exists(STAMP) and all(map(importlib.util.find_spec, packages))
    return fetch(sys.executable if own else ready())


def update(given):
    """Update this copy, or the one that is named second, from a new one; return the status.

    The new copy's own script does it, so that a correction of the script counts at once."""
    if len(given) not in (1, 2):
        raise Trouble("Which copy is new? python course.py update ZIP_OR_FOLDER")
    new, copy = [os.path.abspath(os.path.expanduser(path)) for path in (given + [ROOT])[:2]]
    if not os.path.exists(new):
        raise Trouble("There is no file or folder {}.".format(new))
    python = sys.executable if sys.version_info[:2] >= OLDEST else ready()
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "update.py")
        with open(script, "wb") as file:
            file.write(script_of(new))
        return wait([python, script, new, copy], ROOT, {})


def script_of(new):
    """Return the script that updates, from a new copy of the course."""
    inner = "peft_lessons/data/update.py"
    told = "{} is no copy of this course, or it is older than the command `update`."
    try:
        if os.path.isdir(new):
            tops = [new] + sorted(glob.glob(os.path.join(glob.escape(new), "*")))
            for path in [os.path.join(top, *inner.split("/")) for top in tops]:
                if os.path.isfile(path):
                    with open(path, "rb") as file:
                        return file.read()
        else:
            with zipfile.ZipFile(new) as archive:
                found = [name for name in archive.namelist() if name.endswith(inner)]
                if found:
                    return archive.read(min(found, key=len))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        # A damaged file can name a place before its own beginning: EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        told = "{} is no ZIP file, or it is not whole. Download the ZIP file again."
    raise Trouble(told.format(new) + " Nothing was changed.")


def unfinished():
    """Put back what was there before an update that was cut short."""
    script = os.path.join(ROOT, ".update", "undo.py")
    if os.path.exists(script) and sys.version_info[:2] >= OLDEST:
        wait([sys.executable, script, "--undo", ROOT], ROOT, {})


def clean():
    """Remove caches and what was built; the environment stays."""
    for name in ("build", ".pytest_cache", ".ruff_cache", "notebooks/.ipynb_checkpoints"):
        shutil.rmtree(os.path.join(ROOT, name), ignore_errors=True)
    for folder, inner, _ in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in (".venv", ".git")]
        if "__pycache__" in inner:
            inner.remove("__pycache__")
            shutil.rmtree(os.path.join(folder, "__pycache__"), ignore_errors=True)


def wait(command, folder, variables):
    """Run a program in a folder until it ends; return its status. Ctrl+C is for the program."""
    process = subprocess.Popen(command, cwd=folder, env=dict(os.environ, **variables))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def show_help():
    """Print every command with what it does."""
    print("python course.py COMMAND    (on Windows: py course.py COMMAND)\n")
    tables = (OWN, COMMANDS) if WHOLE else (OWN,)
    rows = [("{} {}".format(c, r[0]).strip(), r[1]) for table in tables for c, r in table.items()]
    width = max(len(command) for command, _ in rows) + 2
    for command, told in rows:
        print("  {}{}".format(command.ljust(width), told))
    print(
        "\nPYTHON=/path/to/python in the environment names the interpreter for .venv; otherwise it "
        "is\nthe first of {} that fits.".format(", ".join(NAMES))
    )


# ------------------------------------------------------------------ the environment


def ready():
    """Return the interpreter of .venv, which is set up first where it is missing or out of date."""
    if is_ready():
        return PYTHON
    if not os.access(ROOT, os.W_OK):
        raise Trouble(
            "This folder cannot be written: {}. Copy the course to a folder of your own, and run "
            "the command there.".format(ROOT)
        )
    with one_at_a_time():
        if is_ready():  # by another start, for which this one has waited
            return PYTHON
        set_up(read_stamp().get("root") != ROOT or not probe([PYTHON]))
        # After the packages, so that a set-up cut short begins anew.
        with open(STAMP, "w", encoding="utf-8") as stamp:
            json.dump({"root": ROOT, "packages": fingerprint()}, stamp)
    fetch(PYTHON)
    return PYTHON


def is_ready():
    """Return whether .venv is whole, up to date and made here. It may be there and not run: the
    Python that it was made from can be gone."""
    wanted = {"root": ROOT, "packages": fingerprint()}
    return read_stamp() == wanted and probe([PYTHON]) is not None


@contextlib.contextmanager
def one_at_a_time():
    """Hold the lock of the set-up in the block, and wait for it where another start holds it. The
    system gives it back with the process, however that ends."""
    with open(os.path.join(ROOT, ".venv.lock"), "ab") as file:
        told = False
        while not locked(file):
            if not told:
                print("Another start is setting up the course: waiting for it.", flush=True)
            told = True
            time.sleep(0.5)
        yield


def locked(file):
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
    except (IOError, OSError) as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def read_stamp():
    """Return what the last complete set-up wrote down, or {}."""
    try:
        with open(STAMP, encoding="utf-8") as stamp:
            found = json.load(stamp)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def constraints():
    """Return pip's options for the exact versions, which automatic runs take."""
    file = os.path.join(ROOT, "constraints.txt")
    return ["-c", file] if os.environ.get("CI") and os.path.exists(file) else []


def fingerprint():
    """Return what the environment depends on, as a short text."""
    digest = hashlib.sha256()
    for name in ["pyproject.toml"] + [os.path.basename(c) for c in constraints()[1:]]:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read().replace(b"\r\n", b"\n"))
    return EXTRA + digest.hexdigest()[:16]


def set_up(anew):
    """Make .venv, or bring it up to date, and install the course into it.

    Raises Trouble with one sentence that says what is missing."""
    uv = shutil.which("uv")
    if anew:
        interpreter, found = find_python(uv)
        print("Setting up .venv with {}: once, 1 to 10 minutes.".format(found), flush=True)
        announce(EXTRA)
        shutil.rmtree(VENV, ignore_errors=True)
        if os.path.exists(VENV):
            raise Trouble(
                "The folder {} cannot be removed: is JupyterLab still running in it?".format(VENV)
            )
        if uv:
            attempt([uv, "venv", "--quiet", "--seed", "--python", interpreter, VENV])
        else:
            attempt([interpreter, "-m", "venv", VENV])
    else:
        print("Bringing .venv up to date.", flush=True)
    install(PYTHON, uv, EXTRA)


def here():
    """Install what a learner needs into the Python that runs this file: on a hub, in Colab, in a
    container."""
    if sys.version_info[:2] < OLDEST:
        raise Trouble("This is Python {}.{}, and the course needs 3.11.".format(*sys.version_info))
    print("Installing into {}.".format(sys.executable))
    announce("")
    install(sys.executable, shutil.which("uv"), "")
    fetch(sys.executable)


def fetch(python):
    """Fetch the assistant with an interpreter that has the packages; return 0, or what failed.

    The program says itself what it did, or what is missing and how to try again."""
    print("The assistant (lessons 03, 12, 15): 93 MB to download where it is missing.", flush=True)
    return wait([python, "-m", "peft_lessons.data.assistant"], ROOT, OFFLINE)


def announce(extra):
    """Say how much will be downloaded. Raises Trouble where the disk has no room for it."""
    unsupported()
    backend = "cuda" if LINUX and nvidia() else "cpu"
    download, disk = SIZES[backend, extra]
    text = "About {:.1f} GB to download, {:.1f} GB on disk.".format(download, disk)
    if LINUX and backend == "cpu":
        text += " (Up to {:.1f} and {:.1f} GB if PyTorch's index cannot be reached.)".format(
            *SIZES["cuda", extra]
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < disk and not os.path.exists(VENV):
        raise Trouble(
            "The disk is too full: the course needs {:.1f} GB here, and {:.1f} GB are free.".format(
                disk, free
            )
        )
    print("PyTorch, JupyterLab and the rest. " + text, flush=True)


def install(python, uv, extra):
    """Install the course and what it needs for an interpreter.

    PyTorch's builds without CUDA lie in an index of their own, which uv knows by name. Where that
    index, or uv, cannot be reached, pip takes the build of the ordinary index."""
    target = ["-e", "." + extra] + constraints()
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    if LINUX:
        if not uv and not attempt(pip + ["--quiet", "uv"], False):
            uv = shutil.which("uv", path=os.path.dirname(python))  # elsewhere for a user install
        choice = ["--torch-backend", "auto" if nvidia() else "cpu"]
        why = "pip cannot install uv"
        if uv:
            failed = attempt([uv, "pip", "install", "--python", python] + choice + target, False)
            if not failed:
                return
            why = "uv cannot install from PyTorch's own index ({})".format(failed)
        print(why + ": pip takes the ordinary build.", flush=True)
    elif uv:
        attempt([uv, "pip", "install", "--python", python] + target)
        return
    attempt(pip + target)


def attempt(command, must=True):
    """Run one step of the set-up; return "", or its last words where it failed.

    Raise OSError for a full disk. For any other failure raise Trouble with its likely cause if
    `must` is true."""
    environment = dict(os.environ, PYTHONIOENCODING="utf-8")
    environment.pop("VIRTUAL_ENV", None)
    if not must:
        environment["UV_HTTP_RETRIES"] = "1"  # there is another way, and nobody likes to wait
    started, shown = time.time(), sys.stdout.isatty()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if shown:
                    print("\r{:4.0f} s ".format(time.time() - started), end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if shown:
        print("\r       \r", end="", flush=True)
    if process.returncode == 0:
        return ""
    if re.search(r"No space left|not enough space|disk quota|os error 112", said, re.I):
        raise OSError(errno.ENOSPC, "")
    if must:
        raise Trouble(cause(said))
    return (said.strip().splitlines() or ["it gave no reason"])[-1].strip()


def cause(said):
    """Return what a failed installation most likely means, as a sentence, and its last words."""
    last = "\n".join(said.strip().splitlines()[-5:])
    network = (
        r"connect|failed to resolve|name resolution|dns|timed out|unreachable|proxy|ssl|certificate"
        r"|from versions: none"
    )
    if re.search(network, said, re.I):
        return "The packages cannot be downloaded: is there a network?\n\n" + last
    return "The packages cannot be installed. The installer's last words:\n\n" + last


def nvidia():
    """Return whether the driver of an NVIDIA GPU answers."""
    try:
        with open(os.devnull, "wb") as nowhere:
            return subprocess.call(["nvidia-smi"], stdout=nowhere, stderr=nowhere) == 0
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


def find_python(uv):
    """Return (the interpreter for .venv, what to call it).

    Raise Trouble if no interpreter fits, naming each one found and the reason."""
    named = os.environ.get("PYTHON")
    refused = []
    for command in [named] if named else NAMES + [sys.executable]:
        parts = [command] if command in (named, sys.executable) else command.split()
        found = probe(parts)
        if found is None and named:
            raise Trouble("PYTHON={}, and no Python runs by that name.".format(named))
        if found is None:
            continue
        version, system, wide, whole, executable = found
        text = ".".join(str(n) for n in version)
        if not OLDEST <= tuple(version[:2]) or (not named and tuple(version[:2]) > NEWEST):
            refused.append(text)
        elif not wide or (WINDOWS and "arm" in system):
            refused.append("{} for {}".format(text, system))
        elif sys.platform == "darwin" and system.endswith("x86_64"):
            refused.append("{} built for Intel".format(text))
        elif not whole and not uv:
            refused.append("{} without venv (on Debian and Ubuntu: python3-venv)".format(text))
        else:
            return executable, "Python " + text
    if uv and not named:
        return "3.13", "Python 3.13, which uv downloads where it is missing"
    raise Trouble(
        "The course needs Python 3.11, 3.12, 3.13 or 3.14, and {}. Install one from your system's "
        "packages or from python.org, or name it: PYTHON=/path/to/python.".format(
            ("PYTHON names " if named else "this machine has ") + ", ".join(sorted(set(refused)))
            if refused
            else "found none"
        )
    )


def probe(parts):
    """Return what an interpreter says of itself, or None where it does not run."""
    try:
        with open(os.devnull, "wb") as nowhere:
            said = subprocess.check_output(parts + ["-c", PROBE], stderr=nowhere)
        return json.loads(said.decode().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None


def unsupported():
    """Raise Trouble on a system for which PyTorch is not made."""
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        # An old build of Python calls every newer system 10.16.
        if version not in ("", "10.16") and int(version.split(".")[0]) < 14:
            raise Trouble(
                "The course needs macOS 14 or newer, and this is macOS {}.".format(version)
            )
        chip = subprocess.check_output(["uname", "-v"]).decode()
        if "ARM64" not in chip:
            raise Trouble(
                "The course does not run on Macs with an Intel processor: PyPI lacks PyTorch."
            )
    if WINDOWS and "ARM" in os.environ.get("PROCESSOR_IDENTIFIER", ""):
        raise Trouble("The course does not run on Windows on ARM: PyPI lacks PyTorch.")


# ------------------------------------------------------------------ the beginning


def main(given):
    """Run the command that is given; return its exit status."""
    command, given = (given[0], given[1:]) if given else ("help", [])
    if command in ("help", "-h", "--help"):
        show_help()
        return 0
    unfinished()
    if command == "lab":
        return lab(given)
    if command == "update":
        return update(given)
    if command == "assistant":
        return assistant()
    if command in ("setup", "here", "clean"):
        {"setup": ready, "here": here, "clean": clean}[command]()
        return 0
    if WHOLE and command in COMMANDS:
        return run(command, given)
    known = list(OWN) + (list(COMMANDS) if WHOLE else [])
    near = difflib.get_close_matches(command, known, 1)
    raise Trouble(
        "There is no command {}.{} `python course.py help` lists them.".format(
            command, " Did you mean {}?".format(near[0]) if near else ""
        )
    )


if __name__ == "__main__":
    if sys.version_info < (3, 6):
        sys.exit(
            "This is Python {}.{}, and the course needs 3.11 or newer: try python3".format(
                *sys.version_info[:2]
            )
        )
    try:
        sys.exit(main(sys.argv[1:]))
    except Trouble as trouble:
        sys.exit(str(trouble))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit("The disk is full: free some space and run the command again.")
        sys.exit("{}: {}".format(error.filename or ROOT, error.strerror or error))
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped: run the same command again.\n")
        sys.exit(130)
