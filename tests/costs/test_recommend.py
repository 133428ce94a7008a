"""The advice: LoRA, then QLoRA; whatever is asked, what is recommended fits."""

import ast
import math

import nbformat
import pandas as pd
import peft
import pytest
import tiny
import torch
from peft import TaskType, get_peft_model
from transformers import LlamaForSequenceClassification

from peft_lessons import recommend_peft_method
from peft_lessons.costs import evidence
from peft_lessons.costs import recommend as module
from peft_lessons.costs.estimate import GB, GIB
from peft_lessons.costs.evidence import assistant_runs, assistant_table, benchmark, nearest_size
from peft_lessons.costs.recommend import CANDIDATES, FULL, NOTHING, TASKS, Advice, adviser, needs_of
from peft_lessons.studies import best_lr
from tools.notebooks import clean

SIZES = (0.1, 1, 7, 32, 70, 400)
GPUS = (2, 6, 8, 14, 16, 24, 48, 80, 141, 640, 2000)
ORDER = [*CANDIDATES, NOTHING]


def ask(size, gpu, task="generation", examples=1000, **more):
    return recommend_peft_method(size, gpu, task, examples, **more)


def only(name, monkeypatch):
    """Leave one candidate, so that it is the advice where it fits."""
    monkeypatch.setattr(module, "CANDIDATES", {name: CANDIDATES[name]})
    monkeypatch.setattr(module, "_SHOWN", (name,))
    monkeypatch.setattr(module, "_others", lambda *_: "")


# ------------------------------------------------------------------ what fits


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chunked", [True, False])
def test_what_is_recommended_fits_and_no_earlier_one_does(task, chunked):
    """And so more memory is never worse."""
    for size in SIZES:
        needs, ranks = needs_of(size, task == "classification", chunked=chunked), []
        for gpu in GPUS:
            usable = module.usable_bytes(gpu)
            advice = ask(size, gpu, task, chunked=chunked)
            rank = ORDER.index(advice.name)
            assert advice.name == NOTHING or needs[advice.name].total <= usable
            assert all(needs[name].total > usable for name in ORDER[:rank])
            ranks.append(rank)
        assert ranks == sorted(ranks, reverse=True)


def test_a_chunked_loss_takes_less_and_makes_a_long_text_fit():
    for size in SIZES:
        more = [needs_of(size, False, 8192, chunked=chunked) for chunked in (True, False)]
        assert all(more[0][name].total < more[1][name].total for name in CANDIDATES)
    assert ask(8, 48, context=32_768).name == "LoRA"
    assert ask(8, 48, context=32_768, chunked=False).name == NOTHING


@pytest.mark.parametrize("name", CANDIDATES)
def test_it_changes_where_it_just_fits(name, monkeypatch):
    """The GPU that has just the bytes, and one with a millionth less."""
    only(name, monkeypatch)
    need = needs_of(7, labels=False)[name].total
    gpu = (need + module.CONTEXT) / (1 - module.SPARE) / GIB
    assert ask(7, gpu * (1 + 1e-9)).name == name
    assert ask(7, gpu * (1 - 1e-6)).name == NOTHING


def test_known_gpus():
    """Whether the base fits at all: 7 billion in 16 bits are 14.0 GB, 70 in 4 bits 39.4."""
    for name, cases in (
        (NOTHING, ((70, 24), (70, 8), (7, 4), (400, 141))),
        ("QLoRA", ((7, 14), (7, 13.99), (13, 24), (70, 48), (8, 8), (70, 80))),
        ("LoRA", ((7, 24), (8, 80), (8, 160), (1.5, 12), (0.1, 8), (3, 16))),
    ):
        assert {ask(*case).name for case in cases} == {name}
    assert ask(7, 24, context=65536).name == ask(7, 24, batch=64).name == NOTHING
    assert module.usable_bytes(24) == pytest.approx(0.95 * 24 * 2**30 - 0.75 * 2**30)
    assert module.usable_bytes(0.1) == 0


# ------------------------------------------------------------------ the evidence


