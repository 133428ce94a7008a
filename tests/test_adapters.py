"""Bottleneck adapters against AdapterHub's stored answers, by hooks on four models, and refusals.

The reference was made by data/build_adapter_reference.py; neither of its packages is needed here.
"""

import json
import threading
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import (
    EACH,
    MODELS,
    batch_of,
    close,
    perturb,
    read_config,
    refused,
    rewrite,
    same,
    state,
    step_of_both,
    tiny_bert,
    tiny_llama,
)
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

from peft_lessons import (
    Adapter,
    BottleneckAdapter,
    QLoRA,
    inject,
    load_adapter,
    load_model,
    save_adapter,
    unload,
)
from peft_lessons.data.bundled import bundled_path
from peft_lessons.engine import WEIGHTS, injection_of
from peft_lessons.methods.adapters import LAYOUTS, STREAM, Bottleneck
from peft_lessons.methods.qlora import dequantize

KINDS = ("houlsby", "pfeiffer", "parallel")
KIND = pytest.mark.parametrize("kind", KINDS)
REFERENCE = bundled_path("reference/adapterhub.safetensors")
FORWARD, GRADIENT = 2e-6, 2e-6


def adapted(name, kind, width=6, **fields):
    model = MODELS[name]()
    torch.manual_seed(3)  # what the method draws
    inject(model, BottleneckAdapter(width, kind, **fields))
    return perturb(model)


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
    "bert": (BertConfig, lambda config: BertModel(config, add_pooling_layer=False)),
    "llama": (LlamaConfig, LlamaModel),
}


def hubs_name(path, name):
    number = next(part for part in path.split(".") if part.isdecimal())
    place = HUBS[path.replace(f".{number}.", ".{}.")].format(number)
    return f"{place}.adapters.a.adapter_{name.replace('down.', 'down.0.')}"


@pytest.mark.parametrize("base", BASES)
@KIND
def test_adapterhub(base, kind, stored):
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
    ours = {}
    for path, wrapper in injection_of(model).wrappers.items():
        for name, p in wrapper.adapter.named_parameters() if hasattr(wrapper, "adapter") else ():
            ours[hubs_name(path, name)] = p
    assert set(ours) == set(values) == set(expected)
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(values[name])
    inputs = {"input_ids": tensors[f"{base}.ids"], "attention_mask": tensors[f"{base}.mask"]}
    output = model(**inputs).last_hidden_state
    close(tensors[f"{base}.{kind}.output"], output, FORWARD, f"{base} {kind} output")
    (output * tensors[f"{base}.w"]).sum().backward()
    for name, p in ours.items():
        assert expected[name].abs().max() > 1e-3
        close(expected[name], p.grad, 5e-6, f"{base} {kind} gradient", relative=True)
    # With what another kind reads, the same tensors give another output.
    others = {
        "houlsby": (),
        "pfeiffer": ("houlsby", "parallel"),
        "parallel": ("houlsby", "pfeiffer"),
    }
    for other in others[kind]:
        for wrapper in injection_of(model).wrappers.values():
            if hasattr(wrapper, "adapter"):
                wrapper.kind = other
        moved = model(**inputs).last_hidden_state - output
        assert moved.abs().max() > 0.01
        vars(STREAM).clear()  # what houlsby does not read was left there


# ------------------------------------------------------------------ four models, by hooks


