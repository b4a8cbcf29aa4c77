from __future__ import annotations

import numpy as np
import pytest
from tiny_caches import TinyTeacher, tiny_inputs, tiny_labels, tiny_transfer_set

from kdcache import Codes, Lossless, TransferSet
from kdcache.build import weights_digest
from kdcache.build.plan import (
    CHUNK_BYTES,
    SHARD_BYTES,
    SHARD_LOGITS_BYTES,
    Layout,
    choose_layout,
    extend_plan,
    make_plan,
    refuse_other_plan,
)
from kdcache.codecs import codec_for
from kdcache.documents import Fingerprint
from kdcache.errors import DocumentError, PlanMismatchError, ShapeError
from kdcache.transfer_set import Views

MANY_ROWS = 100_000_000


def fingerprint(name: str, seed: int = 0) -> Fingerprint:
    return Fingerprint.make(name=name, source="m:n", weights_sha256=weights_digest(TinyTeacher(seed)))


def plan(transfer_set: TransferSet | None = None, names: str = "ab", **options):
    options = {"codec": Codes(), "num_classes": 5, **options}
    return make_plan(transfer_set or tiny_transfer_set(), [fingerprint(name) for name in names], **options)


# Layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "num_rows", "layout"),
    [
        (10, MANY_ROWS, Layout(1_048_576, 4096)),
        (1_000, MANY_ROWS, Layout(16_384, 256)),
        (49_152, 10**6, Layout(256, 4)),
        (262_144, 10**6, Layout(32, 1)),
    ],
)
def test_rows_of_shards_and_chunks_follow_from_the_classes(num_classes, num_rows, layout):
    assert choose_layout(Codes(), num_classes=num_classes, num_rows=num_rows) == layout


def test_a_chunk_above_256_mebibytes_is_refused_before_anything_is_written():
    with pytest.raises(ShapeError, match=r"a chunk may take 268435456; nothing was written. Choose fewer chunk_rows"):
        choose_layout(Codes(), num_classes=2**14, num_rows=MANY_ROWS, chunk_rows=2**15, shard_rows=2**15)


CODECS = [Codes(), Codes(dtype="uint16"), Lossless(), Lossless(dtype="bfloat16")]
CLASS_COUNTS = [1, 2, 10, 1_000, 49_152, 262_144]


@pytest.fixture(params=CLASS_COUNTS, ids="{} classes".format)
def num_classes(request):
    return request.param


@pytest.fixture(params=CODECS, ids=lambda codec: f"{codec.kind}-{codec.dtype}")
def codec(request):
    return request.param


@pytest.fixture
def chosen(codec, num_classes):
    return choose_layout(codec, num_classes=num_classes, num_rows=MANY_ROWS)


def row_bytes(codec, num_classes):
    made = codec_for(codec, num_classes)
    return made.num_columns * np.dtype(made.storage_dtype).itemsize


def test_a_shards_float_logits_fit_in_half_a_gibibyte(chosen, num_classes):
    assert chosen.shard_rows * num_classes * 4 <= SHARD_LOGITS_BYTES


def test_a_shard_takes_no_more_than_its_bytes(codec, num_classes):
    chosen = choose_layout(codec, num_classes=num_classes, num_rows=10**6)
    assert chosen.shard_rows * row_bytes(codec, num_classes) <= SHARD_BYTES


def test_a_chunk_takes_no_more_than_its_bytes_or_is_one_row(chosen, codec, num_classes):
    assert chosen.chunk_rows * row_bytes(codec, num_classes) <= max(CHUNK_BYTES, row_bytes(codec, num_classes))


def test_a_shard_is_whole_chunks(chosen):
    assert chosen.shard_rows % chosen.chunk_rows == 0


