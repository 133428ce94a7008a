"""gradient_sum: what it promises, and what it refuses."""

import math

import pytest
import torch
from tiny import TinyTask, same, state, tiny_bert
from torch import nn

from peft_lessons import AdaLoRA, LoRA, disabled, evaluate, fit, freeze, inject, merge
from peft_lessons.engine import injection_of
from peft_lessons.methods.variants import LoRAPlus
from peft_lessons.train.rates import gradient_sum

STREAM = TinyTask().stream(4, 0)
BATCHES = [next(STREAM), next(STREAM)]
QV = LoRA(rank=4, alpha=6, targets=("query", "value"), dropout=0.5)


def injected(method=QV):
    model = tiny_bert().double()
    torch.manual_seed(0)
    inject(model, method)
    return model


@pytest.mark.parametrize("method", [QV, LoRAPlus(4, 6, ("query", "value"), lr_ratio=16)])
def test_the_sum_is_what_the_first_step_of_fit_promises(method):
    model, lr = injected(method), 1e-6
    before, found = state(model), gradient_sum(model.train(), BATCHES[:1])
    assert same(state(model), before) and model.training
    assert all(p.grad is None for p in model.parameters())
    at_first = evaluate(model, BATCHES[:1]).loss
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fit(model, BATCHES[:1], 1, lr=lr, warmup=0, clip=None, show=False)
    assert (at_first - evaluate(model, BATCHES[:1]).loss) / lr == pytest.approx(found, rel=0.01)


def test_the_sum_is_that_of_the_mean_gradient_of_the_batches():
    model = injected()
    both = {name: torch.cat([batch[name] for batch in BATCHES]) for name in BATCHES[0]}
    assert gradient_sum(model, BATCHES) == pytest.approx(gradient_sum(model, [both]))
    assert gradient_sum(model, BATCHES) < sum(gradient_sum(model, [b]) for b in BATCHES) / 2


def test_the_penalty_of_a_method_is_part_of_the_loss():
    schedule = {"tinit": 1, "tfinal": 1, "delta": 1, "total_steps": 5}
    model = injected(AdaLoRA(4, 2, 6, ("query", "value"), orthogonal=0.5, **schedule))
    loss = sum(model.eval()(**batch).loss for batch in BATCHES) / 2
    injection = injection_of(model)
    (loss + injection.method.penalty(injection)).backward()
    expected = sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    assert gradient_sum(model, BATCHES) == pytest.approx(expected)


def test_refusals():
    frozen, model, merged = tiny_bert(), injected(), injected()
    freeze(frozen)
    frozen.requires_grad_(False)
    merge(merged)
    with pytest.raises(ValueError, match="gradient_sum: nothing in the model trains"):
        gradient_sum(frozen, BATCHES)
    with pytest.raises(RuntimeError, match="gradient_sum: the method is merged"):
        gradient_sum(merged, BATCHES)
    with pytest.raises(ValueError, match="gradient_sum: the list of batches is empty"):
        gradient_sum(model, [])
    with disabled(model), pytest.raises(RuntimeError, match="gradient_sum: disabled"):
        gradient_sum(model, BATCHES)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="gradient is nan"):
        gradient_sum(model, BATCHES)
