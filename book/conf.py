"""How Sphinx turns the staged course into a static site. scripts/build_book.py makes the stage and calls Sphinx.

What it is not: a place where anything is executed. Outputs are those that the notebooks have stored. Formulas are set
by a copy of MathJax that comes with a package: the site needs no network.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for anchors.py

project = "Eagle, Cell by Cell"
author = "the course's contributors"
copyright = "the course's contributors, Apache-2.0"
language = "en"
smartquotes = False
extensions = ["myst_nb", "sphinx-mathjax-offline"]
root_doc = "index"
exclude_patterns = ["build"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no widget is in the book: the stage puts a line in its place
suppress_warnings = ["mystnb.unknown_mime_type"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
myst_url_schemes = ["http", "https"]
myst_heading_slug_func = "anchors.jupyter_anchor"

html_theme = "furo"
html_title = "Eagle, Cell by Cell"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # summaries are fetched, which no browser allows for a site on the disk
html_theme_options = {"navigation_with_keys": True}
# GitHub Pages names the repository in its workflow; without it the book has no "edit" links.
if os.environ.get("REPOSITORY"):
    html_theme_options |= {"source_repository": os.environ["REPOSITORY"], "source_branch": "main",
                           "source_directory": ""}  # fmt: skip
