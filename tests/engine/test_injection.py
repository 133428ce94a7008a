"""inject, merge, unmerge, unload: what they do, and what they refuse without changing anything."""

import math
import pickle
import re
from dataclasses import MISSING, dataclass, fields

import pytest
import torch
from tiny import perturb, refused, same, state, tiny_bert, tiny_llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import peft_lessons
from peft_lessons import (
    LinearWithLoRA,
    LoRA,
    LoRALayer,
    LoRAPlus,
    PiSSA,
    apply_lora_to_model,
    freeze,
    inject,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import (
    AdapterLayer,
    Method,
    PeftFiles,
    injection_of,
    register,
    registered,
    registered_methods,
    validate,
)
from peft_lessons.engine.settings import SETTINGS

QV = LoRA(rank=4, alpha=6, targets=("q_proj", "v_proj"))
IDS = torch.arange(1, 25).view(2, 12)


def injected():
    model = tiny_llama()
    inject(model, QV)
    return perturb(model, seed=7)


def test_only_the_factors_and_a_new_head_train():
    model = tiny_bert()
    summary = inject(model, LoRA(rank=4, alpha=6, targets=("query", "value")))
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("classifier.") for n in training)
    assert {"classifier.weight", "classifier.bias"} <= training
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.trainable == 4 * 4 * (64 + 64) + 2 * 64 + 2
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert len(summary.modules) == 4 and summary.fresh == ("classifier",)
    text = repr(summary)
    assert "new head" in text and f"{summary.trainable:,}" in text and "64→64" in text
    assert repr(report(model)) == text


def test_unload_gives_the_base_back_whatever_trained_in_between():
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    model.bert.pooler.train()
    untouched, attributes = state(model), vars(model).keys()
    inject(model, LoRA(rank=4, alpha=6, targets=("query",)), modules_to_save=("pooler",))
    for p in model.parameters():
        p.data.add_(float(p.requires_grad))
    model.requires_grad_(True)
    assert unload(model) is model
    assert same(state(model), untouched) and vars(model).keys() == attributes
    assert injection_of(model) is None and model.bert.pooler.training


def test_what_is_added_is_in_the_mode_of_its_layer():
    model = tiny_llama().eval()
    model.model.layers[0].self_attn.q_proj.train()
    inject(model, LoRA(4, 6, ("q_proj",), dropout=0.5))
    for path, wrapper in injection_of(model).wrappers.items():
        assert {m.training for m in wrapper.modules()} == {"layers.0" in path}


def test_targets_are_whole_segments_patterns_or_all_linear():
    def targeted(targets):
        return inject(tiny_llama(), LoRA(rank=2, alpha=3, targets=targets)).modules

    assert targeted(("layers.1.self_attn.q_proj",)) == ("model.layers.1.self_attn.q_proj",)
    assert len(targeted(["q_proj", "v_proj"])) == 4
    assert len(targeted(r".*\.mlp\..*_proj")) == 6
    every = targeted("all-linear")
    assert len(every) == 14 and not any("lm_head" in path for path in every)
    assert targeted(("o_proj",)) == tuple(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))


BAD = {
    "no match": (("q_porj",), "did you mean 'q_proj'"),
    "one of several does not match": (("q_proj", "nope"), "'nope' matches no module"),
    "a substring": (("proj",), "'proj' matches no module"),
    "a name as a string": ("q_proj", r"\('q_proj',\)"),
    "a broken pattern": ("(", "not a regular expression"),
    "a norm": (("input_layernorm",), "LlamaRMSNorm"),
    "a container": (("self_attn",), "LlamaAttention"),
    "nothing": ((), "empty"),
}


@pytest.mark.parametrize("targets, message", BAD.values(), ids=BAD)
def test_wrong_targets_are_refused_and_nothing_changes(targets, message):
    model = tiny_llama()
    with refused(model, message):
        inject(model, LoRA(rank=2, alpha=3, targets=targets))


