"""What the course says of a method beside its mathematics: one row a method, written in its module.

The set-up with Hugging Face PEFT, the adviser, the growing chart and the map of a block read these
rows through `method_facts`. A method leaves out what does not apply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Where learning rates for language models come from.
TRL = "TRL's documentation, PEFT Integration"
SFT = f"{TRL}: 2e-4 for SFT; Unsloth's hyperparameters guide: 2e-4"
COMPARISON = "PEFT's method_comparison (MetaMathQA, Llama-3.2-3B)"


@dataclass(frozen=True)
class Point:
    """Name a point of the growing chart: its method in data/results, its label, and where the label
    stands: points to the right of the point, if negative to the left, and above it."""

    method: str
    label: str
    offset: tuple[float, float]


@dataclass(frozen=True)
class OnMap:
    """Say what trains at a place in the map of a block: the name of the place in `drawings`, its
    label, its colour (an index of `studies.figures.COLORS`), and what trains there."""

    name: str
    label: str
    color: int
    trains: str


@dataclass(frozen=True)
class Mark:
    """Name a sign that the map of a block adds to every linear map, and what it stands for."""

    name: str
    sign: str
    meaning: str


@dataclass(frozen=True)
class Recommended:
    """State what the adviser says of a method.

    Fields:
        title:    its name in an advice
        fields:   of the method for a Llama
        reason:   to take it
        served:   whether vLLM, SGLang and llama.cpp load its adapter as it is
        no_merge: why it is not merged before serving, if it cannot be
        last:     whether it is an alternative only after all others"""

    title: str
    fields: Mapping[str, Any]
    reason: str
    served: bool = False
    no_merge: str = ""
    last: bool = False


@dataclass(frozen=True)
class InPeft:
    """Say how `setup_peft_training` sets up a method of Hugging Face PEFT.

    Fields:
        name:          for `setup_peft_training`
        config:        the name of PEFT's configuration class
        rates:         learning rates to start with, for small models and for language models
        source:        of the latter
        settings:      (model, rank) -> settings of the configuration
        flags:         settings that are always so, and tell it from others of the same class
        ranks:         of a layer at the start, in units of `rank`; 0 for a method without a rank
        four_bit:      whether the base is loaded in 4 bits
        checkpointing: whether it trains with gradient checkpointing"""

    name: str
    config: str
    rates: tuple[float, float]
    source: str
    settings: Callable[[nn.Module, int], dict[str, Any]] = lambda model, rank: {}
    flags: Mapping[str, Any] = field(default_factory=dict)
    ranks: float = 0
    four_bit: bool = False
    checkpointing: bool = True


@dataclass(frozen=True)
class Facts:
    """Hold the row of a method.

    Fields:
        lesson:      that introduces it, such as "02"
        points:      in the growing chart; the adviser shows the runs of the last one
        place, mark: in the map of a block
        peft:        PEFT's forms of it
        advice:      what the adviser says of the first of these, None if it is never recommended
        only_here:   a name by which one may look for it in PEFT, which does not have it"""

    lesson: str
    points: tuple[Point, ...] = ()
    place: OnMap | None = None
    mark: Mark | None = None
    peft: tuple[InPeft, ...] = ()
    advice: Recommended | None = None
    only_here: str = ""


@dataclass(frozen=True)
class Kept:
    """Say what a training step keeps for the backward pass, and works with, because of a method.

    Fields:
        branches: {path in a block: (in, out)} of the layers with a branch of low rank
        rank:     of these branches
        outputs:  further outputs of such a layer that are kept
        weights:  further matrices of its size that are kept, for all tokens together
        scaled:   {path: (in, out)} of the layers whose output is scaled by a vector
        inner:    the same of those whose input is scaled
        prompt:   virtual tokens before each text
        prefix:   keys and values before each text in every block
        packed:   whether the base's linear layers are in 4 bits"""

    branches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rank: int = 0
    outputs: int = 0
    weights: int = 0
    scaled: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    inner: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prompt: int = 0
    prefix: int = 0
    packed: bool = False
