"""(IA)³ against Hugging Face PEFT on four models, its files both ways, and what it refuses."""

import math
from copy import deepcopy

import peft
import pytest
import torch
from tiny import (
    EACH,
    MODELS,
    PLACES,
    batch_of,
    close,
    gradients,
    refused,
    rewrite,
    step_of_both,
    task_type,
    tiny_bert,
    tiny_llama,
    tiny_qwen2,
)
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_lessons import (
    IA3,
    IA3Layer,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import injection_of
from peft_lessons.methods.ia3 import LinearWithIA3

pytestmark = pytest.mark.filterwarnings(
    "ignore:Unmerge result can be inaccurate",
)

FORWARD, GRADIENT, MERGED = 1e-6, 1e-6, 1e-5
LLAMA, BERT = PLACES["llama"], PLACES["bert"]


def as_peft(names):
    return names if isinstance(names, str) else list(names)


def theirs_on(base, targets, feedforward, task=None):
    config = peft.IA3Config(
        target_modules=as_peft(targets), feedforward_modules=as_peft(feedforward), task_type=task
    )
    return peft.get_peft_model(base, config)


def layers_of(theirs):
    return {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "ia3_l")}


def vectors(model):
    return {path: wrapper.l for path, wrapper in injection_of(model).wrappers.items()}


def pair(base, targets, feedforward, task=None):
    """(PEFT's model, ours) on copies of one base, with the same random vectors."""
    theirs = theirs_on(deepcopy(base), targets, feedforward, task)
    ours = deepcopy(base)
    inject(ours, IA3(targets, feedforward))
    layers, wrappers = layers_of(theirs), injection_of(ours).wrappers
    assert list(layers) == list(wrappers)
    torch.manual_seed(7)
    with torch.no_grad():
        for path, layer in layers.items():
            mine, value = wrappers[path].l, layer.ia3_l["default"]
            assert mine.shape == value.shape and layer.is_feedforward == wrappers[path].feedforward
            value.add_(0.3 * torch.randn_like(value))
            mine.copy_(value)
    return theirs.eval(), ours.eval()


def both(name):
    return pair(MODELS[name](), *PLACES[name], task_type(name))


def layer_of(bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias)


def trained(wrapper, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        wrapper.l.add_(0.3 * torch.randn_like(wrapper.l))
    return wrapper


# ------------------------------------------------------------------ one block, one layer


def test_the_layer_by_itself():
    layer = IA3Layer(64, kv_dim=32, ff_dim=96)
    assert [tuple(p.shape) for p in (layer.l_k, layer.l_v, layer.l_ff)] == [(32,), (32,), (96,)]
    assert [n for n, _ in layer.named_parameters()] == ["l_k", "l_v", "l_ff"]
    k, v, h = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 5, 96)
    assert torch.equal(layer.scale_key(k), k) and torch.equal(layer.scale_ffn(h), h)
    with torch.no_grad():
        for value, p in zip((2, 3, 4), layer.parameters(), strict=True):
            p.fill_(value)
    assert torch.equal(layer.scale_key(k), 2 * k)
    assert torch.equal(layer.scale_value(v), 3 * v)
    assert torch.equal(layer.scale_ffn(h), 4 * h)
    assert layer.scale_key(k.bfloat16()).dtype == torch.bfloat16
    assert IA3Layer(64).l_k.shape == IA3Layer(64).l_ff.shape == (64,)
    assert IA3Layer(64, ff_dim=96).l_v.shape == (64,)


def test_the_layer_with_one_width_has_its_size():
    assert 32 * sum(p.numel() for p in IA3Layer(4096).parameters()) == 393_216
    right = IA3Layer(4096, ff_dim=11008)
    assert 32 * sum(p.numel() for p in right.parameters()) == 614_400
    grouped = IA3Layer(4096, kv_dim=1024, ff_dim=14336)
    assert 32 * sum(p.numel() for p in grouped.parameters()) == 524_288


