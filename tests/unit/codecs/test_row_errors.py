"""What coding changed in a row is never told too small, however its logits were rounded on the way."""

from __future__ import annotations

import pytest
import torch

from kdcache.codecs import measure
from kdcache.codecs.precision import UNIT_ROUNDINGS, factor_rounding, keeps_float32, quick_dtype, sum_rounding
from kdcache.codecs.row_errors import ErrorSums

NUM_CLASSES = 6000
HELD = (1.0, 2.0, 4.0)
CPU = torch.device("cpu")


@pytest.fixture
def precision():
    """Torch's settings of products, as they are told to torch 2.9 and later; undone afterwards."""
    yield torch.backends
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"


def summed(logits, errors, **rounding):
    sums = ErrorSums(logits.amax(dim=1).float(), torch.zeros(len(logits)), NUM_CLASSES)
    for columns, quarter, offsets in sums.tiles(slice(0, NUM_CLASSES)):
        quarter.copy_(logits[:, columns] / 4)
        offsets.copy_(errors[:, columns] / 4)
    return sums.row_errors(**rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top", [32.0, 64.0, 128.0])
def test_a_ceiling_holds_where_rounding_favours_the_classes_without_error(top, dtype):
    """Twenty likely classes lie just above a tie, and are rounded up; one with an error just below, and down."""
    spacing = 2 * top * UNIT_ROUNDINGS[dtype]
    logits = torch.full((1, NUM_CLASSES), -40.0, dtype=torch.float64)
    logits[0, :20], logits[0, 20] = top + spacing / 2 * 1.01, top + spacing / 2 * 0.99
    errors = torch.zeros_like(logits)
    errors[0, 20] = 0.6
    found = summed(logits.to(dtype).double(), errors, logit_rounding=sum_rounding(dtype, CPU))
    assert (measure(logits, logits + errors, HELD) <= found.kl_ceiling).all()


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDINGS), ids=str)
def test_no_number_is_rounded_by_more_than_its_types_unit(dtype):
    values = 1 + torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = (values * 3**-20).to(dtype).double() if dtype != torch.float16 else values.to(dtype).double()
    exact = values * 3**-20 if dtype != torch.float16 else values
    assert ((rounded - exact).abs() / exact).amax() <= UNIT_ROUNDINGS[dtype]


@pytest.mark.parametrize("setting", ["ieee", "none"])
def test_float32_products_are_exact_as_torch_comes(precision, setting):
    precision.mkldnn.matmul.fp32_precision = setting
    assert keeps_float32(CPU)
    assert factor_rounding(torch.float32, CPU) == 2.0**-24


@pytest.mark.parametrize(("setting", "rounding"), [("tf32", 2.0**-11), ("bf16", 2.0**-8)])
def test_reduced_precision_is_seen_however_it_was_asked_for(precision, setting, rounding):
    precision.mkldnn.matmul.fp32_precision = setting
    assert not keeps_float32(CPU)
    assert factor_rounding(torch.float32, CPU) == rounding


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("setting", "rounding"), [("high", 2.0**-11), ("medium", 2.0**-8)])
def test_the_older_setting_is_seen_too(setting, rounding):
    torch.set_float32_matmul_precision(setting)
    assert factor_rounding(torch.float32, CPU) == rounding


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_rows_are_measured_whatever_products_may_round(precision, backend):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(3, NUM_CLASSES, dtype=torch.float64, generator=generator)
    errors = 0.1 * torch.randn(3, NUM_CLASSES, dtype=torch.float64, generator=generator)
    getattr(precision, backend).matmul.fp32_precision = "tf32"
    assert torch.allclose(summed(logits, errors).kl, measure(logits, logits + errors, HELD), rtol=1e-3)


INSTRUCTIONS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_amx_fp16_supported")


@pytest.mark.parametrize("has_them", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_of_16_bits_where_the_processor_has_instructions_for_them(monkeypatch, dtype, has_them):
    for name in INSTRUCTIONS:
        monkeypatch.setattr(torch.cpu, name, lambda: has_them, raising=False)
    assert quick_dtype(dtype, CPU) == (dtype if has_them else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_of_wider_types_stay_as_they_are(dtype):
    assert quick_dtype(dtype, CPU) == dtype


def test_an_accelerator_has_instructions_of_its_own():
    assert quick_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
