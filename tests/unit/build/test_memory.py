from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_caches import OPTIONS, tiny_teachers, tiny_transfer_set

from kdcache import Codes, TransferSet, build_cache
from kdcache.build import plan_cache
from kdcache.build.memory import TaskMemory

PROGRAM = Path(__file__).parents[1] / "peak_of_a_task.py"


def run(name):
    output = subprocess.run([sys.executable, PROGRAM, name], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    [
        "codes",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lossless", "spectral", "topk", "large inputs")),
    ],
)
def test_tasks_take_no_more_memory_than_stated_and_not_much_less(name):
    peak = run(name)
    assert peak["measured"] <= peak["stated"] <= 3 * peak["measured"]


def test_a_plan_states_the_memory_of_a_task(tmp_path):
    forecast = plan_cache(tmp_path / "cache", tiny_transfer_set(), tiny_teachers(1), **{**OPTIONS, "codec": Codes()})
    memory = forecast.teachers[0].memory
    assert memory.logits_bytes >= 16 * 5 * 4
    assert memory.pilot_bytes == 40 * 5 * 4
    assert memory.input_bytes == 5 * 4 * 12 * 4  # five batches of four examples of twelve float32
    assert memory.parameter_bytes > 0


def test_the_pilots_memory_is_stated_apart():
    assert TaskMemory(1, 2, 4, 8, 16, 32).task_bytes == 47


def test_larger_batches_take_more_memory(tmp_path):
    stated = [
        plan_cache(tmp_path / "cache", tiny_transfer_set(), tiny_teachers(1), **{**OPTIONS, "batch_size": size})
        for size in (4, 8)
    ]
    small, large = (forecast.teachers[0].memory.logits_bytes for forecast in stated)
    assert large - small == 2 * 4 * 5 * torch.float32.itemsize


class Sparse(torch.nn.Linear):
    def forward(self, inputs):
        return torch.sparse.mm(inputs, self.weight.T)


def test_inputs_that_have_no_number_of_bytes_are_built_all_the_same(tmp_path):
    transfer_set = TransferSet(
        list(torch.eye(20)), example_ids=range(20), collate=lambda inputs: torch.stack(inputs).to_sparse()
    )
    assert len(build_cache(tmp_path / "cache", transfer_set, {"a": Sparse(20, 5)})) == 20
