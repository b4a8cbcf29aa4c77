"""A teacher's stored parts besides its shards: the codec's parameters and the metadata of its array of codes."""

from __future__ import annotations

__all__ = [
    "accepted_codes_metadata",
    "check_codes",
    "check_teacher",
    "codec_shard_spec",
    "codes_metadata",
    "describe_parameters",
    "publish_parameters",
    "read_parameters",
    "shard_spec",
]

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdcache.documents import (
    CacheDocument,
    CodecSpec,
    Parameter,
    Record,
    Spectral,
    TeacherDocument,
    TopK,
    differences,
)
from kdcache.errors import CodecError, DocumentError, ShapeError
from kdcache.store import arrays, layout
from kdcache.store.checksums import CHECKSUM_BYTES
from kdcache.store.codes_reader import CodesReader, has_fill
from kdcache.store.files import CacheFiles
from kdcache.store.place import Place
from kdcache.store.reader import Expected, ShardedReader
from kdcache.store.shards import ShardSpec, checksums_of_chunks, decode_shard, encode_shard

if TYPE_CHECKING:
    import zarr

_FILLS: dict[str, int | float] = {"uint8": 255, "uint16": 65_535, "float16": math.nan, "float32": math.nan}
_DIMENSIONS = ("row", "column")


@dataclass(frozen=True, slots=True)
class PublishedShard:
    """The shard that stands after `CacheStore.publish_shard`.

    Parameters
    ----------
    num_bytes : int
        Size of the stored object.
    sha256 : str
        Its digest.
    created : bool
        False when another writer's shard stood there already: all else is then of that one.
    chunk_checksums : str
        The checksums that end its chunks, in hexadecimal, one behind the other.
    """

    num_bytes: int
    sha256: str
    created: bool
    chunk_checksums: str


def shard_spec(teacher_document: TeacherDocument, cache_document: CacheDocument) -> ShardSpec:
    """Give shape and coding of a teacher's shards.

    Raises
    ------
    ShapeError
        The documents ask for a chunk that cannot be stored.
    """
    return codec_shard_spec(
        teacher_document.codec,
        shard_rows=cache_document.shard_rows,
        chunk_rows=teacher_document.chunk_rows or cache_document.chunk_rows,
        num_columns=teacher_document.num_columns,
        storage_dtype=teacher_document.storage_dtype,
    )


def check_teacher(teacher_document: TeacherDocument, cache_document: CacheDocument, *, place: Place) -> None:
    """Hold a stored teacher's document against the cache document.

    Raises
    ------
    CorruptCacheError
        They tell of other classes, or of chunks that no one can have stored.
    """
    if teacher_document.num_classes != cache_document.num_classes:
        told = f"{teacher_document.num_classes} classes, the cache document of {cache_document.num_classes}"
        raise place.corrupt(f"the teacher's document tells of {told}")
    try:
        shard_spec(teacher_document, cache_document)
    except ShapeError as error:
        raise place.corrupt(f"the teacher's document contradicts the cache document ({error})") from error


def codec_shard_spec(
    codec: CodecSpec, *, shard_rows: int, chunk_rows: int, num_columns: int, storage_dtype: str
) -> ShardSpec:
    """Give shape and coding of shards of a codec's codes.

    Parameters
    ----------
    codec : codec spec
    shard_rows, chunk_rows : int
    num_columns : int
        Columns of a row of codes.
    storage_dtype : str
        Their type.

    Raises
    ------
    ShapeError
        Such a chunk cannot be stored.
    """
    by_column = isinstance(codec, Spectral | TopK)
    return ShardSpec(shard_rows, chunk_rows, num_columns, storage_dtype, _FILLS[storage_dtype], by_column=by_column)


def codes_metadata(teacher_document: TeacherDocument, cache_document: CacheDocument) -> dict[str, Any]:
    """Give the Zarr metadata of a teacher's array of codes: they follow from the two documents alone."""
    spec = shard_spec(teacher_document, cache_document)
    return arrays.sharded_array_metadata(cache_document.num_shards, spec, dimension_names=_DIMENSIONS)


def accepted_codes_metadata(
    teacher_document: TeacherDocument, cache_document: CacheDocument
) -> tuple[dict[str, Any], ...]:
    """Give the metadata that may stand for a teacher's array: what this release writes, then what earlier ones wrote.

    Raises
    ------
    ShapeError
        The documents ask for a chunk that cannot be stored.
    """
    spec = shard_spec(teacher_document, cache_document)
    return (codes_metadata(teacher_document, cache_document), *_earlier_metadata(spec, cache_document))


