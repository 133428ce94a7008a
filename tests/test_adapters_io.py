"""Adapter files: written for Hugging Face PEFT and by it, and every file that must be refused."""

import json
import os
from copy import deepcopy
from dataclasses import dataclass

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    EACH,
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
    tiny_qwen2,
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
from peft_lessons.engine import CONFIG, WEIGHTS, Method, PeftFiles, injection_of, read_adapter

# A module that trains in full, beside the fresh head of bert.
WHOLE = {
    "llama": "model.norm",
    "qwen2": "model.norm",
    "opt": "final_layer_norm",
    "bert": "pooler",
}
IDS = torch.arange(3, 27).view(2, 12)
QV = LoRA(rank=4, alpha=6, targets=("q_proj", "v_proj"))
FILES = {CONFIG, WEIGHTS}


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


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter for tiny_llama."""
    return save_adapter(adapted(tiny_llama()), tmp_path / "adapter")


# ------------------------------------------------------------------ ours to PEFT and back


@EACH
def test_what_trains_in_full_opens_in_peft_without_a_warning(name, tmp_path, recwarn):
    ours = adapted(MODELS[name](), LoRA(4, 6, TARGETS[name]), WHOLE[name])
    save_adapter(ours, tmp_path)
    assert set(contents(tmp_path)) == FILES
    theirs = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    known = "is_gradient_checkpointing"
    assert not [w for w in map(str, recwarn) if known not in w]
    assert torch.equal(logits(theirs), logits(ours))
    assert not torch.equal(logits(ours), logits(MODELS[name]()))
    again = MODELS[name]()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


@EACH
def test_what_trains_in_full_in_peft_opens_in_ours(name, tmp_path):
    settings = {"modules_to_save": [WHOLE[name]]}
    theirs = theirs_on(MODELS[name](), TARGETS[name], task_type(name), **settings)
    theirs.save_pretrained(tmp_path)
    ours = MODELS[name]()
    untouched = state(ours)
    told = load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    assert not any(p.requires_grad for p in ours.parameters())
    assert told.fresh == (("classifier",) if name == "bert" else ())
    # Back to PEFT, through our files.
    save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(theirs))
    assert same(state(unload(ours)), untouched)


def test_a_fresh_head_goes_with_its_task_type(tmp_path):
    ours = adapted(tiny_bert(), LoRA(4, 6, ("query",)))
    save_adapter(ours, tmp_path)
    config = read_config(tmp_path)
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    tensors = load_file(tmp_path / WEIGHTS)
    assert torch.equal(tensors["base_model.model.classifier.weight"], ours.classifier.weight)
    # PEFT without a task type leaves the head at random and out of the file.
    theirs_on(tiny_bert(), ("query",)).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"misses 'base_model.model.classifier.bias'"):
        load_adapter(tiny_bert(), tmp_path / "headless")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype, tmp_path):
    method = LoRA(4, 6, TARGETS["llama"])
    ours = adapted(tiny_llama().to(dtype), method, "model.norm")
    save_adapter(ours, tmp_path)
    kinds = {k: t.dtype for k, t in load_file(tmp_path / WEIGHTS).items()}
    assert {t for k, t in kinds.items() if "lora_" in k} == {torch.float32}
    assert kinds["base_model.model.model.norm.weight"] == dtype
    again = tiny_llama().to(dtype)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    theirs = peft.PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path).eval()
    assert torch.equal(logits(theirs), logits(ours))


def test_an_adapter_of_a_float32_base_fits_it_in_bfloat16(saved):
    load_adapter(tiny_llama().bfloat16(), saved)


def test_a_tied_model(tmp_path):
    def base():
        return tiny_llama(tie_word_embeddings=True)

    ours = adapted(base())
    save_adapter(ours, tmp_path)
    for again in (base(), peft.PeftModel.from_pretrained(base(), tmp_path).eval()):
        if not isinstance(again, peft.PeftModel):
            load_adapter(again, tmp_path)
        assert torch.equal(logits(again), logits(ours))


def test_the_smallest_config_of_peft(tmp_path):
    ours = adapted(tiny_llama(), LoRA(4, 8, ("q_proj",)))
    save_adapter(ours, tmp_path)
    rewrite(tmp_path)
    for config in (
        {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]},  # alpha: PEFT's default, 8
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 4, "target_modules": r".*\.q_proj", "lora_dropout": 0.3},
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        again = tiny_llama()
        load_adapter(again, tmp_path)
        assert torch.equal(logits(again), logits(ours))
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(logits(again), logits(theirs))
    (tmp_path / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}),
        encoding="utf-8",
    )
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert not torch.allclose(logits(again), logits(ours))


def test_all_linear_is_saved_as_names(tmp_path):
    ours = adapted(tiny_llama(), LoRA(4, 6, "all-linear"))
    save_adapter(ours, tmp_path)
    assert len(read_config(tmp_path)["target_modules"]) == 14
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(theirs), logits(ours))
    theirs_on(tiny_llama(), "all-linear").save_pretrained(tmp_path / "x")
    load_adapter(tiny_llama(), tmp_path / "x")


# ------------------------------------------------------------------ using what was loaded


def test_trainable_trains_on_and_frozen_says_how(tmp_path):
    save_adapter(adapted(tiny_bert(), LoRA(4, 6, ("query",))), tmp_path)
    frozen = tiny_bert()
    load_adapter(frozen, tmp_path)
    with pytest.raises(ValueError, match="trainable=True"):
        fit(frozen, TinyTask(), 2, show=False)
    model = tiny_bert()
    told = load_adapter(model, tmp_path, trainable=True)
    assert told.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = state(model)
    fit(model, TinyTask(), 3, show=False)
    after = state(model)
    moving = {n for n in before if not torch.equal(before[n], after[n])}
    assert moving == {n for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path)
    again = tiny_bert()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_what_was_loaded_and_merged_is_saved_as_it_was(saved, tmp_path):
    model = tiny_llama()
    load_adapter(model, saved)
    merge(model)
    unmerge(model)
    assert same_adapter(save_adapter(model, tmp_path / "again"), saved)


def test_any_folder_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "a/deep/one", "with space", "mit Ümlaut 漢字 'quoted'", "x/../y"):
        model = tiny_llama()
        load_adapter(model, saved)
        assert str(save_adapter(model, folder)) == folder
        assert same_adapter(tmp_path / folder, saved)


def test_reading_alone(saved):
    config, tensors, header = read_adapter(saved)
    assert config["r"] == 4 and len(tensors) == 8 and header["format"] == "pt"


def test_onto_the_meta_device_a_load_is_a_check(saved):
    with torch.device("meta"):
        model = tiny_llama()
    load_adapter(model, saved)
    with torch.device("meta"):
        short = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="no place in the model"):
        load_adapter(short, saved)


# ------------------------------------------------------------------ an interrupted save


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt isn't."""


