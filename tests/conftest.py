from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

# Compiled graphs name operators by their schema: a cache of this checkout's own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "build" / "inductor")
)

import pytest
import torch

# Two test processes share two cores; tests that are about threads set their own number.
torch.set_num_threads(1)

# Files of tests lie in memory where there is room: a disk is slow to sync them.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

try:
    import hypothesis
except ImportError:  # `make gpu-check` does with what a GPU machine has
    pass
else:
    # The same examples everywhere: a red test is about the code, not about luck.
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
    hypothesis.settings.load_profile("tests")


def pytest_generate_tests(metafunc):
    """`capability` is each set of kernels that can run here: those of each instruction set of this
    CPU, those of the CUDA backend over its emulation and on a GPU. `any_backend` is the best of the
    CPU's and those of CUDA: for what does not depend on the instruction set."""
    for name in {"capability", "any_backend"} & set(metafunc.fixturenames):
        from support import backends

        names = backends.capabilities() if name == "capability" else [backends.BEST]
        if not getattr(metafunc.module, "CPU_ONLY", False):
            names = [*names, *backends.PARAMS]
        metafunc.parametrize(name, names, indirect=True)


@pytest.fixture
def capability(request, monkeypatch):
    """Name of the set of kernels that is in use for the length of the test."""
    from support import backends

    import unicom_ext

    if request.param in backends.BACKENDS:
        backends.use(monkeypatch, request.param)
        yield request.param
    else:
        with unicom_ext.cpu_capability(request.param):
            yield request.param


any_backend = capability


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA backend over its emulation, in use for the length of the test."""
    from support import backends

    backends.use(monkeypatch, "emulated_cuda")


def pytest_collection_modifyitems(items, config):
    """Leaves out what runs the same machine code again, thins products that are marked `pairs`, and
    begins with what is marked `first`."""
    from support import backends, pairs

    for item in items:
        if "emulated" in getattr(item, "fixturenames", ()):
            item.add_marker("emulated")
    left_out = {item for item in items if backends.runs_again(item)}
    products = {}
    for item in items:
        if item.get_closest_marker("pairs") and item not in left_out:
            products.setdefault(item.function, []).append(item)
    for product in products.values():
        params = [item.callspec.params for item in product]
        best = {i for i, p in enumerate(params)
                if backends.BEST in (p.get("capability"), p.get("any_backend"))}  # fmt: skip
        kept = pairs.covering(params, best)
        left_out |= {item for i, item in enumerate(product) if i not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_collection_finish():
    gc.freeze()  # what is imported is not looked through again and again for garbage


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
