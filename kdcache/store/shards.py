"""Shards: a block of rows as the bytes of one stored object, and back.

A *shard* holds `shard_rows` rows as inner *chunks* of `chunk_rows` rows each, one after the other, followed by an index
of their places. It is a Zarr v3 `sharding_indexed` object that any Zarr reader opens. Every chunk is always written,
rows past the last real one hold the *fill code*, and every chunk ends with its own CRC-32C: without one a flipped bit
would read as another number. All here is pure: bytes in, arrays out, no files.
"""

from __future__ import annotations

__all__ = [
    "Compression",
    "ShardSpec",
    "bytes_codec",
    "checksums_of_chunks",
    "decode_chunk",
    "decode_shard",
    "encode_shard",
    "parse_index",
    "shorter_than_index",
]

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from kdcache.errors import CorruptCacheError, ShapeError
from kdcache.store.checksums import CHECKSUM_BYTES, is_sound, with_checksum
from kdcache.store.limits import MAX_CHUNK_BYTES
from kdcache.store.place import Place
from kdcache.store.room import room

_CLEVEL = 1
_BLOCK_BYTES = 512 * 1024
_SHUFFLE_OF = {
    "uint8": "noshuffle",
    "uint16": "shuffle",
    "uint64": "shuffle",
    "float16": "shuffle",
    "float32": "shuffle",
}
# Logits and their codes repeat nothing: all the gain is in entropy coding, for which zstd's lowest level is the best
# and the quickest. Bytes of one significance together, in blocks large enough for a zstd table each, beat
# bits of one significance: docs/design/0002-inner-codec-chain.md has the figures. Where columns differ in their
# spread, as the components of the spectral codec do, each column's codes lie together, and of these the bits.
# Of planes of bits a high level (Blosc's 8 is zstd's 20) makes 2 to 4 % less: docs/design/0004-spectral-codec.md.
_INDEX_ENTRY_BYTES = 16
_BLOSC_HEADER_BYTES = 16
_STRIP_COLUMNS = 64
"""Columns that are turned into rows at a time: one by one or all at once, caches miss two to three times as often."""
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class Compression(NamedTuple):
    """What Blosc is asked for. Its output says all that reading needs, so this binds writers alone.

    Attributes
    ----------
    level
        Blosc's own scale, 1 to 9.
    shuffle
        "noshuffle", "shuffle" or "bitshuffle".
    block_bytes
        What is compressed on its own.
    """

    level: int
    shuffle: str
    block_bytes: int


