"""disabled: the base for a moment, and everything as before afterwards."""

import copy

import peft
import pytest
import torch
from tiny import perturb, refused, same, state, tiny_bert

from peft_lessons import (
    BitFit,
    LoftQ,
    LoRA,
    Prompt,
    QLoRA,
    disabled,
    fit,
    inject,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import injection_of
from peft_lessons.testing import padded_batch

QV = LoRA(rank=4, alpha=6, targets=("query", "value"), dropout=0.5)
METHODS = {"lora": QV, "prompt": Prompt(3), "bitfit": BitFit()}


def made(method):
    """Return a BERT, its logits, and the same BERT with the method perturbed in it."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
    plain = logits(model)
    inject(model, method)
    return plain, perturb(model)


def logits(model):
    batch = padded_batch(model)
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("name", METHODS)
def test_the_base_inside_and_the_method_again_after_it(name):
    plain, model = made(METHODS[name])
    trained, names = logits(model), list(state(model))
    modes = [m.training for m in model.train().modules()]
    with disabled(model) as inside:
        assert inside is model and list(state(model)) == names
        assert [m.training for m in model.modules()] == modes
    model.eval()
    with disabled(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained) and not torch.equal(trained, plain)
    twin = copy.deepcopy(model)
    with disabled(twin):
        assert torch.equal(logits(twin), plain) and torch.equal(logits(model), trained)
    assert torch.equal(logits(twin), trained)
    assert not any("forward" in vars(m) for m in model.modules())


def test_blocks_nest_and_an_error_restores_too():
    plain, model = made(QV)
    trained = logits(model)
    with disabled(model):
        with disabled(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained)
    with pytest.raises(KeyError, match="inside"), disabled(model):
        raise KeyError("inside")
    assert torch.equal(logits(model), trained) and not injection_of(model).off


@pytest.mark.parametrize("name", ["lora", "prompt", "bitfit"])
@pytest.mark.parametrize("backward", ["inside", "after"])
def test_gradients_are_those_without_the_block(name, backward):
    _, model = made(METHODS[name])
    batch = padded_batch(model)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = model(**batch).loss
    with disabled(model):
        reference = model(**batch).loss
        assert not reference.requires_grad or name != "bitfit"
        if backward == "inside":
            loss.backward()
    if backward == "after":
        loss.backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(expected)
    for n, p in model.named_parameters():
        assert p.grad is None if n not in expected else torch.equal(p.grad, expected[n]), n


def test_hooks_of_others_keep_their_order():
    _, model = made(Prompt(3))
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("later"))
    before = list(model._forward_pre_hooks)
    with disabled(model):
        logits(model)
    assert seen == ["later"] and list(model._forward_pre_hooks) == before


def test_a_base_in_four_bits_stays_so():
    model = tiny_bert(intermediate_size=128).eval()
    inject(model, QLoRA(rank=4, alpha=6, targets=("query", "value")))
    start = logits(model)
    perturb(model)
    for path in injection_of(model).whole_modules:  # the head, too, is the one from before
        assert path == "classifier"
    with disabled(model):
        assert torch.equal(logits(model), start)


def test_what_cannot_be_switched_off_is_refused():
    bare = tiny_bert()
    with refused(bare, "disabled: the model holds no method; inject"), disabled(bare):
        pass
    _, model = made(QV)
    merge(model)
    with refused(model, "disabled: .*merged.*unmerge", RuntimeError), disabled(model):
        pass
    unmerge(model)
    squeezed = tiny_bert(intermediate_size=128)
    inject(squeezed, LoftQ(4, 8, ("query",), iterations=1))
    message = "LoftQ stores W − BA in 4 bits, not W, .*load the base again"
    with refused(squeezed, message), disabled(squeezed):
        pass
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))
    message = r"PeftModel .*with model.disable_adapter\(\)"
    with pytest.raises(TypeError, match=message), disabled(theirs):
        pass


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_inside_no_verb_works_on_the_values_of_the_base(name, tmp_path):
    _, model = made(METHODS[name])
    before = state(model)
    verbs = {
        "merge": merge,
        "report": report,
        "unload": unload,
        "save_adapter": lambda model: save_adapter(model, tmp_path / "out"),
        "fit": lambda model: fit(model, [padded_batch(model)], 1, show=False),
    }
    with disabled(model):
        for verb, call in verbs.items():
            with pytest.raises(RuntimeError, match=f"{verb}: disabled.* after the with block"):
                call(model)
    assert same(state(model), before) and not (tmp_path / "out").exists()
    save_adapter(model, tmp_path / "out")
