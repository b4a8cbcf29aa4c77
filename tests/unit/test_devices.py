from __future__ import annotations

import pytest
import torch

from kdcache.devices import choose_device, move
from kdcache.errors import OptionError


def test_a_device_is_chosen_by_its_name():
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.accelerator
def test_auto_takes_cuda_where_there_is_one():
    assert choose_device("auto").type == "cuda"


def test_auto_takes_the_processor_where_there_is_no_cuda():
    assert choose_device("auto").type == "cpu"


def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(OptionError, match="torch finds no CUDA device"):
        choose_device("cuda")


def test_a_name_that_is_no_device_is_refused():
    with pytest.raises(OptionError, match="'gpu' is no device of torch"):
        choose_device("gpu")


def test_mappings_and_sequences_of_tensors_move():
    moved = move({"a": torch.zeros(1), "b": (torch.ones(2), "text")}, "meta")
    assert (moved["a"].device.type, moved["b"][0].device.type, moved["b"][1]) == ("meta", "meta", "text")
