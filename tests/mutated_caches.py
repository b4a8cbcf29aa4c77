"""Mutations of a cache's files, as a stranger with time would make them: checksums and digests made anew.

`damaged`, `altered_json` and their like draw one change of some files; `rebound` makes every checksum and digest fit
what was changed, so that the change reaches whatever lies behind the checks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from kdcache.documents import CacheDocument, PlanDocument, Record, TeacherDocument
from kdcache.documents.completion import completed_teacher, digest_of_digests
from kdcache.errors import KdcacheError
from kdcache.store import arrays, layout
from kdcache.store.checksums import CHECKSUM_BYTES, with_checksum
from kdcache.store.index import index_spec
from kdcache.store.place import Place
from kdcache.store.shards import ShardSpec, checksums_of_chunks, decode_shard, encode_shard
from kdcache.store.teachers import codes_metadata, shard_spec

Files = dict[str, bytes]
Draw = Callable[[Any], Any]

_SHARD = re.compile(r"teachers/(?P<name>\w+)/codes/c/(?P<shard>\d+)/0")
_PARAMETER = re.compile(r"teachers/\w+/parameters-\w+/\w+/c/[\d/]+")
_FENCES = "index/fences/c/0/0"
_ENTRIES = "index/entries/c/0/0"
_ANYWHERE = Place("the cache", "any", "")
_UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
    KdcacheError,
)

HOSTILE_JSON = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "16", "255", "65535", "0.5", "-0.0", "1e300", "1e999",
    "NaN", "-Infinity", "2147483647", "2147483648", "4294967296", "1099511627776", "9007199254740992",
    "9223372036854775807",
    "18446744073709551615", "1" + "0" * 40, "1" + "0" * 5000, '""', '"a"', '"../../../etc/passwd"', '"/etc/passwd"',
    '"a/../../b"', '"a\\u0000b"', '"\\ud800"', '"a\\nb"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", "[1]",
    '[{"a": 1}]', '{"a": {"b": []}}', "[" * 500 + "]" * 500, "[" * 200_000, '{"a":' * 100_000,
    "[" + "0," * 50_000 + "0]", '"uint16"', '"float32"', '"os:system"', '"cos\\nsystem\\n(S\'true\'\\ntR."',
)  # fmt: skip
"""JSON texts that stand in place of others: types, sizes, names that are paths, depths."""
HOSTILE_NUMBERS = (
    0,
    1,
    2,
    4,
    16,
    127,
    254,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63,
    2**64 - 1,
)


# Changes --------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: Draw, files: Files) -> Files:
    """Bytes of any file in place of others: random ones, or a piece of another file."""
    key = draw(st.sampled_from(sorted(files)))
    other = files[draw(st.sampled_from(sorted(files)))]
    return {**files, key: draw(st.one_of(st.binary(max_size=300), _spliced(files[key], other)))}


@st.composite
def _spliced(draw: Draw, content: bytes, other: bytes) -> bytes:
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 64))
    begin = draw(st.integers(0, len(other)))
    piece = draw(st.one_of(st.binary(max_size=64), st.just(other[begin : begin + length])))
    return content[:start] + piece + content[start + draw(st.sampled_from([0, len(piece), length])) :]


@st.composite
def altered_json(draw: Draw, files: Files) -> Files:
    """Up to three values of JSON documents in place of which stand hostile ones; fields too many, fields too few."""
    documents = sorted(key for key in files if key.endswith(".json"))
    changed = dict(files)
    for key in draw(st.lists(st.sampled_from(documents), min_size=1, max_size=3, unique=True)):
        value = json.loads(changed[key])
        path = draw(st.sampled_from(list(_paths(value))))
        changed[key] = _with_value(value, path, draw(st.sampled_from(HOSTILE_JSON)), is_extra=draw(st.booleans()))
    return changed


@st.composite
def altered_numbers(draw: Draw, files: Files) -> Files:
    """One number of a document that says how large something is, everywhere it stands."""
    fields = ("num_classes", "num_examples", "num_rows", "num_views", "shard_rows", "chunk_rows", "num_columns", "k")
    field, number = draw(st.sampled_from(fields)), draw(st.sampled_from(HOSTILE_NUMBERS) | st.integers(0, 200))
    pattern = re.compile(rf'"{field}": \d+'.encode())
    documents = [key for key in files if key.endswith(".json") and not key.startswith(layout.RECORDS)]
    text = f'"{field}": {number}'.encode()
    return {**files, **{key: pattern.sub(text, files[key]) for key in documents}}


@st.composite
def altered_parameters(draw: Draw, files: Files) -> Files:
    """A value of a small array, with its checksum anew."""
    key = draw(st.sampled_from(sorted(key for key in files if _PARAMETER.fullmatch(key) or key == _FENCES)))
    body = bytearray(files[key][:-CHECKSUM_BYTES])
    width = draw(st.sampled_from([2, 4, 8]))
    at = width * draw(st.integers(0, max(0, len(body) // width - 1)))
    body[at : at + width] = draw(st.binary(min_size=width, max_size=width) | _little(width))
    return {**files, key: with_checksum(bytes(body))}


def _little(width: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from(HOSTILE_NUMBERS).map(lambda number: (number % 2 ** (8 * width)).to_bytes(width, "little"))


@st.composite
def altered_shard_index(draw: Draw, files: Files) -> Files:
    """Entries of the index that ends a shard, with its checksum anew; chunks may be empty, overlap or lie outside."""
    key = draw(st.sampled_from(_shards(files)))
    spec = _spec_of(files, key)
    body, index = files[key][: -spec.index_bytes], bytearray(files[key][-spec.index_bytes : -CHECKSUM_BYTES])
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.sampled_from(HOSTILE_NUMBERS) | st.integers(0, len(files[key])))
        struct.pack_into("<Q", index, 8 * draw(st.integers(0, len(index) // 8 - 1)), number)
    return {**files, key: body + with_checksum(bytes(index))}


@st.composite
def altered_chunk(draw: Draw, files: Files) -> Files:
    """Bytes of a Blosc chunk, its header above all, with the chunk's checksum anew."""
    key = draw(st.sampled_from(_shards(files)))
    spec = _spec_of(files, key)
    ends = np.frombuffer(files[key][-spec.index_bytes : -CHECKSUM_BYTES], "<u8").reshape(-1, 2).sum(axis=1).tolist()
    number = draw(st.integers(0, len(ends) - 1))
    start, end = ([0, *ends])[number], ends[number]
    chunk = bytearray(files[key][start : end - CHECKSUM_BYTES])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, 23) | st.integers(0, len(chunk) - 1))
        width = min(draw(st.sampled_from([1, 4])), len(chunk) - at)
        chunk[at : at + width] = draw(st.binary(min_size=width, max_size=width) | _little(width))
    return {**files, key: files[key][:start] + with_checksum(bytes(chunk)) + files[key][end:]}