_BY_COLUMN = Compression(8, "bitshuffle", 128 * 1024)
_BY_COLUMN_EARLIER = (Compression(5, "bitshuffle", 64 * 1024),)


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The shape and coding of an array's shards.

    Parameters
    ----------
    shard_rows : int
        Rows of a shard, a multiple of `chunk_rows`.
    chunk_rows : int
        Rows that are compressed, checked and read together.
    num_columns : int
        Values a row; rows are never split.
    dtype : {"uint8", "uint16", "uint64", "float16", "float32"}
        Stored type, little-endian.
    fill : int or float
        The fill code, that of rows that do not exist.
    by_column : bool, default False
        Lay a chunk down column after column, for columns that differ in their spread.

    Raises
    ------
    ShapeError
        The sizes do not fit each other, or a chunk would decode to more than 256 MiB.
    """

    shard_rows: int
    chunk_rows: int
    num_columns: int
    dtype: str
    fill: int | float
    by_column: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _SHUFFLE_OF:
            raise ShapeError(f"dtype {self.dtype!r} cannot be stored; use one of {', '.join(sorted(_SHUFFLE_OF))}")
        if min(self.shard_rows, self.chunk_rows, self.num_columns) < 1 or self.shard_rows % self.chunk_rows:
            raise ShapeError(
                f"shard_rows {self.shard_rows}, chunk_rows {self.chunk_rows} and num_columns {self.num_columns} must "
                "be positive, and shard_rows a multiple of chunk_rows"
            )
        if self.chunk_bytes > MAX_CHUNK_BYTES:
            raise ShapeError(
                f"a chunk of {self.chunk_rows} rows of {self.num_columns} {self.dtype} takes {self.chunk_bytes} bytes, "
                f"above the {MAX_CHUNK_BYTES} that one may take; choose fewer chunk_rows"
            )

    @property
    def num_chunks(self) -> int:
        """Chunks of a shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return self.num_columns * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, uncompressed."""
        return self.chunk_rows * self.row_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of every shard."""
        return self.num_chunks * _INDEX_ENTRY_BYTES + CHECKSUM_BYTES

    @property
    def little(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def compression(self) -> Compression:
        """How a chunk is compressed when it is written."""
        return _BY_COLUMN if self.by_column else Compression(_CLEVEL, _SHUFFLE_OF[self.dtype], _BLOCK_BYTES)

    @property
    def earlier_compressions(self) -> tuple[Compression, ...]:
        """What earlier releases wrote, and arrays may say for ever."""
        return _BY_COLUMN_EARLIER if self.by_column else ()

    def codecs(self, compression: Compression | None = None) -> list[dict[str, Any]]:
        """Describe the coding as the `codecs` of a Zarr v3 array; with an earlier compression where one is given."""
        checksum = {"name": "crc32c"}
        level, shuffle, block_bytes = compression or self.compression
        blosc_configuration = {
            "cname": "zstd",
            "clevel": level,
            "shuffle": shuffle,
            "typesize": np.dtype(self.dtype).itemsize,
            "blocksize": block_bytes,
        }
        arrangement = [{"name": "transpose", "configuration": {"order": [1, 0]}}] if self.by_column else []
        sharding = {
            "chunk_shape": [self.chunk_rows, self.num_columns],
            "codecs": [
                *arrangement,
                bytes_codec(self.dtype),
                {"name": "blosc", "configuration": blosc_configuration},
                checksum,
            ],
            "index_codecs": [bytes_codec("uint64"), checksum],
            "index_location": "end",
        }
        return [{"name": "sharding_indexed", "configuration": sharding}]


def bytes_codec(dtype: str) -> dict[str, Any]:
    """Describe little-endian bytes as a Zarr v3 codec; single bytes have no order to state."""
    if np.dtype(dtype).itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def encode_shard(rows: npt.NDArray[Any], spec: ShardSpec) -> bytes:
    """Encode up to a shard's number of rows; equal rows give equal bytes.

    Parameters
    ----------
    rows : ndarray [row, column]
        The rows, in the dtype of `spec`; missing ones at the end are stored as the fill code.
    spec : ShardSpec
        Shape and coding.

    Raises
    ------
    ShapeError
        The array is not what `spec` describes.
    """
    _check_rows(rows, spec)
    rows = rows.astype(spec.little, copy=False)
    starts = range(0, len(rows), spec.chunk_rows)
    pieces = [_encode_chunk(_padded(rows[start : start + spec.chunk_rows], spec), spec) for start in starts]
    num_empty = spec.num_chunks - len(pieces)
    if num_empty:
        pieces += [_encode_chunk(_padded(rows[:0], spec), spec)] * num_empty
    lengths = np.array([len(piece) for piece in pieces], dtype="<u8")
    index = np.stack([np.cumsum(lengths, dtype="<u8") - lengths, lengths], axis=1).astype("<u8").tobytes()
    return b"".join([*pieces, with_checksum(index)])


def parse_index(index: bytes, spec: ShardSpec, *, shard_bytes: int, place: Place) -> npt.NDArray[np.int64]:
    """Read the index that ends a shard.

    Parameters
    ----------
    index : bytes
        The last `spec.index_bytes` bytes of the shard.
    spec : ShardSpec
        Shape and coding.
    shard_bytes : int
        Size of the whole shard.
    place : Place
        Where the shard stands.

    Returns
    -------
    ndarray [chunk, 2] of int64
        Start and length in bytes of every chunk.

    Raises
    ------
    CorruptCacheError
        The shard is torn, or its index altered. Chunks must lie one after the other from the first byte up to the
        index, so that a shard that lost or gained bytes anywhere is found out.
    """
    if len(index) != spec.index_bytes:
        raise shorter_than_index(shard_bytes, spec, place=place)
    if not is_sound(index):
        raise place.corrupt("the checksum of the shard's index does not match: the shard is torn or altered")
    entries = np.frombuffer(index[:-CHECKSUM_BYTES], dtype="<u8").reshape(spec.num_chunks, 2)
    body_bytes = shard_bytes - spec.index_bytes
    if entries.max() > body_bytes:  # also keeps the sums below from running over
        raise place.corrupt(f"the shard's index points beyond its {body_bytes} bytes of chunks")
    ends = np.cumsum(entries[:, 1], dtype=np.uint64)
    if ends[-1] != body_bytes or (entries[:, 0] != ends - entries[:, 1]).any():
        raise place.corrupt(
            f"the shard's index does not cover its {body_bytes} bytes of chunks: bytes are lost or added"
        )
    return entries.astype(np.int64)


def checksums_of_chunks(data: bytes, spec: ShardSpec, *, place: Place) -> bytes:
    """Give the checksums that end a shard's chunks, of `CHECKSUM_BYTES` bytes each, in the chunks' order.

    Raises
    ------
    CorruptCacheError
        The shard's index does not fit its bytes.
    """
    index = parse_index(data[-spec.index_bytes :], spec, shard_bytes=len(data), place=place)
    ends = (index[:, 0] + index[:, 1]).tolist()
    return b"".join(data[end - CHECKSUM_BYTES : end] for end in ends)


def shorter_than_index(shard_bytes: int, spec: ShardSpec, *, place: Place) -> CorruptCacheError:
    """Make the error that says that a shard has fewer bytes than its index alone."""
    return place.corrupt(f"the shard has {shard_bytes} bytes, fewer than the {spec.index_bytes} of its index alone")


def decode_chunk(
    data: bytes | memoryview | npt.NDArray[np.uint8],
    spec: ShardSpec,
    *,
    place: Place,
    out: npt.NDArray[Any] | None = None,
    expected: bytes | None = None,
) -> npt.NDArray[Any]:
    """Check and decode one chunk.

    Parameters
    ----------
    data : bytes, memoryview or ndarray of uint8
        The chunk as stored.
    spec : ShardSpec
        Shape and coding.
    place : Place
        Where the shard stands.
    out : ndarray [row, column], optional
        C-contiguous array of the stored dtype to decode into; a new one where absent.
    expected : bytes, optional
        The checksum that the shard's record names for it; any sound chunk will do where absent.

    Returns
    -------
    ndarray [row, column]
        All `chunk_rows` rows, fill codes included.

    Raises
    ------
    CorruptCacheError
        The chunk's checksum does not match, it is not the chunk of the record, or it is not of the size that `spec`
        says. Checked before memory is taken.
    """
    whole = bytes(data) if isinstance(data, memoryview) else data  # the checksum takes no memoryview
    if len(whole) < _BLOSC_HEADER_BYTES + CHECKSUM_BYTES:
        raise place.corrupt(f"a chunk has {len(whole)} bytes, fewer than any chunk can have")
    if not is_sound(whole):
        raise place.corrupt("the checksum of a chunk does not match: bytes of the shard were altered")
    if expected is not None and bytes(whole[-CHECKSUM_BYTES:]) != expected:
        raise place.corrupt(
            "a chunk is sound, but not the one that the shard's record names: another shard stands here, or the record "
            "is another's"
        )
    body = memoryview(whole)[:-CHECKSUM_BYTES]  # type: ignore[arg-type] # arrays are buffers from Python 3.12 on
    decoded_bytes, _, stored_bytes = struct.unpack_from("<III", body, 4)
    if decoded_bytes != spec.chunk_bytes or stored_bytes != len(body):
        raise place.corrupt(f"a chunk holds {decoded_bytes} bytes where the array's shape says {spec.chunk_bytes}")
    if out is None:
        out = np.empty((spec.chunk_rows, spec.num_columns), dtype=spec.little)
    laid = _scratch((spec.num_columns, spec.chunk_rows), spec.little) if spec.by_column else out
    _one_thread()
    try:
        blosc.decompress(body, laid)
    except (RuntimeError, ValueError) as error:
        raise place.corrupt(f"a chunk cannot be decompressed ({error})") from error
    if spec.by_column:
        for first in range(0, spec.num_columns, _STRIP_COLUMNS):
            out[:, first : first + _STRIP_COLUMNS] = laid[first : first + _STRIP_COLUMNS].T
    return out


def decode_shard(
    data: bytes, spec: ShardSpec, *, place: Place, num_rows: int | None = None, expected: bytes | None = None
) -> npt.NDArray[Any]:
    """Check and decode a whole shard.

    Parameters
    ----------
    data : bytes
        The shard as stored.
    spec : ShardSpec
        Shape and coding.
    place : Place
        Where the shard stands.
    num_rows : int, optional
        Rows wanted from the front; all where absent. Chunks beyond are not decoded.
    expected : bytes, optional
        The checksums of all chunks, as the shard's record names them.

    Returns
    -------
    ndarray [row, column]
        The rows in the stored dtype.

    Raises
    ------
    CorruptCacheError
        The shard is torn or altered.
    """
    num_rows = spec.shard_rows if num_rows is None else num_rows
    index = parse_index(data[-spec.index_bytes :], spec, shard_bytes=len(data), place=place)
    num_chunks = -(-num_rows // spec.chunk_rows)
    rows = np.empty((num_chunks * spec.chunk_rows, spec.num_columns), dtype=spec.little)
    view = memoryview(data)
    for chunk_index, (start, length) in enumerate(index[:num_chunks].tolist()):
        first = chunk_index * spec.chunk_rows
        decode_chunk(
            view[start : start + length], spec, place=place, out=rows[first : first + spec.chunk_rows],
            expected=None if expected is None else expected[chunk_index * CHECKSUM_BYTES :][:CHECKSUM_BYTES],
        )  # fmt: skip
    return rows[:num_rows]


def _check_rows(rows: npt.NDArray[Any], spec: ShardSpec) -> None:
    if rows.ndim != 2 or rows.shape[1] != spec.num_columns or len(rows) > spec.shard_rows:
        raise ShapeError(f"a shard holds up to {spec.shard_rows} rows of {spec.num_columns} columns, not {rows.shape}")
    if rows.dtype.newbyteorder("=") != np.dtype(spec.dtype):
        raise ShapeError(f"a shard of {spec.dtype} cannot take rows of {rows.dtype}; nothing is converted silently")


def _padded(rows: npt.NDArray[Any], spec: ShardSpec) -> npt.NDArray[Any]:
    if len(rows) == spec.chunk_rows:
        return np.ascontiguousarray(rows)
    chunk = np.full((spec.chunk_rows, spec.num_columns), spec.fill, dtype=spec.little)
    chunk[: len(rows)] = rows
    return chunk


def _encode_chunk(chunk: npt.NDArray[Any], spec: ShardSpec) -> bytes:
    _one_thread()
    level, shuffle, block_bytes = spec.compression
    laid = np.ascontiguousarray(chunk.T) if spec.by_column else chunk
    body: bytes = blosc.compress(laid, b"zstd", level, _SHUFFLES[shuffle], block_bytes, chunk.itemsize)
    return with_checksum(body)


def _scratch(shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Give room for a chunk as it is laid down: new pages would cost as much as decompressing into them."""
    return room("laid", shape[0] * shape[1] * dtype.itemsize).view(dtype).reshape(shape)


def _one_thread() -> None:
    # Blosc's own threads would lay blocks down in the order they finish, so that equal rows gave unequal bytes, and its
    # thread pool is one for the process. The flag is global but only ever set to this one value (zarr-python sets it
    # too), so threads cannot disagree about it; without it every caller's thread compresses by itself.
    blosc.use_threads = False
