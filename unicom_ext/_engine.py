"""The engine, libunicom.so, over NumPy arrays: the tensor-free core, and what this build is.

It is called through its C interface (csrc/bind/interface.cpp), which knows neither torch nor
Python: one binary serves every Python, and loads where torch does not. Arguments are checked here,
as C checks nothing.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Labels: TypeAlias = NDArray[np.int32] | NDArray[np.int64]

_LIBRARY = ctypes.CDLL(str(Path(__file__).with_name("libunicom.so")))


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_LIBRARY, f"unicom_{name}")
    function.restype, function.argtypes = result, arguments
    return function


_margin = {
    np.dtype(np.float32): _function(
        "margin_float32", None, c_void_p, c_int64, *[c_float] * 3, *[c_bool] * 2, *[c_void_p] * 2
    ),
    np.dtype(np.float64): _function(
        "margin_float64", None, c_void_p, c_int64, *[c_double] * 3, *[c_bool] * 2, *[c_void_p] * 2
    ),
}
_bijection = _function("bijection", None, c_void_p, c_int64, c_int64, c_uint64, c_void_p)
_block_order = _function("block_order", None, c_uint64, c_void_p)
_constant_exponent = _function("constant_exponent", c_bool, c_double, c_double, c_void_p)
_sample_size = _function("sample_size", c_int64, c_double, c_int64)
_block_quotas = _function("block_quotas", None, *[c_int64] * 4, c_void_p)
_selection_bound = _function("selection_bound", c_int64, *[c_int64] * 5)
_find_bad_label = _function("find_bad_label", c_int64, c_void_p, c_bool, *[c_int64] * 3)
_select_classes = _function(
    "select_classes", c_bool, c_void_p, c_bool, *[c_int64] * 8, c_int, c_int64, *[c_void_p] * 3
)
_select_features = _function("select_features", c_bool, *[c_int64] * 4, c_void_p)
_capabilities = _function("capabilities", c_int, ctypes.POINTER(c_char_p))
_capability = _function("capability", c_char_p)
_set_capability = _function("set_capability", c_bool, c_char_p)
_advise_huge_pages = _function("advise_huge_pages", None, c_void_p, c_size_t)
_compiler = _function("compiler", c_char_p)
_cxx_standard = _function("cxx_standard", c_int64)
_build_flags = _function("build_flags", c_char_p)

BLOCK_SIZE: int = _function("block_size", c_int64)()
MAX_CLASSES: int = _function("max_classes", c_int64)()

_INT64 = (-(2**63), 2**63 - 1)
_IS_64_BIT: dict[object, bool] = {np.dtype(np.int32): False, np.dtype(np.int64): True}


def _integer(name: str, value: SupportsIndex, least: int, most: int, most_is: str = "") -> int:
    """value, of any type that is an integer; C would take what fits of a larger one."""
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be in [{least}, {most_is or most}], got {number}")
    return number


def _sample(name: str, size: int, most: int, count: int, least: int) -> tuple[int, int]:
    """(size, count), of which `count` are to be drawn of `size`."""
    size = _integer(name, size, 1, most)
    return size, _integer("count", count, least, size, f"{name} = {size}")


def _vector_of_labels(labels: _Labels) -> tuple[NDArray[Any], bool]:
    """The labels without gaps between them, and whether they are of 64 bits."""
    kind = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
    if kind not in _IS_64_BIT:
        raise TypeError(f"labels must be an array of int32 or int64, got {kind}")
    if labels.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got {labels.ndim} dimensions")
    return np.ascontiguousarray(labels), _IS_64_BIT[kind]


def margin(
    cosine: ArrayLike,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    exact: bool = False,
    linear: bool = False,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(psi, slope) of the combined margin at each cosine; m2 in radians.

    In float32 where the cosines are of it, in float64 otherwise.
    """
    values = np.asarray(cosine)
    real = np.float32 if values.dtype == np.float32 else np.float64
    values = np.asarray(values, real, order="C")
    if not 0 < real(m1) <= np.finfo(real).max:
        raise ValueError(f"m1 must be positive and finite, got {m1}")
    psi, slope = np.empty_like(values), np.empty_like(values)
    results = psi.ctypes.data, slope.ctypes.data
    _margin[values.dtype](values.ctypes.data, values.size, m1, m2, m3, exact, linear, *results)
    return psi, slope


def bijection(index: ArrayLike, size: int, key: int) -> NDArray[np.int64]:
    """The image of each index under the keyed bijection on [0, size)."""
    size = _integer("size", size, 1, 2**62, "2**62")
    key = _integer("key", key, 0, 2**64 - 1)
    values = np.asarray(index)
    if values.size and values.dtype.kind not in "iu":  # NumPy would cut off what is behind a point
        raise TypeError(f"index must be integers, got {values.dtype}")
    values = np.asarray(values, np.int64, order="C")
    if outside := values[(values < 0) | (values >= size)].tolist():
        raise ValueError(f"index must be in [0, size = {size}), got {outside[0]}")
    image = np.empty_like(values)
    _bijection(values.ctypes.data, values.size, size, key, image.ctypes.data)
    return image


