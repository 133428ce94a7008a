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


def kv_width(config):
    n_h = config.num_attention_heads
    d_h = getattr(config, "head_dim", None) or config.hidden_size // n_h
    return (getattr(config, "num_key_value_heads", None) or n_h) * d_h


@wrong("ia3_sizes", "keys and values are taken for as wide as the model")
def one_dim(config):
    d = config.hidden_size
    return {"k": d, "v": d, "ff": config.intermediate_size}


@wrong("ia3_sizes", "keys and values are taken for as wide as the model")
def head_of_the_keys(config):
    n_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = n_kv * (config.hidden_size // n_kv)
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "the result['k'] is 128, expected 32")
def one_dim_for_all(config):
    return dict.fromkeys(("k", "v", "ff"), config.hidden_size)


@wrong("ia3_sizes", "the query heads are counted")
def query_heads(config):
    n = config.num_attention_heads
    width = n * (getattr(config, "head_dim", None) or config.hidden_size // n)
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "head_dim is not looked at")
def head_dim_ignored(config):
    n_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads * n_kv
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "raised AttributeError")
def llama_only(config):
    d_h = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * d_h
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "raised AttributeError")
def head_dim_only(config):
    n_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return {
        "k": n_kv * config.head_dim,
        "v": n_kv * config.head_dim,
        "ff": config.intermediate_size,
    }


@wrong("ia3_sizes", "raised TypeError")
def head_dim_of_nothing(config):
    n_kv = getattr(config, "num_key_value_heads", None)
    d_h = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return {"k": n_kv * d_h, "v": n_kv * d_h, "ff": config.intermediate_size}


@wrong("ia3_sizes", "only the keys are narrow here")
def narrow_keys(config):
    return {"k": kv_width(config), "v": config.hidden_size, "ff": config.intermediate_size}


@wrong("ia3_sizes", "only the values are narrow here")
def narrow_values(config):
    return {"k": config.hidden_size, "v": kv_width(config), "ff": config.intermediate_size}


@wrong("ia3_sizes", "this is the number of key-value heads")
def counts_of_heads(config):
    n = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return {"k": n, "v": n, "ff": config.intermediate_size}


@wrong("ia3_sizes", "this is the width of one head")
def one_head(config):
    d_h = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"k": d_h, "v": d_h, "ff": config.intermediate_size}


@wrong("ia3_sizes", "the keys and values are counted together")
def together(config):
    return {n: 2 * kv_width(config) for n in "kv"} | {"ff": config.intermediate_size}


@wrong("ia3_sizes", "these are the vectors of all layers")
def of_all_layers(config):
    sizes = {"k": kv_width(config), "v": kv_width(config), "ff": config.intermediate_size}
    return {name: size * config.num_hidden_layers for name, size in sizes.items()}


@wrong("ia3_sizes", "ff is the output of the feed-forward")
def ff_output(config):
    return {"k": kv_width(config), "v": kv_width(config), "ff": config.hidden_size}


@wrong("ia3_sizes", "ff is not always four times the model's width")
def four_times(config):
    return {"k": kv_width(config), "v": kv_width(config), "ff": 4 * config.hidden_size}


@wrong("ia3_sizes", "ff is counted twice")
def gate_and_up(config):
    return {"k": kv_width(config), "v": kv_width(config), "ff": 2 * config.intermediate_size}


@wrong("ia3_sizes", "is the float 32, expected the int 32")
def floats(config):
    n = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size / config.num_attention_heads * n
    return {"k": width, "v": width, "ff": config.intermediate_size}


@wrong("ia3_sizes", "the keys of the result differ: missing 'k', 'v', 'ff'")
def other_keys(config):
    return {"l_k": kv_width(config), "l_v": kv_width(config), "l_ff": config.intermediate_size}


@wrong("ia3_sizes", "the result is a tuple of 3")
def as_a_tuple(config):
    return kv_width(config), kv_width(config), config.intermediate_size


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
def from_a_dict(config):
    c = config.to_dict()
    n_kv = c.get("num_key_value_heads") or c["num_attention_heads"]
    d_h = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return {"ff": c["intermediate_size"], "v": n_kv * d_h, "k": n_kv * d_h}


@right("ia3_sizes")
def by_the_share(config):
    if hasattr(config, "head_dim"):
        wide = config.num_attention_heads * config.head_dim
    else:
        wide = config.hidden_size
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = wide * kv // config.num_attention_heads
    return dict(k=width, v=width, ff=config.intermediate_size)


