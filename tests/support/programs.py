"""Scripts that train, run as torchrun runs them, and what their losses and encoders did.

The processes of all runs are forked from one that has imported their trainer already.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from support.processes import CONTEXT, SECONDS, begin
from support.ranks import free_port


@dataclass
class Trained:
    """What one rank has seen.

    losses: what the calls of the loss returned.  features: the dimensions that they drew.  updates:
    steps of the optimizer.  before, after: this rank's part of what it updates.  statistics: of its
    batch normalisation, at the end.  step: the loss's own count of its draws, at the end.
    """

    losses: list[float] = field(default_factory=list)
    features: list[list[int]] = field(default_factory=list)
    updates: int = 0
    before: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)
    statistics: list[np.ndarray] = field(default_factory=list)
    step: int = -1


class Programs:
    """`run` runs a script; `close` ends the process that the others are forked from."""

    def __init__(self) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._server = CONTEXT.Process(target=_serve, args=(theirs,))
        self._server.start()
        theirs.close()

    def run(
        self, script: Path, *arguments: Any, ranks: int = 1, imports: tuple[str, ...] = ()
    ) -> list[Trained]:
        """Run it to its end on that many ranks; `imports` are made once for all scripts."""
        self._pipe.send((script, [str(a) for a in arguments], ranks, imports))
        results = self._pipe.recv()
        failures = [f"rank {i}: {r}" for i, r in enumerate(results) if isinstance(r, str)]
        assert not failures, f"{script.name}\n" + "\n".join(failures)
        return results

    def close(self) -> None:
        self._server.kill()
        self._server.join()
        self._pipe.close()


def _serve(pipe) -> None:
    from unicom_ext.data import glyphs

    for module in ("checkpoint", "encoders.small", "loss.sharded.step"):
        import_module(f"unicom_ext.{module}")
    glyphs.load = cache(glyphs.load)
    glyphs.load()  # for all of them, as it takes half a second
    begin()
    # Or libraries take the folder of tests of data sets for the package `datasets`.
    sys.path[:] = [folder for folder in sys.path if Path(folder) != Path(__file__).parents[1]]
    context = multiprocessing.get_context("fork")
    while True:
        try:
            script, arguments, ranks, imports = pipe.recv()
        except EOFError:  # the tests are over
            return
        for module in imports:
            import_module(module)
        gc.freeze()
        port, started = str(free_port()), []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": 0}
            torchrun |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            torchrun |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            given = (theirs, script, arguments, torchrun if ranks > 1 else {})
            process = context.Process(target=_run, args=given)
            process.start()
            theirs.close()
            started.append((process, ours))
        results = []
        for process, ours in started:
            try:
                results.append(ours.recv() if ours.poll(SECONDS) else "it hangs")
            except EOFError:
                results.append("it died")
            process.kill()
            process.join()
        pipe.send(results)


def _run(pipe, script: Path, arguments: list[str], environment: dict[str, Any]) -> None:
    """In a process of its own."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    trained = Trained()
    finish = _watch(trained)
    try:
        runpy.run_path(str(script), run_name="__main__")
        finish()
        pipe.send(trained)
    except BaseException:
        pipe.send(traceback.format_exc())


def _watch(trained: Trained) -> Callable[[], None]:
    """Take notes of calls and updates to come; what is returned takes those of the end."""
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from unicom_ext import PartialMarginSoftmax

    loss, updated, normalising = [], [], {}

    def call(module, _, output) -> None:
        if isinstance(module, PartialMarginSoftmax):
            loss[:] = [module]
            trained.losses.append(output.mean().item())
            trained.features.append(module.last_selection.feature_index.tolist())
        if getattr(module, "running_mean", None) is not None:
            normalising[id(module)] = module

    def update(optimizer, *_) -> None:
        updated[:] = [p for group in optimizer.param_groups for p in group["params"]]
        trained.before = trained.before or [_array(p) for p in updated]
        trained.updates += 1

    def finish() -> None:
        trained.after = [_array(p) for p in updated]
        statistics = [(m.running_mean, m.running_var) for m in normalising.values()]
        trained.statistics = [_array(value) for pair in statistics for value in pair]
        trained.step = int(loss[0].step)

    register_module_forward_hook(call)
    register_optimizer_step_pre_hook(update)
    return finish


def _array(parameter) -> np.ndarray:
    value = parameter.detach()
    value = value.to_local() if hasattr(value, "placements") else value
    return value.clone().numpy()  # NumPy pins memory that FSDP has to free
