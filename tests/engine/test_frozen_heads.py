"""Sequence classifiers that did not come from load_model: their head is frozen, and in the file."""

from copy import deepcopy

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    FEED_FORWARD,
    SIZES,
    perturb,
    read_config,
    refused,
    same,
    same_adapter,
    state,
    tiny_bert,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_lessons import (
    BitFit,
    BottleneckAdapter,
    LoRA,
    PiSSA,
    Prompt,
    freeze,
    inject,
    load_adapter,
    load_and_merge_adapter,
    load_model,
    merge,
    report,
    save_adapter,
    unload,
)
from peft_lessons.engine import WEIGHTS, fingerprint, injection_of

IDS = torch.arange(3, 27).view(2, 12)


BLOCKS = dict(**SIZES, **FEED_FORWARD, num_labels=3)
SHORT = dict(max_position_embeddings=64)


def bert():
    return BertForSequenceClassification(BertConfig(**BLOCKS, **SHORT))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**BLOCKS, **SHORT))


def distilbert():
    sizes = dict(dim=64, n_layers=2, n_heads=4, hidden_dim=96)
    config = DistilBertConfig(vocab_size=128, num_labels=3, **sizes, **SHORT)
    return DistilBertForSequenceClassification(config)


def llama():
    config = LlamaConfig(**BLOCKS, num_key_value_heads=2, pad_token_id=0)
    return LlamaForSequenceClassification(config)


# {family: (the model, its head, layers for a method)}
CLASSIFIERS = {
    "bert": (bert, ("classifier",), ("query", "value")),
    "roberta": (roberta, ("classifier",), ("query", "value")),
    "distilbert": (distilbert, ("pre_classifier", "classifier"), ("q_lin", "v_lin")),
    "llama": (llama, ("score",), ("q_proj", "v_proj")),
}
METHODS = {
    "LoRA": lambda targets: LoRA(4, 6, targets),
    "PiSSA": lambda targets: PiSSA(2, 3, targets),
    "all-linear": lambda targets: LoRA(4, 6, "all-linear"),
    "prompt": lambda targets: Prompt(6),
}
EACH = pytest.mark.parametrize("family", CLASSIFIERS)


def base_of(family):
    torch.manual_seed(0)
    return perturb(CLASSIFIERS[family][0](), 0.05)


def another_head(model):
    torch.manual_seed(9)
    for name, p in model.named_parameters():
        if name.startswith(("pre_classifier.", "classifier.", "score.")):
            p.data.normal_()
    return model


def saved(family, folder, method, modules_to_save=()):
    """Return (a model with the method, saved in the folder; the report of inject)."""
    ours = base_of(family)
    summary = inject(ours, method, modules_to_save)
    save_adapter(perturb(ours), folder)
    return ours, summary


def in_ours(base, folder, **options):
    load_adapter(base, folder, **options)
    return base


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def opened_by_peft(base, folder):
    return peft.PeftModel.from_pretrained(base, folder)


def apart(a, b):
    return (logits(a) - logits(b)).abs().max()


@EACH
def test_the_report_says_that_the_head_is_frozen_and_how_to_train_it(family):
    model, (_, head, targets) = base_of(family), CLASSIFIERS[family]
    summary = inject(model, LoRA(4, 6, targets))
    assert summary.frozen_head == head and repr(report(model)) == repr(summary)
    assert not any(p.requires_grad for path in head for p in model.get_submodule(path).parameters())
    lines = repr(summary).splitlines()
    assert f"  Frozen in the classification head: {', '.join(head)}." in lines
    assert f"  To train the head too, pass modules_to_save={head!r}." in lines
    unload(model)
    assert repr(freeze(model)).splitlines()[-2:] == lines[-2:]

    summary = inject(model, LoRA(4, 6, targets), modules_to_save=head)
    assert summary.whole == head and not summary.frozen_head and "Frozen" not in repr(summary)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("roberta", LoRA(2, 6, ("query", "out_proj"))),
        ("llama", LoRA(2, 6, ("q_proj", "score"))),
        ("bert", BitFit()),
    ],
)
def test_a_head_that_the_method_trains_is_not_called_frozen(family, method, tmp_path):
    ours, summary = saved(family, tmp_path, method)
    assert not summary.frozen_head and "Frozen" not in repr(summary)
    config = read_config(tmp_path)
    assert config["task_type"] is None and config["modules_to_save"] is None
    assert torch.equal(logits(in_ours(base_of(family), tmp_path)), logits(ours))
    if config["peft_type"] == "LORA":
        assert apart(opened_by_peft(base_of(family), tmp_path), ours) < 1e-6
    # The head that the method changes is the base's.
    with refused(model := another_head(base_of(family)), "base with other weights"):
        load_adapter(model, tmp_path)


def test_the_reports_of_other_models_say_nothing_of_a_head():
    for model in (tiny_bert(), load_model("minilm", labels=2)):
        assert "Frozen" not in repr(inject(model, LoRA(4, 6, ("query",))))
        assert injection_of(model).frozen_head == ()


