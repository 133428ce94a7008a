"""Check every method of the course on every family of models: a new method is a row here."""

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    MODELS,
    PLACES,
    TARGETS,
    ia3_config,
    perturb,
    same,
    state,
    task_of,
    tiny_bert,
    tiny_llama,
    tiny_opt,
)

from peft_lessons import (
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DiffPruning,
    DoRA,
    LoftQ,
    LoRA,
    LoRAPlus,
    MixAndMatch,
    PartialFineTuning,
    PiSSA,
    Prefix,
    Prompt,
    QLoRA,
    SparseTuning,
    VeRA,
    fit,
    inject,
    load_adapter,
    load_model,
)
from peft_lessons.engine import WEIGHTS, injection_of, registered_methods
from peft_lessons.testing import check_method, exchange, interoperability

STEPS = 8
SCHEDULE = dict(tinit=2, tfinal=3, delta=1, total_steps=STEPS)
METHODS = {  # {row: the method for a model of this name}
    "lora": lambda name: LoRA(4, 6.0, TARGETS[name], dropout=0.1),
    "rslora": lambda name: LoRA(4, 6.0, TARGETS[name], rslora=True),
    "dora": lambda name: DoRA(4, 6.0, TARGETS[name], dropout=0.1),
    "dora, rslora": lambda name: DoRA(4, 6.0, TARGETS[name], rslora=True),
    "qlora": lambda name: QLoRA(4, 8.0, TARGETS[name]),
    "adalora": lambda name: AdaLoRA(6, 3, 10.0, TARGETS[name], **SCHEDULE),
    "houlsby": lambda name: BottleneckAdapter(6, "houlsby", "tanh", 0.5),
    "pfeiffer": lambda name: BottleneckAdapter(6, "pfeiffer", "tanh", 0.5),
    "parallel": lambda name: BottleneckAdapter(6, "parallel", "tanh", 0.5),
    "ia3": lambda name: IA3(*PLACES[name]),
    "prompt": lambda name: Prompt(6),
    "prefix": lambda name: Prefix(5),
    "prefix, mlp": lambda name: Prefix(5, projection=24),
    "bitfit": lambda name: BitFit(),
    "last block": lambda name: PartialFineTuning(last=1),
    "norms": lambda name: PartialFineTuning(patterns=NORMS),
    "diff": lambda name: DiffPruning(targets=TARGETS[name]),
    "diff, structured": lambda name: DiffPruning(structured=True, targets=TARGETS[name]),
    "diff, no gates": lambda name: DiffPruning(gates=False, targets=TARGETS[name]),
    "sparse": lambda name: SparseTuning(4, seed=5, targets=TARGETS[name]),
    "sparse, largest": lambda name: SparseTuning(4, "largest", targets=TARGETS[name]),
    "mixed": lambda name: MixAndMatch(5, 6),
    "lora+": lambda name: LoRAPlus(4, 6.0, TARGETS[name], dropout=0.1),
    "pissa": lambda name: PiSSA(4, 6.0, TARGETS[name], dropout=0.1),
    "pissa, √r": lambda name: PiSSA(2, 3.0, TARGETS[name], rslora=True),
    "loftq": lambda name: LoftQ(4, 8.0, TARGETS[name], iterations=2),
    "qpissa": lambda name: LoftQ(4, 8.0, TARGETS[name], iterations=0, principal=True),
    "vera": lambda name: VeRA(12, TARGETS[name], dropout=0.1, seed=5),
    "oft": lambda name: OFT(16, TARGETS[name]),
    "oft, exact": lambda name: OFT(16, TARGETS[name], neumann=False),
}
NORMS = r".*[Nn]orm"


def on_targets(config, **settings):
    """Return a function that gives this config of PEFT on the targets of a model."""
    return lambda name: config(target_modules=list(TARGETS[name]), **settings)


def lora(name, **changed):
    settings = dict(r=4, lora_alpha=6, target_modules=list(TARGETS[name]))
    return peft.LoraConfig(**settings | changed)


def prefixed(**more):
    return peft.PrefixTuningConfig(num_virtual_tokens=5, **more)


