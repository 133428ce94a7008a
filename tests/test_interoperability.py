"""Every method of the course that PEFT has, on every family: files there, and files from there."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, TASKS, batch_of, same, state, tiny_bert, tiny_llama

from peft_lessons import (
    IA3,
    OFT,
    AdaLoRA,
    DoRA,
    LoRA,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    Prefix,
    Prompt,
    QLoRA,
    VeRA,
    load_adapter,
    load_model,
)
from peft_lessons.engine import WEIGHTS, registered_methods
from peft_lessons.testing import compare, interoperability

# Names of all four families, as one regular expression each.
QV = r".*\.(q_proj|v_proj|query|value)"
FF = r".*\.(down_proj|fc2)|.*\d\.output\.dense"
KVF = r".*\.(k_proj|v_proj|key|value)|" + FF
NORMS = r".*[Nn]orm"
HERE, THERE = dict(rank=4, alpha=6, targets=QV), dict(r=4, lora_alpha=6, target_modules=QV)
ADALORA = (
    AdaLoRA(6, 3, 10, QV, tinit=1, tfinal=1, delta=1, total_steps=4),
    peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=10, target_modules=QV, tinit=1, tfinal=1, total_step=4
    ),
)
DESCRIBED = {
    "LoRA": (LoRA(**HERE), peft.LoraConfig(**THERE)),
    "rsLoRA": (LoRA(**HERE, rslora=True), peft.LoraConfig(**THERE, use_rslora=True)),
    "DoRA": (DoRA(**HERE), peft.LoraConfig(**THERE, use_dora=True)),
    "QLoRA": (QLoRA(4, 6), peft.LoraConfig(**THERE | {"target_modules": "all-linear"})),
    "AdaLoRA": ADALORA,
    "AdaLoRA, pruned": ADALORA,
    "(IA)³": (IA3(KVF, FF), peft.IA3Config(target_modules=KVF, feedforward_modules=FF)),
    "prefix": (Prefix(5), peft.PrefixTuningConfig(num_virtual_tokens=5)),
    "prefix, MLP": (
        Prefix(5, projection=24),
        peft.PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24
        ),
    ),
    "prompt": (Prompt(6), peft.PromptTuningConfig(num_virtual_tokens=6)),
    "LoRA+": (LoRAPlus(**HERE), peft.LoraConfig(**THERE)),
    "PiSSA": (PiSSA(2, 3, QV), peft.LoraConfig(**THERE)),  # a LoRA of twice the rank
    "PiSSA, √r": (
        PiSSA(2, 3, QV, rslora=True),
        peft.LoraConfig(r=4, lora_alpha=3 * 2**0.5, target_modules=QV, use_rslora=True),
    ),
    "VeRA": (VeRA(12, QV, seed=5), peft.VeraConfig(r=12, target_modules=QV, projection_prng_key=5)),
    "OFT": (OFT(16, QV), peft.OFTConfig(oft_block_size=16, target_modules=QV)),
    "OFT, exact": (
        OFT(16, QV, neumann=False),
        peft.OFTConfig(oft_block_size=16, target_modules=QV, use_cayley_neumann=False),
    ),
    "norms": (PartialFineTuning(patterns=NORMS), peft.LNTuningConfig(target_modules=NORMS)),
}
STEPS = {"AdaLoRA, pruned": 4}
THERE_, BACK = "ours → PEFT", "PEFT → ours"


def only(row, bases):
    return interoperability(bases, {row: DESCRIBED[row]}, STEPS)


def test_every_method_that_peft_has_is_in_the_table():
    known = {kind.value for kind in peft.PeftType}
    course = {
        m.files.kind
        for m in registered_methods()
        if m.__module__.startswith("peft_lessons.methods.")
    }
    described = {ours.files.kind for ours, _ in DESCRIBED.values()}
    assert course & known <= described
    assert described - known == {"PARTIAL_FINE_TUNING"}  # LN_TUNING there


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", DESCRIBED)
def test_files_travel_both_ways(row, name):
    base = MODELS[name]()
    before = state(base)
    (found,) = only(row, {name: base})
    assert (found["method"], found["model"]) == (row, name)
    if row == "QLoRA":  # their feed-forward is 96 wide
        assert "must be a multiple of 64" in found["refused"] and found["effect"] is None
    else:
        assert found["refused"] is None and found["effect"] > 0.01
        assert max(found[THERE_], found[BACK]) < 1e-5
    assert same(state(base), before)


@pytest.mark.parametrize("row", ["LoRA", "prefix", "norms"])
def test_a_frozen_head_travels_too(row):
    """PEFT trains the head of every classifier, the course only the one that load_model made."""
    base = tiny_bert()
    del base.fresh_modules
    (found,) = only(row, {"bert": base})
    assert found["refused"] is None and max(found[THERE_], found[BACK]) < 1e-5


@pytest.mark.parametrize("row", ["LoRA", "QLoRA", "norms"])
def test_on_the_bundled_models_with_their_names(row):
    for found in only(
        row, {"minilm": load_model("minilm", labels=2), "tinylm": load_model("tinylm")}
    ):
        assert found["refused"] is None and found["effect"] > 0.1
        assert max(found[THERE_], found[BACK]) < 1e-4


def test_the_global_random_state_stays():
    base = tiny_llama()
    before = torch.get_rng_state()
    first = only("prefix", {"llama": base})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert only("prefix", {"llama": base}) == first


def test_a_pruned_adalora_is_pruned(monkeypatch):
    loaded = []

    def remember(model, folder):
        loaded.append(load_file(f"{folder}/{WEIGHTS}"))
        return load_adapter(model, folder)

    monkeypatch.setattr(compare, "load_adapter", remember)
    for row in ("AdaLoRA", "AdaLoRA, pruned"):
        only(row, {"llama": tiny_llama()})
    whole, pruned = ([len(t) for k, t in file.items() if k.endswith("lora_E")] for file in loaded)
    assert set(whole) == {6} and sum(pruned) == 3 * len(pruned)


@pytest.mark.parametrize("way", [THERE_, BACK])
def test_one_number_changed_on_the_way_shows(way, monkeypatch):
    def change(folder):
        tensors = load_file(f"{folder}/{WEIGHTS}")
        key = next(key for key in tensors if key.endswith("lora_B.weight"))
        tensors[key][0, 0] += 0.5
        save_file(tensors, f"{folder}/{WEIGHTS}")

    def spoilt(model, folder):
        change(folder)
        return load_adapter(model, folder)

    if way == BACK:
        monkeypatch.setattr(compare, "load_adapter", spoilt)
    else:
        save = compare.save_adapter
        monkeypatch.setattr(compare, "save_adapter", lambda m, f: (save(m, f), change(f)))
    (found,) = only("LoRA", {"llama": tiny_llama()})
    other = THERE_ if way == BACK else BACK
    assert found[way] > 1e-3 and found[other] < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_is_padded_as_the_tests_are(name):
    batch, expected = compare.padded_batch(MODELS[name]()), batch_of(name)
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    if name in TASKS:
        assert torch.equal(batch["labels"], torch.tensor([0, 1, 0]))
    else:
        assert torch.equal(batch["labels"] == -100, expected["labels"] == -100)
