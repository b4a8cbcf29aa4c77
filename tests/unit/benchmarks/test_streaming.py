"""The streaming benchmark: its check of contents, its statistics, its contestants that need no package, its page."""

import functools
import mmap

import numpy as np
import pytest
import torch

import kdcache
from benchmarks.streaming import report
from benchmarks.streaming.__main__ import PAGE, merged
from benchmarks.streaming.content import WrongRowsError, check_epoch, row_hashes
from benchmarks.streaming.contestant import Contestant, user_lines
from benchmarks.streaming.lineup import CONTESTANTS, contestant_named
from benchmarks.streaming.repeated import repeated_cache, repeats
from benchmarks.streaming.resources import MemoryPeak, bytes_on_disk, own_memory_bytes
from benchmarks.streaming.row_sets import RowSet, lookup_teacher
from benchmarks.streaming.shuffle import measures_of
from benchmarks.streaming.step import grouped, ratios
from benchmarks.streaming.worker import Worker
from benchmarks.timing import interleaved

NUM_ROWS = 600
WITHOUT_PACKAGES = [
    "kdcache, read_rows, in memory",
    "kdcache, loader, memory",
    "kdcache, loader, mapped",
    "kdcache, loader, windows",
    "kdcache, loader, scattered",
    "memmap[rows], uncompressed",
    "mapped tensor, index_select, uncompressed",
    "zarr-python, windows of 4 shards",
    "Parquet, fixed-size binary",
    "Parquet, lists",
]


@pytest.fixture(scope="module")
def row_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    logits = torch.randn(NUM_ROWS, 12, generator=torch.Generator().manual_seed(0)).half()
    inputs = kdcache.TransferSet.from_arrays(torch.arange(NUM_ROWS))
    codec = kdcache.Lossless(dtype="float16")
    kdcache.build_cache(folder / "cache", inputs, {"teacher": lookup_teacher(logits)}, codec=codec, shard_rows=128)
    np.save(folder / "codes.npy", logits.numpy())
    (folder / "rows").mkdir()
    np.save(folder / "rows" / "values.npy", logits.numpy())
    return RowSet("tiny", "A tiny row set", folder)


@pytest.fixture
def columns():
    return (np.arange(40, dtype=np.uint16).reshape(10, 4), np.arange(30, dtype=np.float16).reshape(10, 3))


def batches_of(columns, rows):
    return [(chosen, tuple(column[chosen] for column in columns)) for chosen in np.split(rows, [3])]


# The check of contents


def test_every_row_once_in_any_order_is_right(columns):
    order = np.array([3, 1, 2, 0, 9, 8, 4, 5, 7, 6])
    assert check_epoch(batches_of(columns, order), columns) == 2


def test_int16_is_how_torch_gathers_uint16(columns):
    as_int16 = [(rows, (first.view(np.int16), second)) for rows, (first, second) in batches_of(columns, np.arange(10))]
    assert check_epoch(as_int16, columns) == 10


def test_a_row_under_another_number_is_wrong(columns):
    (rows, found), *others = batches_of(columns, np.arange(10))
    with pytest.raises(WrongRowsError, match="another content"):
        check_epoch([(rows[::-1], found), *others], columns)


def test_one_flipped_bit_in_the_last_column_is_wrong(columns):
    altered = (columns[0], columns[1].copy())
    altered[1].view(np.uint16)[7, 2] ^= 1
    with pytest.raises(WrongRowsError, match="row 7 has another content"):
        check_epoch(batches_of(altered, np.arange(10)), columns)


def test_a_missing_row_is_wrong(columns):
    with pytest.raises(WrongRowsError, match="1 of 10 rows are missing"):
        check_epoch(batches_of(columns, np.arange(9)), columns)


def test_a_row_that_comes_twice_is_wrong(columns):
    with pytest.raises(WrongRowsError, match="1 come more than once"):
        check_epoch(batches_of(columns, np.append(np.arange(10), 4)), columns)


def test_an_epoch_without_batches_is_wrong(columns):
    with pytest.raises(WrongRowsError, match="10 of 10 rows are missing"):
        check_epoch([], columns)


