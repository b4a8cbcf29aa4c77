"""A teacher's stored parts besides its shards: the codec's parameters and the metadata of its array of codes."""

from __future__ import annotations

__all__ = ["codes_metadata", "describe_parameters", "publish_parameters", "read_parameters", "shard_spec"]

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument, Parameter, TeacherDocument
from kdcache.store import arrays, layout
from kdcache.store.files import CacheFiles
from kdcache.store.shards import ShardSpec

_FILLS: dict[str, int | float] = {"uint8": 255, "uint16": 65_535, "float16": math.nan, "float32": math.nan}


def shard_spec(teacher_document: TeacherDocument, cache_document: CacheDocument) -> ShardSpec:
    """Give shape and coding of a teacher's shards.

    Raises
    ------
    ShapeError
        The documents ask for a chunk that cannot be stored.
    """
    return ShardSpec(
        cache_document.shard_rows,
        cache_document.chunk_rows,
        teacher_document.num_columns,
        teacher_document.storage_dtype,
        _FILLS[teacher_document.storage_dtype],
    )


def codes_metadata(teacher_document: TeacherDocument, cache_document: CacheDocument) -> dict[str, Any]:
    """Give the Zarr metadata of a teacher's array of codes: they follow from the two documents alone."""
    spec = shard_spec(teacher_document, cache_document)
    return arrays.sharded_array_metadata(cache_document.num_shards, spec, dimension_names=("row", "column"))


def describe_parameters(parameters: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, Parameter], str | None]:
    """Describe a codec's parameters.

    Returns
    -------
    described : dict of str to Parameter
        Type, shape and digest of each.
    group : str or None
        The name of the group for them, made from all of this; None where there are no parameters.
    """
    described = {name: _describe(array) for name, array in sorted(parameters.items())}
    if not described:
        return described, None
    text = json.dumps({name: item.to_mapping() for name, item in described.items()}, sort_keys=True)
    return described, f"parameters-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def publish_parameters(files: CacheFiles, group: str, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
    """Store parameters in a group, each as a Zarr array of one chunk with a checksum, and check those that stand.

    Raises
    ------
    CorruptCacheError
        A parameter that stands is damaged, or is another one.
    """
    for name, array in sorted(parameters.items()):
        node = f"{group}/{name}"
        if array.size:
            files.publish_small_array(files.parameter_place(layout.chunk_key(node, (0,) * array.ndim)), array)
        axes = [f"{name}_{axis}" for axis in range(array.ndim)]
        metadata = arrays.small_array_metadata(array, dimension_names=axes)
        files.publish_metadata(files.parameter_place(layout.metadata_key(node)), metadata)
    files.publish_metadata(files.parameter_place(layout.metadata_key(group)), arrays.group_metadata({}))


def read_parameters(files: CacheFiles, document: TeacherDocument) -> dict[str, npt.NDArray[Any]]:
    """Read a codec's parameters and check each against its digest in the teacher's document.

    Raises
    ------
    CorruptCacheError
        A parameter is missing, torn or altered.
    """
    group = f"{layout.teacher_group(document.name)}/{document.parameters_group}"
    parameters: dict[str, npt.NDArray[Any]] = {}
    for name, described in document.parameters.items():
        key = layout.chunk_key(f"{group}/{name}", (0,) * len(described.shape))
        place = files.teacher_place(key, document.name)
        data = files.read(place) if math.prod(described.shape) else arrays.encode_small_array(np.empty(0, np.uint8))
        array = arrays.decode_small_array(data, dtype=described.dtype, shape=described.shape, place=place)
        if _describe(array).sha256 != described.sha256:
            raise place.corrupt(f"parameter {name!r} has not the digest that the teacher's document names")
        parameters[name] = array
    return parameters


def _describe(array: npt.NDArray[Any]) -> Parameter:
    return Parameter.make(
        dtype=array.dtype.newbyteorder("=").name,
        shape=tuple(array.shape),
        sha256=hashlib.sha256(arrays.small_array_bytes(array)).hexdigest(),
    )
