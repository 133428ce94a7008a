"""Test LoRA+, PiSSA, LoftQ, VeRA and OFT: against PEFT's, and what PEFT lacks."""

from copy import deepcopy
from operator import attrgetter

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file
from tiny import (
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
    step_of_both,
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
    VeRA,
    check,
    inject,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import WEIGHTS, injected_copy, injection_of
from peft_lessons.methods.qlora import NF4Linear, dequantize
from peft_lessons.methods.variants import alternate, cayley, cayley_neumann, leading, skew

TWO = pytest.mark.parametrize("name", ["llama", "bert"])  # without biases, and with
NEUMANN = pytest.mark.parametrize("neumann", [True, False])


def wide():
    """Return a model whose widths are multiples of 64, as four bits need."""
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


def test_a_loftq_that_never_learns_is_refused():
    with pytest.raises(ValueError, match=r"LoftQ: .*QLoRA is what starts without"):
        LoftQ(iterations=0)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (OFT(48), r"'model.layers.0.self_attn.q_proj': block_size=48 must divide the 64 inputs"),
        (PiSSA(20), r"k_proj': its file is .*twice the rank.* a rank up to 16"),
        (PiSSA(4), r"layers.1.mlp.up_proj': the weight is nan at \[3, 4\] \(and 1 more\)"),
        (LoftQ(65), "rank=65 is above min"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(method, told):
    model = wide()
    if "nan" in told:
        model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = torch.nan
    with refused(model, told):
        inject(model, method)


# ------------------------------------------------------------------ PiSSA


FACTORS = {"lora_A": "lora.lora_A", "lora_B": "lora.lora_B"}


def pissa_pair(name, **more):
    """Return (PEFT's model, ours) on copies of one base, as they start, and the base."""
    base, method = MODELS[name](), PiSSA(4, 6.0, TARGETS[name], **more)
    config = lora_config(method, task_type(name), init_lora_weights="pissa")
    ours = injected_copy(base, method)
    return peft.get_peft_model(deepcopy(base), config).eval(), ours.eval(), base


def layers_of(theirs, ours):
    """Yield (their layer, our wrapper) of each target."""
    for path, wrapper in injection_of(ours).wrappers.items():
        yield theirs.base_model.model.get_submodule(path), wrapper


def tensors_of(theirs, ours, names):
    """(their tensor, ours) of each target. names: {their dict: our parameter}."""
    for layer, wrapper in layers_of(theirs, ours):
        for there, here in names.items():
            held = getattr(layer, there)["default"]
            yield held.weight if isinstance(held, nn.Module) else held, attrgetter(here)(wrapper)


def shake(theirs, ours, names):
    """Perturb both models by the same values."""
    torch.manual_seed(7)
    with torch.no_grad():
        for there, here in tensors_of(theirs, ours, names):
            here.add_(0.1 * torch.randn_like(here))
            there.copy_(here)


def compare_trained(theirs, ours, names, batch, tolerance=1e-6, of_gradients=1e-6):
    """Compare logits, losses, gradients and merged weights with PEFT's after a perturbation."""
    shake(theirs, ours, names)
    step_of_both(theirs, ours, batch, tolerance)
    for there, here in tensors_of(theirs, ours, names):
        close(here.grad, there.grad, of_gradients)
    merge(ours)
    merged = theirs.merge_and_unload()
    for path, wrapper in injection_of(ours).wrappers.items():
        close(wrapper.base.weight, merged.get_submodule(path).weight, 1e-5, path)


def compare_dropped(layer, wrapper, tolerance):
    """Assert that with one seed both models drop the same entries."""
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    close(wrapper(x), expected, tolerance)
    assert (wrapper(x) - wrapper.eval()(x)).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "rslora"), [("llama", True), ("bert", False)])
@torch.no_grad()
def test_pissa_starts_as_peft_s(name, rslora):
    theirs, ours, _ = pissa_pair(name, rslora=rslora)
    for layer, wrapper in layers_of(theirs, ours):
        close(wrapper.lora.delta_weight(), layer.get_delta_weight("default"), 1e-5, "BA")
        residual = wrapper.base.weight - wrapper.lora.delta_weight()
        close(residual, layer.base_layer.weight, 1e-5, "residual")
        # The signs of singular vectors are free, and their sizes are not.
        A = layer.lora_A["default"].weight
        close(wrapper.lora.lora_A.abs(), A.abs(), 1e-4, "A")
        close(wrapper.lora.lora_A.norm(), wrapper.lora.lora_B.norm(), 1e-4, "equal shares")


