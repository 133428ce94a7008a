"""The studies of a prefix and a prompt: attention in two parts, and tables that are complete."""

import sys

import torch
from tiny import batch_of, close, tiny_llama

from peft_lessons import Prefix, Prompt, inject
from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import prefix_study
from common import SEEDS

sys.path.remove(str(ROOT / "benchmarks"))
RUNS = load_results("prefix_study")


def test_attention_in_two_parts_is_the_attention_over_both():
    model, ids = tiny_llama(), batch_of("llama")["input_ids"]
    inject(model, Prefix(5))
    before = model(ids).logits
    parts = prefix_study.split(model, 5)
    close(model(ids).logits, before, 1e-5)
    seen = {}
    parts.note = lambda layer, gate, content: seen.update({layer: (gate, content)})
    model(ids)
    parts.note = None
    assert all(gate.min() > 0 and gate.max() < 1 for gate, _ in seen.values())
    parts.gates = {layer: torch.zeros(4, 1) for layer in seen}
    close(model(ids).logits, tiny_llama()(ids).logits, 1e-5)  # a gate that is shut


def test_a_stored_prompt_predicts_as_the_prompt():
    model = prefix_study.load_model("tinylm")
    inject(model, Prompt(4))
    ids = torch.randint(3, 4000, (1, 8), generator=torch.Generator().manual_seed(0))
    close(prefix_study.stored(model)(ids).logits, model(ids).logits[:, 4:], 1e-4)


def test_every_arm_has_three_seeds_at_a_learning_rate_inside_those_tried():
    once = {tuple(map(str, point[:3])) for point in prefix_study.ONCE}
    for setting, runs in RUNS.groupby(["arm", "tokens", "steps"]):
        if tuple(map(str, setting)) in once:
            continue
        first = runs[runs["seed"] == SEEDS[0]].set_index("lr")["validation"]
        best = first.idxmin()
        assert first.index.min() < best < first.index.max(), setting
        assert sorted(runs[runs["lr"] == best]["seed"]) == list(SEEDS), setting
