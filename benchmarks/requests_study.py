"""What forty-eight examples buy, and what else they change: the study behind lesson 12.

    python benchmarks/requests_study.py     # an hour on one core

The assistant answers all short movie reviews of the test split (at most ten words), and 42
requests that have nothing to do with reviews. Adds a row for each run to
data/results/requests_study.csv: the untrained assistant, alone and after two or eight examples
(three draws); LoRA as the lesson trains it on 48, 12 steps of 4, at a higher learning rate, and at
a higher rank, alpha twice the rank; and at the higher learning rate with a quarter of the 48
replaced by unrelated questions, with the answers that the untrained assistant gave.

The base computes in bfloat16, what trains is in float32. `answers` has the beginnings of five
answers to requests. The other columns have one bit for each review or request, the first one the
lowest, in hexadecimal: `found` (untrained only), the right word is the first of the two words that
occurs in the answer; `choice`, of the two words the right one is likelier; `shifted`, the same with
a shift chosen on the labelled reviews that are not shown, one number for each seed; `exact`, the
whole answer is the right word, apart from capitals and a full stop; `short`, the answer to a
request has at most two words; `kept`, it does what was asked for. The last twelve requests end in
"Answer with one word", as the question about reviews does.
"""

import copy
import random
import re
from functools import cache

import torch
from common import SEEDS, fill_table, hexadecimal
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

from peft_lessons import load_model, load_task, load_tokenizer
from peft_lessons.data.chat import assistant, user
from peft_lessons.train.generate import answer_questions

STEPS, SIZE, TOKENS, WORDS = 12, 4, 40, ("negative", "positive")
KEY = ("kind", "lr", "rank", "seed")
COLUMNS = ("found", "choice", "shifted", "exact", "short", "kept", "answers")
SHOTS = {"two": 2, "eight": 8}
QUESTION = "Is this movie review positive or negative? Answer with one word.\n\n{}"


def long(text: str) -> bool:
    """Return whether a text has at least 15 words."""
    return len(text.split()) >= 15


REQUESTS = {  # what is asked: a pattern of what does it, or a function of the answer
    "What is the capital of France?": "paris",
    "Which planet is known as the Red Planet?": "mars",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "What is the chemical formula of water?": "h2o|h₂o",
    "How many days are in a week?": r"\b(7|seven)\b",
    "What color do you get when you mix blue and yellow?": "green",
    "What is the largest ocean on Earth?": "pacific",
    "What language do people speak in Brazil?": "portuguese",
    "What is 7 + 5?": r"\b(12|twelve)\b",
    "What is 9 times 6?": r"\b(54|fifty-four)\b",
    "What is half of 30?": r"\b(15|fifteen)\b",
    "How many minutes are in an hour?": r"\b(60|sixty)\b",
    "What is 100 minus 1?": r"\b(99|ninety-nine)\b",
    "Count from 1 to 5.": r"(?s)(1|one).*(2|two).*(3|three).*(4|four).*(5|five)",
    "Tell me a story about a cat.": long,
    "Explain why the sky is blue.": long,
    "Describe a beach at sunset.": long,
    "Write a short letter to a friend.": long,
    "How do I make a cup of tea?": long,
    "Give me three tips for sleeping well.": long,
    "What is photosynthesis?": long,
    "Write a poem about the sea.": long,
    "List three fruits.": r"(?s)\w+\W+\w+\W+\w+",
    "Spell the word cat backwards.": r"t\W*a\W*c",
    "Translate 'good morning' into French.": "bonjour",
    "Say hello in Spanish.": "hola",
    "Complete the sentence: The early bird catches the ...": "worm",
    "What is the opposite of hot?": "cold|cool",
    "Write the word HOUSE in lower-case letters.": "house",
    "Who directed the movie Jaws?": "spielberg",
} | {  # the same end as the lesson's question
    f"{question} Answer with one word.{text}": answer
    for question, text, answer in (
        ("Is a whale a fish or a mammal?", "", "mammal"),
        ("Is the number 7 odd or even?", "", "odd"),
        ("Is ice hot or cold?", "", "cold"),
        ("Is the sun a star or a planet?", "", "star"),
        ("Is a carrot a fruit or a vegetable?", "", "vegetable"),
        ("Is Paris in France or in Spain?", "", "france"),
        ("Is ten more or less than five?", "", "more"),
        ("Which word is longer, cat or elephant?", "", "elephant"),
        ("Is this a question or a statement?", "\n\nThe shop closes at six.", "statement"),
        ("Is this e-mail spam or harmless?", "\n\nYou won a million dollars!", "spam"),
        ("Is this text about sports or cooking?", "\n\nStir the soup, add salt.", "cooking"),
        ("Is this sentence English or French?", "\n\nJe suis content.", "french"),
    )
}
QUOTED = (  # of the answers to these the table holds the beginnings
    "Tell me a story about a cat.",
    "Explain why the sky is blue.",
    "What is 100 minus 1?",
    "Is the number 7 odd or even? Answer with one word.",
    "Is this e-mail spam or harmless? Answer with one word.\n\nYou won a million dollars!",
)
OTHERS = (  # unrelated questions to learn with: none of the requests
    "What is the capital of Spain?",
    "Is gold a metal or a gas? Answer with one word.",
    "What is 3 + 4?",
    "How many months are in a year?",
    "Tell me a story about a dog.",
    "Explain what rain is.",
    "Describe a forest in winter.",
    "How do I boil an egg?",
    "List three colors.",
    "Translate 'thank you' into German.",
    "Is a day longer or shorter than an hour? Answer with one word.",
    "Is a rose a flower or a tree? Answer with one word.",
)


