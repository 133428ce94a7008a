"""The study of the recipe of lesson 12: which learning rate teaches an assistant to obey?

    python benchmarks/assistant_study.py      # half an hour on one core

LoRA of rank 8 on all linear layers of SmolLM2-135M-Instruct, in bfloat16 with float32 factors: 60
steps of 8 movie reviews with the loop `fit`. Adds a row for each
learning rate and seed, and for the assistant as it is (a rate of 0), to
data/results/assistant_study.csv: of 160 test reviews, the share whose answer begins with the right
word, the share in which the right word is likelier than the wrong one, and the mean loss.
"""

from functools import partial

import torch
from common import SEEDS, Results, fill, missing
from peft import LoraConfig, get_peft_model

from peft_lessons import fit, load_model, load_task, load_tokenizer

RATES, STEPS, SIZE, TESTED = (1e-4, 3e-4, 1e-3), 60, 8, 160
KEY, COLUMNS = ("lr", "seed"), ("first_token_right", "right_likelier", "loss", "seconds_per_step")


@torch.no_grad()
def measured(model, task, first: torch.Tensor) -> dict[str, str]:
    """Return the three measures; `first` (2,) holds the first tokens of the two answers."""
    hits, knows, losses = [], [], []
    for batch in task.batches("test", 16):
        labels = batch["labels"]
        out = model.eval()(**batch)
        answer = (labels != -100).int().argmax(1)  # (16,): where each answer begins
        rows = torch.arange(len(labels))
        logits = out.logits[rows, answer - 1]  # (16, V)
        right = labels[rows, answer]
        both = logits[:, first]
        hits.append(logits.argmax(1) == right)
        knows.append(first[both.argmax(1)] == right)
        losses.append(out.loss.float() * len(labels))
    hits, knows = torch.cat(hits), torch.cat(knows)
    return {
        "first_token_right": f"{hits.float().mean():.5f}",
        "right_likelier": f"{knows.float().mean():.5f}",
        "loss": f"{sum(losses) / len(hits):.5f}",
    }


def run(task, first: torch.Tensor, lr: float, seed: int) -> dict[str, str]:
    """Train one point, at a rate of 0 none, and return its columns."""
    torch.manual_seed(seed)
    model = load_model("smollm2", dtype=torch.bfloat16)
    pace = 0.0
    if lr:
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, config)
        history = fit(model, task, STEPS, lr=lr, batch_size=SIZE, seed=seed, show=False)
        pace = history.seconds / STEPS
    return measured(model, task, first) | {"seconds_per_step": f"{pace:.4f}"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    reviews, tokenizer = load_task("reviews").limit(test=TESTED), load_tokenizer("smollm2")
    words = torch.tensor([tokenizer(word)["input_ids"][0] for word in reviews.label_names])
    results = Results("assistant_study", (*KEY, *COLUMNS))
    points = [(0, 0), *((lr, seed) for lr in RATES for seed in SEEDS)]
    fill(results, KEY, lambda: missing(results, KEY, points), partial(run, reviews, words))
