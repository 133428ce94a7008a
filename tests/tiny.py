"""What the tests share: tiny random models of four families, a small task, and how to compare."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_lessons import DoRA, LoRA, inject
from peft_lessons.engine import CONFIG, WEIGHTS, injection_of, read_adapter

# ------------------------------------------------------------------ models

SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
FEED_FORWARD = dict(intermediate_size=96)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = SIZES | FEED_FORWARD | dict(num_key_value_heads=2, max_position_embeddings=128)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def shaken(model: nn.Module) -> nn.Module:
    """The model, moved a little: biases that start at 0 would hide that they are left out."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """With grouped key-value heads, and biases on q, k and v."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **SIZES,
        **FEED_FORWARD,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    return shaken(Qwen2ForCausalLM(config))


def tiny_opt(seed: int = 0, ffn_dim: int = 96) -> OPTForCausalLM:
    """With learned positions, biases everywhere and a head tied to the embedding."""
    torch.manual_seed(seed)
    config = OPTConfig(
        **SIZES,
        ffn_dim=ffn_dim,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        dropout=0.0,
    )
    return shaken(OPTForCausalLM(config))


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    """With biases, and a head that counts as fresh."""
    torch.manual_seed(seed)
    config = BertConfig(
        **SIZES,
        **FEED_FORWARD,
        max_position_embeddings=64,
        num_labels=2,
    )
    model = shaken(BertForSequenceClassification(config))
    model.fresh_modules = ("classifier",)
    return model


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "opt": tiny_opt, "bert": tiny_bert}
EACH = pytest.mark.parametrize("name", MODELS)
CAUSAL = pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
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


def trained(model: nn.Module, size: float = 0.2, seed: int = 7) -> nn.Module:
    """The model with random values in all that its method added, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in injection_of(model).added():
            p.copy_(size * torch.randn(p.shape))
    return model


def moved(model: nn.Module) -> nn.Module:
    """The same of all that trains, a head too and what is PEFT's: moved at random."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


# ------------------------------------------------------------------ tasks and batches


class TinyTask:
    """Rows whose label says whether their first token is odd; enough of a Task for fit."""

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

    def stream(self, size: int, seed: int, start: int = 0):
        step = start
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            yield self._batch(torch.randint(len(self.ids), (size,), generator=generator))
            step += 1


class TinyText(TinyTask):
    """The same rows as a text to predict, for causal models."""

    def _batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = super()._batch(rows)
        return batch | {"labels": batch["input_ids"]}


def interrupted(kind: type[TinyTask], at: int) -> TinyTask:
    """A task whose stream stops before step `at`, counted from 0, like a closed laptop."""

    class Interrupted(kind):
        def stream(self, size: int, seed: int, start: int = 0):
            for step, batch in enumerate(super().stream(size, seed, start), start):
                if step == at:
                    raise KeyboardInterrupt
                yield batch

    return Interrupted()


def task_of(name: str) -> TinyTask:
    return TinyTask() if name == "bert" else TinyText()


TASKS = {"bert": "SEQ_CLS"}  # what PEFT calls them


def task_type(name: str) -> str:
    return TASKS.get(name, "CAUSAL_LM")


def batch_of(name: str, vocabulary: int = 128) -> dict[str, torch.Tensor]:
    """Three rows of 12, 9 and 5 tokens; padded on the left for decoders, as for generation."""
    torch.manual_seed(11)
    ids, mask = torch.randint(3, vocabulary, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 9, 5)):
        mask[row, length:] = 0
    if name != "bert":
        mask = mask.flip(1)
    ids = ids.where(mask.bool(), 1)
    labels = torch.tensor([1, 0, 1]) if name == "bert" else ids.where(mask.bool(), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ------------------------------------------------------------------ what stays as it was


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all values, and of what trains, to show that nothing changed."""
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
    """The paths of the modules that have a hook on their forward."""
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
    """The bytes of each file of a folder, to compare."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same_adapter(a: Path, b: Path) -> bool:
    """Whether two folders hold the same adapter; the entries of a header have no order."""
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


def lora_config(method: LoRA, task: str | None = None, **more):
    """PEFT's config of a LoRA or a DoRA of ours."""
    from peft import LoraConfig  # takes seconds, which other tests need not wait for

    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    settings = dict(r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout)
    settings |= dict(use_rslora=method.rslora, use_dora=isinstance(method, DoRA))
    return LoraConfig(**(settings | more), target_modules=targets, task_type=task)


def lora_pair(base: nn.Module, method: LoRA, task: str | None = None):
    """(PEFT's model, ours) on copies of one base, with the same values as after training."""
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


# ------------------------------------------------------------------ generation

GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)


def greedy(model: nn.Module, batch: dict[str, torch.Tensor], **more) -> torch.Tensor:
    """Each row and the eight likeliest tokens after it."""
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    return model.generate(**prompt, **GREEDY, **more)


def positions_in(mask: torch.Tensor) -> torch.Tensor:
    """Those that `generate` gives: padding on the left takes none."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def by_hand(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `greedy` must give, by the plain forward and without a cache."""
    ids, end = batch["input_ids"], model.generation_config.eos_token_id
    mask = batch.get("attention_mask", torch.ones_like(ids))
    for _ in range(GREEDY["max_new_tokens"]):
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions_in(mask))
        logits = model(**inputs, use_cache=False).logits[:, -1].clone()
        if end is not None:
            logits[:, end] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids
