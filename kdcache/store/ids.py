"""Example ids as arrays: int64 or `str`, converted from nothing but integers and kinds of string."""

from __future__ import annotations

__all__ = ["ExampleIds", "ids_as_given", "normal_ids", "outside_int64"]

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import TransferSetError

ExampleIds = Sequence[int] | Sequence[str] | npt.NDArray[Any]
"""Ids as callers give them; a tensor of integers, such as a DataLoader collates, is taken too."""

_INT64 = np.iinfo(np.int64)


def normal_ids(example_ids: ExampleIds) -> npt.NDArray[Any]:
    """Give ids as int64 or as an object array of `str`.

    Raises
    ------
    TransferSetError
        The ids are no list, are of another type, such as bool or float, are mixed, or lie outside int64.
    """
    ids = ids_as_given(example_ids)
    outside = outside_int64(ids)
    if outside.any():
        raise TransferSetError(
            f"example id {ids[outside][0]} lies outside int64, {_INT64.min} to {_INT64.max}; give such ids as strings, "
            "such as [str(value) for value in ids]"
        )
    return ids


def ids_as_given(example_ids: ExampleIds) -> npt.NDArray[Any]:
    """Give ids as int64, as an object array of `str`, or as one of `int` where some lie outside int64.

    Raises
    ------
    TransferSetError
        The ids are no list, are of another type, such as bool or float, or are mixed.
    """
    ids = _array_of(example_ids)
    if ids.ndim == 0:
        raise _no_list(example_ids)
    if ids.ndim != 1:
        raise TransferSetError(f"example ids have one axis, not {ids.ndim}")
    if ids.dtype.kind in "UT":
        return ids.astype(object)
    if ids.dtype.kind == "u":
        ids = ids.astype(np.int64 if int(ids.max(initial=0)) <= _INT64.max else object)
    if ids.dtype.kind == "i":
        return ids.astype(np.int64, copy=False)
    if not ids.size or (ids.dtype.kind == "O" and all(isinstance(value, str) for value in ids)):
        return ids.astype(object, copy=False)
    if ids.dtype.kind == "O" and all(_is_integer(value) for value in ids):
        return _integers(ids)
    kinds = sorted({type(value).__name__ for value in ids[:1000].tolist()})
    raise TransferSetError(
        f"example ids are all str or all int64, not {' and '.join(kinds)} ({ids.dtype}); convert them, such as "
        "[str(value) for value in ids]"
    )


def outside_int64(ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which ids of `ids_as_given` are integers outside int64."""
    if ids.dtype.kind == "i" or not ids.size or isinstance(ids[0], str):
        return np.zeros(len(ids), bool)
    return np.array([not _INT64.min <= value <= _INT64.max for value in ids], bool)


def _array_of(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "__array__"):
        return _array_of_tensor(values)
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise _no_list(values)
    return np.fromiter(values, dtype=object, count=len(values))


def _array_of_tensor(values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, RuntimeError) as error:  # types that NumPy does not know, such as bfloat16
        raise TransferSetError(
            f"example ids are all str or all int64, not a {type(values).__name__} that NumPy cannot hold ({error})"
        ) from error


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _integers(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # Each by itself: NumPy makes floats of a list that mixes signed and unsigned integers.
    plain = np.fromiter((int(value) for value in ids), dtype=object, count=len(ids))
    try:
        return plain.astype(np.int64)
    except OverflowError:
        return plain


def _no_list(values: object) -> TransferSetError:
    return TransferSetError(
        f"example ids are a list, a tuple or an array of one axis, not a {type(values).__name__} "
        f"({reprlib.repr(values)}); for a single example give a list of one id, [example_id]"
    )
