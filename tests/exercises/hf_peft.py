"""Answers to the exercises of lesson 12."""

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
from safetensors.torch import save_file
from torch import nn

from . import Answers

answers = Answers()
wrong, right = answers.wrong, answers.right


# ------------------------------------------------------------------ config_for

SECOND = r".*layer\.\d+\.output\.dense"
IA3 = {
    "llama": dict(target_modules=["k_proj", "v_proj", "down_proj"]),
    "bert": dict(target_modules=rf".*self\.(key|value)|{SECOND}", feedforward_modules=SECOND),
}


def family(model):
    return "bert" if hasattr(model, "classifier") else "llama"


def made(method, model, own=None, low_rank=None, **changes):
    """A right config, but for `changes` of all methods, those of the low-rank ones, and those of
    some by name, {"ia3": {...}}, or for one model, {"bert ia3": {...}}; what is ... is left out."""
    low = dict(target_modules="all-linear", lora_alpha=16) | (low_rank or {})
    config, settings = {
        "lora": (LoraConfig, low),
        "dora": (LoraConfig, low | dict(use_dora=True)),
        "adalora": (AdaLoraConfig, low | dict(total_step=200)),
        "ia3": (IA3Config, IA3[family(model)]),
        "prefix": (PrefixTuningConfig, dict(num_virtual_tokens=5)),
        "prompt": (PromptTuningConfig, dict(num_virtual_tokens=5)),
    }[method]
    settings = {"task_type": "SEQ_CLS" if family(model) == "bert" else "CAUSAL_LM"} | settings
    settings |= changes
    for name in (method, f"{family(model)} {method}"):
        settings |= (own or {}).get(name, {})
    return config(**{name: value for name, value in settings.items() if value is not ...})


def rejected(told, own=None, low_rank=None, **changes):
    """A wrong answer with these changes of a right one."""

    def config_for(method, model):
        return made(method, model, own, low_rank, **changes)

    wrong("config_for", told)(config_for)


def targets(*names, **more):
    return dict(target_modules=list(names), **more)


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FROZEN = "PEFT then leaves the new classification head frozen"
rejected(FROZEN, task_type=...)
rejected("raises KeyError: None", {"prompt": dict(task_type=None)})
rejected("task_type is 'CAUSAL_LM', but the model's class says 'SEQ_CLS'", task_type="CAUSAL_LM")
rejected("task_type is 'SEQ_CLS', but the model's class says 'CAUSAL_LM'", task_type="SEQ_CLS")
rejected("use_dora is False", {"dora": dict(use_dora=False)})
rejected("use_dora is True: use_dora=True makes a DoRA", {"lora": dict(use_dora=True)})
rejected("AdaLoRA does not work when `total_step` is None", {"adalora": dict(total_step=None)})
rejected("get_peft_model refuses this config", {"prefix": dict(num_virtual_tokens=...)})
rejected("PEFT takes its default for this architecture", low_rank=dict(target_modules=...))
rejected("layers are left out: 'bert.encoder", low_rank=targets("query", "value"))
rejected("No layer is called 'dens'", low_rank=targets("query", "key", "value", "dens"))
rejected("it is tied to the embedding", {"llama lora": targets(*LLAMA, "lm_head")})
rejected(
    "PEFT's default for a BERT does", {"ia3": dict(target_modules=..., feedforward_modules=...)}
)
rejected(
    "output.dense also matches attention.output.dense.",
    {"bert ia3": targets("key", "value", "output.dense", feedforward_modules=["output.dense"])},
)
rejected(
    "the output is scaled: for the second feed-forward matrix scale the input",
    {"ia3": dict(feedforward_modules=[])},
)
rejected(
    "layers are adapted that should not be: 'bert.encoder.layer.0.intermediate.dense'",
    {"bert ia3": dict(target_modules=rf".*(key|value|intermediate\.dense)|{SECOND}")},
)


@wrong("config_for", "lora, dora: right; the config for adalora is missing")
def config_for(method, model):
    if method not in ("lora", "dora"):
        raise NotImplementedError
    return made(method, model)


