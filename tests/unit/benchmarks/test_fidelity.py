"""The fidelity benchmark: its measures against hand-made cases, its bytes against real caches, its tables."""

import math
from dataclasses import dataclass

import pytest
import torch

import kdcache
from benchmarks.fidelity import report
from benchmarks.fidelity.lineup import peer_entries
from benchmarks.fidelity.measures import FLOOR, compare
from benchmarks.fidelity.ours import Ours
from benchmarks.fidelity.peers import TinyViT
from benchmarks.fidelity.peers.base import bytes_of
from benchmarks.fidelity.rates import rates
from benchmarks.fidelity.subjects import Subject
from kdcache.codecs import measure

NUM_CLASSES = 300


def logits_of(num_rows=64, seed=1):
    return torch.randn(num_rows, NUM_CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


@dataclass(frozen=True)
class Kept:
    """Keeps probabilities for one temperature, whatever they are."""

    name: str = "kept"
    setting: str = ""

    def log_soft_targets(self, kept, temperature):  # noqa: ARG002 - one for all temperatures
        return kept["probabilities"].log()


def fidelity_of(probabilities, logits, temperature=1.0):
    return compare([Kept()], logits, [{"probabilities": probabilities}], [temperature])[0][0]


def test_what_is_kept_exactly_has_no_divergence_or_distance():
    logits = logits_of().double()
    fidelity = fidelity_of((logits / 2).softmax(1), logits, 2.0)
    assert max(fidelity.kl_max, fidelity.head_kl_mean, fidelity.l1_max, fidelity.bias_l1) < 1e-12


def test_divergence_and_distance_are_those_of_two_coins():
    fidelity = fidelity_of(torch.tensor([[0.25, 0.75]], dtype=torch.float64), torch.zeros(1, 2))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert (fidelity.kl_mean, fidelity.l1_mean) == pytest.approx((expected, 0.5))


def test_a_class_left_out_makes_a_row_infinite_and_its_divergence_that_of_the_floor():
    fidelity = fidelity_of(torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64), torch.zeros(2, 2))
    floored = torch.tensor([FLOOR, 1.0], dtype=torch.float64) / (1 + FLOOR)
    expected = 0.5 * (0.5 / floored).log().sum()
    assert fidelity.infinite_rows == 0.5
    assert fidelity.kl_max == pytest.approx(float(expected))


def test_a_class_that_the_teacher_masks_may_be_left_out():
    fidelity = fidelity_of(torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[-torch.inf, 0.0]]))
    assert (fidelity.infinite_rows, fidelity.kl_mean, fidelity.l1_mean) == (0, 0, 0)


def test_coarse_divergence_is_below_the_divergence_of_all_classes():
    logits = logits_of()
    peer = TinyViT(NUM_CLASSES, k=20)
    (fidelity,) = compare([peer], logits, [peer.encode(logits)], [1.0])[0]
    assert 0 < fidelity.head_kl_mean < fidelity.kl_mean


def test_errors_that_cancel_over_rows_leave_no_bias():
    stored = torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64)
    fidelity = fidelity_of(stored, torch.zeros(2, 2))
    assert (fidelity.l1_mean, fidelity.bias_l1) == (0.5, 0)


@pytest.fixture
def ours(tmp_path):
    return Ours("codes", "uint8", kdcache.Codes(), logits_of(512), tmp_path / "cache")


def test_our_divergence_is_the_one_that_kdcache_certifies(ours):
    logits = logits_of(64, seed=2)
    kept = ours.encode(logits)
    expected = measure(logits, ours.decoder.decode(kept["codes"]), [2.0]).mean()
    assert compare([ours], logits, [kept], [2.0])[0][0].kl_mean == pytest.approx(float(expected), rel=1e-6)


def test_our_bytes_add_up_to_the_cache_on_disk(ours, tmp_path):
    sizes = ours.sizes(ours.encode(logits_of(512)))
    folder = tmp_path / "cache"
    codes_bytes = bytes_of(folder / "teachers" / "teacher" / "codes")
    others = 512 * sizes.metadata_row_bytes
    assert bytes_of(folder) == pytest.approx(codes_bytes + others + sizes.parameter_bytes)


def test_our_row_bytes_are_those_of_the_caches_own_shard(ours, tmp_path):
    sizes = ours.sizes(ours.encode(logits_of(512)))
    shards = [path for path in (tmp_path / "cache/teachers/teacher/codes/c").rglob("*") if path.is_file()]
    assert sizes.row_bytes == pytest.approx(sum(path.stat().st_size for path in shards) / 512, rel=0.02)


@pytest.fixture
def entries(tmp_path):
    subject = Subject("made up", "row", logits_of(300), logits_of(300, seed=2))
    return peer_entries(subject, [90.0], tmp_path)


def test_systems_given_a_budget_stay_near_it_from_below(entries):
    sized = [entry.sizes.row_bytes for entry in entries if not entry.is_default]
    assert len(sized) == 6
    assert all(45 < row_bytes < 100 for row_bytes in sized)


def test_every_entry_gets_its_rates(entries):
    measured = rates(entries[:3], logits_of(300, seed=2))
    assert len(measured) == 3
    assert min(one.encode_rows_per_second for one in measured) > 0


def line(family, setting="k=1", *, teacher="smollm2", is_ours=False, row_bytes=100.0, infinite=0.0):
    figures = {"kl_mean": 0.01, "kl_max": 0.5, "infinite_rows": infinite, "l1_mean": 0.1, "bias_l1": 0.02}
    return {
        "teacher": teacher, "family": family, "setting": setting, "is_ours": is_ours, "is_default": True,
        "row_bytes": row_bytes, "metadata_row_bytes": 3.0, "parameter_bytes": 30_000 if is_ours else 0,
        "encode_rows_per_second": 1000.0, "decode_rows_per_second": 2000.0,
        "fidelity": dict.fromkeys(("1", "1.5", "2", "4", "10", "20"), figures),
    }  # fmt: skip


LINES = [
    line("kdcache spectral", is_ours=True),
    line("DistillKit, leftover^(1/T)", "k=128", row_bytes=300.0),
    line("TinyViT", "k=100", row_bytes=90.0, infinite=1.0),
]


def test_tables_mark_ours_and_formats_whose_divergence_is_infinite():
    rows = report.fidelity_table(LINES, "smollm2").splitlines()
    assert rows[2].startswith("| **kdcache spectral** |")
    assert ["*" in row.replace("**", "") for row in rows[2:]] == [False, False, True]


def test_cost_tables_give_the_rows_at_which_a_basis_has_paid():
    rows = report.rates_table(LINES, {"smollm2": 0.01}).splitlines()
    assert rows[2].endswith("| 150 / never |")
    assert "| 10.00% |" in rows[2]


def test_pictures_of_equal_figures_are_equal(tmp_path):
    first, second = (report.draw(LINES, tmp_path / name) for name in ("a", "b"))
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
