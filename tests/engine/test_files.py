"""Adapter files: written for Hugging Face PEFT and by it, and every file that must be refused."""

import json
import math
import os
from copy import deepcopy
from dataclasses import dataclass, replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    MODELS,
    TARGETS,
    TinyTask,
    contents,
    lora_config,
    perturb,
    read_config,
    refused,
    rewrite,
    same,
    same_adapter,
    state,
    task_type,
    tiny_bert,
    tiny_llama,
)
from torch import nn

from peft_lessons import (
    DiffPruning,
    LoRA,
    fit,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import (
    CONFIG,
    WEIGHTS,
    Method,
    PeftFiles,
    injection_of,
    read_adapter,
    registered,
)

WHOLE = {"llama": "model.norm", "bert": "pooler"}  # trains in full, with the new head of bert
IDS = torch.arange(3, 27).view(2, 12)
QV = LoRA(rank=4, alpha=6, targets=("q_proj", "v_proj"))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted(model, method=QV, modules_to_save=()):
    torch.manual_seed(3)  # what the method draws
    inject(model, method, modules_to_save)
    return perturb(model)


def theirs_on(base, targets, task=None, **settings):
    config = lora_config(LoRA(4, 6, targets), task, **settings)
    return perturb(peft.get_peft_model(base, config))


def in_peft(base, folder):
    return peft.PeftModel.from_pretrained(base, folder).eval()


def in_ours(base, folder):
    load_adapter(base, folder)
    return base


@pytest.fixture
def saved(tmp_path):
    """Return the folder of an adapter for tiny_llama."""
    return save_adapter(adapted(tiny_llama()), tmp_path / "adapter")


# ------------------------------------------------------------------ ours to PEFT and back


@pytest.mark.parametrize("name", WHOLE)
def test_modules_that_train_in_full_go_to_peft_and_back_without_a_warning(name, tmp_path, recwarn):
    build, targets, whole = MODELS[name], TARGETS[name], WHOLE[name]
    ours = adapted(build(), LoRA(4, 6, targets), whole)
    save_adapter(ours, tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS}
    assert torch.equal(logits(in_peft(build(), tmp_path)), logits(ours))
    assert not [w for w in map(str, recwarn) if "is_gradient_checkpointing" not in w]
    theirs = theirs_on(build(), targets, task_type(name), modules_to_save=[whole])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build()
    untouched = state(ours)
    summary = load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(build()))
    assert not any(p.requires_grad for p in ours.parameters())
    assert summary.fresh == (("classifier",) if name == "bert" else ())
    # Back to PEFT, through our files.
    save_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(in_peft(build(), tmp_path / "again")), logits(theirs))
    assert same(state(unload(ours)), untouched)


def test_a_new_head_goes_with_its_task_type(tmp_path):
    ours = adapted(tiny_bert(), LoRA(4, 6, ("query",)))
    save_adapter(ours, tmp_path)
    config = read_config(tmp_path)
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    assert config["inference_mode"] is True  # as PEFT's own files say
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(tensors["base_model.model.classifier.weight"], ours.classifier.weight)
    # PEFT without a task type leaves the head at random and out of the file.
    theirs_on(tiny_bert(), ("query",)).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"misses 'base_model.model.classifier.bias'"):
        load_adapter(tiny_bert(), tmp_path / "headless")


def test_half_precision_bases(tmp_path):
    def base():
        return tiny_llama().bfloat16()

    ours = adapted(base(), LoRA(4, 6, TARGETS["llama"]), "model.norm")
    save_adapter(ours, tmp_path)
    kinds = {k: t.dtype for k, t in load_file(tmp_path / WEIGHTS).items()}
    assert {t for k, t in kinds.items() if "lora_" in k} == {torch.float32}
    assert kinds["base_model.model.model.norm.weight"] == torch.bfloat16
    for open_with in (in_ours, in_peft):
        assert torch.equal(logits(open_with(base(), tmp_path)), logits(ours))
    save_adapter(adapted(tiny_llama()), tmp_path)
    load_adapter(base(), tmp_path)  # what was made on the same base in float32


def test_a_tied_model(tmp_path):
    def base():
        return tiny_llama(tie_word_embeddings=True)

    ours = adapted(base())
    save_adapter(ours, tmp_path)
    for open_with in (in_ours, in_peft):
        assert torch.equal(logits(open_with(base(), tmp_path)), logits(ours))


