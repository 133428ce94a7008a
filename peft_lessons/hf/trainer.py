"""Train a PEFT model with transformers' Trainer, on one device or on several.

Trainer provides the loop and its checkpoints. This module adds labels that ignore the padding,
AdaLoRA's allocator, and clear error messages.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback

from .._quiet import errors_only
from ..data.base_models import padded
from ..data.chat import chat_tokens, fitted, pair_tokens
from ..engine import WEIGHTS, validate
from ..engine.virtual_tokens import positions_of
from ..train.loop import TrainingDiverged, progress
from .setup import classifies, rate_of, reads_last_place

MAX_LENGTH = 256


def train_with_peft(
    model,
    tokenizer,
    train_dataset,
    *,
    eval_dataset=None,
    output_dir: str | os.PathLike | None = None,
    epochs: float = 3,
    steps: int | None = None,
    batch_size: int = 8,
    learning_rate: float | None = None,
    max_length: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    seed: int = 0,
    show: bool = True,
) -> dict:
    """Train a PEFT model, save adapter and tokenizer, and return measurements.

    Args:
        model: a PEFT model, as from `setup_peft_training`.
        tokenizer: the model's own. It gets its end token for padding if it has none.
        train_dataset, eval_dataset: any finite collection of texts, or of dicts with "text" or
            "input_ids"; for a classifier with "label" or "labels" too. Of running text each token
            is the label of the one before it, padding of none. What an "attention_mask" hides
            is left out. Or conversations in TRL's formats: {"prompt": [message, ...],
            "completion": [message, ...]} or {"messages": [message, ...]}, a message being
            {"role": ..., "content": ...}. They go through the tokenizer's chat template, and only
            the answers of the assistant are learned, each with its end token; answers in a prompt
            are not.
        output_dir: for checkpoints and the adapter; None is the folder given at set-up.
        epochs, steps: how long; `steps` counts where both are given.
        batch_size: texts a step, over all devices together.
        learning_rate: falls to 0 after a rise over a tenth of the steps; None is a starting point
            for the method and the kind of model, see `setup.learning_rates`.
        max_length: longer texts are cut, but an answer of a conversation is never cut; None is 256,
            or what the model has positions for.
        checkpoint_every: steps between checkpoints, the last one at the end; None for none.
        resume: go on from the newest complete checkpoint in `output_dir`; without one, begin. Give
            the same model, data and settings again: Trainer does not compare them.
        seed: of the order of texts and of dropout.
        show: False prints nothing.

    Returns a dict: "steps", "examples", "trainable", "loss" (of each step), "seconds",
    "adapter" (the folder); with an eval_dataset "eval_loss", and of a classifier "eval_accuracy".
    The adapter is complete in its folder, written by one process, before it returns. The global
    random states stay as they are.

    Raises TypeError for a model that is not PEFT's; ValueError if nothing in it trains, it is
    merged or holds several adapters, for an empty data set, texts without a token, tokens or labels
    that are missing or out of range, a conversation without an answer, with an answer that is empty
    or longer than `max_length` allows, or with a role that is unknown, a tokenizer without a chat
    template, a batch size that the processes cannot share, a tokenizer that
    cannot pad or pads on the wrong side, an `output_dir` that is a file or holds a finished run, or
    checkpoints without `resume`, and for `resume` with a method that Trainer cannot resume
    (AdaLoRA, P-tuning, a prefix with an MLP); TrainingDiverged for a loss that is NaN or
    infinite."""
    owner = "train_with_peft"
    _refuse_model(model, owner)
    rate = rate_of(model) if learning_rate is None else learning_rate
    validate(owner, batch_size=batch_size, lr=rate, epochs=epochs, seed=seed)
    counts = {"steps": steps, "checkpoint_every": checkpoint_every}
    validate(owner, **{name: value for name, value in counts.items() if value is not None})
    tokenizer = padded(tokenizer)
    if reads_last_place(model) and tokenizer.padding_side != "left":
        raise ValueError(
            f"{owner}: with a prompt a decoder's classifier reads the last position, and cannot "
            "see that it is padding: set tokenizer.padding_side = 'left'"
        )
    if resume:
        _refuse_resume(model.active_peft_config)
    folder = Path(output_dir or getattr(model, "output_dir", None) or "./output")
    length = _length(model, max_length)
    train = prepare(model, tokenizer, train_dataset, length, "train_dataset")
    held_out = None
    if eval_dataset is not None:
        held_out = prepare(model, tokenizer, eval_dataset, length, "eval_dataset")
    steps = steps or math.ceil(epochs * math.ceil(len(train) / batch_size))
    checkpoint = _checkpoint(folder, resume, steps)
    arguments = _arguments(model, folder, steps, batch_size, rate, checkpoint_every, seed)
    with _random_states_kept():
        trainer = PeftTrainer(
            model,
            arguments,
            _collator(model, tokenizer),
            train,
            held_out,
            processing_class=tokenizer,
            compute_metrics=_accuracy if classifies(model.active_peft_config) else None,
            callbacks=[_Log(show and arguments.process_index == 0)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return _run(trainer, checkpoint, folder)


def _refuse_model(model, owner: str) -> None:
    """Raise TypeError for a model that is not PEFT's, ValueError for one that cannot be trained."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{owner}: model is a {type(model).__name__}, not PEFT's; first: "
            "model, tokenizer = setup_peft_training(name, method)"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{owner}: nothing trains; a loaded adapter is frozen unless it was loaded "
            "with is_trainable=True"
        )
    if list(model.peft_config) != ["default"]:
        raise ValueError(
            f"{owner}: the model holds the adapters {', '.join(map(repr, model.peft_config))}, but "
            "here one is trained and saved, named 'default'"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(f"{owner}: the adapter is merged; model.unmerge_adapter() first")


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block: Trainer seeds them."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


# ------------------------------------------------------------------ the data


def _length(model, wanted: int | None) -> int:
    """Return the maximal length of a text: virtual tokens take positions too."""
    positions = positions_of(model.get_base_model())
    virtual = getattr(model.active_peft_config, "num_virtual_tokens", None) or 0
    room = math.inf if positions is None else positions - virtual
    if wanted is None:
        return min(MAX_LENGTH, room)
    validate("train_with_peft", max_length=wanted)
    if wanted > room:
        raise ValueError(
            f"train_with_peft: max_length={wanted} and {virtual} virtual tokens are more than the "
            f"model's {positions} positions"
        )
    return wanted


def prepare(model, tokenizer, data: Iterable, max_length: int, name: str = "data") -> list[dict]:
    """Tokenise the examples: lists of "input_ids", "attention_mask" and "labels".

    For running text the labels are the ids, with −100 for the first token: only a prompt could
    predict it, and every method is to be trained on the same predictions. Errors as
    `train_with_peft`."""
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, str | dict) or not (indexed or isinstance(data, Iterable)):
        raise ValueError(f"{name} must be a collection of texts or of dicts, got {data!r:.80}")
    # Torch's map-style data sets have a length and an item for each index, and need have no end.
    items = [data[i] for i in range(len(data))] if indexed else list(data)
    if not items:
        raise ValueError(f"{name} is empty: give at least one example")
    classes = model.config.num_labels if classifies(model.active_peft_config) else None
    rows = model.config.get_text_config().vocab_size
    pad = tokenizer.pad_token_id
    if pad >= rows:
        raise ValueError(
            f"the padding token {pad} has no embedding in the model's table of {rows}: take the "
            "model's own tokenizer, and pad with a token of its vocabulary"
        )
    return [
        _example(item, tokenizer, max_length, classes, rows, f"{name}[{index}]")
        for index, item in enumerate(items)
    ]


