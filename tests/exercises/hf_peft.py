"""Answers to the exercises of lesson 12."""

import copy
import os
import shutil
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ config_for

NAMES = ("lora", "dora", "adalora", "ia3", "prefix", "prompt")
ATTENTION = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "bert": ["query", "key", "value"]}
MLP = {"llama": ["gate_proj", "up_proj", "down_proj"], "bert": ["dense"]}
SECOND = r".*layer\.\d+\.output\.dense"
IA3 = {
    "llama": dict(target_modules=["k_proj", "v_proj", "down_proj"]),
    "bert": dict(target_modules=rf".*self\.(key|value)|{SECOND}", feedforward_modules=SECOND),
}


def family(model):
    return "bert" if hasattr(model, "classifier") else "llama"


def task(model):
    return {"task_type": "SEQ_CLS" if family(model) == "bert" else "CAUSAL_LM"}


def made(method, model, own=None, low_rank=None, **changes):
    """A right config, but for `changes` of all methods, those of the low-rank ones, and those of
    some by name: {"ia3": {...}}; an entry that is ... is left out."""
    low = dict(target_modules="all-linear", lora_alpha=16) | (low_rank or {})
    kinds = {
        "lora": (LoraConfig, low),
        "dora": (LoraConfig, low | dict(use_dora=True)),
        "adalora": (AdaLoraConfig, low | dict(total_step=200)),
        "ia3": (IA3Config, IA3[family(model)]),
        "prefix": (PrefixTuningConfig, dict(num_virtual_tokens=5)),
        "prompt": (PromptTuningConfig, dict(num_virtual_tokens=5)),
    }
    if method not in kinds:
        raise ValueError(f"{method}: there are {list(kinds)}")
    config, settings = kinds[method]
    settings = task(model) | settings | changes | (own or {}).get(method, {})
    return config(**{name: value for name, value in settings.items() if value is not ...})


def rejected(told, own=None, low_rank=None, **changes):
    """A wrong answer with these changes of a right one."""

    def config_for(method, model):
        return made(method, model, own, low_rank, **changes)

    wrong("config_for", told)(config_for)


rejected("PEFT then leaves the fresh head frozen, at its random start", task_type=...)
rejected("AdaLoRA's regulariser is never added to the loss", {"adalora": dict(task_type=...)})
rejected("raises KeyError: None", {"prompt": dict(task_type=None)})
rejected("task_type is 'CAUSAL_LM', and the model's class says 'SEQ_CLS'", task_type="CAUSAL_LM")
rejected("task_type is 'FEATURE_EXTRACTION'", task_type=TaskType.FEATURE_EXTRACTION)
rejected("task_type is 'SEQ_CLS', and the model's class says 'CAUSAL_LM'", task_type="SEQ_CLS")
rejected("use_dora is False", {"dora": dict(use_dora=False)})
rejected("use_dora is True: use_dora=True makes a DoRA", {"lora": dict(use_dora=True)})
rejected("inference_mode is True, so nothing trains", inference_mode=True)
rejected("PEFT takes its default for this architecture", low_rank=dict(target_modules=...))
rejected("no number comes through", low_rank=dict(lora_dropout=1.0))
rejected("lora_alpha is 0", {"lora": dict(lora_alpha=0)})
rejected("is above 16, the most that is asked for", {"lora": dict(r=20)})
rejected("is above 16, the most that is asked for", {"lora": dict(rank_pattern={"query": 17})})
rejected("trainable_token_indices trains rows", {"dora": dict(trainable_token_indices=[1])})
rejected("Seldom set, and set here: lora_bias=True", {"lora": dict(lora_bias=True)})
rejected("set here: alpha_pattern={'dense': 0}", {"lora": dict(alpha_pattern={"dense": 0})})
rejected("num_virtual_tokens is '8'", {"prefix": dict(num_virtual_tokens="8")})
rejected("Seldom set, and set here: token_dim=8", {"prompt": dict(token_dim=8)})
rejected("Seldom set, and set here: num_layers=1", {"prefix": dict(num_layers=1)})
rejected("bias='none' keeps the base's biases", {"lora": dict(bias="all")})
rejected("at its start the model is not the base", {"dora": dict(init_lora_weights=False)})
rejected("changes the base's weights", {"lora": dict(init_lora_weights="pissa")})
rejected("target_r=12 is not below init_r=12", {"adalora": dict(target_r=12)})
rejected("target_r=0 prunes everything", {"adalora": dict(target_r=0)})
rejected("the ranks never come down to target_r", {"adalora": dict(total_step=1000)})
rejected("it prunes too early", {"adalora": dict(total_step=20)})
rejected("AdaLoRA's schedule needs the number of steps", {"adalora": dict(total_step=None)})
rejected("tinit + tfinal must be below total_step", {"adalora": dict(tinit=150, tfinal=50)})
rejected("deltaT=500 leaves no time", {"adalora": dict(deltaT=500)})
rejected("regulariser does not count in the loss", {"adalora": dict(orth_reg_weight=0.0)})
rejected("num_virtual_tokens is None", {"prefix": dict(num_virtual_tokens=...)})
rejected("num_virtual_tokens is 0", {"prompt": dict(num_virtual_tokens=0)})
rejected(
    "PEFT's default for a BERT does",
    {"ia3": dict(target_modules=..., feedforward_modules=...)},
)


