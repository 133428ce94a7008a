"""Test selective methods: trainable parameters have the gradients of full fine-tuning."""

import math
from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    MODELS,
    TinyTask,
    TinyText,
    batch_of,
    close,
    read_config,
    refused,
    rewrite,
    same,
    state,
    task_of,
    tiny_bert,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
    tiny_t5,
)
from torch import nn
from torch.nn import functional as F

from peft_lessons import (
    BitFit,
    DiffPruning,
    LoRA,
    PartialFineTuning,
    QLoRA,
    SparseTuning,
    check,
    fit,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
)
from peft_lessons.engine import WEIGHTS, blocks_of, fingerprint, injection_of
from peft_lessons.methods.selective import LinearWithDiff, gate, prune_diff

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
SELECTS = pytest.mark.parametrize("kind", SELECTING)
DIFF = pytest.mark.parametrize("kind", DIFFS)
BOTH = pytest.mark.parametrize("name", ["qwen2", "bert"])  # a Llama has no biases
HEAD = {"classifier.weight", "classifier.bias"}


def injected(name, method, **options):
    model = MODELS[name]()
    inject(model, method, **options)
    return model


def trained(name, method, steps=3, **options):
    model = injected(name, method)
    fit(model, task_of(name), steps, show=False, **options)
    return model


def training(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def layers(model):
    return injection_of(model).wrappers


def four_bit(model=None):
    model = model or tiny_llama(intermediate_size=128)
    inject(model, QLoRA(rank=4, alpha=8, targets=("q_proj",)))
    return unload(model)


# ------------------------------------------------------------------ what trains, and what does not

CHOSEN = {  # by what a name holds, in each of the four models
    "bitfit": lambda n: n.endswith(".bias"),
    "last": lambda n: "layers.1." in n or "layer.1." in n,
    "norms": lambda n: "norm" in n.lower(),
}


@BOTH
@SELECTS
def test_gradients_of_trainable_parameters_are_those_of_full_fine_tuning(name, kind):
    full, batch = MODELS[name](), batch_of(name)
    ours = injected(name, SELECTING[kind])
    full(**batch).loss.backward()
    ours(**batch).loss.backward()
    expected = {n: p.grad for n, p in full.named_parameters()}
    chosen = {n for n in expected if CHOSEN[kind](n)} | (HEAD if name == "bert" else set())
    assert training(ours) == chosen
    for n, p in ours.named_parameters():
        if n in chosen:
            # A key bias makes no difference where keys are not rotated.
            assert expected[n].any() or n.endswith("key.bias"), n
            close(p.grad, expected[n])
        else:
            assert p.grad is None, n


def test_modules_to_save_may_name_a_module_that_has_some_of_the_chosen():
    model = injected("bert", BitFit(), modules_to_save=("pooler",))
    chosen = {n for n, _ in model.named_parameters() if CHOSEN["bitfit"](n)}
    whole = chosen | HEAD | {"bert.pooler.dense.weight"}
    assert training(model) == whole
    assert report(model).trainable == sum(model.get_parameter(n).numel() for n in whole)


# ------------------------------------------------------------------ BitFit


def test_a_model_without_biases_is_refused():
    """The biases of a new head are not counted as the base's."""
    model = tiny_llama()
    model.score = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))
    model.fresh_modules = ("score",)
    with refused(model, r"BitFit: \w+ has no biases.*PartialFineTuning\(patterns"):
        inject(model, BitFit())
    digest = fingerprint(model)
    nn.init.normal_(model.score[0].weight)
    assert fingerprint(model) == digest


def test_bitfit_chooses_all_biases_in_order():
    for model in (tiny_qwen2(), tiny_opt()):
        names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
        assert list(BitFit().select(model)) == names
    model = nn.TransformerEncoderLayer(8, 2, 12)  # which calls one of them in_proj_bias
    inject(model, BitFit())
    named = ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    assert training(model) == {"self_attn.in_proj_bias", *(f"{layer}.bias" for layer in named)}


# ------------------------------------------------------------------ PartialFineTuning


def linears(n):
    return nn.ModuleList([nn.Linear(3, 3) for _ in range(n)])


