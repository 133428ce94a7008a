"""The codes of one matrix of tinylm, stored in four bits as QLoRA does it and in five other ways,
for an exercise of lesson 03: diagnose.

    python benchmarks/broken_codes.py      # a second

As QLoRA does it: blocks of 64, each divided by its largest absolute value, and the nearest level of
NF4. Adds a row for each way to data/results/broken_codes.csv; `WAYS` says what it does otherwise.

`error` is the relative error of the restored weights, in per cent. `uses` are the shares of the
codes 0 to 15, in per cent."""

import torch
from common import fill_table

from peft_lessons import load_model
from peft_lessons.methods.qlora import NF4

INT4 = torch.arange(-7, 8) / 7
WAYS = {
    "QLoRA": {},
    "A": {"block": 16},
    "B": {"boundaries": NF4},
    "C": {"block": 512 * 192},
    "D": {"signed": True},
    "E": {"levels": INT4},
}


def store(run: str) -> dict:
    """Round the matrix in one of the ways and return its report."""
    way = {"levels": NF4, "block": 64, "signed": False} | WAYS[run]
    levels = way["levels"]
    boundaries = way.get("boundaries", (levels[1:] + levels[:-1]) / 2)
    weight = load_model("tinylm").model.layers[2].mlp.up_proj.weight.detach()
    blocks = weight.reshape(-1, way["block"])
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    if way["signed"]:
        absmax = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    codes = torch.bucketize(blocks / absmax, boundaries)
    error = (levels[codes] * absmax - blocks).norm() / blocks.norm()
    uses = 100 * torch.bincount(codes.flatten(), minlength=16) / codes.numel()
    return {"error": f"{100 * error:.2f}", "uses": " ".join(f"{use:.2f}" for use in uses.tolist())}


if __name__ == "__main__":
    fill_table("broken_codes", ("run",), ("error", "uses"), [(run,) for run in WAYS], store)
