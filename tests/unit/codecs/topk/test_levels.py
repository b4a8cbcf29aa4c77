"""Levels of gaps: spacing that widens, nearest codes, a reach beyond any row."""

import pytest
import torch

from kdcache.codecs.topk.levels import Levels

STEPS = [2.0**-6, 0.1, 0.125, 1.0]


@pytest.mark.parametrize("step", STEPS)
def test_every_level_has_its_own_code(step):
    levels = Levels(step)
    codes = torch.arange(5000)
    assert torch.equal(levels.nearest(levels.gaps(codes)).to(torch.int64), codes)


@pytest.mark.parametrize("step", STEPS)
def test_a_gap_gets_the_nearest_level(step):
    levels = Levels(step)
    gaps = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 60
    distances = (levels.gaps(torch.arange(8000)) - gaps[:, None].double()).abs()
    chosen = (levels.gaps(levels.nearest(gaps)) - gaps.double()).abs()
    torch.testing.assert_close(chosen, distances.amin(1), rtol=0.0, atol=1e-5)


def test_spacing_doubles_at_six_logits_and_trebles_at_sixteen():
    levels = Levels(2.0**-6)
    codes = levels.nearest(torch.tensor([0.0, 6.0, 16.0])).to(torch.int64)
    spacing = (levels.gaps(codes + 1) - levels.gaps(codes)) / levels.step
    torch.testing.assert_close(spacing, torch.tensor([1.0, 2.0, 3.0]).double(), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("step", STEPS)
def test_gaps_beyond_the_last_level_get_it(step):
    levels = Levels(step)
    assert levels.last > 1e5
    assert levels.nearest(torch.tensor([levels.last * 1.5, float("inf")])).tolist() == [65533.0, 65533.0]


def test_infinite_gaps_stay_infinite_when_rounded():
    assert Levels(0.5).rounded(torch.tensor([0.7, float("inf")])).tolist() == [0.53125, float("inf")]
