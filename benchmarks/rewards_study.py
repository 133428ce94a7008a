"""The study of rewards: the bundled assistant learns to add from "right" and "wrong" alone.

    python benchmarks/rewards_study.py       # an hour on one core

Adds a row for each run to data/results/rewards_study.csv: 12 steps of 8 sums with 8 sampled answers
each. How little trains: LoRA of rank 64, 8 and 1 in all linear layers, of rank 1 in one layer and
in one matrix, and norms alone, each at its best learning rate on validation sums. The controls: the
untrained model with one and more examples in its prompt, as many written answers to learn from, and
rewards drawn at random. Rewards that pay for the wrong thing, and a penalty for leaving the base.
"""

import random
import time

import torch
from common import SEEDS, around, fill_table, hexadecimal

from peft_lessons import LoRA, PartialFineTuning, disabled, inject, load_model, load_tokenizer
from peft_lessons.data.sums import EXAMPLES, sum_prompt, sums
from peft_lessons.train.rewards import (
    Answers,
    answer_chances,
    reinforce,
    sample_answers,
    token_logprobs,
)

STEPS, PROMPTS, GROUP, HELD_OUT = 12, 8, 8, 200
KEY = ("arm", "size", "lr", "seed")
MEASURED = ("steps", "trainable", "validation", "greedy", "chance", "larger", "larger_chance")
CURVES = ("reward", "flat", "length", "surprisal")
COLUMNS = (*MEASURED, "paid", "seconds", *CURVES, "texts", "right", "chances")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CONTROL = 3e-4  # the best one of rank 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = tuple(f"layers.15.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in LINEAR)
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
LEARNERS = {  # what trains, and the learning rate that the search begins with
    ("matrix", 1): (LoRA(rank=1, alpha=16, targets=LAYER[-1:]), 3e-3),
    ("lora", 8): (LoRA(rank=8, alpha=16, targets=LINEAR), 3e-4),
    ("lora", 1): (LoRA(rank=1, alpha=16, targets=LINEAR), 3e-4),
    ("sft", 8): (LoRA(rank=8, alpha=16, targets=LINEAR), 3e-4),
    ("norms", 0): (PartialFineTuning(patterns=NORMS), 3e-3),
    ("lora", 64): (LoRA(rank=64, alpha=16, targets=LINEAR), 3e-4),
    ("layer", 1): (LoRA(rank=1, alpha=16, targets=LAYER), 3e-3),
}


def exact(text: str, a: int, b: int) -> float:
    """Pay for the sum and a line break."""
    return float(text.endswith("\n") and text[:-1] == str(a + b))


def number(text: str, a: int, b: int) -> float:
    """Pay for any number and a line break."""
    return float(text[:-1].isdigit() and text.endswith("\n"))


def occurs(text: str, a: int, b: int) -> float:
    """Pay for the right number anywhere in the answer."""
    return float(str(a + b) in text)


def swapped(text: str, a: int, b: int) -> float:
    """Pay for any answer that occurs in the right number, as a slip of the arguments has it."""
    return float(text.strip() in str(a + b))


def at_random(seed: int):
    """Return a reward that flips a coin."""
    draw = random.Random(seed)
    return lambda text, a, b: float(draw.random() < 0.5)


REWARDS = {"number": number, "occurs": occurs, "swapped": swapped}


