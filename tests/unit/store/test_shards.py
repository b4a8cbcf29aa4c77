import math
import threading

import numpy as np
import pytest
from numcodecs import blosc

from kdcache.errors import CorruptCacheError, ShapeError
from kdcache.store.place import Place
from kdcache.store.shards import ShardSpec, decode_chunk, decode_shard, encode_shard, parse_index

PLACE = Place("CACHE", "teachers/a/codes/c/0/0", "Build again.")
FILLS = {"uint8": 255, "uint16": 65535, "uint64": 2**64 - 1, "float16": math.nan, "float32": math.nan}


def make_spec(dtype="uint8", *, shard_rows=64, chunk_rows=16, num_columns=5):
    return ShardSpec(shard_rows, chunk_rows, num_columns, dtype, FILLS[dtype])


def make_rows(spec, num_rows=None, seed=0):
    generator = np.random.default_rng(seed)
    shape = (spec.shard_rows if num_rows is None else num_rows, spec.num_columns)
    return (generator.normal(size=shape) * 20 + 100).astype(spec.dtype)


@pytest.mark.parametrize("dtype", sorted(FILLS))
def test_a_shard_decodes_to_the_rows_it_was_made_of(dtype):
    spec = make_spec(dtype)
    rows = make_rows(spec)
    assert decode_shard(encode_shard(rows, spec), spec, place=PLACE).tobytes() == rows.tobytes()


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 63])
@pytest.mark.parametrize("dtype", sorted(FILLS))
def test_missing_rows_are_stored_as_the_fill_code(dtype, num_rows):
    spec = make_spec(dtype)
    rows = make_rows(spec, num_rows)
    decoded = decode_shard(encode_shard(rows, spec), spec, place=PLACE)
    assert decoded[:num_rows].tobytes() == rows.tobytes()
    np.testing.assert_array_equal(decoded[num_rows:], np.full_like(decoded[num_rows:], FILLS[dtype]))


def test_only_the_rows_wanted_are_given():
    spec = make_spec()
    rows = make_rows(spec)
    np.testing.assert_array_equal(decode_shard(encode_shard(rows, spec), spec, place=PLACE, num_rows=17), rows[:17])


def test_equal_rows_give_equal_bytes_from_any_number_of_threads(monkeypatch):
    spec = make_spec("float32", shard_rows=256, chunk_rows=64, num_columns=2000)
    rows = make_rows(spec)
    monkeypatch.setattr(blosc, "use_threads", True)  # another library's doing
    expected = encode_shard(rows, spec)
    results = []
    threads = [threading.Thread(target=lambda: results.append(encode_shard(rows, spec))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_rows_that_are_not_contiguous_are_encoded_the_same():
    spec = make_spec()
    rows = make_rows(spec)
    assert encode_shard(np.asfortranarray(rows), spec) == encode_shard(rows, spec)


def test_rows_of_the_other_byte_order_are_encoded_the_same():
    spec = make_spec("uint16")
    rows = make_rows(spec)
    assert encode_shard(rows.astype(">u2"), spec) == encode_shard(rows, spec)


def test_every_chunk_is_written_even_where_all_of_it_is_fill():
    spec = make_spec()
    data = encode_shard(make_rows(spec, 1), spec)
    index = parse_index(data[-spec.index_bytes :], spec, shard_bytes=len(data), place=PLACE)
    assert (index[:, 1] > 0).all()
    assert len(index) == 4


def test_chunks_lie_one_after_the_other():
    spec = make_spec()
    data = encode_shard(make_rows(spec), spec)
    index = parse_index(data[-spec.index_bytes :], spec, shard_bytes=len(data), place=PLACE)
    np.testing.assert_array_equal(index[:, 0], np.cumsum(index[:, 1]) - index[:, 1])


@pytest.mark.parametrize("shape", [(64, 4), (65, 5), (64,), (4, 4, 4)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match="up to 64 rows of 5 columns"):
        encode_shard(np.zeros(shape, np.uint8), make_spec())


def test_rows_of_another_type_are_refused_and_never_converted():
    with pytest.raises(ShapeError, match="a shard of uint8 cannot take rows of float32"):
        encode_shard(np.zeros((64, 5), np.float32), make_spec())


@pytest.mark.parametrize(
    ("shard_rows", "chunk_rows", "num_columns"), [(64, 15, 5), (0, 16, 5), (64, 0, 5), (64, 16, 0)]
)
def test_sizes_that_do_not_fit_are_refused(shard_rows, chunk_rows, num_columns):
    with pytest.raises(ShapeError, match="a multiple of chunk_rows"):
        make_spec(shard_rows=shard_rows, chunk_rows=chunk_rows, num_columns=num_columns)


def test_the_largest_chunk_takes_256_mebibytes():
    assert make_spec(shard_rows=2**14, chunk_rows=2**14, num_columns=2**14).chunk_bytes == 2**28
    with pytest.raises(ShapeError, match="above the 268435456 that one may take; choose fewer chunk_rows"):
        make_spec(shard_rows=2**14, chunk_rows=2**14, num_columns=2**14 + 1)


def test_an_unknown_type_is_refused():
    with pytest.raises(ShapeError, match="'int8' cannot be stored"):
        ShardSpec(64, 16, 5, "int8", 0)


@pytest.mark.parametrize("cut", [1, 50, 300])
def test_a_torn_shard_is_found_out(cut):
    spec = make_spec()
    data = encode_shard(make_rows(spec), spec)
    with pytest.raises(CorruptCacheError, match="CACHE/teachers/a/codes/c/0/0"):
        decode_shard(data[:-cut], spec, place=PLACE)


def test_an_empty_shard_is_found_out():
    with pytest.raises(CorruptCacheError, match="fewer than the 68 of its index alone"):
        decode_shard(b"", make_spec(), place=PLACE)


def test_bytes_lost_in_the_middle_are_found_out():
    spec = make_spec()
    data = encode_shard(make_rows(spec), spec)
    with pytest.raises(CorruptCacheError, match="bytes of chunks"):
        decode_shard(data[10:], spec, place=PLACE)


def test_bytes_added_in_front_are_found_out():
    spec = make_spec()
    data = encode_shard(make_rows(spec), spec)
    with pytest.raises(CorruptCacheError, match="bytes are lost or added"):
        decode_shard(b"\0" * 10 + data, spec, place=PLACE)


def test_a_chunk_of_another_size_is_refused_before_memory_is_taken():
    small, large = make_spec(), make_spec(num_columns=6)
    data = encode_shard(make_rows(large), large)
    index = parse_index(data[-large.index_bytes :], large, shard_bytes=len(data), place=PLACE)
    with pytest.raises(CorruptCacheError, match="holds 96 bytes where the array's shape says 80"):
        decode_chunk(data[: int(index[0, 1])], small, place=PLACE)


def test_a_tiny_chunk_is_refused():
    with pytest.raises(CorruptCacheError, match="fewer than any chunk can have"):
        decode_chunk(b"tiny", make_spec(), place=PLACE)


def test_the_message_says_what_to_do():
    with pytest.raises(CorruptCacheError, match=r"Nothing was changed\. Build again\."):
        decode_shard(b"", make_spec(), place=PLACE)
