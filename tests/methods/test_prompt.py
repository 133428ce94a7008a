"""Compare prompt tuning with Hugging Face PEFT, through generate, and see what it refuses.

Operations and their order are PEFT's, so on one machine everything is equal to the last bit.
What is asserted is 1e-6, so that another machine's kernels may differ.
"""

import json
from copy import deepcopy

import peft
import pytest
import torch
import transformers
from tiny import (
    GREEDY,
    MODELS,
    batch_of,
    close,
    greedy,
    positions_in,
    refused,
    rewrite,
    step_of_both,
    task_type,
    tiny_llama,
    tiny_opt,
    tiny_t5,
)
from torch import nn
from torch.nn import functional as F

from peft_lessons import (
    LoRA,
    Prompt,
    PromptTuning,
    evaluate,
    inject,
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    unload,
)
from peft_lessons.engine import CONFIG
from peft_lessons.methods.prompt import prepend, prompt_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported", "ignore:Could not save base model config"
)

P = 6
SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4)
SMALL |= dict(num_hidden_layers=1)


def theirs_on(base, name, **settings):
    config = peft.PromptTuningConfig(
        **dict(task_type=task_type(name), num_virtual_tokens=P) | settings
    )
    return peft.get_peft_model(deepcopy(base), config).eval()


def rows_of(theirs):
    return theirs.prompt_encoder["default"].embedding.weight


def prompted(base):
    """Return ours on a copy of the base, with random values as after training."""
    ours = deepcopy(base)
    inject(ours, Prompt(P))
    torch.manual_seed(7)
    with torch.no_grad():
        prompt_of(ours).prompt_embeddings.normal_()
    return ours


def pair(base, name):
    """Return (PEFT's model, ours) on copies of one base, with the same random prompt."""
    theirs, ours = theirs_on(base, name), prompted(base)
    with torch.no_grad():
        rows_of(theirs).copy_(prompt_of(ours).prompt_embeddings)
    return theirs, ours


def text_of(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


# ------------------------------------------------------------------ the module alone


def test_the_module_puts_its_rows_first_and_has_companions():
    module, x = PromptTuning(3, 4), torch.randn(2, 5, 4)
    y = module(x)
    assert y.shape == (2, 8, 4) and torch.equal(y[:, 3:], x)
    assert all(torch.equal(row, module.prompt_embeddings) for row in y[:, :3])
    mask, labels = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.arange(10).view(2, 5)
    assert module.extend_mask(mask).tolist() == [[1] * 3 + row for row in mask.tolist()]
    assert module.extend_labels(labels).tolist() == [[-100] * 3 + row for row in labels.tolist()]
    assert module.extend_mask(mask.bool()).dtype == torch.bool
    each = torch.randn(2, 3, 4)
    assert torch.equal(prepend(each, x)[:, :3], each)
    assert prepend(each, x.double()).dtype == torch.float64


def test_it_starts_from_rows_of_the_vocabulary_or_normal():
    model = tiny_llama()
    inject(model, Prompt(30))
    table = model.get_input_embeddings().weight
    before = table.clone()
    for module in (prompt_of(model), PromptTuning(30, 64, True, table)):
        found = [int((table == row).all(1).nonzero()) for row in module.prompt_embeddings]
        assert len(set(found)) == 30
        with torch.no_grad():
            module.prompt_embeddings.zero_()
    assert torch.equal(table, before), "the prompt is no view of the table"
    inject(unload(model), Prompt(100, init="normal"))
    for module in (prompt_of(model), PromptTuning(100, 64)):
        assert 0.9 < module.prompt_embeddings.std() < 1.1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(init_from_vocab=True), "vocab_embeddings .* not None"),
        (dict(init_from_vocab=True, vocab_embeddings=torch.ones(9, 5)), r"not of shape \(9, 5\)"),
        (dict(init_from_vocab=True, vocab_embeddings=torch.ones(2, 4)), "at least num_tokens=3"),
    ],
)
def test_the_module_refuses(settings, told):
    with pytest.raises(ValueError, match=told):
        PromptTuning(**dict(num_tokens=3, embed_dim=4) | settings)


