"""Where a benchmark runs: how time and memory are read there."""

from __future__ import annotations

import gc
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


class Cpu:
    """The host; memory is measured in fresh processes, see measure.py."""

    device = torch.device("cpu")

    def time(self, *calls: Call) -> tuple[float, ...]:
        """Seconds of each of the calls, which run one after another."""
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return tuple(b - a for a, b in itertools.pairwise(marks))


class Cuda:
    """A GPU, read by events and by the caching allocator.

    cuda: torch.cuda, or what stands in for it in tests.
    """

    gemm_size, copy_bytes = 8192, 1 << 30  # of the ceilings

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self.cuda, self.device = cuda, torch.device(device)

    def time(self, *calls: Call) -> tuple[float, ...]:
        """Seconds of each of the calls, which run one after another.

        They run once before, uncounted: while the device is busy with that, the host gets ahead of
        it, as in training. Where the host is slower than the device, its time is what is measured.
        """
        for call in calls:
            call()
        marks = [self.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        self.cuda.synchronize()
        return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))

    def peak_bytes(self, *calls: Call) -> list[int]:
        """Most bytes allocated up to the end of each call, beyond those allocated before."""
        self.cuda.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        peaks = []
        for call in calls:
            call()
            self.cuda.synchronize()
            peaks.append(self.cuda.max_memory_allocated() - before)
        return peaks

    def free_bytes(self) -> int:
        """What can still be allocated."""
        free, _total = self.cuda.mem_get_info()
        return free + self.cuda.memory_reserved() - self.cuda.memory_allocated()

    def release(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        self.cuda.empty_cache()

    def describe(self) -> dict[str, object]:
        properties = self.cuda.get_device_properties(0)
        driver, tool = "unknown", shutil.which("nvidia-smi")
        if tool:
            query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
            done = subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True)
            driver = done.stdout.decode().strip()
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "driver, clocks, power": driver,
            "cuda": torch.version.cuda,
        }

    def ceilings(self, rounds: int = 7) -> dict[str, Any]:
        """Measured rates that no kernel can be expected to exceed: products in flop/s, by type of
        their operands, and copies in bytes/s (read and written). With every raw time."""
        rates: dict[str, Any] = {"seconds": {}}
        n = self.gemm_size
        for name, dtype in (
            ("fp16", torch.float16),
            ("bf16", torch.bfloat16),
            ("fp32", torch.float32),
        ):
            # Power, and with it the clock, depends on the values: random ones, as unit rows are.
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty(n, n, dtype=dtype, device=self.device)
            seconds = [self.time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))[0]
                       for _ in range(rounds)]  # fmt: skip
            rates["seconds"][name] = seconds
            rates[name] = 2 * n**3 / sorted(seconds)[rounds // 2]
        source = torch.zeros(self.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = [self.time(lambda: target.copy_(source))[0] for _ in range(rounds)]
        rates["seconds"]["copy"] = seconds
        rates["copy"] = 2 * self.copy_bytes / sorted(seconds)[rounds // 2]
        return rates


CPU = Cpu()
