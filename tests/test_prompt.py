"""Prompt tuning against Hugging Face PEFT on four models, through generate, its files both ways,
and what it refuses.

Operations and their order are PEFT's, so on one machine everything is equal to the last bit.
What is asserted is 1e-6, so that another machine's kernels may differ.
"""

import json
from copy import deepcopy

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    CAUSAL,
    EACH,
    GREEDY,
    MODELS,
    TinyText,
    batch_of,
    by_hand,
    close,
    greedy,
    refused,
    rewrite,
    same,
    same_adapter,
    state,
    step_of_both,
    task_of,
    task_type,
    tiny_bert,
    tiny_llama,
    tiny_opt,
)
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_lessons import (
    LoRA,
    Prompt,
    PromptTuning,
    evaluate,
    fit,
    inject,
    load_adapter,
    load_model,
    load_tokenizer,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of
from peft_lessons.methods.prompt import PromptHook, lengthen, prepend, prompt_of, prompts_for_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported",
    "ignore:Could not save base model config",
)

P = 6


def theirs_on(base, name, **settings):
    config = peft.PromptTuningConfig(
        **dict(task_type=task_type(name), num_virtual_tokens=P) | settings
    )
    return peft.get_peft_model(deepcopy(base), config).eval()


def rows_of(theirs):
    return theirs.prompt_encoder["default"].embedding.weight


def prompted(base, seed=7):
    """Ours on a copy of the base, with random values as after training."""
    ours = deepcopy(base)
    inject(ours, Prompt(P))
    torch.manual_seed(seed)
    with torch.no_grad():
        prompt_of(ours).prompt_embeddings.normal_()
    return ours


def pair(base, name):
    """(PEFT's model, ours) on copies of one base, with the same random prompt."""
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
    y.sum().backward()
    assert torch.equal(module.prompt_embeddings.grad, torch.full((3, 4), 2.0))


def test_a_loss_with_the_companions_and_one_without():
    """A class without them: labels are too short, and an old mask runs wrong."""
    base, batch = tiny_llama(), batch_of("llama")
    module = PromptTuning(P, 64, True, base.get_input_embeddings().weight)
    embeds = module(base.get_input_embeddings()(batch["input_ids"]))
    mask = module.extend_mask(batch["attention_mask"])
    right = base(
        inputs_embeds=embeds, attention_mask=mask, labels=module.extend_labels(batch["labels"])
    )
    ours = deepcopy(base)
    inject(ours, Prompt(P))
    prompt_of(ours).load_state_dict(module.state_dict())
    close(right.logits, ours(**batch).logits)
    with pytest.raises(ValueError, match="batch_size"):
        base(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"])


def test_the_start_from_a_vocabulary():
    table = torch.randn(50, 8)
    module = PromptTuning(20, 8, init_from_vocab=True, vocab_embeddings=table)
    found = [int((table == row).all(1).nonzero()) for row in module.prompt_embeddings]
    assert len(set(found)) == 20
    with torch.no_grad():
        module.prompt_embeddings.zero_()
    assert table.abs().min() > 0
    torch.manual_seed(0)
    assert 0.9 < PromptTuning(100, 64).prompt_embeddings.std() < 1.1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(num_tokens=0), "num_tokens=0 must be at least 1"),
        (dict(num_tokens=2.0), "num_tokens=2.0 must be a whole number"),
        (dict(embed_dim=-1), "embed_dim=-1"),
        (dict(init_from_vocab=True), "vocab_embeddings .* not None"),
        (dict(init_from_vocab=True, vocab_embeddings=torch.ones(9, 5)), r"not of shape \(9, 5\)"),
        (dict(init_from_vocab=True, vocab_embeddings=torch.ones(2, 4)), "at least num_tokens=3"),
        (dict(init_from_vocab=True, vocab_embeddings=torch.ones(4)), r"not of shape \(4,\)"),
    ],
    ids=str,
)
def test_the_module_refuses(settings, told):
    with pytest.raises(ValueError, match=told):
        PromptTuning(**dict(num_tokens=3, embed_dim=4) | settings)


