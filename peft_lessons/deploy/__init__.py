"""Export a fine-tuned model or its adapter to GGUF, and serve it with llama.cpp on this machine."""

from .export import KINDS, adapter_to_gguf, rounded, to_gguf
from .server import INSTALL, Server, available, serve

__all__ = [
    "INSTALL",
    "KINDS",
    "Server",
    "adapter_to_gguf",
    "available",
    "rounded",
    "serve",
    "to_gguf",
]
