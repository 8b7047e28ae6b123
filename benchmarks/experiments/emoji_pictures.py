"""Pictures of emoji by several vendors, from packages that are fetched by hand.

    mkdir packages && cd packages
    for name in emoji-datasource-google@16.0.0 emoji-datasource-google@3.0.0 \\
            emoji-datasource-twitter@16.0.0 emojione@2.2.7 emojione@1.5.2 \\
            @lobehub/fluent-emoji-3d@1.1.0 emojilib@4.0.3; do
        folder=$(echo "$name" | tr / _) && mkdir "$folder"
        tar xzf "$(npm pack --silent "$name")" -C "$folder"
    done
    python ../benchmarks/experiments/emoji_pictures.py . emoji.npz

The pictures' licences: Noto (Google 16) and its blobs (Google 3) Apache 2.0, Twemoji CC BY 4.0,
EmojiOne 2 CC BY 4.0 and EmojiOne 1 CC BY-SA 4.0, Fluent MIT. Apple's and Facebook's have none that
allows everything, and are left out. None is part of this repository.

A class is an emoji without a skin tone, with pictures of at least MIN_VENDORS. Equal pictures stand
once, in the class that is met first. Pictures are 32 x 32 on white, and inverted: what is around
them is 0, as around the glyphs. The caption is the name, then keywords. Vendors, size, classes and
captions were chosen before any result was looked at.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from unicom_ext.data.glyphs import SIZE, Glyphs
from unicom_ext.utils.files import write_file

# Name and major version of a package, and where in it the pictures are.
VENDORS = {
    ("emoji-datasource-google", 16): "img/google/64/*.png",
    ("emoji-datasource-google", 3): "img/google/64/*.png",
    ("emoji-datasource-twitter", 16): "img/twitter/64/*.png",
    ("emojione", 2): "assets/png/*.png",
    ("emojione", 1): "assets/png/*.png",
    ("@lobehub/fluent-emoji-3d", 1): "assets/*.webp",
}
CAPTIONS = ("emojilib", 4), "dist/emoji-en-US.json"
MIN_VENDORS = 3
_UNSEEN = {0xFE0F, 0x200D}  # which some vendors' names leave out
_SKIN_TONES = range(0x1F3FB, 0x1F400)


def load(cache: Path) -> Glyphs:
    """What `build` has written."""
    if not cache.exists():
        raise click.ClickException(f"{cache}: there is no such file; see emoji_pictures.py")
    with np.load(cache, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Glyphs(**{name: a.tolist() if a.dtype.kind == "U" else a for name, a in arrays.items()})


def build(folder: Path, cache: Path) -> Glyphs:
    """Read the unpacked packages in a folder and write one .npz.

    Raises click.ClickException where a package is missing.
    """
    packages = _packages(folder)
    for name, major in (*VENDORS, CAPTIONS[0]):
        if (name, major) not in packages:
            raise click.ClickException(f"{folder}: has no package {name}@{major}")
    pictures: dict[tuple[int, ...], dict[int, np.ndarray]] = defaultdict(dict)
    for number, (vendor, pattern) in enumerate(VENDORS.items()):
        files = sorted(packages[vendor].glob(pattern))
        for path in track(files, f"{vendor[0]}@{vendor[1]}", transient=True):
            code = codes(path.stem)
            if code and number not in pictures[code]:
                pictures[code][number] = _picture(path)
    captions = _captions(packages[CAPTIONS[0]] / CAPTIONS[1])
    emoji = _collect(pictures, captions)
    arrays = {name: np.asarray(value) for name, value in vars(emoji).items()}
    write_file(cache, lambda file: np.savez_compressed(file, **arrays))
    return emoji


def codes(name: str) -> tuple[int, ...]:
    """The code points in a name such as 1f468-200d-1f373, without those that are not seen; empty
    where it is none, or has a skin tone."""
    if not re.fullmatch(r"[0-9a-fA-F]+(-[0-9a-fA-F]+)*", name):
        return ()
    points = tuple(int(point, 16) for point in name.split("-"))
    return () if any(p in _SKIN_TONES for p in points) else _seen(points)


def _seen(points: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(p for p in points if p not in _UNSEEN)


def _packages(folder: Path) -> dict[tuple[str, int], Path]:
    """Where each package is, by name and major version."""
    found = {}
    for path in sorted(folder.glob("*/package/package.json")):
        about = json.loads(path.read_text())
        found[about["name"], int(about["version"].split(".")[0])] = path.parent
    return found


def _picture(path: Path) -> np.ndarray:
    """uint8 [3, SIZE, SIZE], on white and inverted."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    small = flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return 255 - np.asarray(small).transpose(2, 0, 1)


def _captions(path: Path) -> dict[tuple[int, ...], str]:
    found = {}
    for text, words in json.loads(path.read_text()).items():
        found[_seen(tuple(map(ord, text)))] = " ".join(words).replace("_", " ")
    return found


def _collect(
    pictures: dict[tuple[int, ...], dict[int, np.ndarray]], captions: dict[tuple[int, ...], str]
) -> Glyphs:
    """Classes in the order of their code points."""
    images, labels, vendors, keys, texts = [], [], [], [], []
    met: set[bytes] = set()
    for code, by_vendor in sorted(pictures.items()):
        new = {n: image for n, image in sorted(by_vendor.items()) if image.tobytes() not in met}
        if code not in captions or len(new) < MIN_VENDORS:
            continue
        met.update(image.tobytes() for image in new.values())
        images += new.values()
        vendors += new
        labels += [len(keys)] * len(new)
        keys.append(zlib.crc32(repr(code).encode()))  # a number that the split can hash
        texts.append(captions[code])
    return Glyphs(
        images=np.stack(images),
        labels=np.array(labels, np.int64),
        fonts=np.array(vendors, np.int64),
        codepoints=np.array(keys, np.int64),
        captions=texts,
        font_names=[f"{name}@{major}" for name, major in VENDORS],
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("cache", type=click.Path(path_type=Path, dir_okay=False))
def main(folder: Path, cache: Path) -> None:
    """Read the packages in FOLDER and write CACHE, a .npz file."""
    emoji = build(folder, cache)
    click.echo(f"{len(emoji)} pictures of {emoji.num_classes} emoji by {len(VENDORS)} vendors")


if __name__ == "__main__":
    main()