@wrong("config_for", "2 of 6 layers are left out: 'model.layers.0.self_attn.k_proj'")
def defaults_of_a_causal_model(method, model):
    """PEFT's default of (IA)³ for a Qwen2 names queries, not keys."""
    if method == "ia3" and family(model) == "llama":
        return IA3Config(**task(model))
    return made(method, model)


@wrong("config_for", "output.dense also matches attention.output.dense.")
def both_output_denses(method, model):
    if method == "ia3" and family(model) == "bert":
        names = ["key", "value", "output.dense"]
        return IA3Config(target_modules=names, feedforward_modules=names[2:], **task(model))
    return made(method, model)


@wrong("config_for", "\\d is one")
def layers_up_to_nine(method, model):
    if method == "ia3" and family(model) == "bert":
        second = r".*layer\.\d\.output\.dense"
        where = dict(target_modules=rf".*(key|value)|{second}", feedforward_modules=second)
        return IA3Config(**where, **task(model))
    return made(method, model)


@wrong("config_for", "the output is scaled: of the second feed-forward matrix it is the input")
def output_of_the_second(method, model):
    return made(method, model, {"ia3": dict(feedforward_modules=[])})


@wrong("config_for", "the input is scaled: of keys and values it is the output")
def all_are_feedforward(method, model):
    where = IA3[family(model)]["target_modules"]
    return made(method, model, {"ia3": dict(feedforward_modules=where)})


@wrong("config_for", "adapted too, and should not be: 'bert.encoder.layer.0.intermediate.dense'")
def first_matrix_too(method, model):
    if method == "ia3" and family(model) == "bert":
        where = rf".*(key|value|intermediate\.dense)|{SECOND}"
        return IA3Config(target_modules=where, feedforward_modules=SECOND, **task(model))
    return made(method, model)


@wrong("config_for", "layers are left out: 'bert.encoder.layer.0.attention.self.key'")
def query_and_value(method, model):
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[family(model)]
    return made(method, model, low_rank=dict(target_modules=names))


@wrong("config_for", "No layer is called 'gate', 'up'")
def misspelt(method, model):
    names = [*ATTENTION[family(model)], *MLP[family(model)]]
    names = [name.replace("gate_proj", "gate").replace("up_proj", "up") for name in names]
    return made(method, model, low_rank=dict(target_modules=names))


@wrong("config_for", "No modules were targeted for adaptation")
def names_of_a_llama(method, model):
    names = ATTENTION["llama"] + MLP["llama"]
    return made(method, model, low_rank=dict(target_modules=names))


