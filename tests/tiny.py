"""Share among tests what `peft_lessons.testing` has not: small tasks, and how to compare."""

import itertools
import json
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_lessons import DoRA, LoRA, inject, load_tokenizer
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of, read_adapter
from peft_lessons.testing.tiny import (  # noqa: F401 - tests import all from here
    FEED_FORWARD,
    GREEDY,
    MODELS,
    SIZES,
    by_hand,
    greedy,
    padded_rows,
    perturb,
    positions_in,
    tiny_bert,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
)

EACH = pytest.mark.parametrize("name", MODELS)
# Non-square layers, layers with and without a bias, grouped key-value heads.
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "up_proj"),
    "opt": ("q_proj", "v_proj", "fc1", "fc2"),
    "bert": ("query", "value", "intermediate.dense", "output.dense"),
}
# (targets, feedforward) of (IA)³; in a BERT the name output.dense would match the attention's too.
PLACES = {
    **dict.fromkeys(("llama", "qwen2"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    "opt": (("k_proj", "v_proj", "fc2"), ("fc2",)),
    "bert": (r".*self\.(key|value)|.*\d\.output\.dense", r".*\d\.output\.dense"),
}


def tiny_t5() -> T5ForConditionalGeneration:
    """Return a model with an encoder and a decoder."""
    sizes = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


# ------------------------------------------------------------------ tasks and batches


class TinyTask:
    """Give rows whose label says whether their first token is odd; enough of a Task for fit."""

    name = "tiny"

    def __init__(self, n: int = 64, length: int = 6, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 128, (n, length), generator=generator)

    def _batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = self.ids[rows]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    def batches(self, split: str, size: int = 16, **options):
        for rows in torch.arange(len(self.ids)).split(size):
            yield self._batch(rows)

    def stream(self, size: int, seed: int):
        for step in itertools.count():
            generator = torch.Generator().manual_seed(1000 * seed + step)
            yield self._batch(torch.randint(len(self.ids), (size,), generator=generator))


class TinyText(TinyTask):
    """Give the same rows as a text to predict, for causal models."""

    def _batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = super()._batch(rows)
        return batch | {"labels": batch["input_ids"]}


def task_of(name: str) -> TinyTask:
    return TinyTask() if name == "bert" else TinyText()


def task_type(name: str) -> str:
    """Return PEFT's name of the task."""
    return "SEQ_CLS" if name == "bert" else "CAUSAL_LM"


def batch_of(name: str, vocabulary: int = 128) -> dict[str, torch.Tensor]:
    """Return three rows of 12, 9 and 5 tokens, padded on the left for decoders."""
    return padded_rows(vocabulary, name != "bert", pad=1)


# ------------------------------------------------------------------ what stays as it was


TEMPLATE = (
    "{% if messages[0].role != 'system' %}be brief{{ eos_token }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE):
    """Return the bundled decoder's tokenizer with a chat template, and its end token as padding."""
    tokenizer = load_tokenizer("tinylm")
    tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def assistant_tokenizer():
    """Return the assistant's tokenizer; skip the test where the set-up has not fetched it."""
    try:
        return load_tokenizer("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy all values and the trainable names, to show that nothing changed."""
    values = {n: t.detach().clone() for n, t in model.state_dict().items()}
    values |= {f"trains {n}": torch.tensor(p.requires_grad) for n, p in model.named_parameters()}
    return values | {f"module {n}": torch.tensor(0) for n, _ in model.named_modules()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all is equal bit by bit, in the same order; NaN equals NaN, and of tensors on the
    meta device, which have no values, the shapes count."""

    def equal(x: torch.Tensor, y: torch.Tensor) -> bool:
        if x.is_meta or y.is_meta:
            return x.is_meta == y.is_meta and x.shape == y.shape
        lost = x.isnan()
        return torch.equal(lost, y.isnan()) and torch.equal(
            x.masked_fill(lost, 0), y.masked_fill(lost, 0)
        )

    return list(a) == list(b) and all(equal(a[n], b[n]) for n in a)


def hooks(model: nn.Module) -> list[str]:
    """Return the paths of the modules that have a hook on their forward."""
    return [p for p, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


@contextmanager
def refused(model: nn.Module, match: str, error: type[Exception] = ValueError):
    """What is done inside is refused in these words; values, modules, what trains, the mode, the
    method in the model, whether it is merged, and its hooks stay as they were."""

    def found():
        injection = injection_of(model)
        merged = injection is not None and injection.merged
        return injection, merged, hooks(model), [m.training for m in model.modules()]

    before, and_beside = state(model), found()
    with pytest.raises(error, match=match):
        yield
    assert same(state(model), before)
    assert found() == and_beside


# ------------------------------------------------------------------ files


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder, to compare."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same_adapter(a: Path, b: Path) -> bool:
    """Return whether two folders hold the same adapter; the entries of a header have no order."""
    (config, tensors, header), theirs = read_adapter(a), read_adapter(b)
    return config == theirs[0] and same(tensors, theirs[1]) and header == theirs[2]


def read_config(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def rewrite(folder: Path, change: Callable[[dict], object] | None = None, **entries) -> Path:
    """Write an adapter's files as another program would: without our header, which would tell that
    something was changed. `change` is done to the tensors; an entry `...` is left out."""
    tensors = load_file(folder / WEIGHTS)
    if change:
        change(tensors)
    save_file(tensors, folder / WEIGHTS)
    config = {k: v for k, v in (read_config(folder) | entries).items() if v is not ...}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


# ------------------------------------------------------------------ beside PEFT's


def close(a, b, tolerance: float = 1e-6, what: str = "", relative: bool = False) -> None:
    """`relative`: to the largest entry of `a`."""
    assert a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all(), what
    gap = (a - b).abs().max().item() / (a.abs().max().item() if relative else 1)
    assert gap <= tolerance, f"{what} differs by {gap:.1e}"


def step_of_both(theirs, ours, batch: dict[str, torch.Tensor], tolerance: float = 1e-6):
    """Equal logits and losses, drawn with one seed where something drops, and gradients in both
    models; returns our output."""
    torch.manual_seed(3)
    a = theirs(**batch)
    torch.manual_seed(3)
    b = ours(**batch)
    close(a.logits, b.logits, tolerance, "logits")
    close(a.loss, b.loss, tolerance, "loss")
    a.loss.backward()
    b.loss.backward()
    return b


def gradients(theirs, ours, names: dict[str, str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{parameter: (PEFT's gradient, ours)} of all that trains, the same in both.

    names: {part of a name in PEFT: what it is here}, replaced in this order."""
    mine, found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}, {}
    for name, p in theirs.base_model.model.named_parameters():
        if p.requires_grad:
            for part, own in {"modules_to_save.default.": "", **names}.items():
                name = name.replace(part, own)
            found[name] = p.grad, mine.pop(name)
    assert found and not mine, f"PEFT does not train {list(mine)}"
    return found


def only_the_branch_drops(*models: nn.Module, p: float) -> None:
    """Train mode in which no dropout draws numbers but that of the branches, which have this p."""
    for model in models:
        for module in model.train().modules():
            if isinstance(module, nn.Dropout) and module.p != p:
                module.p = 0.0


def listed(names: tuple[str, ...] | str) -> list[str] | str:
    """Return names of modules as PEFT takes them."""
    return names if isinstance(names, str) else list(names)


def ia3_config(targets, feedforward, task: str | None = None):
    """Return PEFT's config of an (IA)³ of ours."""
    from peft import IA3Config

    names = dict(target_modules=listed(targets), feedforward_modules=listed(feedforward))
    return IA3Config(**names, task_type=task)


def lora_config(method: LoRA, task: str | None = None, **more):
    """Return PEFT's config of a LoRA or a DoRA of ours."""
    from peft import LoraConfig  # takes seconds, which other tests need not wait for

    settings = dict(r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout)
    settings |= dict(use_rslora=method.rslora, use_dora=isinstance(method, DoRA))
    return LoraConfig(**(settings | more), target_modules=listed(method.targets), task_type=task)


def lora_pair(base: nn.Module, method: LoRA, task: str | None = None):
    """Return (PEFT's model, ours) on copies of one base, with the same perturbed values."""
    from peft import get_peft_model

    theirs, ours = get_peft_model(deepcopy(base), lora_config(method, task)), deepcopy(base)
    inject(ours, method)
    wrappers = injection_of(ours).wrappers
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert list(layers) == list(wrappers)
    torch.manual_seed(7)
    with torch.no_grad():
        for path, layer in layers.items():
            branch = wrappers[path].dora if isinstance(method, DoRA) else wrappers[path].lora
            for factor in ("lora_A", "lora_B"):
                value = 0.2 * torch.randn_like(getattr(branch, factor))
                getattr(branch, factor).copy_(value)
                getattr(layer, factor)["default"].weight.copy_(value)
            if isinstance(method, DoRA):
                m = layer.lora_magnitude_vector["default"].weight
                m.mul_(1 + 0.1 * torch.randn_like(m))
                branch.magnitude.copy_(m)
    return theirs.eval(), ours.eval()
