from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny_caches import (
    NUM_CLASSES,
    TinyTeacher,
    build_tiny,
    files_of,
    tiny_inputs,
    tiny_labels,
    tiny_teachers,
    tiny_transfer_set,
)

from kdcache import Codes, TopK, TransferSet, open_cache
from kdcache.certificate import certificate_of
from kdcache.codecs import LADDER, measure
from kdcache.documents import CertificateDocument, Histogram
from kdcache.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    DocumentError,
    IncompleteCacheError,
    MergedCacheError,
    ShapeError,
    TemperatureError,
    UnknownExampleError,
    UnknownTeacherError,
)
from kdcache.soft_targets import log_mean_probabilities
from kdcache.store import LocalObjects
from kdcache.store import store as store_module
from kdcache.transfer_set import Views

IDS = [f"image-{(7 * index) % 40:02}" for index in range(40)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two teachers in companded codes, string ids in no order."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build_tiny(folder, tiny_transfer_set(example_ids=IDS), codec=Codes())
    return folder


@pytest.fixture
def cache(built):
    return open_cache(built)


@pytest.fixture
def folder(built, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(built, tmp_path / "cache")


@torch.no_grad()
def teacher_logits() -> torch.Tensor:
    return torch.stack([teacher(tiny_inputs()) for teacher in tiny_teachers().values()], 1)


def soft(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return torch.softmax(logits.double() / temperature, -1)


def unfinish(folder, *shards):
    (folder / "complete.json").unlink()
    for shard in shards:
        name, index = shard.split("/")
        (folder / f"commits/{shard}.json").unlink()
        (folder / f"teachers/{name}/codes/c/{index}/0").unlink()


# Opening --------------------------------------------------------------------------------------------------------------


def test_an_open_cache_tells_what_it_holds(cache):
    assert (len(cache), cache.num_examples, cache.num_views, cache.num_classes) == (40, 40, 1, NUM_CLASSES)


def test_an_open_cache_shows_itself(cache, built):
    assert repr(cache) == f"SoftTargetCache({str(built)!r}: 40 examples x 1 views, 2 teachers, 5 classes)"


@pytest.mark.parametrize(
    "address", [str, lambda folder: folder, lambda folder: f"file://{folder}"], ids=["str", "path", "url"]
)
def test_a_cache_opens_by_any_kind_of_address(built, address):
    assert open_cache(address(built)).teacher_names == ("a", "b")


class SpyingObjects(LocalObjects):
    """Local objects that note which keys are read."""

    def __init__(self, root, keys) -> None:
        super().__init__(root)
        self.keys = keys

    def read(self, key, *, max_bytes=None):
        self.keys.append(key)
        return super().read(key, max_bytes=max_bytes)

    def read_range(self, key, start, length):
        self.keys.append(key)
        return super().read_range(key, start, length)


@pytest.fixture
def read_keys(monkeypatch):
    keys = []
    monkeypatch.setattr(store_module, "open_objects", lambda root: SpyingObjects(root, keys))
    return keys


def test_opening_reads_documents_alone(built, read_keys):
    open_cache(built)
    assert sorted(set(read_keys)) == [
        "complete.json", "plans/0.json", "teachers/a/zarr.json", "teachers/b/zarr.json", "zarr.json",
    ]  # fmt: skip


def test_reading_by_id_reads_no_example_table(built, read_keys):
    open_cache(built).read([IDS[3]])
    assert "examples.parquet" not in read_keys


def test_reading_one_example_reads_one_shard_a_teacher(built, read_keys):
    open_cache(built).read([IDS[3]])
    assert {key for key in read_keys if "/codes/c/" in key} == {"teachers/a/codes/c/0/0", "teachers/b/codes/c/0/0"}


def test_where_no_cache_stands_the_address_is_named(tmp_path):
    with pytest.raises(CacheNotFoundError, match=rf"{tmp_path} holds no cache"):
        open_cache(tmp_path)


def test_an_unfinished_cache_does_not_open(folder):
    unfinish(folder)
    with pytest.raises(IncompleteCacheError) as caught:
        open_cache(folder)
    assert f"`kdcache status {folder}`" in str(caught.value)
    assert "open_cache(..., allow_incomplete=True)" in str(caught.value)


def test_a_cache_of_a_newer_format_says_which_field_is_new(folder):
    root = json.loads((folder / "zarr.json").read_text())
    root["attributes"]["kdcache"]["format_version"] = 2
    (folder / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DocumentError, match="format_version: Input should be 1"):
        open_cache(folder)


def test_a_teacher_that_complete_json_names_must_be_there(folder):
    shutil.rmtree(folder / "teachers/b")
    with pytest.raises(CorruptCacheError, match=r"teachers/b/zarr\.json"):
        open_cache(folder)


def test_opening_and_reading_change_nothing(folder):
    before = files_of(folder)
    open_cache(folder).read(IDS)
    assert files_of(folder) == before


# Reading --------------------------------------------------------------------------------------------------------------


def test_soft_targets_come_in_the_order_of_the_ids(cache):
    wanted = [31, 2, 17, 39, 0]
    read = cache.read([IDS[index] for index in wanted])
    assert torch.allclose(soft(read.logits()), soft(teacher_logits()[wanted]), atol=0.01)


def test_every_id_reads_its_own_row(cache):
    assert torch.allclose(soft(cache.read(IDS).logits()), soft(teacher_logits()), atol=0.01)


def test_an_id_may_be_asked_for_twice(cache):
    logits = cache.read([IDS[4], IDS[9], IDS[4]]).logits()
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("ids", [IDS[:3], tuple(IDS[:3]), np.array(IDS[:3]), np.array(IDS[:3], dtype=object)], ids=type)
def test_ids_may_come_in_any_sequence(cache, ids):
    assert torch.equal(cache.read(ids).logits(), cache.read(IDS[:3]).logits())


def test_no_ids_give_no_rows(cache):
    assert cache.read([]).logits().shape == (0, 2, NUM_CLASSES)


def test_an_unknown_id_is_named(cache):
    with pytest.raises(UnknownExampleError, match="1 of 2 example ids are not in this cache: 'image-99'"):
        cache.read([IDS[0], "image-99"])


def test_ids_of_the_other_type_are_refused_with_the_conversion(cache):
    with pytest.raises(UnknownExampleError, match=r"You gave int64 ids; convert them, such as \[str\(value\)"):
        cache.read([0, 1])


def test_teachers_can_be_chosen_in_any_order(cache):
    both, turned = cache.read(IDS).logits(), cache.read(IDS, teachers=["b", "a"]).logits()
    assert torch.equal(turned, both[:, [1, 0]])


def test_soft_targets_name_the_teachers_read(cache):
    assert cache.read(IDS[:1], teachers=["b"]).teacher_names == ("b",)


@pytest.mark.parametrize("teachers", [["c"], ["a", "c"], "c"])
def test_an_unknown_teacher_is_named_with_those_that_are_there(cache, teachers):
    with pytest.raises(UnknownTeacherError, match=r"has no teacher 'c'; it has 'a', 'b'"):
        cache.read(IDS[:1], teachers=teachers)


def test_no_teacher_at_all_is_refused(cache):
    with pytest.raises(UnknownTeacherError, match=r"was asked for no teacher at all; it has 'a', 'b'"):
        cache.read(IDS[:1], teachers=[])


def test_a_single_teacher_may_be_named_by_itself(cache):
    assert cache.read(IDS[:1], teachers="b").teacher_names == ("b",)


@pytest.mark.parametrize("view_index", [-1, 1])
def test_a_view_that_is_not_there_is_refused(cache, view_index):
    with pytest.raises(ShapeError, match=rf"has 1 view\(s\); there is no view {view_index}"):
        cache.read(IDS[:1], view_index=view_index)


def test_row_numbers_read_the_same_as_ids(cache):
    wanted = [IDS[index] for index in (5, 30, 11)]
    assert torch.equal(cache.read_rows(cache.rows_of(wanted)).logits(), cache.read(wanted).logits())


@pytest.fixture(params=["from files", "from memory"])
def tiered(request, built):
    cache = open_cache(built)
    _ = cache.hold_in_memory() if request.param == "from memory" else None
    return cache


@pytest.mark.parametrize("row", [-1, 40, 47, 48, 10**12])
def test_a_row_that_does_not_exist_is_refused(tiered, row):
    with pytest.raises(ShapeError, match=str(row)):
        tiered.read_rows(np.array([0, row]))


def test_examples_are_listed_in_row_order(cache):
    assert (cache.example_ids.tolist(), cache.labels.tolist()) == (IDS, tiny_labels())


def test_input_digests_are_listed_in_row_order(cache):
    assert np.array_equal(cache.input_digests, tiny_transfer_set().input_digests)


def test_what_the_transfer_set_has_not_is_none(tmp_path):
    cache = build_tiny(tmp_path / "cache", TransferSet.from_arrays(tiny_inputs(), digest_inputs=False))
    assert (cache.labels, cache.input_digests) == (None, None)


def test_first_rows_of_sequences_are_sums_of_the_rows_before(tmp_path):
    class Positions(torch.nn.Module):
        def forward(self, inputs):
            return inputs[:, None].expand(-1, 3, -1).clone()

    transfer_set = tiny_transfer_set(num_rows=[1, 3, 2, 2] * 10)
    cache = build_tiny(tmp_path / "cache", transfer_set, {"a": Positions()})
    assert cache.first_rows[:6].tolist() == [0, 1, 4, 6, 8, 9]


def test_an_open_cache_survives_pickling(cache):
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert torch.equal(again.read(IDS).logits(), cache.read(IDS).logits())


def test_a_cache_opens_with_plain_zarr(cache):
    assert cache.as_zarr()["teachers/a/codes"].shape == (48, NUM_CLASSES + 1)


# In memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Codes(), Codes(dtype="uint16")], ids=["uint8", "uint16"])
def test_rows_held_in_memory_read_the_same(tmp_path, codec):
    cache = build_tiny(tmp_path / "cache", codec=codec)
    before = cache.read([33, 4, 4, 18]).logits()
    cache.hold_in_memory()
    assert torch.equal(cache.read([33, 4, 4, 18]).logits(), before)


def test_rows_held_in_memory_need_no_file(folder):
    cache = open_cache(folder)
    expected = cache.read(IDS).logits()
    cache.hold_in_memory()
    shutil.rmtree(folder / "teachers/a/codes/c")
    shutil.rmtree(folder / "teachers/b/codes/c")
    assert torch.equal(cache.read(IDS).logits(), expected)


def test_the_bytes_that_would_be_held_are_known_before(cache):
    expected = cache.coded_bytes()
    assert (expected, cache.hold_in_memory()) == (48 * 2 * (NUM_CLASSES + 1), expected)


def test_some_teachers_alone_can_be_held(cache):
    assert cache.hold_in_memory(teachers=["b"]) == cache.coded_bytes(teachers=["b"]) == cache.coded_bytes() // 2


def test_a_damaged_cache_is_not_held(folder):
    path = folder / "teachers/b/codes/c/1/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"teachers/b/codes/c/1/0"):
        open_cache(folder).hold_in_memory()


# Certificates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", LADDER)
def test_a_certificate_states_the_error_that_the_rows_have(cache, temperature):
    decoded = cache.read(IDS).logits()
    divergences = torch.cat([measure(teacher_logits()[:, t], decoded[:, t], [temperature]) for t in range(2)])
    certificate = cache.certificate(temperature)
    assert certificate.mean_kl == pytest.approx(float(divergences.mean()), rel=1e-3)
    assert certificate.max_kl == pytest.approx(float(divergences.max()), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_no_row_is_further_from_its_teacher_than_the_bound(cache, temperature):
    decoded = cache.read(IDS).logits()
    divergences = torch.cat([measure(teacher_logits()[:, t], decoded[:, t], [temperature]) for t in range(2)])
    assert 0 < float(divergences.max()) <= cache.certificate(temperature).kl_bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_no_rows_total_variation_is_above_the_bound(cache, temperature):
    decoded = cache.read(IDS).logits()
    variation = (soft(decoded, temperature) - soft(teacher_logits(), temperature)).abs().sum(-1).max() / 2
    assert float(variation) <= cache.certificate(temperature).total_variation_bound


def test_between_the_measured_temperatures_there_is_a_bound_and_no_measurement(cache):
    certificate = cache.certificate(3.0)
    assert (certificate.mean_kl, certificate.max_kl) == (None, None)
    assert certificate.kl_bound > 0


def test_a_certificate_counts_the_rows_of_all_teachers(cache):
    assert cache.certificate(1.0).num_measured_rows == 80


def measured(divergences, *, mean):
    return CertificateDocument.make(
        temperatures=(1.0,),
        mean_kl=(mean,),
        max_kl=(max(divergences),),
        kl_histograms=(Histogram.of(divergences),),
        num_measured_rows=len(divergences),
    )


def test_the_mean_kl_is_over_rows_and_not_over_teachers(cache, monkeypatch):
    documents = {"a": measured([0.1] * 10, mean=0.1), "b": measured([0.5] * 30, mean=0.5)}
    monkeypatch.setattr(type(cache), "certificates", property(lambda _: documents))
    certificate = cache.certificate(1.0)
    assert (certificate.mean_kl, certificate.max_kl) == (pytest.approx(0.4), 0.5)


def test_of_the_rows_of_all_teachers_99_percent_are_not_above_p99(cache, monkeypatch):
    documents = {"a": measured([0.1] * 199, mean=0.1), "b": measured([7.0], mean=7.0)}
    monkeypatch.setattr(type(cache), "certificates", property(lambda _: documents))
    assert 0.1 <= cache.certificate(1.0).p99_kl <= 0.1 * 2**0.25


def test_what_depends_on_temperature_has_measurements_and_no_bounds(cache, monkeypatch):
    monkeypatch.setattr(type(cache), "certificates", property(lambda _: {"a": measured([0.1], mean=0.1)}))
    certificate = cache.certificate(1.0, teachers=["a"])
    assert (certificate.mean_kl, certificate.kl_bound, certificate.total_variation_bound) == (0.1, None, None)


def test_what_a_target_promises_is_never_below_what_was_measured():
    assert certificate_of([measured([0.021], mean=0.021)], 1.0, targets=[0.01]).kl_bound == 0.021
    assert certificate_of([measured([0.015], mean=0.015)], 1.0, targets=[0.01]).kl_bound == 0.02


@pytest.mark.parametrize("temperature", [1.0, 1.7, 2.0, 3.9, 4.0, 300.0])
def test_mean_p99_and_every_row_are_below_their_bounds(cache, temperature):
    decoded = cache.read(IDS).logits()
    divergences = torch.cat([measure(teacher_logits()[:, t], decoded[:, t], [temperature]) for t in range(2)])
    certificate = cache.certificate(temperature)
    assert float(divergences.mean()) <= certificate.bound_mean
    assert float(divergences.sort(0).values[78]) <= certificate.bound_p99 <= certificate.kl_bound
    assert float(divergences.max()) <= certificate.kl_bound


def test_the_bound_of_every_row_is_no_wider_than_hoeffdings(cache):
    certificate = cache.certificate(1.0)
    assert certificate.kl_bound < certificate.kl_bound_of_means


def test_below_temperature_1_only_the_largest_error_bounds(cache):
    certificate = cache.certificate(0.5)
    assert (certificate.bound_mean, certificate.bound_p99) == (None, None)
    assert certificate.kl_bound == certificate.kl_bound_of_means > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize(
    ("mean", "times", "bound"),
    [
        ("geometric", 1, "kl_bound_of_means"),
        ("arithmetic", 1, "kl_bound"),
        ("tempered-arithmetic", 4, "kl_bound_of_means"),
    ],
)
@pytest.mark.parametrize("weights", [None, [0.9, 0.1]])
def test_the_bound_holds_for_the_means_it_names(cache, temperature, mean, times, bound, weights):
    true = log_mean_probabilities(teacher_logits().double(), temperature=temperature, mean=mean, weights=weights)
    read = cache.read(IDS).log_probabilities(temperature, mean=mean, weights=weights)
    assert float(measure(true, read, [1.0]).max()) <= times * getattr(cache.certificate(temperature), bound)


def test_a_certificate_can_be_of_one_teacher(cache):
    assert cache.certificate(1.0, teachers=["a"]).max_kl == cache.certificates["a"].max_kl[0]


def test_a_lossless_cache_is_certified_exact(tmp_path):
    certificate = build_tiny(tmp_path / "cache").certificate(7.0)
    assert (certificate.kl_bound, certificate.total_variation_bound) == (0, 0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), True, "4", None])
def test_a_certificate_needs_a_temperature(cache, temperature):
    with pytest.raises(TemperatureError):
        cache.certificate(temperature)


def test_an_unknown_teacher_has_no_certificate(cache):
    with pytest.raises(UnknownTeacherError):
        cache.certificate(1.0, teachers=["z"])


# Unfinished caches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(folder):
    unfinish(folder, "a/1", "b/2")
    return open_cache(folder, allow_incomplete=True)


def test_an_unfinished_cache_tells_which_rows_are_there(unfinished):
    assert unfinished.read(IDS).available.tolist() == [True] * 16 + [False] * 24


def test_rows_of_teachers_read_alone_are_there_where_theirs_are(unfinished):
    assert unfinished.read(IDS, teachers=["b"]).available.tolist() == [True] * 32 + [False] * 8


def test_rows_that_are_there_read_as_in_the_finished_cache(unfinished, cache):
    assert torch.equal(unfinished.read(IDS[:16]).logits(), cache.read(IDS[:16]).logits())


def test_rows_that_are_not_there_are_not_numbers(unfinished):
    assert bool(unfinished.read(IDS).logits()[16:].isnan().all())


def test_an_unfinished_cache_where_nothing_is_there_reads_as_nothing(folder):
    unfinish(folder, "a/0", "a/1", "a/2", "b/0", "b/1", "b/2")
    assert not open_cache(folder, allow_incomplete=True).read(IDS).available.any()


@pytest.mark.parametrize("ask", ["hold_in_memory", "as_zarr", "certificate"])
def test_an_unfinished_cache_refuses_what_needs_all_rows(unfinished, ask):
    arguments = [1.0] if ask == "certificate" else []
    with pytest.raises(IncompleteCacheError, match="is not complete, so it cannot be"):
        getattr(unfinished, ask)(*arguments)


def test_a_finished_cache_opened_as_unfinished_has_no_mask(built):
    assert open_cache(built, allow_incomplete=True).read(IDS).available is None


def test_a_plan_alone_opens_as_unfinished_without_teachers(folder):
    unfinish(folder)
    shutil.rmtree(folder / "teachers")
    assert open_cache(folder, allow_incomplete=True).teacher_names == ()


# Damage ---------------------------------------------------------------------------------------------------------------


def damage_missing(path):
    path.unlink()


def damage_torn(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_altered(path):
    data = bytearray(path.read_bytes())
    data[10] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_missing, damage_torn, damage_altered])
@pytest.mark.parametrize("name", ["teachers/a/codes/c/0/0", "index/entries/c/0/0", "index/fences/c/0/0"])
def test_a_damaged_file_is_an_error_that_names_it_and_its_remedy(folder, damage, name):
    damage(folder / name)
    with pytest.raises(CorruptCacheError, match=rf"{name}: .*Nothing was changed\..*kdcache repair {folder}`"):
        open_cache(folder).read(IDS)


def test_a_damaged_codebook_is_an_error_that_names_it(folder):
    path = next(folder.glob("teachers/a/parameters-*/codebook/c/0"))
    damage_altered(path)
    with pytest.raises(CorruptCacheError, match=r"codebook/c/0: .*Nothing was changed"):
        open_cache(folder).read(IDS)


def test_damage_elsewhere_does_not_stop_a_read(folder):
    (folder / "teachers/a/codes/c/2/0").unlink()
    assert len(open_cache(folder).read(IDS[:16])) == 16


# Merged caches and views ----------------------------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path):
    return build_tiny(tmp_path / "merged", merge="geometric", codec=Codes())


def test_a_merged_cache_names_its_members_to_those_who_ask_too_much(merged):
    with pytest.raises(
        MergedCacheError, match="keeps only the geometric mean of a, b; it cannot give mean='arithmetic'"
    ):
        merged.read([0]).probabilities(1.0, mean="arithmetic")


def test_a_merged_cache_gives_its_one_mean(merged):
    expected = soft(teacher_logits().mean(1), 2.0)
    assert torch.allclose(merged.read(range(40)).probabilities(2.0).double(), expected, atol=0.01)


def test_a_merged_cache_held_in_memory_gives_its_one_mean(merged):
    before = merged.read([3, 9]).logits()
    merged.hold_in_memory()
    assert torch.equal(merged.read([3, 9]).logits(), before)


def test_views_read_from_memory_as_from_files(tmp_path):
    views = Views(transform=lambda value, generator: value + float(generator.normal()), num_views=2, name="shift")
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(views=views), {"a": TinyTeacher()})
    before = cache.read([7, 30], view_index=1).logits()
    cache.hold_in_memory()
    assert torch.equal(cache.read([7, 30], view_index=1).logits(), before)


