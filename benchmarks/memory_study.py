"""Predicted against measured: the memory of a training step on this machine.

    python benchmarks/memory_study.py     # ten minutes on one core, on Linux

Each setting is a Llama with random weights in two fresh processes. One reads from Linux how much
memory it holds at most during a step that is not its first, above what it held before it built the
model (`resident`); the other adds up what torch holds before such a step and allocates during it
(`allocated`). `formula` is `estimate.training_memory`; in `traced`, `traced_activations` takes the
place of the formula's activations. All are bytes. Where everything trains, the gradients take the
place of the activations, so both predictions are smaller by the smaller of the two. A row for each
setting goes to data/results/memory_study.csv."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from common import fill_table
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lessons import LoRA, inject, measure
from peft_lessons.costs import estimate

WARM = 1  # step before the one that is measured: the optimizer has its state
METHODS = {"LoRA": LoRA(), "full": None}
DTYPES = {"all float32": torch.float32}  # of the base, else bfloat16


def llama(width: int, feedforward: int, layers: int, heads: int, vocabulary: int) -> LlamaConfig:
    """Return the configuration of a small Llama with three heads of keys and values."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=feedforward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


MODELS = {  # in the shapes of tinylm and of SmolLM2-135M
    "tinylm": llama(192, 512, 6, 6, 4096),
    "SmolLM2": llama(576, 1536, 30, 9, 49152),
}
SETTINGS = [  # (model, method, recipe, batch, context, lever)
    ("tinylm", "LoRA", "all float32", 16, 128, ""),
    ("tinylm", "full", "all float32", 16, 128, ""),
    ("SmolLM2", "LoRA", "all float32", 1, 1024, ""),
    ("SmolLM2", "full", "all float32", 1, 1024, ""),
    ("tinylm", "LoRA", "all float32", 16, 128, "checkpointing"),
    ("tinylm", "LoRA", "all float32", 16, 128, "chunked"),
    ("tinylm", "LoRA", "all float32", 64, 128, ""),
    ("SmolLM2", "full", "all float32", 1, 128, ""),
    ("SmolLM2", "LoRA", "all float32", 1, 256, "checkpointing"),
    ("SmolLM2", "full", "pure bfloat16", 1, 128, ""),
]
KEY = ("model", "method", "recipe", "batch", "context", "lever")
COLUMNS = ("formula", "traced", "allocated", "resident")


def resident(name: str) -> int:
    """Return what Linux says of this process, in bytes: VmRSS is what it holds, VmHWM the most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def stepper(setting: tuple) -> tuple[Callable[[], None], torch.nn.Module, torch.optim.Optimizer]:
    """Return a function that takes a training step, its model and its optimizer."""
    name, method, recipe, batch, context, lever = setting
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODELS[name]).to(DTYPES.get(recipe, torch.bfloat16)).train()
    if METHODS[method]:
        inject(model, METHODS[method])
    if lever == "checkpointing":
        model.config.use_cache = False  # which it would be, with a notice
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(MODELS[name].vocab_size, (batch, context))
    chunked = estimate._chunked_loss(model, ids) if lever == "chunked" else None
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=1e-5, fused=True)

    def step():
        optimizer.zero_grad()
        loss = chunked() if chunked else model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    return step, model, optimizer


def most(setting: tuple, by_linux: bool) -> int:
    """Return the bytes that a step holds at most, in a process that has done nothing else."""
    torch.set_num_threads(1)
    torch.ones(8, 8, requires_grad=True).mm(torch.ones(8, 8)).sum().backward()
    before = resident("VmRSS")
    step, model, optimizer = stepper(setting)
    for _ in range(WARM):
        step()
    optimizer.zero_grad()
    if by_linux:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the most so far
        step()
        return resident("VmHWM") - before
    return measure.held_bytes(model, optimizer).total + measure.peak_bytes(step)


def predicted(setting: tuple) -> dict[str, int]:
    """Return both predictions of a setting."""
    name, method, recipe, batch, context, lever = setting
    sizes = {"batch": batch, "context": context} | ({lever: True} if lever else {})
    memory = estimate.training_memory(MODELS[name], METHODS[method], recipe, **sizes)
    dtype = DTYPES.get(recipe, torch.bfloat16)
    adapter = None if method == "full" else torch.float32
    traced = estimate.traced_activations(
        MODELS[name], METHODS[method], dtype=dtype, adapter=adapter, **sizes
    )
    found = {}
    for way, kept in (("formula", memory.activations), ("traced", traced)):
        shared = min(kept, memory.gradients) if method == "full" else 0
        found[way] = round(memory.total - memory.activations + kept - shared)
    return found


def run(*setting) -> dict[str, int]:
    """Return a setting's row."""
    row = predicted(setting)
    for column, by_linux in (("allocated", False), ("resident", True)):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            row[column] = fresh.submit(most, setting, by_linux).result()
    return row


if __name__ == "__main__":
    fill_table("memory_study", KEY, COLUMNS, SETTINGS, run)
