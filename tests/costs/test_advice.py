"""The advice: what fits, in an order of the study; whatever is asked, it never does not fit."""

import math
import sys

import nbformat
import pandas as pd
import pytest
import tiny
import torch
from peft import TaskType, get_peft_model
from transformers import LlamaForSequenceClassification

from peft_lessons import recommend_peft_method
from peft_lessons.costs import recommend as module
from peft_lessons.costs.estimate import GIB
from peft_lessons.costs.recommend import (
    CANDIDATES,
    FULL,
    NAMES,
    NOTHING,
    TASKS,
    adviser,
    nearest_size,
    needs_of,
    ranking,
    usable_bytes,
)
from peft_lessons.studies import best_lr
from tools.notebooks import clean

SIZES = (0.1, 1, 7, 32, 70, 400)
CARDS = (2, 6, 8, 14, 16, 24, 48, 80, 141, 640, 2000)


def rows_of(task, scores, examples, *, cost=None):
    """Rows of a study in which {method: score, or a score for each seed} came out."""
    rows = []
    for i, (method, score) in enumerate(scores.items()):
        every = [score] * 3 if isinstance(score, float) else score
        for seed, value in enumerate(every):
            rows.append(
                {"task": task, "method": method, "examples": examples, "lr": 0.1, "seed": seed}
                | {"validation": value, "test": value}
                | {"trainable": (cost or {}).get(method, 1000 * (i + 1))}
                | {"torch": "2", "machine": "none", "date": "2000-01-01"}
            )
    return rows


def frame(rows):
    return pd.DataFrame(rows, columns=list(rows_of("", {"": 0.0}, 0)[0]))


NAMED = {name: c.study for name, c in CANDIDATES.items()}
# An order in which every candidate could be recommended, and the better one is the later.
RISING = {NAMED[name]: 0.5 + 0.05 * i for i, name in enumerate(CANDIDATES)}


@pytest.fixture
def studied(monkeypatch):
    """Let a study of our own take the place of the stored one."""

    def put(rows):
        monkeypatch.setattr(module, "_stored", lambda task: module.study(task, frame(rows)))

    falling = {method: 100 * (1.5 - score) for method, score in RISING.items()}
    put(rows_of("sentiment", RISING, 1000) + rows_of("austen", falling, 1000))
    return put


# ------------------------------------------------------------------ what fits


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("examples", [100, 5000])
def test_what_is_recommended_fits_and_no_better_one_does(task, examples):
    """And so more memory is never worse."""
    order = [*ranking(TASKS[task][0], examples), NOTHING]
    for size in SIZES:
        needs, ranks = needs_of(size, task == "classification"), []
        for card in CARDS:
            advice, usable = recommend_peft_method(size, card, task, examples), usable_bytes(card)
            rank = order.index(str(advice))
            assert advice == NOTHING or needs[advice].total <= usable
            assert all(needs[name].total > usable for name in order[:rank])
            ranks.append(rank)
        assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("name", CANDIDATES)
def test_it_changes_where_it_just_fits(name, studied, monkeypatch):
    """The card that has just the bytes, and one with a millionth less."""
    studied(rows_of("austen", {NAMED[name]: 50.0}, 1000))
    need = needs_of(7, labels=False)[name].total
    card = (need + module.CONTEXT) / (1 - module.SPARE) / GIB
    assert recommend_peft_method(7, card * (1 + 1e-9), "generation", 1000) == name
    assert recommend_peft_method(7, card * (1 - 1e-6), "generation", 1000) != name
    monkeypatch.setattr(module, "usable_bytes", lambda gpu_memory_gb: need)
    assert recommend_peft_method(7, card, "generation", 1000) == name


def test_known_cards():
    """Which base lies on the card at all: 7 billion in 16 bits are 14.0 GB, 70 in 4 bits 39.4."""
    ask = lambda size, card: recommend_peft_method(size, card, "generation", 5000)  # noqa: E731
    for size, card in ((70, 24), (70, 8), (7, 4), (400, 141)):
        assert ask(size, card) == NOTHING
    for size, card in ((7, 14), (7, 13.99), (13, 24), (70, 48)):
        assert ask(size, card) == "QLoRA"
    assert ask(7, 24) not in ("QLoRA", NOTHING, FULL)
    assert recommend_peft_method(7, 24, "generation", 5000, context=65536) == NOTHING
    assert recommend_peft_method(7, 24, "generation", 5000, batch=64) == NOTHING
    assert usable_bytes(24) == pytest.approx(0.95 * 24 * 2**30 - 0.75 * 2**30)
    assert usable_bytes(0.1) == 0


# ------------------------------------------------------------------ the order


