"""DoRA against Hugging Face PEFT on four models, its files both ways, and what it refuses.

The operations are not PEFT's, so nothing is equal to the last bit.
"""

import math
from copy import deepcopy

import peft
import pytest
import torch
from tiny import (
    EACH,
    MODELS,
    TARGETS,
    TinyTask,
    batch_of,
    close,
    gradients,
    lora_config,
    lora_pair,
    only_the_branch_drops,
    refused,
    rewrite,
    step_of_both,
    task_type,
    tiny_bert,
    tiny_llama,
)
from torch import nn
from torch.nn import functional as F

from peft_lessons import (
    DoRA,
    DoRALayer,
    fit,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import injection_of
from peft_lessons.methods.dora import NORMS, LinearWithDoRA, cached_norms

FORWARD, GRADIENT, MERGED = 2e-6, 1e-6, 1e-5
NAMES = {  # PEFT's, and ours
    ".default.weight": "",
    ".lora_magnitude_vector": ".dora.magnitude",
    ".lora_": ".dora.lora_",
}


def pair(base, targets, task=None, **settings):
    return lora_pair(base, DoRA(4, 6.0, targets, **settings), task)


def compare_step(theirs, ours, batch):
    """Logits, loss and the gradient of every trained tensor; returns our logits."""
    output = step_of_both(theirs, ours, batch, FORWARD)
    for name, (expected, got) in gradients(theirs, ours, NAMES).items():
        assert expected.abs().max() > 0
        close(expected, got, GRADIENT, f"gradient of {name}")
        # Not one number may owe its smallness to that of the gradient itself.
        close(expected, got, 2e-5, f"relative gradient of {name}", relative=True)
    return output.logits.detach()


# ------------------------------------------------------------------ one layer


def layer_of(out=48, in_=96, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(in_, out, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(out, 1) + 0.5)
    return linear


def trained(wrapper):
    torch.manual_seed(3)
    with torch.no_grad():
        wrapper.dora.lora_B.normal_(std=0.2)
        m = wrapper.dora.magnitude
        m.mul_(1 + 0.1 * torch.randn_like(m))
    return wrapper


def test_the_definition_and_both_layers_agree():
    linear = layer_of()
    wrapper, x = trained(LinearWithDoRA(linear, 4, 6)), torch.randn(5, 7, 96)
    dora, W = wrapper.dora, linear.weight.detach()
    V = W + 6 / 4 * dora.lora_B @ dora.lora_A
    norm = torch.linalg.norm(V, dim=1).detach()
    expected = F.linear(x, (dora.magnitude / norm)[:, None] * V, linear.bias)
    got = wrapper(x), dora(x, W) + linear.bias
    leaves = dora.lora_A, dora.lora_B, dora.magnitude
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weights).sum(), leaves) for y in (expected, *got)]
    for i, y in enumerate(got):
        close(expected, y, FORWARD, f"layer {i} forward")
        for a, b in zip(grads[0], grads[i + 1], strict=True):
            close(a, b, 2e-6, f"layer {i} relative gradient", relative=True)


def test_the_norm_gets_no_gradient():
    """With it the gradients of A and B would be others; m's would not."""
    wrapper, x = trained(LinearWithDoRA(layer_of(), 4, 6)), torch.randn(64, 96)
    dora, W = wrapper.dora, wrapper.base.weight
    V = W + 6 / 4 * dora.lora_B @ dora.lora_A
    through = F.linear(x, (dora.magnitude / torch.linalg.norm(V, dim=1))[:, None] * V)
    weights = torch.randn_like(through)
    leaves = dora.lora_A, dora.lora_B, dora.magnitude
    a = torch.autograd.grad((wrapper(x) * weights).sum(), leaves)
    b = torch.autograd.grad((through * weights).sum(), leaves)
    off = [((p - q).norm() / p.norm()).item() for p, q in zip(a, b, strict=True)]
    assert off[0] > 0.02 and off[1] > 0.02 and off[2] < 1e-5


def test_dora_layer_starts_in_its_first_forward():
    W, x = layer_of().weight, torch.randn(3, 96)
    layer = DoRALayer(96, 48, rank=4, alpha=6)
    close(F.linear(x, W), layer(x, W), FORWARD, "DoRALayer step 0")
    assert torch.equal(layer.magnitude, torch.linalg.norm(W, dim=1))
    with torch.no_grad():
        layer.magnitude.mul_(2)
    close(2 * F.linear(x, W), layer(x, W), 2 * FORWARD, "DoRALayer twice")
    again = DoRALayer(96, 48, rank=4, alpha=6)  # what was loaded is not started anew
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, W), layer(x, W))
    layer(x, W).sum().backward()
    assert W.grad is None, "the weight is frozen, whatever it says of itself"