REFUSED = {  # values that break a rule of the table of settings
    "rank": [0, 2.5, True], "tinit": [-1], "block_size": [1], "model_size_b": [7e9], "last": [0],
    "alpha": [0, math.nan, math.inf, "16"], "seed": [-1, 2**32], "beta1": [0, 1], "clip": [0],
    "sparsity": [-1], "rslora": ["no", 1], "dropout": [1.0, -0.1], "stretch": [1.0],
    "warmup": [1.1], "block": [0, 48, 64.0], "kind": ["between"], "init": [" "],
    "tokenizer": ["bert"],
}  # fmt: skip


def test_each_rule_of_the_table_refuses_and_names_what_breaks_it():
    for name, values in REFUSED.items():
        for value in values:
            message = re.escape(f"LoRALayer: {name}={value!r} ")
            with pytest.raises(ValueError, match=message + "(must|is the share)"):
                validate("LoRALayer", **{name: value})
    with pytest.raises(KeyError, match="LoRALayer: no rule is called 'rnak'; did you mean 'rank'?"):
        validate("LoRALayer", rnak=0)
    with pytest.raises(KeyError, match="LoRALayer: no rule is called 'zzz'\""):
        validate("LoRALayer", rank=4, zzz=0)


def test_methods_and_layers_ask_the_table():
    for kind in [*registered_methods(), LoRAPlus]:
        needed = {f.name for f in fields(kind) if f.default is MISSING}
        values = {name: ("query",) if name in kind.names_modules else 4 for name in needed}
        for name in {f.name for f in fields(kind)} & SETTINGS.keys():
            with pytest.raises(ValueError, match=f"{kind.__name__}: {name}=<obj"):
                kind(**values | {name: object()})
    for name, value in (("rank", 0), ("alpha", 0), ("dropout", 1.0), ("rslora", "no")):
        with pytest.raises(ValueError, match=f"{name}="):
            LoRALayer(8, 8, **{name: value})


def test_a_second_injection_is_refused_in_the_whole_and_for_a_part():
    model = injected()
    for again in (lambda: inject(model, QV), lambda: freeze(model)):
        with refused(model, "unload", RuntimeError):
            again()
    with refused(model, "unload", RuntimeError):
        apply_lora_to_model(model)
    whole = tiny_bert()
    inject(whole.bert, LoRA(rank=2, alpha=3, targets=("query",)))
    for again in (lambda: inject(whole, LoRA(2, 3, ("value",))), lambda: freeze(whole)):
        with refused(whole, r"unload\(model\.bert\) first", RuntimeError):
            again()
    unload(whole.bert)
    inject(whole, LoRA(2, 3, ("value",)))


class Packed(nn.Linear):
    pass


def with_one_layer_twice():
    return nn.ModuleDict(dict.fromkeys("ab", nn.Linear(4, 4)))


def with_one_name_twice():
    of = {"x": nn.Linear(4, 4), "y": nn.LayerNorm(4)}
    return nn.ModuleDict({name: nn.ModuleDict({"q": layer}) for name, layer in of.items()})


