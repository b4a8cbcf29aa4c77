"""Rate control: the codec is chosen from what was measured, and says what it came to."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.build import build_cache, plan_cache
from kdcache.build.plan import choose_layout
from kdcache.build.refusals import nothing_meets
from kdcache.documents import Codes, Lossless, RateTarget, Spectral, TopK
from kdcache.errors import CodecError, DocumentError, OptionError
from kdcache.store import CacheStore
from kdcache.transfer_set import TransferSet


class Head(torch.nn.Module):
    """A network whose logits span few dimensions, whatever its classes."""

    def __init__(self, num_hidden=6, num_classes=400):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = torch.nn.Parameter(torch.randn(num_hidden, num_classes, generator=generator))

    def forward(self, hidden):
        return hidden @ self.head


def hidden(num_rows, *, scale=1.0):
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(1)) * scale


ROWS = TransferSet.from_arrays(hidden(3000))
FEW_ROWS = TransferSet.from_arrays(hidden(20))


def chosen(tmp_path, transfer_set=ROWS, **options):
    return plan_cache(tmp_path / "cache", transfer_set, {"a": Head()}, **options).teachers[0]


def test_many_classes_of_few_dimensions_are_stored_along_axes(tmp_path):
    assert chosen(tmp_path, max_kl=0.01).codec == Spectral(max_kl=0.01, rank=6)


def test_a_basis_that_costs_more_than_the_rows_is_not_chosen(tmp_path):
    assert chosen(tmp_path, FEW_ROWS, max_kl=0.01).codec == Codes(max_kl=0.01)


def test_the_choice_is_the_smallest_of_those_that_meet_the_target(tmp_path):
    found = chosen(tmp_path, max_kl=0.01)
    meeting = [point for point in found.points if max(point.certificate.mean_kl[:3]) <= 0.01]
    sizes = [point.bytes_over(3000) for point in meeting]
    assert 3000 * found.bytes_per_row + found.parameter_bytes == min(sizes)


class Capped(Head):
    """A network whose logits span all dimensions, the more faintly the further."""

    def forward(self, hidden):
        return 5 * torch.tanh(hidden @ self.head / 5)


def test_a_basis_is_cut_where_it_outweighs_its_rows(tmp_path):
    found = plan_cache(tmp_path / "cache", ROWS, {"a": Capped()}, max_kl=0.05, num_pilot_rows=1500).teachers[0]
    ranks = {point.codec.rank for point in found.points if isinstance(point.codec, Spectral)}
    full = max(ranks)
    assert full > 300
    assert {full // 2, full // 4} <= ranks
    assert found.codec.rank < full


def test_a_budget_of_bytes_is_kept(tmp_path):
    found = chosen(tmp_path, bytes_per_row=20)
    assert 10 < found.bytes_per_row + found.parameter_bytes / 3000 <= 20


@pytest.mark.slow
def test_a_basis_that_is_chosen_for_a_budget_has_a_target_and_keeps_it(tmp_path):
    cache = build_cache(tmp_path / "cache", ROWS, {"a": Head()}, bytes_per_row=20)
    codec = cache.teachers["a"].codec
    assert (codec.kind, codec.rank, codec.step) == ("spectral", 6, None)
    certificate = cache.certificate(1.0)
    assert certificate.mean_kl <= codec.max_kl
    assert certificate.max_kl <= certificate.kl_bound <= 2 * codec.max_kl


@pytest.mark.slow
def test_where_a_basis_takes_most_of_a_budget_smaller_ones_are_measured_too(tmp_path):
    few = TransferSet.from_arrays(hidden(300) * torch.tensor([2.0, 1.0, 0.5, 0.1, 0.05, 0.02]))
    points = chosen(tmp_path, few, bytes_per_row=45).points
    assert {6, 3} <= {point.codec.rank for point in points if isinstance(point.codec, Spectral)}


def test_a_generous_budget_leaves_room_for_rows_that_lie_further_out(tmp_path):
    cache = build_cache(tmp_path / "cache", ROWS, {"a": Head()}, bytes_per_row=500, num_pilot_rows=128)
    assert cache.certificate(1.0).kl_bound <= 1e-3


@pytest.mark.slow
def test_where_a_basis_takes_little_of_a_budget_it_is_not_cut(tmp_path):
    points = chosen(tmp_path, bytes_per_row=20).points
    assert {point.codec.rank for point in points if isinstance(point.codec, Spectral)} == {6}


@pytest.mark.slow
def test_as_many_classes_are_kept_as_a_budget_allows(tmp_path):
    points = [point for point in chosen(tmp_path, bytes_per_row=200).points if isinstance(point.codec, TopK)]
    within = [point for point in points if point.bytes_over(3000) <= 200 * 3000]
    most = max(within, key=lambda point: point.codec.k)
    assert most.codec.k > 64
    assert most.bytes_over(3000) > 0.8 * 200 * 3000


@pytest.mark.slow
def test_a_sampled_tail_is_no_candidate_because_its_kl_leaves_out_the_tail(tmp_path):
    tails = {point.codec.tail for point in chosen(tmp_path, bytes_per_row=30).points if isinstance(point.codec, TopK)}
    assert tails == {"class-means"}


@pytest.mark.slow
def test_a_larger_budget_is_more_faithful(tmp_path):
    small, large = (chosen(tmp_path, bytes_per_row=budget).certificate.mean_kl[0] for budget in (8, 12))
    assert large < small / 2


def test_a_budget_that_nothing_keeps_is_refused_with_what_was_measured(tmp_path):
    with pytest.raises(CodecError, match="No codec reaches bytes_per_row=1 on the pilot's held-out rows") as caught:
        chosen(tmp_path, bytes_per_row=1)
    lines = str(caught.value).split("\n")
    assert re.fullmatch(r"  uint16 codes: \S+ bytes a row \(\S+ of codes and 87\.38 of parameters\) at .*", lines[2])
    assert re.match(r"Ask for at least \d\.\d+ bytes a row, which the smallest .* takes, basis of 6, max_kl", lines[-1])


def test_a_budget_that_parameters_alone_pass_says_so():
    small = SimpleNamespace(bytes_per_row=3.0, parameter_bytes=1000, mean_kl=0.1)
    large = SimpleNamespace(bytes_per_row=30.0, parameter_bytes=0, mean_kl=0.2)
    said = nothing_meets(RateTarget(bytes_per_row=1.0), [(TopK(k=8), large), (Codes(), small)], 50)
    assert (
        "Ask for at least 23 bytes a row, which the smallest that was measured takes, uint8 codes (most of it " in said
    )
    assert "parameters: 1,000 bytes that only 50 rows share)" in said


def test_what_a_refused_budget_is_told_to_ask_for_is_never_too_little():
    small = SimpleNamespace(bytes_per_row=10.011, parameter_bytes=0, mean_kl=0.1)
    assert "Ask for at least 10.1 bytes" in nothing_meets(RateTarget(bytes_per_row=1.0), [(Codes(), small)], 50)


def test_a_target_that_nothing_reaches_asks_for_a_larger_one():
    small = SimpleNamespace(bytes_per_row=3.0, parameter_bytes=0, mean_kl=0.1)
    said = nothing_meets(RateTarget(max_kl=0.01), [(Codes(), small)], 50)
    assert said.endswith("at a mean KL of 0.1\nAsk for a larger max_kl, or give a codec yourself.")


def test_where_nothing_could_be_coded_there_is_nothing_to_ask_for():
    assert "Nothing could be coded. Give a codec yourself." in nothing_meets(RateTarget(max_kl=0.01), [], 50)


def test_the_whole_cache_meets_the_target_in_the_mean(tmp_path):
    build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01)
    cache = open_cache(tmp_path / "cache")
    assert max(cache.certificate(temperature).mean_kl for temperature in (1.0, 2.0, 4.0)) <= 0.01


def test_no_row_of_the_cache_exceeds_twice_the_target(tmp_path):
    build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01)
    cache = open_cache(tmp_path / "cache")
    assert max(cache.certificate(temperature).max_kl for temperature in (1.0, 2.0, 4.0)) <= 0.02


def test_the_plan_keeps_the_target_and_the_teacher_the_codec(tmp_path):
    cache = build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01)
    plan = plan_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01).plan
    assert plan.codec == RateTarget(max_kl=0.01)
    assert cache.teachers["a"].codec == Spectral(max_kl=0.01, rank=6)


def test_building_again_goes_on_with_the_chosen_codec(tmp_path):
    first = build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01).complete
    assert build_cache(tmp_path / "cache", ROWS, {"a": Head()}).complete == first


def test_soft_targets_come_from_the_axes_at_any_temperature(tmp_path):
    cache = build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=1e-4)
    expected = torch.softmax(Head()(hidden(3000)[[5, 7]]) / 3, dim=1)
    assert torch.allclose(cache.read([5, 7]).probabilities(3.0), expected, atol=0.02)


def test_a_target_and_a_codec_exclude_each_other(tmp_path):
    with pytest.raises(OptionError, match="codec and max_kl exclude each other"):
        chosen(tmp_path, codec=Codes(), max_kl=0.01)


def test_a_target_of_nothing_is_refused():
    with pytest.raises(DocumentError, match="one of max_kl and bytes_per_row"):
        RateTarget.make()


class Shifted(Head):
    """Leaves the span of its head where its first hidden unit is large."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        noise = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(5)) * 4
        return torch.where(hidden[:, :1] > 100, noise, logits)


