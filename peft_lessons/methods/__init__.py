"""The methods of the course, one module each. Importing this package registers them all."""

# ruff: noqa: F401

from . import (
    adalora,
    adapters,
    dora,
    ia3,
    lora,
    prefix,
    prompt,
    qlora,
    selective,
    unified,
    variants,
)