def test_the_blocks_are_the_one_list_that_is_in_no_other():
    for k in (1, 2):
        model = injected("llama", PartialFineTuning(last=k))
        of_blocks = {n for n, _ in model.named_parameters() if ".layers." in n}
        assert training(model) == {n for n in of_blocks if k == 2 or ".layers.1." in n}
    model = nn.ModuleDict({"blocks": linears(5), "none": nn.ModuleList()})
    told = inject(model, PartialFineTuning(last=1))
    assert told.whole == ("blocks.4.weight", "blocks.4.bias")
    assert list(blocks_of(linears(2))) == ["0", "1"]
    blocks = [nn.ModuleDict({"experts": linears(8)}) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    assert list(blocks_of(model)) == ["layers.0", "layers.1", "layers.2"]
    assert inject(model, PartialFineTuning(last=1)).whole_parameters == 8 * 12
    blocks = [nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)]  # as in a hybrid
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    assert inject(model, PartialFineTuning(last=2)).whole_parameters == 6 + 12


TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=64)
TEXT |= dict(num_attention_heads=2, num_key_value_heads=1)
IMAGE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
IMAGE |= dict(image_size=16, patch_size=8)


def qwen2_vl():
    text = TEXT | dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]})
    image = dict(depth=3, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=2)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=image)
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava():
    image, text = transformers.CLIPVisionConfig(**IMAGE), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=image, text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    text = TEXT | dict(head_dim=16)
    config = transformers.Gemma3Config(text_config=text, vision_config=IMAGE)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [qwen2_vl, llava, gemma3])
def test_the_text_stack_of_a_multimodal_model_is_found_and_not_the_longest(make):
    with torch.device("meta"):
        model = make()
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert sorted(lists.values()) == [2, 3]
    stack = "model.language_model.layers"
    assert list(blocks_of(model)) == [f"{stack}.0", f"{stack}.1"]
    assert all(n.startswith(f"{stack}.1.") for n in PartialFineTuning(last=1).select(model))


def test_a_stack_of_two_classes_of_blocks_is_one_stack():
    config = transformers.JambaConfig(**TEXT | dict(num_hidden_layers=8), num_experts=2)
    with torch.device("meta"):
        model = transformers.JambaForCausalLM(config)
    assert len({type(block) for block in model.model.layers}) == 2
    assert list(blocks_of(model)) == [f"model.layers.{i}" for i in range(8)]


REFUSED = [
    (tiny_llama, dict(last=3), "last.*3.* 2"),
    (lambda: nn.Sequential(nn.Linear(3, 3)), dict(last=1), "Sequential has no single stack"),
    (tiny_t5, dict(last=1), "no single stack of blocks"),
    (
        lambda: nn.ModuleDict({"text": linears(3), "image": linears(4)}),
        dict(last=1),
        "several stacks of blocks, 'text', 'image'; name the parts in patterns",
    ),
    (tiny_llama, dict(patterns=("q_proj", "rm")), "'rm' matches no parameter"),
    (tiny_llama, dict(patterns="q_proj"), "'q_proj' matches no parameter"),
    (tiny_llama, dict(patterns=("q_porj",)), "did you mean 'q_proj'"),
    (tiny_opt, dict(patterns=("lm_head",)), "'lm_head.weight' is also .*tied weights.*name both"),
    (tiny_bert, dict(patterns=("classifier",)), "'classifier' is the new head"),
    (four_bit, dict(last=1), "last: 'model.layers.1' holds packed 4-bit codes"),
    (four_bit, dict(patterns=("layers.1",)), "patterns: 'model.layers.1' holds packed"),
]


@pytest.mark.parametrize(("make", "fields", "told"), REFUSED)
def test_a_choice_that_does_not_fit_leaves_the_model_alone(make, fields, told):
    model = make()
    with refused(model, told):
        inject(model, PartialFineTuning(**fields))


def test_one_of_last_and_patterns_is_given():
    for fields in ({}, {"last": 1, "patterns": ("norm",)}):
        with pytest.raises(ValueError, match=r"give last=k or patterns=\(...\), one of the two"):
            PartialFineTuning(**fields)


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


def test_a_name_is_the_end_of_a_path_and_a_string_matches_a_whole_one():
    chosen = {
        ("norm", "embed_tokens"): {"model.norm.weight", "model.embed_tokens.weight"},
        ("layers.0.mlp",): {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
        ("k_proj.weight",): {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)},
        r".*\.1\.mlp\.up_proj": {"model.layers.1.mlp.up_proj.weight"},
        r"model\.norm\.weight": {"model.norm.weight"},
    }
    for patterns, expected in chosen.items():
        assert training(injected("llama", PartialFineTuning(patterns=patterns))) == expected


