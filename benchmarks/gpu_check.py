"""Build, test, time and sanitize the CUDA backend on this machine's GPU: ``make gpu-check``.

Needs torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest, and no network. Each stage is
printed as it ends and written to results/gpu-check.json, the most telling ones first, so that a run
that is cut still tells what passed. What does not fit in ten minutes is left out. Test files whose
imports are missing here are named and left out too. Without a GPU the emulation stands in for it: a
dry run of the same stages, and no result is written.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
RESULT = ROOT / "benchmarks" / "results" / "gpu-check.json"
GPU = torch.cuda.is_available()
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
MOST_SECONDS = 590
SMALL = [*PYTEST, "tests/test_cuda.py", "-k", "small_sizes"]


def usable_tests() -> tuple[list[str], dict[str, list[str]]]:
    """Test files that can be imported here, and what the others lack."""
    usable, lacking = [], {}
    local = {path.stem for folder in (TESTS, ROOT / "benchmarks") for path in folder.glob("*.py")}
    for path in sorted(TESTS.glob("test_*.py")):
        modules = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
        missing = sorted(m for m in modules - local if importlib.util.find_spec(m) is None)
        if missing:
            lacking[path.name] = missing
        else:
            usable.append(str(path))
    return usable, lacking


def stages() -> list[tuple[str, int, list[str]]]:
    """(name, most seconds, command)"""
    usable, lacking = usable_tests()
    for name, missing in lacking.items():
        print(f"      left out: {name}, which needs {', '.join(missing)}")
    backend = "cuda and not emulated" if GPU else "emulated_cuda"
    # Those of every device; test_cuda*.py are of the emulation, or a stage of their own.
    shared = [path for path in usable if not Path(path).name.startswith("test_cuda")]
    planned = [
        ("build", 240, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]),
        ("operators", 60, [sys.executable, "-m", "unicom_ext.cli", "doctor"]),
        ("tests of the GPU", 120, [*PYTEST, "tests/test_cuda.py"]),
        ("tests of the clustering", 60, [*PYTEST, "tests/test_cuda_nearest.py", "-k", backend]),
        ("benchmark", 180, benchmark()),
        ("benchmark of the clustering", 60, clustering_benchmark()),
        ("tests of the loss", 240, [*PYTEST, *shared, "-k", backend]),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if GPU and sanitizer:
        for tool in ("memcheck", "racecheck", "initcheck"):
            kernels = ["--kernel-regex", "kns=unicom"]
            check = [sanitizer, "--tool", tool, *kernels, "--error-exitcode", "9", *SMALL]
            planned.append((f"compute-sanitizer {tool}", 150, check))
    elif GPU:
        print("      compute-sanitizer was not found: its stages are left out")
    return planned


def benchmark() -> list[str]:
    """Some shapes, each written when it is done; without a GPU the tests of the benchmark."""
    if not GPU:
        return [*PYTEST, "tests/test_cuda_benchmarks.py"]
    script = str(ROOT / "benchmarks" / "head_step.py")
    return [sys.executable, script, "--device", "cuda", "--quick", "--minutes", "2"]


def clustering_benchmark() -> list[str]:
    script = str(ROOT / "benchmarks" / "cuda_nearest.py")
    if GPU:
        return [sys.executable, script, "--quick"]
    return [*PYTEST, "tests/test_cuda_benchmarks.py", "-k", "nearest"]


def describe() -> dict[str, object]:
    def say(*command: str) -> str:
        tool = shutil.which(command[0])
        return subprocess.run([tool, *command[1:]], capture_output=True, text=True,
                              cwd=ROOT).stdout.strip() if tool else "not found"  # fmt: skip

    query = "--query-gpu=name,driver_version,clocks.max.sm,memory.total"
    return {
        "gpu": say("nvidia-smi", query, "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": say("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        "commit": say("git", "rev-parse", "HEAD") + "+changes" * bool(say("git", "diff", "--stat")),
    }


def main() -> int:
    record: dict[str, object] = {"machine": describe(), "stages": []}
    print(json.dumps(record["machine"], indent=2))
    if not GPU:
        print("There is no GPU: a dry run over the emulation, whose result is not written.")
    planned, failed, begin = stages(), 0, time.monotonic()
    for number, (name, limit, command) in enumerate(planned, 1):
        print(f"[{number}/{len(planned)}] {name} ...", flush=True)
        start = time.monotonic()
        limit = min(limit, int(MOST_SECONDS - (start - begin)))
        if limit < 10:
            failed += 1
            print("      left out: no time is left", flush=True)
            record["stages"].append({"name": name, "status": "left out"})
            continue
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False
            )
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, output = -1, f"{(error.stdout or b'').decode()}\nstopped after {limit} s"
        seconds = time.monotonic() - start
        last = (output.strip().splitlines() or ["no output"])[-1]
        print(f"      {'ok' if status == 0 else 'FAILED'} in {seconds:.0f} s: {last}", flush=True)
        if status != 0:
            failed += 1
            print(output[-6000:], flush=True)
        record["stages"].append(
            {"name": name, "status": status, "seconds": round(seconds, 1), "last_line": last}
        )
        if GPU:
            RESULT.write_text(json.dumps(record, indent=2) + "\n")
        if status != 0 and name in ("build", "operators"):
            break  # the rest would only repeat it
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