def by_hooks(model, kind, adapters, scale):
    """The same function without any wrapper: hooks on the plain base, sums written out.

    `adapters` {path of the place: Bottleneck}."""
    kept = {}
    for path, bottleneck in adapters.items():
        layer = model.get_submodule(path)

        def a(t, one=bottleneck):
            low = one.activation(t @ one.down.weight.T + one.down.bias)
            return scale * (low @ one.up.weight.T + one.up.bias)

        if hasattr(layer, "LayerNorm"):
            layer.register_forward_pre_hook(lambda m, args: kept.__setitem__("x", args[1]))
            norm = layer.LayerNorm

            def add(m, args, h, a=a, norm=norm):
                s = h + kept["x"]
                ln = F.layer_norm(s, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
                return h + a({"houlsby": h, "pfeiffer": ln, "parallel": kept["x"]}[kind])

            layer.dropout.register_forward_hook(add)
        else:
            block = model.get_submodule(path.rsplit(".", 2 if ".mlp." in path else 1)[0])
            if kind != "houlsby":
                norm = getattr(block, "final_layer_norm", None) or block.post_attention_layernorm
                norm.register_forward_pre_hook(lambda m, args: kept.__setitem__("x", args[0]))

            def add(m, args, h, a=a):
                if kind == "houlsby":
                    return h + a(h)
                return h + a(h + kept["x"] if kind == "pfeiffer" else kept["x"])

            layer.register_forward_hook(add)
    return model


@EACH
@KIND
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_logits_loss_and_gradients(name, kind, activation):
    batch = batch_of(name)
    ours = adapted(name, kind, activation=activation, scale=1.5)
    plain = MODELS[name]()
    plain.load_state_dict(ours.state_dict(), strict=False)  # a head is perturbed, too
    expected_paths = 4 if kind == "houlsby" else 2
    places = {p: w for p, w in injection_of(ours).wrappers.items() if hasattr(w, "adapter")}
    assert len(places) == expected_paths
    copies = {p: deepcopy(w.adapter) for p, w in places.items()}
    before = plain(**batch).logits
    output = step_of_both(by_hooks(plain, kind, copies, 1.5), ours, batch, FORWARD)
    assert (output.logits - before).abs().max() > 0.02
    for path, wrapper in places.items():
        pairs = zip(copies[path].parameters(), wrapper.adapter.parameters(), strict=True)
        for expected, got in pairs:
            assert got.grad.abs().max() > 0
            close(expected.grad, got.grad, GRADIENT, "gradient")
            close(expected.grad, got.grad, 1e-4, "relative gradient", relative=True)
    assert {n for n, p in ours.named_parameters() if p.grad is not None} >= {
        f"{p}.adapter.{n}" for p in places for n, _ in copies[p].named_parameters()
    }


@EACH
@KIND
def test_counts_and_the_first_gradient(name, kind):
    model = MODELS[name]()
    report = inject(model, BottleneckAdapter(6, kind))
    model(**batch_of(name)).loss.backward()
    # The first step moves `up` alone: a(t) = 0 whatever `down` is.
    for wrapper in injection_of(model).wrappers.values():
        if hasattr(wrapper, "adapter"):
            assert wrapper.adapter.up.weight.grad.any() and wrapper.adapter.up.bias.grad.any()
            assert not wrapper.adapter.down.weight.grad.any()
    places = 4 if kind == "houlsby" else 2
    head = 2 * 64 + 2 if name == "bert" else 0
    assert report.trainable == places * (2 * 64 * 6 + 6 + 64) + head
    assert sum(line.count(" × ") for line in str(report).splitlines()) >= 1


@EACH
@KIND
def test_padding_changes_nothing(name, kind):
    """A row alone and the same row padded in a batch."""
    model, batch = adapted(name, kind), batch_of(name)
    row = {k: v[2:] for k, v in batch.items() if k != "labels"}
    mask = row["attention_mask"].bool()
    alone = {"input_ids": row["input_ids"][mask][None], "attention_mask": mask[mask].long()[None]}
    a, b = model(**row).logits, model(**alone).logits
    if name != "bert":
        a = a[mask][None]
    close(a, b, 1e-5, "padding")


@pytest.mark.parametrize("name", ["bert", "llama"])
@KIND
def test_gradient_checkpointing(name, kind):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(name, kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False  # checkpointing switches it off and says so
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch_of(name)).loss.backward()
        gradients.append([p.grad for _, p in injection_of(model).added()])
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-6, "checkpointing")