def _example(item, tokenizer, max_length: int, classes: int | None, rows: int, where: str) -> dict:
    fields = {"text": item} if isinstance(item, str) else item
    if isinstance(fields, Mapping) and {"messages", "prompt", "completion"} & fields.keys():
        fields = _conversation(fields, tokenizer, max_length, classes, where)
    if not isinstance(fields, Mapping) or not {"text", "input_ids"} & fields.keys():
        raise ValueError(
            f'{where} has neither "text" nor "input_ids", "messages", or "prompt" and "completion":'
            f" {item!r:.80}"
        )
    label, mask = fields.get("labels", fields.get("label")), []
    if "input_ids" in fields:
        ids = _integers(fields["input_ids"], f'{where}: "input_ids"')
        mask = fields.get("attention_mask", [1] * len(ids))
        if len(mask) != len(ids):
            raise ValueError(f"{where} has {len(ids)} tokens and a mask of {len(mask)}")
        ids = list(compress(ids, mask))[:max_length]
    elif isinstance(fields["text"], str):
        ids = tokenizer(fields["text"], truncation=True, max_length=max_length)["input_ids"]
    else:
        raise ValueError(f'{where}: "text" is not a string: {item!r:.80}')
    if outside := [i for i in ids if not 0 <= i < rows]:
        raise ValueError(
            f"{where} has the token {outside[0]}, but the model's table has the rows 0 to "
            f"{rows - 1}: take the model's own tokenizer"
        )
    example = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if classes is not None:
        if not ids:
            raise ValueError(f"{where} has no token")
        return example | {"labels": _class(label, classes, where, item)}
    if len(ids) < 2:
        raise ValueError(f"{where} has {len(ids)} tokens: nothing in it can be predicted")
    if label is None:
        return example | {"labels": [-100, *ids[1:]]}
    labels = _integers(label, f"{where}: without labels=n at set-up, the label")
    if len(mask) == len(labels):
        labels = list(compress(labels, mask))
    labels = labels[:max_length]
    if len(labels) != len(ids):
        raise ValueError(f"{where} has {len(ids)} tokens and {len(labels)} labels")
    if not all(i == -100 or 0 <= i < rows for i in labels) or set(labels[1:]) == {-100}:
        raise ValueError(
            f"{where}: labels must be tokens of 0 to {rows - 1}, or -100 where none is to be "
            f"predicted, and at least one must be a token: {labels!r:.80}"
        )
    return example | {"labels": labels}


