"""What arrives at the user: the assistant with two trained adapters, in llama.cpp's server.

    python benchmarks/serving_study.py     # three quarters of an hour on one core

The assistant trains in float32 on the short movie reviews as in lesson 12 (task "reviews") and on
messages to a shop as in lesson 17 (task "desk"), with three seeds each. Then llama.cpp's server, on
one thread, scores the right answers to 128 held-out reviews and to all held-out messages. Adds a
row for each file and way to data/results/serving_study.csv. `file` is the format of the base or of
the merged model; "published" is the file in which the assistant was published (Q4_1), and
"transformers" is no file: the same measured in transformers, in float32. The ways:

- alone, merged, beside: the base without the adapter; the adapter merged and the sum rounded to the
  file's format; the adapter in a file of its own beside the base
- grammar: the base alone, which may write nothing but one of the right answers
- scale 0, scale 0.5: the adapter beside, with this scale in each request
- both loaded: the adapters of both tasks beside, and the task's own asked for by its name
- empty list: the same, but each request has an empty list of adapters; by default all of them
  count in full, as llama.cpp's own program sets it
- adapter unpermuted, model unpermuted, other pre-tokenizer, no chat template: an export's mistakes.
  In the first two, the rows of queries and keys keep transformers' order, in the adapter beside or
  in the merged model; in the others, the adapter is beside.
- adapter unscaled: one more mistake: alpha / r, which is 2, is forgotten, so that the adapter
  beside has half its strength

`whole` is the share of the held-out examples whose right answer is, to the letter and with the
token that ends it, the one that greedy generation gives, and `right` has one bit for each of the
`sentences`, the first one the lowest, in hexadecimal; `first`, the share whose first token is the
likeliest; `logp`, the mean log-probability of the right answer, the sum over its tokens; `largest`
and `mean`, how far that lies from the same in transformers with the adapter at the same scale;
`other_ids`, the share of prompts that are other tokens than in transformers; `perplexity`, that of
four passages of Jane Austen's novels, of 128 tokens each, with seed 0.
"""

import copy
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from unittest import mock

import gguf
import requests
import torch
from common import SEEDS, fill_table, hexadecimal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import DataCollatorForSeq2Seq

from peft_lessons import load_model, load_task, load_tokenizer
from peft_lessons.data.assistant import published_gguf
from peft_lessons.data.chat import chat_text, pair_tokens
from peft_lessons.deploy import adapter_to_gguf, serve, to_gguf

TASKS = {"reviews": (12, 5e-4), "desk": (24, 1e-3)}  # steps and learning rate
SIZE, REVIEWS = 4, 128
MISTAKES = ("adapter unpermuted", "model unpermuted", "other pre-tokenizer", "no chat template")
UNSCALED = "adapter unscaled"
SCALES = {"alone": 0.0, "grammar": 0.0, "scale 0": 0.0, "empty list": 0.0, "scale 0.5": 0.5}
KEY = ("task", "seed", "file", "way")
SCORES = ("whole", "first", "logp", "largest", "mean", "other_ids", "perplexity")
COLUMNS = (*SCORES, "sentences", "right")
PASSAGES, LENGTH = 4, 128
LINE = requests.Session()  # one connection for all requests


# ------------------------------------------------------------------ the adapters


@cache
def folder() -> Path:
    """Return a folder for files, which goes when the program ends."""
    kept = tempfile.TemporaryDirectory()
    folder.kept = kept
    return Path(kept.name)


def examples(task: str, split: str, seed: int = 0) -> list[dict]:
    """Return the examples of a task; of the reviews 128 with at most ten words, in random order."""
    rows = load_task(task).examples(split)
    if task == "reviews":
        rows = [row for row in rows if len(text_of(row).splitlines()[-1].split()) <= 10]
        random.Random(seed).shuffle(rows)
    return rows[:REVIEWS]


def text_of(row: dict) -> str:
    """Return the text of an example's only message."""
    return row["prompt"][-1]["content"]


def answer_of(row: dict) -> str:
    """Return the right answer of an example."""
    return row["completion"][-1]["content"]


def batches(task: str, seed: int) -> Iterator[dict]:
    """Yield the batches of a training run: those of lesson 12, and those of lesson 17."""
    steps, _ = TASKS[task]
    if task == "desk":
        yield from islice(load_task(task).stream(SIZE, seed), steps)
        return
    tokenizer, rows = load_tokenizer("smollm2"), examples(task, "train", seed)[: steps * SIZE]
    collate = DataCollatorForSeq2Seq(tokenizer)
    made = [pair_tokens(tokenizer, row["prompt"], row["completion"])[1:] for row in rows]
    encoded = [{"input_ids": ids, "labels": labels} for ids, labels in made]
    for k in range(0, len(rows), SIZE):
        yield collate(encoded[k : k + SIZE])


@cache
@torch.enable_grad()
def adapter(task: str, seed: int) -> Path:
    """Train an adapter as the lesson does, and return its folder."""
    steps, lr = TASKS[task]
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(load_model("smollm2"), config).train()
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches(task, seed):
        model(**batch).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    target = folder() / f"{task}-{seed}"
    model.save_pretrained(target)
    return target


