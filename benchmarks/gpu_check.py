"""Build, test, time and sanitize the CUDA backend on this machine's GPU: ``make gpu-check``.

    python benchmarks/gpu_check.py --output "$OUT"
    python benchmarks/gpu_check.py --from racecheck --minutes 4 --output "$OUT"

Needs torch with CUDA, nvcc, cmake, ninja and pytest, and no network. The most telling
stages come first. One that fails does not stop the others, and a run that is cut, by its time, by a
signal or by the end of the machine, leaves what it knew: all that a stage says and measures is
written at once to a folder of this run in build/gpu-check, and packed into OUTPUT within seconds.
Without a GPU the emulation stands in for it: a dry run of the same stages, whose results mean
nothing. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS, PACKAGE = ROOT / "tests", ROOT / "unicom_ext"
GPU = torch.cuda.is_available()
RESULTS = ROOT / "build" / "gpu-check" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
BUILT = ROOT / "build" / "gpu-check-built.json"  # what the binaries were built from
MINUTES = 8.0
# A line for each test: what failed is known before the end.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-vv")
TESTS_OF_THE_GPU = "tests/cuda/test_cuda.py"
TESTS_OF_NEAREST = "tests/cuda/test_cuda_nearest.py"
TESTS_OF_RANKS = "tests/cuda/test_cuda_ranks.py"
STAND_IN = "tests/cuda/test_cuda_benchmarks.py"  # of benchmarks
MARK = "gpu" if GPU else "emulated"
HOPPER = "small_sizes and (fp16 or bf16)"  # the smallest tests of its own kernels
GENERAL = {"UNICOM_CUDA_HOPPER": "0"}  # the kernels of all GPUs
PROFILED = "sum_exp|probabilities|product|unpack_prototypes"  # kernels, at d' = 512


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """name: for --only and --from. seconds: the most it may take, all of its commands together.
    then: called once it has passed; says what is wrong all the same. otherwise: environment of the
    stages that follow, where it fails: without what it has tried."""

    name: str
    seconds: float
    commands: tuple[Command, ...]
    then: Callable[[], str | None] = lambda: None
    otherwise: dict[str, str] = field(default_factory=dict)


# ---- what there is to do


def build() -> Stage:
    environment = {}
    if GPU:  # for the device at hand and no other
        major, minor = torch.cuda.get_device_capability()
        # Hopper's own instructions have a name of their own.
        environment["CUDAARCHS"] = f"{major}{minor}{'a' if major == 9 else ''}-real"
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    return Stage("build", 100, (Command(command, environment),), note_what_was_built)


def stages() -> list[Stage]:
    """Every stage after the build: those of the first eight minutes, then those of another four
    (`--from racecheck`)."""
    parallel = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    return [
        stage("doctor", 20, sys.executable, "-m", "unicom_ext.cli", "doctor"),
        # A kernel that hangs, or a fault, must not take all other stages with it.
        Stage(
            "hopper",
            25,
            (Command((*PYTEST, TESTS_OF_THE_GPU, "-k", HOPPER, "--maxfail=4")),),
            otherwise=GENERAL,
        ),
        stage("small", 60, *PYTEST, TESTS_OF_THE_GPU, "--maxfail=8"),
        steps("first", 90),
        general(35),
        stage("loss", 75, *PYTEST, *parallel, "-m", MARK, *usable_tests()),
        stage("nearest", 30, *PYTEST, *parallel, "-m", MARK, TESTS_OF_NEAREST),
        # The caching allocator hides most accesses beyond the end of an array.
        sanitizer("memcheck", 45, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        # ---- the second call
        sanitizer("racecheck", 45),
        sanitizer("initcheck", 30, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        sanitizer("synccheck", 20),
        stage("ranks", 45, *PYTEST, *parallel, TESTS_OF_RANKS),
        steps("peers", 60),
        profile(),
        Stage("chunks", 50, tuple(map(chunk, (32, 64, 128, 256)))),
        steps("rest", 60),
        clustering(),
    ]


def stage(name: str, seconds: float, *words: str, **environment: str) -> Stage:
    return Stage(name, seconds, (Command(words, environment),))


@functools.cache
def usable_tests() -> list[str]:
    """Test files that can be imported here, but for those that are a stage of their own; what the
    others lack is said."""
    local = {path.stem for folder in (TESTS, ROOT / "benchmarks") for path in folder.rglob("*.py")}
    local |= {path.name for path in TESTS.iterdir() if path.is_dir()} | {"tests"}
    usable = []
    for path in sorted(TESTS.rglob("test_*.py")):
        modules = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
        name = str(path.relative_to(ROOT))
        missing = sorted(m for m in modules - local if importlib.util.find_spec(m) is None)
        if missing:
            print(f"left out: {name}, which needs {', '.join(missing)}", flush=True)
        elif name not in (TESTS_OF_THE_GPU, TESTS_OF_NEAREST, TESTS_OF_RANKS):
            usable.append(name)
    return usable


def steps(plan: str, seconds: float) -> Stage:
    """Some shapes of the head, each written when it is done; without a GPU its tests."""
    if not GPU:
        return stage(plan, seconds, *PYTEST, STAND_IN, "-k", "not nearest")
    return stage(plan, seconds, *head_step(plan, RESULTS, seconds))


def general(seconds: float) -> Stage:
    """The first two shapes by the kernels of all GPUs: what Hopper's own are worth."""
    if not GPU:
        return Stage("general", seconds, (emulated_chunk(GENERAL),))
    words = head_step("chunk", RESULTS / "general", seconds)
    return Stage("general", seconds, (Command(words, GENERAL),))


