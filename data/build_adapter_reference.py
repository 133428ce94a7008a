"""Write reference/adapterhub.safetensors: what AdapterHub's adapters compute, as tensors.

    python3.11 -m venv REFERENCE
    REFERENCE/bin/pip install adapters==1.3.0 transformers==4.57.6 torch==2.13.0
    REFERENCE/bin/python data/build_adapter_reference.py

AdapterHub's package cannot live beside the transformers of the course, so lesson and tests read its
answers from the file. A tensor's name begins with the base (bert, llama) and the kind of adapter:

    bert.base.<name>                    the base's weights, norms and biases shaken
    bert.ids, bert.mask, bert.w         what goes in, and the weights of the loss (output · w).sum()
    bert.houlsby.output                 the last hidden states
    bert.houlsby.adapter.<path>.<name>  the adapter's tensors, under AdapterHub's names
    bert.houlsby.grad.<path>.<name>     their gradients

The metadata hold the versions, the configuration of each base and adapter, and the seeds.
"""

import json

import adapters
import torch
import transformers
from build_common import folder_of, record
from safetensors.torch import save
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

FOLDER = "reference"
SEED_BASE, SEED_ADAPTER, SEED_W = 0, 1, 2
WIDTH = 32
SHARED = dict(vocab_size=64, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
BASES = {
    "bert": lambda: BertModel(
        BertConfig(
            **SHARED,
            intermediate_size=48,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    ),
    "llama": lambda: LlamaModel(
        LlamaConfig(**SHARED, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    ),
}
# AdapterHub's own defaults: Houlsby and Pfeiffer of width d/16, parallel of width d/2 and scale 4.
KINDS = {
    "houlsby": adapters.DoubleSeqBnConfig(),
    "pfeiffer": adapters.SeqBnConfig(),
    "parallel": adapters.ParBnConfig(),
}


def base_model(name):
    """Return a base with other norms and biases than a fresh model, which would hide mistakes."""
    torch.manual_seed(SEED_BASE)
    model = BASES[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def inputs():
    generator = torch.Generator().manual_seed(SEED_W)
    ids = torch.randint(1, 64, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask, torch.randn(2, 7, WIDTH, generator=generator)


def add(tensors, base, kind):
    """Add the tensors of one kind of adapter on one base."""
    model = base_model(base)
    adapters.init(model)
    model.add_adapter("a", config=KINDS[kind])
    model.train_adapter("a")
    model.eval()
    torch.manual_seed(SEED_ADAPTER)
    trained = {n: p for n, p in model.named_parameters() if ".adapters.a." in n}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape))
    ids, mask, w = inputs()
    output = model(input_ids=ids, attention_mask=mask).last_hidden_state
    (output * w).sum().backward()
    tensors[f"{base}.{kind}.output"] = output.detach()
    for name, p in trained.items():
        tensors[f"{base}.{kind}.adapter.{name}"] = p.detach()
        tensors[f"{base}.{kind}.grad.{name}"] = p.grad
    print(f"{base:6}{kind:10}{sum(p.numel() for p in trained.values()):>6} parameters")


def in_order(content, about):
    """Sort the metadata of a file: the library's order changes from run to run."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start]) | {"__metadata__": dict(sorted(about.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def main():
    tensors = {}
    for base in BASES:
        model = base_model(base)
        tensors |= {f"{base}.base.{n}": p.detach() for n, p in model.named_parameters()}
        tensors |= dict(zip([f"{base}.{x}" for x in ("ids", "mask", "w")], inputs(), strict=True))
        for kind in KINDS:
            add(tensors, base, kind)
    about = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seeds": json.dumps({"base": SEED_BASE, "adapter": SEED_ADAPTER, "w": SEED_W}),
        **{f"config {k}": json.dumps(c.to_dict(), sort_keys=True) for k, c in KINDS.items()},
        **{f"config {b}": make().config.to_json_string(use_diff=True) for b, make in BASES.items()},
    }
    tensors = {n: t.contiguous().clone() for n, t in sorted(tensors.items())}
    content = in_order(save(tensors, metadata=about), about)
    (folder_of(FOLDER) / "adapterhub.safetensors").write_bytes(content)
    print(f"{len(tensors)} tensors")
    record(FOLDER, "python data/build_adapter_reference.py")


if __name__ == "__main__":
    main()