def test_dora_layer_in_16_bits():
    W, x = layer_of().weight.bfloat16(), torch.randn(3, 96).bfloat16()
    y = DoRALayer(96, 48)(x, W)
    assert y.dtype == torch.bfloat16 and (y - F.linear(x, W)).abs().max() < 0.02


@pytest.mark.parametrize(
    "settings", [dict(rank=0), dict(alpha=0), dict(alpha=math.nan), dict(rslora="no")], ids=str
)
def test_dora_layer_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DoRALayer(8, 8, **settings)


def test_dora_layer_takes_no_dropout():
    """The place of LoRALayer's dropout is empty: 0.1 there must not switch rslora on."""
    with pytest.raises(TypeError, match="positional"):
        DoRALayer(96, 48, 4, 6.0, 0.1)


@pytest.mark.parametrize(
    "settings", [dict(rank=0), dict(alpha=-1), dict(dropout=1.0), dict(rslora="no")], ids=str
)
def test_a_wrapped_layer_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LinearWithDoRA(layer_of(), **settings)


@pytest.mark.parametrize(
    "settings", [dict(), dict(rank=0), dict(dropout=1.0), dict(rslora="no")], ids=str
)
def test_a_layer_refused_is_not_frozen(settings):
    linear = layer_of()
    with torch.no_grad():
        linear.weight[7] *= bool(settings)
    with pytest.raises(ValueError, match=next(iter(settings), "row 7")):
        LinearWithDoRA(linear, **settings)
    assert linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize(("dropout", "train"), [(0.3, False), (0.0, True), (0.3, True)])
def test_the_base_multiplies_twice_only_where_dropout_drops(dropout, train, monkeypatch):
    wrapper = LinearWithDoRA(layer_of(), 4, 6, dropout).train(train)
    weight, linear, seen = wrapper.base.weight, F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, w, *b: seen.append(w) or linear(x, w, *b))
    wrapper(torch.randn(3, 96))
    assert len(seen) == 3 + (dropout > 0 and train)  # A, B and the base
    assert sum(w is weight for w in seen) == 1 + (dropout > 0 and train)


# ------------------------------------------------------------------ models, against PEFT


@EACH
@pytest.mark.parametrize("rslora", [False, True], ids=["dora", "rslora"])
def test_logits_loss_and_gradients(name, rslora):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), rslora=rslora)
    logits = compare_step(theirs, ours, batch)
    assert (logits - base(**batch).logits).abs().max() > 0.02


@EACH
def test_dropout_reaches_the_base_part_too(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), dropout=0.3)
    only_the_branch_drops(theirs, ours, p=0.3)
    before = ours(**batch).loss
    assert not torch.equal(ours(**batch).loss, before), "dropout does not drop"
    step_of_both(theirs, ours, batch, FORWARD)
    for expected, got in gradients(theirs, ours, NAMES).values():
        close(expected, got, GRADIENT, "dropout gradients")


@EACH
def test_the_start_is_pefts(name):
    ours, method = MODELS[name](), DoRA(4, 6, TARGETS[name])
    theirs = peft.get_peft_model(MODELS[name](), lora_config(method, task_type(name)))
    inject(ours, method)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    for path, wrapper in injection_of(ours).wrappers.items():
        m = layers[path].lora_magnitude_vector["default"].weight
        assert torch.equal(m, wrapper.dora.magnitude)
    own = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert own == sum(p.numel() for _, p in injection_of(ours).added())


@EACH
def test_merged(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name))
    merge(ours)
    merged, plain = theirs.merge_and_unload(), unload(ours)
    close(merged(**batch).logits, plain(**batch).logits, MERGED, "merged against PEFT")
    for (_, e), (_, p) in zip(merged.named_parameters(), plain.named_parameters(), strict=True):
        close(e, p, 1e-6, "merged weights")


def test_what_unmerging_needs_moves_with_the_model_and_is_not_saved():
    model = tiny_llama()
    inject(model, DoRA(4, 6, ("q_proj",)))
    merge(model)
    wrappers = injection_of(model).wrappers.values()
    for wrapper in wrappers:
        c = dict(wrapper.named_buffers())["merged_c"]
        assert c.shape == (64,) and c.dtype == torch.float32
    assert not any("merged_c" in name for name in model.state_dict())
    model.double()
    assert all(wrapper.merged_c.dtype == torch.float64 for wrapper in wrappers)
    unmerge(model)


