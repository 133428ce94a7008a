"""The outline's three functions on PEFT: set up, train and resume, merge; and what they refuse."""

import json
import math
import random
import re
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from peft import AdaLoraModel, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import (
    SIZES,
    contents,
    perturb,
    tiny_llama,
    tiny_opt,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

import peft_lessons
from peft_lessons import (
    LoRA,
    TrainingDiverged,
    evaluate,
    hf_training,
    inject,
    load_adapter,
    load_and_merge_adapter,
    load_model,
    load_task,
    save_adapter,
    setup_peft_training,
    train_with_peft,
)
from peft_lessons.adapters_io import CONFIG, WEIGHTS
from peft_lessons.hf import HF_METHODS
from peft_lessons.hf_training import STATE, PeftTrainer, prepare
from peft_lessons.models import padded

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
OPTIONS = dict(steps=8, batch_size=2, max_length=20, show=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random models with real tokenizers, as folders, {name: its folder}."""
    root = tmp_path_factory.mktemp("models")
    llama = tiny_llama(vocab_size=4096, intermediate_size=128)
    torch.manual_seed(1)
    sizes = dict(SIZES, vocab_size=30522, intermediate_size=128, max_position_embeddings=64)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bert = perturb(BertModel(BertConfig(**sizes)), 0.05)
    poolerless = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    roberta = RobertaModel(RobertaConfig(**sizes, pad_token_id=0), add_pooling_layer=False)
    gpt2 = dict(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    distilbert = dict(vocab_size=30522, dim=64, hidden_dim=128, n_layers=2, n_heads=4, dropout=0.0)
    t5 = dict(vocab_size=4096, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    for name, model, tokenizer in (
        ("llama", llama, "tinylm"),
        ("bert", bert, "minilm"),
        ("poolerless", poolerless, "minilm"),
        ("opt", tiny_opt(), "tinylm"),
        ("gpt2", perturb(GPT2LMHeadModel(GPT2Config(**gpt2)), 0.05), "tinylm"),
        ("roberta", roberta, "minilm"),
        ("distilbert", DistilBertModel(DistilBertConfig(**distilbert)), "minilm"),
        ("deberta", DebertaV2Model(DebertaV2Config(**sizes)), "minilm"),
        ("t5", T5ForConditionalGeneration(T5Config(**t5)), "tinylm"),
    ):
        model.save_pretrained(root / name)
        peft_lessons.load_tokenizer(tokenizer).save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def run(tmp_path, folders):
    """Set up and train: (model, metrics); a second call on one folder needs its own options."""

    def go(name="llama", method="lora", folder="out", model=None, data=None, **options):
        labels, texts = BASES[name]
        base, output = folders[name], tmp_path / folder
        if model is None:
            model, _ = setup_peft_training(base, method, output, labels=labels, rank=4)
        tokenizer = peft_lessons.load_tokenizer(base)
        options = {"output_dir": output} | OPTIONS | options
        metrics = train_with_peft(model, tokenizer, texts if data is None else data, **options)
        return model, metrics

    return go


def batch_of(name):
    tokenizer = peft_lessons.load_tokenizer({"llama": "tinylm", "bert": "minilm"}[name])
    return tokenizer(TEXTS[:3], padding=True, truncation=True, max_length=40, return_tensors="pt")


@torch.no_grad()
def logits_of(model, name):
    return model.eval()(**batch_of(name)).logits


# ------------------------------------------------------------------ every method, both models


@pytest.mark.parametrize(("method", "name"), [*product(HF_METHODS, BASES)])
def test_every_method_trains_saves_and_merges(run, folders, method, name, tmp_path):
    base, labels = folders[name], BASES[name][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning, append=True)
        model, metrics = run(name, method)
    assert metrics["steps"] == 8 == len(metrics["loss"]) and metrics["examples"] == len(TEXTS)
    assert metrics["trainable"] == model.get_nb_trainable_parameters()[0] > 0
    folder = tmp_path / "out"
    kept = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(contents(folder)) == kept | {"tokenizer.json", "tokenizer_config.json"}
    assert AutoTokenizer.from_pretrained(folder).pad_token is not None
    trained = logits_of(model, name)
    plain = logits_of(load_model(base, labels, four_bit=method == "qlora"), name)
    if method == "prompt" and name == "llama":  # whose places have logits, too
        trained = trained[:, -plain.shape[1] :]
    assert (plain - trained).abs().max() > 1e-4
    if method in ("prefix", "prompt"):
        with pytest.raises(ValueError, match="changes no weight"):
            load_and_merge_adapter(base, folder)
        return
    merged = load_and_merge_adapter(base, folder, four_bit=method == "qlora")
    assert not any(PEFT_NAMES.search(n) for n, _ in merged.named_modules())
    assert (logits_of(merged, name) - trained).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "name"), [*product(HF_METHODS, BASES)])
def test_no_bit_of_what_is_frozen_moves(run, folders, method, name):
    base, labels = folders[name], BASES[name][0]
    model, _ = setup_peft_training(base, method, labels=labels, rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run(name, method, model=model, steps=4)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    # AdaLoRA's factors of a layer that is pruned at once get no gradient.
    still = [n for n, p in moving.items() if torch.equal(after[n], p)]
    assert not still or method == "adalora"


def test_adapters_go_where_the_method_says(folders):
    llama, _ = setup_peft_training("tinylm", "ia3")
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in llama.named_parameters() if "ia3" in n}
    assert shapes == {"k_proj": (96, 1), "v_proj": (96, 1), "down_proj": (1, 512)}
    bert, _ = setup_peft_training("minilm", "ia3", labels=2)
    paths = [n for n, p in bert.named_parameters() if "ia3" in n]
    assert len(paths) == 3 * 6 and not any("attention.output" in n for n in paths)
    opt, _ = setup_peft_training(folders["opt"], "ia3")
    places = {n.split(".")[-3] for n, p in opt.named_parameters() if p.requires_grad}
    assert places == {"k_proj", "v_proj", "fc2"}
    deberta, _ = setup_peft_training(folders["deberta"], "ia3", labels=2)
    paths = [n for n, p in deberta.named_parameters() if "ia3" in n]
    assert len(paths) == 3 * 2 and not any("attention.output" in n for n in paths)
    norms, _ = setup_peft_training("minilm", "norms", labels=2)
    trains = {n for n, p in norms.named_parameters() if p.requires_grad}
    assert all("LayerNorm" in n or "classifier" in n for n in trains) and len(trains) == 26 + 2


def test_a_fresh_pooler_trains_and_is_saved_with_the_head(folders, tmp_path):
    base = folders["poolerless"]
    for method in HF_METHODS:
        out = tmp_path / method
        if method in ("prefix", "prompt"):
            with pytest.raises(ValueError, match="'bert.pooler.dense' of .* comes untrained"):
                setup_peft_training(base, method, out, labels=2)
            continue
        model, tokenizer = setup_peft_training(base, method, out, labels=2)
        train_with_peft(model, tokenizer, ROWS, **OPTIONS)
        keys = [k for k in load_file(out / WEIGHTS) if "pooler" in k or "classifier" in k]
        assert len(keys) == 4 and not any("lora" in key for key in keys), method
        if method not in ("norms", "qlora"):
            ours = load_model(base, 2, seed=3)
            load_adapter(ours, out)
            assert (logits_of(ours, "bert") - logits_of(model, "bert")).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "norms"])
@pytest.mark.parametrize("name", ["roberta", "distilbert", "deberta"])
def test_a_head_of_several_layers_trains_and_merges(folders, method, name, tmp_path):
    if (method, name) == ("ia3", "distilbert"):
        with pytest.raises(ValueError, match="type 'distilbert' is not known; give a config"):
            setup_peft_training(folders[name], method, tmp_path, labels=2)
        return
    model, tokenizer = setup_peft_training(folders[name], method, tmp_path, labels=2)
    train_with_peft(model, tokenizer, ROWS, **OPTIONS)
    trained = logits_of(model, "bert")
    merged = load_and_merge_adapter(folders[name], tmp_path)
    assert not any(PEFT_NAMES.search(n) for n, _ in merged.named_modules())
    assert (logits_of(merged, "bert") - trained).abs().max() < 1e-5
    if method != "norms":
        ours = load_model(folders[name], 2, seed=3)
        load_adapter(ours, tmp_path)
        assert (logits_of(ours, "bert") - trained).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["distilbert", "deberta"])
def test_before_a_head_that_peft_does_not_know_there_is_no_prompt(folders, name):
    with pytest.raises(ValueError, match="comes untrained"):
        setup_peft_training(folders[name], "prompt", labels=2)


@pytest.mark.parametrize("labels", [None, 2])
@pytest.mark.parametrize("method", ["lora", "qlora", "ia3", "norms"])
def test_transposed_layers_train_and_merge(folders, method, labels, tmp_path):
    base = folders["gpt2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning, append=True)
        model, tokenizer = setup_peft_training(base, method, tmp_path, labels=labels)
        train_with_peft(model, tokenizer, ROWS if labels else TEXTS, **OPTIONS)
    merged = load_and_merge_adapter(base, tmp_path, four_bit=method == "qlora")
    assert (logits_of(merged, "llama") - logits_of(model, "llama")).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_decoder_s_classifier_reads_no_padding(folders, method, tmp_path):
    base = folders["llama"]  # whose config names no padding, and another end than the tokenizer
    model, tokenizer = setup_peft_training(base, method, tmp_path / "out", labels=2)
    assert tokenizer.padding_side == ("left" if method == "prompt" else "right")
    if method == "prompt":
        tokenizer.padding_side = "right"
        with pytest.raises(ValueError, match="padding_side = 'left'"):
            train_with_peft(model, tokenizer, ROWS, **OPTIONS)
        return
    alone = model.eval()(**tokenizer(TEXTS[1], return_tensors="pt")).logits
    beside = model(**tokenizer(TEXTS[:2], padding=True, return_tensors="pt")).logits
    assert (alone - beside[1]).abs().max() < 1e-5
    train_with_peft(model, tokenizer, ROWS, **OPTIONS)
    load_and_merge_adapter(base, tmp_path / "out", save_to=tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), 2)
    assert (logits_of(merged, "llama") - logits_of(model, "llama")).abs().max() < 1e-5


def test_each_method_is_what_its_name_says():
    flags = {}
    for method in ("lora", "rslora", "dora", "adalora", "prompt"):
        config = setup_peft_training("tinylm", method, rank=4)[0].active_peft_config.to_dict()
        names = ("use_rslora", "use_dora", "lora_alpha", "r", "init_r", "target_r")
        flags[method] = tuple(config.get(name) for name in names)
    assert flags["lora"][:4] == (False, False, 8, 4)
    assert flags["rslora"][:4] == (True, False, 8, 4)
    assert flags["dora"][:4] == (False, True, 8, 4)
    assert flags["adalora"][2:] == (8, 8, 6, 4)  # its r is LoRA's default, which it doesn't use
    assert config["prompt_tuning_init"] == "SAMPLE_VOCAB"


def test_texts_are_cut_to_what_the_model_has_positions_for(folders):
    long = {"text": "word " * 100, "label": 0}
    for method, room in (("lora", 64), ("prefix", 48), ("prompt", 48)):
        model, tokenizer = setup_peft_training(folders["bert"], method, labels=2)
        length = hf_training._length(model, None)
        assert length == room
        [row] = prepare(model, tokenizer, [long], length)
        assert len(row["input_ids"]) == room
        assert model(input_ids=torch.tensor([row["input_ids"]])).logits.isfinite().all()


def test_the_processes_share_a_batch_evenly(run, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    model, _ = setup_peft_training("tinylm")
    given = dict(epochs=1, steps=2, rate=1e-3, checkpoint_every=None, seed=0)
    made = hf_training._arguments(model, tmp_path, TEXTS, batch_size=6, **given)
    assert made.per_device_train_batch_size == 3
    with pytest.raises(ValueError, match="batch_size=3 cannot be shared by 2 devices"):
        hf_training._arguments(model, tmp_path, TEXTS, batch_size=3, **given)


def test_a_base_in_half_precision_trains_in_it(folders, tmp_path):
    model, tokenizer = setup_peft_training(folders["llama"], "lora", tmp_path, dtype=torch.bfloat16)
    trains = {p.dtype for p in model.parameters() if p.requires_grad}
    seen = []
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    metrics = train_with_peft(model, tokenizer, TEXTS, **OPTIONS | {"steps": 2})
    assert trains == {torch.float32} and set(seen) == {torch.bfloat16}
    assert all(map(math.isfinite, metrics["loss"]))


def test_a_seed_decides_the_start_and_leaves_the_random_state():
    before = torch.get_rng_state()
    one, two, other = (setup_peft_training("tinylm", seed=s)[0].state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    key = next(k for k in one if "lora_A" in k)
    assert torch.equal(one[key], two[key]) and not torch.equal(one[key], other[key])


def test_it_learns_a_real_task(tmp_path):
    task = load_task("sentiment").limit(train=200, test=200)
    data = task.examples("train")
    model, tokenizer = setup_peft_training("minilm", "lora", tmp_path, labels=2)
    options = dict(OPTIONS, steps=25, batch_size=12)
    metrics = train_with_peft(model, tokenizer, data, eval_dataset=data, **options)
    assert metrics["eval_accuracy"] > 0.65
    assert evaluate(model, task, "test").accuracy > 0.6


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("name", BASES)
def test_our_loader_opens_what_it_saved(run, folders, method, name, tmp_path):
    model, _ = run(name, method)
    ours = load_model(folders[name], BASES[name][0])
    load_adapter(ours, tmp_path / "out")
    assert (logits_of(ours, name) - logits_of(model, name)).abs().max() < 1e-5


# ------------------------------------------------------------------ labels and padding


def test_the_labels_are_the_tokens_and_padding_takes_no_loss():
    model, tokenizer = setup_peft_training("tinylm")
    rows = prepare(model, tokenizer, TEXTS[:2], 100)
    batch = hf_training._collator(model, tokenizer)(rows)
    ids, labels = batch["input_ids"], batch["labels"]
    real = batch["attention_mask"].bool()
    assert not real.all()
    assert (labels[:, 0] == -100).all() and (labels[~real] == -100).all()
    assert torch.equal(labels[:, 1:][real[:, 1:]], ids[:, 1:][real[:, 1:]])


def test_an_end_token_in_the_text_is_learned_though_padding_is_the_same():
    model, tokenizer = setup_peft_training("tinylm")
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = prepare(model, tokenizer, [{"input_ids": [5, 6, end]}, {"input_ids": [5, 6, 7, 8]}], 9)
    labels = hf_training._collator(model, tokenizer)(rows)["labels"]
    assert labels.tolist() == [[-100, 6, end, -100], [-100, 6, 7, 8]]


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_every_method_is_trained_on_the_same_predictions(run, folders, method):
    """The first loss is the mean over the tokens that have one before them, of the whole batch."""
    model, tokenizer = setup_peft_training(folders["llama"], method)
    rows = prepare(model, tokenizer, TEXTS[:4], 20)
    batch = hf_training._collator(model, tokenizer)(rows)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    _, metrics = run(model=model, data=TEXTS[:4], steps=1, batch_size=4)
    assert metrics["loss"][0] == pytest.approx(expected, abs=1e-5)


def test_a_classifier_s_loss_is_not_counted_once_for_each_label(run, folders):
    model, tokenizer = setup_peft_training(folders["bert"], labels=2)
    rows = prepare(model, tokenizer, ROWS[:4], 20)
    with torch.no_grad():
        expected = model(**hf_training._collator(model, tokenizer)(rows)).loss.item()
    _, metrics = run("bert", model=model, data=ROWS[:4], steps=1, batch_size=4)
    assert metrics["loss"][0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "told"), [("llama", True), ("bert", False)])
def test_only_a_language_model_is_told_over_how_many_labels_to_average(
    run, name, told, monkeypatch
):
    seen, step = [], PeftTrainer.training_step

    def noted(self, *args, **more):
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        seen.append((self.model_accepts_loss_kwargs, set(decay)))
        return step(self, *args, **more)

    monkeypatch.setattr(PeftTrainer, "training_step", noted)
    run(name, steps=1)
    assert seen == [(told, {0.0})]


def test_adalora_s_regulariser_is_no_part_of_what_is_measured(run, folders):
    model, metrics = run(method="adalora", eval_dataset=TEXTS[:2])
    rows = prepare(model, peft_lessons.load_tokenizer("tinylm"), TEXTS[:2], 20)
    batch = hf_training._collator(model, peft_lessons.load_tokenizer("tinylm"))(rows)
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


def test_classes_may_be_of_any_library(folders):
    model, tokenizer = setup_peft_training(folders["bert"], labels=2)
    for label in (1, 1.0, np.int64(1), torch.tensor(1), torch.tensor([1])):
        [row] = prepare(model, tokenizer, [{"text": "good", "label": label}], 9)
        assert row["labels"] == 1 and type(row["labels"]) is int


def test_training_leaves_the_random_states(run):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run(steps=1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_a_loss_that_is_no_number_ends_the_run(run, tmp_path):
    with pytest.raises(TrainingDiverged, match="step 3: loss nan"):
        run(learning_rate=1e30, checkpoint_every=3)
    assert not list((tmp_path / "out").glob("*"))


def test_a_decoder_s_classifier_is_measured_too(folders, tmp_path):
    """Its outputs hold more than logits."""
    model, tokenizer = setup_peft_training(folders["llama"], "lora", tmp_path, labels=2)
    metrics = train_with_peft(model, tokenizer, ROWS, eval_dataset=ROWS[:6], **OPTIONS)
    batch = tokenizer(
        [row["text"] for row in ROWS[:6]],
        padding=True,
        return_tensors="pt",
        truncation=True,
        max_length=20,
    )
    with torch.no_grad():
        found = model.eval()(**batch).logits.argmax(-1)
    right = (found == torch.tensor([row["label"] for row in ROWS[:6]])).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(right)


# ------------------------------------------------------------------ resume


def interrupt(monkeypatch, at):
    """The training stops before step `at`, counted from 0, like a closed laptop."""
    step = PeftTrainer.training_step

    def stop(self, *args, **more):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(PeftTrainer, "training_step", stop)


@pytest.mark.parametrize("method", HF_METHODS)
def test_an_interrupted_run_resumes_to_the_same_bits(run, method, tmp_path, monkeypatch):
    _, whole = run(method=method, folder="whole")
    for at in (3, 5, 7) if method == "adalora" else (5,):  # before, within and after the pruning
        folder = f"cut {at}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, at)
            run(method=method, folder=folder, checkpoint_every=2)
        assert not (tmp_path / folder / WEIGHTS).exists()
        _, resumed = run(method=method, folder=folder, checkpoint_every=2, resume=True)
        assert resumed["loss"] == whole["loss"]
        same = [load_file(tmp_path / f / WEIGHTS) for f in ("whole", folder)]
        assert list(same[0]) == list(same[1])
        assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])


def test_a_prefix_resumes_with_the_network_that_makes_it(run, folders, tmp_path, monkeypatch):
    """Trainer alone fails here: the adapter that it saves lacks the network."""

    def fresh():
        torch.manual_seed(0)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=5,
            prefix_projection=True,
            encoder_hidden_size=24,
        )
        return get_peft_model(load_model(folders["llama"]), config).train()

    _, whole = run(model=fresh(), folder="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5)
        run(model=fresh(), checkpoint_every=2)
    _, resumed = run(model=fresh(), checkpoint_every=2, resume=True)
    assert resumed["loss"] == whole["loss"]


def test_a_half_written_checkpoint_is_passed_over(run, tmp_path):
    _, whole = run(folder="whole")
    run(checkpoint_every=2)
    out = tmp_path / "out"
    assert not list(out.rglob("*.tmp"))
    (out / "checkpoint-8" / STATE).unlink()
    (out / WEIGHTS).unlink()
    _, resumed = run(checkpoint_every=2, resume=True)
    assert resumed["loss"] == whole["loss"]


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(run, missing, tmp_path, monkeypatch):
    _, whole = run(folder="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5)
        run(checkpoint_every=2)
    (tmp_path / "out" / "checkpoint-4" / missing).unlink()
    (tmp_path / "out" / "checkpoint-of mine").mkdir()
    _, resumed = run(checkpoint_every=2, resume=True)
    assert resumed["loss"] == whole["loss"]


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path):
    for step in (8, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in hf_training.NEEDED:
            (folder / name).touch()
    assert hf_training._checkpoint(tmp_path, resume=True).name == "checkpoint-10"


def test_a_broken_checkpoint_is_named(run, tmp_path):
    run(checkpoint_every=4)
    state = tmp_path / "out" / "checkpoint-8" / STATE
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="checkpoint-8.*broken or cut off"):
        run(resume=True)


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix"])
def test_a_run_at_its_end_takes_no_step_more(run, method, tmp_path):
    out = tmp_path / "out"
    _, whole = run(method=method, checkpoint_every=4)
    adapter = [out / CONFIG, out / WEIGHTS]
    before = [path.read_bytes() for path in adapter]
    for unsaved in (False, True):  # finished, or interrupted between its last step and the adapter
        for path in adapter if unsaved else ():
            path.unlink()
        _, resumed = run(method=method, checkpoint_every=4, resume=True)
        assert (resumed["steps"], resumed["loss"]) == (8, whole["loss"])
        assert [path.read_bytes() for path in adapter] == before


def test_resume_without_a_checkpoint_begins(run):
    _, metrics = run(resume=True)
    assert metrics["steps"] == 8


def test_what_a_run_was_begun_with_must_stay(run, folders, tmp_path):
    run(checkpoint_every=4)
    before = contents(tmp_path / "out")
    for change in (
        dict(batch_size=4),
        dict(learning_rate=0.5),
        dict(seed=3),
        dict(steps=12),
        dict(data=TEXTS[:4]),
        dict(data=TEXTS[::-1]),
    ):
        with pytest.raises(ValueError, match=f"begun with {next(iter(change))}"):
            run(checkpoint_every=4, resume=True, **change)
    for method, what in (("ia3", "method"), ("rslora", "rslora")):
        with pytest.raises(ValueError, match=f"begun with {what}"):
            run(method=method, checkpoint_every=4, resume=True)
    others = (
        (dict(r=4, lora_alpha=99), "begun with alpha 8, not 99"),
        (dict(r=5), r"has shape \(4, 64\), the model's \(5, 64\)"),
        (dict(r=4, use_dora=True), "holds nothing for .*lora_magnitude_vector"),
    )
    for settings, match in others:
        settings = dict(task_type="CAUSAL_LM", lora_alpha=8, target_modules="all-linear") | settings
        model = get_peft_model(load_model(folders["llama"]), LoraConfig(**settings))
        with pytest.raises(ValueError, match=match):
            run(model=model, checkpoint_every=4, resume=True)
    assert contents(tmp_path / "out") == before


def test_adalora_reaches_its_ranks_within_the_run(run, tmp_path, monkeypatch):
    steps, allocate = [], AdaLoraModel.update_and_allocate

    def noted(self, step):
        steps.append(step)
        return allocate(self, step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", noted)
    model, _ = run(method="adalora", steps=12)
    assert steps == list(range(1, 13))
    ranks = [sum(kept) for kept in model.active_peft_config.rank_pattern.values()]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1
    entries = json.loads((tmp_path / "out" / CONFIG).read_text(encoding="utf-8"))
    schedule = [entries[key] for key in ("total_step", "tinit", "tfinal", "deltaT")]
    assert schedule == [12, 1, 4, 1]


# ------------------------------------------------------------------ refusals


def test_an_unknown_method_is_refused_and_the_known_are_listed():
    with pytest.raises(ValueError, match=r"'lroa' is unknown; known are lora, rslora, dora"):
        setup_peft_training("tinylm", "lroa")
    with pytest.raises(ValueError, match=r"PEFT does not have it; .* BitFit"):
        setup_peft_training("tinylm", "bitfit")
    with pytest.raises(TypeError, match="method must be"):
        setup_peft_training("tinylm", 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(model_name="minilm"), "is an encoder.*labels=2"),
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(rank=300), r"rank=300 is above min\(in, out\) of 'model.layers.0.self_attn"),
        (dict(model_name="tinylmm"), "there is no model 'tinylmm'"),
        (dict(dtype=torch.float16), "needs a GPU"),
        (dict(seed=None), "seed=None must be a whole number"),
        (dict(model_name="t5"), "an encoder and a decoder"),
        (dict(model_name="t5", labels=2), "an encoder and a decoder"),
        (dict(model_name="gpt2", rank=100), r"rank=100 is above .* 'transformer.h.0.attn.c_attn'"),
    ],
)
def test_a_wrong_set_up_is_refused(folders, arguments, match):
    name = arguments.get("model_name", "tinylm")
    arguments = arguments | {"model_name": folders.get(name, name)}
    with pytest.raises(ValueError, match=match):
        setup_peft_training(**{"model_name": "tinylm"} | arguments)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        setup_peft_training("tinylm", "lora", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_tokenizer_without_padding_takes_its_end_token_or_is_refused():
    tokenizer = peft_lessons.load_tokenizer("tinylm")
    tokenizer.pad_token = None
    assert padded(tokenizer).pad_token == tokenizer.eos_token is not None
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        padded(tokenizer)


def test_an_older_run_is_kept(run, tmp_path):
    run(steps=2)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds an adapter of an older run"):
        run(steps=2)
    with pytest.raises(ValueError, match="a finished adapter and no checkpoint"):
        run(steps=2, resume=True)
    assert contents(tmp_path / "out") == before


def test_the_checkpoints_of_a_run_that_broke_off_are_kept_too(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5)
        run(checkpoint_every=2)
    with pytest.raises(ValueError, match="holds 2 checkpoints of an older run"):
        run(checkpoint_every=2)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("llama", [], r"train_dataset is empty"),
        ("llama", "a text", "must be a collection"),
        ("llama", 3, "must be a collection"),
        ("llama", ["fine, this one", ""], r"train_dataset\[1\] has \d tokens"),
        ("llama", [{"words": "x"}], r'train_dataset\[0\] has neither "text" nor "input_ids"'),
        ("llama", [None], r'train_dataset\[0\] has neither "text" nor "input_ids"'),
        ("llama", [(TEXTS[0], 1)], r'train_dataset\[0\] has neither "text" nor "input_ids"'),
        ("llama", [{"text": 3}], '"text" is no text'),
        ("llama", [{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 tokens and 2 labels"),
        ("llama", [{"input_ids": [[1, 2, 3]]}], '"input_ids" must be a list of whole numbers'),
        (
            "llama",
            [{"input_ids": [1, 4096]}],
            "the token 4096, and the model's table the rows 0 to",
        ),
        ("llama", [{"input_ids": [1, -1]}], "the token -1"),
        ("llama", [{"input_ids": [1, 2], "labels": [1, 4096]}], "must be tokens of 0 to 4095"),
        ("llama", [{"input_ids": [1, 2], "labels": [1, -100]}], "one at least must be"),
        ("llama", ROWS, "without labels=n at set-up, the label"),
        ("bert", [{"text": "good"}], r'train_dataset\[0\] has no "label"'),
        ("bert", [{"text": "good", "label": 2}], "label 2, but the model has classes 0 to 1"),
        ("bert", [{"text": "good", "label": 0.5}], 'no "label"'),
        ("bert", [{"text": "good", "label": "positive"}], 'no "label"'),
        ("bert", [{"text": "good", "label": [0, 1]}], 'no "label"'),
        ("bert", [{"text": "good", "label": True}], 'no "label"'),
        ("bert", [{"text": "good", "label": float("nan")}], 'no "label"'),
        ("bert", [{"text": "good", "label": -100}], "label -100, but the model has classes 0 to 1"),
        ("bert", [{"input_ids": [], "label": 1}], "has no token"),
    ],
)
def test_wrong_data_is_refused_before_anything_is_written(folders, tmp_path, name, data, match):
    labels = BASES[name][0]
    model, tokenizer = setup_peft_training(folders[name], "lora", tmp_path / "out", labels=labels)
    with pytest.raises(ValueError, match=match):
        train_with_peft(model, tokenizer, data, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_refused(run, tmp_path):
    model, tokenizer = setup_peft_training("tinylm", "prompt", tmp_path / "out")
    for options, match in (
        (dict(batch_size=0), "batch_size=0"),
        (dict(steps=0), "steps=0"),
        (dict(learning_rate=-1.0), "lr=-1"),
        (dict(checkpoint_every=0), "checkpoint_every=0"),
        (dict(steps=None, epochs=0), "epochs=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(eval_dataset=[]), "eval_dataset is empty"),
        (dict(max_length=10_000), "16 virtual tokens are more than the model's"),
    ):
        with pytest.raises(ValueError, match=match):
            train_with_peft(model, tokenizer, TEXTS, **(OPTIONS | options))
    with pytest.raises(TypeError, match="not PEFT's"):
        train_with_peft(load_model("tinylm"), tokenizer, TEXTS)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        train_with_peft(model, tokenizer, TEXTS)
    model, _ = setup_peft_training("tinylm", "lora", tmp_path / "out")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        train_with_peft(model, tokenizer, TEXTS)
    model.unmerge_adapter()
    model.add_adapter("other", model.active_peft_config)
    with pytest.raises(ValueError, match="holds the adapters 'default', 'other'"):
        train_with_peft(model, tokenizer, TEXTS)
    model.delete_adapter("other")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match="padding token 4096 has no row"):
        train_with_peft(model, tokenizer, TEXTS)
    assert not (tmp_path / "out").exists()


def test_any_collection_will_do(run):
    class Indexed:
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            return {"text": TEXTS[index]}

    given = [TEXTS, tuple(TEXTS), np.array(TEXTS), Indexed()]
    runs = [
        run(folder=str(k), data=data, eval_dataset=data, steps=2)[1] for k, data in enumerate(given)
    ]
    runs.append(run(folder="iter", data=iter(TEXTS), eval_dataset=iter(TEXTS), steps=2)[1])
    for key in ("loss", "eval_loss"):
        assert all(one[key] == runs[0][key] for one in runs)


# ------------------------------------------------------------------ merge


def rewritten(folder, change=None, **entries):
    tensors = load_file(folder / WEIGHTS)
    (change or (lambda _: None))(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | entries
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_merged_model_is_written_whole_and_opens_alone(run, folders, tmp_path):
    base = folders["llama"]
    run(steps=2)
    (tmp_path / "merged").mkdir()  # empty, as new
    merged = load_and_merge_adapter(base, tmp_path / "out", save_to=tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    assert torch.equal(logits_of(again, "llama"), logits_of(merged, "llama"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token
    with pytest.raises(ValueError, match="holds something already"):
        load_and_merge_adapter(base, tmp_path / "out", save_to=tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "merged"}


def test_an_adapter_that_does_not_fit_is_refused(run, folders, tmp_path):
    run(steps=2)
    base, out = folders["llama"], tmp_path / "out"
    for other in ("tinylm", "minilm"):
        with pytest.raises(ValueError, match="made for '.*llama'"):
            load_and_merge_adapter(other, out)
        with pytest.raises(ValueError, match="does not fit this base"):
            load_and_merge_adapter(other, out, check_base=False)
    key = next(iter(load_file(out / WEIGHTS)))
    run(steps=2, folder="whole")
    with pytest.raises(ValueError, match="misses .*lora_A"):
        load_and_merge_adapter(base, rewritten(out, lambda t: t.pop(key)))
    with pytest.raises(ValueError, match="no place in the model"):
        value = load_file(tmp_path / "whole" / WEIGHTS)[key]
        more = {key: value, key.replace("layers.0", "layers.9"): value.clone()}
        load_and_merge_adapter(base, rewritten(out, lambda t: t.update(more)))
    with pytest.raises(ValueError, match="NaN"):
        load_and_merge_adapter(base, rewritten(out, lambda t: t[key].fill_(torch.nan)))
    (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="broken or cut off"):
        load_and_merge_adapter(base, out)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_and_merge_adapter(base, tmp_path / "nowhere")


def test_an_overflow_in_half_precision_is_refused(run, folders, tmp_path):
    base = folders["llama"]
    run(steps=2)
    huge = rewritten(tmp_path / "out", lambda t: [v.fill_(200.0) for v in t.values()])
    with pytest.raises(ValueError, match="NaN or infinite weights in torch.float16"):
        load_and_merge_adapter(base, huge, dtype=torch.float16)


def test_our_own_adapter_merges_too(folders, tmp_path):
    base = folders["llama"]
    model = load_model(base)
    inject(model, LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    save_adapter(model, tmp_path)
    merged = load_and_merge_adapter(base, tmp_path)
    assert torch.allclose(logits_of(merged, "llama"), logits_of(model, "llama"), atol=1e-4)


def test_a_classifier_without_its_head_is_refused(run, folders, tmp_path):
    run("bert", steps=2)

    def beheaded(tensors):
        for key in [k for k in tensors if "classifier" in k]:
            del tensors[key]

    with pytest.raises(ValueError, match="its file holds no head"):
        load_and_merge_adapter(folders["bert"], rewritten(tmp_path / "out", beheaded))
