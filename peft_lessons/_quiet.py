"""Keep the libraries below us from writing bars and notices into a lesson; imported first."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The tokenizers' threads would warn at every later fork, and a lesson's batches don't need them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# peft imports bitsandbytes, which without a GPU reports one missing library after another.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Warnings of what no learner can mend, by the library that gives each. pytest ignores them, too.
IGNORED = (
    # peft, when it saves an adapter: it asks the Hub for the base's config, finds no network or no
    # config, and assumes that the vocabulary is unchanged, which is so here.
    "Unable to fetch remote file due to",
    "Could not find a config file in",
    # transformers, of two names that peft still calls: the first when it wraps a model, the second
    # when it prepares one in 4 bits.
    "`is_gradient_checkpointing` is deprecated",
    "`gradient_checkpointing_enable` is deprecated",
    # peft, of every norm, although its own LN_TUNING is there for norms.
    "Unsupported layer type .*Norm",
    # peft, of an AdaLoRA's file: it reads this entry as a LoRA's first, and then rightly.
    "The following rank_pattern keys .*lora_E",
)
for _message in IGNORED:
    warnings.filterwarnings("ignore", message=_message)

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
