from __future__ import annotations

import re

import pytest
import torch
from tiny_caches import OPTIONS, TinyTeacher, build_tiny, files_of, tiny_teachers, tiny_transfer_set
from torch import nn

from kdcache import Codes, Lossless, Spectral, TopK, plan_cache
from kdcache.build import ModuleTeacher
from kdcache.build.inference import Inputs
from kdcache.build.pilot import pilot_batches, run_pilot
from kdcache.build.plan import make_plan
from kdcache.build.refusals import refuse_probabilities
from kdcache.build.rows import RowMap
from kdcache.build.work import StoredTeacher
from kdcache.errors import CodecError, TeacherError
from kdcache.transfer_set import Views


def inputs_of(transfer_set=None, *, codec=Codes(), num_pilot_rows=None) -> Inputs:  # noqa: B008
    transfer_set = transfer_set or tiny_transfer_set()
    fingerprint = ModuleTeacher("a", TinyTeacher()).fingerprint
    plan = make_plan(
        transfer_set,
        [fingerprint],
        codec=codec,
        num_classes=5,
        batch_size=4,
        num_pilot_rows=num_pilot_rows,
        shard_rows=16,
    )
    return Inputs(transfer_set, RowMap(plan, transfer_set.num_rows))


def pilot_of(inputs: Inputs, teacher=None):
    module = ModuleTeacher("a", teacher or TinyTeacher())
    return run_pilot(StoredTeacher("a", module, (module.fingerprint,)), inputs)


def chosen(num_pilot_rows: int, **options) -> list[int]:
    inputs = inputs_of(**options)
    return [key.batch_index for key in pilot_batches(inputs.row_map, num_pilot_rows)]


@pytest.mark.parametrize(
    ("num_pilot_rows", "batches"), [(1, [0]), (8, [0, 9]), (9, [0, 4, 9]), (20, [0, 2, 4, 7, 9]), (40, list(range(10)))]
)
def test_the_pilot_is_whole_batches_spread_over_the_transfer_set(num_pilot_rows, batches):
    assert chosen(num_pilot_rows) == batches


def test_sequences_count_their_rows():
    assert chosen(20, transfer_set=tiny_transfer_set(num_rows=[5] * 40)) == [0]


def test_the_pilots_batches_take_the_views_in_turn_and_no_example_twice():
    views = Views(transform=lambda value, _: value, num_views=3, name="same")
    inputs = inputs_of(tiny_transfer_set(views=views))
    assert pilot_batches(inputs.row_map, 20) == [(0, 0), (1, 2), (2, 4), (0, 7), (1, 9)]


def test_batches_of_other_views_that_a_pilot_kept_are_those_of_their_view(tmp_path):
    shifted = Views(transform=lambda value, generator: value + float(generator.normal()), num_views=2, name="shift")
    cache = build_tiny(tmp_path / "cache", tiny_transfer_set(views=shifted), {"a": TinyTeacher()})
    inputs = [tiny_transfer_set(views=shifted).read_inputs(range(40), view_index=index) for index in range(2)]
    found = [cache.read(range(40), view_index=index).logits()[:, 0] for index in range(2)]
    torch.testing.assert_close(torch.stack(found), TinyTeacher()(torch.stack(inputs)).detach())


def test_the_codec_is_fitted_to_the_pilots_logits():
    logits = TinyTeacher()(tiny_transfer_set().read_inputs(range(40))).detach()
    expected = pilot_of(inputs_of()).parameters
    from kdcache.codecs import codec_for

    assert expected["codebook"].tolist() == codec_for(Codes(), 5).fit(logits)["codebook"].tolist()


def test_two_pilots_fit_the_same_parameters():
    one, other = pilot_of(inputs_of()), pilot_of(inputs_of())
    assert one.parameters["codebook"].tobytes() == other.parameters["codebook"].tobytes()


def test_a_forecast_tells_the_rows_it_was_made_from():
    assert pilot_of(inputs_of(num_pilot_rows=8)).forecast.num_pilot_rows == 8


def test_a_forecast_certifies_the_pilot():
    certificate = pilot_of(inputs_of()).forecast.certificate
    assert 0 < certificate.mean_kl[0] < 1e-3


def test_a_lossless_forecast_has_no_error():
    assert pilot_of(inputs_of(codec=Lossless())).forecast.certificate.max_error_range == 0


def test_a_forecasts_times_are_measured():
    forecast = pilot_of(inputs_of(num_pilot_rows=8)).forecast
    assert forecast.inference_seconds_per_row > 0
    assert forecast.encode_seconds_per_row > 0


