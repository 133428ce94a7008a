"""DoRA against Hugging Face PEFT on a decoder and an encoder, its cache, and what it refuses.

The operations are not PEFT's, so nothing is equal to the last bit.
"""

import math
from copy import deepcopy

import peft
import pytest
import torch
from tiny import (
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
from peft_lessons.engine import injected_copy, injection_of
from peft_lessons.methods.dora import LinearWithDoRA, cached_norms

FORWARD, GRADIENT, MERGED = 2e-6, 1e-6, 1e-5
NAMES = {  # PEFT's, and ours
    ".default.weight": "",
    ".lora_magnitude_vector": ".dora.magnitude",
    ".lora_": ".dora.lora_",
}


def pair(base, targets, task=None, **settings):
    return lora_pair(base, DoRA(4, 6.0, targets, **settings), task)


# ------------------------------------------------------------------ one layer


def layer_of(out=48, in_=96):
    torch.manual_seed(0)
    linear = nn.Linear(in_, out)
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
    """In the definition the norm is a constant; with its gradient those of A and B are others."""
    wrapper, x = trained(LinearWithDoRA(layer_of(), 4, 6)), torch.randn(64, 96)
    dora, W, b = wrapper.dora, wrapper.base.weight, wrapper.base.bias
    V = W + 6 / 4 * dora.lora_B @ dora.lora_A
    norm = torch.linalg.norm(V, dim=1)
    expected, through = (
        F.linear(x, (dora.magnitude / n)[:, None] * V, b) for n in (norm.detach(), norm)
    )
    leaves = dora.lora_A, dora.lora_B, dora.magnitude
    weights = torch.randn_like(expected)

    def grads(y):
        return torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)

    for y in (wrapper(x), dora(x, W) + b):
        close(expected, y, FORWARD, "forward")
        for p, q in zip(grads(expected), grads(y), strict=True):
            close(p, q, 2e-6, "relative gradient", relative=True)
    pairs = zip(grads(expected), grads(through), strict=True)
    off = [((p - q).norm() / p.norm()).item() for p, q in pairs]
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
    half = layer(x.bfloat16(), W.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - layer(x, W)).abs().max() < 0.04


@pytest.mark.parametrize("settings", [dict(), dict(rank=0), dict(dropout=1.0)], ids=str)
def test_a_layer_refused_is_not_frozen(settings):
    linear = layer_of()
    linear.weight.data[7] *= bool(settings)
    with pytest.raises(ValueError, match=next(iter(settings), "row 7")):
        LinearWithDoRA(linear, **settings)
    assert linear.weight.requires_grad and linear.bias.requires_grad
    with pytest.raises(TypeError, match="positional"):  # where LoRALayer has its dropout
        DoRALayer(96, 48, 4, 6.0, 0.1)


@pytest.mark.parametrize(("dropout", "train"), [(0.3, False), (0.0, True), (0.3, True)])
def test_the_base_multiplies_twice_only_where_dropout_drops(dropout, train, monkeypatch):
    wrapper = LinearWithDoRA(layer_of(), 4, 6, dropout).train(train)
    weight, linear, seen = wrapper.base.weight, F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, w, *b: seen.append(w) or linear(x, w, *b))
    wrapper(torch.randn(3, 96))
    assert len(seen) == 3 + (dropout > 0 and train)  # A, B and the base
    assert sum(w is weight for w in seen) == 1 + (dropout > 0 and train)


# ------------------------------------------------------------------ models, against PEFT


@pytest.mark.parametrize(("name", "rslora"), [("llama", True), ("bert", False)])
def test_start_logits_loss_gradients_and_merged_weights_are_peft_s(name, rslora):
    base, batch, method = MODELS[name](), batch_of(name), DoRA(4, 6.0, TARGETS[name], rslora=rslora)
    start = peft.get_peft_model(deepcopy(base), lora_config(method, task_type(name)))
    for path, wrapper in injection_of(injected_copy(base, method)).wrappers.items():
        layer = start.base_model.model.get_submodule(path)
        m = layer.lora_magnitude_vector["default"].weight
        assert torch.equal(m, wrapper.dora.magnitude)
    theirs, ours = pair(base, TARGETS[name], task_type(name), rslora=rslora)
    logits = step_of_both(theirs, ours, batch, FORWARD).logits
    for name, (expected, got) in gradients(theirs, ours, NAMES).items():
        assert expected.abs().max() > 0
        close(expected, got, GRADIENT, f"gradient of {name}")
        # Not one number may owe its smallness to that of the gradient itself.
        close(expected, got, 2e-5, f"relative gradient of {name}", relative=True)
    assert (logits - base(**batch).logits).abs().max() > 0.02
    merge(ours)
    merged, plain = theirs.merge_and_unload(), unload(ours)
    close(merged(**batch).logits, plain(**batch).logits, MERGED, "merged against PEFT")
    for (_, e), (_, p) in zip(merged.named_parameters(), plain.named_parameters(), strict=True):
        close(e, p, 1e-6, "merged weights")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropout_reaches_the_base_part_too(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), dropout=0.3)
    only_the_branch_drops(theirs, ours, p=0.3)
    assert not torch.equal(ours(**batch).loss, ours(**batch).loss), "dropout does not drop"
    step_of_both(theirs, ours, batch, FORWARD)
    for expected, got in gradients(theirs, ours, NAMES).values():
        close(expected, got, GRADIENT, "dropout gradients")