def test_threads_do_not_meet():
    models = [adapted("llama", "parallel"), adapted("llama", "pfeiffer")]
    batch = batch_of("llama")
    expected, got = [m(**batch).logits for m in models], [None, None]

    def run(i):
        got[i] = [models[i](**batch).logits for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(torch.equal(logits, expected[i]) for logits in got[i])


SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
DECODER = SMALL | dict(num_key_value_heads=2, head_dim=8)


@pytest.mark.parametrize(
    "build",
    [
        lambda: RobertaModel(RobertaConfig(**SMALL)),
        lambda: ElectraModel(ElectraConfig(**SMALL, embedding_size=32)),
        lambda: MistralModel(MistralConfig(**DECODER)),
        lambda: Qwen3Model(Qwen3Config(**DECODER)),
    ],
    ids=["roberta", "electra", "mistral", "qwen3"],
)
@KIND
def test_the_other_layouts(build, kind):
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.randint(2, 64, (2, 7))
    plain, before = deepcopy(model), model(ids).last_hidden_state
    inject(model, BottleneckAdapter(4, kind))
    assert torch.equal(model(ids).last_hidden_state, before)
    perturb(model)
    wrappers = injection_of(model).wrappers.items()
    copies = {p: deepcopy(w.adapter) for p, w in wrappers if hasattr(w, "adapter")}
    expected = by_hooks(plain, kind, copies, 1.0)(ids).last_hidden_state
    close(expected, model(ids).last_hidden_state, 5e-6, "other layouts")
    assert len(LAYOUTS) == 8


@pytest.mark.parametrize(("base", "d", "layers"), [("minilm", 384, 6), ("tinylm", 192, 6)])
@KIND
def test_the_bundled_models(base, d, layers, kind):
    model = load_model(base)
    ids = torch.randint(5, 4000, (2, 9))
    before = model(ids)[0]
    report = inject(model, BottleneckAdapter(16, kind))
    assert report.trainable == layers * (2 if kind == "houlsby" else 1) * (2 * d * 16 + 16 + d)
    assert torch.equal(model(ids)[0], before)
    assert (perturb(model, 0.05)(ids)[0] - before).abs().max() > 1e-3


# ------------------------------------------------------------------ files


@EACH
@KIND
def test_files(name, kind, tmp_path):
    save_adapter(adapted(name, kind, activation="tanh", scale=0.5), tmp_path)
    config = read_config(tmp_path)
    assert config["peft_type"] == "BOTTLENECK_ADAPTER"
    assert (config["bottleneck_size"], config["kind"]) == (6, kind)
    assert (config["non_linearity"], config["scaling"]) == ("tanh", 0.5)
    keys = load_file(tmp_path / WEIGHTS)
    assert sum(".adapter." in key for key in keys) == (16 if kind == "houlsby" else 8)


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("kind", "houlsby", "misses"),
        ("kind", "between", "kind='between' must be one of"),
        ("non_linearity", "sin", "activation='sin' must be one of"),
        ("bottleneck_size", 3, "has shape"),
        ("bottleneck_size", None, "width=None must be a whole number"),
        ("scaling", -1.0, "scale=-1.0 must be a finite number above 0"),
        ("use_gating", True, "does not read use_gating=True"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(entry, value, told, tmp_path):
    save_adapter(adapted("llama", "pfeiffer"), tmp_path)
    model = tiny_llama()
    with refused(model, told):
        load_adapter(model, rewrite(tmp_path, **{entry: value}))


def test_another_base_is_refused(tmp_path):
    save_adapter(adapted("bert", "parallel"), tmp_path)
    with pytest.raises(ValueError, match="another|other weights"):
        load_adapter(tiny_bert(seed=1), tmp_path)
    load_adapter(tiny_bert(seed=1), tmp_path, check_base=False)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(width=0), "width=0 must be at least 1"),
        (dict(width=-3), "width=-3 must be at least 1"),
        (dict(width=4.0), "width=4.0 must be a whole number"),
        (dict(width=True), "width=True must be a whole number"),
        (dict(width=4, kind="between"), "kind='between' must be one of 'houlsby', 'pfeiffer'"),
        (dict(width=4, kind=None), "kind=None must be one of"),
        (dict(width=4, activation="swish"), "activation='swish' must be one of 'gelu'"),
        (dict(width=4, activation=F.gelu), "must be one of 'gelu'"),
        (dict(width=4, scale=0), "scale=0 must be a finite number above 0"),
        (dict(width=4, scale=float("nan")), "scale=nan must be a finite number"),
        (dict(width=4, scale="4"), "scale='4' must be a number"),
    ],
)
def test_a_wrong_description_is_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        BottleneckAdapter(**fields)


