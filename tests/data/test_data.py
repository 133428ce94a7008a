"""The bundled files are what data/README.md says, and the splits leak nothing."""

import bz2
import csv
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from peft_lessons.data.bundled import ASSISTANT
from peft_lessons.data.own import read_rows
from peft_lessons.train.generate import keeps_rule
from tools.environment import ROOT

DATA = ROOT / "data"
DOMAINS = ("movies", "tweets")
SPLITS = ("train", "validation", "test")
README = (DATA / "README.md").read_text(encoding="utf-8")
CHECKSUMS = json.loads((DATA / "checksums.json").read_text(encoding="utf-8"))


def table_rows(*first: str) -> list[list[str]]:
    """Return the cells of the README's table rows whose first cells are these."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in README.splitlines()]
    return [row for row in rows if tuple(row[: len(first)]) == first]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def unpacked(table: str) -> io.StringIO:
    """Open a compressed table of data/tasks as text, with its line ends as they are stored."""
    content = bz2.decompress((DATA / f"tasks/{table}.csv.bz2").read_bytes())
    return io.StringIO(content.decode(), newline="")


@pytest.fixture(scope="module")
def rows():
    """Return every row of every domain: (domain, split, rating, text)."""
    result = []
    for domain in DOMAINS:
        reader = csv.DictReader(unpacked(f"sentiment/{domain}"))
        assert reader.fieldnames == ["split", "rating", "text"]
        result += [(domain, r["split"], float(r["rating"]), r["text"]) for r in reader]
    return result


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def test_the_files_are_those_of_the_checksums_and_of_the_readme():
    paths = {
        file.relative_to(DATA).as_posix()
        for folder in ("models", "reference", "tasks")
        for file in (DATA / folder).rglob("*")
        if file.is_file()
    }
    assert {path for path in paths if not path.startswith(f"{ASSISTANT}/")} == set(CHECKSUMS)
    for path, entry in CHECKSUMS.items():
        content = (DATA / path).read_bytes()
        assert len(content) == entry["bytes"], path
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], path
        (row,) = table_rows(path)
        assert number(row[1]) == entry["bytes"]
        assert row[2:4] == [entry["sha256"][:12], f"`{entry['rebuild']}`"]
        command = entry["rebuild"].split()
        assert command[0] in ("python", "git")
        script = next(part for part in command if part.startswith("data/"))
        assert (DATA.parent / (script if command[0] == "python" else command[-1])).is_file()


def share_of(key: str) -> float:
    """Return a number between 0 and 1 for a key, by its digest."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def test_a_text_is_there_once_and_decides_its_split(rows):
    keys = Counter(letters(text) for *_, text in rows)
    assert max(keys.values()) == 1 and "" not in keys
    for _, split, _, text in rows:
        share = share_of("".join(c for c in text.lower() if c.isalnum()))
        assert split == ("train" if share < 0.7 else "validation" if share < 0.8 else "test")


@pytest.mark.parametrize("domain", DOMAINS)
def test_readme_counts(rows, domain):
    mine = [row for row in rows if row[0] == domain]
    ((_, read, dropped, rest),) = table_rows(domain)[:1]
    assert number(read) - number(dropped) == number(rest) == len(mine)
    for split in SPLITS:
        (row,) = table_rows(domain, split)
        ratings = [rating for _, s, rating, _ in mine if s == split]
        negative, positive = sum(r < -1 for r in ratings), sum(r > 1 for r in ratings)
        share = f"{100 * positive / (positive + negative):.1f} %"
        assert row[2:] == [f"{len(ratings):,}", f"{negative:,}", f"{positive:,}", share]


def test_the_encoder_is_what_the_readme_says():
    weights = load_file(DATA / "models/minilm/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    count = sum(tensor.numel() for tensor in weights.values())
    assert f"{len(weights)} tensors, {count:,} parameters" in " ".join(README.split())


def rebuilt(variable, code):
    """Run code of data/ on the published archive that an environment variable names."""
    archive = os.environ.get(variable)
    if not archive:
        pytest.skip(f"{variable} names no published archive")
    return subprocess.run([sys.executable, "-c", code, archive], cwd=DATA, capture_output=True)


def test_sentences_rebuild_byte_for_byte_from_the_archive():
    run = rebuilt(
        "VADER_ARCHIVE",
        "import json, sys, tarfile; from build_common import sha256\n"
        "from build_sentiment import build, INSIDE\n"
        "package = tarfile.open(sys.argv[1])\n"
        "inner = INSIDE + 'additional_resources/hutto_ICWSM_2014.tar.gz'\n"
        "files = build(tarfile.open(fileobj=package.extractfile(inner)))\n"
        "print(json.dumps({name: sha256(content) for name, content in files.items()}))",
    )
    built = json.loads(run.stdout.decode().splitlines()[-1])
    stored = {name: unpacked(f"sentiment/{name}").read().encode() for name in DOMAINS}
    assert built == {name: hashlib.sha256(text).hexdigest() for name, text in stored.items()}


def test_weights_rebuild_byte_for_byte_from_the_archive():
    run = rebuilt(
        "MINILM_ARCHIVE",
        "import sys, zipfile; from build_minilm import convert, INSIDE\n"
        "fp32 = zipfile.ZipFile(sys.argv[1]).read(INSIDE + 'model.safetensors')\n"
        "sys.stderr.buffer.write(convert(fp32))",
    )
    assert run.stderr == (DATA / "models/minilm/model.safetensors").read_bytes()
    assert "largest rounding error 9.8e-04" in run.stdout.decode()


@pytest.mark.parametrize(
    "script", ["build_minilm.py", "build_sentiment.py", "build_austen.py", "build_wordnet.py"]
)
def test_build_refuses_another_archive(tmp_path, monkeypatch, script):
    other = tmp_path / "other.whl"
    other.write_bytes(b"x")
    monkeypatch.syspath_prepend(DATA)
    monkeypatch.setattr(sys, "argv", [script, "--archive", str(other)])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ValueError, match=r"other\.whl has sha256 \w+, expected \w+"):
        runpy.run_path(str(DATA / script), run_name="__main__")


