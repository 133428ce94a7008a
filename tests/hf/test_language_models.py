"""Conversations, learning rates and gradient checkpointing in the training with Trainer."""

import json

import pytest
from tiny import chat_tokenizer, tiny_llama

from peft_lessons import load_and_merge_adapter, load_tokenizer, train_with_peft
from peft_lessons import setup_peft_training as set_up
from peft_lessons.costs import recommend
from peft_lessons.costs.recommend import CANDIDATES, Advice, needs_of
from peft_lessons.data.chat import assistant, chat_tokens, pair_tokens, user
from peft_lessons.hf import cli, trainer
from peft_lessons.hf.setup import HF_METHODS, learning_rates, rate_of
from peft_lessons.hf.trainer import prepare

TALKS = [
    {"prompt": [user("Two and two?")], "completion": [assistant("Four.")]},
    {"messages": [user("Hi."), assistant("Hello."), user("Two?"), assistant("One and one.")]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a small random decoder whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("speaks")
    tiny_llama(vocab_size=4096, intermediate_size=128, seed=2).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def made(folder, method="lora", **options):
    return set_up(folder, method, rank=4, **options)


# ------------------------------------------------------------------ conversations


def test_conversations_are_learned_in_the_answers_alone(folder, tmp_path):
    model, tokenizer = made(folder)
    first, second = prepare(model, tokenizer, TALKS, 64)
    _, *expected = pair_tokens(tokenizer, TALKS[0]["prompt"], TALKS[0]["completion"])
    assert [first["input_ids"], first["labels"]] == expected
    _, *expected = chat_tokens(tokenizer, TALKS[1]["messages"])
    assert [second["input_ids"], second["labels"]] == expected
    assert first["attention_mask"] == [1] * len(first["input_ids"]) and first["labels"][0] == -100
    mixed = [*TALKS, {"text": "Beside them plain text."}] * 2
    metrics = train_with_peft(
        model, tokenizer, mixed, output_dir=tmp_path / "out", steps=12, batch_size=3,
        learning_rate=3e-2, eval_dataset=TALKS, checkpoint_every=4, show=False,
    )  # fmt: skip
    # An interruption may leave the newest half done.
    left = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert left == {"checkpoint-8", "checkpoint-12"}
    assert metrics["loss"][-1] < 0.8 * metrics["loss"][0] and metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"messages": [user("Hi.")]}, "no message of the assistant"),
        ({"prompt": [user("Hi.")]}, 'has no "completion"'),
        ({"completion": [assistant("Hi.")]}, 'has no "prompt"'),
        ({"prompt": "Hi.", "completion": "Hello."}, '"prompt" must be a list of messages'),
        ({"prompt": [user("Hi.")], "completion": []}, '"completion" must be a list of messages'),
        ({"messages": [user("Hi."), assistant("")]}, "message 1 is an empty answer"),
        ({"messages": [{"role": "gpt", "content": "Hi."}]}, "has the role 'gpt'"),
        (
            {"messages": [user("Hi."), assistant("no " * 60)]},
            r"answer ends at token \d+ of \d+, and max_length=40 would cut",
        ),
        ({"chosen": "a", "rejected": "b"}, 'neither "text" nor "input_ids", "messages", or'),
    ],
)
def test_wrong_conversations_are_refused(folder, example, message):
    model, tokenizer = made(folder)
    with pytest.raises(ValueError, match=rf"train_dataset\[1\].*{message}"):
        train_with_peft(model, tokenizer, [TALKS[0], example], max_length=40, show=False)


def test_conversations_need_a_template_and_a_model_that_speaks(folder):
    model, _ = made(folder)
    with pytest.raises(ValueError, match="no chat template"):
        prepare(model, load_tokenizer("tinylm"), TALKS, 64)
    classifier, tokenizer = made(folder, labels=2)
    with pytest.raises(ValueError, match=r"data\[0\] is a conversation, .*without labels"):
        prepare(classifier, tokenizer, TALKS, 64)


# ------------------------------------------------------------------ learning rates


def test_the_learning_rates_are_a_table_with_sources():
    rows = learning_rates()
    assert [row["method"] for row in rows] == list(HF_METHODS)
    for row in rows:
        assert row["language models"] < row["small models"], row
        assert row["source"].startswith("no published default") or any(
            f"{row['language models']:.0e}".replace("e-0", "e-") in part
            for part in row["source"].split()
        ), row
    low_rank = [row for row in rows if "lora" in row["method"] or row["method"] == "dora"]
    assert all(1e-4 <= row["language models"] <= 1e-3 for row in low_rank)


