"""What the README and the map in lesson 00 say is there, is there."""

import json
import re
from pathlib import Path

import pytest

from peft_lessons import commands
from peft_lessons.costs import evidence
from peft_lessons.data.bundled import sha256_of
from peft_lessons.studies import paired_losses
from tools import guide
from tools.environment import ROOT

LESSONS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUOTED = README.partition("**A real assistant")[2].partition("## ")[0]
COMMANDS = {*commands.COMMANDS}
GUIDES = ["CONTRIBUTING.md", "docs/instructors.md", "docs/hub.md", "data/README.md"]
PAGES = ["README.md", "CHANGELOG.md", "docs/site/start.md", "docs/student/README.md", *GUIDES]


@pytest.mark.parametrize("page", ["README.md", *GUIDES])
def test_every_relative_link_leads_somewhere(page):
    file = ROOT / page
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (file.parent / link).exists()]
    assert links and not missing


def test_the_maps_list_every_lesson():
    assert re.findall(r"(?m)^\| \[\d\d .*?\]\(notebooks/([^)]+)\)", README) == LESSONS
    cells = json.loads((ROOT / "notebooks" / LESSONS[0]).read_text(encoding="utf-8"))["cells"]
    start = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert set(LESSONS[1:]) <= set(re.findall(r"\]\(([0-9][^)]+\.ipynb)\)", start))


def test_the_table_of_lessons_begins_within_three_screens():
    """A screen has 45 lines of 120 characters, and the picture takes 16 of them."""
    before = README.partition("| lesson |")[0]
    assert before.count("](docs/lesson.png)") == 1
    assert sum(1 + len(line) // 120 for line in before.splitlines()) + 16 <= 3 * 45


@pytest.mark.parametrize("page", PAGES)
def test_every_command_named_in_a_guide_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    made = set(re.findall(r"(?m)(?:`|^)make ([a-z.]+)", text))
    named = set(re.findall(r"\bcourse\.py ([a-z]+)", text))
    assert made | named or page in ("data/README.md", "docs/site/start.md")
    assert (made | named) - COMMANDS == ({".venv"} if page == "CHANGELOG.md" else set())


def test_ci_types_what_the_readme_types_and_names_no_python():
    before, typed, _ = (ROOT / ".ci/run").read_text(encoding="utf-8").partition("\nmake test\n")
    assert typed and "python" not in before.partition("set -euo")[2].lower()
    assert "| `make test` |" in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/instructors.md"])
def test_the_minutes_of_the_tests_are_those_of_the_help(page):
    (minutes,) = re.findall(r"about (\w+) minutes", commands.COMMANDS["test"].purpose)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"about (\w+) minutes on two cores", text) == [minutes]