@wrong("config_for", "the head 'classifier' is a target too: it trains in full already")
def every_linear_layer(method, model):
    """The names of all linear layers, as many recipes collect them."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return made(method, model, low_rank=dict(target_modules=layers))


@wrong("config_for", "the head 'lm_head' is a target too: it is tied to the embedding")
def with_lm_head(method, model):
    names = [*ATTENTION[family(model)], *MLP[family(model)]]
    names += ["lm_head"] if family(model) == "llama" else []
    return made(method, model, low_rank=dict(target_modules=names))


@wrong("config_for", "adapted too, and should not be: 'model.embed_tokens'")
def with_the_embedding(method, model):
    names = [*ATTENTION[family(model)], *MLP[family(model)]]
    names += ["embed_tokens"] if family(model) == "llama" else []
    return made(method, model, low_rank=dict(target_modules=names))


@wrong("config_for", "a full copy of a module trains")
def saves_lm_head(method, model):
    if method in NAMES[:3] and family(model) == "llama":
        return made(method, model, modules_to_save=["lm_head"])
    return made(method, model)


@wrong("config_for", "task_type is 'SEQ_CLS', and the model's class says 'CAUSAL_LM'")
def only_llamas_generate(method, model):
    causal = model.config.model_type == "llama"
    return made(method, model, task_type="CAUSAL_LM" if causal else "SEQ_CLS")


@wrong("config_for", "your function raised TypeError: 'NoneType' object is not subscriptable")
def by_the_architectures(method, model):
    """A model that is built, not loaded, has none in its config."""
    causal = model.config.architectures[0].endswith("CausalLM")
    return made(method, model, task_type="CAUSAL_LM" if causal else "SEQ_CLS")


@wrong("config_for", "this is a config of P_TUNING, expected one of PROMPT_TUNING")
def p_tuning(method, model):
    if method == "prompt":
        return PromptEncoderConfig(num_virtual_tokens=5, **task(model))
    return made(method, model)


@wrong("config_for", "this is a config of PROMPT_TUNING, expected one of PREFIX_TUNING")
def swapped_prompts(method, model):
    return made({"prefix": "prompt", "prompt": "prefix"}.get(method, method), model)


@wrong("config_for", "the result is a PEFT model")
def gives_the_model(method, model):
    return get_peft_model(copy.deepcopy(model), made(method, model))


@wrong("config_for", "the model was changed")
def tries_it_out(method, model):
    config = made(method, model)
    get_peft_model(model, config).print_trainable_parameters()
    return config


@wrong("config_for", "model.config was changed")
def writes_into_the_config(method, model):
    model.config.use_cache = False
    return made(method, model)


@wrong("config_for", "the result is None")
def returns_nothing(method, model):
    made(method, model)


@wrong("config_for", "the result is a dict, expected a config of PEFT")
def a_dict(method, model):
    return {"peft_type": method, **task(model)}


@wrong("config_for", "for method='houlsby' it raised KeyError")
def key_error(method, model):
    if method not in NAMES:
        raise KeyError(method)
    return made(method, model)


@wrong("config_for", "does not name the method 'lora'")
def names_none(method, model):
    if method not in NAMES:
        raise ValueError(f"unknown method {method}")
    return made(method, model)


@wrong("config_for", "does not name the method 'lora'")
def lora_within_adalora(method, model):
    if method not in NAMES:
        raise ValueError("known are dora, adalora, ia3, prefix, prompt")
    return made(method, model)


@wrong("config_for", "for method='houlsby' nothing was raised")
def silent(method, model):
    return made(method, model) if method in NAMES else None


@right("config_for")
def by_names(method, model):
    names = [*ATTENTION[family(model)], *MLP[family(model)]]
    names += ["attention.output.dense"] if family(model) == "bert" else []
    return made(method, model, low_rank=dict(target_modules=names))


@right("config_for")
def by_full_names(method, model):
    """All linear layers inside the blocks, by their whole names, and without BERT's pooler."""
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]
    if method == "ia3" and "bert" in inside[0]:
        second = [n for n in inside if n.endswith("output.dense") and "attention" not in n]
        keys = [n for n in inside if n.endswith((".key", ".value"))]
        return IA3Config(
            target_modules=keys + second, feedforward_modules=second, task_type="SEQ_CLS"
        )
    return made(method, model, low_rank=dict(target_modules=inside))


@right("config_for")
def by_the_class_and_with_an_exclusion(method, model):
    kind = TaskType.CAUSAL_LM if "CausalLM" in type(model).__name__ else TaskType.SEQ_CLS
    if method == "ia3" and kind == TaskType.SEQ_CLS:
        return IA3Config(
            task_type=kind,
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            exclude_modules=r".*attention\.output\.dense",
        )
    if method == "ia3" and model.config.model_type == "llama":  # PEFT's own choice
        return IA3Config(task_type=kind)
    return made(method, model, task_type=kind)