# ------------------------------------------------------------------ models, against PEFT


@EACH
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "no mask"])
def test_logits_loss_and_gradients(name, masked):
    base, batch = MODELS[name](), batch_of(name)
    if not masked:
        del batch["attention_mask"]
    theirs, ours = pair(base, name)
    output = step_of_both(theirs, ours, batch)
    gradient = prompt_of(ours).prompt_embeddings.grad
    close(rows_of(theirs).grad, gradient)
    assert gradient.abs().max() > 1e-4
    assert (output.logits[:, -3:] - base(**batch).logits[:, -3:]).abs().max() > 0.02
    heads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad and "peft" not in n}
    for n, p in theirs.named_parameters():
        if "modules_to_save" in n and p.requires_grad:
            name_here = n.removeprefix("base_model.").replace(".modules_to_save.default", "")
            close(p.grad, heads.pop(name_here))
    assert not heads


@EACH
def test_by_hand(name):
    base, batch = MODELS[name](), batch_of(name)
    ours = prompted(base)
    E, table = prompt_of(ours).prompt_embeddings, base.get_input_embeddings()
    embeds = torch.cat([E.expand(3, P, 64), table(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, P).long(), batch["attention_mask"]], 1)
    labels = batch["labels"]
    if name != "bert":
        labels = F.pad(labels, (P, 0), value=-100)
    expected = base(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    got = ours(**batch)
    close(expected.logits, got.logits)
    close(expected.loss, got.loss)
    if name != "bert":
        flat = got.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        close(F.cross_entropy(*flat, ignore_index=-100), got.loss)
    # A mask that isn't lengthened, or labels that aren't shifted, would be seen.
    if name in ("llama", "qwen2"):
        behind = F.pad(batch["attention_mask"], (0, P), value=1)
        late = base(inputs_embeds=embeds, attention_mask=behind)
        assert (late.logits - got.logits).abs().max() > 1e-3


def test_the_pooler_of_bert_reads_the_first_virtual_token():
    base, batch = tiny_bert(), batch_of("bert")
    ours, seen = prompted(base), []
    hook = ours.bert.pooler.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ours(**batch)
    hook.remove()
    assert seen[0].shape == (3, P + 12, 64)


def test_token_types_are_lengthened_as_in_peft():
    base, batch = tiny_bert(), batch_of("bert")
    theirs, ours = pair(base, "bert")
    batch["token_type_ids"] = torch.ones(3, 12, dtype=torch.long)
    close(theirs(**batch).logits, ours(**batch).logits)


@EACH
@pytest.mark.parametrize("as_given", ["positional", "embeddings", "positions", "a mask of bools"])
def test_other_ways_to_call(name, as_given):
    base, batch = MODELS[name](), text_of(batch_of(name))
    ours = prompted(base)
    expected = ours(**batch).logits
    ids, mask = batch.values()
    if as_given == "positional":
        got = ours(ids, mask)
    elif as_given == "embeddings":
        got = ours(inputs_embeds=ours.get_input_embeddings()(ids), attention_mask=mask)
    elif as_given == "positions":
        got = ours(**batch, position_ids=torch.arange(12)[None])
    else:
        got = ours(ids, attention_mask=mask.bool())
    close(got.logits, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    batch, found = batch_of("llama"), []
    for checkpointing in (False, True):
        ours = prompted(tiny_llama()).train()
        if checkpointing:
            ours.gradient_checkpointing_enable(dict(use_reentrant=False))
        ours(**batch).loss.backward()
        found.append(prompt_of(ours).prompt_embeddings.grad)
    close(*found)


# ------------------------------------------------------------------ generate


@CAUSAL
def test_greedy_generation_equals_pefts_token_by_token(name):
    base, text = MODELS[name](), text_of(batch_of(name))
    theirs, ours = pair(base, name)
    expected = greedy(theirs, text)
    assert torch.equal(greedy(ours, text), expected)
    assert torch.equal(greedy(ours, text, use_cache=False), expected)
    assert not torch.equal(greedy(base, text), expected)


@CAUSAL
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "no mask"])
def test_generate_equals_greedy_decoding_by_hand(name, seed, cached, padded):
    """Through the plain forward: this tells when a version of transformers breaks generate."""
    ours, text = prompted(MODELS[name](), seed), text_of(batch_of(name))
    if not padded:
        text = {k: t[:1] for k, t in text.items()}  # generate drops a mask of ones
        assert text["attention_mask"].all()
    assert torch.equal(greedy(ours, text, use_cache=cached), by_hand(ours, text))


