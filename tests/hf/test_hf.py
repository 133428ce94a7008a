"""The outline's three functions on PEFT: set up, train and resume, merge; and what they refuse."""

import math
import random
import re
import shutil
import warnings
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import AdaLoraConfig, AdaLoraModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import SIZES, contents, perturb, rewrite, tiny_llama
from transformers import AutoTokenizer, TrainingArguments

from peft_lessons import (
    LoRA,
    inject,
    load_adapter,
    load_and_merge_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    setup_peft_training,
    train_with_peft,
)
from peft_lessons.data.base_models import padded
from peft_lessons.engine import CONFIG, WEIGHTS
from peft_lessons.hf import trainer
from peft_lessons.hf.setup import HF_METHODS
from peft_lessons.hf.trainer import PeftTrainer, prepare
from peft_lessons.train.loop import TrainingDiverged

TEXTS = [
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "She was sensible and clever.",
    "The family of Dashwood had long been settled in Sussex, and their estate was large.",
    "Mr. Knightley was a sensible man.",
    "No one who had ever seen Catherine in her infancy would have supposed her a heroine.",
    "About thirty years ago Miss Maria Ward had the good luck to captivate Sir Thomas.",
] * 2
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
BASES = {"llama": (None, TEXTS), "bert": (2, ROWS)}
PEFT_NAMES = re.compile(r"lora_|ia3_|ln_tuning|modules_to_save|base_layer")
TOKENIZERS = {"llama": "tinylm", "bert": "minilm"}
OPTIONS = dict(steps=8, batch_size=2, max_length=20, show=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {name: folder} of small random models with real tokenizers."""
    root = tmp_path_factory.mktemp("models")

    def made(model, **sizes):
        return getattr(transformers, model)(getattr(transformers, model).config_class(**sizes))

    llama = tiny_llama(vocab_size=4096, intermediate_size=128)
    torch.manual_seed(1)
    sizes = dict(SIZES, vocab_size=30522, intermediate_size=128, max_position_embeddings=64)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gpt2 = dict(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    distilbert = dict(vocab_size=30522, dim=64, hidden_dim=128, n_layers=2, n_heads=4)
    t5 = dict(vocab_size=4096, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    bert = perturb(made("BertModel", **sizes), 0.05)
    poolerless = transformers.BertModel(bert.config, add_pooling_layer=False)
    for name, model, tokenizer in (
        ("llama", llama, "tinylm"),
        ("bert", bert, "minilm"),
        ("poolerless", poolerless, "minilm"),
        ("gpt2", perturb(made("GPT2LMHeadModel", **gpt2), 0.05), "tinylm"),
        ("distilbert", made("DistilBertModel", **distilbert), "minilm"),
        ("deberta", made("DebertaV2Model", **sizes), "minilm"),
        ("t5", made("T5ForConditionalGeneration", **t5), "tinylm"),
    ):
        model.save_pretrained(root / name)
        load_tokenizer(tokenizer).save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """Train a method on a base once, without a warning, for all tests that look at the result."""

    @cache
    def go(method, name="llama"):
        folder = tmp_path_factory.mktemp("trained") / "out"
        labels, texts = BASES[name]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning, append=True)
            model, tokenizer = setup_peft_training(
                folders[name], method, folder, labels=labels, rank=4
            )
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            metrics = train_with_peft(model, tokenizer, texts, **OPTIONS)
        return SimpleNamespace(model=model, metrics=metrics, folder=folder, before=before)

    return go


@pytest.fixture
def run(tmp_path, folders):
    """Set up and train: (model, metrics); a second call on one folder needs its own options."""

    def go(name="llama", method="lora", folder="out", model=None, data=None, **options):
        labels, texts = BASES[name]
        base, output = folders[name], tmp_path / folder
        if model is None:
            model, _ = setup_peft_training(base, method, output, labels=labels, rank=4)
        tokenizer = load_tokenizer(base)
        options = {"output_dir": output} | OPTIONS | options
        metrics = train_with_peft(model, tokenizer, texts if data is None else data, **options)
        return model, metrics

    return go


def batch_of(name):
    tokenizer = load_tokenizer(TOKENIZERS[name])
    return tokenizer(TEXTS[:3], padding=True, truncation=True, max_length=40, return_tensors="pt")


@torch.no_grad()
def logits_of(model, name):
    return model.eval()(**batch_of(name)).logits


# ------------------------------------------------------------------ every method, both models


@pytest.mark.parametrize(("method", "name"), [*product(HF_METHODS, BASES)])
def test_every_method_trains_saves_and_merges(trained, folders, method, name):
    base, labels, run = folders[name], BASES[name][0], trained(method, name)
    metrics = run.metrics
    assert metrics["steps"] == 8 == len(metrics["loss"]) and metrics["examples"] == len(TEXTS)
    assert metrics["trainable"] == run.model.get_nb_trainable_parameters()[0] > 0
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, run.before[n])}
    trains = {n for n, p in run.model.named_parameters() if p.requires_grad}
    # AdaLoRA's factors of a layer that is pruned at once get no gradient.
    assert moved == trains or (method == "adalora" and moved < trains)
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(contents(run.folder)) == names | {"tokenizer.json", "tokenizer_config.json"}
    assert AutoTokenizer.from_pretrained(run.folder).pad_token is not None
    after = logits_of(run.model, name)
    if method not in ("qlora", "norms"):  # the base is another one for us, and another name
        ours = load_model(base, labels)
        load_adapter(ours, run.folder)
        assert (logits_of(ours, name) - after).abs().max() < 1e-5
    plain = logits_of(load_model(base, labels, four_bit=method == "qlora"), name)
    if method == "prompt" and name == "llama":  # whose places have logits, too
        after = after[:, -plain.shape[1] :]
    assert (plain - after).abs().max() > 1e-4
    if method in ("prefix", "prompt"):
        with pytest.raises(ValueError, match="changes no weight"):
            load_and_merge_adapter(base, run.folder)
        return
    merged = load_and_merge_adapter(base, run.folder, four_bit=method == "qlora")
    assert not any(PEFT_NAMES.search(n) for n, _ in merged.named_modules())
    assert (logits_of(merged, name) - after).abs().max() < 1e-5


def test_adapters_go_where_the_method_says(folders):
    llama, _ = setup_peft_training("tinylm", "ia3")
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in llama.named_parameters() if "ia3" in n}
    assert shapes == {"k_proj": (96, 1), "v_proj": (96, 1), "down_proj": (1, 512)}
    for base, blocks in (("minilm", 6), (folders["deberta"], 2)):
        encoder, _ = setup_peft_training(base, "ia3", labels=2)
        paths = [n for n, p in encoder.named_parameters() if "ia3" in n]
        assert len(paths) == 3 * blocks and not any("attention.output" in n for n in paths)
    norms, _ = setup_peft_training("minilm", "norms", labels=2)
    trains = {n for n, p in norms.named_parameters() if p.requires_grad}
    assert all("LayerNorm" in n or "classifier" in n for n in trains) and len(trains) == 26 + 2
    with pytest.raises(ValueError, match="type 'distilbert' is not known; give a config"):
        setup_peft_training(folders["distilbert"], "ia3", labels=2)


@pytest.mark.parametrize(("method", "name"), [("lora", "poolerless"), ("ia3", "deberta")])
def test_a_new_head_of_several_layers_trains_and_merges(folders, method, name, tmp_path):
    model, tokenizer = setup_peft_training(folders[name], method, tmp_path, labels=2)
    train_with_peft(model, tokenizer, ROWS, **OPTIONS)
    keys = [k for k in load_file(tmp_path / WEIGHTS) if re.search("pooler|classifier", k)]
    assert len(keys) == 4 and not any("lora" in key for key in keys)
    trained = logits_of(model, "bert")
    merged = load_and_merge_adapter(folders[name], tmp_path)
    assert not any(PEFT_NAMES.search(n) for n, _ in merged.named_modules())
    assert (logits_of(merged, "bert") - trained).abs().max() < 1e-5
    ours = load_model(folders[name], 2, seed=3)
    load_adapter(ours, tmp_path)
    assert (logits_of(ours, "bert") - trained).abs().max() < 1e-5
    with pytest.raises(ValueError, match="comes untrained"):
        setup_peft_training(folders[name], "prompt", labels=2)


@pytest.mark.parametrize(("method", "labels"), [("lora", 2), ("qlora", None), ("ia3", None)])
def test_transposed_layers_train_and_merge(folders, method, labels, tmp_path):
    base = folders["gpt2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning, append=True)
        model, tokenizer = setup_peft_training(base, method, tmp_path, labels=labels)
        train_with_peft(model, tokenizer, ROWS if labels else TEXTS, **OPTIONS)
    merged = load_and_merge_adapter(base, tmp_path, four_bit=method == "qlora")
    assert (logits_of(merged, "llama") - logits_of(model, "llama")).abs().max() < 1e-5


def test_a_decoder_s_classifier_reads_no_padding(folders, tmp_path):
    base = folders["llama"]  # whose config names no padding, and another end than the tokenizer
    model, tokenizer = setup_peft_training(base, "prompt", labels=2)
    assert tokenizer.padding_side == "left"
    tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        train_with_peft(model, tokenizer, ROWS, output_dir=tmp_path / "none", **OPTIONS)
    model, tokenizer = setup_peft_training(base, "lora", tmp_path / "out", labels=2)
    assert tokenizer.padding_side == "right"
    alone = model.eval()(**tokenizer(TEXTS[1], return_tensors="pt")).logits
    beside = model(**tokenizer(TEXTS[:2], padding=True, return_tensors="pt")).logits
    assert (alone - beside[1]).abs().max() < 1e-5
    metrics = train_with_peft(model, tokenizer, ROWS, eval_dataset=ROWS[:6], **OPTIONS)
    cut = dict(truncation=True, max_length=20, padding=True, return_tensors="pt")
    with torch.no_grad():
        classes = model.eval()(**tokenizer(TEXTS[:6], **cut)).logits.argmax(-1)
    right = (classes == torch.tensor([0, 1] * 3)).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(right)


def test_each_method_is_what_its_name_says():
    def config_of(method):
        return setup_peft_training("tinylm", method, rank=4)[0].active_peft_config

    for method in ("lora", "rslora", "dora"):
        config = config_of(method)
        flags = config.use_rslora, config.use_dora
        assert flags == (method == "rslora", method == "dora")
        assert config.lora_alpha == 2 * config.r == 8
    assert (config_of("adalora").init_r, config_of("adalora").target_r) == (6, 4)
    assert config_of("prompt").prompt_tuning_init == "SAMPLE_VOCAB"


def test_texts_are_cut_to_what_the_model_has_positions_for(folders):
    long = {"text": "word " * 100, "label": 0}
    for method, room in (("lora", 64), ("prefix", 48), ("prompt", 48)):
        model, tokenizer = setup_peft_training(folders["bert"], method, labels=2)
        length = trainer._length(model, None)
        assert length == room
        [row] = prepare(model, tokenizer, [long], length)
        assert len(row["input_ids"]) == room
        assert model(input_ids=torch.tensor([row["input_ids"]])).logits.isfinite().all()


def test_the_processes_share_a_batch_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    model, _ = setup_peft_training("tinylm")
    settings = dict(steps=2, rate=1e-3, checkpoint_every=None, seed=0)
    made = trainer._arguments(model, tmp_path, batch_size=6, **settings)
    assert made.per_device_train_batch_size == 3
    with pytest.raises(ValueError, match="batch_size=3 cannot be divided among 2 devices"):
        trainer._arguments(model, tmp_path, batch_size=3, **settings)


def test_a_base_in_half_precision_trains_in_it(folders, tmp_path):
    model, tokenizer = setup_peft_training(folders["llama"], "lora", tmp_path, dtype=torch.bfloat16)
    seen, layer = [], model.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    metrics = train_with_peft(model, tokenizer, TEXTS, **OPTIONS | {"steps": 2})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert set(seen) == {torch.bfloat16} and all(map(math.isfinite, metrics["loss"]))


def test_a_seed_decides_the_start_and_the_random_states_stay(run):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    one, two, other = (setup_peft_training("tinylm", seed=s)[0].state_dict() for s in (0, 0, 1))
    key = next(k for k in one if "lora_A" in k)
    assert torch.equal(one[key], two[key]) and not torch.equal(one[key], other[key])
    run(steps=1)
    assert states() == before


# ------------------------------------------------------------------ labels and padding


def test_padding_takes_no_loss_and_an_end_token_in_the_text_does_though_it_is_the_same():
    model, tokenizer = setup_peft_training("tinylm")
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = prepare(model, tokenizer, [{"input_ids": [5, 6, end]}, {"input_ids": [5, 6, 7, 8]}], 9)
    labels = trainer._collator(model, tokenizer)(rows)["labels"]
    assert labels.tolist() == [[-100, 6, end, -100], [-100, 6, 7, 8]]


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("llama", "prefix"), ("bert", "lora")]
)
def test_the_first_loss_is_the_mean_over_what_the_batch_asks(run, folders, name, method):
    labels, data = BASES[name]
    model, tokenizer = setup_peft_training(folders[name], method, labels=labels)
    rows = prepare(model, tokenizer, data[:4], 20)
    with torch.no_grad():
        expected = model(**trainer._collator(model, tokenizer)(rows)).loss.item()
    _, metrics = run(name, model=model, data=data[:4], steps=1, batch_size=4)
    assert metrics["loss"][0] == pytest.approx(expected, abs=1e-5)


def test_adalora_s_regulariser_is_no_part_of_what_is_measured(run):
    model, metrics = run(method="adalora", eval_dataset=TEXTS[:2])
    rows = prepare(model, load_tokenizer("tinylm"), TEXTS[:2], 20)
    batch = trainer._collator(model, load_tokenizer("tinylm"))(rows)
    with torch.no_grad():
        plain, with_it = model.get_base_model()(**batch).loss, model(**batch).loss
    assert metrics["eval_loss"] == pytest.approx(plain.item(), abs=1e-5)
    assert with_it - plain > 0.1


def test_what_a_mask_hides_is_left_out():
    model, tokenizer = setup_peft_training("tinylm")
    row = {"input_ids": [0, 5, 6, 7, 0], "attention_mask": np.array([0, 1, 1, 1, 0])}
    plain = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
    assert prepare(model, tokenizer, [row], 9) == [plain]
    assert prepare(model, tokenizer, [row | {"labels": [-100, -100, 6, 7, -100]}], 9) == [plain]
    with pytest.raises(ValueError, match="3 tokens and a mask of 2"):
        prepare(model, tokenizer, [plain | {"attention_mask": [1, 1]}], 9)


def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    with pytest.raises(TrainingDiverged, match="step 3: loss nan"):
        run(learning_rate=1e30, checkpoint_every=3)
    assert not list((tmp_path / "out").glob("*"))


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix"])
def test_an_interrupted_run_resumes_to_the_same_bits(run, trained, method, tmp_path, monkeypatch):
    step, folder = PeftTrainer.training_step, tmp_path / "out"

    def stop(self, *args, **more):  # like a closed laptop
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PeftTrainer, "training_step", stop)
        run(method=method, checkpoint_every=2)
    assert not (folder / WEIGHTS).exists()
    if method == "lora":  # a half-written checkpoint is passed over
        (folder / "checkpoint-4" / "trainer_state.json").unlink()
        (folder / "checkpoint-of mine").mkdir()
    complete = trained(method)
    _, resumed = run(method=method, checkpoint_every=2, resume=True)
    assert resumed["loss"] == complete.metrics["loss"]
    one, two = load_file(complete.folder / WEIGHTS), load_file(folder / WEIGHTS)
    assert list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_the_newest_checkpoint_is_that_of_the_highest_number_before_the_end(tmp_path):
    for step in (8, 10, 9, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").touch()
    assert trainer._checkpoint(tmp_path, resume=True, steps=12).name == "checkpoint-10"
    with pytest.raises(ValueError, match="holds 4 checkpoints of an older run"):
        trainer._checkpoint(tmp_path, resume=False, steps=12)
    assert trainer._checkpoint(tmp_path / "new", resume=True, steps=12) is None


def test_what_cannot_be_resumed_is_refused_at_once(folders, tmp_path):
    tokenizer = load_tokenizer("tinylm")
    for config, lacks in (
        (AdaLoraConfig(total_step=8, target_modules=["q_proj"]), "lack the pruned triplets"),
        (PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True), "lack the network"),
    ):
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(load_model(folders["llama"]), config)
        with pytest.raises(ValueError, match=f"cannot be resumed, because its checkpoints {lacks}"):
            train_with_peft(model, tokenizer, TEXTS, output_dir=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_adalora_reaches_its_ranks_within_the_run(run, monkeypatch):
    steps, allocate = [], AdaLoraModel.update_and_allocate

    def noted(self, step):
        steps.append(step)
        return allocate(self, step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", noted)
    model, _ = run(method="adalora", steps=12)
    assert steps == list(range(1, 13))
    ranks = [sum(kept) for kept in model.active_peft_config.rank_pattern.values()]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1


# ------------------------------------------------------------------ refusals


def test_a_wrong_set_up_is_refused(folders):
    for name, arguments, match in (
        ("tinylm", dict(method="lroa"), r"'lroa' is unknown; known are lora, rslora, qlora"),
        ("tinylm", dict(method="bitfit"), r"PEFT does not have it; .* BitFit"),
        ("minilm", {}, "is an encoder.*labels=2"),
        ("tinylm", dict(rank=300), r"rank=300 is above min\(in, out\) of 'model.layers.0.self_a"),
        ("gpt2", dict(rank=100), r"rank=100 is above .* 'transformer.h.0.attn.c_attn'"),
        ("tinylm", dict(method="adalora", rank=65), r"rank=98 is above min\(in, out\)"),
        ("tinylmm", {}, "there is no model 'tinylmm'"),
        ("tinylm", dict(dtype=torch.float16), "needs a GPU"),
        ("tinylm", dict(seed=None), "seed=None must be a whole number"),
        ("t5", {}, "an encoder and a decoder"),
    ):
        with pytest.raises(ValueError, match=match):
            setup_peft_training(folders.get(name, name), **arguments)


def test_a_tokenizer_without_padding_takes_its_end_token_or_is_refused():
    tokenizer = load_tokenizer("tinylm")
    tokenizer.pad_token = None
    assert padded(tokenizer).pad_token == tokenizer.eos_token is not None
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        padded(tokenizer)


def test_a_finished_run_is_kept_and_so_is_a_file(trained, run, tmp_path):
    folder = trained("lora").folder
    before = contents(folder)
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds the adapter of a finished run"):
            run(output_dir=folder, resume=resume)
    assert contents(folder) == before
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        setup_peft_training("tinylm", "lora", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_wrong_data_is_refused(trained):
    for name, data, match in (
        ("llama", [], r"train_dataset is empty"),
        ("llama", "a text", "must be a collection"),
        ("llama", ["fine, this one", ""], r"train_dataset\[1\] has \d tokens"),
        ("llama", [{"words": "x"}], r'train_dataset\[0\] has neither "text" nor "input_ids"'),
        ("llama", [{"text": 3}], '"text" is not a string'),
        ("llama", [{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 tokens and 2 labels"),
        ("llama", [{"input_ids": [[1, 2, 3]]}], '"input_ids" must be a list of whole numbers'),
        ("llama", [{"input_ids": [1, 4096]}], "token 4096, but the model's table has"),
        ("llama", [{"input_ids": [1, 2], "labels": [1, 4096]}], "must be tokens of 0 to 4095"),
        ("llama", ROWS, "without labels=n at set-up, the label"),
        ("bert", [{"text": "good"}], r'train_dataset\[0\] has no "label"'),
        ("bert", [{"text": "good", "label": 2}], "label 2, but the model has classes 0 to 1"),
        ("bert", [{"text": "good", "label": "positive"}], 'no "label"'),
    ):
        tokenizer = load_tokenizer(TOKENIZERS[name])
        with pytest.raises(ValueError, match=match):
            prepare(trained("lora", name).model, tokenizer, data, 20, "train_dataset")


def test_wrong_settings_are_refused(tmp_path):
    def refuses(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            train_with_peft(model, tokenizer, TEXTS, **(OPTIONS | options))

    model, tokenizer = setup_peft_training("tinylm", "prompt", tmp_path / "out")
    refuses("steps=0", steps=0)
    refuses("lr=-1", learning_rate=-1.0)
    refuses("epochs=0", steps=None, epochs=0)
    refuses("eval_dataset is empty", eval_dataset=[])
    refuses("16 virtual tokens are more than the model's", max_length=10_000)
    model.requires_grad_(False)
    refuses("is_trainable=True")
    model = load_model("tinylm")
    refuses("not PEFT's", TypeError)
    model, _ = setup_peft_training("tinylm", "lora", tmp_path / "out")
    model.merge_adapter()
    refuses("unmerge_adapter")
    model.unmerge_adapter()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    refuses("padding token 4096 has no embedding")
    assert not (tmp_path / "out").exists()


def test_any_collection_and_classes_of_any_library_will_do(trained):
    class Indexed:
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            return {"text": TEXTS[index]}

    model, tokenizer = trained("lora").model, load_tokenizer("tinylm")
    expected = prepare(model, tokenizer, TEXTS, 20)
    for collection in (np.array(TEXTS), Indexed()):
        assert prepare(model, tokenizer, collection, 20) == expected
    model, tokenizer = trained("lora", "bert").model, load_tokenizer("minilm")
    for label in (1.0, np.int64(1), torch.tensor([1])):
        [row] = prepare(model, tokenizer, [{"text": "good", "label": label}], 9)
        assert row["labels"] == 1 and type(row["labels"]) is int


# ------------------------------------------------------------------ merge


@pytest.fixture
def out(trained, tmp_path):
    """Return a copy of an adapter, to spoil."""
    return Path(shutil.copytree(trained("lora").folder, tmp_path / "out"))


def test_a_merged_model_is_written_whole_and_opens_alone(out, folders, tmp_path):
    base = folders["llama"]
    (tmp_path / "merged").mkdir()  # empty, as new
    merged = load_and_merge_adapter(base, out, save_to=tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    assert torch.equal(logits_of(again, "llama"), logits_of(merged, "llama"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token
    with pytest.raises(ValueError, match="is not an empty folder"):
        load_and_merge_adapter(base, out, save_to=tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "merged"}


def test_an_adapter_that_does_not_fit_is_refused(out, trained, folders, tmp_path):
    base, key = folders["llama"], next(iter(load_file(out / WEIGHTS)))
    with pytest.raises(ValueError, match="made for '.*llama'"):
        load_and_merge_adapter("tinylm", out)
    with pytest.raises(ValueError, match="does not fit this base"):
        load_and_merge_adapter("tinylm", out, check_base=False)
    rewrite(out, lambda t: [v.fill_(200.0) for v in t.values()])
    with pytest.raises(ValueError, match="NaN or infinite weights in torch.float16"):
        load_and_merge_adapter(base, out, dtype=torch.float16)
    surplus = key.replace("layers.0", "layers.9")
    rewrite(out, lambda t: t.update({surplus: t[key].clone()}))
    with pytest.raises(ValueError, match="no place in the model"):
        load_and_merge_adapter(base, out)
    rewrite(out, lambda t: (t.pop(surplus), t[key].fill_(torch.nan)))
    with pytest.raises(ValueError, match="NaN"):
        load_and_merge_adapter(base, out)
    rewrite(out, lambda t: t.pop(key))
    with pytest.raises(ValueError, match="misses .*lora_A"):
        load_and_merge_adapter(base, out)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_and_merge_adapter(base, tmp_path / "nowhere")
    headless = shutil.copytree(trained("lora", "bert").folder, tmp_path / "headless")
    rewrite(headless, lambda t: [t.pop(key) for key in list(t) if "classifier" in key])
    with pytest.raises(ValueError, match="its file holds no head"):
        load_and_merge_adapter(folders["bert"], headless)


def test_our_own_adapter_merges_too(folders, tmp_path):
    base = folders["llama"]
    model = load_model(base)
    inject(model, LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    save_adapter(model, tmp_path)
    merged = load_and_merge_adapter(base, tmp_path)
    assert torch.allclose(logits_of(merged, "llama"), logits_of(model, "llama"), atol=1e-4)