# ------------------------------------------------------------------ merge_ia3


@wrong("merge_ia3", "the bias of k and v is left as it is")
def bias_forgotten(weight, bias, vector, feedforward):
    scale = vector if feedforward else vector[:, None]
    return (weight * scale).to(weight.dtype), bias


@wrong("merge_ia3", "the bias of the feed-forward is scaled")
def bias_of_another_width(weight, bias, vector, feedforward):
    scale = vector if feedforward else vector[:, None]
    return weight * scale, None if bias is None else bias * vector


@wrong("merge_ia3", "columns are scaled where the outputs are")
def never_turned(weight, bias, vector, feedforward):
    return weight * vector, bias if feedforward or bias is None else bias * vector


@wrong("merge_ia3", "rows are scaled for the feed-forward")
def always_rows(weight, bias, vector, feedforward):
    scaled = weight * vector.unsqueeze(1)
    return scaled, bias if feedforward or bias is None else bias * vector


@wrong("merge_ia3", "the flag is read the wrong way round")
def flag_turned(weight, bias, vector, feedforward):
    if feedforward:
        return weight * vector[:, None], None if bias is None else bias * vector
    return weight * vector, bias


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


@wrong("merge_ia3", "the weight is divided by the vector")
def divided(weight, bias, vector, feedforward):
    if feedforward:
        return weight / vector, bias
    return weight / vector[:, None], None if bias is None else bias / vector


@wrong("merge_ia3", "1 is added to the vector")
def one_added(weight, bias, vector, feedforward):
    if feedforward:
        return weight * (1 + vector), bias
    return weight + weight * vector[:, None], None if bias is None else bias * (1 + vector)


@wrong("merge_ia3", "1 is taken from the vector")
def the_change(weight, bias, vector, feedforward):
    if feedforward:
        return weight * (vector - 1), bias
    return weight * (vector - 1)[:, None], None if bias is None else bias * (vector - 1)


@wrong("merge_ia3", "the bias is divided by the vector")
def bias_divided(weight, bias, vector, feedforward):
    if feedforward:
        return weight * vector, bias
    return weight * vector[:, None], None if bias is None else bias / vector


@wrong("merge_ia3", "the vector is squared")
def both_ways(weight, bias, vector, feedforward):
    square = vector * vector
    if feedforward:
        return weight * square, bias
    return weight * square[:, None], None if bias is None else bias * square


@wrong("merge_ia3", "the weight has dtype float32, expected bfloat16")
def dtype_lost(weight, bias, vector, feedforward):
    if feedforward:
        return weight * vector, bias
    return weight * vector[:, None], None if bias is None else (bias * vector).to(bias.dtype)


@wrong("merge_ia3", "the argument weight was changed")
def in_place(weight, bias, vector, feedforward):
    weight *= vector if feedforward else vector[:, None]
    return weight, bias if feedforward or bias is None else (bias * vector).to(bias.dtype)


@wrong("merge_ia3", "the result is a tensor, expected a tuple of 2")
def weight_alone(weight, bias, vector, feedforward):
    return weight * (vector if feedforward else vector[:, None])


@wrong("merge_ia3", "an entry of zero is taken for a missing one")
def zeros_spared(weight, bias, vector, feedforward):
    vector = vector.masked_fill(vector == 0, 1)
    if feedforward:
        return (weight * vector).to(weight.dtype), bias
    return weight * vector[:, None], None if bias is None else bias * vector


@right("merge_ia3")
def by_diagonals(weight, bias, vector, feedforward):
    D = torch.diag(vector)
    if feedforward:
        return (weight.to(D.dtype) @ D).to(weight.dtype), bias
    W = (D @ weight.to(D.dtype)).to(weight.dtype)
    return W, None if bias is None else (D @ bias.to(D.dtype)).to(bias.dtype)


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


@right("merge_ia3")
def by_loops(weight, bias, vector, feedforward):
    merged = weight.clone()
    for i, scale in enumerate(vector.tolist()):
        part = merged[:, i] if feedforward else merged[i]
        part.mul_(scale)
    if feedforward or bias is None:
        return merged, bias
    return merged, torch.stack([b * s for b, s in zip(bias, vector, strict=True)]).to(bias.dtype)


