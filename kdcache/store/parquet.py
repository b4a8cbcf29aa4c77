"""examples.parquet as a file: columns to bytes, and back whole or a few row groups at a time.

The one module of the store that needs pyarrow; imported only where the file is written or read.
"""

from __future__ import annotations

__all__ = ["ExampleColumns", "RangedFile", "arrow_schema_document", "arrow_schema_for", "encode_columns"]

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import KdcacheError, OptionError, ShapeError, TransferSetError
from kdcache.store.objects import Objects
from kdcache.store.place import Place
from kdcache.store.reader import by_chunk
from kdcache.store.recent import Recent

DIGEST_BYTES = 16
ROW_GROUP_EXAMPLES = 65_536
KEPT_BYTES = 64 * 2**20
"""Decoded row groups kept: the digests of four million examples."""
_MEANINGS = {
    "example_id": "The example's unique id: int64 or string, as the cache document's example_id_type says.",
    "first_row": "Number of the example's first row within a view: the sum of num_rows over the examples before it.",
    "num_rows": "Rows of the example in each view: 1, or the positions of its sequence.",
    "label": "The example's class index; null throughout where the transfer set has no labels.",
    "input_digest": "BLAKE2b-128 of the example's input; null throughout where inputs were not digested.",
}

_DIGEST_KEY = b"kdcache.transfer_set_digest"


def arrow_schema_for(example_id_type: str) -> pa.Schema:
    """Give the Arrow schema of examples.parquet for ids of type "int64" or "string"."""
    ids = pa.int64() if example_id_type == "int64" else pa.string()
    return pa.schema(
        [
            pa.field("example_id", ids, nullable=False),
            pa.field("first_row", pa.int64(), nullable=False),
            pa.field("num_rows", pa.int32(), nullable=False),
            pa.field("label", pa.int64(), nullable=True),
            pa.field("input_digest", pa.binary(DIGEST_BYTES), nullable=True),
        ]
    )


def arrow_schema_document() -> dict[str, Any]:
    """Describe examples.parquet for people and other programs: columns, types, nullability and meaning."""
    columns = [
        {
            "name": field.name,
            "type": ["int64", "string"] if field.name == "example_id" else str(field.type),
            "nullable": field.nullable,
            "meaning": _MEANINGS[field.name],
        }
        for field in arrow_schema_for("int64")
    ]
    return {
        "title": "examples.parquet",
        "format_version": 1,
        "order": "Rows of the table stand in ascending first_row.",
        "columns": columns,
    }


def encode_columns(
    columns: Mapping[str, npt.NDArray[Any] | None],
    *,
    example_id_type: str,
    num_examples: int,
    transfer_set_digest: str | None = None,
) -> bytes:
    """Encode columns as a Parquet file with page checksums; equal columns give equal bytes.

    Parameters
    ----------
    columns : mapping of str to ndarray or None
        Every column of the schema by name; None for one that is null throughout.
    example_id_type : {"int64", "string"}
        The type of the ids.
    num_examples : int
        Length of the columns.
    transfer_set_digest : str, optional
        Kept in the footer: says which transfer set's table this is.

    Raises
    ------
    TransferSetError
        A string id is no valid Unicode.
    """
    schema = arrow_schema_for(example_id_type)
    try:
        table = pa.table([_arrow(columns[field.name], field, num_examples) for field in schema], schema=schema)
        if transfer_set_digest is not None:
            table = table.replace_schema_metadata({_DIGEST_KEY: transfer_set_digest})
    except (UnicodeError, pa.ArrowException) as error:
        raise TransferSetError(f"the examples cannot be stored: {error}") from error
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_EXAMPLES,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={"first_row": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
    )
    return sink.getvalue()


