"""Other systems' formats: sizes as published, round trips through their containers, and how they read temperatures."""

import pytest
import torch

from benchmarks.fidelity.peers import DistillKit, MlDr, RandomSampling, ResidualBin, TinyViT
from benchmarks.fidelity.peers.base import bytes_of
from benchmarks.fidelity.peers.bits import pack_bits, unpack_bits
from kdcache.errors import CodecError

NUM_CLASSES = 400


def logits_of(num_rows=40, num_classes=NUM_CLASSES, scale=3.0):
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(1)) * scale


def all_peers():
    return [
        DistillKit(NUM_CLASSES, k=64),
        DistillKit(NUM_CLASSES, k=64, leftover="zero"),
        DistillKit(NUM_CLASSES, k=64, residual_bins=(ResidualBin(32, 4), ResidualBin(8, 3))),
        DistillKit(NUM_CLASSES, k=16),
        DistillKit(NUM_CLASSES, k=17),
        TinyViT(NUM_CLASSES, k=20),
        MlDr(NUM_CLASSES, k=10, views_per_example=7),
        RandomSampling(NUM_CLASSES, num_draws=50),
        RandomSampling(NUM_CLASSES, num_draws=300, proposal_power=0.8, stored_temperature=2.0),
    ]


@pytest.fixture(params=all_peers(), ids=lambda peer: f"{peer.name} {peer.setting}")
def peer(request):
    return request.param


@pytest.mark.parametrize("num_bits", [1, 7, 16, 17, 32])
def test_packed_integers_come_back(num_bits):
    values = torch.randint(2**num_bits, (5, 13), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_bits(pack_bits(values, num_bits), num_bits, 13), values)


def test_packed_rows_end_on_whole_bytes():
    assert pack_bits(torch.zeros(2, 5, dtype=torch.int64), 17).shape == (2, 11)


def test_what_is_read_from_disk_is_what_was_encoded(peer, tmp_path):
    kept = peer.encode(logits_of())
    peer.write(kept, tmp_path)
    for temperature in (1.0, 3.0):
        from_memory = peer.read(kept, temperature)
        assert torch.equal(peer.read(tmp_path, temperature), from_memory)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_soft_targets_sum_to_one(peer, temperature):
    sums = peer.read(peer.encode(logits_of()), temperature).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-4)


def test_soft_targets_of_a_slice_are_the_slice_of_the_soft_targets(peer):
    kept = peer.encode(logits_of())
    part = {name: values[5:9] for name, values in kept.items()}
    assert torch.equal(peer.read(part, 2.0), peer.read(kept, 2.0)[5:9])


@pytest.mark.parametrize(("num_classes", "row_bytes"), [(50_000, 312), (128_256, 328), (151_936, 344)])
def test_distillkit_takes_the_bytes_it_publishes_at_128(num_classes, row_bytes):
    assert DistillKit(num_classes).raw_row_bytes == row_bytes


def test_distillkit_takes_the_bytes_it_publishes_for_its_budget_pick():
    assert DistillKit(128_256, k=50, exact_k=1, powers=(0, 1, 0.5)).raw_row_bytes == 2 + 12 + 107


def test_distillkit_encodes_as_many_bytes_as_it_says():
    peer = DistillKit(NUM_CLASSES, k=64, residual_bins=(ResidualBin(32, 4), ResidualBin(8, 3)))
    kept = peer.encode(logits_of())
    packed = kept["compressed_logprobs"].shape[1] + kept["bytepacked_indices"].shape[1]
    assert packed == peer.raw_row_bytes


def test_distillkit_on_disk_is_within_a_tenth_of_its_raw_size(tmp_path):
    peer = DistillKit(50_000)
    num_bytes = peer.store(logits_of(2048, 50_000), tmp_path)
    assert 0.9 < num_bytes / 2048 / peer.raw_row_bytes < 1.1


def test_distillkit_keeps_the_head_at_temperature_one_to_half_a_percent():
    logits = logits_of()
    head = logits.topk(16, dim=1).indices
    stored = DistillKit(NUM_CLASSES, k=64)
    read = stored.read(stored.encode(logits), 1.0).gather(1, head)
    torch.testing.assert_close(read, logits.softmax(1).gather(1, head), rtol=2e-2, atol=1e-4)


def test_distillkit_reads_the_leftover_as_one_class_raised_to_the_power():
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    peer = DistillKit(4, k=2, exact_k=2)
    read = peer.read(peer.encode(probabilities.log()), 2.0)
    expected = torch.tensor([0.5, 0.25]).sqrt() / (0.5**0.5 + 0.25**0.5 + 0.25**0.5)
    torch.testing.assert_close(read[0, :2], expected, rtol=1e-2, atol=0)


