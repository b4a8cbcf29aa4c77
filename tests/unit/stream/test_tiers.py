"""Tiers: the same rows from each, in the memory that is stated, chosen by what fits."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from tiny_caches import build_tiny, tiny_inputs, tiny_labels, tiny_teachers, tiny_transfer_set
from torch import nn

from kdcache import Codes, SoftTargetLoader, TransferSet, open_cache
from kdcache.errors import CorruptCacheError, IncompleteCacheError, OptionError
from kdcache.store import CodesReader
from kdcache.stream.epochs import Windows
from kdcache.stream.tiers import TIERS
from kdcache.transfer_set import Views

ROW_BYTES = 4 * 4
SHARD_BYTES = 16 * ROW_BYTES


class Echo(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiers") / "cache"
    build_tiny(path, tiny_transfer_set(), {"echo": Echo()})
    return path


def loader_of(folder, inputs=None, **options):
    inputs = tiny_transfer_set() if inputs is None else inputs
    return SoftTargetLoader(open_cache(folder), inputs, **{"batch_size": 7, **options})


@pytest.fixture(params=["as they are", "one chunk", "two chunks"])
def sizes(request, monkeypatch):
    """What is read, laid down and decoded at a time, smaller than it is for so few rows."""
    if request.param == "as they are":
        return
    num_chunks = ["one chunk", "two chunks"].index(request.param) + 1
    monkeypatch.setattr("kdcache.store.runs._RUN_BYTES", num_chunks * 8 * ROW_BYTES)
    monkeypatch.setattr("kdcache.store.local_objects._RUN_BYTES", num_chunks * 100)
    monkeypatch.setattr("kdcache.stream.windows._PIECE_BYTES", num_chunks * 8 * ROW_BYTES)


def options_of(tier, tmp_path):
    more = {"mapped": {"local_copy": tmp_path / "copy"}, "device": {"device": "cpu"}}
    return {"tier": tier, "shuffle": "windowed", "window_bytes": 2 * ROW_BYTES * 8, **more.get(tier, {})}


# The same rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["memory", "mapped", "windows", "device"])
@pytest.mark.parametrize("codec", [Codes(), Codes(dtype="uint16")], ids=["uint8", "uint16"])
@pytest.mark.usefixtures("sizes")
def test_every_tier_gives_the_batches_of_scattered_reads(tmp_path, tier, codec):
    build_tiny(tmp_path / "cache", teachers=tiny_teachers(2), codec=codec)
    loader = loader_of(tmp_path / "cache", **options_of(tier, tmp_path))
    scattered = loader_of(tmp_path / "cache", **options_of("scattered", tmp_path))
    for ours, theirs in zip(itertools.chain(loader, loader), itertools.chain(scattered, scattered), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[2].logits(), theirs[2].logits())


@pytest.mark.parametrize("num_rows", [2, 5, 11])
@pytest.mark.parametrize("tier", ["memory", "mapped", "windows", "device"])
@pytest.mark.usefixtures("sizes")
def test_examples_with_many_rows_are_given_whole(tmp_path, tier, num_rows):
    inputs = torch.randn(13, num_rows, 4)
    transfer_set = TransferSet.from_arrays(inputs, num_rows=num_rows)
    build_tiny(tmp_path / "cache", transfer_set, {"echo": Echo()})
    for batch, _, soft_targets in loader_of(tmp_path / "cache", transfer_set, **options_of(tier, tmp_path)):
        assert torch.allclose(soft_targets.logits()[:, 0], batch.flatten(0, 1))
        assert soft_targets.num_rows.tolist() == [num_rows] * len(batch)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.usefixtures("sizes")
def test_examples_that_are_chosen_several_times_are_given_as_often(folder, tmp_path, tier, times):
    chosen = [*range(0, 40, 2)] * times + [1]
    loader = loader_of(folder, example_ids=chosen, **options_of(tier, tmp_path))
    given = [(inputs, soft_targets.logits()[:, 0]) for inputs, _, soft_targets in loader]
    assert all(torch.equal(inputs, logits) for inputs, logits in given)
    expected = tiny_inputs()[sorted(chosen), 0].sort().values
    assert torch.equal(torch.cat([inputs for inputs, _ in given])[:, 0].sort().values, expected)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_ranks_are_given_their_rows_from_windows_smaller_than_a_batch(tmp_path, num_rows, world_size, drop_last):
    inputs = torch.randn(33, num_rows, 4)
    transfer_set = TransferSet.from_arrays(inputs, num_rows=num_rows)
    build_tiny(tmp_path / "cache", transfer_set, {"echo": Echo()})
    given = []
    for rank in range(world_size):
        loader = loader_of(
            tmp_path / "cache", transfer_set, tier="windows", window_bytes=1, batch_size=14, rank=rank,
            world_size=world_size, drop_last=drop_last,
        )  # fmt: skip
        for batch, _, soft_targets in loader:
            assert torch.equal(soft_targets.logits()[:, 0], batch.flatten(0, 1))
            given.extend(batch[:, 0, 0].tolist())
    assert len(set(given)) == len(given) == (28 if drop_last else 33)


def padded(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True)


@pytest.mark.parametrize("tier", ["memory", "windows"])
def test_examples_of_unequal_length_are_given_whole(tmp_path, tier):
    lengths = [1 + (7 * index) % 12 for index in range(25)]
    texts = [torch.randn(length, 4) for length in lengths]
    transfer_set = TransferSet(texts, num_rows=lengths, collate=padded)
    build_tiny(tmp_path / "cache", transfer_set, {"echo": Echo()})
    for batch, _, soft_targets in loader_of(tmp_path / "cache", transfer_set, **options_of(tier, tmp_path)):
        rows = torch.cat([text[:length] for text, length in zip(batch, soft_targets.num_rows, strict=True)])
        assert torch.allclose(soft_targets.logits()[:, 0], rows)


# The choice -----------------------------------------------------------------------------------------------------------


def test_what_fits_is_held_in_memory(folder):
    assert loader_of(folder).tier == "memory"


def test_what_does_not_fit_is_read_in_windows(folder):
    assert loader_of(folder, max_resident_bytes=10).tier == "windows"


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_does_not_fit_and_needs_another_order_is_read_scattered(folder, shuffle):
    assert loader_of(folder, max_resident_bytes=10, shuffle=shuffle).tier == "scattered"


def test_what_does_not_fit_and_may_be_copied_is_mapped(folder, tmp_path):
    assert loader_of(folder, max_resident_bytes=10, local_copy=tmp_path).tier == "mapped"


@pytest.mark.parametrize("tier", ["memory", "mapped", "windows", "device"])
def test_an_unfinished_cache_is_read_scattered_alone(tmp_path, tier):
    build_tiny(tmp_path / "cache")
    (tmp_path / "cache/complete.json").unlink()
    cache = open_cache(tmp_path / "cache", allow_incomplete=True)
    assert SoftTargetLoader(cache, tiny_transfer_set(), batch_size=7).tier == "scattered"
    with pytest.raises(IncompleteCacheError, match="is not complete, so it cannot be"):
        list(SoftTargetLoader(cache, tiny_transfer_set(), batch_size=7, **options_of(tier, tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "disk"}, "tier is 'disk'; give one of device, memory, mapped, windows, scattered"),
        ({"tier": "mapped"}, "needs local_copy="),
        ({"tier": "device"}, "give device= with it"),
        ({"tier": "memory", "local_copy": "copy"}, "local_copy is for tier='mapped', and tier is 'memory'"),
        ({"tier": "windows", "shuffle": True}, "give shuffle='windowed' with it"),
        ({"window_bytes": 100}, "it needs shuffle='windowed'"),
        ({"window_bytes": 0, "shuffle": "windowed"}, "window_bytes is 0; at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(OptionError, match=message):
        loader_of(folder, **options)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Rows that are decoded at a time."""
    noted = []
    scatter = CodesReader.scatter

    def note(self, rows, out, places):
        noted.append(rows.tolist())
        scatter(self, rows, out, places)

    monkeypatch.setattr(CodesReader, "scatter", note)
    return noted


