"""Does a learning rate carry over from one method to another: by the sum of |gradient|, by the
number of what trains, or not at all?

    python benchmarks/rates_study.py       # an hour on one core

Each row of data/results/rates_study.csv is a method on a task with a seed: `gradient` is the sum of
|gradient| over all that trains, at the start, on 16 examples of the training split, and `losses`
are those after training at each of the `rates`. The tasks:

    austen     tinylm on Jane Austen's novels, 20 steps of 2 blocks, at rates that make the same
               products with `gradient`; mean loss per token of 32 test blocks
    reviews    tinylm on sentences of movie reviews, 40 steps of 8; validation sentences
    sentiment  minilm after its new head alone has trained for 100 steps: 40 steps of 16 sentences,
               the head along; validation sentences

On the last two the rates go on, in steps of about 2, until the one with the smallest mean loss of
the seeds lies inside. Nothing on them was tried before the rule was written down. The methods are
those of catalogue.py, with their rank, width or number of tokens; α is 16 on Austen, and twice the
rank on the others. `frozen` holds what has no gradient at the start: A of LoRA, and λ_d of VeRA."""

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import torch
from after_study import reviews
from catalogue import setting
from common import around, base_of, fill_table, load

from peft_lessons import LoRA, PartialFineTuning, evaluate, fit, freeze, inject, load_task, measure
from peft_lessons.engine import Method
from peft_lessons.methods.prefix import init_prefix
from peft_lessons.train.loop import TrainingDiverged
from peft_lessons.train.rates import gradient_sum

SEEDS = (0, 1)
PRODUCTS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of a rate and the gradient, on Austen
LADDER = tuple(float(f"{m}e{k}") for k in range(-6, 2) for m in (1, 2, 5))
KEY, COLUMNS = ("task", "method"), ("seed", "trainable", "gradient", "rates", "losses")
STEPS = {"austen": (20, 2), "reviews": (40, 8), "sentiment": (40, 16)}  # of so many examples


def named(name: str, task: str, **changes) -> Callable[[], Method]:
    """Return what makes a setting of the catalogue on the base of a task."""
    return partial(setting, name, "sentiment" if task == "sentiment" else "austen", **changes)


def lora(rank: int, alpha: float, **more) -> Callable[[], Method]:
    """Return what makes a LoRA on all linear layers."""
    return partial(LoRA, rank, alpha, "all-linear", **more)


METHODS = {  # {task: {method: (what makes its description, a rate to begin with)}}
    "austen": {
        "LoRA 16": (lora(16, 16), 0),
        "LoRA 16, frozen": (lora(16, 16), 0),
        "VeRA 64": (named("vera", "austen"), 0),
        "VeRA 64, frozen": (named("vera", "austen"), 0),
        "full": (None, 0),
        "PiSSA 16": (named("pissa", "austen", rank=16, alpha=16), 0),
        "LoRA+ 16": (named("lora+", "austen", rank=16, alpha=16), 0),
        "rsLoRA 64": (lora(64, 16, rslora=True), 0),
        "OFT 32": (named("oft", "austen"), 0),
        "sparse 8": (named("sparse, random", "austen"), 0),
        "norms": (named("norms", "austen"), 0),
    },
    "reviews": {
        "LoRA 8": (lora(8, 16), 2e-2),
        "full": (None, 2e-3),
        "Houlsby 32": (named("houlsby", "reviews", width=32), 1e-2),
        "bias after attention": (None, 1e-1),
        "DoRA 8": (named("dora, all linear", "reviews"), 2e-2),
        "block 4 alone": (lambda: PartialFineTuning(patterns=r".*layers\.3\..*"), 5e-3),
        "parallel 64": (named("parallel", "reviews"), 5e-3),
        "(IA)³": (named("ia3", "reviews"), 2e-1),
        "sparse 1": (named("sparse, random", "reviews", rank=1), 5e-2),
        "LoRA 2": (lora(2, 4), 2e-2),
        "prompt 16, text": (named("prompt, text", "reviews"), 1e-1),
        "prefix 16, text": (named("prefix", "reviews"), 2e-1),
        "norms": (named("norms", "reviews"), 2e-2),
        "VeRA 64": (named("vera", "reviews"), 2e-1),
    },
    "sentiment": {
        "LoRA 8": (named("lora, all linear", "sentiment"), 1e-3),
        "full": (None, 2e-4),
        "Pfeiffer 16": (named("pfeiffer", "sentiment"), 2e-3),
        "(IA)³": (named("ia3", "sentiment"), 2e-2),
        "BitFit": (named("bitfit", "sentiment"), 5e-3),
    },
}


