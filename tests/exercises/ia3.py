"""Answers to the exercises of lesson 07."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons.methods.ia3 import IA3Layer
from peft_lessons.studies import load_results

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ recombine


@right("recombine")
def by_where(amounts, directions):
    far = torch.maximum(amounts, 2 - amounts)
    return torch.where(directions == 1, 1.0, torch.where(directions < 1, 2 - far, far))


@right("recombine")
def by_copysign(amounts, directions):
    change = torch.copysign(amounts - 1, directions - 1)
    return 1 + change.masked_fill(directions == 1, 0)


@right("recombine")
def knob_by_knob(amounts, directions):
    sides = [(d > 1) - (d < 1) for d in directions.tolist()]
    return torch.tensor(
        [1 + side * abs(a - 1) for a, side in zip(amounts.tolist(), sides, strict=True)]
    )


@wrong("recombine", "holds nan")
def by_division(amounts, directions):
    change = directions - 1
    return 1 + (amounts - 1).abs() * change / change.abs()


# ------------------------------------------------------------------ worth


@right("worth")
def by_two_products(vector, gradient):
    return gradient - vector * gradient


@right("worth")
def with_autograd(vector, gradient):
    """Of the linear loss with this gradient."""
    leaf = vector.clone().requires_grad_()
    (g,) = torch.autograd.grad(gradient @ leaf, leaf)
    return torch.einsum("n,n->n", torch.ones_like(vector) - vector, g)


# ------------------------------------------------------------------ diagnose_knobs


@right("diagnose_knobs")
def from_the_knobs():
    rows, found = load_results("broken_knobs").set_index("run"), {}
    for run, row in rows.drop("healthy").iterrows():
        ff = torch.tensor([float(q) for q in row["ff"].split()])
        if row["widths"].endswith(" 192"):
            found[run] = "the output of the feed-forward is scaled"
        elif (ff - 1).abs().max() < 0.5:
            found[run] = "trained at LoRA's learning rate"
        elif ff.median() > 0.5:
            found[run] = "weight decay is on"
        elif row["perplexity"] > 2 * rows["perplexity"]["healthy"]:
            found[run] = "the vectors start at zero"
        else:
            found[run] = "stored as l − 1"
    return found


@wrong("diagnose_knobs", "3 of 5 are right")
def both_around_zero_exchanged():
    return from_the_knobs() | {"A": "the vectors start at zero", "D": "stored as l − 1"}


@wrong("diagnose_knobs", "Given to several runs: the vectors start at zero")
def zero_twice():
    return from_the_knobs() | {"A": "the vectors start at zero"}


@wrong("diagnose_knobs", "there is no run 'F': the runs to judge are A to E")
def a_sixth_run():
    return from_the_knobs() | {"F": "weight decay is on"}


@wrong("diagnose_knobs", "Look at run E: no knob has come far from 1")
def nothing_given():
    return {}


# ------------------------------------------------------------------ merge_ia3


@wrong("merge_ia3", "your function raised TypeError")
def bias_expected(weight, bias, vector, feedforward):
    if feedforward:
        return weight * vector, bias
    return weight * vector[:, None], bias * vector


@wrong("merge_ia3", "the bias is a tensor, expected None")
def bias_made_up(weight, bias, vector, feedforward):
    bias = torch.zeros(len(weight)) if bias is None else bias
    if feedforward:
        return weight * vector, bias
    return weight * vector[:, None], bias * vector


@wrong("merge_ia3", "the bias is None")
def bias_dropped(weight, bias, vector, feedforward):
    return weight * (vector if feedforward else vector[:, None]), None


@right("merge_ia3")
def in_double(weight, bias, vector, feedforward):
    scale = vector.double() if feedforward else vector.double()[:, None]
    moved = bias is not None and not feedforward
    return [weight * scale, bias * vector.double() if moved else bias]


@right("merge_ia3")
def by_einsum(weight, bias, vector, feedforward):
    v = vector.to(weight.dtype)
    merged = torch.einsum("oi,i->oi" if feedforward else "oi,o->oi", weight, v)
    return merged, bias if feedforward or bias is None else torch.einsum("o,o->o", bias, v)


@right("merge_ia3")
def by_the_unit_vectors(weight, bias, vector, feedforward):
    """What the layer and its vector do to the unit vectors is the merged weight."""
    W, eye = weight.to(vector.dtype), torch.eye(weight.shape[1], dtype=vector.dtype)
    y = F.linear(eye * vector, W) if feedforward else F.linear(eye, W) * vector
    if bias is not None:
        bias = bias.clone() if feedforward else bias.mul(vector).type_as(bias)
    return y.T.type_as(weight), bias


# ------------------------------------------------------------------ ia3_as_lora


@wrong("ia3_as_lora", "holds nan")
def roots_of_negatives(weight, vector):
    root = (vector - 1).sqrt()
    if len(weight) <= weight.shape[1]:
        return root[:, None] * weight, torch.diag(root)
    return torch.eye(weight.shape[1]), (root * root)[:, None] * weight


@wrong("ia3_as_lora", "A has shape (1, 20), expected (12, 20)")
def rank_one(weight, vector):
    return weight.mean(0, keepdim=True), (vector - 1)[:, None]


@right("ia3_as_lora")
def eye_in_float32(weight, vector):
    change, eye = (vector - 1)[:, None] * weight, torch.eye(min(weight.shape))
    return (eye, change) if len(weight) > weight.shape[1] else (change, eye)


@right("ia3_as_lora")
def as_the_hint_says(weight, vector):
    out, in_ = weight.shape
    if out <= in_:
        return weight, torch.diag(vector - 1)
    return torch.eye(in_), (vector - 1)[:, None] * weight


@right("ia3_as_lora")
def by_svd(weight, vector):
    U, S, V = torch.linalg.svd(weight * vector[:, None] - weight, full_matrices=False)
    return S[:, None] * V, U


@right("ia3_as_lora")
def with_signs(weight, vector):
    change = vector - torch.ones_like(vector)
    root = change.abs() ** 0.5
    if len(weight) > weight.shape[1]:
        return torch.eye(weight.shape[1], dtype=weight.dtype), change.unsqueeze(1) * weight
    return (root * change.sign())[:, None] * weight, torch.diag(root)


# ------------------------------------------------------------------ IA3Attention


@answers.hunt("IA3Attention")
def attention_with(bugs):
    query, wide, order = (
        any(words in bug for bug in bugs)
        for words in ("query has a vector", "as wide as the query", "in another order")
    )

    class IA3Attention(nn.Module):
        def __init__(self, q_proj, k_proj, v_proj, n_heads):
            super().__init__()
            self.q, self.k, self.v = q_proj, k_proj, v_proj
            self.d_h = q_proj.out_features // n_heads
            narrow = q_proj if wide else k_proj
            self.l_k = nn.Parameter(torch.ones(narrow.out_features))
            self.l_v = nn.Parameter(torch.ones(narrow.out_features))
            if query:
                self.l_q = nn.Parameter(torch.ones(q_proj.out_features))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            if query:
                q = q * self.l_q
            if not wide:
                k, v = k * self.l_k, v * self.l_v
            q, k, v = (t.unflatten(-1, (-1, self.d_h)).transpose(1, 2) for t in (q, k, v))
            n = q.shape[1] // k.shape[1]
            k, v = (
                t.repeat(1, n, 1, 1) if order else t.repeat_interleave(n, dim=1) for t in (k, v)
            )
            if wide:
                k = k * self.l_k.view(-1, 1, self.d_h)
                v = v * self.l_v.view(-1, 1, self.d_h)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).flatten(2)

    return IA3Attention


@right("IA3Attention")
class ByHand(nn.Module):
    """With matmuls, and query heads in groups in the place of repeated keys."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.q, self.k, self.v, self.n_heads = q_proj, k_proj, v_proj, n_heads
        self.l_k = nn.Parameter(torch.ones_like(k_proj.weight[:, 0]))
        self.l_v = nn.Parameter(torch.ones_like(v_proj.weight[:, 0]))

    def forward(self, x):
        d_h = self.q.out_features // self.n_heads
        k = torch.einsum("btd,d->btd", self.k(x), self.l_k).unflatten(-1, (-1, d_h))
        v = torch.einsum("btd,d->btd", self.v(x), self.l_v).unflatten(-1, (-1, d_h))
        q = self.q(x).unflatten(-1, (k.shape[2], -1, d_h))
        scores = torch.einsum("bqngd,bknd->bngqk", q, k) / math.sqrt(d_h)
        ahead = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        return torch.einsum("bngqk,bknd->bqngd", weights, v).flatten(2)