# ------------------------------------------------------------------ models, against PEFT


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_logits_loss_and_gradients_equal_those_of_peft(name):
    base, batch = MODELS[name](), batch_of(name)
    theirs, ours = pair(base, name)
    close(theirs(batch["input_ids"]).logits, ours(batch["input_ids"]).logits)  # without a mask
    if name == "bert":
        batch["token_type_ids"] = torch.ones(3, 12, dtype=torch.long)
    output = step_of_both(theirs, ours, batch)
    gradient = prompt_of(ours).prompt_embeddings.grad
    close(rows_of(theirs).grad, gradient)
    assert gradient.abs().max() > 1e-4
    assert (output.logits[:, -3:] - base(**batch).logits[:, -3:]).abs().max() > 0.02
    if name == "bert":
        head = theirs.base_model.classifier.modules_to_save["default"]
        close(head.weight.grad, ours.classifier.weight.grad)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_ways_to_call_give_the_same(name):
    batch = text_of(batch_of(name))
    ours, (ids, mask) = prompted(MODELS[name]()), batch.values()
    expected = ours(**batch).logits
    for got in (
        ours(ids, mask),
        ours(inputs_embeds=ours.get_input_embeddings()(ids), attention_mask=mask),
        ours(**batch, position_ids=torch.arange(12)[None]),
        ours(ids, attention_mask=mask.bool()),
    ):
        close(got.logits, expected)


# ------------------------------------------------------------------ generate


def alone(text):
    """Return the rows of a padded batch, each without its padding."""
    return [row[mask.bool()][None] for row, mask in zip(*text.values(), strict=True)]


def test_beams_are_those_of_peft():
    theirs, ours = pair(tiny_llama(), "llama")
    beams = dict(**GREEDY, num_beams=3)
    for ids in alone(text_of(batch_of("llama"))):
        assert torch.equal(ours.generate(ids, **beams), theirs.generate(input_ids=ids, **beams))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_on_the_left_changes_no_token(name):
    """The reference is each text by itself, where ours and PEFT's write the same. In a batch PEFT
    drops the positions, and only OPT counts them anew, along the mask."""
    theirs, ours = pair(MODELS[name](), name)
    text = text_of(batch_of(name))
    right = torch.cat([ours.generate(ids, **GREEDY)[:, -8:] for ids in alone(text)])
    also = [theirs.generate(input_ids=ids, **GREEDY)[:, -8:] for ids in alone(text)]
    assert torch.equal(torch.cat(also), right)
    for use_cache in (True, False):
        assert torch.equal(greedy(ours, text, use_cache=use_cache)[:, -8:], right)
    assert torch.equal(greedy(theirs, text)[:, -8:], right) == (name == "opt")
    given = ours(**text, position_ids=positions_in(text["attention_mask"])).logits
    close(given[2, -5:], ours(alone(text)[2]).logits[0, -5:])


def test_a_static_cache_has_no_room_for_the_prompt():
    ours, text = prompted(tiny_llama()), text_of(batch_of("llama"))
    with pytest.raises(ValueError, match="attention_mask of shape .*cache_implementation='static'"):
        greedy(ours, text, cache_implementation="static")
    with pytest.raises(ValueError, match="must be a DynamicCache, which grows"):
        ids = {"input_ids": torch.randint(3, 128, (1, 7))}
        greedy(ours, ids, cache_implementation="static")


def test_a_version_of_transformers_that_renames_the_cache_is_refused():
    class Renamed(type(tiny_llama())):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None):
            raise AssertionError("never called")

    model = Renamed(tiny_llama().config)
    with refused(model, "past_key_values.*transformers>=5.20,<5.24"):
        inject(model, Prompt(P))


# ------------------------------------------------------------------ how a prompt starts


def test_a_text_start_is_pefts(tmp_path):
    """Cut off, and repeated."""
    tokenizer = load_tokenizer("tinylm")
    text = "Is this review good or bad?"
    assert 3 < len(tokenizer(text)["input_ids"]) < 12
    for tokens in (3, 12):
        base = load_model("tinylm")
        theirs = theirs_on(
            base,
            "llama",
            num_virtual_tokens=tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=tokenizer.name_or_path,
        )
        inject(base, Prompt(tokens, text, tokenizer))
        assert torch.equal(prompt_of(base).prompt_embeddings, rows_of(theirs))
    # The text is in PEFT's file too, which is no reason to refuse it.
    theirs.save_pretrained(tmp_path)
    load_adapter(unload(base), tmp_path)
    assert torch.equal(prompt_of(base).prompt_embeddings, rows_of(theirs))
    tokenizer, model = load_tokenizer("minilm"), load_model("minilm", labels=2)
    inject(model, Prompt(4, "good or bad", tokenizer))
    table = model.get_input_embeddings().weight
    assert torch.equal(prompt_of(model).prompt_embeddings[0], table[tokenizer.cls_token_id])


