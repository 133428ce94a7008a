"""One QLoRA step of a model with seven billion parameters, on a GPU with 24 GiB or more.

    python benchmarks/qlora_gpu.py

The model has LLaMA-7B's shape and random weights, which changes nothing about memory and time. It
is quantised by the course's own code; gradient checkpointing is on. One row for each length of the
text to data/results/qlora_gpu.csv: bytes that lie there, the most held beyond them in a step, and
the median time of a step.
"""

import torch
from common import Results
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_lessons import QLoRA, inject, measure

COLUMNS = (
    "model", "tokens", "trainable", "weights", "gradients", "optimizer", "peak", "seconds",
)  # fmt: skip


def measured(config: LlamaConfig, tokens: int, device: str) -> dict:
    """Return the columns of one row but the first two: a step on one text of random tokens."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(config.vocab_size, (1, tokens))
        inject(model, QLoRA(rank=16, alpha=16))
    model.config.use_cache = False  # of no use in training
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cost = measure.training_step(model, {"input_ids": ids, "labels": ids})
    held = {k: v for k, v in vars(cost.held).items() if k in COLUMNS}
    return {"trainable": cost.trainable, "peak": cost.peak, "seconds": cost.seconds} | held


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU with 24 GiB or more")
    results = Results("qlora_gpu", COLUMNS)
    for tokens in (512, 2048):
        row = measured(LlamaConfig(), tokens, "cuda")
        row |= {"model": "LLaMA-7B's shape", "tokens": tokens}
        results.add(**row, machine=torch.cuda.get_device_name())
        print(row, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
