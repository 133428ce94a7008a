"""Export to GGUF: what the file holds, what llama.cpp computes of it, and what is refused."""

import json
import shutil
from copy import deepcopy

import gguf
import numpy as np
import pytest
import torch
from exported import SERVER, adapted
from tiny import assistant_tokenizer, contents, lora_config, rewrite, tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from peft_lessons import IA3, DoRA, LoRA, Prompt, load_model, load_tokenizer, merge, save_adapter
from peft_lessons.deploy import KINDS, adapter_to_gguf, rounded, serve, to_gguf
from peft_lessons.deploy.export import BASE
from peft_lessons.deploy.header import read_header
from peft_lessons.testing.tiny import perturb

TEXT = "It's 1984, and the  harbour was quiet:\n\tnaïve café 12,345 — 東京 🙂 don't<eos>"


@torch.no_grad()
def gap(server, model, ids, adapter=None):
    """Return the largest difference between the server's log-probabilities and the model's."""
    ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    theirs = server.logprobs(ids, adapter, top=len(ours), chat=False)
    assert len(theirs) == len(ours)
    return max(abs(ours[number].item() - value) for number, value in theirs.items())


def side_by_side(weight, heads):
    """Return the rows of a query or key projection in GGUF's order, row by row."""
    half = len(weight) // heads // 2
    rows = [
        weight[head * 2 * half + part * half + pair]
        for head in range(heads)
        for pair in range(half)
        for part in range(2)
    ]
    return torch.stack(rows)


def q8_0(block):
    """Round 32 numbers to whole multiples of a step, from -127 to 127 (ggml-quants.c)."""
    step = np.abs(block).max() / np.float32(127)
    inverse = np.float32(1) / step if step else np.float32(0)
    codes = [np.floor(abs(x * inverse) + 0.5) * np.sign(x) for x in block]
    return np.array(codes, np.float32) * np.float32(np.float16(step))


def q4_0(block):
    """Round 32 numbers to 16 points, of which the largest number is the first (ggml-quants.c)."""
    step = block[np.abs(block).argmax()] / np.float32(-8)
    inverse = np.float32(1) / step if step else np.float32(0)
    codes = [min(15, int(x * inverse + np.float32(8.5))) - 8 for x in block]
    return np.array(codes, np.float32) * np.float32(np.float16(step))


def by_blocks(weight, rule):
    rows = weight.detach().float().numpy().reshape(-1, 32)
    return torch.tensor(np.stack([rule(row) for row in rows])).reshape(weight.shape)


def tensors_of(file):
    """Return {name: (values, kind)} of a file, as the package gguf reads it."""
    return {
        tensor.name: (
            torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)),
            tensor.tensor_type.name,
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


# ------------------------------------------------------------------ what the file holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_f32_holds_every_weight_bit_for_bit(base, tokenizer, tmp_path, dtype):
    model = deepcopy(base).to(dtype)
    held = tensors_of(to_gguf(model, tmp_path / "m.gguf", "F32", tokenizer))
    assert {kind for _, kind in held.values()} == {"F32"}
    layer = model.model.layers[1]
    heads = {"attn_q": (layer.self_attn.q_proj, 4), "attn_k": (layer.self_attn.k_proj, 2)}
    for name, (module, n) in heads.items():
        due = side_by_side(module.weight, n).float()
        assert torch.equal(held[f"blk.1.{name}.weight"][0], due)
    plain = {
        "token_embd": model.model.embed_tokens,
        "output": model.lm_head,
        "output_norm": model.model.norm,
        "blk.1.attn_v": layer.self_attn.v_proj,
        "blk.1.attn_output": layer.self_attn.o_proj,
        "blk.1.attn_norm": layer.input_layernorm,
        "blk.1.ffn_norm": layer.post_attention_layernorm,
        "blk.1.ffn_gate": layer.mlp.gate_proj,
        "blk.1.ffn_up": layer.mlp.up_proj,
        "blk.1.ffn_down": layer.mlp.down_proj,
    }
    for name, module in plain.items():
        assert torch.equal(held[f"{name}.weight"][0], module.weight.float()), name
    assert len(held) == 3 + 9 * 2


