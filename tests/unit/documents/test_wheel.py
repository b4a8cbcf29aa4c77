"""The schemas are published: beside the code in the repository, and inside the wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def test_the_project_file_puts_the_schemas_into_the_wheel():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["schemas"] == "kdcache/schemas"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    return set(zipfile.ZipFile(next(folder.glob("*.whl"))).namelist())


@pytest.mark.slow
def test_a_built_wheel_holds_every_schema(wheel_names):
    published = {f"kdcache/schemas/{path.name}" for path in (REPOSITORY / "schemas").glob("*.json")}
    assert published <= wheel_names


@pytest.mark.slow
def test_a_built_wheel_says_that_it_is_typed(wheel_names):
    assert "kdcache/py.typed" in wheel_names
