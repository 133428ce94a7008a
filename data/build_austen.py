"""Rebuild data/tasks/austen/ from Debian's r-cran-janeaustenr 1.0.0-1: Jane Austen's six novels.

The package keeps them as lists of lines in R's own format, which `rdata` reads (needed here only:
pip install rdata). Run on Debian: python data/build_austen.py [--archive PATH]
"""

import bz2
import re
import zlib
from collections import Counter
from pathlib import Path

from build_common import debian_package, folder_of, parse_arguments, record, share_of

PACKAGE = "r-cran-janeaustenr=1.0.0-1"
ARCHIVE_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
INSIDE = "usr/lib/R/site-library/janeaustenr/data"
FOLDER = "tasks/austen"
NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}
HEADING = re.compile(r"chapter ([0-9]+|[ivxl]+)\.?", re.I)
END = re.compile(r"(finis|the end|volume [ivx]+|end of .*)\.?", re.I)
NOTICE = """\
The six novels of Jane Austen (1775-1817), in the public domain.

Taken from the Debian package r-cran-janeaustenr 1.0.0-1, whose files were made from the texts of
Project Gutenberg by Julia Silge (R package janeaustenr, MIT licence, copyright 2016-2017).

Changed here: lines are joined into paragraphs, the underscores that marked italics and the title
pages are left out, and chapters are numbered through in each novel.
"""


def read_novels(folder: Path) -> dict[str, list[str]]:
    """Return the lines of each novel. The index gives (offset, length) of each in the data file,
    where a 4-byte size and a zlib stream stand."""
    import rdata  # no part of the course's environment: all else here works without it

    index = rdata.read_rds(folder / "Rdata.rdx")["variables"]
    data = (folder / "Rdata.rdb").read_bytes()
    novels = {}
    for name, (offset, length) in index.items():
        chunk = zlib.decompress(data[int(offset) + 4 : int(offset) + int(length)])
        parsed = rdata.parser.parse_data(chunk, extension=".rds")
        novels[str(name)] = [str(line) for line in rdata.conversion.convert(parsed)]
    return novels


def chapters(lines: list[str]) -> list[list[str]]:
    """Return the paragraphs of each chapter, one line each; what precedes the first is left out."""
    parts, paragraph = [], []
    for line in [*lines, ""]:
        line = " ".join(line.replace("_", "").split())
        if HEADING.fullmatch(line):
            parts.append([])
        elif line:
            paragraph.append(line)
            continue
        if paragraph and parts and not END.fullmatch(" ".join(paragraph)):
            parts[-1].append(" ".join(paragraph))
        paragraph = []
    return parts


def split_of(novel: str, chapter: int) -> str:
    """Give about 80 % of all chapters to train, 10 % to validation, 10 % to test."""
    share = share_of(f"{novel}, chapter {chapter}")
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def main() -> None:
    folder = folder_of(FOLDER)
    with debian_package(PACKAGE, parse_arguments(__doc__).archive, ARCHIVE_SHA256) as package:
        novels = read_novels(package / INSIDE)
    files, counts = {}, Counter()
    for name, title in NOVELS.items():
        for number, paragraphs in enumerate(chapters(novels[name]), start=1):
            split = split_of(title, number)
            text = "\n".join([f"# {title}, chapter {number}", *paragraphs]) + "\n"
            files[split] = files.get(split, "") + text
            counts[split, "chapters"] += 1
            counts[split, "paragraphs"] += len(paragraphs)
            counts[split, "characters"] += sum(map(len, paragraphs))
    print("| split | chapters | paragraphs | characters |")
    for split, text in sorted(files.items()):
        (folder / f"{split}.txt.bz2").write_bytes(bz2.compress(text.encode()))
        row = (f"{counts[split, what]:,}" for what in ("chapters", "paragraphs", "characters"))
        print(f"| {split} | {' | '.join(row)} |")
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    record(FOLDER, "python data/build_austen.py")


if __name__ == "__main__":
    main()