def largest_shira(name):
    """Return PEFT's SHiRA with the entries of largest magnitude."""

    def mask_fn(layer, r, **_):
        flat = layer.weight.detach().abs().flatten()
        chosen = flat.topk(r * sum(layer.weight.shape)).indices
        return torch.zeros_like(flat).index_fill(0, chosen, 1.0).view_as(layer.weight)

    with warnings.catch_warnings(action="ignore"):  # it doubts a mask_type of our own
        config = peft.ShiraConfig(r=4, target_modules=list(TARGETS[name]), mask_type="largest")
    config.mask_fn = mask_fn
    return config


ADALORA_THERE = dict(init_r=6, target_r=3, lora_alpha=10)
PEFT = {  # {row: PEFT's config of the same method}
    "lora": lora,
    "rslora": lambda name: lora(name, use_rslora=True),
    "dora": lambda name: lora(name, use_dora=True),
    "dora, rslora": lambda name: lora(name, use_dora=True, use_rslora=True),
    "qlora": lambda name: lora(name, lora_alpha=8, target_modules="all-linear"),
    "adalora": on_targets(peft.AdaLoraConfig, **ADALORA_THERE, tinit=2, tfinal=3, total_step=STEPS),
    "ia3": lambda name: ia3_config(*PLACES[name]),
    "prompt": lambda name: peft.PromptTuningConfig(num_virtual_tokens=6),
    "prefix": lambda name: prefixed(),
    "prefix, mlp": lambda name: prefixed(prefix_projection=True, encoder_hidden_size=24),
    "norms": lambda name: peft.LNTuningConfig(target_modules=NORMS),
    "sparse": on_targets(peft.ShiraConfig, r=4, random_seed=5),
    "sparse, largest": largest_shira,
    "lora+": lora,
    "pissa": lambda name: lora(name, r=8, lora_alpha=12),  # a LoRA of twice the rank
    "pissa, √r": lambda name: lora(name, lora_alpha=3 * 2**0.5, use_rslora=True),
    "vera": on_targets(peft.VeraConfig, r=12, projection_prng_key=5),
    "oft": on_targets(peft.OFTConfig, oft_block_size=16),
    "oft, exact": on_targets(peft.OFTConfig, oft_block_size=16, use_cayley_neumann=False),
}
IN_4_BITS = ("qlora", "loftq", "qpissa")
NO_MERGE = (  # what no change of the weights computes, or none in 4 bits
    *IN_4_BITS,
    *("houlsby", "pfeiffer", "parallel", "prompt", "prefix", "prefix, mlp", "mixed"),
)
# Where a method does not start as the base, but somewhere near it.
NEAR = (*IN_4_BITS, "prompt", "prefix", "prefix, mlp", "mixed")
WIDE = {  # every width a multiple of 64, as four bits need it
    "llama": lambda: tiny_llama(intermediate_size=128),
    "opt": lambda: tiny_opt(ffn_dim=128),
}
# Without gates the settings of gates say nothing, and of the largest entries none is drawn.
NO_FIELDS = ("diff, no gates", "sparse, largest")
# (row, model) where the model lacks what the method needs: a Llama has no biases.
LACKING = {("bitfit", "llama")}
CASES = [
    (row, name)
    for row in METHODS
    for name in (WIDE if row in IN_4_BITS else MODELS)
    if (row, name) not in LACKING
]


def base_of(row, name):
    if name == "bert":
        return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return (WIDE if row in IN_4_BITS else MODELS)[name]()


def test_every_method_of_the_course_has_a_row():
    course = {m for m in registered_methods() if m.__module__.startswith("peft_lessons.methods.")}
    # Two that leave a plain LoRA behind are no kinds of file, and so in no registry.
    assert {type(make("bert")) for make in METHODS.values()} == course | {LoRAPlus, PiSSA}
    theirs = {kind.value for kind in peft.PeftType} | {"PARTIAL_FINE_TUNING"}  # LN_TUNING there
    exchanged = {METHODS[row]("bert").files.kind for row in PEFT}
    assert {method.files.kind for method in course} & theirs <= exchanged


def as_loaded(method):
    """Return the method that a file gives back: it holds what was made, not what made it."""
    if isinstance(method, LoRAPlus):
        return LoRA(method.rank, method.alpha, method.targets, method.dropout)
    if isinstance(method, PiSSA):
        scale = method.alpha * (2**0.5 if method.rslora else 2)
        return LoRA(2 * method.rank, scale, method.targets, method.dropout, method.rslora)
    if isinstance(method, Prefix):
        return replace(method, projection=None)
    return replace(method, gates=False) if isinstance(method, DiffPruning) else method


