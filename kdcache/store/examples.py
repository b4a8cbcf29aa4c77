"""The example table: which examples a cache holds, in row order, as a Parquet file."""

from __future__ import annotations

__all__ = ["ARROW_SCHEMA", "ExampleTable", "arrow_schema_document", "arrow_schema_for"]

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import TransferSetError
from kdcache.store.place import Place

ROW_GROUP_EXAMPLES = 65_536
DIGEST_BYTES = 16
_MEANINGS = {
    "example_id": "The example's unique id: int64 or string, as the cache document's example_id_type says.",
    "first_row": "Number of the example's first row within a view: the sum of num_rows over the examples before it.",
    "num_rows": "Rows of the example in each view: 1, or the positions of its sequence.",
    "label": "The example's class index; null throughout where the transfer set has no labels.",
    "input_digest": "BLAKE2b-128 of the example's input; null throughout where inputs were not digested.",
}


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


ARROW_SCHEMA = arrow_schema_for("int64")
"""The schema for int64 ids; that for string ids differs in the first column's type alone."""


def arrow_schema_document() -> dict[str, Any]:
    """Describe examples.parquet for people and other programs: columns, types, nullability and meaning."""
    columns = [
        {
            "name": field.name,
            "type": ["int64", "string"] if field.name == "example_id" else str(field.type),
            "nullable": field.nullable,
            "meaning": _MEANINGS[field.name],
        }
        for field in ARROW_SCHEMA
    ]
    return {
        "title": "examples.parquet",
        "format_version": 1,
        "order": "Rows of the table stand in ascending first_row.",
        "columns": columns,
    }


@dataclass(frozen=True, slots=True, eq=False)
class ExampleTable:
    """The examples of a transfer set in row order; checked when made.

    Parameters
    ----------
    example_ids : ndarray [example]
        int64, or object holding `str` (NumPy's object strings: Arrow and plain Python take them without a conversion).
    first_row : ndarray [example] of int64
        Each example's first row within a view.
    num_rows : ndarray [example] of int32
        Each example's rows within a view.
    labels : ndarray [example] of int64, optional
        Class indexes.
    input_digests : ndarray [example, byte] of uint8, optional
        Sixteen bytes an example.

    Raises
    ------
    TransferSetError
        The columns differ in length or type, or the rows do not lie one after the other.
    """

    example_ids: npt.NDArray[Any]
    first_row: npt.NDArray[np.int64]
    num_rows: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64] | None = None
    input_digests: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        _check_ids(self.example_ids)
        num_examples = len(self.example_ids)
        _check_column("first_row", self.first_row, "int64", (num_examples,))
        _check_column("num_rows", self.num_rows, "int32", (num_examples,))
        if self.labels is not None:
            _check_column("labels", self.labels, "int64", (num_examples,))
        if self.input_digests is not None:
            _check_column("input_digests", self.input_digests, "uint8", (num_examples, DIGEST_BYTES))
        if (self.num_rows < 1).any():
            example = int(np.argmax(self.num_rows < 1))
            named = f"example {self.example_ids.item(example)!r}"
            raise TransferSetError(f"{named} has {self.num_rows[example]} rows; an example has at least one")
        if (self.first_row != _first_rows(self.num_rows)).any():
            raise TransferSetError("first_row is not the sum of num_rows over the examples before: rows overlap or gap")

    @classmethod
    def make(
        cls,
        example_ids: Sequence[int] | Sequence[str] | npt.NDArray[Any],
        *,
        num_rows: Sequence[int] | npt.NDArray[Any] | None = None,
        labels: Sequence[int] | npt.NDArray[Any] | None = None,
        input_digests: npt.NDArray[np.uint8] | None = None,
    ) -> ExampleTable:
        """Make a table from plain columns; one row an example where `num_rows` is absent.

        Raises
        ------
        TransferSetError
            A column cannot be used.

        Examples
        --------
        >>> ExampleTable.make(["a", "b"], num_rows=[2, 3]).first_row
        array([0, 2])
        """
        ids = normal_ids(example_ids)
        rows = np.ones(len(ids), np.int32) if num_rows is None else np.asarray(num_rows).astype(np.int32)
        return cls(
            ids,
            _first_rows(rows),
            rows,
            None if labels is None else np.asarray(labels).astype(np.int64),
            input_digests,
        )

    @property
    def example_id_type(self) -> str:
        """Either "int64" or "string"."""
        return "int64" if self.example_ids.dtype.kind == "i" else "string"

    def __len__(self) -> int:
        return len(self.example_ids)

    def equals(self, other: ExampleTable) -> bool:
        """Tell whether two tables hold the same columns."""
        ours, theirs = self._columns(), other._columns()
        return all(
            (left is None and right is None)
            or (left is not None and right is not None and left.shape == right.shape and bool((left == right).all()))
            for left, right in zip(ours, theirs, strict=True)
        )

    def to_parquet(self) -> bytes:
        """Encode the table as a Parquet file with page checksums; equal tables give equal bytes.

        Raises
        ------
        TransferSetError
            A string id is no valid Unicode.
        """
        schema = arrow_schema_for(self.example_id_type)
        try:
            table = pa.table([self._arrow(field) for field in schema], schema=schema)
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

    @classmethod
    def from_parquet(
        cls, data: bytes, *, place: Place, columns: Sequence[str] | None = None, num_examples: int | None = None
    ) -> ExampleTable:
        """Decode and check a Parquet file.

        Parameters
        ----------
        data : bytes
            The file.
        place : Place
            Where it stands, for messages.
        columns : sequence of str, optional
            Which of the optional columns ("label", "input_digest") to read; both where absent.
        num_examples : int, optional
            Examples that there must be; checked before memory is taken.

        Raises
        ------
        CorruptCacheError
            The file is torn or altered, or not of the schema.
        """
        wanted = {"label", "input_digest"} if columns is None else set(columns)
        read: dict[str, Any] = {
            name: read_column(data, name, place=place, num_examples=num_examples)
            for name in ("example_id", "first_row", "num_rows", *wanted)
        }
        try:
            return cls(
                read["example_id"], read["first_row"], read["num_rows"], read.get("label"), read.get("input_digest")
            )
        except TransferSetError as error:
            raise place.corrupt(f"the examples contradict themselves ({error})") from error

    def _columns(self) -> tuple[npt.NDArray[Any] | None, ...]:
        return self.example_ids, self.first_row, self.num_rows, self.labels, self.input_digests

    def _arrow(self, field: pa.Field) -> pa.Array:
        column = {
            "example_id": self.example_ids,
            "first_row": self.first_row,
            "num_rows": self.num_rows,
            "label": self.labels,
            "input_digest": self.input_digests,
        }[field.name]
        if column is None:
            return pa.nulls(len(self), field.type)
        if field.name == "input_digest":
            return pa.FixedSizeBinaryArray.from_buffers(
                field.type, len(self), [None, pa.py_buffer(np.ascontiguousarray(column))]
            )
        return pa.array(column, type=field.type)


