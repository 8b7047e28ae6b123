"""A clustering from feature files to labels, resumable after each pass.

The output directory gets labels_XXXX.npy (int32 [rows], one per shard), centroids.npy (fp32 [k,
d]), clusters.json and pictures, and if wanted positives_XXXX.npy (int32 [rows, P]); `state/` in it
holds what is needed to go on.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unicom_ext.cluster import inputs, outputs, pictures, refine, results, seeds, state, two_level
from unicom_ext.cluster.config import ClusterConfig
from unicom_ext.cluster.engines import Engine, Nearest, device_of, engine_of
from unicom_ext.cluster.labels import LabelFiles
from unicom_ext.cluster.lloyd import (
    Totals,
    assign,
    converged,
    lloyd_pass,
    minibatch_pass,
    sampled,
)
from unicom_ext.cluster.positives import Several, write_positives
from unicom_ext.cluster.progress import PassProgress
from unicom_ext.cluster.pruning import LEAST_PRUNED, MOST_DIMENSIONS, PrunedSearch
from unicom_ext.cluster.sums import UnitSums
from unicom_ext.data.labels import check_same_images
from unicom_ext.data.source import Block
from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks, default_group
from unicom_ext.utils.files import CheckpointError, only_writer

# What a random number is for; keeps the streams of one seed apart.
INIT, MEASURE = range(2)


def cluster(
    config: ClusterConfig,
    input: str | Path,
    output: str | Path,
    *,
    true_labels: str | Path | None = None,
    images: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Cluster the rows of feature files.

    Rows that are zero or not finite are counted and get label -1.

    Where torch.distributed is initialised every process calls this with the same arguments, on a
    file system they share; each reads its part of the rows. Labels and centroids are those of one
    process bit for bit, but with method minibatch, whose batches are others. An error on one
    process is raised on all.

    Args:
        config: what to do.
        input: feature files, see `unicom_ext.data.formats`.
        output: directory for the results, made if need be.
        true_labels: .npy file of integers [rows], -1 for unknown; NMI, purity and conflict are then
            reported.
        images: .npy file uint8 [rows, h, w] or [rows, h, w, 3]; members of some clusters are then
            shown.
        resume: go on after the last pass that was finished there.
        overwrite: begin anew although there is something.
        console: where progress is shown; default standard output.

    Returns:
        What clusters.json holds.

    Raises:
        SourceError: of input files.
        ConfigError: of settings.
        CheckpointError: of what is in `output`.
        OSError: of writing, also where another process writes there; of these it alone may come
            after something has changed.
    """
    run = _Run(config, Path(input), Path(output), console or Console())
    settings = {k: v for k, v in config.to_dict().items() if k not in ("device", "threads")}
    arguments = {"input": input, "output": output, "resume": resume, "overwrite": overwrite}
    agree(settings | arguments, None, run.ranks.group)
    with ExitStack() as held:
        with run.ranks.together():
            run.prepare(true_labels, images, resume, overwrite, held)
        run.train()
        return run.finish()


