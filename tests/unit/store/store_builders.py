"""Small documents of a cache, and what a test cache holds."""

from dataclasses import dataclass

import numpy as np

from kdcache.documents import CacheDocument, Codes, Fingerprint, PlanDocument, TeacherDocument
from kdcache.store import CacheStore, ExampleTable, ResidentCodes

NUM_ROWS = 300


@dataclass(frozen=True)
class Written:
    """A cache of one teacher with random codes, and what was put into it."""

    store: CacheStore
    cache_document: CacheDocument
    teacher_document: TeacherDocument
    table: ExampleTable
    codes: np.ndarray

    def reader(self, **options):
        return self.store.codes_reader(self.teacher_document, self.cache_document, **options)

    def resident(self, **options):
        return resident(self.reader(**options), self.cache_document)

    def rows_of_shard(self, shard_index):
        start = shard_index * self.cache_document.shard_rows
        return self.codes[start : start + self.cache_document.rows_in_shard(shard_index)]


def resident(reader, cache_document):
    return ResidentCodes(reader, cache_document.padded_rows * cache_document.num_views)


def whole(resident_codes):
    resident_codes.fill_all()
    return resident_codes.codes


def make_cache_document(**changes):
    fields = {
        "num_classes": 10,
        "num_examples": NUM_ROWS,
        "num_rows": NUM_ROWS,
        "shard_rows": 128,
        "chunk_rows": 32,
        "example_id_type": "string",
        "transfer_set_digest": "0" * 64,
        "has_labels": True,
        "has_input_digests": False,
    }
    return CacheDocument.make(**{**fields, **changes})


def make_fingerprint(name="a"):
    return Fingerprint.make(name=name, source="models:net", weights_sha256="1" * 64)


def make_teacher_document(name="a", *, weights_sha256="1" * 64):
    member = Fingerprint.make(name=name, source="models:net", weights_sha256=weights_sha256)
    return TeacherDocument.make(
        name=name,
        members=(member,),
        num_classes=10,
        codec=Codes(),
        num_columns=11,
        storage_dtype="uint8",
        parameters={},
        num_pilot_rows=100,
    )


def make_plan(cache_document, *, names=("a",)):
    return PlanDocument.make(
        cache=cache_document,
        teachers=tuple(make_fingerprint(name) for name in names),
        codec=Codes(),
        batch_size=64,
        num_pilot_rows=100,
    )
