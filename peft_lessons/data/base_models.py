"""Load the base models: the bundled ones from data/, any other by its Hub id or folder.

Bundled models need neither network nor cache; the assistant, which the set-up fetches, is loaded as
they are. `PEFT_LESSONS_DATA` names another data folder;
`PEFT_LESSONS_BASE` (a Hub id or a folder) takes the place of the bundled encoder in every lesson.
"""

# isort: off
from .._quiet import errors_only  # before anything below imports bitsandbytes
# isort: on

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    BertPreTrainedModel,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from .bundled import ASSISTANT, assistant_folder, bundled_path, data_folder, records


class MeanPooledBertForSequenceClassification(BertPreTrainedModel):
    """Classify texts with BERT, mean pooling over the mask, and one linear layer on top.

    Sentence encoders are trained with mean pooling; their [CLS] pooler is untrained."""

    # Otherwise Trainer passes num_items_in_batch and expects the model to average over it.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        past_key_values=None,
        return_dict=None,
        **kwargs,
    ):
        """Return logits (batch, labels), and the mean cross entropy if labels (batch,) are given.

        `input_ids` is (batch, tokens), `inputs_embeds` (batch, tokens, hidden). The mask is
        (batch, tokens), or longer on the left if `past_key_values` holds a prefix; a prefix is
        attended to but not pooled."""
        hidden = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )
        states = hidden.last_hidden_state  # (batch, tokens, hidden)
        if attention_mask is None:
            pooled = states.mean(dim=1)  # (batch, hidden)
        else:
            mask = attention_mask[:, -states.shape[1] :]  # (batch, tokens)
            mask = mask[..., None].to(states.dtype)  # (batch, tokens, 1)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (batch, hidden)
        logits = self.classifier(pooled)  # (batch, labels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=hidden.get("hidden_states"),
            attentions=hidden.get("attentions"),
        )
        return output.to_tuple() if return_dict is False else output


@dataclass(frozen=True)
class Bundled:
    """Describe a model in data/: its folder, its name, and the classes that load it.

    `published_as` is its id at the Hub, which the files of its adapters name. An unpublished model
    keeps its bundled name, which `load_model` knows; without an owner it cannot be a Hub id."""

    folder: str
    published_as: str
    base: tuple[type, dict]
    classifier: type


BUNDLED = {
    "minilm": Bundled(
        folder="models/minilm",
        published_as="sentence-transformers/all-MiniLM-L6-v2",
        base=(BertModel, {"add_pooling_layer": False}),
        classifier=MeanPooledBertForSequenceClassification,
    ),
    "tinylm": Bundled(
        folder="models/tinylm",
        published_as="tinylm",
        base=(LlamaForCausalLM, {}),
        classifier=LlamaForSequenceClassification,
    ),
    "smollm2": Bundled(
        folder=ASSISTANT,
        published_as="HuggingFaceTB/SmolLM2-135M-Instruct",
        base=(LlamaForCausalLM, {}),
        classifier=LlamaForSequenceClassification,
    ),
}


def _bundled_model_folder(bundled: Bundled, verify: bool) -> Path:
    """Check the files of a bundled model (with `verify` their sha256) and return its folder.

    Its licence and notice may be missing or edited: no model is loaded from them."""
    if bundled.folder == ASSISTANT:
        return assistant_folder(verify)
    listed = [
        path
        for path in records()
        if path.startswith(bundled.folder + "/") and not path.endswith(("/LICENSE", "/NOTICE"))
    ]
    for path in listed or [f"{bundled.folder}/config.json"]:
        bundled_path(path, verify)
    return data_folder() / bundled.folder


def _resolve(name: str) -> str:
    """Return the bundled name, folder or Hub id that `name` means."""
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a string, got {name!r}; try 'minilm'")
    name = os.fspath(name)
    if name == "minilm":
        name = os.environ.get("PEFT_LESSONS_BASE") or name
    # A Hub id has an owner: a plain word is a typing error, and no reason to ask the network.
    if name not in BUNDLED and not Path(name).is_dir() and "/" not in name:
        reason = "it is not a folder, and a Hub id has the form owner/model"
        raise ValueError(_unknown(name, reason))
    return name


