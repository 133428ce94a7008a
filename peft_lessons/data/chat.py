"""Turn conversations into tokens and labels by a tokenizer's chat template.

A message is {"role": "user", "content": "..."}; a conversation is a list of messages. Only the
assistant's answers are learned, each with the token that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

ROLES = ("system", "user", "assistant")


def user(text: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """Return an assistant's message."""
    return {"role": "assistant", "content": text}


def refuse_no_template(tokenizer) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so it cannot format messages: take the tokenizer "
            "of an assistant, such as load_tokenizer('smollm2'), or set tokenizer.chat_template"
        )


def refuse_messages(messages, where: str) -> None:
    """Raise ValueError unless `messages` is a list of messages with known roles, in which no answer
    is empty."""
    listed = isinstance(messages, list | tuple) and len(messages) > 0
    if not listed or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f'{where} must be a list of messages, [{{"role": "user", "content": "..."}}, ...], got '
            f"{messages!r:.80}"
        )
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"{where}: message {number} has the role {role!r}, and chat templates know "
                f"{', '.join(map(repr, ROLES))}"
            )
        if not isinstance(content, str):
            raise ValueError(f"{where}: message {number} has no text as its content: {content!r}")
        if role == "assistant" and not content.strip():
            raise ValueError(
                f"{where}: message {number} is an empty answer: nothing in it to learn"
            )


def chat_text(tokenizer, messages: Sequence[Mapping], ask: bool = False, where="messages") -> str:
    """Return a conversation as the text that the chat template makes of it; with `ask` the text
    ends where the assistant is to answer. ValueError for messages that the template refuses or
    leaves out."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from None
    for number, message in enumerate(messages):
        if message["content"].strip() not in text:
            raise ValueError(
                f"{where}: the chat template leaves out message {number}, of the role "
                f"{message['role']!r}"
            )
    return text


def chat_tokens(
    tokenizer, messages: Sequence[Mapping], start: int = 0, where: str = "messages"
) -> tuple[str, list[int], list[int]]:
    """Return a conversation as text, its ids and its labels, two lists of equal length.

    The labels are the ids in each answer, which is an assistant's message from number `start` on,
    up to the token that ends it; all other labels are -100. The text before an answer is
    tokenised by itself, as in generation.

    Raises ValueError for a tokenizer without a chat template, wrong messages, a conversation
    without an answer, and a template that changes earlier messages."""
    refuse_no_template(tokenizer)
    refuse_messages(messages, where)
    answers = [i for i, m in enumerate(messages) if i >= start and m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn")
    text, done = chat_text(tokenizer, messages, where=where), 0
    ids: list[int] = []
    labels: list[int] = []

    def take(end: int, learned: bool) -> None:
        nonlocal done
        piece = tokenizer(text[done:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(piece)
        labels.extend(piece if learned else [-100] * len(piece))
        done = end

    for i in answers:
        before = chat_text(tokenizer, messages[:i], ask=True, where=where)
        is_last = i == len(messages) - 1
        after = text if is_last else chat_text(tokenizer, messages[: i + 1], where=where)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"{where}: the chat template writes message {i} in another way once more messages "
                "follow, so its answer cannot be found in the text: give a prompt and a completion "
                "with this answer alone"
            )
        take(len(before), learned=False)
        take(len(after.rstrip()), learned=True)  # a line end after the end token is no answer
    take(len(text), learned=False)
    return text, ids, labels


def pair_tokens(
    tokenizer, prompt: Sequence[Mapping], completion: Sequence[Mapping], where: str = "example"
) -> tuple[str, list[int], list[int]]:
    """Return text, ids and labels of a prompt and its completion, as `chat_tokens`; answers in the
    prompt are not learned. ValueError as there, and for a completion that does not begin with an
    answer."""
    refuse_messages(prompt, f'{where}: "prompt"')
    refuse_messages(completion, f'{where}: "completion"')
    if completion[0]["role"] != "assistant":
        raise ValueError(
            f'{where}: "completion" begins with the role {completion[0]["role"]!r} and must begin '
            "with the assistant's answer"
        )
    return chat_tokens(tokenizer, [*prompt, *completion], len(prompt), where)


def fitted(
    ids: list[int], labels: list[int], max_length: int, where: str
) -> tuple[list[int], list[int]]:
    """Return ids and labels cut to `max_length`. ValueError if that would cut an answer."""
    needed = max(place for place, label in enumerate(labels) if label != -100) + 1
    if needed > max_length:
        raise ValueError(
            f"{where}: its answer ends at token {needed} of {len(ids)}, and max_length={max_length}"
            " would cut the answer off: raise max_length, or shorten the example"
        )
    return ids[:max_length], labels[:max_length]
