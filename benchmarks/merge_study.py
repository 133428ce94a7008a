"""What is left of a trained change when it is merged and rounded: the study behind lesson 17.

    python benchmarks/merge_study.py     # an hour on one core

The assistant learns movie reviews as in lesson 12 ("reviews") and messages to a shop ("desk", half
of lesson 17's steps), tinylm learns from Austen's novels, all in float32. The assistant was
published in Q4_1, so its own weights lie on that grid; tinylm's were never in four bits. Other
bases are the own weights rounded to another grid, or with noise of half a step of Q4_1. The change
ΔW of each linear layer is merged, and the layer is rounded to each of the grids; or W alone is
rounded, and the adapter stays beside it. Embeddings and norms are not rounded.

`change`: "lora" as it was trained; "shuffled", with its entries in random order; "scaled"; "none";
"in blocks", from a LoRA whose ΔW is equal within each block of 32, so that the offsets of Q4_1 can
hold it (after QA-LoRA, Xu et al. 2023); "cured", rounded to a grid of Q4_1 whose blocks begin 16
weights later, or at random up or down to the levels of the base.

Adds a row for each export to data/results/merge_study.csv. With q for rounding, over all layers:
`share`, <q(W+ΔW) - q(W), ΔW> / <ΔW, ΔW>; `ends`, the part of the share that comes from the weights
that set the scale of their block; `noise`, the norm of what else has moved, relative to ΔW's;
`half_steps`, the norm of ΔW relative to that of half a step of Q4_1; `crossed`, the share of
weights that move by more than a quarter of a step of Q4_1: in four bits, to another level. `right`,
of 64 held-out reviews, the likeliest first word is the right one, or of 72 messages the whole
answer; `likelier`, of the two words it is the right one; `p` and `logprob`, the means of the right
word; `perplexity`, with seed 0, of four passages of Austen, for tinylm of 60 blocks held out.
"""

from functools import cache, lru_cache
from itertools import islice

import numpy as np
import requests_study as reviews
import torch
from common import SEEDS, fill_table
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize
from transformers import DataCollatorForSeq2Seq

from peft_lessons import deploy, evaluate, fit, load_model, load_task
from peft_lessons.methods.qlora import dequantize_nf4, quantize_nf4

KEY = ("task", "base", "change", "lr", "rank", "seed")
MOVED = ("share", "ends", "noise", "half_steps", "crossed")
SCORES = ("right", "likelier", "p", "logprob", "perplexity")
COLUMNS = ("steps", "train_loss", "scale", "export", "adapter", *MOVED, *SCORES)
SIZE, BLOCK, REVIEWS = 4, 32, 64
LR, RANK = {"reviews": 5e-4, "desk": 1e-3, "austen": 3e-2}, 8  # lesson 12's, 17's, the best one
EXPORTS = {  # of a base: merged onto these, and the adapter beside the base rounded to these
    "own": (("F32", "Q4_1", "Q4_0", "NF4", "Q8_0", "BF16"), ("Q4_1", "Q4_0")),
    "Q4_1": (("F32", "Q4_1", "Q4_0", "NF4"), ("Q4_0",)),  # Austen alone
    "Q4_0": (("F32", "Q4_0", "NF4", "Q4_1"), ()),
    "NF4": (("F32", "NF4", "Q4_1", "Q4_0"), ()),
    "noise": (("F32", "Q4_1", "Q4_0", "NF4"), ()),
    "Q8_0": (("F32", "Q8_0"), ()),
}
CURES = ("Q4_1, blocks moved by half", "Q4_1, drawn at random")


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight (out, in) as a file of a kind gives it back, in float32."""
    if kind == "BF16":
        return weight.bfloat16().float()
    if kind == "NF4":
        return dequantize_nf4(*quantize_nf4(weight), weight.shape)
    return deploy.rounded(weight, kind)


def blocks_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight in the blocks that share a scale, (blocks, weights)."""
    return weight.reshape(-1, 64 if kind == "NF4" else BLOCK)


