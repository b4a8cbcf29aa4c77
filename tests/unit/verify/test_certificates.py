"""What a certificate's own figures tell of it, without the teacher."""

from __future__ import annotations

import pytest
from tiny_caches import build_tiny

from kdcache import Codes
from kdcache.store import CacheStore
from kdcache.verify.certificates import contradictions

CODEC = Codes(max_kl=0.05)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates") / "cache"
    build_tiny(folder, codec=CODEC)
    return CacheStore.at(folder).record("a", 0)


def told(record, **changes):
    certificate = record.certificate.model_copy(update=changes)
    return list(contradictions(record.model_copy(update={"certificate": certificate}), CODEC))


def first(values, value):
    return (value, *values[1:])


def test_a_certificate_as_it_was_measured_contradicts_nothing(record):
    assert told(record) == []


def test_a_largest_kl_below_the_mean_is_told(record):
    found = told(record, max_kl=first(record.certificate.max_kl, 0.0))
    assert any("KL at temperature 1: the mean, " in what and "is above the largest, 0" in what for what in found)


def test_a_largest_kl_outside_the_last_bin_is_told(record):
    found = told(record, max_kl=first(record.certificate.max_kl, record.certificate.max_kl[0] * 1.5))
    assert any("does not lie in the last bin" in what for what in found)


def test_a_kl_beyond_hoeffdings_bound_is_told(record):
    found = told(record, max_error_range=1e-6)
    assert any("max_kl at temperature 1 is" in what and "its error range allows" in what for what in found)


def test_a_kl_beyond_the_codecs_target_is_told(record):
    found = told(record, max_kl=first(record.certificate.max_kl, 0.2), max_error_range=9.0)
    assert any("above twice the codec's target 0.05" in what for what in found)


def test_a_bound_whose_mean_is_above_its_largest_is_told(record):
    bound = record.certificate.bounds[0].model_copy(update={"max": 0.0})
    found = told(record, bounds=(bound, *record.certificate.bounds[1:]))
    assert any("bounds from temperature 1: the mean" in what for what in found)


def test_more_measured_rows_than_rows_are_told(record):
    assert told(record, num_measured_rows=17) == ["measured 17 rows of 16"]


def test_logits_the_wrong_way_round_are_told(record):
    turned = record.model_copy(update={"min_logit": 3.0, "max_logit": -3.0})
    assert list(contradictions(turned, CODEC)) == ["names 3.0 as the smallest logit and -3.0 as the largest"]
