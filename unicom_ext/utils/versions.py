"""The version of this package, and what else a result depends on."""

from __future__ import annotations

VERSION = "0.2.0"


def versions() -> dict[str, str]:
    """For the files that a run leaves behind."""
    # Here, because whoever imports the package reads its own version alone.
    import platform
    from importlib import metadata

    import torch

    return {
        "python": platform.python_version(),
        "unicom_ext": VERSION,
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
    }


def cpu_model() -> str:
    """As its maker calls it, where Linux says so."""
    import platform

    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
