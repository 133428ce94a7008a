"""The course as a site: python -m tools.site lays out the sources and runs Sphinx with this."""

from importlib.util import find_spec

project = "PEFT Lessons"
language = "en"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_title = "PEFT Lessons"
html_static_path = [f"{find_spec('tools').submodule_search_locations[0]}/../docs/site/_static"]
html_css_files = ["site.css"]
html_copy_source = True
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 1,
    "home_page_in_toc": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is

nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "error"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # a verdict is no Python traceback