def test_distillkit_renormalised_is_exact_among_the_kept_at_any_temperature():
    logits = logits_of(num_classes=16)
    peer = DistillKit(16, k=16, exact_k=16, leftover="zero")
    read = peer.read(peer.encode(logits), 4.0)
    torch.testing.assert_close(read, (logits / 4).softmax(1), rtol=2e-2, atol=0)


def test_residual_codes_bring_the_curve_closer():
    logits = logits_of()
    bare, corrected = (DistillKit(NUM_CLASSES, k=64, residual_bins=bins) for bins in ((), (ResidualBin(48, 8),)))
    errors = [(peer.read(peer.encode(logits), 1.0) - logits.softmax(1)).abs().sum() for peer in (bare, corrected)]
    assert errors[1] < errors[0]


def test_tinyvit_records_take_404_bytes_at_100():
    assert TinyViT(1000).record_bytes == 404


def test_tinyvit_on_disk_is_its_records_and_a_short_key_each(tmp_path):
    num_bytes = TinyViT(1000).store(logits_of(100, 1000), tmp_path)
    assert num_bytes == 100 * 404 + len("".join(f"{row}\n" for row in range(100)))


def test_tinyvit_spreads_the_leftover_evenly():
    logits = logits_of()
    read = TinyViT(NUM_CLASSES, k=20).read(TinyViT(NUM_CLASSES, k=20).encode(logits), 1.0)
    kept = logits.softmax(1).topk(20, dim=1).values.half().float().sum(1)
    torch.testing.assert_close(read.min(1).values, (1 - kept) / (NUM_CLASSES - 20), rtol=1e-4, atol=1e-7)


def test_tinyvit_numbers_classes_above_32767():
    logits = torch.zeros(1, 50_000)
    logits[0, 49_999] = 9.0
    read = TinyViT(50_000, k=1).read(TinyViT(50_000, k=1).encode(logits), 1.0)
    assert int(read.argmax()) == 49_999


def test_tinyvit_refuses_classes_that_two_bytes_cannot_number():
    with pytest.raises(CodecError, match="two bytes"):
        TinyViT(70_000)


def test_ml_dr_takes_about_the_65_bytes_a_view_it_publishes(tmp_path):
    num_bytes = MlDr(1000).store(logits_of(2000, 1000), tmp_path)
    assert 55 < num_bytes / 2000 < 95


def test_ml_dr_counts_its_archive_and_not_the_plain_copy(tmp_path):
    num_bytes = MlDr(NUM_CLASSES).store(logits_of(), tmp_path)
    assert num_bytes == (tmp_path / "reinforced_data.tar.gz").stat().st_size < bytes_of(tmp_path)


def test_ml_dr_softens_the_kept_probabilities_themselves_where_rounding_overfills_a_row():
    kept = {"probabilities": torch.tensor([[0.75, 0.2500001]]), "classes": torch.tensor([[2, 0]])}
    read = MlDr(3, k=2).read(kept, 1.0)
    torch.testing.assert_close(read[0, [2, 0]], torch.tensor([0.75, 0.2500001]).softmax(0))


def test_random_sampling_takes_three_bytes_a_class_and_one_for_their_number(tmp_path):
    peer = RandomSampling(100_000)
    kept = peer.encode(logits_of(20, 100_000))
    num_drawn = int((kept["counts"] > 0).sum())
    assert peer.write(kept, tmp_path) == 3 * num_drawn + 20


@pytest.mark.parametrize("proposal_power", [1.0, 0.8])
@pytest.mark.parametrize("stored_temperature", [1.0, 2.0])
def test_random_sampling_is_unbiased_at_the_stored_temperature(proposal_power, stored_temperature):
    logits = logits_of(1, 30, scale=1.5)
    peer = RandomSampling(30, 20, proposal_power=proposal_power, stored_temperature=stored_temperature)
    read = peer.read(peer.encode(logits.expand(20_000, -1)), stored_temperature)
    deviations = (read.mean(0) - (logits[0] / stored_temperature).softmax(0)) / (read.std(0) / 20_000**0.5)
    assert deviations.abs().max() < 4.5


def test_random_sampling_is_biased_at_another_temperature():
    logits = logits_of(1, 30, scale=1.5)
    peer = RandomSampling(30, 20)
    read = peer.read(peer.encode(logits.expand(20_000, -1)), 2.0)
    deviations = (read.mean(0) - (logits[0] / 2).softmax(0)) / (read.std(0) / 20_000**0.5)
    assert deviations.abs().max() > 20


def test_more_classes_than_there_are_cannot_be_kept():
    with pytest.raises(CodecError, match="smaller k"):
        TinyViT(10, k=11).encode(torch.zeros(1, 10))
