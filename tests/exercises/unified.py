"""Answers to the exercises of lesson 11."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_lessons.engine import AdapterLayer, Method, PeftFiles, injection_of
from peft_lessons.methods.lora import LoRA
from peft_lessons.methods.unified import Design, Site, calls_of, own_change, own_layers

from . import Answers, Recipe

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ prefix_as_adapter


@wrong("prefix_as_adapter", "f is ReLU here")
def an_adapter(x, w_q, prefix_k, prefix_v):
    w_down = prefix_k @ w_q / len(w_q) ** 0.5
    return F.relu(x @ w_down.T) @ prefix_v


@wrong("prefix_as_adapter", "your function raised RuntimeError")
def not_transposed(x, w_q, prefix_k, prefix_v):
    return (x @ w_q @ prefix_k.T / len(w_q) ** 0.5).softmax(-1) @ prefix_v


@wrong("prefix_as_adapter", "Δh holds nan")
def overflowing(x, w_q, prefix_k, prefix_v):
    weights = (x @ w_q.T @ prefix_k.T / len(w_q) ** 0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ prefix_v


@wrong("prefix_as_adapter", "expected (3, 5, 6)")
def without_a_batch(x, w_q, prefix_k, prefix_v):
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ w_q.T @ prefix_k.T / len(w_q) ** 0.5).softmax(-1) @ prefix_v


@right("prefix_as_adapter")
def as_attention(x, w_q, prefix_k, prefix_v):
    keys, values = (t.expand(*x.shape[:-2], *t.shape) for t in (prefix_k, prefix_v))
    return F.scaled_dot_product_attention(x @ w_q.T, keys, values)


@right("prefix_as_adapter")
def as_layers(x, w_q, prefix_k, prefix_v):
    down = w_q.T @ prefix_k.T / math.sqrt(prefix_k.shape[-1])
    low = x @ down
    low = (low - low.amax(-1, keepdim=True)).exp()
    return F.linear(low, prefix_v.T) / low.sum(-1, keepdim=True)


# ------------------------------------------------------------------ compose


def mixed(h, delta, scale, gate):
    """Right, for the answers that go wrong elsewhere."""
    if gate is None:
        return h + scale * delta
    return (1 - gate) * h + gate * scale * delta


@wrong("compose", "Boolean value of Tensor")
def truth_of_a_tensor(h, delta, scale, gate=None):
    if gate == 0.0 or gate:
        return mixed(h, delta, scale, gate)
    return mixed(h, delta, scale, None)


@wrong("compose", "the gate is scaled with the change")
def by_lerp(h, delta, scale, gate=None):
    if gate is None:
        return mixed(h, delta, scale, gate)
    return h + gate * scale * (delta - h)


@wrong("compose", "no gradient reaches gate")
def a_number_of_the_gate(h, delta, scale, gate=None):
    return mixed(h, delta, scale, gate.detach() if isinstance(gate, torch.Tensor) else gate)


@right("compose")
def towards_the_change(h, delta, scale, gate=None):
    change = scale * delta
    return h + change if gate is None else h + gate * (change - h)


@right("compose")
def in_float64(h, delta, scale, gate=None):
    kept, change = h.double().clone(), delta.double() * scale
    if gate is not None:
        gate = torch.as_tensor(gate).double()
        kept, change = kept - gate * kept, change * gate
    return kept.add(change).to(dtype=h.dtype)


# ------------------------------------------------------------------ MyMethod

# Right; the answers below change a line of it.
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
        composition="h + s · Δh",
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
NAMES = {
    "__name__": __name__,
    "AdapterLayer": AdapterLayer,
    "Any": Any,
    "Design": Design,
    "F": F,
    "LoRA": LoRA,
    "Method": Method,
    "PeftFiles": PeftFiles,
    "dataclass": dataclass,
    "nn": nn,
    "replace": replace,
    "torch": torch,
}


def defined(source, name="MyMethod"):
    names = dict(NAMES)
    exec(source, names)
    return names[name]


def edited(name, *changes):
    """A class from SOURCE with some of its text exchanged, (old, new), and once only."""

    def make():
        source = SOURCE
        for old, new in changes:
            assert source.count(old) == 1, (name, old, source.count(old))
            source = source.replace(old, new)
        return defined(source)

    make.__name__ = name
    return Recipe(make)


FORWARD = "return h + self.scale * (x @ self.A.T @ self.B.T)"
DELTA = "site.module.scale * (site.x @ site.module.A.T @ site.module.B.T)"
HEAD = "@dataclass(frozen=True)\nclass MyMethod(Method):"
MERGE = """
        def merged_tensors(self):
            return self.base.weight + self.scale * self.B @ self.A, None

        def unmerged_tensors(self):
            return self.base.weight - self.scale * self.B @ self.A, None