@pytest.mark.parametrize("num_rows", [1, 7, 8, 100, 60_000])
def test_a_small_cache_is_still_cut_so_that_a_stop_loses_little(num_rows):
    shard_rows = choose_layout(Codes(), num_classes=10, num_rows=num_rows).shard_rows
    assert min(num_rows, 4) <= -(-num_rows // shard_rows) <= 8


def test_given_rows_of_a_shard_are_kept_and_chunks_divide_them():
    assert choose_layout(Codes(), num_classes=10, num_rows=MANY_ROWS, shard_rows=12_000) == Layout(12_000, 4_000)


def test_given_rows_of_a_chunk_are_kept_and_shards_are_whole_chunks():
    layout = choose_layout(Codes(), num_classes=10, num_rows=MANY_ROWS, chunk_rows=100)
    assert (layout.chunk_rows, layout.shard_rows % 100) == (100, 0)


def test_rows_of_a_shard_that_are_no_whole_chunks_are_refused():
    with pytest.raises(DocumentError, match=r"shard_rows \(100\) is no multiple of chunk_rows \(64\)"):
        plan(shard_rows=100, chunk_rows=64)


# Plans ----------------------------------------------------------------------------------------------------------------


def test_a_plan_tells_what_the_transfer_set_is():
    cache = plan(tiny_transfer_set(example_ids=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"))).cache
    assert (cache.num_examples, cache.example_id_type, cache.has_labels, cache.has_input_digests) == (
        40,
        "string",
        True,
        True,
    )


def test_a_plan_tells_what_the_transfer_set_has_not():
    cache = plan(TransferSet.from_arrays(tiny_inputs(), digest_inputs=False)).cache
    assert (cache.has_labels, cache.has_input_digests) == (False, False)


def test_a_plan_counts_the_rows_of_sequences():
    assert plan(tiny_transfer_set(num_rows=[3] * 40)).cache.num_rows == 120


def test_a_plan_names_the_views():
    views = Views(transform=lambda value, _: value, num_views=3, name="same-1", seed=7)
    cache = plan(tiny_transfer_set(views=views)).cache
    assert (cache.num_views, cache.view.name, cache.view.seed) == (3, "same-1", 7)


def test_a_plan_without_options_has_stated_defaults():
    made = plan(tiny_transfer_set(5000))
    assert (made.batch_size, made.num_pilot_rows) == (256, 2048)


def test_the_pilot_has_no_more_rows_than_there_are():
    assert plan(num_pilot_rows=1000).num_pilot_rows == 40


def test_equal_arguments_make_equal_plans():
    assert plan().to_json() == plan().to_json()


def test_weights_belong_to_merged_caches_alone():
    with pytest.raises(DocumentError, match="weights are stored only in a merged cache; give them when reading"):
        plan(weights=(0.5, 0.5))


# Mismatches -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_not_refused_beside_itself():
    refuse_other_plan(plan(), plan())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"codec": Lossless()}, 'codec.kind: now "lossless", in the cache "codes"'),
        ({"batch_size": 7}, "batch_size: now 7, in the cache 256"),
        ({"shard_rows": 16}, "cache.shard_rows: now 16, in the cache 8"),
        ({"num_classes": 6}, "cache.num_classes: now 6, in the cache 5"),
        ({"num_pilot_rows": 9}, "num_pilot_rows: now 9, in the cache 40"),
        ({"merge": "geometric"}, 'cache.merge: now "geometric", in the cache null'),
        ({"names": "a"}, 'ensemble: now "a", in the cache "a, b"'),
        ({"names": "ba"}, 'ensemble: now "b, a", in the cache "a, b"'),
    ],
    ids=["codec", "batch size", "shard rows", "classes", "pilot", "merge", "fewer teachers", "another order"],
)
def test_a_mismatch_prints_both_sides(other, said):
    with pytest.raises(PlanMismatchError) as caught:
        refuse_other_plan(plan(), plan(**other))
    assert f"  {said}\n" in str(caught.value)


def test_a_mismatch_prints_every_difference_and_that_nothing_was_changed():
    with pytest.raises(PlanMismatchError) as caught:
        refuse_other_plan(plan(), plan(batch_size=7, num_pilot_rows=9))
    assert str(caught.value) == (
        "the cache was planned otherwise; 2 difference(s):\n"
        "  batch_size: now 7, in the cache 256\n"
        "  num_pilot_rows: now 9, in the cache 40\n"
        "Leave these options out or give them as before to go on with this cache, read it as it is with "
        "open_cache, or build at a new address. Nothing was changed."
    )