# ------------------------------------------------------------------ sparse masks

SPARSE = pytest.mark.parametrize("positions", ["random", "largest"])


def flat(wrapper):
    """Return the flat positions of a layer's values."""
    rows, columns = wrapper.indices.long()
    return rows * wrapper.base.weight.shape[1] + columns


@SPARSE
def test_a_sparse_layer_computes_its_definition(positions):
    method = SparseTuning(2, positions, targets=("down_proj",))
    wrapper = layers(injected("llama", method))["model.layers.1.mlp.down_proj"]
    wrapper.values.data.normal_()
    W, x = wrapper.base.weight, torch.randn(3, 5, 96)
    changed = W.detach().clone().flatten()
    for p, v in zip(flat(wrapper).tolist(), wrapper.values.tolist(), strict=True):
        changed[p] += v
    close(wrapper(x), F.linear(x, changed.view(W.shape)), 2e-6)
    wrapper(x).square().sum().backward()
    weight = changed.view(W.shape).requires_grad_()
    F.linear(x, weight).square().sum().backward()
    close(wrapper.values.grad, weight.grad.flatten()[flat(wrapper)], 1e-4, relative=True)
    assert W.grad is None


@SPARSE
def test_as_many_entries_train_as_a_lora_of_this_rank_has_and_each_is_another(positions):
    model = injected("llama", SparseTuning(3, positions))
    lora = injected("llama", LoRA(3, 6.0, "all-linear"))
    assert report(model).trainable == report(lora).trainable
    for path, wrapper in layers(model).items():
        at = flat(wrapper)
        assert len(at) == len(at.unique()) == 3 * sum(wrapper.base.weight.shape), path
        assert torch.equal(at, at.sort().values)
        if positions == "largest":
            size = wrapper.base.weight.abs().flatten()
            rest = torch.ones(len(size), dtype=torch.bool).index_fill(0, at, False)
            assert size[at].min() >= size[rest].max()


def test_a_seed_draws_the_positions_and_the_global_random_state_stays():
    drawn = [layers(injected("llama", SparseTuning(2, seed=seed))) for seed in (1, 1, 2)]
    one, again, other = ([flat(w) for w in found.values()] for found in drawn)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    model = tiny_llama()
    before = torch.get_rng_state()
    inject(model, SparseTuning(2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(rank=0), "rank=0"),
        (dict(rank=2.0), "rank=2.0"),
        (dict(rank=65), "rank=65 is above"),
        (dict(rank=33), "rank=33 takes .* entries of '.*', which has .*: choose a lower rank"),
        (dict(positions="smallest"), "positions='smallest' must be"),
        (dict(seed=-1), "seed=-1"),
        (dict(targets=("query",)), "query"),
    ],
)
def test_a_sparse_mask_that_does_not_fit_is_refused(fields, told):
    with refused(model := tiny_llama(), told):
        inject(model, SparseTuning(**fields))


@SPARSE
def test_the_positions_lie_on_the_device_of_the_weight(positions):
    with torch.device("meta"):
        model = tiny_llama()
    inject(model, SparseTuning(2, positions))
    assert all(wrapper.indices.is_meta for wrapper in layers(model).values())


def test_a_file_of_peft_s_that_names_no_seed_opens(tmp_path):
    config = peft.ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path)["random_seed"] is None
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    batch = batch_of("llama")
    close(ours.eval()(**batch).logits, theirs(**batch).logits)


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
    """Return gates (n, gates) by numpy's own logistic numbers."""
    noise = np.random.default_rng(seed).logistic(size=(n, log_alpha.numel()))
    s = 1 / (1 + np.exp(-(log_alpha.flatten().double().numpy() + noise) / temperature))
    return np.clip(low + (high - low) * s, 0, 1)


@pytest.mark.parametrize("settings", [(-1.5, 1.5, 1.0), (-0.4, 2.0, 1.7)])
def test_the_exercises_expectation_agrees_with_draws(settings):
    """What the check takes for right, against a sampler that shares nothing with them."""
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


# ------------------------------------------------------------------ one layer with a difference


def layer_of(kind, stretch):
    """Return a wrapper around a (10, 24) layer with random values in all that it adds."""
    torch.manual_seed(0)
    wrapper = LinearWithDiff(nn.Linear(24, 10), stretch, kind == "structured", kind != "mask")
    with torch.no_grad():
        for name, p in wrapper.named_parameters():
            if not name.startswith("base."):
                p.copy_(torch.randn(p.shape))
    if kind == "mask":
        wrapper.mask = torch.rand(10, 24) < 0.3
    return wrapper


