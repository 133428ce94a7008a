"""Every method as h + Δh, compared with running; and the method that is made by mixing two."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import MODELS, batch_of, close, hooks, perturb, refused, same, state, tiny_bert
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from peft_lessons import (
    BitFit,
    BottleneckAdapter,
    LoRA,
    MixAndMatch,
    PartialFineTuning,
    Prefix,
    Prompt,
    QLoRA,
    check,
    inject,
    merge,
)
from peft_lessons.engine import (
    AdapterLayer,
    Method,
    PeftFiles,
    injection_of,
    registered,
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
    own_layers,
    perturbed,
    prober,
    unified_table,
)
from tools import notebooks

COURSE = registered_methods()
BATCH = batch_of("bert")
EXACT = 1e-10  # in float64; what is asked for is 1e-5


BASE = tiny_bert(intermediate_size=128)  # which 4-bit layers accept


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize("method", [LoRA(4, 8), BitFit(), Prefix(3), BottleneckAdapter(4)])
def test_a_probe_gives_what_the_modules_of_the_running_models_give(method):
    base = deepcopy(BASE).double()
    changed = perturbed(base, method)
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    seen = []
    layer = changed.bert.encoder.layer[1]
    modules = (layer.attention.self.value, layer.attention.self, layer)
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append(out)) for m in modules]
    hooks.append(layer.register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    with torch.no_grad():
        changed(**batch)
        for hook in hooks:
            hook.remove()
        x, value, (attention_output, _), output = seen
        probe, h = prober(base, changed, 1), base.bert.encoder.layer[1](x)
    expected = {"value": value, "attention": attention_output, "block": output}
    for where, new in expected.items():
        close(probe(where, x)[1], new, EXACT, where)
    close(probe("block", x)[0], h, EXACT)
    assert (h - output).abs().max() > 1e-3
    assert torch.equal(probe("block", x[0].float())[1], probe("block", x[:1].float())[1][0])
    with pytest.raises(ValueError, match="'key' is not"):
        probe("key", x)


@pytest.mark.parametrize("kind", COURSE, ids=lambda kind: kind.__name__)
def test_merged_it_adds_nothing_in_training_either(kind):
    model = deepcopy(BASE)
    inject(model, designs_of(kind)[0].example or kind())
    try:
        merge(perturb(model).train())
    except TypeError:  # no weight computes it
        return
    for wrapper in injection_of(model).wrappers.values():
        x = torch.randn(3, wrapper.base.weight.shape[1])
        assert torch.equal(wrapper(x), wrapper.base(x))


def test_the_table_has_a_row_for_each_design_and_is_computed():
    rows = unified_table(BASE, BATCH)
    assert {tuple(row) for row in rows} == {
        ("method", "form", "insertion", "modified", "composition", "places", "trainable", "gap")
    }
    mine = {kind.__name__: len(designs_of(kind)) for kind in COURSE}
    names = [row["method"] for row in rows]
    assert {name: names.count(name) for name in mine} == mine
    assert all(row["places"] and row["gap"] < EXACT and row["form"] for row in rows)
    one = next(row for row in rows if row["method"] == "LoRA")
    # Six layers in each of two blocks, and the pooler's; 8 · (in + out) numbers each.
    shapes = [m.weight.shape for n, m in BASE.named_modules() if type(m) is nn.Linear]
    assert one["places"] == 13 == len(shapes) - 1
    assert one["trainable"] == 8 * sum(sum(shape) for shape in shapes[:-1])


def test_looking_changes_nothing():
    model = deepcopy(BASE).train()
    before, random = state(model), torch.get_rng_state()
    assert check_design(LoRA, model, BATCH) == check_design(LoRA, model, BATCH)
    unified_table(model, BATCH)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), random)
    assert model.training and injection_of(model) is None and not hooks(model)


def test_an_observer_leaves_no_hook_even_if_the_model_fails():
    model = deepcopy(BASE)
    inject(model, LoRA())
    with refused(model, "input_ids"):
        linears(model, {})


@pytest.mark.parametrize(
    ("method", "forms"),
    [
        (QLoRA(4, 8.0, ("query",)), ["x Aᵀ Bᵀ, where h has W in 4 bits"]),
        (BottleneckAdapter(4, "houlsby", "relu"), ["f(h W_downᵀ + b) W_upᵀ + b′"]),
        (MixAndMatch(3, 7, 0.5), [design.form for design in MixAndMatch.design]),
    ],
    ids=repr,
)
def test_an_instance_is_its_own_description(method, forms):
    rows = check_design(method, BASE, BATCH)
    assert [row["form"] for row in rows] == forms
    assert all(row["gap"] < EXACT and row["places"] for row in rows)
    # What QLoRA merely quantises is no place.
    assert rows[0]["places"] == 2 or not isinstance(method, QLoRA)


# ------------------------------------------------------------------ what is seen of a place


@pytest.mark.parametrize("method", [Prefix(4), Prompt(4), MixAndMatch(4, 8)], ids=repr)
def test_h_of_an_attention_is_what_the_base_s_own_module_gives(method):
    plain, sites = deepcopy(BASE).double(), attention(perturbed(BASE, method), BATCH)
    assert len(sites) == 2
    seen = BATCH["attention_mask"][:, None, None].bool()
    for site in sites:
        layer = plain.get_submodule(site.path)
        expected = layer(site.x, torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf))
        close(site.h, expected[0], 1e-12)
        assert site.x.shape == site.h.shape == site.new.shape == (3, 12, 64)
        assert (site.new - site.h).abs().max() > 1e-3


@pytest.mark.parametrize("method", [BitFit(), PartialFineTuning(last=2)], ids=repr)
def test_h_of_an_own_layer_is_what_the_untrained_layer_gives(method):
    """Of a norm, x is x̂, so it is found by the bias and the scale that it had."""
    plain, changed = deepcopy(BASE).double(), perturbed(BASE, method)
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


def test_h_of_a_quantised_layer_is_that_of_the_quantised_weight():
    plain = deepcopy(BASE).double()
    for site in linears(perturbed(BASE, QLoRA(4, 8.0)), BATCH):
        layer = plain.get_submodule(site.path)
        assert (layer(site.x) - site.h).abs().max() > 1e-3 * site.h.abs().max()


# ------------------------------------------------------------------ what is noticed


def test_the_gap_is_that_of_the_worst_site():
    """A formula that is wrong where the change is small must not hide behind a large change."""
    sites = linears(perturbed(BASE, LoRA(4, 8.0)), BATCH)
    small = replace(sites[0], new=sites[0].h + 1e-6 * (sites[0].new - sites[0].h))
    wrong = {id(small): 0.0}  # no change at all at this site

    def delta(site):
        return wrong.get(id(site), 1.0) * (site.new - site.h)

    assert gap([*sites[1:], small], delta) == gap([small, *sites[1:]], delta) == 1.0
    assert gap(sites[1:], delta) == 0.0


def test_a_wrong_declaration_is_seen_in_the_table(monkeypatch):
    def without_scale(site):
        return site.x @ site.module.lora.lora_A.T @ site.module.lora.lora_B.T

    monkeypatch.setattr(LoRA, "design", replace(LoRA.design, delta=without_scale))
    (row,) = check_design(LoRA, BASE, BATCH)
    assert row["gap"] == pytest.approx(0.5)  # s = 16 / 8 is left out


def test_a_formula_that_is_right_at_the_start_alone_is_noticed():
    """At a start with B = 0 no change at all would be right too."""
    model, example = deepcopy(BASE), LoRA(rank=8, alpha=16)
    inject(model, example)
    with torch.no_grad():
        assert all(torch.equal(s.new, s.h) for s in linears(model, BATCH))
        assert gap(linears(model, BATCH), lambda site: 0 * site.h) == float("inf")
        assert gap(linears(perturbed(BASE, example), BATCH), lambda site: 0 * site.h) == 1.0


# ------------------------------------------------------------------ a method of one's own

STILL = Design("0", "reads nothing", "queries", "h + Δh", lambda site: 0 * site.h)


class Still(AdapterLayer):
    def __init__(self, base):
        super().__init__(base)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.base(x)


def a_method(name="AMethod", bases=(Method,), **attributes):
    """Return a method as a notebook defines it."""
    body = {"__module__": "__main__", "__qualname__": name, "targets": ("query",)}
    body |= {"__annotations__": {"targets": tuple}, "wrap": lambda self, path, layer: Still(layer)}
    return dataclass(frozen=True)(type(name, bases, body | attributes))


def test_a_method_without_a_design_has_a_row_that_says_so():
    mine = a_method(files=PeftFiles("TEST_NO_DESIGN"))
    (row,) = check_design(mine, BASE, BATCH)
    assert row["form"] == "says no design"
    assert [row[c] for c in ("insertion", "modified", "composition")] == [""] * 3
    assert [row[c] for c in ("places", "trainable", "gap")] == [None] * 3
    with registered(mine):
        assert check_design(mine(), BASE, BATCH) == [row] == unified_table(BASE, BATCH)[-1:]
    child = a_method(bases=(LoRA,), files=PeftFiles("TEST_CHILD"))  # it has not its parent's
    assert check_design(child, BASE, BATCH) == [row]


def test_what_changes_nothing_has_no_finite_gap_and_no_place_none():
    mine = a_method(files=PeftFiles("TEST_STILL"), design=STILL)
    (row,) = check_design(mine, BASE, BATCH)
    assert row["places"] == 2 and row["trainable"] == 6 and row["gap"] == float("inf")
    unseen = replace(STILL, sites=lambda model, batch: [])
    mine = a_method(files=PeftFiles("TEST_UNSEEN"), design=unseen)
    (row,) = check_design(mine, BASE, BATCH)
    assert row["places"] == 0 and row["gap"] is None


def test_the_lesson_s_own_example_passes_the_check_of_the_exercise():
    path = notebooks.NOTEBOOKS / "11_unified_view.ipynb"
    cells = [c.source for c in notebooks.code_cells(notebooks.read(path))]
    (source,) = [c for c in cells if "class GeluLoRA(Method)" in c]
    here = (AdapterLayer, Design, Method, PeftFiles, dataclass)
    names = {thing.__name__: thing for thing in here}
    exec(source, names | {"F": F, "nn": nn, "torch": torch, "__name__": "__main__"}, names)
    verdict = check.unified.MyMethod(names["GeluLoRA"])
    assert verdict.status == "right" and "step 0 is the base" in repr(verdict)
    assert "another rank or scale or targets has an effect" in repr(verdict)


def test_a_field_without_another_value_is_said_to_be_untried():
    from exercises.unified import defined

    mine = defined(
        'rank: int = 4 → rank: int = 4; way: str = "plain"',
        '"rank": → "way": ("way", "plain"), "rank":',
    )
    verdict = check.unified.MyMethod(mine)
    assert "another rank or scale or targets has an effect; no other way is tried" in repr(verdict)


# ------------------------------------------------------------------ the method made by mixing

METHOD = MixAndMatch(tokens=4, width=6)
TWO = pytest.mark.parametrize("name", ["llama", "bert"])


def mixed(name, values=True):
    """Return a model of this family with the method in it and perturbed adapters."""
    model = MODELS[name]()
    torch.manual_seed(3)
    inject(model, METHOD)
    if values:
        with torch.no_grad():
            for p in adapters(model):
                p.add_(0.1 * torch.randn_like(p))
    return model


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**batch_of(name)).logits


def adapters(model):
    return [p for path, p in injection_of(model).added() if ".adapter." in path]


@TWO
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


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = MODELS["bert"]()
    for width, tokens, told in ((64, 4, "no bottleneck for 64"), (4, 64, "64 virtual tokens")):
        with refused(model, told):
            inject(model, MixAndMatch(tokens, width))
    strange = nn.Sequential(nn.Linear(8, 8))
    with refused(strange, "no block whose places are known"):
        inject(strange, METHOD)
