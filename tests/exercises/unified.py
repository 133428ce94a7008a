"""Answers to the exercises of lesson 11."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peft_lessons.checks.mistakes import edited, read
from peft_lessons.engine import AdapterLayer, Method, PeftFiles, injection_of
from peft_lessons.methods.lora import LoRA
from peft_lessons.methods.unified import Design, Site, calls_of, own_change, own_layers

from . import Answers, Recipe

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ prefix_as_adapter


@wrong("prefix_as_adapter", "expected (3, 5, 6)")
def without_a_batch(x, w_q, prefix_k, prefix_v):
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ w_q.T @ prefix_k.T / len(w_q) ** 0.5).softmax(-1) @ prefix_v


@right("prefix_as_adapter")
@torch.no_grad()
def in_einsum_and_float64(x, w_q, prefix_k, prefix_v):
    x, w_q, prefix_k, prefix_v = (t.double() for t in (x, w_q, prefix_k, prefix_v))
    scores = torch.einsum("...td,hd,ph->...tp", x, w_q, prefix_k) / len(w_q) ** 0.5
    return torch.einsum("...tp,ph->...th", scores.softmax(-1), prefix_v)


@right("prefix_as_adapter")
def as_attention(x, w_q, prefix_k, prefix_v):
    keys, values = (t.expand(*x.shape[:-2], *t.shape) for t in (prefix_k, prefix_v))
    return F.scaled_dot_product_attention(x @ w_q.T, keys, values)


@right("prefix_as_adapter")
def as_an_array(x, w_q, prefix_k, prefix_v):
    return as_attention(x, w_q, prefix_k, prefix_v).numpy()


# ------------------------------------------------------------------ name_the_kind


def decided(probe, of_value):
    """Tell prefix and adapter by the attention, and the others by a function of (h, new)."""
    h, new = probe("value")
    if not torch.allclose(h, new):
        return of_value(h, new)
    return "adapter" if torch.equal(*probe("attention")) else "prefix"


@right("name_the_kind")
def by_quotients(probe, x):
    def of_value(h, new):
        if (new - h).std((0, 1)).max() < 1e-6:
            return "bitfit"
        return "ia3" if (new / h).flatten(0, 1).std(0).max() < 1e-6 else "lora"

    return decided(lambda where: probe(where, x), of_value)


@right("name_the_kind")
def by_arrays(probe, x):
    def of_value(h, new):
        h, new = (t.flatten(0, 1).numpy() for t in (h, new))
        if np.allclose(new - h, (new - h)[0]):
            return "bitfit"
        return "ia3" if np.allclose(new * h[0], new[0] * h) else "lora"

    return decided(lambda where: probe(where, x), of_value)


@right("name_the_kind")
def by_single_tokens(probe, x):
    """Where a text is a single token the attention gives what the value layer gives."""
    tokens = x.flatten(0, 1)[:, None]
    h, new = probe("attention", tokens)
    if torch.allclose(h, new):
        return "adapter"
    if not torch.allclose(new, probe("value", tokens)[1]):
        return "prefix"
    gaps = [(t - t[:1]).abs().max() for t in (new - h, new / h)]
    return "bitfit" if gaps[0] < 1e-6 else "ia3" if gaps[1] < 1e-6 else "lora"


@right("name_the_kind")
def by_channels(probe, x):
    """Each channel by itself, on one text in float32."""
    h, new = (t[0] for t in probe("value", x[:1].float()))
    if (h - new).abs().max() < 1e-9:
        gap = torch.dist(*probe("attention", x[:1]))
        return "prefix" if gap > 1e-9 else "adapter"
    found = set()
    for before, after in zip(h.T, new.T, strict=True):
        if (after - before).std() > 1e-9:
            line = torch.linalg.lstsq(before[:, None], after[:, None])
            found.add("ia3" if torch.dist(line.solution * before, after) < 1e-6 else "lora")
    return "bitfit" if not found else "ia3" if found == {"ia3"} else "lora"


@wrong("name_the_kind", "the same vector for every token, so no matrix made it of x")
def by_the_new_state(probe, x):
    def of_value(h, new):
        if torch.allclose(new, new[:1, :1]):
            return "bitfit"
        return "ia3" if torch.allclose(new * h[:1, :1], new[:1, :1] * h) else "lora"

    return decided(lambda where: probe(where, x), of_value)


@wrong("name_the_kind", "up to rounding h times a fixed factor for each channel")
def by_one_factor(probe, x):
    def of_value(h, new):
        if torch.allclose(new - h, (new - h)[:1, :1]):
            return "bitfit"
        factor = (h * new).sum() / (h * h).sum()
        return "ia3" if torch.allclose(new, factor * h) else "lora"

    return decided(lambda where: probe(where, x), of_value)


@wrong("name_the_kind", "the new h is up to rounding h times a fixed factor for each channel")
def without_rounding(probe, x):
    def of_value(h, new):
        if torch.equal(new - h, (new - h)[:1, :1].expand_as(h)):
            return "bitfit"
        return "ia3" if torch.equal(new / h, (new / h)[:1, :1].expand_as(h)) else "lora"

    return decided(lambda where: probe(where, x), of_value)


@wrong("name_the_kind", "no fixed factor for each channel makes h the new h")
def ia3_is_the_rest(probe, x):
    def of_value(h, new):
        change = (new - h).flatten(0, 1)
        rank = torch.linalg.matrix_rank(change).item()
        return "lora" if rank > 8 else "bitfit" if (change == change[0]).all() else "ia3"

    return decided(lambda where: probe(where, x), of_value)


@wrong("name_the_kind", "the value layer has changed, which an adapter leaves as it is")
def from_the_outside(probe, x):
    """By the block alone, which every method changes."""
    h, new = probe("block", x)
    return "lora" if torch.allclose(new, h) else "adapter"


@wrong("name_the_kind", "the value layer has not changed, so it is no LoRA")
def always_lora(probe, x):
    return decided(lambda where: probe(where, x), by_factor).replace("prefix", "lora")


def by_factor(h, new):
    if torch.allclose(new - h, (new - h)[:1, :1]):
        return "bitfit"
    return "ia3" if torch.allclose(new * h[:1, :1], new[:1, :1] * h) else "lora"


@wrong("name_the_kind", "your function never calls probe")
def guessed(probe, x):
    return "lora"


@wrong("name_the_kind", "'LoRA' is not one of 'lora', 'bitfit', 'ia3', 'prefix', 'adapter'")
def another_name(probe, x):
    return "LoRA" if torch.dist(*probe("value", x)) else "prefix"


@wrong("name_the_kind", '\'key\' is not "value", "attention" or "block"')
def another_place(probe, x):
    return "lora" if torch.dist(*probe("key", x)) else "prefix"


@wrong("name_the_kind", "the result is None: is a return statement missing?")
def some_forgotten(probe, x):
    if torch.dist(*probe("value", x)):
        return by_factor(*probe("value", x))


# ------------------------------------------------------------------ MyMethod

# Right; most answers below are edits of it.
SOURCE = '''
@dataclass(frozen=True)
class MyMethod(Method):
    """A low-rank step beside a layer."""

    rank: int = 4
    scale: float = 1.5
    targets: tuple[str, ...] | str = ("query", "value")
    files = PeftFiles(
        "MY_METHOD", tensors={"A": "A", "B": "B"},
        fields={"rank": ("r", 4), "scale": ("s", 1.5), "targets": ("target_modules", None)})
    learning_rate = 3e-3
    design = Design(
        form="x Aᵀ Bᵀ", insertion="parallel", modified="queries and values",
        composition="h + s · u",
        delta=lambda site: site.module.scale * (site.x @ site.module.A.T @ site.module.B.T),
    )

    def __post_init__(self):
        super().__post_init__()

    class Layer(AdapterLayer):
        def __init__(self, linear, rank, scale):
            super().__init__(linear)
            self.A = nn.Parameter(torch.randn(rank, linear.in_features) / 8)
            self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
            self.scale = scale

        def forward(self, x):
            h = self.base(x)
            if self.merged:
                return h
            return h + self.scale * (x @ self.A.T @ self.B.T)

        def merged_tensors(self):
            return self.base.weight + self.scale * self.B @ self.A, None

        def unmerged_tensors(self):
            return self.base.weight - self.scale * self.B @ self.A, None

    def wrap(self, path, layer):
        return self.Layer(layer, self.rank, self.scale)
'''


def defined(*edits, name="MyMethod"):
    """The class that SOURCE defines after these edits."""
    names = globals() | {"AdapterLayer": AdapterLayer, "LoRA": LoRA}
    exec(edited(SOURCE, edits), names)
    return names[name]


FORWARD = "return h + self.scale * (x @ self.A.T @ self.B.T)"
DELTA = "site.module.scale * (site.x @ site.module.A.T @ site.module.B.T)"
MADE = "self.Layer(layer, self.rank, self.scale)"

# A name, what is told, and the edits of SOURCE that it is told of.
EDITS = f"""
no dataclass: the class is not a dataclass
    @dataclass(frozen=True) → ∅
