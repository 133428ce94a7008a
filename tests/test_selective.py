"""Selective methods: the gradients of full fine-tuning on what trains, and nothing else moves."""

import math
from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    MODELS,
    TASKS,
    TinyTask,
    TinyText,
    batch_of,
    close,
    gradients,
    perturb,
    read_config,
    refused,
    rewrite,
    same,
    state,
    step_of_both,
    task_of,
    tiny_bert,
    tiny_llama,
    tiny_opt,
)
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from peft_lessons import (
    BitFit,
    DiffPruning,
    PartialFineTuning,
    QLoRA,
    check,
    fit,
    inject,
    load_adapter,
    measure,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import WEIGHTS, fingerprint, injection_of
from peft_lessons.methods.selective import (
    LinearWithDiff,
    blocks_of,
    expected_open,
    gate,
    prune_diff,
)

NORMS = r"(?i:.*norm.*)"
SELECTING = {
    "bitfit": BitFit(),
    "last": PartialFineTuning(last=1),
    "norms": PartialFineTuning(patterns=NORMS),
}
DIFFS = {
    "gates": DiffPruning(sparsity=1e-3),
    "structured": DiffPruning(sparsity=1e-3, structured=True),
    "mask": DiffPruning(gates=False),
}
KINDS = SELECTING | DIFFS


def pairs(kinds):
    # A Llama has no biases.
    every = [(name, kind) for name in MODELS for kind in kinds]
    return pytest.mark.parametrize(("name", "kind"), [p for p in every if p != ("llama", "bitfit")])


DIFF = pytest.mark.parametrize("kind", DIFFS)
HEAD = {"classifier.weight", "classifier.bias"}


def injected(name, method, **options):
    model = MODELS[name]()
    inject(model, method, **options)
    return model


def trained(name, method, steps=5, **options):
    model = injected(name, method)
    fit(model, task_of(name), steps, show=False, **options)
    return model


def training(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def layers(model):
    return injection_of(model).wrappers


# ------------------------------------------------------------------ what trains, and what does not

CHOSEN = {  # by what a name holds, in each of the four models
    "bitfit": lambda n: n.endswith(".bias"),
    "last": lambda n: "layers.1." in n or "layer.1." in n,
    "norms": lambda n: "norm" in n.lower(),
}


@pairs(SELECTING)
def test_gradients_are_those_of_full_fine_tuning(name, kind):
    full, ours, batch = MODELS[name](), injected(name, KINDS[kind]), batch_of(name)
    a, b = full(**batch), ours(**batch)
    assert torch.equal(a.logits, b.logits), "step 0 is the base"
    a.loss.backward()
    b.loss.backward()
    expected = {n: p.grad for n, p in full.named_parameters()}
    chosen = {n for n in expected if CHOSEN[kind](n)} | (HEAD if name == "bert" else set())
    assert training(ours) == chosen
    for n, p in ours.named_parameters():
        # A key bias makes no difference where keys are not rotated: its gradient is rounding alone.
        assert expected[n].any() or n.endswith(("key.bias", "k_proj.bias")), n
        if n in chosen:
            close(p.grad, expected[n])
        else:
            assert p.grad is None, n


@pairs(SELECTING)
def test_counts(name, kind):
    d, d_ff, L, kv = 64, 96, 2, 32
    head = 2 * d + 2 if name == "bert" else 0
    biases = {
        "bert": L * (7 * d + d_ff) + 2 * d,
        "opt": L * (7 * d + d_ff) + d,  # a last norm, and neither embedding norm nor pooler
        "qwen2": L * (d + 2 * kv),
    }
    norms = {"llama": (2 * L + 1) * d, "qwen2": (2 * L + 1) * d}
    block = sum(p.numel() for p in list(blocks_of(MODELS[name]()).values())[-1].parameters())
    wanted = {
        "bitfit": biases.get(name),
        "norms": norms.get(name, 2 * (2 * L + 1) * d),
        "last": block,
    }[kind]
    told = inject(MODELS[name](), KINDS[kind])
    assert (told.trainable, told.whole_parameters) == (wanted + head, wanted + head)
    assert told.total == told.base == sum(p.numel() for p in MODELS[name]().parameters())


def test_count_of_a_bert_without_a_pooler():
    sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    config = BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16)
    for pooler in (True, False):
        model = BertModel(config, add_pooling_layer=pooler)
        assert inject(model, BitFit()).trainable == 2 * (7 * 64 + 128) + 64 * (1 + pooler)
    assert inject(BertModel(config), BitFit()).trainable == 1280


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_holds_what_trains_and_no_more(kind):
    model = injected("bert", KINDS[kind])
    held = measure.training_step(model, batch_of("bert"), repeats=1).held
    assert held.gradients == 4 * report(model).trainable
    assert held.optimizer == 8 * report(model).trainable + 4 * len(training(model))  # and a count


@pytest.mark.parametrize("kind", SELECTING)
def test_also_train_names_a_module_that_has_some_of_the_chosen(kind):
    model = injected("bert", KINDS[kind], modules_to_save=("pooler",))
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    chosen = {n for n, _ in model.named_parameters() if CHOSEN[kind](n)}
    assert training(model) == chosen | pooler | HEAD
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert report(model).trainable == sum(sizes[n] for n in chosen | pooler | HEAD)


# ------------------------------------------------------------------ BitFit


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_a_key_bias_gets_no_gradient_and_makes_no_difference(name):
    """It adds the same number to all scores of a query, and softmax does not see that."""
    model, batch = injected(name, BitFit()), batch_of(name)
    output = model(**batch)
    output.loss.backward()
    largest = {"q": 0.0, "k": 0.0, "v": 0.0}
    for n, p in model.named_parameters():
        layer = n.split(".")[-2] if n.endswith(".bias") else ""
        if layer in ("query", "key", "value", "q_proj", "k_proj", "v_proj"):
            largest[layer[0]] = max(largest[layer[0]], p.grad.abs().max().item())
        if layer in ("key", "k_proj"):
            p.data = torch.randn_like(p)
    assert largest["k"] < 1e-5 * min(largest["q"], largest["v"])
    close(model(**batch).logits, output.logits, 2e-6)


def test_a_key_bias_that_is_rotated_does_make_a_difference():
    """What it adds to a score then depends on how far the key is away."""
    model, batch = injected("qwen2", BitFit()), batch_of("qwen2")
    output = model(**batch)
    output.loss.backward()
    keys = [p for n, p in model.named_parameters() if n.endswith("k_proj.bias")]
    queries = [p for n, p in model.named_parameters() if n.endswith("q_proj.bias")]
    assert max(p.grad.abs().max() for p in keys) > 0.1 * max(p.grad.abs().max() for p in queries)
    for p in keys:
        p.data = torch.randn_like(p)
    assert (model(**batch).logits - output.logits).abs().max() > 0.05


def t5():
    sizes = dict(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize("make", [tiny_llama, t5])
def test_a_model_without_biases_is_refused(make):
    """T5 has a table that is called relative_attention_bias, and no bias."""
    model = make()
    with refused(model, r"BitFit: \w+ has no biases.*PartialFineTuning\(patterns"):
        inject(model, BitFit())


def test_the_biases_of_pytorchs_own_attention_train():
    """It calls one of them in_proj_bias."""
    model = nn.TransformerEncoderLayer(8, 2, 12)
    inject(model, BitFit())
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    assert trains == {"self_attn.in_proj_bias", *(f"{layer}.bias" for layer in layers)}


def test_a_fresh_heads_bias_is_no_bias_of_the_base():
    model = tiny_llama()
    model.add_module("score", nn.Linear(64, 2))
    model.fresh_modules = ("score",)
    with pytest.raises(ValueError, match="has no biases"):
        inject(model, BitFit())


def test_all_layers_of_a_fresh_head_are_fresh():
    model = tiny_llama()
    model.score = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))
    model.fresh_modules = ("score",)
    with pytest.raises(ValueError, match="has no biases"):
        inject(model, BitFit())
    digest = fingerprint(model)
    nn.init.normal_(model.score[0].weight)
    assert fingerprint(model) == digest