@CAUSAL
def test_logits_of_cached_steps_equal_those_of_one_forward(name):
    ours, text = prompted(MODELS[name]()), text_of(batch_of(name))
    ids, mask = text.values()
    with torch.no_grad():
        whole = ours(**text).logits
        out = ours(input_ids=ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
        steps = [out.logits]
        for t in range(9, 12):
            out = ours(
                input_ids=ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=out.past_key_values,
            )
            steps.append(out.logits)
    assert out.past_key_values.get_seq_length() == P + 12
    assert whole.shape[1] == P + 12
    close(torch.cat(steps, 1), whole, 5e-6)


@CAUSAL
def test_beams_and_samples(name):
    base, text = MODELS[name](), text_of(batch_of(name))
    theirs, ours = pair(base, name)
    beams = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=1)
    assert torch.equal(ours.generate(**text, **beams), theirs.generate(**text, **beams))
    sample = dict(max_new_tokens=6, min_new_tokens=6, do_sample=True, pad_token_id=1)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        found.append(model.generate(**text, **sample, num_return_sequences=2))
    assert torch.equal(*found)


def test_a_static_cache_is_refused():
    ours, text = prompted(tiny_llama()), text_of(batch_of("llama"))
    with pytest.raises(ValueError, match="attention_mask of shape .*cache_implementation='static'"):
        greedy(ours, text, cache_implementation="static")
    greedy(ours, text)


def test_a_version_of_transformers_that_renames_the_cache_is_refused():
    class Renamed(type(tiny_llama())):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None):
            raise AssertionError("never called")

    model = Renamed(tiny_llama().config)
    with refused(model, "past_key_values.*transformers>=5.20,<5.24"):
        inject(model, Prompt(P))


# ------------------------------------------------------------------ how a prompt starts


def test_it_starts_from_rows_of_the_vocabulary():
    model = tiny_llama()
    inject(model, Prompt(30))
    table = model.get_input_embeddings().weight
    found = [int((table == row).all(1).nonzero()) for row in prompt_of(model).prompt_embeddings]
    assert len(set(found)) == 30
    inject(unload(model), Prompt(100, init="normal"))
    assert 0.9 < prompt_of(model).prompt_embeddings.std() < 1.1
    assert table.std() < 0.03


@pytest.mark.parametrize("tokens", [3, 5, 9, 12])
def test_a_text_start_is_pefts(tokens):
    """Cut off, just as long, repeated: "Is this review positive or negative?" with its tokens."""
    tokenizer, base = load_tokenizer("tinylm"), load_model("tinylm")
    text = "Is this review good or bad?"
    ids = tokenizer(text)["input_ids"]
    assert 3 < len(ids) < 12
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


def test_a_text_start_of_bert_has_its_special_tokens():
    tokenizer, model = load_tokenizer("minilm"), load_model("minilm", labels=2)
    inject(model, Prompt(4, "good or bad", tokenizer))
    table = model.get_input_embeddings().weight
    assert torch.equal(prompt_of(model).prompt_embeddings[0], table[tokenizer.cls_token_id].float())


# ------------------------------------------------------------------ a batch of different prompts


