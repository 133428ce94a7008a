"""Build the course as a site: python -m tools.site [FOLDER] [--repository OWNER/NAME]

The pages are the stored notebooks and the guides. Nothing is executed or downloaded. FOLDER,
build/site unless given, can be opened from disk, FOLDER/index.html, or published as it is.

Each lesson has a link that downloads its notebook. With --repository, the GitHub repository where
the students' copy is published, each lesson also has links that open it in Colab and on Binder.
"""

import argparse
import copy
import html
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from tools import minutes, notebooks
from tools.environment import ROOT
from tools.publish import clear, in_binder, in_colab, owner_and_name

CONFIGURATION = ROOT / "docs" / "site"
START = CONFIGURATION / "start.md"
GUIDES = (
    "README.md",
    "docs/findings.md",
    "docs/instructors.md",
    "docs/hub.md",
    "docs/devices.md",
    "docs/wrong_answers.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "CHANGELOG.md",
    "data/README.md",
)
LINKED = ("LICENSE", "NOTICE", "docs/lesson.png", "docs/architecture.svg")
# The answers of an exam are not published: a link to them becomes its words.
UNPUBLISHED = re.compile(r"\[([^]]+)\]\((?:docs/)?questions\.md[^)]*\)")
# What the first page shows of the README, and the picture in it.
SHOWN = re.compile(r"<!-- On the site's first page, too: -->(.*)<!-- As far as here. -->", re.S)
PICTURE = re.compile(r"!\[[^]]*\]\(docs/lesson\.png\)")
FIGURE, IMAGE = re.compile(r"<figure\b.*?</figure>", re.S), re.compile(r"<img\b[^>]*>")
QUESTION = re.compile(r"^\| \*\*Question\*\* \| (.+) \|$", re.M)


def links(name: str, repository: str | None) -> str:
    """Return the links below a lesson's title, as HTML."""
    places = []
    if repository is not None:
        places = [("Colab", in_colab(repository, name)), ("Binder", in_binder(repository, name))]
    opened = [f'<a href="{html.escape(address)}">Open in {place}</a>' for place, address in places]
    here = f'<a href="../_sources/notebooks/{name}" download>Download the notebook</a>'
    return f'<div class="open-in">{" ".join([*opened, here])}</div>'


def titled(path: Path, repository: str | None = None) -> nbformat.NotebookNode:
    """Return a lesson whose title starts with its number, by which other lessons name it, and is
    followed by links."""
    nb = notebooks.read(path)
    title, _, rest = nb.cells[0].source.partition("\n")
    title = title.replace("# ", f"# {path.stem[:2]} ", 1)
    nb.cells[0].source = f"{title}\n\n{links(path.name, repository)}\n{rest}"
    return nb