def _unknown(name: str, reason: str) -> str:
    return (
        f"there is no model {name!r}: {reason}. Bundled: {', '.join(map(repr, sorted(BUNDLED)))}. "
        "Any Hub id or local folder works too, a Hub id with a network or from the cache."
    )


@contextmanager
def _loading(name: str):
    """Silence reports about new heads, and turn a failed look-up into a clear error."""
    try:
        # The hub's reports every attempt to reach a network that isn't there.
        with errors_only("transformers"), errors_only("huggingface_hub"):
            yield
    except OSError as error:
        raise ValueError(_unknown(name, str(error).strip().split("\n")[0].rstrip("."))) from error


def _hub_options() -> dict:
    # Never code or pickles from a repository, and no network where the user switched it off.
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return {"trust_remote_code": False, "local_files_only": offline}


def load_tokenizer(name: str):
    """Load the tokenizer of a model, named as for `load_model`. It always has a padding token.

    Raises TypeError, ValueError (unknown name) and FileNotFoundError as `load_model` does, and
    ValueError for a tokenizer with neither a padding nor an end token."""
    name = _resolve(name)
    if name in BUNDLED:
        return AutoTokenizer.from_pretrained(_bundled_model_folder(BUNDLED[name], verify=False))
    with _loading(name):
        return padded(AutoTokenizer.from_pretrained(name, **_hub_options()))


def padded(tokenizer):
    """Set the end token as padding token if the tokenizer has none, and return the tokenizer.

    Raises ValueError if it has neither token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end token, so texts of different "
                "lengths cannot form a batch: set tokenizer.pad_token to a token of its vocabulary"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    verify: bool = False,
    seed: int = 0,
    four_bit: bool = False,
):
    """Load a base model in eval mode; with `labels=n` it gets a new classification head.

    `name` is a bundled name (`BUNDLED`), a local folder or a Hub id. Weights come in `dtype`. The
    encoder "minilm" gives token states (batch, tokens, hidden), or logits (batch, n) from the mean
    over the mask; the decoders "tinylm" and "smollm2" give logits (batch, tokens, vocabulary), or
    (batch, n) from each text's last token. `model.fresh_modules` names the modules with newly
    initialised weights, which depend on `seed`; the global random state is unchanged. `verify`
    checks the sha256 of a bundled model's files, and of the assistant's.

    `four_bit` stores the linear layers inside the model in NF4 with doubly quantised scales, to
    compute in `dtype`; heads, embeddings and norms stay in `dtype`. Such a model is loaded onto the
    GPU if there is one, any other onto the CPU.

    Raises FileNotFoundError for a missing bundled file, and for "smollm2" where the set-up could
    not fetch the assistant; ValueError for a damaged file, an unknown name, labels below 2,
    incomplete weights, or in four bits a layer whose inputs are no multiple of 64, a dtype of other
    than 16 or 32 bits or weights already quantised; and TypeError for arguments of a wrong
    type."""
    _refuse_settings(labels, dtype, four_bit)
    name = _resolve(name)
    kind, source, config, extra = _source(name, labels, verify)
    options = extra | {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if labels is not None:
        options["num_labels"] = labels
    gpus = [torch.cuda.current_device()] if four_bit and torch.cuda.is_available() else []
    if four_bit:
        options |= _four_bit_options(kind, config, extra, name, dtype)
        options["device_map"] = {"": gpus[0] if gpus else "cpu"}
    with _loading(name), torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed: that would seed every GPU's generator too, for good.
        torch.random.default_generator.manual_seed(seed)
        if gpus:  # a new head is drawn on the device that holds it
            torch.cuda.manual_seed(seed)
        model, info = kind.from_pretrained(source, **options)
    if four_bit:
        keep_differentiable(model)
    model.fresh_modules = _untrained(model, info, name, labels)
    if name in BUNDLED:
        model.name_or_path = model.config._name_or_path = BUNDLED[name].published_as
    return model.eval()


def load_config(name: str):
    """Load the configuration of a model, named as for `load_model`, without its weights.

    Raises TypeError, ValueError and FileNotFoundError as `load_model` does."""
    return _source(_resolve(name), None, verify=False)[2]


def _source(name: str, labels: int | None, verify: bool) -> tuple[type, str | Path, Any, dict]:
    """Return the class that loads a model, where from, the config, and options of the class."""
    if name in BUNDLED:
        folder = _bundled_model_folder(BUNDLED[name], verify)
        kind, extra = BUNDLED[name].base if labels is None else (BUNDLED[name].classifier, {})
        return kind, folder, AutoConfig.from_pretrained(folder), extra
    options = _hub_options()
    with _loading(name):
        config = AutoConfig.from_pretrained(name, **options)
    # A classifier on a decoder finds the last real token by looking for the padding.
    if labels is not None and getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        options["pad_token_id"] = end[0] if isinstance(end, list) else end
    return _auto_class(config, labels), name, config, options


def _refuse_settings(labels: int | None, dtype: torch.dtype, four_bit: bool) -> None:
    if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int)):
        raise TypeError(f"labels must be an integer of at least 2 or None, got {labels!r}")
    if labels is not None and labels < 2:
        raise ValueError(f"labels must be at least 2, got {labels}: give one output to each class")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating dtype such as torch.float32, got {dtype!r}")
    if not isinstance(four_bit, bool):
        raise TypeError(f"four_bit must be True or False, got {four_bit!r}")
    if four_bit and dtype not in FOUR_BIT_DTYPES:
        raise ValueError(f"four_bit computes in torch.float32, bfloat16 or float16, not in {dtype}")


BLOCK = 64  # weights that share a scale in 4 bits
FOUR_BIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _four_bit_options(kind, config, extra: dict, name: str, dtype: torch.dtype) -> dict:
    """Return the arguments of `from_pretrained` that quantise the linear layers inside the model.

    Raises ValueError for a layer that the 4-bit kernels compute wrongly, or a quantised file."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the weights of {name!r} are quantised already: load them with four_bit=False, or the "
            "unquantised model in four bits"
        )
    with torch.device("meta"):  # shapes alone, no memory and no numbers
        model = kind(config, **extra) if name in BUNDLED else kind.from_config(config)
    body = "" if model.base_model is model else model.base_model_prefix + "."
    heads = []
    for path, module in model.named_modules():
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            continue
        # A pooler comes fresh where the file has none, as a head does.
        if not path.startswith(body) or "pooler" in path:
            heads.append(path)
            continue
        inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        if inputs % BLOCK:
            raise ValueError(
                f"four_bit: {path} of {name!r} has {inputs} inputs, which is not a multiple of "
                f"{BLOCK}, and bitsandbytes computes such a layer wrongly on a CPU, without an "
                "error. Load the model with four_bit=False, or take one of another width"
            )
    return {"quantization_config": nf4(dtype, heads)}


