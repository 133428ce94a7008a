"""Checks of lesson 12.

peft takes seconds to import, so it is imported where it is needed.
"""

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .compare import difference, kind, number, state
from .kit import Case, Check, Refused, Tried, Verdict, refused, summary
from .mistakes import mistakes


class _Quiet(Check):
    """A check in which PEFT's warnings, about what is tried here, are not heard."""

    def __call__(self, function: Callable) -> Verdict:
        __tracebackhide__ = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().__call__(function)


class _Tried(_Quiet, Tried):
    """A check by trials, in quiet."""


def _by_the_learner(*trials: Callable[[Callable], str]) -> dict[Callable, str]:
    """Trials in which nothing but the learner's function should raise an error."""
    return dict.fromkeys(trials, "your function")


def _called(function: Callable, *args: Any, told: str) -> Any:
    """What the function returns; what it raises is told with a note of how it was called."""
    try:
        return function(*args)
    except Exception as error:
        error.add_note(told)
        raise


# ------------------------------------------------------------------ small models

_SIZES = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=48)
_GROUPED = dict(num_key_value_heads=2, max_position_embeddings=64)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


_FAMILIES = {
    "bert": lambda layers: BertForSequenceClassification(
        BertConfig(
            **_SIZES,
            **_NO_DROPOUT,
            num_hidden_layers=layers,
            max_position_embeddings=64,
            num_labels=2,
        )
    ),
    "llama": lambda layers: LlamaForCausalLM(
        LlamaConfig(**_SIZES, **_GROUPED, num_hidden_layers=layers, tie_word_embeddings=True)
    ),
    "qwen2": lambda layers: Qwen2ForCausalLM(
        Qwen2Config(**_SIZES, **_GROUPED, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2)
    ),
}


