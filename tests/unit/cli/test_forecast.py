"""`kdcache plan` on a job whose logits have a basis: tables, advice, picture and options."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest

from kdcache import cli
from kdcache.cli.forecast import advice

SOURCES = '''
import torch
from torch import nn

from kdcache import TransferSet


def transfer_set():
    return TransferSet.from_arrays(torch.randn(400, 4, generator=torch.Generator().manual_seed(0)))


class Masking(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).masked_fill((inputs[:, :1] > 1.5) & (torch.arange(40) == 3), -torch.inf)


def masking():
    torch.manual_seed(0)
    return Masking(4, 40)


def teacher(seed, num_classes=40):
    torch.manual_seed(seed)
    made = nn.Linear(4, num_classes)
    nn.init.normal_(made.weight, std=2)
    return made


def masking_teacher(seed):
    """Masks a class by a large number, which uint8 codes do not reach."""
    made = teacher(seed, num_classes=80)
    with torch.no_grad():
        made.weight[3] = 0
        made.bias[3] = -2000
    return made
'''

JOB = """
name = "tiny"

[cache]
address = "cache"
max_kl = 0.01

[transfer_set]
factory = "forecast_sources:transfer_set"

[[teachers]]
name = "a"
factory = "forecast_sources:teacher"
arguments = { seed = 0 }
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return " ".join(self.out.split())

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def teacher(self):
        return self.json["teachers"][0]


@pytest.fixture
def job(tmp_path):
    (tmp_path / "forecast_sources.py").write_text(SOURCES)
    (tmp_path / "job.toml").write_text(JOB)
    yield tmp_path / "job.toml"
    sys.modules.pop("forecast_sources", None)


