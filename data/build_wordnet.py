"""Rebuild data/tasks/wordnet/ from Debian's wordnet-base 1:3.0-39: glosses of nouns by category.

WordNet's editors sorted its nouns into 26 files, one a subject: animal, food, shape and so on.
Run on Debian: python data/build_wordnet.py [--archive PATH]
"""

import bz2
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from build_common import debian_package, folder_of, parse_arguments, record, share_of, table
from build_sentiment import normalise, split_of

PACKAGE = "wordnet-base=1:3.0-39"
ARCHIVE_SHA256 = "f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db"
FOLDER = "tasks/wordnet"
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# The numbers 3 to 28 of WordNet's lexicographer files (man 5 lexnames), in order.
NOUN_FILES = (
    "top act animal artifact attribute body cognition communication event feeling food group "
    "location motive object person phenomenon plant possession process quantity relation shape "
    "state substance time"
)
MOST = 250  # glosses of one category that are kept
# Whole words that mark a text as unfit for a classroom.
UNFIT = re.compile(
    r"\b(slurs?|offensive|disparag\w*|derogatory|vulgar|obscen\w*|porn\w*|sexual\w*|genital\w*|"
    r"copulat\w*|prostitut\w*|erotic\w*|fuck\w*|shit\w*|nigg\w*|rape[ds]?|rapist|incest\w*|"
    r"masturbat\w*)\b",
    re.I,
)


@dataclass(frozen=True)
class Synset:
    """Words of one meaning, their part of speech, the number of their file, and the gloss."""

    words: tuple[str, ...]
    speech: str
    file: int
    gloss: str

    @property
    def definition(self) -> str:
        """Return the gloss without its example sentences."""
        return re.split(r';? *"', self.gloss)[0].strip(" ;:")


@contextmanager
def wordnet(archive: Path | None):
    """Give the folder of WordNet's files; `archive` is the Debian package, else downloaded."""
    with debian_package(PACKAGE, archive, ARCHIVE_SHA256) as files:
        yield files / "usr/share"


def synsets(folder: Path) -> Iterator[Synset]:
    """Go through the synsets of the four parts of speech, in the order of the files."""
    for short, speech in PARTS_OF_SPEECH.items():
        text = (folder / f"wordnet/data.{short}").read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("  "):  # the licence stands at the head of each file
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = (re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            unique = tuple(dict.fromkeys(words))
            yield Synset(unique, speech, int(fields[1]), " ".join(gloss.split()))


def main() -> None:
    folder = folder_of(FOLDER)
    with wordnet(parse_arguments(__doc__).archive) as files:
        nouns = [s for s in synsets(files) if s.speech == "noun"]
        licence = (files / "doc/wordnet-base/copyright").read_text(encoding="utf-8")
    names = dict(enumerate(NOUN_FILES.split(), start=3))
    categories: dict[str, set] = {}
    for noun in nouns:
        categories.setdefault(normalise(noun.definition), set()).add(noun.file)

    rows, seen, counts = [], set(), Counter()
    for noun in sorted(nouns, key=lambda noun: share_of(noun.gloss)):
        key, category = normalise(noun.definition), names[noun.file]
        unique = key and key not in seen and len(categories[key]) == 1
        if unique and counts[category] < MOST and not UNFIT.search(noun.gloss):
            seen.add(key)
            counts[category] += 1
            rows.append((split_of(key), category, noun.words[0], noun.definition))
    content = table(("split", "category", "word", "definition"), rows)
    (folder / "nouns.csv.bz2").write_bytes(bz2.compress(content))
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
    sizes = Counter(split for split, *_ in rows)
    print(f"{len(nouns):,} noun synsets read, {len(rows):,} kept: {dict(sizes)}, {dict(counts)}")
    record(FOLDER, "python data/build_wordnet.py")


if __name__ == "__main__":
    main()
