"""Batches on an accelerator are those of the processor, from every tier, while the training uses it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kdcache
from kdcache import Codes, Lossless, SoftTargetLoader, Spectral, TopK, TransferSet, build_cache, open_cache

pytestmark = pytest.mark.accelerator

NUM_EXAMPLES, NUM_CLASSES, BATCH_SIZE = 3000, 300, 128
CODECS = {
    "float16": Lossless(dtype="float16"),
    "bfloat16": Lossless(dtype="bfloat16"),
    "codes of 8 bits": Codes(),
    "codes of 16 bits": Codes(dtype="uint16"),
    "spectral": Spectral(max_kl=0.01),
    "top 8": TopK(k=8),
}
TIERS = ["device", "memory", "mapped", "windows", "scattered"]


class Teacher(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, NUM_CLASSES, generator=generator))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.weight).to(self.dtype)


def transfer_set():
    inputs = torch.randn(NUM_EXAMPLES, 16, generator=torch.Generator().manual_seed(1))
    labels = (np.arange(NUM_EXAMPLES) * 7) % NUM_CLASSES
    return TransferSet.from_arrays(inputs, labels=labels, example_ids=[f"row-{index}" for index in range(NUM_EXAMPLES)])


@pytest.fixture(scope="module", params=CODECS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("accelerator") / "cache"
    dtype = getattr(torch, request.param, torch.float32)
    build_cache(
        path, transfer_set(), {"a": Teacher(dtype)}, codec=CODECS[request.param], shard_rows=512, chunk_rows=64,
        batch_size=200, num_pilot_rows=1000, device="cpu",
    )  # fmt: skip
    return path


def loader_of(folder, tier, tmp_path, **options):
    more = {"local_copy": tmp_path / "copy"} if tier == "mapped" else {}
    options = {"shuffle": "windowed", "window_bytes": 2**18, "device": "cuda", **more, **options}
    return SoftTargetLoader(open_cache(folder), transfer_set(), batch_size=BATCH_SIZE, tier=tier, **options)


@pytest.mark.parametrize("tier", TIERS)
def test_batches_are_those_of_the_processor_while_training_goes_on(folder, tmp_path, tier):
    on_cpu = loader_of(folder, "scattered", tmp_path, device=None)
    busy = torch.randn(2000, 2000, device="cuda")
    for _ in range(2):
        for ours, theirs in zip(loader_of(folder, tier, tmp_path), on_cpu, strict=True):
            for _ in range(3):  # copies for later batches run beside
                busy = busy @ busy / 45
            inputs, labels, soft_targets = ours
            assert {inputs.device.type, labels.device.type, soft_targets.device.type} == {"cuda"}
            assert torch.equal(inputs.cpu(), theirs[0])
            assert torch.equal(labels.cpu(), theirs[1])
            for found, expected in zip(soft_targets.codes, theirs[2].codes, strict=True):
                assert torch.equal(found.cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))
            torch.testing.assert_close(soft_targets.logits().cpu(), theirs[2].logits(), rtol=1e-3, atol=1e-3)
        on_cpu.set_epoch(0)


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_given_stays_while_further_batches_are_made(folder, tmp_path, tier):
    kept = [(inputs, soft_targets) for inputs, _, soft_targets in loader_of(folder, tier, tmp_path)]
    again = loader_of(folder, "scattered", tmp_path, device=None)
    for (inputs, soft_targets), theirs in zip(kept, again, strict=True):
        assert torch.equal(inputs.cpu(), theirs[0])
        for found, expected in zip(soft_targets.codes, theirs[2].codes, strict=True):
            assert torch.equal(found.cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tier", TIERS)
def test_a_restored_loader_goes_on_where_it_was(folder, tmp_path, tier):
    loader = loader_of(folder, tier, tmp_path)
    batches = iter(loader)
    for _ in range(9):
        next(batches)
    state = loader.state_dict()
    rest = [labels.cpu() for _, labels, _ in batches]
    restored = loader_of(folder, tier, tmp_path)
    restored.load_state_dict(state)
    assert [labels.tolist() for _, labels, _ in restored] == [labels.tolist() for labels in rest]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_joined_with_another_loader_are_copied(folder, num_workers):
    data = [{"example_id": f"row-{index}", "x": torch.tensor(index)} for index in range(512)]
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, num_workers=num_workers)
    cache = open_cache(folder)
    for batch in cache.join(loader, device="cuda"):
        assert batch["soft_targets"].device.type == "cuda"
        expected = cache.read([f"row-{index}" for index in batch["x"].tolist()])
        for found, codes in zip(batch["soft_targets"].codes, expected.codes, strict=True):
            assert torch.equal(found.cpu().view(torch.uint8), codes.contiguous().view(torch.uint8))


def test_the_device_is_chosen_where_the_rows_fit_there(folder):
    loader = SoftTargetLoader(open_cache(folder), transfer_set(), batch_size=BATCH_SIZE, device="cuda")
    assert loader.tier == "device"
    assert {codes.device.type for codes in loader._source.held} == {"cuda"}


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jensen-shannon"])
def test_losses_and_gradients_are_those_of_the_processor(folder, tmp_path, divergence):
    inputs, labels, soft_targets = next(iter(loader_of(folder, "device", tmp_path)))
    logits = torch.randn(len(inputs), NUM_CLASSES, generator=torch.Generator().manual_seed(2))
    found = {}
    for device in ("cuda", "cpu"):
        student = logits.to(device).requires_grad_()
        loss = kdcache.distillation_loss(
            student, soft_targets.to(device), labels.to(device), temperature=3.0, soft_weight=0.7, divergence=divergence
        )
        loss.backward()
        found[device] = (loss.detach().cpu(), student.grad.cpu())
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["cuda"][1], found["cpu"][1], rtol=1e-3, atol=1e-6)
