"""Folders that are built, and addresses at which a published copy of the course opens."""

import re
import shutil
from pathlib import Path

BINDER_HOME = "https://mybinder.org"
COLAB_HOME = "https://colab.research.google.com"


def clear(folder: Path, stamp: str) -> None:
    """Remove a folder that an earlier run wrote, which the file `stamp` in it shows. Raises
    ValueError for one that holds something else."""
    if folder.exists() and not (folder / stamp).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files: name a new folder")
    shutil.rmtree(folder, ignore_errors=True)


def in_colab(repository: str, name: str) -> str:
    """Return the address that opens a lesson of a published copy in Colab."""
    return f"{COLAB_HOME}/github/{repository}/blob/main/notebooks/{name}"


def in_binder(repository: str, name: str) -> str:
    """Return the address that opens a lesson of a published copy on Binder's public service."""
    return f"{BINDER_HOME}/v2/gh/{repository}/main?urlpath=lab/tree/notebooks/{name}"


def owner_and_name(repository: str) -> str:
    """Return OWNER/NAME of a GitHub repository, given so or as its address. Raises ValueError for
    anything else."""
    match = re.fullmatch(r"(?:https://github\.com/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
    if match is None:
        raise ValueError(f"{repository} is no GitHub repository: write OWNER/NAME")
    return match[1]
