from __future__ import annotations

import os
from pathlib import Path

# Compiled graphs name operators by their schema: a cache of this checkout's own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "build" / "inductor")
)

import pytest
import torch

# Two test processes share two cores; tests that are about threads set their own number.
torch.set_num_threads(1)

try:
    import hypothesis
except ImportError:  # `make gpu-check` does with what a GPU machine has
    pass
else:
    # The same examples everywhere: a red test is about the code, not about luck.
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU")
    config.addinivalue_line("markers", "emulated: runs on the CUDA backend over its emulation")


def pytest_generate_tests(metafunc):
    if "capability" in metafunc.fixturenames:
        from support import backends

        from unicom_ext import _core

        names = _core.cpu_capabilities()
        if "avx512" not in names:  # the same kernels in instructions that every CPU has
            names = [*names, "emulated_avx512"]
        if not getattr(metafunc.module, "CPU_ONLY", False):
            names = [*names, *backends.PARAMS]
        metafunc.parametrize("capability", names, indirect=True)


@pytest.fixture
def capability(request, monkeypatch):
    """Each set of kernels that can run here, in use for the length of the test: those of each
    instruction set of this CPU, those of the CUDA backend over its emulation and on a GPU."""
    from support import backends

    import unicom_ext

    if request.param in backends.BACKENDS:
        backends.use(monkeypatch, request.param)
        yield request.param
    else:
        with unicom_ext.cpu_capability(request.param):
            yield request.param


@pytest.fixture(scope="session")
def ranks():
    """Processes to run functions of tests on, together; see `ranks.Ranks`."""
    from support.ranks import Ranks

    group = Ranks()
    yield group
    group.close()


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """What tests recorded as "summary", such as the registers of kernels."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_sep("-", report.nodeid)
                terminalreporter.write_line(value)
