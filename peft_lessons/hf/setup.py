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
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import methods  # noqa: F401  each registers itself
from .._quiet import errors_only
from ..data.base_models import load_model, load_tokenizer
from ..engine import (
    fresh_beyond_head,
    is_fresh,
    method_facts,
    read_adapter,
    refuse_misfit,
    refuse_other_base,
    validate,
)
from ..engine.facts import InPeft


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
        if not isinstance(layer, nn.Linear | Conv1D) or is_fresh(model, path):
            continue
        conv = isinstance(layer, Conv1D)
        sizes = (layer.nx, layer.nf) if conv else (layer.in_features, layer.out_features)
        if rank > min(sizes):
            raise ValueError(
                f"{owner}: rank={rank} is above min(in, out) of {path!r}: that adds parameters "
                "but no freedom"
            )


# ------------------------------------------------------------------ the methods

# {name: how PEFT does it}, as every method of the course says of itself.
_ROWS: dict[str, InPeft] = {
    row.name: row for facts in method_facts().values() for row in facts.peft
}
HF_METHODS = tuple(_ROWS)


def learning_rates() -> list[dict]:
    """Return a row for each method of `HF_METHODS`: "method", the default learning rates of
    `train_with_peft` for "small models" and for "language models", and the "source" of the latter.
    Those for small models are near the best of this course's studies on its two small models.

    All learning rates are starting points: a few runs on your task must decide."""
    return [
        {"method": name, "small models": small, "language models": language, "source": row.source}
        for name, row in _ROWS.items()
        for small, language in (row.rates,)
    ]


def rate_of(model) -> float:
    """Return the default learning rate of `train_with_peft` for a model of PEFT, a starting point.

    A model that generates text counts as a language model, except tinylm. Classifiers, encoders and
    tinylm get the learning rates of small models. A method outside `HF_METHODS` gets LoRA's."""
    config, base = model.active_peft_config, model.get_base_model()
    same = [row for row in _ROWS.values() if row.config == type(config).__name__]

    def flags(row: InPeft) -> int:
        """Return how many flags the row shares with the configuration, -1 if one differs."""
        shared = [getattr(config, name, None) == value for name, value in row.flags.items()]
        return len(shared) if all(shared) else -1

    small, language = max(same or [_ROWS["lora"]], key=flags).rates
    speaks = base.can_generate() and Path(base.name_or_path).name != "tinylm"
    return language if speaks else small


def _row(method: str) -> InPeft:
    """Return the row of a method. TypeError or ValueError for a name outside `HF_METHODS`."""
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {', '.join(HF_METHODS)}, got {method!r}")
    if method in _ROWS:
        return _ROWS[method]
    for kind, facts in method_facts().items():
        if facts.only_here and facts.only_here == method.lower():
            raise ValueError(
                f"method={method!r}: PEFT does not have it; the course does: "
                f"inject(model, {kind.__name__}(...))"
            )
    raise ValueError(f"method={method!r} is unknown; known are {', '.join(HF_METHODS)}")


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

    row = _row(method)
    validate("setup_peft_training", rank=rank, seed=seed)
    checkpointing = _checkpoints(row, checkpointing)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; name a folder")
    dtype = _dtype(dtype)
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, labels, dtype=dtype, seed=seed, four_bit=row.four_bit)
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
    _refuse_wide(model, math.ceil(row.ranks * rank), method)
    if row.four_bit:
        model = _prepared(model, checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable(_NON_REENTRANT)
    config = _config(model, model_name, row, rank, labels is not None)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = peft.get_peft_model(model, config)
    if reads_last_place(model):
        tokenizer.padding_side = "left"
    model.output_dir = output_dir
    return model.train(), tokenizer


def _config(model: nn.Module, name: str, row: InPeft, rank: int, classifier: bool):
    """Return PEFT's configuration of a method for the model of this name. ValueError for virtual
    tokens beside a fresh pooler, which would not train."""
    import peft

    kind = getattr(peft, row.config)
    chosen = {**row.settings(model, rank), **row.flags}
    virtual = issubclass(kind, peft.PromptLearningConfig)
    if virtual and (beyond := fresh_beyond_head(model)):
        raise ValueError(
            f"method={row.name!r}: {beyond[0]!r} of {name!r} comes untrained, and "
            "with a prompt or a prefix PEFT trains and saves only the head: take another method "
            "or base"
        )
    if model.fresh_modules and not virtual:
        # By itself PEFT trains the head, but not a pooler that came as fresh as it.
        chosen["modules_to_save"] = list(model.fresh_modules)
    return kind(task_type="SEQ_CLS" if classifier else "CAUSAL_LM", **chosen)


def _checkpoints(row: InPeft, wanted: bool | None) -> bool:
    """Return whether gradient checkpointing is on. TypeError for a value that is not a bool,
    ValueError for a method that does not allow it."""
    if wanted is None:
        return row.four_bit
    if not isinstance(wanted, bool):
        raise TypeError(f"checkpointing must be True, False or None, got {wanted!r}")
    if wanted and not row.checkpointing:
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
    template = load_tokenizer(folder).chat_template
    if template and template != load_tokenizer(base_model_name).chat_template:
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
        complete = Path(beside) / "model"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        if target.exists():
            target.rmdir()
        shutil.move(complete, target)