@EACH
def test_each_row_with_a_prompt_of_its_own(name):
    base, batch = MODELS[name](), text_of(batch_of(name))
    ours = prompted(base)
    torch.manual_seed(2)
    prompts = torch.randn(2, P, 64)
    which = torch.tensor([1, 0, 1])
    with prompts_for_rows(ours, prompts[which]):
        got = ours(**batch).logits
    before = ours(**batch).logits
    for row, i in enumerate(which):
        one = deepcopy(ours)
        with torch.no_grad():
            prompt_of(one).prompt_embeddings.copy_(prompts[i])
        close(one(**batch).logits[row], got[row], 2e-6)
    assert not torch.equal(got, before)
    with refused(ours, "2 prompts for a batch of 3 rows"), prompts_for_rows(ours, prompts):
        ours(**batch)
    assert torch.equal(ours(**batch).logits, before), "the block is left, whatever happened"


def test_each_row_generates_with_its_prompt():
    ours, text = prompted(tiny_llama()), text_of(batch_of("llama"))
    prompts = torch.randn(3, P, 64)
    with prompts_for_rows(ours, prompts):
        got = greedy(ours, text)
        assert torch.equal(greedy(ours, text, use_cache=False), got)
    for row in range(3):
        with torch.no_grad():
            prompt_of(ours).prompt_embeddings.copy_(prompts[row])
        assert torch.equal(greedy(ours, text)[row], got[row])


@pytest.mark.parametrize("shape", [(3, P, 63), (3, P + 1, 64), (P, 64)])
def test_rows_of_another_shape(shape):
    block = prompts_for_rows(prompted(tiny_llama()), torch.zeros(shape))
    with pytest.raises(ValueError, match="must be"), block:
        raise AssertionError("entered")


def test_rows_without_a_prompt():
    model = tiny_llama()
    inject(model, LoRA(2, 3, ("q_proj",)))
    for wrong in (model, tiny_llama()):
        with pytest.raises(ValueError, match="prompt_of: the model holds no PromptTuning"):
            prompt_of(wrong)


# ------------------------------------------------------------------ training


def test_fit_trains_the_prompt_alone():
    model = tiny_llama()
    untouched = state(model)
    inject(model, Prompt(P))
    assert report(model).trainable == P * 64 and report(model).total - report(model).base == P * 64
    start = prompt_of(model).prompt_embeddings.detach().clone()
    history = fit(model, TinyText(), 20, show=False)
    assert history.smooth_loss()[-1] < history.loss[0]
    assert not torch.equal(prompt_of(model).prompt_embeddings, start)
    assert same(state(unload(model)), untouched)


def test_training_equals_pefts():
    base = tiny_llama()
    theirs, ours = pair(base, "llama")
    options = dict(lr=3e-2, clip=None, warmup=0.0, show=False)
    history = fit(ours, TinyText(), 10, **options)
    optimizer = torch.optim.AdamW([rows_of(theirs)], lr=3e-2, weight_decay=0.0, fused=True)
    for step, batch in zip(range(10), TinyText().stream(16, seed=0), strict=False):
        optimizer.param_groups[0]["lr"] = 3e-2 * (10 - step) / 10
        loss = theirs(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - history.loss[step]) <= 1e-6
    close(rows_of(theirs), prompt_of(ours).prompt_embeddings, 1e-5)


class Padded(TinyText):
    """Rows of different lengths, padded on the right as LanguageTask does."""

    def _batch(self, rows):
        batch = super()._batch(rows)
        mask = (torch.arange(6) < 3 + rows[:, None] % 4).long()
        labels = batch["labels"].masked_fill(mask == 0, -100)
        return batch | {"attention_mask": mask, "labels": labels}


