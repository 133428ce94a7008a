"""One healthy training by rewards and four broken ones, for an exercise of lesson 16: diagnose.

    python benchmarks/broken_rewards.py     # five minutes on one core

Asked for in each run: sums of two numbers, LoRA of rank 8 (alpha 16) on all linear layers of the
assistant's weights, 12 steps of 8 sums with 8 answers of up to 4 tokens, AdamW at 3e-4, a reward of
1 for exactly the sum and a line break. Adds a row for each run to data/results/broken_rewards.csv;
`FAULTS` says what is wrong with a run.

Of each step: `reward` is the mean reward, `flat` the share of the groups whose rewards are all
equal, `length` the answers' mean length in tokens, and `surprisal` the mean of -log π over the
tokens that were sampled."""

import torch
from common import fill_table

from peft_lessons import LoRA, inject, load_model, load_tokenizer
from peft_lessons.data.sums import sum_prompt, sums
from peft_lessons.train.rewards import reinforce

HEALTHY = "healthy"
FAULTS = {
    HEALTHY: "",
    "A": "any number is paid",
    "B": "asked in a chat",
    "C": "ten times the learning rate",
    "D": "a hundredth of the learning rate",
}
STEPS, SEED, RATE = 12, 0, 3e-4
COLUMNS = ("reward", "flat", "length", "surprisal")


def is_sum(text: str, a: int, b: int, end: str = "\n") -> float:
    return float(text == f"{a + b}{end}")


def is_number(text: str, a: int, b: int) -> float:
    return float(text.endswith("\n") and text[:-1].isdigit())


def train(run: str) -> dict:
    """Train one run and return its curves."""
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    torch.manual_seed(SEED)
    inject(model, LoRA(rank=8, alpha=16))
    pairs, end, reward = sums("train"), "\n", is_number if run == "A" else is_sum
    problems = [(sum_prompt(a, b), (a, b)) for a, b in pairs]
    if run == "B":
        end = tokenizer.eos_token
        problems = []
        for a, b in pairs:
            chat = [{"role": "user", "content": f"What is {a} + {b}?"}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            problems.append((prompt, (a, b, end)))
    rate = RATE * {"C": 10, "D": 0.01}.get(run, 1)
    history = reinforce(model, tokenizer, problems, reward, STEPS, lr=rate, end=end, seed=SEED)
    return {
        column: " ".join(f"{value:.3f}" for value in getattr(history, column)) for column in COLUMNS
    }


if __name__ == "__main__":
    fill_table("broken_rewards", ("run",), COLUMNS, [(run,) for run in FAULTS], train)
