"""The drift guard: what the lessons state about PEFT, transformers, accelerate and bitsandbytes.

Each row of `ROWS` is one such statement, how to look whether the installed version keeps it, and
what must be seen. Where it does not, the test fails with a sentence that names the version and the
lesson that has to change. The rows are defaults and silent behaviour: what no error reports and no
test of equality with PEFT notices.
"""

import re
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import TinyText, batch_of, by_hand, greedy, perturb, rewrite, tiny_bert, tiny_llama
from transformers import Trainer, TrainingArguments

from peft_lessons import load_model, load_tokenizer
from tools.environment import ROOT

# ------------------------------------------------------------------ the machinery


@dataclass(frozen=True)
class Row:
    lesson: str  # its number
    states: str  # the statement, as it would follow "Lesson 02:"
    look: Callable[[], object]
    expected: object
    package: str = "peft"


def defaults(lesson: str, states: str, make: Callable, package: str = "peft", **expected) -> Row:
    """Return the row of a configuration's defaults."""

    def look():
        config = make()
        return {name: getattr(config, name) for name in expected}

    return Row(lesson, states, look, expected, package)


def complaint(row: Row) -> str | None:
    """Return a sentence on how the row is wrong in the installed versions, None if it holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = row.look()
    except Exception as error:  # a name that is gone is drift as well
        seen = f"{type(error).__name__}: {error}"
    if type(seen) is type(row.expected) and seen == row.expected:
        return None
    installed = " and ".join(f"{p} {version(p)}" for p in row.package.split("+"))
    return (
        f"Lesson {row.lesson} states: {row.states}. With {installed} that is {seen!r}, not "
        f"{row.expected!r}. Change lesson {row.lesson} and what the course builds on it, or keep "
        "the old version in pyproject.toml."
    )


# ------------------------------------------------------------------ how to look

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
ADA = dict(init_r=4, target_r=2, total_step=12, tinit=2, tfinal=4, target_modules=["q_proj"])
TASK = dict(task_type="CAUSAL_LM")
BATCH = batch_of("llama")
TEXT = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def model_with(config, base=None, name="default"):
    """Return PEFT's model, perturbed as by training."""
    torch.manual_seed(0)
    base = tiny_llama() if base is None else base
    return perturb(peft.get_peft_model(base, config, name))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**TEXT).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def said(action: Callable[[], object]) -> list[str]:
    """Return its warnings, except those between PEFT and transformers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def saved(config, change=None, **entries) -> Path:
    """Return the folder that PEFT writes of a perturbed adapter, changed."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    model_with(config).save_pretrained(folder)
    return rewrite(folder, change, **entries)


SCRATCH = tempfile.TemporaryDirectory()


def opened(folder: Path | str):
    return peft.PeftModel.from_pretrained(tiny_llama(), folder)


def wrapped(model, mark: str) -> list[str]:
    """Return the modules of layer 0 with a parameter of this name, without their common path."""
    paths = {n.split(f".{mark}")[0] for n, _ in model.named_parameters() if f".{mark}" in n}
    return sorted(re.sub(r".*layers?\.0\.", "", path) for path in paths if ".0." in path)


def trainable(model, part: str = "") -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and part in n)


# --- lesson 02


def targets(names) -> list[str]:
    config = peft.LoraConfig(target_modules=names)
    return wrapped(peft.get_peft_model(tiny_llama(), config), "lora_A")


# --- lesson 03


def prepared() -> tuple[int, set[str], bool]:
    """Return the trainable names, the dtypes, and whether gradient checkpointing is on."""
    model = peft.prepare_model_for_kbit_training(load_model("tinylm", four_bit=True))
    dtypes = {str(p.dtype) for p in model.parameters()}
    return trainable(model), dtypes, model.is_gradient_checkpointing


# --- lesson 04


def dora_on_a_zero_row() -> bool:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    torch.nn.init.zeros_(layer[0].weight[1:2].data)
    model = peft.get_peft_model(layer, peft.LoraConfig(use_dora=True, target_modules=["0"], r=2))
    return bool(model(torch.ones(1, 4)).isnan()[0, 1])


