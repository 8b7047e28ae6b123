"""How `make docs` makes a site of the pages: Sphinx over the whole repository, see `make docs`.

The source directory is the root, not docs/, so that a link such as ../benchmarks/README.md means
the same file here and where the pages are read as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the API pages are of this tree, whatever else is installed

from unicom_ext import __version__  # noqa: E402

project = "unicom_ext"
release = __version__
html_title = f"unicom_ext {release}"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "benchmarks/**.md"]
exclude_patterns = ["build", "demo", "runs", "**/.*"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_extra_path = ["site/index.html"]  # sends the site's root to docs/
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_copy_source = False

# Pages: headings have the anchors that GitHub gives them.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # results begin below the first level

# Docstrings: Google's sections, and names in backticks that become links where they are ours.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
add_module_names = False
toc_object_entries_show_parents = "hide"

# A name that is ours must lead somewhere; others' have no inventory here, for want of a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),
    (r"py:.*", r"(torch|np|numpy|nn|dist|os|collections|pathlib|rich|typing)\..*"),
    (r"py:class", r"Tensor|FeatureSelection"),
    (r"py:exc", r"ConfigError|SourceError"),
]
