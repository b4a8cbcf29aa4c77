"""Sources: where a transfer set's examples are read from, each behind one small interface."""

from __future__ import annotations

__all__ = ["ArraySource", "DatasetSource", "Example", "ListSource", "Source", "TableSource", "open_table"]

import bisect
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kdcache.errors import TransferSetError

if TYPE_CHECKING:
    import pyarrow as pa


class Example(NamedTuple):
    """One example as its source gives it."""

    input: Any
    label: int | None
    example_id: int | str | None


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def read(self, index: int) -> Example:
        """Read one example by its position."""
        ...


class ArraySource:
    """Inputs that stand in one array or tensor [example, ...]."""

    def __init__(self, inputs: np.ndarray | torch.Tensor) -> None:
        self.inputs = _as_tensor(inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def read(self, index: int) -> Example:
        """Read one example by its position."""
        return Example(self.inputs[index], None, None)

    def read_inputs(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Read many inputs at once, as a tensor [example, ...]."""
        return self.inputs.index_select(0, torch.from_numpy(np.asarray(indices, np.int64)))


class ListSource:
    """Inputs in a list, which know neither labels nor ids."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def read(self, index: int) -> Example:
        """Read one example by its position."""
        return Example(self.inputs[index], None, None)


class DatasetSource:
    """A map-style dataset whose items are an input, an (input, label, ...) tuple, or a mapping."""

    def __init__(
        self, dataset: Any, *, input_key: str | int | None, label_key: str | int | None, id_key: str | int | None
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TransferSetError(
                f"a {type(dataset).__qualname__} is no map-style dataset: it needs __len__ and __getitem__. "
                "An iterable dataset has no rows to name; give it ids and a map-style wrapper first"
            )
        self.dataset = dataset
        self.input_key = input_key
        self.label_key = label_key
        self.id_key = id_key

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Example:
        """Read one example by its position."""
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return self._from_mapping(item, index)
        if isinstance(item, tuple | list):
            return self._from_sequence(item, index)
        return Example(item, None, None)

    def _from_mapping(self, item: Mapping[Any, Any], index: int) -> Example:
        if self.input_key is None:
            raise TransferSetError(
                f"example {index} is a mapping with keys {sorted(map(str, item))}; say which one is the input: "
                "TransferSet(dataset, input_key=..., label_key=..., id_key=...)"
            )
        for key in (self.input_key, self.label_key, self.id_key):
            if key is not None and key not in item:
                raise TransferSetError(f"example {index} has no key {key!r}; it has {sorted(map(str, item))}")
        label = None if self.label_key is None else as_label(item[self.label_key], index)
        return Example(item[self.input_key], label, None if self.id_key is None else as_id(item[self.id_key], index))

    def _from_sequence(self, item: Sequence[Any], index: int) -> Example:
        input_key = 0 if self.input_key is None else int(self.input_key)
        label_key = self.label_key
        if label_key is None and len(item) > 1 and _is_integer(item[1]):
            label_key = 1
        keys = [int(key) for key in (input_key, label_key, self.id_key) if key is not None]
        if max(keys) >= len(item):
            raise TransferSetError(f"example {index} has {len(item)} items, so there is no item {max(keys)}")
        label = None if label_key is None else as_label(item[int(label_key)], index)
        return Example(item[input_key], label, None if self.id_key is None else as_id(item[int(self.id_key)], index))


class TableSource:
    """Rows of a Parquet or Arrow dataset, or of a table in memory.

    Row groups are the unit read; a few of them are kept, so that reading in order touches each once.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        input_columns: Sequence[str],
        decode: Callable[[Mapping[str, Any]], Any] | None,
        num_kept_groups: int = 4,
    ) -> None:
        self._dataset = dataset
        self._columns = list(input_columns)
        self._decode = decode
        self._num_kept_groups = num_kept_groups
        self._groups = list(_row_groups(dataset))
        counts = [_num_rows(group) for group in self._groups]
        self._starts: list[int] = [0, *itertools.accumulate(counts)]
        self._group = functools.lru_cache(num_kept_groups)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_table, (_picklable(self._dataset), self._columns, self._decode, self._num_kept_groups)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Example:
        """Read one example by its position."""
        group_index = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[group_index]
        columns = self._group(group_index)
        cells = {name: column[row] for name, column in columns.items()}
        if self._decode is not None:
            return Example(self._decode(cells), None, None)
        return Example(cells[self._columns[0]] if len(cells) == 1 else cells, None, None)

    def _read_group(self, group_index: int) -> dict[str, Sequence[Any]]:
        table = self._groups[group_index].to_table(columns=self._columns)
        return {name: _cells(table.column(name)) for name in self._columns}


def open_table(table: Any) -> Any:
    """Open a table as a pyarrow.dataset.Dataset; files named .arrow, .feather or .ipc are Arrow IPC, others Parquet.

    Raises
    ------
    TransferSetError
        It cannot be opened.
    """
    import pyarrow as pa  # noqa: PLC0415 - only table sources need Arrow
    import pyarrow.dataset as pads  # noqa: PLC0415 - only table sources need Arrow

    if isinstance(table, pads.Dataset):
        return table
    if isinstance(table, pa.Table):
        return pads.dataset(table)
    paths = [table] if isinstance(table, str | os.PathLike) else list(table)
    is_ipc = all(os.fspath(path).endswith((".arrow", ".feather", ".ipc")) for path in paths)
    try:
        return pads.dataset(table, format="ipc" if is_ipc else "parquet")
    except (OSError, pa.ArrowException) as error:
        raise TransferSetError(f"the table {table} cannot be opened: {error}") from error


def _picklable(dataset: Any) -> Any:
    import pyarrow.dataset as pads  # noqa: PLC0415 - only table sources need Arrow

    return dataset.to_table() if isinstance(dataset, pads.InMemoryDataset) else dataset


def _restore_table(table: Any, columns: list[str], decode: Any, num_kept_groups: int) -> TableSource:
    return TableSource(open_table(table), input_columns=columns, decode=decode, num_kept_groups=num_kept_groups)


def _row_groups(dataset: Any) -> Any:
    for fragment in dataset.get_fragments():
        if hasattr(fragment, "split_by_row_group"):
            yield from fragment.split_by_row_group()
        else:
            yield fragment


def _num_rows(group: Any) -> int:
    # pyarrow counts the rows of a Parquet fragment's whole file, even where the fragment is one row group of it
    counts: list[int] = [info.num_rows for info in group.row_groups] if hasattr(group, "row_groups") else []
    return sum(counts) if counts else int(group.count_rows())


def _cells(column: pa.ChunkedArray) -> Sequence[Any]:
    import pyarrow as pa  # noqa: PLC0415 - only table sources need Arrow

    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if isinstance(array, pa.FixedShapeTensorArray):
        return list(array.to_numpy_ndarray().copy())
    kind = array.type
    if pa.types.is_fixed_size_list(kind) and array.null_count == 0:
        return list(array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), kind.list_size).copy())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [np.array(cell.values.to_numpy(zero_copy_only=False)) for cell in array]
    cells: list[Any] = array.to_pylist()
    return cells


def _as_tensor(inputs: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(inputs, torch.Tensor):
        return inputs.detach()
    array = np.asarray(inputs)
    if array.dtype.kind not in "biufc":
        raise TransferSetError(
            f"an array of inputs has dtype {array.dtype}; numbers are needed. Give others as a map-style dataset, such "
            "as TransferSet(list_of_inputs)"
        )
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))  # torch takes no others
    with warnings.catch_warnings():  # inputs are never written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array)


def as_label(value: Any, index: int | None) -> int:
    """Read a label as an int.

    Raises
    ------
    TransferSetError
        It is no integer.
    """
    if not _is_integer(value):
        raise TransferSetError(f"example {index} has label {value!r}; labels are class indices (int)")
    return int(value)


def as_id(value: Any, index: int | None) -> int | str:
    """Read an example_id as an int or str.

    Raises
    ------
    TransferSetError
        It is neither.
    """
    if isinstance(value, str):
        return value
    if not _is_integer(value):
        raise TransferSetError(f"example {index} has example_id {value!r}; ids are strings or integers")
    return int(value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.dtype.is_floating_point and value.dtype != torch.bool
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
