"""The machine's verdict: every dependency is looked at, and what is wrong is named."""

import torch

from peft_lessons import check_environment, measure
from peft_lessons.data import environment as machine_module


def test_this_machine_is_ready_and_says_so():
    found = check_environment()
    assert found.ready, repr(found)
    # The wheel's own version: torch adds +cpu or +cu130 to it only where the index has it, too.
    assert machine_module.metadata.version("torch") in repr(found)
    assert "checksums right" in repr(found)
    assert "This machine is ready." in found._repr_html_()


def test_a_wrong_version_and_a_damaged_file_are_named(monkeypatch):
    real = machine_module.metadata.version
    monkeypatch.setattr(
        machine_module.metadata, "version", lambda n: "1.0" if n == "torch" else real(n)
    )
    broken = machine_module.bundled_files()[0]
    object.__setattr__(broken, "intact", False)
    monkeypatch.setattr(machine_module, "bundled_files", lambda: [broken])
    found = check_environment()
    assert not found.ready and found.verdict.startswith("Not ready")
    assert "✗ torch" in repr(found) and "1.0, needs" in repr(found)
    assert f"missing or damaged: {broken.path}" in repr(found)


def test_every_dependency_is_looked_at():
    text = repr(check_environment())
    for name in ("torch", "transformers", "peft", "jupyterlab", "ipywidgets", "Python", "memory"):
        assert name in text
    assert measure.parameters(torch.nn.Linear(3, 2)).total == 8
