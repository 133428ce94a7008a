"""Set up a training with Hugging Face PEFT, and merge its adapters.

peft and what it pulls in take seconds to import, so they are imported where they are needed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._quiet import errors_only
from ..data.base_models import load_model, load_tokenizer
from ..engine import read_adapter, refuse_misfit, refuse_other_base, validate

_PREFIX = {"num_virtual_tokens": 16}
# Rows of the vocabulary: PEFT's default draws numbers fifty times as large as they are.
_PROMPT = _PREFIX | {"prompt_tuning_init": "SAMPLE_VOCAB"}


def setup_qlora(model_name: str, rank: int = 64):
    """Load a causal model in 4 bits and put PEFT's LoRA on all linear layers but the head.

    `model_name` is a bundled name, a folder or a Hub id. NF4 with double quantisation, on a GPU if
    there is one, else on the CPU; α is 16, as in the paper (Dettmers et al. 2023), gradient
    checkpointing is on. Prints the number of trainable parameters, where a 4-bit weight counts as
    one. Returns the PEFT model in train mode. Raises ValueError for a rank below 1 or above a
    layer's width, a model that does not generate text, and as `load_model`."""
    from peft import LoraConfig, get_peft_model

    validate("setup_qlora", rank=rank)
    model = load_model(model_name, four_bit=True)
    if not model.can_generate():
        raise ValueError(
            f"setup_qlora: {model_name!r} is not a causal language model; try 'tinylm'"
        )
    _refuse_wide(model, rank, "setup_qlora")
    model = _prepared(model)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"
    )
    model = get_peft_model(model, config).train()
    model.print_trainable_parameters()
    return model


# The reentrant kind gives a block no gradient if its inputs need none, as those of a frozen base.
_NON_REENTRANT = {"use_reentrant": False}