@pytest.mark.parametrize(
    ("family", "row"),
    [
        *(("bert", row) for row in METHODS),
        ("roberta", "all-linear"),
        ("distilbert", "LoRA"),
        ("llama", "prompt"),
    ],
)
def test_the_file_gives_the_same_logits_on_any_head(family, row, tmp_path):
    head, targets = CLASSIFIERS[family][1:]
    ours, _ = saved(family, tmp_path, METHODS[row](targets))
    assert read_config(tmp_path)["modules_to_save"] == list(head)
    assert apart(base_of(family), ours) > 1e-3

    for base in (base_of(family), another_head(base_of(family))):
        assert apart(opened_by_peft(deepcopy(base), tmp_path), ours) < 1e-6
        before = state(base)
        summary = load_adapter(base, tmp_path, trainable=True)
        assert apart(base, ours) < 1e-6
        assert training(base) == training(ours) and summary.frozen_head == head
        assert save_adapter(base, tmp_path / "again") and same(state(unload(base)), before)
    if row != "PiSSA":  # it becomes a LoRA on the way
        assert same_adapter(tmp_path / "again", tmp_path)


@EACH
def test_a_head_in_modules_to_save_is_in_the_file_and_trains(family, tmp_path):
    head, targets = CLASSIFIERS[family][1:]
    ours, _ = saved(family, tmp_path, LoRA(4, 6, targets), head)
    config = read_config(tmp_path)
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == list(head)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert "peft_lessons_frozen" not in file.metadata()
    base = another_head(base_of(family))
    assert apart(opened_by_peft(deepcopy(base), tmp_path), ours) < 1e-6
    load_adapter(base, tmp_path, trainable=True)
    assert torch.equal(logits(base), logits(ours)) and training(base) == training(ours)


def test_a_part_of_a_head_is_not_a_head_for_peft(tmp_path):
    ours, _ = saved("roberta", tmp_path, LoRA(4, 6, ("query",)), ("out_proj",))
    assert read_config(tmp_path)["task_type"] is None
    assert apart(opened_by_peft(base_of("roberta"), tmp_path), ours) < 1e-6
    assert torch.equal(logits(in_ours(base_of("roberta"), tmp_path)), logits(ours))


def test_a_head_of_which_one_module_trains_is_whole_in_the_file(tmp_path):
    """PEFT takes every module for a head whose name ends in "classifier"."""
    ours, summary = saved("distilbert", tmp_path, LoRA(4, 6, ("q_lin",)), ("classifier",))
    assert summary.whole == ("classifier",) and summary.frozen_head == ("pre_classifier",)
    assert apart(opened_by_peft(another_head(base_of("distilbert")), tmp_path), ours) < 1e-6


def test_a_base_that_differs_in_the_end_of_one_weight_is_another():
    model, other = base_of("bert"), base_of("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[-8:] += 1.0
    assert fingerprint(model) == fingerprint(base_of("bert")) != fingerprint(other)


@pytest.mark.parametrize("method", [BottleneckAdapter(8), LoRA(4, 6, ("query",))])
def test_another_body_is_refused(method, tmp_path):
    saved("bert", tmp_path, method)
    with refused(model := perturb(base_of("bert"), 0.05), "base with other weights"):
        load_adapter(model, tmp_path)


def test_a_file_of_peft_without_the_head_leaves_it_alone(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query"])
    theirs = perturb(peft.get_peft_model(base_of("bert"), config))
    theirs.save_pretrained(tmp_path)
    ours = in_ours(base_of("bert"), tmp_path)
    assert apart(theirs, ours) < 1e-6
    save_adapter(ours, tmp_path / "again")
    assert apart(opened_by_peft(another_head(base_of("bert")), tmp_path / "again"), ours) < 1e-6


def test_a_file_whose_fingerprint_covers_the_head_still_opens(tmp_path):
    """Earlier files of the course had one."""
    ours, _ = saved("bert", tmp_path, LoRA(4, 6, ("query",)), ("classifier",))
    header = {"format": "pt", "peft_lessons_base": fingerprint(base_of("bert"))}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, header)
    assert torch.equal(logits(in_ours(base_of("bert"), tmp_path)), logits(ours))
    with refused(model := another_head(base_of("bert")), "base with other weights"):
        load_adapter(model, tmp_path)


def test_a_merged_classifier_keeps_the_head_of_the_file(tmp_path):
    ours, _ = saved("bert", tmp_path, LoRA(4, 6, ("query",)))
    again = in_ours(another_head(base_of("bert")), tmp_path)
    merge(again)
    assert apart(unload(again), ours) < 1e-5


def test_the_adapter_merges_into_a_base_that_load_model_gives_a_new_head(tmp_path):
    ours = load_model("minilm", labels=2)
    del ours.fresh_modules
    inject(ours, LoRA(4, 6, ("query",)))
    save_adapter(perturb(ours), tmp_path)
    merged = load_and_merge_adapter("minilm", tmp_path)
    assert apart(merged, ours) < 1e-5
