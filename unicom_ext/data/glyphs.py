"""A real image collection that needs no download: characters drawn from matplotlib's fonts.

matplotlib ships the DejaVu and STIX families. One class is one character, its images are that
character in up to 16 faces (`FACES`), white on black:

1. A character is a letter, number, punctuation mark or symbol of Unicode that at least half of the
   faces can draw. Combining marks are left out: they are told apart by where they sit above or
   below a letter, and a tight crop removes exactly that.
2. It is drawn 128 pixels high, cropped to its ink, scaled (keeping its shape) so that its longer
   side is 28 pixels, and centred in 32 x 32. Blank glyphs are dropped; a face that has no glyph of
   its own for a character is not asked, so its "missing character" box is never drawn.
3. Every bitmap is kept once. Characters that share a bitmap in any face (Latin A, Greek Alpha and
   Cyrillic A; the dashes, once their length is scaled away) cannot be told apart by looking, so
   they are one class, named after the lowest code point. No bitmap is left in two classes.
4. A class with fewer than `MIN_IMAGES` different bitmaps is dropped.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext.utils.files import cache_root, write_cached

FACES = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
)
MIN_FACES = 8
MIN_IMAGES = 4
SIZE = 32  # side of an image, pixels
INK = 28  # longer side of the glyph in it, pixels
DRAWN = 128  # font size it is drawn at before scaling down, pixels
FORMAT = 1  # raise it when anything here changes the result


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Images of characters; labels run over 0 .. num_classes - 1, every class has an image.

    Attributes:
        images: uint8 [n, 32, 32], white (255) on black (0).
        labels: int64 [n], index into codepoints and captions.
        fonts: int64 [n], index into font_names: the first face that draws this bitmap.
        codepoints: int64 [num_classes], lowest code point of the class.
        captions: one Unicode name per class, such as "GREEK SMALL LETTER ALPHA".
        font_names: one name per face.
    """

    images: np.ndarray
    labels: np.ndarray
    fonts: np.ndarray
    codepoints: np.ndarray
    captions: list[str]
    font_names: list[str]

    @property
    def num_classes(self) -> int:
        """How many characters there are."""
        return len(self.codepoints)

    def __len__(self) -> int:
        return len(self.images)


def load(cache_dir: str | os.PathLike[str] | None = None) -> Glyphs:
    """The glyph images, drawn on the first call (some seconds) and read from disk afterwards.

    The file's name holds a hash of the versions that decide the pixels, and the file a checksum
    that is verified here. A damaged file is drawn again; a directory that cannot be written to
    costs a warning and the next call draws again.

    Args:
        cache_dir: where to keep them; None is ``$XDG_CACHE_HOME/unicom_ext``, or
            ``~/.cache/unicom_ext``.

    Returns:
        The images and their labels.

    Raises:
        ModuleNotFoundError: matplotlib or Pillow, which are optional, are not installed.
    """
    folder = cache_root() if cache_dir is None else Path(cache_dir)
    path = folder / f"glyphs-{_version_key()}.npz"
    glyphs = _read(path)
    if glyphs is None:
        glyphs = _clean(*_draw())
        try:
            _write(path, glyphs)
        except OSError as error:
            warnings.warn(f"glyph images were not cached in {path}: {error}", stacklevel=2)
    return glyphs


def split(g: Glyphs, seed: int = 0, test_fraction: float = 0.5) -> tuple[Glyphs, Glyphs]:
    """Cut the classes into a train and a test part that share none; labels are renumbered.

    Classes are ordered by a hash of (seed, code point), so the cut is the same on every machine and
    NumPy version.

    Args:
        g: all of them.
        seed: any integer.
        test_fraction: share of the classes, in (0, 1): the test part gets
            round(test_fraction * num_classes) of them.

    Returns:
        The train part and the test part.

    Raises:
        ValueError: either part would be empty.
    """
    num_test = round(test_fraction * g.num_classes) if 0 < test_fraction < 1 else 0
    if not 0 < num_test < g.num_classes:
        raise ValueError(
            f"test_fraction: got {test_fraction}, which leaves one part of the {g.num_classes} "
            "classes empty; it must lie strictly between 0 and 1"
        )

    def rank(c: int) -> bytes:
        return hashlib.sha256(f"{int(seed)}:{g.codepoints[c]}".encode()).digest()

    order = sorted(range(g.num_classes), key=rank)
    return _take(g, sorted(order[num_test:])), _take(g, sorted(order[:num_test]))


def _take(g: Glyphs, classes: list[int]) -> Glyphs:
    """The given classes (in increasing order) alone, renumbered in that order."""
    new_label = np.full(g.num_classes, -1, dtype=np.int64)
    new_label[classes] = np.arange(len(classes))
    rows = np.flatnonzero(new_label[g.labels] >= 0)
    return Glyphs(
        images=g.images[rows],
        labels=new_label[g.labels[rows]],
        fonts=g.fonts[rows],
        codepoints=g.codepoints[classes],
        captions=[g.captions[c] for c in classes],
        font_names=g.font_names,
    )