@EACH
@KIND
@pytest.mark.parametrize("width", [64, 1000])
def test_a_bottleneck_as_wide_as_the_model_is_refused(name, kind, width):
    model = MODELS[name]()
    with refused(model, f"on '.*': {width} numbers are no bottleneck for 64"):
        inject(model, BottleneckAdapter(width, kind))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), "no block whose places are known.*BertLayer"),
        (
            lambda: OPTModel(
                OPTConfig(
                    vocab_size=64,
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    ffn_dim=48,
                    max_position_embeddings=32,
                    word_embed_proj_dim=32,
                    do_layer_norm_before=False,
                )
            ),
            "normalises after the sum",
        ),
    ],
    ids=["no block", "a post-norm OPT"],
)
@KIND
def test_a_model_without_known_places_is_refused(build, told, kind):
    model = build()
    with refused(model, told):
        inject(model, BottleneckAdapter(2, kind))


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
    close(expected, adapter(x), 1e-6, "Adapter")
    assert adapter(x.bfloat16()).dtype == torch.bfloat16
    # No name of it is one that a decoder's targets match.
    assert not {"down_proj", "up_proj"} & {n.rpartition(".")[2] for n, _ in adapter.named_modules()}


def test_the_start_gives_up_a_gradient_as_large_as_kaiming_down():
    """With a std of 1e-3 for both: its first gradient of `up` is far smaller."""
    torch.manual_seed(0)
    ours, narrow, x = Adapter(384, 64), Adapter(384, 64), torch.randn(16, 384)
    with torch.no_grad():
        for linear in (narrow.adapter.down, narrow.adapter.up):
            linear.weight.normal_(std=1e-3)
    weights, norms = torch.randn(16, 384), []
    for adapter in (ours, narrow):
        (adapter(x) * weights).sum().backward()
        norms.append(adapter.adapter.up.weight.grad.norm().item())
    assert norms[0] > 20 * norms[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 4), "hidden_size=0 must be at least 1"),
        ((8, 0), "bottleneck_size=0 must be at least 1"),
        ((8, 2.5), "bottleneck_size=2.5 must be a whole number"),
        ((8, 4, 0), "adapter_scalar=0 must be a finite number above 0"),
    ],
)
def test_the_adapter_refuses(arguments, told):
    with pytest.raises(ValueError, match=told):
        Adapter(*arguments)


def test_a_bottleneck_refuses():
    with pytest.raises(ValueError, match="width=0"):
        Bottleneck(8, 0)
    with pytest.raises(ValueError, match="activation='sin'"):
        Bottleneck(8, 2, "sin")


# ------------------------------------------------------------------ as users break it


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
@KIND
def test_one_block_alone(name, kind):
    """Its path in itself is empty: no dot may stand before the names of its places."""
    model = MODELS[name]()
    path = next(p for p, m in model.named_modules() if type(m).__name__ in LAYOUTS)
    block, before = model.get_submodule(path), state(model)
    inject(block, BottleneckAdapter(6, kind))
    assert not any(p.startswith(".") for p in injection_of(block).wrappers)
    whole = MODELS[name]()
    inject(whole, BottleneckAdapter(6, kind))
    expected = {n for n, _ in injection_of(whole).added() if n.startswith(f"{path}.")}
    assert {f"{path}.{n}" for n, _ in injection_of(block).added()} == expected
    unload(block)
    assert same(state(model), before)


