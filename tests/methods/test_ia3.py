"""Compare (IA)³ with Hugging Face PEFT and with its formula; see what it refuses."""

from copy import deepcopy

import peft
import pytest
import torch
from tiny import (
    MODELS,
    PLACES,
    batch_of,
    close,
    gradients,
    ia3_config,
    refused,
    rewrite,
    step_of_both,
    task_type,
    tiny_llama,
    tiny_t5,
)
from torch import nn

from peft_lessons import IA3, IA3Layer, inject, load_adapter, merge, save_adapter, unload, unmerge
from peft_lessons.engine import injection_of
from peft_lessons.methods.ia3 import LinearWithIA3

pytestmark = pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")

MERGED = 1e-5
LLAMA = PLACES["llama"]
BASES = pytest.mark.parametrize("name", ["qwen2", "bert"])


def layers_of(theirs):
    return {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "ia3_l")}


def vectors(model):
    return {path: wrapper.l for path, wrapper in injection_of(model).wrappers.items()}


def pair(name):
    """Return (PEFT's model, ours) on copies of one base, with the same random vectors."""
    base, (targets, feedforward) = MODELS[name](), PLACES[name]
    config = ia3_config(targets, feedforward, task_type(name))
    theirs = peft.get_peft_model(deepcopy(base), config)
    inject(base, IA3(targets, feedforward))
    layers, wrappers = layers_of(theirs), injection_of(base).wrappers
    assert list(layers) == list(wrappers)
    torch.manual_seed(7)
    with torch.no_grad():
        for path, layer in layers.items():
            mine, value = wrappers[path].l, layer.ia3_l["default"]
            assert mine.shape == value.shape and layer.is_feedforward == wrappers[path].feedforward
            value.add_(0.3 * torch.randn_like(value))
            mine.copy_(value)
    return theirs.eval(), base.eval()


def layer_of(bias=True):
    torch.manual_seed(0)
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


def test_another_width_is_refused():
    layer = IA3Layer(64)
    for verb in (layer.scale_key, layer.scale_value, layer.scale_ffn):
        for width in (1, 128):
            with pytest.raises(ValueError, match=rf"64 entries.* {width} wide: .*kv_dim.*ff_dim"):
                verb(torch.randn(3, width))
    with pytest.raises(ValueError, match="1 entries"):  # it is not stretched
        IA3Layer(64, kv_dim=1).scale_key(torch.randn(3, 64))


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
    b = linear.bias.clone() if bias else None
    wrapper.merge_weights()
    close(wrapper(x), expected, MERGED)
    assert b is None or torch.equal(linear.bias, b if feedforward else b * vector)
    wrapper.unmerge_weights()
    assert b is None or (linear.bias - b).abs().max() <= 1e-6


# ------------------------------------------------------------------ models, against PEFT


@BASES
def test_logits_loss_and_gradients_equal_those_of_peft(name):
    batch = batch_of(name)
    theirs, ours = pair(name)
    output = step_of_both(theirs, ours, batch)
    assert (output.logits - MODELS[name]()(**batch).logits).abs().max() > 0.005
    found = gradients(theirs, ours, {"ia3_l.default": "l"})
    for name, (expected, got) in found.items():
        assert expected.abs().max() > 0, name
        close(expected, got, what=name)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        ("all-linear", r".*\.down_proj"),
        (r".*\.(k_proj|v_proj|down_proj)", ("down_proj",)),
        (LLAMA[0], r".*\.layers\.1\.mlp\.down_proj"),
        (("k_proj", "mlp.down_proj"), ("down_proj",)),
    ],
)
def test_every_way_to_name_the_layers_survives_both_files(targets, feedforward, tmp_path):
    base, batch = tiny_llama(), batch_of("llama")
    ours = deepcopy(base)
    inject(ours, IA3(targets, feedforward))
    for i, wrapper in enumerate(injection_of(ours).wrappers.values()):
        trained(wrapper, i)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()
    close(theirs(**batch).logits, ours(**batch).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        model = deepcopy(base)
        load_adapter(model, tmp_path / folder)
        assert torch.equal(model(**batch).logits, ours(**batch).logits)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    theirs, _ = pair("llama")
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    for names, told in (
        ([], r"down_proj.ia3_l.*\(1, 96\).*\(64, 1\)"),
        (["k_proj", "down_proj"], r"k_proj.ia3_l.*\(32, 1\).*\(1, 64\)"),
        (["o_proj"], "'o_proj' is not among the targets"),
        (None, "feedforward=None"),
    ):
        with refused(model, told):
            load_adapter(model, rewrite(tmp_path, feedforward_modules=names))

    def turn(tensors):
        key = next(k for k in tensors if "down_proj" in k)
        tensors[key] = tensors[key].T.contiguous()

    with refused(model, r"\(96, 1\).*\(1, 96\)"):
        load_adapter(model, rewrite(tmp_path, turn, feedforward_modules=["down_proj"]))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("targets", "feedforward"),
    [
        (("k_proj", "v_proj"), ("down_proj",)),
        (("k_proj", "v_proj"), r".*\.down_proj"),
        (r".*\.(k_proj|v_proj)", ("down_proj",)),
        ("all-linear", "all-linear"),
    ],
)
def test_feedforward_must_be_among_the_targets(targets, feedforward):
    model = tiny_llama()
    with refused(model, "feedforward: .* is not among the targets"):
        inject(model, IA3(targets, feedforward))


@pytest.mark.parametrize("place", ["k_proj", "down_proj"])
def test_a_zero_is_merged_but_not_unmerged(place):
    """A zero may be learned, and merges right; what it erased cannot come back."""
    _, ours = pair("qwen2")
    path = next(p for p in vectors(ours) if "layers.1" in p and p.endswith(place))
    with torch.no_grad():
        vectors(ours)[path].view(-1)[5:7] = 1e-7 if place == "k_proj" else 0.0
    batch = batch_of("qwen2")
    expected = ours(**batch).logits
    merge(ours)
    at = r"\[0, 5\]" if place == "down_proj" else r"\[5, 0\]"
    with refused(ours, rf"unmerge: '.*1.*{place}'.*{at} \(and 1 more\).*lost"):
        unmerge(ours)
    unload(ours)  # merged for good
    close(ours(**batch).logits, expected, MERGED)


@pytest.mark.parametrize(
    ("dtype", "value", "back"),
    [
        (torch.float16, 5e-4, False),
        (torch.float16, 2e-3, True),
        (torch.bfloat16, 5e-4, True),
        (torch.float32, 2e-6, True),  # PEFT divides by l + 1e-8: half a per cent off
    ],
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


# ------------------------------------------------------------------ as users break it


def test_a_name_that_ends_another_opens_in_peft(tmp_path):
    """A T5's `o` ends `wo` too, and PEFT asks for no whole segment where inputs are scaled."""
    torch.manual_seed(0)
    base = tiny_t5()
    ours, ids = deepcopy(base), torch.randint(2, 64, (2, 7))
    inject(ours, IA3(("k", "o", "wo"), ("o",)))
    for i, wrapper in enumerate(injection_of(ours).wrappers.values()):
        trained(wrapper, i)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path).eval()
    batch = dict(input_ids=ids, labels=ids)
    close(theirs(**batch).logits, ours(**batch).logits)
    load_adapter(base, tmp_path)
    assert torch.equal(base(**batch).logits, ours(**batch).logits)