def _prepared(model, checkpointing: bool = True):
    """Make a 4-bit model ready to train: all else in float32, gradient checkpointing if asked."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, checkpointing, _NON_REENTRANT)


def _refuse_wide(model: nn.Module, rank: int, owner: str) -> None:
    for path, layer in model.named_modules():
        # A head is narrower than any rank, and no method of low rank touches it.
        if not isinstance(layer, nn.Linear | Conv1D) or _fresh(model, path):
            continue
        conv = isinstance(layer, Conv1D)
        sizes = (layer.nx, layer.nf) if conv else (layer.in_features, layer.out_features)
        if rank > min(sizes):
            raise ValueError(
                f"{owner}: rank={rank} is above min(in, out) of {path!r}: that adds parameters "
                "but no freedom"
            )


def _fresh(model: nn.Module, path: str) -> bool:
    """Return whether a module is newly initialised, or part of such a module (RoBERTa's head)."""
    return any(f"{path}.".startswith(f"{top}.") for top in model.fresh_modules)


# ------------------------------------------------------------------ the configs

# Each takes the model and a rank, and gives the settings.
_Settings = Callable[[nn.Module, int], dict]


def _lora(model: nn.Module, rank: int) -> dict:
    targets = "all-linear"  # but the head, which PEFT knows by its name
    heads = map(model.get_submodule, model.fresh_modules)
    if _beyond(model) or not all(isinstance(head, nn.Linear) for head in heads):
        layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [path for path in layers if not _fresh(model, path)]
    return {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "fan_in_fan_out": _transposed(model),
    }


def _transposed(model: nn.Module) -> bool:
    """Return whether layers store their weights as GPT-2's do; PEFT would find out and warn."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _beyond(model: nn.Module) -> list[str]:
    """Return the new modules that PEFT does not treat as a head: a pooler, a head's first layer."""
    return [path for path in model.fresh_modules if path not in ("classifier", "score")]


def _adalora(model: nn.Module, rank: int) -> dict:
    settings = _lora(model, rank) | {"init_r": math.ceil(1.5 * rank), "target_r": rank}
    # "r" is LoRA's. The schedule is a stand-in: train_with_peft fits it to the run's steps.
    return {k: v for k, v in settings.items() if k != "r"} | {"total_step": 1000}


def _ia3(model: nn.Module, rank: int) -> dict:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    if kind in ("bert", "roberta", "deberta-v2"):
        # PEFT's own "output.dense" also takes the attention's output, which (IA)³ leaves alone.
        second = r".*layer\.\d+\.output\.dense"
        return {
            "target_modules": rf".*self\.(key|value)(_proj)?|{second}",
            "feedforward_modules": second,
        }
    if kind not in TARGETS:
        raise ValueError(
            f"method='ia3': where its three vectors go in a model of type {kind!r} is not known; "
            "give a config: IA3Config(target_modules=[keys, values, the second feed-forward "
            "matrix], feedforward_modules=[the latter])"
        )
    second, targets = FEED_FORWARD[kind], TARGETS[kind]
    ends = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if {"k_proj", "v_proj"} <= ends:  # for several families PEFT names the query, too
        targets = ["k_proj", "v_proj", *second]
    return {
        "target_modules": targets,
        "feedforward_modules": second,
        "fan_in_fan_out": _transposed(model),
    }


def _norms(model: nn.Module, rank: int) -> dict:
    paths = [path for path, module in model.named_modules() if "Norm" in type(module).__name__]
    if not paths:
        raise ValueError(f"method='norms': {type(model).__name__} has no norm to train")
    return {"target_modules": sorted({path.rpartition(".")[2] for path in paths})}


# {method: (PEFT's config class, its settings)}
_CONFIGS: dict[str, tuple[str, _Settings]] = {
    "lora": ("LoraConfig", _lora),
    "rslora": ("LoraConfig", lambda *a: _lora(*a) | {"use_rslora": True}),
    "dora": ("LoraConfig", lambda *a: _lora(*a) | {"use_dora": True}),
    "qlora": ("LoraConfig", _lora),
    "adalora": ("AdaLoraConfig", _adalora),
    "ia3": ("IA3Config", _ia3),
    "prefix": ("PrefixTuningConfig", lambda *_: _PREFIX),
    "prompt": ("PromptTuningConfig", lambda *_: _PROMPT),
    "norms": ("LNTuningConfig", _norms),
}
HF_METHODS = tuple(_CONFIGS)

_TRL = "TRL's documentation, PEFT Integration"
_COMPARISON = "PEFT's method_comparison (MetaMathQA, Llama-3.2-3B)"
# {method: (learning rate for small models, for language models, source of the latter)}. The small
# ones are near the best of this course's studies on its two small models.
_RATES: dict[str, tuple[float, float, str]] = {
    "lora": (1e-3, 2e-4, f"{_TRL}: 2e-4 for SFT; Unsloth's hyperparameters guide: 2e-4"),
    "rslora": (1e-3, 1e-4, f"{_COMPARISON}, lora/llama-3.2-3B-rank64-rslora: 1e-4"),
    "dora": (1e-3, 1e-4, f"{_COMPARISON}, lora/llama-3.2-3B-rank32-dora: 1e-4"),
    "qlora": (1e-3, 2e-4, f"{_TRL}: 2e-4 for SFT; Unsloth's hyperparameters guide: 2e-4"),
    "adalora": (3e-3, 1e-3, "PEFT's example peft_adalora_seq2seq.py (BART-base): 1e-3"),
    "ia3": (3e-2, 5e-3, f"{_COMPARISON}, ia3/llama-3.2-3B-all-attn-5k-lr0.005: 5e-3"),
    "prefix": (3e-2, 1e-3, f"{_COMPARISON}, prefixtuning/llama-3.2-3B-lr_0.001: 1e-3, 5,000 steps"),
    "prompt": (1e-1, 2e-2, f"{_TRL}: 1e-2 to 3e-2, 2e-2 in its example"),
    "norms": (1e-2, 1e-3, "no published default: start with a sweep"),
}


def learning_rates() -> list[dict]:
    """Return a row for each method of `HF_METHODS`: "method", the default learning rates of
    `train_with_peft` for "small models" and for "language models", and the "source" of the latter.

    All learning rates are starting points: a few runs on your task must decide."""
    return [
        {"method": method, "small models": small, "language models": language, "source": source}
        for method, (small, language, source) in _RATES.items()
    ]


def rate_of(model) -> float:
    """Return the default learning rate of `train_with_peft` for a model of PEFT, a starting point.

    A model that generates text counts as a language model, except tinylm. Classifiers, encoders and
    tinylm get the learning rates of small models. A method outside `HF_METHODS` gets LoRA's."""
    config, base = model.active_peft_config, model.get_base_model()
    kind = type(config).__name__
    method = next((m for m, (name, _) in _CONFIGS.items() if name == kind), "lora")
    for variant, flag in {"rslora": "use_rslora", "dora": "use_dora"}.items():
        method = variant if getattr(config, flag, False) else method
    small, language, _ = _RATES[method]
    speaks = base.can_generate() and Path(base.name_or_path).name != "tinylm"
    return language if speaks else small


_OURS_ALONE = {
    "adapter": "BottleneckAdapter",
    "bitfit": "BitFit",
    "partial": "PartialFineTuning",
    "diff": "DiffPruning",
    "mixed": "MixAndMatch",
}


def _known(method: str) -> str:
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {', '.join(HF_METHODS)}, got {method!r}")
    if method.lower() in _OURS_ALONE:
        raise ValueError(
            f"method={method!r}: PEFT does not have it; the course does: "
            f"inject(model, {_OURS_ALONE[method.lower()]}(...))"
        )
    if method not in HF_METHODS:
        raise ValueError(f"method={method!r} is unknown; known are {', '.join(HF_METHODS)}")
    return method


# ------------------------------------------------------------------ set up


def setup_peft_training(
    model_name: str,
    method: str = "lora",
    output_dir: str | os.PathLike = "./output",
    *,
    labels: int | None = None,
    rank: int = 8,
    dtype: torch.dtype | None = None,
    checkpointing: bool | None = None,
    seed: int = 0,
):
    """Load a model with its tokenizer and put one of PEFT's methods into it, ready to train.

    Args:
        model_name: a bundled name, a local folder or a Hub id.
        method: one of `HF_METHODS`. Its targets depend on the architecture: all linear layers but
            the head for LoRA and its variants; keys, values and the second feed-forward matrix for
            (IA)³ (queries too if one layer computes all three); prompts and prefixes precede the
            text.
        output_dir: the folder where `train_with_peft` saves its checkpoints and the adapter.
        labels: None for a model that generates text, n for a classifier with n classes, whose new
            head, and new pooler if it has one, is trained and saved too.
        rank: of the low-rank methods; α is twice as large.
        dtype: of the base. None is bfloat16 on a GPU that has it, else float32. Adapters are in
            float32, PEFT's default (`autocast_adapter_dtype=True`); norms have the base's dtype.
        checkpointing: whether each block is computed again in the backward pass (gradient
            checkpointing), which saves the memory of its activations and costs about a third more
            time. None is True for qlora, False for all other methods.
        seed: decides the head and what the method draws.

    Returns (model in train mode, tokenizer with a padding token; it pads on the left for a prompt
    before a decoder's classifier, which reads the last position).
    Raises TypeError for a `checkpointing` that is not a bool; ValueError for an unknown method
    (lists the known), checkpointing with a prefix, an encoder without `labels`, a model with an
    encoder and a decoder, a rank below 1 or above a layer's width, float16 on a CPU, an
    `output_dir` that is a file, a tokenizer with neither padding nor end token, a prompt or prefix
    for a base with a fresh pooler, and as `load_model`."""
    import peft

    kind, settings = _CONFIGS[_known(method)]
    validate("setup_peft_training", rank=rank, seed=seed)
    checkpointing = _checkpoints(method, checkpointing)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; name a folder")
    dtype = _dtype(dtype)
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, labels, dtype=dtype, seed=seed, four_bit=method == "qlora")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{model_name!r} has an encoder and a decoder, and here one text is trained on: take a "
            "model with one of the two, or PEFT with task_type='SEQ_2_SEQ_LM'"
        )
    if labels is None and not model.can_generate():
        raise ValueError(
            f"{model_name!r} is an encoder, which does not generate text: labels=2 makes it a "
            "classifier of two classes"
        )
    # A decoder's classifier finds the last real token by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    if kind in ("LoraConfig", "AdaLoraConfig"):
        _refuse_wide(model, math.ceil(1.5 * rank) if method == "adalora" else rank, method)
    if method == "qlora":
        model = _prepared(model, checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable(_NON_REENTRANT)
    task = "CAUSAL_LM" if labels is None else "SEQ_CLS"
    chosen = settings(model, rank)
    stands_before = kind in ("PrefixTuningConfig", "PromptTuningConfig")
    if stands_before and _beyond(model):
        raise ValueError(
            f"method={method!r}: {_beyond(model)[0]!r} of {model_name!r} comes untrained, and "
            "with a prompt or a prefix PEFT trains and saves only the head: take another method "
            "or base"
        )
    if model.fresh_modules and not stands_before:
        # By itself PEFT trains the head, but not a pooler that came as fresh as it.
        chosen["modules_to_save"] = list(model.fresh_modules)
    config = getattr(peft, kind)(task_type=task, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = peft.get_peft_model(model, config)
    if reads_last_place(model):
        tokenizer.padding_side = "left"
    model.output_dir = output_dir
    return model.train(), tokenizer


def _checkpoints(method: str, wanted: bool | None) -> bool:
    """Return whether gradient checkpointing is on. TypeError for a value that is not a bool,
    ValueError for a prefix."""
    if wanted is None:
        return method == "qlora"
    if not isinstance(wanted, bool):
        raise TypeError(f"checkpointing must be True, False or None, got {wanted!r}")
    if wanted and method == "prefix":
        raise ValueError(
            "checkpointing=True: gradient checkpointing switches off the cache, which holds the "
            "prefix: set checkpointing=False, or take method='prompt'"
        )
    return wanted


def classifies(config) -> bool:
    """Return whether a PEFT config belongs to a classifier's adapter."""
    return "SEQ_CLS" in str(config.task_type)


def reads_last_place(model) -> bool:
    """Return whether the model is a decoder's classifier with a prompt: it gets embeddings, not
    ids, and so cannot tell padding from the last token."""
    config = model.active_peft_config
    return "PROMPT_TUNING" in str(config.peft_type) and hasattr(model.get_base_model(), "score")


def _dtype(dtype: torch.dtype | None) -> torch.dtype:
    gpu = torch.cuda.is_available()
    if dtype is None:
        return torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
    if dtype == torch.float16 and not gpu:
        raise ValueError("dtype=torch.float16 needs a GPU to train: take float32, or bfloat16")
    return dtype


# ------------------------------------------------------------------ merge


def load_and_merge_adapter(
    base_model_name: str,
    adapter_path: str | os.PathLike,
    *,
    save_to: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    four_bit: bool = False,
    check_base: bool = True,
):
    """Load a base, merge an adapter into its weights, and return the plain model without PEFT.

    Args:
        base_model_name: named as for `load_model`; a classifier's head comes from the adapter.
        save_to: a new or empty folder for the model and its tokenizer; it is filled in one step.
        dtype: of the merged model.
        four_bit: True for an adapter that was trained on a base in 4 bits. It is merged into the
            dequantised weights, with which it was trained.
        check_base: False accepts an adapter of a base with another name or chat template.

    The tokenizer is the one that was saved with the adapter, otherwise the base's.

    Raises FileNotFoundError for a missing file; ValueError for a broken one, another base or chat
    template, keys that do not fit the base, NaN in the adapter or after merging, a method that
    cannot be merged (prompts, prefixes), a `save_to` that is not empty; and as `load_model`."""
    import peft

    adapter_path = Path(adapter_path)
    entries, tensors, header = read_adapter(adapter_path)
    kind = entries["peft_type"]
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"peft_type {kind!r} is not PEFT's: load_adapter(model, folder) and merge(model) of "
            "the course do it"
        )
    config = peft.PeftConfig.from_pretrained(str(adapter_path))
    if config.is_prompt_learning:
        raise ValueError(
            f"a {kind} adapter is placed before the text and changes no weight, so it cannot be "
            "merged. Load it with PeftModel.from_pretrained(base, folder)"
        )
    target = None if save_to is None else _new_folder(save_to)
    labels = _labels(config, tensors)
    base = load_model(base_model_name, labels, dtype=dtype, four_bit=four_bit)
    if labels is not None:
        base.config.pad_token_id = load_tokenizer(base_model_name).pad_token_id
    if check_base:
        refuse_other_base(base, entries, header)
        _refuse_other_template(base_model_name, adapter_path)
    if four_bit:
        with errors_only("transformers.integrations.bitsandbytes"):  # it reports the dtype
            base = base.dequantize()
    model = _opened(base, adapter_path, tensors)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(f"a {kind} adapter cannot be merged: PEFT does not support it")
    # PEFT cannot take a head of several layers out of its wrapper, and with norms takes none out.
    # Not safe_merge: it doesn't look at every method's weights.
    merged = _unwrapped(model).merge_and_unload()
    for path, weight in merged.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"merging gave NaN or infinite weights in {dtype}, first in {path!r}")
    if target is not None:
        owner = adapter_path if _has_tokenizer(adapter_path) else base_model_name
        _save_whole(merged.eval(), load_tokenizer(owner), target)
    return merged.eval()


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _refuse_other_template(base_model_name: str, folder: Path) -> None:
    """Raise ValueError if the adapter was saved with another chat template than the base has."""
    if not _has_tokenizer(folder):
        return
    theirs = load_tokenizer(folder).chat_template
    if theirs and theirs != load_tokenizer(base_model_name).chat_template:
        raise ValueError(
            f"the adapter in {str(folder)!r} was trained with another chat template than "
            f"{base_model_name!r} has: in the base's template its answers would be worse. Name the "
            "base that it was trained on, or take check_base=False, which keeps the adapter's "
            "template"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Replace PEFT's wrappers of fully trained modules by these modules, in place."""
    from peft.utils import ModulesToSaveWrapper

    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapter]
            model.set_submodule(path, trained)
    return model