def test_every_name_can_be_recommended_if_the_study_ranks_it_above_qlora(studied):
    for best in CANDIDATES:
        studied(rows_of("austen", {NAMED[best]: 20.0, "qlora": 50.0} | {NAMED[best]: 20.0}, 1000))
        assert recommend_peft_method(7, 2000, "generation", 1000) == best
    assert recommend_peft_method(7, 2, "generation", 1000) == NOTHING


def test_of_those_as_good_the_cheapest_comes_first():
    near = {"full": 0.862, "lora, all linear": 0.858, "ia3": 0.840}
    cost = {"full": 9_000_000, "lora, all linear": 300_000, "ia3": 5000}
    for changed, order in (
        ({}, [FULL, "LoRA", "(IA)³"]),  # without any spread every difference is clear
        ({"lora, all linear": [0.852, 0.865, 0.857]}, ["LoRA", FULL, "(IA)³"]),
        # Two points behind, an interval that says little makes no method as good.
        ({"ia3": [0.700, 0.900, 0.920]}, [FULL, "LoRA", "(IA)³"]),
    ):
        rows = rows_of("sentiment", near | changed, 1000, cost=cost)
        assert ranking("sentiment", 1000, frame(rows))[:3] == order
    # Perplexities are near by a hundredth of them.
    for behind, order in ((0.3, ["(IA)³", FULL]), (0.8, [FULL, "(IA)³"])):
        noisy = [40.0 + behind + noise for noise in (-1.0, 1.0, 0.0)]
        rows = rows_of("austen", {"full": 40.0, "ia3": noisy}, 9, cost={"full": 9, "ia3": 1})
        assert ranking("austen", 9, frame(rows))[:2] == order


def test_the_order_is_that_of_the_nearest_size():
    rows = rows_of("austen", {"full": 30.0, "ia3": 50.0}, 7695)
    rows += rows_of("austen", {"full": 60.0, "ia3": 50.0}, 100)
    assert ranking("austen", 700, frame(rows))[0] == "(IA)³"  # √(100 · 7,695) is 877
    assert ranking("austen", 1000, frame(rows))[0] == FULL
    assert ranking("austen", 1, frame(rows))[0] == "(IA)³"
    assert nearest_size([800, 200], 400) == 200


def test_rows_that_are_missing_do_not_stop_it(studied):
    half = rows_of("austen", {"full": 30.0}, 1000)
    for row in half:
        row["seed"] += 1  # the run that chooses the rate is not there yet
    studied(half + rows_of("austen", {"ia3": [50.0]}, 1000))
    assert ranking("austen", 1000, frame(half))[0] == "LoRA"
    assert recommend_peft_method(7, 24, "generation", 1000) == "(IA)³"


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_what_diverged_comes_behind_and_is_not_chosen(score):
    rows = rows_of("austen", {"full": 30.0, "ia3": 50.0}, 1000)
    bad = {"validation": score, "test": score}
    for seed in (0, 1):
        runs = [r | bad if (r["method"], r["seed"]) == ("full", seed) else r for r in rows]
        assert ranking("austen", 1000, frame(runs))[:2] == ["(IA)³", "LoRA"]
    # At a rate that was tried and not taken it does no harm, whichever is the first.
    for rate in (0.01, 1.0):
        other = [r | bad | {"lr": rate} for r in rows if r["seed"] == 0]
        assert ranking("austen", 1000, frame(rows + other))[:2] == [FULL, "(IA)³"]
    with pytest.raises(ValueError, match="did not diverge"):
        best_lr(frame(other))


# ------------------------------------------------------------------ what it says


def test_it_is_a_string_and_explains_itself(studied):
    advice = recommend_peft_method(8, 24, "CAUSAL_LM", 1000)
    assert isinstance(advice, str) and advice == str(advice) and advice in NAMES
    text = " ".join(advice.why.split())
    for told in ("25.8 GB", "are left", "Alternatives", "order", "perplexity"):
        assert told in text
    assert repr(advice).startswith(f"{advice}\n") and advice.why in repr(advice)
    shown = advice._repr_html_()
    assert shown.count("<table>") == 2 and "25.8 GB" in shown
    assert len(advice.fits.cells) == len(CANDIDATES)
    assert len(set(advice.alternatives) - {str(advice)}) == 2
    far = recommend_peft_method(8, 24, "CAUSAL_LM", 123_456, batch=16)
    assert "far from yours" in " ".join(far.why.split())
    assert max(map(len, repr(far).splitlines())) <= 110


def test_an_alternative_fits_if_one_does(studied):
    advice = recommend_peft_method(8, 24, "generation", 1000)
    assert advice == "prompt tuning" and advice.alternatives == ("prefix tuning", "(IA)³")
    advice = recommend_peft_method(8, 22.5, "generation", 1000)  # a prefix lacks a little
    assert advice == "prompt tuning" and advice.alternatives == ("(IA)³", "AdaLoRA")
    advice = recommend_peft_method(7, 16, "generation", 1000)  # what lacks least
    assert advice == "QLoRA" and advice.alternatives == ("(IA)³", "prompt tuning")
    assert "Alternatives" not in advice.why and "Too large: (IA)³ (lacks" in advice.why