def steps_of(weight: torch.Tensor) -> torch.Tensor:
    """Return the distance of two levels of Q4_1 in each block of a weight, (blocks, 1)."""
    low, high = blocks_of(weight, "Q4_1").aminmax(dim=1, keepdim=True)
    return (high - low) / 15


def drawn(weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Round a weight to the base's levels of Q4_1, up or down at random: right on average."""
    low, steps = blocks_of(base, "Q4_1").amin(dim=1, keepdim=True), steps_of(base)
    levels = (blocks_of(weight, "Q4_1") - low) / steps.clamp(min=1e-12)
    codes = (levels + torch.rand(levels.shape)).floor().clamp(0, 15)
    return (low + codes * steps).view_as(weight)


def exported(weight: torch.Tensor, base: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight as an export gives it back, for the cures with the base that it came from."""
    if kind == CURES[0]:
        return rounded(weight.roll(BLOCK // 2, dims=1), "Q4_1").roll(-BLOCK // 2, dims=1)
    return drawn(weight, base) if kind == CURES[1] else rounded(weight, kind)


def setting(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return which weights of blocks (n, weights) set the scale: the least and the greatest where
    a kind has an offset, else the one of the largest size."""
    if kind in ("F32", "BF16", *CURES):
        return torch.zeros_like(blocks, dtype=torch.bool)
    least, greatest = (blocks == blocks.amin(1, True)), (blocks == blocks.amax(1, True))
    return least | greatest if kind.endswith("_1") else blocks.abs() == blocks.abs().amax(1, True)


class InBlocks(torch.nn.Module):
    """Give all weights of a block the value of its first one: a change that Q4_1's offsets hold."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:, ::BLOCK].repeat_interleave(BLOCK, dim=1)


def batches_of(task: str, seed: int) -> list[dict]:
    """Return what the assistant learns from, in twelve batches: 48 reviews of a seed in lesson 12's
    order, or each message to a shop once, in lesson 17's."""
    if task == "desk":
        return list(islice(load_task("desk").stream(SIZE, seed), reviews.STEPS))
    rows = reviews.short("train", seed)[: reviews.STEPS * SIZE]
    rows = [reviews.encode(reviews.asked(text), reviews.WORDS[label]) for text, label in rows]
    collate = DataCollatorForSeq2Seq(reviews.reader()[0])
    return [collate(rows[at : at + SIZE]) for at in range(0, len(rows), SIZE)]


@cache
def held_out() -> tuple[list, torch.Tensor, list[dict]]:
    """Return reviews as messages, their classes, and four passages of Austen as a batch."""
    rows, tokenizer = reviews.short("test")[:REVIEWS], reviews.reader()[0]
    texts = load_task("austen").texts("test")[:400:20]
    passages = [" ".join(texts[k : k + 5]) for k in range(0, 20, 5)]
    ids = torch.tensor(tokenizer(passages, truncation=True, max_length=192)["input_ids"])
    chats = [reviews.asked(text) for text, _ in rows]
    return chats, torch.tensor([k for _, k in rows]), [{"input_ids": ids, "labels": ids}]


def scored(task: str, model, prose: bool) -> dict:
    """Return what a row says of a model's answers and, if asked for, of its prose."""
    if task == "austen":
        scores = evaluate(model, load_task("austen").limit(test=60))
        return {"perplexity": f"{scores.perplexity:.3f}"}
    if task == "desk":
        rows = load_task("desk").examples("test")
        _, texts = reviews.answers(model, [row["prompt"] for row in rows])
        said = [row["completion"][0]["content"] for row in rows]
        return {"right": sum(a.strip() == b for a, b in zip(texts, said, strict=True))}
    chats, classes, passages = held_out()
    logits, _ = reviews.answers(model, chats, tokens=1)
    words = logits.log_softmax(-1)[:, reviews.reader()[1]]  # (n, 2)
    chosen, right = logits.argmax(-1), words.gather(1, classes[:, None]).squeeze(1)
    found = {"perplexity": f"{evaluate(model, passages).perplexity:.2f}"} if prose else {}
    return found | {
        "right": int((chosen == reviews.reader()[1][classes]).sum()),
        "likelier": int((words.argmax(1) == classes).sum()),
        "p": f"{right.exp().mean():.3f}",
        "logprob": f"{right.mean():.3f}",
    }


@lru_cache(maxsize=1)
def base_of(task: str, base: str) -> tuple:
    """Return a model, and its linear layers with the weights of the base {path: (layer, weight)}.

    Which weights the layers hold is up to the caller."""
    model = load_model("tinylm" if task == "austen" else "smollm2")
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and path != "lm_head"
    }
    torch.manual_seed(0)
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    if base == "noise":
        for weight in weights.values():
            blocks = blocks_of(weight, "Q4_1")
            blocks += (torch.rand(blocks.shape) - 0.5) * steps_of(weight)
    elif base != "own":
        weights = {path: rounded(weight, base) for path, weight in weights.items()}
    return model, {path: (layer, weights[path]) for path, layer in layers.items()}


@torch.no_grad()
def hold(layers: dict, weights: dict) -> None:
    """Put weights {path: (out, in)} into their layers."""
    for path, weight in weights.items():
        layers[path][0].weight.copy_(weight)


def learned(model, batches: list[dict], lr: float) -> list[float]:
    """Train once on each batch, as lesson 12 does; return the losses."""
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@lru_cache(maxsize=1)
def trained(task: str, base: str, lr: float, rank: int, seed: int, in_blocks: bool) -> tuple:
    """Return the trained change of each layer {path: (out, in)}, the steps, and the mean loss of
    the last four."""
    model, layers = base_of(task, base)
    hold(layers, {path: weight for path, (_, weight) in layers.items()})
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    tuned = get_peft_model(model, config).train()
    adapted = {p: layer for p, layer in tuned.named_modules() if hasattr(layer, "lora_A")}
    if in_blocks:
        for layer in adapted.values():
            parametrize.register_parametrization(layer.lora_A["default"], "weight", InBlocks())
    if task == "austen":
        losses = fit(tuned, load_task("austen"), 40, lr=lr, seed=seed, show=False).loss
    else:
        losses = learned(tuned, batches_of(task, seed), lr)
    changes = {
        path.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for path, layer in adapted.items()
    }
    tuned.unload()
    return changes, len(losses), sum(losses[-4:]) / 4


def exports_of(task: str, base: str, change: str, lr: float, rank: int, seed: int) -> list[tuple]:
    """Return what is made of a point: (scale, kind of file, "merged" or "beside")."""
    merged, beside = EXPORTS[base]
    if change == "none":
        return [(0.0, kind, "none") for kind in merged]
    if change == "scaled":
        return [(k, kind, "merged") for k in (4.0, 16.0, 64.0) for kind in ("F32", "Q4_1")]
    if change == "cured":
        return [(1.0, kind, "merged") for kind in CURES]
    if change == "shuffled":
        return [(1.0, kind, "merged") for kind in ("F32", "Q4_1", "Q4_0")]
    if (task, base, seed) == ("austen", "own", 0) and lr < LR[task]:
        return [(1.0, kind, "merged") for kind in ("F32", "Q4_1", "NF4")]
    unusual = (lr, rank) != (LR[task], RANK) or change == "in blocks"
    if unusual or task == "desk" or (seed and (task == "austen" or base == "noise")):
        return [(1.0, kind, "merged") for kind in merged[:2]]
    if seed:
        return [(1.0, kind, "merged") for kind in merged[:3]]
    return [(1.0, kind, "merged") for kind in merged] + [(1.0, k, "beside") for k in beside]


@torch.no_grad()
def moved(layers: dict, changes: dict, kind: str, adapter: str) -> tuple[dict, dict]:
    """Return the weights of an export, and what a row says of how they differ from the base's."""
    weights, sums = {}, torch.zeros(7, dtype=torch.float64)
    for path, (_, weight) in layers.items():
        change, bare = changes[path], exported(weight, weight, kind)
        after = bare + change if adapter == "beside" else exported(weight + change, weight, kind)
        weights[path], kept, half = after, after - bare, steps_of(weight) / 2
        along = (kept * change)[setting(blocks_of(weight, kind), kind).view_as(weight)].sum()
        pairs = (kept, change), (kept, kept), (change, change), (half, half)
        sizes = [torch.dot(a.flatten(), b.flatten()) for a, b in pairs]
        far = (blocks_of(kept, "Q4_1").abs() > half / 2).sum()
        sums += torch.stack([along, *sizes, far, torch.tensor(change.numel())]).double()
    at_ends, along, squared, own, halves, crossed, count = sums.tolist()
    if not own:
        return weights, {}
    return weights, {
        "share": f"{along / own:.4f}",
        "ends": f"{at_ends / own:.4f}",
        "noise": f"{np.sqrt(max(0.0, squared / own - (along / own) ** 2)):.3f}",
        "half_steps": f"{np.sqrt(own / halves / BLOCK):.4f}",
        "crossed": f"{crossed / count:.5f}",
    }


def run(task: str, base: str, change: str, lr: float, rank: int, seed: int) -> list[dict]:
    """Return a row for each export of a point."""
    if change == "none":
        _, layers = base_of(task, base)
        changes, row = {path: torch.zeros_like(w) for path, (_, w) in layers.items()}, {"steps": 0}
    else:
        changes, steps, loss = trained(task, base, lr, rank, seed, change == "in blocks")
        row = {"steps": steps, "train_loss": f"{loss:.4f}"}
    model, layers = base_of(task, base)
    torch.manual_seed(seed)
    if change == "shuffled":
        changes = {
            path: d.flatten()[torch.randperm(d.numel())].view_as(d) for path, d in changes.items()
        }
    rows = []
    for scale, kind, adapter in exports_of(task, base, change, lr, rank, seed):
        scaled = {path: scale * d for path, d in changes.items()}
        weights, found = moved(layers, scaled, kind, adapter)
        hold(layers, weights)
        named = {"scale": scale, "export": kind, "adapter": adapter}
        rows.append(row | named | found | scored(task, model, prose=seed == 0))
    return rows


def points() -> list[tuple]:
    """Return all points, those that decide first."""

    def due_of(task: str, bases: str, *changes: str, seed: int, lr: float = 0.0, rank: int = RANK):
        named = [(change, lr or LR[task] if change != "none" else 0.0) for change in changes]
        return [(task, base, *pair, rank, seed) for base in bases.split() for pair in named]

    due = due_of("reviews", "own", "lora", "shuffled", "cured", seed=0)
    due += due_of("reviews", "NF4 Q4_0 noise", "lora", seed=0)
    for seed in SEEDS[1:]:
        due += due_of("reviews", "own", "lora", "cured", seed=seed)
        due += due_of("reviews", "NF4", "lora", seed=seed)
    due += due_of("reviews", "own", "in blocks", seed=0)
    due += due_of("austen", "own Q4_1 NF4", "lora", "none", seed=0)
    for lr in (1e-3, 3e-3, 1e-2):
        due += due_of("austen", "Q4_1 NF4", "lora", seed=0, lr=lr)
    for lr in (1e-3, 3e-3):
        due += due_of("austen", "own", "lora", seed=0, lr=lr)
    due += due_of("reviews", "own", "scaled", seed=0)
    due += due_of("reviews", "own", "lora", seed=0, lr=2e-3)
    for seed in SEEDS[1:]:
        due += due_of("reviews", "noise", "lora", seed=seed)
    due += due_of("reviews", "own", "none", seed=0)
    due += due_of("desk", "own", "lora", seed=0)
    due += due_of("reviews", "own", "lora", seed=0, rank=64)
    due += due_of("reviews", "own", "lora", seed=0, rank=1)
    due += due_of("reviews", "Q8_0", "lora", seed=0)
    for seed in SEEDS[1:]:
        due += due_of("reviews", "own", "in blocks", seed=seed)
        due += due_of("austen", "Q4_1 NF4", "lora", seed=seed, lr=1e-3)
    return due


if __name__ == "__main__":
    fill_table("merge_study", KEY, COLUMNS, points(), run)
