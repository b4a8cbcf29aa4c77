from __future__ import annotations

import torch

from benchmarks.teachers import efficientnet, ppocr, smollm2
from benchmarks.teachers.pictures import cut, draw_crops, regions

PHOTOGRAPHS = [torch.arange(600 * 900 * 3).remainder(256).to(torch.uint8).view(600, 900, 3)] * 2


def test_windows_reach_from_the_first_token_to_the_last():
    ids = smollm2.windows(torch.arange(1000), num_windows=5, window=100)
    assert (ids[0, 0], ids[-1, -1]) == (0, 999)


def test_windows_do_not_overlap_in_a_long_text():
    ids = smollm2.windows(torch.arange(1000), num_windows=5, window=100)
    assert len(ids.unique()) == 500


def test_regions_tile_a_photograph_without_overlap():
    covered = torch.zeros(600, 900)
    for _, top, left, height, width in regions(PHOTOGRAPHS[:1]):
        covered[top : top + height, left : left + width] += 1
    assert covered.eq(1).all()


def test_crops_stay_in_their_regions():
    places = regions(PHOTOGRAPHS)
    for crop in draw_crops(PHOTOGRAPHS, 200):
        photograph, top, left, height, width = places[crop.region]
        assert photograph == crop.photograph
        assert top <= crop.top <= crop.top + crop.side <= top + height
        assert left <= crop.left <= crop.left + crop.side <= left + width


def test_the_same_seed_draws_the_same_crops():
    assert draw_crops(PHOTOGRAPHS, 20, seed=1) == draw_crops(PHOTOGRAPHS, 20, seed=1)


def test_a_crop_is_cut_to_the_size_of_the_network():
    (crop,) = draw_crops(PHOTOGRAPHS, 1)
    assert cut(PHOTOGRAPHS[0], crop, 40).shape == (3, 40, 40)


def test_pictures_are_scaled_as_the_network_learned_them():
    grey = torch.full((300, 300, 3), 127, dtype=torch.uint8)
    torch.testing.assert_close(
        efficientnet.inputs("lite1", [grey], draw_crops([grey], 2)), torch.zeros(2, 3, 240, 240), atol=1e-6, rtol=0
    )


def test_a_line_is_read_without_blanks_and_repetitions():
    frames = torch.eye(3)[[1, 1, 0, 1, 0, 0, 2, 2]]
    assert ppocr.read(frames, ["", "o", "h"]) == "ooh"
