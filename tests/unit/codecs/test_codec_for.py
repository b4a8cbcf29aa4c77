"""`codec_for` makes the codec that a spec describes."""

import pytest
import torch

from kdcache.codecs import CodesCodec, LosslessCodec, TopKCodec, codec_for, parameters_to
from kdcache.documents import Codes, Lossless, TopK
from kdcache.errors import CodecError


def test_a_lossless_spec_gives_the_lossless_codec():
    assert codec_for(Lossless(dtype="float16"), 7) == LosslessCodec(Lossless(dtype="float16"), 7)


def test_a_codes_spec_gives_the_codes_codec():
    assert codec_for(Codes(dtype="uint16"), 7) == CodesCodec(Codes(dtype="uint16"), 7)


def test_a_topk_spec_gives_the_topk_codec():
    assert codec_for(TopK(k=3), 7) == TopKCodec(TopK(k=3), 7)


@pytest.mark.parametrize("spec", [Lossless(), Codes()], ids=str)
def test_codecs_that_keep_every_logit_ignore_the_temperature(spec):
    codec, logits = codec_for(spec, 3), torch.tensor([[3.0, 1.0, -2.0]])
    parameters = parameters_to(codec.fit(logits), "cpu")
    codes = codec.encode(logits, parameters)
    assert torch.equal(codec.decode(codes, parameters, temperature=7.0), codec.decode(codes, parameters))


@pytest.mark.parametrize(
    ("spec", "depends_on_temperature", "is_normalised"),
    [
        (Lossless(), False, False),
        (Codes(), False, False),
        (TopK(), True, False),
        (TopK(tail="samples"), True, True),
    ],
    ids=str,
)
def test_a_codec_says_what_it_decodes_to(spec, depends_on_temperature, is_normalised):
    codec = codec_for(spec, 3)
    assert (codec.depends_on_temperature, codec.is_normalised) == (depends_on_temperature, is_normalised)


@pytest.mark.parametrize("spec", [Lossless(), Codes(), TopK()])
def test_a_codec_without_classes_is_refused(spec):
    with pytest.raises(CodecError, match="at least 1 class, got num_classes=0"):
        codec_for(spec, 0)


@pytest.mark.parametrize(
    ("spec", "num_columns", "storage_dtype"),
    [
        (Lossless(dtype="float32"), 10, "float32"),
        (Lossless(dtype="float16"), 10, "float16"),
        (Lossless(dtype="bfloat16"), 10, "uint16"),
        (Codes(dtype="uint8"), 11, "uint8"),
        (Codes(dtype="uint16"), 11, "uint16"),
    ],
)
def test_columns_and_storage_follow_the_format(spec, num_columns, storage_dtype):
    codec = codec_for(spec, 10)
    assert (codec.num_columns, codec.storage_dtype) == (num_columns, storage_dtype)


@pytest.mark.parametrize(
    ("spec", "fill"), [(Lossless(dtype="bfloat16"), 65535), (Codes(dtype="uint8"), 255), (Codes(dtype="uint16"), 65535)]
)
def test_integer_codes_reserve_their_largest_value_for_holes(spec, fill):
    assert codec_for(spec, 10).fill == fill


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floating_point_codes_reserve_nan_for_holes(dtype):
    fill = codec_for(Lossless(dtype=dtype), 10).fill
    assert fill != fill  # noqa: PLR0124 - only NaN differs from itself
