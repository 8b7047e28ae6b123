"""Public data sets in the layout that they come in, with the parts that results are published for.

`STANDARD` has what each of them needs, where it is from and how many images there are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext.data.images import landmarks
from unicom_ext.data.images.collection import (
    GALLERY,
    QUERY,
    TEST,
    TRAIN,
    Collection,
    Named,
    check_parts,
    check_there,
)
from unicom_ext.data.images.folder import read_folder
from unicom_ext.data.images.pictures import FilePictures
from unicom_ext.utils.arrays import SourceError

_CARS_TEST = "cars_test_annos_withlabels.mat"  # which torchvision asks for


@dataclass(frozen=True)
class Standard:
    """A public data set.

    title   what it is called
    page    where it is from
    needs   files and folders that must be there; "a or b" where one of them will do
    counts  of the images in each part, several where there are several versions
    read    what its files say, given where they lie
    """

    title: str
    page: str
    needs: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    read: Callable[[Path], Iterator[Named]]

    def missing(self, path: Path) -> list[str]:
        """What is needed, and not there."""
        return [
            need
            for need in self.needs
            if not any((path / one).exists() for one in need.split(" or "))
        ]


def read_standard(name: str, path: Path) -> Collection:
    """The data set of this layout in a folder.

    Warns where there are other numbers of images than in the published one. Raises SourceError
    where files are missing, or are not as they are published.
    """
    standard = STANDARD[name]
    missing = standard.missing(path)
    if missing:
        raise SourceError(
            f"{path}: is not {standard.title}: there is no {missing[0]}. It needs "
            f"{', '.join(standard.needs)}; see {standard.page}"
        )
    named = list(standard.read(path))
    rows: dict[str, list[int]] = {}
    for number, image in enumerate(named):
        rows.setdefault(image.part, []).append(number)
    paths = [image.path for image in named]
    check_there(str(path), path, paths)
    sizes = {part: len(rows.get(part, ())) for part in standard.counts}
    different = [
        f"{sizes[part]} for {part}, not {' or '.join(map(str, numbers))}"
        for part, numbers in standard.counts.items()
        if sizes[part] not in numbers
    ]
    if different:
        warnings.warn(
            f"{path}: is not the whole of {standard.title}, or not it alone: images are "
            f"{', '.join(different)}; results cannot be compared with published ones",
            stacklevel=4,
        )
    check_parts(str(path), list(rows))
    parts = {part: np.array(numbers) for part, numbers in rows.items()}
    return Collection(FilePictures(path, paths), [image.of_class for image in named], parts)


def found(path: Path) -> str | None:
    """The layout of the public data set whose files all lie in a folder."""
    return next((name for name, one in STANDARD.items() if not one.missing(path)), None)


def _words(path: Path, columns: str, skip: int = 0) -> Iterator[list[str]]:
    """The words in each line of a list, of which there must be as many as columns."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines[skip:], skip + 1):
        words = line.split()
        if words and len(words) != len(columns.split()):
            raise SourceError(f"{path}: line {number}: is {line!r}, must be: {columns}")
        if words:
            yield words


def _products(root: Path) -> Iterator[Named]:
    for part in (TRAIN, TEST):
        columns = "image_id class_id super_class_id path"
        for _, label, _, path in _words(root / f"Ebay_{part}.txt", columns, skip=1):
            yield Named(path, label, part)


def _in_shop(root: Path) -> Iterator[Named]:
    file = root / "Eval/list_eval_partition.txt"
    folder = "Img" if (root / "Img").is_dir() else ""
    # The number of images, and the names of the columns.
    for path, label, part in _words(file, "image_name item_id evaluation_status", skip=2):
        if part not in (TRAIN, QUERY, GALLERY):
            raise SourceError(f"{file}: {path} is for {part!r}, must be train, query or gallery")
        yield Named(os.path.join(folder, path), label, part)


def _birds(root: Path) -> Iterator[Named]:
    """The folders are the classes, and called after their numbers."""
    labels: dict[str, str] = {}
    if (root / "images.txt").is_file() and (root / "image_class_labels.txt").is_file():
        numbers = dict(_words(root / "image_class_labels.txt", "image_id class_id"))
        labels = {
            path: numbers.get(i, "") for i, path in _words(root / "images.txt", "image_id path")
        }
        paths = list(labels)
    else:
        whole = read_folder(root / "images")
        paths = [whole.pictures.name(i) for i in range(len(whole.pictures))]
    for path in paths:
        of_class = path.split("/")[0]
        number = of_class.partition(".")[0]
        if not number.isdecimal():
            raise SourceError(f"{root}/images: has {path}, must be 001.NAME/... to 200.NAME/...")
        if labels and labels[path] != str(int(number)):
            raise SourceError(
                f"{root}/image_class_labels.txt: {path} is of class {labels[path] or 'none'}"
            )
        yield Named(f"images/{path}", of_class, TRAIN if int(number) <= 100 else TEST)