@pytest.mark.parametrize(
    ("kind", "size", "model", "at"),
    [
        # On both sides of the geometric means of 3.2 million, 135 million and 3.2 billion.
        ("generation", 0.020, "tinylm", "3.2 million parameters, yours has 6.2 times as many"),
        ("generation", 0.022, "SmolLM2", "135 million parameters, yours has 0.16 times as many"),
        ("generation", 0.65, "SmolLM2", "135 million parameters, yours has 4.8 times as many"),
        ("generation", 0.66, "Llama-3.2-3B", "3.2 billion parameters, yours has 0.21 times"),
        ("generation", 70, "Llama-3.2-3B", "3.2 billion parameters, yours has 22 times as many"),
        # And of 22.6 million and 3.2 billion.
        ("classification", 0.26, "minilm", "22.6 million parameters, yours has 12 times as many"),
        ("classification", 0.28, "Llama-3.2-3B", "3.2 billion parameters"),
        ("classification", 8, "Llama-3.2-3B", "3.2 billion parameters, yours has 2.5 times"),
    ],
)
def test_the_evidence_is_of_the_model_nearest_in_size(kind, size, model, at, monkeypatch):
    """And says at which size it was measured."""
    runs = assistant(lora=(3.0, 3.1, 2.9), full=(2.9, 3.0, 2.8))
    monkeypatch.setattr(evidence, "load_results", stored_and(runs))
    advice = ask(size, 80, kind)
    assert list(advice.lines)[-1] == "measured" and advice.lines["measured"].startswith(f"at {at}")
    assert model in advice.evidence.columns[0]


def test_without_the_assistant_the_benchmark_is_shown(monkeypatch):
    monkeypatch.setattr(evidence, "load_results", stored_and(assistant(full=(3.0,))))
    assert "Llama-3.2-3B" in ask(0.135, 80).evidence.columns[0]


def assistant(**tests):
    """Return rows of the assistant's study from {method: test losses of seeds 0, 1, 2}."""
    rows = []
    for method, losses in ({"base": (4.0,)} | tests).items():
        for seed, loss in enumerate(losses):
            rows.append(
                {"task": "definitions", "method": method, "lr": 0.1, "seed": seed}
                | {"validation": loss, "test": loss, "memory": 50.0, "trainable": 9}
                | {"losses": f"{loss - 0.5} {loss + 0.5} {loss + 0.1}"}
                | {"torch": "2", "machine": "none", "date": "2000-01-01"}
            )
    return pd.DataFrame(rows)


def stored_and(runs):
    original = evidence.load_results
    return lambda name: runs if name == "assistant_study" else original(name)


def test_methods_with_three_seeds_are_shown_or_the_first_seed_of_all():
    runs = assistant(lora=(3.0, 3.1, 2.9), full=(2.9, 3.0), dora=(3.2, 3.2, 3.2))
    assert list(assistant_runs(runs)) == ["base", "lora", "dora"]
    assert [row[0] for row in assistant_table(runs).cells] == ["base, untouched", "LoRA", "DoRA"]
    assert "+0.200 (+0.200 to +0.200)" in repr(assistant_table(runs))
    early = assistant_runs(assistant(lora=(3.0, 3.1, 2.9), full=(2.9,)))
    assert {name: len(at) for name, at in early.items()} == {"base": 1, "lora": 1, "full": 1}
    with pytest.raises(ValueError, match="no run of LoRA"):
        assistant_table(assistant(full=(2.9, 3.0, 2.8)))


def test_the_benchmark_says_what_lesson_and_advice_say_of_it():
    assert len(benchmark()) == 63
    runs = benchmark().set_index("run")
    score, forgot = runs["accuracy"], runs["forgetting"]
    p = score["LoRA, rank 32"]
    error = 100 * math.sqrt(p / 100 * (1 - p / 100) / evidence.QUESTIONS)
    for other in ("DoRA, rank 32", "full fine-tuning, 1e-5", "LoRA, rank 64"):
        assert abs(score[other] - p) < error  # within the noise
    assert f"less than {8**0.5 * error:.1f} points" in repr(evidence.benchmark_table())
    for ahead in ("rsLoRA, rank 64", "SHiRA", "LoRA, rank 10, MLP"):
        assert 0 < score[ahead] - p < 8**0.5 * error  # two standard errors of a difference
    assert score["Lily, MLP"] - p > 8**0.5 * error
    assert score["Lily, MLP"] - score["LoRA, rank 10, MLP"] < 8**0.5 * error
    for high, low, times in (
        ("Lily, MLP", "LoRA, rank 10, MLP", 6.75),
        ("MiSS", "LoRA, rank 32", 4),
        ("(IA)³, attention, 5e-3", "(IA)³, default 1e-4", 16.5),
        ("rsLoRA, rank 64", "LoRA, rank 32", 2.2),
    ):
        assert forgot[high] / forgot[low] == pytest.approx(times, rel=0.05)
    assert forgot["LoRA, rank 10, MLP"] < forgot["LoRA, rank 32"]
    most = runs.loc[runs["gigabytes"].idxmax()]
    assert most.name == "full fine-tuning, 1e-5" and most["accuracy"] < p  # and is not ahead


