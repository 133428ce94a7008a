"""Start kernels in forks of a process that has imported the course, on Linux.

    python tools/warm_kernel.py SOCKET                  the process, until its input ends
    python tools/warm_kernel.py SOCKET -f CONNECTION    one kernel, as Jupyter starts it

Importing takes longer than a solved lesson computes. For sixteen lessons as shipped and sixteen
solved the forks save 70 s on two cores, and 130 s of processor time (with Python 3.11 and 3.13).
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

# Nothing here may start a thread, as pandas does: a fork has only the thread that forks.
PRELOADED = ("peft_lessons", "peft", "trl", "ipywidgets", "ipykernel.kernelapp")
SECONDS = 20  # that the process may take to begin
KERNEL = "PEFT_LESSONS_KERNEL"  # the variable that names the kernel of whatever runs lessons


def name() -> str:
    """Return the name of the kernel in which to run a lesson: python3 where no process forks."""
    return os.environ.get(KERNEL, "python3")


@contextmanager
def started(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Keep the process running, with files in `folder`; all that starts within finds its kernels
    by name(). It ends with whoever started it, too. Elsewhere than on Linux do nothing."""
    if sys.platform != "linux":
        yield
        return
    place = folder / "kernels" / "warm"
    place.mkdir(parents=True)
    command = [sys.executable, __file__, str(folder / "socket")]
    quiet = "--IPKernelApp.log_level=ERROR"  # it warns of TCP on the loopback
    spec = {"argv": [*command, "-f", "{connection_file}", quiet], "language": "python"}
    spec["display_name"] = "Python 3 (ipykernel)"
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    found = {"JUPYTER_PATH": str(folder), KERNEL: "warm"}
    # The end of its input ends the process.
    with subprocess.Popen(command, env=environment, **pipes), patch.dict(os.environ, found):
        yield


def serve(path: str) -> None:
    """Import the course, then fork a kernel for each connection."""
    sys.path[0] = ""  # as in every kernel, not the folder of this file
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()  # whoever asks from now on waits, and is told at once if an import fails
        for module in PRELOADED:
            __import__(module)
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [])[0]):
            connection, _ = ready[0].accept()
            if os.fork() == 0:
                server.close()
                begin(connection)
            connection.close()


def reap() -> None:
    """Wait for the kernels that have ended, so that their processor time is counted."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def begin(connection: socket.socket) -> None:
    """Become the kernel that a connection asks for, and end with it."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = connection.makefile("r", encoding="utf-8").readline()
    arguments, folder, environment = json.loads(asked)
    connection.sendall(f"{os.getpid()}\n".encode())
    environment.pop("JPY_PARENT_PID", None)  # the kernel would look for another parent, and end
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["ipykernel_launcher", *arguments]

    def end() -> None:
        connection.recv(1)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    try:
        IPKernelApp.launch_instance(arguments)
    finally:
        os._exit(0)


def ask(path: str, arguments: Sequence[str]) -> None:
    """Ask for a kernel and wait until it ends; hand signals on to it."""
    end = time.monotonic() + SECONDS
    with socket.socket(socket.AF_UNIX) as connection:
        while connection.connect_ex(path):
            if time.monotonic() > end:
                raise TimeoutError(f"there is no process at {path}")
            time.sleep(0.1)
        once = list(dict.fromkeys(arguments))  # nbclient asks for a quiet kernel, too
        asked = json.dumps([once, os.getcwd(), dict(os.environ)])
        answer = ""
        with suppress(ConnectionError):
            connection.sendall(f"{asked}\n".encode())
            answer = connection.makefile("r").readline()
        if not answer:
            raise RuntimeError("the process that imports the course has ended")
        kernel = int(answer)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(kernel, number))
        with suppress(OSError):
            connection.recv(1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
