"""One healthy training with DoRA and five broken ones, for an exercise of lesson 04: diagnose.

    python benchmarks/broken_rows.py      # two minutes on one core

Asked for in each run: DoRA of rank 8 (alpha 16) on the query and value projections of minilm, a new
head that trains as well, movie sentiment, 60 steps of 16 sentences, AdamW at 0.003 throughout. Adds
a row for each run to data/results/broken_rows.csv; `FAULTS` says what is wrong with a run.

`accuracy` is that on the test split after training. `turns` and `lengths` tell of ten rows of each
adapted weight, as the model uses them, how far they have turned from the base's rows, in degrees,
and how long they are beside them."""

import torch
from common import base_of, fill_table, load
from torch import nn
from torch.nn import functional as F

from peft_lessons import evaluate
from peft_lessons.train.loop import train_step

HEALTHY = "healthy"
FAULTS = {
    HEALTHY: "",
    "A": "used without m",
    "B": "m starts as ones",
    "C": "V is detached with its norm",
    "D": "m is frozen",
    "E": "the norm is that of the columns",
}
STEPS, BATCH, SEED, RATE, ROWS = 60, 16, 0, 3e-3, 10


class Layer(nn.Module):
    """DoRA around a frozen layer, with the fault of a run."""

    def __init__(self, linear: nn.Linear, run: str) -> None:
        super().__init__()
        self.linear, self.run, self.without_m = linear, run, False
        out, in_ = linear.weight.shape
        self.A = nn.Parameter(torch.empty(8, in_).uniform_(-1, 1) / in_**0.5)
        self.B = nn.Parameter(torch.zeros(out, 8))
        lengths = torch.ones(out) if run == "B" else linear.weight.norm(dim=1)
        self.m = nn.Parameter(lengths, requires_grad=run != "D")

    def in_use(self) -> torch.Tensor:
        """Return the weight (out, in) by which the model multiplies."""
        V = self.linear.weight + 16 / 8 * self.B @ self.A
        if self.without_m:
            return V
        norm = V.norm(dim=0 if self.run == "E" else 1, keepdim=True)
        return self.m[:, None] * (V.detach() if self.run == "C" else V) / norm.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.in_use(), self.linear.bias)


def train(run: str) -> dict:
    """Train one run and return its report."""
    torch.manual_seed(SEED)
    model, task, layers = base_of("sentiment", SEED).requires_grad_(False), load("sentiment"), []
    for block in model.bert.encoder.layer:
        attention = block.attention.self
        for name in ("query", "value"):
            layers.append(Layer(getattr(attention, name), run))
            setattr(attention, name, layers[-1])
    training = [*model.classifier.requires_grad_(True).parameters()]
    training += [p for layer in layers for p in (layer.A, layer.B, layer.m) if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=RATE, weight_decay=0.0)
    model.train()
    for _, batch in zip(range(STEPS), task.stream(BATCH, SEED), strict=False):
        train_step(model, batch, optimizer)
    turns, lengths = [], []
    for layer in layers:
        layer.without_m = run == "A"
        with torch.no_grad():
            W, used = layer.linear.weight, layer.in_use()
        chosen = torch.linspace(0, len(W) - 1, ROWS).long()
        cosines = F.cosine_similarity(used, W, dim=1).clamp(max=1)
        turns += cosines.acos().rad2deg()[chosen].tolist()
        lengths += (used.norm(dim=1) / W.norm(dim=1))[chosen].tolist()
    return {
        "accuracy": f"{evaluate(model, task).accuracy:.4f}",
        "turns": " ".join(f"{v:.1f}" for v in turns),
        "lengths": " ".join(f"{v:.3f}" for v in lengths),
    }


if __name__ == "__main__":
    columns = ("accuracy", "turns", "lengths")
    fill_table("broken_rows", ("run",), columns, [(run,) for run in FAULTS], train)
