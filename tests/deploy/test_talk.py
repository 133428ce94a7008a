"""course.py chat: a prompt in the terminal, from an adapter's folder or a file."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from exported import SERVER, adapted
from tiny import contents, rewrite

from peft_lessons import DoRA, save_adapter
from peft_lessons.deploy import adapter_to_gguf, serve
from peft_lessons.deploy.chat import main


@pytest.fixture(scope="module")
def checkpoint(base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(saved, checkpoint, tmp_path_factory):
    """Return an adapter whose config names its base."""
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("named") / "adapter")
    return rewrite(folder, base_model_name_or_path=str(checkpoint))


@pytest.fixture(scope="module")
def adapter_file(adapter, tmp_path_factory):
    return adapter_to_gguf(adapter, tmp_path_factory.mktemp("file") / "adapter.gguf")


@pytest.fixture(scope="module")
def wanted(base_file, adapter_file):
    """Return the answers to two lines, with the adapter and without."""
    with serve(base_file, {"a": adapter_file}, check=False) as server:
        lines = ("hello", "who are you?")
        return {
            name: [server.ask(line, name, 256).strip() for line in lines] for name in (None, "a")
        }


@pytest.fixture
def talk(monkeypatch, capfd, tmp_path):
    """Return what runs the command with lines to read, and gives (status, output, errors)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(text, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = main([str(argument) for argument in arguments])
        assert not contents(tmp_path) and not [*tmp_path.iterdir()], "no file is left"
        return status, *capfd.readouterr()

    return run


@SERVER
def test_every_line_of_a_pipe_gets_an_answer_and_a_closed_window_leaves_no_file(
    adapter, wanted, tmp_path
):
    """In a process of its own, with Windows' line ends and the mark that its shells put first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_lessons.deploy.chat", str(adapter)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONUTF8": "1", "TMPDIR": str(tmp_path), "TEMP": str(tmp_path)},
    )
    process.stdin.write("\ufeffhello\r\nwho are you?\r\n".encode())
    process.stdin.flush()
    due = "\n".join(wanted["a"]).split("\n")
    lines = [process.stdout.readline().decode().rstrip() for _ in due]
    assert lines == [line.rstrip() for line in due]
    assert [*tmp_path.iterdir()], "the files that it has written"
    process.terminate()
    process.stdin.close()
    process.wait()
    assert sys.platform == "win32" or not [*tmp_path.iterdir()]


@SERVER
def test_an_empty_line_ends_and_files_are_taken_as_they_are(
    talk, adapter, adapter_file, base_file, checkpoint, wanted
):
    for arguments in ((adapter, base_file), (adapter_file, base_file), (adapter_file, checkpoint)):
        status, output, _ = talk("hello\n\nwho are you?\n", *arguments)
        assert status == 0 and output.split() == wanted["a"][0].split()
    status, output, errors = talk("hello\nwho are you?", base_file)
    assert (status, errors) == (0, "")
    assert output.split() == "\n".join(wanted[None]).split()


@SERVER
def test_too_long_a_line_is_an_error_and_the_next_one_is_answered(talk, base_file, wanted):
    status, output, errors = talk("hello " * 300 + "\nhello\n", base_file)
    assert status == 0 and output.split() == wanted[None][0].split()
    assert "exceeds the available context size" in errors


@SERVER
def test_ctrl_c_ends_without_a_traceback(talk, base_file, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert talk("hello\n", base_file) == (0, "\n", "")


def test_what_is_missing_is_one_sentence(talk, base, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    dora = save_adapter(adapted(base, DoRA(rank=2, alpha=4)), folder / "dora")
    rewrite(dora, base_model_name_or_path="tinylm")
    (folder / "text.gguf").write_text("no model", encoding="utf-8")
    for arguments, message in (
        ([], "Which adapter? python course.py chat FOLDER [BASE]"),
        ([folder / "nowhere"], "holds no adapter_config.json"),
        ([folder / "missing.gguf"], "there is no such file"),
        ([folder / "text.gguf"], "is not a GGUF file"),
        ([saved], "names no base: name it after the folder"),
        ([saved, "tinyllm"], "there is no model 'tinyllm'"),
        ([dora], "DoRA's magnitudes"),
    ):
        status, output, errors = talk("hello\n", *arguments)
        assert status and not output and message in errors and "Traceback" not in errors