def _conversation(talk, tokenizer, max_length: int, classes: int | None, where: str) -> dict:
    """Return the ids and labels of a conversation. Errors as `train_with_peft`."""
    if classes is not None:
        raise ValueError(
            f"{where} is a conversation, and the model is a classifier: set it up without labels, "
            'or give "text" and "label"'
        )
    if "messages" in talk:
        _, *tokens = chat_tokens(tokenizer, talk["messages"], where=where)
    elif missing := {"prompt", "completion"} - talk.keys():
        raise ValueError(f'{where} has no "{missing.pop()}", which belongs to a prompt\'s example')
    else:
        _, *tokens = pair_tokens(tokenizer, talk["prompt"], talk["completion"], where)
    ids, labels = fitted(*tokens, max_length, where)
    return {"input_ids": ids, "labels": labels}


def _integers(values, what: str) -> list[int]:
    try:
        return list(map(int, values))
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a list of whole numbers, got {values!r:.80}") from None


def _class(label, classes: int, where: str, item) -> int:
    try:
        is_class = not isinstance(label, bool) and int(label) == label
    except (TypeError, ValueError):  # nothing, a word, a list, NaN
        is_class = False
    if not is_class:
        raise ValueError(f'{where} has no "label", a class of 0 to {classes - 1}: {item!r:.80}')
    if not 0 <= int(label) < classes:
        raise ValueError(f"{where} has label {label}, but the model has classes 0 to {classes - 1}")
    return int(label)


def _collator(model, tokenizer):
    # Of a text it pads the labels by position, not by the padding token, which may also end it.
    is_classifier = classifies(model.active_peft_config)
    return (DataCollatorWithPadding if is_classifier else DataCollatorForSeq2Seq)(tokenizer)


def _accuracy(prediction) -> dict[str, float]:
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(np.mean(right))}


# ------------------------------------------------------------------ the run


