"""The course's jobs done with Hugging Face PEFT itself.

peft and what it pulls in take seconds to import, so they are imported where they are needed.
"""

from __future__ import annotations

from torch import nn

from .models import load_model
from .rules import validate


def setup_qlora(model_name: str, rank: int = 64):
    """Load a causal model in 4 bits and put PEFT's LoRA on all linear layers but the head.

    `model_name` is a bundled name, a folder or a Hub id. NF4 with double quantisation, on a GPU if
    there is one, else on the CPU; α is 16, as in the paper (Dettmers et al. 2023), gradient
    checkpointing is on. Prints how much trains, 4-bit weights counted as what they stand for.
    Returns the PEFT model in train mode. Raises ValueError for a rank below 1 or above a layer's
    width, a model that does not generate text, and as `load_model`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    validate("setup_qlora", rank=rank)
    model = load_model(model_name, four_bit=True)
    if not model.can_generate():
        raise ValueError(f"setup_qlora: {model_name!r} is no causal language model; try 'tinylm'")
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"setup_qlora: rank={rank} is above min(in, out) of {path!r}: that adds parameters "
                "but no freedom"
            )
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules="all-linear",
    )
    model = get_peft_model(model, config).train()
    model.print_trainable_parameters()
    return model