def test_evaluate_counts_the_same_tokens_with_and_without_a_prompt():
    base, task = tiny_llama(), Padded()
    ours = prompted(base)
    total, n = 0.0, 0
    with torch.no_grad():
        for batch in task.batches("test"):
            logits = ours(**text_of(batch)).logits[:, P:-1]
            labels = batch["labels"][:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            n += int((labels != -100).sum())
            before = batch["labels"].clone()
    scores = evaluate(ours, task)
    assert scores.n == n == evaluate(base, task).n
    assert scores.loss == pytest.approx(total / n, abs=1e-5)
    assert torch.equal(before, batch["labels"])


# ------------------------------------------------------------------ files


@EACH
def test_peft_reads_ours(name, tmp_path):
    base, batch = MODELS[name](), batch_of(name)
    ours = prompted(base)
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if n.startswith("classifier"):
                p.add_(0.1)
    save_adapter(ours, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["prompt_embeddings"].shape == (P, 64)
    assert len(tensors) == (3 if name == "bert" else 1)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path).eval()
    close(theirs(**batch).logits, ours(**batch).logits)
    if name != "bert":
        assert torch.equal(greedy(theirs, batch), greedy(ours, batch))


@EACH
def test_we_read_pefts(name, tmp_path):
    base, batch = MODELS[name](), batch_of(name)
    theirs = theirs_on(base, name, prompt_tuning_init="SAMPLE_VOCAB")
    with torch.no_grad():
        rows_of(theirs).add_(0.3)
    theirs.save_pretrained(tmp_path)
    ours = deepcopy(base)
    told = load_adapter(ours, tmp_path)
    assert told.method == Prompt(P, "vocab") and report(ours).trainable == 0
    close(theirs(**batch).logits, ours(**batch).logits)
    again = deepcopy(base)
    load_adapter(again, tmp_path, trainable=True)  # PEFT refuses to train on
    fit(again, task_of(name), 2, show=False)
    assert not torch.equal(rows_of(theirs), prompt_of(again).prompt_embeddings)


def test_a_text_start_in_pefts_file_is_no_reason_to_refuse(tmp_path):
    tokenizer, base = load_tokenizer("tinylm"), load_model("tinylm")
    theirs = theirs_on(
        base,
        "llama",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="A good film",
        tokenizer_name_or_path=tokenizer.name_or_path,
    )
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(prompt_of(base).prompt_embeddings, rows_of(theirs))


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


@pytest.mark.parametrize("init", ["normal", "vocab", "A good film"])
def test_ours_both_ways(init, tmp_path):
    tokenizer, model = load_tokenizer("tinylm"), load_model("tinylm")
    inject(model, Prompt(P, init, tokenizer))
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert same_adapter(tmp_path / "a", tmp_path / "b")
    assert "tinylm/" not in (tmp_path / "a" / CONFIG).read_text(encoding="utf-8")
    again = load_model("tinylm")
    told = load_adapter(again, tmp_path / "a")
    assert told.method.init == (init if init == "normal" else "vocab")
    assert torch.equal(prompt_of(again).prompt_embeddings, prompt_of(model).prompt_embeddings)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(num_virtual_tokens=5), "shape"),
        (dict(num_virtual_tokens=0), "tokens=0"),
        (dict(num_virtual_tokens=None), "tokens=None"),
        (dict(num_virtual_tokens=500), "128 positions"),
        (dict(surprise=7), "does not read surprise=7"),
        (dict(peft_type="P_TUNING"), "is no method of the course"),
    ],
    ids=str,
)
def test_files_that_do_not_fit(change, told, tmp_path):
    save_adapter(prompted(tiny_llama()), tmp_path)
    model = tiny_llama()
    with refused(model, told):
        load_adapter(model, rewrite(tmp_path, **change))


def test_a_prompt_of_another_width(tmp_path):
    save_adapter(prompted(tiny_llama()), tmp_path)
    other = tiny_llama(hidden_size=32)
    with pytest.raises(ValueError, match="shape"):
        load_adapter(other, tmp_path, check_base=False)
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(tiny_llama(seed=3), tmp_path)


# ------------------------------------------------------------------ the other verbs


@EACH
def test_a_prompt_cannot_be_merged(name):
    model = prompted(MODELS[name]())
    with refused(model, "merge: what Prompt adds lies outside the layers", TypeError):
        merge(model)
    with refused(model, "unmerge", TypeError):
        unmerge(model)


