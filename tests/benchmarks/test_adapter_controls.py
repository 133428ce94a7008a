"""The controls of lesson 06: adapters without f or elsewhere, and LoRA of about their size."""

import sys

import pytest
import torch

from peft_lessons import load_model, load_task, measure
from peft_lessons.methods.adapters import Bottleneck
from peft_lessons.studies import best_lr, load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import adapters_study
import catalogue
from common import NAMES, RUN, SEEDS, Results

sys.path.remove(str(ROOT / "benchmarks"))


def built(task, *names):
    model = load_model(catalogue.BASES[task], labels=2 if task == "sentiment" else None)
    adapters_study.build(model, task, *names)
    return model


SETTINGS = adapters_study.ON_AUSTEN + adapters_study.ON_SENTIMENT


@pytest.mark.parametrize("names", SETTINGS, ids=str)
def test_every_control_has_the_size_of_its_adapter_within_a_tenth(names):
    task, *names = names
    size = {"sentiment": 76_898, "austen": 148_992}[task]
    assert abs(measure.parameters(built(task, *names)).trainable / size - 1) < 0.1


def adapters_of(model):
    return [m for m in model.modules() if isinstance(m, Bottleneck)]


def adds(function, t, u) -> bool:
    return torch.allclose(function(t + u), function(t) + function(u), atol=1e-4)


def test_an_adapter_without_f_adds_its_answers_up():
    t, u = torch.randn(2, 5, 192)
    for variant in ("pfeiffer", "pfeiffer, no f"):
        for adapter in adapters_of(built("austen", "adapter", variant, 64)):
            torch.nn.init.normal_(adapter.up.weight)
            assert adds(adapter, t, u) == ("no f" in variant)


def test_an_adapter_at_one_place_trains_there_alone():
    for part, place in (("attention", "self_attn"), ("network", "mlp")):
        model = built("austen", "adapter", f"houlsby, {part}", 64)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 6 * 4 and all(place in name for name in trained)


@pytest.mark.parametrize("name", catalogue.BASES)
def test_a_straightened_unit_is_the_nearest_line_and_a_constant_one_the_mean(name, monkeypatch):
    monkeypatch.setattr(adapters_study, "TEXTS", 8)
    model, task = built(name, "adapter", "houlsby", 8), load_task(name)
    adapter, seen = adapters_of(model)[0], []
    batch = next(task.batches("train", 8))
    adapter.down.register_forward_hook(lambda module, args, z: seen.append(z))
    model.eval()(**batch)
    words = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    z, f = seen[0][words], adapter.activation(seen[0][words])
    adapters_study.straighten(model, task)
    line, steps = adapter.activation(z), 1e-3 * torch.randn(3, 8)
    assert torch.allclose(line - adapter.activation(z - 1), adapter.activation(z + 1) - line)
    error = (f - line).square().sum(0)
    for step in steps:
        assert (error <= (f - line - step).square().sum(0)).all()
        assert (error <= (f - line - step * z).square().sum(0)).all()
    for each in adapters_of(model):
        each.activation = torch.nn.functional.gelu
    adapters_study.straighten(model, task, constant=True)
    assert torch.allclose(adapter.activation(z), f.mean(0).expand_as(z), atol=1e-5)


def test_the_table_lacks_no_run_and_its_best_rates_lie_inside_those_that_were_tried():
    results = Results("adapters_study", (*NAMES, *RUN), adapters_study.COLUMNS)
    assert not results.missing(adapters_study.points(results))
    for names in adapters_study.ON_AUSTEN + adapters_study.ON_SENTIMENT:
        runs = load_results("adapters_study", **dict(zip(NAMES, names, strict=True)))
        rate, chosen = best_lr(runs)
        assert min(runs["lr"]) < rate < max(runs["lr"]) and set(chosen["seed"]) == set(SEEDS)
    for row in load_results("adapters_study", task="sentiment").itertuples():
        assert abs(int(row.right, 16).bit_count() / row.sentences - row.test) < 1e-5
