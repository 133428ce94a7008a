"""What the rebuild scripts share: fetching a published archive and recording checksums."""

import argparse
import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

DATA = Path(__file__).resolve().parent
CHECKSUMS = DATA / "checksums.json"


def sha256(data: bytes) -> str:
    """Return the checksum of a file's content."""
    return hashlib.sha256(data).hexdigest()


def parse_arguments(description: str) -> argparse.Namespace:
    """Return `.archive`, a path or None: the one option that every rebuild script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--archive", type=Path, help="the published archive, if you have it; else it is downloaded"
    )
    return parser.parse_args()


def folder_of(name: str) -> Path:
    """Return a folder of data/, made if it is missing."""
    (DATA / name).mkdir(parents=True, exist_ok=True)
    return DATA / name


@contextmanager
def published_archive(fetch: list[str], archive: Path | None, digest: str):
    """Give the path of a published archive: `archive`, or what the command `fetch` downloads.

    Raises ValueError when its sha256 isn't `digest`.
    """
    with tempfile.TemporaryDirectory() as folder:
        if archive is None:
            subprocess.run(fetch, check=True, cwd=folder)
            (archive,) = Path(folder).iterdir()
        actual = sha256(archive.read_bytes())
        if actual != digest:
            raise ValueError(f"{archive.name} has sha256 {actual}, expected {digest}")
        yield archive


def pip_package(requirement: str, archive: Path | None, digest: str, *options: str):
    """Give the path of a Python package, which pip downloads and does not install."""
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", *options, requirement]
    return published_archive(fetch, archive, digest)


@contextmanager
def debian_package(package: str, archive: Path | None, digest: str):
    """Give the folder of the files of a Debian package, unpacked by dpkg and not installed."""
    fetch = ["apt-get", "download", "-q", package]
    with published_archive(fetch, archive, digest) as file, tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", file, folder], check=True)
        yield Path(folder)


def table(header: tuple[str, ...], rows: Iterable[tuple]) -> bytes:
    """Return the CSV file of some rows."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue().encode()


def share_of(key: str) -> float:
    """Return a number in [0, 1) that depends on the text alone: what a split is decided by."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def record(folder: str, rebuild: str, kept: tuple[str, ...] = ()) -> None:
    """Replace the entries of every file in data/`folder` in data/checksums.json.

    Files named in `kept` are no product of a script: they come back from version control.
    """
    entries = json.loads(CHECKSUMS.read_text(encoding="utf-8")) if CHECKSUMS.exists() else {}
    entries = {path: entry for path, entry in entries.items() if not path.startswith(folder + "/")}
    for file in sorted((DATA / folder).iterdir()):
        path, data = file.relative_to(DATA).as_posix(), file.read_bytes()
        command = f"git checkout -- data/{path}" if file.name in kept else rebuild
        entries[path] = {"bytes": len(data), "rebuild": command, "sha256": sha256(data)}
        print(f"{path:40} {len(data):>10,} bytes  sha256 {sha256(data)[:12]}")
    CHECKSUMS.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