class Odd(nn.Module):
    """Computes a Linear, and shows as little of itself as a 4-bit layer."""

    def __init__(self, linear):
        super().__init__()
        self.held = [linear]
        self.register_buffer("packed", torch.zeros(4, dtype=torch.uint8))

    def forward(self, x):
        return self.held[0](x)


@EACH
@KIND
def test_a_place_that_ends_in_no_linear_is_refused(name, kind):
    """It passed for a norm, and nothing trained without a word."""
    model = MODELS[name]()
    end = {"llama": "mlp", "qwen2": "mlp", "opt": "", "bert": "output"}[name]
    path = next(p for p, m in model.named_modules() if type(m).__name__ in LAYOUTS)
    parent = model.get_submodule(f"{path}.{end}".rstrip("."))
    leaf = {"llama": "down_proj", "qwen2": "down_proj", "opt": "fc2", "bert": "dense"}[name]
    setattr(parent, leaf, Odd(getattr(parent, leaf)))
    with refused(model, r"on '.*': Odd must be a plain nn.Linear"):
        inject(model, BottleneckAdapter(6, kind))


@KIND
def test_a_base_in_4_bits_is_refused(kind):
    model = tiny_llama(intermediate_size=128)
    inject(model, QLoRA(rank=4, alpha=8, targets=("q_proj",)))
    unload(model)
    with refused(model, r"NF4Linear must be .*dequantize\(model\) first"):
        inject(model, BottleneckAdapter(6, kind))
    dequantize(model)
    assert inject(model, BottleneckAdapter(6, kind)).trainable


def modes(model):
    return {path: module.training for path, module in model.named_modules()}


@KIND
def test_a_dropout_that_is_switched_off_stays_off(kind):
    """What is wrapped is a module of several, of which a user may have put one in eval mode."""
    model = tiny_bert().train()
    for layer in model.bert.encoder.layer:
        layer.output.dropout.eval()
    before = modes(model)
    inject(model, BottleneckAdapter(6, kind))
    for layer in model.bert.encoder.layer:
        assert not layer.output.base.dropout.training and layer.output.adapter.up.training
    unload(model)
    assert modes(model) == before


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_a_part_of_a_block_alone_is_told_what_it_lacks(kind):
    model = adapted("llama", kind)
    with pytest.raises(RuntimeError, match="also reads the residual.*call the whole block"):
        model.model.layers[0].mlp(torch.randn(1, 3, 64))


def test_loaded_under_inference_mode_with_a_head(tmp_path):
    model, again, batch = adapted("bert", "pfeiffer"), tiny_bert(), batch_of("bert")
    save_adapter(model, tmp_path)
    with torch.inference_mode():
        load_adapter(again, tmp_path, trainable=True)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    again(**batch).loss.backward()


@KIND
def test_the_dropout_before_the_adapter_stays(kind):
    model = adapted("bert", kind).train()
    wrapper = model.bert.encoder.layer[0].output
    z, x, zero = torch.randn(2, 5, 96), torch.randn(2, 5, 64), torch.zeros(2, 5, 64)
    wrapper.base.dropout.p = 1.0  # of h nothing is left
    norm = wrapper.base.LayerNorm
    t = {"houlsby": zero, "pfeiffer": norm(x), "parallel": x}[kind]
    close(norm(x + wrapper.adapter(t)), wrapper(z, x), FORWARD, "all dropped")


def test_down_starts_as_a_linear_of_torch_does():
    down = Bottleneck(400, 50).down.weight
    assert 0.95 / 400**0.5 < down.abs().max() <= 1 / 400**0.5


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    save_adapter(adapted("llama", "pfeiffer"), tmp_path)
    entries = ("kind", "non_linearity", "scaling")
    assert read_config(tmp_path).keys() >= set(entries)
    model = tiny_llama()
    load_adapter(model, rewrite(tmp_path, **dict.fromkeys(entries, ...)))
    assert injection_of(model).method == BottleneckAdapter(6)
