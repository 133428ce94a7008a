"""Replace a model's layers by a method's modules, and restore them.

Every method goes through the verbs of this file. Whatever does not fit is refused before anything
is changed.
"""

from __future__ import annotations

import copy
import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .layer import AdapterLayer, refuse_twice, trained_dtype
from .method import ATTACHED, Injection, Method, registered_methods
from .targets import IN_4_BITS, find_whole, fresh_modules, frozen_head_of, head_of, within

# ------------------------------------------------------------------ what was done, and to undo it


def injection_of(model: nn.Module) -> Injection | None:
    """Return the record of `inject` on this model, or None for a plain base."""
    return model.__dict__.get("_peft_injection")


def require_injection(model: nn.Module, verb: str, method: type[Method] | None = None) -> Injection:
    """Return the record of `inject`. ValueError if the model has no method of this kind."""
    injection = injection_of(model)
    # By the name of its type: a lesson defines a method again, and a file may be read by either.
    if injection is None or (method and injection.method.files.kind != method.files.kind):
        what = method.__name__ if method else "method"
        raise ValueError(f"{verb}: the model holds no {what}; inject(model, ...) one first")
    refuse_off(injection, verb)
    return injection


def refuse_off(injection: Injection, verb: str) -> None:
    """Raise RuntimeError while `disabled` has switched the method off: the model then holds the
    base's values in place of the trained ones."""
    if injection.off and verb != "disabled":
        raise RuntimeError(
            f"{verb}: disabled(model) has switched the method off; call {verb} after the with block"
        )


def attached_to(model: nn.Module, kind: type[nn.Module], verb: str) -> nn.Module:
    """Return the module of this kind that a method attached. ValueError if there is none."""
    attached = getattr(injection_of(model), "attached", None)
    if not isinstance(attached, kind):
        raise ValueError(f"{verb}: the model holds no {kind.__name__}; inject one first")
    return attached


@dataclass(frozen=True, kw_only=True)
class Report:
    """List the trainable parameters after `inject` or `freeze`; print it to see a table."""

    method: Method | None
    trainable: int
    total: int
    base: int
    modules: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    whole: tuple[str, ...] = ()
    whole_parameters: int = 0
    fresh: tuple[str, ...] = ()
    frozen_head: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows = [("base, frozen", self.base - self.whole_parameters, "")]
        if added := self.total - self.base:
            leaves = (m.rsplit(".", 1)[-1] for m in self.modules)
            sites = Counter(zip(leaves, self.shapes, strict=True))
            where = ", ".join(
                f"{n} × {leaf} {s[1]}→{s[0]}" if len(s) == 2 else f"{n} × {leaf}"
                for (leaf, s), n in sites.items()
            )
            rows.append(("added, trains", added, where))
        if self.whole_parameters:
            # Single parameters go by the end of their path: "6 × query.bias".
            ends = Counter(
                f"{n} (new head)" if n in self.fresh else ".".join(n.split(".")[-2:])
                for n in self.whole
            )
            names = [end if n == 1 else f"{n} × {end}" for end, n in ends.items()]
            parts = ", ".join(names[:3])
            if len(names) > 3:
                parts += f" and {sum([*ends.values()][3:])} more"
            rows.append(("of the base, trains", self.whole_parameters, parts))
        share = 100 * self.trainable / self.base
        rows.append(("trainable", self.trainable, f"{share:.3g} % of the base's {self.base:,}"))
        head = repr(self.method) if self.method else "all frozen except what is named below"
        body = [_on_lines(f"  {what:<20}{n:>13,}  {note}".rstrip(), 37) for what, n, note in rows]
        if self.frozen_head:
            body += [
                f"  Frozen in the classification head: {', '.join(self.frozen_head)}.",
                f"  To train the head too, pass modules_to_save={self.frozen_head}.",
            ]
        return "\n".join((_on_lines(head, 4), *body))