@pytest.fixture(scope="module")
def chapters():
    """Return every chapter of the novels: (split, novel, number) and its paragraphs."""
    result = {}
    for split in SPLITS:
        text = bz2.decompress((DATA / f"tasks/austen/{split}.txt.bz2").read_bytes()).decode()
        for line in text.removesuffix("\n").split("\n"):
            if heading := re.fullmatch(r"# (.+), chapter (\d+)", line):
                result[split, heading[1], int(heading[2])] = current = []
            else:
                current.append(line)
    return result


def test_every_chapter_is_in_the_split_of_its_heading(chapters):
    numbers = {}
    for split, novel, chapter in chapters:
        numbers.setdefault(novel, []).append(chapter)
        share = share_of(f"{novel}, chapter {chapter}")
        assert split == ("train" if share < 0.8 else "validation" if share < 0.9 else "test")
    assert len(numbers) == 6
    for novel, listed in numbers.items():
        assert sorted(listed) == list(range(1, len(listed) + 1))
        assert table_rows(novel) == [[novel, str(len(listed))]]


def test_no_paragraph_is_in_two_splits(chapters):
    splits = {}
    for (split, *_), paragraphs in chapters.items():
        for paragraph in paragraphs:
            splits.setdefault(letters(paragraph), {})[split] = paragraph
    shared = [next(iter(places.values())) for places in splits.values() if len(places) > 1]
    assert all(len(paragraph) < 20 for paragraph in shared)
    assert '"Not at all."' in shared


@pytest.mark.parametrize("split", SPLITS)
def test_readme_counts_of_the_novels(chapters, split):
    mine = [paragraphs for (where, *_), paragraphs in chapters.items() if where == split]
    paragraphs = [paragraph for chapter in mine for paragraph in chapter]
    counts = len(mine), len(paragraphs), sum(map(len, paragraphs))
    assert table_rows("austen", split) == [["austen", split, *(f"{n:,}" for n in counts)]]


@pytest.fixture(scope="module")
def nouns():
    """Return every row of the noun definitions: (split, category, word, definition)."""
    header, *rows = csv.reader(unpacked("wordnet/nouns"))
    assert header == ["split", "category", "word", "definition"]
    return rows


def test_a_definition_is_there_once_and_decides_its_split(nouns):
    keys = Counter()
    for split, *_, definition in nouns:
        key = "".join(c for c in definition.lower() if c.isalnum())
        keys[key] += 1
        share = share_of(key)
        assert split == ("train" if share < 0.7 else "validation" if share < 0.8 else "test")
        assert not re.search(r"\b(derogatory|disparaging|vulgar|obscene|slur)\b", definition)
    assert max(keys.values()) == 1


def test_definitions_have_26_categories_in_each_split(nouns):
    counts = Counter(category for _, category, *_ in nouns)
    assert len(counts) == 26
    few = {category: n for category, n in counts.items() if n < 250}
    assert few == {"motive": 41, "top": 51} and max(counts.values()) == 250
    flat = " ".join(README.split())
    assert "at most 250 definitions" in flat and "motive has only 41 and top 51" in flat
    for split in SPLITS:
        mine = Counter(category for where, category, *_ in nouns if where == split)
        assert mine.keys() == counts.keys()
        numbers = sum(mine.values()), min(mine.values()), max(mine.values())
        assert table_rows("wordnet", split) == [["wordnet", split, *(f"{n:,}" for n in numbers)]]


@pytest.mark.parametrize(
    "table", ["preferences/pairs", "sentiment/movies", "sentiment/tweets", "wordnet/nouns"]
)
def test_compressed_tables_have_level_9_and_lf_line_ends(table):
    assert (DATA / f"tasks/{table}.csv.bz2").read_bytes().startswith(b"BZh9")
    text = unpacked(table).read()
    assert text.endswith("\n") and "\r" not in text


def sentences(text: str) -> int:
    """Count the sentences of an answer by the ends that are followed by a space or by nothing."""
    return len(re.findall(r"[.!?](?=\s|$)", text))


