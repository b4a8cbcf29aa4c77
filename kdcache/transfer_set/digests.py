"""Digests: what an example's input is, independent of the container it came in, and what a transfer set is."""

from __future__ import annotations

__all__ = ["DIGEST_BYTES", "input_digest", "row_digests", "transfer_set_digest"]

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdcache.errors import TransferSetError

DIGEST_BYTES = 16
"""A 128-bit digest: no two different inputs of any real transfer set share one."""


def input_digest(value: Any) -> bytes:
    """Digest an input: equal content gives equal digests, whether it comes as a NumPy array or a torch tensor.

    Parameters
    ----------
    value : array, tensor, str, bytes, number, None, or mappings and sequences of these
        One example's input. An object with ``__array_interface__``, such as a PIL image, counts as its array.

    Returns
    -------
    bytes
        BLAKE2b, 16 bytes.

    Raises
    ------
    TransferSetError
        The input holds something that cannot be digested.
    """
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in _parts(value):
        hasher.update(part)
    return hasher.digest()


def row_digests(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Digest each row of an array as `input_digest` would digest ``values[i]``.

    Parameters
    ----------
    values : ndarray or Tensor [example, ...]

    Returns
    -------
    ndarray [example, 16] uint8
    """
    array = _as_array(values)
    if not len(array):
        return np.empty((0, DIGEST_BYTES), np.uint8)
    header = hashlib.blake2b(_array_header(array.dtype, array.shape[1:]), digest_size=DIGEST_BYTES)
    rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    digests = np.empty((len(array), DIGEST_BYTES), np.uint8)
    for index, row in enumerate(rows):
        hasher = header.copy()
        hasher.update(row.data)
        digests[index] = np.frombuffer(hasher.digest(), np.uint8)
    return digests


def transfer_set_digest(
    example_ids: np.ndarray, num_rows: np.ndarray, labels: np.ndarray | None, input_digests: np.ndarray | None
) -> str:
    """SHA-256 over ids, row counts, labels and input digests, in row order.

    Parameters
    ----------
    example_ids : ndarray [example] int64, or object of str
    num_rows : ndarray [example] int
    labels : ndarray [example] int, optional
    input_digests : ndarray [example, 16] uint8, optional
    """
    hasher = hashlib.sha256(b"kdcache transfer set 1\n")
    counts, classes = num_rows.astype("<i4"), None if labels is None else labels.astype("<i8")
    parts = (("num_rows", counts), ("labels", classes), ("input_digests", input_digests))
    for name, array in (*_ids_in_parts(example_ids), *parts):
        hasher.update(name.encode() + b"\n")
        if array is not None:
            hasher.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


def _ids_in_parts(ids: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
    if ids.dtype == np.int64:
        yield "int64", ids.astype("<i8")
        return
    texts = [text.encode() for text in ids]
    yield "string lengths", np.array([len(text) for text in texts], "<i8")
    yield "string", np.frombuffer(b"".join(texts), np.uint8)


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        yield b"mapping|%d|" % len(value)
        for key in sorted(value):
            yield from _parts(str(key))
            yield from _parts(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield b"sequence|%d|" % len(value)
        for item in value:
            yield from _parts(item)
    else:
        yield from _leaf(value)


def _leaf(value: Any) -> Iterator[bytes]:
    if isinstance(value, str | bytes):
        raw = value.encode() if isinstance(value, str) else value
        yield b"%s|%d|" % (type(value).__name__.encode(), len(raw)) + raw
    elif value is None or isinstance(value, bool | int):
        yield f"{type(value).__name__}|{value}|".encode()
    elif type(value) is float:
        yield b"float|" + struct.pack("<d", value)
    else:
        array = _as_array(value)
        yield _array_header(array.dtype, array.shape)
        yield np.ascontiguousarray(array).tobytes()


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = np.asarray(value) if isinstance(value, np.generic) or hasattr(value, "__array_interface__") else None
    if array is None or array.dtype.hasobject:
        raise TransferSetError(
            f"an input holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be digested; give "
            "arrays, tensors, text, bytes, numbers, or mappings and sequences of these, or make the TransferSet with "
            "digest_inputs=False (changed inputs are then not noticed)"
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _array_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return f"array|{dtype.str}|{shape}|".encode()
