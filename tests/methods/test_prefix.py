"""Compare prefix tuning with Hugging Face PEFT and with its formula; see what it refuses."""

from copy import deepcopy

import peft
import pytest
import torch
import transformers
from tiny import (
    GREEDY,
    MODELS,
    batch_of,
    by_hand,
    close,
    greedy,
    positions_in,
    refused,
    rewrite,
    step_of_both,
    task_of,
    task_type,
    tiny_llama,
    tiny_t5,
)
from torch import nn

from peft_lessons import Prefix, PrefixTuning, fit, inject, load_adapter, report, save_adapter
from peft_lessons.engine import injection_of
from peft_lessons.methods.prefix import bake_reparameterization, init_prefix

P = 5


def pair(name, projection=None):
    """Return (PEFT's model, ours) on copies of one base, with the same values."""
    base = MODELS[name]()
    torch.manual_seed(7)
    ours = deepcopy(base)
    inject(ours, Prefix(P, projection))
    settings = dict(prefix_projection=projection is not None, encoder_hidden_size=projection)
    config = peft.PrefixTuningConfig(task_type=task_type(name), num_virtual_tokens=P, **settings)
    theirs = peft.get_peft_model(deepcopy(base), config).eval()
    with torch.no_grad():
        mine = injection_of(ours).attached.parameters()
        for a, b in zip(encoder_of(theirs), mine, strict=True):
            a.copy_(b)
    return theirs, ours


def encoder_of(theirs):
    encoder = theirs.prompt_encoder["default"]
    return [encoder.embedding.weight, *getattr(encoder, "transform", nn.Identity()).parameters()]


# ------------------------------------------------------------------ equal to PEFT


@pytest.mark.parametrize(("name", "projection"), [("llama", None), ("opt", 24), ("bert", 24)])
def test_logits_loss_and_gradients_equal_those_of_peft(name, projection):
    theirs, ours = pair(name, projection)
    batch = batch_of(name)
    output = step_of_both(theirs, ours, batch)
    for p, q in zip(injection_of(ours).attached.parameters(), encoder_of(theirs), strict=True):
        assert q.grad.any()
        close(p.grad, q.grad)
    if name == "bert":
        head = theirs.base_model.classifier.modules_to_save["default"]
        close(ours.classifier.weight.grad, head.weight.grad)
    assert (output.logits - MODELS[name]()(**batch).logits).abs().max() > 0.01


def test_without_a_mask_and_with_given_positions():
    theirs, ours = pair("llama")
    ids = batch_of("llama")["input_ids"]
    close(ours(ids).logits, theirs(ids).logits)
    close(ours(ids).logits, ours(ids, torch.ones_like(ids)).logits)  # a mask that is positional
    positions = torch.arange(12).expand(3, -1) * 2
    a = ours(input_ids=ids, position_ids=positions).logits
    close(a, theirs(input_ids=ids, position_ids=positions).logits)
    assert (a - ours(ids).logits).abs().max() > 1e-3
    embeds = ours.get_input_embeddings()(ids)
    close(ours(inputs_embeds=embeds).logits, ours(ids).logits)


def test_beams_and_a_text_that_goes_on_from_its_cache():
    theirs, ours = pair("llama")
    ids = batch_of("llama")["input_ids"]
    beams = dict(**GREEDY, num_beams=3)
    assert torch.equal(ours.generate(ids, **beams), theirs.generate(input_ids=ids, **beams))
    first = ours(ids[:, :7], use_cache=True)
    rest = ours(ids[:, 7:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], 1), ours(ids).logits)
    assert rest.past_key_values.get_seq_length() == P + 12
    assert ours(ids, use_cache=False).past_key_values is None


