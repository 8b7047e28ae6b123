"""The source distribution has all that git has and nothing else, so that it builds without git; one
wheel is right for every Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unicom_ext

ROOT = Path(__file__).resolve().parents[1]
SYMBOL = rb"\0_?Py[A-Z][A-Za-z]+_[A-Za-z]+\0"  # of Python's C interface, in a table of names


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a checkout of git"
)
def test_a_source_distribution_is_the_checkout(tmp_path):
    def lines(*command):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    # What is new and not yet added counts too; what is ignored, such as binaries, does not.
    kept = lines("git", "ls-files", "--cached", "--others", "--exclude-standard")
    expected = {path for path in kept if not path.startswith(".") and (ROOT / path).exists()}
    assert {"CMakeLists.txt", "LICENSE", "csrc/core/margin.h", "unicom_ext/py.typed"} <= expected

    lines(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path))
    listed = (tmp_path / "unicom_ext.egg-info" / "SOURCES.txt").read_text().splitlines()
    assert {path for path in listed if not path.startswith(str(tmp_path))} == expected


def test_binaries_know_no_python():
    """None asks for a function of Python's, as the wheel's tag promises."""
    binaries = sorted(Path(unicom_ext.__file__).parent.glob("*.so"))
    assert {"_C.so", "libunicom.so"} <= {path.name for path in binaries}
    assert not [path.name for path in binaries if re.search(SYMBOL, path.read_bytes())]