def test_the_same_seed_gives_the_same_prompt():
    for init in ("normal", "vocab"):
        rows = []
        for _ in range(2):
            model = tiny_llama()
            torch.manual_seed(4)
            inject(model, Prompt(P, init))
            rows.append(prompt_of(model).prompt_embeddings)
        assert torch.equal(*rows)


def test_a_copy_has_a_prompt_of_its_own():
    model, batch = prompted(tiny_llama()), batch_of("llama")
    expected = model(**batch).logits
    copy = deepcopy(model)
    with torch.no_grad():
        prompt_of(model).prompt_embeddings.add_(1)
    assert torch.equal(copy(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)
    unload(copy)
    assert copy(**batch).logits.shape[1] == 12 and model(**batch).logits.shape[1] == 12 + P


def test_the_attached_module_holds_nothing_of_the_base():
    attached = injection_of(prompted(tiny_llama())).attached
    assert type(attached) is PromptHook
    assert {n: tuple(t.shape) for n, t in attached.state_dict().items()} == {
        "prompt_embeddings": (P, 64)
    }


@EACH
def test_a_bfloat16_base(name):
    base, batch = MODELS[name]().bfloat16(), batch_of(name)
    theirs, ours = pair(base, name)
    assert {p.dtype for _, p in injection_of(ours).added()} == {torch.float32}
    a, b = theirs(**batch), ours(**batch)
    assert b.logits.dtype == torch.bfloat16
    close(a.logits, b.logits, 2 * 2**-8 * a.logits.abs().max().item())
    b.loss.backward()
    gradient = prompt_of(ours).prompt_embeddings.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    fresh = deepcopy(base)
    inject(fresh, Prompt(P))
    assert prompt_of(fresh).prompt_embeddings.dtype == torch.float32


@EACH
@pytest.mark.parametrize("init", ["normal", "vocab", "a text"])
def test_a_meta_model(name, init, tmp_path):
    with torch.device("meta"):
        model = MODELS[name]() if name == "llama" else type(MODELS[name]())(MODELS[name]().config)
    told = inject(model, Prompt(P, init, lambda text: {"input_ids": [5, 9, 70]}))
    assert prompt_of(model).prompt_embeddings.is_meta
    assert told.total - told.base == P * 64
    if name != "opt":  # transformers itself looks at the values of a mask, which OPT makes
        logits = model(batch_of(name)["input_ids"].to("meta")).logits
        assert logits.is_meta and logits.shape == ((3, 2) if name == "bert" else (3, P + 12, 128))
    with pytest.raises(ValueError, match="meta"):
        save_adapter(model, tmp_path)


def test_also_train_and_its_file(tmp_path):
    model = tiny_llama()
    inject(model, Prompt(P), modules_to_save=("norm",))
    model.model.norm.weight.data.mul_(1.5)
    save_adapter(model, tmp_path)
    again = tiny_llama()
    load_adapter(again, tmp_path)
    batch = batch_of("llama")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(tokens=0), "tokens=0 must be at least 1"),
        (dict(tokens=-1), "tokens=-1 must be at least 1"),
        (dict(tokens=2.5), "tokens=2.5 must be a whole number"),
        (dict(tokens=True), "tokens=True must be a whole number"),
        (dict(init="a text"), "init='a text' is neither .* needs a tokenizer"),
        (dict(init="vocabulary"), "init='vocabulary' is neither"),
        (dict(init=""), "init='' must be"),
        (dict(init=None), "init=None must be"),
        (dict(init="a text", tokenizer="tinylm"), "tokenizer='tinylm' must be a tokenizer"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Prompt(**dict(tokens=P) | settings)


def _t5():
    sizes = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize(
    ("make", "method", "told"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), Prompt(P), "has no token embeddings"),
        (_t5, Prompt(P), "an encoder and a decoder"),
        (tiny_llama, Prompt(128), "128 virtual tokens and 1 of text.*128 positions"),
        (tiny_opt, Prompt(64), "64 virtual tokens and 1 of text.*64 positions"),
        (tiny_llama, Prompt(4, "x", lambda t: {"input_ids": []}), r"gives the tokens \[\]"),
        (tiny_llama, Prompt(4, "x", lambda t: {"input_ids": [1, 128]}), "knows 0 to 127"),
    ],
)
def test_models_that_are_refused_stay_as_they_are(make, method, told):
    model = make().train()
    with refused(model, told):
        inject(model, method)
    assert model.training


