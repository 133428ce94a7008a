"""The training script under `accelerate launch`: two CPU processes do what one does, and the config
files for more than that are as far right as a machine without a GPU can tell."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file

from peft_lessons import setup_peft_training
from peft_lessons.engine import WEIGHTS
from peft_lessons.hf.cli import CONFIGS, examples, launch, main
from peft_lessons.hf.trainer import _checkpoint

OPTIONS = ["--steps", "4", "--batch-size", "4", "--max-length", "32", "--checkpoint-every", "2"]
# The script as it is, but that it notes which process saw which texts, and wrote which files.
WATCHED = """
import os, runpy, sys
import peft.peft_model
from peft_lessons import hf_training

log = open(os.environ["WATCH"] + os.environ.get("RANK", "0"), "w", buffering=1)
step, save = hf_training.PeftTrainer.training_step, peft.peft_model.safe_save_file

def seen(self, model, inputs, *args, **more):
    print((self.state.global_step, inputs["input_ids"].tolist()), file=log)
    return step(self, model, inputs, *args, **more)

def written(tensors, path, *args, **more):
    print(("wrote", str(path)), file=log)
    return save(tensors, path, *args, **more)

hf_training.PeftTrainer.training_step, peft.peft_model.safe_save_file = seen, written
runpy.run_module("peft_lessons.hf.cli", run_name="__main__")
# A classifier, too, as here a process has been started already.
sys.argv[sys.argv.index("--output") + 1] += " of a classifier"
sys.argv += ["--model", "minilm", "--data", "sentiment", "--labels", "2", "--steps", "2"]
log = open(os.devnull, "w")
runpy.run_module("peft_lessons.hf.cli", run_name="__main__")
"""


def training(processes, folder):
    """(folder of the adapter, metrics, what each process noted, losses of a classifier)."""
    folder.mkdir()
    script = folder / "watched.py"
    script.write_text(WATCHED, encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "two_cpus.yaml")]
    command = [sys.executable, *(launcher if processes == 2 else ())]
    done = subprocess.run(
        [*command, str(script), *OPTIONS, "--output", str(folder / "out")],
        env=os.environ | {"WATCH": str(folder / "process"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2  # for each of the two trainings one process speaks
    text, classifier = map(json.loads, lines)
    assert text["processes"] == processes
    notes = [
        [ast.literal_eval(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("process?"))
    ]
    return folder / "out", text, notes, classifier["loss"]


def texts_of(notes, step):
    """The texts that a step saw, without their padding: another in each process."""
    return sorted(
        [token for token in row if token != 0] for at, rows in notes if at == step for row in rows
    )


def test_two_processes_do_what_one_does(tmp_path):
    one, alone, [whole], classifier_alone = training(1, tmp_path / "one")
    two, shared, shares, classifier_shared = training(2, tmp_path / "two")
    # The very same data, half of each batch in each.
    for step in range(4):
        halves = [texts_of(share, step) for share in shares]
        assert [len(half) for half in halves] == [2, 2]
        assert sorted(halves[0] + halves[1]) == texts_of(whole, step)
    # The same losses, though the shares of a batch differ in length.
    assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert len(set(alone["loss"])) == 4
    # A classifier's loss is not counted once for each process; dropout draws other numbers.
    assert classifier_shared == pytest.approx(classifier_alone, abs=0.05)
    # The same adapter, up to the order of the sums.
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert list(first) == list(second)
    for key in first:
        assert (first[key] - second[key]).abs().max() < 1e-4, key
    assert max(t.abs().max() for k, t in first.items() if "lora_B" in k) > 1e-3
    # Each file is written once, by the first process.
    written = [[path for kind, path in note if kind == "wrote"] for note in shares]
    wanted = [two / "checkpoint-2" / WEIGHTS, two / "checkpoint-4" / WEIGHTS, two / WEIGHTS]
    assert sorted(written[0]) == sorted(map(str, wanted)) and not written[1]


def test_the_script_reads_a_file_of_ones_own(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": f"Text number {n} of a few."}) for n in range(6)),
        encoding="utf-8",
    )
    given = ["--data", str(file), "--steps", "2", "--batch-size", "2", "--method", "ia3"]
    metrics = main([*given, "--output", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out) == metrics | {"processes": 1}
    assert metrics["examples"] == 6 and (tmp_path / "out" / WEIGHTS).exists()
    file.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n\n', encoding="utf-8")
    assert [row["text"] for row in examples(str(file))] == ["one\u2028two", "three"]
    file.write_text('{"text": "fine"}\n{"text": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2 is no JSON"):
        examples(str(file))


def test_the_bundled_data_has_labels_where_the_task_has():
    rows = examples("sentiment")
    assert {row["label"] for row in rows} == {0, 1} and set(examples("austen")[0]) == {"text"}


SAID = """Traceback (most recent call last):
  File "train.py", line 7, in main
