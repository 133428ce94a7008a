"""Compare bottleneck adapters with AdapterHub's stored answers; see what they refuse.

The reference was made by data/build_adapter_reference.py; neither of its packages is needed here.
"""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import (
    MODELS,
    batch_of,
    close,
    perturb,
    read_config,
    refused,
    rewrite,
    tiny_bert,
    tiny_llama,
)
from torch import nn
from torch.nn import functional as F

from peft_lessons import (
    Adapter,
    BottleneckAdapter,
    QLoRA,
    inject,
    load_adapter,
    save_adapter,
    unload,
)
from peft_lessons.data.bundled import bundled_path
from peft_lessons.engine import injection_of
from peft_lessons.methods.adapters import LAYOUTS
from peft_lessons.methods.qlora import dequantize

KINDS = ("houlsby", "pfeiffer", "parallel")
KIND = pytest.mark.parametrize("kind", KINDS)
BASE = pytest.mark.parametrize("name", ["llama", "bert"])
REFERENCE = bundled_path("reference/adapterhub.safetensors")
FORWARD = 2e-6


def adapted(name, kind):
    model = MODELS[name]()
    torch.manual_seed(3)  # what the method draws
    inject(model, BottleneckAdapter(6, kind))
    return perturb(model)


def adapters_of(model):
    wrappers = injection_of(model).wrappers.items()
    return {path: w.adapter for path, w in wrappers if hasattr(w, "adapter")}


# ------------------------------------------------------------------ AdapterHub's stored answers


