"""Pretrain tinylm, a Llama of about 3 M parameters, and store it in data/models/tinylm/.

    python data/build_corpus.py FOLDER          # once, on Debian
    python data/build_tinylm.py FOLDER          # two hours on one core

Resumable: it keeps its state in FOLDER every hundred steps; run the same command again. The seed
fixes the start and the order of the text, but bfloat16 sums differ between processors, so another
machine makes a model as good, not the same bytes. The loss curve is in FOLDER/curve.csv.
"""

import argparse
import csv
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from build_common import folder_of, record, sha256
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_lessons.studies import stamp

FOLDER = "models/tinylm"
COLUMNS = ("step", "tokens", "lr", "train_loss", "validation_loss", *stamp())
VOCABULARY, CONTEXT, BATCH, EVERY, SEED = 4096, 256, 24, 100, 0
NEW_TOKENS = 40  # what generate() writes unless told; without it every call warns
# Muon turns the matrices inside the layers by a fixed angle a step; AdamW trains all else.
MUON_RATE, ADAM_RATE, WARM_UP, DECAY = 0.02, 3e-3, 100, 0.4
NOTICE = """\
tinylm, a small language model made for this course by data/build_tinylm.py, MIT licence like it.

It was pretrained on {tokens:,} tokens ({epochs:.1f} times over a corpus of {size:,} tokens made by
data/build_corpus.py): the glosses of WordNet 3.0 (copyright 2006 by Princeton University; licence
beside the noun glosses, data/tasks/wordnet/LICENSE) and descriptions of packages from the package
lists of Debian 13, written by its maintainers and free under each package's licence. The corpus,
train.txt with sha256 {digest},
is not distributed here. Texts with slurs or sexual content were left out by a list of words; what
the model writes is still not checked by anybody, and none of it is true.

Validation loss {loss:.4f} nats a token (perplexity {perplexity:.1f}) on documents held out by hash.
"""


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, digits one by one; <eos> closes every document and is the padding."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<eos>",
        eos_token="<eos>",
        pad_token="<eos>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def token_stream(tokenizer, documents: list[str]) -> np.ndarray:
    """Join all documents, each closed by <eos>: uint16 (tokens,)."""
    ids = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([*d.ids, tokenizer.eos_token_id], np.uint16) for d in ids])


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,  # a multiple of 64, as every in_features: the 4-bit kernels need it
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster than the fused kernel for heads this narrow
    return model


def batch_at(stream: np.ndarray, step: int) -> torch.Tensor:
    """Return the windows of a step (BATCH, CONTEXT): each epoch cuts the stream elsewhere."""
    per_epoch = (len(stream) - CONTEXT) // CONTEXT // BATCH
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng([SEED, epoch])
    windows = rng.permutation((len(stream) - CONTEXT) // CONTEXT)
    starts = windows[place * BATCH : (place + 1) * BATCH] * CONTEXT + rng.integers(CONTEXT)
    return torch.from_numpy(np.stack([stream[s : s + CONTEXT] for s in starts]).astype(np.int64))


@torch.no_grad()
def mean_loss(model, stream: np.ndarray) -> float:
    """Return the nats a token over the whole stream, in windows of CONTEXT."""
    model.eval()
    windows = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    parts = torch.from_numpy(windows.astype(np.int64)).split(BATCH)
    total = sum(model(input_ids=p, labels=p).loss.item() * len(p) for p in parts)
    model.train()
    return total / len(windows)


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear rise, a plateau, a linear fall at the end."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def optimizers(model) -> list[torch.optim.Optimizer]:
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    known = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(
        inner, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"
    )
    return [muon, torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def pretrain(model, train: np.ndarray, valid: np.ndarray, steps: int, folder: Path, fast: bool):
    """Train `model` in place, from where an interrupted run left off."""
    steppers = optimizers(model)
    state, curve, first, losses = folder / "state.pt", folder / "curve.csv", 0, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, s in zip(steppers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        first = saved["step"]
    else:
        curve.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    rates = zip(steppers, (MUON_RATE, ADAM_RATE), strict=True)
    peaks = [(group, rate) for stepper, rate in rates for group in stepper.param_groups]
    forward, started = torch.compile(model) if fast else model, time.time()
    for step in range(first, steps):
        for group, peak in peaks:
            group["lr"] = peak * schedule(step, steps)
        batch = batch_at(train, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step}")
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            done = step + 1
            row = (
                done,
                done * BATCH * CONTEXT,
                f"{MUON_RATE * schedule(step, steps):.2e}",
                f"{np.mean(losses):.4f}",
                f"{mean_loss(model, valid):.4f}",
                *stamp().values(),
            )
            with curve.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            speed = (done - first) * BATCH * CONTEXT / (time.time() - started)
            print(*row[:5], f"{speed:,.0f} tokens/s", flush=True)
            losses = []
            optimizer_states = [optimizer.state_dict() for optimizer in steppers]
            saved = {"model": model.state_dict(), "optimizers": optimizer_states, "step": done}
            torch.save(saved, state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where build_corpus.py put the corpus")
    parser.add_argument("--tokens", type=float, default=30.5e6, help="how many to train on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="slower, needs no C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    texts = {}
    for name in ("train", "valid"):
        texts[name] = (options.folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(texts["train"])
    train, valid = token_stream(tokenizer, texts["train"]), token_stream(tokenizer, texts["valid"])
    steps = int(options.tokens) // (BATCH * CONTEXT)
    epochs = steps * BATCH * CONTEXT / len(train)
    model = build_model()
    print(f"{model.num_parameters():,} parameters, {len(train):,} tokens of text", flush=True)
    print(f"{steps:,} steps = {epochs:.1f} epochs", flush=True)
    pretrain(model, train, valid, steps, options.folder, not options.no_compile)

    out = folder_of(FOLDER)
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)  # half the bytes
    loss = mean_loss(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), valid)
    measured = {"epochs": epochs, "loss": loss, "perplexity": math.exp(loss)}
    corpus = {"size": len(train), "digest": sha256((options.folder / "train.txt").read_bytes())}
    notice = NOTICE.format(tokens=steps * BATCH * CONTEXT, **measured, **corpus)
    (out / "NOTICE").write_text(notice, encoding="utf-8")
    record(FOLDER, "python data/build_tinylm.py FOLDER")


if __name__ == "__main__":
    main()
