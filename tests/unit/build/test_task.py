from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_caches import TinyTeacher, build_tiny, files_of, tiny_transfer_set

from kdcache import Codes, Lossless, Spectral, TopK, open_cache, verify_cache
from kdcache.build import task
from kdcache.build.task import Destination, certify, certify_codes, publish_shard, remaining_shards
from kdcache.codecs import LADDER, CodesCodec, Decoder, codec_for, error_range, measure, measure_codes, parameters_to
from kdcache.errors import CodecError, CorruptCacheError
from kdcache.store import CacheStore

CODES = Codes(spacing="uniform")


@pytest.fixture
def logits():
    return TinyTeacher()(tiny_transfer_set().read_inputs(range(16))).detach()


@pytest.fixture
def unfinished(tmp_path, request):
    """A cache of one teacher whose first shard is not published: the store, and the shard's destination."""
    codec = getattr(request, "param", CODES)
    build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher()}, codec=codec)
    for name in ("complete.json", "commits/a/0.json", "teachers/a/codes/c/0/0"):
        (tmp_path / "cache" / name).unlink()
    store = CacheStore.at(tmp_path / "cache")
    return Destination.open(store, store.cache_document(), store.teacher("a"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


# Certificates ---------------------------------------------------------------------------------------------------------


def test_a_certificate_states_what_was_measured_on_every_row(logits):
    decoded = logits + torch.linspace(0, 0.1, 5)
    divergences = measure(logits, decoded, LADDER)
    certificate = certify(logits, decoded)
    assert certificate.mean_kl == tuple(divergences.mean(0).tolist())
    assert certificate.max_kl == tuple(divergences.amax(0).tolist())


def test_a_certificate_states_the_largest_error_range_of_all_rows(logits):
    decoded = logits.clone()
    decoded[7, 2] += 0.5
    assert certify(logits, decoded).max_error_range == pytest.approx(float(error_range(logits, decoded)[7]))


def test_logits_in_float64_are_certified_with_all_their_digits(logits):
    decoded = logits + 1e-3 * torch.linspace(0, 1, 5)
    certificate = certify(logits.double() + 2.0**30, decoded)
    assert certificate.max_error_range == pytest.approx(1e-3, rel=1e-2)
    assert 0 < certificate.max_kl[0] < 1e-6


def test_shards_with_a_class_masked_by_a_large_number_are_certified(logits):
    masked = logits.clone()
    masked[:, 2] = -1e9
    decoded = masked.clone()
    decoded[:, 2] = -0.9e9
    assert max(certify(masked, decoded).max_kl) < 1e-12


def test_shards_with_a_masked_class_are_certified_by_the_others(logits):
    decoded = logits + torch.linspace(0, 0.1, 5)
    expected = certify(logits[:, :4], decoded[:, :4])
    found = certify(*(values.clone().index_fill(1, torch.tensor(4), -torch.inf) for values in (logits, decoded)))
    assert found.max_kl == pytest.approx(expected.max_kl)
    assert found.max_error_range == expected.max_error_range


def test_of_many_rows_some_are_measured_and_all_are_bounded(logits, monkeypatch):
    monkeypatch.setattr("kdcache.build.task.MEASURED_ELEMENTS", 5 * 4)
    decoded = logits.clone()
    decoded[7, 2] += 0.5
    certificate = certify(logits, decoded)
    assert (certificate.num_measured_rows, certificate.max_error_range) == (4, pytest.approx(0.5))


def test_rows_that_lost_nothing_are_certified_to_have_lost_nothing(logits):
    certificate = certify(logits, logits.clone())
    assert certificate.max_kl == (0,) * len(LADDER)


@pytest.mark.parametrize("tail", ["class-means", "samples"])
def test_a_codec_that_depends_on_the_temperature_is_certified_as_it_decodes_at_each(logits, tail):
    codec = codec_for(TopK(k=2, tail=tail), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    codes = decoder.encode(logits)
    certificate = certify_codes(decoder, logits, codes)
    divergences = measure_codes(decoder, logits, codes)
    assert certificate.mean_kl == pytest.approx(divergences.mean(0).tolist())
    assert certificate.max_kl == pytest.approx(divergences.amax(0).tolist())


def test_a_codec_that_does_not_keep_every_logit_has_no_error_range(logits):
    codec = codec_for(TopK(k=2), 5)
    decoder = Decoder(codec, parameters_to(codec.fit(logits), "cpu"))
    assert certify_codes(decoder, logits, decoder.encode(logits)).max_error_range is None


def test_bounds_are_of_all_rows_and_hold_for_those_measured(logits):
    decoded = logits + torch.linspace(0, 0.1, 5)
    certificate = certify(logits, decoded)
    assert certificate.num_bounded_rows == len(logits)
    assert certificate.max_kl[1] <= certificate.bounds[1].max / 4
    assert certificate.bounds[0].mean <= certificate.bounds[0].max


class Sharpened(CodesCodec):
    """Decodes to other logits at every temperature."""

    depends_on_temperature = True

    def decode(self, codes, parameters, *, temperature=1.0):
        return super().decode(codes, parameters) * temperature


def test_what_is_decoded_by_temperature_is_measured_at_each_and_not_bounded(logits):
    codec = Sharpened(CODES, 5)
    parameters = parameters_to(codec.fit(logits), "cpu")
    codes = codec.encode(logits, parameters)
    certificate = certify_codes(Decoder(codec, parameters), logits, codes)
    at_4 = measure(logits, codec.decode(codes, parameters, temperature=4.0), [4.0])
    assert certificate.mean_kl[2] == pytest.approx(float(at_4.mean()))
    assert (certificate.bounds, certificate.max_error_range) == ((), None)


# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_record_describes_the_shard_that_stands(unfinished, logits, folder):
    record = publish_shard(unfinished, 0, logits)
    data = (folder / "teachers/a/codes/c/0/0").read_bytes()
    assert (record.num_bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_record_names_teacher_shard_and_rows(unfinished, logits):
    record = publish_shard(unfinished, 0, logits)
    assert (record.teacher, record.shard_index, record.num_rows) == ("a", 0, 16)


def test_a_record_keeps_the_smallest_and_largest_logit(unfinished, logits):
    record = publish_shard(unfinished, 0, logits)
    assert (record.min_logit, record.max_logit) == (float(logits.min()), float(logits.max()))


def test_the_smallest_logit_of_a_record_is_of_a_class_that_is_not_masked(unfinished, logits):
    record = publish_shard(unfinished, 0, logits.masked_fill(logits < 0, -torch.inf))
    assert record.min_logit == float(logits[logits >= 0].min())


def masked_at(logits, column):
    return logits.index_fill(1, torch.tensor(column), -torch.inf)


def test_a_shard_with_masked_classes_that_another_run_left_is_adopted(unfinished, logits, folder):
    publish_without_a_record(unfinished, masked_at(logits, 2), folder)
    standing = (folder / "teachers/a/codes/c/0/0").read_bytes()
    noise = 1e-3 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    publish_shard(unfinished, 0, masked_at(logits, 2) + noise)
    assert (folder / "teachers/a/codes/c/0/0").read_bytes() == standing


def test_a_shard_without_a_record_that_masks_another_class_is_refused(unfinished, logits, folder):
    publish_without_a_record(unfinished, masked_at(logits, 2), folder)
    with pytest.raises(CorruptCacheError, match="differ from the teacher's by up to inf"):
        publish_shard(unfinished, 0, masked_at(logits, 3))


def test_a_shard_published_twice_stands_once_with_one_record(unfinished, logits, folder):
    first = publish_shard(unfinished, 0, logits)
    before = files_of(folder)
    assert publish_shard(unfinished, 0, logits) == first
    assert files_of(folder) == before


@pytest.mark.parametrize("unfinished", [Lossless()], indirect=True)
def test_logits_that_the_codec_cannot_hold_publish_nothing(unfinished, logits, folder):
    before = files_of(folder)
    with pytest.raises(CodecError):
        publish_shard(unfinished, 0, logits.double() + 1e-12)
    assert files_of(folder) == before


def publish_without_a_record(destination, logits, folder):
    publish_shard(destination, 0, logits)
    (folder / "commits/a/0.json").unlink()


def test_the_same_shard_without_a_record_gets_the_same_record(unfinished, logits, folder):
    publish_shard(unfinished, 0, logits)
    before = files_of(folder)
    (folder / "commits/a/0.json").unlink()
    publish_shard(unfinished, 0, logits)
    assert files_of(folder) == before


def test_a_shard_that_another_run_left_is_adopted_as_it_stands(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    standing = (folder / "teachers/a/codes/c/0/0").read_bytes()
    publish_shard(unfinished, 0, logits + 1e-3 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0)))
    assert (folder / "teachers/a/codes/c/0/0").read_bytes() == standing


def test_an_adopted_shard_is_certified_by_its_own_error(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    ours = logits + 3e-2 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    record = publish_shard(unfinished, 0, ours)
    decoded = open_cache(folder, allow_incomplete=True).read(range(16)).logits()[:, 0]
    assert record.certificate == certify(ours, decoded)


def test_an_adopted_shard_verifies(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    publish_shard(unfinished, 0, logits + 1e-3)
    assert verify_cache(folder).is_sound


def test_a_foreign_shard_without_a_record_is_refused(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    with pytest.raises(CorruptCacheError) as caught:
        publish_shard(unfinished, 0, logits.flip(0))
    assert "shard 0 of teacher 'a' stands without a record, and its logits differ from the teacher's by up to" in str(
        caught.value
    )
    assert "delete the shard's file and run the same command again" in str(caught.value)


def test_a_refused_shard_leaves_everything_as_it_was(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    before = files_of(folder)
    with pytest.raises(CorruptCacheError):
        publish_shard(unfinished, 0, logits.flip(0))
    assert files_of(folder) == before


TOPK = [TopK(k=2), TopK(k=2, tail="samples", num_samples=2)]


@pytest.mark.parametrize("unfinished", TOPK, indirect=True, ids=str)
def test_a_topk_shard_of_other_hardware_is_adopted(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    standing = (folder / "teachers/a/codes/c/0/0").read_bytes()
    publish_shard(unfinished, 0, logits + 1e-2 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0)))
    assert (folder / "teachers/a/codes/c/0/0").read_bytes() == standing


@pytest.mark.parametrize("unfinished", TOPK, indirect=True, ids=str)
def test_a_foreign_topk_shard_is_refused(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    with pytest.raises(CorruptCacheError, match=r"its soft targets differ from the teacher's by .* nats on average at"):
        publish_shard(unfinished, 0, logits.flip(0))


@pytest.mark.parametrize("unfinished", [Lossless()], indirect=True)
def test_a_lossless_shard_of_other_hardware_is_adopted(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    record = publish_shard(unfinished, 0, logits * (1 + 1e-6))
    assert 0 < record.certificate.max_error_range < 1e-4


# Shards without a record, under a target ------------------------------------------------------------------------------

GUARDED = [Spectral(max_kl=0.001), Codes(spacing="uniform", max_kl=2e-4), TopK(k=4, max_kl=1e-3)]
NOISES = {"spectral": 0.0, "codes": 6e-2, "topk": 0.1}


def publish_coarser(destination, logits, folder):
    """Leave a shard that misses the target and is near enough otherwise: coarser steps, or logits that are off."""
    codec = destination.decoder.codec
    other = {"max_kl": 0.03} if codec.spec.kind == "spectral" else {"max_kl": None}
    unguarded = replace(codec, spec=codec.spec.model_copy(update=other))
    elsewhere = replace(destination, decoder=Decoder(unguarded, destination.decoder.parameters))
    noise = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    publish_without_a_record(elsewhere, logits + NOISES[codec.spec.kind] * noise, folder)


@pytest.mark.parametrize("unfinished", GUARDED, indirect=True, ids=str)
def test_a_shard_that_another_run_left_and_that_breaks_the_target_is_refused(unfinished, logits, folder):
    publish_coarser(unfinished, logits, folder)
    before = files_of(folder)
    message = (
        r"shard 0 of teacher 'a' stands without a record, and breaks the codec's target: Row \d+ has a KL .*"
        r"max_kl=.*Nothing was changed; delete the shard's file and run the same command again"
    )
    with pytest.raises(CorruptCacheError, match=message):
        publish_shard(unfinished, 0, logits)
    assert files_of(folder) == before


@pytest.mark.parametrize("unfinished", GUARDED, indirect=True, ids=str)
def test_a_shard_that_another_run_left_and_that_keeps_the_target_is_adopted(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    standing = (folder / "teachers/a/codes/c/0/0").read_bytes()
    rounding = 1e-5 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    record = publish_shard(unfinished, 0, logits + rounding)
    assert (folder / "teachers/a/codes/c/0/0").read_bytes() == standing
    assert 0 < max(record.certificate.max_kl[:3]) <= 2.1 * unfinished.decoder.codec.spec.max_kl


@pytest.mark.parametrize("unfinished", GUARDED, indirect=True, ids=str)
def test_a_shard_that_breaks_the_target_is_built_anew_once_it_is_deleted(unfinished, logits, folder):
    publish_coarser(unfinished, logits, folder)
    (folder / "teachers/a/codes/c/0/0").unlink()
    record = publish_shard(unfinished, 0, logits)
    assert max(record.certificate.max_kl[:3]) <= 2 * unfinished.decoder.codec.spec.max_kl


def test_a_torn_shard_without_a_record_is_refused(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    shard = folder / "teachers/a/codes/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CorruptCacheError, match=r"c/0/0"):
        publish_shard(unfinished, 0, logits)


# What is done ---------------------------------------------------------------------------------------------------------


def remaining(folder):
    store = CacheStore.at(folder)
    return remaining_shards(store, store.cache_document(), "a")


@pytest.mark.usefixtures("unfinished")
def test_shards_without_a_record_remain(folder):
    assert remaining(folder) == [0]


def test_a_shard_without_its_record_remains(unfinished, logits, folder):
    publish_without_a_record(unfinished, logits, folder)
    assert remaining(folder) == [0]


@pytest.fixture
def finished(tmp_path):
    build_tiny(tmp_path / "cache", teachers={"a": TinyTeacher()}, codec=CODES)
    (tmp_path / "cache/complete.json").unlink()
    return tmp_path / "cache"


def test_beyond_a_number_of_bytes_a_resumed_build_reads_evenly_spread_shards(finished, monkeypatch):
    read, whole = [], CacheStore.shard_bytes

    def noted(store, name, shard):
        read.append(shard)
        return whole(store, name, shard)

    monkeypatch.setattr(CacheStore, "shard_bytes", noted)
    monkeypatch.setattr(
        task, "RESUMED_BYTES", sum(r.num_bytes for r in CacheStore.at(finished).records("a").values()) - 1
    )
    assert remaining(finished) == []
    assert sorted(read) == [0, 2]


def test_a_torn_shard_stops_a_resumed_build_that_does_not_read_it(finished, monkeypatch):
    monkeypatch.setattr(task, "RESUMED_BYTES", 1)
    shard = finished / "teachers/a/codes/c/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"1 shard\(s\) that no longer match their records: \[1\]"):
        remaining(finished)


def test_nothing_remains_of_a_finished_teacher(finished):
    assert remaining(finished) == []


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_shard(folder):
    (folder / "teachers/a/codes/c/1/0").unlink()


def alter_a_shard(folder):
    flip_a_bit(folder / "teachers/a/codes/c/1/0")


def swap_two_shards(folder):
    one, other = folder / "teachers/a/codes/c/0/0", folder / "teachers/a/codes/c/1/0"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("damage", [lose_a_shard, alter_a_shard, swap_two_shards])
def test_a_published_shard_that_is_damaged_stops_the_next_build_with_the_remedy(finished, damage):
    damage(finished)
    with pytest.raises(CorruptCacheError) as caught:
        build_tiny(finished, teachers={"a": TinyTeacher()}, codec=CODES)
    assert "no longer match their records" in str(caught.value)
    assert f"kdcache verify {finished}`; `kdcache repair JOB`" in str(caught.value)


@pytest.mark.parametrize("damage", [lose_a_shard, alter_a_shard, swap_two_shards])
def test_damage_is_never_overwritten(finished, damage):
    damage(finished)
    before = files_of(finished)
    with pytest.raises(CorruptCacheError):
        build_tiny(finished, teachers={"a": TinyTeacher()}, codec=CODES)
    assert files_of(finished) == before


def test_the_remedy_for_damage_works(finished):
    undamaged = files_of(finished)
    alter_a_shard(finished)
    (finished / "teachers/a/codes/c/1/0").unlink()
    (finished / "commits/a/1.json").unlink()
    build_tiny(finished, teachers={"a": TinyTeacher()}, codec=CODES)
    after = files_of(finished)
    after.pop("complete.json")
    assert after == undamaged


def test_builders_at_once_leave_one_sound_cache(tmp_path):
    teachers = [TinyTeacher() for _ in range(3)]

    def build(teacher):
        return build_tiny(tmp_path / "cache", teachers={"a": teacher}, codec=CODES).complete.data_digest

    with ThreadPoolExecutor(3) as pool:
        digests = list(pool.map(build, teachers))
    assert len(set(digests)) == 1
    assert verify_cache(tmp_path / "cache").is_sound


def test_rows_read_from_published_shards_are_the_teachers(finished):
    cache = build_tiny(finished, teachers={"a": TinyTeacher()}, codec=CODES)
    expected = torch.softmax(TinyTeacher()(tiny_transfer_set().read_inputs(range(40))), 1).detach()
    assert (cache.read(range(40)).probabilities(1.0) - expected).abs().max() < 0.02
