"""The TransferSet: examples with unique ids, their labels, input digests and views."""

from __future__ import annotations

__all__ = ["TransferSet"]

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch.utils.data import default_collate

from kdcache.errors import DuplicateExampleError, TransferSetError, UnknownExampleError
from kdcache.transfer_set.digests import DIGEST_BYTES, input_digest, row_digests, transfer_set_digest
from kdcache.transfer_set.sources import (
    ArraySource,
    DatasetSource,
    Example,
    ListSource,
    Source,
    TableSource,
    open_table,
)
from kdcache.transfer_set.views import Views, view_generator

if TYPE_CHECKING:
    import pyarrow as pa

Ids = np.ndarray
"""int64 [example], or an object array of str [example]."""


class TransferSet:
    """The examples whose soft targets are cached, each with a unique example_id.

    Parameters
    ----------
    dataset : map-style dataset
        Anything with ``__len__`` and ``__getitem__``, whose items are an input, an (input, label, ...) tuple, or a
        mapping. See `from_arrays` and `from_table` for arrays and for Parquet or Arrow tables.
    example_ids : sequence of int or str [example], optional
        Unique ids. Without them, and without `id_key`, an example's position is its id; the input digests then still
        show when the dataset's order has changed.
    labels : sequence of int [example], optional
        Class indices. Without them, and without `label_key`, the second item of a tuple counts if it is an integer.
    num_rows : sequence of int [example], or int, optional
        Rows an example has: the positions of a sequence. One each by default.
    input_key, label_key, id_key : str or int, optional
        Which item of a tuple or mapping is meant.
    views : Views, optional
        The augmentation and the number of views to cache; the plain input, once, by default.
    collate : callable, optional
        Makes a batch of a list of inputs; torch's default_collate by default.
    digest_inputs : bool
        Keep a digest of every input, so that training on changed inputs is an error. Takes one pass over the dataset
        when the cache is planned.

    Raises
    ------
    DuplicateExampleError
        An id stands more than once.
    TransferSetError
        Ids, labels or row counts are malformed, or as many as the examples they are not.

    Examples
    --------
    >>> import numpy as np
    >>> pictures = np.zeros((3, 4), dtype=np.float32)
    >>> transfer_set = TransferSet.from_arrays(pictures, labels=[0, 1, 0], example_ids=["a", "b", "c"])
    >>> len(transfer_set), transfer_set.labels.tolist()
    (3, [0, 1, 0])
    """

    def __init__(
        self,
        dataset: Any,
        *,
        example_ids: Iterable[int | str] | None = None,
        labels: Iterable[int] | None = None,
        num_rows: Iterable[int] | int | None = None,
        input_key: str | int | None = None,
        label_key: str | int | None = None,
        id_key: str | int | None = None,
        views: Views | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        digest_inputs: bool = True,
    ) -> None:
        is_source = isinstance(dataset, ArraySource | ListSource | TableSource)
        self._source: Source = (
            dataset if is_source else DatasetSource(dataset, input_key=input_key, label_key=label_key, id_key=id_key)
        )
        if len(self._source) == 0:
            raise TransferSetError("the transfer set is empty; a cache needs at least one example")
        self._reads_ids = id_key is not None and example_ids is None
        self._reads_labels = not is_source and labels is None
        self._given_ids = None if example_ids is None else _as_ids(example_ids, len(self._source))
        self._given_labels = None if labels is None else _as_labels(labels, len(self._source))
        self.num_rows = _as_row_counts(num_rows, len(self._source))
        self.views = views
        self._collate = collate
        self.digests_inputs = digest_inputs

    @classmethod
    def from_arrays(
        cls,
        inputs: np.ndarray | torch.Tensor,
        *,
        labels: Iterable[int] | None = None,
        example_ids: Iterable[int | str] | None = None,
        **options: Any,
    ) -> Self:
        """Make a transfer set of inputs that stand in one array or tensor [example, ...].

        Other options are those of the class.
        """
        return cls(ArraySource(inputs), labels=labels, example_ids=example_ids, **options)

    @classmethod
    def from_table(
        cls,
        table: str | Path | Sequence[str | Path] | pa.Table | Any,
        *,
        id_column: str,
        input_columns: str | Sequence[str],
        label_column: str | None = None,
        num_rows_column: str | None = None,
        decode: Callable[[Mapping[str, Any]], Any] | None = None,
        **options: Any,
    ) -> Self:
        """Make a transfer set of a Parquet or Arrow table.

        Parameters
        ----------
        table : path, paths, pyarrow.Table or pyarrow.dataset.Dataset
            Files are opened with pyarrow.dataset; folders and partitions work. A file named .arrow, .feather or .ipc is
            read as Arrow IPC, others and folders as Parquet.
        id_column, label_column, num_rows_column : str
            Columns that are read whole when the set is made.
        input_columns : str or sequence of str
            Columns that make the input, read row group by row group as needed.
        decode : callable (mapping of column to cell) -> input, optional
            Makes the input of a row's cells. By default a single column's cell is the input (list cells as arrays),
            and several columns give a mapping.

        Raises
        ------
        TransferSetError
            The table cannot be opened, or a column is missing or of the wrong type.
        """
        dataset = open_table(table)
        columns = [input_columns] if isinstance(input_columns, str) else list(input_columns)
        wanted = [name for name in (id_column, label_column, num_rows_column, *columns) if name is not None]
        missing = [name for name in wanted if name not in dataset.schema.names]
        if missing:
            raise TransferSetError(f"the table has no column {missing}; it has {dataset.schema.names}")
        head = dataset.to_table(columns=list(dict.fromkeys(wanted[: len(wanted) - len(columns)])))
        whole = {name: head.column(name).to_pylist() for name in head.column_names}
        return cls(
            TableSource(dataset, input_columns=columns, decode=decode),
            example_ids=whole[id_column],
            labels=None if label_column is None else whole[label_column],
            num_rows=None if num_rows_column is None else whole[num_rows_column],
            **options,
        )

    def __len__(self) -> int:
        return len(self._source)

    @property
    def num_views(self) -> int:
        """Views of each example."""
        return 1 if self.views is None else self.views.num_views

    @functools.cached_property
    def example_ids(self) -> Ids:
        """Unique ids: int64 [example], or an object array of str [example]."""
        ids = self._given_ids
        if ids is None and self._reads_ids:
            ids = _as_ids(self._scan[1], len(self))
        if ids is None:
            return np.arange(len(self), dtype=np.int64)
        _refuse_duplicates(ids)
        return ids

    def example_id(self, index: int) -> int | str:
        """Give one example's id as Python's own int or str."""
        value = self.example_ids[index]
        return value if isinstance(value, str) else int(value)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """Class indices, int64 [example], or None."""
        if not self._reads_labels:
            return self._given_labels
        labels = self._scan[0]
        if any(label is None for label in labels):
            return None
        return _as_labels(labels, len(self))

    @functools.cached_property
    def input_digests(self) -> np.ndarray | None:
        """Digests of the inputs before any view, uint8 [example, 16], or None when they are not kept."""
        if not self.digests_inputs:
            return None
        if isinstance(self._source, ArraySource):
            return row_digests(self._source.inputs)
        return self._scan[2]

    @functools.cached_property
    def _scan(self) -> tuple[list[int | None], list[int | str | None], np.ndarray]:
        """Read every example once, for what only the dataset knows."""
        labels: list[int | None] = []
        ids: list[int | str | None] = []
        digests = np.zeros((len(self), DIGEST_BYTES), np.uint8)
        for index in range(len(self)):
            example = self._read(index)
            labels.append(example.label)
            ids.append(example.example_id)
            if self.digests_inputs:
                digests[index] = np.frombuffer(input_digest(example.input), np.uint8)
        return labels, ids, digests

    def digest(self) -> str:
        """SHA-256 over ids, row counts, labels and input digests: another transfer set has another one."""
        return transfer_set_digest(self.example_ids, self.num_rows, self.labels, self.input_digests)

    def read_inputs(self, indices: Sequence[int] | np.ndarray, *, view_index: int = 0) -> Any:
        """Read the inputs of several examples as one batch.

        Parameters
        ----------
        indices : sequence of int [example]
            Positions in the transfer set.
        view_index : int
            Which view.

        Returns
        -------
        batch
            What `collate` makes of the inputs; for arrays a tensor [example, ...].
        """
        if isinstance(self._source, ArraySource) and self.views is None:
            return self._source.read_inputs(indices)
        return self._collate([self.read_input(int(index), view_index=view_index) for index in indices])

    def read_input(self, index: int, *, view_index: int = 0) -> Any:
        """Read one view of one example's input."""
        value = self._read(index).input
        if self.views is None:
            return value
        generator = view_generator(self.views.seed, self.example_id(index), view_index)
        return self.views.transform(value, generator)

    def digest_of(self, index: int) -> bytes:
        """Digest one example's input as the dataset gives it now."""
        return input_digest(self._read(index).input)

    def digests_of(self, indices: np.ndarray) -> list[bytes]:
        """Digest the inputs of several examples, int64 [example], each as `digest_of` does."""
        if isinstance(self._source, ArraySource):
            return [digest.tobytes() for digest in row_digests(self._source.read_inputs(indices))]
        return [self.digest_of(index) for index in indices.tolist()]

    def _read(self, index: int) -> Example:
        """Read an example; to what a dataset raises a note is added that says which one it is about."""
        try:
            return self._source.read(index)
        except Exception as error:
            named = self._name_of(index) if "example_ids" in self.__dict__ else f"the example at position {index}"
            error.add_note(
                f"raised by the dataset for {named} of the transfer set. What is published is kept. Mend the example, "
                "or leave it out, and run the same command again"
            )
            raise

    def _name_of(self, index: int) -> str:
        return f"example {self.example_id(index)!r} (position {index})"

    def indices_of(self, example_ids: Sequence[int | str] | np.ndarray) -> np.ndarray:
        """Find the positions of examples by their ids.

        Raises
        ------
        UnknownExampleError
            An id is not in the transfer set.
        """
        positions = self._positions
        try:
            return np.array([positions[key] for key in np.asarray(example_ids).tolist()], np.int64)
        except KeyError as error:
            raise UnknownExampleError(
                f"example_id {error.args[0]!r} is not in this transfer set of {len(self)} examples"
            ) from None

    @functools.cached_property
    def _positions(self) -> dict[int | str, int]:
        return {key: index for index, key in enumerate(self.example_ids.tolist())}