@pytest.mark.parametrize("row", learning_rates(), ids=lambda row: row["method"])
def test_the_default_learning_rate_depends_on_the_kind_of_model(folder, row):
    assert rate_of(made(folder, row["method"])[0]) == row["language models"]
    if row["method"] in ("lora", "dora", "norms"):
        assert rate_of(made("tinylm", row["method"])[0]) == row["small models"]
        assert rate_of(made("minilm", row["method"], labels=2)[0]) == row["small models"]
        assert rate_of(made(folder, row["method"], labels=2)[0]) == row["small models"]


def test_the_default_learning_rate_is_the_one_that_trains(folder, tmp_path, monkeypatch):
    rates, original = [], trainer._arguments
    monkeypatch.setattr(trainer, "_arguments", lambda *a: rates.append(a[4]) or original(*a))
    for rate in (None, 7e-4):
        options = dict(output_dir=tmp_path / str(rate), steps=1, learning_rate=rate, show=False)
        train_with_peft(*made(folder), TALKS, **options)
    assert rates == [2e-4, 7e-4]


# ------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("method", ["lora", "qlora", "ia3"])
def test_checkpointing_changes_the_memory_and_nothing_else(folder, method, tmp_path):
    losses = []
    for wanted in (None, True, False):
        model, tokenizer = made(folder, method, checkpointing=wanted)
        on = method == "qlora" if wanted is None else wanted
        assert model.is_gradient_checkpointing == on
        calls = []
        layer = model.get_base_model().model.layers[0].self_attn
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = tmp_path / str(wanted)
        options = dict(output_dir=out, steps=2, batch_size=2, show=False)
        losses.append(train_with_peft(model, tokenizer, TALKS, **options)["loss"])
        assert len(calls) == (4 if on else 2)  # twice a step: once more in the backward pass
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) == losses[2]


def test_checkpointing_is_refused_where_it_cannot_be(folder):
    with pytest.raises(ValueError, match="checkpointing=True: .*the cache, which holds the prefix"):
        made(folder, "prefix", checkpointing=True)
    made(folder, "prefix", checkpointing=False)
    with pytest.raises(TypeError, match="checkpointing must be True, False or None, got 'yes'"):
        made(folder, checkpointing="yes")


def test_the_command_line_switches_it_and_reads_conversations(folder, tmp_path, monkeypatch):
    for words, wanted in ([], None), (["--checkpointing"], True), (["--no-checkpointing"], False):
        assert cli.arguments(words).checkpointing is wanted
    models = []

    def noted(*place, **options):
        models.append(set_up(*place, **options))
        return models[-1]

    monkeypatch.setattr(cli, "setup_peft_training", noted)
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(map(json.dumps, TALKS)), encoding="utf-8")
    words = ["--model", folder, "--data", str(file), "--steps", "1", "--checkpointing"]
    assert cli.main([*words, "--output", str(tmp_path / "out")])["examples"] == 2
    assert models[0][0].is_gradient_checkpointing


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_adviser_counts_what_the_trainer_switches_on(name, folder, monkeypatch):
    """What is counted with checkpointing is trained with it, and what is not, is not."""
    counted, original = {}, recommend.training_memory

    def note(shape, method, *, checkpointing, **more):
        counted[type(method)] = checkpointing
        return original(shape, method, checkpointing=checkpointing, **more)

    monkeypatch.setattr(recommend, "training_memory", note)
    needs_of(8, labels=False)
    options = Advice(name).arguments
    if CANDIDATES[name].method is None:
        assert options is None
        return
    assert options["checkpointing"] == counted[type(CANDIDATES[name].method)]
    model, _ = set_up(folder, **options)
    assert model.is_gradient_checkpointing == options["checkpointing"]
    config, advised = model.active_peft_config, Advice(name)
    for setting in ("r", "init_r", "target_r", "lora_alpha", "num_virtual_tokens", "use_dora"):
        assert getattr(config, setting, None) == getattr(advised.config, setting, None), setting


def test_an_adapter_of_another_chat_template_is_refused(folder, tmp_path):
    model, tokenizer = made(folder)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    load_and_merge_adapter(folder, adapter)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match="another chat template"):
        load_and_merge_adapter(folder, adapter, save_to=merged)
    assert not merged.exists()
    load_and_merge_adapter(folder, adapter, save_to=merged, check_base=False)
    assert load_tokenizer(merged).chat_template == tokenizer.chat_template