def test_a_float16_row_whose_norm_exceeds_its_range():
    linear = layer_of()
    with torch.no_grad():
        linear.weight[5] = 3e4
    linear = linear.half()
    assert linear.weight.isfinite().all() and torch.linalg.norm(linear.weight[5]).isinf()
    DoRA(4, 6, ("x",)).check("x", linear)
    wrapper = LinearWithDoRA(linear, 4, 6)
    assert wrapper.dora.magnitude[5].item() == pytest.approx(3e4 * math.sqrt(96), rel=1e-3)


def test_a_float16_base_and_a_float64_base():
    for dtype, adapter in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        linear = layer_of().to(dtype)
        x = torch.randn(4, 96, dtype=dtype)
        expected = linear(x)
        wrapper = LinearWithDoRA(linear, 4, 6)
        assert torch.equal(wrapper(x), expected) and wrapper.dora.magnitude.dtype == adapter


# ------------------------------------------------------------------ files


def test_a_file_without_magnitudes_is_refused(tmp_path):
    _, ours = pair(tiny_llama(), ("q_proj",))
    save_adapter(ours, tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(key) for key in list(t) if "magnitude" in key])
    model = tiny_llama()
    with refused(model, "lora_magnitude_vector"):
        load_adapter(model, tmp_path)


# ------------------------------------------------------------------ training


def test_checkpoint_of_a_whole_model_goes_on(tmp_path):
    """The state dict of a model holds all that DoRA needs, unmerged."""
    _, ours = pair(tiny_llama(), ("q_proj",))
    other = tiny_llama(seed=1)
    inject(other, DoRA(4, 6, ("q_proj",)))
    other.load_state_dict(ours.state_dict())
    batch = batch_of("llama")
    assert torch.equal(other(**batch).logits, ours(**batch).logits)


def test_under_autocast_the_norm_stays_in_float32():
    ours = tiny_llama()
    inject(ours, DoRA(4, 6, ("q_proj", "down_proj")))
    batch = batch_of("llama")
    wrapper = next(iter(injection_of(ours).wrappers.values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**batch).logits, tiny_llama()(**batch).logits)
        norms = wrapper.dora.row_norms(wrapper.base.weight)
    assert norms.dtype == torch.float32
    assert torch.equal(norms, wrapper.dora.row_norms(wrapper.base.weight))


# ------------------------------------------------------------------ the cached norm


def test_cached_norms_change_nothing_and_save_the_norm(monkeypatch):
    _, ours = pair(tiny_llama(), TARGETS["llama"])
    batch, calls = batch_of("llama"), []
    norms = DoRALayer.row_norms
    monkeypatch.setattr(DoRALayer, "row_norms", lambda *a: calls.append(1) or norms(*a))
    expected = ours(**batch).logits
    each = len(injection_of(ours).wrappers)
    assert len(calls) == each
    with torch.inference_mode(), cached_norms(ours):
        for _ in range(3):
            assert torch.equal(ours(**batch).logits, expected)
    assert len(calls) == 2 * each
    ours(**batch)
    assert len(calls) == 3 * each


def scale_B(model, factor):
    with torch.no_grad():
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.lora_B.mul_(factor)


def test_cached_norms_are_dropped_whatever_happens():
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch = batch_of("llama")
    with pytest.raises(ZeroDivisionError), cached_norms(ours):
        raise ZeroDivisionError
    before = ours(**batch).logits
    scale_B(ours, 3)
    changed = ours(**batch).logits
    assert not torch.equal(changed, before)
    assert not NORMS
    # In train mode nothing is taken from the cache.
    with cached_norms(ours):
        ours.train()
        scale_B(ours, 1 / 3)
        assert torch.allclose(ours(**batch).logits, before, atol=1e-6)


def test_cached_norms_within_inference_mode_do_not_spoil_gradients():
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch = batch_of("llama")
    with torch.inference_mode():
        context = cached_norms(ours)
        context.__enter__()
    ours(**batch).loss.backward()
    context.__exit__(None, None, None)


def test_a_copy_made_within_the_block_has_no_cache():
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch, other = batch_of("llama"), deepcopy(ours)
    scale_B(other, 3)
    expected = other(**batch).logits
    with cached_norms(ours):
        copy = deepcopy(ours)
        scale_B(copy, 3)
        assert torch.equal(copy(**batch).logits, expected)
    assert not NORMS
    assert not torch.equal(ours(**batch).logits, expected)


