"""What the rebuild scripts share: fetching a published archive and recording checksums."""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

DATA = Path(__file__).resolve().parent
CHECKSUMS = DATA / "checksums.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse_arguments(description: str) -> argparse.Namespace:
    """Return `.archive`, a path or None: the one option that every rebuild script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--archive", type=Path, help="the published archive, if you have it; else pip downloads it"
    )
    return parser.parse_args()


@contextmanager
def published_archive(requirement: str, archive: Path | None, digest: str, *options: str):
    """Give the path of a published archive, downloaded without installing it if need be.

    Raises ValueError when its sha256 isn't `digest`.
    """
    with tempfile.TemporaryDirectory() as folder:
        if archive is None:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
            subprocess.run([*pip, *options, requirement], check=True)
            (archive,) = Path(folder).iterdir()
        found = sha256(archive.read_bytes())
        if found != digest:
            raise ValueError(f"{archive.name} has sha256 {found}, expected {digest}")
        yield archive


def record(folder: str, rebuild: str, kept: tuple[str, ...] = ()) -> None:
    """Replace the entries of every file in data/`folder` in data/checksums.json.

    Files named in `kept` are no product of a script: they come back from version control.
    """
    entries = json.loads(CHECKSUMS.read_text()) if CHECKSUMS.exists() else {}
    entries = {path: entry for path, entry in entries.items() if not path.startswith(folder + "/")}
    for file in sorted((DATA / folder).iterdir()):
        path, data = file.relative_to(DATA).as_posix(), file.read_bytes()
        command = f"git checkout -- data/{path}" if file.name in kept else rebuild
        entries[path] = {"bytes": len(data), "rebuild": command, "sha256": sha256(data)}
        print(f"{path:40} {len(data):>10,} bytes  sha256 {sha256(data)[:12]}")
    CHECKSUMS.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