def test_bitfit_chooses_what_the_exercise_asks_for():
    for name in ("qwen2", "opt"):
        model = MODELS[name]()
        assert list(BitFit().select(model)) == check.selective.select_bitfit.reference(model)


# ------------------------------------------------------------------ PartialFineTuning


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT says so of every norm
@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_gradients_of_the_norms_equal_those_of_peft(name):
    norms = {
        "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
        "opt": ["self_attn_layer_norm", "final_layer_norm"],
        "bert": ["LayerNorm"],
    }[name]
    base, batch = MODELS[name](), batch_of(name)
    config = peft.LNTuningConfig(target_modules=norms, task_type=TASKS.get(name))
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    ours = deepcopy(base)
    inject(ours, PartialFineTuning(patterns=tuple(norms)))
    step_of_both(theirs, ours, batch)
    for name, (a, b) in gradients(theirs, ours, {"ln_tuning_layers.default.": ""}).items():
        assert a.any()
        close(a, b, what=name)


def test_how_many_blocks():
    for k in (1, 2):
        model = injected("llama", PartialFineTuning(last=k))
        of_blocks = {n for n, _ in model.named_parameters() if ".layers." in n}
        assert training(model) == {n for n in of_blocks if k == 2 or ".layers.1." in n}
    alone = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    inject(alone, PartialFineTuning(last=2))
    assert training(alone) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_the_stack_is_the_longest_list_of_one_kind():
    def linears(n):
        return [nn.Linear(3, 3) for _ in range(n)]

    stacks = {"heads": linears(2), "blocks": linears(5), "mixed": [*linears(7), nn.LayerNorm(3)]}
    model = nn.ModuleDict({name: nn.ModuleList(stack) for name, stack in stacks.items()})
    assert list(blocks_of(model)) == [f"blocks.{i}" for i in range(5)]
    assert inject(model, PartialFineTuning(last=2)).whole == (
        *("blocks.3.weight", "blocks.3.bias"),
        *("blocks.4.weight", "blocks.4.bias"),
    )