def test_another_transfer_set_is_said_to_be_another_one():
    relabelled = tiny_transfer_set(labels=[(label + 1) % 5 for label in tiny_labels()])
    with pytest.raises(
        PlanMismatchError, match="The transfer set is another one: other ids, labels, row counts or inputs"
    ):
        refuse_other_plan(plan(), plan(relabelled))


def test_a_changed_checkpoint_is_held_against_the_teacher_of_its_name():
    changed = make_plan(
        tiny_transfer_set(), [fingerprint("a"), fingerprint("new"), fingerprint("b", 1)], codec=Codes(), num_classes=5
    )
    with pytest.raises(
        PlanMismatchError, match=r"teachers\.b\.weights_sha256: now \"\w{64}\", in the cache \"\w{64}\""
    ):
        refuse_other_plan(plan(), changed)


def test_a_changed_checkpoint_is_said_to_be_one():
    changed = make_plan(tiny_transfer_set(), [fingerprint("a"), fingerprint("b", 1)], codec=Codes(), num_classes=5)
    with pytest.raises(PlanMismatchError, match="A teacher's weights changed under the same name"):
        refuse_other_plan(plan(), changed)


def test_new_teachers_are_said_to_need_an_option():
    with pytest.raises(PlanMismatchError, match=r"To add new ones say so \(add_teachers=True, --add-teachers\)"):
        refuse_other_plan(plan(), plan(names="abc"))


def test_long_values_are_cut_in_messages():
    with pytest.raises(PlanMismatchError) as caught:
        refuse_other_plan(plan(names="a"), plan(names=[f"{index}" * 90 for index in range(9)]))
    assert max(len(line) for line in str(caught.value).splitlines()) < 800


# Adding teachers ------------------------------------------------------------------------------------------------------


def test_new_teachers_are_appended_to_the_standing_plan():
    extended = extend_plan(plan(names="ab"), plan(names="acb"))
    assert [teacher.name for teacher in extended.teachers] == ["a", "b", "c"]


def test_an_extended_plan_names_the_one_before_it():
    standing = plan(names="ab")
    assert extend_plan(standing, plan(names="c")).previous == standing.digest()


def test_no_new_teachers_leave_the_plan_as_it_is():
    standing = plan(names="ab")
    assert extend_plan(standing, plan(names="b")) is standing


def test_a_standing_teacher_that_changed_cannot_be_added_again():
    changed = make_plan(tiny_transfer_set(), [fingerprint("b", 1)], codec=Codes(), num_classes=5)
    with pytest.raises(PlanMismatchError, match=r"teachers\.b\.weights_sha256"):
        extend_plan(plan(names="ab"), changed)


def test_teachers_are_not_added_with_other_options():
    with pytest.raises(PlanMismatchError, match="batch_size: now 7, in the cache 256"):
        extend_plan(plan(names="ab"), plan(names="abc", batch_size=7))


def test_a_merged_cache_takes_no_further_teacher():
    with pytest.raises(PlanMismatchError, match="keeps only the mean of its members, so a teacher cannot be added"):
        extend_plan(plan(merge="geometric"), plan(merge="geometric", names="abc"))


@pytest.mark.parametrize(
    ("num_rows", "shard_rows"),
    [(10**8, 2**14), (10**9, 2**14), (2 * 10**9, 2**15), (10**10, 2**17), (10**12, 2**17)],
    ids="{:g} rows".format,
)
def test_huge_caches_have_larger_shards_so_that_they_have_not_too_many(num_rows, shard_rows):
    assert choose_layout(Codes(), num_classes=1000, num_rows=num_rows).shard_rows == shard_rows


def test_shards_of_huge_caches_keep_a_tasks_logits_small():
    layout = choose_layout(Codes(), num_classes=100_000, num_rows=10**12)
    assert 4 * 100_000 * layout.shard_rows <= 2**29
