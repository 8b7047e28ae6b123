"""The prototypes of a checkpoint as one array, of which nothing else is needed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from unicom_ext.checkpoint.directory import read, read_tensors
from unicom_ext.checkpoint.names import SavedNames
from unicom_ext.utils.files import CheckpointError, write_file

# By torch's dtypes, the names that .npy and .safetensors have for them.
_NAMES = {
    torch.float64: ("<f8", "F64"),
    torch.float32: ("<f4", "F32"),
    torch.float16: ("<f2", "F16"),
    torch.bfloat16: (None, "BF16"),
}
_ALIGNED = 64  # bytes


def save_prototypes(
    directory: str | os.PathLike[str], file: str | os.PathLike[str]
) -> tuple[torch.Size, torch.dtype]:
    """Write the prototypes of a checkpoint as an array.

    Args:
        directory: a checkpoint with one loss.
        file: a ``.npy``, or a ``.safetensors`` in which they are the tensor "weight". One that is
            there is replaced.

    They are read into the file, so that in memory is no more than one piece of the checkpoint.

    Returns the shape, [C, d] or with K > 1 centers [C, K, d], and the dtype.

    Raises CheckpointError: there are no prototypes, or several, or of a dtype that the format does
    not have; ValueError: the name has another ending; OSError: it cannot be written.
    """
    directory, file = Path(directory), Path(file)
    if file.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{file}: its name must end in .npy or .safetensors")
    metadata, about = read(directory)
    losses = list(about["classes"])
    if len(losses) != 1:
        raise CheckpointError(
            f"{directory}: must have the prototypes of one loss, has "
            f"{', '.join(losses) or 'no loss'}"
        )
    name = SavedNames(metadata.state_dict_metadata).find(losses[0]) or losses[0]
    entry = metadata.state_dict_metadata[name]
    header = _header(file, entry.size, entry.properties.dtype)

    def write(handle: IO[bytes]) -> None:
        handle.write(header)
        handle.flush()
        # Not a file with holes: where a disk is full, filling these would end the process.
        size = math.prod(entry.size) * entry.properties.dtype.itemsize
        os.posix_fallocate(handle.fileno(), len(header), size)
        content = np.memmap(handle.name, np.uint8, "r+", offset=len(header))
        array = torch.from_numpy(content).view(entry.properties.dtype).view(entry.size)
        read_tensors({name: array}, checkpoint_id=directory, no_dist=True)
        content.flush()

    write_file(file, write)
    return entry.size, entry.properties.dtype


def _header(file: Path, shape: torch.Size, dtype: torch.dtype) -> bytes:
    of_numpy, of_safetensors = _NAMES.get(dtype, (None, None))
    if file.suffix == ".npy":
        if of_numpy is None:
            raise CheckpointError(
                f"{file}: NumPy has no {str(dtype).removeprefix('torch.')}; a .safetensors has"
            )
        about: Any = {"descr": of_numpy, "fortran_order": False, "shape": tuple(shape)}
        begin, text, end = b"\x93NUMPY\x01\x00", repr(about), "\n"
        length_bytes = 2
    else:
        size = math.prod(shape) * dtype.itemsize
        about = {"dtype": of_safetensors, "shape": list(shape), "data_offsets": [0, size]}
        begin, text, end = b"", json.dumps({"weight": about}), ""
        length_bytes = 8
    used = len(begin) + length_bytes + len(text) + len(end)
    text += " " * (-used % _ALIGNED) + end
    return begin + len(text).to_bytes(length_bytes, "little") + text.encode()
