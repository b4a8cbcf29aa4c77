from __future__ import annotations

import sys
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from kdcache.errors import JobError, MissingExtraError
from kdcache.report import Bar, bars, student_curves


def line(error: float, **fields):
    return {"sweep": "small", "soft_weight": 0.9, "temperature": 4.0, "seed": 0, "test_error": error, **fields}


LINES = [
    line(0.30, soft_weight=0.0, temperature=None),
    line(0.32, soft_weight=0.0, temperature=None, seed=1),
    line(0.20, temperature=1.0),
    line(0.22, temperature=1.0, seed=1),
    line(0.15, temperature=4.0),
    line(0.17, temperature=4.0, seed=1),
]
BARS = [Bar(label="hard labels", value=1.46), Bar(label="soft targets", value=0.74, low=0.7, high=0.8, emphasis=True)]


@pytest.fixture(autouse=True)
def _text_as_text(monkeypatch):
    """Let an SVG hold its text, so that it can be read back."""
    from kdcache.report import pictures

    monkeypatch.setitem(pictures._STYLE, "svg.fonttype", "none")


def _root(path) -> ET.Element:
    return ET.parse(path).getroot()  # noqa: S314 - a file that this test wrote


def texts(path) -> set[str]:
    return {"".join(element.itertext()) for element in _root(path).iter("{http://www.w3.org/2000/svg}text")}


def test_a_picture_is_written_as_png_and_svg(tmp_path):
    written = student_curves(LINES, tmp_path / "pictures" / "students")
    assert written == (tmp_path / "pictures" / "students.png", tmp_path / "pictures" / "students.svg")


def test_the_png_is_a_picture_of_some_size(tmp_path):
    png, _ = student_curves(LINES, tmp_path / "students")
    with Image.open(png) as picture:
        assert picture.size == (1050, 630)


def test_a_name_with_a_dot_keeps_it(tmp_path):
    png, _ = student_curves(LINES, tmp_path / "t2.5")
    assert png.name == "t2.5.png"


def test_axes_say_what_they_are_and_their_units(tmp_path):
    _, svg = student_curves(LINES, tmp_path / "students", title="Digits")
    assert {"Digits", "temperature of the soft targets", "test error (%)"} <= texts(svg)


def test_temperatures_stand_on_the_axis(tmp_path):
    _, svg = student_curves(LINES, tmp_path / "students")
    assert {"1", "4"} <= texts(svg)


def test_lines_are_labelled_where_they_end(tmp_path):
    _, svg = student_curves(LINES, tmp_path / "students")
    assert {"hard labels", "soft weight 0.9"} <= texts(svg)


def test_labels_of_several_sweeps_name_them(tmp_path):
    _, svg = student_curves([*LINES, line(0.1, sweep="large")], tmp_path / "students")
    assert {"small, hard labels", "small, soft weight 0.9", "large, soft weight 0.9"} <= texts(svg)


def test_logit_matching_is_labelled_as_such(tmp_path):
    _, svg = student_curves([*LINES, line(0.1, sweep="limit", temperature=None)], tmp_path / "students")
    assert "limit, logit matching, soft weight 0.9" in texts(svg)


def test_the_picture_says_how_many_seeds_there_were(tmp_path):
    _, svg = student_curves(LINES, tmp_path / "students")
    assert "mean over 2 seeds, in a band from the best to the worst" in texts(svg)


def test_the_picture_says_when_there_was_one_seed(tmp_path):
    _, svg = student_curves(LINES[::2], tmp_path / "students")
    assert "one seed each" in texts(svg)


def test_baselines_alone_have_no_temperature_axis(tmp_path):
    _, svg = student_curves(LINES[:2], tmp_path / "students")
    assert "temperature of the soft targets" not in texts(svg)


def test_metrics_are_read_from_their_files(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"sweep": "s", "soft_weight": 0.5, "temperature": 2.0, "seed": 0, "epoch": 1, "test_error": 0.25}\n'
    )
    _, svg = student_curves([file], tmp_path / "students")
    assert "soft weight 0.5" in texts(svg)


def test_missing_metrics_are_a_job_error(tmp_path):
    with pytest.raises(JobError, match="there are no metrics"):
        student_curves([tmp_path / "metrics.jsonl"], tmp_path / "students")


def test_nothing_is_drawn_of_students_that_were_not_tested(tmp_path):
    assert student_curves([{"sweep": "s", "epoch": 1}], tmp_path / "students") == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_figures_give_equal_files(tmp_path, kind):
    student_curves(LINES, tmp_path / "first")
    student_curves(LINES, tmp_path / "second")
    assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()


def test_bars_carry_their_labels_and_figures(tmp_path):
    _, svg = bars(BARS, tmp_path / "bars", title="MNIST", unit="test error (%)", number_format=".2f")
    assert {"hard labels", "soft targets", "1.46", "0.74", "MNIST", "test error (%)"} <= texts(svg)


def test_no_bars_are_no_picture(tmp_path):
    assert bars([], tmp_path / "bars", title="MNIST", unit="%") == ()


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: student_curves(LINES, path),
        lambda path: bars(BARS, path, title="MNIST", unit="%"),
    ],
    ids=["student_curves", "bars"],
)
def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kdcache\[plot\]'"):
        draw(tmp_path / "picture")


def test_importing_the_reports_imports_no_matplotlib():
    import subprocess

    code = "import sys, kdcache.report; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
