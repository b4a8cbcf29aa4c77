"""The lossless codec keeps bits, and refuses what it cannot keep."""

import pytest
import torch

from kdcache.codecs import LosslessCodec
from kdcache.documents import Lossless
from kdcache.errors import CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError

FLOAT32 = LosslessCodec(Lossless(dtype="float32"), 3)
FLOAT16 = LosslessCodec(Lossless(dtype="float16"), 3)
BFLOAT16 = LosslessCodec(Lossless(dtype="bfloat16"), 3)
SIMPLE = torch.tensor([[1.5, -0.25, 3.0], [-0.0, 100.0, 0.5]])


@pytest.mark.parametrize("codec", [FLOAT32, FLOAT16, BFLOAT16])
def test_decoding_gives_the_bits_that_were_encoded(codec):
    decoded = codec.decode(codec.encode(SIMPLE, {}), {})
    assert torch.equal(decoded.view(torch.int32), SIMPLE.view(torch.int32))


def test_bfloat16_is_stored_as_the_upper_half_of_the_float32_bits():
    codes = BFLOAT16.encode(SIMPLE, {})
    assert codes.view(torch.int16).tolist() == (SIMPLE.view(torch.int32) >> 16).tolist()


@pytest.mark.parametrize(
    ("codec", "dtype"), [(FLOAT32, torch.float32), (FLOAT16, torch.float16), (BFLOAT16, torch.uint16)]
)
def test_codes_have_the_stored_dtype(codec, dtype):
    assert codec.encode(SIMPLE, {}).dtype == dtype


def test_half_precision_logits_fit_float32():
    logits = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.bfloat16)
    assert torch.equal(FLOAT32.decode(FLOAT32.encode(logits, {}), {}), logits.float())


@pytest.mark.parametrize("codec", [FLOAT32, FLOAT16, BFLOAT16])
def test_codes_and_logits_share_no_memory(codec):
    logits = SIMPLE.clone()
    codes = codec.encode(logits, {})
    logits.zero_()
    codec.decode(codes, {}).zero_()
    assert torch.equal(codec.decode(codes, {}), SIMPLE)


@pytest.mark.parametrize(
    ("codec", "value", "remedy"),
    [
        (FLOAT16, 70000.0, 'Use Lossless(dtype="float32")'),
        (FLOAT16, 2.0**20, 'Use Lossless(dtype="bfloat16")'),
        (BFLOAT16, 1 + 2**-10, 'Use Lossless(dtype="float16")'),
    ],
)
def test_a_logit_that_the_dtype_cannot_hold_is_refused_with_one_that_can(codec, value, remedy):
    with pytest.raises(CodecError, match="cannot hold these float32 logits exactly") as caught:
        codec.encode(torch.tensor([[0.0, value, 1.0]]), {})
    assert remedy in str(caught.value)


def test_float64_logits_that_no_dtype_holds_are_refused_with_the_cast_to_make():
    with pytest.raises(CodecError, match="cast the teacher's logits to float32 first"):
        FLOAT32.encode(torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_with_their_row(value):
    with pytest.raises(NonFiniteLogitsError, match=r"Row 1 of the logits holds NaN or \+inf"):
        FLOAT32.encode(torch.tensor([[0.0, 0.0, 0.0], [0.0, value, 1.0]]), {})


def test_a_row_of_masked_classes_alone_is_refused():
    with pytest.raises(NonFiniteLogitsError, match="Row 1 of the logits holds nothing but -inf"):
        FLOAT32.encode(torch.tensor([[0.0, 0.0, 0.0], [-torch.inf] * 3]), {})


@pytest.mark.parametrize("codec", [FLOAT32, FLOAT16, BFLOAT16])
def test_a_masked_class_is_kept_and_is_no_hole(codec):
    masked = torch.tensor([[0.5, -torch.inf, 1.0], [-torch.inf, 0.0, -torch.inf]])
    codes = codec.encode(masked, {})
    assert not codec.is_fill(codes).any()
    assert torch.equal(codec.decode(codes, {}), masked)


def test_a_finite_logit_that_a_smaller_type_would_make_infinite_is_refused():
    with pytest.raises(CodecError, match="cannot hold"):
        FLOAT16.encode(torch.tensor([[0.0, -1e9, 1.0]]), {})


def test_there_is_nothing_to_fit():
    assert FLOAT16.fit(SIMPLE) == {}


def test_a_pilot_that_cannot_be_kept_is_refused_before_the_build():
    with pytest.raises(CodecError, match="cannot hold"):
        FLOAT16.fit(torch.tensor([[0.1, 0.2, 0.3]]))


def test_parameters_are_refused():
    with pytest.raises(CodecError, match=r"has no parameters, got \['codebook'\]"):
        FLOAT32.check_parameters({"codebook": torch.zeros(1)})


@pytest.mark.parametrize("codec", [FLOAT32, FLOAT16, BFLOAT16])
def test_a_row_with_a_fill_code_in_any_column_is_a_hole(codec):
    codes = codec.encode(SIMPLE, {})
    codes[1, 2] = codec.fill
    assert codec.is_fill(codes).tolist() == [False, True]


@pytest.mark.parametrize("codec", [FLOAT32, FLOAT16, BFLOAT16])
def test_a_fill_code_decodes_to_nan(codec):
    codes = codec.encode(SIMPLE, {})
    codes[1] = codec.fill
    assert codec.decode(codes, {}).isnan().tolist() == [[False] * 3, [True] * 3]


def test_another_class_count_is_refused():
    with pytest.raises(WrongClassCountError, match="made for 3 classes, the logits have 4"):
        FLOAT32.encode(torch.zeros(2, 4), {})


def test_logits_without_a_row_axis_are_refused():
    with pytest.raises(ShapeError, match=r"axes \[row, class\], got shape \(3,\)"):
        FLOAT32.encode(torch.zeros(3), {})


def test_integer_logits_are_refused():
    with pytest.raises(CodecError, match=r"must be floating-point numbers, got torch\.int64"):
        FLOAT32.encode(torch.zeros(2, 3, dtype=torch.int64), {})


def test_codes_of_another_teacher_are_refused():
    with pytest.raises(ShapeError, match=r"shape \[row, 3\], got \(2, 4\)"):
        FLOAT32.decode(torch.zeros(2, 4), {})


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(CodecError, match=r"stored as torch\.float16, got torch\.float32"):
        FLOAT16.decode(torch.zeros(2, 3), {})
