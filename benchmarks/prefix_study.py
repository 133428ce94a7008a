"""The study of what a prefix is: a gated second attention beside the text's, and its controls.

    python benchmarks/prefix_study.py      # an hour on one core

tinylm on Jane Austen's novels, with three seeds; learning rates on both sides of the best one are
tried with one seed, and the validation split chooses.

prefix_study.csv: prefixes and prompts, one vector of biases after each attention, and LoRA of rank
1; 40 steps of 4 blocks, and for some of them the 100 steps of 16 blocks of additive_study.csv.
Prefixes also with a constant gate for each head, trained from 0.3 ("gate constant") or fixed there
("gate fixed"), and with a gate as always but a trained number for each head added to its log-odds,
so that it is 0.3 on average at the start ("gate shifted"). Short runs are scored on 48 blocks of
either split, long ones as in that table.
prefix_parts.csv: the trained ones with gate or content held constant, at the mean over validation
blocks of each layer and head.
prefix_places.csv: some of them by place, with the mean gate. Places count the text's tokens read.
prefix_fork.csv: a prompt that goes on as a prompt, or as free keys and values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from common import SEEDS, Results, around, base_of, fill_table, load
from transformers import AttentionInterface

from peft_lessons import LoRA, Prefix, Prompt, evaluate, fit, inject, load_model, measure
from peft_lessons.methods.prefix import init_prefix
from peft_lessons.methods.prompt import prompt_of

SHORT, LONG = 40, 100  # steps, of 4 blocks and of 16
BLOCKS = {SHORT: 4, LONG: 16}
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ARMS = {  # (arm, virtual tokens, steps): the learning rate to begin with
    ("prefix", 16, SHORT): 0.3,
    ("bias", 0, SHORT): 0.1,
    ("prefix", 1, SHORT): 1.0,
    ("prompt", 16, SHORT): 0.3,
    ("prefix, gate constant", 16, SHORT): 0.3,
    ("prefix", 4, SHORT): 0.3,
    ("prompt", 96, SHORT): 0.3,
    ("lora", 0, SHORT): 0.03,
}
CONTROLS = {
    ("prefix, gate constant", 1, SHORT): 0.3,
    ("prefix, gate shifted", 16, SHORT): 0.3,
    ("prefix, gate fixed", 16, SHORT): 0.3,
}
LATER = {("bias", 0, LONG): 0.1}
ONCE = [("prefix, gate constant", 16, LONG, lr, SEEDS[0]) for lr in (0.3, 1.0)]
HEADS = {  # arms with a trained number for each head, and where it starts
    "prefix, gate constant": math.log(0.3 / 0.7),  # the log-odds of the gate
    "prefix, gate fixed": math.log(0.3 / 0.7),  # the same, and not trained
    "prefix, gate shifted": 0.0,  # added to the log-odds; then set so that the mean gate is 0.3
}


# ------------------------------------------------------------------ attention in two parts


@dataclass
class Parts:
    """What the attention of a prefix's model takes for its gate and its content, and what it notes
    of them. Constants: {layer: tensor}; a missing one is computed."""

    p: int
    gates: dict = field(default_factory=dict)  # (n_h, 1), or (n_h, T)
    shifts: dict = field(default_factory=dict)  # (n_h, 1), added to the log-odds of the gate
    contents: dict = field(default_factory=dict)  # (n_h, 1, d_h)
    note: Callable | None = None


def two_attentions(module, query, key, value, attention_mask, scaling, **kwargs):
    """Return (1 − λ)·Attn(text) + λ·Attn(P), as the softmax over both does; texts are causal and
    padded on the right."""
    parts, (batch, heads, T, _) = module.parts, query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * scaling  # (batch, n_h, T, p + T)
    virtual, text = scores.split([parts.p, T], -1)
    text = text.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    gate = parts.gates.get(module.layer_idx)
    if gate is None:
        odds = virtual.logsumexp(-1) - text.logsumexp(-1)  # (batch, n_h, T)
        gate = (odds + parts.shifts.get(module.layer_idx, 0)).sigmoid()
    else:
        gate = gate[:, :T].expand(batch, heads, T)
    content = parts.contents.get(module.layer_idx)
    if content is None:
        content = virtual.softmax(-1) @ value[:, :, : parts.p]  # (batch, n_h, T, d_h)
    if parts.note:
        parts.note(module.layer_idx, gate, content)
    mixed = torch.lerp(text.softmax(-1) @ value[:, :, parts.p :], content, gate[..., None])
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("two attentions", two_attentions)


def split(model: torch.nn.Module, p: int) -> Parts:
    """Let a model with a prefix compute its attention in two parts, and return them."""
    parts = Parts(p)
    model.set_attn_implementation("two attentions")
    for layer in model.model.layers:
        layer.self_attn.parts = parts
    return parts


# ------------------------------------------------------------------ runs


def blocks_of(steps: int):
    """Return the task: 48 blocks of either split for a short run, those of the studies else."""
    task = load("austen")
    return task.limit(validation=48, test=48) if steps == SHORT else task


def build(arm: str, tokens: int, seed: int) -> torch.nn.Module:
    """Return tinylm with an arm, ready to train."""
    model = base_of("austen", seed)
    if arm == "lora":
        inject(model, LoRA(1, 2, ("q_proj", "v_proj")))
    elif arm == "bias":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    else:
        inject(model, Prompt(tokens) if arm == "prompt" else Prefix(tokens))
    if arm in HEADS:
        parts, shape = split(model, tokens), (model.config.num_attention_heads, 1)
        for index, layer in enumerate(model.model.layers):
            number = torch.nn.Parameter(torch.full(shape, HEADS[arm]), arm != "prefix, gate fixed")
            layer.self_attn.number = number
            if arm == "prefix, gate shifted":
                parts.shifts[index] = layer.self_attn.number
            else:
                parts.gates[index] = layer.self_attn.number
    if arm == "prefix, gate shifted":
        open_up(model, parts)
    return model


@torch.no_grad()
def open_up(model: torch.nn.Module, parts: Parts, rounds: int = 8) -> None:
    """Shift the log-odds of every gate so that its mean over eight training blocks is as large as a
    constant gate begins."""
    ids = next(load("austen").batches("train", 8))["input_ids"]
    for _ in range(rounds):
        gates = {}
        parts.note = lambda layer, gate, content, gates=gates: gates.update({layer: gate})
        model(ids)
        for layer, gate in gates.items():
            parts.shifts[layer] += (
                HEADS["prefix, gate constant"] - gate.mean((0, 2)).logit()[:, None]
            )
    parts.note = None


class Gates(dict):
    """Give trained numbers through a sigmoid."""

    def get(self, layer):
        return self[layer].sigmoid()


@cache
def trained(arm: str, tokens: int, steps: int, lr: float, seed: int) -> torch.nn.Module:
    """Return tinylm with a trained arm."""
    model = build(arm, tokens, seed)
    if arm in ("prefix, gate constant", "prefix, gate fixed"):
        parts = model.model.layers[0].self_attn.parts
        parts.gates = Gates(parts.gates)
    fit(model, load("austen"), steps, lr=lr, batch_size=BLOCKS[steps], seed=seed, show=False)
    return model


def run(arm: str, tokens: int, steps: int, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model, task = trained(arm, tokens, steps, lr, seed), blocks_of(steps)
    scores = {split: evaluate(model, task, split).perplexity for split in ("validation", "test")}
    return {"trainable": measure.parameters(model).trainable} | {
        name: f"{value:.5f}" for name, value in scores.items()
    }


def rates(results: Results, setting: tuple, center: float) -> dict[float, float]:
    """Return {learning rate: perplexity on validation} of the rates to try; NaN: not yet run."""
    key = tuple(map(str, setting))
    tried = {
        float(row["lr"]): float(row["validation"])
        for row in results.rows()
        if (row["arm"], row["tokens"], row["steps"], row["seed"]) == (*key, str(SEEDS[0]))
    }
    return {lr: tried.get(lr) for lr in around(tried, LADDER, LADDER.index(center))}


def points(arms: dict) -> Callable[[Results], list[tuple]]:
    """Return the points that are due by now, as a function of the table."""

    def due(results: Results) -> list[tuple]:
        found = []
        for setting, center in arms.items():
            tried = rates(results, setting, center)
            found += [(*setting, lr, SEEDS[0]) for lr in tried]
            if None not in tried.values():
                found += [(*setting, min(tried, key=tried.get), seed) for seed in SEEDS[1:]]
        return found

    return due


def best(arm: str, tokens: int, seed: int) -> torch.nn.Module:
    """Return a short run at the learning rate that validation chose."""
    setting = (arm, tokens, SHORT)
    tried = rates(Results("prefix_study", KEY, COLUMNS), setting, ARMS[setting])
    return trained(*setting, min(tried, key=tried.get), seed)


KEY = ("arm", "tokens", "steps", "lr", "seed")
COLUMNS = ("trainable", "validation", "test")


# ------------------------------------------------------------------ gate and content, held constant


def stored(prompted: torch.nn.Module) -> torch.nn.Module:
    """Return tinylm with the keys and values of a model's prompt as its prefix."""
    rows = prompt_of(prompted).prompt_embeddings.detach()
    model = load_model("tinylm")
    with torch.no_grad():
        layers = model(inputs_embeds=rows[None], use_cache=True).past_key_values.layers
    inject(model, Prefix(len(rows)))
    init_prefix(model, [(layer.keys[0], layer.values[0]) for layer in layers])
    return model


