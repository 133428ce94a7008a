"""LoRA+, PiSSA, LoftQ, VeRA and OFT: beside PEFT's, and what is their own."""

import warnings
from copy import deepcopy

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from tiny import (
    EACH,
    MODELS,
    TARGETS,
    batch_of,
    close,
    lora_config,
    lora_pair,
    perturb,
    read_config,
    refused,
    rewrite,
    same,
    state,
    step_of_both,
    task_of,
    task_type,
    tiny_llama,
)
from torch import nn

from peft_lessons import (
    OFT,
    LoftQ,
    LoRA,
    LoRAPlus,
    PiSSA,
    QLoRA,
    VeRA,
    check,
    fit,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import WEIGHTS, injected_copy, injection_of, read_adapter
from peft_lessons.methods.qlora import NF4Linear, dequantize
from peft_lessons.methods.variants import (
    LinearWithPiSSA,
    alternate,
    cayley,
    cayley_neumann,
    leading,
    rotated,
    skew,
)

BOTH = pytest.mark.parametrize("neumann", [True, False])


def wide():
    """Every width a multiple of 64, as four bits need it."""
    return tiny_llama(intermediate_size=128)


def added(model):
    return dict(injection_of(model).added())


# ------------------------------------------------------------------ all of them


def test_a_model_may_be_halved_afterwards():
    """A processor solves nothing in 16 bits."""
    model, batch = tiny_llama(), batch_of("llama")
    inject(model, OFT(16, neumann=False))
    expected = perturb(model)(**batch).logits
    close(model.half()(**batch).logits.float(), expected, 1e-2)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LoRAPlus(lr_ratio=0.0), "lr_ratio=0.0 must be"),
        (lambda: LoRAPlus(rank=0), "LoRAPlus: rank=0"),
        (lambda: PiSSA(alpha=-1.0), "PiSSA: alpha=-1.0"),
        (lambda: LoftQ(iterations=-1), "iterations=-1 must be"),
        (lambda: LoftQ(iterations=0), r"LoftQ: .*QLoRA is what starts without"),
        (lambda: LoftQ(principal=1), "principal=1 must be True or False"),
        (lambda: VeRA(rank=0), "VeRA: rank=0"),
        (lambda: VeRA(d_initial=0.0), "d_initial=0.0 must be"),
        (lambda: VeRA(seed=-1), "seed=-1 must be"),
        (lambda: VeRA(dropout=1.0), r"dropout=1.0 must lie in \[0, 1\)"),
        (lambda: OFT(block_size=1), "block_size=1 must be at least 2"),
        (lambda: OFT(neumann=None), "neumann=None must be True or False"),
    ],
)
def test_settings_that_make_no_sense(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (OFT(48), r"'model.layers.0.self_attn.q_proj': 64 inputs cannot be cut into blocks of 48"),
        (PiSSA(20), r"k_proj': its file is .*twice the rank.* a rank up to 16"),
        (LoftQ(65), "rank=65 is above min"),
        (VeRA(8, ("nope",)), "'nope' matches no module"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(method, told):
    model = wide()
    with refused(model, told):
        inject(model, method)


# ------------------------------------------------------------------ LoRA+


def test_b_learns_at_its_own_rate():
    """The first step of Adam moves each number by its rate, if it has a gradient: A has none while
    B is 0."""
    model, rate = MODELS["llama"](), 1e-4
    inject(model, LoRAPlus(4, 6.0, ("q_proj", "down_proj"), lr_ratio=7.0))
    perturb(model)
    before = {name: p.detach().clone() for name, p in added(model).items()}
    fit(model, task_of("llama"), 1, lr=rate, warmup=0.0, show=False)
    for name, p in added(model).items():
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(rate * (7 if name.endswith("lora_B") else 1), rel=0.02)


def test_peft_s_optimiser_has_the_same_rates():
    theirs, ours = lora_pair(tiny_llama(), LoRAPlus(4, 6.0, TARGETS["llama"]))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    factors = injection_of(ours).method.rate_factors
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            factor = factors["lora.lora_B"] if "lora_B" in name else 1.0
            assert rates[id(p)] == pytest.approx(1e-4 * factor)


# ------------------------------------------------------------------ PiSSA


def pissa_pair(name, rslora=False):
    """(PEFT's model, ours) on copies of one base, as they start, and the base."""
    base, method = MODELS[name](), PiSSA(4, 6.0, TARGETS[name], rslora=rslora)
    config = lora_config(method, task_type(name), init_lora_weights="pissa")
    ours = injected_copy(base, method)
    theirs = peft.get_peft_model(deepcopy(base), config)
    return theirs.eval(), ours.eval(), base


def merged_alike(ours, theirs) -> None:
    """Merge both, and compare the weights."""
    merge(ours)
    merged = theirs.merge_and_unload()
    for path, wrapper in injection_of(ours).wrappers.items():
        close(wrapper.base.weight, merged.get_submodule(path).weight, 1e-5, path)


def layers_of(theirs, ours):
    """(their layer, our wrapper) of each target."""
    for path, wrapper in injection_of(ours).wrappers.items():
        yield theirs.base_model.model.get_submodule(path), wrapper


@EACH
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_pissa_starts_as_peft_s(name, rslora):
    theirs, ours, _ = pissa_pair(name, rslora)
    for layer, wrapper in layers_of(theirs, ours):
        close(wrapper.lora.delta_weight(), layer.get_delta_weight("default"), 1e-5, "BA")
        residual = wrapper.base.weight - wrapper.lora.delta_weight()
        close(residual, layer.base_layer.weight, 1e-5, "residual")
        # The signs of singular vectors are free, and their sizes are not.
        A = layer.lora_A["default"].weight
        close(wrapper.lora.lora_A.abs(), A.abs(), 1e-4, "A")
        close(wrapper.lora.lora_A.norm(), wrapper.lora.lora_B.norm(), 1e-4, "equal shares")


@EACH
def test_pissa_after_training_is_peft_s(name):
    theirs, ours, _ = pissa_pair(name)
    torch.manual_seed(7)
    with torch.no_grad():
        for layer, wrapper in layers_of(theirs, ours):
            for factor in ("lora_A", "lora_B"):
                p = getattr(wrapper.lora, factor)
                p.add_(0.1 * torch.randn_like(p))
                getattr(layer, factor)["default"].weight.copy_(p)
    step_of_both(theirs, ours, batch_of(name), 2e-5)  # W is never taken apart here
    for layer, wrapper in layers_of(theirs, ours):
        for factor in ("lora_A", "lora_B"):
            grad = getattr(layer, factor)["default"].weight.grad
            close(getattr(wrapper.lora, factor).grad, grad, 2e-6, factor)
    merged_alike(ours, theirs)


@torch.no_grad()
def test_pissa_with_dropout_drops_what_peft_drops():
    base, method = tiny_llama(), PiSSA(4, 6.0, ("q_proj",), dropout=0.5)
    ours = injected_copy(base, method).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(method, init_lora_weights="pissa")
        theirs = peft.get_peft_model(deepcopy(base), config).train()
    layer, wrapper = next(layers_of(theirs, ours))
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    close(wrapper(x), expected, 1e-5)
    assert (wrapper(x) - base.model.layers[0].self_attn.q_proj(x)).abs().max() > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_its_file_is_a_lora_of_twice_the_rank(rslora, tmp_path):
    base = tiny_llama()
    model = perturb(injected_copy(base, PiSSA(3, 6.0, ("q_proj", "down_proj"), rslora=rslora)))
    save_adapter(model, tmp_path)
    config, tensors, _ = read_adapter(tmp_path)
    assert (config["r"], config["use_rslora"]) == (6, rslora)
    assert config["lora_alpha"] == pytest.approx(6 * 2**0.5 if rslora else 12)
    assert "init_lora_weights" not in config
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in tensors} == {"lora_A", "lora_B"}
    again = deepcopy(base)
    load_adapter(again, tmp_path)
    assert type(injection_of(again).method) is LoRA
    close(again(**batch_of("llama")).logits, model(**batch_of("llama")).logits, 5e-6)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_what_peft_converts_is_what_we_save(tmp_path):
    base = tiny_llama()
    config = lora_config(PiSSA(4, 6.0, TARGETS["llama"]), init_lora_weights="pissa")
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    ours = injected_copy(base, PiSSA(4, 6.0, TARGETS["llama"]))
    torch.manual_seed(7)
    with torch.no_grad():
        for layer, wrapper in layers_of(theirs, ours):
            for factor in ("lora_A", "lora_B"):
                p = getattr(wrapper.lora, factor)
                p.add_(0.1 * torch.randn_like(p))
                getattr(layer, factor)["default"].weight.copy_(p)
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start)
    save_adapter(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / whose / WEIGHTS) for whose in ("theirs", "ours"))
    assert a.keys() == b.keys() and {t.shape for t in a.values()} == {t.shape for t in b.values()}
    batch, opened = batch_of("llama"), deepcopy(base)
    load_adapter(opened, tmp_path / "theirs")
    expected = ours(**batch).logits
    close(opened(**batch).logits, expected, 1e-5)
    back = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()
    close(back(**batch).logits, expected, 1e-5)


