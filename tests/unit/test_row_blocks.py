"""Soft targets and losses in blocks of rows: the same numbers, and no more memory than a block beside the result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, Spectral, TopK
from kdcache.errors import OptionError
from kdcache.losses import distillation_loss
from kdcache.soft_targets import MEANS, SoftTargets

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(23, 2, 6, generator=GENERATOR) @ torch.randn(6, 40, generator=GENERATOR) * 2
LOGITS = LOGITS.bfloat16().float()
STUDENT = torch.randn(23, 40, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.arange(23)
DIVERGENCES = ["forward-kl", "cross-entropy", "reverse-kl", "jensen-shannon", "logit-matching"]
SPECS = [Codes(), Codes(dtype="uint16"), Lossless(), Spectral(step=0.05), TopK(k=4)]
every_codec = pytest.mark.parametrize("spec", SPECS, ids=str)


def decoder_for(spec, logits):
    if isinstance(spec, Spectral):
        codec, parameters = SpectralCodec.fitted(spec, logits.shape[1], logits)
    else:
        codec = codec_for(spec, logits.shape[1])
        parameters = codec.fit(logits)
    return Decoder(codec, parameters_to(parameters, "cpu"))


def coded(spec, logits=LOGITS, **options):
    members = logits.unbind(1)
    decoders = tuple(decoder_for(spec, member) for member in members)
    codes = tuple(decoder.encode(member) for decoder, member in zip(decoders, members, strict=True))
    return SoftTargets(codes, decoders, ("a", "b")[: len(codes)], **options)


@pytest.fixture
def small_blocks(monkeypatch):
    """Decodes 4 rows of two teachers at a time, and softens one; returns what puts the usual sizes back."""
    monkeypatch.setattr("kdcache.soft_targets.batch._DECODED_ELEMENTS", 4 * 2 * 40)
    monkeypatch.setattr("kdcache.soft_targets.means.BLOCK_ELEMENTS", 2 * 40)
    return monkeypatch.undo


# --- the same numbers


@every_codec
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]], ids=str)
def test_soft_targets_in_blocks_are_those_of_the_whole(spec, mean, weights, small_blocks):
    soft_targets = coded(spec)
    found = soft_targets.log_probabilities(2.0, mean=mean, weights=weights)
    small_blocks()
    expected = soft_targets.log_probabilities(2.0, mean=mean, weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_codec
@pytest.mark.parametrize("ask", ["logits", "mean_logits"])
def test_logits_in_blocks_are_those_of_the_whole(spec, ask, small_blocks):
    soft_targets = coded(spec)
    found = getattr(soft_targets, ask)(temperature=2.0)
    small_blocks()
    torch.testing.assert_close(found, getattr(soft_targets, ask)(temperature=2.0), rtol=1e-6, atol=1e-6)


def test_sampled_weights_in_blocks_are_those_of_the_whole(small_blocks):
    soft_targets = coded(TopK(k=4, tail="samples", num_samples=6))
    found = soft_targets.probabilities(2.0, mean="arithmetic", weights=[3.0, 1.0])
    small_blocks()
    expected = soft_targets.probabilities(2.0, mean="arithmetic", weights=[3.0, 1.0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_available_are_nan_in_blocks_too(small_blocks):
    available = torch.arange(23) % 5 > 0
    soft_targets = coded(Codes(), available=available)
    assert torch.equal(soft_targets.logits().isnan().all(2).all(1), ~available)
    assert torch.equal(soft_targets.probabilities(2.0).isnan().all(1), ~available)
    small_blocks()
    assert torch.equal(soft_targets.probabilities(2.0).isnan().all(1), ~available)


@pytest.mark.usefixtures("small_blocks")
def test_reading_in_blocks_leaves_the_codes_as_they_were():
    soft_targets = coded(Lossless())
    before = [codes.clone() for codes in soft_targets.codes]
    soft_targets.probabilities(3.0, mean="arithmetic")
    assert all(torch.equal(codes, kept) for codes, kept in zip(soft_targets.codes, before, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_float32_whatever_torchs_default_is():
    soft_targets = coded(Codes())
    torch.set_default_dtype(torch.float64)
    try:
        found = soft_targets.probabilities(2.0), soft_targets.logits()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {values.dtype for values in found} == {torch.float32}


@pytest.mark.parametrize("max_elements", [1, 100, 80 * 23])
def test_row_blocks_cover_the_batch_in_order(max_elements):
    soft_targets = coded(Codes())
    blocks = list(soft_targets.row_blocks(max_elements=max_elements))
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
    assert torch.equal(torch.cat([block.logits() for _, block in blocks]), soft_targets.logits())


@pytest.mark.parametrize("max_elements", [0, -1, 2.5, True])
def test_blocks_of_no_elements_are_refused(max_elements):
    with pytest.raises(OptionError, match=r"max_elements is .*; expected a whole number of at least 1"):
        coded(Codes()).row_blocks(max_elements=max_elements)


def test_row_blocks_hold_no_more_than_asked_for():
    lengths = [len(block) for _, block in coded(Codes()).row_blocks(max_elements=5 * 2 * 40)]
    assert lengths == [5, 5, 5, 5, 3]


def test_row_blocks_copy_no_codes():
    soft_targets = coded(Codes())
    (_, first), *_ = soft_targets.row_blocks(max_elements=80)
    assert first.codes[0].data_ptr() == soft_targets.codes[0].data_ptr()


# --- losses


def loss_and_gradient(student, soft_targets, **options):
    student = student.clone().requires_grad_()
    loss = distillation_loss(student, soft_targets, LABELS, temperature=3.0, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss, gradient


@every_codec
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("soft_weight", [1.0, 0.7, 0.0])
def test_losses_and_gradients_in_blocks_are_those_of_plain_autograd(spec, divergence, soft_weight, small_blocks):
    soft_targets = coded(spec)
    options = {"divergence": divergence, "soft_weight": soft_weight, "reduction": "none"}
    loss, gradient = loss_and_gradient(STUDENT, soft_targets, **options)
    small_blocks()
    expected = loss_and_gradient(STUDENT, soft_targets, **options)
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teachers", [LOGITS, LOGITS[:, 0]], ids=["two", "one"])
def test_plain_teacher_logits_in_blocks_give_the_loss_of_the_whole(divergence, teachers, small_blocks):
    loss, gradient = loss_and_gradient(STUDENT, teachers, divergence=divergence, mean="arithmetic")
    small_blocks()
    expected = loss_and_gradient(STUDENT, teachers, divergence=divergence, mean="arithmetic")
    torch.testing.assert_close((loss, gradient), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mean", MEANS)
def test_gradients_through_blocks_are_those_of_finite_differences(divergence, mean):
    soft_targets = coded(Codes())[:5]

    def loss(student):
        return distillation_loss(
            student, soft_targets, LABELS[:5], temperature=2.0, soft_weight=0.7, divergence=divergence, mean=mean
        )

    assert torch.autograd.gradcheck(loss, STUDENT[:5].clone().requires_grad_())


@pytest.mark.usefixtures("small_blocks")
def test_the_gradient_through_blocks_can_be_differentiated_again():
    soft_targets = coded(Codes())[:3]

    def loss(student):
        return distillation_loss(student, soft_targets, LABELS[:3], temperature=2.0)

    assert torch.autograd.gradgradcheck(loss, STUDENT[:3].clone().requires_grad_())


@pytest.mark.usefixtures("small_blocks")
def test_a_second_backward_pass_gives_the_same_gradient():
    student = STUDENT.clone().requires_grad_()
    loss = distillation_loss(student, coded(Codes()), LABELS, temperature=2.0)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("small_blocks")
def test_rows_are_weighted_by_what_comes_after_the_loss():
    student = STUDENT.clone().requires_grad_()
    losses = distillation_loss(student, coded(Codes()), LABELS, temperature=3.0, reduction="none")
    weights = torch.arange(23.0, dtype=torch.float64)
    (found,) = torch.autograd.grad((weights * losses).sum(), student)
    _, unweighted = loss_and_gradient(STUDENT, coded(Codes()), reduction="none")
    torch.testing.assert_close(found, weights[:, None] * unweighted)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_has_the_students_precision(dtype):
    loss, gradient = loss_and_gradient(STUDENT.to(dtype), coded(Codes()))
    expected = loss_and_gradient(STUDENT.to(dtype).float(), coded(Codes()))
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient.float(), expected[1], rtol=2e-2, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same(guard):
    soft_targets = coded(Codes())
    expected, _ = loss_and_gradient(STUDENT, soft_targets)
    with guard():
        found = distillation_loss(STUDENT.clone().requires_grad_(), soft_targets, LABELS, temperature=3.0)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its rules for jvp are first imported
def test_functional_transforms_see_through_the_loss():
    soft_targets = coded(Codes())

    def loss(student):
        return distillation_loss(student, soft_targets, LABELS, temperature=3.0)

    _, expected = loss_and_gradient(STUDENT, soft_targets)
    torch.testing.assert_close(torch.func.grad(loss)(STUDENT), expected)
    direction = torch.randn(23, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(torch.func.jvp(loss, (STUDENT,), (direction,))[1], (direction * expected).sum())


@pytest.mark.usefixtures("small_blocks")
def test_the_soft_targets_are_decoded_once_and_never_whole(monkeypatch):
    seen = []
    plain = Decoder.decode

    def decode(self, codes, **options):
        seen.append(len(codes))
        return plain(self, codes, **options)

    monkeypatch.setattr(Decoder, "decode", decode)
    loss_and_gradient(STUDENT, coded(Codes()))
    assert (max(seen), sum(seen)) == (4, 2 * 23)


# --- memory

PEAK = Path(__file__).with_name("peak_of_reading.py")


def results_held(ask):
    """The peak of a fresh process while it reads, in results: arrays [256 rows, 262,144 classes] of float32."""
    ended = subprocess.run([sys.executable, str(PEAK), ask], capture_output=True, text=True, check=True)
    return float(ended.stdout)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")


@on_linux
@pytest.mark.parametrize(
    "ask", [pytest.param(ask, marks=pytest.mark.slow) for ask in ("arithmetic", "geometric", "mean_logits")]
)
def test_a_wide_ensemble_is_read_with_one_result_and_a_block(ask):
    assert 1.0 <= results_held(ask) < 1.75


@on_linux
def test_a_wide_loss_holds_its_gradient_and_a_block():
    assert 1.0 <= results_held("loss") < 2.25


@on_linux
@pytest.mark.parametrize("codec", [pytest.param(codec, marks=pytest.mark.slow) for codec in ("spectral", "topk")])
def test_a_wide_loss_of_64_rows_holds_its_gradient_and_blocks_whatever_the_codec(codec):
    assert 0.25 <= results_held(f"loss-{codec}") < 1.25


@on_linux
@pytest.mark.slow
def test_a_consumer_of_blocks_holds_no_result():
    assert results_held("blocks") < 1.0
