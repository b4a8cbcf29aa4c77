"""Controls, always shown: rows that lie uncompressed in a file, and whole shards of Zarr with a gather in memory.

The second is the best compressed path that a user can write: read a window of whole shards into memory that is used
again, and gather shuffled batches from it.
"""

from __future__ import annotations

__all__ = ["CONTROLS"]

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.streaming.contestant import Batch, Contestant, Epoch, Stored
from benchmarks.streaming.row_sets import RowSet

WINDOW_SHARDS: Final = 4
_CODES: Final = "teachers/teacher/codes"


def _save(row_set: RowSet, folder: Path) -> None:
    for name, array in row_set.arrays.items():
        np.save(folder / f"{name}.npy", array)


def _save_zarr(row_set: RowSet, folder: Path) -> None:
    import zarr

    for name, values in row_set.arrays.items():
        zarr.create_array(folder / name, data=np.ascontiguousarray(values))


def _memmap(stored: Stored) -> Epoch:
    # user's code
    columns = [np.load(stored.folder / f"{name}.npy", mmap_mode="r") for name in stored.columns]

    def epoch(number: int) -> Iterator[Batch]:
        order = np.random.default_rng(number).permutation(stored.num_rows)
        for start in range(0, stored.num_rows, stored.batch_size):
            rows = order[start : start + stored.batch_size]
            yield rows, tuple(torch.from_numpy(column[rows]) for column in columns)

    # end of it
    return epoch


def _mapped_tensor(stored: Stored) -> Epoch:
    # user's code
    columns = []
    for name, (dtype, width) in stored.columns.items():
        array = np.memmap(stored.folder / f"{name}.npy", dtype, "c", 128, (stored.num_rows, width))
        columns.append(torch.from_numpy(array.view(np.int16) if dtype == "uint16" else array))

    def epoch(number: int) -> Iterator[Batch]:
        order = torch.randperm(stored.num_rows, generator=torch.Generator().manual_seed(number))
        for rows in order.split(stored.batch_size):
            yield rows, tuple(column.index_select(0, rows) for column in columns)

    # end of it
    return epoch


def _windows(arrays: Sequence[Any], block_rows: int, stored: Stored) -> Epoch:
    """Shuffle whole blocks of rows, and rows within windows of some of them."""
    # user's code
    shapes = [(WINDOW_SHARDS * block_rows, array.shape[1]) for array in arrays]
    dtypes = [np.int16 if dtype == "uint16" else np.dtype(dtype) for dtype, _ in stored.columns.values()]
    buffers = [np.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    tensors = [torch.from_numpy(buffer) for buffer in buffers]

    def epoch(number: int) -> Iterator[Batch]:
        generator = np.random.default_rng(number)
        starts = generator.permutation(-(-stored.num_rows // block_rows)) * block_rows
        for first in range(0, len(starts), WINDOW_SHARDS):
            filled, rows = 0, []
            for start in starts[first : first + WINDOW_SHARDS].tolist():
                stop = min(start + block_rows, stored.num_rows)
                for buffer, array in zip(buffers, arrays, strict=True):
                    buffer[filled : filled + stop - start] = _read(array, start, stop).view(buffer.dtype)
                rows.append(np.arange(start, stop))
                filled += stop - start
            places = torch.from_numpy(generator.permutation(filled))
            numbers = torch.from_numpy(np.concatenate(rows)).index_select(0, places)
            batches = zip(numbers.split(stored.batch_size), places.split(stored.batch_size), strict=True)
            for batch_rows, batch_places in batches:
                yield batch_rows, tuple(tensor.index_select(0, batch_places) for tensor in tensors)

    # end of it
    return epoch


def _read(array: Any, start: int, stop: int) -> Any:
    values = array[start:stop]
    return values.read().result() if hasattr(values, "read") else values


def _shard_by_shard(array: Any, block_rows: int, stored: Stored) -> Epoch:
    """Shuffle whole shards, and rows within each: no copy of a shard is made."""
    # user's code

    def epoch(number: int) -> Iterator[Batch]:
        generator = np.random.default_rng(number)
        for shard in generator.permutation(-(-stored.num_rows // block_rows)).tolist():
            start, stop = shard * block_rows, min((shard + 1) * block_rows, stored.num_rows)
            values = array[start:stop]
            tensor = torch.from_numpy(values.view(np.int16) if values.dtype == np.uint16 else values)
            places = torch.from_numpy(generator.permutation(stop - start))
            for batch_places in places.split(stored.batch_size):
                yield batch_places + start, (tensor.index_select(0, batch_places),)

    # end of it
    return epoch


def _zarrs(stored: Stored) -> Epoch:
    # user's code
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    array = zarr.open_array(stored.folder / _CODES, mode="r")
    # end of it
    return _windows([array], _shard_rows(array), _one_column(stored, array))


def _zarrs_one_shard(stored: Stored) -> Epoch:
    # user's code
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    array = zarr.open_array(stored.folder / _CODES, mode="r")
    # end of it
    return _shard_by_shard(array, _shard_rows(array), stored)


def _zarr_python(stored: Stored) -> Epoch:
    # user's code
    import zarr

    array = zarr.open_array(stored.folder / _CODES, mode="r")
    # end of it
    return _windows([array], _shard_rows(array), _one_column(stored, array))


def _zarrs_defaults(stored: Stored) -> Epoch:
    # user's code
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    arrays: list[Any] = [zarr.open_array(stored.folder / name, mode="r") for name in stored.columns]
    # end of it
    return _windows(arrays, min(int(array.chunks[0]) for array in arrays), stored)


def _tensorstore(stored: Stored) -> Epoch:
    # user's code
    import tensorstore as ts

    place = {"driver": "file", "path": str(stored.folder / _CODES)}
    array: Any = ts.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    # end of it
    return _windows([array], array.chunk_layout.write_chunk.shape[0], _one_column(stored, array))


def _shard_rows(array: Any) -> int:
    return int(array.shards[0])


def _one_column(stored: Stored, array: Any) -> Stored:
    from dataclasses import replace

    from benchmarks.streaming.row_sets import Column

    dtype = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype)).name
    return replace(stored, columns={"codes": Column(dtype, array.shape[1])})


def _over_cache(name: str, open_epochs: Any, modules: tuple[str, ...], shared: Any = _windows) -> Contestant:
    return Contestant(
        name, "control", open_epochs, "cache", modules, reads="codes", shared=(shared,),
        note="reads kdcache's own files",
    )  # fmt: skip


CONTROLS: Final = (
    Contestant("memmap[rows], uncompressed", "control", _memmap, "npy", ("numpy",), _save),
    Contestant("mapped tensor, index_select, uncompressed", "control", _mapped_tensor, "npy", ("torch",), _save),
    _over_cache("zarrs, windows of 4 shards", _zarrs, ("zarrs",)),
    _over_cache("zarrs, shard by shard", _zarrs_one_shard, ("zarrs",), _shard_by_shard),
    _over_cache("zarr-python, windows of 4 shards", _zarr_python, ("zarr",)),
    _over_cache("tensorstore, windows of 4 shards", _tensorstore, ("tensorstore",)),
    Contestant(
        "zarrs over zarr-python's defaults", "control", _zarrs_defaults, "zarr", ("zarrs",), _save_zarr,
        shared=(_windows,),
    ),
)  # fmt: skip
"""What every table shows."""
