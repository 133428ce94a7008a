"""Show that the conformance suite refuses what it must. Exercise 11.3 shows the rest."""

from dataclasses import dataclass, replace
from typing import ClassVar

import peft
import pytest
import torch
from tiny import MODELS, perturb, tiny_llama
from torch import nn

from peft_lessons import LoRA, Prompt
from peft_lessons.engine import AdapterLayer, Method, PeftFiles, attached_to
from peft_lessons.engine.virtual_tokens import by_name
from peft_lessons.testing import MethodError, check_method, conformance, padded_batch


class Branch(AdapterLayer):
    """Add a low-rank branch to a layer, with one fault if `fault` names it."""

    def __init__(self, linear, rank, fault):
        super().__init__(linear)
        made = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features, **made) / 8)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **made))
        self.fault = fault
        if fault == "values":
            self.scale = 1.0 + linear.weight.mean().item()

    def forward(self, x):
        h = self.base(x)
        if self.merged:
            return h
        change = x.to(self.A.dtype) @ self.A.T @ self.B.T
        if self.fault == "promotes":
            return h + change
        if self.fault == "drifts" and x.dim() == 3 and x.shape[1] == 1:
            change = 2 * change
        return h + change.to(h.dtype)

    def delta_weight(self):
        if self.fault == "no merge":
            raise TypeError("it does not merge")
        return self.B @ self.A


@dataclass(frozen=True)
class Faulty(Method):
    rank: int = 4
    targets: tuple[str, ...] | str = "all-linear"
    files = PeftFiles(
        "FAULTY",
        fields={"rank": ("r", 4), "targets": ("target_modules", None)},
        tensors={"A": "A", "B": "B"},
    )
    learning_rate = 3e-3
    fault: ClassVar[str] = ""

    def wrap(self, path, layer):
        if self.rank == 5 and self.fault in REFUSALS:
            raise REFUSALS[self.fault]
        return Branch(layer, self.rank, self.fault)


REFUSALS = {
    "crashes": KeyError("rank"),
    "refuses without a name": ValueError("five ranks are too many"),
    "refuses": ValueError("rank=5 is too many"),
}


class Shift(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(model.config.hidden_size, device=model.device))


@dataclass(frozen=True)
class Hooked(Method):
    """Add a vector to all embeddings by a hook, which finds it in the model or knows it."""

    files = PeftFiles("HOOKED", tensors={"v": "v"})
    learning_rate = 1e-2
    by_model: ClassVar[bool] = True

    def attach(self, model):
        shift, by_model = Shift(model), self.by_model

        def add(module, args, kwargs):
            inputs = by_name(module, args, kwargs)
            own = attached_to(module, Shift, "forward") if by_model else shift
            embedded = module.get_input_embeddings()(inputs.pop("input_ids"))
            return (), inputs | {"inputs_embeds": (embedded + own.v).to(embedded.dtype)}

        return shift, [model.register_forward_pre_hook(add, with_kwargs=True)]


FAULTS = {
    "promotes": (
        None,
        {},
        "when it was put into a base in 16 or 64 bits, it raised RuntimeError: mat1.*does forward",
    ),
    "values": (None, {}, "load_adapter raised RuntimeError: .* cannot be called on meta"),
    "drifts": ("llama", {}, "generate with a cache gives another text"),
    "crashes": (None, {}, r"with rank=5 it raised KeyError: 'rank'\. If the .* rank"),
    "refuses without a name": (None, {}, "with rank=5 it raised ValueError: five ranks"),
    "refuses": (None, {"merges": False}, "merge must refuse it"),  # and goes on with rank=3
    "no merge": (
        None,
        {"merges": True},
        "merge must work and refuses it. TypeError: .*it does not",
    ),
    "": (None, {"merges": False}, "merge must refuse it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, monkeypatch):
    name, expected, told = FAULTS[fault]
    monkeypatch.setattr(Faulty, "fault", fault)
    with pytest.raises(MethodError, match=told):
        check_method(Faulty(), MODELS[name]() if name else None, **expected)


def test_other_values_are_of_the_same_kind():
    assert conformance._other_values(("query",)) == [("key",), ("value",)]
    assert conformance._other_values((1, 2)) == conformance._other_values(()) == []


@pytest.mark.parametrize("name", MODELS)
def test_without_a_fault_it_passes(name):
    facts = check_method(Faulty(), MODELS[name](), merges=True)
    assert "it merges, and can be taken out again" in facts and len(facts) > 10


def test_what_is_expected_of_a_method_is_compared():
    with pytest.raises(MethodError, match="step 0 is not the base"):
        check_method(Prompt(4))
    lora = LoRA(4, 8.0, ("query",))
    assert "the kind 'LORA' is its own" in check_method(lora)  # and constants tell QLoRA from it
    with pytest.raises(MethodError, match="loaded it is LoRA.*rank=4.*expected LoRA.*rank=5"):
        check_method(lora, loaded=replace(lora, rank=5))


def test_a_class_that_is_not_a_method_is_refused(monkeypatch):
    for given in (LoRA, 5, None):
        with pytest.raises(MethodError, match="pass a method, such as LoRA"):
            check_method(given)
    monkeypatch.setattr(Faulty, "wrap", lambda self, path, layer: None)
    with pytest.raises(MethodError, match="wrap returns None for .*: is a return missing"):
        check_method(Faulty())


def test_a_hook_that_knows_the_module_is_noticed_in_a_copy(monkeypatch):
    check_method(Hooked())
    monkeypatch.setattr(Hooked, "by_model", False)
    with pytest.raises(MethodError, match="use the same tensors. A hook gets the model"):
        check_method(Hooked())


def test_a_file_that_peft_reads_otherwise_is_named(monkeypatch):
    row = {"refused": None, "effect": 1.0, "ours → PEFT": 0.0, "PEFT → ours": 0.5}
    monkeypatch.setattr(conformance, "interoperability", lambda *_: [row])
    with pytest.raises(MethodError, match="from PEFT to ours, the logits are off by 0.5"):
        check_method(Faulty(), peft=peft.LoraConfig())


def test_perturb_and_the_batch_leave_the_random_state_and_what_is_frozen():
    model = tiny_llama()
    before = torch.get_rng_state()
    model.lm_head.requires_grad_(False)
    frozen = model.lm_head.weight.clone()
    batch = padded_batch(perturb(model), (3, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.lm_head.weight, frozen)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