def head_step(plan: str, output: Path, seconds: float) -> tuple[str, ...]:
    script = str(ROOT / "benchmarks" / "head_step.py")
    minutes = ("--minutes", f"{(seconds - 20) / 60:.2f}")  # no further shape is begun then
    return (sys.executable, script, "--device", "cuda", "--plan", plan, *minutes,
            "--output", str(output))  # fmt: skip


def chunk(mib: int) -> Command:
    """The classes that backward takes at a time: read once by a process."""
    environment = {"UNICOM_CUDA_CHUNK_MIB": str(mib)}
    if not GPU:
        return emulated_chunk(environment)
    return Command(head_step("chunk", RESULTS / f"chunk-{mib}", 40), environment)


def emulated_chunk(environment: dict[str, str]) -> Command:
    return Command((*PYTEST, "tests/cuda/test_cuda_backend.py", "-k", "overflow"), environment)


def sanitizer(tool: str, seconds: float, environment: dict[str, str] | None = None) -> Stage:
    check: tuple[str, ...] = ()
    if GPU:  # kernels of others are theirs to check
        check = ("compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=unicom",
                 "--error-exitcode", "9")  # fmt: skip
    small = (*PYTEST, TESTS_OF_THE_GPU, "-k", "small_sizes or row_optimizers or in_backward")
    return Stage(tool, seconds, (Command((*check, *small), environment or {}),))


def profile() -> Stage:
    """Counters of the kernels that take the time, at B = 8192, |S| = 100k, d' = 512."""
    if not GPU:
        return stage("profile", 40, *PYTEST, STAND_IN, "-k", "profiled")
    counters = ("ncu", "--clock-control", "none", "--set", "detailed", "--page", "details",
                "--kernel-name", f"regex:{PROFILED}", "--launch-count", "5",
                "--export", str(RESULTS / "step.ncu-rep"))  # fmt: skip
    return stage("profile", 40, *counters, sys.executable, str(ROOT / "benchmarks/cuda_step.py"))


def clustering() -> Stage:
    if not GPU:
        return stage("clustering", 30, *PYTEST, STAND_IN, "-k", "nearest")
    output = ("--output", str(RESULTS / "cuda-nearest.json"))
    script = str(ROOT / "benchmarks" / "cuda_nearest.py")
    return stage("clustering", 30, sys.executable, script, "--quick", *output)


# ---- binaries and their sources


def sources() -> str:
    """A hash of all that the binaries are built from."""
    whole = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    for path in sorted(files):
        whole.update(f"{path.relative_to(ROOT)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def binaries() -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(PACKAGE.glob("*.so"))
    }


