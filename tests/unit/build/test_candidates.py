"""Candidates: what a codec is fitted to and what it is measured on are different rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_caches import TinyTeacher, tiny_transfer_set

from kdcache import Codes, Spectral, TopK
from kdcache.build import ModuleTeacher
from kdcache.build.candidates import fitted_rows, held_out_rows, step_rows
from kdcache.build.plan import make_plan
from kdcache.build.rate_control import choose_codec
from kdcache.documents import RateTarget

NUMBERED = torch.arange(800.0)[:, None]
PLANNED = [Codes(), Spectral(max_kl=0.01), TopK(k=4), RateTarget(max_kl=0.01)]


def numbers(rows):
    return set(rows[:, 0].int().tolist())


def pilot():
    return TinyTeacher(num_classes=30)(tiny_transfer_set(400).read_inputs(range(400))).detach()


def chosen(logits, codec):
    fingerprint = ModuleTeacher("a", TinyTeacher(num_classes=30)).fingerprint
    return choose_codec(logits, make_plan(tiny_transfer_set(4000), [fingerprint], codec=codec, num_classes=30))[0]


def test_no_row_is_fitted_and_held_out():
    assert numbers(fitted_rows(NUMBERED)).isdisjoint(numbers(held_out_rows(NUMBERED)))
    assert numbers(fitted_rows(NUMBERED)) | numbers(held_out_rows(NUMBERED)) == set(range(800))


def test_steps_are_searched_on_fitted_rows():
    assert numbers(step_rows(NUMBERED)) <= numbers(fitted_rows(NUMBERED))


@pytest.mark.parametrize("count", [1, 63])
def test_all_rows_of_a_small_pilot_are_both(count):
    assert len(fitted_rows(NUMBERED[:count])) == len(held_out_rows(NUMBERED[:count])) == count


@pytest.mark.parametrize("codec", PLANNED, ids=str)
def test_nothing_is_fitted_to_the_rows_that_a_forecast_is_measured_on(codec):
    other = pilot()
    other[-50:] *= 0.5  # the last eighth
    first, second = chosen(pilot(), codec), chosen(other, codec)
    assert first.certificate != second.certificate
    np.testing.assert_equal(dict(first.parameters), dict(second.parameters))
