"""Checks of lesson 12.

peft takes seconds to import, so it is imported where it is needed.
"""

import copy
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..data.base_models import load_tokenizer
from ..testing.tiny import perturb, tiny_llama
from ..testing.wording import kind
from .calls import seeded
from .compare import few
from .kit import Case, Refused, check_for
from .mistakes import mistakes

# ------------------------------------------------------------------ row_faults

_PROMPT, _END = "other prompt", "no end"
_QUESTION, _ANSWER = "question learned", "answer not learned"

# Opening and closing of a message, the token at which a server stops, and what a server sends after
# the opening of an answer. All tokenizers have the same vocabulary.
_TEMPLATES = {
    "chatml": ("<|im_start|>{role}\\n", "<|im_end|>\\n", "<|im_end|>", ""),
    "thinking": (
        "<|im_start|>{role}\\n",
        "<|im_end|>\\n",
        "<|im_end|>",
        "<think>\\n\\n</think>\\n",
    ),
    "other stop": ("<|im_start|>{role}\\n", "<|im_end|>\\n", "<eos>", ""),
    "headers": ("<|{role}|>", "<|end|>", "<|end|>", ""),
}
_MARKS = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_WORDS = ["river", "lantern", "slow", "bright", "garden", "seven", "under", "music", "paper"]


@cache
def _speaker(template: str) -> Any:
    """Return tinylm's tokenizer with a chat template."""
    opening, closing, end, asks = _TEMPLATES[template]
    before, after = opening.split("{role}")
    tokenizer = copy.deepcopy(load_tokenizer("tinylm"))
    tokenizer.add_special_tokens({"extra_special_tokens": _MARKS})
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ '{before}' + m['role'] + '{after}' + m['content'] + "
        f"'{closing}' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ "
        f"'{opening.format(role='assistant')}{asks}' }}}}{{% endif %}}"
    )
    return tokenizer


def _said(role: str) -> dict[str, str]:
    """Return a message of four to seven random words."""
    picked = torch.randint(len(_WORDS), (int(torch.randint(4, 8, ())),)).tolist()
    return {"role": role, "content": " ".join(_WORDS[i] for i in picked).capitalize() + "."}


def _encoded(tokenizer: Any, messages: list, end: str = "") -> tuple[list, list]:
    """Return ids and labels of a chat in which each answer is learned with its end."""
    ids, labels = [], []
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            text = tokenizer.apply_chat_template(
                messages[:k], tokenize=False, add_generation_prompt=True
            )
            asked = tokenizer(text).input_ids[len(ids) :]
            answer = tokenizer(message["content"] + (end or tokenizer.eos_token)).input_ids
            ids, labels = [*ids, *asked, *answer], [*labels, *[-100] * len(asked), *answer]
    return ids, labels


def _row(
    change: Callable | None = None,
    template: str = "chatml",
    served: str = "",
    turns: int = 1,
    system: bool = False,
    end: str = "",
    twice: bool = False,
) -> list:
    """Return the arguments for a row in one template, judged by the one with which it is served.

    change: a function of ids, labels and the tokenizer, which changes the two lists."""
    tokenizer = _speaker(template)
    roles = ["system"] * system + ["user", "assistant"] * turns
    messages = [_said(role) for role in roles]
    encoded = messages
    if twice:
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
        encoded = [{"role": "user", "content": text}, messages[-1]]
    ids, labels = _encoded(tokenizer, encoded, end)
    if change:
        change(ids, labels, tokenizer)
    return [messages, ids, labels, _speaker(served or template)]


def _line_break(ids, labels, tokenizer):
    ids += tokenizer("\n").input_ids
    labels += tokenizer("\n").input_ids


def _padded(ids, labels, tokenizer):
    ids += 3 * [tokenizer.pad_token_id]
    labels += 3 * [-100]


def _everything(ids, labels, tokenizer):
    labels[:] = ids


def _end_is_padding(ids, labels, tokenizer):
    labels[:] = [-100 if i == tokenizer.pad_token_id else i for i in ids]