def test_a_file_that_needs_another_base_is_refused(tmp_path):
    """What PEFT saves of a PiSSA as it is belongs on the residual, which no file holds."""
    base = tiny_llama()
    config = lora_config(PiSSA(4, 6.0, ("q_proj",)), init_lora_weights="pissa")
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path)
    with refused(base, "init_lora_weights='pissa'"):
        load_adapter(base, tmp_path)


def test_a_weight_without_singular_values_is_named():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = torch.nan
    with refused(model, r"layers.1.mlp.up_proj': the weight is nan at \[3, 4\] \(and 1 more\)"):
        inject(model, PiSSA(4))


def test_in_16_bits_a_small_scale_does_not_overflow():
    model = tiny_llama().half()
    inject(model, PiSSA(4, alpha=1e-6))
    assert all(p.isfinite().all() for p in added(model).values())


def test_both_branches_are_rounded_alike():
    """A product rounds by how its factors lie in memory too; SVD gives V column by column."""
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 64), torch.randn(3, 96)
    wrapper = LinearWithPiSSA(layer, 4)
    assert torch.equal(wrapper(x), layer(x))
    assert wrapper.start_A.stride() == wrapper.lora.lora_A.stride()


def test_leading_is_the_best_approximation():
    W = torch.randn(48, 96)
    A, B = leading(W, 5)
    S = torch.linalg.svdvals(W)
    assert (W - B @ A).norm().item() == pytest.approx(S[5:].norm().item(), rel=1e-5)
    close(A @ A.T, torch.diag(S[:5]), 1e-4)
    close(B.T @ B, torch.diag(S[:5]), 1e-4)
    assert leading(W.double(), 5)[0].dtype == torch.float64
    assert leading(W.bfloat16(), 5)[0].dtype == torch.float32


