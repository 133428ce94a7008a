"""The preference study: the bundled assistant learns to answer in one short sentence.

    python benchmarks/preference_study.py       # an hour on one core

Adds a row for each run to data/results/preference_study.csv. A run is 24 steps of 4 pairs, or twice
that: SFT first and then SFT or DPO, whose reference is the model after SFT. "less bad" trains on
pairs in which no answer keeps the rule: of three answers that the base samples without a request,
and that have two sentences or more, the one with the fewest words is chosen and the one with the
most is rejected. "no sigmoid" is DPO without σ: minus the margin is the loss, so every pair has the
same weight at every step. "end token" trains nothing: `beta` is added to the logit of the end
token.

`lr` and `beta` are those of the last stage; SFT before it takes 0.0003. `right` has one bit for
each held-out question whose answer keeps the rule, `tuning` is the share of 32 other questions.
`weights`, `chosen_path` and `rejected_path` hold for each step the means over its pairs of
σ(−margin) and of both log-ratios. The other ratios are those of held-out pairs to the untrained
base; `end_ratio` is that of the end token of the chosen answer alone.

In training the base computes in bfloat16, and what trains is in float32. The model that answers is
merged, in float32.
"""

import re
from functools import cache
from itertools import islice

import numpy as np
import torch
from common import SEEDS, Results, fill_table, hexadecimal
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from peft_lessons import (
    LoRA,
    evaluate,
    inject,
    load_model,
    load_task,
    load_tokenizer,
    merge,
    unload,
)
from peft_lessons.data.chat import assistant, chat_tokens, user
from peft_lessons.train.generate import answer_questions, keeps_rule
from peft_lessons.train.preferences import preference_loss

STEPS, PAIRS, TOKENS, STORY = 24, 4, 48, 256
RATE = 3e-4
SAMPLES, SENTENCE = 3, r"[^.!?]+[.!?](?=\s|$)"
THINGS = ("cat", "lantern", "river", "soldier", "garden", "clock", "letter", "bridge")
KEY = ("method", "beta", "lr", "seed")
COLUMNS = ("steps", "last_loss", "sentences", "right", "kept", "words", "story_words")
COLUMNS += ("stories_ended", "chosen_ratio", "rejected_ratio", "perplexity")
PATHS = ("weights", "chosen_path", "rejected_path")
COLUMNS += ("tuning", "end_ratio", *PATHS)

# What seed 0 tries, (beta, lr), where the validation questions choose what runs with more seeds.
TUNED = {
    "less bad, sft": ((0.0, RATE), (0.0, 1e-3)),
    "less bad, dpo": ((1.0, RATE), (0.1, 1e-4), (0.1, RATE)),
    "sft, sft": ((0.0, RATE),),
    "sft, dpo": ((1.0, RATE), (1.0, 1e-4)),
}
MAIN = (("sft", 0.0, RATE), ("dpo", 1.0, RATE), ("dpo", 0.1, RATE), ("dpo, no sigmoid", 1.0, RATE))


def points(results: Results) -> list[tuple]:
    """Return the points that are due by now."""
    rows = {tuple(row[column] for column in KEY): row for row in results.rows()}
    tried = [(method, *pair, 0) for method, pairs in TUNED.items() for pair in pairs]
    chosen = []
    for method, pairs in TUNED.items():
        found = {pair: rows.get(tuple(map(str, (method, *pair, 0)))) for pair in pairs}
        if all(found.values()):
            best = max(pairs, key=lambda pair, found=found: float(found[pair]["tuning"]))
            chosen += [(method, *best, seed) for seed in SEEDS[1:]]
    return [
        *((method, 0.0, 0.0, 0) for method in ("none", "asked")),
        *(("end token", bias, 0.0, 0) for bias in (4.0, 6.0, 8.0, 10.0)),
        *((*point, seed) for seed in SEEDS for point in MAIN),
        *(("dpo", beta, 1e-3, 0) for beta in (1.0, 0.1)),
        *tried,
        *chosen,
    ]


def logprobs(model, ids, mask, labels) -> tuple[torch.Tensor, ...]:
    """Return the log-probability (rows,) of each row's labels, how many labels it has, and the
    log-probability of the last one, the end token.

    As `answer_logprob` of the package, in less time: only what is learned goes through the head."""
    longest = int(mask.sum(dim=1).max())
    inputs = {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}
    hidden = model.model(use_cache=False, **inputs).last_hidden_state[:, :-1]
    wanted = labels[:, 1:longest]
    learned = wanted != -100
    each = model.lm_head(hidden[learned]).float().log_softmax(-1)
    each = each.gather(-1, wanted[learned][:, None])[:, 0]
    sums = each.new_zeros(len(wanted)).index_add(0, learned.nonzero()[:, 0], each)
    counts = learned.sum(dim=1)
    return sums, counts, each[counts.cumsum(0) - 1]


