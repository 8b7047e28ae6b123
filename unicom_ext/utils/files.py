"""Files that a kill at any moment cannot spoil, and lists of numbered files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PIECES, _PIECE_BYTES = 4, 1 << 16


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or does not fit."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then rename it to `path`.

    A reader finds the old file or the new one, whole, whenever this is interrupted.
    """
    path = Path(path)
    # Always the same name: what a killed writer left behind is overwritten by the next one.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write_atomically` with an error that names the file, and nothing half-written left."""
    try:
        write_atomically(path, write)
    except OSError as error:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        # NumPy's own have no number.
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from None


_locks: set[int] = set()


def _close_locks() -> None:
    """In a process that was forked: it would hold them longer than the one that has asked."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Others are kept from a directory, which is made if need be, as long as this lasts.

    The lock ends with the process, however that ends. Raises OSError where another has it. A file
    system that knows no locks gives none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    _locks.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OSError(
                    f"{directory}: another process is writing to it; wait for its end, or name "
                    "another directory"
                ) from None
        yield
    finally:
        with suppress(KeyError):  # in a child that was forked meanwhile
            _locks.remove(handle)
            with suppress(OSError):  # of file systems that know no locks
                # Closing is not enough where a child was forked that has not closed its own yet.
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/unicom_ext`, or `~/.cache/unicom_ext`: for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "unicom_ext"


def write_cached(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """As `write_atomically`, into a folder that is made, where several processes may write at once
    what is the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sync_directory(directory: Path) -> None:
    """Bring a rename to the disk: it is there only when the directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def glimpse(path: Path) -> str:
    """SHA-256 of a file's size and of four pieces of it, from its beginning to its end.

    Tells files apart that hold other features, without reading all of them; a few bytes that were
    changed between the pieces go unnoticed. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _PIECE_BYTES, 0)
    with open(path, "rb") as file:
        for piece in range(_PIECES):
            file.seek(last * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def digest_of(path: Path) -> str | None:
    """SHA-256 of what is in a file, or of names and contents of the files in a directory, at any
    depth; None where there is neither.

    Of a checkpoint, which a step of training changes everywhere, it is that of glimpses: beside the
    encoder it may hold millions of prototypes.
    """
    if path.is_file():
        return _digest_of_file(path)
    if not path.is_dir():
        return None
    of_file = glimpse if (path / ".metadata").exists() else _digest_of_file
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(
            f"{file.relative_to(path)}\0{of_file(file)}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sorts names as people count: a_2 before a_10, whatever the case and the padding.

    Names that differ in nothing else, such as a_1 and a_01, are in the order of their characters.
    """
    return _parts(path.stem.casefold()), path.name


def natural_name_key(name: str) -> tuple[list[str | int], str]:
    """As `natural_key`, of a name that has no ending to leave out."""
    return _parts(name.casefold()), name


def unpadded(name: str) -> str:
    """The name without leading zeros in its numbers: 7 and 0007 are one number."""
    return "".join(map(str, _parts(name)))


def list_files(directory: Path, suffix: str, prefix: str = "") -> list[Path]:
    """The files of a directory with these ends of their names, in natural order.

    Both, such as "img_emb_" and ".npy", may be written in capitals. Hidden files are left out.
    Raises OSError.
    """
    return sorted(
        (
            path
            for path in directory.iterdir()
            if path.suffix.lower() == suffix
            and path.name.lower().startswith(prefix)
            and not path.name.startswith(".")
            and path.is_file()
        ),
        key=natural_key,
    )


def _parts(text: str) -> list[str | int]:
    """Text and numbers in turns, text first, so that two of them always compare."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
