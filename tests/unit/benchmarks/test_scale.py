from __future__ import annotations

import pytest

from benchmarks.scale import clusters, index, paper, records
from benchmarks.scale.__main__ import filled, table

MEASURED = [
    {"records": 1_000, "record_bytes": 4_000, "list_seconds": 0.01, "finalise_seconds": 0.5},
    {"records": 100_000, "record_bytes": 4_000, "list_seconds": 1.0, "finalise_seconds": 50.0},
]


def test_on_paper_larger_shards_make_fewer_objects():
    earlier, now = paper.on_paper(MEASURED)
    assert (earlier["shards"], now["shards"]) == (610_352, 76_294)
    assert now["objects"] == 2 * 76_294


def test_on_paper_disk_times_are_those_of_the_largest_measurement():
    _, now = paper.on_paper(MEASURED)
    assert now["finalise_on_disk_seconds"] == pytest.approx(76_294 / 100_000 * 50.0)


def test_a_table_names_its_columns_and_shortens_its_numbers():
    assert table([{"what": "one", "num_rows": 12_345, "time_seconds": 0.123456}]) == (
        "| what | num rows | time seconds |\n| --- | --- | --- |\n| one | 12,345 | 0.123 |"
    )


def test_a_table_takes_its_place_in_the_page_and_no_other():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    assert filled(page, "one", "new") == page.replace("old\n", "\nnew\n\n")


def test_records_are_measured_in_a_cache_that_can_be_finalised(monkeypatch):
    monkeypatch.setattr(records, "NUM_RECORDS", (12,))
    (row,) = records.run()
    assert row["records"] == 12
    assert row["record_bytes"] > 1_000


def test_ids_are_measured(monkeypatch):
    monkeypatch.setattr(index, "NUM_EXAMPLES", (1_000,))
    (row,) = index.run()
    assert 1 < row["index_bytes_per_example"] < 100


def test_a_build_in_this_process_is_measured(monkeypatch):
    monkeypatch.setattr(clusters, "WORKERS", ())
    monkeypatch.setattr(clusters, "NUM_ROWS", 2_048)
    monkeypatch.setattr(clusters, "NUM_TRIVIAL_TASKS", 8)
    assert [(row["executor"], row["tasks"]) for row in clusters.run()] == [("in process", 2), ("in process", 8)]
