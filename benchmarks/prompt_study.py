"""The studies of a prompt: how far its rows turn, and how far real tokens get.

    python benchmarks/prompt_study.py      # 40 minutes on one core

tinylm on Jane Austen's novels, prompts of 16 rows, three seeds.

prompt_turns.csv: 15 steps of 4 blocks from four starts, each at learning rates in proportion to the
standard deviation of its numbers. `angle` is the mean angle between a row and its start in degrees,
`norm_ratio` the mean ratio of their norms. Controls: every row scaled back to its first norm after
each step ("norm fixed", and "norm huge" for rows that outweigh what the blocks add), and only a
factor of each row trained ("direction frozen"). Scored on 48 test blocks; nothing is chosen by
them.
prompt_game.csv: prompts of real tokens, and the trained prompt of prefix_study.csv, on 64 test
blocks. The searches see 8 training blocks, and score a candidate on them as often as `evaluations`
says. "swaps": one token becomes another one, drawn from the training text or from those that the
gradient prefers, and stays if the loss falls. "passages": the best of so many passages of the
training text."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from common import SEEDS, base_of, fill_table, load

from peft_lessons import Prompt, fit, inject, load_model, load_tokenizer
from peft_lessons.methods.prompt import prepend, prompt_of

P, STEPS, BLOCKS = 16, 15, 4
STARTS = {"vocabulary": None, "N(0, 0.17²)": 0.17, "N(0, 1)": 1.0, "N(0, 5²)": 5.0}
HUGE = {"N(0, 125²)": 125.0}  # rows that outweigh what the blocks add; with fixed norms only
RELATIVE = (0.02, 0.08, 0.3, 1.2, 5.0)  # learning rates, in standard deviations of the start
FACTORS = (0.1,)  # learning rates of a factor of each row
TEXTS = {
    "told": "Please continue this novel by Jane Austen in her own style, with her characters",
    "shown": "he said that she would not have her, and he did not know her, but she",
}
TRIES, NOTED, SHORTLIST, SEEN = 80, (20, 80), 8, 8
RATE, TRAINED = 0.1, 40  # of the trained prompt, as prefix_study.csv chose it


@cache
def base() -> torch.nn.Module:
    """Return tinylm, frozen."""
    return load_model("tinylm").requires_grad_(False)


def table() -> torch.Tensor:
    """Return the embeddings (V, d)."""
    return base().get_input_embeddings().weight


def loss(rows: torch.Tensor, batch: dict) -> torch.Tensor:
    """Return the mean loss of all tokens but the first after a prompt (p, d)."""
    embeddings = prepend(rows, base().get_input_embeddings()(batch["input_ids"]))
    logits = base()(inputs_embeds=embeddings).logits[:, len(rows) : -1]  # (batch, T - 1, V)
    return F.cross_entropy(logits.mT, batch["labels"][:, 1:])


@cache
def blocks(split: str, size: int, seed: int) -> list[dict]:
    """Return so many blocks of a split, in batches of 16."""
    task = load("austen")
    batch = next(task.batches(split, size, seed=seed))
    return [{k: v[i : i + 16] for k, v in batch.items()} for i in range(0, size, 16)]


@torch.no_grad()
def perplexity(rows: torch.Tensor, split: str = "test", size: int = 64, seed: int = 19) -> float:
    """Return the perplexity of blocks of a split after a prompt (p, d)."""
    total = count = 0
    for batch in blocks(split, size, seed):
        here = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + here * loss(rows, batch).item(), count + here
    return math.exp(total / count)


def tokens_at_random() -> torch.Tensor:
    """Return P different tokens of the vocabulary."""
    return torch.randperm(len(table()))[:P]


# ------------------------------------------------------------------ how far rows turn


def turn(start: str, control: str, relative: float, seed: int) -> dict:
    """Train one prompt and return its measured columns."""
    if control == "none":
        rows = table()[:0]
        return {"lr": 0, "steps": 0, "test": f"{perplexity(rows, size=48):.5f}"}
    torch.manual_seed(seed)
    std = (STARTS | HUGE)[start]
    first = table()[tokens_at_random()] if std is None else std * torch.randn(P, table().shape[1])
    norms, frozen = first.norm(dim=1, keepdim=True), control == "direction frozen"
    lr = relative if frozen else relative * first.std().item()
    trained = torch.nn.Parameter(torch.ones(P, 1) if frozen else first.clone())
    optimizer = torch.optim.AdamW([trained], lr=lr, weight_decay=0)
    for _, batch in zip(range(STEPS), load("austen").stream(BLOCKS, seed), strict=False):
        loss(trained * first if frozen else trained, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if control.startswith("norm"):
            with torch.no_grad():
                trained.mul_(norms / trained.norm(dim=1, keepdim=True))
    rows = (trained * first if frozen else trained).detach()
    angles = F.cosine_similarity(first, rows, dim=1).clamp(-1, 1).arccos().rad2deg()
    return {
        "lr": f"{lr:.4g}",
        "steps": STEPS,
        "angle": f"{angles.mean():.2f}",
        "norm_ratio": f"{(rows.norm(dim=1) / norms[:, 0]).mean():.4f}",
        "test": f"{perplexity(rows, size=48):.5f}",
    }


def turns() -> list[tuple]:
    """Return all points of prompt_turns.csv, seed by seed."""
    points = [("none", "none", 0, 0)]
    for seed in SEEDS:
        points += [(start, "norm huge", rate, seed) for start in HUGE for rate in RELATIVE]
        for start in STARTS:
            for control in ("free", "norm fixed"):
                points += [(start, control, relative, seed) for relative in RELATIVE]
            points += [(start, "direction frozen", factor, seed) for factor in FACTORS]
    return points


# ------------------------------------------------------------------ how far real tokens get


@cache
def trained(seed: int) -> torch.Tensor:
    """Return the rows (p, d) of a prompt as prefix_study.csv trains it."""
    model = base_of("austen", seed)
    inject(model, Prompt(P))
    fit(model, load("austen"), TRAINED, lr=RATE, batch_size=BLOCKS, seed=seed, show=False)
    return prompt_of(model).prompt_embeddings.detach()


def nearest(rows: torch.Tensor) -> torch.Tensor:
    """Return the token nearest to each row by the angle."""
    return (F.normalize(rows, dim=1) @ F.normalize(table(), dim=1).T).argmax(1)


def passage() -> torch.Tensor:
    """Return P tokens that follow one another in the training text."""
    texts = load("austen")._splits["train"].tokens
    ids = torch.tensor(texts[int(torch.randint(len(texts), ()))])
    at = int(torch.randint(max(1, len(ids) - P), ()))
    return ids[at : at + P]


def row_of(tokens: torch.Tensor, **more) -> dict:
    """Return the columns of a prompt of real tokens."""
    text = load_tokenizer("tinylm").decode(tokens)
    return {"tokens": text, "test": f"{perplexity(table()[tokens]):.5f}"} | more


def search(tokens: torch.Tensor | None, seed: int) -> list[dict]:
    """Return the rows of a search, of swaps from these tokens on or of passages."""
    (batch,) = blocks("train", SEEN, 100 + seed)
    torch.manual_seed(seed)
    best, swaps, rows, gradient = math.inf, 0, [], None
    for tried in range(TRIES + 1):
        candidate = passage() if tokens is None or not tried else tokens.clone()
        if tokens is not None and not tried:
            candidate = tokens.clone()
        elif tokens is not None:
            at = int(torch.randint(P, ()))
            if tried % 2:
                candidate[at] = passage()[0]
            else:
                if gradient is None:
                    here = table()[tokens].clone().requires_grad_()
                    (gradient,) = torch.autograd.grad(loss(here, batch), here)
                likely = (table() @ gradient[at]).topk(SHORTLIST, largest=False).indices
                candidate[at] = likely[torch.randint(SHORTLIST, ())]
        with torch.no_grad():
            found = loss(table()[candidate], batch).item()
        if found < best:
            swaps += bool(tried)
            best, kept, gradient = found, candidate, None
            tokens = candidate if tokens is not None else None
        if tried in NOTED:
            train = f"{math.exp(best):.5f}"
            rows.append(row_of(kept, swaps=swaps, evaluations=tried, train=train))
    return rows


def game(way: str, seed: int) -> list[dict]:
    """Return the rows of a way to fill the prompt."""
    torch.manual_seed(seed)
    if way == "no prompt":
        return [{"test": f"{perplexity(table()[:0]):.5f}"}]
    if way == "random tokens":
        return [row_of(tokens_at_random())]
    if way in TEXTS:
        ids = load_tokenizer("tinylm")(TEXTS[way], add_special_tokens=False)["input_ids"]
        return [row_of(torch.tensor(ids[:P]))]
    if way == "swaps from random tokens":
        return search(tokens_at_random(), seed)
    if way == "passages":
        return search(None, seed)
    rows = trained(seed)
    if way == "trained":
        return [{"test": f"{perplexity(rows):.5f}"}]
    if way == "trained, norms of the vocabulary":
        rows = F.normalize(rows, dim=1) * table().norm(dim=1).mean()
        return [{"test": f"{perplexity(rows):.5f}"}]
    if way == "nearest tokens":
        return [row_of(nearest(rows))]
    return search(nearest(rows), seed)  # swaps from nearest tokens


GAME = {  # way: seeds
    "no prompt": 1,
    "random tokens": 4,
    "told": 1,
    "shown": 1,
    "passages": 3,
    "swaps from random tokens": 3,
    "nearest tokens": 3,
    "trained": 3,
    "trained, norms of the vocabulary": 3,
    "swaps from nearest tokens": 3,
}

if __name__ == "__main__":
    fill_table(
        "prompt_turns",
        ("start", "control", "relative", "seed"),
        ("lr", "steps", "angle", "norm_ratio", "test"),
        turns(),
        turn,
    )
    fill_table(
        "prompt_game",
        ("way", "seed"),
        ("swaps", "evaluations", "train", "test", "tokens"),
        [(way, seed) for way, seeds in GAME.items() for seed in range(seeds)],
        game,
    )