def test_a_model_without_a_prompt_is_refused():
    model = tiny_llama()
    inject(model, LoRA(2, 3, ("q_proj",)))
    for wrong in (model, tiny_llama()):
        with pytest.raises(ValueError, match="prompt_of: the model holds no PromptTuning"):
            prompt_of(wrong)


# ------------------------------------------------------------------ evaluation


def test_evaluate_counts_the_same_tokens_with_and_without_a_prompt():
    base, batch = tiny_llama(), batch_of("llama")
    ours, labels = prompted(base), batch["labels"].clone()
    logits = ours(**text_of(batch)).logits[:, P:-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    scores = evaluate(ours, [batch])
    assert scores.n == int((labels[:, 1:] != -100).sum()) == evaluate(base, [batch]).n
    assert scores.loss == pytest.approx(loss.item(), abs=1e-5)
    assert torch.equal(batch["labels"], labels)


# ------------------------------------------------------------------ files


def test_the_smallest_file(tmp_path):
    base = tiny_llama()
    ours = prompted(base)
    save_adapter(ours, tmp_path)
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    rewrite(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    again, batch = tiny_llama(), batch_of("llama")
    assert load_adapter(again, tmp_path).method == Prompt(P, "normal")
    assert torch.equal(again(**batch).logits, ours(**batch).logits)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    close(theirs(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(num_virtual_tokens=5), "shape"),
        (dict(num_virtual_tokens=500), "128 positions"),
        (dict(peft_type="P_TUNING"), "is not a method of the course"),
    ],
)
def test_files_that_do_not_fit(change, told, tmp_path):
    save_adapter(prompted(tiny_llama()), tmp_path)
    model = tiny_llama()
    with refused(model, told):
        load_adapter(model, rewrite(tmp_path, **change))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(tokens=0), "tokens=0 must be at least 1"),
        (dict(init="a text"), "init='a text' is neither .* needs a tokenizer"),
        (dict(init=None), "init=None must be"),
        (dict(init="a text", tokenizer="tinylm"), "tokenizer='tinylm' must be a tokenizer"),
    ],
)
def test_settings_that_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Prompt(**dict(tokens=P) | settings)


@pytest.mark.parametrize(
    ("make", "method", "told"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), Prompt(P), "has no token embeddings"),
        (tiny_t5, Prompt(P), "an encoder and a decoder"),
        (tiny_llama, Prompt(128), "128 virtual tokens and 1 of text.*128 positions"),
        (tiny_llama, Prompt(10**13), "128 positions"),  # before memory is asked for
        (tiny_llama, Prompt(4, "x", lambda t: {"input_ids": []}), r"gives the tokens \[\]"),
        (tiny_llama, Prompt(4, "x", lambda t: {"input_ids": [1, 128]}), "knows 0 to 127"),
        (tiny_llama, Prompt(4, "x", lambda t: {"input_ids": [5, -1]}), "knows 0 to 127"),
    ],
)
def test_models_that_are_refused_stay_as_they_are(make, method, told):
    model = make()
    with refused(model, told):
        inject(model, method)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_text_that_is_too_long(name):
    model = MODELS[name]()
    inject(model, Prompt(P))
    positions = model.config.max_position_embeddings
    fits = torch.randint(3, 128, (2, positions - P))
    assert model(input_ids=fits).logits.isfinite().all()
    long = torch.randint(3, 128, (2, positions - P + 1))
    told = f"6 virtual tokens and {positions - 5} of text .*max_length"
    with pytest.raises(ValueError, match=told):
        model(input_ids=long)


def test_a_generation_that_becomes_too_long():
    model = prompted(tiny_opt())
    ids = torch.randint(3, 128, (1, 50))
    options = dict(do_sample=False, pad_token_id=1)
    # The last token is not read again: 50 + 6 + 8 are 64 positions, and one more token comes out.
    assert model.generate(ids, max_new_tokens=9, min_new_tokens=9, **options).shape == (1, 59)
    with pytest.raises(ValueError, match="64 positions"):
        model.generate(ids, max_new_tokens=10, min_new_tokens=10, **options)