@st.composite
def altered_codes(draw: Draw, files: Files) -> Files:
    """Codes, or entries of the id index, that no writer gives, coded as a writer codes them."""
    key = draw(st.sampled_from(_shards(files)))
    spec = _spec_of(files, key)
    rows = decode_shard(files[key], spec, place=_ANYWHERE)
    stored = rows.view(f"<u{rows.itemsize}")
    largest = 2 ** (8 * rows.itemsize) - 1
    numbers = st.integers(0, largest) | st.sampled_from([number for number in HOSTILE_NUMBERS if number <= largest])
    for _ in range(draw(st.integers(1, 6))):
        row, column = draw(st.integers(0, min(len(rows), 48) - 1)), draw(st.integers(0, spec.num_columns - 1))
        stored[row, column] = draw(numbers)
    return {**files, key: encode_shard(rows, spec)}


@st.composite
def altered_parquet(draw: Draw, files: Files) -> Files:
    """The example table: bytes of it, without page checksums so that they are decoded, or other columns."""
    table = pq.read_table(io.BytesIO(files[layout.EXAMPLES]))
    data = _written(draw(_other_tables(table)), draw)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1) | st.integers(max(0, len(data) - 40), len(data) - 1))
        piece = draw(st.binary(min_size=1, max_size=4) | _little(4))
        data = data[:at] + piece + data[at + len(piece) :]
    return {**files, layout.EXAMPLES: data}