def test_experts_inside_a_block_are_no_blocks():
    def block():
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3) for _ in range(8)])})

    model = nn.ModuleDict({"layers": nn.ModuleList([block() for _ in range(3)])})
    assert list(blocks_of(model)) == ["layers.0", "layers.1", "layers.2"]
    assert inject(model, PartialFineTuning(last=1)).whole_parameters == 8 * 12


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1"])
def test_last_must_be_a_whole_number(value):
    with pytest.raises(ValueError, match="PartialFineTuning: last="):
        PartialFineTuning(last=value)


@pytest.mark.parametrize(
    "fields",
    [{}, {"last": 1, "patterns": ("norm",)}, {"patterns": ()}, {"last": 2, "patterns": "n"}],
)
def test_one_of_last_and_patterns(fields):
    with pytest.raises(ValueError, match=r"give last=k or patterns=\(...\), one of the two"):
        PartialFineTuning(**fields)


@pytest.mark.parametrize(
    ("value", "error"), [("", ValueError), ((1,), TypeError), (("",), TypeError), (7, TypeError)]
)
def test_patterns_are_names(value, error):
    with pytest.raises(error, match="patterns="):
        PartialFineTuning(patterns=value)


REFUSED = [
    (tiny_llama, dict(last=3), "last.*3.* 2"),
    (lambda: nn.Sequential(nn.Linear(3, 3)), dict(last=1), "Sequential has no one stack of blocks"),
    (tiny_llama, dict(patterns=("norms",)), "'norms' matches no parameter of the model"),
    (tiny_llama, dict(patterns=("q_proj", "rm")), "'rm' matches no parameter"),
    (tiny_llama, dict(patterns="q_proj"), "'q_proj' matches no parameter"),
    (tiny_llama, dict(patterns="("), "is no regular expression"),
    (tiny_bert, dict(patterns=("pooler.dens",)), "did you mean 'pooler.dense'"),
    (tiny_opt, dict(patterns=("lm_head",)), "tied weights.*name both, or neither"),
    (tiny_opt, dict(patterns=("embed_tokens.weight",)), "is also 'lm_head.weight' .tied weights"),
    (tiny_opt, dict(patterns=("lm_head",)), "'lm_head.weight' is also 'model.decoder.embed_tokens"),
    (tiny_bert, dict(patterns=("classifier",)), "'classifier' is the fresh head"),
    (tiny_llama, dict(patterns=("q_porj",)), "did you mean 'q_proj'"),
    (t5, dict(last=1), "no one stack of blocks"),
]


@pytest.mark.parametrize(("make", "fields", "told"), REFUSED)
def test_a_choice_that_does_not_fit_leaves_the_model_alone(make, fields, told):
    model = make()
    with refused(model, told):
        inject(model, PartialFineTuning(**fields))


def test_a_tied_weight_trains_once_where_both_its_names_are_given():
    model = tiny_opt()
    told = inject(model, PartialFineTuning(patterns=("lm_head", "embed_tokens")))
    assert told.trainable == 128 * 64
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    fit(model, TinyText(), 2, show=False)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    weight = model.lm_head.weight.detach().clone()
    merge(model)
    assert torch.equal(unload(model).lm_head.weight, weight)