@EACH
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


@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_that_becomes_too_long(cached):
    model = prompted(tiny_opt())
    ids = torch.randint(3, 128, (1, 50))
    options = dict(do_sample=False, pad_token_id=1, use_cache=cached)
    # The last token is not read again: 50 + 6 + 8 are 64 positions, and one more token comes out.
    assert model.generate(ids, max_new_tokens=9, min_new_tokens=9, **options).shape == (1, 59)
    with pytest.raises(ValueError, match="64 positions"):
        model.generate(ids, max_new_tokens=10, min_new_tokens=10, **options)


def test_a_classifier_that_reads_the_last_place():
    """It finds the last token by its id, and there are no ids any more: PEFT reads the padding."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=2, pad_token_id=1)
    base = LlamaForSequenceClassification(config).eval()
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


def test_padding_on_the_left_comes_between_the_prompt_and_the_text():
    """As in PEFT. A rotary model sees the distance, so a row of a padded batch isn't the row alone;
    the base itself doesn't mind, and padding on the right changes nothing."""
    base = load_model("tinylm")
    ours = deepcopy(base)
    torch.manual_seed(0)
    inject(ours, Prompt(10))
    ids, k = torch.randint(3, 4096, (1, 8), generator=torch.Generator().manual_seed(1)), 20
    mask = torch.ones_like(ids)
    left = {"input_ids": F.pad(ids, (k, 0)), "attention_mask": F.pad(mask, (k, 0))}
    right = {"input_ids": F.pad(ids, (0, k)), "attention_mask": F.pad(mask, (0, k))}
    with torch.no_grad():
        alone = ours(input_ids=ids).logits[:, -8:]
        assert (ours(**left).logits[:, -8:] - alone).abs().max() > 0.1
        close(ours(**right).logits[:, 10:18], alone, 1e-4)
        close(base(**left).logits[:, -8:], base(input_ids=ids).logits, 1e-4)


def test_learned_positions_and_a_tied_head_of_gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    base = GPT2LMHeadModel(GPT2Config(**sizes))
    batch = batch_of("gpt2")
    theirs, ours = theirs_on(base.eval(), "gpt2"), deepcopy(base).eval()
    inject(ours, Prompt(P))
    with torch.no_grad():
        prompt_of(ours).prompt_embeddings.copy_(rows_of(theirs))
    close(theirs(**batch).logits, ours(**batch).logits)
    expected = greedy(theirs, batch)
    assert torch.equal(greedy(ours, batch), expected)
    assert torch.equal(greedy(ours, batch, use_cache=False), expected)


def test_the_two_helpers():
    prompt, x = torch.randn(2, 3), torch.randn(4, 5, 3, dtype=torch.float64)
    assert prepend(prompt, x).dtype == torch.float64
    each = torch.randn(4, 2, 3)
    assert torch.equal(prepend(each, x.float())[:, :2], each)
    longer = lengthen(torch.zeros(2, 3, dtype=torch.long), 2, -100)
    assert longer.tolist() == [[-100, -100, 0, 0, 0]] * 2


# ------------------------------------------------------------------ calls that went wrong silently