def nf4(dtype: torch.dtype, others: list[str] | None = None) -> BitsAndBytesConfig:
    """Return NF4 with doubly quantised scales for all linear layers but `others` (None for a head,
    as transformers finds it), to compute in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,  # its name is historic: it holds for 4 bits too
    )


def keep_differentiable(model) -> None:
    """Forbid the 4-bit layers to repack their weights.

    On a CPU with AVX512-BF16 the first forward in eval mode would repack them in place; from then
    on gradients are wrong or missing."""
    from bitsandbytes.nn import Linear4bit  # slow to import, and needed here only

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _auto_class(config, labels: int | None):
    if labels is not None:
        return AutoModelForSequenceClassification
    # GPT-2 and other older decoders are named so.
    names = ("CausalLM", "LMHeadModel")
    architectures = config.architectures or ()
    causal = any(name in architecture for architecture in architectures for name in names)
    return AutoModelForCausalLM if causal else AutoModel


def _untrained(model, info: dict, name: str, labels: int | None) -> tuple[str, ...]:
    """Return the top-level modules whose weights are in no file, in the model's order.

    Raises ValueError if they are more than a head (or a pooler): the file is incomplete."""
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    prefix = model.base_model_prefix + "."
    broken = sorted(path for path in missing if path.startswith(prefix) and "pooler" not in path)
    if labels is None:
        broken = sorted(missing - {path for path in missing if "pooler" in path})
    if broken or info["mismatched_keys"]:
        parts = broken or sorted(map(str, info["mismatched_keys"]))
        raise ValueError(f"the weights of {name!r} lack or do not fit {', '.join(parts[:3])}")
    if labels is None:
        return ()
    tops = {path if path.startswith(prefix) else path.partition(".")[0] for path in missing}
    return tuple(path for path, _ in model.named_modules() if path in tops)