def test_names_and_patterns():
    """A name is the end of a path, of a module or a parameter; a string must match all of one."""
    chosen = {
        ("norm",): {"model.norm.weight"},
        ("layers.0.mlp",): {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
        ("k_proj.weight",): {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)},
        ("norm", "embed_tokens"): {"model.norm.weight", "model.embed_tokens.weight"},
        r".*\.1\.mlp\.up_proj": {"model.layers.1.mlp.up_proj.weight"},
        r"model\.norm\.weight": {"model.norm.weight"},
    }
    for patterns, expected in chosen.items():
        assert training(injected("llama", PartialFineTuning(patterns=patterns))) == expected
    assert PartialFineTuning(patterns=["a", "b"]).patterns == ("a", "b")


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize(
    ("alpha", "fully", "mean"), [(-3.0, 0.010, 0.026), (0.0, 1 / 6, 0.334), (5.0, 0.967, 0.985)]
)
def test_drawn_gates(alpha, fully, mean):
    """Against numpy: each gate, and how many of 400,000 are open, fully open, and their mean."""
    n = 400_000
    u = np.random.default_rng(1).uniform(1e-5, 1 - 1e-5, n).astype(np.float32)
    s = 1 / (1 + np.exp(-(alpha + np.log(u) - np.log1p(-u)), dtype=np.float64))
    expected = np.clip(-1.5 + 3.0 * s, 0, 1)
    got = gate(torch.full((n,), alpha), 1.5, torch.from_numpy(u)).numpy()
    assert np.abs(got - expected).max() < 2e-6
    p = 1 / (1 + math.exp(-alpha))
    for share, wanted in (((got > 0).mean(), p), ((got == 1).mean(), fully)):
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / n) + 5e-4
    assert abs(got.mean() - mean) < 2e-3


def test_a_gate_without_noise_and_one_without_gradient():
    alpha = torch.tensor([-5.0, 0.0, math.log(2), 0.3, 5.0], requires_grad=True)
    z = gate(alpha, 1.5)
    close(z, torch.tensor([0, 0, 0.5, 1.5 * math.tanh(0.15), 1]))
    (gradient,) = torch.autograd.grad(z.sum(), alpha)
    assert gradient[0] == gradient[4] == 0 and (gradient[2:4] > 0).all()
    # torch.rand may draw 0, whose log-odds are infinite.
    ends = gate(torch.zeros(2, requires_grad=True), 1.5, torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0.0, 1.0]


def logistic_draws(log_alpha, low, high, temperature, n, seed):
    """Gates by numpy's own logistic numbers, (n, gates)."""
    noise = np.random.default_rng(seed).logistic(size=(n, log_alpha.numel()))
    s = 1 / (1 + np.exp(-(log_alpha.flatten().double().numpy() + noise) / temperature))
    return np.clip(low + (high - low) * s, 0, 1)


@pytest.mark.parametrize("settings", [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3), (-0.4, 2.0, 1.7)])
def test_the_exercises_expectations_agree_with_draws(settings):
    """What two checks take for right, against a sampler that shares nothing with them."""
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0], requires_grad=True)
    n = 200_000
    z = logistic_draws(log_alpha.detach(), *settings, n, seed=5)
    expected = check.selective.expected_l0.reference(log_alpha, *settings)
    assert abs((z > 0).mean(0).sum() - expected.item()) < 5 * math.sqrt(5 * 0.25 / n)
    # Gradients by two samples with the same noise, one each side; each gate counts alone.
    (gradient,) = torch.autograd.grad(expected, log_alpha)
    sides = [log_alpha.detach() + step for step in (0.25, -0.25)]
    up, down = ((logistic_draws(a, *settings, n, 6) > 0).mean(0) for a in sides)
    assert np.abs((up - down) / 0.5 - gradient.numpy()).max() < 0.01
    u = torch.rand(n, 5, generator=torch.Generator().manual_seed(0))
    drawn = check.selective.hard_concrete.reference(log_alpha.detach().expand(n, 5), u, *settings)
    assert np.abs(drawn.numpy().mean(0) - z.mean(0)).max() < 0.01
    assert np.abs((drawn.numpy() == 1).mean(0) - (z == 1).mean(0)).max() < 0.01


# ------------------------------------------------------------------ one layer with a difference


def layer_of(kind="gates", bias=True, stretch=1.5):
    """A wrapper around a (10, 24) layer with random values in all that it adds."""
    torch.manual_seed(0)
    wrapper = LinearWithDiff(
        nn.Linear(24, 10, bias=bias), stretch, kind == "structured", kind != "mask"
    )
    with torch.no_grad():
        for name, p in wrapper.named_parameters():
            if not name.startswith("base."):
                p.copy_(torch.randn(p.shape))
    if kind == "mask":
        wrapper.mask = torch.rand(10, 24) < 0.3
    return wrapper