def note_what_was_built() -> str | None:
    BUILT.parent.mkdir(exist_ok=True)
    record = {"sources": sources(), "binaries": binaries(), "torch": torch.__version__}
    replace(BUILT, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    return why_not_these_binaries()


def why_not_these_binaries() -> str | None:
    """What speaks against using what was built before, or carried here; None: nothing."""
    if not BUILT.exists():
        return f"there is no {BUILT.relative_to(ROOT)}, which says what they were built from"
    built = json.loads(BUILT.read_text())
    if built["sources"] != sources():
        return "they were built from other sources than csrc and CMakeLists.txt are now"
    found = binaries()
    for name, digest in built["binaries"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not the one that was built from these sources"
    if GPU and "_C_cuda.so" not in built["binaries"]:
        return "they were built without CUDA"
    return None


# ---- one run


class Stopped(Exception):
    """A signal to end came."""


class Run:
    """Stages one after another, and what is kept of them."""

    every = 5.0  # seconds between looks at what the running stage has written

    def __init__(self, results: Path, output: Path | None, minutes: float) -> None:
        self.results, self.output = results, output
        self.end = time.monotonic() + 60 * minutes
        self.record: dict[str, Any] = {"machine": describe(), "stages": []}
        self.packed: object = None
        self.environment: dict[str, str] = {}  # of all that follows
        results.mkdir(parents=True, exist_ok=True)

    def do(self, stage: Stage) -> bool:
        """Whether it passed; what it says is shown, and kept in NAME.log."""
        start = time.monotonic()
        seconds = min(stage.seconds, self.end - start)
        entry: dict[str, Any] = {"name": stage.name, "status": "left out: no time is left"}
        self.record["stages"].append(entry)
        if seconds >= 1:
            entry["status"] = "running"
            self.write()
            log = self.results / f"{stage.name}.log"
            try:
                with log.open("wb") as out:
                    for command in stage.commands:
                        status = self._command(command, start + seconds, out)
                        if entry["status"] == "running" and status != 0:
                            entry["status"] = status
                if entry["status"] == "running":
                    entry["status"] = 0
            except BaseException as error:
                entry["status"] = f"cut: {error or type(error).__name__}"
                raise
            finally:
                text = log.read_text(errors="replace").strip()
                entry["seconds"] = round(time.monotonic() - start, 1)
                entry["last_line"] = (text.splitlines() or ["no output"])[-1][:300]
                self.write()
            if entry["status"] != 0:
                print(text[-6000:])
        if entry["status"] == 0 and (problem := stage.then()) is not None:
            entry["status"] = problem
        passed = entry["status"] == 0
        if not passed and stage.otherwise:
            self.environment.update(stage.otherwise)
            entry["then"] = stage.otherwise
        took = f" in {entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"{'ok' if passed else 'FAILED'}  {stage.name}{took}: "
              f"{entry['last_line'] if passed else entry['status']}", flush=True)  # fmt: skip
        self.write()
        return passed

    def _command(self, command: Command, end: float, out: Any) -> int | str:
        """Its exit status, or why it has none."""
        out.write(f"$ {' '.join(command.words)}\n".encode())
        out.flush()
        if time.monotonic() >= end:
            return "stopped: its time was over"
        try:
            process = subprocess.Popen(
                command.words,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    **self.environment,
                    **command.environment,
                },
                process_group=0,
            )
        except FileNotFoundError:
            return f"{command.words[0]} was not found"
        try:
            while (left := end - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, self.every))
                self.pack()
            return "stopped: its time was over"
        finally:  # also where a signal ends this
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(3)
                except subprocess.TimeoutExpired:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def write(self) -> None:
        replace(self.results / "gpu-check.json",
                lambda path: path.write_text(json.dumps(self.record, indent=1) + "\n"))  # fmt: skip
        self.pack()

    def pack(self) -> None:
        """All results into one file of the output folder, if something is new."""
        if self.output is None:
            return
        files = sorted(p for p in self.results.rglob("*") if p.is_file() and p.suffix != ".part")
        state = [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files]
        if state == self.packed:
            return
        self.output.mkdir(parents=True, exist_ok=True)

        def fill(path: Path) -> None:
            with tarfile.open(path, "w:gz") as archive:
                for file in files:
                    archive.add(file, f"gpu/{file.relative_to(self.results)}")

        replace(self.output / "gpu-check.tar.gz", fill)
        self.packed = state


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """At any time there is the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def describe() -> dict[str, object]:
    def say(*command: str) -> str:
        tool = shutil.which(command[0])
        return subprocess.run([tool, *command[1:]], capture_output=True, text=True,
                              cwd=ROOT).stdout.strip() if tool else "not found"  # fmt: skip

    query = "--query-gpu=name,driver_version,clocks.max.sm,memory.total"
    return {
        "gpu": say("nvidia-smi", query, "--format=csv,noheader") if GPU else "none: a dry run",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": say("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        "commit": say("git", "rev-parse", "HEAD") + "+changes" * bool(say("git", "diff", "--stat")),
        "sources": sources(),
    }


def run(first: Stage | None, planned: list[Stage], results: Path, output: Path | None,
        minutes: float) -> int:  # fmt: skip
    """The exit status: 0 where everything passed. first: without it nothing else makes sense."""
    whole = Run(results, output, minutes)
    print(json.dumps(whole.record["machine"], indent=1), flush=True)

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    failed = []
    try:
        for stage in ([first] if first else []) + planned:
            if not whole.do(stage):
                failed.append(stage.name)
                if stage is first:
                    whole.record["ended"] = f"{stage.name} failed"
                    break
        else:
            whole.record["ended"] = "all stages"
    except Stopped as signal_name:
        whole.record["ended"] = f"by {signal_name}"
        print(f"ended by {signal_name}", flush=True)
        return 143
    finally:
        whole.write()
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"failed: {', '.join(failed)}" if failed else "all stages passed", flush=True)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    planned = stages()
    names = [stage.name for stage in planned]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"Stages, in their order: {', '.join(names)}."
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--only", nargs="+", metavar="STAGE", choices=["build", *names],
        help="these, and the build, which always comes first",
    )  # fmt: skip
    some.add_argument(
        "--from", dest="first", metavar="STAGE", choices=names,
        help="this one and those after it, and the build",
    )  # fmt: skip
    parser.add_argument(
        "--skip-build", action="store_true",
        help="use the binaries that are there, if they are of these sources",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=MINUTES,
        help="the most for everything together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT"), metavar="DIR",
        help="pack results into DIR/gpu-check.tar.gz (default: $OUT, if it is set)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.only:
        planned = [stage for stage in planned if stage.name in options.only]
    elif options.first:
        planned = planned[names.index(options.first) :]
    first = None if options.skip_build else build()
    if options.skip_build and (reason := why_not_these_binaries()) is not None:
        parser.error(f"--skip-build: the binaries in unicom_ext cannot be used: {reason}")
    if not GPU:
        print("There is no GPU: a dry run, whose results mean nothing.", flush=True)
    output = Path(options.output) if options.output else None
    return run(first, planned, RESULTS, output, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
