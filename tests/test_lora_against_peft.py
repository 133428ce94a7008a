"""LoRA and rsLoRA against Hugging Face PEFT on five models: the same values must give the same
logits, losses, gradients, texts and merged models.

The operations are PEFT's, in PEFT's order, so most results are equal to the last bit. What is
asserted is 1e-6 and for merged models 1e-5, so that another machine's kernels may differ.
"""

import math

import peft
import pytest
import torch
from tiny import (
    EACH,
    MODELS,
    TARGETS,
    batch_of,
    close,
    gradients,
    lora_pair,
    only_the_branch_drops,
    step_of_both,
    task_type,
)
from torch import nn

from peft_lessons import (
    LinearWithLoRA,
    LoRA,
    LoRALayer,
    load_model,
    merge,
    unload,
)

NAMES = {".default.weight": "", ".lora_": ".lora.lora_"}  # PEFT's, and ours


def pair(base, targets, task=None, rank=4, alpha=6.0, **settings):
    return lora_pair(base, LoRA(rank, alpha, targets, **settings), task)


def compare_step(theirs, ours, batch):
    """Logits, loss and the gradient of every trained tensor; returns our logits."""
    output = step_of_both(theirs, ours, batch)
    for expected, got in gradients(theirs, ours, NAMES).values():
        assert expected.abs().max() > 0
        close(expected, got)
    return output.logits.detach()


@EACH
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_logits_loss_and_gradients(name, rslora):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), rslora=rslora)
    logits = compare_step(theirs, ours, batch)
    assert (logits - base(**batch).logits).abs().max() > 0.05  # the adapter does something


@EACH
def test_dropout_of_the_branch(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), dropout=0.3)
    only_the_branch_drops(theirs, ours, p=0.3)
    before = ours(**batch).loss
    assert not torch.equal(ours(**batch).loss, before), "dropout does not drop"
    step_of_both(theirs, ours, batch)
    for expected, got in gradients(theirs, ours, NAMES).values():
        close(expected, got)


@EACH
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_merged(name, rslora):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), rslora=rslora)
    merge(ours)
    merged, plain = theirs.merge_and_unload(), unload(ours)
    close(merged(**batch).logits, plain(**batch).logits, 1e-5)
    expected = dict(merged.named_parameters())
    assert [n.replace("modules_to_save.default.", "") for n in expected] == [
        n for n, _ in plain.named_parameters()
    ]
    for (_, e), (_, p) in zip(expected.items(), plain.named_parameters(), strict=True):
        close(e, p, 1e-6)


@EACH
def test_a_bfloat16_base_keeps_float32_factors(name):
    base, batch = MODELS[name]().bfloat16(), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name))
    dtypes = {p.dtype for n, p in ours.named_parameters() if "lora_" in n}
    assert dtypes == {p.dtype for n, p in theirs.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    a, b = theirs(**batch), ours(**batch)
    assert a.logits.dtype == b.logits.dtype == torch.bfloat16
    # One unit in the last place of a bfloat16 is 2^-8 of the number.
    close(a.logits.float(), b.logits.float(), 2**-8 * a.logits.abs().max().item())
    a.loss.backward()
    b.loss.backward()
    for expected, got in gradients(theirs, ours, NAMES).values():
        close(expected, got, 2**-7 * expected.abs().max().item())


@pytest.mark.parametrize("features", [48, 96, 384])
def test_the_start(features):
    torch.manual_seed(1)
    layer, bound = LoRALayer(features, 32, rank=16), 1 / math.sqrt(features)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(features, 32)), peft.LoraConfig(r=16, target_modules=["0"])
    ).base_model.model[0]
    for a, b in (
        (layer.lora_A, layer.lora_B),
        (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        a, b = a.detach(), b.detach()
        assert a.shape == (16, features) and b.shape == (32, 16) and not b.any()
        assert 0.97 * bound < a.abs().max() < 1.000001 * bound
        # Uniform in ±bound: mean 0, standard deviation bound / √3.
        assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.numel())
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.08)


def test_an_rslora_that_is_no_flag_is_refused():
    with pytest.raises(ValueError, match="rslora='no' must be True or False"):
        LoRALayer(96, 48, rslora="no")


@pytest.mark.parametrize("settings", [dict(rank=0), dict(dropout=1.0), dict(rslora="no")], ids=str)
def test_a_layer_refused_is_not_frozen(settings):
    linear = torch.nn.Linear(9, 8)
    with pytest.raises(ValueError, match=next(iter(settings))):
        LinearWithLoRA(linear, **settings)
    assert linear.weight.requires_grad


def test_the_bundled_encoder_with_a_head():
    base = load_model("minilm", labels=2)
    batch = batch_of("bert", base.config.vocab_size)
    theirs, ours = pair(base, ("query", "value"), "SEQ_CLS", rank=8, alpha=16)
    assert any("classifier" in n for n, p in ours.named_parameters() if p.requires_grad)
    compare_step(theirs, ours, batch)
    before = ours(**batch).logits
    merge(ours)
    close(ours(**batch).logits, before, 1e-5)
    close(theirs.merge_and_unload()(**batch).logits, unload(ours)(**batch).logits, 1e-5)
