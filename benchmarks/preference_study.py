"""The preference study: the bundled assistant learns by DPO to answer in one short sentence.

    python benchmarks/preference_study.py       # an hour on one core

Adds a row for each run to data/results/preference_study.csv: learning rates and values of beta with
three seeds each, log-probabilities summed and averaged, supervised fine-tuning on the preferred
answers alone, and the untrained assistant, asked for a short sentence or not. The base computes in
bfloat16, what trains is in float32.
"""

import torch
from common import SEEDS, fill_table, in_float32

from peft_lessons import LoRA, disabled, evaluate, inject, load_model, load_task, load_tokenizer
from peft_lessons.train.generate import answer_questions, keeps_rule
from peft_lessons.train.preferences import answer_logprob, preference_loss

STEPS, PAIRS, HELD_OUT, TOKENS = 24, 4, 48, 48
RATES, RATE = (1e-4, 3e-4, 1e-3), 3e-4
THINGS = ("cat", "lantern", "river", "soldier", "garden", "clock", "letter", "bridge")
KEY = ("method", "beta", "lr", "seed")
SETTINGS = [
    *(("dpo", beta, lr) for beta in (0.1, 1.0) for lr in RATES),
    ("dpo", 0.01, RATE),
    # A mean over tokens is some thirty times smaller than a sum; beta makes up for it.
    ("dpo, mean", 3.0, RATE),
    ("sft", 0.0, RATE),
]


def logprobs(model, batch: dict, mean: bool) -> torch.Tensor:
    """Return the log-probability of each answer, (2 · pairs,), as a sum or a mean over tokens."""
    sums = answer_logprob(model, batch)
    return sums / (batch["labels"][:, 1:] != -100).sum(dim=1) if mean else sums


def compared(model, batch: dict, beta: float, mean: bool) -> tuple[torch.Tensor, ...]:
    """Return DPO's loss, the rewards (pairs,) of both answers, and the log-ratios (2 · pairs,)."""
    with torch.no_grad(), disabled(model):
        reference = logprobs(model, batch, mean)
    policy = logprobs(model, batch, mean)
    loss, rewards = preference_loss(policy, reference, beta)
    return loss, *rewards.chunk(2), (policy - reference).detach()


def perplexity(model) -> float:
    """Return the perplexity on Jane Austen's novels, which no step has seen."""
    task = load_task("austen", load_tokenizer("smollm2"))
    return evaluate(model, task.limit(validation=32), "validation", batch_size=8).perplexity


def scores(model, task, method: str, beta: float) -> dict[str, str]:
    """Return what a row says of a model: answers to held-out questions, pairs, and other text."""
    tokenizer = load_tokenizer("smollm2")
    request = " Answer in one short sentence." if method == "asked" else ""
    examples = task.examples("test")[:HELD_OUT]
    questions = [example["prompt"][0]["content"] + request for example in examples]
    answers = answer_questions(model, tokenizer, questions, tokens=TOKENS)
    requests = [f"Tell me a story about a {thing}." for thing in THINGS]
    stories = answer_questions(model, tokenizer, requests, tokens=64)
    margins, ratios = [], []
    with torch.no_grad():
        for batch in task.limit(test=HELD_OUT).batches("test", 8):
            _, chosen, rejected, ratio = compared(model, batch, beta, method == "dpo, mean")
            margins += [chosen - rejected]
            ratios += [torch.stack(ratio.chunk(2))]
    margin, ratio = torch.cat(margins), torch.cat(ratios, dim=1).mean(dim=1)
    values = {
        "kept": sum(keeps_rule(*answer) for answer in answers) / len(answers),
        "ended": sum(ended for _, ended in answers) / len(answers),
        "words": sum(len(text.split()) for text, _ in answers) / len(answers),
        "story_words": sum(len(text.split()) for text, _ in stories) / len(stories),
        "pairs_right": (margin > 0).double().mean().item(),
        "margin": margin.mean().item(),
        "chosen_ratio": ratio[0].item(),
        "rejected_ratio": ratio[1].item(),
        "perplexity": perplexity(model),
    }
    return {name: f"{value:.5f}" for name, value in values.items()}


def run(method: str, beta: float, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns; at a rate of 0 nothing trains."""
    steps = STEPS if lr else 0
    model = load_model("smollm2", dtype=torch.bfloat16)
    torch.manual_seed(seed)
    inject(model, LoRA(rank=8, alpha=16))
    in_float32(model)
    task = load_task("preferences")
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=lr, weight_decay=0.0)
    batches, losses = task.stream(PAIRS, seed), []
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:  # a tenth of warm-up, then down to 0
            group["lr"] = lr * min((step + 1) / (steps / 10), (steps - step) / (0.9 * steps))
        if method == "sft":
            chosen = {name: rows[:PAIRS] for name, rows in batch.items()}
            loss = model(**chosen).loss
        else:
            loss = compared(model, batch, beta, method == "dpo, mean")[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    row = scores(model, task, method, beta or 1.0)
    losses = losses or [float("nan")]
    ends = {"first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])}
    return {"steps": steps} | {k: f"{v:.5f}" for k, v in ends.items()} | row


if __name__ == "__main__":
    columns = ("steps", "first_loss", "last_loss", "kept", "ended", "words", "story_words")
    columns += ("pairs_right", "margin", "chosen_ratio", "rejected_ratio", "perplexity")
    untrained = [(method, 0.0, 0.0, 0) for method in ("none", "asked")]
    points = [*untrained, *((*setting, seed) for seed in SEEDS for setting in SETTINGS)]
    fill_table("preference_study", KEY, columns, points, run)