def by_hand(wrapper, stretch, noise=lambda log_alpha: 0.0):
    """Compute the difference from the formulas alone, in float64."""
    d = wrapper.w.detach().double()
    for log_alpha in (wrapper.log_alpha, wrapper.log_alpha_all):
        if log_alpha is not None:
            s = 1 / (1 + torch.exp(-(log_alpha.detach().double() + noise(log_alpha))))
            d = d * (s * 2 * stretch - stretch).clamp(0, 1)
    return d if wrapper.mask is None else torch.where(wrapper.mask, d, 0.0)


@DIFF
def test_a_layer_computes_its_definition_and_draws_its_gates_in_training_alone(kind):
    wrapper, x = layer_of(kind, stretch=1.2).eval(), torch.randn(3, 5, 24)
    before = torch.get_rng_state()
    weight = wrapper.base.weight + by_hand(wrapper, 1.2).float()
    close(wrapper(x), F.linear(x, weight, wrapper.base.bias), 5e-6)
    assert torch.equal(torch.get_rng_state(), before)
    wrapper.train()
    torch.manual_seed(4)
    y = wrapper(x)
    torch.manual_seed(4)
    drawn = by_hand(wrapper, 1.2, lambda a: torch.logit(torch.rand_like(a).double()))
    close(y, F.linear(x, wrapper.base.weight + drawn.float(), wrapper.base.bias), 1e-5)
    assert torch.equal(wrapper(x), wrapper(x)) == (kind == "mask")
    if kind == "structured":  # a closed gate of the matrix closes all
        wrapper.log_alpha_all.data.fill_(-1.0)
        assert torch.equal(wrapper.eval()(x), wrapper.base(x))


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_is_the_number_of_open_gates_on_average(structured):
    method = DiffPruning(0.25, structured=structured)
    model = injected("llama", method)
    total, whole = 0.0, 1 / (1 + math.exp(0.5)) if structured else 1.0
    for wrapper in layers(model).values():
        wrapper.log_alpha.data.normal_()
        if structured:
            wrapper.log_alpha_all.data.fill_(-0.5)
        total += whole * (1 / (1 + np.exp(-wrapper.log_alpha.detach().double().numpy()))).sum()
    penalty = method.penalty(injection_of(model))
    assert penalty.item() == pytest.approx(0.25 * total, rel=1e-5)
    (gradient,) = torch.autograd.grad(wrapper.expected_open(), wrapper.log_alpha)
    p = torch.sigmoid(wrapper.log_alpha)
    close(gradient, p * (1 - p) * whole)


# ------------------------------------------------------------------ models with a difference


@BOTH
@DIFF
def test_gradients_of_a_difference_are_those_of_the_weight(name, kind):
    """In eval mode every gate is fully open at the start."""
    full, ours, batch = MODELS[name](), injected(name, DIFFS[kind]), batch_of(name)
    full(**batch).loss.backward()
    ours(**batch).loss.backward()
    for path, wrapper in layers(ours).items():
        close(wrapper.w.grad, full.get_submodule(path).weight.grad)
        # Where w is 0 no gate makes a difference to the task.
        assert wrapper.log_alpha is None or not wrapper.log_alpha.grad.any()


def test_a_stretch_that_never_closes_or_opens_is_refused():
    for value in (1.0, math.inf, "1.5"):
        with pytest.raises(ValueError, match="DiffPruning: stretch="):
            DiffPruning(stretch=value)


# ------------------------------------------------------------------ pruning


@torch.no_grad()
def entries(model):
    """Return the difference of every layer after training: its effect on a weight of zeros."""
    found = {}
    for path, wrapper in layers(model).items():
        alone = deepcopy(wrapper)
        alone.base.weight.zero_()
        found[path] = alone.merged_tensors()[0]
    return found


@DIFF
def test_pruning_keeps_the_largest_of_all_layers(kind):
    model = injected("llama", DIFFS[kind])
    for seed, wrapper in enumerate(layers(model).values()):
        torch.manual_seed(seed)
        wrapper.w.data.normal_(std=1 + seed % 3)
        if wrapper.log_alpha is not None:
            wrapper.log_alpha.data.normal_(2.0)
    before = entries(model)
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