@right("config_for")
def other_numbers(method, model):
    low = dict(r=4, lora_alpha=3, lora_dropout=0.05, use_rslora=True, init_lora_weights="gaussian")
    own = {
        "lora": low,
        "dora": dict(r=1, lora_alpha=1, rank_pattern={"query|q_proj": 16}),
        "adalora": dict(init_r=6, target_r=2, tinit=10, tfinal=60, deltaT=5, orth_reg_weight=0.1),
        "prefix": dict(num_virtual_tokens=1, prefix_projection=True, encoder_hidden_size=8),
        "prompt": dict(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"),
    }
    return made(method, model, own)


@right("config_for")
def with_the_head_named_again(method, model):
    head = dict(modules_to_save=["classifier"]) if family(model) == "bert" else {}
    return made(method, model, dict.fromkeys(NAMES[:4], head))


# ------------------------------------------------------------------ mixed_batch


def fits(model, inputs, adapters):
    rows = len(inputs["input_ids"])
    if len(adapters) != rows:
        raise ValueError(f"{len(adapters)} adapters for {rows} rows")
    for name in adapters:
        if name is not None and name not in model.peft_config:
            raise ValueError(f"no adapter is called {name!r}")


def kept(mixed_batch):
    """The function, made to leave the model as it was."""

    def wrapped(model, inputs, adapters):
        fits(model, inputs, adapters)
        active, modes = model.active_adapter, [m.training for m in model.modules()]
        trains = [p.requires_grad for p in model.parameters()]
        model.eval()
        try:
            with torch.no_grad():
                return mixed_batch(model, inputs, adapters)
        finally:
            model.set_adapter(active)
            for p, trained in zip(model.parameters(), trains, strict=True):
                p.requires_grad_(trained)
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode

    wrapped.__name__, wrapped.__wrapped__ = mixed_batch.__name__, mixed_batch
    return wrapped


def answered(model, inputs, name):
    """The logits of one adapter, with whatever mode and graph there are."""
    if name is not None:
        model.set_adapter(name)
    with nullcontext() if name else model.disable_adapter():
        return model(**inputs).logits


def row_by_row(model, inputs, adapters, base=answered):
    rows = []
    for i, name in enumerate(adapters):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        rows.append((answered if name else base)(model, row, name))
    return torch.cat(rows)


@wrong("mixed_batch", "every row is answered by the active adapter")
@kept
def active_alone(model, inputs, adapters):
    return model(**inputs).logits


@wrong("mixed_batch", "put each back to its place")
@kept
def in_groups(model, inputs, adapters):
    parts = []
    for name in dict.fromkeys(adapters):
        rows = [i for i, adapter in enumerate(adapters) if adapter == name]
        part = {key: value[rows] for key, value in inputs.items()}
        parts.append(answered(model, part, name))
    return torch.cat(parts)


@wrong("mixed_batch", "alphabetical order of their adapters")
@kept
def in_sorted_groups(model, inputs, adapters):
    order = sorted(range(len(adapters)), key=lambda i: str(adapters[i] or ""))
    inputs = {key: value[order] for key, value in inputs.items()}
    return row_by_row(model, inputs, [adapters[i] for i in order])


@wrong("mixed_batch", "disable_adapter() gives the base")
@kept
def base_of_get_base_model(model, inputs, adapters):
    """get_base_model() has the adapters in it."""
    active = model.active_adapter

    def base(model, row, name):
        model.set_adapter(active)
        return model.get_base_model()(**row).logits

    return row_by_row(model, inputs, adapters, base)


@wrong("mixed_batch", "is answered by the one before it")
@kept
def the_last_adapter_for_none(model, inputs, adapters):
    return row_by_row(model, inputs, adapters, lambda model, row, name: model(**row).logits)


@wrong("mixed_batch", "a row without an adapter is left at 0")
@kept
def zeros_for_none(model, inputs, adapters):
    logits = torch.zeros_like(model(**inputs).logits)
    for name in {*adapters} - {None}:
        rows = [i for i, adapter in enumerate(adapters) if adapter == name]
        logits[rows] = answered(model, {k: v[rows] for k, v in inputs.items()}, name)
    return logits


@wrong("mixed_batch", "all adapters are the first row's")
@kept
def the_first_for_all(model, inputs, adapters):
    return answered(model, inputs, adapters[0])


@wrong("mixed_batch", "input_ids alone is passed on")
@kept
def ids_alone(model, inputs, adapters):
    return row_by_row(model, {"input_ids": inputs["input_ids"]}, adapters)


@wrong("mixed_batch", "token_type_ids and position_ids are not passed on")
@kept
def ids_and_mask(model, inputs, adapters):
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return row_by_row(model, inputs, adapters)


@wrong("mixed_batch", "position_ids is not passed on")
@kept
def what_a_tokenizer_gives(model, inputs, adapters):
    known = ("input_ids", "attention_mask", "token_type_ids")
    return row_by_row(model, {k: v for k, v in inputs.items() if k in known}, adapters)


@wrong("mixed_batch", "(IA)³ takes it without a word")
@kept
def by_adapter_names(model, inputs, adapters):
    return model(**inputs, adapter_names=[name or "__base__" for name in adapters]).logits


@wrong("mixed_batch", "Cannot pass `adapter_names` when DoRA is enabled")
@kept
def by_adapter_names_where_lora(model, inputs, adapters):
    if model.peft_config["a"].peft_type.value == "IA3":
        return row_by_row(model, inputs, adapters)
    return by_adapter_names.__wrapped__(model, inputs, adapters)


@wrong("mixed_batch", "it runs in train mode, with dropout")
def with_dropout(model, inputs, adapters):
    fits(model, inputs, adapters)
    active, trains = model.active_adapter, [p.requires_grad for p in model.parameters()]
    logits = row_by_row(model, inputs, adapters).detach()
    model.set_adapter(active)
    for p, trained in zip(model.parameters(), trains, strict=True):
        p.requires_grad_(trained)
    return logits


@wrong("mixed_batch", "what is in train mode")
def stays_in_eval_mode(model, inputs, adapters):
    logits = kept(row_by_row)(model, inputs, adapters)
    model.eval()
    return logits


@wrong("mixed_batch", "the active adapter is ['a'] afterwards, and was ['b']")
@torch.no_grad()
def leaves_another_active(model, inputs, adapters):
    fits(model, inputs, adapters)
    return row_by_row(model, inputs, adapters)


@wrong("mixed_batch", "model['what trains'] differs")
def wakes_the_active(model, inputs, adapters):
    fits(model, inputs, adapters)
    active, training = model.active_adapter, model.training
    logits = row_by_row(model.eval(), inputs, adapters).detach()
    model.set_adapter(active)
    model.train(training)
    return logits


@wrong("mixed_batch", "model['what is in train mode'] differs: too many")
def one_mode_for_all(model, inputs, adapters):
    training = model.training
    logits = kept(row_by_row)(model, inputs, adapters)
    model.train(training)
    return logits


@wrong("mixed_batch", "model['what trains'] differs: missing")
def the_active_alone_is_put_back(model, inputs, adapters):
    trained = any(p.requires_grad for p in model.parameters())
    logits = kept(row_by_row)(model, inputs, adapters)
    model.requires_grad_(False)
    model.set_adapter(model.active_adapter, inference_mode=not trained)
    return logits


@wrong("mixed_batch", "the active adapter is ['a'] afterwards, and was ['b']")
def unless_it_raises(model, inputs, adapters):
    fits(model, inputs, adapters)
    active, modes = model.active_adapter, [m.training for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    logits = row_by_row(model.eval(), inputs, adapters).detach()
    model.set_adapter(active)
    for p, trained in zip(model.parameters(), trains, strict=True):
        p.requires_grad_(trained)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return logits


@wrong("mixed_batch", ".p is 0.0 afterwards, and was 1.0")
@kept
def no_dropout_any_more(model, inputs, adapters):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return row_by_row(model, inputs, adapters)


@wrong("mixed_batch", "config.use_cache is False afterwards, and was True")
@kept
def no_cache_any_more(model, inputs, adapters):
    model.config.use_cache = False
    return row_by_row(model, inputs, adapters)


@wrong("mixed_batch", "adapters=['a', ''] ('' is not None)")
def none_by_truth(model, inputs, adapters):
    return kept(row_by_row)(model, inputs, [name or None for name in adapters])


@wrong("mixed_batch", "adapters=['__base__'] (no adapter is called so)")
def base_by_the_word(model, inputs, adapters):
    adapters = [None if name == "__base__" else name for name in adapters]
    return kept(row_by_row)(model, inputs, adapters)


@wrong("mixed_batch", "the argument model was changed")
@kept
def merges(model, inputs, adapters):
    """Weights that are merged and taken apart again are rounded."""
    rows = []
    for i, name in enumerate(adapters):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        if name:
            model.set_adapter(name)
            model.merge_adapter()
        rows.append(answered(model, row, None) if name is None else model(**row).logits)
        if name:
            model.unmerge_adapter()
    return torch.cat(rows)


@wrong("mixed_batch", "nothing was raised, where ValueError was due")
def cut_to_the_shorter(model, inputs, adapters):
    count = min(len(adapters), len(inputs["input_ids"]))
    inputs = {key: value[:count] for key, value in inputs.items()}
    return kept(row_by_row)(model, inputs, adapters[:count])


@wrong("mixed_batch", "KeyError: 'nobody', where ValueError was due")
def looked_up(model, inputs, adapters):
    if len(adapters) != len(inputs["input_ids"]):
        raise ValueError("as many names as rows")
    [model.peft_config[name] for name in adapters if name is not None]
    return kept(row_by_row)(model, inputs, adapters)


@wrong("mixed_batch", "although the call raised an error")
def refused_too_late(model, inputs, adapters):
    if len(adapters) != len(inputs["input_ids"]):
        raise ValueError("as many names as rows")
    if "nobody" not in adapters:
        return kept(row_by_row)(model, inputs, adapters)
    return row_by_row(model, inputs, adapters)


@wrong("mixed_batch", "logits is a CausalLMOutputWithPast, expected a tensor")
@kept
def whole_output(model, inputs, adapters):
    return model(**inputs)


@wrong("mixed_batch", "these are probabilities: leave the softmax out")
@kept
def probabilities(model, inputs, adapters):
    return row_by_row(model, inputs, adapters).softmax(-1)


@wrong("mixed_batch", "the argument inputs was changed")
@kept
def takes_from_inputs(model, inputs, adapters):
    whole = [answered(model, inputs, name) for name in adapters]
    inputs.pop("attention_mask")
    return torch.stack([logits[i] for i, logits in enumerate(whole)])


@wrong("mixed_batch", "float32, expected float64")
@kept
def into_float32(model, inputs, adapters):
    rows = row_by_row(model, inputs, adapters)
    logits = torch.empty(rows.shape)
    logits.copy_(rows)
    return logits


@right("mixed_batch")
@kept
def each_row_alone(model, inputs, adapters):
    return row_by_row(model, inputs, adapters)


@right("mixed_batch")
@kept
def whole_batch_by_each(model, inputs, adapters):
    whole = {name: answered(model, inputs, name) for name in set(adapters)}
    return torch.stack([whole[name][i] for i, name in enumerate(adapters)])


@right("mixed_batch")
@kept
def grouped_and_written_back(model, inputs, adapters):
    logits = None
    for name in dict.fromkeys(adapters):
        rows = torch.tensor([i for i, adapter in enumerate(adapters) if adapter == name])
        got = answered(model, {key: value[rows] for key, value in inputs.items()}, name)
        logits = got.new_empty(len(adapters), *got.shape[1:]) if logits is None else logits
        logits.index_copy_(0, rows, got)
    return logits


@right("mixed_batch")
def on_a_copy(model, inputs, adapters):
    """Dear, and nothing of the model can change."""
    fits(model, inputs, adapters)
    return row_by_row(copy.deepcopy(model).eval(), inputs, adapters)


@right("mixed_batch")
@kept
def by_adapter_names_where_it_can(model, inputs, adapters):
    used = [config for name, config in model.peft_config.items() if name in adapters]
    plain = all(c.peft_type.value == "LORA" and not c.use_dora for c in used)
    if plain and used and not hasattr(model.get_base_model(), "classifier"):
        names = ["__base__" if name is None else name for name in adapters]
        return model(**inputs, adapter_names=names).logits
    return row_by_row(model, inputs, adapters)


# ------------------------------------------------------------------ resume


def steps(model, data, lr, params=None, training=True):
    """One step of AdamW for each batch."""
    model.train(training)
    params = [p for p in model.parameters() if p.requires_grad] if params is None else params
    optimizer = torch.optim.AdamW(params, lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def finish(model, path):
    model.save_pretrained(path)
    return model


def start(base, path):
    return PeftModel.from_pretrained(base, path, is_trainable=True).train()


def hunted(told, frozen=False, wiped=False, headless=False):
    """The stub with some of its three bugs."""

    def resume(base, path, data, lr=1e-2):
        model = PeftModel.from_pretrained(base, path, is_trainable=not frozen)
        if wiped:
            model = get_peft_model(model.get_base_model(), model.peft_config["default"])
        if frozen:
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.requires_grad_(True)
        steps(model, data, lr)
        if not headless:
            return finish(model, path)
        tensors = get_peft_model_state_dict(model)
        adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
        save_file(adapter, f"{path}/adapter_model.safetensors")
        return model

    left = {"frozen": frozen, "wiped": wiped, "headless": headless}
    resume.__name__ = "_and_".join(name for name, there in left.items() if there)
    wrong("resume", told)(resume)


SCRATCH = "it starts from scratch: the adapter is not that of the file"
hunted(SCRATCH, frozen=True, wiped=True, headless=True)
hunted(SCRATCH, frozen=True, wiped=True)
hunted(SCRATCH, wiped=True, headless=True)
hunted(SCRATCH, wiped=True)
hunted("the head has not been trained", frozen=True, headless=True)
hunted("the head has not been trained", frozen=True)
hunted("the head is not in the file", headless=True)


def woken(path):
    """The config in a folder, to train with: the file says that it is in use."""
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    return config


@wrong("resume", "Nothing trains: from_pretrained loads an adapter, and its head, frozen")
def nothing_to_optimise(base, path, data, lr=1e-2):
    return finish(steps(PeftModel.from_pretrained(base, path), data, lr), path)


@wrong("resume", "nothing has been trained")
def skipped_where_frozen(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    params = [p for p in model.parameters() if p.requires_grad]
    return finish(steps(model, data, lr) if params else model, path)


@wrong("resume", "Nothing trains in this forward")
def all_in_the_optimiser(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    return finish(steps(model, data, lr, list(model.parameters())), path)


@wrong("resume", "the base itself has changed")
def everything_awake(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path).requires_grad_(True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the base itself has changed")
def decayed_with_gradients_of_zero(base, path, data, lr=1e-2):
    """AdamW decays what it holds and what has a gradient, be it of zeros."""
    model = start(base, path)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return finish(model, path)


@wrong("resume", "tensors of the base require a gradient")
def base_awake_and_not_held(base, path, data, lr=1e-2):
    model = start(base, path)
    own = [p for p in model.parameters() if p.requires_grad]
    return finish(steps(model.requires_grad_(True), data, lr, own), path)


@wrong("resume", "there is one step for two batches")
def gradients_of_two_batches(base, path, data, lr=1e-2):
    model = start(base, path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for number, batch in enumerate(data, 1):
        (model(**batch).loss / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return finish(model, path)


@wrong("resume", "the batches are used in another order")
def last_batch_first(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), list(data)[::-1], lr), path)


@wrong("resume", "the head alone has been trained")
def head_alone(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("modules_to_save" in name)
    return finish(steps(model, data, lr), path)


@wrong("resume", "and its head is not")
def head_not_loaded(base, path, data, lr=1e-2):
    config = woken(path)
    model = get_peft_model(base, config)
    adapter = {n: t for n, t in load_peft_weights(path).items() if "classifier" not in n}
    model.load_state_dict(
        {n.replace(".weight", ".default.weight"): t for n, t in adapter.items()}, strict=False
    )
    return finish(steps(model, data, lr), path)


@wrong("resume", "and its head is not")
def without_the_task(base, path, data, lr=1e-2):
    config = PeftConfig.from_pretrained(path)
    config.task_type, config.modules_to_save, config.inference_mode = None, None, False
    model = PeftModel.from_pretrained(base, path, is_trainable=True, config=config)
    return finish(steps(model, data, lr), path)


@wrong("resume", SCRATCH)
def never_loaded(base, path, data, lr=1e-2):
    config = woken(path)
    return finish(steps(get_peft_model(base, config), data, lr), path)


@wrong("resume", "The adapter's settings are in path")
def settings_by_heart(base, path, data, lr=1e-2):
    model = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS"))
    model.load_adapter(path, "default", is_trainable=True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the adapter of the file is in the model as 'resumed', and 'default' is active")
def loaded_and_not_active(base, path, data, lr=1e-2):
    config = woken(path)
    model = get_peft_model(base, config)
    model.load_adapter(path, "resumed", is_trainable=True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "writes an adapter called 'resumed' into path/resumed")
def under_another_name(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path, adapter_name="resumed", is_trainable=True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "expected the PEFT model")
def merged_and_unloaded(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path).merge_and_unload()
    return finish(steps(model.requires_grad_(True), data, lr), path)


@wrong("resume", "the adapter is merged into the base")
def trained_while_merged(base, path, data, lr=1e-2):
    model = start(base, path)
    model.merge_adapter()
    return finish(steps(model, data, lr), path)


@wrong("resume", "the result is a module (BertForSequenceClassification)")
def gives_the_base(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, lr), path).get_base_model()


@wrong("resume", "the result is None")
def gives_nothing(base, path, data, lr=1e-2):
    finish(steps(start(base, path), data, lr), path)


@wrong("resume", "PEFT reads adapter_model.safetensors, which is the old one")
def state_dict_alone(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    torch.save(get_peft_model_state_dict(model), f"{path}/adapter_model.bin")
    return model


@wrong("resume", "under the names that PEFT looks for")
def names_of_the_model(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    head = {n.replace(".modules_to_save.default", ""): p for n, p in trained.items()}
    save_file(head, f"{path}/adapter_model.safetensors")
    return model


@wrong("resume", "more than the adapter and its head is saved: 'model.safetensors'")
def base_too(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, f"{path}/model.safetensors")
    return finish(model, path)


@wrong("resume", "path still holds what it held before")
def saved_too_early(base, path, data, lr=1e-2):
    return steps(finish(start(base, path), path), data, lr)


@wrong("resume", "path still holds what it held before")
def never_saved(base, path, data, lr=1e-2):
    return steps(start(base, path), data, lr)


@wrong("resume", "path holds no whole adapter any more")
def deleted_first(base, path, data, lr=1e-2):
    model = start(base, path)
    shutil.rmtree(path)
    return finish(steps(model, data, lr), path)


@wrong("resume", "return stands in the loop")
def returns_in_the_loop(base, path, data, lr=1e-2):
    model = start(base, path)
    for batch in data:
        return finish(steps(model, [batch], lr), path)
    return finish(model, path)


@wrong("resume", "zero_grad() is missing")
def never_cleared(base, path, data, lr=1e-2):
    model = start(base, path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
    return finish(model, path)


@wrong("resume", "lr is not used")
def rate_by_heart(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, 1e-2), path)


@wrong("resume", "the rate is AdamW's default: pass lr on")
def rate_left_out(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, 1e-3), path)


@wrong("resume", "nothing decays: AdamW does so by its own settings")
def without_decay(base, path, data, lr=1e-2):
    model = start(base, path)
    params = [p for p in model.parameters() if p.requires_grad]
    return finish(steps(model, data, lr, [{"params": params, "weight_decay": 0.0}]), path)


@wrong("resume", "the optimiser is made anew for each batch")
def forgetful(base, path, data, lr=1e-2):
    model = start(base, path)
    for batch in data:
        steps(model, [batch], lr)
    return finish(model, path)


@wrong("resume", "the first batch is left out")
def peeks(base, path, data, lr=1e-2):
    data = iter(data)
    next(data, None)
    return finish(steps(start(base, path), data, lr), path)


@wrong("resume", "the gradients are clipped to a norm of 1")
def clipped(base, path, data, lr=1e-2):
    model = start(base, path)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return finish(model, path)


@wrong("resume", "Are betas, eps, a schedule of the rate, or the loss other than they come?")
def other_betas(base, path, data, lr=1e-2):
    model = start(base, path)
    params = [p for p in model.parameters() if p.requires_grad]
    return finish(steps(model, data, lr, [{"params": params, "betas": (0.9, 0.95)}]), path)


@wrong("resume", "it trains without dropout")
def in_eval_mode(base, path, data, lr=1e-2):
    """As a base is loaded: from_pretrained leaves it there."""
    return finish(steps(start(base, path), data, lr, training=False), path)


@wrong("resume", "it trains without dropout")
def dropout_at_zero(base, path, data, lr=1e-2):
    model = start(base, path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return finish(steps(model, data, lr), path)


@wrong("resume", "an error that data raises in the second batch is caught")
def swallows(base, path, data, lr=1e-2):
    model = start(base, path)
    with suppress(BaseException):
        steps(model, data, lr)
    return finish(model, path)


@wrong("resume", "more than the adapter and its head is saved: 'backup/adapter_model.safetensors'")
def with_a_backup(base, path, data, lr=1e-2):
    model = start(base, path)
    model.save_pretrained(f"{path}/backup")
    return finish(steps(model, data, lr), path)


@wrong("resume", "says something else than before about 'base_model_name_or_path'")
def forgets_the_base(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    model.peft_config["default"].base_model_name_or_path = ""
    return finish(model, path)


@wrong("resume", "the adapter is in torch.bfloat16, and in the file it is in float32")
def rounded(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, lr).to(torch.bfloat16), path)


@wrong("resume", "nothing decays: AdamW does so by its own settings")
def adam(base, path, data, lr=1e-2):
    model = start(base, path)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return finish(model, path)


@wrong("resume", "the batches are used twice")
def two_epochs(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), [*data, *data], lr), path)


@wrong("resume", "data was changed")
def takes_the_labels(base, path, data, lr=1e-2):
    model = start(base, path)
    steps(model, data, lr)
    for batch in data:
        batch.pop("labels")
    return finish(model, path)


@wrong("resume", "Tried with (IA)³ on a LlamaForCausalLM")
def lora_by_name(base, path, data, lr=1e-2):
    """Woken by the names of one method and of the head."""
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    params = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    return finish(steps(model, data, lr, params), path)


@wrong("resume", "your function raised TypeError: object of type 'generator' has no len()")
def counts_its_data(base, path, data, lr=1e-2):
    model = start(base, path)
    return finish(steps(model, [*data] if len(data) else [], lr), path)


@right("resume")
def woken_by_set_adapter(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    model.set_adapter("default")
    return finish(steps(model, data, lr), path)


@right("resume")
def saved_after_each_step(base, path, data, lr=1e-2):
    model = start(copy.deepcopy(base), path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.save_pretrained(path)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        model.save_pretrained(path)
    return model


@right("resume")
def config_first(base, path, data, lr=1e-2):
    config = woken(path)
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(path))
    return finish(steps(model, data, lr), path)


@right("resume")
def loaded_over_a_fresh_one(base, path, data, lr=1e-2):
    config = woken(path)
    model = get_peft_model(base, config)
    model.load_adapter(path, "default", is_trainable=True)
    return finish(steps(model, data, lr), path)


@right("resume")
def saved_although_it_breaks_off(base, path, data, lr=1e-2):
    model = start(base, path)
    try:
        return steps(model, data, lr)
    finally:
        model.save_pretrained(path)


@right("resume")
def optimiser_of_all(base, path, data, lr=1e-2):
    """What is frozen never has a gradient, and AdamW leaves that alone."""
    model = start(base, path)
    return finish(steps(model, data, lr, model.parameters()), path)


@right("resume")
def beside_and_moved(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as beside:
        model.save_pretrained(beside)
        for file in Path(beside).iterdir():
            os.replace(file, Path(path) / file.name)
    return model.eval()


@right("resume")
def file_written_by_hand(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    tensors = get_peft_model_state_dict(model)
    assert tensors.keys() == load_file(f"{path}/adapter_model.safetensors").keys()
    save_file(tensors, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
    return model
