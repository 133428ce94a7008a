"""Run the cells of a notebook in a process that has imported the course already.

Importing takes longer than most solved lessons. On Linux one server process does it once, and each
notebook runs in a fork of that server; elsewhere each notebook's process imports for itself.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(["peft_lessons", "peft", "IPython.core.interactiveshell"])


def _run(cells: Sequence[tuple[str, bool]], cwd: str, env: Mapping[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    config = Config()
    config.HistoryManager.enabled = False
    shell, failed = InteractiveShell.instance(config=config), False
    with (
        open(said, "w", encoding="utf-8") as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        for source, may_fail in cells:
            result = shell.run_cell(source, store_history=False)
            if failed := not (result.success or may_fail):
                break
    os._exit(failed)  # threads and exit handlers would take seconds


def run(
    cells: Sequence[tuple[str, bool]], cwd: Path, env: Mapping[str, str], seconds: float
) -> None:
    """Run cells, each a source and whether it may fail, in the folder `cwd`.

    Raises RuntimeError with what the cells printed at the first that fails and may not, or when all
    of them together take longer than `seconds`."""
    env = {**env, "MPLBACKEND": "agg"}
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = PROCESSES.Process(target=_run, args=(cells, str(cwd), env, str(said)))
        with patch.dict(os.environ, env):  # the server keeps the environment in which it starts
            process.start()
        process.join(seconds)
        late = process.is_alive()
        process.kill()
        process.join()
        if late or process.exitcode:
            why = f"longer than {seconds:g} s" if late else f"exit status {process.exitcode}"
            text = said.read_text(encoding="utf-8") if said.exists() else ""
            raise RuntimeError(f"{why}\n{text[-5000:]}")