def test_the_study_at_the_nearest_size_is_shown():
    assert nearest_size([800, 200], 400) == 200  # of two equal ratios the smaller
    assert nearest_size([100, 1000], 400) == 1000  # 100 is nearer by difference
    assert nearest_size([100, 1000], 316) == 100 and nearest_size([100, 1000], 317) == 1000
    names = {name: c.study for name, c in CANDIDATES.items()}
    for examples, size in ((100, "100"), (400, "1,000"), (10**6, "7,695")):
        line, measured = evidence.evidence("generation", 0.003, examples, names)
        assert f"{size} blocks" in line and f"{size} examples" in measured.columns[0]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_what_diverged_is_not_shown(score):
    row = {"task": "austen", "examples": 9, "lr": 0.1, "validation": 5.0, "test": 5.0}
    rows = [row | {"method": m, "seed": s} for m in ("full", "ia3") for s in (0, 1)]
    for seed in (0, 1):
        bad = {"validation": score, "test": score}
        runs = [r | bad if (r["method"], r["seed"]) == ("full", seed) else r for r in rows]
        assert list(evidence.study("austen", pd.DataFrame(runs))[9]) == ["ia3"]
    other = [r | bad | {"lr": rate} for r in rows if r["seed"] == 0 for rate in (0.01, 1.0)]
    assert list(evidence.study("austen", pd.DataFrame(rows + other))[9]) == ["full", "ia3"]
    with pytest.raises(ValueError, match="diverged or is missing"):
        best_lr(pd.DataFrame(other))
    with pytest.raises(ValueError, match="must be one of 'sentiment', 'austen'"):
        evidence.study("definitions")


# ------------------------------------------------------------------ what it says


def test_it_says_at_most_eight_lines_as_text_and_as_a_page():
    advice = ask(8, 24, "CAUSAL_LM")
    assert str(advice) == f"{advice}" == advice.name == advice.lines["method"] == "LoRA"
    for about, words in (
        ("memory", "17.4 of 23.7 GB usable of 24 GiB, 6.3 GB left"),
        ("largest part", "base, 16.0 GB; to shrink: 4 bits (QLoRA)"),
        ("learning rate", "0.0002 to start with"),
        ("instead", "QLoRA (16.6 GB left) or DoRA (5.8 GB left); full fine-tuning lacks 105.0 GB"),
        ("server", "vLLM"),
        ("measured", "July 2026"),
    ):
        assert words in advice.lines[about], about
    for size, gpu, examples in ((8, 24, 499), (8, 160, 10**6), (70, 24, 10), (0.01, 8, 10)):
        for task in TASKS:
            said = ask(size, gpu, task, examples)
            assert repr(said).count("\n") + 1 == len(said.lines) <= 8
            assert said._repr_html_().count("<tr>") == len(said.lines)
    for examples, words in ((499, "499 examples are few"), (500, None), (99_999, None),
                            (100_000, "100,000 examples are many")):  # fmt: skip
        data = ask(8, 24, examples=examples).lines.get("data")
        assert data.startswith(words) if words else data is None
    assert "takes 49 GB with 8-bit Adam" in ask(8, 80).lines["instead"]


def test_the_largest_part_of_the_memory_has_its_lever():
    long = {"context": 32_768}
    for words, case, more in (
        ("base, 16.0 GB; to shrink: 4 bits (QLoRA)", (8, 24), {}),
        ("base, 5.7 GB; to shrink: a smaller model", (8, 16), {}),
        ("logits, 50.4 GB; to shrink: a chunked loss", (8, 80), long | {"chunked": False}),
        ("blocks, 8.9 GB; to shrink: a shorter text", (8, 24), {"context": 16_384}),
    ):
        assert ask(*case, **more).lines["largest part"] == words
    assert "largest part" not in ask(70, 24).lines