# --- lesson 05


def added_to_the_loss(**settings) -> bool:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**ADA, **settings))
    return bool((model(**BATCH).loss - tiny_llama()(**BATCH).loss).item() > 0.1)


def arguments(**more) -> TrainingArguments:
    quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    return TrainingArguments(SCRATCH.name, use_cpu=True, **(quiet | more))


def trained_by_trainer(model, rows, size: int, **more) -> list[dict]:
    """Train, and return what Trainer logs."""
    settings = arguments(per_device_train_batch_size=size, **more)
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def pruned_by_the_trainer() -> bool:
    """Return whether fewer triplets are left than at the start, after a whole schedule."""
    model = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**ADA, **TASK))
    rows = [{"input_ids": ids, "labels": ids} for ids in TinyText().ids]
    trained_by_trainer(model, rows, 4, max_steps=12, learning_rate=1e-2)
    left = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n)
    return left < 2 * ADA["init_r"]


def trained_by_hand(steps: int):
    """Train with a schedule that prunes at steps 4, 6 and 8, at step 8 for good."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**ADA | {"deltaT": 2}, **TASK)
    model = peft.get_peft_model(tiny_llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(1, steps + 1):
        model(**BATCH).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def off_after_loading(model) -> float:
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    model.save_pretrained(folder)
    return apart(logits(opened(folder)), logits(model))


# --- lesson 07


def unmerged_zero() -> bool:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(tiny_llama(), config)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.ia3_l["default"].data[0] = 0.0
    model.merge_adapter()
    model.unmerge_adapter()
    return bool((layer.base_layer.weight[0] == 0).all())


# --- lessons 08 and 09

SOFT = {
    "prefix": peft.PrefixTuningConfig,
    "prompt": peft.PromptTuningConfig,
    "P-tuning": partial(peft.PromptEncoderConfig, encoder_hidden_size=32),
}


def soft(kind: str, seed: int):
    torch.manual_seed(seed)
    config = SOFT[kind](num_virtual_tokens=5, **TASK)
    return perturb(peft.get_peft_model(tiny_llama(seed), config))


def right_texts(kind: str) -> list[bool]:
    """Return whether `generate` gives the eight tokens of greedy decoding by plain forwards."""
    ids, models = {"input_ids": BATCH["input_ids"][:1]}, [soft(kind, seed) for seed in range(4)]
    return [torch.equal(greedy(model, ids), by_hand(model, ids)) for model in models]


# --- lesson 12


def lenient(change=None, **entries) -> dict:
    """Return the warnings of loading a changed file, and whether the model differs."""
    folder, models = saved(peft.LoraConfig(**LORA, **TASK), change=change, **entries), []
    texts = said(lambda: models.append(opened(folder)))
    written = saved(peft.LoraConfig(**LORA, **TASK))
    another = apart(logits(models[0]), logits(opened(written))) > 1e-4
    return {"warnings": len(texts), "another model": another}


def without_one(tensors):
    del tensors[min(key for key in tensors if "lora_B" in key)]


def with_one_more(tensors):
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(4, 64)


def fresh_head(task: str | None) -> bool:
    config = peft.LoraConfig(task_type=task, target_modules=["query"])
    return trainable(peft.get_peft_model(tiny_bert(), config), "classifier") > 0


@torch.no_grad()
def two_adapters():
    model = model_with(peft.LoraConfig(**LORA), name="one")
    model.add_adapter("two", peft.LoraConfig(**LORA))
    model.set_adapter("two")
    for parameter in model.parameters():  # by other numbers than the first
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def weighted(kind: str, *shares: float, **more) -> tuple[int, float]:
    """Return the rank of a combination, and its relative distance from the weighted sum."""
    model = two_adapters()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    changes = map(layer.get_delta_weight, ("one", "two"))
    wanted = sum(share * change for share, change in zip(shares, changes, strict=True))
    model.add_weighted_adapter(["one", "two"], [*shares], kind, kind, **more)
    gap = (layer.get_delta_weight(kind) - wanted).norm() / wanted.norm()
    return layer.r[kind], gap.item()


def combined(kind: str) -> tuple[int, bool]:
    """Return the rank of a combination, and whether it is the weighted sum."""
    rank, gap = weighted(kind, 0.7, 0.3)
    return rank, gap < 1e-5


def from_the_mean(kind: str) -> float:
    return weighted(kind, 0.5, 0.5, density=1.0)[1]


def experts_reached(family: str) -> dict:
    """Return whether "all-linear" reaches a mixture's experts, and how many warnings name them."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    kinds = {"qwen3_moe": dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
             "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2)}  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **sizes, **heads, **kinds[family])
    base, made = transformers.AutoModelForCausalLM.from_config(config), []
    lora = peft.LoraConfig(r=2, target_modules="all-linear", **TASK)
    texts = said(lambda: made.append(peft.get_peft_model(base, lora)))
    reached = any("experts" in name for name in made[0].targeted_parameter_names)
    return {"reached": reached, "warned": any("expert" in text for text in texts)}


