"""LoRA and rsLoRA against Hugging Face PEFT: the same values must give the same
logits, losses, gradients and merged models.

The operations are PEFT's, in PEFT's order, so most results are equal to the last bit. What is
asserted is 1e-6 and for merged models 1e-5, so that another machine's kernels may differ.
"""

import math

import peft
import pytest
import torch
from tiny import (
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

from peft_lessons import LinearWithLoRA, LoRA, LoRALayer, merge, unload

NAMES = {".default.weight": "", ".lora_": ".lora.lora_"}  # PEFT's, and ours


def pair(base, targets, task=None, rank=4, alpha=6.0, **settings):
    return lora_pair(base, LoRA(rank, alpha, targets, **settings), task)


def compare_step(theirs, ours, batch):
    """Compare logits, loss and the gradient of every trained tensor; return our logits."""
    output = step_of_both(theirs, ours, batch)
    for expected, got in gradients(theirs, ours, NAMES).values():
        assert expected.abs().max() > 0
        close(expected, got)
    return output.logits.detach()


@pytest.mark.parametrize(("name", "rslora"), [("llama", True), ("bert", False), ("opt", True)])
def test_logits_loss_gradients_and_merged_weights_are_peft_s(name, rslora):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, TARGETS[name], task_type(name), rslora=rslora)
    logits = compare_step(theirs, ours, batch)
    assert (logits - base(**batch).logits).abs().max() > 0.05  # the adapter does something
    merge(ours)
    merged, plain = theirs.merge_and_unload(), unload(ours)
    close(merged(**batch).logits, plain(**batch).logits, 1e-5)
    expected = {n.replace("modules_to_save.default.", ""): p for n, p in merged.named_parameters()}
    assert list(expected) == [n for n, _ in plain.named_parameters()]
    for name, p in plain.named_parameters():
        close(expected[name], p, 1e-6)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropout_of_the_branch(name):
    theirs, ours = pair(MODELS[name](), TARGETS[name], task_type(name), dropout=0.3)
    only_the_branch_drops(theirs, ours, p=0.3)
    batch = batch_of(name)
    assert not torch.equal(ours(**batch).loss, ours(**batch).loss), "dropout does not drop"
    compare_step(theirs, ours, batch)


def test_the_start():
    torch.manual_seed(1)
    layer, bound = LoRALayer(96, 32, rank=16), 1 / math.sqrt(96)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(96, 32)), peft.LoraConfig(r=16, target_modules=["0"])
    ).base_model.model[0]
    for a, b in (
        (layer.lora_A, layer.lora_B),
        (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        a, b = a.detach(), b.detach()
        assert a.shape == (16, 96) and b.shape == (32, 16) and not b.any()
        assert 0.97 * bound < a.abs().max() < 1.000001 * bound
        # Uniform in ±bound: mean 0, standard deviation bound / √3.
        assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.numel())
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.08)


@pytest.mark.parametrize("settings", [dict(rank=0), dict(dropout=1.0), dict(rslora="no")], ids=str)
def test_a_layer_refused_is_not_frozen(settings):
    linear = torch.nn.Linear(9, 8)
    with pytest.raises(ValueError, match=next(iter(settings))):
        LinearWithLoRA(linear, **settings)
    assert linear.weight.requires_grad
