"""A random base, its file and an adapter, made once; the tests leave them as they are."""

import pytest
from exported import adapted
from tiny import chat_tokenizer, tiny_llama

from peft_lessons import save_adapter
from peft_lessons.deploy import to_gguf


@pytest.fixture(scope="session")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="session")
def base():
    """Return a model with two query heads for each key-value head, and a head of its own."""
    return tiny_llama(vocab_size=4096)


@pytest.fixture(scope="session")
def base_file(base, tokenizer, tmp_path_factory):
    return to_gguf(base, tmp_path_factory.mktemp("base") / "base.gguf", "F32", tokenizer)


@pytest.fixture(scope="session")
def saved(base, tmp_path_factory):
    """Return the folder of an adapter, to copy and change."""
    return save_adapter(adapted(base), tmp_path_factory.mktemp("saved") / "adapter")
