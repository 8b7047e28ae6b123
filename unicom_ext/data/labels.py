"""Labels of rows that lie in files, such as `unicom-ext cluster` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unicom_ext.utils.settings import ConfigError


def read_labels(name: str, path: str | Path, count: int) -> np.ndarray:
    """The labels int64 [count] in a .npy file, or in the labels_*.npy of a directory, in the order
    of their numbers.

    name: what a ConfigError calls them. Negative labels stand for rows without one; at least one
    must not be.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("labels_*.npy"), key=lambda file: (len(file.name), file.name))
    try:
        labels = np.concatenate([np.load(file) for file in files])
    except (OSError, ValueError) as error:
        reason = error if files else "there is no labels_*.npy"
        raise ConfigError(f"{name}: {path} cannot be read: {reason}") from None
    if labels.dtype.kind not in "iu" or labels.shape != (count,) or not (labels >= 0).any():
        raise ConfigError(
            f"{name}: {path} holds {labels.dtype} {list(labels.shape)}, must be integers "
            f"[{count}], one for each row, not all negative"
        )
    return labels.astype(np.int64)
