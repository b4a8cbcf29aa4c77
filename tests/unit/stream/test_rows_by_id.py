"""Rows of examples by id, and by the position of a dataset whose ids are known."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_caches import build_tiny, tiny_transfer_set
from torch import nn

from kdcache.errors import UnknownExampleError
from kdcache.stream.rows_by_id import RowsById, RowsByPosition

OPTIONS = {"view_index": 0, "teachers": None, "allow_repeats": False, "max_resident_bytes": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    names = [f"picture-{index}" for index in range(40)]
    return build_tiny(tmp_path_factory.mktemp("rows") / "cache", tiny_transfer_set(example_ids=names))


@pytest.fixture
def rows(cache):
    return RowsById(cache, **OPTIONS)


IDS = np.array(["picture-7", "picture-3", "nobody", "picture-9"], dtype=object)


def test_positions_have_the_rows_of_their_ids(rows):
    found = RowsByPosition(rows, IDS).find(np.array([3, 0]))
    assert (found.ids.tolist(), found.first_row.tolist()) == (["picture-9", "picture-7"], [9, 7])


def test_positions_are_looked_up_once(rows, monkeypatch):
    by_position = RowsByPosition(rows, IDS)
    first = by_position.find(np.array([3, 0, 1]))
    monkeypatch.setattr(rows.cache, "locate", None)
    again = by_position.find(np.array([1, -1]))
    assert (again.ids.tolist(), again.first_row.tolist()) == (["picture-3", "picture-9"], [3, 9])
    assert again.num_rows.dtype == first.num_rows.dtype


def test_an_id_that_nobody_asks_for_may_be_unknown(rows):
    by_position = RowsByPosition(rows, IDS)
    by_position.find(np.array([0]))
    with pytest.raises(UnknownExampleError, match="'nobody'"):
        by_position.find(np.array([2]))


def test_all_rows_of_an_example_follow_its_first(tmp_path):
    counts = [index % 3 + 1 for index in range(10)]
    transfer_set = tiny_transfer_set(10, num_rows=counts, labels=None)
    cache = build_tiny(tmp_path / "cache", transfer_set, {"a": Repeated()})
    found = RowsById(cache, **OPTIONS).find(np.array([2, 0, 1]), where="here")
    assert found.rows().tolist() == [3, 4, 5, 0, 1, 2]


class Repeated(nn.Module):
    """A teacher of sequences: the same row at each of three positions."""

    def forward(self, inputs):
        return inputs[:, None].expand(-1, 3, -1)