def _on_lines(text: str, indent: int) -> str:
    """Wrap a text at 100 characters, after a comma alone; further lines are indented."""
    tied = re.sub(r"(?<!,) ", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.fill(tied, 100, subsequent_indent=" " * indent, break_long_words=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _trainable(model: nn.Module) -> int:
    return _size(p for p in model.parameters() if p.requires_grad)


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """Return a short digest of the base's names, shapes and a sample of its values (of its codes if
    it is in 4 bits), without newly initialised modules and the top-level modules in `without`.

    The same base gives the same digest in float32 and bfloat16. A model on the meta device has no
    values: its digest is "meta", which matches any other."""
    digest, outside = hashlib.sha256(), (*fresh_modules(model), *without)
    codes = ((name, b) for name, b in model.named_buffers() if b.dtype == torch.uint8)
    for name, p in (*model.named_parameters(), *codes):
        if p.is_meta:
            return "meta"
        if within(name, outside):
            continue
        flat = p.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32).bfloat16()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------ the verbs


def refuse_injected(model: nn.Module) -> None:
    """Raise RuntimeError if the model or a part of it holds a method already."""
    for path, module in model.named_modules():
        injection = injection_of(module)
        if injection is not None:
            where = f"model.{path}" if path else "model"
            raise RuntimeError(
                f"the {where} holds {injection.method!r} already: a second method would wrap the "
                f"first; unload({where}) first"
            )


def freeze(model: nn.Module, modules_to_save: Iterable[str] | str = ()) -> Report:
    """Freeze the model except a new classification head and `modules_to_save`, in place.

    Raises ValueError if a name matches nothing, RuntimeError if a method is in the model."""
    refuse_injected(model)
    saved = find_whole(model, modules_to_save, ())
    model.requires_grad_(False)
    for module in saved.values():
        module.requires_grad_(True)
    size, trainable = _size(model.parameters()), _trainable(model)
    return Report(
        method=None,
        trainable=trainable,
        total=size,
        base=size,
        whole=tuple(saved),
        whole_parameters=trainable,
        fresh=fresh_modules(model),
        frozen_head=frozen_head_of(model, saved),
    )


def _in_mode_of(layer: nn.Module, wrapper: AdapterLayer) -> AdapterLayer:
    """Put the modules that a wrapper adds into the layer's train or eval mode, and return it.
    Modules inside the layer keep theirs: a user may have switched off one dropout."""
    inside = set(layer.modules())
    for module in wrapper.modules():
        if module not in inside:
            module.training = layer.training
    return wrapper


def _restore(model: nn.Module, were_trainable: dict[str, bool]) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(were_trainable[name])


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _selected(model: nn.Module, method: Method) -> list[str]:
    """Return the names of the base's own parameters that a method trains. ValueError for a name
    that the model has not, or that holds no floats."""
    parameters, names = dict(model.named_parameters()), list(method.select(model))
    for name in names:
        if name not in parameters:
            raise ValueError(f"{type(method).__name__}: {name!r} is not a parameter of the model")
        if not parameters[name].is_floating_point():
            raise ValueError(f"{type(method).__name__}: {name!r} is{IN_4_BITS[1:]}")
    return names


def _facts(model: nn.Module, targets: dict[str, nn.Module], saved: Container[str]) -> dict:
    """Return what an `Injection` records of the base before it changes."""
    held = [path for path in head_of(model) if path in saved]
    digest = fingerprint(model)
    weights = {path: getattr(layer, "weight", None) for path, layer in targets.items()}
    return {
        "fingerprint": digest,
        "body": fingerprint(model, held) if held else digest,
        "size": _size(model.parameters()),
        "shapes": {path: tuple(getattr(w, "shape", ())) for path, w in weights.items()},
        "were_trainable": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def _made(
    model: nn.Module, method: Method, targets: dict[str, nn.Module], selected: list[str]
) -> tuple[dict[str, AdapterLayer], nn.Module | None, list]:
    """Return the modules that a method adds, and the handles of its hooks; the model keeps its
    layers. TypeError or ValueError for a method that makes none."""
    made = method.wrap_all(targets)
    for path, wrapper in made.items():
        if not isinstance(wrapper, nn.Module):
            raise TypeError(f"wrap returns {wrapper!r} for {path!r}: is a return missing?")
    wrappers = {path: _in_mode_of(layer, made[path]) for path, layer in targets.items()}
    attached, handles = method.attach(model) or (None, [])
    if not (wrappers or attached or selected):
        raise ValueError(f"{type(method).__name__} finds nothing to train in this model")
    return wrappers, attached, handles


# Parameters made under a caller's inference_mode() could never train.
@torch.inference_mode(False)
def inject(model: nn.Module, method: Method, modules_to_save: Iterable[str] | str = ()) -> Report:
    """Freeze `model` and put `method` into it, in place.

    Trainable are the parameters that the method adds, a new classification head and the modules in
    `modules_to_save`. Any other classification head stays frozen, and the report says so.
    Added parameters are on the device of their layer; in a half-precision base they are float32, as
    in PEFT, since small steps would be lost in 16 bits.

    Returns a `Report`. Raises TypeError or ValueError, with the model unchanged, if the method does
    not fit the model, and RuntimeError if a method is in it already."""
    if not isinstance(method, Method):
        known = ", ".join(sorted(m.__name__ for m in registered_methods()))
        raise TypeError(f"method={method!r} must describe a method, such as one of: {known}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_injected(model)
    targets = method.find(model)
    saved = find_whole(model, modules_to_save, targets)
    for path, layer in targets.items():
        method.check(path, layer)
    selected = _selected(model, method)
    frozen_head = frozen_head_of(model, (*targets, *saved, *selected))
    facts = _facts(model, targets, {*saved, *frozen_head})
    parameters = dict(model.named_parameters())
    try:
        wrappers, attached, handles = _made(model, method, targets, selected)
    except Exception:
        _restore(model, facts["were_trainable"])
        raise

    # From here on nothing can fail: the model is changed.
    in_full = {f"{path}.{n}" for path, m in saved.items() for n, _ in m.named_parameters()}
    trains = {n: p for n, p in parameters.items() if n in in_full or n in selected}
    frozen = {n: p for n, p in parameters.items() if within(n, frozen_head)}
    model.requires_grad_(False)
    for p in trains.values():
        p.requires_grad_(True)
    for path, wrapper in wrappers.items():
        _put(model, path, wrapper)
    if attached is not None:
        model.add_module(ATTACHED, attached.train(model.training))
    model._peft_injection = injection = Injection(
        method=method,
        wrappers=wrappers,
        attached=attached,
        handles=handles,
        whole={name: p.detach().clone() for name, p in trains.items()},
        whole_modules=tuple(saved),
        frozen_head=frozen_head,
        frozen={name: p.detach().clone() for name, p in frozen.items()},
        **facts,
    )
    for _, p in injection.added():
        p.data = p.data.to(trained_dtype(p.dtype))
        p.requires_grad_(True)
    return report(model)


def injected_copy(model: nn.Module, method: Method) -> nn.Module:
    """Return a copy of the model with the method in it; the model stays as it is. Errors as
    `inject`."""
    changed = copy.deepcopy(model)
    inject(changed, method)
    return changed


def report(model: nn.Module) -> Report:
    """Return the report of `inject` again. ValueError if the model holds no method."""
    injection = require_injection(model, "report")
    added = {name: p.numel() for name, p in injection.added()}
    # A wrapper may add nothing: QLoRA also quantises layers that get no adapter.
    adding = {
        path: injection.shapes[path]
        for path in injection.wrappers
        if any(name.startswith(path + ".") for name in added)
    }
    # Whole modules of the base train, and so do the parameters that the method selects.
    inside = tuple(module + "." for module in injection.whole_modules)
    selected = (name for name in injection.whole if not name.startswith(inside))
    return Report(
        method=injection.method,
        trainable=_trainable(model),
        total=injection.size + sum(added.values()),
        base=injection.size,
        modules=tuple(adding),
        shapes=tuple(adding.values()),
        whole=(*injection.whole_modules, *selected),
        whole_parameters=sum(t.numel() for t in injection.whole.values()),
        fresh=fresh_modules(model),
        frozen_head=injection.frozen_head,
    )


def _merge_all(model: nn.Module, verb: str, merged: bool) -> None:
    injection = require_injection(model, verb)
    if injection.attached is not None:
        name = type(injection.method).__name__
        raise TypeError(
            f"{verb}: what {name} adds lies outside the layers, and their weights cannot hold it"
        )
    if not injection.wrappers:  # what trained is the base's own, and lies in its weights already
        refuse_twice(injection.kept, merged)
        injection.kept = merged
    # First everything is computed and thrown away: an error in the last layer leaves the first one
    # as it was, and never more than one layer's new weight is held.
    for path, wrapper in injection.wrappers.items():
        try:
            wrapper.new_tensors(merged)
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{verb}: {path!r}: {error}") from None
    for wrapper in injection.wrappers.values():
        wrapper.set_merged(merged)


def merge(model: nn.Module) -> None:
    """Merge the method into the base's weights; the model computes the same without the branch.
    Trained parameters of the base itself need no merging: after `merge`, `unload` keeps them.

    Raises RuntimeError if merged already, TypeError if the method cannot be merged, ValueError if a
    weight would hold NaN or infinity. In each case the model stays as it was."""
    _merge_all(model, "merge", True)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, up to rounding: about 1e-8 in float32. In bfloat16 the error matters after many
    rounds, so keep a copy of the base instead. Errors as `merge`."""
    _merge_all(model, "unmerge", False)


def unload(model: nn.Module) -> nn.Module:
    """Remove the method from the model, in place, and return the plain base.

    Without `merge` the base is bit by bit as before `inject`, heads included, but stays quantised
    if the method quantised it. After `merge` its weights contain what was learned. Each parameter
    is trainable again if it was before `inject`. ValueError if the model holds no method."""
    injection = require_injection(model, "unload")
    for handle in injection.handles:
        handle.remove()
    if injection.attached is not None:
        delattr(model, ATTACHED)
    for path, wrapper in injection.wrappers.items():
        _put(model, path, wrapper.base)
    old = injection.whole | injection.frozen
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in old and not injection.merged:
                p.copy_(old[name])
    _restore(model, injection.were_trainable)
    del model._peft_injection
    return model


# ------------------------------------------------------------------ the base for a moment


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Switch the method off inside `with disabled(model):`, so that the model computes exactly
    what the base computed before `inject`. A method that quantises the base leaves the base in
    4 bits.

    Wrapped layers call their base alone, hooks of prompts and prefixes do nothing, and trained
    parameters of the base itself (BitFit, partial fine-tuning, a new head) have their values from
    before the training. The block may be nested. Everything is switched on again after the block,
    even after an exception; train or eval mode and gradients stay as they are.

    Raises TypeError for a model of Hugging Face PEFT, ValueError if the model holds no method or
    one that changes the base's weights (LoftQ), RuntimeError while the method is merged."""
    if hasattr(model, "disable_adapter"):
        raise TypeError(
            f"disabled: {type(model).__name__} is a model of Hugging Face PEFT: write "
            "with model.disable_adapter():"
        )
    injection = require_injection(model, "disabled")
    if injection.merged:
        raise RuntimeError(
            "disabled: the method is merged into the base's weights; unmerge(model) first"
        )
    if why := injection.method.moves_base:
        raise ValueError(
            f"disabled: {type(injection.method).__name__} {why}, so the base alone is another "
            "model: load the base again for comparison"
        )
    if injection.off:  # an outer block switches it on again
        yield model
        return
    with ExitStack() as on_again:
        injection.off = True
        on_again.callback(setattr, injection, "off", False)
        for wrapper in injection.wrappers.values():
            _swap(vars(wrapper), "forward", wrapper.base.__call__, on_again)
        for handle in injection.handles:
            _swap(handle.hooks_dict_ref(), handle.id, lambda *_: None, on_again)
        old = injection.whole | injection.frozen
        names = {p: name for name, p in model.named_parameters() if name in old}
        for module in model.modules():
            # Tied parameters belong to several modules.
            for leaf, p in list(module._parameters.items()):
                if p in names:
                    before = nn.Parameter(old[names[p]].to(p), requires_grad=False)
                    _swap(module._parameters, leaf, before, on_again)
        yield model


def _swap(place: dict, key: Any, value: Any, undo: ExitStack) -> None:
    """Set `place[key]`, and have `undo` restore the entry or its absence at its old position."""
    if key in place:
        undo.callback(place.__setitem__, key, place[key])
    else:
        undo.callback(place.pop, key)
    place[key] = value
