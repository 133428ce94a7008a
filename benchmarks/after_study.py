"""The study of what can be done to trained adapters: take intruder dimensions out, and combine two.

    python benchmarks/after_study.py    # half an hour on one core

tinylm learns Jane Austen's novels and sentences of movie reviews, a LoRA of rank 8 on all linear
layers for each, and a third one on both, in twice as many steps. Adds a row for each way to
data/results/after_study.csv; what changes the adapters is PEFT's own.

`reduced` scales the intruder dimensions of the Austen adapter by `factor`
(`reduce_intruder_dimension`); `scaled` scales all of the adapter, the control. The other ways are
combination types of `add_weighted_adapter`, with `factor` as the weight of both adapters; those
that drop entries keep half of them. `sum` and `mean` add the changes of the weights themselves.

`austen`, `reviews` and `definitions` are perplexities of held-out text; on definitions tinylm was
pretrained. `intruders` counts as variants_study.py does.
"""

import itertools
import tempfile
from pathlib import Path

import peft
import torch
from choosing_study import definitions
from common import SEEDS, Results, base_of, load, missing
from peft.tuners.lora.intruders import reduce_intruder_dimension
from variants_study import cosines

from peft_lessons import evaluate, fit, inject, load_task, load_tokenizer, save_adapter
from peft_lessons.data.tasks import LanguageTask, Split
from peft_lessons.studies.catalogue import setting

STEPS, LR, EPSILON, DENSITY = 100, 3e-2, 0.5, 0.5
FACTORS = (1.0, 0.75, 0.5, 0.25, 0.0)
TYPES = ("linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd")
WAYS = [
    ("base", 0.0),
    *((name, 1.0) for name in ("austen", "reviews", "both")),
    *(("reduced", factor) for factor in FACTORS[1:]),
    *(("scaled", factor) for factor in (0.9, 0.8, 0.7, 0.6, 0.5)),
    *((way, factor) for way in ("cat", *TYPES) for factor in (1.0, 0.5)),
]
KEY = ("way", "factor", "seed")
COLUMNS = ("austen", "reviews", "definitions", "intruders")


def reviews() -> LanguageTask:
    """Return sentences of movie reviews as running text, each a piece of its own."""
    task, tokenizer = load_task("sentiment"), load_tokenizer("tinylm")
    splits = {}
    for split in ("train", "test"):
        texts = tuple(task.texts(split))
        tokens = (tokenizer(text)["input_ids"] for text in texts)
        splits[split] = Split(texts, tuple((*ids, tokenizer.eos_token_id)[:128] for ids in tokens))
    return LanguageTask("reviews", splits, tokenizer, 128)


def adapters(tasks: dict, seed: int, folder: Path) -> None:
    """Train the three adapters and save them in folders of their names."""
    streams = [tasks[name].stream(16, seed) for name in ("austen", "reviews")]
    mixed = list(itertools.islice(itertools.chain.from_iterable(zip(*streams, strict=True)), 200))
    for name, data in {
        "austen": tasks["austen"],
        "reviews": tasks["reviews"],
        "both": mixed,
    }.items():
        model = base_of("austen", seed)
        inject(model, setting("lora, all linear", "austen"))
        steps = 2 * STEPS if name == "both" else STEPS
        fit(model, data, steps, lr=LR, seed=seed, show=False)
        save_adapter(model, folder / name)


def opened(folder: Path) -> peft.PeftModel:
    """Return tinylm in PEFT with the three adapters."""
    model = peft.PeftModel.from_pretrained(base_of("austen", 0), folder / "austen", "austen")
    for name in ("reviews", "both"):
        model.load_adapter(folder / name, name)
    return model


def changed(model: peft.PeftModel, way: str, factor: float, seed: int) -> torch.nn.Module:
    """Return the plain model that a way makes of the adapters."""
    if way in ("austen", "reviews", "both"):
        model.set_adapter(way)
    elif way == "reduced":
        reduce_intruder_dimension(
            model,
            "austen",
            way,
            threshold_epsilon=EPSILON,
            mitigation_lambda=factor,
            logging_sink=None,
        )
    elif way == "scaled":
        model.add_weighted_adapter(["austen"], [factor], way, "cat")
        model.set_adapter(way)
    elif way != "base":
        torch.manual_seed(seed)  # DARE drops at random
        kept = {} if way in ("cat", "linear") else {"density": DENSITY}
        svd = {"svd_rank": 16} if way.endswith("svd") else {}
        model.add_weighted_adapter(["austen", "reviews"], [factor] * 2, way, way, **kept, **svd)
        model.set_adapter(way)
    if way == "base":
        return model.unload()
    return model.merge_and_unload()


def intruders(before: torch.nn.Module, after: torch.nn.Module) -> int:
    """Count the intruder dimensions of all linear layers of the blocks."""
    layers = [path for path, m in before.named_modules() if isinstance(m, torch.nn.Linear)]
    pairs = [(before.get_submodule(p).weight, after.get_submodule(p).weight) for p in layers]
    return sum(
        int((cosines(*pair) < EPSILON).sum())
        for p, pair in zip(layers, pairs, strict=True)
        if "layers" in p
    )


def main() -> None:
    torch.set_num_threads(1)
    results = Results("after_study", (*KEY, *COLUMNS))
    tasks = {"austen": load("austen"), "reviews": reviews(), "definitions": definitions()}
    base = base_of("austen", 0)
    for seed in SEEDS:
        left = missing(results, KEY, [(*way, seed) for way in WAYS])
        with tempfile.TemporaryDirectory() as name:
            if left:
                adapters(tasks, seed, Path(name))
            for way, factor, _ in left:
                model = changed(opened(Path(name)), way, factor, seed).eval()
                row = {task: f"{evaluate(model, tasks[task]).perplexity:.4f}" for task in tasks}
                row["intruders"] = intruders(base, model)
                results.add(way=way, factor=factor, seed=seed, **row)
                print(way, factor, seed, row, flush=True)


if __name__ == "__main__":
    main()
