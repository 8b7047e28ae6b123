"""`make docs`: the site is built without a warning, and its reference has every public name."""

from __future__ import annotations

import os
import pkgutil
import sys
import zlib

import pytest
from support.pages import ROOT
from support.processes import Process

import unicom_ext

pytestmark = pytest.mark.slow


def build(folder):
    from sphinx.cmd.build import build_main

    options = ["-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees")]
    os.chdir(ROOT)
    sys.exit(build_main([*options, ".", str(folder / "html")]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    process = Process(folder / "printed", build, folder)
    assert process.end() == 0, process.text()
    assert not process.text()
    return folder / "html"


def test_the_root_leads_to_the_first_page(site):
    start = "/".join(("docs", "index.html"))
    assert f"url={start}" in (site / "index.html").read_text()
    first = (site / start).read_text()
    for page in ("start.html", "api/index.html", "../benchmarks/README.html", "../README.html"):
        assert f'href="{page}"' in first
    assert (site / "_images/step.svg").exists()


def test_the_reference_has_every_public_name(site):
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    lines = zlib.decompress(packed).decode().splitlines()
    names = [name for name, kind, *_ in map(str.split, lines) if kind.startswith("py:")]
    # Some are there under another of their paths.
    there = {id(pkgutil.resolve_name(name)) for name in names if is_top(name)}
    missing = [name for name in public_names() if id(pkgutil.resolve_name(name)) not in there]
    assert not missing


def is_top(name):
    """Whether it is a module, or a thing in one; members of classes may be of instances alone."""
    parent = name.rpartition(".")[0]
    return not parent or not isinstance(pkgutil.resolve_name(parent), type)


def public_names():
    yield from (f"unicom_ext.{name}" for name in unicom_ext.__all__)
    for module in unicom_ext._SUBMODULES:
        names = pkgutil.resolve_name(f"unicom_ext.{module}").__all__
        yield from (f"unicom_ext.{module}.{name}" for name in names)