def means(model: torch.nn.Module, parts: Parts) -> dict[str, dict]:
    """Return the mean gate, gate by place and content of each layer over validation blocks."""
    sums = {"gate": {}, "place": {}, "content": {}}

    def note(layer, gate, content):
        for name, value in (
            ("gate", gate.mean((0, 2))[:, None]),  # (n_h, 1)
            ("place", gate.mean(0)),  # (n_h, T)
            ("content", content.mean((0, 2))[:, None]),  # (n_h, 1, d_h)
        ):
            sums[name].setdefault(layer, []).append(value)

    parts.note = note
    with torch.no_grad():
        for batch in blocks_of(SHORT).batches("validation", 16):
            model(batch["input_ids"])
    parts.note = None
    return {
        name: {layer: torch.stack(values).mean(0) for layer, values in of.items()}
        for name, of in sums.items()
    }


PLACES = (1, 2, 3, 5, 9, 17, 33, 65, 97, 128)  # where a bin of places begins; the last one ends


@torch.no_grad()
def by_place(model: torch.nn.Module, tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of the test blocks at each place (127,), and the targets there."""
    loss, count = torch.zeros(127), torch.zeros(127)
    for batch in blocks_of(SHORT).batches("test", 16):
        logits = model(batch["input_ids"]).logits[:, tokens:-1]  # (batch, T - 1, V)
        labels = batch["labels"][:, 1:]
        here = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        loss[: here.shape[1]] += here.sum(0)
        count[: here.shape[1]] += (labels != -100).sum(0)
    return loss, count


WAYS = {  # what is constant: (gate, content)
    "all": ("", ""),
    "content constant": ("", "content"),
    "gate constant": ("gate", ""),
    "both constant": ("gate", "content"),
}
TAKEN_APART = (("prefix", 16), ("prefix", 1), ("prompt", 16))


@cache
def parts_of(arm: str, tokens: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the rows of prefix_parts.csv, and those of prefix_places.csv of every part."""
    rows, places = [], []

    def add(way: str, model, of_gate=None) -> None:
        loss, count = by_place(model)
        perplexity = math.exp(loss.sum() / count.sum())
        rows.append({"part": way, "test": f"{perplexity:.5f}"})
        for first, after in pairwise(PLACES):
            here = slice(first - 1, after - 1)
            gate = "" if of_gate is None else f"{of_gate[here].mean():.5f}"
            places.append(
                {"part": way, "first": first, "last": after - 1, "gate": gate}
                | {"loss": f"{loss[here].sum() / count[here].sum():.5f}"}
                | {"targets": int(count[here].sum())}
            )

    if arm == "base":
        add("all", load_model("tinylm"))
        return rows, places
    model = best(arm, tokens, seed)
    model = stored(model) if arm == "prompt" else model
    parts = split(model, tokens)
    mean = means(model, parts)
    of_gate = torch.stack(list(mean["place"].values())).mean((0, 1))[:127]  # over layers, heads
    for way, (gate, content) in WAYS.items():
        parts.gates, parts.contents = mean.get(gate, {}), mean.get(content, {})
        add(way, model, of_gate if way == "all" else None)
    model.set_attn_implementation("sdpa")
    return rows, places


ALONG = (("prefix", 16), ("prompt", 16))


def places_of(arm: str, tokens: int, seed: int) -> list[dict]:
    """Return the rows of prefix_places.csv of one trained model."""
    _, places = parts_of(arm, tokens, seed)
    return [row for row in places if row["part"] in ("all", "gate constant")]


# ------------------------------------------------------------------ from prompt to prefix

HALF, EVERY = 30, 10
FORK_RATES = (0.1, 0.3, 1.0)


def walk(model: torch.nn.Module, lr: float, seed: int, first: int) -> list[dict]:
    """Train for HALF steps at a constant learning rate, with the blocks from step `first` on, and
    return perplexities every few steps."""
    task = load("austen")
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=lr, weight_decay=0)
    found = []
    for step, batch in enumerate(task.stream(4, seed)):
        if step < first:
            continue
        if (step - first) % EVERY == 0:
            scores = {s: evaluate(model, blocks_of(SHORT), s) for s in ("validation", "test")}
            found.append({"step": step} | {s: f"{v.perplexity:.5f}" for s, v in scores.items()})
        if step == first + HALF:
            return found
        batch = dict(batch, labels=batch["labels"].clone())
        batch["labels"][:, 0] = -100  # a prefix cannot predict a first token
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@cache
def begun(lr: float, seed: int) -> tuple[torch.nn.Module, list[dict]]:
    """Return a prompt after HALF steps, and its perplexities."""
    model = base_of("austen", seed)
    inject(model, Prompt(16))
    return model, walk(model, lr, seed, 0)