def _labels(config, tensors: dict[str, torch.Tensor]) -> int | None:
    """Return the number of classes of the adapter's head, None if it is not a classifier's."""
    if not classifies(config):
        return None
    heads = [
        t.shape[0]
        for key, t in tensors.items()
        if re.search(r"\.(score|classifier|classifier\.out_proj)\.weight$", key)
    ]
    if len(heads) != 1:
        raise ValueError(
            "the adapter is a classifier's, but its file holds no head: it was saved without "
            "task_type='SEQ_CLS' or modules_to_save"
        )
    return heads[0]


def _opened(base: nn.Module, folder: Path, tensors: dict[str, torch.Tensor]):
    """Load the adapter as PEFT's model, and check its keys: PEFT ignores surplus keys silently."""
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # raised below
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise ValueError(f"the adapter does not fit this base: {lines[-1].strip()}") from None
        except ValueError as error:
            raise ValueError(f"the adapter does not fit this base: {error}") from None
    refuse_misfit(get_peft_model_state_dict(model), tensors)
    return model


def _new_folder(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"save_to={str(path)!r} exists and is not an empty folder: name a new one")
    return path


def _save_whole(model, tokenizer, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        whole = Path(beside) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if target.exists():
            target.rmdir()
        shutil.move(whole, target)
