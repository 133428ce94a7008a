"""The course as a site: python -m tools.site lays out the sources and runs Sphinx with this."""

import html
import re
import textwrap

from docutils import nodes

project = html_title = "PEFT Lessons"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
language = "en"
templates_path = ["_templates"]
html_sidebars = {"**": ["brand.html", "search-field.html", "sbt-sidebar-nav.html"]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 1,
    "home_page_in_toc": True,
    "use_fullscreen_button": False,
    "footer_content_items": [],  # no author or date is stated
    "navbar_persistent": [],  # the sidebar has the search
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is

nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Show the output", "Hide the output"
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # a verdict is no Python traceback

FOLD = """<details class="deeper"><summary>
<span class="collapsed">Show this section</span><span class="expanded">Hide this section</span>
</summary>"""


def fold_deeper_sections(app, doctree):
    """Fold what stands below each heading that begins with "Deeper", by HTML alone."""
    for section in doctree.findall(nodes.section):
        title = section.next_node(nodes.title)
        if title.astext().startswith("Deeper"):
            section.insert(section.index(title) + 1, nodes.raw("", FOLD, format="html"))
            section.append(nodes.raw("", "</details>", format="html"))


TABLE = re.compile(r"<table\b.*?</table>", re.S)
HEAD = re.compile(r"<th\b(.*?)>(.*?)</th>", re.S)
FIRST = re.compile(r"(<tr\b[^>]*>\s*)<td\b(.*?)>(.*?)</td>", re.S)
SILENT = re.compile(r'<span class="math.*?</span>|<[^>]*>|\W', re.S)
TOGGLE = ' aria-label="Toggle hidden content"'  # MyST-NB's, instead of the words that are seen


def column_head(head):
    """Return a head of the first row as that of a column, but an empty one as no head."""
    attributes, text = head.groups()
    if not SILENT.sub("", text):
        return f"<td{attributes}>{text}</td>"
    return f'<th{attributes} scope="col">{text}</th>'


def row_head(first):
    """Return the first cell of a row as its head, if there are words in the cell."""
    row, attributes, text = first.groups()
    if not SILENT.sub("", text):
        return first[0]
    return f'{row}<th{attributes} scope="row">{text}</th>'


def mend_table(found):
    """Say of the heads of a table what they head, where the table has any."""
    head, row, rows = found[0].partition("</tr>")
    if "<th" not in head:
        return found[0]
    return HEAD.sub(column_head, head) + row + FIRST.sub(row_head, rows)


def complete(app, pagename, templatename, context, doctree):
    """Mend the HTML of a page, also that of stored outputs, and describe the page."""
    if doctree is not None:
        context["body"] = TABLE.sub(mend_table, context["body"]).replace(TOGGLE, "")
        text = doctree.next_node(nodes.paragraph).astext()
        text = html.escape(textwrap.shorten(text, 200, placeholder=" …"))
        context["metatags"] += f'<meta name="description" content="{text}" />'


def setup(app):
    app.connect("doctree-read", fold_deeper_sections)
    app.connect("html-page-context", complete)
