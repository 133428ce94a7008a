"""The map of PEFT's types: every type has a row, and known types are where they belong."""

import enum

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_lessons.testing import peft_map as module
from peft_lessons.testing.peft_map import FAMILIES, NEEDED, WIDTH, peft_map


@pytest.fixture(scope="module")
def rows():
    return {row["type"]: row for row in peft_map()}


def test_every_type_has_a_row_and_a_family(rows):
    assert rows.keys() == {kind.value for kind in peft.PeftType}
    assert {row["changes"] for row in rows.values()} <= FAMILIES.keys()
    assert NEEDED.keys() <= rows.keys()


def test_families_are_in_order(rows):
    order = list(FAMILIES)
    places = [order.index(row["changes"]) for row in rows.values()]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("kind", "changes", "trainable", "rank", "merges"),
    [
        ("LORA", "adds a ΔW of low rank", 4 * 8 * 2 * WIDTH, 8, "yes"),
        ("LOHA", "adds a ΔW of low rank", 4 * 8 * 4 * WIDTH, 64, "yes"),
        ("OFT", "makes its ΔW from W", 4 * 8 * 32 * 31 // 2, None, "yes"),
        ("IA3", "makes its ΔW from W", 4 * WIDTH, None, "yes"),
        ("SHIRA", "adds to few entries of W", 4 * 32 * 2 * WIDTH, None, "yes"),
        ("LILY", "adds a branch that is not linear in x", None, None, "no"),
        ("BEFT", "trains biases, norms or embeddings", 4 * WIDTH, None, "no"),
        ("LN_TUNING", "trains biases, norms or embeddings", 4 * WIDTH, None, "yes"),
        ("TRAINABLE_TOKENS", "trains biases, norms or embeddings", 2 * WIDTH, None, "yes"),
        ("PROMPT_TUNING", "adds virtual tokens", 8 * WIDTH, None, "no"),
        ("PREFIX_TUNING", "adds keys and values", 8 * 4 * WIDTH, None, "no"),
        ("ADAPTION_PROMPT", "adds keys and values", 2 * (8 * WIDTH + 1), None, "no"),
    ],
)
def test_known_types(rows, kind, changes, trainable, rank, merges):
    row = rows[kind]
    assert (row["changes"], row["merges"], row["note"]) == (changes, merges, "")
    assert trainable is None or row["trainable"] == trainable
    assert rank is None or row["rank of ΔW"] == rank


def test_what_can_become_a_lora(rows):
    kinds = ("LORA", "LOHA", "VERA", "OFT", "IA3", "HIRA")
    become = {kind: rows[kind]["as LoRA"] for kind in kinds}
    assert become == dict.fromkeys(("LORA", "LOHA", "VERA"), "yes") | dict.fromkeys(
        ("OFT", "IA3", "HIRA"), "no"
    )
    assert rows["PROMPT_TUNING"]["as LoRA"] == "no" and rows["POLY"]["as LoRA"] == ""


def test_vera_has_a_high_rank(rows):
    assert rows["VERA"]["changes"] == "adds a ΔW of high rank"
    assert rows["VERA"]["rank of ΔW"] > WIDTH / 2


def test_what_needs_more_says_what(rows):
    assert rows["POLY"]["changes"] == "needs more than a config"
    assert "task_ids" in rows["POLY"]["note"]


def test_a_new_type_is_not_classified(monkeypatch):
    kinds = enum.Enum("PeftType", {"LORA": "LORA", "NEW": "NEW"}, type=str)
    monkeypatch.setattr(module.peft, "PeftType", kinds)
    lora, new = peft_map()
    assert lora["changes"] == "adds a ΔW of low rank"
    assert new["changes"] == "not classified" and "no config" in new["note"]


def test_a_type_that_does_nothing_is_not_classified(monkeypatch):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA]
    monkeypatch.setattr(module, "_config", lambda kind, cls: config(
        task_type="CAUSAL_LM", target_modules=["q_proj"], lora_alpha=0))  # fmt: skip
    kinds = enum.Enum("PeftType", {"LORA": "LORA"}, type=str)
    monkeypatch.setattr(module.peft, "PeftType", kinds)
    assert peft_map()[0]["changes"] == "not classified"


def test_the_map_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    peft_map()
    assert torch.equal(torch.rand(2), expected)