# ------------------------------------------------------------------ LoftQ


def spectrum(decay, size=128, seed=0):
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    W = U * torch.arange(1, size + 1) ** -float(decay) @ V.T
    return W * (size / W.norm())


def by_bnb(weight):
    """A weight in 4 bits and back, by bitsandbytes."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def by_us(weight, block=64):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return NF4Linear(linear, block, double_quant=False).weight


def error(weight, parts):
    A, B, Q = parts
    return (weight - Q - B @ A).norm().item()


def test_alternating_written_once_more():
    W, rank = spectrum(0.5), 8
    for quantize in (by_bnb, by_us):
        product = torch.zeros_like(W)
        for _ in range(3):
            Q = quantize(W - product)
            U, S, V = torch.linalg.svd(W - Q)
            product = U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]
        A, B, found = alternate(W, rank, quantize, 3)
        close(found, Q, 1e-5)
        close(B @ A, product, 1e-4)


def test_errors_fall_and_their_order_is_the_spectrum_s():
    for decay in (0, 1):
        W = spectrum(decay)
        plain = (W - by_us(W)).norm().item()
        ours = [error(W, alternate(W, 8, by_us, n)) for n in (1, 5)]
        qpissa = error(W, alternate(W, 8, by_us, 0, principal=True))
        both = error(W, alternate(W, 8, by_us, 5, principal=True))
        assert plain > ours[0] > ours[1] and both < qpissa < plain
        assert (qpissa < ours[1]) == (decay == 1)


@pytest.mark.parametrize("method", [LoftQ(4, 6.0), LoftQ(4, 6.0, iterations=0, principal=True)])
def test_in_the_model_it_is_nearer_than_qlora(method):
    base = wide()
    ours, plain = injected_copy(base, method), injected_copy(base, QLoRA(4, 6.0))
    for path, wrapper in injection_of(ours).wrappers.items():
        W = base.get_submodule(path).weight
        near = W - wrapper.base.weight - wrapper.lora.delta_weight()
        assert isinstance(wrapper.base, NF4Linear)
        assert near.norm() < (W - injection_of(plain).wrappers[path].base.weight).norm()
        close(wrapper.lora.lora_A.norm(), wrapper.lora.lora_B.norm(), 1e-5)


@pytest.mark.parametrize("block", [64, 128])
def test_q_and_the_factors_are_those_of_alternate(block):
    base, method = wide(), LoftQ(4, 6.0, block=block, double_quant=False, iterations=2)
    ours = injected_copy(base, method)
    for path, wrapper in injection_of(ours).wrappers.items():
        W = base.get_submodule(path).weight.detach()
        A, B, Q = alternate(W, 4, lambda weight: by_us(weight, block), 2)
        close(wrapper.base.weight, Q, 1e-6)
        close(wrapper.lora.delta_weight(), B @ A, 1e-6)


def test_only_its_targets_get_a_branch():
    model = wide()
    inject(model, LoftQ(4, 6.0, ("q_proj",)))
    wrappers = injection_of(model).wrappers
    with_branch = {path for path, w in wrappers.items() if w.lora is not None}
    assert with_branch == {path for path in wrappers if path.endswith("q_proj")}
    assert all(isinstance(w.base, NF4Linear) for w in wrappers.values())


def test_the_base_that_unload_leaves_is_q(tmp_path):
    """What PEFT needs to open the file is this base: LoftQ's adapter belongs on Q, not on W."""
    base, batch = wide(), batch_of("llama")
    model = perturb(injected_copy(base, LoftQ(4, 6.0, iterations=2)))
    expected = model(**batch).logits
    save_adapter(model, tmp_path)
    config, _, _ = read_adapter(tmp_path)
    assert (config["quantised_base"], config["quantised_iterations"]) == ("loftq", 2)
    assert not any(name.startswith("quantised") for name in read_config(tmp_path))  # in the header
    again = deepcopy(base)
    load_adapter(again, tmp_path)
    assert isinstance(injection_of(again).method, LoftQ)
    plain = dequantize(unload(deepcopy(model)))
    assert not torch.equal(
        plain.model.layers[0].mlp.up_proj.weight,
        by_us(base.model.layers[0].mlp.up_proj.weight.detach()),
    )
    opened = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    close(opened(**batch).logits, expected, 1e-5)
    dequantize(model)
    merge(model)
    close(unload(model)(**batch).logits, expected, 1e-5)