def save_other(folder):
    """Another adapter into the same folder: other values and another config."""
    save_adapter(adapted(tiny_llama(), LoRA(2, 5, ("k_proj",))), folder)


@pytest.mark.parametrize("error", [OSError("no space left"), Stop()], ids=["full disk", "stop"])
@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "open"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_save_leaves_the_old_adapter_whole(saved, monkeypatch, call, at, error):
    before, model = contents(saved), tiny_llama()
    load_adapter(model, saved)
    expected, calls = logits(model), []
    real = open if call == "open" else getattr(os, call.removeprefix("os."))

    def failing(*args, **kw):
        if call == "open" and "tmp" not in str(args[0]):
            return real(*args, **kw)
        calls.append(args)
        if len(calls) == at:
            raise error
        return real(*args, **kw)

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr("builtins.open", failing)
        else:
            patch.setattr(call, failing)
        with pytest.raises(type(error)):
            save_other(saved)
    assert len(calls) == at
    assert contents(saved) == before  # and no temporary file beside them
    again = tiny_llama()
    load_adapter(again, saved)
    assert torch.equal(logits(again), expected)
    save_other(saved)  # and the folder can still be saved to
    load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_first_save_leaves_nothing(tmp_path, monkeypatch, at):
    model, calls, real = adapted(tiny_llama()), [], os.replace

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise Stop
        return real(*args)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(Stop):
        save_adapter(model, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


# ------------------------------------------------------------------ what must not be saved


def nan_in(model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")


def on_meta(model):
    model.to("meta")


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (merge, RuntimeError, "unmerge"),
        (nan_in, ValueError, r"q_proj\.lora_A.*NaN or infinity"),
        (on_meta, ValueError, "meta device"),
        (unload, ValueError, r"inject\(model"),
    ],
)
def test_saving_is_refused(saved, spoil, error, message):
    before, model = contents(saved), tiny_llama()
    load_adapter(model, saved)
    for wrapper in injection_of(model).wrappers.values():
        wrapper.lora.requires_grad_(True)
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
    """Loading is refused, and neither the model nor a file has changed."""
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
    "no key": (lambda t: t.clear(), "and 7 more of 8"),
    "surplus key": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
        "no place in the model, 'base_model.model.lm_head",
    ),
    "another prefix": (
        lambda t: t.update({"x": t.pop(FIRST)}),
        f"misses '{FIRST}'",
    ),
    "wrong shape": (set_first(lambda t: t[:, :60].clone()), r"\(4, 60\) in the file.*\(4, 64\)"),
    "transposed": (set_first(lambda t: t.T.contiguous()), r"\(64, 4\)"),
    "nan": (filled(float("nan")), rf"{FIRST}' holds NaN or infinity; nothing was changed"),
    "inf": (filled(float("-inf")), "NaN or infinity"),
    "integers": (set_first(lambda t: t.to(torch.int8)), "torch.int8 numbers"),
    "whole numbers": (set_first(lambda t: t.to(torch.int64)), "torch.int64 numbers, .*floats"),
    "complex": (set_first(lambda t: t.to(torch.complex64)), "complex64"),
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
    "alpha 0": (dict(lora_alpha=0), "alpha=0 must be a finite number above 0"),
    "alpha nan": (dict(lora_alpha=float("nan")), "alpha=nan"),
    "alpha null": (dict(lora_alpha=None), "alpha=None must be a number"),
    "dropout": (dict(lora_dropout=1.5), r"dropout=1.5 must lie in \[0, 1\)"),
    "rslora": (dict(use_rslora="no"), "rslora='no' must be True or False"),
    "fewer targets": (dict(target_modules=["q_proj"]), "no place in the model, .*v_proj"),
    "more targets": (dict(target_modules=["q_proj", "k_proj", "v_proj"]), "misses .*k_proj"),
    "unknown target": (dict(target_modules=["q_porj", "v_proj"]), "did you mean 'q_proj'"),
    "no targets": (dict(target_modules=...), "describes no LoRA: targets=None"),
    "empty targets": (dict(target_modules=[]), "targets is empty"),
    "targets of another type": (dict(target_modules=3), "describes no LoRA: targets=3"),
    "saved module that is missing": (dict(modules_to_save=["norm"]), "misses .*norm.weight"),
    "saved modules as a string": (dict(modules_to_save="norm"), "must be a list of module names"),
    "saved modules as a number": (dict(modules_to_save=5), "must be a list of module names"),
    "no type": (dict(peft_type=...), "names no peft_type"),
    "another type": (dict(peft_type="XLORA"), "'XLORA' is no method of the course; known.*LORA"),
    "type null": (dict(peft_type=None), "None is no method of the course"),
    "type list": (dict(peft_type=["LORA"]), "is no method of the course"),
    "another base": (
        dict(base_model_name_or_path="owner/other"),
        "made for 'owner/other', this model is 'owner/tiny': .*check_base=False",
    ),
}
# Options that PEFT has and the course hasn't: a LoRA without them would be another function.
OPTIONS = [
    dict(rank_pattern={"q_proj": 8}),
    dict(alpha_pattern={"q_proj": 8}),
    dict(bias="all"),
    dict(bias="lora_only"),
    dict(lora_bias=True),
    dict(init_lora_weights="pissa"),
    dict(init_lora_weights="pissa_niter_4"),
    dict(init_lora_weights="olora"),
    dict(init_lora_weights="loftq"),
    dict(layers_to_transform=[0]),
    dict(layers_pattern="layers"),
    dict(layer_replication=[[0, 2]]),
    dict(exclude_modules=["lm_head"]),
    dict(fan_in_fan_out=True),
    dict(trainable_token_indices=[1, 2]),
    dict(target_parameters=["x"]),
    dict(use_qalora=True),
    dict(alora_invocation_tokens=[1]),
    dict(of_a_later_version=1),
]


