"""Five files that may ship, as the exercise "defend a release" of lesson 17 shows them.

    python benchmarks/release_files.py     # a minute on one core

The assistant with the adapter of the task "reviews", seed 0, as serving_study.py has measured it:
run that first. Adds a row for each file to data/results/release_files.csv: "trainer" is
transformers in float32 with the adapter beside, the others are letters, and `FILES` says what they
are. `mb` has the bytes of all files, in millions; `right`, the share of whole answers, of `of`;
`behind`, how many points of it lie behind the trainer's, with `low` and `high`, the 95 % interval
over the reviews; `gap`, the mean difference of the right answer's log-probability to the trainer's;
`other_ids`, the share of prompts that are other tokens; `perplexity`, that of prose.
"""

import os

import serving_study
from common import fill_table
from pandas import DataFrame
from peft import PeftModel

from peft_lessons import load_model
from peft_lessons.studies import load_results, paired_answers

TASK, SEED, KEY = "reviews", 0, ("file",)
COLUMNS = ("mb", "right", "of", "behind", "low", "high", "gap", "other_ids", "perplexity")
FILES = {
    "trainer": ("transformers", "beside"),
    "A": ("Q8_0", "merged"),
    "B": ("Q4_1", "merged"),
    "C": ("published", "adapter unscaled"),
    "D": ("published", "beside"),
    "E": ("Q4_1", "other pre-tokenizer"),
}


def measured(letter: str) -> DataFrame:
    """Return a file's row of serving_study.csv."""
    file, way = FILES[letter]
    return load_results("serving_study", task=TASK, seed=SEED, file=file, way=way)


def size(letter: str) -> int:
    """Return the bytes of a file with its adapter, or of the model in transformers."""
    kind, way = FILES[letter]
    if kind == "transformers":
        folder = serving_study.adapter(TASK, SEED)
        model = PeftModel.from_pretrained(load_model("smollm2"), folder)
        return sum(parameter.nbytes for parameter in model.parameters())
    file, loaded = serving_study.model_file(TASK, SEED, kind, way)
    return sum(os.path.getsize(each) for each in (file, *loaded.values()))


def run(letter: str) -> dict:
    """Return the columns of a file."""
    found = measured(letter)
    apart, row = paired_answers(found, measured("trainer")), found.iloc[0]
    return {
        "mb": f"{size(letter) / 1e6:.1f}",
        "right": row["whole"],
        "of": row["sentences"],
        "behind": f"{0 - apart.mean:.1f}",
        "low": f"{0 - apart.high:.1f}",
        "high": f"{0 - apart.low:.1f}",
        "gap": row["mean"],
        "other_ids": row["other_ids"],
        "perplexity": row["perplexity"],
    }


if __name__ == "__main__":
    fill_table("release_files", KEY, COLUMNS, [(letter,) for letter in FILES], run)