def test_what_does_not_fit_says_what_would():
    advice = recommend_peft_method(70, 24, "generation", 1000)
    told = advice.sentences[0]
    assert advice == NOTHING and advice.config is None and "QLoRA lacks" in told
    assert "shorter texts" not in told  # the weights alone are too large
    long = recommend_peft_method(8, 8, "generation", 1000, context=8192)
    assert long == NOTHING and "shorter texts" in long.sentences[0]
    largest = float(told.partition("at most ")[2].partition(" billion")[0])
    assert recommend_peft_method(largest, 24, "generation", 1000) != NOTHING
    assert recommend_peft_method(1.1 * largest, 24, "generation", 1000) == NOTHING
    advice = recommend_peft_method(1, 0.3, "generation", 10)
    assert advice == NOTHING and "no language model of this kind fits" in advice.sentences[0]


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("task", TASKS)
def test_its_configuration_is_ready(name, task, studied):
    kind = TASKS[task][0]
    studied(rows_of(kind, {NAMED[name]: 0.9 if kind == "sentiment" else 30.0}, 1000))
    advice = recommend_peft_method(8, 2000, task, 1000)
    assert advice == name
    assert (advice.quantization is not None) == (name == "QLoRA")
    config = advice.config
    assert (config is None) == (name == FULL)
    if config is None:
        return
    base = tiny.tiny_llama()
    if task == "classification":
        base.config.pad_token_id = 0
        base = LlamaForSequenceClassification(base.config)
    if name == "prompt tuning":
        config.tokenizer_name_or_path = None
    model = get_peft_model(base, config)  # which writes into it the layers that it found
    found = getattr(advice.config, "target_modules", None)
    assert found == CANDIDATES[name].settings.get("target_modules")
    same = {"rank": "r", "alpha": "lora_alpha", "tokens": "num_virtual_tokens"}
    for ours, theirs in same.items():
        if value := getattr(CANDIDATES[name].method, ours, None):
            assert getattr(config, theirs) == value
    batch = tiny.batch_of("bert" if task == "classification" else "llama")
    assert torch.isfinite(model(**batch).loss)


def test_a_task_has_several_names():
    why = recommend_peft_method(7, 24, TaskType.SEQ_CLS, 1000).why
    for task_type in ("Classification", "SEQ_CLS", "seq-cls", "text classification"):
        assert recommend_peft_method(7, 24, task_type, 1000).why == why


GOOD = {"model_size_b": 7, "gpu_memory_gb": 24, "task_type": "generation", "num_examples": 1000}


def test_what_makes_no_sense_is_refused():
    for name, values, told in (
        ("model_size_b", (0, math.nan, True, "7"), "model_size_b="),
        ("model_size_b", (7e9,), "must be in billions"),
        ("gpu_memory_gb", (-1, math.inf), "gpu_memory_gb="),
        ("num_examples", (0, 2.5), "num_examples="),
        ("task_type", ("translation", None), "must be one of 'classification', 'SEQ_CLS'"),
        ("context", (0,), "context="),
        ("batch", ("2",), "batch="),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"recommend_peft_method.*{told}"):
                recommend_peft_method(**GOOD | {name: value})


# ------------------------------------------------------------------ the sliders


def test_the_sliders_follow(studied):
    pytest.importorskip("ipywidgets")
    found = adviser(7, 24, "generation", 1000)
    bundle, _ = found._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert bundle["text/html"].startswith(
        recommend_peft_method(7, 24, "generation", 1000)._repr_html_()
    )
    assert "to move: billion parameters 0.1, …, 405; GiB of the GPU 4, …" in bundle["text/plain"]
    size, card, task, examples, shown = found.widget.children
    size.value, card.value, examples.value, task.value = 70, 24, 100, "classification"
    assert recommend_peft_method(70, 24, "classification", 100)._repr_html_() in shown.value
    start = adviser(2000, 0.5, "SEQ_CLS", 10**7).widget.children[:4]  # beyond the usual values
    assert [slider.value for slider in start] == [2000, 0.5, "classification", 10**7]


def test_a_stored_output_has_no_sliders():
    """Their id is drawn anew each time, and a page without a kernel shows the table."""
    output = nbformat.v4.new_output("execute_result", data=adviser()._repr_mimebundle_()[0])
    cell = nbformat.v4.new_code_cell("adviser()", outputs=[output])
    stored = clean(nbformat.v4.new_notebook(cells=[cell]), "13_choosing").cells[0].outputs[0]
    assert set(stored.data) == {"text/plain", "text/html"}


def test_without_ipywidgets_the_table_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle, _ = adviser()._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and "ipywidgets" in bundle["text/html"]
    assert "<table>" in bundle["text/html"]