def test_the_smallest_config_of_peft(tmp_path):
    ours = adapted(tiny_llama(), LoRA(4, 8, ("q_proj",)))
    save_adapter(ours, tmp_path)
    rewrite(tmp_path)
    small = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}  # alpha: PEFT's default, 8
    for more, as_ours in (
        ({}, True),
        ({"target_modules": r".*\.q_proj", "lora_dropout": 0.3}, True),
        ({"lora_alpha": 6}, False),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(small | more), encoding="utf-8")
        again = in_ours(tiny_llama(), tmp_path)
        assert torch.equal(logits(again), logits(ours)) == as_ours
        assert torch.equal(logits(again), logits(in_peft(tiny_llama(), tmp_path)))


def test_all_linear_is_saved_as_names(tmp_path):
    save_adapter(adapted(tiny_llama(), LoRA(4, 6, "all-linear")), tmp_path)
    assert len(read_config(tmp_path)["target_modules"]) == 14
    theirs_on(tiny_llama(), "all-linear").save_pretrained(tmp_path / "x")
    load_adapter(tiny_llama(), tmp_path / "x")


# ------------------------------------------------------------------ using what was loaded


def test_trainable_trains_on_and_frozen_says_how(tmp_path):
    save_adapter(adapted(tiny_bert(), LoRA(4, 6, ("query",))), tmp_path)
    with pytest.raises(ValueError, match="trainable=True"):
        fit(in_ours(tiny_bert(), tmp_path), TinyTask(), 2, show=False)
    model = tiny_bert()
    summary = load_adapter(model, tmp_path, trainable=True)
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = state(model)
    fit(model, TinyTask(), 3, show=False)
    moving = {n for n, now in state(model).items() if not torch.equal(before[n], now)}
    assert moving == {n for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path)
    assert torch.equal(logits(in_ours(tiny_bert(), tmp_path)), logits(model))


def test_what_was_loaded_and_merged_is_saved_as_it_was(saved, tmp_path):
    model = tiny_llama()
    load_adapter(model, saved)
    merge(model)
    unmerge(model)
    assert same_adapter(save_adapter(model, tmp_path / "again"), saved)


def test_any_folder_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = in_ours(tiny_llama(), saved)
    for folder in ("plain", "a/deep/one", "mit Ümlaut 漢字 'quoted'", "x/../y"):
        assert str(save_adapter(model, folder)) == folder
        assert same_adapter(tmp_path / folder, saved)


def test_onto_the_meta_device_a_load_is_a_check(saved):
    with torch.device("meta"):
        model = tiny_llama()
    load_adapter(model, saved)
    with torch.device("meta"):
        short = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="no place in the model"):
        load_adapter(short, saved)


# ------------------------------------------------------------------ an interrupted save


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_save_leaves_the_old_adapter_whole(saved, monkeypatch, at):
    before, calls, replace_ = contents(saved), [], os.replace
    other = adapted(tiny_llama(), LoRA(2, 5, ("k_proj",)))

    def failing(source, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        return replace_(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", failing)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(other, saved)
    assert contents(saved) == before  # and no temporary file beside them
    save_adapter(other, saved)  # and the folder can still be saved to
    load_adapter(tiny_llama(), saved)


# ------------------------------------------------------------------ what must not be saved


def nan_in(model):
    next(iter(injection_of(model).wrappers.values())).lora.lora_A.data[0, 0] = math.nan


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (merge, RuntimeError, "unmerge"),
        (nan_in, ValueError, r"q_proj\.lora_A.*NaN or infinity"),
        (lambda model: model.to("meta"), ValueError, "meta device"),
        (unload, ValueError, r"inject\(model"),
    ],
)
def test_saving_is_refused(saved, spoil, error, message):
    before, model = contents(saved), in_ours(tiny_llama(), saved)
    spoil(model)
    with refused(model, message, error):
        save_adapter(model, saved)
    assert contents(saved) == before


def test_the_folder_must_not_be_a_file(saved):
    model, before = adapted(tiny_llama()), contents(saved)
    with pytest.raises(ValueError, match=r"adapter_config\.json' is a file; name a folder"):
        save_adapter(model, saved / CONFIG)
    with pytest.raises(FileNotFoundError, match="an adapter is a folder"):
        load_adapter(tiny_llama(), saved / CONFIG)
    assert contents(saved) == before


# ------------------------------------------------------------------ what must not be loaded


def not_loaded(folder, message, model=None, error=ValueError, **options):
    """Assert that loading is refused, and that neither the model nor a file has changed."""
    model = tiny_llama() if model is None else model
    files = contents(folder) if folder.is_dir() else None
    with refused(model, message, error):
        load_adapter(model, folder, **options)
    assert files is None or contents(folder) == files


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def set_first(value):
    return lambda tensors: tensors.update({FIRST: value(tensors[FIRST])})


def filled(value):
    return set_first(lambda tensor: torch.full_like(tensor, value))


