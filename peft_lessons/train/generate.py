"""Let a language model continue a text, or an assistant answer questions."""

import re

import torch

from ..data.chat import refuse_no_template


def generate_text(model, tokenizer, opening: str, seed: int = 0, tokens: int = 40) -> str:
    """Continue `opening` by up to `tokens` tokens, with temperature 0.7 and top-p 0.9.

    The same seed gives the same text; the global random state does not change."""
    ids = tokenizer(opening, return_tensors="pt").to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        written = model.generate(
            **ids, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=tokens
        )
    return tokenizer.decode(written[0], skip_special_tokens=True)


def answer_questions(
    model,
    tokenizer,
    questions: list[str],
    tokens: int = 64,
    size: int = 16,
    temperature: float | None = None,
) -> list[tuple[str, bool]]:
    """Return the assistant's answer to each question, of up to `tokens` tokens, and whether the
    assistant ended it itself. The answer takes the most likely token at each position, or is
    sampled with a temperature from torch's global random state.

    Each question is a chat of its own, in the tokenizer's chat template; `size` questions are
    answered at a time. Raises ValueError for a tokenizer without a chat template."""
    refuse_no_template(tokenizer)
    greedy = {"do_sample": False}
    how = greedy if temperature is None else {"do_sample": True, "temperature": temperature}
    answers = []
    for k in range(0, len(questions), size):
        chats = [[{"role": "user", "content": question}] for question in questions[k : k + size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        # On the left: an answer continues the last position of its row.
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        batch = batch.to(model.device)
        with torch.no_grad():
            rows = model.generate(**batch, **how, max_new_tokens=tokens)
        new = rows[:, batch["input_ids"].shape[1] :]  # (size, tokens)
        ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [(text.strip(), end) for text, end in zip(written, ended, strict=True)]
    return answers


def keeps_rule(text: str, ended: bool, most: int = 25) -> bool:
    """Return whether an answer that the model ended itself is one sentence of 5 to `most` words:
    the rule of the task "preferences"."""
    sentences = re.findall(r"[^.!?]+[.!?](?=\s|$)", text)
    return ended and sentences == [text] and 5 <= len(text.split()) <= most
