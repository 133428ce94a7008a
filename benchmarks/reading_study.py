"""The reading study: what one trained row of A reads, over seeds.

    python benchmarks/reading_study.py     # three minutes on one core

Trains LoRA of rank 1 on the value projection of minilm's last block, as lesson 02 does, and adds a
row for each seed to data/results/reading_study.csv. auc_start, auc_trained, auc_model: how well
the mean reading of a sentence, by A before and after training, and the model's own margin rank the
test sentences. The other columns are readings in standard deviations over all test tokens, with
the sign that makes praise positive.
"""

import torch
from common import SEEDS, fill_table, load

from peft_lessons import LoRA, evaluate, fit, inject, load_model
from peft_lessons.studies import auc

PAIRS = {  # column: (sentence, word)
    "bad": ("A bad film.", "bad"),
    "not_bad": ("Not a bad film at all.", "bad"),
    "regret": ("I regret seeing it.", "regret"),
    "not_regret": ("You will not regret seeing it.", "regret"),
    "good": ("A good film.", "good"),
    "not_good": ("It is not good.", "good"),
}


@torch.no_grad()
def run(seed: int) -> dict:
    """Train with one seed and return its row."""
    task = load("sentiment")
    torch.manual_seed(seed)
    model = load_model("minilm", labels=2)
    inject(model, LoRA(rank=1, alpha=16, targets=("5.attention.self.value",)))
    layer = model.bert.encoder.layer[5].attention.self.value
    rows = {"start": layer.lora.lora_A.detach().clone()}
    with torch.enable_grad():
        fit(model, task, steps=100, lr=3e-3, batch_size=8, seed=seed, show=False)
    rows["trained"] = layer.lora.lora_A
    accuracy = evaluate(model, task).accuracy
    inputs = []
    layer.register_forward_hook(lambda module, args, out: inputs.append(args[0]))

    def read(batch):
        margin = model(**batch).logits.diff(dim=-1)[:, 0]  # (sentences,)
        return margin, {name: inputs[-1] @ row[0] for name, row in rows.items()}

    margins, labels, means = [], [], {name: [] for name in rows}
    tokens = []
    for batch in task.batches("test", 64, by_length=True):
        margin, z = read(batch)
        mask = batch["attention_mask"]
        for name in rows:
            means[name].append((z[name] * mask).sum(1) / mask.sum(1))
        tokens.append(z["trained"][mask.bool()])
        margins.append(margin)
        labels.append(batch["labels"])
    labels, tokens = torch.cat(labels), torch.cat(tokens)
    found = {f"auc_{name}": auc(torch.cat(means[name]), labels) for name in rows}
    sign = 1 if found["auc_trained"] > 0.5 else -1
    found = {name: max(auc, 1 - auc) for name, auc in found.items()}
    found["auc_model"] = auc(torch.cat(margins), labels)
    for column, (sentence, word) in PAIRS.items():
        batch = task.encode([sentence])
        place = batch["input_ids"][0].tolist().index(task.encode([word])["input_ids"][0, 1].item())
        z = read(batch)[1]["trained"][0, place]
        found[column] = (sign * (z - tokens.mean()) / tokens.std()).item()
    return {"accuracy": f"{accuracy:.4f}"} | {k: f"{v:.4f}" for k, v in found.items()}


if __name__ == "__main__":
    columns = ("accuracy", "auc_start", "auc_trained", "auc_model", *PAIRS)
    fill_table("reading_study", ("seed",), columns, [(seed,) for seed in (*SEEDS, 3, 4)], run)
