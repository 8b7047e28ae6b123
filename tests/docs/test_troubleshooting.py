"""docs/troubleshooting.md is right: each mistake in it gives the message that stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from support.pages import PAGES, ROOT

import unicom_ext

PAGE = PAGES["docs/troubleshooting.md"]
BLOCKS = re.findall(r"^#+ ([^\n]*)$|^```(py|text)\n(.*?)^```", PAGE, re.S | re.M)


def found():
    """(heading, code, message or None) of the page, and the messages without code."""
    mistakes, alone, heading, code = [], [], "", None
    for title, kind, text in BLOCKS:
        if kind == "text" and code is None:
            alone.append(" ".join(text.split()))
        elif code is not None:
            message = " ".join(text.split()) if kind == "text" else None
            mistakes.append((heading, code, message))
            code = None
        heading, code = title or heading, text if kind == "py" else code
    return mistakes, alone


MISTAKES, WITHOUT_CODE = found()


def messages_of(code, group=None):
    """All that a mistake says, errors and warnings, as Python prints them."""
    names = {
        **{name: getattr(unicom_ext, name) for name in unicom_ext.__all__},
        "torch": torch,
        "encoder": torch.nn.Linear(16, 512),
        "images": torch.randn(8, 16),
        "labels": torch.arange(8),
        "group": group,
        "rank": None if group is None else torch.distributed.get_rank(group),
    }
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(compile(code, "the page", "exec"), names)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said + [f"{w.category.__name__}: {w.message}" for w in caught]


def on_rank(group, code):
    return messages_of(code, group)


def needs_ranks(code):
    return re.search(r"\bgroup\b|distributed", code) is not None


def test_there_are_the_ten_most_common_and_others():
    assert len(MISTAKES) >= 17
    assert sum(needs_ranks(code) for _, code, _ in MISTAKES) == 7
    assert len(WITHOUT_CODE) == 4


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param(code, message, id=heading)
        for heading, code, message in MISTAKES
        if not needs_ranks(code)
    ],
)
def test_in_one_process(code, message):
    assert messages_of(code) == [message]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param(code, message, id=heading)
        for heading, code, message in MISTAKES
        if needs_ranks(code)
    ],
)
def test_on_two_ranks(ranks, code, message):
    said = ranks.run(2, on_rank, code)
    if message is None:
        assert said == [[], []]
    else:
        assert message in said[0] + said[1]
        assert len(said[0]) <= 1
        assert len(said[1]) <= 1


# ---- building ----

STAND_IN = "import types; torch = types.ModuleType('torch'); torch.__version__ = '2.13.0'; "
BUILD = {  # what is missing, and Python that takes it away before setup.py begins
    "there is no torch": "sys.modules['torch'] = None",
    "no C++ compiler": f"{STAND_IN} torch.__path__ = ['/']; sys.modules['torch'] = torch",
    "cmake was not found": (
        f"{STAND_IN} torch.__path__ = ['/']; sys.modules['torch'] = torch; "
        "sys.executable = '/nowhere/python'"
    ),
    "nvcc was not found": (
        f"{STAND_IN} torch.version = types.SimpleNamespace(cuda='13.0'); "
        "sys.modules['torch'] = torch"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("missing", BUILD)
def test_building(missing, tmp_path):
    (expected,) = [message for message in WITHOUT_CODE if missing in message]
    shutil.copy(ROOT / "setup.py", tmp_path)
    last = "_cuda_options(_torch())" if "nvcc" in missing else "CMakeBuild(Distribution()).run()"
    code = (
        f"import sys; {BUILD[missing]}; import setuptools; from setuptools import Distribution; "
        f"setuptools.setup = lambda **_: None; exec(open('setup.py').read()); {last}"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {code}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": "/nowhere", "CXX": "", "CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert " ".join(result.stderr.split()) == expected