def test_in_16_bits_q_has_16():
    """The product BA that is taken off has 32."""
    model, batch = wide().bfloat16(), batch_of("llama")
    inject(model, LoftQ(4, 6.0, iterations=2))
    assert not any(torch.equal(p, p.bfloat16().float()) for p in added(model).values())
    expected = perturb(model)(**batch).logits
    dequantize(model)
    assert torch.equal(model(**batch).logits, expected)
    merge(model)
    close(unload(model)(**batch).logits, expected, 0.05)


# ------------------------------------------------------------------ VeRA


def vera_pair(name, **more):
    method = VeRA(12, TARGETS[name], **more)
    targets = list(TARGETS[name])
    config = peft.VeraConfig(
        r=12, target_modules=targets, projection_prng_key=method.seed, task_type=task_type(name)
    )
    base = MODELS[name]()
    ours = injected_copy(base, method).eval()
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    return theirs, ours


def shake(theirs, ours, names):
    """Both the same values, away from the start. names: {their dict: our parameter}."""
    torch.manual_seed(7)
    with torch.no_grad():
        for layer, wrapper in layers_of(theirs, ours):
            for there, here in names.items():
                p = getattr(wrapper, here)
                p.add_(0.1 * torch.randn_like(p))
                held = getattr(layer, there)["default"]
                (held.weight if isinstance(held, nn.Module) else held).copy_(p)