# ------------------------------------------------------------------ ia3_as_lora


def in_its_place(weight, delta):
    eye = torch.eye(min(weight.shape), dtype=weight.dtype)
    return (delta, eye) if weight.shape[0] <= weight.shape[1] else (eye, delta)


@wrong("ia3_as_lora", "BA is the scaled weight itself")
def the_scaled_weight(weight, vector):
    return in_its_place(weight, vector[:, None] * weight)


@wrong("ia3_as_lora", "the sign is turned")
def sign_turned(weight, vector):
    return in_its_place(weight, weight - vector[:, None] * weight)


@wrong("ia3_as_lora", "the scaling acts twice")
def acts_twice(weight, vector):
    out, in_ = weight.shape
    c = vector - 1
    if out <= in_:
        return c[:, None] * weight, torch.diag(c)
    return torch.eye(in_, dtype=weight.dtype), (c * c)[:, None] * weight


@wrong("ia3_as_lora", "1 is added to the vector")
def one_plus(weight, vector):
    return in_its_place(weight, (1 + vector)[:, None] * weight)


@wrong("ia3_as_lora", "the change loses its sign")
def roots(weight, vector):
    root = (vector - 1).abs().sqrt()
    return in_its_place(weight, (root * root)[:, None] * weight)


@wrong("ia3_as_lora", "holds nan")
def roots_of_negatives(weight, vector):
    root = (vector - 1).sqrt()
    if len(weight) <= weight.shape[1]:
        return root[:, None] * weight, torch.diag(root)
    return torch.eye(weight.shape[1], dtype=weight.dtype), (root * root)[:, None] * weight


@wrong("ia3_as_lora", "A has shape (20, 12), expected (12, 12)")
def always_rank_out(weight, vector):
    return weight.clone(), torch.diag(vector - 1)


@wrong("ia3_as_lora", "A has shape (20, 20), expected (12, 20)")
def always_rank_in(weight, vector):
    return torch.eye(weight.shape[1], dtype=weight.dtype), (vector - 1)[:, None] * weight


@wrong("ia3_as_lora", "A has shape (12, 12), expected (12, 20)")
def order_turned(weight, vector):
    A, B = in_its_place(weight, (vector - 1)[:, None] * weight)
    return B, A


@wrong("ia3_as_lora", "A has shape (1, 20), expected (12, 20)")
def rank_one(weight, vector):
    return weight.mean(0, keepdim=True), (vector - 1)[:, None]


@wrong("ia3_as_lora", "A has shape (20, 12)")
def transposed(weight, vector):
    A, B = in_its_place(weight, (vector - 1)[:, None] * weight)
    return A.T, B.T