not frozen: write @dataclass(frozen=True)
    (frozen=True) → ∅
no type: its files name 'rank', not a field
    rank: int = 4 → rank = 4
no default: 'rank' has no default
    rank: int = 4 → rank: int
no super: super().__post_init__() first
    super().__post_init__() → pass
no files: no files of its own
    files = → kept =
number as type: must be a name, not
    "MY_METHOD" → 7
loras type: 'LORA' is that of LoRA already
    "MY_METHOD" → "LORA"
loras type inherited: It inherits those of 'LORA'
    (Method): → (LoRA):
    files = → kept =

no wrap: it has no wrap
    def wrap → def wraps
names of a llama: 'query' matches no module
    ("query", "value") → "query"
too wide: rank=400 is above
    rank: int = 4 → ranks = ("rank",); rank: int = 400
no adapted: wrap returns a module (Layer), and
    (AdapterLayer): → (nn.Module):
    super().__init__(linear) → super().__init__(); self.base = linear
    if self.merged: → if False:
layer returned: wrap returns a module (Linear)
    {MADE} → layer
no super in layer: Call super().__init__(linear) first
    super().__init__(linear) → ∅
missing argument: when it was put into the base, it raised TypeError
    {MADE} → self.Layer(layer, self.rank)
frozen parameter: 'A' is a frozen nn.Parameter
    self.A = nn.Parameter( → self.A = nn.Parameter(requires_grad=False, data=
plain tensor: 'B' is a plain tensor
    self.B = nn.Parameter( → self.B = (
only plain floats: nothing of it trains
    self.A = nn.Parameter( → self.register_buffer("A",
    self.B = nn.Parameter( → self.register_buffer("B",
second name: the base trains: 'W' of your layer is the base's own
    self.scale = scale → self.scale, self.W = scale, linear.weight
changed at once: is changed in place: right after inject
    self.scale = scale → self.scale = scale; linear.weight.data *= 0.9
changed in forward: is changed in place: once forward has run
    {FORWARD} → self.base.weight.data += self.scale * self.B @ self.A; return self.base(x)
input changed: forward changes its input in place
    {FORWARD} → return h + x.mul_(self.scale) @ self.A.T @ self.B.T
not filled: the logits hold nan
    torch.zeros(linear.out_features, rank) → torch.zeros(linear.out_features, rank) / 0
not used: it changes nothing
    {FORWARD} → return h

no design: it has no design
    design = → kept =
parents design: The design of its parent class does not count
    design = → kept =
    (Method): → (LoRA):
words for a design: its design is a string, expected a Design
    design = → design = "h + s · x Aᵀ Bᵀ"; kept =
no words: does not say its form
    form="x Aᵀ Bᵀ" → form=""
without the scale: It is 0.666667 times what running gives, everywhere: is the scale missing
    {DELTA} → (site.x @ site.module.A.T @ site.module.B.T)
without a scale of one: right with scale=1.0, but with scale=1.5 it is off
    scale: float = 1.5 → scale: float = 1.0
    {DELTA} → (site.x @ site.module.A.T @ site.module.B.T)
a fixed scale: right with scale=1.5, but with scale=2.25
    {DELTA} → 1.5 * (site.x @ site.module.A.T @ site.module.B.T)
forward without h: Forward returns the change alone: add h, which is self.base(x)
    {FORWARD} → return self.scale * (x @ self.A.T @ self.B.T)
a wrong word: its insertion is 'sequential', but delta reads x alone
    insertion="parallel" → insertion="sequential"
no word of the two: its insertion is 'around', but delta reads x alone
    insertion="parallel" → insertion="around"
parallel and reads h: its insertion is 'parallel', but delta reads h alone
    linear.in_features → linear.out_features
    {FORWARD} → return h + self.scale * (h @ self.A.T @ self.B.T)
    {DELTA} → site.module.scale * (site.h @ site.module.A.T @ site.module.B.T)
reads h: It is right with x and h exchanged
    site.x → site.h
the new state: Delta gives the new state h + Δh: it must give the change alone
    {DELTA} → site.h + {DELTA}
turned sign: Its sign is reversed
    {DELTA} → -{DELTA}
with a bias: off by the same vector for every token
    {DELTA} → {DELTA} + site.module.bias
another formula: The largest entry is
    {DELTA} → ({DELTA}).relu()
a number: delta gives the float
    {DELTA} → ({DELTA}).norm().item()
a low state: delta gives a tensor of shape (16, 8, 4)
    {DELTA} → site.x @ site.module.A.T
a misnamed tensor: when its design was compared with running, it raised AttributeError
    site.module.A → site.module.lora_A
nothing observed: its design finds no layer
    {DELTA} → {DELTA}, sites=lambda model, batch: []
another methods example: the example of its design is a LoRA, not one of it
    {DELTA} → {DELTA}, example=LoRA()

two zeros: 'A' and 'B' start at zero and are multiplied with each other
    torch.randn(rank, linear.in_features) → torch.zeros(rank, linear.in_features)
cut off: no gradient reaches 'A'
    x @ self.A.T → x @ self.A.data.T
left over: no gradient reaches 'C'
    self.scale = scale → self.scale, self.C = scale, nn.Parameter(torch.ones(rank))
far too fast: fit diverges
    learning_rate = 3e-3 → learning_rate = 1e30
far too slow: small: nothing moves
    learning_rate = 3e-3 → learning_rate = 1e-30
uphill: large: the loss rises
    {FORWARD} → d = self.scale * (x @ self.A.T @ self.B.T); return h + 2 * d.detach() - d
strength never used: 'strength' has no effect: with strength=3.0
    scale: float = 1.5 → scale: float = 1.5; strength: float = 2.0
    "rank": → "strength": ("strength", 2.0), "rank":
field without effect: 'depth' has no effect: with depth=3
    scale: float = 1.5 → scale: float = 1.5; depth: int = 2
    "rank": → "depth": ("depth", 2), "rank":

rank forgotten: 'rank' is missing in the fields
    "rank": ("r", 4), → ∅
one name for two fields: two fields have one name in the file, 'r'
    ("s", 1.5) → ("r", 1.5)
tensor forgotten: 'B' is missing in `tensors`
    , "B": "B" → ∅
tensor misnamed: (which names 'b'; there is none)
    "B": "B" → "b": "B"
one name for two: two tensors are called
    "B": "B" → "B": "A"
buffer forgotten: 'A' is missing in `tensors`, so
    self.A = nn.Parameter( → self.register_buffer("A",
    "A": "A", → ∅
buffer that no file holds: saved and loaded it does not compute the same
    self.A = nn.Parameter( → self.register_buffer("A", persistent=False, tensor=
    "A": "A", → ∅
a dtype in the file: save_adapter raised TypeError: Object of type dtype
    scale: float = 1.5 → scale: float = 1.5; dtype: object = torch.float32
    "rank": → "dtype": ("dtype", None), "rank":

merged ignored: then counts twice
    if self.merged: → if False:
merged without scale: the weights do not compute what forward did
    weight + self.scale * self.B @ self.A → weight + self.B @ self.A
never unmerged: it can be merged but not unmerged
    def unmerged_tensors → def taken_out
unmerged the wrong way: merged and unmerged, the base is not what it was
    weight - self.scale → weight + 0 * self.scale
"""


def changed(name, edits):
    def make():
        return defined(*edits)

    make.__name__ = name
    return Recipe(make)


for sentence, edits in read(EDITS):
    name, _, told = sentence.partition(": ")
    wrong("MyMethod", told)(changed(name, edits))


@wrong("MyMethod", "by the example of its design, the formula is not what running gives")
@Recipe
def wrong_for_its_example():
    made = defined(
        'rank: int = 4 → rank: int = 4; way: str = "plain"',
        '"rank": → "way": ("way", "plain"), "rank":',
        "self.scale = scale → self.scale, self.times = scale, 1",
        "h + self.scale * → h + self.times * self.scale *",
        f"return {MADE} → made = {MADE}; made.times += self.way == 'twice'; return made",
    )
    made.design = replace(made.design, example=made(way="twice"))
    return made


@wrong("MyMethod", "pass the class itself, not an instance")
@Recipe
def an_instance():
    return defined()()


@wrong("MyMethod", "this class is not a method: write class MyMethod(Method)")
@Recipe
def no_method():
    return defined("(Method): → :")


def steering(keep_handles=True, leaves_more=False):
    """A vector for each block, which a hook adds to what the block gives."""

    def ends(model):
        return {p: m for p, m in model.named_modules() if type(m).__name__ == "BertOutput"}

    def observed(model, batch):
        v, calls = injection_of(model).attached.v, calls_of(model, batch, ends(model))
        return [
            Site(path, module, args[0], module.forward(*args), new, {"v": v[i]})
            for i, (path, module, args, new) in enumerate(calls)
        ]

    @dataclass(frozen=True)
    class MyMethod(Method):
        files = PeftFiles("STEERING", tensors={"v": "v"})
        learning_rate = 1e-2
        design = Design(
            form="v",
            insertion="reads nothing",
            modified="output of every block",
            composition="h + Δh",
            delta=lambda site: site.more["v"],
            sites=observed,
        )

        def attach(self, model):
            blocks = ends(model).values()
            shifts = nn.Module()
            shifts.v = nn.Parameter(torch.zeros(len(blocks), model.config.hidden_size))
            if leaves_more:
                model.extra = nn.Linear(2, 2)
            handles = [
                block.register_forward_hook(lambda m, args, out, i=i: out + shifts.v[i])
                for i, block in enumerate(blocks)
            ]
            return shifts, handles if keep_handles else []

    return MyMethod


@wrong("MyMethod", "a hook is left in it")
@Recipe
def handles_forgotten():
    return steering(keep_handles=False)


@wrong("MyMethod", "it puts 'extra.weight' into the model by itself")
@Recipe
def left_in_the_model():
    return steering(leaves_more=True)


@right("MyMethod")
@Recipe
def bent():
    """A child of LoRA with a layer of its own that does not merge."""
    return defined(
        "(Method): → (LoRA):",
        "(x @ self.A.T @ self.B.T) → (F.gelu(x @ self.A.T) @ self.B.T)",
        "(site.x @ site.module.A.T @ → (F.gelu(site.x @ site.module.A.T) @",
        "return self.base.weight + self.scale * self.B @ self.A, None → raise TypeError",
        "def unmerged_tensors → def taken_out",
    )


@right("MyMethod")
@Recipe
def hooks():
    return steering()


@right("MyMethod")
@Recipe
def low_rank():
    return defined()


@right("MyMethod")
@Recipe
def norms_alone():
    """Nothing is added: the norms of the base train themselves."""

    @dataclass(frozen=True)
    class MyMethod(Method):
        files = PeftFiles("NORMS_ALONE")
        learning_rate = 1e-2
        design = Design(
            form="x̂ ⊙ Δg + Δb",
            insertion="parallel",
            modified="output of the norms",
            composition="h + Δh",
            delta=own_change,
            sites=own_layers,
        )

        def select(self, model):
            return [n for n, _ in model.named_parameters() if "LayerNorm" in n]

    return MyMethod


@right("MyMethod")
@Recipe
def beside_a_norm():
    """Wraps no Linear, does not start as the base, and has no rule to merge."""
    return defined(
        '("query", "value") → ("attention.output.LayerNorm",); takes = (nn.LayerNorm,)',
        "torch.randn(rank, linear.in_features) → torch.randn(rank, len(linear.weight))",
        "torch.zeros(linear.out_features, rank) → torch.randn(len(linear.weight), rank) / 8",
        "def merged_tensors → def put_in",
        "def unmerged_tensors → def taken_out",
    )
