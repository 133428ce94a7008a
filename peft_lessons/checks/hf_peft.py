"""Checks of lesson 12.

peft takes seconds to import, so it is imported where it is needed.
"""

import copy
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from ..testing.wording import kind, summary
from .compare import difference, few, state
from .kit import Case, Refused, check_for
from .mistakes import mistakes


def _called(function: Callable, *args: Any, call: str) -> Any:
    """Return what the function gives; an error gets a note of how the function was called."""
    try:
        return function(*args)
    except Exception as error:
        error.add_note(call)
        raise


# ------------------------------------------------------------------ small models

_HEADS = ("classifier", "lm_head")
_SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48)
_SIZES |= dict(num_attention_heads=4, num_hidden_layers=1)


@cache
def _original(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(0)
        if family == "bert":
            dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model = BertForSequenceClassification(BertConfig(**_SIZES, **dropout))
        else:
            settings = dict(num_key_value_heads=2, tie_word_embeddings=True)
            model = LlamaForCausalLM(LlamaConfig(**_SIZES, **settings))
        for p in model.parameters():  # biases that start at 0 would hide that they are lost
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def _model(family: str) -> nn.Module:
    return copy.deepcopy(_original(family))


def _batch(family: str, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make rows of 4 to 9 tokens and their classes; padded on the left for a causal model."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 9), generator=drawn)
    mask = (torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=drawn)).long()
    mask = mask if family == "bert" else mask.flip(1)
    labels = torch.randint(2, (rows,), generator=drawn)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item() if a.shape == b.shape else torch.inf


def _shaken(model: nn.Module, size: float = 0.2, seed: int = 7) -> nn.Module:
    """Perturb all trainable parameters of the model, as training would."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=drawn).to(p.dtype))
    return model


# ------------------------------------------------------------------ config_for

_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
}
_PROMPTS = ("prefix", "prompt")


def _is_second(path: str) -> bool:
    """Tell whether a layer is the second matrix of a feed-forward block."""
    return bool(re.search(r"down_proj$|layer\.\d+\.output\.dense$", path))


def _fits(family: str) -> Callable[[Callable], str]:
    """Make a trial: the config of each method, tried on a small model."""

    def trial(function: Callable) -> str:
        from peft import get_peft_model

        model = _model(family)
        name = type(model).__name__
        for number, method in enumerate(_TYPES):
            where = f"Called with: method={method!r}, model: a small {name}."
            right = list(_TYPES)[:number]
            try:
                config = _called(function, method, model, call=where)
            except NotImplementedError:
                if not right:
                    raise
                config = None
            try:
                if config is None and right:
                    raise Refused(f"{', '.join(right)}: right; the config for {method} is missing")
                if difference(state(model), state(_original(family)), "", 0.0):
                    raise Refused(
                        "the model was changed",
                        "get_peft_model puts its layers into the model: return the config alone.",
                    )
                _is_of_the_method(config, method)
                _knows_its_task(config, method, family)
                adapted = get_peft_model(_model(family), copy.deepcopy(config))
                if method not in _PROMPTS:
                    _sits_where_it_should(adapted, config, method, family)
            except Refused as refused:
                headline, *facts = refused.args
                raise Refused(headline, where, *facts) from None
            except Exception as error:
                raised = f"get_peft_model refuses this config: {summary(error)}"
                raise Refused(raised, where) from None
        return f"{', '.join(_TYPES)} on a {name}"

    return trial


def _is_of_the_method(config: Any, method: str) -> None:
    from peft import PeftConfig

    if not isinstance(config, PeftConfig):
        raise Refused(f"the result is {kind(config)}, expected a config of PEFT")
    if (got := config.peft_type.value) != _TYPES[method]:
        raise Refused(f"this is a config of {got}, expected one of {_TYPES[method]}")
    if (dora := getattr(config, "use_dora", False)) != (method == "dora"):
        reason = "use_dora=True makes a DoRA" if dora else "a DoRA is a LoRA with use_dora=True"
        raise Refused(f"use_dora is {dora}: {reason}")


def _knows_its_task(config: Any, method: str, family: str) -> None:
    due = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    if task == due:
        return
    facts = []
    if method in _PROMPTS and not task:
        facts = ["get_peft_model raises KeyError: None."]
    elif family == "bert" and task in (None, "FEATURE_EXTRACTION"):
        facts = ["PEFT then leaves the new classification head frozen, at its random start."]
    if not task:
        raise Refused(f"task_type is missing: {due!r} is due", *facts)
    raise Refused(f"task_type is {task!r}, but the model's class says {due!r}", *facts)


def _sits_where_it_should(adapted: nn.Module, config: Any, method: str, family: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    places = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    asked = config.target_modules
    asked = [asked] if isinstance(asked, str) else sorted(asked or ())
    if heads := {name.partition(".")[0] for name in [*places, *asked]} & {*_HEADS}:
        tied = "it is tied to the embedding, and merging would change both"
        reason = "it trains in full already" if family == "bert" else tied
        raise Refused(f"the head {heads.pop()!r} is a target too: {reason}")
    linears = [n for n, m in _original(family).named_modules() if isinstance(m, nn.Linear)]
    due = [name for name in linears if re.search(r"layers?\.\d", name)]  # inside the blocks
    if method == "ia3":
        scaled = (".key", ".value", ".k_proj", ".v_proj")
        due = [name for name in due if name.endswith(scaled) or _is_second(name)]
    if missing := [name for name in due if name not in places]:
        ends = {name.rpartition(".")[2] for name, _ in adapted.named_modules()}
        unknown = [n for n in asked if re.fullmatch(r"[a-z_]+", n) and n not in ends]
        reasons = []
        if not asked:
            reasons = ["Without target_modules PEFT takes its default for this architecture."]
        elif unknown:
            reasons = [
                f"No layer is called {few(unknown)}: PEFT does not complain as long as another "
                "name matches."
            ]
        raise Refused(f"{len(missing)} of {len(due)} layers are left out: {few(missing)}", *reasons)
    spare = [] if method == "ia3" else ["bert.pooler.dense"]
    if extra := [name for name in places if name not in due + spare]:
        reasons = []
        if any(name.endswith("attention.output.dense") for name in extra):
            default = "" if asked else ", and PEFT's default for a BERT does"
            reasons = [f"output.dense also matches attention.output.dense{default}."]
        raise Refused(f"layers are adapted that should not be: {few(extra)}", *reasons)
    for path, layer in places.items() if method == "ia3" else ():
        if layer.is_feedforward != _is_second(path):
            problem = "the input is scaled: for keys and values scale the output"
            if _is_second(path):
                problem = "the output is scaled: for the second feed-forward matrix scale the input"
            names = "feedforward_modules names the layers whose input is scaled."
            raise Refused(f"in {path!r} {problem}", names)


@check_for(trials=dict.fromkeys([_fits("bert"), _fits("llama")], "your function"), quiet=True)
def config_for(method, model):
    """Each config fits its model, and its method is applied to the right layers."""


# ------------------------------------------------------------------ mixed_batch


@cache
def _serving(which: str) -> nn.Module:
    """Make a model with two trained adapters."""
    from peft import LoraConfig, get_peft_model

    configs = {
        "llama": {
            "a": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
            "b": LoraConfig(r=2, target_modules=["down_proj"]),
        },
        "bert": {
            "a": LoraConfig(r=2, task_type="SEQ_CLS"),
            "b": LoraConfig(r=3, lora_alpha=10, target_modules=["key"], task_type="SEQ_CLS"),
        },
    }[which]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        model = get_peft_model(_model(which), configs["a"], adapter_name="a")
        model.add_adapter("b", configs["b"])
        for seed, name in enumerate(configs):
            model.set_adapter(name)
            _shaken(model, 0.5, seed)
    return model.eval()


def _to_serve(which: str, adapters: list[str | None]) -> list[Any]:
    original = _serving(which)
    settings = original.get_base_model().config
    # A copy of the settings in depth takes longer than one of the model.
    model = copy.deepcopy(original, {id(settings): settings})
    model.set_adapter("b")
    inputs = _batch(which, len(adapters))
    del inputs["labels"]
    if which == "bert":
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.0  # whoever leaves it on gets the same every time
    return [model, inputs, adapters]


def _served_afterwards(model, inputs, adapters):
    """Ask of the model only that the same adapter is active as before."""
    if (active := model.active_adapters) != ["b"]:
        return f"the active adapter is {active} afterwards, and was ['b']"
    if any(getattr(m, "_disable_adapters", False) for m in model.modules()):
        return "the adapters are switched off afterwards: disable_adapter() is a context"
    return None


@check_for(
    cases=[
        Case(lambda: _to_serve("llama", ["b", "a", None, "a"]), note="two LoRAs; b is active"),
        Case(lambda: _to_serve("bert", ["a", None, "b"]), note="two heads; in train mode"),
    ],
    returns="logits",
    changes=("model",),
    afterwards=_served_afterwards,
    quiet=True,
    causes=mistakes(
        """
        def mixed_batch(model, inputs, adapters):
            def answered(name):
                if name is None:
                    with model.disable_adapter():
                        return model(**inputs).logits
                model.set_adapter(name)
                return model(**inputs).logits

            active = model.active_adapter
            model.eval()
            with torch.no_grad():
                rows = [answered(name)[i] for i, name in enumerate(adapters)]
            model.set_adapter(active)
            return torch.stack(rows)
        """,
        """
        every row is answered by the active adapter
            answered(name)[i] → answered(active)[i]
        the rows are in the order of the groups: put each row back into its position
            enumerate(adapters) →
                sorted(enumerate(adapters), key=lambda row: adapters.index(row[1]))
        a row without an adapter is answered by the active one: disable_adapter() gives the base
            answered(name)[i] → answered(name or active)[i]
        attention_mask is not passed on: pass all of inputs
            active = → inputs = {"input_ids": inputs["input_ids"]}; active =
        it runs in train mode, with dropout
            model.eval() → ∅
        """,
    ),
)
def mixed_batch(model, inputs, adapters):
    """Each row is what its adapter alone computes, and the same adapter is active as before."""
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        logits = {None: model(**inputs).logits}
    for name in set(adapters) - {None}:
        model.set_adapter(name)
        logits[name] = model(**inputs).logits.detach()
    return torch.stack([logits[name][i] for i, name in enumerate(adapters)])


# ------------------------------------------------------------------ resume

_FILE = "adapter_model.safetensors"
_IS_TRAINABLE = (
    "from_pretrained loads an adapter and its head frozen: is_trainable=True makes both train"
)


def _base() -> nn.Module:
    """Make the base as it is loaded again: its head is not the one in the file."""
    model = _model("bert")
    model.classifier.reset_parameters()
    return model


@cache
def _begun() -> nn.Module:
    """Make a model with an adapter and a head, in which training has begun."""
    from peft import LoraConfig, get_peft_model

    targets = ["query", "output.dense"]
    config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=targets)
    return _shaken(get_peft_model(_base(), config))


def _held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the active adapter and its head, by their names in a file."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    return {key: t.detach().clone() for key, t in held.items()}


def _is_head(key: str) -> bool:
    return "classifier" in key


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Name the tensors in which two sets differ."""
    return [k for k in b if k not in a or _off(a[k], b[k]) > 2e-5]


def _resumed(function: Callable, folder: Path, data: list, call: str) -> nn.Module:
    """Save the model in which training has begun, and return what the function makes of it."""
    from peft import PeftModel

    _begun().save_pretrained(str(folder))
    model = _called(function, _base(), str(folder), data, 3e-3, call=call)
    if not isinstance(model, PeftModel):
        raise Refused(
            f"the result is {kind(model)}, expected the PEFT model",
            "merge_and_unload, unload and get_base_model give a model that is not PEFT's.",
        )
    return model


def _goes_on_from_the_file(function: Callable) -> str:
    """Try it without a batch: the model is what the file holds."""
    call = "Tried without a batch: data is an empty list."
    with tempfile.TemporaryDirectory() as folder:
        model = _resumed(function, Path(folder) / "adapter", [], call)
        wrong = _apart(_held(model), _held(_begun()))
    if any(not _is_head(key) for key in wrong):
        raise Refused(
            "it starts from scratch: the adapter is not that of the file",
            call,
            "get_peft_model puts a new adapter into the model, and replaces a loaded adapter of "
            "the same name: from_pretrained alone makes a PEFT model of a base.",
        )
    if wrong:
        raise Refused(
            f"the adapter is that of the file, but the head is not: {few(wrong)}",
            call,
            "Besides the adapter, the file holds the trained head (modules_to_save).",
        )
    return "it starts with the adapter and the head of the file"


def _trains_both(function: Callable) -> str:
    """Try it with three batches: they change the adapter and the head, and path holds both."""
    from peft import PeftModel

    before = _held(_begun())
    batches = [_batch("bert", seed=seed) for seed in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "adapter"
        model = _resumed(function, folder, batches, "Tried with three batches.")
        moved = {_is_head(key) for key in _apart(_held(model), before)}
        if moved != {True, False}:
            what = "the adapter" if moved == {True} else "the head" if moved else "nothing"
            stays = "is still that of the file" if moved else "has been trained"
            raise Refused(f"{what} {stays}", f"{_IS_TRAINABLE}.")
        now = load_file(folder / _FILE)
        if not _apart(now, before):
            raise Refused("path still holds what it held before")
        if heads := [key for key in before if _is_head(key) and key not in now]:
            raise Refused(
                f"the head is not in the file: {few(heads)}",
                "Loading it raises a KeyError, and what the head has learned is lost.",
            )
        loaded = PeftModel.from_pretrained(_base(), str(folder))
        if _off(_logits(loaded, batches[0]), _logits(model, batches[0])) > 1e-4:
            raise Refused(
                "loaded from path, the model is not the one that was returned",
                "Did the base train too, or was the adapter saved before the last step?",
            )
    return "three batches train the adapter and the head; path holds both"


@check_for(
    trials=dict.fromkeys([_goes_on_from_the_file, _trains_both], "your function"),
    hints={
        "empty parameter list": f"Nothing trains: {_IS_TRAINABLE}.",
        "require grad": "Nothing trains in this forward: the adapter is frozen, or merged.",
    },
    quiet=True,
)
def resume(base, path, data, lr=1e-2):
    """Training goes on from the file, with adapter and head, and the file holds both afterwards."""
