"""The machine's verdict: every dependency is looked at, and what is wrong is named."""

from peft_lessons import check_environment
from peft_lessons.data import environment as machine_module


def test_this_machine_is_ready_and_says_so():
    found = check_environment()
    assert found.ready, repr(found)
    # The wheel's own version: torch adds +cpu or +cu130 to it only where the index has it, too.
    assert machine_module.metadata.version("torch") in repr(found)
    for name in ("transformers", "peft", "jupyterlab", "Python", "memory", "checksums right"):
        assert name in repr(found)
    assert "This machine is ready." in found._repr_html_()


def test_a_wrong_version_and_a_damaged_file_are_named(monkeypatch):
    real, metadata = machine_module.metadata.version, machine_module.metadata
    monkeypatch.setattr(metadata, "version", lambda n: "1.0" if n == "torch" else real(n))
    broken = machine_module.bundled_files()[0]
    object.__setattr__(broken, "intact", False)
    monkeypatch.setattr(machine_module, "bundled_files", lambda: [broken])
    found = check_environment()
    assert not found.ready and found.verdict.startswith("Not ready")
    assert "✗ torch" in repr(found) and "1.0, needs" in repr(found)
    assert f"missing or damaged: {broken.path}" in repr(found)