def dora_as_lora() -> bool:
    """Return whether a DoRA converted to a LoRA of full rank computes what the DoRA does."""
    model = model_with(peft.LoraConfig(**LORA, **TASK, use_dora=True))
    with tempfile.TemporaryDirectory() as folder:
        peft.tuners.lora.save_as_lora(folder, model, 32)
        return apart(logits(opened(folder)), logits(model)) < 1e-3


def types_of_a_half(**options) -> tuple[str, str]:
    """Return the types of a factor and of a copied module in a bfloat16 base."""
    config = peft.LoraConfig(**LORA, **TASK, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama().bfloat16(), config, **options)
    kinds = {n: str(p.dtype) for n, p in model.named_parameters() if p.requires_grad}
    return tuple(
        next(kind for name, kind in kinds.items() if part in name)
        for part in ("lora_A", "modules_to_save")
    )


def labels_of_the_padding_token() -> list[int]:
    tokenizer = load_tokenizer("tinylm")
    ids = [5, 6, tokenizer.pad_token_id]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return collate([{"input_ids": ids}])["labels"][0].tolist()


def one_of_two_merged() -> dict:
    model = two_adapters()
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    texts = said(lambda: model.merge_adapter(["one"]))
    partly = logits(model)
    model.unmerge_adapter()
    model.set_adapter("one")
    alone = apart(partly, logits(model)) < 1e-4 < apart(partly, both)
    return {"only the merged one": alone, "warnings": len(texts)}


def merged_nan(**options) -> str:
    model = model_with(peft.LoraConfig(**LORA))
    factor = next(p for n, p in model.named_parameters() if "lora_B" in n)
    torch.nn.init.constant_(factor, torch.nan)
    return refusal(lambda: model.merge_and_unload(**options))


def merged_tied(**settings) -> str:
    """Merge LoRA on the head of a tied model, and return what it changes."""
    base = tiny_llama(tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], **settings)
    model = model_with(config, deepcopy(base))
    change = model.base_model.model.lm_head.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    times = ((merged.lm_head.weight - base.lm_head.weight) / change).median().round().int().item()
    return f"{'tied' if tied else 'untied'}, the change {times} times in it"


def counted_by_a_classifier() -> float:
    """Return how much larger a step's loss is reported with two accumulated parts."""
    rows = [{"input_ids": torch.arange(3, 9), "labels": k % 2} for k in range(4)]
    first, logged = [], dict(max_steps=1, logging_steps=1, logging_strategy="steps")
    for size, parts in ((4, 1), (2, 2)):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        logs = trained_by_trainer(model, rows, size, gradient_accumulation_steps=parts, **logged)
        first.append(logs[0]["loss"])
    return round(first[1] / first[0], 2)


TRAINER = "transformers+accelerate"
SOFT_STATEMENT = (
    "`generate` with {} in it writes what plain forwards choose, eight tokens, four seeds (later "
    "transformers broke this under peft 0.21, which is why pyproject.toml pins transformers<5.24)"
)

