"""Features of images and their captions, in the layout of public dumps of CLIP embeddings.

    img_emb/img_emb_0000.npy ...       float16 [n, d], of norm 1, in shards of `SHARD_ROWS`
    text_emb/text_emb_0000.npy ...     of captions, where there are any
    metadata/metadata_0000.jsonl ...   a line for each image: name, class or classes, caption
    true_labels.npy                    int64 [N], -1 for none; [N, P] where some have several
    images.npy                         small images, for pictures of clusters
    encoder.pt                         of an encoder that was fitted to these images
    extract.json                       settings, facts, and a list of these files

Row i is image i. One that cannot be read has no label, and zero rows, which clustering leaves out;
the text's row is zero where there is no caption, too.
A class has the same number in all parts of the images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from unicom_ext.data.images.batches import ImageBatches, in_order, killed_workers_named
from unicom_ext.data.images.imageset import NO_CLASS, ImageSet
from unicom_ext.data.source import ENCODER
from unicom_ext.distributed.failures import agree
from unicom_ext.distributed.ranks import Ranks
from unicom_ext.encoders import registry, text, thumbnails
from unicom_ext.encoders.contents import contents
from unicom_ext.encoders.dump import LABELS, NEW, SHARD_ROWS, THUMBNAILS, Dump, shard_name
from unicom_ext.encoders.encoder import ImageEncoder
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.encoders.text import TextEncoder
from unicom_ext.utils.arrays import SourceError
from unicom_ext.utils.devices import device_of
from unicom_ext.utils.files import only_writer, write_file
from unicom_ext.utils.settings import ConfigError

FIT_IMAGES = 20_000  # that an encoder is fitted to, at most
BATCH = 128


@killed_workers_named()
def extract(
    config: ExtractConfig,
    images: ImageSet,
    output: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Write the features of the images to a directory; see the module for what is in it.

    A call that was killed is gone on with by the next one. What an earlier call has written there
    stays until the new files are whole, and is then replaced.

    Several ranks, on a file system that they share, write a shard each at a time; the files are
    those of one process. An error on one rank is raised on all.

    Args:
        config: encoders, and what else decides the features.
        images: those that the config names.
        output: the directory, made if need be.
        overwrite: replace features of other settings or images.
        console: for progress.
        group: the ranks that work together and all call this; the first one speaks.

    Returns:
        What extract.json holds.

    Raises:
        ConfigError: settings that cannot be used. SourceError: other files are in the way, or
        features of other settings or images. ChildProcessError: a process that reads images was
        killed. OSError: writing, also where another process writes to the directory.
    """
    ranks, output = Ranks(group), Path(output)
    console = (console or Console()) if ranks.is_first else Console(quiet=True)
    work, facts, failure = None, dict[str, Any](), None
    try:
        work = _Extraction.of(config, images, output / NEW, ranks)
        facts = work.facts()
    except Exception as error:
        failure = error
    agree(facts, failure, group)
    assert work is not None
    with ExitStack() as held:
        done: dict[str, Any] | None = None
        with ranks.together():
            if ranks.is_first:
                dump = Dump(output, facts, work.files())
                done = dump.finished(overwrite)
                if done is None:
                    held.enter_context(only_writer(output))
                    dump.begin()
        done = ranks.of_first(done)
        if done is not None:
            return done
        work.run(console)
        whole = dict[str, Any]()
        with ranks.together():
            if ranks.is_first:
                whole = dump.end(work.finish())
        return ranks.of_first(whole)


