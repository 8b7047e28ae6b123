"""`ImageSet`: images, and what is known of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from unicom_ext.data.images.pictures import ArrayPictures, Pictures
from unicom_ext.utils.arrays import check_labels
from unicom_ext.utils.settings import ConfigError

if TYPE_CHECKING:
    from PIL import Image

NO_CLASS = -1  # the label of an image without one, and what rows of several are filled up with


@dataclass(frozen=True, eq=False)
class ImageSet:
    """n images, which are read one at a time.

    pictures     where they are read from
    rows         int64 [n], their numbers there
    labels       int64 [n], index into class_names, or NO_CLASS; [n, P], rows filled up with
                 NO_CLASS, after `relabelled` and where the data give some of a gallery several
    class_names  one for each class; labels run over 0 .. num_classes - 1
    numbers      int64 [num_classes], of the classes among those of all parts; None: the same
    """

    pictures: Pictures
    rows: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]
    numbers: np.ndarray | None = None

    @classmethod
    def of_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        captions: Sequence[str] = (),
    ) -> Self:
        """All of images uint8 [n, h, w] or [n, h, w, 3] in memory."""
        pictures = ArrayPictures(images, captions=captions)
        return cls(pictures, np.arange(len(images)), labels, class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def first_labels(self) -> np.ndarray:
        """int64 [n], one class of each image, for what takes no more."""
        return self.labels if self.labels.ndim == 1 else self.labels[:, 0]

    @property
    def common_labels(self) -> np.ndarray:
        """As `labels`, with the numbers that classes have among those of all parts."""
        if self.numbers is None:
            return self.labels
        return np.append(self.numbers, NO_CLASS)[self.labels]  # the last for NO_CLASS

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.pictures.name(int(self.rows[index]))

    def read(self, index: int) -> Image.Image:
        """Raises PictureError where the image cannot be read."""
        return self.pictures.read(int(self.rows[index]))

    def caption(self, index: int) -> str:
        """ "" where there is none."""
        return self.pictures.caption(int(self.rows[index]))

    def class_name(self, index: int) -> str:
        """Of the image; "" where it has no class."""
        label = self.first_labels[index]
        return "" if label == NO_CLASS else self.class_names[label]

    def take(self, indices: np.ndarray) -> ImageSet:
        """The given images, in that order, with the classes as they are."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def of_classes(self, classes: Sequence[int], unlabelled: bool = False) -> ImageSet:
        """The images of the given classes (increasing) alone, renumbered in that order.

        unlabelled: those without a class too.
        """
        left_out = NO_CLASS - 1
        new = np.full(self.num_classes + 1, left_out, np.int64)  # the last for NO_CLASS
        new[list(classes)] = np.arange(len(classes))
        if unlabelled:
            new[NO_CLASS] = NO_CLASS
        indices = np.flatnonzero(new[self.labels] != left_out)
        numbers = np.arange(self.num_classes) if self.numbers is None else self.numbers
        return ImageSet(
            self.pictures,
            self.rows[indices],
            new[self.labels[indices]],
            [self.class_names[c] for c in classes],
            numbers[list(classes)],
        )

    def split(
        self, seed: int, fraction: float, name: str = "test_fraction"
    ) -> tuple[ImageSet, ImageSet]:
        """The classes cut into two parts that share none; labels are renumbered.

        The second part gets round(fraction * num_classes) classes. Classes are ordered by a hash of
        (seed, name of the class), so the cut is the same on every machine. Images without a label
        are in the first part.

        Raises ConfigError, which calls the fraction `name`, if either part would have no class.
        """
        taken = round(fraction * self.num_classes)
        if not 0 < taken < self.num_classes:
            raise ConfigError(
                f"{name}: got {fraction}, which leaves one part of the {self.num_classes} "
                "classes empty"
            )

        def rank(c: int) -> bytes:
            text = f"{seed}:{self.class_names[c]}"
            return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

        order = sorted(range(self.num_classes), key=rank)
        first, second = sorted(order[taken:]), sorted(order[:taken])
        return self.of_classes(first, unlabelled=True), self.of_classes(second)

    def relabelled(self, labels: np.ndarray) -> ImageSet:
        """The images under other labels, integers [n], or [n, P] for several classes of an image.

        A negative label is none, and images without any are left out. Labels are renumbered without
        gaps, and the ones that are none go to the end of their row. A class is called after its old
        number. Raises SourceError, a ValueError, on labels of another shape or type.
        """
        check_labels("labels", labels, len(self), below=2**64, several=True)
        known = labels >= 0
        kept, numbers = np.unique(labels[known], return_inverse=True)
        new = np.full(labels.shape, NO_CLASS, np.int64)
        new[known] = numbers
        if labels.ndim == 2:
            order = np.argsort(~known, axis=1, kind="stable")
            new = np.take_along_axis(new, order, 1)
        indices = np.flatnonzero(known.reshape(len(self), -1).any(axis=1))
        names = [f"pseudo-class {number}" for number in kept.tolist()]
        return ImageSet(self.pictures, self.rows[indices], new[indices], names)

    def facts(self) -> dict[str, Any]:
        """What tells this set from others: counts, and a digest of its images and labels."""
        digest = hashlib.sha256()
        self.digest(digest)
        return {
            "images": len(self), "classes": self.num_classes, "sha256": digest.hexdigest()
        }  # fmt: skip

    def digest(self, into: Any) -> None:
        """Add what tells this set from others to a hash."""
        self.pictures.digest(self.rows, into)
        into.update(np.ascontiguousarray(self.labels).data)

    def digest_of_captions(self) -> str:
        """SHA-256 of the captions, which tell sets apart only where they are used. Raises
        PictureError where one cannot be read."""
        digest = hashlib.sha256()
        for row in self.rows.tolist():
            digest.update(f"{self.pictures.caption(row)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()
