"""Share among the tests of the room what the fixtures are made with."""

from copy import deepcopy

import pytest
import torch

from peft_lessons import LoRA, inject
from peft_lessons.deploy import available
from peft_lessons.testing.tiny import perturb

SERVER = pytest.mark.skipif(not available(), reason="xllamacpp is missing: python course.py setup")


def adapted(base, method=None):
    """Return a copy of the model with a perturbed method in it."""
    model = deepcopy(base)
    torch.manual_seed(0)
    inject(model, method or LoRA(rank=4, alpha=8))
    return perturb(model)