@pytest.mark.parametrize("entries, message", CONFIGS.values(), ids=CONFIGS)
def test_wrong_configs(saved, entries, message):
    model = tiny_llama()
    model.name_or_path = "owner/tiny"
    not_loaded(rewrite(saved, **entries), message, model)


@pytest.mark.parametrize("entries", OPTIONS, ids=lambda e: "-".join(map(str, *[e.items()])))
def test_options_that_the_course_lacks(saved, entries):
    (key,) = entries
    not_loaded(rewrite(saved, **entries), r"LoRA does not read " + key + ".*PeftModel")


def test_options_that_are_off_are_read_over(saved):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    expected = tiny_llama()
    load_adapter(expected, saved)
    for extra in ({}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}):
        model = tiny_llama()
        load_adapter(model, rewrite(saved, **{**config, **extra}))
        assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 40, 0.5, -1])
def test_files_that_are_cut_off(saved, file, keep):
    whole = (saved / file).read_bytes()
    if file == CONFIG:
        whole = whole.rstrip()  # without its last brace, not only its last newline
    (saved / file).write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    not_loaded(saved, rf"{file} in '.*adapter' is broken or cut off")


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"LORA"', "{}", '{"a": 1}', "\ufeff{}", "nonsense", "[" * 99999]
)
def test_json_that_is_no_adapter(saved, text):
    (saved / CONFIG).write_text(text, encoding="utf-8")
    not_loaded(saved, f"{CONFIG} in .*(names no peft_type|is broken)")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_missing_files(saved, tmp_path, file):
    (saved / file).unlink()
    not_loaded(saved, f"holds no {file}", error=FileNotFoundError)
    not_loaded(tmp_path / "nowhere", "an adapter is a folder", error=FileNotFoundError)