def chunks_of(reads):
    return [{row // 8 for row in rows} for rows in reads]


def test_every_chunk_is_decoded_once_an_epoch(folder, reads):
    list(loader_of(folder, tier="windows", window_bytes=2 * ROW_BYTES * 8))
    assert sorted(itertools.chain(*chunks_of(reads))) == [0, 1, 2, 3, 4]


def test_no_more_than_two_windows_are_ahead_of_what_is_given(folder, reads):
    batches = iter(loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=1, prefetch_batches=1))
    next(batches)
    batches.close()
    assert len(reads) <= 3  # the batches behind the first may be of the window behind its own


def test_ranks_hold_their_own_rows_alone(folder, reads):
    options = {"tier": "windows", "window_bytes": 2 * ROW_BYTES * 8, "world_size": 2, "batch_size": 8}
    list(loader_of(folder, rank=0, **options))
    first = sorted(itertools.chain(*reads))
    reads.clear()
    list(loader_of(folder, rank=1, **options))
    assert sorted([*first, *itertools.chain(*reads)]) == list(range(40))


def test_batches_that_are_kept_keep_their_rows(folder):
    loader = loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=3)
    for inputs, _, soft_targets in [*loader, *loader, *loader]:
        assert torch.equal(soft_targets.logits()[:, 0], inputs)


