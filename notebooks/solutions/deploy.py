"""Solutions of lesson 17."""

import random

import torch


def split_without_leaks(
    rows: list[dict[str, str]], share: float, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (train, test): a share of the different prompts, with all their rows, is in test."""
    keys = [" ".join(row["prompt"].lower().split()) for row in rows]
    different = sorted(set(keys))            # a set has another order at each start of Python
    count = max(1, round(share * len(different)))
    held = set(random.Random(seed).sample(different, count))
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    test = [row for row, key in zip(rows, keys, strict=True) if key in held]
    return train, test


def surviving_share(
    weight: torch.Tensor, delta: torch.Tensor, levels: torch.Tensor, block: int
) -> float:
    """Return the share of the change `delta` that is left after rounding to blocks of levels."""
    boundaries = (levels[1:] + levels[:-1]) / 2

    def rounded(x):
        blocks = x.view(-1, block)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        return (levels[torch.bucketize(blocks / absmax, boundaries)] * absmax).view(x.shape)

    kept = rounded(weight + delta) - rounded(weight)
    return ((kept * delta).sum() / delta.square().sum()).item()


def lora_to_gguf(
    tensors: dict[str, torch.Tensor], heads: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors with the rows of q and k in llama.cpp's order."""

    def side_by_side(rows, n):
        halves = rows.view(n, 2, len(rows) // n // 2, -1)       # (heads, halves, pairs, columns)
        return halves.transpose(1, 2).reshape(rows.shape)

    moved = {}
    for name, tensor in tensors.items():
        if "attn_q" in name and name.endswith("lora_b"):
            tensor = side_by_side(tensor, heads)
        elif "attn_k" in name and name.endswith("lora_b"):
            tensor = side_by_side(tensor, kv_heads)
        moved[name] = tensor
    return moved


def defend_release() -> dict[str, str]:
    """Return {file: the number that rules it out} for A to E, and "ships" for the one to ship."""
    return {
        "A": "size",
        "B": "right answers",
        "C": "log-probabilities",
        "D": "ships",
        "E": "token ids",
    }