ROWS = [
    defaults("02", "what PEFT's config of a LoRA says if it is not told otherwise", peft.LoraConfig,
             r=8, lora_alpha=8, lora_dropout=0.0, bias="none", use_rslora=False,
             init_lora_weights=True, use_dora=False, fan_in_fan_out=False, target_modules=None,
             modules_to_save=None, task_type=None, inference_mode=False),
    Row("02", "PEFT's default targets in a Llama are q_proj and v_proj", lambda: targets(None),
        ["self_attn.q_proj", "self_attn.v_proj"]),
    Row("02", "PEFT's default targets in a BERT are query and value",
        lambda: wrapped(peft.get_peft_model(tiny_bert(), peft.LoraConfig()), "lora_A"),
        ["attention.self.query", "attention.self.value"]),
    Row("02", "of several names one may match nothing, without a word",
        lambda: targets(["q_proj", "no_such"]), ["self_attn.q_proj"]),
    defaults("03", "BitsAndBytesConfig(load_in_4bit=True) is FP4, without double quantisation, and "
             "computes in float32", lambda: transformers.BitsAndBytesConfig(load_in_4bit=True),
             "transformers", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False,
             bnb_4bit_compute_dtype=torch.float32),
    Row("03", "prepare_model_for_kbit_training freezes all, takes the rest to float32 and switches "
        "gradient checkpointing on", prepared,
        (0, {"torch.float32", "torch.uint8"}, True), "peft+transformers"),
    Row("04", "PEFT's DoRA answers NaN in the output of a row of zeros", dora_on_a_zero_row, True),
    defaults("05", "what PEFT's config of an AdaLoRA says if it is not told otherwise",
             lambda: peft.AdaLoraConfig(total_step=1), init_r=12, target_r=8, lora_alpha=8, tinit=0,
             tfinal=0, deltaT=1, beta1=0.85, beta2=0.85, orth_reg_weight=0.5, rank_pattern=None),
    Row("05", "without task_type PEFT never adds the regulariser",
        lambda: {t: added_to_the_loss(task_type=t) for t in (None, "CAUSAL_LM")},
        {None: False, "CAUSAL_LM": True}),
    Row("05", "transformers' Trainer does not call update_and_allocate", pruned_by_the_trainer,
        False, TRAINER),
    Row("05", "with PEFT, what is saved between two prunings is another model, at one it is right",
        lambda: [off_after_loading(trained_by_hand(steps)) < 1e-5 for steps in (6, 7)],
        [True, False]),
    Row("07", "PEFT divides by l + 1e-8 and refuses nothing: an entry of zero loses its row",
        unmerged_zero, True),
    *(Row(lesson, SOFT_STATEMENT.format(kind), partial(right_texts, kind), [True] * 4,
          "peft+transformers")
      for lesson, kind in (("08", "prompt"), ("09", "prefix"), ("12", "P-tuning"))),
    Row("12", "PEFT accepts another lora_alpha or a surplus key in a file, and warns of a "
        "missing key",
        lambda: [lenient(lora_alpha=32), lenient(with_one_more), lenient(without_one)],
        [{"warnings": 0, "another model": True}, {"warnings": 0, "another model": False},
         {"warnings": 1, "another model": True}]),
    Row("12", "a loaded adapter is frozen",
        lambda: trainable(opened(saved(peft.LoraConfig(**LORA, **TASK)))), 0),
    Row("12", "a new head trains with task_type and stays frozen without",
        lambda: {t: fresh_head(t) for t in (None, "SEQ_CLS")}, {None: False, "SEQ_CLS": True}),
    Row("12", "a linear combination is not the weighted sum, cat is, at the sum of the ranks",
        lambda: {kind: combined(kind) for kind in ("linear", "svd", "cat")},
        {"linear": (4, False), "svd": (4, False), "cat": (8, True)}),
    Row("12", "ties acts on the factors, and is further from the mean of two changes than "
        "ties_svd, which acts on the changes",
        lambda: from_the_mean("ties") > max(0.3, from_the_mean("ties_svd")), True),
    Row("12", "all-linear reaches the experts of Qwen3-MoE and, without a warning, none of gpt-oss",
        lambda: [experts_reached(family) for family in ("qwen3_moe", "gpt_oss")],
        [{"reached": True, "warned": False}, {"reached": False, "warned": False}],
        "peft+transformers"),
    Row("12", "save_as_lora takes a DoRA and drops its magnitudes", dora_as_lora, False),
    Row("12", "what PEFT adds to a bfloat16 base is float32 by default; a copied head is not",
        lambda: [types_of_a_half(), types_of_a_half(autocast_adapter_dtype=False)],
        [("torch.float32", "torch.bfloat16"), ("torch.bfloat16", "torch.bfloat16")]),
    Row("12", "DataCollatorForLanguageModeling gives every padding token the label -100",
        labels_of_the_padding_token, [5, 6, -100], "transformers"),
    defaults("12", "what TRL's SFTConfig says if it is not told otherwise",
             lambda: trl.SFTConfig("unused", use_cpu=True, bf16=None), "trl", learning_rate=2e-5,
             bf16=True, gradient_checkpointing=True, max_length=1024, packing=False,
             completion_only_loss=None, assistant_only_loss=False),
    Row("12", "one of two active adapters merged: the other is left out silently",
        one_of_two_merged, {"only the merged one": True, "warnings": 0}),
    Row("12", "merge_and_unload takes NaN, unless safe_merge=True",
        lambda: [merged_nan(), merged_nan(safe_merge=True)], ["nothing", "ValueError"]),
    Row("12", "merging a tied head changes the embedding too", merged_tied,
        "tied, the change 1 times in it"),
    Row("12", "with ensure_weight_tying merging adds the change twice",
        lambda: merged_tied(ensure_weight_tying=True), "tied, the change 2 times in it"),
    Row("12", "a share of warmup_steps is one of all steps",
        lambda: arguments(warmup_steps=0.1).get_warmup_steps(200), 20, TRAINER),
    Row("12", "a classifier's loss is counted once for each part of a step",
        counted_by_a_classifier, 2.0, TRAINER),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.lesson} {row.states[:60]}")