@wrong("config_for", "the head 'classifier' is a target too: it trains in full already")
def every_linear_layer(method, model):
    """The names of all linear layers, as many recipes collect them."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return made(method, model, low_rank=dict(target_modules=layers))


@wrong("config_for", "this is a config of P_TUNING, expected one of PROMPT_TUNING")
def p_tuning(method, model):
    if method == "prompt":
        return PromptEncoderConfig(num_virtual_tokens=5, task_type="SEQ_CLS")
    return made(method, model)


@wrong("config_for", "the model was changed")
def tries_it_out(method, model):
    config = LoraConfig(task_type="SEQ_CLS")
    get_peft_model(model, config).print_trainable_parameters()
    return config


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
    if method == "ia3":  # PEFT's own choice
        return IA3Config(task_type=kind)
    return made(method, model, task_type=kind)


@right("config_for")
def other_numbers(method, model):
    own = {
        "lora": dict(r=4, lora_alpha=3, lora_dropout=0.05, use_rslora=True),
        "dora": dict(r=64, lora_alpha=128, init_lora_weights="gaussian"),
        "adalora": dict(init_r=6, target_r=2, tinit=10, tfinal=60, deltaT=5),
        "prefix": dict(num_virtual_tokens=100, prefix_projection=True, encoder_hidden_size=8),
        "prompt": dict(num_virtual_tokens=1, prompt_tuning_init="SAMPLE_VOCAB"),
    }
    return made(method, model, own)


# ------------------------------------------------------------------ mixed_batch


def kept(mixed_batch):
    """The function, made to leave the same adapter active."""

    def wrapped(model, inputs, adapters):
        active = model.active_adapter
        with torch.no_grad():
            logits = mixed_batch(model.eval(), inputs, adapters)
        model.set_adapter(active)
        return logits

    wrapped.__name__ = mixed_batch.__name__
    return wrapped


def row_by_row(model, inputs, adapters):
    rows = []
    for i, name in enumerate(adapters):
        row = {key: t[i : i + 1] for key, t in inputs.items()}
        if name is None:
            with model.disable_adapter():
                rows.append(model(**row).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**row).logits)
    return torch.cat(rows)


@wrong("mixed_batch", "the active adapter is ['a'] afterwards, and was ['b']")
@torch.no_grad()
def leaves_another_active(model, inputs, adapters):
    return row_by_row(model.eval(), inputs, adapters)


@wrong("mixed_batch", "the adapters are switched off afterwards")
def leaves_them_off(model, inputs, adapters):
    logits = kept(row_by_row)(model, inputs, adapters)
    model.base_model.disable_adapter_layers()
    return logits


@right("mixed_batch")
@torch.no_grad()
def by_adapter_names(model, inputs, adapters):
    names = [name or "__base__" for name in adapters]
    return model.eval()(**inputs, adapter_names=names).logits


@right("mixed_batch")
@kept
def one_row_at_a_time(model, inputs, adapters):
    return row_by_row(model, inputs, adapters)


# ------------------------------------------------------------------ resume


def steps(model, data, lr, params=None):
    """One step of AdamW for each batch."""
    model.train()
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


SCRATCH = "it starts from scratch: the adapter is not that of the file"


@wrong("resume", SCRATCH)
def wiped(base, path, data, lr=1e-2):
    loaded = start(base, path)
    model = get_peft_model(loaded.get_base_model(), loaded.peft_config["default"])
    return finish(steps(model, data, lr), path)


@wrong("resume", "the head is still that of the file")
def frozen_head(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the head is not in the file")
def headless(base, path, data, lr=1e-2):
    model = steps(start(base, path), data, lr)
    tensors = get_peft_model_state_dict(model)
    adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(adapter, f"{path}/adapter_model.safetensors")
    return model


@wrong("resume", "Nothing trains: from_pretrained loads an adapter and its head frozen")
def nothing_to_optimise(base, path, data, lr=1e-2):
    return finish(steps(PeftModel.from_pretrained(base, path), data, lr), path)


@wrong("resume", "Nothing trains in this forward")
def all_in_the_optimiser(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    return finish(steps(model, data, lr, list(model.parameters())), path)


@wrong("resume", "nothing has been trained")
def never_steps(base, path, data, lr=1e-2):
    model = start(base, path)
    for batch in data:
        model(**batch).loss.backward()
    return finish(model, path)


@wrong("resume", "loaded from path, the model is not the one that was returned")
def everything_awake(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path).requires_grad_(True)
    return finish(steps(model, data, lr), path)


@wrong("resume", "but the head is not")
def without_the_task(base, path, data, lr=1e-2):
    config = PeftConfig.from_pretrained(path)
    config.task_type, config.modules_to_save, config.inference_mode = None, None, False
    model = PeftModel.from_pretrained(base, path, is_trainable=True, config=config)
    return finish(steps(model, data, lr), path)


@wrong("resume", "the result is a module (BertForSequenceClassification)")
def gives_the_base(base, path, data, lr=1e-2):
    return finish(steps(start(base, path), data, lr), path).get_base_model()


@wrong("resume", "path still holds what it held before")
def saved_too_early(base, path, data, lr=1e-2):
    return steps(finish(start(base, path), path), data, lr)


@right("resume")
def woken_by_names(base, path, data, lr=1e-2):
    model = PeftModel.from_pretrained(base, path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    return finish(steps(model, data, lr), path)


@right("resume")
def config_first(base, path, data, lr=1e-2):
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(path))
    return finish(steps(model, data, lr), path)
