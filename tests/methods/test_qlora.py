"""Four-bit weights and QLoRA: bit-equal to bitsandbytes, through all verbs, and what is refused."""

from copy import deepcopy

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import SIZES, close, perturb, refused, step_of_both, tiny_llama, tiny_opt
from torch import nn

from peft_lessons import (
    LoRA,
    QLoRA,
    freeze,
    inject,
    load_adapter,
    load_model,
    measure,
    merge,
    report,
    save_adapter,
    setup_qlora,
    unload,
    unmerge,
)
from peft_lessons.engine import WEIGHTS, fingerprint, injection_of
from peft_lessons.methods.qlora import (
    DYNAMIC,
    NF4,
    NF4Linear,
    dequantize,
    dequantize_absmax,
    dequantize_nf4,
    pack_nibbles,
    quantize_absmax,
    quantize_nf4,
)


def llama(**changes):
    """Return a Llama in which every in_features is a multiple of 64."""
    return tiny_llama(intermediate_size=128, **changes)


def opt():
    """Return an OPT, with biases, learned positions and a tied head."""
    return tiny_opt(ffn_dim=128)


def weights(name: str) -> list[torch.Tensor]:
    layers = (m for m in load_model(name).modules() if type(m) is nn.Linear)
    return [m.weight.detach() for m in layers]


# ------------------------------------------------------------------ the numbers


def test_levels_are_those_of_bitsandbytes():
    assert torch.equal(NF4, bnb.functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(DYNAMIC, bnb.functional.create_dynamic_map())


def compare(weight, block=64, restored=True):
    """Assert that codes, scales and restored weights are bitsandbytes', bit by bit."""
    theirs, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=True
    )
    packed, absmax = quantize_nf4(weight, block)
    codes, second, offset = quantize_absmax(absmax)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(codes, state.absmax.flatten())
    assert torch.equal(second, state.state2.absmax) and torch.equal(offset, state.offset)
    if restored:
        ours = dequantize_nf4(packed, dequantize_absmax(codes, second, offset), weight.shape, block)
        assert torch.equal(ours.to(weight.dtype), bnb.functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize(("name", "block"), [("tinylm", 64), ("minilm", 32)])
def test_codes_scales_and_weights_are_bit_equal_on_real_weights(name, block):
    for weight in weights(name):
        compare(weight, block, weight.shape[1] % block == 0)  # elsewhere their kernel is wrong


@pytest.mark.parametrize("block", [32, 128, 512, 4096])
def test_they_are_bit_equal_with_small_and_large_blocks(block):
    torch.manual_seed(0)
    compare(torch.randn(16, 4096), block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_bit_equal_too(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=False).to(dtype)
    compare(linear.weight.data)
    assert NF4Linear(linear).weight.dtype == dtype


@pytest.mark.parametrize("block", [64, 4096])
def test_a_short_last_block_and_a_zero_block(block):
    x = torch.cat([torch.zeros(4096), torch.randn(130)])
    packed, absmax = quantize_nf4(x, block)
    theirs, state = bnb.functional.quantize_4bit(x, blocksize=block, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten()) and torch.equal(absmax, state.absmax)
    back = dequantize_nf4(packed, absmax, x.shape, block)
    assert torch.equal(back[:4096], torch.zeros(4096))
    assert back.isfinite().all() and (back - x).abs().max() < 0.2 * x.abs().max()


def test_every_level_comes_back_exactly_and_a_midpoint_takes_the_lower_one():
    x = torch.cat([3.5 * NF4, torch.zeros(16), -2.0 * NF4.flip(0), torch.zeros(16)])
    back = dequantize_nf4(*quantize_nf4(x, 32), x.shape, 32)
    assert torch.equal(back[:32], x[:32])
    assert torch.equal(back.view(2, 32).abs().amax(1), x.view(2, 32).abs().amax(1))
    x = torch.zeros(32)
    x[0], x[1] = 1.0, (NF4[8] + NF4[9]) / 2
    packed, _ = quantize_nf4(x, 32)
    assert packed[0] == 15 << 4 | 8


def test_bits_a_parameter():
    packed, absmax = quantize_nf4(torch.randn(1024, 1024))
    codes, second, _ = quantize_absmax(absmax)
    bits = 8 * measure.nbytes([packed, codes, second]) / 1024**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)


# ------------------------------------------------------------------ the layer


def test_the_gradient_is_that_of_the_restored_weight():
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    four, plain = NF4Linear(deepcopy(linear)), deepcopy(linear)
    with torch.no_grad():
        plain.weight.copy_(four.weight)
    grads = []
    for layer in (four, plain):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-5)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)
    assert [n for n, _ in four.named_parameters()] == list(four.state_dict()) == ["bias"]


def test_the_product_keeps_nothing_for_the_backward_pass():
    four = NF4Linear(nn.Linear(128, 48))
    x = torch.randn(4, 128)
    assert measure.activation_bytes(four, lambda: four(x.clone().requires_grad_())) == 0


