"""The study of a real language model: the bundled assistant learns to write definitions.

    python benchmarks/assistant_study.py    # two hours on one core

The assistant (SmolLM2-135M-Instruct) trains on 320 questions and answers of the task "definitions",
once through, in 40 steps of 8; only the answer and its end token count in the loss. Adds a row for
each run to data/results/assistant_study.csv. The learning rate is chosen by the validation split,
and more are tried as long as the best lies at the edge of those that were tried.

What is frozen is in bfloat16, what trains in float32, and products are in bfloat16. There is no
QLoRA: the bundled weights were rounded to another 4-bit format before, and a second rounding says
nothing of the first.
`validation` and `test` are means, over answers, of the loss per token of an answer, in nats;
`losses` holds those of the test split, so that any two runs can be paired. `memory` is the
perplexity of Jane Austen's novels, of which no step has seen anything.
"""

from functools import cache

import torch
from choosing_study import widened
from common import RUN, Results, at_best, fill_table, in_float32

from peft_lessons import evaluate, fit, freeze, inject, load_task, measure
from peft_lessons.data.base_models import load_model, load_tokenizer
from peft_lessons.engine import Method
from peft_lessons.methods.dora import DoRA
from peft_lessons.methods.ia3 import IA3
from peft_lessons.methods.lora import LoRA
from peft_lessons.methods.prompt import Prompt
from peft_lessons.methods.selective import PartialFineTuning
from peft_lessons.train.loop import History

STEPS, SIZES = 40, {"validation": 96, "test": 192}
LOW, MIDDLE, HIGH = (1e-5, 3e-5, 1e-4), (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
RATES = {
    "base": (0.0,),
    "lora": MIDDLE,
    "full": LOW,
    "dora": MIDDLE,
    "rslora": (1e-4, 3e-4, 1e-3),
    "ia3": HIGH,
    "last two": (1e-4, 3e-4, 1e-3),
    "prompt": HIGH,
}
COLUMNS = ("steps", "trainable", "validation", "test", "memory", "seconds_per_step", "losses")
TASK, KEY = "definitions", ("task", "method", *RUN)


def described(method: str) -> Method:
    """Return the description of a method on the assistant."""
    tokenizer, text = load_tokenizer("smollm2"), "Answer as a dictionary would, with a definition."
    return {
        "lora": LoRA(rank=8, alpha=16),
        "dora": DoRA(rank=8, alpha=16),
        "rslora": LoRA(rank=64, alpha=16, rslora=True),
        "ia3": IA3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
        "last two": PartialFineTuning(last=2),
        "prompt": Prompt(16, init=text, tokenizer=tokenizer),
    }[method]


def build(method: str, seed: int) -> torch.nn.Module:
    """Return the assistant with a method in it, what trains in float32, ready to train."""
    model = load_model("smollm2", dtype=torch.bfloat16)
    torch.manual_seed(seed)
    if method == "base":
        freeze(model)
    elif method != "full":
        inject(model, described(method))
    in_float32(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


@torch.no_grad()
def answer_losses(model: torch.nn.Module, task, split: str) -> list[float]:
    """Return for each answer of a split its mean loss per token, in nats. The order of the answers
    is the same for every model."""
    model.eval()
    means = []
    for batch in task.batches(split, 16, by_length=True):
        labels = batch.pop("labels")  # (answers, tokens)
        logits = model(**batch).logits[:, -labels.shape[1] :].float()  # behind a prompt, if any
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        learned = labels[:, 1:] != -100
        means += (losses.sum(dim=1) / learned.sum(dim=1)).tolist()
    return means


@cache
def tasks() -> tuple:
    """Return the questions that are learned, and novels of which nothing is."""
    austen = load_task("austen", load_tokenizer("smollm2")).limit(validation=24)
    return load_task(TASK).limit(train=8 * STEPS, **SIZES), austen


def run(name: str, method: str, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    task, austen = tasks()
    model = build(method, seed)
    trainable = measure.parameters(model).trainable
    history = History()
    if lr:
        history = fit(model, task, STEPS, lr=lr, batch_size=8, seed=seed, show=False)
    losses, chosen = (answer_losses(model, task, split) for split in ("test", "validation"))
    return {
        "steps": STEPS if lr else 0,
        "trainable": trainable,
        "validation": f"{sum(chosen) / len(chosen):.5f}",
        "test": f"{sum(losses) / len(losses):.5f}",
        "memory": f"{evaluate(model, austen, 'validation', batch_size=8).perplexity:.4f}",
        "seconds_per_step": f"{history.seconds / STEPS:.3f}",
        "losses": " ".join(f"{loss:.3f}" for loss in losses),
    }


def points(results: Results) -> list[tuple]:
    """Return the points that are due: more rates as long as the best lies at the edge."""
    rates = {}
    for method, start in RATES.items():
        rows = [row for row in results.rows() if (row["method"], row["seed"]) == (method, "0")]
        tried = {float(row["lr"]): float(row["validation"]) for row in rows}
        rates[TASK, method] = widened(start, tried, min) if any(start) else start
    return at_best(rates, min)(results)


if __name__ == "__main__":
    fill_table("assistant_study", KEY, COLUMNS, points, run)
