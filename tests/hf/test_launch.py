"""The training script: two CPU processes do what one does, and it reads a file of one's own."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from peft_lessons.engine import WEIGHTS
from peft_lessons.hf.cli import examples, main
from tools.environment import ROOT


def test_two_processes_do_what_one_does(tmp_path):
    """The losses agree although the halves of a batch differ in length."""
    words = ["--steps", "4", "--batch-size", "4", "--max-length", "32", "--output"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/configs/two_cpus.yaml"]
    command = [sys.executable, *launch, "-m", "peft_lessons.hf.cli"]
    done = subprocess.run(
        [*command, *words, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # more threads than cores are many times slower
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    alone = main([*words, str(tmp_path / "one")])
    assert shared["processes"] == 2 and len(set(alone["loss"])) == 4
    assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert list(first) == list(second)
    for key in first:
        assert (first[key] - second[key]).abs().max() < 1e-4, key
    assert max(t.abs().max() for k, t in first.items() if "lora_B" in k) > 1e-3


def test_the_script_reads_a_file_of_ones_own(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    lines = [json.dumps({"text": f"Text number {n} of a few."}) for n in range(6)]
    file.write_text("\n".join(lines), encoding="utf-8")
    words = ["--data", str(file), "--steps", "2", "--batch-size", "2", "--method", "ia3"]
    metrics = main([*words, "--output", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out) == metrics | {"processes": 1}
    assert metrics["examples"] == 6 and (tmp_path / "out" / WEIGHTS).exists()
    file.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n\n', encoding="utf-8")
    assert [row["text"] for row in examples(str(file))] == ["one\u2028two", "three"]
    file.write_text('{"text": "fine"}\n{"text": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2 is not JSON"):
        examples(str(file))
    assert {row["label"] for row in examples("sentiment")} == {0, 1}