TENSORS = {
    "missing key": (lambda t: t.pop(FIRST), rf"misses '{FIRST}' of 8"),
    "missing keys": (
        lambda t: [t.pop(k) for k in list(t) if "lora_B" in k],
        "lora_B.weight' and 3 more of 8",
    ),
    "surplus key": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
        "no place in the model, 'base_model.model.lm_head",
    ),
    "wrong shape": (set_first(lambda t: t[:, :60].clone()), r"\(4, 60\) in the file.*\(4, 64\)"),
    "nan": (filled(math.nan), rf"{FIRST}' holds NaN or infinity; nothing was changed"),
    "inf": (filled(-math.inf), "NaN or infinity"),
    "whole numbers": (set_first(lambda t: t.to(torch.int64)), "torch.int64 numbers, .*floats"),
    "float8": (set_first(lambda t: t.to(torch.float8_e4m3fn)), "float8"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_wrong_tensors(saved, change, message):
    not_loaded(rewrite(saved, change), message)


CONFIGS = {
    "rank": (dict(r=3), r"\(4, 64\) in the file, but the model and the config ask for \(3, 64\)"),
    "no rank": (dict(r=...), r"ask for \(8, 64\)"),  # PEFT's default
    "rank of another type": (dict(r="4"), "describes no LoRA: .*rank='4' must be a whole number"),
    "rank above the layer": (dict(r=100), "rank=100 is above"),
    "fewer targets": (dict(target_modules=["q_proj"]), "no place in the model, .*v_proj"),
    "more targets": (dict(target_modules=["q_proj", "k_proj", "v_proj"]), "misses .*k_proj"),
    "unknown target": (dict(target_modules=["q_porj", "v_proj"]), "did you mean 'q_proj'"),
    "no targets": (dict(target_modules=...), "describes no LoRA: targets=None"),
    "saved module that is missing": (dict(modules_to_save=["norm"]), "misses .*norm.weight"),
    "saved modules as a string": (dict(modules_to_save="norm"), "must be a list of module names"),
    "no type": (dict(peft_type=...), "names no peft_type"),
    "another type": (dict(peft_type="XLORA"), "'XLORA' is not a method of the course; known.*LORA"),
    "type list": (dict(peft_type=["LORA"]), "is not a method of the course"),
    "another base": (
        dict(base_model_name_or_path="owner/other"),
        "made for 'owner/other', this model is 'owner/tiny': .*check_base=False",
    ),
    # Options that PEFT has and the course hasn't: a LoRA without them would be another function.
    **{
        name: ({name: value}, f"LoRA does not read {name}.*PeftModel")
        for name, value in {
            "rank_pattern": {"q_proj": 8},
            "bias": "lora_only",
            "init_lora_weights": "olora",
            "layers_to_transform": [0],
            "fan_in_fan_out": True,
            "of_a_later_version": 1,
        }.items()
    },
}


@pytest.mark.parametrize("entries, message", CONFIGS.values(), ids=CONFIGS)
def test_wrong_configs(saved, entries, message):
    model = tiny_llama()
    model.name_or_path = "owner/tiny"
    not_loaded(rewrite(saved, **entries), message, model)


def test_options_that_are_off_are_read_over(saved):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    expected = logits(in_ours(tiny_llama(), saved))
    for init in (True, "gaussian", False):
        rewrite(saved, **config | {"init_lora_weights": init})
        assert torch.equal(logits(in_ours(tiny_llama(), saved)), expected)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_files_that_are_cut_off(saved, file, share):
    whole = (saved / file).read_bytes().rstrip()  # without its last brace, not only the newline
    (saved / file).write_bytes(whole[: int(len(whole) * share)])
    not_loaded(saved, rf"{file} in '.*adapter' is broken or cut off")


@pytest.mark.parametrize("text", ["[]", "null", '{"a": 1}', "nonsense"])
def test_json_that_is_not_an_adapter(saved, text):
    (saved / CONFIG).write_text(text, encoding="utf-8")
    not_loaded(saved, f"{CONFIG} in .*(names no peft_type|is broken)")


def test_missing_files(saved, tmp_path):
    not_loaded(tmp_path / "nowhere", "an adapter is a folder", error=FileNotFoundError)
    for file in (WEIGHTS, CONFIG):
        (saved / file).unlink()
        not_loaded(saved, f"holds no {file}", error=FileNotFoundError)


def test_a_file_with_a_digest_of_its_config_loads(saved):
    """Files of an earlier version have one in their header."""
    _, tensors, header = read_adapter(saved)
    header["peft_lessons_config"] = "0" * 32
    save_file(tensors, saved / WEIGHTS, header)
    load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize("other", [dict(seed=1), dict(num_hidden_layers=1)], ids=str)
def test_another_base(saved, other):
    not_loaded(saved, "base with other weights.*check_base=False", tiny_llama(**other))


def test_another_base_without_a_fingerprint_or_on_purpose(saved):
    short, other = tiny_llama(num_hidden_layers=1), tiny_llama(seed=1)
    load_adapter(other, saved, check_base=False)
    assert injection_of(other) is not None
    not_loaded(saved, "no place in the model", short, check_base=False)
    rewrite(saved)
    not_loaded(saved, "no place in the model, .*layers.1", short)
    not_loaded(saved, "misses .*layers.2", tiny_llama(num_hidden_layers=3))
    not_loaded(saved, "'q_proj' matches no module", tiny_bert())
    not_loaded(saved, r"\(4, 64\).*\(4, 32\)", tiny_llama(hidden_size=32, num_attention_heads=2))


def test_peft_files_know_their_base_by_name(tmp_path):
    base, other = tiny_llama(), tiny_llama()
    base.name_or_path, other.name_or_path = "owner/tiny", "owner/other"
    theirs_on(deepcopy(base), ("q_proj",), "CAUSAL_LM").save_pretrained(tmp_path)
    not_loaded(tmp_path, "'owner/tiny', this model is 'owner/other'", other)
    load_adapter(other, tmp_path, check_base=False)
    load_adapter(base, tmp_path)


def test_a_head_with_other_labels(tmp_path):
    save_adapter(adapted(tiny_bert(), LoRA(4, 6, ("query",))), tmp_path)
    three = tiny_bert()
    three.classifier = nn.Linear(64, 3)
    not_loaded(tmp_path, r"'base_model.model.classifier.weight' has shape \(2, 64\)", three)


def test_a_number_too_large_for_the_model(tmp_path):
    model = adapted(tiny_llama(), modules_to_save="model.norm")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    save_adapter(model, tmp_path)
    load_adapter(tiny_llama(), tmp_path)
    half = tiny_llama().half()
    not_loaded(tmp_path, "norm.weight' holds NaN or infinity", half, check_base=False)


def test_onto_a_model_that_holds_a_method(saved):
    not_loaded(saved, "unload", adapted(tiny_llama()), error=RuntimeError)
    model = tiny_bert()
    inject(model.bert, LoRA(2, 3, ("query",)))
    not_loaded(saved, r"model\.bert", model, error=RuntimeError)


@dataclass(frozen=True)
class Shifted(Method):
    """Attach to the whole model, as prompt methods do."""

    start: str = "zeros"
    files = PeftFiles(
        "TEST_SHIFTED",
        fields={"start": ("how_it_started", "zeros")},
        others=("num_layers",),
        tensors={"weight": "prompt_embeddings"},
    )

    def attach(self, model):
        return nn.Linear(3, 2, bias=False), []


def test_an_attached_method_has_the_keys_of_peft_s_prompt_methods(tmp_path):
    model = tiny_bert()
    inject(model, Shifted())
    save_adapter(model, tmp_path)
    head = {f"base_model.classifier.{name}" for name in ("weight", "bias")}
    assert set(load_file(tmp_path / WEIGHTS)) == {"prompt_embeddings"} | head
    with registered(Shifted):
        again = in_ours(tiny_bert(), tmp_path)
        assert torch.equal(injection_of(again).attached.weight, injection_of(model).attached.weight)
        # Entries that a method passes over are no reason to refuse.
        load_adapter(tiny_bert(), rewrite(tmp_path, num_layers=2))
        rewrite(tmp_path, surprise=7)
        not_loaded(tmp_path, r"Shifted does not read surprise=7", tiny_bert())


def test_a_method_of_one_s_own_must_be_registered(tmp_path):
    inject(model := tiny_bert(), Shifted())
    save_adapter(model, tmp_path)
    not_loaded(tmp_path, "'TEST_SHIFTED' is not.*@register .* above its class", tiny_bert())


@pytest.mark.parametrize(
    ("ending", "dtype", "message"),
    [("indices", torch.float32, "whole numbers"), ("values", torch.int32, "32- or 64-bit floats")],
)
def test_only_indices_are_whole_numbers(ending, dtype, message, tmp_path):
    save_adapter(adapted(tiny_llama(), DiffPruning(targets=("q_proj",))), tmp_path)
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{ending}"
    rewrite(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    not_loaded(tmp_path, f"{key}' holds {dtype} numbers, but .*{message}")


def test_two_tensors_with_one_name_are_refused(tmp_path, monkeypatch):
    names = dict.fromkeys(LoRA.files.tensors, "lora_A.weight")
    monkeypatch.setattr(LoRA, "files", replace(LoRA.files, tensors=names))
    with pytest.raises(ValueError, match=r"two tensors are called '.*lora_A.weight' in the file"):
        save_adapter(adapted(tiny_llama()), tmp_path)
    assert not list(tmp_path.iterdir())