def test_the_installed_versions_are_as_the_lessons_say(row):
    wrong = complaint(row)
    assert wrong is None, wrong


# ------------------------------------------------------------------ that the guard can fail


def test_what_is_another_gone_or_of_another_type_is_said_with_version_and_lesson():
    wrong = complaint(Row("02", "a LoRA has rank 8 by default", lambda: 16, 8))
    assert wrong.startswith("Lesson 02 states: a LoRA has rank 8 by default. With peft ")
    assert f"peft {version('peft')} that is 16, not 8" in wrong
    gone = Row("12", "PEFT has this", lambda: peft.no_such_function, None)
    assert "AttributeError" in complaint(gone)
    assert complaint(Row("12", "a flag", lambda: 1, True)) is not None  # although 1 == True


# ------------------------------------------------------------------ the pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {pin.name: pin.specifier for pin in map(Requirement, PROJECT["dependencies"])}


def test_what_is_installed_lies_within_the_pins():
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        assert PINS[package].contains(Version(version(package)).base_version), (
            f"{package} {version(package)} is installed, pyproject.toml asks for {PINS[package]}: "
            "the rows above were checked within the pins only"
        )


def test_the_pin_is_the_one_that_code_and_lessons_name():
    """From transformers 5.24 on, generate goes past the prompts and prefixes of peft 0.21."""
    assert PINS["transformers"].contains("5.23.9") and not PINS["transformers"].contains("5.24")
    assert not PINS["peft"].contains("0.22.0"), (
        "With a newer peft, install transformers 5.24 beside it and run this file: if the rows on "
        "`generate` hold, lift the pin in pyproject.toml and environment.yml, the refusal in "
        "peft_lessons/engine/virtual_tokens.py and the traps of lessons 08 and 09."
    )
    rules = (ROOT / "peft_lessons" / "engine" / "virtual_tokens.py").read_text(encoding="utf-8")
    assert "transformers>=5.20,<5.24" in rules
    for lesson in ("08_prompt_tuning", "09_prefix_tuning"):
        text = (ROOT / "notebooks" / f"{lesson}.ipynb").read_text(encoding="utf-8")
        assert "5.24" in text, f"lesson {lesson} does not say from which version it is wrong"