@pytest.fixture
def plan(job, monkeypatch, capsys):
    def run_plan(*arguments) -> Ended:
        monkeypatch.setattr(sys, "argv", ["kdcache", "plan", str(job), *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr("kdcache.cli.output.console._width", 160)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run_plan


def change(job: Path, old: str, new: str) -> None:
    text = job.read_text()
    assert old in text
    job.write_text(text.replace(old, new))


# advice ---------------------------------------------------------------------------------------------------------------


def test_a_wide_teachers_basis_is_stated_on_disk_and_in_memory():
    (sentence,) = advice(128_000, 10_000_000, rank=4096)
    assert "1.05 GB on disk" in sentence
    assert "2.1 GB in float32 or 1.05 GB in bfloat16" in sentence


def test_a_wide_teacher_is_told_the_ranks_that_halve_and_quarter_it():
    (sentence,) = advice(128_000, 10_000_000, rank=4096)
    assert "rank=2048 halves that, rank=1024 quarters it" in sentence


def test_few_rows_are_told_what_their_share_of_the_basis_is():
    (sentence,) = advice(1000, 1000, rank=999, codes_bytes_per_row=900.0)
    assert "a basis costs 2,006 bytes a row when 1,000 rows share it" in sentence
    assert "more than all of a row's uint8 codes (900)" in sentence


def test_too_few_rows_for_a_basis_are_told_how_many_it_takes():
    assert advice(1000, 40) == ("Few rows: 40 are too few to fit a basis to; it takes 64.",)


def test_few_classes_are_told_that_little_can_be_saved():
    (sentence,) = advice(10, 1_000_000)
    assert sentence.startswith("Few classes: uint8 codes keep a whole row in at most 11 bytes")


def test_a_usual_teacher_needs_no_advice():
    assert advice(1000, 1_000_000, rank=999) == ()


# what is shown --------------------------------------------------------------------------------------------------------


def test_the_choice_is_shown_in_words(plan):
    assert "a basis of 4, max_kl 0.01 " in plan().said


def test_every_point_is_shown_and_one_is_marked(plan):
    said = plan().said
    assert [f"max_kl {target}" in said for target in ("0.16", "0.04", "0.0025", "0.000625")] == [True] * 4
    assert said.count(" chosen ") == 2  # the first is the title of the choices


def test_one_codec_alone_makes_no_second_table(job, plan):
    change(job, "max_kl = 0.01", 'codec = { kind = "codes" }')
    assert "measured" not in plan().said


def test_the_break_even_is_shown(plan):
    assert "break-even rows of the basis against" in plan().said


SECOND_TEACHER = JOB[JOB.index("[[teachers]]") :].replace('"a"', '"b"')


@pytest.mark.parametrize("masking", ["a", "b"])
def test_a_break_even_that_one_of_several_teachers_has_not_is_a_dash(job, plan, masking):
    change(job, "seed = 0", "seed = 0, num_classes = 80")
    job.write_text(job.read_text() + SECOND_TEACHER.replace("seed = 0", "seed = 1, num_classes = 80"))
    head, name, tail = job.read_text().partition(f'name = "{masking}"')
    tail = tail.replace("sources:teacher", "sources:masking_teacher", 1).replace(", num_classes = 80", "", 1)
    job.write_text(head + name + tail)
    ended = plan()
    assert (ended.code, ended.err) == (0, "")
    cells = {line.split()[0]: line.split()[-1] for line in break_even_lines(ended.out)}
    assert {name: cell == "-" for name, cell in cells.items()} == {"a": masking == "a", "b": masking == "b"}


def break_even_lines(out: str) -> list[str]:
    lines = out[out.index("break-even rows") :].splitlines()
    return [line for line in lines if line.split()[:1] in (["a"], ["b"])]


def test_advice_is_shown(job, plan):
    change(job, "seed = 0", "seed = 0, num_classes = 10")
    assert "Few classes: " in plan().said


def test_advice_for_all_teachers_is_said_once(job, plan):
    change(job, "seed = 0", "seed = 0, num_classes = 10")
    job.write_text(
        job.read_text() + JOB[JOB.index("[[teachers]]") :].replace('"a"', '"b"').replace("= 0", "= 1, num_classes = 10")
    )
    assert plan().said.count("Few classes: ") == 1


def test_many_classes_under_codes_are_told_of_max_kl(job, plan):
    change(job, "max_kl = 0.01", 'codec = { kind = "codes" }')
    change(job, "seed = 0", "seed = 0, num_classes = 300")
    assert "Many classes: --max-kl 0.01" in plan().said


def test_masks_that_differ_are_told_to_leave_only_codecs_of_a_byte_a_class(job, plan):
    change(job, "forecast_sources:teacher", "forecast_sources:masking")
    change(job, "arguments = { seed = 0 }", "")
    said = plan().said
    assert re.search(
        r"Masks differ: [1-9]\d? of 400 rows of the pilot mask \(-inf\) other classes than most rows do", said
    )


def test_rows_that_mask_alike_are_told_nothing(plan):
    assert "Masks differ" not in plan().said


# as JSON --------------------------------------------------------------------------------------------------------------


def test_json_has_the_choice_and_its_cost(plan):
    teacher = plan("--json").teacher
    assert (teacher["codec"]["kind"], teacher["codec"]["rank"]) == ("spectral", 4)
    assert teacher["num_bytes"] == pytest.approx(400 * teacher["bytes_per_row"] + teacher["parameter_bytes"])


def test_json_has_every_point_and_marks_the_choice(plan):
    points = plan("--json").teacher["points"]
    assert [point["codec"]["max_kl"] for point in points if point["is_choice"]] == [0.01]
    assert [point["codec"]["kind"] for point in points].count("spectral") == 5


def test_json_has_break_even_and_advice(plan):
    teacher = plan("--json").teacher
    assert set(teacher["break_even_rows"]) == {"uint8 codes"}
    assert teacher["advice"] == []


def test_top_k_is_compared_where_there_are_more_classes_than_it_keeps(job, plan):
    change(job, "seed = 0", "seed = 0, num_classes = 80")
    teacher = plan("--json").teacher
    saved = 4 * 64 - teacher["bytes_per_row"]
    assert teacher["break_even_rows"]["plain top-64"] == -(-teacher["parameter_bytes"] // saved)


def test_json_has_the_forecast_in_hours(plan):
    found = plan("--json").json
    assert found["hours"] == found["seconds"] / 3600


# options --------------------------------------------------------------------------------------------------------------


def test_a_target_can_be_given_in_place_of_the_jobs(plan):
    assert plan("--max-kl", "0.1", "--json").teacher["codec"]["max_kl"] == 0.1


def test_a_budget_can_be_given_in_place_of_the_jobs(plan):
    found = plan("--bytes-per-row", "14", "--json")
    assert found.json["plan"]["codec"] == {"kind": "rate-target", "bytes_per_row": 14.0}
    assert found.teacher["num_bytes"] <= 14 * 400


def test_a_codec_of_the_job_gives_way_to_a_target(job, plan):
    change(job, "max_kl = 0.01", 'codec = { kind = "codes" }')
    assert plan("--max-kl", "0.01", "--json").teacher["codec"]["kind"] == "spectral"


def test_two_targets_end_as_bad_input(plan):
    ended = plan("--max-kl", "0.1", "--bytes-per-row", "14")
    assert (ended.code, "--max-kl and --bytes-per-row exclude each other" in ended.err) == (2, True)


def test_a_target_that_cannot_be_ends_as_bad_input(plan):
    assert plan("--max-kl", "-1").code == 2


# the picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_picture_is_written_under_the_name_given(plan, tmp_path, name):
    assert plan("--plot", tmp_path / "pictures" / name).code == 0
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [name]


def test_the_picture_marks_the_choice(plan, tmp_path, monkeypatch):
    from kdcache.report import pictures

    monkeypatch.setitem(pictures._STYLE, "svg.fonttype", "none")
    plan("--plot", tmp_path / "plan.svg")
    root = ET.parse(tmp_path / "plan.svg").getroot()  # noqa: S314 - a file that this test wrote
    texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"basis (ring: chosen)", "uint8 codes", "temperature 1", "temperature 4", "a"} <= texts


def test_json_stays_json_beside_a_picture(plan, tmp_path):
    assert plan("--json", "--plot", tmp_path / "plan.svg").teacher["name"] == "a"


def test_a_picture_of_another_kind_ends_as_bad_input(plan, tmp_path):
    ended = plan("--plot", tmp_path / "plan.gif")
    assert (ended.code, "ends in neither .png nor .svg" in ended.err) == (2, True)


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = plan("--plot", tmp_path / "plan.png")
    assert (ended.code, "pip install 'kdcache[plot]'" in ended.err, ended.out) == (2, True, "")
