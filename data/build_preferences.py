"""Rebuild data/tasks/preferences/: two answers of the bundled assistant to each question.

The rule that prefers: a complete answer of one sentence and at most 25 words beats a longer one.
Both answers are the assistant's own. For the short one it was asked for one short sentence, and
that request is then taken out of the question.
Samples depend on the processor's rounding: another machine gives other pairs of the same kind.
Run: python data/build_preferences.py (half an hour on one core)
"""

import bz2
import csv
import re
from functools import partial

import torch
from build_common import DATA, folder_of, record, table
from build_wordnet import UNFIT

from peft_lessons import load_model, load_tokenizer
from peft_lessons.train.generate import answer_questions, keeps_rule
from peft_lessons.train.loop import progress

FOLDER = "tasks/preferences"
CATEGORIES = ("animal", "artifact", "body", "food", "object", "plant")
SIZES = {"train": 192, "validation": 32, "test": 64}
QUESTION = 'What does the word "{}" mean?'
REQUEST = " Answer in one short sentence."
MOST_WORDS = 25
SHORT, LONG = 40, 64  # new tokens that are sampled
TRIES, BATCH, SEED = 2, 64, 0


def sentences(text: str) -> list[str]:
    """Split at sentence ends; what is not ended by a full stop is left out."""
    return re.findall(r"[^.!?]+[.!?](?=\s|$)", text)


def long(text: str, ended: bool) -> str | None:
    """Return the whole sentences of an answer that breaks the rule, or None."""
    text = "".join(sentences(text)).strip()
    return text if len(sentences(text)) > 1 and len(text.split()) > MOST_WORDS else None


def words_of(split: str) -> list[str]:
    """List the nouns of a split that have one of the concrete categories, in stored order."""
    packed = DATA / "tasks/wordnet/nouns.csv.bz2"
    with bz2.open(packed, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in CATEGORIES]
    return [
        row["word"]
        for row in rows
        if row["split"] == split and re.fullmatch(r"[a-z]{4,}( [a-z]{4,})?", row["word"])
    ]


def main() -> None:
    torch.manual_seed(SEED)
    model = load_model("smollm2", dtype=torch.bfloat16)
    tokenizer = load_tokenizer("smollm2")
    sampled = partial(answer_questions, model, tokenizer, size=BATCH, temperature=0.8)
    rows = []
    for split, size in SIZES.items():
        words, triples = iter(dict.fromkeys(words_of(split))), []
        bar = progress(range(size), split)
        while len(triples) < size:
            batch = [word for word, _ in zip(words, range(BATCH), strict=False)]
            if not batch:
                raise RuntimeError(f"{split}: only {len(triples)} pairs of {size}")
            questions = [QUESTION.format(word) for word in batch]
            rejected = [long(*answer) for answer in sampled(questions, LONG)]
            chosen = [None] * len(batch)
            for _ in range(TRIES):
                asked = [question + REQUEST for question in questions]
                tried = sampled(asked, SHORT)
                tried = [text if keeps_rule(text, ended) else None for text, ended in tried]
                chosen = [old or new for old, new in zip(chosen, tried, strict=True)]
            for triple in zip(questions, chosen, rejected, strict=True):
                if all(triple) and not UNFIT.search(" ".join(triple)) and len(triples) < size:
                    triples.append((split, *triple))
                    bar.update()
        bar.close()
        rows += triples
    content = table(("split", "prompt", "chosen", "rejected"), rows)
    (folder_of(FOLDER) / "pairs.csv.bz2").write_bytes(bz2.compress(content))
    record(FOLDER, "python data/build_preferences.py")


if __name__ == "__main__":
    main()
