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
    """State what the adviser says of a method."""

    title: str  # its name in an advice
    fields: Mapping[str, Any]  # of the method for a Llama
    reason: str  # to take it
    served: bool = False  # whether vLLM, SGLang and llama.cpp load its adapter as it is
    no_merge: str = ""  # why it is not merged before serving, if it cannot be
    last: bool = False  # whether it is an alternative only after all others


@dataclass(frozen=True)
class InPeft:
    """Say how `setup_peft_training` sets up a method of Hugging Face PEFT."""

    name: str  # for `setup_peft_training`
    config: str  # the name of PEFT's configuration class
    rates: tuple[float, float]  # learning rates to start with: of small and of language models
    source: str  # of the latter
    # (model, rank) -> settings of the configuration
    settings: Callable[[nn.Module, int], dict[str, Any]] = lambda model, rank: {}
    # settings that are always so, and tell it from others of the same class
    flags: Mapping[str, Any] = field(default_factory=dict)
    ranks: float = 0  # of a layer at the start, in units of `rank`; 0 for a method without a rank
    four_bit: bool = False  # whether the base is loaded in 4 bits
    checkpointing: bool = True  # whether it trains with gradient checkpointing


@dataclass(frozen=True)
class Facts:
    """Hold the row of a method."""

    lesson: str  # that introduces it, such as "02"
    points: tuple[Point, ...] = ()  # in the growing chart; the adviser shows runs of the last one
    place: OnMap | None = None  # in the map of a block
    mark: Mark | None = None  # there
    peft: tuple[InPeft, ...] = ()  # PEFT's forms of it
    advice: Recommended | None = None  # of the first of these, None if it is never recommended
    only_here: str = ""  # a name by which one may look for it in PEFT, which does not have it


@dataclass(frozen=True)
class Kept:
    """Say what a training step keeps for the backward pass, and works with, because of a method.

    Layers are {path in a block: (in, out)}."""

    branches: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of low rank
    rank: int = 0  # of these branches
    outputs: int = 0  # further outputs of such a layer that are kept
    weights: int = 0  # further matrices of its size that are kept, for all tokens together
    scaled: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # outputs, by a vector
    inner: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # inputs, by a vector
    prompt: int = 0  # virtual tokens before each text
    prefix: int = 0  # keys and values before each text in every block
    packed: bool = False  # whether the base's linear layers are in 4 bits