def test_a_file_with_a_digest_of_its_config_loads(saved):
    """Files of an earlier version have one in their header."""
    _, tensors, header = read_adapter(saved)
    header["peft_lessons_config"] = "0" * 32
    save_file(tensors, saved / WEIGHTS, header)
    load_adapter(tiny_llama(), saved)


OTHERS = {
    "other weights": lambda: tiny_llama(seed=1),
    "fewer layers": lambda: tiny_llama(num_hidden_layers=1),
    "more layers": lambda: tiny_llama(num_hidden_layers=3),
    "wider": lambda: tiny_llama(intermediate_size=128),
    "another family": tiny_qwen2,
    "no such layers": tiny_bert,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_base(saved, other):
    not_loaded(saved, "base with other weights.*check_base=False", other())


def test_another_base_without_a_fingerprint(saved):
    rewrite(saved)
    not_loaded(saved, "no place in the model, .*layers.1", OTHERS["fewer layers"]())
    not_loaded(saved, "misses .*layers.2", OTHERS["more layers"]())
    not_loaded(saved, "'q_proj' matches no module", OTHERS["no such layers"]())
    not_loaded(saved, r"\(4, 64\).*\(4, 32\)", tiny_llama(hidden_size=32, num_attention_heads=2))


def test_another_base_on_purpose(saved):
    model = tiny_llama(seed=1)
    load_adapter(model, saved, check_base=False)
    assert injection_of(model) is not None
    not_loaded(saved, "no place in the model", OTHERS["fewer layers"](), check_base=False)


def test_peft_files_know_their_base_by_name(tmp_path):
    base = tiny_llama()
    base.name_or_path = "owner/tiny"
    theirs_on(deepcopy(base), ("q_proj",), "CAUSAL_LM").save_pretrained(tmp_path)
    assert read_config(tmp_path)["base_model_name_or_path"] == "owner/tiny"
    other = tiny_llama()
    other.name_or_path = "owner/other"
    not_loaded(tmp_path, "'owner/tiny', this model is 'owner/other'", other)
    load_adapter(deepcopy(other), tmp_path, check_base=False)
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
    """Attached to the whole model, as prompt methods are."""

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
    _, tensors, _ = read_adapter(tmp_path)
    assert set(tensors) == {
        "prompt_embeddings",
        "base_model.classifier.weight",
        "base_model.classifier.bias",
    }
    again = tiny_bert()
    load_adapter(again, tmp_path)
    assert torch.equal(injection_of(again).attached.weight, injection_of(model).attached.weight)


@pytest.mark.parametrize(
    ("ending", "dtype", "told"),
    [("indices", torch.float32, "whole numbers"), ("values", torch.int32, "32- or 64-bit floats")],
)
def test_only_indices_are_whole_numbers(ending, dtype, told, tmp_path):
    save_adapter(adapted(tiny_llama(), DiffPruning(targets=("q_proj",))), tmp_path)
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{ending}"
    rewrite(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    not_loaded(tmp_path, f"{key}' holds {dtype} numbers, but .*{told}")


def test_entries_that_a_method_passes_over_are_no_reason_to_refuse(tmp_path):
    model = tiny_bert()
    inject(model, Shifted())
    save_adapter(model, tmp_path)
    rewrite(tmp_path, num_layers=2)
    load_adapter(tiny_bert(), tmp_path)
    rewrite(tmp_path, num_layers=2, surprise=7)
    with pytest.raises(ValueError, match=r"Shifted does not read surprise=7.*PEFT can load it"):
        load_adapter(tiny_bert(), tmp_path)
