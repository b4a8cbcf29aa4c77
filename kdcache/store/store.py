"""CacheStore: a cache's documents, examples and shards at one address.

Everything but the consolidated metadata and complete.json is create-only: written once, by whoever comes first, and
never changed. Each step is idempotent, so a build that died is simply run again.
"""

from __future__ import annotations

__all__ = ["CacheStore", "PublishedShard"]

import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.documents import (
    CacheDocument,
    CompleteDocument,
    Document,
    Parameter,
    PlanDocument,
    Record,
    TeacherDocument,
    differences,
)
from kdcache.errors import (
    CacheNotFoundError,
    CodecError,
    DocumentError,
    PlanMismatchError,
    Problem,
    ShapeError,
)
from kdcache.store import arrays, layout
from kdcache.store.examples import ExampleTable, read_column
from kdcache.store.index import CHUNK_ENTRIES, IdIndex, index_arrays, index_spec
from kdcache.store.objects import Objects, open_objects
from kdcache.store.place import Place
from kdcache.store.reader import DEFAULT_CACHE_BYTES, CodesReader, ShardedReader, has_fill
from kdcache.store.shards import ShardSpec, decode_shard, encode_shard

ATTRIBUTE = "kdcache"
"""The Zarr attribute under which a group keeps its document."""
_FILLS: dict[str, int | float] = {"uint8": 255, "uint16": 65_535, "float16": math.nan, "float32": math.nan}
_INDEX_DIMENSIONS = {layout.INDEX_ENTRIES: ("entry", "field"), layout.INDEX_FENCES: ("chunk", "bound")}

