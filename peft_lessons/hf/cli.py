"""Train one of PEFT's methods from the command line, on one device or on several:

    python -m peft_lessons.hf.cli --model tinylm --data austen --steps 40 --output my-adapter
    accelerate launch --config_file configs/two_cpus.yaml -m peft_lessons.hf.cli ...

Every process runs this from start to end. Trainer gives each its share of every batch, averages
the gradients, and lets the first one write.
"""

from __future__ import annotations

import argparse
import json

import torch
from accelerate import PartialState

from ..data.tasks import LOADERS, load_task
from .setup import HF_METHODS, setup_peft_training
from .trainer import train_with_peft


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="peft_lessons.hf.cli", description=__doc__.split(":")[0])
    parser.add_argument("--model", default="tinylm", help="a bundled name, a folder or a Hub id")
    parser.add_argument("--method", default="lora", choices=HF_METHODS)
    parser.add_argument(
        "--data",
        default="austen",
        help="a bundled task, or a file with one JSON object a line: text, and label if it has; "
        "messages; or prompt and completion",
    )
    parser.add_argument("--labels", type=int, help="classes of a classifier")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute each block again in the backward pass; by default for qlora alone",
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8, help="over all devices together")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--checkpoint-every", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="./output")
    return parser.parse_args(words)


def examples(data: str) -> list:
    """Load the training split of a bundled task, or the JSON objects of a file, one per line.
    ValueError names a line that is not JSON."""
    if data in LOADERS:
        return load_task(data).examples("train")
    rows = []
    # Not splitlines(), which also cuts at the separators that a text may hold, such as U+2028.
    with open(data, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                raise ValueError(f"{data}, line {number} is not JSON: {line[:60]!r}") from None
    return rows


def main(words: list[str] | None = None) -> dict:
    """Train, and print the results as JSON in the first process."""
    options = vars(arguments(words))
    names = ("labels", "rank", "checkpointing")
    set_up = {name: options.pop(name) for name in names} | {"seed": options["seed"]}
    place = [options.pop(name) for name in ("model", "method", "output")]
    # Joins the other processes, and takes this one's device.
    state = PartialState(cpu=not torch.cuda.is_available())
    model, tokenizer = setup_peft_training(*place, **set_up)
    data = examples(options.pop("data"))
    # What is left of the options has the names of arguments.
    metrics = train_with_peft(model, tokenizer, data, show=False, **options)
    if state.is_main_process:
        print(json.dumps(metrics | {"processes": state.num_processes}))
    return metrics


if __name__ == "__main__":
    main()
