from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from kdcache.errors import OptionError
from kdcache.report import RatePoints, rate_curves

POINTS = [
    RatePoints(series="basis", bytes_per_row=100, kl={1.0: 0.01, 4.0: 0.001}, is_choice=True),
    RatePoints(series="basis", bytes_per_row=50, kl={1.0: 0.05, 4.0: 0.005}),
    RatePoints(series="lossless float32", bytes_per_row=4000, kl={1.0: 0.0, 4.0: 0.0}),
]


@pytest.fixture(autouse=True)
def _text_as_text(monkeypatch):
    """Let an SVG hold its text, so that it can be read back."""
    from kdcache.report import pictures

    monkeypatch.setitem(pictures._STYLE, "svg.fonttype", "none")


def texts(path) -> list[str]:
    root = ET.parse(path).getroot()  # noqa: S314 - a file that this test wrote
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_teacher_has_a_panel(tmp_path):
    written = rate_curves(dict.fromkeys("abcde", POINTS), tmp_path / "plan.svg", title="Sizes")
    assert [text for text in texts(written) if len(text) == 1 and text.isalpha()] == list("abcde")


def test_an_exact_codec_is_named_at_its_bytes(tmp_path):
    assert "lossless float32: exact" in texts(rate_curves({"a": POINTS}, tmp_path / "plan.svg", title="Sizes"))


def test_a_teacher_with_exact_codecs_alone_can_be_drawn(tmp_path):
    chosen = RatePoints(series="lossless float32", bytes_per_row=4000, kl={1.0: 0.0}, is_choice=True)
    assert "lossless float32: exact, chosen" in texts(rate_curves({"a": [chosen]}, tmp_path / "p.svg", title="Sizes"))


def test_equal_points_give_equal_files(tmp_path):
    one, other = (rate_curves({"a": POINTS}, tmp_path / f"{name}.svg", title="Sizes") for name in ("1", "2"))
    assert one.read_bytes() == other.read_bytes()


def test_dots_in_a_name_are_kept(tmp_path):
    assert rate_curves({"a": POINTS}, tmp_path / "plan.v1.svg", title="Sizes").name == "plan.v1.svg"


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(OptionError, match="ends in neither"):
        rate_curves({"a": POINTS}, tmp_path / "plan", title="Sizes")
