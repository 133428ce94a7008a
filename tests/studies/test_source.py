"""The source of a class or a function of the package, as a lesson shows it."""

import pytest

from peft_lessons import LinearWithLoRA
from peft_lessons.studies import show_source


@pytest.fixture
def shown(monkeypatch):
    """Return the outputs that a notebook would get."""
    outputs = []
    monkeypatch.setattr(
        "peft_lessons.studies.source.display", lambda data, raw: outputs.append(data)
    )
    return outputs


@pytest.mark.parametrize("thing", [LinearWithLoRA, LinearWithLoRA.forward], ids=["class", "method"])
def test_the_source_stands_in_a_block_of_python_and_as_plain_text(thing, shown):
    show_source(thing)
    ((markdown, plain),) = [(out["text/markdown"], out["text/plain"]) for out in shown]
    assert markdown == f"```python\n{plain}\n```"
    assert plain.startswith(("class LinearWithLoRA(", "def forward(")), "and without indentation"
    assert "def forward(self, x: torch.Tensor)" in plain


def fenced():
    """Hold a block of its own: ```python."""


def test_a_source_with_a_fence_of_its_own_gets_a_longer_one(shown):
    show_source(fenced)
    assert shown[0]["text/markdown"].startswith("````python\ndef fenced")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (3, "takes a class or a function, got 3"),
        (fenced.__code__, "takes a class or a function"),
        (len, "len has no source in Python"),
        (int, "int has no source in Python"),
    ],
)
def test_what_has_no_source_is_refused(thing, message):
    with pytest.raises(TypeError, match=message):
        show_source(thing)