@TWO
def test_pissa_after_training_is_peft_s(name):
    theirs, ours, _ = pissa_pair(name)
    compare_trained(theirs, ours, FACTORS, batch_of(name), 2e-5, 2e-6)  # W is never taken apart


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_pissa_with_dropout_drops_what_peft_drops():
    theirs, ours, _ = pissa_pair("llama", dropout=0.5)
    compare_dropped(*next(layers_of(theirs.train(), ours.train())), 1e-5)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_what_peft_converts_is_what_we_save(tmp_path):
    theirs, ours, base = pissa_pair("llama")
    theirs.save_pretrained(tmp_path / "start")
    shake(theirs, ours, FACTORS)
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start)
    save_adapter(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / whose / WEIGHTS) for whose in ("theirs", "ours"))
    assert a.keys() == b.keys() and {t.shape for t in a.values()} == {t.shape for t in b.values()}
    assert "init_lora_weights" not in read_config(tmp_path / "ours")
    batch, opened = batch_of("llama"), deepcopy(base)
    load_adapter(opened, tmp_path / "theirs")
    expected = ours(**batch).logits
    close(opened(**batch).logits, expected, 1e-5)
    back = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours").eval()
    close(back(**batch).logits, expected, 1e-5)


def test_a_file_that_needs_another_base_is_refused(tmp_path):
    """What PEFT saves of a PiSSA as it is belongs on the residual, which no file holds."""
    theirs, _, base = pissa_pair("llama")
    theirs.save_pretrained(tmp_path)
    with refused(base, "init_lora_weights='pissa'"):
        load_adapter(base, tmp_path)


def test_leading_is_the_best_approximation():
    W = torch.randn(48, 96)
    A, B = leading(W, 5)
    S = torch.linalg.svdvals(W)
    assert (W - B @ A).norm().item() == pytest.approx(S[5:].norm().item(), rel=1e-5)
    for gram in (A @ A.T, B.T @ B):
        close(gram, torch.diag(S[:5]), 1e-4)


# ------------------------------------------------------------------ LoftQ


def spectrum(decay, size=128, seed=0):
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    W = U * torch.arange(1, size + 1) ** -float(decay) @ V.T
    return W * (size / W.norm())


def by_bnb(weight):
    """Return a weight after bitsandbytes has quantised and dequantised it."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def by_us(weight, block=64):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return NF4Linear(linear, block, double_quant=False).weight


def error(weight, parts):
    A, B, Q = parts
    return (weight - Q - B @ A).norm().item()


def test_alternating_is_what_a_loop_with_bitsandbytes_gives():
    W, rank = spectrum(0.5), 8
    product = torch.zeros_like(W)
    for _ in range(3):
        Q = by_bnb(W - product)
        U, S, V = torch.linalg.svd(W - Q)
        product = U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]
    A, B, found = alternate(W, rank, by_bnb, 3)
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


@pytest.mark.parametrize("how", [dict(iterations=2), dict(iterations=0, principal=True)], ids=str)
def test_q_and_the_factors_are_those_of_alternate(how):
    base = wide()
    ours = injected_copy(base, LoftQ(4, 6.0, block=128, double_quant=False, **how))
    for path, wrapper in injection_of(ours).wrappers.items():
        W = base.get_submodule(path).weight.detach()
        A, B, Q = alternate(W, 4, lambda weight: by_us(weight, 128), **how)
        close(wrapper.base.weight, Q, 1e-6)
        close(wrapper.lora.delta_weight(), B @ A, 1e-6)
        close(wrapper.lora.lora_A.norm(), wrapper.lora.lora_B.norm(), 1e-5)


def test_the_base_that_unload_leaves_is_q(tmp_path):
    """What PEFT needs to open the file is this base: LoftQ's adapter belongs on Q, not on W."""
    base, batch = wide(), batch_of("llama")
    model = perturb(injected_copy(base, LoftQ(4, 6.0, iterations=2)))
    expected = model(**batch).logits
    save_adapter(model, tmp_path)
    assert not any(name.startswith("quantised") for name in read_config(tmp_path))  # in the header
    plain, path = dequantize(unload(deepcopy(model))), "model.layers.0.mlp.up_proj"
    of_w = by_us(base.get_submodule(path).weight.detach())
    assert not torch.equal(plain.get_submodule(path).weight, of_w)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    close(opened(**batch).logits, expected, 1e-5)
    merge(dequantize(model))
    close(unload(model)(**batch).logits, expected, 1e-5)


