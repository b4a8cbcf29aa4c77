"""Nodes: what the metadata of every group and array of a cache must be; they follow from its documents alone."""

from __future__ import annotations

__all__ = ["consolidated_root", "expected_nodes", "gathered_metadata", "index_keys", "root_differences"]

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kdcache.documents import CacheDocument, TeacherDocument, differences
from kdcache.errors import CorruptCacheError
from kdcache.store import arrays, layout
from kdcache.store.files import ATTRIBUTE, CacheFiles
from kdcache.store.index import CHUNK_ENTRIES, index_spec
from kdcache.store.keys import is_key
from kdcache.store.teachers import accepted_codes_metadata

Metadata = Mapping[str, Any]
Nodes = Mapping[str, tuple[Metadata, ...]]


def expected_nodes(
    cache_document: CacheDocument, teacher_documents: Iterable[TeacherDocument]
) -> dict[str, tuple[Metadata, ...]]:
    """Give what may stand as metadata of each group and array below the root.

    Parameters
    ----------
    cache_document : CacheDocument
    teacher_documents : iterable of TeacherDocument

    Returns
    -------
    dict of str to tuple of mapping
        By path, such as ``teachers/a/codes``. Of several, the first is what this release writes.
    """
    plain = arrays.group_metadata({})
    nodes: dict[str, tuple[Metadata, ...]] = dict.fromkeys(layout.GROUPS, (plain,))
    nodes |= _index_nodes(cache_document)
    for document in teacher_documents:
        group = layout.teacher_group(document.name)
        nodes[group] = (arrays.group_metadata({ATTRIBUTE: document.to_mapping()}),)
        nodes[f"{group}/{layout.CODES}"] = accepted_codes_metadata(document, cache_document)
        if document.parameters_group is not None:
            nodes[f"{group}/{document.parameters_group}"] = (plain,)
        for name, parameter in document.parameters.items():
            axes = [f"{name}_{axis}" for axis in range(len(parameter.shape))]
            metadata = arrays.array_metadata(
                parameter.shape, dtype=parameter.dtype, chunk_shape=[max(1, length) for length in parameter.shape],
                fill=0, codecs=arrays.small_array_codecs(parameter.dtype), dimension_names=axes,
            )  # fmt: skip
            nodes[f"{group}/{document.parameters_group}/{name}"] = (metadata,)
    return nodes


def consolidated_root(files: CacheFiles, cache_document: CacheDocument, nodes: Nodes) -> dict[str, Any]:
    """Give what the root's metadata must be, once everything it gathers is built.

    What is gathered of nodes that the documents do not name, as of a teacher that is being added, is taken as it is.

    Parameters
    ----------
    files : CacheFiles
    cache_document : CacheDocument
    nodes : mapping
        As `expected_nodes` gives them.
    """
    told = gathered_metadata(files)
    chosen = {path: told[path] if told.get(path) in accepted else accepted[0] for path, accepted in nodes.items()}
    plain = arrays.group_metadata({ATTRIBUTE: cache_document.to_mapping()})
    others = {path: _standing(files, path, copy) for path, copy in told.items() if path not in nodes}
    found = {path: metadata for path, metadata in others.items() if metadata is not None}
    return arrays.consolidated_metadata(plain, {**found, **chosen})


def gathered_metadata(files: CacheFiles) -> dict[str, Any]:
    """Give the copies of all nodes' metadata that the root holds; none where it cannot be read."""
    try:
        root = files.read_json(files.place(layout.ROOT)) or {}
        told = root["consolidated_metadata"]["metadata"]
    except (CorruptCacheError, KeyError, TypeError):
        return {}
    if not isinstance(told, dict):
        return {}
    return {path: copy for path, copy in told.items() if isinstance(copy, dict) and is_key(layout.metadata_key(path))}


def root_differences(files: CacheFiles, cache_document: CacheDocument, nodes: Nodes) -> list[str]:
    """Say in which ways the root group is not what follows from the documents.

    Raises
    ------
    CorruptCacheError
        The root cannot be read.
    """
    root = files.read_json(files.place(layout.ROOT)) or {}
    expected = consolidated_root(files, cache_document, nodes)
    return [f"{path}: expected {ours}, found {theirs}" for path, ours, theirs in differences(expected, root)]


def index_keys(cache_document: CacheDocument) -> tuple[str, ...]:
    """Give the keys of every file of the id index, ascending by path component."""
    num_shards = -(-cache_document.num_examples // index_spec(cache_document.num_examples).shard_rows)
    nodes = (layout.INDEX, layout.INDEX_ENTRIES, layout.INDEX_FENCES)
    chunks = [layout.chunk_key(layout.INDEX_ENTRIES, (shard, 0)) for shard in range(num_shards)]
    return (*map(layout.metadata_key, nodes), *chunks, layout.chunk_key(layout.INDEX_FENCES, (0, 0)))


def _standing(files: CacheFiles, path: str, copy: Metadata) -> Metadata | None:
    """Read a node's metadata; the copy where they cannot be read, None where they are gone."""
    try:
        return files.read_json(files.place(layout.metadata_key(path)))
    except CorruptCacheError:
        return copy


def _index_nodes(cache_document: CacheDocument) -> dict[str, tuple[Metadata, ...]]:
    spec = index_spec(cache_document.num_examples)
    num_shards = -(-cache_document.num_examples // spec.shard_rows)
    names = ("entry", "field")
    entries = tuple(
        arrays.sharded_array_metadata(num_shards, spec, dimension_names=names, compression=compression)
        for compression in (None, *spec.earlier_compressions)
    )
    num_chunks = -(-cache_document.num_examples // CHUNK_ENTRIES)
    fences = tuple(
        arrays.small_array_metadata(np.empty((num_chunks, columns), np.uint64), dimension_names=("chunk", "bound"))
        for columns in (3, 2)  # with checksums, and as earlier releases wrote them
    )
    return {layout.INDEX_ENTRIES: entries, layout.INDEX_FENCES: fences}
