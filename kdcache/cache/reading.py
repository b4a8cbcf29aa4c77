"""SoftTargetCache: a cache that is open; rows are found by id and read where they are asked for."""

from __future__ import annotations

__all__ = ["RESIDENT_BYTES", "SoftTargetCache"]

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.decoders import open_decoder
from kdcache.cache.examples import OpenExamples
from kdcache.certificate import Certificate, certificate_of
from kdcache.codecs import Decoder
from kdcache.codecs.base import checked_temperature
from kdcache.codecs.guard import guarded_kl
from kdcache.documents import CacheDocument, CertificateDocument, CompleteDocument, TeacherDocument
from kdcache.errors import IncompleteCacheError, ShapeError, UnknownTeacherError
from kdcache.row_selection import rows_of_examples, select_rows
from kdcache.soft_targets import SoftTargets
from kdcache.store import CacheSizes, CacheStore, CodesReader, LocalCopy, ResidentCodes
from kdcache.store.ids import ids_as_given

if TYPE_CHECKING:
    import zarr

    from kdcache.stream.join import JoinedBatches


RESIDENT_BYTES = 2**31
"""Coded rows up to this size are held in memory, where nothing is said."""


class SoftTargetCache(OpenExamples):
    """A cache, open for reading. Made by `open_cache` and `build_cache`.

    Attributes
    ----------
    document : CacheDocument
        Rows, classes and layout.
    complete : CompleteDocument or None
        None while the build has not finished.
    teachers : mapping of str to TeacherDocument
        The stored teachers, in the ensemble's order.
    """

    def __init__(
        self,
        store: CacheStore,
        document: CacheDocument,
        complete: CompleteDocument | None,
        teachers: Mapping[str, TeacherDocument],
    ) -> None:
        super().__init__(store, document, examples_sha256=None if complete is None else complete.examples_sha256)
        self.complete = complete
        self.teachers = dict(teachers)
        self._resident: dict[str, ResidentCodes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resident": {}}  # another process holds rows of its own

    def __repr__(self) -> str:
        return (
            f"SoftTargetCache({self.address!r}: {self.num_examples} examples x {self.num_views} views, "
            f"{len(self.teachers)} teachers, {self.num_classes} classes)"
        )

    def __len__(self) -> int:
        return self.num_examples

    @property
    def store(self) -> CacheStore:
        """The stored parts."""
        return self._store

    @property
    def address(self) -> str:
        """Where the cache stands."""
        return self._store.address

    @property
    def num_classes(self) -> int:
        """Classes of every teacher."""
        return self.document.num_classes

    @property
    def num_views(self) -> int:
        """Views of each example."""
        return self.document.num_views

    def sizes(self) -> CacheSizes:
        """Add up what the cache takes on disk: codes, parameters, ids, documents and the whole; no file is read."""
        return self._store.sizes()

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The stored teachers, in the ensemble's order."""
        return tuple(self.teachers)

    def read(
        self,
        example_ids: Sequence[int] | Sequence[str] | np.ndarray,
        *,
        view_index: int = 0,
        teachers: Sequence[str] | None = None,
    ) -> SoftTargets:
        """Read the soft targets of examples, still coded.

        Parameters
        ----------
        example_ids : sequence of int or str [example]
            In any order; duplicates allowed.
        view_index : int
            Which view.
        teachers : sequence of str, optional
            Read only these; all where absent.

        Returns
        -------
        SoftTargets
            Rows in the order of the ids, an example's positions one after the other.

        Raises
        ------
        UnknownExampleError
            An id is not in the cache.
        UnknownTeacherError
            A teacher is not in the cache.
        ShapeError
            There is no such view.
        CorruptCacheError
            A shard is missing, torn or altered; never a wrong row.
        """
        rows, num_rows = self._rows_of(example_ids, view_index)
        return self._read(rows, teachers, num_rows if int(num_rows.max(initial=1)) > 1 else None)

    def rows_of(self, example_ids: Sequence[int] | Sequence[str] | np.ndarray, *, view_index: int = 0) -> np.ndarray:
        """Find the row numbers of examples, int64 [row], for `read_rows`.

        Raises
        ------
        UnknownExampleError, ShapeError
            As `read`.
        """
        return self._rows_of(example_ids, view_index)[0]

    def locate(
        self, example_ids: Sequence[int] | Sequence[str] | np.ndarray, *, view_index: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the first row of each example, int64 [example], and the number of its rows, int32 [example].

        Raises
        ------
        UnknownExampleError, ShapeError
            As `read`.
        """
        self._refuse_view(view_index)
        first_row, num_rows = self._store.lookup(example_ids)
        return first_row + view_index * self.document.padded_rows, num_rows

    def are_all_in_row_order(self, example_ids: Sequence[int] | Sequence[str] | np.ndarray) -> bool:
        """Tell, by content, whether these are the ids of all examples in row order, and each has one row.

        False also where that would not be told quickly, so that `locate` has to be asked: the build has not finished,
        or the example table takes more than 64 MiB.

        Raises
        ------
        CorruptCacheError
            The example table is missing, or another one than complete.json vouches for.
        """
        given, document = ids_as_given(example_ids), self.document
        if self.complete is None or not len(given) == document.num_examples == document.num_rows:
            return False
        kept = self._store.vouched_example_ids(self.complete.examples_sha256)
        return kept is not None and given.dtype == kept.dtype and np.array_equal(given, kept)

    def read_rows(self, rows: np.ndarray | Sequence[int], *, teachers: Sequence[str] | None = None) -> SoftTargets:
        """Read soft targets by row number, as `rows_of` gives them.

        Parameters
        ----------
        rows : ndarray or sequence [row] of int
        teachers : sequence of str, optional

        Raises
        ------
        ShapeError
            A row does not exist, or rows are no integers.
        UnknownTeacherError, CorruptCacheError
            As `read`.
        """
        numbers = rows if isinstance(rows, np.ndarray) else np.array(rows)
        if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and len(numbers)):
            raise ShapeError(f"row numbers are one axis of integers, not {numbers.dtype} of shape {numbers.shape}")
        return self._read(numbers.astype(np.int64, copy=False), teachers, None)

    def join(
        self,
        loader: Iterable[Any],
        *,
        key: str | int | Callable[[Any], Any] = "example_id",
        name: str = "soft_targets",
        put: Callable[[Any, SoftTargets], Any] | None = None,
        input_key: str | int | Callable[[Any], Any] | None = None,
        label_key: str | int | Callable[[Any], Any] | None = "auto",
        example_ids: Sequence[int] | Sequence[str] | np.ndarray | None = None,
        view_index: int = 0,
        teachers: Sequence[str] | None = None,
        device: str | None = None,
        allow_repeats: bool = False,
        max_resident_bytes: int = RESIDENT_BYTES,
    ) -> JoinedBatches:
        """Put soft targets onto the batches of any existing loader, by the ids that the batches hold.

        ``for batch in cache.join(loader, key="example_id"): batch["soft_targets"]``. The parameters, and what is
        guaranteed and refused, are those of `kdcache.stream.JoinedBatches`.

        Parameters
        ----------
        loader : iterable of batches
        key, name, put, input_key, label_key, example_ids, view_index, teachers, device, allow_repeats
        max_resident_bytes

        Returns
        -------
        JoinedBatches
            Of a loader with ``state_dict`` and ``load_state_dict``, one that has them too.
        """
        from kdcache.stream.join import join_batches  # noqa: PLC0415 - the method is the cache's, its code the stream's

        return join_batches(
            self, loader, key=key, name=name, put=put, input_key=input_key, label_key=label_key,
            example_ids=example_ids, view_index=view_index, teachers=teachers, device=device,
            allow_repeats=allow_repeats, max_resident_bytes=max_resident_bytes,
        )  # fmt: skip

    def hold_in_memory(self, *, teachers: Sequence[str] | None = None) -> int:
        """Read all rows into memory, still coded, so that later reads touch no file.

        Returns
        -------
        int
            Bytes held.
        """
        for codes in self.resident_codes(teachers=teachers):
            codes.fill_all()
        return sum(resident.codes.nbytes for resident in self._resident.values())

    def resident_codes(self, *, teachers: Sequence[str] | None = None) -> tuple[ResidentCodes, ...]:
        """Take room in memory for teachers' codes; each fills itself as rows are asked for.

        Raises
        ------
        IncompleteCacheError
            The build has not finished.
        UnknownTeacherError
            A teacher is not in the cache.
        """
        self.require_complete("held in memory")
        names = self._chosen(teachers)
        for name in names:
            if name not in self._resident:
                num_rows = self.document.padded_rows * self.num_views
                self._resident[name] = ResidentCodes(self._reader(name), num_rows)
        return tuple(self._resident[name] for name in names)

    def copy_to(
        self, folder: str | os.PathLike[str], *, teachers: Sequence[str] | None = None
    ) -> tuple[LocalCopy, ...]:
        """Open uncompressed copies of teachers' codes in a local folder; make those that are not there.

        Raises
        ------
        CorruptCacheError
            A shard is missing, torn or altered, or a copy is.
        IncompleteCacheError
            The build has not finished.
        StoreError
            The folder cannot be written to, or is full.
        UnknownTeacherError
            A teacher is not in the cache.
        """
        self.require_complete("copied")
        digests = {} if self.complete is None else {item.name: item.data_digest for item in self.complete.teachers}
        num_rows = self.document.padded_rows * self.num_views
        return tuple(
            LocalCopy.of(Path(folder), self._reader(name), data_digest=digests[name], num_rows=num_rows)
            for name in self._chosen(teachers)
        )

    def codes_readers(self, *, teachers: Sequence[str] | None = None) -> tuple[CodesReader, ...]:
        """Give the readers of teachers' stored codes.

        Raises
        ------
        UnknownTeacherError
            A teacher is not in the cache.
        """
        return tuple(self._reader(name) for name in self._chosen(teachers))

    def wrap(
        self,
        codes: Sequence[Tensor],
        *,
        teachers: Sequence[str] | None = None,
        available: Tensor | None = None,
        num_rows: Tensor | None = None,
    ) -> SoftTargets:
        """Make soft targets of codes [row, column] that were read by other ways, one a teacher.

        Raises
        ------
        CodecError, ShapeError
            The codes are not such as the teachers' codecs read.
        UnknownTeacherError
            A teacher is not in the cache.
        """
        names = self._chosen(teachers)
        device = codes[0].device if codes else torch.device("cpu")
        return SoftTargets(
            codes=tuple(codes),
            decoders=tuple(self._decoder(name).to(device) for name in names),
            teacher_names=tuple(names) if self.document.merge is None else self._member_names,
            merge=self.document.merge,
            available=available,
            num_rows=num_rows,
        )

    def coded_bytes(self, *, teachers: Sequence[str] | None = None) -> int:
        """Bytes that `hold_in_memory` would take, before anything is read."""
        rows = self.document.padded_rows * self.document.num_views
        chosen = [self.teachers[name] for name in self._chosen(teachers)]
        return sum(rows * document.num_columns * np.dtype(document.storage_dtype).itemsize for document in chosen)

    def certificate(self, temperature: float, *, teachers: Sequence[str] | None = None) -> Certificate:
        """State the error of the soft targets at a temperature; see `Certificate` for what each figure holds for.

        In short: the bounds hold for each teacher; those of means also for geometric and arithmetic means with any
        weights; what was measured is each teacher's alone.

        Parameters
        ----------
        temperature : float
            Finite, above 0.
        teachers : sequence of str, optional
            Stored teachers to certify; all where absent.

        Returns
        -------
        Certificate

        Raises
        ------
        IncompleteCacheError
            The build has not finished.
        TemperatureError
            The temperature is not a finite number above 0.
        UnknownTeacherError
            A teacher is not in the cache.
        """
        self.require_complete("certified")
        divisor = checked_temperature(temperature)
        names = self._chosen(teachers)
        targets = [guarded_kl(self.teachers[name].codec) for name in names]
        return certificate_of([self.certificates[name] for name in names], divisor, targets=targets)

    @property
    def certificates(self) -> dict[str, CertificateDocument]:
        """The certificate of each stored teacher."""
        return {} if self.complete is None else {item.name: item.certificate for item in self.complete.teachers}

    def as_zarr(self) -> zarr.Group:
        """Open the cache with plain zarr-python, read-only: the stored codes, not soft targets; see docs/format.md.

        Raises
        ------
        IncompleteCacheError
            The build has not finished.
        """
        self.require_complete("opened as Zarr")
        return self._store.zarr_group()

    def _rows_of(self, example_ids: Any, view_index: int) -> tuple[np.ndarray, np.ndarray]:
        first_row, num_rows = self.locate(example_ids, view_index=view_index)
        return rows_of_examples(first_row, num_rows), num_rows

    def _refuse_view(self, view_index: int) -> None:
        if not 0 <= view_index < self.num_views:
            raise ShapeError(f"cache {self.address} has {self.num_views} view(s); there is no view {view_index}")

    def _read(self, rows: np.ndarray, teachers: Sequence[str] | None, num_rows: np.ndarray | None) -> SoftTargets:
        names = self._chosen(teachers)
        available = None if self.complete is not None else self._available(rows, names)
        return self.wrap(
            [self._codes(name, rows, available) for name in names],
            teachers=names,
            available=None if available is None else torch.from_numpy(available),
            num_rows=None if num_rows is None else torch.from_numpy(num_rows),
        )

    @property
    def _member_names(self) -> tuple[str, ...]:
        return tuple(member.name for teacher in self.teachers.values() for member in teacher.members)

    def _codes(self, name: str, rows: np.ndarray, available: np.ndarray | None) -> Tensor:
        if name in self._resident:
            self._refuse_missing(rows)
            self._resident[name].fill(rows)
            return select_rows(torch.from_numpy(self._resident[name].codes), torch.from_numpy(rows))
        reader = self._reader(name)
        if available is None:
            return torch.from_numpy(reader.read_rows(rows))
        codes = np.full((len(rows), reader.spec.num_columns), reader.spec.fill, dtype=reader.spec.little)
        codes[available] = reader.read_rows(rows[available])
        return torch.from_numpy(codes)

    def _refuse_missing(self, rows: np.ndarray) -> None:
        """Refuse rows that do not exist, as a reader of files does by itself."""
        document = self.document
        if len(rows) and rows.view(np.uint64).max() < document.num_rows:  # of the first view; a negative one is huge
            return
        within = (rows >= 0) & (rows < document.padded_rows * document.num_views)
        exists = within & (rows % document.padded_rows < document.num_rows)
        if not exists.all():
            raise ShapeError(
                f"cache {self.address} has no row {int(rows[~exists][0])}: each of its {document.num_views} view(s) "
                f"has {document.num_rows} rows in a block of {document.padded_rows}; `rows_of` gives row numbers"
            )

    def _available(self, rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
        shards, inverse = np.unique(rows // self.document.shard_rows, return_inverse=True)
        there = [all(self._store.record(name, int(shard)) is not None for name in names) for shard in shards]
        return np.array(there, dtype=bool)[inverse]

    def _reader(self, name: str) -> CodesReader:
        if name not in self._readers:
            self._readers[name] = self._store.codes_reader(self.teachers[name], self.document, by_record=True)
        return self._readers[name]

    @functools.cached_property
    def _readers(self) -> dict[str, CodesReader]:
        return {}

    def _decoder(self, name: str) -> Decoder:
        if name not in self._decoders:
            self._decoders[name] = open_decoder(self._store, self.teachers[name])
        return self._decoders[name]

    @functools.cached_property
    def _decoders(self) -> dict[str, Decoder]:
        return {}

    def _chosen(self, teachers: Sequence[str] | None) -> list[str]:
        if teachers is None:
            return list(self.teachers)
        names = [teachers] if isinstance(teachers, str) else list(teachers)
        unknown = [name for name in names if name not in self.teachers]
        if unknown or not names:
            asked = f"has no teacher {', '.join(map(repr, unknown))}" if unknown else "was asked for no teacher at all"
            raise UnknownTeacherError(f"cache {self.address} {asked}; it has {', '.join(map(repr, self.teachers))}")
        return names

    def require_complete(self, what: str) -> None:
        """Refuse what an unfinished cache is no good for.

        Parameters
        ----------
        what : str
            Such as "certified": what the cache cannot be.

        Raises
        ------
        IncompleteCacheError
            The build has not finished.
        """
        if self.complete is None:
            raise IncompleteCacheError(
                f"cache {self.address} is not complete, so it cannot be {what}; run its build again to finish it"
            )