def halves(batch: dict) -> list[tuple[torch.Tensor, ...]]:
    """Return ids, mask and labels of the chosen answers, and of the rejected ones."""
    names = ("input_ids", "attention_mask", "labels")
    return [*zip(*(batch[name].chunk(2) for name in names), strict=True)]


def both_logprobs(model, batch: dict) -> torch.Tensor:
    """Return the log-probability of each answer, (2 · pairs,)."""
    return torch.cat([logprobs(model, *half)[0] for half in halves(batch)])


@cache
def less_bad() -> list[dict]:
    """Return batches of pairs in which no answer keeps the rule, on questions of the training
    split."""
    torch.manual_seed(0)
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16), load_tokenizer("smollm2")
    questions = [e["prompt"][0]["content"] for e in load_task("preferences").examples("train")]
    tried = [answer_questions(model, tokenizer, questions, 64, 64, 0.8) for _ in range(SAMPLES)]
    pairs = []
    for question, *answers in zip(questions, *tried, strict=True):
        parts = [re.findall(SENTENCE, text) for text, _ in answers]
        broken = sorted(("".join(part).strip() for part in parts if len(part) > 1), key=words)
        if len(broken) > 1 and words(broken[0]) + 5 <= words(broken[-1]):
            pairs.append((question, broken[0], broken[-1]))
    pairs.sort(key=lambda pair: words(pair[2]))  # little padding
    starts = range(0, len(pairs) - PAIRS + 1, PAIRS)
    return [batch_of(tokenizer, pairs[k : k + PAIRS]) for k in starts]


def words(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


def batch_of(tokenizer, pairs: list[tuple[str, str, str]]) -> dict[str, torch.Tensor]:
    """Return a batch of (question, chosen, rejected), the chosen answers first."""
    chats = [[user(pair[0]), assistant(pair[k])] for k in (1, 2) for pair in pairs]
    _, ids, labels = zip(*(chat_tokens(tokenizer, chat) for chat in chats), strict=True)
    columns = {"input_ids": (ids, 0), "labels": (labels, -100)}
    columns["attention_mask"] = ([[1] * len(row) for row in ids], 0)
    return {
        name: pad_sequence([torch.tensor(row) for row in rows], True, value)
        for name, (rows, value) in columns.items()
    }


@cache
def batches_of(worse: bool, seed: int) -> list[dict]:
    """Return the batches of a seed's steps, in their order."""
    if worse:
        order = np.random.default_rng(seed).permutation(len(less_bad()))
        return [less_bad()[k] for k in order]
    return [*islice(load_task("preferences").stream(PAIRS, seed), 2 * STEPS)]


@cache
def base_logprobs(worse: bool, seed: int, step: int) -> torch.Tensor:
    """Return the untrained base's log-probabilities of a batch."""
    base = load_model("smollm2", dtype=torch.bfloat16)
    with torch.no_grad():
        return both_logprobs(base, batches_of(worse, seed)[step])


def held_out_logprobs(model) -> torch.Tensor:
    """Return the log-probabilities (3, pairs) of held-out pairs: of the chosen answers, of the
    rejected ones, and of the end tokens of the chosen ones."""
    found = []
    with torch.no_grad():
        for batch in load_task("preferences").limit(test=32).batches("test", 4):
            (chosen, _, ends), (rejected, _, _) = (logprobs(model, *x) for x in halves(batch))
            found.append(torch.stack((chosen, rejected, ends)))
    return torch.cat(found, dim=1)


@cache
def base_held_out() -> torch.Tensor:
    """Return the same of the untrained base."""
    return held_out_logprobs(load_model("smollm2", dtype=torch.bfloat16))


def train(model, kind: str, batches: list[dict], references: list, beta: float, lr: float):
    """Train on the batches; return losses and, for each step, the mean σ(−margin) and the mean
    log-ratios of the chosen and the rejected answers."""
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=lr, weight_decay=0.0)
    losses, paths, warm_up = [], [], STEPS / 10
    for step, (batch, reference) in enumerate(zip(batches, references, strict=True)):
        for group in optimizer.param_groups:  # then down to 0
            down = (STEPS - step) / (STEPS - warm_up)
            group["lr"] = lr * min(1.0, down, (step + 1) / warm_up)
        if kind == "sft":
            sums, counts, _ = logprobs(model, *halves(batch)[0])
            loss = -sums.sum() / counts.sum()
        else:
            policy = both_logprobs(model, batch)
            loss, rewards = preference_loss(policy, reference, beta)
            chosen, rejected = rewards.chunk(2)
            if kind == "no sigmoid":
                loss = (rejected - chosen).mean()
            weight = torch.sigmoid(rejected - chosen).mean().item()
            paths.append((weight, chosen.mean().item() / beta, rejected.mean().item() / beta))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, paths