@pytest.mark.parametrize("width", [1, 63, 128])
@pytest.mark.parametrize("verb", ["scale_key", "scale_value", "scale_ffn"])
def test_another_width_is_refused(verb, width):
    with pytest.raises(ValueError, match=rf"64 entries.* {width} wide: .*kv_dim.*ff_dim"):
        getattr(IA3Layer(64), verb)(torch.randn(3, width))


def test_a_vector_of_one_is_not_stretched():
    with pytest.raises(ValueError, match="1 entries"):
        IA3Layer(64, kv_dim=1).scale_key(torch.randn(3, 64))


@pytest.mark.parametrize(
    "settings", [dict(dim=0), dict(dim=2.0), dict(kv_dim=-1), dict(ff_dim=0), dict(ff_dim=True)]
)
def test_a_width_must_be_a_number_of_entries(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        IA3Layer(**dict(dim=64) | settings)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("feedforward", [True, False])
def test_the_definition(bias, feedforward):
    linear, x = layer_of(bias), torch.randn(3, 5, 24)
    wrapper = LinearWithIA3(linear, feedforward)
    assert torch.equal(wrapper(x), linear(x)), "step 0 is the base"
    vector = trained(wrapper).l.detach().flatten()
    expected = linear(x * vector) if feedforward else linear(x) * vector
    assert torch.equal(wrapper(x), expected)
    assert tuple(wrapper.l.shape) == ((1, 24) if feedforward else (10, 1))
    # Merged, unmerged, and merged again.
    W = linear.weight.clone()
    b = linear.bias.clone() if bias else None
    for _ in range(2):
        wrapper.merge_weights()
        close(wrapper(x), expected, MERGED, "layer merged")
        assert b is None or torch.equal(linear.bias, b if feedforward else b * vector)
        wrapper.unmerge_weights()
        close(linear.weight, W, 1e-6, "layer unmerged")
        assert b is None or (linear.bias - b).abs().max() <= 1e-6
    assert [n for n, p in wrapper.named_parameters() if p.requires_grad] == ["l"]


def test_a_swiglu_block_could_scale_up_proj_instead():
    """The feed-forward's inner activations are a product, so either factor may carry the vector."""
    mlp, other = tiny_llama().model.layers[0].mlp, tiny_llama().model.layers[0].mlp
    mlp.down_proj = trained(LinearWithIA3(mlp.down_proj, feedforward=True))
    other.up_proj = LinearWithIA3(other.up_proj, feedforward=False)
    with torch.no_grad():
        other.up_proj.l.copy_(mlp.down_proj.l.T)
    x = torch.randn(2, 7, 64)
    close(mlp(x), other(x), FORWARD, "up_proj's output for down_proj's input")


def test_the_output_of_the_feedforward_is_another_method():
    x, base = torch.randn(200, 96), layer_of()
    base = nn.Linear(96, 64)
    right = trained(LinearWithIA3(base, feedforward=True))
    y, plain = right(x) - base.bias, base(x) - base.bias
    best = (y * plain).sum(0) / plain.square().sum(0)  # the best vector on the output
    assert (y - plain * best).norm() / (y - plain).norm() > 0.5


# ------------------------------------------------------------------ models, against PEFT


@EACH
def test_logits_loss_and_gradients(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, *PLACES[name], task_type(name))
    output = step_of_both(theirs, ours, batch, FORWARD)
    assert (output.logits - base(**batch).logits).abs().max() > 0.005
    for name, (expected, got) in gradients(theirs, ours, {"ia3_l.default": "l"}).items():
        assert expected.abs().max() > 0, name
        close(expected, got, GRADIENT, name)


def test_bert_by_name_takes_the_attention_output_too():
    """PEFT's own defaults for a BERT: one vector more a layer than the paper has."""
    names = ("key", "value", "output.dense"), ("output.dense",)
    theirs, ours = pair(tiny_bert(), *names, "SEQ_CLS")
    batch = batch_of("bert")
    close(theirs(**batch).logits, ours(**batch).logits, FORWARD, "bert by name")
    assert len(vectors(ours)) == 8 and len(vectors(both("bert")[1])) == 6


def test_a_feedforward_that_is_left_out_is_scaled_at_its_output():
    theirs, ours = pair(tiny_llama(), LLAMA[0], ())
    assert vectors(ours)["model.layers.0.mlp.down_proj"].shape == (64, 1)
    batch = batch_of("llama")
    close(theirs(**batch).logits, ours(**batch).logits, FORWARD, "no feedforward")


@EACH
def test_counts(name):
    theirs, ours = both(name)
    own = sum(p.numel() for n, p in theirs.named_parameters() if "ia3_l" in n)
    mine = {n: p.numel() for n, p in injection_of(ours).added()}
    assert own == sum(mine.values())
    kv = 32 if name in ("llama", "qwen2") else 64
    assert own == 2 * (2 * kv + 96)
    assert "k_proj 64→32" in repr(report(ours)) or name in ("opt", "bert")


@EACH
def test_merged(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, *PLACES[name], task_type(name))
    merge(ours)
    merged, plain = theirs.merge_and_unload(), unload(ours)
    for (_, e), (_, p) in zip(merged.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(e, p)
    close(merged(**batch).logits, plain(**batch).logits, 0, "merged against PEFT")


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base(name, dtype):
    base, batch = MODELS[name]().to(dtype), batch_of(name)
    theirs, ours = pair(base, *PLACES[name], task_type(name))
    a, b = theirs(**batch), ours(**batch)
    assert a.logits.dtype == b.logits.dtype == dtype
    close(a.logits.float(), b.logits.float(), 1e-6, "16-bit logits")
    merge(ours)
    merged = deepcopy(theirs).merge_and_unload()(**batch).logits.float()
    close(merged, ours(**batch).logits.float(), 1e-6, "16-bit merged against PEFT")


def test_a_layer_of_its_own_in_16_bits_has_a_float32_vector():
    for dtype, vector in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert LinearWithIA3(layer_of().to(dtype), True).l.dtype == vector


def test_under_autocast():
    ours, batch = tiny_llama(), batch_of("llama")
    inject(ours, IA3(*LLAMA))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**batch).logits, tiny_llama()(**batch).logits)
        ours(**batch).loss.backward()
    assert all(p.grad.any() for p in vectors(ours).values())


