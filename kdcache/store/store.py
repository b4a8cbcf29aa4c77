"""CacheStore: a cache's documents, examples and shards at one address.

Everything but the consolidated metadata and complete.json is create-only: written once, by whoever comes first, and
never changed. Each step is idempotent, so a build that died is simply run again.
"""

from __future__ import annotations

__all__ = ["CacheStore", "PublishedShard"]

import functools
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from kdcache.documents import CacheDocument, Record, TeacherDocument
from kdcache.errors import DocumentError, Problem
from kdcache.store import arrays, layout
from kdcache.store.codes_reader import CodesReader
from kdcache.store.examples import ExampleTable
from kdcache.store.files import ATTRIBUTE
from kdcache.store.ids import ExampleIds
from kdcache.store.index import IdIndex
from kdcache.store.index_files import fences_sha256, index_digest, open_index, publish_index
from kdcache.store.local_objects import LocalObjects
from kdcache.store.locks import OwnLock
from kdcache.store.objects import Objects, open_objects
from kdcache.store.place import Place
from kdcache.store.reader import DEFAULT_CACHE_BYTES
from kdcache.store.sizes import CacheSizes, sizes_of
from kdcache.store.stored_documents import StoredDocuments
from kdcache.store.teachers import (
    PublishedShard,
    check_codes,
    check_teacher,
    codes_metadata,
    describe_parameters,
    open_codes,
    publish_parameters,
    publish_shard,
    read_parameters,
)

if TYPE_CHECKING:
    import zarr

    from kdcache.store.parquet import ExampleColumns

_VOUCHED_BYTES = 2**26
"""An example table up to this size is read whole, and held against its digest, for each of its columns."""
_READING_THREADS = 32
"""Records read at once: on an object store each costs a few round trips, and next to no work."""

_RECORDS_AT_ONCE = 16


