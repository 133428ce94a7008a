"""What it costs to serve the assistant: bytes, start-up, memory, and tokens per second.

    python benchmarks/serving_costs.py     # five minutes on one core, else idle

Each row of data/results/serving_costs.csv is measured in a process of its own, on one thread, in
llama.cpp's server: the base in a format, alone or with an adapter of rank 8 on all linear layers
beside it. A merged model has the size and the speed of its base, and the values of the weights do
not matter here. `mb` has the bytes of all files, in millions; `start`, the seconds until the server
answers; `memory`, what the process grows by, in millions of bytes, pages of the file included;
`prompt` and `generation`, tokens per second of processor time: of a prompt of 512 tokens, and of 64
tokens that are generated after a short prompt, the best of three. The row "transformers" is the
same in float32, without the adapter.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import requests
import torch
from common import fill_table
from peft import LoraConfig, get_peft_model

from peft_lessons import load_model
from peft_lessons.deploy import adapter_to_gguf, serve, to_gguf

PROMPT, SHORT, NEW, ROUNDS = 512, 8, 64, 3
KEY = ("file", "way")
COLUMNS = ("mb", "start", "memory", "prompt", "generation")
POINTS = [
    ("transformers", "alone"),
    *((kind, "alone") for kind in ("F16", "Q8_0", "Q4_1", "Q4_0")),
    *((kind, "beside") for kind in ("F16", "Q8_0", "Q4_1")),
]


def best(action: Callable[[], None]) -> float:
    """Return the least seconds of processor time that an action takes."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        action()
        taken.append(time.process_time() - begun)
    return min(taken)


def speeds(write: Callable[[list[int], int], None]) -> dict:
    """Return both speeds of write(ids, new), which reads ids and generates so many tokens."""
    ids = torch.randint(100, 40_000, (PROMPT,), generator=torch.manual_seed(0)).tolist()
    reading, short = best(lambda: write(ids, 1)), best(lambda: write(ids[:SHORT], 1))
    writing = best(lambda: write(ids[:SHORT], NEW + 1)) - short
    return {"prompt": f"{PROMPT / reading:.0f}", "generation": f"{NEW / writing:.1f}"}


def in_transformers() -> dict:
    """Return the columns of transformers."""
    torch.set_num_threads(1)
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    model = load_model("smollm2").eval()
    start, size = time.perf_counter() - begun, sum(p.nbytes for p in model.parameters())

    def write(ids: list[int], new: int) -> None:
        few = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        read = torch.tensor([ids])
        model.generate(read, attention_mask=torch.ones_like(read), **few)

    return cost([size], start, write, before)


def in_server(file: Path, adapters: dict[str, Path]) -> dict:
    """Return the columns of a file, with adapters beside it."""
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    with serve(file, adapters) as server:
        start, lora = time.perf_counter() - begun, server.lora(next(iter(adapters), None))

        def write(ids: list[int], new: int) -> None:
            body = {"prompt": ids, "n_predict": new, "ignore_eos": True, "cache_prompt": False}
            requests.post(f"{server.url}/completion", json=body | {"lora": lora}, timeout=600)

        return cost([os.path.getsize(f) for f in (file, *adapters.values())], start, write, before)


def cost(sizes: list[int], start: float, write: Callable, before: int) -> dict:
    """Return the columns of one way to answer."""
    found = speeds(write)
    memory = psutil.Process().memory_info().rss - before
    return {
        "mb": f"{sum(sizes) / 1e6:.1f}",
        "start": f"{start:.2f}",
        "memory": f"{memory / 1e6:.0f}",
    } | found


def run(kind: str, way: str) -> dict:
    """Measure a row in a process of its own."""
    with (
        tempfile.TemporaryDirectory() as name,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        if kind == "transformers":
            return pool.apply(in_transformers)
        folder, adapters = Path(name), {}
        file = to_gguf("smollm2", folder / "model.gguf", kind)
        if way == "beside":
            config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            get_peft_model(load_model("smollm2"), config).save_pretrained(folder / "adapter")
            written = adapter_to_gguf(folder / "adapter", folder / "adapter.gguf", base="smollm2")
            adapters = {"adapter": written}
        return pool.apply(in_server, (file, adapters))


if __name__ == "__main__":
    fill_table("serving_costs", KEY, COLUMNS, POINTS, run, anew=True)