def _written(table: pa.Table, draw: Draw) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table, sink, row_group_size=draw(st.sampled_from([7, 65_536])), use_dictionary=draw(st.booleans()),
        compression=draw(st.sampled_from(["none", "zstd", "snappy", "gzip", "brotli", "lz4"])),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])), write_page_checksum=False,
    )  # fmt: skip
    return sink.getvalue()


@st.composite
def _other_tables(draw: Draw, table: pa.Table) -> pa.Table:
    name = draw(st.sampled_from([None, *table.column_names]))
    if name is None:
        return table
    count, place = len(table), table.column_names.index(name)
    field = table.schema.field(name)
    columns = {
        "numbers": pa.array(draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=count, max_size=count))),
        "same type": pa.nulls(count, field.type) if field.nullable else table.column(name).take(pa.array([0] * count)),
        "texts": pa.array(["x" * draw(st.sampled_from([0, 1, 100_000]))] * count),
        "lists": pa.array([[[1]]] * count),
        "doubles": pa.array([float("nan")] * count),
    }
    column = columns[draw(st.sampled_from(sorted(columns)))]
    if column.type != field.type and draw(st.booleans()):
        with contextlib.suppress(pa.ArrowException):
            column = column.cast(field.type)
    return table.set_column(place, pa.field(name, column.type, nullable=field.nullable), column)


def _shards(files: Files) -> list[str]:
    return [*sorted(key for key in files if _SHARD.fullmatch(key)), _ENTRIES]


def _spec_of(files: Files, key: str) -> ShardSpec:
    cache, found = _cache_document(files), _SHARD.fullmatch(key)
    return index_spec(cache.num_examples) if found is None else shard_spec(_teacher(files, found["name"]), cache)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _paths(item, (*path, number))


def _with_value(value: Any, path: tuple[Any, ...], text: str, *, is_extra: bool) -> bytes:
    """Give JSON with a text in place of the value at a path, or beside it."""
    mark = "a mark that is nowhere else"
    if not path:
        return text.encode()
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    if is_extra and isinstance(inner, dict):
        inner["../" + str(path[-1])] = mark
    else:
        inner[path[-1]] = mark
    return json.dumps(value, indent=2, sort_keys=True).replace(json.dumps(mark), text).encode()


# Digests made anew ----------------------------------------------------------------------------------------------------


def rebound(files: Files) -> Files:
    """Make checksums, digests and metadata fit the documents and shards, wherever these can still be read."""
    files = dict(files)
    for step in (_bind_parameters, _bind_plan, _bind_metadata, _bind_records, _bind_fences, _bind_completion, _gather):
        with contextlib.suppress(*_UNREADABLE):
            step(files)
    return files


def _json(files: Files, key: str) -> Any:
    return json.loads(files[key])


def _cache_document(files: Files) -> CacheDocument:
    return CacheDocument.from_mapping(_json(files, layout.ROOT)["attributes"]["kdcache"], source="root")


def _teacher(files: Files, name: str) -> TeacherDocument:
    mapping = _json(files, f"teachers/{name}/zarr.json")["attributes"]["kdcache"]
    return TeacherDocument.from_mapping(mapping, source=name)


def _names(files: Files) -> list[str]:
    return sorted({key.split("/")[1] for key in files if re.fullmatch(r"teachers/\w+/zarr.json", key)})


def _each(files: Files, bind: Callable[[Files, str], None]) -> None:
    for name in _names(files):
        with contextlib.suppress(*_UNREADABLE):
            bind(files, name)


def _bind_parameters(files: Files) -> None:
    _each(files, _bind_parameters_of)


