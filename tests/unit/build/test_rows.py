from __future__ import annotations

import numpy as np
import pytest

from kdcache.build.rows import BatchKey, RowMap
from kdcache.documents import CacheDocument, Codes, Fingerprint, PlanDocument, View


def row_map(num_rows, *, batch_size=3, shard_rows=4, num_views=2) -> RowMap:
    cache = CacheDocument.make(
        num_classes=3, num_examples=len(num_rows), num_rows=sum(num_rows), num_views=num_views, shard_rows=shard_rows,
        chunk_rows=1, example_id_type="int64", transfer_set_digest="0" * 64, has_labels=False, has_input_digests=False,
        view=View(name="v", seed=0),
    )  # fmt: skip
    teacher = Fingerprint.make(name="a", source="m:n", weights_sha256="0" * 64)
    plan = PlanDocument.make(cache=cache, teachers=(teacher,), codec=Codes(), batch_size=batch_size, num_pilot_rows=1)
    return RowMap(plan, np.array(num_rows, np.int32))


@pytest.fixture
def images():
    return row_map([1] * 10)


@pytest.fixture
def sequences():
    return row_map([2, 5, 1, 1, 3])


def test_a_shard_has_its_view_and_its_rows_without_padding(images):
    assert [images.shard_rows(shard) for shard in range(6)] == [
        (0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8), (1, 8, 10),
    ]  # fmt: skip


def test_a_shard_names_every_batch_that_reaches_into_it(images):
    assert images.batches_of_shard(1) == [BatchKey(0, 1), BatchKey(0, 2)]


def test_a_shard_of_a_later_view_names_batches_of_that_view(images):
    assert images.batches_of_shard(5) == [BatchKey(1, 2), BatchKey(1, 3)]


def test_the_last_batch_holds_what_is_left(images):
    assert images.examples_of_batch(BatchKey(0, 3)).tolist() == [9]


def test_a_batch_holds_all_rows_of_its_examples(sequences):
    assert [sequences.rows_of_batch(BatchKey(0, index)) for index in range(2)] == [(0, 8), (8, 12)]


def test_a_shard_may_begin_within_an_example(sequences):
    assert sequences.batches_of_shard(1) == [BatchKey(0, 0)]


def test_a_row_belongs_to_one_example(sequences):
    assert [sequences.example_at(row) for row in (0, 1, 2, 6, 7, 8, 9, 11)] == [0, 0, 1, 1, 2, 3, 4, 4]
