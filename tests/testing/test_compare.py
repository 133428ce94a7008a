"""Test what lessons show of a method: refusals, agreement with PEFT, files there and back."""

import itertools
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch_of, tiny_llama

from peft_lessons import LoRA, generate_text, load_tokenizer, measure
from peft_lessons.engine import injected_copy, injection_of
from peft_lessons.testing import (
    adapter_bytes,
    compare_outputs,
    copy_parameters,
    roundtrip_error,
    show_refusal,
)

METHOD, BATCH = LoRA(rank=4, alpha=6, targets=("q_proj",)), batch_of("llama")


def moved():
    """Return a Llama with a perturbed LoRA, and its base."""
    base = tiny_llama()
    model = injected_copy(base, METHOD)
    for wrapper in injection_of(model).wrappers.values():
        torch.nn.init.normal_(wrapper.lora.lora_B, std=0.2)
    return model, base


def test_an_attempt_prints_the_refusal_and_misses_what_is_not_refused(capsys):
    show_refusal(lambda: injected_copy(tiny_llama(), LoRA(rank=4, alpha=6, targets=("no_such",))))
    assert capsys.readouterr().out.startswith("ValueError: targets: 'no_such' matches no module")
    with pytest.raises(AssertionError, match="should have been refused"):
        show_refusal(lambda: None)
    with pytest.raises(KeyError):  # a mistake in the lesson is no refusal
        show_refusal(lambda: {}["missing"])


def test_agreement_with_peft_and_a_difference_that_shows():
    ours, base = moved()
    theirs = get_peft_model(
        deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    ).eval()
    layers = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    pairs = []
    for wrapper, layer in zip(injection_of(ours).wrappers.values(), layers, strict=True):
        pairs.append((wrapper.lora.lora_A, layer.lora_A["default"].weight))
        pairs.append((wrapper.lora.lora_B, layer.lora_B["default"].weight))
    copy_parameters(pairs)
    found = compare_outputs(ours, theirs, pairs, BATCH)
    assert found["of"] == 4 and found["largest gradient"] > 1e-3
    assert max(found[k] for k in ("logits", "loss", "gradients")) < 1e-6
    assert compare_outputs(ours, theirs, pairs, BATCH) == found, "gradients do not add up"
    with torch.no_grad():
        pairs[1][1].add_(0.01)
    found = compare_outputs(ours, theirs, pairs, BATCH)
    assert min(found[k] for k in ("logits", "loss", "gradients")) > 1e-6


def test_files_there_and_back_and_their_size():
    model, base = moved()
    assert max(roundtrip_error(model, base, BATCH)) < 1e-6
    assert adapter_bytes(model) > 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_same_seed_writes_the_same_text():
    from peft_lessons import load_model

    model, tokenizer = load_model("tinylm"), load_tokenizer("tinylm")
    before = torch.get_rng_state()
    text = generate_text(model, tokenizer, "She was", seed=3, tokens=6)
    assert text.startswith("She was") and torch.equal(torch.get_rng_state(), before)
    assert text == generate_text(model, tokenizer, "She was", seed=3, tokens=6)
    assert text != generate_text(model, tokenizer, "She was", seed=4, tokens=6)


def test_costs_of_models_are_rows_of_a_table():
    model, base = moved()
    rows = measure.costs({"base": base, "LoRA": model}, BATCH)
    assert [row[""] for row in rows] == ["base", "LoRA"]
    assert rows[1]["trainable"] == 2 * 4 * (64 + 64)
    assert rows[1]["optimiser"] == pytest.approx(2 * 4 * rows[1]["trainable"] / 2**20, rel=0.01)
    assert rows[0]["peak of a step"] > rows[1]["peak of a step"] > 0 < rows[1]["time of a step"]
    step = measure.training_step(model, BATCH, repeats=1)
    assert rows[1]["peak of a step"] * 2**20 == pytest.approx(step.peak, rel=0.1)


def test_turns_call_every_function_in_every_round():
    calls = []
    times = measure.by_turns({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=2)
    assert calls == list("abbaab") and set(times) == {"a", "b"} and min(times.values()) >= 0
    ticks = itertools.count()
    assert measure.by_turns({"a": int}, rounds=2, clock=lambda: next(ticks)) == {"a": 1}