@right("IA3Attention")
class InHeads(ByHand):
    """Vectors of another shape, (n_kv, d_h) and (1, n_kv · d_h)."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__(q_proj, k_proj, v_proj, n_heads)
        self.l_k = nn.Parameter(self.l_k.detach().view(-1, q_proj.out_features // n_heads))
        self.l_v = nn.Parameter(self.l_v.detach()[None])

    def forward(self, x):
        d_h = self.q.out_features // self.n_heads
        k = (self.k(x) * self.l_k.flatten()).unflatten(-1, (-1, d_h)).transpose(1, 2)
        v = (self.v(x) * self.l_v).unflatten(-1, (-1, d_h)).transpose(1, 2)
        q = self.q(x).unflatten(-1, (-1, d_h)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


@wrong("IA3Attention", "(that of the base) is None, expected a tensor")
class NoReturn(ByHand):
    def forward(self, x):
        super().forward(x)


@wrong("IA3Attention", "(that of the base) has wrong values")
class Random(ByHand):
    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__(q_proj, k_proj, v_proj, n_heads)
        self.l_k.data.add_(0.02 * torch.randn(self.l_k.shape))


@right("IA3Attention")
class OnTheQuery(ByHand):
    """Without rotary phases (l ⊙ q)·k = q·(l ⊙ k): each query head takes its key head's entries."""

    def forward(self, x):
        d_h = self.q.out_features // self.n_heads
        group = self.n_heads * d_h // len(self.l_k)
        l_k, l_v = (n.view(-1, 1, d_h).repeat_interleave(group, 0) for n in (self.l_k, self.l_v))
        q, k, v = (f(x).unflatten(-1, (-1, d_h)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q * l_k, k, v, is_causal=True, enable_gqa=True) * l_v
        return y.transpose(1, 2).flatten(2)


@right("IA3Attention")
class AroundTheLesson(nn.Module):
    """With the lesson's own layer, whose third vector does not train here."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.layers, self.d_h = nn.ModuleList([q_proj, k_proj, v_proj]), q_proj.out_features
        self.d_h //= n_heads
        self.ia3 = IA3Layer(q_proj.out_features, kv_dim=k_proj.out_features)
        self.ia3.l_ff.requires_grad_(False)

    def forward(self, x):
        q, k, v = (layer(x) for layer in self.layers)
        k, v = self.ia3.scale_key(k), self.ia3.scale_value(v)
        q, k, v = (t.unflatten(-1, (-1, self.d_h)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
