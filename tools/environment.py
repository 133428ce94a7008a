"""The environment in which tests and commands run the lessons: offline and with one thread."""

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "tools" / "offline"

ALWAYS = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
# Two kernels on two cores: more than one thread each is several times slower. The stored outputs
# are those of a machine without GPU. Both can be overridden from outside.
UNLESS_SET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# glibc keeps what a training step frees for the next step. To give it back and ask for it again
# takes a seventh of the time of full fine-tuning.
UNLESS_SET |= {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
# What a user may have set for their own work must not change what the tests see.
NEVER = ("PEFT_LESSONS_BASE", "PEFT_LESSONS_STRICT", "NBGRADER_EXECUTION", "MPLBACKEND")


def offline_environment(
    base: Mapping[str, str] | None = None, *, log: Path | None = None, strict: bool = False
) -> dict[str, str]:
    """Return a copy of `base` for processes that run lessons; `log` receives refused
    connections."""
    env = {k: v for k, v in (os.environ if base is None else base).items() if k not in NEVER}
    env = UNLESS_SET | env | ALWAYS
    paths = [str(OFFLINE), *env.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    if log is not None:
        env["PEFT_LESSONS_NETWORK_LOG"] = str(log)
    if strict:
        env["PEFT_LESSONS_STRICT"] = "1"
    return env