def by_hand(wrapper, stretch, noise=lambda log_alpha: 0.0):
    """The difference from the formulas alone, in float64."""
    d = wrapper.w.detach().double()
    for log_alpha in (wrapper.log_alpha, wrapper.log_alpha_all):
        if log_alpha is not None:
            s = 1 / (1 + torch.exp(-(log_alpha.detach().double() + noise(log_alpha))))
            d = d * (s * 2 * stretch - stretch).clamp(0, 1)
    return d if wrapper.mask is None else torch.where(wrapper.mask, d, 0.0)


@DIFF
@pytest.mark.parametrize("bias", [True, False])
def test_the_definition(kind, bias):
    wrapper, x = layer_of(kind, bias, stretch=1.2).eval(), torch.randn(3, 5, 24)
    shapes = {"w": (10, 24), "log_alpha": (10, 24), "log_alpha_all": (1, 1)}
    names = {"mask": ["w"], "gates": ["w", "log_alpha"]}.get(kind, list(shapes))
    added = [(n, tuple(p.shape)) for n, p in wrapper.named_parameters() if p.requires_grad]
    assert added == [(n, shapes[n]) for n in names]
    weight = wrapper.base.weight + by_hand(wrapper, 1.2).float()
    close(wrapper(x), F.linear(x, weight, wrapper.base.bias), 5e-6)
    assert torch.equal(wrapper(x), wrapper(x))
    # In training the gates are drawn, each with a uniform number of its own.
    wrapper.train()
    torch.manual_seed(4)
    y = wrapper(x)
    torch.manual_seed(4)
    drawn = by_hand(wrapper, 1.2, lambda a: torch.logit(torch.rand_like(a).double()))
    close(y, F.linear(x, wrapper.base.weight + drawn.float(), wrapper.base.bias), 1e-5)
    assert torch.equal(wrapper(x), wrapper(x)) == (kind == "mask")


def test_no_random_number_is_drawn_in_eval_mode():
    wrapper, x = layer_of("structured").eval(), torch.randn(2, 24)
    before = torch.get_rng_state()
    wrapper(x)
    assert torch.equal(torch.get_rng_state(), before)
    wrapper.train()(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_closed_gate_of_the_matrix_closes_all():
    wrapper, x = layer_of("structured").eval(), torch.randn(2, 24)
    assert not torch.equal(wrapper(x), wrapper.base(x))
    wrapper.log_alpha_all.data.fill_(-1.0)
    assert torch.equal(wrapper(x), wrapper.base(x))


def test_a_layer_of_its_own_in_16_bits_has_a_float32_difference():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        wrapper = LinearWithDiff(nn.Linear(24, 10).to(dtype), 1.5, structured=True, gates=True)
        assert wrapper.w.dtype == wrapper.log_alpha.dtype == wrapper.log_alpha_all.dtype == wide
        assert wrapper(torch.randn(2, 24, dtype=dtype)).dtype == dtype


@DIFF
def test_the_penalty_is_the_number_of_open_gates_on_average(kind):
    method = DiffPruning(0.25, structured=kind == "structured", gates=kind != "mask")
    model = injected("llama", method)
    total = 0.0
    for wrapper in layers(model).values():
        if kind != "mask":
            wrapper.log_alpha.data.normal_()
            open_ = 1 / (1 + np.exp(-wrapper.log_alpha.detach().numpy().astype(np.float64)))
            whole = 1.0
            if kind == "structured":
                wrapper.log_alpha_all.data.fill_(-0.5)
                whole = 1 / (1 + math.exp(0.5))
            total += whole * open_.sum()
    penalty = method.penalty(injection_of(model))
    assert penalty.item() == pytest.approx(0.25 * total, rel=1e-5)
    if kind != "mask":
        wrapper = next(iter(layers(model).values()))
        (gradient,) = torch.autograd.grad(expected_open(wrapper), wrapper.log_alpha)
        p = torch.sigmoid(wrapper.log_alpha)
        close(gradient, p * (1 - p) * (1 / (1 + math.exp(0.5)) if kind == "structured" else 1))


# ------------------------------------------------------------------ models with a difference


@pairs(DIFFS)
def test_gradients_of_a_difference_are_those_of_the_weight(name, kind):
    """In eval mode every gate is fully open at the start."""
    full, ours, batch = MODELS[name](), injected(name, DIFFS[kind]), batch_of(name)
    full(**batch).loss.backward()
    ours(**batch).loss.backward()
    for path, wrapper in layers(ours).items():
        close(wrapper.w.grad, full.get_submodule(path).weight.grad)
        # Where w is 0 no gate makes a difference to the task.
        assert wrapper.log_alpha is None or not wrapper.log_alpha.grad.any()
        assert wrapper.base.weight.grad is None


def test_in_training_the_gates_are_drawn_anew_and_in_eval_mode_not():
    model, batch = trained("llama", DIFFS["gates"], 10), batch_of("llama")
    for wrapper in layers(model).values():
        wrapper.log_alpha.data.normal_()
    with torch.no_grad():
        one, two = (model.eval()(**batch).logits for _ in range(2))
        assert torch.equal(one, two)
        torch.manual_seed(1)
        one, two = (model.train()(**batch).logits for _ in range(2))
        assert not torch.equal(one, two)
        torch.manual_seed(1)
        assert torch.equal(model(**batch).logits, one)


@pytest.mark.parametrize("structured", [False, True])
def test_the_gates_have_a_learning_rate_of_their_own(structured):
    method = DiffPruning(1.0, structured=structured, targets=("q_proj",))
    model = injected("llama", method)
    before = {n: p.detach().clone() for n, p in injection_of(model).added()}
    fit(model, TinyText(), 1, lr=1e-3, warmup=0, clip=None, show=False)
    distances = {n: (p - before[n]).abs().max().item() for n, p in injection_of(model).added()}
    for n, distance in distances.items():
        assert distance == pytest.approx(1e-3 if n.endswith(".w") else 0.1, rel=0.01), n
    assert len(distances) == (6 if structured else 4)


def test_a_penalty_closes_gates_and_without_one_they_stay_open():
    opened = {}
    for sparsity in (0.0, 1e-2):
        model = trained("llama", DiffPruning(sparsity, targets=("q_proj",)), 20, lr=4e-3, warmup=0)
        opened[sparsity] = sum(expected_open(w).item() for w in layers(model).values())
    assert opened[1e-2] < 0.75 * opened[0.0] and opened[0.0] > 0.98 * 2 * 64 * 64


@pytest.mark.parametrize("value", [1.0, 1, 0.5, 0, -2, math.nan, math.inf, True, "1.5", None])
def test_a_stretch_that_never_closes_or_opens_is_refused(value):
    with pytest.raises(ValueError, match="DiffPruning: stretch="):
        DiffPruning(stretch=value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": -1e-5},
        {"sparsity": math.nan},
        {"sparsity": "1e-5"},
        {"structured": 1},
        {"gates": None},
    ],
)
def test_other_fields_are_checked(fields):
    with pytest.raises(ValueError, match=f"DiffPruning: {next(iter(fields))}="):
        DiffPruning(**fields)