TIED = dict(tie_word_embeddings=True)
UNFIT = {
    "no module is left around it": (lambda: nn.Linear(4, 4), "all-linear", "targets"),
    "wrapped by hand": (lambda: LinearWithLoRA(nn.Linear(4, 4)), ("0", "1"), "wrapped already"),
    "Conv1D": (lambda: Conv1D(4, 4), ("0", "1"), "stores its weight as"),
    "a subclass": (lambda: Packed(4, 4), ("0", "1"), "Packed"),
    "tied": (lambda: tiny_llama(**TIED), ("lm_head",), "tied"),
    "shared": (with_one_layer_twice, ("a",), "shares its"),
    "shared, its second name": (with_one_layer_twice, ("b",), "shares its"),
    "one of two types": (with_one_name_twice, ("q",), r"'y\.q' is a LayerNorm.*longer part of"),
    "narrow": (tiny_llama, ("q_proj", "k_proj"), r"=32 of 'model.layers.0.self_attn.k_proj'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_layers_that_do_not_fit_are_refused_and_nothing_changes(case):
    build, targets, message = UNFIT[case]
    model = build()
    if targets == ("0", "1"):
        model = nn.Sequential(nn.Linear(4, 4), model)
    with refused(model, message):
        inject(model, LoRA(33 if case == "narrow" else 2, 3, targets))


def test_modules_to_save_are_checked():
    for name, message in (
        ("norn", "did you mean 'norm'"),
        ("act_fn", "no parameters"),
        ("self_attn", "cannot be a target too"),
        ("lm_head", "tied"),
    ):
        with refused(model := tiny_llama(**TIED), message):
            inject(model, QV, modules_to_save=(name,))


def test_a_wrong_method_model_or_target_is_refused():
    with pytest.raises(TypeError, match="LoRA"):
        inject(tiny_llama(), "lora")
    with pytest.raises(TypeError, match="torch.nn.Module"):
        inject("minilm", QV)
    for targets in (3, ("q_proj", 3), ("",)):
        with pytest.raises(TypeError, match="targets="):
            LoRA(targets=targets)


def test_verbs_say_what_must_come_first():
    model = tiny_llama()
    for verb in (merge, unmerge, unload, report):
        with refused(model, "inject"):
            verb(model)
    inject(model, QV)
    with refused(model, "nothing to take out", RuntimeError):
        unmerge(model)
    merge(model)
    with refused(model, "twice", RuntimeError):
        merge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_in_the_last_layer_leaves_the_first_one_unmerged(dtype):
    model = tiny_llama().to(dtype)
    inject(model, QV)
    last = list(injection_of(model).wrappers.values())[-1]
    with torch.no_grad():
        # A sum of 540,000 is finite in float32.
        for factor in (last.lora.lora_A, last.lora.lora_B):
            factor.fill_(torch.nan if dtype == torch.float32 else 300.0)
    with refused(model, r"layers\.1.*NaN or infinity"):
        merge(model)


def test_the_layer_alone_trains_in_32_bits_beside_16():
    layer = LinearWithLoRA(nn.Linear(8, 6, dtype=torch.bfloat16), rank=2, alpha=3)
    assert layer.lora.lora_A.dtype == torch.float32
    assert layer(torch.ones(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.linear is layer.base and not layer.linear.weight.requires_grad


def test_a_merge_that_needs_a_bias_is_refused_by_a_layer_without_one():
    class Shifted(AdapterLayer):
        def merged_tensors(self):
            return self.base.weight, torch.ones(4)

    layer = Shifted(nn.Linear(4, 4, bias=False))
    with pytest.raises(TypeError, match="the merge needs a bias, and the base layer has none"):
        layer.merge_weights()
    assert not layer.merged


def test_freeze_leaves_the_head_and_what_is_named():
    model = tiny_bert()
    summary = freeze(model, modules_to_save="pooler")
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[0] for n in training} == {"classifier", "bert.pooler.dense"}
    assert summary.trainable == summary.whole_parameters == 64 * 64 + 64 + 2 * 64 + 2
    with pytest.raises(ValueError, match="matches no module"):
        freeze(model, modules_to_save=("nope",))


def test_the_share_is_one_of_the_base():
    """An adapter as large as its base trains 100 % of it, not half of all that is there then."""
    summary = inject(nn.Sequential(nn.Linear(6, 6, bias=False)), LoRA(3, 3, ("0",)))
    assert (summary.trainable, summary.base, summary.total) == (36, 36, 72)
    assert "100 % of the base's 36" in repr(summary)


def test_a_long_line_of_the_report_goes_on_below():
    widths = range(1001, 1009)
    layers = {f"projection_{n}": nn.Linear(8, n) for n in widths}
    lines = repr(inject(nn.ModuleDict(layers), LoRA(2, 3, tuple(layers)))).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 6
    sites = [f"1 × projection_{n} 8→{n}" for n in widths]
    assert " ".join(" ".join(lines).split()).count(", ".join(sites)) == 1
    assert all(any(site in line for line in lines) for site in sites)


def test_pytorchs_own_attention_is_left_alone_or_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    # It calls no forward of its out_proj, a subclass of Linear: wrapped, it would do nothing.
    with refused(model, "NonDynamicallyQuantizableLinear"):
        inject(model, LoRA(2, 3, ("out_proj",)))
    assert inject(model, LoRA(2, 3, "all-linear")).modules == ("linear",)


def test_a_fused_encoder_layer_is_refused_unless_it_is_switched_off():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    method = LoRA(2, 3, ("encoder.linear1", "encoder.linear2"))
    model = nn.ModuleDict({"encoder": layer})
    with refused(model, "set_fastpath_enabled"):
        inject(model, method)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = layer(x)
        inject(model, method)
        perturb(model)
        assert not torch.allclose(layer(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_model_may_look_at_its_layers_tensors():
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    # T5 compares the dtype of its input with that of wo.weight.
    expected = model(input_ids=IDS, labels=IDS).logits
    inject(model, LoRA(2, 3, ("wo", "q")))
    assert torch.allclose(model(input_ids=IDS, labels=IDS).logits, expected, atol=1e-5)
    wrapper = next(iter(injection_of(model).wrappers.values()))
    assert wrapper.weight is wrapper.base.weight and wrapper.bias is None


def test_injected_in_inference_mode_it_still_trains():
    model = tiny_llama()
    with torch.inference_mode():
        inject(model, QV)
        perturb(model)
        merge(model)
        unmerge(model)
        assert not torch.is_grad_enabled()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copies_through_files(tmp_path):
    model = injected()
    expected = model(IDS).logits
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, expected)
    merge(again)
    assert not injection_of(model).merged
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny_llama(seed=1)
    inject(other, QV)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_change_of_dtype_after_injection(dtype):
    model = tiny_bert()
    inject(model, LoRA(2, 3, ("query",)))
    perturb(model).to(dtype)
    assert model(IDS).logits.dtype == dtype
    merge(model)
    unmerge(model)
    assert {p.dtype for p in unload(model).parameters()} == {dtype}
    # The head's old values come back too, rounded to the new type.
    assert torch.equal(model.classifier.weight, tiny_bert().classifier.weight.to(dtype))


def test_autocast():
    model = injected()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=IDS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert torch.allclose(output.logits.float(), model(IDS).logits, atol=0.05)
    for p in model.parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = injected().train(), []
    model.config.use_cache = False
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


# ------------------------------------------------------------------ the smallest methods
# One that wraps, attaches, selects or fails, so that the engine is tested without a lesson.


class ScaledLinear(AdapterLayer):
    def __init__(self, base):
        super().__init__(base)
        self.scale = nn.Parameter(torch.ones(base.out_features))

    def forward(self, x):
        return self.base(x) * self.scale


@dataclass(frozen=True)
class Scale(Method):
    """Wrap layers, without a merge rule."""

    targets: tuple[str, ...] = ("q_proj",)
    files = PeftFiles("TEST_SCALE", tensors={"scale": "scale"})

    def wrap(self, path, layer):
        return ScaledLinear(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_layer_of_ones_own_makes_in_16_bits_trains_in_float32(dtype):
    class Narrow(Scale):
        def wrap(self, path, layer):
            wrapper = ScaledLinear(layer)
            wrapper.scale.data = wrapper.scale.data.to(layer.weight.dtype)
            return wrapper

    model = nn.ModuleDict({"q_proj": nn.Linear(4, 3, dtype=dtype)})
    inject(model, Narrow())
    assert model["q_proj"].scale.dtype == torch.float32
    assert model["q_proj"].base.weight.dtype == dtype


class Shift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, module, args, output):
        return output + self.shift


@dataclass(frozen=True)
class ShiftEmbeddings(Method):
    """Attach one module for the whole model, with a hook."""

    files = PeftFiles("TEST_SHIFT", tensors={"shift": "shift_embeddings"})

    def attach(self, model):
        table = model.get_input_embeddings()
        shift = Shift(table.weight.shape[1])
        return shift, [table.register_forward_hook(shift)]


@dataclass(frozen=True)
class Norms(Method):
    """Select parameters of the base."""

    missing: bool = False
    files = PeftFiles("TEST_NORMS")

    def select(self, model):
        if self.missing:
            return ["no.such.weight"]
        return [n for n, _ in model.named_parameters() if "layernorm" in n]


def test_a_field_without_a_rule_is_the_method_s_own_matter():
    @dataclass(frozen=True)
    class Named(Scale):
        layers: tuple[int, ...] = (0, 1)
        rank: int = 2
        temperature: float = -1.0
        files = PeftFiles("TEST_NAMED")

    assert inject(tiny_llama(), Named()).method == Named(layers=(0, 1))
    with pytest.raises(ValueError, match="Named: rank=0 must be at least 1"):
        Named(rank=0)


def test_the_registry_holds_what_is_put_into_it():
    before = registered_methods()
    assert LoRA in before and Scale not in before and LoRAPlus not in before
    with registered(Scale):
        assert registered_methods() == [*before, Scale]
    assert registered_methods() == before
    assert peft_lessons.methods.__name__ == "peft_lessons.methods"  # no function hides the package

    def defined(parent):  # as a notebook's cell that is run again
        @dataclass(frozen=True)
        class Again(parent):
            files = PeftFiles("TEST_AGAIN")

        return Again

    older, newer = defined(Method), defined(LoRA)
    with registered(older), registered(newer):
        assert registered_methods() == [*before, newer]
    with pytest.raises(TypeError, match="LoRAPlus has no files of its own"):
        register(LoRAPlus)


def test_every_field_of_the_course_s_methods_has_a_rule():
    for method in [*registered_methods(), LoRAPlus, PiSSA]:
        for one in fields(method):
            if one.name not in method.names_modules:
                assert one.name in SETTINGS, (
                    f"{method.__name__}.{one.name} may hold anything: give {one.name!r} a rule in "
                    "SETTINGS of peft_lessons/engine/settings.py"
                )


@pytest.mark.parametrize("training", [True, False])
def test_an_attached_method(training):
    model = tiny_llama().train(training)
    before = model(IDS).logits
    summary = inject(model, ShiftEmbeddings())
    assert injection_of(model).attached.training is training
    assert summary.trainable == 64 and torch.equal(model(IDS).logits, before)
    nn.init.normal_(injection_of(model).attached.shift)
    assert not torch.allclose(model(IDS).logits, before)
    with pytest.raises(TypeError, match="ShiftEmbeddings adds lies outside the layers"):
        merge(model)
    assert torch.equal(unload(model)(IDS).logits, before)


def test_a_selecting_method():
    model = tiny_llama()
    untouched = state(model)
    summary = inject(model, Norms())
    training = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(training) == 4 and summary.trainable == 4 * 64 and summary.total == summary.base
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.add_(1.0)
    assert same(state(unload(model)), untouched)
    with pytest.raises(ValueError, match="no.such.weight"):
        inject(model, Norms(missing=True))
    bare = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to train"):
        inject(bare, Norms())


def test_merging_keeps_the_base_parameters_that_a_method_trains():
    model = tiny_llama()
    inject(model, Norms())
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.add_(1.0)
    learned = model(IDS).logits
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(RuntimeError, match="already merged"):
        merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        save_adapter(model, "never-written")
    assert torch.equal(unload(model)(IDS).logits, learned)


def test_selected_parameters_in_4_bits_are_refused():
    model = nn.Module()
    model.layernorm = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="Norms: 'layernorm' is in 4 bits already"):
        inject(model, Norms())


def test_a_failing_wrap_changes_nothing(monkeypatch):
    def fail(self, path, layer):
        raise ValueError("this layer cannot be wrapped")

    monkeypatch.setattr(Scale, "wrap", fail)
    with refused(model := tiny_llama(), "cannot be wrapped"):
        inject(model, Scale())


def test_the_report_names_selected_parameters_and_the_head():
    model = tiny_bert()

    @dataclass(frozen=True)
    class KeyBiases(Method):
        files = PeftFiles("TEST_KEY_BIASES")

        def select(self, model):
            return [n for n, _ in model.named_parameters() if n.endswith("key.bias")]

    summary = inject(model, KeyBiases())
    assert summary.whole == ("classifier", *KeyBiases().select(model))
    assert summary.whole_parameters == summary.trainable == 2 * 64 + 2 * 64 + 2
    assert "classifier (new head), 2 × key.bias" in repr(summary)