def _cars(root: Path) -> Iterator[Named]:
    """With one list of all images, or in the two parts that torchvision downloads. Their halves are
    for classification: here the first 98 classes are trained on."""
    for path, number, name in _cars_of_parts(root) if _in_parts(root) else _cars_of_one_list(root):
        yield Named(path, name, TRAIN if number <= 98 else TEST)


def _in_parts(root: Path) -> bool:
    return not (root / "cars_annos.mat").exists()


def _cars_of_one_list(root: Path) -> list[tuple[str, int, str]]:
    with _matlab(root / "cars_annos.mat") as read:
        names = [str(name[0]) for name in read["class_names"][0]]
        images = read["annotations"][0]
        found = [(str(i["relative_im_path"][0]), int(i["class"][0, 0])) for i in images]
        return [(path, number, names[number - 1]) for path, number in found]


def _cars_of_parts(root: Path) -> list[tuple[str, int, str]]:
    with _matlab(root / "devkit/cars_meta.mat") as read:
        names = [str(name[0]) for name in read["class_names"][0]]
    named = []
    for folder, file in ("cars_train", "devkit/cars_train_annos.mat"), ("cars_test", _CARS_TEST):
        with _matlab(root / file) as read:
            for image in read["annotations"][0]:
                number = int(image["class"][0, 0])
                path = os.path.join(folder, str(image["fname"][0]))
                named.append((path, number, names[number - 1]))
    return named


@contextmanager
def _matlab(file: Path) -> Iterator[dict[str, Any]]:
    """What a .mat file holds. SourceError where it is not what the block expects."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise SourceError(f"{file}: .mat files need scipy: pip install scipy") from None
    try:
        yield loadmat(file)
    except Exception as error:  # scipy's reader raises whatever its parts raise
        raise SourceError(f"{file}: is not as it is published: {error}") from None


def _species(root: Path) -> Iterator[Named]:
    for part in (TRAIN, TEST):
        file = root / f"Inat_dataset_splits/Inaturalist_{part}_set1.txt"
        for (path,) in _words(file, "path"):
            folders = path.split("/")
            if len(folders) < 3:
                raise SourceError(f"{file}: has {path}, must be .../KINGDOM/SPECIES/IMAGE")
            yield Named(path, "/".join(folders[-3:-1]), part)


STANDARD = {
    "sop": Standard(
        "Stanford Online Products",
        "https://cvgl.stanford.edu/projects/lifted_struct",
        ("Ebay_train.txt", "Ebay_test.txt"),
        {TRAIN: (59_551,), TEST: (60_502,)},
        _products,
    ),
    "inshop": Standard(
        "In-Shop Clothes Retrieval",
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html",
        ("Eval/list_eval_partition.txt", "Img or img"),
        {TRAIN: (25_882,), QUERY: (14_218,), GALLERY: (12_612,)},
        _in_shop,
    ),
    "cub": Standard(
        "CUB-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        ("images", "image_class_labels.txt or images/001.Black_footed_Albatross"),
        {TRAIN: (5_864,), TEST: (5_924,)},
        _birds,
    ),
    "cars": Standard(
        "Cars196",
        "Krause et al., 3D Object Representations for Fine-Grained Categorization, 2013",
        (
            f"cars_annos.mat or {_CARS_TEST}",
            "car_ims or cars_train",
        ),
        {TRAIN: (8_054,), TEST: (8_131,)},
        _cars,
    ),
    "inat": Standard(
        "iNaturalist 2018 for retrieval",
        "https://github.com/visipedia/inat_comp, and for the lists of images "
        "https://github.com/Andrew-Brown1/Smooth_AP",
        (
            "Inat_dataset_splits/Inaturalist_train_set1.txt",
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
            "train_val2018",
        ),
        {TRAIN: (325_846,), TEST: (136_093,)},
        _species,
    ),
    "gldv2": Standard(
        "Google Landmarks v2",
        "https://github.com/cvdfoundation/google-landmark",
        ("train/train_clean.csv or train_clean.csv or train/train.csv or train.csv", "train/0/0"),
        {TRAIN: (1_580_470, 4_132_914), QUERY: (750,), GALLERY: (761_757,)},
        landmarks.read,
    ),
}

READERS: dict[str, Callable[[Path], Collection]] = {
    name: partial(read_standard, name) for name in STANDARD
}
