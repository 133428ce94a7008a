"""Build the corpus that tinylm is pretrained on: WordNet glosses and descriptions of packages.

Run on Debian, after `apt-get -o Acquire::Languages=en update`:
    python data/build_corpus.py FOLDER [--archive PATH]

FOLDER gets train.txt and valid.txt (1 document in 100), one document a line. They are no part of
the checkout: data/models/tinylm/NOTICE says which corpus the bundled model saw. The descriptions
are those of the package lists of the day; `--archive` is the Debian package of build_wordnet.py.
"""

import argparse
import bz2
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from build_common import DATA, sha256, share_of
from build_wordnet import UNFIT, Synset, synsets, wordnet

OPENING, MOST = 3, 150  # documents that begin with the same words: how many words, how many kept
RUN = 8  # words: a document that shares so long a run with the adaptation text is left out


def as_document(synset: Synset) -> str:
    return f"{', '.join(synset.words)} ({synset.speech}): {synset.gloss}"


def package_paragraphs() -> Iterator[str]:
    """Go through the long descriptions paragraph by paragraph, without lists and code."""
    apt = ["apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", "$(FILENAME)"]
    listed = subprocess.run([*apt, "Identifier: Translations"], check=True, capture_output=True)
    files = [f for f in listed.stdout.decode().split("\n") if f.startswith("/var/lib/apt/lists/")]
    if not files:
        raise SystemExit("no descriptions: run `apt-get -o Acquire::Languages=en update` first")
    for file in files:
        helper = ["/usr/lib/apt/apt-helper", "cat-file", file]
        content = subprocess.run(helper, check=True, capture_output=True).stdout
        for stanza in content.decode(errors="ignore").split("\n\n"):
            lines = stanza.partition("Description-en: ")[2].split("\n")[1:]
            paragraph = []
            for line in [*lines, " ."]:
                if line.strip() in ("", "."):
                    yield " ".join(paragraph)
                    paragraph = []
                elif not line.startswith("  ") and not re.match(r" [*+\-•o] ", line):
                    paragraph.append(line.strip())


def is_prose(text: str) -> bool:
    return len(text) >= 60 and text[0].isupper() and text[-1] in ".!?" and "://" not in text


def letters(text: str) -> str:
    """Return a text's letters in lower case: descriptions that differ in versions are equal."""
    return "".join(c for c in text.lower() if c.isalpha())


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def select(documents: list[str], elsewhere: str) -> list[str]:
    """Return what is kept of the documents, in an order that mixes them and is always the same."""
    known, seen, openings, kept, dropped = runs(elsewhere), set(), Counter(), [], Counter()
    for text in sorted(documents, key=share_of):
        opening = " ".join(text.split()[:OPENING])
        openings[opening] += 1
        reasons = {
            "unfit": UNFIT.search(text),
            "copy": letters(text) in seen,
            "too common an opening": openings[opening] > MOST,
            "shared with the adaptation text": not known.isdisjoint(runs(text)),
        }
        seen.add(letters(text))
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        dropped[reason] += 1
        if reason is None:
            kept.append(text)
    print(f"{len(documents):,} documents read, {len(kept):,} kept; dropped: {dict(dropped)}")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archive", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with wordnet(arguments.archive) as files:
        documents = [as_document(synset) for synset in synsets(files)]
    documents += filter(is_prose, package_paragraphs())
    austen = "\n".join(
        bz2.decompress(f.read_bytes()).decode()
        for f in sorted((DATA / "tasks/austen").glob("*.bz2"))
    )
    kept = select(documents, austen)
    # By the letters alone, so that near copies cannot be on both sides.
    held_out = [text for text in kept if share_of(letters(text)) < 0.01]
    train = [text for text in kept if share_of(letters(text)) >= 0.01]
    for name, texts in (("train", train), ("valid", held_out)):
        content = ("\n".join(texts) + "\n").encode()
        (arguments.folder / f"{name}.txt").write_bytes(content)
        size = f"{len(texts):,} documents, {len(content) / 1e6:.1f} MB"
        print(f"{name}: {size}, sha256 {sha256(content)}")


if __name__ == "__main__":
    main()
