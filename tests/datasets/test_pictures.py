"""Image files of every kind, and what is said of those that are spoilt."""

from __future__ import annotations

import io
import runpy
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from support.images import encoded, exactly, pictures, write

from unicom_ext.data.images import pictures as pictures_module
from unicom_ext.data.images.pictures import FilePictures, PictureError, decode
from unicom_ext.data.images.preprocessing import Preprocessing

RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]], np.uint8)
GREY = np.array([[0, 1, 128, 255]], np.uint8)
WIDE = np.array([[0, 257, 65280, 65535]], np.uint16)
OF_WIDE = np.array([[0, 1, 254, 255]], np.uint8)  # in 8 bits
ALPHA = np.array([[255, 0, 51, 255]], np.uint8)
ON_WHITE = np.array([[[255, 0, 0], [255, 255, 255], [204, 204, 255], [9, 8, 7]]], np.uint8)


def file(picture: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(out, kind, **options)
    return out.getvalue()


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([RGB, ALPHA]))


def palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(4)


KINDS = {
    "grey": (file(GREY, "PNG"), "L", GREY),
    "grey of 16 bits": (file(WIDE, "PNG"), "L", OF_WIDE),
    "grey of 16 bits in TIFF": (file(WIDE, "TIFF"), "L", OF_WIDE),
    "grey of 32 bits": (file(WIDE.astype(np.int32), "TIFF"), "L", OF_WIDE),
    "floating point": (file(GREY.astype(np.float32), "TIFF"), "L", GREY),
    "floating point in [0, 1]": (file(GREY.astype(np.float32) / 255, "TIFF"), "L", GREY),
    "black and white": (file(Image.fromarray(GREY[:, [0, 3]]).convert("1"), "PNG"), "L",
                        GREY[:, [0, 3]]),
    "colour": (file(RGB, "PNG"), "RGB", RGB),
    "colour in BMP": (file(RGB, "BMP"), "RGB", RGB),
    "colour in WebP": (file(RGB, "WEBP", lossless=True), "RGB", RGB),
    "a palette": (file(palette(), "PNG"), "RGB", RGB),
    "an animation": (file(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 1))]),
                     "RGB", RGB),
    "transparent": (file(rgba(), "PNG"), "RGB", ON_WHITE),
    "a palette with transparency": (file(rgba().quantize(4), "PNG"), "RGB", ON_WHITE),
    "transparent grey": (file(np.dstack([GREY, ALPHA]), "PNG"), "RGB",
                         np.repeat([[[0], [255], [230], [255]]], 3, 2)),
    "one transparent grey": (file(GREY, "PNG", transparency=128), "RGB",
                             np.repeat([[[0], [1], [255], [255]]], 3, 2)),
    "one transparent colour": (file(RGB, "PNG", transparency=(0, 255, 0)), "RGB",
                               RGB | np.array([[0], [255], [0], [0]], np.uint8)),
    "four inks": (file(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), "RGB",
                  np.array([[[255, 0, 0]] * 2])),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_grey_or_in_colour(kind):
    data, mode, values = KINDS[kind]
    picture = decode(io.BytesIO(data), kind)
    assert picture.mode == mode
    got = np.asarray(picture)
    if kind == "a palette with transparency":  # the palette is a choice
        assert np.abs(got.astype(int) - values).max() <= 1
    else:
        assert np.array_equal(got, values)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
     (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
     (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90)],
)  # fmt: skip
def test_pictures_are_turned_upright(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    picture = decode(io.BytesIO(file(pixels, "PNG", exif=exif)), "x")
    assert np.array_equal(np.asarray(picture), turned(pixels))


def noise(kind: str) -> bytes:
    return file(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), kind)


def huge() -> bytes:
    """A PNG that says it has 900 million pixels."""
    head = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    crc = zlib.crc32(b"IHDR" + head)
    begin = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", crc)
    return begin + noise("PNG")[len(begin) :]


SPOILT = {  # to what is said; Pillow's own words differ between its versions
    "floating point": (
        file(np.array([[-0.5, 1]], np.float32), "TIFF"),
        "has values from -0.5 to 1.0, must be in [0, 1] or [0, 255]",
    ),
    "empty": (b"", "is no image"),
    "a page": (b"<html><body>404</body></html>", "is no image"),
    "the head of a JPEG": (noise("JPEG")[:20], "is no image"),
    "the head of a PNG": (noise("PNG")[:30], "is no image"),
    "half a JPEG": (noise("JPEG")[:1000], "image file is truncated"),
    "half a PNG": (noise("PNG")[:1500], "image file is truncated"),
    "half a TIFF": (noise("TIFF")[:1000], ""),
    "half a GIF": (noise("GIF")[:1000], ""),
    "half a WebP": (noise("WEBP")[:200], ""),
    "a spoilt PNG": (noise("PNG")[:100] + b"????" + noise("PNG")[104:], ""),
    "a bomb": (huge(), "Image size (900000000 pixels) exceeds limit"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_files_are_named(tmp_path, kind):
    data, words = SPOILT[kind]
    write(tmp_path / "a.jpg", data)
    with pytest.raises(PictureError) as raised:
        FilePictures(tmp_path, ["a.jpg"]).read(0)
    place, _, reason = str(raised.value).partition(": ")
    assert place == f"{tmp_path}/a.jpg"
    assert reason == words if words == "is no image" else reason.startswith(words)
    assert reason


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_spoilt_exif_is_passed_over():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    picture = decode(io.BytesIO(encoded(0, "JPEG", exif=exif)), "x")
    assert picture.size == (8, 8)


def test_every_cut_of_a_file_is_a_picture_error():
    for kind in ("JPEG", "PNG", "GIF"):
        data = noise(kind)
        for size in range(0, len(data) - 20, 97):
            with pytest.raises(PictureError, match=r"^x: ."):
                decode(io.BytesIO(data[:size]), "x")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ZeroDivisionError])
def test_whatever_a_decoder_raises_is_a_picture_error(monkeypatch, error):
    # AVIF's raises RuntimeError on spoilt files, DDS's NotImplementedError.
    def load(self):
        raise error("spoilt")

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(PictureError, match=exactly("a.png: spoilt")):
        decode(io.BytesIO(noise("PNG")), "a.png")


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_very_long_picture_the_middle_is_scaled(monkeypatch, turned):
    middle = [0] * 16 + [200] * 8 + [0] * 16
    line = np.repeat(np.array([50] * 5000 + middle + [50] * 5000, np.uint8)[None], 8, 0)
    picture = Image.fromarray(line.T if turned else line)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a)
    )
    got = np.asarray(Preprocessing(64, "L", interpolation="bilinear")(picture))
    assert max(sizes[0]) == 32 * 64  # and not 1255 * 64
    assert got.shape == (64, 64)
    assert got[32, 32] == 200
    assert got.min() > 100


def test_a_folder_is_no_file(tmp_path):
    pictures(tmp_path, ["a.jpg/1.png"])
    with pytest.raises(PictureError, match=exactly(f"{tmp_path}/a.jpg: Is a directory")):
        FilePictures(tmp_path, ["a.jpg"]).read(0)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = "pictures need PIL: pip install 'unicom_ext[images]'"
    with pytest.raises(ModuleNotFoundError, match=exactly(message)):
        runpy.run_path(pictures_module.__file__)