@cache
def _original(family: str, layers: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(0)
        model = _FAMILIES[family](layers).eval()
        for p in model.parameters():  # biases that start at 0 would hide that they are lost
            p.add_(0.1 * torch.randn_like(p))
    return model


def _model(family: str, layers: int = 2) -> nn.Module:
    return copy.deepcopy(_original(family, layers))


def _batch(family: str, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of 4 to 9 tokens with labels; padded on the left for a causal model."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 9), generator=drawn)
    mask = (torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=drawn)).long()
    if family == "bert":
        labels = torch.randint(2, (rows,), generator=drawn)
    else:
        mask = mask.flip(1)
        labels = ids.where(mask.bool(), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a part of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item() if a.shape == b.shape else torch.inf


def _shaken(model: nn.Module, size: float = 0.2, seed: int = 7) -> nn.Module:
    """The model with all that trains moved at random, as after training."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=drawn).to(p.dtype))
    return model


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(repr(name) for name in names[:2]) + more


# ------------------------------------------------------------------ config_for

_STEPS = 200  # of the run that AdaLoRA's schedule is for
_RANK = 16  # no layer of the small models is narrower
_TOKENS = 32  # a small model has few positions
_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
}
_LOW_RANK, _PROMPTS = ("lora", "dora", "adalora"), ("prefix", "prompt")
_HEADS = ("classifier", "lm_head")
# Settings that PEFT takes as they are, and that a refusal may come from; by default all are empty.
_RARE = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform", "layer_replication"),
    *("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"),
)


def _task_of(family: str) -> str:
    return "SEQ_CLS" if family == "bert" else "CAUSAL_LM"


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and re.search(r"layers?\.\d", n)}


def _is_second(path: str) -> bool:
    """Whether a layer is the second matrix of a feed-forward block."""
    return bool(re.search(r"down_proj$|layer\.\d+\.output\.dense$", path))


def _is_scaled(path: str) -> bool:
    return _is_second(path) or bool(re.search(r"\.(key|value|k_proj|v_proj)$", path))


def _fitting(family: str, *methods: str, layers: int = 2) -> Callable[[Callable], str]:
    """A trial: the configs of these methods, each tried on a small model."""

    def trial(function: Callable) -> str:
        for method in methods:
            _try_config(function, method, family, layers)
        name = type(_original(family, layers)).__name__
        return f"{', '.join(methods)} on a {name} of {layers} layers"

    return trial


def _try_config(function: Callable, method: str, family: str, layers: int) -> None:
    from peft import get_peft_model

    model = _model(family, layers)
    what = f"a small {type(model).__name__} of {layers} layers"
    where = f"Called with: method={method!r}, model: {what}."
    before, settings = state(model), model.config.to_dict()
    config = _called(function, method, model, told=where)
    try:
        _leaves_alone(model, before, settings)
        _is_of_the_method(config, method)
        _knows_its_task(config, method, family)
        _has_sound_numbers(config, method)
        adapted = get_peft_model(_model(family, layers), copy.deepcopy(config))
        if method not in _PROMPTS:
            _sits_where_it_should(adapted, config, method, family, layers)
        _trains_what_it_should(adapted, config, method, family)
        _starts_and_learns(adapted, config, method, family, layers)
    except Exception as error:
        raised = f"no model can be made, or run, with this config: {summary(error)}"
        headline, *facts = error.args if isinstance(error, Refused) else [raised]
        if rare := [f"{n}={getattr(config, n)!r}" for n in _RARE if getattr(config, n, None)]:
            facts.append(f"Seldom set, and set here: {', '.join(rare)}.")
        raise Refused(headline, where, *facts) from None


def _leaves_alone(model: nn.Module, before: dict, settings: dict) -> None:
    if problem := difference(state(model), before, "", 0.0):
        raise Refused(
            "the model was changed: leave it as it was",
            f"{problem[:150]}.",
            "get_peft_model puts its layers into the model that it is given, and a second call "
            "wraps them once more: give the config alone.",
        )
    if model.config.to_dict() != settings:
        raise Refused("model.config was changed: leave it as it was")


def _is_of_the_method(config: Any, method: str) -> None:
    from peft import PeftConfig, PeftModel

    if config is None:
        raise Refused("the result is None: is a return statement missing?")
    if isinstance(config, PeftModel):
        raise Refused("the result is a PEFT model: give the config, not what it makes of a model")
    if not isinstance(config, PeftConfig):
        raise Refused(f"the result is {kind(config)}, expected a config of PEFT")
    if (got := config.peft_type.value) != _TYPES[method]:
        raise Refused(f"this is a config of {got}, expected one of {_TYPES[method]}")
    if (dora := getattr(config, "use_dora", False)) != (method == "dora"):
        told = "use_dora=True makes a DoRA" if dora else "a DoRA is a LoRA with use_dora=True"
        raise Refused(f"use_dora is {dora}: {told}")
    if config.inference_mode:
        raise Refused("inference_mode is True, so nothing trains: that is for an adapter in use")


def _knows_its_task(config: Any, method: str, family: str) -> None:
    due = _task_of(family)
    given = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    if given == due:
        return
    lost = []
    if family == "bert" and given in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        lost.append("get_peft_model raises AttributeError, as this model cannot generate")
    elif method in _PROMPTS and not given:
        lost.append("get_peft_model raises KeyError: None")
    elif family == "bert" and given != "TOKEN_CLS":
        lost.append("PEFT then leaves the fresh head frozen, at its random start")
    if method == "adalora" and not given:
        lost.append("AdaLoRA's regulariser is never added to the loss")
    facts = [f"{'; '.join(lost)}."] if lost else []
    if not given:
        raise Refused(f"task_type is missing: {due!r} is due", *facts)
    raise Refused(f"task_type is {given!r}, and the model's class says {due!r}", *facts)


def _has_sound_numbers(config: Any, method: str) -> None:
    if method in _PROMPTS:
        tokens = config.num_virtual_tokens
        if not isinstance(tokens, int) or not 1 <= tokens <= _TOKENS:
            raise Refused(f"num_virtual_tokens is {tokens!r}: choose 1 to {_TOKENS}")
        return
    if method == "ia3":
        return
    if config.trainable_token_indices:
        raise Refused("trainable_token_indices trains rows of the embedding, which is the base's")
    if config.lora_alpha <= 0:
        raise Refused(f"lora_alpha is {config.lora_alpha}: PEFT takes it, and it must be above 0")
    if not 0 <= config.lora_dropout < 1:
        raise Refused(
            f"lora_dropout is {config.lora_dropout}: PEFT takes it, and no number comes through"
        )
    if method == "adalora":
        _has_a_schedule(config)


def _has_a_schedule(config: Any) -> None:
    first, last, total = config.init_r, config.target_r, config.total_step
    if last >= first:
        raise Refused(
            f"target_r={last} is not below init_r={first}: there is nothing to prune",
            "PEFT takes it, and raises an error in training, at the first allocation.",
        )
    if last < 1:
        raise Refused(f"target_r={last} prunes everything")
    if total != _STEPS:
        late = "the ranks never come down to target_r" if total > _STEPS else "it prunes too early"
        raise Refused(f"total_step is {total}, and the run has {_STEPS} steps: {late}")
    times = (total - config.tfinal - config.tinit) // config.deltaT
    if times < 2:
        raise Refused(
            f"deltaT={config.deltaT} leaves no time to prune step by step: between step "
            f"tinit={config.tinit} and step total_step - tfinal={total - config.tfinal} it must "
            "fit in more than once"
        )


def _places(adapted: nn.Module) -> dict[str, nn.Module]:
    """The modules that a config has put something into, by their names in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {n: m for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    return {n.removeprefix("base_model.model."): m for n, m in found.items()}


def _sits_where_it_should(
    adapted: nn.Module, config: Any, method: str, family: str, layers: int
) -> None:
    places, inside = _places(adapted), _layers(_original(family, layers))
    heads = [name for name in places if name.partition(".")[0] in _HEADS]
    asked = config.target_modules
    asked = [asked] if isinstance(asked, str) else sorted(asked or ())
    heads += [n for n in asked if n in _HEADS and n not in heads]
    if heads:
        tied = "it is tied to the embedding, and merging would change both"
        told = "it trains in full already" if family == "bert" else tied
        raise Refused(f"the head {heads[0]!r} is a target too: {told}")
    low_rank = method in _LOW_RANK
    due = [name for name in inside if low_rank or _is_scaled(name)]
    spare = ["bert.pooler.dense"] if low_rank else []
    if missing := [name for name in due if name not in places]:
        told = _why_missing(missing, asked, adapted, config)
        raise Refused(f"{len(missing)} of {len(due)} layers are left out: {_few(missing)}", *told)
    if extra := [name for name in places if name not in due + spare]:
        told = []
        if any(name.endswith("attention.output.dense") for name in extra):
            own = ", and PEFT's default for a BERT does" if not config.target_modules else ""
            told = [f"output.dense also matches attention.output.dense{own}."]
        raise Refused(f"what is adapted too, and should not be: {_few(extra)}", *told)
    if method != "ia3":
        return
    for path, layer in places.items():
        if layer.is_feedforward != _is_second(path):
            got, of, due = "input", "keys and values", "output"
            if _is_second(path):
                got, of, due = "output", "the second feed-forward matrix", "input"
            raise Refused(
                f"in {path!r} the {got} is scaled: of {of} it is the {due}",
                "feedforward_modules names the layers whose input is scaled.",
            )


def _why_missing(missing, asked, adapted, config) -> list[str]:
    if not config.target_modules:
        return ["Without target_modules PEFT takes its default for this architecture."]
    ends = {name.rpartition(".")[2] for name, _ in adapted.named_modules()}
    unknown = [name for name in asked if re.fullmatch(r"[a-z_]+", name) and name not in ends]
    if unknown and len(asked) > 1:
        return [f"No layer is called {_few(unknown)}: while another name matches, PEFT is silent."]
    if re.search(r"\.\d\d", missing[0]):  # and none before it is missing
        return [r"A number may have two digits: \d is one, \d+ is any."]
    return []


_ADDED = ("lora_", "ia3_", "prompt_encoder", "modules_to_save")


def _trains_what_it_should(adapted: nn.Module, config: Any, method: str, family: str) -> None:
    trains = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    full = [n for n in trains if "modules_to_save" in n]
    if family == "bert" and not any("classifier" in n for n in full):
        raise Refused("the fresh head does not train")
    if of_base := [n for n in trains if not any(part in n for part in _ADDED)]:
        told = ["bias='none' keeps the base's biases as they are."]
        told = told if all(n.endswith("bias") for n in of_base) else []
        raise Refused(
            f"{len(of_base)} tensors of the base train too: {_few(_shorter(of_base))}", *told
        )
    if others := [n for n in full if "classifier" not in n]:
        count = number(sum(trains[n].numel() for n in others))
        raise Refused(
            f"a full copy of a module trains, {count} numbers: {_few(_shorter(others))}",
            "In modules_to_save stands what starts at random; this model's head is trained.",
        )
    if method in _PROMPTS:
        return
    own = sum(p.numel() for n, p in trains.items() if n not in full)
    due = 0
    for name, layer in _places(adapted).items():
        n_in, n_out = layer.in_features, layer.out_features
        if method == "ia3":
            due += n_in if _is_second(name) else n_out
            continue
        rank = layer.r["default"]
        if rank > _RANK:
            raise Refused(f"rank {rank} of {name!r} is above {_RANK}, the most that is asked for")
        due += rank * (n_in + n_out) + {"lora": 0, "dora": n_out, "adalora": rank}[method]
    if own != due:
        raise Refused(f"{number(own)} numbers of the adapter train, expected {number(due)}")


def _shorter(names: Iterable[str]) -> Iterator[str]:
    return (
        n.replace("base_model.model.", "").replace(".modules_to_save.default", "") for n in names
    )


def _starts_and_learns(
    adapted: nn.Module, config: Any, method: str, family: str, layers: int
) -> None:
    batch = _batch(family)
    if method not in _PROMPTS:
        plain = _logits(_original(family, layers), batch)
        init = "init_ia3_weights" if method == "ia3" else "init_lora_weights"
        told = f"{init}={getattr(config, init)!r}"
        if _off(_logits(adapted, batch), plain) > 1e-4:
            raise Refused(f"at its start the model is not the base, where training begins: {told}")
        with adapted.disable_adapter():
            if _off(_logits(adapted, batch), plain) > 1e-4:
                raise Refused(
                    "with the adapter switched off, the model is not the base: "
                    f"{told} changes the base's weights"
                )
    adapted.eval()
    if method == "adalora":
        with torch.no_grad():
            added = adapted(**batch).loss - adapted.get_base_model()(**batch).loss
        if added <= 1e-4:
            raise Refused(
                "AdaLoRA's regulariser does not count in the loss: "
                f"orth_reg_weight is {config.orth_reg_weight}"
            )
    _shaken(adapted, 0.1).train()
    adapted(**batch).loss.backward()
    still = [n for n, p in adapted.named_parameters() if p.requires_grad and not _learns(p)]
    if still:
        raise Refused(f"no gradient reaches {_few(_shorter(still))}")


def _learns(p: nn.Parameter) -> bool:
    return p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any())


def _unknown(function: Callable) -> str:
    """A trial: a method that is not in the list."""
    model = _model("llama")
    try:
        function("houlsby", model)
    except ValueError as error:
        missing = [name for name in _TYPES if not re.search(rf"\b{name}\b", str(error))]
        if missing:
            raise Refused(
                f"the ValueError for method='houlsby' does not name the method {missing[0]!r}",
                f"It says: {str(error)[:120]}",
            ) from None
        return "an unknown method is refused by a message with the known ones"
    except Exception as error:
        raise Refused(
            f"for method='houlsby' it raised {summary(error)}, where ValueError was due"
        ) from None
    raise Refused("for method='houlsby' nothing was raised, where ValueError was due")


@partial(
    _Tried,
    cases=[Case(lambda: ["lora", _model("llama")])],
    trials=_by_the_learner(
        *(_fitting(family, *_TYPES) for family in ("bert", "llama", "qwen2")),
        _fitting("bert", "ia3", layers=12),
        _unknown,
    ),
    hints={
        "budgeting phase": "tinit + tfinal must be below total_step, or it never prunes.",
        "total_step": "AdaLoRA's schedule needs the number of steps of the run.",
    },
)
def config_for(method, model):
    """Each config makes of each model what the method is, and nothing else."""
    from peft import get_peft_config

    if method not in _TYPES:
        raise ValueError(f"{method!r} is none of {list(_TYPES)}")
    settings = {"peft_type": _TYPES[method]}
    settings["task_type"] = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    inside = list(_layers(model))
    if method in _PROMPTS:
        settings["num_virtual_tokens"] = 4
    elif method == "ia3":
        settings["target_modules"] = [path for path in inside if _is_scaled(path)]
        settings["feedforward_modules"] = [path for path in inside if _is_second(path)]
    else:
        settings["target_modules"] = inside
        settings |= {"total_step": _STEPS} if method == "adalora" else {}
        settings |= {"use_dora": True} if method == "dora" else {}
    return get_peft_config(settings)


# ------------------------------------------------------------------ mixed_batch


def _adapters() -> dict[str, dict[str, Any]]:
    """The adapters of each model for mixed batches: their configs by name."""
    from peft import IA3Config, LoraConfig

    head = dict(task_type="SEQ_CLS")
    return {
        "llama": {
            "a": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
            "b": LoraConfig(r=2, target_modules=["down_proj"]),
            "dora": LoraConfig(r=2, use_dora=True, target_modules=["o_proj", "up_proj"]),
        },
        "bert": {
            "a": LoraConfig(r=2, **head),
            "b": LoraConfig(r=3, lora_alpha=10, target_modules=["key"], **head),
            "headless": LoraConfig(r=2, target_modules=["query"]),
        },
        "qwen2": {"a": IA3Config(), "b": IA3Config()},
    }


@cache
def _serving(family: str) -> nn.Module:
    """A model with several trained adapters, of which the second is active."""
    from peft import get_peft_model

    configs = _adapters()[family]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        first, *others = configs
        model = get_peft_model(_model(family, layers=1), configs[first], adapter_name=first)
        for name in others:
            model.add_adapter(name, configs[name])
        for seed, name in enumerate(configs):
            model.set_adapter(name)
            _shaken(model, 0.5, seed)
        model.set_adapter("b")
    return model.eval()


def _to_serve(
    family: str,
    adapters: list[str | None],
    rows: int | None = None,
    active: str = "b",
    trains: tuple[str, ...] | None = None,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    broken: bool = False,
) -> list[Any]:
    original = _serving(family)
    settings = original.get_base_model().config
    # A copy of the settings in depth takes longer than one of the model.
    model = copy.deepcopy(original, {id(settings): copy.copy(settings)}).to(dtype)
    model.set_adapter(active)
    if trains is not None:
        for name, p in model.named_parameters():
            p.requires_grad_(any(f".{adapter}." in name for adapter in trains))
    if training:
        model.train().get_input_embeddings().eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.0  # whoever leaves it on gets the same every time
    model.at_first = _besides(model)  # for the check; nothing of PEFT's
    inputs = _batch(family, len(adapters) if rows is None else rows)
    del inputs["labels"]
    if family == "bert":
        inputs["token_type_ids"] = (torch.arange(9) > 2).long().expand_as(inputs["input_ids"])
        inputs["position_ids"] = torch.arange(9, 0, -1).expand_as(inputs["input_ids"])
    if broken:
        inputs["input_ids"][-1, -1] = 64  # one more than there are
    return [model, inputs, adapters]


def _besides(model: nn.Module) -> dict[str, Any]:
    """What `state` does not tell of a PEFT model."""
    rates = {f"{n}.p": m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    settings = {f"config.{n}": value for n, value in vars(model.get_base_model().config).items()}
    return {"the active adapter": model.active_adapters, **rates, **settings}


class _Served(_Quiet):
    """As `Check`, and the model must be as it was in what `state` does not tell, too."""

    def _check_arguments(self, args, function, number, changes, refuse) -> None:
        __tracebackhide__ = True
        now = _besides(args[0])
        for what, was in args[0].at_first.items():
            if now[what] != was:
                after = " although the call raised an error" if self.cases[number].raises else ""
                refuse(f"{what} is {now[what]} afterwards, and was {was}{after}")
        if any(getattr(m, "_disable_adapters", False) for m in args[0].modules()):
            refuse("the adapters are switched off afterwards: disable_adapter() is a context")
        super()._check_arguments(args, function, number, changes, refuse)


@partial(
    _Served,
    cases=[
        Case(
            lambda: _to_serve("llama", ["b", "a", None, "a"]),
            note="two LoRAs of other ranks and layers; b is active",
        ),
        Case(lambda: _to_serve("llama", [None, "a"], dtype=torch.float64), note="in float64"),
        Case(lambda: _to_serve("llama", ["a", "b", "a"], active="a"), note="a is active"),
        Case(lambda: _to_serve("llama", [None, None]), note="no row with an adapter"),
        Case(
            lambda: _to_serve("llama", ["a"], trains=("a", "dora")),
            note="a single row; b is active, and what trains is a and dora",
        ),
        Case(lambda: _to_serve("qwen2", ["a", None, "b"]), note="(IA)³; b is active"),
        Case(lambda: _to_serve("llama", ["dora", None, "b"]), note="dora is a DoRA"),
        Case(
            lambda: _to_serve("bert", ["b", "headless", "a", None], active="a"),
            note="a and b have heads of their own; a is active",
        ),
        Case(
            lambda: _to_serve("bert", ["a", None, "b"], training=True),
            note="a model in train mode, with dropout, but for its word embeddings",
        ),
        Case(
            lambda: _to_serve("llama", ["a", "b"], trains=()),
            note="adapters that were loaded frozen",
        ),
        refused(lambda: _to_serve("llama", ["a", "b", None], rows=4), "", "3 names for 4 rows"),
        refused(lambda: _to_serve("llama", ["a", "b", None], rows=2), "", "3 names for 2 rows"),
        refused(lambda: _to_serve("llama", ["a", "nobody"]), "nobody", "no adapter is called so"),
        refused(lambda: _to_serve("llama", ["a", ""]), "", "'' is not None"),
        refused(lambda: _to_serve("llama", ["__base__"]), "__base__", "no adapter is called so"),
        Case(
            lambda: _to_serve("llama", ["a", "a"], training=True, broken=True),
            note="a token is not in the vocabulary, and the forward raises: finally is for that",
            raises=(IndexError,),
        ),
    ],
    returns="logits",
    causes=mistakes(
        """
        def mixed_batch(model, inputs, adapters):
            def answered(name):
                if name is None:
                    with model.disable_adapter():
                        return model(**inputs).logits
                model.set_adapter(name)
                return model(**inputs).logits

            if len(adapters) != len(inputs["input_ids"]):
                raise ValueError("there must be a name, or None, for each row")
            for name in {*adapters} - {None, *model.peft_config}:
                raise ValueError(f"the model has no adapter {name!r}")
            active, model = model.active_adapter, copy.deepcopy(model).eval()
            with torch.no_grad():
                rows = [answered(name)[i] for i, name in enumerate(adapters)]
            return torch.stack(rows)
        """,
        """
        every row is answered by the active adapter
            answered(name)[i] → answered(active)[i]
        the rows are in the order of the groups: put each back to its place
            enumerate(adapters) →
                sorted(enumerate(adapters), key=lambda row: adapters.index(row[1]))
        the rows are in the alphabetical order of their adapters
            enumerate(adapters) → sorted(enumerate(adapters), key=lambda row: row[1] or "")
        a row without an adapter is answered by the active one: disable_adapter() gives the base
            answered(name)[i] → answered(name or active)[i]
        a row without an adapter is answered by the one before it: disable_adapter() gives the base
            with model.disable_adapter(): → if True:
        a row without an adapter is left at 0: the base answers it
            answered(name)[i] → answered(name)[i] * (name is not None)
        all adapters are the first row's
            answered(name)[i] → answered(adapters[0])[i]
        the names are turned round
            enumerate(adapters) → enumerate(adapters[::-1])
        attention_mask is not passed on
            active, → inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}; active,
        input_ids alone is passed on: pass all of inputs
            active, → inputs = {"input_ids": inputs["input_ids"]}; active,
        token_type_ids and position_ids are not passed on: pass all of inputs
            active, → inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}; active,
        position_ids is not passed on: pass all of inputs
            active, → inputs = {k: v for k, v in inputs.items() if k != "position_ids"}; active,
        it runs in train mode, with dropout
            .eval() → ∅
        these are probabilities: leave the softmax out
            torch.stack(rows) → torch.stack(rows).softmax(-1)
        adapter_names is known to LoRA alone: (IA)³ takes it without a word, and every row is
        answered by the active adapter
            [answered(name)[i] for i, name in enumerate(adapters)] →
                model(**inputs, adapter_names=[name or "__base__" for name in adapters])[0].split(1)
            torch.stack(rows) → torch.cat(rows)
        """,
        copy=copy,
    ),
)
def mixed_batch(model, inputs, adapters):
    """Each row is what its adapter alone gives, and the model is left as it was."""
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        whole = {None: model(**inputs).logits}
    for name in set(adapters) - {None}:
        model.set_adapter(name)
        whole[name] = model(**inputs).logits.detach()
    return torch.stack([whole[name][i] for i, name in enumerate(adapters)])


# ------------------------------------------------------------------ resume

_RATE = 3e-3
_FILES = ("adapter_model.safetensors", "adapter_config.json")
_IS_TRAINABLE = (
    "from_pretrained loads an adapter, and its head, frozen: is_trainable=True wakes both"
)


def _begun(family: str) -> nn.Module:
    """A model with an adapter, and a head if it has one, in which training has begun."""
    from peft import IA3Config, LoraConfig, get_peft_model

    configs = {
        "bert": lambda: LoraConfig(
            task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["query", "output.dense"]
        ),
        "llama": lambda: IA3Config(task_type="CAUSAL_LM"),
    }
    return _shaken(get_peft_model(_base(family), configs[family]()))


def _base(family: str) -> nn.Module:
    """The base as it is loaded anew: a fresh head is drawn, another than that of the files."""
    model = _model(family)
    if family == "bert":
        model.classifier.reset_parameters()
    return model


class _Saved:
    """A folder with an adapter in it, and what it holds."""

    def __init__(self, family: str, folder: str) -> None:
        self.family, self.folder = family, Path(folder) / "adapter"
        self.begun = _begun(family)
        self.begun.save_pretrained(str(self.folder))
        self.before, self.settings = self.tensors(), self.config()
        self.dropouts: list[bool] = []  # whether dropout was on, for each forward of a classifier

    def config(self) -> dict[str, Any]:
        """The settings in the folder; PEFT writes sets as lists, and some names twice."""
        settings = json.loads((self.folder / _FILES[1]).read_text(encoding="utf-8"))
        return {k: set(v) if isinstance(v, list) else v for k, v in settings.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What lies in the folder now; empty where there is no whole file."""
        try:
            return load_file(self.folder / _FILES[0])
        except Exception:
            return {}

    def loaded(self, trainable: bool = False) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(
            _base(self.family), str(self.folder), is_trainable=trainable
        )

    def reference(
        self,
        batches: list,
        rate: float = _RATE,
        clear: bool = True,
        anew: bool = False,
        clip: float = torch.inf,
        every: int = 1,
        optimiser: type = torch.optim.AdamW,
    ) -> dict[str, torch.Tensor]:
        """What training makes of all that the file holds, from the values that it held."""
        model = copy.deepcopy(self.begun).train()
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimiser(params, lr=rate)
        for count, batch in enumerate(batches, 1):
            (model(**batch).loss / every).backward()
            if count % every:
                continue
            nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            if clear:
                optimizer.zero_grad()
            if anew:
                optimizer = optimiser(params, lr=rate)
        return _held(model)


def _held(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors, its head among them, by their names in a file."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(model, adapter_name=name)
    return {key: t.detach().clone() for key, t in held.items()}


def _is_head(key: str) -> bool:
    return any(head in key for head in _HEADS)


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two sets of tensors differ."""
    return [k for k in b if k not in a or a[k].shape != b[k].shape or _gap(a[k], b[k]) > 1e-5]


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _resumed(function: Callable, saved: _Saved, data: Any, *lr: float, told: str) -> nn.Module:
    """What the learner's function returns, if it is a model that PEFT's adapter is in."""
    from peft import PeftModel

    base = _base(saved.family)
    if saved.family == "bert":
        base.dropout.p = 1e-9  # it changes no number, and is seen to be on or off
        base.dropout.register_forward_pre_hook(
            lambda layer, _: saved.dropouts.append(layer.training and layer.p > 0)
        )
    model = _called(function, base, str(saved.folder), data, *lr, told=told)
    if model is None:
        raise Refused("the result is None: is a return statement missing?")
    if model is base or not isinstance(model, PeftModel):
        raise Refused(
            f"the result is {kind(model)}, expected the PEFT model",
            "merge_and_unload, unload and get_base_model give a model that is not PEFT's.",
        )
    return model


def _goes_on_from_the_file(function: Callable) -> str:
    """A trial: without a batch, the model is what the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved("bert", folder)
        told = "Tried without a batch: data is an empty list."
        model = _resumed(function, saved, [], _RATE, told=told)
        active = model.active_adapters
        names = list(model.peft_config)
        by_name = {name: _apart(_held(model, name), saved.before) for name in names}
        right = [name for name, wrong in by_name.items() if not wrong]
        if right and active != right[:1]:
            raise Refused(
                f"the adapter of the file is in the model as {right[0]!r}, and {active[0]!r} is "
                "active",
                told,
                "What is active answers and trains: load the file as the only adapter.",
            )
        if rounded := {t.dtype for t in _held(model, active[0]).values()} - {torch.float32}:
            raise Refused(
                f"the adapter is in {rounded.pop()}, and in the file it is in float32", told
            )
        wrong = by_name[active[0]]
        if any(not _is_head(key) for key in wrong):
            raise Refused(
                "it starts from scratch: the adapter is not that of the file",
                told,
                "get_peft_model puts a fresh adapter into the model, in the place of a loaded one "
                "of the same name: from_pretrained alone makes a PEFT model of a base.",
            )
        if wrong:
            raise Refused(
                f"the adapter is that of the file, and its head is not: {_few(wrong)}",
                told,
                "Beside the adapter, the file holds the trained head (modules_to_save).",
            )
        if _is_merged(model):
            raise Refused("the adapter is merged into the base: go on with it beside the base")
        return "it starts with the adapter and the head of the file"


def _is_merged(model: nn.Module) -> bool:
    return any(getattr(m, "merged", False) for m in model.modules())


def _of_base(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own tensors in a PEFT model, by their names in the base."""
    found = {}
    for name, t in model.base_model.model.state_dict().items():
        if not any(part in name for part in _ADDED):
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            found[name] = t
    return found


def _trains_both(function: Callable) -> str:
    """A trial: three batches change the adapter and the head, by the rate, and nothing else."""
    batches = [_batch("bert", seed=seed) for seed in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved("bert", folder)
        copies = [{k: t.clone() for k, t in batch.items()} for batch in batches]
        model = _resumed(function, saved, copies, _RATE, told="Tried with three batches.")
        if problem := difference(copies, batches, "data", 0.0):
            raise Refused("data was changed: leave it as it was", f"{problem}.")
        trained = list(saved.dropouts)
        _left_the_base(model)
        _moved_what_it_holds(model, saved, batches)
        if not all(trained):
            raise Refused(
                "it trains without dropout",
                "A base is loaded in eval mode, and dropout is off there: train() before the loop.",
            )
        awake = {n for n, p in model.named_parameters() if p.requires_grad}
        if of_base := [n for n in awake if not any(part in n for part in _ADDED)]:
            raise Refused(
                f"{len(of_base)} tensors of the base require a gradient: "
                f"{_few(sorted(_shorter(of_base)))}",
                "That costs memory and time in every backward: only the adapter and the head do.",
            )
        _wrote_it_back(model, saved, batches[0])
        return "three batches train adapter and head, as AdamW does at this rate; path holds both"


def _left_the_base(model: nn.Module) -> None:
    here, base = _of_base(model), dict(_original("bert").state_dict())
    moved = [n for n in base if n in here and not _is_head(n) and _gap(here[n], base[n]) > 1e-7]
    if moved:
        merged = "The adapter is merged into it. " if _is_merged(model) else ""
        raise Refused(
            f"the base itself has changed, {len(moved)} of its tensors: {_few(moved)}",
            f"{merged}Only the adapter and the head train; path does not hold the base.",
        )


def _moved_what_it_holds(model: nn.Module, saved: _Saved, batches: list) -> None:
    held, old = _held(model, model.active_adapters[0]), saved.before
    changed = _apart(held, old)
    if not changed:
        raise Refused(
            "nothing has been trained: all values are those of the file", f"{_IS_TRAINABLE}."
        )
    if not any(_is_head(key) for key in changed):
        raise Refused("the head has not been trained", f"{_IS_TRAINABLE}.")
    if all(_is_head(key) for key in changed):
        raise Refused("the head alone has been trained", f"{_IS_TRAINABLE}.")
    if not _apart(held, saved.reference(batches)):
        return
    causes = {
        "only the first batch is used: return stands in the loop": saved.reference(batches[:1]),
        "only the last batch is used": saved.reference(batches[-1:]),
        "the gradients of earlier batches are still there: zero_grad() is missing": (
            saved.reference(batches, clear=False)
        ),
        "lr is not used: the rate is another": saved.reference(batches, rate=1e-2),
        "the rate is AdamW's default: pass lr on": saved.reference(batches, rate=1e-3),
        "nothing decays: AdamW does so by its own settings, and Adam does not": saved.reference(
            batches, optimiser=torch.optim.Adam
        ),
        "this is SGD: AdamW": saved.reference(batches, optimiser=torch.optim.SGD),
        "the optimiser is made anew for each batch: one remembers, made before the loop": (
            saved.reference(batches, anew=True)
        ),
        "the gradients are clipped to a norm of 1": saved.reference(batches, clip=1.0),
        "there is one step for two batches": saved.reference(batches, every=2),
        "the first batch is left out": saved.reference(batches[1:]),
        "the last batch is left out": saved.reference(batches[:-1]),
        "the batches are used twice": saved.reference(batches * 2),
        "the batches are used in another order": saved.reference(batches[::-1]),
    }
    told = [f"Likely cause: {c}." for c, values in causes.items() if not _apart(held, values)]
    told += ["Are betas, eps, a schedule of the rate, or the loss other than they come?"]
    raise Refused(
        f"three batches at lr={_RATE} give other values than AdamW's three steps",
        "Compared with torch.optim.AdamW over what trains, one step a batch, in the order given.",
        told[0],
    )


def _wrote_it_back(model: nn.Module, saved: _Saved, batch: dict[str, torch.Tensor]) -> None:
    now, active = saved.tensors(), model.active_adapters[0]
    inside = sorted(path.name for path in saved.folder.iterdir()) if saved.folder.exists() else []
    missing = [name for name in _FILES if name not in inside]
    if missing or not now:
        raise Refused(f"in path {(missing or _FILES)[0]} is missing or broken")
    if not _apart(now, saved.before):
        within = [p.name for p in saved.folder.iterdir() if (p / _FILES[0]).exists()]
        told = []
        if within:
            told = [f"save_pretrained writes an adapter called {active!r} into path/{within[0]}."]
        elif any(name.endswith((".bin", ".pt")) for name in inside):
            told = ["PEFT reads adapter_model.safetensors, which is the old one."]
        raise Refused("path still holds what it held before", *told)
    keys = [key for key in saved.before if key not in now]
    if any(_is_head(key) for key in keys):
        raise Refused(
            f"the head is not in the file: {_few(key for key in keys if _is_head(key))}",
            "Whoever loads it next gets a KeyError, and what the head had learned is lost.",
        )
    if keys:
        raise Refused(
            f"{len(keys)} tensors of the adapter are not in the file under the names that PEFT "
            f"looks for: {_few(keys)}",
            "save_pretrained writes the names without the adapter's own.",
        )
    within = [path.relative_to(saved.folder).as_posix() for path in saved.folder.rglob("*.*")]
    large = [n for n in within if n not in _FILES and n.endswith((".safetensors", ".bin", ".pt"))]
    if large or len(now) > len(saved.before):
        more = large or [key for key in now if key not in saved.before]
        raise Refused(
            f"more than the adapter and its head is saved: {_few(more)}",
            "An adapter's folder is small: it holds no base, and nothing twice.",
        )
    try:
        loaded = saved.loaded()
    except Exception as error:
        raise Refused(f"what lies in path cannot be loaded: {summary(error)}") from None
    config = saved.config()
    if other := [key for key, value in saved.settings.items() if config.get(key) != value]:
        raise Refused(f"{_FILES[1]} says something else than before about {_few(other)}")
    if _off(_logits(loaded, batch), _logits(model, batch)) > 1e-4:
        raise Refused(
            "loaded from path, the model is another than the one that was returned",
            f"Other values in the file: {_few(_apart(now, _held(model, active)))}.",
        )


def _takes_other_methods(function: Callable) -> str:
    """A trial: (IA)³ on a causal model, the batches from a generator, the rate left out."""
    batches = [_batch("llama", seed=seed) for seed in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved("llama", folder)
        told = "Tried with (IA)³ on a LlamaForCausalLM, the batches from a generator, lr left out."
        model = _resumed(function, saved, (dict(batch) for batch in batches), told=told)
        if _apart(_held(model), saved.reference(batches, rate=1e-2)):
            raise Refused("the trained values are not those of AdamW's two steps", told)
        if _apart(saved.tensors(), _held(model)):
            raise Refused("path does not hold the trained values", told)
        return "another method goes on too"


def _survives(function: Callable) -> str:
    """A trial: training that is interrupted leaves something whole in path."""

    class Interrupted(Exception):
        pass

    def stream():
        yield _batch("bert", seed=1)
        raise Interrupted

    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved("bert", folder)
        try:
            _resumed(function, saved, stream(), _RATE, told="Tried with data that raises midway.")
        except Interrupted:
            pass
        else:
            raise Refused(
                "an error that data raises in the second batch is caught, and not raised again",
                "Whoever called takes what is half trained for the whole.",
            )
        now = saved.tensors()
        config = saved.folder / _FILES[1]
        if set(now) != set(saved.before) or not (config.exists() and config.stat().st_size):
            raise Refused(
                "interrupted in the second batch, path holds no whole adapter any more",
                "Until the new files are there, leave the old ones where they are.",
            )
        return "interrupted, it leaves a whole adapter in path"


@partial(
    _Tried,
    cases=[Case(lambda: [_base("bert"), "adapter", []])],
    trials=_by_the_learner(_goes_on_from_the_file, _trains_both, _takes_other_methods, _survives),
    hints={
        "empty parameter list": f"Nothing trains: {_IS_TRAINABLE}.",
        "does not require grad": "Nothing trains in this forward: the adapter is frozen, or it is "
        "merged into the base.",
        "doesn't require grad": "Nothing trains in this forward: it is frozen or merged.",
        "size mismatch": "The adapter's settings are in path: PeftConfig.from_pretrained reads "
        "them, and from_pretrained of a model does so by itself.",
    },
)
def resume(base, path, data, lr=1e-2):
    """Training goes on from the file, with adapter and head, and the file holds both afterwards."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    model = get_peft_model(base, config).train()
    set_peft_model_state_dict(model, load_file(f"{path}/{_FILES[0]}"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return model