def test_what_was_made_of_a_batch_keeps_its_rows(folder):
    loader = loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=3)
    kept = [(inputs[1:], soft_targets.codes[0][1:].numpy()[:, :4]) for inputs, _, soft_targets in loader]
    list(loader)
    assert all(np.array_equal(codes, inputs) for inputs, codes in kept)


def test_damage_in_a_window_takes_away_no_batch_of_those_before(tmp_path):
    examples = tiny_transfer_set(400)
    build_tiny(tmp_path / "cache", examples, {"echo": Echo()})
    loader = loader_of(tmp_path / "cache", examples, batch_size=8, tier="windows", window_bytes=8 * 8 * ROW_BYTES)
    order, windows = loader._epochs.order(0), loader._epochs.windows
    shards = order.blocks * windows.block_rows // 16
    first_windows = {int(shard): place // windows.window_blocks for place, shard in reversed([*enumerate(shards)])}
    damaged = next(shard for shard, window in first_windows.items() if window == 2)
    (tmp_path / f"cache/teachers/echo/codes/c/{damaged}/0").write_bytes(b"")
    given = []
    with pytest.raises(CorruptCacheError, match=f"codes/c/{damaged}/0"):
        given.extend(soft_targets for _, _, soft_targets in loader)
    assert len(given) == order.positions_of(2)[0] // 8


def test_memory_is_used_again(folder):
    loader = loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=3)
    for _ in range(20):
        for _ in loader:
            pass
    assert (
        len(loader._source._idle[0].sets) <= 8
    )  # so many batches are made ahead at most; there are 20 epochs of windows


def test_two_loops_at_once_have_memory_of_their_own(folder):
    loader = loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=3)
    for one, other in zip(iter(loader), iter(loader), strict=True):
        assert torch.equal(one[2].logits()[:, 0], one[0])
        assert torch.equal(other[2].logits()[:, 0], other[0])


def test_far_windows_that_are_left_while_they_are_decoded_disturb_no_others(folder, monkeypatch):
    scatter = CodesReader.scatter

    def slowly(self, rows, out, places):
        time.sleep(0.02)
        scatter(self, rows, out, places)

    monkeypatch.setattr(CodesReader, "scatter", slowly)
    monkeypatch.setattr(CodesReader, "is_far", property(lambda _: True))
    monkeypatch.setattr("kdcache.threads.SECONDS_TO_LEAVE", 0.001)
    loader = loader_of(folder, tier="windows", window_bytes=2 * ROW_BYTES * 8, batch_size=3)
    for num_given in (1, 2, 3, 5):
        for place, (inputs, _, soft_targets) in enumerate(loader, start=1):
            assert torch.equal(soft_targets.logits()[:, 0], inputs)
            if place == num_given:
                break
    for inputs, _, soft_targets in loader:
        assert torch.equal(soft_targets.logits()[:, 0], inputs)


def test_windows_say_what_they_hold(folder):
    assert loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8).held_bytes == 3 * ROW_BYTES * 8


@pytest.mark.parametrize("tier", ["windows", "scattered"])
def test_no_tier_says_to_hold_more_than_there_is(folder, tier):
    assert loader_of(folder, tier=tier).held_bytes == 3 * SHARD_BYTES


def test_memory_says_what_it_holds(folder):
    assert loader_of(folder, tier="memory").held_bytes == 3 * SHARD_BYTES


def test_a_mapped_copy_holds_nothing(folder, tmp_path):
    assert loader_of(folder, tier="mapped", local_copy=tmp_path).held_bytes == 0


def test_a_window_is_cut_into_blocks_where_chunks_allow(folder):
    windows = Windows.of(open_cache(folder), teachers=None, window_bytes=4 * 8 * ROW_BYTES, most_rows_an_example=1)
    assert windows == Windows(block_rows=8, window_blocks=4, row_bytes=ROW_BYTES)


