"""Writing files: all of them whole, or the old ones as they were."""

import builtins
import os
import shutil

import pytest

from peft_lessons.engine import write_atomically, written_whole

CALLS = {"open": builtins, "fsync": os, "copy2": shutil, "replace": os}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt isn't."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped(folder, monkeypatch, at, after):
    """Write the new files, and stop before or after call number `at`; return whether it came."""
    calls = []

    def stopping(call):
        def stop(*args, **options):
            calls.append(call)
            number = len(calls)
            if number == at and not after:
                raise Stop
            result = call(*args, **options)
            if number == at:
                raise Stop
            return result

        return stop

    with monkeypatch.context() as patch:
        for name, owner in CALLS.items():
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        try:
            write_atomically({folder / name: content for name, content in NEW.items()})
        except Stop:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("names", ["", "b", "abc"])
def test_a_stop_at_any_call_leaves_the_old_files_or_the_new_ones(
    tmp_path, monkeypatch, names, after
):
    old, endings, at = dict.fromkeys(names, b"old"), [], 1
    while True:
        for name in NEW:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        if not stopped(tmp_path, monkeypatch, at, after):
            break
        endings.append(contents(tmp_path))  # and no temporary file is left
        at += 1
    assert contents(tmp_path) == NEW and len(endings) >= 9
    assert endings[:-1] == [old] * (len(endings) - 1) and endings[-1] == (NEW if after else old)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_replaced_file_keeps_its_permissions(tmp_path):
    (file := tmp_path / "grades").write_bytes(b"old")
    file.chmod(0o640)
    write_atomically({file: b"new"})
    assert file.stat().st_mode & 0o777 == 0o640 and file.read_bytes() == b"new"


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    dead, alive, other = (
        tmp_path / name
        for name in (".a.gguf.4194305-1.tmp", f".a.gguf.{os.getppid()}-1.tmp", ".b.4194305-1.tmp")
    )
    for file in (dead, alive, other):
        file.write_bytes(b"half")
    with written_whole(tmp_path / "a.gguf") as part:
        part.write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, other.name, "a.gguf"}