def test_a_row_that_no_step_can_code_stops_the_build_by_its_number(tmp_path):
    rows = hidden(3000)
    rows[300, 0] = 1000.0
    with pytest.raises(CodecError, match=r"shard 0 of teacher 'a' cannot be encoded.*Row 300 .*Codes.*are kept"):
        build_cache(
            tmp_path / "cache", TransferSet.from_arrays(rows), {"a": Shifted()},
            codec=Spectral(max_kl=0.01), num_pilot_rows=64, batch_size=16,
        )  # fmt: skip


class Rounded(Head):
    """Runs in bfloat16, and says so or casts its logits to float32 at the end."""

    def __init__(self, dtype, num_classes=400):
        super().__init__(num_classes=num_classes)
        self.dtype = dtype

    def forward(self, hidden):
        return super().forward(hidden).bfloat16().to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_counts_as_no_component(tmp_path, dtype):
    build_cache(tmp_path / "cache", ROWS, {"a": Rounded(dtype)}, max_kl=0.01)
    cache = open_cache(tmp_path / "cache")
    assert cache.teachers["a"].codec == Spectral(max_kl=0.01, rank=6)
    assert max(cache.certificate(temperature).max_kl for temperature in (1.0, 2.0, 4.0)) <= 0.02


def test_a_target_below_the_rounding_is_met_by_a_basis_that_holds_it(tmp_path):
    points = plan_cache(tmp_path / "cache", ROWS, {"a": Rounded(torch.float32)}, max_kl=1e-6).teachers[0].points
    (rank,) = [point.codec.rank for point in points if isinstance(point.codec, Spectral) and point.codec.max_kl == 1e-6]
    assert 390 < rank < 400


