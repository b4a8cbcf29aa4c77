"""CacheFiles: a cache's files read as what they mean, with errors that name the file and what mends it."""

from __future__ import annotations

__all__ = ["ATTRIBUTE", "CacheFiles"]

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy.typing as npt

from kdcache.documents import Document
from kdcache.errors import DocumentError, Problem
from kdcache.store import arrays, layout
from kdcache.store.limits import MAX_JSON_BYTES, TooLargeError
from kdcache.store.objects import Objects
from kdcache.store.place import Place

ATTRIBUTE = "kdcache"
"""The Zarr attribute under which a group keeps its document."""

AnyDocument = TypeVar("AnyDocument", bound=Document)


class CacheFiles:
    """The files of one cache.

    Parameters
    ----------
    objects : Objects
        Where they are kept.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    @property
    def address(self) -> str:
        """The cache's address."""
        return self.objects.address

    def read(self, place: Place) -> bytes:
        """Read a file that must be there; CorruptCacheError where it is missing."""
        try:
            return self.objects.read(place.key)
        except FileNotFoundError as error:
            raise place.corrupt("the file is missing") from error

    def read_json(self, place: Place) -> dict[str, Any] | None:
        """Read a JSON object; None where there is no file, CorruptCacheError where it is no JSON object."""
        data = self._read_text(place)
        if data is None:
            return None
        try:
            value = parsed_json(data)
        except (ValueError, RecursionError) as error:
            raise place.corrupt(f"the file is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise place.corrupt("the file is no JSON object")
        return value

    def read_document(self, kind: type[AnyDocument], key: str) -> AnyDocument | None:
        """Read a document from a file of its own; None where there is no such file."""
        place = self.place(key)
        data = self._read_text(place)
        if data is None:
            return None
        with _told(place):
            return kind.from_json(data, source=str(place))

    def read_group_document(self, kind: type[AnyDocument], group: str) -> AnyDocument | None:
        """Read the document in a Zarr group's attributes; None where there is no group."""
        place = self.place(layout.metadata_key(group))
        metadata = self.read_json(place)
        if metadata is None:
            return None
        attributes = metadata.get("attributes")
        with _told(place):
            if metadata.get("node_type") != "group" or not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
                problem = Problem(f"attributes.{ATTRIBUTE}", "missing", "is no Zarr group of a kdcache cache")
                raise DocumentError(kind.title, str(place), (problem,))
            return kind.from_mapping(attributes[ATTRIBUTE], source=str(place))

    def read_nodes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield path and metadata of every Zarr group and array below the root."""
        suffix = f"/{layout.METADATA}"
        for folder in layout.GROUPS:
            for key in self.objects.list(folder):
                metadata = self.read_json(self.place(key)) if key.endswith(suffix) else None
                if metadata is not None:
                    yield key.removesuffix(suffix), metadata

    def publish_json(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Store a JSON document unless something stands under the key; True when this one was stored."""
        return self.objects.publish(key, arrays.to_json(metadata))

    def publish_metadata(self, place: Place, metadata: Mapping[str, Any]) -> None:
        """Store metadata that follow from what is known, or check that those that stand are the same.

        Raises
        ------
        CorruptCacheError
            Other metadata, or damaged ones, stand there.
        """
        if not self.publish_json(place.key, metadata) and self.read_json(place) != metadata:
            raise place.corrupt("the metadata that stand there are not those that this build would write")

    def publish_small_array(self, place: Place, array: npt.NDArray[Any]) -> None:
        """Store an array of one chunk, or check that the one that stands is the same.

        Raises
        ------
        CorruptCacheError
            Another array, or a damaged one, stands there.
        """
        data = arrays.encode_small_array(array)
        if self.objects.publish(place.key, data):
            return
        standing = self.read(place)
        arrays.decode_small_array(standing, dtype=array.dtype.name, shape=array.shape, place=place)
        if standing != data:
            raise place.corrupt("the array that stands there is not the one that this build would write")

    def _read_text(self, place: Place) -> bytes | None:
        try:
            return self.objects.read(place.key, max_bytes=MAX_JSON_BYTES)
        except FileNotFoundError:
            return None
        except TooLargeError as error:
            reason = f"the file has {error.num_bytes} bytes; no JSON document of a cache has over {MAX_JSON_BYTES}"
            raise place.corrupt(reason) from error

    def place(self, key: str) -> Place:
        """Give the place of a file with no remedy of its own."""
        remedy = (
            f"{self._see_all}; `kdcache repair {self.address}` mends what follows from other files, `kdcache repair "
            "JOB`, with the cache's job file, also what follows from the job."
        )
        return Place(self.address, key, remedy)

    def index_place(self, key: str) -> Place:
        """Give the place of a file of the id index."""
        remedy = f"Run `kdcache repair {self.address}`: it makes the index anew from the examples."
        return Place(self.address, key, remedy)

    def parameter_place(self, key: str) -> Place:
        """Give the place of a codec's parameter while it is written, when it can be written again."""
        return Place(self.address, key, f"Delete {key} and run the build again: it stores the parameter anew.")

    def teacher_place(self, key: str, name: str) -> Place:
        """Give the place of a file that a teacher's shards depend on."""
        remedy = (
            f"{self._see_all}; `kdcache repair {self.address}` mends it where other files tell what it was, `kdcache "
            f"repair JOB`, with the cache's job file, where teacher {name!r} must be fitted again."
        )
        return Place(self.address, key, remedy)

    def record_place(self, name: str, shard_index: int) -> Place:
        """Give the place of a shard's record: it is made anew together with its shard."""
        return replace(self.shard_place(name, shard_index), key=layout.record_key(name, shard_index))

    def shard_place(self, name: str, shard_index: int) -> Place:
        """Give the place of a teacher's shard."""
        remedy = (
            f"{self._see_all}; `kdcache repair JOB`, with the cache's job file, drops this shard and its record and "
            f"builds them anew; `kdcache repair {self.address}` drops them alone."
        )
        return Place(self.address, layout.shard_key(name, shard_index), remedy)

    @property
    def _see_all(self) -> str:
        return f"Run `kdcache verify {self.address}` to see all damage"


@contextlib.contextmanager
def _told(place: Place) -> Iterator[None]:
    """Have an error about a document say what to do as well."""
    try:
        yield
    except DocumentError as error:
        remedy = f"Nothing was changed. {place.remedy}"
        raise DocumentError(error.document, error.source, error.problems, remedy) from error


def parsed_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, of finite numbers; ValueError or RecursionError for anything else."""
    text = data.decode()  # not bytes, whose encoding would be guessed
    return json.loads(text, parse_constant=_refused, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond all numbers")
    return number


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