def test_merging_within_the_block_takes_the_norms_of_now():
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch = batch_of("llama")
    with cached_norms(ours):
        before = ours(**batch).logits
        scale_B(ours, 3)
        merge(ours)
        merged = ours(**batch).logits
    unmerge(ours)
    close(merged, ours(**batch).logits, MERGED, "merged within the block")
    assert (merged - before).abs().max() > 100 * MERGED


def test_training_within_the_block_is_refused():
    model = tiny_bert()
    inject(model, DoRA(4, 6, ("query", "value")))
    with cached_norms(model), refused(model, "within cached_norms", RuntimeError):
        fit(model, TinyTask(), 2, show=False)
    fit(model, TinyTask(), 2, show=False)


def test_the_end_of_an_inner_block_keeps_the_cache_of_the_outer(monkeypatch):
    _, ours = pair(tiny_llama(), ("q_proj",))
    _, other = pair(tiny_llama(seed=1), ("q_proj",))
    batch, calls, norms = batch_of("llama"), [], DoRALayer.row_norms
    expected = ours(**batch).logits
    monkeypatch.setattr(DoRALayer, "row_norms", lambda *a: calls.append(1) or norms(*a))
    with cached_norms(ours):
        for inner in (ours, other):
            with cached_norms(inner):
                pass
            calls.clear()
            assert torch.equal(ours(**batch).logits, expected) and not calls
        other(**batch)
        assert calls  # its own block is over
    assert not NORMS


def test_an_error_while_norms_are_computed_leaves_no_cache(monkeypatch):
    _, ours = pair(tiny_llama(), ("q_proj",))
    done, norms = [], DoRALayer.row_norms

    def second_fails(*args):
        assert not done, "out of memory"
        done.append(1)
        return norms(*args)

    monkeypatch.setattr(DoRALayer, "row_norms", second_fails)
    with pytest.raises(AssertionError, match="out of memory"), cached_norms(ours):
        pass
    assert done and not NORMS


def test_cached_norms_refuse():
    model = tiny_llama()
    with pytest.raises(ValueError, match="holds no DoRA"), cached_norms(model):
        pass
    inject(model, DoRA(4, 6, ("q_proj",)))
    merge(model)
    with pytest.raises(RuntimeError, match="unmerge"), cached_norms(model):
        pass


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan], ids=str)
def test_a_row_without_length_is_refused_and_named(value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[5] = value
    with refused(model, r"layers\.1\.self_attn\.q_proj.*row 5.*targets"):
        inject(model, DoRA(4, 6, ("q_proj",)))
    inject(model, DoRA(4, 6, ("v_proj",)))  # other layers go on


def test_a_row_so_small_that_its_norm_is_zero():
    linear = layer_of()
    with torch.no_grad():
        linear.weight[7] = 1e-30
    with pytest.raises(ValueError, match="row 7"):
        LinearWithDoRA(linear, 4, 6)


def test_loading_onto_a_base_with_a_zero_row_is_refused(tmp_path):
    _, ours = pair(tiny_llama(), ("q_proj",))
    save_adapter(ours, tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[2] = 0
    with refused(model, "row 2"):
        load_adapter(model, tmp_path, check_base=False)


@pytest.mark.parametrize("value", [0.0, 1e-9], ids=str)
def test_merging_a_magnitude_of_zero_is_refused(value):
    _, ours = pair(tiny_llama(), ("q_proj",))
    wrapper = injection_of(ours).wrappers["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        wrapper.dora.magnitude[3] = value
    with refused(ours, r"layers\.1.*row 3"):
        merge(ours)
    assert not injection_of(ours).merged


def test_a_magnitude_may_change_its_sign():
    """Nothing keeps m positive: the row turns round, as in PEFT; merge and unmerge go on."""
    linear = layer_of()
    wrapper, x = trained(LinearWithDoRA(linear, 4, 6)), torch.randn(3, 96)
    with torch.no_grad():
        wrapper.dora.magnitude[0].neg_()
    W, before = linear.weight.clone(), wrapper(x)
    wrapper.merge_weights()
    close(wrapper(x), before, MERGED, "negative m merged")
    wrapper.unmerge_weights()
    close(linear.weight, W, 1e-6, "negative m unmerged")


@pytest.mark.parametrize(
    "settings",
    [dict(rank=0), dict(rank=2.5), dict(alpha=-1), dict(dropout=1.0), dict(rank=99)],
    ids=str,
)
def test_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        inject(tiny_llama(), DoRA(**(dict(rank=4, alpha=6, targets=("q_proj",)) | settings)))
