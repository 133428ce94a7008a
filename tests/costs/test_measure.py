"""Counting and weighing, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import same, state, tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lessons import LoRA, inject
from peft_lessons.costs.measure import (
    TrainingBytes,
    activation_bytes,
    estimate_bytes,
    held_bytes,
    kept_by_module,
    nbytes,
    numbers,
    parameters,
    peak_bytes,
    step_over_time,
    training_step,
)
from peft_lessons.engine import injection_of


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def test_parameters_of_a_small_model():
    model = mlp()
    model[0].requires_grad_(False)
    model.register_buffer("statistics", torch.zeros(1000))
    count = parameters(model)
    assert (count.total, count.trainable) == (8 * 16 + 16 + 16 * 4 + 4, 16 * 4 + 4)
    assert repr(count) == "68 of 212 parameters train (32.1 %)"
    assert repr(parameters(nn.Sequential())) == "0 of 0 parameters train (0 %)"
    loose, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert parameters(loose).total - parameters(tied).total == 128 * 64


def test_a_packed_weight_counts_what_it_stands_for():
    packed = nn.Parameter(torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size((64, 32)))
    model = nn.Module()
    model.packed, model.plain = packed, nn.Parameter(torch.zeros(10))
    assert numbers(packed) == 64 * 32 and packed.numel() == 64 * 16
    assert (parameters(model).total, parameters(model).trainable) == (64 * 32 + 10, 10)
    assert nbytes(model.parameters()) == 64 * 16 + 40


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shared_storage_is_weighed_once(device):
    entire = torch.zeros(100, device=device)
    other = torch.zeros(10, dtype=torch.bfloat16, device=device)
    assert nbytes([entire, entire[:10], entire.view(10, 10).T, entire.detach()]) == 400
    assert nbytes([entire[:10]]) == 400  # a view keeps the whole storage alive
    assert nbytes(t.detach() for t in (entire, other, entire)) == 420
    assert nbytes([]) == 0


def test_held_bytes_before_and_after_a_step():
    model, x = mlp(), torch.randn(3, 8)
    model.register_buffer("statistics", torch.zeros(5))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    weights, trained = 4 * (212 + 5), 4 * 68
    assert held_bytes(model) == held_bytes(model, optimizer) == TrainingBytes(weights, 0, 0)
    model(x).sum().backward()
    assert held_bytes(model, optimizer) == TrainingBytes(weights, trained, 0)
    optimizer.step()
    # Two moments, and a step counter of 4 bytes for each of the two tensors.
    assert held_bytes(model, optimizer) == TrainingBytes(weights, trained, 2 * trained + 8)
    optimizer.zero_grad()
    held = held_bytes(model, optimizer)
    assert held == TrainingBytes(weights, 0, 2 * trained + 8)
    assert held.total == weights + 2 * trained + 8
    assert [line.split()[0] for line in repr(held).splitlines()] == [*vars(held), "total"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activation_bytes_of_a_small_network(device):
    model, x = mlp().to(device), torch.randn(3, 8, device=device)
    # The first Linear keeps x, the ReLU its result, which is also the second Linear's input.
    assert activation_bytes(model, lambda: model(x)) == 4 * (3 * 8 + 3 * 16)
    # Frozen, the first layer needs no x; a trained bias alone needs no input either.
    model[0].requires_grad_(False)
    assert activation_bytes(model, lambda: model(x)) == 4 * 3 * 16
    model[2].weight.requires_grad_(False)
    assert activation_bytes(model, lambda: model(x)) == 0
    with torch.no_grad():
        assert activation_bytes(model, lambda: model(x)) == 0


def test_activation_bytes_in_half_precision_and_with_a_branch():
    model, x = mlp(torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    assert activation_bytes(model, lambda: model(x)) == 2 * (3 * 8 + 3 * 16)
    model, x = mlp(), torch.randn(3, 8)
    inject(model, LoRA(rank=2, alpha=3, targets=("0",)))
    # x for A, A's result for B, and the ReLU's: W itself is the model's own.
    assert activation_bytes(model, lambda: model(x)) == 4 * (3 * 8 + 3 * 2 + 3 * 16)


def test_what_a_module_keeps_is_its_own():
    model, x = mlp(), torch.randn(3, 8)
    # The ReLU's result is also what the second Linear reads: it counts once, for the first.
    assert kept_by_module(model, lambda: model(x).sum()) == {"0": 4 * 3 * 8, "1": 4 * 3 * 16}
    nested = nn.Sequential(mlp(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()))
    kept = kept_by_module(nested, lambda: nested(x).square().sum())
    # The square is outside of all modules and reads what the Sigmoid has kept.
    assert kept == {"0.0": 4 * 3 * 8, "0.1": 4 * 3 * 16, "1.0": 4 * 3 * 4, "1.1": 4 * 3 * 4}
    assert kept_by_module(model, lambda: model(x).sin().sum())[""] == 4 * 3 * 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in nested.modules())
    with pytest.raises(RuntimeError):
        kept_by_module(model, lambda: model(x.T))
    assert kept_by_module(model, lambda: model(x).sum()) == {"0": 4 * 3 * 8, "1": 4 * 3 * 16}


MIB = 2**20


def test_a_step_over_time_holds_what_can_be_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 512))
    x, optimizer = torch.randn(64, 256), torch.optim.AdamW(model.parameters(), fused=True)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    def forward():
        return model(x).square().mean()

    forward().backward()
    update()
    step = step_over_time(forward, update)
    moments = [step.ends[name] for name in ("forward", "backward", "update")]
    assert moments == sorted(moments) and step.seconds == sorted(step.seconds)
    assert min(step.seconds) >= 0 and max(step.seconds) <= moments[-1]
    last = [sum(second < end for second in step.seconds) - 1 for end in moments]
    # x was there before the step; the loss adds some bytes.
    kept = 4 * 64 * (1024 + 512)
    assert step.activations[last[0]] == pytest.approx(kept, abs=1024)
    assert (step.gradients[last[0]], step.at_work[last[0]]) == (0, 0)
    trainable = 4 * parameters(model).trainable
    assert step.gradients[last[1]] == trainable and step.at_work[last[1]] == 0
    assert step.activations[last[1]] <= 1024
    assert step.totals[last[2]] == 0  # the gradients are released
    assert all(min(kinds) >= 0 for kinds in (step.activations, step.gradients, step.at_work))
    when, most = step.peak
    assert most == max(step.totals) == pytest.approx(peak_bytes(lambda: _step(forward, update)))
    assert moments[0] < when < moments[1]


def _step(forward, update):
    forward().backward()
    update()


def test_peak_bytes_of_known_patterns(capfd):
    def make(mib):
        return torch.empty(mib * MIB, dtype=torch.uint8)

    def a_hill():
        low, high = make(1), make(5)
        del high
        return low, make(2)

    x = torch.ones(MIB // 4)
    for most, function in (
        (1, lambda: [make(1).numel() for _ in range(4)]),
        (4, lambda: [make(1) for _ in range(4)]),
        (6, a_hill),
        (0, lambda: None),
        # exp makes one tensor, the sum of squares another; then the first can go.
        (2, lambda: x.exp().square().sum()),
    ):
        # The profiler and the allocator may add a few small blocks.
        assert peak_bytes(function) == pytest.approx(most * MIB, abs=4096)
    assert capfd.readouterr() == ("", "")


def test_llama_7b_by_count_alone():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert parameters(model).total == 6_738_415_616
    assert estimate_bytes(model).total == 16 * 6_738_415_616
    assert estimate_bytes(model, master=0).total == 12 * 6_738_415_616  # 80.9 GB
    assert estimate_bytes(model, 2, 2, 0, 2).optimizer == 2 * 6_738_415_616
    report = inject(model, LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj")))
    assert report.trainable == parameters(model).trainable == 4_194_304
    assert report.base == 6_738_415_616
    bytes_ = estimate_bytes(model)
    # The base in 2 bytes, and 16 bytes for each trained number: 2 of them with the weights.
    assert bytes_.weights == 2 * (6_738_415_616 + 4_194_304)
    assert bytes_.total == 2 * 6_738_415_616 + 16 * 4_194_304
    assert bytes_.activations == 0


def test_a_training_step_is_measured_and_changes_nothing():
    model = tiny_llama()
    inject(model, LoRA(rank=4, alpha=8, targets=("q_proj",), dropout=0.5))
    ids = torch.arange(24).view(2, 12)
    before, random = state(model), torch.get_rng_state()
    cost = training_step(model, {"input_ids": ids, "labels": ids}, repeats=1)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), random)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert cost.trainable == parameters(model).trainable == 2 * 4 * 128
    assert cost.held.gradients == 4 * cost.trainable
    assert cost.held.optimizer >= 8 * cost.trainable
    assert cost.peak > cost.held.gradients and cost.seconds > 0


def test_a_training_step_that_cannot_be_measured_is_refused():
    model, ids = tiny_llama(), torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match="repeats=0"):
        training_step(model, batch, repeats=0)
    with pytest.raises(ValueError, match="add labels"):
        training_step(model, {"input_ids": ids})
    inject(model, LoRA(rank=4, alpha=8, targets=("q_proj",)))
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)
    with pytest.raises(ValueError, match="NaN or infinite"):
        training_step(model, batch)
    assert all(p.isfinite().all() for _, p in injection_of(model).added())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all is frozen"):
        training_step(model, batch)
