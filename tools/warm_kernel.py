"""Start kernels in forks of a process that has imported the course: a kernel for each lesson would
import it again, and that takes as long as the shorter lessons compute.

    python tools/warm_kernel.py SOCKET                  the process, until its input ends
    python tools/warm_kernel.py SOCKET -f CONNECTION    one kernel, as Jupyter starts it
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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PRELOADED = ("peft_lessons", "peft", "trl", "matplotlib.pyplot", "pandas", "ipywidgets")
PRELOADED += ("ipykernel.kernelapp", "ipykernel.ipkernel")
SECONDS = 120  # that the process may take to begin


def start(folder: Path) -> subprocess.Popen:
    """Start the process, and return it; with JUPYTER_PATH set to `folder` each kernel "warm" is one
    of its forks. It ends when its input is closed, and so with whoever started it."""
    place = folder / "kernels" / "warm"
    place.mkdir(parents=True)
    command = [sys.executable, __file__, str(folder / "socket")]
    spec = {"argv": [*command, "-f", "{connection_file}"], "language": "python"}
    spec["display_name"] = "Python 3 (ipykernel)"
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def serve(path: str) -> None:
    """Import the course, then fork a kernel for each connection."""
    sys.path[0] = ""  # as in every kernel, not the folder of this file
    for name in PRELOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [])[0]):
            connection, _ = ready[0].accept()
            if os.fork() == 0:
                server.close()
                begin(connection)
            connection.close()


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
        asked = json.dumps([list(arguments), os.getcwd(), dict(os.environ)])
        connection.sendall(f"{asked}\n".encode())
        kernel = int(connection.makefile("r").readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(kernel, number))
        with suppress(OSError):
            connection.recv(1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