def test_a_classifier_that_reads_the_last_position():
    """It finds the last token by its id, and there are no ids any more: PEFT reads the padding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=2, pad_token_id=1)
    base = transformers.LlamaForSequenceClassification(config).eval()
    base.fresh_modules = ("score",)
    batch = batch_of("llama") | {"labels": torch.tensor([1, 0, 1])}  # padded on the left
    theirs, ours = pair(base, "bert")
    heads = ("original_module.weight", "modules_to_save.default.weight")
    theirs.base_model.score.load_state_dict(dict.fromkeys(heads, base.score.weight))
    a, b = theirs(**batch), ours(**batch)
    close(a.logits, b.logits)
    close(a.loss, b.loss)
    right = {k: v.flip(1) if v.dim() == 2 else v for k, v in batch.items()}
    with pytest.raises(ValueError, match="the mask ends with 0 .*pad on the left"):
        ours(**right)
    assert theirs(**right).logits.isfinite().all(), "PEFT says nothing"
    ids = torch.randint(3, 128, (2, 9))
    ours(ids)
    ids[1, 5:] = 1
    with pytest.raises(ValueError, match="the mask ends with 0 .*pad on the left"):
        ours(ids)


# ------------------------------------------------------------------ calls that went wrong silently


@pytest.mark.parametrize(("new", "holes"), [(0, True), (P, False), (P + 1, True)])
def test_a_generation_that_goes_on_from_its_cache(new, holes):
    """Given the whole text again, `generate` takes the prompt in the cache for text."""
    ours = prompted(tiny_llama())
    ids = torch.randint(3, 128, (1, 9 + new), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0 if holes else 1

    def read():
        return ours(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values

    rest = ours.generate(ids[:, 8:], attention_mask=mask, past_key_values=read(), **GREEDY)
    whole = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(rest[:, 1 + new :], whole[:, 9 + new :])
    with pytest.raises(ValueError, match="does not continue there: give the new tokens only"):
        ours.generate(ids, attention_mask=mask, past_key_values=read(), **GREEDY)


def test_a_cache_without_the_prompt_is_refused():
    base, ids = tiny_llama(), batch_of("llama")["input_ids"]
    foreign, ours = base(ids, use_cache=True).past_key_values, prompted(base)
    for mask in (torch.ones(3, 13).long(), None):
        with pytest.raises(ValueError, match="was filled without the virtual tokens"):
            ours(ids[:, :1], attention_mask=mask, past_key_values=foreign)
    with torch.no_grad():  # a tuple marks its cache too
        _, own = ours(ids, use_cache=True, return_dict=False)
    assert ours(ids[:, :1], past_key_values=own).logits.shape == (3, 1, 128)


def test_places_in_the_text_move_with_it():
    torch.manual_seed(0)
    ours = transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)).eval()
    inject(ours, Prompt(P))
    ids, start, end = torch.randint(3, 128, (2, 9)), torch.tensor([1, 2]), torch.tensor([4, 8])
    got = ours(ids, start_positions=start, end_positions=end)
    losses = [(got.start_logits, start), (got.end_logits, end)]
    close(got.loss, sum(F.cross_entropy(logits, at + P) for logits, at in losses) / 2)
    ours = prompted(tiny_llama())
    for keep in (torch.tensor([0, 3]), torch.tensor([-1, -2])):
        close(ours(ids, logits_to_keep=keep).logits, ours(ids).logits[:, P:][:, keep])


def test_as_many_labels_as_tokens_are_not_taken_for_labels_of_tokens():
    several = dict(num_labels=9, problem_type="multi_label_classification")
    ours = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **several))
    inject(ours, Prompt(P))
    assert ours(torch.randint(3, 128, (2, 9)), labels=torch.ones(2, 9)).loss.isfinite()


def test_the_positions_of_roberta_begin_after_its_padding():
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=64)
    ours = transformers.RobertaForSequenceClassification(config).eval()
    inject(ours, Prompt(P))
    ids = torch.randint(3, 128, (1, 62 - P + 1))
    assert ours(ids[:, 1:]).logits.isfinite().all()
    with pytest.raises(ValueError, match="more than the model's 62 positions"):
        ours(ids)


def test_calls_that_are_refused_with_a_reason():
    ours = prompted(tiny_llama())
    for wrong in ({}, dict(input_ids=torch.ones(3).long()), dict(inputs_embeds=torch.ones(2, 64))):
        with pytest.raises(ValueError, match="must be input_ids of shape"):
            ours(**wrong)
    with pytest.raises(ValueError, match="attention_mask.* is not a tensor"):
        ours(torch.ones(1, 3).long(), attention_mask=[[1, 1, 1]])