@cache
def adapter_file(task: str, seed: int, permuted: bool = True) -> Path:
    """Return the adapter as a GGUF file."""
    file = folder() / f"{task}-{seed}-{permuted}.gguf"
    with ExitStack() as stack:
        if not permuted:
            stack.enter_context(unpermuted())
        return adapter_to_gguf(adapter(task, seed), file, base="smollm2")


# ------------------------------------------------------------------ the files


@contextmanager
def unpermuted() -> Iterator[None]:
    """Leave the rows of queries and keys in transformers' order."""
    with mock.patch("peft_lessons.deploy.export._side_by_side", lambda weight, heads: weight):
        yield


@contextmanager
def with_mistake(way: str) -> Iterator[None]:
    """Make one of the mistakes in the files that are written inside."""
    with ExitStack() as stack:
        if way == "model unpermuted":
            stack.enter_context(unpermuted())
        if way == "other pre-tokenizer":
            written = gguf.GGUFWriter.add_tokenizer_pre
            other = mock.patch.object(
                gguf.GGUFWriter, "add_tokenizer_pre", lambda writer, _: written(writer, "default")
            )
            stack.enter_context(other)
        if way == "no chat template":
            none = mock.patch.object(gguf.GGUFWriter, "add_chat_template", lambda *_: None)
            stack.enter_context(none)
        yield


@cache
def base_file(kind: str, way: str = "") -> Path:
    """Return the base in a format, or the published file."""
    if kind == "published":
        return published_gguf(folder())
    with with_mistake(way):
        return to_gguf("smollm2", folder() / f"base-{kind}{way}.gguf", kind)


@lru_cache(1)
def merged(task: str, seed: int) -> torch.nn.Module:
    """Return the model with an adapter merged into it, in float32."""
    model = PeftModel.from_pretrained(load_model("smollm2"), adapter(task, seed))
    return model.merge_and_unload()


def model_file(task: str, seed: int, kind: str, way: str) -> tuple[Path, dict[str, Path]]:
    """Return the file of a point, and the adapters that are loaded beside it, by their names."""
    if way in ("merged", "model unpermuted"):
        with with_mistake(way):
            tokenizer = load_tokenizer("smollm2")
            return to_gguf(merged(task, seed), folder() / "merged.gguf", kind, tokenizer), {}
    if way in ("alone", "grammar"):
        return base_file(kind), {}
    loaded = {task: adapter_file(task, seed, way != "adapter unpermuted")}
    if way in ("both loaded", "empty list"):
        loaded = {name: adapter_file(name, seed) for name in TASKS}
    return base_file(kind, way if way in MISTAKES[2:] else ""), loaded


# ------------------------------------------------------------------ the scores


def score(url: str, ids: Sequence[int], answer: Sequence[int], lora: list) -> tuple:
    """Return the log-probabilities of an answer's tokens after `ids`, and for each whether it is
    the likeliest.

    The server tells how likely the token is that it writes: a bias makes it write the one that is
    asked for, and the log-probability is that without the bias."""
    logps, likeliest = [], []
    for k, token in enumerate(answer):
        body = {"prompt": [*ids, *answer[:k]], "n_predict": 1, "n_probs": 1, "lora": lora}
        body |= {"temperature": 0, "logit_bias": [[token, 1000]]}
        reply = LINE.post(f"{url}/completion", json=body, timeout=600)
        reply.raise_for_status()
        (said,) = reply.json()["completion_probabilities"]
        if said["id"] != token:
            raise AssertionError(f"the server wrote {said['id']} where {token} was asked for")
        logps.append(said["logprob"])
        likeliest.append(said["top_logprobs"][0]["id"] == token)
    return logps, likeliest


@cache
def passages() -> list[list[int]]:
    """Return the passages of prose as ids."""
    task = load_task("austen", load_tokenizer("smollm2"), LENGTH)
    few = task.limit(test=PASSAGES)
    return [batch["input_ids"][0].tolist() for batch in few.batches("test", 1)]


@cache
def asked(task: str) -> list[tuple[list[int], list[int]]]:
    """Return each held-out prompt, and its right answer with its end, as transformers' ids."""
    tokenizer = load_tokenizer("smollm2")
    prompts = [chat_text(tokenizer, row["prompt"], ask=True) for row in examples(task, "test")]
    ends = [answer_of(row) + tokenizer.eos_token for row in examples(task, "test")]
    return [
        (tokenizer(prompt)["input_ids"], tokenizer(end)["input_ids"])
        for prompt, end in zip(prompts, ends, strict=True)
    ]