def test_in_16_bits_q_has_16_and_the_product_that_is_taken_off_32():
    model, batch = wide().bfloat16(), batch_of("llama")
    inject(model, LoftQ(4, 6.0, iterations=2))
    assert not any(torch.equal(p, p.bfloat16().float()) for p in added(model).values())
    expected = perturb(model)(**batch).logits
    assert torch.equal(dequantize(model)(**batch).logits, expected)


# ------------------------------------------------------------------ VeRA


LAMBDAS = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}


def vera_pair(name, seed=0, dropout=0.0):
    config = peft.VeraConfig(
        r=12,
        target_modules=list(TARGETS[name]),
        projection_prng_key=seed,
        vera_dropout=dropout,
        d_initial=0.3,
        task_type=task_type(name),
    )
    base = MODELS[name]()
    ours = injected_copy(base, VeRA(12, TARGETS[name], dropout, 0.3, seed)).eval()
    return peft.get_peft_model(deepcopy(base), config).eval(), ours


@TWO
def test_vera_is_peft_s(name):
    theirs, ours = vera_pair(name, seed=5)
    layer, wrapper = next(layers_of(theirs, ours))
    assert torch.equal(wrapper.shared.vera_A, layer.vera_A["default"])
    assert torch.equal(wrapper.shared.vera_B, layer.vera_B["default"])
    assert torch.equal(wrapper.lambda_d, layer.vera_lambda_d["default"])
    assert torch.equal(wrapper.lambda_b, layer.vera_lambda_b["default"])
    compare_trained(theirs, ours, LAMBDAS, batch_of(name))


@torch.no_grad()
def test_vera_with_dropout_drops_what_peft_drops():
    theirs, ours = vera_pair("llama", dropout=0.5)
    shake(theirs, ours, LAMBDAS)
    compare_dropped(*next(layers_of(theirs.train(), ours.train())), 1e-6)


def test_only_the_vectors_train_and_all_layers_share_one_pair():
    model = tiny_llama()
    inject(model, VeRA(200, ("q_proj", "v_proj", "down_proj")))  # a rank above the widths
    assert report(model).trainable == 2 * ((200 + 64) + (200 + 32) + (200 + 64))
    moving = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert moving == {"lambda_b", "lambda_d"}
    for changed in (model, deepcopy(model), model.bfloat16()):
        shared = [w.shared for w in injection_of(changed).wrappers.values()]
        assert len({s.vera_A.data_ptr() for s in shared}) == 1
        assert {tuple(s.vera_A.shape) for s in shared} == {(200, 96)}
        assert {tuple(s.vera_B.shape) for s in shared} == {(64, 200)}


def test_the_seed_alone_makes_the_projections():
    """The generator is the processor's: on a default device of another kind it drew nothing."""

    def drawn(seed, device="cpu"):
        model = tiny_llama()
        with torch.device(device):
            inject(model, VeRA(12, seed=seed))
        return next(iter(injection_of(model).wrappers.values())).shared.vera_A

    first, before = drawn(0), torch.get_rng_state()
    assert torch.equal(first, drawn(0, "meta")) and not torch.equal(first, drawn(1))
    assert torch.equal(before, torch.get_rng_state())


