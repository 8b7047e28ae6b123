"""Which CPU instructions the kernels use. Chosen at import; to be changed for tests and timing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unicom_ext.ops import library


def set_cpu_capability(name: str) -> None:
    """Use the kernels of instruction set `name` from now on, in the whole process.

    Args:
        name: ``"portable"``, ``"avx2"``, ``"avx512"``, ``"avx512_bf16"`` or ``"amx"``; those that
            this CPU can run are in ``unicom_ext._engine.cpu_capabilities()``.

    Raises:
        ValueError: this CPU cannot run it, or there is no such instruction set.
    """
    if not library.engine.set_cpu_capability(name):
        raise ValueError(f"name must be one of {library.engine.cpu_capabilities()}, got {name!r}")


@contextmanager
def cpu_capability(name: str) -> Iterator[None]:
    """`set_cpu_capability` for the length of a ``with`` block.

    Args:
        name: as there.

    Raises:
        ValueError: as there.
    """
    before = library.engine.cpu_capability()
    set_cpu_capability(name)
    try:
        yield
    finally:
        set_cpu_capability(before)
