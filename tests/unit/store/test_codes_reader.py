import pickle
import threading

import numpy as np
import pytest
from store_builders import make_cache_document, resident, whole

from kdcache.errors import CorruptCacheError, ShapeError
from kdcache.store import reader as reader_module
from kdcache.store.codes_reader import has_fill
from kdcache.store.recent import Recent
from kdcache.store.shards import encode_shard

SHARD = "teachers/a/codes/c/1/0"


def alter(written, key, change):
    store = written.store.objects
    store.replace(key, change(store.read(key)))


def test_rows_come_in_the_order_asked_for(written):
    rows = np.array([299, 0, 150, 128, 127])
    np.testing.assert_array_equal(written.reader().read_rows(rows), written.codes[rows])


def test_a_row_asked_for_twice_comes_twice(written):
    rows = np.array([7, 7, 200, 7])
    np.testing.assert_array_equal(written.reader().read_rows(rows), written.codes[rows])


def test_no_rows_give_no_rows(written):
    assert written.reader().read_rows(np.empty(0, np.int64)).shape == (0, 11)


def test_rows_read_again_come_from_memory(written):
    reader = written.reader()
    rows = np.arange(300)
    reader.read_rows(rows)
    for shard_index in range(3):
        written.store.objects.delete(f"teachers/a/codes/c/{shard_index}/0")
    np.testing.assert_array_equal(reader.read_rows(rows), written.codes)


def test_rows_come_right_when_nothing_fits_in_memory(written):
    rows = np.random.default_rng(1).integers(0, 300, 500)
    np.testing.assert_array_equal(written.reader(cache_bytes=0).read_rows(rows), written.codes[rows])


def test_decoded_chunks_stay_within_the_bytes_given(written):
    chunk_bytes = written.reader().spec.chunk_bytes
    reader = written.reader(cache_bytes=3 * chunk_bytes)
    reader.read_rows(np.arange(300))
    assert reader._reader._chunks.num_bytes == 3 * chunk_bytes


def test_the_chunk_used_longest_ago_is_dropped_first():
    recent = Recent(2)
    for key in (1, 2):
        recent.put(key, key, 1)
    recent.get(1)
    recent.put(3, 3, 1)
    assert (recent.get(1), recent.get(2), recent.get(3)) == (1, None, 3)


@pytest.fixture
def ranges(written, monkeypatch):
    """What is asked of the store at a time, index reads left out: keys and ranges."""
    noted = []
    kind = type(written.store.objects)
    read_ranges = kind.read_ranges

    def note(self, key, ranges):
        if ranges[0][1] != written.reader().spec.index_bytes:
            noted.append((key, ranges))
        return read_ranges(self, key, ranges)

    monkeypatch.setattr(kind, "read_ranges", note)
    return noted


def test_the_chunks_of_a_shard_are_asked_for_together(written, ranges):
    written.reader().read_rows(np.arange(200))
    assert [(key, len(asked)) for key, asked in ranges] == [(SHARD.replace("c/1", "c/0"), 4), (SHARD, 3)]


def test_only_the_chunks_needed_are_read(written, ranges):
    written.reader().read_rows(np.array([40, 50]))
    assert [(key, len(asked)) for key, asked in ranges] == [("teachers/a/codes/c/0/0", 1)]
    assert ranges[0][1][0][1] < 500


def test_many_threads_read_right_rows_from_one_reader(written):
    reader = written.reader(cache_bytes=1000)
    wrong = []

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, 300, 200)
        if not np.array_equal(reader.read_rows(rows), written.codes[rows]):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_reader_can_be_sent_to_another_process(written):
    reader = written.reader()
    reader.read_rows(np.arange(300))
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - our own object
    np.testing.assert_array_equal(copy.read_rows(np.array([7, 200])), written.codes[[7, 200]])


@pytest.mark.parametrize("shard_index", [0, 1, 2])
def test_a_shard_comes_without_its_padding(written, shard_index):
    np.testing.assert_array_equal(written.reader().read_shard(shard_index), written.rows_of_shard(shard_index))


@pytest.mark.parametrize("shard_index", [-1, 3])
def test_a_shard_that_does_not_exist_is_refused(written, shard_index):
    with pytest.raises(ShapeError, match=f"no shard {shard_index}; the cache has 3"):
        written.reader().read_shard(shard_index)


def test_everything_comes_with_rows_at_their_numbers(written):
    codes = whole(written.resident())
    assert codes.shape == (384, 11)
    np.testing.assert_array_equal(codes[:300], written.codes)
    assert (codes[300:] == 255).all()