LAMBDAS = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}


@EACH
def test_vera_is_peft_s(name):
    theirs, ours = vera_pair(name, seed=5)
    layer, wrapper = next(layers_of(theirs, ours))
    assert torch.equal(wrapper.shared.vera_A, layer.vera_A["default"])
    assert torch.equal(wrapper.shared.vera_B, layer.vera_B["default"])
    assert torch.equal(wrapper.lambda_d, layer.vera_lambda_d["default"])
    assert torch.equal(wrapper.lambda_b, layer.vera_lambda_b["default"])
    shake(theirs, ours, LAMBDAS)
    step_of_both(theirs, ours, batch_of(name))
    for layer, wrapper in layers_of(theirs, ours):
        for there, here in LAMBDAS.items():
            close(getattr(wrapper, here).grad, getattr(layer, there)["default"].grad, 1e-6, here)
    merged_alike(ours, theirs)


@torch.no_grad()
def test_vera_with_dropout_drops_what_peft_drops():
    base, method = tiny_llama(), VeRA(12, ("q_proj",), dropout=0.5, d_initial=0.3)
    ours = injected_copy(base, method).train()
    config = peft.VeraConfig(r=12, target_modules=["q_proj"], vera_dropout=0.5, d_initial=0.3)
    theirs = peft.get_peft_model(deepcopy(base), config).train()
    layer, wrapper = next(layers_of(theirs, ours))
    assert torch.equal(wrapper.lambda_d, layer.vera_lambda_d["default"])
    shake(theirs, ours, LAMBDAS)
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    close(wrapper(x), expected, 1e-6)
    assert (wrapper(x) - wrapper.eval()(x)).abs().max() > 1e-2


def test_only_the_vectors_train_and_they_are_few():
    model = tiny_llama()
    inject(model, VeRA(12, ("q_proj", "v_proj")))
    assert report(model).trainable == 2 * ((12 + 64) + (12 + 32))
    moving = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert moving == {"lambda_b", "lambda_d"}


@pytest.mark.parametrize("change", [lambda m: m, lambda m: m.bfloat16(), deepcopy])
def test_all_layers_share_one_pair(change):
    model = tiny_llama()
    inject(model, VeRA(12))
    wrappers = injection_of(change(model)).wrappers.values()
    assert len({w.shared.vera_A.data_ptr() for w in wrappers}) == 1
    assert {tuple(w.shared.vera_A.shape) for w in wrappers} == {(12, 96)}
    assert {tuple(w.shared.vera_B.shape) for w in wrappers} == {(96, 12)}


