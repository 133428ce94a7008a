"""Solutions of lesson 11."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from peft_lessons.engine import AdapterLayer, Method, PeftFiles
from peft_lessons.methods.unified import Design


def name_the_kind(probe, x: torch.Tensor) -> str:
    """Return "lora", "bitfit", "ia3", "prefix" or "adapter": what the probed model holds."""
    h, new = probe("value", x)                                 # (batch, T, d)
    if torch.allclose(h, new):
        return "adapter" if torch.allclose(*probe("attention", x)) else "prefix"
    if torch.allclose(new - h, (new - h)[:1, :1]):             # one vector for all tokens
        return "bitfit"
    # new / h is the same for two tokens, written without a quotient: h may be near 0.
    fixed = torch.allclose(new * h[:1, :1], new[:1, :1] * h)
    return "ia3" if fixed else "lora"


def prefix_as_adapter(
    x: torch.Tensor, w_q: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor
) -> torch.Tensor:
    """Return u = softmax(x W_downᵀ) W_upᵀ of a prefix in one head, (..., T, d_h)."""
    w_down = prefix_k @ w_q / w_q.shape[0] ** 0.5              # (p, d)
    return (x @ w_down.T).softmax(-1) @ prefix_v               # (..., T, d_h)


@dataclass(frozen=True)
class MyMethod(Method):
    """A method of my own; its design says what it does."""

    rank: int = 8
    strength: float = 2.0
    targets: tuple[str, ...] | str = ("query", "value")

    def __post_init__(self):
        super().__post_init__()
        if not self.strength:
            raise ValueError("MyMethod: strength=0 switches it off; take another number")

    # LoRA reads x, the input of the layer. This method reads h, the output of the layer.
    learning_rate = 3e-3
    files = PeftFiles("SEQUENTIAL_LORA", tensors={"A": "A", "B": "B"}, fields={
        "rank": ("rank", 8), "strength": ("strength", 2.0),
        "targets": ("target_modules", ("query", "value"))})
    design = Design(
        form="h Aᵀ Bᵀ", insertion="sequential", modified="output of any linear layer",
        composition="h + s · u",
        delta=lambda site: site.module.strength * site.h @ (site.module.B @ site.module.A).T)

    class Layer(AdapterLayer):
        def __init__(self, linear, rank, strength):
            super().__init__(linear)
            d = linear.out_features
            self.A = nn.Parameter(torch.randn(rank, d) / d**0.5)               # (r, out)
            self.B = nn.Parameter(torch.zeros(d, rank))                        # (out, r)
            self.strength = strength

        def forward(self, x):
            h = self.base(x)                                                   # (..., out)
            return h if self.merged else h + self.strength * (h @ self.A.T) @ self.B.T

        def turn(self):
            """Return I + s · BA (out, out), which acts on h, so on each column of W, and on b."""
            return torch.eye(len(self.B)) + self.strength * self.B @ self.A

        def merged_tensors(self):
            W, b = self.base.weight, self.base.bias                            # (out, in), (out,)
            return self.turn() @ W, None if b is None else self.turn() @ b

        def unmerged_tensors(self):
            back, W, b = self.turn().inverse(), self.base.weight, self.base.bias
            return back @ W, None if b is None else back @ b

    def wrap(self, path, layer):
        return self.Layer(layer, self.rank, self.strength)