@cache
def task_of(name: str):
    """Return a task, with few examples to score on."""
    if name == "austen":
        return load(name).limit(validation=32, test=32)
    return (reviews() if name == "reviews" else load_task(name)).limit(validation=200)


@cache
def with_head(seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of minilm after its head alone has trained."""
    model = base_of("sentiment", seed)
    freeze(model)
    fit(model, task_of("sentiment"), 100, lr=3e-2, seed=seed, show=False)
    return model.state_dict()


def build(name: str, method: str, seed: int) -> torch.nn.Module:
    """Return the base of a task with a method in it, ready to train."""
    model, (make, _) = (
        base_of("sentiment" if name == "sentiment" else "austen", seed),
        METHODS[name][method],
    )
    if name == "sentiment":
        model.load_state_dict(with_head(seed))
    torch.manual_seed(seed)
    if method == "bias after attention":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    elif make:
        if method == "prefix 16, text":  # keys and values of the training text's first tokens
            ids = next(load("austen").batches("train", 1))["input_ids"][:, :16]
            with torch.no_grad():
                layers = model(ids, use_cache=True).past_key_values.layers
            inject(model, make())
            init_prefix(model, [(layer.keys[0], layer.values[0]) for layer in layers])
        else:
            inject(model, make())
    if method.endswith("frozen"):
        for path, parameter in model.named_parameters():
            if "lora_A" in path or "lambda_d" in path:
                parameter.requires_grad_(False)
    return model


def trained_loss(name: str, method: str, lr: float, seed: int) -> float:
    """Return the loss after training; infinite where training diverged."""
    model, task, (steps, batch) = build(name, method, seed), task_of(name), STEPS[name]
    try:
        fit(model, task, steps, lr=lr, batch_size=batch, seed=seed, show=False)
    except TrainingDiverged:
        return math.inf
    return evaluate(model, task, "test" if name == "austen" else "validation").loss


def run(name: str, method: str) -> list[dict]:
    """Return the rows of a method, one for each seed."""
    task = task_of(name)
    batches = {seed: list(itertools.islice(task.stream(8, seed), 2)) for seed in SEEDS}
    models = {seed: build(name, method, seed) for seed in SEEDS}
    sums = {seed: gradient_sum(model, batches[seed]) for seed, model in models.items()}
    trainable = measure.parameters(models[0]).trainable
    losses, mean = {seed: {} for seed in SEEDS}, {}

    def fill(rates) -> None:
        for lr in rates:
            for seed in SEEDS:
                if lr not in losses[seed]:
                    losses[seed][lr] = trained_loss(name, method, lr, seed)
            mean[lr] = sum(losses[seed][lr] for seed in SEEDS) / len(SEEDS)

    if name == "austen":
        fill(float(f"{x / sums[0]:.2g}") for x in PRODUCTS)
    else:
        center = LADDER.index(METHODS[name][method][1])
        while not set(rates := around(mean, LADDER, center)) <= set(mean):
            fill(rates)
    return [
        {"seed": seed, "trainable": trainable, "gradient": f"{sums[seed]:.5g}"}
        | {"rates": " ".join(f"{lr:g}" for lr in sorted(mean))}
        | {"losses": " ".join(f"{losses[seed][lr]:.4f}" for lr in sorted(mean))}
        for seed in SEEDS
    ]


if __name__ == "__main__":
    points = [(name, method) for name, methods in METHODS.items() for method in methods]
    fill_table("rates_study", KEY, COLUMNS, points, run)
