"""The course as web pages: built without a warning, whole, and readable in a real browser."""

import html
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from tools import minutes, notebooks, publish, site
from tools.environment import ROOT

PAGES = ["index.html", *(f"notebooks/{path.stem}.html" for path in notebooks.lessons())]
PAGES += [guide.replace(".md", ".html") for guide in site.GUIDES]
SOME = {"index.html", "notebooks/02_lora.html"}
IN_A_BROWSER = [
    pytest.param(page, marks=[] if page in SOME else [pytest.mark.every_lesson]) for page in PAGES
]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 1000}
SEEN = r"""() => ({
    formulas: document.querySelectorAll('.math').length,
    rendered: document.querySelectorAll('mjx-container').length,
    refused: document.querySelectorAll('mjx-merror').length,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    red: +getComputedStyle(document.body).backgroundColor.match(/\d+/)[0],
})"""
# A word is torn if its letters stand on more than one line.
TORN = """() => {
    const torn = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode, inside = text.parentElement;
        if (!inside.closest('article table') || inside.closest('mjx-container')) continue;
        for (const word of text.data.matchAll(/\\p{L}+/gu)) {
            const letters = document.createRange();
            letters.setStart(text, word.index);
            letters.setEnd(text, word.index + word[0].length);
            const lines = [...letters.getClientRects()].map(box => Math.round(box.top));
            if (new Set(lines).size > 1) torn.push(word[0]);
        }
    }
    return torn;
}"""