# ------------------------------------------------------------------ pruning


@torch.no_grad()
def entries(model):
    """The difference of every layer, after training: what it makes of a weight of zeros."""
    found = {}
    for path, wrapper in layers(model).items():
        alone = deepcopy(wrapper)
        alone.base.weight.zero_()
        found[path] = alone.merged_tensors()[0]
    return found


@DIFF
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pruning_keeps_the_largest_of_all_layers(name, kind):
    model = trained(name, DIFFS[kind], 3)
    for seed, wrapper in enumerate(layers(model).values()):
        torch.manual_seed(seed)
        wrapper.w.data.normal_(std=1 + seed % 3)
        if wrapper.log_alpha is not None:
            wrapper.log_alpha.data.normal_(2.0)
    before, head = entries(model), model.get_output_embeddings()
    kept = prune_diff(model, 500)
    assert sum(kept.values()) == 500 and list(kept) == list(layers(model))
    size = torch.cat([d.abs().flatten() for d in before.values()])
    least = size.sort(descending=True).values[499]
    for path, wrapper in layers(model).items():
        stays = before[path].abs() >= least
        assert torch.equal(wrapper.mask, stays) and int(stays.sum()) == kept[path]
        assert torch.equal(entries(model)[path], torch.where(stays, before[path], 0.0))
        assert [n for n, p in wrapper.named_parameters() if p.requires_grad] == ["w"]
    assert injection_of(model).method.gates is False
    assert head is model.get_output_embeddings()


@pytest.mark.parametrize("kind", ["gates", "mask"])
def test_exactly_as_many_are_kept_where_all_are_equal(kind):
    model = injected("llama", DIFFS[kind])  # nothing but zeros
    assert sum(prune_diff(model, 17).values()) == 17
    assert sum(int(w.mask.sum()) for w in layers(model).values()) == 17
    for wrapper in layers(model).values():
        wrapper.w.data.fill_(0.5)
    prune_diff(model, 5)
    assert sum(int((d != 0).sum()) for d in entries(model).values()) == 5


