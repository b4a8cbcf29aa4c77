"""Rows of a cache recomputed with its teachers, and held against its certificate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_caches import NUM_EXAMPLES, TinyTeacher, build_tiny, files_of, tiny_teachers, tiny_transfer_set

from kdcache import Codes, Lossless, Spectral, TopK, TransferSet, Views, open_cache
from kdcache.build import ModuleTeacher, compare_with_teachers
from kdcache.build.comparison import draw_rows
from kdcache.errors import CacheNotFoundError, IncompleteCacheError, OptionError, PlanMismatchError

CODECS = [Lossless(), Codes(), Spectral(step=0.1), TopK(k=2), TopK(k=2, tail="samples")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "cache"
    build_tiny(folder, codec=Codes())
    return folder


def compare(folder, *, num_rows=NUM_EXAMPLES, seed=0, **options):
    return compare_with_teachers(folder, tiny_transfer_set(), tiny_teachers(2), num_rows=num_rows, seed=seed, **options)


class Shifted(TinyTeacher):
    def forward(self, inputs):
        return super().forward(inputs) + torch.tensor([3.0, 0, 0, 0, 0])


def under_the_name_of(name, network, seed):
    """Another network that says it is the cache's teacher, as one that changed beside its weights does."""
    teacher = ModuleTeacher(name, network)
    teacher.__dict__["fingerprint"] = ModuleTeacher(name, TinyTeacher(seed)).fingerprint
    return teacher


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_teachers_that_built_a_cache_keep_to_its_certificate(tmp_path, codec):
    build_tiny(tmp_path / "cache", codec=codec)
    assert compare(tmp_path / "cache").findings == ()


def test_a_lossless_cache_is_what_its_teachers_give(tmp_path):
    build_tiny(tmp_path / "cache", codec=Lossless())
    (first, _) = compare(tmp_path / "cache").teachers
    assert (first.largest_logit_difference, first.max_kl) == (0.0, (0.0, 0.0, 0.0))


def test_all_rows_give_the_very_kl_that_the_certificate_names(built):
    certificate = open_cache(built).certificates["a"]
    (first, _) = compare(built).teachers
    assert first.max_kl == pytest.approx(certificate.max_kl[:3], rel=1e-9)
    assert first.mean_kl == pytest.approx(certificate.mean_kl[:3], rel=1e-9)
    assert 2 * first.largest_logit_difference == pytest.approx(certificate.max_error_range, rel=1e-6)


def test_another_teacher_under_the_name_is_a_finding_that_states_both_sides(built):
    teachers = [under_the_name_of("a", Shifted(0), 0), ModuleTeacher("b", TinyTeacher(1))]
    found = compare_with_teachers(built, tiny_transfer_set(), teachers, num_rows=10, seed=3)
    (finding,) = found.findings
    assert (finding.teacher, finding.kind) == ("a", "differs_from_teacher")
    assert "a row of 10 drawn with seed 3 has a KL of" in finding.what
    assert float(finding.found) == pytest.approx(max(found.teachers[0].max_kl), rel=1e-5)
    assert float(finding.found) > float(finding.expected)
    assert found.teachers[0].largest_logit_difference == pytest.approx(1.5, abs=0.1)


def test_one_finding_a_teacher_counts_the_temperatures_and_names_the_furthest(built):
    teachers = [under_the_name_of("a", Shifted(0), 0), under_the_name_of("b", Shifted(1), 1)]
    found = compare_with_teachers(built, tiny_transfer_set(), teachers, num_rows=10)
    assert [finding.teacher for finding in found.findings] == ["a", "b"]
    assert "at 3 of 3 temperatures; furthest at temperature 1," in found.findings[0].what


def test_a_merged_cache_is_compared_with_its_mean(tmp_path):
    build_tiny(tmp_path / "cache", codec=Codes(), merge="geometric")
    found = compare(tmp_path / "cache", merge="geometric")
    assert (found.findings, [teacher.name for teacher in found.teachers]) == ((), ["geometric-mean"])


def test_rows_of_all_views_and_of_sequences_are_compared(tmp_path):
    inputs = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(0))
    views = Views(transform=lambda value, generator: value + float(generator.random()), num_views=2, name="v")
    examples = TransferSet.from_arrays(inputs, num_rows=[1, 2, 3] * 4, views=views)
    build_tiny(tmp_path / "cache", examples, codec=Lossless(), batch_size=5)
    found = compare_with_teachers(tmp_path / "cache", examples, tiny_teachers(2), num_rows=48)
    assert [teacher.max_kl for teacher in found.teachers] == [(0.0, 0.0, 0.0)] * 2


def test_only_batches_with_drawn_rows_are_run(built):
    teachers = tiny_teachers(2)
    compare_with_teachers(built, tiny_transfer_set(), teachers, num_rows=1)
    assert (teachers["a"].num_calls, teachers["b"].num_calls) == (1, 1)


def test_nothing_is_written(built):
    before = files_of(built)
    compare(built)
    assert files_of(built) == before


# Drawing --------------------------------------------------------------------------------------------------------------


def drawn(built, num_rows, seed=0):
    return draw_rows(open_cache(built).document, num_rows, seed=seed)


def test_the_same_seed_draws_the_same_rows(built):
    assert drawn(built, 9, 4).tolist() == drawn(built, 9, 4).tolist()


def test_another_seed_draws_other_rows(built):
    assert drawn(built, 9, 4).tolist() != drawn(built, 9, 5).tolist()


def test_rows_are_spread_over_all_shards(built):
    assert np.bincount(drawn(built, 9) // 16).tolist() == [3, 3, 3]


def test_small_shards_are_made_up_for(built):
    rows = drawn(built, 36)
    assert (len(rows), len(set(rows.tolist())), int((rows >= 32).sum())) == (36, 36, 8)


def test_no_more_rows_are_drawn_than_there_are(built):
    assert drawn(built, 1000).tolist() == list(range(40))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_unfinished_cache_is_refused(tmp_path):
    build_tiny(tmp_path / "cache", codec=Codes())
    (tmp_path / "cache/complete.json").unlink()
    with pytest.raises(IncompleteCacheError):
        compare(tmp_path / "cache")


def test_where_no_cache_stands_nothing_is_compared_and_nothing_is_written(tmp_path):
    with pytest.raises(CacheNotFoundError):
        compare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_other_teachers_are_refused(built):
    with pytest.raises(PlanMismatchError):
        compare_with_teachers(built, tiny_transfer_set(), {"a": TinyTeacher(7), "b": TinyTeacher(1)}, num_rows=1)


@pytest.mark.parametrize("options", [{"num_rows": 0}, {"seed": -1}])
def test_numbers_that_cannot_be_are_refused(built, options):
    with pytest.raises(OptionError, match="at least 1 row and seed 0"):
        compare(built, **options)