@pytest.mark.parametrize(("row", "name"), CASES)
def test_it_does_all_that_a_method_does(row, name):
    method = METHODS[row](name)
    check_method(
        method,
        base_of(row, name),
        start=float("inf") if row in NEAR else 1e-4 if isinstance(method, PiSSA) else 0.0,
        merges=row not in NO_MERGE,
        loaded=as_loaded(method),
        # Of an MLP the product is made once, and not for each row of the batch; of PiSSA's two
        # branches one of twice the rank.
        rounding=1e-5 if isinstance(method, PiSSA) or row == "prefix, mlp" else 0.0,
        own_type=method.files.kind != "LORA",
        keeps_base=row not in IN_4_BITS,
        fields=name == ("llama" if row in IN_4_BITS else "bert") and row not in NO_FIELDS,
        peft=PEFT[row](name) if row in PEFT else None,
        steps=STEPS if isinstance(method, AdaLoRA) else 30,
    )


def fresh(row, name):
    model = base_of(row, name)
    torch.manual_seed(3)  # what the method draws
    inject(model, METHODS[row](name))
    return model


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, "llama" if row in IN_4_BITS else "bert") for row in METHODS] + [("prompt", "llama")],
)
def test_the_same_seed_gives_the_same_run(row, name):
    models = [fresh(row, name), fresh(row, name)]
    before = state(models[0])
    one, two = (fit(model, task_of(name), STEPS, show=False).loss for model in models)
    assert one == two and same(state(models[0]), state(models[1]))
    assert not same(state(models[0]), before)


@pytest.mark.parametrize(
    ("row", "factors"),
    [
        ("lora", {}),
        ("lora+", {"lora_B": 16}),
        ("diff, structured", {"log_alpha": 100, "log_alpha_all": 100}),
        ("mixed", {"embedding": 10}),
    ],
)
def test_some_parameters_have_a_learning_rate_of_their_own(row, factors):
    """The first step of Adam changes each parameter with a gradient by its learning rate."""
    model = perturb(fresh(row, "llama"))
    before = {name: p.detach().clone() for name, p in injection_of(model).added()}
    fit(model, task_of("llama"), 1, lr=1e-4, warmup=0, clip=None, show=False)
    for name, p in injection_of(model).added():
        step, factor = (p - before[name]).abs().max().item(), factors.get(name.split(".")[-1], 1)
        assert step == pytest.approx(1e-4 * factor, rel=0.02), name


# ------------------------------------------------------------------ the exchange with PEFT

QV = r".*\.(q_proj|v_proj|query|value)"
HERE, THERE = dict(rank=4, alpha=6, targets=QV), dict(r=4, lora_alpha=6, target_modules=QV)
ADALORA = (
    AdaLoRA(6, 3, 10, QV, tinit=1, tfinal=1, delta=1, total_steps=4),
    peft.AdaLoraConfig(**ADALORA_THERE, target_modules=QV, tinit=1, tfinal=1, total_step=4),
)
DESCRIBED = {
    "LoRA": (LoRA(**HERE), peft.LoraConfig(**THERE)),
    "QLoRA": (QLoRA(4, 6), peft.LoraConfig(**THERE | {"target_modules": "all-linear"})),
    "AdaLoRA": ADALORA,
    "AdaLoRA, pruned": ADALORA,
    "prefix": (Prefix(5), prefixed()),
    "norms": (PartialFineTuning(patterns=NORMS), peft.LNTuningConfig(target_modules=NORMS)),
}
THERE_, BACK = "ours → PEFT", "PEFT → ours"


def only(row, bases):
    return interoperability(bases, {row: DESCRIBED[row]}, {"AdaLoRA, pruned": 4})


def test_what_the_course_refuses_has_no_numbers():
    (found,) = only("QLoRA", {"llama": tiny_llama()})  # its feed-forward is 96 wide
    assert "must be a multiple of 64" in found["refused"] and found["effect"] is None


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

    monkeypatch.setattr(exchange, "load_adapter", remember)
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
        monkeypatch.setattr(exchange, "load_adapter", spoilt)
    else:
        save = exchange.save_adapter
        monkeypatch.setattr(exchange, "save_adapter", lambda m, f: (save(m, f), change(f)))
    (found,) = only("LoRA", {"llama": tiny_llama()})
    other = THERE_ if way == BACK else BACK
    assert found[way] > 1e-3 and found[other] < 1e-6
