"""Save and load what a method learned, in the file format of Hugging Face PEFT.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. PEFT opens ours
wherever it has the method, and we open PEFT's. The header of our weights says three things more,
which PEFT passes over: a fingerprint of the base they belong to, the method's entries that PEFT
does not know, and the modules of a classification head that are in the file and do not train.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .atomic import write_atomically
from .injection import Report, fingerprint, inject, injection_of, refuse_injected, require_injection
from .method import ATTACHED, Injection, Method, registered_methods
from .targets import head_of, is_classifier, matches

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Where the header of our weights keeps them.
_BASE, _OWN, _FROZEN = "peft_lessons_base", "peft_lessons_own", "peft_lessons_frozen"
# PEFT wraps each module whose path ends so into its modules_to_save, if the task is SEQ_CLS.
_HEADS = ("classifier", "score")
# Entries of any config of PEFT's that say nothing about the function the adapter computes.
_SAYS_NOTHING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_OFF = (None, False, {}, [], "none")


def _slots(
    model: nn.Module, injection: Injection, frozen_head: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key in PEFT's file, tensor in the model) for all that a file contains; files of other
    programs contain no frozen head."""
    names = injection.method.files.tensors
    # PEFT's prompt methods hold the base itself; its others hold a tuner that holds the base.
    base = _PREFIX if injection.attached is None else "base_model."
    for path, module in injection.modules().items():
        prefix = "" if path == ATTACHED else f"{_PREFIX}{path}."
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in names:
                yield prefix + names[name], tensor
    for name, tensor in model.named_parameters():
        if name in injection.whole or (frozen_head and name in injection.frozen):
            yield base + name, tensor


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a model, or None."""
    if type(model).__name__.endswith("ForCausalLM"):
        return "CAUSAL_LM"
    return "SEQ_CLS" if is_classifier(model) else None


def _task_of_file(model: nn.Module, injection: Injection) -> str | None:
    """Return the task that a file names: none for a classifier whose head the method has changed.

    For SEQ_CLS PEFT asks the file for the whole head, which such a file lacks. A prompt changes
    no head, and PEFT opens no prompt without a task."""
    heads = {path for path, _ in model.named_modules() if path.endswith(_HEADS)}
    headless = injection.attached is None and not heads <= {*injection.in_full}
    return None if is_classifier(model) and headless else task_type(model)


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the model's adapter to `folder` (made if missing) and return the path.

    Both files are complete under temporary names before either takes its place, so an interrupted
    save leaves an older adapter whole.

    Raises ValueError if the model holds no method, RuntimeError while it is merged (the branch
    would be added to weights that contain it), ValueError if a tensor is NaN or infinite or has no
    values (meta device)."""
    injection = require_injection(model, "save_adapter")
    if injection.merged:
        raise RuntimeError("save_adapter: the adapter is merged; unmerge(model) first")
    named = [*_slots(model, injection)]
    slots = dict(named)
    if len(slots) < len(named):
        keys = [key for key, _ in named]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"save_adapter: two tensors are called {twice!r} in the file")
    if any(t.is_meta for t in slots.values()):
        raise ValueError("save_adapter: the model is on the meta device and has no values to save")
    tensors = {k: t.detach().cpu() for k, t in slots.items()}
    _refuse_non_finite(tensors, "save_adapter")
    method, files = injection.method, injection.method.files
    entries = files.entries(method)
    if files.write:
        entries, tensors = files.write(method, entries, tensors)
    if entries.get("target_modules") == "all-linear":
        entries["target_modules"] = list(injection.wrappers)
    private = {name: entries.pop(name) for name in files.own}
    entries = {
        "peft_type": files.kind,
        "task_type": _task_of_file(model, injection),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "inference_mode": True,
        **entries,
        "modules_to_save": list(injection.in_full) or None,
    }
    config = (json.dumps(entries, indent=2) + "\n").encode()
    notes = {_OWN: json.dumps(private) if private else "", _FROZEN: ",".join(injection.frozen_head)}
    header = {"format": "pt", _BASE: injection.body}
    header |= {name: text for name, text in notes.items() if text}
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_adapter: folder={str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_atomically({folder / WEIGHTS: save(tensors, metadata=header), folder / CONFIG: config})
    return folder


def _refuse_non_finite(tensors: dict[str, torch.Tensor], verb: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_meta and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{verb}: {key!r} holds NaN or infinity; nothing was changed")


def read_adapter(folder: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """Read and check the two files of an adapter folder; return (config, tensors, header of the
    weights). The config includes the method's own entries, which are stored in the header.

    Raises FileNotFoundError if one of the two files is missing, ValueError if one is broken."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no {name}: an adapter is a folder with {CONFIG} and "
                f"{WEIGHTS}"
            )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} in {str(folder)!r} is broken or cut off: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{CONFIG} in {str(folder)!r} names no peft_type: not an adapter's config")
    saved = config.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ValueError(f"{CONFIG}: modules_to_save={saved!r} must be a list of module names")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} in {str(folder)!r} is broken or cut off: {error}") from None
    known = [m.files for m in registered_methods() if m.files.kind == config["peft_type"]]
    indices = {name for files in known for name in files.indices}
    for key, tensor in tensors.items():
        fits = _FLOATS
        made_of = "16-, 32- or 64-bit floats: it was quantised, or it is not an adapter"
        if key.rpartition(".")[2] in indices:
            fits, made_of = _INTEGERS, "32- or 64-bit whole numbers where it has indices"
        if tensor.dtype not in fits:
            raise ValueError(
                f"{key!r} holds {tensor.dtype} numbers, but an adapter is made of {made_of}"
            )
    _refuse_non_finite(tensors, "load_adapter")
    return config | _own_entries(header.get(_OWN, ""), folder), tensors, header


def _own_entries(text: str, folder: Path) -> dict:
    """Return what the header says for a method of ours. ValueError for anything else there."""
    try:
        entries = json.loads(text or "{}")
    except (ValueError, RecursionError):
        entries = None
    known = {name for method in registered_methods() for name in method.files.own}
    if not isinstance(entries, dict) or not entries.keys() <= known:
        raise ValueError(
            f"the header of {WEIGHTS} in {str(folder)!r} holds {_OWN}={text[:80]!r}, which must be "
            f"an object of {', '.join(sorted(known))} only"
        )
    return entries


def _method_of(config: dict, tensors: dict) -> tuple[Method, dict[str, torch.Tensor]]:
    """Return the method that a config describes, and its tensors. ValueError for other methods."""
    kind = config["peft_type"]
    known = [m for m in registered_methods() if m.files.kind == kind]
    if not known:
        names = ", ".join(sorted({m.files.kind for m in registered_methods()}))
        raise ValueError(
            f"peft_type {kind!r} is not a method of the course; known are {names}; a method of "
            "your own is known once @register from peft_lessons.engine stands above its class"
        )
    complaints = {}
    for method in known:
        files = method.files
        read = {name for name, _ in files.fields.values()} | {*files.constants, *files.others}
        constants = files.constants.items()
        wrong = [f"asks for {k}={v!r}" for k, v in constants if config.get(k) != v]
        unread = {k: v for k, v in config.items() if k not in read | _SAYS_NOTHING}
        on = {k: v for k, v in unread.items() if v not in files.off.get(k, _OFF)}
        wrong += [f"does not read {k}={v!r}" for k, v in on.items()]
        if not wrong:
            try:
                if files.read:
                    return files.read(method, config, tensors)
                return method(**files.settings(config)), tensors
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{CONFIG} describes no {method.__name__}: {error}") from None
        complaints[method.__name__] = wrong
    reasons = "; ".join(f"{name} {', '.join(wrong)}" for name, wrong in complaints.items())
    from peft import PeftType  # takes seconds, which a file that fits need not wait

    by_peft = ". PEFT can load it: PeftModel.from_pretrained(model, folder)"
    raise ValueError(
        f"this {kind} adapter uses what the course does not have: {reasons}"
        + (by_peft if kind in PeftType.__members__ else "")
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, without values and memory."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


# Copies made under a caller's inference_mode() could never train, a head's not even on meta.
@torch.inference_mode(False)
def load_adapter(
    model: nn.Module, folder: str | os.PathLike, trainable: bool = False, check_base: bool = True
) -> Report:
    """Put the adapter in `folder`, ours or PEFT's, into an untouched base model, in place.

    Everything is tried on a copy without values first; the model changes only if it all fits.

    Args:
        trainable: False freezes all (to use the adapter), True lets it train on.
        check_base: False loads an adapter that was made for another base on purpose.

    Raises FileNotFoundError, ValueError (broken file, unknown method or option, keys or shapes that
    do not fit, NaN, another base) or RuntimeError (a method is in the model); model unchanged."""
    config, tensors, header = read_adapter(folder)
    refuse_injected(model)
    saved = config.get("modules_to_save") or []
    if check_base:
        refuse_other_base(model, config, header)
    method, tensors = _method_of(config, tensors)
    # PEFT lists every name that a head may have; those of other models match nothing here.
    paths = [path for path, _ in model.named_modules()]
    frozen = header[_FROZEN].split(",") if _FROZEN in header else []
    trains = [name for name in saved if name not in frozen]
    to_save = [name for name in trains if any(matches(path, (name,)) for path in paths)]

    skeleton = _on_meta(model)
    inject(skeleton, method, modules_to_save=to_save)
    expected = dict(_slots(skeleton, injection_of(skeleton), bool(frozen)))
    refuse_misfit(expected, tensors)
    for key, slot in expected.items():
        if slot.shape != tensors[key].shape:
            raise ValueError(
                f"{key!r} has shape {tuple(tensors[key].shape)} in the file, but the model and the "
                f"config ask for {tuple(slot.shape)}"
            )
        # The head of a half-precision model may be too narrow for what the file holds.
        _refuse_non_finite({key: tensors[key].to(slot.dtype)}, f"load_adapter as {slot.dtype}")

    result = inject(model, method, modules_to_save=to_save)
    with torch.no_grad():
        for key, slot in _slots(model, injection_of(model), bool(frozen)):
            slot.copy_(tensors[key])
    if not trainable:
        model.requires_grad_(False)
    return result


def refuse_misfit(expected: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if a file misses keys that the model expects, or has others."""
    what = ""
    if surplus := sorted(tensors.keys() - expected.keys()):
        what, keys, total = "has, with no place in the model,", surplus, len(tensors)
    if missing := sorted(expected.keys() - tensors.keys()):
        what, keys, total = "misses", missing, len(expected)
    if what:
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise ValueError(
            f"the file {what} {keys[0]!r}{more} of {total} tensors: it was made for another model"
        )


def refuse_other_base(model: nn.Module, config: dict, header: dict) -> None:
    """Raise ValueError if an adapter, as read by `read_adapter`, belongs to another base."""
    digest, saved = header.get(_BASE), config.get("modules_to_save") or []
    # A head that the file holds may be another one in the model: the file's takes its place.
    held = [head for head in head_of(model) if head in saved]
    digests = {fingerprint(model)} | ({fingerprint(model, held)} if held else set())
    remedy = "load its own base, or pass check_base=False if you mean it"
    if digest is not None:
        if "meta" not in (digest, *digests) and digest not in digests:
            raise ValueError(f"the adapter was made for a base with other weights: {remedy}")
        return
    # PEFT's own files carry no fingerprint, only a name, which may be missing.
    name, here = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if name and here and name != here:
        raise ValueError(f"the adapter was made for {name!r}, this model is {here!r}: {remedy}")