def test_another_dtype_is_wrong(columns):
    as_float32 = (columns[0], columns[1].astype(np.float32))
    with pytest.raises(WrongRowsError, match="float32"):
        check_epoch(batches_of(as_float32, np.arange(10)), columns)


def test_hashes_tell_columns_apart():
    first, second = np.zeros((1, 2), np.uint8), np.ones((1, 2), np.uint8)
    assert row_hashes((first, second)) != row_hashes((second, first))


# Contestants


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # columns of Arrow are only read
@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_a_contestant_gives_every_row_shuffled(row_set, name):
    worker = Worker(row_set, contestant_named(name))
    worker.answer({"do": "write"})
    assert worker.answer({"do": "check"})["in_place_rows"] < NUM_ROWS / 10


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # columns of Arrow are only read
@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_an_epoch_is_counted_in_rows_and_seconds(row_set, name):
    worker = Worker(row_set, contestant_named(name))
    worker.answer({"do": "write"})
    answer = worker.answer({"do": "epoch", "number": 1, "min_seconds": 0.0001, "max_seconds": 60})
    assert answer["rows"] >= NUM_ROWS
    assert answer["seconds"] > 0


def test_a_slow_epoch_is_broken_off(row_set):
    worker = Worker(row_set, contestant_named("kdcache, loader, scattered"))
    answer = worker.answer({"do": "epoch", "number": 1, "min_seconds": 0.0001, "max_seconds": 0})
    assert answer["rows"] == 256


def test_a_fresh_process_tells_its_first_batch_and_its_memory(row_set):
    worker = Worker(row_set, contestant_named("kdcache, read_rows, in memory"))
    answer = worker.answer({"do": "fresh", "max_seconds": 60})
    assert 0 < answer["first_batch_seconds"] <= answer["seconds"]
    assert answer["rows"] == NUM_ROWS
    assert answer["bytes_before"] > 0


def test_a_contestant_that_gives_its_neighbours_rows_fails_the_check(row_set):
    def open_epochs(stored):
        values = np.load(stored.folder / "values.npy")
        return lambda _: iter([(np.arange(NUM_ROWS), (np.roll(values, 1, axis=0),))])

    true = contestant_named("memmap[rows], uncompressed")
    Worker(row_set, true).answer({"do": "write"})
    wrong = Contestant("wrong", "package", open_epochs, true.stored_as, ("numpy",))
    with pytest.raises(WrongRowsError, match="another content"):
        Worker(row_set, wrong).answer({"do": "check"})


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_shows_the_lines_that_its_user_writes(name):
    assert user_lines(CONTESTANTS[name]) >= 3


def test_lines_without_markers_cannot_be_counted():
    with pytest.raises(ValueError, match="no lines between"):
        user_lines(Contestant("unmarked", "package", batches_of, "npy", ("numpy",)))


def test_an_unknown_contestant_is_refused():
    with pytest.raises(SystemExit, match="there is no contestant 'nobody'"):
        contestant_named("nobody")


def test_a_repeated_cache_holds_the_rows_in_their_new_order(row_set, tmp_path):
    source_rows = repeats(NUM_ROWS, 1000)
    repeated_cache(kdcache.open_cache(row_set.cache_folder), source_rows, tmp_path / "large")
    soft_targets = kdcache.open_cache(tmp_path / "large").read(np.arange(1000))
    assert np.array_equal(soft_targets.codes[0].numpy(), row_set.codes[source_rows])


def test_repeats_take_every_row_before_one_comes_again():
    source_rows = repeats(50, 120)
    assert np.array_equal(np.sort(source_rows[:50]), np.arange(50))
    assert len(source_rows) == 120


# Resources


def test_memory_that_is_taken_shows_in_the_peak():
    before = own_memory_bytes()
    with MemoryPeak() as peak:
        taken = mmap.mmap(-1, 50_000_000)  # an array may be given what others have left
        taken.write(bytes(len(taken)))
    assert peak.num_bytes - before > 0.8 * len(taken)


def test_bytes_on_disk_are_those_of_all_files_below(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"45")
    assert bytes_on_disk(tmp_path) == 5


# Statistics