def test_the_logits_of_the_pilot_are_kept_for_the_tasks():
    pilot = pilot_of(inputs_of(num_pilot_rows=8))
    assert {key.batch_index: tuple(logits.shape) for key, logits in pilot.kept.items()} == {0: (4, 5), 9: (4, 5)}


def test_no_more_logits_are_kept_than_memory_allows(monkeypatch):
    monkeypatch.setattr("kdcache.build.pilot.KEPT_PILOT_BYTES", 3 * 4 * 5 * 4)
    assert len(pilot_of(inputs_of()).kept) == 3


def test_logits_that_the_codec_cannot_hold_are_refused_in_the_pilot():
    with pytest.raises(CodecError, match=r"Use Lossless\(dtype=\"float32\"\)"):
        pilot_of(inputs_of(codec=Lossless(dtype="bfloat16")))


class Given(TinyTeacher):
    """A teacher whose rows are made of its logits."""

    def __init__(self, made) -> None:
        super().__init__()
        self.made = made

    def forward(self, inputs):
        return self.made(super().forward(inputs))


PROBABILITIES = {
    "softmax": lambda logits: logits.softmax(1),
    "softmax in bfloat16": lambda logits: logits.bfloat16().softmax(1),
    "one-hot": lambda logits: (logits == logits.amax(1, keepdim=True)).float(),
    "masked by -inf": lambda logits: nn.functional.pad(logits[:, :4].softmax(1), (0, 1), value=-torch.inf),
}
LOGITS = {
    "log-probabilities": lambda logits: logits.log_softmax(1),
    "logits above 0": lambda logits: logits - logits.amin(1, keepdim=True),
    "logits that sum to 1": lambda logits: logits - logits.mean(1, keepdim=True) + 0.2,
    "all but one row": lambda logits: logits.softmax(1).index_fill(0, torch.tensor([3]), 1.0),
}


@pytest.mark.parametrize("made", PROBABILITIES.values(), ids=PROBABILITIES)
def test_a_teacher_that_gives_probabilities_is_refused(made):
    with pytest.raises(
        TeacherError, match=r"teacher 'a' gives probabilities: all 40 rows.*Return the logits.*log_soft"
    ):
        pilot_of(inputs_of(), Given(made))


@pytest.mark.parametrize("made", LOGITS.values(), ids=LOGITS)
def test_what_is_no_distribution_is_taken_for_logits(made):
    assert pilot_of(inputs_of(), Given(made)).forecast.num_pilot_rows == 40


def test_one_class_alone_is_no_distribution():
    refuse_probabilities("a", torch.ones(40, 1))


def test_a_teacher_of_probabilities_writes_nothing(tmp_path):
    with pytest.raises(TeacherError, match="Nothing of this teacher was written"):
        build_tiny(tmp_path / "cache", teachers={"a": Given(PROBABILITIES["softmax"])})
    assert list(tmp_path.iterdir()) == []


def far_off(row: int):
    """Spoil one example: in a pilot of all forty, row and example are the same."""
    far = tiny_transfer_set().read_inputs([row])

    def made(logits: torch.Tensor) -> torch.Tensor:
        is_far = torch.isclose(logits, TinyTeacher()(far)).all(1, keepdim=True)
        return torch.where(is_far & (torch.arange(5) == 4), -5000.0, logits)

    return made


def masking(row: int):
    far = far_off(row)
    return lambda logits: far(logits).masked_fill(far(logits) == -5000.0, -torch.inf)


@pytest.mark.parametrize(
    ("codec", "made", "said"),
    [
        (Codes(), far_off(7), "Row 7 spans"),
        (Codes(max_kl=1e-12), lambda logits: logits, "has a KL of"),
        (Spectral(max_kl=0.1), masking(9), "Row 9 masks"),
        (TopK(k=2, max_kl=1e-12), lambda logits: logits, "has a KL of"),
    ],
    ids=["span", "guard", "mask", "guard of topk"],
)
def test_a_refused_row_of_the_pilot_is_named_by_its_example(codec, made, said):
    with pytest.raises(CodecError, match=said) as caught:
        pilot_of(inputs_of(codec=codec), Given(made))
    row = re.search(r"Row (\d+) ", str(caught.value))[1]
    assert f"Row {row} of the pilot is of example {row} (position {row}, view 0)" in str(caught.value)
    assert str(caught.value).startswith("teacher 'a' cannot be cached so. Row")


def test_a_row_of_a_pilot_in_parts_is_named_by_its_example():
    inputs = inputs_of(num_pilot_rows=8)
    with pytest.raises(CodecError, match=r"Row 5 spans .* Row 5 of the pilot is of example 37 \(position 37, view 0\)"):
        pilot_of(inputs, Given(far_off(37)))


