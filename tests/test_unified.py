"""Every method as h + Δh, compared with running; and the method that is made by mixing two."""

import gc
import inspect
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import (
    EACH,
    MODELS,
    SIZES,
    batch_of,
    close,
    hooks,
    perturb,
    refused,
    same,
    state,
    task_of,
)
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, DynamicCache

from peft_lessons import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DiffPruning,
    DoRA,
    LoRA,
    MixAndMatch,
    PartialFineTuning,
    Prefix,
    Prompt,
    QLoRA,
    check,
    fit,
    inject,
)
from peft_lessons.engine import (
    DESIGNS,
    AdapterLayer,
    Method,
    PeftFiles,
    injection_of,
    registered_methods,
)
from peft_lessons.methods.prefix import fill, make_room
from peft_lessons.methods.unified import (
    Design,
    attention,
    check_design,
    designs_of,
    gap,
    linears,
    moved,
    own_layers,
    unified_table,
)
from tools import notebooks

COURSE = [m for m in registered_methods() if m.__module__.startswith("peft_lessons.")]
BATCH = batch_of("bert")
EXACT = 1e-10  # in float64; what is asked for is 1e-5


def bert():
    """As `tiny_bert`, with a feed-forward whose width 4-bit layers take."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=64, num_labels=2)
    model = perturb(BertForSequenceClassification(config), 0.05)
    model.fresh_modules = ("classifier",)
    return model


BASE = bert()


@pytest.fixture(autouse=True)
def no_method_of_a_test_stays():
    yield
    if any(method.__module__ == "__main__" for method in registered_methods()):
        gc.collect()


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("kind", COURSE, ids=lambda kind: kind.__name__)
def test_every_method_of_the_course_is_its_formula(kind):
    rows = check_design(kind, BASE, BATCH)
    assert len(rows) == len(designs_of(kind))
    for row in rows:
        assert row["places"] > 0 and row["numbers"] > 0
        assert row["gap"] < EXACT
        assert all(row[c] for c in ("form", "insertion", "modified", "composition"))


def test_the_course_s_methods_are_all_there():
    assert {kind.__name__ for kind in COURSE} >= {
        "AdaLoRA", "BitFit", "BottleneckAdapter", "DiffPruning", "DoRA", "IA3", "LoRA",
        "MixAndMatch", "PartialFineTuning", "Prefix", "Prompt", "QLoRA",
    }  # fmt: skip


def test_the_table_has_a_row_for_each_design_and_is_computed():
    rows = unified_table(BASE, BATCH)
    assert {tuple(row) for row in rows} == {
        ("method", "form", "insertion", "modified", "composition", "places", "numbers", "gap")
    }
    mine = {kind.__name__: len(designs_of(kind)) for kind in COURSE}
    found = [row["method"] for row in rows]
    assert {name: found.count(name) for name in mine} == mine
    one = next(row for row in rows if row["method"] == "LoRA")
    # Six layers in each of two blocks, and the pooler's; 8 · (in + out) numbers each.
    shapes = [m.weight.shape for n, m in BASE.named_modules() if type(m) is nn.Linear]
    assert one["places"] == 13 == len(shapes) - 1
    assert one["numbers"] == 8 * sum(sum(shape) for shape in shapes[:-1])


@pytest.mark.parametrize("kind", COURSE, ids=lambda kind: kind.__name__)
def test_numbers_are_those_that_train_without_the_head(kind):
    design = designs_of(kind)[0]
    model = bert()
    told = inject(model, design.example)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert check_design(kind, BASE, BATCH)[0]["numbers"] == told.trainable - head


def test_looking_changes_nothing():
    model = bert().train()
    before, random = state(model), torch.get_rng_state()
    unified_table(model, BATCH)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), random)
    assert model.training and injection_of(model) is None
    assert not hooks(model)


def test_an_observer_leaves_no_hook_even_if_the_model_fails():
    model = bert()
    inject(model, DESIGNS[LoRA].example)
    assert len(linears(model, BATCH)) == 13 and not hooks(model)
    with refused(model, "input_ids"):
        linears(model, {})


def test_two_looks_see_the_same():
    assert check_design(LoRA, BASE, BATCH) == check_design(LoRA, BASE, BATCH)


@pytest.mark.parametrize(
    ("method", "forms"),
    [
        (BottleneckAdapter(4, "pfeiffer", "tanh", 0.3), ["f(LN(h + x) W_downᵀ + b) W_upᵀ + b′"]),
        (BottleneckAdapter(4, "houlsby", "relu"), ["f(h W_downᵀ + b) W_upᵀ + b′"]),
        (BottleneckAdapter(4, "parallel", "silu", 4.0), ["f(x W_downᵀ + b) W_upᵀ + b′"]),
        (IA3(("key", "value"), ()), ["h ⊙ (l − 1)"]),
        (IA3(("intermediate.dense",), ("intermediate.dense",)), ["(x ⊙ (l − 1)) Wᵀ"]),
        (LoRA(3, 5.0, ("key", "output.dense"), 0.2, rslora=True), ["x Aᵀ Bᵀ"]),
        (DiffPruning(targets=("query",)), ["x (z ⊙ w)ᵀ"]),
        (DiffPruning(targets=("query",), gates=False), ["x (z ⊙ w)ᵀ"]),
        (Prefix(5, projection=12), [DESIGNS[Prefix].form]),
        (
            PartialFineTuning(patterns=("key.weight", "LayerNorm")),
            [DESIGNS[PartialFineTuning].form],
        ),
        (MixAndMatch(3, 7, 0.5), [d.form for d in DESIGNS[MixAndMatch]]),
    ],
    ids=repr,
)
def test_an_instance_stands_for_itself(method, forms):
    rows = check_design(method, BASE, BATCH)
    assert [row["form"] for row in rows] == forms
    assert all(row["gap"] < EXACT and row["places"] for row in rows)


def test_the_layers_that_qlora_merely_quantises_are_no_places():
    (row,) = check_design(QLoRA(4, 8.0, ("query",)), BASE, BATCH)
    assert row["places"] == 2 and row["gap"] < EXACT


# ------------------------------------------------------------------ what is seen of a place


@pytest.mark.parametrize("method", [Prefix(4), Prompt(4), MixAndMatch(4, 8)], ids=repr)
def test_h_of_an_attention_is_what_the_base_s_own_module_gives(method):
    plain, sites = deepcopy(BASE).double(), attention(moved(BASE, method), BATCH)
    assert len(sites) == 2
    seen = BATCH["attention_mask"][:, None, None].bool()
    for site in sites:
        layer = plain.get_submodule(site.path)
        expected = layer(site.x, torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf))
        close(site.h, expected[0], 1e-12)
        assert site.x.shape == site.h.shape == site.new.shape == (3, 12, 64)
        assert (site.new - site.h).abs().max() > 1e-3


def test_in_bert_a_prompt_s_keys_depend_on_the_text_and_a_prefix_s_do_not():
    (first, second) = attention(moved(BASE, Prompt(4)), BATCH)
    for name in ("keys", "values"):
        assert torch.equal(first.more[name][0], first.more[name][1])
        assert (second.more[name][0] - second.more[name][1]).abs().max() > 1e-3
    for site in attention(moved(BASE, Prefix(4)), BATCH):
        assert site.more["keys"].shape == site.more["values"].shape == (1, 4, 4, 16)


@pytest.mark.parametrize("method", [BitFit(), PartialFineTuning(last=2)], ids=repr)
def test_h_of_an_own_layer_is_what_the_untrained_layer_gives(method):
    """Of a norm, x is x̂, so it is found by the bias and the scale that it had."""
    plain, changed = deepcopy(BASE).double(), moved(BASE, method)
    sites = own_layers(changed, BATCH)
    kinds = {type(site.module) for site in sites}
    assert kinds == {nn.Linear, nn.LayerNorm}
    for site in sites:
        layer = plain.get_submodule(site.path)
        if isinstance(layer, nn.Linear):
            expected = layer(site.x)
        else:
            expected = site.x * layer.weight + layer.bias
            assert site.x.mean(-1).abs().max() < 1e-12
        close(site.h, expected, 1e-12)
    assert not any(site.path.startswith("classifier") for site in sites)


def test_h_beside_a_quantised_weight_is_that_of_the_quantised_weight():
    plain = deepcopy(BASE).double()
    for site in linears(moved(BASE, QLoRA(4, 8.0)), BATCH):
        layer = plain.get_submodule(site.path)
        assert (layer(site.x) - site.h).abs().max() > 1e-3 * site.h.abs().max()


# ------------------------------------------------------------------ what is noticed


def lora(scale=None, read=lambda site: site.x, up=lambda low, lora: low @ lora.lora_B.T):
    def delta(site):
        layer = site.module.lora
        s = layer.scaling if scale is None else scale
        return s * up(read(site) @ layer.lora_A.T, layer)

    return delta


def dora(norm=lambda W, V: V.norm(dim=1), scale=None, minus=1.0):
    def delta(site):
        layer, W = site.module.dora, site.module.base.weight
        V = W + (layer.scaling if scale is None else scale) * layer.lora_B @ layer.lora_A
        return site.x @ ((layer.magnitude / norm(W, V))[:, None] * V - minus * W).T

    return delta


def adalora(ones=False, alpha=None):
    def delta(site):
        ada = site.module.ada
        E = torch.ones_like(ada.lora_E) if ones else ada.lora_E
        factor = (ada.alpha if alpha is None else alpha) / ada.divisor
        return factor * (site.x @ (ada.lora_A * E).T @ ada.lora_B.T)

    return delta


def diff(gates=("log_alpha", "log_alpha_all"), cut=True):
    def delta(site):
        layer, z = site.module, 1.0
        for name in gates:
            s = (2 * getattr(layer, name).sigmoid() - 1) * layer.stretch
            z = z * (s.clamp(0, 1) if cut else s)
        return site.x @ (z * layer.w).T

    return delta


def normed(site):
    norm = site.module.base.LayerNorm
    return F.layer_norm(site.h + site.x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def adapter(read, scale=None, down=1.0, up=1.0, f=None):
    def delta(site):
        place, a = site.module, site.module.adapter
        low = (f or a.activation)(read(site) @ a.down.weight.T + down * a.down.bias)
        change = low @ a.up.weight.T + up * a.up.bias
        return (place.scale if scale is None else scale) * change

    return delta


def prefix(root=None, swap=False, masked=True, mix=lambda gate, f, h: gate * (f - h), bias=1.0):
    def delta(site):
        layer, d_h = site.module, site.module.attention_head_size
        split = lambda t: t.unflatten(-1, (-1, d_h)).transpose(1, 2)  # noqa: E731
        q = split(site.x @ layer.query.weight.T + bias * layer.query.bias)
        P_k, P_v = (site.more[n] for n in (("values", "keys") if swap else ("keys", "values")))
        s = d_h**0.5 if root is None else root
        a, b = q @ P_k.mT / s, q @ split(layer.key(site.x)).mT / s
        if masked:
            b = b.masked_fill(~site.more["mask"][:, None, None].bool(), -torch.inf)
        a, b = a.exp().sum(-1, keepdim=True), b.exp().sum(-1, keepdim=True)
        f = (q @ P_k.mT / s).softmax(-1) @ P_v
        return mix(a / (a + b), f, split(site.h)).transpose(1, 2).flatten(2)

    return delta


def own(weight=True, bias=True, g=True):
    def delta(site):
        W, b = site.more.get("Δweight"), site.more.get("Δbias")
        change = torch.zeros_like(site.h)
        if bias and b is not None:
            change = change + b
        if W is not None and W.dim() == 1 and g:
            change = change + site.x * W
        if W is not None and W.dim() == 2 and weight:
            change = change + site.x @ W.T
        return change

    return delta


def vector(site):
    return site.module.l.flatten()


def of(kind, at=0, **changes):
    """The design of a method, or its `at`-th, with something exchanged."""
    return replace(designs_of(kind)[at], **changes)


SQUARE = dict(targets=("query", "value"))
X, H = (lambda site: site.x), (lambda site: site.h)
# Of each method the formula written once more: right, and then with one thing wrong.
FORMULAS = {
    "LoRA": (of(LoRA, delta=lora()), {
        "no scale": lora(scale=1.0),
        "scale alpha": lora(scale=16.0),
    }),
    "LoRA, square": (of(LoRA, delta=lora(), example=LoRA(8, 16, **SQUARE)), {
        "one matrix twice": lora(up=lambda low, m: low @ m.lora_A),
"reads h": lora(read=H),
    }),
    "QLoRA": (of(QLoRA, delta=lora()), {"no scale": lora(scale=1.0)}),
    "DoRA": (of(DoRA, delta=dora()), {
        "norm of W": dora(norm=lambda W, V: W.norm(dim=1)),
        "no norm": dora(norm=lambda W, V: torch.ones(len(W))),
        "columns": dora(norm=lambda W, V: V.norm()),
        "no scale": dora(scale=1.0),
        "new state": dora(minus=0.0),
    }),
    "AdaLoRA": (of(AdaLoRA, delta=adalora()), {
        "no λ": adalora(ones=True), "no alpha": adalora(alpha=1.0),
    }),
    "IA3": (of(IA3, delta=lambda s: s.h * (vector(s) - 1)), {
        "l, not l − 1": lambda s: s.h * vector(s),
        "1 − l": lambda s: s.h * (1 - vector(s)),
        "reads x": lambda s: s.x * (vector(s) - 1),
        "no bias": lambda s: (s.h - s.module.bias) * (vector(s) - 1),
    }),
    "IA3, inputs": (of(IA3, 1, delta=lambda s: (s.x * (vector(s) - 1)) @ s.module.weight.T), {
        "l, not l − 1": lambda s: (s.x * vector(s)) @ s.module.weight.T,
        "bias": lambda s: (s.x * (vector(s) - 1)) @ s.module.weight.T + s.module.bias,
    }),
    "houlsby": (of(BottleneckAdapter, 0, delta=adapter(H)), {
        "reads x": adapter(X), "reads LN": adapter(normed), "no scale": adapter(H, scale=1.0),
        "no f": adapter(H, f=lambda t: t), "no b_down": adapter(H, down=0.0),
        "no b_up": adapter(H, up=0.0),
    }),
    "pfeiffer": (of(BottleneckAdapter, 1, delta=adapter(normed)), {
        "reads h": adapter(H), "reads x": adapter(X),
        "no norm": adapter(lambda site: site.h + site.x),
    }),
    "parallel": (of(BottleneckAdapter, 2, delta=adapter(X)), {
        "reads h": adapter(H), "no scale": adapter(X, scale=1.0),
    }),
    **{
        kind.__name__: (of(kind, delta=prefix()), {
            "no gate": prefix(mix=lambda gate, f, h: f - h),
            "h stays": prefix(mix=lambda gate, f, h: gate * f),
            "gate turned": prefix(mix=lambda gate, f, h: (1 - gate) * (f - h)),
            "no root": prefix(root=1.0), "swapped": prefix(swap=True),
            "padding counts": prefix(masked=False), "no bias": prefix(bias=0.0),
        })
        for kind in (Prefix, Prompt, MixAndMatch)
    },
    "MixAndMatch, adapters": (of(MixAndMatch, 1, delta=adapter(X)), {
        "reads h": adapter(H), "no scale": adapter(X, scale=1.0), "gelu": adapter(X, f=F.gelu),
    }),
    "BitFit": (of(BitFit, delta=own()), {
        "nothing": own(bias=False), "half": lambda site: site.more["Δbias"] / 2,
    }),
    "PartialFineTuning": (of(PartialFineTuning, delta=own()), {
        "no bias": own(bias=False), "no weight": own(weight=False), "no norm": own(g=False),
        "reads h": lambda site: own()(replace(site, x=site.h) if site.x.shape == site.h.shape
                                      else site),
    }),
    "DiffPruning": (of(DiffPruning, delta=diff()), {
        "no gates": diff(gates=()), "no gate of entries": diff(gates=("log_alpha_all",)),
        "no gate of the matrix": diff(gates=("log_alpha",)), "not cut off": diff(cut=False),
    }),
}  # fmt: skip
MUTANTS = [
    pytest.param(name, wrong, id=f"{name}: {how}")
    for name, (_, wrongs) in FORMULAS.items()
    for how, wrong in wrongs.items()
]
_SITES = {}


def sites_of(name):
    design = FORMULAS[name][0]
    if name not in _SITES:
        with torch.no_grad():
            _SITES[name] = design.sites(moved(BASE, design.example), BATCH)
    return _SITES[name]


@pytest.mark.parametrize("name", FORMULAS)
@torch.no_grad()
def test_the_formula_written_once_more_agrees(name):
    assert gap(sites_of(name), FORMULAS[name][0].delta) < EXACT


@pytest.mark.parametrize(("name", "wrong"), MUTANTS)
@torch.no_grad()
def test_a_wrong_formula_is_noticed(name, wrong):
    assert gap(sites_of(name), wrong) > 1e-3


def test_a_wrong_declaration_is_seen_in_the_table(monkeypatch):
    monkeypatch.setitem(DESIGNS, LoRA, replace(DESIGNS[LoRA], delta=lora(scale=1.0)))
    (row,) = check_design(LoRA, BASE, BATCH)
    assert row["gap"] == pytest.approx(0.5)  # s = 16 / 8 is left out


def test_a_formula_that_is_right_at_the_start_alone_is_noticed():
    """At a start with B = 0 no change at all would be right too."""
    model = bert()
    inject(model, DESIGNS[LoRA].example)
    with torch.no_grad():
        assert all(torch.equal(s.new, s.h) for s in linears(model, BATCH))
        assert gap(linears(model, BATCH), lambda site: 0 * site.h) == float("inf")
    assert gap(sites_of("LoRA"), lambda site: 0 * site.h) == 1.0


# ------------------------------------------------------------------ a method of one's own

STILL = Design("0", "reads nothing", "queries", "h + Δh", lambda site: 0 * site.h)


class Still(AdapterLayer):
    def __init__(self, base):
        super().__init__(base)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.base(x)


def a_method(name="AMethod", bases=(Method,), **attributes):
    """A method as a notebook defines it: of one name there is one, the last."""
    body = {"__module__": "__main__", "__qualname__": name, "targets": ("query",)}
    body |= {"__annotations__": {"targets": tuple}, "wrap": lambda self, path, layer: Still(layer)}
    return dataclass(frozen=True)(type(name, bases, body | attributes))


def rows_of(name):
    return [row for row in unified_table(BASE, BATCH) if row["method"] == name]


def test_a_method_without_a_design_has_a_row_that_says_so():
    mine = a_method(files=PeftFiles("TEST_NO_DESIGN"))
    (row,) = check_design(mine, BASE, BATCH)
    assert row["form"] == "says no design"
    assert [row[c] for c in ("insertion", "modified", "composition")] == [""] * 3
    assert [row[c] for c in ("places", "numbers", "gap")] == [None] * 3
    assert check_design(mine(), BASE, BATCH) == rows_of("AMethod") == [row]


def test_a_child_has_not_its_parent_s_design():
    mine = a_method(bases=(LoRA,), files=PeftFiles("TEST_CHILD"))
    assert designs_of(mine) == (None,)
    assert check_design(mine, BASE, BATCH)[0]["form"] == "says no design"


def test_what_changes_nothing_has_no_finite_gap():
    mine = a_method(files=PeftFiles("TEST_STILL"), design=STILL)
    (row,) = check_design(mine, BASE, BATCH)
    assert row["places"] == 2 and row["numbers"] == 6 and row["gap"] == float("inf")


def test_a_design_that_sees_no_place_says_0():
    mine = a_method(
        files=PeftFiles("TEST_UNSEEN"), design=replace(STILL, sites=lambda model, batch: [])
    )
    (row,) = check_design(mine, BASE, BATCH)
    assert row["places"] == 0 and row["gap"] is None


def test_in_a_notebook_the_last_definition_of_a_name_counts():
    older = a_method(files=PeftFiles("TEST_OLD"), design=STILL)
    newer = a_method(files=PeftFiles("TEST_NEW"), design=replace(STILL, form="new"))
    assert newer in registered_methods() and older not in registered_methods()
    assert older.files.kind not in {m.files.kind for m in registered_methods()}
    # With another parent, and then back again to one that comes earlier among the classes.
    child = a_method(
        bases=(LoRA,), files=PeftFiles("TEST_CHILD"), design=replace(STILL, form="child")
    )
    assert [m for m in registered_methods() if m.__name__ == "AMethod"] == [child]
    again = a_method(files=PeftFiles("TEST_AGAIN"))
    assert [m for m in registered_methods() if m.__name__ == "AMethod"] == [again]
    # A stub is no method, and takes the place of what was one.
    stub = a_method()
    assert not [m for m in registered_methods() if m.__name__ == "AMethod"] and stub.design is None


def test_of_a_lesson_s_class_and_the_package_s_the_last_one_is_in_the_table():
    mine = a_method(
        "Prompt", files=PeftFiles("TEST_PROMPT"), design=replace(STILL, form="the lesson's")
    )
    assert Prompt in registered_methods() and mine in registered_methods()
    assert [row["form"] for row in rows_of("Prompt")] == ["the lesson's"]


def test_the_lesson_s_own_example_passes_the_check_of_the_exercise():
    path = notebooks.NOTEBOOKS / "11_unified_view.ipynb"
    cells = [c.source for c in notebooks.code_cells(notebooks.read(path))]
    (source,) = [c for c in cells if "class BentLoRA(Method)" in c]
    names = {
        "AdapterLayer": AdapterLayer,
        "Design": Design,
        "F": F,
        "Method": Method,
        "PeftFiles": PeftFiles,
        "__name__": "__main__",
    }
    exec(source, names | {"dataclass": dataclass, "nn": nn, "torch": torch}, names)
    verdict = check.unified.MyMethod(names["BentLoRA"])
    assert verdict.status == "right" and "step 0 is the base" in repr(verdict)


# ------------------------------------------------------------------ the method made by mixing

METHOD = MixAndMatch(tokens=4, width=6)


def mixed(name, seed=3, values=True):
    """A model of this family with the method in it, and values in its adapters."""
    model = MODELS[name]()
    torch.manual_seed(seed)
    inject(model, METHOD)
    if values:
        with torch.no_grad():
            for path, p in injection_of(model).added():
                if ".adapter." in path:
                    p.add_(0.1 * torch.randn_like(p))
    return model


def train(model, name, steps=4, **options):
    return fit(model, task_of(name), steps, show=False, **options)


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**batch_of(name)).logits


def adapters(model):
    return [p for path, p in injection_of(model).added() if ".adapter." in path]


@EACH
def test_at_the_start_it_is_the_prefix_alone(name):
    model, other = mixed(name, values=False), MODELS[name]()
    inject(other, Prefix(4))
    with torch.no_grad():
        injection_of(other).attached.embedding.copy_(injection_of(model).attached.embedding)
    assert torch.equal(logits(model, name), logits(other, name))
    assert (logits(model, name) - logits(MODELS[name](), name)).abs().max() > 1e-3


@EACH
def test_it_is_its_two_halves(name):
    """Adapters put in by themselves, and a cache that is filled by hand."""
    model, other = mixed(name), MODELS[name]()
    inject(other, BottleneckAdapter(6, "parallel", "relu", 4.0))
    with torch.no_grad():
        for a, b in zip(adapters(model), adapters(other), strict=True):
            b.copy_(a)
        batch, cache = batch_of(name), DynamicCache()
        fill(cache, *injection_of(model).attached(3), torch.float32)
        got = other(**batch | make_room(batch, 4), past_key_values=cache).logits
    close(got, logits(model, name))
    assert (got - logits(mixed(name, values=False), name)).abs().max() > 1e-3


@EACH
def test_the_prefix_learns_ten_times_as_fast(name):
    """The first step of Adam moves each number by its rate."""
    model, rate = mixed(name), 1e-4
    prefix, others = injection_of(model).attached.embedding, adapters(model)
    before = prefix.detach().clone(), [p.detach().clone() for p in others]
    train(model, name, steps=1, lr=rate)
    assert (prefix - before[0]).abs().max().item() == pytest.approx(10 * rate, rel=0.02)
    moves = [(p - b).abs().max().item() for p, b in zip(others, before[1], strict=True)]
    assert max(moves) == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(tokens=0, width=4), "tokens=0"),
        (dict(tokens=4, width=0), "width=0"),
        (dict(tokens=4, width=4, scale=0.0), "scale=0.0"),
        (dict(tokens=True, width=4), "tokens=True"),
    ],
)
def test_settings_that_make_no_sense(settings, told):
    with pytest.raises(ValueError, match=told):
        MixAndMatch(**settings)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (MixAndMatch(4, 64), "no bottleneck for 64"),
        (MixAndMatch(64, 4), "64 virtual tokens"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(method, told):
    model = MODELS["bert"]()
    with refused(model, told):
        inject(model, method)
    strange = nn.Sequential(nn.Linear(8, 8))
    with refused(strange, "no block whose places are known"):
        inject(strange, METHOD)


def test_the_signature_says_what_a_user_gives():
    assert str(inspect.signature(MixAndMatch)) == (
        "(tokens: int, width: int, scale: float = 4.0) -> None"
    )