@dataclass
class _Extraction:
    config: ExtractConfig
    images: ImageSet
    encoder: ImageEncoder
    text_encoder: TextEncoder | None
    directory: Path
    ranks: Ranks
    device: torch.device

    @classmethod
    def of(cls, config: ExtractConfig, images: ImageSet, directory: Path, ranks: Ranks) -> Self:
        """Raises ConfigError."""
        device, encoder = device_of(config.device), _image_encoder(config)
        text_encoder = None
        if images.pictures.has_captions and config.text_encoder != "none":
            text_encoder = text.create(config.text_encoder, config.dim, config.seed)
        return cls(config, images, encoder, text_encoder, directory, ranks, device)

    def facts(self) -> dict[str, Any]:
        """What decides the features."""
        found = contents(self.config.to_dict())
        if self.text_encoder is not None:
            found["captions"] = self.images.digest_of_captions()
        return {"config": self.config.to_dict(), "data": self.images.facts(), "contents": found}

    def files(self) -> list[str]:
        """The names of all that it writes."""
        kinds = ["img_emb", *([] if self.text_encoder is None else ["text_emb"]), "metadata"]
        names = [shard_name(kind, number) for kind in kinds for number in range(len(self._shards))]
        names += [LABELS]
        names += [THUMBNAILS] if self.config.thumbnails else []
        return names + ([ENCODER] if self.encoder.needs_fitting else [])

    @property
    def _shards(self) -> list[range]:
        count = len(self.images)
        return [
            range(first, min(first + SHARD_ROWS, count)) for first in range(0, count, SHARD_ROWS)
        ]

    def run(self, console: Console) -> None:
        """Write the shards that are not there, in rounds of one for each rank: one that fails ends
        the others with the round."""
        ranks, shards = self.ranks, self._shards
        left = [n for n in range(len(shards)) if not self._path("img_emb", n).exists()]
        left = ranks.of_first(left)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("Extracting", total=len(self.images))
            progress.advance(task, len(self.images) - sum(len(shards[n]) for n in left))
            with ranks.together():
                self.encoder.module.to(self.device)
                self._fit_to_captions()
                if ranks.is_first:
                    self._make_what_ranks_share()
            with ranks.together():
                if self.encoder.needs_fitting:
                    state = torch.load(self.directory / ENCODER, weights_only=True)
                    self.encoder.module.load_state_dict(state)
            for begin in range(0, len(left), ranks.world_size):
                numbers = left[begin : begin + ranks.world_size]
                rows = sum(len(shards[n]) for n in numbers)
                with ranks.together():
                    for number in numbers[ranks.rank : ranks.rank + 1]:
                        for share in self._write(number, shards[number]):
                            progress.advance(task, share * rows)

    def finish(self) -> dict[str, Any]:
        """Write true_labels.npy. Raises SourceError where there is nothing but zero rows."""
        labels, at = self.images.common_labels.copy(), 0
        unreadable = 0
        for number in range(len(self._shards)):
            with open(self._path("metadata", number), encoding="utf-8") as lines:
                for line in lines:
                    if "unreadable" in json.loads(line):
                        labels[at], unreadable = NO_CLASS, unreadable + 1
                    at += 1
        write_file(self.directory / LABELS, partial(np.save, arr=labels))
        if unreadable == len(self.images):
            raise SourceError(
                f"{self.config.data}: none of the {len(self.images)} images can be read"
            )
        return {
            "unreadable": unreadable,
            "image_dim": self.encoder.dim,
            "text_dim": None if self.text_encoder is None else self.text_encoder.dim,
        }

    def _fit_to_captions(self) -> None:
        if self.text_encoder is not None:
            captions = filter(None, self._captions(range(len(self.images))))
            if first := next(captions, None):
                self.text_encoder.fit(chain([first], captions))

    def _make_what_ranks_share(self) -> None:
        """Files that they read or fill together, where a killed call has not made them."""
        side, path = self.config.thumbnails, self.directory / THUMBNAILS
        if side and not path.exists():
            channels = (3,) if self.encoder.preprocessing.mode == "RGB" else ()
            thumbnails.create(path, (len(self.images), side, side, *channels))
        if self.encoder.needs_fitting and not (self.directory / ENCODER).exists():
            self._fit_to_images()

    def _fit_to_images(self) -> None:
        count = min(len(self.images), FIT_IMAGES)
        rng = np.random.default_rng(self.config.seed)
        sample = np.sort(rng.choice(len(self.images), count, replace=False))
        parts = [images for _, images, _ in self._read(self.images.take(sample))]
        try:
            self.encoder.module.fit(torch.cat(parts))  # type: ignore[operator]
        except ValueError as error:
            raise ConfigError(
                f"encoder: {self.config.encoder} is not possible here: {error}"
            ) from None
        state = {name: value.cpu() for name, value in self.encoder.module.state_dict().items()}
        write_file(self.directory / ENCODER, partial(torch.save, state))

    def _read(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, str]]]]:
        """Indices, what the encoder takes, and what cannot be read, batch by batch."""
        batches = ImageBatches(images, self.encoder.preprocessing, BATCH)
        for batch in in_order(batches, range(len(batches)), self.config.workers):
            pixels = self.encoder.preprocessing.normalised(batch.images.to(self.device))
            yield batch.indices, pixels, batch.unreadable

    @torch.no_grad()
    def _write(self, number: int, rows: range) -> Iterator[float]:
        """A shard; its image features come last, and say that it is whole. Yields what share of it
        is done each time."""
        images = self.images.take(np.asarray(rows))
        features = torch.zeros(len(rows), self.encoder.dim, dtype=torch.float16)
        unreadable: dict[int, str] = {}
        self.encoder.module.eval()
        with self._thumbnails() as write_small:
            for indices, pixels, bad in self._read(images):
                unreadable.update(bad)
                if len(indices):
                    found = F.normalize(self.encoder.module(pixels).float()).cpu()
                    self._check_finite(found, images, indices)
                    features[indices] = found.half()
                    if write_small is not None:
                        write_small(rows.start + indices.numpy(), self._shrunk(pixels))
                yield (len(indices) + len(bad)) / len(rows)
        captions = list(self._captions(rows))
        lines = (
            json.dumps(
                self._described(images, i, captions[i], unreadable.get(i)), ensure_ascii=False
            )
            for i in range(len(rows))
        )
        # What is not UTF-8 in a name becomes an escape of JSON, which reads as the same name.
        content = "".join(line + "\n" for line in lines).encode(errors="backslashreplace")
        write_file(self._path("metadata", number), lambda file: file.write(content))
        if self.text_encoder is not None:
            encoded = torch.zeros(len(captions), self.text_encoder.dim)
            if there := [i for i, text in enumerate(captions) if text and i not in unreadable]:
                encoded[there] = self.text_encoder.encode([captions[i] for i in there])
            write_file(self._path("text_emb", number), partial(np.save, arr=encoded.half().numpy()))
        write_file(self._path("img_emb", number), partial(np.save, arr=features.numpy()))

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / shard_name(kind, number)

    def _captions(self, rows: range) -> Iterator[str]:
        if self.text_encoder is None:
            return iter([""] * len(rows))
        kept, seed = self.config.kept_words, self.config.seed
        return (some_words(self.images.caption(i), kept, seed, i) for i in rows)

    def _described(
        self, images: ImageSet, index: int, caption: str, unreadable: str | None
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"name": images.name(index)}
        labels = images.labels[index]
        if labels.ndim:
            found = [images.class_names[label] for label in labels.tolist() if label != NO_CLASS]
            line |= {"classes": found} if found else {}
        elif labels != NO_CLASS:
            line["class"] = images.class_name(index)
        if caption:
            line["caption"] = caption
        if unreadable is not None:
            line["unreadable"] = unreadable
        return line

    def _check_finite(self, found: Tensor, images: ImageSet, indices: Tensor) -> None:
        bad = (~found.isfinite().all(1)).nonzero()
        if len(bad):
            name = images.name(int(indices[bad[0, 0]]))
            raise SourceError(f"{name}: {self.config.encoder} gives NaN or infinity for it")

    def _thumbnails(self) -> AbstractContextManager[thumbnails.Write | None]:
        """What writes them; None where none are wanted."""
        if self.config.thumbnails == 0:
            return nullcontext()
        return thumbnails.writing(self.directory / THUMBNAILS)

    def _shrunk(self, pixels: Tensor) -> np.ndarray:
        """uint8 [b, side, side] or [b, side, side, 3]."""
        side = self.config.thumbnails
        values = self.encoder.preprocessing.denormalised(pixels)
        small = F.interpolate(values, (side, side), mode="bilinear", antialias=True)
        small = (255 * small).round().clamp(0, 255).byte().cpu()
        return (small[:, 0] if small.shape[1] == 1 else small.permute(0, 2, 3, 1)).numpy()


def some_words(text: str, kept: float, seed: int, number: int) -> str:
    """Each word of a text with this probability, and at least one."""
    if kept == 1:
        return text
    rng, words = np.random.default_rng([seed, number]), text.split()
    stay = rng.random(len(words)) < kept
    if words:
        stay[rng.integers(len(words))] |= not stay.any()
    return " ".join(word for word, stays in zip(words, stay, strict=True) if stays)


def _image_encoder(config: ExtractConfig) -> ImageEncoder:
    if config.is_untrained:
        raise ConfigError(
            f"weights: {config.encoder} has none of its own; name a file or the output of `train`"
        )
    with torch.random.fork_rng(devices=[]):
        size = config.dim if config.encoder in ("pixels", "hog") else 0
        return registry.create(config, size)
