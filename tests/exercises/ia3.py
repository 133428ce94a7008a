"""Answers to the exercises of lesson 07."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_lessons.methods.ia3 import IA3Layer

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ ia3_sizes


@wrong("ia3_sizes", "the result['k'] is 128, expected 32")
def one_dim_for_all(config):
    return dict.fromkeys(("k", "v", "ff"), config.hidden_size)


@wrong("ia3_sizes", "raised AttributeError")
def llama_only(config):
    d_h = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * d_h
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "raised TypeError")
def head_dim_of_nothing(config):
    n_kv = getattr(config, "num_key_value_heads", None)
    d_h = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return {"k": n_kv * d_h, "v": n_kv * d_h, "ff": config.intermediate_size}


@wrong("ia3_sizes", "the argument config was changed")
def head_dim_written_down(config):
    n_h = config.num_attention_heads
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // n_h
    width = getattr(config, "num_key_value_heads", n_h) * config.head_dim
    return {"k": width, "v": width, "ff": config.intermediate_size}


@right("ia3_sizes")
def from_the_model(config):
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config)
    found = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf in ("k_proj", "key"):
            found["k"] = module.out_features
        elif leaf in ("v_proj", "value"):
            found["v"] = module.out_features
        elif leaf == "down_proj" or (path.endswith(".output.dense") and "attention" not in path):
            found["ff"] = module.in_features
    return found


@right("ia3_sizes")
def with_true_division(config):
    n_h = config.num_attention_heads
    d_h = getattr(config, "head_dim", None) or config.hidden_size / n_h
    width = getattr(config, "num_key_value_heads", n_h) * d_h
    return {"k": width, "v": width, "ff": config.intermediate_size}


@right("ia3_sizes")
def by_the_share(config):
    if hasattr(config, "head_dim"):
        wide = config.num_attention_heads * config.head_dim
    else:
        wide = config.hidden_size
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = wide * kv // config.num_attention_heads
    return dict(k=width, v=width, ff=config.intermediate_size)


# ------------------------------------------------------------------ ia3_linear


@wrong("ia3_linear", "your function raised TypeError")
def bias_is_always_there(x, weight, bias, vector, feedforward):
    return x * vector @ weight.T + bias if feedforward else (x @ weight.T + bias) * vector


@right("ia3_linear")
@torch.no_grad()
def without_a_graph(x, weight, bias, vector, feedforward):
    before, after = (vector, 1) if feedforward else (1, vector)
    return F.linear(before * x, weight, bias) * after


@right("ia3_linear")
def through_the_weight(x, weight, bias, vector, feedforward):
    if feedforward:
        return torch.einsum("...i,i,oi->...o", x, vector, weight) + (0 if bias is None else bias)
    y = torch.einsum("...i,oi,o->...o", x, weight, vector)
    return y if bias is None else y + vector * bias


@right("ia3_linear")
def with_a_layer(x, weight, bias, vector, feedforward):
    layer = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer(vector * x) if feedforward else vector * layer(x)


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