def _arguments(model, folder: Path, steps, batch_size, rate, checkpoint_every, seed):
    """Return Trainer's settings. `batch_size` counts the texts of all devices together."""
    dtype = next(model.get_base_model().parameters()).dtype
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=0.1,  # a share of the steps
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if checkpoint_every is None else "steps",
        save_steps=checkpoint_every or 1,
        save_total_limit=2,  # one more than the newest, which an interruption may leave half done
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if batch_size % devices:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided among {devices} devices: take a multiple"
        )
    arguments.per_device_train_batch_size = batch_size // devices
    arguments.per_device_eval_batch_size = max(1, batch_size // devices)
    return arguments


class PeftTrainer(Trainer):
    """Adapt Trainer to PEFT's models: update AdaLoRA's ranks, average a classifier's loss."""

    def __init__(self, model, *args, **more):
        super().__init__(model, *args, **more)
        if classifies(model.active_peft_config):
            # Classifiers take the count of labels that Trainer hands them, and ignore it: over
            # several steps or processes their loss would be counted more than once.
            self.model_accepts_loss_kwargs = False
        self.allocates = hasattr(model.base_model, "rankallocator")  # AdaLoRA's
        if self.allocates:
            self.add_callback(_Allocate())

    def prediction_step(self, model, *args, **more):
        # PEFT's AdaLoRA adds its regulariser also to a loss that is only to be measured.
        model = self.model.get_base_model() if self.allocates else model
        return super().prediction_step(model, *args, **more)


class _Allocate(TrainerCallback):
    """Set AdaLoRA's schedule to the length of the run, and update its ranks after each step."""

    def on_train_begin(self, args, state, control, model=None, **more):
        config, total = model.active_peft_config, state.max_steps
        config.total_step, config.tinit, config.tfinal = total, total // 10, total // 3
        config.deltaT = max(1, total // 50)

    def on_optimizer_step(self, args, state, control, model=None, **more):
        model.base_model.update_and_allocate(state.global_step + 1)


class _Log(TrainerCallback):
    """Show a progress bar with the loss, and stop the training if the loss is NaN or infinite."""

    def __init__(self, show: bool):
        self.show = show

    def on_train_begin(self, args, state, control, **more):
        todo = range(state.max_steps - state.global_step)
        self.bar = progress(todo, "training", done=state.global_step, show=self.show)

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.bar.close()
                raise TrainingDiverged(
                    f"step {state.global_step}: loss {logs['loss']:.3g}. Nothing of it was saved. "
                    "Start again in another folder with a smaller learning_rate, or look at the "
                    "batch."
                )
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args, state, control, **more):
        self.bar.close()


def _refuse_resume(config) -> None:
    """Raise ValueError for a method whose adapter file lacks a part of the trainable parameters."""
    kind, network = config.peft_type.value, "the network that makes the virtual tokens"
    lacks = {
        "ADALORA": "the pruned triplets and the scores of its allocator",
        "P_TUNING": network,
        "PREFIX_TUNING": network if getattr(config, "prefix_projection", False) else None,
    }
    if what := lacks.get(kind):
        raise ValueError(
            f"resume=True: a run with {kind} cannot be resumed, because its checkpoints lack "
            f"{what}; train it in one run, with resume=False"
        )


def _checkpoint(folder: Path, resume: bool, steps: int) -> Path | None:
    """Return the newest complete checkpoint before the last of `steps`, None without `resume` or
    where there is none. ValueError if `folder` holds what must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file; name a folder")
    if (folder / WEIGHTS).exists():
        raise ValueError(
            f"output_dir={str(folder)!r} holds the adapter of a finished run: take another folder"
        )
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    saved = sorted(int(name[1]) for name in names if name)
    if saved and not resume:
        raise ValueError(
            f"output_dir={str(folder)!r} holds {len(saved)} checkpoints of an older run: take "
            "another folder, or resume=True to go on with it"
        )
    # Trainer writes its state last. From a checkpoint at the end it would take one step too many.
    paths = [folder / f"checkpoint-{number}" for number in saved if number < steps]
    complete = [path for path in paths if (path / "trainer_state.json").is_file()]
    return complete[-1] if complete else None


def _run(trainer: PeftTrainer, checkpoint: Path | None, folder: Path) -> dict:
    start = time.perf_counter()
    # It reports that pad and end tokens of model and tokenizer are now the same.
    with errors_only("transformers.trainer_utils"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))  # by the first process only, and the tokenizer with it
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs
    trainer.accelerator.wait_for_everyone()
    history = trainer.state.log_history
    metrics = {
        "steps": trainer.state.global_step,
        "examples": len(trainer.train_dataset),
        "trainable": trainer.model.get_nb_trainable_parameters()[0],
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "seconds": seconds,
        "adapter": str(folder),
    }
    if trainer.eval_dataset is not None:
        scores = trainer.evaluate()
        metrics |= {k: scores[k] for k in ("eval_loss", "eval_accuracy") if k in scores}
    return metrics
