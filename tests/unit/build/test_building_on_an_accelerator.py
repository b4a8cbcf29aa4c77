"""What is built on an accelerator keeps its target and its certificate, and is read on the processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kdcache
from kdcache import Codes, Lossless, RateTarget, Spectral, TeacherWithHead, TopK, TransferSet, build_cache
from kdcache.codecs import measure

pytestmark = pytest.mark.accelerator

NUM_CLASSES = 5000
HELD = (1.0, 2.0, 4.0)
EVERY_WAY = [
    Codes(),
    Lossless(),
    Spectral(max_kl=0.02),
    TopK(k=16),
    RateTarget(max_kl=0.02),
]


@pytest.fixture(autouse=True)
def _in_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def teacher() -> TeacherWithHead:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 20))
    nn.init.normal_(network[0].weight, std=1.0)
    head = nn.Linear(20, NUM_CLASSES)
    nn.init.normal_(head.weight, std=2.0)
    return TeacherWithHead(network, head)


def examples(num_examples=600) -> torch.Tensor:
    return torch.randn(num_examples, 16, generator=torch.Generator().manual_seed(3))


def built(folder, **options) -> kdcache.SoftTargetCache:
    options = {"batch_size": 100, "num_pilot_rows": 300, "shard_rows": 256, "device": "cuda", **options}
    return build_cache(folder, TransferSet.from_arrays(examples()), {"a": teacher()}, **options)


def divergence(cache, temperatures) -> torch.Tensor:
    with torch.inference_mode():
        return measure(teacher()(examples()), cache.read(range(600)).logits()[:, 0], temperatures)


@pytest.mark.parametrize("codec", EVERY_WAY, ids=str)
def test_no_row_is_further_off_than_its_cache_certifies(tmp_path, codec):
    cache = built(tmp_path / "cache", codec=codec)
    bounds = torch.tensor([cache.certificate(temperature).kl_bound or torch.inf for temperature in HELD])
    assert (divergence(cache, HELD) <= bounds + 1e-6).all()  # the two devices round their products otherwise


@pytest.mark.parametrize("head_is_used", [True, False], ids=["hidden states", "logits"])
def test_a_target_is_met_from_either_way_in(tmp_path, head_is_used):
    network = teacher()
    given = network if head_is_used else nn.Sequential(network.body, network.head)
    cache = build_cache(
        tmp_path / "cache", TransferSet.from_arrays(examples()), {"a": given},
        codec=Spectral(max_kl=0.02), batch_size=100, num_pilot_rows=300, shard_rows=256, device="cuda",
    )  # fmt: skip
    found = divergence(cache, HELD)
    assert found.mean(dim=0).amax() <= 0.0201
    assert found.amax() <= 0.0401


def test_a_build_in_half_precision_keeps_what_that_teacher_gave(tmp_path):
    cache = built(tmp_path / "cache", codec=Spectral(max_kl=0.02), autocast="bfloat16")
    rounding = 0.002  # of the teacher, not of the cache
    assert divergence(cache, HELD).mean(dim=0).amax() <= 0.02 + rounding


def test_a_loader_gives_batches_that_are_decoded_where_they_are_trained_on(tmp_path):
    cache = built(tmp_path / "cache", codec=Spectral(max_kl=0.02))
    loader = kdcache.SoftTargetLoader(cache, TransferSet.from_arrays(examples()), batch_size=64, seed=0)
    inputs, _, soft_targets = next(iter(loader))
    student = nn.Linear(16, NUM_CLASSES).cuda()
    loss = kdcache.distillation_loss(student(inputs.cuda()), soft_targets.to("cuda"), temperature=2.0, soft_weight=1.0)
    loss.backward()
    assert student.weight.grad.isfinite().all()


def test_decoding_and_softening_compile_to_one_graph(tmp_path):
    soft_targets = built(tmp_path / "cache", codec=Spectral(max_kl=0.02)).read(range(64)).to("cuda")
    expected = soft_targets.log_probabilities(2.0)
    compiled = torch.compile(lambda batch: batch.log_probabilities(2.0), fullgraph=True)
    torch.testing.assert_close(compiled(soft_targets), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"codec": Spectral(max_kl=0.02)}, {"max_kl": 0.02}], ids=str)
def test_a_pilot_of_hidden_states_that_lies_in_a_file_is_fitted(tmp_path, monkeypatch, options):
    expected = built(tmp_path / "in memory", **options)
    monkeypatch.setattr("kdcache.build.spool.SPOOL_BYTES", 100)
    cache = built(tmp_path / "in a file", **options)
    assert cache.teachers["a"].codec == expected.teachers["a"].codec
    assert (divergence(cache, HELD) <= 0.04 + 1e-6).all()