def read_column(data: bytes, name: str, *, place: Place, num_examples: int | None = None) -> npt.NDArray[Any] | None:
    """Read one column of examples.parquet, its page checksums verified; None where it is null throughout.

    Parameters
    ----------
    data : bytes
        The file.
    name : str
        The column's name in the file.
    place : Place
        Where the file stands, for messages.
    num_examples : int, optional
        Examples that there must be; checked before memory is taken.

    Raises
    ------
    CorruptCacheError
        The file is torn or altered, or not of the schema.
    """
    with _refusing_damage(place):
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        schema, found = file.schema_arrow, file.metadata.num_rows
    if not any(schema.equals(arrow_schema_for(kind)) for kind in ("int64", "string")):
        raise place.corrupt(f"the file's columns are not those of format v1: {', '.join(map(str, schema))}")
    if num_examples not in {None, found}:
        raise place.corrupt(f"the file says to hold {found} examples, the cache document says {num_examples}")
    with _refusing_damage(place):
        column = file.read(columns=[name]).column(0).combine_chunks()
    if column.null_count == len(column) and len(column):
        return None
    if column.null_count:
        raise place.corrupt(f"{column.null_count} of {len(column)} values of {name} are missing")
    if name == "input_digest":
        start = column.offset * DIGEST_BYTES
        values = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * DIGEST_BYTES]
        return values.reshape(len(column), DIGEST_BYTES)
    array: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array


def normal_ids(example_ids: Sequence[int] | Sequence[str] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give ids as int64 or as an object array of `str`, converting nothing but integers and kinds of string.

    Raises
    ------
    TransferSetError
        The ids are of another type, such as bool or float, or mixed.
    """
    ids = example_ids if isinstance(example_ids, np.ndarray) else _array_of(example_ids)
    if ids.ndim != 1:
        raise TransferSetError(f"example ids have one axis, not {ids.ndim}")
    if ids.dtype.kind in "UT":
        return ids.astype(object)
    if ids.dtype.kind == "i" or (ids.dtype.kind == "u" and (not ids.size or int(ids.max()) < 2**63)):
        return ids.astype(np.int64, copy=False)
    if ids.dtype.kind == "O" and all(isinstance(value, str) for value in ids):
        return ids
    kinds = sorted({type(value).__name__ for value in ids[:1000].tolist()}) or [str(ids.dtype)]
    raise TransferSetError(
        f"example ids are all str or all int64, not {' and '.join(kinds)} ({ids.dtype}); convert them, such as "
        "[str(value) for value in ids]"
    )


@contextlib.contextmanager
def _refusing_damage(place: Place) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise place.corrupt(f"the file cannot be read ({error})") from error


def _array_of(values: Sequence[int] | Sequence[str]) -> npt.NDArray[Any]:
    if values and all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        return np.asarray(values)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _first_rows(num_rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    return np.cumsum(num_rows, dtype=np.int64) - num_rows


def _check_ids(ids: npt.NDArray[Any]) -> None:
    if ids.ndim != 1 or not len(ids):
        raise TransferSetError("a transfer set has at least one example")
    if ids.dtype not in {np.dtype(np.int64), np.dtype(object)}:
        raise TransferSetError(f"example ids are int64 or object strings, not {ids.dtype}; see ExampleTable.make")
    if ids.dtype == object and not all(isinstance(value, str) for value in ids):
        raise TransferSetError("example ids of an object array must all be str")


def _check_column(name: str, column: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> None:
    if column.dtype != np.dtype(dtype) or column.shape != shape:
        raise TransferSetError(f"{name} must be {dtype} of shape {shape}, not {column.dtype} of shape {column.shape}")