def printed(notebook):
    """Return what the code cells of a lesson print, in one line, without escapes or quotes."""
    cells = json.loads((ROOT / "notebooks" / notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    texts = [t for o in outputs for t in o.get("text", o.get("data", {}).get("text/plain", []))]
    return " ".join("".join(texts).replace("\\n", " ").replace("'", " ").split())


def test_the_answers_quoted_in_the_readme_are_those_that_lesson_12_prints():
    shown = printed("12_hf_peft.ipynb")
    *answers, (_, *shares) = re.findall(r"(?m)^\| (.+?) \| (.+?) \| (.+?) \|$", QUOTED)[1:]
    for review, *replies in answers:
        either = "|".join(map(re.escape, replies))
        asked = re.escape(review) + r" \[(?:positive|negative)\] "
        assert re.findall(f"{asked}({either}) ", shown) == replies
    assert len(answers) == 2
    assert re.findall(r"(?:question alone|trained on 48 examples) (\d+ %)", shown)[:2] == shares


def test_the_gap_of_loved_and_hated_is_that_of_lesson_00():
    ((before, after),) = re.findall(r"head reads, from (\d\.\d) to (\d\.\d):", README)
    assert f" {before} → {after} apart" in printed("00_start_here.ipynb")


def test_the_other_numbers_around_these_answers_are_those_of_lesson_12():
    shown, said = printed("12_hf_peft.ipynb"), " ".join(QUOTED.split())
    for form, stored in (
        (r"(\d+) held-out reviews", r"(\d+) sentences, lines:"),
        (r"on (\d+) examples\.", r"trained on (\d+) examples"),
        (r"forced choice between the two words reach (\d+ %)", r"two examples, choice (\d+ %)"),
    ):
        assert re.findall(form, said) == re.findall(stored, shown)[:1], form
    (losses,) = re.findall(r"loss: ([\d. ]+) ", shown)
    assert f"after {len(losses.split())} steps" in said
    assert f"{1000 * evidence.SMOLLM2:.0f} million parameters" in said


@pytest.mark.parametrize(("page", "kind"), [("README.md", "[dev]"), ("docs/student/README.md", "")])
def test_the_sizes_of_the_set_up_are_those_that_it_prints(page, kind):
    named = set(re.findall(r"\d\.\d(?= GB)", (ROOT / page).read_text(encoding="utf-8")))
    sizes = {f"{size}" for torch in ("cpu", "cuda") for size in commands.SIZES[torch, kind]}
    assert sizes <= named


def test_the_evidence_in_the_readme_is_that_of_the_studies():
    rows = dict(re.findall(r"(?m)^\| ([\d.]+ [mb]illion) \| (.+) \|$", README))
    for size, task, ways, form in (
        ("3 million", "austen", ("full", "lora, all linear", "base"), "{:.1f}"),
        ("22 million", "sentiment", ("full", "lora, all linear", "head"), "{:.1%}"),
    ):
        runs = evidence.study(task)
        largest = runs[max(runs)]
        means = [form.format(largest[way]["test"].mean()).replace("%", " %") for way in ways]
        assert re.findall(r"\d+\.\d(?: %)?", rows[size]) == means
        assert f"{len(largest.keys() - {'base'})} ways" in rows[size]
    trained = {way: runs for way, runs in evidence.assistant_runs().items() if way != "base"}
    gaps = [paired_losses(trained[way], trained["lora"]).mean / 100 for way in ("dora", "full")]
    assert f"{len(trained)} ways" in rows["135 million"]
    assert f"within {max(map(abs, gaps)):.2f} nats" in rows["135 million"]
    published = evidence.benchmark()
    assert f"noise of {evidence.noise(published):.1f} points" in rows["3.2 billion"]
    assert f"{(published['run'] != '').sum()} runs" in rows["3.2 billion"]


def test_the_versions_in_the_readme_are_those_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    named = re.findall(r"(torch|transformers|peft|trl|bitsandbytes) (\d+\.\d+\.\d+)", README)
    assert len(named) == 5
    assert all(f"\n{name}=={version}\n" in constraints for name, version in named)


def test_the_list_of_wrong_answers_is_that_of_the_checks():
    assert guide.PAGE.read_text(encoding="utf-8") == guide.page(), "run `make guide`"


def test_every_benchmark_is_run_by_a_command():
    run = {
        Path(line[0]).name for name in ("results", "costs") for line in commands.lines_of(name, [])
    }
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - run == {"catalogue.py", "common.py"}, "which are no scripts"


def test_the_code_in_the_readme_runs(monkeypatch, tmp_path, capsys):
    advice, with_peft, code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "steps=200" in code
    monkeypatch.chdir(tmp_path)
    short = code.replace("steps=200", "steps=2, show=False")
    short = short.replace("evaluate(model, task)", "evaluate(model, task.limit(test=16))")
    exec(short, {})
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    exec(with_peft.replace("steps=20", "steps=2"), {})
    assert (tmp_path / "my-run" / "adapter_config.json").is_file()
    capsys.readouterr()
    exec(advice, {})
    (said,) = re.findall(r"print\(advice\)  # (.+)", advice)
    assert capsys.readouterr().out.startswith(f"{said}\n")


@pytest.mark.assistant
def test_the_way_from_a_file_to_an_answer_in_the_readme_runs(monkeypatch, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    code = re.findall(r"```python\n(.*?)```", README, re.S)[-1]
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {k}?", "completion": f"It is {k}."} for k in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "my.jsonl").write_text(lines, encoding="utf-8")
    exec(code.replace("steps=24", "steps=1, show=False"), {})
    url, answer = capsys.readouterr().out.split("\n", 1)
    assert url.startswith("http://127.0.0.1:") and answer.strip()


def test_every_result_table_is_listed_with_the_command_that_makes_it():
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (results/\S+) \| `python (\S+)` \| lessons? (.+?) \|", text)
    listed = [row[:2] for row in rows]
    stored = {f"results/{path.name}" for path in (ROOT / "data/results").iterdir()}
    published = "results/peft_benchmark.csv"  # which PEFT measured
    assert {table for table, _ in listed} == stored - {published}
    assert f"`{sha256_of(ROOT / 'data' / published)}`" in text
    assert all((ROOT / script).is_file() for _, script in listed)
    texts = [(ROOT / "notebooks" / name).read_text(encoding="utf-8") for name in LESSONS]
    quoted = [set(re.findall(r"[\"'](\w+)\\?[\"']", text)) for text in texts]
    for table, _, named in rows:  # a lesson that names a table is listed, others may be
        parts = re.findall(r"(\d\d)(?: to (\d\d))?", named)
        spans = {k for a, b in parts for k in range(int(a), int(b or a) + 1)}
        assert {k for k, names in enumerate(quoted) if Path(table).stem in names} <= spans, table
