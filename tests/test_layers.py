"""Layers only look down: no arrow between files runs up, and none closes a circle."""

from __future__ import annotations

import pytest
from support import layers


def test_the_package():
    arrows = layers.python_arrows()
    assert len(arrows) > 50
    faults = layers.python_faults(arrows)
    assert not faults, "\n".join(faults)


def test_the_engine():
    arrows = layers.engine_arrows()
    assert len(arrows) > 50
    faults = layers.engine_faults(arrows)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "name",
    ["functional", "gradients", "margins", "reference", "sampling", "sharding", "subcenters"],
)
def test_public_paths_hold_nothing_of_their_own(name):
    assert layers.reexports_only(layers.ROOT / layers.PACKAGE / f"{name}.py")


# ---- that faults would be found ----


def package(root, **files):
    for name, text in files.items():
        path = root / "unicom_ext" / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return layers.python_faults(layers.python_arrows(root))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from unicom_ext.train.a import b", "runs up"),
        ("import unicom_ext.train.a", "runs up"),
        ("def f():\n    from unicom_ext.train import a", "runs up"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import unicom_ext.train.a",
         "runs up"),
        ("from ..train import a", "runs up"),
        ("from unicom_ext.data import x", "runs up"),
        ("from unicom_ext import margins", "public paths"),
        ("import unicom_ext", "public paths"),
        ("from unicom_ext import _engine", "only ops/library.py"),
        ("from unicom_ext._C import x", "only ops/library.py"),
        ("from unicom_ext.loss import b", "a circle"),
    ],
)  # fmt: skip
def test_an_import_that_runs_up_is_found(tmp_path, text, words):
    files = {
        "__init__": "",
        "margins": "from unicom_ext.loss.b import x",
        "train__in__a": "from unicom_ext.loss import b",
        "data__in__x": "",
        "utils__in__c": "",
        "loss__in__b": "import re\nfrom unicom_ext.utils import c\nfrom unicom_ext.loss import a",
    }
    assert package(tmp_path, **files, loss__in__a="from unicom_ext.utils.c import d") == []
    assert any(words in fault for fault in package(tmp_path, loss__in__a=text))


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("core/a.h", '#include "../cpu/host/b.h"', "may include core"),
        ("cpu/kernels/a.h", '#include "../host/b.h"', "may include cpu/kernels, core"),
        ("cpu/host/a.h", "#include <torch/types.h>", "torch is for bind/"),
        ("cpu/host/a.h", '#include "b.h"', "a circle"),
        ("cpu/host/a.h", '#include "c.h"', "is not there"),
        ("cuda/kernels/a.h", "__device__ int f();", "must end in .cuh"),
        ("cuda/host/a.cpp", '#include "../kernels/d.cuh"', "a device-only header"),
        ("bind/ops/a.h", '#include "../../cpu/host/b.h"', "may include bind/ops, core"),
        ("other/a.h", "", "in no layer"),
    ],
)
def test_an_include_that_runs_up_is_found(tmp_path, path, text, words):
    files = {
        "cpu/host/a.h": "",
        "cpu/host/b.h": '#include <cstdint>\n#include "a.h"\n#include "../../core/c.h"',
        "core/c.h": "",
        "cuda/kernels/d.cuh": "__device__ int f();",
    }

    def faults(files):
        for name, content in files.items():
            (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "csrc" / name).write_text(content)
        return layers.engine_faults(layers.engine_arrows(tmp_path), tmp_path)

    assert faults(files) == []
    assert any(words in fault for fault in faults({path: text}))
