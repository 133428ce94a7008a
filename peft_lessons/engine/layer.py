"""The layer that replaces a layer of the base."""

from __future__ import annotations

import torch
from torch import nn


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what trains beside a weight of `dtype`: the same, but at least float32,
    since small steps would be lost in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


class AdapterLayer(nn.Module):
    """Wrap a layer of the base together with what a method adds; replaces it in the model.

    A subclass computes `forward` from `self.base` and, while `self.merged`, from the base alone.
    `inject` trains every parameter outside `self.base`: what is fixed is a buffer.
    What a method adds is in `trained_dtype` of the base's weight, float32 beside 16 bits; `inject`
    casts parameters that are not. `forward` computes in that dtype and returns the dtype of the
    base's output. `self.bias` is None if the base has no bias.
    A method that adds to the weight implements `delta_weight`. A method that rescales implements
    the merge itself as `merged_tensors` and `unmerged_tensors`. The first one may set a buffer that
    the second one needs, from the parameters alone: a merge of a whole model computes every layer
    twice, so that it can be refused before any layer changes."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.merged = False

    # Some models look at their layers' tensors themselves, T5 at a weight's dtype for one.
    @property
    def weight(self) -> torch.Tensor:
        """Return the base layer's weight."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the base layer's bias."""
        return self.base.bias

    def delta_weight(self) -> torch.Tensor:
        """Return the change of the weight, (out, in). TypeError if the layer cannot be merged."""
        raise TypeError(f"{type(self).__name__} cannot be merged into its base layer")

    def merged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the base layer's (weight, bias) after a merge; None for an unchanged bias."""
        change = self.delta_weight()  # first: it may refuse, and not every base has a weight
        return self.base.weight + change, None

    def unmerged_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the base layer's (weight, bias) from before the merge; None as above."""
        change = self.delta_weight()
        return self.base.weight - change, None

    def merge_weights(self) -> None:
        """Merge the branch into the base layer and switch it off.

        Raises RuntimeError if it is merged already (the change would count twice), ValueError if
        the result holds NaN or infinity (nothing is changed then)."""
        self.set_merged(True)

    def unmerge_weights(self) -> None:
        """Undo the merge, up to rounding, and switch the branch on. Errors as above."""
        self.set_merged(False)

    def new_tensors(self, merged: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the base layer's (weight, bias) after a merge, or after its undoing. Errors as
        `merge_weights`, and TypeError for a bias that the base layer has no place for."""
        refuse_twice(self.merged, merged)
        with torch.no_grad():
            new = self.merged_tensors() if merged else self.unmerged_tensors()
        for what, tensor in zip(("weight", "bias"), new, strict=True):
            if tensor is None or tensor.is_meta:
                continue
            if what == "bias" and self.bias is None:
                raise TypeError(
                    f"{type(self).__name__} cannot be merged: the merge needs a bias, and the base "
                    "layer has none; refuse such layers in the method's `check`"
                )
            dtype = getattr(self.base, what).dtype
            # A float32 sum may be finite and yet too large for a float16 layer.
            stored = tensor.to(dtype) if dtype.is_floating_point else tensor
            if not stored.isfinite().all():
                raise ValueError(
                    f"the new {what} would hold NaN or infinity; nothing was changed: look at the "
                    "adapter's values, training may have diverged"
                )
        return new

    def set_merged(self, merged: bool) -> None:
        """Merge, or undo the merge. Errors as `new_tensors`."""
        weight, bias = self.new_tensors(merged)
        with torch.no_grad():
            self.base.weight.copy_(weight)
            if bias is not None:
                self.base.bias.copy_(bias)
        self.merged = merged


def refuse_twice(merged: bool, wanted: bool) -> None:
    """Raise RuntimeError for merging what is merged, or unmerging what is not."""
    if merged == wanted:
        raise RuntimeError(
            "already merged: merging again would add the change twice; unmerge first"
            if merged
            else "not merged: there is nothing to take out"
        )
