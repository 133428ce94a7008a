"""Five files that may ship, as the exercise "defend a release" of lesson 17 shows them.

    python benchmarks/release_files.py     # five minutes on one core

The assistant with the adapter of the task "desk", as in serving_study.py, seed 0. Adds a row for
each file to data/results/release_files.csv: "trainer" is transformers in float32 with the adapter
beside, the others are letters, and `FILES` says what they are. `mb` has the bytes of all files, in
millions; `right`, the share of whole answers, of `of`; `behind`, how many points of it lie behind
the trainer's, with `low` and `high`, the 95 % interval over the messages; `gap`, the largest
difference of the right answer's log-probability to the trainer's; `other_ids`, the share of prompts
that are other tokens; `perplexity`, that of prose; `changed`, how many of ten unrelated requests
the file answers in other words than the base in the same format does, in the first 24 tokens.
"""

import os
from functools import cache
from pathlib import Path

import serving_study
from common import fill_table
from pandas import DataFrame
from peft import PeftModel
from requests_study import REQUESTS

from peft_lessons import load_model, load_tokenizer
from peft_lessons.deploy import serve
from peft_lessons.studies import paired_answers
from peft_lessons.train.generate import answer_questions

TASK, SEED, UNRELATED, TOKENS = "desk", 0, list(REQUESTS)[::4][:10], 24
KEY = ("file",)
COLUMNS = (
    *("mb", "right", "of", "behind", "low", "high", "gap", "other_ids", "perplexity", "changed"),
)
FILES = {
    "trainer": ("transformers", "beside"),
    "A": ("F16", "merged"),
    "B": ("Q4_1", "merged"),
    "C": ("Q8_0", "adapter unpermuted"),
    "D": ("Q4_1", "beside"),
    "E": ("Q4_1", "other pre-tokenizer"),
}


@cache
def measured(kind: str, way: str) -> dict:
    """Return the row of serving_study.csv."""
    return serving_study.run(TASK, SEED, kind, way)


def by_trainer(trained: bool) -> list[str]:
    """Return what transformers answers to the unrelated requests, with or without the adapter."""
    model = load_model("smollm2")
    if trained:
        model = PeftModel.from_pretrained(model, serving_study.adapter(TASK, SEED))
    said = answer_questions(model.eval(), load_tokenizer("smollm2"), UNRELATED, TOKENS)
    return [text for text, _ in said]


def by_server(file: Path, loaded: dict[str, Path]) -> list[str]:
    """Return what a file answers to them."""
    with serve(file, loaded) as server:
        return [server.ask(text, next(iter(loaded), None), max_tokens=TOKENS) for text in UNRELATED]


def run(letter: str) -> dict:
    """Return the measured columns of a file."""
    kind, way = FILES[letter]
    row, trainer = measured(kind, way), measured(*FILES["trainer"])
    apart = paired_answers(DataFrame([row]), DataFrame([trainer]))
    if kind == "transformers":
        size = sum(p.nbytes for p in load_model("smollm2").parameters())
        answers = by_trainer(True), by_trainer(False)
    else:
        file, loaded = serving_study.model_file(TASK, SEED, kind, way)
        size = sum(os.path.getsize(each) for each in (file, *loaded.values()))
        answers = by_server(file, loaded), by_server(serving_study.base_file(kind), {})
    return {
        "mb": f"{size / 1e6:.1f}",
        "right": row["whole"],
        "of": row["sentences"],
        "behind": f"{-apart.mean:.1f}",
        "low": f"{-apart.high:.1f}",
        "high": f"{-apart.low:.1f}",
        "gap": row["largest"],
        "other_ids": row["other_ids"],
        "perplexity": row["perplexity"],
        "changed": sum(a != b for a, b in zip(*answers, strict=True)),
    }


if __name__ == "__main__":
    fill_table("release_files", KEY, COLUMNS, [(letter,) for letter in FILES], run)