def _as_ids(values: Iterable[Any], count: int) -> Ids:
    if isinstance(values, np.ndarray) and values.dtype == np.int64 and values.shape == (count,):
        return values.copy()
    ids = list(values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else values)
    _check_count("example_ids", len(ids), count)
    if all(isinstance(value, str) for value in ids):
        return np.array(ids, dtype=object)
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in ids):
        try:
            return np.array(ids, dtype=np.int64)
        except OverflowError as error:
            raise TransferSetError("an integer example_id does not fit 64 signed bits; use strings") from error
    kinds = sorted({type(value).__name__ for value in ids})
    raise TransferSetError(f"example_ids are of types {kinds}; they must be all strings or all integers")


def _as_labels(values: Iterable[Any], count: int) -> np.ndarray:
    is_array = isinstance(values, np.ndarray)
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values if is_array else list(values))
    _check_count("labels", len(array), count)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TransferSetError(f"labels have shape {array.shape} and dtype {array.dtype}; they must be int [example]")
    return array.astype(np.int64)


def _as_row_counts(values: Iterable[int] | int | None, count: int) -> np.ndarray:
    if values is None:
        return np.ones(count, np.int32)
    is_array = isinstance(values, np.ndarray)
    array = np.full(count, values) if isinstance(values, int) else np.asarray(values if is_array else list(values))
    _check_count("num_rows", len(array), count)
    if array.dtype.kind not in "iu" or array.min() < 1 or array.max() >= 2**31:
        raise TransferSetError("num_rows must be integers of at least 1, one for each example")
    return array.astype(np.int32)


def _check_count(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise TransferSetError(f"{name} has {got} entries for a dataset of {expected} examples")


def _refuse_duplicates(ids: Ids) -> None:
    num_unique = int(np.count_nonzero(np.diff(np.sort(ids)))) + 1 if ids.dtype == np.int64 else len(set(ids.tolist()))
    if num_unique == len(ids):
        return
    values = ids.tolist()
    first: dict[int | str, int] = {}
    repeated = [(key, first[key], index) for index, key in enumerate(values) if first.setdefault(key, index) != index]
    shown = "; ".join(f"{key!r} at positions {one} and {two}" for key, one, two in repeated[:5])
    raise DuplicateExampleError(
        f"{len(repeated)} example_id(s) stand more than once: {shown}. Ids join soft targets to inputs, so each must "
        "be unique; nothing was written. Make them unique and run the same call again"
    )