def judged(model, tokenizer, pairs, shown: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chance of the right answer to each sum, and whether greedy decoding writes it."""
    chances, greedy = torch.zeros(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool)
    wanted = [f"{a + b}\n" for a, b in pairs]
    for length in {len(text) for text in wanted}:
        rows = [k for k, text in enumerate(wanted) if len(text) == length]
        for start in range(0, len(rows), 50):
            some = rows[start : start + 50]
            prompts = [shown + sum_prompt(*pairs[k], examples=0) for k in some]
            found = answer_chances(model, tokenizer, prompts, [wanted[k] for k in some])
            chances[some], greedy[some] = found
    return chances, greedy


@torch.no_grad()
def likeliest(model, tokenizer, shown: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each sum the chance of the right answer among all numbers of two digits, and
    whether it is the likeliest of them: all that repeating the model's own preferences can give."""
    numbers = [f"{n}\n" for n in range(10, 100)]
    ids = torch.tensor(tokenizer(numbers, add_special_tokens=False)["input_ids"])
    shares, right = [], []
    for a, b in sums("test")[:HELD_OUT]:
        prompt = tokenizer(shown + sum_prompt(a, b, 0), return_tensors="pt")["input_ids"]
        whole = torch.ones(2, *ids.shape)
        answers = Answers(prompt, len(numbers), ids, *whole, numbers)
        share = token_logprobs(model, answers).sum(dim=1).softmax(0)
        shares.append(share[a + b - 10])
        right.append(share.argmax() == a + b - 10)
    return torch.stack(shares), torch.stack(right)


def tested(chances: torch.Tensor, greedy: torch.Tensor) -> dict:
    """Return what a row says of the test sums, one by one and on average."""
    powers = (-100 * chances.double().clamp(min=1e-9).log10()).round().int().tolist()
    return {
        "greedy": f"{greedy.float().mean().item():.4f}",
        "chance": f"{chances.mean().item():.4f}",
        "right": hexadecimal(greedy.tolist()),
        "chances": " ".join(map(str, powers)),  # -100 log10 of each
    }


def scores(model, tokenizer, shown: str, reward, tokens: int) -> dict:
    """Return what a row says of a model: sums that it has not seen."""
    validation, _ = judged(model, tokenizer, sums("validation"), shown)
    chances, greedy = judged(model, tokenizer, sums("test")[:HELD_OUT], shown)
    larger, larger_greedy = judged(model, tokenizer, sums("larger"), shown)
    pairs = sums("test")[:48]
    prompts = [shown + sum_prompt(*pair, examples=0) for pair in pairs]
    texts = sample_answers(model, tokenizer, prompts, 1, tokens, greedy=True).texts
    paid = [reward(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
    share = {
        "validation": validation.mean(),
        "larger": larger_greedy.float().mean(),
        "larger_chance": larger.mean(),
        "paid": sum(paid) / len(paid),
    }
    return {name: f"{float(value):.4f}" for name, value in share.items()} | {
        "texts": "|".join(text.replace("\n", "⏎") for text in texts[:6]),
        **tested(chances, greedy),
    }


def taught(model, tokenizer, pairs, lr: float, seed: int) -> None:
    """Learn from as many written answers as a run has sums, in the same order."""
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=lr, weight_decay=0.0)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(STEPS):
        some = [pairs[k] for k in order[step * PROMPTS : (step + 1) * PROMPTS]]
        prompts = tokenizer([sum_prompt(*pair) for pair in some])["input_ids"]
        written = tokenizer([f"{a + b}\n" for a, b in some])["input_ids"]
        ids = torch.tensor([p + w for p, w in zip(prompts, written, strict=True)])
        labels = ids.clone()
        labels[:, : len(prompts[0])] = -100
        model(ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(training, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run(arm: str, size: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    tokenizer, model = load_tokenizer("smollm2"), load_model("smollm2", dtype=torch.float32)
    shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in EXAMPLES[:1])
    reward, tokens, started = exact, 4, time.process_time()
    row = {"steps": 0, "trainable": 0}
    if arm in ("base", "other", "mode"):  # `size` examples, or one that is another one
        some = EXAMPLES[seed : seed + 1] if arm == "other" else EXAMPLES[:size]
        shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in some)
    else:
        torch.manual_seed(seed)
        method, _ = LEARNERS.get((arm, size), LEARNERS["lora", 8])
        row["trainable"] = inject(model, method).trainable
        row["steps"] = steps = 20 if arm == "occurs" else STEPS
        pairs = sums("train")
        if arm == "sft":
            taught(model, tokenizer, pairs, lr, seed)
        else:
            reward = at_random(seed) if arm == "random" else REWARDS.get(arm, exact)
            tokens = 12 if arm == "occurs" else 4
            options = {"beta": 0.1, "reference": disabled} if arm == "kl" else {}
            problems = [(sum_prompt(*pair), pair) for pair in pairs]
            history = reinforce(
                model,
                tokenizer,
                problems,
                reward,
                steps,
                lr=lr,
                tokens=tokens,
                seed=seed,
                **options,
            )
            for name in CURVES:
                row[name] = " ".join(f"{value:.2f}" for value in getattr(history, name))
    row["seconds"] = f"{time.process_time() - started:.1f}"
    model.eval()
    if arm == "mode":
        chances, right = likeliest(model, tokenizer, shown)
        return row | tested(chances, right)
    row |= scores(model, tokenizer, shown, reward, tokens)
    learner = arm == "base" or (arm, size) in LEARNERS
    return row if learner else row | {"chances": ""}


def points(results) -> list[tuple]:
    """Return the runs that are due by now, those that decide first."""
    tried = {}
    for row in results.rows():
        if row["seed"] == "0" and row["validation"]:
            named = tried.setdefault((row["arm"], int(row["size"])), {})
            named[float(row["lr"])] = -float(row["validation"])

    def search(*setting) -> list[tuple]:
        found, center = tried.get(setting, {}), RATES.index(LEARNERS[setting][1])
        rates = around(found, RATES, center)
        seeds = SEEDS[1:] if all(rate in found for rate in rates) else ()
        first = [(*setting, rate, 0) for rate in rates]
        return first + [(*setting, min(rates, key=found.get), seed) for seed in seeds]

    def controls(*arms: str, seeds=SEEDS, lr: float = CONTROL) -> list[tuple]:
        return [(arm, 8, lr, seed) for seed in seeds for arm in arms]

    due = [("base", 1, 0.0, 0), ("mode", 1, 0.0, 0)]
    due += search("matrix", 1) + search("lora", 8) + search("lora", 1)
    due += controls("number", "random", "occurs", seeds=(0,))
    due += search("sft", 8) + search("norms", 0) + search("lora", 64)
    due += controls("occurs", seeds=(0,), lr=1e-3)
    due += [("base", size, 0.0, 0) for size in (2, 4, 8)]
    due += [("norms", 0, 1e-3, seed) for seed in SEEDS]  # at 3e-3 one seed in three learns
    due += controls("number", lr=1e-3) + controls("swapped", seeds=(0,))
    due += controls("number", "random") + search("layer", 1)
    due += controls("lora", lr=3e-3) + [("other", 1, 0.0, seed) for seed in range(1, 5)]
    due += controls("random", lr=1e-4) + controls("random", seeds=(0,), lr=1e-3)
    due += controls("kl", seeds=(0,))
    return list(dict.fromkeys(due))


if __name__ == "__main__":
    fill_table("rewards_study", KEY, COLUMNS, points, run)