def test_storage_order_keeps_neighbours_together_and_classes_apart():
    measured = measures_of(np.arange(1000), batch_size=100, num_classes=10)
    assert measured["neighbours"] == pytest.approx((990 / 999) / (99 / 999))
    assert measured["classes_in_batch"] == 1
    assert measured["class_variance"] == pytest.approx(900 / (9 * 900 / 999))
    assert measured["displacement_90"] == 0


def test_a_true_permutation_measures_as_one():
    order = np.random.default_rng(0).permutation(100_000)
    measured = measures_of(order, batch_size=100, num_classes=10)
    assert measured["neighbours"] == pytest.approx(1, abs=0.2)
    assert measured["class_variance"] == pytest.approx(1, abs=0.1)
    assert measured["displacement_50"] == pytest.approx(1 - 0.5**0.5, abs=0.01)


def test_ratios_are_taken_group_by_group():
    assert ratios((2.0, 9.0, 4.0), (1.0, 3.0, 4.0)) == {"ratio": 2.0, "of_groups": [1.0, 3.0]}


def test_steps_are_compared_by_the_medians_of_neighbouring_ones():
    assert grouped((1.0, 2.0, 9.0) * 6 + (5.0, 6.0, 4.0)) == (2.0,) * 6 + (5.0,)


def test_turns_change_their_order_and_none_is_left_out():
    given: list[str] = []
    contestants = {name: functools.partial(given.append, name) for name in "abcd"}
    interleaved(contestants, rounds=8, warm_up=0, turns=np.random.default_rng(0))
    rounds = ["".join(given[start : start + 4]) for start in range(0, 32, 4)]
    assert {"".join(sorted(one)) for one in rounds} == {"abcd"}
    assert len(set(rounds)) > 1


# The page

LINE = {
    "name": "zarrs, shard by shard", "kind": "control", "note": "", "user_lines": 12, "version": "1", "error": None,
    "rows_per_second": [100.0, 300.0, 200.0], "rows_per_cpu_second": [1000.0, 2000.0, 3000.0],
    "first_batch_seconds": 0.0123, "memory_bytes": 5_000_000, "disk_bytes": 7_000_000,
}  # fmt: skip
OURS = {**LINE, "name": "kdcache, loader", "kind": "kdcache", "rows_per_cpu_second": [3000.0, 3000.0, 3000.0]}
FAILED = {**LINE, "name": "absent", "kind": "package", "error": "ModuleNotFoundError: No module named 'absent'"}


def test_a_line_shows_medians_and_spread():
    assert (
        report.reading_table([LINE]).splitlines()[-1]
        == "| zarrs, shard by shard | 200 | 100 to 300 | 2,000 | 12.3 | 5 | 7 | 12 |"
    )


def test_a_contestant_that_did_not_run_shows_its_reason():
    assert "did not run: ModuleNotFoundError: No module named 'absent'" in report.reading_table([FAILED])


def test_ratios_are_over_the_better_of_zarrs():
    worse = {**LINE, "name": "zarrs, windows of 4 shards", "rows_per_cpu_second": [500.0]}
    table = report.ratios_table([{"name": "codes", "lines": [worse, LINE, OURS, FAILED]}])
    assert table.splitlines()[-1] == "| uint8 codes | 2,000 | 1.50 |"


def test_pictures_are_drawn_from_the_figures(tmp_path):
    document = {"read": [{"name": "codes", "lines": [LINE, OURS, FAILED]}]}
    assert [path.name for path in report.draw(document, tmp_path)] == ["streaming.png", "streaming.svg"]
    assert (tmp_path / "streaming.png").stat().st_size > 0


def test_new_figures_replace_those_of_the_same_contestant_alone():
    standing = [{"name": "codes", "lines": [{"name": "litdata", "a": 1}, {"name": "datasets", "a": 1}]}]
    new = [{"name": "codes", "lines": [{"name": "datasets", "a": 2}]}]
    lines = merged(standing, new)[0]["lines"]
    assert lines == [{"name": "litdata", "a": 1}, {"name": "datasets", "a": 2}]


def test_the_page_has_a_place_for_every_table():
    page = PAGE.read_text()
    names = [
        "read float16", "read codes", "read coefficients", "read top-64", "against zarrs", "on the same files",
        "packages", "cold", "step", "shuffle", "shuffle students",
    ]  # fmt: skip
    assert [name for name in names if f"<!-- table {name} -->" not in page] == []