# ------------------------------------------------------------------ files


def test_pefts_own_defaults_open_in_ours(tmp_path):
    """Without names PEFT takes those of the architecture; its file says which they were."""
    theirs = peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    method = injection_of(model).method
    assert set(method.targets) == set(LLAMA[0]) and method.feedforward == LLAMA[1]


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (LLAMA[0], ()),
        ("all-linear", ("down_proj",)),
        ("all-linear", r".*\.down_proj"),
        (r".*\.(k_proj|v_proj|down_proj)", ("down_proj",)),
        (LLAMA[0], r".*\.layers\.1\.mlp\.down_proj"),
        (("k_proj", "mlp.down_proj"), ("down_proj",)),
    ],
    ids=str,
)
def test_every_way_to_name_the_layers_survives_both_files(targets, feedforward, tmp_path):
    base, batch = tiny_llama(), batch_of("llama")
    ours = deepcopy(base)
    inject(ours, IA3(targets, feedforward))
    for i, wrapper in enumerate(injection_of(ours).wrappers.values()):
        trained(wrapper, i)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()
    close(theirs(**batch).logits, ours(**batch).logits, FORWARD, "named otherwise")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        model = deepcopy(base)
        load_adapter(model, tmp_path / folder)
        assert torch.equal(model(**batch).logits, ours(**batch).logits)


