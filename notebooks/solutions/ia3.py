"""Solutions of lesson 07."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def recombine(amounts: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return knobs as far from 1 as `amounts`, each on the side of 1 where `directions` has it."""
    return 1 + (amounts - 1).abs() * torch.sign(directions - 1)


def merge_ia3(
    weight: torch.Tensor, bias: torch.Tensor | None, vector: torch.Tensor, feedforward: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight (out, in) and bias of a layer that needs no vector any more."""
    if feedforward:
        return weight * vector, bias                          # columns
    return weight * vector[:, None], None if bias is None else bias * vector    # rows


def ia3_as_lora(weight: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) with W + BA = l ⊙ W by rows, r = min(out, in)."""
    out, in_ = weight.shape
    change = vector - 1                                       # (out,)
    if out <= in_:
        return weight.clone(), torch.diag(change)             # (out, in), (out, out)
    identity = torch.eye(in_, dtype=weight.dtype)
    return identity, change[:, None] * weight                 # (in, in), (out, in)


def worth(vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return how much the loss would grow, to first order, if a knob went back to 1, for each."""
    return (1 - vector) * gradient


def diagnose_knobs() -> dict[str, str]:
    """Return {run: fault} for the runs A to E."""
    return {
        "A": "stored as l − 1",
        "B": "weight decay is on",
        "C": "the output of the feed-forward is scaled",
        "D": "the vectors start at zero",
        "E": "trained at LoRA's learning rate",
    }


class IA3Attention(nn.Module):
    """Causal attention softmax(q (l_k ⊙ k)ᵀ / √d_h) (l_v ⊙ v) around three frozen layers."""

    def __init__(self, q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, n_heads: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj
        self.d_h = q_proj.out_features // n_heads
        self.l_k = nn.Parameter(torch.ones(k_proj.out_features))        # (n_kv · d_h,)
        self.l_v = nn.Parameter(torch.ones(v_proj.out_features))        # (n_kv · d_h,)

    def heads(self, t: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, n · d_h) -> (batch, n, tokens, d_h)"""
        return t.unflatten(-1, (-1, self.d_h)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.heads(self.q_proj(x))                                  # (batch, n_h, tokens, d_h)
        k = self.heads(self.k_proj(x) * self.l_k)                       # (batch, n_kv, tokens, d_h)
        v = self.heads(self.v_proj(x) * self.l_v)                       # (batch, n_kv, tokens, d_h)
        group = q.shape[1] // k.shape[1]  # query heads that share a key head
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))      # (batch, n_h, tokens, d_h)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # (batch, n_h, tokens, d_h)
        return y.transpose(1, 2).flatten(2)                             # (batch, tokens, n_h · d_h)
