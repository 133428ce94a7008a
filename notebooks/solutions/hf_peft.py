"""Solutions of lesson 12."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from peft import PeftModel
from transformers import PreTrainedTokenizerBase


def row_faults(
    messages: list[dict[str, str]],
    ids: list[int],
    labels: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> set[str]:
    """Return the faults of one training row, made from a chat; an empty set if it is sound."""
    faults, may_learn = set(), set()
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True,
                                             tokenize=False)
        prompt = tokenizer(text).input_ids                       # what the server would send
        answer = tokenizer(message["content"] + tokenizer.eos_token).input_ids
        start, stop = len(prompt), len(prompt) + len(answer)
        if ids[:start] != prompt:
            return {"other prompt"}
        if ids[start:stop] != answer or labels[stop - 1] == -100:
            faults.add("no end")
        if -100 in labels[start:stop - 1]:
            faults.add("answer not learned")
        may_learn.update(range(start, stop + 1))                 # and the template's line break
    if any(label != -100 and i not in may_learn for i, label in enumerate(labels)):
        faults.add("question learned")
    return faults


def mixed_batch(
    model: PeftModel, inputs: dict[str, torch.Tensor], adapters: list[str | None]
) -> torch.Tensor:
    """Return the logits of a batch in which each row has its own adapter, or none."""
    active = model.active_adapter
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    logits = {}
    for name in set(adapters):
        rows = [i for i, adapter in enumerate(adapters) if adapter == name]
        part = {key: value[rows] for key, value in inputs.items()}
        with torch.no_grad():
            if name is None:
                with model.disable_adapter():
                    answers = model(**part).logits
            else:
                model.set_adapter(name)
                answers = model(**part).logits
        logits |= dict(zip(rows, answers, strict=True))
    model.set_adapter(active)
    model.requires_grad_(False)            # set_adapter and disable_adapter have thawed parameters
    for p in trained:
        p.requires_grad_(True)
    return torch.stack([logits[i] for i in range(len(adapters))])


def resume(
    base: nn.Module, path: str, data: Iterable[dict[str, torch.Tensor]], lr: float = 1e-2
) -> PeftModel:
    """Continue the training of the adapter in `path`, and save it there again."""
    model = PeftModel.from_pretrained(base, path, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return model