@pytest.mark.parametrize(("kind", "rule"), [("Q8_0", q8_0), ("Q4_0", q4_0)])
def test_quantised_files_follow_llama_cpps_rules(base, tokenizer, tmp_path, kind, rule):
    held = tensors_of(to_gguf(base, tmp_path / "m.gguf", kind, tokenizer))
    weight = base.model.layers[0].mlp.down_proj.weight
    assert held["blk.0.ffn_down.weight"][1] == kind
    assert torch.equal(held["blk.0.ffn_down.weight"][0], by_blocks(weight, rule))
    assert torch.equal(held["blk.0.ffn_down.weight"][0], rounded(weight, kind))
    for name in ("token_embd", "output"):
        assert held[f"{name}.weight"][1] == "Q8_0"
    assert held["blk.0.attn_norm.weight"][1] == "F32"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_smaller_and_named_in_the_header(base, tokenizer, tmp_path, kind):
    file = to_gguf(base, tmp_path / "m.gguf", kind, tokenizer)
    header = read_header(file)
    named = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    assert header.fields["general.file_type"] == named
    assert header.shapes["blk.0.attn_k.weight"] == (32, 64)
    assert {kind for _, kind in tensors_of(file).values()} == {
        *(["F32"] if kind == "F32" else ["F32", kind]),
        *(["Q8_0"] if kind[:2] in ("Q4", "Q5") else []),
    }