def pair_scores(model) -> dict[str, float]:
    """Return what a row says of a model's probabilities: of held-out pairs, and of other text."""
    chosen, rejected, end = held_out_logprobs(model) - base_held_out()
    austen = load_task("austen", load_tokenizer("smollm2")).limit(validation=16)
    return {
        "chosen_ratio": chosen.mean().item(),
        "rejected_ratio": rejected.mean().item(),
        "end_ratio": end.mean().item(),
        "perplexity": evaluate(model, austen, "validation", batch_size=8).perplexity,
    }


def written(
    model, questions: list[str], limits: list[int], bias: float = 0.0
) -> list[tuple[str, bool]]:
    """Return the likeliest answer to each question, of up to so many tokens, and whether the model
    ended it itself. As `answer_questions`, but rows that are done leave the batch.

    bias: what is added to the logit of the end token at every position."""
    tokenizer = load_tokenizer("smollm2")
    chats = [[user(question)] for question in questions]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask, cache = given["input_ids"], given["attention_mask"], DynamicCache()
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rows, new, done = [*range(len(texts))], [[] for _ in texts], [False] * len(texts)
    while rows:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        with torch.no_grad():
            scores = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        scores[:, tokenizer.eos_token_id] += bias
        picked = scores.argmax(dim=-1)
        for row, token in zip(rows, picked.tolist(), strict=True):
            if not done[row] and len(new[row]) < limits[row]:
                done[row] = token == tokenizer.eos_token_id
                new[row] += [] if done[row] else [token]
        open_rows = [not done[row] and len(new[row]) < limits[row] for row in rows]
        keep = torch.tensor(open_rows).nonzero()[:, 0]
        if len(keep) > 0.8 * len(rows):  # to leave a batch costs a copy of the cache
            keep = torch.arange(len(rows))
        else:
            cache.batch_select_indices(keep)
        rows, ids = [rows[k] for k in keep], picked[keep][:, None]
        mask = torch.cat([mask[keep], mask.new_ones(len(keep), 1)], dim=1)
        places = places[keep][:, -1:] + 1
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [(text.strip(), end) for text, end in zip(texts, done, strict=True)]


def answer_scores(model, request: str, tuned: bool, bias: float) -> dict:
    """Return what a row says of a model's answers: to held-out questions, and to a request for a
    story."""
    task = load_task("preferences")

    def questions(split: str) -> list[str]:
        return [e["prompt"][0]["content"] + request for e in task.examples(split)]

    asked, tries = questions("test"), questions("validation") if tuned else []
    stories = [f"Tell me a story about a {thing}." for thing in THINGS]
    limits = [TOKENS] * (len(asked) + len(tries)) + [STORY] * len(stories)
    answers = written(model, [*asked, *tries, *stories], limits, bias)
    stories, right = answers[-len(THINGS) :], [keeps_rule(*answer) for answer in answers]
    validation, right = right[len(asked) : -len(THINGS)], right[: len(asked)]
    return {
        "sentences": len(asked),
        "right": hexadecimal(right),
        "kept": sum(right) / len(right),
        "words": sum(words(text) for text, _ in answers[: len(asked)]) / len(asked),
        "story_words": sum(words(text) for text, _ in stories) / len(stories),
        "stories_ended": sum(ended for _, ended in stories) / len(stories),
    } | ({"tuning": sum(validation) / len(validation)} if tuned else {})


def run(method: str, beta: float, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns; at a rate of 0 nothing trains."""
    model = load_model("smollm2", dtype=torch.bfloat16)
    torch.manual_seed(seed)
    inject(model, LoRA(rank=8, alpha=16))
    *first, kind = method.split(", ")
    row: dict = {"steps": 0}
    if lr:
        worse = "less bad" in first
        batches, references = batches_of(worse, seed), [None] * STEPS
        if "sft" in first:
            train(model, "sft", batches[:STEPS], references, 0.0, RATE)
            batches = batches[STEPS:]
        batches = batches[:STEPS]
        if "sft" in first and kind == "dpo":
            with torch.no_grad():
                references = [both_logprobs(model, batch) for batch in batches]
        elif kind != "sft":
            references = [base_logprobs(worse, seed, step) for step in range(STEPS)]
        losses, paths = train(model, kind, batches, references, beta, lr)
        row["steps"] = STEPS * (1 + ("sft" in first))
        row["last_loss"] = sum(losses[-10:]) / len(losses[-10:])
        for name, values in zip(PATHS, zip(*paths, strict=True), strict=bool(paths)):
            row[name] = " ".join(f"{value:.{3 if name == PATHS[0] else 1}f}" for value in values)
    if method != "end token":
        row |= pair_scores(model)
    merge(model.float())
    request = " Answer in one short sentence." if method == "asked" else ""
    tuned, bias = method in TUNED and seed == 0, beta if method == "end token" else 0.0
    row |= answer_scores(unload(model), request, tuned, bias)
    row = {k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()}
    return dict.fromkeys(COLUMNS, "nan") | dict.fromkeys(PATHS, "") | row


if __name__ == "__main__":
    fill_table("preference_study", KEY, COLUMNS, points, run)