def _cut(by: int, forced: bool = False) -> Callable:
    def change(ids, labels, tokenizer):
        for part in ids, labels:
            part[-by:] = [tokenizer.eos_token_id] * forced

    return change


def _unlabelled(which: slice) -> Callable:
    """Take away the labels in a slice of the positions that have one."""

    def change(ids, labels, tokenizer):
        for i in [i for i, label in enumerate(labels) if label != -100][which]:
            labels[i] = -100

    return change


def _turn_unlabelled(turn: int) -> Callable:
    def change(ids, labels, tokenizer):
        ends = [i for i, label in enumerate(labels) if label == tokenizer.eos_token_id]
        start = ends[turn - 1] + 1 if turn else 0
        labels[start : ends[turn] + 1] = [-100] * (ends[turn] + 1 - start)

    return change


def _header_learned(ids, labels, tokenizer):
    first = next(i for i, label in enumerate(labels) if label != -100)
    labels[first - 1] = ids[first - 1]


def _told(note, messages, ids, labels, tokenizer):
    turns = sum(message["role"] == "assistant" for message in messages)
    learned = sum(label != -100 for label in labels)
    chat = f"a chat with {turns} answer{'s' * (turns > 1)}, {len(ids)} tokens, {learned} labels"
    return f"{chat} ({note})"


def _case(note: str, *args: Any, **more: Any) -> Case:
    return Case(lambda: _row(*args, **more), note=note)


@check_for(
    cases=[
        _case("a question and its answer"),
        _case("TRL's row, whose line break after the end token is learned", _line_break),
        _case("padded on the right, with the end token", _padded),
        _case("every token is learned", _everything),
        _case("nothing is learned", _unlabelled(slice(None))),
        _case("cut at max_length", _cut(3)),
        _case("the end token is cut off", _cut(1), system=True),
        _case("cut at max_length, and then ended", _cut(3, forced=True)),
        _case("the padding token, which is the end token, has no label", _end_is_padding),
        _case("the end token alone has no label", _unlabelled(slice(-1, None))),
        _case("the answer ends with <eos>, the server stops at <|im_end|>", end="<eos>"),
        _case("the template ends with <|im_end|>, the server stops at <eos>", served="other stop"),
        _case("the template is applied twice", twice=True),
        _case("the template writes the question and the answer in one go", served="thinking"),
        _case("a reasoning template, trained as it is served", template="thinking"),
        _case("three answers, a system message, another template", None, "headers", "", 3, True),
        _case("the second answer has no labels", _turn_unlabelled(1), turns=2),
        _case("the first answer has no labels", _turn_unlabelled(0), "headers", turns=2),
        _case("the first token of the answer has no label", _unlabelled(slice(1))),
        _case("the last token before the answer has a label", _header_learned, "headers"),
    ],
    returns="the faults",
    view=lambda faults: {"the faults": sorted(faults)},
    describe=_told,
    causes=mistakes(
        """
        def row_faults(messages, ids, labels, tokenizer):
            faults, may = set(), set()
            for k, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                text = tokenizer.apply_chat_template(
                    messages[:k], tokenize=False, add_generation_prompt=True)
                prompt = tokenizer(text).input_ids
                answer = tokenizer(message["content"] + tokenizer.eos_token).input_ids
                start, stop = len(prompt), len(prompt) + len(answer)
                if ids[:start] != prompt:
                    return {"other prompt"}
                if ids[start:stop] != answer or labels[stop - 1] == -100:
                    faults.add("no end")
                if -100 in labels[start:stop - 1]:
                    faults.add("answer not learned")
                may |= set(range(start, stop + 1))
            if any(label != -100 for i, label in enumerate(labels) if i not in may):
                faults.add("question learned")
            return faults
        """,
        """
        the end token is looked for among all tokens of the row, and the question has one, too: look
        behind the answer
            ids[start:stop] != answer → tokenizer.eos_token_id not in ids
            or labels[stop - 1] == -100 → or tokenizer.eos_token_id not in labels
        a row that is cut and then ended passes: its last token is the end token, but the answer is
        not whole
            ids[start:stop] != answer or labels[stop - 1] == -100 →
                tokenizer.eos_token_id not in labels[start:stop]
        the end token is there and has no label, so nobody learns it: look at its label too
            or labels[stop - 1] == -100 → ∅
        only the label of the last position is looked at: the template's line break may follow the
        end token
            ids[start:stop] != answer or labels[stop - 1] == -100 →
                labels[-1] != tokenizer.eos_token_id
        the end token is always <|im_end|> here: the server stops at tokenizer.eos_token
            + tokenizer.eos_token → + "<|im_end|>"
        the line break after the end token counts as a part of the question: the token after it may
        have a label
            range(start, stop + 1) → range(start, stop)
        only the last answer is looked at: each answer of the chat is learned
            != "assistant" → != "assistant" or k < len(messages) - 1
        only the first answer is looked at: each answer of the chat is learned
            != "assistant" → != "assistant" or may
        the prompt lacks the opening of the assistant's message: the server sends it, too
            add_generation_prompt=True → add_generation_prompt=False
        the prompt is not compared: a row in which another prompt comes before the answer is learned
        from, and never asked for
            if ids[:start] != prompt → if False
        the end token counts as a part of the answer: it has a name of its own
            in labels[start:stop - 1] → in labels[start:stop]
        an answer counts as learned if any of its tokens has a label: each of them needs one
            if -100 in labels[start:stop - 1] →
                if set(labels[start:stop - 1]) == {-100}
        labels outside of the answers are not looked for
            faults.add("question learned") → pass
        """,
    ),
)
def row_faults(messages, ids, labels, tokenizer):
    """Every fault of a row is found, in four templates, and no sound row is called broken."""
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    due = []
    for k in answers:
        asked = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True)["input_ids"]
        if asked != ids[: len(asked)]:
            return {_PROMPT}
        said = tokenizer.encode(messages[k]["content"])
        due.append((len(asked), said))
    found, kept = set(), set()
    for start, said in due:
        end = start + len(said)
        places = range(start, min(end, len(ids)))
        kept |= {*places, end, end + 1}
        if any(labels[i] == -100 for i in places):
            found.add(_ANSWER)
        whole = ids[start:end] == said and ids[end : end + 1] == [tokenizer.eos_token_id]
        if not whole or labels[end] == -100:
            found.add(_END)
    if any(label != -100 and i not in kept for i, label in enumerate(labels)):
        found.add(_QUESTION)
    return found