"""
WRAP = """
    def wrap(self, path, layer):
        return self.Layer(layer, self.rank, self.scale)
"""
TWICE = """layer = self.Layer(layer, self.rank, self.scale)
        if self.way == "twice":
            layer.register_forward_hook(lambda module, args, y: 2 * y - module.base(*args))
        return layer


MyMethod.design = replace(MyMethod.design, example=MyMethod(way="twice"))"""
FILES = SOURCE[SOURCE.index("    files =") : SOURCE.index("    learning_rate")]
DESIGN = SOURCE[SOURCE.index("    design =") : SOURCE.index("    def __post_init__")]

# A change of SOURCE, and what it must be told.
EDITS = {
    # what it is
    "no_dataclass": ("the class is no dataclass", (HEAD, "class MyMethod(Method):")),
    "not_frozen": ("write @dataclass(frozen=True)", ("(frozen=True)", "")),
    "no_type": ("its files name 'rank', which is no field", ("rank: int = 4", "rank = 4")),
    "no_default": ("'rank' has no default", ("rank: int = 4", "rank: int")),
    "no_super": ("super().__post_init__() first", ("super().__post_init__()", "pass")),
    "no_files": ("no files of its own", (FILES, "")),
    "number_as_type": ("must be a name, not", ('"MY_METHOD"', "7")),
    "loras_type": ("'LORA' is that of LoRA already", ('"MY_METHOD"', '"LORA"')),
    "loras_type_inherited": (
        "It inherits those of 'LORA'",
        ("(Method):", "(LoRA):"),
        (FILES, ""),
    ),
    # what it puts into the model
    "no_wrap": ("it has no wrap", (WRAP, "")),
    "names_of_a_llama": ("'query' matches no module", ('("query", "value")', '"query"')),
    "too_wide": (
        "rank=400 is above",
        ("rank: int = 4", "ranks = ('rank',)\n    rank: int = 400"),
    ),
    "no_adapted": (
        "wrap returns a module (Layer), and",
        ("(AdapterLayer):", "(nn.Module):"),
        ("super().__init__(linear)", "super().__init__(); self.base = linear"),
        ("if self.merged:", "if False:"),
    ),
    "layer_returned": (
        "wrap returns a module (Linear)",
        ("return self.Layer(layer, self.rank, self.scale)", "return layer"),
    ),
    "no_super_in_layer": (
        "Call super().__init__(linear) first",
        ("            super().__init__(linear)\n", ""),
    ),
    "missing_argument": (
        "when it was put into a small BERT it raised TypeError",
        ("self.Layer(layer, self.rank, self.scale)", "self.Layer(layer, self.rank)"),
    ),
    "plain_tensor": ("'B' is a plain tensor", ("self.B = nn.Parameter(", "self.B = (")),
    "only_plain_floats": (
        "nothing of it trains",
        ("self.A = nn.Parameter(", "self.register_buffer('A', "),
        ("self.B = nn.Parameter(", "self.register_buffer('B', "),
    ),
    "second_name": (
        "the base trains: 'W' of your layer is the base's own",
        ("self.scale = scale", "self.scale, self.W = scale, linear.weight"),
    ),
    "changed_at_once": (
        "is changed in place: right after inject",
        ("self.scale = scale", "self.scale = scale; linear.weight.data *= 0.9"),
    ),
    "changed_in_forward": (
        "is changed in place: once forward has run",
        (FORWARD, "self.base.weight.data += self.scale * self.B @ self.A; return self.base(x)"),
    ),
    "input_changed": (
        "forward changes its input in place",
        (FORWARD, "return h + x.mul_(self.scale) @ self.A.T @ self.B.T"),
    ),
    "not_filled": (
        "the logits hold nan",
        ("torch.zeros(linear.out_features, rank)", "torch.zeros(linear.out_features, rank) / 0"),
    ),
    "not_used": ("it changes nothing", (FORWARD, "return h")),
    "forward_fails": (
        "when it was put into a small BERT it raised RuntimeError",
        (FORWARD, "return h + self.scale * (x @ self.A @ self.B.T)"),
    ),
    # its formula
    "no_design": ("it has no design", (DESIGN, "")),
    "parents_design": (
        "That of its parent is not its own",
        (DESIGN, ""),
        ("(Method):", "(LoRA):"),
    ),
    "words_for_a_design": (
        "its design is a string, expected a Design",
        (DESIGN, "    design = 'h + s · x Aᵀ Bᵀ'\n\n"),
    ),
    "no_words": ("does not say its form", ('form="x Aᵀ Bᵀ"', 'form=""')),
    "without_the_scale": (
        "It is 0.666667 times what running gives, everywhere: is the scale missing",
        (DELTA, "(site.x @ site.module.A.T @ site.module.B.T)"),
    ),
    "without_a_scale_of_one": (
        "right with scale=1.0, but with scale=1.5 it is off",
        ("scale: float = 1.5", "scale: float = 1.0"),
        (DELTA, "site.x @ site.module.A.T @ site.module.B.T"),
    ),
    "a_fixed_scale": (
        "right with scale=1.5, but with scale=2.25",
        (DELTA, "1.5 * (site.x @ site.module.A.T @ site.module.B.T)"),
    ),
    "reads_h": (
        "It is right with x and h exchanged",
        (DELTA, DELTA.replace("site.x", "site.h")),
    ),
    "the_new_state": ("It gives the new state h + Δh", (DELTA, f"site.h + {DELTA}")),
    "turned_sign": ("Its sign is turned", (DELTA, f"-{DELTA}")),
    "with_a_bias": (
        "off by the same vector for every token",
        (DELTA, f"{DELTA} + site.module.bias"),
    ),
    "another_formula": ("The largest entry is", (DELTA, f"({DELTA}).relu()")),
    "a_number": ("delta gives the float", (DELTA, f"({DELTA}).norm().item()")),
    "a_low_state": (
        "delta gives a tensor of shape (16, 8, 4)",
        (DELTA, "site.x @ site.module.A.T"),
    ),
    "a_misnamed_tensor": (
        "when its design was compared with running it raised AttributeError",
        (DELTA, DELTA.replace("module.A", "module.lora_A")),
    ),
    "nothing_observed": (
        "its design sees no place",
        (f"delta=lambda site: {DELTA}", f"delta=lambda site: {DELTA}, sites=lambda m, b: []"),
    ),
    "another_methods_example": (
        "the example of its design is a LoRA, not one of it",
        (f"delta=lambda site: {DELTA}", f"delta=lambda site: {DELTA}, example=LoRA()"),
    ),
    "wrong_for_its_example": (
        "by the example of its design, the formula is not what running gives",
        ("rank: int = 4", 'rank: int = 4\n    way: str = "plain"'),
        ('{"rank": ', '{"way": ("way", "plain"), "rank": '),
        ("return self.Layer(layer, self.rank, self.scale)", TWICE),
    ),
    # its training
    "two_zeros": (
        "'A' and 'B' start at zero and are multiplied with each other",
        ("torch.randn(rank, linear.in_features) / 8", "torch.zeros(rank, linear.in_features)"),
    ),
    "cut_off": ("no gradient reaches 'A'", (FORWARD, FORWARD.replace("self.A", "self.A.data"))),
    "left_over": (
        "no gradient reaches 'C'",
        ("self.scale = scale", "self.scale, self.C = scale, nn.Parameter(torch.ones(rank))"),
    ),
    "far_too_fast": ("fit diverges", ("learning_rate = 3e-3", "learning_rate = 1e30")),
    "far_too_slow": ("small: nothing moves", ("learning_rate = 3e-3", "learning_rate = 1e-30")),
    "uphill": (
        "large: the loss rises",
        (FORWARD, "d = self.scale * (x @ self.A.T @ self.B.T); return h + 2 * d.detach() - d"),
    ),
    "field_without_effect": (
        "'depth' has no effect: with depth=3",
        ("scale: float = 1.5", "scale: float = 1.5\n    depth: int = 2"),
        ('{"rank": ', '{"depth": ("depth", 2), "rank": '),
    ),
    # its file
    "rank_forgotten": ("'rank' is missing in the fields", ('"rank": ("r", 4), ', "")),
    "scale_forgotten": ("'scale' is missing in the fields", ('"scale": ("s", 1.5), ', "")),
    "targets_forgotten": (
        "'targets' is missing in the fields",
        (', "targets": ("target_modules", None)', ""),
    ),
    "one_name_for_two_fields": (
        "two fields have one name in the file, 'r'",
        ('("s", 1.5)', '("r", 1.5)'),
    ),
    "tensor_forgotten": ("'B' is missing in `tensors`", (', "B": "B"}', "}")),
    "tensor_misnamed": ("(which names 'b'; there is none)", ('"B": "B"', '"b": "B"')),
    "one_name_for_two": (
        "two of `tensors` have one name in the file, 'A'",
        ('"B": "B"', '"B": "A"'),
    ),
    "buffer_forgotten": (
        "'A' is missing in `tensors`, so",
        ("self.A = nn.Parameter(", "self.register_buffer('A', "),
        ('"A": "A", ', ""),
    ),
    "buffer_that_no_file_holds": (
        "saved and loaded it does not compute the same",
        ("self.A = nn.Parameter(", "self.register_buffer('A', persistent=False, tensor="),
        ('"A": "A", ', ""),
    ),
    "a_dtype_in_the_file": (
        "save_adapter raised TypeError: Object of type dtype",
        ("scale: float = 1.5", "scale: float = 1.5\n    dtype: Any = torch.float32"),
        ('{"rank": ', '{"dtype": ("dtype", None), "rank": '),
    ),
    # in and out
    "merged_ignored": ("then counts twice", ("if self.merged:", "if False:")),
    "merged_without_scale": (
        "the weights do not compute what forward did",
        ("weight + self.scale * self.B @ self.A", "weight + self.B @ self.A"),
    ),
    "never_unmerged": (
        "it merges and cannot be taken out again",
        (MERGE, MERGE.partition("\n\n")[0] + "\n"),
    ),
    "unmerged_the_wrong_way": (
        "merged and unmerged, the base is not what it was",
        ("weight - self.scale", "weight + 0 * self.scale"),
    ),
}
for name, (told, *changes) in EDITS.items():
    wrong("MyMethod", told)(edited(name, *changes))


def recipe(make):
    return Recipe(make)


@wrong("MyMethod", "hand over the class itself, not an instance")
@recipe
def an_instance():
    return defined(SOURCE)()


@wrong("MyMethod", "this class is no method: write class MyMethod(Method)")
@recipe
def no_method():
    return defined(SOURCE.replace("class MyMethod(Method)", "class MyMethod"))


@wrong("MyMethod", "another class of this name was defined after it")
@recipe
def defined_again():
    older = defined(SOURCE)
    older.newer = defined(SOURCE)  # kept, as a notebook would keep it
    return older


@wrong("MyMethod", "is that of MyOther already")
@recipe
def renamed():
    other = defined(SOURCE.replace("class MyMethod", "class MyOther"), "MyOther")
    mine = defined(SOURCE)
    mine.older = other  # as a notebook would keep it
    return mine


def steering(keep_handles=True, **left):
    """A vector for each block, which a hook adds to what the block gives."""

    class Shifts(nn.Module):
        def __init__(self, blocks, d):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(blocks, d))

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
            shifts = Shifts(len(blocks), model.config.hidden_size)
            for name, make in left.items():
                model.add_module(name, make(shifts))
            handles = [
                block.register_forward_hook(lambda m, args, out, i=i: out + shifts.v[i])
                for i, block in enumerate(blocks)
            ]
            return shifts, handles if keep_handles else []

    return MyMethod


@wrong("MyMethod", "a hook is left in it")
@recipe
def handles_forgotten():
    return steering(keep_handles=False)


@wrong("MyMethod", "it puts 'extra.weight' into the model by itself")
@recipe
def left_in_the_model():
    return steering(extra=lambda shifts: nn.Linear(2, 2))


@wrong("MyMethod", "it puts 'shifts.v' into the model by itself")
@recipe
def put_into_the_model():
    return steering(shifts=lambda shifts: shifts)


right("MyMethod")(
    edited(
        "bent",
        (FORWARD, "return h + self.scale * F.gelu(x @ self.A.T) @ self.B.T"),
        (DELTA, "site.module.scale * F.gelu(site.x @ site.module.A.T) @ site.module.B.T"),
        (MERGE, MERGE.partition("return")[0] + 'raise TypeError("it is not linear")\n'),
    )
)


@right("MyMethod")
@recipe
def hooks():
    return steering()


@right("MyMethod")
@recipe
def low_rank():
    return defined(SOURCE)


@right("MyMethod")
@recipe
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


class Scaled(AdapterLayer):
    """VeRA's idea in small: two fixed random matrices, and two vectors that train."""

    def __init__(self, base, rank):
        super().__init__(base)
        self.register_buffer("A", torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.register_buffer("B", torch.randn(base.out_features, rank) / rank**0.5)
        self.d = nn.Parameter(torch.full((rank,), 0.1))
        self.b = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A) * self.d, self.B) * self.b


