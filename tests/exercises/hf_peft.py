"""Answers to the exercises of lesson 12."""

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file

from peft_lessons.data.chat import chat_tokens

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ row_faults


def turns(messages, tokenizer):
    """Yield the prompt of each answer as a server sends it, and the answer's text."""
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            sent = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True)
            yield sent["input_ids"], message["content"]


@right("row_faults")
def by_the_labels_that_are_due(messages, ids, labels, tokenizer):
    due, ends = [], []
    for sent, text in turns(messages, tokenizer):
        if sent != ids[: len(sent)]:
            return {"other prompt"}
        due += [-100] * (len(sent) - len(due)) + tokenizer(text + tokenizer.eos_token).input_ids
        ends.append(len(due) - 1)
    pairs = list(zip(due, labels, strict=False))
    wrongs = {i for i, (wanted, label) in enumerate(pairs) if wanted != label}
    missing = {i for i in wrongs if due[i] != -100 and i not in ends}
    found = {"answer not learned"} if any(labels[i] == -100 for i in missing) else set()
    cut = any(ids[i] != due[i] for i in range(min(len(due), len(ids))) if due[i] != -100)
    if cut or len(ids) < len(due) or any(labels[i] == -100 for i in ends):
        found.add("no end")
    spare = {i for i, label in enumerate(labels) if label != -100} - {e + 1 for e in ends}
    if any(i >= len(due) or due[i] == -100 for i in spare):
        found.add("question learned")
    return found


@right("row_faults")
def by_texts(messages, ids, labels, tokenizer):
    """Decode what comes between the prompt and the next end token."""
    end, found, seen = tokenizer.eos_token_id, set(), 0
    for sent, _ in turns(messages, tokenizer):
        if tokenizer.decode(ids[: len(sent)]) != tokenizer.decode(sent):
            return {"other prompt"}
    for sent, text in turns(messages, tokenizer):
        start = len(sent)
        stop = start + (ids[start:].index(end) if end in ids[start:] else len(ids[start:]))
        found |= {"question learned"} if set(labels[seen:start]) - {-100} else set()
        found |= {"answer not learned"} if -100 in labels[start:stop] else set()
        if tokenizer.decode(ids[start:stop]) != text or labels[stop : stop + 1] != [end]:
            found.add("no end")
        seen = stop + 2
    return found | ({"question learned"} if set(labels[seen:]) - {-100} else set())


@wrong("row_faults", "too many 'other prompt'")
def against_the_whole_chat(messages, ids, labels, tokenizer):
    """Compare with the chat as the template writes it, which is not what is served."""
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    if whole[: len(ids)] != ids[: len(whole)]:
        return {"other prompt"}
    return by_texts(messages, ids, labels, tokenizer)


@wrong("row_faults", "the line break after the end token counts as a part of the question")
def against_our_own_rows(messages, ids, labels, tokenizer):
    """Trust the labels that the course's own function makes."""
    _, own, due = chat_tokens(tokenizer, messages)
    if own[: len(ids)] != ids[: len(own)]:
        return {"other prompt"}
    return set() if due[: len(labels)] == labels else {"question learned"}


@wrong("row_faults", "a list of 0, expected a set")
def a_list(messages, ids, labels, tokenizer):
    return sorted(by_texts(messages, ids, labels, tokenizer))


@wrong("row_faults", "your function raised ValueError")
def by_the_position_of_the_end(messages, ids, labels, tokenizer):
    """Look for the end token behind the prompt, though a cut row has none."""
    for sent, _ in turns(messages, tokenizer):
        ids.index(tokenizer.eos_token_id, len(sent))
    return by_texts(messages, ids, labels, tokenizer)


# ------------------------------------------------------------------ mixed_batch


def kept(mixed_batch):
    """The function, made to leave the model as it was."""

    def wrapped(model, inputs, adapters):
        active = model.active_adapter
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            logits = mixed_batch(model.eval(), inputs, adapters)
        model.set_adapter(active)
        model.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        return logits

    wrapped.__name__ = mixed_batch.__name__
    return wrapped


def row_by_row(model, inputs, adapters, **how):
    rows = []
    for i, name in enumerate(adapters):
        row = {key: t[i : i + 1] for key, t in inputs.items()}
        if name is None:
            with model.disable_adapter():
                rows.append(model(**row).logits)
        else:
            model.set_adapter(name, **how)
            rows.append(model(**row).logits)
    return torch.cat(rows)


@wrong("mixed_batch", "the active adapter is ['a'] afterwards, and was ['b']")
@torch.no_grad()
def leaves_another_active(model, inputs, adapters):
    return row_by_row(model.eval(), inputs, adapters)


@wrong("mixed_batch", "the adapters are switched off afterwards")
def leaves_them_off(model, inputs, adapters):
    logits = kept(row_by_row)(model, inputs, adapters)
    model.base_model.disable_adapter_layers()
    return logits