[rank1]: ValueError: train_with_peft: steps=0 must be at least 1
ValueError: train_with_peft: steps=0 must be at least 1
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause: exitcode: 1"""


def test_a_launch_that_fails_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match=r"launched training failed:[\s\S]*nowhere.yaml"):
        launch("--steps", "1", config="nowhere")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=SAID)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"failed:\n\[rank1\]: ValueError: .*steps=0"):
        launch("--steps", "0")


# ------------------------------------------------------------------ what needs GPUs


def launched(name):
    """(arguments, environment) that `accelerate launch` makes of a config file. It refuses a key
    that it does not know."""
    file = str(CONFIGS / f"{name}.yaml")
    given = launch_command_parser().parse_args(["--config_file", file, "-m", "peft_lessons.hf.cli"])
    arguments, defaults, _ = _validate_launch_command(given)
    if arguments.use_deepspeed:
        fields = ",".join(defaults.deepspeed_config)
        arguments.deepspeed_fields_from_accelerate_config = fields
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)


def test_every_config_names_its_command():
    for file in CONFIGS.iterdir():
        text = file.read_text(encoding="utf-8")
        assert f"accelerate launch --config_file configs/{file.name} -m peft_lessons.hf.cli" in text


def test_fsdp_s_config_is_what_it_says(monkeypatch):
    arguments, environment = launched("fsdp_qlora")
    assert arguments.use_fsdp and arguments.num_processes == 2
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.sharding_strategy.name == "FULL_SHARD" and not plugin.use_orig_params
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    # The one thing that FSDP may cast to is what everything is stored in.
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    model, _ = setup_peft_training("tinylm", "qlora", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    usual, _ = setup_peft_training("tinylm", "qlora", dtype=torch.bfloat16)
    assert {p.dtype for p in usual.parameters()} > {torch.uint8}
    ids = torch.arange(3, 35)[None]
    ours, theirs = (m.get_base_model().model.layers[0].mlp.up_proj for m in (model, usual))
    states = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(ours.base_layer(states), theirs.base_layer(states))
    assert model(input_ids=ids).logits.isfinite().all()


def test_a_run_in_parts_goes_on_from_trainer_s_own_checkpoint(monkeypatch, tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert _checkpoint(tmp_path, resume=True) is None  # here each would lack what is needed
    for engine in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            assert _checkpoint(tmp_path, resume=True) == tmp_path / "checkpoint-10"


def test_what_trains_is_wrapped_apart_from_the_frozen_base():
    model, _ = setup_peft_training("tinylm", "lora")
    policy = fsdp_auto_wrap_policy(model)
    wrapped = {
        name
        for name, module in model.named_modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    trains = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad}
    assert trains <= wrapped
    blocks = {f"base_model.model.model.layers.{k}" for k in range(6)}
    assert wrapped - trains == blocks


def test_deepspeed_s_config_is_what_it_says(monkeypatch):
    arguments, environment = launched("deepspeed_zero3")
    assert arguments.use_deepspeed and arguments.num_processes == 2
    for key, value in environment.items():
        if "DEEPSPEED" in key:
            monkeypatch.setenv(key, value)
    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"]
    assert zero["offload_param"]["device"] == "none"


def test_one_machine_s_config_takes_its_cpu():
    arguments, _ = launched("two_cpus")
    assert arguments.multi_gpu and arguments.use_cpu and arguments.num_processes == 2