def check_codes(
    root: zarr.Group, teacher_document: TeacherDocument, cache_document: CacheDocument, *, place: Place
) -> None:
    """Hold what zarr-python sees of a teacher's codes against the documents.

    Raises
    ------
    CorruptCacheError
        zarr-python cannot open the array, or sees another shape, type or layout.
    """
    spec = shard_spec(teacher_document, cache_document)
    expected = (
        (cache_document.num_shards * spec.shard_rows, spec.num_columns),
        (spec.shard_rows, spec.num_columns),
        (spec.chunk_rows, spec.num_columns),
        spec.dtype,
    )
    try:
        array = root[f"{layout.teacher_group(teacher_document.name)}/{layout.CODES}"]
        found = (array.shape, array.shards, array.chunks, str(array.dtype))  # type: ignore[union-attr]
    except (KeyError, ValueError, AttributeError) as error:
        raise place.corrupt(f"zarr-python cannot open the array: {error}") from error
    if found != expected:
        raise place.corrupt(f"zarr-python sees (shape, shard, chunk, type) {found}, expected {expected}")


def publish_shard(
    files: CacheFiles,
    teacher_document: TeacherDocument,
    cache_document: CacheDocument,
    shard_index: int,
    codes: npt.NDArray[Any],
) -> PublishedShard:
    """Encode and store one shard of a teacher's codes unless one stands there; see `CacheStore.publish_shard`."""
    spec = shard_spec(teacher_document, cache_document)
    place = files.shard_place(teacher_document.name, shard_index)
    expected = (cache_document.rows_in_shard(shard_index), spec.num_columns)
    if not 0 <= shard_index < cache_document.num_shards or codes.shape != expected:
        raise ShapeError(f"{place}: the shard takes codes of shape {expected}, not {codes.shape}; nothing was written")
    if has_fill(codes, spec.fill):
        raise CodecError(
            f"{place}: the codes hold the fill code {spec.fill}, which means a row that does not exist; nothing "
            "was written. The codec must not give this code for any logit."
        )
    data = encode_shard(codes, spec)
    created = files.objects.publish(place.key, data)
    if not created:
        data = files.read(place)
        decode_shard(data, spec, place=place)  # a record must never vouch for a damaged shard
    checksums = checksums_of_chunks(data, spec, place=place)
    return PublishedShard(len(data), hashlib.sha256(data).hexdigest(), created, checksums.hex())


def open_codes(
    files: CacheFiles,
    teacher_document: TeacherDocument,
    cache_document: CacheDocument,
    *,
    cache_bytes: int,
    record_of: Callable[[int], Record | None] | None = None,
) -> CodesReader:
    """Give a reader of a teacher's codes; reads the array's metadata and nothing else.

    With `record_of`, which gives the record of a shard by its number, chunks are held against it.

    Raises
    ------
    CorruptCacheError
        The array's metadata are missing, or contradict the documents.
    """
    name = teacher_document.name
    spec = shard_spec(teacher_document, cache_document)
    accepted = accepted_codes_metadata(teacher_document, cache_document)
    place = files.teacher_place(layout.metadata_key(f"{layout.teacher_group(name)}/{layout.CODES}"), name)
    standing = files.read_json(place)
    if standing is None:
        raise place.corrupt("the file is missing")
    if standing not in accepted:
        told = [f"{path}: expected {ours}, found {theirs}" for path, ours, theirs in differences(accepted[0], standing)]
        raise place.corrupt(f"the array is not as the documents say ({'; '.join(told[:3])})")
    place_of = functools.partial(files.shard_place, name)
    expected_of = None if record_of is None else functools.partial(_expected, files, teacher_document, spec, record_of)
    reader = ShardedReader(
        files.objects, place_of, spec, cache_document.num_shards, cache_bytes=cache_bytes, expected_of=expected_of
    )
    return CodesReader(reader, cache_document, place_of)


def _expected(
    files: CacheFiles,
    teacher_document: TeacherDocument,
    spec: ShardSpec,
    record_of: Callable[[int], Record | None],
    shard_index: int,
) -> Expected:
    """Give what a shard's record says of it; no checksums of its chunks where it is of an earlier release."""
    place = files.record_place(teacher_document.name, shard_index)
    try:
        record = record_of(shard_index)
    except DocumentError as error:
        raise place.corrupt(f"the record cannot be read: {error}") from error
    if record is None:
        raise place.corrupt("the record is missing, so that nothing says which shard belongs here")
    if record.document_digest not in {None, teacher_document.digest()}:
        raise place.corrupt(
            "the shard was encoded under another document than the teacher's, which would decode it wrongly"
        )
    if record.chunk_checksums is None:
        return Expected(record.num_bytes)
    checksums = bytes.fromhex(record.chunk_checksums)
    if len(checksums) != spec.num_chunks * CHECKSUM_BYTES:
        raise place.corrupt(
            f"the record names {len(checksums) // CHECKSUM_BYTES} chunks, and the shard has {spec.num_chunks}"
        )
    return Expected(record.num_bytes, checksums)


def _earlier_metadata(spec: ShardSpec, cache_document: CacheDocument) -> list[dict[str, Any]]:
    """Give the metadata that earlier releases wrote for such an array."""
    return [
        arrays.sharded_array_metadata(
            cache_document.num_shards, spec, dimension_names=_DIMENSIONS, compression=compression
        )
        for compression in spec.earlier_compressions
    ]


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
