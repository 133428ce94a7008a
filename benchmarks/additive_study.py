"""The study of the additive methods: adapters, (IA)³, prompts and prefixes, each at its best rate.

    python benchmarks/additive_study.py               # two hours on one core
    python benchmarks/additive_study.py --backwards   # beside the first, on a second core

Trains minilm on movie sentiment (200 steps) and tinylm on Jane Austen's novels (100 steps), and
adds a row for each run to data/results/additive_study.csv: the accuracy, or the perplexity, before
and after training. Every setting is tried at each of its learning rates with one seed; the best one
by the validation split is run with two more. The losses of the runs on Austen, averaged over ten
steps, go to additive_curves.csv.
"""

import sys
from functools import partial

import torch
from common import BASES, NAMES, Results, base_of, measured, study

from peft_lessons import IA3, BottleneckAdapter, Prefix, Prompt, fit, inject, load_tokenizer
from peft_lessons.methods.prefix import init_prefix

P, PROJECTION = 16, 96
TEXTS = {
    "sentiment": "Is this sentence from the review of a film positive or negative?",
    "austen": "It is a truth universally acknowledged, "
    "that a single man in possession of a fortune",
}
INNER = r".*layer\.\d+\.output\.dense"  # of BERT: a name would take attention.output.dense too
IA3S = {
    "sentiment": IA3(rf".*self\.(key|value)|{INNER}", feedforward=INNER),
    "austen": IA3(("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)),
}
LOW, MIDDLE, HIGH = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
HIGHEST = (1e-1, 3e-1, 1.0)
SETTINGS = {  # (task, method, variant, width or virtual tokens): rates
    **{("sentiment", "adapter", "pfeiffer", width): LOW for width in (4, 16, 64)},
    ("sentiment", "adapter", "houlsby", 8): LOW,
    ("sentiment", "adapter", "parallel", 16): LOW,
    ("sentiment", "ia3", "", 0): (3e-3, 1e-2, 3e-2, 1e-1),
    ("sentiment", "prompt", "vocab", P): HIGH,
    **{("sentiment", "prompt", start, P): (3e-2, 1e-1) for start in ("normal", "text")},
    ("sentiment", "prefix", "random", P): HIGH,
    ("sentiment", "prefix", "mlp", P): LOW,
    ("austen", "adapter", "pfeiffer", 64): MIDDLE,
    ("austen", "ia3", "", 0): (3e-2, 1e-1, 3e-1, 1.0),
    **{("austen", "prompt", start, P): HIGHEST for start in ("vocab", "normal", "text")},
    ("austen", "prefix", "random", P): (*HIGHEST, 3.0),
    ("austen", "prefix", "mlp", P): (3e-3, *HIGH),
    ("austen", "prefix", "context", P): (3e-3, 1e-2, 3e-2, *HIGHEST, 3.0),
}
CURVES = (*NAMES, "lr", "seed", "step", "loss")


def method_of(task: str, method: str, variant: str, size: int):
    """The description of a setting."""
    if method == "adapter":
        return BottleneckAdapter(size, kind=variant)
    if method == "ia3":
        return IA3S[task]
    if method == "prefix":
        return Prefix(size, projection=PROJECTION if variant == "mlp" else None)
    if variant == "text":
        return Prompt(size, init=TEXTS[task], tokenizer=load_tokenizer(BASES[task]))
    return Prompt(size, init=variant)


def build(setting: tuple, seed: int, task) -> torch.nn.Module:
    """The base with the method of a setting in it, ready to train."""
    name, _, variant, size = setting
    model = base_of(name, seed)
    if variant == "context":  # the keys and values of the training text's first tokens
        ids = next(task.batches("train", 1))["input_ids"][:, :size]
        with torch.no_grad():
            layers = model(ids, use_cache=True).past_key_values.layers
        pairs = [(layer.keys[0], layer.values[0]) for layer in layers]
    inject(model, method_of(*setting))
    if variant == "context":
        init_prefix(model, pairs)
    return model


def train(model, task, steps: int, point: tuple, curves: Results):
    """Train at a point, (*setting, lr, seed); the loss on Austen goes to the curves."""
    *setting, lr, seed = point
    history = fit(model, task, steps, lr=lr, seed=seed, show=False)
    if setting[0] == "austen":
        place = dict(zip((*NAMES, "lr", "seed"), point, strict=True))
        for first in range(0, steps, 10):
            loss = sum(history.loss[first : first + 10]) / 10
            curves.add(**place, step=first + 10, loss=f"{loss:.4f}")
    return history


def run(curves: Results, task, setting: tuple, lr: float, seed: int) -> dict:
    """Train one point and return its measured columns."""
    model = build(setting, seed, task)
    return measured(task, setting, model, partial(train, point=(*setting, lr, seed), curves=curves))


if __name__ == "__main__":
    run = partial(run, Results("additive_curves", CURVES))
    study("additive_study", SETTINGS, run, backwards="--backwards" in sys.argv)