class Page(HTMLParser):
    """Collect the links, loaded files and ids of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.loaded, self.ids, self.heads = [], [], set(), []
        self.language = self.description = None
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values["id"]} if values.get("id") else set()
        self.heads += [values.get("scope")] if tag == "th" else []
        if tag == "html":
            self.language = values.get("lang")
        if tag == "meta" and values.get("name") == "description":
            self.description = values["content"]
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in {"script", "img", "iframe"} and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and "stylesheet" in values.get("rel", ""):
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert site.build(folder) == 0
    return folder


def test_a_folder_of_something_else_is_kept(built, tmp_path):
    assert (built / ".buildinfo").exists(), "by which an earlier site is known"
    (tmp_path / "thesis").touch()
    with pytest.raises(ValueError, match="holds other files"):
        site.build(tmp_path)
    assert (tmp_path / "thesis").exists()


def test_there_is_a_page_for_each_lesson_and_guide(built):
    assert all((built / page).is_file() for page in PAGES)
    links = Page(built / "index.html").links
    assert set(PAGES[1:]) <= set(links), "the map leads to each"


def words(page: str) -> str:
    """Return the text of some HTML, with straight quotes and one space between words."""
    text = html.unescape(re.sub(r"<[^>]*>", "", page)).translate(str.maketrans("“”’", '""\''))
    return " ".join(text.split())


def test_the_first_page_shows_what_the_readme_shows_and_a_card_for_each_lesson(built):
    start = (built / "index.html").read_text(encoding="utf-8")
    ways = [start.index(f"<strong>{way}</strong>") for way in ("Learn", "Teach", "Use")]
    assert ways == sorted(ways) and "depressing movie of many missed" in start
    (cards,) = re.findall(r'<ul class="lessons[^"]*">(.*?)</ul>', start, re.S)
    cards = re.findall(r"<li>(.*?)</li>", cards, re.S)
    for path, card in zip(notebooks.lessons(), cards, strict=True):
        nb = notebooks.read(path)
        (cover,) = [c for c in notebooks.code_cells(nb) if "cover" in notebooks.tags(c)]
        (alt,) = re.findall(r'<img [^>]*alt="([^"]+)"', card)
        shown = "".join(o.get("data", {}).get("text/html", "") for o in cover.outputs)
        assert len(alt) >= 20 and f'alt="{alt}"' in shown
        assert re.findall(r'href="([^"]+)"', card) == [f"notebooks/{path.stem}.html"]
        (question,) = re.findall(r"\*\*Question\*\* \| (.+) \|", nb.cells[0].source)
        time = minutes.card(nb)
        stated = f"Core {time.core} min · deeper {time.deeper} · exercises {time.exercises}"
        assert words(card).endswith(f"{question.replace('*', '')} {stated}")


def test_a_lesson_whose_figure_was_not_stored_is_named():
    nb = notebooks.read(notebooks.lessons(["02"])[0])
    for cell in notebooks.code_cells(nb):
        cell.outputs = []
    with pytest.raises(ValueError, match="LoRA.*cover has 0 figures.*course.py outputs"):
        site.figure(nb)


def test_the_answers_of_an_exam_are_not_published(built):
    assert not list(built.rglob("questions*"))
    text = site.UNPUBLISHED.sub(r"\1", "See [an exam](docs/questions.md#02-lora), [LoRA](02.md).")
    assert text == "See an exam, [LoRA](02.md)."


def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(built):
    files = [file for file in built.rglob("*.html") if "_static" not in file.parts]  # templates
    pages = {file: Page(file) for file in files}
    broken = []
    for file, page in pages.items():
        for target in page.links + page.loaded:
            parts = urlsplit(target)
            if parts.scheme in {"http", "https", "mailto", "data"}:
                assert target in page.links or parts.scheme == "data", f"{file} loads {target}"
                continue
            to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = to.is_file()
            if there and parts.fragment and to in pages:
                there = parts.fragment in pages[to].ids
            if not there:
                broken.append((file.name, target))
    assert not broken


def test_every_page_says_what_it_is_and_what_the_heads_of_its_tables_head(built):
    pages = {page: Page(built / page) for page in PAGES}
    assert {page.language for page in pages.values()} == {"en"}
    described = {page.description for page in pages.values()}
    assert len(described) == len(PAGES) and all(len(text) > 20 for text in described)
    assert {head for page in pages.values() for head in page.heads} == {"col", "row"}
    dora = (built / "notebooks/04_dora.html").read_text(encoding="utf-8")
    assert re.search(r'<th\b[^>]*\bscope="row"><p><strong>You need</strong>', dora), "the card"
    assert "Toggle hidden content" not in dora


def test_the_folder_can_be_published_as_it_is(built):
    assert (built / ".nojekyll").exists(), "or GitHub Pages leaves out _static"
    texts = [file for file in built.rglob("*") if file.suffix in {".html", ".js", ".md", ".ipynb"}]
    for file in texts:
        text = file.read_text(encoding="utf-8")
        assert str(ROOT) not in text and str(built) not in text, file


def test_a_lesson_can_be_downloaded_as_it_is(built):
    for path in notebooks.lessons():
        page = built / "notebooks" / f"{path.stem}.html"
        (link,) = [link for link in Page(page).links if link.endswith(f"notebooks/{path.name}")][:1]
        assert (page.parent / link).read_bytes() == path.read_bytes()
        assert "Open in" not in page.read_text(encoding="utf-8"), "nobody published a copy"


def test_a_published_copy_can_be_opened_from_each_lesson():
    path = notebooks.lessons()[2]
    for repository in ("jo/peft-course", "https://github.com/jo/peft-course", "jo/peft-course.git"):
        source = site.titled(path, publish.owner_and_name(repository)).cells[0].source
        assert source.startswith("# 02 LoRA: a low-rank change beside frozen weights\n\n<div ")
        addresses = re.findall(r'href="(http[^"]+)">Open in (\w+)<', source)
        assert [place for _, place in addresses] == ["Colab", "Binder"]
        assert addresses[0][0].endswith("/github/jo/peft-course/blob/main/notebooks/02_lora.ipynb")
        assert "/gh/jo/peft-course/main?urlpath=lab/tree/notebooks/02_lora." in addresses[1][0]
    for wrong in ("peft-course", "https://example.org/jo/peft-course", "a/b/c", 'a/b"'):
        with pytest.raises(ValueError, match="OWNER/NAME"):
            publish.owner_and_name(wrong)


def test_stills_of_explorers_are_shown(built):
    count = 0
    for path in notebooks.lessons():
        text = (built / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        line = r"Run this cell in JupyterLab to move: "
        stills = [c for c in notebooks.code_cells(notebooks.read(path)) if line in str(c.outputs)]
        parts = re.findall(rf'<div class="cell_output(?:(?!<div class="cell).)*{line}', text, re.S)
        assert len(parts) == len(stills)
        assert all("<img" in one or "<svg" in one or "<table" in one for one in parts)
        count += len(parts)
    assert count >= 6


def test_the_search_knows_every_lesson(built):
    text = (built / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {f"notebooks/{path.stem}" for path in notebooks.lessons()} <= set(index["docnames"])
    assert "intrud" in index["terms"] | index["titleterms"]  # words are cut to their stems


def test_a_lesson_goes_by_its_number_wherever_it_is_named(built):
    start = (built / "index.html").read_text(encoding="utf-8")
    for path in notebooks.lessons():
        number, page = path.stem[:2], (built / "notebooks" / path.stem).with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        assert re.search(rf"<title>{number} ", text) and re.search(rf"<h1>{number} ", text)
        assert re.search(rf'href="notebooks/{path.stem}.html">\s*{number} ', start), "sidebar"


@pytest.fixture(scope="module")
def folding(tmp_path_factory):
    """Return the page of a lesson with all that is folded: an answer, plumbing, a deeper
    section."""
    place = tmp_path_factory.mktemp("folding")
    (place / "source").mkdir()
    cells = [
        new_markdown_cell("# Title\n\nThe core. **Predict before you run:** [how?](#a-part-of-it)"),
        new_code_cell("answer", outputs=[new_output("stream", text="forty-two")]),
        new_code_cell(
            "# Source of this figure\ndrawing", outputs=[new_output("stream", text="a picture")]
        ),
        new_markdown_cell("## Deeper · Beyond (3 min)\n\nText with $a = b$."),
        new_markdown_cell("### A part of it\n\n" + "A long text.\n\n" * 40),
        new_markdown_cell("## Deeper · Still further (2 min)\n\n**Predict before you run:** x"),
        new_code_cell("# Source of these lines\nx", outputs=[new_output("stream", text="is 7")]),
        new_markdown_cell("More text."),
    ]
    for cell in (cells[2], cells[6]):
        cell.metadata["tags"] = ["plumbing"]
    nb = site.folded(notebooks.clean(nbformat.v4.new_notebook(cells=cells), "index"))
    nbformat.write(nb, place / "source" / "index.ipynb")
    assert site.run_sphinx(place / "source", place / "pages") == 0
    return place / "pages" / "index.html"


def test_what_jupyterlab_folds_is_folded_on_the_page(folding):
    text = folding.read_text(encoding="utf-8")
    deeper = re.findall(r'</h2>\s*<details class="deeper">(.*?)</details>\s*</section>', text, re.S)
    first, second = deeper
    assert "Text with" in first and 'id="a-part-of-it"' in first and "More text." in second
    hidden = re.findall(r'<details class="admonition hide ([\w-]+)">(.*?)</details>', text, re.S)
    places = [place for place, _ in hidden]
    assert places == ["below-input", "above-input", "above-input", "above-output"]
    for (_, box), inside in zip(hidden, ("forty-two", "drawing", "x", "is 7"), strict=True):
        assert inside in box
    named = re.findall(r'<p class="(collapsed|expanded) [^"]*">(.*?)</p>', text)
    show = ["Show the output", "Source of this figure", "Source of these lines", "Show the output"]
    assert [name for state, name in named if state == "collapsed"] == show
    hide = [name.replace("Show", "Hide") for name in show]
    assert [name for state, name in named if state == "expanded"] == hide
    left = re.sub(r"<details.*?</details>", "", text, flags=re.S)
    assert "The core." in left and "a picture" in left


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    from playwright.sync_api import sync_playwright

    from tools.lab import chromium, launch

    if chromium() is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        opened = launch(playwright)
        yield opened
        opened.close()


def hindrances(page):
    """Return what axe-core finds in a page that hinders a reader, as bad contrast."""
    from axe_playwright_python.sync_playwright import Axe

    # No preload: it asks for each style sheet, which a browser refuses to pages from disk.
    more = {name: {"enabled": True} for name in ("label-content-name-mismatch", "td-has-header")}
    options = {"resultTypes": ["violations"], "preload": False, "rules": more}
    broken = Axe().run(page, options=options).response["violations"]
    return [f"{rule['help']}: {rule['nodes'][0]['html']}" for rule in broken]


def seen(browser, address, size, theme):
    """Return (what a page shows in a window and theme, what its console says)."""
    context = browser.new_context(viewport=size, color_scheme=theme, offline=True)
    page, log = context.new_page(), []
    page.on("pageerror", lambda error: log.append(str(error)))
    page.on("console", lambda entry: entry.type in {"error", "warning"} and log.append(entry.text))
    page.goto(address)
    page.wait_for_function(
        "() => document.querySelectorAll('mjx-container').length"
        " >= document.querySelectorAll('.math').length",
        timeout=30_000,
    )
    facts = page.evaluate(SEEN) | {"torn": page.evaluate(TORN), "hinders": hindrances(page)}
    context.close()
    return facts, log


@pytest.mark.browser
@pytest.mark.parametrize("page", IN_A_BROWSER)
def test_a_page_is_readable_on_desk_and_phone_in_both_themes(built, browser, page):
    for size, theme in ((DESK, "light"), (PHONE, "dark")):
        facts, log = seen(browser, (built / page).as_uri(), size, theme)
        assert not log
        assert facts["rendered"] == facts["formulas"] and not facts["refused"]
        assert facts["wide"] <= 0, "the page is wider than the window"
        assert not facts["broken"] and not facts["torn"] and not facts["hinders"]
        assert (facts["red"] > 128) == (theme == "light")


@pytest.mark.browser
def test_the_search_finds_a_lesson(built, browser):
    page = browser.new_page()
    page.goto((built / "search.html").as_uri() + "?q=intruder")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("14_beyond_lora" in link for link in links)
    page.close()


@pytest.mark.browser
def test_a_link_opens_a_folded_section_and_paper_shows_all(folding, browser):
    for size, theme in ((DESK, "light"), (PHONE, "dark")):
        facts, log = seen(browser, folding.as_uri(), size, theme)
        assert not log and facts["wide"] <= 0 and not facts["hinders"]
    page = browser.new_page()
    page.goto(folding.as_uri())
    sections = "all => all.map(section => section.open)"
    assert page.eval_on_selector_all("details.deeper", sections) == [False, False]
    page.click("article a[href='#a-part-of-it']")
    assert page.eval_on_selector_all("details.deeper", sections) == [True, False]
    assert page.locator("#a-part-of-it h3").is_visible()
    for key, opened in (("Enter", True), ("Space", False)):
        page.locator("details.deeper > summary").last.press(key)
        assert page.eval_on_selector_all("details.deeper", sections) == [True, opened]
    page.goto("about:blank")
    page.goto(folding.as_uri())
    page.emulate_media(media="print")
    for text in ("forty-two", "drawing", "A long text.", "More text."):
        assert page.get_by_text(text).first.is_visible(), text
    page.close()