# ------------------------------------------------------------------ what a prefix is


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_prefix_can_start_as_a_text_that_was_read(name):
    base, ids = MODELS[name](), batch_of(name)["input_ids"]
    context, text = ids[:1, :P], ids[:1, P:]
    read = base(context, use_cache=True).past_key_values
    pairs = [(layer.keys[0], layer.values[0]) for layer in read.layers]
    ours = deepcopy(base)
    inject(ours, Prefix(P))
    init_prefix(ours, pairs)
    whole = base(torch.cat([context, text], 1)).logits[:, P:]
    close(ours(text).logits, whole)
    got = ours.generate(text, **GREEDY)[:, text.shape[1] :]
    assert torch.equal(got, base.generate(torch.cat([context, text], 1), **GREEDY)[:, 12:])


def test_the_class_by_itself():
    prefix = PrefixTuning(3, 2, 8, prefix_length=4, hidden_size=32)
    keys, values = prefix(batch_size=5)
    assert keys.shape == values.shape == (3, 5, 2, 4, 8)
    assert torch.equal(keys[:, 0], keys[:, 4]) and not torch.equal(keys, values)
    start = PrefixTuning(2, 2, 16, prefix_length=50).embedding
    assert 0.95 < start.std() < 1.05  # as in PEFT
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert size(prefix) == 4 * 32 + 32 * 33 + 33 * 3 * 2 * 2 * 8
    with torch.device("meta"):
        seven = PrefixTuning(32, 32, 128, prefix_length=10, hidden_size=512)
        plain = PrefixTuning(32, 32, 128, prefix_length=10, hidden_size=None)
    assert size(seven) == 134_747_648 and size(plain) == 2_621_440
    assert seven(2)[0].is_meta


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropping_the_mlp_changes_nothing_but_the_count(name):
    theirs, ours = pair(name, 24)
    n_kv, head = (4, 2 * 64 + 2) if name == "bert" else (2, 0)
    t = n_kv * 16
    assert report(ours).trainable - head == P * t + t * 24 + 24 + 24 * 4 * t + 4 * t
    assert report(ours).trainable == theirs.get_nb_trainable_parameters()[0]
    batch = batch_of(name)
    before = ours(**batch).logits
    bake_reparameterization(ours)
    close(ours(**batch).logits, before)
    assert report(ours).trainable - head == P * 2 * 2 * t
    embedding = injection_of(ours).attached.embedding
    bake_reparameterization(ours)
    assert injection_of(ours).attached.embedding is embedding
    fit(ours, task_of(name), 2, show=False)


# ------------------------------------------------------------------ files


def test_files_that_do_not_fit_are_refused(tmp_path):
    _, ours = pair("llama")
    save_adapter(ours, tmp_path)
    for other in (tiny_llama(num_key_value_heads=4), tiny_llama(num_hidden_layers=1)):
        with refused(other, "has shape"):
            load_adapter(other, tmp_path, check_base=False)
    rewrite(tmp_path, lambda tensors: tensors.update(prompt=tensors.pop("prompt_embeddings")))
    with refused(other, "misses 'prompt_embeddings'"):
        load_adapter(other, tmp_path, check_base=False)


# ------------------------------------------------------------------ refused


def distilbert():
    sizes = dict(vocab_size=64, dim=32, hidden_dim=48, n_heads=2, n_layers=1)
    return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))


def windowed():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, **heads))


