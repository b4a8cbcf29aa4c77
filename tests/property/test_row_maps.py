"""Whatever the examples' rows, batches and shards: each row lies in one shard, and a shard's batches hold its rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.build.rows import RowMap
from kdcache.documents import CacheDocument, Codes, Fingerprint, PlanDocument, View

TEACHER = Fingerprint.make(name="a", source="m:n", weights_sha256="0" * 64)


@st.composite
def row_maps(draw) -> RowMap:
    num_rows = np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=40)), np.int32)
    cache = CacheDocument.make(
        num_classes=3,
        num_examples=len(num_rows),
        num_rows=int(num_rows.sum()),
        num_views=draw(st.integers(1, 3)),
        shard_rows=draw(st.integers(1, 50)),
        chunk_rows=1,
        example_id_type="int64",
        transfer_set_digest="0" * 64,
        has_labels=False,
        has_input_digests=False,
        view=View(name="v", seed=0),
    )
    plan = PlanDocument.make(
        cache=cache, teachers=(TEACHER,), codec=Codes(), batch_size=draw(st.integers(1, 50)), num_pilot_rows=1
    )
    return RowMap(plan, num_rows)


def shards(row_map: RowMap) -> list[tuple[int, int, int]]:
    return [row_map.shard_rows(shard) for shard in range(row_map.plan.cache.num_shards)]


def batch_rows(row_map: RowMap, shard: int) -> list[tuple[int, int]]:
    return [row_map.rows_of_batch(key) for key in row_map.batches_of_shard(shard)]


@given(row_maps())
def test_the_shards_hold_each_row_of_each_view_once(row_map):
    held = [(view, row) for view, start, end in shards(row_map) for row in range(start, end)]
    cache = row_map.plan.cache
    assert held == [(view, row) for view in range(cache.num_views) for row in range(cache.num_rows)]


@given(row_maps())
def test_no_shard_is_empty(row_map):
    assert all(start < end for _, start, end in shards(row_map))


@given(row_maps())
def test_the_batches_of_a_view_hold_each_example_once(row_map):
    keys = [key for shard in range(row_map.plan.cache.shards_per_view) for key in row_map.batches_of_shard(shard)]
    held = np.concatenate([row_map.examples_of_batch(key) for key in dict.fromkeys(keys)])
    assert held.tolist() == list(range(len(row_map.num_rows)))


@given(row_maps(), st.data())
def test_a_shards_batches_hold_all_of_its_rows_without_a_gap(row_map, data):
    shard = data.draw(st.integers(0, row_map.plan.cache.num_shards - 1))
    _, start, end = row_map.shard_rows(shard)
    rows = [row for first, last in batch_rows(row_map, shard) for row in range(first, last)]
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert rows[0] <= start < end <= rows[-1] + 1


@given(row_maps(), st.data())
def test_none_of_a_shards_batches_could_be_left_out(row_map, data):
    shard = data.draw(st.integers(0, row_map.plan.cache.num_shards - 1))
    _, start, end = row_map.shard_rows(shard)
    assert all(first < end and last > start for first, last in batch_rows(row_map, shard))


@given(row_maps(), st.data())
def test_a_shards_batches_are_of_its_own_view(row_map, data):
    shard = data.draw(st.integers(0, row_map.plan.cache.num_shards - 1))
    views = {key.view_index for key in row_map.batches_of_shard(shard)}
    assert views == {shard // row_map.plan.cache.shards_per_view}


@given(row_maps(), st.data())
def test_a_row_belongs_to_the_example_whose_rows_hold_it(row_map, data):
    row = data.draw(st.integers(0, row_map.plan.cache.num_rows - 1))
    owners = np.repeat(np.arange(len(row_map.num_rows)), row_map.num_rows)
    assert row_map.example_at(row) == owners[row]