@wrong("ia3_as_lora", "the smallest singular value is cut off")
def low_rank(weight, vector):
    U, S, V = torch.linalg.svd((vector - 1)[:, None] * weight, full_matrices=False)
    S = torch.where(torch.arange(len(S)) < len(S) * 2 // 3, S, 0)
    return V, U * S


@wrong("ia3_as_lora", "W is left out")
def weight_left_out(weight, vector):
    out, in_ = weight.shape
    if out <= in_:
        return torch.eye(out, in_, dtype=weight.dtype), torch.diag(vector - 1)
    return torch.eye(in_, dtype=weight.dtype), torch.diag(vector - 1)[:, :in_]


@wrong("ia3_as_lora", "the change is divided by the rank")
def divided_by_the_rank(weight, vector):
    A, B = in_its_place(weight, (vector - 1)[:, None] * weight)
    return A, B / len(A)


@wrong("ia3_as_lora", "the columns are scaled")
def columns_scaled(weight, vector):
    n = weight.shape[1]
    scale = vector.repeat(n // len(vector) + 1)[:n]
    return in_its_place(weight, weight * (scale - 1))


@wrong("ia3_as_lora", "A has dtype float32, expected float64")
def in_float32(weight, vector):
    if len(weight) <= weight.shape[1]:
        return weight.float(), torch.diag(vector - 1).float()
    return torch.eye(weight.shape[1]), (vector - 1)[:, None] * weight


@wrong("ia3_as_lora", "the argument vector was changed")
def vector_changed(weight, vector):
    vector -= 1
    return in_its_place(weight, vector[:, None] * weight)


@right("ia3_as_lora")
def by_svd(weight, vector):
    U, S, V = torch.linalg.svd(weight * vector[:, None] - weight, full_matrices=False)
    return S[:, None] * V, U


@right("ia3_as_lora")
def identity_on_the_other_side(weight, vector):
    return in_its_place(weight, weight * (vector - 1)[:, None])


@right("ia3_as_lora")
def by_qr(weight, vector):
    delta = torch.einsum("o,oi->oi", vector - 1, weight)
    if len(weight) <= weight.shape[1]:
        Q, R = torch.linalg.qr(delta.T)
        return Q.T, R.T
    Q, R = torch.linalg.qr(delta)
    return R, Q


@right("ia3_as_lora")
def with_signs(weight, vector):
    change = vector - torch.ones_like(vector)
    root = change.abs() ** 0.5
    if len(weight) > weight.shape[1]:
        return torch.eye(weight.shape[1]).to(weight), change.unsqueeze(1) * weight
    return (root * change.sign())[:, None] * weight, torch.diag(root)


# ------------------------------------------------------------------ IA3Attention


class Repaired(nn.Module):
    """The stub with all its faults mended; the answers below bring some of them back."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj
        self.d_h = q_proj.out_features // n_heads
        self.l_k = nn.Parameter(self.first(self.width(k_proj)))
        self.l_v = nn.Parameter(self.first(self.width(v_proj)))

    def first(self, n):
        return torch.ones(n)

    def width(self, layer):
        return layer.out_features

    def heads(self, t):
        return t.unflatten(-1, (-1, self.d_h)).transpose(1, 2)

    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) * self.l_k, self.v_proj(x) * self.l_v

    def shared(self, t, group):
        return t.repeat_interleave(group, dim=1)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        q, k, v = map(self.heads, self.scaled(x))
        group = q.shape[1] // k.shape[1]
        y = self.attend(q, self.shared(k, group), self.shared(v, group))
        return y.transpose(1, 2).flatten(2)


class Stub(nn.Module):
    """The hunt as it is given."""

    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj
        self.n_heads, dim = n_heads, q_proj.out_features
        self.start(dim)

    def start(self, dim):
        self.l_q = nn.Parameter(torch.zeros(dim))
        self.l_k = nn.Parameter(torch.zeros(dim))
        self.l_v = nn.Parameter(torch.zeros(dim))

    def heads(self, t):
        return t.unflatten(-1, (-1, self.q_proj.out_features // self.n_heads)).transpose(1, 2)

    def query(self, q):
        return q * self.heads(self.l_q[None, None])

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.n_heads // t.shape[1], dim=1) for t in (k, v))
        k, v = (t * self.heads(n[None, None]) for t, n in ((k, self.l_k), (v, self.l_v)))
        y = F.scaled_dot_product_attention(self.query(q), k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


QUERY = "the query has a vector too"
WIDE = "the vectors are as wide as the query"
wrong("IA3Attention", QUERY)(Stub)


@wrong("IA3Attention", QUERY)
class StubFromOnes(Stub):
    def start(self, dim):
        super().start(dim)
        for p in (self.l_q, self.l_k, self.l_v):
            p.data.fill_(1)


@wrong("IA3Attention", "start as zeros and are as wide as the query")
class StubWithoutQuery(Stub):
    def start(self, dim):
        super().start(dim)
        del self.l_q

    def query(self, q):
        return q


@wrong("IA3Attention", WIDE)
class WideOnes(StubWithoutQuery):
    def start(self, dim):
        super().start(dim)
        for p in (self.l_k, self.l_v):
            p.data.fill_(1)


@wrong("IA3Attention", WIDE)
class OneDim(Repaired):
    """One width for all: under grouped queries it does not even run."""

    def width(self, layer):
        return self.q_proj.out_features


@wrong("IA3Attention", "the vectors start as zeros, which silences")
class Zeros(Repaired):
    def first(self, n):
        return torch.zeros(n)


@wrong("IA3Attention", "l_k right after construction has wrong values")
class Random(Repaired):
    def first(self, n):
        return 1 + 0.02 * torch.randn(n)


@wrong("IA3Attention", QUERY)
class QueryToo(Repaired):
    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__(q_proj, k_proj, v_proj, n_heads)
        self.l_q = nn.Parameter(torch.ones(q_proj.out_features))

    def scaled(self, x):
        q, k, v = super().scaled(x)
        return q * self.l_q, k, v


@wrong("IA3Attention", "the vectors have one entry a head's dimension")
class SharedByHeads(Repaired):
    def width(self, layer):
        return self.d_h

    def scaled(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        n = k.shape[-1] // self.d_h
        return q, k * self.l_k.repeat(n), v * self.l_v.repeat(n)


@wrong("IA3Attention", "the vectors have one entry a head:")
class OneAHead(Repaired):
    def width(self, layer):
        return layer.out_features // self.d_h

    def scaled(self, x):
        k, v = (n.repeat_interleave(self.d_h) for n in (self.l_k, self.l_v))
        return self.q_proj(x), self.k_proj(x) * k, self.v_proj(x) * v


@wrong("IA3Attention", "with ones, k ⊙ l_k is k, and 1 + l is 2")
class OnePlus(Repaired):
    def scaled(self, x):
        k, v = self.k_proj(x), self.v_proj(x)
        return self.q_proj(x), k + k * self.l_k, v + v * self.l_v


@wrong("IA3Attention", "the vectors are added")
class Added(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) + self.l_k, self.v_proj(x) + self.l_v


@wrong("IA3Attention", "the vectors are exchanged")
class Exchanged(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) * self.l_v, self.v_proj(x) * self.l_k


@wrong("IA3Attention", "l_k acts on keys and values")
class Twins(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) * self.l_k, self.v_proj(x) * self.l_k


@wrong("IA3Attention", "l_k is not used")
class KeysForgotten(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x) * self.l_v


@wrong("IA3Attention", "l_v is not used")
class ValuesForgotten(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) * self.l_k, self.v_proj(x)


@wrong("IA3Attention", "the biases are not scaled")
class WeightsOnly(Repaired):
    def scaled(self, x):
        k = F.linear(x, self.k_proj.weight * self.l_k[:, None], self.k_proj.bias)
        v = F.linear(x, self.v_proj.weight * self.l_v[:, None], self.v_proj.bias)
        return self.q_proj(x), k, v


@wrong("IA3Attention", "the key-value heads are in another order")
class Repeated(Repaired):
    def shared(self, t, group):
        return t.repeat(1, group, 1, 1)


@wrong("IA3Attention", "the causal mask is lost")
class LooksAhead(Repaired):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@wrong("IA3Attention", "the vectors are cut off and learn nothing")
class CutOff(Repaired):
    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x) * self.l_k.data, self.v_proj(x) * self.l_v.data


@wrong("IA3Attention", "the vectors are cut off and learn nothing")
class NoGradient(Repaired):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@wrong("IA3Attention", "missing 'l_k', 'l_v'")
class NoParameters(Repaired):
    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__(q_proj, k_proj, v_proj, n_heads)
        del self.l_k, self.l_v
        self.l_k, self.l_v = torch.ones(k_proj.out_features), torch.ones(v_proj.out_features)


@wrong("IA3Attention", "the list of what trains differs: too many 'bias', 'weight'")
class BaseTrains(Repaired):
    def __init__(self, q_proj, k_proj, v_proj, n_heads):
        super().__init__(q_proj, k_proj, v_proj, n_heads)
        self.requires_grad_(True)


@wrong("IA3Attention", "the parameters differ")
class OtherParameters(Repaired):
    def __init__(self, q_proj, k_proj, v_proj, heads, kv_heads):
        super().__init__(q_proj, k_proj, v_proj, heads)


right("IA3Attention")(Repaired)


@right("IA3Attention")
class OnTheQuery(Repaired):
    """Without rotary phases (l ⊙ q)·k = q·(l ⊙ k): each query head takes its key head's entries."""

    def scaled(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x):
        q, k, v = map(self.heads, self.scaled(x))
        group = q.shape[1] // k.shape[1]
        l_k, l_v = (
            n.view(-1, 1, self.d_h).repeat_interleave(group, 0) for n in (self.l_k, self.l_v)
        )
        y = self.attend(q * l_k, self.shared(k, group), self.shared(v, group)) * l_v
        return y.transpose(1, 2).flatten(2)


@right("IA3Attention")
class OnTheWeights(Repaired):
    def scaled(self, x):
        found = [self.q_proj(x)]
        for layer, n in ((self.k_proj, self.l_k), (self.v_proj, self.l_v)):
            bias = None if layer.bias is None else layer.bias * n
            found.append(F.linear(x, layer.weight * n[:, None], bias))
        return found


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