class Renamed(nn.Module):
    """Behave as a model of transformers from 5.24 on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input_ids=None, cache=None, past_key_values=None):
        return self.layer(input_ids)


REFUSED = [
    (distilbert, Prefix(3), "DistilBertModel takes no past_key_values.*take Prompt"),
    (tiny_t5, Prefix(3), "has an encoder and a decoder"),
    (windowed, Prefix(3), "would forget the prefix"),
    (Renamed, Prefix(3), "from 5.24 on does"),
    (tiny_llama, Prefix(128), "virtual tokens and 1 of text are more than the model"),
]


@pytest.mark.parametrize(("make", "method", "told"), REFUSED)
def test_models_that_cannot_hold_a_prefix_are_refused_and_left_alone(make, method, told):
    model = make()
    with refused(model, told):
        inject(model, method)


def test_prefix_and_text_together_must_fit_the_positions():
    _, ours = pair("llama")
    ids = torch.randint(3, 128, (1, ours.config.max_position_embeddings - P + 1))
    ours(ids[:, 1:])
    for call in (lambda: ours(ids), lambda: ours.generate(ids[:, 3:], **GREEDY)):
        with pytest.raises(ValueError, match="virtual tokens and .* of text are more"):
            call()


def test_calls_that_would_read_no_prefix_or_a_wrong_one():
    base = tiny_llama()
    ids = batch_of("llama")["input_ids"]
    foreign = base(ids, use_cache=True).past_key_values
    inject(base, Prefix(P))
    with pytest.raises(ValueError, match="was filled without the virtual tokens"):
        base(ids[:, :1], past_key_values=foreign)
    with pytest.raises(ValueError, match="past_key_values='StaticCache' must be a DynamicCache"):
        base.generate(ids, **GREEDY, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 1, 12, 12\) cannot be"):
        base(ids, attention_mask=torch.zeros(3, 1, 12, 12))
    base.gradient_checkpointing_enable()
    base.train()
    with pytest.raises(ValueError, match="gradient checkpointing switches the cache off"):
        base(ids)
    base.gradient_checkpointing_disable()
    base(ids)


def test_drop_mlp_and_start_prefix_refuse():
    base = tiny_llama()
    pairs = [(torch.zeros(2, P, 16), torch.zeros(2, P, 16))] * 2
    with pytest.raises(ValueError, match="bake_reparameterization: .* no PrefixTuning"):
        bake_reparameterization(base)
    with pytest.raises(ValueError, match="init_prefix: the model holds no PrefixTuning"):
        init_prefix(base, pairs)
    inject(base, Prefix(P, 8))
    with refused(base, r"init_prefix: an MLP .* bake_reparameterization"):
        init_prefix(base, pairs)
    bake_reparameterization(base)
    for wrong in (pairs[:1], [(k[:, :2], v[:, :2]) for k, v in pairs]):
        with refused(base, "pairs of shape .* another size than the prefix"):
            init_prefix(base, wrong)


# ------------------------------------------------------------------ calls that went wrong


def test_a_generation_that_goes_on_from_its_cache():
    """Given the whole text again, `generate` takes the prefix in the cache for text."""
    _, ours = pair("llama")
    new = P + 1
    ids = torch.randint(3, 128, (1, 9 + new), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    first = dict(attention_mask=mask[:, :8], position_ids=positions_in(mask)[:, :8])

    def read():
        return ours(ids[:, :8], **first, use_cache=True).past_key_values

    rest = ours.generate(ids[:, 8:], attention_mask=mask, past_key_values=read(), **GREEDY)
    whole = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(rest[:, 1 + new :], whole[:, 9 + new :])
    with pytest.raises(ValueError, match="does not continue there: give the new tokens only"):
        ours.generate(ids, attention_mask=mask, past_key_values=read(), **GREEDY)


SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(("new", "multi"), [(True, False), (False, True)])
def test_the_few_keys_of_falcon(new, multi):
    kv = dict(num_kv_heads=2 if new else None, multi_query=multi)
    settings = dict(**kv, new_decoder_architecture=new, alibi=False)
    ours = transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, **settings)).eval()
    inject(ours, Prefix(P))
    # Rows of equal length: from a padding token `generate` would tell a mask.
    ids = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(5))
    assert torch.equal(by_hand(ours, {"input_ids": ids}), greedy(ours, {"input_ids": ids}))
    kinds = [type(v) for v in ours(ids, use_cache=False, return_dict=False)]
    assert kinds == [torch.Tensor], "no cache is handed on in a tuple"


def test_latent_attention_is_refused():
    ranks = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)
    experts = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    config = transformers.DeepseekV3Config(
        **SMALL, **ranks, **experts, v_head_dim=8, first_k_dense_replace=2
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    with refused(model, "keys and values of different widths"):
        inject(model, Prefix(P))