def test_an_alternative_fits_if_one_does():
    assert ask(8, 24).alternatives == ("QLoRA", "DoRA")
    large, small = ask(8, 160), ask(8, 16)
    assert large.alternatives == (FULL, "QLoRA")
    assert "lacks" not in large.lines["instead"] and "8-bit" not in large.lines["instead"]
    assert small.name == "QLoRA" and small.lines["instead"].startswith("LoRA (lacks 1.8 GB) or")
    assert "if it beats LoRA on your task" in repr(large.fits)


@pytest.mark.parametrize("task", TASKS)
def test_the_pasted_code_loads_the_base_in_the_bytes_that_are_counted(task):
    for gpu in (24, 12):
        code = ask(8, gpu, task).code
        assert '"dtype": "bfloat16"' in code and "gradient_accumulation_steps=16" in code
    assert "accumulation_steps=2" in ask(1, 80, task, batch=8).code


def test_little_room_is_called_tight():
    for size, gpu, tight in ((6.9, 16, True), (8, 24, False), (70, 48, True)):
        assert ("tight" in ask(size, gpu, context=2048).lines["memory"]) == tight
    room = module.usable_bytes(24)
    assert not module.is_tight(room - 0.1001 * 24 * GIB, 24)
    assert module.is_tight(room - 0.0999 * 24 * GIB, 24)


def test_whether_a_server_loads_it():
    for name in CANDIDATES:
        words = module._server(name, "generation")
        assert ("November 2026" in words) == (name != FULL), name
        assert ("refuse" in words) == (name not in ("LoRA", "QLoRA", FULL)), name
        assert ("merge it first" in words) == (name in ("DoRA", "AdaLoRA", "(IA)³")), name
    assert "new head" in ask(8, 24, "SEQ_CLS").lines["server"]
    assert module._server(NOTHING, "generation") == ""


@pytest.mark.parametrize("name", ["LoRA", FULL])
def test_the_learning_rate_depends_on_the_kind_of_model(name, monkeypatch):
    only(name, monkeypatch)
    rates = {"LoRA": (1e-3, 2e-4), FULL: (2e-4, 2e-5)}[name]
    for kind, sizes in (("generation", (0.049, 0.05)), ("classification", (0.49, 0.5))):
        assert tuple(ask(size, 2000, kind).learning_rate for size in sizes) == rates
    assert ask(70, 8).learning_rate is None


def test_the_table_is_in_gigabytes_of_a_billion_bytes():
    advice = ask(8, 24)
    base, trained, step, total, left = advice.fits.cells[0][1:6]
    need = needs_of(8, False)["LoRA"].total
    assert (base, total) == ("16.0 GB", f"{need / GB:.1f} GB")
    assert left == f"{(module.usable_bytes(24) - need) / GB:.1f} GB left"
    parts = sum(float(cell.removesuffix(" GB")) for cell in (base, trained, step))
    assert parts == pytest.approx(float(total.removesuffix(" GB")), abs=0.1)
    assert left in advice.lines["memory"]
    for task, chunked, end in (
        ("generation", True, "gradient checkpointing, chunked loss"),
        ("generation", False, "gradient checkpointing, whole logits"),
        ("classification", True, "gradient checkpointing"),
    ):
        assert repr(ask(8, 24, task, chunked=chunked).fits).endswith(end)


def test_what_does_not_fit_says_what_would():
    advice = ask(70, 24)
    first = advice.lines["memory"]
    assert advice.name == NOTHING and advice.config is None and "QLoRA lacks" in first
    assert advice.code == "" and advice.lines["method"] == "does not fit"
    assert "shorter texts" not in first  # the weights alone are too large
    assert "shorter texts" in ask(8, 8, context=32_768).lines["memory"]
    largest = float(first.partition("at most ")[2].partition(" billion")[0])
    assert ask(largest, 24).name != NOTHING == ask(1.1 * largest, 24).name
    assert "no language model of this kind fits" in ask(1, 0.3).lines["memory"]


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("task", TASKS)
def test_its_configuration_is_ready(name, task, monkeypatch):
    only(name, monkeypatch)
    advice = ask(8, 2000, task)
    assert advice.name == name
    assert (advice.quantization is not None) == (name == "QLoRA")
    config, line = advice.config, advice.code.splitlines()[0]
    ast.parse(advice.code)
    assert ("BitsAndBytesConfig" in advice.code) == (name == "QLoRA")
    assert ("SFTConfig" in advice.code) == (task == "generation")
    assert (config is None) == (name == FULL)
    if config is None:
        return
    written = eval(line.partition(" = ")[2], vars(peft))
    assert written.to_dict() == config.to_dict()
    base = tiny.tiny_llama()
    if task == "classification":
        base.config.pad_token_id = 0
        base = LlamaForSequenceClassification(base.config)
    if name == "prompt tuning":
        config.tokenizer_name_or_path = None
    model = get_peft_model(base, config)  # which writes into it the layers that it found
    targets = getattr(advice.config, "target_modules", None)
    assert targets == CANDIDATES[name].settings.get("target_modules")
    names = {"rank": "r", "alpha": "lora_alpha", "tokens": "num_virtual_tokens"}
    for ours, theirs in names.items():
        if value := getattr(CANDIDATES[name].method, ours, None):
            assert getattr(config, theirs) == value
    batch = tiny.batch_of("bert" if task == "classification" else "llama")
    assert torch.isfinite(model(**batch).loss)


