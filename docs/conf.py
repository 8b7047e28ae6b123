"""`make docs`: the pages as a site, by Sphinx.

Sphinx reads from the root of the repository, not from docs/, so that a link such as
../benchmarks/README.md means the same here and where the pages are read as they are.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the reference is that of this tree, whatever is installed

from unicom_ext import __version__  # noqa: E402
from unicom_ext.utils.settings import Settings  # noqa: E402

project = "unicom_ext"
release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "benchmarks/**.md", "examples/**.md"]
exclude_patterns = ["build", "demo", "runs", "**/.*"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"unicom_ext {release}"
html_extra_path = ["site/index.html"]  # the first page of the site, which sends on to root_doc
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_domain_indices = False

myst_heading_anchors = 4  # as GitHub makes them
suppress_warnings = ["myst.header"]  # tables of results have no second level

default_role = "py:obj"  # what stands in backticks in a docstring is a link, where it is ours
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries = False

# A reference must lead somewhere. Those to others' names cannot, without a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:obj", r".*"),
    (r"py:.*", r"(torch|np|numpy|nn|dist|os|collections|pathlib|rich|typing)\..*"),
    (r"py:class", r"Tensor|FeatureSelection"),
    (r"py:exc", r"ConfigError|SourceError"),
]


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", describe_settings, priority=400)  # before napoleon
    for module in ("functional", "reference"):  # one signature, not one for each type of result
        analyzer = ModuleAnalyzer.for_module(f"unicom_ext.loss.{module}")
        analyzer.analyze()
        analyzer.overloads.clear()


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the navigation of the lists on the first page: of each heading one of its links."""
    if page != root_doc:
        return
    for heading, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", source[0], re.M):
        items = "".join(line for line in text.splitlines(True) if line.startswith("- "))
        links = re.findall(r"\[([^]]+)\]\(([^)]+)\.md\)", items)
        lines = "\n".join(f"{title[0].upper()}{title[1:]} <{target}>" for title, target in links)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{lines}\n```\n"


def describe_settings(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Say of each field of a class of settings what `--help` says of the option."""
    if isinstance(value, type) and issubclass(value, Settings):
        lines += ["", "Args:"]
        for field in dataclasses.fields(value):
            about = field.metadata
            lines.append(f"    {field.name}: {about['help']}. Allowed: {about['allowed']}.")
