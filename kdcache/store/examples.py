"""The example table: which examples a cache holds, in row order, as a Parquet file."""

from __future__ import annotations

__all__ = ["ExampleTable"]

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import TransferSetError
from kdcache.store.ids import normal_ids
from kdcache.store.place import Place

DIGEST_BYTES = 16


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

    def to_parquet(self, *, transfer_set_digest: str | None = None) -> bytes:
        """Encode the table as a Parquet file with page checksums; equal tables give equal bytes.

        Parameters
        ----------
        transfer_set_digest : str, optional
            Binds the file to the cache whose document has this digest.

        Raises
        ------
        TransferSetError
            A string id is no valid Unicode.
        """
        from kdcache.store.parquet import encode_columns  # noqa: PLC0415 - opening a cache does without Arrow

        columns = {
            "example_id": self.example_ids,
            "first_row": self.first_row,
            "num_rows": self.num_rows,
            "label": self.labels,
            "input_digest": self.input_digests,
        }
        return encode_columns(
            columns, example_id_type=self.example_id_type, num_examples=len(self),
            transfer_set_digest=transfer_set_digest,
        )  # fmt: skip

    @classmethod
    def from_parquet(
        cls,
        data: bytes,
        *,
        place: Place,
        columns: Sequence[str] | None = None,
        num_examples: int | None = None,
        transfer_set_digest: str | None = None,
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
        transfer_set_digest : str, optional
            The transfer set whose table it must be, where the file says so.

        Raises
        ------
        CorruptCacheError
            The file is torn or altered, not of the schema, or another transfer set's.
        """
        from kdcache.store.parquet import ExampleColumns  # noqa: PLC0415 - opening a cache does without Arrow

        file = ExampleColumns(
            lambda: io.BytesIO(data), place=place, num_examples=num_examples, transfer_set_digest=transfer_set_digest
        )
        wanted = {"label", "input_digest"} if columns is None else set(columns)
        read: dict[str, Any] = {name: file.column(name) for name in ("example_id", "first_row", "num_rows", *wanted)}
        try:
            return cls(
                read["example_id"], read["first_row"], read["num_rows"], read.get("label"), read.get("input_digest")
            )
        except TransferSetError as error:
            raise place.corrupt(f"the examples contradict themselves ({error})") from error

    def _columns(self) -> tuple[npt.NDArray[Any] | None, ...]:
        return self.example_ids, self.first_row, self.num_rows, self.labels, self.input_digests


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