def test_the_pasted_quantization_is_the_advised_one():
    from transformers import BitsAndBytesConfig

    advice = ask(8, 12)
    line = next(line for line in advice.code.splitlines() if line.startswith("quantization"))
    names = {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch}
    assert eval(line.partition(" = ")[2], names).to_dict() == advice.quantization.to_dict()


def test_the_pasted_trainer_is_given_all_that_is_defined():
    for gpu, more in ((12, {"quantization_config"}), (24, set()), (160, set())):
        code, passed = ask(8, gpu).code, {"args", "peft_config"} | more
        call = ast.parse(code).body[-1].value
        assert call.func.id == "SFTTrainer" and call.args[0].value == "MODEL"
        assert {keyword.arg for keyword in call.keywords} == passed | {"train_dataset"}
        defined = {line.partition(" = ")[0] for line in code.splitlines()[:-1]}
        assert defined == passed


def test_a_task_has_several_names():
    lines = ask(7, 24, TaskType.SEQ_CLS).lines
    for task_type in ("Classification", "SEQ_CLS", "seq-cls", "text classification"):
        assert ask(7, 24, task_type).lines == lines


def test_an_advice_can_be_made_by_its_name():
    assert Advice(FULL).arguments is None is Advice(NOTHING).arguments
    assert Advice("LoRA").arguments["method"] == "lora"
    for name in module.NAMES:
        advice = Advice(name)
        assert advice.lines == {"method": name} and name in advice._repr_html_()
        assert advice.code == ""


GOOD = {"model_size_b": 7, "gpu_memory_gb": 24, "task_type": "generation", "num_examples": 1000}


def test_what_makes_no_sense_is_refused():
    for name, values, words in (
        ("model_size_b", (0, math.nan, True, "7"), "model_size_b="),
        ("model_size_b", (7e9,), "must be in billions"),
        ("gpu_memory_gb", (-1, math.inf), "gpu_memory_gb="),
        ("num_examples", (0, 2.5), "num_examples="),
        ("task_type", ("translation", None), "must be one of 'classification', 'SEQ_CLS'"),
        ("context", (0,), "context="),
        ("batch", ("2",), "batch="),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"recommend_peft_method.*{words}"):
                recommend_peft_method(**GOOD | {name: value})


# ------------------------------------------------------------------ the sliders


def test_the_sliders_follow():
    pytest.importorskip("ipywidgets")
    explorer = adviser(7, 24, "generation", 1000)
    bundle, _ = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert bundle["text/html"].startswith(ask(7, 24)._repr_html_())
    assert "to move: billion parameters 0.1, …, 405; GiB of the GPU 4, …" in bundle["text/plain"]
    size, gpu, task, examples, shown = explorer.widget.children
    size.value, gpu.value, examples.value, task.value = 70, 24, 100, "classification"
    assert ask(70, 24, "classification", 100)._repr_html_() in shown.value
    start = adviser(2000, 0.5, "SEQ_CLS", 10**7).widget.children[:4]  # beyond the usual values
    assert [slider.value for slider in start] == [2000, 0.5, "classification", 10**7]


def test_a_stored_output_has_no_sliders():
    """Their id is drawn anew each time, and a page without a kernel shows the table."""
    output = nbformat.v4.new_output("execute_result", data=adviser()._repr_mimebundle_()[0])
    cell = nbformat.v4.new_code_cell("adviser()", outputs=[output])
    stored = clean(nbformat.v4.new_notebook(cells=[cell]), "13_choosing").cells[0].outputs[0]
    assert set(stored.data) == {"text/plain", "text/html"}