@cache
def branch(way: str, lr: float, seed: int, begin: float) -> tuple[torch.nn.Module, list[dict]]:
    """Return the prompt of `begun` after HALF more steps in a way, and its perplexities."""
    model, _ = begun(begin, seed)
    rows = prompt_of(model).prompt_embeddings.detach()
    after = stored(model)
    if way == "prompt":
        after = load_model("tinylm")
        inject(after, Prompt(16))
        with torch.no_grad():
            prompt_of(after).prompt_embeddings.copy_(rows)
    return after, walk(after, lr, seed, HALF)


def last(found: list[dict]) -> float:
    """Return the perplexity on validation at the end."""
    return float(found[-1]["validation"])


@cache
def chosen() -> tuple[float, float, float]:
    """Return the learning rates that validation chooses with the first seed: of the first half, of
    the prompt that goes on, and of the freed keys and values."""
    seed = SEEDS[0]
    begin = min(FORK_RATES, key=lambda lr: last(begun(lr, seed)[1]))
    each = (
        min(FORK_RATES, key=lambda lr, way=way: last(branch(way, lr, seed, begin)[1]))
        for way in ("prompt", "freed")
    )
    return begin, *each


def fork(seed: int) -> list[dict]:
    """Return the rows of prefix_fork.csv for a seed."""
    begin, *lrs = chosen()
    rows = [{"way": "begun", "lr": begin} | row for row in begun(begin, seed)[1]]
    for way, lr in zip(("prompt", "freed"), lrs, strict=True):
        _, found = branch(way, lr, seed, begin)
        rows += [{"way": way, "lr": lr} | row for row in found]
    return rows


if __name__ == "__main__":
    for arms in (ARMS, CONTROLS):
        fill_table("prefix_study", KEY, COLUMNS, points(arms), run)
    fill_table(
        "prefix_fork",
        ("seed",),
        ("way", "lr", "step", "validation", "test"),
        [(seed,) for seed in SEEDS],
        fork,
    )
    apart = [("base", 0, 0), *((*each, seed) for each in TAKEN_APART for seed in SEEDS)]
    key, columns = ("arm", "tokens", "seed"), ("part", "test")
    fill_table("prefix_parts", key, columns, apart, lambda *point: parts_of(*point)[0])
    columns = ("part", "first", "last", "gate", "loss", "targets")
    along = [point for point in apart if point[:2] in (("base", 0), *ALONG)]
    fill_table("prefix_places", key, columns, along, places_of)
    for due in (points(LATER), ONCE):
        fill_table("prefix_study", KEY, COLUMNS, due, run)