@pytest.fixture(scope="module")
def pairs():
    """Return every row of the preferences: a prompt with a chosen and a rejected answer."""
    reader = csv.DictReader(unpacked("preferences/pairs"))
    assert reader.fieldnames == ["split", "prompt", "chosen", "rejected"]
    return list(reader)


def test_every_preference_keeps_the_rule(pairs):
    for pair in pairs:
        chosen, rejected = pair["chosen"], pair["rejected"]
        assert keeps_rule(chosen, ended=True), chosen
        assert not keeps_rule(rejected, ended=True) and chosen != rejected
        assert len(rejected.split()) > 25 and sentences(rejected) > 1, rejected


def test_every_prompt_is_there_once_and_asks_for_a_noun_of_its_split(pairs, nouns):
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    known = {(split, f'What does the word "{word}" mean?') for split, _, word, _ in nouns}
    assert {(pair["split"], pair["prompt"]) for pair in pairs} <= known


@pytest.mark.parametrize("split", SPLITS)
def test_readme_counts_of_the_preferences(pairs, split):
    mine = [pair for pair in pairs if pair["split"] == split]
    words = (
        sum(len(pair[answer].split()) for pair in mine) / len(mine)
        for answer in ("chosen", "rejected")
    )
    counts = str(len(mine)), *(f"{mean:.1f}" for mean in words)
    assert table_rows("preferences", split) == [["preferences", split, *counts]]


def test_the_decoder_is_what_the_readme_says():
    tensors = load_file(DATA / "models/tinylm/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    flat = " ".join(README.split())
    count = sum(tensor.numel() for tensor in tensors.values())
    config = json.loads((DATA / "models/tinylm/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    for phrase in (
        f"{len(tensors)} tensors, {count:,} parameters, in fp16",
        f"hidden size {config['hidden_size']}, {config['num_hidden_layers']} layers, "
        f"{config['num_attention_heads']} heads and {config['num_key_value_heads']} key-value "
        f"heads, intermediate size {config['intermediate_size']}",
        f"vocabulary of {config['vocab_size']:,}",
    ):
        assert phrase in flat


def test_the_notice_names_every_bundled_component_and_claims_no_more_than_is_given():
    notice = (DATA.parent / "NOTICE").read_text(encoding="utf-8")
    folders = {file.rpartition("/")[0] for file in CHECKSUMS} | {ASSISTANT}
    assert {"models/minilm", "tasks/sentiment", "reference"} < folders
    assert re.findall(r"(?m)^data/(\S+)$", notice) == sorted(folders)
    # The licence of the ratings is not claimed for the sentences.
    for name in ("NOTICE", "README.md", "data/README.md", "data/tasks/sentiment/LICENSE"):
        flat = " ".join((DATA.parent / name).read_text(encoding="utf-8").split())
        assert "quotations" in flat and "research and teaching" in flat, name


def test_the_lessons_that_run_without_the_reviews_are_named():
    lessons = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    loads = re.compile(r'load_task\(\\"(sentiment|reviews)')
    without = [p.stem[:2] for p in lessons if not loads.search(p.read_text(encoding="utf-8"))]
    (named,) = re.findall(r"lessons ([\d, and]+) still run, and", README)
    assert re.findall(r"\d\d", named) == without


@pytest.mark.skipif(not (DATA.parent / ".git").exists(), reason="no git checkout")
def test_what_people_download_stays_small():
    command = ["git", "-C", str(DATA.parent), "ls-files", "-z"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [DATA.parent / name for name in tracked.split("\0") if name]
    assert len(files) > 50
    assert not [name for name in tracked.split("\0") if name.startswith(f"data/{ASSISTANT}")]
    assert sum(file.stat().st_size for file in files if file.exists()) < 60 * 2**20


def test_the_desk_is_balanced_and_its_copies_stay_on_the_side_of_their_originals():
    rows = read_rows(DATA / "tasks/desk/desk.jsonl")
    sides = {s: [row for row in rows if row["split"] == s] for s in ("train", "test")}
    assert len(rows) == sum(map(len, sides.values()))
    told = [row["prompt"].partition("\n\n") for row in rows]
    assert len({instruction for instruction, _, _ in told}) == 1
    answers = ["happy, answer later", "unhappy, answer today"]
    prompts = {}
    for split, mine in sides.items():
        prompts[split] = [" ".join(row["prompt"].split()).casefold() for row in mine]
        counts = Counter(row["completion"] for row in mine)
        assert sorted(counts) == sorted(answers) and len(set(counts.values())) == 1
        figures = len(mine), len(set(prompts[split])), len(mine) // len(answers)
        assert table_rows("desk", split) == [["desk", split, *map(str, figures)]]
    assert not set(prompts["train"]) & set(prompts["test"])
    copied = [prompt for prompt, n in Counter(prompts["train"]).items() if n == 2]
    pairs = [[row for row in rows if " ".join(row["prompt"].split()).casefold() == p]
             for p in copied]  # fmt: skip
    assert Counter(pair[0]["completion"] for pair in pairs) == dict.fromkeys(answers, 4)
    assert all(len({row["prompt"] for row in pair}) == 2 for pair in pairs)
    assert all(len({row["completion"] for row in pair}) == 1 for pair in pairs)