@wrong("mixed_batch", "parameters that were frozen require a gradient afterwards")
@torch.no_grad()
def thaws(model, inputs, adapters):
    active = model.active_adapter
    logits = row_by_row(model.eval(), inputs, adapters)
    model.set_adapter(active)
    return logits


@wrong("mixed_batch", "parameters that trained are frozen afterwards")
@torch.no_grad()
def freezes(model, inputs, adapters):
    active = model.active_adapter
    logits = row_by_row(model.eval(), inputs, adapters, inference_mode=True)
    model.set_adapter(active, inference_mode=True)
    model.requires_grad_(False)
    return logits


@wrong("mixed_batch", "Cannot pass `adapter_names` when DoRA is enabled")
@torch.no_grad()
def by_adapter_names(model, inputs, adapters):
    names = [name or "__base__" for name in adapters]
    return model.eval()(**inputs, adapter_names=names).logits


@right("mixed_batch")
@kept
def one_row_at_a_time(model, inputs, adapters):
    return row_by_row(model, inputs, adapters)


@right("mixed_batch")
@torch.no_grad()
def by_inference_mode(model, inputs, adapters):
    active, flags = model.active_adapter, [p.requires_grad for p in model.parameters()]
    logits = row_by_row(model.eval(), inputs, adapters, inference_mode=True)
    model.set_adapter(active, inference_mode=True)
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return logits


# ------------------------------------------------------------------ resume


def steps(model, data, lr, params=None):
    """One step of AdamW for each batch."""
    model.train()
    params = [p for p in model.parameters() if p.requires_grad] if params is None else params
    optimizer = torch.optim.AdamW(params, lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def finish(model, path):
    model.save_pretrained(path)
    return model


def start(base, path):
    return PeftModel.from_pretrained(base, path, is_trainable=True).train()


@wrong("resume", "from_pretrained alone makes a PEFT model of a base")
def wiped(base, path, data, lr=1e-2):
    loaded = start(base, path)
    model = get_peft_model(loaded.get_base_model(), loaded.peft_config["default"])
    return finish(steps(model, data, lr), path)


@wrong("resume", "three batches leave lm_head as it was.\n  from_pretrained loads")
def frozen_head(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the file in path lacks 'base_model.model.lm_head.weight'")
def headless(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    tensors = get_peft_model_state_dict(model)
    adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(adapter, f"{path}/adapter_model.safetensors")
    return model


@wrong("resume", "Nothing trains: from_pretrained loads an adapter and its head frozen")
def nothing_to_optimise(base, path, data, lr=1e-2):
    return finish(steps(PeftModel.from_pretrained(base, path), data, lr), path)


@wrong("resume", "Nothing trains in this forward")
def all_in_the_optimiser(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    return finish(steps(model, data, lr, list(model.parameters())), path)


@wrong("resume", "The adapter is as it was, too.")
def never_steps(base, path, data, lr=1e-2):
    model = start(base, path)
    for batch in data:
        model(**batch).loss.backward()
    return finish(model, path)


@wrong("resume", "loaded from path, the model is not the one that was returned")
def everything_awake(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path).requires_grad_(True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "modules_to_save names it")
def without_the_task(base, path, data, lr=1e-2):
    config = PeftConfig.from_pretrained(path)
    config.task_type, config.modules_to_save, config.inference_mode = None, None, False
    model = PeftModel.from_pretrained(base, path, is_trainable=True, config=config)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the result is a module (LlamaForCausalLM)")
def gives_the_base(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, lr), path).get_base_model()


@wrong("resume", "path still holds what it held before")
def saved_too_early(base, path, data, lr=1e-2):
    return steps(finish(start(base, path), path), data, lr)


@wrong("resume", "0 of 3 faults are mended")
def as_given(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    model = get_peft_model(model.get_base_model(), model.peft_config["default"])
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_(True)
    steps(model, data, lr)
    tensors = get_peft_model_state_dict(model)
    adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(adapter, f"{path}/adapter_model.safetensors")
    return model


@wrong("resume", "three batches do not make three steps of AdamW, each with its own gradient")
def adds_gradients_up(base, path, data, lr=1e-2):
    model = start(base, path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
    return finish(model, path)


@wrong("resume", "load it into the bare base")
def into_a_wrapped_model(base, path, data, lr=1e-2):
    model = get_peft_model(base, PeftConfig.from_pretrained(path))
    model = PeftModel.from_pretrained(model, path, is_trainable=True)
    return finish(steps(model, data, lr), path)


@right("resume")
def woken_by_names(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    return finish(steps(model, data, lr), path)


@right("resume")
def config_first(base, path, data, lr=1e-2):
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(path))
    return finish(steps(model, data, lr), path)