class CacheStore(StoredDocuments):
    """One cache's stored parts. Knows the format; knows no codec, no teacher and no training.

    Parameters
    ----------
    objects : Objects
        Where the parts are kept.
    """

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self._index: IdIndex | None = None
        self._columns: ExampleColumns | None = None
        self._lock = OwnLock()

    @classmethod
    def at(cls, address: str | os.PathLike[str]) -> Self:
        """Give the store at an address; nothing is read or written yet."""
        return cls(open_objects(address))

    def __reduce__(self) -> tuple[type[CacheStore], tuple[Objects]]:
        return type(self), (self._objects,)

    def __repr__(self) -> str:
        return f"CacheStore({self.address!r})"

    # Examples and index ----------------------------------------------------------------------------------------------

    def write_examples(self, table: ExampleTable) -> None:
        """Store the example table unless it stands already.

        Raises
        ------
        CorruptCacheError
            Another table, or a damaged one, stands there.
        """
        if self._objects.size(layout.EXAMPLES) is None:
            data = table.to_parquet(transfer_set_digest=self.cache_document().transfer_set_digest)
            if self._objects.publish(layout.EXAMPLES, data):
                return
        if not self.examples().equals(table):
            raise self._files.place(layout.EXAMPLES).corrupt("the examples that stand there are not those of the plan")

    def examples(self, columns: Sequence[str] | None = None) -> ExampleTable:
        """Read the example table.

        Parameters
        ----------
        columns : sequence of str, optional
            Which of the optional columns ("label", "input_digest") to read; both where absent.

        Raises
        ------
        CorruptCacheError
            The table is missing, torn or altered.
        """
        place = self._files.place(layout.EXAMPLES)
        document = self.cache_document()
        return ExampleTable.from_parquet(
            self._files.read(place), place=place, columns=columns, num_examples=document.num_examples,
            transfer_set_digest=document.transfer_set_digest,
        )  # fmt: skip

    def vouched_example_ids(self, sha256: str) -> npt.NDArray[Any] | None:
        """Read the ids of all examples in row order; None where the table takes more than 64 MiB.

        Raises
        ------
        CorruptCacheError
            The table is missing, or not the one of this digest.
        """
        data = self._vouched_table(sha256)
        return None if data is None else self._example_columns(data).column("example_id")

    def example_column(self, name: str, *, sha256: str | None = None) -> npt.NDArray[Any] | None:
        """Read a single column of the example table by its name in the file; None where it is null throughout.

        Parameters
        ----------
        name : str
        sha256 : str, optional
            Of the table, as complete.json names it; tables of up to 64 MiB are held against it.

        Raises
        ------
        CorruptCacheError
            The table is missing, torn or altered.
        """
        data = None if sha256 is None else self._vouched_table(sha256)
        return self._example_columns(data).column(name)

    def _vouched_table(self, sha256: str) -> bytes | None:
        """Give the bytes of the example table, or None where it is large, which takes too long to tell."""
        place = self._files.place(layout.EXAMPLES)
        if (self._objects.size(layout.EXAMPLES) or 0) > _VOUCHED_BYTES:
            return None
        data = self._files.read(place)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise place.corrupt(
                "the file is another one than complete.json vouches for: ids, labels or digests may differ"
            )
        return data

    def example_values(self, name: str, example_indices: npt.ArrayLike) -> npt.NDArray[Any] | None:
        """Read a column's values for some examples, in the order given; None where the column is null throughout.

        Only the row groups in which the examples lie are read, and those last used are kept in bounded memory.

        Parameters
        ----------
        name : str
            The column's name in the file.
        example_indices : array_like [example] of int
            Positions in the table; duplicates allowed.

        Raises
        ------
        CorruptCacheError
            The table is missing, torn or altered.
        ShapeError
            There is no such example.
        """
        with self._lock:
            if self._columns is None:
                self._columns = self._example_columns()
        return self._columns.values(name, example_indices)

    def _example_columns(self, data: bytes | None = None) -> ExampleColumns:
        from kdcache.store.parquet import ExampleColumns, RangedFile  # noqa: PLC0415 - opening does without Arrow

        place = self._files.place(layout.EXAMPLES)
        whole = None if data is None else functools.partial(io.BytesIO, data)
        document = self.cache_document()
        return ExampleColumns(
            whole or functools.partial(RangedFile, self._objects, place), place=place,
            num_examples=document.num_examples, transfer_set_digest=document.transfer_set_digest,
        )  # fmt: skip

    def examples_place(self) -> Place:
        """Give the place of the example table, for messages."""
        return self._files.place(layout.EXAMPLES)

    def examples_sha256(self) -> str:
        """Digest of examples.parquet."""
        return hashlib.sha256(self._files.read(self._files.place(layout.EXAMPLES))).hexdigest()

    def write_index(self, table: ExampleTable) -> None:
        """Store the id index of a table, whatever part of it is missing, and check the parts that stand.

        Raises
        ------
        DuplicateExampleError
            An example_id stands more than once; nothing is written.
        CorruptCacheError
            A part that stands is damaged, or is that of another table.
        """
        publish_index(self._files, table)

    def index_digest(self, keys: Sequence[str] | None = None) -> str:
        """Digest over the files of the id index, or `keys` alone: SHA-256 over key, size and bytes, keys ascending."""
        return index_digest(self._files, keys)

    def fences_sha256(self) -> str:
        """Digest of the id index's fences, which name the checksums of all its other chunks."""
        return fences_sha256(self._files)

    def lookup(self, example_ids: ExampleIds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Find examples' first rows and numbers of rows; see `IdIndex.lookup`.

        Raises
        ------
        UnknownExampleError
            Some ids are not in the cache, or are of the other type.
        """
        with self._lock:
            if self._index is None:
                complete = self.complete()
                fences_sha256 = None if complete is None else complete.fences_sha256
                self._index = open_index(self._files, self.cache_document(), fences_sha256=fences_sha256)
        return self._index.lookup(example_ids)

    # Teachers --------------------------------------------------------------------------------------------------------

    def publish_teacher(self, document: TeacherDocument, parameters: Mapping[str, npt.NDArray[Any]]) -> TeacherDocument:
        """Store a teacher's parameters, its document and its array's metadata, in this order.

        The parameters go into a group named after their content, so that the fits of two builders never mix. The
        document's fields `parameters` and `parameters_group` are set from the parameters given.

        Parameters
        ----------
        document : TeacherDocument
            The teacher, its codec and the pilot.
        parameters : mapping of str to ndarray
            The codec's parameters, by name.

        Returns
        -------
        TeacherDocument
            The document that stands: this one, or an earlier builder's. The caller compares.
        """
        described, group = describe_parameters(parameters)
        changes = {
            "parameters": {name: item.to_mapping() for name, item in described.items()},
            "parameters_group": group,
        }
        document = TeacherDocument.from_mapping(
            {**document.to_mapping(), **changes}, source=f"the document given for teacher {document.name}"
        )
        node = layout.teacher_group(document.name)
        if group is not None:
            publish_parameters(self._files, f"{node}/{group}", parameters)
        metadata = arrays.group_metadata({ATTRIBUTE: document.to_mapping()})
        self._files.publish_json(layout.metadata_key(node), metadata)
        standing = self.teacher(document.name)
        if standing is None:
            raise self._files.place(layout.metadata_key(node)).corrupt("the teacher vanished while it was written")
        self._files.publish_json(
            layout.metadata_key(f"{node}/{layout.CODES}"), codes_metadata(standing, self.cache_document())
        )
        return standing

    def teacher(self, name: str) -> TeacherDocument | None:
        """Read a teacher's document; None where there is no such teacher.

        Raises
        ------
        DocumentError
            The document breaks its schema, or names another teacher.
        """
        group = layout.teacher_group(name)
        document = self._files.read_group_document(TeacherDocument, group)
        if document is not None and document.name != name:
            problem = Problem("name", "wrong_place", f"names teacher {document.name!r} in the group of {name!r}")
            raise DocumentError(TeacherDocument.title, str(self._files.place(layout.metadata_key(group))), (problem,))
        return document

    def teacher_of(self, name: str, cache_document: CacheDocument) -> TeacherDocument | None:
        """Read a teacher's document, as `teacher`, and hold it against the cache document.

        Raises
        ------
        CorruptCacheError
            The two cannot be of one cache: they tell of other classes, or of chunks that no one can have stored.
        DocumentError
            As `teacher`.
        """
        document = self.teacher(name)
        if document is not None:
            check_teacher(document, cache_document, place=self.teacher_place(name))
        return document

    def teacher_place(self, name: str) -> Place:
        """Give the place of a teacher's document, for messages."""
        return self._files.teacher_place(layout.metadata_key(layout.teacher_group(name)), name)

    def parameters(self, teacher_document: TeacherDocument) -> dict[str, npt.NDArray[Any]]:
        """Read a codec's parameters and check them against the digests in the teacher's document.

        Raises
        ------
        CorruptCacheError
            A parameter is missing, torn or altered.
        """
        return read_parameters(self._files, teacher_document)

    # Shards and records ----------------------------------------------------------------------------------------------

    def publish_shard(
        self,
        teacher_document: TeacherDocument,
        cache_document: CacheDocument,
        shard_index: int,
        codes: npt.NDArray[Any],
    ) -> PublishedShard:
        """Encode and store one shard of a teacher's codes unless one stands there.

        Parameters
        ----------
        teacher_document : TeacherDocument
            The teacher, as `publish_teacher` returned it.
        cache_document : CacheDocument
            Says how many rows the shard has.
        shard_index : int
            Shard, counted over all views.
        codes : ndarray [row, column]
            All rows of the shard that are not padding, in the stored dtype.

        Returns
        -------
        PublishedShard
            Size and digest of the shard that stands, and whether it is this one.

        Raises
        ------
        ShapeError
            The codes are not the rows of this shard.
        CodecError
            The codes hold the fill code, which is kept for rows that do not exist.
        CorruptCacheError
            A damaged shard stands there.
        """
        return publish_shard(self._files, teacher_document, cache_document, shard_index, codes)

    def shard_bytes(self, name: str, shard_index: int) -> bytes:
        """Read a whole shard as stored.

        Raises
        ------
        CorruptCacheError
            The shard is missing.
        """
        return self._files.read(self._files.shard_place(name, shard_index))

    def publish_record(self, record: Record) -> bool:
        """Store a shard's record unless one stands; True when this one was stored."""
        return self._objects.publish(layout.record_key(record.teacher, record.shard_index), record.to_json())

    def record(self, name: str, shard_index: int) -> Record | None:
        """Read a shard's record; None where the shard is not done.

        Raises
        ------
        DocumentError
            The record breaks its schema, or is that of another shard.
        """
        key = layout.record_key(name, shard_index)
        record = self._files.read_document(Record, key)
        if record is not None and (record.teacher, record.shard_index) != (name, shard_index):
            problem = Problem("", "wrong_place", f"is the record of {record.teacher!r} shard {record.shard_index}")
            raise DocumentError(Record.title, str(self._files.place(key)), (problem,))
        return record

    def records(self, name: str) -> dict[int, Record]:
        """Read all records of a teacher, by shard index, ascending; many at a time."""
        names = [key.rsplit("/", 1)[1].removesuffix(".json") for key in self._objects.list(layout.records_folder(name))]
        indexes = sorted(int(text) for text in names if text.isdecimal())
        with ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="kdcache-records") as pool:
            found = pool.map(functools.partial(self._records_of, name), _blocks(indexes))
            return {index: record for block in found for index, record in block}

    def _records_of(self, name: str, shard_indices: Sequence[int]) -> list[tuple[int, Record]]:
        found = [(index, self.record(name, index)) for index in shard_indices]
        return [(index, record) for index, record in found if record is not None]

    def shard_sizes(self, name: str) -> dict[int, int]:
        """Give the sizes in bytes of a teacher's shards that stand, by their numbers; one list of their folder."""
        sizes = self._objects.sizes(layout.shards_folder(name))
        numbers = [int(number) for number in (key.split("/")[-2] for key in sizes) if number.isdecimal()]
        keys = {number: layout.shard_key(name, number) for number in numbers}  # other files may lie beside a shard
        return {number: sizes[key] for number, key in keys.items() if key in sizes}

    # The whole -------------------------------------------------------------------------------------------------------

    def sizes(self) -> CacheSizes:
        """Add up what the cache takes on disk, by what it is for; see `CacheSizes`."""
        return sizes_of(self._objects)

    def remove_stale_partials(self) -> int:
        """Remove what stopped writers left behind; see `LocalObjects.remove_stale_partials`. Gives the files removed.

        Stores other than local folders publish without partial files: nothing is done there.
        """
        return self._objects.remove_stale_partials() if isinstance(self._objects, LocalObjects) else 0

    def zarr_group(self) -> zarr.Group:
        """Open the cache read-only with zarr-python, through its consolidated metadata."""
        from kdcache.store.zarr_group import open_zarr_group  # noqa: PLC0415 - reading and training do without Zarr

        return open_zarr_group(self._objects)

    def check_zarr(self, teacher_names: Sequence[str], cache_document: CacheDocument) -> None:
        """Hold what zarr-python sees of the codes against the documents, so that every array opens without kdcache.

        Raises
        ------
        CorruptCacheError
            zarr-python cannot open an array, or sees another shape, type or layout.
        """
        for name in teacher_names:
            document = self.teacher(name)
            place = self._files.teacher_place(layout.metadata_key(f"{layout.teacher_group(name)}/{layout.CODES}"), name)
            if document is None:
                raise place.corrupt("the teacher's document is missing")
            check_codes(self.zarr_group(), document, cache_document, place=place)

    # Reading ---------------------------------------------------------------------------------------------------------

    def codes_reader(
        self,
        teacher_document: TeacherDocument,
        cache_document: CacheDocument,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        by_record: bool = False,
    ) -> CodesReader:
        """Give a reader of a teacher's codes; nothing is read yet but the array's metadata.

        Parameters
        ----------
        teacher_document : TeacherDocument
            The teacher.
        cache_document : CacheDocument
            Says which rows exist.
        cache_bytes : int
            Decoded chunks to keep in memory.
        by_record : bool
            Hold every chunk against its shard's record, which must stand: a sound chunk of another shard is refused.

        Raises
        ------
        CorruptCacheError
            The array's metadata are missing, or contradict the documents.
        """
        record_of = functools.partial(self.record, teacher_document.name) if by_record else None
        return open_codes(self._files, teacher_document, cache_document, cache_bytes=cache_bytes, record_of=record_of)


def _blocks(indexes: Sequence[int]) -> list[Sequence[int]]:
    return [indexes[start : start + _RECORDS_AT_ONCE] for start in range(0, len(indexes), _RECORDS_AT_ONCE)]