def test_a_cache_of_topk_is_certified_by_what_was_measured_alone(tmp_path):
    cache = build_tiny(tmp_path / "cache", codec=TopK(k=2))
    certificate = cache.certificate(4.0)
    assert (certificate.kl_bound, certificate.total_variation_bound) == (None, None)
    assert 0 < certificate.mean_kl < certificate.max_kl


def test_a_measured_kl_of_topk_is_that_of_its_soft_targets_there(tmp_path):
    cache = build_tiny(tmp_path / "cache", codec=TopK(k=2))
    read = cache.read(range(40)).log_probabilities(4.0, teachers=["a"])
    measured = measure(teacher_logits()[:, 0].double() / 4, read, [1.0])
    assert cache.certificate(4.0, teachers=["a"]).max_kl == pytest.approx(float(measured.max()), rel=1e-3)


@pytest.mark.parametrize("rows", [[0, 3], (0, 3), np.array([0, 3], np.int32)], ids=["list", "tuple", "int32"])
def test_rows_may_be_any_numbers(cache, rows):
    assert torch.equal(cache.read_rows(rows).logits(), cache.read_rows(np.array([0, 3])).logits())


@pytest.mark.parametrize("rows", [[1.5], ["a"], [[0]], 3, [-1]])
def test_rows_that_are_no_row_numbers_are_refused(cache, rows):
    with pytest.raises(ShapeError, match=r"row"):
        cache.read_rows(rows)
