"""Begin each test with the same random numbers, and ignore what the package ignores."""

import pytest
import torch

from peft_lessons._quiet import IGNORED


def pytest_configure(config):
    for message in IGNORED:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    torch.manual_seed(0)