@cache
def reader() -> tuple:
    """Return the tokenizer, and the first token of each of the two words (2,)."""
    tokenizer = load_tokenizer("smollm2")
    return tokenizer, torch.tensor([tokenizer(word)["input_ids"][0] for word in WORDS])


@cache
def short(split: str, seed: int = 0) -> list[tuple[str, int]]:
    """Return the reviews of a split with at most ten words, each with its class, in the order in
    which the lesson has them (seed 0) or another."""
    rows = [
        (row["prompt"][-1]["content"].splitlines()[-1], row["completion"][0]["content"])
        for row in load_task("reviews").examples(split)
    ]
    rows = [(text, WORDS.index(word)) for text, word in rows if len(text.split()) <= 10]
    random.Random(seed).shuffle(rows)
    return rows


def asked(text: str, shown: tuple = ()) -> list[dict]:
    """Return a review as messages, after the reviews that are shown with their answers."""
    before = [m for t, label in shown for m in (user(QUESTION.format(t)), assistant(WORDS[label]))]
    return [*before, user(QUESTION.format(text))]


def as_text(messages: list[dict]) -> str:
    """Return what the assistant reads before it answers."""
    tokenizer, _ = reader()
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def answers(model, chats: list[list[dict]], tokens: int = 6, size: int = 64) -> tuple:
    """Return the logits of the first token after each chat, (chats, V), and the whole answers.

    What all chats begin with is read once."""
    model.eval()
    tokenizer, _ = reader()
    rows = [tokenizer(as_text(chat))["input_ids"] for chat in chats]
    shared = next(k for k in range(len(rows[0])) if len({row[k] for row in rows}) > 1)
    cache = model(torch.tensor([rows[0][:shared]]), use_cache=True).past_key_values
    logits, texts = [], []
    for k in range(0, len(rows), size):
        part = rows[k : k + size]
        width = max(map(len, part))
        gaps = [width - len(row) for row in part]  # between what is shared and what is not
        pairs = list(zip(part, gaps, strict=True))
        begun = copy.deepcopy(cache)
        begun.batch_repeat_interleave(len(part))
        out = model.generate(
            input_ids=torch.tensor([r[:shared] + [0] * gap + r[shared:] for r, gap in pairs]),
            attention_mask=torch.tensor(
                [[1] * shared + [0] * gap + [1] * (len(r) - shared) for r, gap in pairs]
            ),
            past_key_values=begun,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits.append(out.logits[0].float())
        texts += tokenizer.batch_decode(out.sequences[:, width:], skip_special_tokens=True)
    return torch.cat(logits), texts


def shift(margins: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the threshold of margins (n,) that gets most of the classes right; the middle of the
    best ones."""
    ordered = margins.sort().values
    tried = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1])
    right = torch.stack([((margins > at).long() == classes).sum() for at in tried])
    return tried[right == right.max()].median().item()


def on_reviews(model, shown: tuple = (), seeds: tuple = ()) -> dict:
    """Return the columns of a model on the reviews of the test split; with seeds, also what a shift
    gives that is chosen on the 48 reviews of each."""
    rows, (_, first) = short("test"), reader()
    classes = torch.tensor([label for _, label in rows])

    def margins(chats: list, tokens: int) -> tuple:
        logits, texts = answers(model, chats, tokens)
        return logits[:, first[1]] - logits[:, first[0]], texts

    chats = [asked(text, shown) for text, _ in rows]
    margin, texts = margins(chats, tokens=6 if shown or not seeds else 16)
    whole = [text.strip().lower().removesuffix(".") for text in texts]
    bits = {
        "choice": ((margin > 0).long() == classes).tolist(),
        "exact": [text == WORDS[label] for text, (_, label) in zip(whole, rows, strict=True)],
    }
    columns, shifted = {name: hexadecimal(right) for name, right in bits.items()}, []
    for seed in seeds:
        known = [row for row in short("train", seed)[: STEPS * SIZE] if row not in shown]
        found, _ = margins([asked(text, shown) for text, _ in known], tokens=1)
        at = shift(found, torch.tensor([label for _, label in known]))
        shifted.append(hexadecimal(((margin > at).long() == classes).tolist()))
    if not shown and seeds:
        mentions = [re.search("|".join(WORDS), text.lower()) for text in texts]
        found = [said and said[0] == WORDS[k] for said, k in zip(mentions, classes, strict=True)]
        columns["found"] = hexadecimal(found)
    return columns | {"shifted": " ".join(shifted)}


def done(request: str, text: str) -> bool:
    """Return whether an answer does what a request asks for."""
    does = REQUESTS[request]
    return bool(does(text) if callable(does) else re.search(does, text.lower()))


def on_requests(model) -> dict:
    """Return the columns of a model on the requests."""
    written = [text for text, _ in answer_questions(model, reader()[0], list(REQUESTS), TOKENS, 40)]
    kept = [done(request, text) for request, text in zip(REQUESTS, written, strict=True)]
    bits = {"short": [len(text.split()) <= 2 for text in written], "kept": kept}
    few = [written[list(REQUESTS).index(request)] for request in QUOTED]
    return {name: hexadecimal(found) for name, found in bits.items()} | {
        "answers": " | ".join(" ".join(text.split())[:40] for text in few)
    }


def base() -> torch.nn.Module:
    """Return the assistant, which computes in bfloat16."""
    model = load_model("smollm2", dtype=torch.bfloat16)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


@cache
def own_answers() -> list[tuple[str, str, bool]]:
    """Return the unrelated questions, the untrained assistant's answers, and whether each ended."""
    written = answer_questions(base(), reader()[0], list(OTHERS), TOKENS)
    return [(question, *answer) for question, answer in zip(OTHERS, written, strict=True)]


def encode(messages: list[dict], answer: str, ended: bool = True) -> dict:
    """Return a chat as ids and labels: the answer is learned, with its end if it has one."""
    tokenizer, _ = reader()
    prompt = tokenizer(as_text(messages))["input_ids"]
    learned = tokenizer(answer + tokenizer.eos_token * ended)["input_ids"]
    return {"input_ids": prompt + learned, "labels": [-100] * len(prompt) + learned}


def trained(lr: float, rank: int, seed: int, mixed: bool) -> torch.nn.Module:
    """Return the assistant with a LoRA trained as in the lesson."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = get_peft_model(base(), config).train()
    rows = [
        encode(asked(text), WORDS[label]) for text, label in short("train", seed)[: STEPS * SIZE]
    ]
    if mixed:  # one of each batch of four
        for k, (question, answer, ended) in enumerate(own_answers()):
            rows[SIZE * k] = encode([user(question)], answer, ended)
    collate = DataCollatorForSeq2Seq(reader()[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for step in range(STEPS):
        model(**collate(rows[SIZE * step : SIZE * (step + 1)])).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    return model


def run(kind: str, lr: float, rank: int, seed: int) -> dict:
    """Return the measured columns of a point."""
    if kind in ("lora", "mixed"):
        model = trained(lr, rank, seed, kind == "mixed")
        return on_reviews(model) | on_requests(model)
    if kind == "none":
        return on_reviews(base(), seeds=SEEDS) | on_requests(base())
    rows = short("train", seed)[: STEPS * SIZE]  # as many of each class, in turn
    halves = ([row for row in rows if row[1] == label] for label in (seed % 2, 1 - seed % 2))
    shown = [row for pair in zip(*halves, strict=False) for row in pair][: SHOTS[kind]]
    return on_reviews(base(), tuple(shown), seeds=(seed,))


def points() -> list[tuple]:
    """Return all points: the prompts, and the trained ones with three seeds each."""
    drawn = [("two", 0.0, 0), ("eight", 0.0, 0), ("lora", 5e-4, 8), ("lora", 5e-4, 64)]
    drawn += [("lora", 2e-3, 8), ("mixed", 2e-3, 8)]
    return [("none", 0.0, 0, 0), *((*setting, seed) for seed in SEEDS for setting in drawn)]


if __name__ == "__main__":
    fill_table("requests_study", KEY, COLUMNS, points(), run)