class RangedFile(io.RawIOBase):
    """An object as a read-only file whose reads are ranges of it.

    Parameters
    ----------
    objects : Objects
        Where the object is kept.
    place : Place
        The object.

    Raises
    ------
    CorruptCacheError
        The object is missing, when opened or when read.
    """

    def __init__(self, objects: Objects, place: Place) -> None:
        super().__init__()
        size = objects.size(place.key)
        if size is None:
            raise place.corrupt("the file is missing")
        self._objects = objects
        self._place = place
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Give True."""
        return True

    def seekable(self) -> bool:
        """Give True."""
        return True

    def tell(self) -> int:
        """Give the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position and give it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, all that is left where negative; never more memory than the object has bytes."""
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        try:
            data = self._objects.read_range(self._place.key, self._position, length)
        except FileNotFoundError as error:
            raise self._place.corrupt("the file is missing") from error
        self._position += len(data)
        return data


class ExampleColumns:
    """The columns of examples.parquet, page checksums verified; safe between threads.

    Opening reads the footer alone. A column is read whole, or by the row groups in which wanted examples lie; the row
    groups last used are kept, in bounded memory.

    Parameters
    ----------
    open_file : callable
        Opens the file anew: a reader of its own for every read.
    place : Place
        Where the file stands, for messages.
    num_examples : int, optional
        Examples that there must be; checked before memory is taken.
    transfer_set_digest : str, optional
        The transfer set whose table it must be, where the file says so; those of earlier releases do not.

    Raises
    ------
    CorruptCacheError
        The file is missing, torn or altered, not of the schema, or another transfer set's.
    """

    def __init__(
        self,
        open_file: Callable[[], IO[bytes] | io.RawIOBase],
        *,
        place: Place,
        num_examples: int | None = None,
        transfer_set_digest: str | None = None,
    ) -> None:
        self._open_file = open_file
        self._place = place
        self._metadata: Any = None
        self._recent: Recent[tuple[str, int], npt.NDArray[Any]] = Recent(KEPT_BYTES)
        with self._refusing_damage():
            file = self._file()
            self._metadata, self._schema = file.metadata, file.schema_arrow
            lengths = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self._check(lengths, num_examples)
        told = (self._schema.metadata or {}).get(_DIGEST_KEY)
        if transfer_set_digest is not None and told not in {None, transfer_set_digest.encode()}:
            raise place.corrupt("the file is the table of another transfer set than the cache document names")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> npt.NDArray[Any] | None:
        """Read a whole column; None where it is null throughout.

        Raises
        ------
        CorruptCacheError
            The file is torn or altered, or some values are missing.
        OptionError
            There is no such column.
        """
        self._check_name(name)
        with self._refusing_damage():
            column = self._file().read(columns=[name], use_threads=False).column(0).combine_chunks()
        return self._decoded(column, name, len(self))

    def values(self, name: str, example_indices: npt.ArrayLike) -> npt.NDArray[Any] | None:
        """Read a column's values for some examples, in the order given; None where they have none.

        Parameters
        ----------
        name : str
            The column's name in the file.
        example_indices : array_like [example] of int
            Positions in the table; duplicates allowed.

        Returns
        -------
        ndarray [example] or [example, byte]
            The values; one axis more for input digests.

        Raises
        ------
        CorruptCacheError
            The file is missing, torn or altered, or some values are missing.
        ShapeError
            There is no such example.
        OptionError
            There is no such column.
        """
        self._check_name(name)
        indices = _checked_indices(example_indices, len(self))
        out = self._empty(name, len(indices))
        num_missing = 0
        groups = by_chunk(np.searchsorted(self._starts, indices, side="right") - 1)
        for group, wanted in groups.items():
            values = self._group(name, group)
            if values is None:
                num_missing += len(wanted)
            else:
                out[wanted] = values[indices[wanted] - self._starts[group]]
        if 0 < num_missing < len(indices):
            raise self._place.corrupt(f"{num_missing} of {len(indices)} values of {name} are missing")
        return None if num_missing else out

    def _group(self, name: str, group: int) -> npt.NDArray[Any] | None:
        kept = self._recent.get((name, group))
        if kept is not None:
            return kept
        with self._refusing_damage():
            table = self._file().read_row_group(group, columns=[name], use_threads=False)
            column = table.column(0).combine_chunks()
        values = self._decoded(column, name, int(self._starts[group + 1] - self._starts[group]))
        if values is not None:
            strings = sum(map(sys.getsizeof, values)) if values.dtype == object else 0
            self._recent.put((name, group), values, values.nbytes + strings)
        return values

    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._open_file(), metadata=self._metadata, page_checksum_verification=True)

    def _decoded(self, column: pa.Array, name: str, num_values: int) -> npt.NDArray[Any] | None:
        with self._refusing_damage():  # Arrow hands out texts as they are stored, which may be no UTF-8
            return self._as_array(column, name, num_values)

    def _as_array(self, column: pa.Array, name: str, num_values: int) -> npt.NDArray[Any] | None:
        if len(column) != num_values:
            raise self._place.corrupt(f"{len(column)} values of {name} were read, where the footer says {num_values}")
        if column.null_count == len(column) and len(column):
            return None
        if column.null_count:
            raise self._place.corrupt(f"{column.null_count} of {len(column)} values of {name} are missing")
        # Not Arrow's own conversions, which import pandas where it stands; copies, since Arrow's memory is read-only.
        if column.type == pa.string():
            return np.array(column.to_pylist(), object)
        if name != "input_digest":
            values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
            return values[column.offset : column.offset + len(column)].copy()
        start = column.offset * DIGEST_BYTES
        digests = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * DIGEST_BYTES]
        return digests.reshape(len(column), DIGEST_BYTES).copy()

    def _empty(self, name: str, num_values: int) -> npt.NDArray[Any]:
        if name == "input_digest":
            return np.empty((num_values, DIGEST_BYTES), np.uint8)
        kind = self._schema.field(name).type
        return np.empty(num_values, object if kind == pa.string() else kind.to_pandas_dtype())

    def _check(self, lengths: list[int], num_examples: int | None) -> None:
        if not any(self._schema.equals(arrow_schema_for(kind)) for kind in ("int64", "string")):
            told = ", ".join(map(str, self._schema))
            raise self._place.corrupt(f"the file's columns are not those of format v1: {told}")
        found = self._metadata.num_rows
        if num_examples not in {None, found}:
            raise self._place.corrupt(f"the file says to hold {found} examples, the cache document says {num_examples}")
        if found != len(self) or min(lengths, default=0) < 0:
            raise self._place.corrupt(f"the file says to hold {found} examples, its row groups say {len(self)}")

    def _check_name(self, name: str) -> None:
        if name not in _MEANINGS:
            raise OptionError(f"{self._place} has no column {name!r}; its columns are {', '.join(_MEANINGS)}")

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        try:
            yield
        except KdcacheError:  # some are OSErrors too, and say already what failed
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._place.corrupt(f"the file cannot be read ({error})") from error


def _checked_indices(example_indices: npt.ArrayLike, num_examples: int) -> npt.NDArray[np.int64]:
    indices = np.asarray(example_indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ShapeError(f"example indexes are one axis of integers, not {indices.dtype} of shape {indices.shape}")
    outside = (indices < 0) | (indices >= num_examples)
    if outside.any():
        raise ShapeError(f"example {indices[outside][0]} is outside the table's examples 0 to {num_examples - 1}")
    return indices.astype(np.int64)


def _arrow(column: npt.NDArray[Any] | None, field: pa.Field, num_examples: int) -> pa.Array:
    if column is None:
        return pa.nulls(num_examples, field.type)
    if field.name == "input_digest":
        data = pa.py_buffer(np.ascontiguousarray(column))
        return pa.FixedSizeBinaryArray.from_buffers(field.type, num_examples, [None, data])
    return pa.array(column, type=field.type)
