from __future__ import annotations

import pytest

from kdcache.documents import CacheDocument, View

FIELDS = {
    "num_classes": 10,
    "num_examples": 1000,
    "num_rows": 1000,
    "shard_rows": 256,
    "chunk_rows": 64,
    "example_id_type": "int64",
    "transfer_set_digest": "0" * 64,
    "has_labels": True,
    "has_input_digests": True,
}


@pytest.fixture
def document():
    return CacheDocument.make(**FIELDS, num_views=3, view=View(name="shift-1", seed=0))


def test_a_view_takes_whole_shards(document):
    assert document.shards_per_view == 4


def test_a_view_is_padded_to_whole_shards(document):
    assert document.padded_rows == 1024


def test_a_teacher_has_the_shards_of_all_views(document):
    assert document.num_shards == 12


@pytest.mark.parametrize(("shard_index", "num_rows"), [(0, 256), (3, 232), (4, 256), (7, 232), (11, 232)])
def test_only_the_last_shard_of_a_view_holds_padding(document, shard_index, num_rows):
    assert document.rows_in_shard(shard_index) == num_rows


def test_rows_that_fill_the_shards_need_no_padding():
    full = CacheDocument.make(**{**FIELDS, "num_rows": 1024})
    assert (full.padded_rows, full.rows_in_shard(3)) == (1024, 256)


def test_the_digest_of_a_document_stays_what_it_was_in_earlier_releases(document):
    assert document.digest() == "17c31a216bdf2ec9d099fb63683ae97febbfec3e563263fcf288cbaaaf1f3142"
