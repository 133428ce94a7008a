"""Keep the libraries below us from writing bars and notices into a lesson; imported first."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The tokenizers' threads would warn at every later fork, and a lesson's batches don't need them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Imported by peft; without a GPU it reports one missing library after another.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Saving an adapter, peft asks the Hub for the base's config; without a network it says so twice,
# and assumes that the vocabulary is unchanged, which is so here.
warnings.filterwarnings("ignore", message="Unable to fetch remote file due to")
warnings.filterwarnings("ignore", message="Could not find a config file in")
# Between peft and transformers; nothing that a learner can mend.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# peft prepares a 4-bit model with a call that transformers has renamed since.
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
# It says so of every norm, although its LN_TUNING is there for norms.
warnings.filterwarnings("ignore", message="Unsupported layer type .*Norm")
# It reads this entry of an AdaLoRA's file as if it were a LoRA's, and then rightly as its own.
warnings.filterwarnings("ignore", message="The following rank_pattern keys .*lora_E")

from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Let the logger of this name report errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
