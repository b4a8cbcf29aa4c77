"""Zarr metadata: the JSON documents that describe a cache's groups and arrays, and small arrays of one chunk."""

from __future__ import annotations

__all__ = [
    "array_metadata",
    "consolidated_metadata",
    "decode_small_array",
    "encode_small_array",
    "group_metadata",
    "sharded_array_metadata",
    "small_array_bytes",
    "small_array_codecs",
    "small_array_metadata",
    "to_json",
]

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.store.checksums import CHECKSUM_BYTES, is_sound, with_checksum
from kdcache.store.place import Place
from kdcache.store.shards import Compression, ShardSpec, bytes_codec


def to_json(mapping: Mapping[str, Any]) -> bytes:
    """Give a metadata document as JSON with sorted keys: equal documents give equal bytes."""
    return (json.dumps(mapping, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give the metadata of a Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def array_metadata(
    shape: Sequence[int],
    *,
    dtype: str,
    chunk_shape: Sequence[int],
    fill: float,
    codecs: list[dict[str, Any]],
    dimension_names: Sequence[str],
) -> dict[str, Any]:
    """Give the metadata of a Zarr v3 array; `chunk_shape` is that of a stored object."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(fill) else fill,
        "codecs": codecs,
        "dimension_names": list(dimension_names),
        "attributes": {},
        "storage_transformers": [],
    }


def sharded_array_metadata(
    num_shards: int, spec: ShardSpec, *, dimension_names: Sequence[str], compression: Compression | None = None
) -> dict[str, Any]:
    """Give the metadata of an array of whole shards [row, column]; `compression` is the present one where absent."""
    return array_metadata(
        (num_shards * spec.shard_rows, spec.num_columns),
        dtype=spec.dtype,
        chunk_shape=(spec.shard_rows, spec.num_columns),
        fill=spec.fill,
        codecs=spec.codecs(compression),
        dimension_names=dimension_names,
    )


def small_array_metadata(array: npt.NDArray[Any], *, dimension_names: Sequence[str]) -> dict[str, Any]:
    """Give the metadata of an array that is kept as one chunk with a checksum."""
    dtype = array.dtype.newbyteorder("=").name
    return array_metadata(
        array.shape,
        dtype=dtype,
        chunk_shape=[max(1, length) for length in array.shape],
        fill=0,
        codecs=small_array_codecs(dtype),
        dimension_names=dimension_names,
    )


def small_array_codecs(dtype: str) -> list[dict[str, Any]]:
    """Give the codecs of an array that is kept as one chunk with a checksum."""
    return [bytes_codec(dtype), {"name": "crc32c"}]


def small_array_bytes(array: npt.NDArray[Any]) -> bytes:
    """Give an array's little-endian bytes in C order."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="C")


def encode_small_array(array: npt.NDArray[Any]) -> bytes:
    """Encode an array as one chunk: little-endian bytes in C order, then their CRC-32C."""
    body = small_array_bytes(array)
    return with_checksum(body)


def decode_small_array(data: bytes, *, dtype: str, shape: Sequence[int], place: Place) -> npt.NDArray[Any]:
    """Check and decode an array of one chunk.

    Raises
    ------
    CorruptCacheError
        The size or the checksum does not match.
    """
    little = np.dtype(dtype).newbyteorder("<")
    expected = math.prod(shape) * little.itemsize + CHECKSUM_BYTES
    if len(data) != expected:
        raise place.corrupt(f"the array has {len(data)} bytes where its shape {tuple(shape)} takes {expected}")
    body = data[:-CHECKSUM_BYTES]
    if not is_sound(data):
        raise place.corrupt("the array's checksum does not match: its bytes were altered")
    return np.frombuffer(body, dtype=little).reshape(tuple(shape)).astype(np.dtype(dtype))


def consolidated_metadata(root: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give a root group's metadata with that of all nodes below it, by path, so that readers need list nothing.

    Parameters
    ----------
    root : mapping
        The root's metadata; consolidated metadata in it are replaced.
    nodes : mapping
        Metadata of every group and array below, by path such as ``teachers/a/codes``.
    """
    inline = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {path: dict(nodes[path]) for path in sorted(nodes)},
    }
    return {**root, "consolidated_metadata": inline}
