"""Reading compiles: every codec's decoding, softening and the loss are one graph, at any temperature."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, Spectral, TopK
from kdcache.losses import distillation_loss
from kdcache.soft_targets import MEANS, SoftTargets

LOGITS = (torch.randn(24, 2, 30, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().float()
MASKED = LOGITS.index_fill(2, torch.tensor([3]), -torch.inf)
STUDENT = torch.randn(24, 30, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24)
SPECS = [
    Codes(),
    Codes(dtype="uint16"),
    Codes(spacing="uniform"),
    Lossless(),
    Lossless(dtype="float16"),
    Lossless(dtype="bfloat16"),
    Spectral(step=0.1),
    Spectral(step=0.1, precision="bfloat16"),
    TopK(k=4),
    TopK(k=4, tail="samples", num_samples=4),
]
every_codec = pytest.mark.parametrize("spec", SPECS, ids=str)
few_codecs = pytest.mark.parametrize("spec", [Codes(), Spectral(step=0.1), TopK(k=4)], ids=str)


def decoder_for(spec, logits):
    """A decoder that has decoded nothing."""
    if isinstance(spec, Spectral):
        codec, parameters = SpectralCodec.fitted(spec, logits.shape[1], logits)
    else:
        codec = codec_for(spec, logits.shape[1])
        parameters = codec.fit(logits)
    return Decoder(codec, parameters_to(parameters, "cpu"))


def coded(spec, logits=LOGITS):
    members = logits.unbind(1)
    decoders = tuple(decoder_for(spec, member) for member in members)
    codes = tuple(
        decoder.codec.encode(member, decoder.parameters) for decoder, member in zip(decoders, members, strict=True)
    )
    return SoftTargets(codes, decoders, ("a", "b"))


def compiled(function, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@every_codec
def test_decoding_and_softening_are_one_graph_for_any_temperature(spec):
    soft_targets = coded(spec)

    def softened(codes, temperature):
        read = SoftTargets(codes, soft_targets.decoders, ("a", "b"))
        return read.probabilities(temperature, mean="arithmetic")

    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(softened, backend=counter)
    for temperature in (2.0, 0.5, 4.0, 8.0):
        found = run(soft_targets.codes, temperature)
        torch.testing.assert_close(found, soft_targets.probabilities(temperature, mean="arithmetic"))
    assert counter.frame_count == 2  # one of the first temperature, one of any


@few_codecs
def test_masked_classes_compile(spec):
    soft_targets = coded(spec, MASKED)
    found = compiled(lambda read: read.probabilities(2.0, mean="arithmetic"))(soft_targets)
    torch.testing.assert_close(found, soft_targets.probabilities(2.0, mean="arithmetic"))


@pytest.mark.parametrize(
    "spec", [Codes(), Spectral(step=0.1), pytest.param(TopK(k=4), marks=pytest.mark.slow)], ids=str
)
def test_a_graph_serves_batches_of_other_lengths(spec):
    soft_targets = coded(spec)
    run = compiled(lambda codes: SoftTargets(codes, soft_targets.decoders, ("a", "b")).logits())
    for rows in (24, 7, 13):
        torch.testing.assert_close(
            run(tuple(codes[:rows] for codes in soft_targets.codes)), soft_targets[:rows].logits(), equal_nan=True
        )


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("weights", [None, [3.0, 1.0], {"b": 1.0, "a": 3.0}], ids=str)
def test_means_weights_and_names_compile(mean, weights):
    soft_targets = coded(Codes())
    run = compiled(lambda read: read.log_probabilities(2.0, mean=mean, weights=weights, teachers=["a", "b"]))
    expected = soft_targets.log_probabilities(2.0, mean=mean, weights=weights, teachers=["a", "b"])
    torch.testing.assert_close(run(soft_targets), expected)


def test_rows_that_are_not_available_compile():
    read = coded(Codes())
    read = SoftTargets(read.codes, read.decoders, ("a", "b"), available=torch.arange(24) % 3 > 0)
    torch.testing.assert_close(compiled(lambda it: it.mean_logits())(read), read.mean_logits(), equal_nan=True)


@pytest.mark.parametrize(
    "divergence",
    [
        "forward-kl",
        "jensen-shannon",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cross-entropy", "reverse-kl", "logit-matching")),
    ],
)
@few_codecs
def test_the_loss_of_a_batch_and_its_gradient_compile(spec, divergence):
    soft_targets = coded(spec)

    def loss(student, codes, labels):
        read = SoftTargets(codes, soft_targets.decoders, ("a", "b"))
        return distillation_loss(student, read, labels, temperature=2.0, divergence=divergence)

    found, expected = (
        torch.autograd.grad(run(student, soft_targets.codes, LABELS), student)[0]
        for run, student in (
            (compiled(loss), STUDENT.clone().requires_grad_()),
            (loss, STUDENT.clone().requires_grad_()),
        )
    )
    torch.testing.assert_close(found, expected)


@few_codecs
def test_a_batch_larger_than_a_block_is_one_graph_too(spec, monkeypatch):
    soft_targets = coded(spec)
    expected = soft_targets.probabilities(2.0, mean="arithmetic")
    monkeypatch.setattr("kdcache.soft_targets.means.BLOCK_ELEMENTS", 64)
    run = compiled(
        lambda codes: SoftTargets(codes, soft_targets.decoders, ("a", "b")).probabilities(2.0, mean="arithmetic")
    )
    torch.testing.assert_close(run(soft_targets.codes), expected)


def test_a_decoder_that_decoded_before_brings_its_prepared_basis_into_the_graph():
    ready, fresh = coded(Spectral(step=0.1)), coded(Spectral(step=0.1))
    ready.logits()
    run = compiled(lambda read: read.logits())
    assert torch.equal(run(ready), run(fresh))
    assert fresh.decoders[0]._prepared == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first imported
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds with a C++ compiler, and there is no g++")
@every_codec
def test_the_default_compiler_gives_the_same_soft_targets(spec):
    soft_targets = coded(spec)
    expected = soft_targets.probabilities(2.0, mean="arithmetic")
    run = compiled(lambda read: read.probabilities(2.0, mean="arithmetic"), backend="inductor")
    torch.testing.assert_close(run(soft_targets), expected, rtol=1e-4, atol=1e-6)