@right("MyMethod")
@recipe
def from_lora():
    """A child of LoRA with a layer of its own that does not merge."""

    @dataclass(frozen=True)
    class MyMethod(LoRA):
        rank: int = 6
        files = PeftFiles(
            "RANDOM_BASIS",
            fields={"rank": ("r", 6), "targets": ("target_modules", None)},
            tensors={name: f"my_{name}" for name in "ABdb"},
        )

        def wrap(self, path, layer):
            return Scaled(layer, self.rank)

    def delta(site):
        layer = site.module
        low = torch.einsum("...i,ri->...r", site.x, layer.A) * layer.d
        return torch.einsum("...r,or->...o", low, layer.B) * layer.b

    MyMethod.design = (Design("((x Aᵀ) ⊙ d) Bᵀ ⊙ b", "parallel", "any layer", "h + Δh", delta),)
    return MyMethod


@right("MyMethod")
@recipe
def scaled_norm():
    """Wraps no Linear, and does not start as the base."""

    class Tempered(AdapterLayer):
        def __init__(self, base):
            super().__init__(base)
            self.t = nn.Parameter(torch.full(base.weight.shape, 0.05))

        def forward(self, x):
            h = self.base(x)
            return h + torch.tanh(h) * self.t

    @dataclass(frozen=True)
    class MyMethod(Method):
        targets: tuple[str, ...] | str = ("attention.output.LayerNorm",)
        takes = (nn.LayerNorm,)
        files = PeftFiles(
            "TEMPERED", fields={"targets": ("target_modules", None)}, tensors={"t": "t"}
        )
        learning_rate = 1e-2
        design = Design(
            form="tanh(h) ⊙ t",
            insertion="sequential",
            modified="what the attention's norm gives",
            composition="h + Δh",
            delta=lambda site: site.h.tanh() * site.module.t,
        )

        def wrap(self, path, layer):
            return Tempered(layer)

    return MyMethod
