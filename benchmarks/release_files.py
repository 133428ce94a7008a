"""Five files that may ship, as the exercise "defend a release" of lesson 17 shows them.

    python benchmarks/release_files.py     # five minutes on one core

The assistant with the adapter of the task "reviews", seed 0, as serving_study.py has measured it:
run that first. Adds a row for each file to data/results/release_files.csv: "trainer" is
transformers in float32 with the adapter beside, the others are letters, and `FILES` says what they
are. `mb` has the bytes of all files, in millions; `right`, the share of whole answers, of `of`;
`behind`, how many points of it lie behind the trainer's, with `low` and `high`, the 95 % interval
over the reviews; `gap`, the largest difference of the right answer's log-probability to the
trainer's; `other_ids`, the share of prompts that are other tokens; `perplexity`, that of prose;
`changed`, how many of ten unrelated requests the file answers in other words than the base in the
same format does, in the first 24 tokens.
"""

import os
from pathlib import Path

import serving_study
from common import fill_table
from pandas import DataFrame
from peft import PeftModel
from requests_study import REQUESTS

from peft_lessons import load_model, load_tokenizer
from peft_lessons.deploy import serve
from peft_lessons.studies import load_results, paired_answers
from peft_lessons.train.generate import answer_questions

TASK, SEED, UNRELATED, TOKENS = "reviews", 0, list(REQUESTS)[::4][:10], 24
KEY = ("file",)
COLUMNS = (
    *("mb", "right", "of", "behind", "low", "high", "gap", "other_ids", "perplexity", "changed"),
)
FILES = {
    "trainer": ("transformers", "beside"),
    "A": ("F16", "merged"),
    "B": ("Q4_1", "merged"),
    "C": ("Q8_0", "adapter unpermuted"),
    "D": ("published", "beside"),
    "E": ("Q4_1", "other pre-tokenizer"),
}


def measured(file: str, way: str) -> DataFrame:
    """Return the row of serving_study.csv."""
    return load_results("serving_study", task=TASK, seed=SEED, file=file, way=way)


def by_trainer() -> tuple[int, list[str], list[str]]:
    """Return the bytes of the model with its adapter in transformers, and what it answers to the
    unrelated requests with the adapter and without."""
    model = PeftModel.from_pretrained(load_model("smollm2"), serving_study.adapter(TASK, SEED))
    tokenizer, size = load_tokenizer("smollm2"), sum(p.nbytes for p in model.parameters())
    said = answer_questions(model.eval(), tokenizer, UNRELATED, TOKENS)
    with model.disable_adapter():
        return size, said, answer_questions(model, tokenizer, UNRELATED, TOKENS)


def by_server(file: Path, loaded: dict[str, Path]) -> list[str]:
    """Return what a file answers to them."""
    with serve(file, loaded) as server:
        return [server.ask(text, next(iter(loaded), None), max_tokens=TOKENS) for text in UNRELATED]


def run(letter: str) -> dict:
    """Return the measured columns of a file."""
    kind, way = FILES[letter]
    found = measured(kind, way)
    apart, row = paired_answers(found, measured(*FILES["trainer"])), found.iloc[0]
    if kind == "transformers":
        size, *answers = by_trainer()
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
        "other_ids": f"{row['other_ids']:g}",
        "perplexity": row["perplexity"],
        "changed": sum(a != b for a, b in zip(*answers, strict=True)),
    }


if __name__ == "__main__":
    fill_table("release_files", KEY, COLUMNS, [(letter,) for letter in FILES], run)