AnyDocument = TypeVar("AnyDocument", bound=Document)


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
        False when another writer's shard stood there already: size and digest are then of that one.
    """

    num_bytes: int
    sha256: str
    created: bool


class CacheStore:
    """One cache's stored parts. Knows the format; knows no codec, no teacher and no training.

    Parameters
    ----------
    objects : Objects
        Where the parts are kept.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._index: IdIndex | None = None
        self._lock = threading.Lock()

    @classmethod
    def at(cls, address: str | os.PathLike[str]) -> Self:
        """Give the store at an address; nothing is read or written yet."""
        return cls(open_objects(address))

    def __repr__(self) -> str:
        return f"CacheStore({self.address!r})"

    @property
    def address(self) -> str:
        """The cache's address."""
        return self._objects.address

    @property
    def objects(self) -> Objects:
        """Where the parts are kept."""
        return self._objects

    # Plans -----------------------------------------------------------------------------------------------------------

    def plans(self) -> list[PlanDocument]:
        """Read all plans, oldest first; the last is in force.

        Raises
        ------
        DocumentError
            A plan's file breaks its schema.
        """
        plans: list[PlanDocument] = []
        while (plan := self._document(PlanDocument, layout.plan_key(len(plans)))) is not None:
            plans.append(plan)
        return plans

    def publish_plan(self, index: int, plan: PlanDocument) -> bool:
        """Store a plan unless one with this number stands; True when this one was stored."""
        return self._objects.publish(layout.plan_key(index), plan.to_json())

    # Root ------------------------------------------------------------------------------------------------------------

    def write_root(self, cache_document: CacheDocument) -> None:
        """Store the root group with the cache document, and the groups below it.

        Raises
        ------
        PlanMismatchError
            The root stands already and describes another cache; both sides are shown.
        """
        metadata = arrays.group_metadata({ATTRIBUTE: cache_document.to_mapping()})
        if not self._objects.publish(layout.ROOT, arrays.to_json(metadata)):
            standing = self.cache_document()
            if standing != cache_document:
                raise PlanMismatchError(_mismatch(self._place(layout.ROOT), cache_document, standing))
        for group in layout.GROUPS:
            self._publish_json(layout.metadata_key(group), arrays.group_metadata({}))

    def cache_document(self) -> CacheDocument:
        """Read the cache document.

        Raises
        ------
        CacheNotFoundError
            Nothing stands at the address.
        DocumentError
            The root group or the document in it breaks its schema.
        """
        document = self._group_document(CacheDocument, "")
        if document is None:
            raise CacheNotFoundError(
                f"{self.address} holds no cache: {layout.ROOT} is not there. Check the address, or build a cache there "
                "with kdcache.build_cache or `kdcache build`."
            )
        return document

    # Examples and index ----------------------------------------------------------------------------------------------

    def write_examples(self, table: ExampleTable) -> None:
        """Store the example table unless it stands already.

        Raises
        ------
        CorruptCacheError
            Another table, or a damaged one, stands there.
        """
        if self._objects.size(layout.EXAMPLES) is None and self._objects.publish(layout.EXAMPLES, table.to_parquet()):
            return
        if not self.examples().equals(table):
            raise self._place(layout.EXAMPLES).corrupt("the examples that stand there are not those of the plan")

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
        place = self._place(layout.EXAMPLES)
        return ExampleTable.from_parquet(self._read(place), place=place, columns=columns)

    def example_column(self, name: str) -> npt.NDArray[Any] | None:
        """Read a single column of the example table by its name in the file; None where it is null throughout."""
        place = self._place(layout.EXAMPLES)
        return read_column(self._read(place), name, place=place)

    def examples_sha256(self) -> str:
        """Digest of examples.parquet."""
        return hashlib.sha256(self._read(self._place(layout.EXAMPLES))).hexdigest()

    def write_index(self, table: ExampleTable) -> None:
        """Store the id index of a table, whatever part of it is missing.

        Raises
        ------
        DuplicateExampleError
            An example_id stands more than once; nothing is written.
        """
        index = index_arrays(table)
        spec = index_spec(len(table))
        num_shards = -(-len(table) // spec.shard_rows)
        for shard in range(num_shards):
            key = layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0))
            if self._objects.size(key) is None:
                rows = index.entries[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
                self._objects.publish(key, encode_shard(rows, spec))
        self._objects.publish(layout.chunk_key(layout.INDEX_FENCES, (0, 0)), arrays.encode_small_array(index.fences))
        entries = arrays.sharded_array_metadata(
            num_shards, spec, dimension_names=_INDEX_DIMENSIONS[layout.INDEX_ENTRIES]
        )
        fences = arrays.small_array_metadata(index.fences, dimension_names=_INDEX_DIMENSIONS[layout.INDEX_FENCES])
        self._publish_json(layout.metadata_key(layout.INDEX_ENTRIES), entries)
        self._publish_json(layout.metadata_key(layout.INDEX_FENCES), fences)

    def index_digest(self) -> str:
        """Digest over the files of the id index: SHA-256 over each key, its size and its bytes, keys ascending."""
        digest = hashlib.sha256()
        for key in sorted(self._objects.list(layout.INDEX)):
            data = self._objects.read(key)
            digest.update(f"{key}\0{len(data)}\0".encode())
            digest.update(data)
        return digest.hexdigest()

    def lookup(
        self, example_ids: Sequence[int] | Sequence[str] | npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Find examples' first rows and numbers of rows; see `IdIndex.lookup`.

        Raises
        ------
        UnknownExampleError
            Some ids are not in the cache, or are of the other type.
        """
        return self._id_index().lookup(example_ids)

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
        described = {name: _describe(array) for name, array in parameters.items()}
        group = f"parameters-{_parameters_digest(described)[:16]}" if described else None
        changes = {
            "parameters": {name: item.to_mapping() for name, item in described.items()},
            "parameters_group": group,
        }
        document = TeacherDocument.from_mapping(
            {**document.to_mapping(), **changes}, source=f"the document given for teacher {document.name}"
        )
        if group is not None:
            self._publish_parameters(f"{layout.teacher_group(document.name)}/{group}", parameters)
        metadata = arrays.group_metadata({ATTRIBUTE: document.to_mapping()})
        self._publish_json(layout.metadata_key(layout.teacher_group(document.name)), metadata)
        standing = self.teacher(document.name)
        if standing is None:
            raise self._place(layout.teacher_group(document.name)).corrupt(
                "the teacher's group vanished while it was written"
            )
        self._publish_codes_metadata(standing)
        return standing

    def teacher(self, name: str) -> TeacherDocument | None:
        """Read a teacher's document; None where there is no such teacher.

        Raises
        ------
        DocumentError
            The document breaks its schema, or names another teacher.
        """
        group = layout.teacher_group(name)
        document = self._group_document(TeacherDocument, group)
        if document is not None and document.name != name:
            problem = Problem("name", "wrong_place", f"names teacher {document.name!r} in the group of {name!r}")
            raise DocumentError(TeacherDocument.title, str(self._place(layout.metadata_key(group))), (problem,))
        return document

    def parameters(self, teacher_document: TeacherDocument) -> dict[str, npt.NDArray[Any]]:
        """Read a codec's parameters and check them against the digests in the teacher's document.

        Raises
        ------
        CorruptCacheError
            A parameter is missing, torn or altered.
        """
        name = teacher_document.name
        group = f"{layout.teacher_group(name)}/{teacher_document.parameters_group}"
        parameters: dict[str, npt.NDArray[Any]] = {}
        for parameter, described in teacher_document.parameters.items():
            position = (0,) * len(described.shape)
            place = self._teacher_place(layout.chunk_key(f"{group}/{parameter}", position), name)
            data = self._read(place) if math.prod(described.shape) else arrays.encode_small_array(np.empty(0, "u1"))
            array = arrays.decode_small_array(data, dtype=described.dtype, shape=described.shape, place=place)
            if _describe(array).sha256 != described.sha256:
                raise place.corrupt(f"parameter {parameter!r} has not the digest that the teacher's document names")
            parameters[parameter] = array
        return parameters

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
        spec = shard_spec(teacher_document, cache_document)
        place = self._shard_place(teacher_document.name, shard_index)
        expected = (cache_document.rows_in_shard(shard_index), spec.num_columns)
        if not 0 <= shard_index < cache_document.num_shards or codes.shape != expected:
            raise ShapeError(
                f"{place}: the shard takes codes of shape {expected}, not {codes.shape}; nothing was written"
            )
        if has_fill(codes, spec.fill):
            raise CodecError(
                f"{place}: the codes hold the fill code {spec.fill}, which means a row that does not exist; nothing "
                "was written. The codec must not give this code for any logit."
            )
        data = encode_shard(codes, spec)
        created = self._objects.publish(place.key, data)
        if not created:
            data = self.shard_bytes(teacher_document.name, shard_index)
            decode_shard(data, spec, place=place)  # a record must never vouch for a damaged shard
        return PublishedShard(len(data), hashlib.sha256(data).hexdigest(), created)

    def shard_bytes(self, name: str, shard_index: int) -> bytes:
        """Read a whole shard as stored.

        Raises
        ------
        CorruptCacheError
            The shard is missing.
        """
        return self._read(self._shard_place(name, shard_index))

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
        record = self._document(Record, key)
        if record is not None and (record.teacher, record.shard_index) != (name, shard_index):
            problem = Problem("", "wrong_place", f"is the record of {record.teacher!r} shard {record.shard_index}")
            raise DocumentError(Record.title, str(self._place(key)), (problem,))
        return record

    def records(self, name: str) -> dict[int, Record]:
        """Read all records of a teacher, by shard index, ascending."""
        names = [key.rsplit("/", 1)[1].removesuffix(".json") for key in self._objects.list(layout.records_folder(name))]
        indexes = sorted(int(text) for text in names if text.isdecimal())
        found = ((index, self.record(name, index)) for index in indexes)
        return {index: record for index, record in found if record is not None}

    # Completion ------------------------------------------------------------------------------------------------------

    def complete(self) -> CompleteDocument | None:
        """Read the completion document; None while the cache is not complete."""
        return self._document(CompleteDocument, layout.COMPLETE)

    def replace_complete(self, document: CompleteDocument) -> None:
        """Store the completion document, in place of an earlier one where a teacher was added."""
        self._objects.replace(layout.COMPLETE, document.to_json())

    def consolidate(self) -> None:
        """Gather the metadata of all groups and arrays in the root's, so that Zarr readers need list nothing.

        To be run again after a teacher was added: readers that use the consolidated metadata see nothing else.
        """
        place = self._place(layout.ROOT)
        root = self._json(place)
        if root is None:
            raise place.corrupt("the root group is missing")
        self._objects.replace(layout.ROOT, arrays.to_json(arrays.consolidated_metadata(root, dict(self._nodes()))))

    # Reading ---------------------------------------------------------------------------------------------------------

    def codes_reader(
        self,
        teacher_document: TeacherDocument,
        cache_document: CacheDocument,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
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

        Raises
        ------
        CorruptCacheError
            The array's metadata are missing, or contradict the documents.
        """
        name = teacher_document.name
        spec = shard_spec(teacher_document, cache_document)
        expected = arrays.sharded_array_metadata(cache_document.num_shards, spec, dimension_names=("row", "column"))
        place = self._teacher_place(layout.metadata_key(f"{layout.teacher_group(name)}/{layout.CODES}"), name)
        standing = self._json(place)
        if standing != expected:
            told = [
                f"{path}: expected {ours}, found {theirs}" for path, ours, theirs in differences(expected, standing)
            ]
            raise place.corrupt(f"the array is not as the documents say ({'; '.join(told[:3])})")
        place_of = functools.partial(self._shard_place, name)
        reader = ShardedReader(self._objects, place_of, spec, cache_document.num_shards, cache_bytes=cache_bytes)
        return CodesReader(reader, cache_document, place_of)

    # Private ---------------------------------------------------------------------------------------------------------

    def _publish_parameters(self, group: str, parameters: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, array in sorted(parameters.items()):
            node = f"{group}/{name}"
            if array.size:
                self._objects.publish(layout.chunk_key(node, (0,) * array.ndim), arrays.encode_small_array(array))
            axes = [f"{name}_{axis}" for axis in range(array.ndim)]
            self._publish_json(layout.metadata_key(node), arrays.small_array_metadata(array, dimension_names=axes))
        self._publish_json(layout.metadata_key(group), arrays.group_metadata({}))

    def _publish_codes_metadata(self, document: TeacherDocument) -> None:
        cache_document = self.cache_document()
        spec = shard_spec(document, cache_document)
        node = f"{layout.teacher_group(document.name)}/{layout.CODES}"
        metadata = arrays.sharded_array_metadata(cache_document.num_shards, spec, dimension_names=("row", "column"))
        self._publish_json(layout.metadata_key(node), metadata)

    def _id_index(self) -> IdIndex:
        with self._lock:
            if self._index is None:
                self._index = self._open_index()
            return self._index

    def _open_index(self) -> IdIndex:
        cache_document = self.cache_document()
        spec = index_spec(cache_document.num_examples)
        num_chunks = -(-cache_document.num_examples // CHUNK_ENTRIES)
        place = self._index_place(layout.chunk_key(layout.INDEX_FENCES, (0, 0)))
        fences = arrays.decode_small_array(self._read(place), dtype="uint64", shape=(num_chunks, 2), place=place)
        reader = ShardedReader(
            self._objects,
            lambda shard: self._index_place(layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0))),
            spec,
            -(-cache_document.num_examples // spec.shard_rows),
        )
        return IdIndex(
            reader,
            fences,
            num_examples=cache_document.num_examples,
            example_id_type=cache_document.example_id_type,
            address=self.address,
        )

    def _nodes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        suffix = f"/{layout.METADATA}"
        for folder in layout.GROUPS:
            for key in self._objects.list(folder):
                metadata = self._json(self._place(key)) if key.endswith(suffix) else None
                if metadata is not None:
                    yield key.removesuffix(suffix), metadata

    def _publish_json(self, key: str, metadata: Mapping[str, Any]) -> bool:
        return self._objects.publish(key, arrays.to_json(metadata))

    def _document(self, kind: type[AnyDocument], key: str) -> AnyDocument | None:
        try:
            data = self._objects.read(key)
        except FileNotFoundError:
            return None
        return kind.from_json(data, source=str(self._place(key)))

    def _group_document(self, kind: type[AnyDocument], group: str) -> AnyDocument | None:
        place = self._place(layout.metadata_key(group))
        metadata = self._json(place)
        if metadata is None:
            return None
        attributes = metadata.get("attributes")
        if metadata.get("node_type") != "group" or not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
            problem = Problem(f"attributes.{ATTRIBUTE}", "missing", "is no Zarr group of a kdcache cache")
            raise DocumentError(kind.title, str(place), (problem,))
        return kind.from_mapping(attributes[ATTRIBUTE], source=str(place))

    def _json(self, place: Place) -> dict[str, Any] | None:
        try:
            value = json.loads(self._objects.read(place.key))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise place.corrupt(f"the file is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise place.corrupt("the file is no JSON object")
        return value

    def _read(self, place: Place) -> bytes:
        try:
            return self._objects.read(place.key)
        except FileNotFoundError as error:
            raise place.corrupt("the file is missing") from error

    def _place(self, key: str) -> Place:
        return Place(self.address, key, f"Run `kdcache verify {self.address}` to see all damage.")

    def _index_place(self, key: str) -> Place:
        remedy = (
            f"Delete the folder {layout.INDEX} and run the build again: it makes the index anew from the transfer set."
        )
        return Place(self.address, key, remedy)

    def _teacher_place(self, key: str, name: str) -> Place:
        remedy = (
            f"Run `kdcache verify {self.address}` to see all damage. Where this file cannot be brought back, delete "
            f"{layout.teacher_group(name)} and {layout.records_folder(name)} and run the build again."
        )
        return Place(self.address, key, remedy)

    def _shard_place(self, name: str, shard_index: int) -> Place:
        key = layout.shard_key(name, shard_index)
        remedy = (
            f"Run `kdcache verify {self.address}` to see all damage; then delete {key} and "
            f"{layout.record_key(name, shard_index)} and run the build again: it makes this shard anew."
        )
        return Place(self.address, key, remedy)


def shard_spec(teacher_document: TeacherDocument, cache_document: CacheDocument) -> ShardSpec:
    """Give shape and coding of a teacher's shards.

    Raises
    ------
    ShapeError
        The documents ask for a chunk that cannot be stored.
    """
    return ShardSpec(
        cache_document.shard_rows,
        cache_document.chunk_rows,
        teacher_document.num_columns,
        teacher_document.storage_dtype,
        _FILLS[teacher_document.storage_dtype],
    )


def _describe(array: npt.NDArray[Any]) -> Parameter:
    return Parameter.make(
        dtype=array.dtype.newbyteorder("=").name,
        shape=tuple(array.shape),
        sha256=hashlib.sha256(arrays.small_array_bytes(array)).hexdigest(),
    )


def _parameters_digest(described: Mapping[str, Parameter]) -> str:
    text = json.dumps({name: item.to_mapping() for name, item in described.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _mismatch(place: Place, ours: CacheDocument, theirs: CacheDocument) -> str:
    lines = "\n".join(
        f"  {path}: this plan {left!r}, the cache {right!r}"
        for path, left, right in differences(ours.to_mapping(), theirs.to_mapping())
    )
    return f"{place} describes another cache:\n{lines}\nNothing was changed. Build at another address."