def test_pruning_twice_and_to_all():
    model = trained("llama", DIFFS["gates"], 3)
    everything = sum(d.numel() for d in entries(model).values())
    before = entries(model)
    prune_diff(model, everything)
    assert same(entries(model), before)
    prune_diff(model, 200)
    first = entries(model)
    prune_diff(model, 50)
    second = entries(model)
    assert sum(int((d != 0).sum()) for d in second.values()) == 50
    for path, d in second.items():
        assert torch.equal(d, torch.where(d != 0, first[path], 0.0))


@pytest.mark.parametrize("keep", [0, -1, 10**9, 2.0, True, "5", None])
def test_a_wrong_number_to_keep(keep):
    model = trained("llama", DiffPruning(targets=("q_proj",)), 2)
    with refused(model, "prune_diff: keep"):
        prune_diff(model, keep)
    assert injection_of(model).method.gates


def test_pruning_what_holds_no_difference_or_a_merged_one():
    for model in (tiny_bert(), injected("bert", BitFit())):
        with refused(model, "prune_diff: the model holds no DiffPruning"):
            prune_diff(model, 5)
    model = trained("llama", DIFFS["gates"], 2)
    merge(model)
    with refused(model, r"the difference is merged; unmerge\(model\)", RuntimeError):
        prune_diff(model, 5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_is_pruned_stays_sparse_in_further_training(decay):
    model = trained("bert", DIFFS["gates"], 3)
    prune_diff(model, 100)
    masks = {path: w.mask.clone() for path, w in layers(model).items()}
    before = entries(model)
    fit(model, TinyTask(), 5, weight_decay=decay, show=False)
    after = entries(model)
    for path, mask in masks.items():
        assert torch.equal(layers(model)[path].mask, mask)
        assert not (after[path][~mask]).any() and not layers(model)[path].w[~mask].any()
    assert sum(int((after[path] != before[path]).sum()) for path in masks) > 90


# ------------------------------------------------------------------ files


@pairs(SELECTING)
def test_the_file_of_a_selection_holds_just_that(name, kind, tmp_path):
    model = perturb(injected(name, KINDS[kind]))
    save_adapter(model, tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    assert {key.removeprefix("base_model.model.") for key in file} == training(model)
    assert sum(t.numel() for t in file.values()) == report(model).trainable
    other = MODELS[name](seed=1)
    with refused(other, "made for a base with other weights"):
        load_adapter(other, tmp_path)


def saved_diff(folder, keep=60):
    model = trained("llama", DiffPruning(targets=("q_proj", "v_proj")), 3)
    prune_diff(model, keep)
    save_adapter(model, folder)
    return model.eval()


def test_the_file_of_a_pruned_difference_is_as_small_as_what_is_kept(tmp_path):
    model = saved_diff(tmp_path)
    weights = tmp_path / WEIGHTS
    file = load_file(weights)
    assert {t.dtype for key, t in file.items() if key.endswith(".indices")} == {torch.int32}
    assert {t.dtype for key, t in file.items() if key.endswith(".values")} == {torch.float32}
    assert sum(t.numel() for t in file.values()) == 2 * 60
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size == header + 60 * (4 + 4)
    shapes = read_config(tmp_path)["shapes"]
    assert len(shapes) == 4 and all(key + ".indices" in file for key in shapes)
    for stem, shape in shapes.items():
        d = entries(model)[stem.removeprefix("base_model.model.")]
        assert list(d.shape) == shape
        flat = torch.zeros(d.numel())
        flat[file[f"{stem}.indices"].long()] = file[f"{stem}.values"]
        assert torch.equal(flat.view(shape), d)


def test_a_difference_to_another_base_is_refused(tmp_path):
    saved_diff(tmp_path)
    other = tiny_llama(seed=1)
    with refused(other, "made for a base with other weights"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, check_base=False)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def new(key, change):
    """Other indices or values of one layer."""
    return lambda tensors: tensors.update({f"{Q}.{key}": change(tensors[f"{Q}.{key}"])})


def at(place, index):
    return new("indices", lambda t: t.where(torch.arange(len(t)) != place, index(t)))


def without(key):
    return lambda tensors: tensors.pop(f"{Q}.{key}")


def shaped(value):
    return lambda shapes: {"shapes": shapes | {Q: value}}


# {what: (what is done to the tensors, entries of the config or how the shapes give them, words)}
BROKEN = {
    "a repeated index": (at(1, lambda t: t[0]), {}, "an index of its own"),
    "an index beyond the end": (at(0, lambda t: 64 * 64), {}, "lie outside 0 to 4095"),
    "a negative index": (at(0, lambda t: -1), {}, "lie outside 0 to 4095"),
    "an index between two": (new("indices", lambda t: t + 0.7), {}, "whole numbers"),
    "a layer too many": (
        lambda t: t.update({Q.replace("q_proj", "extra") + ".values": torch.ones(1)}),
        {},
        "no place in the model",
    ),
    "no indices": (without("indices"), {}, "indices"),
    "no values": (without("values"), {}, "values"),
    "one value less": (new("values", lambda t: t[1:].clone()), {}, "an index of its own"),
    "no shapes at all": (None, {"shapes": ...}, "shapes"),
    "one shape missing": (
        None,
        lambda shapes: {"shapes": {k: v for k, v in shapes.items() if k != Q}},
        "misses|missing",
    ),
    "another shape": (None, shaped([32, 128]), "has shape"),
    "a smaller shape": (None, shaped([2, 2]), "lie outside 0 to 3"),
    "a shape of words": (None, shaped(["64", "64"]), "describes no DiffPruning"),
    "NaN": (new("values", lambda t: torch.full_like(t, math.nan)), {}, "NaN"),
    "a stretch of 1": (None, {"stretch": 1.0}, "stretch=1.0 must be"),
    "an unknown entry": (None, {"blocks": 2}, "does not read blocks=2"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_is_refused(what, tmp_path):
    saved_diff(tmp_path, keep=2000)
    change, entries, told = BROKEN[what]
    if callable(entries):
        entries = entries(read_config(tmp_path)["shapes"])
    rewrite(tmp_path, change, **entries)
    model = tiny_llama()
    with refused(model, told):
        load_adapter(model, tmp_path)


# ------------------------------------------------------------------ merge, unmerge, unload


@pairs(SELECTING)
def test_a_selection_that_was_merged_stays_when_it_is_unloaded(name, kind):
    model, batch = perturb(injected(name, KINDS[kind])), batch_of(name)
    learned = model(**batch).logits
    with refused(model, "not merged", RuntimeError):
        unmerge(model)
    merge(model)
    with refused(model, "already merged", RuntimeError):
        merge(model)
    with refused(model, "the method is merged", RuntimeError):
        fit(model, task_of(name), 1, show=False)
    unmerge(model)
    merge(model)
    assert torch.equal(unload(model)(**batch).logits, learned)
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------ 16 bits and 4 bits


def test_steps_of_the_usual_rate_are_lost_in_bfloat16_norms():
    """Their weights are 1, and the next number of bfloat16 below 1 is 0.996."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        inject(model, SELECTING["norms"])
        before = state(model)
        fit(model, TinyText(), 20, show=False)
        assert same(state(model), before) == (dtype == torch.bfloat16)


def test_small_steps_are_lost_in_a_bfloat16_bias():
    """AdamW's first step moves every bias by the rate; beside a bias of 16 bits that is nothing."""
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_opt().to(dtype)
        inject(model, BitFit())
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        fit(model, TinyText(), 1, lr=1e-5, warmup=0, show=False)
        now = dict(model.named_parameters())
        steps[dtype] = sum(int((now[n] != t).sum()) for n, t in before.items())
    assert steps[torch.bfloat16] < 0.2 * steps[torch.float32]


def four_bit(name):
    model = tiny_llama(intermediate_size=128) if name == "llama" else tiny_opt(ffn_dim=128)
    inject(model, QLoRA(rank=4, alpha=8, targets=("q_proj",)))
    return unload(model)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (PartialFineTuning(last=1), "last: 'model.layers.1' holds packed 4-bit codes"),
        (PartialFineTuning(patterns=("layers.1",)), "patterns: 'model.layers.1' holds packed"),
        (DiffPruning(), "targets='all-linear': .* in 4 bits already"),
        (DiffPruning(targets=("v_proj",)), "targets: .* in 4 bits already"),
    ],
)
def test_a_base_in_4_bits_is_refused(method, told):
    model = four_bit("llama")
    with refused(model, told):
        inject(model, method)


def test_biases_and_norms_of_a_base_in_4_bits_train():
    for name, method in (("opt", BitFit()), ("llama", SELECTING["norms"])):
        model = four_bit(name)
        told = inject(model, method)
        assert told.trainable == (2 * (7 * 64 + 128) + 64 if name == "opt" else 5 * 64)
        before = state(model)
        fit(model, TinyText(), 2, show=False)
        after = state(model)
        assert {n for n in before if not torch.equal(before[n], after[n])} == training(model)