@pytest.mark.parametrize("double_quant", [True, False])
def test_rounding_the_model_leaves_the_scales_alone(double_quant):
    four = NF4Linear(nn.Linear(128, 48), double_quant=double_quant)
    before = four.weight
    for dtype in (torch.half, torch.bfloat16, torch.float64, torch.float32):
        assert torch.equal(deepcopy(four).to(dtype).weight, before.to(dtype))


def test_autocast_and_16_bit_inputs_run():
    four = NF4Linear(nn.Linear(128, 48))
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = four(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and x.grad.isfinite().all()


# ------------------------------------------------------------------ against bitsandbytes and PEFT


def test_logits_loss_and_gradients_equal_those_of_peft():
    ours, names = load_model("tinylm"), ("q_proj", "v_proj", "down_proj")
    inject(ours, QLoRA(rank=4, alpha=6, targets=names))
    theirs = get_peft_model(
        load_model("tinylm", four_bit=True),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(names)),
    )
    torch.manual_seed(0)
    factors = []
    for path, wrapper in injection_of(ours).wrappers.items():
        if wrapper.lora is not None:
            nn.init.normal_(wrapper.lora.lora_B, std=0.05)
            layer = theirs.base_model.model.get_submodule(path)
            for name in ("lora_A", "lora_B"):
                here, there = getattr(wrapper.lora, name), getattr(layer, name)["default"].weight
                there.data.copy_(here.data)
                factors.append((there, here))
    ids = torch.randint(1, 4096, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
    step_of_both(theirs.train(), ours.train(), batch)
    for there, here in factors:
        close(there.grad, here.grad)
    held = [measure.held_bytes(m).weights for m in (unload(ours), theirs.unload())]
    assert held[0] == held[1]


# ------------------------------------------------------------------ the verbs


def test_report_counts_the_base_as_what_it_stands_for(monkeypatch):
    base = load_model("tinylm")
    size = measure.parameters(base).total
    told = inject(base, QLoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    assert told.base == size == measure.parameters(base).total - told.trainable
    assert told.trainable == 6 * 4 * (192 + 192 + 192 + 96) and len(told.modules) == 12
    quantised = [m for m in base.modules() if isinstance(m, NF4Linear)]
    assert len(quantised) == 42 and type(base.lm_head) is nn.Linear
    assert not any(p.dtype == torch.uint8 for p in base.parameters())
    monkeypatch.setattr(NF4Linear, "weight", property(lambda self: pytest.fail("restored")))
    assert repr(report(base)) == repr(told)


@pytest.mark.parametrize("build", [llama, opt])
@torch.no_grad()
def test_merging_is_refused_until_the_base_is_dequantised(build):
    model = build()
    inject(model, QLoRA(rank=4, alpha=8))
    perturb(model)
    ids = torch.arange(24).view(2, 12)
    expected = model(input_ids=ids).logits
    codes = {n: b.clone() for n, b in model.named_buffers()}
    with refused(model, "dequantize", TypeError):
        merge(model)
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers())

    assert dequantize(model) is model
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
    for verb in (merge, unmerge, merge, unload):
        verb(model)
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-4
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert set(model.state_dict()) == set(build().state_dict())
    with pytest.raises(ValueError, match="no layer in 4 bits"):
        dequantize(model)


@pytest.mark.parametrize("double_quant", [True, False])
def test_unload_gives_the_quantised_base(double_quant):
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    inject(model, QLoRA(4, 8, ("q_proj",), block=32, double_quant=double_quant))
    layer = unload(perturb(model)).model.layers[0].mlp.up_proj
    assert type(layer) is NF4Linear
    packed, absmax = quantize_nf4(weight, 32)
    if double_quant:
        absmax = dequantize_absmax(*quantize_absmax(absmax))
    assert torch.equal(layer.weight, dequantize_nf4(packed, absmax, weight.shape, 32))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_a_model_cast_before_or_after_injection_runs_dequantised_too(dtype):
    ids = torch.arange(12)[None]
    for build in (lambda: llama().to(dtype), llama):
        model = build()
        torch.manual_seed(0)
        inject(model, QLoRA(rank=4, alpha=8))
        perturb(model).to(dtype)
        with torch.inference_mode():
            expected = model(input_ids=ids).logits
            merge(dequantize(model))
        weight = model.model.layers[0].mlp.up_proj.base.weight
        assert expected.dtype == weight.dtype == dtype
        output = model(input_ids=ids, labels=ids)
        assert (output.logits - expected).abs().max() < 0.1
        unmerge(model)  # what was dequantised in inference mode trains
        model(input_ids=ids, labels=ids).loss.backward()


def test_a_header_that_was_tampered_with_is_refused(tmp_path):
    model = llama()
    inject(model, QLoRA(rank=4, alpha=8))
    file = save_adapter(model, tmp_path) / WEIGHTS
    with safe_open(file, "pt") as opened:
        header, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    good = '{"quantised_base": "nf4", "quantised_block": 64, "quantised_double": true}'
    assert header["peft_lessons_own"] == good
    for own in ("[]", "3", "{", '{"r": 2}'):
        save_file(tensors, file, header | {"peft_lessons_own": own})
        with refused(base := llama(), WEIGHTS):
            load_adapter(base, tmp_path)


def test_bases_in_4_bits_differ_by_their_codes():
    prints = []
    for scale in (1.0, -1.0):
        model = llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(scale)
        inject(model, QLoRA(rank=4, alpha=8))
        prints.append(fingerprint(unload(model)))
    assert prints[0] != prints[1]


def test_setup_qlora_trains_on_the_cpu(capsys):
    model = setup_qlora("tinylm", rank=8)
    assert "trainable params: 165,888 || all params: 3,387,840" in capsys.readouterr().out
    ids = torch.randint(1, 4096, (2, 16))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    training = [p for p in model.parameters() if p.requires_grad]
    assert training and all(p.grad is not None for p in training)
    for arguments, told in (
        (("tinylm", 0), "rank=0"),
        (("tinylm", 500), "q_proj"),
        (("minilm",), "not a causal language model"),
    ):
        with pytest.raises(ValueError, match=told):
            setup_qlora(*arguments)


# ------------------------------------------------------------------ what is refused


GOOD = torch.randn(2, 64)
REFUSED = {
    "NaN": (lambda: quantize_nf4(GOOD * float("nan")), "holds NaN, infinity or"),
    "huge": (lambda: quantize_nf4(GOOD * 1e35), "a number above 1e30"),
    "odd": (lambda: quantize_nf4(torch.ones(3)), "must hold an even number"),
    "integers": (lambda: quantize_nf4(torch.ones(64, dtype=torch.long)), "floating-point"),
    "codes": (lambda: quantize_nf4(quantize_nf4(GOOD)[0]), "is it quantised already"),
    "a list": (lambda: quantize_nf4([1.0, 2.0]), "a tensor of floating-point numbers"),
    "block 0": (lambda: quantize_nf4(GOOD, 0), "block=0 must be one of 32, 64"),
    "block 48": (lambda: dequantize_nf4(*quantize_nf4(GOOD), GOOD.shape, 48), "block=48"),
    "shape": (lambda: dequantize_nf4(*quantize_nf4(GOOD), (2, 63)), r"of shape \(2, 63\)"),
    "absmax": (lambda: dequantize_nf4(*quantize_nf4(GOOD), (2, 64), 32), "2 absmax"),
    "float codes": (lambda: dequantize_nf4(GOOD.flatten(), GOOD[0], (4, 64)), "float32 codes"),
    "code 16": (lambda: pack_nibbles(torch.tensor([16, 1]).byte()), "between 0 and 15"),
    "odd codes": (lambda: pack_nibbles(torch.tensor([1]).byte()), "an even number of uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    action, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        action()


def test_a_layer_in_4_bits_is_not_quantised_again_nor_trained():
    with pytest.raises(TypeError, match="not NF4Linear"):
        NF4Linear(NF4Linear(nn.Linear(64, 8)))
    model, method = llama(), QLoRA(rank=4, alpha=8)
    with pytest.raises(ValueError, match="trains in full"):
        inject(model, method, modules_to_save=("up_proj",))
    inject(model, method)
    unload(model)
    for again in (method, LoRA(rank=4, alpha=8, targets=("q_proj",))):
        with refused(model, "NF4Linear, in 4 bits already"):
            inject(model, again)
    theirs = load_model("tinylm", four_bit=True)
    for targets in ("all-linear", ("q_proj",)):
        with pytest.raises(ValueError, match="Linear4bit, in 4 bits already"):
            inject(theirs, LoRA(rank=4, alpha=8, targets=targets))
    for base, name in ((model, "up_proj"), (model, "mlp"), (theirs, "up_proj")):
        with pytest.raises(ValueError, match="packed 4-bit codes"):
            freeze(base, modules_to_save=(name,))


def test_a_base_that_does_not_fit_stays_as_it_was():
    model, method = tiny_llama(), QLoRA(rank=4, alpha=8, targets=("q_proj",))
    # Their kernel restores such a width wrongly.
    with refused(model, r"down_proj.*in_features=96 must be a multiple of 64"):
        inject(model, method)
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with refused(model, r"layers.1.mlp.up_proj.*NaN, infinity"):
        inject(model, method)
    with pytest.raises(ValueError, match="rank=40"):
        inject(llama(), QLoRA(rank=40, alpha=8))  # k_proj and v_proj are 32 wide
    inject(llama(), QLoRA(rank=40, alpha=8, targets=("q_proj",)))


def test_all_linear_leaves_out_what_is_tied():
    config = transformers.BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=64)
    for method in (QLoRA(rank=4, alpha=8, targets=("query",)), LoRA(rank=4, alpha=8)):
        model = transformers.BertForMaskedLM(config)
        inject(model, method)
        assert "cls.predictions.decoder" not in injection_of(model).wrappers
