"""What commands share: hints for the user, and how the process waits and ends."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit status of a program that SIGINT ended


def program() -> str:
    """How the user can call this again; the command need not be on the path."""
    return "unicom-ext" if shutil.which("unicom-ext") else f"{sys.executable} -m unicom_ext.cli"


def broken(error: Exception) -> str:
    return f"unicom_ext does not load: {error}\n`unicom-ext doctor` says how to mend it"


def ways_on(resume: bool) -> str:
    return ("" if resume else "--resume goes on, ") + "--overwrite begins anew"


@contextmanager
def loading() -> Iterator[None]:
    """For the block in which a command that computes imports torch and what comes with it.

    Of the million objects that are made then, the collector finds none to free, during the import,
    later and when the process ends: left out, a command takes 0.4 s less.
    """
    spin_briefly()
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def spin_briefly() -> None:
    """Let waiting threads sleep sooner than OpenMP's default; must precede the import of torch.

    Threads that spin hold up the ones they wait for as soon as other programs want the same cores.
    On two cores with two busy neighbours training ran at 150 to 650 images/s by default and at 1060
    so; on idle cores at 3000 and 2700.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"