def test_the_seed_makes_the_projections():
    def pair(seed):
        model = tiny_llama()
        inject(model, VeRA(12, seed=seed))
        return next(iter(injection_of(model).wrappers.values())).shared.vera_A

    torch.manual_seed(1)
    first = pair(0)
    before = torch.get_rng_state()
    assert torch.equal(first, pair(0)) and not torch.equal(first, pair(1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_default_device_or_dtype_does_not_change_them():
    """The generator is the processor's: on a default device of another kind it drew nothing."""
    plain, here, double = tiny_llama(), tiny_llama(), tiny_llama()
    inject(plain, VeRA(12))
    with torch.device("meta"):
        inject(here, VeRA(12))
    torch.set_default_dtype(torch.float64)
    try:
        inject(double, VeRA(12))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(state(here), state(plain)) and same(state(double), state(plain))
    assert {p.dtype for p in added(double).values()} == {torch.float32}


def test_a_rank_above_the_widths_is_no_mistake():
    """λ_d chooses among random directions, and more of them are more freedom."""
    model = tiny_llama()
    inject(model, VeRA(200, ("q_proj",)))
    assert len(next(iter(added(model).values()))) in (200, 64)


def test_the_projections_stand_once_in_the_file(tmp_path):
    model = perturb(injected_copy(tiny_llama(), VeRA(12)))
    save_adapter(model, tmp_path)
    _, tensors, _ = read_adapter(tmp_path)
    assert [key for key in tensors if key.endswith(("vera_A", "vera_B"))] == [
        "base_model.vera_A",
        "base_model.vera_B",
    ]
    assert len(tensors) == 2 + 2 * len(injection_of(model).wrappers)


def test_the_file_s_projections_count_and_not_the_seed_s(tmp_path):
    """Another version of torch may draw others."""
    save_adapter(perturb(injected_copy(tiny_llama(), VeRA(12))), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.vera_A"].mul_(2))
    doubled = load_file(tmp_path / WEIGHTS)["base_model.vera_A"]
    again = tiny_llama()
    load_adapter(again, tmp_path)
    for wrapper in injection_of(again).wrappers.values():
        assert torch.equal(wrapper.shared.vera_A, doubled)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
def test_a_file_without_projections_is_refused(tmp_path):
    base = tiny_llama()
    config = peft.VeraConfig(r=12, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path)
    with refused(base, "VeRA asks for save_projection=True"):
        load_adapter(base, tmp_path)
    save_adapter(injected_copy(base, VeRA(12)), tmp_path / "ours")
    rewrite(tmp_path / "ours", lambda tensors: tensors.pop("base_model.vera_B"))
    with refused(base, "describes no VeRA: .*base_model.vera_B"):
        load_adapter(base, tmp_path / "ours")


# ------------------------------------------------------------------ OFT


def oft_pair(name, neumann):
    base = MODELS[name]()
    ours = injected_copy(base, OFT(16, TARGETS[name], neumann)).eval()
    config = peft.OFTConfig(
        oft_block_size=16,
        target_modules=list(TARGETS[name]),
        use_cayley_neumann=neumann,
        task_type=task_type(name),
    )
    return peft.get_peft_model(deepcopy(base), config).eval(), ours


@EACH
@BOTH
def test_oft_is_peft_s(name, neumann):
    theirs, ours = oft_pair(name, neumann)
    shake(theirs, ours, {"oft_R": "entries"})
    step_of_both(theirs, ours, batch_of(name))
    for layer, wrapper in layers_of(theirs, ours):
        close(wrapper.entries.grad, layer.oft_R["default"].weight.grad, 1e-6)
    merged_alike(ours, theirs)


def test_one_is_a_rotation_and_the_other_nearly_its_transpose():
    torch.manual_seed(0)
    S, eye = skew(0.02 * torch.randn(3, 120), 16), torch.eye(16)
    exact, series = cayley(S), cayley_neumann(S)
    close(exact @ exact.mT, eye.expand(3, 16, 16), 1e-5)
    assert torch.linalg.det(exact).sub(1).abs().max() < 1e-5  # turned, not mirrored
    off = (series @ series.mT - eye).abs().max().item()
    assert 1e-7 < off < 1e-2
    assert (series - exact.mT).abs().max() < 0.01 * (series - exact).abs().max()


def test_skew_is_filled_row_by_row_above_the_diagonal():
    S = skew(torch.arange(1.0, 7.0)[None], 4)[0]
    assert S[0].tolist() == [0, 1, 2, 3] and S[1].tolist() == [-1, 0, 4, 5]
    assert torch.equal(S.T, -S)


def test_rotated_is_a_product_with_a_block_diagonal():
    torch.manual_seed(0)
    x, R = torch.randn(2, 5, 12), torch.randn(3, 4, 4)
    close(rotated(x, R), x @ torch.block_diag(*R), 1e-5)


@torch.no_grad()
def test_an_exact_rotation_leaves_lengths_and_singular_values():
    theirs, ours = oft_pair("llama", neumann=False)
    shake(theirs, ours, {"oft_R": "entries"})
    before = {p: w.base.weight.clone() for p, w in injection_of(ours).wrappers.items()}
    merge(ours)
    for path, wrapper in injection_of(ours).wrappers.items():
        old, new = (torch.linalg.svdvals(w) for w in (before[path], wrapper.base.weight))
        close(new, old, 1e-5)
        assert (wrapper.base.weight - before[path]).abs().max() > 0.01


@BOTH
def test_unmerge_gives_the_weight_back(neumann):
    theirs, ours = oft_pair("llama", neumann)
    shake(theirs, ours, {"oft_R": "entries"})
    before = {p: w.base.weight.clone() for p, w in injection_of(ours).wrappers.items()}
    merge(ours)
    unmerge(ours)
    for path, wrapper in injection_of(ours).wrappers.items():
        close(wrapper.base.weight, before[path], 1e-6)


@torch.no_grad()
def test_what_unmerge_could_not_bring_back_is_not_merged():
    """Far from 0 the series is no rotation at all: in 16 bits its inverse would bring noise."""
    model, batch = tiny_llama().bfloat16(), batch_of("llama")
    inject(model, OFT(16, ("up_proj",)))
    torch.manual_seed(0)
    for p in added(model).values():
        p.normal_(std=0.4)
    with refused(model, r"up_proj': OFT: block \d .*condition number .*model.float\(\)"):
        merge(model)
    before = [w.base.weight.float() for w in injection_of(model.float()).wrappers.values()]
    expected = model(**batch).logits
    merge(model)
    close(model(**batch).logits, expected, 1e-4)
    unmerge(model)
    for wrapper, weight in zip(injection_of(model).wrappers.values(), before, strict=True):
        close(wrapper.base.weight, weight, 1e-4)


def test_the_setting_is_in_the_file_and_changes_the_model(tmp_path):
    base, batch = tiny_llama(), batch_of("llama")
    model = perturb(injected_copy(base, OFT(16, neumann=False)))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path)[0]["use_cayley_neumann"] is False
    rewrite(tmp_path, use_cayley_neumann=True)
    other = deepcopy(base)
    load_adapter(other, tmp_path)
    assert (other(**batch).logits - model(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("version", ["0.17.1", None, ..., "0.9", "abc"])
def test_a_series_of_older_versions_is_refused(version, tmp_path):
    base = tiny_llama()
    save_adapter(perturb(injected_copy(base, OFT(16))), tmp_path)
    rewrite(tmp_path, peft_version=version)
    with refused(base, "describes no OFT: PEFT before 0.18"):
        load_adapter(base, tmp_path)
    rewrite(tmp_path, peft_version="0.21rc1@abc")
    load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        dict(coft=True),
        dict(block_share=True),
        dict(module_dropout=0.1),
        dict(num_cayley_neumann_terms=4),
    ],
)
def test_options_of_peft_that_we_have_not_are_refused(option, tmp_path):
    base = tiny_llama()
    config = peft.OFTConfig(oft_block_size=16, target_modules=["q_proj"], **option)
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path)
    with refused(base, f"does not read {next(iter(option))}="):
        load_adapter(base, tmp_path)


# ------------------------------------------------------------------ what the exercises ask for


def test_intruders_are_those_that_peft_counts():
    theirs, ours = lora_pair(tiny_llama(), LoRA(4, 0.5, TARGETS["llama"]))
    told = []
    reduce_intruder_dimension(theirs, top_k=10, threshold_epsilon=0.5, logging_sink=told.append)
    wrappers = injection_of(ours).wrappers.values()
    found = []
    for w in wrappers:
        pair = (w.base.weight.detach(), (w.base.weight + w.delta_weight()).detach())
        found.append(check.beyond.intruder_dimensions.reference(*pair, 10, 0.5))
    told = [text.rpartition(": ")[2] for text in told if "ntruders" in text]
    counts = [0 if text == "No intruders" else int(text) for text in told]
    assert counts == found and len(set(found)) > 1


def test_groups_have_the_rates_of_peft_s_optimiser():
    theirs, _ = lora_pair(tiny_llama(), LoRA(4, 6.0, TARGETS["llama"]))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    ours = check.beyond.loraplus_groups.reference(theirs.named_parameters(), 1e-4, 16)
    assert {id(p): group["lr"] for group in ours for p in group["params"]} == pytest.approx(rates)


# ------------------------------------------------------------------ the engine


def test_a_wrapper_of_pissa_is_one_of_lora():
    model = tiny_llama()
    before = state(model)
    inject(model, PiSSA(4))
    assert all(isinstance(w, LinearWithPiSSA) for w in injection_of(model).wrappers.values())
    assert same(state(unload(model)), before)
