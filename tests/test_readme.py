"""What the README and the map in lesson 00 say is there, is there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
TARGETS = set(re.findall(r"(?m)^([a-z.]+):.*##", (ROOT / "Makefile").read_text()))


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
def test_every_relative_link_leads_somewhere(page):
    file = ROOT / page
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text())
    missing = [link for link in links if "://" not in link and not (file.parent / link).exists()]
    assert links and not missing


def test_the_maps_list_every_lesson():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"\]\(notebooks/([^)]+)\)", readme) == LESSONS
    cells = json.loads((ROOT / "notebooks" / LESSONS[0]).read_text())["cells"]
    start = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert set(LESSONS[1:]) <= set(re.findall(r"\]\(([0-9][^)]+\.ipynb)\)", start))


def test_every_make_target_named_in_the_readme_exists():
    named = set(re.findall(r"(?m)(?:`|^)make ([a-z.]+)", (ROOT / "README.md").read_text()))
    assert {"lab", "test", "help"} <= named and named - TARGETS == set()


def test_make_help_explains_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(re.search(rf"(?m)^  {re.escape(t)}\s+\S", shown.stdout) for t in TARGETS)


def test_the_code_in_the_readme_runs(monkeypatch, tmp_path):
    text = (ROOT / "README.md").read_text()
    code, with_peft, advice = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "steps=200" in code
    monkeypatch.chdir(tmp_path)
    short = code.replace("steps=200", "steps=2, show=False")
    short = short.replace("evaluate(model, task)", "evaluate(model, task.limit(test=16))")
    exec(short, {})
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    exec(with_peft.replace("steps=20", "steps=2"), {})
    assert (tmp_path / "my-run" / "adapter_config.json").is_file()
    exec(advice, {})


def test_every_result_table_is_listed_with_the_command_that_makes_it():
    listed = re.findall(
        r"\| (results/\S+) \| `python (\S+)` \|", (ROOT / "data/README.md").read_text()
    )
    stored = {f"results/{path.name}" for path in (ROOT / "data/results").iterdir()}
    assert {table for table, _ in listed} == stored
    assert all((ROOT / script).is_file() for _, script in listed)