@cache
@torch.no_grad()
def in_transformers(task: str, seed: int, scale: float) -> dict:
    """Return what transformers gives, with the adapter at a scale: the log-probabilities of the
    right answers, whether their first tokens and all their tokens are the likeliest, and the
    perplexity."""
    model = load_model("smollm2")
    if scale:
        model = PeftModel.from_pretrained(model, adapter(task, seed))
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
    model.eval()
    found = {"logp": [], "first": [], "right": []}
    rows = [[*ids, *answer] for ids, answer in asked(task)]
    same = next(k for k in range(len(rows[0])) if len({row[k] for row in rows}) > 1)
    begun = model(torch.tensor([rows[0][:same]]), use_cache=True).past_key_values
    for k in range(0, len(rows), 32):  # what all begin with is read once; the ends are padding
        part = rows[k : k + 32]
        width, cache_of_part = max(map(len, part)), copy.deepcopy(begun)
        cache_of_part.batch_repeat_interleave(len(part))
        read = torch.tensor([row[same:] + [0] * (width - len(row)) for row in part])
        logits = model(read, past_key_values=cache_of_part).logits
        for row, (ids, answer) in enumerate(asked(task)[k : k + 32]):
            first = len(ids) - 1 - same
            near = logits[row, first : first + len(answer)].log_softmax(-1)
            likeliest = near.argmax(-1) == torch.tensor(answer)
            found["logp"].append(near[range(len(answer)), answer].sum().item())
            found["first"].append(likeliest[0].item())
            found["right"].append(likeliest.all().item())
    batch = torch.tensor(passages())
    return found | {"loss": model(batch, labels=batch).loss.item()}


def reads_prose(seed: int, way: str) -> bool:
    """Return whether a point has a perplexity."""
    return seed == SEEDS[0] and way in ("alone", "merged", "beside", UNSCALED, *MISTAKES)


def in_server(task: str, seed: int, kind: str, way: str) -> dict:
    """Return the same of a file in llama.cpp's server, and the share of prompts in other ids."""
    file, loaded = model_file(task, seed, kind, way)
    rows, found = examples(task, "test"), {"logp": [], "first": [], "right": [], "other": 0}
    choices = sorted({answer_of(row) for row in rows})
    with serve(file, loaded, check=way != "no chat template") as server:
        scale = 0.5 if way == UNSCALED else SCALES.get(way, 1.0)
        lora = server.lora({task: scale} if loaded else None)
        if way == "empty list":
            on = server.lora(dict.fromkeys(loaded, 1.0))  # as llama.cpp loads adapters by itself
            requests.post(f"{server.url}/lora-adapters", json=on, timeout=600).raise_for_status()
            lora = []
        for row, (theirs, answer) in zip(rows, asked(task), strict=True):
            ids = server.tokens(row["prompt"])
            found["other"] += (ids != theirs) / len(rows)
            logps, likeliest = score(server.url, ids, answer, lora)
            found["logp"].append(sum(logps))
            found["first"].append(likeliest[0])
            if way == "grammar":
                text = server.ask(row["prompt"], choices=choices)
                likeliest = [text == answer_of(row)]
            found["right"].append(all(likeliest))
        if reads_prose(seed, way):
            prose = [score(server.url, ids[:1], ids[1:], lora)[0] for ids in passages()]
            found["loss"] = -sum(map(sum, prose)) / sum(map(len, prose))
    return found


def run(task: str, seed: int, kind: str, way: str) -> dict:
    """Return the measured columns of a point."""
    theirs = in_transformers(task, seed, SCALES.get(way, 1.0))
    found = theirs if kind == "transformers" else in_server(task, seed, kind, way)
    count = len(found["right"])
    apart = [abs(a - b) for a, b in zip(found["logp"], theirs["logp"], strict=True)]
    return {
        "whole": f"{sum(found['right']) / count:.4f}",
        "first": f"{sum(found['first']) / count:.4f}",
        "logp": f"{sum(found['logp']) / count:.4f}",
        "largest": f"{max(apart):.2g}",
        "mean": f"{sum(apart) / count:.2g}",
        "other_ids": f"{found.get('other', 0):.4g}",
        "perplexity": f"{math.exp(found['loss']):.2f}" if reads_prose(seed, way) else "",
        "sentences": count,
        "right": hexadecimal(found["right"]),
    }


def points() -> list[tuple]:
    """Return all points: what decides, with each seed; the bases, the mistakes and how requests
    choose adapters, on reviews with one."""
    most = [("transformers", "beside"), *((kind, "merged") for kind in ("Q8_0", "Q4_1", "Q4_0"))]
    most += [("published", "beside"), ("Q4_0", "beside")]
    more = [("F16", way) for way in ("merged", "beside", *MISTAKES)]
    more += [("F32", "merged"), ("Q8_0", "beside"), ("Q8_0", "adapter unpermuted")]
    more += [("published", UNSCALED), ("Q4_1", "other pre-tokenizer")]
    more += [(kind, "alone") for kind in ("published", "Q4_0", "transformers")]
    more += [("published", "grammar"), ("F16", "scale 0"), ("F16", "scale 0.5")]
    more += [("transformers", "scale 0.5"), ("F16", "both loaded"), ("F16", "empty list")]
    few = [("transformers", "beside"), ("Q4_1", "merged"), ("published", "beside")]
    rows = [("reviews", seed, *row) for seed in SEEDS for row in most]
    rows += [("reviews", SEEDS[0], *row) for row in more]
    return rows + [("desk", seed, *row) for seed in SEEDS for row in few]


if __name__ == "__main__":
    fill_table("serving_study", KEY, COLUMNS, points(), run)