def block_order(key: int) -> NDArray[np.int64]:
    """The keyed order of the 256 positions of a block."""
    positions = np.empty(BLOCK_SIZE, np.int64)
    _block_order(_integer("key", key, 0, 2**64 - 1), positions.ctypes.data)
    return positions


def constant_exponent(scale: float, count: float) -> int | None:
    """Power of two that shifts the logits of `count` classes, None where no constant can."""
    exponent = c_int64()
    return exponent.value if _constant_exponent(scale, count, ctypes.byref(exponent)) else None


def sample_size(rate: float, population: int) -> int:
    """rate * population, rounded half up; rate in [0, 1]."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    return int(_sample_size(rate, _integer("population", population, 0, 2**53, "2**53")))


def block_quotas(num_classes: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    """How many classes each block of 256 draws when it holds no positives."""
    num_classes, count = _sample("num_classes", num_classes, MAX_CLASSES, count, 0)
    seed, step = _integer("seed", seed, *_INT64), _integer("step", step, *_INT64)
    quotas = np.empty(-(-num_classes // BLOCK_SIZE), np.int64)
    _block_quotas(num_classes, count, seed, step, quotas.ctypes.data)
    return quotas


def find_bad_label(labels: _Labels, num_classes: int, ignore_index: int) -> int:
    """Position of the first label neither in [0, num_classes) nor ignore_index; -1 if none."""
    values, is_64_bit = _vector_of_labels(labels)
    num_classes = _integer("num_classes", num_classes, *_INT64)
    ignore_index = _integer("ignore_index", ignore_index, *_INT64)
    return int(
        _find_bad_label(values.ctypes.data, is_64_bit, values.size, num_classes, ignore_index)
    )


def select_classes(
    labels: _Labels,
    num_classes: int,
    count: int,
    seed: int,
    step: int,
    ignore_index: int,
    start: int,
    stop: int,
    threads: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(class_index, slot): sorted ids in [start, stop), and each label's position among them."""
    values, is_64_bit = _vector_of_labels(labels)
    num_classes, count = _sample("num_classes", num_classes, MAX_CLASSES, count, 0)
    stop = _integer("stop", stop, 0, num_classes, f"num_classes = {num_classes}")
    start = _integer("start", start, 0, stop, f"stop = {stop}")
    seed, step = _integer("seed", seed, *_INT64), _integer("step", step, *_INT64)
    ignore_index = _integer("ignore_index", ignore_index, *_INT64)
    threads = _integer("threads", threads, 1, 2**31 - 1)
    bound = _selection_bound(num_classes, count, values.size, start, stop)
    class_index, slot = np.empty(bound, np.int64), np.empty(values.size, np.int64)
    selected = c_int64()
    if not _select_classes(
        values.ctypes.data,
        is_64_bit,
        values.size,
        num_classes,
        count,
        seed,
        step,
        ignore_index,
        start,
        stop,
        threads,
        bound,
        class_index.ctypes.data,
        ctypes.byref(selected),
        slot.ctypes.data,
    ):
        raise MemoryError(f"there is no memory to select {count} of {num_classes} classes")
    return class_index[: selected.value], slot


def select_features(dim: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    """Sorted feature dimensions, `count` of `dim`."""
    dim, count = _sample("dim", dim, _INT64[1], count, 1)
    seed, step = _integer("seed", seed, *_INT64), _integer("step", step, *_INT64)
    feature_index = np.empty(count, np.int64)
    if not _select_features(dim, count, seed, step, feature_index.ctypes.data):
        raise MemoryError(f"there is no memory to select {count} of {dim} dimensions")
    return feature_index


def cpu_capabilities() -> list[str]:
    """Instruction sets with kernels that this CPU can run, the best last."""
    names = (c_char_p * 5)()
    return [(name or b"").decode() for name in names[: _capabilities(names)]]


def cpu_capability() -> str:
    """The instruction set in use."""
    return str(_capability().decode())


def set_cpu_capability(name: str) -> bool:
    """Choose an instruction set; False if this CPU or build does not have it."""
    return "\0" not in name and bool(_set_capability(name.encode()))  # where C's strings end


def advise_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages where `size` bytes of fresh memory lie."""
    _advise_huge_pages(address, size)


def build_info() -> dict[str, str | int]:
    """Compiler, C++ standard and flags of this build."""
    return {
        "compiler": _compiler().decode(),
        "cxx_standard": _cxx_standard(),
        "flags": _build_flags().decode(),
    }
