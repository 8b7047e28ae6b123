"""What the documentation names exists: links, paths, commands and their options, Python names."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest
from support.pages import PAGES, ROOT, commands, prose

from unicom_ext.cli.main import main

pages = pytest.mark.parametrize("page", PAGES)

# A path in prose, code or a comment, from the root or, where it is clear, from csrc/.
PATH = re.compile(
    r"(?<![\w/.<{*-])((?:\.ci|benchmarks|csrc|docs|examples|tests|unicom_ext)/[\w./-]*\w)(?![\w.*{(-])"
)
IN_ENGINE = re.compile(r"(?<![\w/.-])((?:bind|core|cpu|cuda)/[\w./-]*\w\.(?:cpp|cu|cuh|h))\b")


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page} links to {target}"


@pages
def test_tables_have_as_many_cells_in_each_row(page):
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(page), re.M):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, f"{page}:\n{table}"


SOURCES = [
    *(ROOT / page for page in PAGES),
    *(ROOT / name for name in ("Makefile", "setup.py", "pyproject.toml")),
    *(
        path
        for folder in ("benchmarks", "csrc", "examples", "tests", "unicom_ext")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".cpp", ".cu", ".cuh", ".h", ".py", ".pyi", ".toml"}
    ),
]


def exists(path: Path) -> bool:
    """Or is the beginning of a name: of NAME.json and NAME.md, of _C.so."""
    return path.exists() or any(path.parent.glob(f"{path.name}.*"))


def test_paths_that_are_named():
    missing = []
    for source in SOURCES:
        text, name = source.read_text(), source.relative_to(ROOT)
        missing += [f"{name} names {p}" for p in PATH.findall(text) if not exists(ROOT / p)]
        if name.parts[0] == "csrc" or source.suffix == ".md":
            text = re.sub(r'^#include ".*"$', "", text, flags=re.M)  # relative to its file
            missing += [
                f"{name} names {p}"
                for p in IN_ENGINE.findall(text)
                if not exists(ROOT / "csrc" / p)
            ]
    assert not missing, "\n".join(missing)


def test_tests_that_are_named():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    there = {*files, *re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.M)}
    for page, text in PAGES.items():
        # Shorter names are those of settings, such as test_fraction.
        named = set(re.findall(r"`(?:[\w/]+/)?(test_\w+\.py|test_\w+_\w+)`", text))
        assert named <= there, f"{page} names {sorted(named - there)}"


def test_python_names():
    """Of modules and what is in them, in pages (but for what the changelog says is gone), in
    examples and in the package's own docstrings and comments."""
    missing = set()
    for source in SOURCES:
        name = source.relative_to(ROOT)
        if name.name == "CHANGELOG.md" or name.parts[0] not in {
            *PAGES,
            "docs",
            "examples",
            "unicom_ext",
        }:
            continue
        for dotted in re.findall(r"(?<![\w./])unicom_ext(?:\.[A-Za-z_]\w*)+", source.read_text()):
            if not is_there(dotted):
                missing.add(f"{name} names {dotted}")
    assert not missing, "\n".join(sorted(missing))


@cache
def is_there(dotted: str) -> bool:
    module, *rest = dotted.split(".")
    value: object = import_module(module)
    for part in rest:
        module += f".{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = import_module(module)
            except ModuleNotFoundError:
                return False
            except ImportError:
                return True  # a library of operators is no module of Python, but it is there
    return True


@cache
def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([\w-]+):(?!=)", text, re.M))


@pytest.mark.parametrize("command", sorted({c for page in PAGES for c in commands(page)}))
def test_commands(command):
    program, *words = shlex.split(re.sub(r"[(…].*", "", command))
    if program == "make":
        assert {word for word in words if "=" not in word} <= make_targets()
    elif files := [word for word in words if word.endswith(".py")]:
        assert all((ROOT / file).exists() for file in files)
    elif program == "unicom-ext":
        check_words(main, words)
    elif modules := {"unicom_ext", "unicom_ext.cli"} & set(words):
        check_words(main, words[words.index(modules.pop()) + 1 :])
    else:
        pytest.fail(f"{command}: of no kind that this test knows")


def check_words(group: click.Group, words: list[str]) -> None:
    """The command is there, and so are its options."""
    if not words:
        return
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, f"{words[0]} is no command"
    if isinstance(command, click.Group):
        check_words(command, words[1:])
    elif words[0] != "bench":  # it hands its options on
        command.make_context(words[0], words[1:], resilient_parsing=True)