def test_a_tied_head_is_not_written_twice(tokenizer, tmp_path):
    model = tiny_llama(vocab_size=4096, tie_word_embeddings=True)
    held = read_header(to_gguf(model, tmp_path / "m.gguf", "F16", tokenizer)).shapes
    assert "output.weight" not in held and held["token_embd.weight"] == (4096, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_rounded_to_the_grid_and_stays_there(kind, dtype):
    weight = torch.nn.Parameter(torch.randn(2, 3, 64).to(dtype))
    back = rounded(weight, kind)
    assert back.shape == weight.shape and back.dtype == dtype and not back.requires_grad
    bits = {"F32": 24, "F16": 11, "Q8_0": 7, "Q5_0": 4, "Q4_1": 3.8, "Q4_0": 3}[kind]
    assert (back - weight).abs().max() <= 1.1 * weight.abs().max() * 2 ** -min(bits, 8)
    if kind == "F32":
        back += 1
        assert not torch.equal(back, weight), "it is a copy"
    elif dtype == torch.float32:
        # Up to the last bit of the scale, which is computed anew.
        assert (rounded(back, kind) - back).abs().max() <= 2e-3 * weight.abs().max()


# ------------------------------------------------------------------ what llama.cpp computes


@SERVER
@pytest.mark.parametrize("method", [None, LoRA(rank=4, alpha=8), DoRA(rank=4, alpha=8)])
def test_a_merged_model_computes_as_in_transformers(base, tokenizer, tmp_path, method):
    model = adapted(base, method) if method else base
    if method:
        merge(model)
    with serve(to_gguf(model, tmp_path / "m.gguf", "F32", tokenizer)) as server:
        ids = server.tokens(TEXT, chat=False)
        assert ids == tokenizer(TEXT)["input_ids"]
        assert gap(server, model, ids) < 5e-3
        assert not method or gap(server, base, ids) > 0.1, "the change is large enough to see"


def test_what_peft_has_merged_is_a_plain_model(base, tokenizer, tmp_path):
    from peft import get_peft_model

    theirs = perturb(get_peft_model(deepcopy(base), lora_config(LoRA(rank=2, targets=("q_proj",)))))
    merged = theirs.merge_and_unload()
    held = tensors_of(to_gguf(merged, tmp_path / "m.gguf", "F32", tokenizer))
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(held["blk.0.attn_q.weight"][0], side_by_side(weight, 4))
    assert not torch.equal(weight, base.model.layers[0].self_attn.q_proj.weight)


@SERVER
def test_tied_models_from_a_folder_compute_as_in_transformers(tokenizer, tmp_path):
    model = tiny_llama(vocab_size=4096, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    with serve(to_gguf(tmp_path / "checkpoint", tmp_path / "m.gguf")) as server:
        messages = [{"role": "user", "content": TEXT}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert server.tokens(messages) == server.tokens(TEXT) == wanted
        assert gap(server, model, wanted) < 5e-3


@SERVER
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("by", ["peft", "course"])
def test_an_adapter_computes_as_in_transformers(base, base_file, tmp_path, by, rslora):
    from peft import PeftModel, get_peft_model

    torch.manual_seed(3)
    method = LoRA(rank=4, alpha=8, rslora=rslora)
    if by == "course":
        save_adapter(adapted(base, method), tmp_path / "adapter")
    else:
        theirs = get_peft_model(deepcopy(base), lora_config(method, "CAUSAL_LM"))
        perturb(theirs).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(deepcopy(base), tmp_path / "adapter").eval()
    right = adapter_to_gguf(tmp_path / "adapter", tmp_path / "right.gguf", base=base)
    # As if there were one head with its two halves side by side already.
    wrong = tmp_path / "wrong.gguf"
    write_unpermuted(right, wrong)
    with serve(base_file, {"right": right, "wrong": wrong}) as server:
        ids = server.tokens(TEXT, chat=False)
        assert gap(server, model, ids, "right") < 1e-2
        assert gap(server, base, ids) < 5e-3 < 0.1 < gap(server, base, ids, "right")
        assert gap(server, model, ids, "wrong") > 0.1


def write_unpermuted(file, other):
    """Write an adapter's file again with the rows of q and k as transformers orders them."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    for key in (gguf.Keys.Adapter.TYPE, BASE):
        if field := reader.get_field(key):
            writer.add_string(key, field.contents())
    alpha = gguf.Keys.Adapter.LORA_ALPHA
    writer.add_float32(alpha, reader.get_field(alpha).contents())
    for tensor in reader.tensors:
        values = torch.tensor(tensor.data)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[2])
        if heads and tensor.name.endswith("lora_b"):
            order = side_by_side(torch.arange(len(values)), heads)
            values = values[order.argsort()]
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@SERVER
def test_a_tokenizer_without_digits_of_their_own_keeps_its_ids(base, tmp_path):
    def pairs(spec):  # the last word gives its place to "12"
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        vocab["12"] = vocab.pop("".join(merges.pop()))
        merges.append(["1", "2"])

    apart = changed_tokenizer(pairs)
    together = changed_tokenizer(pairs)
    together.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert apart("1234")["input_ids"] != together("1234")["input_ids"]
    for tokenizer in (apart, together):
        with serve(to_gguf(base, tmp_path / "m.gguf", "F32", tokenizer)) as server:
            for text in ("1234", TEXT):
                assert server.tokens(text, chat=False) == tokenizer(text)["input_ids"]


@SERVER
@pytest.mark.assistant
def test_the_assistants_prompts_have_the_ids_of_transformers(tmp_path):
    tokenizer, model = assistant_tokenizer(), tiny_llama(vocab_size=49_152)
    with serve(to_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)) as server:
        for text in (TEXT, "<|im_end|> <|endoftext|>", "  1,000\n\n\n2026-12-01 ", "ﬁ ½ Ⅻ ١٢٣ x²"):
            messages = [{"role": "user", "content": text}]
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            assert server.tokens(text) == found["input_ids"], text
            assert server.tokens(text, chat=False) == tokenizer(text)["input_ids"], text
        told = [{"role": "system", "content": "Be brief."}, *messages]
        found = tokenizer.apply_chat_template(told, add_generation_prompt=True)
        assert server.tokens(told) == found["input_ids"]


# ------------------------------------------------------------------ what is refused


def refused(folder, message, act, error=ValueError):
    """The act is refused in these words, and leaves no file in the folder."""
    before = contents(folder)
    with pytest.raises(error, match=message):
        act()
    assert contents(folder) == before


def odd_llama(**changes):
    return tiny_llama(vocab_size=4096, **changes)


def peft_model():
    from peft import get_peft_model

    return get_peft_model(odd_llama(), lora_config(LoRA(rank=2, targets=("q_proj",))))


def with_value(value, dtype=torch.float32):
    model = odd_llama().to(dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (odd_llama, "Q4_K_M", r"kind='Q4_K_M' is unknown: choose one of F32, F16"),
        (lambda: adapted(odd_llama()), "F16", r"unmerged LoRA: merge\(model\) first"),
        (lambda: adapted(odd_llama(), Prompt(2)), "F16", "unmerged Prompt"),
        (peft_model, "F16", r"model\.merge_and_unload\(\)"),
        (lambda: odd_llama(attention_bias=True), "F16", "biases in its layers"),
        (lambda: odd_llama(hidden_act="gelu"), "F16", "hidden_act='gelu'"),
        (
            lambda: odd_llama(
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
            "F16",
            "rope_type='linear'",
        ),
        (lambda: odd_llama(intermediate_size=80), "Q8_0", "80 numbers, and Q8_0 stores blocks"),
        (lambda: with_value(float("nan")), "F32", "NaN or infinity"),
        (lambda: with_value(1e6), "F16", r"1e\+06, too large for F16: choose kind='F32'"),
        (lambda: odd_llama().to("meta"), "F16", "meta device"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(make, kind, message, tokenizer, tmp_path):
    model = make()
    refused(tmp_path, message, lambda: to_gguf(model, tmp_path / "m.gguf", kind, tokenizer))


def test_a_model_in_four_bits_is_refused(tokenizer, tmp_path):
    model = odd_llama()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(96, 32, dtype=torch.uint8), requires_grad=False
    )
    remedy = r"torch\.uint8 codes, it is quantised: load the model with dtype=torch\.bfloat16"
    refused(tmp_path, remedy, lambda: to_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer))
    model = odd_llama()
    model.config.quantization_config = {"load_in_4bit": True}
    remedy = "weights are quantised. Load the same model with"
    refused(tmp_path, remedy, lambda: to_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer))


def test_another_architecture_is_refused(tokenizer, tmp_path):
    from tiny import tiny_opt, tiny_qwen2

    file = tmp_path / "m.gguf"
    for model in (tiny_qwen2(), tiny_opt(), LlamaForSequenceClassification(odd_llama().config)):
        message = f"model is a {type(model).__name__}, and only LlamaForCausalLM"
        refused(tmp_path, message, lambda m=model: to_gguf(m, file, tokenizer=tokenizer), TypeError)
    refused(tmp_path, "model_type='bert'", lambda: to_gguf("minilm", file))
    refused(tmp_path, "there is no model 'tinyllm'", lambda: to_gguf("tinyllm", file))
    refused(tmp_path, "name must be a string", lambda: to_gguf(3, file), TypeError)


def test_a_place_that_is_none_is_refused(base, tokenizer, tmp_path):
    def write(file):
        return lambda: to_gguf(base, file, tokenizer=tokenizer)

    missing = r"lies in a folder that does not exist; make .*nowhere first"
    refused(tmp_path, missing, write(tmp_path / "nowhere" / "m.gguf"), FileNotFoundError)
    refused(tmp_path, "is a folder; name a file in it", write(tmp_path))
    refused(tmp_path, "has no name, by which", lambda: to_gguf(base, tmp_path / "m.gguf"))


def changed_tokenizer(change):
    tokenizer = load_tokenizer("tinylm")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(normalizer={"type": "NFC"}), "not a byte-level BPE as GPT-2's"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "not a b"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "not a"),
        (lambda s: s["model"].update(ignore_merges=True), "not a byte-level BPE"),
        (lambda s: s["model"]["vocab"].update({"one more": 4096}), "ids up to 4096"),
        (
            lambda s: s["post_processor"].update(
                single=[{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": END}],
                special_tokens={"<eos>": {"id": "<eos>", "ids": [0, 0], "tokens": ["<eos>"] * 2}},
            ),
            r"adds the ids \[0, 0\]",
        ),
    ],
)
def test_a_tokenizer_with_other_ids_is_refused(change, message, base, tmp_path):
    tokenizer = changed_tokenizer(change)
    refused(tmp_path, message, lambda: to_gguf(base, tmp_path / "m.gguf", tokenizer=tokenizer))


def test_no_tokenizer_and_one_of_another_kind_are_refused(base, tmp_path):
    # An encoder's word pieces are no BPE at all.
    other = load_tokenizer("minilm")
    refused(tmp_path, "not a byte-level", lambda: to_gguf(base, tmp_path / "m", tokenizer=other))
    refused(
        tmp_path,
        "tokenizer is a str",
        lambda: to_gguf(base, tmp_path / "m.gguf", tokenizer="smollm2"),
        TypeError,
    )


END = {"id": "<eos>", "type_id": 0}


def drop(tensors):
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]


def rename(tensors):
    value = tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = value


def whole(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(4096, 64)


@pytest.mark.parametrize(
    ("entries", "change", "message"),
    [
        ({"use_dora": True}, None, "use_dora=True .* DoRA's magnitudes .* merge"),
        ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save=\['lm_head'\].*merge\(model\)"),
        ({"bias": "all"}, None, "bias='all'"),
        ({"lora_bias": True}, None, "lora_bias=True"),
        ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, None, "alpha_pattern="),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, None, "peft_type='IA3' .* adapters of LoRA only"),
        ({"r": 0}, None, "r=0 in adapter_config.json must be positive"),
        ({"lora_alpha": ...}, None, "lora_alpha=None"),
        ({}, drop, "holds lora_B of 'model.layers.0.mlp.up_proj' alone"),
        ({}, rename, "'model.layers.7.mlp.up_proj' is no layer of it"),
        ({}, whole, "'base_model.model.lm_head.weight' is no LoRA factor"),
        ({"r": 2}, None, r"has shape \(4, \d+\), not \(2, |\(\d+, 4\), not \(\d+, 2\)"),
    ],
)
def test_an_adapter_that_gguf_cannot_hold_is_refused(
    entries, change, message, base, saved, tmp_path
):
    folder = rewrite(shutil.copytree(saved, tmp_path / "adapter"), change, **entries)
    file = tmp_path / "a.gguf"
    refused(tmp_path, message, lambda: adapter_to_gguf(folder, file, base))


def test_an_adapter_without_its_base_or_files_is_refused(base, saved, tmp_path):
    file = tmp_path / "a.gguf"
    refused(tmp_path, "names no base.*pass base=", lambda: adapter_to_gguf(saved, file))
    refused(tmp_path, "does not fit the base", lambda: adapter_to_gguf(saved, file, base="tinylm"))
    refused(tmp_path, "model_type='bert'", lambda: adapter_to_gguf(saved, file, base="minilm"))
    missing = tmp_path / "missing"
    refused(tmp_path, "holds no", lambda: adapter_to_gguf(missing, file, base), FileNotFoundError)
    nowhere = tmp_path / "nowhere" / "a.gguf"
    refused(tmp_path, "make", lambda: adapter_to_gguf(saved, nowhere, base), FileNotFoundError)


def test_other_methods_of_the_course_are_refused(base, tmp_path):
    for method in (DoRA(rank=2, alpha=4), IA3(("k_proj", "down_proj"), ("down_proj",))):
        folder = save_adapter(adapted(base, method), tmp_path / type(method).__name__)
        with pytest.raises(ValueError, match="use_dora=True|peft_type='IA3'"):
            adapter_to_gguf(folder, tmp_path / "a.gguf", base)
    assert not [*tmp_path.glob("*gguf*")]


def test_the_base_is_found_by_the_name_in_the_config(tmp_path):
    model = load_model("tinylm")
    folder = save_adapter(adapted(model), tmp_path / "adapter")
    file = adapter_to_gguf(folder, tmp_path / "a.gguf")
    base = to_gguf(model, tmp_path / "base.gguf")
    assert read_header(file).fields[BASE] == read_header(base).fields[BASE]
    assert read_header(base).shapes["blk.5.attn_k.weight"] == (96, 192)


@pytest.mark.parametrize(
    ("weight", "kind", "message", "error"),
    [
        (torch.zeros(2, 32), "Q4_K", "kind='Q4_K' is unknown", ValueError),
        (torch.zeros(2, 48), "Q4_0", "rows have 48 numbers", ValueError),
        (torch.zeros(2, 32, dtype=torch.uint8), "Q4_0", "uint8 codes", ValueError),
        (torch.full((2, 32), torch.inf), "Q4_0", "NaN or infinity", ValueError),
        ([[1.0] * 32], "Q4_0", "must be a tensor", TypeError),
        (torch.tensor(1.0), "F16", "must be a tensor with rows", TypeError),
    ],
)
def test_a_tensor_that_has_no_place_on_the_grid_is_refused(weight, kind, message, error):
    with pytest.raises(error, match=message):
        rounded(weight, kind)


# ------------------------------------------------------------------ nothing half


@pytest.mark.parametrize("broken", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_the_old_file(
    broken, base, saved, tokenizer, tmp_path, monkeypatch
):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"old")

    def breaks(writer):
        writer.fout[0].write(b"half")
        raise broken

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", breaks)
    for write in (
        lambda: to_gguf(base, file, tokenizer=tokenizer),
        lambda: adapter_to_gguf(saved, file, base),
    ):
        with pytest.raises(type(broken) if isinstance(broken, OSError) else broken):
            write()
        assert contents(tmp_path) == {"m.gguf": b"old"}


def test_a_second_export_replaces_the_first(base, tokenizer, tmp_path):
    first = to_gguf(base, tmp_path / "m.gguf", "F32", tokenizer).stat().st_size
    assert to_gguf(base, tmp_path / "m.gguf", "Q4_0", tokenizer).stat().st_size < first / 3
    assert [*contents(tmp_path)] == ["m.gguf"]