def _bind_parameters_of(files: Files, name: str) -> None:
    key = f"teachers/{name}/zarr.json"
    group = _json(files, key)
    document = group["attributes"]["kdcache"]
    for parameter, described in document["parameters"].items():
        prefix = f"teachers/{name}/{document['parameters_group']}/{parameter}/c/"
        stored = next(files[key] for key in files if key.startswith(prefix))
        described["sha256"] = hashlib.sha256(stored[:-CHECKSUM_BYTES]).hexdigest()
    files[key] = arrays.to_json(group)


def _bind_plan(files: Files) -> None:
    plan = _json(files, "plans/0.json")
    plan["cache"] = _json(files, layout.ROOT)["attributes"]["kdcache"]
    files["plans/0.json"] = json.dumps(plan).encode()


def _bind_metadata(files: Files) -> None:
    cache = _cache_document(files)

    def bind(files: Files, name: str) -> None:
        files[f"teachers/{name}/codes/zarr.json"] = arrays.to_json(codes_metadata(_teacher(files, name), cache))

    _each(files, bind)


def _bind_records(files: Files) -> None:
    cache = _cache_document(files)
    for key in [key for key in files if _SHARD.fullmatch(key)]:
        _, name, *_, shard, _ = key.split("/")
        with contextlib.suppress(*_UNREADABLE):
            record_key = layout.record_key(name, int(shard))
            record, data = _json(files, record_key), files[key]
            record |= {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
            files[record_key] = json.dumps(record).encode()
            checksums = checksums_of_chunks(data, shard_spec(_teacher(files, name), cache), place=_ANYWHERE)
            files[record_key] = json.dumps({**record, "chunk_checksums": checksums.hex()}).encode()


def _bind_fences(files: Files) -> None:
    spec = index_spec(_cache_document(files).num_examples)
    checksums = checksums_of_chunks(files[_ENTRIES], spec, place=_ANYWHERE)
    fences = np.frombuffer(files[_FENCES][:-CHECKSUM_BYTES], "<u8").reshape(-1, 3).copy()
    fences[:, 2] = np.frombuffer(checksums, "<u4")[: len(fences)]
    files[_FENCES] = with_checksum(fences.tobytes())


def _bind_completion(files: Files) -> None:
    complete = _json(files, layout.COMPLETE)
    complete["examples_sha256"] = hashlib.sha256(files[layout.EXAMPLES]).hexdigest()
    complete["fences_sha256"] = hashlib.sha256(files[_FENCES]).hexdigest()
    digest = hashlib.sha256()
    for key in sorted(key for key in files if key.startswith(f"{layout.INDEX}/")):
        digest.update(f"{key}\0{len(files[key])}\0".encode() + files[key])
    complete["index_digest"] = digest.hexdigest()
    with contextlib.suppress(*_UNREADABLE):
        complete["plan_digest"] = PlanDocument.from_json(files["plans/0.json"], source="plan").digest()
    for item in complete["teachers"]:
        with contextlib.suppress(*_UNREADABLE):
            item["document_digest"] = _teacher(files, item["name"]).digest()
            item.update(_summed_up(files, item["name"]))
    complete["data_digest"] = digest_of_digests(item["data_digest"] for item in complete["teachers"])
    files[layout.COMPLETE] = json.dumps(complete).encode()


def _summed_up(files: Files, name: str) -> dict[str, Any]:
    shards = itertools.takewhile(
        lambda shard: layout.record_key(name, shard) in files, range(_cache_document(files).num_shards)
    )
    keys = [layout.record_key(name, shard) for shard in shards]  # documents may tell of any number of them
    records = [Record.from_json(files[key], source=key) for key in keys]
    summed = completed_teacher(_teacher(files, name), records).to_mapping()
    return {field: summed[field] for field in ("num_bytes", "records_digest", "data_digest")}


def _gather(files: Files) -> None:
    root = _json(files, layout.ROOT)
    told = root["consolidated_metadata"]["metadata"]
    for path in told:
        with contextlib.suppress(*_UNREADABLE):
            told[path] = _json(files, layout.metadata_key(path))
    files[layout.ROOT] = json.dumps(root).encode()
