"""Whatever stands in a cache's files, reading gives an error of kdcache's own or as many rows as there are.

Mutations reach every document and array that a reader takes: checksums and digests are made anew, as whoever wants to
harm a reader would. A process of its own reads; it must not crash, hang, take a GiB, touch another file, or import.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutated_caches import (
    Files,
    altered_chunk,
    altered_codes,
    altered_json,
    altered_numbers,
    altered_parameters,
    altered_parquet,
    altered_shard_index,
    damaged,
    rebound,
)
from tiny_caches import build_tiny, files_of, tiny_transfer_set

import kdcache

SECONDS = 20
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
"""Of the child: pools that reserve a GiB of addresses at once would be taken for memory."""
QUICK, MANY = 5, 500
"""Of each kind of mutation; 500 of all kinds take a quarter of an hour."""
CODECS = {
    "codes": kdcache.Codes(),
    "spectral": kdcache.Spectral(max_kl=0.01),
    "class-means": kdcache.TopK(k=2),
    "samples": kdcache.TopK(k=2, tail="samples", num_samples=2),
}
MUTATIONS = {
    "bytes": damaged,
    "json": altered_json,
    "numbers": altered_numbers,
    "parameters": altered_parameters,
    "shard indexes": altered_shard_index,
    "chunks": altered_chunk,
    "codes": altered_codes,
    "parquet": altered_parquet,
}


class Reader:
    """A child that reads caches, started anew when it is gone."""

    def __init__(self, folder: Path, ids: list[object]) -> None:
        self.sound = {name: folder / name for name in CODECS}
        self.files = {name: files_of(path) for name, path in self.sound.items()}
        self._folder = folder / "mutated"
        self._standing: Files = {}
        self._ids = ids
        self._child: subprocess.Popen[str] | None = None

    def failures(self, files: Files) -> list[str]:
        """Read a cache of these files and give everything that must not be."""
        self._write(files)
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({"cache": str(self._folder), "ids": self._ids}) + "\n")
        child.stdin.flush()
        is_told = select.select([child.stdout], [], [], SECONDS)[0]
        answer = child.stdout.readline() if is_told else ""
        if answer:
            return json.loads(answer)["failures"]
        self.stop()
        return [f"the reader died: {child.returncode}" if is_told else f"no answer in {SECONDS} seconds"]

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None:
            script = Path(__file__).parents[1] / "reading_child.py"
            self._child = subprocess.Popen(
                [sys.executable, "-B", str(script), *map(str, self.sound.values())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip
        return self._child

    def _write(self, files: Mapping[str, bytes]) -> None:
        for key in self._standing.keys() - files.keys():
            (self._folder / key).unlink()
        for key, content in files.items():
            if self._standing.get(key) != content:
                (self._folder / key).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / key).write_bytes(content)
        self._standing = dict(files)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    ids = [f"example-{number}" for number in range(40)]
    for name, codec in CODECS.items():
        build_tiny(folder / name, tiny_transfer_set(example_ids=ids), codec=codec)
        (folder / f"{name}.ids").write_text(json.dumps(ids))
    reader = Reader(folder, ids)
    yield reader
    reader.stop()


def try_mutations(reader, mutation, *, max_examples):
    @settings(
        max_examples=max_examples, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(st.data())
    def tried(data):
        name = data.draw(st.sampled_from(sorted(CODECS)), label="cache")
        sound = reader.files[name]
        files = data.draw(
            MUTATIONS[mutation](sound).filter(lambda files: files != sound).map(_Shown(sound)), label="files"
        )
        assert reader.failures(rebound(files) if data.draw(st.booleans(), label="rebound") else files) == []

    tried()


class _Shown:
    """Files that show themselves by what was changed."""

    def __init__(self, sound: Files) -> None:
        self._sound = sound

    def __call__(self, files: Files) -> Files:
        return _Changed(self._sound, files)


class _Changed(dict[str, bytes]):
    def __init__(self, sound: Files, files: Files) -> None:
        super().__init__(files)
        self._sound = sound

    def __repr__(self) -> str:
        return "\n".join(
            f"{key}: {content[:2000]!r}" for key, content in self.items() if self._sound.get(key) != content
        )


def test_a_sound_cache_reads_without_a_failure(reader):
    assert [reader.failures(files) for files in reader.files.values()] == [[]] * len(CODECS)


def test_digests_made_anew_leave_a_sound_cache_sound(reader):
    assert [reader.failures(rebound(files)) for files in reader.files.values()] == [[]] * len(CODECS)


def with_document(files, key, change):
    """Give files with a JSON document changed in place, and every digest anew."""
    document = json.loads(files[key])
    change(document)
    return rebound({**files, key: json.dumps(document).encode()})


def with_numbers(files, **numbers):
    """Give files with numbers altered wherever documents tell of them, and every digest anew."""
    changed = dict(files)
    for field, number in numbers.items():
        pattern, text = re.compile(rf'"{field}": \d+'.encode()), f'"{field}": {number}'.encode()
        changed |= {key: pattern.sub(text, content) for key, content in changed.items() if key.endswith(".json")}
    return rebound(changed)


def attributes(document):
    return document["attributes"]["kdcache"]


def copies(document):
    return document["consolidated_metadata"]["metadata"]


def with_ids(files, example_ids):
    """Give files whose table has other ids."""
    table = pq.read_table(io.BytesIO(files["examples.parquet"]))
    column = pa.array(example_ids, pa.binary()).view(pa.string())
    sink = io.BytesIO()
    pq.write_table(table.set_column(0, table.schema.field(0), column), sink, write_page_checksum=True)
    return rebound({**files, "examples.parquet": sink.getvalue()})


FOUND = {
    "ids that are no UTF-8": lambda files: with_ids(files, [b"\x80"] * 40),
    "ids that stand twice": lambda files: with_ids(files, [b"example"] * 40),
    "a copy in the root is a number": lambda files: with_document(
        files, "zarr.json", lambda root: copies(root).update({"teachers/c": 16})
    ),
    "a copy in the root has a path that leaves the cache": lambda files: with_document(
        files, "zarr.json", lambda root: copies(root).update({"../../x": {}})
    ),
    "a number beyond all numbers": lambda files: {
        **files, "teachers/a/zarr.json": b'{"attributes": 1e999, "node_type": "group", "zarr_format": 3}'
    },
    "metadata in UTF-16": lambda files: {
        **files, "teachers/a/zarr.json": files["teachers/a/zarr.json"].decode().encode("utf-16-be")
    },
    "a record nested more deeply than anything is parsed": lambda files: {
        **files, "commits/a/0.json": b"[" * 200_000 + b"]" * 200_000
    },
    "columns that are not the codec's": lambda files: with_document(
        files, "teachers/a/zarr.json", lambda group: attributes(group).update(num_columns=17)
    ),
    "one teacher of other classes": lambda files: with_document(
        files, "teachers/a/zarr.json", lambda group: attributes(group).update(num_classes=7)
    ),
    "classes that are not those of the parameters": lambda files: with_numbers(files, num_classes=73),
    "a chunk that cannot be stored": lambda files: with_numbers(files, num_columns=2**32 - 1),
    "more shards than can be looked for": lambda files: with_numbers(files, num_rows=2**53),
    "more examples than can be looked for": lambda files: with_numbers(files, num_rows=2**53, num_examples=2**53),
}  # fmt: skip


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("cache", ["codes", "class-means"])
def test_what_was_found_once_is_mended(reader, cache, found):
    assert reader.failures(FOUND[found](reader.files[cache])) == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_cache_gives_an_error_or_its_rows(reader, mutation):
    try_mutations(reader, mutation, max_examples=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_very_many_mutated_caches_give_errors_or_their_rows(reader, mutation):
    try_mutations(reader, mutation, max_examples=MANY)