@pytest.fixture(scope="module")
def stored():
    with safe_open(REFERENCE, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


HUBS = {  # what AdapterHub calls the places
    "encoder.layer.{}.attention.output": "encoder.layer.{}.attention.output",
    "encoder.layer.{}.output": "encoder.layer.{}.output",
    "layers.{}.self_attn.o_proj": "layers.{}.attention_adapters",
    "layers.{}.mlp.down_proj": "layers.{}.output_adapters",
}
BASES = {
    "bert": (
        transformers.BertConfig,
        lambda config: transformers.BertModel(config, add_pooling_layer=False),
    ),
    "llama": (transformers.LlamaConfig, transformers.LlamaModel),
}


def hubs_name(path, name):
    number = next(part for part in path.split(".") if part.isdecimal())
    place = HUBS[path.replace(f".{number}.", ".{}.")].format(number)
    return f"{place}.adapters.a.adapter_{name.replace('down.', 'down.0.')}"


@pytest.mark.parametrize("base", BASES)
@KIND
def test_outputs_and_gradients_are_those_of_adapterhub(base, kind, stored):
    tensors, about = stored
    assert (about["adapters"], about["transformers"]) == ("1.3.0", "4.57.6")

    def named(prefix):
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    config_class, build = BASES[base]
    model = build(config_class(**json.loads(about[f"config {base}"]))).eval()
    assert str(model.load_state_dict(named(f"{base}.base."))) == "<All keys matched successfully>"
    config = json.loads(about[f"config {kind}"])
    method = BottleneckAdapter(
        width=model.config.hidden_size // int(config["reduction_factor"]),
        kind=kind,
        activation={"swish": "silu"}.get(config["non_linearity"], config["non_linearity"]),
        scale=config["scaling"],
    )
    inject(model, method)
    values = named(f"{base}.{kind}.adapter.")
    expected = named(f"{base}.{kind}.grad.")
    ours = {
        hubs_name(path, name): p
        for path, adapter in adapters_of(model).items()
        for name, p in adapter.named_parameters()
    }
    assert set(ours) == set(values) == set(expected)
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(values[name])
    inputs = {"input_ids": tensors[f"{base}.ids"], "attention_mask": tensors[f"{base}.mask"]}
    output = model(**inputs).last_hidden_state
    close(tensors[f"{base}.{kind}.output"], output, FORWARD)
    (output * tensors[f"{base}.w"]).sum().backward()
    for name, p in ours.items():
        assert expected[name].abs().max() > 1e-3
        close(expected[name], p.grad, 5e-6, name, relative=True)


# ------------------------------------------------------------------ other models


def by_hooks(model, kind, adapters):
    """Compute the same on a pre-norm model without wrappers, by hooks on the plain base."""
    kept = {}
    for path, one in adapters.items():
        block = model.get_submodule(path.rsplit(".", 2 if ".mlp." in path else 1)[0])
        if kind != "houlsby":
            norm = getattr(block, "final_layer_norm", None) or block.post_attention_layernorm
            norm.register_forward_pre_hook(lambda m, args: kept.__setitem__("x", args[0]))

        def add(m, args, h, one=one):
            t = h if kind == "houlsby" else kept["x"] + (h if kind == "pfeiffer" else 0)
            low = one.activation(t @ one.down.weight.T + one.down.bias)
            return h + low @ one.up.weight.T + one.up.bias

        model.get_submodule(path).register_forward_hook(add)
    return model


def test_gradient_checkpointing_changes_no_gradient():
    """A block that is computed again taps its residual again."""
    gradients = []
    for checkpointed in (False, True):
        model = adapted("llama", "parallel").train()
        model.config.use_cache = False  # checkpointing switches it off and says so
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch_of("llama")).loss.backward()
        gradients.append([p.grad for _, p in injection_of(model).added()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
FEW_KEYS = SMALL | dict(num_key_value_heads=2, head_dim=8)
OPT = SMALL | dict(ffn_dim=48, word_embed_proj_dim=32)


OTHERS = {
    "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**FEW_KEYS)),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**FEW_KEYS)),
    "opt": lambda: transformers.OPTModel(transformers.OPTConfig(**OPT)),
}


@pytest.mark.parametrize("name", OTHERS)
@KIND
def test_the_other_decoders_are_right_by_hooks(name, kind):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    ids, plain = torch.randint(2, 64, (2, 7)), deepcopy(model)
    inject(model, BottleneckAdapter(4, kind))
    perturb(model)
    expected = by_hooks(plain, kind, deepcopy(adapters_of(model)))(ids).last_hidden_state
    close(expected, model(ids).last_hidden_state, 5e-6)


def test_the_other_encoders_have_the_places_of_a_bert():
    for model in (
        transformers.RobertaModel(transformers.RobertaConfig(**SMALL)),
        transformers.ElectraModel(transformers.ElectraConfig(**SMALL, embedding_size=32)),
    ):
        ids = torch.randint(2, 64, (2, 7))
        before = model.eval()(ids).last_hidden_state
        inject(model, BottleneckAdapter(4, "houlsby"))
        assert torch.equal(model(ids).last_hidden_state, before)
        assert len(adapters_of(perturb(model))) == 4
        assert (model(ids).last_hidden_state - before).abs().max() > 0.01


# ------------------------------------------------------------------ files


def test_a_file_has_its_names_and_defaults_and_must_fit(tmp_path):
    save_adapter(adapted("llama", "pfeiffer"), tmp_path)
    config = read_config(tmp_path)
    assert (config["peft_type"], config["bottleneck_size"]) == ("BOTTLENECK_ADAPTER", 6)
    defaults = {"kind": "pfeiffer", "non_linearity": "gelu", "scaling": 1.0}
    assert defaults.items() <= config.items()
    model = tiny_llama()
    for entry, told in (({"kind": "houlsby"}, "misses"), ({"bottleneck_size": 3}, "has shape")):
        with refused(model, told):
            load_adapter(model, rewrite(tmp_path, **config | entry))
    load_adapter(model, rewrite(tmp_path, **config | dict.fromkeys(defaults, ...)))
    assert injection_of(model).method == BottleneckAdapter(6)


# ------------------------------------------------------------------ refusals


def test_the_error_for_a_wrong_kind_or_activation_names_the_right_ones():
    for fields in (dict(kind="between"), dict(activation="swish")):
        with pytest.raises(ValueError, match="must be one of '(houlsby|gelu)'"):
            BottleneckAdapter(4, **fields)


@BASE
def test_a_bottleneck_as_wide_as_the_model_is_refused(name):
    model = MODELS[name]()
    with refused(model, "on '.*': 64 numbers are no bottleneck for 64"):
        inject(model, BottleneckAdapter(64))


def test_a_model_whose_sublayers_are_unknown_is_refused():
    post_norm = transformers.OPTModel(transformers.OPTConfig(**OPT, do_layer_norm_before=False))
    for model, told in (
        (nn.Sequential(nn.Linear(8, 8)), "no block whose places are known.*BertLayer"),
        (post_norm, "normalises after the sum"),
    ):
        with refused(model, told):
            inject(model, BottleneckAdapter(2))


# ------------------------------------------------------------------ the modules alone


def test_the_adapter_by_itself():
    torch.manual_seed(0)
    adapter, x = Adapter(32, 8, adapter_scalar=0.7), torch.randn(3, 5, 32)
    assert torch.equal(adapter(x), x), "the identity at step 0"
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 32 * 8 + 8 + 32
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    p = dict(adapter.adapter.named_parameters())
    low = F.gelu(x @ p["down.weight"].T + p["down.bias"])
    expected = x + 0.7 * (low @ p["up.weight"].T + p["up.bias"])
    close(expected, adapter(x))
    assert adapter(x.bfloat16()).dtype == torch.bfloat16


def test_down_starts_as_a_linear_layer_does():
    """With a std of 1e-3 for both, the first gradient of `up` would be far smaller."""
    down = Adapter(384, 64).adapter.down
    assert 0.95 / 384**0.5 < down.weight.abs().max() <= 1 / 384**0.5


# ------------------------------------------------------------------ as users break it


@BASE
def test_one_block_alone(name):
    """Its path in itself is empty: no dot may stand before the names of its places."""
    model, whole = MODELS[name](), MODELS[name]()
    path = next(p for p, m in model.named_modules() if type(m).__name__ in LAYOUTS)
    inject(model.get_submodule(path), BottleneckAdapter(6))
    inject(whole, BottleneckAdapter(6))
    expected = {n for n, _ in injection_of(whole).added() if n.startswith(f"{path}.")}
    added = injection_of(model.get_submodule(path)).added()
    assert {f"{path}.{n}" for n, _ in added} == expected


class Odd(nn.Module):
    """Compute a Linear, and show as little of itself as a 4-bit layer."""

    def __init__(self, linear):
        super().__init__()
        self.held = [linear]
        self.register_buffer("packed", torch.zeros(4, dtype=torch.uint8))

    def forward(self, x):
        return self.held[0](x)


@BASE
def test_a_sublayer_that_does_not_end_in_a_linear_is_refused(name):
    """It passed for a norm, and nothing trained without a word."""
    model = MODELS[name]()
    path, leaf = {
        "llama": ("model.layers.0.mlp", "down_proj"),
        "bert": ("bert.encoder.layer.0.output", "dense"),
    }[name]
    parent = model.get_submodule(path)
    setattr(parent, leaf, Odd(getattr(parent, leaf)))
    with refused(model, r"on '.*': Odd must be a plain nn.Linear"):
        inject(model, BottleneckAdapter(6))


def test_a_base_in_4_bits_is_refused():
    model = tiny_llama(intermediate_size=128)
    inject(model, QLoRA(rank=4, alpha=8, targets=("q_proj",)))
    unload(model)
    with refused(model, r"NF4Linear must be .*dequantize\(model\) first"):
        inject(model, BottleneckAdapter(6))
    dequantize(model)
    assert inject(model, BottleneckAdapter(6)).trainable


def test_a_dropout_that_is_switched_off_stays_off():
    """What is wrapped is a module of several, of which a user may have put one in eval mode."""
    model = tiny_bert().train()
    outputs = [layer.output for layer in model.bert.encoder.layer]
    for output in outputs:
        output.dropout.eval()
    before = {path: module.training for path, module in model.named_modules()}
    inject(model, BottleneckAdapter(6))
    assert not any(output.dropout.training for output in outputs)
    assert all(adapter.up.training for adapter in adapters_of(model).values())
    unload(model)
    assert {path: module.training for path, module in model.named_modules()} == before


def test_the_error_for_a_part_of_a_block_names_what_it_lacks():
    model = adapted("llama", "pfeiffer")
    with pytest.raises(RuntimeError, match="also reads the residual.*call the whole block"):
        model.model.layers[0].mlp(torch.randn(1, 3, 64))


@KIND
def test_the_dropout_before_the_adapter_stays(kind):
    model = adapted("bert", kind).train()
    wrapper = model.bert.encoder.layer[0].output
    z, x, zero = torch.randn(2, 5, 96), torch.randn(2, 5, 64), torch.zeros(2, 5, 64)
    wrapper.base.dropout.p = 1.0  # of h nothing is left
    norm = wrapper.base.LayerNorm
    t = {"houlsby": zero, "pfeiffer": norm(x), "parallel": x}[kind]
    close(norm(x + wrapper.adapter(t)), wrapper(z, x), FORWARD)