def test_sixteen_bits_are_kept_as_they_are_where_codes_are_too_coarse(tmp_path):
    found = plan_cache(tmp_path / "cache", FEW_ROWS, {"a": Rounded(torch.bfloat16)}, max_kl=1e-9).teachers[0]
    assert found.codec == Lossless(dtype="bfloat16")


class Narrow(torch.nn.Linear):
    """Five classes, of which a row of codes takes six bytes; one is all but masked where the first input is large."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(6, 5)

    def forward(self, hidden):
        logits = super().forward(hidden.clamp(-3, 3))
        far = (hidden[:, :1] > 50) & (torch.arange(5) == 2)
        return torch.where(far, -1000.0, logits)


def narrow(tmp_path, *, far_row=None, **options):
    rows = hidden(400)
    if far_row is not None:
        rows[far_row, 0] = 99.0
    options = {"max_kl": 1e-4, "num_pilot_rows": 64, "batch_size": 16, **options}
    return build_cache(tmp_path / "cache", TransferSet.from_arrays(rows), {"a": Narrow()}, **options)


def test_codes_chosen_for_a_target_keep_it_where_every_task_reads_it(tmp_path):
    narrow(tmp_path)
    assert CacheStore.at(tmp_path / "cache").teacher("a").codec == Codes(max_kl=1e-4)


def test_codes_chosen_for_a_budget_have_no_target(tmp_path):
    assert narrow(tmp_path, max_kl=None, bytes_per_row=14).teachers["a"].codec == Codes()


def test_a_row_unlike_the_pilot_that_codes_cannot_hold_stops_the_build_by_its_number(tmp_path):
    message = (
        r"shard 4 of teacher 'a' cannot be encoded\. Row 44 has a KL of .* where max_kl=0.0001 allows a row twice of it"
        r'.*At a new address, use Codes\(dtype="uint16"\) .*'
        r"Row 44 of the shard is of example 300 \(position 300, view 0\).*published are kept"
    )
    with pytest.raises(CodecError, match=message):
        narrow(tmp_path, far_row=300)
    assert 4 not in CacheStore.at(tmp_path / "cache").records("a")


def test_a_build_that_goes_on_elsewhere_still_guards_its_rows(tmp_path):
    for options in ({}, {"max_kl": None}):  # the second call says nothing of the target
        with pytest.raises(CodecError, match="Row 44 has a KL"):
            narrow(tmp_path, far_row=300, **options)


def test_a_codec_that_is_named_with_a_target_is_guarded(tmp_path):
    with pytest.raises(CodecError, match=r"max_kl=0\.001 allows"):
        narrow(tmp_path, far_row=300, max_kl=None, codec=Codes(max_kl=1e-3))


def test_a_target_that_the_pilots_rows_break_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CodecError, match="has a KL"):
        narrow(tmp_path, max_kl=None, codec=TopK(k=1, max_kl=1e-5))
    assert not (tmp_path / "cache").exists()


class Peaked(Narrow):
    """Sure of all inputs but those whose first number is large: of these all classes but one are near."""

    def forward(self, hidden):
        sure = 30.0 * torch.nn.functional.one_hot(super().forward(hidden).argmax(dim=1), 5)
        return torch.where(hidden[:, :1] > 50, torch.tensor([0.0, -0.1, -0.2, -30, -0.3]), sure)


def test_a_row_unlike_the_pilot_that_topk_cannot_hold_stops_the_build(tmp_path):
    rows = hidden(400)
    rows[300, 0] = 99.0
    options = {"codec": TopK(k=1, max_kl=0.02), "num_pilot_rows": 64, "batch_size": 16}
    with pytest.raises(CodecError, match=r"Row 44 has a KL.*use Spectral\(max_kl=0\.02\), a larger k"):
        build_cache(tmp_path / "cache", TransferSet.from_arrays(rows), {"a": Peaked()}, **options)


class Patternless(torch.nn.Module):
    """Logits that no basis is smaller than: each row's are drawn anew."""

    def forward(self, hidden):
        seeds = (hidden[:, 0].double() * 1e6).round().long().tolist()
        draws = [torch.randn(3000, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return 2 * torch.stack(draws)


PATTERNLESS = TransferSet.from_arrays(hidden(300))


def patternless(tmp_path, **options):
    return build_cache(
        tmp_path / "cache", PATTERNLESS, {"a": Patternless()},
        max_kl=0.001, num_pilot_rows=80, batch_size=16, shard_rows=256, **options,
    )  # fmt: skip


def test_chunks_are_laid_out_for_the_codec_that_was_chosen(tmp_path):
    cache = patternless(tmp_path)
    store = CacheStore.at(tmp_path / "cache")
    document = store.teacher("a")
    assert document.codec == Codes(max_kl=1e-3)
    assert store.cache_document().chunk_rows == 256
    assert (
        document.chunk_rows == choose_layout(Codes(), num_classes=3000, num_rows=300, shard_rows=256).chunk_rows == 64
    )
    assert store.zarr_group()["teachers/a/codes"].chunks == (64, 3001)
    logits = Patternless()(hidden(300)[[3, 299]])
    assert torch.allclose(cache.read([3, 299]).probabilities(2.0), torch.softmax(logits / 2, dim=1), atol=1e-3)
    assert verify_cache(tmp_path / "cache").is_sound


def test_chunk_rows_that_were_asked_for_stay(tmp_path):
    patternless(tmp_path, chunk_rows=128)
    store = CacheStore.at(tmp_path / "cache")
    assert store.teacher("a").chunk_rows is None
    assert store.zarr_group()["teachers/a/codes"].chunks == (128, 3001)


def test_a_build_that_goes_on_without_the_option_keeps_chunk_rows_that_were_asked_for(tmp_path):
    first = patternless(tmp_path, chunk_rows=128)
    (tmp_path / "cache/complete.json").unlink()
    shutil.rmtree(tmp_path / "cache/teachers/a")
    shutil.rmtree(tmp_path / "cache/commits/a")
    again = build_cache(tmp_path / "cache", PATTERNLESS, {"a": Patternless()})
    assert again.complete == first.complete


def test_building_again_without_chunk_rows_is_the_same_plan(tmp_path):
    assert patternless(tmp_path).complete == patternless(tmp_path).complete


def test_a_teacher_added_later_has_the_chunks_of_its_own_codec(tmp_path):
    patternless(tmp_path)
    build_cache(
        tmp_path / "cache", PATTERNLESS, {"a": Patternless(), "b": Head(num_classes=3000)}, add_teachers=True
    )  # fmt: skip
    store = CacheStore.at(tmp_path / "cache")
    chunks = {name: store.zarr_group()[f"teachers/{name}/codes"].chunks for name in "ab"}
    assert chunks == {"a": (64, 3001), "b": (256, 7)}


def test_a_basis_that_is_narrow_has_larger_chunks_than_the_plan_reckoned_with(tmp_path):
    build_cache(tmp_path / "cache", ROWS, {"a": Head()}, max_kl=0.01, shard_rows=1024)
    document = CacheStore.at(tmp_path / "cache").teacher("a")
    assert (document.codec.rank, document.chunk_rows) == (6, 1024)


class Wide(Head):
    """So wide that the finest steps of a search are beyond what codes reach."""

    def forward(self, hidden):
        return super().forward(hidden) * 60


@pytest.mark.slow
def test_a_generous_budget_is_kept_by_wide_logits(tmp_path):
    found = plan_cache(tmp_path / "cache", ROWS, {"a": Wide()}, bytes_per_row=60).teachers[0]
    assert found.bytes_per_row + found.parameter_bytes / 3000 <= 60


class Masking(Head):
    """Masks another class in each row."""

    def forward(self, hidden):
        masked = torch.arange(400) == hidden.abs().sum(dim=1, keepdim=True).mul(1000).long() % 400
        return super().forward(hidden).masked_fill(masked, -torch.inf)


def test_masks_that_differ_by_row_are_left_to_the_codecs_that_keep_them(tmp_path):
    assert plan_cache(tmp_path / "cache", ROWS, {"a": Masking()}, max_kl=0.01).teachers[0].codec.kind == "codes"


def test_a_float64_teacher_with_more_classes_than_pilot_rows_is_coded(tmp_path):
    class Double(Head):
        def forward(self, hidden):
            return super().forward(hidden).double()

    found = plan_cache(tmp_path / "cache", ROWS, {"a": Double()}, max_kl=0.01, num_pilot_rows=256)
    assert found.teachers[0].codec.kind == "spectral"


@pytest.mark.slow
def test_the_choice_rests_on_every_held_out_row(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.build.task.MEASURED_ELEMENTS", 400)  # the certificate measures one row
    assert chosen(tmp_path, max_kl=0.01).codec.kind == "spectral"
