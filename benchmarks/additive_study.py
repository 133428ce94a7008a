"""The study of the additive methods: adapters, (IA)³, prompts and prefixes, each at its best rate.

    python benchmarks/additive_study.py    # two hours on one core

Adds a row for each run on either task to data/results/additive_study.csv. The losses of the runs on
Austen, averaged over ten steps, go to additive_curves.csv.
"""

from functools import partial

import torch
from common import BASES, BEFORE_TOO, NAMES, Results, base_of, load, measured, plain, study

from peft_lessons import inject
from peft_lessons.engine import Method
from peft_lessons.methods.prefix import init_prefix
from peft_lessons.studies.catalogue import SETTINGS as NAMED
from peft_lessons.studies.catalogue import TOKENS, setting

LOW, MIDDLE, HIGH = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
HIGHEST = (1e-1, 3e-1, 1.0)
SETTINGS = {  # (task, method, variant, width or virtual tokens): rates
    **{("sentiment", "adapter", "pfeiffer", width): LOW for width in (4, 16, 64)},
    ("sentiment", "adapter", "houlsby", 8): LOW,
    ("sentiment", "adapter", "parallel", 16): LOW,
    ("sentiment", "ia3", "", 0): (3e-3, 1e-2, 3e-2, 1e-1),
    ("sentiment", "prompt", "vocab", TOKENS): HIGH,
    **{("sentiment", "prompt", start, TOKENS): (3e-2, 1e-1) for start in ("normal", "text")},
    ("sentiment", "prefix", "random", TOKENS): HIGH,
    ("sentiment", "prefix", "mlp", TOKENS): LOW,
    ("austen", "adapter", "pfeiffer", 64): MIDDLE,
    ("austen", "ia3", "", 0): (3e-2, 1e-1, 3e-1, 1.0),
    **{("austen", "prompt", start, TOKENS): HIGHEST for start in ("vocab", "normal", "text")},
    ("austen", "prefix", "random", TOKENS): (*HIGHEST, 3.0),
    ("austen", "prefix", "mlp", TOKENS): (3e-3, *HIGH),
    ("austen", "prefix", "context", TOKENS): (3e-3, 1e-2, 3e-2, *HIGHEST, 3.0),
}
POINT = (*NAMES, "lr", "seed")


def described(task: str, method: str, variant: str, size: int) -> Method:
    """The description of a setting."""
    if method == "adapter":
        return setting(variant, task, width=size)
    name = f"{method}, {variant}"
    return setting(name if name in NAMED else method, task)


def run(curves: Results, task, *point) -> dict:
    """Train one point and return its measured columns; its loss on Austen goes to the curves."""
    name, _, variant, size, lr, seed = point
    model = base_of(name, seed)
    if variant == "context":  # the keys and values of the training text's first tokens
        ids = next(task.batches("train", 1))["input_ids"][:, :size]
        with torch.no_grad():
            layers = model(ids, use_cache=True).past_key_values.layers
        pairs = [(layer.keys[0], layer.values[0]) for layer in layers]
    inject(model, described(*point[:4]))
    if variant == "context":
        init_prefix(model, pairs)

    def train(*settings):
        history = plain(*settings)
        if name == "austen":
            for first in range(0, len(history.loss), 10):
                loss = f"{sum(history.loss[first : first + 10]) / 10:.4f}"
                curves.add(**dict(zip(POINT, point, strict=True)), step=first + 10, loss=loss)
        return history

    return measured(model, task, lr, seed, train, before=True)


if __name__ == "__main__":
    run = partial(run, Results("additive_curves", (*POINT, "step", "loss")))
    study("additive_study", NAMES, BEFORE_TOO, SETTINGS, run, {task: load(task) for task in BASES})