@pytest.mark.parametrize("row", [-1, 384, 2**62])
def test_a_row_outside_the_array_is_refused(written, row):
    with pytest.raises(ShapeError, match=f"row {row} is outside the array's rows 0 to 383"):
        written.reader().read_rows(np.array([0, row]))


def test_a_row_of_padding_is_refused(written):
    with pytest.raises(ShapeError, match="row 300 is padding: each view has 300 rows in a block of 384"):
        written.reader().read_rows(np.array([0, 300]))


@pytest.mark.parametrize("rows", [np.array([0.0]), np.array([[0]]), np.array([True])])
def test_row_numbers_that_are_no_integers_are_refused(written, rows):
    with pytest.raises(ShapeError, match="one axis of integers"):
        written.reader().read_rows(rows)


READS = {
    "rows": lambda reader: reader.read_rows(np.array([200])),
    "shard": lambda reader: reader.read_shard(1),
    "block": lambda reader: reader.read_chunks(range(4, 8), np.empty((128, 11), np.uint8), first_row=128),
    "all": lambda reader: whole(resident(reader, make_cache_document())),
}


@pytest.fixture(params=READS)
def read(request):
    return READS[request.param]


def test_a_missing_shard_is_an_error_that_names_it_and_the_remedy(written, read):
    written.store.objects.delete(SHARD)
    with pytest.raises(CorruptCacheError) as caught:
        read(written.reader())
    address = written.store.address
    assert str(caught.value) == (
        f"{address}/{SHARD}: the shard is missing. Nothing was changed. Run `kdcache verify {address}` to see all "
        "damage; `kdcache repair JOB`, with the cache's job file, drops this shard and its record and builds them "
        f"anew; `kdcache repair {address}` drops them alone."
    )


def test_a_shard_deleted_under_an_open_reader_is_missing(written):
    reader = written.reader(cache_bytes=0)
    reader.read_rows(np.array([200]))
    written.store.objects.delete(SHARD)
    with pytest.raises(CorruptCacheError, match=f"{SHARD}: the shard is missing.*kdcache repair JOB"):
        reader.read_rows(np.array([200]))


def test_everything_is_read_only_when_every_shard_is_there(written, monkeypatch):
    resident_codes = written.resident()
    written.store.objects.delete("teachers/a/codes/c/2/0")
    monkeypatch.setattr(reader_module, "decode_chunk", lambda *_, **__: pytest.fail("a chunk was read"))
    with pytest.raises(CorruptCacheError, match="codes/c/2/0: the shard is missing"):
        resident_codes.fill_all()


def test_an_empty_shard_is_an_error(written, read):
    alter(written, SHARD, lambda _: b"")
    with pytest.raises(CorruptCacheError, match="fewer than the 68 of its index alone"):
        read(written.reader())


@pytest.mark.parametrize("kept", [1, 68, 500])
def test_a_torn_shard_is_an_error(written, read, kept):
    alter(written, SHARD, lambda data: data[:kept])
    with pytest.raises(CorruptCacheError, match="teachers/a/codes/c/1/0"):
        read(written.reader())


def test_a_flipped_bit_in_a_chunk_is_an_error(written, read):
    index = written.store.objects.read(SHARD)[-68:]
    start = int(np.frombuffer(index[:64], "<u8").reshape(4, 2)[2, 0])  # rows 192 to 223
    alter(written, SHARD, lambda data: data[: start + 30] + bytes([data[start + 30] ^ 1]) + data[start + 31 :])
    with pytest.raises(CorruptCacheError, match="the checksum of a chunk does not match"):
        read(written.reader())


def test_a_flipped_bit_in_the_index_is_an_error(written, read):
    alter(written, SHARD, lambda data: data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    with pytest.raises(CorruptCacheError, match="the checksum of the shard's index does not match"):
        read(written.reader())


def test_a_fill_code_where_a_row_should_be_is_an_error_that_names_the_row(written, read):
    codes = written.rows_of_shard(1).copy()
    codes[72, 3] = 255
    alter(written, SHARD, lambda _: encode_shard(codes, written.reader().spec))
    with pytest.raises(CorruptCacheError, match="codes/c/1/0: row 200 holds the fill code: it was never written"):
        read(written.reader())


def test_a_shard_cut_while_it_is_read_is_an_error(written):
    reader = written.reader()
    reader.read_rows(np.array([128]))  # the index is in memory now
    alter(written, SHARD, lambda data: data[:400])
    with pytest.raises(CorruptCacheError, match="bytes from byte"):
        reader.read_rows(np.array([255]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_not_a_number_is_the_fill_code_of_floats(dtype):
    assert has_fill(np.array([[0, np.nan]], dtype), np.nan)
    assert not has_fill(np.array([[0, np.inf]], dtype), np.nan)