class _Run:
    def __init__(self, config: ClusterConfig, input: Path, output: Path, console: Console) -> None:
        self.config, self.input, self.output = config, input, output
        self.ranks = Ranks(default_group())
        self.console = console if self.ranks.is_first else Console(quiet=True)
        self.state_dir = output / outputs.STATE
        self.sums: UnitSums | None = None  # of this process's rows at the labels of the last pass
        self.pruned: PrunedSearch | None = None  # likewise
        self.told_failure = False

    def prepare(
        self,
        true_labels: str | Path | None,
        images: str | Path | None,
        resume: bool,
        overwrite: bool,
        held: ExitStack,
    ) -> None:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = device_of(config)
        self.engine = engine_of(config, self.device)
        self.source = inputs.open_source(self.input, config)
        if true_labels is not None:
            check_same_images(
                "true_labels", true_labels, self.source.images, "those of the features"
            )
        self.true_labels = inputs.open_true_labels(true_labels, self.source.rows)
        self.images = inputs.open_images(images, self.source.rows)
        init = Path(config.init) if config.init.lower().endswith(".npy") else None
        read = [Path(path) for path in (true_labels, images) if path is not None]
        outputs.check_apart(self.output, self.source, read)
        self.state = self._load_state(resume, overwrite)
        self.begins = not resume
        if self.begins and init is not None:
            first = config.num_coarse if config.method == "two-level" else config.clusters
            self.state["centroids"] = inputs.read_centroids(init, first, self.source.dim)
        if self.ranks.is_first:
            held.enter_context(only_writer(self.output))
            self.state_dir.mkdir(exist_ok=True)
        self.console.print(
            f"{self.source.rows:,} rows of {self.source.dim} dimensions in "
            f"{len(self.source.shards):,} shards, {config.clusters:,} clusters"
            + (f", {self.ranks.world_size} processes" if self.ranks.world_size > 1 else "")
            + (f", on {self.device}" if self.device.type != "cpu" else ""),
            highlight=False,
        )
        if self.state["passes"]:
            self.console.print(f"Resuming after pass {len(self.state['passes'])}.")

    # ---- training --------------------------------------------------------------------------------

    def train(self) -> None:
        config = self.config
        if self.begins:
            if config.method == "two-level":
                self._begin_two_level()
            elif "centroids" not in self.state:
                self.state["centroids"] = self._draw()
            with self.ranks.together():
                if self.ranks.is_first:
                    # Results stay until there are new ones.
                    self.state["earlier"] = outputs.remove_state(self.output)
            self._save()
        if self.ranks.is_first:
            Thread(target=pictures.load).start()
        if config.method == "two-level":
            if not self._refined:
                self._passes("fine", config.passes)
            self._passes("lloyd", config.refine_passes)
        else:
            self._passes(config.method, config.passes)
        self.sums = None

    def _passes(self, kind: str, most: int) -> None:
        """Passes until convergence or the last one; the state is saved after each."""
        passes = self.state["passes"]
        done = sum(p["kind"] in (kind, "sampled") for p in passes)
        while done < most and not self._converged(kind):
            number, done = len(passes) + 1, done + 1
            early = number <= self.config.early_passes
            name = "sampled" if early else kind
            with self._progress(f"{name} pass {done}/{most}", most - done) as progress:
                if kind == "minibatch":
                    centroids, empty, totals = self._minibatch(number, progress)
                else:
                    centroids, empty, totals = self._lloyd(kind, number, early, progress)
            self.state["centroids"] = centroids
            products = self._products() if name == "lloyd" else None
            passes.append(_facts(number, name, totals, empty, progress.seconds, products))
            split = f"{empty} empty cluster{'s' if empty > 1 else ''} split" if empty else ""
            progress.report(totals, split)
            self._save()

    def _lloyd(
        self, kind: str, number: int, early: bool, progress: PassProgress
    ) -> tuple[Tensor, int, Totals]:
        config, how = self.config, dict[str, Any]()
        fraction = config.rows_per_cluster * config.clusters / self.source.rows
        if early:
            how["part"] = sampled(config.early_fraction, config.seed + number)
        elif 0 < fraction < 1:
            how["part"] = sampled(fraction, config.seed)
        else:
            # Labels of this pass and the last: a pass that is cut short spoils nothing.
            labels = LabelFiles(self.state_dir / outputs.PASSES[number % 2])
            with self.ranks.together():
                if self.ranks.is_first:
                    labels.create(self.source.shards)
            before = self._last_labels()
            how = {"labels": labels, "before": before, "sums": self.sums if before else None}
        engine = self._in_cells if kind == "fine" else self._engine_after(how.get("before"))
        if kind == "fine":
            how["first"] = self.state["first"][:-1].tolist()
            how["block_rows"] = self._block_rows
        centroids, empty, totals, sums = lloyd_pass(
            self.source,
            self.state["centroids"],
            engine,
            self.ranks,
            progress.watch,
            config.seed + number,
            **how,
        )
        self.sums = None if "part" in how else sums
        return centroids, empty, totals

    def _engine_after(self, before: LabelFiles | None) -> Engine:
        """What compares all rows with all centroids. Where there are labels of the last pass, most
        products can be left out."""
        config = self.config
        if before is None:
            self.pruned = None
        elif self.pruned is None and self._can_prune:
            directory = self.state_dir / outputs.PRUNING / str(self.ranks.rank)
            self.pruned = PrunedSearch(directory, self.source, self.ranks, self.engine, config.seed)
        return self.engine if self.pruned is None else self.pruned.begin

    def _products(self) -> float | None:
        """Those of the last pass, as a share of all; says once where pruning had to end."""
        if self.pruned is None:
            return 1.0
        failures = self.pruned.failures()
        if failures and not self.told_failure:
            self.told_failure = True
            self.console.print(
                f"No room to remember what passes have found ({failures[0]}): those that follow "
                "compute all products."
            )
        return self.pruned.products()

    @property
    def _can_prune(self) -> bool:
        config = self.config
        return (
            config.prune
            and config.clusters >= LEAST_PRUNED
            and self.source.dim <= MOST_DIMENSIONS
            and config.engine == "unicom"
            and self.device.type == "cpu"
        )

    def _last_labels(self) -> LabelFiles | None:
        """Of the last pass, if it was a whole one."""
        passes = self.state["passes"]
        if not passes or passes[-1]["kind"] not in ("lloyd", "fine"):
            return None
        labels = LabelFiles(self.state_dir / outputs.PASSES[len(passes) % 2])
        return labels if labels.exist(self.source.shards) else None

    def _minibatch(self, number: int, progress: PassProgress) -> tuple[Tensor, int, Totals]:
        now, centroids, rows = self.state, self.state["centroids"], self.source.rows
        sums = UnitSums(*centroids.shape, rows=max(1, number - 1) * rows)
        if "sums" in now:
            sums.values, sums.counts = now["sums"], now["counts"]
        sums.make_room(number * rows)
        now["sums"], now["counts"] = sums.values, sums.counts
        return minibatch_pass(
            self.source,
            centroids,
            sums,
            self.engine,
            self.ranks,
            progress.watch,
            self.config.seed + number,
            self.config.batch_rows,
        )

    def _draw(self) -> Tensor:
        k = self.config.clusters
        centroids = torch.empty(k, self.source.dim)
        with self.ranks.together():
            if self.ranks.is_first:
                began = time.perf_counter()
                rng = np.random.default_rng([self.config.seed, INIT])
                kind = self.config.drawn_init
                centroids = seeds.draw(kind, self.source, k, rng, self.engine)
                self.state["init_seconds"] = time.perf_counter() - began
        return self.ranks.broadcast(centroids)

    def _converged(self, kind: str) -> bool:
        objectives = [p["objective"] for p in self.state["passes"] if p["kind"] == kind]
        return converged(objectives, self.config.tolerance)

    # ---- two levels ------------------------------------------------------------------------------

    def _begin_two_level(self) -> None:
        """Coarse centroids and the first fine ones."""
        config, now, dim = self.config, self.state, self.source.dim
        given = now.pop("centroids", None)
        coarse = torch.empty(config.num_coarse, dim)
        counts = torch.empty(config.num_coarse, dtype=torch.int64)
        fine = torch.empty(config.clusters, dim)
        with self.ranks.together():
            if self.ranks.is_first:
                began = time.perf_counter()
                rng = np.random.default_rng([config.seed, INIT])
                coarse, counts, fine, totals = two_level.start(
                    self.source, config, given, rng, self.engine
                )
                seconds = now["init_seconds"] = time.perf_counter() - began
                self.console.print(
                    f"{config.num_coarse} coarse clusters of {totals.rows:,} sampled rows: "
                    f"objective {totals.objective:.6f}  {seconds:.1f} s",
                    highlight=False,
                )
        coarse, counts, fine = map(self.ranks.broadcast, (coarse, counts, fine))
        kept = counts > 0  # a cell without fine centroids must not be chosen
        now["coarse"], now["centroids"] = coarse[kept], fine
        now["first"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts[kept].cumsum(0)])

    @property
    def _refined(self) -> bool:
        """Rows are compared with all centroids, and no more with those of their cell."""
        return any(p["kind"] == "lloyd" for p in self.state["passes"])

    def _in_cells(self, fine: Tensor) -> two_level.TwoLevel:
        return two_level.TwoLevel(self.state["coarse"], fine, self.state["first"], self.engine)

    @property
    def _block_rows(self) -> int:
        return two_level.block_rows(len(self.state["coarse"]), self.source.dim)

    # ---- results ---------------------------------------------------------------------------------

    def _label(
        self, centroids: Tensor, labels: LabelFiles, before: LabelFiles | None = None
    ) -> tuple[Totals, Tensor, Tensor]:
        """Label every row; returns totals, and each cluster's size and sum of cosines."""
        with self.ranks.together():
            if self.ranks.is_first:
                labels.create(self.source.shards)
        found = self._engine_of(centroids, before)
        sizes = torch.zeros(len(centroids), dtype=torch.float64)
        scores = torch.zeros(len(centroids), dtype=torch.float64)

        def visit(block: Block, index: Tensor, score: Tensor, before: Tensor | None) -> None:
            index, score = index.cpu(), score.cpu()  # where sums have an order
            good = index >= 0
            sizes.add_(index[good].bincount(minlength=len(sizes)))
            scores.index_add_(0, index[good], score[good].double())

        block_rows = self._block_rows if isinstance(found, two_level.TwoLevel) else 0
        with self._progress("labels", 0) as progress:
            totals = assign(
                self.source,
                found,
                self.ranks,
                progress.watch,
                labels=labels,
                before=before,
                visit=visit,
                block_rows=block_rows,
            )
        progress.report(totals)
        self._label_seconds = progress.seconds
        return totals, self.ranks.sum(sizes), self.ranks.sum(scores)

    def _engine_of(self, centroids: Tensor, before: LabelFiles | None = None) -> Nearest:
        own = centroids is self.state["centroids"]
        in_cells = own and "coarse" in self.state and not self._refined
        return self._in_cells(centroids) if in_cells else self._engine_after(before)(centroids)

    def finish(self) -> dict[str, Any]:
        config = self.config
        centroids = self.state["centroids"]
        labels = LabelFiles(self.state_dir / outputs.FINAL)
        totals, sizes, scores = self._label(centroids, labels, self._last_labels())
        merged = 0
        if config.merge_above < 1:
            fewer = refine.merge(centroids, sizes, scores, config.merge_above)
            merged = len(centroids) - len(fewer)
            if merged:
                self.console.print(f"{merged} near-duplicate clusters merged.")
                centroids = fewer
                totals, sizes, scores = self._label(centroids, labels)
        numbers = refine.dissolve(sizes, scores, config.min_size, config.min_cosine)
        positives = self._find_positives(centroids, numbers, labels)
        result: dict[str, Any] = {}
        with self.ranks.together():
            if self.ranks.is_first:
                facts = {
                    "processes": self.ranks.world_size,
                    "device": str(self.device),
                    "merged": merged,
                    "converged": self._converged(self.state["passes"][-1]["kind"]),
                    "init_seconds": self.state.get("init_seconds"),
                    "label_seconds": self._label_seconds,
                    "positives_seconds": self._positives_seconds,
                    "passes": self.state["passes"],
                    "two_level": self._two_level_facts(),
                }
                outputs.remove_results(self.output, self.state.get("earlier", ()))
                result = results.write(
                    self.output, self.source, config, labels, centroids, totals, sizes, scores,
                    numbers, positives, facts, self.true_labels, self.images, self.console,
                )  # fmt: skip
                shutil.rmtree(self.state_dir / outputs.PRUNING, ignore_errors=True)
                for used in (labels, positives):
                    if used is not None:
                        shutil.rmtree(used.directory)
                if self.state.pop("earlier", ()):  # they have been removed, once
                    state.save(self.state_dir / outputs.STATE_FILE, self.state)
        return self.ranks.of_first(result)

    def _find_positives(
        self, centroids: Tensor, numbers: np.ndarray, labels: LabelFiles
    ) -> LabelFiles | None:
        """The several nearest clusters of each row that has one, out of those that are left.

        numbers: of the clusters, new, -1 for those that are dissolved. labels: by the old ones.
        """
        self._positives_seconds: float | None = None
        columns = self.config.positives
        if columns == 1:
            return None
        kept = np.flatnonzero(numbers >= 0)
        if len(kept) < columns:
            self.console.print(f"{len(kept)} clusters are left: positives are filled up with -1.")
        found = LabelFiles(self.state_dir / outputs.UNFINISHED, columns)
        with self.ranks.together():
            if self.ranks.is_first:
                found.create(self.source.shards)
        if len(kept):
            with self.ranks.together():
                several = Several(centroids[kept].to(self.device), min(columns, len(kept)))
            with self._progress("positives", 0) as progress:
                totals = write_positives(
                    self.source, several, self.ranks, progress.watch, labels, numbers, found
                )
            progress.report(totals)
            self._positives_seconds = progress.seconds
        return found

    def _two_level_facts(self) -> dict[str, Any] | None:
        if "coarse" not in self.state:
            return None
        cells = {"coarse": len(self.state["coarse"])}
        if self._refined:
            return cells
        centroids = self.state["centroids"]
        rng = np.random.default_rng([self.config.seed, MEASURE])
        return cells | two_level.loss_of_objective(
            self.source, self._in_cells(centroids), centroids, self.engine, rng
        )

    # ---- state -----------------------------------------------------------------------------------

    def _progress(self, title: str, left: int) -> PassProgress:
        begin, end = self.ranks.share(self.source.rows)
        return PassProgress(self.console, title, end - begin, left)

    def _save(self) -> None:
        with self.ranks.together():
            if self.ranks.is_first:
                state.save(self.state_dir / outputs.STATE_FILE, self.state)

    def _load_state(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        path = self.state_dir / outputs.STATE_FILE
        if resume:
            return state.load(path, self.config, self.source)
        there = [p for p in outputs.written(self.output, self.source.names) if p.exists()]
        if there and not overwrite:
            raise CheckpointError(f"{there[0]}: is there already; resume it, or overwrite it")
        return state.fresh(self.config, self.source)


def _facts(
    number: int, kind: str, totals: Totals, empty: int, seconds: float, products: float | None
) -> dict[str, Any]:
    return {
        "pass": number,
        "kind": kind,
        "rows": totals.rows,
        "objective": totals.objective,
        "changed": totals.changed_fraction,
        "empty": empty,
        "seconds": seconds,
        "rows_per_second": totals.seen / seconds,
        "products": products,
    }