def test_pruned_to_all_it_is_the_same_and_pruned_further_a_part_of_it():
    model = trained("llama", DIFFS["gates"])
    before = entries(model)
    prune_diff(model, sum(d.numel() for d in before.values()))
    assert same(entries(model), before)
    prune_diff(model, 200)
    first = entries(model)
    prune_diff(model, 50)
    second = entries(model)
    assert sum(int((d != 0).sum()) for d in second.values()) == 50
    for path, d in second.items():
        assert torch.equal(d, torch.where(d != 0, first[path], 0.0))


def test_pruning_is_refused_with_a_wrong_number_without_a_difference_or_merged():
    model = injected("llama", DiffPruning(targets=("q_proj",)))
    for keep in (0, 10**9, 2.0):
        with refused(model, "prune_diff: keep"):
            prune_diff(model, keep)
    with refused(bias := injected("bert", BitFit()), "the model holds no DiffPruning"):
        prune_diff(bias, 5)
    merge(model)
    with refused(model, r"the difference is merged; unmerge\(model\)", RuntimeError):
        prune_diff(model, 5)


def test_what_is_pruned_stays_sparse_in_further_training():
    model = trained("bert", DIFFS["gates"])
    prune_diff(model, 100)
    masks = {path: w.mask.clone() for path, w in layers(model).items()}
    before = entries(model)
    fit(model, TinyTask(), 5, weight_decay=0.1, show=False)
    after = entries(model)
    for path, mask in masks.items():
        assert torch.equal(layers(model)[path].mask, mask)
        assert not after[path][~mask].any() and not layers(model)[path].w[~mask].any()
    assert sum(int((after[path] != before[path]).sum()) for path in masks) > 90


# ------------------------------------------------------------------ files


def saved_diff(folder, keep=60):
    model = trained("llama", DiffPruning(targets=("q_proj", "v_proj")))
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
    assert len(shapes) == 4
    for stem, shape in shapes.items():
        d = entries(model)[stem.removeprefix("base_model.model.")]
        assert list(d.shape) == shape
        flat = torch.zeros(d.numel())
        flat[file[f"{stem}.indices"].long()] = file[f"{stem}.values"]
        assert torch.equal(flat.view(shape), d)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def new(key, change):
    """Change the indices or values of one layer."""
    return lambda tensors: tensors.update({f"{Q}.{key}": change(tensors[f"{Q}.{key}"])})


def at(place, index):
    return new("indices", lambda t: t.where(torch.arange(len(t)) != place, index(t)))


BROKEN = {  # {what: (what is done to the tensors, the message)}
    "a repeated index": (at(1, lambda t: t[0]), "an index of its own"),
    "an index beyond the end": (at(0, lambda t: 64 * 64), "lie outside 0 to 4095"),
    "a negative index": (at(0, lambda t: -1), "lie outside 0 to 4095"),
    "an index between two": (new("indices", lambda t: t + 0.7), "whole numbers"),
    "no indices": (lambda tensors: tensors.pop(f"{Q}.indices"), "indices"),
    "one value less": (new("values", lambda t: t[1:].clone()), "an index of its own"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_is_refused(what, tmp_path):
    saved_diff(tmp_path, keep=2000)
    change, told = BROKEN[what]
    model = tiny_llama()
    with refused(model, told):
        load_adapter(model, rewrite(tmp_path, change))


def test_a_file_without_shapes_is_refused(tmp_path):
    saved_diff(tmp_path)
    with refused(model := tiny_llama(), "shapes"):
        load_adapter(model, rewrite(tmp_path, shapes=...))


# ------------------------------------------------------------------ 16 bits and 4 bits


def test_a_difference_to_a_base_in_4_bits_is_refused():
    for targets in ("all-linear", ("v_proj",)):
        with refused(model := four_bit(), "targets.*: .* in 4 bits already"):
            inject(model, DiffPruning(targets=targets))


def test_biases_and_norms_of_a_base_in_4_bits_train():
    for base, method, count in (
        (tiny_opt(ffn_dim=128), BitFit(), 2 * (7 * 64 + 128) + 64),
        (tiny_llama(intermediate_size=128), SELECTING["norms"], 5 * 64),
    ):
        model = four_bit(base)
        assert inject(model, method).trainable == count
        before = state(model)
        fit(model, TinyText(), 2, show=False)
        after = state(model)
        assert {n for n in before if not torch.equal(before[n], after[n])} == training(model)