def folded(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Mark, in place, the sources and outputs that JupyterLab folds, so that myst-nb folds them.

    A box with a source bears the name that the cell gives itself in its first line. Where an output
    is folded, too, it becomes a cell of its own, because myst-nb has one name for a cell."""
    cells = []
    for cell, metadata in zip(nb.cells, notebooks.cell_metadata(nb), strict=True):
        cells.append(cell)
        hidden = metadata.get("jupyter", {})
        if hidden.get("outputs_hidden") and hidden.get("source_hidden"):
            cells.append(copy.deepcopy(cell))
            cell.outputs, cells[-1].id = [], f"{cell.id}-output"
            cells[-1].metadata["tags"] = ["remove-input", "hide-output"]
        elif hidden.get("outputs_hidden"):
            cell.metadata["tags"] = [*notebooks.tags(cell), "hide-output"]
        if hidden.get("source_hidden"):
            name = notebooks.names_itself(cell)
            cell.metadata["tags"] = [*notebooks.tags(cell), "hide-input"]
            cell.metadata["mystnb"] = {"code_prompt_show": name, "code_prompt_hide": name}
    nb.cells = cells
    return nb


def figure(nb: nbformat.NotebookNode) -> str:
    """Return the figure of the experiment that decides a lesson, as HTML: that of the cell tagged
    cover."""
    (cell,) = [cell for cell in notebooks.code_cells(nb) if "cover" in notebooks.tags(cell)]
    pages = [o.data["text/html"] for o in cell.outputs if "<img" in str(o.get("data"))]
    if len(pages) != 1:
        raise ValueError(
            f"{nb.cells[0].source.partition(chr(10))[0].removeprefix('# ')}: the cell tagged cover "
            f"has {len(pages)} figures stored, not one; python course.py outputs stores them again"
        )
    return FIGURE.search(pages[0])[0]


def short_title(nb: nbformat.NotebookNode) -> str:
    """Return the title of a lesson as far as its colon."""
    return nb.cells[0].source.partition("\n")[0].removeprefix("# ").partition(":")[0]


def card(path: Path, nb: nbformat.NotebookNode) -> str:
    """Return a lesson's card on the first page, as an item of a list."""
    picture, time = IMAGE.search(figure(nb))[0], minutes.card(nb)
    title, question = short_title(nb), QUESTION.search(nb.cells[0].source)[1]
    stated = f"Core {time.core} min · deeper {time.deeper or 0} · exercises {time.exercises}"
    parts = (picture, f"**[{title}](notebooks/{path.name})**", question, stated)
    return "- " + "\n\n  ".join(parts)


def contents(lessons: dict[Path, nbformat.NotebookNode]) -> str:
    """Return the sidebar: lessons by number and short title, guides by their own titles."""
    titles = [f"{short_title(nb)} <notebooks/{path.stem}>" for path, nb in lessons.items()]
    readme, *others = (guide.removesuffix(".md") for guide in GUIDES)
    guides = [f"Overview and installation <{readme}>", *others]
    parts = []
    for caption, pages in (("Lessons", titles), ("Guides", guides)):
        lines = "\n".join(pages)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```")
    return "\n\n".join(parts)


def first_page(lessons: dict[Path, nbformat.NotebookNode]) -> str:
    """Return docs/site/start.md, filled with what the README shows, the cards and the sidebar."""
    shown = SHOWN.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]
    (picture, *_) = map(figure, lessons.values())
    parts = {
        "shown": PICTURE.sub(lambda _: picture, shown).strip(),
        "cards": "\n".join(card(path, nb) for path, nb in lessons.items()),
        "sidebar": contents(lessons),
    }
    page = START.read_text(encoding="utf-8").replace("](../../", "](")
    return re.sub(r"<!-- (\w+) -->", lambda place: parts[place[1]], page)


def lay_out(source: Path, repository: str | None) -> None:
    """Copy the pages to a folder as Sphinx wants them."""
    lessons = {path: folded(titled(path, repository)) for path in notebooks.lessons()}
    (source / "index.md").write_text(first_page(lessons), encoding="utf-8")
    for page in (*GUIDES, *LINKED):
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, source / page)
    for page in GUIDES:
        text = (source / page).read_text(encoding="utf-8")
        (source / page).write_text(UNPUBLISHED.sub(r"\1", text), encoding="utf-8")
    (source / "notebooks").mkdir()
    for path, nb in lessons.items():
        nbformat.write(nb, source / "notebooks" / path.name)


def run_sphinx(source: Path, pages: Path) -> int:
    """Turn a folder of sources into pages and return Sphinx's exit status: 1 after any warning."""
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(CONFIGURATION)]
    trees = pages.with_name("trees")
    return build_main([*options, "-d", str(trees), str(source), str(pages)])


def build(folder: Path, repository: str | None = None) -> int:
    """Write the site and return Sphinx's exit status: 1 after any warning. Raises ValueError for a
    folder that holds something else, or for a repository that is none."""
    repository = repository and owner_and_name(repository)
    clear(folder, ".buildinfo")
    with tempfile.TemporaryDirectory() as place:
        source, pages = Path(place) / "source", Path(place) / "pages"
        source.mkdir()
        lay_out(source, repository)
        status = run_sphinx(source, pages)
        if status == 0:  # not before: myst-nb also writes beside its pages
            for path in notebooks.lessons():  # to download as it is, without the site's changes
                shutil.copy(path, pages / "_sources" / "notebooks")
            (pages / ".nojekyll").touch()  # GitHub Pages would leave out folders such as _static
            shutil.copytree(pages, folder)
        return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "site")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="of the students' copy")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    try:
        status = build(folder, args.repository)
    except ValueError as error:
        parser.error(str(error))
    if status == 0:
        print(folder / "index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