# ------------------------------------------------------------------ small models


def _base() -> nn.Module:
    """Return a small model as it is loaded, frozen or not; its head is not tied."""
    return tiny_llama(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=False)


def _batch(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make rows of 4 to 9 tokens, padded on the left, with their labels."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 9), generator=drawn)
    lengths = torch.randint(4, 10, (rows, 1), generator=drawn)
    mask = (torch.arange(8, -1, -1) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


# ------------------------------------------------------------------ mixed_batch


@cache
def _serving() -> nn.Module:
    """Make a model with two trained adapters: a LoRA with a head of its own, and a DoRA."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    dora = LoraConfig(r=2, target_modules=["v_proj", "down_proj"], use_dora=True)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        model = get_peft_model(_base(), lora, adapter_name="a")
        model.add_adapter("b", dora)
        for seed, name in enumerate("ab"):
            model.set_adapter(name)
            perturb(model, 0.5, seed)
    return model


def _to_serve(adapters: list[str | None], frozen: bool) -> list[Any]:
    original = _serving()
    settings = original.get_base_model().config
    # A copy of the settings in depth takes longer than one of the model.
    model = copy.deepcopy(original, {id(settings): settings})
    model.set_adapter("b")
    if frozen:
        model.requires_grad_(False)
    model.train(not frozen)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0  # whoever leaves it on gets the same every time
    model.trained = _trainable(model)
    inputs = _batch(len(adapters))
    del inputs["labels"]
    return [model, inputs, adapters]


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _served_afterwards(model, inputs, adapters):
    """Ask of the model only that the same adapter is active, and the same parameters train."""
    if (active := model.active_adapters) != ["b"]:
        return f"the active adapter is {active} afterwards, and was ['b']"
    if any(getattr(m, "_disable_adapters", False) for m in model.modules()):
        return "the adapters are switched off afterwards: disable_adapter() is a context"
    now, before = _trainable(model), model.trained
    if thawed := sorted(now - before):
        return (
            f"{len(thawed)} parameters that were frozen require a gradient afterwards, as "
            f"{thawed[0]!r}: print the fourth answer of the drawing after each call"
        )
    if lost := sorted(before - now):
        return f"{len(lost)} parameters that trained are frozen afterwards, as {lost[0]!r}"
    return None


@check_for(
    cases=[
        Case(
            lambda: _to_serve(["b", "a", None, "a"], frozen=False),
            note="a is a LoRA, b a DoRA; b is active and trains",
        ),
        Case(
            lambda: _to_serve(["a", None, "b"], frozen=True),
            note="the same adapters, loaded frozen; b is active",
        ),
    ],
    returns="logits",
    changes=("model",),
    afterwards=_served_afterwards,
    quiet=True,
    causes=mistakes(
        """
        def mixed_batch(model, inputs, adapters):
            def answered(name):
                if name is None:
                    with model.disable_adapter():
                        return model(**inputs)["logits"]
                model.set_adapter(name)
                return model(**inputs).logits

            active = model.active_adapter
            trained = [p for p in model.parameters() if p.requires_grad]
            model.eval()
            with torch.no_grad():
                rows = [answered(name)[i] for i, name in enumerate(adapters)]
            model.set_adapter(active)
            model.requires_grad_(False)
            for p in trained:
                p.requires_grad = True
            return torch.stack(rows)
        """,
        """
        every row is answered by the active adapter
            answered(name)[i] → answered(active)[i]
        the rows are in the order of the groups: put each row back into its position
            enumerate(adapters) →
                sorted(enumerate(adapters), key=lambda row: adapters.index(row[1]))
        a row without an adapter is answered by the active one: disable_adapter() gives the base
            answered(name)[i] → answered(name or active)[i]
        get_base_model() gives the base with the branches in its layers, and the last adapter
        answers: disable_adapter() switches them off
            with model.disable_adapter(): → if True:
            model(**inputs)["logits"] → model.get_base_model()(**inputs).logits
        attention_mask is not passed on: pass all of inputs
            active = → inputs = {"input_ids": inputs["input_ids"]}; active =
        it runs in train mode, with dropout
            model.eval() → ∅
        """,
    ),
)
def mixed_batch(model, inputs, adapters):
    """Each row is what its adapter alone computes, and the model is as it was before."""
    flags = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        logits = {None: model(**inputs).logits}
    for name in set(adapters) - {None}:
        model.set_adapter(name)
        logits[name] = model(**inputs).logits.detach()
    model.set_adapter("b")
    for p, flag in flags.items():
        p.requires_grad = flag
    return torch.stack([logits[name][i] for i, name in enumerate(adapters)])


# ------------------------------------------------------------------ resume

_FILE = "adapter_model.safetensors"
_IS_TRAINABLE = (
    "from_pretrained loads an adapter and its head frozen: is_trainable=True makes both train"
)
_LR = 3e-3


@cache
def _begun() -> nn.Module:
    """Make a model with an adapter and a head, in which training has begun."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
    )
    return perturb(get_peft_model(_base(), config), 0.2, 7)


def _held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the active adapter and its head, by their names in a file."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    return {key: t.detach().clone() for key, t in held.items()}


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], head: bool) -> list[str]:
    """Name the tensors of the head, or of the adapter, in which two sets differ."""
    return [
        key
        for key in b
        if ("lm_head" in key) == head
        and (key not in a or (a[key] - b[key]).abs().max() > 2e-5 * b[key].abs().max())
    ]