@pytest.mark.parametrize("most_rows", [2, 3, 100])
def test_blocks_hold_several_examples_with_many_rows(folder, most_rows):
    windows = Windows.of(open_cache(folder), teachers=None, window_bytes=1, most_rows_an_example=most_rows)
    assert windows.block_rows == 16


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["memory", "windows", "scattered"])
def test_a_damaged_shard_is_an_error_in_the_training_loop(tmp_path, tier):
    build_tiny(tmp_path / "cache")
    (tmp_path / "cache/teachers/a/codes/c/1/0").write_bytes(b"")
    with pytest.raises(CorruptCacheError, match="codes/c/1/0: the shard has 0 bytes"):
        list(loader_of(tmp_path / "cache", **options_of(tier, tmp_path)))


@pytest.mark.parametrize("tier", ["mapped", "device"])
def test_a_damaged_shard_is_an_error_before_training(tmp_path, tier):
    build_tiny(tmp_path / "cache")
    (tmp_path / "cache/teachers/a/codes/c/1/0").write_bytes(b"")
    with pytest.raises(CorruptCacheError, match="codes/c/1/0: the shard has 0 bytes"):
        loader_of(tmp_path / "cache", **options_of(tier, tmp_path))


def test_windows_left_early_are_not_read_on(folder, reads):
    for _ in loader_of(folder, tier="windows", window_bytes=ROW_BYTES * 8, batch_size=1):
        break
    num_reads = len(reads)
    time.sleep(0.1)
    assert len(reads) == num_reads < 5


# Without inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, [f"image-{index}" for index in range(40)]], ids=["integers", "strings"])
def test_without_inputs_batches_name_their_examples(tmp_path, ids):
    transfer_set = tiny_transfer_set(example_ids=ids)
    cache = build_tiny(tmp_path / "cache", transfer_set, {"echo": Echo()})
    places = {key: place for place, key in enumerate(transfer_set.example_ids.tolist())}
    for example_ids, labels, soft_targets in SoftTargetLoader(cache, batch_size=7):
        indices = [places[key] for key in (example_ids if ids else example_ids.tolist())]
        assert labels.tolist() == [tiny_labels()[index] for index in indices]
        assert torch.allclose(soft_targets.logits()[:, 0], tiny_inputs()[indices])


def test_without_inputs_every_view_is_given(tmp_path):
    views = Views(transform=lambda value, _: value, name="same", num_views=2, seed=1)
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(views=views), {"echo": Echo()})
    example_ids = torch.cat([ids for ids, _, _ in SoftTargetLoader(cache, batch_size=7, view_index=1)])
    assert np.array_equal(np.sort(example_ids), np.arange(40))


# A local cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["memory", "windows", "scattered"])
def test_a_cache_far_away_is_read_once(tmp_path, tier):
    far, near = tmp_path / "cache", tmp_path / "near"
    build_tiny(far, tiny_transfer_set(), {"echo": Echo()})
    list(SoftTargetLoader(open_cache(far, local_cache=near), tiny_transfer_set(), batch_size=7))
    cache = open_cache(far, local_cache=near)
    for shard in far.glob("teachers/echo/codes/c/*/0"):
        shard.write_bytes(bytes(shard.stat().st_size))
    for inputs, _, soft_targets in SoftTargetLoader(
        cache, tiny_transfer_set(), **options_of(tier, tmp_path), batch_size=7
    ):
        assert torch.allclose(soft_targets.logits()[:, 0], inputs)


def test_an_unfinished_cache_is_not_kept_locally(tmp_path):
    build_tiny(tmp_path / "cache")
    (tmp_path / "cache/complete.json").unlink()
    with pytest.raises(IncompleteCacheError, match="cannot be kept locally"):
        open_cache(tmp_path / "cache", allow_incomplete=True, local_cache=tmp_path / "near")


def test_a_far_cache_that_was_mended_is_read_afresh(tmp_path):
    far, near = tmp_path / "cache", tmp_path / "near"
    build_tiny(far, tiny_transfer_set(), {"echo": Echo()})
    shard = far / "teachers/echo/codes/c/1/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40] + bytes(8) + whole[48:])
    with pytest.raises(CorruptCacheError, match="checksum"):
        list(SoftTargetLoader(open_cache(far, local_cache=near), tiny_transfer_set(), batch_size=7))
    shard.write_bytes(whole)
    mended = open_cache(far, local_cache=near)
    for inputs, _, soft_targets in SoftTargetLoader(mended, tiny_transfer_set(), batch_size=7):
        assert torch.equal(soft_targets.logits()[:, 0], inputs)