# ---- drawing -------------------------------------------------------------------------------------


def _draw() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every drawable (face, character): images uint8 [m, 32, 32], code points [m], faces [m]."""
    import matplotlib
    from fontTools.ttLib import TTFont
    from PIL import ImageFont
    from rich.console import Console
    from rich.progress import track

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawable = []  # per face: the characters it maps to a glyph of its own
    for face in FACES:
        with TTFont(folder / f"{face}.ttf", lazy=True) as font:
            drawable.append({c for c, name in font.getBestCmap().items() if name != ".notdef"})
    faces_of = Counter(c for characters in drawable for c in characters if _is_visible(c))
    characters = sorted(c for c, count in faces_of.items() if count >= MIN_FACES)

    images, codepoints, fonts = [], [], []
    screen = Console(stderr=True)
    for f, face in enumerate(track(FACES, "Drawing glyphs", console=screen, transient=True)):
        # Basic layout: one character is one glyph, with no substitution by a shaping library.
        font = ImageFont.truetype(
            str(folder / f"{face}.ttf"), DRAWN, layout_engine=ImageFont.Layout.BASIC
        )
        for c in (c for c in characters if c in drawable[f]):
            image = _draw_one(font, chr(c))
            if image is not None:
                images.append(image)
                codepoints.append(c)
                fonts.append(f)
    return np.stack(images), np.array(codepoints, np.int64), np.array(fonts, np.int64)


def _is_visible(codepoint: int) -> bool:
    return unicodedata.category(chr(codepoint))[0] in "LNPS"


def _draw_one(font: Any, character: str) -> np.ndarray | None:
    """One glyph, uint8 [32, 32]; None if it has no ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    box = canvas.getbbox()  # of the ink; the font's own box can be a pixel larger
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = INK / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    ink = ink.resize((width, height), Image.Resampling.LANCZOS)
    image = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    image[top : top + height, left : left + width] = np.asarray(ink)
    return image


def _clean(images: np.ndarray, codepoints: np.ndarray, fonts: np.ndarray) -> Glyphs:
    """Steps 3 and 4 above. images uint8 [m, 32, 32], codepoints and fonts int64 [m]."""
    parent = {int(c): int(c) for c in codepoints}  # union-find; a root is its class's lowest

    def root(c: int) -> int:
        while parent[c] != c:
            parent[c] = c = parent[parent[c]]
        return c

    drawn_by: dict[bytes, int] = {}
    keep = []  # the first image with each bitmap
    for i, c in enumerate(codepoints.tolist()):
        bitmap = images[i].tobytes()
        if bitmap not in drawn_by:
            drawn_by[bitmap] = c
            keep.append(i)
        low, high = sorted((root(drawn_by[bitmap]), root(c)))
        parent[high] = low

    owner = np.array([root(c) for c in codepoints[keep].tolist()], dtype=np.int64)
    classes, labels, counts = np.unique(owner, return_inverse=True, return_counts=True)
    # In class order, then by face: stable, and easy to look at.
    rows = np.argsort(labels, kind="stable")
    everything = Glyphs(
        images=images[keep][rows],
        labels=labels[rows].astype(np.int64),
        fonts=fonts[keep][rows],
        codepoints=classes,
        captions=[unicodedata.name(chr(c)) for c in classes.tolist()],
        font_names=list(FACES),
    )
    return _take(everything, np.flatnonzero(counts >= MIN_IMAGES).tolist())


# ---- cache ---------------------------------------------------------------------------------------


def _version_key() -> str:
    """Hash of everything that decides the pixels, the classes or the captions."""
    try:
        import matplotlib
        import PIL
        from PIL import features
    except ModuleNotFoundError as error:
        message = f"the glyph images need {error.name}: pip install 'unicom_ext[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from None

    versions = (
        f"format {FORMAT}",
        f"matplotlib {matplotlib.__version__}",  # the font files
        f"Pillow {PIL.__version__}",  # scaling
        f"FreeType {features.version('freetype2')}",  # outlines to pixels
        f"Unicode {unicodedata.unidata_version}",  # categories and names
    )
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Glyphs | None:
    """The cached glyphs; None if there are none or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays.pop("checksum").item() != _checksum(arrays):
            return None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    return Glyphs(**{name: a.tolist() if a.dtype.kind == "U" else a for name, a in arrays.items()})


def _write(path: Path, g: Glyphs) -> None:
    arrays: dict[str, Any] = {field.name: np.asarray(getattr(g, field.name)) for field in fields(g)}
    checksum = np.array(_checksum(arrays))
    write_cached(path, lambda file: np.savez_compressed(file, checksum=checksum, **arrays))
