"""Loading the base models: what comes back, what is refused, and what stays untouched."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import perturb
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from peft_lessons import measure
from peft_lessons.data.base_models import (
    MeanPooledBertForSequenceClassification,
    load_model,
    load_tokenizer,
)
from peft_lessons.data.bundled import bundled_files, data_folder

TEXTS = ["The film is wonderful.", "A great movie!", "Interest rates were raised by the bank."]


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv("PEFT_LESSONS_BASE", raising=False)
    monkeypatch.delenv("PEFT_LESSONS_DATA", raising=False)


@pytest.fixture
def batch():
    return load_tokenizer("minilm")(TEXTS, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return folders with tiny models: a BERT without its pooler, a DistilBERT and a Llama."""
    top = tmp_path_factory.mktemp("tiny")
    size = dict(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    size |= dict(intermediate_size=128)
    distilbert = dict(vocab_size=50, dim=64, n_layers=1, n_heads=2, hidden_dim=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, model in (
            ("bert", BertModel(BertConfig(**size), add_pooling_layer=False)),
            ("distilbert", DistilBertModel(DistilBertConfig(**distilbert))),
            ("llama", LlamaForCausalLM(LlamaConfig(**size))),
            ("narrow", LlamaForCausalLM(LlamaConfig(**size | dict(hidden_size=32)))),
            ("inner", LlamaForCausalLM(LlamaConfig(**size | dict(intermediate_size=96)))),
        ):
            model.save_pretrained(top / name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(data_folder() / "models/minilm" / file, top / name)
    return top


@pytest.fixture
def copy_of_data(tmp_path, monkeypatch):
    """Return a data folder of our own with the bundled encoder, to be damaged."""
    shutil.copytree(data_folder() / "models/minilm", tmp_path / "models/minilm")
    shutil.copy(data_folder() / "checksums.json", tmp_path)
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
    return tmp_path


def test_the_encoder_gives_token_states_near_for_similar_sentences(batch):
    model = load_model("minilm")
    assert type(model) is BertModel and model.pooler is None and not model.training
    assert model.fresh_modules == ()
    assert model.name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    assert model.config.name_or_path == model.name_or_path
    states = model(**batch).last_hidden_state
    assert states.shape == (*batch["input_ids"].shape, 384) and states.dtype == torch.float32
    mask = batch["attention_mask"][..., None]
    film, movie, bank = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert film @ movie > 0.6 and film @ bank < 0.2


@pytest.mark.parametrize(("name", "head"), [("minilm", "classifier"), ("tinylm", "score")])
def test_weights_are_the_files(name, head):
    stored = load_file(data_folder() / f"models/{name}/model.safetensors")
    stored = {n: tensor for n, tensor in stored.items() if not n.startswith("pooler")}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for model in (load_model(name), load_model(name, labels=3)):
        loaded = {n.removeprefix("bert."): p for n, p in model.named_parameters() if head not in n}
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[n], stored[n].float()) for n in loaded)
    half = load_model(name, labels=2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_classifier_is_the_mean_over_the_mask(batch):
    model = load_model("minilm", labels=3)
    assert type(model) is MeanPooledBertForSequenceClassification
    assert model.fresh_modules == ("classifier",) and not model.training
    assert model.config.num_labels == 3 and model.bert.pooler is None
    labels = torch.tensor([0, 1, 2])
    output = model(**batch, labels=labels)
    states = model.bert(**batch).last_hidden_state
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        logits = model.classifier(states[row, :length].mean(0))
        torch.testing.assert_close(output.logits[row], logits, atol=1e-6, rtol=0)
    loss = -output.logits.log_softmax(-1)[range(3), labels].mean()
    torch.testing.assert_close(output.loss, loss)
    assert model(**batch).loss is None
    assert torch.equal(model(**batch, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("soft", [None, "PrefixTuningConfig", "PromptTuningConfig"])
def test_padding_changes_nothing_also_under_the_prompts_of_peft(batch, soft):
    model = load_model("minilm", labels=2)
    if soft:
        config = getattr(peft, soft)(task_type="SEQ_CLS", num_virtual_tokens=4)
        model = peft.get_peft_model(model, config).eval()
    alone = load_tokenizer("minilm")(TEXTS[1], return_tensors="pt")
    expected = model(**batch).logits[1:2]
    torch.testing.assert_close(model(**alone).logits, expected, atol=1e-6, rtol=0)
    if not soft:
        del alone["attention_mask"]
        torch.testing.assert_close(model(**alone).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "head"), [("minilm", "classifier"), ("tinylm", "score")])
def test_a_new_head_is_decided_by_its_seed(name, head):
    torch.manual_seed(1)
    one, torch_state = load_model(name, labels=2), torch.manual_seed(2).get_state()
    two = load_model(name, labels=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    heads = (m.get_submodule(head) for m in (one, two, load_model(name, labels=2, seed=1)))
    first, again, other = (h.weight for h in heads)
    assert torch.equal(first, again) and not torch.equal(first, other)
    if name == "minilm":
        assert first.std().item() == pytest.approx(0.02, rel=0.1) and not one.classifier.bias.any()


def test_the_decoder():
    model, tokenizer = load_model("tinylm"), load_tokenizer("tinylm")
    assert type(model) is LlamaForCausalLM and not model.training and model.fresh_modules == ()
    assert model.name_or_path == model.config.name_or_path == "tinylm"
    assert model.num_parameters() == 3_221_952 and model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    logits = model(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, 4096)
    # Its folder is a plain checkpoint that transformers opens alone.
    folder = data_folder() / "models/tinylm"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(plain(**ids).logits, logits)


def test_a_classifier_on_the_decoder_reads_the_last_token():
    model, tokenizer = load_model("tinylm", labels=3), load_tokenizer("tinylm")
    assert type(model) is LlamaForSequenceClassification and model.fresh_modules == ("score",)
    logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    for row, text in enumerate(TEXTS):
        alone = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(logits[row], model.score(alone[0, -1]), atol=1e-5, rtol=0)


def test_the_tokenizers():
    tokenizer = load_tokenizer("minilm")
    ids = tokenizer(["Hello, world!", "a"])["input_ids"]
    assert ids == [[101, 7592, 1010, 2088, 999, 102], [101, 1037, 102]]
    assert tokenizer.pad_token_id == 0
    tokenizer = load_tokenizer("tinylm")
    assert len(tokenizer) == 4096 and tokenizer.model_max_length == 512
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    text = "Emma paid £1,500\nfor naïve 語."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens(ids).count("5") == 1  # digits stand alone


def test_generating_is_deterministic_and_quiet(recwarn, caplog):
    model, tokenizer = load_model("tinylm"), load_tokenizer("tinylm")
    batch = tokenizer("The quick brown", return_tensors="pt")
    start = batch["input_ids"].shape[1]
    one = model.generate(**batch)
    assert start < one.shape[1] <= start + model.generation_config.max_new_tokens
    torch.manual_seed(123)
    assert torch.equal(model.generate(**batch), one)
    greedy = model(one[:, :-1]).logits[0, start - 1 :].argmax(-1)
    assert torch.equal(greedy, one[0, start:])
    assert not recwarn.list and not caplog.records


def four_bit_layers(model) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]


@pytest.mark.parametrize(
    ("name", "labels", "layers", "full"),
    [("tinylm", None, 42, ["lm_head"]), ("minilm", 2, 36, ["classifier"])],
)
def test_four_bit(name, labels, layers, full):
    whole = load_model(name, labels=labels)
    model = load_model(name, labels=labels, four_bit=True).cpu()
    assert type(model) is type(whole) and not model.training
    assert model.fresh_modules == whole.fresh_modules
    assert len(four_bit_layers(model)) == layers
    assert [n for n, m in model.named_modules() if type(m) is torch.nn.Linear] == full
    rest = {n: p for n, p in model.named_parameters() if p.dtype != torch.uint8}
    originals = dict(whole.named_parameters())
    assert all(torch.equal(p, originals[n]) for n, p in rest.items())
    assert measure.parameters(model).total == measure.parameters(whole).total
    for path in four_bit_layers(model):
        state = model.get_submodule(path).weight.quant_state
        assert state.quant_type == "nf4" and state.nested


def test_four_bit_is_near_the_whole_model_and_computes_in_its_dtype():
    ids = load_tokenizer("tinylm")(TEXTS[2], return_tensors="pt")
    model = load_model("tinylm", four_bit=True).cpu()
    logits, expected = model(**ids).logits, load_model("tinylm")(**ids).logits
    error = (logits - expected).norm() / expected.norm()
    assert 0.01 < error < 0.4
    half = load_model("tinylm", dtype=torch.bfloat16, four_bit=True).cpu()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.uint8}
    assert {half.get_submodule(n).compute_dtype for n in four_bit_layers(half)} == {torch.bfloat16}
    logits = half(**ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_an_eval_forward_leaves_four_bit_gradients_alone():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = perturb(peft.get_peft_model(load_model("tinylm", four_bit=True).cpu(), config))
    ids = load_tokenizer("tinylm")(TEXTS, padding=True, return_tensors="pt")

    def gradients():
        model.train().zero_grad()
        model(**ids, labels=ids["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    assert all(g.any() for g in before.values())
    with torch.no_grad():
        model.eval()(**ids)
    after = gradients()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


@pytest.mark.parametrize("labels", [None, 3])
def test_four_bit_refuses_widths_that_are_computed_wrongly(tiny, tmp_path, labels):
    model = load_model(tiny / "llama", labels=labels, four_bit=True)
    for folder, layer, width in (("narrow", "q_proj", 32), ("inner", "down_proj", 96)):
        with pytest.raises(ValueError, match=rf"{layer} of .* {width} inputs.*four_bit=False"):
            load_model(tiny / folder, labels=labels, four_bit=True)
        load_model(tiny / folder, labels=labels)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="quantised already"):
        load_model(tmp_path / "quantised", labels=labels, four_bit=True)


def test_four_bit_leaves_fresh_modules_of_others_whole(tiny):
    for name in ("bert", "distilbert"):
        model = load_model(tiny / name, labels=2, four_bit=True)
        assert len(four_bit_layers(model)) == 6 and len(model.fresh_modules) == 2
        whole = load_model(tiny / name, labels=2)
        for path in model.fresh_modules:
            ours, theirs = model.get_submodule(path).weight, whole.get_submodule(path).weight
            assert torch.equal(ours.cpu(), theirs)


def test_missing_file(copy_of_data):
    (copy_of_data / "models/minilm/tokenizer.json").unlink()
    for load in (load_tokenizer, load_model):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*python data/build_minilm"):
            load("minilm")
    state = {file.path: file for file in bundled_files()}["models/minilm/tokenizer.json"]
    assert (state.present, state.size, state.intact) == (False, 0, False)
    (copy_of_data / "checksums.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"git checkout -- data/checksums\.json"):
        load_model("minilm")


def test_damaged_file(copy_of_data):
    file = copy_of_data / "models/minilm/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    load_model("minilm")
    with pytest.raises(ValueError, match=r"model\.safetensors.*damaged.*data/build_minilm\.py"):
        load_model("minilm", verify=True)
    state = {file.path: file for file in bundled_files()}["models/minilm/model.safetensors"]
    assert state.present and not state.intact
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors.*1000 bytes.*data/build_minilm\.py"):
        load_model("minilm")


def test_a_model_loads_whatever_its_licence_looks_like(copy_of_data):
    (copy_of_data / "models/minilm/LICENSE").unlink()
    (copy_of_data / "models/minilm/NOTICE").write_text("see elsewhere\r\n", encoding="utf-8")
    load_model("minilm", verify=True)
    states = {file.path: file for file in bundled_files()}
    for name, present in (("LICENSE", False), ("NOTICE", True)):
        file = states[f"models/minilm/{name}"]
        assert file.present == present and not file.intact


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_name(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("miniln", "nobody/nothing"):
        with pytest.raises(ValueError, match=rf"'{name}'.*'minilm'.*Any Hub id or local folder"):
            load(name)
    with pytest.raises(TypeError, match="name must be a string, got 7"):
        load(7)


def test_wrong_arguments_are_refused():
    for arguments, error, match in (
        (dict(labels=1), ValueError, "labels must be at least 2, got 1"),
        (dict(labels=True), TypeError, "labels must be an integer"),
        (dict(dtype=torch.int8), TypeError, "dtype must be a floating dtype"),
        (dict(four_bit=4), TypeError, "four_bit must be True or False, got 4"),
        (dict(dtype=torch.float64, four_bit=True), ValueError, "not in torch.float64"),
    ):
        with pytest.raises(error, match=match):
            load_model("minilm", **arguments)


def test_a_local_folder(tiny):
    for name, base, fresh in (
        ("bert", "BertModel", ("bert.pooler.dense", "classifier")),
        ("llama", "LlamaForCausalLM", ("score",)),
    ):
        plain = load_model(tiny / name)
        assert type(plain).__name__ == base and plain.fresh_modules == ()
        model = load_model(str(tiny / name), labels=3)
        assert type(model).__name__.endswith("ForSequenceClassification")
        assert model.fresh_modules == fresh and not model.training
        assert model.config.pad_token_id is not None


def test_a_decoder_with_several_end_tokens_pads_with_the_first(tiny, tmp_path):
    """Llama 3 has three; a classifier on it looks for one padding token."""
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    file = tmp_path / "llama/config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"eos_token_id": [7, 9, 11], "pad_token_id": None}
    file.write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "llama/generation_config.json").unlink(missing_ok=True)
    model = load_model(tmp_path / "llama", labels=2)
    assert model.config.pad_token_id == 7
    ids = torch.tensor([[5, 6, 7, 7], [5, 6, 8, 4]])
    assert torch.allclose(model(ids).logits[0], model(ids[:1, :2]).logits[0], atol=1e-6)


def test_incomplete_weights(tiny, tmp_path):
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    file = tmp_path / "llama/model.safetensors"
    rest = {k: v for k, v in load_file(file).items() if "q_proj" not in k}
    save_file(rest, file, metadata={"format": "pt"})
    for labels in (None, 2):
        with pytest.raises(ValueError, match=r"lack or do not fit .*q_proj"):
            load_model(tmp_path / "llama", labels=labels)


def test_base_override(tiny, monkeypatch):
    monkeypatch.setenv("PEFT_LESSONS_BASE", str(tiny / "distilbert"))
    assert load_model("minilm", labels=2).config.dim == 64
    assert load_tokenizer("minilm").pad_token == "[PAD]"
    assert type(load_model("tinylm")) is LlamaForCausalLM
    monkeypatch.setenv("PEFT_LESSONS_BASE", "no-such-folder")
    with pytest.raises(ValueError, match="no-such-folder"):
        load_model("minilm")
    monkeypatch.setenv("PEFT_LESSONS_BASE", "minilm")
    assert type(load_model("minilm")) is BertModel