def edited(folder, **entries):
    """PEFT's files with some entries of the config changed."""
    theirs, _ = pair(tiny_llama(), *LLAMA)
    theirs.save_pretrained(folder)
    return rewrite(folder, **entries)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (dict(feedforward_modules=None), "feedforward=None"),
        (dict(target_modules=None), "targets=None"),
        (dict(feedforward_modules=[]), r"down_proj.ia3_l.*\(1, 96\).*\(64, 1\)"),
        (dict(feedforward_modules=["k_proj", "down_proj"]), r"k_proj.ia3_l.*\(32, 1\).*\(1, 64\)"),
        (dict(feedforward_modules=["o_proj"]), "'o_proj' is not among the targets"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(exclude_modules=["down_proj"]), "exclude_modules"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(entries, match, tmp_path):
    model = tiny_llama()
    with refused(model, match):
        load_adapter(model, edited(tmp_path, **entries))


def test_how_it_started_says_nothing(tmp_path):
    model = tiny_llama()
    load_adapter(model, edited(tmp_path, init_ia3_weights=False))


@pytest.mark.parametrize("change", ["turned", "nan", "missing"])
def test_a_vector_that_does_not_fit_is_refused(change, tmp_path):
    def spoil(tensors):
        key = next(k for k in tensors if "down_proj" in k)
        old = tensors.pop(key)
        if change != "missing":
            tensors[key] = old.T.contiguous() if change == "turned" else old * math.nan

    match = {"turned": r"\(96, 1\).*\(1, 96\)", "nan": "NaN", "missing": "misses"}[change]
    model = tiny_llama()
    with refused(model, match):
        load_adapter(model, rewrite(edited(tmp_path), spoil))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (("k_proj", "v_proj"), ("down_proj",)),
        (("k_proj", "down_proj"), ("down_proj", "up_proj")),
        (("down_proj",), ("mlp.down_proj",)),
        (("k_proj", "v_proj"), r".*\.down_proj"),
        (r".*\.(k_proj|v_proj)", ("down_proj",)),
        ("all-linear", ("lm_head",)),
        ("all-linear", "all-linear"),
    ],
    ids=str,
)
def test_feedforward_must_be_among_the_targets(targets, feedforward):
    model = tiny_llama()
    with refused(model, "feedforward: .* is not among the targets"):
        inject(model, IA3(targets, feedforward))


def test_names_are_told_at_once():
    with pytest.raises(ValueError, match="'fc2' is not among the targets, which are 'k_proj'"):
        IA3(("k_proj",), ("fc2",))


@pytest.mark.parametrize(
    ("targets", "feedforward", "error"),
    [
        (LLAMA[0], None, TypeError),
        (LLAMA[0], (3,), TypeError),
        (LLAMA[0], "", ValueError),
        (LLAMA[0], 7, TypeError),
        (None, (), TypeError),
    ],
    ids=str,
)
def test_names_must_be_names(targets, feedforward, error):
    model = tiny_llama()
    with refused(model, "targets|feedforward", error):
        inject(model, IA3(targets, feedforward))


def test_both_must_be_said():
    with pytest.raises(TypeError, match="feedforward"):
        IA3(("k_proj", "v_proj"))


def test_lists_and_sets_are_taken():
    assert IA3(["k_proj", "fc"], {"fc"}) == IA3(("k_proj", "fc"), ("fc",))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("k_proj", "w_proj"), "'w_proj' matches no module"),
        (("k_proj", "input_layernorm"), "RMSNorm"),
        (("k_proj", "lm_head"), "tied"),
        ((), "empty"),
    ],
)
def test_targets_that_cannot_be(targets, match):
    model = tiny_llama(tie_word_embeddings=True)
    with refused(model, match):
        inject(model, IA3(targets, ()))


@pytest.mark.parametrize("value", [0.0, 1e-7, -1e-8])
@pytest.mark.parametrize("place", ["k_proj", "down_proj"])
def test_a_zero_is_merged_but_not_unmerged(value, place):
    """A zero may be learned, and merges right; what it erased cannot come back."""
    _, ours = pair(tiny_qwen2(), *LLAMA)
    path = next(p for p in vectors(ours) if "layers.1" in p and p.endswith(place))
    with torch.no_grad():
        vectors(ours)[path].view(-1)[5:7] = value
    batch = batch_of("qwen2")
    expected = ours(**batch).logits
    merge(ours)
    close(ours(**batch).logits, expected, MERGED, "a zero merged")
    at = r"\[0, 5\]" if place == "down_proj" else r"\[5, 0\]"
    with refused(ours, rf"unmerge: '.*1.*{place}'.*{at} \(and 1 more\).*lost"):
        unmerge(ours)
    assert injection_of(ours).merged
    unload(ours)  # merged for good
    close(ours(**batch).logits, expected, MERGED, "and unloaded")


