"""Start kernels in forks of a process that has imported the course, on Linux.

    python tools/warm_kernel.py NUMBER                  the process, until its input ends; NUMBER is
                                                        the descriptor of its listening socket
    python tools/warm_kernel.py SOCKET -f CONNECTION    one kernel, as Jupyter starts it

Importing takes longer than a solved lesson computes. For sixteen lessons as shipped and sixteen
solved the forks save 70 s on two cores, and 130 s of processor time (with Python 3.11 and 3.13).
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

# A fork has only the thread that forks, so none of these may start another, as pandas does.
PRELOADED = ("peft_lessons", "peft", "trl", "ipywidgets", "ipykernel.kernelapp")
LONGEST = 107  # bytes of a socket's path, on Linux
KERNEL = "PEFT_LESSONS_KERNEL"  # the variable that names the kernel of whatever runs lessons


def name() -> str:
    """Return the name of the kernel in which to run a lesson: python3 where no process forks."""
    return os.environ.get(KERNEL, "python3")


@contextmanager
def started(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Keep the process running, with files in `folder`; all that starts within finds its kernels
    by name(). The process ends with whoever started it, too. Do nothing where the system is not
    Linux, the path is too long for a socket, or a process computes with more than one thread: a
    fork would wait for ever for those that it lacks."""
    path = str(folder / "socket")
    alone = environment.get("OMP_NUM_THREADS") == environment.get("MKL_NUM_THREADS") == "1"
    if sys.platform != "linux" or len(os.fsencode(path)) > LONGEST or not alone:
        yield
        return
    place = folder / "kernels" / "warm"
    place.mkdir(parents=True)
    quiet = "--IPKernelApp.log_level=ERROR"  # it warns of TCP on the loopback
    command = [sys.executable, __file__, path, "-f", "{connection_file}", quiet]
    spec = {"argv": command, "language": "python", "display_name": "Python 3 (ipykernel)"}
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()  # whoever asks from now on waits, and is told if an import fails
        process = subprocess.Popen(
            [sys.executable, __file__, str(server.fileno())],
            env=environment,
            pass_fds=[server.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
    # The end of its input ends the process.
    with process, patch.dict(os.environ, {"JUPYTER_PATH": str(folder), KERNEL: "warm"}):
        yield


def serve(number: int) -> None:
    """Import the course, then fork a kernel for each connection."""
    sys.path[0] = ""  # as in every kernel, not the folder of this file
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for whoever started it
    with socket.socket(fileno=number) as server:
        for module in PRELOADED:
            __import__(module)
        gc.freeze()  # what was imported stays, and no kernel looks for garbage in it
        signal.signal(signal.SIGCHLD, lambda *_: reap(os.WNOHANG))
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [])[0]):
            connection, _ = ready[0].accept()
            if os.fork() == 0:
                server.close()
                with suppress(ConnectionError):  # whoever asked is gone
                    begin(connection)
                os._exit(0)
            connection.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reap(0)


def reap(options: int) -> None:
    """Wait for the kernels that have ended, with options 0 for all, so that their processor time is
    counted."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def begin(connection: socket.socket) -> None:
    """Become the kernel that a connection asks for, and end with it."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked = connection.makefile("r", encoding="utf-8").readline()
    if not asked:
        return
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
        os._exit(0)  # without waiting for threads of the lesson's


def ask(path: str, arguments: Sequence[str]) -> None:
    """Ask for a kernel and wait until it ends, or whoever wants it; hand signals on to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as connection:
        once = list(dict.fromkeys(arguments))  # nbclient asks for a quiet kernel, too
        asked = json.dumps([once, os.getcwd(), dict(os.environ)])
        answer = ""
        with suppress(ConnectionError):
            connection.connect(path)
            connection.sendall(f"{asked}\n".encode())
            answer = connection.makefile("r").readline()
        if not answer:
            raise RuntimeError("the process that imports the course has ended")
        kernel = int(answer)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(kernel, number))
        while os.getppid() == parent and not select.select([connection], [], [], 1)[0]:
            pass


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(int(sys.argv[1]))
    else:
        ask(sys.argv[1], sys.argv[2:])
