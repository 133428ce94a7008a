"""The course as a site: python -m tools.site lays out the sources and runs Sphinx with this."""

from docutils import nodes

project = html_title = "PEFT Lessons"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
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
nb_code_prompt_show, nb_code_prompt_hide = "Show the {type}", "Hide the {type}"
myst_enable_extensions = ["dollarmath", "amsmath"]
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


def setup(app):
    app.connect("doctree-read", fold_deeper_sections)