@pytest.mark.parametrize("new", [0, 1, P, P + 1, P + 4])
@pytest.mark.parametrize("holes", [False, True])
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
    with pytest.raises(ValueError, match="does not go on there: give the new tokens only"):
        ours.generate(ids, attention_mask=mask, past_key_values=read(), **GREEDY)


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_without_the_prompt(masked):
    base, ids = tiny_llama(), batch_of("llama")["input_ids"]
    foreign, ours = base(ids, use_cache=True).past_key_values, prompted(base)
    mask = torch.ones(3, 13).long() if masked else None
    with pytest.raises(ValueError, match="was filled without the virtual tokens"):
        ours(ids[:, :1], attention_mask=mask, past_key_values=foreign)
    with torch.no_grad():  # a tuple marks its cache too
        _, own = ours(ids, use_cache=True, return_dict=False)
    assert ours(ids[:, :1], past_key_values=own).logits.shape == (3, 1, 128)


def test_places_in_the_text_move_with_it():
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    ours = BertForQuestionAnswering(BertConfig(**sizes, num_hidden_layers=1)).eval()
    inject(ours, Prompt(P))
    ids, start, end = torch.randint(3, 128, (2, 9)), torch.tensor([1, 2]), torch.tensor([4, 8])
    got = ours(ids, start_positions=start, end_positions=end)
    losses = (
        F.cross_entropy(got.start_logits, start + P),
        F.cross_entropy(got.end_logits, end + P),
    )
    close(got.loss, sum(losses) / 2)
    ours = prompted(tiny_llama())
    for keep in (torch.tensor([0, 3]), torch.tensor([-1, -2])):
        close(ours(ids, logits_to_keep=keep).logits, ours(ids).logits[:, P:][:, keep])


def test_a_classifier_that_reads_the_last_place_without_a_mask():
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=2, pad_token_id=1)
    ours = LlamaForSequenceClassification(config).eval()
    inject(ours, Prompt(P))
    ids = torch.randint(3, 128, (2, 9))
    ours(ids)
    ids[1, 5:] = 1
    with pytest.raises(ValueError, match="the mask ends with 0 .*pad on the left"):
        ours(ids)


def test_as_many_labels_as_tokens_are_not_taken_for_labels_of_tokens():
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    several = dict(num_labels=9, problem_type="multi_label_classification", num_hidden_layers=1)
    ours = BertForSequenceClassification(BertConfig(**sizes, **several))
    inject(ours, Prompt(P))
    assert ours(torch.randint(3, 128, (2, 9)), labels=torch.ones(2, 9)).loss.isfinite()


def test_the_positions_of_roberta_begin_after_its_padding():
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    ours = RobertaForSequenceClassification(config).eval()
    inject(ours, Prompt(P))
    ids = torch.randint(3, 128, (1, 62 - P + 1))
    assert ours(ids[:, 1:]).logits.isfinite().all()
    with pytest.raises(ValueError, match="more than the model's 62 positions"):
        ours(ids)


def test_calls_and_sizes_that_are_refused_with_a_reason():
    ours = prompted(tiny_llama())
    for wrong in ({}, dict(input_ids=torch.ones(3).long()), dict(inputs_embeds=torch.ones(2, 64))):
        with pytest.raises(ValueError, match="must be input_ids of shape"):
            ours(**wrong)
    with pytest.raises(ValueError, match="attention_mask.* is no tensor"):
        ours(torch.ones(1, 3).long(), attention_mask=[[1, 1, 1]])
    with pytest.raises(ValueError, match="128 positions"):
        inject(tiny_llama(), Prompt(10**13))  # before memory is asked for
    with pytest.raises(ValueError, match="at least num_tokens=130 rows"):
        inject(tiny_llama(max_position_embeddings=256), Prompt(130))
    with pytest.raises(ValueError, match="knows 0 to 127"):
        inject(tiny_llama(), Prompt(2, "x", lambda text: {"input_ids": [5, -1]}))


@pytest.mark.parametrize("masked", [True, False])
def test_a_static_cache_has_no_room_for_the_prompt(masked):
    ours, ids = prompted(tiny_llama()), torch.randint(3, 128, (1, 7))
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with pytest.raises(ValueError, match="must be a DynamicCache, which grows"):
        ours.generate(ids, **mask, **GREEDY, cache_implementation="static")
