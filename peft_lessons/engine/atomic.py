"""Write files so that an interruption never leaves half of one."""

import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil


def _beside(path: Path) -> Path:
    """Return the temporary name of a file, which no other process or thread gives it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")


def _remove_stale(path: Path) -> None:
    """Remove what processes that were killed left of a file, under its temporary names."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-\d+\.tmp")
    for part in path.parent.iterdir():
        if (found := name.fullmatch(part.name)) and not psutil.pid_exists(int(found[1])):
            part.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name for the block to write a large file to; move the file to `path` when
    the block ends. After an exception the temporary file is gone and an older file unchanged; what
    a killed process left goes with the next one."""
    _remove_stale(path)
    part = _beside(path)
    try:
        yield part
        if path.is_file():
            part.chmod(path.stat().st_mode | stat.S_IWRITE)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write the content of each file, or leave all as they were and raise.

    Every file is complete under a temporary name beside its place before the first one is moved
    there. If a move fails, the old files return: old and new ones never mix. A file that is
    replaced keeps its permissions; Windows replaces none that is read-only or open."""
    parts = {path: _beside(path) for path in files}
    old = {path: part.with_suffix(".old") for path, part in parts.items() if path.is_file()}
    last = [*files][-1]
    try:
        for path, content in files.items():
            with open(parts[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path in old:
                parts[path].chmod(path.stat().st_mode | stat.S_IWRITE)
        for path in old.keys() - {last}:
            shutil.copy2(path, old[path])
        try:
            for path, part in parts.items():
                os.replace(part, path)
        except BaseException:
            if parts[last].exists():  # so not all are in their places
                for path in (path for path, part in parts.items() if not part.exists()):
                    os.replace(old[path], path) if path in old else path.unlink()
            raise
    finally:
        for temporary in (*parts.values(), *old.values()):
            temporary.unlink(missing_ok=True)