def test_a_vector_of_zeros_at_unmerge():
    wrapper = LinearWithIA3(layer_of(), feedforward=False)
    with torch.no_grad():
        wrapper.l.zero_()
    wrapper.merge_weights()
    assert not wrapper.base.weight.any() and not wrapper.base.bias.any()
    with pytest.raises(ValueError, match=r"holds 0 at \[0, 0\] \(and 9 more\)"):
        wrapper.unmerge_weights()
    assert wrapper.merged


@pytest.mark.parametrize(
    ("dtype", "value", "back"),
    [
        (torch.float16, 5e-4, False),
        (torch.float16, 2e-3, True),
        (torch.bfloat16, 5e-4, True),
        (torch.float32, 2e-6, True),
        (torch.float64, 5e-7, False),
    ],
    ids=str,
)
def test_what_is_too_small_depends_on_the_bases_dtype(dtype, value, back):
    """A float16 weight times 2e-6 is rounded to nearly nothing: unmerged, it was off by 38 %."""
    linear = layer_of().to(dtype)
    W = linear.weight.double()
    wrapper = LinearWithIA3(linear, feedforward=False)
    with torch.no_grad():
        wrapper.l[4] = value
    wrapper.merge_weights()
    if back:
        wrapper.unmerge_weights()
        off = ((linear.weight.double() - W).norm() / W.norm()).item()
        assert off <= 2 * torch.finfo(dtype).eps
    else:
        with pytest.raises(ValueError, match=r"at \[4, 0\]: what was multiplied"):
            wrapper.unmerge_weights()
        assert wrapper.merged


def test_a_small_entry_survives_where_pefts_does_not():
    """PEFT divides by l + 1e-8; at 2e-6 that is half a per cent."""
    theirs, ours = pair(tiny_llama(), ("k_proj",), ())
    path = next(iter(vectors(ours)))
    layer = layers_of(theirs)[path]
    W = layer.base_layer.weight.clone()
    with torch.no_grad():
        vectors(ours)[path][3] = layer.ia3_l["default"][3] = 2e-6
    merge(ours)
    unmerge(ours)
    layer.merge()
    layer.unmerge()
    mine = injection_of(ours).wrappers[path].base.weight
    close(mine[3], W[3], 1e-6, "unmerged at 2e-6")
    assert (layer.base_layer.weight[3] - W[3]).norm() / W[3].norm() > 4e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_merged(value):
    _, ours = pair(tiny_llama(), *LLAMA)
    path = list(vectors(ours))[-1]
    with torch.no_grad():
        vectors(ours)[path].view(-1)[0] = value
    with refused(ours, "NaN or infinity"):
        merge(ours)
    assert not injection_of(ours).merged


# ------------------------------------------------------------------ meta


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(), 614_400),
        (dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256), 524_288),
    ],
)
def test_a_meta_model(settings, count):
    """LLaMA-7B and Llama-3-8B, of 32 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **settings))
    made = inject(model, IA3(*LLAMA))
    assert made.trainable * 16 == count
    assert all(p.is_meta for p in vectors(model).values())
    assert model(torch.zeros(1, 4, dtype=torch.long, device="meta")).logits.is_meta
    merge(model)
    unmerge(model)
    unload(model)


# ------------------------------------------------------------------ as users break it


def test_a_name_that_ends_another_opens_in_peft(tmp_path):
    """A T5's `o` ends `wo` too, and PEFT asks for no whole segment where inputs are scaled."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ours, ids = deepcopy(base), torch.randint(2, 64, (2, 7))
    inject(ours, IA3(("k", "o", "wo"), ("o",)))
    for i, wrapper in enumerate(injection_of(ours).wrappers.values()):
        trained(wrapper, i)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path).eval()
    batch = dict(input_ids=ids, labels=ids)
    close(theirs(**batch).logits, ours(**batch).logits, FORWARD, "a T5 in PEFT")
    load_adapter(base, tmp_path)
    assert torch.equal(base(**batch).logits, ours(**batch).logits)