def test_a_held_out_row_is_counted_from_the_pilots_first():
    """The worst of a hundred rows, the last of which are held out, is named as the pilot counts it."""
    transfer_set = tiny_transfer_set(100)
    inputs = inputs_of(transfer_set, codec=Codes(max_kl=1e-12))
    with pytest.raises(
        CodecError, match=r"Row (8[89]|9.) has a KL.* Row (8[89]|9.) of the pilot is of example (8[89]|9.)"
    ):
        pilot_of(inputs)


def test_a_pilot_that_masks_all_but_one_class_is_told_what_to_look_at():
    with pytest.raises(
        CodecError, match=r"Fewer than 2 classes are unmasked .*Look at the teacher's masks .*Codes\(\)"
    ):
        pilot_of(inputs_of(codec=Spectral()), Given(lambda logits: logits.masked_fill(torch.arange(5) > 0, -torch.inf)))


# Forecasts of a whole build -------------------------------------------------------------------------------------------


def forecast(folder, **options):
    return plan_cache(folder / "cache", tiny_transfer_set(), tiny_teachers(), **{**OPTIONS, **options})


def test_planning_writes_nothing(tmp_path):
    forecast(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_planning_beside_a_finished_cache_changes_nothing(tmp_path):
    build_tiny(tmp_path / "cache")
    before = files_of(tmp_path)
    forecast(tmp_path)
    assert files_of(tmp_path) == before


def test_a_forecast_has_each_teacher(tmp_path):
    assert [teacher.name for teacher in forecast(tmp_path).teachers] == ["a", "b"]


def test_a_merged_cache_is_forecast_as_the_one_array_it_stores(tmp_path):
    assert [teacher.name for teacher in forecast(tmp_path, merge="geometric").teachers] == ["geometric-mean"]


def test_the_forecast_size_is_near_what_is_stored(tmp_path):
    made = forecast(tmp_path, codec=Codes())
    expected = made.num_bytes - sum(teacher.parameter_bytes for teacher in made.teachers)
    complete = build_tiny(tmp_path / "cache", codec=Codes()).complete
    assert sum(teacher.num_bytes for teacher in complete.teachers) == pytest.approx(expected, rel=0.5)


def test_the_forecast_size_counts_the_codecs_parameters(tmp_path):
    made = forecast(tmp_path, codec=Codes())
    assert [teacher.parameter_bytes for teacher in made.teachers] == [1024, 1024]


def test_a_forecast_counts_all_rows_of_all_views(tmp_path):
    views = Views(transform=lambda value, _: value, num_views=3, name="same")
    one = plan_cache(tmp_path / "cache", tiny_transfer_set(), tiny_teachers(), **OPTIONS)
    three = plan_cache(tmp_path / "cache", tiny_transfer_set(views=views), tiny_teachers(), **OPTIONS)
    assert three.num_bytes == 3 * one.num_bytes


def test_the_forecast_time_is_of_all_rows(tmp_path):
    made = forecast(tmp_path)
    slowest = [max(item.inference_seconds_per_row, item.encode_seconds_per_row) for item in made.teachers]
    assert made.seconds == pytest.approx(40 * sum(slowest))


def test_a_plan_is_what_the_build_writes(tmp_path):
    planned = forecast(tmp_path).plan
    build_tiny(tmp_path / "cache")
    assert (tmp_path / "cache/plans/0.json").read_bytes() == planned.to_json()


def test_the_pilot_costs_a_build_no_second_inference(tmp_path):
    teacher = TinyTeacher()
    build_tiny(tmp_path / "cache", teachers={"a": teacher}, num_classes=5)
    assert teacher.num_calls == 4


@pytest.mark.accelerator
def test_logits_on_another_device_are_fitted_alike():
    module = ModuleTeacher("a", TinyTeacher(), device="cuda")
    on_cuda = run_pilot(StoredTeacher("a", module, (module.fingerprint,)), inputs_of())
    assert on_cuda.forecast.certificate.mean_kl[0] == pytest.approx(
        pilot_of(inputs_of()).forecast.certificate.mean_kl[0], rel=0.1
    )


@pytest.mark.parametrize("tail", ["class-means", "samples"])
def test_topk_is_forecast_with_what_it_measures_at_each_temperature(tail):
    forecast = pilot_of(inputs_of(codec=TopK(k=2, tail=tail, num_samples=2))).forecast
    assert 0 < max(forecast.certificate.mean_kl) < 0.5
    assert forecast.certificate.max_error_range is None
