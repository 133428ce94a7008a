"""A clone on Windows, where git converts line ends, has the bundled files as they were recorded."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from peft_lessons.data.base_models import load_tokenizer
from peft_lessons.data.bundled import bundled_files, bundled_path
from tools.environment import ROOT

CONVERT = ("-c", "core.autocrlf=true")  # what git for Windows proposes when it is installed


@pytest.fixture(autouse=True)
def git_of_a_stranger(monkeypatch):
    """Leave the settings of this machine's git, and of its user, out of the tests."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("PEFT_LESSONS_BASE", raising=False)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout


def test_a_clone_that_converts_line_ends_has_every_bundled_file(tmp_path, monkeypatch):
    git(tmp_path, "clone", "-q", "--depth", "1", *CONVERT, ROOT.as_uri(), "clone")
    files = git(tmp_path / "clone", "ls-files", "--eol").splitlines()
    assert len(files) > 50
    assert [file for file in files if "w/crlf" in file or "w/mixed" in file] == []
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path / "clone" / "data"))
    assert all(file.intact for file in bundled_files())


def test_the_error_names_line_ends_and_commands_that_restore_the_files(tmp_path, monkeypatch):
    source, clone = tmp_path / "source", tmp_path / "clone"
    for folder in ("models/tinylm", "tasks/wordnet"):
        shutil.copytree(ROOT / "data" / folder, source / "data" / folder)
    shutil.copy(ROOT / "data/checksums.json", source / "data")
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "x")
    git(tmp_path, "clone", "-q", *CONVERT, source.as_uri(), "clone")
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(clone / "data"))
    with pytest.raises(ValueError, match=r"LICENSE is damaged: .* converted from LF to CRLF"):
        bundled_path("tasks/wordnet/LICENSE")
    with pytest.raises(ValueError, match=r"json is damaged: .* converted from LF to CRLF") as error:
        load_tokenizer("tinylm")
    commands = [line for line in str(error.value).splitlines() if line.startswith("    git ")]
    assert len(commands) == 3
    for command in commands:
        git(clone, *command.split()[1:])
    load_tokenizer("tinylm")
    bundled_path("tasks/wordnet/LICENSE", verify=True)
    assert "w/crlf" not in git(clone, "ls-files", "--eol", "data/models", "data/tasks")