def _resumed(function: Callable, folder: str, data: list) -> nn.Module:
    """Save the model in which training has begun, and return what the function makes of it."""
    from peft import PeftModel

    _begun().save_pretrained(folder)
    with seeded():
        try:
            model = function(_base(), folder, data, _LR)
        except Exception as error:
            error.add_note(f"Tried with {len(data)} batches.")
            raise
    if not isinstance(model, PeftModel):
        raise Refused(
            f"the result is {kind(model)}, expected the PEFT model",
            "merge_and_unload, unload and get_base_model give a model that is not PEFT's.",
        )
    return model


def _left(function: Callable) -> tuple[list[tuple[str, str]], str | None]:
    """Return the faults of the given code that a function still has, each as what it does and why,
    and a sentence about what else is wrong, which is looked at if they are mended."""
    from peft import PeftModel

    before, left = _held(_begun()), []
    with tempfile.TemporaryDirectory() as folder:
        start = _held(_resumed(function, folder, []))
    scratch, headless = (_apart(start, before, head) for head in (False, True))
    if wrong := scratch + headless:
        why = "Besides the adapter, the file holds the trained head: modules_to_save names it."
        if scratch:
            why = (
                "get_peft_model puts a new adapter into the model, and replaces a loaded one: "
                "from_pretrained alone makes a PEFT model of a base."
            )
        left.append(
            (f"with data=[], the returned model has not what path holds: {few(wrong)}", why)
        )
    batches = [_batch(seed=seed) for seed in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        model = _resumed(function, folder, batches)
        held, now = _held(model), load_file(f"{folder}/{_FILE}")
        if not _apart(held, start, head=True):
            moved = _apart(held, start, head=False)
            why = f"{_IS_TRAINABLE}." if moved else "The adapter is as it was, too."
            left.append(("three batches leave lm_head as it was", why))
        if lost := [key for key in before if "lm_head" in key and key not in now]:
            why = "The file gets only the tensors with lora_ in their names."
            left.append((f"the file in path lacks {few(lost)}", why))
        if left:
            return left, None
        if not _apart(held, start, head=False):
            return [], f"three batches leave the adapter as it was: {_IS_TRAINABLE}"
        if not _apart(now, before, head=False) or not _apart(now, before, head=True):
            return [], "path still holds what it held before"
        loaded = PeftModel.from_pretrained(_base(), folder)
        with torch.no_grad():
            gap = loaded.eval()(**batches[0]).logits - model.eval()(**batches[0]).logits
    if gap.abs().max() > 1e-4:
        return [], (
            "loaded from path, the model is not the one that was returned: did the base train too, "
            "or was the adapter saved before the last step?"
        )
    due = _held(_trained_on(batches))
    size = sum((due[key] - before[key]).norm() ** 2 for key in due) ** 0.5
    if sum((due[key] - held[key]).norm() ** 2 for key in due) ** 0.5 > 0.05 * size:
        return [], "three batches do not make three steps of AdamW, each with its own gradient"
    return [], None


def _trained_on(batches: list) -> nn.Module:
    settings = _begun().get_base_model().config
    model = copy.deepcopy(_begun(), {id(settings): settings}).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LR)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def _share(function: Callable) -> float:
    with suppress(Exception):
        left, _ = _left(function)
        return 1 - len(left) / 3 if left else 0.75
    return 0.0


def _goes_on(function: Callable) -> str:
    left, other = _left(function)
    if left:
        mended = 3 - len(left)
        does, why = left[0]
        headline = f"{mended} of 3 faults {'is' if mended == 1 else 'are'} mended"
        raise Refused(headline, f"Here, {does}.", on_request=[why])
    if other:
        raise Refused("All 3 faults are mended, but something else is wrong", f"Here, {other}.")
    return "it starts with what path holds; three batches make three steps; path holds the result"


@check_for(
    trials={_goes_on: "your function"},
    hints={
        "base_model.model.base_model": "The adapter is loaded into a model that has PEFT's layers "
        "already, and every name begins twice: load it into the bare base.",
        "empty parameter list": f"Nothing trains: {_IS_TRAINABLE}.",
        "require grad": "Nothing trains in this forward: the adapter is frozen, or merged.",
    },
    share=_share,
    quiet=True,
)
def resume(base, path, data, lr=1e-2):
    """Training goes on from the file, with adapter and head, and the file holds both afterwards."""