def test_a_float16_row_whose_norm_exceeds_its_range():
    linear = layer_of()
    linear.weight.data[5] = 3e4
    assert torch.linalg.norm(linear.half().weight[5]).isinf()
    DoRA(4, 6, ("x",)).check("x", linear)
    wrapper = LinearWithDoRA(linear, 4, 6)
    assert wrapper.dora.magnitude[5].item() == pytest.approx(3e4 * math.sqrt(96), rel=1e-3)


# ------------------------------------------------------------------ files and autocast


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    _, ours = pair(tiny_llama(), ("q_proj",))
    save_adapter(ours, tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[2] = 0
    with refused(model, "row 2"):
        load_adapter(model, tmp_path, check_base=False)
    rewrite(tmp_path, lambda t: [t.pop(key) for key in list(t) if "magnitude" in key])
    with refused(model := tiny_llama(), "lora_magnitude_vector"):
        load_adapter(model, tmp_path)


def test_under_autocast_the_norm_stays_in_float32():
    ours = tiny_llama()
    inject(ours, DoRA(4, 6, ("q_proj", "down_proj")))
    wrapper = next(iter(injection_of(ours).wrappers.values()))
    with torch.autocast("cpu", torch.bfloat16):
        batch = batch_of("llama")
        assert torch.equal(ours(**batch).logits, tiny_llama()(**batch).logits)
        norms = wrapper.dora.row_norms(wrapper.base.weight)
    assert torch.equal(norms, wrapper.dora.row_norms(wrapper.base.weight))


# ------------------------------------------------------------------ the cached norm


@pytest.fixture
def calls(monkeypatch):
    """Return a list that grows by one with each computed norm."""
    calls, norms = [], DoRALayer.row_norms
    monkeypatch.setattr(DoRALayer, "row_norms", lambda *a: calls.append(1) or norms(*a))
    return calls


def test_cached_norms_change_nothing_and_save_the_norm(calls):
    _, ours = pair(tiny_llama(), TARGETS["llama"])
    batch, each = batch_of("llama"), len(injection_of(ours).wrappers)
    calls.clear()
    expected = ours(**batch).logits
    with torch.inference_mode():
        context = cached_norms(ours)
        context.__enter__()
        for _ in range(3):
            assert torch.equal(ours(**batch).logits, expected)
    assert len(calls) == 2 * each
    ours(**batch).loss.backward()  # what inference mode cached spoils no gradient
    context.__exit__(None, None, None)
    ours(**batch)
    assert len(calls) == 3 * each


def scale_B(model, factor):
    with torch.no_grad():
        for wrapper in injection_of(model).wrappers.values():
            wrapper.dora.lora_B.mul_(factor)


def test_cached_norms_are_dropped_whatever_happens_and_not_used_in_training():
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch = batch_of("llama")
    with pytest.raises(ZeroDivisionError), cached_norms(ours):
        raise ZeroDivisionError
    assert not any(wrapper.norms is not None for wrapper in injection_of(ours).wrappers.values())
    with cached_norms(ours):
        cached = ours(**batch).logits
        ours.train()
        scale_B(ours, 3)
        training = ours(**batch).logits
    assert torch.equal(training, ours(**batch).logits), "norms of before the step"
    assert not torch.allclose(training, cached, atol=1e-3)


def test_a_copy_made_within_the_block_computes_its_own_norms():
    _, ours = pair(tiny_llama(), ("q_proj",))
    with cached_norms(ours):
        copied = deepcopy(ours)
    for model in (ours, copied):
        scale_B(model, 3)
    assert torch.equal(copied(**batch_of("llama")).logits, ours(**batch_of("llama")).logits)


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


def test_the_end_of_an_inner_block_keeps_the_cache_of_the_outer(calls):
    _, ours = pair(tiny_llama(), ("q_proj",))
    batch = batch_of("llama")
    with cached_norms(ours):
        with cached_norms(ours):
            pass
        calls.clear()
        ours(**batch)
        assert not calls
    ours(**batch)
    assert calls


def test_cached_norms_refuse():
    model = tiny_llama()
    with pytest.raises(ValueError, match="holds no DoRA"), cached_norms(model):
        pass
    inject(model, DoRA(4, 6, ("q_proj",)))
    merge(model)
    with pytest.raises(RuntimeError, match="unmerge"), cached_norms(model):
        pass


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 1e-30], ids=str)
def test_a_row_without_length_is_refused_and_named(value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[5] = value
    with refused(model, r"layers\.1\.self_attn\.q_proj.*row 5.*targets"):
        inject(model, DoRA(4, 6, ("q_proj",)))
    inject(model, DoRA(4, 6, ("v_proj",)))  # other layers go on


def test_merging_a_magnitude_of_zero_is_refused():
    _, ours = pair(tiny_llama(), ("q_proj",))
    wrapper = injection_of(ours).wrappers["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        wrapper.dora.magnitude[3] = 1e-9
    with refused(ours, r"layers\.1.*row 3"):
        merge(ours)


def test_a_magnitude_may_change_its_sign_and_unmerging_gives_the_weight_back():
    wrapper, x = trained(LinearWithDoRA(layer_of(), 4, 6)), torch.randn(3, 96)
    wrapper.dora.magnitude.data[0].neg_()  # the row turns round, as in PEFT
    W, before = wrapper.base.weight.clone(), wrapper(x)
    wrapper.merge_weights()
    close(wrapper(x), before, MERGED, "negative m merged")
    wrapper.unmerge_weights()
    close(wrapper.base.weight, W, 1e-6, "negative m unmerged")