def test_the_file_holds_the_projections_once_and_they_override_the_seed(tmp_path):
    """Another version of torch may draw others."""
    model = perturb(injected_copy(tiny_llama(), VeRA(12)))
    save_adapter(model, tmp_path)
    pair = {"base_model.vera_A", "base_model.vera_B"}
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key for key in tensors if key.endswith(("vera_A", "vera_B"))} == pair
    assert len(tensors) == 2 + 2 * len(injection_of(model).wrappers)
    rewrite(tmp_path, lambda tensors: tensors["base_model.vera_A"].mul_(2))
    again = tiny_llama()
    load_adapter(again, tmp_path)
    for wrapper in injection_of(again).wrappers.values():
        assert torch.equal(wrapper.shared.vera_A, 2 * tensors["base_model.vera_A"])


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


ENTRIES = {"oft_R": "entries"}


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


@TWO
@NEUMANN
def test_oft_is_peft_s(name, neumann):
    compare_trained(*oft_pair(name, neumann), ENTRIES, batch_of(name))


def test_one_is_a_rotation_and_the_other_nearly_its_transpose():
    torch.manual_seed(0)
    S, eye = skew(0.02 * torch.randn(3, 120), 16), torch.eye(16)
    exact, series = cayley(S), cayley_neumann(S)
    close(exact @ exact.mT, eye.expand(3, 16, 16), 1e-5)
    assert torch.linalg.det(exact).sub(1).abs().max() < 1e-5  # turned, not mirrored
    off = (series @ series.mT - eye).abs().max().item()
    assert 1e-7 < off < 1e-2
    assert (series - exact.mT).abs().max() < 0.01 * (series - exact).abs().max()


@torch.no_grad()
def test_what_unmerge_could_not_bring_back_is_not_merged():
    """Far from 0 the series is no rotation at all: in 16 bits its inverse would bring noise."""
    model = tiny_llama().bfloat16()
    inject(model, OFT(16, ("up_proj",)))
    torch.manual_seed(0)
    for p in added(model).values():
        p.normal_(std=0.4)
    with refused(model, r"up_proj': OFT: block \d .*condition number .*model.float\(\)"):
        merge(model)
    before = [w.base.weight.float() for w in injection_of(model.float()).wrappers.values()]
    merge(model)
    unmerge(model)
    for wrapper, weight in zip(injection_of(model).wrappers.values(), before, strict=True):
        close(wrapper.base.weight, weight, 1e-4)


def test_a_series_of_older_versions_is_refused(tmp_path):
    base = tiny_llama()
    save_adapter(perturb(injected_copy(base, OFT(16))), tmp_path)
    for version in ("0.17.1", ...):
        rewrite(tmp_path, peft_version=version)
        with refused(base, "describes no OFT: PEFT before 0.18"):
            load_adapter(base, tmp_path)
    rewrite(tmp_path, peft_version="0.21rc1@abc")
    load_adapter(base, tmp_path)


def test_another_series_of_peft_is_refused(tmp_path):
    base = tiny_llama()
    config = peft.OFTConfig(
        oft_block_size=16, target_modules=["q_proj"], num_cayley_neumann_terms=4
    )
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path)
    with refused(base, "does not read num_cayley_neumann_terms="):
        load_adapter(base, tmp_path)


# ------------------------------------------------------------------ what the exercises ask for


def test_intruders_are_those_that_peft_counts():
    theirs, ours = lora_pair(tiny_llama(), LoRA(4, 0.5, TARGETS["llama"]))
    told, found = [], []
    reduce_intruder_dimension(theirs, top_k=10, threshold_epsilon=0.5, logging_sink=told.append)
    for w in injection_of(ours).wrappers.values():
        pair = (w.base.weight.detach(), (w.base.weight + w.delta_weight()).detach())
        found.append(check.beyond.intruder_dimensions.reference(*pair, 10, 0.5))
    told = [text.rpartition(": ")[2] for text in told if "ntruders" in text]
    counts = [0 if text == "No intruders" else int(text) for text in told]
    assert counts == found and len(set(found)) > 1


def test_learning_rates_are_those_of_peft_s_optimiser():
    theirs, ours = lora_pair(tiny_llama(), LoRAPlus(4, 6.0, TARGETS["llama"]))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    factors = injection_of(ours).method.rate_factors
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            factor = factors["lora.lora_B"] if "lora_B" in name else 1.0
            assert rates[id(p)] == pytest.approx(1e-4 * factor)
